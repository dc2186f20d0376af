//! fanotify(7).
//!
//! Source: include/uapi/linux/fanotify.h; fs/notify/fanotify/fanotify.h.

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

/// Takes all marks on files off again. Source: fanotify_mark(2).
pub fn flush(group: impl AsFd) -> Result<(), Errno> {
    let (group, path) = (group.as_fd().as_raw_fd(), c"/".as_ptr());
    // SAFETY: the kernel reads a C string, if it does at all.
    let result = unsafe { libc::fanotify_mark(group, libc::FAN_MARK_FLUSH, 0, libc::AT_FDCWD, path) };
    check("fanotify_mark", result.into()).map(drop)
}

/// As many events, and the one that says that others were lost, may be in a queue that is made now, unless it has no
/// limit.
pub fn limit() -> Option<usize> {
    let limit = crate::fd::text("/proc/sys/fs/fanotify/max_queued_events").ok()?;
    crate::proc::decimal(limit.trim_ascii())
}

/// How many events in the queue are of others than this process; none where the kernel does not tell.
pub fn of_others(group: &OwnedFd) -> Option<usize> {
    let inside = crate::inside::inside()?;
    let own: Vec<u64> = crate::fd::numbers("/proc/self/task")
        .ok()?
        .into_iter()
        .map(|tid| inside.member(inside.task(tid)?, "task_struct", "thread_pid"))
        .collect::<Option<_>>()?;
    let file = inside.file(crate::process::own_pid(), group.as_raw_fd())?;
    let group = inside.member(file, "file", "private_data")?;
    let list = inside.at(group, "fsnotify_group", "notification_list")?;
    // More than that cannot be told from a list that goes round.
    let most = inside.int(inside.at(group, "fsnotify_group", "q_len")?)? as usize;
    let mut count = 0;
    // The list leads through what is first in each.
    for event in inside.nodes(list, list).take(most) {
        count += usize::from(!own.contains(&inside.member(event?, "fanotify_event", "pid")?));
    }
    Some(count)
}

/// Reads what is first in the queue, and closes what comes with it; how many events those were.
///
/// # Errors
/// `EINVAL` if there is not room for one.
pub fn drop_some(group: impl AsFd, room: usize) -> Result<usize, Errno> {
    const HEAD: usize = size_of::<libc::fanotify_event_metadata>();
    const PIDFD: u8 = 4;
    let mut events = vec![0u8; room];
    let read = crate::fd::read(group, &mut events)?;
    let (mut rest, mut count) = (&events[..read], 0);
    let number = |bytes: &[u8]| bytes.first_chunk().map_or(-1, |bytes| i32::from_ne_bytes(*bytes));
    let close = |number: i32| {
        if number >= 0 {
            // SAFETY: a descriptor that the kernel just made for us alone.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    };
    while rest.len() >= HEAD {
        let len = (number(rest).max(0) as usize).clamp(HEAD, rest.len());
        let (event, more) = rest.split_at(len);
        close(number(&event[16..]));
        let mut infos = &event[HEAD..];
        while let [kind, _, low, high, ..] = *infos {
            let len = usize::from(u16::from_ne_bytes([low, high])).clamp(4, infos.len());
            if kind == PIDFD {
                close(number(&infos[4..len]));
            }
            infos = &infos[len..];
        }
        rest = more;
        count += 1;
    }
    Ok(count)
}
