//! Files, directories, symbolic links and memory devices, reached by a path; and every O_PATH descriptor.
//!
//! Read from: fstat(2), the link in `/proc/PID/fd`, F_GETFL, the position.
//! Rebuilt by: open(2) of the same path, lseek(2).
//! Not kept: the content, which stays in the file system; only files without a name take theirs along, see
//! [`ghost`]. A file whose size, mode or build id is another at the restore is refused.
//! The working directory, the root, the executable and mapped files are records of this kind as well.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, open_flags, set_status};
use image::{FdTypes, FileEntry, FownEntry};
use super::ghost::{self, FileAt};
use super::{build_id, memfd, secret};
use model::options::FileValidation;
use model::{Errno, Failure, Failures, Object, Options, Remedy, options};
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

pub static KIND: Regular = Regular;

#[derive(Debug)]
pub struct Regular;

#[derive(Clone, PartialEq, prost::Message)]
pub struct RegFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "5")]
    pub fown: FownEntry,
    #[prost(bytes = "vec", required, tag = "6")]
    pub name: Vec<u8>,
    #[prost(sint32, optional, tag = "7")]
    pub mnt_id: Option<i32>,
    #[prost(uint64, optional, tag = "8")]
    pub size: Option<u64>,
    #[prost(bool, optional, tag = "9")]
    pub ext: Option<bool>,
    #[prost(uint32, optional, tag = "10")]
    pub mode: Option<u32>,
    #[prost(uint32, repeated, tag = "11", packed = "false")]
    pub build_id: Vec<u32>,
    #[prost(uint32, optional, tag = "12")]
    pub checksum: Option<u32>,
    #[prost(uint32, optional, tag = "13")]
    pub checksum_config: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub checksum_parameter: Option<u32>,
}


/// Memory devices that hold no state: null, zero, full, random, urandom.
const MEMORY_DEVICES: [u32; 5] = [3, 5, 7, 8, 9];

fn is_device(probe: &FdProbe, format: u32, major: u32) -> bool {
    probe.format() == format && probe.device().0 == major
}

/// Files recorded for other purposes than a descriptor, by inode, path and flags.
#[derive(Debug, Default)]
struct Recorded(HashMap<(u64, u64, Vec<u8>, u32), u32>);

/// Inodes and their names, which were found to belong together.
#[derive(Debug, Default)]
struct Named(HashSet<(u64, u64, Vec<u8>)>);

/// Adds a record for a file that a task uses without a descriptor; returns its id.
///
/// The same file under the same path with the same flags is one record.
pub fn record(seen: &FileAt, flags: u32, object: &dyn Fn() -> Object, cx: &mut DumpCx) -> Result<u32, Failure> {
    let FileAt { path, stat, source } = *seen;
    let key = (stat.st_dev, stat.st_ino, path.to_vec(), flags);
    if let Some(id) = cx.shelf.of::<Recorded>().0.get(&key) {
        return Ok(*id);
    }
    let id = cx.next_id();
    let name = ghost::find(id, seen, object, cx)?;
    let mut entry = entry(id, &name, flags, 0, NOBODY, stat);
    if stat.st_mode & libc::S_IFMT == libc::S_IFREG
        && cx.options.file_validation == FileValidation::Buildid
    {
        entry.build_id = current_build_id(source).map(|id| build_id::words(&id)).unwrap_or_default();
    }
    cx.files.push(FileEntry::new(FdTypes::Reg.into(), id, Regular::TAG, &entry));
    cx.shelf.of::<Recorded>().0.insert(key, id);
    Ok(id)
}

const NOBODY: FownEntry = FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 };

/// Adds a record for a path that is yet to be made.
pub fn add(id: u32, path: &[u8], stat: &libc::stat, cx: &mut DumpCx) {
    let entry = entry(id, path, libc::O_RDONLY as u32, 0, NOBODY, stat);
    cx.files.push(FileEntry::new(FdTypes::Reg.into(), id, Regular::TAG, &entry));
}

/// The path of a record. CRIU names directories of the root without a slash.
pub fn path_of(entry: &RegFileEntry) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(&entry.name))
}

