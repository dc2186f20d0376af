//! What workloads need from the kernel and `nix` gives only as an unsafe call, or not at all.

pub mod aio;
pub mod bpf;
pub mod call;
pub mod fault;
pub mod memory;
pub mod process;
pub mod procfs;
pub mod pty;
pub mod registers;
pub mod security;
pub mod shm;
pub mod signal;
pub mod strange;
pub mod thread;
pub mod timer;
pub mod traced;
pub mod tun;
pub mod uring;

use std::time::Duration;

/// The pause between two looks at something that is waited for.
pub fn nap() {
    std::thread::sleep(Duration::from_millis(2));
}

/// Ends this process without running destructors or exit handlers, which belong to the parent of a fork.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes an integer, touches no memory of ours and does not return.
    unsafe { libc::_exit(status) }
}
