//! Kernel interfaces, one file each: thin, safe, documented wrappers, and pure parsers of `/proc` text.
//!
//! Every call returns the error number with the name of the call ([`model::Errno`]); what it was about,
//! the caller knows.

pub mod aio;
pub mod apart;
pub mod bpf;
mod call;
pub mod clock;
pub mod cred;
pub mod each;
pub mod fanotify;
pub mod fd;
pub mod inherited;
pub mod inotify;
pub mod inside;
pub mod memory;
pub mod name;
pub mod pagemap;
pub mod pidfile;
pub mod place;
pub mod probe;
pub mod proc;
pub mod process;
pub mod ptrace;
pub mod restart;
pub mod seccomp;
pub mod shm;
pub mod socket;
pub mod stand_in;
pub mod threads;
pub mod timer;
pub mod tty;
pub mod tun;
pub mod unix_diag;
pub mod uring;
pub mod userfault;
pub mod vmflags;

pub use call::{check, syscall};
pub use model::Errno;
