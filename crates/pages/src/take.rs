//! Pages out of processes and memory files, into `pages-*.img`.
//!
//! All sources are cut into chunks that a few workers read in parallel, each into one buffer of its own:
//! that is all the memory it takes, whatever the size of the sources. Pages of zeros are dropped on the way.
//! A file has to hold its pages without gaps and in order, so a worker that has read a chunk waits for its
//! place in the file before it writes; the writing itself is parallel again.

use crate::ahead::Ahead;
use crate::chain::split;
use crate::compressed::{self, Block};
use crate::select::How;
use agent::hands::{self, Hand, Hands};
use image::Dir;
use image::pagemap::{PRESENT, Pagemap, PagesFile, Run};
use model::{Compression, Errno, Failure, Object};
use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use sys::userfault::Growing;

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;
/// Bytes from which on it pays to map a file that is filled.
const GROWING: u64 = 8 << 20;
/// Of pages of which it is known that they are kept.
const KEPT: How = How { is_readable: true, keeps_zeros: true, is_clean: false, is_watched: false };
/// Ranges of one process_vm_readv(2).
pub(crate) const RANGES: usize = 512;

/// Where pages come from.
#[derive(Debug)]
pub enum Source {
    /// A process. Reading by process_vm_readv(2) is the fastest, but it pins pages, and the kernel
    /// (since 5.19) first gives a process that shares a page copy-on-write a copy of its own: only for a
    /// process without relatives. What is not there any more in one that `runs` is left out.
    Process { pid: i32, has_relatives: bool, runs: bool },
    /// A memory file; ranges are offsets.
    File(File),
    /// A process, read before.
    Aside(Aside),
}

/// Pages of a process, read at a time.
#[derive(Debug)]
pub struct Aside {
    /// Sorted, each with its place in the bytes.
    ranges: Vec<(Range<u64>, usize)>,
    /// One behind the other.
    bytes: Vec<u8>,
}

impl Aside {
    /// Reads these runs, which are sorted, of a process that stands still.
    ///
    /// # Errors
    /// Those of reading its memory.
    pub fn read(pid: i32, has_relatives: bool, runs: &[(Range<u64>, How)]) -> Result<Aside, Failure> {
        let mut len = 0;
        let place = |(range, _): &(Range<u64>, How)| {
            let at = len;
            len += (range.end - range.start) as usize;
            (range.clone(), at)
        };
        let ranges: Vec<(Range<u64>, usize)> = runs.iter().map(place).collect();
        let mut bytes = vec![0; len];
        let source = Source::Process { pid, has_relatives, runs: false };
        let mut at = 0;
        for runs in runs.chunks(RANGES) {
            at += read(&source, Owner::Task(pid), runs, &mut bytes[at..])?;
        }
        Ok(Aside { ranges, bytes })
    }

    /// What was in a range; none where not all of it was read.
    fn get(&self, range: &Range<u64>) -> Option<&[u8]> {
        let next = self.ranges.partition_point(|(one, _)| one.end <= range.start);
        let (one, begin) = self.ranges.get(next).filter(|(one, _)| one.start <= range.start)?;
        let at = begin + (range.start - one.start) as usize;
        (range.end <= one.end).then(|| &self.bytes[at..at + (range.end - range.start) as usize])
    }

    /// The pages of these runs that say something, each with its content.
    ///
    /// # Errors
    /// The run that was not read.
    #[allow(clippy::type_complexity)]
    fn parts(&self, runs: &[(Range<u64>, How)]) -> Result<Vec<(Range<u64>, &[u8])>, Range<u64>> {
        let mut parts: Vec<(Range<u64>, &[u8])> = Vec::with_capacity(runs.len());
        for (range, how) in runs {
            let bytes = self.get(range).ok_or_else(|| range.clone())?;
            let says = |page: &[u8]| how.keeps_zeros || !sys::memory::is_zero(page);
            let mut at = 0;
            for some in bytes.chunks(PAGE).collect::<Vec<_>>().chunk_by(|one, next| says(one) == says(next)) {
                let len = some.len() * PAGE;
                if says(some[0]) {
                    let start = range.start + at as u64;
                    parts.push((start..start + len as u64, &bytes[at..at + len]));
                }
                at += len;
            }
        }
        Ok(parts)
    }
}

/// What memory belongs to: a process, or all who map it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    Task(i32),
    Shared(u64),
}

