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

/// Ends a watch; the kernel queues an event that says so.
///
/// Source: inotify_rm_watch(2).
pub fn remove(inotify: impl AsFd, wd: i32) -> Result<(), Errno> {
    // SAFETY: integers only.
    let removed = unsafe { libc::inotify_rm_watch(inotify.as_fd().as_raw_fd(), wd) };
    check("inotify_rm_watch", removed.into()).map(drop)
}

/// As many events, and the one that says that others were lost, may be in a queue that is made now.
pub fn limit() -> Option<usize> {
    let limit = crate::fd::text("/proc/sys/fs/inotify/max_queued_events").ok()?;
    crate::proc::decimal(limit.trim_ascii())
}

/// Bytes that are to be read.
pub fn waiting(inotify: impl AsFd) -> Result<usize, Errno> {
    crate::fd::ioctl_read(inotify, libc::FIONREAD).map(|bytes| bytes.max(0) as usize)
}

/// What inotify_event(7) tells: the number of the watch, what happened, what belongs together, and the name of what is
/// in the folder that is watched, empty for that itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    pub wd: i32,
    pub mask: u32,
    pub cookie: u32,
    pub name: Vec<u8>,
}

impl Event {
    /// Bytes that read(2) gives for it.
    pub fn size(&self) -> usize {
        const EVENT: usize = size_of::<libc::inotify_event>();
        let padded = if self.name.is_empty() { 0 } else { (self.name.len() + 1).next_multiple_of(EVENT) };
        EVENT + padded
    }
}

/// The events that nobody has read, which stay where they are; none where the kernel does not tell, or others are
/// queued meanwhile.
///
/// Source: fs/notify/inotify/inotify.h, struct inotify_event_info; include/linux/fsnotify_backend.h, struct
/// fsnotify_group.
pub fn unread(inotify: &OwnedFd) -> Option<Vec<Event>> {
    const INFO: &str = "inotify_event_info";
    const KNOWN: u32 =
        libc::IN_ALL_EVENTS | libc::IN_UNMOUNT | libc::IN_Q_OVERFLOW | libc::IN_IGNORED | libc::IN_ISDIR;
    let inside = crate::inside::inside()?;
    let file = inside.file(crate::process::own_pid(), inotify.as_raw_fd())?;
    let group = inside.member(file, "file", "private_data")?;
    let list = inside.at(group, "fsnotify_group", "notification_list")?;
    let bytes = waiting(inotify).ok()?;
    let offset = |member| Some(crate::inside::types()?.offset(INFO, member)? as usize);
    let places = [offset("wd")?, offset("mask")?, offset("sync_cookie")?, offset("name_len")?];
    let name = offset("name")?;
    let (mut events, mut told) = (Vec::new(), 0);
    let mut next = inside.long(list)?;
    while next != list && told < bytes {
        // Mostly with the name, unless there is nothing behind it.
        let head = inside.text(next, crate::inside::SOME).or_else(|| inside.text(next, name))?;
        let word = |at: usize| Some(u32::from_ne_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let [wd, mask, cookie, len] = places.map(word);
        let len = len.filter(|len| *len <= libc::NAME_MAX as u32)? as usize;
        let name = match head.get(name..name + len) {
            Some(name) => name.to_vec(),
            None => inside.text(next + name as u64, len)?,
        };
        let event = Event { wd: wd? as i32, mask: mask? & KNOWN, cookie: cookie?, name };
        told += event.size();
        events.push(event);
        // What leads to the next is the first in each.
        next = u64::from_ne_bytes(*head.first_chunk()?);
    }
    (told == bytes && waiting(inotify).ok()? == bytes).then_some(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_and_stay() {
        if crate::inside::inside().is_none() {
            return println!("SKIP: no BPF iterators here");
        }
        let inotify = init(libc::IN_NONBLOCK).unwrap();
        assert_eq!(unread(&inotify), Some(Vec::new()));
        let folder = std::env::temp_dir().join(format!("crtools-inotify-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let watched = crate::fd::open(&folder, libc::O_PATH).unwrap();
        set_next(&inotify, 7).unwrap();
        assert_eq!(watch(&inotify, &watched, libc::IN_CREATE | libc::IN_DELETE).unwrap(), 7);
        drop(watched);
        let long = "n".repeat(libc::NAME_MAX as usize);
        for name in ["short", "a name of some length", &long] {
            std::fs::write(folder.join(name), "x").unwrap();
        }
        std::fs::remove_dir_all(&folder).unwrap();
        let events = unread(&inotify).unwrap();
        assert_eq!(events[2], Event { wd: 7, mask: libc::IN_CREATE, cookie: 0, name: long.into() });
        assert_eq!(events.len(), 7);
        assert_eq!(events[6].mask, libc::IN_IGNORED);
        assert_eq!(unread(&inotify), Some(events));
    }
}
