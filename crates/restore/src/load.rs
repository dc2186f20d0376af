//! Reads a set of images and checks that it is one: every id names something, every parent is there,
//! every number is in its bounds. What comes out can be executed without further questions of that sort.

use agent::crew::in_parallel;
use image::pagemap::Pagemap;
use image::*;
use kinds::contract::FileTable;
use kinds::fd::locks::{self, FileLockEntry};
use kinds::task::{signals, timers};
use kinds::vma;
use kinds::vma::sysv::{self, IpcShmEntry, Segments};
use model::{Failure, Failures, Object};
use pages::chain::Chain;
use std::collections::{HashMap, HashSet};

/// A process to bring back.
#[derive(Debug)]
pub struct Task {
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Place of the parent in the list; none for the root.
    pub parent: Option<usize>,
    /// With the leader's first.
    pub tids: Vec<i32>,
    pub cores: Vec<CoreEntry>,
    pub ids: TaskKobjIdsEntry,
    pub mm: MmEntry,
    pub fs: FsEntry,
    pub pagemap: Pagemap,
}

impl Task {
    pub fn tc(&self) -> &TaskCoreEntry {
        self.cores[0].tc.as_ref().expect("checked when it was loaded")
    }

    pub fn is_zombie(&self) -> bool {
        self.cores[0].thread_core.is_none()
    }
}

/// A whole set of images, parents before children.
#[derive(Debug)]
pub struct Checkpoint {
    pub tasks: Vec<Task>,
    pub files: FileTable,
    /// Descriptors by the id of their table.
    pub tables: HashMap<u32, Vec<FdinfoEntry>>,
    /// Files that are in queues, or that others need.
    pub in_flight: Vec<u32>,
    /// Some are in queues.
    pub has_queued: bool,
    pub locks: Vec<FileLockEntry>,
    pub chains: SeccompEntry,
    /// The folder and its parents, for pages.
    pub chain: Chain,
    pub segments: Segments,
}

impl Checkpoint {
    /// The first task that has a file.
    pub fn first_with(&self, file: u32) -> Option<i32> {
        let has_it = |task: &&Task| {
            let table = self.tables.get(&task.ids.files_id).filter(|_| !task.is_zombie());
            table.is_some_and(|entries| entries.iter().any(|entry| entry.id == file))
        };
        self.tasks.iter().find(has_it).map(|task| task.pid)
    }
}

const PID_MAX: u32 = 1 << 22;
const FD_MAX: u32 = 1 << 20;
/// Records that are loaded on all processors.
const MANY: usize = 32;

