//! Netlink sockets: netlink(7).
//!
//! Read from: getsockname(2) and getpeername(2) (port and groups), getsockopt(2) (protocol, memberships above the first
//! 32, options).
//! Rebuilt by: socket(2), bind(2) to the same port, memberships, connect(2), options.
//! Refused: sockets with a filter; with messages that were not read, which only the kernel could send again; a port that
//! somebody has at the restore.

use super::socket_options;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry, SkOptsEntry};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::os::fd::OwnedFd;
use sys::socket;

pub static KIND: Netlink = Netlink;

#[derive(Debug)]
pub struct Netlink;

#[derive(Clone, PartialEq, prost::Message)]
pub struct NetlinkSkEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub protocol: u32,
    #[prost(uint32, required, tag = "4")]
    pub state: u32,
    #[prost(uint32, required, tag = "6")]
    pub flags: u32,
    #[prost(uint32, required, tag = "7")]
    pub portid: u32,
    /// A bit for each group, the first group the lowest of the first word.
    #[prost(uint32, repeated, tag = "8", packed = "false")]
    pub groups: Vec<u32>,
    #[prost(uint32, required, tag = "9")]
    pub dst_portid: u32,
    #[prost(uint32, required, tag = "10")]
    pub dst_group: u32,
    #[prost(message, required, tag = "11")]
    pub fown: FownEntry,
    #[prost(message, required, tag = "12")]
    pub opts: SkOptsEntry,
    #[prost(uint32, optional, tag = "13")]
    pub ns_id: Option<u32>,
    /// Ours: SOCK_RAW or SOCK_DGRAM, between which the kernel makes no difference.
    #[prost(uint32, optional, tag = "1000")]
    pub r#type: Option<u32>,
    /// Ours: a bit for each option that is on, by its number.
    #[prost(uint32, optional, tag = "1001")]
    pub options: Option<u32>,
}

const SOL_NETLINK: i32 = 270;
const ADD_MEMBERSHIP: i32 = 1;
const LIST_MEMBERSHIPS: i32 = 9;
/// Options that are on or off: PKTINFO, BROADCAST_ERROR, NO_ENOBUFS, LISTEN_ALL_NSID, CAP_ACK, EXT_ACK, GET_STRICT_CHK.
const OPTIONS: [i32; 7] = [3, 4, 5, 8, 10, 11, 12];
/// As sock_diag(7) has it. Source: include/net/netlink.h.
const CONNECTED: u32 = 1;
/// Far more than any protocol has.
const GROUP_WORDS: usize = 64;

/// `struct sockaddr_nl`.
fn address(port: u32, groups: u32) -> Vec<u8> {
    let head = [(libc::AF_NETLINK as u16).to_ne_bytes(), [0; 2]].concat();
    [&head[..], &port.to_ne_bytes(), &groups.to_ne_bytes()].concat()
}

/// Port and groups of one.
fn parse(address: &[u8]) -> Option<(u32, u32)> {
    let word = |at: usize| Some(u32::from_ne_bytes(*address.get(at..at + 4)?.first_chunk()?));
    Some((word(4)?, word(8)?))
}

fn object(entry: &NetlinkSkEntry) -> Object {
    Object::Named(format!("netlink socket of protocol {}, port {}", entry.protocol, entry.portid))
}

