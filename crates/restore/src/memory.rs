//! The list that builds one address space: what is inherited, mapped, filled.

use crate::load::Task;
use agent::Arg;
use agent::arch::vdso;
use image::VmaEntry;
use image::pagemap::{PagesFile, Run};
use image::vma as status;
use kinds::contract::TaskOps;
use kinds::task::numa;
use kinds::vma::hugetlb;
use kinds::vma::sysv::{self, Segments};
use kinds::vma::{self, Content};
use model::{Errno, Failure, Object};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::ops::Range;
use sys::memory::View;

const PAGE: u64 = 4096;

/// Does the parent have this very mapping, so that a fork after it is filled hands it on?
pub fn is_inherited(parent: &Task, child: &VmaEntry) -> bool {
    let at = parent.mm.vmas.partition_point(|vma| vma.start < child.start && vma.status & status::GUARD == 0);
    parent.mm.vmas.get(at).is_some_and(|vma| {
        (vma.start, vma.end, vma.flags, vma.status, vma.shmid, vma.pgoff)
            == (child.start, child.end, child.flags, child.status, child.shmid, child.pgoff)
            && vma.prot == child.prot
            && (vma.numa_mode, &vma.numa_nodes) == (child.numa_mode, &child.numa_nodes)
    }) && !vma::is_special(child)
        && !vma::is_ring(child)
}

/// The vdso of this kernel: its bytes, and the size of the data that the kernel maps before it.
#[derive(Debug)]
pub struct OwnVdso {
    bytes: Vec<u8>,
    vvar: u64,
}

impl OwnVdso {
    pub fn read() -> Result<OwnVdso, Failure> {
        let explain = |error: Errno| error.on(Object::Named("vdso".into()), "read our own");
        let maps = std::fs::read("/proc/self/maps")
            .map_err(|error| explain(sys::memory::io_errno("read", &error)))?;
        let vmas: Vec<_> = maps.split(|byte| *byte == b'\n').filter_map(sys::proc::parse_vma_line).collect();
        let vvar =
            vmas.iter().filter(|vma| vma.name.starts_with(b"[vvar")).map(|vma| vma.end - vma.start).sum();
        let mut bytes = Vec::new();
        if let Some(vma) = vmas.iter().find(|vma| vma.name == b"[vdso]") {
            bytes.resize((vma.end - vma.start) as usize, 0);
            sys::memory::read_remote(sys::process::own_pid(), vma.start, &mut bytes).map_err(explain)?;
        }
        Ok(OwnVdso { bytes, vvar })
    }

    fn len(&self) -> u64 {
        self.vvar + self.bytes.len() as u64
    }
}

/// Where a task has its vdso with its data: from the first of these mappings to the last.
fn vdso_range(task: &Task) -> Option<(Range<u64>, Range<u64>)> {
    let of = |bit: u32| task.mm.vmas.iter().filter(move |vma| vma.status & bit != 0);
    let code = of(status::VDSO).next()?;
    let start = of(status::VVAR).map(|vma| vma.start).min().unwrap_or(code.start).min(code.start);
    Some((start..code.end, code.start..code.end))
}

/// The pages of an image set, mapped for comparing.
#[derive(Debug, Default)]
pub struct Contents {
    views: HashMap<PagesFile, View>,
    /// Of these only parts are here.
    parts: HashSet<PagesFile>,
}

/// Which parts of each pages file are needed before the tree runs; not those that come later. `comes_later` says of whose
/// memory that is true, as far as it can.
pub fn needed(tasks: &[Task], comes_later: impl Fn(usize) -> bool) -> BTreeMap<PagesFile, Vec<Range<u64>>> {
    // Few are asked for many times.
    let mut needed: BTreeMap<PagesFile, Vec<Range<u64>>> = BTreeMap::new();
    for (at, task) in tasks.iter().enumerate() {
        let later = |vma: &&VmaEntry| comes_later(at) && vma::may_come_later(vma);
        let mut later = task.mm.vmas.iter().filter(later).peekable();
        for run in task.pagemap.runs.iter().filter(|run| !run.is_away()) {
            let parts = needed.entry(run.file).or_default();
            let place = |part: Range<u64>| {
                let start = run.offset + (part.start - run.range.start);
                start..start + (part.end - part.start)
            };
            let mut at = run.range.start;
            while at < run.range.end {
                while later.next_if(|vma| vma.end <= at).is_some() {}
                let (start, end) = later.peek().map_or((u64::MAX, u64::MAX), |vma| (vma.start, vma.end));
                if at < start {
                    parts.push(place(at..start.min(run.range.end)));
                }
                at = if at < start { start } else { end };
            }
        }
    }
    needed
}

