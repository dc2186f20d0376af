//! eventfd, epoll, signalfd, timerfd.

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::unistd::Pid;

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::strange::tells_types;
use crate::sys::process::fork;
use crate::sys::{procfs, signal};

pub const CASES: &[Case] = &[
    case!(semaphore_eventfd_counts_down_by_one).peer_cannot("it forgets the semaphore mode"),
    case!(eventfd_shared_with_a_child_stays_shared).exchange(),
    case!(epoll_reports_what_was_ready_before).exchange(),
    case!(edge_triggered_and_oneshot_watches_are_kept),
    case!(one_epoll_inside_another_survives),
    case!(epoll_watches_a_duplicate_under_its_own_number),
    case!(epoll_of_500_targets_survives),
    case!(epoll_watch_of_a_descriptor_moved_away_survives)
        .peer_cannot("it refuses a watch whose number is closed in the task"),
    case!(epoll_watch_of_a_number_taken_by_another_survives)
        .peer_cannot("it refuses a watch whose number is another file"),
    case!(epoll_watch_of_a_file_that_only_a_child_has_is_refused).refused(&["fd", "watches", "no more"]),
    case!(epoll_loop_over_pipes_goes_on_meanwhile).restless(),
    case!(poll_with_a_limit_is_not_interrupted).peer_cannot("it ends such a call with EINTR"),
    case!(poll_and_sleep_go_on_for_the_time_left).restless().needs(tells_types)
        .peer_cannot("it ends such a call with EINTR"),
    case!(sleep_without_a_remainder_is_not_interrupted).restless()
        .peer_cannot("it ends such a call with EINTR"),
    case!(signalfd_keeps_its_mask_and_reads_a_pending_signal).exchange(),
    case!(timerfd_fires_after_the_time_left).exchange(),
    case!(timerfd_ticks_not_read_are_kept),
    case!(timerfd_interval_goes_on),
    case!(disarmed_timerfd_stays_disarmed),
    case!(timerfds_of_every_clock_keep_time_interval_and_ticks)
        .restless()
        .peer_cannot("it loses one that has expired and was not read"),
    case!(absolute_timerfd_of_the_real_time_clock_survives),
];

/// Waits until a child is in this system call, and stays there.
fn until_in_call(child: Pid, number: i64) {
    until("the child's call", || {
        procfs::state(child) == 'S' && procfs::syscall(child).first() == Some(&(number as u64))
    });
}

fn poll_with_a_limit_is_not_interrupted(t: &Trial) {
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    let child = fork(|| {
        let mut polled = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut polled, PollTimeout::from(30_000_u16)), Ok(1));
    });
    until_in_call(child.pid, libc::SYS_poll);
    t.checkpoint();
    nix::unistd::write(&writer, b"x").expect("write");
    child.succeed();
}

/// Without this nobody can know.
fn poll_and_sleep_go_on_for_the_time_left(t: &Trial) {
    const WHOLE: Duration = Duration::from_millis(2500);
    // Whoever begins anew ends after the first and the whole.
    const FIRST: Duration = Duration::from_millis(1700);
    let start = Instant::now();
    let ends = move || {
        let took = start.elapsed();
        assert!(took >= WHOLE && took < WHOLE + FIRST - Duration::from_millis(200), "{took:?}");
    };
    let polls = fork(|| {
        assert_eq!(poll(&mut [], PollTimeout::from(2500_u16)), Ok(0));
        ends();
    });
    let time = libc::timespec { tv_sec: 2, tv_nsec: 500_000_000 };
    let sleeps = fork(|| {
        // SAFETY: the call reads one timespec.
        assert_eq!(unsafe { libc::nanosleep(&time, std::ptr::null_mut()) }, 0);
        ends();
    });
    let sleeps_by_a_clock = fork(|| {
        // SAFETY: the call reads one timespec.
        let result =
            unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, 0, &time, std::ptr::null_mut()) };
        assert_eq!(result, 0);
        ends();
    });
    std::thread::sleep(FIRST);
    t.checkpoint();
    for child in [polls, sleeps, sleeps_by_a_clock] {
        child.succeed();
    }
}

fn sleep_without_a_remainder_is_not_interrupted(t: &Trial) {
    let length = Duration::from_millis(700);
    let child = fork(|| {
        let start = Instant::now();
        let time = libc::timespec { tv_sec: 0, tv_nsec: 700_000_000 };
        // SAFETY: the call reads one timespec.
        assert_eq!(unsafe { libc::nanosleep(&time, std::ptr::null_mut()) }, 0);
        assert!(start.elapsed() >= length);
    });
    until("the child's sleep", || procfs::state(child.pid) == 'S');
    t.checkpoint();
    child.succeed();
}

