//! Mappings: what each is, and how it is made again.
//!
//! Read from: `/proc/PID/smaps` (range, protection, flags) and `/proc/PID/map_files` (the file itself).
//! Rebuilt by: mmap(2) at the final address, writable as long as pages are being put in; then mprotect(2),
//! madvise(2), mlock2(2), names and seals.
//! Refused for now: packet rings, device memory, userfaultfd registrations, shadow stacks,
//! protection keys, except that which the kernel gives to memory that may be executed alone.

pub mod aio;
pub mod hugetlb;
pub mod mm;
pub mod sysv;

use crate::contract::{DumpCx, TaskOps};
use crate::fd::ghost::FileAt;
use crate::fd::{memfd, regular, secret, uring};
use agent::{Arg, Judge};
use image::VmaEntry;
use image::vma as status;
use model::{Errno, Failure, Object, Remedy};
use std::collections::HashMap;
use std::path::Path;
use sys::proc::Vma;

const PROT_WRITE: u32 = libc::PROT_WRITE as u32;
const MAP_SHARED: u32 = libc::MAP_SHARED as u32;
const MAP_PRIVATE: u32 = libc::MAP_PRIVATE as u32;
const MAP_ANONYMOUS: u32 = libc::MAP_ANONYMOUS as u32;
const MAP_GROWSDOWN: u32 = libc::MAP_GROWSDOWN as u32;
const MAP_LOCKED: u32 = libc::MAP_LOCKED as u32;
const MAP_NORESERVE: u32 = libc::MAP_NORESERVE as u32;
const MAP_DROPPABLE: u32 = 8;
const MAP_TYPE: u32 = 0xf;

/// Advice that is state of the mapping: the letters of `VmFlags` and the MADV_* number.
const ADVICE: [(&str, i32); 8] = [
    ("rr", libc::MADV_RANDOM),
    ("sr", libc::MADV_SEQUENTIAL),
    ("dc", libc::MADV_DONTFORK),
    ("mg", libc::MADV_MERGEABLE),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
    ("dd", libc::MADV_DONTDUMP),
    ("wf", libc::MADV_WIPEONFORK),
];
const MADV_GUARD_INSTALL: i32 = 102;
const MLOCK_ONFAULT: u64 = 1;
/// Where the memory of processes ends, with page tables of five levels.
const USER_END: u64 = (1 << 56) - 4096;
/// Far more than any kernel's vdso has: it is put together in memory.
const VDSO_MAX: u64 = 1 << 20;
const SYS_MSEAL: i64 = 462;

/// Files already looked at, by how the maps name them and how they are to be opened.
#[derive(Debug, Default)]
struct Files(HashMap<(u64, Vec<u8>, u32), u32>);

pub fn object(vma: &Vma) -> Object {
    let what = if vma.name.is_empty() {
        "anonymous".into()
    } else {
        String::from_utf8_lossy(&vma.name).into_owned()
    };
    Object::Vma { start: vma.start, end: vma.end, what }
}

/// Why a mapping cannot be carried, by its name and flags alone.
fn refusal(vma: &Vma) -> Option<&'static str> {
    let name = &*vma.name;
    let is = |prefix: &str| name.starts_with(prefix.as_bytes());
    let has = |flag| vma.flags.has(flag);
    if has("um") || has("uw") || has("ui") {
        Some("is registered with a userfaultfd, which only its handler could answer for")
    } else if vma.protection_key != 0 && vma.prot != libc::PROT_EXEC as u32 {
        Some("has a protection key (pkey_mprotect), which is not carried yet")
    } else if has("ss") {
        Some("is a shadow stack, which is not carried yet")
    } else if is("anon_inode:") && name != uring::NAME || is("socket:[") {
        Some("is memory of a device or a socket, which is not carried yet")
    } else if is("[uprobes]") {
        Some("belongs to uprobes set from outside")
    } else {
        None
    }
}