impl Contents {
    pub fn add(&mut self, id: PagesFile, file: &File, is_whole: bool) -> Result<(), Failure> {
        let name = || pages::take::pages_name(id.id);
        let explain = |error: Errno| error.on(Object::Path(name()), "map the pages");
        let len = file.metadata().map_err(|error| explain(sys::memory::io_errno("fstat", &error)))?.len();
        if !is_whole {
            self.parts.insert(id);
        }
        self.views.insert(id, View::new(file, len as usize).map_err(explain)?);
        Ok(())
    }

    /// All pages of a file.
    pub fn of(&self, file: PagesFile) -> Option<&View> {
        self.views.get(&file)
    }

    /// Is the content of a run here for sure?
    pub fn has(&self, run: &Run) -> bool {
        !run.is_away() && self.views.contains_key(&run.file) && !self.parts.contains(&run.file)
    }

    /// What the images have of a range, from its start on as far as there is no gap.
    pub fn bytes(&self, task: &Task, range: Range<u64>) -> Vec<u8> {
        range
            .step_by(PAGE as usize)
            .map_while(|address| self.page_at(task, address))
            .flatten()
            .copied()
            .collect()
    }

    fn page_at(&self, task: &Task, address: u64) -> Option<&[u8]> {
        let runs = &task.pagemap.runs;
        let run = runs.get(runs.partition_point(|run| run.range.end <= address))?;
        self.page(Some(run).filter(|run| run.range.contains(&address))?, address)
    }

    fn page(&self, run: &Run, address: u64) -> Option<&[u8]> {
        let at = (run.offset + (address - run.range.start)) as usize;
        self.of(run.file).filter(|_| !run.is_away())?.bytes().get(at..at + PAGE as usize)
    }
}

/// What a child does with pages of its parent.
#[derive(Debug, Default)]
struct Difference {
    /// Read from the image.
    put: Vec<Run>,
    /// There in the parent alone.
    drop: Vec<Range<u64>>,
    /// Pages that both have, and those of them that are equal.
    compared: u64,
    equal: u64,
}

fn push(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end += PAGE,
        _ => ranges.push(page..page + PAGE),
    }
}

/// The runs of a task inside one mapping.
fn runs_in<'t>(task: &'t Task, vma: &VmaEntry) -> impl Iterator<Item = Run> + use<'t> {
    runs_of(task, vma.start..vma.end)
}

/// The same of a range. How many there are is known at once.
fn runs_of(task: &Task, Range { start, end }: Range<u64>) -> impl ExactSizeIterator<Item = Run> {
    let runs = &task.pagemap.runs;
    let runs = &runs[runs.partition_point(|run| run.range.end <= start)..];
    runs[..runs.partition_point(|run| run.range.start < end)].iter().map(move |run| {
        let from = run.range.start.max(start);
        Run {
            range: from..run.range.end.min(end),
            offset: run.offset + (from - run.range.start),
            ..run.clone()
        }
    })
}

fn compare(parent: &Task, child: &Task, vma: &VmaEntry, contents: &Contents, out: &mut Difference) {
    let mut theirs = runs_in(parent, vma).peekable();
    let mut ours = runs_in(child, vma).peekable();
    let (mut a, mut b) = (theirs.next(), ours.next());
    while a.is_some() || b.is_some() {
        let first = |run: &Option<Run>| run.as_ref().map_or(u64::MAX, |run| run.range.start);
        let (at_a, at_b) = (first(&a), first(&b));
        let mut advance_a = false;
        let mut advance_b = false;
        if at_a < at_b {
            push(&mut out.drop, at_a);
            advance_a = true;
        } else {
            let is_same = at_a == at_b
                && a.as_ref().zip(b.as_ref()).is_some_and(|(a, b)| {
                    let pages = (contents.page(a, at_a), contents.page(b, at_b));
                    (a.file, a.offset) == (b.file, b.offset) || pages.0.is_some() && pages.0 == pages.1
                });
            out.compared += u64::from(at_a == at_b);
            out.equal += u64::from(is_same);
            advance_a |= at_a == at_b;
            advance_b = true;
            if !is_same && let Some(run) = &b {
                match out.put.last_mut() {
                    Some(last)
                        if last.range.end == at_b
                            && last.file == run.file
                            && last.offset + last.len() == run.offset =>
                    {
                        last.range.end += PAGE;
                    }
                    _ => out.put.push(Run { range: at_b..at_b + PAGE, ..run.clone() }),
                }
            }
        }
        let step = |run: &mut Option<Run>, rest: &mut dyn Iterator<Item = Run>| {
            if let Some(some) = run {
                some.range.start += PAGE;
                some.offset += PAGE;
                if some.range.is_empty() {
                    *run = rest.next();
                }
            }
        };
        if advance_a {
            step(&mut a, &mut theirs);
        }
        if advance_b {
            step(&mut b, &mut ours);
        }
    }
}

