//! `pagemap-*.img`: which pages are in which part of the pages file.

use crate::records::{PagemapEntry, PagemapHead};
use crate::{Reader, Writer, kind};
use model::{Failure, Remedy};
use std::ops::Range;

/// The data are in the snapshot before this one.
pub const PARENT: u32 = 1 << 0;
/// May be restored when it is first touched.
pub const LAZY: u32 = 1 << 1;
/// The data are in this pages file.
pub const PRESENT: u32 = 1 << 2;

/// Bytes of a page, here and in every image of this architecture.
pub const PAGE: u64 = 4096;

/// A pages file: of which folder of a chain, the newest being 0, and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct PagesFile {
    pub layer: u32,
    pub id: u32,
}

/// A run of pages and where its content is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Address of the first byte and of the byte after the last.
    pub range: Range<u64>,
    pub flags: u32,
    /// Offset of the content in the pages file, where `PRESENT`; where the pages are [away](Run::is_away), the address in
    /// the process that has them.
    pub offset: u64,
    pub file: PagesFile,
    /// The process that has the same pages at the same address; its page map says where they are.
    pub same_as: Option<u32>,
}

impl Run {
    /// Pages that are in the folder before.
    pub fn in_parent(range: Range<u64>) -> Run {
        Run { range, flags: PARENT, offset: 0, file: PagesFile::default(), same_as: None }
    }

    /// Pages that are stored with another process. To readers that know nothing of that they are missing.
    pub fn same_as(range: Range<u64>, pid: u32) -> Run {
        Run { same_as: Some(pid), ..Run::in_parent(range) }
    }

    /// Pages that stay with the dump, which hands them out when they are asked for.
    pub fn away(range: Range<u64>) -> Run {
        let offset = range.start;
        Run { range, flags: LAZY, offset, file: PagesFile::default(), same_as: None }
    }

