//! Network devices whose other end is a descriptor: tun and tap.

use crate::call::check;
use model::Errno;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

/// Requests. Source: include/uapi/linux/if_tun.h.
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNGETSNDBUF: u32 = 0x8004_54d3;
const TUNSETSNDBUF: u32 = 0x4004_54d4;
const TUNGETVNETHDRSZ: u32 = 0x8004_54d7;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;

/// Flags of a device.
pub const DETACH_QUEUE: u16 = 0x0400;
pub const PERSIST: u16 = 0x0800;
pub const NOFILTER: u16 = 0x1000;
pub const TAP: u16 = 2;

/// A name of a network device, which ends with zeros.
pub type Name = [u8; libc::IFNAMSIZ];

fn request(name: &Name) -> libc::ifreq {
    // SAFETY: integers and an array of them, for which zero is valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> Name {
    request.ifr_name.map(|letter| letter as u8)
}

fn call(fd: impl AsFd, number: u32, request: &mut libc::ifreq) -> Result<(), Errno> {
    // SAFETY: the kernel reads and writes one ifreq, which lives for the call.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), number as libc::Ioctl, &raw mut *request) };
    check("ioctl", result.into()).map(drop)
}

/// The device that a descriptor is attached to, and its flags; none when it has none yet.
pub fn device(fd: impl AsFd) -> Result<Option<(Name, u16)>, Errno> {
    let mut found = request(&[0; libc::IFNAMSIZ]);
    match call(fd, TUNGETIFF, &mut found) {
        Ok(()) => {
            // SAFETY: the kernel has written the flags.
            let flags = unsafe { found.ifr_ifru.ifru_flags };
            Ok(Some((name_of(&found), flags as u16)))
        }
        Err(error) if error.code == libc::EBADFD => Ok(None),
        Err(error) => Err(error),
    }
}

/// Attaches a descriptor to a device, which is made if it is not there.
pub fn attach(fd: impl AsFd, name: &Name, flags: u16) -> Result<(), Errno> {
    let mut wanted = request(name);
    wanted.ifr_ifru.ifru_flags = flags as i16;
    call(fd, TUNSETIFF, &mut wanted)
}

/// Lets a descriptor rest that is one of several queues of a device.
pub fn rest(fd: impl AsFd) -> Result<(), Errno> {
    let mut wanted = request(&[0; libc::IFNAMSIZ]);
    wanted.ifr_ifru.ifru_flags = DETACH_QUEUE as i16;
    call(fd, TUNSETQUEUE, &mut wanted)
}

fn number(fd: impl AsFd, request: u32, value: i32) -> Result<i32, Errno> {
    let mut value = value;
    // SAFETY: the requests below read or write one integer on this stack.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request as libc::Ioctl, &raw mut value) };
    check("ioctl", result.into())?;
    Ok(value)
}

/// The length of the head before packets, and the room for packets that were not taken.
pub fn sizes(fd: impl AsFd) -> Result<(i32, i32), Errno> {
    Ok((number(&fd, TUNGETVNETHDRSZ, 0)?, number(&fd, TUNGETSNDBUF, 0)?))
}

pub fn set_sizes(fd: impl AsFd, (head, room): (i32, i32)) -> Result<(), Errno> {
    number(&fd, TUNSETVNETHDRSZ, head)?;
    number(&fd, TUNSETSNDBUF, room).map(drop)
}

/// What a network device is like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Link {
    pub mtu: i32,
    /// IFF_UP and others.
    pub flags: u16,
    /// Of devices that have one.
    pub mac: [u8; 6],
    pub has_ipv4: bool,
}

fn socket() -> Result<std::net::UdpSocket, Errno> {
    std::net::UdpSocket::bind("0.0.0.0:0").map_err(|error| crate::memory::io_errno("socket", &error))
}

/// Asks for a device of our network namespace.
///
/// # Errors
/// `ENODEV` when there is none with this name. Source: netdevice(7).
pub fn link(name: &Name) -> Result<Link, Errno> {
    let socket = socket()?;
    let ask = |number: libc::c_ulong| {
        let mut asked = request(name);
        call(&socket, number as u32, &mut asked).map(|()| asked)
    };
    // SAFETY: each request has written the part of the union that is read.
    unsafe {
        let mac = ask(libc::SIOCGIFHWADDR)?.ifr_ifru.ifru_hwaddr.sa_data;
        Ok(Link {
            mtu: ask(libc::SIOCGIFMTU)?.ifr_ifru.ifru_mtu,
            flags: ask(libc::SIOCGIFFLAGS)?.ifr_ifru.ifru_flags as u16,
            mac: std::array::from_fn(|at| mac[at] as u8),
            has_ipv4: ask(libc::SIOCGIFADDR).is_ok(),
        })
    }
}

/// Makes a device of our network namespace like this; `is_ethernet` when it has an address of its own.
pub fn set_link(name: &Name, link: &Link, is_ethernet: bool) -> Result<(), Errno> {
    let socket = socket()?;
    if is_ethernet {
        let mut wanted = request(name);
        let mut data = [0; 14];
        data.iter_mut().zip(link.mac).for_each(|(to, from)| *to = from as libc::c_char);
        wanted.ifr_ifru.ifru_hwaddr = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: data };
        call(&socket, libc::SIOCSIFHWADDR as u32, &mut wanted)?;
    }
    let mut wanted = request(name);
    wanted.ifr_ifru.ifru_mtu = link.mtu;
    call(&socket, libc::SIOCSIFMTU as u32, &mut wanted)?;
    let mut wanted = request(name);
    wanted.ifr_ifru.ifru_flags = link.flags as i16;
    call(&socket, libc::SIOCSIFFLAGS as u32, &mut wanted)
}

/// Has a device an IPv6 address that was given to it, and not by itself? Source: `/proc/net/if_inet6`.
pub fn has_ipv6(name: &Name) -> bool {
    const LINK_LOCAL: &str = "20";
    let text = std::fs::read_to_string(Path::new("/proc/net/if_inet6")).unwrap_or_default();
    let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
    text.lines().any(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        words.last().is_some_and(|last| last.as_bytes() == name) && words.get(3) != Some(&LINK_LOCAL)
    })
}
