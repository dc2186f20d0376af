//! memfd_secret(2): memory that is read by those alone who have it open or mapped.
//!
//! Read from: fstat(2), F_GETFL; the content through a mapping of our own where somebody has it open, and by the agent,
//! in a process that has it mapped, where nobody has: nothing else reaches that ([`Reading`]).
//! Rebuilt by: memfd_secret(2), ftruncate(2), the content through a mapping; owner and mode.
//! Refused: without `--secret-memory`, for what nobody else is to read comes to lie in a file; O_PATH descriptors, which
//! only an open of the same file could make, and that cannot be opened again.
//! Ordering: none. It has one open file at most, so that is found by its inode.
//!
//! CRIU refuses such images for a type that it does not know. As a memfd it would restore what others can read.

use super::ghost::FileAt;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use crate::task::{Answers, Ask, ZERO, words};
use agent::Judge;
use image::{FdTypes, FileEntry, FownEntry};
use model::{Errno, Failure, Failures, Object, Remedy, options};
use std::collections::{HashMap, VecDeque};
use std::fs::{File, Permissions};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use sys::memory::{PAGE, SharedMap};
use sys::proc::Vma;

pub static KIND: Secret = Secret;

#[derive(Debug)]
pub struct Secret;

/// The content is in `pagemap-shmem-<content>.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SecretEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint64, required, tag = "4")]
    pub content: u64,
    /// In bytes; it is set once, so zero is a file whose size is not set yet.
    #[prost(uint64, required, tag = "5")]
    pub size: u64,
    #[prost(uint32, required, tag = "6")]
    pub uid: u32,
    #[prost(uint32, required, tag = "7")]
    pub gid: u32,
    #[prost(uint32, required, tag = "8")]
    pub mode: u32,
}

const NAME: &[u8] = b"/secretmem (deleted)";
/// Why no descriptor that only names it is carried.
pub const UNREACHABLE: &str = "names secret memory (memfd_secret), which cannot be opened again";

/// Bytes that are asked for at a time: which of them are there.
const LOOK: u64 = 4 << 20;
/// Bytes that the agent copies at a time.
const COPY: u64 = 256 << 10;

/// Is it secret memory? `link` is what the kernel calls it, `source` leads to it.
pub fn is_object(link: &[u8], source: &Path) -> bool {
    link == NAME && sys::fd::is_secret(source)
}

/// What was recorded, by device and inode.
#[derive(Debug, Default)]
struct Dumped(HashMap<(u64, u64), Known>);

#[derive(Debug)]
struct Known {
    id: u32,
    /// Of what nobody has open: where its content is collected, and the mappings that have it.
    closed: Option<(OwnedFd, Vec<Mapped>)>,
}

/// A part of a file that a process has mapped.
#[derive(Debug)]
struct Mapped {
    pid: i32,
    object: Object,
    range: Range<u64>,
    offset: u64,
    is_readable: bool,
}

/// Notes a file and the place of its content, which is returned.
fn record(
    mut entry: SecretEntry,
    stat: &libc::stat,
    object: &dyn Fn() -> Object,
    cx: &mut DumpCx,
) -> Result<(SecretEntry, OwnedFd), Failure> {
    if !cx.options.secret_memory {
        let why = "is secret memory (memfd_secret), which would lie in the images for others to read";
        return Err(Failure::policy(object(), why, &options::SECRET_MEMORY));
    }
    let explain = |error: Errno| error.on(object(), "keep its content");
    let content = sys::memory::memfd(c"crtools-secret", false).map_err(explain)?;
    let ours = content.try_clone().map_err(|error| explain(sys::memory::io_errno("fcntl", &error)))?;
    entry.content = cx.content(stat.st_ino, content);
    (entry.size, entry.uid, entry.gid) = (stat.st_size as u64, stat.st_uid, stat.st_gid);
    entry.mode = stat.st_mode & 0o7777;
    Ok((entry, ours))
}

/// Records the file behind a mapping, once; returns its id. Mappings of one that nobody has open are to be
/// [read](readings).
///
/// # Errors
/// That it was not asked for.
pub fn map(
    pid: i32,
    vma: &Vma,
    seen: &FileAt,
    cx: &mut DumpCx,
) -> Result<u32, Failure> {
    let object = || crate::vma::object(vma);
    let key = (seen.stat.st_dev, seen.stat.st_ino);
    if !cx.shelf.of::<Dumped>().0.contains_key(&key) {
        let id = cx.next_id();
        let entry = SecretEntry { id, flags: libc::O_RDWR as u32, ..SecretEntry::default() };
        let (entry, content) = record(entry, seen.stat, &object, cx)?;
        cx.files.push(FileEntry::new(FdTypes::Secret.into(), id, Secret::TAG, &entry));
        cx.shelf.of::<Dumped>().0.insert(key, Known { id, closed: Some((content, Vec::new())) });
    }
    let known = cx.shelf.of::<Dumped>().0.get_mut(&key).expect("it was just noted");
    if let Some((_, mapped)) = &mut known.closed {
        // Behind the end of the file there is nothing.
        let size = (seen.stat.st_size as u64).next_multiple_of(PAGE);
        let end = vma.end.min(vma.start.saturating_add(size.saturating_sub(vma.offset)));
        let is_readable = vma.prot & libc::PROT_READ as u32 != 0;
        let (range, offset) = (vma.start..end, vma.offset);
        mapped.push(Mapped { pid, object: object(), range, offset, is_readable });
    }
    Ok(known.id)
}

