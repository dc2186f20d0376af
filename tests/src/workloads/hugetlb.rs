//! Memory of huge pages, of 2 MiB.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::memory::{Map, PAGE, READ, RW};
use crate::sys::process::fork;
use crate::sys::procfs::{mapping_at, pagemap_of};
use crate::sys::{fault, shm};

const HUGE: usize = 2 << 20;
/// Pages of one huge page.
const PAGES: usize = HUGE / PAGE;
/// What is lent to a trial: enough for what it has, and for what a restore makes of it.
const LENT: u64 = 24;

pub const CASES: &[Case] = &[
    case!(private_huge_pages_survive).moves().huge_pages(LENT).exchange(),
    case!(huge_pages_of_one_size_by_its_number_survive).exchange().moves().huge_pages(LENT),
    case!(protected_huge_pages_survive).exchange().moves().huge_pages(LENT),
    case!(shared_huge_pages_stay_shared_with_a_child).moves().huge_pages(LENT).exchange(),
    case!(private_huge_pages_of_relatives_differ).huge_pages(LENT),
    case!(huge_pages_changed_before_the_dump_are_new).moves().huge_pages(LENT),
    case!(memfd_of_huge_pages_survives).moves().huge_pages(LENT).exchange(),
    case!(sealed_memfd_of_huge_pages_stays_sealed).exchange().moves().huge_pages(LENT),
    case!(segment_of_huge_pages_survives).moves().huge_pages(LENT),
    case!(named_file_of_huge_pages_survives).huge_pages(LENT).outside(mounted),
    case!(deleted_file_of_huge_pages_survives).huge_pages(LENT).outside(mounted).options(&["--ghost-limit=16M"]),
    case!(huge_pages_that_are_short_are_missed_before_anything_is_made).huge_pages(LENT).outside(short)
        .restore_refused(&["huge pages", "are free", "vm.nr_hugepages"]),
];

fn private(count: usize) -> Map {
    Map::anonymous(count * HUGE, RW, libc::MAP_PRIVATE | libc::MAP_HUGETLB)
}

fn shared(count: usize) -> Map {
    Map::anonymous(count * HUGE, RW, libc::MAP_SHARED | libc::MAP_HUGETLB)
}

#[track_caller]
fn is_huge(map: &Map) {
    assert!(mapping_at(map.address).flags.contains(&"ht".to_owned()), "these are no huge pages");
}

/// Is this huge page there?
fn is_there(map: &Map, number: usize) -> bool {
    pagemap_of("self", map.address + number * HUGE, 1)[0] >> 63 == 1
}

fn private_huge_pages_survive(t: &Trial) {
    let map = private(5);
    // One whole, a few pages of one, one of zeros, and two that nobody has touched.
    map.fill(0..PAGES, 1);
    map.fill(PAGES + 7..PAGES + 9, 2);
    map.set(2 * HUGE, 0);
    t.checkpoint();
    is_huge(&map);
    assert!(!is_there(&map, 3) && !is_there(&map, 4), "pages that nobody touched are there");
    map.check(0..PAGES, 1);
    map.check_zero(PAGES..PAGES + 7);
    map.check(PAGES + 7..PAGES + 9, 2);
    map.check_zero(PAGES + 9..5 * PAGES);
    map.fill(4 * PAGES..5 * PAGES, 3);
}

fn huge_pages_of_one_size_by_its_number_survive(t: &Trial) {
    let map = Map::anonymous(2 * HUGE, RW, libc::MAP_PRIVATE | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB);
    map.fill(PAGES..2 * PAGES, 1);
    t.checkpoint();
    is_huge(&map);
    map.check_zero(0..PAGES);
    map.check(PAGES..2 * PAGES, 1);
}

fn protected_huge_pages_survive(t: &Trial) {
    let map = private(4);
    map.fill(0..4 * PAGES, 1);
    map.protect(PAGES..2 * PAGES, READ);
    map.protect(2 * PAGES..3 * PAGES, libc::PROT_NONE);
    map.unmap(3 * PAGES..4 * PAGES);
    t.checkpoint();
    map.check(0..2 * PAGES, 1);
    assert!(!fault::can_write(map.address + HUGE) && !fault::can_read(map.address + 2 * HUGE));
    assert!(!fault::can_read(map.address + 3 * HUGE));
    map.protect(2 * PAGES..3 * PAGES, READ);
    map.check(2 * PAGES..3 * PAGES, 1);
    is_huge(&map);
}

