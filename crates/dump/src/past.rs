//! What earlier snapshots of a tree mean for this one: which pages need not be saved again.

use crate::copies;
use crate::freeze::Tree;
use crate::observe::{self, Look};
use crate::track::{self, Known, Watched};
use agent::crew;
use image::pagemap::Run;
use image::{Dir, InventoryEntry, kind};
use model::{Errno, Failure, Object, Options, Remedy};
use pages::chain::{Chain, PARENT_LINK, each_part, split};
use pages::select::{How, Question};
use pages::take::Room;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use sys::userfault::Userfault;

/// Runs of pages, each with what matters of its mapping.
pub type Runs = Vec<(Range<u64>, How)>;

/// The part of the memory of a process that is written sooner than all of it is copied, by the factor that it takes longer.
const LITTLE: u64 = 8;
/// The part of what has changed that may change yet.
const MORE: u64 = 8;

/// The folder before this one.
#[derive(Debug)]
struct Parent {
    /// As it was named.
    name: PathBuf,
    /// The processes whose pages it has, as they are unless they were written since, each with these.
    pages: HashMap<i32, Vec<Run>>,
}

impl Parent {
    /// `name` is how the link in `dir` will say it. Page maps are read on all processors, but not those that a page
    /// server has, which knows of them.
    fn open(name: &Path, dir: &Dir, known: &Known, is_remote: bool) -> Result<Parent, Failure> {
        let path = dir.path().join(name);
        if path.canonicalize().ok() == dir.path().canonicalize().ok() {
            let object = Object::Path(path.display().to_string());
            return Err(Failure::conflict(object, "use the images before", "is the folder of these images"));
        }
        let before = Dir::open(&path)?;
        let inventory: InventoryEntry = before
            .read_one(kind::INVENTORY, "inventory.img")
            .map_err(|failure| failure.help(Remedy::Advice("a folder without it holds no finished dump")))?;
        let chain = Chain::open(&before)?;
        let load = |pid: &i32| match is_remote {
            true => Ok((*pid, Vec::new())),
            false => chain.load(&format!("pagemap-{pid}.img")).map(|map| (*pid, map.runs)),
        };
        let pids = known.since(&inventory.dump_criu_run_id.unwrap_or_default());
        let loaded = crew::in_parallel(&pids, 2, |some| some.iter().map(load).collect::<Vec<_>>());
        let pages = loaded.into_iter().flatten().collect::<Result<_, Failure>>()?;
        Ok(Parent { name: name.to_owned(), pages })
    }
}

/// The snapshot before, and who has noted what changed since.
#[derive(Debug)]
pub struct Past {
    known: Known,
    parent: Option<Parent>,
    /// Changes are to be noted from now on.
    watches: bool,
    /// Of this run.
    pub run_id: String,
}

impl Past {
    /// `watches`: changes are to be noted from now on. While this is read, the tree may run.
    ///
    /// # Errors
    /// When the folder before is none.
    pub fn of(options: &Options, dir: &Dir, watches: bool) -> Result<Past, Failure> {
        let run_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
        let run_id = run_id.trim_end().to_owned();
        let name = options.prev_images_dir.as_ref();
        let known = if watches || name.is_some() { Known::find() } else { Known::default() };
        let parent = name.map(|name| Parent::open(name, dir, &known, options.page_server)).transpose()?;
        Ok(Past { known, parent, watches, run_id })
    }

    /// The tree that was frozen consists of these processes: nothing else counts from now on.
    pub fn is_of(&mut self, pids: &[i32]) {
        self.known.keep(pids);
    }

    /// What the kernel has to be asked about pages, when the memory is looked at; `later` when that can be done in
    /// copies. Nothing where [`Past::watch`] will ask.
    pub fn ask(&self, later: bool) -> Option<Question> {
        match (self.watches, &self.parent) {
            (true, _) => None,
            (false, Some(_)) => Some(Question::AndWhatIsNew),
            (false, None) => (!later).then_some(Question::WhatIsThere),
        }
    }

    /// Has [`Past::watch`] found the pages?
    pub fn watches(&self) -> bool {
        self.watches
    }

