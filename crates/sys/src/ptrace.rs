//! ptrace(2), with the rules of who may be asked what held by types.
//!
//! A [`Stopped`] thread can be read, changed, and let go; letting it go consumes it. A thread that is
//! dropped while it is stopped would be let go by the kernel only when this process ends, so whoever
//! holds one owes it an end.

use crate::call::check;
use model::Errno;
use std::mem::MaybeUninit;

/// Lets our own calls through a thread's seccomp filters while we are attached.
pub const SUSPEND_SECCOMP: u64 = 1 << 21;

/// Tells stops at system calls from signals.
pub const SYSCALL_GOOD: u64 = 1;
/// Ends the thread when the one that traces it ends without having let it go.
pub const EXIT_KILL: u64 = 1 << 20;

/// A process that the thread makes by clone(2) with a signal of its own at its end is traced from its start,
/// with the options of its maker; both stop.
pub const TRACE_CLONE: u64 = 1 << 3;
/// What [`Stop::Event`] tells then.
pub const EVENT_CLONE: i32 = 3;

/// A thread that we trace and that is stopped.
#[derive(Debug)]
pub struct Stopped(i32);

/// A thread that we trace and that runs.
#[derive(Debug)]
pub struct Running(i32);

/// Why a thread stopped, or that it is gone.
#[derive(Debug)]
pub enum Stop {
    /// By PTRACE_INTERRUPT, or as a new child of a traced thread.
    Trap(Stopped),
    /// It belongs to a process that is stopped by this signal (SIGSTOP, SIGTSTP, ...).
    Group(Stopped, i32),
    /// It is about to receive this signal.
    Signal(Stopped, i32),
    /// It enters or leaves a system call.
    Syscall(Stopped),
    /// Another ptrace event.
    Event(Stopped, i32),
    /// It ended, with this wait status.
    Exited(i32),
}

/// A register set as the kernel lays it out.
pub type RegsetNote = i32;
/// General registers: `user_regs_struct`.
pub const PRSTATUS: RegsetNote = 1;
/// The extended state, in the uncompacted format of XSAVE.
pub const X86_XSTATE: RegsetNote = 0x202;

/// The rseq(2) area of a thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rseq {
    pub area: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
}

fn ptrace(request: libc::c_uint, tid: i32, address: u64, data: u64) -> Result<i64, Errno> {
    // SAFETY: the callers in this file pass integers, or addresses of objects that outlive the call.
    check("ptrace", unsafe { libc::ptrace(request as _, tid, address, data) })
}

/// Attaches without stopping the thread. Source: ptrace(2) PTRACE_SEIZE.
///
/// # Errors
/// `EPERM` when it is traced already, is a kernel thread, or is not ours to trace; `ESRCH`.
pub fn seize(tid: i32, options: u64) -> Result<Running, Errno> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, options).map(|_| Running(tid))
}

impl Running {
    pub fn tid(&self) -> i32 {
        self.0
    }

    /// What a traced thread has made, by [`TRACE_CLONE`].
    pub fn made(tid: i32) -> Running {
        Running(tid)
    }

    /// Looks whether it has stopped; itself again if not.
    pub fn look(self) -> Result<Result<Stop, Running>, Errno> {
        Ok(match crate::process::wait(self.0, false)? {
            Some(status) => Ok(self.stop(status)),
            None => Err(self),
        })
    }

    /// Asks for a stop; [`Running::wait`] says when it is there. Source: ptrace(2) PTRACE_INTERRUPT.
    pub fn interrupt(&self) -> Result<(), Errno> {
        ptrace(libc::PTRACE_INTERRUPT, self.0, 0, 0).map(drop)
    }

    /// Waits for the next stop of this thread.
    pub fn wait(self) -> Result<Stop, Errno> {
        let status = crate::process::wait(self.0, true)?.expect("a blocking wait returns a status");
        Ok(self.stop(status))
    }

