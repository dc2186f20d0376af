//! Does this kernel, as this user, have what we use? Each question is asked by doing the thing, never
//! by comparing versions: distributions carry features backwards, and configurations leave them out.
//!
//! Nothing here is asked at the start of a run; `check` calls them by name.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

/// What the kernel lacks, or refuses to this user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    Errno {
        call: &'static str,
        errno: i32,
    },
    /// The call works, the answer is not the right one.
    Answer(&'static str),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Missing::Errno { call, errno } => write!(f, "{call}: {}", io::Error::from_raw_os_error(*errno)),
            Missing::Answer(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Missing {}

/// The answer to one question.
pub type Answer = Result<(), Missing>;

fn failed(call: &'static str) -> Missing {
    Missing::Errno { call, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

fn check(call: &'static str, result: libc::c_long) -> Result<libc::c_long, Missing> {
    if result < 0 { Err(failed(call)) } else { Ok(result) }
}

fn io_failed(call: &'static str) -> impl Fn(io::Error) -> Missing {
    move |error| Missing::Errno { call, errno: error.raw_os_error().unwrap_or(0) }
}

fn owned(call: &'static str, fd: libc::c_int) -> Result<OwnedFd, Missing> {
    check(call, fd.into())?;
    // SAFETY: the kernel has just made this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn page_size() -> usize {
    // SAFETY: sysconf(3) reads a constant and touches no memory of ours.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// May the mappings of a process be opened below `/proc/PID/map_files`? Needs
/// `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` in the first user namespace.
///
/// Source: proc_pid_map_files(5).
pub fn map_files() -> Answer {
    let mut entries = fs::read_dir("/proc/self/map_files").map_err(io_failed("open /proc/self/map_files"))?;
    let Some(entry) = entries.next() else {
        return Err(Missing::Answer("/proc/self/map_files is empty"));
    };
    let entry = entry.map_err(io_failed("readdir /proc/self/map_files"))?;
    // Listing is allowed to everybody; following a link is what is asked for.
    fs::File::open(entry.path()).map(drop).map_err(io_failed("open in /proc/self/map_files"))
}

/// Does `/proc/PID/stat` have all 52 fields, with the addresses of the stack and the exit code?
pub fn proc_stat() -> Answer {
    let text = fs::read_to_string("/proc/self/stat").map_err(io_failed("read /proc/self/stat"))?;
    // The name in the second field may hold spaces and parentheses.
    let fields = text.rsplit_once(')').map_or(0, |(_, rest)| rest.split_whitespace().count() + 2);
    if fields < 52 {
        return Err(Missing::Answer("/proc/PID/stat has too few fields"));
    }
    Ok(())
}

fn fdinfo_has(fd: RawFd, key: &str, otherwise: &'static str) -> Answer {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).map_err(io_failed("read fdinfo"))?;
    match text.lines().any(|line| line.starts_with(key)) {
        true => Ok(()),
        false => Err(Missing::Answer(otherwise)),
    }
}

/// Does `fdinfo` tell position and flags?
pub fn fdinfo() -> Answer {
    let file = fs::File::open("/proc/self/stat").map_err(io_failed("open"))?;
    fdinfo_has(file.as_raw_fd(), "pos:", "fdinfo has no position")?;
    fdinfo_has(file.as_raw_fd(), "flags:", "fdinfo has no flags")
}

/// Does `fdinfo` tell the mount of a file?
pub fn mnt_id() -> Answer {
    let file = fs::File::open("/proc/self/stat").map_err(io_failed("open"))?;
    fdinfo_has(file.as_raw_fd(), "mnt_id:", "fdinfo has no mnt_id")
}

/// Does `status` tell the pid in every nested pid namespace?
pub fn ns_pid() -> Answer {
    let text = fs::read_to_string("/proc/self/status").map_err(io_failed("read /proc/self/status"))?;
    match text.lines().any(|line| line.starts_with("NSpid:")) {
        true => Ok(()),
        false => Err(Missing::Answer("/proc/PID/status has no NSpid")),
    }
}

/// Can two descriptors be compared?
///
/// Source: kcmp(2).
pub fn kcmp() -> Answer {
    const KCMP_FILE: libc::c_long = 0;
    let file = fs::File::open("/proc/self/stat").map_err(io_failed("open"))?;
    let (pid, fd) = (std::process::id() as libc::c_long, libc::c_long::from(file.as_raw_fd()));
    // SAFETY: kcmp(2) with KCMP_FILE takes five integers and touches no memory of ours.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, fd, fd) };
    match check("kcmp", order)? {
        0 => Ok(()),
        _ => Err(Missing::Answer("kcmp finds a descriptor different from itself")),
    }
}

/// Can the files that an epoll instance watches be compared?
///
/// Source: kcmp(2), `KCMP_EPOLL_TFD`.
pub fn kcmp_epoll() -> Answer {
    const KCMP_EPOLL_TFD: libc::c_long = 7;
    // Source: include/uapi/linux/kcmp.h
    #[repr(C)]
    struct Slot {
        epoll_fd: u32,
        watched_fd: u32,
        offset: u32,
    }
    // SAFETY: epoll_create1(2) takes an integer.
    let epoll = owned("epoll_create1", unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: eventfd(2) takes two integers.
    let event = owned("eventfd", unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) })?;
    let (epoll, event) = (epoll.as_raw_fd(), event.as_raw_fd());
    let mut wish = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 0 };
    // SAFETY: the kernel reads `wish`, which is on our stack, during the call only.
    let added = unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, event, &mut wish) };
    check("epoll_ctl", added.into())?;
    let slot = Slot { epoll_fd: epoll as u32, watched_fd: event as u32, offset: 0 };
    let pid = std::process::id();
    // SAFETY: the kernel reads `slot`, which is on our stack, during the call only.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, event, ptr::from_ref(&slot)) };
    match check("kcmp", order)? {
        0 => Ok(()),
        _ => Err(Missing::Answer("kcmp does not find the watched file")),
    }
}

/// Can brk, stack, arguments and the executable of a process be set in one call?
///
/// Source: PR_SET_MM(2const), `PR_SET_MM_MAP_SIZE`.
pub fn set_mm_map() -> Answer {
    // struct prctl_mm_map of include/uapi/linux/prctl.h: twelve addresses and two integers.
    const MM_MAP_SIZE: usize = 12 * 8 + 2 * 4;
    let mut size: libc::c_uint = 0;
    let nothing: libc::c_ulong = 0;
    // SAFETY: the kernel writes four bytes to `size`, which is on our stack, during the call only.
    let result = unsafe {
        libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP_SIZE, ptr::from_mut(&mut size), nothing, nothing)
    };
    check("prctl(PR_SET_MM_MAP_SIZE)", result.into())?;
    match size as usize >= MM_MAP_SIZE {
        true => Ok(()),
        false => Err(Missing::Answer("prctl(PR_SET_MM_MAP) takes a smaller structure")),
    }
}