    /// Writes down which folder was before.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn link(&self, dir: &Dir) -> Result<(), Failure> {
        self.parent.as_ref().map_or(Ok(()), |parent| dir.link(PARENT_LINK, &parent.name))
    }

    /// Begins to note changes of frozen processes, if that was asked for, and finds their pages. What was noted before is
    /// forgotten: if this run fails, the next has to save all.
    ///
    /// # Errors
    /// When their pages cannot be found.
    pub fn watch<'l>(
        &mut self,
        tree: &mut Tree,
        looks: impl Iterator<Item = (i32, &'l mut Look)>,
    ) -> Result<Vec<Watched>, Failure> {
        if !self.watches {
            return Ok(Vec::new());
        }
        let mut looks: Vec<_> = looks.collect();
        let needy = looks.iter().filter(|(pid, look)| track::needs_new(&self.known, *pid, look));
        let mut new = copies::userfaults(tree, needy.map(|(pid, look)| (*pid, look.instruction)).collect());
        let explain = |error: Errno, pid| error.on(Object::Task, "note changes of its memory").of(pid);
        let mut held = Vec::with_capacity(looks.len());
        for (pid, _) in &looks {
            let made = new.remove(pid).map(|made| {
                made.and_then(|fd| Userfault::tracking(fd).map_err(|error| explain(error, *pid)))
            });
            held.push(made.or_else(|| Some(self.known.fetch(*pid)?.map_err(|error| explain(error, *pid)))));
        }
        self.known.forget();
        let mut watched = Vec::with_capacity(looks.len());
        for ((pid, look), userfault) in looks.iter_mut().zip(held) {
            match userfault {
                Some(Ok(userfault)) => watched.push(track::watch(*pid, userfault, look)?),
                other => {
                    let why =
                        other.and_then(Result::err).map_or(String::new(), |failure| format!(": {failure}"));
                    log::warn!("pid {pid}: the next snapshot has to save all of it{why}");
                    let areas = observe::areas(&look.memory.maps);
                    look.memory.pages = observe::find_pages(*pid, &areas, Question::AndWhatIsNew)?;
                }
            }
        }
        Ok(watched)
    }

    /// The pages that the images before have, of those processes whose changes were noted since.
    pub fn pages(&mut self, pids: &[i32]) -> HashMap<i32, Vec<Run>> {
        let Some(parent) = &mut self.parent else { return HashMap::new() };
        let pages = std::mem::take(&mut parent.pages);
        for pid in pids.iter().filter(|pid| !pages.contains_key(pid)) {
            let name = parent.name.display();
            log::info!("pid {pid}: its changes since {name} were not noted: all of it is saved");
        }
        pages
    }

    /// Makes room for the pages of processes that have changed little, while they run. It is a guess, of some more than
    /// have changed by now.
    pub fn make_room(&self, options: &Options, dir: &Dir) -> HashMap<i32, Room> {
        let is_elsewhere = options.page_server || options.compress.is_some() || options.lazy_pages;
        if is_elsewhere || options.copy_on_write == Some(true) {
            return HashMap::new();
        }
        let parents = self.parent.iter().flat_map(|parent| &parent.pages);
        let rooms = parents.filter_map(|(pid, known)| {
            let areas = observe::areas(&observe::read_maps(*pid).ok()?);
            let pages = observe::find_pages(*pid, &areas, Question::AndWhatIsNew).ok()?;
            let wanted = bytes_to_save(&pages.runs, Some(known));
            let is_little = wanted > copies::SMALL && wanted <= pages.scanned_pages * 4096 / LITTLE;
            let room = is_little.then(|| Room::make(dir, (wanted + wanted / MORE).next_multiple_of(1 << 20)));
            Some((*pid, room??))
        });
        rooms.collect()
    }

    /// Nobody is watched any more.
    pub fn forget(&mut self) {
        self.known.forget();
    }

    /// Is there a userfaultfd of ours over the memory of this process?
    pub fn is_ours(&self, pid: i32) -> bool {
        self.known.has(pid)
    }
}

/// Bytes of pages that are to be saved: not those that are clean and known.
pub fn bytes_to_save(runs: &[(Range<u64>, How)], known: Option<&Vec<Run>>) -> u64 {
    let mut bytes = 0;
    let known = known.map_or(&[][..], Vec::as_slice);
    each_part(
        runs,
        |how| how.is_clean,
        known,
        |range, _, is_known| {
            bytes += if is_known { 0 } else { range.end - range.start };
        },
    );
    bytes
}

/// Splits off what is clean and known: it is not saved again.
pub fn divide(mut runs: Runs, known: Option<&Vec<Run>>) -> (Vec<Run>, Runs) {
    let Some(known) = known else {
        // Clean since some other time.
        runs.iter_mut().for_each(|(_, how)| how.is_clean = false);
        return (Vec::new(), runs);
    };
    let (unchanged, runs) = split(&runs, |how: How| how.is_clean, known);
    (unchanged.into_iter().map(Run::in_parent).collect(), runs)
}
