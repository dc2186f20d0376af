//! From images to live tasks: load, plan, execute. [`run`] is the order of it all.
#![forbid(unsafe_code)]

mod exec;
mod held;
mod load;
mod memory;
mod plan;
mod run;
mod stage;

pub use run::{Outcome, Resumed, run};
