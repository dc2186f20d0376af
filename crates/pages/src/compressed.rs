//! Pages files that are compressed: `pages-<n>.img.z`, in the place of `pages-<n>.img`.
//!
//! A head, blocks, an index, a tail; all numbers little endian. Each block is compressed for itself, so that all
//! processors write and read them, and any page can be reached. An entry of the index is 24 bytes: where the content
//! of the block begins in the pages, where the block begins in the file, its length there, and that of the content
//! (two 32-bit numbers). The tail says where the index is, how many entries it has, and how long all pages are.
//!
//! CRIU does not know it, and stops because `pages-<n>.img` is missing.

use image::Dir;
use model::{Compression, Errno, Failure, Object};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

const MAGIC: &[u8; 8] = b"crtpages";
const VERSION: u32 = 1;
const HEAD: u64 = 16;
const ENTRY: u64 = 24;
const TAIL: u64 = 32;
/// The longest content of a block.
pub const BLOCK: usize = 1 << 20;
/// No index is longer: a pages file of 64 TiB.
const ENTRIES: u64 = 1 << 26;

/// A block in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Of its content, in the pages.
    pub at: u64,
    pub offset: u64,
    pub length: u32,
    pub content: u32,
}

pub fn name(pages_id: u32) -> String {
    format!("{}.z", crate::take::pages_name(pages_id))
}

/// Compresses the content of a block.
///
/// # Errors
/// `ENOMEM`.
pub fn compress(how: Compression, content: &[u8]) -> Result<Vec<u8>, Errno> {
    match how {
        Compression::Lz4 => Ok(lz4_flex::block::compress(content)),
        Compression::Zstd => {
            zstd::bulk::compress(content, 1).map_err(|_| Errno { call: "zstd", code: libc::ENOMEM })
        }
    }
}

/// How a way to compress is called in files, and on the line.
pub fn number(how: Compression) -> u32 {
    match how {
        Compression::Lz4 => 1,
        Compression::Zstd => 2,
    }
}

/// The way that a number stands for, if it does.
pub fn by_number(number: u32) -> Option<Compression> {
    Compression::ALL.into_iter().find(|how| self::number(*how) == number)
}

/// Unpacks a block whose content fills `room`; says whether it does.
pub fn fills(how: Compression, packed: &[u8], room: &mut [u8]) -> bool {
    let count = match how {
        Compression::Lz4 => lz4_flex::block::decompress_into(packed, room).ok(),
        Compression::Zstd => zstd::bulk::decompress_to_buffer(packed, room).ok(),
    };
    count == Some(room.len())
}

/// What a file begins with; blocks follow it.
pub fn head(how: Compression) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &number(how).to_le_bytes()].concat()
}

