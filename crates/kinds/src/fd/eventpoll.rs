//! epoll(7): a set of descriptors that are watched together.
//!
//! Read from: `fdinfo` (one `tfd:` line for each watch). A watch belongs to an open file, not to a number:
//! kcmp(2) tells whether the number still is that file.
//! Rebuilt by: epoll_create1(2); in the task, when its descriptors are there, one epoll_ctl(2) for each watch.
//! A watch under a number that is closed, or another file by now, is made while the number is borrowed.
//! Not kept: EPOLLEXCLUSIVE wake-up order; a watch of a file that its process has no more is refused.

use crate::contract::{DumpCx, FdKind, FdProbe, OpenCx, TaskOps, set_status};
use image::{FdTypes, FownEntry};
use agent::Arg;
use model::{Errno, Failure, Object};
use std::collections::HashMap;
use crate::task::ZERO;
use std::os::fd::OwnedFd;
use std::path::Path;
use sys::proc::EpollTarget;

pub static KIND: Eventpoll = Eventpoll;

#[derive(Debug)]
pub struct Eventpoll;

#[derive(Clone, PartialEq, prost::Message)]
pub struct EventpollFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(message, repeated, tag = "4")]
    pub tfd: Vec<EventpollTfdEntry>,
}

/// `tfd` is a number in the task that has the set; `events` as for epoll_ctl(2).
#[derive(Clone, PartialEq, prost::Message)]
pub struct EventpollTfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub tfd: u32,
    #[prost(uint32, required, tag = "3")]
    pub events: u32,
    #[prost(uint64, required, tag = "4")]
    pub data: u64,
    #[prost(uint32, optional, tag = "5")]
    pub dev: Option<u32>,
    #[prost(uint64, optional, tag = "6")]
    pub inode: Option<u64>,
    #[prost(uint64, optional, tag = "7")]
    pub pos: Option<u64>,
    /// Of ours: the number under which the process has the watched file, if not under `tfd`.
    #[prost(uint32, optional, tag = "1000")]
    pub at: Option<u32>,
    /// Of ours: the flags of what has the number `tfd` then, if anything has.
    #[prost(uint32, optional, tag = "1001")]
    pub taken: Option<u32>,
}

/// The number of a descriptor of the process that is the file of a watch.
fn find(probe: &FdProbe, target: &EpollTarget, nth: u32) -> Option<u32> {
    let numbers = sys::fd::numbers(&format!("/proc/{}/fd", probe.pid)).ok()?;
    let is_it = |number: &i32| {
        let path = format!("/proc/{}/fd/{number}", probe.pid);
        sys::fd::stat_path(Path::new(&path), true).is_ok_and(|stat| stat.st_ino == target.inode)
            && sys::process::kcmp_epoll(probe.pid, *number, probe.number, target.fd, nth) == Ok(true)
    };
    numbers.into_iter().find(is_it).map(|number| number as u32)
}


impl FdKind for Eventpoll {
    type Entry = EventpollFileEntry;
    const NAME: &'static str = "eventpoll";
    const TYPE: FdTypes = FdTypes::Eventpoll;
    const TAG: u32 = 9;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"eventpoll")
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<EventpollFileEntry, Failure> {
        let targets = sys::proc::parse_epoll(probe.info())
            .ok_or_else(|| probe.refuse("the kernel tells its watches in a way not understood"))?;
        let mut seen = HashMap::new();
        let mut tfd = Vec::with_capacity(targets.len());
        for target in targets {
            let nth = seen.entry(target.fd).or_insert(0);
            let same = sys::process::kcmp_epoll(probe.pid, target.fd as i32, probe.number, target.fd, *nth);
            *nth += 1;
            let (mut at, mut taken) = (None, None);
            match same {
                Ok(true) => {}
                Ok(false) | Err(Errno { code: libc::EBADF | libc::ENOENT, .. }) => {
                    at = find(probe, &target, *nth - 1);
                    if at.is_none() {
                        let why = format!("watches a file that was fd {}, which its process has no more", target.fd);
                        return Err(probe.refuse(why));
                    }
                    let info = sys::fd::text(&format!("/proc/{}/fdinfo/{}", probe.pid, target.fd)).ok();
                    taken = info.as_deref().and_then(|info| sys::proc::fdinfo(info, "flags")).map(|flags| {
                        let flags = std::str::from_utf8(flags).ok();
                        let flags = flags.and_then(|flags| u32::from_str_radix(flags, 8).ok());
                        flags.unwrap_or(0) & libc::O_CLOEXEC as u32
                    });
                }
                Err(error) => return Err(probe.fail(error, "compare a watched file")),
            }
            tfd.push(EventpollTfdEntry {
                id,
                tfd: target.fd,
                events: target.events,
                data: target.data,
                dev: Some(target.dev),
                inode: Some(target.inode),
                pos: Some(target.position),
                at,
                taken,
            });
        }
        Ok(EventpollFileEntry { id, flags: probe.flags, fown: probe.owner()?, tfd })
    }

    fn open(&self, entry: &EventpollFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: model::Errno| error.on(Object::Named("epoll set".into()), "make it");
        let fd = sys::fd::epoll().map_err(explain)?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn finish(&self, entry: &EventpollFileEntry, number: i32, ops: &mut TaskOps) -> Result<(), Failure> {
        ops.list.label("fill an epoll set");
        for target in &entry.tfd {
            // struct epoll_event, which is packed on x86-64 alone.
            let mut event = target.events.to_ne_bytes().to_vec();
            if !cfg!(target_arch = "x86_64") {
                event.extend_from_slice(&[0; 4]);
            }
            event.extend_from_slice(&target.data.to_ne_bytes());
            let event = ops.bytes(&event)?;
            let tfd = u64::from(target.tfd);
            let mut saved = None;
            if let Some(at) = target.at {
                if target.taken.is_some() {
                    let dup = (libc::F_DUPFD_CLOEXEC as u64).into();
                    saved = Some(ops.list.ok(libc::SYS_fcntl, &[tfd.into(), dup, ZERO]));
                }
                ops.list.ok(libc::SYS_dup3, &[u64::from(at).into(), tfd.into(), ZERO]);
            }
            let add = libc::EPOLL_CTL_ADD.into();
            ops.list.ok(libc::SYS_epoll_ctl, &[number.into(), add, tfd.into(), event.into()]);
            match (target.at, saved) {
                (Some(_), Some(saved)) => {
                    let flags = u64::from(target.taken.unwrap_or(0));
                    ops.list.ok(libc::SYS_dup3, &[Arg::Result(saved), tfd.into(), flags.into()]);
                    ops.list.ok(libc::SYS_close, &[Arg::Result(saved)]);
                }
                (Some(_), None) => {
                    ops.list.ok(libc::SYS_close, &[tfd.into()]);
                }
                (None, _) => {}
            }
        }
        Ok(())
    }

    fn owner<'e>(&self, entry: &'e EventpollFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
