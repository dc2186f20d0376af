//! Sockets: making, asking, and reading queues without emptying them.

use crate::call::check;
use crate::inside::inside;
use model::Errno;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// socket(2).
pub fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    let fd = check("socket", unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) }.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// socketpair(2).
pub fn socketpair(family: i32, kind: i32, protocol: i32) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two integers on this stack.
    let result = unsafe { libc::socketpair(family, kind | libc::SOCK_CLOEXEC, protocol, ends.as_mut_ptr()) };
    check("socketpair", result.into())?;
    // SAFETY: two descriptors that the kernel just made for us alone.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Fills `value` with an option; returns its length. Source: getsockopt(2).
pub fn option(fd: impl AsFd, level: i32, name: i32, value: &mut [u8]) -> Result<usize, Errno> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into the borrowed buffer.
    let result = unsafe {
        libc::getsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length)
    };
    check("getsockopt", result.into())?;
    Ok(length as usize)
}

/// An option that is one integer.
pub fn int_option(fd: impl AsFd, level: i32, name: i32) -> Result<i32, Errno> {
    let mut value = [0u8; 4];
    option(fd, level, name, &mut value)?;
    Ok(i32::from_ne_bytes(value))
}

/// The classic BPF program that judges what a socket receives: instructions as `struct sock_filter` is laid out; none where
/// there is no program.
///
/// # Errors
/// `EACCES` when it is one of eBPF, which is told to nobody.
///
/// Source: socket(7) SO_GET_FILTER; net/core/filter.c, `sk_get_filter`.
pub fn filter(fd: impl AsFd) -> Result<Vec<[u8; 8]>, Errno> {
    // It has the number of SO_ATTACH_FILTER.
    const SO_GET_FILTER: i32 = libc::SO_ATTACH_FILTER;
    const BPF_MAXINSNS: usize = 4096;
    // Where there is no room, the length is told.
    if option(&fd, libc::SOL_SOCKET, SO_GET_FILTER, &mut [])? == 0 {
        return Ok(Vec::new());
    }
    let mut program = vec![[0u8; 8]; BPF_MAXINSNS];
    // Counted in instructions, not in bytes.
    let mut count = BPF_MAXINSNS as libc::socklen_t;
    let (number, to) = (fd.as_fd().as_raw_fd(), program.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `count` instructions, for which there is room: no program has more.
    let result = unsafe { libc::getsockopt(number, libc::SOL_SOCKET, SO_GET_FILTER, to, &mut count) };
    check("getsockopt", result.into())?;
    program.truncate(count as usize);
    Ok(program)
}

/// Attaches what [`filter`] tells.
///
/// # Errors
/// `EINVAL` for what is no program; `EPERM` where the one before is locked.
pub fn attach_filter(fd: impl AsFd, program: &[[u8; 8]]) -> Result<(), Errno> {
    let long = Errno { call: "setsockopt", code: libc::EINVAL };
    let len = u16::try_from(program.len()).map_err(|_| long)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let (number, len) = (fd.as_fd().as_raw_fd(), size_of_val(&program) as u32);
    let from = (&raw const program).cast();
    // SAFETY: the kernel reads the structure and as many instructions as it says, which live for the call.
    let result = unsafe { libc::setsockopt(number, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, from, len) };
    check("setsockopt", result.into()).map(drop)
}

/// setsockopt(2).
pub fn set_option(fd: impl AsFd, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads the borrowed bytes.
    let result = unsafe {
        libc::setsockopt(fd.as_fd().as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as u32)
    };
    check("setsockopt", result.into()).map(drop)
}

/// The address of this end, or of the other: `sockaddr` bytes. Source: getsockname(2), getpeername(2).
pub fn name(fd: impl AsFd, of_peer: bool) -> Result<Vec<u8>, Errno> {
    let mut address = [0u8; 128];
    let mut length = address.len() as libc::socklen_t;
    let (fd, pointer) = (fd.as_fd().as_raw_fd(), address.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most `length` bytes into the buffer on this stack.
    let result = unsafe {
        match of_peer {
            false => libc::getsockname(fd, pointer, &mut length),
            true => libc::getpeername(fd, pointer, &mut length),
        }
    };
    check(if of_peer { "getpeername" } else { "getsockname" }, result.into())?;
    Ok(address[..(length as usize).min(address.len())].to_vec())
}

/// A process as others are told of it: pid, uid, gid.
pub type Sender = (i32, u32, u32);

/// Who made the other end, or listened there: pid, uid, gid. Source: unix(7) SO_PEERCRED.
pub fn peer_credentials(fd: impl AsFd) -> Result<Sender, Errno> {
    let mut bytes = [0u8; 12];
    option(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes)?;
    Ok(credentials(&bytes))
}

/// `struct ucred`.
fn credentials(bytes: &[u8; 12]) -> Sender {
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (word(0) as i32, word(4), word(8))
}

/// The supplementary groups of that one. Source: include/net/sock.h SO_PEERGROUPS, Linux 4.13.
pub fn peer_groups(fd: impl AsFd) -> Result<Vec<u32>, Errno> {
    const FEW: usize = 32;
    const MANY: usize = 1 << 16;
    let ask = |bytes: &mut [u8]| option(&fd, libc::SOL_SOCKET, libc::SO_PEERGROUPS, bytes);
    let mut bytes = vec![0u8; 4 * FEW];
    let count = match ask(&mut bytes) {
        Err(error) if error.code == libc::ERANGE => {
            bytes.resize(4 * MANY, 0);
            ask(&mut bytes)?
        }
        answer => answer?,
    };
    let words = bytes[..count].chunks_exact(4);
    Ok(words.map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect())
}

/// bind(2), to `sockaddr` bytes.
pub fn bind(fd: impl AsFd, address: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads the borrowed bytes.
    let result = unsafe { libc::bind(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), address.len() as u32) };
    check("bind", result.into()).map(drop)
}

/// connect(2), to `sockaddr` bytes.
pub fn connect(fd: impl AsFd, address: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads the borrowed bytes.
    let result =
        unsafe { libc::connect(fd.as_fd().as_raw_fd(), address.as_ptr().cast(), address.len() as u32) };
    check("connect", result.into()).map(drop)
}

/// listen(2).
pub fn listen(fd: impl AsFd, backlog: i32) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("listen", unsafe { libc::listen(fd.as_fd().as_raw_fd(), backlog) }.into()).map(drop)
}

