//! AIO contexts: io_setup(2). A context is known by the address of its ring.
//!
//! Read from: the ring's mapping, and its header.
//! Rebuilt by: io_setup(2) in the process, then mremap(2) of the ring to its place, which is the context's new name.
//! Refused: completions that were not collected.
//! Not kept: the kernel tells nobody of requests in flight.

use crate::contract::TaskOps;
use agent::Judge;
use image::{AioRingEntry, VmaEntry, vma as status};
use model::{Errno, Failure, Object};
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
    let (events, first, last) = (word(1), word(2), word(3));
    if count < HEAD || word(4) != MAGIC || events < 4 {
        return refuse("has a header that is none".into());
    }
    if first != last {
        return refuse("has completions that were not collected, which are not carried yet".into());
    }
    // The kernel doubles what was asked for, adds two, and fills up the last page.
    Ok(AioRingEntry { id: vma.start, nr_req: (events - 2) / 2, ring_len: (vma.end - vma.start) as u32 })
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
