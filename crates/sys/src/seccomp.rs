//! seccomp(2), as it stands in the way of one who traces: a thread that is under filters itself may neither suspend those
//! of others nor ask for them by ptrace(2).
//!
//! Source: kernel/ptrace.c, `check_ptrace_options`; kernel/seccomp.c, `seccomp_get_filter`.

use crate::inside::{Inside, SOME, inside};
use crate::ptrace::SUSPEND_SECCOMP;
use std::sync::OnceLock;

/// Is this program under filters, as in most containers?
///
/// Source: prctl(2) PR_GET_SECCOMP.
pub fn is_filtered() -> bool {
    // SAFETY: takes integers. A filter may refuse it, too.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP, 0, 0, 0, 0) != 0 }
}

/// The option for tracing that suspends filters, where the kernel allows it.
pub fn suspension() -> u64 {
    if is_filtered() { 0 } else { SUSPEND_SECCOMP }
}

/// The filters of this program, oldest first; none where the kernel does not tell them.
pub fn own_programs() -> Option<&'static [Vec<u8>]> {
    static OWN: OnceLock<Option<Vec<Vec<u8>>>> = OnceLock::new();
    let read = || {
        let inside = inside()?;
        programs(inside, newest(inside, crate::process::own_pid())?)
    };
    OWN.get_or_init(read).as_deref()
}

/// Has a thread the very filters of this program? Not where the kernel does not tell.
pub fn are_own(tid: i32) -> bool {
    let is = |inside: &Inside| {
        let (own, its) = (newest(inside, crate::process::own_pid())?, newest(inside, tid)?);
        // Those of a relative are the same, not only alike.
        Some(own == its || programs(inside, its)? == own_programs()?)
    };
    inside().and_then(is) == Some(true)
}

/// Where the kernel keeps the newest filter of a thread.
fn newest(inside: &Inside, tid: i32) -> Option<u64> {
    let own = inside.at(inside.task(tid)?, "task_struct", "seccomp")?;
    inside.member(own, "seccomp", "filter")
}

/// A filter and those before it, oldest first.
fn programs(inside: &Inside, mut filter: u64) -> Option<Vec<Vec<u8>>> {
    /// More instructions a chain has not. Source: kernel/seccomp.c.
    const MAX_INSNS_PER_PATH: usize = (1 << 18) / 8;
    let mut programs = Vec::new();
    while filter != 0 {
        programs.push(program(inside, inside.member(filter, "seccomp_filter", "prog")?)?);
        if programs.len() > MAX_INSNS_PER_PATH {
            return None;
        }
        filter = inside.member(filter, "seccomp_filter", "prev")?;
    }
    programs.reverse();
    Some(programs)
}

/// A program as it was given to the kernel: struct sock_filter, one behind the other.
fn program(inside: &Inside, address: u64) -> Option<Vec<u8>> {
    const GIVEN: &str = "sock_fprog_kern";
    let given = inside.member(address, "bpf_prog", "orig_prog")?;
    let count = inside.int(inside.at(given, GIVEN, "len")?)? & 0xffff;
    let code = inside.member(given, GIVEN, "filter")?;
    let mut program = Vec::new();
    let length = count as usize * 8;
    while program.len() + SOME <= length {
        program.extend(inside.bytes(code.checked_add(program.len() as u64)?)?);
    }
    while program.len() < length {
        program.extend(inside.long(code.checked_add(program.len() as u64)?)?.to_ne_bytes());
    }
    Some(program)
}
