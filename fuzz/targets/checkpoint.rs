//! A whole folder of images: loaded, checked, planned, described.
#![no_main]

#[path = "../folder.rs"]
mod folder;

use libfuzzer_sys::fuzz_target;
use model::Options;
use restore::{load::load, plan::plan};
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::LazyLock;

/// A folder in memory, with pages files of which only the length is looked at.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let path = PathBuf::from(format!("/dev/shm/crtools-fuzz-{}", std::process::id()));
    fs::create_dir_all(&path).expect("make a folder");
    for name in ["pages-1.img", "pages-2.img"] {
        File::create(path.join(name)).and_then(|file| file.set_len(1 << 20)).expect("make a pages file");
    }
    path
});

fuzz_target!(|data: &[u8]| {
    let files = folder::unpack(data);
    for (name, bytes) in &files {
        fs::write(FOLDER.join(name), bytes).expect("write an image");
    }
    let dir = image::Dir::open(&FOLDER).expect("open the folder");
    let options = Options::default();
    match load(&dir) {
        Ok(checkpoint) => {
            if let Ok(plan) = plan(&checkpoint, &options) {
                assert!(!plan.describe(&checkpoint).is_empty());
            }
        }
        Err(failures) => {
            assert!(!failures.is_empty(), "refused without a reason");
            failures.iter().for_each(|failure| drop(failure.to_string()));
        }
    }
    for (name, _) in &files {
        // A name may be there twice.
        let _ = fs::remove_file(FOLDER.join(name));
    }
});
