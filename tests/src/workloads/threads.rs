//! Threads: ids, names, local storage, robust lists, rseq, what each has of its own.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use nix::sys::signal::{SaFlags, Signal};

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::{call, procfs, signal, thread};

pub const CASES: &[Case] = &[
    case!(a_hundred_threads_survive).moves().exchange().killed(),
    case!(thread_names_are_kept).moves().exchange(),
    case!(thread_local_storage_is_kept).moves().exchange(),
    case!(signal_masks_of_threads_differ_afterwards).moves(),
    case!(alternate_stack_of_each_thread_is_kept).moves(),
    case!(robust_list_of_each_thread_is_kept).moves(),
    case!(rseq_area_of_each_thread_stays_registered).moves(),
    case!(memory_policy_of_each_thread_is_kept).moves().needs(thread::has_memory_policies)
        .peer_cannot("memory policies are not in its images"),
    case!(clear_tid_address_still_wakes_a_join).moves(),
    case!(thread_blocked_in_a_futex_is_woken).moves(),
    case!(threads_that_contend_for_a_mutex_go_on).moves(),
    case!(condition_variable_with_a_time_limit_ends).moves().restless(),
    case!(scheduling_policy_of_one_thread_is_kept).moves(),
    case!(threads_that_come_and_go_survive).moves().restless(),
    case!(child_with_threads_survives).moves(),
    case!(signal_sent_to_a_thread_reaches_it).moves(),
];

/// Runs `body` in `count` threads, the checkpoint when all have called the function that they get.
fn with_threads(t: &Trial, count: u64, body: impl Fn(u64, &dyn Fn()) + Sync) {
    let ready = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|number| {
                let (ready, body) = (&ready, &body);
                std::thread::Builder::new()
                    .stack_size(128 * 1024)
                    .spawn_scoped(scope, move || {
                        body(number, &|| {
                            ready.fetch_add(1, Ordering::SeqCst);
                            t.hold();
                        });
                    })
                    .expect("spawn")
            })
            .collect();
        until("the threads", || ready.load(Ordering::SeqCst) == count);
        t.checkpoint();
        for thread in threads {
            thread.join().expect("join");
        }
    });
}

fn a_hundred_threads_survive(t: &Trial) {
    let sum = AtomicU64::new(0);
    with_threads(t, 100, |number, checkpoint| {
        let tid = call::gettid();
        checkpoint();
        assert_eq!(call::gettid(), tid);
        sum.fetch_add(number, Ordering::SeqCst);
    });
    assert_eq!(sum.into_inner(), 4950);
}

fn thread_names_are_kept(t: &Trial) {
    with_threads(t, 3, |number, checkpoint| {
        let path = format!("/proc/self/task/{}/comm", call::gettid());
        std::fs::write(&path, format!("number {number}")).expect("write");
        checkpoint();
        assert_eq!(std::fs::read_to_string(&path).expect("read"), format!("number {number}\n"));
    });
}

fn thread_local_storage_is_kept(t: &Trial) {
    thread_local!(static LOCAL: std::cell::Cell<u64> = const { std::cell::Cell::new(0) });
    LOCAL.set(1000);
    with_threads(t, 10, |number, checkpoint| {
        LOCAL.set(number * 3);
        checkpoint();
        assert_eq!(LOCAL.get(), number * 3);
    });
    assert_eq!(LOCAL.get(), 1000);
}

fn signal_masks_of_threads_differ_afterwards(t: &Trial) {
    with_threads(t, 4, |number, checkpoint| {
        let blocked = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP, Signal::SIGWINCH][number as usize];
        signal::block(&[blocked]);
        checkpoint();
        let mask = nix::sys::signal::SigSet::thread_get_mask().expect("mask");
        assert_eq!(mask.iter().collect::<Vec<_>>(), [blocked]);
    });
}

fn alternate_stack_of_each_thread_is_kept(t: &Trial) {
    with_threads(t, 4, |number, checkpoint| {
        let length = 32 * 1024 + number as usize * 4096;
        let address = signal::alternate_stack(length);
        checkpoint();
        assert_eq!(signal::current_alternate_stack(), (address, 0, length));
    });
}

fn robust_list_of_each_thread_is_kept(t: &Trial) {
    let main = thread::robust_list();
    with_threads(t, 3, |_, checkpoint| {
        let before = thread::robust_list();
        checkpoint();
        assert_eq!(thread::robust_list(), before);
    });
    assert_eq!(thread::robust_list(), main);
}

fn rseq_area_of_each_thread_stays_registered(t: &Trial) {
    with_threads(t, 3, |_, checkpoint| {
        checkpoint();
        // The kernel writes the processor's number there at every return to user space.
        let Some(number) = thread::rseq_cpu() else { return };
        let count = std::thread::available_parallelism().expect("count").get();
        assert!((number as usize) < count.max(1024), "{number}");
        let mut set = nix::sched::CpuSet::new();
        set.set(0).expect("processor 0");
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).expect("sched_setaffinity");
        assert_eq!(thread::rseq_cpu(), Some(0));
    });
}

