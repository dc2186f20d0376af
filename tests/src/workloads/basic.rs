//! The smallest programs of each sort, to be tried first.

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SaFlags, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus};

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::memory::{Map, PAGE};
use crate::sys::process::fork;
use crate::sys::{call, procfs, signal};

pub const CASES: &[Case] = &[
    case!(sleeping_process_survives).exchange().killed(),
    case!(private_memory_survives).exchange(),
    case!(heap_and_stack_survive).exchange(),
    case!(regular_file_is_read_on_where_it_stopped).exchange(),
    case!(pipe_with_queued_data_survives).exchange(),
    case!(eventfd_counter_survives).exchange(),
    case!(eventfd_counter_above_32_bits_survives).peer_cannot("it gives the counter to eventfd2(2), which takes 32 bits"),
    case!(epoll_watch_survives),
    case!(one_thread_survives).exchange(),
    case!(eight_threads_keep_their_ids).exchange(),
    case!(one_child_survives).exchange(),
    case!(tree_with_pipes_and_files_survives).exchange().killed(),
    case!(threads_beside_a_child_with_pipe_and_file_survive),
    case!(exited_zombie_is_collected_afterwards),
    case!(signal_handler_still_runs).exchange(),
    case!(pending_signal_is_delivered_afterwards),
    case!(long_sleep_continues_for_the_time_left).restless().killed(),
    case!(clock_calls_through_the_vdso_work).exchange().foreign_vdso(),
    case!(new_children_and_threads_can_be_made_afterwards),
];

fn sleeping_process_survives(t: &Trial) {
    let pid = std::process::id();
    t.checkpoint();
    assert_eq!(std::process::id(), pid);
}

fn private_memory_survives(t: &Trial) {
    let map = Map::private(1024 * PAGE);
    map.fill(0..300, 1);
    map.fill(700..1024, 2);
    t.checkpoint();
    map.check(0..300, 1);
    map.check_zero(300..700);
    map.check(700..1024, 2);
    map.fill(0..1024, 3);
    map.check(0..1024, 3);
}

fn heap_and_stack_survive(t: &Trial) {
    let heap: Vec<u64> = (0..200_000).map(|i: u64| i.wrapping_mul(i)).collect();
    let stack: [u64; 4096] = std::array::from_fn(|i| i as u64 * 7);
    let (heap, stack) = (std::hint::black_box(heap), std::hint::black_box(stack));
    t.checkpoint();
    assert!(heap.iter().enumerate().all(|(i, v)| *v == (i as u64).wrapping_mul(i as u64)));
    assert!(stack.iter().enumerate().all(|(i, v)| *v == i as u64 * 7));
    let more: Vec<Vec<u8>> = (0..1000).map(|i| vec![i as u8; 1000 * (i % 7 + 1)]).collect();
    assert_eq!(std::hint::black_box(more).len(), 1000);
}

fn regular_file_is_read_on_where_it_stopped(t: &Trial) {
    std::fs::write(t.path("data"), (0..=255).collect::<Vec<u8>>()).expect("write");
    let mut file = std::fs::OpenOptions::new().read(true).write(true).open(t.path("data")).expect("open");
    let mut first = [0; 100];
    file.read_exact(&mut first).expect("read");
    t.checkpoint();
    assert_eq!(file.stream_position().expect("position"), 100);
    let mut next = [0; 2];
    file.read_exact(&mut next).expect("read on");
    assert_eq!(next, [100, 101]);
    file.write_all(b"x").expect("write");
    assert_eq!(std::fs::read(t.path("data")).expect("read")[102], b'x');
}

fn pipe_with_queued_data_survives(t: &Trial) {
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    writer.write_all(b"before").expect("write");
    t.checkpoint();
    writer.write_all(b" and after").expect("write");
    drop(writer);
    let mut all = String::new();
    reader.read_to_string(&mut all).expect("read");
    assert_eq!(all, "before and after");
}