/// What follows the blocks, which end at `end`.
pub fn end(blocks: &[Block], end: u64, length: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(blocks.len() * ENTRY as usize + TAIL as usize);
    for block in blocks {
        bytes.extend_from_slice(&block.at.to_le_bytes());
        bytes.extend_from_slice(&block.offset.to_le_bytes());
        bytes.extend_from_slice(&block.length.to_le_bytes());
        bytes.extend_from_slice(&block.content.to_le_bytes());
    }
    bytes.extend_from_slice(&end.to_le_bytes());
    bytes.extend_from_slice(&(blocks.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(MAGIC);
    bytes
}

/// A compressed pages file, understood.
#[derive(Debug)]
pub struct Compressed {
    name: String,
    file: File,
    how: Compression,
    blocks: Vec<Block>,
    /// Of all pages, in bytes.
    pub length: u64,
}

impl Compressed {
    /// Opens the compressed file with this number, if there is one.
    ///
    /// # Errors
    /// When it is none of this kind, or damaged.
    pub fn open(dir: &Dir, pages_id: u32) -> Result<Option<Compressed>, Failure> {
        let name = name(pages_id);
        if !dir.has(&name) {
            return Ok(None);
        }
        let file = dir.open_file(&name)?;
        Compressed::read(name, file).map(Some)
    }

    fn read(name: String, file: File) -> Result<Compressed, Failure> {
        let corrupt = |why: &str| Failure::corrupt(&*name, None, why.to_owned());
        let explain = |error: std::io::Error| {
            sys::memory::io_errno("pread", &error).on(Object::Path(name.clone()), "read its index")
        };
        let size = file.metadata().map_err(explain)?.len();
        if size < HEAD + TAIL {
            return Err(corrupt("is too short for compressed pages"));
        }
        let (mut head, mut tail) = ([0; HEAD as usize], [0; TAIL as usize]);
        file.read_exact_at(&mut head, 0).map_err(explain)?;
        file.read_exact_at(&mut tail, size - TAIL).map_err(explain)?;
        let half = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        if head[..8] != *MAGIC || tail[24..] != *MAGIC || half(&head[8..12]) != VERSION {
            return Err(corrupt("is no file of compressed pages, or one of another version"));
        }
        let how = by_number(half(&head[12..]))
            .ok_or_else(|| corrupt("is compressed in a way that is not known"))?;
        let (at, count, length) = (word(&tail[..8]), word(&tail[8..16]), word(&tail[16..24]));
        if count > ENTRIES || at < HEAD || at.checked_add(count * ENTRY) != Some(size - TAIL) {
            return Err(corrupt("has an index that does not fit into it"));
        }
        let mut index = vec![0; (count * ENTRY) as usize];
        file.read_exact_at(&mut index, at).map_err(explain)?;
        let mut blocks: Vec<Block> = Vec::with_capacity(count as usize);
        let (mut next, mut offset) = (0, HEAD);
        for entry in index.chunks_exact(ENTRY as usize) {
            let block = Block {
                at: word(&entry[..8]),
                offset: word(&entry[8..16]),
                length: half(&entry[16..20]),
                content: half(&entry[20..]),
            };
            let is_next = block.at == next && block.offset == offset;
            if !is_next || block.content as usize > BLOCK || block.content == 0 {
                return Err(corrupt("has blocks that do not follow one another"));
            }
            next += u64::from(block.content);
            offset += u64::from(block.length);
            blocks.push(block);
        }
        if next != length || offset != at {
            return Err(corrupt("has blocks that are not as long as it says"));
        }
        Ok(Compressed { name, file, how, blocks, length })
    }

    /// All pages, in a file in memory; on all processors.
    ///
    /// # Errors
    /// When a block is damaged, or there is not so much memory.
    pub fn unpack(&self) -> Result<File, Failure> {
        self.unpack_parts(std::slice::from_ref(&(0..self.length)))
    }

    /// The same, but only what these parts need, which are in no order; elsewhere are holes.
    ///
    /// # Errors
    /// As [`Compressed::unpack`].
    pub fn unpack_parts(&self, parts: &[Range<u64>]) -> Result<File, Failure> {
        let mut needed: Vec<usize> = Vec::new();
        for part in parts.iter().filter(|part| !part.is_empty()) {
            let (Some(first), Some(last)) = (self.find(part.start), self.find(part.end - 1)) else {
                return Err(Failure::corrupt(&*self.name, None, "is shorter than its page map says"));
            };
            needed.extend(first..=last);
        }
        needed.sort_unstable();
        needed.dedup();
        let explain = |error: Errno| error.on(Object::Path(self.name.clone()), "unpack it");
        let to = File::from(sys::memory::memfd(c"crtools-pages", false).map_err(explain)?);
        sys::fd::truncate(&to, self.length).map_err(explain)?;
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), Failure> {
            let (mut packed, mut content) = (Vec::new(), vec![0; BLOCK]);
            while let Some(block) = needed.get(next.fetch_add(1, Ordering::Relaxed)) {
                let block = &self.blocks[*block];
                let unpacked = self.block(block, &mut packed, &mut content);
                let content = unpacked.inspect_err(|_| next.store(needed.len(), Ordering::Relaxed))?;
                to.write_all_at(content, block.at)
                    .map_err(|error| explain(sys::memory::io_errno("pwrite", &error)))?;
            }
            Ok(())
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(needed.len());
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
            let own = work();
            let others = others.into_iter().map(|other| other.join().expect("a worker does not panic"));
            others.fold(own, Result::and)
        })?;
        Ok(to)
    }

    fn block<'c>(
        &self,
        block: &Block,
        packed: &mut Vec<u8>,
        content: &'c mut [u8],
    ) -> Result<&'c [u8], Failure> {
        // Not longer than the file, which was seen.
        packed.resize(block.length as usize, 0);
        self.file.read_exact_at(packed, block.offset).map_err(|error| {
            sys::memory::io_errno("pread", &error).on(Object::Path(self.name.clone()), "read a block")
        })?;
        let room = &mut content[..block.content as usize];
        match fills(self.how, packed, room) {
            true => Ok(room),
            false => {
                let why = format!("the block of page {} is damaged", block.at / 4096);
                Err(Failure::corrupt(&*self.name, None, why))
            }
        }
    }

    /// The place of the block that has this byte of the pages.
    fn find(&self, at: u64) -> Option<usize> {
        let next = self.blocks.partition_point(|block| block.at <= at);
        let found = next.checked_sub(1)?;
        (at < self.length).then_some(found)
    }
}

