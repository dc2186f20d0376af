//! Pseudoterminals, through the requests that have no wrapper elsewhere.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use super::call::check;

/// A request of one int, in or out.
#[track_caller]
fn int(fd: &OwnedFd, request: libc::Ioctl, mut value: i32) -> i32 {
    // SAFETY: the requests below read or write one int, a live local.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) });
    value
}

/// Opens a terminal without taking it as one's own.
#[track_caller]
pub fn open(path: impl AsRef<Path>, flags: i32) -> OwnedFd {
    use std::os::unix::fs::OpenOptionsExt;
    let file =
        std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags | libc::O_NOCTTY).open(&path);
    file.unwrap_or_else(|e| panic!("open {}: {e}", path.as_ref().display())).into()
}

/// A master, unlocked.
#[track_caller]
pub fn master() -> OwnedFd {
    let master = open("/dev/ptmx", 0);
    set_locked(&master, false);
    master
}

/// A master and its slave.
#[track_caller]
pub fn pair() -> (OwnedFd, OwnedFd) {
    let master = master();
    let slave = slave(&master);
    (master, slave)
}

pub fn name(master: &OwnedFd) -> String {
    format!("/dev/pts/{}", number(master))
}

#[track_caller]
pub fn slave(master: &OwnedFd) -> OwnedFd {
    open(name(master), 0)
}

#[track_caller]
pub fn number(master: &OwnedFd) -> i32 {
    int(master, 0x8004_5430, 0)
}

#[track_caller]
pub fn set_locked(master: &OwnedFd, on: bool) {
    int(master, 0x4004_5431, on.into());
}

#[track_caller]
pub fn is_locked(master: &OwnedFd) -> bool {
    int(master, 0x8004_5439, 0) != 0
}

#[track_caller]
pub fn set_packet_mode(master: &OwnedFd, on: bool) {
    int(master, 0x5420, on.into());
}

#[track_caller]
pub fn is_packet_mode(master: &OwnedFd) -> bool {
    int(master, 0x8004_5438, 0) != 0
}

#[track_caller]
pub fn set_exclusive(fd: &OwnedFd) {
    // SAFETY: TIOCEXCL takes nothing.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCEXCL) });
}

#[track_caller]
pub fn is_exclusive(fd: &OwnedFd) -> bool {
    int(fd, 0x8004_5440, 0) != 0
}

#[track_caller]
pub fn set_size(fd: &OwnedFd, rows: u16, columns: u16) {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 640, ws_ypixel: 480 };
    // SAFETY: TIOCSWINSZ reads one winsize, a live local.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) });
}

#[track_caller]
pub fn size(fd: &OwnedFd) -> [u16; 4] {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, a live local.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) });
    [size.ws_row, size.ws_col, size.ws_xpixel, size.ws_ypixel]
}

/// The kernel's termios, as bytes.
#[track_caller]
pub fn termios(fd: &OwnedFd) -> [u8; 44] {
    let mut termios = [0; 44];
    // SAFETY: TCGETS2 writes 44 bytes.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCGETS2, &raw mut termios) });
    termios
}

#[track_caller]
pub fn set_termios(fd: &OwnedFd, mut termios: [u8; 44]) {
    // SAFETY: TCSETS2 reads 44 bytes.
    check("ioctl", unsafe { libc::ioctl(fd.as_raw_fd(), libc::TCSETS2, &raw mut termios) });
}

/// Without echo, signals and lines.
#[track_caller]
pub fn make_raw(fd: &OwnedFd) {
    let mut termios = termios(fd);
    termios[..8].fill(0);
    termios[12..16].fill(0);
    set_termios(fd, termios);
}

/// Makes it the terminal of the session that the caller leads.
#[track_caller]
pub fn take(slave: &OwnedFd) {
    // SAFETY: TIOCSCTTY takes an integer.
    check("ioctl", unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) });
}

/// Gives the caller's terminal up.
#[track_caller]
pub fn leave(slave: &OwnedFd) {
    // SAFETY: TIOCNOTTY takes nothing.
    check("ioctl", unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCNOTTY) });
}

/// What poll(2) says without waiting.
pub fn poll(fd: &OwnedFd) -> i16 {
    let mut poll =
        libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN | libc::POLLOUT | libc::POLLPRI, revents: 0 };
    // SAFETY: poll(2) reads and writes one pollfd, a live local.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents
}

/// A duplicate with another number.
#[track_caller]
pub fn again(fd: &OwnedFd) -> OwnedFd {
    // SAFETY: takes integers; the number is new and the caller's alone.
    unsafe { OwnedFd::from_raw_fd(check("fcntl", libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD, 0))) }
}
