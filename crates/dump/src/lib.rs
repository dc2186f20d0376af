//! From live tasks to images: freeze, observe, survey, encode. [`run()`] is the order of it all, [`pre_dump()`] of
//! that for memory alone.
#![forbid(unsafe_code)]

mod ahead;
mod copies;
mod encode;
mod freeze;
mod hands;
mod identity;
mod keep;
mod left;
mod observe;
mod past;
mod pre;
mod run;
mod secrets;
mod survey;
mod tracer;
mod track;

pub use left::{mend, prepare};
pub use pre::run as pre_dump;
pub use run::run;
pub use track::{COMMAND as KEEPER_COMMAND, keeper};
