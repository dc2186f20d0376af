//! When a call ends that the kernel goes on with after a stop: `struct restart_block`, see [`crate::inside`].
//!
//! Source: include/linux/restart_block.h.

use crate::inside::{OfTask, SOME};
use std::sync::OnceLock;

/// Words of the block that are read: architecture, function, and what depends on the call.
const WORDS: usize = SOME / 8;

/// What a call waits for, as the kernel keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block([u64; WORDS]);

impl Block {
    /// Of nanosleep(2) and clock_nanosleep(2): the clock, and nanoseconds of it.
    pub fn sleep_end(&self) -> (i32, u64) {
        (self.0[2] as i32, self.0[4])
    }

    /// Has a poll(2) of these left it? Source: fs/select.c, do_restart_poll.
    pub fn is_poll(&self, files: u64, count: u32, limit: i32) -> bool {
        let has_limit = u64::from(limit >= 0) << 32;
        self.0[2] == files && self.0[3] == u64::from(count) | has_limit && self.0[5] < 1_000_000_000
    }

    /// Has a futex(2) wait left it, for this word to change from this value?
    pub fn is_futex(&self, word: u64, value: u32) -> bool {
        self.0[2] == word && self.0[3] as u32 == value
    }

    /// Could a sleep have left it? A clock, and where to put what is left: nowhere, or one of two ways.
    pub fn is_sleep(&self) -> bool {
        const CLOCKS: u32 = 16;
        const WAYS: u64 = 2;
        (self.0[2] as u32) < CLOCKS && self.0[2] >> 32 <= WAYS
    }

    /// Of poll(2): nanoseconds of the monotonic clock.
    pub fn poll_end(&self) -> u64 {
        self.0[4].saturating_mul(1_000_000_000).saturating_add(self.0[5])
    }
}

/// The restart block of a thread that stands still; none where this kernel does not tell.
pub fn block(tid: i32) -> Option<Block> {
    static BLOCKS: OnceLock<Option<OfTask>> = OnceLock::new();
    let bytes = BLOCKS.get_or_init(|| OfTask::new("restart_block")).as_ref()?.read(tid)?;
    Some(Block(std::array::from_fn(|at| {
        u64::from_ne_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_a_block() {
        if crate::inside::inside().is_none() {
            return println!("SKIP: no BPF iterators here");
        }
        // SAFETY: takes nothing.
        assert!(block(unsafe { libc::gettid() }).is_some());
    }
}
