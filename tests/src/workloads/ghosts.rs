//! Files whose names are gone, at the dump or before.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::stat::Mode as Permissions;

use crate::case;
use crate::case::{Case, Mode, Trial};
use crate::sys::memory::{Map, RW};
use crate::sys::process::fork;

const LINKS: &[&str] = &["--link-remap"];
const LOST: &str = "it does not keep this";

pub const CASES: &[Case] = &[
    case!(unlinked_file_is_read_and_written_on).exchange(),
    case!(unlinked_file_keeps_owner_mode_and_times)
        .peer_cannot_in(&[Mode::Snapshot, Mode::FailedDump], "it leaves a trace in the times")
        .exchange(),
    case!(unlinked_file_keeps_nanoseconds).peer_cannot(LOST),
    case!(unlinked_file_of_descriptors_and_processes_stays_one).exchange(),
    case!(unlinked_file_with_holes_stays_sparse).exchange(),
    case!(unlinked_file_that_is_one_hole_stays_sparse)
        .peer_cannot_in(&[Mode::Snapshot, Mode::FailedDump], "it fills the hole by reading it")
        .exchange(),
    case!(unlinked_file_in_a_removed_folder_survives).exchange(),
    case!(several_removed_names_of_one_file_survive).exchange(),
    // While its name is taken the kernel knows it by another one.
    case!(unlinked_file_whose_name_is_taken_survives).exchange().restless(),
    case!(unlinked_empty_file_survives).exchange(),
    case!(unlinked_file_with_an_odd_name_survives),
    case!(unlinked_folder_survives).exchange(),
    case!(working_in_an_unlinked_folder_goes_on).exchange(),
    case!(unlinked_fifo_keeps_its_bytes).exchange(),
    case!(unlinked_symlink_and_device_survive).peer_cannot("it refuses this"),
    case!(mappings_of_an_unlinked_file_stay_one_with_it).exchange(),
    case!(private_mapping_of_an_unlinked_file_keeps_its_changes).exchange(),
    case!(file_whose_name_ends_in_deleted_is_no_ghost),
    case!(large_unlinked_file_is_refused).refused(&["unlinked", "--ghost-limit", "2097152", "fd"]),
    case!(large_unlinked_file_survives_with_the_limit_raised).options(&["--ghost-limit", "4M"]).exchange(),
    case!(removed_name_of_a_living_file_is_refused).refused(&["fd", "file", "--link-remap"]),
    case!(removed_name_of_a_living_file_survives).options(LINKS).exchange(),
    case!(replaced_name_of_a_living_file_survives).options(LINKS).exchange().restless(),
    case!(file_below_a_mount_is_refused).refused(&["fd", "another file"]),
];

fn edit(path: impl AsRef<Path>) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).expect("open")
}

/// An open file without a name.
fn unlinked(t: &Trial, content: &[u8]) -> File {
    let mut file = edit(t.path("file"));
    file.write_all(content).expect("write");
    fs::remove_file(t.path("file")).expect("unlink");
    file
}

#[track_caller]
fn is_nameless(t: &Trial, file: &File) {
    assert_eq!(file.metadata().expect("stat").nlink(), 0);
    let names: Vec<_> = fs::read_dir(t.directory()).expect("read").map(|entry| entry.expect("read").file_name()).collect();
    let odd = |name: &&std::ffi::OsString| !["ready", "go", "log", "child"].iter().any(|known| *name == known);
    assert_eq!(names.iter().filter(odd).collect::<Vec<_>>(), Vec::<&std::ffi::OsString>::new());
}

