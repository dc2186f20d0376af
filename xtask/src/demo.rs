//! `cargo xtask demo`: the main job in front of one's eyes, on a program that counts.
//!
//! All of it happens in a pid and a mount namespace of its own, so that the restored pid is free and
//! nothing of the host is touched.

use crate::generate::root;
use crate::test::is_root;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const BEAT: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(10);

/// Builds the command and starts over inside the namespaces.
pub fn run() -> Result<(), String> {
    if !is_root() {
        return Err(
            "restoring a process with its pid needs root: sudo -E env PATH=\"$PATH\" cargo xtask demo".into(),
        );
    }
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--release", "--package", "crtools"]).current_dir(root());
    succeed("cargo build", &mut build)?;

    let dir = std::env::temp_dir().join(format!("crtools-demo-{}", std::process::id()));
    fs::create_dir_all(dir.join("images")).map_err(|error| format!("{}: {error}", dir.display()))?;
    let mut inside = Command::new("unshare");
    inside.args(["--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]);
    inside.arg(this_program()?).arg("demo-inside").arg(&dir);
    let result = succeed("demo", &mut inside);
    let _ = fs::remove_dir_all(&dir);
    result
}

fn this_program() -> Result<PathBuf, String> {
    std::env::current_exe().map_err(|error| format!("/proc/self/exe: {error}"))
}

/// Cargo puts all profiles beside each other, so the command is one folder away.
fn crtools() -> Result<PathBuf, String> {
    let this = this_program()?;
    let profiles = this.parent().and_then(Path::parent).ok_or("this program is in no target folder")?;
    Ok(profiles.join("release/crtools"))
}

fn succeed(what: &str, command: &mut Command) -> Result<(), String> {
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what}: {status}")),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

/// The show itself, as the first process of the new pid namespace.
pub fn inside(dir: &Path) -> Result<(), String> {
    let (images, numbers) = (dir.join("images"), dir.join("numbers"));
    // A session of its own and no terminal: nothing of it is outside of the tree.
    let mut counter = Command::new("setsid")
        .arg(this_program()?)
        .arg("demo-count")
        .arg(&numbers)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("setsid: {error}; it comes with util-linux"))?;
    let pid = counter.id();
    wait_for(&numbers, 15)?;
    println!(
        "A program counts ten times a second. It is process {pid} and has come to {}.\n",
        last(&numbers)
    );

    println!("$ crtools dump -t {pid} -D images");
    let began = Instant::now();
    let mut dump = Command::new(crtools()?);
    succeed("crtools dump", dump.arg("dump").args(["-t", &pid.to_string()]).arg("-D").arg(&images))?;
    let took = began.elapsed();
    counter.wait().map_err(|error| format!("wait: {error}"))?;
    let saved = last(&numbers);
    println!("Saved in {:.1} ms to {}.", took.as_secs_f64() * 1e3, size(&images));
    sleep(BEAT * 5);
    if Path::new(&format!("/proc/{pid}")).exists() || last(&numbers) != saved {
        return Err(format!("process {pid} is still there"));
    }
    println!("Process {pid} is gone; the count stands at {saved}.\n");

    println!("$ crtools restore -D images -d");
    let began = Instant::now();
    let mut restore = Command::new(crtools()?);
    succeed("crtools restore", restore.args(["restore", "-d", "-D"]).arg(&images))?;
    println!("Back after {:.1} ms.", began.elapsed().as_secs_f64() * 1e3);
    if !Path::new(&format!("/proc/{pid}")).exists() {
        return Err(format!("process {pid} is not back"));
    }
    wait_for(&numbers, saved + 15)?;
    println!("Process {pid} goes on and has come to {}.", last(&numbers));
    no_number_is_missing(&numbers)?;
    println!("No number is missing, and none is there twice.");
    Ok(())
}

/// The program that is saved: it has a number in memory and an open file.
pub fn count(file: &Path) -> Result<(), String> {
    close_inherited();
    let mut file = File::create(file).map_err(|error| error.to_string())?;
    for number in 1_u64.. {
        writeln!(file, "{number}").map_err(|error| error.to_string())?;
        sleep(BEAT);
    }
    Ok(())
}

/// What a terminal or a build tool has left open belongs to the mounts outside, and would be refused.
fn close_inherited() {
    let names: Vec<_> = match fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries.flatten().map(|entry| entry.file_name()).collect(),
        Err(_) => return,
    };
    let numbers = names.iter().filter_map(|name| name.to_str()?.parse().ok());
    numbers.filter(|&number| number > 2).for_each(sys::inherited::close);
}

fn written(file: &Path) -> Vec<u64> {
    let text = OpenOptions::new().read(true).open(file).and_then(std::io::read_to_string).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn last(file: &Path) -> u64 {
    written(file).last().copied().unwrap_or(0)
}

fn wait_for(file: &Path, number: u64) -> Result<(), String> {
    let began = Instant::now();
    while last(file) < number {
        if began.elapsed() > PATIENCE {
            return Err(format!("the program does not count: it stands at {}", last(file)));
        }
        sleep(BEAT / 4);
    }
    Ok(())
}

fn no_number_is_missing(file: &Path) -> Result<(), String> {
    let numbers = written(file);
    match numbers.iter().zip(1..).find(|(number, expected)| *number != expected) {
        None => Ok(()),
        Some((number, expected)) => Err(format!("where {expected} should be is {number}")),
    }
}

fn size(images: &Path) -> String {
    let sizes: Vec<u64> = fs::read_dir(images)
        .map(|entries| {
            entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|data| data.len()).collect()
        })
        .unwrap_or_default();
    format!("{} files with {} KiB together", sizes.len(), sizes.iter().sum::<u64>() / 1024)
}