fn events_of(epoll: &Epoll) -> Vec<(u64, i32)> {
    let mut events = [EpollEvent::empty(); 600];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO).expect("epoll_wait");
    let mut all: Vec<_> = events[..count].iter().map(|e| (e.data(), e.events().bits())).collect();
    all.sort_unstable();
    all
}

fn semaphore_eventfd_counts_down_by_one(t: &Trial) {
    let event = EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK);
    let event = event.expect("eventfd");
    t.checkpoint();
    assert_eq!([event.read(), event.read(), event.read()], [Ok(1); 3]);
    assert_eq!(event.read(), Err(Errno::EAGAIN));
}

fn eventfd_shared_with_a_child_stays_shared(t: &Trial) {
    let event = EventFd::new().expect("eventfd");
    let child = fork(|| {
        t.mark("child");
        t.hold();
        assert_eq!(event.read(), Ok(5));
    });
    t.await_mark("child");
    t.checkpoint();
    event.write(5).expect("write");
    child.succeed();
}

fn epoll_reports_what_was_ready_before(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    epoll.add(&writer, EpollEvent::new(EpollFlags::EPOLLOUT, 2)).expect("add");
    writer.write_all(b"x").expect("write");
    t.checkpoint();
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN), (2, libc::EPOLLOUT)]);
}

fn edge_triggered_and_oneshot_watches_are_kept(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let (edge, once) = (EventFd::new().expect("eventfd"), EventFd::new().expect("eventfd"));
    epoll.add(&edge, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1)).expect("add");
    epoll.add(&once, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 2)).expect("add");
    t.checkpoint();
    edge.write(1).expect("write");
    once.write(1).expect("write");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN), (2, libc::EPOLLIN)]);
    assert_eq!(events_of(&epoll), []);
    once.write(1).expect("write");
    assert_eq!(events_of(&epoll), []);
    edge.write(1).expect("write");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN)]);
}

fn one_epoll_inside_another_survives(t: &Trial) {
    let (outer, inner) = (
        Epoll::new(EpollCreateFlags::empty()).expect("epoll"),
        Epoll::new(EpollCreateFlags::empty()).expect("epoll"),
    );
    let event = EventFd::new().expect("eventfd");
    inner.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 2)).expect("add");
    t.checkpoint();
    assert_eq!(events_of(&outer), []);
    event.write(1).expect("write");
    assert_eq!(events_of(&outer), [(2, libc::EPOLLIN)]);
    assert_eq!(events_of(&inner), [(1, libc::EPOLLIN)]);
}

fn epoll_watches_a_duplicate_under_its_own_number(t: &Trial) {
    // Watches are by open file and number: the original may be closed while a duplicate is watched.
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let event = EventFd::new().expect("eventfd");
    let twin = nix::unistd::dup(&event).expect("dup");
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    epoll.add(&twin, EpollEvent::new(EpollFlags::EPOLLIN, 2)).expect("add");
    t.checkpoint();
    event.write(1).expect("write");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN), (2, libc::EPOLLIN)]);
    epoll.delete(&twin).expect("delete by number");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN)]);
}

fn epoll_of_500_targets_survives(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let targets: Vec<EventFd> = (0..500).map(|_| EventFd::new().expect("eventfd")).collect();
    for (number, target) in targets.iter().enumerate() {
        epoll.add(target, EpollEvent::new(EpollFlags::EPOLLIN, number as u64)).expect("add");
    }
    t.checkpoint();
    for target in targets.iter().step_by(3) {
        target.write(1).expect("write");
    }
    let expected: Vec<_> = (0..500).step_by(3).map(|number| (number, libc::EPOLLIN)).collect();
    assert_eq!(events_of(&epoll), expected);
}

fn epoll_watch_of_a_descriptor_moved_away_survives(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let event = EventFd::new().expect("eventfd");
    let twin = nix::unistd::dup(&event).expect("dup");
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    let number = event.as_raw_fd();
    drop(event);
    t.checkpoint();
    assert!(nix::sys::stat::fstat(&twin).is_ok() && twin.as_raw_fd() != number);
    nix::unistd::write(&twin, &1_u64.to_ne_bytes()).expect("write");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN)]);
}

