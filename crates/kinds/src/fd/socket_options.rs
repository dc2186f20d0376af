//! Options that sockets of all families have.
//!
//! Read and set by getsockopt(2) and setsockopt(2). Buffer sizes are stored as the kernel tells them,
//! twice what was asked for. Programs of eBPF are refused.

use image::SkOptsEntry;
use model::Errno;
use std::os::fd::AsFd;
use sys::socket::{self, int_option, option, set_option};

const SOL: i32 = libc::SOL_SOCKET;
const SO_BUF_LOCK: i32 = 72;

/// Flags of `SkOptsEntry` that are plain numbers: how to get at one, and its option.
type Number = (i32, fn(&mut SkOptsEntry) -> &mut Option<u32>);
type Flag = (i32, fn(&mut SkOptsEntry) -> &mut Option<bool>);

const NUMBERS: [Number; 3] = [
    (libc::SO_PRIORITY, |o| &mut o.so_priority),
    (libc::SO_RCVLOWAT, |o| &mut o.so_rcvlowat),
    (libc::SO_MARK, |o| &mut o.so_mark),
];

const FLAGS: [Flag; 8] = [
    (libc::SO_REUSEADDR, |o| &mut o.reuseaddr),
    (libc::SO_REUSEPORT, |o| &mut o.so_reuseport),
    (libc::SO_PASSCRED, |o| &mut o.so_passcred),
    (libc::SO_PASSSEC, |o| &mut o.so_passsec),
    (libc::SO_DONTROUTE, |o| &mut o.so_dontroute),
    (libc::SO_NO_CHECK, |o| &mut o.so_no_check),
    (libc::SO_BROADCAST, |o| &mut o.so_broadcast),
    (libc::SO_KEEPALIVE, |o| &mut o.so_keepalive),
];

/// Options that images have no field for, and what they are in a new socket. Each is one more question for each socket, so
/// those that are of no use on all of ours are missing. Source: include/uapi/asm-generic/socket.h.
const OTHERS: [(i32, u32); 5] = [
    (libc::SO_TIMESTAMP, 0),
    (libc::SO_TIMESTAMPNS, 0),
    (SO_PASSPIDFD, 0),
    (SO_RCVPRIORITY, 0),
    (SO_PASSRIGHTS, 1),
];
const SO_PASSPIDFD: i32 = 76;
const SO_RCVPRIORITY: i32 = 82;
const SO_PASSRIGHTS: i32 = 83;

fn time(fd: impl AsFd, name: i32) -> Result<(u64, u64), Errno> {
    let mut value = [0u8; 16];
    option(fd, SOL, name, &mut value)?;
    let word = |at: usize| u64::from_ne_bytes(value[at..at + 8].try_into().expect("eight bytes"));
    Ok((word(0), word(8)))
}

pub fn dump(fd: impl AsFd) -> Result<SkOptsEntry, Errno> {
    let fd = fd.as_fd();
    let get = |name| int_option(fd, SOL, name);
    let mut opts = SkOptsEntry { so_sndbuf: get(libc::SO_SNDBUF)? as u32, ..Default::default() };
    opts.so_rcvbuf = get(libc::SO_RCVBUF)? as u32;
    (opts.so_snd_tmo_sec, opts.so_snd_tmo_usec) = time(fd, libc::SO_SNDTIMEO)?;
    (opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec) = time(fd, libc::SO_RCVTIMEO)?;
    for (name, field) in NUMBERS {
        *field(&mut opts) = Some(get(name)? as u32);
    }
    for (name, field) in FLAGS {
        // Families without an option refuse to tell it.
        *field(&mut opts) = get(name).ok().map(|value| value != 0);
    }
    let mut linger = [0u8; 8];
    option(fd, SOL, libc::SO_LINGER, &mut linger)?;
    if linger[0] != 0 {
        opts.so_linger = Some(u32::from_ne_bytes(linger[4..].try_into().expect("four bytes")));
    }
    opts.so_oobinline = Some(get(libc::SO_OOBINLINE)? as u32);
    // Since Linux 5.14: which buffer sizes were set by the program.
    opts.so_buf_lock = get(SO_BUF_LOCK).ok().map(|lock| lock as u32);
    opts.so_filter = socket::filter(fd)?.into_iter().map(to_image).collect();
    for (name, new) in OTHERS {
        let value = get(name).map_or(new, |value| value as u32);
        if value != new {
            opts.others.extend([name as u32, value]);
        }
    }
    let mut device = [0u8; 16];
    let length = option(fd, SOL, libc::SO_BINDTODEVICE, &mut device).unwrap_or(0);
    if length > 1 {
        opts.so_bound_dev = Some(String::from_utf8_lossy(&device[..length - 1]).into_owned());
    }
    Ok(opts)
}

