//! Handlers, masks, pending signals, interrupted sleeps, interval and POSIX timers.

use std::time::{Duration, Instant};

use nix::sys::signal::{SaFlags, SigSet, Signal, raise};
use nix::sys::wait::WaitStatus;

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::process::fork;
use crate::sys::strange::tells_types;
use crate::sys::{call, memory::Map, procfs, signal, timer};

pub const CASES: &[Case] = &[
    case!(every_action_with_its_flags_and_mask_is_kept).exchange(),
    case!(default_actions_are_kept_though_the_tool_ignores).exchange(),
    case!(blocked_and_ignored_signals_stay_so).exchange(),
    case!(queued_real_time_signals_keep_order_and_values).exchange(),
    case!(private_and_shared_pending_signals_stay_apart),
    case!(pending_signal_of_kill_keeps_its_sender),
    case!(pending_signal_of_a_child_keeps_its_status),
    case!(alternate_stack_is_used_by_the_handler),
    case!(checkpoint_inside_a_handler_returns_from_it),
    case!(checkpoint_inside_a_handler_on_the_alternate_stack),
    case!(trap_handler_works_afterwards),
    case!(one_shot_interval_timer_fires_once_after_the_time_left),
    case!(interval_timers_of_all_clocks_are_kept),
    case!(interval_timer_whose_signal_waits_goes_on),
    case!(interval_timer_goes_on_firing),
    case!(posix_timers_keep_ids_and_times),
    case!(posix_timer_with_gaps_in_the_ids_is_kept),
    case!(posix_timer_fires_with_its_value),
    case!(posix_timer_for_one_thread_keeps_it),
    case!(posix_timer_goes_on_while_its_signal_waits),
    case!(posix_timer_tells_overruns_again).peer_cannot("it loses them"),
    case!(waiting_signals_of_posix_timers_count_overruns).needs(tells_types)
        .peer_cannot("it loses them"),
    case!(sleeping_task_reacts_to_a_signal),
    case!(poll_with_a_time_limit_ends).restless(),
    case!(absolute_sleep_ends).restless(),
    case!(task_in_sigsuspend_is_woken),
    case!(pause_is_woken_by_a_handler),
];

fn every_action_with_its_flags_and_mask_is_kept(t: &Trial) {
    let numbers = || (1..=64).filter(|n| ![libc::SIGKILL, libc::SIGSTOP, 32, 33].contains(n));
    let flags = [
        0,
        libc::SA_RESTART,
        libc::SA_SIGINFO | libc::SA_NODEFER,
        libc::SA_ONSTACK,
        libc::SA_RESETHAND,
        libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT,
    ];
    for number in numbers() {
        let handler = [libc::SIG_DFL, libc::SIG_IGN, signal::recorder()][number as usize % 3];
        let masked = [1 + (number * 7) % 64, 1 + (number * 13) % 64];
        signal::set_action(number, handler, flags[number as usize % flags.len()], &masked);
    }
    let before: Vec<_> = numbers().map(signal::action).collect();
    t.checkpoint();
    let after: Vec<_> = numbers().map(signal::action).collect();
    assert_eq!(before, after);
}

/// A Rust program ignores SIGPIPE, and its children with it.
fn default_actions_are_kept_though_the_tool_ignores(t: &Trial) {
    let child = fork(|| {
        signal::set_action(libc::SIGPIPE, libc::SIG_DFL, 0, &[]);
        t.mark("child");
        t.hold();
        raise(Signal::SIGPIPE).expect("raise");
    });
    t.await_mark("child");
    t.checkpoint();
    assert_eq!(child.wait(), WaitStatus::Signaled(child.pid, Signal::SIGPIPE, false));
}

fn blocked_and_ignored_signals_stay_so(t: &Trial) {
    signal::set_action(libc::SIGHUP, libc::SIG_IGN, 0, &[]);
    signal::block(&[Signal::SIGUSR1, Signal::SIGTERM]);
    signal::block_number(libc::SIGRTMIN() + 5);
    t.checkpoint();
    raise(Signal::SIGHUP).expect("raise");
    raise(Signal::SIGUSR1).expect("raise");
    raise(Signal::SIGTERM).expect("raise");
    signal::queue(None, libc::SIGRTMIN() + 5, 1);
    for number in [libc::SIGUSR1, libc::SIGTERM, libc::SIGRTMIN() + 5] {
        assert!(signal::take(&[number]).is_some(), "{number}");
    }
}

