//! System calls of plain integers, checked.

use std::io;

/// Turns -1 into the error it stands for.
///
/// # Panics
/// With the name of the call and the error, because a workload has nothing better to do.
#[track_caller]
pub fn check<T: PartialEq + From<i8> + Copy>(call: &str, result: T) -> T {
    assert!(result != T::from(-1), "{call}: {}", io::Error::last_os_error());
    result
}

/// prctl(2) with integers only.
#[track_caller]
pub fn prctl(option: i32, arguments: [u64; 4]) -> i32 {
    try_prctl(option, arguments).unwrap_or_else(|e| panic!("prctl: {e}"))
}

/// The same, where the kernel may not know it.
///
/// # Errors
/// That of the call.
#[track_caller]
pub fn try_prctl(option: i32, arguments: [u64; 4]) -> io::Result<i32> {
    // Linux 6.3 and 6.4.
    const MDWE_AND_MERGING: std::ops::RangeInclusive<i32> = 65..=68;
    // None of these writes to or reads from memory that an argument points to.
    const OF_INTEGERS: &[i32] = &[
        libc::PR_SET_PDEATHSIG,
        libc::PR_SET_DUMPABLE,
        libc::PR_GET_DUMPABLE,
        libc::PR_SET_CHILD_SUBREAPER,
        libc::PR_SET_SECUREBITS,
        libc::PR_GET_SECUREBITS,
        libc::PR_SET_NO_NEW_PRIVS,
        libc::PR_GET_NO_NEW_PRIVS,
        libc::PR_CAPBSET_DROP,
        libc::PR_CAPBSET_READ,
        libc::PR_CAP_AMBIENT,
        libc::PR_GET_SECCOMP,
        libc::PR_SET_KEEPCAPS,
        libc::PR_GET_KEEPCAPS,
        libc::PR_SET_THP_DISABLE,
        libc::PR_GET_THP_DISABLE,
        libc::PR_SET_TIMERSLACK,
        libc::PR_GET_TIMERSLACK,
        libc::PR_SET_TSC,
        libc::PR_SET_SECCOMP,
    ];
    let is_known = OF_INTEGERS.contains(&option) || MDWE_AND_MERGING.contains(&option);
    assert!(is_known, "prctl {option} is not known to take integers");
    let [a, b, c, d] = arguments;
    // SAFETY: the list above names the options that take integers; no memory of ours is touched.
    match unsafe { libc::prctl(option, a, b, c, d) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// prctl(2) of an option that stores one `int` through its second argument.
#[track_caller]
pub fn prctl_get(option: i32) -> i32 {
    assert!([libc::PR_GET_PDEATHSIG, libc::PR_GET_CHILD_SUBREAPER, libc::PR_GET_TSC].contains(&option));
    let mut value = 0;
    // SAFETY: the options above store one int at the address, which is a live local, during the call.
    check("prctl", unsafe { libc::prctl(option, &raw mut value) });
    value
}

/// Seconds since 1970, told by the page that the kernel keeps for programs of old. Source: arch/x86/entry/vsyscall.
pub fn old_time() -> i64 {
    const TIME: usize = 0xffff_ffff_ff60_0400;
    // SAFETY: where that page is, time(2) is at this place, with the calling convention of C; a null pointer has it store
    // nothing. Where it is not, this ends in a SIGSEGV.
    let time: extern "C" fn(*mut i64) -> i64 = unsafe { std::mem::transmute(TIME) };
    time(std::ptr::null_mut())
}

/// The calling thread's id.
pub fn gettid() -> i32 {
    // SAFETY: gettid takes nothing and touches no memory.
    unsafe { libc::gettid() }
}

/// tgkill(2) on a thread of this process.
#[track_caller]
pub fn tgkill_self(tid: i32, signal: i32) {
    // SAFETY: tgkill takes three integers; what the signal does is the handler's affair.
    check("tgkill", unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), tid, signal) });
}

/// kcmp(2) of two descriptors or other resources; true if they are the same.
#[track_caller]
pub fn is_same(a: i32, b: i32, kind: i32, index_a: u64, index_b: u64) -> bool {
    // The kinds of linux/kcmp.h up to KCMP_SYSVSEM; KCMP_EPOLL_TFD, which reads memory, is number 7.
    assert!((0..=6).contains(&kind));
    // SAFETY: these kinds take five integers and touch no memory of ours.
    check("kcmp", unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, index_a, index_b) }) == 0
}

pub const KCMP_FILE: i32 = 0;
pub const KCMP_VM: i32 = 1;
pub const KCMP_FILES: i32 = 2;
pub const KCMP_FS: i32 = 3;
pub const KCMP_SIGHAND: i32 = 4;

/// Do two descriptors, possibly of two processes, share one open file description?
#[track_caller]
pub fn is_same_file(a: (i32, i32), b: (i32, i32)) -> bool {
    is_same(a.0, b.0, KCMP_FILE, a.1 as u64, b.1 as u64)
}

/// sched_setscheduler(2) for the calling thread.
#[track_caller]
pub fn set_scheduler(policy: i32, priority: i32) {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the kernel reads one live local during the call.
    check("sched_setscheduler", unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) });
}
