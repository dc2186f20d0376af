//! Words about each thing of one sort that a process has, its threads, mappings or open files, in one reading: what
//! [`crate::inside`] tells of one at a time.
//!
//! Source: kernel/bpf/task_iter.c.

use crate::inside::{self, Types, code, instruction, types};
use model::Errno;
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
    /// Eight bytes of a bitmap with a bit for each descriptor, those with its own; reached as a member is, from the
    /// `task_struct`.
    Bits(&'w [(&'w str, &'w str)]),
    /// Of a file: what its link in `/proc/PID/fd` says, with a zero behind, in [`PATH`] words; nothing where it is longer.
    Path,
}

/// Words.
pub const PATH: usize = 16;

impl<'w> Word<'w> {
    fn chain(&self) -> &'w [(&'w str, &'w str)] {
        match *self {
            Word::Member(chain, _) | Word::Bits(chain) => chain,
            Word::Address | Word::Number | Word::Path => &[],
        }
    }

    /// How many it is.
    fn len(&self) -> usize {
        match self {
            Word::Path => PATH,
            _ => 1,
        }
    }
}

/// Bytes.
const WORD: i32 = 8;
/// The register with the end of the stack, and where on it an address is that is followed; below it lies the record.
const STACK: u8 = 10;
const FOLLOWED: i16 = -8;

