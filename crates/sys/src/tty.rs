//! Terminals, asked and set through a descriptor: ioctl_tty(2).
//!
//! A master of a pseudoterminal answers for its slave where a terminal has one state: termios, size, session.

use crate::call::check;
use model::Errno;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

const TCXONC: u32 = 0x540a;
const TIOCEXCL: u32 = 0x540c;
const TIOCSCTTY: u32 = 0x540e;
const TIOCSPGRP: u32 = 0x5410;
const TIOCSTI: u32 = 0x5412;
const TIOCGWINSZ: u32 = 0x5413;
const TIOCSWINSZ: u32 = 0x5414;
const TIOCPKT: u32 = 0x5420;
const TIOCNOTTY: u32 = 0x5422;
const TIOCGETD: u32 = 0x5424;
const TIOCGPTPEER: u32 = 0x5441;
const TIOCGLCKTRMIOS: u32 = 0x5456;
const TIOCSLCKTRMIOS: u32 = 0x5457;
const TCGETS2: u32 = 0x802c_542a;
const TCSETS2: u32 = 0x402c_542b;
const TIOCGPTN: u32 = 0x8004_5430;
const TIOCSPTLCK: u32 = 0x4004_5431;
const TIOCGDEV: u32 = 0x8004_5432;
const TIOCGPKT: u32 = 0x8004_5438;
const TIOCGPTLCK: u32 = 0x8004_5439;
const TIOCGEXCL: u32 = 0x8004_5440;

/// Requests that a task makes of its own terminal, for lists of operations.
pub const TAKE: u32 = TIOCSCTTY;
pub const LEAVE: u32 = TIOCNOTTY;
pub const SET_GROUP: u32 = TIOCSPGRP;

/// Line disciplines: the one that every terminal begins with.
pub const N_TTY: i32 = 0;

/// Control characters that have a number in [`Termios::cc`].
pub const VEOF: usize = 4;
pub const VMIN: usize = 6;
pub const VSTART: usize = 8;
pub const VSTOP: usize = 9;
pub const VEOL: usize = 11;
pub const VEOL2: usize = 16;

/// The kernel's `struct termios2`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Termios {
    pub iflag: u32,
    pub oflag: u32,
    pub cflag: u32,
    pub lflag: u32,
    pub line: u8,
    pub cc: [u8; 19],
    pub ispeed: u32,
    pub ospeed: u32,
}

const _: () = assert!(size_of::<Termios>() == 44);

/// The kernel's `struct winsize`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Winsize {
    pub rows: u16,
    pub columns: u16,
    pub x_pixels: u16,
    pub y_pixels: u16,
}

/// A request that reads or writes one `T`.
///
/// # Safety
/// The request must touch nothing but as many bytes, and any bytes must be a `T`.
unsafe fn exchange<T>(fd: impl AsFd, request: u32, value: &mut T) -> Result<(), Errno> {
    // SAFETY: the kernel touches the borrowed value alone, as the caller vouches.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as libc::Ioctl, &raw mut *value) };
    check("ioctl", result.into()).map(drop)
}

fn read_int(fd: impl AsFd, request: u32) -> Result<i32, Errno> {
    let mut value = 0i32;
    // SAFETY: the callers' requests write one int.
    unsafe { exchange(fd, request, &mut value) }?;
    Ok(value)
}

fn write_int(fd: impl AsFd, request: u32, mut value: i32) -> Result<(), Errno> {
    // SAFETY: the callers' requests read one int.
    unsafe { exchange(fd, request, &mut value) }
}

/// The number of a pseudoterminal, from its master.
///
/// # Errors
/// `ENOTTY` for what is no master. Source: TIOCGPTN.
pub fn index(master: impl AsFd) -> Result<u32, Errno> {
    read_int(master, TIOCGPTN).map(|index| index as u32)
}

/// The device that a terminal really is, also behind /dev/tty and /dev/console; of a master, its slave's.
///
/// # Errors
/// `EIO` once it has hung up. Source: TIOCGDEV.
pub fn device(fd: impl AsFd) -> Result<u32, Errno> {
    read_int(fd, TIOCGDEV).map(|device| device as u32)
}

/// Can the slave not be opened yet? Source: TIOCGPTLCK.
pub fn is_locked(master: impl AsFd) -> Result<bool, Errno> {
    read_int(master, TIOCGPTLCK).map(|locked| locked != 0)
}

/// Source: TIOCSPTLCK.
pub fn set_locked(master: impl AsFd, is_locked: bool) -> Result<(), Errno> {
    write_int(master, TIOCSPTLCK, is_locked.into())
}

/// Do reads from the master begin with a status? Source: TIOCGPKT.
pub fn is_packet_mode(master: impl AsFd) -> Result<bool, Errno> {
    read_int(master, TIOCGPKT).map(|on| on != 0)
}

/// Source: TIOCPKT.
pub fn set_packet_mode(master: impl AsFd, is_on: bool) -> Result<(), Errno> {
    write_int(master, TIOCPKT, is_on.into())
}

/// Can it not be opened again without privilege? Source: TIOCGEXCL.
pub fn is_exclusive(fd: impl AsFd) -> Result<bool, Errno> {
    read_int(fd, TIOCGEXCL).map(|on| on != 0)
}

/// Source: TIOCEXCL.
pub fn set_exclusive(fd: impl AsFd) -> Result<(), Errno> {
    // SAFETY: this request takes nothing.
    check("ioctl", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TIOCEXCL as libc::Ioctl) }.into()).map(drop)
}

