//! General registers.

use model::Errno;
use sys::ptrace::{PRSTATUS, Stopped};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `user_regs_struct` of ptrace(2). Source: arch/x86/include/uapi/asm/ptrace.h.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub bp: u64,
    pub bx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub ax: u64,
    pub cx: u64,
    pub dx: u64,
    pub si: u64,
    pub di: u64,
    /// The system call that the thread is in, all ones outside of one.
    pub orig_ax: u64,
    pub ip: u64,
    pub cs: u64,
    pub flags: u64,
    pub sp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

const _: () = assert!(size_of::<Registers>() == 27 * 8);

/// Not inside a system call: the kernel then never restarts one.
const NO_CALL: u64 = u64::MAX;

impl Registers {
    pub fn read(thread: &Stopped) -> Result<Registers, Errno> {
        let mut registers = Registers::default();
        let length = thread.read_regset(PRSTATUS, registers.as_mut_bytes())?;
        if length != size_of::<Registers>() {
            // A 32-bit task has the register set of its own architecture.
            return Err(Errno { call: "ptrace", code: libc::ENOSYS });
        }
        Ok(registers)
    }

    pub fn write(&self, thread: &Stopped) -> Result<(), Errno> {
        thread.write_regset(PRSTATUS, self.as_bytes())
    }

    /// The same thread about to make a system call at `instruction`, where a `syscall` is.
    pub fn calling(&self, instruction: u64, number: i64, args: &[u64]) -> Registers {
        let mut six = [0; 6];
        six[..args.len()].copy_from_slice(args);
        let [di, si, dx, r10, r8, r9] = six;
        Registers { ip: instruction, ax: number as u64, di, si, dx, r10, r8, r9, orig_ax: NO_CALL, ..*self }
    }

    /// The same thread about to run the agent at `run`, with its slot.
    pub fn agent(&self, run: u64, slot: u64) -> Registers {
        const DIRECTION: u64 = 1 << 10;
        Registers { ip: run, r14: slot, orig_ax: NO_CALL, flags: self.flags & !DIRECTION, ..*self }
    }

    pub fn result(&self) -> i64 {
        self.ax as i64
    }

    /// Is the thread inside an interrupted system call?
    pub fn interrupted_call(&self) -> Option<(u64, i64)> {
        (self.orig_ax as i64 >= 0).then_some((self.orig_ax, self.ax as i64))
    }
}

/// The registers with which a thread goes on outside the kernel's care: a system call that the kernel
/// would have restarted when the thread ran on is made again by the thread itself.
pub fn restart_interrupted_call(registers: &Registers) -> Registers {
    const ERESTARTSYS: i64 = 512;
    const ERESTARTNOINTR: i64 = 513;
    const ERESTARTNOHAND: i64 = 514;
    const ERESTART_RESTARTBLOCK: i64 = 516;
    const SYSCALL_LEN: u64 = 2;
    let Some((call, result)) = registers.interrupted_call() else {
        return Registers { orig_ax: NO_CALL, ..*registers };
    };
    let again = Registers { ax: call, ip: registers.ip - SYSCALL_LEN, orig_ax: NO_CALL, ..*registers };
    let interrupted = Registers { ax: -i64::from(libc::EINTR) as u64, orig_ax: NO_CALL, ..*registers };
    match -result {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => again,
        ERESTART_RESTARTBLOCK => match call as i64 {
            // The kernel has stored the time that is left at the address the caller gave for it: sleep on
            // from there.
            libc::SYS_nanosleep if registers.si != 0 => Registers { di: registers.si, ..again },
            libc::SYS_clock_nanosleep if registers.r10 != 0 => Registers { dx: registers.r10, ..again },
            // Without a limit, or with one that is a point in time, again is the same. Otherwise whoever
            // waits for a futex looks why it woke.
            libc::SYS_futex if is_absolute_futex_wait(registers.si) || registers.r10 == 0 => again,
            libc::SYS_futex => interrupted,
            // A poll, or a sleep whose caller did not ask what is left: nobody tells how much that is. It
            // begins anew, and so may last longer, but does not end as if a signal had come.
            _ => again,
        },
        // These never restart, not even for a debugger that looked; endless ones can.
        4 if is_endless_epoll_wait(call as i64, registers) => again,
        _ => Registers { orig_ax: NO_CALL, ..*registers },
    }
}

fn is_absolute_futex_wait(operation: u64) -> bool {
    const COMMAND: i32 = !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);
    matches!(operation as i32 & COMMAND, libc::FUTEX_WAIT_BITSET)
}

fn is_endless_epoll_wait(call: i64, registers: &Registers) -> bool {
    match call {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (registers.r10 as i32) < 0,
        libc::SYS_epoll_pwait2 => registers.r10 == 0,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_call(call: i64, result: i64) -> Registers {
        Registers {
            orig_ax: call as u64,
            ax: result as u64,
            ip: 0x1002,
            di: 0x10,
            si: 0x20,
            ..Default::default()
        }
    }

    #[test]
    fn a_read_is_made_again_and_a_finished_call_is_not() {
        let again = restart_interrupted_call(&in_call(libc::SYS_read, -512));
        assert_eq!((again.ip, again.ax, again.orig_ax), (0x1000, libc::SYS_read as u64, u64::MAX));
        let done = restart_interrupted_call(&in_call(libc::SYS_read, 17));
        assert_eq!((done.ip, done.ax), (0x1002, 17));
    }

    #[test]
    fn a_sleep_goes_on_with_the_time_that_is_left() {
        let again = restart_interrupted_call(&in_call(libc::SYS_nanosleep, -516));
        assert_eq!((again.ip, again.di), (0x1000, 0x20));
        let blind = restart_interrupted_call(&Registers { si: 0, ..in_call(libc::SYS_nanosleep, -516) });
        assert_eq!((blind.ip, blind.di), (0x1000, 0x10));
        let futex = restart_interrupted_call(&Registers { r10: 1, ..in_call(libc::SYS_futex, -516) });
        assert_eq!((futex.ip, futex.ax as i64), (0x1002, -4));
    }
}
