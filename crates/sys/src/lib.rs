//! Kernel interfaces, one file each: thin, safe, documented wrappers, and pure parsers of `/proc` text.
//!
//! Every call returns the error number with the name of the call ([`model::Errno`]); what it was about,
//! the caller knows. Addresses in another process are plain `u64`s wrapped in [`RemoteAddr`] where a mix-up
//! with a number is possible.

mod call;
pub mod clock;
pub mod fd;
pub mod memory;
pub mod pagemap;
pub mod proc;
pub mod process;
pub mod ptrace;
pub mod socket;
pub mod unix_diag;

pub use call::{check, syscall};
pub use model::Errno;