fn queued_real_time_signals_keep_order_and_values(t: &Trial) {
    let (low, high) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    signal::block_number(low);
    signal::block_number(high);
    for value in 0..20 {
        signal::queue(None, if value % 2 == 0 { high } else { low }, 1000 + value);
    }
    t.checkpoint();
    for value in (1..20).step_by(2).chain((0..20).step_by(2)) {
        let number = if value % 2 == 0 { high } else { low };
        assert_eq!(signal::take(&[low, high]), Some((number, libc::SI_QUEUE, 1000 + value)));
    }
    assert_eq!(signal::take(&[low, high]), None);
}

fn private_and_shared_pending_signals_stay_apart(t: &Trial) {
    let number = libc::SIGRTMIN() + 3;
    signal::block_number(number);
    signal::queue(Some(call::gettid()), number, 1);
    signal::queue(None, number, 2);
    let look = || (procfs::status("self", "SigPnd"), procfs::status("self", "ShdPnd"));
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
    // The thread's own queue is looked at first.
    assert_eq!(signal::take(&[number]), Some((number, libc::SI_QUEUE, 1)));
    assert_eq!(signal::take(&[number]), Some((number, libc::SI_QUEUE, 2)));
}

fn pending_signal_of_kill_keeps_its_sender(t: &Trial) {
    signal::block(&[Signal::SIGUSR2]);
    let parent = nix::unistd::Pid::this();
    fork(|| nix::sys::signal::kill(parent, Signal::SIGUSR2).expect("kill")).succeed();
    t.checkpoint();
    let (number, code, _) = signal::take(&[libc::SIGUSR2]).expect("pending");
    assert_eq!((number, code), (libc::SIGUSR2, libc::SI_USER));
}

fn pending_signal_of_a_child_keeps_its_status(t: &Trial) {
    signal::block(&[Signal::SIGCHLD]);
    let child = fork(|| crate::sys::exit_now(3));
    child.peek(nix::sys::wait::WaitPidFlag::WEXITED);
    t.checkpoint();
    assert_eq!(signal::take(&[libc::SIGCHLD]).map(|(_, code, _)| code), Some(libc::CLD_EXITED));
    child.wait();
}

fn alternate_stack_is_used_by_the_handler(t: &Trial) {
    let length = 64 * 1024;
    let address = signal::alternate_stack(length);
    signal::count(Signal::SIGUSR1, SaFlags::SA_ONSTACK);
    t.checkpoint();
    raise(Signal::SIGUSR1).expect("raise");
    let place = signal::SEEN.stack.load(std::sync::atomic::Ordering::SeqCst);
    assert!((address..address + length).contains(&place), "the handler ran on {place:#x}");
}

fn checkpoint_inside_a_handler_returns_from_it(t: &Trial) {
    let before = std::hint::black_box([1.5_f64, 2.5, -3.5]);
    let inside = || t.checkpoint();
    signal::call_inside(Signal::SIGUSR1, SaFlags::empty(), &inside);
    raise(Signal::SIGUSR1).expect("raise");
    assert_eq!(signal::SEEN.times(), 1);
    assert_eq!(std::hint::black_box(before), [1.5, 2.5, -3.5]);
    let mask = nix::sys::signal::SigSet::thread_get_mask().expect("mask");
    assert!(!mask.contains(Signal::SIGUSR1), "the mask is that of the handler still");
}

fn checkpoint_inside_a_handler_on_the_alternate_stack(t: &Trial) {
    signal::alternate_stack(256 * 1024);
    let inside = || t.checkpoint();
    signal::call_inside(Signal::SIGUSR1, SaFlags::SA_ONSTACK, &inside);
    raise(Signal::SIGUSR1).expect("raise");
    assert_eq!(signal::SEEN.times(), 1);
    assert_eq!(signal::current_alternate_stack().1 & libc::SS_ONSTACK, 0);
}

fn trap_handler_works_afterwards(t: &Trial) {
    signal::count(Signal::SIGTRAP, SaFlags::empty());
    t.checkpoint();
    raise(Signal::SIGTRAP).expect("raise");
    crate::sys::registers::breakpoint();
    assert_eq!(signal::SEEN.times(), 2);
}

