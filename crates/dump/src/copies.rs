//! Copies of processes, made by fork(2) while they are frozen: the originals run on at once, and memory is
//! read from the copies at leisure.
//!
//! A copy is a child of its original that never runs, stopped by us from its first moment and killed with
//! us. What it lacks is found out while the original is still frozen: mappings that are not inherited, and
//! those that are inherited empty, whose pages are put into it. After its end the original is stopped once
//! more, for one wait4(2): nobody else knows of this child.

use crate::freeze::Tree;
use crate::observe::{self, find_instruction, read_maps};
use crate::survey::{Reading, Survey};
use crate::tracer::Tracer;
use agent::inject::{self, Context, Door, Host};
use agent::{Watch, crew::Crew};
use image::VmaEntry;
use kinds::vma;
use model::{Errno, Failure, Object, Options};
use pages::select::{Area, select};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};
use sys::pagemap::{PRESENT, Query, SWAPPED, has};
use sys::proc::Vma;
use sys::ptrace::{self, Stop, Stopped};

/// Options of every thread that a dump traces.
pub const OPTIONS: u64 = ptrace::SUSPEND_SECCOMP | ptrace::SYSCALL_GOOD;
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

/// All copies of a tree. When this is dropped, they have ended and their originals run: these let them go.
#[derive(Debug, Default)]
pub struct Copies(Vec<Copy>);

impl Copies {
    /// The copy of a process.
    pub fn of(&self, pid: i32) -> Option<&Copy> {
        self.0.iter().find(|copy| copy.of == pid)
    }

    /// Copies processes: each named with the member of the crew that holds its leader, and where it has a
    /// `syscall`.
    ///
    /// # Errors
    /// When one of them could not be copied, for lack of memory or of process ids.
    pub fn make(&mut self, crew: &mut Crew<Tracer>, tasks: Vec<(usize, (i32, u64))>) -> Result<(), Failure> {
        let made = crew.each(tasks, |tracer, (pid, instruction)| copy(tracer, pid, instruction));
        let mut failed = Ok(());
        for made in made {
            match made {
                Ok(copy) => self.0.push(copy),
                Err(failure) => failed = Err(failure),
            }
        }
        failed
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for copy in self.0.drain(..) {
            if let Err(failure) = reap(&copy) {
                log::warn!("a copy of the process, {}, stays as a zombie: {failure}", copy.pid);
            }
        }
    }
}

/// Is a tree to run on while its memory is saved? Not when scripts follow the steps, unless it is asked for:
/// they may rely on a tree that stands still until the end.
pub fn are_wanted(options: &Options) -> bool {
    options.leave_running && options.copy_on_write.unwrap_or(options.action_scripts.is_empty())
}

/// Copies every living process of a frozen tree, whole. False when that cannot be; what was made is gone then,
/// or goes with the tree.
pub fn make(tree: &mut Tree, survey: &Survey) -> bool {
    let looks: Vec<_> = survey.looks().collect();
    let wanted: u64 = looks.iter().map(|(_, look)| look.private_bytes).sum();
    if sys::process::available_memory().is_some_and(|available| available < wanted) {
        log::info!("the tree stands still while it is saved: a copy may need {wanted} bytes");
        return false;
    }
    let leader = |pid: i32| {
        let process = tree.processes.iter().find(|process| process.pid == pid)?;
        let members = &process.members;
        Some(if members.len() > 1 { pid as usize % members.len() } else { *members.first()? })
    };
    let tasks = looks.iter().filter_map(|(pid, look)| Some((leader(*pid)?, (*pid, look.instruction))));
    let tasks: Vec<_> = tasks.collect();
    let made = tree.copies.make(&mut tree.crew, tasks).and_then(|()| {
        for (pid, look) in &looks {
            let copy = tree.copies.of(*pid);
            let is_whole = copy.map(|copy| complete(copy, &look.memory.maps)).transpose()?;
            if is_whole != Some(true) {
                return Ok(false);
            }
        }
        Ok(true)
    });
    match made {
        Ok(true) => return true,
        Ok(false) => log::info!("the tree stands still while it is saved: it has memory that is not copied"),
        Err(failure) => log::info!("the tree stands still while it is saved: {failure}"),
    }
    let members = 0..tree.crew.len();
    tree.crew.each(members.map(|member| (member, ())), |tracer, ()| end(&mut tracer.copies));
    false
}

/// What the copy of a process tells of its memory.
pub fn read(copies: &Copies, pid: i32) -> Result<Reading, Failure> {
    let none = || Failure::conflict(Object::Task, "read its memory", "it has no copy");
    let copy = copies.of(pid).ok_or_else(none)?;
    let mut memory = observe::read_memory(copy.pid)?;
    memory.maps.retain(|(map, _)| map.start != copy.agent.start);
    Ok(Reading { from: copy.pid, memory })
}

