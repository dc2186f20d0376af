//! Decisions about a tree, made before anything is touched: where the agent lives, who makes whom and
//! when, which ids have to be borrowed for a moment.

use crate::load::{Checkpoint, Task};
use image::pagemap::Run;
use kinds::task::sessions::{self, Kin, Way};
use kinds::vma::{self, sysv};
use model::{Failure, Failures, Object, Options};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::ops::Range;

/// When a child is made in the life of its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// Before the parent leads a session of its own: the child stays in the one before.
    BeforeSession,
    /// Before the parent has memory of its own: the child shares none of it.
    Empty,
    /// After the parent's memory is filled: the child shares it copy-on-write.
    Sharing,
    /// At the same time, by the leader of its session, a child of the parent that then ends.
    Orphaned,
}

impl Birth {
    /// Does it begin with what its parent has in memory?
    pub fn has_parents_memory(self) -> bool {
        matches!(self, Birth::Sharing | Birth::Orphaned)
    }
}

/// A process that leads what has no leader any more, until all who belong to it are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StandIn {
    /// Of the process group or session.
    pub id: i32,
    /// The task that makes it.
    pub maker: usize,
    pub is_of_session: bool,
}

#[derive(Debug)]
pub struct Plan {
    /// Address space that nobody in the tree uses, for the agent: code first, then the shared area.
    pub hole: Range<u64>,
    /// For each task but the root.
    pub births: Vec<Birth>,
    /// In the order of their ids.
    pub stand_ins: Vec<StandIn>,
    /// The process group that the root takes over from this program, for a shell job.
    pub inherited_pgid: Option<i32>,
}

const LOWEST: u64 = 0x1_0000_0000;
const HIGHEST: u64 = 0x7f00_0000_0000;
/// Memory for lists; only what is used of it costs anything.
const AREAS: [u64; 3] = [1 << 30, 256 << 20, 64 << 20];

/// # Errors
/// Every reason why this tree cannot be built.
pub fn plan(checkpoint: &Checkpoint, options: &Options) -> Result<Plan, Failures> {
    let mut failures = Failures::new();
    let tasks = &checkpoint.tasks;
    let pids: HashSet<i32> = tasks.iter().map(|task| task.pid).collect();
    let root = &tasks[0];
    let is_foreign_session = !pids.contains(&root.sid);
    if is_foreign_session && !options.shell_job {
        let why = format!("its session {} is led from outside of the tree", root.sid);
        failures.push(Failure::policy(Object::Task, why, &model::options::SHELL_JOB).of(root.pid));
    }
    if root.is_zombie() {
        failures.push(Failure::corrupt("pstree.img", Some(0), "the root has ended"));
    }
    let inherited_pgid = (is_foreign_session && !pids.contains(&root.pgid)).then_some(root.pgid);

    let kin: Vec<Kin> = tasks
        .iter()
        .map(|task| Kin { pid: task.pid, sid: task.sid, parent: task.parent, has_ended: task.is_zombie() })
        .collect();
    let mut births = vec![Birth::Empty; tasks.len()];
    let mut stand_ins: HashMap<i32, StandIn> = HashMap::new();
    for ((at, task), way) in tasks.iter().enumerate().zip(sessions::ways(&kin)) {
        let mother = task.parent.map(|parent| (parent, &tasks[parent]));
        if mother.is_some_and(|(_, mother)| mother.is_zombie()) {
            failures.push(Failure::corrupt("pstree.img", Some(at), "has a parent that has ended"));
        }
        births[at] = match (way, mother) {
            (Ok(Way::Earlier), _) => Birth::BeforeSession,
            (Ok(Way::Orphaned), Some((maker, mother))) => {
                if !pids.contains(&task.sid) {
                    stand_ins.insert(task.sid, StandIn { id: task.sid, maker, is_of_session: true });
                }
                if !task.is_zombie() && task.ids.files_id == mother.ids.files_id {
                    let why = "shares its descriptors with a parent that adopted it, which is not carried";
                    failures.push(Failure::unsupported(Object::Task, why).of(task.pid));
                }
                Birth::Orphaned
            }
            // Its orphans begin with what it began with.
            (Ok(_), Some(_)) if task.is_zombie() && leads_others(task, tasks) => Birth::Sharing,
            // What comes later cannot be handed on at birth.
            (Ok(_), Some((_, mother)))
                if !has_away(mother) && !has_away(task) && shares_memory(mother, task) =>
            {
                Birth::Sharing
            }
            (Ok(_), _) => Birth::Empty,
            (Err(why), _) => {
                failures.push(Failure::unsupported(Object::Task, why).of(task.pid));
                Birth::Empty
            }
        };
    }
    for (at, task) in tasks.iter().enumerate().filter(|(_, task)| !task.is_zombie()) {
        if !pids.contains(&task.pgid) && Some(task.pgid) != inherited_pgid {
            stand_ins.entry(task.pgid).or_insert(StandIn { id: task.pgid, maker: at, is_of_session: false });
        }
    }
    let threads: HashSet<i32> = tasks.iter().flat_map(|task| &task.tids).copied().collect();
    for stand_in in stand_ins.values().filter(|stand_in| threads.contains(&stand_in.id)) {
        let what = if stand_in.is_of_session { "session" } else { "process group" };
        let why = format!("its {what} {} is a thread", stand_in.id);
        failures.push(Failure::corrupt("pstree.img", Some(stand_in.maker), why));
    }
    let hole = match find_hole(checkpoint) {
        Some(hole) => hole,
        None => {
            failures.push(Failure::unsupported(
                Object::Tree,
                "leaves no room for the agent in its address spaces",
            ));
            0..0
        }
    };
    let mut stand_ins: Vec<StandIn> = stand_ins.into_values().collect();
    stand_ins.sort_unstable();
    let plan = Plan { hole, births, stand_ins, inherited_pgid };
    let away = tasks.iter().enumerate().filter(|(_, task)| has_away(task));
    failures.extend(away.filter_map(|(at, task)| plan.judge_away(checkpoint, at, task, options)));
    if failures.is_empty() { Ok(plan) } else { Err(failures) }
}

