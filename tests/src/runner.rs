//! From a test program's trial to a process in fresh namespaces and back.
//!
//! The test program runs its trials on threads; namespaces want a process with one thread. So each trial runs
//! the test program again with `--inside NAME`, and that one enters the namespaces.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Exit status of a trial that could not run here; its last line says why.
const SKIPPED: i32 = 77;

/// What a line begins with that a trial says to whoever reads the tests' output, also when it passed.
pub const NOTE: &str = "NOTE ";

/// How a trial ended that did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Passed,
    Skipped(String),
}

/// If this process is the inner half of a trial: runs it and ends.
///
/// `run` gets the trial's name and an empty directory of its own.
pub fn inside(run: impl FnOnce(&str, &Path) -> Result<Verdict, String>) {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some("--inside") {
        return;
    }
    let name = arguments.next().expect("--inside NAME DIRECTORY");
    let directory = PathBuf::from(arguments.next().expect("--inside NAME DIRECTORY"));
    let status = crate::namespace::enter(&directory, || match run(&name, &directory) {
        Ok(Verdict::Passed) => 0,
        Ok(Verdict::Skipped(reason)) => {
            println!("{reason}");
            SKIPPED
        }
        Err(problem) => {
            println!("{problem}");
            1
        }
    });
    match status {
        Ok(status) => std::process::exit(status),
        Err(e) => {
            println!("enter fresh namespaces: {e}");
            std::process::exit(2);
        }
    }
}

/// Runs one trial in namespaces of its own.
///
/// # Errors
/// With everything that the trial printed.
pub fn outside(name: &str) -> Result<Verdict, String> {
    let (status, said) = outside_saying(name)?;
    match status {
        Some(0) => {
            said.lines().filter(|line| line.starts_with(NOTE)).for_each(|line| println!("{name}: {line}"));
            Ok(Verdict::Passed)
        }
        Some(SKIPPED) => Ok(Verdict::Skipped(said.lines().last().unwrap_or_default().to_owned())),
        _ => Err(said),
    }
}

/// The same, for its exit status and all that it printed.
///
/// # Errors
/// When it could not be run, or left something behind.
pub fn outside_saying(name: &str) -> Result<(Option<i32>, String), String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("crtools-trial-{}-{number}", std::process::id()));
    std::fs::create_dir(&directory).map_err(|e| format!("make {}: {e}", directory.display()))?;
    let me = std::env::current_exe().map_err(|e| e.to_string())?;
    let ran = Command::new(me).arg("--inside").arg(name).arg(&directory).output();
    // What was in it lived on a tmpfs of the trial's namespace: the folder itself is empty.
    let removed = std::fs::remove_dir(&directory);
    let ran = ran.map_err(|e| format!("run the trial: {e}"))?;
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    removed.map_err(|e| format!("the trial left something in {}: {e}\n{said}", directory.display()))?;
    Ok((ran.status.code(), said))
}
