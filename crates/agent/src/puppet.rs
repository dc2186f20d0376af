//! Puppets: processes that contain nothing but the agent.
//!
//! The first is a child of the coordinator; the others are made by their parents' lists.

use crate::arch::{self, Config};
use model::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use sys::memory::PAGE;

/// Pages of address space that a puppet needs besides its shared area: the executable and the copy.
pub const PAGES: u64 = 2 * PAGE;

/// `struct clone_args`, as far as Linux 5.7 has it. Source: clone3(2).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct CloneArgs {
    pub flags: u64,
    pub pidfd: u64,
    pub child_tid: u64,
    pub parent_tid: u64,
    pub exit_signal: u64,
    pub stack: u64,
    pub stack_size: u64,
    pub tls: u64,
    /// Address of the ids, the innermost pid namespace first, and how many.
    pub set_tid: u64,
    pub set_tid_size: u64,
    pub cgroup: u64,
}

impl CloneArgs {
    pub const SIZE: u64 = 88;

    pub fn bytes(&self) -> [u8; 88] {
        let words = [
            self.flags,
            self.pidfd,
            self.child_tid,
            self.parent_tid,
            self.exit_signal,
            self.stack,
            self.stack_size,
            self.tls,
            self.set_tid,
            self.set_tid_size,
            self.cgroup,
        ];
        let mut bytes = [0; 88];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

const _: () = assert!(size_of::<CloneArgs>() == CloneArgs::SIZE as usize);

/// A memory file with the executable of a puppet.
pub fn executable(config: &Config) -> Result<OwnedFd, Errno> {
    let file = sys::memory::memfd(c"crtools-puppet", true)?;
    let page = arch::puppet_elf(config);
    match sys::fd::write(&file, &page)? {
        length if length == page.len() => Ok(file),
        _ => Err(Errno { call: "write", code: libc::ENOSPC }),
    }
}

/// Makes a process with the given id that executes `file`. It has this process's descriptors that are
/// not close-on-exec, and its own of everything else.
///
/// # Errors
/// `EEXIST` when the id is taken; `EPERM` without CAP_CHECKPOINT_RESTORE over the pid namespace; the
/// error of execveat(2).
pub fn spawn(file: impl AsFd, pid: i32, is_sibling: bool) -> Result<(), Errno> {
    let set_tid = [pid];
    let parent = if is_sibling { libc::CLONE_PARENT } else { 0 };
    let args = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK | parent) as u64,
        exit_signal: if is_sibling { 0 } else { libc::SIGCHLD as u64 },
        set_tid: set_tid.as_ptr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    let none: [u64; 1] = [0];
    let mut failed_exec = 0i64;
    // SAFETY: clone3 reads `args` and the id, both alive. The child shares this memory while we are
    // suspended; it makes two system calls from registers alone and touches the one word that it is given.
    let result = unsafe { arch::clone_and_exec(&args, file.as_fd().as_raw_fd(), &none, &mut failed_exec) };
    if result < 0 {
        return Err(Errno { call: "clone3", code: -result as i32 });
    }
    if failed_exec < 0 {
        let _ = sys::process::wait(pid, true);
        return Err(Errno { call: "execveat", code: -failed_exec as i32 });
    }
    Ok(())
}
