//! Files whose names are gone. One that has no name left is a ghost: it travels inside the images. One that lives
//! on under other names gets one more beside the old one, for as long as the tree is away.
//!
//! Read from: the file itself, through a link of `/proc`; its holes stay holes.
//! Rebuilt by: a file under the old name, from which every name is taken again as soon as it is open.
//! Not kept: the time of the last change of the inode.

use super::regular::{RegFileEntry, Regular};
use crate::contract::{DumpCx, FileTable, OpenCx, is_nameless, open_flags, reopen};
use image::{Dir, Stream, Writer, kind};
use model::{Errno, Failure, Failures, Object, Remedy, options};
use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// `remap-fpath.img`: file `orig_id` is not found by its name, but as `remap_id`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemapFilePathEntry {
    #[prost(uint32, required, tag = "1")]
    pub orig_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub remap_id: u32,
    #[prost(enumeration = "RemapType", optional, tag = "3")]
    pub remap_type: Option<i32>,
    /// Of ours: finds the file without any name, as [`sys::name::handle`] gives it.
    #[prost(bytes = "vec", optional, tag = "1000")]
    pub handle: Option<Vec<u8>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum RemapType {
    Linked = 0,
    Ghost = 1,
    Procfs = 2,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Timeval {
    #[prost(uint64, required, tag = "1")]
    pub tv_sec: u64,
    #[prost(uint64, required, tag = "2")]
    pub tv_usec: u64,
}

/// `ghost-file-<id in hex>.img`: the content follows to the end of the file, or in chunks.
#[derive(Clone, PartialEq, prost::Message)]
pub struct GhostFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub uid: u32,
    #[prost(uint32, required, tag = "2")]
    pub gid: u32,
    #[prost(uint32, required, tag = "3")]
    pub mode: u32,
    #[prost(uint32, optional, tag = "4")]
    pub dev: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub ino: Option<u64>,
    #[prost(uint32, optional, tag = "6")]
    pub rdev: Option<u32>,
    #[prost(message, optional, tag = "7")]
    pub atim: Option<Timeval>,
    #[prost(message, optional, tag = "8")]
    pub mtim: Option<Timeval>,
    #[prost(bool, optional, tag = "9")]
    pub chunks: Option<bool>,
    #[prost(uint64, optional, tag = "10")]
    pub size: Option<u64>,
    #[prost(string, optional, tag = "11")]
    pub symlnk_target: Option<String>,
    /// Of ours: nanoseconds of the times, less than 1000.
    #[prost(uint32, optional, tag = "1000")]
    pub atim_nsec: Option<u32>,
    #[prost(uint32, optional, tag = "1001")]
    pub mtim_nsec: Option<u32>,
}

/// `len` bytes that follow belong at `off`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct GhostChunkEntry {
    #[prost(uint64, required, tag = "1")]
    pub len: u64,
    #[prost(uint64, required, tag = "2")]
    pub off: u64,
}

const DELETED: &[u8] = b" (deleted)";
/// Smaller files without holes are stored as a whole.
const SMALL: u64 = 12288;

fn path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

fn format(mode: u32) -> u32 {
    mode & libc::S_IFMT
}

// ------------------------------------------------------------------------------------------------ dump

struct Ghost {
    number: u32,
    entry: GhostFileEntry,
    /// Of regular files.
    file: Option<File>,
    object: Object,
}

struct Link {
    file: OwnedFd,
    path: PathBuf,
    object: Object,
}

/// What the end of a survey has to do.
#[derive(Default)]
struct Dumped {
    ghosts: Vec<Ghost>,
    links: Vec<Link>,
    /// By inode.
    numbers: HashMap<(u64, u64), u32>,
    link_ids: HashMap<(u64, u64), u32>,
}

/// A file that is to be recorded.
#[derive(Debug)]
pub struct FileAt<'s> {
    /// What the kernel calls it.
    pub path: &'s [u8],
    pub stat: &'s libc::stat,
    /// A link of `/proc` that opens it.
    pub source: &'s Path,
}

