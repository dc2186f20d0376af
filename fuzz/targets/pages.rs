//! What others say of pages: over a connection, and in compressed files.
#![no_main]

use image::Dir;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::path::PathBuf;
use std::sync::LazyLock;

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = PathBuf::from(format!("/dev/shm/crtools-fuzz-pages-{}", std::process::id()));
    fs::create_dir_all(&path).expect("make a folder");
    path
});

/// Says what the input says, and hears nothing.
struct Line(Cursor<Vec<u8>>);

impl Read for Line {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|data: &[u8]| {
    let [choice, bytes @ ..] = data else { return };
    let dir = Dir::open(&FOLDER).expect("the folder is there");
    if choice % 2 == 0 {
        let mut line = Line(Cursor::new(bytes.to_vec()));
        // Whatever it says, what has come is a folder of page maps that are whole.
        if pages::server::receive(&mut line, &dir, None).is_ok() {
            let chain = pages::chain::Chain::open(&dir).expect("no parent");
            for name in dir.names().expect("list") {
                if name.starts_with("pagemap-") {
                    let _ = chain.load(&name);
                }
            }
        }
        dir.discard();
        return;
    }
    let name = pages::compressed::name(1);
    fs::write(FOLDER.join(&name), bytes).expect("write");
    if let Ok(Some(compressed)) = pages::compressed::Compressed::open(&dir, 1) {
        // An index may claim a megabyte for each of its entries.
        if compressed.length < 64 << 20 {
            let _ = compressed.unpack();
        }
    }
    fs::remove_file(FOLDER.join(&name)).expect("remove");
});
