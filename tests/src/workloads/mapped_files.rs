//! Mappings of files.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::fault;
use crate::sys::memory::{Map, PAGE, READ, RW};
use crate::sys::procfs::mapping_at;

pub const CASES: &[Case] = &[
    case!(private_file_mapping_keeps_dirty_pages).moves().exchange(),
    case!(shared_file_mapping_writes_to_the_file).moves().exchange(),
    case!(file_mapping_with_an_offset_survives).exchange().moves(),
    case!(file_mapping_beyond_the_end_still_faults).exchange().moves(),
    case!(mapped_file_that_was_deleted_survives).exchange().moves(),
    case!(mapped_file_whose_name_another_has_survives).moves().restless(),
    case!(mapping_of_a_closed_file_survives).exchange().moves(),
    case!(file_mapped_with_different_protections_survives).exchange().moves(),
    case!(ten_thousand_mappings_of_files_survive).moves(),
    case!(mapped_file_with_two_names_that_are_gone_stays_one).moves().options(&["--link-remap"]),
];

fn pages(count: usize) -> usize {
    count * PAGE
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

/// As a library that was replaced while a program runs.
fn mapped_file_whose_name_another_has_survives(t: &Trial) {
    let file = data_file(t, 5);
    let shared = Map::file(file.as_fd(), pages(5), READ, libc::MAP_SHARED, 0);
    let private = Map::file(file.as_fd(), pages(3), RW, libc::MAP_PRIVATE, pages(2) as i64);
    private.fill(1..2, 3);
    drop(file);
    fs::write(t.path("new"), vec![7; pages(5)]).expect("write");
    fs::rename(t.path("new"), t.path("data")).expect("replace");
    t.checkpoint();
    private.check(1..2, 3);
    assert_eq!(shared.get(pages(4) + 3), expected(pages(4) + 3));
    assert_eq!(private.get(3), expected(pages(2) + 3));
    assert!(fs::read(t.path("data")).expect("read").iter().all(|byte| *byte == 7));
}

fn mapping_of_a_closed_file_survives(t: &Trial) {
    let map = Map::file(data_file(t, 3).as_fd(), pages(3), RW, libc::MAP_SHARED, 0);
    t.checkpoint();
    map.set(7, 70);
    assert_eq!(fs::read(t.path("data")).expect("read")[7], 70);
}

fn ten_thousand_mappings_of_files_survive(t: &Trial) {
    let file = data_file(t, 2);
    let maps: Vec<Map> = (0..10_000)
        .map(|number| Map::file(file.as_fd(), PAGE, READ, libc::MAP_SHARED, pages(number % 2) as i64))
        .collect();
    drop(file);
    t.checkpoint();
    for (number, map) in maps.iter().enumerate() {
        assert_eq!(map.get(5), expected(pages(number % 2) + 5), "mapping {number}");
    }
}

fn file_mapped_with_different_protections_survives(t: &Trial) {
    let file = data_file(t, 4);
    let map = |protection, kind| Map::file(file.as_fd(), pages(4), protection, kind, 0);
    let shared = map(RW, libc::MAP_SHARED);
    let read_only = map(READ, libc::MAP_SHARED);
    let none = map(libc::PROT_NONE, libc::MAP_SHARED);
    let private = map(RW, libc::MAP_PRIVATE);
    private.fill(2..3, 9);
    t.checkpoint();
    shared.set(3, 200);
    assert_eq!((read_only.get(3), private.get(3)), (200, 200));
    private.check(2..3, 9);
    assert!(!fault::can_write(read_only.address) && !fault::can_read(none.address));
    // It was open for writing.
    read_only.protect(0..4, RW);
    read_only.set(4, 201);
    none.protect(0..4, READ);
    assert_eq!((shared.get(4), none.get(4)), (201, 201));
}

fn mapped_file_with_two_names_that_are_gone_stays_one(t: &Trial) {
    let file = data_file(t, 2);
    fs::hard_link(t.path("data"), t.path("other")).expect("link");
    let other = OpenOptions::new().read(true).write(true).open(t.path("other")).expect("open");
    let one = Map::file(file.as_fd(), pages(2), RW, libc::MAP_SHARED, 0);
    let two = Map::file(other.as_fd(), pages(2), RW, libc::MAP_SHARED, 0);
    fs::remove_file(t.path("data")).expect("remove");
    fs::remove_file(t.path("other")).expect("remove");
    t.checkpoint();
    one.set(17, 200);
    assert_eq!(two.get(17), 200);
    assert_eq!(two.get(pages(1) + 3), expected(pages(1) + 3));
}
