//! Files that were changed between dump and restore: recognised, and said with both values.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::memory::{Map, READ};

const BY_SIZE: &[&str] = &["--file-validation", "filesize"];

pub const CASES: &[Case] = &[
    case!(file_that_has_grown_is_refused_at_the_restore).outside(grown)
        .restore_refused(&["/w/file", "had 8 bytes when it was dumped and has 10 now"]),
    case!(file_that_has_grown_is_refused_by_its_size).options(BY_SIZE).outside(grown)
        .restore_refused(&["/w/file", "had 8 bytes when it was dumped and has 10 now"]),
    case!(program_of_another_build_is_refused_at_the_restore).outside(built_anew)
        .restore_refused(&["/w/program", "had the build id ", " when it was dumped and has ", "--file-validation filesize"]),
    case!(mapped_program_of_another_build_is_refused_at_the_restore).outside(built_anew)
        .restore_refused(&["/w/program", "had the build id ", " when it was dumped and has "]),
    case!(program_of_another_build_is_taken_for_its_size).options(BY_SIZE).outside(built_anew_for_good),
    case!(file_that_is_gone_is_refused_at_the_restore).outside(gone)
        .restore_refused(&["/w/file", "No such file"]),
    case!(file_of_another_mode_is_refused_at_the_restore).outside(closed_to_others)
        .restore_refused(&["/w/file", "had the mode 100644 when it was dumped and has 100600 now"]),
    case!(file_of_another_mode_is_taken_when_asked_for).options(&["--skip-file-rwx-check"]).outside(closed_for_good),
];

fn file(o: &Outside) -> PathBuf {
    o.directory.join("file")
}

fn grown(o: &mut Outside, moment: Moment) {
    let open = || OpenOptions::new().append(true).open(file(o)).expect("open");
    match moment {
        Moment::Away => open().write_all(b"++").expect("write"),
        Moment::Mend => open().set_len(8).expect("truncate"),
        _ => {}
    }
}

/// Where the build id of a program is in its file.
fn build_id(program: &[u8]) -> usize {
    // Elf64_Nhdr of a note of 20 bytes, type 3, owner "GNU".
    const HEAD: &[u8] = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    program.windows(HEAD.len()).position(|bytes| bytes == HEAD).expect("a build id") + HEAD.len()
}

fn change_build_id(o: &Outside) {
    let program = OpenOptions::new().read(true).write(true).open(o.directory.join("program")).expect("open");
    let mut bytes = Vec::new();
    (&program).read_to_end(&mut bytes).expect("read");
    let at = build_id(&bytes);
    program.write_all_at(&[!bytes[at]], at as u64).expect("write");
}

fn built_anew(o: &mut Outside, moment: Moment) {
    if matches!(moment, Moment::Away | Moment::Mend) {
        change_build_id(o);
    }
}

fn built_anew_for_good(o: &mut Outside, moment: Moment) {
    if moment == Moment::Away {
        change_build_id(o);
    }
}

fn gone(o: &mut Outside, moment: Moment) {
    let other = o.directory.join("elsewhere");
    match moment {
        Moment::Away => fs::rename(file(o), other).expect("rename"),
        Moment::Mend => fs::rename(other, file(o)).expect("rename"),
        _ => {}
    }
}

fn closed_to_others(o: &mut Outside, moment: Moment) {
    let set = |mode| fs::set_permissions(file(o), Permissions::from_mode(mode)).expect("chmod");
    match moment {
        Moment::Away => set(0o600),
        Moment::Mend => set(0o644),
        _ => {}
    }
}

fn closed_for_good(o: &mut Outside, moment: Moment) {
    if moment == Moment::Away {
        fs::set_permissions(file(o), Permissions::from_mode(0o600)).expect("chmod");
    }
}

/// Half of the text is read before, half afterwards.
fn read_in_halves(t: &Trial) {
    fs::write(t.path("file"), "12345678").expect("write");
    fs::set_permissions(t.path("file"), Permissions::from_mode(0o644)).expect("chmod");
    let mut file = File::open(t.path("file")).expect("open");
    let mut half = [0; 4];
    file.read_exact(&mut half).expect("read");
    t.checkpoint();
    file.read_exact(&mut half).expect("read");
    assert_eq!(&half, b"5678");
}

fn file_that_has_grown_is_refused_at_the_restore(t: &Trial) {
    read_in_halves(t);
}

fn file_that_has_grown_is_refused_by_its_size(t: &Trial) {
    read_in_halves(t);
}

fn file_that_is_gone_is_refused_at_the_restore(t: &Trial) {
    read_in_halves(t);
}

fn file_of_another_mode_is_refused_at_the_restore(t: &Trial) {
    read_in_halves(t);
}

fn file_of_another_mode_is_taken_when_asked_for(t: &Trial) {
    read_in_halves(t);
}

/// A copy of this program.
fn program(path: &Path) -> File {
    fs::copy("/proc/self/exe", path).expect("copy");
    File::open(path).expect("open")
}

fn is_a_program(file: &File) {
    let mut head = [0; 4];
    file.read_exact_at(&mut head, 0).expect("read");
    assert_eq!(&head, b"\x7fELF");
}

fn program_of_another_build_is_refused_at_the_restore(t: &Trial) {
    let file = program(&t.path("program"));
    t.checkpoint();
    is_a_program(&file);
}

fn mapped_program_of_another_build_is_refused_at_the_restore(t: &Trial) {
    let map = Map::file(program(&t.path("program")).as_fd(), 4096, READ, libc::MAP_PRIVATE, 0);
    t.checkpoint();
    assert_eq!(map.get(1), b'E');
}

fn program_of_another_build_is_taken_for_its_size(t: &Trial) {
    let file = program(&t.path("program"));
    t.checkpoint();
    is_a_program(&file);
}
