//! Under construction.

pub mod inherited;
pub mod probe;
