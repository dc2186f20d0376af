//! Waiting as the first process of a pid namespace does: for one's own children and for every orphan.

use std::collections::HashMap;
use std::io;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Statuses of the processes that ended while another one was waited for.
#[derive(Debug, Default)]
pub struct Reaper {
    ended: HashMap<i32, WaitStatus>,
}

impl Reaper {
    /// Starts a command whose status is later asked for by pid.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&mut self, command: &mut Command) -> io::Result<i32> {
        // Dropping the handle neither kills nor waits; pid 1 reaps everything itself.
        Ok(command.spawn()?.id() as i32)
    }

    pub fn collect(&mut self) {
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(status) => {
                    if let Some(pid) = status.pid() {
                        self.ended.insert(pid.as_raw(), status);
                    }
                }
                Err(Errno::EINTR) => {}
                Err(e) => panic!("waitpid: {e}"),
            }
        }
    }

    /// The status of `pid` if it has ended; it is forgotten then, for the pid may come back.
    pub fn ended(&mut self, pid: i32) -> Option<WaitStatus> {
        self.collect();
        self.ended.remove(&pid)
    }

    /// Waits for `pid` up to `limit`.
    pub fn wait(&mut self, pid: i32, limit: Duration) -> Option<WaitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended(pid) {
                return Some(status);
            }
            if start.elapsed() > limit {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Forgets what has ended so far.
    pub fn forget(&mut self) {
        self.collect();
        self.ended.clear();
    }

    /// Kills everything else in this pid namespace, and sees it end.
    pub fn clear(&mut self) {
        for _ in 0..200 {
            if others().is_empty() {
                break;
            }
            // The first process of a pid namespace is not hit by its own broadcast.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            self.collect();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.forget();
    }
}

/// The pids in this namespace besides this process.
pub fn others() -> Vec<i32> {
    let me = std::process::id() as i32;
    let mut pids: Vec<i32> = std::fs::read_dir("/proc")
        .expect("read /proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != me)
        .collect();
    pids.sort_unstable();
    pids
}

/// Standard streams: nothing in, all that is said in one file.
///
/// # Errors
/// When the file cannot be made.
pub fn quiet(command: &mut Command, said: &std::path::Path) -> io::Result<()> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(said)?;
    command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
    Ok(())
}

/// Waits for one child without looking at others: its raw status and its peak memory in KiB.
///
/// # Errors
/// Those of wait4(2).
pub fn wait_with_peak(pid: i32) -> io::Result<(i32, u64)> {
    let mut status = 0;
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    loop {
        // SAFETY: the kernel writes one int and one rusage, both live locals, during the call.
        if unsafe { libc::wait4(pid, &raw mut status, 0, usage.as_mut_ptr()) } == pid {
            // SAFETY: zeroed, then written by the kernel; all of it is integers.
            return Ok((status, unsafe { usage.assume_init() }.ru_maxrss as u64));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
