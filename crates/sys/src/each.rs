//! Words about each thing of one sort that a process has, its threads, mappings or open files, in one reading: what
//! [`crate::inside`] tells of one at a time.
//!
//! Source: kernel/bpf/task_iter.c.

use crate::inside::{self, Types, code, instruction, types};
use model::Errno;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

/// Sorts of things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    /// `struct task_struct`.
    Threads,
    /// `struct vm_area_struct`.
    Mappings,
    /// `struct file`, one for each descriptor.
    Files,
}

impl Sort {
    /// The function that the kernel calls, and where its argument has the thing.
    fn place(self) -> (&'static str, i16) {
        match self {
            Sort::Threads => ("bpf_iter_task", 8),
            Sort::Mappings => ("bpf_iter_task_vma", 16),
            Sort::Files => ("bpf_iter_task_file", 24),
        }
    }
}

/// A word that is told.
#[derive(Debug, Clone, Copy)]
pub enum Word<'w> {
    /// Where the kernel has it.
    Address,
    /// The number of the descriptor.
    Number,
    /// Eight bytes at a member, and so many bytes behind: `(structure, member)` by which others are reached that have an
    /// address there, and the last.
    Member(&'w [(&'w str, &'w str)], u64),
}

/// Bytes.
const WORD: i32 = 8;
/// The register with the end of the stack, and where on it an address is that is followed; below it lies the record.
const STACK: u8 = 10;
const FOLLOWED: i16 = -8;

fn program(types: &Types, sort: Sort, words: &[Word]) -> Option<Vec<u64>> {
    let record = i32::from(FOLLOWED) - WORD * words.len() as i32;
    let (_, place) = sort.place();
    let mut text = vec![
        // What is written to, and the thing; none at the end.
        instruction(code::LOAD, 6, 1, 0, 0),
        instruction(code::LOAD, 7, 1, place, 0),
        instruction(code::SET, 8, 0, 0, 0),
    ];
    if sort == Sort::Files {
        text.push(instruction(code::LOAD_INT, 8, 1, 16, 0));
    }
    text.extend([
        instruction(code::SET, 0, 0, 0, 0),
        instruction(code::JUMP_IF_OTHER, 7, 0, 1, 0),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]);
    for (word, at) in words.iter().zip((record..).step_by(WORD as usize)) {
        let (chain, behind) = match *word {
            Word::Address => {
                text.push(instruction(code::STORE, STACK, 7, at as i16, 0));
                continue;
            }
            Word::Number => {
                text.push(instruction(code::STORE, STACK, 8, at as i16, 0));
                continue;
            }
            Word::Member(chain, behind) => (chain, behind),
        };
        text.push(instruction(code::COPY, 3, 7, 0, 0));
        for (nth, (structure, member)) in chain.iter().enumerate() {
            let is_last = nth + 1 == chain.len();
            let offset = types.offset(structure, member)? + if is_last { behind } else { 0 };
            let to = if is_last { at } else { FOLLOWED.into() };
            text.extend([
                instruction(code::ADD, 3, 0, 0, i32::try_from(offset).ok()?),
                instruction(code::COPY, 1, STACK, 0, 0),
                instruction(code::ADD, 1, 0, 0, to),
                instruction(code::SET, 2, 0, 0, WORD),
                // Leaves zero where nothing can be read.
                instruction(code::CALL, 0, 0, 0, code::PROBE_READ_KERNEL),
            ]);
            if !is_last {
                text.push(instruction(code::LOAD, 3, STACK, FOLLOWED, 0));
            }
        }
    }
    text.extend([
        instruction(code::LOAD, 1, 6, 0, 0),
        instruction(code::COPY, 2, STACK, 0, 0),
        instruction(code::ADD, 2, 0, 0, record),
        instruction(code::SET, 3, 0, 0, WORD * words.len() as i32),
        instruction(code::CALL, 0, 0, 0, code::SEQ_WRITE),
        instruction(code::SET, 0, 0, 0, 0),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]);
    Some(text)
}

/// Tells words of each.
#[derive(Debug)]
pub struct Each {
    program: OwnedFd,
    is_of_all_threads: bool,
    count: usize,
}

