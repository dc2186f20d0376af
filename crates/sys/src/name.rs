//! Names of files: making, adding and finding them.

use crate::call::check;
use model::Errno;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

fn c_string(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno { call: "open", code: libc::EINVAL })
}

/// mknod(2): a fifo, a device or a socket file, with this mode whatever the umask is.
pub fn make_node(path: &Path, mode: u32, device: u64) -> Result<(), Errno> {
    let path = c_string(path)?;
    // SAFETY: the kernel reads a C string.
    check("mknod", unsafe { libc::mknod(path.as_ptr(), mode, device) }.into()).map(drop)
}

/// Gives an open file one more name; also one that has none left, if it was made with O_TMPFILE.
///
/// # Errors
/// `ENOENT` for a file whose last name is gone; `EEXIST`, `EXDEV`, `EPERM`.
///
/// Source: linkat(2) AT_EMPTY_PATH, which needs CAP_DAC_READ_SEARCH.
pub fn link(fd: impl AsFd, path: &Path) -> Result<(), Errno> {
    let path = c_string(path)?;
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads two C strings.
    let result =
        unsafe { libc::linkat(fd, c"".as_ptr(), libc::AT_FDCWD, path.as_ptr(), libc::AT_EMPTY_PATH) };
    check("linkat", result.into()).map(drop)
}

/// Where an open symbolic link leads. Source: readlinkat(2) with an empty path.
pub fn target(link: impl AsFd) -> Result<Vec<u8>, Errno> {
    let mut target = vec![0u8; libc::PATH_MAX as usize];
    let fd = link.as_fd().as_raw_fd();
    // SAFETY: the kernel reads a C string and writes at most as many bytes as there are.
    let count = unsafe { libc::readlinkat(fd, c"".as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    target.truncate(check("readlinkat", count as i64)? as usize);
    Ok(target)
}

/// Owner and group, also of what is open with O_PATH. Source: fchownat(2) AT_EMPTY_PATH.
pub fn chown(fd: impl AsFd, uid: u32, gid: u32) -> Result<(), Errno> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads a C string.
    check("fchownat", unsafe { libc::fchownat(fd, c"".as_ptr(), uid, gid, libc::AT_EMPTY_PATH) }.into())
        .map(drop)
}

/// Times of last access and change, in seconds and nanoseconds, also of what is open with O_PATH.
///
/// Source: utimensat(2) AT_EMPTY_PATH, Linux 5.8.
pub fn set_times(fd: impl AsFd, times: [(i64, i64); 2]) -> Result<(), Errno> {
    let times = times.map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: the kernel reads a C string and two timespecs on this stack.
    let result = unsafe { libc::utimensat(fd, c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) };
    check("utimensat", result.into()).map(drop)
}

/// The most that a handle can take. Source: include/linux/exportfs.h.
const MAX_HANDLE_SZ: usize = 128;

/// What finds the file again as long as it lives, under whatever names: its type in four bytes, then the handle.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has none. Source: name_to_handle_at(2).
pub fn handle(fd: impl AsFd) -> Result<Vec<u8>, Errno> {
    // struct file_handle: length, type, bytes.
    let mut room = [0u32; 2 + MAX_HANDLE_SZ / 4];
    room[0] = MAX_HANDLE_SZ as u32;
    let mut mount = 0i32;
    let (fd, at) = (fd.as_fd().as_raw_fd(), room.as_mut_ptr());
    // SAFETY: the kernel writes at most as much as the first word says, and one integer.
    let result = unsafe {
        libc::syscall(libc::SYS_name_to_handle_at, fd, c"".as_ptr(), at, &raw mut mount, libc::AT_EMPTY_PATH)
    };
    check("name_to_handle_at", result)?;
    let bytes: Vec<u8> = room[1..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(bytes[..4 + (room[0] as usize).min(MAX_HANDLE_SZ)].to_vec())
}

/// Opens what a handle stands for; `near` is anything on the same file system.
///
/// # Errors
/// `ESTALE` when the file is gone; `EINVAL` for what is no handle. Source: open_by_handle_at(2).
pub fn open_handle(near: impl AsFd, handle: &[u8], flags: i32) -> Result<OwnedFd, Errno> {
    let bad = Errno { call: "open_by_handle_at", code: libc::EINVAL };
    let length = handle.len().checked_sub(4).filter(|length| *length <= MAX_HANDLE_SZ).ok_or(bad)?;
    let mut room = [0u32; 2 + MAX_HANDLE_SZ / 4];
    room[0] = length as u32;
    for (word, bytes) in room[1..].iter_mut().zip(handle.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(four);
    }
    let near = near.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as much as the first word says, which is in the array.
    let fd =
        unsafe { libc::syscall(libc::SYS_open_by_handle_at, near, room.as_ptr(), flags | libc::O_CLOEXEC) };
    let fd = check("open_by_handle_at", fd)?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_no_handle() {
        let root = std::fs::File::open("/").unwrap();
        for handle in [&[][..], &[1; 3], &[0xff; 4], &[7; 4 + MAX_HANDLE_SZ], &[0; 5 + MAX_HANDLE_SZ]] {
            assert!(open_handle(&root, handle, libc::O_RDONLY).is_err());
        }
    }
}
