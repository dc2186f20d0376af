//! Memory of huge pages: mmap(2) MAP_HUGETLB, memfd_create(2) MFD_HUGETLB, shmget(2) SHM_HUGETLB.
//!
//! Read from: the size of the pages, which smaps tells (`KernelPageSize`), or statfs(2) of the mapped file: whatever
//! consists of huge pages is a file of hugetlbfs, also what mmap(2) calls anonymous. The content as all memory.
//! Rebuilt by: the same three calls, with the size of the pages among the flags; private ones are read in by the agent.
//! Copies of processes do not do for private ones: where pages are short, the kernel takes them from a child when the
//! parent writes. So such a tree stands still while it is saved. Nor are their writes noted: they are always saved.
//! Refused: at a restore, pages of a size that the host does not have, or more than it has.

use image::VmaEntry;
use model::{Failure, Failures, Object, Remedy};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use sys::proc::Vma;

/// In the flags of all three calls: where the binary logarithm of the size is. Source: linux/mman.h.
const SHIFT: u32 = 26;
const MASK: u32 = 0x3f;
/// Without a size the host's own is meant, on this architecture nearly always this.
const USUAL: u32 = 21;
const MAP_HUGETLB: u32 = libc::MAP_HUGETLB as u32;

/// What the file behind an anonymous mapping is called.
pub const NAME: &[u8] = b"/anon_hugepage";

/// The bits that ask for pages of `size` bytes.
pub fn size_bits(size: u64) -> u32 {
    size.trailing_zeros() << SHIFT
}

/// The size of the pages that flags ask for.
fn size_of(flags: u32) -> u64 {
    let log = flags >> SHIFT & MASK;
    1 << if log == 0 { USUAL } else { log }
}

/// The size of the pages of an object, from the flags in its record.
///
/// # Errors
/// For a size that no processor has.
pub fn page(flags: u32) -> Result<u64, String> {
    match size_of(flags) {
        size @ 0x1_0000..=0x4_0000_0000 => Ok(size),
        size => Err(format!("has pages of {size} bytes")),
    }
}

/// Is this a mapping of huge pages?
pub fn is_huge(map: &Vma) -> bool {
    map.page_size > sys::memory::PAGE
}

/// Does a process have them for itself? A copy of it does not.
pub fn is_private(map: &Vma) -> bool {
    is_huge(map) && !map.is_shared
}

/// Is it anonymous to its program?
pub fn is_anonymous(name: &[u8]) -> bool {
    name.strip_suffix(b" (deleted)") == Some(NAME)
}

/// The flags of mmap(2) for a mapping.
pub fn flags(map: &Vma) -> u32 {
    if is_huge(map) { MAP_HUGETLB | size_bits(map.page_size) } else { 0 }
}

/// Those in a record.
pub fn kept(entry: &VmaEntry) -> u32 {
    let all = MAP_HUGETLB | MASK << SHIFT;
    if entry.flags & MAP_HUGETLB != 0 { entry.flags & all } else { 0 }
}

/// The size of the huge pages that a record is of.
pub fn of(entry: &VmaEntry) -> Option<u64> {
    (entry.flags & MAP_HUGETLB != 0).then(|| size_of(entry.flags))
}

/// Why a mapping of this record is none.
pub fn check(entry: &VmaEntry) -> Option<String> {
    of(entry)?;
    match page(entry.flags) {
        Ok(size) if (entry.start | entry.end).is_multiple_of(size) => None,
        Ok(size) => Some(format!("is no range of pages of {size} bytes")),
        Err(why) => Some(why),
    }
}

/// Finds the mappings of huge pages where the text does not tell: `maps` alone.
pub fn find(pid: i32, map: &mut Vma) {
    /// The smallest of this architecture.
    const SMALLEST: u64 = 2 << 20;
    let is_candidate = map.inode != 0 && (map.start | map.end).is_multiple_of(SMALLEST);
    if is_candidate && !map.name.starts_with(b"[") {
        let path = PathBuf::from(format!("/proc/{pid}/map_files/{:x}-{:x}", map.start, map.end));
        map.page_size = sys::fd::huge_page(&path).unwrap_or(map.page_size);
    }
}

/// How many pages of each size a restore takes at least. That the host has the size is all that is asked of shared
/// memory: it is made before any process, and may be larger than what is in it.
#[derive(Debug, Default)]
pub struct Needed(BTreeMap<u64, u64>);

impl Needed {
    /// Counts the private mappings of a tree. What relatives have at one place they may share.
    pub fn of<'m>(mappings: impl Iterator<Item = &'m VmaEntry>) -> Needed {
        let is_promised = |entry: &&VmaEntry| {
            entry.status & image::vma::ANON_PRIVATE != 0 && entry.flags & super::MAP_NORESERVE == 0
        };
        let places =
            mappings.filter(is_promised).filter_map(|entry| Some((entry.start, entry.end, of(entry)?)));
        let mut needed = Needed::default();
        for (start, end, size) in places.collect::<BTreeSet<_>>() {
            *needed.0.entry(size).or_default() += (end - start) / size;
        }
        needed
    }

    pub fn size(&mut self, size: u64) {
        self.0.entry(size).or_default();
    }

    /// Every reason why this host cannot give them.
    pub fn judge(&self) -> Failures {
        let short = |(size, count): (&u64, &u64)| {
            let why = match sys::memory::free_huge_pages(*size) {
                Some(free) if free >= *count => return None,
                Some(free) => format!("{count} pages of {} KiB are needed, {free} are free", size >> 10),
                None => format!("this host has no pages of {} KiB", size >> 10),
            };
            let failure = Failure::conflict(Object::Named("huge pages".into()), "map memory of them", why);
            Some(failure.help(Remedy::Advice("vm.nr_hugepages reserves them")))
        };
        self.0.iter().filter_map(short).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_goes_through_flags_and_nonsense_is_told() {
        for size in [64 << 10, 2 << 20, 1 << 30] {
            assert_eq!(page(size_bits(size)), Ok(size));
        }
        assert_eq!(page(0), Ok(2 << 20));
        assert!(page(63 << SHIFT).is_err() && page(1 << SHIFT).is_err());
    }

    #[test]
    fn a_record_has_whole_pages() {
        let flags = MAP_HUGETLB | size_bits(2 << 20);
        let entry = |start, end| VmaEntry { start, end, flags, ..VmaEntry::default() };
        assert_eq!(check(&entry(2 << 20, 6 << 20)), None);
        assert!(check(&entry(2 << 20, (6 << 20) + 4096)).is_some());
        assert!(check(&entry((2 << 20) - 4096, 6 << 20)).is_some());
    }
}