/// The record of a mapping, as far as the mapping alone says it: the file behind it is missing.
pub fn describe(vma: &Vma) -> VmaEntry {
    let has = |flag| vma.flags.has(flag);
    let mut entry = VmaEntry {
        start: vma.start,
        end: vma.end,
        pgoff: 0,
        shmid: 0,
        prot: vma.prot,
        flags: hugetlb::flags(vma) | if vma.is_shared { MAP_SHARED } else { MAP_PRIVATE },
        status: status::REGULAR,
        fd: -1,
        madv: None,
        fdflags: None,
        is_sealed: has("sl").then_some(true),
        anon_name: vma.given_name.clone(),
        is_locked_on_fault: has("lf").then_some(true),
        is_io_uring: (*vma.name == *uring::NAME).then_some(true),
        numa_mode: None,
        numa_nodes: None,
    };
    if has("gd") {
        entry.flags |= MAP_GROWSDOWN;
    }
    if has("lo") {
        entry.flags |= MAP_LOCKED;
    }
    if has("nr") {
        entry.flags |= MAP_NORESERVE;
    }
    if has("dp") {
        entry.flags = entry.flags & !MAP_TYPE | MAP_DROPPABLE;
    }
    let advice = ADVICE.iter().filter(|advice| has(advice.0)).fold(0, |bits, advice| bits | 1 << advice.1);
    entry.madv = (advice != 0).then_some(advice);
    let anonymous = |entry: &mut VmaEntry, kind: u32| {
        entry.status |= kind | status::ANON_PRIVATE;
        entry.flags |= MAP_ANONYMOUS;
    };
    match &*vma.name {
        b"[vdso]" => anonymous(&mut entry, status::VDSO),
        b"[vsyscall]" => {
            entry.status = status::VSYSCALL | status::ANON_PRIVATE;
            entry.flags |= MAP_ANONYMOUS;
        }
        name if name.starts_with(b"[vvar") => anonymous(&mut entry, status::VVAR),
        b"[heap]" => anonymous(&mut entry, status::HEAP),
        b"[stack]" => anonymous(&mut entry, status::STACK),
        // Before all others: the first segment has the inode zero.
        name if sysv::is_segment(name) => {
            let flags = if has("mw") { libc::O_RDWR } else { libc::O_RDONLY };
            entry.status |= status::ANON_SHARED | status::SYSV;
            entry.flags |= MAP_ANONYMOUS;
            entry.pgoff = vma.offset;
            entry.shmid = vma.inode;
            entry.fdflags = Some(flags as u32);
        }
        _ if vma.inode == 0 => anonymous(&mut entry, 0),
        name if hugetlb::is_anonymous(name) && !vma.is_shared => anonymous(&mut entry, 0),
        name if aio::is_ring(name) => entry.status |= status::AIO_RING,
        _ => {
            // A shared mapping that may become writable needs a file open for writing.
            let flags = if vma.is_shared && has("mw") { libc::O_RDWR } else { libc::O_RDONLY };
            entry.pgoff = vma.offset;
            entry.fdflags = Some(flags as u32);
            entry.status |= if vma.is_shared { status::FILE_SHARED } else { status::FILE_PRIVATE };
            if memfd::object_name(&vma.name).is_some() {
                entry.status |= status::MEMFD;
            }
        }
    }
    entry
}

/// Completes the record of a mapping. Records of the files behind it go to `cx`.
///
/// # Errors
/// Why the mapping is not carried.
pub fn dump(pid: i32, vma: &Vma, mut entry: VmaEntry, cx: &mut DumpCx) -> Result<VmaEntry, Failure> {
    if let Some(why) = refusal(vma) {
        return Err(Failure::unsupported(object(vma), why).of(pid));
    }
    if sysv::is_attached(&entry) {
        sysv::dump(pid, vma, cx).map_err(|failure| failure.of(pid))?;
    } else if has_file(&entry) {
        dump_file(pid, vma, &mut entry, cx).map_err(|failure| failure.of(pid))?;
    }
    Ok(entry)
}

/// Is there a file behind this mapping?
pub fn has_file(entry: &VmaEntry) -> bool {
    entry.status & (status::FILE_PRIVATE | status::FILE_SHARED) != 0
}

/// Adds a record. The data of the vdso is one, though kernels since 6.13 map it in two pieces: CRIU knows
/// its size as that of the whole.
pub fn push(vmas: &mut Vec<VmaEntry>, entry: VmaEntry) {
    match vmas.last_mut() {
        Some(last) if last.status & entry.status & status::VVAR != 0 && last.end == entry.start => {
            last.end = entry.end;
        }
        _ => vmas.push(entry),
    }
}

