//! inotify(7): watches of files and folders.
//!
//! Read from: the `inotify` lines of `/proc/PID/fdinfo`, which name each file as [`watched`] does.
//! Rebuilt by: inotify_init1(2); the watches come last of all, so that the restore itself is not among the events.
//! Events that were not read: read from the kernel's own queue, see [`sys::inotify::unread`], and made again, see
//! [`queue`]; only the numbers of moves are others (IN_MOVED_FROM and IN_MOVED_TO of one move have the same one).
//! Not kept: events that the kernel does not tell; the program hears that some were lost (IN_Q_OVERFLOW).

mod queue;

use super::watched::{self, FhEntry};
use crate::contract::{ArmCx, DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, IdMap, Object};
use std::os::fd::OwnedFd;
use sys::inotify::Event;

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
    /// Of ours: there were events that nobody had read, and that are not known.
    #[prost(bool, optional, tag = "1000")]
    pub lost: Option<bool>,
    /// Of ours: the events that nobody had read.
    #[prost(message, repeated, tag = "1001")]
    pub unread: Vec<InotifyEventEntry>,
}

/// As inotify_event(7) has it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InotifyEventEntry {
    #[prost(int32, required, tag = "1")]
    pub wd: i32,
    #[prost(uint32, required, tag = "2")]
    pub mask: u32,
    #[prost(uint32, optional, tag = "3")]
    pub cookie: Option<u32>,
    #[prost(bytes = "vec", optional, tag = "4")]
    pub name: Option<Vec<u8>>,
}

impl From<Event> for InotifyEventEntry {
    fn from(event: Event) -> InotifyEventEntry {
        let cookie = Some(event.cookie).filter(|cookie| *cookie != 0);
        let name = Some(event.name).filter(|name| !name.is_empty());
        InotifyEventEntry { wd: event.wd, mask: event.mask, cookie, name }
    }
}

impl InotifyFileEntry {
    fn unread(&self) -> Vec<Event> {
        let event = |entry: &InotifyEventEntry| Event {
            wd: entry.wd,
            mask: entry.mask,
            cookie: entry.cookie.unwrap_or(0),
            name: entry.name.clone().unwrap_or_default(),
        };
        self.unread.iter().map(event).collect()
    }
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
        let bytes = sys::inotify::waiting(&probe.fd).unwrap_or(0);
        let known = || sys::inotify::unread(&probe.fd).filter(|events| queue::is_sound(events));
        let unread = if bytes > 0 { known() } else { Some(Vec::new()) };
        if unread.is_none() {
            log::warn!("pid {}: {}: {bytes} bytes of events are not kept", probe.pid, probe.object());
        }
        let lost = unread.is_none().then_some(true);
        let unread = unread.unwrap_or_default().into_iter().map(InotifyEventEntry::from).collect();
        Ok(InotifyFileEntry { id, flags: probe.flags, fown: probe.owner()?, wd, lost, unread })
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
            if !queue::is_sound(&entry.unread()) {
                let why = format!("inotify {id} has events that cannot have happened");
                failures.push(Failure::corrupt("files.img", None, why));
            }
        }
        failures
    }

    fn open(&self, entry: &InotifyFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named("inotify".into()), "make it");
        // What is gone is told now, while nothing was made.
        for watch in entry.wd.iter().filter(|watch| watch.f_handle.file.is_none()) {
            find(watch, &IdMap::default()).map_err(|error| lost(watch, error))?;
        }
        let fd = sys::inotify::init(0).map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn needs(&self, entry: &InotifyFileEntry) -> Vec<u32> {
        entry.wd.iter().filter_map(|watch| watch.f_handle.file).collect()
    }

    fn arm(&self, entry: &InotifyFileEntry, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(Object::Named("inotify".into()), "make its events again");
        if entry.lost == Some(true) || !entry.unread.is_empty() {
            // Nobody gets a signal for them.
            set_status(fd, entry.flags & !(libc::O_ASYNC as u32)).map_err(explain)?;
            let lost = [queue::overflow()];
            let unread = if entry.lost == Some(true) { lost.to_vec() } else { entry.unread() };
            if !queue::fill(fd, &unread).map_err(explain)? && !queue::fill(fd, &lost).map_err(explain)? {
                log::warn!("inotify: {} events that were not read are lost", unread.len());
            }
            set_status(fd, entry.flags).map_err(explain)?;
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

fn find(watch: &InotifyWdEntry, files: &IdMap<OwnedFd>) -> Result<OwnedFd, Errno> {
    watched::find(&watch.f_handle, watch.i_ino, watch.s_dev, files)
}

fn lost(watch: &InotifyWdEntry, error: Errno) -> Failure {
    let what = watch.f_handle.path.clone().unwrap_or_else(|| format!("inode {}", watch.i_ino));
    error.on(Object::Named(format!("inotify watch {} of {what}", watch.wd)), "set it again")
}
