//! The image format: the envelope of a file, the records that have many owners, and the store that
//! holds a set of images.
//!
//! The layout is that of CRIU 4.x, so that each reads what the other wrote. Nothing here knows a kernel
//! resource: what one kind owns alone, that kind declares.
#![forbid(unsafe_code)]

mod envelope;
mod file_entry;
pub mod pagemap;
pub mod records;
mod stats;
mod store;
pub mod vma;
pub mod working_set;
pub mod x86;

pub use envelope::{Kind, Reader, Stream, Writer, framed, kind};
pub use file_entry::FileEntry;
pub use prost::Message;
pub use records::*;
pub use store::Dir;
