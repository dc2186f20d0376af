//! Brings a new ring to where the old one was: the kernel's counters, which only requests and completions move, and the
//! content of the rings.

use super::{IoUringEntry, buffers, layout, pages};
use model::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use sys::memory::SharedMap;
use sys::uring::{self, Params, Request, ring, setup};

/// A new ring on its way to where one was.
pub struct Rings<'r> {
    pub fd: &'r OwnedFd,
    entry: &'r IoUringEntry,
    rings: SharedMap,
    requests: SharedMap,
    /// Requests taken, and completions told.
    taken: u32,
    told: u32,
}

impl<'r> Rings<'r> {
    pub fn map(fd: &'r OwnedFd, entry: &'r IoUringEntry, (taken, told): (u32, u32)) -> Result<Rings<'r>, Errno> {
        let map = |offset: u64, len: usize| SharedMap::new(fd, offset, pages(len));
        let (rings, requests) = (map(uring::RINGS_AT, entry.rings.len())?, map(uring::SQES_AT, entry.requests.len())?);
        let (_, _, array) = layout(entry.setup, entry.sq_entries, entry.cq_entries);
        if entry.setup & setup::NO_SQARRAY == 0 {
            let indices: Vec<u8> = (0..entry.sq_entries).flat_map(u32::to_ne_bytes).collect();
            rings.write(array, &indices);
        }
        // None that are not taken, none that are not seen; and requests that do nothing.
        for (at, value) in [(ring::SQ_TAIL, taken), (ring::CQ_HEAD, told)] {
            rings.word(at).store(value, Ordering::SeqCst);
        }
        requests.write(0, &vec![0; entry.requests.len()]);
        Ok(Rings { fd, entry, rings, requests, taken, told })
    }

    /// Tells a registered eventfd nothing, until it is filled.
    pub fn be_quiet(&self) {
        const EVENTFD_DISABLED: u32 = 1;
        self.rings.word(ring::CQ_FLAGS).store(EVENTFD_DISABLED, Ordering::SeqCst);
    }

    /// Provides the buffers that need no task.
    pub fn provide(&mut self) -> Result<(), Errno> {
        buffers::provide(self, &self.entry.groups)
    }

    /// Has those taken that need the task.
    pub fn go_on(&mut self, pid: i32) -> Result<(), Errno> {
        buffers::go_on(self, &self.entry.groups, pid)
    }

    /// Takes as many requests and tells as many completions.
    pub fn wind(&mut self, (taken, told): (u32, u32)) -> Result<(), Errno> {
        let more = told.wrapping_sub(self.told).wrapping_sub(taken.wrapping_sub(self.taken)).cast_signed();
        let both = if more < 0 { taken.wrapping_sub(more.unsigned_abs()) } else { taken };
        while self.taken != both {
            let some = self.entry.sq_entries.min(both.wrapping_sub(self.taken));
            self.submit(some, some)?;
        }
        match more {
            0 => Ok(()),
            1.. => self.be_told(more.unsigned_abs()),
            _ => self.be_silent(more.unsigned_abs()),
        }
    }

    /// Has the kernel take the next requests, and is told of so many completions.
    fn submit(&mut self, count: u32, ends: u32) -> Result<(), Errno> {
        let until = self.taken.wrapping_add(count);
        self.rings.word(ring::SQ_TAIL).store(until, Ordering::Release);
        while self.taken != until {
            let left = until.wrapping_sub(self.taken);
            let taken = uring::submit(self.fd, left)?;
            if self.entry.sq_thread.is_some() {
                // Only woken.
                while self.rings.word(ring::SQ_HEAD).load(Ordering::Acquire) != until {
                    std::thread::yield_now();
                    uring::submit(self.fd, 0)?;
                }
                self.taken = until;
            } else if (1..=left).contains(&taken) {
                // After one that it refuses the kernel takes no more at a time.
                self.taken = self.taken.wrapping_add(taken);
            } else {
                return Err(Errno { call: "io_uring_enter", code: libc::EIO });
            }
        }
        self.see(ends)
    }

    /// Sees the next completions, which have to be there.
    fn see(&mut self, ends: u32) -> Result<(), Errno> {
        self.told = self.told.wrapping_add(ends);
        if self.rings.word(ring::CQ_TAIL).load(Ordering::Acquire) != self.told {
            return Err(Errno { call: "io_uring_enter", code: libc::EIO });
        }
        self.rings.word(ring::CQ_HEAD).store(self.told, Ordering::Release);
        Ok(())
    }

    /// Has the kernel take one request; what it is answered.
    pub fn ask(&mut self, request: &Request) -> Result<i32, Errno> {
        let large = |flag: u32| usize::from(self.entry.setup & flag != 0);
        let slot = ((self.taken & (self.entry.sq_entries - 1)) as usize * 64) << large(setup::SQE128);
        let answer = ((self.told & (self.entry.cq_entries - 1)) as usize * 16) << large(setup::CQE32);
        self.requests.write(slot, &request.bytes());
        self.submit(1, 1)?;
        self.requests.write(slot, &[0; 64]);
        Ok(self.rings.word(ring::CQES + answer + 8).load(Ordering::Acquire) as i32)
    }

    /// Takes requests that end without a completion.
    fn be_silent(&mut self, count: u32) -> Result<(), Errno> {
        const CQE_SKIP_SUCCESS: u8 = 1 << 6;
        let silent = Request { flags: CQE_SKIP_SUCCESS, ..Request::default() }.bytes();
        let size = self.entry.requests.len() / self.entry.sq_entries as usize;
        for slot in 0..self.entry.sq_entries as usize {
            self.requests.write(slot * size, &silent);
        }
        let mut left = count;
        while left != 0 {
            let some = self.entry.sq_entries.min(left);
            self.submit(some, 0)?;
            left -= some;
        }
        Ok(())
    }

    /// Gets completions from another ring, for which there was no request in this one.
    fn be_told(&mut self, count: u32) -> Result<(), Errno> {
        const MSG_RING: u8 = 40;
        let (rings, requests, _) = layout(0, 1, 2);
        let (rings, requests) = (vec![0; rings], vec![0; requests]);
        let entry = IoUringEntry { sq_entries: 1, cq_entries: 2, rings, requests, ..IoUringEntry::default() };
        let fd = uring::new(&mut Params { sq_entries: 1, ..Params::default() })?;
        let mut other = Rings::map(&fd, &entry, (0, 0))?;
        for _ in 0..count {
            let result = other.ask(&Request { operation: MSG_RING, fd: self.fd.as_raw_fd(), ..Request::default() })?;
            if result < 0 {
                return Err(Errno { call: "IORING_OP_MSG_RING", code: -result });
            }
            self.see(1)?;
        }
        Ok(())
    }

    /// The kernel's own counters are there; the content, and the counters of the program, follow: the tail last, from
    /// where a thread of the kernel may take what is in the queue.
    pub fn fill(&self) {
        let (rings, entry) = (&self.rings, self.entry);
        let kept = ring::CQES.min(entry.rings.len());
        rings.write(kept, &entry.rings[kept..]);
        self.requests.write(0, &entry.requests);
        for at in [ring::SQ_DROPPED, ring::CQ_FLAGS, ring::CQ_OVERFLOW, ring::CQ_HEAD] {
            rings.write(at, &entry.rings[at..at + 4]);
        }
        let tail = u32::from_ne_bytes(entry.rings[ring::SQ_TAIL..][..4].try_into().expect("four bytes"));
        rings.word(ring::SQ_TAIL).store(tail, Ordering::Release);
    }
}
