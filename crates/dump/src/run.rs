//! A dump from beginning to end.

use crate::copies::{Seen, Way};
use crate::freeze::{FinalState, Tree, freeze};
use crate::keep::Keeping;
use crate::observe::Depth;
use crate::past::{Past, Runs, divide};
use crate::survey::{Census, Reading};
use crate::{copies, encode, hands, observe, secrets, survey, track};
use agent::crew;
use agent::hands::Hands;
use image::pagemap::Run;
use image::{Dir, StatsEntry, Writer};
use kinds::contract::DumpCx;
use kinds::fd::ghost::{self, Links};
use kinds::fd::{secret, tty, uring};
use kinds::vma::sysv;
use model::hooks::Action;
use model::stats::DumpStats;
use model::{Errno, Failure, Failures, Hooks, Object, Options, Remedy};
use pages::ahead::Ahead;
use pages::away::Ended;
use pages::select::Question;
use pages::server::{self, Receiver};
use pages::take::{Aside, Job, Owner, Source, Taken, data_runs, take};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How often a tree that is in a passing state is tried, and how long it goes on after the first time; each pause is
/// longer than the one before. With the last it has had about a second.
const TRIES: u32 = 30;
const PAUSE: Duration = Duration::from_millis(2);

/// Descriptors that a dump has open at a time, if the tree is not large: duplicates and its own.
const DESCRIPTORS: usize = 1024;

/// Saves a tree.
///
/// # Errors
/// Everything that stands in the way. The tree then runs on, and the folder holds no dump.
pub fn run(options: &Options) -> Result<(), Failures> {
    let root = options.tree.ok_or_else(|| Failure::conflict(Object::Tree, "", "no process is named"))?;
    let dir = Dir::open(&options.images_dir)?;
    let hooks = Hooks::new(options.action_scripts.clone());
    hooks.run(Action::PreDump, dir.path(), Some(root))?;
    let mut receiver = connect(options)?;
    let mut keeping = options.lazy_pages.then(|| Keeping::begin(options)).transpose()?;
    let mut tries = 0;
    let goes_on = options.leave_running || options.leave_stopped;
    let find_past = || Past::of(options, &dir, options.track_mem && goes_on);
    sys::apart::go_on()?;
    let mut past = find_past()?;
    past.save_ahead(root, options, &dir);
    loop {
        tries += 1;
        let taking = Taking::new(&dir, options, receiver.as_mut());
        let Err(failures) = dump(root, options, taking, &mut past, &mut keeping, &hooks) else {
            return Ok(());
        };
        dir.discard();
        if past.is_spent() {
            past = find_past()?;
        }
        if tries == TRIES || !failures.iter().all(|failure| failure.is_passing) {
            return Err(failures);
        }
        failures.iter().for_each(|failure| log::info!("not now: {failure}"));
        std::thread::sleep(PAUSE * tries);
    }
}

pub fn micros(since: Instant) -> u32 {
    since.elapsed().as_micros().try_into().unwrap_or(u32::MAX)
}

/// Reaches the page server, if pages go there.
///
/// # Errors
/// When nobody answers, or not in the way that is wanted.
pub fn connect(options: &Options) -> Result<Option<Receiver>, Failure> {
    let connection = options.page_server.then(|| server::connect(options)).transpose()?;
    connection.map(|connection| Receiver::new(connection, options.compress)).transpose()
}

