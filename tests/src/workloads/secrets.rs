//! Secret memory: memfd_secret(2).

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial, until};
use crate::sys::memory::{Map, PAGE, READ, RW, secret};
use crate::sys::process::fork;
use crate::sys::procfs::mapping_at;

const NO_PEER: &str = "it refuses secret memory";

pub const CASES: &[Case] = &[
    case!(secret_memory_is_refused).refused(&["mapping", "secret memory", "--secret-memory"]).needs(has_it),
    case!(open_secret_memory_is_refused)
        .refused(&["fd 3", "secret memory", "--secret-memory"])
        .needs(has_it),
    case!(name_of_secret_memory_is_refused)
        .refused(&["fd 4", "cannot be opened again"])
        .outside(asks)
        .needs(has_it),
    case!(open_and_mapped_secret_memory_survives).outside(asks).moves().needs(has_it).peer_cannot(NO_PEER),
    case!(open_secret_memory_survives).outside(asks).moves().killed().needs(has_it).peer_cannot(NO_PEER),
    case!(mapped_secret_memory_survives).outside(asks).moves().killed().needs(has_it).peer_cannot(NO_PEER),
    case!(secret_memory_of_which_each_holds_a_part_survives)
        .outside(asks)
        .needs(has_it)
        .peer_cannot(NO_PEER),
    case!(secret_memory_that_may_not_be_read_survives)
        .outside(asks)
        .moves()
        .needs(has_it)
        .peer_cannot(NO_PEER),
    case!(secret_memory_in_a_queue_survives).outside(asks).moves().needs(has_it).peer_cannot(NO_PEER),
];

fn has_it() -> Result<(), String> {
    secret().map(drop).map_err(|e| format!("no secret memory here: {e}"))
}

/// The dump is asked for it.
fn asks(outside: &mut Outside, moment: Moment) {
    if moment == Moment::Begin {
        outside.dump = vec!["--secret-memory".into()];
    }
}

fn of_pages(count: usize) -> File {
    let file = secret().expect("memfd_secret");
    file.set_len((count * PAGE) as u64).expect("grow");
    file
}

fn map(file: &File, count: usize, protection: i32, first: usize) -> Map {
    Map::file(file.as_fd(), count * PAGE, protection, libc::MAP_SHARED, (first * PAGE) as i64)
}

/// It still belongs to this file, and nobody else can read it.
fn assert_secret(map: &Map) {
    assert!(!map.is_readable_from_outside());
    assert_eq!(mapping_at(map.address).name, "/secretmem (deleted)");
}

fn secret_memory_is_refused(t: &Trial) {
    let map = map(&of_pages(2), 2, RW, 0);
    map.fill(0..2, 1);
    t.checkpoint();
    map.check(0..2, 1);
}

fn open_secret_memory_is_refused(t: &Trial) {
    let file = of_pages(2);
    t.checkpoint();
    map(&file, 2, RW, 0).check_zero(0..2);
}

fn name_of_secret_memory_is_refused(t: &Trial) {
    let file = of_pages(1);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let name = nix::fcntl::open(&*path, OFlag::O_PATH, nix::sys::stat::Mode::empty()).expect("open");
    t.checkpoint();
    drop(name);
}

fn open_and_mapped_secret_memory_survives(t: &Trial) {
    let file = secret().expect("memfd_secret");
    // The last page is whole all the same.
    file.set_len((9 * PAGE - 100) as u64).expect("grow");
    file.set_permissions(Permissions::from_mode(0o640)).expect("chmod");
    std::os::unix::fs::fchown(&file, Some(7), Some(8)).expect("chown");
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_RDWR | OFlag::O_NONBLOCK)).expect("F_SETFL");
    let whole = map(&file, 9, RW, 0);
    let part = map(&file, 2, READ, 4);
    whole.fill(0..6, 1);
    whole.set(9 * PAGE - 1, 3);
    t.checkpoint();
    whole.check(0..6, 1);
    assert_eq!(whole.get(9 * PAGE - 1), 3);
    let there = [true, true, true, true, true, true, false, false, true];
    assert_eq!(whole.resident(), there);
    whole.set(4 * PAGE, 9);
    assert_eq!(part.get(0), 9);
    assert_secret(&whole);
    assert_secret(&part);
    let stat = file.metadata().expect("fstat");
    assert_eq!((stat.len(), stat.mode() & 0o7777), ((9 * PAGE - 100) as u64, 0o640));
    assert_eq!((stat.uid(), stat.gid()), (7, 8));
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).expect("F_GETFL"));
    assert!(flags.contains(OFlag::O_NONBLOCK));
    // As before, the size is set once.
    assert!(file.set_len(0).is_err());
}

