//! Stops a whole tree, and lets it go again.
//!
//! A thread is seized and interrupted; its new siblings and children are looked for until there are no
//! more. Whatever ends the dump, dropping the [`Tree`] lets every thread run on as it was.

use agent::inject::Context;
use model::{Errno, Failure, Failures, Object, Remedy};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use sys::proc::Stat;
use sys::ptrace::{self, Running, Stop, Stopped};

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Alive,
    /// Stopped by this signal.
    Stopped(i32),
    /// Dead, and not waited for by its parent.
    Zombie,
}

/// One stopped thread.
#[derive(Debug)]
pub struct Thread {
    pub tid: i32,
    pub context: Context,
    /// Taken out for the moments in which it runs the agent.
    pub stopped: Option<Stopped>,
}

#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub stat: Stat,
    pub state: State,
    /// The leader first; none for a zombie.
    pub threads: Vec<Thread>,
}

/// What becomes of a tree when the dump is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinalState {
    Killed,
    Running,
    Stopped,
}

/// A frozen tree, parents before children.
#[derive(Debug)]
pub struct Tree {
    pub processes: Vec<Process>,
}

pub fn read_stat(pid: i32) -> Result<Stat, Failure> {
    let text = std::fs::read(format!("/proc/{pid}/stat"))
        .map_err(|error| sys::memory::io_errno("read(stat)", &error).on(Object::Task, "find it").of(pid))?;
    sys::proc::parse_stat(&text).ok_or_else(|| {
        Failure::conflict(Object::Task, "read its stat", "the kernel's text is not understood").of(pid)
    })
}

/// Stops the tree below `root`.
///
/// # Errors
/// Everything that cannot be stopped; what was stopped runs on.
pub fn freeze(root: i32, timeout: Duration) -> Result<Tree, Failures> {
    let deadline = Instant::now() + timeout;
    let mut tree = Tree { processes: Vec::new() };
    let mut known = HashSet::new();
    let mut queue = vec![root];
    let mut failures = Failures::new();
    loop {
        while let Some(pid) = queue.pop() {
            if !known.insert(pid) {
                continue;
            }
            match freeze_process(pid, deadline) {
                Ok(process) => {
                    let at = tree.processes.len();
                    tree.processes.push(process);
                    queue.extend(children(&tree.processes[at]).into_iter().rev());
                }
                // A child that nobody waits for is gone without a trace.
                Err(failure) if pid != root && !std::path::Path::new(&format!("/proc/{pid}")).exists() => {
                    log::debug!("{failure}");
                }
                Err(failure) => failures.push(failure),
            }
        }
        // A task that died before it was stopped may have left its children to a subreaper in the tree.
        queue.extend(tree.processes.iter().flat_map(children).filter(|pid| !known.contains(pid)));
        if queue.is_empty() {
            break;
        }
    }
    if failures.is_empty() { Ok(tree) } else { Err(failures) }
}

fn children(process: &Process) -> Vec<i32> {
    let mut children = Vec::new();
    for thread in &process.threads {
        let path = format!("/proc/{}/task/{}/children", process.pid, thread.tid);
        let text = std::fs::read(path).unwrap_or_default();
        children.extend(text.split(|byte| *byte == b' ').filter_map(sys::proc::decimal::<i32>));
    }
    children
}