fn dump(
    root: i32,
    options: &Options,
    mut taking: Taking,
    past: &mut Past,
    keeping: &mut Option<Keeping>,
    hooks: &Hooks,
) -> Result<(), Failures> {
    let dir = taking.dir;
    let start = Instant::now();
    options.progress.stage("freeze");
    sys::apart::go_on()?;
    let descriptors = sys::fd::count(root).unwrap_or(0);
    sys::fd::reserve(DESCRIPTORS.max(descriptors * 2));
    observe::expect_descriptors(descriptors);
    let own_namespaces = observe::namespaces("self");
    let mut tree = freeze(root, Duration::from_secs(options.timeout_s.max(1).into()))?;
    let freezing_us = micros(start);
    log::info!("froze {} processes in {freezing_us} us", tree.processes.len());

    let frozen = Instant::now();
    options.progress.stage("survey");
    let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
    past.is_of(&pids);
    let mut way = copies::way(options, &tree);
    let wants_copies = way == Way::Copied;
    let depth = Depth { flags: !wants_copies, pages: past.ask(wants_copies) };
    let has_pages = past.watches() || depth.pages.is_some();
    let mut survey = survey::survey(&mut tree, options, depth, own_namespaces)?;
    let mut watched = Vec::new();
    if survey.is_good() {
        watched = past.watch(&mut tree, survey.looks_mut())?;
        past.tell(&pids);
        let looks: Vec<Seen> = survey.looks().collect();
        let limit = past.ahead().and_then(|ahead| ahead.limit(&looks));
        let is_little =
            has_pages && copies::is_little(&looks, limit.unwrap_or(copies::SMALL), |pid| past.pages(pid));
        way = match way {
            Way::Copied if is_little && options.copy_on_write != Some(true) => Way::PutAside,
            Way::StandsStill if is_little && limit.is_some() => Way::PutAside,
            Way::Copied => copies::make(&mut tree, &looks),
            way => way,
        };
    } else if way == Way::Copied {
        way = Way::StandsStill;
    }
    if way != Way::PutAside
        && let Some(ahead) = past.ahead()
    {
        ahead.forget();
    }
    let is_copied = way == Way::Copied;
    let let_go = |tree: &mut Tree| {
        tree.let_go();
        let us = micros(frozen);
        log::info!("the tree stood still for {us} us");
        us
    };
    let (mut census, links, mut frozen_us, mut saved, sharing);
    if is_copied && survey.looks().all(|(_, look)| look.is_plain()) {
        dir.begin()?;
        past.link(dir)?;
        links = taking.shared(survey.cx())?;
        drop(tty::write(survey.cx())?);
        frozen_us = Some(let_go(&mut tree));
        census = survey.conclude(&tree, &|pid, look| {
            let mut reading = copies::read(&tree.copies, pid, (!has_pages).then_some(Question::WhatIsThere))?;
            if has_pages {
                reading.memory.pages = std::mem::take(&mut look.memory.pages);
                reading.memory.keep_content();
            }
            Ok(reading)
        })?;
        saved = Saved::of(&mut census, past);
        sharing = share(&mut saved, options)?;
    } else {
        census = survey.conclude(&tree, &|pid, look| {
            let mut memory = std::mem::take(&mut look.memory);
            if !depth.flags {
                // What is new was asked before writes began to be noted anew: now nothing would be.
                let pages = std::mem::take(&mut memory.pages);
                memory = observe::read_memory(pid, (!has_pages).then_some(Question::WhatIsThere))?;
                if has_pages {
                    memory.pages = pages;
                    memory.keep_content();
                }
            }
            let is_ours = || past.is_ours(pid) || watched.iter().any(|watched| watched.is_of(pid));
            if memory.is_watched() && (is_ours() || track::Known::find().has(pid)) {
                memory.forget_watch();
            }
            Ok(Reading { from: pid, memory })
        })?;
        secrets::read(&mut tree, secret::readings(&mut census.cx)?)?;
        log::info!("surveyed the tree in {} us", micros(frozen));
        sys::apart::go_on()?;
        dir.begin()?;
        past.link(dir)?;
        links = taking.shared(&mut census.cx)?;
        frozen_us = None;
        if is_copied {
            for process in &mut census.processes {
                process.memory_of = tree.copies.of(process.pid).map_or(process.pid, |copy| copy.pid);
            }
            drop(tty::write(&mut census.cx)?);
            frozen_us = Some(let_go(&mut tree));
        }
        saved = Saved::of(&mut census, past);
        sharing = share(&mut saved, options)?;
        if way == Way::PutAside {
            put_aside(&mut saved)?;
            if copies::are_wanted(options) {
                drop(tty::write(&mut census.cx)?);
                frozen_us = Some(let_go(&mut tree));
            }
        }
    }
    if let Some(keeping) = keeping {
        keeping.keep(&mut saved, &census.processes, &sharing)?;
    }
    hands::give(&mut tree, &mut saved, options, dir);
    taking.memory(saved)?;
    hands::end(&mut tree);
    taking.finish()?;

    sys::apart::go_on()?;
    options.progress.stage("images");
    let scanned = census.processes.iter().map(|process| process.scanned_pages).sum();
    // As late as can be: what it takes is missing in the tree until that goes on.
    let queues = tty::write(&mut census.cx)?;
    let segments = sysv::ids(&mut census.cx);
    let held = uring::held(&mut census.cx);
    write_images(&encode::encode(census), dir)?;
    dir.finish(&encode::inventory(&past.run_id))?;
    let state = match options {
        Options { leave_running: true, .. } => FinalState::Running,
        Options { leave_stopped: true, .. } => FinalState::Stopped,
        _ => FinalState::Killed,
    };
    hooks.run(Action::PostDump, dir.path(), Some(root))?;
    sys::apart::go_on()?;
    if let Some(keeping) = keeping.take() {
        hooks.run(Action::StatusReady, dir.path(), Some(root))?;
        match keeping.hand_out(options)? {
            Ended::Taken(pages) => log::info!("handed out {pages} pages"),
            Ended::Given(failure) => return Err(failure.into()),
            Ended::Torn(failure) => {
                log::error!("{failure}");
                tree.finish(FinalState::Stopped);
                return Err(torn(root).into());
            }
        }
    }
    let frozen_us = frozen_us.unwrap_or_else(|| micros(frozen));
    match state {
        FinalState::Killed => {
            links.keep();
            queues.keep();
        }
        _ => drop(queues),
    }
    past.forget();
    dedup(options, dir);
    if let Err(failure) = track::keep(watched, &past.run_id) {
        log::warn!("the next snapshot has to save everything: {failure}");
    }
    let is_gone = matches!(state, FinalState::Killed);
    tree.finish(state);
    if is_gone {
        held.await_end();
        sysv::remove(&segments);
    }
    taking.report(freezing_us, frozen_us, scanned);
    Ok(())
}

