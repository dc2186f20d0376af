//! Mappings: contents, protections, advice, sharing.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::memory::{Map, PAGE, READ, RW};
use crate::sys::process::fork;
use crate::sys::procfs::{self, mapping_at};
use crate::sys::{call, fault};

pub const CASES: &[Case] = &[
    case!(protections_fault_as_before),
    case!(contents_behind_prot_none_survive),
    case!(zero_pages_and_untouched_pages_stay_so),
    case!(sparse_mapping_of_64_gib_survives),
    case!(ten_thousand_mappings_survive),
    case!(neighbours_with_other_flags_stay_apart),
    case!(advice_is_kept),
    case!(guard_pages_still_fault).peer_cannot("it does not know guard ranges"),
    case!(grows_down_mapping_still_grows),
    case!(stack_still_grows),
    case!(program_break_still_moves).exchange(),
    case!(locked_memory_stays_locked),
    case!(wipe_on_fork_still_wipes).peer_cannot("this advice is not in its images"),
    case!(dont_fork_still_hides),
    case!(memory_shared_with_a_child_copy_on_write_stays_shared),
    case!(memory_of_five_children_is_shared_again)
        .peer_cannot("mappings whose bounds differ in parent and child are not shared"),
    case!(pages_written_by_the_child_are_its_own),
    case!(shared_anonymous_memory_stays_shared).exchange(),
    case!(shared_anonymous_memory_of_different_protections_is_one_object),
    case!(shared_mapping_of_which_each_holds_a_part_survives),
    case!(private_file_mapping_keeps_dirty_pages).exchange(),
    case!(shared_file_mapping_writes_to_the_file).exchange(),
    case!(file_mapping_with_an_offset_survives),
    case!(file_mapping_beyond_the_end_still_faults),
    case!(mapped_file_that_was_deleted_survives).not_yet("unlinked files"),
    case!(mapping_of_a_closed_file_survives),
    case!(dev_zero_mappings_survive),
    case!(executable_memory_still_executes),
    case!(moved_vdso_still_works),
    case!(memfd_with_mappings_survives),
    case!(memory_written_meanwhile_is_consistent).restless(),
    case!(names_of_anonymous_mappings_are_kept).peer_cannot("names of anonymous mappings are not in its images"),
];

fn pages(count: usize) -> usize {
    count * PAGE
}

fn protections_fault_as_before(t: &Trial) {
    let map = Map::private(pages(6));
    map.fill(0..6, 1);
    map.protect(0..1, libc::PROT_NONE);
    map.protect(2..3, READ);
    map.protect(4..5, libc::PROT_READ | libc::PROT_EXEC);
    let check = || {
        assert!(!fault::can_read(map.address));
        for page in [1, 2, 3, 4, 5] {
            assert!(fault::can_read(map.address + pages(page)), "page {page}");
        }
        for (page, writable) in [(1, true), (2, false), (3, true), (4, false), (5, true)] {
            assert_eq!(fault::can_write(map.address + pages(page)), writable, "page {page}");
        }
    };
    check();
    t.checkpoint();
    check();
    map.check(1..6, 1);
}

fn contents_behind_prot_none_survive(t: &Trial) {
    let map = Map::private(pages(50));
    map.fill(0..50, 9);
    map.protect(0..50, libc::PROT_NONE);
    t.checkpoint();
    assert!(!fault::can_read(map.address));
    map.protect(0..50, RW);
    map.check(0..50, 9);
}

fn zero_pages_and_untouched_pages_stay_so(t: &Trial) {
    let map = Map::private(pages(300));
    // Written with zeroes, only read, untouched, filled.
    for page in 0..100 {
        map.set(pages(page), 0);
        assert_eq!(map.get(pages(100 + page)), 0);
    }
    map.fill(299..300, 4);
    t.checkpoint();
    let present = procfs::pagemap(map.address + pages(200), 99).iter().filter(|entry| *entry >> 62 != 0).count();
    assert_eq!(present, 0, "pages nobody touched are there");
    map.check_zero(0..299);
    map.check(299..300, 4);
}

