//! Descriptors: flags, positions, metadata, ioctls.

use crate::call::{check, syscall};
use model::Errno;
use std::ffi::CString;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// fcntl(2) commands that tell and set which signal a file sends.
pub const F_SETSIG: i32 = 10;
pub const F_GETSIG: i32 = 11;

/// Takes ownership of a number that the kernel returned.
fn owned(call: &'static str, result: i64) -> Result<OwnedFd, Errno> {
    let fd = check(call, result)?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// fstat(2).
pub fn stat(fd: impl AsFd) -> Result<libc::stat, Errno> {
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel writes one stat on this stack.
    check("fstat", unsafe { libc::fstat(fd.as_fd().as_raw_fd(), stat.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed integers, filled by the kernel.
    Ok(unsafe { stat.assume_init() })
}

/// stat(2), following symbolic links only with `follow`.
pub fn stat_path(path: &Path, follow: bool) -> Result<libc::stat, Errno> {
    stat_from(libc::AT_FDCWD, path, if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW })
}

/// The inode that `path`, seen from a directory, leads to. Source: fstatat(2).
pub fn stat_at(dir: impl AsFd, path: &Path) -> Result<libc::stat, Errno> {
    stat_from(dir.as_fd().as_raw_fd(), path, 0)
}

fn stat_from(dir: i32, path: &Path, flags: i32) -> Result<libc::stat, Errno> {
    let path = c_path(path)?;
    let mut stat = MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel reads the path and writes one stat on this stack.
    check("stat", unsafe { libc::fstatat(dir, path.as_ptr(), stat.as_mut_ptr(), flags) }.into())?;
    // SAFETY: zeroed integers, filled by the kernel.
    Ok(unsafe { stat.assume_init() })
}

/// Is this folder the top of a `/proc`? Source: statfs(2), fs/proc/root.c.
pub fn is_proc_root(path: &Path) -> bool {
    const PROC_ROOT_INO: u64 = 1;
    let Ok(c_path) = c_path(path) else { return false };
    let mut found = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel reads the path and writes one statfs on this stack.
    let result = unsafe { libc::statfs(c_path.as_ptr(), found.as_mut_ptr()) };
    // SAFETY: zeroed integers, filled by the kernel.
    let is_proc = result == 0 && unsafe { found.assume_init() }.f_type == libc::PROC_SUPER_MAGIC;
    is_proc && stat_path(path, true).is_ok_and(|stat| stat.st_ino == PROC_ROOT_INO)
}

/// Source: linux/magic.h.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
const SECRETMEM_MAGIC: i64 = 0x5345_434d;

/// The sort of file system that a file is of, and the size of its blocks. Source: statfs(2).
fn file_system(path: &Path) -> Option<(i64, u64)> {
    let c_path = c_path(path).ok()?;
    let mut found = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: the kernel reads the path and writes one statfs on this stack.
    let result = unsafe { libc::statfs(c_path.as_ptr(), found.as_mut_ptr()) };
    // SAFETY: zeroed integers, filled by the kernel.
    let found = unsafe { found.assume_init() };
    (result == 0).then_some((found.f_type, found.f_bsize as u64))
}

/// The size of its pages, if this is a file of huge pages. Source: fs/hugetlbfs/inode.c.
pub fn huge_page(path: &Path) -> Option<u64> {
    file_system(path).filter(|found| found.0 == HUGETLBFS_MAGIC).map(|found| found.1)
}

/// Is this memory that only its own process can read? Source: memfd_secret(2); mm/secretmem.c.
pub fn is_secret(path: &Path) -> bool {
    file_system(path).is_some_and(|found| found.0 == SECRETMEM_MAGIC)
}

/// [`huge_page`] of an open file.
pub fn huge_page_of(fd: impl AsFd) -> Option<u64> {
    huge_page(Path::new(&format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())))
}

/// The size of its pages, if a file takes no write(2) and is written through mappings: one of huge pages, or secret memory.
pub fn page_to_map(fd: impl AsFd) -> Option<u64> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    let path = Path::new(&path);
    huge_page(path).or(is_secret(path).then_some(crate::memory::PAGE))
}

/// The id of the mount that `fd` was opened through, as in `mountinfo`. Source: statx(2) STATX_MNT_ID.
pub fn mount_id(fd: impl AsFd) -> Result<i32, Errno> {
    let mut buf = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the kernel reads an empty path and writes one statx on this stack.
    let result = unsafe {
        libc::statx(
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC,
            libc::STATX_MNT_ID,
            buf.as_mut_ptr(),
        )
    };
    check("statx", result.into())?;
    // SAFETY: zeroed integers, filled by the kernel.
    Ok(unsafe { buf.assume_init() }.stx_mnt_id as i32)
}

/// Status flags, as F_GETFL gives them. Source: fcntl(2).
pub fn status_flags(fd: impl AsFd) -> Result<u32, Errno> {
    fcntl(fd, libc::F_GETFL, 0).map(|flags| flags as u32)
}

/// A command of fcntl(2) that takes an integer.
pub fn fcntl(fd: impl AsFd, command: i32, argument: i32) -> Result<i32, Errno> {
    // SAFETY: the callers' commands take integers.
    check("fcntl", unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), command, argument) }.into())
        .map(|result| result as i32)
}

