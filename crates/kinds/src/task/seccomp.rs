//! seccomp(2): strict mode, and chains of filters that relatives share.
//!
//! Read from: `status` (mode); ptrace(2) PTRACE_SECCOMP_GET_FILTER, the programs one by one.
//! Rebuilt by: seccomp(2) in each thread, oldest first, while ptrace(2) holds them suspended.
//! Under a filter of our own, as in most containers, the kernel allows neither: then only threads with the very same
//! filters are carried, which the kernel's tracing tells, and which new ones have from us; and those without any.
//! Not kept: flags (logging) and that a chain is one object for several tasks; listeners are refused with
//! their descriptor.

use super::ZERO;
use crate::contract::TaskOps;
use image::{SeccompEntry, SeccompFilter, SeccompMode, ThreadCoreEntry};
use model::{Errno, Failure, Object, Remedy};
use sys::ptrace::Stopped;

const SET_MODE_STRICT: i32 = 0;
const SET_MODE_FILTER: i32 = 1;
/// Instructions of a program, as the kernel limits them.
const PROGRAM_MAX: usize = 4096 * 8;

const OUTSIDE: Remedy = Remedy::Advice("run this program where it has no seccomp filters itself");

/// May calls of ours be made in this thread, which stands still?
///
/// # Errors
/// When its filters would see them.
pub fn enter(tid: i32) -> Result<(), Failure> {
    if !sys::seccomp::is_filtered() {
        return Ok(());
    }
    let text = sys::fd::text(&format!("/proc/{tid}/status"));
    let status = text.ok().and_then(|text| sys::proc::parse_status(&text));
    match status.map(|status| status.seccomp) {
        Some(0) => Ok(()),
        Some(2) if sys::seccomp::are_own(tid) => Ok(()),
        _ => {
            let why = "has seccomp filters other than those that this program has itself, which therefore cannot suspend them";
            Err(Failure::unsupported(Object::Thread(tid), why).help(OUTSIDE))
        }
    }
}

/// The programs of a thread, oldest first.
///
/// # Errors
/// Where the kernel does not tell them.
pub fn read(thread: &Stopped) -> Result<Vec<Vec<u8>>, Errno> {
    if sys::seccomp::is_filtered() {
        let unknown = Errno { call: "bpf", code: libc::EOPNOTSUPP };
        // Others were not entered.
        return sys::seccomp::own_programs().map(<[_]>::to_vec).ok_or(unknown);
    }
    let mut programs = Vec::new();
    while let Some(program) = sys::ptrace::seccomp_filter(thread, programs.len() as u64)? {
        programs.push(program);
    }
    Ok(programs)
}

/// Can these threads get what they had? Each is born with filters of our own.
///
/// # Errors
/// When it would need others.
pub fn judge<'c>(
    cores: impl IntoIterator<Item = (i32, &'c ThreadCoreEntry)>,
    chains: &SeccompEntry,
) -> Result<(), Failure> {
    if !sys::seccomp::is_filtered() {
        return Ok(());
    }
    let own = sys::seccomp::own_programs();
    for (tid, core) in cores {
        let programs = programs(core, chains)?;
        let has_others = own.is_none_or(|own| programs != own) && !programs.is_empty();
        if has_others || core.seccomp_mode == Some(SeccompMode::Strict.into()) {
            let why = "had seccomp filters other than those that this program has itself";
            return Err(Failure::unsupported(Object::Thread(tid), why).help(OUTSIDE));
        }
    }
    log::warn!("this program is under seccomp filters, and so will all be that it makes");
    Ok(())
}

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
    // It has its own already, from us: see `judge`.
    if sys::seccomp::is_filtered() {
        return Ok(());
    }
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
