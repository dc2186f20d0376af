//! Mappings: contents, protections, advice, sharing.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use crate::case;
use crate::case::{Case, Mode, Trial};
use crate::sys::memory::{Map, PAGE, READ, RW};
use crate::sys::process::fork;
use crate::sys::procfs::{self, mapping_at};
use crate::sys::{call, fault, memory, strange};

const NO_RULES: &str = "rules for memory to come are not in its images";

pub const CASES: &[Case] = &[
    case!(protections_fault_as_before).exchange().moves(),
    case!(contents_behind_prot_none_survive).exchange().moves(),
    case!(zero_pages_and_untouched_pages_stay_so).exchange().moves(),
    case!(sparse_mapping_of_64_gib_survives).exchange().moves(),
    case!(ten_thousand_mappings_survive).moves(),
    case!(neighbours_with_other_flags_stay_apart).exchange().moves(),
    case!(neighbours_of_every_protection_keep_their_pages).exchange().moves(),
    case!(advice_is_kept).exchange().moves(),
    case!(huge_pages_that_were_asked_for_are_huge_again).moves().needs(has_huge_pages),
    case!(guard_pages_still_fault).moves().peer_cannot("it does not know guard ranges"),
    case!(grows_down_mapping_still_grows).exchange().moves(),
    case!(stack_still_grows).exchange().moves(),
    case!(program_break_still_moves).moves().exchange(),
    case!(locked_memory_stays_locked).exchange().moves(),
    case!(wipe_on_fork_still_wipes).moves().peer_cannot("this advice is not in its images"),
    case!(dont_fork_still_hides).exchange().moves(),
    case!(shared_anonymous_memory_stays_shared).moves().exchange(),
    case!(shared_anonymous_memory_of_different_protections_is_one_object).exchange().moves(),
    case!(shared_mapping_of_which_each_holds_a_part_survives).exchange().moves(),
    case!(dev_zero_mappings_survive).exchange().moves(),
    case!(executable_memory_still_executes).exchange().moves(),
    case!(moved_vdso_still_works).moves(),
    case!(memfd_with_mappings_survives).exchange().moves(),
    case!(memory_written_meanwhile_is_consistent).moves().restless(),
    case!(mappings_that_come_and_go_meanwhile_are_consistent).moves().restless(),
    case!(program_executed_from_a_memfd_goes_on).moves().restless(),
    case!(droppable_memory_is_not_saved).moves().peer_cannot("it has no such mappings"),
    case!(memory_locked_on_fault_stays_untouched).moves().peer_cannot("it locks and fills all of it"),
    case!(sealed_memory_stays_sealed).moves().peer_cannot("seals of mappings are not in its images"),
    case!(much_memory_is_walked_through).moves(),
    case!(few_pages_of_much_memory_are_touched),
    case!(tebibyte_of_reserved_memory_is_saved_quickly).exchange().moves(),
    case!(sixty_five_thousand_mappings_survive).moves(),
    case!(neighbours_that_grow_down_stay_apart).exchange().moves(),
    case!(grown_down_mapping_that_was_partly_replaced_survives).exchange().moves(),
    case!(shared_mapping_of_dev_zero_stays_shared).exchange().moves(),
    case!(memfd_open_for_reading_alone_survives).exchange().moves(),
    case!(sealed_memfd_stays_sealed).exchange().moves(),
    case!(shared_memory_open_through_map_files_survives).exchange().moves()
        .peer_cannot_in(&[Mode::ToPeer], "it makes a memfd of it"),
    case!(memory_registered_with_a_userfaultfd_is_refused).refused(&["mapping", "userfaultfd"])
        .needs(strange::has_userfaultfd),
    case!(mapped_perf_ring_is_refused).refused(&["mapping", "perf_event"]).needs(strange::has_perf_events),
    case!(mapped_packet_ring_is_refused).refused(&["mapping", "socket"]),
    case!(memory_to_come_is_locked_as_before).moves().peer_cannot(NO_RULES),
    case!(memory_to_come_is_locked_on_fault_as_before).moves().peer_cannot(NO_RULES),
    case!(memory_to_come_is_mergeable_as_before).moves().needs(has_merging).peer_cannot(NO_RULES),
    case!(memory_is_never_both_written_and_executed).moves().killed().needs(has_mdwe).peer_cannot("it cannot enter"),
    case!(huge_pages_that_are_not_asked_for_stay_forbidden).moves().needs(has_thp_exceptions)
        .peer_cannot(NO_RULES),
    case!(memory_of_a_probe_is_refused).refused(&["mapping", "uprobes"]).needs(strange::has_uprobes),
    case!(page_for_old_system_calls_still_answers).needs(has_vsyscall),
    case!(names_of_anonymous_mappings_are_kept).moves().peer_cannot("names of anonymous mappings are not in its images"),
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

fn has_huge_pages() -> Result<(), String> {
    let map = huge_pages();
    let found = mapping_at(map.address).counter("AnonHugePages");
    map.unmap(0..map.length / PAGE);
    if found >= 8 << 10 { Ok(()) } else { Err("the kernel gave no transparent huge pages".into()) }
}

/// 16 MiB behind a bound of huge pages, and some pages before and behind.
fn huge_pages() -> Map {
    let room = Map::anonymous(24 << 20, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let bound = room.address.next_multiple_of(2 << 20) + (2 << 20);
    room.unmap(0..room.length / PAGE);
    let map = Map::private_at(bound - pages(3), (16 << 20) + pages(8), RW);
    map.advise(0..map.length / PAGE, libc::MADV_HUGEPAGE).expect("madvise");
    map.fill(0..map.length / PAGE, 4);
    map
}

fn huge_pages_that_were_asked_for_are_huge_again(t: &Trial) {
    let map = huge_pages();
    let all = map.length / PAGE;
    // A huge page of which a part was never there.
    let sparse = Map::anonymous(8 << 20, RW, libc::MAP_PRIVATE);
    sparse.advise(0..sparse.length / PAGE, libc::MADV_NOHUGEPAGE).expect("madvise");
    sparse.fill(0..700, 5);
    let collapsed = || procfs::vmstat("thp_collapse_alloc");
    let before = collapsed();
    sparse.advise(0..sparse.length / PAGE, libc::MADV_HUGEPAGE).expect("madvise");
    t.checkpoint();
    // Memory that comes later comes in small pages.
    let huge = mapping_at(map.address).counter("AnonHugePages");
    assert!(huge >= 8 << 10 || t.memory_comes_late(), "{huge} kB are in huge pages");
    map.check(0..all, 4);
    // Some may still be on their way.
    sparse.check(0..700, 5);
    let there = procfs::pagemap(sparse.address, sparse.length / PAGE);
    let there = there.iter().filter(|entry| *entry >> 62 != 0).count();
    // Unless the kernel itself was making huge pages meanwhile, here or elsewhere.
    assert!(there == 700 || collapsed() != before, "{there} pages are there, and nobody touched them");
}

/// Few pages are read by the process itself, many are put in by the tool: each for a process with a child that has
/// changed some.
fn neighbours_of_every_protection_keep_their_pages(t: &Trial) {
    const PROTECTIONS: [i32; 5] =
        [RW, libc::PROT_NONE, READ, READ | libc::PROT_EXEC, READ | libc::PROT_WRITE | libc::PROT_EXEC];
    let protection = |page: usize| PROTECTIONS[page % 5];
    let maps = [100, 3000].map(|count| Map::private(pages(count)));
    let each = |map: &Map| 0..map.length / PAGE;
    for map in &maps {
        each(map).filter(|page| page % 3 != 0).for_each(|page| map.fill(page..page + 1, page as u64));
        each(map).for_each(|page| map.protect(page..page + 1, protection(page)));
    }
    let check = |is_child: bool| {
        for map in &maps {
            let mappings = procfs::mappings("self");
            for page in each(map) {
                let at = map.address + pages(page);
                let found = mappings.iter().find(|m| (m.start..m.end).contains(&at)).expect("a mapping");
                let bits = "rwx".chars().zip([READ, libc::PROT_WRITE, libc::PROT_EXEC]);
                let bits = bits.filter(|(letter, _)| found.protection.contains(*letter));
                let bits = bits.fold(0, |bits, (_, bit)| bits | bit);
                assert_eq!(bits, protection(page), "page {page}");
            }
            for page in each(map) {
                map.protect(page..page + 1, RW);
                match page {
                    _ if is_child && page % 7 == 0 => map.check(page..page + 1, 1),
                    _ if page % 3 != 0 => map.check(page..page + 1, page as u64),
                    _ => map.check_zero(page..page + 1),
                }
            }
        }
    };
    let child = fork(|| {
        for map in &maps {
            for page in each(map).filter(|page| page % 7 == 0) {
                map.protect(page..page + 1, RW);
                map.fill(page..page + 1, 1);
                map.protect(page..page + 1, protection(page));
            }
        }
        t.mark("child");
        t.hold();
        check(true);
    });
    t.await_mark("child");
    t.checkpoint();
    check(false);
    child.succeed();
}

fn neighbours_with_other_flags_stay_apart(t: &Trial) {
    let map = Map::private(pages(9));
    map.fill(0..9, 2);
    for (page, advice) in [(1, libc::MADV_DONTFORK), (3, libc::MADV_DONTDUMP), (5, libc::MADV_SEQUENTIAL)] {
        map.advise(page..page + 1, advice).expect("madvise");
    }
    // Until all of it has come, memory that comes later is watched.
    let is_own = |flag: &String| flag != "um";
    let look = || -> Vec<Vec<String>> {
        (0..9).map(|p| mapping_at(map.address + pages(p)).flags.into_iter().filter(is_own).collect()).collect()
    };
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
    let (map, shared) = (Map::private(pages(3)), Map::shared(pages(3)));
    shared.fill(0..2, 3);
    if !fault::name_mapping(&map, c"my pages") || !fault::name_mapping(&shared, c"our pages") {
        t.checkpoint();
        return;
    }
    t.checkpoint();
    assert_eq!(mapping_at(map.address).name, "[anon:my pages]");
    assert_eq!(mapping_at(shared.address).name, "[anon_shmem:our pages]");
    shared.check(0..2, 3);
    assert_eq!(call::gettid(), std::process::id() as i32);
}

/// When this process was started, in ticks since boot: another time after a restore.
fn started() -> String {
    procfs::stat("self").get(19).expect("told").clone()
}

fn droppable_memory_is_not_saved(t: &Trial) {
    /// From linux/mman.h, since 6.11.
    const MAP_DROPPABLE: i32 = 8;
    let map = Map::anonymous(pages(4), RW, MAP_DROPPABLE);
    map.fill(0..4, 1);
    let before = started();
    t.checkpoint();
    assert!(mapping_at(map.address).flags.contains(&"dp".to_owned()), "it is no droppable mapping any more");
    // Random numbers that were drawn in advance must not be drawn twice.
    if started() != before {
        map.check_zero(0..4);
    }
    map.fill(0..4, 2);
}

fn memory_locked_on_fault_stays_untouched(t: &Trial) {
    let map = Map::private(pages(300));
    map.lock_on_fault();
    map.fill(7..9, 1);
    t.checkpoint();
    assert!(mapping_at(map.address).flags.contains(&"lf".to_owned()), "MLOCK_ONFAULT");
    let present = procfs::pagemap(map.address + pages(100), 200).iter().filter(|entry| *entry >> 62 != 0).count();
    assert_eq!(present, 0, "pages nobody touched are there");
    map.check(7..9, 1);
}

fn sealed_memory_stays_sealed(t: &Trial) {
    let map = Map::private(pages(6));
    map.fill(0..6, 1);
    map.protect(2..3, READ);
    if map.seal(1..4).is_err() {
        // Before Linux 6.10 there is nothing to keep.
        t.checkpoint();
        return;
    }
    t.checkpoint();
    for page in 1..4 {
        assert!(!map.can_unmap(page..page + 1), "page {page} can be unmapped");
    }
    assert!(!fault::can_write(map.address + pages(2)));
    map.check(0..6, 1);
    assert!(map.can_unmap(0..1) && map.can_unmap(4..5));
}

fn tebibyte_of_reserved_memory_is_saved_quickly(t: &Trial) {
    let reserved = Map::anonymous(1 << 40, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let usable = Map::anonymous(1 << 40, RW, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    let touched = [0, 1 << 20, (1 << 28) - 1];
    for page in touched {
        usable.fill(page..page + 1, 5);
    }
    let begun = std::time::Instant::now();
    t.checkpoint();
    // Looking at every page of it would take far longer.
    assert!(begun.elapsed().as_secs() < 15, "it took {:?}", begun.elapsed());
    for page in touched {
        usable.check(page..page + 1, 5);
    }
    assert!(!fault::can_read(reserved.address + (1 << 39)));
    assert_eq!(mapping_at(reserved.address).end - reserved.address, 1 << 40);
}

fn sixty_five_thousand_mappings_survive(t: &Trial) {
    // The kernel allows a process 65530, unless it is told otherwise.
    let count = 65_000;
    let map = Map::private(pages(count));
    for page in (0..count).step_by(2) {
        map.protect(page..page + 1, READ);
    }
    for page in (1..count).step_by(200) {
        map.fill(page..page + 1, 5);
    }
    let inside = || {
        let is_inside = |m: &procfs::Mapping| m.start >= map.address && m.end <= map.address + map.length;
        procfs::mappings("self").into_iter().filter(is_inside).count()
    };
    let before = inside();
    assert!(before >= 64_900, "only {before} mappings were made");
    t.checkpoint();
    assert_eq!(inside(), before);
    for page in (1..count).step_by(200) {
        map.check(page..page + 1, 5);
    }
}

/// A place with room around it.
fn free_place(count: usize) -> usize {
    let room = Map::anonymous(pages(count), libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    room.unmap(0..count);
    room.address
}

fn neighbours_that_grow_down_stay_apart(t: &Trial) {
    let place = free_place(3000);
    let lower = Map::grows_down(place + pages(2000), pages(3));
    // Right behind it, and not one with it, for it has another protection.
    let upper = Map::grows_down(place + pages(2003), pages(3));
    upper.protect(0..3, READ | libc::PROT_WRITE | libc::PROT_EXEC);
    lower.fill(0..3, 1);
    upper.fill(0..3, 2);
    t.checkpoint();
    lower.check(0..3, 1);
    upper.check(0..3, 2);
    for map in [lower, upper] {
        assert!(mapping_at(map.address).flags.contains(&"gd".to_owned()));
        assert_eq!(mapping_at(map.address).start, map.address);
    }
    assert!(fault::can_write(lower.address - PAGE), "it should grow");
}

fn grown_down_mapping_that_was_partly_replaced_survives(t: &Trial) {
    let place = free_place(3000);
    let map = Map::grows_down(place + pages(2000), pages(6));
    map.fill(0..6, 1);
    map.renew_page(3);
    map.fill(3..4, 2);
    map.renew_page(0);
    t.checkpoint();
    map.check(1..3, 1);
    map.check(3..4, 2);
    map.check(4..6, 1);
    map.check_zero(0..1);
    let grows = |page: usize| mapping_at(map.address + pages(page)).flags.contains(&"gd".to_owned());
    assert_eq!([0, 1, 3, 4].map(grows), [false, true, false, true]);
}

fn shared_mapping_of_dev_zero_stays_shared(t: &Trial) {
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").expect("open");
    let map = Map::file(zero.as_fd(), pages(3), RW, libc::MAP_SHARED, 0);
    drop(zero);
    map.fill(1..2, 5);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        map.check(1..2, 5);
        map.cell(0).store(4, Ordering::SeqCst);
    });
    t.await_mark("child");
    t.checkpoint();
    crate::case::until("the child's write", || map.cell(0).load(Ordering::SeqCst) == 4);
    map.check_zero(2..3);
    child.succeed();
}

fn memfd_of(count: usize) -> File {
    let fd = nix::sys::memfd::memfd_create("m", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING);
    let file = File::from(fd.expect("memfd_create"));
    file.set_len(pages(count) as u64).expect("grow");
    file
}

fn reopened(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file))).expect("open again")
}