fn text(file: &File) -> String {
    let mut bytes = vec![0; file.metadata().expect("stat").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    String::from_utf8(bytes).expect("text")
}

fn unlinked_file_is_read_and_written_on(t: &Trial) {
    let mut file = unlinked(t, b"0123456789");
    file.seek(SeekFrom::Start(4)).expect("seek");
    t.checkpoint();
    is_nameless(t, &file);
    let mut two = [0; 2];
    file.read_exact(&mut two).expect("read");
    assert_eq!(&two, b"45");
    file.write_all(b"xy").expect("write");
    assert_eq!(text(&file), "012345xy89");
    file.set_len(20).expect("grow");
    file.set_len(3).expect("shrink");
    assert_eq!(text(&file), "012");
}

fn unlinked_file_keeps_owner_mode_and_times(t: &Trial) {
    let file = unlinked(t, b"x");
    file.set_permissions(PermissionsExt::from_mode(0o4711)).expect("chmod");
    std::os::unix::fs::fchown(&file, Some(12), Some(34)).expect("chown");
    file.set_permissions(PermissionsExt::from_mode(0o4711)).expect("chmod");
    let time = |seconds| SystemTime::UNIX_EPOCH + Duration::new(seconds, 123_456_000);
    let times = fs::FileTimes::new().set_accessed(time(1000)).set_modified(time(2000));
    file.set_times(times).expect("set times");
    t.checkpoint();
    let found = file.metadata().expect("stat");
    assert_eq!((found.uid(), found.gid(), found.mode()), (12, 34, libc::S_IFREG | 0o4711));
    assert_eq!((found.atime(), found.atime_nsec()), (1000, 123_456_000));
    assert_eq!((found.mtime(), found.mtime_nsec()), (2000, 123_456_000));
}

fn unlinked_file_keeps_nanoseconds(t: &Trial) {
    let file = unlinked(t, b"x");
    let time = |seconds| SystemTime::UNIX_EPOCH + Duration::new(seconds, 123_456_789);
    let times = fs::FileTimes::new().set_accessed(time(1000)).set_modified(time(2000));
    file.set_times(times).expect("set times");
    t.checkpoint();
    let found = file.metadata().expect("stat");
    assert_eq!((found.atime_nsec(), found.mtime_nsec()), (123_456_789, 123_456_789));
}

fn unlinked_file_of_descriptors_and_processes_stays_one(t: &Trial) {
    let one = edit(t.path("file"));
    let again = OpenOptions::new().append(true).open(t.path("file")).expect("open");
    let same = one.try_clone().expect("dup");
    let child = fork(|| {
        let own = OpenOptions::new().write(true).open(t.path("file")).expect("open");
        t.mark("child");
        t.hold();
        own.write_all_at(b"C", 2).expect("write");
    });
    t.await_mark("child");
    fs::remove_file(t.path("file")).expect("unlink");
    (&one).write_all(b"ab").expect("write");
    t.checkpoint();
    is_nameless(t, &one);
    child.succeed();
    assert_eq!((&same).stream_position().expect("tell"), 2);
    (&again).write_all(b"!").expect("append");
    (&same).write_all(b"B").expect("write");
    assert_eq!(text(&one), "abB!");
}

/// Allocated bytes, and the content of a file with holes: that they are in the same place.
fn holes(file: &File) -> (u64, u64, Vec<u8>) {
    let found = file.metadata().expect("stat");
    let mut bytes = Vec::new();
    for at in (0..found.len()).step_by(1 << 16) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        bytes.extend(byte);
    }
    (found.len(), found.blocks(), bytes)
}

fn unlinked_file_with_holes_stays_sparse(t: &Trial) {
    let file = unlinked(t, b"begin");
    file.write_all_at(&[7; 5000], 1 << 20).expect("write");
    file.write_all_at(&[9; 100], 64 << 20).expect("write");
    file.set_len(100 << 20).expect("end in a hole");
    let before = holes(&file);
    t.checkpoint();
    assert_eq!(holes(&file), before);
    is_nameless(t, &file);
}

fn unlinked_file_that_is_one_hole_stays_sparse(t: &Trial) {
    let file = unlinked(t, b"");
    file.set_len(1 << 30).expect("a hole");
    t.checkpoint();
    let found = file.metadata().expect("stat");
    assert_eq!((found.len(), found.blocks()), (1 << 30, 0));
}

fn unlinked_file_in_a_removed_folder_survives(t: &Trial) {
    fs::create_dir_all(t.path("one/two")).expect("mkdir");
    let mut file = edit(t.path("one/two/file"));
    file.write_all(b"deep").expect("write");
    fs::remove_dir_all(t.path("one")).expect("remove");
    t.checkpoint();
    is_nameless(t, &file);
    assert_eq!(text(&file), "deep");
}

fn several_removed_names_of_one_file_survive(t: &Trial) {
    let one = edit(t.path("one"));
    fs::hard_link(t.path("one"), t.path("two")).expect("link");
    let two = OpenOptions::new().read(true).open(t.path("two")).expect("open");
    fs::remove_file(t.path("one")).expect("unlink");
    fs::remove_file(t.path("two")).expect("unlink");
    t.checkpoint();
    is_nameless(t, &one);
    assert_eq!(one.metadata().expect("stat").ino(), two.metadata().expect("stat").ino());
    (&one).write_all(b"shared").expect("write");
    assert_eq!(text(&two), "shared");
}

fn unlinked_file_whose_name_is_taken_survives(t: &Trial) {
    let old = unlinked(t, b"old");
    let new = edit(t.path("file"));
    (&new).write_all(b"newer").expect("write");
    t.checkpoint();
    assert_eq!(text(&old), "old");
    assert_eq!(text(&new), "newer");
    assert_eq!(old.metadata().expect("stat").nlink(), 0);
    assert_eq!(new.metadata().expect("stat").nlink(), 1);
    assert_eq!(fs::read_to_string(t.path("file")).expect("read"), "newer");
    fs::remove_file(t.path("file")).expect("unlink");
    is_nameless(t, &old);
}