/// [`compare`] for a mapping of huge pages: one of those is the parent's, or dropped and filled anew.
fn compare_huge(
    parent: &Task,
    child: &Task,
    (vma, size): (&VmaEntry, u64),
    contents: &Contents,
    out: &mut Difference,
) {
    let mut found = Difference::default();
    compare(parent, child, vma, contents, &mut found);
    let ranges = found.drop.iter().chain(found.put.iter().map(|run| &run.range));
    let mut places: Vec<u64> = ranges
        .flat_map(|range| (range.start / size..range.end.div_ceil(size)).map(|number| number * size))
        .collect();
    places.sort_unstable();
    places.dedup();
    for place in places {
        let page = VmaEntry { start: place, end: place + size, ..vma.clone() };
        out.drop.push(place..place + size);
        out.put.extend(runs_in(child, &page));
    }
    out.compared += found.compared;
    out.equal += found.equal;
}

/// How the list reaches descriptors of the coordinator: a pidfd of it in the task.
#[derive(Debug, Clone, Copy)]
pub struct Reach {
    pub pidfd: i32,
}

impl Reach {
    /// Adds the call that fetches descriptor `fd` of the coordinator; returns the place of the result.
    pub fn fetch(self, fd: i32, ops: &mut TaskOps) -> usize {
        ops.list.ok(libc::SYS_pidfd_getfd, &[self.pidfd.into(), fd.into(), Arg::Value(0)])
    }

    /// The same, to a number that is free.
    pub fn fetch_to(self, fd: i32, number: i32, ops: &mut TaskOps) {
        let fetched = self.fetch(fd, ops);
        ops.list.ok(libc::SYS_dup3, &[Arg::Result(fetched), number.into(), libc::O_CLOEXEC.into()]);
        ops.list.ok(libc::SYS_close, &[Arg::Result(fetched)]);
    }
}

/// Where memory comes from, the same for every task.
#[derive(Clone, Copy)]
pub struct Sources<'r> {
    /// The coordinator's descriptor of a file by its id, open in an access mode.
    pub files: &'r dyn Fn(u32, u32) -> Option<i32>,
    /// Is this one that is made only when all threads are there?
    pub is_made_later: &'r dyn Fn(u32) -> bool,
    /// And of a pages file by its id.
    pub pages: &'r dyn Fn(PagesFile) -> Option<i32>,
    pub contents: &'r Contents,
    pub own: &'r OwnVdso,
    pub hole: &'r Range<u64>,
    pub segments: &'r Segments,
    pub reach: Reach,
    /// As many bytes as make it worth while that others than the agent put pages in.
    pub many: u64,
    /// Pages may come later: none is huge at once, and of those that others than the agent put in, the mappings say enough.
    pub is_lazy: bool,
}

/// Pages that go into a new address space.
#[derive(Debug, Default)]
pub struct Filling {
    /// Read by the agent.
    pub read: Vec<Run>,
    /// Put in by the coordinator, when they are many. Empty in a lazy restore: [`Filling::all`].
    pub copy: Vec<Run>,
    /// Written by the coordinator, into memory that gets huge pages.
    pub huge: Vec<Run>,
    /// Anonymous mappings that have those to copy.
    pub mappings: Vec<Range<u64>>,
    /// Starts of mappings whose protection is another until it is done.
    pub open: HashSet<u64>,
    /// Pages that were compared with those of the process whose memory it is a copy of, and how many stay
    /// shared with it.
    pub compared: u64,
    pub kept: u64,
}

