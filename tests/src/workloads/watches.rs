//! inotify: the same numbers, the same files, nothing but what happens.

use std::fs::{self, File};
use std::os::fd::AsFd;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::process::fork;

pub const CASES: &[Case] = &[
    case!(watches_go_on_under_their_numbers).exchange(),
    case!(watch_for_one_event_ends_with_it).peer_cannot("it makes it one for many"),
    case!(watch_of_a_file_that_was_moved_goes_on),
    case!(watch_of_a_symlink_goes_on),
    case!(thousand_watches_survive),
    case!(inotify_without_watches_and_with_flags_survives).exchange(),
    case!(watch_of_an_unlinked_file_goes_on).peer_cannot("it loses the file"),
    case!(events_that_were_not_read_are_kept).peer_cannot("it loses them"),
    case!(events_are_kept_in_a_queue_that_is_full).peer_cannot("it loses them"),
    case!(events_of_what_is_gone_are_kept).peer_cannot("it loses them"),
    case!(events_kept_give_no_signal).peer_cannot("it loses them"),
    case!(events_that_were_lost_are_told_of).peer_cannot("it does not tell"),
    case!(watch_without_a_handle_is_refused).refused(&["watch", "handle", "--force-irmap"])
        .peer_cannot("it always searches"),
    case!(watch_without_a_handle_is_found_by_a_search).options(&["--irmap-scan-path=/run/searched"])
        .peer_cannot("its search is another"),
];

fn names(inotify: &Inotify) -> Vec<(WatchDescriptor, AddWatchFlags, String)> {
    match inotify.read_events() {
        Ok(events) => events
            .into_iter()
            .map(|event| (event.wd, event.mask, event.name.unwrap_or_default().into_string().expect("text")))
            .collect(),
        Err(nix::errno::Errno::EAGAIN) => Vec::new(),
        Err(error) => panic!("read: {error}"),
    }
}

fn make() -> Inotify {
    Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC).expect("inotify_init1")
}

fn watches_go_on_under_their_numbers(t: &Trial) {
    let inotify = make();
    fs::create_dir(t.path("folder")).expect("mkdir");
    drop(File::create(t.path("folder/file")).expect("create"));
    let spare = inotify.add_watch("/", AddWatchFlags::IN_DELETE_SELF).expect("watch");
    let folder = inotify.add_watch(&t.path("folder"), AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE);
    let file = inotify.add_watch(&t.path("folder/file"), AddWatchFlags::IN_MODIFY);
    let (folder, file) = (folder.expect("watch"), file.expect("watch"));
    inotify.rm_watch(spare).expect("rm_watch");
    assert_eq!(names(&inotify).len(), 1);
    let child = fork(|| t.hold());
    t.checkpoint();
    child.succeed();
    assert_eq!(names(&inotify), []);
    drop(File::create(t.path("folder/new")).expect("create"));
    fs::write(t.path("folder/file"), b"x").expect("write");
    let seen = names(&inotify);
    assert_eq!(seen[0], (folder, AddWatchFlags::IN_CREATE, "new".to_owned()));
    assert_eq!(seen[1], (file, AddWatchFlags::IN_MODIFY, String::new()));
    assert_eq!(seen.len(), 2);
}

fn watch_for_one_event_ends_with_it(t: &Trial) {
    let inotify = make();
    drop(File::create(t.path("file")).expect("create"));
    let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ONESHOT;
    inotify.add_watch(t.directory(), AddWatchFlags::IN_DELETE_SELF).expect("watch");
    let wd = inotify.add_watch(&t.path("file"), flags).expect("watch");
    t.checkpoint();
    fs::write(t.path("file"), b"x").expect("write");
    let expected = [AddWatchFlags::IN_MODIFY, AddWatchFlags::IN_IGNORED].map(|what| (wd, what, String::new()));
    assert_eq!(names(&inotify), expected);
    // The next number is behind the last, even if that is free.
    assert_ne!(inotify.add_watch(&t.path("file"), AddWatchFlags::IN_MODIFY).expect("watch"), wd);
}

fn watch_of_a_file_that_was_moved_goes_on(t: &Trial) {
    let inotify = make();
    drop(File::create(t.path("old")).expect("create"));
    let wd = inotify.add_watch(&t.path("old"), AddWatchFlags::IN_MODIFY).expect("watch");
    fs::rename(t.path("old"), t.path("new")).expect("rename");
    drop(File::create(t.path("old")).expect("create"));
    t.checkpoint();
    fs::write(t.path("old"), b"x").expect("write");
    assert_eq!(names(&inotify), []);
    fs::write(t.path("new"), b"x").expect("write");
    assert_eq!(names(&inotify), [(wd, AddWatchFlags::IN_MODIFY, String::new())]);
}