/// Blocks that were unpacked singly, the latest few.
#[derive(Debug)]
pub struct Blocks {
    file: Compressed,
    /// Which, and their content; the one used last at the end.
    unpacked: Vec<(usize, Vec<u8>)>,
}

/// Blocks that are kept unpacked: touches are near one another, but in more places than one.
const UNPACKED: usize = 8;

impl Blocks {
    pub fn new(file: Compressed) -> Blocks {
        Blocks { file, unpacked: Vec::new() }
    }

    /// Content from a place in the pages on: `length` bytes, or as many as its block has; none behind the end.
    ///
    /// # Errors
    /// When the block is damaged.
    pub fn content(&mut self, offset: u64, length: u64) -> Result<&[u8], Failure> {
        let Some(wanted) = self.file.find(offset) else { return Ok(&[]) };
        if let Some(at) = self.unpacked.iter().position(|(block, _)| *block == wanted) {
            self.unpacked[at..].rotate_left(1);
        } else {
            let mut room = match self.unpacked.len() {
                UNPACKED => self.unpacked.remove(0).1,
                _ => Vec::new(),
            };
            room.resize(BLOCK, 0);
            self.file.block(&self.file.blocks[wanted], &mut Vec::new(), &mut room)?;
            self.unpacked.push((wanted, room));
        }
        let block = &self.file.blocks[wanted];
        let from = (offset - block.at) as usize;
        let to = (block.content as usize).min(from.saturating_add(length as usize));
        Ok(self.unpacked.last().map_or(&[], |(_, content)| &content[from..to]))
    }
}

/// A compressed file that is written from its beginning to its end.
#[derive(Debug)]
pub struct Packing {
    file: File,
    how: Compression,
    blocks: Vec<Block>,
    /// Of what is in blocks, in the pages, and of the blocks in the file.
    at: u64,
    end: u64,
    /// Not enough for a block yet.
    waiting: Vec<u8>,
}

impl Packing {
    /// `file` is empty.
    ///
    /// # Errors
    /// Of write(2).
    pub fn new(file: File, how: Compression) -> std::io::Result<Packing> {
        let head = head(how);
        file.write_all_at(&head, 0)?;
        Ok(Packing { file, how, blocks: Vec::new(), at: 0, end: head.len() as u64, waiting: Vec::new() })
    }

    pub fn how(&self) -> Compression {
        self.how
    }

