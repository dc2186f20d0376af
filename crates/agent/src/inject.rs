//! The agent in a frozen process: mapped by one remote call, run in each thread, and gone again.
//!
//! A thread whose registers are not its own has its context saved in a signal frame in the shared memory.
//! If the coordinator dies, the agent returns to it with one rt_sigreturn(2).

use crate::arch::{self, Registers, restart_interrupted_call, signal_frame};
use crate::area::{Area, Run, Slot};
use crate::list::{Failed, List};
use crate::remote;
use model::{Errno, Failure, Object};
use std::path::Path;
use sys::ptrace::{Running, Stop, Stopped, X86_XSTATE};

/// Code, slots, lists and frames of a batch of threads.
const AREA: usize = 1 << 20;
/// Threads that run the agent at the same time.
pub const BATCH: usize = 32;
const EVERY_SIGNAL: u64 = !0;

/// What a thread had when it was stopped.
#[derive(Debug, Clone)]
pub struct Context {
    pub registers: Registers,
    /// As ptrace gives it: the uncompacted format.
    pub xstate: Vec<u8>,
    /// Bit n: signal n + 1 is blocked.
    pub mask: u64,
}

impl Context {
    pub fn read(thread: &Stopped) -> Result<Context, Errno> {
        let mut xstate = [0u8; 16 << 10];
        let length = thread.read_regset(X86_XSTATE, &mut xstate)?;
        Ok(Context {
            registers: Registers::read(thread)?,
            xstate: xstate[..length].to_vec(),
            mask: thread.signal_mask()?,
        })
    }

    /// Puts everything back that running the agent changed.
    fn restore(&self, thread: &Stopped) -> Result<(), Errno> {
        self.registers.write(thread)?;
        thread.set_signal_mask(self.mask)
    }
}

/// A frozen process with the agent in it.
#[derive(Debug)]
pub struct Host {
    pid: i32,
    instruction: u64,
    area: Area,
    start: usize,
}

fn gone(tid: i32) -> Failure {
    Failure::conflict(Object::Thread(tid), "run the agent", "the thread ended while it was frozen")
}

impl Host {
    /// Maps the agent into the process of `thread`, which is stopped and comes back as it was.
    ///
    /// `instruction` is where the process has a `syscall`.
    pub fn enter(
        pid: i32,
        thread: Stopped,
        context: &Context,
        instruction: u64,
    ) -> Result<(Host, Stopped), Failure> {
        let tid = thread.tid();
        let explain = |error: Errno| error.on(Object::Thread(tid), "map the agent").of(pid);
        thread.set_signal_mask(EVERY_SIGNAL).map_err(explain)?;
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        let args = [0, AREA as u64, prot as u64, flags as u64, u64::MAX, 0];
        let (thread, result) =
            remote::call(thread, &context.registers, instruction, libc::SYS_mmap, &args).map_err(explain)?;
        context.restore(&thread).map_err(explain)?;
        if result < 0 {
            return Err(explain(Errno { call: "mmap", code: -result as i32 }));
        }
        let address = result as u64;
        let host = Host::attach(pid, address, instruction);
        match host {
            Ok(host) => Ok((host, thread)),
            Err(error) => {
                // Not ours to use, so not theirs to keep.
                unmap(thread, context, instruction, address).map_err(explain)?;
                Err(explain(error))
            }
        }
    }

    fn attach(pid: i32, address: u64, instruction: u64) -> Result<Host, Errno> {
        let path = format!("/proc/{pid}/map_files/{address:x}-{:x}", address + AREA as u64);
        let file = sys::fd::open(Path::new(&path), libc::O_RDWR)?;
        let area = Area::new(&file, AREA, address)?;
        area.put(arch::code())?;
        let start = area.mark();
        Ok(Host { pid, instruction, area, start })
    }

    /// Memory for the lists of one batch, and what their calls read and write.
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// Forgets the lists and results of the last batch.
    pub fn next_batch(&self) {
        self.area.rewind(self.start);
    }

    /// Sends a thread through a list. It has to be [`Host::collect`]ed.
    pub fn start<'l>(
        &self,
        thread: Stopped,
        context: &Context,
        list: &'l List,
    ) -> Result<(Running, Run<'l>), Failure> {
        let tid = thread.tid();
        self.launch(thread, context, list)
            .map_err(|error| error.on(Object::Thread(tid), "start the agent").of(self.pid))
    }

    fn launch<'l>(
        &self,
        thread: Stopped,
        context: &Context,
        list: &'l List,
    ) -> Result<(Running, Run<'l>), Errno> {
        // The way home is ready before the thread leaves.
        let home = restart_interrupted_call(&context.registers);
        let address = self.area.aligned_room(arch::FRAME_MAX + context.xstate.len())?;
        let (frame, stack) = signal_frame(&home, &context.xstate, context.mask, address);
        self.area.write(address, &frame);
        let slot: Slot = self.area.slot(stack)?;
        let run = self.area.start(slot, list)?;
        thread.set_signal_mask(EVERY_SIGNAL)?;
        context.registers.agent(self.area.remote() + arch::run_at(), slot.address()).write(&thread)?;
        Ok((thread.resume(0)?, run))
    }

    /// Waits until a thread's list is done, and tells the thread to stop. It has to be [`Host::retrieve`]d.
    ///
    /// # Errors
    /// The inner one: the operation that stopped the list; the thread is whole all the same.
    #[allow(clippy::type_complexity)]
    pub fn collect(
        &self,
        running: &Running,
        run: Run<'_>,
    ) -> Result<Result<Vec<u8>, Failed>, Failure> {
        let tid = running.tid();
        let pid = self.pid;
        let is_alive = || Path::new(&format!("/proc/{pid}/task/{tid}")).exists();
        let result = match self.area.wait(run, is_alive) {
            Ok(bytes) => Ok(bytes),
            Err(Some(failed)) => Err(failed),
            Err(None) => return Err(gone(tid).of(pid)),
        };
        match running.interrupt() {
            Ok(()) => Ok(result),
            // The wait tells what became of it.
            Err(error) if error.code == libc::ESRCH => Ok(result),
            Err(error) => Err(error.on(Object::Thread(tid), "stop the agent").of(pid)),
        }
    }

    /// Waits until a thread that was told to stop has stopped, and puts it back as it was.
    pub fn retrieve(&self, running: Running, context: &Context) -> Result<Stopped, Failure> {
        let tid = running.tid();
        let pid = self.pid;
        let explain = |error: Errno| error.on(Object::Thread(tid), "stop the agent").of(pid);
        let stopped = match running.stand().map_err(explain)? {
            Stop::Trap(stopped) | Stop::Group(stopped, _) => stopped,
            _ => return Err(gone(tid).of(pid)),
        };
        context.restore(&stopped).map_err(explain)?;
        Ok(stopped)
    }

    /// Takes the agent out of the process again.
    pub fn leave(self, thread: Stopped, context: &Context) -> Result<Stopped, Failure> {
        let tid = thread.tid();
        let address = self.area.remote();
        unmap(thread, context, self.instruction, address)
            .map_err(|error| error.on(Object::Thread(tid), "unmap the agent").of(self.pid))
    }
}

fn unmap(thread: Stopped, context: &Context, instruction: u64, address: u64) -> Result<Stopped, Errno> {
    thread.set_signal_mask(EVERY_SIGNAL)?;
    let (thread, result) =
        remote::call(thread, &context.registers, instruction, libc::SYS_munmap, &[address, AREA as u64])?;
    context.restore(&thread)?;
    if result < 0 { Err(Errno { call: "munmap", code: -result as i32 }) } else { Ok(thread) }
}
