//! signalfd(2): signals of the reader as records of a file.
//!
//! Read from: `fdinfo` (`sigmask`). Rebuilt by: signalfd4(2).
//! Not kept: nothing; the signals are the reader's and wait with the task.

use crate::contract::{FileTable, DumpCx, FdKind, FdProbe, OpenCx, set_new_status};
use image::{FdTypes, FownEntry};
use model::{Failure, Object};
use std::os::fd::OwnedFd;

pub static KIND: Signalfd = Signalfd;

#[derive(Debug)]
pub struct Signalfd;

/// `sigmask`: bit n is signal n + 1.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SignalfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint64, required, tag = "4")]
    pub sigmask: u64,
}


impl FdKind for Signalfd {
    type Entry = SignalfdEntry;
    const NAME: &'static str = "signalfd";
    const TYPE: FdTypes = FdTypes::Signalfd;
    const TAG: u32 = 10;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"signalfd")
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<SignalfdEntry, Failure> {
        let sigmask = probe.info_hex("sigmask")?;
        Ok(SignalfdEntry { id, flags: probe.flags, fown: probe.owner()?, sigmask })
    }

    fn group(&self, entry: &SignalfdEntry, _files: &FileTable) -> Option<u64> {
        Some(entry.id.into())
    }

    fn open(&self, entry: &SignalfdEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: model::Errno| error.on(Object::Named("signalfd".into()), "make it");
        let fd = sys::fd::signalfd(entry.sigmask).map_err(explain)?;
        set_new_status(&fd, 0, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e SignalfdEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