    /// Is the content in no folder, but with the dump?
    pub fn is_away(&self) -> bool {
        self.flags & (PRESENT | PARENT) == 0
    }

    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

/// The page map of one address space or one shared object: sorted, without overlap.
#[derive(Debug, Clone, Default)]
pub struct Pagemap {
    pub pages_id: u32,
    pub runs: Vec<Run>,
    /// A CRIU before 4.2 wrote it: one that speaks with short headers.
    pub is_old: bool,
}

/// Bytes of a record with an address of a program, its length in front.
const LEAST: usize = 16;

/// Reads a record that holds only what records do today: of the many that there are, in a third of the time. None for any
/// other.
#[inline]
fn decode(mut body: &[u8]) -> Option<PagemapEntry> {
    #[inline(always)]
    fn number(body: &mut &[u8]) -> Option<u64> {
        // Most are one byte long.
        if let [byte @ ..0x80, rest @ ..] = *body {
            *body = rest;
            return Some((*byte).into());
        }
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let (byte, rest) = body.split_first()?;
            *body = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    let mut entry = PagemapEntry::default();
    let (mut has_address, mut has_count) = (false, false);
    while !body.is_empty() {
        // Numbers of fields, all varints.
        let field = number(&mut body)?;
        let value = number(&mut body)?;
        match field {
            0x08 => (entry.vaddr, has_address) = (value, true),
            0x10 => (entry.compat_nr_pages, has_count) = (value.try_into().ok()?, true),
            0x20 => entry.flags = Some(value.try_into().ok()?),
            0x28 => entry.nr_pages = Some(value),
            _ => return None,
        }
    }
    (has_address && has_count).then_some(entry)
}

impl Pagemap {
    /// Reads and checks a page map; `pages_len` is the length of its pages file in bytes.
    ///
    /// # Errors
    /// `Corrupt` for runs that overlap, wrap, are unaligned, or lie beyond the pages file; `Unsupported` for fields and
    /// flags that are not known here.
    pub fn parse(
        name: &str,
        bytes: &[u8],
        pages_len: impl FnOnce(u32) -> Result<u64, Failure>,
    ) -> Result<Pagemap, Failure> {
        let mut reader = Reader::open(kind::PAGEMAP, name, bytes)?;
        // Pages that are stored in a way that is not known must not be taken for plain ones.
        let advice = Remedy::Advice("CRIU's own compression is not read; its crit can decompress the images");
        let head = reader.whole::<PagemapHead>().map_err(|failure| failure.help(advice))?;
        let head = head.ok_or_else(|| reader.corrupt("has no record where one is needed".into()))?;
        let mut map = Pagemap { pages_id: head.pages_id, ..Pagemap::default() };
        let (mut last, mut offset) = (0, 0u64);
        map.runs.reserve(bytes.len() / LEAST);
        loop {
            let entry = match reader.short(decode) {
                Some(entry) => entry,
                None => match reader.whole().map_err(|failure| failure.help(advice))? {
                    Some(entry) => entry,
                    None => break,
                },
            };
            let flags = entry.flags.unwrap_or(if entry.in_parent == Some(true) { PARENT } else { PRESENT });
            let unknown = flags & !(PARENT | LAZY | PRESENT);
            if unknown != 0 {
                let what = format!("the flags {unknown:#x}, which are not known here");
                return Err(reader.unknown(map.runs.len() + 1, &what).help(advice));
            }
            map.is_old |= entry.nr_pages.is_none();
            let count = entry.nr_pages.unwrap_or(u64::from(entry.compat_nr_pages));
            let end = count.checked_mul(PAGE).and_then(|length| entry.vaddr.checked_add(length));
            let Some(end) = end.filter(|_| entry.vaddr % PAGE == 0 && entry.vaddr >= last) else {
                return Err(
                    reader.corrupt(format!("{count} pages at {:#x} are no run in order", entry.vaddr))
                );
            };
            let file = PagesFile { layer: 0, id: map.pages_id };
            let same_as = entry.same_as.filter(|_| flags & PRESENT == 0);
            let mut run = Run { range: entry.vaddr..end, flags, offset, file, same_as };
            if run.is_away() {
                run.offset = run.range.start;
            }
            last = end;
            if flags & PRESENT != 0 {
                // No overflow: the sum of runs without overlap is below 2^64.
                offset += run.len();
            }
            // A dump for CRIU may hold empty runs; they say nothing.
            if !run.is_empty() {
                map.runs.push(run);
            }
        }
        let have = if offset == 0 { 0 } else { pages_len(map.pages_id)? };
        if offset > have {
            return Err(reader
                .corrupt(format!("needs {offset} bytes of pages-{}.img, which has {have}", map.pages_id)));
        }
        Ok(map)
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Writer {
        let mut writer = Writer::new(kind::PAGEMAP);
        writer.record(&PagemapHead { pages_id: self.pages_id });
        for run in &self.runs {
            let pages = run.len() / PAGE;
            writer.record(&PagemapEntry {
                vaddr: run.range.start,
                // Readers older than 4.2 know this field alone.
                compat_nr_pages: u32::try_from(pages).unwrap_or(0),
                in_parent: None,
                flags: Some(run.flags),
                nr_pages: Some(pages),
                same_as: run.same_as,
            });
        }
        writer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(vaddr: u64, pages: u32, flags: u32) -> PagemapEntry {
        PagemapEntry {
            vaddr,
            compat_nr_pages: pages,
            in_parent: None,
            flags: Some(flags),
            nr_pages: None,
            same_as: None,
        }
    }

    fn parse(entries: &[PagemapEntry], length: u64) -> Result<Pagemap, Failure> {
        let mut writer = Writer::new(kind::PAGEMAP);
        writer.record(&PagemapHead { pages_id: 3 });
        for entry in entries {
            writer.record(entry);
        }
        Pagemap::parse("pagemap-1.img", writer.bytes(), |_| Ok(length))
    }

    #[test]
    fn offsets_count_present_runs_only() {
        let map =
            parse(&[entry(0x1000, 2, PRESENT), entry(0x4000, 1, PARENT), entry(0x5000, 1, PRESENT)], 0x3000)
                .unwrap();
        assert_eq!(
            map.runs[2],
            Run {
                range: 0x5000..0x6000,
                flags: PRESENT,
                offset: 0x2000,
                file: PagesFile { layer: 0, id: 3 },
                same_as: None,
            }
        );
        assert_eq!(Pagemap::parse("x", map.encode().bytes(), |_| Ok(0x3000)).unwrap().runs, map.runs);
    }

    #[test]
    fn the_short_way_reads_what_the_long_one_does() {
        use prost::Message;
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) >> (state % 31)
        };
        let (mut short, mut long) = (0, 0);
        for _ in 0..20_000 {
            let entry = PagemapEntry {
                vaddr: random() << (random() % 33),
                compat_nr_pages: random() as u32,
                in_parent: (random() % 8 == 0).then_some(true),
                flags: (random() % 2 == 0).then(|| random() as u32),
                nr_pages: (random() % 2 == 0).then(|| random() << 20),
                same_as: (random() % 8 == 0).then_some(5),
            };
            let mut bytes = entry.encode_to_vec();
            // Some are broken.
            if random() % 4 == 0 && !bytes.is_empty() {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            match decode(&bytes) {
                Some(read) => {
                    short += 1;
                    assert_eq!(Ok(read), PagemapEntry::decode(&*bytes), "{bytes:x?}");
                }
                None => long += 1,
            }
        }
        assert!(short > 5000 && long > 1000);
    }

    #[test]
    fn runs_that_overlap_wrap_or_reach_beyond_the_file_are_corrupt() {
        assert!(parse(&[entry(0x1000, 2, PRESENT), entry(0x2000, 1, PRESENT)], 1 << 20).is_err());
        assert!(parse(&[entry(0xffff_ffff_ffff_f000, 2, PRESENT)], 1 << 20).is_err());
        assert!(parse(&[entry(0x1001, 1, PRESENT)], 1 << 20).is_err());
        assert!(parse(&[entry(0x1000, 2, PRESENT)], 0x1000).is_err());
    }

    #[test]
    fn flags_and_fields_that_are_not_known_are_refused() {
        /// As CRIU with compression of its own may write it.
        #[derive(Clone, PartialEq, prost::Message)]
        struct Newer {
            #[prost(uint64, required, tag = "1")]
            vaddr: u64,
            #[prost(uint32, required, tag = "2")]
            compat_nr_pages: u32,
            #[prost(uint32, optional, tag = "4")]
            flags: Option<u32>,
            #[prost(uint64, optional, tag = "5")]
            nr_pages: Option<u64>,
            #[prost(message, optional, tag = "6")]
            blocks: Option<PagemapHead>,
        }
        let parse_newer = |blocks| {
            let mut writer = Writer::new(kind::PAGEMAP);
            writer.record(&PagemapHead { pages_id: 3 });
            let (flags, nr_pages) = (Some(PRESENT), Some(1));
            writer.record(&Newer { vaddr: 0x1000, compat_nr_pages: 0, flags, nr_pages, blocks });
            Pagemap::parse("pagemap-1.img", writer.bytes(), |_| Ok(4096))
        };
        assert_eq!(parse_newer(None).unwrap().runs.len(), 1);
        let said = parse_newer(Some(PagemapHead { pages_id: 100 })).unwrap_err().to_string();
        assert!(said.contains("pagemap-1.img") && said.contains("fields that are not known"), "{said}");
        let said = parse(&[entry(0x1000, 1, PRESENT | 8)], 4096).unwrap_err().to_string();
        assert!(said.contains("the flags 0x8"), "{said}");
        let mut longer = Writer::new(kind::PAGEMAP);
        longer.record(&crate::records::FsEntry { cwd_id: 3, root_id: 1, umask: None });
        assert!(Pagemap::parse("x", longer.bytes(), |_| Ok(0)).is_err());
    }
}
