//! SysV shared memory that processes of the tree have attached: shmat(2).
//!
//! Read from: the mappings, whose inode is the segment's id; shmctl(2) IPC_STAT; the content through `map_files`.
//! Rebuilt by: shmget(2) with the id that `kernel.shm_next_id` asks for, by a thread with the ids of its creator;
//! shmat(2) of the whole in each process, whereupon pieces that were unmapped are unmapped again.
//! Refused: segments that somebody outside of the tree has attached; an attachment with another mapping in a piece
//! that was unmapped. At a restore: an id or key that another segment has.
//! Not kept: the times of a segment, and who used it last.
//!
//! A segment goes with the tree as its memory does: a dump that ends the tree removes it. One that is still there at a
//! restore, the same and attached by nobody, is used: a snapshot's tree may have ended in another way.

use super::hugetlb;
use crate::contract::{DumpCx, TaskOps};
use crate::task::numa;
use agent::Judge;
use image::vma as status;
use image::{VmaEntry, kind};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::path::Path;
use sys::proc::Vma;
use sys::shm::{self, Attached, Segment};

const PAGE: u64 = 4096;
/// Larger than any: no id, offset or address is beyond. Source: include/linux/shm.h SHMMAX.
const SIZE_MAX: u64 = 1 << 46;

/// `ipcns-shm-*.img`, with the key that a removed segment had.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcShmEntry {
    #[prost(message, required, tag = "1")]
    pub desc: IpcDescEntry,
    #[prost(uint64, required, tag = "2")]
    pub size: u64,
    #[prost(bool, optional, tag = "3")]
    pub in_pagemaps: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub hugetlb_flag: Option<u32>,
    /// Ours: the number of its content, where it is not the id.
    #[prost(uint64, optional, tag = "1000")]
    pub content: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct IpcDescEntry {
    #[prost(uint32, required, tag = "1")]
    pub key: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint32, required, tag = "4")]
    pub cuid: u32,
    #[prost(uint32, required, tag = "5")]
    pub cgid: u32,
    #[prost(uint32, required, tag = "6")]
    pub mode: u32,
    #[prost(uint32, required, tag = "7")]
    pub id: u32,
}

pub fn is_segment(name: &[u8]) -> bool {
    name.starts_with(b"/SYSV")
}

/// Of a mapping's record.
pub fn is_attached(entry: &VmaEntry) -> bool {
    entry.status & status::SYSV != 0
}

/// The name of the image. Segments belong to the namespace that tasks have with this number.
pub fn image(namespace: u32) -> String {
    format!("ipcns-shm-{namespace}.img")
}

fn object(id: i32, key: i32) -> Object {
    Object::Named(format!("SysV shared memory {id} (key {key:#x})"))
}

/// A segment of the tree.
struct Seen {
    segment: Segment,
    pid: i32,
    /// The key that it was made with, which those that are removed still show.
    first_key: i32,
    pieces: u64,
    content: Option<u64>,
    /// As in [`IpcShmEntry`].
    huge: Option<u32>,
}

/// By id.
#[derive(Default)]
struct Dumped(BTreeMap<i32, Seen>);

/// Notes the segment behind a mapping of a tree that has no copies yet: those would have it attached too.
pub fn note(pid: i32, vma: &Vma, cx: &mut DumpCx) -> Result<(), Failure> {
    let id = vma.inode as i32;
    if let Some(seen) = cx.shelf.of::<Dumped>().0.get_mut(&id) {
        seen.pieces += 1;
        return Ok(());
    }
    let explain = |error: Errno| error.on(super::object(vma), "look at the segment").of(pid);
    let segment = shm::stat(id).map_err(explain)?;
    let digits = vma.name.get(b"/SYSV".len()..b"/SYSV".len() + 8).unwrap_or_default();
    let key = std::str::from_utf8(digits).ok().and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let first_key = key.unwrap_or(0) as i32;
    cx.shelf
        .of::<Dumped>()
        .0
        .insert(id, Seen { segment, pid, first_key, pieces: 1, content: None, huge: None });
    Ok(())
}

/// Who else has the segments attached, when all mappings were noted.
pub fn settle(cx: &mut DumpCx) -> Failures {
    let mut failures = Failures::new();
    for (id, seen) in &cx.shelf.of::<Dumped>().0 {
        if seen.segment.attached <= seen.pieces {
            continue;
        }
        let is_other = |(pid, _): &(i32, String)| !cx.pids.contains(pid);
        let others = shm::holders(*id).into_iter().filter(is_other);
        let others: Vec<String> = others.map(|(pid, name)| format!("process {pid} ({name})")).collect();
        let by = if others.is_empty() { "somebody".into() } else { others.join(", ") };
        let why = format!("is also attached by {by} outside of the tree");
        failures.push(Failure::unsupported(object(*id, seen.segment.key), why).of(seen.pid));
    }
    failures
}

