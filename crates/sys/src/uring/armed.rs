//! Requests of an io_uring that wait, for their files or for a time: what the kernel has of each, as the request that it was.
//!
//! Source: io_uring/poll.c, net.c, rw.c, timeout.c; include/linux/io_uring_types.h, struct io_kiocb.

use super::{Inner, Request};
use crate::inside::{Inside, inside, types};
use std::sync::OnceLock;

const REQUEST: &str = "io_kiocb";
const TIMEOUT: &str = "io_timeout";

/// Operations.
pub mod op {
    pub const POLL_ADD: u8 = 6;
    pub const TIMEOUT: u8 = 11;
    pub const ACCEPT: u8 = 13;
    pub const READ: u8 = 22;
    pub const WRITE: u8 = 23;
    pub const SEND: u8 = 26;
    pub const RECV: u8 = 27;
    pub const READ_MULTISHOT: u8 = 49;
}

/// Flags of requests: the number is that of a registered file; a buffer is taken from a group; no completion on success.
pub const FIXED_FILE: u8 = 1;
pub const BUFFER_SELECT: u8 = 1 << 5;
pub const CQE_SKIP_SUCCESS: u8 = 1 << 6;
/// In the length of POLL_ADD: it tells again and again.
pub const POLL_MULTI: u32 = 1;

/// A request that waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Armed {
    /// The `task_struct` of whoever has asked for it, and the `struct file`; zero for one that waits for a time.
    pub task: u64,
    pub file: u64,
    /// The time, in nanoseconds: what is left, or when it is.
    pub time: Option<u64>,
    pub operation: u8,
    /// An event came that was not looked at yet.
    pub is_pending: bool,
    /// The request that would be armed the same; none where that is not known to be exact.
    pub request: Option<Request>,
}

impl Inner {
    /// Those of this ring; none where the kernel does not tell.
    pub fn armed(&self) -> Option<Vec<Armed>> {
        const TABLE: &str = "io_hash_table";
        const MAX_BITS: u32 = 8;
        const MANY: usize = 1 << 16;
        let inside = inside()?;
        let table = inside.at(self.context, "io_ring_ctx", "cancel_table")?;
        let buckets = inside.member(table, TABLE, "hbs")?;
        let bits = inside.int(inside.at(table, TABLE, "hash_bits")?).filter(|bits| *bits <= MAX_BITS)?;
        let (size, within) = (types()?.size("io_hash_bucket")?, types()?.offset(REQUEST, "hash_node")?);
        let mut armed = Vec::new();
        for bucket in 0..1 << bits {
            let list = inside.at(buckets + bucket * size, "io_hash_bucket", "list")?;
            for node in inside.nodes(list, 0) {
                armed.push(request(inside, node?.checked_sub(within)?)?);
                if armed.len() > MANY {
                    return None;
                }
            }
        }
        let list = inside.at(self.context, "io_ring_ctx", "timeout_list")?;
        let within = types()?.offset(TIMEOUT, "list")?;
        for node in inside.nodes(list, list) {
            armed.push(timeout(inside, node?.checked_sub(within)?)?);
            if armed.len() > MANY {
                return None;
            }
        }
        Some(armed)
    }
}

/// One that waits for a time alone, not for so many completions, nor again and again.
fn timeout(inside: &Inside, address: u64) -> Option<Armed> {
    const DATA: &str = "io_timeout_data";
    const ABSOLUTE: u32 = 1;
    const BOOTTIME: u32 = 1 << 2;
    const REALTIME: u32 = 1 << 3;
    const ETIME_SUCCESS: u32 = 1 << 5;
    let plain = request(inside, address)?;
    let data = inside.member(address, REQUEST, "async_data")?;
    let flags = inside.int(inside.at(data, DATA, "flags")?)?;
    let timer = inside.at(data, DATA, "timer")?;
    let end = inside.member(timer, "hrtimer", "_softexpires")?;
    let clock = match flags & (BOOTTIME | REALTIME) {
        0 => libc::CLOCK_MONOTONIC,
        BOOTTIME => libc::CLOCK_BOOTTIME,
        _ => libc::CLOCK_REALTIME,
    };
    let is_plain = flags & !(ABSOLUTE | BOOTTIME | REALTIME | ETIME_SUCCESS) == 0
        && inside.int(inside.at(address, TIMEOUT, "off")?)? == 0;
    let waits = Request { len: 1, more: flags, ..common(inside, address, op::TIMEOUT)? };
    let left = if flags & ABSOLUTE != 0 { end } else { end.saturating_sub(crate::clock::now_ns(clock)) };
    let request = Some(waits).filter(|_| is_plain && !has_creds(inside, address).unwrap_or(true));
    Some(Armed { file: 0, time: Some(left), is_pending: false, request, ..plain })
}

