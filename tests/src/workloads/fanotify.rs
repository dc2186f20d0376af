//! fanotify: the same marks, nothing but what happens.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::mount::{MsFlags, mount};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use crate::case;
use crate::case::{Case, Trial};

pub const CASES: &[Case] = &[
    case!(marks_on_files_and_folders_go_on).exchange(),
    case!(mark_on_a_mount_goes_on_with_what_it_ignores).exchange(),
    case!(mark_on_a_file_system_goes_on).peer_cannot("it knows no such marks"),
    case!(group_without_marks_keeps_its_flags).exchange(),
    case!(mark_on_an_unlinked_file_goes_on).peer_cannot("it loses the file"),
    case!(events_that_were_not_read_are_told_of_as_lost).peer_cannot("it loses them"),
    case!(events_that_nobody_could_hear_of_are_refused).refused(&["fanotify", "2 events", "nobody has read"])
        .peer_cannot("it loses them"),
    case!(marks_that_give_permission_are_refused).refused(&["fanotify", "permission"]).peer_cannot("it dumps this"),
];

type Seen = (MaskFlags, PathBuf);

fn events(group: &Fanotify) -> Vec<Seen> {
    match group.read_events() {
        Ok(events) => events
            .into_iter()
            .map(|event| {
                let number = event.fd().expect("a descriptor").as_raw_fd();
                (event.mask(), fs::read_link(format!("/proc/self/fd/{number}")).expect("readlink"))
            })
            .collect(),
        Err(nix::errno::Errno::EAGAIN) => Vec::new(),
        Err(error) => panic!("read: {error}"),
    }
}

fn group(flags: InitFlags) -> Fanotify {
    Fanotify::init(flags | InitFlags::FAN_NONBLOCK, EventFFlags::O_RDWR).expect("fanotify_init")
}

fn mark(group: &Fanotify, flags: MarkFlags, mask: MaskFlags, path: &PathBuf) {
    let here = File::open("/").expect("open");
    group.mark(MarkFlags::FAN_MARK_ADD | flags, mask, &here, Some(path)).expect("fanotify_mark");
}

fn make(t: &Trial, name: &str) -> PathBuf {
    let path = t.path(name);
    drop(File::create(&path).expect("create"));
    path
}

fn marks_on_files_and_folders_go_on(t: &Trial) {
    let folder = t.path("folder");
    fs::create_dir(&folder).expect("mkdir");
    let (file, inner) = (make(t, "file"), make(t, "folder/inner"));
    let one = group(InitFlags::FAN_CLASS_NOTIF);
    mark(&one, MarkFlags::empty(), MaskFlags::FAN_MODIFY, &file);
    mark(&one, MarkFlags::empty(), MaskFlags::FAN_OPEN | MaskFlags::FAN_EVENT_ON_CHILD, &folder);
    t.checkpoint();
    assert_eq!(events(&one), []);
    fs::write(&file, b"x").expect("write");
    drop(File::open(&inner).expect("open"));
    drop(File::open(&folder).expect("open"));
    assert_eq!(events(&one), [(MaskFlags::FAN_MODIFY, file), (MaskFlags::FAN_OPEN, inner)]);
}