fn eventfd_counter_survives(t: &Trial) {
    let event = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK).expect("eventfd");
    event.write(5).expect("write");
    t.checkpoint();
    assert_eq!(event.read(), Ok(12));
    assert_eq!(event.read(), Err(nix::errno::Errno::EAGAIN));
}

fn eventfd_counter_above_32_bits_survives(t: &Trial) {
    let event = EventFd::from_value_and_flags(7, EfdFlags::EFD_NONBLOCK).expect("eventfd");
    event.write(1 << 40).expect("write");
    t.checkpoint();
    assert_eq!(event.read(), Ok(7 + (1 << 40)));
}

fn epoll_watch_survives(t: &Trial) {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("epoll");
    let event = EventFd::new().expect("eventfd");
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 0x1234_5678_9abc)).expect("add");
    t.checkpoint();
    let mut events = [EpollEvent::empty(); 4];
    assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO), Ok(0));
    event.write(1).expect("write");
    assert_eq!(epoll.wait(&mut events, EpollTimeout::ZERO), Ok(1));
    assert_eq!(events[0].data(), 0x1234_5678_9abc);
}

fn one_thread_survives(t: &Trial) {
    let tid = std::sync::Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mine = call::gettid();
            tid.store(mine as u32, Ordering::SeqCst);
            t.hold();
            assert_eq!(call::gettid(), mine);
            17
        });
        until("the thread", || tid.load(Ordering::SeqCst) != 0);
        t.checkpoint();
        assert_eq!(thread.join().expect("join"), 17);
    });
}

fn eight_threads_keep_their_ids(t: &Trial) {
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8_u64)
            .map(|number| {
                let ready = &ready;
                scope.spawn(move || {
                    let tid = call::gettid();
                    let local: [u64; 64] = std::hint::black_box([number; 64]);
                    ready.fetch_add(1, Ordering::SeqCst);
                    t.hold();
                    assert_eq!(call::gettid(), tid);
                    assert_eq!(std::hint::black_box(local), [number; 64]);
                    number
                })
            })
            .collect();
        until("the threads", || ready.load(Ordering::SeqCst) == 8);
        t.checkpoint();
        let sum: u64 = threads.into_iter().map(|thread| thread.join().expect("join")).sum();
        assert_eq!(sum, 28);
    });
}

fn one_child_survives(t: &Trial) {
    let parent = std::process::id();
    let child = fork(|| {
        t.mark("child");
        t.hold();
        assert_eq!(std::os::unix::process::parent_id(), parent);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn tree_with_pipes_and_files_survives(t: &Trial) {
    // Three generations; each one passes a line up through a pipe made by its parent, and all of them append
    // to one file through one description.
    let mut shared = std::fs::File::create(t.path("all")).expect("create");
    let (mut reader, writer) = std::io::pipe().expect("pipe");
    let child = fork(|| {
        let (mut inner, inner_writer) = std::io::pipe().expect("pipe");
        let grandchild = fork(|| {
            t.mark("grandchild");
            t.hold();
            (&inner_writer).write_all(b"grandchild").expect("write");
            shared.write_all(b"1").expect("append");
        });
        drop(inner_writer);
        t.mark("child");
        t.hold();
        let mut text = String::new();
        inner.read_to_string(&mut text).expect("read");
        grandchild.succeed();
        shared.write_all(b"2").expect("append");
        (&writer).write_all(format!("child of {text}").as_bytes()).expect("write");
    });
    drop(writer);
    t.await_mark("child");
    t.await_mark("grandchild");
    t.checkpoint();
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    assert_eq!(text, "child of grandchild");
    child.succeed();
    shared.write_all(b"3").expect("append");
    assert_eq!(std::fs::read_to_string(t.path("all")).expect("read"), "123");
}

/// A little of everything that most trees have; `tests/hostile.rs` damages its images.
fn threads_beside_a_child_with_pipe_and_file_survive(t: &Trial) {
    let mut file = std::fs::File::create(t.path("file")).expect("create");
    file.write_all(b"before").expect("write");
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    writer.write_all(b"queued ").expect("write");
    let child = fork(|| {
        t.mark("child");
        t.hold();
        writer.write_all(b"and sent").expect("write");
    });
    drop(writer);
    let is_ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                is_ready.fetch_add(1, Ordering::SeqCst);
                t.hold();
            });
        }
        t.await_mark("child");
        until("the threads", || is_ready.load(Ordering::SeqCst) == 2);
        t.checkpoint();
    });
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    assert_eq!(text, "queued and sent");
    child.succeed();
    file.write_all(b" and after").expect("write");
    assert_eq!(std::fs::read_to_string(t.path("file")).expect("read"), "before and after");
}