/// Can a process be made with a chosen pid? Needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN` in the
/// user namespace that owns the pid namespace.
///
/// Asked with our own pid: a kernel that would do it answers that it is taken, and makes nothing.
///
/// Source: clone(2), clone3.
pub fn clone3_set_tid() -> Answer {
    let tids = [std::process::id() as libc::pid_t];
    // SAFETY: `clone_args` is a structure of integers, for which zero is a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD as u64;
    args.set_tid = ptr::from_ref(&tids) as u64;
    args.set_tid_size = tids.len() as u64;
    // SAFETY: the kernel reads `args` and `tids`, both on our stack, during the call. Should it make
    // a process against all reason, that is a copy of this one as after fork(2), and ends at once.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, ptr::from_ref(&args), size_of::<libc::clone_args>()) };
    match result {
        // SAFETY: _exit(2) touches no memory; it is what a forked child may always call.
        0 => unsafe { libc::_exit(0) },
        1.. => Err(Missing::Answer("clone3 ignores the wanted pid")),
        _ => match failed("clone3(set_tid)") {
            Missing::Errno { errno: libc::EEXIST, .. } => Ok(()),
            other => Err(other),
        },
    }
}

/// A mapping of our own with all pages touched; unmapped when dropped.
struct Pages {
    start: *mut libc::c_void,
    length: usize,
}

