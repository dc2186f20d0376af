//! x86-64.

mod code;
mod frame;
pub mod record;
mod registers;
pub mod vdso;
mod xstate;

/// The `syscall` instruction.
pub const SYSCALL: [u8; 2] = [0x0f, 0x05];

pub use code::{CONFIG_AT, Config, clone_and_exec, code, enter_at, puppet_elf, run_at};
pub use frame::{FRAME_MAX, signal_frame};
pub use registers::{Registers, Rest, is_disturbed, rest, restart_code, restart_interrupted_call};
pub use xstate::{Layout, XSTATE_MAX};

/// The name of a system call, for errors; "syscall" for those that crtools does not make.
pub fn call_name(number: u32) -> &'static str {
    macro_rules! names {
        ($($name:ident)*) => { &[$((paste::paste!(libc::[<SYS_ $name>]), stringify!($name))),*] };
    }
    const NAMES: &[(libc::c_long, &str)] = names! {
        read write close mmap mprotect munmap brk rt_sigaction rt_sigprocmask ioctl pread64 preadv madvise
        dup3 fcntl getitimer setitimer clone3 exit exit_group wait4 kill tgkill chdir fchdir chroot umask
        setpgid setsid setresuid setresgid setfsuid setfsgid setgroups capset prctl arch_prctl personality
        sigaltstack rt_sigqueueinfo rt_tgsigqueueinfo set_tid_address timer_create timer_settime timer_gettime
        timer_getoverrun timer_delete set_robust_list rseq sched_setattr setpriority prlimit64 seccomp
        pidfd_getfd close_range epoll_ctl mlock2 membarrier futex mremap fallocate epoll_create1 process_madvise
        openat socket connect clone
    };
    NAMES.iter().find(|known| known.0 == i64::from(number)).map_or("syscall", |known| known.1)
}
