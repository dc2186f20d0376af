//! Programs of a few instructions that the kernel runs over what a process has (bpf(2), iterators): they tell what no
//! file of `/proc` tells, or tells slowly. Where something is in the kernel's structures, it describes itself (BTF).
//!
//! Source: Documentation/bpf/bpf_iterators.rst; Documentation/bpf/btf.rst.

use crate::bpf::{bpf, number, owned, pair};
use crate::memory::View;
use model::Errno;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;

const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;

/// Kinds of types.
pub const STRUCT: u32 = 4;
pub const UNION: u32 = 5;
pub const FUNC: u32 = 12;

/// The kernel's description of its types.
#[derive(Debug)]
pub struct Types<'b> {
    btf: &'b [u8],
    strings: &'b [u8],
    /// Where each type is, by its number less one.
    places: Vec<u32>,
}

impl<'b> Types<'b> {
    /// Reads as far as it takes to know every type's place, and finds the numbers of some by kind and name.
    pub fn find(btf: &'b [u8], wanted: &[(u32, &str)]) -> Option<(Types<'b>, Vec<u32>)> {
        let word = |at| word_at(btf, at);
        if word(0)? & 0xffff != 0xeb9f {
            return None;
        }
        let (head, start, len) = (word(4)? as usize, word(8)? as usize, word(12)? as usize);
        let strings = btf.get(head.checked_add(word(16)? as usize)?..)?;
        let mut types = Types { btf, strings, places: Vec::new() };
        let mut at = head.checked_add(start)?;
        let end = at.checked_add(len)?;
        let mut found = vec![None; wanted.len()];
        while at < end {
            types.places.push(u32::try_from(at).ok()?);
            let (name, info) = (word(at)?, word(at + 4)?);
            let (kind, count) = kind_and_count(info);
            for (found, (_, wanted)) in
                found.iter_mut().zip(wanted).filter(|(_, (wanted, _))| *wanted == kind)
            {
                if found.is_none() && types.is(name, wanted) {
                    *found = Some(types.places.len() as u32);
                }
            }
            at += 12
                + match kind {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    STRUCT | UNION | 15 | 19 => count * 12,
                    6 | 13 => count * 8,
                    _ => 0,
                };
        }
        let found = found.into_iter().collect::<Option<Vec<u32>>>()?;
        Some((types, found))
    }

    /// Where a structure has a member, also one in a structure without a name inside of it. Bytes.
    pub fn member(&self, structure: u32, name: &str) -> Option<u32> {
        self.member_within(structure, name, 8)
    }

    fn member_within(&self, structure: u32, name: &str, depth: u32) -> Option<u32> {
        let at = *self.places.get((structure as usize).checked_sub(1)?)? as usize;
        let info = self.word(at + 4)?;
        let (kind, count) = kind_and_count(info);
        if !matches!(kind, STRUCT | UNION) || depth == 0 {
            return None;
        }
        (0..count).find_map(|member| {
            let at = at + 12 + member * 12;
            // With fields of bits the upper byte is a length.
            let bits = self.word(at + 8)?;
            let offset = if info >> 31 != 0 { bits & 0xff_ffff } else { bits } / 8;
            let named = self.word(at)?;
            if self.is(named, name) {
                Some(offset)
            } else if self.is(named, "") {
                self.member_within(self.word(at + 4)?, name, depth - 1)?.checked_add(offset)
            } else {
                None
            }
        })
    }

    fn word(&self, at: usize) -> Option<u32> {
        word_at(self.btf, at)
    }

    fn is(&self, offset: u32, name: &str) -> bool {
        let text = self.strings.get(offset as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn word_at(btf: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(btf.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn kind_and_count(info: u32) -> (u32, usize) {
    (info >> 24 & 0x1f, (info & 0xffff) as usize)
}

/// Hands the kernel's description of its types to `use_it`; none where it gives none.
pub fn with_types<T>(use_it: impl FnOnce(&[u8]) -> Option<T>) -> Option<T> {
    let mut file = File::open("/sys/kernel/btf/vmlinux").ok()?;
    // Since Linux 6.16 it can be mapped, which takes a tenth of the time.
    if let Ok(btf) = View::new(&file, file.metadata().ok()?.len() as usize) {
        return use_it(btf.bytes());
    }
    let mut btf = Vec::new();
    file.read_to_end(&mut btf).ok()?;
    use_it(&btf)
}

/// Codes of instructions.
pub mod code {
    /// Eight bytes from a place in memory.
    pub const LOAD: u8 = 0x79;
    pub const STORE: u8 = 0x7b;
    pub const COPY: u8 = 0xbf;
    pub const ADD: u8 = 0x07;
    pub const SET: u8 = 0xb7;
    pub const JUMP_IF_ZERO: u8 = 0x15;
    pub const CALL: u8 = 0x85;
    pub const EXIT: u8 = 0x95;
    /// What is called.
    pub const PROBE_READ_KERNEL: i32 = 113;
    pub const SEQ_WRITE: i32 = 127;
}

/// One instruction: code, registers, offset, value.
pub fn instruction(code: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(to | from << 4) << 8
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}

/// Loads a program that the kernel calls as the function `iterator`.
pub fn load(iterator: u32, program: &[u64]) -> Result<OwnedFd, Errno> {
    let mut words = [0u64; 16];
    words[0] = pair(PROG_TYPE_TRACING, program.len() as u32);
    words[1] = program.as_ptr() as u64;
    words[2] = c"Dual MIT/GPL".as_ptr() as u64;
    // No log; then kern_version, flags, name, device, expected_attach_type.
    words[8] = pair(0, TRACE_ITER);
    // prog_btf_fd, func_info (three words), line_info (three), attach_btf_id.
    words[13] = pair(0, iterator);
    // SAFETY: the kernel reads the instructions and a C string.
    unsafe { bpf(PROG_LOAD, &mut words) }.map(owned)
}

/// What a program writes of a thread, to be read.
pub fn run(program: &OwnedFd, tid: i32) -> Result<OwnedFd, Errno> {
    // union bpf_iter_link_info: tid, pid, pidfd.
    let mut wanted = [tid as u32, 0, 0, 0];
    let info = wanted.as_mut_ptr() as u64;
    let mut words = [pair(number(program), 0), pair(TRACE_ITER, 0), info, size_of_val(&wanted) as u64];
    // SAFETY: the kernel reads as much of the array as it has.
    let link = owned(unsafe { bpf(LINK_CREATE, &mut words) }?);
    let mut words = [pair(number(&link), 0)];
    // SAFETY: no addresses.
    unsafe { bpf(ITER_CREATE, &mut words) }.map(owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_describes_no_types() {
        for btf in [&[][..], &[0xff; 64], &[0x9f, 0xeb, 1, 0, 24, 0, 0, 0]] {
            assert!(Types::find(btf, &[(FUNC, "bpf_iter_task")]).is_none());
        }
    }

    #[test]
    fn members_of_members_without_a_name_are_found() {
        let found = with_types(|btf| {
            let (types, found) = Types::find(btf, &[(STRUCT, "vm_area_struct"), (STRUCT, "list_head")])?;
            Some((
                types.member(found[0], "vm_flags"),
                types.member(found[1], "prev"),
                types.member(found[1], "x"),
            ))
        });
        let Some((flags, prev, none)) = found else { return println!("SKIP: no BTF here") };
        assert!(flags.is_some_and(|at| at % 8 == 0 && at < 256));
        assert_eq!((prev, none), (Some(8), None));
    }
}