impl Each {
    /// The first word is one that no two of them share. None where this kernel tells nothing, or has no such member.
    pub fn new(sort: Sort, words: &[Word]) -> Option<Each> {
        let types = types()?;
        let chains = words.iter().filter_map(|word| match word {
            Word::Member(chain, _) => Some(*chain),
            Word::Address | Word::Number => None,
        });
        let mut wanted: Vec<(u32, &str)> =
            chains.flatten().map(|(structure, _)| (inside::STRUCT, *structure)).collect();
        wanted.push((inside::FUNC, sort.place().0));
        wanted.sort_unstable();
        wanted.dedup();
        types.look_up(&wanted);
        let text = program(types, sort, words)?;
        let explain = |error: Errno| log::debug!("{sort:?} are not told: {error}");
        let program = inside::load(types, sort.place().0, &text).map_err(explain).ok()?;
        Some(Each { program, is_of_all_threads: sort == Sort::Threads, count: words.len() })
    }

    /// Of a process that stands still, one behind the other.
    pub fn of(&self, pid: i32) -> Option<Vec<u64>> {
        /// More than the kernel writes at once.
        const PIECE: usize = 64 << 10;
        // union bpf_iter_link_info: tid, pid, pidfd.
        let wanted = if self.is_of_all_threads { [0, pid as u32, 0, 0] } else { [pid as u32, 0, 0, 0] };
        let iterator = inside::start(&self.program, wanted)?;
        let mut piece = vec![0; PIECE];
        let (mut words, mut firsts) = (Vec::new(), Vec::new());
        loop {
            let count = crate::fd::read(&iterator, &mut piece).ok()?;
            let begin = words.len();
            let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
            words.extend(piece[..count].chunks_exact(8).map(word));
            if words.len() % self.count != 0 {
                return None;
            }
            // At the end of many Linux 6.18 begins again with the last ones, for ever.
            match words.get(begin) {
                Some(first) if !firsts.contains(first) => firsts.push(*first),
                _ => {
                    words.truncate(begin);
                    return Some(words);
                }
            }
        }
    }
}

/// Where the kernel has the open file of each descriptor of a process that stands still: the same address is the same open
/// file. None where this kernel does not tell.
pub fn files(pid: i32) -> Option<HashMap<i32, u64>> {
    static EACH: OnceLock<Option<Each>> = OnceLock::new();
    let each = EACH.get_or_init(|| Each::new(Sort::Files, &[Word::Number, Word::Address])).as_ref()?;
    Some(each.of(pid)?.chunks_exact(2).map(|words| (words[0] as i32, words[1])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_files_are_told() {
        let words =
            [Word::Number, Word::Address, Word::Member(&[("file", "f_inode"), ("inode", "i_ino")], 0)];
        let Some(each) = Each::new(Sort::Files, &words) else {
            return println!("SKIP: no BPF iterators here");
        };
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        let same = file.try_clone().unwrap();
        let words = each.of(crate::process::own_pid()).unwrap();
        let find = |file: &std::fs::File| {
            use std::os::fd::AsRawFd;
            words.chunks_exact(3).find(|words| words[0] == file.as_raw_fd() as u64).unwrap()
        };
        assert_eq!(find(&file)[1], find(&same)[1]);
        use std::os::unix::fs::MetadataExt;
        assert_eq!(find(&file)[2], file.metadata().unwrap().ino());
    }

    #[test]
    fn every_thread_is_told_once() {
        let Some(each) =
            Each::new(Sort::Threads, &[Word::Address, Word::Member(&[("task_struct", "pid")], 0)])
        else {
            return println!("SKIP: no BPF iterators here");
        };
        const COUNT: usize = 3000;
        let barrier = std::sync::Barrier::new(COUNT + 1);
        std::thread::scope(|scope| {
            for _ in 0..COUNT {
                std::thread::Builder::new()
                    .stack_size(64 << 10)
                    .spawn_scoped(scope, || barrier.wait())
                    .unwrap();
            }
            let words = each.of(crate::process::own_pid()).unwrap();
            let mut all: Vec<u64> = words.chunks_exact(2).map(|words| words[0]).collect();
            all.sort_unstable();
            all.dedup();
            assert!(all.len() > COUNT);
            assert_eq!(all.len() * 2, words.len());
            barrier.wait();
        });
    }
}
