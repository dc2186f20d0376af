//! AIO contexts, which go on under their addresses.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::aio::Context;
use crate::sys::process::fork;
use crate::sys::{call, procfs};
use crate::sys::strange::tells_types;

pub const CASES: &[Case] = &[
    case!(aio_contexts_go_on).exchange(),
    case!(aio_context_of_a_child_goes_on),
    case!(completions_not_collected_are_kept).exchange(),
    case!(wait_for_a_completion_goes_on),
    case!(aio_goes_on_meanwhile).restless(),
    case!(aio_requests_that_end_soon_are_waited_for).needs(tells_types)
        .peer_cannot("it does not wait, and loses them"),
    case!(aio_request_that_does_not_end_is_refused).refused(&["pid ", "AIO context", "2 requests in flight"])
        .needs(tells_types).peer_cannot("it loses them"),
];

fn works(context: Context, file: &File, data: u64) {
    context.write(file.as_fd(), b"written", data, data);
    assert_eq!(context.next(true), Some((data, 7)));
    assert_eq!(context.next(false), None);
}

fn aio_contexts_go_on(t: &Trial) {
    let file = File::create(t.path("file")).expect("create");
    let contexts = [1, 32, 500, 64].map(Context::new);
    works(contexts[1], &file, 1);
    t.checkpoint();
    for _ in 0..3 {
        for (n, context) in (10..).zip(contexts) {
            works(context, &file, n);
        }
    }
    assert_eq!(file.metadata().expect("stat").len(), 13 + 7);
}

fn aio_context_of_a_child_goes_on(t: &Trial) {
    let child = fork(|| {
        let file = File::create(t.path("file")).expect("create");
        let context = Context::new(128);
        works(context, &file, 1);
        t.mark("child");
        t.hold();
        works(context, &file, 2);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
}

fn completions_not_collected_are_kept(t: &Trial) {
    let file = File::create(t.path("file")).expect("create");
    let context = Context::new(8);
    for n in 0..5 {
        works(context, &file, n);
    }
    for n in 10..16 {
        context.write(file.as_fd(), b"x", n, n);
    }
    crate::case::until("the writes", || file.metadata().expect("stat").len() == 16);
    assert_eq!(context.next(true), Some((10, 1)));
    t.checkpoint();
    for n in 11..16 {
        assert_eq!(context.next(false), Some((n, 1)));
    }
    works(context, &file, 20);
    // As many as there is room for.
    for n in 0..8 {
        context.write(file.as_fd(), b"y", n, n);
    }
    for n in 0..8 {
        assert_eq!(context.next(true), Some((n, 1)));
    }
}

fn aio_requests_that_end_soon_are_waited_for(t: &Trial) {
    let file = File::create(t.path("file")).expect("create");
    let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).expect("timerfd");
    let contexts = [Context::new(4), Context::new(200)];
    contexts.into_iter().for_each(|context| works(context, &file, 1));
    for data in 10..13 {
        contexts[1].poll(timer.as_fd(), data);
    }
    // Longer than it takes until the first try of a dump, shorter than a dump waits.
    let soon = Expiration::OneShot(TimeSpec::from_duration(Duration::from_millis(150)));
    timer.set(soon, TimerSetTimeFlags::empty()).expect("settime");
    t.checkpoint();
    let mut seen = [(); 3].map(|()| contexts[1].next(true));
    seen.sort_unstable();
    assert_eq!(seen, [10, 11, 12].map(|data| Some((data, libc::POLLIN.into()))));
    contexts.into_iter().for_each(|context| works(context, &file, 2));
}

fn aio_request_that_does_not_end_is_refused(t: &Trial) {
    let (reader, writer) = std::io::pipe().expect("pipe");
    let context = Context::new(64);
    context.poll(reader.as_fd(), 5);
    context.poll(reader.as_fd(), 5);
    t.checkpoint();
    nix::unistd::write(&writer, b"x").expect("write");
    for _ in 0..2 {
        let (data, mask) = context.next(true).expect("a completion");
        assert_eq!((data, mask & i64::from(libc::POLLIN)), (5, libc::POLLIN.into()));
    }
}

/// What waits for a completion without end is not woken without one, not even by a look at it.
fn wait_for_a_completion_goes_on(t: &Trial) {
    let file = File::create(t.path("file")).expect("create");
    let context = Context::new(4);
    let waiter = AtomicI32::new(0);
    std::thread::scope(|scope| {
        let got = scope.spawn(|| {
            waiter.store(call::gettid(), Ordering::SeqCst);
            context.next(true)
        });
        until("a wait", || {
            let tid = waiter.load(Ordering::SeqCst);
            tid != 0 && procfs::syscall(format_args!("self/task/{tid}")).first() == Some(&(libc::SYS_io_getevents as u64))
        });
        t.checkpoint();
        context.write(file.as_fd(), b"12345678", 0, 5);
        assert_eq!(got.join().expect("the waiter"), Some((5, 8)));
    });
}

fn aio_goes_on_meanwhile(t: &Trial) {
    let path = t.path("file");
    let child = fork(|| {
        let file = File::create(&path).expect("create");
        let context = Context::new(16);
        for round in 0_u64.. {
            if round == 100 {
                t.mark("works");
            }
            if round > 100 && t.is_over() {
                break;
            }
            for n in 0..8 {
                context.write(file.as_fd(), b"12345678", n * 8, round * 8 + n);
            }
            for n in 0..8 {
                assert_eq!(context.next(true), Some((round * 8 + n, 8)));
            }
            assert_eq!(context.next(false), None);
        }
        assert_eq!(file.metadata().expect("stat").len(), 64);
    });
    t.await_mark("works");
    t.checkpoint();
    child.succeed();
}
