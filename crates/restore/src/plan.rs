//! Decisions about a tree, made before anything is touched: where the agent lives, who makes whom and
//! when, which ids have to be borrowed for a moment.

use crate::load::{Checkpoint, Task};
use model::{Failure, Failures, Object, Options};
use std::collections::{HashMap, HashSet};
use std::fmt::Write;
use std::ops::Range;

/// When a child is made in the life of its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// Before the parent leads a session of its own: the child stays in the one before.
    BeforeSession,
    /// Before the parent has memory: the child shares none.
    Empty,
    /// After the parent's memory is filled: the child shares it copy-on-write.
    Sharing,
}

#[derive(Debug)]
pub struct Plan {
    /// Address space that nobody in the tree uses, for the agent: code first, then the shared area.
    pub hole: Range<u64>,
    /// For each task but the root.
    pub births: Vec<Birth>,
    /// Process groups whose leaders have ended: the group, and the task that makes a stand-in.
    pub stand_ins: Vec<(i32, usize)>,
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

    let mut births = vec![Birth::Empty; tasks.len()];
    let mut stand_ins: HashMap<i32, usize> = HashMap::new();
    // The session that each task is born into.
    let mut born: Vec<i32> = vec![root.sid; tasks.len()];
    for (at, task) in tasks.iter().enumerate() {
        if let Some(parent) = task.parent {
            let (mother, mothers_birth) = (&tasks[parent], born[parent]);
            let leads = mother.sid == mother.pid;
            let wanted = if task.sid == task.pid { mother.sid } else { task.sid };
            born[at] = wanted;
            births[at] = if wanted == mother.sid {
                match shares_memory(mother, task) {
                    true => Birth::Sharing,
                    false => Birth::Empty,
                }
            } else if leads && wanted == mothers_birth {
                Birth::BeforeSession
            } else {
                let why =
                    format!("its session {} cannot be reached from its parent {}", task.sid, mother.pid);
                failures.push(Failure::unsupported(Object::Task, why).of(task.pid));
                Birth::Empty
            };
            if mother.is_zombie() {
                failures.push(Failure::corrupt("pstree.img", Some(at), "has a parent that has ended"));
            }
        }
        if !pids.contains(&task.pgid) && Some(task.pgid) != inherited_pgid && !task.is_zombie() {
            stand_ins.entry(task.pgid).or_insert(at);
        }
    }
    let threads: HashSet<i32> = tasks.iter().flat_map(|task| &task.tids).copied().collect();
    for (pgid, at) in stand_ins.iter().filter(|(pgid, _)| threads.contains(pgid)) {
        let why = format!("its process group {pgid} is a thread");
        failures.push(Failure::corrupt("pstree.img", Some(*at), why));
    }
    let hole = match find_hole(tasks) {
        Some(hole) => hole,
        None => {
            failures.push(Failure::unsupported(
                Object::Tree,
                "leaves no room for the agent in its address spaces",
            ));
            0..0
        }
    };
    if !failures.is_empty() {
        return Err(failures);
    }
    let mut stand_ins: Vec<(i32, usize)> = stand_ins.into_iter().collect();
    stand_ins.sort_unstable();
    Ok(Plan { hole, births, stand_ins, inherited_pgid })
}

/// Does any mapping with content look as if both had it from one fork?
fn shares_memory(parent: &Task, child: &Task) -> bool {
    !child.is_zombie()
        && parent.mm.exe_file_id == child.mm.exe_file_id
        && child.mm.vmas.iter().any(|vma| crate::memory::is_inherited(parent, vma))
}

fn find_hole(tasks: &[Task]) -> Option<Range<u64>> {
    let mut used: Vec<Range<u64>> =
        tasks.iter().flat_map(|task| &task.mm.vmas).map(|vma| vma.start..vma.end).collect();
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
        for (pgid, at) in &self.stand_ins {
            let _ = writeln!(
                text,
                "process group {pgid}: led for a moment by a child of {}",
                checkpoint.tasks[*at].pid
            );
        }
        let _ = writeln!(text, "agent at {:#x}-{:#x}", self.hole.start, self.hole.end);
        text
    }
}