fn one_shot_interval_timer_fires_once_after_the_time_left(t: &Trial) {
    signal::count(Signal::SIGALRM, SaFlags::SA_RESTART);
    let start = Instant::now();
    timer::set_interval_timer(libc::ITIMER_REAL, Duration::from_millis(600), Duration::ZERO);
    t.checkpoint();
    until("the alarm", || signal::SEEN.times() == 1);
    assert!(start.elapsed() >= Duration::from_millis(599), "{:?}", start.elapsed());
    assert_eq!(timer::interval_timer(libc::ITIMER_REAL), (Duration::ZERO, Duration::ZERO));
}

fn interval_timers_of_all_clocks_are_kept(t: &Trial) {
    let (first, every) = (Duration::from_secs(1000), Duration::from_secs(7));
    let kinds = [libc::ITIMER_REAL, libc::ITIMER_VIRTUAL, libc::ITIMER_PROF];
    for kind in kinds {
        timer::set_interval_timer(kind, first, every);
    }
    t.checkpoint();
    for kind in kinds {
        let (left, interval) = timer::interval_timer(kind);
        assert_eq!(interval, every);
        assert!(left <= first + Duration::from_millis(20) && left > Duration::from_secs(900), "{kind}: {left:?}");
    }
}

fn interval_timer_goes_on_firing(t: &Trial) {
    signal::count(Signal::SIGALRM, SaFlags::SA_RESTART);
    let every = Duration::from_millis(20);
    timer::set_interval_timer(libc::ITIMER_REAL, every, every);
    t.checkpoint();
    let before = signal::SEEN.times();
    until("three alarms", || signal::SEEN.times() >= before + 3);
}

fn interval_timer_whose_signal_waits_goes_on(t: &Trial) {
    // It stands still until the signal is delivered: the kernel says that no time is left.
    signal::count(Signal::SIGALRM, SaFlags::SA_RESTART);
    let mut alarm = SigSet::empty();
    alarm.add(Signal::SIGALRM);
    alarm.thread_block().expect("block");
    let every = Duration::from_millis(10);
    timer::set_interval_timer(libc::ITIMER_REAL, every, every);
    until("the alarm", || {
        std::fs::read_to_string("/proc/self/status").expect("read").contains("ShdPnd:\t0000000000002000")
    });
    t.checkpoint();
    alarm.thread_unblock().expect("unblock");
    until("three alarms", || signal::SEEN.times() >= 3);
}

fn posix_timers_keep_ids_and_times(t: &Trial) {
    let clocks =
        [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME, libc::CLOCK_PROCESS_CPUTIME_ID];
    let timers: Vec<i32> =
        clocks.iter().map(|clock| timer::create(*clock, timer::Notify::Signal(libc::SIGUSR1, 5))).collect();
    for (timer, seconds) in timers.iter().zip(2..) {
        timer::set(*timer, Duration::from_secs(seconds * 1000), Duration::from_secs(seconds));
    }
    t.checkpoint();
    for (timer, seconds) in timers.iter().zip(2..) {
        let (left, every) = timer::get(*timer);
        assert_eq!(every, Duration::from_secs(seconds));
        let whole = Duration::from_secs(seconds * 1000);
        assert!(left <= whole && left > whole - Duration::from_secs(100), "timer {timer}: {left:?}");
    }
}

fn posix_timer_with_gaps_in_the_ids_is_kept(t: &Trial) {
    let all: Vec<i32> =
        (0..12).map(|_| timer::create(libc::CLOCK_MONOTONIC, timer::Notify::None)).collect();
    for timer in &all[..11] {
        if timer % 4 != 0 {
            timer::delete(*timer);
        }
    }
    let left: Vec<i32> = all.iter().copied().enumerate().filter(|(i, id)| *i == 11 || id % 4 == 0).map(|x| x.1).collect();
    t.checkpoint();
    for timer in left {
        assert_eq!(timer::get(timer), (Duration::ZERO, Duration::ZERO));
    }
    // The next one is no number that is in use.
    let new = timer::create(libc::CLOCK_MONOTONIC, timer::Notify::None);
    assert!(new != all[11]);
}

