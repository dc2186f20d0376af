//! userfaultfd(2): new pages put into another address space, filled, in one step.

use crate::call::{check, last};
use crate::memory::SharedMap;
use model::Errno;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// For the flags of userfaultfd(2): faults of the kernel on behalf of the process are not stopped, which
/// needs no privilege. Linux 5.11.
pub const USER_MODE_ONLY: i32 = 1;

const UFFD_API: u64 = 0xaa;
const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;
/// A write to a protected page makes it writable and waits for nobody. Linux 6.7.
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const WRITEPROTECT_MODE_WP: u64 = 1;
const COPY_MODE_DONTWAKE: u64 = 1;
/// _IOWR(0xaa, 0x3f, struct uffdio_api)
const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
/// _IOWR(0xaa, 0x00, struct uffdio_register)
const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
/// _IOWR(0xaa, 0x03, struct uffdio_copy)
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;

/// _IOWR(0xaa, 0x06, struct uffdio_writeprotect)
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
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

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
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
    /// Every page counts as written until it is protected: [`Userfault::protect`].
    ///
    /// # Errors
    /// `EBUSY` for a mapping that another descriptor watches, `EINVAL` for one of a kind that cannot be
    /// watched, `ESRCH` when the process has ended or become another program.
    pub fn watch(&self, range: Range<u64>) -> Result<(), Errno> {
        self.register_as(range, REGISTER_MODE_WP)
    }

    /// From now on, pages in a watched range count as not written.
    ///
    /// # Errors
    /// `ENOENT` for a range that is not watched.
    pub fn protect(&self, range: Range<u64>) -> Result<(), Errno> {
        let len = range.end - range.start;
        let mut protect = WriteProtect { start: range.start, len, mode: WRITEPROTECT_MODE_WP };
        loop {
            // SAFETY: the kernel reads one struct on this stack.
            let done = unsafe {
                self.ioctl("ioctl(UFFDIO_WRITEPROTECT)", UFFDIO_WRITEPROTECT, (&raw mut protect).cast())
            };
            match done {
                // The mappings were just changing.
                Err(error) if error.code == libc::EAGAIN => {}
                done => return done,
            }
        }
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
            let result = unsafe { self.ioctl("ioctl(UFFDIO_COPY)", UFFDIO_COPY, (&raw mut copy).cast()) };
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
    userfault: Userfault,
}

impl Growing {
    /// `file` is `len` bytes long, a number of whole pages, and has no pages yet.
    ///
    /// # Errors
    /// `EINVAL` when the file is not one in memory; as [`Userfault::own`].
    pub fn new(file: impl AsFd, len: usize) -> Result<Growing, Errno> {
        let map = SharedMap::new(file, 0, len)?;
        let userfault = Userfault::own()?;
        userfault.register(map.address(0)..map.address(len))?;
        Ok(Growing { map, userfault })
    }

    /// Gives the file the pages `bytes` from `at` on.
    ///
    /// # Errors
    /// `ENOMEM` when the file system is full; then some of the pages may be there.
    pub fn put(&self, at: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = at as usize;
        let copied = self.userfault.copy(self.map.address(at), bytes);
        // What is mapped counts as ours.
        self.map.forget(at..at + bytes.len());
        copied
    }
}
