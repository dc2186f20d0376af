//! memfd_create(2), and the shared anonymous memory that is a file without a name just the same.
//!
//! Read from: the link (`/memfd:NAME`, or for mmap(2) of MAP_SHARED|MAP_ANONYMOUS `/dev/zero`, of huge pages
//! `/anon_hugepage`), fstat(2), F_GET_SEALS, statfs(2) for the size of huge pages; the content through the file, as pages.
//! Rebuilt by: memfd_create(2) or mmap(2), ftruncate(2), the content, owner and mode, and the seals last.

use crate::vma::hugetlb;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, reopen};
use image::{Dir, FdTypes, FileEntry, FownEntry, kind};
use model::{Errno, Failure, Failures, Object};
use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::os::fd::OwnedFd;

pub static KIND: Memfd = Memfd;

#[derive(Debug)]
pub struct Memfd;

/// `inode_id` names the record in `memfd.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemfdFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(uint64, required, tag = "3")]
    pub pos: u64,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "5")]
    pub inode_id: u32,
}

/// `memfd.img`: the object; its content is in `pagemap-shmem-<shmid>.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MemfdInodeEntry {
    #[prost(bytes = "vec", required, tag = "1")]
    pub name: Vec<u8>,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint64, required, tag = "4")]
    pub size: u64,
    #[prost(uint32, required, tag = "5")]
    pub shmid: u32,
    #[prost(uint32, required, tag = "6")]
    pub seals: u32,
    #[prost(uint64, required, tag = "7")]
    pub inode_id: u64,
    #[prost(uint32, optional, tag = "8")]
    pub hugetlb_flag: Option<u32>,
    #[prost(uint32, optional, tag = "9")]
    pub mode: Option<u32>,
}


const IMAGE: &str = "memfd.img";
/// What an object of mmap(2) without a file is called.
const ANONYMOUS: &[u8] = b"/dev/zero";
const MEMFD_PREFIX: &[u8] = b"/memfd:";

#[derive(Debug, Default)]
struct Dumped {
    inodes: HashSet<u64>,
    /// Records for mappings, by inode.
    mapped: HashMap<u64, u32>,
}

#[derive(Debug, Default)]
struct Opened {
    inodes: Option<HashMap<u64, MemfdInodeEntry>>,
    made: HashMap<u64, OwnedFd>,
    is_given: HashSet<u64>,
}

/// The name of an object of this kind, from a link in /proc.
pub fn object_name(link: &[u8]) -> Option<&[u8]> {
    let name = link.strip_suffix(b" (deleted)")?;
    match name.strip_prefix(MEMFD_PREFIX) {
        Some(name) => Some(name),
        None => (name == ANONYMOUS || name == hugetlb::NAME).then_some(name),
    }
}

/// Is it a file in memory without a name, or shared anonymous memory?
pub fn is_object(probe: &FdProbe) -> bool {
    probe.format() == libc::S_IFREG && object_name(probe.link()).is_some() && probe.stat.st_nlink == 0
}

/// Records the object behind a shared mapping, once; returns the id of a file for it.
pub fn record(fd: OwnedFd, link: &[u8], stat: &libc::stat, object: Object, cx: &mut DumpCx) -> Result<u32, Failure> {
    if let Some(id) = cx.shelf.of::<Dumped>().mapped.get(&stat.st_ino) {
        return Ok(*id);
    }
    let id = cx.next_id();
    record_inode(&fd, link, stat, object, cx)?;
    let entry = MemfdFileEntry {
        id,
        flags: libc::O_RDWR as u32,
        pos: 0,
        fown: FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 },
        inode_id: stat.st_ino as u32,
    };
    cx.files.push(FileEntry::new(FdTypes::Memfd.into(), id, Memfd::TAG, &entry));
    cx.shelf.of::<Dumped>().mapped.insert(stat.st_ino, id);
    Ok(id)
}

fn record_inode(fd: &OwnedFd, link: &[u8], stat: &libc::stat, object: Object, cx: &mut DumpCx) -> Result<(), Failure> {
    if !cx.shelf.of::<Dumped>().inodes.insert(stat.st_ino) {
        return Ok(());
    }
    let explain = |error: Errno| error.on(object.clone(), "read the memory file");
    let name = object_name(link).unwrap_or(ANONYMOUS);
    // With a position of its own, for looking for its pages moves it.
    let content = reopen(fd, libc::O_RDONLY as u32).map_err(explain)?;
    let shmid = cx.content(u64::from(stat.st_ino as u32), content) as u32;
    let entry = MemfdInodeEntry {
        name: name.to_vec(),
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: stat.st_size as u64,
        shmid,
        seals: sys::fd::fcntl(fd, libc::F_GET_SEALS, 0).map_err(explain)? as u32,
        inode_id: u64::from(stat.st_ino as u32),
        hugetlb_flag: sys::fd::huge_page_of(fd).map(|size| hugetlb::size_bits(size) | libc::MFD_HUGETLB),
        mode: Some(stat.st_mode & 0o7777),
    };
    cx.image("memfd.img", kind::MEMFD).record(&entry);
    Ok(())
}

impl FdKind for Memfd {
    type Entry = MemfdFileEntry;
    const NAME: &'static str = "memfd";
    const TYPE: FdTypes = FdTypes::Memfd;
    const TAG: u32 = 20;