impl Owner {
    /// The name of its page map.
    pub fn pagemap(self) -> String {
        match self {
            Owner::Task(pid) => format!("pagemap-{pid}.img"),
            Owner::Shared(id) => format!("pagemap-shmem-{id}.img"),
        }
    }
}

/// One pages file to be made.
#[derive(Debug)]
pub struct Job {
    pub source: Source,
    /// Sorted, each inside one mapping.
    pub runs: Vec<(Range<u64>, How)>,
    /// None of the above: pages that are stored elsewhere, in the parent folder or with another process.
    pub elsewhere: Vec<Run>,
    pub owner: Owner,
    pub pages_id: u32,
    /// What was saved before: then the source has what is missing, aside.
    pub ahead: Option<Ahead>,
    /// Who may move its pages without a buffer.
    pub hands: Option<Hands>,
}

impl Job {
    fn bytes(&self) -> u64 {
        length(&self.runs) as u64
    }
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    pub written_pages: u64,
    pub zero_pages: u64,
}

/// A part of a job that fits a buffer.
struct Chunk {
    job: usize,
    /// Place in its job.
    index: usize,
    runs: Vec<(Range<u64>, How)>,
}

/// A pages file, open.
pub(crate) struct Target {
    name: String,
    file: File,
    compression: Option<Compression>,
    /// The way in that lets several at a time, for a file in memory.
    growing: Option<Growing>,
}

impl Target {
    /// For the pages of a job, from so many workers.
    fn new(
        dir: &Dir,
        job: &Job,
        workers: usize,
        compression: Option<Compression>,
    ) -> Result<Target, Failure> {
        let id = job.pages_id;
        let (name, other) = match compression {
            Some(_) => (compressed::name(id), pages_name(id)),
            None => (pages_name(id), compressed::name(id)),
        };
        dir.remove(&other)?;
        let file = dir.create(&name)?;
        Target::of(file, name, job, workers, compression)
    }

    /// `file` is new.
    pub fn of(
        file: File,
        name: String,
        job: &Job,
        workers: usize,
        compression: Option<Compression>,
    ) -> Result<Target, Failure> {
        let len = job.bytes();
        let has_many = workers > 1 || job.hands.is_some();
        let is_worth_it = has_many && len >= GROWING && compression.is_none();
        let growing = is_worth_it.then(|| {
            let len = usize::try_from(len).ok()?;
            sys::fd::truncate(&file, len as u64).ok()?;
            match &job.hands {
                Some(hands) => Growing::by(hands.userfault().clone(), &file, len).ok(),
                None => Growing::new(&file, len).ok(),
            }
        });
        let target = Target { name, file, compression, growing: growing.flatten() };
        if let Some(how) = compression {
            target.put(0, &compressed::head(how)).map_err(|error| target.explain(&error))?;
        }
        Ok(target)
    }

    /// The file, in which nothing more is put.
    pub fn into_file(self) -> File {
        self.file
    }

    fn explain(&self, error: &std::io::Error) -> Failure {
        sys::memory::io_errno("pwrite", error).on(Object::Path(self.name.clone()), "write pages")
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
        match &self.growing {
            Some(growing) if growing.put(offset, bytes).is_ok() => Ok(()),
            // Whatever was wrong, write(2) has a better word for it.
            _ => self.file.write_all_at(bytes, offset),
        }
    }

    /// All has come.
    pub fn end(&self, place: &Place) -> Result<(), Failure> {
        if self.compression.is_some() {
            let end = compressed::end(&place.blocks, place.packed, place.offset);
            return self.put(place.packed, &end).map_err(|error| self.explain(&error));
        }
        let len = place.offset;
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == len) {
            return Ok(());
        }
        sys::fd::truncate(&self.file, len)
            .map_err(|error| error.on(Object::Path(self.name.clone()), "end it"))
    }
}

/// A file being filled.
#[derive(Default)]
struct Progress {
    target: OnceLock<Target>,
    /// Chunks that have their place, and where the next one goes.
    place: Mutex<Place>,
    moved: Condvar,
}

#[derive(Default)]
pub(crate) struct Place {
    index: usize,
    offset: u64,
    pub runs: Vec<Run>,
    /// What could not be read.
    pub missing: Vec<Range<u64>>,
    /// Of a compressed file, and where the next block goes.
    blocks: Vec<Block>,
    packed: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|held| held.into_inner())
}

