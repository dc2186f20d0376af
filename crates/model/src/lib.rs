//! What every part of crtools shares: the table of options and the merged options, failures and what
//! helps against them, hooks, progress, statistics.
#![forbid(unsafe_code)]

pub mod command;
pub mod failure;
pub mod hooks;
pub mod ids;
pub mod options;
pub mod progress;
pub mod stats;
pub mod version;

pub use command::Command;
pub use failure::{Cause, Errno, Failure, Failures, Object, Remedy};
pub use hooks::{Action, Hooks};
pub use ids::IdMap;
pub use options::{Compression, Options};
pub use progress::{Progress, ProgressSink};