/// A mount of its own, so that nobody else is heard there.
fn own_mount(t: &Trial) -> PathBuf {
    let path = t.path("mount");
    fs::create_dir(&path).expect("mkdir");
    mount(Some("own"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("mount");
    path
}

fn mark_on_a_mount_goes_on_with_what_it_ignores(t: &Trial) {
    let path = own_mount(t);
    let (heard, ignored) = (make(t, "mount/heard"), make(t, "mount/ignored"));
    let one = group(InitFlags::FAN_CLASS_NOTIF);
    mark(&one, MarkFlags::FAN_MARK_MOUNT, MaskFlags::FAN_OPEN, &path);
    let ignores = MarkFlags::FAN_MARK_IGNORED_MASK | MarkFlags::FAN_MARK_IGNORED_SURV_MODIFY;
    mark(&one, ignores, MaskFlags::FAN_OPEN, &ignored);
    t.checkpoint();
    for _ in 0..2 {
        fs::write(&ignored, b"x").expect("write");
        drop(File::open(&heard).expect("open"));
        assert_eq!(events(&one), [(MaskFlags::FAN_OPEN, heard.clone())]);
    }
}

fn mark_on_a_file_system_goes_on(t: &Trial) {
    let path = own_mount(t);
    let file = make(t, "mount/file");
    let one = group(InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_UNLIMITED_MARKS);
    mark(&one, MarkFlags::FAN_MARK_FILESYSTEM, MaskFlags::FAN_CLOSE_WRITE, &path);
    // Also under another mount of it.
    let other = t.path("other");
    fs::create_dir(&other).expect("mkdir");
    mount(Some(&path), &other, None::<&str>, MsFlags::MS_BIND, None::<&str>).expect("bind");
    t.checkpoint();
    assert_eq!(events(&one), []);
    fs::write(other.join("file"), b"x").expect("write");
    drop(File::open(&file).expect("open"));
    assert_eq!(events(&one), [(MaskFlags::FAN_CLOSE_WRITE, other.join("file"))]);
}

fn group_without_marks_keeps_its_flags(t: &Trial) {
    let one = group(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_UNLIMITED_QUEUE);
    let text = || {
        let text = fs::read_to_string("/proc/self/fdinfo/3").expect("fdinfo");
        text.lines().find(|line| line.starts_with("fanotify flags")).expect("a line of flags").to_owned()
    };
    let before = text();
    t.checkpoint();
    assert_eq!(text(), before);
    let file = make(t, "file");
    mark(&one, MarkFlags::empty(), MaskFlags::FAN_OPEN, &file);
    drop(File::open(&file).expect("open"));
    assert_eq!(events(&one).len(), 1);
}

fn mark_on_an_unlinked_file_goes_on(t: &Trial) {
    let path = make(t, "file");
    let file = File::create(&path).expect("create");
    let one = group(InitFlags::FAN_CLASS_NOTIF);
    mark(&one, MarkFlags::empty(), MaskFlags::FAN_MODIFY, &path);
    fs::remove_file(&path).expect("unlink");
    t.checkpoint();
    assert_eq!(events(&one), []);
    nix::unistd::write(&file, b"x").expect("write");
    assert_eq!(events(&one).len(), 1);
}

fn events_that_were_not_read_are_told_of_as_lost(t: &Trial) {
    const LOST: MaskFlags = MaskFlags::FAN_Q_OVERFLOW;
    let flags = [
        InitFlags::FAN_CLASS_NOTIF,
        InitFlags::FAN_CLASS_CONTENT,
        InitFlags::from_bits_retain(libc::FAN_REPORT_FID),
        InitFlags::FAN_REPORT_PIDFD,
        InitFlags::from_bits_retain(libc::FAN_REPORT_DIR_FID | libc::FAN_REPORT_NAME),
    ];
    let groups = flags.map(group);
    own_mount(t);
    let file = make(t, "mount/file");
    for group in &groups {
        mark(group, MarkFlags::empty(), MaskFlags::FAN_OPEN, &file);
    }
    let heard = |group: &Fanotify| -> Vec<MaskFlags> {
        match group.read_events() {
            Ok(events) => events.iter().map(|event| event.mask()).collect(),
            Err(nix::errno::Errno::EAGAIN) => Vec::new(),
            Err(error) => panic!("read: {error}"),
        }
    };
    drop(File::open(&file).expect("open"));
    t.checkpoint();
    for group in &groups {
        let told = heard(group);
        // A program that was only looked at has lost nothing.
        assert!(told == [LOST] || told == [MaskFlags::FAN_OPEN], "{told:?}");
    }
    drop(File::open(&file).expect("open"));
    for group in &groups {
        assert_eq!(heard(group), [MaskFlags::FAN_OPEN]);
    }
}

fn events_that_nobody_could_hear_of_are_refused(t: &Trial) {
    let one = group(InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_UNLIMITED_QUEUE);
    own_mount(t);
    let (this, that) = (make(t, "mount/this"), make(t, "mount/that"));
    for file in [&this, &that] {
        mark(&one, MarkFlags::empty(), MaskFlags::FAN_OPEN, file);
    }
    for file in [&this, &that] {
        drop(File::open(file).expect("open"));
    }
    t.checkpoint();
    assert_eq!(events(&one), [(MaskFlags::FAN_OPEN, this), (MaskFlags::FAN_OPEN, that)]);
}

fn marks_that_give_permission_are_refused(t: &Trial) {
    let path = own_mount(t);
    let one = group(InitFlags::FAN_CLASS_CONTENT);
    mark(&one, MarkFlags::FAN_MARK_MOUNT, MaskFlags::FAN_OPEN_PERM, &path);
    t.checkpoint();
    assert_eq!(events(&one), []);
}
