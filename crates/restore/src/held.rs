//! The threads of the new tree that one thread of ours traces, on their last steps: from the agent to
//! themselves.

use crate::load::{Checkpoint, Task};
use agent::arch;
use model::{Errno, Failure, Object};
use std::ops::Range;
use sys::ptrace::{self, Running, Stop, Stopped};

/// Where the code of the agent begins in the hole.
const CODE_AT: u64 = 0x100;

/// A thread, by the number of its task and its own in it.
#[derive(Debug, Clone, Copy)]
pub struct Thread {
    pub task: usize,
    pub nth: usize,
}

#[derive(Debug, Default)]
pub struct Held {
    running: Vec<(Thread, Running)>,
    stopped: Vec<(Thread, Stopped)>,
}

/// How the kernel is to make the call again that the thread is in, if it is.
fn restart(checkpoint: &Checkpoint, thread: Thread) -> Option<u32> {
    checkpoint.tasks[thread.task].cores[thread.nth].thread_core.as_ref()?.restart
}

fn explain(task: &Task, thread: Thread, doing: &'static str) -> impl Fn(Errno) -> Failure + use<> {
    let (pid, tid) = (task.pid, task.tids[thread.nth]);
    move |error| error.on(Object::Thread(tid), doing).of(pid)
}

impl Held {
    /// Attaches, without stopping them.
    pub fn seize(&mut self, checkpoint: &Checkpoint, threads: Vec<Thread>) -> Result<(), Failure> {
        for thread in threads {
            let task = &checkpoint.tasks[thread.task];
            // After a failure none must run on half made, not even until all are killed.
            let options = sys::seccomp::suspension() | ptrace::SYSCALL_GOOD | ptrace::EXIT_KILL;
            let running = ptrace::seize(task.tids[thread.nth], options).map_err(explain(
                task,
                thread,
                "attach to it",
            ))?;
            self.running.push((thread, running));
        }
        Ok(())
    }

    pub fn stop(&mut self, checkpoint: &Checkpoint, _hole: &Range<u64>) -> Result<(), Failure> {
        // All are told to stop before the first is waited for.
        for (_, running) in &self.running {
            // One that is gone is found by the wait.
            let _ = running.interrupt();
        }
        self.stand(checkpoint)
    }

    fn stand(&mut self, checkpoint: &Checkpoint) -> Result<(), Failure> {
        for (thread, running) in self.running.drain(..) {
            let task = &checkpoint.tasks[thread.task];
            match running.stand().map_err(explain(task, thread, "stop it"))? {
                Stop::Trap(stopped) | Stop::Group(stopped, _) => self.stopped.push((thread, stopped)),
                _ => {
                    let object = Object::Thread(task.tids[thread.nth]);
                    return Err(Failure::conflict(object, "stop it", "it ended").of(task.pid));
                }
            }
        }
        Ok(())
    }

    /// Has each leader unmap the agent of its process.
    pub fn take_agent_away(&mut self, checkpoint: &Checkpoint, hole: &Range<u64>) -> Result<(), Failure> {
        const DOING: &str = "take the agent away";
        let instruction = agent::remote::find_instruction(arch::code(), hole.start + CODE_AT)
            .expect("the agent makes system calls");
        let args = [hole.start, hole.end - hole.start];
        let (leaders, others): (Vec<_>, Vec<_>) =
            self.stopped.drain(..).partition(|(thread, _)| thread.nth == 0);
        self.stopped = others;
        let mut registers = Vec::with_capacity(leaders.len());
        for (thread, stopped) in &leaders {
            let task = &checkpoint.tasks[thread.task];
            registers.push(arch::Registers::read(stopped).map_err(explain(task, *thread, DOING))?);
        }
        let (threads, stopped): (Vec<Thread>, Vec<Stopped>) = leaders.into_iter().unzip();
        let calls = stopped.into_iter().zip(&registers).map(|(thread, from)| agent::remote::Call {
            thread,
            from,
            instruction,
            number: libc::SYS_munmap,
            args: &args,
        });
        for (thread, called) in threads.into_iter().zip(agent::remote::call_all(calls.collect())) {
            let explain = explain(&checkpoint.tasks[thread.task], thread, DOING);
            match called.map_err(&explain)? {
                // The end of a call is not where the kernel makes calls again.
                (stopped, 0) if restart(checkpoint, thread).is_some() => {
                    self.running.push((thread, stopped.stop_again().map_err(&explain)?));
                }
                (stopped, 0) => self.stopped.push((thread, stopped)),
                (_, result) => return Err(explain(Errno { call: "munmap", code: -result as i32 })),
            }
        }
        self.stand(checkpoint)
    }

    pub fn set_registers(&mut self, checkpoint: &Checkpoint, _hole: &Range<u64>) -> Result<(), Failure> {
        let mut xstate = vec![0; arch::XSTATE_MAX];
        // Its length, the same for every thread on this host.
        let mut known = None;
        for (thread, stopped) in &self.stopped {
            let task = &checkpoint.tasks[thread.task];
            let core = &task.cores[thread.nth];
            let explain = explain(task, *thread, "set its registers");
            // The loader has seen to it that both are there.
            let (Some(own), Some(info)) = (&core.thread_core, &core.thread_info) else { continue };
            let length = match known {
                Some(length) => length,
                None => {
                    *known.insert(stopped.read_regset(ptrace::X86_XSTATE, &mut xstate).map_err(&explain)?)
                }
            };
            let name = format!("core-{}.img", task.tids[thread.nth]);
            arch::record::fill_xstate(&info.fpregs, &mut xstate[..length], &name)
                .map_err(|failure| failure.of(task.pid))?;
            stopped.write_regset(ptrace::X86_XSTATE, &xstate[..length]).map_err(&explain)?;
            let registers = arch::record::registers(&info.gpregs).in_call_again(own.restart);
            registers.write(stopped).map_err(&explain)?;
            let mask = own.blk_sigset.unwrap_or(task.tc().blk_sigset);
            stopped.set_signal_mask(mask).map_err(&explain)?;
        }
        Ok(())
    }

    pub fn let_go(&mut self, checkpoint: &Checkpoint, _hole: &Range<u64>) -> Result<(), Failure> {
        for (thread, stopped) in self.stopped.drain(..) {
            let task = &checkpoint.tasks[thread.task];
            stopped.detach().map_err(explain(task, thread, "let it go"))?;
        }
        Ok(())
    }
}
