//! inotify(7): watches of files and folders.
//!
//! Read from: the `inotify` lines of `/proc/PID/fdinfo`, which name each file by its handle; the path that it leads to.
//! Rebuilt by: inotify_init1(2); the watches come last of all, so that the restore itself is not among the events.
//! Refused: watches of files that are gone.
//! Not kept: events that were not read, of which the log warns.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, Object};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub static KIND: Inotify = Inotify;

#[derive(Debug)]
pub struct Inotify;

/// A file handle: its bytes in words of eight, the last filled up with zeros.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FhEntry {
    #[prost(uint32, required, tag = "1")]
    pub bytes: u32,
    #[prost(uint32, required, tag = "2")]
    pub r#type: u32,
    #[prost(uint64, repeated, tag = "3", packed = "false")]
    pub handle: Vec<u64>,
    #[prost(string, optional, tag = "4")]
    pub path: Option<String>,
    #[prost(uint32, optional, tag = "5")]
    pub mnt_id: Option<u32>,
}

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
}

/// CRIU expects as many words, whatever the length.
const WORDS: usize = 16;
/// What inotify_add_watch(2) takes of what the kernel tells.
const MASK: u32 = libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK | libc::IN_ONESHOT;

impl FhEntry {
    /// As [`sys::name::open_handle`] takes it.
    fn packed(&self) -> Vec<u8> {
        let words = self.handle.iter().flat_map(|word| word.to_ne_bytes());
        let bytes: Vec<u8> = words.take(self.bytes as usize).collect();
        [&self.r#type.to_ne_bytes()[..], &bytes].concat()
    }
}

/// Opens the file with this handle, on one of the mounts of its device.
fn by_handle(handle: &FhEntry, device: u32) -> Result<OwnedFd, Errno> {
    let mut result = Err(Errno { call: "open_by_handle_at", code: libc::ENOENT });
    for mount in sys::proc::mounts_of(&sys::fd::text("/proc/self/mountinfo")?, device) {
        let Ok(near) = sys::fd::open(Path::new(std::ffi::OsStr::from_bytes(&mount)), libc::O_RDONLY | libc::O_NONBLOCK)
        else {
            continue;
        };
        result = sys::name::open_handle(&near, &handle.packed(), libc::O_PATH);
        if result.is_ok() {
            break;
        }
    }
    result
}

fn is_it(fd: &OwnedFd, inode: u64) -> bool {
    sys::fd::stat(fd).is_ok_and(|stat| stat.st_ino == inode)
}

/// Finds the file of a watch again: by its path if it is still the same there, or by its handle.
fn find(watch: &InotifyWdEntry) -> Result<OwnedFd, Errno> {
    if let Some(path) = &watch.f_handle.path {
        let path = Path::new("/").join(path);
        if let Ok(fd) = sys::fd::open(&path, libc::O_PATH | libc::O_NOFOLLOW)
            && is_it(&fd, watch.i_ino)
        {
            return Ok(fd);
        }
    }
    by_handle(&watch.f_handle, watch.s_dev)
}

impl FdKind for Inotify {
    type Entry = InotifyFileEntry;
    const NAME: &'static str = "inotify";
    const TYPE: FdTypes = FdTypes::Inotify;
    const TAG: u32 = 13;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"inotify")
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<InotifyFileEntry, Failure> {
        let watches = sys::proc::parse_inotify(probe.info())
            .ok_or_else(|| probe.refuse("the kernel tells its watches in a way not understood"))?;
        let mut wd = Vec::with_capacity(watches.len());
        for watch in watches {
            let mut handle: Vec<u64> = watch
                .handle
                .chunks(8)
                .map(|bytes| {
                    let mut word = [0; 8];
                    word[..bytes.len()].copy_from_slice(bytes);
                    u64::from_ne_bytes(word)
                })
                .collect();
            handle.resize(WORDS.max(handle.len()), 0);
            let bytes = watch.handle.len() as u32;
            let mut f_handle = FhEntry { bytes, r#type: watch.handle_type, handle, path: None, mnt_id: None };
            let refuse = |why: String| probe.refuse(format!("has a watch {} of {why}", watch.wd));
            let what = format!("inode {} on device {:#x}", watch.inode, watch.device);
            let file = by_handle(&f_handle, watch.device)
                .map_err(|error| refuse(format!("{what}, which is not found by its handle: {error}")))?;
            let stat = sys::fd::stat(&file).map_err(|error| probe.fail(error, "look at a watched file"))?;
            if stat.st_nlink == 0 {
                return Err(refuse(format!("{what}, which is unlinked")));
            }
            let texts = sys::fd::Texts::of(std::process::id() as i32);
            let link = texts.and_then(|texts| texts.link(&file)).unwrap_or_default();
            let path = String::from_utf8(link).ok().filter(|path| {
                let found = sys::fd::stat_path(Path::new(path), false);
                found.is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
            });
            f_handle.path = path;
            wd.push(InotifyWdEntry {
                id,
                i_ino: watch.inode,
                mask: watch.mask,
                ignored_mask: watch.ignored_mask,
                s_dev: watch.device,
                wd: watch.wd as u32,
                f_handle,
            });
        }
        let unread = sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).unwrap_or(0);
        if unread > 0 {
            log::warn!("pid {}: {}: {unread} bytes of events are not kept", probe.pid, probe.object());
        }
        Ok(InotifyFileEntry { id, flags: probe.flags, fown: probe.owner()?, wd })
    }

    fn link(&self, entries: &[(u32, &InotifyFileEntry)], _files: &FileTable) -> Failures {
        let mut failures = Failures::new();
        for (id, entry) in entries {
            let mut seen = std::collections::HashSet::new();
            let is_wrong = |watch: &&InotifyWdEntry| {
                let room = watch.f_handle.handle.len() * 8;
                watch.wd == 0
                    || i32::try_from(watch.wd).is_err()
                    || !seen.insert(watch.wd)
                    || watch.mask & MASK == 0
                    || watch.f_handle.bytes as usize > room
                    || watch.f_handle.path.as_ref().is_some_and(|path| path.contains('\0'))
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
        for watch in &entry.wd {
            find(watch).map_err(|error| lost(watch, error))?;
        }
        let fd = sys::inotify::init(0).map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn arm(&self, entry: &InotifyFileEntry, fd: &OwnedFd) -> Result<(), Failure> {
        // The next number that the kernel gives is behind the last.
        let mut watches: Vec<&InotifyWdEntry> = entry.wd.iter().collect();
        watches.sort_unstable_by_key(|watch| watch.wd);
        for watch in watches {
            let explain = |error: Errno| lost(watch, error);
            let file = find(watch).map_err(explain)?;
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

fn lost(watch: &InotifyWdEntry, error: Errno) -> Failure {
    let what = watch.f_handle.path.clone().unwrap_or_else(|| format!("inode {}", watch.i_ino));
    error.on(Object::Named(format!("inotify watch {} of {what}", watch.wd)), "set it again")
}