/// Who gets the file's signals: kind (F_OWNER_*) and id; zero id for nobody. Source: fcntl(2) F_GETOWN_EX.
pub fn owner(fd: impl AsFd) -> Result<(u32, i32), Errno> {
    const F_GETOWN_EX: i32 = 16;
    let mut owner = [0i32; 2];
    // SAFETY: the kernel writes two integers on this stack.
    check("fcntl", unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWN_EX, owner.as_mut_ptr()) }.into())?;
    Ok((owner[0] as u32, owner[1]))
}

/// Real and effective uid of who set the owner. Source: fcntl(2) F_GETOWNER_UIDS.
pub fn owner_uids(fd: impl AsFd) -> Result<(u32, u32), Errno> {
    const F_GETOWNER_UIDS: i32 = 17;
    let mut uids = [0u32; 2];
    // SAFETY: the kernel writes two integers on this stack.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    check("fcntl", result.into())?;
    Ok((uids[0], uids[1]))
}

/// The position, or `None` for what has none. Source: lseek(2).
pub fn position(fd: impl AsFd) -> Option<u64> {
    seek(fd, 0, libc::SEEK_CUR).ok()
}

/// lseek(2).
pub fn seek(fd: impl AsFd, offset: i64, whence: i32) -> Result<u64, Errno> {
    // SAFETY: integers only.
    check("lseek", unsafe { libc::lseek(fd.as_fd().as_raw_fd(), offset, whence) }).map(|at| at as u64)
}

/// How many more descriptors this process may open, about; the soft limit is raised for it.
pub fn room() -> usize {
    /// What others of this process may have open or need meanwhile.
    const OTHERS: u64 = 128;
    /// More is never needed at a time.
    const ENOUGH: u64 = 1 << 16;
    let Ok((soft, hard)) = crate::process::own_limit(libc::RLIMIT_NOFILE) else { return 1 };
    let is_raised = soft >= hard || crate::process::set_own_soft_limit(libc::RLIMIT_NOFILE, hard).is_ok();
    if is_raised { hard } else { soft }.saturating_sub(OTHERS).clamp(2, ENOUGH) as usize
}

/// Makes the table of descriptors large enough for `count`, as far as the limit goes.
///
/// Best before there are other threads: with them each growth of a table waits until every processor has
/// passed a quiet state, some 15 ms. Source: fs/file.c expand_fdtable().
pub fn reserve(count: usize) {
    let last = room().min(count).saturating_sub(1) as i32;
    // Without it the table grows when it has to.
    let _ = eventfd(0, 0).and_then(|any| duplicate_from(any, last));
}

/// What the texts of one process's descriptors are read from, with short ways to each.
#[derive(Debug)]
pub struct Texts {
    links: OwnedFd,
    infos: OwnedFd,
}

