//! Files of `/proc` that belong to processes: of living ones, of dead ones, and their namespaces.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::process::fork;

pub const CASES: &[Case] = &[
    case!(files_of_living_processes_go_on).peer_cannot("it opens them before the threads are there"),
    case!(own_status_goes_on).exchange(),
    case!(working_directory_of_a_living_process_goes_on).peer_cannot("it opens it too early"),
    case!(files_of_a_dead_process_stay_dead).options(&["--link-remap"]).exchange(),
    case!(working_directory_of_a_dead_process_survives).options(&["--link-remap"]).exchange(),
    case!(file_of_a_dead_thread_is_refused).refused(&["fd", "thread that has ended"]),
    case!(own_namespaces_go_on).exchange(),
    case!(foreign_namespace_is_refused).refused(&["fd", "namespace", "another"]),
];

fn text(mut file: &File) -> String {
    file.seek(SeekFrom::Start(0)).expect("seek");
    let mut text = String::new();
    file.read_to_string(&mut text).expect("read");
    text
}

fn value(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(key)).expect("a line");
    line[key.len()..].trim().to_owned()
}

fn files_of_living_processes_go_on(t: &Trial) {
    let child = fork(|| {
        t.mark("child");
        t.hold();
    });
    let end = t.path("end");
    let until_the_end = || {
        while !end.exists() {
            crate::sys::nap();
        }
    };
    t.await_mark("child");
    let (say, id) = std::sync::mpsc::channel();
    let thread = std::thread::scope(|scope| {
        scope.spawn(|| {
            say.send(nix::unistd::gettid()).expect("send");
            until_the_end();
        });
        let id = id.recv().expect("an id");
        let own = File::open(format!("/proc/self/task/{id}/status")).expect("open");
        let status = File::open(format!("/proc/{}/status", child.pid)).expect("open");
        let mut memory = File::open("/proc/self/mem").expect("open");
        let folder = File::open(format!("/proc/{}/fd", child.pid)).expect("open");
        static WORD: [u8; 8] = *b"a secret";
        t.checkpoint();
        assert_eq!(value(&text(&own), "Pid:"), id.to_string());
        assert_eq!(value(&text(&status), "Pid:"), child.pid.to_string());
        let mut word = [0; 8];
        memory.seek(SeekFrom::Start(WORD.as_ptr() as u64)).expect("seek");
        memory.read_exact(&mut word).expect("read");
        assert_eq!(word, WORD);
        t.mark("end");
        // The child may have ended meanwhile; its folder is there until it is waited for.
        let link = fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd())).expect("readlink");
        assert_eq!(link, PathBuf::from(format!("/proc/{}/fd", child.pid)));
        id
    });
    assert!(thread.as_raw() > 0);
    child.succeed();
}

fn own_status_goes_on(t: &Trial) {
    let status = File::open("/proc/self/status").expect("open");
    let before = value(&text(&status), "Pid:");
    t.checkpoint();
    assert_eq!(value(&text(&status), "Pid:"), before);
}

fn working_directory_of_a_living_process_goes_on(t: &Trial) {
    let child = fork(|| {
        t.mark("child");
        t.hold();
    });
    t.await_mark("child");
    std::env::set_current_dir(format!("/proc/{}", child.pid)).expect("chdir");
    t.checkpoint();
    assert_eq!(std::env::current_dir().expect("cwd"), PathBuf::from(format!("/proc/{}", child.pid)));
    assert_eq!(value(&fs::read_to_string("status").expect("read"), "Pid:"), child.pid.to_string());
    child.succeed();
}

fn link(fd: impl AsFd) -> String {
    let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())).expect("readlink");
    link.into_os_string().into_string().expect("text")
}

fn of_a_dead_process(t: &Trial, then: impl FnOnce(nix::unistd::Pid)) {
    let child = fork(|| {
        t.mark("child");
        t.await_mark("end");
    });
    t.await_mark("child");
    then(child.pid);
    t.mark("end");
    child.succeed();
}

fn files_of_a_dead_process_stay_dead(t: &Trial) {
    let mut opened: Option<(File, File)> = None;
    of_a_dead_process(t, |pid| {
        let open = |name: &str| File::open(format!("/proc/{pid}{name}")).expect("open");
        opened = Some((open("/stat"), open("")));
    });
    let (mut stat, folder) = opened.expect("they were opened");
    let before = (link(&stat), link(&folder));
    assert!(before.1.ends_with(" (deleted)"));
    t.checkpoint();
    assert_eq!((link(&stat), link(&folder)), before);
    let error = stat.read(&mut [0; 16]).expect_err("nobody is there");
    assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
}

fn working_directory_of_a_dead_process_survives(t: &Trial) {
    of_a_dead_process(t, |pid| std::env::set_current_dir(format!("/proc/{pid}")).expect("chdir"));
    let cwd = || fs::read_link("/proc/self/cwd").expect("readlink");
    let before = cwd();
    assert!(before.to_str().expect("text").ends_with(" (deleted)"));
    t.checkpoint();
    assert_eq!(cwd(), before);
    assert!(fs::read("status").is_err());
}

fn file_of_a_dead_thread_is_refused(t: &Trial) {
    let (end, told) = std::sync::mpsc::channel::<()>();
    let (say, id) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        say.send(nix::unistd::gettid()).expect("send");
        told.recv().expect("the end");
    });
    let id = id.recv().expect("an id");
    let mut file = File::open(format!("/proc/self/task/{id}/comm")).expect("open");
    end.send(()).expect("send");
    thread.join().expect("join");
    crate::case::until("the end of the thread", || file.read(&mut [0; 1]).is_err());
    t.checkpoint();
    assert!(file.read(&mut [0; 4]).is_err());
}

fn namespace(name: &str) -> OwnedFd {
    open(&*format!("/proc/self/ns/{name}"), OFlag::O_RDONLY, Mode::empty()).expect("open")
}

fn own_namespaces_go_on(t: &Trial) {
    let names = ["net", "uts", "mnt", "ipc"];
    let opened = names.map(namespace);
    let before = opened.each_ref().map(link);
    t.checkpoint();
    assert_eq!(opened.each_ref().map(link), before);
    assert_eq!(setns(&opened[0], CloneFlags::CLONE_NEWNET), Ok(()));
    assert_eq!(setns(&opened[0], CloneFlags::CLONE_NEWUTS), Err(Errno::EINVAL));
}

fn foreign_namespace_is_refused(t: &Trial) {
    let mut opened = None;
    let child = fork(|| {
        nix::sched::unshare(CloneFlags::CLONE_NEWUTS).expect("unshare");
        t.mark("child");
        t.await_mark("end");
    });
    t.await_mark("child");
    opened.replace(File::open(format!("/proc/{}/ns/uts", child.pid)).expect("open"));
    t.mark("end");
    child.succeed();
    t.checkpoint();
    assert_eq!(setns(opened.expect("it was opened"), CloneFlags::CLONE_NEWUTS), Ok(()));
}
