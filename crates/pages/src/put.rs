//! Pages from `pages-*.img` back into memory. Few are read by the agent of their process, straight to where
//! they belong; many are put there by the coordinator, on all processors, as pages that are new and filled
//! in one step: the kernel does not clear them first.

use crate::chain::Chain;
use agent::{Arg, Judge};
use image::pagemap::{PagesFile, Run};
use model::{Errno, Failure, Object};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use sys::memory::View;
use sys::userfault::Userfault;

/// iovecs of one preadv(2): IOV_MAX of the kernel.
const VECTORS: usize = 1024;
/// Bytes of one preadv(2), well below what the kernel reads at once.
const BYTES: u64 = 1 << 30;
/// Bytes of one UFFDIO_COPY.
const COPIED: u64 = 2 << 20;

/// Bytes that a fault in a file maps at once, and that may lie between runs that are copied together.
const AROUND: usize = 64 << 10;

/// Reads `runs`, all of one file, from descriptor `fd` of the agent's process, with few calls: `list` gets the calls, `put`
/// makes bytes readable for the agent and returns their address.
pub fn read_runs(
    runs: &[Run],
    fd: Arg,
    list: &mut agent::List,
    mut put: impl FnMut(&[u8]) -> Result<u64, Failure>,
) -> Result<(), Failure> {
    let mut at = 0;
    while at < runs.len() {
        let first = at;
        let (mut vectors, mut total) = (Vec::new(), 0u64);
        let mut count = 0u64;
        while at < runs.len() && (count as usize) < VECTORS {
            let run = &runs[at];
            let is_next = run.file == runs[first].file && run.offset == runs[first].offset + total;
            if count > 0 && (!is_next || total + run.len() > BYTES) {
                break;
            }
            vectors.extend_from_slice(&run.range.start.to_ne_bytes());
            vectors.extend_from_slice(&run.len().to_ne_bytes());
            total += run.len();
            count += 1;
            at += 1;
        }
        let vectors = put(&vectors)?;
        let args: [Arg; 5] = [fd, vectors.into(), count.into(), runs[first].offset.into(), Arg::Value(0)];
        list.call(libc::SYS_preadv, &args, Judge::Equal(total as i64));
    }
    Ok(())
}

/// Gives a process new pages with the content of `runs` in `pages`, on as many threads as there are
/// processors. All of it is registered with `memory` and has no pages yet. `done` is told of pages.
pub fn copy_runs<'v>(
    memory: &Userfault,
    pages: Contents<'_, 'v>,
    runs: &[Run],
    done: &(dyn Fn(u64) + Sync),
) -> Result<(), Errno> {
    put_runs(&|to, bytes| memory.copy(to, bytes), pages, runs, done)
}

/// The same for memory of `pid` that is writable: the kernel puts pages there as for the process itself, huge ones too.
pub fn write_runs<'v>(
    pid: i32,
    pages: Contents<'_, 'v>,
    runs: &[Run],
    done: &(dyn Fn(u64) + Sync),
) -> Result<(), Errno> {
    put_runs(&|to, bytes| sys::memory::write_remote(pid, to, bytes), pages, runs, done)
}

/// Puts bytes at an address.
type Put<'p> = &'p (dyn Fn(u64, &[u8]) -> Result<(), Errno> + Sync);

/// Where the mapped pages of each file are.
pub type Contents<'c, 'v> = &'c (dyn Fn(PagesFile) -> Option<&'v View> + Sync);

fn put_runs<'v>(
    put: Put,
    pages: Contents<'_, 'v>,
    runs: &[Run],
    done: &(dyn Fn(u64) + Sync),
) -> Result<(), Errno> {
    let mut runs = cut(runs, COPIED);
    // Of a chain of snapshots there are several files, and neighbours in memory lie in this or that.
    runs.sort_unstable_by_key(|run| (run.file, run.offset));
    let chunks = group(&runs);
    let next = AtomicUsize::new(0);
    let copy = |chunk: &[Run]| {
        let (first, last) = (&chunk[0], &chunk[chunk.len() - 1]);
        let from = first.offset as usize..(last.offset + last.len()) as usize;
        const NONE: Errno = Errno { call: "mmap", code: libc::ENODATA };
        let pages = pages(first.file).ok_or(NONE)?;
        pages.populate(from.clone());
        let copied = chunk.iter().try_for_each(|run| {
            let bytes = pages.bytes().get(run.offset as usize..(run.offset + run.len()) as usize);
            put(run.range.start, bytes.ok_or(NONE)?)
        });
        // Mapped pages of the file count as ours, also those around that a fault has brought along.
        pages
            .forget(from.start / AROUND * AROUND..from.end.next_multiple_of(AROUND).min(pages.bytes().len()));
        copied
    };
    let work = || -> Result<(), Errno> {
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            copy(chunk).inspect_err(|_| next.store(chunks.len(), Ordering::Relaxed))?;
            done(chunk.iter().map(Run::len).sum::<u64>() / 4096);
        }
        Ok(())
    };
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(chunks.len());
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let own = work();
        others.into_iter().map(|other| other.join().expect("a worker does not panic")).fold(own, Result::and)
    })
}

