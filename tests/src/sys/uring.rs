//! An io_uring, used as its library does: with counters of the program's own.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::call::check;
use super::memory::{Map, PAGE};

pub const IOPOLL: u32 = 1;
pub const SQPOLL: u32 = 1 << 1;
pub const SQ_AFF: u32 = 1 << 2;
pub const ATTACH_WQ: u32 = 1 << 5;
pub const R_DISABLED: u32 = 1 << 6;
pub const SUBMIT_ALL: u32 = 1 << 7;
pub const COOP_TASKRUN: u32 = 1 << 8;
pub const SQE128: u32 = 1 << 10;
pub const CQE32: u32 = 1 << 11;
pub const SINGLE_ISSUER: u32 = 1 << 12;
pub const DEFER_TASKRUN: u32 = 1 << 13;
pub const NO_SQARRAY: u32 = 1 << 16;

/// A flag: the descriptor is the index of a registered file.
const FIXED_FILE: u8 = 1;

const NOP: u8 = 0;
const READ_FIXED: u8 = 4;
const WRITE_FIXED: u8 = 5;
const TIMEOUT: u8 = 11;
const READ: u8 = 22;
const WRITE: u8 = 23;
const RECV: u8 = 27;
const PROVIDE_BUFFERS: u8 = 31;

/// A flag: a buffer is taken from a group.
const BUFFER_SELECT: u8 = 1 << 5;

/// A request: operation, flags, descriptor, address, length, what comes back with the completion.
#[derive(Debug, Clone, Copy, Default)]
pub struct Request {
    operation: u8,
    flags: u8,
    fd: i32,
    address: u64,
    length: u32,
    data: u64,
    /// Where in the file; the number of the first buffer.
    offset: u64,
    /// The group of buffers to take one from, or to give some to.
    group: u16,
    /// Whose rights it has, if not those of whoever asks.
    personality: u16,
    /// Flags of the operation, events.
    more: u32,
    /// Flags of some operations, in the place of a priority.
    priority: u16,
}

impl Request {
    pub fn nop(data: u64) -> Self {
        Self { operation: NOP, fd: -1, data, ..Self::default() }
    }

    /// Of an operation that there is not.
    pub fn wrong(data: u64) -> Self {
        Self { operation: 0xee, ..Self::nop(data) }
    }

    pub fn write(fd: BorrowedFd, bytes: &'static [u8], data: u64) -> Self {
        let (address, length) = (bytes.as_ptr() as u64, bytes.len() as u32);
        Self { operation: WRITE, fd: fd.as_raw_fd(), address, length, offset: u64::MAX, ..Self::nop(data) }
    }

    pub fn read(fd: BorrowedFd, bytes: &'static mut [u8], data: u64) -> Self {
        let (address, length) = (bytes.as_mut_ptr() as u64, bytes.len() as u32);
        Self { operation: READ, fd: fd.as_raw_fd(), address, length, offset: u64::MAX, ..Self::nop(data) }
    }

    /// Opens a file for reading, with the rights of this number.
    pub fn open(path: &'static std::ffi::CStr, personality: u16, data: u64) -> Self {
        const OPENAT: u8 = 18;
        let address = path.as_ptr() as u64;
        Self { operation: OPENAT, fd: libc::AT_FDCWD, address, personality, ..Self::nop(data) }
    }

    /// Into or out of this memory of the program, which stays.
    pub fn with(self, memory: &Map, at: usize, length: u32) -> Self {
        Self { address: (memory.address + at) as u64, length, ..self }
    }

    /// Tells of it only if it fails.
    pub fn make_silent(&mut self) {
        const CQE_SKIP_SUCCESS: u8 = 1 << 6;
        self.flags |= CQE_SKIP_SUCCESS;
    }

    /// Tells each time that there is something to read.
    pub fn watch(fd: BorrowedFd, data: u64) -> Self {
        const POLL_ADD: u8 = 6;
        const MULTI: u32 = 1;
        let fd = fd.as_raw_fd();
        Self { operation: POLL_ADD, fd, length: MULTI, more: libc::POLLIN as u32, ..Self::nop(data) }
    }

    /// Tells once that there is something to read.
    pub fn poll(fd: BorrowedFd, data: u64) -> Self {
        Self { length: 0, ..Self::watch(fd, data) }
    }

    /// The file is the registered one of this index.
    pub fn of_registered(self, index: i32) -> Self {
        Self { fd: index, flags: self.flags | FIXED_FILE, ..self }
    }