/// accept4(2) without an address.
pub fn accept(fd: impl AsFd) -> Result<OwnedFd, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: the kernel writes nothing where it is given no room.
    let fd = unsafe { libc::accept4(fd.as_fd().as_raw_fd(), none, none.cast(), libc::SOCK_CLOEXEC) };
    let fd = check("accept4", fd.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The file of a UNIX socket that is bound to a path, opened with O_PATH.
///
/// # Errors
/// `ENOENT` for one that has none; `EPERM` without CAP_NET_ADMIN. Source: include/uapi/linux/un.h.
pub fn unix_file(fd: impl AsFd) -> Result<OwnedFd, Errno> {
    const SIOCUNIXFILE: libc::Ioctl = 0x89e0;
    // SAFETY: this request takes no argument.
    let file = check("ioctl", unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), SIOCUNIXFILE, 0) }.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(file as i32) })
}

/// A UNIX socket's name as a `sockaddr`. Source: unix(7).
pub fn unix_address(name: &[u8]) -> Vec<u8> {
    [&(libc::AF_UNIX as u16).to_ne_bytes()[..], name].concat()
}

/// shutdown(2).
pub fn shutdown(fd: impl AsFd, how: i32) -> Result<(), Errno> {
    // SAFETY: integers only.
    check("shutdown", unsafe { libc::shutdown(fd.as_fd().as_raw_fd(), how) }.into()).map(drop)
}