/// An instruction as images have it: code, two jumps, and a value, from the highest bits down.
fn to_image([code, code_high, if_true, if_false, value @ ..]: [u8; 8]) -> u64 {
    let code = u64::from(u16::from_ne_bytes([code, code_high]));
    code << 48 | u64::from(if_true) << 40 | u64::from(if_false) << 32 | u64::from(u32::from_ne_bytes(value))
}

fn from_image(instruction: u64) -> [u8; 8] {
    let [a, b, c, d] = (instruction as u32).to_ne_bytes();
    let [code, code_high] = ((instruction >> 48) as u16).to_ne_bytes();
    [code, code_high, (instruction >> 40) as u8, (instruction >> 32) as u8, a, b, c, d]
}

/// Sets the options of a socket that has those of `now`.
pub fn restore(fd: impl AsFd, opts: &SkOptsEntry, now: &SkOptsEntry) -> Result<(), Errno> {
    let fd = fd.as_fd();
    let set = |name: i32, value: u32| set_option(fd, SOL, name, &value.to_ne_bytes());
    let (mut opts, mut now) = (opts.clone(), now.clone());
    // The kernel doubles what it is asked for.
    if opts.so_sndbuf != now.so_sndbuf {
        set(libc::SO_SNDBUFFORCE, opts.so_sndbuf / 2)?;
        now.so_buf_lock = None;
    }
    if opts.so_rcvbuf != now.so_rcvbuf {
        set(libc::SO_RCVBUFFORCE, opts.so_rcvbuf / 2)?;
        now.so_buf_lock = None;
    }
    for (name, sec, usec) in [
        (libc::SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ] {
        if (sec, usec) != (0, 0) {
            set_option(fd, SOL, name, &[sec.to_ne_bytes(), usec.to_ne_bytes()].concat())?;
        }
    }
    for (name, field) in NUMBERS {
        if let Some(value) = *field(&mut opts)
            && *field(&mut now) != Some(value)
        {
            set(name, value)?;
        }
    }
    for (name, field) in FLAGS {
        if *field(&mut opts) == Some(true) && *field(&mut now) != Some(true) {
            set(name, 1)?;
        }
    }
    if let Some(seconds) = opts.so_linger {
        set_option(fd, SOL, libc::SO_LINGER, &[1u32.to_ne_bytes(), seconds.to_ne_bytes()].concat())?;
    }
    if opts.so_oobinline.is_some_and(|value| value != 0) {
        set(libc::SO_OOBINLINE, 1)?;
    }
    if let Some(device) = &opts.so_bound_dev {
        set_option(fd, SOL, libc::SO_BINDTODEVICE, device.as_bytes())?;
    }
    if !opts.so_filter.is_empty() {
        let program: Vec<[u8; 8]> = opts.so_filter.iter().copied().map(from_image).collect();
        socket::attach_filter(fd, &program)?;
    }
    if let Some(lock) = opts.so_buf_lock.filter(|lock| now.so_buf_lock != Some(*lock)) {
        set(SO_BUF_LOCK, lock)?;
    }
    let (others, _) = opts.others.as_chunks::<2>();
    for [name, value] in others {
        // An image has no say in what else there is.
        if OTHERS.iter().any(|(known, _)| *known as u32 == *name) {
            set(*name as i32, *value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_have_their_place_in_images() {
        let image = 0x0015_0102_8765_4321;
        assert_eq!(to_image(from_image(image)), image);
        assert_eq!(from_image(image)[2..4], [1, 2]);
    }
}
