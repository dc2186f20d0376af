//! Files without a name where that is hard: on file systems that nobody may write to, or that cannot link; and files that
//! never had one.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};

const LINKS: &[&str] = &["--link-remap"];

pub const CASES: &[Case] = &[
    case!(unlinked_file_on_a_read_only_mount_survives).peer_cannot("it remounts in namespaces of its own alone"),
    case!(unlinked_file_on_another_mount_survives),
    case!(removed_name_on_a_read_only_mount_is_refused).options(LINKS).refused(&["fd", "make a link", "Read-only"]),
    case!(removed_name_in_a_removed_folder_is_refused).options(LINKS).refused(&["fd", "make a link", "No such file"]),
    case!(removed_name_without_a_handle_is_refused_for_a_snapshot).options(LINKS).outside(snapshot)
        .refused(&["fd", "without file handles"]).peer_cannot("it leaves the link"),
    // Its number, by which the kernel calls it, is a new one.
    case!(file_that_never_had_a_name_can_still_get_one).restless().peer_cannot("it gives it one"),
    case!(ten_unlinked_files_of_a_gigabyte_of_holes_survive).options(&["--ghost-limit", "1G"]),
];

fn mount_at(t: &Trial, name: &str) -> std::path::PathBuf {
    let at = t.path(name);
    fs::create_dir(&at).expect("mkdir");
    let nothing: Option<&str> = None;
    mount(Some("tmpfs"), &at, Some("tmpfs"), MsFlags::empty(), nothing).expect("mount");
    at
}

fn read_only(at: &Path) {
    let nothing: Option<&str> = None;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(nothing, at, nothing, flags, nothing).expect("remount");
}

fn written(path: &Path) -> File {
    fs::write(path, "0123456789").expect("write");
    let mut file = File::open(path).expect("open");
    file.seek(SeekFrom::Start(4)).expect("seek");
    file
}

#[track_caller]
fn reads_on(mut file: File) {
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "456789");
}

fn names(at: &Path) -> usize {
    fs::read_dir(at).expect("read").count()
}

fn unlinked_file_on_a_read_only_mount_survives(t: &Trial) {
    let at = mount_at(t, "mount");
    let file = written(&at.join("file"));
    fs::remove_file(at.join("file")).expect("unlink");
    read_only(&at);
    let device = file.metadata().expect("stat").dev();
    t.checkpoint();
    let found = file.metadata().expect("stat");
    assert_eq!((found.nlink(), found.dev()), (0, device));
    // It is open by the mount that nobody may write to.
    let again = OpenOptions::new().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    assert_eq!(again.expect_err("nobody may write").raw_os_error(), Some(libc::EROFS));
    assert_eq!(names(&at), 0);
    reads_on(file);
}

fn unlinked_file_on_another_mount_survives(t: &Trial) {
    let at = mount_at(t, "mount");
    let file = written(&at.join("file"));
    fs::remove_file(at.join("file")).expect("unlink");
    let device = file.metadata().expect("stat").dev();
    t.checkpoint();
    assert_eq!(file.metadata().expect("stat").dev(), device);
    assert_eq!(names(&at), 0);
    reads_on(file);
}

fn removed_name_on_a_read_only_mount_is_refused(t: &Trial) {
    let at = mount_at(t, "mount");
    let file = written(&at.join("file"));
    fs::hard_link(at.join("file"), at.join("other")).expect("link");
    fs::remove_file(at.join("file")).expect("unlink");
    read_only(&at);
    t.checkpoint();
    assert_eq!(names(&at), 1);
    reads_on(file);
}

fn removed_name_in_a_removed_folder_is_refused(t: &Trial) {
    fs::create_dir(t.path("folder")).expect("mkdir");
    let file = written(&t.path("folder/file"));
    fs::hard_link(t.path("folder/file"), t.path("other")).expect("link");
    fs::remove_file(t.path("folder/file")).expect("unlink");
    fs::remove_dir(t.path("folder")).expect("rmdir");
    t.checkpoint();
    reads_on(file);
}

fn snapshot(o: &mut Outside, _: Moment) {
    o.dump = vec!["--leave-running".into()];
}

fn removed_name_without_a_handle_is_refused_for_a_snapshot(t: &Trial) {
    let top = mount_at(t, "mount");
    let folders = ["lower", "upper", "work", "at"].map(|name| top.join(name));
    folders.iter().for_each(|folder| fs::create_dir(folder).expect("mkdir"));
    let [lower, upper, work, at] = folders.map(|folder| folder.to_str().expect("text").to_owned());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount(Some("overlay"), &*at, Some("overlay"), MsFlags::empty(), Some(&*options)).expect("mount");
    let at = Path::new(&at);
    let file = written(&at.join("file"));
    fs::hard_link(at.join("file"), at.join("other")).expect("link");
    fs::remove_file(at.join("file")).expect("unlink");
    t.checkpoint();
    reads_on(file);
}

fn file_that_never_had_a_name_can_still_get_one(t: &Trial) {
    let open = |more: i32| {
        let flags = libc::O_TMPFILE | more;
        let file = OpenOptions::new().read(true).write(true).mode(0o640).custom_flags(flags).open(t.directory());
        let mut file = file.expect("O_TMPFILE");
        file.write_all(b"0123456789").expect("write");
        file
    };
    let (file, other) = (open(0), open(0));
    t.checkpoint();
    for (file, name) in [(&file, "one"), (&other, "two")] {
        assert_eq!(file.metadata().expect("stat").nlink(), 0);
        let old = format!("/proc/self/fd/{}", file.as_raw_fd());
        let (here, follow) = (nix::fcntl::AT_FDCWD, nix::fcntl::AtFlags::AT_SYMLINK_FOLLOW);
        nix::unistd::linkat(here, &*old, here, &t.path(name), follow).expect("linkat");
        assert_eq!(fs::read(t.path(name)).expect("read"), b"0123456789");
        assert_eq!(file.metadata().expect("stat").mode() & 0o777, 0o640);
    }
}

fn ten_unlinked_files_of_a_gigabyte_of_holes_survive(t: &Trial) {
    const LEN: u64 = (1 << 30) - 1;
    let files: Vec<OwnedFd> = (0..10)
        .map(|nth: u8| {
            let file = File::create_new(t.path("file")).expect("create");
            file.set_len(LEN).expect("truncate");
            file.write_all_at(&[nth + 1], u64::from(nth) << 24).expect("write");
            fs::remove_file(t.path("file")).expect("unlink");
            file.into()
        })
        .collect();
    t.checkpoint();
    for (nth, fd) in (0_u8..).zip(files) {
        let file = File::from(fd);
        let found = file.metadata().expect("stat");
        assert_eq!((found.len(), found.nlink()), (LEN, 0));
        assert!(found.blocks() < 64, "{} blocks", found.blocks());
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("open");
        let mut byte = [0];
        again.read_exact_at(&mut byte, u64::from(nth) << 24).expect("read");
        assert_eq!(byte, [nth + 1]);
    }
}