/// A message looked at in a queue, or taken out of it.
#[derive(Debug)]
pub struct Peeked {
    /// Bytes of the message that are in the buffer.
    pub length: usize,
    /// It was longer than the buffer.
    pub is_cut: bool,
    /// Duplicates of the descriptors that it carries (SCM_RIGHTS).
    pub rights: Vec<OwnedFd>,
    /// The pid, uid and gid of who sent it, where the socket is told of that (SCM_CREDENTIALS).
    pub sender: Option<Sender>,
    /// It carries something else, of this type: SCM_SECURITY, SCM_PIDFD.
    pub other: Option<i32>,
    /// Sender's address, `sockaddr` bytes.
    pub from: Vec<u8>,
}

/// Room for more control messages than the kernel gives with one message: 253 descriptors and some more.
#[repr(C, align(8))]
struct Control([u8; 4096]);

/// Looks at what is in the receive queue, at the place where SO_PEEK_OFF stands, and leaves it there.
///
/// # Errors
/// `EAGAIN` when nothing is left.
///
/// Source: recvmsg(2) MSG_PEEK, cmsg(3).
pub fn peek(fd: impl AsFd, buffer: &mut [u8]) -> Result<Peeked, Errno> {
    message(fd, buffer, libc::MSG_PEEK | libc::MSG_TRUNC)
}

/// Is there a byte that is read apart from the others? It stays there. Source: recv(2) MSG_OOB.
pub fn has_urgent(fd: impl AsFd) -> bool {
    let mut byte = 0u8;
    let flags = libc::MSG_OOB | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most one byte to this stack.
    unsafe { libc::recv(fd.as_fd().as_raw_fd(), (&raw mut byte).cast(), 1, flags) == 1 }
}

/// Takes the next bytes or the next message, with what it carries; none when the other end is closed.
///
/// # Errors
/// `EAGAIN` when there is nothing. Source: recvmsg(2), cmsg(3).
pub fn receive(fd: impl AsFd, buffer: &mut [u8]) -> Result<Peeked, Errno> {
    message(fd, buffer, 0)
}

fn message(fd: impl AsFd, buffer: &mut [u8], flags: i32) -> Result<Peeked, Errno> {
    let mut from = [0u8; 128];
    let mut control = Control([0; 4096]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = from.as_mut_ptr().cast();
    header.msg_namelen = from.len() as u32;
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len();
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: everything that the header points to lives for the call, with the lengths given.
    let length = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, flags) };
    let length = check("recvmsg", length as i64)? as usize;
    let filled = header.msg_controllen.min(control.0.len());
    let (rights, sender, other) = parse_control(&control.0[..filled]);
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(Errno { call: "recvmsg", code: libc::EMSGSIZE });
    }
    Ok(Peeked {
        length: length.min(buffer.len()),
        is_cut: header.msg_flags & libc::MSG_TRUNC != 0,
        rights,
        sender,
        other,
        from: from[..(header.msg_namelen as usize).min(from.len())].to_vec(),
    })
}

/// How many of the next `length` bytes of a stream were sent before the message that the last of them belongs to.
///
/// The kernel copies message by message, and one that does not fit into what may be written not at all: where
/// the last byte would go there is no memory.
///
/// # Errors
/// Those of recvmsg(2). Source: net/unix/af_unix.c unix_stream_read_generic.
pub fn bytes_before_last(fd: impl AsFd, length: usize) -> Result<usize, Errno> {
    let mut room = vec![0u8; length.saturating_sub(1)];
    let nowhere = std::ptr::without_provenance_mut(1);
    let mut iov = [
        libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: room.len() },
        libc::iovec { iov_base: nowhere, iov_len: 1 },
    ];
    // SAFETY: msghdr is integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = iov.as_mut_ptr();
    header.msg_iovlen = iov.len();
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the first buffer lives for the call; nothing is mapped at the address of the second, which makes the
    // kernel stop there.
    let count = unsafe { libc::recvmsg(fd.as_fd().as_raw_fd(), &mut header, flags) };
    match check("recvmsg", count as i64) {
        Ok(count) => Ok(count as usize),
        Err(error) if error.code == libc::EFAULT => Ok(0),
        Err(error) => Err(error),
    }
}