/// As many bytes as make it worth while that the coordinator helps.
pub const MANY: u64 = 4 << 20;

/// Maps the memory of `task`, and says what is to be put into it. `parent` is given when the task was made with
/// a copy of filled memory, with the open mappings of that: its parent's or, if it was made before the parent
/// had its own, that of the one before.
pub fn build(
    task: &Task,
    parent: Option<(&Task, &HashSet<u64>)>,
    sources: &Sources,
    ops: &mut TaskOps,
) -> Result<Filling, Failure> {
    let Sources { contents, reach, .. } = *sources;
    let (parent, parents_open) = (parent.map(|parent| parent.0), parent.map(|parent| parent.1));
    let inherited = |entry: &VmaEntry| parent.is_some_and(|parent| is_inherited(parent, entry));
    let ours = vdso_range(task);
    if let Some(parent) = parent {
        ops.list.label("unmap what only the parent has");
        let keeps_vdso = vdso_range(parent) == ours;
        for entry in &parent.mm.vmas {
            let is_ours = task.mm.vmas.iter().any(|vma| vma.start == entry.start && inherited(vma));
            let is_vdso = entry.status & (status::VDSO | status::VVAR) != 0;
            if !(is_ours || entry.status & (status::GUARD | status::VSYSCALL) != 0 || is_vdso && keeps_vdso) {
                ops.list.ok(libc::SYS_munmap, &[entry.start.into(), (entry.end - entry.start).into()]);
            }
        }
    }
    let mut filling = Filling::default();
    if parent.is_none_or(|parent| vdso_range(parent) != ours)
        && let Some((whole, code)) = ours
    {
        map_vdso(task, whole, code, sources, ops)?;
    }
    let kept = task.mm.vmas.iter().filter(|entry| inherited(entry)).map(|entry| entry.start..entry.end);
    let is_there = |entry: &VmaEntry| !is_made_later(entry, sources);
    keep_for_rings(task, sources, ops);
    map_rings(task, kept.chain(vdso_range(task).map(|(whole, _)| whole)).collect(), &is_there, sources, ops)?;
    ops.list.label("map the memory");
    let mut difference = Difference::default();
    sysv::attach(&task.mm.vmas, sources.segments, &inherited, ops)?;
    let is_placed =
        |entry: &VmaEntry| vma::is_special(entry) || sysv::is_attached(entry) || vma::is_ring(entry);
    let entries: Vec<&VmaEntry> = task.mm.vmas.iter().filter(|entry| !is_placed(entry)).collect();
    let is_filled =
        |entry: &VmaEntry| vma::content(entry) == Content::Private && runs_in(task, entry).next().is_some();
    let can_copy = |entry: &&&VmaEntry| !inherited(entry) && is_filled(entry) && vma::may_come_later(entry);
    let bytes = entries.iter().filter(can_copy).flat_map(|entry| runs_in(task, entry)).map(|run| run.len());
    let copies = bytes.sum::<u64>() >= sources.many;
    let are_together = |one: &&VmaEntry, next: &&VmaEntry| {
        let is_alone =
            |entry: &VmaEntry| !vma::is_plain(entry) || inherited(entry) || entry.numa_mode.is_some();
        one.end == next.start && one.flags == next.flags && !is_alone(one) && !is_alone(next)
    };
    for together in entries.chunk_by(are_together) {
        let entry = together[0];
        if together.len() > 1 {
            let filled: Vec<bool> = together.iter().map(|entry| is_filled(entry)).collect();
            map_together(together, &filled, copies, &mut filling, ops);
            let mut filled =
                together.iter().zip(&filled).filter(|(_, is_filled)| **is_filled).map(|(entry, _)| entry);
            if !sources.is_lazy {
                filling.copy.extend(filled.clone().flat_map(|entry| runs_in(task, entry)));
            }
            if let (Some(first), Some(last)) = (filled.clone().next(), filled.next_back()) {
                filling.mappings.push(first.start..last.end);
            }
            continue;
        }
        if inherited(entry) {
            if let Some(parent) = parent
                && vma::content(entry) == Content::Private
            {
                let before = difference.put.last().map(|run| run.range.end);
                match hugetlb::of(entry) {
                    Some(size) => compare_huge(parent, task, (entry, size), contents, &mut difference),
                    None => compare(parent, task, entry, contents, &mut difference),
                }
                let is_open = parents_open.is_some_and(|open| open.contains(&entry.start));
                let is_changed = difference.put.last().map(|run| run.range.end) != before;
                let opens = is_changed && (is_open || vma::is_guarded(entry));
                if opens {
                    vma::open(entry, ops);
                }
                if is_open || opens {
                    filling.open.insert(entry.start);
                }
            }
            continue;
        }
        let is_filled = is_filled(entry);
        let is_open = is_filled && vma::is_guarded(entry);
        if is_open {
            filling.open.insert(entry.start);
        }
        match vma::file_id(entry) {
            Some(id) => {
                let mode = entry.fdflags.unwrap_or(0) & libc::O_ACCMODE as u32;
                let fd = (sources.files)(id, mode).ok_or_else(|| {
                    Failure::corrupt(
                        format!("mm-{}.img", task.pid),
                        None,
                        format!("maps file {id}, which is none"),
                    )
                })?;
                let fd = reach.fetch(fd, ops);
                vma::map(entry, Some(Arg::Result(fd)), is_open, ops);
                ops.list.ok(libc::SYS_close, &[Arg::Result(fd)]);
            }
            None => vma::map(entry, None, is_open, ops),
        }
        // It says where pages are put.
        numa::restore_mapping(entry, ops)?;
        if is_filled && !vma::may_come_later(entry) {
            filling.read.extend(runs_in(task, entry));
        } else if is_filled && copies && !sources.is_lazy && vma::wants_huge_pages(entry) {
            vma::prefer_huge_pages(entry, ops);
            for run in runs_in(task, entry) {
                let [before, whole, behind] = around_huge_pages(run);
                filling.huge.extend(Some(whole).filter(|run| !run.range.is_empty()));
                filling.copy.extend([before, behind].into_iter().filter(|run| !run.range.is_empty()));
            }
            // Not parts of it: a mapping that was in parts for a moment may stay so.
            filling.mappings.push(entry.start..entry.end);
        } else if is_filled {
            if !sources.is_lazy {
                filling.copy.extend(runs_in(task, entry));
            }
            filling.mappings.push(entry.start..entry.end);
        }
    }
    if !copies {
        filling.read_all();
    }
    ops.list.label("drop pages that only the parent has");
    for range in &difference.drop {
        let args = [range.start.into(), (range.end - range.start).into(), libc::MADV_DONTNEED.into()];
        ops.list.ok(libc::SYS_madvise, &args);
    }
    filling.read.append(&mut difference.put);
    (filling.compared, filling.kept) = (difference.compared, difference.equal);
    Ok(filling)
}