fn posix_timer_fires_with_its_value(t: &Trial) {
    let number = libc::SIGRTMIN() + 4;
    signal::block_number(number);
    let timer = timer::create(libc::CLOCK_MONOTONIC, timer::Notify::Signal(number, 0x1234_5678));
    let start = Instant::now();
    timer::set(timer, Duration::from_millis(500), Duration::ZERO);
    t.checkpoint();
    let mut got = None;
    until("the timer", || {
        got = signal::take(&[number]);
        got.is_some()
    });
    assert_eq!(got, Some((number, libc::SI_TIMER, 0x1234_5678)));
    assert!(start.elapsed() >= Duration::from_millis(499), "{:?}", start.elapsed());
}

fn posix_timer_for_one_thread_keeps_it(t: &Trial) {
    let number = libc::SIGRTMIN() + 4;
    signal::block_number(number);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let timer = timer::create(libc::CLOCK_MONOTONIC, timer::Notify::Thread(number, 7, call::gettid()));
            t.mark("thread");
            t.hold();
            timer::set(timer, Duration::from_millis(1), Duration::ZERO);
            let own = format!("self/task/{}", call::gettid());
            until("the signal", || procfs::status(&own, "SigPnd") != "0000000000000000");
            assert_eq!(signal::take(&[number]), Some((number, libc::SI_TIMER, 7)));
            t.mark("taken");
        });
        t.await_mark("thread");
        t.checkpoint();
        t.await_mark("taken");
    });
}

fn posix_timer_goes_on_while_its_signal_waits(t: &Trial) {
    let number = libc::SIGRTMIN() + 4;
    signal::block_number(number);
    let timer = timer::create(libc::CLOCK_MONOTONIC, timer::Notify::Signal(number, 7));
    timer::set(timer, Duration::from_millis(1), Duration::from_millis(1));
    until("the signal", || procfs::status("self", "ShdPnd") != "0000000000000000");
    t.checkpoint();
    assert_eq!(signal::take(&[number]).map(|(number, code, _)| (number, code)), Some((number, libc::SI_TIMER)));
    assert!(timer::overrun(timer) >= 0);
    timer::set(timer, Duration::ZERO, Duration::ZERO);
}

const HOUR: Duration = Duration::from_secs(3600);

/// Sets a timer to expire every hour, `overruns` times before now and half an hour from now.
fn set_hourly(timer: i32, overruns: u32) {
    let now = timer::now(libc::CLOCK_REALTIME);
    timer::set_at(timer, now + HOUR / 2 - HOUR * (overruns + 1), HOUR);
}

/// Is it still half an hour from the next expiry?
#[track_caller]
fn sees_half_an_hour(timer: i32) {
    let (left, every) = timer::get(timer);
    assert!(left <= HOUR / 2 && left > HOUR / 2 - Duration::from_secs(100) && every == HOUR, "{left:?} {every:?}");
}

fn posix_timer_tells_overruns_again(t: &Trial) {
    let (first, second) = (libc::SIGRTMIN() + 4, libc::SIGUSR1);
    let timers = [(first, 1000), (first, 0), (second, 7)].map(|(number, overruns)| {
        signal::block_number(number);
        let timer = timer::create(libc::CLOCK_REALTIME, timer::Notify::Signal(number, 7));
        set_hourly(timer, overruns);
        until("its signal", || signal::take(&[number]).is_some());
        assert_eq!(timer::overrun(timer), overruns.into());
        (timer, overruns)
    });
    // One that waits for the same number, which nobody is to take for that of a timer.
    signal::queue(None, first, 77);
    t.checkpoint();
    for (timer, overruns) in timers {
        assert_eq!(timer::overrun(timer), overruns.into());
        sees_half_an_hour(timer);
    }
    assert_eq!(signal::take(&[first, second]), Some((first, libc::SI_QUEUE, 77)));
    assert_eq!(signal::take(&[first, second]), None);
}

