//! Credentials, capabilities, seccomp.

use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::{Gid, Uid, getgroups, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial, until};
use crate::sys::process::fork;
use crate::sys::{call, procfs, security, strange};
use crate::tool::NO_CALL;

pub const CASES: &[Case] = &[
    case!(user_and_group_ids_are_kept).needs(others_limits),
    case!(supplementary_groups_are_kept),
    case!(capability_sets_are_kept),
    case!(ambient_and_bounding_capabilities_are_kept),
    case!(secure_bits_are_kept),
    case!(no_new_privileges_is_kept),
    case!(child_without_privileges_keeps_its_ids).needs(others_limits),
    case!(threads_with_different_credentials_keep_them).needs(others_limits),
    case!(seccomp_filter_stays_in_force),
    case!(seccomp_filter_chain_of_a_child_is_kept),
    case!(seccomp_filters_of_threads_differ_afterwards),
    case!(strict_seccomp_stays_in_force),
    case!(filtered_tool_carries_a_tree_without_filters)
        .outside(filtered)
        .restless()
        .peer_cannot("it wants to suspend filters that nobody has"),
    case!(filtered_tool_carries_a_tree_with_the_same_filters)
        .outside(filtered)
        .needs(strange::tells_types)
        .peer_cannot("it may not suspend filters"),
    case!(filtered_tool_refuses_a_tree_with_more_filters)
        .outside(filtered)
        .refused(&["thread ", "has seccomp filters other than those that this program has itself", "run this program"]),
    case!(filtered_tool_refuses_images_with_filters)
        .outside(filtered_when_it_restores)
        .restore_refused(&["thread ", "had seccomp filters other than those", "run this program"]),
];

fn filtered(o: &mut Outside, _: Moment) {
    o.is_filtered = true;
}

fn filtered_when_it_restores(o: &mut Outside, moment: Moment) {
    o.is_filtered = moment == Moment::Away;
}

/// CRIU asks prlimit(2) of each task, for which another uid needs this capability.
fn others_limits() -> Result<(), String> {
    let bounding = u64::from_str_radix(&procfs::status("self", "CapBnd"), 16).map_err(|e| e.to_string())?;
    if bounding >> 24 & 1 == 1 || !crate::tool::under_test()?.is_peer {
        return Ok(());
    }
    Err("without CAP_SYS_RESOURCE the peer cannot ask for the limits of another user's task".into())
}