impl Pages {
    fn touched(count: usize) -> Result<Pages, Missing> {
        let length = count * page_size();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at a place the kernel chooses replaces nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, prot, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(failed("mmap"));
        }
        // SAFETY: the range was mapped writable just above and belongs to nobody else.
        unsafe { ptr::write_bytes(start.cast::<u8>(), 1, length) };
        Ok(Pages { start, length })
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range is ours since `touched`, and no reference into it was ever made.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_GUARD: u64 = 1 << 8;

/// How many ranges of `pages` are in one of the `wanted` categories?
fn scan(pages: &Pages, wanted: u64) -> Result<usize, Missing> {
    // Source: include/uapi/linux/fs.h, struct pm_scan_arg and struct page_region.
    #[repr(C)]
    #[derive(Default)]
    struct Arg {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        vec: u64,
        vec_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    #[repr(C)]
    #[derive(Default, Clone, Copy)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }
    const _: () = assert!(size_of::<Arg>() == 96 && size_of::<Region>() == 24);
    // _IOWR('f', 16, struct pm_scan_arg)
    const PAGEMAP_SCAN: libc::Ioctl = (3 << 30 | (size_of::<Arg>() << 16) | (b'f' as usize) << 8 | 16) as _;

    let file = fs::File::open("/proc/self/pagemap").map_err(io_failed("open /proc/self/pagemap"))?;
    let mut regions = [Region::default(); 4];
    let mut arg = Arg {
        size: size_of::<Arg>() as u64,
        start: pages.start as u64,
        end: pages.start as u64 + pages.length as u64,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_anyof_mask: wanted,
        return_mask: wanted,
        ..Arg::default()
    };
    // SAFETY: the kernel writes to `arg`, and to at most `vec_len` entries of `regions`; both are on
    // our stack and live until after the call.
    let count = unsafe { libc::ioctl(file.as_raw_fd(), PAGEMAP_SCAN, ptr::from_mut(&mut arg)) };
    check("ioctl(PAGEMAP_SCAN)", count.into()).map(|count| count as usize)
}

/// Can the kernel list the pages of a range that are there?
///
/// Source: Documentation/admin-guide/mm/pagemap.rst.
pub fn pagemap_scan() -> Answer {
    match scan(&Pages::touched(2)?, PAGE_IS_PRESENT)? {
        1 => Ok(()),
        _ => Err(Missing::Answer("PAGEMAP_SCAN does not find pages that are there")),
    }
}

fn userfault(
    flags: libc::c_int,
    ready: fn(OwnedFd) -> Result<crate::userfault::Userfault, model::Errno>,
) -> Answer {
    // SAFETY: takes a number and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
    let fd = owned("userfaultfd", fd as libc::c_int)?;
    ready(fd).map(drop).map_err(|error| Missing::Errno { call: error.call, errno: error.code })
}

/// Does the kernel note which pages are written? By write protection, which needs no soft-dirty bits.
///
/// Source: Documentation/admin-guide/mm/userfaultfd.rst, `UFFD_FEATURE_WP_ASYNC`.
pub fn mem_dirty_track() -> Answer {
    userfault(crate::userfault::USER_MODE_ONLY, crate::userfault::Userfault::tracking)
}

/// Can memory come when it is touched, also by the kernel?
///
/// Source: userfaultfd(2).
pub fn uffd() -> Answer {
    userfault(0, crate::userfault::Userfault::new)
}

/// Does the kernel tell of what happens to such memory: fork, moves, unmapping?
///
/// Source: userfaultfd(2), non-cooperative mode.
pub fn uffd_noncoop() -> Answer {
    userfault(libc::O_NONBLOCK, crate::userfault::Userfault::telling)
}

/// Can guard pages be set, and found again?
///
/// Source: madvise(2), `MADV_GUARD_INSTALL`; Documentation/admin-guide/mm/pagemap.rst.
pub fn pagemap_scan_guard_pages() -> Answer {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    let pages = Pages::touched(2)?;
    // SAFETY: the range is ours, and nothing reads or writes it again before it is unmapped.
    let result = unsafe { libc::madvise(pages.start, page_size(), MADV_GUARD_INSTALL) };
    check("madvise(MADV_GUARD_INSTALL)", result.into())?;
    match scan(&pages, PAGE_IS_GUARD)? {
        1 => Ok(()),
        _ => Err(Missing::Answer("PAGEMAP_SCAN does not find guard pages")),
    }
}

/// Can a fresh vdso be mapped where it is wanted? Asked with the vdso in place: a kernel that would do
/// it answers that there is one.
///
/// Source: arch/x86/entry/vdso/vma.c; arch_prctl(2).
#[cfg(target_arch = "x86_64")]
pub fn can_map_vdso() -> Answer {
    const ARCH_MAP_VDSO_64: libc::c_long = 0x2003;
    // SAFETY: with a vdso already mapped, which is so in every process that was exec'ed, the call
    // ends with EEXIST before it looks at the address.
    let result = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_MAP_VDSO_64, 0_usize) };
    match check("arch_prctl(ARCH_MAP_VDSO_64)", result) {
        Err(Missing::Errno { errno: libc::EEXIST, .. }) => Ok(()),
        Err(other) => Err(other),
        Ok(_) => Err(Missing::Answer("this process has no vdso")),
    }
}

