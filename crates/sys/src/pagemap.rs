//! Which pages of an address space hold something: `PAGEMAP_SCAN`, and `/proc/PID/pagemap` on kernels
//! before 6.7.

use crate::call::last;
use model::Errno;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// In a mapping whose writes are noted.
pub const WATCHED: u64 = 1 << 0;
/// Not protected against writes: written since, or new.
pub const WRITTEN: u64 = 1 << 1;
/// Part of a file or of shared memory, so not copied for this process alone.
pub const FILE: u64 = 1 << 2;
pub const PRESENT: u64 = 1 << 3;
pub const SWAPPED: u64 = 1 << 4;
/// The kernel's one page of zeros.
pub const ZERO: u64 = 1 << 5;
/// Mapped by a huge page.
pub const HUGE: u64 = 1 << 6;
/// A guard marker (MADV_GUARD_INSTALL), Linux 6.15.
pub const GUARD: u64 = 1 << 8;

/// A page matches when `(categories ^ inverted)` has all bits of `all` and, unless it is zero, one of `any`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Query {
    pub inverted: u64,
    pub all: u64,
    pub any: u64,
    /// The categories that tell one returned range from the next.
    pub report: u64,
}

#[repr(C)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Scan>() == 96 && size_of::<Region>() == 24);

/// _IOWR('f', 16, struct pm_scan_arg)
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;

/// For `Scan::flags`, PM_SCAN_WP_MATCHING.
const PROTECT: u64 = 1 << 0;

/// One call: fills `regions` with matching runs of at most `most` pages, zero for any number. Returns how many there
/// are, and how far the kernel came.
fn scan_some(
    pagemap: &File,
    range: Range<u64>,
    flags: u64,
    query: Query,
    most: u64,
    regions: &mut [Region],
) -> Result<(usize, u64), Errno> {
    let mut arg = Scan {
        size: size_of::<Scan>() as u64,
        flags,
        start: range.start,
        end: range.end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: most,
        category_inverted: query.inverted,
        category_mask: query.all,
        category_anyof_mask: query.any,
        return_mask: query.report,
    };
    // SAFETY: the kernel reads and writes `arg` and writes at most `vec_len` regions, borrowed for the call.
    match unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) } {
        count if count < 0 => Err(last("ioctl(PAGEMAP_SCAN)")),
        count => Ok((count as usize, arg.walk_end)),
    }
}

/// Is there a page in `range` that matches? Stops at the first.
///
/// # Errors
/// As [`scan`].
pub fn has(pagemap: &File, range: Range<u64>, query: Query) -> Result<bool, Errno> {
    let mut region = [Region::default()];
    Ok(scan_some(pagemap, range, 0, query, 1, &mut region)?.0 > 0)
}

/// Calls `found` with each run of pages in `range` that match, and their categories.
///
/// # Errors
/// `ENOTTY` before Linux 6.7; `EINVAL` for a category that the kernel does not know.
///
/// Source: Documentation/admin-guide/mm/pagemap.rst; fs/proc/task_mmu.c.
pub fn scan(
    pagemap: &File,
    range: Range<u64>,
    query: Query,
    found: impl FnMut(Range<u64>, u64),
) -> Result<(), Errno> {
    walk(pagemap, range, 0, query, found)
}

/// The same, and protects what matches and was written, in one step: in mappings that
/// [`crate::userfault::Userfault::watch`] was told of, and others are passed over. Pages that `query` leaves out get no mark,
/// which takes page tables, as long as there is room for what is found.
///
/// # Errors
/// As [`scan`].
pub fn protect(
    pagemap: &File,
    range: Range<u64>,
    query: Query,
    found: impl FnMut(Range<u64>, u64),
) -> Result<(), Errno> {
    walk(pagemap, range, PROTECT, query, found)
}

fn walk(
    pagemap: &File,
    range: Range<u64>,
    flags: u64,
    query: Query,
    mut found: impl FnMut(Range<u64>, u64),
) -> Result<(), Errno> {
    let mut regions = [Region::default(); 512];
    let mut start = range.start;
    while start < range.end {
        let (count, walked) = scan_some(pagemap, start..range.end, flags, query, 0, &mut regions)?;
        for region in &regions[..count] {
            found(region.start..region.end, region.categories);
        }
        // A scan that was not cut short by the vector is complete, whatever walk_end says.
        if count < regions.len() {
            return Ok(());
        }
        start = walked.max(regions[count - 1].end);
    }
    Ok(())
}