/// Reads it all.
///
/// # Errors
/// Everything that is corrupt or not carried.
pub fn load(dir: &Dir) -> Result<Checkpoint, Failures> {
    let inventory: InventoryEntry = dir.read_one(kind::INVENTORY, "inventory.img").map_err(|failure| {
        failure.help(model::Remedy::Advice("a folder without it holds no finished dump"))
    })?;
    if !(1..=2).contains(&inventory.img_version) || inventory.fdinfo_per_id != Some(true) {
        let why = format!("images of version {} are not carried", inventory.img_version);
        return Err(Failure::corrupt("inventory.img", Some(0), why).into());
    }
    let chain = Chain::open(dir)?;
    let mut failures = Failures::new();
    let pstree: Vec<PstreeEntry> = dir.read_all(kind::PSTREE, "pstree.img")?;
    if pstree.is_empty() {
        return Err(Failure::corrupt("pstree.img", None, "is missing or empty").into());
    }
    let mut known: HashMap<u32, usize> = HashMap::new();
    let mut ids = HashSet::new();
    let mut found = Vec::with_capacity(pstree.len());
    for (index, entry) in pstree.iter().enumerate() {
        let corrupt = |why: String| Failure::corrupt("pstree.img", Some(index), why);
        let parent = match (index, entry.ppid) {
            (0, 0) => None,
            (0, ppid) => {
                failures.push(corrupt(format!("the root has the parent {ppid}")));
                continue;
            }
            (_, ppid) => match known.get(&ppid) {
                Some(parent) => Some(*parent),
                None => {
                    failures.push(corrupt(format!(
                        "process {} has the parent {ppid}, which is not before it",
                        entry.pid
                    )));
                    continue;
                }
            },
        };
        let tids: Vec<u32> = match entry.threads.first() {
            Some(first) if *first == entry.pid => entry.threads.clone(),
            _ => vec![entry.pid],
        };
        if [entry.pid, entry.sid, entry.pgid].iter().chain(&tids).any(|id| !(1..PID_MAX).contains(id))
            || !tids.iter().all(|tid| ids.insert(*tid))
        {
            failures.push(corrupt(format!("process {} has an id that is none, or is taken", entry.pid)));
            continue;
        }
        known.insert(entry.pid, found.len());
        found.push((index, entry, parent, tids));
    }
    let loaded = in_parallel(&found, MANY, |found| {
        found
            .iter()
            .map(|(_, entry, parent, tids)| load_task(&chain, entry, *parent, tids))
            .collect::<Vec<_>>()
    });
    let mut tasks = Vec::with_capacity(found.len());
    for (task, (index, entry, ..)) in loaded.into_iter().flatten().zip(&found) {
        match task {
            // Of one that has ended CRIU lists no threads worth reading.
            Ok(task) if !task.is_zombie() && entry.threads.first() != Some(&entry.pid) => {
                let why = format!("process {} is not its own first thread", entry.pid);
                failures.push(Failure::corrupt("pstree.img", Some(*index), why));
            }
            Ok(task) => tasks.push(task),
            Err(more) => failures.extend(more),
        }
    }
    failures.extend(tasks.iter().filter_map(|task| check_namespaces(task, inventory.root_ids.as_ref())));
    let files = dir.read("files.img")?;
    let files = match &files {
        Some(bytes) => Reader::open(kind::FILES, "files.img", bytes)?.bodies()?,
        None => Vec::new(),
    };
    let files = FileTable::new(
        &files,
        dir.read_all(kind::REMAP_FPATH, "remap-fpath.img")?,
        dir.read_all(kind::TTY_INFO, "tty-info.img")?,
    );
    let mut tables = HashMap::new();
    for task in tasks.iter().filter(|task| !task.is_zombie()) {
        let id = task.ids.files_id;
        if let std::collections::hash_map::Entry::Vacant(slot) = tables.entry(id) {
            let name = format!("fdinfo-{id}.img");
            let mut entries: Vec<FdinfoEntry> = dir.read_all(kind::FDINFO, &name)?;
            entries.sort_by_key(|entry| entry.fd);
            if let Some(pair) = entries.windows(2).find(|pair| pair[0].fd == pair[1].fd) {
                failures.push(Failure::corrupt(&*name, None, format!("has fd {} twice", pair[0].fd)));
            }
            if let Some(entry) = entries.last().filter(|entry| entry.fd >= FD_MAX) {
                let why = format!("has fd {}, which is none", entry.fd as i32);
                failures.push(Failure::corrupt(name, None, why));
            }
            slot.insert(entries);
        }
    }
    // All tasks are in one namespace, as was seen above.
    let mut segments = Segments::new();
    if tasks.iter().flat_map(|task| &task.mm.vmas).any(sysv::is_attached) {
        let name = sysv::image(tasks[0].ids.ipc_ns_id.unwrap_or(0));
        let entries: Vec<IpcShmEntry> = dir.read_all(kind::IPCNS_SHM, &name)?;
        failures.extend(sysv::check(&entries, &name));
        segments = entries.into_iter().map(|entry| (entry.desc.id as i32, entry)).collect();
    }
    for task in &tasks {
        let why = sysv::check_task(&task.mm.vmas, &segments);
        failures.extend(why.map(|why| Failure::corrupt(format!("mm-{}.img", task.pid), None, why)));
    }
    let chains: Vec<SeccompEntry> = dir.read_all(kind::SECCOMP, "seccomp.img")?;
    let chains = chains.into_iter().next().unwrap_or_default();
    let mut in_flight = Vec::new();
    for kind in kinds::fd::KINDS {
        match kind.holds(dir) {
            Ok(ids) => in_flight.extend(ids),
            Err(failure) => failures.push(failure),
        }
    }
    let locks: Vec<FileLockEntry> = dir.read_all(kind::FILE_LOCKS, "filelocks.img")?;
    for (index, lock) in locks.iter().enumerate() {
        let is_there = file_of(lock, &tasks, &tables).is_some();
        let why =
            locks::check(lock).or_else(|| (!is_there).then_some("is for a descriptor that no process has"));
        failures.extend(why.map(|why| Failure::corrupt("filelocks.img", Some(index), why)));
    }
    match files {
        Err(more) => failures.extend(more),
        Ok(files) => {
            let has_queued = !in_flight.is_empty();
            in_flight.extend(needed(&files, &tables, &in_flight));
            check_files(&tasks, &files, &tables, &in_flight, &mut failures);
            for core in tasks.iter().flat_map(|task| &task.cores).filter_map(|core| core.thread_core.as_ref())
            {
                failures.extend(kinds::task::seccomp::programs(core, &chains).err());
            }
            if failures.is_empty() {
                return Ok(Checkpoint {
                    tasks,
                    files,
                    tables,
                    in_flight,
                    has_queued,
                    locks,
                    chains,
                    chain,
                    segments,
                });
            }
        }
    }
    Err(failures)
}

