//! A restore from beginning to end.

use crate::exec::{Exec, Open};
use crate::lazy::{Coming, Server};
use crate::load::{Checkpoint, file_of, load};
use crate::memory::{self, Contents};
use crate::plan::{Plan, plan};
use crate::stage::Stage;
use image::{Dir, StatsEntry};
use kinds::contract::{AnyFdKind, ArmCx, FileTable, OpenCx, Shelf};
use kinds::fd::ghost::Remap;
use kinds::fd::regular::{self, Regular};
use kinds::fd::tty::Control;
use kinds::fd::{locks, memfd};
use kinds::task::seccomp;
use kinds::vma::{hugetlb, sysv};
use model::hooks::Action;
use model::stats::RestoreStats;
use model::{Errno, Failure, Failures, Hooks, IdMap, Object, Options};
use pages::chain::Stored;
use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use sys::process::StandIn;

/// What a restore came to.
#[derive(Debug)]
pub enum Outcome {
    /// `--dry-run`: the plan, as text.
    Planned(String),
    /// The tree runs.
    Resumed(Resumed),
}

/// A tree that runs, whose root is perhaps our child.
#[derive(Debug)]
pub struct Resumed {
    /// The root's pid as seen from here.
    pub root: i32,
}

impl Resumed {
    /// Waits until the root has ended.
    pub fn wait(self) -> Result<(), Failures> {
        sys::process::wait(self.root, true)
            .map_err(|error| error.on(Object::Task, "wait for it").of(self.root))?;
        Ok(())
    }
}

