//! Buffers that a program has provided to an io_uring, from which the kernel takes one for each request that asks for it.
//!
//! Read from: what the kernel tells its tracing. Of a ring of buffers in the program's memory it keeps no address but the
//! pages, which are looked for in the program.
//! Rebuilt by: buffers of a list are provided anew, as many at a time as lie side by side. A ring is registered, the
//! program's in the task; then requests that receive a byte into each take as many buffers as were taken before, for the kernel's
//! position is moved by nothing else.
//! Refused: a ring whose memory is unmapped; more buffers taken than there were requests; rings of buffers of one that polls.

use crate::contract::{FdProbe, TaskOps};
use agent::Arg;
use model::{Errno, Failure};
use std::os::fd::{AsRawFd, OwnedFd};
use sys::memory::SharedMap;
use sys::uring::armed::{BUFFER_SELECT, op};
use sys::uring::{Buffers, Group, Request, buffer_ring, group_at, register, register_buffers};

use super::Rings;

const PROVIDE_BUFFERS: u8 = 31;
/// `struct io_uring_buf`: address, length, number; the last two bytes of the first are the position of the program.
const ENTRY: usize = 16;
const TAIL: usize = 14;
const MAX_ENTRIES: u32 = 1 << 15;

/// A group of provided buffers.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RingBuffers {
    #[prost(uint32, required, tag = "1")]
    pub group: u32,
    /// Of a list: address, length and number of each.
    #[prost(uint64, repeated, tag = "2", packed = "false")]
    pub buffers: Vec<u64>,
    /// Of a ring: how many there is room for, and how many were taken, in 16 bits.
    #[prost(uint32, optional, tag = "3")]
    pub entries: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub head: Option<u32>,
    #[prost(bool, optional, tag = "5")]
    pub is_incremental: Option<bool>,
    /// Where it is in the memory of the process, or what is in it.
    #[prost(uint64, optional, tag = "6")]
    pub address: Option<u64>,
    #[prost(bytes = "vec", optional, tag = "7")]
    pub content: Option<Vec<u8>>,
}

// ------------------------------------------------------------------------------------------------ dump

/// The records of all groups of a ring.
pub fn dump(probe: &FdProbe, groups: &[Group]) -> Result<Vec<RingBuffers>, Failure> {
    groups.iter().map(|group| record(probe, group)).collect()
}

fn record(probe: &FdProbe, group: &Group) -> Result<RingBuffers, Failure> {
    let mut record = RingBuffers { group: group.id.into(), ..RingBuffers::default() };
    match &group.buffers {
        Buffers::Listed(buffers) => {
            let words = buffers.iter().flat_map(|buffer| [buffer.address, buffer.len.into(), buffer.id.into()]);
            record.buffers = words.collect();
        }
        Buffers::Ring { entries, head, is_incremental, pages } => {
            record.entries = Some(*entries);
            record.head = Some((*head).into());
            record.is_incremental = is_incremental.then_some(true);
            match pages {
                Some(pages) => {
                    record.address = Some(find(probe, group.id, pages)?);
                }
                None => {
                    let map = SharedMap::new(&probe.fd, group_at(group.id), super::pages(*entries as usize * ENTRY))
                        .map_err(|error| probe.fail(error, "map a ring of provided buffers"))?;
                    map.read(0, record.content.insert(vec![0; *entries as usize * ENTRY]));
                }
            }
        }
    }
    Ok(record)
}

/// Where the process has the pages of a ring of buffers.
fn find(probe: &FdProbe, group: u16, pages: &[u64]) -> Result<u64, Failure> {
    let what = format!("is an io_uring with a ring of provided buffers ({group})");
    let frames: Option<Vec<u64>> = pages.iter().map(|page| sys::uring::frame(*page)).collect();
    let Some(frames) = frames else {
        return Err(probe.refuse(format!("{what}, and the kernel does not tell where")));
    };
    let path = format!("/proc/{}/maps", probe.pid);
    let mut parser = sys::proc::SmapsParser::default();
    parser.feed(&sys::fd::text(&path).map_err(|error| probe.fail(error, "read its mappings"))?);
    let maps = parser.finish().unwrap_or_default();
    let writable = maps.into_iter().filter(|map| map.prot & libc::PROT_WRITE as u32 != 0);
    sys::pagemap::find_frames(probe.pid, writable.map(|map| map.start..map.end), &frames)
        .ok_or_else(|| probe.refuse(format!("{what} in memory that is unmapped by now")))
}

