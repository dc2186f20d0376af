//! What must be refused, by name, before anything is changed: the program runs on as if nobody had asked.

use std::net::{TcpListener, TcpStream};
use std::io::{Read, Write};

use nix::sched::{CloneFlags, unshare};

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::process::fork;
use crate::sys::{call, exit_now, procfs, strange};

/// From Linux 6.16 on the peer dumps no internet socket at all, so it refuses these too.
pub const CASES: &[Case] = &[
    case!(established_tcp_connection_is_refused).refused(&["tcp", "--tcp-established"]),
    case!(traced_child_is_refused).refused(&["traced"]),
    case!(child_in_its_own_pid_namespace_is_refused).refused(&["pid namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_mount_namespace_is_refused).refused(&["mnt namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_network_namespace_is_refused).refused(&["net namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_ipc_namespace_is_refused).refused(&["ipc namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_uts_namespace_is_refused).refused(&["uts namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_user_namespace_is_refused).refused(&["user namespace"]).needs(strange::has_namespaces),
    case!(child_in_its_own_time_namespace_is_refused).refused(&["time namespace"]).needs(strange::has_namespaces)
        .peer_cannot("it dumps this"),
    case!(perf_event_is_refused).refused(&["perf"]).needs(strange::has_perf_events),
    case!(userfaultfd_is_refused).refused(&["userfaultfd"]).needs(strange::has_userfaultfd),
    case!(parent_in_vfork_is_refused).refused(&["vfork"]).peer_cannot("it waits ten seconds and leaves the child"),
    case!(processes_that_share_memory_are_refused).refused(&["share", "memory"]),
    case!(several_objections_are_reported_together)
        .refused(&["perf", "userfaultfd", "tcp"])
        .needs(strange::has_perf_and_userfaultfd),
    case!(dead_leader_with_living_threads_is_refused).refused(&["leader"]),
];

fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    (client, listener.accept().expect("accept").0)
}

fn established_tcp_connection_is_refused(t: &Trial) {
    let (mut client, mut server) = connection();
    client.write_all(b"before").expect("write");
    t.checkpoint();
    let mut bytes = [0; 6];
    server.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"before");
}

fn traced_child_is_refused(t: &Trial) {
    let child = fork(|| {
        t.mark("child");
        t.hold();
    });
    t.await_mark("child");
    nix::sys::ptrace::seize(child.pid, nix::sys::ptrace::Options::empty()).expect("seize");
    t.checkpoint();
    assert_eq!(procfs::status(child.pid, "TracerPid"), std::process::id().to_string());
    // Dead before the detach is as good: it may have seen the end of the checkpoint already.
    until("the end of the child", || procfs::state(child.pid) == 'Z');
    child.succeed();
}

fn in_namespace(t: &Trial, flag: CloneFlags) {
    let child = fork(|| {
        unshare(flag).expect("unshare");
        let inner = fork(|| {
            t.mark("inner");
            t.hold();
        });
        t.mark("child");
        t.hold();
        inner.succeed();
    });
    t.await_mark("child");
    t.await_mark("inner");
    t.checkpoint();
    child.succeed();
}

fn child_in_its_own_pid_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWPID);
}

fn child_in_its_own_mount_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWNS);
}

fn child_in_its_own_network_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWNET);
}

fn child_in_its_own_ipc_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWIPC);
}

fn child_in_its_own_uts_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWUTS);
}

fn child_in_its_own_user_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::CLONE_NEWUSER);
}

fn child_in_its_own_time_namespace_is_refused(t: &Trial) {
    in_namespace(t, CloneFlags::from_bits_retain(libc::CLONE_NEWTIME));
}

fn perf_event_is_refused(t: &Trial) {
    let event = strange::perf_event().expect("perf_event_open");
    t.checkpoint();
    let mut count = [0; 8];
    assert_eq!(nix::unistd::read(&event, &mut count), Ok(8));
}

fn userfaultfd_is_refused(t: &Trial) {
    let fd = strange::userfaultfd().expect("userfaultfd");
    t.checkpoint();
    assert!(nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).is_ok());
}

fn parent_in_vfork_is_refused(t: &Trial) {
    let go = t.path(crate::case::GO);
    let go = std::ffi::CString::new(go.to_str().expect("text")).expect("no zero");
    let parent = fork(|| {
        strange::vfork_and_wait_for(&go);
    });
    until("the vfork", || procfs::state(parent.pid) == 'D');
    t.checkpoint();
    parent.succeed();
}

fn processes_that_share_memory_are_refused(t: &Trial) {
    let go = t.path(crate::case::GO);
    let go = std::ffi::CString::new(go.to_str().expect("text")).expect("no zero");
    let child = strange::clone_with_memory(&go);
    t.checkpoint();
    assert!(call::is_same(std::process::id() as i32, child.pid.as_raw(), call::KCMP_VM, 0, 0) || t.is_over());
    child.succeed();
}

fn several_objections_are_reported_together(t: &Trial) {
    let _event = strange::perf_event().expect("perf_event_open");
    let child = fork(|| {
        let _fd = strange::userfaultfd().expect("userfaultfd");
        let _connection = connection();
        t.mark("child");
        t.hold();
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn dead_leader_with_living_threads_is_refused(t: &Trial) {
    let child = fork(|| {
        let go = t.path(crate::case::GO);
        std::thread::spawn(move || {
            while !go.exists() {
                crate::sys::nap();
            }
            exit_now(0);
        });
        strange::end_this_thread();
    });
    until("the end of the leader", || procfs::state(child.pid) == 'Z');
    t.checkpoint();
    child.succeed();
}
