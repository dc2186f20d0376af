//! SysV shared memory, attached by processes of the tree.


use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::process::fork;
use crate::sys::shm::{self, Attached};
use crate::sys::{fault, procfs};

const PAGE: usize = 4096;
const KEY: i32 = 0x00c0_ffee;

pub const CASES: &[Case] = &[
    case!(segment_keeps_id_key_and_content).outside(no_leak),
    case!(segment_of_another_user_keeps_creator_owner_and_mode),
    case!(segment_shared_by_relatives_stays_shared).outside(no_leak),
    case!(segment_attached_twice_in_one_process_goes_on),
    case!(segment_attached_by_others_alone_goes_on),
    case!(segments_of_many_ids_keep_them),
    case!(removed_segment_lives_on_while_attached).outside(no_leak),
    case!(removed_segment_and_another_with_its_key_go_on),
    case!(read_only_attachment_stays_so),
    case!(partly_protected_attachment_stays_so),
    case!(attachment_with_a_hole_stays_so),
    case!(attachment_without_head_and_tail_stays_so),
    case!(executable_attachment_stays_so),
    case!(segment_of_a_few_bytes_goes_on),
    case!(large_sparse_segment_goes_on),
    case!(locked_segment_stays_locked),
    case!(segment_left_behind_is_used_again).outside(left_behind),
    case!(segment_attached_outside_is_refused).outside(attached_outside)
        .refused(&["SysV shared memory", "process 1 ", "outside of the tree"]),
    case!(attachment_with_another_mapping_inside_is_refused).refused(&["SysV shared memory", "another mapping"]),
    case!(segment_whose_key_is_taken_is_refused_at_the_restore).outside(key_taken)
        .restore_refused(&["SysV shared memory", "key", "taken"]),
    case!(segment_whose_id_is_taken_is_refused_at_the_restore).outside(id_taken)
        .restore_refused(&["SysV shared memory", "id is taken", "key 0xbad"]),
    case!(segment_whose_place_is_taken_is_refused_at_the_restore).outside(place_taken)
        .restore_refused(&["SysV shared memory", "place in the table"]),
    case!(segment_that_somebody_has_now_is_refused_at_the_restore).outside(somebody_has_it)
        .restore_refused(&["SysV shared memory", "attached by process 1 "]),
];

// The peer dumps segments of a namespace of the tree's own alone; the harness and the tools are in one.

fn filled(key: i32, len: usize) -> Attached {
    let segment = shm::attach(shm::make(key, len, 0o640), len, 0);
    (0..len / PAGE).for_each(|page| segment.put(page * PAGE, page as u64 + 7));
    segment
}

#[track_caller]
fn check(segment: &Attached, pages: std::ops::Range<usize>) {
    pages.for_each(|page| assert_eq!(segment.get(page * PAGE), page as u64 + 7, "page {page}"));
}

type Facts = (i32, u32, u32, u32, u32, u32, usize, u64);

fn facts(id: i32) -> Facts {
    let state = shm::stat(id);
    let perm = &state.shm_perm;
    (perm.__key, perm.uid, perm.gid, perm.cuid, perm.cgid, perm.mode.into(), state.shm_segsz, state.shm_nattch)
}

fn segment_keeps_id_key_and_content(t: &Trial) {
    let segment = filled(KEY, 10 * PAGE);
    segment.put(3 * PAGE + 80, 99);
    let before = facts(segment.id);
    t.checkpoint();
    check(&segment, 0..10);
    assert_eq!(segment.get(3 * PAGE + 80), 99);
    assert_eq!((facts(segment.id), shm::find(KEY)), (before, Some(segment.id)));
    let again = shm::attach(segment.id, segment.len, 0);
    again.put(16, 5);
    assert_eq!(segment.get(16), 5);
    again.detach();
    shm::remove(segment.id);
}