/// Files that others need, which tasks have or which are in queues.
fn needed(files: &FileTable, tables: &HashMap<u32, Vec<FdinfoEntry>>, in_flight: &[u32]) -> Vec<u32> {
    let needs: HashMap<u32, Vec<u32>> = files.needs().fold(HashMap::new(), |mut needs, (id, needed)| {
        needs.entry(id).or_insert_with(Vec::new).push(needed);
        needs
    });
    let mut open: Vec<u32> =
        tables.values().flatten().map(|entry| entry.id).chain(in_flight.to_vec()).collect();
    let mut known: HashSet<u32> = HashSet::new();
    while let Some(id) = open.pop() {
        for needed in needs.get(&id).into_iter().flatten().filter(|needed| known.insert(**needed)) {
            open.push(*needed);
        }
    }
    known.into_iter().collect()
}

fn load_core(dir: &Dir, tid: u32) -> Result<CoreEntry, Failure> {
    let name = format!("core-{tid}.img");
    let core: CoreEntry = dir.read_one(kind::CORE, &name)?;
    if core.mtype != i32::from(agent::arch::record::MARCH) {
        return Err(Failure::corrupt(name, Some(0), "is of another processor architecture"));
    }
    if core.thread_core.is_some() && core.thread_info.is_none() {
        return Err(Failure::corrupt(name, Some(0), "has no registers"));
    }
    if let Some(info) = &core.thread_info {
        // With room for all that this processor has, so that only the image is judged, and the processor.
        let mut xstate = vec![0; agent::arch::Layout.size(u64::MAX)];
        agent::arch::record::fill_xstate(&info.fpregs, &mut xstate, &name)?;
    }
    Ok(core)
}

