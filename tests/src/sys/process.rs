//! Making children and waiting for them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid};

use super::exit_now;

/// A child of this process.
#[derive(Debug)]
pub struct Child {
    pub pid: Pid,
}

/// Forks; the child runs `body` and then ends with 0.
#[track_caller]
pub fn fork(body: impl FnOnce()) -> Child {
    // SAFETY: workloads fork while they have one thread, so the child's copy of the heap and of every lock is
    // whole; it never returns from `body` into the parent's frames.
    match unsafe { nix::unistd::fork() }.expect("fork") {
        ForkResult::Parent { child } => Child { pid: child },
        ForkResult::Child => {
            body();
            exit_now(0)
        }
    }
}

/// clone(2) with more shared than fork does, without a stack of its own: `CLONE_FILES`, `CLONE_FS`, ...
#[track_caller]
pub fn clone_sharing(flags: i32, body: impl FnOnce()) -> Child {
    assert_eq!(flags & (libc::CLONE_VM | libc::CLONE_SETTLS | libc::CLONE_VFORK), 0, "not for these flags");
    // SAFETY: without CLONE_VM and with a null stack, clone(2) behaves like fork: the child has a copy of the
    // whole address space and returns on its copy of this stack; the remaining null arguments are unused
    // without the flags excluded above.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    match super::call::check("clone", pid) {
        0 => {
            body();
            exit_now(0)
        }
        pid => Child { pid: Pid::from_raw(i32::try_from(pid).expect("a pid")) },
    }
}

impl Child {
    /// The open file behind a descriptor of the child.
    #[track_caller]
    pub fn take_descriptor(&self, number: i32) -> OwnedFd {
        // SAFETY: integers alone.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid.as_raw(), 0) };
        let process = owned(super::call::check("pidfd_open", process));
        // SAFETY: integers alone.
        let taken = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
        owned(super::call::check("pidfd_getfd", taken))
    }

    #[track_caller]
    pub fn wait(&self) -> WaitStatus {
        waitpid(self.pid, Some(WaitPidFlag::__WALL)).expect("waitpid")
    }

    /// Waits until the child has ended well: its own assertions held.
    #[track_caller]
    pub fn succeed(&self) {
        let status = self.wait();
        assert_eq!(status, WaitStatus::Exited(self.pid, 0), "a child failed, see the lines above");
    }

    pub fn kill(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid, signal).expect("kill");
    }

    /// waitid with `flags`, `WNOWAIT` among them leaves the child as it is.
    #[track_caller]
    pub fn peek(&self, flags: WaitPidFlag) -> WaitStatus {
        let id = nix::sys::wait::Id::Pid(self.pid);
        nix::sys::wait::waitid(id, flags | WaitPidFlag::WNOWAIT).expect("waitid")
    }
}

/// Like [`fork`], with another signal than SIGCHLD at the child's end.
#[track_caller]
pub fn clone_with_exit_signal(signal: nix::sys::signal::Signal, body: impl FnOnce()) -> Child {
    // SAFETY: as in `clone_sharing`, with nothing shared at all.
    let pid = unsafe { libc::syscall(libc::SYS_clone, signal as i32, 0, 0, 0, 0) };
    match super::call::check("clone", pid) {
        0 => {
            body();
            exit_now(0)
        }
        pid => Child { pid: Pid::from_raw(i32::try_from(pid).expect("a pid")) },
    }
}

fn owned(number: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(number).expect("a descriptor")) }
}
