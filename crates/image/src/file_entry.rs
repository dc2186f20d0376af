//! A record of `files.img`: one message with one numbered field for each kind of file.
//!
//! The envelope knows the type, the id, and which field holds the body; the body belongs to its kind and
//! stays opaque here.

use prost::bytes::{Buf, BufMut};
use prost::encoding::{self, DecodeContext, WireType};
use prost::{DecodeError, Message};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileEntry {
    /// One of `FdTypes`, or one that this version does not know.
    pub kind: i32,
    /// Names the open file in `fdinfo-*.img`, for one `kind`.
    pub id: u32,
    /// Field number and encoded message of the kind's own record.
    pub body: Option<(u32, Vec<u8>)>,
}

impl FileEntry {
    pub fn new(kind: i32, id: u32, tag: u32, body: &impl Message) -> FileEntry {
        FileEntry { kind, id, body: Some((tag, body.encode_to_vec())) }
    }
}

impl Message for FileEntry {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        encoding::int32::encode(1, &self.kind, buf);
        encoding::uint32::encode(2, &self.id, buf);
        if let Some((tag, body)) = &self.body {
            encoding::bytes::encode(*tag, body, buf);
        }
    }

    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        ctx: DecodeContext,
    ) -> Result<(), DecodeError> {
        match tag {
            1 => encoding::int32::merge(wire_type, &mut self.kind, buf, ctx),
            2 => encoding::uint32::merge(wire_type, &mut self.id, buf, ctx),
            _ if wire_type == WireType::LengthDelimited => {
                let mut body = Vec::new();
                encoding::bytes::merge(wire_type, &mut body, buf, ctx)?;
                self.body = Some((tag, body));
                Ok(())
            }
            _ => encoding::skip_field(wire_type, tag, buf, ctx),
        }
    }

    fn encoded_len(&self) -> usize {
        encoding::int32::encoded_len(1, &self.kind)
            + encoding::uint32::encoded_len(2, &self.id)
            + self.body.as_ref().map_or(0, |(tag, body)| encoding::bytes::encoded_len(*tag, body))
    }

    fn clear(&mut self) {
        *self = FileEntry::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::FownEntry;

    #[test]
    fn body_and_its_field_survive() {
        let fown = FownEntry { uid: 1, euid: 2, signum: 3, pid_type: 4, pid: 5 };
        let entry = FileEntry::new(6, 77, 8, &fown);
        let read = FileEntry::decode(&*entry.encode_to_vec()).unwrap();
        assert_eq!(read, entry);
        assert_eq!(FownEntry::decode(&*read.body.unwrap().1).unwrap(), fown);
    }
}