    fn claims(&self, probe: &FdProbe) -> bool {
        is_object(probe) && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<MemfdFileEntry, Failure> {
        record_inode(&probe.fd, probe.link(), &probe.stat, probe.object(), cx)
            .map_err(|failure| failure.of(probe.pid))?;
        let inode_id = probe.stat.st_ino as u32;
        Ok(MemfdFileEntry { id, flags: probe.flags, pos: probe.position, fown: probe.owner()?, inode_id })
    }

    fn link(&self, entries: &[(u32, &MemfdFileEntry)], _files: &FileTable) -> Failures {
        entries
            .iter()
            .filter(|(_, entry)| entry.pos > i64::MAX as u64)
            .map(|(id, entry)| Failure::corrupt("files.img", None, format!("memfd {id} is at {}", entry.pos)))
            .collect()
    }

    fn open(&self, entry: &MemfdFileEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let inode_id = u64::from(entry.inode_id);
        let explain = |error: Errno| error.on(Object::Named(format!("memfd {inode_id}")), "make it");
        if !cx.shelf.of::<Opened>().made.contains_key(&inode_id) {
            let fd = make(inode_id, cx)?;
            cx.shelf.of::<Opened>().made.insert(inode_id, fd);
        }
        let opened = cx.shelf.of::<Opened>();
        // Just put there.
        let made = &opened.made[&inode_id];
        // The first open file is the one the object was made with, as it was in the program.
        let is_first = entry.flags as i32 & libc::O_ACCMODE == libc::O_RDWR && opened.is_given.insert(inode_id);
        let fd = match is_first {
            true => made.try_clone().map_err(|error| explain(sys::memory::io_errno("fcntl", &error)))?,
            false => reopen(made, entry.flags).map_err(explain)?,
        };
        if entry.pos != 0 {
            sys::fd::seek(&fd, entry.pos as i64, libc::SEEK_SET).map_err(explain)?;
        }
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e MemfdFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// The size of the huge pages of an object, if it has some.
fn huge_page(inode: &MemfdInodeEntry) -> Option<u64> {
    inode.hugetlb_flag.filter(|flags| *flags != 0).and_then(|flags| hugetlb::page(flags).ok())
}

/// Every reason why the objects of an image set cannot be made anywhere; notes the sizes of their huge pages.
pub fn judge(images: &Dir, needed: &mut hugetlb::Needed) -> Failures {
    let entries: Vec<MemfdInodeEntry> = match images.read_all(kind::MEMFD, IMAGE) {
        Ok(entries) => entries,
        // There need not be any; a file that misses its object says so.
        Err(_) => return Failures::new(),
    };
    let mut failures = Failures::new();
    for (index, inode) in entries.iter().enumerate() {
        let Some(flags) = inode.hugetlb_flag.filter(|flags| *flags != 0) else { continue };
        match hugetlb::page(flags) {
            Ok(size) if inode.size.is_multiple_of(size) => needed.size(size),
            Ok(size) => {
                let why = format!("has {} bytes, which are no pages of {size}", inode.size);
                failures.push(Failure::corrupt(IMAGE, Some(index), why));
            }
            Err(why) => failures.push(Failure::corrupt(IMAGE, Some(index), why)),
        }
    }
    failures
}

fn make(inode_id: u64, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
    if cx.shelf.of::<Opened>().inodes.is_none() {
        let entries: Vec<MemfdInodeEntry> = cx.images.read_all(kind::MEMFD, "memfd.img")?;
        let inodes = entries.into_iter().map(|entry| (entry.inode_id, entry)).collect();
        cx.shelf.of::<Opened>().inodes = Some(inodes);
    }
    let inodes = cx.shelf.of::<Opened>().inodes.as_ref();
    let Some(inode) = inodes.and_then(|inodes| inodes.get(&inode_id)).cloned() else {
        return Err(Failure::corrupt("memfd.img", None, format!("has no object {inode_id}")));
    };
    let shown = String::from_utf8_lossy(&inode.name).into_owned();
    let object = || Object::Named(format!("memfd {shown}"));
    let explain = |error: Errno| error.on(object(), "make it");
    let huge = huge_page(&inode).map(hugetlb::size_bits);
    let fd = match &*inode.name {
        ANONYMOUS => sys::memory::shared_anonymous(inode.size, 0).map_err(explain)?,
        name if name == hugetlb::NAME => {
            let flags = huge.map_or(0, |bits| bits as i32 | libc::MAP_HUGETLB);
            sys::memory::shared_anonymous(inode.size, flags).map_err(explain)?
        }
        name => {
            let name = CString::new(name)
                .map_err(|_| Failure::corrupt("memfd.img", None, "a name holds a zero byte"))?;
            let fd = sys::memory::sealable_memfd(&name, huge.map_or(0, |bits| bits | libc::MFD_HUGETLB)).map_err(explain)?;
            sys::fd::truncate(&fd, inode.size).map_err(explain)?;
            fd
        }
    };
    (cx.fill)(inode.shmid.into(), &fd)?;
    if let Some(mode) = inode.mode {
        sys::fd::chmod(&fd, mode & 0o7777).map_err(explain)?;
    }
    sys::fd::chown(&fd, inode.uid, inode.gid).map_err(explain)?;
    // Both begin unsealed; the one without a name cannot be sealed further.
    let have = sys::fd::fcntl(&fd, libc::F_GET_SEALS, 0).map_err(explain)? as u32;
    if inode.seals & !have != 0 {
        sys::fd::fcntl(&fd, libc::F_ADD_SEALS, inode.seals as i32).map_err(explain)?;
    }
    Ok(fd)
}
