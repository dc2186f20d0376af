//! What earlier snapshots of a tree mean for this one: which pages need not be saved again.

use crate::ahead::{self, Ahead};
use crate::copies;
use crate::freeze::Tree;
use crate::observe::{self, Look};
use crate::track::{self, Known, Maps, Watched};
use agent::crew;
use image::pagemap::Run;
use image::{Dir, InventoryEntry, kind};
use model::{Errno, Failure, Object, Options, Remedy};
use pages::chain::{Chain, PARENT_LINK, each_part, split};
use pages::select::{How, Question};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use sys::userfault::Userfault;

/// Runs of pages, each with what matters of its mapping.
pub type Runs = Vec<(Range<u64>, How)>;

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

/// A process, where it has a `syscall` instruction, and its mappings.
pub type Door<'m> = (i32, u64, &'m Maps);

/// The snapshot before, and who has noted what changed since.
#[derive(Debug)]
pub struct Past {
    known: Known,
    parent: Option<Parent>,
    /// What was saved while the tree ran.
    ahead: Option<Ahead>,
    /// What was known of its pages is so no more.
    is_spent: bool,
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
        Ok(Past { known, parent, ahead: None, is_spent: false, watches, run_id })
    }

    /// The tree that was frozen consists of these processes: nothing else counts from now on.
    pub fn is_of(&mut self, pids: &[i32]) {
        self.known.keep(pids);
    }

    /// What the kernel has to be asked about pages, when the memory is looked at; `later` when that can be done in
    /// copies. Nothing where [`Past::watch`] will ask.
    pub fn ask(&self, later: bool) -> Option<Question> {
        match (self.watches, self.parent.is_some() || self.ahead.is_some()) {
            (true, _) => None,
            (false, true) => Some(Question::AndWhatIsNew),
            (false, false) => (!later).then_some(Question::WhatIsThere),
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
        let doors: Vec<Door> =
            looks.iter().map(|(pid, look)| (*pid, look.instruction, &look.memory.maps[..])).collect();
        let userfaults = self.userfaults(tree, &doors);
        let mut watched = Vec::with_capacity(looks.len());
        for ((pid, look), userfault) in looks.iter_mut().zip(userfaults) {
            match userfault.and_then(|userfault| track::watch(*pid, userfault, &look.memory.maps)) {
                Ok((one, pages)) => {
                    watched.push(one);
                    look.memory.pages = pages;
                }
                Err(failure) => {
                    log::warn!("pid {pid}: the next snapshot has to save all of it: {failure}");
                    let areas = observe::areas(&look.memory.maps);
                    look.memory.pages = observe::find_pages(*pid, &areas, Question::AndWhatIsNew)?;
                }
            }
        }
        Ok(watched)
    }

    /// A userfaultfd for each of these frozen processes, that of the keeper where it has one. From now on nothing that is
    /// known of their pages is good for another run.
    pub fn userfaults(&mut self, tree: &mut Tree, doors: &[Door]) -> Vec<Result<Userfault, Failure>> {
        let explain = |error: Errno, pid| error.on(Object::Task, "note changes of its memory").of(pid);
        let mut ahead = self.ahead.as_mut();
        let mut held: HashMap<i32, Userfault> = HashMap::with_capacity(doors.len());
        for (pid, _, maps) in doors {
            let own = ahead.as_mut().and_then(|ahead| ahead.userfault(*pid));
            let one = own.or_else(|| self.known.fetch(*pid)?.ok()).filter(|one| track::is_good(one, maps));
            held.extend(one.map(|one| (*pid, one)));
        }
        let needy = doors.iter().filter(|(pid, ..)| !held.contains_key(pid));
        let mut new =
            copies::userfaults(tree, needy.map(|(pid, instruction, _)| (*pid, *instruction)).collect());
        self.known.forget();
        self.is_spent = true;
        let mut find = |pid: i32| match held.remove(&pid) {
            Some(held) => Ok(held),
            None => {
                let none = || Failure::conflict(Object::Task, "enter it", "its leader is not held").of(pid);
                let made = new.remove(&pid).ok_or_else(none)??;
                Userfault::tracking(made).map_err(|error| explain(error, pid))
            }
        };
        doors.iter().map(|(pid, ..)| find(*pid)).collect()
    }

    /// Saves memory of the tree below `root` while that runs, if it is worth it.
    pub fn save_ahead(&mut self, root: i32, options: &Options, dir: &Dir) {
        if !ahead::is_wanted(root, options) {
            return;
        }
        match Ahead::take(root, options, dir, self) {
            // What it has of the images before is all that is known of them.
            Ok(ahead) => (self.ahead, self.is_spent) = (Some(ahead), false),
            Err(failure) => {
                let level = if options.pre_copy.is_some() { log::Level::Warn } else { log::Level::Info };
                log::log!(level, "no memory is saved ahead: {failure}");
                if self.is_spent {
                    self.parent.iter_mut().for_each(|parent| parent.pages.clear());
                }
            }
        }
    }

    /// Of pages that need not be saved: those that the images before have, and those that were saved ahead.
    pub fn claim(&mut self, pid: i32, unchanged: Vec<Run>) -> (Vec<Run>, Option<pages::ahead::Ahead>) {
        let Some(ahead) = &mut self.ahead else { return (unchanged, None) };
        self.is_spent = true;
        ahead.claim(pid, unchanged)
    }

    /// The pages that the images before have, or that were saved ahead, of a process whose changes were noted since.
    pub fn pages(&self, pid: i32) -> Option<&Vec<Run>> {
        match &self.ahead {
            Some(ahead) => ahead.pages(pid),
            None => self.parent.as_ref()?.pages.get(&pid),
        }
    }

    /// Says which processes are saved as if nothing was before.
    pub fn tell(&self, pids: &[i32]) {
        let Some(parent) = &self.parent else { return };
        for pid in pids.iter().filter(|pid| self.pages(**pid).is_none()) {
            let name = parent.name.display();
            log::info!("pid {pid}: its changes since {name} were not noted: all of it is saved");
        }
    }

    /// Was anything saved ahead?
    pub fn ahead(&mut self) -> Option<&mut Ahead> {
        self.ahead.as_mut()
    }

    /// Is nothing true any more of what was known when it was made?
    pub fn is_spent(&self) -> bool {
        self.is_spent
    }

    /// Nobody is watched any more.
    pub fn forget(&mut self) {
        self.known.forget();
        self.ahead = None;
    }

    /// Is there a userfaultfd of ours over the memory of this process?
    pub fn is_ours(&self, pid: i32) -> bool {
        self.known.has(pid) || self.ahead.as_ref().is_some_and(|ahead| ahead.has(pid))
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