impl Texts {
    /// The links of our own descriptors, and `/proc/PID/fdinfo` of another process.
    pub fn of(pid: i32) -> Result<Texts, Errno> {
        let folder = |path: &str| open(Path::new(path), libc::O_RDONLY | libc::O_DIRECTORY);
        let infos = folder(&format!("/proc/{pid}/fdinfo"))?;
        Ok(Texts { links: folder("/proc/self/fd")?, infos })
    }

    /// What a descriptor of our own points to. Source: readlinkat(2).
    pub fn link(&self, fd: impl AsFd) -> Result<Vec<u8>, Errno> {
        let mut text = [0u8; libc::PATH_MAX as usize];
        let name = decimal(fd.as_fd().as_raw_fd());
        // SAFETY: the kernel reads a string that ends with zero and writes at most the length of the buffer.
        let count = unsafe {
            libc::readlinkat(
                self.links.as_raw_fd(),
                name.as_ptr().cast(),
                text.as_mut_ptr().cast(),
                text.len(),
            )
        };
        check("readlinkat", count as i64).map(|count| text[..count as usize].to_vec())
    }

    /// What the kernel tells of descriptor `number` of the process. Source: proc_pid_fdinfo(5).
    pub fn info(&self, number: RawFd) -> Result<Vec<u8>, Errno> {
        let name = decimal(number);
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: the kernel reads a string that ends with zero.
        let file = unsafe { libc::openat(self.infos.as_raw_fd(), name.as_ptr().cast(), flags) };
        let file = owned("openat", file.into())?;
        let mut some = [0u8; 512];
        let count = read(&file, &mut some)?;
        let mut text = some[..count].to_vec();
        // The kernel fills the buffer as long as there is text.
        if count == some.len() {
            std::fs::File::from(file)
                .read_to_end(&mut text)
                .map_err(|error| crate::memory::io_errno("read", &error))?;
        }
        Ok(text)
    }
}

/// A number that is not negative as text that ends with zero.
fn decimal(number: RawFd) -> [u8; 12] {
    let mut text = [0; 12];
    // The text of an i32 has at most eleven bytes.
    let _ = write!(&mut text[..11], "{number}");
    text
}

/// An ioctl that writes one integer.
pub fn ioctl_read(fd: impl AsFd, request: u64) -> Result<i32, Errno> {
    let mut value = 0i32;
    // SAFETY: the callers' requests write one int, which lives on this stack.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as libc::Ioctl, &mut value) };
    check("ioctl", result.into())?;
    Ok(value)
}

/// An ioctl that reads or writes the bytes of `argument`, whose length the request knows.
pub fn ioctl_bytes(fd: impl AsFd, request: u64, argument: &mut [u8]) -> Result<i32, Errno> {
    // Requests of unknown length would be unsound: the length encoded in the request must fit, and the
    // old terminal requests, which encode none, take at most a termios of 64 bytes.
    let encoded = (request >> 16 & 0x3fff) as usize;
    assert!(argument.len() >= if encoded == 0 { 64 } else { encoded });
    // SAFETY: the kernel touches at most the bytes asserted above.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as libc::Ioctl, argument.as_mut_ptr()) };
    check("ioctl", result.into()).map(|result| result as i32)
}

fn c_path(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno { call: "open", code: libc::EINVAL })
}

/// open(2) without following it into this process's controlling terminal.
pub fn open(path: &Path, flags: i32) -> Result<OwnedFd, Errno> {
    let path = c_path(path)?;
    // SAFETY: the kernel reads the path, which lives for the call.
    owned("open", unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC | libc::O_NOCTTY, 0) }.into())
}

/// eventfd2(2).
pub fn eventfd(initial: u32, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    owned("eventfd", unsafe { libc::eventfd(initial, flags | libc::EFD_CLOEXEC) }.into())
}

/// epoll_create1(2).
pub fn epoll() -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    owned("epoll_create1", unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) }.into())
}

