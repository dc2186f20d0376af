//! `/dev/net/tun`, and the requests of netdevice(7).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETPERSIST: u64 = 0x4004_54cb;
const TUNGETIFF: u64 = 0x8004_54d2;

/// struct ifreq: a name of 16 bytes, and 24 more.
type Request = [u8; 40];

fn request(name: &str) -> Request {
    let mut request = [0; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request
}

fn call(fd: impl AsFd, number: u64, request: &mut Request) -> io::Result<()> {
    // SAFETY: the kernel reads and writes 40 bytes of a live local.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number as libc::Ioctl, request.as_mut_ptr()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// # Errors
/// Where there is none.
pub fn open() -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")
}

/// # Errors
/// When somebody has it.
pub fn attach(file: &File, name: &str, flags: u16) -> io::Result<()> {
    let mut wanted = request(name);
    wanted[16..18].copy_from_slice(&flags.to_ne_bytes());
    call(file, TUNSETIFF, &mut wanted)
}

/// Name and flags of the device.
///
/// # Errors
/// When there is none.
pub fn device(file: &File) -> io::Result<(String, u16)> {
    let mut found = request("");
    call(file, TUNGETIFF, &mut found)?;
    let name = found[..16].iter().take_while(|byte| **byte != 0).map(|byte| *byte as char).collect();
    Ok((name, u16::from_ne_bytes([found[16], found[17]])))
}

#[track_caller]
pub fn make_persistent(file: &File) {
    // SAFETY: takes an integer.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETPERSIST as libc::Ioctl, 1) };
    assert_eq!(result, 0, "TUNSETPERSIST: {}", io::Error::last_os_error());
}

fn socket() -> std::net::UdpSocket {
    std::net::UdpSocket::bind("0.0.0.0:0").expect("socket")
}

/// MTU, flags, and the address of the hardware.
///
/// # Errors
/// When there is no such device.
pub fn link(name: &str) -> io::Result<(i32, i16, [u8; 6])> {
    let ask = |number: u64| {
        let mut asked = request(name);
        call(socket(), number, &mut asked).map(|()| asked)
    };
    let mtu = ask(libc::SIOCGIFMTU)?[16..20].try_into().map_or(0, i32::from_ne_bytes);
    let flags = ask(libc::SIOCGIFFLAGS)?[16..18].try_into().map_or(0, i16::from_ne_bytes);
    let address = ask(libc::SIOCGIFHWADDR)?[18..24].try_into().expect("six bytes");
    Ok((mtu, flags, address))
}

/// Sets the MTU, and sets the device up.
#[track_caller]
pub fn set_up(name: &str, mtu: i32) {
    let mut wanted = request(name);
    wanted[16..20].copy_from_slice(&mtu.to_ne_bytes());
    call(socket(), libc::SIOCSIFMTU, &mut wanted).expect("SIOCSIFMTU");
    let mut wanted = request(name);
    wanted[16..18].copy_from_slice(&(libc::IFF_UP as i16).to_ne_bytes());
    call(socket(), libc::SIOCSIFFLAGS, &mut wanted).expect("SIOCSIFFLAGS");
}

/// Gives it the address 10.9.0.1, and 10.9.0.2 at its other end.
#[track_caller]
pub fn set_address(name: &str) {
    let mut wanted = request(name);
    wanted[16..18].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    for (number, address) in [(libc::SIOCSIFADDR, [10, 9, 0, 1]), (libc::SIOCSIFDSTADDR, [10, 9, 0, 2])] {
        let mut wanted = wanted;
        wanted[20..24].copy_from_slice(&address);
        call(socket(), number, &mut wanted).expect("SIOCSIFADDR");
    }
}