/// Opens the slave of a master, whatever it is called here.
///
/// # Errors
/// `EIO` while it is locked. Source: TIOCGPTPEER, Linux 4.13.
pub fn peer(master: impl AsFd, flags: i32) -> Result<OwnedFd, Errno> {
    let flags = flags | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: this request takes an integer.
    let fd = unsafe { libc::ioctl(master.as_fd().as_raw_fd(), TIOCGPTPEER as libc::Ioctl, flags) };
    let fd = check("ioctl", fd.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Source: TCGETS2.
pub fn termios(fd: impl AsFd) -> Result<Termios, Errno> {
    let mut termios = Termios::default();
    // SAFETY: TCGETS2 writes one struct of integers.
    unsafe { exchange(fd, TCGETS2, &mut termios) }?;
    Ok(termios)
}

/// At once, whatever is in its queues. Source: TCSETS2.
pub fn set_termios(fd: impl AsFd, mut termios: Termios) -> Result<(), Errno> {
    // SAFETY: TCSETS2 reads one struct of integers.
    unsafe { exchange(fd, TCSETS2, &mut termios) }
}

/// Which bits of its termios nobody without privilege can change. The kernel's `struct termios`, which ends
/// before the speeds. Source: TIOCGLCKTRMIOS.
pub fn locked_termios(fd: impl AsFd) -> Result<Termios, Errno> {
    let mut termios = Termios::default();
    // SAFETY: the request writes less than one struct of integers.
    unsafe { exchange(fd, TIOCGLCKTRMIOS, &mut termios) }?;
    Ok(termios)
}

/// Source: TIOCSLCKTRMIOS.
pub fn set_locked_termios(fd: impl AsFd, mut termios: Termios) -> Result<(), Errno> {
    // SAFETY: the request reads less than one struct of integers.
    unsafe { exchange(fd, TIOCSLCKTRMIOS, &mut termios) }
}

/// Source: TIOCGWINSZ.
pub fn size(fd: impl AsFd) -> Result<Winsize, Errno> {
    let mut size = Winsize::default();
    // SAFETY: the request writes one struct of integers.
    unsafe { exchange(fd, TIOCGWINSZ, &mut size) }?;
    Ok(size)
}

/// Source: TIOCSWINSZ.
pub fn set_size(fd: impl AsFd, mut size: Winsize) -> Result<(), Errno> {
    // SAFETY: the request reads one struct of integers.
    unsafe { exchange(fd, TIOCSWINSZ, &mut size) }
}

/// The number of the line discipline. Source: TIOCGETD.
pub fn discipline(fd: impl AsFd) -> Result<i32, Errno> {
    read_int(fd, TIOCGETD)
}

/// Puts one byte into what can be read from the terminal, as if it had come from the other end.
///
/// # Errors
/// `EIO` before Linux 6.7 where `dev.tty.legacy_tiocsti` is off. Source: TIOCSTI.
pub fn put_in(fd: impl AsFd, mut byte: u8) -> Result<(), Errno> {
    // SAFETY: the request reads one byte.
    unsafe { exchange(fd, TIOCSTI, &mut byte) }
}

/// Stops the output of the terminal as tcflow(3) does with TCOOFF. Source: TCXONC.
pub fn stop(fd: impl AsFd) -> Result<(), Errno> {
    const TCOOFF: i32 = 0;
    // SAFETY: this request takes an integer.
    check("ioctl", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TCXONC as libc::Ioctl, TCOOFF) }.into())
        .map(drop)
}

/// What poll(2) says without waiting: POLLIN, POLLPRI, POLLOUT, POLLHUP.
pub fn poll(fd: impl AsFd) -> i16 {
    let events = libc::POLLIN | libc::POLLPRI | libc::POLLOUT;
    let mut poll = libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 };
    // SAFETY: the kernel reads and writes one pollfd on this stack.
    let count = unsafe { libc::poll(&mut poll, 1, 0) };
    if count == 1 { poll.revents } else { 0 }
}

/// Opens /dev/tty as the leader of a session whose terminal this is. Before and afterwards the terminal must be
/// nobody's.
///
/// Done by a child, which shares our descriptors, leads a session of its own, gives the terminal back and ends.
///
/// # Errors
/// Those of the calls; `EPERM` when the terminal is somebody's.
pub fn open_alias(terminal: &OwnedFd, flags: i32) -> Result<OwnedFd, Errno> {
    let flags = flags | libc::O_NOCTTY | libc::O_CLOEXEC;
    let terminal = terminal.as_raw_fd();
    // Its number is the child's to use.
    let opened = crate::fd::eventfd(0, 0)?;
    let child_flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: without CLONE_VM and with a null stack this is fork(2): the child has a copy of all memory. It makes
    // system calls only, on values that were made before.
    let child = check("clone", unsafe { libc::syscall(libc::SYS_clone, child_flags, 0, 0, 0, 0) })? as i32;
    if child == 0 {
        // SAFETY: as above; it never returns. Leaving a terminal sends SIGHUP to its group: the child itself.
        unsafe {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            let is_led = libc::setsid() >= 0 && libc::ioctl(terminal, TIOCSCTTY as libc::Ioctl, 0) == 0;
            let found = if is_led { libc::open(c"/dev/tty".as_ptr(), flags) } else { -1 };
            let is_done = found >= 0 && libc::dup3(found, opened.as_raw_fd(), libc::O_CLOEXEC) >= 0;
            let code = if is_done { 0 } else { *libc::__errno_location() };
            libc::close(found);
            libc::ioctl(terminal, TIOCNOTTY as libc::Ioctl);
            libc::_exit(code);
        }
    }
    let status = crate::process::wait(child, true)?.unwrap_or(0);
    match libc::WIFEXITED(status) {
        true if libc::WEXITSTATUS(status) == 0 => Ok(opened),
        true => Err(Errno { call: "open", code: libc::WEXITSTATUS(status) }),
        false => Err(Errno { call: "open", code: libc::ECHILD }),
    }
}
