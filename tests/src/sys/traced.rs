//! A program that is held in the instant before a system call.

use std::time::Instant;

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::tool::LIMIT;

/// The number and the first three arguments of a system call.
pub type Call = [u64; 4];

fn threads(pid: i32) -> Vec<Pid> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().map(Pid::from_raw)).collect()
}

/// A process whose threads all stop at system calls.
#[derive(Debug)]
pub struct Traced {
    pid: i32,
    threads: Vec<Pid>,
}

impl Traced {
    /// Begins with the next calls of its threads, which make no others meanwhile.
    ///
    /// # Errors
    /// When it cannot be traced.
    pub fn begin(pid: i32) -> Result<Self, String> {
        let threads = threads(pid);
        for thread in &threads {
            let options = Options::PTRACE_O_TRACESYSGOOD;
            ptrace::seize(*thread, options)
                .and_then(|()| ptrace::interrupt(*thread))
                .map_err(|e| format!("trace {thread}: {e}"))?;
        }
        for thread in &threads {
            waitpid(*thread, Some(WaitPidFlag::__WALL))
                .and_then(|_| ptrace::syscall(*thread, None))
                .map_err(|e| format!("follow {thread}: {e}"))?;
        }
        Ok(Self { pid, threads })
    }

    /// Lets it go on until a thread is about to make such a call, does `meanwhile`, and leaves it to itself.
    ///
    /// # Errors
    /// When it makes no such call.
    pub fn before(
        self,
        is_it: impl Fn(&Call) -> bool,
        meanwhile: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            for thread in &self.threads {
                let signal = match waitpid(*thread, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                    Ok(WaitStatus::PtraceSyscall(_)) => {
                        let r = ptrace::getregs(*thread).map_err(|e| format!("read registers: {e}"))?;
                        // Between entry and exit, the kernel has put an error where the result will be.
                        if r.rax as i64 == -i64::from(libc::ENOSYS)
                            && is_it(&[r.orig_rax, r.rdi, r.rsi, r.rdx])
                        {
                            let done = meanwhile();
                            self.leave(*thread);
                            return done;
                        }
                        None
                    }
                    Ok(WaitStatus::Stopped(_, signal)) => Some(signal),
                    Ok(WaitStatus::PtraceEvent(..)) => None,
                    Ok(WaitStatus::StillAlive) | Err(_) => continue,
                    Ok(_) => return Err(format!("{} ended without such a call", self.pid)),
                };
                ptrace::syscall(*thread, signal).map_err(|e| format!("follow {thread}: {e}"))?;
            }
        }
        Err(format!("{} made no such call within {LIMIT:?}", self.pid))
    }

    /// `stopped` is, and the others are not.
    fn leave(&self, stopped: Pid) {
        for thread in &self.threads {
            if *thread != stopped && ptrace::interrupt(*thread).is_ok() {
                let _ = waitpid(*thread, Some(WaitPidFlag::__WALL));
            }
            // One that was killed meanwhile is nobody's any more.
            let _ = ptrace::detach(*thread, None);
        }
    }
}