    fn stop(self, status: i32) -> Stop {
        if !libc::WIFSTOPPED(status) {
            return Stop::Exited(status);
        }
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        match event {
            libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Trap(Stopped(self.0)),
            libc::PTRACE_EVENT_STOP => Stop::Group(Stopped(self.0), signal),
            0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall(Stopped(self.0)),
            0 => Stop::Signal(Stopped(self.0), signal),
            event => Stop::Event(Stopped(self.0), event),
        }
    }

    /// [`Running::halt`], which gives up at `deadline`: the thread then still runs, and is let go.
    ///
    /// It looks often at first, for most stops take microseconds, then seldom.
    pub fn halt_by(self, deadline: std::time::Instant) -> Result<Option<Stop>, Errno> {
        let mut looks = 0u32;
        let mut running = self;
        loop {
            match crate::process::wait(running.0, false)? {
                Some(status) => match running.stop(status) {
                    Stop::Signal(stopped, signal) => running = stopped.resume(signal)?,
                    Stop::Event(stopped, _) | Stop::Syscall(stopped) => running = stopped.resume(0)?,
                    stop => return Ok(Some(stop)),
                },
                None if std::time::Instant::now() > deadline => return Ok(None),
                None if looks < 64 => std::thread::yield_now(),
                None => std::thread::sleep(std::time::Duration::from_micros(u64::from(looks.min(1000)))),
            }
            looks += 1;
        }
    }

    /// Interrupts and waits: [`Running::interrupt`], [`Running::stand`].
    pub fn halt(self) -> Result<Stop, Errno> {
        match self.interrupt() {
            // It is dying, or stands in a stop that nobody fetched; the wait tells.
            Ok(()) => {}
            Err(error) if error.code == libc::ESRCH => {}
            Err(error) => return Err(error),
        }
        self.stand()
    }

    /// Waits until the thread, which was told to stop, stands still of our doing or its group's; signals
    /// that come first are delivered.
    pub fn stand(self) -> Result<Stop, Errno> {
        let mut running = self;
        loop {
            match running.wait()? {
                Stop::Signal(stopped, signal) => running = stopped.resume(signal)?,
                Stop::Event(stopped, _) | Stop::Syscall(stopped) => running = stopped.resume(0)?,
                stop => return Ok(stop),
            }
        }
    }
}

impl Stopped {
    pub fn tid(&self) -> i32 {
        self.0
    }

    /// Sets the options in the place of those that it has. Source: ptrace(2) PTRACE_SETOPTIONS.
    pub fn set_options(&self, options: u64) -> Result<(), Errno> {
        ptrace(libc::PTRACE_SETOPTIONS, self.0, 0, options).map(drop)
    }

    /// What belongs to an event: the id of a new process. Source: ptrace(2) PTRACE_GETEVENTMSG.
    pub fn event_message(&self) -> Result<u64, Errno> {
        let mut message = 0u64;
        ptrace(libc::PTRACE_GETEVENTMSG, self.0, 0, &raw mut message as u64)?;
        Ok(message)
    }

    /// Fills `buffer` with a register set; returns its length in bytes.
    ///
    /// Source: ptrace(2) PTRACE_GETREGSET.
    pub fn read_regset(&self, note: RegsetNote, buffer: &mut [u8]) -> Result<usize, Errno> {
        let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // The kernel writes into the buffer, at most its length, and the length it wrote into `iov`.
        ptrace(libc::PTRACE_GETREGSET, self.0, note as u64, &raw mut iov as u64)?;
        Ok(iov.iov_len)
    }

    /// Sets a register set. Source: ptrace(2) PTRACE_SETREGSET.
    pub fn write_regset(&self, note: RegsetNote, bytes: &[u8]) -> Result<(), Errno> {
        let mut iov = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
        // The kernel only reads the bytes.
        ptrace(libc::PTRACE_SETREGSET, self.0, note as u64, &raw mut iov as u64).map(drop)
    }

    /// The blocked signals: bit n is signal n + 1. Source: ptrace(2) PTRACE_GETSIGMASK.
    pub fn signal_mask(&self) -> Result<u64, Errno> {
        let mut mask = 0u64;
        ptrace(libc::PTRACE_GETSIGMASK, self.0, 8, &raw mut mask as u64)?;
        Ok(mask)
    }

