//! io_setup(2) and its relatives.

use std::os::fd::{AsRawFd, BorrowedFd};

use super::call::check;

/// A context: the address of its ring.
#[derive(Debug, Clone, Copy)]
pub struct Context(pub u64);

/// A completion: what was sent along, and the result.
pub type Done = (u64, i64);

impl Context {
    #[track_caller]
    pub fn new(events: u32) -> Self {
        let mut context = 0_u64;
        // SAFETY: the kernel writes one word into a live local.
        check("io_setup", unsafe { libc::syscall(libc::SYS_io_setup, events, &raw mut context) });
        Self(context)
    }

    /// Writes to a file; the completion carries `data`.
    #[track_caller]
    pub fn write(self, fd: BorrowedFd, bytes: &'static [u8], offset: u64, data: u64) {
        const IOCB_CMD_PWRITE: u64 = 1;
        self.submit(IOCB_CMD_PWRITE, fd, [bytes.as_ptr() as u64, bytes.len() as u64, offset], data);
    }

    /// Ends when a file can be read.
    #[track_caller]
    pub fn poll(self, fd: BorrowedFd, data: u64) {
        const IOCB_CMD_POLL: u64 = 5;
        self.submit(IOCB_CMD_POLL, fd, [libc::POLLIN as u64, 0, 0], data);
    }

    #[track_caller]
    fn submit(self, operation: u64, fd: BorrowedFd, [buffer, length, offset]: [u64; 3], data: u64) {
        // struct iocb: data, key and flags, opcode and priority and descriptor, buffer, length, offset, two more.
        let number = (fd.as_raw_fd() as u64) << 32;
        let block = [data, 0, operation | number, buffer, length, offset, 0, 0];
        let list = [block.as_ptr()];
        // SAFETY: the kernel reads a list of one block, both live locals, and bytes that live for ever.
        let sent = unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) };
        assert_eq!(check("io_submit", sent), 1);
    }

    /// The next completion; waits for it, or gives none when there is none.
    #[track_caller]
    pub fn next(self, waits: bool) -> Option<Done> {
        // struct io_event: data, block, two results.
        let mut event = [0_u64; 4];
        let none = std::ptr::null::<libc::timespec>();
        let at_once = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let limit = if waits { none } else { &raw const at_once };
        let least = i64::from(waits);
        // SAFETY: the kernel writes at most one event into a live local.
        let got =
            unsafe { libc::syscall(libc::SYS_io_getevents, self.0, least, 1, event.as_mut_ptr(), limit) };
        (check("io_getevents", got) == 1).then(|| (event[0], event[2].cast_signed()))
    }
}
