//! The tree: parents, sessions, groups, zombies, stopped tasks, and what belongs to a process as a whole.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SaFlags, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgid, getpgrp, getsid, setpgid, setsid};

use crate::case;
use crate::case::{Case, Mode, Trial, until};
use crate::sys::process::fork;
use crate::sys::memory::Map;
use crate::sys::{call, exit_now, procfs, signal};

const UNHARMED: &[Mode] = &[Mode::Snapshot, Mode::FailedDump];
const ONE_MORE_STOP: &str = "it leaves a second stop signal pending";

pub const CASES: &[Case] = &[
    case!(killed_zombie_keeps_its_signal).moves(),
    case!(zombies_of_a_child_survive).moves(),
    case!(stopped_child_stays_stopped_and_can_go_on).moves().peer_cannot_in(UNHARMED, ONE_MORE_STOP),
    case!(child_stopped_by_sigtstp_reports_it_again).moves().peer_cannot_in(UNHARMED, ONE_MORE_STOP),
    case!(stop_already_reported_is_not_reported_again).moves().not_yet("stops that were already reported").peer_cannot("it stops the child anew, and that is reported"),
    case!(stopped_child_keeps_a_blocked_pending_stop).moves().peer_cannot_in(UNHARMED, ONE_MORE_STOP),
    case!(session_and_group_of_children_are_kept).moves().exchange(),
    case!(group_whose_leader_is_gone_is_kept).moves(),
    case!(session_whose_leader_is_a_zombie_is_kept)
        .peer_cannot("the members are adopted by init instead of the subreaper"),
    case!(session_whose_leader_is_gone_is_kept),
    case!(orphan_adopted_by_a_subreaper_keeps_its_parent).moves(),
    case!(subreaper_flag_still_adopts).moves(),
    case!(parent_death_signal_still_comes).moves(),
    case!(parent_death_signal_is_kept).moves(),
    case!(fifty_children_survive).moves().exchange().killed(),
    case!(chain_of_ten_generations_survives).moves(),
    case!(other_program_of_a_forked_child_survives).moves(),
    case!(parent_blocked_in_wait_is_woken).moves(),
    case!(comm_is_kept).moves(),
    case!(long_environment_and_arguments_are_kept).moves(),
    case!(resource_limits_are_kept).moves(),
    case!(nice_values_of_children_are_kept).moves(),
    case!(scheduling_policies_are_kept).moves(),
    case!(cpu_affinity_is_kept).moves().peer_cannot("affinity is not in its images"),
    case!(oom_score_is_kept).moves(),
    case!(personality_is_kept).moves().peer_cannot("it restores every task with the default one"),
    case!(dumpable_flag_is_kept).moves(),
    case!(timer_slack_is_kept).moves().peer_cannot("timer slack is not in its images"),
    case!(children_made_all_the_time_survive).moves().restless(),
    case!(child_of_another_exit_signal_survives).moves().peer_cannot("it makes every child with SIGCHLD"),
];

fn me() -> i32 {
    std::process::id() as i32
}

fn killed_zombie_keeps_its_signal(t: &Trial) {
    let child = fork(|| {
        loop {
            nix::unistd::pause();
        }
    });
    child.kill(Signal::SIGKILL);
    assert_eq!(child.peek(WaitPidFlag::WEXITED), WaitStatus::Signaled(child.pid, Signal::SIGKILL, false));
    t.checkpoint();
    assert_eq!(child.wait(), WaitStatus::Signaled(child.pid, Signal::SIGKILL, false));
}

