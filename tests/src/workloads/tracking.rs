//! Memory that changes between snapshots, in every way that the kernel has for it.

use std::fs::OpenOptions;
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::memory::{Map, PAGE, READ, RW};
use crate::sys::process::fork;
use crate::sys::uring::{Request, Ring};

pub const CASES: &[Case] = &[
    case!(no_change_is_missed).moves().restless().peer_cannot("it runs too long"),
    case!(little_that_changes_of_much_is_whole).moves().restless(),
    case!(pages_that_come_and_go_among_others_are_whole).moves().restless(),
    case!(what_a_ring_reads_into_pinned_pages_is_noted)
        .restless()
        .needs(crate::sys::strange::has_io_uring)
        .peer_cannot("it refuses rings"),
    case!(memory_of_children_made_meanwhile_is_whole).moves().restless(),
    case!(executed_program_is_saved_anew).moves().restless(),
];

/// Pages of each half.
const COUNT: usize = 700;

/// Of the linear congruential kind, the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// What every page should hold is written to a file that no dump carries, so a change that a snapshot misses
/// is one that the file knows of.
fn no_change_is_missed(t: &Trial) {
    let file = |name: &str| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(t.path(name)).expect("open");
        file.set_len((COUNT * PAGE) as u64).expect("set_len");
        file
    };
    let (model_file, source) = (file("model"), file("source"));
    let model = Map::file(model_file.as_fd(), COUNT * PAGE, RW, libc::MAP_SHARED, 0);
    let map = Map::private(COUNT * PAGE);
    let huge = Map::private(8 << 20);
    // A hint: without huge pages it is memory like other memory.
    let _ = huge.advise(0..huge.length / PAGE, libc::MADV_HUGEPAGE);
    let scratch = Map::private(PAGE);
    let worker = fork(|| {
        let mut dice = Dice(42);
        let mut step = 1_u64;
        while !t.is_over() {
            for _ in 0..300 {
                change(&mut dice, step, &map, &model, &scratch, &source, ALL);
                let page = dice.below(huge.length / PAGE);
                huge.word(page * PAGE + 8).store(step, Ordering::SeqCst);
                model.word(4000).store(step, Ordering::SeqCst);
                step += 1;
            }
            if step > 3000 && !t.path("busy").exists() {
                t.mark("busy");
            }
        }
        for page in 0..COUNT {
            let wanted = model.word(page * PAGE).load(Ordering::SeqCst);
            assert_eq!(map.word(page * PAGE).load(Ordering::SeqCst), wanted, "page {page}");
        }
        let newest = (0..huge.length / PAGE).map(|page| huge.word(page * PAGE + 8).load(Ordering::SeqCst)).max();
        assert_eq!(newest, Some(model.word(4000).load(Ordering::SeqCst)));
    });
    t.await_mark("busy");
    t.checkpoint();
    worker.succeed();
}

/// So little that it is written before the program runs on, in single pages, of which some become zero.
fn little_that_changes_of_much_is_whole(t: &Trial) {
    const MUCH: usize = 8192;
    const LITTLE: usize = MUCH / 13;
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(t.path("model")).expect("open");
    file.set_len((LITTLE * 8).next_multiple_of(PAGE) as u64).expect("set_len");
    let model = Map::file(file.as_fd(), (LITTLE * 8).next_multiple_of(PAGE), RW, libc::MAP_SHARED, 0);
    let map = Map::private(MUCH * PAGE);
    let worker = fork(|| {
        map.fill(0..MUCH, 7);
        (0..LITTLE).for_each(|at| {
            map.advise(at * 13..at * 13 + 1, libc::MADV_DONTNEED).expect("madvise");
        });
        let mut dice = Dice(7);
        let mut step = 1_u64;
        while !t.is_over() {
            let at = dice.below(LITTLE);
            let value = if step.is_multiple_of(3) { 0 } else { step };
            map.word(at * 13 * PAGE).store(value, Ordering::SeqCst);
            model.word(at * 8).store(value, Ordering::SeqCst);
            step += 1;
            if step == 3000 {
                t.mark("busy");
            }
        }
        for at in 0..LITTLE {
            let wanted = model.word(at * 8).load(Ordering::SeqCst);
            assert_eq!(map.word(at * 13 * PAGE).load(Ordering::SeqCst), wanted, "page {}", at * 13);
        }
        let others = (0..MUCH).filter(|page| page % 13 != 0 || page / 13 >= LITTLE);
        others.for_each(|page| map.check(page..page + 1, 7));
    });
    t.await_mark("busy");
    t.checkpoint();
    worker.succeed();
}