    /// Adds content.
    ///
    /// # Errors
    /// Of write(2), or `ENOMEM`.
    pub fn add(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - self.waiting.len()));
            self.waiting.extend_from_slice(now);
            bytes = later;
            if self.waiting.len() == BLOCK {
                self.pack()?;
            }
        }
        Ok(())
    }

    /// Adds a block that is packed already, and holds `content` bytes.
    ///
    /// # Errors
    /// As [`Packing::add`].
    pub fn block(&mut self, packed: &[u8], content: u32) -> std::io::Result<()> {
        self.pack()?;
        self.put(packed, content)
    }

    fn pack(&mut self) -> std::io::Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let packed = compress(self.how, &self.waiting)
            .map_err(|error| std::io::Error::from_raw_os_error(error.code))?;
        let content = self.waiting.len() as u32;
        self.waiting.clear();
        self.put(&packed, content)
    }

    fn put(&mut self, packed: &[u8], content: u32) -> std::io::Result<()> {
        self.file.write_all_at(packed, self.end)?;
        let length = packed.len() as u32;
        self.blocks.push(Block { at: self.at, offset: self.end, length, content });
        self.at += u64::from(content);
        self.end += u64::from(length);
        Ok(())
    }

    /// Writes what is left, and the index.
    ///
    /// # Errors
    /// As [`Packing::add`].
    pub fn finish(mut self) -> std::io::Result<()> {
        self.pack()?;
        self.file.write_all_at(&end(&self.blocks, self.end, self.at), self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(how: Compression, contents: &[Vec<u8>]) -> (Vec<u8>, Vec<u8>) {
        let (mut bytes, mut blocks, mut at) = (head(how), Vec::new(), 0);
        for content in contents {
            let block = compress(how, content).unwrap();
            let (length, of) = (block.len() as u32, content.len() as u32);
            blocks.push(Block { at, offset: bytes.len() as u64, length, content: of });
            at += content.len() as u64;
            bytes.extend(block);
        }
        let tail = end(&blocks, bytes.len() as u64, at);
        bytes.extend(tail);
        (bytes, contents.concat())
    }

    fn unpacked(bytes: &[u8]) -> Result<Vec<u8>, Failure> {
        let file = File::from(sys::memory::memfd(c"packed", false).unwrap());
        file.write_all_at(bytes, 0).unwrap();
        let file = Compressed::read("pages-1.img.z".into(), file)?.unpack()?;
        let mut all = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        Ok(all)
    }

    fn contents() -> Vec<Vec<u8>> {
        let noise =
            |seed: u32| (0..8192u32).map(|n| (n.wrapping_mul(2_654_435_761 ^ seed) >> 13) as u8).collect();
        vec![noise(1), vec![7; 4096], noise(2)]
    }

    #[test]
    fn what_is_packed_is_unpacked_again() {
        for how in [Compression::Lz4, Compression::Zstd] {
            let (bytes, all) = packed(how, &contents());
            assert!(unpacked(&bytes).unwrap() == all, "{how:?}");
            let (bytes, all) = packed(how, &[]);
            assert!(unpacked(&bytes).unwrap() == all, "{how:?}, nothing");
        }
    }

    #[test]
    fn blocks_are_unpacked_singly_and_in_parts() {
        let (bytes, all) = packed(Compression::Lz4, &contents());
        let file = File::from(sys::memory::memfd(c"packed", false).unwrap());
        file.write_all_at(&bytes, 0).unwrap();
        let open = || Compressed::read("pages-1.img.z".into(), file.try_clone().unwrap()).unwrap();
        let mut blocks = Blocks::new(open());
        for at in [0, 9000, 8192, 0, 4096, all.len() as u64 - 1] {
            let content = blocks.content(at, 5000).unwrap();
            assert!(!content.is_empty());
            assert!(all[at as usize..].starts_with(content), "from {at}");
        }
        assert!(blocks.content(all.len() as u64, 1).unwrap().is_empty());
        // The second block alone: what is before and behind is a hole.
        let part = open().unpack_parts(&[9000..9001, 5..5]).unwrap();
        let mut found = vec![1; all.len()];
        part.read_exact_at(&mut found, 0).unwrap();
        assert!(found[..8192].iter().all(|byte| *byte == 0) && found[8192..12288] == all[8192..12288]);
        assert!(found[12288..].iter().all(|byte| *byte == 0));
        assert!(open().unpack_parts(&[0..1, 5..all.len() as u64 + 1]).is_err());
    }

    #[test]
    fn what_is_packed_in_pieces_is_the_same() {
        let (first, second) = (vec![3; BLOCK / 2 + 7], vec![4; BLOCK]);
        let file = File::from(sys::memory::memfd(c"packed", false).unwrap());
        let mut packing = Packing::new(file.try_clone().unwrap(), Compression::Zstd).unwrap();
        packing.add(&first).unwrap();
        packing.add(&second).unwrap();
        packing.block(&compress(Compression::Zstd, &first).unwrap(), first.len() as u32).unwrap();
        packing.add(&[5]).unwrap();
        packing.finish().unwrap();
        let unpacked = Compressed::read("pages-1.img.z".into(), file).unwrap().unpack().unwrap();
        let mut all = vec![0; unpacked.metadata().unwrap().len() as usize];
        unpacked.read_exact_at(&mut all, 0).unwrap();
        assert!(all == [&first[..], &second, &first, &[5]].concat());
    }

    /// Whatever byte is another: an error or the same pages, and no panic.
    #[test]
    fn damaged_files_are_errors() {
        for how in [Compression::Lz4, Compression::Zstd] {
            let (bytes, _) = packed(how, &contents());
            for at in (0..40).chain(bytes.len() - 120..bytes.len()) {
                let mut damaged = bytes.clone();
                damaged[at] ^= 0x55;
                let _ = unpacked(&damaged);
            }
            for length in [0, 15, 47, 48, bytes.len() / 2, bytes.len() - 1] {
                assert!(unpacked(&bytes[..length]).is_err(), "{how:?}, {length}");
            }
            let mut long = bytes.clone();
            let tail = long.len() - 24;
            long[tail..tail + 8].copy_from_slice(&u64::MAX.to_le_bytes());
            assert!(unpacked(&long).is_err());
        }
    }
}
