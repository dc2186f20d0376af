//! Scheduling: policy, nice value, real-time priority. Each thread has its own.
//!
//! Read from: sched_getattr(2) from outside. Rebuilt by: sched_setattr(2).
//! Not kept: deadline parameters (refused), affinity, utilisation clamps.

use super::ZERO;
use crate::contract::TaskOps;
use image::ThreadCoreEntry;
use model::Failure;
use sys::process::Sched;

pub const SCHED_DEADLINE: u32 = 6;
const RESET_ON_FORK: u32 = libc::SCHED_RESET_ON_FORK as u32;

/// Puts it in the record of a thread.
pub fn record(sched: Sched, core: &mut ThreadCoreEntry) {
    core.sched_nice = Some(sched.nice);
    core.sched_policy = Some(sched.policy);
    core.sched_prio = (sched.priority != 0).then_some(sched.priority);
}

pub fn restore(core: &ThreadCoreEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    let policy = core.sched_policy.unwrap_or(0);
    let nice = core.sched_nice.unwrap_or(0);
    ops.list.label("set the scheduling");
    // struct sched_attr, first version: size, policy, flags, nice, priority, three times of a deadline.
    let mut attr = Vec::with_capacity(48);
    attr.extend_from_slice(&48u32.to_ne_bytes());
    attr.extend_from_slice(&(policy & !RESET_ON_FORK).to_ne_bytes());
    attr.extend_from_slice(&u64::from(policy & RESET_ON_FORK != 0).to_ne_bytes());
    attr.extend_from_slice(&nice.to_ne_bytes());
    attr.extend_from_slice(&core.sched_prio.unwrap_or(0).to_ne_bytes());
    attr.resize(48, 0);
    let attr = ops.bytes(&attr)?;
    ops.list.ok(libc::SYS_sched_setattr, &[ZERO, attr.into(), ZERO]);
    Ok(())
}
