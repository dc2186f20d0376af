//! Copies of processes, made by fork(2) while they are frozen: the originals run on at once, and memory is
//! read from the copies at leisure.
//!
//! A copy is a child of its original that never runs, stopped by us from its first moment and killed with
//! us. What it lacks is found out while the original is still frozen: mappings that are not inherited, and
//! those that are inherited empty, whose pages are put into it. After its end the original is stopped once
//! more, for one wait4(2): nobody else knows of this child.

use crate::freeze::Tree;
use crate::left::{self, Left};
use crate::observe::Look;
use crate::observe::{self, find_instruction, read_maps};
use crate::past::bytes_to_save;
use crate::survey::Reading;
use crate::tracer::{Tracer, let_go};
use agent::hands::Hands;
use agent::inject::{self, Context, Copied, Door, Host};
use agent::{List, Watch, crew};
use image::VmaEntry;
use image::pagemap::Run;
use kinds::vma;
use model::{Errno, Failure, Object, Options};
use pages::select::{Area, Question, select};
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};
use sys::pagemap::{PRESENT, Query, SWAPPED, has};
use sys::proc::Vma;
use sys::ptrace::{self, Stop, Stopped};

/// Options of every thread that a dump traces.
pub fn options() -> u64 {
    sys::seccomp::suspension() | ptrace::SYSCALL_GOOD
}

/// How long an original may take to stop for the end of its copy.
const PATIENCE: Duration = Duration::from_secs(5);

/// A process, and its copy.
#[derive(Debug, Clone)]
pub struct Copy {
    pub of: i32,
    pub pid: i32,
    /// Where the agent lies in the copy, which the original does not have.
    pub agent: Range<u64>,
}

/// A copy, as its tracer holds it.
#[derive(Debug)]
pub struct Held {
    pub left: Left,
    /// Where the original has a `syscall`.
    instruction: u64,
    /// Taken when it is let run.
    copied: Option<Copied>,
    /// Threads that it made then.
    threads: Vec<i32>,
}

impl Held {
    /// Lets it run as hands.
    ///
    /// # Errors
    /// What stands in the way; it can still be read.
    pub fn hands(&mut self, count: usize) -> Result<Hands, Failure> {
        let explain = |error: Errno| error.on(Object::Task, "have its pages moved").of(self.left.of);
        let copied =
            self.copied.take().ok_or(Errno { call: "ptrace", code: libc::ESRCH }).map_err(explain)?;
        Hands::make(copied, count, options(), &mut self.threads).map_err(explain)
    }
}

/// All copies of a tree. When this is dropped, they have ended and their originals run: these let them go.
#[derive(Debug, Default)]
pub struct Copies(Vec<Copy>);

impl Copies {
    /// The copy of a process.
    pub fn of(&self, pid: i32) -> Option<&Copy> {
        self.0.iter().find(|copy| copy.of == pid)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in self.0.drain(..) {
            match take_away(&Left { of: copy.of, pid: copy.pid, shared: None }) {
                Ok(()) => left::forget(copy.pid),
                Err(failure) => {
                    log::warn!("a copy of the process, {}, stays as a zombie: {failure}", copy.pid);
                }
            }
        }
    }
}

/// Is a tree to run on while its memory is saved? Not when scripts follow the steps, unless it is asked for:
/// they may rely on a tree that stands still until the end.
pub fn are_wanted(options: &Options) -> bool {
    options.leave_running
        && !options.lazy_pages
        && options.copy_on_write.unwrap_or(options.action_scripts.is_empty())
}

/// Processes for which a copy pays whatever their size: what is written of them is written meanwhile.
const FEW: usize = 16;
/// Bytes of a process that take as long to save as a copy of it to make.
const WORTH_IT: u64 = 1 << 20;
/// Bytes that are read before a copy is made.
pub const SMALL: u64 = 512 << 10;

/// What becomes of a tree that is to run on while its memory is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It stands still all the same.
    StandsStill,
    /// What is to be saved is so little that it is read first.
    PutAside,
    /// What it changes is noted, and saved by the next run.
    RunsOn,
    Copied,
}

