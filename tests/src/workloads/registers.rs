//! Registers that hold the only copy of a value at the moment of the dump.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::process::fork;
use crate::sys::registers::File;
use crate::sys::{call, procfs};

pub const CASES: &[Case] = &[
    case!(general_registers_survive).moves().exchange(),
    case!(sse_registers_survive).moves().exchange(),
    case!(avx_registers_survive).moves().needs(|| File::Avx.is_here()),
    case!(avx512_registers_survive).moves().needs(|| File::Avx512.is_here()),
    case!(x87_registers_survive).moves(),
    case!(mmx_registers_survive).moves(),
    case!(control_words_survive).moves(),
    case!(registers_of_threads_survive_apart).moves(),
    case!(registers_of_a_child_survive).moves(),
    case!(gs_base_survives).moves(),
    case!(memory_below_the_stack_pointer_survives).moves(),
    case!(long_computation_ends_with_the_right_result).moves(),
];

/// Holds values in the registers of a second thread around the checkpoint.
fn holds(t: &Trial, file: File) {
    let flag = AtomicU32::new(0);
    let tid = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let values = file.values(0x5a);
            tid.store(call::gettid() as u32, Ordering::SeqCst);
            (file.hold(&values, &flag), values)
        });
        until("the thread", || tid.load(Ordering::SeqCst) != 0);
        t.checkpoint();
        flag.store(1, Ordering::SeqCst);
        let (after, before) = thread.join().expect("join");
        assert_eq!(after, before, "{file:?}");
    });
}

fn general_registers_survive(t: &Trial) {
    holds(t, File::General);
}

fn sse_registers_survive(t: &Trial) {
    holds(t, File::Sse);
}

fn avx_registers_survive(t: &Trial) {
    holds(t, File::Avx);
}

fn avx512_registers_survive(t: &Trial) {
    holds(t, File::Avx512);
}

fn x87_registers_survive(t: &Trial) {
    holds(t, File::X87);
}

fn mmx_registers_survive(t: &Trial) {
    holds(t, File::Mmx);
}

fn control_words_survive(t: &Trial) {
    holds(t, File::Control);
}

fn registers_of_threads_survive_apart(t: &Trial) {
    let flag = AtomicU32::new(0);
    let ready = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6_u8)
            .map(|number| {
                let (flag, ready) = (&flag, &ready);
                scope.spawn(move || {
                    let file = [File::General, File::Sse, File::X87][number as usize % 3];
                    let values = file.values(number);
                    ready.fetch_add(1, Ordering::SeqCst);
                    (file.hold(&values, flag), values)
                })
            })
            .collect();
        until("the threads", || ready.load(Ordering::SeqCst) == 6);
        t.checkpoint();
        flag.store(1, Ordering::SeqCst);
        for thread in threads {
            let (after, before) = thread.join().expect("join");
            assert_eq!(after, before);
        }
    });
}

fn registers_of_a_child_survive(t: &Trial) {
    let shared = crate::sys::memory::Map::shared(4096);
    let child = fork(|| {
        let values = File::Sse.values(3);
        shared.cell(4).store(1, Ordering::SeqCst);
        assert_eq!(File::Sse.hold(&values, shared.cell(0)), values);
    });
    until("the child", || shared.cell(4).load(Ordering::SeqCst) == 1);
    t.checkpoint();
    shared.cell(0).store(1, Ordering::SeqCst);
    child.succeed();
}

fn gs_base_survives(t: &Trial) {
    crate::sys::thread::set_gs_base(0x1234_5000);
    t.checkpoint();
    assert_eq!(crate::sys::thread::gs_base(), 0x1234_5000);
    assert!(procfs::state("self") == 'R');
}

fn long_computation_ends_with_the_right_result(t: &Trial) {
    // The alternating series of the arc tangent, once undisturbed and once around the checkpoint.
    let series = |terms: u64| {
        (0..terms).fold(0.0_f64, |sum, k| {
            let term = 1.0 / (2 * k + 1) as f64;
            if k % 2 == 0 { sum + term } else { sum - term }
        })
    };
    let part = 100_000;
    let expected = series(part);
    let child = fork(|| {
        let mut rounds = 0;
        while !t.is_over() || rounds < 10 {
            assert_eq!(series(part).to_bits(), expected.to_bits());
            rounds += 1;
            if rounds == 3 {
                t.mark("busy");
            }
        }
    });
    t.await_mark("busy");
    t.checkpoint();
    child.succeed();
}

fn memory_below_the_stack_pointer_survives(t: &Trial) {
    let (flag, begun) = (AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| crate::sys::registers::keeps_below_the_stack(&begun, &flag));
        until("the thread", || begun.load(Ordering::SeqCst) == 1);
        t.checkpoint();
        flag.store(1, Ordering::SeqCst);
        assert!(thread.join().expect("the thread"), "somebody has written below its stack pointer");
    });
}
