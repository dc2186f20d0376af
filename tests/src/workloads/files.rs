//! Regular files, directories, devices, and what descriptors are made of.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::stat::{Mode, umask};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::call::{KCMP_FILES, KCMP_FS, is_same, is_same_file};
use crate::sys::process::{clone_sharing, fork};

pub const CASES: &[Case] = &[
    case!(duplicates_share_a_position_and_second_opens_do_not).exchange(),
    case!(description_inherited_by_a_child_stays_shared).exchange(),
    case!(two_processes_with_one_descriptor_table_keep_it),
    case!(two_threads_keep_one_descriptor_table),
    case!(close_on_exec_is_kept_for_each_descriptor).exchange(),
    case!(flags_of_every_sort_are_kept),
    case!(files_of_the_system_are_read_on),
    case!(message_queue_is_refused).refused(&["fd", "/a_queue"]).peer_cannot("it does not look"),
    case!(append_and_nonblock_flags_are_kept).exchange(),
    case!(read_only_and_write_only_files_stay_so),
    case!(directory_descriptor_still_leads_to_its_files).exchange(),
    case!(directory_is_read_on_where_it_stopped).peer_cannot("it drops O_DIRECTORY from the flags"),
    case!(path_descriptors_of_every_sort_survive),
    case!(path_descriptor_of_a_fifo_survives).peer_cannot("it asks for the data of a fifo opened with O_PATH"),
    case!(usual_devices_still_answer).exchange(),
    case!(high_descriptor_numbers_are_kept),
    case!(no_stray_descriptor_appears),
    case!(a_thousand_descriptors_survive),
    case!(working_directory_and_umask_are_kept).exchange(),
    case!(child_in_a_chroot_keeps_its_root),
    case!(threads_keep_one_working_directory_and_umask),
    case!(processes_with_one_fs_struct_keep_it).not_yet("processes that share their working directory").peer_cannot("it refuses processes that share an fs struct"),
    case!(file_size_and_position_beyond_the_end_are_kept),
    case!(deleted_file_keeps_content_and_position).exchange(),
    case!(deleted_file_shared_by_parent_and_child_stays_one_file).exchange(),
    case!(own_executable_open_at_an_offset_survives),
    case!(file_under_proc_self_survives).exchange(),
    case!(signals_of_a_pipe_go_to_whom_they_went).exchange(),
    case!(signals_of_a_socket_go_to_one_thread),
    case!(file_from_outside_is_passed_in).outside(file_passed_in).restless(),
    case!(file_from_outside_that_is_not_passed_in_is_refused).outside(file_not_passed_in).restless()
        .restore_refused(&["file[", "--inherit-fd"]).peer_cannot("its message is another"),
    case!(file_is_written_and_read_meanwhile).restless(),
    case!(file_renamed_after_opening_is_found_under_its_new_name),
];

fn pid() -> i32 {
    std::process::id() as i32
}

fn duplicates_share_a_position_and_second_opens_do_not(t: &Trial) {
    fs::write(t.path("data"), [0; 100]).expect("write");
    let mut a = File::open(t.path("data")).expect("open");
    let mut b = a.try_clone().expect("dup");
    let mut c = File::open(t.path("data")).expect("open again");
    a.seek(SeekFrom::Start(10)).expect("seek");
    c.seek(SeekFrom::Start(20)).expect("seek");
    t.checkpoint();
    assert_eq!(b.stream_position().expect("position"), 10);
    b.seek(SeekFrom::Start(33)).expect("seek");
    assert_eq!(a.stream_position().expect("position"), 33);
    assert_eq!(c.stream_position().expect("position"), 20);
    assert!(is_same_file((pid(), a.as_raw_fd()), (pid(), b.as_raw_fd())));
    assert!(!is_same_file((pid(), a.as_raw_fd()), (pid(), c.as_raw_fd())));
}

fn description_inherited_by_a_child_stays_shared(t: &Trial) {
    fs::write(t.path("data"), b"abcdef").expect("write");
    let mut file = File::open(t.path("data")).expect("open");
    let child = fork(|| {
        t.mark("child");
        t.hold();
        t.await_mark("parent-read");
        let mut two = [0; 2];
        file.read_exact(&mut two).expect("read");
        assert_eq!(&two, b"cd");
    });
    t.await_mark("child");
    t.checkpoint();
    let fd = file.as_raw_fd();
    assert!(is_same_file((pid(), fd), (child.pid.as_raw(), fd)));
    let mut two = [0; 2];
    file.read_exact(&mut two).expect("read");
    assert_eq!(&two, b"ab");
    t.mark("parent-read");
    child.succeed();
    assert_eq!(file.stream_position().expect("position"), 4);
}