/// Parts a run in what lies before its whole huge pages, those, and what lies behind. Where a huge page is not all
/// there, pages that nobody had touched would come with it.
fn around_huge_pages(run: Run) -> [Run; 3] {
    let Range { start, end } = run.range;
    let first = start.next_multiple_of(vma::HUGE_PAGE).min(end);
    let last = (end / vma::HUGE_PAGE * vma::HUGE_PAGE).max(first);
    [start..first, first..last, last..end].map(|range| Run {
        offset: run.offset + (range.start - start),
        range,
        ..run.clone()
    })
}

/// Maps neighbours together. When the agent reads their pages, each has to be writable then; whoever copies them
/// does not care, and they are protected afterwards.
fn map_together(
    entries: &[&VmaEntry],
    filled: &[bool],
    copies: bool,
    filling: &mut Filling,
    ops: &mut TaskOps,
) {
    let prot = vma::map_together(entries, ops);
    // From the last on, so that what is split is always the first part.
    for (entry, is_filled) in entries.iter().zip(filled).rev() {
        let is_open = *is_filled && vma::is_guarded(entry);
        if is_open || copies && entry.prot != prot {
            filling.open.insert(entry.start);
        }
        match (copies, is_open) {
            (true, _) => {}
            (false, true) => vma::open(entry, ops),
            (false, false) if entry.prot != prot => vma::protect(entry, entry.prot, ops),
            (false, false) => {}
        }
    }
}

impl Filling {
    /// All runs in the mappings that others than the agent fill.
    pub fn all<'t>(&'t self, task: &'t Task) -> impl Iterator<Item = Run> + 't {
        self.mappings.iter().flat_map(|range| runs_of(task, range.clone()))
    }

