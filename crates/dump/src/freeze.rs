//! Stops a whole tree, and lets it go again.
//!
//! A thread is seized and interrupted; its new siblings and children are looked for until there are no
//! more. Whatever ends the dump, dropping the [`Tree`] lets every thread run on as it was.

use crate::copies::Copies;
use crate::tracer::{Seized, Share, Tracer, children, leaderless, read_stat};
use agent::crew::{self, Crew};
use model::{Failure, Failures};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use sys::proc::Stat;

/// Threads that one tracer stops alone.
const THREADS_OF_ONE: usize = 64;

/// How a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Alive,
    /// Stopped by this signal.
    Stopped(i32),
    /// Dead, and not waited for by its parent.
    Zombie,
}

#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub stat: Stat,
    pub state: State,
    /// The leader first; none for a zombie.
    pub tids: Vec<i32>,
    /// Who of the crew holds threads of it.
    pub members: Vec<usize>,
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
    pub crew: Crew<Tracer>,
    /// Behind the crew, which ends them and lets their originals go.
    pub copies: Copies,
}

/// What one process of the tree turned out to be.
struct Found {
    stat: Stat,
    seized: Seized,
    children: Vec<i32>,
}

/// Stops the tree below `root`.
///
/// # Errors
/// Everything that cannot be stopped; what was stopped runs on.
pub fn freeze(root: i32, timeout: Duration) -> Result<Tree, Failures> {
    agent::prepare();
    let deadline = Instant::now() + timeout;
    let mut tree = Tree { processes: Vec::new(), crew: Crew::default(), copies: Copies::default() };
    let mut known = HashSet::new();
    let mut level = vec![root];
    let mut failures = Failures::new();
    let size = crew::size();
    // One tracer has nobody to share with.
    let limit = if size > 1 { THREADS_OF_ONE } else { usize::MAX };
    while !level.is_empty() {
        level.retain(|pid| known.insert(*pid));
        let tasks = level.iter().enumerate().map(|(at, pid)| (at % size, *pid));
        let found = tree.crew.each(tasks, move |tracer, pid| find(tracer, pid, limit, deadline));
        let mut next = Vec::new();
        for (at, (pid, found)) in std::mem::take(&mut level).into_iter().zip(found).enumerate() {
            match found.and_then(|found| tree.add(pid, at % size, found, deadline)) {
                Ok(children) => next.extend(children),
                // A child that nobody waits for is gone without a trace.
                Err(failure) if pid != root && !std::path::Path::new(&format!("/proc/{pid}")).exists() => {
                    log::debug!("{failure}");
                }
                Err(failure) => failures.push(failure),
            }
        }
        if next.is_empty() && tree.processes.len() > 1 {
            // A task that died before it was stopped may have left its children to a subreaper in the tree.
            let all = tree.processes.iter().enumerate();
            let all = all.map(|(at, process)| (at % size, (process.pid, process.tids.clone())));
            let all: Vec<_> = all.collect();
            let again = tree.crew.each(all, |_, (pid, tids)| children(pid, &tids));
            next.extend(again.into_iter().flatten().filter(|pid| !known.contains(pid)));
        }
        level = next;
    }
    if failures.is_empty() { Ok(tree) } else { Err(failures) }
}

fn find(tracer: &mut Tracer, pid: i32, limit: usize, deadline: Instant) -> Result<Found, Failure> {
    let stat = read_stat(pid)?;
    let seized = tracer.seize(pid, Share::ALL, limit, deadline)?;
    let children = match &seized {
        Seized::Threads { tids, .. } => children(pid, tids),
        _ => Vec::new(),
    };
    // As it is now, when it is stopped.
    let stat = if matches!(seized, Seized::Zombie) { read_stat(pid)? } else { stat };
    Ok(Found { stat, seized, children })
}

impl Tree {
    /// Adds what `member` found; returns its children.
    fn add(&mut self, pid: i32, member: usize, found: Found, deadline: Instant) -> Result<Vec<i32>, Failure> {
        let mut process =
            Process { pid, stat: found.stat, state: State::Alive, tids: Vec::new(), members: vec![member] };
        let children = match found.seized {
            Seized::Zombie => {
                process.state = State::Zombie;
                self.processes.push(process);
                return Ok(Vec::new());
            }
            Seized::Threads { tids, stop } => {
                process.tids = tids;
                process.state = stop.map_or(State::Alive, State::Stopped);
                found.children
            }
            Seized::Many => {
                self.share(&mut process, deadline)?;
                let shares = crew::shares(process.tids.iter().copied());
                self.crew.each(shares, move |_, tids| children(pid, &tids)).concat()
            }
        };
        let leader = sys::fd::text(&format!("/proc/{pid}/task/{pid}/stat")).ok();
        let state = leader.and_then(|text| sys::proc::parse_stat(&text)).map_or(b'Z', |stat| stat.state);
        process.tids.sort_unstable_by_key(|tid| (*tid != pid, *tid));
        if process.tids.first() != Some(&pid) || state == b'Z' {
            return Err(leaderless(pid));
        }
        self.processes.push(process);
        Ok(children)
    }

    /// Stops a process with many threads: everybody has a share of them.
    fn share(&mut self, process: &mut Process, deadline: Instant) -> Result<(), Failure> {
        let (pid, of) = (process.pid, crew::size());
        process.members = (0..of).collect();
        loop {
            let seized = self.crew.each((0..of).map(|index| (index, index)), move |tracer, index| {
                tracer.seize(pid, Share { index, of }, usize::MAX, deadline)
            });
            let mut is_complete = true;
            for seized in seized {
                match seized? {
                    Seized::Threads { tids, stop } => {
                        is_complete &= tids.is_empty();
                        process.tids.extend(tids);
                        if let Some(signal) = stop {
                            process.state = State::Stopped(signal);
                        }
                    }
                    Seized::Zombie | Seized::Many => return Err(leaderless(pid)),
                }
            }
            // A thread of one share may have made one of another before it was stopped.
            if is_complete {
                return Ok(());
            }
        }
    }

    /// The member of the crew that holds the leader of a process.
    pub fn holder(&self, pid: i32) -> Option<usize> {
        let members = &self.processes.iter().find(|process| process.pid == pid)?.members;
        Some(if members.len() > 1 { pid as usize % members.len() } else { *members.first()? })
    }

    /// Lets all processes run on as they were; their copies stay.
    pub fn let_go(&mut self) {
        let members = 0..self.crew.len();
        self.crew.each(members.map(|member| (member, ())), |tracer, ()| tracer.let_go());
    }

    /// Ends the dump as it was asked for.
    pub fn finish(mut self, state: FinalState) {
        let alive = || self.processes.iter().filter(|process| process.state != State::Zombie);
        match state {
            FinalState::Running => {}
            FinalState::Stopped => {
                for process in alive() {
                    let _ = sys::process::kill(process.pid, libc::SIGSTOP);
                }
            }
            FinalState::Killed => {
                for process in alive() {
                    let _ = sys::process::kill(process.pid, libc::SIGKILL);
                }
                // They leave a processor for it.
                if alive().count() < crew::size() {
                    sys::process::help_to_end(alive().map(|process| process.pid));
                }
                let members: HashSet<usize> = alive().flat_map(|process| &process.members).copied().collect();
                self.crew.each(members.into_iter().map(|member| (member, ())), |tracer, ()| tracer.reap());
            }
        }
    }
}