fn memfd_open_for_reading_alone_survives(t: &Trial) {
    let file = memfd_of(3);
    let writer = Map::file(file.as_fd(), pages(3), RW, libc::MAP_SHARED, 0);
    writer.fill(0..3, 1);
    let reader = reopened(&file);
    drop(file);
    let shared = Map::file(reader.as_fd(), pages(3), READ, libc::MAP_SHARED, 0);
    let private = Map::file(reader.as_fd(), pages(3), RW, libc::MAP_PRIVATE, 0);
    private.fill(1..2, 2);
    t.checkpoint();
    writer.set(7, 8);
    assert_eq!((shared.get(7), private.get(7)), (8, 8));
    private.check(1..2, 2);
    private.check(2..3, 1);
    assert!(std::io::Write::write(&mut &reader, b"x").is_err(), "it was open for reading alone");
}

fn sealed_memfd_stays_sealed(t: &Trial) {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let file = memfd_of(2);
    let map = Map::file(file.as_fd(), pages(2), RW, libc::MAP_SHARED, 0);
    map.fill(0..2, 1);
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seal");
    t.checkpoint();
    assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS), Ok(seals.bits()));
    assert!(file.set_len(0).is_err() && file.set_len(1 << 20).is_err());
    map.check(0..2, 1);
}

