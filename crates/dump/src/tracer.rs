//! Stopped threads, and the one thread of this program that holds them.

use crate::copies::{self, Held, options};
use agent::inject::{Context, Door, Host};
use agent::{Watch, arch};
use kinds::task::seccomp;
use model::{Errno, Failure, Object, Remedy};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Instant;
use sys::proc::Stat;
use sys::ptrace::{self, Running, Stop, Stopped};

/// One stopped thread.
#[derive(Debug)]
pub struct Thread {
    pub tid: i32,
    pub context: Context,
    /// Taken out for the moments in which it runs the agent.
    pub stopped: Option<Stopped>,
}

/// The threads of one process that one tracer holds.
#[derive(Debug)]
pub struct Part {
    pub pid: i32,
    pub threads: Vec<Thread>,
    /// Threads of the kernel, which are not held; see [`workers`].
    workers: Vec<i32>,
}

/// All that one tracer holds. Dropping it lets every thread run on as it was.
#[derive(Debug, Default)]
pub struct Tracer {
    pub parts: Vec<Part>,
    /// Copies of processes; they end with it.
    pub copies: Vec<Held>,
}

/// Which threads of a process are whose: those whose number leaves `index` when divided by `of`.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub index: usize,
    pub of: usize,
}

impl Share {
    pub const ALL: Share = Share { index: 0, of: 1 };

    fn has(self, tid: i32) -> bool {
        tid as usize % self.of == self.index
    }
}

/// What became of a share of a process.
#[derive(Debug)]
pub enum Seized {
    /// These threads were stopped now, and the signal of a stop that they were in already.
    Threads { tids: Vec<i32>, stop: Option<i32> },
    /// The process has ended, and its parent has not waited for it.
    Zombie,
    /// It has more threads than one tracer should stop alone; none is stopped.
    Many,
}

pub fn read_stat(pid: i32) -> Result<Stat, Failure> {
    let text = sys::fd::text(&format!("/proc/{pid}/stat"))
        .map_err(|error| error.on(Object::Task, "find it").of(pid))?;
    sys::proc::parse_stat(&text).ok_or_else(|| {
        Failure::conflict(Object::Task, "read its stat", "the kernel's text is not understood").of(pid)
    })
}

impl Tracer {
    /// Hands out what it holds of a process; it is to come back, for who lets it go is the tracer.
    pub fn take(&mut self, pid: i32) -> Part {
        match self.parts.iter().position(|part| part.pid == pid) {
            Some(at) => self.parts.swap_remove(at),
            None => Part::of(pid),
        }
    }

    /// Has the leader of a process run the agent as `work` says, which gives the thread back with what it came to.
    ///
    /// # Errors
    /// Those of `work` among others; the thread is whole, unless it is gone.
    pub fn with_agent<R>(
        &mut self,
        pid: i32,
        instruction: u64,
        work: impl FnOnce(&Host, Stopped, &Context) -> Result<(Stopped, R), Failure>,
    ) -> Result<R, Failure> {
        self.with_leader(pid, |thread, context| {
            let watch = Watch::new().map_err(|error| error.on(Object::Tree, "prepare operations"))?;
            let door = Door { pid, thread, context, instruction };
            let (host, thread) = Host::enter_all(vec![door], &Rc::new(watch)).remove(0)?;
            let (thread, result) = work(&host, thread, context)?;
            Ok((Host::leave_all(vec![(host, thread, context)]).remove(0)?, Ok(result)))
        })
    }

    /// Does it hold the leader of a process?
    pub fn holds(&self, pid: i32) -> bool {
        let mut threads = self.parts.iter().filter(|part| part.pid == pid).flat_map(|part| &part.threads);
        threads.any(|thread| thread.tid == pid && thread.stopped.is_some())
    }

    /// Hands out the leader of a process, if it is held, for `work`, which gives it back with what it came to.
    ///
    /// # Errors
    /// Those of `work`; the inner ones leave the thread whole.
    pub fn with_leader<R>(
        &mut self,
        pid: i32,
        work: impl FnOnce(Stopped, &Context) -> Result<(Stopped, Result<R, Failure>), Failure>,
    ) -> Result<R, Failure> {
        let mut threads =
            self.parts.iter_mut().filter(|part| part.pid == pid).flat_map(|part| &mut part.threads);
        let leader = threads.find(|thread| thread.tid == pid);
        let none = || Failure::conflict(Object::Task, "enter it", "its leader is not held").of(pid);
        let leader = leader.ok_or_else(none)?;
        let thread = leader.stopped.take().ok_or_else(none)?;
        let (thread, result) = work(thread, &leader.context)?;
        leader.stopped = Some(thread);
        result
    }