fn zombies_of_a_child_survive(t: &Trial) {
    let child = fork(|| {
        let all: Vec<_> = (1..=5).map(|status| fork(|| exit_now(status))).collect();
        for zombie in &all {
            zombie.peek(WaitPidFlag::WEXITED);
        }
        t.mark("child");
        t.hold();
        for (zombie, status) in all.iter().zip(1..) {
            assert_eq!(zombie.wait(), WaitStatus::Exited(zombie.pid, status));
        }
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn stopped_child_stays_stopped_and_can_go_on(t: &Trial) {
    let child = fork(|| {
        t.hold();
        t.await_mark("seen");
    });
    child.kill(Signal::SIGSTOP);
    child.peek(WaitPidFlag::WSTOPPED);
    t.checkpoint();
    assert_eq!(procfs::state(child.pid), 'T');
    assert_eq!(waitpid(child.pid, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(child.pid, Signal::SIGSTOP)));
    child.kill(Signal::SIGCONT);
    assert_eq!(
        waitpid(child.pid, Some(WaitPidFlag::WCONTINUED)),
        Ok(WaitStatus::Continued(child.pid))
    );
    t.mark("seen");
    child.succeed();
}

fn child_stopped_by_sigtstp_reports_it_again(t: &Trial) {
    let child = fork(|| t.hold());
    // A new session would make the group orphaned, where SIGTSTP does nothing: a group of its own it is.
    setpgid(child.pid, child.pid).expect("setpgid");
    child.kill(Signal::SIGTSTP);
    assert_eq!(child.peek(WaitPidFlag::WSTOPPED), WaitStatus::Stopped(child.pid, Signal::SIGTSTP));
    t.checkpoint();
    assert_eq!(waitpid(child.pid, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(child.pid, Signal::SIGTSTP)));
    child.kill(Signal::SIGCONT);
    child.succeed();
}

fn stop_already_reported_is_not_reported_again(t: &Trial) {
    let child = fork(|| t.hold());
    child.kill(Signal::SIGSTOP);
    let stopped = WaitStatus::Stopped(child.pid, Signal::SIGSTOP);
    assert_eq!(waitpid(child.pid, Some(WaitPidFlag::WUNTRACED)), Ok(stopped));
    t.checkpoint();
    assert_eq!(
        waitpid(child.pid, Some(WaitPidFlag::WUNTRACED | WaitPidFlag::WNOHANG)),
        Ok(WaitStatus::StillAlive)
    );
    child.kill(Signal::SIGCONT);
    child.succeed();
}

fn stopped_child_keeps_a_blocked_pending_stop(t: &Trial) {
    let child = fork(|| {
        signal::block(&[Signal::SIGTSTP]);
        t.mark("child");
        t.hold();
        until("the signal", || signal::take(&[libc::SIGTSTP]).is_some());
    });
    t.await_mark("child");
    child.kill(Signal::SIGSTOP);
    child.peek(WaitPidFlag::WSTOPPED);
    child.kill(Signal::SIGTSTP);
    t.checkpoint();
    assert_eq!(procfs::state(child.pid), 'T');
    assert_eq!(procfs::status(child.pid, "ShdPnd"), format!("{:016x}", 1 << (libc::SIGTSTP - 1)));
    // SIGCONT drops pending stops, SIGTSTP among them (signal(7)): send it again as the shell does.
    child.kill(Signal::SIGCONT);
    child.kill(Signal::SIGTSTP);
    child.succeed();
}

fn session_and_group_of_children_are_kept(t: &Trial) {
    let of = |pid: Pid| (getsid(Some(pid)).expect("getsid"), getpgid(Some(pid)).expect("getpgid"));
    let leader = fork(|| {
        setsid().expect("setsid");
        let member = fork(|| {
            t.mark("member");
            t.hold();
        });
        let apart = fork(|| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).expect("setpgid");
            t.mark("apart");
            t.hold();
        });
        t.await_mark("member");
        t.await_mark("apart");
        let own = Pid::from_raw(me());
        t.mark("leader");
        t.hold();
        assert_eq!(of(own), (own, own));
        assert_eq!(of(member.pid), (own, own));
        assert_eq!(of(apart.pid), (own, apart.pid));
        member.succeed();
        apart.succeed();
    });
    let joined = fork(|| {
        t.mark("joined");
        t.hold();
    });
    t.await_mark("leader");
    t.await_mark("joined");
    let (session, group) = of(joined.pid);
    t.checkpoint();
    assert_eq!(of(joined.pid), (session, group));
    assert_eq!(getpgrp(), group);
    leader.succeed();
    joined.succeed();
}

fn group_whose_leader_is_gone_is_kept(t: &Trial) {
    let leader = fork(|| {
        t.await_mark("joined");
    });
    setpgid(leader.pid, leader.pid).expect("setpgid");
    let member = fork(|| {
        t.mark("member");
        t.hold();
        assert_eq!(getpgrp(), leader.pid);
    });
    setpgid(member.pid, leader.pid).expect("join the group");
    t.await_mark("member");
    t.mark("joined");
    leader.succeed();
    t.checkpoint();
    assert_eq!(getpgid(Some(member.pid)), Ok(leader.pid));
    member.succeed();
}

fn session_whose_leader_is_a_zombie_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]);
    let leader = fork(|| {
        let session = setsid().expect("setsid");
        fork(|| {
            until("the end of the leader", || procfs::state(session) == 'Z');
            t.mark("member");
            t.hold();
            assert_eq!(getsid(None), Ok(session));
        });
    });
    leader.peek(WaitPidFlag::WEXITED);
    t.await_mark("member");
    t.checkpoint();
    assert_eq!(procfs::state(leader.pid), 'Z');
    leader.succeed();
    assert!(matches!(waitpid(None, None), Ok(WaitStatus::Exited(_, 0))));
}