/// Takes over the descriptors that the kernel has just put into control messages.
/// Source: include/linux/socket.h; include/uapi/asm-generic/socket.h, where the newer ones have 64 bits for the seconds.
const SCM_PIDFD: i32 = 4;
const TIME_STAMPS: [i32; 6] = [libc::SO_TIMESTAMP, libc::SO_TIMESTAMPNS, libc::SO_TIMESTAMPING, 63, 64, 65];

fn parse_control(mut control: &[u8]) -> (Vec<OwnedFd>, Option<Sender>, Option<i32>) {
    const HEAD: usize = 16;
    let (mut rights, mut sender, mut other) = (Vec::new(), None, None);
    let int = |bytes: &[u8]| i32::from_ne_bytes(bytes.try_into().expect("four bytes"));
    // struct cmsghdr: length with this head, level, type; each aligned to eight bytes.
    while control.len() >= HEAD {
        let length = usize::from_ne_bytes(control[..8].try_into().expect("eight bytes"));
        let Some(data) = control.get(HEAD..length) else { break };
        match (int(&control[8..12]), int(&control[12..16])) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                // SAFETY: descriptors that the kernel just made for us alone.
                rights.extend(data.chunks_exact(4).map(|fd| unsafe { OwnedFd::from_raw_fd(int(fd)) }));
            }
            (libc::SOL_SOCKET, SCM_PIDFD) => {
                // SAFETY: as above.
                drop(data.first_chunk::<4>().map(|fd| unsafe { OwnedFd::from_raw_fd(int(fd)) }));
                other = Some(SCM_PIDFD);
            }
            // When it came is nothing that it carries.
            (libc::SOL_SOCKET, kind) if TIME_STAMPS.contains(&kind) => {}
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => sender = data.first_chunk().map(credentials),
            (_, kind) => other = Some(kind),
        }
        control = control.get(length.next_multiple_of(8)..).unwrap_or(&[]);
    }
    (rights, sender, other)
}

/// Sends one message with descriptors, and as if this one had sent it.
///
/// # Errors
/// `ESRCH` when no process has the pid. Source: sendmsg(2), unix(7) SCM_RIGHTS, SCM_CREDENTIALS.
pub fn send_with(
    fd: impl AsFd,
    bytes: &[u8],
    to: Option<&[u8]>,
    rights: &[BorrowedFd],
    sender: Option<Sender>,
) -> Result<usize, Errno> {
    if rights.is_empty() && sender.is_none() {
        return send(fd, bytes, to);
    }
    let words: Vec<i32> = rights.iter().map(AsRawFd::as_raw_fd).collect();
    let who = sender.map(|(pid, uid, gid)| [pid, uid as i32, gid as i32]);
    let messages =
        [(libc::SCM_RIGHTS, &words[..]), (libc::SCM_CREDENTIALS, who.as_ref().map_or(&[], |who| who))];
    let mut text = Vec::new();
    for (kind, words) in messages.iter().filter(|(_, words)| !words.is_empty()) {
        text.extend((16 + 4 * words.len()).to_ne_bytes());
        text.extend(
            [libc::SOL_SOCKET, *kind].into_iter().chain(words.iter().copied()).flat_map(i32::to_ne_bytes),
        );
        text.resize(text.len().next_multiple_of(8), 0);
    }
    let mut control = Control([0; 4096]);
    let length = text.len();
    let Some(room) = control.0.get_mut(..length) else {
        return Err(Errno { call: "sendmsg", code: libc::EMSGSIZE });
    };
    room.copy_from_slice(&text);
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: msghdr is integers and pointers, for which zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(to) = to {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len() as u32;
    }
    header.msg_iov = &mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = length;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads what the header points to, with the lengths given, during the call.
    let count = unsafe { libc::sendmsg(fd.as_fd().as_raw_fd(), &header, flags) };
    check("sendmsg", count as i64).map(|count| count as usize)
}