fn user_and_group_ids_are_kept(t: &Trial) {
    let ids = |a: u32, b: u32, c: u32| (Uid::from_raw(a), Uid::from_raw(b), Uid::from_raw(c));
    let child = fork(|| {
        setresgid(Gid::from_raw(11), Gid::from_raw(12), Gid::from_raw(13)).expect("setresgid");
        // The effective id stays root, or the child could make no marker.
        let (real, effective, saved) = ids(21, 0, 23);
        setresuid(real, effective, saved).expect("setresuid");
        t.mark("child");
        t.hold();
        let uids = getresuid().expect("getresuid");
        assert_eq!((uids.real, uids.effective, uids.saved), (real, effective, saved));
        let gids = getresgid().expect("getresgid");
        assert_eq!([gids.real, gids.effective, gids.saved].map(Gid::as_raw), [11, 12, 13]);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn supplementary_groups_are_kept(t: &Trial) {
    let wanted: Vec<Gid> = [5, 77, 1000, 65_535].map(Gid::from_raw).to_vec();
    setgroups(&wanted).expect("setgroups");
    t.checkpoint();
    assert_eq!(getgroups(), Ok(wanted));
}

fn capability_lines() -> Vec<String> {
    ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| procfs::status("self", name)).to_vec()
}

fn capability_sets_are_kept(t: &Trial) {
    const CAP_CHOWN: u64 = 1;
    const CAP_NET_RAW: u64 = 1 << 13;
    let child = fork(|| {
        let all = security::capabilities();
        security::set_capabilities([all[0] & !CAP_CHOWN & !CAP_NET_RAW, all[1] & !CAP_NET_RAW, CAP_CHOWN | 1 << 5]);
        let before = capability_lines();
        t.mark("child");
        t.hold();
        assert_eq!(capability_lines(), before);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn ambient_and_bounding_capabilities_are_kept(t: &Trial) {
    let child = fork(|| {
        call::prctl(libc::PR_CAPBSET_DROP, [31, 0, 0, 0]);
        let all = security::capabilities();
        security::set_capabilities([all[0], all[1], 1 << 6]);
        call::prctl(libc::PR_CAP_AMBIENT, [libc::PR_CAP_AMBIENT_RAISE as u64, 6, 0, 0]);
        let before = capability_lines();
        t.mark("child");
        t.hold();
        assert_eq!(capability_lines(), before);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn secure_bits_are_kept(t: &Trial) {
    // SECBIT_NOROOT_LOCKED, SECBIT_KEEP_CAPS, SECBIT_NO_CAP_AMBIENT_RAISE
    let bits = 1 << 1 | 1 << 4 | 1 << 6;
    call::prctl(libc::PR_SET_SECUREBITS, [bits, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl(libc::PR_GET_SECUREBITS, [0; 4]), bits as i32);
}

fn no_new_privileges_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_NO_NEW_PRIVS, [1, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl(libc::PR_GET_NO_NEW_PRIVS, [0; 4]), 1);
}

fn child_without_privileges_keeps_its_ids(t: &Trial) {
    let path = t.directory().to_path_buf();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("chmod");
    let child = fork(|| {
        setgroups(&[]).expect("setgroups");
        setresgid(Gid::from_raw(1000), Gid::from_raw(1000), Gid::from_raw(1000)).expect("setresgid");
        setresuid(Uid::from_raw(1000), Uid::from_raw(1000), Uid::from_raw(1000)).expect("setresuid");
        let before = capability_lines();
        t.mark("child");
        t.hold();
        assert_eq!(Uid::current().as_raw(), 1000);
        assert_eq!(capability_lines(), before);
        assert_eq!(setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)), Err(nix::errno::Errno::EPERM));
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn threads_with_different_credentials_keep_them(t: &Trial) {
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for number in 0..3_u32 {
            let ready = &ready;
            scope.spawn(move || {
                // The raw call changes this thread alone; the library's would change all.
                security::set_thread_ids(2000 + number, 3000 + number);
                ready.fetch_add(1, Ordering::SeqCst);
                t.hold();
                let own = format!("self/task/{}", call::gettid());
                let ids = |name: &str| procfs::status(&own, name).split_whitespace().next().map(str::to_owned);
                assert_eq!(ids("Uid"), Some((2000 + number).to_string()));
                assert_eq!(ids("Gid"), Some((3000 + number).to_string()));
            });
        }
        until("the threads", || ready.load(Ordering::SeqCst) == 3);
        t.checkpoint();
    });
    assert!(Uid::current().is_root());
}

fn seccomp_filter_stays_in_force(t: &Trial) {
    let child = fork(|| {
        security::refuse_call(libc::SYS_getpriority, libc::E2BIG);
        t.mark("child");
        t.hold();
        assert_eq!(security::getpriority(), Err(libc::E2BIG));
    });
    t.await_mark("child");
    t.checkpoint();
    assert!(security::getpriority().is_ok());
    child.succeed();
}

fn seccomp_filter_chain_of_a_child_is_kept(t: &Trial) {
    let child = fork(|| {
        security::refuse_call(libc::SYS_getpriority, libc::E2BIG);
        let grandchild = fork(|| {
            security::refuse_call(libc::SYS_getpgid, libc::EDOM);
            t.mark("grandchild");
            t.hold();
            assert_eq!(security::getpriority(), Err(libc::E2BIG));
            assert_eq!(security::getpgid(), Err(libc::EDOM));
            assert_eq!(procfs::status("self", "Seccomp_filters"), "2");
        });
        t.await_mark("grandchild");
        t.mark("child");
        t.hold();
        assert_eq!(security::getpriority(), Err(libc::E2BIG));
        assert!(security::getpgid().is_ok());
        grandchild.succeed();
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn seccomp_filters_of_threads_differ_afterwards(t: &Trial) {
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let ready = &ready;
            scope.spawn(move || {
                security::refuse_call(libc::SYS_getpriority, [libc::E2BIG, libc::EDOM][number]);
                ready.fetch_add(1, Ordering::SeqCst);
                t.hold();
                assert_eq!(security::getpriority(), Err([libc::E2BIG, libc::EDOM][number]));
            });
        }
        until("the threads", || ready.load(Ordering::SeqCst) == 2);
        t.checkpoint();
        assert!(security::getpriority().is_ok());
    });
}

fn strict_seccomp_stays_in_force(t: &Trial) {
    // Only read, write, exit and sigreturn are left: it waits in a read, and is killed by the call after it.
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    let child = fork(|| security::read_in_strict_mode(&reader));
    until("strict mode", || procfs::status(child.pid, "Seccomp") == "1");
    t.checkpoint();
    assert_eq!(procfs::status(child.pid, "Seccomp"), "1");
    nix::unistd::write(&writer, b"x").expect("write");
    use nix::sys::signal::Signal;
    use nix::sys::wait::WaitStatus;
    assert!(matches!(child.wait(), WaitStatus::Signaled(_, Signal::SIGKILL, _)));
}

fn filtered_tool_carries_a_tree_without_filters(t: &Trial) {
    let child = fork(|| {
        t.mark("child");
        t.hold();
        assert!(security::getpriority().is_ok());
    });
    t.await_mark("child");
    std::thread::scope(|scope| {
        scope.spawn(|| t.hold());
        t.checkpoint();
    });
    child.succeed();
}

fn filtered_tool_carries_a_tree_with_the_same_filters(t: &Trial) {
    security::refuse_call(NO_CALL, libc::ENOSYS);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        assert_eq!(procfs::status("self", "Seccomp_filters"), "1");
    });
    t.await_mark("child");
    t.checkpoint();
    assert_eq!(procfs::status("self", "Seccomp_filters"), "1");
    child.succeed();
}

fn filtered_tool_refuses_a_tree_with_more_filters(t: &Trial) {
    security::refuse_call(NO_CALL, libc::ENOSYS);
    security::refuse_call(libc::SYS_getpriority, libc::E2BIG);
    t.checkpoint();
    assert_eq!(security::getpriority(), Err(libc::E2BIG));
}

fn filtered_tool_refuses_images_with_filters(t: &Trial) {
    security::refuse_call(libc::SYS_getpriority, libc::E2BIG);
    t.checkpoint();
    assert_eq!(security::getpriority(), Err(libc::E2BIG));
}