fn sparse_mapping_of_64_gib_survives(t: &Trial) {
    let map = Map::anonymous(64 << 30, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let touched: Vec<usize> = (0..64).map(|gib| (gib << 18) + gib * 37).collect();
    for page in &touched {
        map.fill(*page..*page + 2, 6);
    }
    t.checkpoint();
    for page in &touched {
        map.check(*page..*page + 2, 6);
        map.check_zero(*page + 2..*page + 4);
    }
    assert!(mapping_at(map.address).flags.contains(&"nr".to_owned()), "MAP_NORESERVE");
}

fn ten_thousand_mappings_survive(t: &Trial) {
    let map = Map::private(pages(20_000));
    for page in (0..20_000).step_by(2) {
        map.protect(page..page + 1, READ);
    }
    for page in (1..20_000).step_by(20) {
        map.fill(page..page + 1, 5);
    }
    t.checkpoint();
    for page in (1..20_000).step_by(20) {
        map.check(page..page + 1, 5);
    }
    let inside = procfs::mappings("self")
        .into_iter()
        .filter(|m| m.start >= map.address && m.end <= map.address + map.length)
        .count();
    assert!(inside >= 19_990, "{inside} mappings are left");
}

fn neighbours_with_other_flags_stay_apart(t: &Trial) {
    let map = Map::private(pages(9));
    map.fill(0..9, 2);
    for (page, advice) in [(1, libc::MADV_DONTFORK), (3, libc::MADV_DONTDUMP), (5, libc::MADV_SEQUENTIAL)] {
        map.advise(page..page + 1, advice).expect("madvise");
    }
    let look = || -> Vec<Vec<String>> { (0..9).map(|p| mapping_at(map.address + pages(p)).flags).collect() };
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
    map.check(0..9, 2);
}

fn advice_is_kept(t: &Trial) {
    let wanted = [
        ("sr", libc::MADV_SEQUENTIAL),
        ("rr", libc::MADV_RANDOM),
        ("dc", libc::MADV_DONTFORK),
        ("dd", libc::MADV_DONTDUMP),
        ("mg", libc::MADV_MERGEABLE),
        ("hg", libc::MADV_HUGEPAGE),
        ("nh", libc::MADV_NOHUGEPAGE),
    ];
    let maps: Vec<_> = wanted
        .iter()
        .filter_map(|(flag, advice)| {
            let map = Map::private(pages(4));
            map.fill(1..2, 3);
            // A kernel without huge pages or KSM says EINVAL: then there is nothing to keep.
            map.advise(0..4, *advice).ok()?;
            assert!(mapping_at(map.address).flags.contains(&(*flag).to_owned()), "{flag} was not set");
            Some((*flag, map))
        })
        .collect();
    t.checkpoint();
    for (flag, map) in maps {
        assert!(mapping_at(map.address).flags.contains(&flag.to_owned()), "{flag} was lost");
        map.check(1..2, 3);
    }
}

fn guard_pages_still_fault(t: &Trial) {
    /// From linux/mman.h, since 6.13.
    const MADV_GUARD_INSTALL: i32 = 102;
    let map = Map::private(pages(8));
    map.fill(0..8, 1);
    if map.advise(2..4, MADV_GUARD_INSTALL).is_err() {
        t.checkpoint();
        return;
    }
    t.checkpoint();
    for page in 0..8 {
        assert_eq!(fault::can_read(map.address + pages(page)), !(2..4).contains(&page), "page {page}");
    }
    map.check(0..2, 1);
    map.check(4..8, 1);
    assert!(mapping_at(map.address).length_is(8));
}

impl procfs::Mapping {
    /// Is it at least that many pages long?
    fn length_is(&self, count: usize) -> bool {
        self.end - self.start >= pages(count)
    }
}

fn grows_down_mapping_still_grows(t: &Trial) {
    // Room below for it to grow into, with the gap that the kernel keeps to the next mapping.
    let room = Map::anonymous(pages(2048), libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    room.unmap(0..2048);
    let top = room.address + pages(2040);
    let map = Map::grows_down(top, pages(2));
    map.fill(0..2, 1);
    t.checkpoint();
    assert!(mapping_at(top).flags.contains(&"gd".to_owned()));
    map.check(0..2, 1);
    assert!(fault::can_write(top - PAGE), "it should grow");
    assert!(mapping_at(top - PAGE).flags.contains(&"gd".to_owned()));
}

fn deepen(depth: usize) -> usize {
    let frame = std::hint::black_box([depth as u8; 2048]);
    if depth == 0 { frame[7] as usize } else { deepen(depth - 1) + usize::from(frame[depth % 2048] == depth as u8) }
}

fn stack_still_grows(t: &Trial) {
    assert_eq!(deepen(10), 10);
    t.checkpoint();
    // About 4 MiB of the 8 that are usual.
    assert_eq!(deepen(1500), 1500);
}

fn program_break_still_moves(t: &Trial) {
    let before = fault::program_break(0);
    let start = fault::program_break(1 << 20);
    t.checkpoint();
    assert_eq!(fault::program_break(0), start + (1 << 20));
    assert!(start >= before);
    assert!(fault::can_write(start + 100));
    assert_eq!(fault::program_break(1 << 16), start + (1 << 20));
    assert!(fault::can_write(start + (1 << 20) + 100));
}

fn locked_memory_stays_locked(t: &Trial) {
    let map = Map::private(pages(10));
    map.fill(0..10, 1);
    map.lock(2..5);
    assert_eq!(procfs::status("self", "VmLck"), "12 kB");
    t.checkpoint();
    assert_eq!(procfs::status("self", "VmLck"), "12 kB");
    assert!(mapping_at(map.address + pages(2)).flags.contains(&"lo".to_owned()));
    assert!(!mapping_at(map.address).flags.contains(&"lo".to_owned()));
    map.check(0..10, 1);
}

fn wipe_on_fork_still_wipes(t: &Trial) {
    let map = Map::private(pages(4));
    map.fill(0..4, 1);
    map.advise(0..4, libc::MADV_WIPEONFORK).expect("madvise");
    t.checkpoint();
    map.check(0..4, 1);
    fork(|| map.check_zero(0..4)).succeed();
}

fn dont_fork_still_hides(t: &Trial) {
    let map = Map::private(pages(4));
    map.fill(0..4, 1);
    map.advise(0..4, libc::MADV_DONTFORK).expect("madvise");
    t.checkpoint();
    map.check(0..4, 1);
    fork(|| assert!(!fault::can_read(map.address))).succeed();
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

fn shared_anonymous_memory_stays_shared(t: &Trial) {
    let map = Map::shared(pages(100));
    map.fill(10..60, 8);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        map.check(10..60, 8);
        map.fill(60..61, 9);
        map.cell(0).store(1, Ordering::SeqCst);
        crate::case::until("the answer", || map.cell(4).load(Ordering::SeqCst) == 2);
    });
    t.await_mark("child");
    t.checkpoint();
    crate::case::until("the child's write", || map.cell(0).load(Ordering::SeqCst) == 1);
    map.check(60..61, 9);
    map.check_zero(61..100);
    map.cell(4).store(2, Ordering::SeqCst);
    child.succeed();
}

fn shared_anonymous_memory_of_different_protections_is_one_object(t: &Trial) {
    let map = Map::shared(pages(10));
    map.fill(0..10, 8);
    let child = fork(|| {
        map.protect(0..10, READ);
        t.mark("child");
        t.hold();
        map.check(0..5, 8);
        crate::case::until("the write", || map.get(pages(9)) == 77);
    });
    t.await_mark("child");
    t.checkpoint();
    map.set(pages(9), 77);
    child.succeed();
}

fn shared_mapping_of_which_each_holds_a_part_survives(t: &Trial) {
    let map = Map::shared(pages(30));
    map.fill(0..30, 3);
    let child = fork(|| {
        map.unmap(0..10);
        t.mark("child");
        t.hold();
        map.check(10..30, 3);
        map.fill(10..11, 4);
        t.mark("written");
    });
    t.await_mark("child");
    map.unmap(20..30);
    t.checkpoint();
    map.check(0..10, 3);
    t.await_mark("written");
    map.check(10..11, 4);
    child.succeed();
}

fn data_file(t: &Trial, count: usize) -> File {
    let bytes: Vec<u8> = (0..pages(count)).map(|i| (i / PAGE + i % 253) as u8).collect();
    fs::write(t.path("data"), bytes).expect("write");
    OpenOptions::new().read(true).write(true).open(t.path("data")).expect("open")
}

fn expected(offset: usize) -> u8 {
    (offset / PAGE + offset % 253) as u8
}

fn private_file_mapping_keeps_dirty_pages(t: &Trial) {
    let file = data_file(t, 10);
    let map = Map::file(file.as_fd(), pages(10), RW, libc::MAP_PRIVATE, 0);
    map.fill(3..5, 6);
    t.checkpoint();
    map.check(3..5, 6);
    for page in [0, 1, 2, 5, 9] {
        assert_eq!(map.get(pages(page) + 17), expected(pages(page) + 17));
    }
    let bytes = fs::read(t.path("data")).expect("read");
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == expected(i)), "the file itself has changed");
}