/// signalfd4(2).
pub fn signalfd(mask: u64) -> Result<OwnedFd, Errno> {
    const SFD_CLOEXEC: u64 = libc::SFD_CLOEXEC as u64;
    // SAFETY: the kernel reads eight bytes of mask on this stack.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1i64, &raw const mask, 8u64, SFD_CLOEXEC) };
    owned("signalfd4", fd)
}

/// timerfd_create(2).
pub fn timerfd(clock: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    owned("timerfd_create", unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) }.into())
}

/// pipe2(2): the read end and the write end.
pub fn pipe(flags: i32) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two integers on this stack.
    check("pipe2", unsafe { libc::pipe2(ends.as_mut_ptr(), flags | libc::O_CLOEXEC) }.into())?;
    // SAFETY: two descriptors that the kernel just made for us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Copies what is in the pipe `from` to the end of the pipe `to`, and leaves it there; returns the
/// number of bytes. Source: tee(2).
pub fn tee(from: impl AsFd, to: impl AsFd, len: usize) -> Result<usize, Errno> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: integers only.
    check("tee", unsafe { libc::tee(from, to, len, libc::SPLICE_F_NONBLOCK) } as i64).map(|n| n as usize)
}

/// read(2).
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel writes at most the length of the borrowed buffer.
    check("read", unsafe { libc::read(fd.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) }
        as i64)
    .map(|n| n as usize)
}

/// write(2).
pub fn write(fd: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    // SAFETY: the kernel reads the borrowed bytes.
    check("write", unsafe { libc::write(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as i64)
        .map(|n| n as usize)
}

/// Makes `number` another name of `fd`, without close-on-exec: for a program about to be executed.
///
/// # Safety
/// Nobody in this process may own `number`.
pub unsafe fn dup_to(fd: impl AsFd, number: RawFd) -> Result<(), Errno> {
    // SAFETY: the caller vouches that closing what `number` was harms nobody.
    check("dup3", unsafe { libc::dup3(fd.as_fd().as_raw_fd(), number, 0) }.into()).map(drop)
}

/// Closes many, those with neighbouring numbers at once. Source: close_range(2).
pub fn close(fds: impl IntoIterator<Item = OwnedFd>) {
    let mut numbers: Vec<u32> = fds.into_iter().map(|fd| fd.into_raw_fd() as u32).collect();
    numbers.sort_unstable();
    for row in numbers.chunk_by(|one, next| one + 1 == *next) {
        let args = [row[0].into(), row[row.len() - 1].into(), 0];
        // SAFETY: integers, which name descriptors that nobody owns any more.
        let closed = unsafe { syscall("close_range", libc::SYS_close_range, &args) };
        debug_assert!(closed.is_ok());
    }
}

/// How many descriptors a process has open, where the kernel tells (Linux 6.2).
///
/// Source: the size of `/proc/PID/fd`, proc_pid_fd(5).
pub fn count(pid: i32) -> Option<usize> {
    let stat = stat_path(Path::new(&format!("/proc/{pid}/fd")), true).ok()?;
    usize::try_from(stat.st_size).ok()
}

/// Processes with a descriptor of the socket with this inode, as far as they can be seen: pid and name.
pub fn holders(socket: u64) -> Vec<(i32, String)> {
    let wanted = format!("socket:[{socket}]").into_bytes();
    let has_it = |pid: i32| {
        let Ok(numbers) = numbers(&format!("/proc/{pid}/fd")) else { return false };
        numbers.iter().any(|number| {
            std::fs::read_link(format!("/proc/{pid}/fd/{number}"))
                .is_ok_and(|link| link.as_os_str().as_bytes() == wanted)
        })
    };
    let all = numbers("/proc").unwrap_or_default().into_iter().filter(|pid| has_it(*pid));
    all.map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pid, name.trim_end().to_owned())
    })
    .collect()
}

/// The text of a file of `/proc`, whose length nobody tells.
///
/// # Errors
/// Those of open(2) and read(2).
pub fn text(path: &str) -> Result<Vec<u8>, Errno> {
    let file = open(Path::new(path), libc::O_RDONLY)?;
    let mut some = [0u8; 4096];
    let mut text = Vec::new();
    loop {
        match read(&file, &mut some)? {
            0 => return Ok(text),
            count => text.extend_from_slice(&some[..count]),
        }
    }
}

