//! Paths as another root or working directory sees them, for one thread at a time, and folders that exist
//! for this process alone.

use crate::call::check;
use model::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Does the work in a thread that has `root` as its root, if given, `dir` as its working directory, `/` if
/// there is none, and no umask.
///
/// # Errors
/// Those of unshare(2) CLONE_FS, chroot(2) and chdir(2).
pub fn within<R: Send>(
    root: Option<BorrowedFd>,
    dir: Option<&Path>,
    work: impl FnOnce() -> R + Send,
) -> Result<R, Errno> {
    let dir = dir.unwrap_or(Path::new("/")).as_os_str().as_bytes();
    let dir = std::ffi::CString::new(dir).map_err(|_| Errno { call: "chdir", code: libc::EINVAL })?;
    let enter = || {
        // SAFETY: integers only; what follows concerns this thread alone.
        check("unshare", unsafe { libc::unshare(libc::CLONE_FS) }.into())?;
        // SAFETY: integers only.
        unsafe { libc::umask(0) };
        if let Some(root) = root {
            // SAFETY: integers only.
            check("fchdir", unsafe { libc::fchdir(root.as_raw_fd()) }.into())?;
            // SAFETY: the kernel reads a C string.
            check("chroot", unsafe { libc::chroot(c".".as_ptr()) }.into())?;
        }
        // SAFETY: the kernel reads a C string that lives for the call.
        check("chdir", unsafe { libc::chdir(dir.as_ptr()) }.into())
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| enter().map(|_| work()));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// An empty file system in memory that is mounted nowhere, and gone with the last that uses it.
///
/// Source: fsopen(2), fsmount(2).
pub fn nowhere() -> Result<OwnedFd, Errno> {
    const CLOEXEC: u64 = 1;
    const FSCONFIG_CMD_CREATE: u64 = 6;
    let call = |name, number: i64, args: [u64; 5]| {
        // SAFETY: integers, and pointers to C strings that live for ever.
        check(name, unsafe { libc::syscall(number, args[0], args[1], args[2], args[3], args[4]) })
    };
    // SAFETY: a number that the kernel just made for us alone.
    let owned = |fd: i64| unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let name: &'static CStr = c"tmpfs";
    let fs = owned(call("fsopen", libc::SYS_fsopen, [name.as_ptr() as u64, CLOEXEC, 0, 0, 0])?);
    let number = fs.as_raw_fd() as u64;
    call("fsconfig", libc::SYS_fsconfig, [number, FSCONFIG_CMD_CREATE, 0, 0, 0])?;
    call("fsmount", libc::SYS_fsmount, [number, CLOEXEC, 0, 0, 0]).map(owned)
}

/// The mount that `dir` is in, anew, mounted nowhere, and such that it can be written to.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN, or where the mount was locked. Source: open_tree(2), mount_setattr(2).
pub fn writable(dir: &Path) -> Result<OwnedFd, Errno> {
    const OPEN_TREE_CLONE: u32 = 1;
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let path = std::ffi::CString::new(dir.as_os_str().as_bytes());
    let path = path.map_err(|_| Errno { call: "open_tree", code: libc::EINVAL })?;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    // SAFETY: the kernel reads a C string that lives for the call.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    // SAFETY: a number that the kernel just made for us alone.
    let tree = unsafe { OwnedFd::from_raw_fd(check("open_tree", tree)? as i32) };
    // struct mount_attr: what to set, what to clear, propagation, a user namespace.
    let attr = [0, MOUNT_ATTR_RDONLY, 0, 0];
    let (number, empty, len) = (tree.as_raw_fd(), c"".as_ptr(), size_of_val(&attr));
    // SAFETY: the kernel reads a C string and the words, which live for the call.
    let set = unsafe {
        libc::syscall(libc::SYS_mount_setattr, number, empty, libc::AT_EMPTY_PATH, attr.as_ptr(), len)
    };
    check("mount_setattr", set)?;
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_place_is_for_one_thread_alone() {
        // Needs the right to mount; without it there is nothing to see.
        let Ok(folder) = nowhere() else { return };
        let before = std::env::current_dir().unwrap();
        let seen = within(Some(folder.as_fd()), None, || {
            std::fs::create_dir_all("/a/b").unwrap();
            std::fs::read_dir("/").unwrap().count()
        });
        assert_eq!(seen, Ok(1));
        assert_eq!(std::env::current_dir().unwrap(), before);
        assert!(!Path::new("/a/b").exists());
    }
}
