//! The kinds of files behind descriptors.

use crate::contract::{AnyFdKind, FdProbe};

macro_rules! kinds {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*
        /// Every kind that is carried.
        pub static KINDS: &[&dyn AnyFdKind] = &[$(&$module::KIND),*];
    };
}

kinds! { bpfmap, eventfd, eventpoll, fanotify, fifo, inet, inotify, memfd, namespace, netlink, pidfd, pipe, regular, secret, signalfd, timerfd, tty, tun, unix, uring }

pub mod build_id;
pub mod ghost;
pub mod locks;
pub mod process;
pub mod socket_options;
pub mod watched;

/// The kind that an open file is of, if any carries it.
pub fn kind_of(probe: &FdProbe) -> Option<&'static dyn AnyFdKind> {
    let mut claims = KINDS.iter().filter(|kind| kind.claims(probe));
    let kind = claims.next();
    debug_assert!(claims.next().is_none(), "two kinds claim {:?}", probe.object());
    kind.copied()
}