/// What agents have to read while the tree stands still: the mappings of files that nobody has open, each in the process
/// that is named with it.
///
/// # Errors
/// When the place for the content cannot be reached.
pub fn readings(cx: &mut DumpCx) -> Result<Vec<(i32, Reading)>, Failure> {
    let closed = cx.shelf.of::<Dumped>().0.values_mut().filter_map(|known| known.closed.take());
    let mut readings = Vec::new();
    for (content, mapped) in closed {
        for mapped in mapped {
            let to = content.try_clone().map_err(|error| {
                sys::memory::io_errno("fcntl", &error).on(mapped.object.clone(), "keep its content")
            })?;
            let at = mapped.range.start;
            let (looked, copying) = (None, Vec::new());
            let there = VecDeque::new();
            readings.push((mapped.pid, Reading { mapped, to: to.into(), at, looked, there, copying }));
        }
    }
    Ok(readings)
}

/// Has the agent copy a mapping, piece by piece: it asks which pages are there, mincore(2), and copies them to the memory
/// that it shares with us, process_vm_writev(2) to its own process.
///
/// What the process may not read itself is mapped once more, mremap(2) of length zero, in the place of a part of that
/// memory, which goes with the agent: the mapping itself is left as it is.
#[derive(Debug)]
pub struct Reading {
    mapped: Mapped,
    to: File,
    /// How far it was looked.
    at: u64,
    /// The range that was asked for, and where the answer is.
    looked: Option<(Range<u64>, u64)>,
    /// Found, and not copied yet.
    there: VecDeque<Range<u64>>,
    /// Operations that copy, with their range, and where it goes.
    copying: Vec<(usize, Range<u64>, u64)>,
}

impl Reading {
    const DOING: &str = "read its secret memory";

    /// Adds the next operations; false when there are none any more.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn ask(&mut self, ask: &mut Ask) -> Result<bool, Failure> {
        // First of all, so that it is always in the same place.
        let window = ask.room((COPY + PAGE) as usize)?.next_multiple_of(PAGE);
        let window = window..window + COPY;
        ask.list.label(Self::DOING);
        if self.there.is_empty() {
            return self.look(&window, ask);
        }
        let mut room = COPY;
        while let Some(run) = self.there.pop_front() {
            let (part, rest) = (run.start..run.end.min(run.start + room), run.start + room..run.end);
            if !rest.is_empty() {
                self.there.push_front(rest);
            }
            let len = part.end - part.start;
            let to = ask.room(len as usize)?;
            let from = if self.mapped.is_readable { part.start } else { window.start + part.start % COPY };
            let ranges = ask.put(&words(&[from, len, to, len]))?;
            let (one, pid) = (1.into(), self.mapped.pid.into());
            let args = [pid, ranges.into(), one, (ranges + 16).into(), one, ZERO];
            let nth = ask.list.call(libc::SYS_process_vm_writev, &args, Judge::Equal(len as i64));
            self.copying.push((nth, part, to));
            room -= len;
            if room == 0 {
                break;
            }
        }
        Ok(true)
    }

    fn look(&mut self, window: &Range<u64>, ask: &mut Ask) -> Result<bool, Failure> {
        let Range { start, end } = self.at..self.mapped.range.end;
        if start >= end {
            return Ok(false);
        }
        // What is seen through the window has the same place in it whenever it is copied.
        let most = if self.mapped.is_readable { start + LOOK } else { start / COPY * COPY + COPY };
        let part = start..end.min(most);
        let len = part.end - part.start;
        let mut from = part.start;
        if !self.mapped.is_readable {
            from = window.start + part.start % COPY;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let args = [part.start.into(), ZERO, len.into(), flags.into(), from.into()];
            ask.list.call(libc::SYS_mremap, &args, Judge::Equal(from as i64));
            ask.list.ok(libc::SYS_mprotect, &[from.into(), len.into(), libc::PROT_READ.into()]);
        }
        let answer = ask.room((len / PAGE) as usize)?;
        ask.list.ok(libc::SYS_mincore, &[from.into(), len.into(), answer.into()]);
        self.at = part.end;
        self.looked = Some((part, answer));
        Ok(true)
    }

    /// Takes the answers, those to the last [`Reading::ask`].
    ///
    /// # Errors
    /// When the content cannot be kept.
    pub fn answer(&mut self, answers: Answers) -> Result<(), Failure> {
        if let Some((range, at)) = self.looked.take() {
            let is_there = answers.area.get(at, ((range.end - range.start) / PAGE) as usize);
            self.there.extend(runs(range.start, &is_there));
        }
        for (_, range, from) in self.copying.drain(..) {
            let bytes = answers.area.get(from, (range.end - range.start) as usize);
            let offset = self.mapped.offset + (range.start - self.mapped.range.start);
            self.to.write_all_at(&bytes, offset).map_err(|error| {
                sys::memory::io_errno("pwrite", &error).on(self.mapped.object.clone(), "keep its content")
            })?;
        }
        Ok(())
    }

    /// The same failure, as one of this mapping.
    pub fn failed(&self, error: Errno) -> Failure {
        error.on(self.mapped.object.clone(), Self::DOING).of(self.mapped.pid)
    }
}