/// Notes the content of the segment behind a mapping.
pub fn dump(pid: i32, vma: &Vma, cx: &mut DumpCx) -> Result<(), Failure> {
    let id = vma.inode as i32;
    if cx.shelf.of::<Dumped>().0.get(&id).is_none_or(|seen| seen.content.is_some()) {
        return Ok(());
    }
    let explain = |error: Errno| error.on(super::object(vma), "look at the segment");
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let file = sys::fd::open(Path::new(&path), libc::O_RDONLY).map_err(explain)?;
    let huge = sys::fd::huge_page_of(&file).map(|size| hugetlb::size_bits(size) | shm::HUGE);
    let content = cx.content(id as u64, file);
    if let Some(seen) = cx.shelf.of::<Dumped>().0.get_mut(&id) {
        (seen.content, seen.huge) = (Some(content), huge);
    }
    Ok(())
}

/// Records the segments.
pub fn write(namespace: u32, cx: &mut DumpCx) {
    let mut records = Vec::new();
    for (id, seen) in &cx.shelf.of::<Dumped>().0 {
        let Segment { key, uid, gid, creator_uid, creator_gid, mode, size, .. } = seen.segment;
        let key = if mode & shm::DEST != 0 { seen.first_key } else { key };
        let desc = IpcDescEntry {
            key: key as u32,
            uid,
            gid,
            cuid: creator_uid,
            cgid: creator_gid,
            mode,
            id: *id as u32,
        };
        let content = seen.content.filter(|content| *content != *id as u64);
        records.push(IpcShmEntry { desc, size, in_pagemaps: Some(true), hugetlb_flag: seen.huge, content });
    }
    for record in &records {
        cx.image(image(namespace), kind::IPCNS_SHM).record(record);
    }
}

/// Why a restore could not make the attachments of a process that was seen.
pub fn check_own(vmas: &[VmaEntry], cx: &mut DumpCx) -> Option<String> {
    let seen = &cx.shelf.of::<Dumped>().0;
    check_places(vmas, &|id| seen.get(&id).map(|seen| whole(seen.segment.size, seen.huge)))
}

/// The ids of the segments of a tree.
pub fn ids(cx: &mut DumpCx) -> Vec<i32> {
    cx.shelf.of::<Dumped>().0.keys().copied().collect()
}

/// Removes the segments of a tree that is gone.
pub fn remove(ids: &[i32]) {
    for id in ids {
        // Those that were removed before went with their last mapping.
        match shm::stat(*id) {
            Ok(segment) if segment.attached == 0 => {
                if let Err(error) = shm::remove(*id) {
                    log::warn!("SysV shared memory {id} stays: {error}");
                }
            }
            Ok(_) => log::warn!("SysV shared memory {id} stays: somebody has attached it meanwhile"),
            Err(_) => {}
        }
    }
}

/// One shmat(2) of a process, with what is left of it.
struct Attachment<'t> {
    id: i32,
    base: u64,
    pieces: Vec<&'t VmaEntry>,
}

impl Attachment<'_> {
    /// Was it attached for reading alone?
    fn is_read_only(&self) -> bool {
        let mode = |entry: &&VmaEntry| entry.fdflags.unwrap_or(libc::O_RDWR as u32) & libc::O_ACCMODE as u32;
        self.pieces.iter().all(|entry| mode(entry) == libc::O_RDONLY as u32)
    }
}

fn attachments(vmas: &[VmaEntry]) -> Vec<Attachment<'_>> {
    let mut all: BTreeMap<(u64, u64), Attachment> = BTreeMap::new();
    for entry in vmas.iter().filter(|entry| is_attached(entry)) {
        let base = entry.start.wrapping_sub(entry.pgoff);
        let new = || Attachment { id: entry.shmid as i32, base, pieces: Vec::new() };
        all.entry((base, entry.shmid)).or_insert_with(new).pieces.push(entry);
    }
    all.into_values().collect()
}

/// The segments of an image set, by id.
pub type Segments = HashMap<i32, IpcShmEntry>;

fn len(segment: &IpcShmEntry) -> u64 {
    whole(segment.size, segment.hugetlb_flag)
}

/// Bytes of all pages of a segment.
fn whole(size: u64, huge: Option<u32>) -> u64 {
    size.next_multiple_of(page(huge).unwrap_or(PAGE))
}