fn segment_of_another_user_keeps_creator_owner_and_mode(t: &Trial) {
    let child = fork(|| {
        nix::unistd::setegid(34.into()).expect("setegid");
        nix::unistd::seteuid(12.into()).expect("seteuid");
        shm::make(KEY, PAGE, 0o600);
    });
    child.succeed();
    let id = shm::find(KEY).expect("made by the child");
    shm::set(id, 56, 78, 0o4);
    let segment = shm::attach(id, PAGE, 0);
    segment.put(0, 3);
    let before = facts(id);
    assert_eq!(before, (KEY, 56, 78, 12, 34, 4, PAGE, 1));
    t.checkpoint();
    assert_eq!((facts(id), segment.get(0)), (before, 3));
    shm::remove(id);
}

fn segment_shared_by_relatives_stays_shared(t: &Trial) {
    let segment = filled(libc::IPC_PRIVATE, 4 * PAGE);
    let heir = fork(|| {
        segment.protect(PAGE, PAGE, libc::PROT_READ);
        t.mark("heir");
        t.hold();
        check(&segment, 0..4);
        assert_eq!(procfs::mapping_at(segment.address + PAGE).protection, "r--s");
        segment.put(0, 100);
        t.mark("told");
    });
    let other = fork(|| {
        segment.detach();
        let own = shm::attach(segment.id, 4 * PAGE, 0);
        let heir = fork(|| {
            t.mark("grandchild");
            t.hold();
            t.await_mark("told");
            assert_eq!(own.get(0), 100);
        });
        t.mark("other");
        t.hold();
        check(&own, 1..4);
        heir.succeed();
    });
    ["heir", "other", "grandchild"].iter().for_each(|name| t.await_mark(name));
    let before = facts(segment.id);
    t.checkpoint();
    assert_eq!(facts(segment.id).0, before.0);
    heir.succeed();
    assert_eq!(segment.get(0), 100);
    other.succeed();
    assert_eq!(facts(segment.id).7, 1);
    shm::remove(segment.id);
}

fn segment_attached_twice_in_one_process_goes_on(t: &Trial) {
    let segment = filled(KEY, 2 * PAGE);
    let again = shm::attach(segment.id, 2 * PAGE, libc::SHM_RDONLY);
    t.checkpoint();
    segment.put(8, 1234);
    assert_eq!(again.get(8), 1234);
    check(&again, 0..2);
    shm::remove(segment.id);
}

fn segment_attached_by_others_alone_goes_on(t: &Trial) {
    let segment = filled(KEY, PAGE);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        check(&segment, 0..1);
    });
    segment.detach();
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
    shm::remove(segment.id);
}

fn segments_of_many_ids_keep_them(t: &Trial) {
    let all: Vec<Attached> = (0..12).map(|at| filled(KEY + at, PAGE)).collect();
    // Ids of removed ones come back with another sequence number.
    let renewed = |(at, one): (usize, Attached)| {
        if at % 3 != 0 {
            return one;
        }
        one.detach();
        shm::remove(one.id);
        filled(KEY + 100 + at as i32, 3 * PAGE)
    };
    let kept: Vec<Attached> = all.into_iter().enumerate().map(renewed).collect();
    let before: Vec<Facts> = kept.iter().map(|one| facts(one.id)).collect();
    t.checkpoint();
    assert_eq!(kept.iter().map(|one| facts(one.id)).collect::<Vec<_>>(), before);
    kept.iter().for_each(|one| check(one, 0..one.len / PAGE));
    kept.iter().for_each(|one| shm::remove(one.id));
}

fn removed_segment_lives_on_while_attached(t: &Trial) {
    let segment = filled(KEY, 2 * PAGE);
    let private = filled(libc::IPC_PRIVATE, PAGE);
    [segment, private].iter().for_each(|one| shm::remove(one.id));
    let before = [segment, private].map(|one| facts(one.id));
    t.checkpoint();
    assert_eq!([segment, private].map(|one| facts(one.id)), before);
    assert_eq!(shm::find(KEY), None);
    check(&segment, 0..2);
    check(&private, 0..1);
}