impl FdKind for Netlink {
    type Entry = NetlinkSkEntry;
    const NAME: &'static str = "netlink socket";
    const TYPE: FdTypes = FdTypes::Netlinksk;
    const TAG: u32 = 7;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.family == Some(libc::AF_NETLINK)
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<NetlinkSkEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "ask about the netlink socket");
        let int = |name| socket::int_option(&probe.fd, libc::SOL_SOCKET, name).map_err(explain);
        let strange = || probe.refuse("has an address that is none");
        let (portid, first_groups) = parse(&socket::name(&probe.fd, false).map_err(explain)?).ok_or_else(strange)?;
        let (dst_portid, dst_groups) = parse(&socket::name(&probe.fd, true).map_err(explain)?).ok_or_else(strange)?;
        if probe.has_program() {
            return Err(probe.refuse("has a program of eBPF attached"));
        }
        match socket::peek(&probe.fd, &mut [0; 1]) {
            Err(error) if error.code == libc::EAGAIN => {}
            Err(error) if error.code != libc::ENOBUFS => return Err(explain(error)),
            _ => return Err(probe.refuse("is a netlink socket with messages that were not read").passes()),
        }
        let mut bytes = [0u8; 4 * GROUP_WORDS];
        let told = socket::option(&probe.fd, SOL_NETLINK, LIST_MEMBERSHIPS, &mut bytes).unwrap_or(0);
        let mut groups: Vec<u32> = bytes[..told.min(bytes.len())].chunks_exact(4).map(word).collect();
        if groups.is_empty() {
            groups.push(first_groups);
        }
        groups.truncate(groups.iter().rposition(|word| *word != 0).map_or(1, |last| last + 1));
        let is_on = |name: &&i32| socket::int_option(&probe.fd, SOL_NETLINK, **name).is_ok_and(|on| on != 0);
        let options = OPTIONS.iter().filter(is_on).fold(0, |bits, name| bits | 1 << name);
        let is_connected = dst_portid != 0 || dst_groups != 0;
        Ok(NetlinkSkEntry {
            id,
            ino: probe.stat.st_ino as u32,
            protocol: int(libc::SO_PROTOCOL)? as u32,
            state: if is_connected { CONNECTED } else { 0 },
            flags: probe.flags,
            portid,
            groups,
            dst_portid,
            // The kernel shows the number of the one group as a bit.
            dst_group: if dst_groups == 0 { 0 } else { dst_groups.trailing_zeros() + 1 },
            fown: probe.owner()?,
            opts: probe.socket_options()?,
            ns_id: None,
            r#type: Some(int(libc::SO_TYPE)? as u32),
            options: (options != 0).then_some(options),
        })
    }

    fn link(&self, entries: &[(u32, &NetlinkSkEntry)], _files: &FileTable) -> Failures {
        let is_type = |kind: u32| [libc::SOCK_RAW, libc::SOCK_DGRAM].contains(&(kind as i32));
        let is_wrong = |entry: &NetlinkSkEntry| {
            entry.groups.len() > GROUP_WORDS || entry.dst_group > 32 || entry.r#type.is_some_and(|kind| !is_type(kind))
        };
        let wrong = entries.iter().filter(|(_, entry)| is_wrong(entry));
        let why = |id: &u32| format!("netlink socket {id} has groups or a type that are none");
        wrong.map(|(id, _)| Failure::corrupt("files.img", None, why(id))).collect()
    }

    fn open(&self, entry: &NetlinkSkEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(object(entry), "make it");
        let kind = entry.r#type.map_or(libc::SOCK_RAW, |kind| kind as i32);
        let fd = socket::socket(libc::AF_NETLINK, kind, entry.protocol as i32).map_err(explain)?;
        if entry.portid != 0 {
            socket::bind(&fd, &address(entry.portid, 0)).map_err(|error| match error.code {
                libc::EADDRINUSE => Failure::conflict(object(entry), "bind it", "somebody has its port")
                    .help(Remedy::Advice("another program of this net namespace has chosen the same number")),
                _ => explain(error),
            })?;
        }
        for (at, word) in entry.groups.iter().enumerate() {
            for bit in (0..32).filter(|bit| word >> bit & 1 != 0) {
                let group = (at as u32 * 32 + bit + 1).to_ne_bytes();
                socket::set_option(&fd, SOL_NETLINK, ADD_MEMBERSHIP, &group).map_err(explain)?;
            }
        }
        if entry.state == CONNECTED {
            let groups = entry.dst_group.checked_sub(1).map_or(0, |bit| 1 << bit);
            socket::connect(&fd, &address(entry.dst_portid, groups)).map_err(explain)?;
        }
        for name in OPTIONS.iter().filter(|name| entry.options.unwrap_or(0) >> **name & 1 != 0) {
            socket::set_option(&fd, SOL_NETLINK, *name, &1i32.to_ne_bytes()).map_err(explain)?;
        }
        socket_options::dump(&fd)
            .and_then(|now| socket_options::restore(&fd, &entry.opts, &now))
            .map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e NetlinkSkEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}