fn two_processes_with_one_descriptor_table_keep_it(t: &Trial) {
    let child = clone_sharing(libc::CLONE_FILES, || {
        t.mark("child");
        t.hold();
        t.await_mark("checked");
    });
    t.await_mark("child");
    t.checkpoint();
    assert!(is_same(pid(), child.pid.as_raw(), KCMP_FILES, 0, 0));
    t.mark("checked");
    child.succeed();
}

fn two_threads_keep_one_descriptor_table(t: &Trial) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            t.mark("thread");
            t.hold();
            let file = File::create(t.path("by-thread")).expect("create");
            fs::write(t.path("number"), file.as_raw_fd().to_string()).expect("write");
            std::mem::forget(file);
            t.mark("opened");
        });
        t.await_mark("thread");
        t.checkpoint();
        t.await_mark("opened");
        let number = fs::read_to_string(t.path("number")).expect("read");
        assert_eq!(fs::read_link(format!("/proc/self/fd/{number}")).expect("link"), t.path("by-thread"));
    });
}

fn close_on_exec_is_kept_for_each_descriptor(t: &Trial) {
    let file = File::create(t.path("data")).expect("create");
    let twin = file.try_clone().expect("dup");
    fcntl(&twin, FcntlArg::F_SETFD(FdFlag::empty())).expect("fcntl");
    t.checkpoint();
    assert_eq!(fcntl(&file, FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));
    assert_eq!(fcntl(&twin, FcntlArg::F_GETFD), Ok(0));
}

fn flags_of_every_sort_are_kept(t: &Trial) {
    fs::write(t.path("data"), vec![b'x'; 8192]).expect("write");
    let flags = [libc::O_SYNC, libc::O_DSYNC, libc::O_NOATIME, libc::O_DIRECT, libc::O_NOFOLLOW, libc::O_ASYNC];
    let files = flags.map(|flag| {
        let file = OpenOptions::new().read(true).write(true).custom_flags(flag & !libc::O_ASYNC).open(t.path("data"));
        let file = file.expect("open");
        let own = fcntl(&file, FcntlArg::F_GETFL).expect("fcntl");
        // A regular file takes it and never signals.
        let own = OFlag::from_bits_retain(own | flag & libc::O_ASYNC);
        fcntl(&file, FcntlArg::F_SETFL(own)).expect("fcntl");
        file
    });
    let asked = files.each_ref().map(|file| fcntl(file, FcntlArg::F_GETFL));
    t.checkpoint();
    assert_eq!(files.each_ref().map(|file| fcntl(file, FcntlArg::F_GETFL)), asked);
}

fn files_of_the_system_are_read_on(t: &Trial) {
    let paths = ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled", "/proc/sys/kernel/ostype"];
    let files = paths.map(|path| {
        let mut file = File::open(path).expect("open");
        let mut part = [0; 3];
        file.read_exact(&mut part).expect("read");
        let mut whole = fs::read(path).expect("read");
        assert_eq!(whole[..3], part);
        (file, whole.split_off(3))
    });
    t.checkpoint();
    for (mut file, rest) in files {
        let mut found = Vec::new();
        file.read_to_end(&mut found).expect("read");
        assert_eq!(found, rest);
    }
}

fn message_queue_is_refused(t: &Trial) {
    let flags = libc::O_CREAT | libc::O_RDWR;
    // SAFETY: the kernel reads a C string; without attributes it takes its own.
    let queue = unsafe { libc::mq_open(c"/a_queue".as_ptr(), flags, 0o600, std::ptr::null::<u8>()) };
    assert!(queue >= 0, "{}", std::io::Error::last_os_error());
    t.checkpoint();
    // SAFETY: the kernel reads one byte, and a C string.
    let sent = unsafe { libc::mq_send(queue, b"x".as_ptr().cast(), 1, 0) };
    assert_eq!(sent, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::mq_unlink(c"/a_queue".as_ptr()) }, 0);
}

