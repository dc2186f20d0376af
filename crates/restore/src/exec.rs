//! Executes a plan: puppets, lists in a few waves, and the moment in which puppets become the tasks.
//!
//! Wave one makes the processes, each with its memory; a child's list waits in the shared area before
//! the child exists. Wave two puts descriptors, groups and threads in place. Wave three sets what the task
//! has of its own, wave four starts what must not run before. Then every thread is stopped, the agent
//! unmapped, registers set, and all are let go. Whatever fails before that: every process is killed.

mod errands;
mod own;
mod table;

use self::table::Couriers;
use crate::created::{Created, is_at_work};
use crate::held::{Held, Thread};
use crate::lazy::Server;
use crate::load::{Checkpoint, Task};
use crate::memory::{self, Contents, Filling, OwnVdso, Reach};
use crate::plan::{Birth, Plan, StandIn};
use crate::service::{Service, service};
use crate::stage::Stage;
use agent::arch::Config;
use agent::area::{Area, Run, Slot};
use agent::crew::{self, Crew};
use agent::puppet::{self, CloneArgs};
use agent::{Arg, Judge, List, Watch};
use image::pagemap::PagesFile;
use kinds::contract::TaskOps;
use kinds::fd::tty::Control;
use kinds::task::signals;
use kinds::vma;
use model::stats::RestoreStats;
use model::{Errno, Failure, IdMap, Object, Options};
use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;
use sys::proc::Status;
use sys::userfault::Userfault;

const PAGE: u64 = 4096;
const SIGSET: u64 = 8;
const EVERY_SIGNAL: u64 = !0;
/// Threads for which one of ours is enough.
const THREADS_OF_ONE: usize = 32;
const CLONE_THREAD_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// What is open in this process, for the tasks to fetch.
#[derive(Debug, Clone, Copy)]
pub struct Open<'r> {
    /// Files by id.
    pub files: &'r IdMap<OwnedFd>,
    /// The same, opened in another mode for mappings.
    pub mapped: &'r HashMap<(u32, u32), OwnedFd>,
    /// What sessions have.
    pub terminals: &'r [Control],
}

const TAKE_TERMINAL: &str = "take the terminal of its session";

/// Everything that the waves need.
pub struct Exec<'r> {
    pub checkpoint: Arc<Checkpoint>,
    pub plan: &'r Plan,
    pub options: &'r Options,
    pub open: Open<'r>,
    pub pages: HashMap<PagesFile, File>,
    pub contents: Contents,
    pub own: Status,
    /// Who hands out memory that comes later.
    pub lazy: Option<&'r Server>,
    area: Area,
    /// One for each thread of each task.
    slots: Vec<Vec<Slot>>,
    stand_ins: Vec<Slot>,
    service: Service,
    counts: Cell<RestoreStats>,
}

pub fn tree_error(error: Errno) -> Failure {
    error.on(Object::Tree, "prepare the restore")
}

