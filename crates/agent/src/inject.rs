//! The agent in frozen processes: mapped by one remote call, run in each thread, and gone again. Several
//! processes at the same time, for what takes long is that each wakes and stops.
//!
//! A thread whose registers are not its own has its context saved in a signal frame in the shared memory.
//! If the coordinator dies, the agent returns to it with one rt_sigreturn(2).

use crate::arch::{self, Registers, Rest, rest, restart_interrupted_call, signal_frame};
use crate::area::{Area, Run, Slot, Watch};
use crate::list::{Arg, Failed, Judge, List};
use crate::remote;
use model::{Errno, Failure, Object};
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use sys::memory::{PAGE, SharedMap};
use sys::ptrace::{self, Running, Stop, Stopped, X86_XSTATE};

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
    /// What the kernel tells of the call that it was in.
    pub rest: Option<Rest>,
}

impl Context {
    pub fn read(thread: &Stopped) -> Result<Context, Errno> {
        let mut xstate = [0u8; 16 << 10];
        let length = thread.read_regset(X86_XSTATE, &mut xstate)?;
        let registers = Registers::read(thread)?;
        Ok(Context {
            rest: rest(thread, &registers),
            registers,
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

/// What [`Host::copy`] made.
#[derive(Debug)]
pub struct Copied {
    pub stopped: Stopped,
    /// Where its agent waits, if it is let run.
    pub slot: Slot,
    /// What it shares with us, and where it has that.
    pub map: Arc<SharedMap>,
    pub area: Range<u64>,
}

fn gone(tid: i32) -> Failure {
    Failure::conflict(Object::Thread(tid), "run the agent", "the thread ended while it was frozen")
}

/// A thread through which the agent enters its process.
#[derive(Debug)]
pub struct Door<'c> {
    pub pid: i32,
    pub thread: Stopped,
    pub context: &'c Context,
    /// Where the process has a `syscall`.
    pub instruction: u64,
}

impl Door<'_> {
    fn explain(&self, doing: &'static str) -> impl Fn(Errno) -> Failure + use<> {
        let (pid, tid) = (self.pid, self.thread.tid());
        move |error| error.on(Object::Thread(tid), doing).of(pid)
    }
}

/// Has one thread of each of several processes make a call, and puts it back as it was.
fn call_all(
    doors: Vec<Door>,
    number: i64,
    args: &[Vec<u64>],
    doing: &'static str,
) -> Vec<Result<(Stopped, i64), Failure>> {
    let mut results: Vec<Option<Result<(Stopped, i64), Failure>>> = Vec::with_capacity(doors.len());
    let mut calls = Vec::with_capacity(doors.len());
    let mut callers = Vec::with_capacity(doors.len());
    for (door, args) in doors.into_iter().zip(args) {
        let explain = door.explain(doing);
        match door.thread.set_signal_mask(EVERY_SIGNAL) {
            Ok(()) => {
                let (from, instruction) = (&door.context.registers, door.instruction);
                calls.push(remote::Call { thread: door.thread, from, instruction, number, args });
                callers.push((results.len(), door.context, explain));
                results.push(None);
            }
            Err(error) => results.push(Some(Err(explain(error)))),
        }
    }
    for (called, (at, context, explain)) in remote::call_all(calls).into_iter().zip(callers) {
        let restored = called.and_then(|(thread, result)| {
            context.restore(&thread)?;
            Ok((thread, result))
        });
        results[at] = Some(restored.map_err(explain));
    }
    results.into_iter().map(|result| result.expect("every call has a result")).collect()
}

/// Waits for the first stop of a process that a traced thread made; from then on it does not outlive us.
pub(crate) fn adopt(pid: i32, options: u64) -> Result<Stopped, Errno> {
    match Running::made(pid).wait()? {
        Stop::Trap(stopped) | Stop::Group(stopped, _) | Stop::Signal(stopped, _) => {
            stopped.set_options(options | ptrace::EXIT_KILL)?;
            Ok(stopped)
        }
        _ => Err(Errno { call: "clone", code: libc::ESRCH }),
    }
}

/// Has one stopped thread of a process make a call; it comes back as it was.
pub fn call(door: Door, number: i64, args: &[u64], doing: &'static str) -> Result<(Stopped, i64), Failure> {
    call_all(vec![door], number, &[args.to_vec()], doing).remove(0)
}

/// The arguments of mmap(2) for the agent.
fn to_map(prot: i32) -> Vec<u64> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    vec![0, AREA as u64, prot as u64, flags as u64, u64::MAX, 0]
}

impl Host {
    /// Maps the agent into several processes, through one thread of each, which is stopped and comes back
    /// as it was.
    pub fn enter_all(doors: Vec<Door>, watch: &Rc<Watch>) -> Vec<Result<(Host, Stopped), Failure>> {
        let args = vec![to_map(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC); doors.len()];
        let known: Vec<_> = doors.iter().map(|door| (door.pid, door.instruction, door.context)).collect();
        const DOING: &str = "map the agent";
        let called = call_all(doors, libc::SYS_mmap, &args, DOING);
        let mut entered = Vec::with_capacity(known.len());
        for ((pid, instruction, context), called) in known.into_iter().zip(called) {
            entered.push(called.and_then(|(thread, result)| {
                let tid = thread.tid();
                let explain = |error: Errno| error.on(Object::Thread(tid), DOING).of(pid);
                let door = |thread: Stopped| Door { pid, thread, context, instruction };
                let (mut thread, mut result) = (thread, result);
                // It may have nothing that is both written and executed: PR_SET_MDWE.
                let is_apart = result == -i64::from(libc::EACCES);
                if is_apart {
                    let args = to_map(libc::PROT_READ | libc::PROT_EXEC);
                    (thread, result) = call(door(thread), libc::SYS_mmap, &args, DOING)?;
                }
                if result < 0 {
                    return Err(explain(Errno { call: "mmap", code: -result as i32 }));
                }
                let address = result as u64;
                // Before it becomes two mappings.
                let mut host = Host::attach(pid, address, instruction, watch).map_err(explain);
                if is_apart && host.is_ok() {
                    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
                    let args = [address + PAGE, AREA as u64 - PAGE, prot];
                    (thread, result) = call(door(thread), libc::SYS_mprotect, &args, DOING)?;
                    if result < 0 {
                        host = Err(explain(Errno { call: "mprotect", code: -result as i32 }));
                    }
                }
                match host {
                    Ok(host) => Ok((host, thread)),
                    Err(failure) => {
                        // Not ours to use, so not theirs to keep.
                        call(door(thread), libc::SYS_munmap, &[address, AREA as u64], DOING)?;
                        Err(failure)
                    }
                }
            }));
        }
        entered
    }