fn thousand_watches_survive(t: &Trial) {
    let inotify = make();
    let all: Vec<_> = (0..1000)
        .map(|n| {
            let path = t.path(&format!("file{n}"));
            drop(File::create(&path).expect("create"));
            (inotify.add_watch(&path, AddWatchFlags::IN_ATTRIB).expect("watch"), path)
        })
        .collect();
    t.checkpoint();
    for (wd, path) in &all {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
        assert_eq!(names(&inotify), [(*wd, AddWatchFlags::IN_ATTRIB, String::new())]);
    }
}

fn inotify_without_watches_and_with_flags_survives(t: &Trial) {
    let one = make();
    let two = Inotify::init(InitFlags::empty()).expect("inotify_init1");
    t.checkpoint();
    let flags = |inotify: &Inotify| {
        nix::fcntl::fcntl(inotify.as_fd(), nix::fcntl::FcntlArg::F_GETFL).expect("F_GETFL") & libc::O_NONBLOCK
    };
    assert_eq!((flags(&one), flags(&two)), (libc::O_NONBLOCK, 0));
    one.add_watch(t.directory(), AddWatchFlags::IN_CREATE).expect("watch");
    drop(File::create(t.path("new")).expect("create"));
    assert_eq!(names(&one).len(), 1);
}

fn watch_of_an_unlinked_file_goes_on(t: &Trial) {
    let inotify = make();
    let file = File::create(t.path("file")).expect("create");
    let wd = inotify.add_watch(&t.path("file"), AddWatchFlags::IN_MODIFY).expect("watch");
    fs::remove_file(t.path("file")).expect("unlink");
    t.checkpoint();
    assert_eq!(names(&inotify), []);
    nix::unistd::write(&file, b"x").expect("write");
    assert_eq!(names(&inotify), [(wd, AddWatchFlags::IN_MODIFY, String::new())]);
    drop(file);
    let last = [AddWatchFlags::IN_IGNORED];
    assert_eq!(names(&inotify).into_iter().map(|event| event.1).collect::<Vec<_>>(), last);
}

/// All that is in the queue, and which events belong together.
fn all(inotify: &Inotify) -> Vec<(i32, u32, Option<usize>, Vec<u8>)> {
    let mut cookies = Vec::new();
    let mut all = Vec::new();
    while let Ok(events) = inotify.read_events() {
        all.extend(events.into_iter().map(|event| {
            let known = cookies.iter().position(|cookie| *cookie == event.cookie);
            let pair = (event.cookie != 0).then(|| {
                known.unwrap_or_else(|| {
                    cookies.push(event.cookie);
                    cookies.len() - 1
                })
            });
            // SAFETY: it is what it is made of.
            let wd = unsafe { std::mem::transmute::<WatchDescriptor, i32>(event.wd) };
            (wd, event.mask.bits(), pair, event.name.unwrap_or_default().into_encoded_bytes())
        }));
    }
    all
}

