//! fanotify(7).

use crate::call::check;
use model::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// fanotify_init(2). The group remembers its flags, so close-on-exec comes afterwards.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN for most flags; `EINVAL` for those that the kernel does not know.
pub fn init(flags: u32, event_flags: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    let fd = unsafe { libc::fanotify_init(flags, event_flags) };
    let fd = check("fanotify_init", fd.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    crate::fd::fcntl(&fd, libc::F_SETFD, libc::FD_CLOEXEC)?;
    Ok(fd)
}

/// Adds to a mark of what `file` is, or is on, also if it is open with O_PATH.
///
/// Source: fanotify_mark(2), through the link in `/proc`.
pub fn mark(group: impl AsFd, file: impl AsFd, flags: u32, mask: u64) -> Result<(), Errno> {
    let path = CString::new(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())).expect("digits");
    let (group, flags) = (group.as_fd().as_raw_fd(), flags | libc::FAN_MARK_ADD);
    // SAFETY: the kernel reads a C string.
    let result = unsafe { libc::fanotify_mark(group, flags, mask, libc::AT_FDCWD, path.as_ptr()) };
    check("fanotify_mark", result.into()).map(drop)
}
