//! Page contents, and nothing else: which pages are worth keeping, out of a process or a memory file into
//! `pages-*.img`, and back.
#![forbid(unsafe_code)]

pub mod ahead;
pub mod away;
pub mod background;
pub mod chain;
pub mod compressed;
pub mod lazy;
pub mod put;
pub mod select;
pub mod server;
pub mod shared;
pub mod take;
mod tls;
