//! pidfd: a process, or a thread, as a file.
//!
//! Read from: `/proc/PID/fdinfo` (the process, -1 for one that has been waited for).
//! Rebuilt by: pidfd_open(2), when all threads are there and no task has a descriptor yet; for a process that is
//! gone one that was made to end.
//! Refused: processes outside of the tree.
//! Not kept: how a process that is gone has ended.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx};
use std::collections::HashSet;
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::os::fd::OwnedFd;

pub static KIND: Pidfd = Pidfd;

#[derive(Debug)]
pub struct Pidfd;

#[derive(Clone, PartialEq, prost::Message)]
pub struct PidfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    /// -1 for a process that is gone.
    #[prost(int32, required, tag = "4")]
    pub nspid: i32,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
}

/// In the flags of the file: it is for one thread. Source: include/uapi/linux/pidfd.h.
const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
/// Those that pidfd_open(2) takes.
const FLAGS: u32 = PIDFD_THREAD | libc::O_NONBLOCK as u32;
const GONE: i32 = -1;

fn object(pid: i32) -> Object {
    Object::Named(format!("pidfd of process {pid}"))
}

impl FdKind for Pidfd {
    type Entry = PidfdEntry;
    const NAME: &'static str = "pidfd";
    const TYPE: FdTypes = FdTypes::Pidfd;
    const TAG: u32 = 22;

    fn claims(&self, probe: &FdProbe) -> bool {
        // Since Linux 6.9 they are files of a file system of their own.
        probe.anon_inode() == Some(b"[pidfd]")
            || probe.anon_inode() == Some(b"pidfd")
            || probe.link().starts_with(b"pidfd:[")
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<PidfdEntry, Failure> {
        let pid = sys::proc::fdinfo(probe.info(), "Pid")
            .and_then(|pid| std::str::from_utf8(pid).ok()?.parse::<i32>().ok())
            .ok_or_else(|| probe.refuse("the kernel does not tell its process"))?;
        if pid != GONE && !cx.tids.contains(&pid) {
            let what = if probe.flags & PIDFD_THREAD != 0 { "thread" } else { "process" };
            let why = format!("is for {what} {pid}, which is outside of the tree");
            return Err(probe.refuse(why).help(Remedy::Advice("it could not be found again")));
        }
        let ino = probe.stat.st_ino as u32;
        Ok(PidfdEntry { id, ino, flags: probe.flags & FLAGS, nspid: pid, fown: probe.owner()? })
    }

    fn link(&self, entries: &[(u32, &PidfdEntry)], _files: &FileTable) -> Failures {
        let wrong = entries.iter().filter(|(_, entry)| entry.nspid <= 0 && entry.nspid != GONE);
        wrong
            .map(|(id, entry)| {
                Failure::corrupt("files.img", None, format!("pidfd {id} is for process {}", entry.nspid))
            })
            .collect()
    }

    fn open(&self, entry: &PidfdEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(object(entry.nspid), "open it");
        let flags = entry.flags & FLAGS;
        match entry.nspid {
            GONE => sys::process::pidfd_of_nobody(flags),
            pid => sys::process::pidfd_open_with(pid, flags),
        }
        .map_err(explain)
    }

    fn is_late(&self, entry: &PidfdEntry, _files: &FileTable, _tids: &HashSet<i32>) -> bool {
        entry.nspid != GONE
    }

    fn owner<'e>(&self, entry: &'e PidfdEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
