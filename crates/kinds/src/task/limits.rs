//! Resource limits.
//!
//! Read from: prlimit(2) in the process itself, which needs no right over it.
//! Rebuilt by: prlimit(2). A hard limit above the one of the restore needs CAP_SYS_RESOURCE; without it, the
//! highest possible is set, with a warning.

use super::{Answers, Ask, ZERO, words};
use crate::contract::TaskOps;
use image::{RlimitEntry, TaskRlimitsEntry};
use model::Failure;

/// RLIMIT_CPU to RLIMIT_RTTIME.
const COUNT: u64 = 16;

#[derive(Debug, Clone, Copy)]
pub struct Asked(u64);

pub fn ask(ask: &mut Ask) -> Result<Asked, Failure> {
    let room = ask.room((COUNT * 16) as usize)?;
    ask.list.label("read the resource limits");
    for resource in 0..COUNT {
        ask.list.ok(libc::SYS_prlimit64, &[ZERO, resource.into(), ZERO, (room + resource * 16).into()]);
    }
    Ok(Asked(room))
}

impl Asked {
    pub fn answer(self, answers: Answers) -> TaskRlimitsEntry {
        let limit = |resource: u64| {
            let [cur, max] = answers.words(self.0 + resource * 16);
            RlimitEntry { cur, max }
        };
        TaskRlimitsEntry { rlimits: (0..COUNT).map(limit).collect() }
    }
}

pub fn restore(
    entry: &TaskRlimitsEntry,
    can_raise: bool,
    pid: i32,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    ops.list.label("set the resource limits");
    for (resource, limit) in entry.rlimits.iter().take(COUNT as usize).enumerate() {
        let (mut cur, mut max) = (limit.cur.min(limit.max), limit.max);
        if !can_raise {
            let hard = sys::process::own_limit(resource as u32).map_or(max, |own| own.1);
            if max > hard {
                log::warn!(
                    "pid {pid}: resource limit {resource} stays at {hard}: a higher one needs CAP_SYS_RESOURCE"
                );
                (cur, max) = (cur.min(hard), hard);
            }
        }
        let limit = ops.bytes(&words(&[cur, max]))?;
        ops.list.ok(libc::SYS_prlimit64, &[ZERO, (resource as u64).into(), limit.into(), ZERO]);
    }
    Ok(())
}
