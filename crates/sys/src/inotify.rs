//! inotify(7).

use crate::call::check;
use model::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// inotify_init1(2).
pub fn init(flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    let fd = check("inotify_init1", unsafe { libc::inotify_init1(flags | libc::IN_CLOEXEC) }.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The number that the next watch gets, if it is free.
///
/// # Errors
/// `EINVAL` for what is no number. Source: include/uapi/linux/inotify.h INOTIFY_IOC_SETNEXTWD, Linux 4.17.
pub fn set_next(inotify: impl AsFd, wd: i32) -> Result<(), Errno> {
    const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;
    let number = inotify.as_fd().as_raw_fd();
    // SAFETY: this request takes an integer.
    let result = unsafe { libc::ioctl(number, INOTIFY_IOC_SETNEXTWD as libc::Ioctl, i64::from(wd)) };
    check("ioctl", result.into()).map(drop)
}

/// Watches what `file` is, also if it is open with O_PATH; returns the number of the watch.
///
/// Source: inotify_add_watch(2), through the link in `/proc`.
pub fn watch(inotify: impl AsFd, file: impl AsFd, mask: u32) -> Result<i32, Errno> {
    let path = CString::new(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).expect("digits");
    // SAFETY: the kernel reads a C string.
    let wd = unsafe { libc::inotify_add_watch(inotify.as_fd().as_raw_fd(), path.as_ptr(), mask) };
    check("inotify_add_watch", wd.into()).map(|wd| wd as i32)
}
