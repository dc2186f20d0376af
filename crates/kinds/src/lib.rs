//! Every kind of kernel resource, one file each, both halves beside each other.
//!
//! The engines (crates `dump` and `restore`) know no kind, and the kinds know no engine: they meet in
//! [`contract`] for descriptors, and in the `ask`/`answer`/`restore` functions of `task` for what a process
//! or thread has of its own.
#![forbid(unsafe_code)]

pub mod contract;
pub mod fd;
pub mod task;
pub mod vma;