fn append_and_nonblock_flags_are_kept(t: &Trial) {
    let mut file = OpenOptions::new()
        .append(true)
        .create(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(t.path("data"))
        .expect("open");
    file.write_all(b"one").expect("write");
    let flags = fcntl(&file, FcntlArg::F_GETFL).expect("fcntl");
    t.checkpoint();
    assert_eq!(fcntl(&file, FcntlArg::F_GETFL), Ok(flags));
    assert!(OFlag::from_bits_retain(flags).contains(OFlag::O_APPEND | OFlag::O_NONBLOCK));
    fs::write(t.path("data"), b"replaced").expect("write");
    file.write_all(b"two").expect("write");
    assert_eq!(fs::read(t.path("data")).expect("read"), b"replacedtwo");
}

fn read_only_and_write_only_files_stay_so(t: &Trial) {
    fs::write(t.path("data"), b"x").expect("write");
    let mut reader = File::open(t.path("data")).expect("open");
    let mut writer = OpenOptions::new().write(true).open(t.path("data")).expect("open");
    t.checkpoint();
    assert_eq!(reader.write(b"y").expect_err("read only").raw_os_error(), Some(libc::EBADF));
    assert_eq!(writer.read(&mut [0]).expect_err("write only").raw_os_error(), Some(libc::EBADF));
}

fn directory_descriptor_still_leads_to_its_files(t: &Trial) {
    fs::create_dir(t.path("d")).expect("mkdir");
    fs::write(t.path("d/inside"), b"here").expect("write");
    let directory = File::open(t.path("d")).expect("open");
    t.checkpoint();
    let inside = nix::fcntl::openat(&directory, "inside", OFlag::O_RDONLY, Mode::empty()).expect("openat");
    let mut text = String::new();
    File::from(inside).read_to_string(&mut text).expect("read");
    assert_eq!(text, "here");
}

fn directory_is_read_on_where_it_stopped(t: &Trial) {
    fs::create_dir(t.path("d")).expect("mkdir");
    for number in 0..500 {
        File::create(t.path(&format!("d/{number}"))).expect("create");
    }
    let mut entries = fs::read_dir(t.path("d")).expect("read_dir");
    let mut seen: Vec<String> = Vec::new();
    for _ in 0..3 {
        seen.push(entries.next().expect("an entry").expect("read").file_name().to_string_lossy().into_owned());
    }
    t.checkpoint();
    for entry in entries {
        seen.push(entry.expect("read").file_name().to_string_lossy().into_owned());
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 500);
}

fn path_descriptors_of_every_sort_survive(t: &Trial) {
    fs::write(t.path("file"), b"x").expect("write");
    fs::create_dir(t.path("directory")).expect("mkdir");
    std::os::unix::fs::symlink("file", t.path("link")).expect("symlink");
    let open = |name: &str| {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(t.path(name))
            .unwrap_or_else(|e| panic!("open {name}: {e}"))
    };
    let names = ["file", "directory", "link"];
    let all: Vec<File> = names.iter().map(|name| open(name)).collect();
    let before: Vec<u64> = all.iter().map(|f| f.metadata().expect("stat").ino()).collect();
    t.checkpoint();
    for (file, (name, inode)) in all.iter().zip(names.iter().zip(before)) {
        assert_eq!(file.metadata().expect("stat").ino(), inode, "{name}");
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).expect("fcntl"));
        assert!(flags.contains(OFlag::O_PATH), "{name}");
    }
    assert!(all[2].metadata().expect("stat").file_type().is_symlink());
    // The same inode from the outside, a mere path on the inside.
    assert_eq!(nix::unistd::read(&all[0], &mut [0]), Err(nix::errno::Errno::EBADF));
}

fn path_descriptor_of_a_fifo_survives(t: &Trial) {
    nix::unistd::mkfifo(&t.path("fifo"), Mode::S_IRUSR | Mode::S_IWUSR).expect("mkfifo");
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(t.path("fifo")).expect("open");
    let inode = file.metadata().expect("stat").ino();
    t.checkpoint();
    assert_eq!(file.metadata().expect("stat").ino(), inode);
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).expect("fcntl"));
    assert!(flags.contains(OFlag::O_PATH));
}

