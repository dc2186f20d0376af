//! `files.img`: the envelope of a record and the bodies of all kinds, judged together.
#![no_main]

use image::{Reader, Writer, kind};
use kinds::contract::FileTable;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut image = Writer::new(kind::FILES);
    image.payload(data);
    let mut reader = Reader::open(kind::FILES, "files.img", image.bytes()).expect("the magic is right");
    let Ok(entries) = reader.bodies() else { return };
    match FileTable::new(&entries, Vec::new(), Vec::new()) {
        Ok(files) => {
            assert_eq!(files.len(), entries.len(), "every record is in the table");
            for (id, (kind, body)) in files.iter() {
                let _ = kind.owner(body);
                let _ = kind.needs(body).contains(&id);
            }
        }
        Err(failures) => failures.iter().for_each(|failure| drop(failure.to_string())),
    }
});