/// Is `path` still a name of the file with this device and inode?
///
/// # Errors
/// Why not, in words.
fn check_name(seen: &FileAt) -> Result<(), &'static str> {
    if seen.path.first() != Some(&b'/') {
        return Err("has no path");
    }
    let stat = seen.stat;
    match sys::fd::stat_path(path(seen.path), format(stat.st_mode) != libc::S_IFLNK) {
        Ok(found) if (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino) => Ok(()),
        _ if seen.path.ends_with(DELETED) => Err("is open under a name that is gone"),
        Ok(_) => Err("is another file than the one at its path now"),
        Err(error) if error.code == libc::ENOENT => Err("is not reached by its path"),
        Err(_) => Err("cannot be looked up by its path"),
    }
}

/// The name by which file `id` is found again, after everything that this takes is noted.
///
/// # Errors
/// Why it could not be found again, with what would help.
pub fn find(
    id: u32,
    seen: &FileAt,
    object: &dyn Fn() -> Object,
    cx: &mut DumpCx,
) -> Result<Vec<u8>, Failure> {
    let Err(why) = check_name(seen) else { return Ok(seen.path.to_vec()) };
    let refuse = |why: &'static str| Failure::unsupported(object(), why);
    if super::secret::is_object(seen.path, seen.source) {
        return Err(refuse(super::secret::UNREACHABLE));
    }
    let name = seen.path.strip_suffix(DELETED).unwrap_or(seen.path);
    let stat = seen.stat;
    let is_deleted = name.len() < seen.path.len();
    let is_dir = format(stat.st_mode) == libc::S_IFDIR;
    if let Some(found) = super::process::of_path(path(name)) {
        let pid = super::process::ended(path(name), found, &cx.tids).map_err(refuse)?;
        let remap_type = Some(RemapType::Procfs.into());
        let remap = RemapFilePathEntry { orig_id: id, remap_id: pid as u32, remap_type, handle: None };
        cx.image("remap-fpath.img", kind::REMAP_FPATH).record(&remap);
        return Ok(name.to_vec());
    }
    if name.first() != Some(&b'/') || !is_deleted && stat.st_nlink != 0 {
        return Err(refuse(why).help(Remedy::Advice("what hides it, or took its name, has to go first")));
    }
    // Some file systems count a link of a directory that is gone.
    let (remap_id, remap_type, handle) = match stat.st_nlink == 0 || is_dir {
        true => (ghost(seen, object, cx)?, RemapType::Ghost, None),
        false if cx.options.link_remap => {
            let (id, handle) = link(name, seen, object, cx)?;
            (id, RemapType::Linked, handle)
        }
        false => return Err(refuse(why).help(Remedy::Option(&options::LINK_REMAP))),
    };
    let remap = RemapFilePathEntry { orig_id: id, remap_id, remap_type: Some(remap_type.into()), handle };
    cx.image("remap-fpath.img", kind::REMAP_FPATH).record(&remap);
    Ok(name.to_vec())
}

/// Notes a file without names; returns the number of its image.
fn ghost(seen: &FileAt, object: &dyn Fn() -> Object, cx: &mut DumpCx) -> Result<u32, Failure> {
    let stat = seen.stat;
    let limit = cx.options.ghost_limit;
    let dumped = cx.shelf.of::<Dumped>();
    if let Some(number) = dumped.numbers.get(&(stat.st_dev, stat.st_ino)) {
        return Ok(*number);
    }
    let explain = |error: Errno| error.on(object(), "open the file without a name");
    let is_file = format(stat.st_mode) == libc::S_IFREG;
    let allocated = stat.st_blocks as u64 * 512;
    if is_file && allocated > limit {
        let why =
            format!("is unlinked, and its {allocated} bytes are more than the {limit} that may be stored");
        return Err(Failure::policy(object(), why, &options::GHOST_LIMIT));
    }
    let file = match is_file {
        true => Some(File::from(open_to_read(seen.source).map_err(explain)?)),
        false => None,
    };
    let symlnk_target =
        match format(stat.st_mode) {
            libc::S_IFLNK => {
                let link = sys::fd::open(seen.source, libc::O_PATH).map_err(explain)?;
                let target = sys::name::target(&link).map_err(explain)?;
                let text = String::from_utf8(target);
                Some(text.map_err(|_| {
                    Failure::unsupported(object(), "is unlinked, and leads to what is no text")
                })?)
            }
            _ => None,
        };
    let time = |seconds: i64, nanoseconds: i64| Timeval {
        tv_sec: seconds as u64,
        tv_usec: nanoseconds as u64 / 1000,
    };
    let rest = |nanoseconds: i64| Some(nanoseconds as u32 % 1000).filter(|rest| *rest != 0);
    let entry = GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        dev: Some(stat.st_dev as u32),
        ino: Some(stat.st_ino),
        rdev: matches!(format(stat.st_mode), libc::S_IFCHR | libc::S_IFBLK).then_some(stat.st_rdev as u32),
        atim: Some(time(stat.st_atime, stat.st_atime_nsec)),
        mtim: Some(time(stat.st_mtime, stat.st_mtime_nsec)),
        chunks: (is_file && (stat.st_size as u64 >= SMALL || allocated < stat.st_size as u64))
            .then_some(true),
        size: is_file.then_some(stat.st_size as u64),
        symlnk_target,
        atim_nsec: rest(stat.st_atime_nsec),
        mtim_nsec: rest(stat.st_mtime_nsec),
    };
    let number = dumped.numbers.len() as u32 + 1;
    dumped.numbers.insert((stat.st_dev, stat.st_ino), number);
    dumped.ghosts.push(Ghost { number, entry, file, object: object() });
    Ok(number)
}