fn dump_file(pid: i32, vma: &Vma, entry: &mut VmaEntry, cx: &mut DumpCx) -> Result<(), Failure> {
    let flags = entry.fdflags.unwrap_or(0);
    let is_memory = entry.status & status::MEMFD != 0;
    if entry.is_io_uring == Some(true) {
        let id = uring::by_inode(vma.inode, cx);
        let refuse =
            || Failure::unsupported(object(vma), "is the ring of an io_uring that is not carried, or closed");
        entry.shmid = id.ok_or_else(refuse)?.into();
        return Ok(());
    }
    let explain = |error: Errno| error.on(object(vma), "open the mapped file");
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    if secret::is_object(&vma.name, Path::new(&path)) {
        // The kernel locks it by itself, and a child has it unlocked.
        entry.flags &= !MAP_LOCKED;
        let stat = sys::fd::stat_path(Path::new(&path), true).map_err(explain)?;
        let seen = FileAt { path: &vma.name, stat: &stat, source: Path::new(&path) };
        entry.shmid = secret::map(pid, vma, &seen, cx)?.into();
        return Ok(());
    }
    let key = (vma.inode, vma.name.clone(), flags);
    if let Some(id) = cx.shelf.of::<Files>().0.get(&key) {
        entry.shmid = (*id).into();
        return Ok(());
    }
    let fd = sys::fd::open(Path::new(&path), libc::O_RDONLY).map_err(explain)?;
    let stat = sys::fd::stat(&fd).map_err(explain)?;
    let seen = FileAt { path: &vma.name, stat: &stat, source: Path::new(&path) };
    let id = match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG if is_memory => memfd::record(fd, &vma.name, &stat, object(vma), cx)?,
        libc::S_IFREG => regular::record(&seen, flags, &|| object(vma), cx)?,
        libc::S_IFCHR if &*vma.name == b"/dev/zero" => regular::record(&seen, flags, &|| object(vma), cx)?,
        _ => return Err(Failure::unsupported(object(vma), "is memory of a device, which is not carried")),
    };
    cx.shelf.of::<Files>().0.insert(key, id);
    entry.shmid = id.into();
    Ok(())
}

/// What a record says of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// None of its own: shared with a file, provided by the kernel, or not worth keeping.
    None,
    /// Pages of this process alone.
    Private,
    /// Every page, whatever the kernel says of it.
    Whole,
}

pub fn content(entry: &VmaEntry) -> Content {
    let is = |bit| entry.status & bit != 0;
    if is(status::VDSO | status::AIO_RING) {
        Content::Whole
    } else if is(status::VVAR | status::VSYSCALL | status::GUARD) || entry.flags & MAP_TYPE == MAP_DROPPABLE {
        Content::None
    } else if is(status::ANON_PRIVATE | status::FILE_PRIVATE) {
        Content::Private
    } else {
        Content::None
    }
}

/// May its pages come after the process runs? Locked ones are there at once: who locks them waits for them. Huge pages
/// come whole, or not at all.
pub fn may_come_later(entry: &VmaEntry) -> bool {
    let is_locked = entry.flags & libc::MAP_LOCKED as u32 != 0;
    content(entry) == Content::Private && !has_file(entry) && !is_locked && hugetlb::of(entry).is_none()
}

/// The record of a range of guard markers.
pub fn guard(start: u64, end: u64) -> VmaEntry {
    VmaEntry {
        start,
        end,
        status: status::GUARD,
        flags: MAP_PRIVATE | MAP_ANONYMOUS,
        fd: -1,
        ..VmaEntry::default()
    }
}

/// Is this a mapping that the kernel provides, rather than one to be made?
pub fn is_special(entry: &VmaEntry) -> bool {
    entry.status & (status::VDSO | status::VVAR | status::VSYSCALL | status::GUARD | status::AIO_RING) != 0
}

/// Is this the ring of an io_uring? The kernel takes no wish for its address.
pub fn is_ring(entry: &VmaEntry) -> bool {
    entry.is_io_uring == Some(true) && has_file(entry)
}

/// The id of the file behind a mapping.
pub fn file_id(entry: &VmaEntry) -> Option<u32> {
    has_file(entry).then(|| u32::try_from(entry.shmid).ok()).flatten()
}