fn program(types: &Types, sort: Sort, words: &[Word]) -> Option<Vec<u64>> {
    let len = WORD * words.iter().map(Word::len).sum::<usize>() as i32;
    let record = i32::from(FOLLOWED) - len;
    let (_, place) = sort.place();
    let mut text = vec![
        // What is written to.
        instruction(code::LOAD, 6, 1, 0, 0),
        instruction(code::LOAD, 7, 1, place, 0),
        instruction(code::SET, 8, 0, 0, 0),
    ];
    if sort == Sort::Files {
        text.push(instruction(code::LOAD_INT, 8, 1, 16, 0));
    }
    // What has the thing, and the thing; none at the end.
    text.extend([instruction(code::LOAD, 9, 1, 8, 0), instruction(code::SET, 0, 0, 0, 0)]);
    for found in [7, 9] {
        text.extend([instruction(code::JUMP_IF_OTHER, found, 0, 1, 0), instruction(code::EXIT, 0, 0, 0, 0)]);
    }
    let mut next = record;
    for word in words {
        let at = next;
        next += WORD * word.len() as i32;
        // Reads what register 3 points to; leaves zero where nothing can be read.
        let read = |to: i32| {
            [
                instruction(code::COPY, 1, STACK, 0, 0),
                instruction(code::ADD, 1, 0, 0, to),
                instruction(code::SET, 2, 0, 0, WORD),
                instruction(code::CALL, 0, 0, 0, code::PROBE_READ_KERNEL),
            ]
        };
        let (from, behind) = match *word {
            Word::Address => {
                text.push(instruction(code::STORE, STACK, 7, at as i16, 0));
                continue;
            }
            Word::Number => {
                text.push(instruction(code::STORE, STACK, 8, at as i16, 0));
                continue;
            }
            Word::Path => {
                text.extend([
                    instruction(code::COPY, 1, 7, 0, 0),
                    instruction(code::ADD, 1, 0, 0, i32::try_from(types.offset("file", "f_path")?).ok()?),
                    instruction(code::COPY, 2, STACK, 0, 0),
                    instruction(code::ADD, 2, 0, 0, at),
                    instruction(code::SET, 3, 0, 0, WORD * PATH as i32),
                    instruction(code::CALL, 0, 0, 0, code::D_PATH),
                    instruction(code::JUMP_IF_POSITIVE, 0, 0, 2, 0),
                    instruction(code::SET, 0, 0, 0, 0),
                    instruction(code::STORE, STACK, 0, at as i16, 0),
                ]);
                continue;
            }
            Word::Member(_, behind) => (7, behind),
            Word::Bits(_) => (9, 0),
        };
        let is_bitmap = matches!(word, Word::Bits(_));
        text.push(instruction(code::COPY, 3, from, 0, 0));
        for (nth, (structure, member)) in word.chain().iter().enumerate() {
            let is_last = nth + 1 == word.chain().len() && !is_bitmap;
            let offset = types.offset(structure, member)? + if is_last { behind } else { 0 };
            text.push(instruction(code::ADD, 3, 0, 0, i32::try_from(offset).ok()?));
            text.extend(read(if is_last { at } else { FOLLOWED.into() }));
            if !is_last {
                text.push(instruction(code::LOAD, 3, STACK, FOLLOWED, 0));
            }
        }
        if is_bitmap {
            text.extend([
                instruction(code::COPY, 4, 8, 0, 0),
                instruction(code::SHIFT_RIGHT, 4, 0, 0, 6),
                instruction(code::SHIFT_LEFT, 4, 0, 0, 3),
                instruction(code::ADD_OTHER, 3, 4, 0, 0),
            ]);
            text.extend(read(at));
        }
    }
    text.extend([
        instruction(code::LOAD, 1, 6, 0, 0),
        instruction(code::COPY, 2, STACK, 0, 0),
        instruction(code::ADD, 2, 0, 0, record),
        instruction(code::SET, 3, 0, 0, len),
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
        let chains = words.iter().flat_map(Word::chain);
        let mut wanted: Vec<(u32, &str)> =
            chains.map(|(structure, _)| (inside::STRUCT, *structure)).collect();
        wanted.push((inside::FUNC, sort.place().0));
        wanted.sort_unstable();
        wanted.dedup();
        types.look_up(&wanted);
        let text = program(types, sort, words)?;
        let explain = |error: Errno| log::debug!("{sort:?} are not told: {error}");
        let program = inside::load(types, sort.place().0, &text).map_err(explain).ok()?;
        Some(Each {
            program,
            is_of_all_threads: sort == Sort::Threads,
            count: words.iter().map(Word::len).sum(),
        })
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

/// What is told of a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    pub number: i32,
    /// Where the kernel has its open file: the same address is the same open file.
    pub file: u64,
    pub closes_on_exec: bool,
    /// There are locks on what is open, or have been.
    pub has_locks: bool,
    /// As F_GETFL gives them.
    pub flags: u32,
    /// Somebody gets its signals, or it has others than SIGIO. Where that is not known it is said, too.
    pub has_owner: bool,
    /// What its link says, if it is not too long for that.
    pub link: Option<Vec<u8>>,
}

/// What stands before the first zero.
fn text(words: &[u64]) -> Option<Vec<u8>> {
    let mut text: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    text.truncate(text.iter().position(|byte| *byte == 0)?);
    Some(text).filter(|text| !text.is_empty())
}

/// Gets ready to tell of descriptors, which takes some milliseconds the first time.
pub fn prepare_descriptors() -> Option<&'static Each> {
    static EACH: OnceLock<Option<Each>> = OnceLock::new();
    let new = || {
        let closes = [("task_struct", "files"), ("files_struct", "fdt"), ("fdtable", "close_on_exec")];
        let locks = [("file", "f_inode"), ("inode", "i_flctx")];
        // Since Linux 6.12 it is an address, mostly none.
        let owners = [("file", "f_owner")];
        let knows_owners = types()?.offset("fown_struct", "file").is_some();
        let owner = if knows_owners { Word::Member(&owners, 0) } else { Word::Address };
        let flags = Word::Member(&[("file", "f_flags")], 0);
        let words = [
            Word::Number,
            Word::Address,
            Word::Bits(&closes),
            Word::Member(&locks, 0),
            flags,
            owner,
            Word::Path,
        ];
        Each::new(Sort::Files, &words)
    };
    EACH.get_or_init(new).as_ref()
}

/// The descriptors of a process that stands still. None where this kernel does not tell.
pub fn descriptors(pid: i32) -> Option<Vec<Descriptor>> {
    let told = prepare_descriptors()?.of(pid)?;
    let descriptor = |words: &[u64]| Descriptor {
        number: words[0] as i32,
        file: words[1],
        closes_on_exec: words[2] >> (words[0] % 64) & 1 != 0,
        has_locks: words[3] != 0,
        flags: words[4] as u32,
        has_owner: words[5] != 0,
        link: text(&words[6..]),
    };
    Some(told.chunks_exact(6 + PATH).map(descriptor).collect())
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
    fn descriptors_are_told() {
        use crate::fd::fcntl;
        use std::os::fd::AsRawFd;
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        // Far apart in the bitmap.
        let low = fcntl(&file, libc::F_DUPFD, 70).unwrap();
        let high = fcntl(&file, libc::F_DUPFD_CLOEXEC, 200).unwrap();
        let Some(all) = descriptors(crate::process::own_pid()) else {
            return println!("SKIP: no BPF iterators here");
        };
        let find = |number: i32| all.iter().find(|descriptor| descriptor.number == number).unwrap();
        let own = find(file.as_raw_fd());
        assert_eq!([own, find(low), find(high)].map(|found| found.closes_on_exec), [true, false, true]);
        assert_eq!([find(low).file, find(high).file], [own.file; 2]);
        let path = std::env::temp_dir().join(format!("crtools-locked-{}", std::process::id()));
        let locked = std::fs::File::create(&path).unwrap();
        locked.lock().unwrap();
        std::fs::remove_file(&path).unwrap();
        let (pipe, _writer) = crate::fd::pipe(libc::O_NONBLOCK).unwrap();
        fcntl(&pipe, libc::F_SETOWN, crate::process::own_pid()).unwrap();
        let all = descriptors(crate::process::own_pid()).unwrap();
        let owned = all.iter().find(|descriptor| descriptor.number == pipe.as_raw_fd()).unwrap();
        assert!(owned.has_owner);
        assert_eq!(owned.flags, crate::fd::status_flags(&pipe).unwrap());
        let found = all.iter().find(|descriptor| descriptor.number == locked.as_raw_fd()).unwrap();
        assert!(found.has_locks);
        assert_eq!(found.flags, crate::fd::status_flags(&locked).unwrap());
        let link = |file: &std::fs::File| std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let bytes =
            |path: std::path::PathBuf| std::os::unix::ffi::OsStringExt::into_vec(path.into_os_string());
        assert_eq!(found.link, Some(bytes(link(&locked).unwrap())));
        assert_eq!(own.link, Some(bytes(link(&file).unwrap())));
        for number in [low, high] {
            // SAFETY: made above, and nobody else has them.
            drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(number) });
        }
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