/// Brings a tree back.
///
/// # Errors
/// Everything that stands in the way; nothing of the tree is left then.
pub fn run(options: &Options) -> Result<Outcome, Failures> {
    let started = Instant::now();
    let dir = Dir::open(&options.images_dir)?;
    if options.root.is_some() {
        let why = "--root has no meaning without a mount namespace, which is not carried yet";
        return Err(Failure::unsupported(Object::Tree, why).into());
    }
    options.progress.stage("load");
    let mut stage = Stage::begin();
    let coming = (options.lazy_pages && !options.dry_run).then(|| Coming::begin(options)).transpose()?;
    let checkpoint = Arc::new(load(&dir)?);
    let plan = plan(&checkpoint, options)?;
    stage.ends("read the images");
    if options.dry_run {
        return Ok(Outcome::Planned(plan.describe(&checkpoint)));
    }
    let hooks = Hooks::new(options.action_scripts.clone());
    hooks.run(Action::PreRestore, dir.path(), None)?;
    // Every open file of the tree is ours for a moment, and something of every process.
    sys::fd::reserve(checkpoint.files.len() + 4 * checkpoint.tasks.len() + 256);
    let mut pages = HashMap::new();
    let mut contents = Contents::default();
    let comes_later = |at| options.lazy_pages && plan.comes_later(&checkpoint, at);
    for (id, parts) in memory::needed(&checkpoint.tasks, comes_later) {
        let (file, is_whole) = match checkpoint.chain.find_pages(id)? {
            Stored::Plain(file) => (file, true),
            Stored::Compressed(compressed) => (compressed.unpack_parts(&parts)?, !options.lazy_pages),
        };
        contents.add(id, &file, is_whole)?;
        pages.insert(id, file);
    }
    options.progress.stage("files");
    let mut failures = Failures::new();
    failures.extend(sysv::judge(checkpoint.segments.values()));
    let threads = checkpoint.tasks.iter().flat_map(|task| task.tids.iter().copied().zip(&task.cores));
    let threads = threads.filter_map(|(tid, core)| Some((tid, core.thread_core.as_ref()?)));
    failures.extend(seccomp::judge(threads, &checkpoint.chains).err());
    let mut huge = hugetlb::Needed::of(checkpoint.tasks.iter().flat_map(|task| &task.mm.vmas));
    failures.extend(memfd::judge(&dir, &mut huge));
    sysv::huge_pages(&checkpoint.segments, &mut huge);
    failures.extend(huge.judge());
    if !failures.is_empty() {
        return Err(failures);
    }
    let opening = Opening { checkpoint: &checkpoint, options, dir: &dir };
    let Opened { files, late, mut stand_ins, terminals } = opening.open_files(&mut failures);
    failures.extend(keep_stand_ins(&mut stand_ins, &checkpoint, &plan));
    for lock in &checkpoint.locks {
        let file = file_of(lock, &checkpoint.tasks, &checkpoint.tables).and_then(|id| files.get(id));
        failures.extend(file.and_then(|file| locks::take(lock, file).err()));
    }
    let mapped = mapped_files(&checkpoint, &files, &mut failures);
    if !failures.is_empty() {
        return Err(failures);
    }
    let segments = sysv::make(&checkpoint.segments, &|id: u64, to: &OwnedFd| {
        pages::put::fill_file(&checkpoint.chain, id, to)
    })?;
    stage.ends("opened the files");
    let root = checkpoint.tasks[0].pid;
    options.progress.stage("tasks");
    let runs = checkpoint.tasks.iter().flat_map(|task| &task.pagemap.runs);
    options.progress.pages_total(runs.map(|run| run.len() / 4096).sum());
    let server = coming.map(Coming::reach).transpose()?;
    let open = Open { files: &files, mapped: &mapped, terminals: &terminals };
    let exec = Exec::new(checkpoint.clone(), &plan, options, open, pages, contents, server.as_ref())?;
    let has_late = late.iter().any(|ids| !ids.is_empty());
    let open_late = has_late.then_some(|| opening.open_late(&late, &files));
    let stats = exec.run(open_late, || {
        server.as_ref().map_or(Ok(()), Server::is_there)?;
        drop(stand_ins);
        if let Some(path) = &options.pidfile {
            sys::pidfile::write(path, root)?;
        }
        hooks.run(Action::PostRestore, dir.path(), Some(root))?;
        hooks.run(Action::PreResume, dir.path(), Some(root))?;
        kinds::fd::ghost::remove_links(&checkpoint.files);
        // Last of all: from here on nothing is done that a watch would see, or that takes time.
        let first_with = |id: u32| checkpoint.first_with(id);
        let cx = ArmCx { files: &files, first_with: &first_with };
        for (_, fd, kind, entry) in checkpoint.files.opened(&files) {
            kind.arm(entry, fd, &cx)?;
        }
        server.as_ref().map_or(Ok(()), Server::await_ready)
    })?;
    segments.keep();
    let mut files: Vec<OwnedFd> = files.into_values().collect();
    std::thread::scope(|scope| {
        // Many take as long as all the rest that is left to do.
        let half = files.split_off(files.len() / 2);
        scope.spawn(|| sys::fd::close(half));
        sys::fd::close(files);
        drop(checkpoint);
    });
    let stats = RestoreStats { restore_us: started.elapsed().as_micros() as u64, ..stats };
    StatsEntry::from(&stats).write(&options.work_dir);
    options.progress.restored(&stats);
    if options.auto_dedup && server.is_none() {
        crate::lazy::free(&dir);
    }
    if let Err(failure) = hooks.run(Action::PostResume, dir.path(), Some(root)) {
        log::warn!("{failure}");
    }
    Ok(Outcome::Resumed(Resumed { root }))
}

/// Every file that a task uses, by id.
struct Opened {
    files: IdMap<OwnedFd>,
    /// Those for which something else stands until the tasks are there, in the order of their turns.
    late: [Vec<u32>; 2],
    stand_ins: HashMap<i32, StandIn>,
    terminals: Vec<Control>,
}

/// What is handed on from those that are opened to those that follow, see [`OpenCx`].
#[derive(Default)]
struct Handed {
    opened: IdMap<OwnedFd>,
    stand_ins: HashMap<i32, StandIn>,
    terminals: Vec<Control>,
}

