//! Policies of mappings: on which nodes of memory their pages are put.

use std::os::fd::AsFd;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::memory::{self, Map, PAGE, RW};
use crate::sys::process::fork;
use crate::sys::shm;
use crate::sys::thread;

const WHY: &str = "it loses them";

pub const CASES: &[Case] = &[
    case!(policies_of_mappings_are_kept).needs(thread::has_memory_policies).peer_cannot(WHY),
    case!(policies_of_relatives_differ).needs(thread::has_memory_policies).peer_cannot(WHY),
];

const DEFAULT: (i32, u64) = (libc::MPOL_DEFAULT, 0);
/// On the first node, which every machine has.
const BOUND: (i32, u64) = (libc::MPOL_BIND, 1);
const SPREAD: (i32, u64) = (libc::MPOL_INTERLEAVE, 1);
const PREFERRED: (i32, u64) = (libc::MPOL_PREFERRED | thread::MPOL_F_STATIC_NODES, 1);

fn policies_of_mappings_are_kept(t: &Trial) {
    let private = Map::private(10 * PAGE);
    private.set_policy(2..6, BOUND.0, BOUND.1);
    private.fill(1..4, 1);
    let shared = Map::shared(4 * PAGE);
    shared.set_policy(0..2, SPREAD.0, SPREAD.1);
    shared.fill(0..4, 2);
    let file = nix::sys::memfd::memfd_create("m", nix::sys::memfd::MFdFlags::empty()).expect("memfd_create");
    nix::unistd::ftruncate(&file, 4 * PAGE as i64).expect("ftruncate");
    let memfd = Map::file(file.as_fd(), 4 * PAGE, RW, libc::MAP_SHARED, 0);
    memfd.set_policy(1..4, PREFERRED.0, PREFERRED.1);
    let local = Map::private(PAGE);
    local.set_policy(0..1, libc::MPOL_LOCAL, 0);
    std::fs::write(t.path("file"), [7; 4 * PAGE]).expect("write");
    let of_file = std::fs::File::open(t.path("file")).expect("open");
    let of_file = Map::file(of_file.as_fd(), 4 * PAGE, RW, libc::MAP_PRIVATE, 0);
    of_file.set_policy(2..4, BOUND.0, BOUND.1);
    of_file.fill(3..4, 3);
    let segment = shm::attach(shm::make(libc::IPC_PRIVATE, 4 * PAGE, 0o600), 4 * PAGE, 0);
    segment.put(0, 5);
    memory::set_policy(segment.address + PAGE, PAGE, BOUND.0, BOUND.1);
    t.checkpoint();
    let of = |map: &Map, pages: usize| (0..pages).map(|page| map.policy(page)).collect::<Vec<_>>();
    let all = [DEFAULT, DEFAULT, BOUND, BOUND, BOUND, BOUND, DEFAULT, DEFAULT, DEFAULT, DEFAULT];
    assert_eq!(of(&private, 10), all);
    assert_eq!(of(&shared, 4), [SPREAD, SPREAD, DEFAULT, DEFAULT]);
    assert_eq!(of(&memfd, 4), [DEFAULT, PREFERRED, PREFERRED, PREFERRED]);
    assert_eq!(local.policy(0), (libc::MPOL_LOCAL, 0));
    assert_eq!(of(&of_file, 4), [DEFAULT, DEFAULT, BOUND, BOUND]);
    of_file.check(3..4, 3);
    let of_segment = [0, 1, 2].map(|page| memory::policy(segment.address + page * PAGE));
    assert_eq!((of_segment, segment.get(0)), ([DEFAULT, BOUND, DEFAULT], 5));
    shm::remove(segment.id);
    private.check(1..4, 1);
    shared.check(0..4, 2);
}

fn policies_of_relatives_differ(t: &Trial) {
    let maps = [(); 3].map(|()| Map::private(4 * PAGE));
    maps[0].set_policy(0..4, BOUND.0, BOUND.1);
    maps[1].set_policy(0..4, BOUND.0, BOUND.1);
    maps.iter().for_each(|map| map.fill(0..4, 1));
    let child = fork(|| {
        maps[1].set_policy(0..4, DEFAULT.0, DEFAULT.1);
        maps[2].set_policy(0..4, SPREAD.0, SPREAD.1);
        t.mark("child");
        t.hold();
        assert_eq!(maps.map(|map| map.policy(1)), [BOUND, DEFAULT, SPREAD]);
        maps.iter().for_each(|map| map.check(0..4, 1));
    });
    t.await_mark("child");
    t.checkpoint();
    assert_eq!(maps.map(|map| map.policy(1)), [BOUND, BOUND, DEFAULT]);
    child.succeed();
}
