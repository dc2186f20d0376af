//! A folder of images as one input for a fuzzer: pieces of a name, a length and bytes.
//!
//! Shared by the target `checkpoint` and the example `pack`, which makes a seed of a real dump.

use image::{Kind, Writer, kind};

/// The files that a folder may have here. Process 7 has the threads 10 and 11 and the child 9, as in
/// the tree that the seed was made of.
pub const FILES: &[(&str, Kind)] = &[
    ("inventory.img", kind::INVENTORY),
    ("pstree.img", kind::PSTREE),
    ("files.img", kind::FILES),
    ("seccomp.img", kind::SECCOMP),
    ("core-7.img", kind::CORE),
    ("core-9.img", kind::CORE),
    ("core-10.img", kind::CORE),
    ("core-11.img", kind::CORE),
    ("ids-7.img", kind::IDS),
    ("ids-9.img", kind::IDS),
    ("fs-7.img", kind::FS),
    ("fs-9.img", kind::FS),
    ("mm-7.img", kind::MM),
    ("mm-9.img", kind::MM),
    ("fdinfo-4.img", kind::FDINFO),
    ("fdinfo-8.img", kind::FDINFO),
    ("pagemap-7.img", kind::PAGEMAP),
    ("pagemap-9.img", kind::PAGEMAP),
];

/// Set in the index of a piece that has its own magic numbers.
const RAW: u8 = 0x80;

/// The files of an input. Most begin with the right magic numbers: what comes after is more interesting.
#[allow(dead_code)]
pub fn unpack(mut data: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut files = Vec::new();
    while let [index, low, high, rest @ ..] = data {
        let (name, kind) = FILES[usize::from(index & !RAW) % FILES.len()];
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, rest) = rest.split_at(length);
        let head = if index & RAW == 0 { Writer::new(kind).bytes().to_vec() } else { Vec::new() };
        files.push((name, [&head, body].concat()));
        data = rest;
    }
    files
}

/// The input that unpacks to these files.
#[allow(dead_code)]
pub fn pack(read: impl Fn(&str) -> Option<Vec<u8>>) -> Vec<u8> {
    let mut data = Vec::new();
    for (index, (name, kind)) in FILES.iter().enumerate() {
        let Some(bytes) = read(name) else { continue };
        let body = bytes.strip_prefix(Writer::new(*kind).bytes()).expect("an image of its kind");
        data.push(index as u8);
        data.extend_from_slice(&u16::try_from(body.len()).expect("a small image").to_le_bytes());
        data.extend_from_slice(body);
    }
    data
}