fn copy(tracer: &mut Tracer, pid: i32, instruction: u64) -> Result<Copy, Failure> {
    let mut part = tracer.take(pid);
    let leader = part.threads.iter_mut().find(|thread| thread.tid == pid);
    let result = leader
        .ok_or_else(|| Failure::conflict(Object::Task, "copy it", "its leader is not held").of(pid))
        .and_then(|leader| {
            let watch = Watch::new().map_err(|error| error.on(Object::Tree, "prepare operations"))?;
            let thread = leader.stopped.take().expect("a frozen thread is stopped");
            let context = &leader.context;
            let door = Door { pid, thread, context, instruction };
            let (host, thread) = Host::enter_all(vec![door], &Rc::new(watch)).remove(0)?;
            let agent = host.range();
            let (thread, copied) = host.copy(thread, context, OPTIONS)?;
            leader.stopped = Some(Host::leave_all(vec![(host, thread, context)]).remove(0)?);
            copied.map(|copy| (copy, agent))
        });
    tracer.parts.push(part);
    let (copied, agent) = result?;
    let copy = Copy { of: pid, pid: copied.tid(), agent };
    // When memory is short, it is the copy that has to go.
    if let Err(error) = std::fs::write(format!("/proc/{}/oom_score_adj", copy.pid), "1000") {
        log::debug!("the copy of {pid} is as dear to the kernel as the process: {error}");
    }
    tracer.copies.push(copied);
    Ok(copy)
}

/// Ends copies, and waits for their ends.
pub fn end(copies: &mut Vec<Stopped>) {
    for copy in copies.iter() {
        let _ = sys::process::kill(copy.tid(), libc::SIGKILL);
    }
    for copy in copies.drain(..) {
        while let Ok(Some(status)) = sys::process::wait(copy.tid(), true)
            && !(libc::WIFEXITED(status) || libc::WIFSIGNALED(status))
        {}
    }
}

/// Has the original wait for the copy that has ended.
fn reap(copy: &Copy) -> Result<(), Failure> {
    let pid = copy.of;
    let explain = |error: Errno| error.on(Object::Task, "have it wait for its copy").of(pid);
    let running = match ptrace::seize(pid, OPTIONS) {
        Ok(running) => running,
        // Its children went to another.
        Err(error) if error.code == libc::ESRCH => return Ok(()),
        Err(error) => return Err(explain(error)),
    };
    let _ = running.interrupt();
    let thread = match running.halt_by(Instant::now() + PATIENCE).map_err(explain)? {
        Some(Stop::Trap(thread) | Stop::Group(thread, _)) => thread,
        Some(_) => return Ok(()),
        None => {
            return Err(Failure::conflict(Object::Task, "have it wait for its copy", "does not stop").of(pid));
        }
    };
    let context = match Context::read(&thread) {
        Ok(context) => context,
        Err(error) => return thread.detach().and(Err(error)).map_err(explain),
    };
    // It may have become another program since.
    let instruction = match read_maps(pid).and_then(|maps| find_instruction(pid, &maps)) {
        Ok(instruction) => instruction,
        Err(failure) => return thread.detach().map_err(explain).and(Err(failure)),
    };
    let door = Door { pid, thread, context: &context, instruction };
    let args = [copy.pid as u64, 0, (libc::__WALL | libc::WNOHANG) as u64, 0];
    let (thread, result) = inject::call(door, libc::SYS_wait4, &args, "have it wait for its copy")?;
    thread.detach().map_err(explain)?;
    // The program itself may have waited for whatever child there is.
    match result {
        result if result == i64::from(copy.pid) || result == -i64::from(libc::ECHILD) => Ok(()),
        result => Err(explain(Errno { call: "wait4", code: -result.min(0) as i32 })),
    }
}

/// Makes the copy of a frozen process whole: puts into it the pages of mappings that are inherited empty.
/// `maps` are those of the original. False when mappings are missing.
///
/// # Errors
/// When the two cannot be compared.
pub fn complete(copy: &Copy, maps: &[(Vma, VmaEntry)]) -> Result<bool, Failure> {
    let theirs = maps_of(copy)?;
    let same = |(one, _): &(Vma, VmaEntry), (other, _): &(Vma, VmaEntry)| {
        (one.start, one.end, one.prot, one.is_shared) == (other.start, other.end, other.prot, other.is_shared)
            && (one.offset, one.inode) == (other.offset, other.inode)
    };
    if maps.len() != theirs.len() || !maps.iter().zip(&theirs).all(|(one, other)| same(one, other)) {
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
        let area = Area { range, is_readable: true, is_whole: false, has_file: false };
        let wiped = select(&original, &[area]).map_err(explain)?;
        log::debug!("pid {}: {:#x}-{:#x} is wiped in its copy", copy.of, map.start, map.end);
        transfer(copy, wiped.runs.iter().map(|run| run.0.clone())).map_err(explain)?;
    }
    Ok(true)
}

/// The mappings that a copy has in common with its original.
fn maps_of(copy: &Copy) -> Result<Vec<(Vma, VmaEntry)>, Failure> {
    let mut maps = read_maps(copy.pid)?;
    maps.retain(|(map, _)| map.start != copy.agent.start);
    Ok(maps)
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
