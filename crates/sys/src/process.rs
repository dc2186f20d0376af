//! Processes: pidfds, comparison, limits, scheduling, waiting, killing.

use crate::call::{check, syscall};
use model::Errno;
use std::cmp::Ordering;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// A descriptor that names a process. Source: pidfd_open(2).
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    pidfd_open_with(pid, 0)
}

/// The same with flags: PIDFD_NONBLOCK, PIDFD_THREAD.
pub fn pidfd_open_with(pid: i32, flags: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    let fd = unsafe { syscall("pidfd_open", libc::SYS_pidfd_open, &[pid as u64, flags.into()]) }?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A child, as after fork(2) with these flags of clone(2), with this id if it is not zero; returns zero in the child.
///
/// Threads of ours that work for a moment may have the id: then it is waited for their end.
///
/// # Errors
/// `EEXIST` when somebody else has the id. Source: clone3(2).
///
/// # Safety
/// Other threads may have held any lock: what the child does must be sound in a copy of this one alone.
pub(crate) unsafe fn fork(pid: i32, flags: i32) -> Result<i32, Errno> {
    /// A thread that stays has it.
    const LONG: Duration = Duration::from_secs(1);
    let ids = [pid];
    // SAFETY: integers, for which zero is valid.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    (args.flags, args.exit_signal) = (flags as u64, libc::SIGCHLD as u64);
    if pid != 0 {
        (args.set_tid, args.set_tid_size) = (ids.as_ptr() as u64, 1);
    }
    let is_ours = || pid != own_pid() && Path::new(&format!("/proc/self/task/{pid}")).exists();
    let begun = Instant::now();
    loop {
        // SAFETY: without CLONE_VM and with a null stack this is fork(2); the kernel reads the arguments and one id, which
        // live for the call.
        let made = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
        match check("clone3", made) {
            Err(error) if error.code == libc::EEXIST && begun.elapsed() < LONG && is_ours() => {
                std::thread::yield_now();
            }
            made => return made.map(|child| child as i32),
        }
    }
}

/// A child with this id, if it is not zero.
///
/// # Safety
/// `body` may not touch what another thread could have locked, and allocates nothing.
unsafe fn fork_as(pid: i32, body: fn() -> !) -> Result<i32, Errno> {
    // SAFETY: as promised for `body`.
    match unsafe { fork(pid, 0) }? {
        0 => body(),
        child => Ok(child),
    }
}

/// A pidfd, with these flags, of a process that has ended and has been waited for.
///
/// # Errors
/// Those of clone3(2), pidfd_open(2) and waitpid(2).
pub fn pidfd_of_nobody(flags: u32) -> Result<OwnedFd, Errno> {
    fn end() -> ! {
        // SAFETY: does not return, and touches no memory.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: the child ends at once.
    let pid = unsafe { fork_as(0, end) }?;
    let pidfd = pidfd_open_with(pid, flags);
    wait(pid, true)?;
    pidfd
}

/// A process of ours that has a certain id and does nothing; dropping it ends it.
#[derive(Debug)]
pub struct StandIn(i32);

impl StandIn {
    /// # Errors
    /// `EEXIST` when somebody has the id.
    pub fn new(pid: i32) -> Result<StandIn, Errno> {
        fn rest() -> ! {
            // SAFETY: integers only. Should we be gone before this, nobody is left to wait for.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                // SAFETY: touches no memory.
                unsafe { libc::pause() };
            }
        }
        // SAFETY: the child makes two system calls.
        unsafe { fork_as(pid, rest) }.map(StandIn)
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = kill(self.0, libc::SIGKILL);
        let _ = wait(self.0, true);
    }
}

/// A duplicate of descriptor `fd` of the process, with close-on-exec set here.
///
/// # Errors
/// `EBADF` when the process has no such descriptor; `EPERM` without PTRACE_MODE_ATTACH_REALCREDS.
///
/// Source: pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: impl AsFd, fd: i32) -> Result<OwnedFd, Errno> {
    let args = [pidfd.as_fd().as_raw_fd() as u64, fd as u64, 0];
    // SAFETY: integers only.
    let fd = unsafe { syscall("pidfd_getfd", libc::SYS_pidfd_getfd, &args) }?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Frees the memory of processes that were killed, while they do the same themselves. Returns when nothing is left to
/// free.
///
/// Source: process_mrelease(2), Linux 5.15.
pub fn help_to_end(pids: impl Iterator<Item = i32>) {
    for pidfd in pids.filter_map(|pid| pidfd_open(pid).ok()) {
        let args = [pidfd.as_raw_fd() as u64, 0];
        // SAFETY: integers only. It is no failure when the process has ended already.
        let _ = unsafe { syscall("process_mrelease", libc::SYS_process_mrelease, &args) };
    }
}

/// What [`kcmp`] compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Kcmp {
    File = 0,
    Vm = 1,
    Files = 2,
    Fs = 3,
    Sighand = 4,
}

