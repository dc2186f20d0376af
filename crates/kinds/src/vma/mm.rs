//! What an address space knows of itself: where code, data, heap, stack, arguments and environment are,
//! the auxiliary vector, the executable; and the rules for memory to come.
//!
//! Read from: `/proc/PID/stat`, `/proc/PID/auxv`, `/proc/PID/exe`; in the process brk(2), prctl(2), and what mlockall(2) has
//! made of the mapping of the agent, which nothing tells.
//! Rebuilt by: prctl(2) PR_SET_MM_MAP, all at once, which needs no CAP_SYS_RESOURCE; mlockall(2), and prctl(2) again.

use super::is_special;
use crate::contract::TaskOps;
use crate::task::{Answers, Ask, ZERO};
use agent::Arg;
use image::{MmEntry, VmaEntry};
use model::Failure;
use sys::memory::PAGE;
use sys::proc::Stat;

const PR_SET_MM: i32 = 35;
const PR_SET_MM_MAP: u64 = 14;
/// Bytes of `struct prctl_mm_map`.
const MAP_LEN: u64 = 104;
/// Words that the kernel keeps of the auxiliary vector. Source: include/linux/auxvec.h.
const AUXV_MAX: usize = 52;
/// Words that CRIU takes.
const PEER_AUXV_MAX: usize = 44;

/// The record without mappings.
pub fn record(stat: &Stat, brk: u64, auxv: &[u8], exe_file_id: u32) -> MmEntry {
    // The vector ends with a pair of zeros; what the kernel keeps behind them is none of it.
    let mut whole: Vec<u64> =
        auxv.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes"))).collect();
    if let Some(end) = whole.chunks_exact(2).position(|pair| pair[0] == 0) {
        whole.truncate(end * 2 + 2);
    }
    let mut short = whole.clone();
    short.truncate(PEER_AUXV_MAX);
    MmEntry {
        mm_start_code: stat.start_code,
        mm_end_code: stat.end_code,
        mm_start_data: stat.start_data,
        mm_end_data: stat.end_data,
        mm_start_stack: stat.start_stack,
        mm_start_brk: stat.start_brk,
        mm_brk: brk,
        mm_arg_start: stat.arg_start,
        mm_arg_end: stat.arg_end,
        mm_env_start: stat.env_start,
        mm_env_end: stat.env_end,
        exe_file_id,
        whole_auxv: if short == whole { Vec::new() } else { whole },
        mm_saved_auxv: short,
        vmas: Vec::new(),
        dumpable: None,
        aios: Vec::new(),
        thp_disabled: None,
        locks_future: None,
        mdwe: None,
        merges: None,
        thp_flags: None,
    }
}

const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

/// Questions about the rules for memory to come.
#[derive(Debug, Clone, Copy)]
pub struct AskedRules {
    /// Is the memory of the agent locked, and is all of it there?
    locked: usize,
    there: u64,
    mdwe: usize,
    merges: usize,
}

/// The rules for memory to come, as the record has them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rules {
    locks_future: u32,
    mdwe: u32,
    merges: bool,
}

/// Asks for the rules. The agent was mapped under them.
pub fn ask_rules(ask: &mut Ask) -> Result<AskedRules, Failure> {
    ask.list.label("ask for the rules for its memory");
    let (first, last) = (ask.area.remote(), ask.area.remote() + ask.area.len() as u64 - PAGE);
    let there = ask.room(8)?;
    // EBUSY for locked memory; nothing else comes of it where memory is shared.
    let args = [first.into(), PAGE.into(), libc::MS_INVALIDATE.into()];
    let locked = ask.list.any(libc::SYS_msync, &args);
    ask.list.any(libc::SYS_mincore, &[last.into(), PAGE.into(), there.into()]);
    let mut get = |option: i32| ask.list.any(libc::SYS_prctl, &[option.into(), ZERO, ZERO, ZERO, ZERO]);
    Ok(AskedRules { locked, there, mdwe: get(PR_GET_MDWE), merges: get(PR_GET_MEMORY_MERGE) })
}

impl AskedRules {
    pub fn answer(self, answers: Answers) -> Rules {
        let is_locked = answers.result(self.locked) == -i64::from(libc::EBUSY);
        // Of what is locked when it is touched, the end is not there.
        let is_on_fault = answers.area.get(self.there, 1)[0] & 1 == 0;
        let locks = libc::MCL_FUTURE | if is_on_fault { libc::MCL_ONFAULT } else { 0 };
        Rules {
            locks_future: if is_locked { locks as u32 } else { 0 },
            // Kernels that know no such rule have none.
            mdwe: answers.result(self.mdwe).max(0) as u32,
            merges: answers.result(self.merges) == 1,
        }
    }
}

impl Rules {
    pub fn note(self, mm: &mut MmEntry) {
        mm.locks_future = Some(self.locks_future).filter(|locks| *locks != 0);
        mm.mdwe = Some(self.mdwe).filter(|bits| *bits != 0);
        mm.merges = self.merges.then_some(true);
    }
}

/// Sets the rules for memory to come: when all is mapped, protected and advised, and nobody inherits it any more.
pub fn restore_rules(mm: &MmEntry, ops: &mut TaskOps) {
    ops.list.label("set the rules for its memory");
    let set = |option: i32, value: u64| [option.into(), value.into(), ZERO, ZERO, ZERO];
    if mm.merges == Some(true) {
        // It is advice, and the kernel may be one without.
        ops.list.any(libc::SYS_prctl, &set(PR_SET_MEMORY_MERGE, 1));
        let is_left_out = |entry: &&VmaEntry| {
            entry.madv.unwrap_or(0) >> libc::MADV_MERGEABLE & 1 == 0 && !is_special(entry)
        };
        for entry in mm.vmas.iter().filter(is_left_out) {
            let args = [entry.start.into(), (entry.end - entry.start).into(), libc::MADV_UNMERGEABLE.into()];
            ops.list.any(libc::SYS_madvise, &args);
        }
    }
    if let Some(locks) = mm.locks_future {
        ops.list.ok(libc::SYS_mlockall, &[u64::from(locks).into()]);
    }
    if let Some(bits) = mm.mdwe {
        ops.list.ok(libc::SYS_prctl, &set(PR_SET_MDWE, bits.into()));
    }
}

/// Sets it all. `exe` is the descriptor of the executable; nothing of the former one is mapped any more.
pub fn restore(mm: &MmEntry, exe: i32, ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("set the areas of the address space and the executable");
    let auxv = if mm.whole_auxv.is_empty() { &mm.mm_saved_auxv } else { &mm.whole_auxv };
    let auxv = &auxv[..auxv.len().min(AUXV_MAX)];
    let auxv_at = ops.bytes(&crate::task::words(auxv))?;
    let mut map = crate::task::words(&[
        mm.mm_start_code,
        mm.mm_end_code,
        mm.mm_start_data,
        mm.mm_end_data,
        mm.mm_start_brk,
        mm.mm_brk,
        mm.mm_start_stack,
        mm.mm_arg_start,
        mm.mm_arg_end,
        mm.mm_env_start,
        mm.mm_env_end,
        auxv_at,
    ]);
    map.extend_from_slice(&((auxv.len() * 8) as u32).to_ne_bytes());
    map.extend_from_slice(&exe.to_ne_bytes());
    let map = ops.bytes(&map)?;
    let zero = Arg::Value(0);
    ops.list.ok(libc::SYS_prctl, &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), MAP_LEN.into(), zero]);
    Ok(())
}