/// A failure is many times as large as a descriptor, and rare.
#[derive(Default)]
struct Results {
    opened: Vec<(u32, OwnedFd)>,
    failures: Vec<Failure>,
}

impl Results {
    fn add(&mut self, id: u32, result: Result<OwnedFd, Failure>) {
        match result {
            Ok(fd) => self.opened.push((id, fd)),
            Err(failure) => self.failures.push(failure),
        }
    }
}

struct Opening<'r> {
    checkpoint: &'r Checkpoint,
    options: &'r Options,
    dir: &'r Dir,
}

impl Opening<'_> {
    /// Files that a task uses.
    fn used(&self) -> Vec<u32> {
        let checkpoint = self.checkpoint;
        let tasks = checkpoint.tasks.iter().filter(|task| !task.is_zombie());
        let used = checkpoint
            .tables
            .values()
            .flatten()
            .map(|entry| entry.id)
            .chain(tasks.flat_map(|task| {
                let mapped = task.mm.vmas.iter().filter_map(kinds::vma::file_id);
                [task.mm.exe_file_id, task.fs.cwd_id, task.fs.root_id].into_iter().chain(mapped)
            }))
            .chain(checkpoint.in_flight.iter().copied());
        let mut used: Vec<u32> = used.collect();
        used.sort_unstable();
        used.dedup();
        used
    }

    /// Opens files, one after the other.
    ///
    /// What is made and nobody asked for is closed with the shelf: an end without an owner.
    fn open(&self, ids: &[u32], handed: &mut Handed) -> Results {
        let fill = |id: u64, to: &OwnedFd| pages::put::fill_file(&self.checkpoint.chain, id, to);
        let mut cx = OpenCx {
            options: self.options,
            images: self.dir,
            shelf: Shelf::default(),
            files: &self.checkpoint.files,
            opened: std::mem::take(&mut handed.opened),
            stand_ins: std::mem::take(&mut handed.stand_ins),
            terminals: std::mem::take(&mut handed.terminals),
            fill: &fill,
        };
        let found = ids.iter().filter_map(|id| Some((*id, self.checkpoint.files.get(*id)?)));
        let mut results = Results { opened: Vec::with_capacity(ids.len()), ..Results::default() };
        for (id, (kind, entry)) in found {
            let given = inherited(self.options, kind, entry, &self.checkpoint.files).map(|given| {
                let fd = given?;
                kind.inherited(entry, &fd, &mut cx).map(|()| fd)
            });
            results.add(id, given.unwrap_or_else(|| kind.open(entry, &mut cx)));
        }
        *handed = Handed { opened: cx.opened, stand_ins: cx.stand_ins, terminals: cx.terminals };
        results
    }

    /// Opens every file that a task uses; those that stand alone on all processors.
    fn open_files(&self, failures: &mut Failures) -> Opened {
        const MANY: usize = 64;
        let files_of = &self.checkpoint.files;
        let used = self.used();
        let tids: HashSet<i32> = self.checkpoint.tasks.iter().flat_map(|task| &task.tids).copied().collect();
        let is = |id: &u32, what: &dyn Fn(&dyn AnyFdKind, &dyn Any) -> bool| {
            files_of.get(*id).is_some_and(|(kind, entry)| what(kind, entry))
        };
        let is_late = |id: &u32| is(id, &|kind, entry| kind.is_late(entry, files_of, &tids));
        let comes_last = |id: &u32| is(id, &|kind, _| kind.comes_last());
        let (late, used): (Vec<u32>, Vec<u32>) = used.into_iter().partition(is_late);
        let workers = agent::crew::size();
        let mut groups = vec![Vec::new(); workers];
        let mut together = Vec::new();
        for id in &used {
            let group = files_of.get(*id).and_then(|(kind, entry)| kind.group(entry, files_of));
            let share = group.map(|group| (group % workers as u64) as usize);
            share.map_or(&mut together, |share| &mut groups[share]).push(*id);
        }
        let (mut last, together): (Vec<u32>, Vec<u32>) = together.into_iter().partition(comes_last);
        let mut late = [late, Vec::new()];
        if late[0].iter().any(|id| self.checkpoint.in_flight.contains(id)) {
            // What holds them can be filled only then.
            late[1] = std::mem::take(&mut last);
        }
        let keys: HashSet<String> = match self.options.inherit_fd.is_empty() {
            true => HashSet::new(),
            false => used
                .iter()
                .filter_map(|id| files_of.get(*id))
                .filter_map(|(kind, entry)| kind.key(entry, files_of))
                .collect(),
        };
        for (fd, key) in self.options.inherit_fd.iter().filter(|(_, key)| !keys.contains(key)) {
            let object = Object::Named(format!("--inherit-fd fd[{fd}]:{key}"));
            failures.push(Failure::conflict(object, "", "no file of the images has this key"));
        }
        let mut keep = |results: Vec<Results>, files: &mut IdMap<OwnedFd>| {
            let opened = results.into_iter().flat_map(|results| {
                failures.extend(results.failures);
                results.opened
            });
            files.add(opened);
        };
        // What has no others in its queues need not wait for them.
        let (early, last) = if self.checkpoint.has_queued { (Vec::new(), last) } else { (last, Vec::new()) };
        let mut handed = Handed::default();
        let results = std::thread::scope(|scope| {
            let open = |ids: &[u32]| self.open(ids, &mut Handed::default());
            let (many, few): (Vec<&Vec<u32>>, Vec<_>) = groups.iter().partition(|ids| ids.len() >= MANY);
            let others: Vec<_> = many.into_iter().map(|ids| scope.spawn(move || open(ids))).collect();
            let mut results: Vec<Results> = few.into_iter().map(|ids| open(ids)).collect();
            results.extend([&together, &early].map(|ids| self.open(ids, &mut handed)));
            results.extend(others.into_iter().map(|other| other.join().expect("a worker does not panic")));
            results
        });
        keep(results, &mut handed.opened);
        let results = self.open(&last, &mut handed);
        keep(vec![results], &mut handed.opened);
        let Handed { opened: mut files, stand_ins, terminals } = handed;
        let nothing = || {
            let opened = sys::fd::open(Path::new("/dev/null"), libc::O_PATH);
            opened.map_err(|error| error.on(Object::Tree, "keep a place for files to come"))
        };
        let mut places = Results::default();
        late.iter().flatten().for_each(|id| places.add(*id, nothing()));
        keep(vec![places], &mut files);
        Opened { files, late, stand_ins, terminals }
    }

    /// Opens the files that can be opened only when the tasks are there, in their places among `files`.
    fn open_late(&self, late: &[Vec<u32>; 2], files: &IdMap<OwnedFd>) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(Object::Tree, "open what belongs to its processes");
        for ids in late {
            let mut handed = Handed::default();
            let there = self.checkpoint.in_flight.iter().filter(|id| !ids.contains(id));
            let there = there.filter_map(|id| Some((*id, files.get(*id)?)));
            let copies =
                there.map(|(id, fd)| fd.try_clone().map(|fd| (id, fd))).collect::<Result<Vec<_>, _>>();
            handed.opened.add(copies.map_err(|error| explain(sys::memory::io_errno("dup", &error)))?);
            let results = self.open(ids, &mut handed);
            if let Some(failure) = results.failures.into_iter().next() {
                return Err(failure);
            }
            for (id, fd) in results.opened {
                sys::fd::replace(&files[id], &fd).map_err(explain)?;
            }
        }
        Ok(())
    }
}

