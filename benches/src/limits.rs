//! What the machine gives: the work of a dump or a restore, one step at a time, without a tool. One GiB each, the median
//! of three.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Instant;

use crtools_tests::sys::exit_now;
use crtools_tests::sys::memory::{Map, PAGE, RW};
use crtools_tests::sys::process::fork;

const GIB: usize = 1 << 30;
const CHUNK: usize = 1 << 20;

fn private() -> Map {
    Map::anonymous(GIB, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
}

fn touched(advice: i32) -> Map {
    let map = private();
    map.advise(0..GIB / PAGE, advice).expect("madvise");
    (0..GIB).step_by(PAGE).for_each(|at| map.set(at, 1));
    map
}

fn unmap(map: Map) {
    map.unmap(0..GIB / PAGE);
}

/// Milliseconds, the median of three.
fn median(mut measure: impl FnMut() -> f64) -> f64 {
    let mut all = [measure(), measure(), measure()];
    all.sort_by(f64::total_cmp);
    all[1]
}

fn timed(work: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    work();
    begin.elapsed().as_secs_f64() * 1e3
}

/// Of a GiB on tmpfs, `threads` writers with a file each.
fn write(threads: usize) -> f64 {
    let names: Vec<String> =
        (0..threads).map(|nth| format!("/dev/shm/crtools-bench-{}-{nth}", std::process::id())).collect();
    let chunk = vec![7u8; CHUNK];
    let fill = |name: &str| {
        let mut file = File::create(name).expect("create");
        (0..GIB / CHUNK / threads).for_each(|_| file.write_all(&chunk).expect("write"));
    };
    let took = timed(|| {
        std::thread::scope(|scope| names.iter().for_each(|name| drop(scope.spawn(|| fill(name)))));
    });
    names.iter().for_each(|name| std::fs::remove_file(name).expect("unlink"));
    took
}

fn read() -> f64 {
    let name = format!("/dev/shm/crtools-bench-{}", std::process::id());
    let chunk = vec![7u8; CHUNK];
    let mut file = File::create(&name).expect("create");
    (0..GIB / CHUNK).for_each(|_| file.write_all(&chunk).expect("write"));
    let mut file = File::open(&name).expect("open");
    // Fresh memory each time, as a restore has it.
    let took = timed(|| {
        for _ in 0..GIB / (64 * CHUNK) {
            let mut fresh = vec![0; 64 * CHUNK];
            file.read_exact(&mut fresh).expect("read");
        }
    });
    std::fs::remove_file(&name).expect("unlink");
    took
}

fn copy() -> f64 {
    let (from, mut to) = (vec![1u8; 64 * CHUNK], vec![2u8; 64 * CHUNK]);
    timed(|| {
        for _ in 0..GIB / from.len() {
            to.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut to);
        }
    })
}

fn fault(advice: i32) -> f64 {
    let map = private();
    map.advise(0..GIB / PAGE, advice).expect("madvise");
    let took = timed(|| (0..GIB).step_by(PAGE).for_each(|at| map.set(at, 1)));
    unmap(map);
    took
}

/// What a copy of a process costs it: fork(2) alone.
fn copy_of_process(advice: i32) -> f64 {
    let map = touched(advice);
    let mut child = None;
    let took = timed(|| child = Some(fork(|| exit_now(0))));
    child.expect("a child").succeed();
    unmap(map);
    took
}

/// The limits as a table.
pub fn table() -> String {
    let rows: [(&str, &dyn Fn() -> f64); 9] = [
        ("copy memory, one thread", &copy),
        ("touch fresh memory, pages of 4 KiB", &|| fault(libc::MADV_NOHUGEPAGE)),
        ("touch fresh memory, huge pages", &|| fault(libc::MADV_HUGEPAGE)),
        ("write to tmpfs, one thread", &|| write(1)),
        ("write to tmpfs, two threads with a file each", &|| write(2)),
        ("read from tmpfs into fresh memory, one thread", &read),
        ("fork(2), pages of 4 KiB", &|| copy_of_process(libc::MADV_NOHUGEPAGE)),
        ("fork(2), huge pages", &|| copy_of_process(libc::MADV_HUGEPAGE)),
        ("make 30 000 mappings by mprotect(2)", &mappings),
    ];
    let mut text = "| a GiB | ms | GiB/s |\n|---|---:|---:|\n".to_owned();
    for (name, measure) in rows {
        let ms = median(measure);
        let speed = if name.contains("fork") || name.contains("30 000") {
            "–".to_owned()
        } else {
            format!("{:.1}", 1e3 / ms)
        };
        text += &format!("| {name} | {ms:.1} | {speed} |\n");
    }
    text
}

fn mappings() -> f64 {
    let count = 30_000;
    let map = Map::anonymous(count * PAGE, libc::PROT_READ, libc::MAP_PRIVATE);
    let took = timed(|| (0..count).step_by(2).for_each(|page| map.protect(page..page + 1, RW)));
    map.unmap(0..count);
    took
}
