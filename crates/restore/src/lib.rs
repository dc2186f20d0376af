//! From images to live tasks: load, plan, execute. [`run`] is the order of it all.
#![forbid(unsafe_code)]

mod created;
mod exec;
mod held;
mod lazy;
pub mod load;
mod memory;
pub mod plan;
mod run;
mod service;
mod stage;
mod working_set;

pub use lazy::serve as serve_pages;
pub use run::{Outcome, Resumed, run};
