//! Memory that is saved before the tree stands still for its snapshot.
//!
//! The tree is stopped for a moment, in which its memory is protected so that the kernel notes every write (see `track.rs`),
//! and its pages are copied while it runs on. When it is frozen for the snapshot, what was written since is all that is left
//! to read.

use crate::copies::{self, Seen};
use crate::freeze::{State, Tree, freeze};
use crate::observe;
use crate::past::{Door, Past, Runs, bytes_to_save, divide};
use crate::run::{WORTH_SHARING, micros};
use crate::track;
use image::Dir;
use image::pagemap::Run;
use model::{Failure, Object, Options};
use pages::ahead;
use pages::chain::split;
use pages::select::{Area, Question};
use pages::take::{Job, Owner, Source};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use sys::userfault::Userfault;

/// Bytes of a tree from which on it is worth to stop it twice.
const WORTH_IT: u64 = 64 << 20;
/// Processes of a tree that is stopped twice.
const FEW: usize = 16;
/// Bytes that are read while the tree stands still, at most: a part of what there is, and so many.
const PART: u64 = 16;
const MOST: u64 = 64 << 20;
/// Chunks that are copied before it is seen how much was written.
const LOOK: u64 = 128;

/// The processes of a tree, with their memory as it was when they were stopped for a moment.
#[derive(Debug, Default)]
pub struct Ahead(HashMap<i32, One>);

/// One of them.
#[derive(Debug)]
struct One {
    /// It notes what is written since.
    userfault: Option<Userfault>,
    /// None if that came to nothing.
    saved: Option<ahead::Ahead>,
    /// What the images before have.
    before: Vec<Run>,
    /// That and what was saved; none if there is neither.
    known: Option<Vec<Run>>,
}

/// What is known of a process before it is stopped: its number, that of its parent, and bytes that are its own.
pub type Outline = (i32, i32, u64);

/// The tree below `root`; none when it has more than a few processes, or cannot be read.
fn outline(root: i32) -> Option<Vec<Outline>> {
    let mut found: Vec<Outline> = Vec::new();
    let mut level = vec![(root, 0)];
    while let Some((pid, parent)) = level.pop() {
        let tids = sys::fd::numbers(&format!("/proc/{pid}/task")).ok()?;
        level.extend(crate::tracer::children(pid, &tids).into_iter().map(|child| (child, pid)));
        found.push((pid, parent, copies::private_bytes(pid)?));
        if found.len() + level.len() > FEW {
            return None;
        }
    }
    Some(found)
}

/// Is it worth to save these processes ahead? Not if they may have pages in common that are stored once: which, is seen
/// when they stand still.
pub fn pays(processes: &[Outline], at_least: u64, shares: bool) -> bool {
    let bytes = |pid: i32| processes.iter().find(|one| one.0 == pid).map_or(0, |one| one.2);
    let total: u64 = processes.iter().map(|one| one.2).sum();
    let in_common: u64 = processes.iter().map(|(_, parent, own)| bytes(*parent).min(*own)).sum();
    total >= at_least && (!shares || in_common < WORTH_SHARING)
}

/// Bytes that may be read while a tree with so many stands still.
fn limit(bytes: u64) -> u64 {
    MOST.min(bytes / PART).max(copies::SMALL)
}

fn stop(root: i32, options: &Options) -> Result<Tree, Failure> {
    freeze(root, Duration::from_secs(options.timeout_s.max(1).into()))
        .map_err(|failures| failures.into_iter().next().expect("one at least"))
}

/// Is the memory of the tree below `root` saved ahead? Where the kernel cannot note writes (before Linux 6.7), that fails.
pub fn is_wanted(root: i32, options: &Options) -> bool {
    let is_elsewhere = options.page_server || options.compress.is_some() || options.lazy_pages;
    options.pre_copy.unwrap_or_else(|| {
        !is_elsewhere
            && copies::are_wanted(options)
            && options.copy_on_write != Some(true)
            && outline(root).is_some_and(|outline| pays(&outline, WORTH_IT, options.share_pages))
    })
}

