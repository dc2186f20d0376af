//! The contract between the coordinator and the agent: the layout of a list of operations, and of the
//! slot through which a list is handed over.

use model::Errno;

/// One operation as it lies in the shared memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// System call number.
    pub number: u32,
    pub judge: u8,
    /// Bit n: argument n is not a value but the place of one, in bytes from the start of the list.
    pub places: u8,
    pub pad: u16,
    pub args: [u64; 6],
    /// Depends on the judge.
    pub expect: i64,
    /// What the call returned: a value, or the error number negated.
    pub result: i64,
}

pub const OP_SIZE: usize = 72;
const RESULT_AT: u64 = 64;
const _: () = assert!(size_of::<Op>() == OP_SIZE);
const _: () = assert!(std::mem::offset_of!(Op, judge) == 4 && std::mem::offset_of!(Op, places) == 5);
const _: () = assert!(std::mem::offset_of!(Op, args) == 8 && std::mem::offset_of!(Op, expect) == 56);
const _: () = assert!(std::mem::offset_of!(Op, result) == RESULT_AT as usize);

/// In the place of a call: which pages hold something else than zeros? Arguments are the address of the first, the end of the
/// last, and where there is a byte for each. The process has to be able to read them.
pub const SCAN: u32 = 0x7fff_ffff;

pub const JUDGE_ANY: u8 = 0;
pub const JUDGE_OK: u8 = 1;
pub const JUDGE_EQUAL: u8 = 2;
pub const JUDGE_SPAWN: u8 = 3;

/// Offsets in a slot; see [`crate::area::Slot`].
pub mod slot {
    /// Whose turn it is: a futex.
    pub const TURN: usize = 0;
    /// What the agent sets when it has done its list.
    pub const IDLE: usize = 4;
    /// First operation, and the end of the last.
    pub const LIST: usize = 8;
    pub const END: usize = 16;
    /// The operation at which the list stopped; zero when it was done to the end.
    pub const STOPPED: usize = 24;
    /// Stack pointer for the way back to the thread's own context; zero where there is none.
    pub const FRAME: usize = 32;
    /// Node of the coordinator's list of robust futexes.
    pub const NODE: usize = 40;
    pub const SIZE: usize = 64;
}

/// An argument of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A number, or an address in the process that executes the list.
    Value(u64),
    /// What operation n of the same list returned.
    Result(usize),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Arg {
        Arg::Value(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Arg {
        Arg::Value(value as i64 as u64)
    }
}

/// How a result is judged; a list stops at the first that is not as it must be. All but `Any` try again
/// on EINTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judge {
    Any,
    /// Not an error.
    Ok,
    /// Not an error, or this one.
    OkOr(i32),
    Equal(i64),
    /// A new process or thread, which goes on at the slot at this address.
    Spawn(u64),
}

/// Operations for one process, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    ops: Vec<Op>,
    /// What the operations are for, in the words of an error; each from the index on.
    labels: Vec<(usize, &'static str)>,
}

/// A list that stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failed {
    pub index: usize,
    pub doing: &'static str,
    /// System call number.
    pub number: u32,
    /// The error, or 0 where a value was not the expected one.
    pub code: i32,
}

impl Failed {
    pub fn errno(&self) -> Errno {
        Errno { call: crate::arch::call_name(self.number), code: self.code }
    }
}

impl List {
    pub fn new() -> List {
        List::default()
    }

    /// What the next operations are for.
    pub fn label(&mut self, doing: &'static str) -> &mut List {
        self.labels.push((self.ops.len(), doing));
        self
    }

    /// Adds an operation; returns its index, for [`Arg::Result`] and for its result.
    pub fn call(&mut self, number: i64, args: &[Arg], judge: Judge) -> usize {
        let mut op =
            Op { number: number as u32, judge: 0, places: 0, pad: 0, args: [0; 6], expect: 0, result: 0 };
        for (at, arg) in args.iter().enumerate() {
            op.args[at] = match *arg {
                Arg::Value(value) => value,
                Arg::Result(index) => {
                    assert!(index < self.ops.len(), "a result is used after it is there");
                    op.places |= 1 << at;
                    (index * OP_SIZE) as u64 + RESULT_AT
                }
            };
        }
        (op.judge, op.expect) = match judge {
            Judge::Any => (JUDGE_ANY, 0),
            Judge::Ok => (JUDGE_OK, 0),
            Judge::OkOr(code) => (JUDGE_OK, -i64::from(code)),
            Judge::Equal(value) => (JUDGE_EQUAL, value),
            Judge::Spawn(slot) => (JUDGE_SPAWN, slot as i64),
        };
        self.ops.push(op);
        self.ops.len() - 1
    }

    /// An operation that must not fail.
    pub fn ok(&mut self, number: i64, args: &[Arg]) -> usize {
        self.call(number, args, Judge::Ok)
    }

    /// An operation whose failure is no failure of the list.
    pub fn any(&mut self, number: i64, args: &[Arg]) -> usize {
        self.call(number, args, Judge::Any)
    }

    pub fn len(&self) -> usize {
        self.ops.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.ops.len() * OP_SIZE);
        for op in &self.ops {
            bytes.extend_from_slice(&op.number.to_ne_bytes());
            bytes.extend_from_slice(&[op.judge, op.places, 0, 0]);
            op.args.iter().for_each(|arg| bytes.extend_from_slice(&arg.to_ne_bytes()));
            bytes.extend_from_slice(&op.expect.to_ne_bytes());
            bytes.extend_from_slice(&op.result.to_ne_bytes());
        }
        bytes
    }

    /// The failure of operation `index`, which returned `result`.
    pub fn failed(&self, index: usize, result: i64) -> Failed {
        let doing = self.labels.iter().rev().find(|label| label.0 <= index).map_or("", |label| label.1);
        let code = if (-4095..0).contains(&result) { -result as i32 } else { 0 };
        Failed { index, doing, number: self.ops[index].number, code }
    }

    /// The result of operation `index` in `bytes`, a list that was executed.
    pub fn result(bytes: &[u8], index: usize) -> i64 {
        let at = index * OP_SIZE + RESULT_AT as usize;
        i64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// Operations as text, for `--dry-run` and tests.
    pub fn describe(&self) -> String {
        use std::fmt::Write;
        let mut text = String::new();
        for (index, op) in self.ops.iter().enumerate() {
            if let Some(label) = self.labels.iter().find(|label| label.0 == index) {
                let _ = writeln!(text, "  # {}", label.1);
            }
            let _ = write!(text, "  {}(", crate::arch::call_name(op.number));
            for (at, arg) in op.args.iter().enumerate() {
                let separator = if at == 0 { "" } else { ", " };
                let _ = match op.places >> at & 1 {
                    0 => write!(text, "{separator}{arg:#x}"),
                    _ => write!(text, "{separator}@{}", *arg as usize / OP_SIZE),
                };
            }
            let _ = writeln!(text, ")");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_named_by_its_place_and_a_failure_by_its_label() {
        let mut list = List::new();
        let opened = list.label("open").ok(2, &[7u64.into()]);
        list.label("close").ok(3, &[Arg::Result(opened)]);
        let bytes = list.bytes();
        assert_eq!(bytes.len(), 2 * OP_SIZE);
        assert_eq!(bytes[OP_SIZE + 5], 1);
        assert_eq!(bytes[OP_SIZE + 8], RESULT_AT as u8);
        let failed = list.failed(1, -9);
        assert_eq!((failed.doing, failed.code), ("close", libc::EBADF));
    }
}
