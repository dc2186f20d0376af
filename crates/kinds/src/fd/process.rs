//! Files of `/proc` that belong to a process, of the tree or of one that has ended.
//!
//! Read from: the path.
//! Rebuilt by: opening them when all threads are there; for a process that has ended, one with its id is there for a
//! moment. It stays until the tree is whole when the file is somebody's working directory or root.
//! Refused: files of a thread that has ended, as its process may live.

use super::regular::{self, RegFileEntry};
use crate::contract::OpenCx;
use model::{Errno, Failure};
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use sys::process::StandIn;

/// The process that a path in a `/proc` names, and the thread, if it names one.
pub fn of_path(path: &Path) -> Option<(i32, Option<i32>)> {
    let number = |path: &Path| path.file_name()?.to_str()?.parse::<i32>().ok();
    let is_root = |path: &Path| sys::fd::is_proc_root(path);
    let folder = path.ancestors().find(|at| number(at).is_some() && at.parent().is_some_and(is_root))?;
    let mut rest = path.strip_prefix(folder).ok()?.iter();
    let thread = match (rest.next(), rest.next()) {
        (Some(name), Some(thread)) if name == "task" => thread.to_str()?.parse().ok(),
        _ => None,
    };
    Some((number(folder)?, thread))
}

/// The process that a file with this path belonged to, which is another one than the one there now, if any.
///
/// # Errors
/// Why it cannot be found again.
pub fn ended(
    path: &Path,
    (pid, thread): (i32, Option<i32>),
    tids: &HashSet<i32>,
) -> Result<i32, &'static str> {
    if thread.is_some_and(|thread| thread != pid) {
        return Err("belongs to a thread that has ended, which is not carried");
    }
    let is_there = std::fs::symlink_metadata(path).is_ok();
    let rest: std::path::PathBuf =
        path.iter().skip_while(|name| **name != *pid.to_string()).skip(1).collect();
    let would_be = std::fs::symlink_metadata(Path::new("/proc/self").join(rest)).is_ok();
    if !is_there && (tids.contains(&pid) || !would_be) {
        return Err("is a file that its process has no more");
    }
    Ok(pid)
}

/// Opens a file of a process that has ended.
///
/// # Errors
/// When somebody has its id now.
pub fn open(pid: i32, entry: &RegFileEntry, flags: i32, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
    let path = regular::path_of(entry);
    let object = || model::Object::Path(path.display().to_string());
    let explain = |error: Errno| error.on(object(), "stand in for the process that it belonged to");
    // It may be one of the tree, which is there already.
    if let Ok(fd) = sys::fd::open(&path, flags)
        && cx.files.remap(entry.id).is_none()
    {
        return Ok(fd);
    }
    if let std::collections::hash_map::Entry::Vacant(place) = cx.stand_ins.entry(pid) {
        place.insert(StandIn::new(pid).map_err(explain)?);
    }
    sys::fd::open(&path, flags).map_err(|error| error.on(object(), "open it again"))
}