    /// Leaves everything to the agent.
    fn read_all(&mut self) {
        self.read.append(&mut self.copy);
        self.mappings.clear();
    }

    /// Leaves everything to the agent, when all is mapped, and nobody can copy it.
    pub fn copy_nothing(&mut self, task: &Task, ops: &mut TaskOps) {
        let mut last = None;
        for run in &self.copy {
            let after = task
                .mm
                .vmas
                .partition_point(|vma| vma.start <= run.range.start && vma.status & status::GUARD == 0);
            if let Some(entry) = after.checked_sub(1).map(|at| &task.mm.vmas[at])
                && last.replace(entry.start) != Some(entry.start)
            {
                vma::open(entry, ops);
            }
        }
        self.read_all();
    }
}

/// Reads pages into the memory of `task`.
pub fn read(task: &Task, runs: &mut [Run], sources: &Sources, ops: &mut TaskOps) -> Result<(), Failure> {
    if runs.is_empty() {
        return Ok(());
    }
    runs.sort_unstable_by_key(|run| run.range.start);
    ops.list.label("read the pages");
    let area = ops.area;
    let put = |bytes: &[u8]| area.put(bytes).map_err(|error| error.on(Object::Tree, "prepare operations"));
    // One file after the other: of a chain of snapshots there are several.
    runs.sort_by_key(|run| run.file);
    for runs in runs.chunk_by(|one, next| one.file == next.file) {
        let Some(pages_fd) = (sources.pages)(runs[0].file) else {
            return Err(Failure::corrupt(format!("pagemap-{}.img", task.pid), None, "names no pages file"));
        };
        let fd = sources.reach.fetch(pages_fd, ops);
        pages::put::read_runs(&pages::put::split(runs), Arg::Result(fd), ops.list, put)?;
        ops.list.ok(libc::SYS_close, &[Arg::Result(fd)]);
    }
    Ok(())
}

/// Is this the ring of an io_uring that is not there when memory is mapped?
fn is_made_later(entry: &VmaEntry, sources: &Sources) -> bool {
    vma::is_ring(entry) && vma::file_id(entry).is_some_and(sources.is_made_later)
}

/// Maps nothing, where nothing else is.
fn take(range: &Range<u64>, ops: &mut TaskOps) -> usize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let (start, len) = (range.start.into(), (range.end - range.start).into());
    let args = [start, len, libc::PROT_NONE.into(), flags.into(), Arg::Value(u64::MAX), Arg::Value(0)];
    ops.list.call(libc::SYS_mmap, &args, agent::Judge::OkOr(libc::EEXIST))
}

/// Keeps the places of rings free that are made later.
fn keep_for_rings(task: &Task, sources: &Sources, ops: &mut TaskOps) {
    for entry in task.mm.vmas.iter().filter(|entry| is_made_later(entry, sources)) {
        take(&(entry.start..entry.end), ops);
    }
}

/// Maps those.
pub fn map_made_rings(task: &Task, sources: &Sources, ops: &mut TaskOps) -> Result<(), Failure> {
    let taken = task.mm.vmas.iter().map(|entry| entry.start..entry.end);
    let is_made = |entry: &VmaEntry| is_made_later(entry, sources);
    map_rings(task, taken.chain(vdso_range(task).map(|(whole, _)| whole)).collect(), &is_made, sources, ops)
}

