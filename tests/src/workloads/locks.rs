//! File locks of all kinds, whose owners ask and are asked about them afterwards.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::process::{Child, fork};

const LOCKS: &[&str] = &["--file-locks"];

pub const CASES: &[Case] = &[
    case!(locks_without_the_option_are_refused).refused(&["fd", "lock", "--file-locks"]),
    case!(flocks_are_kept).options(LOCKS).exchange(),
    case!(flock_of_duplicates_and_children_stays_one).options(LOCKS).exchange(),
    case!(record_locks_of_two_processes_are_kept).options(LOCKS).exchange(),
    case!(locks_of_open_files_are_kept).options(LOCKS).exchange(),
    case!(lock_of_an_open_file_that_only_a_child_has_is_kept).options(LOCKS).exchange(),
    case!(flocks_of_several_opens_overlap_as_before).options(LOCKS).exchange(),
    case!(record_lock_without_its_descriptor_is_kept).options(LOCKS).exchange(),
    case!(lease_of_an_owner_without_the_descriptor_is_kept).options(LOCKS),
    case!(no_lease_appears).options(LOCKS).exchange(),
    case!(leases_are_kept).options(LOCKS).exchange(),
    case!(lease_that_is_being_broken_is_refused).options(LOCKS).refused(&["fd", "lease"]).peer_cannot("it dumps this"),
];

fn open(t: &Trial) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(t.path("file")).expect("open")
}

fn flock(file: &File, how: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) }).map(drop)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: len, l_pid: 0 }
}

/// Who has a record lock there, as this process sees it.
fn holder(file: &File, start: i64) -> (i32, i64, i64, i32) {
    let mut found = range(libc::F_WRLCK, start, 1);
    fcntl(file, FcntlArg::F_GETLK(&mut found)).expect("F_GETLK");
    (found.l_type.into(), found.l_start, found.l_len, found.l_pid)
}

fn locks_without_the_option_are_refused(t: &Trial) {
    let file = open(t);
    flock(&file, libc::LOCK_EX).expect("flock");
    t.checkpoint();
    assert_eq!(flock(&open(t), libc::LOCK_SH), Err(Errno::EWOULDBLOCK));
}

fn flocks_are_kept(t: &Trial) {
    let one = open(t);
    flock(&one, libc::LOCK_EX).expect("flock");
    let other = File::create(t.path("other")).expect("create");
    flock(&other, libc::LOCK_SH).expect("flock");
    t.checkpoint();
    assert_eq!(flock(&open(t), libc::LOCK_SH), Err(Errno::EWOULDBLOCK));
    let again = File::open(t.path("other")).expect("open");
    flock(&again, libc::LOCK_SH).expect("shared");
    assert_eq!(flock(&again, libc::LOCK_EX), Err(Errno::EWOULDBLOCK));
    drop(one);
    flock(&open(t), libc::LOCK_EX).expect("it is free");
}

fn held_by_a_child(t: &Trial, body: impl FnOnce()) -> Child {
    let child = fork(|| {
        body();
        t.mark("child");
        t.hold();
    });
    t.await_mark("child");
    child
}

fn flock_of_duplicates_and_children_stays_one(t: &Trial) {
    let file = open(t);
    let duplicate = file.try_clone().expect("dup");
    flock(&file, libc::LOCK_EX).expect("flock");
    let child = held_by_a_child(t, || {});
    t.checkpoint();
    child.succeed();
    drop(file);
    assert_eq!(flock(&open(t), libc::LOCK_EX), Err(Errno::EWOULDBLOCK));
    flock(&duplicate, libc::LOCK_UN).expect("unlock");
    flock(&open(t), libc::LOCK_EX).expect("it is free");
}

fn record_locks_of_two_processes_are_kept(t: &Trial) {
    let file = open(t);
    let set = |file: &File, kind, start, len| fcntl(file, FcntlArg::F_SETLK(&range(kind, start, len))).expect("F_SETLK");
    set(&file, libc::F_WRLCK, 0, 10);
    set(&file, libc::F_RDLCK, 100, 0);
    let mut pid = 0;
    let child = fork(|| {
        let own = open(t);
        set(&own, libc::F_WRLCK, 20, 5);
        t.mark("child");
        t.hold();
        let parent = nix::unistd::getppid().as_raw();
        assert_eq!(holder(&own, 3), (libc::F_WRLCK, 0, 10, parent));
        assert_eq!(holder(&own, 1 << 40), (libc::F_RDLCK, 100, 0, parent));
        assert_eq!(holder(&own, 50).0, libc::F_UNLCK);
        t.mark("asked");
        t.await_mark("parent");
    });
    pid += child.pid.as_raw();
    t.await_mark("child");
    t.checkpoint();
    t.await_mark("asked");
    assert_eq!(holder(&file, 22), (libc::F_WRLCK, 20, 5, pid));
    t.mark("parent");
    child.succeed();
    assert_eq!(holder(&file, 22).0, libc::F_UNLCK);
}

