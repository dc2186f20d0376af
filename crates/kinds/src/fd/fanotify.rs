//! fanotify(7): marks on files, mounts and whole file systems.
//!
//! Read from: the `fanotify` lines of `/proc/PID/fdinfo`; files as [`watched`] does, mounts by their ids.
//! Rebuilt by: fanotify_init(2); the marks come last of all, so that the restore itself is not among the events.
//! Refused: marks that ask for permission, as nobody answers while the tree is frozen; marks on mount namespaces.
//! Events that were not read name real files and those who touched them, and cannot be made again. A program whose queue
//! has a limit hears that some were lost (FAN_Q_OVERFLOW); another is given time to read them, and refused after that.
//! Those of the dump itself mean nothing.
//! Not kept: whether the group was made without privileges.

use super::watched::{self, FhEntry};
use crate::contract::{ArmCx, DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, IdMap, Object, Remedy};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use sys::proc::{FanotifyMark, Marked};

pub static KIND: Fanotify = Fanotify;

#[derive(Debug)]
pub struct Fanotify;

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum MarkType {
    Inode = 1,
    /// Of a mount; without one of a file system.
    Mount = 2,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FanotifyInodeMarkEntry {
    #[prost(uint64, required, tag = "1")]
    pub i_ino: u64,
    #[prost(message, required, tag = "2")]
    pub f_handle: FhEntry,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FanotifyMountMarkEntry {
    #[prost(uint32, required, tag = "1")]
    pub mnt_id: u32,
    #[prost(string, optional, tag = "2")]
    pub path: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FanotifyMarkEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(enumeration = "MarkType", required, tag = "2")]
    pub r#type: i32,
    #[prost(uint32, required, tag = "3")]
    pub mflags: u32,
    #[prost(uint32, required, tag = "4")]
    pub mask: u32,
    #[prost(uint32, required, tag = "5")]
    pub ignored_mask: u32,
    #[prost(uint32, required, tag = "6")]
    pub s_dev: u32,
    #[prost(message, optional, tag = "7")]
    pub ie: Option<FanotifyInodeMarkEntry>,
    #[prost(message, optional, tag = "8")]
    pub me: Option<FanotifyMountMarkEntry>,
    /// Of ours: where the marked file system is mounted.
    #[prost(string, optional, tag = "1000")]
    pub filesystem: Option<String>,
}

/// The flags of the group, and those of the descriptors in its events.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FanotifyFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "4")]
    pub faflags: u32,
    #[prost(uint32, required, tag = "5")]
    pub evflags: u32,
    #[prost(message, repeated, tag = "6")]
    pub mark: Vec<FanotifyMarkEntry>,
    /// Of ours: there were events that nobody had read.
    #[prost(bool, optional, tag = "1000")]
    pub lost: Option<bool>,
}

/// FAN_OPEN_PERM, FAN_ACCESS_PERM, FAN_OPEN_EXEC_PERM, FAN_PRE_ACCESS. Source: include/uapi/linux/fanotify.h.
const PERMISSIONS: u32 = 0x10000 | 0x20000 | 0x40000 | 0x10_0000;

/// The path of a mount with this id, or of any of a file system.
fn mount_path(found: Option<Vec<u8>>) -> Option<String> {
    String::from_utf8(found?).ok()
}

fn dump_mark(
    probe: &FdProbe,
    id: u32,
    mark: FanotifyMark,
    mounts: &[u8],
    cx: &mut DumpCx,
) -> Result<FanotifyMarkEntry, Failure> {
    let mut entry = FanotifyMarkEntry {
        id,
        r#type: MarkType::Mount.into(),
        mflags: mark.flags,
        mask: mark.mask,
        ignored_mask: mark.ignored_mask,
        ..FanotifyMarkEntry::default()
    };
    if mark.mask & PERMISSIONS != 0 {
        // Whatever is opened from here on might wait for it.
        cx.ends_here = true;
        let why = "has marks that ask for permission, which nobody gives while it is frozen";
        let advice = "a dump would wait for itself; it is not carried";
        return Err(probe.refuse(why).help(Remedy::Advice(advice)));
    }
    let no_text = |what: &str| probe.refuse(format!("has a mark on {what}, which is not found"));
    match mark.on {
        Marked::File(file) => {
            entry.r#type = MarkType::Inode.into();
            entry.s_dev = file.device;
            let f_handle = watched::record(probe, "a mark", &file, cx)?;
            entry.ie = Some(FanotifyInodeMarkEntry { i_ino: file.inode, f_handle });
        }
        Marked::Mount(mount) => {
            let path = mount_path(sys::proc::mount_point(mounts, mount))
                .ok_or_else(|| no_text(&format!("mount {mount}")))?;
            entry.me = Some(FanotifyMountMarkEntry { mnt_id: mount, path: Some(path) });
        }
        Marked::Filesystem(device) => {
            let path = mount_path(sys::proc::mounts_of(mounts, device).into_iter().next())
                .ok_or_else(|| no_text(&format!("the file system of device {device:#x}")))?;
            entry.s_dev = device;
            entry.filesystem = Some(path);
        }
        Marked::Namespace => return Err(probe.refuse("has a mark on a mount namespace, which is not carried")),
    }
    Ok(entry)
}