fn exited_zombie_is_collected_afterwards(t: &Trial) {
    let child = fork(|| crate::sys::exit_now(42));
    assert_eq!(child.peek(WaitPidFlag::WEXITED), WaitStatus::Exited(child.pid, 42));
    t.checkpoint();
    assert_eq!(procfs::state(child.pid), 'Z');
    assert_eq!(child.wait(), WaitStatus::Exited(child.pid, 42));
}

fn signal_handler_still_runs(t: &Trial) {
    signal::count(Signal::SIGUSR1, SaFlags::empty());
    t.checkpoint();
    assert_eq!(signal::SEEN.times(), 0);
    nix::sys::signal::raise(Signal::SIGUSR1).expect("raise");
    assert_eq!(signal::SEEN.times(), 1);
}

fn pending_signal_is_delivered_afterwards(t: &Trial) {
    signal::count(Signal::SIGUSR1, SaFlags::empty());
    signal::block(&[Signal::SIGUSR1]);
    nix::sys::signal::raise(Signal::SIGUSR1).expect("raise");
    t.checkpoint();
    assert_eq!(signal::SEEN.times(), 0);
    signal::unblock(&[Signal::SIGUSR1]);
    assert_eq!(signal::SEEN.times(), 1);
}

fn long_sleep_continues_for_the_time_left(t: &Trial) {
    // The monotonic clock goes on while nothing runs, and a relative sleep is kept as an end on it: it ends
    // when it would have ended, never earlier.
    let length = Duration::from_millis(1500);
    let started = Map::shared(PAGE);
    let child = fork(|| {
        let start = Instant::now();
        started.cell(0).store(1, Ordering::SeqCst);
        // std restarts the sleep with what is left if a signal interrupts it.
        std::thread::sleep(length);
        let slept = start.elapsed();
        assert!(slept >= length, "slept {slept:?} only");
        assert!(slept < length + Duration::from_secs(10), "slept {slept:?}");
    });
    until("the child", || started.cell(0).load(Ordering::SeqCst) == 1 && procfs::state(child.pid) == 'S');
    t.checkpoint();
    child.succeed();
}

fn clock_calls_through_the_vdso_work(t: &Trial) {
    let before = (Instant::now(), std::time::SystemTime::now());
    t.checkpoint();
    let mut last = before.0;
    for _ in 0..100_000 {
        let now = Instant::now();
        assert!(now >= last, "the clock went backwards");
        last = now;
    }
    assert!(before.1.elapsed().is_ok());
}

fn new_children_and_threads_can_be_made_afterwards(t: &Trial) {
    t.checkpoint();
    fork(|| ()).succeed();
    let values: Vec<i32> = (0..4).map(|i| std::thread::spawn(move || i).join().expect("join")).collect();
    assert_eq!(values, [0, 1, 2, 3]);
    assert!(std::process::Command::new("/bin/true").status().expect("run true").success());
    let (reader, _writer) = std::io::pipe().expect("pipe");
    assert!(reader.as_raw_fd() > 2);
}