    fn part(&mut self, pid: i32) -> &mut Part {
        let at = self.parts.iter().position(|part| part.pid == pid).unwrap_or_else(|| {
            self.parts.push(Part::of(pid));
            self.parts.len() - 1
        });
        &mut self.parts[at]
    }

    /// Stops the threads of a share, and looks again until there are no new ones. Of a process with more
    /// than `limit` threads it stops none.
    pub fn seize(
        &mut self,
        pid: i32,
        share: Share,
        limit: usize,
        deadline: Instant,
    ) -> Result<Seized, Failure> {
        let part = self.part(pid);
        let before = part.threads.len();
        let mut stop = None;
        loop {
            let tids = sys::fd::numbers(&format!("/proc/{pid}/task"))
                .map_err(|error| error.on(Object::Task, "list its threads").of(pid))?;
            let has_others = tids.len() > 1;
            if tids.len() > limit {
                return Ok(Seized::Many);
            }
            let is_new = |tid: &i32| {
                share.has(*tid)
                    && !part.workers.contains(tid)
                    && part.threads.iter().all(|thread| thread.tid != *tid)
            };
            let is_many = tids.len() >= sys::threads::MANY;
            let mut new: Vec<i32> = tids.into_iter().filter(is_new).collect();
            // To attach to one would wake it, and what it waits for may be there in a moment.
            let workers = workers(pid, &new, is_many);
            new.retain(|tid| !workers.contains(tid));
            part.workers.extend(workers);
            if new.is_empty() {
                let tids = part.threads[before..].iter().map(|thread| thread.tid).collect();
                return Ok(Seized::Threads { tids, stop });
            }
            // All are told to stop before the first is waited for.
            let mut stopping = Vec::with_capacity(new.len());
            let mut refused = None;
            for tid in new {
                match ptrace::seize(tid, options()) {
                    Ok(running) => {
                        let _ = running.interrupt();
                        stopping.push(running);
                    }
                    Err(error) if error.code == libc::ESRCH => {}
                    // It will be missing the next time.
                    Err(_) if tid != pid && is_ending(pid, tid) && Instant::now() < deadline => {}
                    Err(error) => {
                        refused = Some((tid, error));
                        break;
                    }
                }
            }
            part.finish_stopping(stopping, &mut stop, deadline).map_err(|failure| failure.of(pid))?;
            if let Some((tid, error)) = refused {
                let is_dead = tid == pid && read_stat(pid).is_ok_and(|stat| stat.state == b'Z');
                return match (is_dead, has_others) {
                    (true, false) => Ok(Seized::Zombie),
                    (true, true) => Err(leaderless(pid)),
                    (false, _) => Err(explain_seize(pid, tid, error).of(pid)),
                };
            }
        }
    }

    /// Waits for the end of every thread: their processes were killed.
    pub fn reap(&mut self) {
        // A leader's end is told when that of all its threads was, to whomever.
        let threads: Vec<(bool, i32)> = self
            .parts
            .drain(..)
            .flat_map(|part| {
                let pid = part.pid;
                part.threads.into_iter().map(move |thread| (thread.tid == pid, thread.tid))
            })
            .collect();
        for is_leader in [false, true] {
            for (_, tid) in threads.iter().filter(|(leads, _)| *leads == is_leader) {
                let _ = sys::process::wait(*tid, true);
            }
        }
    }
}

/// Those of these threads that are the kernel's, see [`sys::threads::is_of_kernel`].
fn workers(pid: i32, tids: &[i32], is_many: bool) -> HashSet<i32> {
    if tids.is_empty() {
        return HashSet::new();
    }
    let told = if is_many { sys::threads::of(pid) } else { None };
    let told: HashMap<i32, bool> =
        told.into_iter().flatten().map(|told| (told.tid, told.is_of_kernel)).collect();
    let says = |tid: i32| {
        let text = sys::fd::text(&format!("/proc/{pid}/task/{tid}/stat")).ok();
        let stat = text.and_then(|text| sys::proc::parse_stat(&text));
        stat.is_some_and(|stat| sys::threads::is_of_kernel(stat.flags))
    };
    let is_one = |tid: &i32| *tid != pid && told.get(tid).copied().unwrap_or_else(|| says(*tid));
    tids.iter().copied().filter(is_one).collect()
}

/// Has this thread come to its end, or is it gone, with nobody who waits for it? The kernel lets nobody attach to it any
/// more. Source: kernel/ptrace.c, `ptrace_attach`.
fn is_ending(pid: i32, tid: i32) -> bool {
    let text = sys::fd::text(&format!("/proc/{pid}/task/{tid}/status"));
    let status = text.ok().and_then(|text| sys::proc::parse_status(&text));
    let state = || sys::fd::text(&format!("/proc/{pid}/task/{tid}/stat"));
    let stat = || state().ok().and_then(|text| sys::proc::parse_stat(&text));
    status.is_none_or(|status| {
        status.tracer == 0 && stat().is_none_or(|stat| matches!(stat.state, b'Z' | b'X'))
    })
}