fn shared_memory_open_through_map_files_survives(t: &Trial) {
    use std::os::unix::fs::FileExt;
    let map = Map::shared(pages(3));
    map.fill(0..3, 1);
    let path = format!("/proc/self/map_files/{:x}-{:x}", map.address, map.address + map.length);
    let file = OpenOptions::new().read(true).write(true).open(path).expect("open");
    t.checkpoint();
    file.write_all_at(&[9], pages(1) as u64).expect("write");
    assert_eq!(map.get(pages(1)), 9);
    map.check(2..3, 1);
}

fn memory_registered_with_a_userfaultfd_is_refused(t: &Trial) {
    let map = Map::private(pages(4));
    map.fill(0..4, 1);
    let fd = strange::userfaultfd().expect("userfaultfd");
    memory::register_userfault(fd.as_fd(), &map);
    t.checkpoint();
    map.check(0..4, 1);
}

fn mapped_perf_ring_is_refused(t: &Trial) {
    let event = strange::perf_event().expect("perf_event_open");
    let map = Map::file(event.as_fd(), pages(2), RW, libc::MAP_SHARED, 0);
    drop(event);
    t.checkpoint();
    assert!(fault::can_read(map.address));
}

fn mapped_packet_ring_is_refused(t: &Trial) {
    let (socket, length) = strange::packet_ring();
    let map = Map::file(socket.as_fd(), length, RW, libc::MAP_SHARED, 0);
    drop(socket);
    t.checkpoint();
    assert!(fault::can_read(map.address));
}