/// Every reason not to make a mapping of a record.
pub fn check(entry: &VmaEntry, image: &str, index: usize) -> Option<Failure> {
    let corrupt = |why: &dyn std::fmt::Display| {
        let why = format!("{:#x}-{:#x} {why}", entry.start, entry.end);
        Some(Failure::corrupt(image, Some(index), why))
    };
    if entry.start >= entry.end || !entry.start.is_multiple_of(4096) || !entry.end.is_multiple_of(4096) {
        return corrupt(&"is no range of pages");
    }
    let is = |bits: u32| entry.status & bits != 0;
    if entry.end > USER_END && !is(status::VSYSCALL) {
        return corrupt(&"is no memory of a process");
    }
    if entry.prot & !7 != 0 {
        return corrupt(&format_args!("has the protection {:#x}", entry.prot));
    }
    if let Some(why) = hugetlb::check(entry) {
        return corrupt(&why);
    }
    if is(status::VDSO) && entry.end - entry.start > VDSO_MAX {
        return corrupt(&"is too long for a vdso");
    }
    if is(status::FILE_PRIVATE | status::FILE_SHARED) {
        if !entry.pgoff.is_multiple_of(4096) {
            return corrupt(&format_args!("has the offset {:#x} in its file", entry.pgoff));
        }
        if file_id(entry).is_none() {
            return corrupt(&format_args!("maps file {}, which is none", entry.shmid));
        }
    }
    if is(status::SYSV) && (!is(status::ANON_SHARED) || i32::try_from(entry.shmid).is_err()) {
        return corrupt(&format_args!("attaches segment {}, which is none", entry.shmid));
    }
    if is(status::ANON_SHARED) && !is(status::SYSV) && file_id(entry).is_none() {
        let object =
            Object::Vma { start: entry.start, end: entry.end, what: "shared anonymous memory".into() };
        let why = "its content is in a form of older images, which is not carried";
        return Some(
            Failure::unsupported(object, why).help(Remedy::Advice("dump it again with CRIU 4 or crtools")),
        );
    }
    // Pages put into a mapping that is shared after all would go to the file.
    let is_private = matches!(entry.flags & MAP_TYPE, MAP_PRIVATE | MAP_DROPPABLE);
    if is(status::FILE_PRIVATE | status::ANON_PRIVATE) && (!is_private || is(status::FILE_SHARED)) {
        return corrupt(&"is both private and shared");
    }
    let unknown = entry.status & !status::CARRIED;
    if unknown != 0 {
        let object = Object::Vma { start: entry.start, end: entry.end, what: format!("status {unknown:#x}") };
        return Some(Failure::unsupported(object, "a mapping of this kind is not carried yet"));
    }
    None
}

/// Has to be made writable for pages to be put in?
pub fn is_guarded(entry: &VmaEntry) -> bool {
    entry.prot & PROT_WRITE == 0
}

/// Maps it, at its place, over whatever is there. `file` is the descriptor of its file. An open one is
/// writable until it is finished.
pub fn map(entry: &VmaEntry, file: Option<Arg>, is_open: bool, ops: &mut TaskOps) {
    let kept = MAP_TYPE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_NORESERVE;
    let flags = entry.flags & kept | hugetlb::kept(entry) | libc::MAP_FIXED as u32;
    let prot = if is_open { entry.prot | PROT_WRITE } else { entry.prot };
    let args = [
        entry.start.into(),
        (entry.end - entry.start).into(),
        u64::from(prot).into(),
        u64::from(flags).into(),
        file.unwrap_or(Arg::Value(u64::MAX)),
        entry.pgoff.into(),
    ];
    ops.list.call(libc::SYS_mmap, &args, Judge::Equal(entry.start as i64));
}

/// Is there nothing to a mapping but its protection? Such neighbours can be made together.
pub fn is_plain(entry: &VmaEntry) -> bool {
    entry.flags & !MAP_NORESERVE == MAP_PRIVATE | MAP_ANONYMOUS
        && entry.status & status::ANON_PRIVATE != 0
        && !is_special(entry)
        && !has_file(entry)
        && hugetlb::of(entry).is_none()
}

/// Maps plain neighbours as one, which has the protection that is returned. The kernel is faster to protect parts of a
/// mapping than to make each. Nothing is writable that is not to be: it would count as memory that is promised.
pub fn map_together(entries: &[&VmaEntry], ops: &mut TaskOps) -> u32 {
    let mut counts = [0; 8];
    for entry in entries {
        counts[(entry.prot & 7) as usize] += 1;
    }
    let is_guarded = |prot: &usize| *prot as u32 & PROT_WRITE == 0 && counts[*prot] > 0;
    let guarded = (0..8).filter(is_guarded).max_by_key(|prot| counts[*prot]);
    let prot = guarded.or((0..8).max_by_key(|prot| counts[*prot])).unwrap_or_default() as u32;
    if let [first, .., last] = entries {
        map(&VmaEntry { end: last.end, prot, ..(*first).clone() }, None, false, ops);
    }
    prot
}

/// Makes a mapping writable whose pages are to be changed.
pub fn open(entry: &VmaEntry, ops: &mut TaskOps) {
    protect(entry, entry.prot | PROT_WRITE, ops);
}

/// Gives a mapping a protection.
pub fn protect(entry: &VmaEntry, prot: u32, ops: &mut TaskOps) {
    let len = entry.end - entry.start;
    ops.list.ok(libc::SYS_mprotect, &[entry.start.into(), len.into(), u64::from(prot).into()]);
}

