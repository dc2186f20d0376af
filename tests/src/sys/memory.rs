//! Mappings that a workload makes and looks at.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

pub const PAGE: usize = 4096;

pub const READ: i32 = libc::PROT_READ;
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A mapping that this process made and never unmaps behind its back.
///
/// Bytes are read and written one by one through volatile accesses: other processes may share them, and the
/// compiler must not remember across a checkpoint what they were.
#[derive(Debug, Clone, Copy)]
pub struct Map {
    pub address: usize,
    pub length: usize,
}

#[track_caller]
fn map(address: usize, length: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> Map {
    // MAP_FIXED would replace what is there, which no workload wants.
    assert_eq!(flags & libc::MAP_FIXED, 0);
    // SAFETY: without MAP_FIXED the kernel chooses free address space (or refuses), so no memory of ours
    // changes; the mapping stays until the process ends or `unmap`.
    let start = unsafe { libc::mmap(address as *mut c_void, length, protection, flags, fd, offset) };
    assert!(start != libc::MAP_FAILED, "mmap {length:#x}: {}", io::Error::last_os_error());
    Map { address: start as usize, length }
}

/// Has the kernel put pages on these nodes, the first 64 of them. Source: mbind(2).
#[track_caller]
pub fn set_policy(start: usize, length: usize, mode: i32, nodes: u64) {
    // SAFETY: the kernel reads one word, a live local; where pages lie changes nothing in them.
    super::call::check("mbind", unsafe {
        libc::syscall(libc::SYS_mbind, start, length, mode, &raw const nodes, 64, 0)
    });
}

/// Mode and nodes of the page at an address. Source: get_mempolicy(2).
#[track_caller]
pub fn policy(at: usize) -> (i32, u64) {
    const MPOL_F_ADDR: i32 = 2;
    let (mut mode, mut nodes) = (0_i32, [0_u64; 16]);
    // SAFETY: the kernel writes one integer and 1024 bits, both live locals.
    super::call::check("get_mempolicy", unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, at, MPOL_F_ADDR)
    });
    (mode, nodes[0])
}

impl Map {
    /// An anonymous mapping with more flags than `MAP_ANONYMOUS`.
    #[track_caller]
    pub fn anonymous(length: usize, protection: i32, flags: i32) -> Self {
        map(0, length, protection, flags | libc::MAP_ANONYMOUS, -1, 0)
    }

    #[track_caller]
    pub fn private(length: usize) -> Self {
        Self::anonymous(length, RW, libc::MAP_PRIVATE)
    }

    #[track_caller]
    pub fn shared(length: usize) -> Self {
        Self::anonymous(length, RW, libc::MAP_SHARED)
    }