fn epoll_watch_of_a_number_taken_by_another_survives(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let event = EventFd::new().expect("eventfd");
    let twin = nix::unistd::dup(&event).expect("dup");
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    let number = event.as_raw_fd();
    drop(event);
    let other = EventFd::new().expect("eventfd");
    assert_eq!(other.as_raw_fd(), number);
    epoll.add(&other, EpollEvent::new(EpollFlags::EPOLLIN, 2)).expect("add");
    t.checkpoint();
    assert!(events_of(&epoll).is_empty());
    nix::unistd::write(&twin, &1_u64.to_ne_bytes()).expect("write");
    assert_eq!(events_of(&epoll), [(1, libc::EPOLLIN)]);
    assert_eq!(nix::unistd::read(&twin, &mut [0; 8]), Ok(8));
    other.write(1).expect("write");
    assert_eq!(events_of(&epoll), [(2, libc::EPOLLIN)]);
}

fn epoll_watch_of_a_file_that_only_a_child_has_is_refused(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
    let event = EventFd::new().expect("eventfd");
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
    let child = crate::sys::process::fork(|| {
        t.mark("child");
        t.hold();
        event.write(1).expect("write");
    });
    t.await_mark("child");
    drop(event);
    t.checkpoint();
    child.succeed();
    assert!(events_of(&epoll).is_empty());
}

fn signalfd_keeps_its_mask_and_reads_a_pending_signal(t: &Trial) {
    let set = signal::set_of(&[Signal::SIGUSR1, Signal::SIGCHLD]);
    signal::block(&[Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGCHLD]);
    let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK).expect("signalfd");
    nix::sys::signal::raise(Signal::SIGUSR1).expect("raise");
    nix::sys::signal::raise(Signal::SIGUSR2).expect("raise");
    t.checkpoint();
    let got = fd.read_signal().expect("read").expect("a pending signal");
    assert_eq!(got.ssi_signo, Signal::SIGUSR1 as u32);
    assert_eq!(got.ssi_pid, std::process::id());
    assert!(fd.read_signal().expect("read").is_none(), "SIGUSR2 is not in the mask");
}

fn seconds(seconds: u64) -> TimeSpec {
    TimeSpec::from(Duration::from_secs(seconds))
}

fn left(timer: &TimerFd) -> Option<Duration> {
    timer.get().expect("timerfd_gettime").map(|expiration| match expiration {
        Expiration::OneShot(left) | Expiration::Interval(left) | Expiration::IntervalDelayed(left, _) => {
            left.into()
        }
    })
}

fn timerfd_fires_after_the_time_left(t: &Trial) {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).expect("timerfd");
    let start = Instant::now();
    timer.set(Expiration::OneShot(TimeSpec::from(Duration::from_millis(700))), TimerSetTimeFlags::empty())
        .expect("set");
    t.checkpoint();
    timer.wait().expect("wait");
    assert!(start.elapsed() >= Duration::from_millis(699), "fired after {:?}", start.elapsed());
    assert_eq!(left(&timer), None);
}

fn timerfd_ticks_not_read_are_kept(t: &Trial) {
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK).expect("timerfd");
    let milli = TimeSpec::from(Duration::from_millis(1));
    timer.set(Expiration::OneShot(milli), TimerSetTimeFlags::empty()).expect("set");
    until("the tick", || left(&timer).is_none());
    t.checkpoint();
    let mut ticks = [0; 8];
    assert_eq!(nix::unistd::read(&timer, &mut ticks), Ok(8));
    assert_eq!(u64::from_ne_bytes(ticks), 1);
    assert_eq!(nix::unistd::read(&timer, &mut ticks), Err(Errno::EAGAIN));
}

fn timerfd_interval_goes_on(t: &Trial) {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::empty()).expect("timerfd");
    let (first, every) = (seconds(3600), TimeSpec::from(Duration::from_millis(5)));
    timer.set(Expiration::IntervalDelayed(first, every), TimerSetTimeFlags::empty()).expect("set");
    t.checkpoint();
    match timer.get().expect("get") {
        Some(Expiration::IntervalDelayed(left, interval)) => {
            assert_eq!(interval, every);
            let left: Duration = left.into();
            assert!(left > Duration::from_secs(3500) && left <= Duration::from_secs(3600), "{left:?}");
        }
        other => panic!("{other:?}"),
    }
    timer.set(Expiration::Interval(every), TimerSetTimeFlags::empty()).expect("set");
    timer.wait().expect("wait");
    timer.wait().expect("wait");
}