fn load_task(
    chain: &Chain,
    entry: &PstreeEntry,
    parent: Option<usize>,
    tids: &[u32],
) -> Result<Task, Failures> {
    let dir = chain.newest();
    let pid = entry.pid;
    let load = |tids: &[u32]| tids.iter().map(|tid| load_core(dir, *tid)).collect::<Result<Vec<_>, _>>();
    let shares = in_parallel(tids, MANY, load).into_iter().collect::<Result<Vec<_>, _>>()?;
    let cores: Vec<CoreEntry> = shares.into_iter().flatten().collect();
    if cores[0].tc.is_none() || cores[1..].iter().any(|core| core.thread_core.is_none()) {
        return Err(Failure::corrupt(
            format!("core-{pid}.img"),
            Some(0),
            "lacks the state of a process or thread",
        )
        .into());
    }
    let mut task = Task {
        pid: pid as i32,
        ppid: entry.ppid as i32,
        pgid: entry.pgid as i32,
        sid: entry.sid as i32,
        parent,
        tids: tids.iter().map(|tid| *tid as i32).collect(),
        cores,
        ids: TaskKobjIdsEntry::default(),
        mm: MmEntry::default(),
        fs: FsEntry::default(),
        pagemap: Pagemap::default(),
    };
    check_state(&task)?;
    if task.is_zombie() {
        return Ok(task);
    }
    task.ids = dir.read_one(kind::IDS, &format!("ids-{pid}.img"))?;
    task.fs = dir.read_one(kind::FS, &format!("fs-{pid}.img"))?;
    let name = format!("mm-{pid}.img");
    task.mm = dir.read_one(kind::MM, &name)?;
    let pagemap = format!("pagemap-{pid}.img");
    dir.open_file(&pagemap)?;
    task.pagemap = chain.load_with_away(&pagemap)?;
    let mut failures = Failures::new();
    let mut last = 0;
    for (index, entry) in task.mm.vmas.iter().enumerate() {
        failures.extend(vma::check(entry, &name, index).map(|failure| failure.of(task.pid)));
        let is_mapping = entry.status & image::vma::GUARD == 0;
        if is_mapping && entry.start < last {
            failures.push(Failure::corrupt(&*name, None, format!("mappings overlap at {:#x}", entry.start)));
        }
        last = if is_mapping { entry.end } else { last };
    }
    if let Some(why) = vma::aio::check(&task.mm.aios, &task.mm.vmas) {
        failures.push(Failure::unsupported(Object::Task, why).of(task.pid));
    }
    // Content without a mapping would be written over something else.
    let mut vmas = task.mm.vmas.iter().filter(|entry| vma::content(entry) != vma::Content::None).peekable();
    for run in &task.pagemap.runs {
        let mut at = run.range.start;
        while at < run.range.end {
            while vmas.peek().is_some_and(|vma| vma.end <= at) {
                vmas.next();
            }
            match vmas.peek() {
                Some(vma) if vma.start <= at => at = vma.end,
                _ => {
                    failures.push(Failure::corrupt(
                        format!("pagemap-{pid}.img"),
                        None,
                        format!("has pages at {at:#x}, where no mapping is"),
                    ));
                    break;
                }
            }
        }
    }
    if failures.is_empty() { Ok(task) } else { Err(failures) }
}

/// A namespace is one of the tree's own when its number is not that of whoever made the dump.
fn check_namespaces(task: &Task, host: Option<&TaskKobjIdsEntry>) -> Option<Failure> {
    type Id = fn(&TaskKobjIdsEntry) -> Option<u32>;
    const NAMESPACES: [(&str, Id); 8] = [
        ("pid", |ids| ids.pid_ns_id),
        ("net", |ids| ids.net_ns_id),
        ("ipc", |ids| ids.ipc_ns_id),
        ("uts", |ids| ids.uts_ns_id),
        ("mnt", |ids| ids.mnt_ns_id),
        ("user", |ids| ids.user_ns_id),
        ("cgroup", |ids| ids.cgroup_ns_id),
        ("time", |ids| ids.time_ns_id),
    ];
    let host = host?;
    let is_own = |of: Id| of(&task.ids).zip(of(host)).is_some_and(|(own, host)| own != host);
    let own: Vec<&str> = NAMESPACES.iter().filter(|(_, of)| is_own(*of)).map(|(name, _)| *name).collect();
    (!own.is_empty()).then(|| {
        let why = format!("has namespaces of its own ({}), which are not carried yet", own.join(", "));
        Failure::unsupported(Object::Task, why).of(task.pid)
    })
}