fn events_that_were_not_read_are_kept(t: &Trial) {
    for folder in ["one", "two"] {
        fs::create_dir(t.path(folder)).expect("mkdir");
    }
    drop(File::create(t.path("file")).expect("create"));
    let [expected, inotify] = [make(), make()];
    for inotify in [&expected, &inotify] {
        for path in ["one", "two", "file"] {
            inotify.add_watch(&t.path(path), AddWatchFlags::IN_ALL_EVENTS).expect("watch");
        }
    }
    let long = "n".repeat(255);
    fs::write(t.path("one/new"), b"text").expect("write");
    fs::read(t.path("one/new")).expect("read");
    fs::read(t.path("file")).expect("read");
    fs::write(t.path("file"), b"text").expect("write");
    fs::set_permissions(t.path("file"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("chmod");
    fs::create_dir(t.path("one/folder")).expect("mkdir");
    fs::read_dir(t.path("one/folder")).expect("readdir").for_each(drop);
    fs::read_dir(t.path("two")).expect("readdir").for_each(drop);
    fs::rename(t.path("one/new"), t.path("two").join(&long)).expect("rename");
    fs::rename(t.path("one/folder"), t.path("one/renamed")).expect("rename");
    fs::rename(t.path("one/renamed"), t.path("outside")).expect("rename");
    fs::rename(t.path("outside"), t.path("two/inside")).expect("rename");
    fs::remove_dir(t.path("two/inside")).expect("rmdir");
    fs::hard_link(t.path("file"), t.path("one/file")).expect("link");
    fs::rename(t.path("file"), t.path("moved")).expect("rename");
    fs::remove_file(t.path("two").join(&long)).expect("unlink");
    let expected = all(&expected);
    assert!(expected.len() > 30, "{expected:?}");
    t.checkpoint();
    assert_eq!(all(&inotify), expected);
    fs::write(t.path("one/last"), b"").expect("write");
    let last: Vec<_> = all(&inotify).into_iter().map(|event| (event.0, event.1)).collect();
    let opened = [AddWatchFlags::IN_CREATE, AddWatchFlags::IN_OPEN, AddWatchFlags::IN_CLOSE_WRITE];
    assert_eq!(last, opened.map(|mask| (1, mask.bits())));
}

fn events_are_kept_in_a_queue_that_is_full(t: &Trial) {
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").expect("limit");
    let limit: usize = limit.trim().parse().expect("a number");
    let queue = |made: usize, read: usize, then: usize| {
        let folder = t.path(&format!("folder-{made}-{read}"));
        fs::create_dir(&folder).expect("mkdir");
        drop(File::create(folder.join("file")).expect("create"));
        let [expected, inotify] = [make(), make()];
        for inotify in [&expected, &inotify] {
            let flags = AddWatchFlags::IN_OPEN | AddWatchFlags::IN_CLOSE_NOWRITE;
            inotify.add_watch(&folder, flags).expect("watch");
        }
        // Two events each.
        let open = |count: usize| {
            (0..count / 2).for_each(|_| drop(File::open(folder.join("file")).expect("open")));
        };
        open(made);
        for inotify in [&expected, &inotify] {
            let mut some = vec![0; read * 32];
            if read > 0 {
                nix::unistd::read(inotify, &mut some).expect("read");
            }
        }
        open(then);
        (all(&expected), inotify)
    };
    // To the last that fits, and beyond: nothing is read, or some is and others come behind the one that says so.
    let queues = [(limit - 2, 0, 0), (limit + 5, 0, 0), (limit + 5, 9, 4)].map(|(made, read, then)| queue(made, read, then));
    t.checkpoint();
    for (expected, inotify) in &queues {
        let seen = all(inotify);
        assert_eq!(seen.len(), expected.len());
        assert!(seen == *expected);
    }
}

fn events_of_what_is_gone_are_kept(t: &Trial) {
    let [expected, inotify] = [make(), make()];
    let mounted = t.path("mounted");
    fs::create_dir(&mounted).expect("mkdir");
    nix::mount::mount(Some("none"), &mounted, Some("tmpfs"), nix::mount::MsFlags::empty(), None::<&str>)
        .expect("mount");
    fs::create_dir(t.path("folder")).expect("mkdir");
    drop(File::create(t.path("file")).expect("create"));
    drop(File::create(t.path("other")).expect("create"));
    fs::create_dir(t.path("place")).expect("mkdir");
    for inotify in [&expected, &inotify] {
        for path in ["folder", "file", "mounted", "other"] {
            inotify.add_watch(&t.path(path), AddWatchFlags::IN_ALL_EVENTS).expect("watch");
        }
    }
    drop(File::create(t.path("folder/x")).expect("create"));
    fs::remove_file(t.path("file")).expect("unlink");
    fs::remove_dir_all(t.path("folder")).expect("rmdir");
    fs::write(t.path("mounted/x"), b"x").expect("write");
    nix::mount::umount(&mounted).expect("umount");
    for inotify in [&expected, &inotify] {
        let wd = inotify.add_watch(&t.path("other"), AddWatchFlags::IN_ALL_EVENTS).expect("watch");
        inotify.rm_watch(wd).expect("rm_watch");
        inotify.add_watch(&t.path("place"), AddWatchFlags::IN_CREATE).expect("watch");
    }
    drop(File::create(t.path("place/new")).expect("create"));
    let expected = all(&expected);
    let ended = expected.iter().filter(|event| event.1 == libc::IN_IGNORED).count();
    assert_eq!(ended, 4);
    t.checkpoint();
    assert_eq!(all(&inotify), expected);
}

fn events_kept_give_no_signal(t: &Trial) {
    use nix::sys::signal::{SigSet, Signal};
    let mut urgent = SigSet::empty();
    urgent.add(Signal::SIGIO);
    urgent.thread_block().expect("block");
    let inotify = make();
    fs::create_dir(t.path("folder")).expect("mkdir");
    let wd = inotify.add_watch(&t.path("folder"), AddWatchFlags::IN_CREATE).expect("watch");
    drop(File::create(t.path("folder/first")).expect("create"));
    let number = std::os::fd::AsRawFd::as_raw_fd(&inotify.as_fd());
    // SAFETY: integers only.
    let set = unsafe {
        [
            libc::fcntl(number, libc::F_SETOWN, libc::getpid()),
            libc::fcntl(number, libc::F_SETFL, libc::O_NONBLOCK | libc::O_ASYNC),
        ]
    };
    assert_eq!(set, [0, 0]);
    t.checkpoint();
    let pending = || {
        let mut pending = SigSet::empty();
        // SAFETY: the kernel fills the set.
        unsafe { libc::sigpending(std::ptr::from_mut(&mut pending).cast()) };
        pending.contains(Signal::SIGIO)
    };
    assert!(!pending());
    let created = |name: &str| (wd, AddWatchFlags::IN_CREATE, name.to_owned());
    assert_eq!(names(&inotify), [created("first")]);
    drop(File::create(t.path("folder/second")).expect("create"));
    assert!(pending());
    assert_eq!(names(&inotify), [created("second")]);
}

/// A program without privileges cuts a file that runs with those of its owner: one event that says two things. Nobody
/// else can bring that about.
fn events_that_were_lost_are_told_of(t: &Trial) {
    let inotify = make();
    let file = File::create(t.path("file")).expect("create");
    let wd = inotify.add_watch(&t.path("file"), AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB).expect("watch");
    std::os::unix::fs::fchown(&file, Some(4321), Some(4321)).expect("fchown");
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o4755)).expect("chmod");
    names(&inotify);
    let own = file.try_clone().expect("dup");
    fork(move || {
        // SAFETY: integers only.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 4321, 4321, 4321) }, 0);
        own.set_len(1).expect("ftruncate");
    })
    .succeed();
    t.checkpoint();
    // A program that was only looked at has lost nothing.
    let both = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB;
    let told = names(&inotify);
    let is_kept = told == [(wd, both, String::new())];
    assert!(is_kept || told.len() == 1 && told[0].1 == AddWatchFlags::IN_Q_OVERFLOW, "{told:?}");
    nix::unistd::write(&file, b"x").expect("write");
    assert_eq!(names(&inotify), [(wd, AddWatchFlags::IN_MODIFY, String::new())]);
}