fn unlinked_empty_file_survives(t: &Trial) {
    let file = unlinked(t, b"");
    t.checkpoint();
    is_nameless(t, &file);
    assert_eq!(file.metadata().expect("stat").len(), 0);
}

fn unlinked_file_with_an_odd_name_survives(t: &Trial) {
    let path = t.path("odd \\ \"name\" \n *").join("x (deleted)");
    fs::create_dir(path.parent().expect("a folder")).expect("mkdir");
    let mut file = edit(&path);
    file.write_all(b"odd").expect("write");
    fs::remove_dir_all(path.parent().expect("a folder")).expect("remove");
    t.checkpoint();
    is_nameless(t, &file);
    assert_eq!(text(&file), "odd");
}

fn unlinked_folder_survives(t: &Trial) {
    fs::create_dir(t.path("folder")).expect("mkdir");
    fs::set_permissions(t.path("folder"), PermissionsExt::from_mode(0o1751)).expect("chmod");
    let folder = File::open(t.path("folder")).expect("open");
    fs::remove_dir(t.path("folder")).expect("rmdir");
    t.checkpoint();
    let found = folder.metadata().expect("stat");
    assert_eq!((found.mode() & 0o7777, found.is_dir()), (0o1751, true));
    assert!(!t.path("folder").exists());
}

fn working_in_an_unlinked_folder_goes_on(t: &Trial) {
    fs::create_dir(t.path("folder")).expect("mkdir");
    std::env::set_current_dir(t.path("folder")).expect("chdir");
    fs::remove_dir(t.path("folder")).expect("rmdir");
    t.checkpoint();
    let error = File::create("new").expect_err("it is gone");
    assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    let link = fs::read_link("/proc/self/cwd").expect("readlink");
    assert_eq!(link.to_string_lossy(), format!("{} (deleted)", t.path("folder").display()));
}

fn unlinked_fifo_keeps_its_bytes(t: &Trial) {
    nix::unistd::mkfifo(&t.path("fifo"), Permissions::from_bits_truncate(0o640)).expect("mkfifo");
    let open = |options: &mut OpenOptions| options.custom_flags(libc::O_NONBLOCK).open(t.path("fifo")).expect("open");
    let mut from = open(OpenOptions::new().read(true));
    let mut to = open(OpenOptions::new().write(true));
    to.write_all(b"before").expect("write");
    fs::remove_file(t.path("fifo")).expect("unlink");
    t.checkpoint();
    is_nameless(t, &from);
    to.write_all(b" after").expect("write");
    let mut bytes = [0; 12];
    from.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"before after");
}

fn unlinked_symlink_and_device_survive(t: &Trial) {
    std::os::unix::fs::symlink("the target", t.path("link")).expect("symlink");
    let device = nix::sys::stat::makedev(1, 5);
    let mode = Permissions::from_bits_truncate(0o600);
    nix::sys::stat::mknod(&t.path("zero"), nix::sys::stat::SFlag::S_IFCHR, mode, device).expect("mknod");
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let link = OpenOptions::new().read(true).custom_flags(flags).open(t.path("link")).expect("open");
    let mut zero = File::open(t.path("zero")).expect("open");
    fs::remove_file(t.path("link")).expect("unlink");
    fs::remove_file(t.path("zero")).expect("unlink");
    t.checkpoint();
    is_nameless(t, &zero);
    let mut byte = [1];
    zero.read_exact(&mut byte).expect("read");
    assert_eq!(byte, [0]);
    let link = OwnedFd::from(link);
    assert_eq!(nix::fcntl::readlinkat(&link, "").expect("readlinkat"), "the target");
}

fn mappings_of_an_unlinked_file_stay_one_with_it(t: &Trial) {
    let file = unlinked(t, &[b'a'; 8192]);
    let map = || Map::file(file.as_fd(), 8192, RW, libc::MAP_SHARED, 0);
    let (one, two) = (map(), map());
    one.set(0, b'1');
    t.checkpoint();
    is_nameless(t, &file);
    assert_eq!(two.get(0), b'1');
    two.set(5000, b'2');
    assert_eq!(one.get(5000), b'2');
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5000).expect("read");
    assert_eq!(&byte, b"2");
}

fn private_mapping_of_an_unlinked_file_keeps_its_changes(t: &Trial) {
    let file = unlinked(t, &[b'a'; 8192]);
    let map = Map::file(file.as_fd(), 8192, RW, libc::MAP_PRIVATE, 0);
    drop(file);
    map.set(1, b'b');
    t.checkpoint();
    assert_eq!([map.get(0), map.get(1), map.get(2)], *b"aba");
    assert_eq!(map.get(8191), b'a');
}

