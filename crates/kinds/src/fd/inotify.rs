//! inotify(7): watches of files and folders.
//!
//! Read from: the `inotify` lines of `/proc/PID/fdinfo`, which name each file as [`watched`] does.
//! Rebuilt by: inotify_init1(2); the watches come last of all, so that the restore itself is not among the events.
//! Not kept: events that were not read; the program is told by the event that says so (IN_Q_OVERFLOW).

use crate::contract::{ArmCx, DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use super::watched::{self, FhEntry};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, Object};
use std::collections::HashMap;
use std::os::fd::OwnedFd;

pub static KIND: Inotify = Inotify;

#[derive(Debug)]
pub struct Inotify;

#[derive(Clone, PartialEq, prost::Message)]
pub struct InotifyWdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint64, required, tag = "2")]
    pub i_ino: u64,
    #[prost(uint32, required, tag = "3")]
    pub mask: u32,
    #[prost(uint32, required, tag = "4")]
    pub ignored_mask: u32,
    #[prost(uint32, required, tag = "5")]
    pub s_dev: u32,
    #[prost(uint32, required, tag = "6")]
    pub wd: u32,
    #[prost(message, required, tag = "7")]
    pub f_handle: FhEntry,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct InotifyFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(message, repeated, tag = "5")]
    pub wd: Vec<InotifyWdEntry>,
    /// Of ours: there were events that nobody had read.
    #[prost(bool, optional, tag = "1000")]
    pub lost: Option<bool>,
}

/// What inotify_add_watch(2) takes of what the kernel tells.
const MASK: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

impl FdKind for Inotify {
    type Entry = InotifyFileEntry;
    const NAME: &'static str = "inotify";
    const TYPE: FdTypes = FdTypes::Inotify;
    const TAG: u32 = 13;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"inotify")
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<InotifyFileEntry, Failure> {
        let watches = sys::proc::parse_inotify(probe.info())
            .ok_or_else(|| probe.refuse("the kernel tells its watches in a way not understood"))?;
        let mut wd = Vec::with_capacity(watches.len());
        for watch in watches {
            let f_handle = watched::record(probe, &format!("watch {}", watch.wd), &watch.file, cx)?;
            wd.push(InotifyWdEntry {
                id,
                i_ino: watch.file.inode,
                mask: watch.mask,
                ignored_mask: watch.ignored_mask,
                s_dev: watch.file.device,
                wd: watch.wd as u32,
                f_handle,
            });
        }
        let unread = sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).unwrap_or(0);
        if unread > 0 {
            log::warn!("pid {}: {}: {unread} bytes of events are not kept", probe.pid, probe.object());
        }
        let lost = (unread > 0).then_some(true);
        Ok(InotifyFileEntry { id, flags: probe.flags, fown: probe.owner()?, wd, lost })
    }

    fn link(&self, entries: &[(u32, &InotifyFileEntry)], _files: &FileTable) -> Failures {
        let mut failures = Failures::new();
        for (id, entry) in entries {
            let mut seen = std::collections::HashSet::new();
            let is_wrong = |watch: &&InotifyWdEntry| {
                watch.wd == 0
                    || i32::try_from(watch.wd).is_err()
                    || !seen.insert(watch.wd)
                    || watch.mask & MASK == 0
                    || !watch.f_handle.is_sound()
            };
            if let Some(watch) = entry.wd.iter().find(is_wrong) {
                let why = format!("inotify {id} has a watch {} that is none", watch.wd as i32);
                failures.push(Failure::corrupt("files.img", None, why));
            }
        }
        failures
    }

    fn open(&self, entry: &InotifyFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named("inotify".into()), "make it");
        // What is gone is told now, while nothing was made.
        for watch in entry.wd.iter().filter(|watch| watch.f_handle.file.is_none()) {
            find(watch, &HashMap::new()).map_err(|error| lost(watch, error))?;
        }
        let fd = sys::inotify::init(0).map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn needs(&self, entry: &InotifyFileEntry) -> Vec<u32> {
        entry.wd.iter().filter_map(|watch| watch.f_handle.file).collect()
    }

    fn arm(&self, entry: &InotifyFileEntry, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure> {
        if entry.lost == Some(true) {
            let explain = |error: Errno| error.on(Object::Named("inotify".into()), "tell that events were lost");
            let _ = sys::inotify::overflow(fd).map_err(explain)?;
            sys::inotify::set_next(fd, 1).map_err(explain)?;
        }
        // The next number that the kernel gives is behind the last.
        let mut watches: Vec<&InotifyWdEntry> = entry.wd.iter().collect();
        watches.sort_unstable_by_key(|watch| watch.wd);
        for watch in watches {
            let explain = |error: Errno| lost(watch, error);
            let file = find(watch, cx.files).map_err(explain)?;
            sys::inotify::set_next(fd, watch.wd as i32).map_err(explain)?;
            let wd = sys::inotify::watch(fd, &file, watch.mask & MASK).map_err(explain)?;
            if wd != watch.wd as i32 {
                let object = Object::Named(format!("inotify watch {}", watch.wd));
                return Err(Failure::conflict(object, "set it again", format!("it became number {wd}")));
            }
        }
        Ok(())
    }

    fn owner<'e>(&self, entry: &'e InotifyFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

fn find(watch: &InotifyWdEntry, files: &HashMap<u32, OwnedFd>) -> Result<OwnedFd, Errno> {
    watched::find(&watch.f_handle, watch.i_ino, watch.s_dev, files)
}

fn lost(watch: &InotifyWdEntry, error: Errno) -> Failure {
    let what = watch.f_handle.path.clone().unwrap_or_else(|| format!("inode {}", watch.i_ino));
    error.on(Object::Named(format!("inotify watch {} of {what}", watch.wd)), "set it again")
}
