//! Memory of this process and of others.

use crate::call::{check, last};
use model::Errno;
use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A new anonymous file in memory. `executable` asks for one that may be executed where the host has
/// set `vm.memfd_noexec`. Source: memfd_create(2).
pub fn memfd(name: &CStr, executable: bool) -> Result<OwnedFd, Errno> {
    const MFD_EXEC: u32 = 0x10;
    let flags = libc::MFD_CLOEXEC | if executable { MFD_EXEC } else { 0 };
    // SAFETY: the kernel reads the name, a C string that lives for the call.
    let mut fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd == -1 && last("memfd_create").code == libc::EINVAL {
        // Before Linux 6.3 the flag does not exist, and every memfd may be executed.
        // SAFETY: as above.
        fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    }
    let fd = check("memfd_create", fd.into())? as i32;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A range of a file mapped shared into this process; unmapped when dropped.
///
/// Another process may write to it at any time, so there is no way to a reference: bytes are copied in
/// and out, and words are reached as atomics.
#[derive(Debug)]
pub struct SharedMap {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and all access is by copies or atomics.
unsafe impl Send for SharedMap {}
// SAFETY: as for Send.
unsafe impl Sync for SharedMap {}

impl SharedMap {
    /// Maps `len` bytes of `file` from `offset`, for reading and writing.
    pub fn new(file: impl AsFd, offset: u64, len: usize) -> Result<SharedMap, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
                offset as i64,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(last("mmap"));
        }
        // mmap without MAP_FIXED never returns address zero.
        Ok(SharedMap { base: NonNull::new(base.cast()).unwrap(), len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where byte `at` is in this process; for the kernel's use.
    pub fn address(&self, at: usize) -> u64 {
        assert!(at <= self.len);
        self.base.as_ptr() as u64 + at as u64
    }

    /// # Panics
    /// When the range is not inside the mapping.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at);
        // SAFETY: the range is inside the mapping, which lives as long as self, and overlaps no Rust
        // object: nobody hands out references into it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(at), bytes.len()) }
    }

    /// # Panics
    /// When the range is not inside the mapping.
    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at);
        // SAFETY: as for write.
        unsafe { std::ptr::copy_nonoverlapping(self.base.as_ptr().add(at), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Has the file get pages for a part, and touches them. Source: madvise(2) MADV_POPULATE_WRITE, Linux 5.14.
    ///
    /// # Errors
    /// `EFAULT` when the file system is full.
    ///
    /// # Panics
    /// When the part is not inside the mapping.
    pub fn populate(&self, part: Range<usize>) -> Result<(), Errno> {
        assert!(part.start <= part.end && part.end <= self.len);
        // SAFETY: a part of this mapping, of which nothing changes.
        let result = unsafe {
            libc::madvise(self.base.as_ptr().add(part.start).cast(), part.len(), libc::MADV_POPULATE_WRITE)
        };
        check("madvise", result.into()).map(drop)
    }

    /// Gives the memory of whole pages back; the file keeps what is in them.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    pub fn forget(&self, part: Range<usize>) {
        assert!(part.start <= part.end && part.end <= self.len);
        // SAFETY: a part of this mapping, which shows the same of its file when it is touched again.
        unsafe { libc::madvise(self.base.as_ptr().add(part.start).cast(), part.len(), libc::MADV_DONTNEED) };
    }

    /// Which pages of the mapping the file has: bit 0 of a byte for each.
    ///
    /// Source: mincore(2). Of a file that is neither ours nor open for writing the kernel says that all are there.
    pub fn is_there(&self) -> Result<Vec<u8>, Errno> {
        let mut pages = vec![0u8; self.len.div_ceil(PAGE as usize)];
        // SAFETY: the kernel writes a byte for each page of this mapping, and there are as many.
        let result = unsafe { libc::mincore(self.base.as_ptr().cast(), self.len, pages.as_mut_ptr()) };
        check("mincore", result.into()).map(|_| pages)
    }

    /// The 32-bit word at `at`, which must be aligned.
    pub fn word(&self, at: usize) -> &std::sync::atomic::AtomicU32 {
        assert!(at.is_multiple_of(4) && at + 4 <= self.len);
        // SAFETY: aligned and inside the mapping, which lives as long as self; an atomic may be changed
        // by another process at any time.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.base.as_ptr().add(at).cast()) }
    }
}

impl Drop for SharedMap {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap returned, and no reference into it outlives self.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Writes to a file whose pages have `page` bytes, up to its last: one that takes no write(2). Huge pages are promised with
/// the mapping: where they are short, mmap(2) says so.
///
/// # Errors
/// `EFBIG` behind the end of the file; those of mmap(2).
pub fn write_mapped(to: impl AsFd, page: u64, at: u64, bytes: &[u8]) -> Result<(), Errno> {
    let too_big = Errno { call: "mmap", code: libc::EFBIG };
    let end = at.checked_add(bytes.len() as u64).ok_or(too_big)?;
    if end > (crate::fd::stat(&to)?.st_size as u64).next_multiple_of(page) {
        return Err(too_big);
    }
    let start = at / page * page;
    let map = SharedMap::new(to, start, (end.next_multiple_of(page) - start) as usize)?;
    map.write((at - start) as usize, bytes);
    Ok(())
}

/// A private, read-only view of a whole file of images.
///
/// A file that is truncated while it is mapped would end this process with SIGBUS; for what has to
/// survive that, read(2).
#[derive(Debug)]
pub struct View {
    base: *const u8,
    len: usize,
}

// SAFETY: read-only memory that belongs to no thread.
unsafe impl Send for View {}
// SAFETY: as for Send.
unsafe impl Sync for View {}

impl View {
    pub fn new(file: impl AsFd, len: usize) -> Result<View, Errno> {
        if len == 0 {
            return Ok(View { base: NonNull::dangling().as_ptr(), len });
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_PRIVATE,
                file.as_fd().as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED { Err(last("mmap")) } else { Ok(View { base: base.cast(), len }) }
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes and lives as long as self.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }

    /// Reads a part ahead, so that touching it takes no fault. A hint. Source: madvise(2)
    /// MADV_POPULATE_READ, Linux 5.14.
    pub fn populate(&self, part: Range<usize>) {
        const MADV_POPULATE_READ: i32 = 22;
        self.advise(part, MADV_POPULATE_READ);
    }

    /// Gives the memory of a part back, until it is touched again.
    pub fn forget(&self, part: Range<usize>) {
        self.advise(part, libc::MADV_DONTNEED);
    }

    fn advise(&self, part: Range<usize>, advice: i32) {
        let part = part.start / 4096 * 4096..part.end.min(self.len);
        if !part.is_empty() {
            // SAFETY: a part of this mapping of a file, which reads the same afterwards.
            unsafe { libc::madvise(self.base.add(part.start) as *mut _, part.len(), advice) };
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if self.len != 0 {
            // SAFETY: exactly what mmap returned; no reference outlives self.
            unsafe { libc::munmap(self.base as *mut _, self.len) };
        }
    }
}

/// Copies from the memory of `pid` at `address` into `buffer`; returns how many bytes came.
///
/// Fewer come when a page in the way is not there or not readable.
///
/// # Errors
/// `EFAULT` when not even the first byte can be read; `EPERM`, `ESRCH`.
///
/// Source: process_vm_readv(2); mm/process_vm_access.c.
pub fn read_remote(pid: i32, address: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
    read_remote_runs(pid, &[(address, buffer.len())], buffer)
}

/// [`read_remote`] for several ranges, one behind the other in `buffer`.
pub fn read_remote_runs(pid: i32, runs: &[(u64, usize)], buffer: &mut [u8]) -> Result<usize, Errno> {
    assert!(runs.iter().map(|run| run.1).sum::<usize>() <= buffer.len() && runs.len() <= 1024);
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote: Vec<libc::iovec> =
        runs.iter().map(|run| libc::iovec { iov_base: run.0 as *mut _, iov_len: run.1 }).collect();
    // SAFETY: the kernel writes at most `buffer.len()` bytes into the buffer, borrowed for the call; the
    // remote addresses are checked by the kernel.
    let count = unsafe { libc::process_vm_readv(pid, &local, 1, remote.as_ptr(), remote.len() as u64, 0) };
    check("process_vm_readv", count as i64).map(|count| count as usize)
}

/// Copies `bytes` to the memory of `pid`, whole.
///
/// # Errors
/// `EFAULT` when a page in the way is not there or not writable.
///
/// Source: process_vm_writev(2).
pub fn write_remote(pid: i32, address: u64, bytes: &[u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: bytes.len() };
    // SAFETY: the kernel reads `bytes`, borrowed for the call.
    let count = unsafe { libc::process_vm_writev(pid, &local, 1, &remote, 1, 0) };
    match check("process_vm_writev", count as i64)? as usize {
        count if count == bytes.len() => Ok(()),
        _ => Err(Errno { call: "process_vm_writev", code: libc::EFAULT }),
    }
}

/// Sleeps while `word` holds `value`, until woken or `timeout_ns` has passed.
///
/// Source: futex(2) FUTEX_WAIT, not private: other processes wait on the same word.
pub fn futex_wait(word: &std::sync::atomic::AtomicU32, value: u32, timeout_ns: u64) {
    let timeout = libc::timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as i64,
        tv_nsec: (timeout_ns % 1_000_000_000) as i64,
    };
    // SAFETY: the kernel reads the word and the timeout, both alive for the call. All ways of returning
    // (woken, changed, timed out, interrupted) are the same to the caller, who looks at the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &timeout, 0, 0) };
}

/// Wakes all who wait on `word`. Source: futex(2) FUTEX_WAKE.
pub fn futex_wake(word: &std::sync::atomic::AtomicU32) {
    // SAFETY: the kernel uses the address as a key only.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
}

/// Tells the kernel which words to mark and wake when this thread dies: `words` are addresses of the
/// nodes of a list, each followed by its word at `offset`; `list` is its head.
///
/// # Safety
/// `head` must be the address of a `robust_list_head` that stays valid, with the nodes it reaches, until
/// the thread ends or the list is set again.
///
/// Source: set_robust_list(2); kernel/futex/core.c, exit_robust_list.
pub unsafe fn set_robust_list(head: u64) -> Result<(), Errno> {
    // SAFETY: the caller vouches for the list; the kernel reads it when this thread ends.
    check("set_robust_list", unsafe { libc::syscall(libc::SYS_set_robust_list, head, 24) }).map(drop)
}

/// `true` when every byte is zero.
pub fn is_zero(page: &[u8]) -> bool {
    // Sixteen bytes at a time; the compiler makes vector code of it.
    // SAFETY: every bit pattern is a u128, and align_to keeps to the borrowed bytes.
    let (head, body, tail) = unsafe { page.align_to::<u128>() };
    head.iter().chain(tail).all(|byte| *byte == 0) && body.iter().all(|word| *word == 0)
}

/// The error of an [`io::Error`], with the name of its call.
pub fn io_errno(call: &'static str, error: &io::Error) -> Errno {
    Errno { call, code: error.raw_os_error().unwrap_or(0) }
}

/// A memory file that can be sealed; `flags` are for huge pages. Source: memfd_create(2) MFD_ALLOW_SEALING.
pub fn sealable_memfd(name: &CStr, flags: u32) -> Result<OwnedFd, Errno> {
    let flags = flags | libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the kernel reads the name, a C string that lives for the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    let fd = check("memfd_create", fd.into())? as i32;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new file in memory that is read by those alone who have it open or mapped. Its size is set once.
///
/// # Errors
/// `ENOSYS` before Linux 5.14, and where secretmem.enable is off.
///
/// Source: memfd_secret(2); mm/secretmem.c.
pub fn secret() -> Result<OwnedFd, Errno> {
    // SAFETY: takes one integer.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let fd = check("memfd_secret", fd)? as i32;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The file behind a new mapping of MAP_SHARED | MAP_ANONYMOUS; `flags` are for huge pages, of which `len` is a multiple.
///
/// # Errors
/// `EPERM` without CAP_CHECKPOINT_RESTORE, which `/proc/PID/map_files` asks for.
pub fn shared_anonymous(len: u64, flags: i32) -> Result<OwnedFd, Errno> {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS | flags);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags | libc::MAP_NORESERVE, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(last("mmap"));
    }
    let end = (base as u64 + len).next_multiple_of(PAGE);
    let path = format!("/proc/self/map_files/{:x}-{end:x}", base as u64);
    let file = crate::fd::open(std::path::Path::new(&path), libc::O_RDWR);
    // SAFETY: exactly what was mapped above; nobody else knows of it.
    unsafe { libc::munmap(base, len as usize) };
    file
}

/// How many huge pages of this size are free and promised to nobody; `None` if there is no such size.
///
/// Source: Documentation/admin-guide/mm/hugetlbpage.rst. What the kernel may make beyond counts as free.
pub fn free_huge_pages(size: u64) -> Option<u64> {
    let count = |name: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{name}", size >> 10);
        crate::proc::decimal(crate::fd::text(&path).ok()?.trim_ascii())
    };
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    Some(free + count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?))
}