    /// An anonymous private mapping at an address that has to be free.
    #[track_caller]
    pub fn private_at(address: usize, length: usize, protection: i32) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        map(address, length, protection, flags, -1, 0)
    }

    #[track_caller]
    pub fn file(fd: BorrowedFd, length: usize, protection: i32, flags: i32, offset: i64) -> Self {
        map(0, length, protection, flags, fd.as_raw_fd(), offset)
    }

    /// The byte at `offset`.
    #[track_caller]
    pub fn get(&self, offset: usize) -> u8 {
        assert!(offset < self.length);
        // SAFETY: inside this mapping, which stays mapped; a missing permission is a SIGSEGV, not undefined.
        unsafe { std::ptr::read_volatile((self.address + offset) as *const u8) }
    }

    #[track_caller]
    pub fn set(&self, offset: usize, value: u8) {
        assert!(offset < self.length);
        // SAFETY: inside this mapping, which stays mapped and to which no reference exists.
        unsafe { std::ptr::write_volatile((self.address + offset) as *mut u8, value) }
    }

    /// The 32-bit cell at `offset`, for flags and counters that processes share.
    #[track_caller]
    pub fn cell(&self, offset: usize) -> &'static std::sync::atomic::AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.length);
        // SAFETY: inside this mapping, aligned; it stays mapped for the life of the process, and shared
        // memory is what atomics are for.
        unsafe { &*((self.address + offset) as *const std::sync::atomic::AtomicU32) }
    }

    /// Fills every page of a range with a pattern made of `seed` and the page's number.
    #[track_caller]
    pub fn fill(&self, pages: std::ops::Range<usize>, seed: u64) {
        for page in pages {
            assert!((page + 1) * PAGE <= self.length);
            let mut value = seed ^ (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for word in 0..PAGE / 8 {
                value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // SAFETY: the word lies inside this mapping, see `set`.
                unsafe {
                    std::ptr::write_volatile((self.address + page * PAGE + word * 8) as *mut u64, value);
                }
            }
        }
    }

    /// Asserts that `fill` with the same arguments is what the memory holds.
    #[track_caller]
    pub fn check(&self, pages: std::ops::Range<usize>, seed: u64) {
        for page in pages {
            assert!((page + 1) * PAGE <= self.length);
            let mut value = seed ^ (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            for word in 0..PAGE / 8 {
                value = value.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let address = self.address + page * PAGE + word * 8;
                // SAFETY: the word lies inside this mapping, see `get`.
                let found = unsafe { std::ptr::read_volatile(address as *const u64) };
                assert_eq!(found, value, "the word at {address:#x} (page {page}) has changed");
            }
        }
    }

    #[track_caller]
    pub fn check_zero(&self, pages: std::ops::Range<usize>) {
        for page in pages {
            for offset in (0..PAGE).step_by(64) {
                assert_eq!(self.get(page * PAGE + offset), 0, "page {page} is not zero");
            }
        }
    }

    #[track_caller]
    pub fn protect(&self, pages: std::ops::Range<usize>, protection: i32) {
        assert!(pages.end * PAGE <= self.length);
        let address = (self.address + pages.start * PAGE) as *mut c_void;
        // SAFETY: the range lies inside this mapping, to which no reference exists.
        let result = unsafe { libc::mprotect(address, pages.len() * PAGE, protection) };
        super::call::check("mprotect", result);
    }

    /// madvise(2), or why not.
    #[track_caller]
    pub fn advise(&self, pages: std::ops::Range<usize>, advice: i32) -> io::Result<()> {
        assert!(pages.end * PAGE <= self.length);
        let address = (self.address + pages.start * PAGE) as *mut c_void;
        // SAFETY: the range lies inside this mapping; advice that drops or guards its contents is the
        // caller's wish, and no reference to it exists.
        match unsafe { libc::madvise(address, pages.len() * PAGE, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    #[track_caller]
    pub fn lock(&self, pages: std::ops::Range<usize>) {
        assert!(pages.end * PAGE <= self.length);
        let address = (self.address + pages.start * PAGE) as *const c_void;
        // SAFETY: mlock changes no contents; the range lies inside this mapping.
        super::call::check("mlock", unsafe { libc::mlock(address, pages.len() * PAGE) });
    }

    /// Has the kernel put pages on these nodes, the first 64 of them.
    #[track_caller]
    pub fn set_policy(&self, pages: std::ops::Range<usize>, mode: i32, nodes: u64) {
        assert!(pages.end * PAGE <= self.length);
        set_policy(self.address + pages.start * PAGE, pages.len() * PAGE, mode, nodes);
    }

    /// Mode and nodes of a page.
    #[track_caller]
    pub fn policy(&self, page: usize) -> (i32, u64) {
        assert!(page * PAGE < self.length);
        policy(self.address + page * PAGE)
    }

    /// Unmaps a part; what remains must not be touched there any more.
    #[track_caller]
    pub fn unmap(&self, pages: std::ops::Range<usize>) {
        assert!(pages.end * PAGE <= self.length);
        let address = (self.address + pages.start * PAGE) as *mut c_void;
        // SAFETY: the range lies inside this mapping, to which no reference exists.
        super::call::check("munmap", unsafe { libc::munmap(address, pages.len() * PAGE) });
    }
}

impl Map {
    /// Moves one page to the place of page `to` of `other`, whose content is lost, and leaves a hole.
    #[track_caller]
    pub fn move_page(&self, page: usize, other: &Self, to: usize) {
        assert!((page + 1) * PAGE <= self.length && (to + 1) * PAGE <= other.length);
        let (from, to) = (self.address + page * PAGE, other.address + to * PAGE);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both pages are in mappings of this program, to which no references exist.
        let moved = unsafe { libc::mremap(from as *mut c_void, PAGE, PAGE, flags, to as *mut c_void) };
        assert_eq!(moved as usize, to, "mremap: {}", io::Error::last_os_error());
    }

    /// Maps new memory in the place of a page.
    #[track_caller]
    pub fn renew_page(&self, page: usize) {
        assert!((page + 1) * PAGE <= self.length);
        let at = (self.address + page * PAGE) as *mut c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: what it replaces is a page of this mapping, to which no reference exists.
        let start = unsafe { libc::mmap(at, PAGE, RW, flags, -1, 0) };
        assert_eq!(start, at, "mmap: {}", io::Error::last_os_error());
    }

    /// Has the kernel write to the mapping: process_vm_writev(2) to this process itself.
    #[track_caller]
    pub fn write_by_kernel(&self, offset: usize, value: u64) {
        assert!(offset + 8 <= self.length);
        let bytes = value.to_ne_bytes();
        let local = libc::iovec { iov_base: bytes.as_ptr() as *mut c_void, iov_len: 8 };
        let remote = libc::iovec { iov_base: (self.address + offset) as *mut c_void, iov_len: 8 };
        // SAFETY: the kernel reads eight bytes on this stack and writes them inside this mapping.
        let count =
            unsafe { libc::process_vm_writev(nix::unistd::getpid().as_raw(), &local, 1, &remote, 1, 0) };
        super::call::check("process_vm_writev", count as i64);
    }

    /// Has the kernel read eight bytes of a file into the mapping. Source: pread(2).
    #[track_caller]
    pub fn read_from(&self, fd: BorrowedFd, at: i64, offset: usize) {
        assert!(offset + 8 <= self.length);
        // SAFETY: the kernel writes eight bytes inside this mapping, to which no reference exists.
        let count = unsafe { libc::pread(fd.as_raw_fd(), (self.address + offset) as *mut c_void, 8, at) };
        assert_eq!(count, 8, "pread: {}", io::Error::last_os_error());
    }

    /// The 64-bit cell at `offset`, as [`Map::cell`].
    #[track_caller]
    pub fn word(&self, offset: usize) -> &'static std::sync::atomic::AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.length);
        // SAFETY: as in `cell`: inside this mapping, aligned, mapped for the life of the process.
        unsafe { &*((self.address + offset) as *const std::sync::atomic::AtomicU64) }
    }
}

impl Map {
    /// Source: mlock2(2) MLOCK_ONFAULT.
    #[track_caller]
    pub fn lock_on_fault(&self) {
        // SAFETY: changes no contents; the range is this mapping.
        let result = unsafe { libc::mlock2(self.address as *const c_void, self.length, libc::MLOCK_ONFAULT) };
        super::call::check("mlock2", result);
    }

    /// Nothing can change these pages' mapping any more. Source: mseal(2), Linux 6.10.
    #[track_caller]
    pub fn seal(&self, pages: std::ops::Range<usize>) -> io::Result<()> {
        const SYS_MSEAL: i64 = 462;
        assert!(pages.end * PAGE <= self.length);
        let (start, length) = (self.address + pages.start * PAGE, pages.len() * PAGE);
        // SAFETY: changes no contents; the range lies inside this mapping.
        match unsafe { libc::syscall(SYS_MSEAL, start, length, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Can it be unmapped? If so, it is not any more.
    pub fn can_unmap(&self, pages: std::ops::Range<usize>) -> bool {
        assert!(pages.end * PAGE <= self.length);
        let address = (self.address + pages.start * PAGE) as *mut c_void;
        // SAFETY: the range lies inside this mapping, to which no reference exists.
        unsafe { libc::munmap(address, pages.len() * PAGE) == 0 }
    }
}

impl Map {
    /// Which pages have a place in memory, whoever has put them there. Source: mincore(2).
    #[track_caller]
    pub fn resident(&self) -> Vec<bool> {
        let mut pages = vec![0u8; self.length.div_ceil(PAGE)];
        // SAFETY: the kernel writes a byte for each page of this mapping.
        let result = unsafe { libc::mincore(self.address as *mut c_void, self.length, pages.as_mut_ptr()) };
        super::call::check("mincore", result);
        pages.iter().map(|page| page & 1 != 0).collect()
    }

    /// Can the kernel read it for another? Source: process_vm_readv(2), of this process itself.
    pub fn is_readable_from_outside(&self) -> bool {
        let mut byte = 0_u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: self.address as *mut c_void, iov_len: 1 };
        // SAFETY: the kernel writes one byte on this stack.
        unsafe { libc::process_vm_readv(nix::unistd::getpid().as_raw(), &local, 1, &remote, 1, 0) == 1 }
    }
}

/// mlockall(2) for memory to come.
#[track_caller]
pub fn lock_future(flags: i32) {
    assert!(flags & libc::MCL_CURRENT == 0);
    // SAFETY: changes no contents.
    super::call::check("mlockall", unsafe { libc::mlockall(flags) });
}

/// Can a page be mapped with this protection?
pub fn can_map(protection: i32) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: without MAP_FIXED no memory of ours changes.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: exactly what was just mapped.
    super::call::check("munmap", unsafe { libc::munmap(start, PAGE) });
    true
}

/// A descriptor of memory that nobody else can read. Source: memfd_secret(2).
pub fn secret() -> io::Result<std::fs::File> {
    // SAFETY: takes one integer; the new descriptor is ours alone.
    match unsafe { libc::syscall(libc::SYS_memfd_secret, 0) } {
        // SAFETY: as above.
        fd @ 0.. => Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd as i32) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Registers a mapping with a new userfaultfd, for pages that are missing. Source: ioctl_userfaultfd(2).
#[track_caller]
pub fn register_userfault(fd: BorrowedFd, map: &Map) {
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
    const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00;
    const MODE_MISSING: u64 = 1;
    let mut api: [u64; 3] = [0xaa, 0, 0];
    let mut register: [u64; 4] = [map.address as u64, map.length as u64, MODE_MISSING, 0];
    // SAFETY: the kernel reads and writes the two arrays, which are as long as its structures.
    unsafe {
        super::call::check("UFFDIO_API", libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()));
        super::call::check(
            "UFFDIO_REGISTER",
            libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, register.as_mut_ptr()),
        );
    }
}