/// Without a trace in its times, where that is allowed.
pub fn open_to_read(source: &Path) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    match sys::fd::open(source, flags | libc::O_NOATIME) {
        Err(error) if error.code == libc::EPERM => sys::fd::open(source, flags),
        result => result,
    }
}

/// Notes a link that is to be made beside `name`; returns the id of the record that has its path.
fn link(
    name: &[u8],
    seen: &FileAt,
    object: &dyn Fn() -> Object,
    cx: &mut DumpCx,
) -> Result<(u32, Option<Vec<u8>>), Failure> {
    let inode = (seen.stat.st_dev, seen.stat.st_ino);
    let explain = |error: Errno| error.on(object(), "open the file whose name is gone");
    let file = sys::fd::open(seen.source, libc::O_PATH).map_err(explain)?;
    let handle = sys::name::handle(&file).ok();
    let goes_on = cx.options.leave_running || cx.options.leave_stopped;
    if goes_on && handle.is_none() {
        let why = "is open under a name that is gone, on a file system without file handles";
        let advice = "the link that would lead to it cannot stay beside a tree that goes on";
        return Err(Failure::unsupported(object(), why).help(Remedy::Advice(advice)));
    }
    if let Some(id) = cx.shelf.of::<Dumped>().link_ids.get(&inode) {
        return Ok((*id, handle));
    }
    let id = cx.next_id();
    let at = path(name).with_file_name(format!("link_remap.{id}"));
    super::regular::add(id, at.as_os_str().as_bytes(), seen.stat, cx);
    let dumped = cx.shelf.of::<Dumped>();
    dumped.link_ids.insert(inode, id);
    if !goes_on {
        dumped.links.push(Link { file, path: at, object: object() });
    }
    Ok((id, handle))
}

/// Links that a dump has made, which go unless they are kept.
#[derive(Debug, Default)]
pub struct Links(Vec<PathBuf>);

impl Links {
    /// They are needed: the tree is away.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for path in &self.0 {
            if let Err(error) = fs::remove_file(path) {
                log::warn!("the link {} could not be removed: {error}", path.display());
            }
        }
    }
}

/// Makes the links that a survey has noted.
///
/// # Errors
/// When one cannot be made; those before it are gone then.
pub fn make_links(cx: &mut DumpCx) -> Result<Links, Failure> {
    let mut made = Links::default();
    for link in std::mem::take(&mut cx.shelf.of::<Dumped>().links) {
        sys::name::link(&link.file, &link.path).map_err(|error| {
            let advice = match error.code {
                libc::EXDEV | libc::ENOENT | libc::EPERM => "the file system cannot link it there",
                libc::EROFS => "the file system is read-only",
                _ => "a link has to be made beside the name that is gone",
            };
            error.on(link.object, "make a link to the file").help(Remedy::Advice(advice))
        })?;
        made.0.push(link.path);
    }
    Ok(made)
}