impl Ahead {
    /// Saves the memory of a tree that runs, and will run on.
    ///
    /// # Errors
    /// What stands in the way; the tree runs on.
    pub fn take(root: i32, options: &Options, dir: &Dir, past: &mut Past) -> Result<Ahead, Failure> {
        let (mut ahead, found) = Ahead::begin(root, options, past)?;
        let outlines: Vec<Outline> = found.iter().map(|(outline, _)| *outline).collect();
        if !pays(&outlines, 1, options.share_pages) {
            log::info!("no memory is saved ahead: there is little, or processes may have it in common");
            return Ok(ahead);
        }
        // Requests of the kernel that were on their way to pages when these were protected are not noted: they end before
        // every thread stands still.
        let begun = Instant::now();
        drop(stop(root, options)?);
        log::info!("the tree stood still for {} us, before its pages are read", micros(begun));
        let begun = Instant::now();
        match ahead.fill(found, dir) {
            Ok(()) => log::info!("saved memory ahead in {} us", micros(begun)),
            Err(failure) => {
                ahead.forget();
                sys::apart::go_on()?;
                log::info!("no memory is saved ahead: {failure}");
            }
        }
        Ok(ahead)
    }

    /// Has writes noted, and finds out what there is to be saved. The tree stands still for the moment in which it makes what
    /// notes them.
    fn begin(
        root: i32,
        options: &Options,
        past: &mut Past,
    ) -> Result<(Ahead, Vec<(Outline, Runs)>), Failure> {
        let begun = Instant::now();
        let mut tree = stop(root, options)?;
        let alive = tree.processes.iter().filter(|process| process.state != State::Zombie);
        let alive: Vec<(i32, i32)> = alive.map(|process| (process.pid, process.stat.ppid)).collect();
        past.is_of(&alive.iter().map(|(pid, _)| *pid).collect::<Vec<_>>());
        let maps =
            alive.iter().map(|(pid, _)| observe::read_maps(*pid)).collect::<Result<Vec<_>, Failure>>()?;
        let mut doors: Vec<Door> = Vec::with_capacity(alive.len());
        for ((pid, _), maps) in alive.iter().zip(&maps) {
            doors.push((*pid, observe::find_instruction(*pid, maps)?, maps));
        }
        let userfaults = past.userfaults(&mut tree, &doors);
        drop(tree);
        log::info!("the tree stood still for {} us, for its writes to be noted", micros(begun));
        let (mut ahead, mut found) = (Ahead::default(), Vec::with_capacity(alive.len()));
        for (((pid, parent), userfault), maps) in alive.into_iter().zip(userfaults).zip(&maps) {
            let (watched, pages) = match userfault.and_then(|userfault| track::watch(pid, userfault, maps)) {
                Ok(watched) => watched,
                Err(failure) => {
                    log::info!("{failure}");
                    continue;
                }
            };
            let (before, mut runs) = divide(pages.runs, past.pages(pid));
            runs.retain(|(_, how)| how.is_watched);
            found.push(((pid, parent, bytes_to_save(&runs, None)), runs));
            let known = past.pages(pid).map(|_| before.clone());
            ahead
                .0
                .insert(pid, One { userfault: Some(watched.into_userfault()), saved: None, before, known });
        }
        Ok((ahead, found))
    }