fn waiting_signals_of_posix_timers_count_overruns(t: &Trial) {
    let (number, other) = (libc::SIGRTMIN() + 4, libc::SIGRTMIN() + 5);
    signal::block_number(number);
    signal::block_number(other);
    let timer = timer::create(libc::CLOCK_REALTIME, timer::Notify::Signal(number, 7));
    set_hourly(timer, 10);
    let once = timer::create(libc::CLOCK_MONOTONIC, timer::Notify::Signal(number, 8));
    timer::set(once, Duration::from_millis(1), Duration::ZERO);
    let own = timer::create(libc::CLOCK_REALTIME, timer::Notify::Thread(other, 9, call::gettid()));
    set_hourly(own, 5);
    until("the signals", || {
        let counts = ["ShdPnd", "SigPnd"].map(|which| procfs::status("self", which));
        counts.iter().all(|set| set.bytes().any(|digit| digit != b'0')) && timer::get(once).0.is_zero()
    });
    t.checkpoint();
    let mut values = [(); 2].map(|()| signal::take(&[number]).map(|(_, code, value)| (code, value)));
    values.sort_unstable();
    assert_eq!(values, [Some((libc::SI_TIMER, 7)), Some((libc::SI_TIMER, 8))]);
    assert_eq!(signal::take(&[other]), Some((other, libc::SI_TIMER, 9)));
    assert_eq!([timer, once, own].map(timer::overrun), [10, 0, 5]);
    assert_eq!(signal::take(&[number, other]), None);
    [timer, own].into_iter().for_each(sees_half_an_hour);
    assert_eq!(timer::get(once), (Duration::ZERO, Duration::ZERO));
}

/// A child that is blocked in the call `number` when this returns.
fn blocked_in(number: i64, body: impl FnOnce()) -> crate::sys::process::Child {
    let child = fork(body);
    until("the call", || procfs::syscall(child.pid).first().is_some_and(|nr| *nr == number as u64));
    child
}

fn sleeping_task_reacts_to_a_signal(t: &Trial) {
    let child = blocked_in(libc::SYS_clock_nanosleep, || {
        signal::count(Signal::SIGUSR1, SaFlags::empty());
        while signal::SEEN.times() == 0 {
            assert!(timer::sleep(libc::CLOCK_MONOTONIC, Duration::from_secs(3600), false).is_err());
        }
    });
    t.checkpoint();
    child.kill(Signal::SIGUSR1);
    child.succeed();
}

fn poll_with_a_time_limit_ends(t: &Trial) {
    let child = blocked_in(libc::SYS_poll, || {
        let start = Instant::now();
        let limit = Duration::from_millis(1000);
        // poll(2) may be interrupted, and is then called again for what is left; ending by itself too early,
        // or never, is wrong.
        while start.elapsed() < limit {
            let left = (limit - start.elapsed()).max(Duration::from_millis(1));
            assert!(!timer::poll_nothing(left) || start.elapsed() >= limit, "{:?}", start.elapsed());
        }
        assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    });
    t.checkpoint();
    child.succeed();
}

fn absolute_sleep_ends(t: &Trial) {
    let child = blocked_in(libc::SYS_clock_nanosleep, || {
        let end = timer::now(libc::CLOCK_MONOTONIC) + Duration::from_millis(1000);
        while timer::sleep(libc::CLOCK_MONOTONIC, end, true).is_err() {}
        let now = timer::now(libc::CLOCK_MONOTONIC);
        assert!(now >= end && now < end + Duration::from_secs(15), "{now:?} {end:?}");
    });
    t.checkpoint();
    child.succeed();
}

fn task_in_sigsuspend_is_woken(t: &Trial) {
    let child = blocked_in(libc::SYS_rt_sigsuspend, || {
        signal::count(Signal::SIGUSR1, SaFlags::empty());
        signal::block(&[Signal::SIGUSR1]);
        while signal::SEEN.times() == 0 {
            nix::sys::signal::SigSet::empty().suspend().expect("sigsuspend");
        }
        let mask = nix::sys::signal::SigSet::thread_get_mask().expect("mask");
        assert!(mask.contains(Signal::SIGUSR1), "the old mask is back");
    });
    t.checkpoint();
    child.kill(Signal::SIGUSR1);
    child.succeed();
}

fn pause_is_woken_by_a_handler(t: &Trial) {
    let shared = Map::shared(4096);
    let child = blocked_in(libc::SYS_pause, || {
        signal::count(Signal::SIGUSR1, SaFlags::empty());
        while signal::SEEN.times() == 0 {
            nix::unistd::pause();
        }
        shared.set(0, 1);
    });
    t.checkpoint();
    assert_eq!(shared.get(0), 0);
    child.kill(Signal::SIGUSR1);
    child.succeed();
    assert_eq!(shared.get(0), 1);
}
