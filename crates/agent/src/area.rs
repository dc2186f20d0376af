//! The memory that a coordinator shares with agents: slots, lists, and the bytes that calls read and
//! write.
//!
//! A word in each slot says whose turn it is. It holds the coordinator's thread id, and the slots are on
//! that thread's list of robust futexes: when the coordinator dies, in whatever way, the kernel marks
//! every word and wakes the agent, which then finds its own way.

use crate::list::{Failed, List, OP_SIZE, slot};
use model::Errno;
use std::cell::Cell;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use sys::memory::SharedMap;

pub(crate) const FUTEX_WAITERS: u32 = 1 << 31;
/// How long to sleep before looking whether the other side still lives.
const LOOK_NS: u64 = 50_000_000;
/// How often to look at a word before sleeping: most lists are done within a few microseconds.
const SPINS: u32 = 400;

/// Shared memory, handed out from the start to the end; nothing is given back singly.
#[derive(Debug)]
pub struct Area {
    watch: Rc<Watch>,
    map: Arc<SharedMap>,
    /// Where it begins in the other process.
    remote: u64,
    top: Cell<usize>,
    idle: u32,
}

/// A place in the area through which one agent gets its lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    at: usize,
    address: u64,
}

impl Slot {
    /// As the agent sees it.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Where it is in the area.
    pub(crate) fn at(self) -> usize {
        self.at
    }
}

/// A list that an agent is executing.
#[derive(Debug)]
pub struct Run {
    slot: Slot,
    list: List,
    at: usize,
}

impl Area {
    /// Shares `len` bytes of `file`, which the other process has, or will have, at `remote`.
    ///
    /// The calling thread is the coordinator: the words carry its id, and `watch` is its own.
    pub fn new(file: impl AsFd, len: usize, remote: u64, watch: Rc<Watch>) -> Result<Area, Errno> {
        let map = Arc::new(SharedMap::new(file, 0, len)?);
        let idle = sys::process::own_tid() as u32 | FUTEX_WAITERS;
        Ok(Area { map, remote, top: Cell::new(0), idle, watch })
    }

    pub fn remote(&self) -> u64 {
        self.remote
    }

    /// The memory itself, which lives on when this does not.
    pub(crate) fn map(&self) -> Arc<SharedMap> {
        self.map.clone()
    }

    pub fn len(&self) -> usize {
        self.map.len()
    }

    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// How much is handed out; [`Area::rewind`] takes it.
    pub fn mark(&self) -> usize {
        self.top.get()
    }

    /// Hands out from `mark` on again, or only from there. No agent may use it any more, nor another area of the same watch,
    /// which ends.
    pub fn rewind(&self, mark: usize) {
        self.watch.forget();
        self.top.set(mark);
    }

    fn take(&self, len: usize, align: usize) -> Result<usize, Errno> {
        let at = self.top.get().next_multiple_of(align);
        let end = at.checked_add(len).filter(|end| *end <= self.map.len());
        let end = end.ok_or(Errno { call: "shared area", code: libc::ENOMEM })?;
        self.top.set(end);
        Ok(at)
    }

    /// `len` bytes for a call to write to, and their address there. They are zero unless used before.
    pub fn room(&self, len: usize) -> Result<u64, Errno> {
        self.take(len, 8).map(|at| self.remote + at as u64)
    }

    /// Room at an address there that is a multiple of 64.
    pub fn aligned_room(&self, len: usize) -> Result<u64, Errno> {
        self.take(len, 64).map(|at| self.remote + at as u64)
    }

    /// Puts bytes in the area for calls to read; returns their address there.
    pub fn put(&self, bytes: &[u8]) -> Result<u64, Errno> {
        let at = self.take(bytes.len(), 8)?;
        self.map.write(at, bytes);
        Ok(self.remote + at as u64)
    }