/// Writes the images of the ghosts that a survey has noted, while nothing changes them.
///
/// # Errors
/// When one cannot be read or written.
pub fn write(cx: &mut DumpCx, dir: &Dir) -> Result<(), Failure> {
    for ghost in std::mem::take(&mut cx.shelf.of::<Dumped>().ghosts) {
        let explain = |call: &'static str, error: &io::Error| {
            sys::memory::io_errno(call, error).on(ghost.object.clone(), "save the file without a name")
        };
        let mut head = Writer::new(kind::GHOST_FILE);
        head.record(&ghost.entry);
        let mut image = dir.create(&image_name(ghost.number))?;
        image.write_all(head.bytes()).map_err(|error| explain("write", &error))?;
        let Some(mut file) = ghost.file else { continue };
        let data = sys::fd::data(&file).map_err(|error| error.on(ghost.object.clone(), "find its data"))?;
        let mut copy = |range: Range<u64>, image: &mut File| {
            file.seek(SeekFrom::Start(range.start))?;
            io::copy(&mut (&mut file).take(range.end - range.start), image)
        };
        if ghost.entry.chunks != Some(true) {
            copy(0..u64::MAX, &mut image).map_err(|error| explain("read", &error))?;
            continue;
        }
        for range in data {
            let chunk = GhostChunkEntry { len: range.end - range.start, off: range.start };
            image.write_all(&image::framed(&chunk)).map_err(|error| explain("write", &error))?;
            let copied = copy(range, &mut image).map_err(|error| explain("read", &error))?;
            if copied != chunk.len {
                return Err(Failure::conflict(ghost.object, "", "became shorter while it was saved"));
            }
        }
    }
    Ok(())
}

fn image_name(number: u32) -> String {
    format!("ghost-file-{number:x}.img")
}

// --------------------------------------------------------------------------------------------- restore

/// What stands for a file that is not found by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remap {
    Ghost(u32),
    /// The record of a link, and what finds the file if that is not there.
    Link(u32, Option<Vec<u8>>),
    /// A process with this id, which has ended.
    Process(i32),
}

impl Remap {
    /// Two files with the same are one.
    fn key(&self) -> (RemapType, u32) {
        match self {
            Remap::Ghost(number) => (RemapType::Ghost, *number),
            Remap::Link(id, _) => (RemapType::Linked, *id),
            Remap::Process(pid) => (RemapType::Procfs, *pid as u32),
        }
    }
}

/// Sorts the records of `remap-fpath.img` by file.
///
/// # Errors
/// Every record that belongs to no file, or is of a type that is not carried.
pub fn remaps(entries: Vec<RemapFilePathEntry>, files: &FileTable) -> Result<HashMap<u32, Remap>, Failures> {
    /// In images of an early version instead of the type.
    const GHOST_BIT: u32 = 1 << 31;
    const PID_MAX: u32 = 1 << 22;
    let mut failures = Failures::new();
    let mut remaps = HashMap::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let corrupt = |why: &str| Failure::corrupt("remap-fpath.img", Some(index), why.to_owned());
        let RemapFilePathEntry { orig_id, remap_id, remap_type, handle } = entry;
        let kind = match remap_type {
            None if remap_id & GHOST_BIT != 0 => Ok(RemapType::Ghost),
            None => Ok(RemapType::Linked),
            Some(number) => RemapType::try_from(number),
        };
        let is_file = |id: u32| files.entry::<Regular>(id).is_some();
        if !is_file(orig_id) {
            failures.push(corrupt("is for a file that is none"));
            continue;
        }
        let remap = match kind {
            Ok(RemapType::Ghost) => {
                Remap::Ghost(if remap_type.is_none() { remap_id & !GHOST_BIT } else { remap_id })
            }
            Ok(RemapType::Linked) if is_file(remap_id) && remap_id != orig_id => {
                Remap::Link(remap_id, handle)
            }
            Ok(RemapType::Linked) => {
                failures.push(corrupt("is a link that is no file"));
                continue;
            }
            Ok(RemapType::Procfs) if (1..PID_MAX).contains(&remap_id) => Remap::Process(remap_id as i32),
            Ok(RemapType::Procfs) => {
                failures.push(corrupt("belongs to a process that is none"));
                continue;
            }
            Err(_) => {
                failures.push(corrupt("is of no type"));
                continue;
            }
        };
        if remaps.insert(orig_id, remap).is_some() {
            failures.push(corrupt("is for a file that has one already"));
        }
    }
    if failures.is_empty() { Ok(remaps) } else { Err(failures) }
}

