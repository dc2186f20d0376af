//! Credentials of one thread, capabilities, seccomp: by the raw calls, which do not spread to all threads.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use super::call::{check, prctl};

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `_LINUX_CAPABILITY_VERSION_3`
const VERSION: u32 = 0x2008_0522;

/// Effective, permitted and inheritable capabilities of the calling thread.
#[track_caller]
pub fn capabilities() -> [u64; 3] {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut data = [0_u32; 6];
    // SAFETY: version 3 writes two triples of 32 bits to a live local, and the version to the header.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut data) };
    check("capget", result);
    std::array::from_fn(|i| u64::from(data[i]) | u64::from(data[i + 3]) << 32)
}

/// Sets what [`capabilities`] reads.
#[track_caller]
pub fn set_capabilities(sets: [u64; 3]) {
    let mut header = Header { version: VERSION, pid: 0 };
    let data: [u32; 6] = std::array::from_fn(|i| (sets[i % 3] >> (32 * (i / 3))) as u32);
    // SAFETY: version 3 reads two triples of 32 bits from a live local, and the header.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw const data) };
    check("capset", result);
}

/// All user and group ids of the calling thread.
#[track_caller]
pub fn set_thread_ids(uid: u32, gid: u32) {
    // SAFETY: both calls take integers and touch no memory.
    unsafe {
        check("setresgid", libc::syscall(libc::SYS_setresgid, gid, gid, gid));
        check("setresuid", libc::syscall(libc::SYS_setresuid, uid, uid, uid));
    }
}

/// Adds a filter to the calling thread that answers one system call with an error and allows all others.
#[track_caller]
pub fn refuse_call(number: i64, error: i32) {
    let instruction = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let program = [
        // The number is the first word of seccomp_data.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | error as u32),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the instructions, which live in this frame, during the call.
    check("seccomp", unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    });
}

fn ask(number: i64) -> Result<i64, i32> {
    // SAFETY: called below for getpriority and getpgid, which take integers and touch no memory.
    match unsafe { libc::syscall(number, 0, 0) } {
        -1 => Err(io::Error::last_os_error().raw_os_error().unwrap_or_default()),
        value => Ok(value),
    }
}

/// The raw getpriority(2) of this process: 20 minus the nice value.
///
/// # Errors
/// The number that a filter answers with.
pub fn getpriority() -> Result<i64, i32> {
    ask(libc::SYS_getpriority)
}

/// getpgid(2) of this process.
///
/// # Errors
/// As above.
pub fn getpgid() -> Result<i64, i32> {
    ask(libc::SYS_getpgid)
}

/// Enters strict mode, reads one byte, and does something forbidden: does not return.
pub fn read_in_strict_mode(from: impl AsFd) -> ! {
    let from = from.as_fd().as_raw_fd();
    let mut byte = 0_u8;
    prctl(libc::PR_SET_SECCOMP, [libc::SECCOMP_MODE_STRICT.into(), 0, 0, 0]);
    // SAFETY: reads one byte into a live local; getppid touches no memory, and is what the kernel kills for.
    unsafe {
        libc::syscall(libc::SYS_read, from, &raw mut byte, 1);
        libc::syscall(libc::SYS_getppid);
        // Only reached when the mode was lost: a plain exit shows it.
        libc::syscall(libc::SYS_exit, 3);
    }
    super::exit_now(3)
}
