//! One image file: two magic numbers, then records of a 32-bit length and a message, some followed by
//! bytes whose count the record says.
//!
//! Files are hostile input: every length is checked against the bytes that are there before it is used.

use model::{Failure, Object};
use prost::Message;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};

/// Says "normal image, version 1.1". The inventory alone does without.
const COMMON_MAGIC: u32 = 0x5456_4319;
/// Says "service image": statistics and caches, which no restore needs.
const SERVICE_MAGIC: u32 = 0x5510_5940;

/// A kind of image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    pub magic: u32,
    first: Option<u32>,
}

/// The kinds of file that are read or written.
pub mod kind {
    use super::{COMMON_MAGIC, Kind, SERVICE_MAGIC};

    const fn common(magic: u32) -> Kind {
        Kind { magic, first: Some(COMMON_MAGIC) }
    }

    pub const INVENTORY: Kind = Kind { magic: 0x5831_3116, first: None };
    pub const PSTREE: Kind = common(0x5027_3030);
    pub const CORE: Kind = common(0x5505_3847);
    pub const IDS: Kind = common(0x5443_2030);
    pub const MM: Kind = common(0x5749_2820);
    pub const FS: Kind = common(0x5140_3912);
    pub const FDINFO: Kind = common(0x5621_3732);
    pub const FILES: Kind = common(0x5630_3138);
    pub const PAGEMAP: Kind = common(0x5608_4025);
    pub const PIPES_DATA: Kind = common(0x5645_3709);
    pub const FIFO_DATA: Kind = common(0x5933_3054);
    pub const SK_QUEUES: Kind = common(0x5626_4026);
    pub const REMAP_FPATH: Kind = common(0x5913_3954);
    pub const GHOST_FILE: Kind = common(0x5258_3605);
    pub const FILE_LOCKS: Kind = common(0x5432_3616);
    pub const MEMFD: Kind = common(0x4845_3499);
    pub const IPCNS_SHM: Kind = common(0x4628_3044);
    pub const TTY_INFO: Kind = common(0x5945_3036);
    pub const TTY_DATA: Kind = common(0x5941_3026);
    pub const BPFMAP_DATA: Kind = common(0x6432_4033);
    pub const SECCOMP: Kind = common(0x6441_3049);
    pub const TIMENS: Kind = common(0x4311_4433);
    /// Ours.
    pub const WORKING_SET: Kind = Kind { magic: 0x5753_4554, first: Some(SERVICE_MAGIC) };
    pub const STATS: Kind = Kind { magic: 0x5709_3306, first: Some(SERVICE_MAGIC) };
}

/// Takes the records out of one file.
#[derive(Debug)]
pub struct Reader<'a> {
    name: &'a str,
    bytes: &'a [u8],
    at: usize,
    entry: usize,
}