/// Can a fresh vdso be mapped where it is wanted? There is no such call on this architecture.
#[cfg(not(target_arch = "x86_64"))]
pub fn can_map_vdso() -> Answer {
    Err(Missing::Answer("there is no such call on this architecture"))
}

/// Can a POSIX timer be made with a chosen id? Older kernels have a slower way.
///
/// Source: PR_TIMER_CREATE_RESTORE_IDS(2const).
pub fn timer_cr_ids() -> Answer {
    const PR_TIMER_CREATE_RESTORE_IDS: libc::c_int = 77;
    const GET: libc::c_ulong = 2;
    let nothing: libc::c_ulong = 0;
    // SAFETY: takes five integers and touches no memory of ours.
    let result = unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, nothing, nothing, nothing) };
    check("prctl(PR_TIMER_CREATE_RESTORE_IDS)", result.into()).map(drop)
}

/// Can timerfds be told how often they have run out, and do they tell their setting?
///
/// Source: timerfd_create(2), `TFD_IOC_SET_TICKS`.
pub fn timerfd() -> Answer {
    // _IOW('T', 0, u64)
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400_u32 as _;
    // SAFETY: timerfd_create(2) takes two integers.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) };
    let timer = owned("timerfd_create", fd)?;
    fdinfo_has(timer.as_raw_fd(), "it_value:", "fdinfo of a timerfd has no it_value")?;
    let ticks = 1_u64;
    // SAFETY: the kernel reads eight bytes from `ticks`, which is on our stack, during the call only.
    let result = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, ptr::from_ref(&ticks)) };
    check("ioctl(TFD_IOC_SET_TICKS)", result.into()).map(drop)
}

/// Can pseudoterminals be made, opened from their masters, and given input?
///
/// Source: ioctl_tty(2), TIOCGPTPEER, TIOCSTI.
pub fn terminals() -> Answer {
    let explain = |error: model::Errno| Missing::Errno { call: error.call, errno: error.code };
    let ask = || {
        let master = crate::fd::open(std::path::Path::new("/dev/ptmx"), libc::O_RDWR)?;
        crate::tty::set_locked(&master, false)?;
        let slave = crate::tty::peer(&master, libc::O_RDWR)?;
        crate::tty::put_in(&slave, b'x')
    };
    ask().map_err(explain)
}

/// Can SysV shared memory be made with a wanted id? Needs `CONFIG_CHECKPOINT_RESTORE`.
///
/// Source: `kernel.shm_next_id`, which is opened for writing and left as it is.
pub fn shm_next_id() -> Answer {
    let file = fs::OpenOptions::new().write(true).open("/proc/sys/kernel/shm_next_id");
    file.map(drop).map_err(io_failed("open"))
}

/// Can the data that waits in a socket be read without taking it?
///
/// Source: socket(7), `SO_PEEK_OFF`.
pub fn peek_offset() -> Answer {
    let (one, _other) = std::os::unix::net::UnixStream::pair().map_err(io_failed("socketpair"))?;
    let offset: libc::c_int = 0;
    // SAFETY: the kernel reads the four bytes of `offset`, on our stack, during the call only.
    let result = unsafe {
        libc::setsockopt(
            one.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            ptr::from_ref(&offset).cast(),
            size_of_val(&offset) as libc::socklen_t,
        )
    };
    check("setsockopt(SO_PEEK_OFF)", result.into()).map(drop)
}

