//! The descriptors that puppets inherit: the shared area, and the way back to the coordinator.

use crate::exec::tree_error;
use crate::load::Checkpoint;
use model::{Failure, Object};
use std::os::fd::{AsRawFd, OwnedFd};

/// Numbers of the descriptors that puppets inherit.
#[derive(Debug)]
pub struct Service {
    pub area: i32,
    pub pidfd: i32,
    /// First of the numbers for executables.
    pub exe: i32,
    _held: Vec<OwnedFd>,
}

/// Numbers above every descriptor of the tree, as duplicates that an executed program keeps.
pub fn service(checkpoint: &Checkpoint, area: &OwnedFd) -> Result<Service, Failure> {
    let limit = sys::process::own_limit(libc::RLIMIT_NOFILE).map_err(tree_error)?.0.min(1 << 20) as i32;
    let highest = checkpoint.tables.values().flatten().map(|entry| entry.fd as i32).max().unwrap_or(0);
    let base = highest.max(63) + 1;
    let room = checkpoint.tasks.len() as i32 + 2;
    if base + room > limit {
        let why = format!("the limit of {limit} open files leaves no room above descriptor {highest}");
        return Err(Failure::conflict(Object::Tree, "prepare the restore", why));
    }
    let own = sys::process::pidfd_open(sys::process::own_pid()).map_err(tree_error)?;
    let duplicate = |fd: &OwnedFd| sys::fd::duplicate_from(fd, base).map_err(tree_error);
    let (area, pidfd) = (duplicate(area)?, duplicate(&own)?);
    let numbers = (area.as_raw_fd(), pidfd.as_raw_fd());
    Ok(Service {
        area: numbers.0,
        pidfd: numbers.1,
        exe: numbers.0.max(numbers.1) + 1,
        _held: vec![area, pidfd],
    })
}
