//! The agent: a few hundred bytes of machine code that execute a list of system calls from shared
//! memory, write each result beside its call, and sleep for the next list.
//!
//! It runs in a stranger's address space, without a stack, and knows nothing of what the calls are for.
//! Three ways to run calls in another process: one at a time through ptrace ([`remote`]), a list in a
//! frozen thread ([`inject`]), and as the only content of a new process ([`puppet`]).

pub mod arch;
pub mod area;
pub mod crew;
pub mod hands;
pub mod inject;
pub mod list;
pub mod puppet;
pub mod remote;

pub use area::{Area, Slot, Watch};
pub use list::{Arg, Failed, Judge, List};

/// Asks the processor and the kernel what is asked once, so that nobody stands still for it.
pub fn prepare() {
    let _ = arch::Layout.component(2);
    crew::size();
    sys::process::processors();
}
