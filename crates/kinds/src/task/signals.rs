//! Signal handlers, and signals that wait for delivery.
//!
//! Read from: rt_sigaction(2) in the process; ptrace(2) PTRACE_PEEKSIGINFO from outside.
//! Rebuilt by: rt_sigaction(2); rt_sigqueueinfo(2) and rt_tgsigqueueinfo(2) by the thread itself, which may
//! send itself anything, while all signals are blocked.

use super::timers::Senders;
use super::{Answers, Ask, ZERO, words};
use crate::contract::TaskOps;
use image::{SaEntry, SiginfoEntry, SignalQueueEntry};
use model::Failure;

/// Every signal that has a disposition to choose: 1 to 64 without SIGKILL and SIGSTOP.
pub fn with_actions() -> impl Iterator<Item = i32> {
    (1..=64).filter(|signal| *signal != libc::SIGKILL && *signal != libc::SIGSTOP)
}

/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION: usize = 32;
const MASK_LEN: u64 = 8;

#[derive(Debug, Clone, Copy)]
pub struct Asked(u64);

pub fn ask(ask: &mut Ask) -> Result<Asked, Failure> {
    let room = ask.room(ACTION * 64)?;
    ask.list.label("read the signal handlers");
    for (at, signal) in with_actions().enumerate() {
        let to = room + (at * ACTION) as u64;
        ask.list.ok(libc::SYS_rt_sigaction, &[signal.into(), ZERO, to.into(), MASK_LEN.into()]);
    }
    Ok(Asked(room))
}

impl Asked {
    pub fn answer(self, answers: Answers) -> Vec<SaEntry> {
        (0..with_actions().count())
            .map(|at| {
                let [sigaction, flags, restorer, mask] = answers.words(self.0 + (at * ACTION) as u64);
                SaEntry { sigaction, flags, restorer, mask, compat_sigaction: None, mask_extended: None }
            })
            .collect()
    }
}

/// Sets the default everywhere. What is ignored stays so in a new process and over execve(2): SIGPIPE in every
/// Rust program, SIGHUP below nohup(1).
pub fn reset(ops: &mut TaskOps) -> Result<(), Failure> {
    let action = ops.bytes(&[0; ACTION])?;
    ops.list.label("reset the signal handlers");
    for signal in with_actions() {
        ops.list.ok(libc::SYS_rt_sigaction, &[signal.into(), action.into(), ZERO, MASK_LEN.into()]);
    }
    Ok(())
}

/// Sets the handlers, in the order of [`with_actions`].
pub fn restore(entries: &[SaEntry], ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("set the signal handlers");
    for (signal, entry) in with_actions().zip(entries) {
        // The first process was reset, the others were made by it.
        if (entry.sigaction, entry.flags, entry.mask) == (0, 0, 0) {
            continue;
        }
        let action = ops.bytes(&words(&[entry.sigaction, entry.flags, entry.restorer, entry.mask]))?;
        ops.list.ok(libc::SYS_rt_sigaction, &[signal.into(), action.into(), ZERO, MASK_LEN.into()]);
    }
    Ok(())
}

/// As `core-*.img` holds a queue.
pub fn queue(pending: Vec<[u8; 128]>) -> SignalQueueEntry {
    SignalQueueEntry {
        signals: pending.into_iter().map(|info| SiginfoEntry { siginfo: info.to_vec() }).collect(),
    }
}

/// Why these cannot wait for delivery, if so.
pub fn check(queue: &SignalQueueEntry) -> Option<String> {
    queue.signals.iter().find_map(|entry| {
        let Some(number) = entry.siginfo.first_chunk().filter(|_| entry.siginfo.len() == 128) else {
            return Some(format!("a pending signal has {} bytes", entry.siginfo.len()));
        };
        let signal = i32::from_ne_bytes(*number);
        // These two act at once: on the agent, which would never come to an end of its list.
        let can_wait = (1..=64).contains(&signal) && signal != libc::SIGKILL && signal != libc::SIGSTOP;
        (!can_wait).then(|| format!("the signal {signal} cannot be pending"))
    })
}

/// Queues signals for the thread `tid` of `pid`, or with no `tid` for the process; not those that timers send again.
pub fn restore_pending(
    queue: &SignalQueueEntry,
    senders: Option<&Senders>,
    pid: i32,
    tid: Option<i32>,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    let is_ours = |entry: &&SiginfoEntry| senders.is_none_or(|senders| !senders.sends(&entry.siginfo));
    ops.list.label("queue the pending signals");
    for entry in queue.signals.iter().filter(is_ours) {
        // Checked by the loader.
        let signal = i32::from_ne_bytes(entry.siginfo[..4].try_into().expect("four bytes"));
        let info = ops.bytes(&entry.siginfo)?;
        match tid {
            None => ops.list.ok(libc::SYS_rt_sigqueueinfo, &[pid.into(), signal.into(), info.into()]),
            Some(tid) => ops
                .list
                .ok(libc::SYS_rt_tgsigqueueinfo, &[pid.into(), tid.into(), signal.into(), info.into()]),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(signal: i32, length: usize) -> SignalQueueEntry {
        let mut siginfo = signal.to_ne_bytes().to_vec();
        siginfo.resize(length, 0);
        SignalQueueEntry { signals: vec![SiginfoEntry { siginfo }] }
    }

    #[test]
    fn only_signals_that_can_wait_are_taken() {
        assert_eq!(check(&pending(libc::SIGUSR1, 128)), None);
        assert_eq!(check(&pending(64, 128)), None);
        for signal in [0, -1, 65, libc::SIGKILL, libc::SIGSTOP] {
            assert!(check(&pending(signal, 128)).unwrap().contains(&signal.to_string()));
        }
        assert_eq!(check(&pending(10, 3)).unwrap(), "a pending signal has 3 bytes");
    }
}
