//! Calls made by another process in the place of one that is not there: the kernel notes who makes them.
//!
//! The other is a child of ours with the wanted pid and credentials. It shares our descriptors, makes the calls and ends.

use crate::call::check;
use crate::process;
use model::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// In whose place.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Who {
    /// Zero for any.
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// What is to be called.
#[derive(Debug, Clone, Copy)]
pub enum Call<'c> {
    /// socketpair(2) of UNIX sockets of this type.
    Pair(i32),
    /// listen(2).
    Listen(BorrowedFd<'c>, i32),
    /// connect(2), to `sockaddr` bytes; looked up as this thread looks up paths.
    Connect(BorrowedFd<'c>, &'c [u8]),
}

/// What came of a call: an error number, or descriptors, or nothing.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Outcome {
    error: i32,
    ends: [i32; 2],
}

/// Memory that a child of ours writes to for us.
struct Shared {
    start: *mut Outcome,
    len: usize,
}

impl Shared {
    fn new(count: usize) -> Result<Shared, Errno> {
        let len = count.max(1) * size_of::<Outcome>();
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: new memory where the kernel chooses.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        check("mmap", start as i64)?;
        Ok(Shared { start: start.cast(), len })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; nobody has a reference into it.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A child with this pid, or any if it is zero or taken; zero in the child.
///
/// # Safety
/// The child may make system calls alone: other threads of ours may have held any lock.
unsafe fn fork(pid: i32, flags: i32) -> Result<i32, Errno> {
    // SAFETY: as promised.
    match unsafe { process::fork(pid, flags) } {
        // SAFETY: the same.
        Err(error) if error.code == libc::EEXIST => unsafe { process::fork(0, flags) },
        made => made,
    }
}

/// Takes on these ids, and keeps the right to reach any path. System calls only.
fn become_one(who: &Who) -> Result<(), i32> {
    const KEPT: u32 = u32::MAX;
    const VERSION_3: u32 = 0x2008_0522;
    // SAFETY: integers, and pointers to values that live for the call.
    let call = |number: i64, a: u64, b: u64, c: u64| match unsafe { libc::syscall(number, a, b, c) } {
        // SAFETY: a word of this thread.
        -1 => Err(unsafe { *libc::__errno_location() }),
        _ => Ok(()),
    };
    let mut head = [VERSION_3, 0];
    let mut sets = [0u32; 6];
    let (head, sets) = (head.as_mut_ptr() as u64, sets.as_mut_ptr());
    call(libc::SYS_capget, head, sets as u64, 0)?;
    call(libc::SYS_setgroups, who.groups.len() as u64, who.groups.as_ptr() as u64, 0)?;
    call(libc::SYS_setresgid, KEPT.into(), who.gid.into(), KEPT.into())?;
    call(libc::SYS_setresuid, KEPT.into(), who.uid.into(), KEPT.into())?;
    // What is effective goes with the user, what is permitted does not.
    call(libc::SYS_capset, head, sets as u64, 0)
}

fn make(one: &Call) -> Outcome {
    let mut ends = [-1; 2];
    // SAFETY: integers, pointers to values that live for the call, and two integers that the kernel writes.
    let result = unsafe {
        match one {
            Call::Pair(kind) => {
                libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr())
            }
            Call::Listen(fd, backlog) => libc::listen(fd.as_raw_fd(), *backlog),
            Call::Connect(fd, address) => {
                libc::connect(fd.as_raw_fd(), address.as_ptr().cast(), address.len() as u32)
            }
        }
    };
    // SAFETY: a word of this thread.
    let error = if result < 0 { unsafe { *libc::__errno_location() } } else { 0 };
    Outcome { error, ends }
}

/// What came of one call: the ends of a pair, or nothing.
pub type Made = Result<Option<(OwnedFd, OwnedFd)>, Errno>;

/// Makes calls in the place of `who`, in this order; also tells whether it was with the wanted pid, which may be taken.
///
/// # Errors
/// When it cannot be done at all; what comes of each call is told beside it.
pub fn run(who: &Who, calls: &[Call]) -> Result<(Vec<Made>, bool), Errno> {
    let shared = Shared::new(calls.len())?;
    // SAFETY: what the child does before it ends are system calls and writes to memory of its own and `shared`.
    let child = unsafe { fork(who.pid, libc::CLONE_FILES) }?;
    if child == 0 {
        let changed = become_one(who);
        for (at, call) in calls.iter().enumerate() {
            let outcome = match changed {
                Ok(()) => make(call),
                Err(error) => Outcome { error, ends: [-1; 2] },
            };
            // SAFETY: there is room for as many as there are calls.
            unsafe { shared.start.add(at).write(outcome) };
        }
        // SAFETY: ends the child, without anything of ours.
        unsafe { libc::_exit(0) };
    }
    let status = process::wait(child, true)?.unwrap_or(0);
    if !libc::WIFEXITED(status) {
        return Err(Errno { call: "clone3", code: libc::ECHILD });
    }
    let results = calls.iter().enumerate().map(|(at, call)| {
        // SAFETY: written by the child, which has ended.
        let Outcome { error, ends } = unsafe { shared.start.add(at).read() };
        let name = match call {
            Call::Pair(_) => "socketpair",
            Call::Listen(..) => "listen",
            Call::Connect(..) => "connect",
        };
        if error != 0 {
            return Err(Errno { call: name, code: error });
        }
        // SAFETY: descriptors that the kernel made in our table, for us alone.
        let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(matches!(call, Call::Pair(_)).then(|| (owned(ends[0]), owned(ends[1]))))
    });
    Ok((results.collect(), who.pid == 0 || who.pid == child))
}

/// Has a pid taken, until it is dropped.
#[derive(Debug)]
pub struct Placeholder(i32);

impl Placeholder {
    /// None when somebody has the pid.
    ///
    /// # Errors
    /// Those of clone3(2).
    pub fn new(pid: i32) -> Result<Option<Placeholder>, Errno> {
        // SAFETY: the child makes system calls alone.
        let child = unsafe { fork(pid, libc::CLONE_FILES) }?;
        if child == 0 {
            // SAFETY: waits for the signal that ends it.
            unsafe {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                loop {
                    libc::pause();
                }
            }
        }
        let own = Placeholder(child);
        Ok((child == pid).then_some(own))
    }
}

impl Drop for Placeholder {
    fn drop(&mut self) {
        let _ = process::kill(self.0, libc::SIGKILL);
        let _ = process::wait(self.0, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_made_a_pair_is_told_by_its_ends() {
        let own = std::process::id() as i32;
        // Not the wanted one: it is taken by ourselves.
        let who = Who { pid: own, uid: 12, gid: 34, groups: vec![56, 78] };
        let (mut made, is_exact) = run(&who, &[Call::Pair(libc::SOCK_STREAM)]).expect("made by somebody");
        assert!(!is_exact);
        // Without root nobody becomes another.
        let Ok(Some((one, other))) = made.remove(0) else { return };
        for end in [one, other] {
            let mut bytes = [0; 12];
            let count = crate::socket::option(&end, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut bytes);
            assert_eq!(count, Ok(12));
            let words: Vec<u32> =
                bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
            assert_eq!(words[1..], [12, 34]);
            assert_ne!(words[0] as i32, own);
        }
    }
}
