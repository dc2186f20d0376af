//! seccomp(2): strict mode, and chains of filters that relatives share.
//!
//! Read from: `status` (mode); ptrace(2) PTRACE_SECCOMP_GET_FILTER, the programs one by one.
//! Rebuilt by: seccomp(2) in each thread, oldest first, while ptrace(2) holds them suspended.
//! Not kept: flags (logging) and that a chain is one object for several tasks; listeners are refused with
//! their descriptor.

use super::ZERO;
use crate::contract::TaskOps;
use image::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use model::{Failure, Object};

const SET_MODE_STRICT: i32 = 0;
const SET_MODE_FILTER: i32 = 1;
/// Instructions of a program, as the kernel limits them.
const PROGRAM_MAX: usize = 4096 * 8;

/// The chains of a dump, each program stored once for each place in a chain.
#[derive(Debug, Default)]
pub struct Chains(SeccompEntry);

impl Chains {
    /// Adds the programs of one thread, oldest first; returns the number of the newest.
    pub fn add(&mut self, programs: Vec<Vec<u8>>) -> Option<u32> {
        let mut prev = None;
        for filter in programs {
            let filters = &mut self.0.seccomp_filters;
            let known = filters.iter().position(|known| known.prev == prev && known.filter == filter);
            let index = known.unwrap_or_else(|| {
                filters.push(SeccompFilter { filter, prev, flags: None });
                filters.len() - 1
            });
            prev = Some(index as u32);
        }
        prev
    }

    pub fn entry(&self) -> &SeccompEntry {
        &self.0
    }
}

/// The programs of a thread by its record, oldest first.
///
/// # Errors
/// `Corrupt` for numbers without a program, chains that do not end, programs of a wrong length.
pub fn programs<'e>(core: &ThreadCoreEntry, chains: &'e SeccompEntry) -> Result<Vec<&'e [u8]>, Failure> {
    let corrupt = |why: String| Failure::corrupt("seccomp.img", None, why);
    let mut programs = Vec::new();
    let mut next = match core.seccomp_mode.map(SeccompMode::try_from) {
        Some(Ok(SeccompMode::Filter)) if core.seccomp_filter.is_some() => core.seccomp_filter,
        // It would run unguarded.
        Some(Ok(SeccompMode::Filter)) => return Err(corrupt("a thread is filtered by no filter".into())),
        Some(Err(_)) => return Err(corrupt("a thread has a mode that is none".into())),
        _ => return Ok(programs),
    };
    while let Some(index) = next {
        let filter = chains.seccomp_filters.get(index as usize);
        let filter = filter.ok_or_else(|| corrupt(format!("has no filter {index}")))?;
        let length = filter.filter.len();
        if length == 0 || length % 8 != 0 || length > PROGRAM_MAX {
            return Err(corrupt(format!("filter {index} is no program")));
        }
        programs.push(&*filter.filter);
        if programs.len() > chains.seccomp_filters.len() {
            return Err(corrupt("a chain of filters has no end".into()));
        }
        next = filter.prev;
    }
    programs.reverse();
    Ok(programs)
}

pub fn restore(core: &ThreadCoreEntry, chains: &SeccompEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("install the seccomp filters");
    if core.seccomp_mode == Some(SeccompMode::Strict.into()) {
        ops.list.ok(libc::SYS_seccomp, &[SET_MODE_STRICT.into(), ZERO, ZERO]);
    }
    for program in programs(core, chains)? {
        // struct sock_fprog: count of instructions, where they are.
        let code = ops.bytes(program)?;
        let prog = ops.bytes(&super::words(&[(program.len() / 8) as u64, code]))?;
        ops.list.ok(libc::SYS_seccomp, &[SET_MODE_FILTER.into(), ZERO, prog.into()]);
    }
    Ok(())
}

/// The mode of a thread as its record says it.
pub fn mode(status: u32) -> Result<SeccompMode, Failure> {
    SeccompMode::try_from(status as i32)
        .map_err(|_| Failure::unsupported(Object::Task, format!("has the unknown seccomp mode {status}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_share_their_common_start() {
        let mut chains = Chains::default();
        assert_eq!(chains.add(vec![vec![1; 8], vec![2; 8]]), Some(1));
        assert_eq!(chains.add(vec![vec![1; 8], vec![3; 8]]), Some(2));
        assert_eq!(chains.entry().seccomp_filters.len(), 3);
        let core = ThreadCoreEntry {
            seccomp_mode: Some(SeccompMode::Filter.into()),
            seccomp_filter: Some(2),
            ..ThreadCoreEntry::default()
        };
        assert_eq!(programs(&core, chains.entry()).unwrap(), [&[1u8; 8][..], &[3; 8]]);
    }

    #[test]
    fn a_chain_without_end_is_corrupt() {
        let filter = SeccompFilter { filter: vec![0; 8], prev: Some(0), flags: None };
        let chains = SeccompEntry { seccomp_filters: vec![filter] };
        let core = ThreadCoreEntry {
            seccomp_mode: Some(SeccompMode::Filter.into()),
            seccomp_filter: Some(0),
            ..ThreadCoreEntry::default()
        };
        assert!(programs(&core, &chains).is_err());
    }
}