/// The size of the huge pages that a segment has, if it has some.
fn page(huge: Option<u32>) -> Option<u64> {
    huge.filter(|flags| *flags != 0).and_then(|flags| hugetlb::page(flags).ok())
}

/// Notes the sizes of their huge pages.
pub fn huge_pages(segments: &Segments, needed: &mut hugetlb::Needed) {
    for segment in segments.values() {
        if let Some(size) = page(segment.hugetlb_flag) {
            needed.size(size);
        }
    }
}

/// What a process needs of its address space while its attachments are made.
pub fn ranges<'t>(
    vmas: &'t [VmaEntry],
    segments: &'t Segments,
) -> impl Iterator<Item = std::ops::Range<u64>> + 't {
    let range = |one: Attachment| segments.get(&one.id).map(|segment| one.base..one.base + len(segment));
    attachments(vmas).into_iter().filter_map(range)
}

/// Every reason not to make these segments.
pub fn check(segments: &[IpcShmEntry], image: &str) -> Failures {
    let mut failures = Failures::new();
    let mut seen = std::collections::HashSet::new();
    for (index, segment) in segments.iter().enumerate() {
        let desc = &segment.desc;
        let mut corrupt = |why: &str| failures.push(Failure::corrupt(image, Some(index), why.to_owned()));
        if desc.id > i32::MAX as u32 || !seen.insert(desc.id) {
            corrupt("has an id that is none, or is taken");
        }
        if segment.size == 0 || segment.size > SIZE_MAX {
            corrupt("has a size that no segment has");
        }
        if let Some(Err(why)) = segment.hugetlb_flag.map(hugetlb::page) {
            corrupt(&why);
        }
        if segment.in_pagemaps != Some(true) {
            let why = "is in a form of older images, which is not carried";
            failures.push(Failure::unsupported(object(desc.id as i32, desc.key as i32), why));
        }
    }
    failures
}

/// Why the attachments of a process cannot be made.
pub fn check_task(vmas: &[VmaEntry], segments: &Segments) -> Option<String> {
    check_places(vmas, &|id| segments.get(&id).map(len))
}

fn check_places(vmas: &[VmaEntry], len: &dyn Fn(i32) -> Option<u64>) -> Option<String> {
    for one in attachments(vmas) {
        let place = format!("SysV shared memory {} at {:#x}", one.id, one.base);
        let Some(len) = len(one.id) else {
            return Some(format!("{place} is no segment of the images"));
        };
        let range = match one.base.checked_add(len) {
            Some(end) if one.base % PAGE == 0 && one.base != 0 => one.base..end,
            _ => return Some(format!("{place} is no place for it")),
        };
        let is_own = |entry: &VmaEntry| {
            is_attached(entry)
                && entry.shmid == one.id as u64
                && entry.start.wrapping_sub(entry.pgoff) == one.base
        };
        if one.pieces.iter().any(|entry| entry.start < range.start || entry.end > range.end) {
            return Some(format!("{place} is larger than the segment"));
        }
        let is_mapping = |entry: &&VmaEntry| entry.status & status::GUARD == 0;
        let overlaps = |entry: &&VmaEntry| entry.start < range.end && entry.end > range.start;
        let other = vmas.iter().filter(is_mapping).filter(overlaps).find(|entry| !is_own(entry));
        if let Some(other) = other {
            let what = format!("{:#x}-{:#x}", other.start, other.end);
            return Some(format!(
                "{place} has another mapping {what} where a piece of it was, which is not carried"
            ));
        }
    }
    None
}

/// Attaches what the process did not begin with.
pub fn attach(
    vmas: &[VmaEntry],
    segments: &Segments,
    is_there: &dyn Fn(&VmaEntry) -> bool,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    for one in attachments(vmas).iter().filter(|one| !one.pieces.iter().all(|entry| is_there(entry))) {
        let Some(segment) = segments.get(&one.id) else { continue };
        ops.list.label("attach SysV shared memory");
        let (flags, prot) = match one.is_read_only() {
            true => (libc::SHM_RDONLY | libc::SHM_REMAP, libc::PROT_READ),
            false => (libc::SHM_REMAP, libc::PROT_READ | libc::PROT_WRITE),
        };
        let args = [one.id.into(), one.base.into(), flags.into()];
        ops.list.call(libc::SYS_shmat, &args, Judge::Equal(one.base as i64));
        let mut at = one.base;
        let unmap = |from: u64, to: u64, ops: &mut TaskOps| {
            if from < to {
                ops.list.ok(libc::SYS_munmap, &[from.into(), (to - from).into()]);
            }
        };
        for entry in &one.pieces {
            unmap(at, entry.start, ops);
            at = entry.end;
            numa::restore_mapping(entry, ops)?;
            if entry.prot != prot as u32 {
                let len = entry.end - entry.start;
                ops.list
                    .ok(libc::SYS_mprotect, &[entry.start.into(), len.into(), u64::from(entry.prot).into()]);
            }
        }
        unmap(at, one.base + len(segment), ops);
    }
    Ok(())
}