/// A file without a name, as it was made.
#[derive(Debug)]
struct Body {
    /// O_PATH.
    base: OwnedFd,
    /// O_PATH, by file id: under the name that it had.
    named: HashMap<u32, OwnedFd>,
    /// Those that can be opened only by a name.
    ready: HashMap<u32, OwnedFd>,
}

#[derive(Debug, Default)]
struct Made(HashMap<(RemapType, u32), Body>);

/// Opens a file that is not found by its name.
///
/// # Errors
/// Those of making it, or of finding what stands for it.
pub fn open(entry: &RegFileEntry, flags: u32, remap: &Remap, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
    if let Remap::Process(pid) = remap {
        return super::process::open(*pid, entry, open_flags(flags), cx);
    }
    let key = remap.key();
    if !cx.shelf.of::<Made>().0.contains_key(&key) {
        let body = make(remap, cx)?;
        cx.shelf.of::<Made>().0.insert(key, body);
    }
    let body = cx.shelf.of::<Made>().0.get_mut(&key).expect("it was just made");
    if let Some(fd) = body.ready.remove(&entry.id) {
        return Ok(fd);
    }
    let fd = body.named.get(&entry.id).unwrap_or(&body.base);
    reopen(fd, flags).map_err(|error| error.on(object(entry), "open the file without a name"))
}

fn object(entry: &RegFileEntry) -> Object {
    Object::Path(String::from_utf8_lossy(&entry.name).into_owned())
}

fn make(remap: &Remap, cx: &OpenCx) -> Result<Body, Failure> {
    let users = cx.files.remapped(|other| other.key() == remap.key());
    let mut users: Vec<&RegFileEntry> = users.filter_map(|id| cx.files.entry::<Regular>(id)).collect();
    users.sort_unstable_by_key(|entry| entry.id);
    let mut names = Names::default();
    let (mut named, mut ready) = (HashMap::new(), HashMap::new());
    let (base, content) = match remap {
        Remap::Ghost(number) => {
            let name = image_name(*number);
            let mut image = Stream::open(kind::GHOST_FILE, &name, cx.images.open_file(&name)?)?;
            let ghost: GhostFileEntry = image.one()?;
            let base = match never_had_a_name(&ghost, &users) {
                true => create_nameless(&users, &mut names, &mut ready)?,
                false => create(&ghost, *number, &users, &mut names)?,
            };
            (base, Some((ghost, image)))
        }
        Remap::Process(_) => {
            return Err(Failure::corrupt("remap-fpath.img", None, "is for no file of its own"));
        }
        Remap::Link(id, handle) => (find_linked(*id, handle.as_deref(), cx)?, None),
    };
    let inode = |fd: &OwnedFd| sys::fd::stat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    let own = inode(&base);
    // A name that it gets and loses takes from a file that never had one the right to get one.
    let may_be_named = content.as_ref().is_none_or(|(ghost, _)| !never_had_a_name(ghost, &users));
    for user in users.iter().filter(|_| may_be_named) {
        let at = super::regular::path_of(user);
        // Somebody may have this name now.
        if !names.has(&at) && names.add(&at, |at| sys::name::link(&base, at)).is_err() {
            continue;
        }
        let open = |flags: i32| sys::fd::open(&at, flags).ok().filter(|fd| inode(fd) == own);
        named.extend(open(libc::O_PATH | libc::O_NOFOLLOW).map(|fd| (user.id, fd)));
        if user.flags & libc::O_NOFOLLOW as u32 != 0 {
            ready.extend(open(open_flags(user.flags)).map(|fd| (user.id, fd)));
        }
    }
    drop(names);
    if let Some((ghost, mut image)) = content {
        fill(&ghost, &mut image, &base)?;
    }
    Ok(Body { base, named, ready })
}

