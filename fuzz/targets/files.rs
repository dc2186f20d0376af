//! `files.img`: the envelope of a record and the bodies of all kinds, judged together.
#![no_main]

use image::{FileEntry, Reader, Writer, kind};
use kinds::contract::FileTable;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut image = Writer::new(kind::FILES);
    image.payload(data);
    let mut reader = Reader::open(kind::FILES, "files.img", image.bytes()).expect("the magic is right");
    let Ok(entries) = reader.all::<FileEntry>() else { return };
    let ids: Vec<u32> = entries.iter().map(|entry| entry.id).collect();
    match FileTable::new(entries, Vec::new(), Vec::new()) {
        Ok(files) => {
            for id in ids {
                let (kind, body) = files.get(id).expect("every record is in the table");
                let _ = kind.owner(body);
            }
        }
        Err(failures) => failures.iter().for_each(|failure| drop(failure.to_string())),
    }
});