impl<'a> Reader<'a> {
    /// Checks the magic numbers. `name` is used in errors.
    ///
    /// # Errors
    /// `Corrupt` when the file is another kind of image, or none.
    pub fn open(kind: Kind, name: &'a str, bytes: &'a [u8]) -> Result<Reader<'a>, Failure> {
        let mut reader = Reader { name, bytes, at: 0, entry: 0 };
        for expected in kind.first.into_iter().chain([kind.magic]) {
            let found =
                reader.word()?.ok_or_else(|| Failure::corrupt(name, None, "is shorter than its header"))?;
            if found != expected {
                let why = format!("has the magic {found:#010x}, not {expected:#010x}");
                return Err(Failure::corrupt(name, None, why));
            }
        }
        Ok(reader)
    }

    /// The next record, or `None` at the end of the file.
    ///
    /// # Errors
    /// `Corrupt`, with the number of the record, when it is cut or no such message.
    pub fn record<M: Message + Default>(&mut self) -> Result<Option<M>, Failure> {
        let Some(length) = self.word()? else { return Ok(None) };
        let body = self.take(length as usize, "record")?;
        let message = M::decode(body).map_err(|error| self.corrupt(error.to_string()))?;
        self.entry += 1;
        Ok(Some(message))
    }

    /// The next record, of which nothing may be overlooked; of another, fields that are not known here mean nothing.
    ///
    /// # Errors
    /// As [`Reader::record`]; `Unsupported` for fields that are not known here.
    pub fn whole<M: Message + Default>(&mut self) -> Result<Option<M>, Failure> {
        let from = self.at + 4;
        let Some(message) = self.record::<M>()? else { return Ok(None) };
        // Every writer of the format is brief: what is known, and no field twice.
        match message.encoded_len() == self.at - from {
            true => Ok(Some(message)),
            false => Err(self.unknown(self.entry - 1, "fields that are not known here")),
        }
    }

    /// The next record, if `decode` knows it whole: a shorter way for what there is much of. None leaves it to the others.
    #[inline]
    pub fn short<M>(&mut self, decode: impl FnOnce(&[u8]) -> Option<M>) -> Option<M> {
        let (length, rest) = self.bytes[self.at..].split_first_chunk()?;
        let length = u32::from_le_bytes(*length) as usize;
        let message = decode(rest.get(..length)?)?;
        self.at += 4 + length;
        self.entry += 1;
        Some(message)
    }

    /// A refusal of a record that says what only a newer version could.
    pub fn unknown(&self, entry: usize, what: &str) -> Failure {
        let object = Object::Image { file: self.name.into(), entry: Some(entry) };
        Failure::unsupported(object, format!("has {what}: a newer version wrote it"))
    }

    /// The next record of a file that must have one.
    pub fn one<M: Message + Default>(&mut self) -> Result<M, Failure> {
        self.record()?.ok_or_else(|| self.corrupt("has no record where one is needed".into()))
    }

    /// Every record that is left, of a file whose records have no bytes after them.
    pub fn all<M: Message + Default>(&mut self) -> Result<Vec<M>, Failure> {
        std::iter::from_fn(|| self.record().transpose()).collect()
    }

    /// The same, not decoded yet.
    pub fn bodies(&mut self) -> Result<Vec<&'a [u8]>, Failure> {
        let mut bodies = Vec::new();
        while let Some(length) = self.word()? {
            bodies.push(self.take(length as usize, "record")?);
            self.entry += 1;
        }
        Ok(bodies)
    }

    /// The `length` bytes that belong to the record just read.
    pub fn payload(&mut self, length: usize) -> Result<&'a [u8], Failure> {
        self.take(length, "payload")
    }

    /// Everything that is left: the content that some records are followed by up to the end.
    pub fn rest(&mut self) -> &'a [u8] {
        let rest = &self.bytes[self.at..];
        self.at = self.bytes.len();
        rest
    }

    /// An error about the record that was read last, or is being read.
    pub fn corrupt(&self, why: String) -> Failure {
        Failure::corrupt(self.name, Some(self.entry), why)
    }

    fn word(&mut self) -> Result<Option<u32>, Failure> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let bytes = self.take(4, "length")?;
        // `take` returned four bytes.
        Ok(Some(u32::from_le_bytes(bytes.try_into().unwrap())))
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], Failure> {
        let left = self.bytes.len() - self.at;
        if length > left {
            return Err(self.corrupt(format!("ends inside a {what} of {length} bytes: {left} are left")));
        }
        let taken = &self.bytes[self.at..self.at + length];
        self.at += length;
        Ok(taken)
    }
}

/// Takes the records out of a file whose content is too long to be held.
#[derive(Debug)]
pub struct Stream {
    name: String,
    reader: BufReader<File>,
    entry: usize,
}