/// A name that exists for a moment.
#[derive(Debug)]
struct Name {
    shown: PathBuf,
    /// Where it is made and removed: by a mount of our own, if nobody may write to the other one.
    real: PathBuf,
}

/// Names that exist for a moment.
#[derive(Debug, Default)]
struct Names {
    files: Vec<Name>,
    /// Outer ones first.
    dirs: Vec<Name>,
    /// Mount points that nobody may write to, and the same mounts once more.
    writable: Vec<(PathBuf, OwnedFd)>,
}

impl Names {
    fn has(&self, path: &Path) -> bool {
        self.files.iter().chain(&self.dirs).any(|name| name.shown == path)
    }

    fn real(&self, path: &Path) -> PathBuf {
        let inside = |(point, mount): &(PathBuf, OwnedFd)| {
            let rest = path.strip_prefix(point).ok()?;
            Some(Path::new("/proc/self/fd").join(mount.as_raw_fd().to_string()).join(rest))
        };
        self.writable.iter().find_map(inside).unwrap_or_else(|| path.to_owned())
    }

    /// Has a name made, if need be where its mount can be written to.
    fn make(&mut self, path: &Path, make: impl Fn(&Path) -> Result<(), Errno>) -> Result<Name, Errno> {
        let name = |real: PathBuf| Name { shown: path.to_owned(), real };
        let real = self.real(path);
        match make(&real) {
            Ok(()) => Ok(name(real)),
            Err(error) if error.code == libc::EROFS && real == path => {
                self.open_mount(path)?;
                let real = self.real(path);
                make(&real).map(|()| name(real))
            }
            Err(error) => Err(error),
        }
    }

    fn add(&mut self, path: &Path, make: impl Fn(&Path) -> Result<(), Errno>) -> Result<(), Errno> {
        let name = self.make(path, make)?;
        self.files.push(name);
        Ok(())
    }

    /// Gets the mount that a path is on once more, to write to.
    fn open_mount(&mut self, path: &Path) -> Result<(), Errno> {
        let read_only = Errno { call: "open", code: libc::EROFS };
        let folder = path.ancestors().skip(1).find(|folder| folder.is_dir()).ok_or(read_only)?;
        let mountinfo = sys::fd::text("/proc/self/mountinfo")?;
        let fd = sys::fd::open(folder, libc::O_PATH)?;
        let point = sys::proc::mount_point(&mountinfo, sys::fd::mount_id(&fd)? as u32).ok_or(read_only)?;
        let point = PathBuf::from(OsString::from_vec(point));
        let mount = sys::place::writable(&point)?;
        self.writable.push((point, mount));
        Ok(())
    }

    /// Makes the folders that are missing on the way to `path`.
    fn make_parents(&mut self, path: &Path) -> Result<(), Errno> {
        let missing: Vec<&Path> =
            path.ancestors().skip(1).take_while(|dir| fs::symlink_metadata(dir).is_err()).collect();
        for dir in missing.into_iter().rev() {
            let name =
                self.make(dir, |dir| io_result("mkdir", fs::DirBuilder::new().mode(0o700).create(dir)))?;
            self.dirs.push(name);
        }
        Ok(())
    }
}

fn io_result<T>(call: &'static str, result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| sys::memory::io_errno(call, &error))
}

impl Drop for Names {
    fn drop(&mut self) {
        let files = self.files.iter().map(|name| (name, fs::remove_file(&name.real)));
        let removed: Vec<_> = files.collect();
        let dirs = self.dirs.iter().rev().map(|name| (name, fs::remove_dir(&name.real)));
        for (name, result) in removed.into_iter().chain(dirs) {
            if let Err(error) = result {
                log::warn!("the name {} could not be removed: {error}", name.shown.display());
            }
        }
    }
}

/// The kernel calls a file that was made without a name (O_TMPFILE) by its number.
fn never_had_a_name(ghost: &GhostFileEntry, users: &[&RegFileEntry]) -> bool {
    let own = ghost.ino.map(|ino| OsString::from(format!("#{ino}")));
    let is_own = |user: &&RegFileEntry| super::regular::path_of(user).file_name().map(OsStr::to_owned) == own;
    format(ghost.mode) == libc::S_IFREG && own.is_some() && !users.is_empty() && users.iter().all(is_own)
}