fn removed_segment_and_another_with_its_key_go_on(t: &Trial) {
    let old = filled(KEY, PAGE);
    shm::remove(old.id);
    let new = filled(KEY, 2 * PAGE);
    new.put(0, 1);
    t.checkpoint();
    check(&old, 0..1);
    assert_eq!((new.get(0), shm::find(KEY)), (1, Some(new.id)));
    shm::remove(new.id);
}

fn read_only_attachment_stays_so(t: &Trial) {
    let segment = filled(KEY, 2 * PAGE);
    let id = segment.id;
    segment.detach();
    let reader = shm::attach(id, 2 * PAGE, libc::SHM_RDONLY);
    t.checkpoint();
    check(&reader, 0..2);
    // SAFETY: asks for a right that the mapping does not have; nothing is changed.
    let allowed = unsafe { libc::mprotect(reader.address as *mut libc::c_void, PAGE, libc::PROT_WRITE) };
    assert_eq!(allowed, -1);
    shm::remove(id);
}

fn partly_protected_attachment_stays_so(t: &Trial) {
    let segment = filled(KEY, 6 * PAGE);
    segment.protect(PAGE, PAGE, libc::PROT_READ);
    segment.protect(3 * PAGE, 2 * PAGE, libc::PROT_NONE);
    t.checkpoint();
    segment.put(8, 1);
    check(&segment, 0..3);
    assert_eq!(procfs::mapping_at(segment.address + PAGE).protection, "r--s");
    assert_eq!(procfs::mapping_at(segment.address + 3 * PAGE).protection, "---s");
    segment.protect(3 * PAGE, 2 * PAGE, libc::PROT_READ);
    check(&segment, 3..6);
    segment.detach();
    assert_eq!(facts(segment.id).7, 0);
    shm::remove(segment.id);
}

fn attachment_with_a_hole_stays_so(t: &Trial) {
    let segment = filled(KEY, 6 * PAGE);
    segment.unmap(2 * PAGE, PAGE);
    t.checkpoint();
    check(&segment, 0..2);
    check(&segment, 3..6);
    assert!(!fault::can_read(segment.address + 2 * PAGE));
    let whole = shm::attach(segment.id, 6 * PAGE, 0);
    check(&whole, 2..3);
    shm::remove(segment.id);
}

fn attachment_without_head_and_tail_stays_so(t: &Trial) {
    let segment = filled(KEY, 6 * PAGE);
    segment.unmap(0, PAGE);
    segment.unmap(5 * PAGE, PAGE);
    t.checkpoint();
    check(&segment, 1..5);
    assert!(!fault::can_read(segment.address) && !fault::can_read(segment.address + 5 * PAGE));
    shm::remove(segment.id);
}

fn executable_attachment_stays_so(t: &Trial) {
    let id = shm::make(KEY, PAGE, 0o700);
    let segment = shm::attach(id, PAGE, libc::SHM_EXEC);
    t.checkpoint();
    assert_eq!(procfs::mapping_at(segment.address).protection, "rwxs");
    shm::remove(id);
}

fn segment_of_a_few_bytes_goes_on(t: &Trial) {
    let id = shm::make(KEY, 56, 0o600);
    let segment = shm::attach(id, 56, 0);
    segment.put(48, 77);
    let before = facts(id);
    t.checkpoint();
    assert_eq!((segment.get(48), facts(id)), (77, before));
    shm::remove(id);
}

fn large_sparse_segment_goes_on(t: &Trial) {
    const LEN: usize = 1 << 30;
    let segment = shm::attach(shm::make(KEY, LEN, 0o600), LEN, 0);
    let places = [0, 77 * PAGE, LEN / 2, LEN - PAGE];
    places.iter().for_each(|at| segment.put(*at, *at as u64 + 1));
    t.checkpoint();
    places.iter().for_each(|at| assert_eq!(segment.get(*at), *at as u64 + 1));
    assert_eq!(segment.get(PAGE), 0);
    shm::remove(segment.id);
}