/// Is it worth a look whether this is an executable or a library? Who writes to a file relies on nothing that is in it.
fn may_be_program(probe: &FdProbe) -> bool {
    let is_read = probe.flags as i32 & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDONLY;
    let is_library = || probe.link().windows(3).any(|part| part == b".so");
    is_read && probe.format() == libc::S_IFREG && (probe.stat.st_mode & 0o111 != 0 || is_library())
}

/// The build id of the file that is at a path now.
fn current_build_id(path: &Path) -> Option<Vec<u8>> {
    let fd = ghost::open_to_read(path).ok()?;
    build_id::read(&File::from(fd))
}

fn entry(id: u32, path: &[u8], flags: u32, pos: u64, fown: FownEntry, stat: &libc::stat) -> RegFileEntry {
    RegFileEntry {
        id,
        flags,
        pos,
        fown,
        name: path.to_vec(),
        mnt_id: None,
        size: (stat.st_mode & libc::S_IFMT == libc::S_IFREG).then_some(stat.st_size as u64),
        ext: None,
        mode: Some(stat.st_mode),
        build_id: Vec::new(),
        checksum: None,
        checksum_config: None,
        checksum_parameter: None,
    }
}

/// The key by which `--external` names this file, if it does.
fn external(probe: &FdProbe, options: &Options) -> Option<String> {
    if options.external.is_empty() {
        return None;
    }
    let mount: u32 = sys::proc::decimal(sys::proc::fdinfo(probe.info(), "mnt_id")?)?;
    let key = format!("file[{mount:x}:{:x}]", probe.stat.st_ino);
    options.external.contains(&key).then_some(key)
}

impl FdKind for Regular {
    type Entry = RegFileEntry;
    const NAME: &'static str = "regular file";
    const TYPE: FdTypes = FdTypes::Reg;
    const TAG: u32 = 3;

    fn claims(&self, probe: &FdProbe) -> bool {
        let is_named = probe.link().first() == Some(&b'/') && !probe.link().starts_with(b"/memfd:");
        match probe.format() {
            libc::S_IFREG | libc::S_IFDIR => {
                is_named && !memfd::is_object(probe) && !secret::KIND.claims(probe)
            }
            libc::S_IFLNK => true,
            libc::S_IFCHR if is_device(probe, libc::S_IFCHR, 1) && !probe.is_path_only() => {
                MEMORY_DEVICES.contains(&probe.device().1)
            }
            _ => probe.is_path_only() && is_named,
        }
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<RegFileEntry, Failure> {
        let (dev, ino) = probe.inode();
        if let Some(key) = external(probe, cx.options) {
            let mut entry = entry(id, key.as_bytes(), probe.flags, probe.position, probe.owner()?, &probe.stat);
            entry.ext = Some(true);
            return Ok(entry);
        }
        let key = (dev, ino, probe.link().to_vec());
        let mut name = probe.link().to_vec();
        if !cx.shelf.of::<Named>().0.contains(&key) {
            name = ghost::find(id, &probe.seen(&probe.source()), &|| probe.object(), cx)
                .map_err(|failure| failure.of(probe.pid))?;
            if name == probe.link() {
                cx.shelf.of::<Named>().0.insert(key);
            }
        }
        let mut entry = entry(id, &name, probe.flags, probe.position, probe.owner()?, &probe.stat);
        if cx.options.file_validation == FileValidation::Buildid && may_be_program(probe) && name == probe.link() {
            let found = current_build_id(&probe.source());
            entry.build_id = found.map(|id| build_id::words(&id)).unwrap_or_default();
        }
        Ok(entry)
    }

    fn group(&self, entry: &RegFileEntry, files: &FileTable) -> Option<u64> {
        let is_alone = files.remap(entry.id).is_none() && files.ended(&path_of(entry)).is_none();
        is_alone.then_some(entry.id.into())
    }

    fn key(&self, entry: &RegFileEntry, _files: &FileTable) -> Option<String> {
        let name = entry.name.strip_prefix(b"/").unwrap_or(&entry.name);
        String::from_utf8(name.to_vec()).ok()
    }

    fn open(&self, entry: &RegFileEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        if entry.ext == Some(true) {
            let name = String::from_utf8_lossy(&entry.name).into_owned();
            let why = "was left out of the dump with --external";
            return Err(Failure::policy(Object::Named(name), why, &options::INHERIT_FD));
        }
        // Not to wait for the other end of a fifo, should there be one where the file was.
        let (fd, stat) = open_with_stat(entry, entry.flags | libc::O_NONBLOCK as u32, cx)?;
        let object = || Object::Path(String::from_utf8_lossy(&entry.name).into_owned());
        let explain = |error: Errno| error.on(object(), "open it again");
        if entry.flags & libc::O_PATH as u32 != 0 {
            return Ok(fd);
        }
        if stat.st_mode & libc::S_IFMT == libc::S_IFIFO {
            return Err(Failure::conflict(object(), "", "is a fifo now"));
        }
        if entry.flags & libc::O_NONBLOCK as u32 == 0 {
            set_status(&fd, entry.flags).map_err(explain)?;
        }
        Ok(fd)
    }

    fn is_late(&self, entry: &RegFileEntry, files: &FileTable, tids: &HashSet<i32>) -> bool {
        let is_there = |(pid, thread): (i32, Option<i32>)| {
            tids.contains(&pid) && thread.is_none_or(|thread| tids.contains(&thread))
        };
        files.remap(entry.id).is_none() && super::process::of_path(&path_of(entry)).is_some_and(is_there)
    }

    fn link(&self, entries: &[(u32, &RegFileEntry)], _files: &FileTable) -> Failures {
        entries
            .iter()
            .filter(|(_, entry)| entry.name.contains(&0))
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("file {id} has a zero byte in its path")))
            .collect()
    }

    fn owner<'e>(&self, entry: &'e RegFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Opens the file of a record and checks that it is as it was.