    /// With the rights of this number.
    pub fn as_somebody(self, personality: u16) -> Self {
        Self { personality, ..self }
    }

    /// Accepts one connection, or each that comes.
    pub fn accept(fd: BorrowedFd, is_each: bool, data: u64) -> Self {
        const ACCEPT: u8 = 13;
        const MULTISHOT: u16 = 1;
        let priority = if is_each { MULTISHOT } else { 0 };
        let more = libc::SOCK_CLOEXEC as u32;
        Self { operation: ACCEPT, fd: fd.as_raw_fd(), priority, more, ..Self::nop(data) }
    }

    pub fn send(fd: BorrowedFd, data: u64) -> Self {
        const SEND: u8 = 26;
        Self { operation: SEND, fd: fd.as_raw_fd(), ..Self::nop(data) }
    }

    pub fn receive(fd: BorrowedFd, data: u64) -> Self {
        Self { operation: RECV, fd: fd.as_raw_fd(), ..Self::nop(data) }
    }

    /// Receives all that comes, into buffers of a group.
    pub fn receive_each(fd: i32, group: u16, data: u64) -> Self {
        const MULTISHOT: u16 = 2;
        let (flags, priority) = (BUFFER_SELECT, MULTISHOT);
        Self { operation: RECV, fd, flags, priority, group, ..Self::nop(data) }
    }

    /// Reads all that comes, into buffers of a group.
    pub fn read_each(fd: BorrowedFd, group: u16, data: u64) -> Self {
        const READ_MULTISHOT: u8 = 49;
        let (fd, flags) = (fd.as_raw_fd(), BUFFER_SELECT);
        Self { operation: READ_MULTISHOT, fd, flags, group, offset: u64::MAX, ..Self::nop(data) }
    }

    /// Reads into the pieces that the caller lists.
    pub fn read_pieces(fd: BorrowedFd, pieces: &'static [libc::iovec], data: u64) -> Self {
        const READV: u8 = 1;
        let (address, length) = (pieces.as_ptr() as u64, pieces.len() as u32);
        let fd = fd.as_raw_fd();
        Self { operation: READV, fd, address, length, offset: u64::MAX, ..Self::nop(data) }
    }

    /// Ends the watch with this data.
    pub fn watch_no_more(watch: u64, data: u64) -> Self {
        const POLL_REMOVE: u8 = 7;
        Self { operation: POLL_REMOVE, address: watch, ..Self::nop(data) }
    }

    /// Tells each time that so much time has passed.
    pub fn tick(every: &'static [i64; 2], data: u64) -> Self {
        const MULTISHOT: u32 = 1 << 6;
        Self { offset: 0, more: MULTISHOT, ..Self::timeout(every, data) }
    }

    /// Has a thread of the kernel do it.
    pub fn make_async(&mut self) {
        const ASYNC: u8 = 1 << 4;
        self.flags |= ASYNC;
    }

    /// Of a file, from its position, into a buffer of a group.
    pub fn read_some(fd: BorrowedFd, length: u32, group: u16) -> Self {
        let fd = fd.as_raw_fd();
        Self { operation: READ, flags: BUFFER_SELECT, fd, length, offset: u64::MAX, group, ..Self::nop(0) }
    }

    /// Gives so many buffers of 16 bytes, one behind the other, to a group; their numbers begin with `first`.
    pub fn provide(address: u64, count: i32, first: u16, group: u16) -> Self {
        let operation = PROVIDE_BUFFERS;
        Self { operation, fd: count, address, length: 16, offset: first.into(), group, ..Self::nop(0) }
    }

    /// Of registered file `index`, from its position.
    pub fn read_registered(index: i32, address: u64, length: u32, data: u64) -> Self {
        Self {
            operation: READ,
            flags: FIXED_FILE,
            fd: index,
            address,
            length,
            offset: u64::MAX,
            ..Self::nop(data)
        }
    }

    /// Ends with an error after a time: seconds and nanoseconds.
    pub fn timeout(after: &'static [i64; 2], data: u64) -> Self {
        Self { operation: TIMEOUT, address: after.as_ptr() as u64, length: 1, ..Self::nop(data) }
    }

    /// The same at a time of the monotonic clock.
    pub fn timeout_at(end: &'static [i64; 2], data: u64) -> Self {
        const ABSOLUTE: u32 = 1;
        Self { more: ABSOLUTE, ..Self::timeout(end, data) }
    }

