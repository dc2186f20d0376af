//! Raw system calls and their errors.

use model::Errno;

/// Turns the `-1` and `errno` of a libc call into a result.
pub fn check(call: &'static str, result: i64) -> Result<i64, Errno> {
    if result == -1 { Err(last(call)) } else { Ok(result) }
}

pub(crate) fn last(call: &'static str) -> Errno {
    Errno { call, code: std::io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

/// A system call of integers.
///
/// # Safety
/// Whatever the kernel does with the arguments must be sound: pointers among them must be valid for it.
pub unsafe fn syscall(call: &'static str, number: libc::c_long, args: &[u64]) -> Result<i64, Errno> {
    let mut six = [0u64; 6];
    six[..args.len()].copy_from_slice(args);
    // SAFETY: the caller vouches for the arguments.
    check(call, unsafe { libc::syscall(number, six[0], six[1], six[2], six[3], six[4], six[5]) })
}