fn shared_huge_pages_stay_shared_with_a_child(t: &Trial) {
    let map = shared(3);
    map.fill(0..5, 1);
    map.fill(2 * PAGES..3 * PAGES, 2);
    let child = fork(|| {
        map.protect(0..PAGES, READ);
        t.mark("child");
        t.hold();
        map.check(1..5, 1);
        map.cell(HUGE).store(7, Ordering::SeqCst);
        crate::case::until("the answer", || map.cell(HUGE + 4).load(Ordering::SeqCst) == 8);
        assert!(!fault::can_write(map.address));
    });
    t.await_mark("child");
    t.checkpoint();
    is_huge(&map);
    crate::case::until("the child's write", || map.cell(HUGE).load(Ordering::SeqCst) == 7);
    map.cell(HUGE + 4).store(8, Ordering::SeqCst);
    map.check(0..5, 1);
    map.check_zero(5..PAGES);
    map.check(2 * PAGES..3 * PAGES, 2);
    child.succeed();
}

fn private_huge_pages_of_relatives_differ(t: &Trial) {
    let map = private(4);
    map.fill(0..3 * PAGES, 1);
    let child = fork(|| {
        // The first stays the parent's; of the second a page is changed; the third is dropped and begun anew.
        map.fill(PAGES + 3..PAGES + 4, 2);
        map.advise(2 * PAGES..3 * PAGES, libc::MADV_DONTNEED).expect("madvise");
        map.fill(2 * PAGES + 5..2 * PAGES + 6, 3);
        t.mark("child");
        t.hold();
        map.check(0..PAGES + 3, 1);
        map.check(PAGES + 3..PAGES + 4, 2);
        map.check(PAGES + 4..2 * PAGES, 1);
        map.check_zero(2 * PAGES..2 * PAGES + 5);
        map.check(2 * PAGES + 5..2 * PAGES + 6, 3);
        map.check_zero(2 * PAGES + 6..3 * PAGES);
        is_huge(&map);
        t.await_mark("compared");
    });
    t.await_mark("child");
    t.checkpoint();
    let frame = |of: &str, number: usize| pagemap_of(of, map.address + number * HUGE, 1)[0] & ((1 << 55) - 1);
    let other = child.pid.to_string();
    let is_shared = |number| frame("self", number) == frame(&other, number);
    assert_eq!([0, 1, 2].map(is_shared), [true, false, false], "which pages the child has in common");
    t.mark("compared");
    child.succeed();
    map.check(0..3 * PAGES, 1);
    map.check_zero(3 * PAGES..4 * PAGES);
}

fn huge_pages_changed_before_the_dump_are_new(t: &Trial) {
    // Written again and again, also between saves of memory: the last number is the one that counts.
    let map = private(2);
    let other = shared(2);
    map.fill(0..2 * PAGES, 1);
    let child = fork(|| {
        let mut round = 1;
        t.mark("busy");
        while !t.is_over() {
            map.cell(HUGE).store(round, Ordering::SeqCst);
            map.cell(8).store(round, Ordering::SeqCst);
            other.cell(0).store(round, Ordering::SeqCst);
            assert_eq!(map.cell(HUGE).load(Ordering::SeqCst), round);
            assert_eq!(map.cell(8).load(Ordering::SeqCst), round);
            assert_eq!(other.cell(0).load(Ordering::SeqCst), round);
            round += 1;
            crate::sys::nap();
        }
        map.check(1..PAGES, 1);
    });
    t.await_mark("busy");
    t.checkpoint();
    child.succeed();
    map.check(0..2 * PAGES, 1);
}

fn memfd(name: &std::ffi::CStr, count: usize) -> File {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(name, flags).expect("memfd_create"));
    file.set_len((count * HUGE) as u64).expect("grow");
    file
}

fn memfd_of_huge_pages_survives(t: &Trial) {
    let file = memfd(c"huge", 3);
    file_survives(t, &file);
    assert_eq!(file.metadata().expect("stat").len(), 3 * HUGE as u64);
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, HUGE as u64 + 9).expect("read");
    assert_eq!(byte, [77]);
}

fn sealed_memfd_of_huge_pages_stays_sealed(t: &Trial) {
    let file = memfd(c"sealed", 1);
    let map = Map::file(file.as_fd(), HUGE, RW, libc::MAP_SHARED, 0);
    map.fill(0..PAGES, 1);
    map.unmap(0..PAGES);
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("seal");
    t.checkpoint();
    assert_eq!(fcntl(&file, FcntlArg::F_GET_SEALS).expect("ask"), seals.bits());
    Map::file(file.as_fd(), HUGE, READ, libc::MAP_PRIVATE, 0).check(0..PAGES, 1);
}