pub fn open(entry: &RegFileEntry, flags: u32, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
    open_with_stat(entry, flags, cx).map(|(fd, _)| fd)
}

fn open_with_stat(
    entry: &RegFileEntry,
    flags: u32,
    cx: &mut OpenCx,
) -> Result<(OwnedFd, libc::stat), Failure> {
    let (files, given) = (cx.files, cx.options);
    let name = path_of(entry);
    let object = || Object::Path(name.display().to_string());
    let explain = |error: Errno| error.on(object(), "open it again");
    let fd = match files.remap(entry.id) {
        Some(remap) => ghost::open(entry, flags, remap, cx)?,
        None => match files.ended(&name) {
            Some(pid) => super::process::open(pid, entry, open_flags(flags), cx)?,
            None => sys::fd::open(&name, open_flags(flags)).map_err(explain)?,
        },
    };
    let stat = sys::fd::stat(&fd).map_err(explain)?;
    let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    if let Some(size) = entry.size
        && is_file
        && size != stat.st_size as u64
    {
        let why = format!("had {size} bytes when it was dumped and has {} now", stat.st_size);
        return Err(Failure::conflict(object(), "", why));
    }
    if !entry.build_id.is_empty() && is_file && given.file_validation == FileValidation::Buildid {
        let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let now = current_build_id(Path::new(&link)).map(|id| build_id::words(&id)).unwrap_or_default();
        if now != entry.build_id {
            let (then, now) = (build_id::text(&entry.build_id), build_id::text(&now));
            let now = if now.is_empty() { "none".into() } else { now };
            let why = format!("had the build id {then} when it was dumped and has {now} now");
            let advice = "restore with the same file, or with --file-validation filesize";
            return Err(Failure::conflict(object(), "", why).help(Remedy::Advice(advice)));
        }
    }
    if let Some(mode) = entry.mode
        && mode != stat.st_mode
        && !given.skip_file_rwx_check
    {
        let why = format!("had the mode {mode:o} when it was dumped and has {:o} now", stat.st_mode);
        return Err(Failure::conflict(object(), "", why));
    }
    let has_position = flags & libc::O_PATH as u32 == 0 && entry.pos != 0;
    if has_position && entry.pos != u64::MAX {
        sys::fd::seek(&fd, entry.pos as i64, libc::SEEK_SET).map_err(explain)?;
    }
    Ok((fd, stat))
}
