//! Namespaces as files: `/proc/PID/ns/*`.
//!
//! Read from: the link, which tells the kind and the inode.
//! Rebuilt by: opening our own, as the tree shares its namespaces with us.
//! Refused: other namespaces.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx};
use image::FdTypes;
use model::{Errno, Failure, Failures, Object, Remedy};
use std::os::fd::OwnedFd;
use std::path::Path;

pub static KIND: NamespaceFile = NamespaceFile;

#[derive(Debug)]
pub struct NamespaceFile;

#[derive(Clone, PartialEq, prost::Message)]
pub struct NsFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ns_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub ns_cflag: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags: u32,
}

/// A kind of namespace, and the number that ours has in images.
#[derive(Debug)]
pub struct Namespace {
    pub name: &'static str,
    /// Of clone(2).
    flag: i32,
    pub id: u32,
}

static NAMESPACES: [Namespace; 8] = [
    Namespace { name: "pid", flag: libc::CLONE_NEWPID, id: 1 },
    Namespace { name: "net", flag: libc::CLONE_NEWNET, id: 2 },
    Namespace { name: "ipc", flag: libc::CLONE_NEWIPC, id: 3 },
    Namespace { name: "uts", flag: libc::CLONE_NEWUTS, id: 4 },
    Namespace { name: "mnt", flag: libc::CLONE_NEWNS, id: 5 },
    Namespace { name: "user", flag: libc::CLONE_NEWUSER, id: 6 },
    Namespace { name: "cgroup", flag: libc::CLONE_NEWCGROUP, id: 7 },
    Namespace { name: "time", flag: libc::CLONE_NEWTIME, id: 8 },
];

pub fn by_name(name: &str) -> Option<&'static Namespace> {
    NAMESPACES.iter().find(|namespace| namespace.name == name)
}

impl Namespace {
    /// Of this process.
    fn path(&self) -> String {
        format!("/proc/self/ns/{}", self.name)
    }
}

/// The kind of a namespace whose link is this.
fn of_link(link: &[u8]) -> Option<&'static Namespace> {
    let (name, _) = std::str::from_utf8(link).ok()?.split_once(":[")?;
    by_name(name)
}

fn of_flag(flag: u32) -> Option<&'static Namespace> {
    NAMESPACES.iter().find(|namespace| namespace.flag as u32 == flag)
}

impl FdKind for NamespaceFile {
    type Entry = NsFileEntry;
    const NAME: &'static str = "namespace";
    const TYPE: FdTypes = FdTypes::Ns;
    const TAG: u32 = 5;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.format() == libc::S_IFREG && of_link(probe.link()).is_some()
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<NsFileEntry, Failure> {
        let namespace = of_link(probe.link()).expect("it was claimed");
        let own = sys::fd::stat_path(Path::new(&namespace.path()), true)
            .map_err(|error| probe.fail(error, "compare it with our own"))?;
        if (own.st_dev, own.st_ino) != probe.inode() {
            let why = "is another namespace than that of this program, which is not carried yet";
            return Err(probe.refuse(why).help(Remedy::Advice("run crtools inside the namespace")));
        }
        Ok(NsFileEntry { id, ns_id: namespace.id, ns_cflag: namespace.flag as u32, flags: probe.flags })
    }

    fn link(&self, entries: &[(u32, &NsFileEntry)], _files: &FileTable) -> Failures {
        let wrong = entries.iter().filter(|(_, entry)| of_flag(entry.ns_cflag).is_none());
        wrong
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("file {id} is no kind of namespace")))
            .collect()
    }

    fn open(&self, entry: &NsFileEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let path = of_flag(entry.ns_cflag).expect("checked when it was loaded").path();
        let flags = entry.flags as i32 & (libc::O_ACCMODE | libc::O_PATH);
        let explain = |error: Errno| error.on(Object::Path(path.clone()), "open the namespace");
        sys::fd::open(Path::new(&path), flags).map_err(explain)
    }
}