fn usual_devices_still_answer(t: &Trial) {
    let open = |name: &str| OpenOptions::new().read(true).write(true).open(name).expect("open a device");
    let (mut null, mut zero, mut full) = (open("/dev/null"), open("/dev/zero"), open("/dev/full"));
    let mut random = File::open("/dev/urandom").expect("open");
    t.checkpoint();
    assert_eq!(null.read(&mut [1; 4]).expect("read"), 0);
    let mut bytes = [1; 4];
    zero.read_exact(&mut bytes).expect("read");
    assert_eq!(bytes, [0; 4]);
    assert_eq!(full.write(b"x").expect_err("full").raw_os_error(), Some(libc::ENOSPC));
    let mut noise = [0; 32];
    random.read_exact(&mut noise).expect("read");
    assert_ne!(noise, [0; 32]);
}

fn high_descriptor_numbers_are_kept(t: &Trial) {
    // Numbers where tools like to keep descriptors of their own: just below the limit, and powers of two.
    let (limit, _) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("getrlimit");
    let file = File::create(t.path("data")).expect("create");
    let mut wanted = vec![50, 63, 64, 255, 256, 511, 1000];
    wanted.extend((1..=20).map(|below| i32::try_from(limit.min(4096)).expect("small") - below));
    let copies: Vec<OwnedFd> = wanted
        .iter()
        .map(|number| {
            let got = fcntl(&file, FcntlArg::F_DUPFD(*number)).expect("dup");
            // SAFETY: the descriptor was made by the line above and has no other owner.
            unsafe { OwnedFd::from_raw_fd(got) }
        })
        .collect();
    assert!(copies.iter().zip(&wanted).all(|(copy, number)| copy.as_raw_fd() == *number));
    t.checkpoint();
    for copy in &copies {
        assert!(is_same_file((pid(), file.as_raw_fd()), (pid(), copy.as_raw_fd())));
    }
}

fn open_descriptors() -> Vec<String> {
    let mut all: Vec<String> = fs::read_dir("/proc/self/fd")
        .expect("read /proc/self/fd")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .collect();
    all.sort();
    all
}

fn no_stray_descriptor_appears(t: &Trial) {
    let before = open_descriptors();
    t.checkpoint();
    assert_eq!(open_descriptors(), before);
}

fn a_thousand_descriptors_survive(t: &Trial) {
    fs::write(t.path("data"), [7; 1000]).expect("write");
    let mut files: Vec<File> = (0..900).map(|_| File::open(t.path("data")).expect("open")).collect();
    for (position, file) in files.iter_mut().enumerate() {
        file.seek(SeekFrom::Start(position as u64)).expect("seek");
    }
    t.checkpoint();
    for (position, file) in files.iter_mut().enumerate() {
        assert_eq!(file.stream_position().expect("position"), position as u64);
    }
}

fn working_directory_and_umask_are_kept(t: &Trial) {
    fs::create_dir(t.path("deep")).expect("mkdir");
    std::env::set_current_dir(t.path("deep")).expect("chdir");
    umask(Mode::from_bits_retain(0o137));
    t.checkpoint();
    File::create("relative").expect("create");
    let made = fs::metadata(t.path("deep/relative")).expect("made in the old directory");
    assert_eq!(made.permissions().mode() & 0o777, 0o666 & !0o137);
}

fn child_in_a_chroot_keeps_its_root(t: &Trial) {
    fs::create_dir_all(t.path("new/inside")).expect("mkdir");
    let child = fork(|| {
        nix::unistd::chroot(&t.path("new")).expect("chroot");
        nix::unistd::chdir("/inside").expect("chdir");
        // The way to the markers is cut off: the parent waits for the root to change instead.
        while !std::path::Path::new("/go").exists() {
            crate::sys::nap();
        }
        assert_eq!(std::env::current_dir().expect("cwd"), std::path::Path::new("/inside"));
        File::create("/from-child").expect("create");
    });
    let root = format!("/proc/{}/cwd", child.pid);
    crate::case::until("the chroot", || fs::read_link(&root).is_ok_and(|to| to == t.path("new/inside")));
    t.checkpoint();
    assert_eq!(fs::read_link(format!("/proc/{}/root", child.pid)).expect("root"), t.path("new"));
    File::create(t.path("new/go")).expect("create");
    child.succeed();
    assert!(t.path("new/from-child").exists());
}