fn locks_of_open_files_are_kept(t: &Trial) {
    let (one, two) = (open(t), open(t));
    let set = |file: &File, kind, start, len| fcntl(file, FcntlArg::F_OFD_SETLK(&range(kind, start, len)));
    set(&one, libc::F_RDLCK, 0, 100).expect("F_OFD_SETLK");
    set(&two, libc::F_RDLCK, 50, 100).expect("F_OFD_SETLK");
    set(&two, libc::F_WRLCK, 1000, 0).expect("F_OFD_SETLK");
    let child = held_by_a_child(t, || {});
    t.checkpoint();
    child.succeed();
    let other = open(t);
    assert_eq!(set(&other, libc::F_WRLCK, 0, 1), Err(Errno::EAGAIN));
    assert_eq!(set(&other, libc::F_WRLCK, 149, 1), Err(Errno::EAGAIN));
    assert_eq!(set(&other, libc::F_RDLCK, 5000, 1), Err(Errno::EAGAIN));
    set(&other, libc::F_RDLCK, 0, 100).expect("shared");
    set(&other, libc::F_WRLCK, 150, 100).expect("free");
    drop(one);
    set(&other, libc::F_WRLCK, 0, 50).expect("free now");
}

fn lease(file: &File) -> i32 {
    // SAFETY: takes integers.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }
}

fn set_lease(file: &File, kind: i32) {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }).expect("F_SETLEASE");
}

fn leases_are_kept(t: &Trial) {
    let write = open(t);
    set_lease(&write, libc::F_WRLCK);
    drop(File::create(t.path("other")).expect("create"));
    let read = File::open(t.path("other")).expect("open");
    set_lease(&read, libc::F_RDLCK);
    let none = open_new(t, "third");
    t.checkpoint();
    assert_eq!((lease(&write), lease(&read), lease(&none)), (libc::F_WRLCK, libc::F_RDLCK, libc::F_UNLCK));
}

fn open_new(t: &Trial, name: &str) -> File {
    File::create(t.path(name)).expect("create")
}

fn lease_that_is_being_broken_is_refused(t: &Trial) {
    use std::os::unix::fs::OpenOptionsExt;
    crate::sys::signal::block(&[nix::sys::signal::Signal::SIGIO]);
    let write = open(t);
    set_lease(&write, libc::F_WRLCK);
    let other = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(t.path("file"));
    assert_eq!(other.expect_err("the lease is in the way").raw_os_error(), Some(libc::EWOULDBLOCK));
    t.checkpoint();
    assert_eq!(lease(&write), libc::F_RDLCK);
}

fn lock_of_an_open_file_that_only_a_child_has_is_kept(t: &Trial) {
    let file = open(t);
    fcntl(&file, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, 0, 10))).expect("F_OFD_SETLK");
    let child = held_by_a_child(t, || {});
    drop(file);
    t.checkpoint();
    // It ends with the child, which ends now, and not before.
    let other = open(t);
    child.succeed();
    fcntl(&other, FcntlArg::F_OFD_SETLK(&range(libc::F_WRLCK, 0, 10))).expect("it is free");
}

fn flocks_of_several_opens_overlap_as_before(t: &Trial) {
    let files: Vec<File> = (0..3).map(|_| open(t)).collect();
    files.iter().for_each(|file| flock(file, libc::LOCK_SH).expect("flock"));
    t.checkpoint();
    let other = open(t);
    for file in files {
        assert_eq!(flock(&other, libc::LOCK_EX), Err(Errno::EWOULDBLOCK));
        drop(file);
    }
    flock(&other, libc::LOCK_EX).expect("it is free");
}

/// A record lock belongs to the process: a child has the file, but not the lock.
fn record_lock_without_its_descriptor_is_kept(t: &Trial) {
    let file = open(t);
    fcntl(&file, FcntlArg::F_SETLK(&range(libc::F_WRLCK, 5, 5))).expect("F_SETLK");
    let own = nix::unistd::getpid().as_raw();
    let child = fork(|| {
        t.mark("child");
        t.hold();
        assert_eq!(holder(&file, 7), (libc::F_WRLCK, 5, 5, own));
        t.mark("asked");
    });
    t.await_mark("child");
    t.checkpoint();
    t.await_mark("asked");
    child.succeed();
}

fn lease_of_an_owner_without_the_descriptor_is_kept(t: &Trial) {
    // The signal goes to the one who took the lease, and who has closed the file since; a child has it still.
    let file = open(t);
    let child = held_by_a_child(t, || set_lease(&file, libc::F_WRLCK));
    t.checkpoint();
    assert_eq!(lease(&file), libc::F_WRLCK);
    child.succeed();
    assert_eq!(lease(&file), libc::F_WRLCK);
}

fn no_lease_appears(t: &Trial) {
    let with = File::open("/proc/self/exe").expect("open");
    drop(File::create(t.path("file")).expect("create"));
    let files = [File::open(t.path("file")).expect("open"), File::open(t.path("file")).expect("open")];
    set_lease(&files[0], libc::F_RDLCK);
    t.checkpoint();
    assert_eq!([&files[0], &files[1], &with].map(lease), [libc::F_RDLCK, libc::F_UNLCK, libc::F_UNLCK]);
}