    /// Copies what was found, while the tree runs.
    fn fill(&mut self, found: Vec<(Outline, Runs)>, dir: &Dir) -> Result<(), Failure> {
        let total: u64 = found.iter().map(|((.., bytes), _)| bytes).sum();
        let has_relatives = found.len() > 1;
        let copied = AtomicU64::new(0);
        for ((pid, ..), runs) in found {
            // The flags say what is not worth saving.
            let Ok(mut memory) = observe::read_memory(pid, None) else { continue };
            memory.pages.runs = runs;
            memory.keep_content();
            let areas: Vec<Area> =
                observe::areas(&memory.maps).into_iter().filter(|area| !area.has_file).collect();
            let source = Source::Process { pid, has_relatives, runs: true };
            let (runs, owner) = (memory.pages.runs, Owner::Task(pid));
            let job =
                Job { source, runs, elsewhere: Vec::new(), owner, pages_id: 0, ahead: None, hands: None };
            // What was written stays so: when it is too much, there is no need to go on.
            let go_on = || {
                sys::apart::go_on()?;
                if copied.fetch_add(1, Ordering::Relaxed) % LOOK == LOOK - 1 {
                    let pages = observe::find_pages(pid, &areas, Question::AndWhatIsNew)?;
                    let written = pages.runs.iter().filter(|(_, how)| !how.is_clean);
                    let written: u64 = written.map(|(range, _)| range.end - range.start).sum();
                    if written > limit(total) {
                        let why = "it changes faster than it is saved";
                        return Err(Failure::conflict(Object::Task, "save its memory ahead", why).of(pid));
                    }
                }
                Ok(())
            };
            let saved = ahead::Ahead::take(job, dir, &go_on)?;
            let one = self.0.get_mut(&pid).expect("it was found");
            one.known = Some(join(&one.before, saved.read()));
            one.saved = Some(saved);
        }
        Ok(())
    }

    /// Forgets what was saved, but not what the images before have.
    pub fn forget(&mut self) {
        for one in self.0.values_mut() {
            if one.saved.take().is_some() {
                one.known = Some(std::mem::take(&mut one.before));
            }
        }
    }

    pub fn has(&self, pid: i32) -> bool {
        self.0.contains_key(&pid)
    }

    /// The userfaultfd over the memory of a process, once.
    pub fn userfault(&mut self, pid: i32) -> Option<Userfault> {
        self.0.get_mut(&pid)?.userfault.take()
    }

    /// Pages that need not be saved where they were not written since.
    pub fn pages(&self, pid: i32) -> Option<&Vec<Run>> {
        self.0.get(&pid)?.known.as_ref()
    }

    /// Of pages that need not be saved: those that the images before have, and a file that has the others.
    pub fn claim(&mut self, pid: i32, unchanged: Vec<Run>) -> (Vec<Run>, Option<ahead::Ahead>) {
        let Some(one) = self.0.get_mut(&pid) else { return (unchanged, None) };
        let Some(mut saved) = one.saved.take() else { return (unchanged, None) };
        let ranges: Vec<(Range<u64>, ())> = unchanged.into_iter().map(|run| (run.range, ())).collect();
        let (before, here) = split(&ranges, |()| true, &one.before);
        saved.keep(here.into_iter().map(|(range, ())| range).collect());
        (before.into_iter().map(Run::in_parent).collect(), Some(saved))
    }

    /// Bytes that may be read while the tree stands still; none if nothing was saved.
    pub fn limit(&self, looks: &[Seen]) -> Option<u64> {
        let bytes = looks.iter().map(|(_, look)| look.private_bytes).sum();
        self.0.values().any(|one| one.saved.is_some()).then(|| limit(bytes))
    }
}

/// Two lists of ranges that have none in common, as one; both are sorted.
fn join(before: &[Run], read: &[Range<u64>]) -> Vec<Run> {
    let mut all: Vec<Run> = before.to_vec();
    all.extend(read.iter().cloned().map(Run::in_parent));
    all.sort_by_key(|run| run.range.start);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_may_be_stored_once_is_not_saved_ahead() {
        let server = [(10, 1, 2 * MIB), (11, 10, 400 * MIB)];
        let family = [(10, 1, 512 * MIB), (11, 10, 512 * MIB)];
        assert!(pays(&server, WORTH_IT, true) && !pays(&family, WORTH_IT, true));
        assert!(pays(&family, WORTH_IT, false));
        assert!(!pays(&[(10, 1, MIB)], WORTH_IT, true) && !pays(&[], 1, true));
    }

    #[test]
    fn little_may_be_read_while_the_tree_stands_still() {
        assert_eq!([1, 512 * MIB, 64 << 30].map(limit), [copies::SMALL, 32 * MIB, MOST]);
    }
}
