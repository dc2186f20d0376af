//! AIO contexts: io_setup(2). A context is known by the address of its ring.
//!
//! Read from: the ring's mapping, and its header.
//! Rebuilt by: io_setup(2) in the process, then mremap(2) of the ring to its place, which is the context's new name.
//! Completions that were not collected: as many reads of nothing, whose completions are then replaced.
//! Refused: requests in flight, after some waiting. Where the kernel tells its tracing no types, nobody knows of them, and
//! they are lost.

use crate::contract::TaskOps;
use crate::task::{ZERO, words};
use agent::{Arg, Judge};
use image::{AioRingEntry, VmaEntry, vma as status};
use model::{Errno, Failure, Object, Remedy};
use sys::proc::Vma;

/// Start of `struct aio_ring`: id, number of events, head, tail, magic. Source: fs/aio.c.
const HEAD: usize = 20;
const MAGIC: u32 = 0xa10a_10a1;
const RING_HEADER: u64 = 32;
const EVENT: u64 = 32;
const PAGE: u64 = 4096;

pub fn is_ring(name: &[u8]) -> bool {
    name.starts_with(b"/[aio]")
}

/// The record of the context whose ring is mapped there.
pub fn dump(pid: i32, vma: &Vma) -> Result<AioRingEntry, Failure> {
    let object = || Object::Vma { start: vma.start, end: vma.end, what: "the ring of an AIO context".into() };
    let mut head = [0u8; HEAD];
    let read = sys::memory::read_remote(pid, vma.start, &mut head);
    let count = read.map_err(|error: Errno| error.on(object(), "read its header").of(pid))?;
    let word = |at: usize| u32::from_ne_bytes(head[at * 4..at * 4 + 4].try_into().expect("four bytes"));
    let refuse = |why: String| Err(Failure::unsupported(object(), why).of(pid));
    let events = word(1);
    if count < HEAD || word(4) != MAGIC || events < 4 {
        return refuse("has a header that is none".into());
    }
    // The kernel doubles what was asked for, adds two, and fills up the last page.
    Ok(AioRingEntry { id: vma.start, nr_req: (events - 2) / 2, ring_len: (vma.end - vma.start) as u32 })
}

/// The objection to a context with requests that have not ended.
pub fn check_in_flight(pid: i32, vma: &Vma) -> Option<Failure> {
    let object = || Object::Vma { start: vma.start, end: vma.end, what: "the ring of an AIO context".into() };
    match sys::aio::in_flight(pid, vma.start) {
        Some(0) => None,
        Some(count) => {
            let why = format!("has {count} requests in flight");
            let advice = Remedy::Advice("they have to end, or to be cancelled, first");
            Some(Failure::unsupported(object(), why).of(pid).help(advice).passes())
        }
        None => {
            log::warn!("{}: requests in flight, if it has any, are lost", object());
            None
        }
    }
}

/// Why the contexts of a process do not belong to its mappings.
pub fn check(rings: &[AioRingEntry], vmas: &[VmaEntry]) -> Option<String> {
    let mapped: Vec<(u64, u64)> = vmas
        .iter()
        .filter(|vma| vma.status & status::AIO_RING != 0)
        .map(|vma| (vma.start, vma.end - vma.start))
        .collect();
    let told: Vec<(u64, u64)> = rings.iter().map(|ring| (ring.id, ring.ring_len.into())).collect();
    if mapped != told {
        return Some("has AIO contexts that are not those of its mappings".into());
    }
    let processors = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    let last = processors.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u64>().ok());
    let least = (last.unwrap_or(0) + 1) * 4;
    let wrong = rings.iter().find(|ring| {
        let events = u64::from(ring.nr_req).max(least) * 2 + 2;
        (RING_HEADER + EVENT * events).next_multiple_of(PAGE) != u64::from(ring.ring_len)
    });
    wrong.map(|ring| {
        format!("has an AIO context of {} bytes, which this kernel would not make", ring.ring_len)
    })
}

