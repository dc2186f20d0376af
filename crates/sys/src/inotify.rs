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

/// Puts the event that says that others were lost in an empty queue, and nothing else; false where the queue is too
/// long for that. The next number of a watch is another one afterwards.
///
/// The kernel queues it behind as many events as there may be; those are made with a file of our own, and read.
///
/// Source: fs/notify/notification.c, fsnotify_insert_event.
pub fn overflow(inotify: impl AsFd) -> Result<bool, Errno> {
    const EVENT: usize = size_of::<libc::inotify_event>();
    const MUCH: usize = 1 << 20;
    let limit = crate::fd::text("/proc/sys/fs/inotify/max_queued_events")?;
    let limit = crate::proc::decimal::<usize>(limit.trim_ascii()).unwrap_or(usize::MAX);
    if limit > MUCH {
        return Ok(false);
    }
    let file = crate::memory::memfd(c"crtools-events", false)?;
    let wd = watch(&inotify, &file, libc::IN_ATTRIB | libc::IN_MODIFY)?;
    // One more than fits; equal ones in a row would be one.
    for turn in 0..=limit as u64 {
        match turn % 2 {
            0 => crate::fd::chmod(&file, 0o600)?,
            _ => crate::fd::truncate(&file, 4096 + turn)?,
        }
    }
    // SAFETY: integers only.
    let removed = unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), wd) };
    check("inotify_rm_watch", removed.into())?;
    let queued = crate::fd::ioctl_read(&inotify, libc::FIONREAD)? as usize;
    let mut surplus = if queued == (limit + 1) * EVENT { limit * EVENT } else { queued };
    let is_full = surplus < queued;
    let mut events = vec![0; 1 << 16];
    while surplus > 0 {
        let some = surplus.min(events.len());
        surplus -= crate::fd::read(&inotify, &mut events[..some])?;
    }
    Ok(is_full)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_overflow_is_left_in_the_queue() {
        let inotify = init(libc::IN_NONBLOCK).unwrap();
        assert!(overflow(&inotify).unwrap());
        let mut event = [0; 64];
        assert_eq!(crate::fd::read(&inotify, &mut event).unwrap(), 16);
        assert_eq!(event[..8], [(-1i32).to_ne_bytes(), libc::IN_Q_OVERFLOW.to_ne_bytes()].concat());
        assert_eq!(crate::fd::read(&inotify, &mut event).unwrap_err().code, libc::EAGAIN);
    }
}