/// Which pages change: so many, each so many pages behind the one before.
type Which = (usize, usize);
const ALL: Which = (COUNT, 1);

/// Single pages, among many that stay as they are, change in every way and are there or not: their places in a pages file are
/// other ones from moment to moment.
fn pages_that_come_and_go_among_others_are_whole(t: &Trial) {
    const SOME: Which = (90, 89);
    const MUCH: usize = SOME.0 * SOME.1;
    let file = |name: &str| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(t.path(name)).expect("open");
        file.set_len((MUCH * PAGE) as u64).expect("set_len");
        file
    };
    let (model_file, source) = (file("model"), file("source"));
    let model = Map::file(model_file.as_fd(), MUCH * PAGE, RW, libc::MAP_SHARED, 0);
    let map = Map::private(MUCH * PAGE);
    let scratch = Map::private(PAGE);
    let is_one = |page: usize| page.is_multiple_of(SOME.1);
    let worker = fork(|| {
        (0..MUCH).filter(|page| !is_one(*page)).for_each(|page| map.fill(page..page + 1, 7));
        let mut dice = Dice(9);
        let mut step = 1_u64;
        while !t.is_over() {
            for _ in 0..100 {
                change(&mut dice, step, &map, &model, &scratch, &source, SOME);
                step += 1;
            }
            if step > 1000 && !t.path("busy").exists() {
                t.mark("busy");
            }
        }
        for page in 0..MUCH {
            match is_one(page) {
                true => {
                    let wanted = model.word(page * PAGE).load(Ordering::SeqCst);
                    assert_eq!(map.word(page * PAGE).load(Ordering::SeqCst), wanted, "page {page}");
                }
                false => map.check(page..page + 1, 7),
            }
        }
    });
    t.await_mark("busy");
    t.checkpoint();
    worker.succeed();
}

/// Changes a page in one of many ways.
fn change(
    dice: &mut Dice,
    step: u64,
    map: &Map,
    model: &Map,
    scratch: &Map,
    source: &std::fs::File,
    (count, apart): Which,
) {
    let page = dice.below(count) * apart;
    let at = page * PAGE;
    let word = || map.word(at);
    let mut wanted = step;
    match dice.below(24) {
        0..=9 => word().store(step, Ordering::SeqCst),
        10..=12 => map.write_by_kernel(at, step),
        13..=15 => {
            source.write_all_at(&step.to_ne_bytes(), 0).expect("write");
            map.read_from(source.as_fd(), 0, at);
        }
        16..=17 => {
            map.advise(page..page + 1, libc::MADV_DONTNEED).expect("madvise");
            wanted = 0;
        }
        18 => {
            map.renew_page(page);
            word().store(step, Ordering::SeqCst);
        }
        19 => {
            // Away and back: the page is another for whoever watches addresses.
            word().store(step, Ordering::SeqCst);
            map.move_page(page, scratch, 0);
            scratch.move_page(0, map, page);
            scratch.renew_page(0);
        }
        20 => {
            word().store(step, Ordering::SeqCst);
            map.protect(page..page + 1, READ);
            map.protect(page..page + 1, RW);
        }
        21 => {
            map.advise(page..page + 1, libc::MADV_DONTNEED).expect("madvise");
            // The page of zeros, then a page of its own.
            assert_eq!(word().load(Ordering::SeqCst), 0);
            word().store(step, Ordering::SeqCst);
        }
        22 => {
            // Two pages change places.
            let other = dice.below(count) * apart;
            if other == page {
                return;
            }
            let theirs = model.word(other * PAGE).load(Ordering::SeqCst);
            let own = model.word(at).load(Ordering::SeqCst);
            map.move_page(page, scratch, 0);
            map.move_page(other, map, page);
            scratch.move_page(0, map, other);
            scratch.renew_page(0);
            model.word(other * PAGE).store(own, Ordering::SeqCst);
            wanted = theirs;
        }
        _ if step.is_multiple_of(8) && apart == 1 => {
            // What a child changes is its own. Relatives of much memory are another case.
            fork(|| word().store(step + 1, Ordering::SeqCst)).succeed();
            word().store(step, Ordering::SeqCst);
        }
        _ => word().store(step, Ordering::SeqCst),
    }
    model.word(at).store(wanted, Ordering::SeqCst);
}

