//! Signal handlers, and signals that wait for delivery.
//!
//! Read from: rt_sigaction(2) in the process; ptrace(2) PTRACE_PEEKSIGINFO from outside.
//! Rebuilt by: rt_sigaction(2); rt_sigqueueinfo(2) and rt_tgsigqueueinfo(2) by the thread itself, which may
//! send itself anything, while all signals are blocked.

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

/// Sets the handlers, in the order of [`with_actions`].
pub fn restore(entries: &[SaEntry], ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("set the signal handlers");
    for (signal, entry) in with_actions().zip(entries) {
        // A new process has the default everywhere.
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

/// Queues signals for the thread `tid` of `pid`, or with no `tid` for the process.
pub fn restore_pending(
    queue: &SignalQueueEntry,
    pid: i32,
    tid: Option<i32>,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    ops.list.label("queue the pending signals");
    for entry in &queue.signals {
        if entry.siginfo.len() != 128 {
            return Err(Failure::corrupt(format!("core-{pid}.img"), None, "a signal is not 128 bytes long"));
        }
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