fn freeze_process(pid: i32, deadline: Instant) -> Result<Process, Failure> {
    let stat = read_stat(pid)?;
    let zombie = |stat| Process { pid, stat, state: State::Zombie, threads: Vec::new() };
    let mut process = Process { pid, stat, state: State::Alive, threads: Vec::new() };
    let guard = |process: Process, failure: Failure| {
        drop(Tree { processes: vec![process] });
        Err(failure.of(pid))
    };
    loop {
        let tids = match sys::fd::numbers(&format!("/proc/{pid}/task")) {
            Ok(tids) => tids,
            Err(error) => return guard(process, error.on(Object::Task, "list its threads")),
        };
        let has_others = tids.len() > 1;
        let new: Vec<i32> =
            tids.into_iter().filter(|tid| process.threads.iter().all(|thread| thread.tid != *tid)).collect();
        if new.is_empty() {
            break;
        }
        // All are told to stop before the first is waited for.
        let mut stopping = Vec::with_capacity(new.len());
        for tid in new {
            match ptrace::seize(tid, ptrace::SUSPEND_SECCOMP | ptrace::SYSCALL_GOOD) {
                Ok(running) => {
                    let _ = running.interrupt();
                    stopping.push(running);
                }
                Err(error) if error.code == libc::ESRCH => {}
                Err(error) => {
                    let state = read_stat(pid).map_or(0, |stat| stat.state);
                    if state == b'Z' && tid == pid {
                        if !has_others {
                            return Ok(zombie(read_stat(pid)?));
                        }
                        let failure =
                            Failure::unsupported(Object::Task, "its leader thread has ended, others go on");
                        finish_stopping(stopping, &mut process, deadline)?;
                        return guard(process, failure);
                    }
                    finish_stopping(stopping, &mut process, deadline)?;
                    return guard(process, explain_seize(pid, tid, error));
                }
            }
        }
        if let Err(failure) = finish_stopping(stopping, &mut process, deadline) {
            return guard(process, failure);
        }
    }
    let leader_state = std::fs::read(format!("/proc/{pid}/task/{pid}/stat")).ok();
    let leader_state =
        leader_state.and_then(|text| sys::proc::parse_stat(&text)).map_or(b'Z', |stat| stat.state);
    let alive = process.threads.iter().position(|thread| thread.tid == pid).filter(|_| leader_state != b'Z');
    match alive {
        Some(leader) => process.threads.swap(0, leader),
        None => {
            return guard(
                process,
                Failure::unsupported(Object::Task, "its leader thread has ended, others go on"),
            );
        }
    }
    process.threads[1..].sort_by_key(|thread| thread.tid);
    Ok(process)
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

/// Waits for the threads that were told to stop.
fn finish_stopping(stopping: Vec<Running>, process: &mut Process, deadline: Instant) -> Result<(), Failure> {
    let mut first = Ok(());
    for running in stopping {
        let tid = running.tid();
        let explain = |error: Errno| error.on(Object::Thread(tid), "stop it");
        let stopped = match running.halt_by(deadline).map_err(explain) {
            Ok(Some(Stop::Trap(stopped))) => stopped,
            Ok(Some(Stop::Group(stopped, signal))) => {
                process.state = State::Stopped(signal);
                stopped
            }
            Ok(Some(_)) => continue,
            Ok(None) => {
                let wchan = std::fs::read_to_string(format!("/proc/{}/task/{tid}/wchan", process.pid));
                let state = read_stat(process.pid).map_or(0, |stat| stat.state);
                let why = match wchan {
                    Ok(place)
                        if state == b'D' && matches!(&*place, "kernel_clone" | "wait_for_vfork_done") =>
                    {
                        "waits in vfork(2) for a child that has not executed a program yet".into()
                    }
                    Ok(place) if !place.is_empty() => format!("does not stop: it waits in {place}"),
                    _ => "does not stop".into(),
                };
                first = first.and(Err(Failure::conflict(Object::Thread(tid), "", why)));
                continue;
            }
            Err(failure) => {
                first = first.and(Err(failure));
                continue;
            }
        };
        match Context::read(&stopped) {
            Ok(context) => process.threads.push(Thread { tid, context, stopped: Some(stopped) }),
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

impl Tree {
    /// Ends the dump as it was asked for.
    pub fn finish(mut self, state: FinalState) {
        match state {
            FinalState::Running => {}
            FinalState::Stopped => {
                for process in self.processes.iter().filter(|process| process.state != State::Zombie) {
                    let _ = sys::process::kill(process.pid, libc::SIGSTOP);
                }
            }
            FinalState::Killed => {
                for process in &self.processes {
                    if process.state != State::Zombie {
                        let _ = sys::process::kill(process.pid, libc::SIGKILL);
                    }
                }
                // We are told of the end of each thread first; a process is gone when its leader was told.
                for process in self.processes.drain(..) {
                    for thread in process.threads.into_iter().rev() {
                        let _ = sys::process::wait(thread.tid, true);
                    }
                }
            }
        }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for process in &mut self.processes {
            for thread in &mut process.threads {
                if let Some(stopped) = thread.stopped.take()
                    && let Err(error) = stopped.detach()
                    && error.code != libc::ESRCH
                {
                    log::error!("thread {} of pid {} could not be let go: {error}", thread.tid, process.pid);
                }
            }
        }
    }
}