fn file_whose_name_ends_in_deleted_is_no_ghost(t: &Trial) {
    let mut file = edit(t.path("file (deleted)"));
    file.write_all(b"here").expect("write");
    t.checkpoint();
    assert_eq!(file.metadata().expect("stat").nlink(), 1);
    assert_eq!(fs::read_to_string(t.path("file (deleted)")).expect("read"), "here");
}

fn large_unlinked_file_is_refused(t: &Trial) {
    let file = unlinked(t, &vec![1; 2 << 20]);
    t.checkpoint();
    assert_eq!(file.metadata().expect("stat").len(), 2 << 20);
}

fn large_unlinked_file_survives_with_the_limit_raised(t: &Trial) {
    let content: Vec<u8> = (0..2 << 20).map(|i: u32| (i * 7 + i / 991) as u8).collect();
    let file = unlinked(t, &content);
    t.checkpoint();
    let mut found = vec![0; content.len()];
    file.read_exact_at(&mut found, 0).expect("read");
    assert!(found == content, "the content is another");
}

fn living(t: &Trial) -> File {
    let mut file = edit(t.path("file"));
    file.write_all(b"alive").expect("write");
    fs::hard_link(t.path("file"), t.path("other")).expect("link");
    fs::remove_file(t.path("file")).expect("unlink");
    file
}

fn removed_name_of_a_living_file_is_refused(t: &Trial) {
    let file = living(t);
    t.checkpoint();
    assert_eq!(text(&file), "alive");
}

fn lives_on(t: &Trial, mut file: File) {
    assert_eq!(file.metadata().expect("stat").nlink(), 1);
    file.write_all(b" and well").expect("write");
    assert_eq!(fs::read_to_string(t.path("other")).expect("read"), "alive and well");
    fs::remove_file(t.path("other")).expect("unlink");
    is_nameless(t, &file);
}

fn removed_name_of_a_living_file_survives(t: &Trial) {
    let file = living(t);
    t.checkpoint();
    lives_on(t, file);
}

fn replaced_name_of_a_living_file_survives(t: &Trial) {
    let file = living(t);
    drop(edit(t.path("file")));
    t.checkpoint();
    fs::remove_file(t.path("file")).expect("unlink");
    lives_on(t, file);
}

fn file_below_a_mount_is_refused(t: &Trial) {
    use nix::mount::{MsFlags, mount};
    fs::create_dir(t.path("folder")).expect("mkdir");
    let file = edit(t.path("folder/file"));
    let nothing: Option<&str> = None;
    mount(Some("tmpfs"), &t.path("folder"), Some("tmpfs"), MsFlags::empty(), nothing).expect("mount");
    drop(edit(t.path("folder/file")));
    t.checkpoint();
    assert!(file.as_raw_fd() > 0);
    assert_ne!(file.metadata().expect("stat").ino(), 0);
}

/// Files without names, sockets with and without, a terminal and a segment, whose images are then damaged.
pub fn varied_target(t: &Trial) {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
    let ghost = unlinked(t, b"a ghost");
    ghost.write_all_at(&[1; 100], 100 << 10).expect("write");
    fs::create_dir(t.path("folder")).expect("mkdir");
    let folder = File::open(t.path("folder")).expect("open");
    fs::remove_dir(t.path("folder")).expect("rmdir");
    let listener = UnixListener::bind(t.path("server")).expect("bind");
    let client = UnixStream::connect(t.path("server")).expect("connect");
    let accepted = listener.accept().expect("accept").0;
    let waiting = UnixStream::connect(t.path("server")).expect("connect");
    let datagrams = UnixDatagram::bind(t.path("datagrams")).expect("bind");
    let sender = UnixDatagram::bind(t.path("sender")).expect("bind");
    sender.connect(t.path("datagrams")).expect("connect");
    sender.send(b"queued").expect("send");
    let segment = crate::sys::shm::attach(crate::sys::shm::make(0xfeed, 8192, 0o600), 8192, 0);
    segment.put(4096, 1);
    let (master, slave) = crate::sys::pty::pair();
    nix::unistd::write(&slave, b"output").expect("write");
    nix::unistd::write(&master, b"a line\nand").expect("write");
    let child = fork(|| {
        nix::unistd::setsid().expect("setsid");
        crate::sys::pty::take(&slave);
        t.mark("session");
        t.hold();
    });
    t.await_mark("session");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            t.mark("thread");
            t.hold();
        });
        t.await_mark("thread");
        t.checkpoint();
    });
    child.succeed();
    crate::sys::shm::remove(segment.id);
    drop((master, slave));
    drop((ghost, folder, listener, client, accepted, waiting, datagrams, sender));
}