/// [`scan`] for kernels without it: reads eight bytes for each page.
///
/// Knows PRESENT, SWAPPED, FILE; the page of zeros looks like any other.
pub fn read(pagemap: &File, range: Range<u64>, mut found: impl FnMut(Range<u64>, u64)) -> Result<(), Errno> {
    let mut words = vec![0u8; 1 << 16];
    let mut at = range.start;
    let mut run: Option<(Range<u64>, u64)> = None;
    while at < range.end {
        let want = (((range.end - at) / 4096 * 8) as usize).min(words.len());
        let got = pagemap
            .read_at(&mut words[..want], at / 4096 * 8)
            .map_err(|error| crate::memory::io_errno("read(pagemap)", &error))?;
        if got < 8 {
            break;
        }
        for word in words[..got].chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap());
            let bit = |n: u32, category| if word >> n & 1 != 0 { category } else { 0 };
            let categories = bit(63, PRESENT) | bit(62, SWAPPED) | bit(61, FILE);
            match &mut run {
                Some((run, same)) if *same == categories && run.end == at => run.end += 4096,
                _ => {
                    if let Some((run, categories)) = run.take() {
                        found(run, categories);
                    }
                    if categories != 0 {
                        run = Some((at..at + 4096, categories));
                    }
                }
            }
            at += 4096;
        }
    }
    if let Some((run, categories)) = run {
        found(run, categories);
    }
    Ok(())
}

/// The frame of each page from `start` on, as many as `frames` has room for; `None` where there is none, where
/// the process alone has it, or where it may not be told (without CAP_SYS_ADMIN).
///
/// Source: Documentation/admin-guide/mm/pagemap.rst.
pub fn shared_frames(pagemap: &File, start: u64, frames: &mut [Option<u64>]) -> Result<(), Errno> {
    let words = words(pagemap, start, frames.len())?;
    for (frame, word) in frames.iter_mut().zip(words) {
        let (is_alone, is_file) = (word >> 56 & 1, word >> 61 & 1);
        *frame = frame_in(word).filter(|_| is_alone == 0 && is_file == 0);
    }
    Ok(())
}

fn words(pagemap: &File, start: u64, count: usize) -> Result<impl Iterator<Item = u64>, Errno> {
    let mut words = vec![[0u8; 8]; count];
    pagemap
        .read_exact_at(words.as_flattened_mut(), start / 4096 * 8)
        .map_err(|error| crate::memory::io_errno("read(pagemap)", &error))?;
    Ok(words.into_iter().map(u64::from_le_bytes))
}

fn frame_in(word: u64) -> Option<u64> {
    let number = word & ((1 << 55) - 1);
    (word >> 63 == 1 && number != 0).then_some(number)
}

/// The frame of a page of this process; none where it is not there, or may not be told (without CAP_SYS_ADMIN).
pub fn own_frame(address: u64) -> Option<u64> {
    frame_in(words(&File::open("/proc/self/pagemap").ok()?, address, 1).ok()?.next()?)
}

/// Where in one of these ranges a process has these frames, one behind the other.
pub fn find_frames(pid: i32, ranges: impl IntoIterator<Item = Range<u64>>, wanted: &[u64]) -> Option<u64> {
    const SOME: u64 = 1 << 14;
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).ok()?;
    let (first, len) = (wanted.first()?, wanted.len() as u64 * 4096);
    let are_there = |at: u64| {
        let words = words(&pagemap, at, wanted.len());
        words.is_ok_and(|words| words.map(frame_in).eq(wanted.iter().copied().map(Some)))
    };
    for range in ranges {
        for start in range.clone().step_by((SOME * 4096) as usize) {
            let some = ((range.end - start) / 4096).min(SOME) as usize;
            // What cannot be read has no pages.
            let Ok(words) = words(&pagemap, start, some) else { continue };
            let mut places =
                (start..).step_by(4096).zip(words).filter(|(_, word)| frame_in(*word) == Some(*first));
            if let Some((at, _)) = places.find(|(at, _)| at + len <= range.end && are_there(*at)) {
                return Some(at);
            }
        }
    }
    None
}
