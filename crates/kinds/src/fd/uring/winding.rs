//! Brings a new ring to where the old one was: the kernel's counters, which only requests and completions move, and the
//! content of the rings.

use super::armed::ArmedEntry;
use super::{IoUringEntry, buffers, layout, pages};
use model::Errno;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use sys::memory::SharedMap;
use sys::uring::{self, Params, Request, armed, ring, setup};

/// A new ring on its way to where one was.
pub struct Rings<'r> {
    pub fd: &'r OwnedFd,
    entry: &'r IoUringEntry,
    rings: SharedMap,
    requests: SharedMap,
    /// What the completions of requests tell that are there for this alone.
    mark: u64,
    /// Requests taken, and completions told, but those of requests that wait.
    taken: u32,
    told: u32,
    /// Completions of these, which are to come after all others.
    kept: Vec<Vec<u8>>,
    /// What the last request was answered.
    answer: i32,
}

impl<'r> Rings<'r> {
    pub fn map(fd: &'r OwnedFd, entry: &'r IoUringEntry) -> Result<Rings<'r>, Errno> {
        let map = |offset: u64, len: usize| SharedMap::new(fd, offset, pages(len));
        let (rings, requests) = (map(uring::RINGS_AT, entry.rings.len())?, map(uring::SQES_AT, entry.requests.len())?);
        let (_, _, array) = layout(entry.setup, entry.sq_entries, entry.cq_entries);
        if entry.setup & setup::NO_SQARRAY == 0 {
            let indices: Vec<u8> = (0..entry.sq_entries).flat_map(u32::to_ne_bytes).collect();
            rings.write(array, &indices);
        }
        // None that are not taken.
        let word = |at: usize| rings.word(at).load(Ordering::Acquire);
        let (taken, told) = (word(ring::SQ_HEAD), word(ring::CQ_HEAD));
        rings.word(ring::SQ_TAIL).store(taken, Ordering::SeqCst);
        let is_free = |mark: &u64| entry.armed.iter().all(|armed| armed.data() != *mark);
        let mark = (0..).find(is_free).unwrap_or_default();
        let mut ring = Rings { fd, entry, rings, requests, mark, taken, told, kept: Vec::new(), answer: 0 };
        ring.set_all(&Request::default());
        Ok(ring)
    }

    /// Have no requests been taken yet?
    pub fn is_new(&self) -> bool {
        self.taken == 0
    }

    fn slot(&self, position: u32) -> usize {
        let size = self.entry.requests.len() / self.entry.sq_entries as usize;
        (position & (self.entry.sq_entries - 1)) as usize * size
    }

    fn set(&mut self, position: u32, request: &Request) {
        self.requests.write(self.slot(position), &Request { data: self.mark, ..*request }.bytes());
    }

    fn set_all(&mut self, request: &Request) {
        self.requests.write(0, &vec![0; self.entry.requests.len()]);
        for position in 0..self.entry.sq_entries {
            self.set(position, request);
        }
    }

    /// Puts requests that wait into the queue; whoever has asked for them is to tell the kernel.
    pub fn put(&mut self, waiting: &[ArmedEntry]) {
        for (nth, armed) in (0..).zip(waiting) {
            self.requests.write(self.slot(self.taken.wrapping_add(nth)), &armed.request);
        }
        let until = self.taken.wrapping_add(waiting.len() as u32);
        self.rings.word(ring::SQ_TAIL).store(until, Ordering::Release);
    }

    /// The same, where the kernel's thread has asked for them.
    pub fn wait_again(&mut self, waiting: &[ArmedEntry]) -> Result<(), Errno> {
        self.put(waiting);
        self.taken = self.be_taken(self.taken.wrapping_add(waiting.len() as u32))?;
        let from = self.taken.wrapping_sub(waiting.len() as u32);
        (0..waiting.len() as u32).for_each(|nth| self.set(from.wrapping_add(nth), &Request::default()));
        Ok(())
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
        self.taken = self.be_taken(until)?;
        self.see(ends)
    }

    /// Until where the kernel has taken what is in the queue.
    fn be_taken(&self, until: u32) -> Result<u32, Errno> {
        let mut at = self.taken;
        while at != until {
            let left = until.wrapping_sub(at);
            let taken = uring::submit(self.fd, left)?;
            if self.entry.sq_thread.is_some() {
                // Only woken.
                std::thread::yield_now();
                at = self.rings.word(ring::SQ_HEAD).load(Ordering::Acquire);
            } else if (1..=left).contains(&taken) {
                // After one that it refuses the kernel takes no more at a time.
                at = at.wrapping_add(taken);
            } else {
                return Err(Errno { call: "io_uring_enter", code: libc::EIO });
            }
        }
        Ok(until)
    }

    /// Sees the next completions, among which as many of our own have to be there.
    fn see(&mut self, ends: u32) -> Result<(), Errno> {
        let tail = self.rings.word(ring::CQ_TAIL).load(Ordering::Acquire);
        let head = self.rings.word(ring::CQ_HEAD).load(Ordering::Acquire);
        let count = tail.wrapping_sub(head);
        // Only where requests wait there can be others.
        let first = if self.entry.armed.is_empty() { count.saturating_sub(1) } else { 0 };
        let mut own = first;
        for nth in first..count.min(self.entry.cq_entries) {
            let mut completion = vec![0; self.completion_size()];
            self.rings.read(self.completion(head.wrapping_add(nth)), &mut completion);
            let data = u64::from_ne_bytes(completion[..8].try_into().expect("eight bytes"));
            if data == self.mark {
                own += 1;
                self.answer = i32::from_ne_bytes(completion[8..12].try_into().expect("four bytes"));
            } else {
                self.kept.push(completion);
            }
        }
        self.rings.word(ring::CQ_HEAD).store(tail, Ordering::Release);
        self.told = self.told.wrapping_add(own);
        if own == ends { Ok(()) } else { Err(Errno { call: "io_uring_enter", code: libc::EIO }) }
    }

    fn completion_size(&self) -> usize {
        16 << u32::from(self.entry.setup & setup::CQE32 != 0)
    }

    fn completion(&self, position: u32) -> usize {
        ring::CQES + (position & (self.entry.cq_entries - 1)) as usize * self.completion_size()
    }

    /// Counts completions of polls among those of before that are no news: the first of each that has told already.
    pub fn settle(&mut self) -> Result<(), Errno> {
        self.see(0)?;
        for armed in self.entry.armed.iter().filter(|armed| armed.has_told == Some(true)) {
            let is_its = |completion: &Vec<u8>| completion[..8] == armed.data().to_ne_bytes();
            if let Some(at) = self.kept.iter().position(is_its) {
                self.kept.remove(at);
                self.told = self.told.wrapping_add(1);
            }
        }
        Ok(())
    }

    /// Have requests that wait ended in the meantime?
    pub fn has_news(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Has the kernel take one request; what it is answered.
    pub fn ask(&mut self, request: &Request) -> Result<i32, Errno> {
        self.set(self.taken, request);
        self.submit(1, 1)?;
        self.set(self.taken.wrapping_sub(1), &Request::default());
        Ok(self.answer)
    }

    /// Takes requests that end without a completion.
    fn be_silent(&mut self, count: u32) -> Result<(), Errno> {
        self.set_all(&Request { flags: armed::CQE_SKIP_SUCCESS, ..Request::default() });
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
        let mut other = Rings::map(&fd, &entry)?;
        for _ in 0..count {
            let (fd, offset) = (self.fd.as_raw_fd(), self.mark);
            let result = other.ask(&Request { operation: MSG_RING, fd, offset, ..Request::default() })?;
            if result < 0 {
                return Err(Errno { call: "IORING_OP_MSG_RING", code: -result });
            }
            self.see(1)?;
        }
        Ok(())
    }

    /// The kernel's own counters are there; the content, and the counters of the program, follow: the tail last, from
    /// where a thread of the kernel may take what is in the queue.
    ///
    /// # Errors
    /// `ENOSPC` when more completions have come than there is room for.
    pub fn fill(&self) -> Result<(), Errno> {
        let (rings, entry) = (&self.rings, self.entry);
        let word = |at: usize| u32::from_ne_bytes(entry.rings[at..at + 4].try_into().expect("four bytes"));
        let (_, _, array) = layout(entry.setup, entry.sq_entries, entry.cq_entries);
        rings.write(array, &entry.rings[array..]);
        self.requests.write(0, &entry.requests);
        // Those that were not seen. Others may come at any time, behind them.
        let unseen = entry.completed().wrapping_sub(word(ring::CQ_HEAD)).min(entry.cq_entries);
        if unseen as usize + self.kept.len() > entry.cq_entries as usize {
            return Err(Errno { call: "io_uring_enter", code: libc::ENOSPC });
        }
        for back in 1..=unseen {
            let at = self.completion(entry.completed().wrapping_sub(back));
            rings.write(at, &entry.rings[at..at + self.completion_size()]);
        }
        for (nth, completion) in (0..).zip(&self.kept) {
            rings.write(self.completion(entry.completed().wrapping_add(nth)), completion);
        }
        for at in [ring::SQ_DROPPED, ring::CQ_FLAGS, ring::CQ_OVERFLOW, ring::CQ_HEAD] {
            rings.word(at).store(word(at), Ordering::Release);
        }
        rings.word(ring::SQ_TAIL).store(word(ring::SQ_TAIL), Ordering::Release);
        Ok(())
    }
}
