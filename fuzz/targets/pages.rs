//! What others say of pages: over a connection, in both directions, and in compressed files.
#![no_main]

use image::Dir;
use libfuzzer_sys::fuzz_target;
use pages::away::{Kept, hand_out};
use pages::server::Connection;
use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::os::fd::BorrowedFd;
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

impl Connection for Line {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Two pages that are handed out to whoever asks for them.
static KEPT: LazyLock<Kept> = LazyLock::new(|| {
    let bytes: &'static [u8] = vec![7; 3 * 4096].leak();
    let base = (bytes.as_ptr() as u64).next_multiple_of(4096);
    let mut kept = Kept::default();
    kept.add(std::process::id() as i32, vec![base..base + 8192]).expect("our own memory");
    kept
});

fuzz_target!(|data: &[u8]| {
    let [choice, bytes @ ..] = data else { return };
    let dir = Dir::open(&FOLDER).expect("the folder is there");
    let mut line = Line(Cursor::new(bytes.to_vec()));
    if choice % 4 == 3 {
        let _ = hand_out(&mut line, &KEPT, &|| Ok(()));
        return;
    }
    if choice % 2 == 0 {
        let wish = (choice % 4 == 2).then_some(model::Compression::Lz4);
        // Whatever it says, what has come is a folder of page maps that are whole.
        if pages::server::receive(&mut line, &dir, None, wish).is_ok() {
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
