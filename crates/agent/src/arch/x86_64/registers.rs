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

/// Bytes of the instruction.
const SYSCALL_LEN: u64 = 2;

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

/// What the kernel alone knows of a call that it would go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rest {
    /// The call that it was at first.
    pub call: i64,
    /// Nanoseconds to its limit.
    pub left: Option<u64>,
}

/// Flags of io_uring_enter(2): it waits, and its argument has more than a signal mask. Who has submitted something is told
/// of that, and not of the stop.
const GETEVENTS: u64 = 1;
const EXT_ARG: u64 = 1 << 3;

/// Asks the kernel what it knows of the call that a thread is in, where that matters, and it tells.
pub fn rest(thread: &Stopped, registers: &Registers) -> Option<Rest> {
    const ERESTART_RESTARTBLOCK: i64 = 516;
    let (call, result) = registers.interrupted_call()?;
    let limit = |address: u64| {
        let mut time = [0u8; 16];
        let count = sys::memory::read_remote(thread.tid(), address, &mut time).ok()?;
        let word = |at: usize| u64::from_ne_bytes(time[at..at + 8].try_into().expect("eight bytes"));
        (count == time.len()).then(|| word(0).saturating_mul(1_000_000_000).saturating_add(word(8)))
    };
    // Who only looks for completions is told of the stop, too.
    if result == -i64::from(libc::EINTR) && call as i64 == libc::SYS_io_getevents && registers.r8 != 0 {
        return (limit(registers.r8) == Some(0)).then_some(Rest { call: call as i64, left: Some(0) });
    }
    if result == -i64::from(libc::EINTR) && call as i64 == libc::SYS_io_uring_enter {
        // struct io_uring_getevents_arg has the address of the limit behind two words.
        let mut address = [0u8; 8];
        let count = sys::memory::read_remote(thread.tid(), registers.r8.wrapping_add(16), &mut address);
        let has_none = count == Ok(address.len()) && address == [0; 8];
        let is_endless = registers.r10 & (GETEVENTS | EXT_ARG) == GETEVENTS | EXT_ARG && has_none;
        return is_endless.then_some(Rest { call: call as i64, left: None });
    }
    if result != -ERESTART_RESTARTBLOCK {
        return None;
    }
    let needs_block = match call as i64 {
        libc::SYS_poll | libc::SYS_restart_syscall => true,
        libc::SYS_nanosleep => registers.si == 0,
        libc::SYS_clock_nanosleep => registers.r10 == 0,
        _ => false,
    };
    let block = needs_block.then(|| sys::restart::block(thread.tid())).flatten()?;
    // Once stopped and gone on, it is in another call, with the registers of the first.
    let call = match call as i64 {
        libc::SYS_restart_syscall => first_call(&block, registers),
        call => call,
    };
    let whole = match call {
        libc::SYS_poll => u32::try_from(registers.dx as i32).ok().map(|limit| u64::from(limit) * 1_000_000),
        libc::SYS_nanosleep => limit(registers.di),
        libc::SYS_clock_nanosleep => limit(registers.dx),
        _ => None,
    };
    let (clock, end) = match call {
        libc::SYS_poll => (libc::CLOCK_MONOTONIC, block.poll_end()),
        _ => block.sleep_end(),
    };
    let left = whole.and_then(|whole| {
        let left = end.saturating_sub(sys::clock::now_ns(clock));
        // More than the whole: that was no end, or is told by the clock of another time namespace.
        (left <= whole).then_some(left)
    });
    Some(Rest { call, left })
}

/// Which call has left this block: by what both have of its arguments.
fn first_call(block: &sys::restart::Block, registers: &Registers) -> i64 {
    const PAGE: u64 = 4096;
    let Registers { di, si, dx, .. } = *registers;
    let is_int = dx <= u32::MAX.into() || dx as i32 as i64 as u64 == dx;
    if is_int && block.is_poll(di, si as u32, dx as i32) {
        libc::SYS_poll
    } else if block.is_futex(di, dx as u32) {
        libc::SYS_futex
    } else if block.is_sleep() {
        if di >= PAGE { libc::SYS_nanosleep } else { libc::SYS_clock_nanosleep }
    } else {
        libc::SYS_restart_syscall
    }
}

