//! AIO contexts, which go on under their addresses.

use std::fs::File;
use std::os::fd::AsFd;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::aio::Context;
use crate::sys::process::fork;

pub const CASES: &[Case] = &[
    case!(aio_contexts_go_on).exchange(),
    case!(aio_context_of_a_child_goes_on),
    case!(completions_not_collected_are_kept).exchange(),
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