/// Judges what the cores say of a process: whether it lives, its signals, timers and registers.
fn check_state(task: &Task) -> Result<(), Failures> {
    const ALIVE: u32 = 1;
    const ENDED: u32 = 2;
    const STOPPED: u32 = 3;
    let mut failures = Failures::new();
    let mut corrupt = |tid: i32, why: String| {
        failures.push(Failure::corrupt(format!("core-{tid}.img"), Some(0), why));
    };
    let tc = task.tc();
    match (tc.task_state, task.is_zombie()) {
        (ALIVE, false) | (STOPPED, false) | (ENDED, true) => {}
        (state, _) => corrupt(task.pid, format!("has the state {state}, which its content contradicts")),
    }
    // A process that is to end by a signal that ends nothing would be waited for without end.
    if task.is_zombie() && !ends(tc.exit_code as i32 & 0x7f) {
        corrupt(task.pid, format!("has the exit code {:#x}, with which no process ends", tc.exit_code));
    }
    if tc.stop_signo.is_some_and(|signal| tc.task_state == STOPPED && !STOPS.contains(&(signal as i32))) {
        corrupt(task.pid, format!("was stopped by signal {}, which stops none", tc.stop_signo.unwrap_or(0)));
    }
    let why = tc.signals_s.as_ref().and_then(signals::check);
    let why = why.or_else(|| tc.timers.as_ref().and_then(timers::check));
    why.into_iter().for_each(|why| corrupt(task.pid, why));
    for (tid, core) in task.tids.iter().zip(&task.cores) {
        let queue = core.thread_core.as_ref().and_then(|thread| thread.signals_p.as_ref());
        queue.and_then(signals::check).into_iter().for_each(|why| corrupt(*tid, why));
    }
    if failures.is_empty() { Ok(()) } else { Err(failures) }
}

const STOPS: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

/// Does a process end by this signal when it has no handler, or with no signal at all?
fn ends(signal: i32) -> bool {
    const IGNORED: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
    (0..=64).contains(&signal) && !STOPS.contains(&signal) && !IGNORED.contains(&signal)
}

/// The file that a lock is on.
pub fn file_of(lock: &FileLockEntry, tasks: &[Task], tables: &HashMap<u32, Vec<FdinfoEntry>>) -> Option<u32> {
    let task = tasks.iter().find(|task| task.pid == lock.pid && !task.is_zombie())?;
    let entry = tables.get(&task.ids.files_id)?.iter().find(|entry| entry.fd as i32 == lock.fd)?;
    Some(entry.id)
}

fn check_files(
    tasks: &[Task],
    files: &FileTable,
    tables: &HashMap<u32, Vec<FdinfoEntry>>,
    in_flight: &[u32],
    failures: &mut Failures,
) {
    let mut wrong = Vec::new();
    let mut need = |id: u32, what: &dyn Fn() -> String, kind: Option<i32>| {
        let found = files.get(id).map(|file| file.0.file_type());
        if found.is_none() || kind.is_some_and(|kind| found != Some(kind)) {
            wrong.push(Failure::corrupt("files.img", None, format!("has no file {id}, which is {}", what())));
        }
    };
    for task in tasks.iter().filter(|task| !task.is_zombie()) {
        let pid = task.pid;
        need(task.mm.exe_file_id, &|| format!("the executable of process {pid}"), None);
        need(task.fs.cwd_id, &|| format!("the working directory of process {pid}"), None);
        need(task.fs.root_id, &|| format!("the root of process {pid}"), None);
        for id in task.mm.vmas.iter().filter_map(vma::file_id) {
            need(id, &|| format!("mapped by process {pid}"), None);
        }
    }
    for id in in_flight {
        need(*id, &|| "in the queue of a socket, or needed by another".into(), None);
    }
    for (table, entries) in tables {
        for entry in entries {
            need(entry.id, &|| format!("fd {} of fdinfo-{table}.img", entry.fd), Some(entry.r#type));
        }
    }
    failures.extend(wrong);
}