fn threads_keep_one_working_directory_and_umask(t: &Trial) {
    fs::create_dir(t.path("deep")).expect("mkdir");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            t.mark("thread");
            t.hold();
            std::env::set_current_dir(t.path("deep")).expect("chdir");
            umask(Mode::from_bits_retain(0o70));
            t.mark("changed");
        });
        t.await_mark("thread");
        t.checkpoint();
        t.await_mark("changed");
        assert_eq!(std::env::current_dir().expect("cwd"), t.path("deep"));
        assert_eq!(umask(Mode::empty()), Mode::from_bits_retain(0o70));
    });
}

fn processes_with_one_fs_struct_keep_it(t: &Trial) {
    let child = clone_sharing(libc::CLONE_FS, || {
        t.mark("child");
        t.hold();
        t.await_mark("checked");
    });
    t.await_mark("child");
    t.checkpoint();
    assert!(is_same(pid(), child.pid.as_raw(), KCMP_FS, 0, 0));
    t.mark("checked");
    child.succeed();
}

fn file_size_and_position_beyond_the_end_are_kept(t: &Trial) {
    let mut file = File::create(t.path("data")).expect("create");
    file.write_all(b"abc").expect("write");
    file.seek(SeekFrom::Start(1 << 33)).expect("seek");
    t.checkpoint();
    assert_eq!(file.stream_position().expect("position"), 1 << 33);
    assert_eq!(file.metadata().expect("stat").len(), 3);
}

fn deleted_file_keeps_content_and_position(t: &Trial) {
    let path = t.path("data");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).expect("create");
    file.write_all(b"still here").expect("write");
    file.seek(SeekFrom::Start(6)).expect("seek");
    fs::remove_file(&path).expect("remove");
    t.checkpoint();
    assert!(!path.exists());
    assert_eq!(file.metadata().expect("stat").nlink(), 0);
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, "here");
}

fn deleted_file_shared_by_parent_and_child_stays_one_file(t: &Trial) {
    let path = t.path("data");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).expect("create");
    fs::remove_file(&path).expect("remove");
    let child = fork(|| {
        t.mark("child");
        t.hold();
        t.await_mark("written");
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).expect("seek");
        file.read_to_string(&mut text).expect("read");
        assert_eq!(text, "from the parent");
    });
    t.await_mark("child");
    t.checkpoint();
    file.write_all(b"from the parent").expect("write");
    t.mark("written");
    child.succeed();
}

fn own_executable_open_at_an_offset_survives(t: &Trial) {
    let mut file = File::open("/proc/self/exe").expect("open");
    file.seek(SeekFrom::Start(1)).expect("seek");
    t.checkpoint();
    let mut three = [0; 3];
    file.read_exact(&mut three).expect("read");
    assert_eq!(&three, b"ELF");
}

fn file_under_proc_self_survives(t: &Trial) {
    let mut file = File::open(format!("/proc/{}/comm", pid())).expect("open");
    t.checkpoint();
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    assert_eq!(text, "workload\n");
}

/// The signal that waits, and its number of a descriptor.
fn waiting_signal(signal: i32) -> Option<(i32, i32)> {
    crate::sys::signal::take_of_file(signal)
}

fn ask_for_signals(fd: impl AsFd, kind: i32, id: i32, signal: i32) {
    crate::sys::signal::block_number(signal);
    crate::sys::signal::send_for(fd.as_fd(), kind, id, signal);
}

fn signals_of_a_pipe_go_to_whom_they_went(t: &Trial) {
    const F_OWNER_PID: i32 = 1;
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    ask_for_signals(&reader, F_OWNER_PID, pid(), libc::SIGUSR2);
    t.checkpoint();
    assert_eq!(waiting_signal(libc::SIGUSR2), None);
    writer.write_all(b"x").expect("write");
    assert_eq!(waiting_signal(libc::SIGUSR2), Some((libc::SIGUSR2, reader.as_raw_fd())));
    reader.read_exact(&mut [0]).expect("read");
}