/// What a mark is on, and the flag that says so.
fn find(mark: &FanotifyMarkEntry, files: &IdMap<OwnedFd>) -> Result<(OwnedFd, u32), Errno> {
    if let Some(inode) = &mark.ie {
        return Ok((watched::find(&inode.f_handle, inode.i_ino, mark.s_dev, files)?, libc::FAN_MARK_INODE));
    }
    let gone = Errno { call: "open", code: libc::ENOENT };
    let (path, flag) = match (&mark.filesystem, &mark.me) {
        (Some(path), _) => (path.clone().into_bytes(), libc::FAN_MARK_FILESYSTEM),
        (None, Some(FanotifyMountMarkEntry { path: Some(path), .. })) => {
            (path.clone().into_bytes(), libc::FAN_MARK_MOUNT)
        }
        (None, Some(mount)) => {
            let mounts = sys::fd::text("/proc/self/mountinfo")?;
            (sys::proc::mount_point(&mounts, mount.mnt_id).ok_or(gone)?, libc::FAN_MARK_MOUNT)
        }
        (None, None) => return Err(gone),
    };
    let path = Path::new("/").join(OsStr::from_bytes(&path));
    Ok((sys::fd::open(&path, libc::O_PATH)?, flag))
}

fn lost(mark: &FanotifyMarkEntry, error: Errno) -> Failure {
    let path = match (&mark.ie, &mark.me, &mark.filesystem) {
        (Some(inode), ..) => inode.f_handle.path.clone(),
        (None, Some(mount), _) => mount.path.clone(),
        (None, None, path) => path.clone(),
    };
    let path = path.unwrap_or_else(|| "a file without a path".into());
    error.on(Object::Named(format!("fanotify mark on {path}")), "set it again")
}

/// Are there events of others, that the program has to hear of?
///
/// # Errors
/// If it could not hear of them.
fn has_unread(probe: &FdProbe, flags: u32) -> Result<bool, Failure> {
    if sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).unwrap_or(0) <= 0 {
        return Ok(false);
    }
    let count = sys::fanotify::of_others(&probe.fd);
    let has_limit = flags & libc::FAN_UNLIMITED_QUEUE == 0;
    match count {
        Some(0) => Ok(false),
        Some(count) if !has_limit => {
            let why = format!("has {count} events that nobody has read, and that cannot be made again");
            Err(probe.refuse(why).passes().help(Remedy::Advice("dump it when the program has read them")))
        }
        _ => {
            log::warn!("pid {}: {}: events that nobody has read are not kept", probe.pid, probe.object());
            Ok(has_limit)
        }
    }
}

/// Puts the event that says that others were lost in an empty queue, and nothing else, as [`super::inotify`] does.
fn overflow(group: &OwnedFd) -> std::io::Result<()> {
    /// It takes time, and a file for each.
    const MUCH: usize = 1 << 18;
    const SOME: usize = 128;
    let limit = sys::fanotify::limit().filter(|limit| *limit <= MUCH).ok_or(std::io::ErrorKind::QuotaExceeded)?;
    let errno = |error: Errno| std::io::Error::from_raw_os_error(error.code);
    let place = sys::place::nowhere().map_err(errno)?;
    let folder = Path::new("/proc/self/fd").join(std::os::fd::AsRawFd::as_raw_fd(&place).to_string());
    // Names of one length, so that the events are.
    let names: Vec<_> = (0..=limit).map(|nth| folder.join(format!("{nth:08}"))).collect();
    names.iter().try_for_each(|name| std::fs::File::create(name).map(drop))?;
    let mask = libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD;
    sys::fanotify::mark(group, &place, libc::FAN_MARK_INODE, mask).map_err(errno)?;
    let opened = names.iter().try_for_each(|name| std::fs::File::open(name).map(drop));
    sys::fanotify::flush(group).map_err(errno)?;
    opened?;
    let (mut left, mut size) = (limit, size_of::<libc::fanotify_event_metadata>());
    while left > 0 {
        match sys::fanotify::drop_some(group, size * left.min(SOME)) {
            Ok(count) => left = left.saturating_sub(count),
            // There is more to each than was thought.
            Err(error) if error.code == libc::EINVAL && size < 1024 => size += 8,
            Err(error) => return Err(errno(error)),
        }
    }
    Ok(())
}