fn mappings_that_come_and_go_meanwhile_are_consistent(t: &Trial) {
    let keep = Map::private(pages(50));
    keep.fill(0..50, 1);
    let child = fork(|| {
        let mut state = 12345_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut maps: Vec<(Map, u64)> = Vec::new();
        let mut round = 0;
        loop {
            match random(4) {
                0 if !maps.is_empty() => {
                    let (map, seed) = maps.swap_remove(random(maps.len() as u64) as usize);
                    map.check(0..map.length / PAGE, seed);
                    map.unmap(0..map.length / PAGE);
                }
                1 if !maps.is_empty() => {
                    let (map, seed) = maps[random(maps.len() as u64) as usize];
                    map.protect(0..map.length / PAGE, READ);
                    map.check(0..map.length / PAGE, seed);
                    map.protect(0..map.length / PAGE, RW);
                }
                _ if maps.len() < 100 => {
                    let count = 1 + random(8) as usize;
                    let map = if random(4) == 0 { Map::shared(pages(count)) } else { Map::private(pages(count)) };
                    map.fill(0..count, round);
                    maps.push((map, round));
                }
                _ => {}
            }
            round += 1;
            if round == 1000 {
                t.mark("busy");
            }
            if round > 1000 && round.is_multiple_of(64) && t.is_over() {
                break;
            }
        }
        maps.iter().for_each(|(map, seed)| map.check(0..map.length / PAGE, *seed));
        keep.check(0..50, 1);
    });
    t.await_mark("busy");
    t.checkpoint();
    child.succeed();
    keep.check(0..50, 1);
}