/// Are pages of it still with the dump?
fn has_away(task: &Task) -> bool {
    task.pagemap.runs.iter().any(Run::is_away)
}

/// Of pages that are still with the dump, one in a mapping whose content has to be there at once.
fn misplaced(task: &Task) -> Option<u64> {
    let mut vmas = task.mm.vmas.iter().filter(|entry| vma::may_come_later(entry)).peekable();
    task.pagemap.runs.iter().filter(|run| run.is_away()).find_map(|run| {
        let mut at = run.range.start;
        while at < run.range.end {
            while vmas.next_if(|vma| vma.end <= at).is_some() {}
            match vmas.peek() {
                Some(vma) if vma.start <= at => at = vma.end,
                _ => return Some(at),
            }
        }
        None
    })
}

/// Is there another process in the session that this one leads?
fn leads_others(leader: &Task, tasks: &[Task]) -> bool {
    tasks.iter().any(|task| task.sid == leader.pid && task.pid != leader.pid)
}

/// Does any mapping with content look as if both had it from one fork?
fn shares_memory(parent: &Task, child: &Task) -> bool {
    !child.is_zombie()
        && parent.mm.exe_file_id == child.mm.exe_file_id
        && child.mm.vmas.iter().any(|vma| crate::memory::is_inherited(parent, vma))
}

fn find_hole(checkpoint: &Checkpoint) -> Option<Range<u64>> {
    let vmas = |task: &Task| task.mm.vmas.iter().map(|vma| vma.start..vma.end).collect::<Vec<_>>();
    let mut used: Vec<Range<u64>> = checkpoint.tasks.iter().flat_map(vmas).collect();
    for task in &checkpoint.tasks {
        used.extend(sysv::ranges(&task.mm.vmas, &checkpoint.segments));
    }
    // Only the kernel's own page for old system calls is there, at the end of all addresses.
    used.retain(|range| range.start < HIGHEST);
    used.sort_unstable_by_key(|range| range.start);
    AREAS.iter().find_map(|area| {
        let want = area + agent::puppet::PAGES;
        let mut at = LOWEST;
        for range in &used {
            // Stacks grow towards lower addresses: keep away from what is above.
            if range.start >= at && range.start - at >= want + (1 << 30) {
                break;
            }
            at = at.max(range.end.next_multiple_of(1 << 21));
        }
        (at + want <= HIGHEST).then(|| at..at + want)
    })
}

