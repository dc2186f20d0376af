//! From live tasks to images: freeze, observe, survey, encode. [`run`] is the order of it all.
#![forbid(unsafe_code)]

mod copies;
mod encode;
mod freeze;
mod identity;
mod observe;
mod run;
mod survey;
mod tracer;

pub use run::run;