impl Stream {
    /// Checks the magic numbers.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn open(kind: Kind, name: &str, file: File) -> Result<Stream, Failure> {
        let mut stream = Stream { name: name.to_owned(), reader: BufReader::new(file), entry: 0 };
        let mut head = vec![0; 4 * (1 + kind.first.iter().len())];
        stream.reader.read_exact(&mut head).map_err(|error| stream.io(&error))?;
        Reader::open(kind, name, &head)?;
        Ok(stream)
    }

    /// The next record, or `None` at the end of the file.
    ///
    /// # Errors
    /// As [`Reader::record`].
    pub fn record<M: Message + Default>(&mut self) -> Result<Option<M>, Failure> {
        let mut length = Vec::new();
        self.take(4, &mut length)?;
        let Ok(length) = <[u8; 4]>::try_from(&*length) else {
            return if length.is_empty() {
                Ok(None)
            } else {
                Err(self.corrupt("ends inside a length".into()))
            };
        };
        let length = u32::from_le_bytes(length);
        let mut body = Vec::new();
        self.take(length.into(), &mut body)?;
        if body.len() != length as usize {
            return Err(self.corrupt(format!("ends inside a record of {length} bytes")));
        }
        let message = M::decode(&*body).map_err(|error| self.corrupt(error.to_string()))?;
        self.entry += 1;
        Ok(Some(message))
    }

    /// The next record of a file that must have one.
    pub fn one<M: Message + Default>(&mut self) -> Result<M, Failure> {
        self.record()?.ok_or_else(|| self.corrupt("has no record where one is needed".into()))
    }

    /// Moves up to `length` bytes that follow the record just read to `to`; returns how many there were.
    pub fn copy(&mut self, length: u64, to: &mut impl std::io::Write) -> Result<u64, Failure> {
        let copied = std::io::copy(&mut self.reader.by_ref().take(length), to);
        copied.map_err(|error| self.io(&error))
    }

    /// As much as there is, up to `length`: no more is reserved than the file has.
    fn take(&mut self, length: u64, to: &mut Vec<u8>) -> Result<(), Failure> {
        self.reader.by_ref().take(length).read_to_end(to).map(drop).map_err(|error| self.io(&error))
    }

    /// An error about the record that was read last, or is being read.
    pub fn corrupt(&self, why: String) -> Failure {
        Failure::corrupt(&*self.name, Some(self.entry), why)
    }

    fn io(&self, error: &std::io::Error) -> Failure {
        match error.kind() {
            ErrorKind::UnexpectedEof => Failure::corrupt(&*self.name, None, "is shorter than its header"),
            _ => {
                let object = Object::Path(self.name.clone());
                Failure::errno(object, "copy its content", "read", error.raw_os_error().unwrap_or(0))
            }
        }
    }
}

/// One record as it stands in a file.
pub fn framed(message: &impl Message) -> Vec<u8> {
    let length = u32::try_from(message.encoded_len()).expect("a record is far smaller than 4 GiB");
    let mut bytes = length.to_le_bytes().to_vec();
    message.encode_raw(&mut bytes);
    bytes
}

/// Builds the bytes of one file.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub fn new(kind: Kind) -> Writer {
        let mut bytes = Vec::with_capacity(256);
        for magic in kind.first.into_iter().chain([kind.magic]) {
            bytes.extend_from_slice(&magic.to_le_bytes());
        }
        Writer { bytes }
    }

    pub fn record(&mut self, message: &impl Message) -> &mut Writer {
        self.bytes.extend(framed(message));
        self
    }

    pub fn payload(&mut self, bytes: &[u8]) -> &mut Writer {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{FsEntry, PstreeEntry};

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::new(kind::PSTREE);
        let entry = |pid| PstreeEntry { pid, ppid: 0, pgid: 1, sid: 1, threads: vec![pid, 300] };
        writer.record(&entry(1)).payload(b"abc").record(&entry(2));
        let mut reader = Reader::open(kind::PSTREE, "pstree.img", writer.bytes()).unwrap();
        assert_eq!(reader.record().unwrap(), Some(entry(1)));
        assert_eq!(reader.payload(3).unwrap(), b"abc");
        assert_eq!(reader.record().unwrap(), Some(entry(2)));
        assert_eq!(reader.record::<PstreeEntry>().unwrap(), None);
    }

    #[test]
    fn corrupt_length_is_reported_not_allocated() {
        let mut writer = Writer::new(kind::FS);
        writer.payload(&[0xff, 0xff, 0xff, 0xff, 1]);
        let mut reader = Reader::open(kind::FS, "fs-1.img", writer.bytes()).unwrap();
        let failure = reader.record::<FsEntry>().unwrap_err();
        assert_eq!(failure.to_string(), "fs-1.img#0: ends inside a record of 4294967295 bytes: 1 are left");
    }

    #[test]
    fn another_kind_of_file_is_refused() {
        let writer = Writer::new(kind::FS);
        assert!(Reader::open(kind::CORE, "core-1.img", writer.bytes()).is_err());
        assert!(Reader::open(kind::CORE, "core-1.img", &[1, 2]).is_err());
        assert!(Reader::open(kind::CORE, "core-1.img", &[]).is_err());
    }
}