/// Lets those go that nobody works in; whoever does has to find them until it is there.
fn keep_stand_ins(
    stand_ins: &mut HashMap<i32, StandIn>,
    checkpoint: &Checkpoint,
    plan: &Plan,
) -> Vec<Failure> {
    let mut needed: HashMap<i32, i32> = HashMap::new();
    for task in checkpoint.tasks.iter().filter(|task| !task.is_zombie()) {
        for id in [task.fs.cwd_id, task.fs.root_id] {
            let entry = checkpoint.files.entry::<Regular>(id);
            let found = match (checkpoint.files.remap(id), entry) {
                (Some(Remap::Process(pid)), _) => Some(*pid),
                (None, Some(entry)) => checkpoint.files.ended(&regular::path_of(entry)),
                _ => None,
            };
            needed.extend(found.map(|pid| (pid, task.pid)));
        }
    }
    stand_ins.retain(|pid, _| needed.contains_key(pid));
    let is_taken = |pid: i32| {
        checkpoint.tasks.iter().any(|task| task.tids.contains(&pid))
            || plan.stand_ins.iter().any(|stand_in| stand_in.id == pid)
    };
    let taken = needed.iter().filter(|(pid, _)| is_taken(**pid));
    taken
        .map(|(pid, user)| {
            let why = format!("works in the /proc of process {pid}, whose id somebody else needs now");
            Failure::unsupported(Object::Task, why).of(*user)
        })
        .collect()
}

