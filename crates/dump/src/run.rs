//! A dump from beginning to end.

use crate::freeze::{FinalState, freeze};
use crate::{encode, survey};
use image::{Dir, StatsEntry, Writer};
use kinds::fd::ghost;
use model::hooks::Action;
use model::stats::DumpStats;
use model::{Failure, Failures, Hooks, Object, Options};
use pages::take::{Job, Source, data_runs, take};
use std::fs::File;
use std::time::{Duration, Instant};

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
    let result = dump(root, options, &dir, &hooks);
    if let Err(failures) = result {
        dir.discard();
        return Err(failures);
    }
    Ok(())
}

fn micros(since: Instant) -> u32 {
    since.elapsed().as_micros().try_into().unwrap_or(u32::MAX)
}

fn dump(root: i32, options: &Options, dir: &Dir, hooks: &Hooks) -> Result<(), Failures> {
    let start = Instant::now();
    options.progress.stage("freeze");
    sys::apart::go_on()?;
    sys::fd::reserve(DESCRIPTORS.max(sys::fd::count(root).unwrap_or(0) * 2));
    let mut tree = freeze(root, Duration::from_secs(options.timeout_s.max(1).into()))?;
    let freezing_time = micros(start);
    log::info!("froze {} processes in {freezing_time} us", tree.processes.len());

    let frozen = Instant::now();
    options.progress.stage("survey");
    let mut census = survey::survey(&mut tree, options)?;
    log::info!("surveyed the tree in {} us", micros(frozen));

    sys::apart::go_on()?;
    dir.begin()?;
    let memory = Instant::now();
    options.progress.stage("pages");
    let jobs = jobs(&mut census)?;
    let bytes: u64 = jobs.iter().flat_map(|job| &job.runs).map(|run| run.0.end - run.0.start).sum();
    options.progress.pages_total(bytes / 4096);
    let scanned: u64 = census.processes.iter().map(|process| process.scanned_pages).sum();
    let progress = options.progress.clone();
    let taken = take(&jobs, dir, &|pages| progress.pages_done(pages))?;
    let memdump_time = micros(memory);
    log::info!("wrote {} pages in {memdump_time} us", taken.written_pages);

    sys::apart::go_on()?;
    options.progress.stage("images");
    let links = ghost::make_links(&mut census.cx)?;
    ghost::write(&mut census.cx, dir)?;
    write_images(&encode::encode(census), dir)?;
    dir.finish(&encode::inventory()?)?;
    let state = match options {
        Options { leave_running: true, .. } => FinalState::Running,
        Options { leave_stopped: true, .. } => FinalState::Stopped,
        _ => FinalState::Killed,
    };
    hooks.run(Action::PostDump, dir.path(), Some(root))?;
    sys::apart::go_on()?;
    let frozen_time = micros(frozen);
    if matches!(state, FinalState::Killed) {
        links.keep();
    }
    tree.finish(state);
    let stats = DumpStats {
        freezing_us: freezing_time.into(),
        frozen_us: frozen_time.into(),
        memdump_us: memdump_time.into(),
        memwrite_us: memdump_time.into(),
        pages_scanned: scanned,
        pages_written: taken.written_pages,
        ..DumpStats::default()
    };
    StatsEntry::from(&stats).write(&options.work_dir);
    options.progress.dumped(&stats);
    Ok(())
}

fn jobs(census: &mut survey::Census) -> Result<Vec<Job>, Failure> {
    let mut jobs = Vec::new();
    let has_relatives = census.processes.len() > 1;
    for process in &mut census.processes {
        let is_zombie = process.cores[0].1.thread_core.is_none();
        if !is_zombie {
            jobs.push(Job {
                source: Source::Process { pid: process.pid, has_relatives },
                runs: std::mem::take(&mut process.runs),
                pagemap: format!("pagemap-{}.img", process.pid),
                pages_id: jobs.len() as u32 + 1,
            });
        }
    }
    for (id, fd) in census.cx.contents.drain(..) {
        let pagemap = format!("pagemap-shmem-{id}.img");
        let file = File::from(fd);
        let runs =
            data_runs(&file).map_err(|error| error.on(Object::Path(pagemap.clone()), "find its data"))?;
        jobs.push(Job { source: Source::File(file), runs, pagemap, pages_id: jobs.len() as u32 + 1 });
    }
    Ok(jobs)
}

/// Writes them, when there are many on all processors: what it takes is making the files.
fn write_images(images: &[(String, Writer)], dir: &Dir) -> Result<(), Failure> {
    const MANY: usize = 64;
    let write =
        |images: &[(String, Writer)]| images.iter().try_for_each(|(name, image)| dir.write(name, image));
    if images.len() <= MANY {
        return write(images);
    }
    let share = images.len().div_ceil(agent::crew::size());
    std::thread::scope(|scope| {
        let writers: Vec<_> = images.chunks(share).map(|images| scope.spawn(move || write(images))).collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer does not panic"))
    })
}
