//! A world of its own for each trial: fresh pid, mount, network, IPC and UTS namespaces.
//!
//! Restored pids never collide with anything outside, and whatever a trial leaves behind (processes, mounts,
//! sockets) ends with the first process of the pid namespace, which is the harness itself.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::ForkResult;

use crate::sys;

/// Runs `body` as process 1 of fresh namespaces, with a tmpfs at `directory`, and returns its exit status.
///
/// Must be called while this process has one thread. The inner process dies with this one.
///
/// # Errors
/// When a namespace cannot be made; the inner half panics instead, which the outer one sees as a status.
pub fn enter(directory: &Path, body: impl FnOnce() -> i32) -> io::Result<i32> {
    sys::call::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL as u64, 0, 0, 0]);
    unshare(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS,
    )?;
    // SAFETY: this process has one thread, so the child's copy of the heap and of every lock is whole; it
    // never returns from the arm below.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => match waitpid(child, None)? {
            WaitStatus::Exited(_, status) => Ok(status),
            other => Err(io::Error::other(format!("the namespace's first process ended with {other:?}"))),
        },
        ForkResult::Child => {
            sys::call::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL as u64, 0, 0, 0]);
            furnish(directory).expect("furnish the namespaces");
            sys::exit_now(body())
        }
    }
}

/// Runs `body` as process 1 of a further pid namespace, with mounts and IPC of its own, beside what goes on here; returns
/// the pid of the process whose status is that of the body.
///
/// Must be called while this process has one thread. Its pids begin above those of a tree that comes from here.
///
/// # Errors
/// When no process can be made; what fails later is status 2.
pub fn beside(body: impl FnOnce() -> i32) -> io::Result<i32> {
    apart(CloneFlags::empty(), body)
}

/// The same with a network of its own, which has nothing but `lo`.
///
/// # Errors
/// As [`beside`].
pub fn far(body: impl FnOnce() -> i32) -> io::Result<i32> {
    apart(CloneFlags::CLONE_NEWNET, || match raise_loopback() {
        Ok(()) => body(),
        Err(error) => {
            println!("set lo up: {error}");
            2
        }
    })
}

fn apart(more: CloneFlags, body: impl FnOnce() -> i32) -> io::Result<i32> {
    let inner = || -> io::Result<i32> {
        sys::call::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL as u64, 0, 0, 0]);
        // Unshared by a process of its own: this one's other children stay where they are.
        unshare(CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | more)?;
        // SAFETY: as in `enter`.
        match unsafe { nix::unistd::fork() }? {
            ForkResult::Parent { child } => match waitpid(child, None)? {
                WaitStatus::Exited(_, status) => Ok(status),
                other => Err(io::Error::other(format!("the first process there ended with {other:?}"))),
            },
            ForkResult::Child => {
                sys::call::prctl(libc::PR_SET_PDEATHSIG, [libc::SIGKILL as u64, 0, 0, 0]);
                let nothing: Option<&str> = None;
                mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
                mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), nothing)?;
                fs::write("/proc/sys/kernel/ns_last_pid", "5000")?;
                sys::exit_now(body())
            }
        }
    };
    // SAFETY: as in `enter`.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => sys::exit_now(inner().unwrap_or_else(|error| {
            println!("run something beside: {error}");
            2
        })),
    }
}

/// Mounts what the tools expect, in the new mount namespace only.
fn furnish(directory: &Path) -> io::Result<()> {
    let nothing: Option<&str> = None;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), nothing)?;
    // The tool may keep a cache of the kernel's features under /run; the machine's own stays as it is.
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    fs::create_dir_all(directory)?;
    mount(Some("tmpfs"), directory, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    // A pty must not be shared with the machine: its index would be taken at the restore.
    mount(
        Some("devpts"),
        "/dev/pts",
        Some("devpts"),
        MsFlags::empty(),
        Some("newinstance,ptmxmode=0666,mode=620"),
    )?;
    raise_loopback()
}

/// Sets `lo` up: in a new network namespace it is down.
fn raise_loopback() -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, a live local, during the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
