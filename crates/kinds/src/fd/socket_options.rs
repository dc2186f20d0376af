//! Options that sockets of all families have.
//!
//! Read and set by getsockopt(2) and setsockopt(2). Buffer sizes are stored as the kernel tells them,
//! twice what was asked for.

use image::SkOptsEntry;
use model::Errno;
use std::os::fd::AsFd;
use sys::socket::{int_option, option, set_option};

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
    let mut device = [0u8; 16];
    let length = option(fd, SOL, libc::SO_BINDTODEVICE, &mut device).unwrap_or(0);
    if length > 1 {
        opts.so_bound_dev = Some(String::from_utf8_lossy(&device[..length - 1]).into_owned());
    }
    Ok(opts)
}

/// Is a classic BPF program attached, which would be lost?
pub fn has_filter(fd: impl AsFd) -> bool {
    // SO_GET_FILTER has the number of SO_ATTACH_FILTER, and tells the length where there is no room.
    option(fd, SOL, libc::SO_ATTACH_FILTER, &mut []).is_ok_and(|length| length != 0)
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
    if let Some(lock) = opts.so_buf_lock.filter(|lock| now.so_buf_lock != Some(*lock)) {
        set(SO_BUF_LOCK, lock)?;
    }
    Ok(())
}