/// A file on a file system that opens no handle, watched.
fn watched_without_a_handle(top: &std::path::Path) -> (Inotify, WatchDescriptor) {
    use nix::mount::{MsFlags, mount};
    let folders = ["lower", "upper", "work", "at"].map(|name| top.join(name));
    folders.iter().for_each(|folder| fs::create_dir_all(folder).expect("mkdir"));
    fs::write(top.join("lower/file"), b"x").expect("write");
    let [lower, upper, work, at] = folders.map(|folder| folder.to_str().expect("text").to_owned());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    mount(Some("overlay"), &*at, Some("overlay"), MsFlags::empty(), Some(&*options)).expect("mount");
    // Its inode is another one from the first write on.
    fs::write(top.join("at/file"), b"y").expect("write");
    let inotify = make();
    let wd = inotify.add_watch(&top.join("at/file"), AddWatchFlags::IN_MODIFY).expect("watch");
    (inotify, wd)
}

fn watch_without_a_handle_is_refused(t: &Trial) {
    let (inotify, _) = watched_without_a_handle(std::path::Path::new("/run/unsearched"));
    t.checkpoint();
    assert_eq!(names(&inotify), []);
}

fn watch_without_a_handle_is_found_by_a_search(t: &Trial) {
    let (inotify, wd) = watched_without_a_handle(std::path::Path::new("/run/searched"));
    t.checkpoint();
    assert_eq!(names(&inotify), []);
    let file = fs::OpenOptions::new().write(true).open("/run/searched/at/file").expect("open");
    nix::unistd::write(&file, b"z").expect("write");
    assert_eq!(names(&inotify), [(wd, AddWatchFlags::IN_MODIFY, String::new())]);
}

fn watch_of_a_symlink_goes_on(t: &Trial) {
    let inotify = make();
    drop(File::create(t.path("file")).expect("create"));
    std::os::unix::fs::symlink("file", t.path("link")).expect("symlink");
    let itself = AddWatchFlags::IN_DONT_FOLLOW | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_DELETE_SELF;
    let link = inotify.add_watch(&t.path("link"), itself).expect("watch");
    let through = inotify.add_watch(&t.path("link"), AddWatchFlags::IN_MODIFY).expect("watch");
    t.checkpoint();
    assert_eq!(names(&inotify), []);
    fs::write(t.path("file"), b"x").expect("write");
    fs::remove_file(t.path("link")).expect("unlink");
    let seen: Vec<_> = names(&inotify).into_iter().map(|(wd, mask, _)| (wd, mask)).collect();
    assert_eq!(seen[0], (through, AddWatchFlags::IN_MODIFY));
    assert!(seen.contains(&(link, AddWatchFlags::IN_DELETE_SELF)), "{seen:?}");
}