/// Makes such a file. The descriptor that it was made by is ready at once: no other is like that.
fn create_nameless(
    users: &[&RegFileEntry],
    names: &mut Names,
    ready: &mut HashMap<u32, OwnedFd>,
) -> Result<OwnedFd, Failure> {
    let first = users.iter().find(|user| is_nameless(user.flags)).copied();
    let path = super::regular::path_of(first.unwrap_or(users[0]));
    let explain = |error: Errno| {
        error.on(Object::Path(path.display().to_string()), "make the file without a name anew")
    };
    names.make_parents(&path).map_err(explain)?;
    let folder = path.parent().map(|folder| names.real(folder)).unwrap_or_default();
    let flags = first.map_or(libc::O_RDWR, |user| open_flags(user.flags));
    let is_read = flags & libc::O_ACCMODE == libc::O_RDWR;
    let flags = flags & !libc::O_ACCMODE | libc::O_TMPFILE;
    let made = fs::OpenOptions::new().read(is_read).write(true).mode(0o600).custom_flags(flags).open(folder);
    let made = OwnedFd::from(io_result("open", made).map_err(explain)?);
    let base = reopen(&made, libc::O_PATH as u32).map_err(explain)?;
    ready.extend(first.map(|user| (user.id, made)));
    Ok(base)
}

/// Makes the file of a ghost, still without content, under the first of its old names that is free.
fn create(
    ghost: &GhostFileEntry,
    number: u32,
    users: &[&RegFileEntry],
    names: &mut Names,
) -> Result<OwnedFd, Failure> {
    let mut paths: Vec<PathBuf> = users.iter().map(|user| super::regular::path_of(user)).collect();
    paths.dedup();
    let first = paths.first().cloned().unwrap_or_default();
    paths.extend(beside(&first, number));
    let mut last = libc::EEXIST;
    for path in paths {
        let made = names.make_parents(&path).and_then(|()| names.make(&path, |path| make_file(ghost, path)));
        let name = match made {
            Ok(name) => name,
            Err(error) => {
                last = error.code;
                if matches!(last, libc::EEXIST | libc::ENOTDIR | libc::ENAMETOOLONG) {
                    continue;
                }
                break;
            }
        };
        let object = || Object::Path(path.display().to_string());
        let explain = |error: Errno| error.on(object(), "open the file that was made anew");
        let base = sys::fd::open(&name.real, libc::O_PATH | libc::O_NOFOLLOW).map_err(explain);
        match format(ghost.mode) {
            libc::S_IFDIR => names.dirs.push(name),
            _ => names.files.push(name),
        }
        return base;
    }
    let object = Object::Path(first.display().to_string());
    Err(Errno { call: "open", code: last }.on(object, "make the file without a name anew"))
}

/// A name that nobody has, in the folder of `path` or the nearest above it that there is.
fn beside(path: &Path, number: u32) -> Option<PathBuf> {
    let dir = path.ancestors().skip(1).find(|dir| dir.is_dir())?;
    let mut name = OsString::from(path.file_name()?);
    name.push(format!(".cr.{number:x}.ghost"));
    Some(dir.join(name))
}

fn make_file(ghost: &GhostFileEntry, path: &Path) -> Result<(), Errno> {
    let kind = format(ghost.mode);
    let made = match kind {
        libc::S_IFREG => fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map(drop),
        libc::S_IFDIR => fs::DirBuilder::new().mode(0o700).create(path),
        libc::S_IFLNK => std::os::unix::fs::symlink(ghost.symlnk_target.as_deref().unwrap_or_default(), path),
        libc::S_IFIFO | libc::S_IFSOCK | libc::S_IFCHR | libc::S_IFBLK => {
            return sys::name::make_node(path, kind | 0o600, ghost.rdev.unwrap_or(0).into());
        }
        _ => return Err(Errno { call: "open", code: libc::EINVAL }),
    };
    io_result("open", made)
}

/// A file of huge pages, which is written from some place on.
struct HugePages<'f> {
    file: &'f File,
    page: u64,
    at: u64,
}

impl io::Write for HugePages<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = sys::memory::write_mapped(self.file, self.page, self.at, bytes);
        written.map_err(|error| io::Error::from_raw_os_error(error.code))?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Gives a file its content, owner, mode and times, when it has no name any more.