fn timerfds_of_every_clock_keep_time_interval_and_ticks(t: &Trial) {
    use ClockId::{
        CLOCK_BOOTTIME, CLOCK_BOOTTIME_ALARM, CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_REALTIME_ALARM,
    };
    let clocks =
        [CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_REALTIME_ALARM, CLOCK_BOOTTIME_ALARM];
    // Two ticks come at once, the third later.
    let (soon, every) = (Duration::from_millis(1), Duration::from_secs(100));
    let now = |clock| Duration::from(nix::time::clock_gettime(clock).expect("clock_gettime"));
    let made: Vec<_> = clocks
        .into_iter()
        .flat_map(|clock| [(clock, false), (clock, true)])
        .map(|(clock, is_absolute)| {
            // An alarm needs a clock that can wake the machine; its time is that of the plain one.
            let plain = match clock {
                CLOCK_REALTIME | CLOCK_REALTIME_ALARM => nix::time::ClockId::CLOCK_REALTIME,
                CLOCK_BOOTTIME | CLOCK_BOOTTIME_ALARM => nix::time::ClockId::CLOCK_BOOTTIME,
                _ => nix::time::ClockId::CLOCK_MONOTONIC,
            };
            let timer = TimerFd::new(clock, TimerFlags::TFD_NONBLOCK).expect("timerfd");
            let mut flags = TimerSetTimeFlags::empty();
            let mut first = soon;
            if is_absolute {
                flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
                first = now(plain) - every + soon;
            }
            timer.set(Expiration::IntervalDelayed(first.into(), every.into()), flags).expect("set");
            (timer, if is_absolute { 2 } else { 1 })
        })
        .collect();
    std::thread::sleep(Duration::from_millis(20));
    t.checkpoint();
    for (timer, expected) in &made {
        let mut ticks = [0; 8];
        assert_eq!(nix::unistd::read(timer, &mut ticks), Ok(8));
        assert_eq!(u64::from_ne_bytes(ticks), *expected);
        let left = left(timer).expect("armed");
        assert!(left <= every && left > every - Duration::from_secs(60), "{left:?}");
    }
}

fn disarmed_timerfd_stays_disarmed(t: &Trial) {
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).expect("timerfd");
    let armed = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK).expect("timerfd");
    armed.set(Expiration::OneShot(seconds(100)), TimerSetTimeFlags::empty()).expect("set");
    armed.unset().expect("unset");
    t.checkpoint();
    assert_eq!((left(&timer), left(&armed)), (None, None));
}

fn absolute_timerfd_of_the_real_time_clock_survives(t: &Trial) {
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::empty()).expect("timerfd");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let end = now + Duration::from_secs(5000);
    timer.set(Expiration::OneShot(TimeSpec::from(end)), TimerSetTimeFlags::TFD_TIMER_ABSTIME).expect("set");
    t.checkpoint();
    let left = left(&timer).expect("armed");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
    let off = (now + left).abs_diff(end);
    assert!(off < Duration::from_secs(20), "the end moved by {off:?}");
}

/// One waits for many pipes, another writes to one after the other.
fn epoll_loop_over_pipes_goes_on_meanwhile(t: &Trial) {
    const PIPES: usize = 20;
    let pipes = [(); PIPES].map(|()| std::io::pipe().expect("pipe"));
    let answer = std::io::pipe().expect("pipe");
    let waiter = fork(|| {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
        for (number, (reader, _)) in (0..).zip(&pipes) {
            epoll.add(reader, EpollEvent::new(EpollFlags::EPOLLIN, number)).expect("add");
        }
        for turn in 0_usize.. {
            let mut events = [EpollEvent::empty(); PIPES];
            let count = epoll.wait(&mut events, EpollTimeout::NONE).unwrap_or_else(|error| panic!("wait: {error}"));
            // The writer waits for the answer before it goes on.
            assert_eq!((count, events[0].data() as usize), (1, turn % PIPES));
            let mut byte = [0];
            assert_eq!(nix::unistd::read(&pipes[turn % PIPES].0, &mut byte), Ok(1));
            nix::unistd::write(&answer.1, &byte).expect("answer");
            if byte == [1] {
                break;
            }
        }
    });
    let writer = fork(|| {
        for turn in 0_usize.. {
            if turn == 1000 {
                t.mark("works");
            }
            let is_last = u8::from(turn > 1000 && t.is_over());
            nix::unistd::write(&pipes[turn % PIPES].1, &[is_last]).expect("write");
            let mut byte = [0];
            assert_eq!(nix::unistd::read(&answer.0, &mut byte), Ok(1));
            if is_last == 1 {
                break;
            }
        }
    });
    t.await_mark("works");
    t.checkpoint();
    writer.succeed();
    waiter.succeed();
}
