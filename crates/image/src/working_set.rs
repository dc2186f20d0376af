//! `working-set.img`: what a tree touched first after a lazy restore, in that order. Ours, and no restore needs it.

use crate::pagemap::PAGE;
use crate::{Dir, Reader, Writer, kind};
use model::Failure;
use std::ops::Range;

pub const NAME: &str = "working-set.img";
/// Records that are read at most: at 64 KiB each, 16 GiB.
const MANY: usize = 1 << 18;

#[derive(Clone, PartialEq, prost::Message)]
struct WorkingSetEntry {
    #[prost(uint32, required, tag = "1")]
    pid: u32,
    #[prost(uint64, required, tag = "2")]
    vaddr: u64,
    #[prost(uint64, required, tag = "3")]
    pages: u64,
}

/// Memory of one process that came because some of it was touched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Touched {
    pub pid: i32,
    pub range: Range<u64>,
}

/// What was recorded; nothing, where that was not done.
///
/// # Errors
/// `Corrupt`, when it is not what was written.
pub fn read(dir: &Dir) -> Result<Vec<Touched>, Failure> {
    let Some(bytes) = dir.read(NAME)? else { return Ok(Vec::new()) };
    let mut reader = Reader::open(kind::WORKING_SET, NAME, &bytes)?;
    let mut all = Vec::new();
    while let Some(entry) = reader.record::<WorkingSetEntry>()? {
        let end = entry.pages.checked_mul(PAGE).and_then(|length| entry.vaddr.checked_add(length));
        let (Some(end), true) = (end, entry.vaddr.is_multiple_of(PAGE)) else {
            let why = format!("{} pages at {:#x} are no range", entry.pages, entry.vaddr);
            return Err(reader.corrupt(why));
        };
        if all.len() < MANY {
            all.push(Touched { pid: entry.pid as i32, range: entry.vaddr..end });
        }
    }
    Ok(all)
}

/// # Errors
/// When it cannot be written.
pub fn write(dir: &Dir, all: &[Touched]) -> Result<(), Failure> {
    let mut writer = Writer::new(kind::WORKING_SET);
    for Touched { pid, range } in all {
        let pages = (range.end - range.start) / PAGE;
        writer.record(&WorkingSetEntry { pid: *pid as u32, vaddr: range.start, pages });
    }
    dir.replace(NAME, &writer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_an_error() {
        let path = std::env::temp_dir().join(format!("crtools-working-set-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let dir = Dir::open(&path).unwrap();
        let none = read(&dir);
        let all: Vec<Touched> =
            [(7, 0x9000..0xa000), (3, 0x1000..0x5000)].map(|(pid, range)| Touched { pid, range }).to_vec();
        write(&dir, &all).unwrap();
        let found = read(&dir);
        let bytes = std::fs::read(path.join(NAME)).unwrap();
        let mut damaged = Vec::new();
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 0xff;
            std::fs::write(path.join(NAME), other).unwrap();
            damaged.push(read(&dir));
        }
        for length in [0, 5, bytes.len() - 1] {
            std::fs::write(path.join(NAME), &bytes[..length]).unwrap();
            damaged.push(read(&dir));
        }
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!((none.unwrap(), found.unwrap()), (Vec::new(), all));
        let ranges = damaged.iter().flatten().flatten();
        assert!(ranges.into_iter().all(|touched| touched.range.start <= touched.range.end));
        assert!(damaged.iter().any(Result::is_err));
    }
}
