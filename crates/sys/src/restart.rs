//! When a call ends that the kernel goes on with after a stop: `struct restart_block`, which it tells nobody but its own
//! tracing. A program of a few instructions (bpf(2), an iterator over tasks) reads it.
//!
//! Source: include/linux/restart_block.h; Documentation/bpf/bpf_iterators.rst.

use crate::bpf::{bpf, number, owned, pair};
use crate::memory::View;
use model::Errno;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

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

/// What is where in this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Places {
    /// The type of the function that an iterator over tasks calls.
    iterator: u32,
    /// Where a task has its block.
    block: u32,
}

/// Finds both in the kernel's description of its types. Source: Documentation/bpf/btf.rst.
fn find(btf: &[u8]) -> Option<Places> {
    const STRUCT: u32 = 4;
    const FUNC: u32 = 12;
    let word = |at: usize| Some(u32::from_le_bytes(btf.get(at..at + 4)?.try_into().ok()?));
    let (head, types, types_len) = (word(4)? as usize, word(8)? as usize, word(12)? as usize);
    let strings = btf.get(head.checked_add(word(16)? as usize)?..)?;
    let is = |offset: u32, name: &str| {
        let text = strings.get(offset as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    };
    if word(0)? & 0xffff != 0xeb9f {
        return None;
    }
    let (mut at, end) = (head.checked_add(types)?, head.checked_add(types)?.checked_add(types_len)?);
    let (mut iterator, mut block) = (None, None);
    let mut id = 0;
    while at < end && (iterator.is_none() || block.is_none()) {
        id += 1;
        let (name, info) = (word(at)?, word(at + 4)?);
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        at += 12;
        if kind == FUNC && is(name, "bpf_iter_task") {
            iterator = Some(id);
        }
        if kind == STRUCT && is(name, "task_struct") {
            for member in 0..count {
                let member = at + member * 12;
                if is(word(member)?, "restart_block") {
                    // With fields of bits the upper byte is a length.
                    let bits = word(member + 8)?;
                    block = Some(if info >> 31 != 0 { bits & 0xff_ffff } else { bits } / 8);
                }
            }
        }
        at += match kind {
            1 | 14 | 17 => 4,
            3 => 12,
            4 | 5 | 15 | 19 => count * 12,
            6 | 13 => count * 8,
            _ => 0,
        };
    }
    Some(Places { iterator: iterator?, block: block? })
}

/// One instruction: code, registers, offset, value.
fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(to | from << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}

/// A program that writes the block of the task it is given.
fn program(block: u32) -> Vec<u64> {
    const LOAD: u8 = 0x79;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const SET: u8 = 0xb7;
    const JUMP_IF_ZERO: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const PROBE_READ_KERNEL: i32 = 113;
    const SEQ_WRITE: i32 = 127;
    let len = (WORDS * 8) as i32;
    vec![
        // struct bpf_iter__task: what is written to, and the task; none at the end.
        instruction(LOAD, 6, 1, 0, 0),
        instruction(LOAD, 7, 1, 8, 0),
        instruction(JUMP_IF_ZERO, 7, 0, 11, 0),
        instruction(COPY, 1, 10, 0, 0),
        instruction(ADD, 1, 0, 0, -len),
        instruction(SET, 2, 0, 0, len),
        instruction(COPY, 3, 7, 0, 0),
        instruction(ADD, 3, 0, 0, block as i32),
        instruction(CALL, 0, 0, 0, PROBE_READ_KERNEL),
        instruction(LOAD, 1, 6, 0, 0),
        instruction(COPY, 2, 10, 0, 0),
        instruction(ADD, 2, 0, 0, -len),
        instruction(SET, 3, 0, 0, len),
        instruction(CALL, 0, 0, 0, SEQ_WRITE),
        instruction(SET, 0, 0, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

fn load(places: Places) -> Result<OwnedFd, Errno> {
    let program = program(places.block);
    let mut words = [0u64; 16];
    words[0] = pair(PROG_TYPE_TRACING, program.len() as u32);
    words[1] = program.as_ptr() as u64;
    words[2] = c"Dual MIT/GPL".as_ptr() as u64;
    // No log; then kern_version, flags, name, device, expected_attach_type.
    words[8] = pair(0, TRACE_ITER);
    // prog_btf_fd, func_info (three words), line_info (three), attach_btf_id.
    words[13] = pair(0, places.iterator);
    // SAFETY: the kernel reads the instructions and a C string.
    unsafe { bpf(PROG_LOAD, &mut words) }.map(owned)
}

/// The program, loaded once.
fn loaded() -> Option<&'static OwnedFd> {
    static PROGRAM: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let load = || {
        // Since Linux 6.16 it can be mapped, which takes a tenth of the time.
        let mut file = File::open("/sys/kernel/btf/vmlinux").ok()?;
        let mapped = View::new(&file, file.metadata().ok()?.len() as usize);
        let places = match mapped {
            Ok(btf) => find(btf.bytes()),
            Err(_) => {
                let mut btf = Vec::new();
                file.read_to_end(&mut btf).ok()?;
                find(&btf)
            }
        };
        load(places?).map_err(|error| log::debug!("restart blocks cannot be read: {error}")).ok()
    };
    PROGRAM.get_or_init(load).as_ref()
}

/// The restart block of a thread that stands still; none where this kernel does not tell.
pub fn block(tid: i32) -> Option<Block> {
    let program = loaded()?;
    // union bpf_iter_link_info: tid, pid, pidfd.
    let mut wanted = [tid as u32, 0, 0, 0];
    let info = wanted.as_mut_ptr() as u64;
    let mut words = [pair(number(program), 0), pair(TRACE_ITER, 0), info, size_of_val(&wanted) as u64];
    // SAFETY: the kernel reads as much of the array as it has.
    let link = owned(unsafe { bpf(LINK_CREATE, &mut words) }.ok()?);
    let mut words = [pair(number(&link), 0)];
    // SAFETY: no addresses.
    let iterator = owned(unsafe { bpf(ITER_CREATE, &mut words) }.ok()?);
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
    fn nonsense_describes_no_types() {
        for btf in [&[][..], &[0xff; 64], &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]] {
            assert_eq!(find(btf), None);
        }
    }

    #[test]
    fn the_end_of_a_sleep_is_told() {
        let Some(program) = loaded() else { return println!("SKIP: no BPF iterators here") };
        assert!(number(program) > 2);
        // Whatever it holds, this thread has one.
        // SAFETY: takes nothing.
        assert!(block(unsafe { libc::gettid() }).is_some());
    }
}
