//! System calls in stopped threads, one in each, through ptrace at a `syscall` instruction that the
//! process already has.

use crate::arch::Registers;
use model::Errno;
use sys::ptrace::{Running, Stop, Stopped};

/// A call to be made by a stopped thread.
#[derive(Debug)]
pub struct Call<'c> {
    pub thread: Stopped,
    pub from: &'c Registers,
    /// Where the process has a `syscall`.
    pub instruction: u64,
    pub number: i64,
    pub args: &'c [u64],
}

/// What a system call did, and the thread, stopped as it left it.
///
/// # Errors
/// The thread is gone (`ESRCH`), or ptrace(2) failed. An error of the call itself is its result.
pub type Called = Result<(Stopped, i64), Errno>;

/// Makes calls in threads, all at the same time: the threads of several processes, or only one of each.
pub fn call_all(calls: Vec<Call>) -> Vec<Called> {
    let begin = |call: Call| {
        call.from.calling(call.instruction, call.number, call.args).write(&call.thread)?;
        call.thread.resume_to_syscall()
    };
    let begun: Vec<Result<Running, Errno>> = calls.into_iter().map(begin).collect();
    let entered: Vec<Result<Running, Errno>> = begun
        .into_iter()
        .map(|running| running.and_then(to_syscall_stop).and_then(Stopped::resume_to_syscall))
        .collect();
    entered
        .into_iter()
        .map(|running| {
            let thread = running.and_then(to_syscall_stop)?;
            let result = Registers::read(&thread)?.result();
            Ok((thread, result))
        })
        .collect()
}

/// Signals that cannot be blocked may come between; they are given back to the process.
fn to_syscall_stop(mut running: Running) -> Result<Stopped, Errno> {
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
