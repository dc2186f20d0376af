//! One system call at a time in a stopped thread, through ptrace at a `syscall` instruction that the
//! process already has.

use crate::arch::Registers;
use model::Errno;
use sys::ptrace::{Running, Stop, Stopped};

/// What a system call did, and the thread, stopped as it left it.
///
/// # Errors
/// The thread is gone (`ESRCH`), or ptrace(2) failed. An error of the call itself is its result.
pub fn call(
    thread: Stopped,
    from: &Registers,
    instruction: u64,
    number: i64,
    args: &[u64],
) -> Result<(Stopped, i64), Errno> {
    from.calling(instruction, number, args).write(&thread)?;
    let thread = to_syscall_stop(thread)?;
    let thread = to_syscall_stop(thread)?;
    let result = Registers::read(&thread)?.result();
    Ok((thread, result))
}

/// Signals that cannot be blocked may come between; they are given back to the process.
fn to_syscall_stop(thread: Stopped) -> Result<Stopped, Errno> {
    let mut running: Running = thread.resume_to_syscall()?;
    let mut kept = Vec::new();
    let stopped = loop {
        match running.wait()? {
            Stop::Syscall(stopped) => break stopped,
            Stop::Signal(stopped, signal) => {
                kept.push(signal);
                running = stopped.resume_to_syscall()?;
            }
            Stop::Trap(stopped) | Stop::Group(stopped, _) | Stop::Event(stopped, _) => {
                running = stopped.resume_to_syscall()?;
            }
            Stop::Exited(_) => return Err(Errno { call: "ptrace", code: libc::ESRCH }),
        }
    };
    for signal in kept {
        sys::process::kill(stopped.tid(), signal)?;
    }
    Ok(stopped)
}

/// Where a process has a `syscall` instruction: in the bytes of its vdso, mapped at `base`.
pub fn find_instruction(vdso: &[u8], base: u64) -> Option<u64> {
    let at = vdso.windows(2).position(|pair| pair == crate::arch::SYSCALL)?;
    Some(base + at as u64)
}
