//! The command `crtools`.
#![forbid(unsafe_code)]
fn main() {}