    /// Overwrites bytes at an address there.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.map.write((address - self.remote) as usize, bytes);
    }

    /// The bytes at an address there.
    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read((address - self.remote) as usize, &mut bytes);
        bytes
    }

    /// The eight bytes at an address there, as a number.
    pub fn word(&self, address: u64) -> u64 {
        u64::from_ne_bytes(self.get(address, 8).try_into().expect("eight bytes"))
    }

    /// A slot for an agent; `frame` is its way back, see [`crate::arch::signal_frame`], or zero.
    pub fn slot(&self, frame: u64) -> Result<Slot, Errno> {
        let at = self.take(slot::SIZE, 64)?;
        self.map.write(at, &[0; slot::SIZE]);
        self.map.write(at + slot::FRAME, &frame.to_ne_bytes());
        self.map.write(at + slot::IDLE, &self.idle.to_ne_bytes());
        self.map.word(at + slot::TURN).store(self.idle, Ordering::Release);
        self.watch.add(&self.map, at);
        Ok(Slot { at, address: self.remote + at as u64 })
    }

    /// Hands a list to the agent at `slot`, which must be idle.
    pub fn start(&self, slot: Slot, list: List) -> Result<Run, Errno> {
        let bytes = list.bytes();
        let at = self.take(bytes.len(), 8)?;
        self.map.write(at, &bytes);
        let address = self.remote + at as u64;
        self.map.write(slot.at + slot::LIST, &address.to_ne_bytes());
        self.map.write(slot.at + slot::END, &(address + bytes.len() as u64).to_ne_bytes());
        let turn = self.map.word(slot.at + slot::TURN);
        turn.store(self.idle & !FUTEX_WAITERS, Ordering::Release);
        sys::memory::futex_wake(turn);
        Ok(Run { slot, list, at })
    }

    /// Is the list done, or stopped?
    pub fn is_done(&self, run: &Run) -> bool {
        self.map.word(run.slot.at + slot::TURN).load(Ordering::Acquire) == self.idle
    }

    /// Waits until the list is done; returns its operations with their results, for [`List::result`].
    ///
    /// `is_alive` is asked now and then.
    ///
    /// # Errors
    /// The operation that stopped the list; `None` when the other process is gone.
    pub fn wait(&self, run: Run, is_alive: impl Fn() -> bool) -> Result<Vec<u8>, Option<Failed>> {
        let turn = self.map.word(run.slot.at + slot::TURN);
        let mut spins = SPINS;
        loop {
            let value = turn.load(Ordering::Acquire);
            if value == self.idle {
                break;
            }
            if spins > 0 {
                spins -= 1;
                std::hint::spin_loop();
                continue;
            }
            sys::memory::futex_wait(turn, value, LOOK_NS);
            if turn.load(Ordering::Acquire) != self.idle && !is_alive() {
                return Err(None);
            }
        }
        let mut bytes = vec![0; run.list.len() * OP_SIZE];
        self.map.read(run.at, &mut bytes);
        let mut stopped = [0; 8];
        self.map.read(run.slot.at + slot::STOPPED, &mut stopped);
        match u64::from_ne_bytes(stopped) {
            0 => Ok(bytes),
            address => {
                let index = (address - self.remote - run.at as u64) as usize / OP_SIZE;
                Err(Some(run.list.failed(index, List::result(&bytes, index))))
            }
        }
    }
}

/// The coordinator thread's list of robust futexes: a ring from the head through the newest slot to the
/// oldest and back. The kernel reads at most 2048 of it. A thread has one, for all its areas.
///
/// Source: Documentation/locking/robust-futex-ABI.rst.
#[derive(Debug)]
pub struct Watch {
    /// Next node, offset from a node to its word, node being changed.
    head: Box<[AtomicU64; 3]>,
    /// What the C library had registered.
    before: u64,
}

impl Drop for Area {
    fn drop(&mut self) {
        // Its slots go with it.
        self.watch.forget();
    }
}

impl Watch {
    /// Becomes the list of the calling thread, in place of the C library's, until it is dropped.
    pub fn new() -> Result<Watch, Errno> {
        let before = sys::process::robust_list(0)?.0;
        let offset = slot::TURN as i64 - slot::NODE as i64;
        let head = Box::new([AtomicU64::new(0), AtomicU64::new(offset as u64), AtomicU64::new(0)]);
        let watch = Watch { head, before };
        watch.forget();
        // SAFETY: the head is on the heap and outlives its registration, which drop ends; its nodes are in
        // mappings of areas, and an area that goes empties the list.
        unsafe { sys::memory::set_robust_list(watch.address()) }?;
        Ok(watch)
    }

    fn address(&self) -> u64 {
        self.head.as_ptr() as u64
    }

    fn add(&self, map: &SharedMap, slot_at: usize) {
        let node = map.address(slot_at + slot::NODE);
        map.write(slot_at + slot::NODE, &self.head[0].load(Ordering::Relaxed).to_ne_bytes());
        self.head[0].store(node, Ordering::Release);
    }

    /// Watches none of the slots any more.
    pub fn forget(&self) {
        self.head[0].store(self.address(), Ordering::Release);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.forget();
        // SAFETY: what was registered before, which the C library keeps as long as the thread lives.
        if let Err(error) = unsafe { sys::memory::set_robust_list(self.before) } {
            log::warn!("the list of robust futexes could not be put back: {error}");
        }
    }
}

/// The words are shared with machine code that knows them by these sizes.
const _: () = assert!(size_of::<AtomicU32>() == 4 && slot::NODE + 8 <= slot::SIZE);