/// Pages are on the other side: the tree must not run on here by itself.
fn torn(root: i32) -> Failure {
    let why = "the other side had a part of it when it was lost; the tree is stopped here";
    let advice = "kill -CONT lets it run on, where it does not run there";
    Failure::conflict(Object::Tree, "hand its memory over", why).help(Remedy::Advice(advice)).of(root)
}

/// Pages on their way into images.
pub struct Taking<'d> {
    dir: &'d Dir,
    options: &'d Options,
    /// The page server.
    receiver: Option<&'d mut Receiver>,
    /// The number of the last pages file.
    last_id: u32,
    taken: Taken,
    /// Pages that the images before have.
    unchanged_pages: u64,
    us: u32,
}

impl<'d> Taking<'d> {
    /// `receiver` is the page server, if pages go there.
    pub fn new(dir: &'d Dir, options: &'d Options, receiver: Option<&'d mut Receiver>) -> Taking<'d> {
        let taken = Taken::default();
        Taking { dir, options, receiver, last_id: 0, taken, unchanged_pages: 0, us: 0 }
    }

    /// Waits until the page server has everything.
    ///
    /// # Errors
    /// When it could not keep it.
    pub fn finish(&mut self) -> Result<(), Failure> {
        self.receiver.take().map_or(Ok(()), Receiver::close)
    }

    /// Tells what it came to: times in microseconds, and pages that were looked at.
    pub fn report(&self, freezing_us: u32, frozen_us: u32, pages_scanned: u64) {
        let stats = DumpStats {
            freezing_us: freezing_us.into(),
            frozen_us: frozen_us.into(),
            memdump_us: self.us.into(),
            memwrite_us: self.us.into(),
            pages_scanned,
            pages_skipped_parent: self.unchanged_pages,
            pages_written: self.taken.written_pages,
            ..DumpStats::default()
        };
        StatsEntry::from(&stats).write(&self.options.work_dir);
        self.options.progress.dumped(&stats);
    }

    fn job(&mut self, source: Source, runs: Runs, owner: Owner) -> Job {
        self.last_id += 1;
        Job { source, runs, elsewhere: Vec::new(), owner, pages_id: self.last_id, ahead: None, hands: None }
    }

    fn take(&mut self, jobs: Vec<Job>) -> Result<(), Failure> {
        let begun = Instant::now();
        let progress = self.options.progress.clone();
        let taken = match &mut self.receiver {
            Some(receiver) => send(&jobs, receiver, &|pages| progress.pages_done(pages))?,
            None => take(jobs, self.dir, self.options.compress, &|pages| progress.pages_done(pages))?,
        };
        self.taken.written_pages += taken.written_pages;
        self.taken.zero_pages += taken.zero_pages;
        self.us += micros(begun);
        Ok(())
    }

    /// Saves what processes that run on might change: the content of files in memory, and of files without a
    /// name. Makes the links that the survey has noted.
    fn shared(&mut self, cx: &mut DumpCx) -> Result<Links, Failure> {
        self.options.progress.stage("pages");
        let mut jobs = Vec::with_capacity(cx.contents.len());
        for (id, fd) in cx.contents.drain(..) {
            let owner = Owner::Shared(id);
            let file = File::from(fd);
            let runs =
                data_runs(&file).map_err(|error| error.on(Object::Path(owner.pagemap()), "find its data"))?;
            jobs.push(self.job(Source::File(file), runs, owner));
        }
        self.take(jobs)?;
        let links = ghost::make_links(cx)?;
        ghost::write(cx, self.dir)?;
        Ok(links)
    }

    /// Saves what processes have for themselves.
    pub fn memory(&mut self, saved: Vec<Saved>) -> Result<(), Failure> {
        self.options.progress.stage("pages");
        let has_relatives = saved.len() > 1;
        let mut jobs = Vec::with_capacity(saved.len());
        for Saved { pid, memory_of, runs_on, aside, ahead, hands, runs, elsewhere, .. } in saved {
            let has_relatives = has_relatives || pid != memory_of;
            let of_process = || Source::Process { pid: memory_of, has_relatives, runs: runs_on };
            let source = aside.map_or_else(of_process, Source::Aside);
            let unchanged = elsewhere.iter().filter(|run| run.same_as.is_none());
            self.unchanged_pages += unchanged.map(|run| run.len() / 4096).sum::<u64>();
            jobs.push(Job { elsewhere, ahead, hands, ..self.job(source, runs, Owner::Task(pid)) });
        }
        let bytes: u64 = jobs.iter().flat_map(|job| &job.runs).map(|run| run.0.end - run.0.start).sum();
        self.options.progress.pages_total(bytes / 4096);
        self.take(jobs)?;
        log::info!("wrote {} pages in {} us", self.taken.written_pages, self.us);
        Ok(())
    }
}

/// Pages that relatives have in common, in a whole tree, from which on they are stored once: below, images stay
/// readable for CRIU, which knows no such thing.
pub const WORTH_SHARING: u64 = 4 << 20;

/// The part of a child's pages that it shares at least with its parent, if for that the memory of both is to be there before
/// they run: as much more memory is taken where it comes later.
const WORTH_WAITING: u64 = 32;

/// Finds the pages that processes have in common with those who made them, if these are to be stored once. Returns the
/// processes that have some.
pub fn share(saved: &mut [Saved], options: &Options) -> Result<HashSet<i32>, Failure> {
    if !options.share_pages || options.page_server {
        return Ok(HashSet::new());
    }
    let places: HashMap<i32, usize> = saved.iter().enumerate().map(|(at, one)| (one.pid, at)).collect();
    let children: Vec<&Saved> = saved.iter().filter(|one| places.contains_key(&one.parent)).collect();
    let size = |one: &&Saved| one.runs.iter().map(|run| run.0.end - run.0.start).sum::<u64>();
    if children.iter().map(size).sum::<u64>() < WORTH_SHARING {
        return Ok(HashSet::new());
    }
    let compare = |one: &Saved| {
        let parent = &saved[places[&one.parent]];
        let explain = |error: Errno| error.on(Object::Task, "find the pages it shares").of(one.pid);
        let open = |pid: i32| {
            File::open(format!("/proc/{pid}/pagemap"))
                .map_err(|error| explain(sys::memory::io_errno("open", &error)))
        };
        let mut stored: Vec<Range<u64>> = parent.runs.iter().map(|run| run.0.clone()).collect();
        stored.extend(parent.elsewhere.iter().map(|run| run.range.clone()));
        stored.sort_by_key(|range| range.start);
        let (child, maker) = (open(one.memory_of)?, open(parent.memory_of)?);
        let (same, rest) =
            pages::shared::split(&child, &maker, one.runs.clone(), &stored).map_err(explain)?;
        Ok((places[&one.pid], parent.pid, same, rest))
    };
    let compare_all = |share: &[&Saved]| share.iter().map(|one| compare(one)).collect::<Result<Vec<_>, _>>();
    let compared = crew::in_parallel(&children, 2, compare_all);
    let found = compared.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten();
    let size = |same: &[Range<u64>]| same.iter().map(|range| range.end - range.start).sum::<u64>();
    let is_worth_it = |same: &[Range<u64>], rest: &Runs| {
        let all = size(same) + rest.iter().map(|(range, _)| range.end - range.start).sum::<u64>();
        !same.is_empty() && (!options.lazy_pages || size(same) * WORTH_WAITING >= all)
    };
    let found: Vec<_> = found.filter(|(_, _, same, rest)| is_worth_it(same, rest)).collect();
    let total: u64 = found.iter().map(|(_, _, same, _)| size(same)).sum();
    if total < WORTH_SHARING {
        return Ok(HashSet::new());
    }
    log::info!("{} pages are stored once that relatives have in common", total / 4096);
    let mut sharing = HashSet::with_capacity(found.len());
    for (at, parent, same, rest) in found {
        sharing.insert(saved[at].pid);
        saved[at].runs = rest;
        saved[at].elsewhere.extend(same.into_iter().map(|range| Run::same_as(range, parent as u32)));
    }
    Ok(sharing)
}

/// Frees in the folders before what this one has anew, if that was asked for. The dump is whole in any case.
pub fn dedup(options: &Options, dir: &Dir) {
    if !options.auto_dedup {
        return;
    }
    match pages::chain::dedup(dir) {
        Ok(pages) => log::info!("freed {pages} pages in the images before"),
        Err(failure) => log::warn!("{failure}"),
    }
}

/// Sends jobs to a page server, one after the other.
fn send(jobs: &[Job], receiver: &mut Receiver, done: &dyn Fn(u64)) -> Result<Taken, Failure> {
    let mut taken = Taken::default();
    for job in jobs {
        taken.written_pages += receiver.send(job)?;
        done(job.runs.iter().map(|(range, _)| (range.end - range.start) / 4096).sum());
    }
    Ok(taken)
}

/// The memory of one process, on its way into images.
pub struct Saved {
    pub pid: i32,
    pub parent: i32,
    /// Where it is read: the process, or its copy.
    pub memory_of: i32,
    /// It runs while it is read.
    pub runs_on: bool,
    /// Or what was read of it already.
    pub aside: Option<Aside>,
    /// What was saved before that.
    pub ahead: Option<Ahead>,
    /// Who may move it.
    pub hands: Option<Hands>,
    pub runs: Runs,
    /// What the images before have, or another process.
    pub elsewhere: Vec<Run>,
}

impl Saved {
    /// Of every living process.
    fn of(census: &mut Census, past: &mut Past) -> Vec<Saved> {
        let alive = census.processes.iter_mut().filter(|process| process.cores[0].1.thread_core.is_some());
        let saved = alive.map(|process| {
            let (pid, parent, memory_of) = (process.pid, process.pstree.ppid as i32, process.memory_of);
            let (unchanged, runs) = divide(std::mem::take(&mut process.runs), past.pages(pid));
            let (elsewhere, ahead) = past.claim(pid, unchanged);
            let (runs_on, aside, hands) = (false, None, None);
            Saved { pid, parent, memory_of, runs_on, aside, ahead, hands, runs, elsewhere }
        });
        saved.collect()
    }
}

/// Reads what is to be saved of processes that stand still.
fn put_aside(saved: &mut [Saved]) -> Result<(), Failure> {
    let has_relatives = saved.len() > 1;
    for one in saved {
        one.aside = Some(Aside::read(one.pid, has_relatives, &one.runs)?);
    }
    Ok(())
}

/// Writes them, when there are many on all processors: what it takes is making the files.
fn write_images(images: &[(String, Writer)], dir: &Dir) -> Result<(), Failure> {
    const MANY: usize = 65;
    let write =
        |images: &[(String, Writer)]| images.iter().try_for_each(|(name, image)| dir.write(name, image));
    crew::in_parallel(images, MANY, write).into_iter().collect()
}