/// Bytes that a process has of its own; none when it is gone.
pub fn private_bytes(pid: i32) -> Option<u64> {
    sys::proc::parse_private(&sys::fd::text(&format!("/proc/{pid}/statm")).ok()?)
}

/// By which way does the tree stand still for the shortest time? Copies pay, but not of many small processes.
pub fn way(options: &Options, tree: &Tree) -> Way {
    if !are_wanted(options) {
        return Way::StandsStill;
    }
    if options.copy_on_write == Some(true) {
        return Way::Copied;
    }
    let count = tree.processes.len();
    let total = tree.processes.iter().filter_map(|process| private_bytes(process.pid)).sum::<u64>();
    match count {
        1 if total <= SMALL => Way::PutAside,
        _ if count <= FEW || total > count as u64 * WORTH_IT => Way::Copied,
        _ => Way::StandsStill,
    }
}

/// Is so little to be saved that it is read first? `known` are the pages that need not be.
pub fn is_little<'k>(looks: &[Seen], limit: u64, known: impl Fn(i32) -> Option<&'k Vec<Run>>) -> bool {
    let bytes = |(pid, look): &Seen| bytes_to_save(&look.memory.pages.runs, known(*pid));
    looks.iter().map(bytes).sum::<u64>() <= limit
}

/// Makes copies, if there is room for them, and all can be copied. Returns what became of the tree.
pub fn make(tree: &mut Tree, looks: &[Seen]) -> Way {
    let wanted: u64 = looks.iter().map(|(_, look)| look.private_bytes).sum();
    let has_room = sys::process::available_memory().is_none_or(|available| available >= wanted);
    if !has_room {
        log::info!("the tree stands still while it is saved: a copy may need {wanted} bytes");
    }
    let is_made = has_room && !looks.iter().any(|(_, look)| has_huge_pages(look)) && copy(tree, looks);
    if is_made { Way::Copied } else { Way::StandsStill }
}

/// A living process of a frozen tree.
pub type Seen<'l> = (i32, &'l Look);

/// Where huge pages are short, a copy loses those that its original writes to.
fn has_huge_pages(look: &Look) -> bool {
    let found = look.memory.maps.iter().any(|(map, _)| vma::hugetlb::is_private(map));
    if found {
        log::info!("the tree stands still while it is saved: it has huge pages (hugetlb) of its own");
    }
    found
}

/// Copies every living process of a frozen tree, whole. Returns whether all were copied; what was made of copies is
/// gone if not.
fn copy(tree: &mut Tree, looks: &[Seen]) -> bool {
    match copy_all(tree, looks) {
        Ok(true) => return true,
        Ok(false) => log::info!("the tree stands still while it is saved: it has memory that is not copied"),
        Err(failure) => log::info!("the tree stands still while it is saved: {failure}"),
    }
    let members = 0..tree.crew.len();
    tree.crew.each(members.map(|member| (member, ())), |tracer, ()| end(tracer));
    false
}