/// A duplicate of the descriptor of ours that `--inherit-fd` gives in the place of a file, if it does.
fn inherited(
    options: &Options,
    kind: &dyn AnyFdKind,
    entry: &dyn Any,
    files: &FileTable,
) -> Option<Result<OwnedFd, Failure>> {
    if options.inherit_fd.is_empty() {
        return None;
    }
    let key = kind.key(entry, files)?;
    let (fd, _) = options.inherit_fd.iter().find(|(_, given)| *given == key)?;
    let object = || Object::Named(format!("--inherit-fd fd[{fd}]:{key}"));
    let wanted = [("pipe:", libc::S_IFIFO), ("socket:", libc::S_IFSOCK), ("tty[", libc::S_IFCHR)];
    let wanted = wanted.iter().find(|(kind, _)| key.starts_with(kind)).map(|(_, format)| *format);
    let fd = sys::inherited::duplicate(*fd).and_then(|fd| sys::fd::stat(&fd).map(|stat| (fd, stat)));
    Some(match fd {
        Ok((fd, stat)) if wanted.is_none_or(|format| stat.st_mode & libc::S_IFMT == format) => Ok(fd),
        Ok(_) => Err(Failure::conflict(object(), "", "the descriptor is of another kind")),
        Err(error) => Err(error.on(object(), "use the descriptor")),
    })
}

/// Files that a mapping needs opened otherwise than their record says: by id and flags.
fn mapped_files(
    checkpoint: &Checkpoint,
    files: &IdMap<OwnedFd>,
    failures: &mut Failures,
) -> HashMap<(u32, u32), OwnedFd> {
    let mut mapped = HashMap::new();
    for entry in checkpoint.tasks.iter().flat_map(|task| &task.mm.vmas) {
        let (Some(id), Some(flags)) = (kinds::vma::file_id(entry), entry.fdflags) else { continue };
        let mode = flags & libc::O_ACCMODE as u32;
        let Some(fd) = files.get(id) else { continue };
        let is_enough = sys::fd::status_flags(fd).is_ok_and(|have| {
            let have = have & libc::O_ACCMODE as u32;
            have == mode || have == libc::O_RDWR as u32
        });
        if is_enough || mapped.contains_key(&(id, mode)) {
            continue;
        }
        match kinds::contract::reopen(fd, mode) {
            Ok(fd) => {
                mapped.insert((id, mode), fd);
            }
            Err(error) => {
                failures.push(error.on(Object::Named(format!("mapped file {id}")), "open it for mapping"))
            }
        }
    }
    mapped
}