/// Writes the page maps and pages files of all jobs. `progress` is told of pages as they are done.
pub fn take(
    jobs: Vec<Job>,
    dir: &Dir,
    compression: Option<Compression>,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Taken, Failure> {
    let create = |job: &Job, workers: usize| Target::new(dir, job, workers, compression);
    let (filled, mut taken) = fill(&jobs, compression, &create, &sys::apart::go_on, progress)?;
    for (job, (target, place)) in jobs.into_iter().zip(filled) {
        let mut runs = match (job.ahead, &job.source, target) {
            (Some(ahead), Source::Aside(aside), _) => {
                dir.remove(&compressed::name(job.pages_id))?;
                let fresh = aside.parts(&job.runs).map_err(|range| not_read(&range, job.owner))?;
                let runs = ahead.complete(dir, &pages_name(job.pages_id), &fresh)?;
                taken.written_pages += runs.iter().map(|run| run.len() / PAGE as u64).sum::<u64>();
                runs
            }
            (_, _, Some(target)) => {
                target.end(&place)?;
                place.runs
            }
            // A page map without pages names a file all the same.
            (_, _, None) => {
                dir.remove(&compressed::name(job.pages_id))?;
                dir.create(&pages_name(job.pages_id))?;
                Vec::new()
            }
        };
        runs.extend(job.elsewhere);
        // What is in the file stays in its order: it is sorted already.
        runs.sort_by_key(|run| run.range.start);
        let pagemap = Pagemap { pages_id: job.pages_id, runs, is_old: false };
        dir.write(&job.owner.pagemap(), &pagemap.encode())?;
    }
    Ok(taken)
}

/// Makes the file of a job, for what so many workers put in it.
pub(crate) type Create<'c> = &'c (dyn Fn(&Job, usize) -> Result<Target, Failure> + Sync);

/// A file for each job, if it has pages, and what is where in it.
pub(crate) type Filled = Vec<(Option<Target>, Place)>;

/// Copies the pages of all jobs into files, as long as `go_on` has nothing against it. Those of jobs with pages ahead are
/// left out.
pub(crate) fn fill(
    jobs: &[Job],
    compression: Option<Compression>,
    create: Create,
    go_on: &(dyn Fn() -> Result<(), Failure> + Sync),
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(Filled, Taken), Failure> {
    let states: Vec<Progress> = jobs.iter().map(|_| Progress::default()).collect();
    let wanted = jobs.iter().enumerate().filter(|(_, job)| job.ahead.is_none());
    let chunks: Mutex<VecDeque<Chunk>> =
        Mutex::new(wanted.clone().flat_map(|(at, job)| cut(at, job)).collect());
    let total = Mutex::new(Taken::default());
    let failure: Mutex<Option<Failure>> = Mutex::new(None);
    let workers = match wanted.map(|(_, job)| job.bytes()).sum::<u64>() {
        // A thread costs more than reading a little.
        bytes if bytes < 2 * CHUNK as u64 => 1,
        _ => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let create = |job: &Job| create(job, workers);
    let work = || {
        let mut buffer = Vec::new();
        loop {
            let Some(chunk) = lock(&chunks).pop_front() else { return };
            let state = &states[chunk.job];
            let copied = go_on()
                .and_then(|()| copy(&jobs[chunk.job], state, &chunk, &create, compression, &mut buffer));
            match copied {
                Ok(done) => {
                    let mut total = lock(&total);
                    total.written_pages += done.written_pages;
                    total.zero_pages += done.zero_pages;
                    progress(done.written_pages + done.zero_pages);
                }
                Err(error) => {
                    lock(&failure).get_or_insert(error);
                    lock(&chunks).clear();
                    // Whoever waits for this chunk's place gets it; the file is not used any more.
                    lock(&state.place).index = usize::MAX;
                    state.moved.notify_all();
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    if let Some(failure) = failure.into_inner().unwrap_or_else(|held| held.into_inner()) {
        return Err(failure);
    }
    let done = states.into_iter().map(|state| {
        let place = state.place.into_inner().unwrap_or_else(|held| held.into_inner());
        (state.target.into_inner(), place)
    });
    Ok((done.collect(), total.into_inner().unwrap_or_else(|held| held.into_inner())))
}

/// A part of a job, in the order of addresses.
#[derive(Debug)]
pub enum Read<'b> {
    /// Clean pages that somebody has.
    Kept(Range<u64>),
    /// Ranges of pages, and their content one behind the other.
    Pages(Vec<Range<u64>>, &'b [u8]),
}

/// Reads the pages of a job, one part after the other, while `done` deals with the part before. Pages for which
/// `is_kept` says so, of whether they are clean, are not read. Those of zeros are left out, unless `keeps_zeros`.
///
/// # Errors
/// The first of reading, or of `done`.
pub fn read_in_order(
    job: &Job,
    keeps_zeros: bool,
    is_kept: &(dyn Fn(bool) -> bool + Sync),
    done: &mut dyn FnMut(Read) -> Result<(), Failure>,
) -> Result<(), Failure> {
    enum Part {
        Kept(Range<u64>),
        Pages(Vec<Range<u64>>, Vec<u8>),
    }
    type Parts = std::sync::mpsc::SyncSender<Result<Part, Failure>>;
    let read_all = |parts: &Parts| {
        for runs in job.runs.chunk_by(|one, next| is_kept(one.1.is_clean) == is_kept(next.1.is_clean)) {
            if is_kept(runs[0].1.is_clean) {
                for (range, _) in runs {
                    if parts.send(Ok(Part::Kept(range.clone()))).is_err() {
                        return;
                    }
                }
                continue;
            }
            for mut chunk in cut_runs(0, runs, CHUNK) {
                chunk.runs.iter_mut().for_each(|(_, how)| how.keeps_zeros |= keeps_zeros);
                let mut buffer = vec![0; CHUNK];
                let part = sys::apart::go_on().and_then(|()| read_of(job, &chunk.runs, &mut buffer));
                let part = part.map(|found| {
                    let (kept, ranges) = drop_zeros(&mut buffer[..length(&found)], &found);
                    buffer.truncate(kept);
                    Part::Pages(ranges, buffer)
                });
                if parts.send(part).is_err() {
                    return;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let (sender, parts) = std::sync::mpsc::sync_channel(4);
        scope.spawn(move || read_all(&sender));
        for part in parts {
            match part? {
                Part::Kept(range) => done(Read::Kept(range))?,
                Part::Pages(ranges, bytes) => done(Read::Pages(ranges, &bytes))?,
            }
        }
        Ok(())
    })
}

pub fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

/// Cuts a job into chunks of at most a buffer, or as much as a hand does at once.
fn cut(at: usize, job: &Job) -> Vec<Chunk> {
    cut_runs(at, &job.runs, if job.hands.is_some() { hands::PART } else { CHUNK })
}

fn cut_runs(job: usize, runs: &[(Range<u64>, How)], size: usize) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    let mut room = 0;
    for (range, how) in runs {
        let mut start = range.start;
        while start < range.end {
            if room == 0 || chunks.last().is_none_or(|chunk| chunk.runs.len() == RANGES) {
                chunks.push(Chunk { job, index: chunks.len(), runs: Vec::new() });
                room = size as u64;
            }
            let part = start..range.end.min(start + room);
            room -= part.end - part.start;
            start = part.end;
            // There is one: it was just pushed if not before.
            chunks.last_mut().unwrap().runs.push((part, *how));
        }
    }
    chunks
}

fn copy(
    job: &Job,
    state: &Progress,
    chunk: &Chunk,
    create: &(dyn Fn(&Job) -> Result<Target, Failure> + Sync),
    compression: Option<Compression>,
    buffer: &mut Vec<u8>,
) -> Result<Taken, Failure> {
    let needed = length(&chunk.runs);
    let mut hand = job.hands.as_ref().and_then(Hands::free);
    let by_hand = hand.as_mut().and_then(|hand| find(hand, &chunk.runs).ok());
    let is_read = by_hand.is_none();
    let (found, runs) = match by_hand {
        Some(ranges) => (Cow::Borrowed(&chunk.runs[..]), ranges),
        None => read_some(job, &chunk.runs, buffer)?,
    };
    let length = length(&found);
    let kept = runs.iter().map(|range| (range.end - range.start) as usize).sum();
    let done = Taken { written_pages: (kept / PAGE) as u64, zero_pages: ((length - kept) / PAGE) as u64 };
    let packed = match compression.filter(|_| kept > 0) {
        Some(how) => Some(
            compressed::compress(how, &buffer[..kept])
                .map_err(|error| error.on(Object::Path(compressed::name(job.pages_id)), "compress pages"))?,
        ),
        None => None,
    };

    let mut place = lock(&state.place);
    while place.index < chunk.index {
        place = state.moved.wait(place).unwrap_or_else(|held| held.into_inner());
    }
    if kept > 0 && state.target.get().is_none() {
        // In the lock: a second creation would empty the file.
        let target = create(job)?;
        state.target.get_or_init(|| target);
        place.packed = compression.map_or(0, |how| compressed::head(how).len() as u64);
    }
    let mut offset = place.offset;
    let mut at = offset;
    for range in runs.iter().cloned() {
        let length = range.end - range.start;
        match place.runs.last_mut() {
            Some(last) if last.range.end == range.start => last.range.end = range.end,
            _ => place.runs.push(Run {
                range,
                flags: PRESENT,
                offset: at,
                file: PagesFile::default(),
                same_as: None,
            }),
        }
        at += length;
    }
    if let Some(packed) = &packed {
        let (length, content) = (packed.len() as u32, kept as u32);
        let block = Block { at: offset, offset: place.packed, length, content };
        place.blocks.push(block);
        offset = place.packed;
        place.packed += u64::from(length);
    }
    if length < needed {
        let (_, missing) = split(&chunk.runs, |_| true, &found);
        place.missing.extend(missing.into_iter().map(|(range, _)| range));
    }
    place.offset = at;
    place.index = place.index.saturating_add(1);
    drop(place);
    state.moved.notify_all();

    if let Some(target) = state.target.get().filter(|_| kept > 0) {
        let is_put = !is_read
            && target.growing.as_ref().zip(hand.as_mut()).is_some_and(|(growing, hand)| {
                let put = hand.put(growing, offset, &runs);
                put.inspect_err(|error| log::debug!("not by a hand: {error}")).is_ok()
            });
        if is_put {
            return Ok(done);
        }
        if !is_read {
            let runs: Vec<_> = runs.iter().map(|range| (range.clone(), KEPT)).collect();
            read_some(job, &runs, buffer)?;
        }
        let bytes = packed.as_deref().unwrap_or(&buffer[..kept]);
        target.put(offset, bytes).map_err(|error| target.explain(&error))?;
    }
    Ok(done)
}

/// Has a hand look which pages of these runs are to be kept.
///
/// # Errors
/// `EFAULT` where it may not read them all; where it does not answer.
fn find(hand: &mut Hand, runs: &[(Range<u64>, How)]) -> Result<Vec<Range<u64>>, Errno> {
    if !runs.iter().all(|(_, how)| how.is_readable) {
        return Err(Errno { call: "read", code: libc::EFAULT });
    }
    let looked: Vec<Range<u64>> =
        runs.iter().filter(|(_, how)| !how.keeps_zeros).map(|run| run.0.clone()).collect();
    let found = hand.find(&looked)?;
    let mut found = found.into_iter();
    let mut keeps = |how: &How| how.keeps_zeros || found.next() != Some(0);
    let pages = runs.iter().flat_map(|(range, how)| range.clone().step_by(PAGE).map(move |page| (page, how)));
    let mut ranges = Vec::new();
    pages.filter(|(_, how)| keeps(how)).for_each(|(page, _)| push(&mut ranges, page));
    Ok(ranges)
}

/// Adds a page to ranges of pages that end before it.
fn push(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end += PAGE as u64,
        _ => ranges.push(page..page + PAGE as u64),
    }
}

fn explain(range: &Range<u64>, owner: Owner, error: Errno) -> Failure {
    let object = Object::Vma { start: range.start, end: range.end, what: owner.pagemap() };
    error.on(object, "read its pages")
}

fn not_read(range: &Range<u64>, owner: Owner) -> Failure {
    explain(range, owner, Errno { call: "process_vm_readv", code: libc::EFAULT })
}

/// Fills `buffer` with runs of a job, without pages of zeros; returns those that were found, and where what is left belongs.
fn read_some<'r>(
    job: &Job,
    runs: &'r [(Range<u64>, How)],
    buffer: &mut Vec<u8>,
) -> Result<(Found<'r>, Vec<Range<u64>>), Failure> {
    buffer.resize(buffer.len().max(length(runs)), 0);
    let found = read_of(job, runs, buffer)?;
    let (_, kept) = drop_zeros(&mut buffer[..length(&found)], &found);
    Ok((found, kept))
}

/// Runs of those that were asked for, or all.
type Found<'r> = Cow<'r, [(Range<u64>, How)]>;

fn length(runs: &[(Range<u64>, How)]) -> usize {
    runs.iter().map(|run| (run.0.end - run.0.start) as usize).sum()
}

/// Fills `buffer` with runs of a job, and returns them: all but what a process that runs has given back since they were found.
fn read_of<'r>(job: &Job, runs: &'r [(Range<u64>, How)], buffer: &mut [u8]) -> Result<Found<'r>, Failure> {
    let failure = match (read(&job.source, job.owner, runs, buffer), &job.source) {
        (Ok(_), _) => return Ok(Cow::Borrowed(runs)),
        (Err(failure), Source::Process { runs: true, .. }) => failure,
        (Err(failure), _) => return Err(failure),
    };
    log::debug!("page by page: {failure}");
    // In this way also what it may not read itself any more, which is there all the same.
    let Source::Process { pid, .. } = job.source else { return Err(failure) };
    let source = Source::Process { pid, has_relatives: true, runs: true };
    let mut found: Vec<(Range<u64>, How)> = Vec::new();
    let mut at = 0;
    for (range, how) in runs {
        for start in range.clone().step_by(PAGE) {
            let page = (start..start + PAGE as u64, *how);
            if read(&source, job.owner, std::slice::from_ref(&page), &mut buffer[at..]).is_ok() {
                at += PAGE;
                found.push(page);
            }
        }
    }
    Ok(Cow::Owned(found))
}

/// Fills `buffer` with the runs, one behind the other.
fn read(
    source: &Source,
    owner: Owner,
    runs: &[(Range<u64>, How)],
    buffer: &mut [u8],
) -> Result<usize, Failure> {
    let total = length(runs);
    let explain = |range: &Range<u64>, error: Errno| explain(range, owner, error);
    match source {
        Source::Process { pid, has_relatives: false, .. } if runs.iter().all(|run| run.1.is_readable) => {
            let ranges: Vec<(u64, usize)> =
                runs.iter().map(|run| (run.0.start, (run.0.end - run.0.start) as usize)).collect();
            let span = runs[0].0.start..runs[runs.len() - 1].0.end;
            match sys::memory::read_remote_runs(*pid, &ranges, &mut buffer[..total]) {
                Ok(count) if count == total => Ok(total),
                Ok(_) => Err(explain(&span, Errno { call: "process_vm_readv", code: libc::EFAULT }).of(*pid)),
                Err(error) => Err(explain(&span, error).of(*pid)),
            }
        }
        Source::Process { pid, .. } => {
            // Also for memory that the process itself may not read: /proc/PID/mem does not ask.
            let open = |error: &std::io::Error| sys::memory::io_errno("open", error);
            let mem =
                File::open(format!("/proc/{pid}/mem")).map_err(|error| explain(&runs[0].0, open(&error)))?;
            read_file(&mem, runs, buffer).map_err(|(range, error)| explain(&range, error).of(*pid))?;
            Ok(total)
        }
        Source::Aside(aside) => {
            let mut at = 0;
            for (range, _) in runs {
                let bytes = aside.get(range).ok_or_else(|| not_read(range, owner))?;
                buffer[at..at + bytes.len()].copy_from_slice(bytes);
                at += bytes.len();
            }
            Ok(total)
        }
        Source::File(file) => {
            read_file(file, runs, buffer).map_err(|(range, error)| explain(&range, error))?;
            Ok(total)
        }
    }
}

fn read_file(file: &File, runs: &[(Range<u64>, How)], buffer: &mut [u8]) -> Result<(), (Range<u64>, Errno)> {
    let mut at = 0;
    for (range, _) in runs {
        let length = (range.end - range.start) as usize;
        let mut filled = 0;
        while filled < length {
            match file.read_at(&mut buffer[at + filled..at + length], range.start + filled as u64) {
                // The last page of a file may be cut: the rest of it is zero.
                Ok(0) => {
                    buffer[at + filled..at + length].fill(0);
                    break;
                }
                Ok(count) => filled += count,
                Err(error) => return Err((range.clone(), sys::memory::io_errno("read", &error))),
            }
        }
        at += length;
    }
    Ok(())
}

/// Moves the pages that hold something together; returns their bytes and where they belong.
fn drop_zeros(buffer: &mut [u8], runs: &[(Range<u64>, How)]) -> (usize, Vec<Range<u64>>) {
    let mut kept = 0;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let pages = runs.iter().flat_map(|run| run.0.clone().step_by(PAGE).map(|page| (page, run.1)));
    for (at, (address, how)) in (0..buffer.len()).step_by(PAGE).zip(pages) {
        if !how.keeps_zeros && sys::memory::is_zero(&buffer[at..at + PAGE]) {
            continue;
        }
        if kept != at {
            buffer.copy_within(at..at + PAGE, kept);
        }
        kept += PAGE;
        push(&mut ranges, address);
    }
    (kept, ranges)
}

/// The parts of a memory file that hold data. Source: lseek(2) SEEK_DATA, SEEK_HOLE.
pub fn data_runs(file: &File) -> Result<Vec<(Range<u64>, How)>, Errno> {
    let page = PAGE as u64;
    let how = How { is_readable: true, ..How::default() };
    let whole = |range: Range<u64>| (range.start / page * page..range.end.next_multiple_of(page), how);
    Ok(sys::fd::data(file)?.into_iter().map(whole).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANONYMOUS: How = How { is_readable: true, keeps_zeros: false, is_clean: false, is_watched: false };

    #[test]
    fn zeros_over_a_file_are_kept() {
        let mut buffer = vec![0u8; 2 * PAGE];
        let over_file = How { keeps_zeros: true, ..ANONYMOUS };
        let (kept, ranges) =
            drop_zeros(&mut buffer, &[(0x1000..0x2000, ANONYMOUS), (0x2000..0x3000, over_file)]);
        assert_eq!((kept, ranges.first()), (PAGE, Some(&(0x2000..0x3000))));
        assert_eq!(ranges.len(), 1);
    }

    #[test]
    fn chunks_are_no_larger_than_a_buffer_and_lose_nothing() {
        let runs = [(0..(3 * CHUNK as u64 / 2), ANONYMOUS), (1 << 30..(1 << 30) + 4096, ANONYMOUS)];
        let chunks = cut_runs(0, &runs, CHUNK);
        assert_eq!(chunks.len(), 2);
        let size = |chunk: &Chunk| chunk.runs.iter().map(|run| run.0.end - run.0.start).sum::<u64>();
        assert!(chunks.iter().all(|chunk| size(chunk) <= CHUNK as u64));
        assert_eq!(chunks.iter().map(size).sum::<u64>(), 3 * CHUNK as u64 / 2 + 4096);
    }

    #[test]
    fn pages_of_zeros_are_dropped_and_the_others_move_together() {
        let mut buffer = vec![0u8; 4 * PAGE];
        buffer[PAGE] = 7;
        buffer[3 * PAGE] = 9;
        let (kept, ranges) =
            drop_zeros(&mut buffer, &[(0x1000..0x3000, ANONYMOUS), (0x8000..0xa000, ANONYMOUS)]);
        assert_eq!((kept, ranges), (2 * PAGE, vec![0x2000..0x3000, 0x9000..0xa000]));
        assert_eq!((buffer[0], buffer[PAGE]), (7, 9));
    }

    /// Workers that reach the end of their first chunks together must make one file of them.
    #[test]
    fn every_chunk_lands_whatever_worker_is_first() {
        let folder = std::env::temp_dir().join(format!("crtools-take-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let memory = File::from(sys::memory::memfd(c"source", false).unwrap());
        let length = 4 * CHUNK;
        let content: Vec<u8> = (0..length / PAGE).flat_map(|page| [page as u8 | 1; PAGE]).collect();
        memory.write_all_at(&content, 0).unwrap();
        for round in 0..100 {
            let dir = Dir::open(&folder).unwrap();
            let job = Job {
                source: Source::File(memory.try_clone().unwrap()),
                runs: vec![(0..length as u64, ANONYMOUS)],
                elsewhere: Vec::new(),
                owner: Owner::Task(1),
                pages_id: 1,
                ahead: None,
                hands: None,
            };
            take(vec![job], &dir, None, &|_| ()).unwrap();
            assert!(std::fs::read(folder.join("pages-1.img")).unwrap() == content, "round {round}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
