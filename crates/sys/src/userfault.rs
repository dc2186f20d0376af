//! userfaultfd(2): new pages put into another address space, filled, in one step.

use crate::call::{check, last};
use crate::memory::SharedMap;
use model::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// For the flags of userfaultfd(2): faults of the kernel on behalf of the process are not stopped, which
/// needs no privilege. Linux 5.11.
pub const USER_MODE_ONLY: i32 = 1;

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
/// A write to a protected page makes it writable and waits for nobody. Linux 6.7.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
/// fork(2), mremap(2), madvise(2) and munmap(2) wait until they were told of.
const FEATURES_OF_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
const COPY_MODE_DONTWAKE: u64 = 1;
/// _IOWR(0xaa, 0x3f, struct uffdio_api)
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// _IOWR(0xaa, 0x00, struct uffdio_register)
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
/// _IOWR(0xaa, 0x03, struct uffdio_copy)
pub const UFFDIO_COPY: u64 = 0xc028_aa03;

/// _IOWR(0xaa, 0x04, struct uffdio_zeropage)
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;

/// _IOWR(0xaa, 0x08, struct uffdio_poison)
const UFFDIO_POISON: libc::Ioctl = 0xc020_aa08_u32 as libc::Ioctl;

/// For pages of zeros, and for those that nobody may have.
#[repr(C)]
struct ZeroPage {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// What a process does with memory that is not there yet.
#[derive(Debug)]
pub enum Event {
    /// It touched this address and waits.
    Fault(u64),
    /// It has a child now, with the same memory.
    Fork(Userfault),
    /// Memory has moved: from, to, bytes.
    Moved(u64, u64, u64),
    /// It has dropped what was there: the next touch finds zeros.
    Dropped(Range<u64>),
    /// It has unmapped this.
    Unmapped(Range<u64>),
}

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// The argument of `UFFDIO_COPY`: struct uffdio_copy. `src` is an address in the memory of whoever makes the call.
#[repr(C)]
#[derive(Debug)]
pub struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

impl Copy {
    pub fn words(&self) -> [u64; 5] {
        [self.dst, self.src, self.len, self.mode, self.copied as u64]
    }
}

/// The memory of the process that made the descriptor.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// For the memory of this process.
    ///
    /// # Errors
    /// `ENOSYS` where the kernel has none, `EPERM` where a filter forbids it.
    pub fn own() -> Result<Userfault, Errno> {
        // SAFETY: takes a number and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) };
        let fd = check("userfaultfd", fd)? as i32;
        // SAFETY: a descriptor that the kernel just made for us alone.
        Userfault::new(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// `fd` is a new one, from userfaultfd(2).
    ///
    /// # Errors
    /// Of `UFFDIO_API`.
    pub fn new(fd: OwnedFd) -> Result<Userfault, Errno> {
        Userfault::with(fd, 0)
    }

    /// `fd` is a new one, which is to tell of writes: [`Userfault::watch`].
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.7.
    pub fn tracking(fd: OwnedFd) -> Result<Userfault, Errno> {
        Userfault::with(fd, FEATURE_WP_ASYNC)
    }

    /// `fd` is a new one, which is to tell of everything: [`Userfault::event`]. It was made without waiting
    /// (O_NONBLOCK).
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_PTRACE, which telling of fork(2) needs.
    pub fn telling(fd: OwnedFd) -> Result<Userfault, Errno> {
        Userfault::with(fd, FEATURES_OF_EVENTS)
    }

    /// What has happened, if something has.
    ///
    /// # Errors
    /// Of read(2).
    pub fn event(&self) -> Result<Option<Event>, Errno> {
        const FAULT: u64 = 0x12;
        const FORK: u64 = 0x13;
        const REMAP: u64 = 0x14;
        const REMOVE: u64 = 0x15;
        const UNMAP: u64 = 0x16;
        // struct uffd_msg: the event in the first byte, what it says from the ninth on.
        let mut message = [0u64; 4];
        // SAFETY: the kernel writes at most 32 bytes on this stack.
        let count = unsafe { libc::read(self.0.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        match check("read(userfaultfd)", count as i64) {
            Ok(_) => {}
            Err(error) if matches!(error.code, libc::EAGAIN | libc::EINTR) => return Ok(None),
            Err(error) => return Err(error),
        }
        let [what, first, second, third] = message;
        Ok(Some(match what & 0xff {
            // Behind the flags.
            FAULT => Event::Fault(second & !4095),
            // SAFETY: a descriptor that the kernel has just made for us.
            FORK => Event::Fork(Userfault(unsafe { OwnedFd::from_raw_fd(first as u32 as i32) })),
            REMAP => Event::Moved(first, second, third),
            REMOVE => Event::Dropped(first..second),
            UNMAP => Event::Unmapped(first..second),
            _ => return Err(Errno { call: "read(userfaultfd)", code: libc::EPROTO }),
        }))
    }

    /// Gives the process a page of zeros at `at`, and wakes who waits for it.
    ///
    /// # Errors
    /// As [`Userfault::copy`].
    pub fn zero(&self, at: u64) -> Result<(), Errno> {
        let mut zero = ZeroPage { start: at, len: 4096, mode: 0, done: 0 };
        // SAFETY: the kernel reads and writes one struct on this stack.
        unsafe { self.ioctl("ioctl(UFFDIO_ZEROPAGE)", UFFDIO_ZEROPAGE, (&raw mut zero).cast()) }
    }

    /// Makes pages that are not there kill by SIGBUS, and wakes who waits for them. What is there stays.
    ///
    /// # Errors
    /// As [`Userfault::copy`]; `EINVAL` before Linux 6.6.
    pub fn poison(&self, range: Range<u64>) -> Result<(), Errno> {
        let mut at = range.start;
        while at < range.end {
            let mut poison = ZeroPage { start: at, len: range.end - at, mode: 0, done: 0 };
            // SAFETY: the kernel reads and writes one struct of this layout on this stack.
            let done = unsafe { self.ioctl("ioctl(UFFDIO_POISON)", UFFDIO_POISON, (&raw mut poison).cast()) };
            match done {
                Ok(()) => return Ok(()),
                Err(_) if poison.done > 0 => at += poison.done as u64,
                Err(error) if matches!(error.code, libc::EEXIST | libc::ENOENT) => at += 4096,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Gives the process pages, and wakes who waits for them. Returns how many bytes came, which is less when the
    /// process is about to tell of something.
    ///
    /// # Errors
    /// `EEXIST` where the first page is there already; `ENOENT` where nothing is registered any more; `EAGAIN`
    /// when not even one came; `ESRCH` when the process has ended.
    pub fn give(&self, to: u64, from: &[u8]) -> Result<usize, Errno> {
        let mut copy =
            Copy { dst: to, src: from.as_ptr() as u64, len: from.len() as u64, mode: 0, copied: 0 };
        // SAFETY: the kernel reads and writes one struct on this stack, and reads `len` bytes of `from`.
        let done =
            unsafe { self.ioctl("ioctl(UFFDIO_COPY)", UFFDIO_COPY as libc::Ioctl, (&raw mut copy).cast()) };
        match (done, copy.copied) {
            (Ok(()), _) => Ok(from.len()),
            (Err(_), copied) if copied > 0 => Ok(copied as usize),
            (Err(error), _) => Err(error),
        }
    }

    /// `fd` was made ready before.
    pub fn ready(fd: OwnedFd) -> Userfault {
        Userfault(fd)
    }

    fn with(fd: OwnedFd, features: u64) -> Result<Userfault, Errno> {
        let userfault = Userfault(fd);
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct on this stack.
        unsafe { userfault.ioctl("ioctl(UFFDIO_API)", UFFDIO_API, (&raw mut api).cast()) }?;
        Ok(userfault)
    }

    /// # Safety
    /// `argument` points to the struct of this request.
    unsafe fn ioctl(
        &self,
        call: &'static str,
        request: libc::Ioctl,
        argument: *mut libc::c_void,
    ) -> Result<(), Errno> {
        // SAFETY: the caller vouches for the argument.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(last(call)),
        }
    }

    /// Makes anonymous mappings, and shared ones of files in memory, in `range` ready for [`Userfault::copy`].
    ///
    /// # Errors
    /// `EINVAL` when something else is mapped there.
    pub fn register(&self, range: Range<u64>) -> Result<(), Errno> {
        self.register_as(range, REGISTER_MODE_MISSING)
    }

    /// Has the kernel note writes to mappings: `PAGEMAP_SCAN` tells of them, as long as the descriptor lives.
    /// Every page counts as written until it is protected: [`crate::pagemap::protect`].
    ///
    /// # Errors
    /// `EBUSY` for a mapping that another descriptor watches, `EINVAL` for one of a kind that cannot be
    /// watched, `ESRCH` when the process has ended or become another program.
    pub fn watch(&self, range: Range<u64>) -> Result<(), Errno> {
        self.register_as(range, REGISTER_MODE_WP)
    }

    fn register_as(&self, range: Range<u64>, mode: u64) -> Result<(), Errno> {
        let len = range.end - range.start;
        let mut register = Register { start: range.start, len, mode, ioctls: 0 };
        // SAFETY: the kernel reads and writes one struct on this stack.
        unsafe { self.ioctl("ioctl(UFFDIO_REGISTER)", UFFDIO_REGISTER, (&raw mut register).cast()) }
    }

    /// Gives the process new pages at `to` with the content of `from`; both are whole pages.
    ///
    /// # Errors
    /// `EEXIST` where there is a page already, `ENOENT` where nothing is registered.
    pub fn copy(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < from.len() {
            let mut copy = Copy {
                dst: to + done as u64,
                src: from[done..].as_ptr() as u64,
                len: (from.len() - done) as u64,
                mode: COPY_MODE_DONTWAKE,
                copied: 0,
            };
            // SAFETY: the kernel reads and writes one struct on this stack, and reads `len` bytes of `from`.
            let result = unsafe {
                self.ioctl("ioctl(UFFDIO_COPY)", UFFDIO_COPY as libc::Ioctl, (&raw mut copy).cast())
            };
            match result {
                Ok(()) => return Ok(()),
                // Interrupted in the middle, or the mappings were just changing.
                Err(error) if error.code == libc::EAGAIN => done += copy.copied.max(0) as usize,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A file in memory (tmpfs, memfd) that gets new pages from several threads at the same time: write(2) lets
/// one after the other in, and clears what it does not overwrite.
#[derive(Debug)]
pub struct Growing {
    map: SharedMap,
    userfault: Arc<Userfault>,
}

impl Growing {
    /// `file` is `len` bytes long, a number of whole pages, and has no pages yet.
    ///
    /// # Errors
    /// `EINVAL` when the file is not one in memory; as [`Userfault::own`].
    pub fn new(file: impl AsFd, len: usize) -> Result<Growing, Errno> {
        Growing::by(Arc::new(Userfault::own()?), file, len)
    }

    /// The same by a userfaultfd of this process, which others have, too.
    ///
    /// # Errors
    /// `EINVAL` when the file is not one in memory.
    pub fn by(userfault: Arc<Userfault>, file: impl AsFd, len: usize) -> Result<Growing, Errno> {
        let map = SharedMap::new(file, 0, len)?;
        userfault.register(map.address(0)..map.address(len))?;
        Ok(Growing { map, userfault })
    }

    /// What another process that has the userfaultfd asks for, to give the file pages of its own from `at` on.
    ///
    /// # Panics
    /// When they are more than the file has room for.
    pub fn copy_of(&self, at: u64, run: Range<u64>) -> Copy {
        let len = run.end - run.start;
        let dst = self.map.address(at as usize);
        assert!(len <= self.map.len() as u64 - at, "what is copied has its place in the file");
        Copy { dst, src: run.start, len, mode: COPY_MODE_DONTWAKE, copied: 0 }
    }

    /// Others have given it these pages: what is mapped counts as ours.
    pub fn forget(&self, part: Range<u64>) {
        self.map.forget(part.start as usize..part.end as usize);
    }

    /// Gives the file the pages `bytes` from `at` on.
    ///
    /// # Errors
    /// `ENOMEM` when the file system is full; then some of the pages may be there.
    pub fn put(&self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = at as usize;
        let copied = self.userfault.copy(self.map.address(at), bytes);
        self.forget(at as u64..(at + bytes.len()) as u64);
        copied
    }
}