/// Does the kernel list UNIX sockets?
///
/// Source: sock_diag(7).
pub fn sock_diag() -> Answer {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const UDIAG_SHOW_PEER: u32 = 4;
    // Source: include/uapi/linux/netlink.h and unix_diag.h.
    #[repr(C)]
    struct Request {
        length: u32,
        kind: u16,
        flags: u16,
        sequence: u32,
        port: u32,
        family: u8,
        protocol: u8,
        pad: u16,
        states: u32,
        inode: u32,
        show: u32,
        cookie: [u32; 2],
    }
    const _: () = assert!(size_of::<Request>() == 40);
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket(2) takes three integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) };
    let socket = owned("socket(NETLINK_SOCK_DIAG)", fd)?;
    // At least one must be listed, or "none" would look like "not there".
    let _listed = std::os::unix::net::UnixStream::pair().map_err(io_failed("socketpair"))?;
    let request = Request {
        length: size_of::<Request>() as u32,
        kind: SOCK_DIAG_BY_FAMILY,
        flags: (libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16,
        sequence: 1,
        port: 0,
        family: libc::AF_UNIX as u8,
        protocol: 0,
        pad: 0,
        states: u32::MAX,
        inode: 0,
        show: UDIAG_SHOW_PEER,
        cookie: [0; 2],
    };
    // SAFETY: the kernel reads `request`, on our stack, during the call only.
    let sent =
        unsafe { libc::send(socket.as_raw_fd(), ptr::from_ref(&request).cast(), size_of::<Request>(), 0) };
    check("send", sent as libc::c_long)?;
    let mut reply = [0_u8; 8192];
    // SAFETY: the kernel writes at most the length of `reply`, on our stack, during the call only.
    let received = unsafe { libc::recv(socket.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), 0) };
    let received = check("recv", received as libc::c_long)? as usize;
    match received >= 6 && u16::from_ne_bytes([reply[4], reply[5]]) == SOCK_DIAG_BY_FAMILY {
        true => Ok(()),
        false => Err(Missing::Answer("the kernel does not list UNIX sockets")),
    }
}

/// Can a descriptor of another process be copied?
///
/// Source: pidfd_open(2), pidfd_getfd(2).
pub fn pidfd_getfd() -> Answer {
    let file = fs::File::open("/proc/self/stat").map_err(io_failed("open"))?;
    // SAFETY: pidfd_open(2) takes two integers.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    let pidfd = owned("pidfd_open", pidfd as libc::c_int)?;
    // SAFETY: pidfd_getfd(2) takes three integers.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), file.as_raw_fd(), 0) };
    owned("pidfd_getfd", copy as libc::c_int).map(drop)
}

/// Can a path be opened with limits on how it is resolved?
///
/// Source: openat2(2).
pub fn openat2() -> Answer {
    // SAFETY: `open_how` is a structure of integers, for which zero is a value.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_NO_SYMLINKS;
    // SAFETY: the kernel reads the path, a constant, and `how`, on our stack, during the call only.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            ptr::from_ref(&how),
            size_of::<libc::open_how>(),
        )
    };
    owned("openat2", fd as libc::c_int).map(drop)
}

/// A child that does nothing but wait, to try ptrace(2) on; killed and collected when dropped.
struct Waiting(libc::pid_t);

impl Waiting {
    fn start() -> Result<Waiting, Missing> {
        // SAFETY: the child calls nothing but pause(2) and _exit(2), which are safe after a fork
        // even of a program with threads.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: touches no memory. It returns only after a handled signal.
                unsafe { libc::pause() };
            },
            pid => check("fork", pid.into()).map(|_| Waiting(pid)),
        }
    }

    fn seize(&self, options: libc::c_int) -> Answer {
        let nothing = ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_SEIZE takes integers only; the child is ours.
        let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, self.0, nothing, options as libc::c_long) };
        check("ptrace(PTRACE_SEIZE)", result).map(drop)
    }

    /// Stops the seized child, so that it can be asked.
    fn stop(&self) -> Answer {
        let nothing = ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_INTERRUPT takes no memory.
        check("ptrace(PTRACE_INTERRUPT)", unsafe {
            libc::ptrace(libc::PTRACE_INTERRUPT, self.0, nothing, nothing)
        })?;
        let mut status = 0;
        // SAFETY: the kernel writes four bytes to `status`, on our stack, during the call only.
        check("waitpid", unsafe { libc::waitpid(self.0, &mut status, libc::__WALL) }.into())?;
        match libc::WIFSTOPPED(status) {
            true => Ok(()),
            false => Err(Missing::Answer("a seized process does not stop")),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut status = 0;
        // SAFETY: the pid is that of our child, which is not collected before the waitpid here; the
        // kernel writes `status`, on our stack, during the call.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, &mut status, libc::__WALL);
        }
    }
}

