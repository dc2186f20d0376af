//! What the harness and its target agree on.
//!
//! They talk through one page of a file that both map: the target ticks and keeps the longest gap between two
//! ticks and when it ended, the harness resets it and reads it. All times are of the monotonic clock, in
//! nanoseconds, which both see alike.

pub mod served;

use std::sync::atomic::{AtomicU64, Ordering};

use crtools_tests::sys::memory::{Map, PAGE, RW};

/// The page's words.
#[derive(Debug, Clone, Copy)]
pub enum Word {
    /// The target has set up everything.
    Ready = 0,
    /// When the target last ticked.
    LastTick = 1,
    /// The longest gap since the harness put a zero here.
    LongestGap = 2,
    /// The harness asks for a check of all memory.
    Check = 3,
    /// 1: everything is right; 2: something is not.
    Verdict = 4,
    /// The harness wants the longest gap forgotten; the target puts a zero here when it has.
    Reset = 5,
    /// When the target ticked first since its memory was restored; the harness puts a zero here before.
    FirstTick = 6,
    /// The harness wants every tenth page written; the target puts a zero here when they are.
    Change = 7,
}

/// The shared page.
#[derive(Debug, Clone, Copy)]
pub struct Board(Map);

impl Board {
    /// Maps the page of `file`, which is made as long as it has to be.
    ///
    /// # Errors
    /// When the file cannot be opened or made longer.
    pub fn open(file: &std::path::Path) -> std::io::Result<Self> {
        let file =
            std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(file)?;
        file.set_len(PAGE as u64)?;
        Ok(Self(Map::file(std::os::fd::AsFd::as_fd(&file), PAGE, RW, libc::MAP_SHARED, 0)))
    }

    fn word(&self, word: Word) -> &'static AtomicU64 {
        self.0.word(word as usize * 8)
    }

    pub fn get(&self, word: Word) -> u64 {
        self.word(word).load(Ordering::SeqCst)
    }

    pub fn set(&self, word: Word, value: u64) {
        self.word(word).store(value, Ordering::SeqCst);
    }
}

/// Nanoseconds of the monotonic clock.
pub fn now() -> u64 {
    crtools_tests::sys::timer::now(libc::CLOCK_MONOTONIC).as_nanos() as u64
}