/// A daemon that forked twice: nobody leads its session and group, and it has a child.
fn session_whose_leader_is_gone_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]);
    let map = Map::private(50 * 4096);
    map.fill(0..50, 3);
    let leader = fork(|| {
        let session = setsid().expect("setsid");
        fork(|| {
            until("the end of the leader", || !Path::new(&format!("/proc/{session}")).exists());
            let child = fork(|| {
                t.mark("grandchild");
                t.hold();
                assert_eq!((getsid(None), getpgrp()), (Ok(session), session));
                map.check(0..50, 3);
            });
            t.mark("member");
            t.hold();
            assert_eq!((getsid(None), getpgrp()), (Ok(session), session));
            map.check(0..50, 3);
            child.succeed();
        });
    });
    leader.succeed();
    t.await_mark("member");
    t.await_mark("grandchild");
    t.checkpoint();
    // The orphan is ours, not that of init.
    assert!(matches!(waitpid(None, None), Ok(WaitStatus::Exited(_, 0))));
}

fn orphan_adopted_by_a_subreaper_keeps_its_parent(t: &Trial) {
    call::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]);
    let reaper = me();
    let middle = fork(|| {
        fork(|| {
            until("the adoption", || std::os::unix::process::parent_id() as i32 == reaper);
            t.mark("orphan");
            t.hold();
            assert_eq!(std::os::unix::process::parent_id() as i32, reaper);
        });
    });
    middle.succeed();
    t.await_mark("orphan");
    t.checkpoint();
    assert!(matches!(waitpid(None, None), Ok(WaitStatus::Exited(_, 0))));
}

fn subreaper_flag_still_adopts(t: &Trial) {
    call::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl_get(libc::PR_GET_CHILD_SUBREAPER), 1);
    let reaper = me();
    fork(|| {
        fork(|| until("the adoption", || std::os::unix::process::parent_id() as i32 == reaper));
    })
    .succeed();
    assert!(matches!(waitpid(None, None), Ok(WaitStatus::Exited(_, 0))));
}

fn parent_death_signal_still_comes(t: &Trial) {
    call::prctl(libc::PR_SET_CHILD_SUBREAPER, [1, 0, 0, 0]);
    let parent = fork(|| {
        fork(|| {
            signal::count(Signal::SIGUSR1, SaFlags::empty());
            call::prctl(libc::PR_SET_PDEATHSIG, [Signal::SIGUSR1 as u64, 0, 0, 0]);
            t.mark("child");
            until("the signal", || {
                if !t.is_over() {
                    t.hold();
                }
                signal::SEEN.times() == 1
            });
        });
        t.await_mark("child");
        t.hold();
    });
    t.await_mark("child");
    t.checkpoint();
    parent.succeed();
    assert!(matches!(waitpid(None, None), Ok(WaitStatus::Exited(_, 0))));
}

fn parent_death_signal_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_PDEATHSIG, [Signal::SIGWINCH as u64, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl_get(libc::PR_GET_PDEATHSIG), Signal::SIGWINCH as i32);
}

fn fifty_children_survive(t: &Trial) {
    let children: Vec<_> = (0..50)
        .map(|number| {
            fork(|| {
                t.mark(&format!("child-{number}"));
                t.hold();
                exit_now(number);
            })
        })
        .collect();
    for number in 0..50 {
        t.await_mark(&format!("child-{number}"));
    }
    t.checkpoint();
    for (child, number) in children.iter().zip(0..) {
        assert_eq!(child.wait(), WaitStatus::Exited(child.pid, number));
    }
}