fn fill(ghost: &GhostFileEntry, image: &mut Stream, base: &OwnedFd) -> Result<(), Failure> {
    let object = || Object::Path(shown(base));
    let explain = |error: Errno| error.on(object(), "fill the file without a name");
    if format(ghost.mode) == libc::S_IFREG {
        let huge_page = sys::fd::huge_page_of(base);
        let access = if huge_page.is_some() { libc::O_RDWR } else { libc::O_WRONLY };
        let mut file = File::from(reopen(base, access as u32).map_err(explain)?);
        if let Some(size) = ghost.size {
            sys::fd::truncate(&file, size).map_err(explain)?;
        }
        let mut put = |at: u64, length: u64, image: &mut Stream| match huge_page {
            Some(page) => image.copy(length, &mut HugePages { file: &file, page, at }),
            None => {
                let sought = file.seek(SeekFrom::Start(at));
                sought.map_err(|error| explain(sys::memory::io_errno("lseek", &error)))?;
                image.copy(length, &mut file)
            }
        };
        match ghost.chunks {
            Some(true) => {
                while let Some(chunk) = image.record::<GhostChunkEntry>()? {
                    let end = chunk.off.checked_add(chunk.len);
                    if end.is_none_or(|end| end > ghost.size.unwrap_or(0)) {
                        return Err(image.corrupt("has a chunk beyond the end of the file".into()));
                    }
                    if put(chunk.off, chunk.len, image)? != chunk.len {
                        return Err(image.corrupt("ends inside a chunk".into()));
                    }
                }
            }
            _ => {
                put(0, u64::MAX, image)?;
            }
        }
    }
    sys::name::chown(base, ghost.uid, ghost.gid).map_err(explain)?;
    if format(ghost.mode) != libc::S_IFLNK {
        let mode = fs::Permissions::from_mode(ghost.mode & 0o7777);
        fs::set_permissions(format!("/proc/self/fd/{}", base.as_raw_fd()), mode)
            .map_err(|error| explain(sys::memory::io_errno("chmod", &error)))?;
    }
    if let (Some(atim), Some(mtim)) = (ghost.atim, ghost.mtim) {
        let time = |time: Timeval, rest: Option<u32>| {
            (
                time.tv_sec as i64,
                (time.tv_usec % 1_000_000 * 1000) as i64 + i64::from(rest.unwrap_or(0) % 1000),
            )
        };
        let times = [time(atim, ghost.atim_nsec), time(mtim, ghost.mtim_nsec)];
        sys::name::set_times(base, times).map_err(explain)?;
    }
    Ok(())
}

/// What the kernel calls it now.
fn shown(fd: &OwnedFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or("a file".into(), |link| link.display().to_string())
}

/// The file that a link, or a handle, leads to.
fn find_linked(id: u32, handle: Option<&[u8]>, cx: &OpenCx) -> Result<OwnedFd, Failure> {
    let entry = cx.files.entry::<Regular>(id);
    let entry =
        entry.ok_or_else(|| Failure::corrupt("remap-fpath.img", None, "is a link that is no file"))?;
    let at = super::regular::path_of(entry);
    let explain =
        |error: Errno| error.on(Object::Path(at.display().to_string()), "find the file whose name is gone");
    let by_name = sys::fd::open(&at, libc::O_PATH | libc::O_NOFOLLOW);
    match (by_name, handle) {
        (Ok(fd), _) => Ok(fd),
        (Err(error), Some(handle)) if error.code == libc::ENOENT => {
            let near =
                sys::fd::open(at.parent().unwrap_or(Path::new("/")), libc::O_RDONLY).map_err(explain)?;
            sys::name::open_handle(&near, handle, libc::O_PATH).map_err(explain)
        }
        (Err(error), _) => Err(explain(error)),
    }
}

/// Removes the links of a dump, when the tree is there again.
pub fn remove_links(files: &FileTable) {
    for id in files.links() {
        let Some(entry) = files.entry::<Regular>(id) else { continue };
        let at = super::regular::path_of(entry);
        match fs::remove_file(&at) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::warn!("the link {} could not be removed: {error}", at.display());
            }
            _ => {}
        }
    }
}