fn shared_file_mapping_writes_to_the_file(t: &Trial) {
    let file = data_file(t, 4);
    let map = Map::file(file.as_fd(), pages(4), RW, libc::MAP_SHARED, 0);
    map.set(100, 200);
    t.checkpoint();
    map.set(pages(2), 201);
    let bytes = fs::read(t.path("data")).expect("read");
    assert_eq!((bytes[100], bytes[pages(2)]), (200, 201));
    assert_eq!(map.get(pages(3) + 1), expected(pages(3) + 1));
}

fn file_mapping_with_an_offset_survives(t: &Trial) {
    let file = data_file(t, 10);
    let map = Map::file(file.as_fd(), pages(3), READ, libc::MAP_SHARED, pages(5) as i64);
    t.checkpoint();
    assert_eq!(map.get(9), expected(pages(5) + 9));
    assert_eq!(mapping_at(map.address).offset, pages(5) as u64);
}

fn file_mapping_beyond_the_end_still_faults(t: &Trial) {
    let file = data_file(t, 2);
    let map = Map::file(file.as_fd(), pages(4), RW, libc::MAP_SHARED, 0);
    assert!(!fault::can_read(map.address + pages(3)));
    t.checkpoint();
    assert!(fault::can_read(map.address + PAGE));
    assert!(!fault::can_read(map.address + pages(3)));
    file.set_len(pages(4) as u64).expect("grow");
    assert_eq!(map.get(pages(3)), 0);
}