/// Ranges of pages from `start` on that are there, as mincore(2) tells it.
fn runs(start: u64, is_there: &[u8]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let pages = (start..).step_by(PAGE as usize).zip(is_there);
    for (page, _) in pages.filter(|(_, is_there)| **is_there & 1 != 0) {
        match runs.last_mut() {
            Some(last) if last.end == page => last.end += PAGE,
            _ => runs.push(page..page + PAGE),
        }
    }
    runs
}

/// Copies what is there of a file that is open here.
fn copy(from: &OwnedFd, size: u64, to: &File) -> Result<(), Errno> {
    let mut buffer = vec![0; COPY as usize];
    for start in (0..size).step_by(LOOK as usize) {
        let len = (size - start).min(LOOK).next_multiple_of(PAGE);
        let map = SharedMap::new(from, start, len as usize)?;
        for run in runs(0, &map.is_there()?) {
            for at in run.clone().step_by(buffer.len()) {
                let part = &mut buffer[..(run.end - at).min(COPY) as usize];
                map.read(at as usize, part);
                to.write_all_at(part, start + at).map_err(|error| sys::memory::io_errno("pwrite", &error))?;
            }
        }
    }
    Ok(())
}

impl FdKind for Secret {
    type Entry = SecretEntry;
    const NAME: &'static str = "secret memory";
    const TYPE: FdTypes = FdTypes::Secret;
    const TAG: u32 = 1001;

    fn claims(&self, probe: &FdProbe) -> bool {
        // The name first: every other file is asked, too.
        let may_be = probe.link() == NAME && probe.format() == libc::S_IFREG && !probe.is_path_only();
        may_be && sys::fd::is_secret(&probe.source())
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<SecretEntry, Failure> {
        let entry = SecretEntry { id, flags: probe.flags, fown: probe.owner()?, ..SecretEntry::default() };
        let recorded = record(entry, &probe.stat, &|| probe.object(), cx);
        let (entry, content) = recorded.map_err(|failure| failure.of(probe.pid))?;
        copy(&probe.fd, entry.size, &content.into())
            .map_err(|error| probe.fail(error, "read its content through a mapping"))?;
        cx.shelf.of::<Dumped>().0.insert(probe.inode(), Known { id, closed: None });
        Ok(entry)
    }

    fn link(&self, entries: &[(u32, &SecretEntry)], _files: &FileTable) -> Failures {
        entries
            .iter()
            .filter(|(_, entry)| entry.size > i64::MAX as u64)
            .map(|(id, entry)| {
                let why = format!("secret memory {id} has {} bytes, which are too many", entry.size);
                Failure::corrupt("files.img", None, why)
            })
            .collect()
    }

    fn open(&self, entry: &SecretEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let object = || Object::Named(format!("secret memory {}", entry.id));
        let explain = |error: Errno| error.on(object(), "make it");
        let fd = sys::memory::secret().map_err(|error| match error.code {
            libc::ENOSYS => explain(error).help(Remedy::Kernel("Linux 5.14, with secretmem.enable=1")),
            _ => explain(error),
        })?;
        if entry.size != 0 {
            sys::fd::truncate(&fd, entry.size).map_err(explain)?;
        }
        (cx.fill)(entry.content, &fd)?;
        let file = File::from(fd);
        file.set_permissions(Permissions::from_mode(entry.mode & 0o7777))
            .map_err(|error| explain(sys::memory::io_errno("fchmod", &error)))?;
        sys::fd::chown(file.as_fd(), entry.uid, entry.gid).map_err(explain)?;
        set_status(&file, entry.flags).map_err(explain)?;
        Ok(file.into())
    }

    fn owner<'e>(&self, entry: &'e SecretEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_there_are_runs() {
        assert_eq!(runs(0x5000, &[0, 1, 0x81, 0, 1]), [0x6000..0x8000, 0x9000..0xa000]);
        assert!(runs(0, &[]).is_empty());
    }
}