// ------------------------------------------------------------------------------------------------ records

/// Buffers that lie side by side and have numbers one behind the other: the first, and how many.
fn runs(record: &RingBuffers) -> Vec<([u64; 3], u16)> {
    let mut runs: Vec<([u64; 3], u16)> = Vec::new();
    for buffer in record.buffers.as_chunks::<3>().0 {
        match runs.last_mut() {
            Some(([address, len, id], count))
                if *len == buffer[1]
                    && address.checked_add(*len * u64::from(*count)) == Some(buffer[0])
                    && *id + u64::from(*count) == buffer[2] =>
            {
                *count += 1;
            }
            _ => runs.push((*buffer, 1)),
        }
    }
    runs
}

/// How many of a ring one request takes at a time. Source: io_uring/kbuf.c, PEEK_MAX_IMPORT.
fn together(entries: u32) -> u32 {
    if sys::uring::has_bundles() { entries.clamp(1, 256) } else { 1 }
}

/// How many requests it takes to provide them again, before the task is there, and with it.
pub fn requests(records: &[RingBuffers]) -> (u64, u64) {
    records.iter().fold((0, 0), |(before, with), record| match (record.entries, record.address) {
        (None, _) => (before + runs(record).len() as u64, with),
        (Some(entries), None) => (before + u64::from(record.head().div_ceil(together(entries))), with),
        (Some(entries), Some(_)) => (before, with + u64::from(record.head().div_ceil(together(entries)))),
    })
}

/// Can there be such groups?
pub fn are_right(records: &[RingBuffers]) -> bool {
    let is_right = |record: &RingBuffers| {
        record.group <= u16::MAX.into()
            && record.head() <= u16::MAX.into()
            && record.buffers.len().is_multiple_of(3)
            && record.buffers.len() <= 3 << 16
            && record.buffers.as_chunks::<3>().0.iter().all(|[address, len, id]| {
                *address < 1 << 56 && *len <= u32::MAX.into() && *id <= u16::MAX.into()
            })
            && match (record.entries, record.address) {
                (None, address) => address.is_none() && record.head() == 0 && record.content.is_none(),
                (Some(entries), address) => {
                    entries.is_power_of_two()
                        && entries <= MAX_ENTRIES
                        && record.buffers.is_empty()
                        && address.is_none_or(|address| address < 1 << 56)
                        && record.content.as_ref().map(Vec::len) == address.is_none().then_some(entries as usize * ENTRY)
                }
            }
    };
    records.len() <= 1 << 16 && records.iter().all(is_right)
}

// ------------------------------------------------------------------------------------------------ restore

/// Memory of a ring of buffers.
enum Memory {
    Mapped(SharedMap),
    OfTask(i32, u64),
}

impl Memory {
    fn write(&self, at: usize, bytes: &[u8]) -> Result<(), Errno> {
        match self {
            Memory::Mapped(map) => map.write(at, bytes),
            Memory::OfTask(pid, address) => sys::memory::write_remote(*pid, address + at as u64, bytes)?,
        }
        Ok(())
    }

    fn read(&self, bytes: &mut [u8]) -> Result<(), Errno> {
        match self {
            Memory::Mapped(map) => map.read(0, bytes),
            Memory::OfTask(pid, address) => {
                let count = sys::memory::read_remote(*pid, *address, bytes)?;
                if count != bytes.len() {
                    return Err(Errno { call: "process_vm_readv", code: libc::EFAULT });
                }
            }
        }
        Ok(())
    }
}

/// Provides what needs no task.
pub fn provide(ring: &mut Rings, records: &[RingBuffers]) -> Result<(), Errno> {
    for record in records {
        let Some(entries) = record.entries else {
            for ([address, len, id], count) in runs(record) {
                let result = ring.ask(&Request {
                    operation: PROVIDE_BUFFERS,
                    fd: count.into(),
                    address,
                    len: len as u32,
                    offset: id,
                    group: record.group as u16,
                    ..Request::default()
                })?;
                if result < 0 {
                    return Err(Errno { call: "IORING_OP_PROVIDE_BUFFERS", code: -result });
                }
            }
            continue;
        };
        if let Some(content) = &record.content {
            let group = record.group as u16;
            register_buffers(ring.fd, &buffer_ring(group, entries, None, record.is_incremental()))?;
            let map = SharedMap::new(ring.fd, group_at(group), super::pages(content.len()))?;
            let memory = Memory::Mapped(map);
            wind(ring, record, entries, &memory)?;
            memory.write(0, content)?;
        }
    }
    Ok(())
}