impl Plan {
    /// Does this task get children that somebody else makes?
    pub fn adopts(&self, checkpoint: &Checkpoint, at: usize) -> bool {
        let births = self.births.iter().zip(&checkpoint.tasks);
        births.into_iter().any(|(birth, task)| *birth == Birth::Orphaned && task.parent == Some(at))
    }

    /// Does somebody begin with the memory of this task when it is filled?
    pub fn has_heirs(&self, checkpoint: &Checkpoint, at: usize) -> bool {
        let births = self.births.iter().zip(&checkpoint.tasks);
        let mut sharing = births.filter(|(birth, task)| **birth == Birth::Sharing && task.parent == Some(at));
        sharing.next().is_some()
            || self.adopts(checkpoint, at)
            || self.stand_ins.iter().any(|one| one.maker == at && one.is_of_session)
    }

    /// Can the memory of a task come later? Not where others begin with it, nor where it is compared with what was found.
    pub fn comes_later(&self, checkpoint: &Checkpoint, at: usize) -> bool {
        !self.has_heirs(checkpoint, at) && self.finds_memory_of(&checkpoint.tasks, at).is_none()
    }

    /// Why pages of a task that are still with the dump cannot be restored.
    fn judge_away(
        &self,
        checkpoint: &Checkpoint,
        at: usize,
        task: &Task,
        options: &Options,
    ) -> Option<Failure> {
        if !options.lazy_pages {
            let why = "has memory that is still with the dump (dump --lazy-pages)";
            let failure = Failure::policy(Object::Task, why, &model::options::LAZY_PAGES);
            return Some(failure.of(task.pid));
        }
        if let Some(address) = misplaced(task) {
            let why = format!("says of page {address:#x} that it comes later, where it cannot");
            return Some(Failure::corrupt(format!("pagemap-{}.img", task.pid), None, why));
        }
        (!self.comes_later(checkpoint, at)).then(|| {
            let why = "has memory that comes later, and shares it with a process that is made from it";
            Failure::unsupported(Object::Task, why).of(task.pid)
        })
    }

    /// Whose memory a task has when it is made, as an index; nobody's if all that made it were empty.
    pub fn finds_memory_of(&self, tasks: &[Task], mut at: usize) -> Option<usize> {
        loop {
            let parent = tasks[at].parent?;
            if self.births[at].has_parents_memory() {
                return Some(parent);
            }
            // Made before the parent has exchanged what it found itself.
            at = parent;
        }
    }

    /// The plan as text, for `--dry-run`.
    pub fn describe(&self, checkpoint: &Checkpoint) -> String {
        let mut text = String::new();
        for (at, task) in checkpoint.tasks.iter().enumerate() {
            let comm = String::from_utf8_lossy(&task.tc().comm).into_owned();
            let how = match (task.parent, task.is_zombie()) {
                (None, _) => "root".into(),
                (Some(_), true) => format!("zombie of {}", task.ppid),
                (Some(_), false) => format!("child of {}, {:?}", task.ppid, self.births[at]),
            };
            let pages: u64 = task.pagemap.runs.iter().map(image::pagemap::Run::len).sum::<u64>() / 4096;
            let _ = writeln!(
                text,
                "process {} ({comm}): {how}; session {}, group {}; {} threads, {} mappings, {pages} pages, {} descriptors",
                task.pid,
                task.sid,
                task.pgid,
                task.tids.len(),
                task.mm.vmas.len(),
                checkpoint.tables.get(&task.ids.files_id).map_or(0, Vec::len),
            );
        }
        for stand_in in &self.stand_ins {
            let what = if stand_in.is_of_session { "session" } else { "process group" };
            let maker = checkpoint.tasks[stand_in.maker].pid;
            let _ = writeln!(text, "{what} {}: led for a moment by a child of {maker}", stand_in.id);
        }
        let _ = writeln!(text, "agent at {:#x}-{:#x}", self.hole.start, self.hole.end);
        text
    }
}