impl<'r> Exec<'r> {
    pub fn new(
        checkpoint: Arc<Checkpoint>,
        plan: &'r Plan,
        options: &'r Options,
        open: Open<'r>,
        pages: HashMap<PagesFile, File>,
        contents: Contents,
        lazy: Option<&'r Server>,
    ) -> Result<Exec<'r>, Failure> {
        let len = plan.hole.end - plan.hole.start - puppet::PAGES;
        let file = sys::memory::memfd(c"crtools-area", false).map_err(tree_error)?;
        sys::fd::truncate(&file, len).map_err(tree_error)?;
        let watch = Rc::new(Watch::new().map_err(tree_error)?);
        let area =
            Area::new(&file, len as usize, plan.hole.start + puppet::PAGES, watch).map_err(tree_error)?;
        let slots = checkpoint
            .tasks
            .iter()
            .map(|task| task.tids.iter().map(|_| area.slot(0)).collect())
            .collect::<Result<_, _>>()
            .map_err(tree_error)?;
        let stand_ins =
            plan.stand_ins.iter().map(|_| area.slot(0)).collect::<Result<_, _>>().map_err(tree_error)?;
        let service = service(&checkpoint, &file)?;
        let status = std::fs::read("/proc/self/status").unwrap_or_default();
        let own = sys::proc::parse_status(&status).ok_or_else(|| {
            Failure::conflict(Object::Tree, "read our own status", "the text is not understood")
        })?;
        Ok(Exec {
            checkpoint,
            plan,
            options,
            open,
            pages,
            contents,
            own,
            lazy,
            area,
            slots,
            stand_ins,
            service,
            counts: Cell::default(),
        })
    }

    /// Notes pages that are where they belong: put there, or shared with those of a relative.
    fn count(&self, put: &[image::pagemap::Run], shared: u64) {
        let put: u64 = put.iter().map(|run| run.len() / PAGE).sum();
        let mut counts = self.counts.get();
        counts.pages_restored += put;
        counts.pages_skipped_cow += shared;
        self.counts.set(counts);
        self.options.progress.pages_done(put + shared);
    }

    fn reach(&self) -> Reach {
        Reach { pidfd: self.service.pidfd }
    }

    fn tasks(&self) -> impl Iterator<Item = (usize, &Task)> {
        self.checkpoint.tasks.iter().enumerate()
    }

    fn children(&self, at: usize, birth: Birth) -> Vec<usize> {
        let is_child = |child: &usize| self.checkpoint.tasks[*child].parent == Some(at);
        (0..self.checkpoint.tasks.len())
            .filter(is_child)
            .filter(|child| self.plan.births[*child] == birth)
            .collect()
    }

    /// Brings the tree to life. `open_late` is for when all threads are there and none has a descriptor yet,
    /// `arm` for when everything is.
    ///
    /// # Errors
    /// The first operation that failed; nothing of the tree is left then.
    pub fn run(
        &self,
        open_late: Option<impl FnOnce() -> Result<(), Failure>>,
        arm: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<RestoreStats, Failure> {
        let started = Instant::now();
        let root = &self.checkpoint.tasks[0];
        let hole = &self.plan.hole;
        let config = Config {
            area: self.area.remote(),
            area_len: self.area.len() as u64,
            area_fd: self.service.area,
            code: hole.start,
            image: hole.start + PAGE,
            slot: self.slots[0][0].address(),
        };
        let file = puppet::executable(&config).map_err(tree_error)?;
        let own_vdso = OwnVdso::read()?;
        puppet::spawn(&file, root.pid, self.options.restore_sibling)
            .map_err(|error| error.on(Object::Task, "make the process").of(root.pid))?;
        let mut created = Created { root: root.pid, is_kept: false };
        let mut stage = Stage::begin();
        self.close_inherited()?;
        let files = |id: u32, mode: u32| {
            let fd = self.open.mapped.get(&(id, mode)).or_else(|| self.open.files.get(id));
            fd.map(AsRawFd::as_raw_fd)
        };
        let pages = |file: PagesFile| self.pages.get(&file).map(AsRawFd::as_raw_fd);
        let is_made_later = |id: u32| self.checkpoint.files.is_made_by_task(id);
        let sources = memory::Sources {
            files: &files,
            is_made_later: &is_made_later,
            pages: &pages,
            contents: &self.contents,
            own: &own_vdso,
            hole: &self.plan.hole,
            segments: &self.checkpoint.segments,
            reach: self.reach(),
            many: if self.lazy.is_some() { 1 } else { memory::MANY },
            is_lazy: self.lazy.is_some(),
        };
        let (checkpoint, files) = (&*self.checkpoint, self.open.files);
        let mut opened = checkpoint.files.opened(files);
        let has_errands = opened.any(|(.., kind, entry)| !kind.errands(entry).is_empty());
        let (open, sent) = std::thread::scope(|scope| {
            // Unless some are still to be exchanged, many descriptors are on their way meanwhile.
            let is_early = open_late.is_none() && !has_errands && table::is_large(checkpoint);
            let sending = is_early.then(|| scope.spawn(|| table::send(checkpoint, files)));
            let open = self.make_processes(&sources)?;
            let sent = sending.map(|sending| sending.join().expect("a worker does not panic")).transpose()?;
            Ok::<_, Failure>((open, sent))
        })?;
        let forking_us = started.elapsed().as_micros() as u64;
        self.lazy.map_or(Ok(()), Server::ask_whether_ready)?;
        stage.ends("made the processes and their memory");
        self.aio_contexts()?;
        let has_threads = open_late.is_some() || has_errands;
        if has_threads {
            self.make_threads()?;
        }
        if let Some(open_late) = open_late {
            open_late()?;
        }
        if has_errands {
            self.run_errands(&sources)?;
        }
        let sent = sent.map_or_else(|| table::send(checkpoint, files), Ok)?;
        self.place(&open, &sent, has_threads)?;
        stage.ends("put descriptors and threads in place");
        let threads = self.seize()?;
        self.set_own()?;
        stage.ends("set what each thread has of its own");
        for (_, task) in self.tasks().filter(|(_, task)| !task.is_zombie()) {
            if let Some(score) = task.tc().oom_score_adj {
                let path = format!("/proc/{}/oom_score_adj", task.pid);
                if let Err(error) = std::fs::write(&path, score.to_string()) {
                    log::warn!("pid {}: oom_score_adj stays as it is: {error}", task.pid);
                }
            }
        }
        self.repeat()?;
        self.start_timers()?;
        arm()?;
        self.become_tasks(threads)?;
        self.lazy.map_or(Ok(()), Server::tell_that_it_runs)?;
        stage.ends("let the tasks go");
        created.is_kept = true;
        Ok(RestoreStats { forking_us, ..self.counts.get() })
    }

    /// Makes the AIO contexts: where the kernel puts a ring is known only afterwards.
    fn aio_contexts(&self) -> Result<(), Failure> {
        for (at, task) in self.tasks() {
            let run = |list: List| {
                let run = self.area.start(self.slots[at][0], list).map_err(tree_error)?;
                self.wait_all(vec![(task.pid, run)])
            };
            for ring in &task.mm.aios {
                let mut list = List::new();
                let context = vma::aio::make(ring, &mut TaskOps { list: &mut list, area: &self.area })?;
                run(list)?;
                let made = self.area.get(context, 8).try_into().map_or(0, u64::from_ne_bytes);
                let mut list = List::new();
                let ops = &mut TaskOps { list: &mut list, area: &self.area };
                vma::aio::place(ring, made, ops);
                let content = self.contents.bytes(task, ring.id..ring.id + u64::from(ring.ring_len));
                let events = vma::aio::completions(ring, &content)
                    .map_err(|why| Failure::corrupt(format!("pagemap-{}.img", task.pid), None, why))?;
                if !events.is_empty() {
                    vma::aio::fill(ring, &events, self.service.area, ops)?;
                }
                run(list)?;
            }
        }
        Ok(())
    }

    /// Waits for lists in the order given.
    fn wait_all(&self, runs: Vec<(i32, Run)>) -> Result<(), Failure> {
        runs.into_iter().try_for_each(|(pid, run)| self.wait(pid, run).map(drop))
    }

    /// Waits for a list; returns it with its results.
    fn wait(&self, pid: i32, run: Run) -> Result<Vec<u8>, Failure> {
        // Who touches memory that comes later waits for the server.
        let has_server = || self.lazy.map_or(Ok(()), Server::is_there);
        self.area.wait(run, || is_at_work(pid) && has_server().is_ok()).map_err(|failed| match failed {
            Some(failed) => {
                let why = failed.errno().on(Object::Task, failed.doing).of(pid);
                match failed.errno() {
                    Errno { code: libc::EPERM, .. } if failed.doing == TAKE_TERMINAL => why.help(
                        model::Remedy::Advice("it is that of another session, which has to give it up first"),
                    ),
                    Errno { call: "clone3", code: libc::EEXIST } => why.help(model::Remedy::Advice(
                        "the id is taken by a running process: restore in a fresh pid namespace",
                    )),
                    _ => why,
                }
            }
            None => has_server().err().unwrap_or_else(|| {
                let why = "the process ended, or was stopped by a fault";
                Failure::conflict(Object::Task, "build it", why).of(pid)
            }),
        })
    }

    fn clone_op(
        &self,
        pid: i32,
        flags: i32,
        exit_signal: i32,
        slot: Slot,
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        let set_tid = ops.bytes(&pid.to_ne_bytes())?;
        let args = CloneArgs {
            flags: flags as u64,
            exit_signal: exit_signal as u64,
            set_tid,
            set_tid_size: 1,
            ..CloneArgs::default()
        };
        let args = ops.bytes(&args.bytes())?;
        ops.list.call(libc::SYS_clone3, &[args.into(), CloneArgs::SIZE.into()], Judge::Spawn(slot.address()));
        Ok(())
    }

    fn clone_children(&self, at: usize, birth: Birth, ops: &mut TaskOps) -> Result<(), Failure> {
        ops.list.label("make its children");
        for child in self.children(at, birth) {
            let task = &self.checkpoint.tasks[child];
            let shares_files =
                !task.is_zombie() && task.ids.files_id == self.checkpoint.tasks[at].ids.files_id;
            let flags = if shares_files { libc::CLONE_FILES } else { 0 };
            self.clone_task(child, flags, ops)?;
        }
        Ok(())
    }

    fn clone_task(&self, at: usize, flags: i32, ops: &mut TaskOps) -> Result<(), Failure> {
        let task = &self.checkpoint.tasks[at];
        let signal = task.tc().exit_signal.filter(|signal| *signal <= 64);
        let signal = signal.map_or(libc::SIGCHLD, |signal| signal as i32);
        self.clone_op(task.pid, flags, signal, self.slots[at][0], ops)
    }

    /// Makes those who begin with the memory of this task.
    fn clone_heirs(&self, at: usize, ops: &mut TaskOps) -> Result<(), Failure> {
        self.clone_children(at, Birth::Sharing, ops)?;
        if self.plan.adopts(&self.checkpoint, at) {
            ops.list.label("become the parent of orphans");
            let zero = Arg::Value(0);
            let args = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into(), zero, zero, zero];
            ops.list.ok(libc::SYS_prctl, &args);
        }
        self.clone_stand_ins(at, true, ops)
    }

    /// Makes those in the session of `sid` whom its leader leaves behind.
    fn clone_orphans(&self, sid: i32, ops: &mut TaskOps) -> Result<(), Failure> {
        ops.list.label("make the orphans of its session");
        for (at, _) in self.tasks().filter(|(_, task)| task.sid == sid) {
            if self.plan.births[at] == Birth::Orphaned {
                self.clone_task(at, 0, ops)?;
            }
        }
        Ok(())
    }

    fn clone_stand_ins(&self, at: usize, of_sessions: bool, ops: &mut TaskOps) -> Result<(), Failure> {
        let all = self.plan.stand_ins.iter().zip(&self.stand_ins);
        for (stand_in, slot) in all.filter(|(one, _)| one.maker == at && one.is_of_session == of_sessions) {
            ops.list.label("make a stand-in for a leader");
            self.clone_op(stand_in.id, 0, 0, *slot, ops)?;
        }
        Ok(())
    }

    /// Returns the mappings of each task that are still writable though they must not be.
    fn make_processes(&self, sources: &memory::Sources) -> Result<Vec<HashSet<u64>>, Failure> {
        let mut lists = Vec::with_capacity(self.checkpoint.tasks.len());
        let mut fillings = HashMap::new();
        let mut open = vec![HashSet::new(); self.checkpoint.tasks.len()];
        for (at, task) in self.tasks() {
            let mut list = List::new();
            let ops = &mut TaskOps { list: &mut list, area: &self.area };
            if task.parent.is_none() {
                self.unmap_all(ops);
            }
            if !task.is_zombie() {
                self.clone_children(at, Birth::BeforeSession, ops)?;
            }
            if task.sid == task.pid {
                ops.list.label("lead a session").ok(libc::SYS_setsid, &[]);
                if let Some(terminal) = self.terminal(task.pid).filter(|_| !task.is_zombie()) {
                    ops.list.label(TAKE_TERMINAL);
                    self.ask_terminal(terminal, sys::tty::TAKE, 0.into(), ops);
                }
                if task.is_zombie() {
                    self.clone_orphans(task.sid, ops)?;
                }
            } else if task.pgid == task.pid {
                ops.list.label("lead a process group").ok(libc::SYS_setpgid, &[0.into(), 0.into()]);
            }
            if !task.is_zombie() {
                self.clone_stand_ins(at, false, ops)?;
                self.clone_children(at, Birth::Empty, ops)?;
                let found = self.plan.finds_memory_of(&self.checkpoint.tasks, at);
                let found = found.map(|found| (&self.checkpoint.tasks[found], &open[found]));
                let mut filling = memory::build(task, found, sources, ops)?;
                open[at] = std::mem::take(&mut filling.open);
                let counts = self.counts.get();
                let pages_compared = counts.pages_compared + filling.compared;
                self.counts.set(RestoreStats { pages_compared, ..counts });
                self.count(&[], filling.kept);
                if filling.mappings.is_empty() {
                    self.count(&filling.read, 0);
                    memory::read(task, &mut filling.read, sources, ops)?;
                    self.clone_heirs(at, ops)?;
                } else {
                    let flags = match self.comes_later(at) {
                        true => crate::lazy::FLAGS,
                        false => libc::O_CLOEXEC | sys::userfault::USER_MODE_ONLY,
                    };
                    fillings.insert(at, (ops.list.any(libc::SYS_userfaultfd, &[flags.into()]), filling));
                }
            }
            lists.push(list);
        }
        let mut runs = Vec::with_capacity(lists.len() + self.stand_ins.len());
        for (at, (list, slots)) in lists.into_iter().zip(&self.slots).enumerate() {
            let pid = self.checkpoint.tasks[at].pid;
            let run = self.area.start(slots[0], list).map_err(tree_error)?;
            runs.push((self.rank(at), Some(at), pid, run));
        }
        for (stand_in, slot) in self.plan.stand_ins.iter().zip(&self.stand_ins) {
            let list = self.lead(stand_in)?;
            let run = self.area.start(*slot, list).map_err(tree_error)?;
            runs.push((self.rank(stand_in.maker), None, stand_in.id, run));
        }
        // Each after whoever makes it.
        runs.sort_by_key(|(rank, ..)| *rank);
        for (_, at, pid, run) in runs {
            let executed = self.wait(pid, run)?;
            if let Some(at) = at
                && let Some((op, filling)) = fillings.remove(&at)
            {
                self.fill(at, List::result(&executed, op), filling, sources)?;
            }
        }
        Ok(open)
    }

    /// What the session has.
    fn terminal(&self, session: i32) -> Option<&Control> {
        self.open.terminals.iter().find(|terminal| terminal.session == session)
    }

    /// A request of a task to a terminal, of which it has no descriptor afterwards.
    fn ask_terminal(&self, terminal: &Control, request: u32, argument: Arg, ops: &mut TaskOps) {
        let fetched = self.reach().fetch(terminal.fd.as_raw_fd(), ops);
        ops.list.ok(libc::SYS_ioctl, &[Arg::Result(fetched), u64::from(request).into(), argument]);
        ops.list.ok(libc::SYS_close, &[Arg::Result(fetched)]);
    }

    /// Sets the foreground group of each terminal, when all groups are there. Whoever does it is deaf to SIGTTOU.
    fn foreground(&self) -> Result<(), Failure> {
        for terminal in self.open.terminals {
            let is_in = |task: &Task| task.sid == terminal.session && !task.is_zombie();
            let has_terminal = |task: &Task| is_in(task) && task.tc().has_no_terminal != Some(true);
            let is_there = self.tasks().any(|(_, task)| is_in(task) && task.pgid == terminal.group);
            let is_outside = self.plan.inherited_pgid == Some(terminal.group);
            let Some((at, task)) = self.tasks().find(|(_, task)| has_terminal(task)) else { continue };
            if !is_there || is_outside {
                continue;
            }
            let mut list = List::new();
            let ops = &mut TaskOps { list: &mut list, area: &self.area };
            ops.list.label("set the foreground group of its terminal");
            let group = ops.bytes(&terminal.group.to_ne_bytes())?;
            self.ask_terminal(terminal, sys::tty::SET_GROUP, group.into(), ops);
            let run = self.area.start(self.slots[at][0], list).map_err(tree_error)?;
            self.wait_all(vec![(task.pid, run)])?;
        }
        Ok(())
    }

    /// How many leaders of sessions had to be there before this task could be made.
    fn rank(&self, at: usize) -> usize {
        let own = usize::from(self.plan.births[at] == Birth::Orphaned);
        own + self.checkpoint.tasks[at].parent.map_or(0, |parent| self.rank(parent))
    }

    /// What a stand-in does to lead.
    fn lead(&self, stand_in: &StandIn) -> Result<List, Failure> {
        let mut list = List::new();
        let ops = &mut TaskOps { list: &mut list, area: &self.area };
        if stand_in.is_of_session {
            ops.list.label("lead a session").ok(libc::SYS_setsid, &[]);
            self.clone_orphans(stand_in.id, ops)?;
        } else {
            ops.list.label("lead a process group").ok(libc::SYS_setpgid, &[0.into(), 0.into()]);
        }
        Ok(list)
    }

    /// Does the memory of this task come when it is touched? Not where others begin with it.
    fn comes_later(&self, at: usize) -> bool {
        self.lazy.is_some() && !self.plan.has_heirs(&self.checkpoint, at)
    }

    /// Puts many pages into a process whose memory is mapped, and lets it go on. `userfault` is its
    /// descriptor, or the error why it has none; then its agent reads them all.
    fn fill(
        &self,
        at: usize,
        userfault: i64,
        mut filling: Filling,
        sources: &memory::Sources,
    ) -> Result<(), Failure> {
        let task = &self.checkpoint.tasks[at];
        let mut list = List::new();
        let ops = &mut TaskOps { list: &mut list, area: &self.area };
        let explain = |error: Errno| error.on(Object::Task, "put its pages in").of(task.pid);
        let all = &self.contents;
        let contents = |file| all.of(file);
        let progress = self.options.progress.clone();
        let done = |pages| progress.pages_done(pages);
        pages::put::write_runs(task.pid, &contents, &filling.huge, &done).map_err(explain)?;
        let written: u64 = filling.huge.iter().map(|run| run.len() / PAGE).sum();
        let counts = self.counts.get();
        self.counts.set(RestoreStats { pages_restored: counts.pages_restored + written, ..counts });
        let number = i32::try_from(userfault).ok().filter(|number| *number >= 0);
        let server = self.lazy.filter(|_| self.comes_later(at));
        if sources.is_lazy && (server.is_none() || number.is_none()) {
            filling.copy = filling.all(task).collect();
        }
        if let Some(number) = number {
            let take = |fd: OwnedFd| {
                let memory = Userfault::telling(fd)?;
                filling.mappings.iter().try_for_each(|range| memory.register(range.clone()))?;
                Ok(memory)
            };
            let fetch = || sys::process::pidfd_getfd(sys::process::pidfd_open(task.pid)?, number);
            let copy = || {
                let fd = sys::process::pidfd_getfd(sys::process::pidfd_open(task.pid)?, number)?;
                let memory = Userfault::new(fd)?;
                filling.mappings.iter().try_for_each(|range| memory.register(range.clone()))?;
                pages::put::copy_runs(&memory, &contents, &filling.copy, &done)
            };
            match server {
                Some(server) => {
                    server.hand_over(task.pid, fetch().and_then(take).map_err(explain)?)?;
                    self.options.progress.pages_done(filling.all(task).map(|run| run.len() / PAGE).sum());
                }
                None => {
                    copy().map_err(explain)?;
                    let copied: u64 = filling.copy.iter().map(|run| run.len() / PAGE).sum();
                    let counts = self.counts.get();
                    self.counts
                        .set(RestoreStats { pages_restored: counts.pages_restored + copied, ..counts });
                }
            }
            filling.copy.clear();
            ops.list.label("leave its memory to itself").ok(libc::SYS_close, &[number.into()]);
        } else if !filling.copy.iter().all(|run| self.contents.has(run)) {
            let error = Errno { call: "userfaultfd", code: -i32::try_from(userfault).unwrap_or(0) };
            return Err(error.on(Object::Task, "have its memory come later").of(task.pid));
        } else {
            filling.copy_nothing(task, ops);
        }
        self.count(&filling.read, 0);
        memory::read(task, &mut filling.read, sources, ops)?;
        self.clone_heirs(at, ops)?;
        let run = self.area.start(self.slots[at][0], list).map_err(tree_error)?;
        self.wait(task.pid, run).map(drop)
    }

    /// Leaves the first puppet deaf to signals, with no opinion about any, and without descriptors but the way
    /// back to us.
    ///
    /// When its list is done, it has also left the kernel's execve(2), which wakes us before all is mapped.
    fn close_inherited(&self) -> Result<(), Failure> {
        let mut list = List::new();
        let ops = &mut TaskOps { list: &mut list, area: &self.area };
        let all = ops.bytes(&EVERY_SIGNAL.to_ne_bytes())?;
        ops.list.label("empty the first process");
        ops.list
            .ok(libc::SYS_rt_sigprocmask, &[libc::SIG_SETMASK.into(), all.into(), 0.into(), SIGSET.into()]);
        signals::reset(ops)?;
        let (low, high) =
            (self.service.area.min(self.service.pidfd), self.service.area.max(self.service.pidfd));
        for (first, last) in [(0, low as u32 - 1), (low + 1, high as u32 - 1), (high + 1, u32::MAX)] {
            if first as u32 <= last {
                ops.list.ok(libc::SYS_close_range, &[first.into(), u64::from(last).into(), 0.into()]);
            }
        }
        let run = self.area.start(self.slots[0][0], list).map_err(tree_error)?;
        self.wait_all(vec![(self.checkpoint.tasks[0].pid, run)])
    }

    /// Leaves nothing in the address space of the first puppet but the agent.
    fn unmap_all(&self, ops: &mut TaskOps) {
        let pid = self.checkpoint.tasks[0].pid;
        ops.list.label("empty the address space");
        ops.list.ok(libc::SYS_munmap, &[(self.plan.hole.start + PAGE).into(), PAGE.into()]);
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        for map in maps.split(|byte| *byte == b'\n').filter_map(sys::proc::parse_vma_line) {
            let is_agent = map.start >= self.plan.hole.start && map.end <= self.plan.hole.end;
            if !is_agent && map.name != b"[vsyscall]" {
                ops.list.ok(libc::SYS_munmap, &[map.start.into(), (map.end - map.start).into()]);
            }
        }
    }

    fn clone_threads(&self, at: usize, ops: &mut TaskOps) -> Result<(), Failure> {
        ops.list.label("make its threads");
        let threads = self.checkpoint.tasks[at].tids.iter().zip(&self.slots[at]).skip(1);
        threads.into_iter().try_for_each(|(tid, slot)| self.clone_op(*tid, CLONE_THREAD_FLAGS, 0, *slot, ops))
    }

    fn make_threads(&self) -> Result<(), Failure> {
        let mut runs = Vec::new();
        for (at, task) in self.tasks().filter(|(_, task)| task.tids.len() > 1 && !task.is_zombie()) {
            let mut list = List::new();
            self.clone_threads(at, &mut TaskOps { list: &mut list, area: &self.area })?;
            runs.push((task.pid, self.area.start(self.slots[at][0], list).map_err(tree_error)?));
        }
        self.wait_all(runs)
    }

    /// Descriptors, groups, threads if there are none; and the final state of the memory, which nobody inherits
    /// any more.
    fn place(&self, open: &[HashSet<u64>], sent: &Couriers, has_threads: bool) -> Result<(), Failure> {
        let (mut runs, mut later) = (Vec::new(), Vec::new());
        let mut tables = HashSet::new();
        for (at, task) in self.tasks() {
            let mut list = List::new();
            let ops = &mut TaskOps { list: &mut list, area: &self.area };
            let is_outside = self.plan.inherited_pgid == Some(task.pgid);
            if task.pgid != task.pid && !is_outside {
                ops.list.label("join its process group").ok(libc::SYS_setpgid, &[0.into(), task.pgid.into()]);
            }
            let mut is_owner = true;
            if !task.is_zombie() {
                ops.list.label("set the state of the memory");
                vma::advise(&task.mm.vmas, ops);
                for entry in &task.mm.vmas {
                    vma::finish(entry, open[at].contains(&entry.start), ops)?;
                }
                let exe = self.open.files[task.mm.exe_file_id].as_raw_fd();
                let number = self.service.exe + at as i32;
                ops.list.label("set the executable");
                self.reach().fetch_to(exe, number, ops);
                vma::mm::restore(&task.mm, number, ops)?;
                vma::mm::restore_rules(&task.mm, ops);
                ops.list.ok(libc::SYS_close, &[number.into()]);
                self.working_directory(task, ops)?;
                if let Some(terminal) =
                    self.terminal(task.sid).filter(|_| task.tc().has_no_terminal == Some(true))
                {
                    ops.list.label("leave the terminal of its session");
                    self.ask_terminal(terminal, sys::tty::LEAVE, 0.into(), ops);
                }
                is_owner = tables.insert(task.ids.files_id);
                if is_owner {
                    self.descriptors(at, task, sent, ops)?;
                }
                if !has_threads {
                    self.clone_threads(at, ops)?;
                }
            }
            match is_owner {
                true => runs.push((task.pid, self.area.start(self.slots[at][0], list).map_err(tree_error)?)),
                false => later.push((at, task, list)),
            }
        }
        self.wait_all(runs)?;
        // Tasks that share a table must not fetch at the same time as its owner fills it: they come after.
        for (at, task, list) in later {
            self.wait_all(vec![(task.pid, self.area.start(self.slots[at][0], list).map_err(tree_error)?)])?;
        }
        self.foreground()?;
        self.end_zombies()?;
        self.close_service()
    }

    fn working_directory(&self, task: &Task, ops: &mut TaskOps) -> Result<(), Failure> {
        ops.list.label("set the root and working directory");
        let is_root = |id: u32| {
            let entry = self.checkpoint.files.entry::<kinds::fd::regular::Regular>(id);
            entry.is_some_and(|entry| &*entry.name == b"/")
        };
        let enter = |id: u32, ops: &mut TaskOps, is_new_root: bool| -> Result<(), Failure> {
            let fetched = self.reach().fetch(self.open.files[id].as_raw_fd(), ops);
            ops.list.ok(libc::SYS_fchdir, &[Arg::Result(fetched)]);
            if is_new_root {
                let dot = ops.bytes(b".\0")?;
                ops.list.ok(libc::SYS_chroot, &[dot.into()]);
            }
            ops.list.ok(libc::SYS_close, &[Arg::Result(fetched)]);
            Ok(())
        };
        if !is_root(task.fs.root_id) {
            enter(task.fs.root_id, ops, true)?;
        }
        enter(task.fs.cwd_id, ops, false)?;
        if let Some(umask) = task.fs.umask {
            ops.list.ok(libc::SYS_umask, &[u64::from(umask).into()]);
        }
        Ok(())
    }

    /// Zombies and stand-ins end; their parents are still deaf to it.
    fn end_zombies(&self) -> Result<(), Failure> {
        for (at, task) in self.tasks().filter(|(_, task)| task.is_zombie()) {
            let mut list = List::new();
            let ops = &mut TaskOps { list: &mut list, area: &self.area };
            self.set_name(&task.tc().comm, ops)?;
            let status = task.tc().exit_code as i32;
            match status & 0x7f {
                0 => ops.list.ok(libc::SYS_exit_group, &[(status >> 8 & 0xff).into()]),
                signal => {
                    let none = ops.bytes(&[0; 8])?;
                    let limit = ops.bytes(&[0; 16])?;
                    // No core file for a death that is only acted.
                    ops.list.ok(libc::SYS_prlimit64, &[0.into(), 4.into(), limit.into(), 0.into()]);
                    ops.list.ok(libc::SYS_kill, &[task.pid.into(), signal.into()]);
                    ops.list.ok(
                        libc::SYS_rt_sigprocmask,
                        &[libc::SIG_SETMASK.into(), none.into(), 0.into(), SIGSET.into()],
                    )
                }
            };
            let _ = self.area.start(self.slots[at][0], list).map_err(tree_error)?;
            self.until_ended(task.pid)?;
        }
        let mut exit = List::new();
        exit.ok(libc::SYS_exit_group, &[0.into()]);
        for (StandIn { id: pgid, maker, .. }, slot) in self.plan.stand_ins.iter().zip(&self.stand_ins) {
            let _ = self.area.start(*slot, exit.clone()).map_err(tree_error)?;
            self.until_ended(*pgid)?;
            let mut reap = List::new();
            let args = [(*pgid).into(), 0.into(), libc::__WALL.into(), 0.into()];
            reap.label("let a stand-in go").call(libc::SYS_wait4, &args, Judge::Equal((*pgid).into()));
            let pid = self.checkpoint.tasks[*maker].pid;
            self.wait_all(vec![(pid, self.area.start(self.slots[*maker][0], reap).map_err(tree_error)?)])?;
        }
        Ok(())
    }

    fn until_ended(&self, pid: i32) -> Result<(), Failure> {
        let path = format!("/proc/{pid}/stat");
        loop {
            let stat = std::fs::read(&path).ok().and_then(|text| sys::proc::parse_stat(&text));
            match stat {
                Some(stat) if stat.state == b'Z' => return Ok(()),
                Some(_) => std::thread::yield_now(),
                None => return Err(Failure::conflict(Object::Task, "end it", "it is gone").of(pid)),
            }
        }
    }

    fn close_service(&self) -> Result<(), Failure> {
        let mut list = List::new();
        // Tasks that share a table close them once.
        for fd in [self.service.area, self.service.pidfd] {
            list.label("close the way back").call(libc::SYS_close, &[fd.into()], Judge::OkOr(libc::EBADF));
        }
        let runs = self
            .tasks()
            .filter(|(_, task)| !task.is_zombie())
            .map(|(at, task)| {
                Ok((task.pid, self.area.start(self.slots[at][0], list.clone()).map_err(tree_error)?))
            })
            .collect::<Result<_, Failure>>()?;
        self.wait_all(runs)
    }

    /// Attaches to every thread: what they do from here on is not judged by filters of their own.
    fn seize(&self) -> Result<Crew<Held>, Failure> {
        let mut crew: Crew<Held> = Crew::default();
        let threads: Vec<Thread> = self
            .tasks()
            .filter(|(_, task)| !task.is_zombie())
            .flat_map(|(at, task)| (0..task.tids.len()).map(move |nth| Thread { task: at, nth }))
            .collect();
        // A thread more of ours is worth it for some more of theirs.
        let members = crew::size().min(threads.len().div_ceil(THREADS_OF_ONE));
        let share = threads.len().div_ceil(members.max(1)).max(1);
        let shares = threads.chunks(share).map(<[Thread]>::to_vec).enumerate();
        let shares = shares.map(|(member, threads)| (member, (self.checkpoint.clone(), threads)));
        let shares: Vec<_> = shares.collect();
        crew.each(shares, |held, (checkpoint, threads)| held.seize(&checkpoint, threads))
            .into_iter()
            .collect::<Result<(), Failure>>()?;
        Ok(crew)
    }

    /// Stops every thread in the agent, takes the agent away, gives it its own registers, lets it go. Each
    /// step is done for all before the next: an agent that goes takes the code of its whole process along.
    fn become_tasks(&self, mut crew: Crew<Held>) -> Result<(), Failure> {
        let hole = self.plan.hole.clone();
        let is_left_stopped = self.options.leave_stopped;
        let mut step = |work: fn(&mut Held, &Checkpoint, &Range<u64>) -> Result<(), Failure>| {
            let members: Vec<_> =
                (0..crew.len()).map(|member| (member, (self.checkpoint.clone(), hole.clone()))).collect();
            crew.each(members, move |held, (checkpoint, hole)| work(held, &checkpoint, &hole))
                .into_iter()
                .collect::<Result<(), Failure>>()
        };
        step(Held::stop)?;
        step(Held::take_agent_away)?;
        step(Held::set_registers)?;
        for (_, task) in self.tasks().filter(|(_, task)| !task.is_zombie()) {
            if task.tc().task_state == 3 || is_left_stopped {
                let signal = task.tc().stop_signo.unwrap_or(libc::SIGSTOP as u32) as i32;
                let _ = sys::process::kill(task.pid, signal);
            }
        }
        step(Held::let_go)
    }
}