/// Compares kernel objects of two processes; `a` and `b` are descriptors for `Kcmp::File`, else unused.
///
/// The order is total and stable while both objects live, so that objects can be sorted by it.
///
/// # Errors
/// `EPERM` without PTRACE_MODE_READ_REALCREDS over both; `EBADF`; `ENOSYS` without `CONFIG_KCMP`.
///
/// Source: kcmp(2); kernel/kcmp.c.
pub fn kcmp(what: Kcmp, (pid_a, a): (i32, i32), (pid_b, b): (i32, i32)) -> Result<Ordering, Errno> {
    let args = [pid_a as u64, pid_b as u64, what as u64, a as u64, b as u64];
    // SAFETY: integers only.
    match unsafe { syscall("kcmp", libc::SYS_kcmp, &args) }? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        _ => Ok(Ordering::Greater),
    }
}

/// Does `fd` in the epoll set `epoll` of `pid` refer to the open file `pid`'s descriptor `file`?
///
/// `offset` tells apart several entries of one number. Source: kcmp(2) KCMP_EPOLL_TFD.
pub fn kcmp_epoll(pid: i32, file: i32, epoll: i32, target: u32, offset: u32) -> Result<bool, Errno> {
    const KCMP_EPOLL_TFD: u64 = 7;
    let slot = [epoll as u32, target, offset];
    let args = [pid as u64, pid as u64, KCMP_EPOLL_TFD, file as u64, slot.as_ptr() as u64];
    // SAFETY: the kernel reads the slot of three words, which lives for the call.
    unsafe { syscall("kcmp", libc::SYS_kcmp, &args) }.map(|order| order == 0)
}

/// Sends a signal to a process. Source: kill(2).
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("kill", unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// How a child ended, or `None` when it has not.
///
/// The status is as in wait(2). Reaps it. Source: waitpid(2).
pub fn wait(pid: i32, block: bool) -> Result<Option<i32>, Errno> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: the kernel writes one integer on this stack.
        match check("waitpid", unsafe { libc::waitpid(pid, &mut status, flags) }.into()) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(status)),
            Err(error) if error.code == libc::EINTR => {}
            Err(error) => return Err(error),
        }
    }
}

/// Soft and hard limit. Source: getrlimit(2).
pub fn own_limit(resource: u32) -> Result<(u64, u64), Errno> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit on this stack.
    check("getrlimit", unsafe { libc::getrlimit(resource, &mut limit) }.into())?;
    Ok((limit.rlim_cur, limit.rlim_max))
}

/// Sets the soft limit of this process, up to the hard one. Source: setrlimit(2).
pub fn set_own_soft_limit(resource: u32, soft: u64) -> Result<(), Errno> {
    let (_, hard) = own_limit(resource)?;
    let limit = libc::rlimit { rlim_cur: soft.min(hard), rlim_max: hard };
    // SAFETY: the kernel reads one rlimit on this stack.
    check("setrlimit", unsafe { libc::setrlimit(resource, &limit) }.into()).map(drop)
}

/// Scheduling of one thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sched {
    /// SCHED_OTHER, SCHED_FIFO, ... with SCHED_RESET_ON_FORK.
    pub policy: u32,
    /// -20 to 19.
    pub nice: i32,
    /// 1 to 99 for the real-time policies, else 0.
    pub priority: u32,
}