impl FdKind for Fanotify {
    type Entry = FanotifyFileEntry;
    const NAME: &'static str = "fanotify";
    const TYPE: FdTypes = FdTypes::Fanotify;
    const TAG: u32 = 14;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"fanotify")
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<FanotifyFileEntry, Failure> {
        let group = sys::proc::parse_fanotify(probe.info())
            .ok_or_else(|| probe.refuse("the kernel tells its marks in a way not understood"))?;
        let mounts = sys::fd::text("/proc/self/mountinfo")
            .map_err(|error| probe.fail(error, "find the mounts that it marks"))?;
        let mut mark = Vec::with_capacity(group.marks.len());
        for one in group.marks {
            mark.push(dump_mark(probe, id, one, &mounts, cx)?);
        }
        let lost = has_unread(probe, group.flags)?.then_some(true);
        Ok(FanotifyFileEntry {
            id,
            flags: probe.flags,
            fown: probe.owner()?,
            faflags: group.flags,
            evflags: group.event_flags,
            mark,
            lost,
        })
    }

    fn link(&self, entries: &[(u32, &FanotifyFileEntry)], _files: &FileTable) -> Failures {
        let is_wrong = |mark: &&FanotifyMarkEntry| {
            let is_file = mark.r#type == i32::from(MarkType::Inode);
            let is_text = |path: &Option<String>| !path.as_ref().is_some_and(|path| path.contains('\0'));
            is_file != mark.ie.is_some()
                || !is_file && mark.me.is_some() == mark.filesystem.is_some()
                || mark.ie.as_ref().is_some_and(|inode| !inode.f_handle.is_sound())
                || !is_text(&mark.filesystem)
                || !mark.me.as_ref().is_none_or(|mount| is_text(&mount.path))
        };
        let wrong = entries.iter().filter(|(_, entry)| entry.mark.iter().any(|mark| is_wrong(&mark)));
        wrong
            .map(|(id, _)| {
                Failure::corrupt("files.img", None, format!("fanotify {id} has a mark that is none"))
            })
            .collect()
    }

    fn open(&self, entry: &FanotifyFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named("fanotify".into()), "make it");
        // What is gone is told now, while nothing was made.
        for mark in &entry.mark {
            if mark.ie.as_ref().is_none_or(|inode| inode.f_handle.file.is_none()) {
                find(mark, &IdMap::default()).map_err(|error| lost(mark, error))?;
            }
        }
        let fd = sys::fanotify::init(entry.faflags, entry.evflags).map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn needs(&self, entry: &FanotifyFileEntry) -> Vec<u32> {
        entry.mark.iter().filter_map(|mark| mark.ie.as_ref()?.f_handle.file).collect()
    }

    fn arm(&self, entry: &FanotifyFileEntry, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure> {
        const IGNORES: u32 = libc::FAN_MARK_IGNORED_SURV_MODIFY | libc::FAN_MARK_IGNORE;
        if entry.lost == Some(true) {
            let explain = |error: Errno| error.on(Object::Named("fanotify".into()), "tell that events were lost");
            // Nobody gets a signal for those that are made for that.
            set_status(fd, entry.flags & !(libc::O_ASYNC as u32)).map_err(explain)?;
            if let Err(error) = overflow(fd) {
                log::warn!("fanotify: events that were not read are lost, and nobody is told: {error}");
            }
            set_status(fd, entry.flags).map_err(explain)?;
        }
        for mark in &entry.mark {
            let explain = |error: Errno| lost(mark, error);
            let (file, on) = find(mark, cx.files).map_err(explain)?;
            if mark.mask != 0 {
                let flags = on | mark.mflags & !IGNORES;
                sys::fanotify::mark(fd, &file, flags, mark.mask.into()).map_err(explain)?;
            }
            if mark.ignored_mask != 0 {
                let how = if mark.mflags & libc::FAN_MARK_IGNORE != 0 { 0 } else { libc::FAN_MARK_IGNORED_MASK };
                sys::fanotify::mark(fd, &file, on | mark.mflags | how, mark.ignored_mask.into())
                    .map_err(explain)?;
            }
        }
        Ok(())
    }

    fn owner<'e>(&self, entry: &'e FanotifyFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