/// Names of the numbers in a `/proc/PID/fd` or `/proc/PID/task` folder, sorted.
pub fn numbers(path: &str) -> Result<Vec<i32>, Errno> {
    let entries = std::fs::read_dir(path).map_err(|error| crate::memory::io_errno("readdir", &error))?;
    let mut numbers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| crate::memory::io_errno("readdir", &error))?;
        if let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// timerfd's way to set expirations that were not read yet. Source: fs/timerfd.c TFD_IOC_SET_TICKS.
pub fn timerfd_set_ticks(fd: impl AsFd, ticks: u64) -> Result<(), Errno> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400_u32 as libc::Ioctl;
    // SAFETY: the kernel reads eight bytes on this stack.
    check("ioctl", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) }.into())
        .map(drop)
}

/// Sets a timer to a time from now and an interval, each in seconds and nanoseconds.
///
/// Source: timerfd_settime(2).
pub fn timerfd_set(fd: impl AsFd, flags: i32, value: (u64, u64), interval: (u64, u64)) -> Result<(), Errno> {
    let timespec = |(seconds, nanoseconds): (u64, u64)| libc::timespec {
        tv_sec: seconds as i64,
        tv_nsec: nanoseconds as i64,
    };
    let spec = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(value) };
    // SAFETY: the kernel reads one itimerspec on this stack.
    let result = unsafe { libc::timerfd_settime(fd.as_fd().as_raw_fd(), flags, &spec, std::ptr::null_mut()) };
    check("timerfd_settime", result.into()).map(drop)
}

/// Has the kernel count the expirations so far. Source: timerfd_gettime(2).
pub fn timerfd_get(fd: impl AsFd) -> Result<(), Errno> {
    let mut left = MaybeUninit::<libc::itimerspec>::zeroed();
    // SAFETY: the kernel writes one itimerspec on this stack.
    let result = unsafe { libc::timerfd_gettime(fd.as_fd().as_raw_fd(), left.as_mut_ptr()) };
    check("timerfd_gettime", result.into()).map(drop)
}

/// Is nobody at the other end of this pipe, fifo or socket? Source: poll(2) POLLHUP, POLLERR.
pub fn hung_up(fd: impl AsFd) -> bool {
    there(fd, 0, 0).is_ok_and(|events| events & (libc::POLLHUP | libc::POLLERR) != 0)
}

/// Waits until there is room to write, the other end is closed, or a signal has come. Source: poll(2).
pub fn wait_writable(fd: impl AsFd) -> Result<(), Errno> {
    match there(fd, libc::POLLOUT, -1) {
        Err(error) if error.code != libc::EINTR => Err(error),
        _ => Ok(()),
    }
}

/// Which of these events are there, and the end or an error of it; -1 waits for one. Source: poll(2).
fn there(fd: impl AsFd, events: i16, timeout_ms: i32) -> Result<i16, Errno> {
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: the kernel reads and writes one pollfd on this stack.
    check("poll", unsafe { libc::poll(&mut poll, 1, timeout_ms) }.into()).map(|_| poll.revents)
}

/// Waits until there is something to read: of a pidfd, that the process has ended. Source: poll(2).
pub fn wait_readable(fd: impl AsFd) -> Result<(), Errno> {
    while poll(&[fd.as_fd()], -1)? != [true] {}
    Ok(())
}

/// Waits until one of `fds` has something to read or is closed at the other end, or the time is over; -1 for any
/// time. Says of each whether it has. Source: poll(2).
pub fn poll(fds: &[BorrowedFd], timeout_ms: i32) -> Result<Vec<bool>, Errno> {
    let one = |fd: &BorrowedFd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut polls: Vec<libc::pollfd> = fds.iter().map(one).collect();
    // SAFETY: the kernel reads and writes as many pollfds as there are.
    match check("poll", unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as u64, timeout_ms) }.into()) {
        Ok(_) => Ok(polls.iter().map(|poll| poll.revents != 0).collect()),
        Err(error) if error.code == libc::EINTR => Ok(vec![false; fds.len()]),
        Err(error) => Err(error),
    }
}

