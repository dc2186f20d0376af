//! What every part of crtools shares: failures and what helps against them, the table of options.
#![forbid(unsafe_code)]

pub mod failure;
pub mod options;

pub use failure::{Cause, Errno, Failure, Failures, Object, Remedy};
pub use options::Options;
