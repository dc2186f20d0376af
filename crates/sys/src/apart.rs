//! Work that must not end in the middle: in a process of its own, which a signal asks to stop and does not
//! stop.

use crate::call::check;
use model::{Errno, Failure, Object};
use std::sync::atomic::{AtomicI32, Ordering};

/// Signals that ask a program to end.
const ASKING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// The signal that came.
static CAME: AtomicI32 = AtomicI32::new(0);
/// The process that works, in the one that waits for it.
static WORKER: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(signal: libc::c_int) {
    CAME.store(signal, Ordering::Relaxed);
}

extern "C" fn pass_on(signal: libc::c_int) {
    let worker = WORKER.load(Ordering::Relaxed);
    if worker > 0 {
        // SAFETY: kill(2) is async-signal-safe and touches no memory.
        unsafe { libc::kill(worker, signal) };
    }
}

fn handle(handler: extern "C" fn(libc::c_int)) {
    for signal in ASKING {
        // SAFETY: zeroed is a valid sigaction; the handlers touch atomics and make one safe call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Has a process been asked to end, whose work is [`run`]?
///
/// # Errors
/// It has; the work is to be undone.
pub fn go_on() -> Result<(), Failure> {
    match CAME.load(Ordering::Relaxed) {
        0 => Ok(()),
        signal => Err(Failure::conflict(Object::Tree, "", format!("was interrupted by signal {signal}"))),
    }
}

/// Runs `work` in a child and returns its exit status. Signals that ask this process to end reach the
/// child, where [`go_on`] tells of them; the death of this process does, too.
///
/// # Errors
/// Of fork(2). When the child dies of a signal, 128 and its number is the status, as in a shell.
///
/// # Panics
/// When this process has more than one thread: a child would be half of it.
pub fn run(work: impl FnOnce() -> u8) -> Result<u8, Errno> {
    let threads = crate::fd::numbers("/proc/self/task")?;
    assert_eq!(threads.len(), 1, "work apart begins before there are threads");
    let parent = std::process::id();
    // Blocked until each side has its handler.
    // SAFETY: sets of signals on this stack.
    let before = unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) =
            (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, &mut before);
        before
    };
    // SAFETY: as for `all`.
    let unblock = || unsafe { libc::sigprocmask(libc::SIG_SETMASK, &before, std::ptr::null_mut()) };
    // SAFETY: with one thread, which was seen, the child is a whole copy.
    match unsafe { libc::fork() } {
        0 => {
            handle(note);
            // SAFETY: integers only.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
            unblock();
            if std::os::unix::process::parent_id() != parent {
                note(libc::SIGTERM);
            }
            std::process::exit(work().into());
        }
        worker => {
            if let Err(error) = check("fork", worker.into()) {
                unblock();
                return Err(error);
            }
            WORKER.store(worker, Ordering::Relaxed);
            handle(pass_on);
            unblock();
            let status = crate::process::wait(worker, true)?.unwrap_or(0);
            WORKER.store(0, Ordering::Relaxed);
            Ok(match libc::WIFEXITED(status) {
                true => libc::WEXITSTATUS(status) as u8,
                false => 128 + libc::WTERMSIG(status) as u8,
            })
        }
    }
}