/// Runs that lie near one behind the other in the file, as many as make a chunk.
fn group(runs: &[Run]) -> Vec<&[Run]> {
    let mut groups = Vec::new();
    let mut first = 0;
    for at in 1..=runs.len() {
        let ends = runs.get(at).is_none_or(|run| {
            let before = &runs[at - 1];
            let gap = run.offset.checked_sub(before.offset + before.len());
            let is_near = run.file == before.file && gap.is_some_and(|gap| gap <= AROUND as u64);
            !is_near || run.offset + run.len() - runs[first].offset > COPIED
        });
        if ends {
            groups.push(&runs[first..at]);
            first = at;
        }
    }
    groups
}

/// Splits runs so that none is longer than one call reads.
pub fn split(runs: &[Run]) -> Vec<Run> {
    cut(runs, BYTES)
}

fn cut(runs: &[Run], longest: u64) -> Vec<Run> {
    let mut parts = Vec::with_capacity(runs.len());
    for run in runs {
        let mut start = run.range.start;
        while start < run.range.end {
            let end = run.range.end.min(start + longest);
            let offset = run.offset + (start - run.range.start);
            parts.push(Run { range: start..end, offset, ..run.clone() });
            start = end;
        }
    }
    parts
}

/// Puts the content of a memory file into `to`, which is as large as it was and empty.
pub fn fill_file(chain: &Chain, id: u64, to: &OwnedFd) -> Result<(), Failure> {
    let name = format!("pagemap-shmem-{id}.img");
    let map = chain.load(&name)?;
    if map.runs.is_empty() {
        return Ok(());
    }
    let explain = |call, error: std::io::Error| {
        sys::memory::io_errno(call, &error)
            .on(Object::Path(name.clone()), "copy the content of a memory file")
    };
    let mut files: HashMap<PagesFile, File> = HashMap::new();
    for run in &map.runs {
        if let Entry::Vacant(place) = files.entry(run.file) {
            place.insert(chain.open_pages(run.file)?);
        }
    }
    let to = File::from(to.try_clone().map_err(|error| explain("fcntl", error))?);
    let mapped = sys::fd::page_to_map(&to);
    // What is mapped goes on to the end of the last page.
    let size =
        to.metadata().map_err(|error| explain("fstat", error))?.len().next_multiple_of(mapped.unwrap_or(1));
    let mut buffer = vec![0u8; 1 << 20];
    for run in &map.runs {
        let end = run.range.end.min(size);
        let mut at = run.range.start;
        while at < end {
            let length = buffer.len().min((end - at) as usize);
            let offset = run.offset + (at - run.range.start);
            files[&run.file]
                .read_exact_at(&mut buffer[..length], offset)
                .map_err(|error| explain("pread", error))?;
            match mapped {
                None => to.write_all_at(&buffer[..length], at).map_err(|error| explain("pwrite", error))?,
                Some(page) => sys::memory::write_mapped(&to, page, at, &buffer[..length])
                    .map_err(|error| error.on(Object::Path(name.clone()), "fill it through a mapping"))?,
            }
            at += length as u64;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::pagemap::PRESENT;

    #[test]
    fn neighbours_in_the_file_are_copied_together() {
        let run = |start: u64, len: u64, offset: u64| Run {
            range: start..start + len,
            flags: PRESENT,
            offset,
            file: PagesFile::default(),
            same_as: None,
        };
        let runs = [
            run(0, 4096, 0),
            run(0x9000, 8192, 4096),
            run(0x20000, 4096, 0x8000),
            run(0x30000, 4096, 0x40000),
            run(1 << 30, COPIED, 0x41000),
        ];
        let sizes: Vec<usize> = group(&runs).iter().map(|group| group.len()).collect();
        assert_eq!(sizes, [3, 1, 1]);
        assert!(group(&[]).is_empty());
    }

    #[test]
    fn neighbours_in_the_file_are_one_call() {
        let run = |start: u64, offset: u64| Run {
            range: start..start + 4096,
            flags: PRESENT,
            offset,
            file: PagesFile::default(),
            same_as: None,
        };
        let mut list = agent::List::new();
        let runs = [run(0x1000, 0), run(0x9000, 4096), run(0x20000, 0x8000)];
        read_runs(&runs, Arg::Value(9), &mut list, |_| Ok(0)).unwrap();
        assert_eq!(list.len(), 2);
    }
}
