//! Page maps of images, and the words of `/proc/PID/pagemap`.
#![no_main]

use image::pagemap::{PAGE, PRESENT, Pagemap, Run};
use image::{Writer, kind};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;

static WORDS: LazyLock<File> =
    LazyLock::new(|| File::from(sys::memory::memfd(c"words", false).expect("make a file")));

fuzz_target!(|data: &[u8]| {
    let [choice, length, bytes @ ..] = data else { return };
    let length = u64::from(*length) * PAGE;
    if choice % 4 == 0 {
        words(bytes);
        return;
    }
    let mut image = Writer::new(kind::PAGEMAP);
    image.payload(bytes);
    let Ok(map) = Pagemap::parse("pagemap-1.img", image.bytes(), |_| Ok(length)) else { return };
    let mut last = 0;
    for run in &map.runs {
        assert!(run.range.start >= last && !run.is_empty() && run.len() % PAGE == 0, "{run:?}");
        if run.flags & PRESENT != 0 {
            assert!(run.offset.checked_add(run.len()).is_some_and(|end| end <= length), "{run:?}");
        }
        last = run.range.end;
    }
    let again = Pagemap::parse("pagemap-1.img", map.encode().bytes(), |_| Ok(length)).expect("our own");
    assert_eq!(again.runs, map.runs);
    // What is not in the pages file can be as long as it likes, and is never read.
    let present: Vec<Run> = map.runs.into_iter().filter(|run| run.flags & PRESENT != 0).collect();
    let sum = |runs: &[Run]| runs.iter().map(|run| run.len()).sum::<u64>();
    assert_eq!(sum(&pages::put::split(&present)), sum(&present));
});

fn words(bytes: &[u8]) {
    WORDS.set_len(0).and_then(|()| WORDS.write_all_at(bytes, 0)).expect("write the words");
    let pages = bytes.len() as u64 / 8 + 2;
    let mut last = 0;
    sys::pagemap::read(&WORDS, 0..pages * PAGE, |range, _| {
        assert!(range.start >= last && range.end > range.start && range.end <= pages * PAGE);
        last = range.end;
    })
    .expect("a file can be read");
}