/// What the result of a call says that the kernel makes again: unless there is a handler that wants it otherwise,
/// always, unless there is a handler. Source: include/linux/errno.h.
const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;

/// When the kernel would have made the call again that [`restart_interrupted_call`] has the thread make.
pub fn restart_code(before: &Registers, now: &Registers) -> Option<u32> {
    let (_, result) = before.interrupted_call()?;
    match -result {
        _ if now.ip != before.ip.wrapping_sub(SYSCALL_LEN) => None,
        code @ (ERESTARTSYS | ERESTARTNOINTR) => Some(code as u32),
        _ => Some(ERESTARTNOHAND as u32),
    }
}

impl Registers {
    /// The same thread in the call that it is about to make, as the kernel left it: if a signal comes first, the kernel
    /// ends the call, where `code` of [`restart_code`] says so. To be set where the kernel looks for signals.
    pub fn in_call_again(&self, code: Option<u32>) -> Registers {
        match code.map(i64::from) {
            Some(code @ ERESTARTSYS..=ERESTARTNOHAND) => Registers {
                orig_ax: self.ax,
                ax: -code as u64,
                ip: self.ip.wrapping_add(SYSCALL_LEN),
                ..*self
            },
            _ => *self,
        }
    }
}

/// The registers with which a thread goes on outside the kernel's care: a system call that the kernel
/// would have restarted when the thread ran on is made again by the thread itself. `rest` is what
/// [`rest`] has told.
pub fn restart_interrupted_call(registers: &Registers, rest: Option<Rest>) -> Registers {
    const ERESTART_RESTARTBLOCK: i64 = 516;
    let Some((call, result)) = registers.interrupted_call() else {
        return Registers { orig_ax: NO_CALL, ..*registers };
    };
    let call = rest.map_or(call, |rest| rest.call as u64);
    let left = rest.and_then(|rest| rest.left);
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
            libc::SYS_poll => match left.and_then(milliseconds) {
                Some(left) => Registers { dx: left, ..again },
                None => again,
            },
            // A sleep whose caller did not ask what is left has nowhere to put it; a poll of nothing sleeps as
            // well, and ends as it does. Where nobody tells how much is left, it begins anew, and so may last
            // longer, but does not end as if a signal had come.
            _ => match left.and_then(milliseconds) {
                Some(left) => Registers { ax: libc::SYS_poll as u64, di: 0, si: 0, dx: left, ..again },
                None => again,
            },
        },
        // These never restart, not even for a debugger that looked; endless ones can, and those that do not wait.
        4 if is_only_stopped(call as i64, registers, rest) => again,
        _ => Registers { orig_ax: NO_CALL, ..*registers },
    }
}

/// Has the stop itself ended a call that would have gone on without end, or that did not wait? Kernels do so with few;
/// where the thread goes on, it is made again, as [`restart_interrupted_call`] has it.
pub fn is_disturbed(registers: &Registers, rest: Option<Rest>) -> bool {
    let (eintr, call) = (-i64::from(libc::EINTR), registers.interrupted_call());
    call.is_some_and(|(call, result)| result == eintr && is_only_stopped(call as i64, registers, rest))
}

/// Has such a call no limit, or does it not wait at all? Of io_uring_enter(2) [`rest`] tells nothing else.
fn is_only_stopped(call: i64, registers: &Registers, rest: Option<Rest>) -> bool {
    let is_told = |rest: Rest| rest.left == Some(0) || rest.call == libc::SYS_io_uring_enter;
    is_endless_wait(call, registers) || rest.is_some_and(is_told)
}

/// As many as there are at least, for poll(2).
fn milliseconds(nanoseconds: u64) -> Option<u64> {
    i32::try_from(nanoseconds.div_ceil(1_000_000)).ok().map(|limit| limit as u64)
}

fn is_absolute_futex_wait(operation: u64) -> bool {
    const COMMAND: i32 = !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);
    matches!(operation as i32 & COMMAND, libc::FUTEX_WAIT_BITSET)
}

