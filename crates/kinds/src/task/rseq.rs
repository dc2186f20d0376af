//! rseq(2): the area through which a thread and the kernel agree on restartable sequences.
//!
//! Read from: ptrace(2) PTRACE_GET_RSEQ_CONFIGURATION; the area itself is memory.
//! Rebuilt by: rseq(2) in the thread.
//! A thread that stopped inside a critical section must not go on in it after a restore: nobody tells the
//! kernel there that it was interrupted. It goes on at the section's abort handler, as the kernel would have it.

use crate::contract::TaskOps;
use image::RseqEntry;
use model::Failure;
use sys::ptrace::Rseq;

/// Where the area points to the current critical section. Source: uapi/linux/rseq.h.
const SECTION_AT: u64 = 8;

/// The record of a thread's registration, if it has one.
pub fn record(rseq: Rseq) -> Option<RseqEntry> {
    (rseq.area != 0).then_some(RseqEntry {
        rseq_abi_pointer: rseq.area,
        rseq_abi_size: rseq.size,
        signature: rseq.signature,
        rseq_cs_pointer: None,
    })
}

/// Where the thread has to go on instead, when `ip` is inside a critical section.
///
/// `read` reads memory of the process.
pub fn abort_address(rseq: Rseq, ip: u64, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
    let word = |address: u64| {
        let mut bytes = [0; 8];
        read(address, &mut bytes).then(|| u64::from_ne_bytes(bytes))
    };
    if rseq.area == 0 {
        return None;
    }
    let section = word(rseq.area.checked_add(SECTION_AT)?).filter(|section| *section != 0)?;
    // struct rseq_cs: version and flags, start, length, abort handler.
    let (start, length) = (word(section.checked_add(8)?)?, word(section.checked_add(16)?)?);
    let abort = word(section.checked_add(24)?)?;
    (ip.wrapping_sub(start) < length).then_some(abort)
}

pub fn restore(entry: &RseqEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("register the rseq area");
    let args = [
        entry.rseq_abi_pointer.into(),
        u64::from(entry.rseq_abi_size).into(),
        super::ZERO,
        u64::from(entry.signature).into(),
    ];
    ops.list.ok(libc::SYS_rseq, &args);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inside_a_section_means_its_abort_handler() {
        // Area at 0x100, section at 0x200: starts at 0x1000, 0x20 long, aborts to 0x5000.
        let read = |address: u64, bytes: &mut [u8]| {
            let value: u64 = match address {
                0x108 => 0x200,
                0x208 => 0x1000,
                0x210 => 0x20,
                0x218 => 0x5000,
                _ => return false,
            };
            bytes.copy_from_slice(&value.to_ne_bytes());
            true
        };
        let rseq = Rseq { area: 0x100, size: 32, signature: 1, flags: 0 };
        assert_eq!(abort_address(rseq, 0x1010, read), Some(0x5000));
        assert_eq!(abort_address(rseq, 0x1020, read), None);
        assert_eq!(abort_address(Rseq::default(), 0x1010, read), None);
    }
}
