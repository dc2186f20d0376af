//! The tool under test and its peer: where they are, and one run of either.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::reap::Reaper;

/// The longest that one run of a tool may take.
pub const LIMIT: Duration = Duration::from_secs(40);

/// A system call that there is not: whoever refuses it allows all others.
pub const NO_CALL: i64 = 9999;

/// A program with the command line of CRIU.
#[derive(Debug, Clone)]
pub struct Tool {
    pub path: PathBuf,
    /// It is CRIU itself: its messages are not ours to judge.
    pub is_peer: bool,
    /// It is run under a seccomp filter, which allows everything that matters here.
    pub is_filtered: bool,
}

/// How a run ended, and what it said on its standard streams.
#[derive(Debug)]
pub struct Ran {
    pub status: Option<WaitStatus>,
    pub said: String,
    /// The log file it was told to write.
    pub log: PathBuf,
}

impl Ran {
    pub fn is_good(&self) -> bool {
        matches!(self.status, Some(WaitStatus::Exited(_, 0)))
    }

    pub fn exit_code(&self) -> Option<i32> {
        match self.status {
            Some(WaitStatus::Exited(_, code)) => Some(code),
            _ => None,
        }
    }
}

/// The wrapper made by `tests/peer.sh`, if it is there.
pub fn peer() -> Option<Tool> {
    let home = std::env::var_os("CRTOOLS_PEER").unwrap_or_else(|| "/var/cache/crtools-peer".into());
    let path = Path::new(&home).join("criu");
    path.exists().then_some(Tool { path, is_peer: true, is_filtered: false })
}

/// What is tested: `CRTOOLS_BIN`, or the `crtools` that cargo built beside this program.
///
/// # Errors
/// When there is none, with what to do about it.
pub fn under_test() -> Result<Tool, String> {
    if let Some(path) = std::env::var_os("CRTOOLS_BIN") {
        let path = fs::canonicalize(&path).map_err(|e| format!("CRTOOLS_BIN {}: {e}", path.display()))?;
        let is_peer = peer().is_some_and(|peer| fs::canonicalize(peer.path).is_ok_and(|p| p == path));
        return Ok(Tool { path, is_peer, is_filtered: false });
    }
    let path = profile_directory().join("crtools");
    if path.exists() {
        return Ok(Tool { path, is_peer: false, is_filtered: false });
    }
    Err(format!("{} is missing: build it first (cargo build -p crtools), or set CRTOOLS_BIN", path.display()))
}

/// Where cargo puts the binaries of the profile that this program was built with.
pub fn profile_directory() -> PathBuf {
    let me = std::env::current_exe().expect("the path of this program");
    // Test programs lie one folder deeper than binaries.
    let directory = me.parent().expect("a program lies in a folder");
    let directory =
        if directory.ends_with("deps") { directory.parent().expect("deps has a parent") } else { directory };
    directory.to_path_buf()
}

impl Tool {
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Runs one command and kills it when it has not ended after `delay`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run_killed(
        &self,
        reaper: &mut Reaper,
        images: &Path,
        command: &str,
        arguments: &[&str],
        delay: Duration,
    ) -> io::Result<Ran> {
        let (mut run, said, log) = self.command(images, command, arguments)?;
        let pid = reaper.start(&mut run)?;
        std::thread::sleep(delay);
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let status = reaper.wait(pid, LIMIT);
        Ok(Ran { status, said: read_lossy(&said), log })
    }

    /// Starts one command; its status is for whoever waits for the pid.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(
        &self,
        reaper: &mut Reaper,
        images: &Path,
        command: &str,
        arguments: &[&str],
    ) -> io::Result<(i32, PathBuf)> {
        let (mut run, _, log) = self.command(images, command, arguments)?;
        Ok((reaper.start(&mut run)?, log))
    }

    /// The command, and where its words and its log go.
    fn command(
        &self,
        images: &Path,
        command: &str,
        arguments: &[&str],
    ) -> io::Result<(Command, PathBuf, PathBuf)> {
        let name = format!("{command}.log");
        let said = images.with_extension(format!("{command}.said"));
        let mut run = Command::new(&self.path);
        run.arg(command).arg("-D").arg(images).args(["-o", &name, "-v4"]).args(arguments);
        let file = fs::File::create(&said)?;
        run.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        if self.is_filtered {
            let refuse = || {
                crate::sys::security::refuse_call(NO_CALL, libc::ENOSYS);
                Ok(())
            };
            // SAFETY: between fork and exec the closure makes one system call, of numbers and memory on its stack.
            unsafe { run.pre_exec(refuse) };
        }
        Ok((run, said, images.join(name)))
    }

    /// Runs one command with its log at `images/NAME.log`.
    ///
    /// # Errors
    /// When it cannot be started. A bad end is not an error here but a status.
    pub fn run(
        &self,
        reaper: &mut Reaper,
        images: &Path,
        command: &str,
        arguments: &[&str],
        limit: Duration,
    ) -> io::Result<Ran> {
        let (mut run, said, log) = self.command(images, command, arguments)?;
        let pid = reaper.start(&mut run)?;
        let status = reaper.wait(pid, limit);
        if status.is_none() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            reaper.wait(pid, Duration::from_secs(5));
        }
        Ok(Ran { status, said: read_lossy(&said), log })
    }
}

/// A file's text, or nothing.
pub fn read_lossy(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The last lines of a text file under a title, for the report of a failure.
pub fn tail(title: &str, path: &Path, lines: usize) -> String {
    let text = read_lossy(path);
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    format!("--- {title}: last {} of {} lines\n{}\n", last.len(), all.len(), last.join("\n"))
}
