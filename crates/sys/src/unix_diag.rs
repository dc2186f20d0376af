//! What the kernel knows of a UNIX socket, asked by its inode: sock_diag(7), UDIAG.

use crate::socket;
use model::Errno;
use std::os::fd::OwnedFd;

/// One UNIX socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    pub inode: u32,
    /// SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET.
    pub kind: u8,
    /// As for TCP: 1 connected, 7 not, 10 listening.
    pub state: u8,
    /// As bound: a path, or for an abstract name a leading zero byte.
    pub name: Option<Vec<u8>>,
    /// Device and inode of the bound path.
    pub vfs: Option<(u32, u32)>,
    /// Inode of the connected peer.
    pub peer: Option<u32>,
    /// Inodes of connections that wait to be accepted.
    pub pending: Vec<u32>,
    /// For a listener: waiting connections and the limit; otherwise bytes to receive and sent.
    pub queues: (u32, u32),
    /// 1 receiving, 2 sending was shut down.
    pub shutdown: u8,
}

/// A netlink socket for questions.
#[derive(Debug)]
pub struct Diag {
    socket: OwnedFd,
    reply: Vec<u8>,
}

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SHOW_NAME: u32 = 1;
const SHOW_VFS: u32 = 2;
const SHOW_PEER: u32 = 4;
const SHOW_ICONS: u32 = 8;
const SHOW_RQLEN: u32 = 16;

impl Diag {
    pub fn new() -> Result<Diag, Errno> {
        let socket = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
        Ok(Diag { socket, reply: vec![0; 1 << 16] })
    }

    /// # Errors
    /// `ENOENT` when no socket of this net namespace has the inode.
    pub fn ask(&mut self, inode: u32) -> Result<UnixSocket, Errno> {
        const NLM_F_REQUEST: u16 = 1;
        self.send(inode, NLM_F_REQUEST)?;
        let length = crate::fd::read(&self.socket, &mut self.reply)?;
        parse(&self.reply[..length])
    }

    /// Every UNIX socket of this net namespace.
    ///
    /// # Errors
    /// Those of netlink(7).
    pub fn all(&mut self) -> Result<Vec<UnixSocket>, Errno> {
        const NLM_F_REQUEST_DUMP: u16 = 0x301;
        self.send(0, NLM_F_REQUEST_DUMP)?;
        let mut all = Vec::new();
        loop {
            let length = crate::fd::read(&self.socket, &mut self.reply)?;
            let mut rest = &self.reply[..length];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if u16::from_ne_bytes([rest[4], rest[5]]) == NLMSG_DONE {
                    return Ok(all);
                }
                all.push(parse(rest)?);
                rest = rest.get((length + 3) & !3..).unwrap_or(&[]);
            }
        }
    }

    fn send(&self, inode: u32, flags: u16) -> Result<(), Errno> {
        let show = SHOW_NAME | SHOW_VFS | SHOW_PEER | SHOW_ICONS | SHOW_RQLEN;
        let mut request = Vec::with_capacity(40);
        // nlmsghdr: length, type, flags, sequence, port.
        request.extend_from_slice(&40u32.to_ne_bytes());
        request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        request.extend_from_slice(&flags.to_ne_bytes());
        request.extend_from_slice(&[0; 8]);
        // unix_diag_req: family, protocol, padding, states, inode, show, cookie (any).
        request.extend_from_slice(&[libc::AF_UNIX as u8, 0, 0, 0]);
        for word in [u32::MAX, inode, show, u32::MAX, u32::MAX] {
            request.extend_from_slice(&word.to_ne_bytes());
        }
        socket::send(&self.socket, &request, None).map(drop)
    }
}

/// Parses one answer.
///
/// # Errors
/// The error that the answer holds; `EBADMSG` for what is no answer.
pub fn parse(reply: &[u8]) -> Result<UnixSocket, Errno> {
    let bad = Errno { call: "sock_diag", code: libc::EBADMSG };
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).map(|bytes| u32::from_ne_bytes(bytes.try_into().unwrap())).ok_or(bad)
    };
    let length = word(reply, 0)? as usize;
    let message = reply.get(..length).ok_or(bad)?;
    let kind = u16::from_ne_bytes(message.get(4..6).ok_or(bad)?.try_into().unwrap());
    if kind == NLMSG_ERROR {
        let code = (word(message, 16)? as i32).wrapping_neg();
        return Err(Errno { call: "sock_diag", code });
    }
    // unix_diag_msg: family, type, state, padding, inode, cookie; then attributes.
    let head = message.get(16..32).ok_or(bad)?;
    let mut socket =
        UnixSocket { kind: head[1], state: head[2], inode: word(head, 4)?, ..Default::default() };
    let mut rest = &message[32..];
    while rest.len() >= 4 {
        let length = u16::from_ne_bytes([rest[0], rest[1]]) as usize;
        let attribute = u16::from_ne_bytes([rest[2], rest[3]]);
        let value = rest.get(4..length).ok_or(bad)?;
        match attribute {
            0 => socket.name = Some(value.to_vec()),
            // udiag_vfs_dev, udiag_vfs_ino come as inode, device.
            1 => socket.vfs = Some((word(value, 4)?, word(value, 0)?)),
            2 => socket.peer = Some(word(value, 0)?),
            3 => {
                socket.pending = (0..value.len() / 4).map(|n| word(value, n * 4)).collect::<Result<_, _>>()?
            }
            4 => socket.queues = (word(value, 0)?, word(value, 4)?),
            6 => socket.shutdown = *value.first().ok_or(bad)?,
            _ => {}
        }
        rest = rest.get((length + 3) & !3..).unwrap_or(&[]);
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fd;

    #[test]
    fn the_ends_of_a_pair_name_each_other() {
        let (a, b) = socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        let [a, b] = [a, b].map(|end| fd::stat(&end).map(|stat| (end, stat.st_ino as u32)).unwrap());
        let told = Diag::new().unwrap().ask(a.1).unwrap();
        assert_eq!((told.inode, told.peer, told.state), (a.1, Some(b.1), 1));
    }

    #[test]
    fn an_unknown_inode_is_enoent_and_nonsense_no_panic() {
        assert_eq!(Diag::new().unwrap().ask(u32::MAX - 1).unwrap_err().code, libc::ENOENT);
        for length in 0..64 {
            let mut bytes = vec![0xffu8; length];
            assert!(parse(&bytes).is_err());
            if length >= 4 {
                bytes[..4].copy_from_slice(&(length as u32).to_ne_bytes());
                let _ = parse(&bytes);
            }
        }
    }
}
