//! Things that a dump has to refuse, and whether this kernel has them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use nix::unistd::Pid;

use super::call::check;
use super::memory::Map;
use super::process::Child;

fn owned(result: i64) -> io::Result<OwnedFd> {
    let Ok(fd @ 0..) = i32::try_from(result) else { return Err(io::Error::last_os_error()) };
    // SAFETY: the kernel has just made this descriptor for the caller.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A ring of eight entries.
///
/// # Errors
/// Where the kernel has none or forbids it.
pub fn io_uring() -> io::Result<OwnedFd> {
    // struct io_uring_params is 120 bytes of integers.
    let mut parameters = [0_u64; 15];
    // SAFETY: the kernel reads and writes 120 bytes of a live local during the call.
    owned(unsafe { libc::syscall(libc::SYS_io_uring_setup, 8, &raw mut parameters) })
}

/// # Errors
/// Where the kernel has none or forbids it.
pub fn userfaultfd() -> io::Result<OwnedFd> {
    /// UFFD_USER_MODE_ONLY
    const USER_MODE_ONLY: i32 = 1;
    // SAFETY: takes an integer and touches no memory.
    owned(unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY) })
}

/// A counter of the processor time of this process, in software.
///
/// # Errors
/// Where the kernel has none or forbids it.
pub fn perf_event() -> io::Result<OwnedFd> {
    // struct perf_event_attr, version 0: type 1 (software), size 64, config 1 (task clock).
    let attributes: [u32; 16] = [1, 64, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: the kernel reads 64 bytes of a live local during the call.
    owned(unsafe { libc::syscall(libc::SYS_perf_event_open, &raw const attributes, 0, -1, -1, 0) })
}

/// A probe on the first instruction of a function of this program. Source: perf_event_open(2); kernel/events/uprobes.c.
///
/// # Errors
/// Where the kernel has none or forbids it.
pub fn uprobe(function: fn()) -> io::Result<OwnedFd> {
    let kind = std::fs::read_to_string("/sys/bus/event_source/devices/uprobe/type")?;
    let kind: u32 = kind.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
    let address = function as usize;
    let mapping = super::procfs::mapping_at(address);
    let place = (address - mapping.start) as u64 + mapping.offset;
    let path = std::ffi::CString::new(mapping.name).map_err(|_| io::ErrorKind::InvalidData)?;
    // struct perf_event_attr, version 1: type, size 72; config1 is the path, config2 the place in the file.
    let mut attributes = [0_u64; 9];
    attributes[0] = u64::from(kind) | 72 << 32;
    attributes[7] = path.as_ptr() as u64;
    attributes[8] = place;
    // SAFETY: the kernel reads 72 bytes of a live local, and the path that it points to, during the call.
    owned(unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0) })
}

/// # Errors
/// Why not.
pub fn has_uprobes() -> Result<(), String> {
    reason("probe in user space", uprobe(|| ()))
}

/// # Errors
/// Where the kernel does not describe its types, so that its tracing cannot be asked.
pub fn tells_types() -> Result<(), String> {
    reason("types of the kernel", std::fs::File::open("/sys/kernel/btf/vmlinux"))
}

/// # Errors
/// Why not.
pub fn has_io_uring_and_types() -> Result<(), String> {
    has_io_uring().and_then(|()| tells_types())
}

fn reason<T>(what: &str, tried: io::Result<T>) -> Result<(), String> {
    tried.map(|_| ()).map_err(|e| format!("no {what} here: {e}"))
}

/// # Errors
/// Why not.
pub fn has_io_uring() -> Result<(), String> {
    reason("io_uring", io_uring())
}

/// # Errors
/// Why not.
pub fn has_userfaultfd() -> Result<(), String> {
    reason("userfaultfd", userfaultfd())
}

/// # Errors
/// Why not.
pub fn has_perf_and_userfaultfd() -> Result<(), String> {
    has_perf_events().and_then(|()| has_userfaultfd())
}

/// # Errors
/// Why not.
pub fn has_perf_events() -> Result<(), String> {
    reason("perf_event_open", perf_event())
}

/// # Errors
/// Why not.
pub fn has_namespaces() -> Result<(), String> {
    for kind in ["pid_for_children", "user", "time_for_children"] {
        let path = format!("/proc/self/ns/{kind}");
        if !std::path::Path::new(&path).exists() {
            return Err(format!("this kernel has no {path}"));
        }
    }
    Ok(())
}

/// A child in the parent's memory, on a stack of its own, that ends when a file appears.
///
/// It makes plain system calls only: the C library's state belongs to the parent.
#[track_caller]
pub fn clone_with_memory(file: &CStr) -> Child {
    let stack = Map::private(64 * 1024);
    let argument = Box::leak(Box::new(file.to_owned()));
    // SAFETY: the stack is a mapping that is never unmapped; the argument is leaked; the function runs no code
    // that uses thread-local storage but errno, which the parent does not read meanwhile.
    let pid = unsafe {
        libc::clone(
            wait_for_file,
            (stack.address + stack.length) as *mut libc::c_void,
            libc::CLONE_VM | libc::SIGCHLD,
            argument.as_ptr().cast_mut().cast(),
        )
    };
    Child { pid: Pid::from_raw(check("clone", pid)) }
}

extern "C" fn wait_for_file(path: *mut libc::c_void) -> i32 {
    let pause = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
    // SAFETY: the path is a leaked string; both calls only read their arguments, which live on.
    unsafe {
        while libc::access(path.cast(), libc::F_OK) != 0 {
            libc::nanosleep(&raw const pause, std::ptr::null_mut());
        }
    }
    0
}

/// Waits in the kernel, as vfork(2) does, for a child that ends when a file appears.
#[track_caller]
pub fn vfork_and_wait_for(file: &CStr) {
    let stack = Map::private(64 * 1024);
    // SAFETY: as in `clone_with_memory`; this thread is blocked while the child runs.
    let pid = unsafe {
        libc::clone(
            wait_for_file,
            (stack.address + stack.length) as *mut libc::c_void,
            libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
            file.as_ptr().cast_mut().cast(),
        )
    };
    Child { pid: Pid::from_raw(check("clone", pid)) }.succeed();
}

/// Ends the calling thread alone, even if it is the first one.
pub fn end_this_thread() -> ! {
    // SAFETY: exit(2) ends this thread; its stack stays mapped, so what other threads borrow from it lives on.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    super::exit_now(1)
}

/// A packet socket with a ring of four blocks, and how many bytes that is. Source: packet(7) PACKET_RX_RING.
#[track_caller]
pub fn packet_ring() -> (OwnedFd, usize) {
    const PACKET_RX_RING: i32 = 5;
    // struct tpacket_req: size and number of blocks, size and number of frames.
    let request: [u32; 4] = [4096, 4, 2048, 8];
    // SAFETY: integers only.
    let socket = owned(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0) }.into()).expect("socket");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
    let length = size_of_val(&request) as u32;
    // SAFETY: the kernel reads the request, a live local.
    let result =
        unsafe { libc::setsockopt(fd, libc::SOL_PACKET, PACKET_RX_RING, request.as_ptr().cast(), length) };
    check("PACKET_RX_RING", result);
    (socket, 4 * 4096)
}
