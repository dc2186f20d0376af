//! Files that somebody watches, with inotify or fanotify.
//!
//! Read from: the handle in `fdinfo`; the path that it leads to, or that a search finds (`--force-irmap`,
//! `--irmap-scan-path`) where the file system opens none of its handles.
//! Found again by: the path, if the same file is still there; the handle; the path in any case.
//! Not kept: files of which only the handle is known, when the file system is another one at the restore.

use super::ghost::FileAt;
use super::regular;
use crate::contract::{DumpCx, FdProbe};
use model::{Errno, Failure, IdMap, Remedy, options};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
    /// Of ours: the record of a file that has no name any more.
    #[prost(uint32, optional, tag = "1000")]
    pub file: Option<u32>,
}

/// CRIU expects as many words, whatever the length.
const WORDS: usize = 16;
/// Searched for watched files besides what `--irmap-scan-path` names: with all that is in them, or not.
const SEARCHED: [(&str, bool); 5] =
    [("/etc", true), ("/var/spool", true), ("/var/lib", true), ("/lib/udev", true), ("/", false)];

impl FhEntry {
    /// As [`sys::name::open_handle`] takes it.
    fn packed(&self) -> Vec<u8> {
        let words = self.handle.iter().flat_map(|word| word.to_ne_bytes());
        let bytes: Vec<u8> = words.take(self.bytes as usize).collect();
        [&self.r#type.to_ne_bytes()[..], &bytes].concat()
    }

    /// Is it one, whatever it leads to?
    pub fn is_sound(&self) -> bool {
        self.bytes as usize <= self.handle.len() * 8
            && !self.path.as_ref().is_some_and(|path| path.contains('\0'))
    }
}

/// The device of a file, as the kernel has its number.
fn kernel_device(stat_dev: u64) -> u32 {
    libc::major(stat_dev) << 20 | libc::minor(stat_dev)
}

/// Opens the file with this handle, on one of the mounts of its device.
fn by_handle(handle: &FhEntry, device: u32) -> Result<OwnedFd, Errno> {
    let mut result = Err(Errno { call: "open_by_handle_at", code: libc::ENOENT });
    for mount in sys::proc::mounts_of(&sys::fd::text("/proc/self/mountinfo")?, device) {
        let mount = Path::new(OsStr::from_bytes(&mount));
        let Ok(near) = sys::fd::open(mount, libc::O_RDONLY | libc::O_NONBLOCK) else { continue };
        result = sys::name::open_handle(&near, &handle.packed(), libc::O_PATH);
        if result.is_ok() {
            break;
        }
    }
    result
}

/// Files by device and inode, once they were searched for.
#[derive(Debug, Default)]
struct Search(Option<HashMap<(u32, u64), PathBuf>>);

fn search(inode: u64, device: u32, cx: &mut DumpCx) -> Option<PathBuf> {
    let asked = cx.options.irmap_scan_paths.iter().map(|path| (path.clone(), true));
    let places: Vec<(PathBuf, bool)> =
        asked.chain(SEARCHED.iter().map(|(path, whole)| (PathBuf::from(path), *whole))).collect();
    let found = cx.shelf.of::<Search>().0.get_or_insert_with(|| {
        let mut found = HashMap::new();
        let mut folders = places;
        while let Some((folder, is_whole)) = folders.pop() {
            let mut note = |path: &Path| {
                let meta = std::fs::symlink_metadata(path).ok()?;
                found.entry((kernel_device(meta.dev()), meta.ino())).or_insert_with(|| path.to_owned());
                Some(meta)
            };
            note(&folder);
            for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                if note(&entry.path()).is_some_and(|meta| meta.is_dir()) && is_whole {
                    folders.push((entry.path(), true));
                }
            }
        }
        found
    });
    found.get(&(device, inode)).cloned()
}

/// The record of a file that `probe` watches.
///
/// # Errors
/// Why it could not be found again.
pub fn record(
    probe: &FdProbe,
    watch: &str,
    file: &sys::proc::Watched,
    cx: &mut DumpCx,
) -> Result<FhEntry, Failure> {
    let mut handle: Vec<u64> = file
        .handle
        .chunks(8)
        .map(|bytes| {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(word)
        })
        .collect();
    handle.resize(WORDS.max(handle.len()), 0);
    let bytes = file.handle.len() as u32;
    let mut entry = FhEntry { bytes, r#type: file.handle_type, handle, path: None, mnt_id: None, file: None };
    let what = format!("watches inode {} on device {:#x} ({watch})", file.inode, file.device);
    let refuse = |why: String| probe.refuse(format!("{what}, {why}"));
    let text = |path: PathBuf| path.into_os_string().into_string().ok();
    let opened = match by_handle(&entry, file.device) {
        Ok(opened) => opened,
        Err(error) => {
            let is_asked = cx.options.force_irmap || !cx.options.irmap_scan_paths.is_empty();
            entry.path = is_asked.then(|| search(file.inode, file.device, cx)).flatten().and_then(text);
            if entry.path.is_none() {
                let remedy = if is_asked { &options::IRMAP_SCAN_PATH } else { &options::FORCE_IRMAP };
                let why = format!("which is not found by its handle: {error}");
                return Err(refuse(why).help(Remedy::Option(remedy)));
            }
            return Ok(entry);
        }
    };
    let stat = sys::fd::stat(&opened).map_err(|error| probe.fail(error, "look at a watched file"))?;
    let texts = sys::fd::Texts::of(std::process::id() as i32);
    let link = texts.and_then(|texts| texts.link(&opened)).unwrap_or_default();
    if stat.st_nlink == 0 {
        let source = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        let seen = FileAt { path: &link, stat: &stat, source: &source };
        entry.file = Some(regular::record(&seen, libc::O_PATH as u32, &|| probe.object(), cx)?);
        return Ok(entry);
    }
    entry.path = String::from_utf8(link).ok().filter(|path| {
        let found = sys::fd::stat_path(Path::new(path), false);
        found.is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
    });
    if entry.path.is_none() && cx.options.force_irmap {
        entry.path = search(file.inode, file.device, cx).and_then(text);
        if entry.path.is_none() {
            let why = "whose path is not found".to_owned();
            return Err(refuse(why).help(Remedy::Option(&options::IRMAP_SCAN_PATH)));
        }
    }
    Ok(entry)
}

/// Finds a watched file again; one without a name is among `files`.
///
/// # Errors
/// When neither its path nor its handle leads to it.
pub fn find(entry: &FhEntry, inode: u64, device: u32, files: &IdMap<OwnedFd>) -> Result<OwnedFd, Errno> {
    if let Some(file) = entry.file.and_then(|file| files.get(file)) {
        return file.try_clone().map_err(|error| sys::memory::io_errno("dup", &error));
    }
    let by_path = entry.path.as_ref().map(|path| {
        let path = Path::new("/").join(path);
        (sys::fd::open(&path, libc::O_PATH | libc::O_NOFOLLOW), path)
    });
    if let Some((Ok(fd), _)) = &by_path
        && sys::fd::stat(fd).is_ok_and(|stat| stat.st_ino == inode)
        && let Ok(fd) = fd.try_clone()
    {
        return Ok(fd);
    }
    match (by_handle(entry, device), by_path) {
        (Ok(fd), _) => Ok(fd),
        (Err(_), Some((Ok(fd), path))) => {
            log::warn!("{} is another file than the one that was watched", path.display());
            Ok(fd)
        }
        (Err(error), _) => Err(error),
    }
}