/// Says that it runs when it has looked at a few pages; then it looks at all.
fn much_memory_is_walked_through(t: &Trial) {
    let count = 16384;
    let map = Map::private(pages(count));
    map.fill(0..count, 8);
    // Pages that are there and hold nothing: not the same as pages that are not there.
    let zeros = Map::private(pages(16));
    (0..16).for_each(|page| zeros.set(pages(page), 0));
    t.checkpoint();
    zeros.check_zero(0..16);
    (0..count).step_by(1024).for_each(|page| map.check(page..page + 1, 8));
    if !t.path("runs").exists() {
        t.mark("runs");
    }
    map.check(0..count, 8);
}

/// The order in which `few_pages_of_much_memory_are_touched` touches pages.
pub const TOUCHED: [usize; 6] = [9000, 100, 15000, 4000, 12000, 700];

/// Touches some pages far from one another, says so, and looks at the others when it is told to, if anybody wants it so.
fn few_pages_of_much_memory_are_touched(t: &Trial) {
    let count = 16384;
    let map = Map::private(pages(count));
    map.fill(0..count, 9);
    fs::write(t.path("where"), map.address.to_string()).expect("write");
    t.checkpoint();
    for (nth, page) in TOUCHED.into_iter().enumerate() {
        map.check(page..page + 1, 9);
        if nth == 0 && t.path("pauses").exists() {
            t.await_mark("on");
        }
    }
    if t.path("slowly").exists() {
        t.mark("touched");
        t.await_mark("all");
    }
    map.check(0..count, 9);
}

