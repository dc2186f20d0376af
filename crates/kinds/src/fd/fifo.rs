//! fifo(7): a pipe that has a name.
//!
//! Read from: as a pipe, and the path as a regular file.
//! Rebuilt by: an end of both directions that does not block, so that a lone end can be opened at all;
//! then each end by its flags; then the bytes.
//! Not kept: as a pipe.

use super::{pipe, regular};
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry, kind};
use model::{Failure, Failures, Object};
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

pub static KIND: Fifo = Fifo;

#[derive(Debug)]
pub struct Fifo;

/// `regf_id` names the record with path and flags.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FifoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, optional, tag = "3")]
    pub regf_id: Option<u32>,
}


#[derive(Debug, Default)]
struct Dumped(HashSet<u32>);

/// Held open until the end of the restore, so that no end is alone before all are there.
#[derive(Debug, Default)]
struct Opened(HashMap<u32, OwnedFd>);

impl FdKind for Fifo {
    type Entry = FifoEntry;
    const NAME: &'static str = "fifo";
    const TYPE: FdTypes = FdTypes::Fifo;
    const TAG: u32 = 17;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.format() == libc::S_IFIFO && !probe.link().starts_with(b"pipe:[") && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<FifoEntry, Failure> {
        let pipe_id = probe.stat.st_ino as u32;
        let object = || probe.object();
        let regf_id = regular::record(&probe.seen(&probe.source()), probe.flags, &object, cx)
            .map_err(|failure| failure.of(probe.pid))?;
        if cx.shelf.of::<Dumped>().0.insert(pipe_id) {
            pipe::save_content(probe, pipe_id, "fifo-data.img", kind::FIFO_DATA, cx)?;
        }
        Ok(FifoEntry { id, pipe_id, regf_id: Some(regf_id) })
    }

    fn link(&self, entries: &[(u32, &FifoEntry)], files: &FileTable) -> Failures {
        entries
            .iter()
            .filter(|(id, entry)| files.entry::<regular::Regular>(entry.regf_id.unwrap_or(*id)).is_none())
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("fifo {id} has no record of its path")))
            .collect()
    }

    fn open(&self, entry: &FifoEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let regular = cx.files.entry::<regular::Regular>(entry.regf_id.unwrap_or(entry.id));
        let regular = regular.ok_or_else(|| Failure::corrupt("files.img", None, "a fifo has no path"))?;
        if !cx.shelf.of::<Opened>().0.contains_key(&entry.pipe_id) {
            let both = regular::open(regular, (libc::O_RDWR | libc::O_NONBLOCK) as u32, cx)?;
            let is_fifo = |stat: libc::stat| stat.st_mode & libc::S_IFMT == libc::S_IFIFO;
            if !sys::fd::stat(&both).is_ok_and(is_fifo) {
                // Or the bytes would go to whatever it is.
                let object = Object::Path(String::from_utf8_lossy(&regular.name).into_owned());
                return Err(Failure::conflict(object, "", "is no fifo any more"));
            }
            pipe::load_content(&both, libc::O_NONBLOCK, entry.pipe_id, "fifo-data.img", kind::FIFO_DATA, cx)?;
            cx.shelf.of::<Opened>().0.insert(entry.pipe_id, both);
        }
        let fd = regular::open(regular, regular.flags | libc::O_NONBLOCK as u32, cx)?;
        set_status(&fd, regular.flags).map_err(|error| {
            error.on(Object::Path(String::from_utf8_lossy(&regular.name).into_owned()), "set its flags")
        })?;
        Ok(fd)
    }

    fn owner<'e>(&self, _entry: &'e FifoEntry) -> Option<&'e FownEntry> {
        None
    }
}