/// Sends one message, whole, to the peer or to `to`. Source: sendto(2).
pub fn send(fd: impl AsFd, bytes: &[u8], to: Option<&[u8]>) -> Result<usize, Errno> {
    let (pointer, length) = to.map_or((std::ptr::null(), 0), |to| (to.as_ptr().cast(), to.len() as u32));
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the kernel reads the borrowed bytes and address.
    let count = unsafe {
        libc::sendto(fd.as_fd().as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags, pointer, length)
    };
    check("sendto", count as i64).map(|count| count as usize)
}

/// Sends bytes of a stream, with descriptors beside the first, and waits where there is no room. Source: sendmsg(2).
pub fn send_all(fd: impl AsFd, bytes: &[u8], rights: &[BorrowedFd]) -> Result<(), Errno> {
    let mut sent = 0;
    while sent < bytes.len() {
        let rights = if sent == 0 { rights } else { &[] };
        match send_with(&fd, &bytes[sent..], None, rights, None) {
            Ok(count) => sent += count,
            Err(error) if error.code == libc::EAGAIN => crate::fd::wait_writable(&fd)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The address of the queue of what a socket of ours has received, a `struct sk_buff_head`.
fn queue(fd: impl AsFd) -> Option<u64> {
    let inside = inside()?;
    let file = inside.file(crate::process::own_pid(), fd.as_fd().as_raw_fd())?;
    let sock = inside.member(inside.member(file, "file", "private_data")?, "socket", "sk")?;
    inside.at(sock, "sock", "sk_receive_queue")
}

/// How many messages a socket has received that nobody has taken; none where the kernel does not tell. Also those that
/// MSG_PEEK does not show: an empty message is shown once. Source: net/core/datagram.c, `__skb_try_recv_from_queue`.
pub fn queued_count(fd: impl AsFd) -> Option<u32> {
    let inside = inside()?;
    inside.int(inside.at(queue(fd)?, "sk_buff_head", "qlen")?)
}

/// Their lengths; the socket is of a program that stands still, and gets no more.
pub fn queued_lengths(fd: impl AsFd) -> Option<Vec<u32>> {
    const MANY: u32 = 1 << 16;
    let inside = inside()?;
    let head = queue(fd)?;
    let count = inside.int(inside.at(head, "sk_buff_head", "qlen")?)?;
    let mut lengths = Vec::new();
    let mut at = inside.member(head, "sk_buff_head", "next")?;
    while at != head && lengths.len() < count.min(MANY) as usize {
        lengths.push(inside.int(inside.at(at, "sk_buff", "len")?)?);
        at = inside.member(at, "sk_buff", "next")?;
    }
    Some(lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_waits_for_room_and_comes_after_what_was_there() {
        let (from, to) = socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a pair");
        let mut before = 0;
        while send(&from, &[1; 4096], None).is_ok() {
            before += 1;
        }
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send_all(&from, &[2; 8], &[to.as_fd()]));
            let (mut bytes, mut rights) = (Vec::new(), 0);
            while bytes.len() < before * 4096 + 8 {
                crate::fd::wait_readable(&to).expect("poll");
                let mut buffer = [0; 4096];
                let got = receive(&to, &mut buffer).expect("receive");
                bytes.extend(&buffer[..got.length]);
                rights += got.rights.len();
            }
            sender.join().expect("no panic").expect("send");
            assert_eq!((&bytes[before * 4096..], rights), (&[2; 8][..], 1));
        });
    }
}