/// Maps the rings of io_urings where they were, those that are `wanted`. The kernel takes no wish for their addresses, so
/// everything else is taken for a moment, and it has no choice. `taken` is what is mapped besides the agent.
fn map_rings(
    task: &Task,
    mut taken: Vec<Range<u64>>,
    wanted: &dyn Fn(&VmaEntry) -> bool,
    sources: &Sources,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    /// Nothing is mapped above without being told to.
    const TOP: u64 = (1 << 47) - PAGE;
    let is_ring = |entry: &&VmaEntry| vma::is_ring(entry);
    let rings: Vec<&VmaEntry> = task.mm.vmas.iter().filter(is_ring).filter(|entry| wanted(entry)).collect();
    if rings.is_empty() {
        return Ok(());
    }
    ops.list.label("map the rings of an io_uring");
    let hole = sources.hole;
    // What may be there or not is taken alone.
    let redirected = hole.end.next_multiple_of(1 << 16);
    let redirected = redirected..redirected + sources.own.len();
    taken.extend([hole.start..hole.start + PAGE, hole.start + agent::puppet::PAGES..hole.end]);
    taken.extend([redirected.clone(), TOP..u64::MAX]);
    taken.extend(task.mm.vmas.iter().filter(is_ring).map(|entry| entry.start..entry.end));
    taken.sort_unstable_by_key(|range| (range.start, range.end));
    let mut free = vec![redirected];
    let mut at = PAGE;
    for range in taken {
        if range.start > at {
            free.push(at..range.start);
        }
        at = at.max(range.end);
    }
    let filled: Vec<(usize, u64)> =
        free.iter().map(|range| (take(range, ops), range.end - range.start)).collect();
    for entry in &rings {
        take(&(entry.start..entry.end), ops);
    }
    for entry in rings {
        let len = entry.end - entry.start;
        let id = vma::file_id(entry).unwrap_or(0);
        let fd = (sources.files)(id, libc::O_RDWR as u32).ok_or_else(|| {
            Failure::corrupt(format!("mm-{}.img", task.pid), None, format!("maps file {id}, which is none"))
        })?;
        let fd = sources.reach.fetch(fd, ops);
        ops.list.ok(libc::SYS_munmap, &[entry.start.into(), len.into()]);
        let (prot, flags) = (u64::from(entry.prot).into(), libc::MAP_SHARED.into());
        let args = [Arg::Value(0), len.into(), prot, flags, Arg::Result(fd), entry.pgoff.into()];
        ops.list.call(libc::SYS_mmap, &args, agent::Judge::Equal(entry.start as i64));
        ops.list.ok(libc::SYS_close, &[Arg::Result(fd)]);
    }
    for (start, len) in filled {
        ops.list.any(libc::SYS_munmap, &[Arg::Result(start), len.into()]);
    }
    Ok(())
}

/// Puts a vdso where the task had its own: the kernel's, when it is the same, otherwise the old code with
/// jumps to the kernel's in the hole.
fn map_vdso(
    task: &Task,
    whole: Range<u64>,
    code: Range<u64>,
    sources: &Sources,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    let Sources { own, hole, contents, .. } = *sources;
    ops.list.label("map the vdso");
    if own.bytes.is_empty() {
        return Err(Failure::unsupported(Object::Named("vdso".into()), "this kernel has none").of(task.pid));
    }
    let mut old = vec![0; (code.end - code.start) as usize];
    for (page, place) in code.clone().step_by(PAGE as usize).zip(old.chunks_mut(PAGE as usize)) {
        if let Some(bytes) = contents.page_at(task, page) {
            place.copy_from_slice(&bytes[..place.len()]);
        }
    }
    let map = |address: u64, ops: &mut TaskOps| {
        ops.list.ok(libc::SYS_arch_prctl, &[(vdso::ARCH_MAP_VDSO as u64).into(), address.into()]);
    };
    if own.len() == whole.end - whole.start && old == own.bytes {
        map(whole.start, ops);
        return Ok(());
    }
    // Behind the agent's area, in the room that the plan left.
    let address = hole.end.next_multiple_of(1 << 16);
    map(address, ops);
    vdso::redirect(&mut old, &own.bytes, address + own.vvar).map_err(|name| {
        let why = format!("the kernel's has no {name}, which the old one had");
        Failure::unsupported(Object::Named("vdso".into()), why).of(task.pid)
    })?;
    let length = code.end - code.start;
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    let args =
        [code.start.into(), length.into(), prot.into(), flags.into(), Arg::Value(u64::MAX), Arg::Value(0)];
    ops.list.ok(libc::SYS_mmap, &args);
    let bytes = ops.bytes(&old)?;
    let target = ops.bytes(&[code.start.to_ne_bytes(), length.to_ne_bytes()].concat())?;
    let source = ops.bytes(&[bytes.to_ne_bytes(), length.to_ne_bytes()].concat())?;
    let args = [task.pid.into(), source.into(), 1.into(), target.into(), 1.into(), Arg::Value(0)];
    // Copies within the process itself: from the shared area to its place.
    ops.list.call(libc::SYS_process_vm_writev, &args, agent::Judge::Equal(length as i64));
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    ops.list.ok(libc::SYS_mprotect, &[code.start.into(), length.into(), prot.into()]);
    Ok(())
}