/// Registers rings in the memory of the task.
pub fn register(number: i32, records: &[RingBuffers], ops: &mut TaskOps) -> Result<(), Failure> {
    for record in records {
        let (Some(entries), Some(address)) = (record.entries, record.address) else { continue };
        let what = buffer_ring(record.group as u16, entries, Some(address), record.is_incremental());
        let what = ops.bytes(&what)?;
        let args: [Arg; 4] = [number.into(), u64::from(register::PBUF_RING).into(), what.into(), 1.into()];
        ops.list.label("register provided buffers with a ring").ok(libc::SYS_io_uring_register, &args);
    }
    Ok(())
}

/// Brings those to where they were; `pid` is the task.
pub fn go_on(ring: &mut Rings, records: &[RingBuffers], pid: i32) -> Result<(), Errno> {
    for record in records {
        let (Some(entries), Some(address)) = (record.entries, record.address) else { continue };
        let memory = Memory::OfTask(pid, address);
        let mut content = vec![0; entries as usize * ENTRY];
        memory.read(&mut content)?;
        wind(ring, record, entries, &memory)?;
        memory.write(0, &content)?;
    }
    Ok(())
}

/// Has requests that receive a byte into each take as many buffers as were taken: many at a time, for there may have been few
/// requests. Source: io_uring_prep_send_bundle(3), Linux 6.10.
fn wind(ring: &mut Rings, record: &RingBuffers, entries: u32, memory: &Memory) -> Result<(), Errno> {
    const BUNDLE: u16 = 1 << 4;
    if record.head() == 0 {
        return Ok(());
    }
    let (near, far) = sys::socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
    let byte: OwnedFd = sys::memory::memfd(c"crtools-byte", false)?;
    sys::fd::truncate(&byte, 1)?;
    let byte = SharedMap::new(&byte, 0, 1)?;
    let mut entry = [0; TAIL];
    entry[..8].copy_from_slice(&byte.address(0).to_ne_bytes());
    entry[8..12].copy_from_slice(&1u32.to_ne_bytes());
    let mut taken = 0;
    while taken != record.head() {
        let some = together(entries).min(record.head() - taken);
        for position in taken..taken + some {
            // One that is taken byte by byte is changed by that.
            memory.write((position & (entries - 1)) as usize * ENTRY, &entry)?;
        }
        memory.write(TAIL, &((taken + some) as u16).to_ne_bytes())?;
        sys::fd::write(&far, &vec![0; some as usize])?;
        let result = ring.ask(&Request {
            operation: op::RECV,
            flags: BUFFER_SELECT,
            priority: if together(entries) > 1 { BUNDLE } else { 0 },
            fd: near.as_raw_fd(),
            len: some,
            group: record.group as u16,
            ..Request::default()
        })?;
        if result != some as i32 {
            let code = if result < 0 { -result } else { libc::EIO };
            return Err(Errno { call: "IORING_RECVSEND_BUNDLE", code });
        }
        taken += some;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_side_by_side_are_one_run() {
        let listed = |buffers: &[[u64; 3]]| RingBuffers { buffers: buffers.concat(), ..RingBuffers::default() };
        let record = listed(&[[0x1000, 16, 4], [0x1010, 16, 5], [0x1020, 16, 7], [0x1030, 8, 8], [0x1010, 16, 9]]);
        let expected = [([0x1000, 16, 4], 2), ([0x1020, 16, 7], 1), ([0x1030, 8, 8], 1), ([0x1010, 16, 9], 1)];
        assert_eq!(runs(&record), expected);
        assert_eq!(requests(std::slice::from_ref(&record)), (4, 0));
        assert!(are_right(&[record]));
        assert!(!are_right(&[listed(&[[0x1000, 16, 1 << 16]])]));
        assert!(!are_right(&[RingBuffers { entries: Some(3), ..RingBuffers::default() }]));
    }
}