/// Has the process make a context; returns where its address will be.
pub fn make(ring: &AioRingEntry, ops: &mut TaskOps) -> Result<u64, Failure> {
    ops.list.label("make an AIO context");
    // Kept free until the ring comes: the kernel is not to choose an address that overlaps.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let len = u64::from(ring.ring_len);
    let args = [ring.id.into(), len.into(), 0.into(), flags.into(), agent::Arg::Value(u64::MAX), 0.into()];
    ops.list.call(libc::SYS_mmap, &args, Judge::Equal(ring.id as i64));
    let context = ops.bytes(&[0; 8])?;
    ops.list.ok(libc::SYS_io_setup, &[u64::from(ring.nr_req).into(), context.into()]);
    Ok(context)
}

/// Has the process move the ring of context `made` to its place.
pub fn place(ring: &AioRingEntry, made: u64, ops: &mut TaskOps) {
    ops.list.label("move the ring of an AIO context");
    let len = u64::from(ring.ring_len);
    let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let args = [made.into(), len.into(), len.into(), how.into(), ring.id.into()];
    ops.list.call(libc::SYS_mremap, &args, Judge::Equal(ring.id as i64));
}

/// The completions in a ring that were not collected, oldest first.
///
/// # Errors
/// Why this is no content of a ring.
pub fn completions(ring: &AioRingEntry, content: &[u8]) -> Result<Vec<u8>, &'static str> {
    let word = |at: usize| Some(u32::from_ne_bytes(content.get(at * 4..at * 4 + 4)?.try_into().ok()?));
    let (Some(count), Some(head), Some(tail)) = (word(1), word(2), word(3)) else { return Ok(Vec::new()) };
    if head == tail {
        return Ok(Vec::new());
    }
    let end = u64::from(count).checked_mul(EVENT).and_then(|len| len.checked_add(RING_HEADER));
    if head >= count || tail >= count || end.is_none_or(|end| end > u64::from(ring.ring_len)) {
        return Err("has an AIO ring whose counters are none");
    }
    let mut events = Vec::new();
    let mut at = head;
    while at != tail {
        let start = (RING_HEADER + u64::from(at) * EVENT) as usize;
        events.extend_from_slice(
            content.get(start..start + EVENT as usize).ok_or("has an AIO ring that is too short")?,
        );
        at = (at + 1) % count;
    }
    Ok(events)
}

/// Has the kernel complete as many requests, and puts these completions in their place. `file` is any that can be read.
pub fn fill(ring: &AioRingEntry, events: &[u8], file: i32, ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("fill the ring of an AIO context");
    let count = events.len() as u64 / EVENT;
    let nowhere = ops.room(8)?;
    // struct iocb: data, key and flags, opcode (a read) and descriptor, buffer, length, offset, two more.
    let block = ops.bytes(&words(&[0, 0, (file as u64) << 32, nowhere, 0, 0, 0, 0]))?;
    let list = ops.bytes(&words(&vec![block; count as usize]))?;
    let args = [ring.id.into(), count.into(), list.into()];
    ops.list.call(libc::SYS_io_submit, &args, Judge::Equal(count as i64));
    let length = events.len() as u64;
    let events = ops.bytes(events)?;
    let (from, to) =
        (ops.bytes(&words(&[events, length]))?, ops.bytes(&words(&[ring.id + RING_HEADER, length]))?);
    let pid = ops.list.ok(libc::SYS_getpid, &[]);
    // Within the process itself.
    let args = [Arg::Result(pid), from.into(), 1.into(), to.into(), 1.into(), ZERO];
    ops.list.call(libc::SYS_process_vm_writev, &args, Judge::Equal(length as i64));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_are_read_around_the_end() {
        let ring = AioRingEntry { id: 0x1000, nr_req: 1, ring_len: 4096 };
        let mut content = words(&[5 << 32, 1 << 32 | 4, 0, 0]);
        for event in 0..5 {
            content.extend(words(&[event; 4]));
        }
        assert_eq!(completions(&ring, &content), Ok(words(&[4, 4, 4, 4, 0, 0, 0, 0])));
        content[12] = 9;
        assert!(completions(&ring, &content).is_err());
        assert_eq!(completions(&ring, &[]), Ok(Vec::new()));
    }
}