/// Source: sched_getattr(2).
pub fn sched(tid: i32) -> Result<Sched, Errno> {
    let mut attr = [0u32; 14];
    let args = [tid as u64, attr.as_mut_ptr() as u64, size_of_val(&attr) as u64, 0];
    // SAFETY: the kernel writes at most the size given into the array on this stack.
    unsafe { syscall("sched_getattr", libc::SYS_sched_getattr, &args) }?;
    // size, policy, flags (64 bits), nice, priority, ...
    let reset_on_fork = if attr[2] & 1 != 0 { libc::SCHED_RESET_ON_FORK as u32 } else { 0 };
    Ok(Sched { policy: attr[1] | reset_on_fork, nice: attr[4] as i32, priority: attr[5] })
}

/// The processors that a thread may run on, bit n of byte m for number 8m + n; of the calling thread when
/// `tid` is zero. Source: sched_getaffinity(2).
pub fn affinity(tid: i32) -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    let args = [tid as u64, mask.len() as u64, mask.as_mut_ptr() as u64];
    // SAFETY: the kernel writes at most the size given into the buffer.
    let length = unsafe { syscall("sched_getaffinity", libc::SYS_sched_getaffinity, &args) }?;
    mask.truncate(length as usize);
    Ok(mask)
}

/// Has a thread the processors and the share of them that this one has. Source: sched_setaffinity(2), sched_setattr(2).
///
/// # Errors
/// `EPERM` when it is not ours to change.
pub fn work_as_this(tid: i32) -> Result<(), Errno> {
    let mask = affinity(0)?;
    let args = [tid as u64, mask.len() as u64, mask.as_ptr() as u64];
    // SAFETY: the kernel reads the mask, which lives for the call.
    unsafe { syscall("sched_setaffinity", libc::SYS_sched_setaffinity, &args) }?;
    let mut attr = [0u8; 56];
    let args = [0, attr.as_mut_ptr() as u64, attr.len() as u64, 0];
    // SAFETY: the kernel writes at most the size given into the array on this stack.
    unsafe { syscall("sched_getattr", libc::SYS_sched_getattr, &args) }?;
    let args = [tid as u64, attr.as_ptr() as u64, 0];
    // SAFETY: the kernel reads the structure, whose first word is its size.
    unsafe { syscall("sched_setattr", libc::SYS_sched_setattr, &args) }.map(drop)
}

/// How many processors are online. Asked once. Source: sysconf(3).
pub fn processors() -> u32 {
    static COUNT: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    // SAFETY: takes a number and touches nothing.
    *COUNT.get_or_init(|| unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as u32)
}

/// How late the timers of this thread may be, in nanoseconds. Source: prctl(2) PR_GET_TIMERSLACK.
pub fn own_timer_slack() -> u64 {
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_GET_TIMERSLACK) }.max(0) as u64
}

/// The securebits of this thread. Source: capabilities(7).
pub fn own_securebits() -> u32 {
    // SAFETY: integers only.
    unsafe { libc::prctl(libc::PR_GET_SECUREBITS) }.max(0) as u32
}

/// Head and length of the robust futex list of a thread. Source: get_robust_list(2).
pub fn robust_list(tid: i32) -> Result<(u64, u64), Errno> {
    let (mut head, mut len) = (0u64, 0u64);
    let args = [tid as u64, &raw mut head as u64, &raw mut len as u64];
    // SAFETY: the kernel writes two words on this stack.
    unsafe { syscall("get_robust_list", libc::SYS_get_robust_list, &args) }?;
    Ok((head, len))
}

/// This thread's id. Source: gettid(2).
pub fn own_tid() -> i32 {
    // SAFETY: takes and touches nothing.
    unsafe { libc::gettid() }
}

/// This process's id. Source: getpid(2).
pub fn own_pid() -> i32 {
    std::process::id() as i32
}

/// Session id and process group of this process. Source: getsid(2), getpgid(2).
pub fn own_session() -> (i32, i32) {
    // SAFETY: integers only; cannot fail for oneself.
    unsafe { (libc::getsid(0), libc::getpgid(0)) }
}

/// Bytes that programs can get before the host swaps.
pub fn available_memory() -> Option<u64> {
    crate::proc::parse_available(&crate::fd::text("/proc/meminfo").ok()?)
}

/// Leaves the session and the terminal of whoever started this program. Source: setsid(2).
pub fn lead_session() {
    // SAFETY: touches no memory. A leader of a group cannot, and needs not: it is its own already.
    unsafe { libc::setsid() };
}