/// The kernel has the pages of registered buffers pinned, and writes to them past every page table.
fn what_a_ring_reads_into_pinned_pages_is_noted(t: &Trial) {
    const PINNED: usize = 40;
    let file = |name: &str| {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(t.path(name)).expect("open");
        file.set_len(PAGE as u64).expect("set_len");
        file
    };
    let (model_file, mut source) = (file("model"), file("source"));
    let model = Map::file(model_file.as_fd(), PAGE, RW, libc::MAP_SHARED, 0);
    let worker = fork(|| {
        let map = Map::private(PINNED * PAGE);
        map.fill(0..PINNED, 0);
        let address = std::ptr::from_ref(map.word(0)) as u64;
        let mut ring = Ring::new(8, 0);
        ring.register(0, &[libc::iovec { iov_base: address as *mut libc::c_void, iov_len: PINNED * PAGE }]);
        ring.register(2, &[source.as_raw_fd()]);
        let mut dice = Dice(11);
        let mut step = 1_u64;
        while !t.is_over() {
            let page = dice.below(PINNED);
            source.write_all_at(&step.to_ne_bytes(), 0).expect("write");
            source.rewind().expect("lseek");
            ring.push(Request::fixed(false, 0, address + (page * PAGE) as u64, 8, step));
            assert_eq!(ring.submit(1), 1);
            // A call that is interrupted after it has submitted something does not wait.
            let seen = std::iter::repeat_with(|| ring.reap()).find_map(|seen| seen);
            assert_eq!(seen, Some((step, 8)));
            model.word(page * 8).store(step, Ordering::SeqCst);
            step += 1;
            if step == 500 {
                t.mark("busy");
            }
        }
        for page in 0..PINNED {
            let wanted = model.word(page * 8).load(Ordering::SeqCst);
            assert_eq!(map.word(page * PAGE).load(Ordering::SeqCst), wanted, "page {page}");
        }
    });
    t.await_mark("busy");
    t.checkpoint();
    worker.succeed();
}

/// Nobody watches a child that was made after the watch began.
fn memory_of_children_made_meanwhile_is_whole(t: &Trial) {
    let map = Map::private(200 * PAGE);
    map.fill(0..200, 1);
    let maker = fork(|| {
        let mut generation = 2;
        while !t.is_over() {
            let child = fork(|| {
                map.fill(0..100, generation);
                if generation == 2 {
                    t.mark("busy");
                }
                let (first, second) = (generation, 1);
                map.check(0..100, first);
                map.check(100..200, second);
            });
            child.succeed();
            generation += 1;
        }
        map.check(0..200, 1);
    });
    t.await_mark("busy");
    t.checkpoint();
    maker.succeed();
    map.check(0..200, 1);
}

/// Another program under the same number is not what was watched.
fn executed_program_is_saved_anew(t: &Trial) {
    let child = fork(|| {
        t.mark("begun");
        t.await_mark("ready");
        let sleep = c"/bin/sleep";
        nix::unistd::execv(sleep, &[sleep, c"1000"]).expect("execv");
    });
    t.await_mark("begun");
    t.checkpoint();
    child.kill(nix::sys::signal::Signal::SIGKILL);
    child.wait();
}
