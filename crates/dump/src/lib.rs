//! From live tasks to images: freeze, survey, encode. [`run`] is the order of it all.
#![forbid(unsafe_code)]

mod encode;
mod freeze;
mod identity;
mod run;
mod survey;

pub use run::run;
