//! tun and tap: network devices whose other end is a descriptor of `/dev/net/tun`.
//!
//! Read from: TUNGETIFF and its relatives, netdevice(7) requests.
//! Rebuilt by: TUNSETIFF. A device that is persistent has stayed; others are made again, with their MAC address,
//! MTU and flags.
//! Refused: devices that go with the tree and have addresses, which would be lost with their routes; filters.
//! Not kept: packets that were not read; offloads; the owner of a device that is not persistent.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::os::fd::OwnedFd;
use std::path::Path;
use sys::tun::{self, DETACH_QUEUE, Link, NOFILTER, Name, PERSIST, TAP};

pub static KIND: Tun = Tun;

#[derive(Debug)]
pub struct Tun;

#[derive(Clone, PartialEq, prost::Message)]
pub struct TunfileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub netdev: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    pub detached: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub ns_id: Option<u32>,
    /// Of ours: the flags of the file, who gets its signals, and the flags of the device.
    #[prost(uint32, optional, tag = "1000")]
    pub flags: Option<u32>,
    #[prost(message, optional, tag = "1001")]
    pub fown: Option<FownEntry>,
    #[prost(uint32, optional, tag = "1002")]
    pub device_flags: Option<u32>,
    #[prost(sint32, optional, tag = "1003")]
    pub vnethdr: Option<i32>,
    #[prost(sint32, optional, tag = "1004")]
    pub sndbuf: Option<i32>,
    /// Of devices that were not persistent.
    #[prost(bytes = "vec", optional, tag = "1005")]
    pub mac: Option<Vec<u8>>,
    #[prost(sint32, optional, tag = "1006")]
    pub mtu: Option<i32>,
    #[prost(uint32, optional, tag = "1007")]
    pub link_flags: Option<u32>,
}

/// Device numbers of `/dev/net/tun`.
const NUMBERS: (u32, u32) = (10, 200);
const PATH: &str = "/dev/net/tun";

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).trim_end_matches('\0').to_owned()
}

fn name(bytes: &[u8]) -> Option<Name> {
    let mut name = [0; libc::IFNAMSIZ];
    let is_sound = !bytes.is_empty() && bytes.len() < name.len() && !bytes.contains(&0);
    is_sound.then(|| {
        name[..bytes.len()].copy_from_slice(bytes);
        name
    })
}

impl FdKind for Tun {
    type Entry = TunfileEntry;
    const NAME: &'static str = "tun device";
    const TYPE: FdTypes = FdTypes::Tunf;
    const TAG: u32 = 11;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.format() == libc::S_IFCHR && probe.device() == NUMBERS && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<TunfileEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "ask for its device");
        let mut entry = TunfileEntry {
            id,
            flags: Some(probe.flags),
            fown: Some(probe.owner()?),
            ns_id: super::namespace::by_name("net").map(|namespace| namespace.id),
            ..TunfileEntry::default()
        };
        let Some((name, flags)) = tun::device(&probe.fd).map_err(explain)? else { return Ok(entry) };
        let refuse = |why: &str, advice: &'static str| {
            let why = format!("is network device {}, {why}", shown(&name));
            Err(probe.refuse(why).help(Remedy::Advice(advice)))
        };
        if flags & NOFILTER == 0 && flags & TAP != 0 {
            return refuse("with a filter, which is not carried", "detach the filter first");
        }
        let (vnethdr, sndbuf) = tun::sizes(&probe.fd).map_err(explain)?;
        entry.netdev = Some(name.iter().copied().take_while(|byte| *byte != 0).collect());
        entry.device_flags = Some(flags.into());
        entry.detached = (flags & DETACH_QUEUE != 0).then_some(true);
        (entry.vnethdr, entry.sndbuf) = (Some(vnethdr), Some(sndbuf));
        let link = tun::link(&name).map_err(|error| match error.code {
            libc::ENODEV => probe.refuse(format!("is network device {}, of another namespace", shown(&name))),
            _ => explain(error),
        })?;
        if flags & PERSIST == 0 {
            if link.has_ipv4 || tun::has_ipv6(&name) {
                let why = "which goes with its last descriptor, and its addresses and routes too";
                return refuse(why, "make it persistent, with ip tuntap");
            }
            entry.mac = (flags & TAP != 0).then(|| link.mac.to_vec());
            (entry.mtu, entry.link_flags) = (Some(link.mtu), Some(link.flags.into()));
        }
        Ok(entry)
    }

    fn link(&self, entries: &[(u32, &TunfileEntry)], _files: &FileTable) -> Failures {
        let is_wrong = |entry: &TunfileEntry| {
            entry.netdev.as_ref().is_some_and(|netdev| name(netdev).is_none())
                || entry.mac.as_ref().is_some_and(|mac| mac.len() != 6)
        };
        let mut failures = Failures::new();
        for (id, entry) in entries {
            if is_wrong(entry) {
                failures.push(Failure::corrupt("files.img", None, format!("tun file {id} is for no device")));
            } else if entry.netdev.is_some() && entry.device_flags.is_none() {
                let object = Object::Named(format!("network device {}", shown(entry.netdev.as_deref().unwrap_or(b""))));
                failures.push(Failure::unsupported(object, "belongs to a network namespace that is not carried yet"));
            }
        }
        failures
    }

    fn open(&self, entry: &TunfileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Path(PATH.into()), "open it again");
        let flags = entry.flags.unwrap_or(libc::O_RDWR as u32);
        let fd = sys::fd::open(Path::new(PATH), libc::O_RDWR).map_err(explain)?;
        set_status(&fd, flags).map_err(explain)?;
        let (Some(device), Some(flags)) = (entry.netdev.as_deref().and_then(name), entry.device_flags) else {
            return Ok(fd);
        };
        let object = || Object::Named(format!("network device {}", shown(&device)));
        let explain = |error: Errno| error.on(object(), "attach to it again");
        let flags = flags as u16;
        let is_there = tun::link(&device).is_ok();
        if flags & PERSIST != 0 && !is_there {
            return Err(Failure::conflict(object(), "", "is gone, though it was persistent"));
        }
        tun::attach(&fd, &device, flags & !(PERSIST | NOFILTER | DETACH_QUEUE)).map_err(explain)?;
        if let (Some(vnethdr), Some(sndbuf)) = (entry.vnethdr, entry.sndbuf) {
            tun::set_sizes(&fd, (vnethdr, sndbuf)).map_err(explain)?;
        }
        if let Some(mtu) = entry.mtu.filter(|_| !is_there) {
            let mut link = Link { mtu, flags: entry.link_flags.unwrap_or(0) as u16, ..Link::default() };
            if let Some(mac) = &entry.mac {
                link.mac.copy_from_slice(mac);
            }
            tun::set_link(&device, &link, entry.mac.is_some()).map_err(explain)?;
        }
        if entry.detached == Some(true) {
            tun::rest(&fd).map_err(explain)?;
        }
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e TunfileEntry) -> Option<&'e FownEntry> {
        entry.fown.as_ref()
    }
}