/// How a segment of the images finds the host.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// Nothing is in the way.
    Free,
    /// It is still there, and nobody's.
    Left,
}

fn look(entry: &IpcShmEntry) -> Result<Found, Failure> {
    let (id, key) = (entry.desc.id as i32, entry.desc.key as i32);
    let is_removed = entry.desc.mode & shm::DEST != 0;
    let refuse = |why: String| Failure::conflict(object(id, key), "make it", why);
    match shm::stat(id) {
        Ok(segment) if segment.attached > 0 => {
            let who: Vec<String> =
                shm::holders(id).into_iter().map(|(pid, name)| format!("process {pid} ({name})")).collect();
            let by = if who.is_empty() { "somebody".into() } else { who.join(", ") };
            let why = format!("a segment with its id is attached by {by}");
            Err(refuse(why).help(Remedy::Advice("restore when the tree that the images are of has ended")))
        }
        Ok(segment) if segment.key == key && segment.size == entry.size && !is_removed => Ok(Found::Left),
        Ok(segment) => {
            let Segment { key, size, uid, .. } = segment;
            Err(refuse(format!(
                "its id is taken by another segment (key {key:#x}, {size} bytes, of user {uid})"
            )))
        }
        Err(_) if key != 0 && !is_removed => match shm::find(key) {
            None => Ok(Found::Free),
            Some(other) => Err(refuse(format!("its key is taken by the segment {other}"))),
        },
        Err(_) => Ok(Found::Free),
    }
}

/// Every reason why the segments cannot be made here, before anything is.
pub fn judge<'s>(segments: impl Iterator<Item = &'s IpcShmEntry>) -> Failures {
    segments.filter_map(|entry| look(entry).err()).collect()
}

/// What a restore has made. Dropped, it goes.
#[must_use]
#[derive(Debug, Default)]
pub struct Made {
    ids: Vec<i32>,
    /// Until the tree has them.
    _attached: Vec<Attached>,
}

impl Made {
    /// The tree has them.
    pub fn keep(mut self) {
        self.ids.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for id in &self.ids {
            let _ = shm::remove(*id);
        }
    }
}

/// Makes the segments, with their content.
///
/// # Errors
/// The first that cannot be made; nothing is left then but what was there before.
pub fn make(
    segments: &Segments,
    fill: &dyn Fn(u64, &OwnedFd) -> Result<(), Failure>,
) -> Result<Made, Failure> {
    let mut made = Made::default();
    // A key is free again when the segment that had it is removed.
    let mut all: Vec<&IpcShmEntry> = segments.values().collect();
    all.sort_unstable_by_key(|entry| (entry.desc.mode & shm::DEST == 0, entry.desc.id));
    for entry in all {
        let desc = &entry.desc;
        let (id, key) = (desc.id as i32, desc.key as i32);
        let explain = |error: Errno| error.on(object(id, key), "make it");
        let is_removed = desc.mode & shm::DEST != 0;
        if look(entry)? == Found::Free {
            let is_taken = is_removed && key != 0 && shm::find(key).is_some();
            let segment = Segment {
                key: if is_taken { libc::IPC_PRIVATE } else { key },
                uid: desc.uid,
                gid: desc.gid,
                creator_uid: desc.cuid,
                creator_gid: desc.cgid,
                mode: desc.mode,
                size: entry.size,
                attached: 0,
                huge: page(entry.hugetlb_flag).map_or(0, |size| hugetlb::size_bits(size) | shm::HUGE),
            };
            let got = shm::create(id, &segment).map_err(explain)?;
            made.ids.push(got);
            if got != id {
                let why =
                    format!("the kernel gives it the id {got}: another segment has its place in the table");
                return Err(Failure::conflict(object(id, key), "make it", why));
            }
        }
        shm::set(id, desc.uid, desc.gid, desc.mode).map_err(explain)?;
        let attached = Attached::new(id).map_err(explain)?;
        let file = attached.file().map_err(explain)?;
        shm::clear(&file, entry.size).map_err(explain)?;
        fill(entry.content.unwrap_or(desc.id.into()), &file)?;
        if desc.mode & shm::LOCKED != 0 {
            shm::lock(id).map_err(explain)?;
        }
        if is_removed {
            shm::remove(id).map_err(explain)?;
            made.ids.retain(|made| *made != id);
        }
        made._attached.push(attached);
    }
    Ok(made)
}
