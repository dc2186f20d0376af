//! What a process or a thread has of its own.
//!
//! The dump half of a module adds questions to the list of a frozen thread (`ask`) and reads the answers
//! from the executed list (`answer`); the restore half adds operations to the list of a puppet
//! (`restore`). Facts that `/proc` or ptrace(2) tell from outside need no question.

pub mod attributes;
pub mod creds;
pub mod limits;
pub mod numa;
pub mod rseq;
pub mod sched;
pub mod seccomp;
pub mod sessions;
pub mod signals;
pub mod timers;

use agent::{Area, Arg, List};
use model::{Errno, Failure, Object};

/// A question about one frozen thread: the list being made, and the memory for answers.
#[derive(Debug)]
pub struct Ask<'a> {
    pub list: &'a mut List,
    pub area: &'a Area,
}

impl Ask<'_> {
    pub(crate) fn room(&self, len: usize) -> Result<u64, Failure> {
        self.area.room(len).map_err(no_room)
    }

    pub(crate) fn put(&self, bytes: &[u8]) -> Result<u64, Failure> {
        self.area.put(bytes).map_err(no_room)
    }
}

/// The answers: the executed list, and the memory that its calls wrote to.
#[derive(Debug, Clone, Copy)]
pub struct Answers<'a> {
    pub ops: &'a [u8],
    pub area: &'a Area,
}

impl Answers<'_> {
    pub(crate) fn result(&self, index: usize) -> i64 {
        List::result(self.ops, index)
    }

    fn words<const N: usize>(&self, address: u64) -> [u64; N] {
        let bytes = self.area.get(address, N * 8);
        std::array::from_fn(|at| {
            u64::from_ne_bytes(bytes[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        })
    }
}

fn no_room(error: Errno) -> Failure {
    error.on(Object::Tree, "prepare operations")
}

pub(crate) const ZERO: Arg = Arg::Value(0);

pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
