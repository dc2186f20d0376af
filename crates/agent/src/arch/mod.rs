//! Everything that differs between processor architectures: the agent's code, registers, extended
//! state, the signal frame, the vdso. Another architecture is another folder with the same names.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