    /// The same, or after so many completions.
    pub fn timeout_or_after(after: &'static [i64; 2], completions: u64, data: u64) -> Self {
        Self { offset: completions, ..Self::timeout(after, data) }
    }

    /// Ends the timeout with this data.
    pub fn timeout_no_more(timeout: u64, data: u64) -> Self {
        const TIMEOUT_REMOVE: u8 = 12;
        Self { operation: TIMEOUT_REMOVE, address: timeout, ..Self::nop(data) }
    }

    /// Of registered file `index`, from or to registered buffer 0 at `address`.
    pub fn fixed(is_write: bool, index: i32, address: u64, length: u32, data: u64) -> Self {
        let operation = if is_write { WRITE_FIXED } else { READ_FIXED };
        Self { operation, flags: FIXED_FILE, fd: index, address, length, offset: u64::MAX, ..Self::nop(data) }
    }
}

/// What the kernel has opened for the program, as a completion tells.
pub fn opened(number: i32) -> OwnedFd {
    assert!(number >= 0, "{}", std::io::Error::from_raw_os_error(-number));
    // SAFETY: the kernel has just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[derive(Debug)]
pub struct Ring {
    pub fd: OwnedFd,
    flags: u32,
    entries: u32,
    rings: *mut u8,
    requests: *mut u8,
    sq_tail: u32,
    cq_head: u32,
    array: usize,
    cqes: usize,
    masks: (u32, u32),
}

// SAFETY: the mappings belong to no thread; what the program counts is behind a mutable reference.
unsafe impl Send for Ring {}
// SAFETY: as for Send; words that others change are atomics.
unsafe impl Sync for Ring {}

/// How the kernel's thread of a ring is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Poller {
    /// How long it looks for requests before it sleeps, in milliseconds.
    pub idle: u32,
    pub cpu: Option<u32>,
    /// That of this ring.
    pub of: Option<i32>,
}

impl Ring {
    #[track_caller]
    pub fn new(entries: u32, flags: u32) -> Self {
        Self::made(entries, flags, Poller::default())
    }

    /// One with a thread of the kernel.
    #[track_caller]
    pub fn polled(entries: u32, poller: Poller) -> Self {
        let bound = poller.cpu.map_or(0, |_| SQ_AFF);
        Self::made(entries, SQPOLL | bound | poller.of.map_or(0, |_| ATTACH_WQ), poller)
    }

    /// One whose requests its thread does not take yet.
    #[track_caller]
    pub fn polled_but_disabled(entries: u32, poller: Poller) -> Self {
        Self::made(entries, SQPOLL | R_DISABLED, poller)
    }

