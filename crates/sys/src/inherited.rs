//! Descriptors that the program got from the one that started it, and that nothing here owns.

use crate::call::check;
use model::Errno;
use std::os::fd::{FromRawFd, OwnedFd};

/// Closes a descriptor that was open when the program started. One that is not open is no error:
/// the caller wants it closed.
///
/// Call it before anything else opens files, or the number may belong to one of those.
///
/// Source: close(2).
pub fn close(number: i32) {
    // SAFETY: close(2) touches no memory. That no owner of this number exists is the caller's part:
    // at the start of the program only the standard streams have one, and those are opened anew or
    // written to by number, so the worst a wrong call does is an EBADF for a message.
    unsafe { libc::close(number) };
}

/// A duplicate of our own of an inherited descriptor. Source: fcntl(2) F_DUPFD_CLOEXEC.
pub fn duplicate(number: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: integers only.
    let fd = check("fcntl", unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) }.into())?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_descriptor_is_closed_and_closing_it_again_is_harmless() {
        let number = std::fs::File::open("/proc/self/stat").unwrap().into_raw_fd();
        close(-1);
        close(number);
        // Another test may have taken the number meanwhile, so what it shows now proves nothing
        // unless it is still the same file.
        let now = std::fs::read_link(format!("/proc/self/fd/{number}"));
        assert!(now.map_or(true, |target| !target.ends_with("stat")));
    }
}