    fn attach(pid: i32, address: u64, instruction: u64, watch: &Rc<Watch>) -> Result<Host, Errno> {
        let path = format!("/proc/{pid}/map_files/{address:x}-{:x}", address + AREA as u64);
        let file = sys::fd::open(Path::new(&path), libc::O_RDWR)?;
        let area = Area::new(&file, AREA, address, watch.clone())?;
        area.put(arch::code())?;
        // What is written is in no page with code.
        let start = area.mark().next_multiple_of(PAGE as usize);
        area.rewind(start);
        Ok(Host { pid, instruction, area, start })
    }

    /// Memory for the lists of one batch, and what their calls read and write.
    pub fn area(&self) -> &Area {
        &self.area
    }

    /// Forgets the lists and results of the last batch. No thread runs a list, in none of the processes of one watch.
    pub fn next_batch(&self) {
        self.area.rewind(self.start);
    }

    /// Sends a thread through a list. It has to be [`Host::collect`]ed.
    pub fn start(&self, thread: Stopped, context: &Context, list: List) -> Result<(Running, Run), Failure> {
        let tid = thread.tid();
        self.launch(thread, context, list)
            .map_err(|error| error.on(Object::Thread(tid), "start the agent").of(self.pid))
    }

    fn launch(&self, thread: Stopped, context: &Context, list: List) -> Result<(Running, Run), Errno> {
        // The way home is ready before the thread leaves.
        let home = restart_interrupted_call(&context.registers, context.rest);
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
    pub fn collect(&self, running: &Running, run: Run) -> Result<Result<Vec<u8>, Failed>, Failure> {
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

    /// Sends a thread through a list and waits for it.
    ///
    /// # Errors
    /// The inner one: the operation that stopped the list; the thread is whole all the same.
    #[allow(clippy::type_complexity)]
    pub fn run(
        &self,
        thread: Stopped,
        context: &Context,
        list: List,
    ) -> Result<(Stopped, Result<Vec<u8>, Failed>), Failure> {
        let (running, run) = self.start(thread, context, list)?;
        let result = self.collect(&running, run)?;
        Ok((self.retrieve(running, context)?, result))
    }

    /// Has the process make a copy of itself with these flags of clone(2); with CLONE_VM it has not a copy of the memory, but
    /// the same. It is traced and stopped from its start, and ends when whoever traces it does. It has the agent's mapping too,
    /// at [`Host::range`], and no thread but the one copied. It sends its parent no signal at its end, and no wait(2) without
    /// `__WALL` sees it.
    ///
    /// # Errors
    /// `EAGAIN` and `ENOMEM` of clone(2) among others; the thread is whole, unless it is gone.
    pub fn copy(
        &self,
        thread: Stopped,
        context: &Context,
        options: u64,
        flags: i32,
    ) -> Result<(Stopped, Result<Copied, Failure>), Failure> {
        let (pid, tid) = (self.pid, thread.tid());
        const DOING: &str = "copy the process";
        let explain = |error: Errno| error.on(Object::Thread(tid), DOING).of(pid);
        let copy_slot = self.area.slot(0).map_err(explain)?;
        let mut list = List::new();
        let mut args = [Arg::Value(0); 5];
        args[0] = flags.into();
        list.label(DOING).call(libc::SYS_clone, &args, Judge::Spawn(copy_slot.address()));
        thread.set_options(options | ptrace::TRACE_CLONE).map_err(explain)?;
        let (mut running, run) = self.start(thread, context, list)?;
        let mut copy = None;
        while !self.area.is_done(&run) {
            running = match running.look().map_err(explain)? {
                Err(running) => {
                    std::thread::yield_now();
                    running
                }
                Ok(Stop::Event(stopped, ptrace::EVENT_CLONE)) => {
                    let made = stopped.event_message().map_err(explain)? as i32;
                    copy = Some(adopt(made, options));
                    stopped.resume(0).map_err(explain)?
                }
                Ok(Stop::Signal(stopped, signal)) => stopped.resume(signal).map_err(explain)?,
                Ok(Stop::Trap(stopped) | Stop::Group(stopped, _)) => stopped.resume(0).map_err(explain)?,
                Ok(Stop::Event(stopped, _) | Stop::Syscall(stopped)) => stopped.resume(0).map_err(explain)?,
                Ok(Stop::Exited(_)) => return Err(gone(tid).of(pid)),
            };
        }
        let done = self.collect(&running, run)?;
        let thread = self.retrieve(running, context)?;
        thread.set_options(options).map_err(explain)?;
        let copy = match (done, copy) {
            (Err(failed), _) => Err(explain(failed.errno())),
            (Ok(_), Some(Ok(stopped))) => {
                Ok(Copied { stopped, slot: copy_slot, map: self.area.map(), area: self.range() })
            }
            (Ok(_), Some(Err(error))) => Err(explain(error)),
            (Ok(_), None) => Err(explain(Errno { call: "clone", code: libc::ECHILD })),
        };
        Ok((thread, copy))
    }

    /// Where the agent is in the process.
    pub fn range(&self) -> Range<u64> {
        self.area.remote()..self.area.remote() + AREA as u64
    }

    /// Takes the agent out of processes again, through one thread of each.
    pub fn leave_all(leaving: Vec<(Host, Stopped, &Context)>) -> Vec<Result<Stopped, Failure>> {
        let args: Vec<Vec<u64>> =
            leaving.iter().map(|(host, ..)| vec![host.area.remote(), AREA as u64]).collect();
        let doors = leaving
            .into_iter()
            .map(|(host, thread, context)| Door {
                pid: host.pid,
                thread,
                context,
                instruction: host.instruction,
            })
            .collect();
        const DOING: &str = "unmap the agent";
        call_all(doors, libc::SYS_munmap, &args, DOING)
            .into_iter()
            .map(|called| match called? {
                (thread, 0) => Ok(thread),
                (thread, result) => {
                    Err(Errno { call: "munmap", code: -result as i32 }
                        .on(Object::Thread(thread.tid()), DOING))
                }
            })
            .collect()
    }
}
