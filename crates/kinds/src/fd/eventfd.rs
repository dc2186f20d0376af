//! eventfd(2): a 64-bit counter behind a file descriptor.
//!
//! Read from: `fdinfo` (`eventfd-count`, hexadecimal; `eventfd-semaphore`, since Linux 6.4).
//! Rebuilt by: eventfd2(2) with zero, then write(2) of the counter.
//! Not kept: `eventfd-id` (the kernel hands it out); semaphore mode, where `fdinfo` lacks it.
//! Ordering: none; an eventfd refers to no other object.

use crate::contract::{FileTable, DumpCx, FdKind, FdProbe, OpenCx, set_new_status};
use image::{FdTypes, FownEntry};
use model::{Failure, Object};
use std::os::fd::OwnedFd;

pub static KIND: Eventfd = Eventfd;

#[derive(Debug)]
pub struct Eventfd;

#[derive(Clone, PartialEq, prost::Message)]
pub struct EventfdFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint64, required, tag = "4")]
    pub counter: u64,
    /// Ours: a read takes one, not all.
    #[prost(bool, optional, tag = "1000")]
    pub semaphore: Option<bool>,
}


impl FdKind for Eventfd {
    type Entry = EventfdFileEntry;
    const NAME: &'static str = "eventfd";
    const TYPE: FdTypes = FdTypes::Eventfd;
    const TAG: u32 = 8;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"eventfd")
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<EventfdFileEntry, Failure> {
        let semaphore = sys::proc::fdinfo(probe.info(), "eventfd-semaphore");
        Ok(EventfdFileEntry {
            id,
            flags: probe.flags,
            fown: probe.owner()?,
            counter: probe.info_hex("eventfd-count")?,
            semaphore: (semaphore == Some(b"1")).then_some(true),
        })
    }

    fn group(&self, entry: &EventfdFileEntry, _files: &FileTable) -> Option<u64> {
        Some(entry.id.into())
    }

    fn open(&self, entry: &EventfdFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: model::Errno| error.on(Object::Named("eventfd".into()), "make it");
        let mode = if entry.semaphore == Some(true) { libc::EFD_SEMAPHORE } else { 0 };
        // The initial value is 32 bits wide, the counter 64: writing it afterwards loses nothing.
        let fd = sys::fd::eventfd(0, mode).map_err(explain)?;
        if entry.counter != 0 {
            sys::fd::write(&fd, &entry.counter.to_ne_bytes()).map_err(explain)?;
        }
        set_new_status(&fd, 0, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e EventfdFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
