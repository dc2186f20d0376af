//! TCP sockets over IPv4 and IPv6 that listen, or are not connected yet.
//!
//! Read from: getsockopt(2) (TCP_INFO tells the state and the backlog), getsockname(2).
//! Rebuilt by: socket(2), options, bind(2), listen(2) with the same backlog.
//! Refused: connections, made or waiting to be accepted; other protocols.

use super::socket_options;
use crate::contract::{DumpCx, FdKind, FdProbe, OpenCx, set_status};
use image::{FdTypes, FownEntry, SkOptsEntry, SkShutdown};
use model::options;
use model::{Errno, Failure, Object};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use sys::socket;

pub static KIND: Inet = Inet;

#[derive(Debug)]
pub struct Inet;

/// Addresses are in the order of the network, ports in that of the host.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InetSkEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub family: u32,
    #[prost(uint32, required, tag = "4")]
    pub r#type: u32,
    #[prost(uint32, required, tag = "5")]
    pub proto: u32,
    #[prost(uint32, required, tag = "6")]
    pub state: u32,
    #[prost(uint32, required, tag = "7")]
    pub src_port: u32,
    #[prost(uint32, required, tag = "8")]
    pub dst_port: u32,
    #[prost(uint32, required, tag = "9")]
    pub flags: u32,
    #[prost(uint32, required, tag = "10")]
    pub backlog: u32,
    #[prost(uint32, repeated, tag = "11", packed = "false")]
    pub src_addr: Vec<u32>,
    #[prost(uint32, repeated, tag = "12", packed = "false")]
    pub dst_addr: Vec<u32>,
    #[prost(message, required, tag = "13")]
    pub fown: FownEntry,
    #[prost(message, required, tag = "14")]
    pub opts: SkOptsEntry,
    #[prost(bool, optional, tag = "15")]
    pub v6only: Option<bool>,
    #[prost(message, optional, tag = "16")]
    pub ip_opts: Option<IpOptsEntry>,
    #[prost(string, optional, tag = "17")]
    pub ifname: Option<String>,
    #[prost(uint32, optional, tag = "18")]
    pub ns_id: Option<u32>,
    #[prost(enumeration = "SkShutdown", optional, tag = "19")]
    pub shutdown: Option<i32>,
    #[prost(message, optional, tag = "20")]
    pub tcp_opts: Option<TcpOptsEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct IpOptsEntry {
    #[prost(bool, optional, tag = "1")]
    pub freebind: Option<bool>,
    #[prost(message, optional, tag = "4")]
    pub raw: Option<IpOptsRawEntry>,
    #[prost(bool, optional, tag = "5")]
    pub pktinfo: Option<bool>,
    #[prost(uint32, optional, tag = "6")]
    pub tos: Option<u32>,
    #[prost(uint32, optional, tag = "7")]
    pub ttl: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct IpOptsRawEntry {
    #[prost(bool, optional, tag = "1")]
    pub hdrincl: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub nodefrag: Option<bool>,
    #[prost(bool, optional, tag = "3")]
    pub checksum: Option<bool>,
    #[prost(uint32, repeated, tag = "4", packed = "false")]
    pub icmpv_filter: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TcpOptsEntry {
    #[prost(bool, optional, tag = "1")]
    pub cork: Option<bool>,
    #[prost(bool, optional, tag = "2")]
    pub nodelay: Option<bool>,
    #[prost(uint32, optional, tag = "3")]
    pub keepcnt: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub keepidle: Option<u32>,
    #[prost(uint32, optional, tag = "5")]
    pub keepintvl: Option<u32>,
}


const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const IP_FREEBIND: i32 = 15;

/// What `struct tcp_info` begins with. Source: uapi/linux/tcp.h.
struct TcpInfo {
    state: u32,
    /// Of a listener: connections that wait to be accepted, and how many may.
    waiting: u32,
    backlog: u32,
}

fn tcp_info(probe: &FdProbe) -> Result<TcpInfo, Errno> {
    let mut info = [0u8; 104];
    socket::option(&probe.fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let word = |at: usize| u32::from_ne_bytes(info[at..at + 4].try_into().expect("four bytes"));
    Ok(TcpInfo { state: info[0].into(), waiting: word(24), backlog: word(28) })
}

/// Address, port and scope of `sockaddr` bytes.
fn parse_address(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?);
    let address: IpAddr = match family {
        libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(bytes.get(4..8)?).ok()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes.get(8..24)?).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(address, port))
}

/// `sockaddr` bytes of an address in words as they are stored.
fn make_address(family: u32, words: &[u32], port: u32) -> Option<Vec<u8>> {
    let octets: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let mut address = (family as u16).to_ne_bytes().to_vec();
    address.extend_from_slice(&(port as u16).to_be_bytes());
    match (family as i32, octets.len()) {
        (libc::AF_INET, 4) => {
            address.extend_from_slice(&octets);
            address.resize(16, 0);
        }
        (libc::AF_INET6, 16) => {
            address.extend_from_slice(&[0; 4]);
            address.extend_from_slice(&octets);
            address.resize(28, 0);
        }
        _ => return None,
    }
    Some(address)
}

fn words(address: IpAddr) -> Vec<u32> {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    octets.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("four bytes"))).collect()
}