    pub fn set_signal_mask(&self, mask: u64) -> Result<(), Errno> {
        ptrace(libc::PTRACE_SETSIGMASK, self.0, 8, &raw const mask as u64).map(drop)
    }

    /// Signals that wait for delivery, each a `siginfo_t` of 128 bytes, without taking them out:
    /// those of the thread, or with `shared` those of the process.
    ///
    /// Source: ptrace(2) PTRACE_PEEKSIGINFO.
    pub fn pending(&self, shared: bool) -> Result<Vec<[u8; 128]>, Errno> {
        #[repr(C)]
        struct Peek {
            offset: u64,
            flags: u32,
            count: i32,
        }
        const BATCH: usize = 32;
        let mut pending = Vec::new();
        loop {
            let peek = Peek { offset: pending.len() as u64, flags: shared.into(), count: BATCH as i32 };
            let mut batch = [[0u8; 128]; BATCH];
            let count =
                ptrace(libc::PTRACE_PEEKSIGINFO, self.0, &raw const peek as u64, batch.as_mut_ptr() as u64)?
                    as usize;
            pending.extend_from_slice(&batch[..count]);
            if count < BATCH {
                return Ok(pending);
            }
        }
    }

    /// Where the thread registered its rseq area; zero when it did not.
    ///
    /// Source: ptrace(2) PTRACE_GET_RSEQ_CONFIGURATION, Linux 5.13.
    pub fn rseq(&self) -> Result<Rseq, Errno> {
        #[repr(C)]
        struct Configuration {
            area: u64,
            size: u32,
            signature: u32,
            flags: u32,
            pad: u32,
        }
        const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
        let mut conf = MaybeUninit::<Configuration>::zeroed();
        ptrace(
            PTRACE_GET_RSEQ_CONFIGURATION,
            self.0,
            size_of::<Configuration>() as u64,
            conf.as_mut_ptr() as u64,
        )?;
        // SAFETY: zeroed integers, filled by the kernel.
        let conf = unsafe { conf.assume_init() };
        Ok(Rseq { area: conf.area, size: conf.size, signature: conf.signature, flags: conf.flags })
    }

    /// Lets it run on, delivering `signal` unless zero.
    pub fn resume(self, signal: i32) -> Result<Running, Errno> {
        ptrace(libc::PTRACE_CONT, self.0, 0, signal as u64).map(|_| Running(self.0))
    }

    /// Lets it go on from any stop to where the kernel looks for signals, and not into its program: for
    /// [`Running::stand`]. There the kernel makes a call again whose result says so.
    pub fn stop_again(self) -> Result<Running, Errno> {
        Running(self.0).interrupt()?;
        self.resume(0)
    }

    /// Lets it run to the next entry to or return from a system call, with [`SYSCALL_GOOD`] set.
    pub fn resume_to_syscall(self) -> Result<Running, Errno> {
        ptrace(libc::PTRACE_SYSCALL, self.0, 0, 0).map(|_| Running(self.0))
    }

    /// Lets it go for good.
    pub fn detach(self) -> Result<(), Errno> {
        ptrace(libc::PTRACE_DETACH, self.0, 0, 0).map(drop)
    }
}

/// One BPF program of a thread's seccomp chain, the first installed first; `None` behind the newest.
///
/// Source: ptrace(2) PTRACE_SECCOMP_GET_FILTER.
pub fn seccomp_filter(thread: &Stopped, index: u64) -> Result<Option<Vec<u8>>, Errno> {
    const PTRACE_SECCOMP_GET_FILTER: u32 = 0x420c;
    let count = match ptrace(PTRACE_SECCOMP_GET_FILTER, thread.0, index, 0) {
        Ok(count) => count as usize,
        Err(error) if error.code == libc::ENOENT => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut program = vec![0u8; count * 8];
    ptrace(PTRACE_SECCOMP_GET_FILTER, thread.0, index, program.as_mut_ptr() as u64)?;
    Ok(Some(program))
}