fn copy_all(tree: &mut Tree, looks: &[Seen]) -> Result<bool, Failure> {
    let holders = looks.iter().filter_map(|(pid, look)| Some((tree.holder(*pid)?, (*pid, look.instruction))));
    let tasks: Vec<_> = holders.collect();
    let copied = tree.crew.each(tasks, |tracer, (pid, instruction)| enter(tracer, pid, instruction));
    let mut made = Ok(());
    for copied in copied {
        match copied {
            Ok(copy) => tree.copies.0.push(copy),
            Err(failure) => made = Err(failure),
        }
    }
    made?;
    for (pid, look) in looks {
        if let Some(copy) = tree.copies.of(*pid)
            && !complete(copy, &look.memory.maps)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Has frozen processes make a userfaultfd each, which they do not keep; `doors` are their pids and where they have a `syscall`
/// instruction.
pub fn userfaults(tree: &mut Tree, doors: Vec<(i32, u64)>) -> HashMap<i32, Result<OwnedFd, Failure>> {
    let tasks: Vec<_> = doors.into_iter().filter_map(|door| Some((tree.holder(door.0)?, door))).collect();
    let pids: Vec<i32> = tasks.iter().map(|(_, (pid, _))| *pid).collect();
    let made = tree.crew.each(tasks, |tracer, (pid, instruction)| {
        tracer.with_agent(pid, instruction, |host, thread, context| userfault(host, pid, thread, context))?
    });
    pids.into_iter().zip(made).collect()
}

/// What the copy of a process tells of its memory, and of its pages, if that is asked.
pub fn read(copies: &Copies, pid: i32, question: Option<Question>) -> Result<Reading, Failure> {
    let none = || Failure::conflict(Object::Task, "read its memory", "it has no copy");
    let copy = copies.of(pid).ok_or_else(none)?;
    let mut memory = observe::read_memory(copy.pid, question)?;
    memory.maps.retain(|(map, _)| !copy.agent.contains(&map.start));
    Ok(Reading { from: copy.pid, memory })
}

fn enter(tracer: &mut Tracer, pid: i32, instruction: u64) -> Result<Copy, Failure> {
    let copied = tracer
        .with_agent(pid, instruction, |host, thread, context| host.copy(thread, context, options(), 0))??;
    let copy = Copy { of: pid, pid: copied.stopped.tid(), agent: copied.area.clone() };
    // When memory is short, it is the copy that has to go.
    if let Err(error) = std::fs::write(format!("/proc/{}/oom_score_adj", copy.pid), "1000") {
        log::debug!("the copy of {pid} is as dear to the kernel as the process: {error}");
    }
    hold(tracer, pid, instruction, copied, None);
    Ok(copy)
}

/// Has a frozen process make another one with the same memory, and descriptors of its own. It is to end before anything of the
/// first is let go, for the agent stays until then.
///
/// # Errors
/// Those of clone(2) among others.
pub fn accompany(tracer: &mut Tracer, pid: i32, instruction: u64) -> Result<&mut Held, Failure> {
    let copied = tracer.with_leader(pid, |thread, context| {
        let watch = Watch::new().map_err(|error| error.on(Object::Tree, "prepare operations"))?;
        let door = Door { pid, thread, context, instruction };
        let (host, thread) = Host::enter_all(vec![door], &Rc::new(watch)).remove(0)?;
        let (thread, copied) = host.copy(thread, context, options(), libc::CLONE_VM)?;
        match copied {
            Ok(copied) => Ok((thread, Ok(copied))),
            Err(failure) => Ok((Host::leave_all(vec![(host, thread, context)]).remove(0)?, Err(failure))),
        }
    })?;
    let shared = Some(copied.area.clone());
    Ok(hold(tracer, pid, instruction, copied, shared))
}

fn hold(
    tracer: &mut Tracer,
    of: i32,
    instruction: u64,
    copied: Copied,
    shared: Option<Range<u64>>,
) -> &mut Held {
    let left = Left { of, pid: copied.stopped.tid(), shared };
    left::note(&left);
    tracer.copies.push(Held { left, instruction, copied: Some(copied), threads: Vec::new() });
    tracer.copies.last_mut().expect("one was just pushed")
}

fn userfault(
    host: &Host,
    pid: i32,
    thread: Stopped,
    context: &Context,
) -> Result<(Stopped, Result<OwnedFd, Failure>), Failure> {
    const DOING: &str = "make a userfaultfd in it";
    let explain = |error: Errno| error.on(Object::Task, DOING).of(pid);
    let mut list = List::new();
    let flags = libc::O_CLOEXEC | sys::userfault::USER_MODE_ONLY;
    let made = list.label(DOING).ok(libc::SYS_userfaultfd, &[flags.into()]);
    let (thread, done) = host.run(thread, context, list)?;
    let number = match done {
        Ok(ops) => List::result(&ops, made) as i32,
        Err(failed) => return Ok((thread, Err(explain(failed.errno())))),
    };
    let fetched = sys::process::pidfd_open(pid).and_then(|pidfd| sys::process::pidfd_getfd(&pidfd, number));
    let mut list = List::new();
    list.label(DOING).ok(libc::SYS_close, &[number.into()]);
    let (thread, closed) = host.run(thread, context, list)?;
    closed.map_err(|failed| explain(failed.errno()))?;
    Ok((thread, fetched.map_err(explain)))
}

/// Ends the copies that a tracer holds, and waits for their ends; so do originals that it still holds.
pub fn end(tracer: &mut Tracer) {
    let ended = std::mem::take(&mut tracer.copies);
    for held in &ended {
        let _ = sys::process::kill(held.left.pid, libc::SIGKILL);
    }
    if ended.len() < crew::size() {
        let alone = ended.iter().filter(|held| held.left.shared.is_none());
        sys::process::help_to_end(alone.map(|held| held.left.pid));
    }
    for held in ended {
        // The end of a leader is told when that of all its threads was.
        let Left { of, pid, .. } = held.left;
        for tid in held.threads.iter().copied().chain([pid]) {
            while let Ok(Some(status)) = sys::process::wait(tid, true)
                && !(libc::WIFEXITED(status) || libc::WIFSIGNALED(status))
            {}
        }
        if !tracer.holds(of) {
            continue;
        }
        let cleared = tracer.with_leader(of, |thread, context| {
            clear(&held.left, Door { pid: of, thread, context, instruction: held.instruction })
        });
        match cleared {
            Ok(()) => left::forget(pid),
            Err(failure) => log::warn!("the process has something left of its copy, {pid}: {failure}"),
        }
    }
}

/// Takes from a stopped original what it has of its copy, which has ended.
fn clear(left: &Left, door: Door) -> Result<(Stopped, Result<(), Failure>), Failure> {
    let Door { pid, context, instruction, .. } = door;
    let (thread, waited) = wait_for(left.pid, door)?;
    let Some(agent) = &left.shared else { return Ok((thread, waited)) };
    const DOING: &str = "unmap the agent";
    let args = [agent.start, agent.end - agent.start];
    let door = Door { pid, thread, context, instruction };
    let (thread, result) = inject::call(door, libc::SYS_munmap, &args, DOING)?;
    let explain = || Errno { call: "munmap", code: -result as i32 }.on(Object::Task, DOING).of(pid);
    Ok((thread, waited.and(if result == 0 { Ok(()) } else { Err(explain()) })))
}

/// Has a stopped thread wait for a copy of its process that has ended.
fn wait_for(copy: i32, door: Door) -> Result<(Stopped, Result<(), Failure>), Failure> {
    const DOING: &str = "have it wait for its copy";
    let pid = door.pid;
    let args = [copy as u64, 0, (libc::__WALL | libc::WNOHANG) as u64, 0];
    let (thread, result) = inject::call(door, libc::SYS_wait4, &args, DOING)?;
    // The program itself may have waited for whatever child there is.
    let done = match result {
        result if result == i64::from(copy) || result == -i64::from(libc::ECHILD) => Ok(()),
        result => Err(Errno { call: "wait4", code: -result.min(0) as i32 }.on(Object::Task, DOING).of(pid)),
    };
    Ok((thread, done))
}

/// Stops an original for the moment that it takes to take from it what it has of its copy, which has ended.
///
/// # Errors
/// When it does not stop, or cannot be entered.
pub fn take_away(left: &Left) -> Result<(), Failure> {
    let pid = left.of;
    const DOING: &str = "have it wait for its copy";
    let explain = |error: Errno| error.on(Object::Task, DOING).of(pid);
    let running = match ptrace::seize(pid, options()) {
        Ok(running) => running,
        // Its children went to another.
        Err(error) if error.code == libc::ESRCH => return Ok(()),
        Err(error) => return Err(explain(error)),
    };
    let _ = running.interrupt();
    let thread = match running.halt_by(Instant::now() + PATIENCE).map_err(explain)? {
        Some(Stop::Trap(thread) | Stop::Group(thread, _)) => thread,
        Some(_) => return Ok(()),
        None => return Err(Failure::conflict(Object::Task, DOING, "does not stop").of(pid)),
    };
    let context = match Context::read(&thread) {
        Ok(context) => context,
        Err(error) => return thread.detach().and(Err(error)).map_err(explain),
    };
    // It may have become another program since.
    let found = read_maps(pid).and_then(|maps| Ok((find_instruction(pid, &maps)?, maps)));
    let (instruction, maps) = match found {
        Ok(found) => found,
        Err(failure) => return let_go(thread, &context).map_err(explain).and(Err(failure)),
    };
    let is_there = |agent: &Range<u64>| maps.iter().any(|(map, _)| map.start == agent.start && map.is_shared);
    let left = Left { shared: left.shared.clone().filter(is_there), ..left.clone() };
    let (thread, done) = clear(&left, Door { pid, thread, context: &context, instruction })?;
    let_go(thread, &context).map_err(explain)?;
    done
}

/// Makes the copy of a frozen process whole: puts into it the pages of mappings that are inherited empty.
/// `maps` are those of the original. False when mappings are missing.
///
/// # Errors
/// When the two cannot be compared.
fn complete(copy: &Copy, maps: &[(Vma, VmaEntry)]) -> Result<bool, Failure> {
    if joined(maps) != joined(&maps_of(copy)?) {
        return Ok(false);
    }
    let explain = |error: Errno| error.on(Object::Task, "compare it with its copy").of(copy.of);
    let open = |pid: i32| {
        File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|error| explain(sys::memory::io_errno("open", &error)))
    };
    let (original, copied) = (open(copy.of)?, open(copy.pid)?);
    // Only anonymous memory is wiped on fork(2).
    for (map, entry) in maps {
        if map.inode != 0 || map.is_shared || vma::is_special(entry) {
            continue;
        }
        let range = map.start..map.end;
        match has(&original, range.clone(), THERE) {
            Ok(false) => continue,
            Ok(true) if has(&copied, range.clone(), THERE).map_err(explain)? => continue,
            Ok(true) => {}
            // Before Linux 6.7 this takes as long as reading every page.
            Err(error) if error.code == libc::ENOTTY => return Ok(false),
            Err(error) => return Err(explain(error)),
        }
        let area = Area { range, is_readable: true, is_whole: false, has_file: false, is_watched: false };
        let wiped = select(&original, &[area], Question::WhatIsThere).map_err(explain)?;
        log::debug!("pid {}: {:#x}-{:#x} is wiped in its copy", copy.of, map.start, map.end);
        transfer(copy, wiped.runs.iter().map(|run| run.0.clone())).map_err(explain)?;
    }
    Ok(true)
}

/// The mappings that a copy has in common with its original.
fn maps_of(copy: &Copy) -> Result<Vec<(Vma, VmaEntry)>, Failure> {
    let mut maps = read_maps(copy.pid)?;
    maps.retain(|(map, _)| !copy.agent.contains(&map.start));
    Ok(maps)
}

/// A range, its offset in its file, and protection, whether it is shared, and the file's inode.
type Mapped = (Range<u64>, u64, (u32, bool, u64));

/// What is mapped where. Neighbours that are alike are one, for the kernel may join them when their writes are noted.
fn joined(maps: &[(Vma, VmaEntry)]) -> Vec<Mapped> {
    let mut all: Vec<Mapped> = Vec::with_capacity(maps.len());
    for (map, _) in maps {
        let what = (map.prot, map.is_shared, map.inode);
        match all.last_mut() {
            Some((range, offset, same))
                if range.end == map.start
                    && *same == what
                    && (map.inode == 0 || *offset + (range.end - range.start) == map.offset) =>
            {
                range.end = map.end;
            }
            _ => all.push((map.start..map.end, map.offset, what)),
        }
    }
    all
}

const THERE: Query = Query { inverted: 0, all: 0, any: PRESENT | SWAPPED, report: 0 };

fn transfer(copy: &Copy, runs: impl Iterator<Item = Range<u64>>) -> Result<(), Errno> {
    let open = |pid: i32| {
        File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|error| sys::memory::io_errno("open", &error))
    };
    // Not process_vm_readv(2): the pages may be of a kind that the process itself may not read.
    let (from, to) = (open(copy.of)?, open(copy.pid)?);
    let mut buffer = vec![0u8; 1 << 16];
    for run in runs {
        for at in run.clone().step_by(buffer.len()) {
            let part = &mut buffer[..(run.end - at).min(1 << 16) as usize];
            from.read_exact_at(part, at).map_err(|error| sys::memory::io_errno("read", &error))?;
            to.write_all_at(part, at).map_err(|error| sys::memory::io_errno("write", &error))?;
        }
    }
    Ok(())
}