fn mapped_file_that_was_deleted_survives(t: &Trial) {
    let file = data_file(t, 5);
    let shared = Map::file(file.as_fd(), pages(5), RW, libc::MAP_SHARED, 0);
    let private = Map::file(file.as_fd(), pages(5), RW, libc::MAP_PRIVATE, 0);
    private.fill(1..2, 3);
    drop(file);
    fs::remove_file(t.path("data")).expect("remove");
    t.checkpoint();
    private.check(1..2, 3);
    assert_eq!(shared.get(pages(4) + 3), expected(pages(4) + 3));
    // One file still: what is written through one mapping is seen through the other.
    shared.set(pages(3), 99);
    assert_eq!(private.get(pages(3)), 99);
}

fn mapping_of_a_closed_file_survives(t: &Trial) {
    let map = Map::file(data_file(t, 3).as_fd(), pages(3), RW, libc::MAP_SHARED, 0);
    t.checkpoint();
    map.set(7, 70);
    assert_eq!(fs::read(t.path("data")).expect("read")[7], 70);
}

fn dev_zero_mappings_survive(t: &Trial) {
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").expect("open");
    let private = Map::file(zero.as_fd(), pages(3), RW, libc::MAP_PRIVATE, 0);
    private.fill(1..2, 5);
    t.checkpoint();
    private.check(1..2, 5);
    private.check_zero(2..3);
}

fn executable_memory_still_executes(t: &Trial) {
    let map = Map::private(PAGE);
    let code = fault::code_that_returns(42);
    for (offset, byte) in code.iter().enumerate() {
        map.set(offset, *byte);
    }
    map.protect(0..1, libc::PROT_READ | libc::PROT_EXEC);
    t.checkpoint();
    assert_eq!(fault::run(&map), 42);
}

fn moved_vdso_still_works(t: &Trial) {
    let moved = fault::move_vdso();
    let before = fault::time_through(&moved);
    t.checkpoint();
    for _ in 0..1000 {
        assert!(fault::time_through(&moved) >= before);
    }
}

fn memfd_with_mappings_survives(t: &Trial) {
    let name = nix::sys::memfd::memfd_create("a name", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING);
    let file = File::from(name.expect("memfd_create"));
    file.set_len(pages(4) as u64).expect("grow");
    let shared = Map::file(file.as_fd(), pages(4), RW, libc::MAP_SHARED, 0);
    let private = Map::file(file.as_fd(), pages(4), RW, libc::MAP_PRIVATE, 0);
    shared.fill(0..4, 1);
    private.fill(2..3, 2);
    t.checkpoint();
    shared.check(0..4, 1);
    private.check(2..3, 2);
    private.check(3..4, 1);
    shared.set(0, 50);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, 0).expect("read");
    assert_eq!(byte, [50]);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    assert_eq!(fs::read_link(path).expect("link").to_str(), Some("/memfd:a name (deleted)"));
}

fn memory_written_meanwhile_is_consistent(t: &Trial) {
    // A writer goes round and round: the pages before its place have the new number, those behind the old.
    let count = 500;
    let map = Map::private(pages(count));
    let child = fork(|| {
        let mut round = 1_u32;
        loop {
            for page in 0..count {
                map.cell(pages(page)).store(round, Ordering::SeqCst);
            }
            if round == 3 {
                t.mark("busy");
            }
            if t.is_over() && round > 5 {
                return;
            }
            for page in 0..count {
                assert_eq!(map.cell(pages(page)).load(Ordering::SeqCst), round, "page {page}");
            }
            round += 1;
        }
    });
    t.await_mark("busy");
    t.checkpoint();
    child.succeed();
}

fn names_of_anonymous_mappings_are_kept(t: &Trial) {
    let map = Map::private(pages(3));
    if !fault::name_mapping(&map, c"my pages") {
        t.checkpoint();
        return;
    }
    t.checkpoint();
    assert_eq!(mapping_at(map.address).name, "[anon:my pages]");
    assert_eq!(call::gettid(), std::process::id() as i32);
}