fn locked_segment_stays_locked(t: &Trial) {
    let segment = filled(KEY, 2 * PAGE);
    shm::lock(segment.id);
    let before = facts(segment.id);
    assert_eq!(before.5 & 0o2000, 0o2000);
    t.checkpoint();
    assert_eq!(facts(segment.id), before);
    shm::remove(segment.id);
}

/// What is in the kernel's table.
fn table() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/sysvipc/shm").expect("read");
    text.lines().skip(1).map(str::to_owned).collect()
}

fn no_leak(_: &mut Outside, moment: Moment) {
    if matches!(moment, Moment::Away | Moment::End) {
        assert_eq!(table(), Vec::<String>::new(), "a segment is left");
    }
}

fn left_behind(_: &mut Outside, moment: Moment) {
    if moment == Moment::Away {
        let wanted = wanted();
        take(wanted, KEY);
        let own = shm::attach(wanted, 10 * PAGE, 0);
        (0..10).for_each(|page| own.put(page * PAGE + 8, 1));
        own.detach();
    }
}

fn segment_left_behind_is_used_again(t: &Trial) {
    let segment = filled(KEY, 10 * PAGE);
    t.checkpoint();
    check(&segment, 0..10);
    assert_eq!(segment.get(8), 0);
    shm::remove(segment.id);
}

/// The id of the first segment that a tree makes here.
fn wanted() -> i32 {
    0
}

/// Makes a segment with this id.
fn take(id: i32, key: i32) {
    std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string()).expect("ask for an id");
    assert_eq!(shm::make(key, 10 * PAGE, 0o640), id);
}

fn attached_outside(_: &mut Outside, moment: Moment) {
    if moment == Moment::Ready {
        shm::attach(wanted(), 10 * PAGE, 0);
    }
}

fn segment_attached_outside_is_refused(t: &Trial) {
    segment_left_behind_is_used_again(t);
}

fn attachment_with_another_mapping_inside_is_refused(t: &Trial) {
    let segment = filled(KEY, 6 * PAGE);
    segment.unmap(2 * PAGE, PAGE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let place = (segment.address + 2 * PAGE) as *mut libc::c_void;
    // SAFETY: where nothing is.
    let mapped = unsafe { libc::mmap(place, PAGE, libc::PROT_READ, flags, -1, 0) };
    assert_eq!(mapped, place);
    t.checkpoint();
    check(&segment, 3..6);
    shm::remove(segment.id);
}

fn key_taken(_: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => drop(shm::make(KEY, PAGE, 0o600)),
        Moment::Mend => shm::remove(shm::find(KEY).expect("there")),
        _ => {}
    }
}

fn segment_whose_key_is_taken_is_refused_at_the_restore(t: &Trial) {
    // Not the first id, which another segment would get by itself.
    shm::remove(shm::make(libc::IPC_PRIVATE, PAGE, 0o600));
    segment_left_behind_is_used_again(t);
}

fn id_taken(_: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => take(wanted(), 0xbad),
        Moment::Mend => shm::remove(wanted()),
        _ => {}
    }
}

fn segment_whose_id_is_taken_is_refused_at_the_restore(t: &Trial) {
    segment_left_behind_is_used_again(t);
}

fn place_taken(_: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => take(5 << 15, 0xbad),
        Moment::Mend => shm::remove(5 << 15),
        _ => {}
    }
}

fn segment_whose_place_is_taken_is_refused_at_the_restore(t: &Trial) {
    segment_left_behind_is_used_again(t);
}

fn somebody_has_it(_: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => {
            take(wanted(), KEY);
            shm::attach(wanted(), 10 * PAGE, 0);
        }
        Moment::Mend => {
            let text = procfs::mappings(std::process::id());
            let map = text.iter().find(|map| map.name.starts_with("/SYSV")).expect("attached");
            Attached { id: wanted(), address: map.start, len: 10 * PAGE }.detach();
        }
        _ => {}
    }
}

fn segment_that_somebody_has_now_is_refused_at_the_restore(t: &Trial) {
    segment_left_behind_is_used_again(t);
}