    #[track_caller]
    fn made(entries: u32, flags: u32, poller: Poller) -> Self {
        let mut params = [0_u32; 30];
        params[2] = flags;
        params[3] = poller.cpu.unwrap_or(0);
        params[4] = poller.idle;
        params[6] = poller.of.map_or(0, i32::cast_unsigned);
        // SAFETY: the kernel reads and writes 120 bytes of a live local during the call.
        let fd = check("io_uring_setup", unsafe {
            libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut params)
        });
        // SAFETY: the kernel has just made this descriptor for the caller.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) };
        let (sq, cq) = (params[0] as usize, params[1] as usize);
        let (array, cqes) = (params[16] as usize, params[25] as usize);
        let end = (cqes + ((cq * 16) << u32::from(flags & CQE32 != 0))).max(array + sq * 4);
        let map = |offset: i64, len: usize| {
            let (prot, how) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            // SAFETY: a new mapping at an address of the kernel's choice; it stays for the life of the program.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, how, fd.as_raw_fd(), offset) };
            assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
            at.cast::<u8>()
        };
        let rings = map(0, end);
        let requests = map(0x1000_0000, (sq * 64) << u32::from(flags & SQE128 != 0));
        let masks = (params[0] - 1, params[1] - 1);
        let (sq_tail, cq_head) = (0, 0);
        Self { fd, flags, entries: params[0], rings, requests, sq_tail, cq_head, array, cqes, masks }
    }

    /// Leaves the mappings out of children, as the library does when it is asked to.
    #[track_caller]
    pub fn keep_from_children(&self) {
        for at in [self.rings, self.requests] {
            // SAFETY: advice for one page of a mapping of our own.
            check("madvise", unsafe { libc::madvise(at.cast(), 4096, libc::MADV_DONTFORK) });
        }
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: inside the mapping, aligned, and shared with the kernel as an atomic.
        unsafe { AtomicU32::from_ptr(self.rings.add(at).cast()) }
    }

    /// Puts a request into the ring, and tells nobody.
    pub fn push(&mut self, request: Request) {
        assert!(self.sq_tail.wrapping_sub(self.word(0).load(Ordering::Acquire)) < self.entries, "it is full");
        let index = self.sq_tail & self.masks.0;
        let size = 64_usize << u32::from(self.flags & SQE128 != 0);
        let mut words = [0_u64; 8];
        words[0] = u64::from(request.operation)
            | u64::from(request.flags) << 8
            | u64::from(request.priority) << 16
            | u64::from(request.fd.cast_unsigned()) << 32;
        words[1] = request.offset;
        words[2] = request.address;
        words[3] = u64::from(request.length) | u64::from(request.more) << 32;
        words[4] = request.data;
        words[5] = u64::from(request.group) | u64::from(request.personality) << 16;
        // SAFETY: the entry is inside the mapping and belongs to the program until the tail passes it.
        unsafe { self.requests.add(index as usize * size).cast::<[u64; 8]>().write(words) };
        if size > 64 {
            // SAFETY: as above.
            unsafe { self.requests.add(index as usize * size + 64).cast::<u64>().write(request.data) };
        }
        if self.flags & NO_SQARRAY == 0 {
            self.word(self.array + index as usize * 4).store(index, Ordering::Relaxed);
        }
        self.sq_tail = self.sq_tail.wrapping_add(1);
    }

    /// Puts all requests where the kernel's thread finds them, once it looks.
    pub fn tell(&self) {
        self.word(4).store(self.sq_tail, Ordering::SeqCst);
    }

    /// Does the kernel's thread sleep until it is woken?
    pub fn is_asleep(&self) -> bool {
        self.word(36).load(Ordering::SeqCst) & 1 != 0
    }

    /// Hands all requests to the kernel's thread, wakes it if it asks for that, and waits for as many completions.
    #[track_caller]
    pub fn hand_over(&self, wait: u32) {
        const GETEVENTS: u32 = 1;
        const WAKE: u32 = 1 << 1;
        self.tell();
        let flags = GETEVENTS | if self.is_asleep() { WAKE } else { 0 };
        let fd = self.fd.as_raw_fd();
        // SAFETY: integers and a null pointer; memory that requests name lives for ever.
        let done =
            unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, 0, wait, flags, std::ptr::null::<u8>(), 0) };
        check("io_uring_enter", done);
    }

    /// Registers the rights of the calling thread; returns their number.
    #[track_caller]
    pub fn register_personality(&self) -> u16 {
        const PERSONALITY: u32 = 9;
        u16::try_from(self.register::<u8>(PERSONALITY, &[])).expect("a number")
    }

    #[track_caller]
    pub fn forget_personality(&self, number: u16) {
        const FORGET: u32 = 10;
        let (fd, nothing) = (self.fd.as_raw_fd(), std::ptr::null::<u8>());
        // SAFETY: integers and a null pointer.
        check("io_uring_register", unsafe {
            libc::syscall(libc::SYS_io_uring_register, fd, FORGET, nothing, u32::from(number))
        });
    }

    /// Tells the kernel of all requests; waits for as many completions.
    #[track_caller]
    pub fn submit(&self, wait: u32) -> u32 {
        check("io_uring_enter", self.enter(self.fd.as_raw_fd(), wait, 0)) as u32
    }

    /// The same by what the thread has registered as `index`.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn submit_registered(&self, index: i32, wait: u32) -> std::io::Result<u32> {
        const REGISTERED_RING: u32 = 1 << 4;
        let done = self.enter(index, wait, REGISTERED_RING);
        u32::try_from(done).map_err(|_| std::io::Error::last_os_error())
    }

    /// The same.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn try_submit(&self) -> std::io::Result<u32> {
        let done = self.enter(self.fd.as_raw_fd(), 0, 0);
        u32::try_from(done).map_err(|_| std::io::Error::last_os_error())
    }

    fn enter(&self, fd: i32, wait: u32, flags: u32) -> i64 {
        const GETEVENTS: u32 = 1;
        self.word(4).store(self.sq_tail, Ordering::Release);
        let count = self.sq_tail.wrapping_sub(self.word(0).load(Ordering::Acquire));
        let flags = GETEVENTS | flags;
        // SAFETY: integers and a null pointer; memory that requests name lives for ever.
        unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, count, wait, flags, std::ptr::null::<u8>(), 0) }
    }

    /// The next completion: what came along, and the result.
    pub fn reap(&mut self) -> Option<(u64, i32)> {
        self.reap_with_buffer().map(|(data, result, _)| (data, result))
    }

    /// The same, with the number of the buffer that was taken.
    pub fn reap_with_buffer(&mut self) -> Option<(u64, i32, Option<u16>)> {
        if self.cq_head == self.word(12).load(Ordering::Acquire) {
            return None;
        }
        let size = 16_usize << u32::from(self.flags & CQE32 != 0);
        let at = self.cqes + (self.cq_head & self.masks.1) as usize * size;
        // SAFETY: inside the mapping, and the kernel has left it to the program.
        let [data, end] = unsafe { self.rings.add(at).cast::<[u64; 2]>().read() };
        let (result, flags) = (end as i32, (end >> 32) as u32);
        self.cq_head = self.cq_head.wrapping_add(1);
        self.word(8).store(self.cq_head, Ordering::Release);
        Some((data, result, (flags & 1 != 0).then_some((flags >> 16) as u16)))
    }

    /// Records of the operation; none is a null pointer.
    #[track_caller]
    pub fn register<T>(&self, operation: u32, argument: &[T]) -> i64 {
        self.try_register(operation, argument).expect("io_uring_register")
    }

    /// The same.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn try_register<T>(&self, operation: u32, argument: &[T]) -> std::io::Result<i64> {
        let (fd, count) = (self.fd.as_raw_fd(), argument.len());
        let argument = if count == 0 { std::ptr::null() } else { argument.as_ptr() };
        // SAFETY: the kernel reads as many records as there are; the caller's are those of the operation.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_register, fd, operation, argument, count) };
        if done < 0 { Err(std::io::Error::last_os_error()) } else { Ok(done) }
    }
}