fn segment_of_huge_pages_survives(t: &Trial) {
    let id = shm::make(0x6875_6765, 2 * HUGE - PAGE, 0o600 | libc::SHM_HUGETLB);
    let segment = shm::attach(id, 2 * HUGE, 0);
    segment.put(0, 5);
    segment.put(HUGE + 80, 6);
    let size = shm::stat(id).shm_segsz;
    t.checkpoint();
    assert_eq!((segment.get(0), segment.get(8), segment.get(HUGE + 80)), (5, 0, 6));
    assert_eq!((shm::stat(id).shm_segsz, shm::find(0x6875_6765)), (size, Some(id)));
    assert!(mapping_at(segment.address).flags.contains(&"ht".to_owned()), "these are no huge pages");
    shm::remove(id);
}

/// A file system of huge pages that is there all the time.
fn mounted(outside: &mut Outside, moment: Moment) {
    if moment == Moment::Begin {
        let place = outside.directory.join("huge");
        std::fs::create_dir(&place).expect("mkdir");
        let kind = Some("hugetlbfs");
        nix::mount::mount(kind, &place, kind, nix::mount::MsFlags::empty(), None::<&str>).expect("mount hugetlbfs");
    }
}

fn named_file(t: &Trial, length: usize) -> std::fs::File {
    let mut how = std::fs::OpenOptions::new();
    let file = how.read(true).write(true).create(true).truncate(true).open(t.path("huge/file")).expect("create");
    file.set_len(length as u64).expect("set its length");
    file
}

/// Of a file of three pages: all of it, a copy of the second page that is changed, and one that is not.
fn file_survives(t: &Trial, file: &std::fs::File) {
    let whole = Map::file(file.as_fd(), 3 * HUGE, RW, libc::MAP_SHARED, 0);
    let own = Map::file(file.as_fd(), HUGE, RW, libc::MAP_PRIVATE, HUGE as i64);
    let untouched = Map::file(file.as_fd(), HUGE, RW, libc::MAP_PRIVATE, HUGE as i64);
    whole.fill(3..PAGES + 40, 1);
    own.fill(4..5, 2);
    t.checkpoint();
    is_huge(&whole);
    is_huge(&own);
    whole.check_zero(0..3);
    whole.check(3..PAGES + 40, 1);
    whole.check_zero(PAGES + 40..3 * PAGES);
    own.check(4..5, 2);
    whole.set(HUGE + 9, 77);
    assert_eq!((untouched.get(9), own.get(9) == 77), (77, false), "the private copy is of its own");
}

fn named_file_of_huge_pages_survives(t: &Trial) {
    let file = named_file(t, 3 * HUGE);
    file_survives(t, &file);
    let other = std::fs::File::open(t.path("huge/file")).expect("open");
    assert_eq!(Map::file(other.as_fd(), 3 * HUGE, READ, libc::MAP_SHARED, 0).get(HUGE + 9), 77);
}

fn deleted_file_of_huge_pages_survives(t: &Trial) {
    let file = named_file(t, 3 * HUGE);
    std::fs::remove_file(t.path("huge/file")).expect("unlink");
    file_survives(t, &file);
}

/// While the tree is away, somebody else takes the huge pages.
fn short(outside: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => {
            let free = std::fs::read_to_string("/proc/meminfo").expect("read");
            let of = |name: &str| -> usize {
                let line = free.lines().find(|line| line.starts_with(name)).expect("told");
                line.split_whitespace().nth(1).expect("a number").parse().expect("a number")
            };
            let taken = memfd(c"taken", of("HugePages_Free:") - of("HugePages_Rsvd:"));
            let length = taken.metadata().expect("stat").len() as usize;
            // Promised to this mapping, though nobody touches it.
            let map = Map::file(taken.as_fd(), length, RW, libc::MAP_SHARED, 0);
            std::fs::write(outside.directory.join("taken"), format!("{} {}", map.address, map.length)).expect("write");
        }
        Moment::Mend => {
            let text = std::fs::read_to_string(outside.directory.join("taken")).expect("read");
            let mut words = text.split(' ').map(|word| word.parse().expect("a number"));
            let (address, length) = (words.next().expect("one"), words.next().expect("two"));
            Map { address, length }.unmap(0..length / PAGE);
        }
        _ => {}
    }
}

fn huge_pages_that_are_short_are_missed_before_anything_is_made(t: &Trial) {
    private_huge_pages_survive(t);
}