fn signals_of_a_socket_go_to_one_thread(t: &Trial) {
    const F_OWNER_TID: i32 = 0;
    let (one, mut other) = std::os::unix::net::UnixStream::pair().expect("pair");
    let (say, id) = std::sync::mpsc::channel();
    crate::sys::signal::block_number(libc::SIGUSR1);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            say.send(nix::unistd::gettid().as_raw()).expect("send");
            t.await_mark("sent");
            waiting_signal(libc::SIGUSR1)
        });
        let id = id.recv().expect("an id");
        ask_for_signals(&one, F_OWNER_TID, id, libc::SIGUSR1);
        t.checkpoint();
        other.write_all(b"x").expect("write");
        assert_eq!(waiting_signal(libc::SIGUSR1), None);
        t.mark("sent");
        assert_eq!(thread.join().expect("join"), Some((libc::SIGUSR1, one.as_raw_fd())));
    });
}

/// The descriptor that the harness gives to the tool.
const GIVEN: i32 = 101;

/// The file that the workload has open and that is none of the tree's: its key.
fn name_it(o: &Outside) -> String {
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/3", o.pid)).expect("fdinfo");
    let value = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key)).expect("a line");
        line.trim().parse::<u64>().expect("a number")
    };
    format!("file[{:x}:{:x}]", value("mnt_id:"), value("ino:"))
}

fn leave_it_out(o: &mut Outside) {
    let key = name_it(o);
    o.dump = vec![format!("--external={key}")];
    o.restore = vec![format!("--inherit-fd=fd[{GIVEN}]:{key}")];
}

fn file_passed_in(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Ready | Moment::Back => leave_it_out(o),
        Moment::Away => {
            let other = o.directory.join("other");
            fs::write(&other, b"another one").expect("write");
            let mut file = File::open(&other).expect("open");
            file.seek(SeekFrom::Start(8)).expect("seek");
            // SAFETY: nobody else uses this number; without close-on-exec the tool inherits it.
            assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), GIVEN) }, GIVEN);
        }
        _ => {}
    }
}

fn file_from_outside_is_passed_in(t: &Trial) {
    fs::write(t.path("file"), b"some text").expect("write");
    let mut file = File::open(t.path("file")).expect("open");
    file.seek(SeekFrom::Start(5)).expect("seek");
    t.checkpoint();
    let mut rest = String::new();
    file.read_to_string(&mut rest).expect("read");
    assert_eq!(rest, if t.path("other").exists() { "one" } else { "text" });
}

fn file_not_passed_in(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Ready => {
            leave_it_out(o);
            fs::write(o.directory.join("key"), o.restore.remove(0)).expect("write");
        }
        Moment::Mend => {
            o.restore.push(fs::read_to_string(o.directory.join("key")).expect("read"));
            file_passed_in(o, Moment::Away);
        }
        _ => {}
    }
}

fn file_from_outside_that_is_not_passed_in_is_refused(t: &Trial) {
    file_from_outside_is_passed_in(t);
}

fn file_renamed_after_opening_is_found_under_its_new_name(t: &Trial) {
    let mut file = File::create(t.path("old")).expect("create");
    fs::rename(t.path("old"), t.path("new")).expect("rename");
    t.checkpoint();
    file.write_all(b"x").expect("write");
    assert_eq!(fs::read(t.path("new")).expect("read"), b"x");
}

/// One writes numbers, another reads them behind it, and both check what they have.
fn file_is_written_and_read_meanwhile(t: &Trial) {
    const SOME: u64 = 1000;
    let path = t.path("numbers");
    let mut file = File::create(&path).expect("create");
    let reader = fork(|| {
        let mut file = File::open(&path).expect("open");
        let mut next = 0_u64;
        loop {
            let is_over = t.is_over();
            let mut bytes = [0; 8];
            // A number is written whole.
            match file.read(&mut bytes).expect("read") {
                8 => {
                    assert_eq!(u64::from_ne_bytes(bytes), next);
                    assert_eq!(file.stream_position().expect("position"), (next + 1) * 8);
                    next += 1;
                }
                0 if is_over && next * 8 == file.metadata().expect("stat").len() => break,
                0 => crate::sys::nap(),
                other => panic!("{other} bytes were read"),
            }
        }
        assert!(next > SOME);
    });
    let writer = fork(|| {
        for number in 0_u64.. {
            if number == SOME {
                t.mark("written");
            }
            if number > SOME && t.is_over() {
                break;
            }
            file.write_all(&number.to_ne_bytes()).expect("write");
            // It is not to fill the memory.
            if number.is_multiple_of(64) {
                crate::sys::nap();
            }
        }
    });
    t.await_mark("written");
    t.checkpoint();
    writer.succeed();
    reader.succeed();
}