/// A ring of buffers that a program provides: 16 bytes for each.
#[derive(Debug)]
pub struct Buffers {
    memory: Map,
    group: u16,
    entries: u32,
}

impl Buffers {
    /// Registers memory of the program, or of the kernel.
    #[track_caller]
    pub fn register(ring: &Ring, group: u16, entries: u32, is_of_kernel: bool, is_incremental: bool) -> Self {
        const REGISTER: u32 = 22;
        const OF_GROUPS: i64 = 0x8000_0000;
        let flags = u64::from(is_of_kernel) | u64::from(is_incremental) << 1;
        // struct io_uring_buf_reg: address, entries, group and flags; reserved.
        let numbers = u64::from(entries) | u64::from(group) << 32 | flags << 48;
        let length = PAGE;
        let memory = if is_of_kernel {
            ring.register(REGISTER, &[[0, numbers, 0, 0, 0]]);
            let (protection, offset) =
                (libc::PROT_READ | libc::PROT_WRITE, OF_GROUPS | i64::from(group) << 16);
            Map::file(ring.fd.as_fd(), length, protection, libc::MAP_SHARED | libc::MAP_POPULATE, offset)
        } else {
            let memory = Map::private(length);
            ring.register(REGISTER, &[[memory.address as u64, numbers, 0, 0, 0]]);
            memory
        };
        Self { memory, group, entries }
    }

    pub fn group(&self) -> u16 {
        self.group
    }

    /// Hands one to the kernel.
    pub fn add(&self, address: u64, number: u16) {
        let tail = self.memory.cell(12).load(Ordering::Acquire) >> 16;
        let at = (tail & (self.entries - 1)) as usize * 16;
        for (offset, value) in [(0, address as u32), (4, (address >> 32) as u32), (8, 16)] {
            self.memory.cell(at + offset).store(value, Ordering::Relaxed);
        }
        // The upper half of the first one's is the tail.
        let kept = self.memory.cell(at + 12).load(Ordering::Relaxed) & 0xffff_0000;
        self.memory.cell(at + 12).store(kept | u32::from(number), Ordering::Relaxed);
        let number = self.memory.cell(12).load(Ordering::Relaxed) & 0xffff;
        self.memory.cell(12).store(number | (tail + 1) << 16, Ordering::Release);
    }
}
