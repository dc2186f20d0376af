//! What an address space knows of itself: where code, data, heap, stack, arguments and environment are,
//! the auxiliary vector, the executable.
//!
//! Read from: `/proc/PID/stat`, `/proc/PID/auxv`, `/proc/PID/exe`; brk(2) in the process.
//! Rebuilt by: prctl(2) PR_SET_MM_MAP, all at once, which needs no CAP_SYS_RESOURCE.

use crate::contract::TaskOps;
use agent::Arg;
use image::MmEntry;
use model::Failure;
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