fn program_executed_from_a_memfd_goes_on(t: &Trial) {
    let go = t.path(crate::case::GO);
    let child = fork(|| {
        let fd = nix::sys::memfd::memfd_create("program", nix::sys::memfd::MFdFlags::empty());
        let mut program = File::from(fd.expect("memfd_create"));
        std::io::copy(&mut File::open("/bin/sh").expect("open"), &mut program).expect("copy");
        let script = std::ffi::CString::new(format!("until test -e {}; do :; done; exit 7", go.display()));
        let arguments = [c"sh", c"-c", &*script.expect("no zero")];
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&program));
        nix::unistd::execv(&std::ffi::CString::new(path).expect("no zero"), &arguments).expect("execv");
    });
    let name = || fs::read_link(format!("/proc/{}/exe", child.pid)).expect("link");
    crate::case::until("the program", || name().to_str() == Some("/memfd:program (deleted)"));
    t.checkpoint();
    // It may have ended already.
    assert_eq!(child.wait(), nix::sys::wait::WaitStatus::Exited(child.pid, 7));
}

#[inline(never)]
fn probed() {
    std::hint::black_box(probed as fn());
}

fn memory_of_a_probe_is_refused(t: &Trial) {
    let probe = strange::uprobe(probed).expect("a probe");
    // Whoever comes by gets a page for the instructions that were replaced.
    probed();
    drop(probe);
    let has_page = || procfs::mappings("self").iter().any(|mapping| mapping.name == "[uprobes]");
    assert!(has_page());
    t.checkpoint();
    assert!(has_page());
}

fn has_vsyscall() -> Result<(), String> {
    let is_there = procfs::mappings("self").iter().any(|mapping| mapping.name == "[vsyscall]");
    if is_there { Ok(()) } else { Err("this kernel has no page for old system calls".into()) }
}

fn page_for_old_system_calls_still_answers(t: &Trial) {
    let seconds = || std::time::SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs() as i64;
    // It tells the time of the last tick.
    let is_right = || {
        let (from, told, to) = (seconds() - 1, call::old_time(), seconds());
        (from..=to).contains(&told)
    };
    assert!(is_right());
    t.checkpoint();
    assert!(is_right());
}

