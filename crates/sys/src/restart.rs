//! When a call ends that the kernel goes on with after a stop: `struct restart_block`, which it tells nobody but its own
//! tracing. A program of a few instructions (bpf(2), an iterator over tasks) reads it.
//!
//! Source: include/linux/restart_block.h.

use crate::tracing::{self, Types, code, instruction};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

/// Words of the block that are read: architecture, function, and what depends on the call.
const WORDS: usize = 8;

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

/// A program that writes the block of the task it is given, which is `block` bytes into `struct task_struct`.
fn program(block: u32) -> Vec<u64> {
    let len = (WORDS * 8) as i32;
    vec![
        // struct bpf_iter__task: what is written to, and the task; none at the end.
        instruction(code::LOAD, 6, 1, 0, 0),
        instruction(code::LOAD, 7, 1, 8, 0),
        instruction(code::JUMP_IF_ZERO, 7, 0, 11, 0),
        instruction(code::COPY, 1, 10, 0, 0),
        instruction(code::ADD, 1, 0, 0, -len),
        instruction(code::SET, 2, 0, 0, len),
        instruction(code::COPY, 3, 7, 0, 0),
        instruction(code::ADD, 3, 0, 0, block as i32),
        instruction(code::CALL, 0, 0, 0, code::PROBE_READ_KERNEL),
        instruction(code::LOAD, 1, 6, 0, 0),
        instruction(code::COPY, 2, 10, 0, 0),
        instruction(code::ADD, 2, 0, 0, -len),
        instruction(code::SET, 3, 0, 0, len),
        instruction(code::CALL, 0, 0, 0, code::SEQ_WRITE),
        instruction(code::SET, 0, 0, 0, 0),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]
}

/// The program, loaded once.
fn loaded() -> Option<&'static OwnedFd> {
    static PROGRAM: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let load = || {
        let (iterator, block) = tracing::with_types(|btf| {
            let wanted = [(tracing::FUNC, "bpf_iter_task"), (tracing::STRUCT, "task_struct")];
            let (types, found) = Types::find(btf, &wanted)?;
            Some((found[0], types.member(found[1], "restart_block")?))
        })?;
        let program = tracing::load(iterator, &program(block));
        program.map_err(|error| log::debug!("restart blocks cannot be read: {error}")).ok()
    };
    PROGRAM.get_or_init(load).as_ref()
}

/// The restart block of a thread that stands still; none where this kernel does not tell.
pub fn block(tid: i32) -> Option<Block> {
    let iterator = tracing::run(loaded()?, tid).ok()?;
    let mut bytes = [0u8; WORDS * 8];
    let count = crate::fd::read(&iterator, &mut bytes).ok()?;
    (count == bytes.len()).then(|| {
        Block(std::array::from_fn(|at| {
            u64::from_ne_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_sleep_is_told() {
        let Some(program) = loaded() else { return println!("SKIP: no BPF iterators here") };
        assert!(crate::bpf::number(program) > 2);
        // Whatever it holds, this thread has one.
        // SAFETY: takes nothing.
        assert!(block(unsafe { libc::gettid() }).is_some());
    }
}