/// Can a process be attached to without stopping it, then stopped, and asked for its signals?
///
/// Source: ptrace(2), `PTRACE_SEIZE`, `PTRACE_PEEKSIGINFO`.
pub fn ptrace_seize() -> Answer {
    // Source: include/uapi/linux/ptrace.h
    #[repr(C)]
    struct PeekArgs {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
    let child = Waiting::start()?;
    child.seize(libc::PTRACE_O_EXITKILL)?;
    child.stop()?;
    let args = PeekArgs { offset: 0, flags: 0, count: 1 };
    // SAFETY: `siginfo_t` is plain data, for which zero is a value.
    let mut signal: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel reads `args` and writes at most `count` entries to `signal`, both on our
    // stack, during the call only.
    let count = unsafe {
        libc::ptrace(PTRACE_PEEKSIGINFO, child.0, ptr::from_ref(&args), ptr::from_mut(&mut signal))
    };
    check("ptrace(PTRACE_PEEKSIGINFO)", count).map(drop)
}

/// Does the kernel tell where a thread has registered its restartable sequences?
///
/// Source: ptrace(2), `PTRACE_GET_RSEQ_CONFIGURATION`.
pub fn get_rseq_conf() -> Answer {
    const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    // struct ptrace_rseq_configuration: 24 bytes.
    let mut answer = [0_u64; 3];
    let child = Waiting::start()?;
    child.seize(libc::PTRACE_O_EXITKILL)?;
    child.stop()?;
    // SAFETY: the kernel writes at most the size given as third argument to `answer`, on our stack,
    // during the call only.
    let size = unsafe {
        libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, child.0, size_of_val(&answer), ptr::from_mut(&mut answer))
    };
    match check("ptrace(PTRACE_GET_RSEQ_CONFIGURATION)", size)? {
        24.. => Ok(()),
        _ => Err(Missing::Answer("the answer about restartable sequences is too short")),
    }
}

/// Can the system call filters of a process be suspended while we work in it?
///
/// Source: ptrace(2), `PTRACE_O_SUSPEND_SECCOMP`.
pub fn seccomp_suspend() -> Answer {
    Waiting::start()?.seize(libc::PTRACE_O_EXITKILL | libc::PTRACE_O_SUSPEND_SECCOMP)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that every kernel has which can build this program, and every user may ask.
    #[test]
    fn the_basic_interfaces_answer() {
        for (name, probe) in [
            ("proc_stat", proc_stat as fn() -> Answer),
            ("fdinfo", fdinfo),
            ("mnt_id", mnt_id),
            ("ns_pid", ns_pid),
            ("timerfd", timerfd),
            ("peek_offset", peek_offset),
        ] {
            assert_eq!(probe(), Ok(()), "{name}");
        }
    }

    #[test]
    fn every_other_probe_comes_to_an_end_and_leaves_nothing() {
        let children = || fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        for probe in [
            map_files as fn() -> Answer,
            kcmp,
            kcmp_epoll,
            set_mm_map,
            clone3_set_tid,
            pagemap_scan,
            pagemap_scan_guard_pages,
            can_map_vdso,
            timer_cr_ids,
            sock_diag,
            pidfd_getfd,
            openat2,
            ptrace_seize,
            get_rseq_conf,
            seccomp_suspend,
            terminals,
            shm_next_id,
        ] {
            // What this kernel or user lacks is an answer too; its text is for people.
            if let Err(missing) = probe() {
                eprintln!("{missing}");
                assert!(!missing.to_string().is_empty());
            }
        }
        assert_eq!(children(), "");
    }
}