fn request(inside: &Inside, address: u64) -> Option<Armed> {
    const REFERENCES: u32 = (1 << 31) - 1;
    let operation = inside.int(inside.at(address, REQUEST, "opcode")?)? as u8;
    let context = inside.member(address, REQUEST, "tctx")?;
    let references = inside.int(inside.at(address, REQUEST, "poll_refs")?)?;
    Some(Armed {
        task: inside.member(context, "io_uring_task", "task")?,
        file: inside.member(address, REQUEST, "file")?,
        time: None,
        operation,
        is_pending: references & REFERENCES != 0,
        // One that is being cancelled is none.
        request: if references > REFERENCES { None } else { rebuilt(inside, address, operation) },
    })
}

fn creds_bit() -> Option<u64> {
    static BIT: OnceLock<Option<u64>> = OnceLock::new();
    *BIT.get_or_init(|| types()?.enumerator("REQ_F_CREDS_BIT"))
}

/// Has it the credentials of a personality, or was it tried by a thread of the kernel?
fn has_creds(inside: &Inside, address: u64) -> Option<bool> {
    Some(inside.member(address, REQUEST, "flags")? >> creds_bit()? & 1 != 0)
}

/// What all operations have.
fn common(inside: &Inside, address: u64, operation: u8) -> Option<Request> {
    const KEPT: u8 = FIXED_FILE | BUFFER_SELECT | CQE_SKIP_SUCCESS;
    let result = inside.at(address, REQUEST, "cqe")?;
    Some(Request {
        operation,
        flags: inside.member(address, REQUEST, "flags")? as u8 & KEPT,
        fd: inside.int(inside.at(result, "io_cqe", "fd")?)? as i32,
        data: inside.member(result, "io_cqe", "user_data")?,
        ..Request::default()
    })
}

fn rebuilt(inside: &Inside, address: u64, operation: u8) -> Option<Request> {
    if has_creds(inside, address)? {
        return None;
    }
    let own = |structure: &str, member: &str| inside.at(address, structure, member);
    let int = |structure: &str, member: &str| inside.int(own(structure, member)?);
    let half = |structure: &str, member: &str| int(structure, member).map(|word| word as u16);
    let request = common(inside, address, operation)?;
    Some(match operation {
        op::POLL_ADD => {
            const ONE_SHOT: u32 = 1 << 30;
            const EDGE: u32 = 1 << 31;
            let events = int(REQUEST, "apoll_events")?;
            // Only a change of it makes one that tells as long as it is so.
            if events & EDGE == 0 {
                return None;
            }
            let len = if events & ONE_SHOT == 0 { POLL_MULTI } else { 0 };
            Request { len, more: events & !(ONE_SHOT | EDGE), ..request }
        }
        op::ACCEPT => {
            const ACCEPT: &str = "io_accept";
            Request {
                priority: half(ACCEPT, "iou_flags")?,
                address: inside.member(address, ACCEPT, "addr")?,
                offset: inside.member(address, ACCEPT, "addr_len")?,
                more: int(ACCEPT, "flags")?,
                file_index: int(ACCEPT, "file_slot")?,
                ..request
            }
        }
        op::RECV => {
            const RECV: &str = "io_sr_msg";
            /// What its caller can ask for but bundles: the rest is the kernel's own.
            const PLAIN: u16 = 3;
            const MULTISHOT: u16 = 2;
            /// What the kernel notes by itself, and what it may leave there.
            const RETRIED: u16 = 1 << 15;
            let how = half(RECV, "flags")?;
            if how & !(PLAIN | RETRIED) != 0 || int(RECV, "done_io")? != 0 {
                return None;
            }
            let is_selected = request.flags & BUFFER_SELECT != 0;
            let length = match (how & MULTISHOT, types()?.offset(RECV, "mshot_len")) {
                (0, _) => int(RECV, "len")?,
                (_, Some(_)) => int(RECV, "mshot_len")?,
                (_, None) => 0,
            };
            Request {
                priority: how & PLAIN,
                address: if is_selected { 0 } else { inside.member(address, RECV, "buf")? },
                len: length,
                more: int(RECV, "msg_flags")?,
                group: half(RECV, "buf_group")?,
                ..request
            }
        }
        op::READ | op::WRITE | op::READ_MULTISHOT => {
            const RW: &str = "io_rw";
            const ASYNC: &str = "io_async_rw";
            let is_selected = request.flags & BUFFER_SELECT != 0;
            let group = match (is_selected, types()?.offset(ASYNC, "buf_group")) {
                (false, _) => 0,
                (true, Some(_)) => {
                    inside.half(inside.member(address, REQUEST, "async_data")?, ASYNC, "buf_group")?
                }
                (true, None) => half(REQUEST, "buf_index")?,
            };
            Request {
                address: if is_selected { 0 } else { inside.member(address, RW, "addr")? },
                len: if operation == op::READ_MULTISHOT { 0 } else { int(RW, "len")? },
                // Whatever has to be waited for has no positions.
                offset: u64::MAX,
                more: int(RW, "flags")?,
                group,
                ..request
            }
        }
        _ => return None,
    })
}