/// The children that a process has, by any of these threads.
pub fn children(pid: i32, tids: &[i32]) -> Vec<i32> {
    let told = if tids.len() >= sys::threads::MANY { sys::threads::of(pid) } else { None };
    let has_none =
        told.unwrap_or_default().into_iter().filter(|told| !told.has_children).map(|told| told.tid);
    let has_none: HashSet<i32> = has_none.collect();
    let mut children = Vec::new();
    for tid in tids.iter().filter(|tid| !has_none.contains(tid)) {
        let text = sys::fd::text(&format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
        children.extend(text.split(|byte| *byte == b' ').filter_map(sys::proc::decimal::<i32>));
    }
    children
}

/// Lets a thread run on as it was when it was stopped.
pub fn let_go(thread: Stopped, context: &Context) -> Result<(), Errno> {
    let written = match arch::is_disturbed(&context.registers, context.rest) {
        true => arch::restart_interrupted_call(&context.registers, context.rest).write(&thread),
        false => Ok(()),
    };
    thread.detach().and(written)
}

pub fn leaderless(pid: i32) -> Failure {
    Failure::unsupported(Object::Task, "its leader thread has ended, others go on").of(pid)
}

fn explain_seize(pid: i32, tid: i32, error: Errno) -> Failure {
    let status = std::fs::read(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    match sys::proc::parse_status(&status) {
        Some(status) if status.tracer != 0 => {
            let why = format!("is traced by process {}", status.tracer);
            Failure::unsupported(Object::Task, why)
                .help(Remedy::Advice("detach the debugger or tracer first"))
        }
        _ => error.on(Object::Thread(tid), "attach to it"),
    }
}

impl Part {
    fn of(pid: i32) -> Part {
        Part { pid, threads: Vec::new(), workers: Vec::new() }
    }

    /// Waits for the threads that were told to stop.
    fn finish_stopping(
        &mut self,
        stopping: Vec<Running>,
        stop: &mut Option<i32>,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let pid = self.pid;
        let mut first = Ok(());
        for running in stopping {
            let tid = running.tid();
            let explain = |error: Errno| error.on(Object::Thread(tid), "stop it");
            let stopped = match running.halt_by(deadline).map_err(explain) {
                Ok(Some(Stop::Trap(stopped))) => stopped,
                Ok(Some(Stop::Group(stopped, signal))) => {
                    *stop = Some(signal);
                    stopped
                }
                Ok(Some(_)) => continue,
                Ok(None) => {
                    first = first.and(Err(Failure::conflict(Object::Thread(tid), "", why_not(pid, tid))));
                    continue;
                }
                Err(failure) => {
                    first = first.and(Err(failure));
                    continue;
                }
            };
            if let Err(failure) = seccomp::enter(tid) {
                let _ = stopped.detach();
                first = first.and(Err(failure));
                continue;
            }
            match Context::read(&stopped) {
                Ok(context) => self.threads.push(Thread { tid, context, stopped: Some(stopped) }),
                Err(error) if error.code == libc::ENOSYS => {
                    let _ = stopped.detach();
                    let why = "is a 32-bit task, which is not carried yet";
                    first = first.and(Err(Failure::unsupported(Object::Thread(tid), why)));
                }
                Err(error) => {
                    let _ = stopped.detach();
                    first = first.and(Err(error.on(Object::Thread(tid), "read its registers")));
                }
            }
        }
        first
    }
}

/// Why a thread does not stop.
fn why_not(pid: i32, tid: i32) -> String {
    let wchan = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/wchan"));
    let state = read_stat(pid).map_or(0, |stat| stat.state);
    match wchan {
        Ok(place) if state == b'D' && matches!(&*place, "kernel_clone" | "wait_for_vfork_done") => {
            "waits in vfork(2) for a child that has not executed a program yet".into()
        }
        Ok(place) if !place.is_empty() => format!("does not stop: it waits in {place}"),
        _ => "does not stop".into(),
    }
}

impl Tracer {
    /// Lets every thread run on as it was; copies stay.
    pub fn let_go(&mut self) {
        for part in &mut self.parts {
            for thread in &mut part.threads {
                let Some(stopped) = thread.stopped.take() else { continue };
                if let Err(error) = let_go(stopped, &thread.context)
                    && error.code != libc::ESRCH
                {
                    log::error!("thread {} of pid {} could not be let go: {error}", thread.tid, part.pid);
                }
            }
        }
        self.parts.clear();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        copies::end(self);
        self.let_go();
    }
}