fn generation(t: &Trial, left: u32) {
    if left == 0 {
        t.mark("last");
        t.hold();
        return;
    }
    let child = fork(|| generation(t, left - 1));
    t.hold();
    child.succeed();
}

fn chain_of_ten_generations_survives(t: &Trial) {
    let child = fork(|| generation(t, 9));
    t.await_mark("last");
    t.checkpoint();
    child.succeed();
}

/// The child shares memory with its parent; the grandchild shares none with either.
fn other_program_of_a_forked_child_survives(t: &Trial) {
    let child = fork(|| {
        let sleeper = fork(|| {
            use std::os::unix::process::CommandExt;
            let error = std::process::Command::new("sleep").arg("1000").exec();
            panic!("exec: {error}");
        });
        until("the sleep of another program", || {
            procfs::syscall(sleeper.pid).first().is_some_and(|nr| *nr == libc::SYS_clock_nanosleep as u64)
                && fs::read_to_string(format!("/proc/{}/comm", sleeper.pid)).is_ok_and(|comm| comm == "sleep\n")
        });
        t.mark("child");
        t.hold();
        sleeper.kill(Signal::SIGTERM);
        assert_eq!(sleeper.wait(), WaitStatus::Signaled(sleeper.pid, Signal::SIGTERM, false));
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn parent_blocked_in_wait_is_woken(t: &Trial) {
    let parent = fork(|| {
        fork(|| {
            t.mark("child");
            t.hold();
        })
        .succeed();
    });
    t.await_mark("child");
    until("the wait", || procfs::syscall(parent.pid).first().is_some_and(|nr| *nr == libc::SYS_wait4 as u64));
    t.checkpoint();
    parent.succeed();
}

fn comm_is_kept(t: &Trial) {
    fs::write("/proc/self/comm", "odd) name (").expect("write comm");
    t.checkpoint();
    assert_eq!(fs::read_to_string("/proc/self/comm").expect("read"), "odd) name (\n");
}

fn long_environment_and_arguments_are_kept(t: &Trial) {
    // A fresh program with much of both, started by this one.
    let path = std::env::current_exe().expect("path");
    let child = fork(|| {
        use std::os::unix::process::CommandExt;
        let error = std::process::Command::new(path)
            .args(["process::exec_target", t.directory().to_str().expect("text")])
            .arg("x".repeat(50_000))
            .env("LONG", "y".repeat(60_000))
            .env("EMPTY", "")
            .exec();
        panic!("exec: {error}");
    });
    until("the new program", || {
        fs::read(format!("/proc/{}/cmdline", child.pid)).is_ok_and(|text| text.len() > 50_000)
            && procfs::state(child.pid) == 'S'
    });
    let read = |name: &str| fs::read(format!("/proc/{}/{name}", child.pid)).expect("read");
    let before = (read("cmdline"), read("environ"), read("auxv"));
    t.checkpoint();
    assert!(before == (read("cmdline"), read("environ"), read("auxv")));
    t.mark("looked");
    child.succeed();
}

/// Not a case: what the program does that the one above starts.
pub fn exec_target(t: &Trial) {
    t.await_mark("looked");
    assert_eq!(std::env::args().nth(3).expect("the long argument").len(), 50_000);
    assert_eq!(std::env::var("LONG").expect("set").len(), 60_000);
    assert_eq!(std::env::var("EMPTY").expect("set"), "");
}

fn resource_limits_are_kept(t: &Trial) {
    let wanted = [
        (Resource::RLIMIT_NOFILE, 300, 400),
        (Resource::RLIMIT_CORE, 0, 1 << 20),
        (Resource::RLIMIT_STACK, 6 << 20, 7 << 20),
        (Resource::RLIMIT_AS, 1 << 40, 1 << 41),
        (Resource::RLIMIT_FSIZE, 1 << 30, 1 << 31),
        (Resource::RLIMIT_NPROC, 4000, 5000),
    ];
    for (resource, soft, hard) in wanted {
        setrlimit(resource, soft, hard).expect("setrlimit");
    }
    t.checkpoint();
    for (resource, soft, hard) in wanted {
        assert_eq!(getrlimit(resource), Ok((soft, hard)), "{resource:?}");
    }
}

fn nice_values_of_children_are_kept(t: &Trial) {
    let values = [-20, -5, 0, 3, 19];
    let children: Vec<_> = values
        .iter()
        .map(|value| {
            fork(|| {
                // SAFETY: setpriority takes three integers and touches no memory.
                call::check("setpriority", unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, *value) });
                t.mark(&format!("nice{value}"));
                t.hold();
            })
        })
        .collect();
    for value in values {
        t.await_mark(&format!("nice{value}"));
    }
    t.checkpoint();
    for (child, value) in children.iter().zip(values) {
        assert_eq!(procfs::stat(child.pid)[16], value.to_string());
        child.succeed();
    }
}

fn scheduling_policies_are_kept(t: &Trial) {
    let wanted = [(libc::SCHED_BATCH, 0), (libc::SCHED_IDLE, 0), (libc::SCHED_FIFO, 7), (libc::SCHED_RR, 1)];
    let children: Vec<_> = wanted
        .iter()
        .map(|(policy, priority)| {
            fork(|| {
                call::set_scheduler(*policy, *priority);
                t.mark(&format!("policy{policy}"));
                t.hold();
            })
        })
        .collect();
    for (policy, _) in wanted {
        t.await_mark(&format!("policy{policy}"));
    }
    t.checkpoint();
    for (child, (policy, priority)) in children.iter().zip(wanted) {
        let stat = procfs::stat(child.pid);
        assert_eq!((stat[38].as_str(), stat[37].as_str()), (&*policy.to_string(), &*priority.to_string()));
        child.succeed();
    }
}

fn cpu_affinity_is_kept(t: &Trial) {
    let mut set = nix::sched::CpuSet::new();
    set.set(0).expect("processor 0");
    nix::sched::sched_setaffinity(Pid::from_raw(0), &set).expect("sched_setaffinity");
    t.checkpoint();
    assert_eq!(nix::sched::sched_getaffinity(Pid::from_raw(0)), Ok(set));
}

fn oom_score_is_kept(t: &Trial) {
    // Upwards only: the way down needs CAP_SYS_RESOURCE.
    let child = fork(|| {
        fs::write("/proc/self/oom_score_adj", "321").expect("write");
        t.mark("child");
        t.hold();
        assert_eq!(fs::read_to_string("/proc/self/oom_score_adj").expect("read"), "321\n");
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn personality_is_kept(t: &Trial) {
    use nix::sys::personality::{Persona, get, set};
    let wanted = Persona::ADDR_NO_RANDOMIZE | Persona::UNAME26;
    set(wanted).expect("personality");
    t.checkpoint();
    assert_eq!(get(), Ok(wanted));
}

fn dumpable_flag_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_DUMPABLE, [0, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl(libc::PR_GET_DUMPABLE, [0, 0, 0, 0]), 0);
}

fn timer_slack_is_kept(t: &Trial) {
    call::prctl(libc::PR_SET_TIMERSLACK, [123_456, 0, 0, 0]);
    t.checkpoint();
    assert_eq!(call::prctl(libc::PR_GET_TIMERSLACK, [0, 0, 0, 0]), 123_456);
}

fn children_made_all_the_time_survive(t: &Trial) {
    let maker = fork(|| {
        let mut count = 0_u32;
        while !t.is_over() || count < 20 {
            let child = fork(|| {
                crate::sys::nap();
                exit_now(17);
            });
            assert_eq!(child.wait(), WaitStatus::Exited(child.pid, 17));
            count += 1;
            if count == 5 {
                t.mark("busy");
            }
        }
    });
    t.await_mark("busy");
    t.checkpoint();
    maker.succeed();
}

fn child_of_another_exit_signal_survives(t: &Trial) {
    signal::count(Signal::SIGUSR2, SaFlags::SA_RESTART);
    let child = crate::sys::process::clone_with_exit_signal(Signal::SIGUSR2, || {
        t.mark("child");
        t.hold();
    });
    t.await_mark("child");
    t.checkpoint();
    until("the end of the child", || procfs::state(child.pid) == 'Z');
    assert!(kill(child.pid, None).is_ok());
    child.succeed();
    assert_eq!(signal::SEEN.times(), 1);
}