/// Is one of these events (POLLIN, ...) there, or the end or an error of it? Source: poll(2).
pub fn is_ready(fd: impl AsFd, events: i16) -> Result<bool, Errno> {
    there(fd, events, 0).map(|events| events != 0)
}

/// Makes a hole in a file, whose length stays. Source: fallocate(2) FALLOC_FL_PUNCH_HOLE.
pub fn punch(fd: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: integers only.
    let result = unsafe { libc::fallocate(fd.as_fd().as_raw_fd(), mode, offset as i64, len as i64) };
    check("fallocate", result.into()).map(drop)
}

/// Is this a file in memory (tmpfs)? Source: fstatfs(2).
pub fn is_in_memory(fd: impl AsFd) -> bool {
    // SAFETY: zeroed is a valid statfs, and the kernel writes one on this stack.
    unsafe {
        let mut about: libc::statfs = std::mem::zeroed();
        libc::fstatfs(fd.as_fd().as_raw_fd(), &mut about) == 0 && about.f_type == libc::TMPFS_MAGIC
    }
}

/// ftruncate(2).
pub fn truncate(fd: impl AsFd, len: u64) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("ftruncate", unsafe { libc::ftruncate(fd.as_fd().as_raw_fd(), len as i64) }.into()).map(drop)
}

/// The ranges of bytes that are no holes. Moves the position of `fd`.
///
/// Source: lseek(2) SEEK_DATA, SEEK_HOLE.
pub fn data(fd: impl AsFd) -> Result<Vec<std::ops::Range<u64>>, Errno> {
    let mut ranges = Vec::new();
    let mut at = 0;
    loop {
        let start = match seek(&fd, at as i64, libc::SEEK_DATA) {
            Ok(start) => start,
            Err(error) if error.code == libc::ENXIO => return Ok(ranges),
            Err(error) => return Err(error),
        };
        at = seek(&fd, start as i64, libc::SEEK_HOLE)?;
        ranges.push(start..at);
    }
}

/// Lets the number of `fd` stand for what `other` stands for. Source: dup3(2).
pub fn replace(fd: &OwnedFd, other: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: integers only; the number stays that of the owner.
    let result = unsafe { libc::dup3(other.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) };
    check("dup3", result.into()).map(drop)
}

/// Locks a range for its open file description, without waiting; `range` is a `struct flock`.
///
/// # Errors
/// `EAGAIN` when somebody else has it; `EINVAL` for what is no range. Source: fcntl_locking(2) F_OFD_SETLK.
pub fn lock(fd: impl AsFd, range: &[u8]) -> Result<(), Errno> {
    if range.len() != size_of::<libc::flock>() {
        return Err(Errno { call: "fcntl", code: libc::EINVAL });
    }
    // SAFETY: the kernel reads a struct flock, as long as the borrowed bytes are.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, range.as_ptr()) };
    check("fcntl", result.into()).map(drop)
}

/// fchmod(2).
pub fn chmod(fd: impl AsFd, mode: u32) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("fchmod", unsafe { libc::fchmod(fd.as_fd().as_raw_fd(), mode) }.into()).map(drop)
}

/// fchown(2).
pub fn chown(fd: impl AsFd, uid: u32, gid: u32) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("fchown", unsafe { libc::fchown(fd.as_fd().as_raw_fd(), uid, gid) }.into()).map(drop)
}

/// Standard input, output or error as a descriptor of its own, when it is a terminal.
pub fn standard_terminal(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: integers only; the duplicate is new and ours alone.
    unsafe {
        if libc::isatty(number) != 1 {
            return None;
        }
        owned("fcntl", libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3).into()).ok()
    }
}

/// A duplicate with the lowest free number from `lowest` on, which an executed program keeps.
///
/// Source: fcntl(2) F_DUPFD.
pub fn duplicate_from(fd: impl AsFd, lowest: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    owned("fcntl", unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_DUPFD, lowest) }.into())
}