fn flags_of_new_memory() -> Vec<String> {
    let map = Map::private(pages(3));
    map.set(0, 1);
    mapping_at(map.address).flags
}

fn memory_to_come_is_locked_as_before(t: &Trial) {
    memory::lock_future(libc::MCL_FUTURE);
    let child = fork(|| {
        // It is not inherited.
        t.mark("child");
        t.hold();
        assert!(!flags_of_new_memory().contains(&"lo".to_owned()));
    });
    t.await_mark("child");
    t.checkpoint();
    let flags = flags_of_new_memory();
    assert!(flags.contains(&"lo".to_owned()) && !flags.contains(&"lf".to_owned()), "{flags:?}");
    child.succeed();
}

fn memory_to_come_is_locked_on_fault_as_before(t: &Trial) {
    memory::lock_future(libc::MCL_FUTURE | libc::MCL_ONFAULT);
    t.checkpoint();
    let flags = flags_of_new_memory();
    assert!(flags.contains(&"lo".to_owned()) && flags.contains(&"lf".to_owned()), "{flags:?}");
}

const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

fn knows(option: i32) -> Result<(), String> {
    call::try_prctl(option, [0; 4]).map(drop).map_err(|e| format!("this kernel knows no prctl {option}: {e}"))
}

fn has_merging() -> Result<(), String> {
    knows(PR_GET_MEMORY_MERGE)
}

fn has_mdwe() -> Result<(), String> {
    knows(PR_GET_MDWE)
}

fn memory_to_come_is_mergeable_as_before(t: &Trial) {
    call::prctl(PR_SET_MEMORY_MERGE, [1, 0, 0, 0]);
    let (merged, own) = (Map::private(pages(4)), Map::private(pages(4)));
    merged.fill(0..4, 1);
    own.fill(0..4, 2);
    own.advise(0..4, libc::MADV_UNMERGEABLE).expect("madvise");
    let is_mergeable = |map: &Map| mapping_at(map.address).flags.contains(&"mg".to_owned());
    assert!(is_mergeable(&merged) && !is_mergeable(&own));
    t.checkpoint();
    assert!(is_mergeable(&merged) && !is_mergeable(&own));
    assert_eq!(call::prctl(PR_GET_MEMORY_MERGE, [0; 4]), 1);
    assert!(flags_of_new_memory().contains(&"mg".to_owned()));
}

fn memory_is_never_both_written_and_executed(t: &Trial) {
    call::prctl(PR_SET_MDWE, [1, 0, 0, 0]);
    let map = Map::private(pages(2));
    map.fill(0..2, 1);
    let both = || memory::can_map(RW | libc::PROT_EXEC);
    assert!(!both() && memory::can_map(READ | libc::PROT_EXEC));
    t.checkpoint();
    assert_eq!(call::prctl(PR_GET_MDWE, [0; 4]), 1);
    assert!(!both() && memory::can_map(READ | libc::PROT_EXEC));
    map.check(0..2, 1);
    fork(|| assert!(!both())).succeed();
}

/// Huge pages where they are asked for, and nowhere else: Linux 6.18.
const PR_THP_DISABLE_EXCEPT_ADVISED: u64 = 2;

fn has_thp_exceptions() -> Result<(), String> {
    let set = |on, flags| call::try_prctl(libc::PR_SET_THP_DISABLE, [on, flags, 0, 0]);
    let known = set(1, PR_THP_DISABLE_EXCEPT_ADVISED).map_err(|e| format!("no such exception here: {e}"));
    let _ = set(0, 0);
    known.map(drop)
}

fn huge_pages_that_are_not_asked_for_stay_forbidden(t: &Trial) {
    call::prctl(libc::PR_SET_THP_DISABLE, [1, PR_THP_DISABLE_EXCEPT_ADVISED, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl(libc::PR_GET_THP_DISABLE, [0; 4]), 1 | PR_THP_DISABLE_EXCEPT_ADVISED as i32);
}