fn is_endless_wait(call: i64, registers: &Registers) -> bool {
    match call {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => (registers.r10 as i32) < 0,
        libc::SYS_epoll_pwait2 => registers.r10 == 0,
        libc::SYS_io_getevents => registers.r8 == 0,
        libc::SYS_io_uring_enter => registers.r10 & (GETEVENTS | EXT_ARG) == GETEVENTS,
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
        let again = restart_interrupted_call(&in_call(libc::SYS_read, -512), None);
        assert_eq!((again.ip, again.ax, again.orig_ax), (0x1000, libc::SYS_read as u64, u64::MAX));
        let done = restart_interrupted_call(&in_call(libc::SYS_read, 17), None);
        assert_eq!((done.ip, done.ax), (0x1002, 17));
    }

    #[test]
    fn a_call_is_made_again_by_the_kernel_as_it_was() {
        for (call, result) in [(libc::SYS_read, -512), (libc::SYS_futex, -513), (libc::SYS_pause, -514)] {
            let before = in_call(call, result);
            let again = restart_interrupted_call(&before, None);
            assert_eq!(again.in_call_again(restart_code(&before, &again)), before);
        }
        let before = in_call(libc::SYS_nanosleep, -516);
        let again = restart_interrupted_call(&before, None);
        let in_call = again.in_call_again(restart_code(&before, &again));
        assert_eq!(
            (in_call.orig_ax as i64, in_call.ax as i64, in_call.ip),
            (libc::SYS_nanosleep, -514, 0x1002)
        );
        let done = Registers { ax: 17, ..before };
        assert_eq!(restart_code(&done, &restart_interrupted_call(&done, None)), None);
        assert_eq!(done.in_call_again(Some(511)), done);
    }

    #[test]
    fn a_sleep_goes_on_with_the_time_that_is_left() {
        let again = restart_interrupted_call(&in_call(libc::SYS_nanosleep, -516), None);
        assert_eq!((again.ip, again.di), (0x1000, 0x20));
        let blind = Registers { si: 0, ..in_call(libc::SYS_nanosleep, -516) };
        let told = |call: i64, left: u64| Some(Rest { call, left: Some(left) });
        let anew = restart_interrupted_call(&blind, None);
        assert_eq!((anew.ip, anew.di), (0x1000, 0x10));
        let rest = restart_interrupted_call(&blind, told(libc::SYS_nanosleep, 1_000_001));
        assert_eq!((rest.ip, rest.ax as i64, rest.di, rest.si, rest.dx), (0x1000, libc::SYS_poll, 0, 0, 2));
        let poll = restart_interrupted_call(&in_call(libc::SYS_poll, -516), told(libc::SYS_poll, 5_000_000));
        assert_eq!((poll.ip, poll.di, poll.si, poll.dx), (0x1000, 0x10, 0x20, 5));
        let second = in_call(libc::SYS_restart_syscall, -516);
        let poll = restart_interrupted_call(&second, told(libc::SYS_poll, 5_000_000));
        assert_eq!((poll.ip, poll.ax as i64, poll.dx), (0x1000, libc::SYS_poll, 5));
        let futex = restart_interrupted_call(&Registers { r10: 1, ..in_call(libc::SYS_futex, -516) }, None);
        assert_eq!((futex.ip, futex.ax as i64), (0x1002, -4));
    }

    #[test]
    fn a_wait_for_completions_without_a_limit_is_made_again() {
        let stopped = |flags| Registers { r10: flags, ..in_call(libc::SYS_io_uring_enter, -4) };
        let endless = Some(Rest { call: libc::SYS_io_uring_enter, left: None });
        let extended = GETEVENTS | EXT_ARG;
        for (flags, rest, is_again) in
            [(GETEVENTS, None, true), (extended, None, false), (extended, endless, true), (0, None, false)]
        {
            assert_eq!(is_disturbed(&stopped(flags), rest), is_again);
            let now = restart_interrupted_call(&stopped(flags), rest);
            let expected = if is_again { (0x1000, libc::SYS_io_uring_enter) } else { (0x1002, -4) };
            assert_eq!((now.ip, now.ax as i64), expected);
        }
    }
}