fn memory_policy_of_each_thread_is_kept(t: &Trial) {
    with_threads(t, 2, |number, checkpoint| {
        // Node 0 is everywhere; the kernel keeps the flag, which says that the number is meant.
        let mode = if number == 0 { libc::MPOL_BIND } else { libc::MPOL_PREFERRED | thread::MPOL_F_STATIC_NODES };
        thread::set_memory_policy(mode, 1).expect("set_mempolicy");
        checkpoint();
        assert_eq!(thread::memory_policy().expect("get_mempolicy"), (mode, 1));
    });
    assert_eq!(thread::memory_policy().expect("get_mempolicy"), (libc::MPOL_DEFAULT, 0));
}

fn clear_tid_address_still_wakes_a_join(t: &Trial) {
    // pthread_join waits for the kernel to clear the id at the thread's end.
    let thread = std::sync::Arc::new(AtomicU32::new(0));
    let inner = thread.clone();
    let go = t.path(crate::case::GO);
    let handle = std::thread::spawn(move || {
        inner.store(1, Ordering::SeqCst);
        while !go.exists() {
            crate::sys::nap();
        }
        99
    });
    until("the thread", || thread.load(Ordering::SeqCst) == 1);
    t.checkpoint();
    assert_eq!(handle.join().expect("join"), 99);
}

fn thread_blocked_in_a_futex_is_woken(t: &Trial) {
    let pair = (Mutex::new(false), Condvar::new());
    let tid = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut set = pair.0.lock().expect("lock");
            tid.store(call::gettid() as u32, Ordering::SeqCst);
            while !*set {
                set = pair.1.wait(set).expect("wait");
            }
        });
        until("the futex", || {
            let tid = tid.load(Ordering::SeqCst);
            tid != 0
                && procfs::syscall(format!("self/task/{tid}")).first().is_some_and(|nr| *nr == libc::SYS_futex as u64)
        });
        t.checkpoint();
        *pair.0.lock().expect("lock") = true;
        pair.1.notify_all();
    });
}

fn threads_that_contend_for_a_mutex_go_on(t: &Trial) {
    let counter = Mutex::new(0_u64);
    let (done, working) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut mine = 0;
                while !t.is_over() || mine < 1000 {
                    for _ in 0..100 {
                        *counter.lock().expect("lock") += 1;
                        mine += 1;
                    }
                    // A thread that has just begun still makes mappings.
                    working.fetch_add(u64::from(mine == 100), Ordering::SeqCst);
                    std::thread::sleep(Duration::from_micros(100));
                }
                done.fetch_add(mine, Ordering::SeqCst);
            });
        }
        until("the work of each", || working.load(Ordering::SeqCst) == 4);
        t.checkpoint();
    });
    assert_eq!(*counter.lock().expect("lock"), done.into_inner());
}

fn condition_variable_with_a_time_limit_ends(t: &Trial) {
    let pair = (Mutex::new(()), Condvar::new());
    let tid = AtomicU32::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let guard = pair.0.lock().expect("lock");
            tid.store(call::gettid() as u32, Ordering::SeqCst);
            let limit = Duration::from_millis(1200);
            let (_guard, result) = pair.1.wait_timeout_while(guard, limit, |()| true).expect("wait");
            assert!(result.timed_out());
        });
        until("the thread", || tid.load(Ordering::SeqCst) != 0);
        t.checkpoint();
    });
}

fn scheduling_policy_of_one_thread_is_kept(t: &Trial) {
    with_threads(t, 2, |number, checkpoint| {
        if number == 1 {
            call::set_scheduler(libc::SCHED_BATCH, 0);
        }
        checkpoint();
        let stat = procfs::stat(format!("self/task/{}", call::gettid()));
        assert_eq!(stat[38], if number == 1 { libc::SCHED_BATCH } else { libc::SCHED_OTHER }.to_string());
    });
}

fn threads_that_come_and_go_survive(t: &Trial) {
    let count = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !t.is_over() {
                    std::thread::scope(|inner| {
                        inner.spawn(|| count.fetch_add(1, Ordering::SeqCst));
                    });
                }
            });
        }
        until("some threads", || count.load(Ordering::SeqCst) > 20);
        t.checkpoint();
        let now = count.load(Ordering::SeqCst);
        assert!(now > 20);
    });
}

fn child_with_threads_survives(t: &Trial) {
    let child = crate::sys::process::fork(|| {
        let ready = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| {
                    ready.fetch_add(1, Ordering::SeqCst);
                    t.hold();
                });
            }
            until("the threads", || ready.load(Ordering::SeqCst) == 5);
            t.mark("child");
        });
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn signal_sent_to_a_thread_reaches_it(t: &Trial) {
    signal::count(Signal::SIGUSR1, SaFlags::empty());
    signal::block(&[Signal::SIGUSR1]);
    let tids = Mutex::new(Vec::new());
    let turn = AtomicU32::new(0);
    with_threads(t, 3, |number, checkpoint| {
        let tid = call::gettid();
        tids.lock().expect("lock").push(tid);
        if number == 1 {
            call::tgkill_self(tid, libc::SIGUSR1);
        }
        checkpoint();
        let pending = signal::take(&[libc::SIGUSR1]).map(|(signal, code, _)| (signal, code));
        assert_eq!(pending, (number == 1).then_some((libc::SIGUSR1, libc::SI_TKILL)));
        turn.fetch_add(1, Ordering::SeqCst);
    });
    assert_eq!(signal::SEEN.times(), 0);
    assert_eq!(turn.into_inner(), 3);
}
