//! File locks: flock(2), POSIX record locks, those of an open file (OFD), leases.
//!
//! Read from: the `lock:` lines of `/proc/PID/fdinfo`.
//! Rebuilt by: locks of open files before a task has them; all others by the process, whose id they tell. Nobody waits: a lock that somebody else has by then ends the restore.
//! Refused: locks without `--file-locks`, a lease that somebody waits for.

use crate::contract::{DumpCx, FdProbe, TaskOps};
use image::kind;
use model::{Errno, Failure, Object, options};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use sys::proc::{FileLock, LockKind};

/// `filelocks.img`: a lock, as descriptor `fd` of process `pid` shows it. `len` 0 is up to the end, however far that is.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct FileLockEntry {
    #[prost(uint32, required, tag = "1")]
    pub flag: u32,
    #[prost(uint32, required, tag = "2")]
    pub r#type: u32,
    #[prost(int32, required, tag = "3")]
    pub pid: i32,
    #[prost(int32, required, tag = "4")]
    pub fd: i32,
    #[prost(int64, required, tag = "5")]
    pub start: i64,
    #[prost(int64, required, tag = "6")]
    pub len: i64,
}

const POSIX: u32 = 1;
const FLOCK: u32 = 2;
const OFD: u32 = 4;
const LEASE: u32 = 8;

/// What makes two lines one lock: file, kind, access, range, and for a record lock its process.
type Key = (u32, u32, u32, i64, i64, i32);

#[derive(Debug, Default)]
struct Dumped(BTreeMap<Key, FileLockEntry>);

/// Records the locks that a descriptor of file `id` shows.
///
/// # Errors
/// When there are locks that may not, or cannot, be carried.
pub fn dump(probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<(), Failure> {
    if !probe.may_have_locks() || sys::proc::fdinfo(probe.info(), "lock").is_none() {
        return Ok(());
    }
    if !cx.options.file_locks {
        return Err(Failure::policy(probe.object(), "holds a file lock", &options::FILE_LOCKS).of(probe.pid));
    }
    let locks = sys::proc::parse_locks(probe.info());
    for lock in locks.ok_or_else(|| probe.refuse("the kernel tells its locks in a way not understood"))? {
        let FileLock { kind, is_write, pid, start, end } = lock;
        let flag = match kind {
            LockKind::Posix => POSIX,
            LockKind::Flock => FLOCK,
            LockKind::Ofd => OFD,
            LockKind::Lease => LEASE,
            LockKind::BreakingLease => {
                return Err(probe.refuse("has a lease that somebody waits for, which is not carried"));
            }
        };
        let len = end.map_or(0, |end| (end - start + 1) as i64);
        let kind = if is_write { libc::F_WRLCK } else { libc::F_RDLCK };
        let entry = FileLockEntry {
            flag,
            r#type: kind as u32,
            pid: probe.pid,
            fd: probe.number,
            start: start as i64,
            len,
        };
        // Every descriptor of an open file shows what belongs to that; a record lock belongs to a process.
        let owner = if flag == POSIX { probe.pid } else { 0 };
        let locks = &mut cx.shelf.of::<Dumped>().0;
        let known = locks.entry((id, flag, entry.r#type, entry.start, len, owner)).or_insert(entry);
        // Whoever took it is to take it again, if the file is still open there.
        if pid == probe.pid {
            *known = entry;
        }
    }
    Ok(())
}

/// Writes the records, when every descriptor was asked.
pub fn settle(cx: &mut DumpCx) {
    for entry in std::mem::take(&mut cx.shelf.of::<Dumped>().0).into_values() {
        cx.image("filelocks.img", kind::FILE_LOCKS).record(&entry);
    }
}

/// Why a record is none.
pub fn check(entry: &FileLockEntry) -> Option<&'static str> {
    let is_type = matches!(entry.r#type as i32, libc::F_RDLCK | libc::F_WRLCK);
    if ![POSIX, FLOCK, OFD, LEASE].contains(&entry.flag) || !is_type {
        Some("is a lock of no kind")
    } else if entry.start < 0 || entry.len < 0 || entry.start.checked_add(entry.len).is_none() {
        Some("is a lock of no range")
    } else {
        None
    }
}

/// `struct flock` as bytes. Source: fcntl_locking(2).
fn range(entry: &FileLockEntry) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    bytes.extend((entry.r#type as i16).to_ne_bytes());
    bytes.extend((libc::SEEK_SET as i16).to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(entry.start.to_ne_bytes());
    bytes.extend(entry.len.to_ne_bytes());
    // The process is the caller.
    bytes.extend([0; 8]);
    bytes
}

/// Takes a lock that belongs to the open file.
///
/// # Errors
/// When somebody has one that excludes it.
pub fn take(entry: &FileLockEntry, file: &OwnedFd) -> Result<(), Failure> {
    if entry.flag != OFD {
        return Ok(());
    }
    let object = || Object::Named(format!("the lock of fd {} of process {}", entry.fd, entry.pid));
    sys::fd::lock(file, &range(entry)).map_err(|error: Errno| match error.code {
        libc::EAGAIN | libc::EACCES => {
            Failure::conflict(object(), "take it again", "somebody else has a lock there")
        }
        _ => error.on(object(), "take it again"),
    })
}

/// Has the process take a lock that belongs to it, or tells its id.
pub fn finish(entry: &FileLockEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    const F_SETLEASE: u64 = 1024;
    let number = u64::from(entry.fd as u32);
    match entry.flag {
        POSIX => {
            ops.list.label("take a record lock again");
            let range = ops.bytes(&range(entry))?;
            ops.list.ok(libc::SYS_fcntl, &[number.into(), (libc::F_SETLK as u64).into(), range.into()]);
        }
        FLOCK => {
            ops.list.label("lock a file again");
            let how = if entry.r#type as i32 == libc::F_WRLCK { libc::LOCK_EX } else { libc::LOCK_SH };
            ops.list.ok(libc::SYS_flock, &[number.into(), ((how | libc::LOCK_NB) as u64).into()]);
        }
        LEASE => {
            ops.list.label("take a lease again");
            let kind = u64::from(entry.r#type);
            ops.list.ok(libc::SYS_fcntl, &[number.into(), F_SETLEASE.into(), kind.into()]);
        }
        _ => {}
    }
    Ok(())
}
