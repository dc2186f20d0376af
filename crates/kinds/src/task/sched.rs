//! Scheduling: policy, nice value, real-time priority, the processors to run on. Each thread has its own.
//!
//! Read from: sched_getattr(2) and sched_getaffinity(2) from outside. Rebuilt by: sched_setattr(2),
//! sched_setaffinity(2).
//! Not kept: deadline parameters (refused), utilisation clamps; processors that the host does not have.

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

/// Puts the processors that a thread may run on in its record.
pub fn record_affinity(affinity: Vec<u8>, core: &mut ThreadCoreEntry) {
    core.affinity = Some(if is_everywhere(&affinity) { Vec::new() } else { affinity });
}

/// Are these all processors there are?
pub fn is_everywhere(affinity: &[u8]) -> bool {
    affinity.iter().map(|byte| byte.count_ones()).sum::<u32>() >= sys::process::processors()
}

/// Restricts a thread to its processors. Where the host has none of them it runs anywhere. A thread that may
/// run anywhere is only told so when this program, whose copy it is, may not.
pub fn restore_affinity(
    core: &ThreadCoreEntry,
    is_own_everywhere: bool,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    /// More processors than a kernel knows.
    const ALL: [u8; 1024] = [0xff; 1024];
    let Some(affinity) = &core.affinity else { return Ok(()) };
    let mask = match affinity.as_slice() {
        [] if is_own_everywhere => return Ok(()),
        [] => &ALL,
        some => &some[..some.len().min(ALL.len())],
    };
    ops.list.label("set the processors");
    let bytes = ops.bytes(mask)?;
    ops.list.any(libc::SYS_sched_setaffinity, &[ZERO, (mask.len() as u64).into(), bytes.into()]);
    Ok(())
}

/// Sets how a thread is scheduled, if not as `own` is: this program, whose copy it is.
pub fn restore(core: &ThreadCoreEntry, own: &Sched, ops: &mut TaskOps) -> Result<(), Failure> {
    let policy = core.sched_policy.unwrap_or(0);
    let nice = core.sched_nice.unwrap_or(0);
    let wanted = Sched { policy, nice, priority: core.sched_prio.unwrap_or(0) };
    if wanted == *own && policy & RESET_ON_FORK == 0 {
        return Ok(());
    }
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
