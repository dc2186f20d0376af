//! Memory that relatives share copy-on-write.

use std::fs;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::memory::{Map, PAGE};
use crate::sys::process::fork;
use crate::sys::procfs;

pub const CASES: &[Case] = &[
    case!(memory_shared_with_a_child_copy_on_write_stays_shared).exchange(),
    case!(memory_of_five_children_is_shared_again)
        .peer_cannot("mappings whose bounds differ in parent and child are not shared"),
    case!(relatives_take_no_more_memory_than_before).moves(),
    case!(pages_written_by_the_child_are_its_own).exchange(),
    case!(large_memory_is_whole_and_nobody_is_left_behind).exchange().moves().killed().large(),
];

fn pages(count: usize) -> usize {
    count * PAGE
}

/// How many pages of a mapping have one frame in this process and another.
fn same_frames(map: &Map, other: i32, count: usize) -> usize {
    let frame = |entry: &u64| (entry >> 63 == 1).then_some(entry & ((1 << 55) - 1));
    let theirs = procfs::pagemap_of(other, map.address, count);
    procfs::pagemap(map.address, count)
        .iter()
        .zip(&theirs)
        .filter(|(mine, theirs)| frame(mine).is_some() && frame(mine) == frame(theirs))
        .count()
}

fn memory_shared_with_a_child_copy_on_write_stays_shared(t: &Trial) {
    let map = Map::private(pages(2000));
    map.fill(0..2000, 7);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        t.await_mark("looked");
        map.check(0..2000, 7);
    });
    t.await_mark("child");
    assert_eq!(same_frames(&map, child.pid.as_raw(), 2000), 2000);
    t.checkpoint();
    let shared = same_frames(&map, child.pid.as_raw(), 2000);
    assert!(shared >= 1990, "only {shared} of 2000 pages are shared with the child");
    t.mark("looked");
    child.succeed();
    map.check(0..2000, 7);
}

fn memory_of_five_children_is_shared_again(t: &Trial) {
    let map = Map::private(pages(1000));
    map.fill(0..1000, 7);
    let children: Vec<_> = (0..5)
        .map(|number| {
            fork(|| {
                let own = Map::private(pages(10));
                own.fill(0..10, number);
                t.mark(&format!("child-{number}"));
                t.hold();
                t.await_mark("looked");
                map.check(0..1000, 7);
                own.check(0..10, number);
            })
        })
        .collect();
    for number in 0..5 {
        t.await_mark(&format!("child-{number}"));
    }
    t.checkpoint();
    for child in &children {
        let shared = same_frames(&map, child.pid.as_raw(), 1000);
        assert!(shared >= 990, "only {shared} of 1000 pages are shared with {}", child.pid);
    }
    t.mark("looked");
    for child in children {
        child.succeed();
    }
}

/// The parts of anonymous memory that count for these processes, in KiB.
fn proportional(pids: &[i32]) -> u64 {
    let of = |pid: &i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("read smaps_rollup");
        let line = text.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).expect("a share of memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    pids.iter().map(of).sum()
}

/// A family of five that shares 32 MiB, below a parent with memory of its own, of which nothing is shared.
fn relatives_take_no_more_memory_than_before(t: &Trial) {
    const SHARED: usize = 8192;
    const OWN: usize = 256;
    let maker = fork(|| {
        let map = Map::private(pages(SHARED));
        map.fill(0..SHARED, 7);
        let children: Vec<_> = (0..4)
            .map(|number| {
                fork(|| {
                    map.fill(OWN * number..OWN * (number + 1), 8);
                    t.mark(&format!("pid-{}", nix::unistd::getpid()));
                    t.hold();
                    map.check(0..OWN * number, 7);
                    map.check(OWN * number..OWN * (number + 1), 8);
                    map.check(OWN * (number + 1)..SHARED, 7);
                    t.mark(&format!("checked-{number}"));
                    t.await_mark("measured");
                })
            })
            .collect();
        t.hold();
        map.check(0..SHARED, 7);
        t.mark("checked-4");
        t.await_mark("measured");
        children.iter().for_each(|child| child.succeed());
    });
    let pids = || -> Vec<i32> {
        let names = fs::read_dir(t.directory()).expect("read the folder").flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| name.strip_prefix("pid-")?.parse().ok()).collect()
    };
    crate::case::until("the children", || pids().len() == 4);
    let family = [pids(), vec![maker.pid.as_raw(), nix::unistd::getpid().as_raw()]].concat();
    let own = Map::private(pages(1000));
    own.fill(0..1000, 9);
    let before = proportional(&family);
    assert!(before < 48 << 10, "{before} KiB are not shared");
    t.checkpoint();
    own.check(0..1000, 9);
    (0..5).for_each(|number| t.await_mark(&format!("checked-{number}")));
    let after = proportional(&family);
    assert!(after <= before + before * 3 / 100, "{before} KiB have become {after}");
    t.mark("measured");
    maker.succeed();
}

fn pages_written_by_the_child_are_its_own(t: &Trial) {
    let map = Map::private(pages(100));
    map.fill(0..100, 1);
    let child = fork(|| {
        map.fill(50..100, 2);
        // Dropped again: these read as zero, in the child only.
        map.advise(40..50, libc::MADV_DONTNEED).expect("madvise");
        t.mark("child");
        t.hold();
        map.check(0..40, 1);
        map.check_zero(40..50);
        map.check(50..100, 2);
        t.await_mark("looked");
    });
    t.await_mark("child");
    t.checkpoint();
    let shared = same_frames(&map, child.pid.as_raw(), 40);
    assert!(shared >= 38, "only {shared} of 40 pages are shared");
    assert_eq!(same_frames(&map, child.pid.as_raw(), 100), shared);
    map.check(0..100, 1);
    t.mark("looked");
    child.succeed();
}

/// Large enough for others to move it; among what is full are pages of zeros, pages that the program may not read, pages that
/// a child would find empty, and pages that it would not find.
fn large_memory_is_whole_and_nobody_is_left_behind(t: &Trial) {
    const COUNT: usize = 12_000;
    const ZEROS: std::ops::Range<usize> = 3000..3100;
    const HIDDEN: std::ops::Range<usize> = 5000..5200;
    let map = Map::private(pages(COUNT));
    map.fill(0..COUNT, 11);
    ZEROS.for_each(|page| (0..PAGE).for_each(|at| map.set(pages(page) + at, 0)));
    map.advise(7000..7100, libc::MADV_WIPEONFORK).expect("madvise");
    map.advise(8000..8100, libc::MADV_DONTFORK).expect("madvise");
    map.protect(HIDDEN, libc::PROT_NONE);
    t.checkpoint();
    // SAFETY: waits for whatever child there is, and wants no status of it.
    let waited = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
    assert_eq!((waited, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ECHILD)));
    map.protect(HIDDEN, libc::PROT_READ);
    map.check_zero(ZEROS);
    for part in [0..ZEROS.start, ZEROS.end..COUNT] {
        map.check(part, 11);
    }
}
