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

fn number(how: Compression) -> u32 {
    match how {
        Compression::Lz4 => 1,
        Compression::Zstd => 2,
    }
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
        let how = match half(&head[12..]) {
            1 => Compression::Lz4,
            2 => Compression::Zstd,
            _ => return Err(corrupt("is compressed in a way that is not known")),
        };
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
        let explain = |error: Errno| error.on(Object::Path(self.name.clone()), "unpack it");
        let to = File::from(sys::memory::memfd(c"crtools-pages", false).map_err(explain)?);
        sys::fd::truncate(&to, self.length).map_err(explain)?;
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), Failure> {
            let (mut packed, mut content) = (Vec::new(), vec![0; BLOCK]);
            while let Some(block) = self.blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                let unpacked = self.block(block, &mut packed, &mut content);
                let content = unpacked.inspect_err(|_| next.store(self.blocks.len(), Ordering::Relaxed))?;
                to.write_all_at(content, block.at)
                    .map_err(|error| explain(sys::memory::io_errno("pwrite", &error)))?;
            }
            Ok(())
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from).min(self.blocks.len());
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
        let count = match self.how {
            Compression::Lz4 => lz4_flex::block::decompress_into(packed, room).ok(),
            Compression::Zstd => zstd::bulk::decompress_to_buffer(packed, room).ok(),
        };
        match count {
            Some(count) if count == room.len() => Ok(room),
            _ => Err(Failure::corrupt(
                &*self.name,
                None,
                format!("the block of page {} is damaged", block.at / 4096),
            )),
        }
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