fn open_secret_memory_survives(t: &Trial) {
    const COUNT: usize = 3000;
    let file = of_pages(COUNT);
    let unsized_yet = secret().expect("memfd_secret");
    let before = map(&file, COUNT, RW, 0);
    before.fill(0..3, 1);
    before.fill(1100..1300, 2);
    before.fill(COUNT - 1..COUNT, 3);
    before.unmap(0..COUNT);
    t.checkpoint();
    let map = map(&file, COUNT, RW, 0);
    let count = map.resident().iter().filter(|there| **there).count();
    assert_eq!(count, 3 + 200 + 1);
    map.check(0..3, 1);
    map.check(1100..1300, 2);
    map.check(COUNT - 1..COUNT, 3);
    assert_secret(&map);
    unsized_yet.set_len(5).expect("grow");
}

fn mapped_secret_memory_survives(t: &Trial) {
    const COUNT: usize = 3000;
    let map = map(&of_pages(COUNT), COUNT + 2, RW, 0);
    map.fill(0..1, 1);
    map.fill(63..66, 2);
    map.fill(1000..1100, 3);
    map.fill(COUNT - 1..COUNT, 4);
    t.checkpoint();
    let count = map.resident().iter().filter(|there| **there).count();
    assert_eq!(count, 1 + 3 + 100 + 1);
    map.check(0..1, 1);
    map.check(63..66, 2);
    map.check(1000..1100, 3);
    map.check(COUNT - 1..COUNT, 4);
    map.check_zero(500..510);
    assert_secret(&map);
}

fn secret_memory_of_which_each_holds_a_part_survives(t: &Trial) {
    let file = of_pages(8);
    let ours = map(&file, 4, RW, 0);
    ours.fill(0..4, 1);
    let child = fork(|| {
        ours.unmap(0..4);
        let theirs = map(&file, 5, RW, 3);
        nix::unistd::close(file.as_raw_fd()).expect("close");
        theirs.fill(1..5, 2);
        t.mark("mapped");
        t.hold();
        theirs.check(1..5, 2);
        theirs.set(0, 77);
        until("the parent's answer", || theirs.get(1) == 78);
        assert_secret(&theirs);
    });
    drop(file);
    t.await_mark("mapped");
    t.checkpoint();
    until("the child's word", || ours.get(3 * PAGE) == 77);
    ours.set(3 * PAGE + 1, 78);
    ours.check(0..3, 1);
    child.succeed();
}

fn secret_memory_that_may_not_be_read_survives(t: &Trial) {
    const COUNT: usize = 200;
    let file = of_pages(COUNT);
    let hidden = map(&file, COUNT, RW, 0);
    drop(file);
    hidden.fill(0..2, 1);
    hidden.fill(60..70, 2);
    hidden.fill(COUNT - 1..COUNT, 3);
    hidden.protect(0..COUNT, libc::PROT_NONE);
    t.checkpoint();
    assert_eq!(mapping_at(hidden.address).protection, "---s");
    hidden.protect(0..COUNT, RW);
    assert_eq!(hidden.resident().iter().filter(|there| **there).count(), 2 + 10 + 1);
    hidden.check(0..2, 1);
    hidden.check(60..70, 2);
    hidden.check(COUNT - 1..COUNT, 3);
    hidden.check_zero(100..101);
    assert_secret(&hidden);
}

fn secret_memory_in_a_queue_survives(t: &Trial) {
    use super::unix_queues::{give, pair, take};
    let (one, other) = pair(nix::sys::socket::SockType::Datagram);
    let file = of_pages(3);
    let before = map(&file, 3, RW, 0);
    before.fill(1..3, 5);
    before.unmap(0..3);
    give(&one, b"x", &[&file.into()]);
    t.checkpoint();
    let (_, mut came) = take(&other, 1);
    let map = map(&came.remove(0).into(), 3, RW, 0);
    map.check(1..3, 5);
    assert!(!map.resident()[0]);
    assert_secret(&map);
}