/// Bytes of a transparent huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Did the process ask for transparent huge pages?
pub fn wants_huge_pages(entry: &VmaEntry) -> bool {
    is_plain(entry) && entry.madv.unwrap_or(0) >> libc::MADV_HUGEPAGE & 1 != 0
}

/// Has the kernel put huge pages there from the first touch on.
pub fn prefer_huge_pages(entry: &VmaEntry, ops: &mut TaskOps) {
    let args = [entry.start.into(), (entry.end - entry.start).into(), libc::MADV_HUGEPAGE.into()];
    ops.list.call(libc::SYS_madvise, &args, Judge::OkOr(libc::EINVAL));
}

/// Gives mappings their advice, neighbours with the same at once. Not before the processes are made that it may keep things
/// from, and before pages are locked.
pub fn advise(entries: &[VmaEntry], ops: &mut TaskOps) {
    let is_next = |one: &VmaEntry, next: &VmaEntry| {
        one.end == next.start && one.madv == next.madv && !is_special(one) && !is_special(next)
    };
    for together in entries.chunk_by(is_next) {
        let [first, ..] = together else { continue };
        let (start, len) = (first.start, together.last().map_or(0, |last| last.end - first.start));
        let madv = first.madv.filter(|_| !is_special(first)).unwrap_or(0);
        for (_, advice) in ADVICE.iter().filter(|advice| madv >> advice.1 & 1 != 0) {
            // Some advice needs a kernel configuration (KSM, huge pages) that this host may lack; it is advice.
            let harmless =
                matches!(*advice, libc::MADV_MERGEABLE | libc::MADV_HUGEPAGE | libc::MADV_NOHUGEPAGE);
            let judge = if harmless { Judge::OkOr(libc::EINVAL) } else { Judge::Ok };
            ops.list.call(libc::SYS_madvise, &[start.into(), len.into(), (*advice).into()], judge);
        }
    }
}

/// Gives a mapping its final protection and state, when its pages are there.
pub fn finish(entry: &VmaEntry, is_open: bool, ops: &mut TaskOps) -> Result<(), Failure> {
    let (start, len) = (entry.start, entry.end - entry.start);
    if entry.status & status::GUARD != 0 {
        let args = [start.into(), len.into(), MADV_GUARD_INSTALL.into()];
        ops.list.ok(libc::SYS_madvise, &args);
        return Ok(());
    }
    // As the kernel made it, or not there: see `is_special`.
    if is_special(entry) {
        return Ok(());
    }
    if is_open {
        protect(entry, entry.prot, ops);
    }
    if entry.flags & MAP_LOCKED != 0 {
        let on_fault = if entry.is_locked_on_fault == Some(true) { MLOCK_ONFAULT } else { 0 };
        ops.list.ok(libc::SYS_mlock2, &[start.into(), len.into(), on_fault.into()]);
    }
    if let Some(name) = &entry.anon_name {
        const PR_SET_VMA: i32 = 0x5356_4d41;
        let name = ops.bytes(&[name, &[0][..]].concat())?;
        ops.list.any(
            libc::SYS_prctl,
            &[PR_SET_VMA.into(), crate::task::ZERO, start.into(), len.into(), name.into()],
        );
    }
    Ok(())
}

/// Seals a mapping: nothing can change it any more.
pub fn seal(entry: &VmaEntry, ops: &mut TaskOps) {
    if entry.is_sealed == Some(true) {
        ops.list.ok(SYS_MSEAL, &[entry.start.into(), (entry.end - entry.start).into(), crate::task::ZERO]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with a mapping that smaps tells of like this.
    fn judged(mode: &str, key: u32, flags: &str) -> Option<&'static str> {
        let text = format!("1000-2000 {mode} 00000000 00:00 0 \nProtectionKey: {key:8}\nVmFlags: {flags} \n");
        let mut parser = sys::proc::SmapsParser::default();
        parser.feed(text.as_bytes());
        refusal(&parser.finish().expect("it is understood")[0])
    }

    #[test]
    fn mappings_with_a_protection_of_their_own_are_refused() {
        assert_eq!(judged("rw-p", 0, "rd wr mr mw me ac sd"), None);
        assert!(judged("rw-p", 3, "rd wr mr mw me ac sd").is_some_and(|why| why.contains("pkey_mprotect")));
        assert!(judged("rw-p", 0, "rd wr mr mw me ss sd").is_some_and(|why| why.contains("shadow stack")));
        // The kernel itself gives a key to what can only be executed.
        assert_eq!(judged("--xp", 1, "ex mr mw me"), None);
    }
}