impl FdKind for Inet {
    type Entry = InetSkEntry;
    const NAME: &'static str = "inet socket";
    const TYPE: FdTypes = FdTypes::Inetsk;
    const TAG: u32 = 4;

    fn claims(&self, probe: &FdProbe) -> bool {
        let is_inet = |family| matches!(family, libc::AF_INET | libc::AF_INET6);
        probe.family.is_some_and(is_inet)
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<InetSkEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "read the socket");
        let get = |level, name| socket::int_option(&probe.fd, level, name).map_err(explain);
        let family = get(libc::SOL_SOCKET, libc::SO_DOMAIN)?;
        let kind = get(libc::SOL_SOCKET, libc::SO_TYPE)?;
        let protocol = get(libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        let name = socket::name(&probe.fd, false).map_err(explain)?;
        let address = parse_address(&name).ok_or_else(|| probe.refuse("has an address not understood"))?;
        let object = |what: &str| Object::Fd { number: probe.number, what: format!("{what} {address}") };
        if protocol != libc::IPPROTO_TCP {
            let object = object(&format!("inet socket of protocol {protocol}"));
            return Err(Failure::unsupported(object, "only TCP is carried yet").of(probe.pid));
        }
        let object = object("tcp socket");
        let info = tcp_info(probe).map_err(explain)?;
        match info.state {
            TCP_LISTEN if info.waiting == 0 => {}
            TCP_LISTEN => {
                let why = format!("{} connections wait to be accepted", info.waiting);
                return Err(Failure::unsupported(object, why).of(probe.pid));
            }
            TCP_CLOSE => {}
            _ => {
                let why = "has an established connection";
                return Err(Failure::policy(object, why, &options::TCP_ESTABLISHED).of(probe.pid));
            }
        }
        if probe.has_program() {
            return Err(Failure::unsupported(object, "has a program of eBPF attached").of(probe.pid));
        }
        let flag = |level, name| socket::int_option(&probe.fd, level, name).ok().map(|value| value != 0);
        let number = |name| socket::int_option(&probe.fd, libc::IPPROTO_TCP, name).ok().map(|value| value as u32);
        let mut opts = probe.socket_options()?;
        opts.tcp_keepcnt = number(libc::TCP_KEEPCNT);
        opts.tcp_keepidle = number(libc::TCP_KEEPIDLE);
        opts.tcp_keepintvl = number(libc::TCP_KEEPINTVL);
        Ok(InetSkEntry {
            id,
            ino: probe.stat.st_ino as u32,
            family: family as u32,
            r#type: kind as u32,
            proto: protocol as u32,
            state: info.state,
            src_port: address.port().into(),
            dst_port: 0,
            flags: probe.flags,
            backlog: if info.state == TCP_LISTEN { info.backlog } else { 0 },
            src_addr: words(address.ip()),
            dst_addr: words(match address.ip() {
                IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            }),
            fown: probe.owner()?,
            opts,
            v6only: match family {
                libc::AF_INET6 => flag(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
                _ => None,
            },
            ip_opts: Some(IpOptsEntry {
                freebind: flag(libc::IPPROTO_IP, IP_FREEBIND),
                ..IpOptsEntry::default()
            }),
            ifname: None,
            ns_id: None,
            shutdown: None,
            tcp_opts: Some(TcpOptsEntry {
                cork: flag(libc::IPPROTO_TCP, libc::TCP_CORK),
                nodelay: flag(libc::IPPROTO_TCP, libc::TCP_NODELAY),
                keepcnt: None,
                keepidle: None,
                keepintvl: None,
            }),
        })
    }

    fn link(&self, entries: &[(u32, &InetSkEntry)], _files: &crate::contract::FileTable) -> model::Failures {
        let mut failures = Vec::new();
        for (id, entry) in entries {
            let object = Object::Named(format!("tcp socket {id}"));
            if entry.proto != libc::IPPROTO_TCP as u32 {
                let why = format!("a socket of protocol {} is not carried yet", entry.proto);
                failures.push(Failure::unsupported(object, why));
            } else if !matches!(entry.state, TCP_LISTEN | TCP_CLOSE) {
                let why = "has an established connection";
                failures.push(Failure::policy(object, why, &options::TCP_ESTABLISHED));
            } else if make_address(entry.family, &entry.src_addr, entry.src_port).is_none() {
                failures.push(Failure::corrupt("files.img", None, format!("socket {id} has no address")));
            }
        }
        failures
    }

    fn open(&self, entry: &InetSkEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let address = make_address(entry.family, &entry.src_addr, entry.src_port)
            .ok_or_else(|| Failure::corrupt("files.img", None, "a socket has no address"))?;
        let shown = parse_address(&address).map_or_else(String::new, |address| address.to_string());
        let explain = |error: Errno| error.on(Object::Named(format!("tcp socket {shown}")), "make it");
        let fd = socket::socket(entry.family as i32, entry.r#type as i32, entry.proto as i32).map_err(explain)?;
        let set = |level, name, value: u32| {
            socket::set_option(&fd, level, name, &value.to_ne_bytes()).map_err(explain)
        };
        // Before bind: these decide whether the address may be taken.
        set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        if let Some(v6only) = entry.v6only {
            set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, v6only.into())?;
        }
        if entry.ip_opts.as_ref().is_some_and(|opts| opts.freebind == Some(true)) {
            set(libc::IPPROTO_IP, IP_FREEBIND, 1)?;
        }
        socket_options::dump(&fd)
            .and_then(|now| socket_options::restore(&fd, &entry.opts, &now))
            .map_err(explain)?;
        if entry.src_port != 0 {
            socket::bind(&fd, &address).map_err(|error| match error.code {
                libc::EADDRINUSE => {
                    let object = Object::Named(format!("tcp socket {shown}"));
                    Failure::conflict(object, "bind it", who_has(entry.src_port as u16))
                }
                _ => explain(error),
            })?;
        }
        restore_tcp_options(&fd, &entry.opts, entry.tcp_opts.as_ref()).map_err(explain)?;
        if entry.state == TCP_LISTEN {
            socket::listen(&fd, entry.backlog as i32).map_err(explain)?;
        }
        set(libc::SOL_SOCKET, libc::SO_REUSEADDR, (entry.opts.reuseaddr == Some(true)).into())?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e InetSkEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Says who has a port of TCP that is taken.
fn who_has(port: u16) -> String {
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"].map(|path| sys::fd::text(path).unwrap_or_default());
    let rows = tables.iter().flat_map(|text| sys::proc::parse_net_tcp(text));
    let users = rows.filter(|row| row.local_port == port).map(|row| {
        let state = if u32::from(row.state) == TCP_LISTEN { "listening".into() } else { format!("state {}", row.state) };
        let holders = sys::fd::holders(row.inode).into_iter().map(|(pid, name)| format!("process {pid} ({name})"));
        let holders = holders.collect::<Vec<_>>().join(", ");
        format!("a socket ({state}) of {}", if holders.is_empty() { "no process that can be seen" } else { &holders })
    });
    match users.collect::<Vec<_>>().join("; ") {
        none if none.is_empty() => "the address was in use a moment ago".into(),
        users => format!("the address is in use: {users}"),
    }
}

fn restore_tcp_options(fd: &OwnedFd, opts: &SkOptsEntry, tcp: Option<&TcpOptsEntry>) -> Result<(), Errno> {
    let flag = |value: Option<bool>| value.map(u32::from);
    let values = [
        (libc::TCP_KEEPCNT, opts.tcp_keepcnt),
        (libc::TCP_KEEPIDLE, opts.tcp_keepidle),
        (libc::TCP_KEEPINTVL, opts.tcp_keepintvl),
        (libc::TCP_NODELAY, tcp.and_then(|tcp| flag(tcp.nodelay))),
        (libc::TCP_CORK, tcp.and_then(|tcp| flag(tcp.cork))),
    ];
    for (name, value) in values {
        if let Some(value) = value.filter(|value| *value != 0) {
            socket::set_option(fd, libc::IPPROTO_TCP, name, &value.to_ne_bytes())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_way_to_the_image_and_back() {
        for address in ["127.0.0.1:6379", "[::1]:80", "0.0.0.0:0"] {
            let address: SocketAddr = address.parse().unwrap();
            let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
            let bytes = make_address(family as u32, &words(address.ip()), address.port().into()).unwrap();
            assert_eq!(parse_address(&bytes), Some(address));
        }
        assert_eq!(make_address(libc::AF_INET as u32, &[], 1), None);
    }
}
