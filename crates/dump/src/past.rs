//! What earlier snapshots of a tree mean for this one: which pages need not be saved again.

use crate::copies::Seen;
use crate::track::{self, Known, Watched};
use image::pagemap::Run;
use image::{Dir, InventoryEntry, kind};
use model::{Failure, Object, Options, Remedy};
use pages::chain::{Chain, PARENT_LINK, split};
use pages::select::{How, Question};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use sys::userfault::Userfault;

/// Runs of pages, each with what matters of its mapping.
pub type Runs = Vec<(Range<u64>, How)>;

/// The snapshot before, and who has noted what changed since.
#[derive(Debug)]
pub struct Past {
    known: Known,
    /// The folder before this one, as it was named, with its images and the id of the run that wrote them.
    parent: Option<(PathBuf, Chain, String)>,
    /// Changes are to be noted from now on.
    watches: bool,
    /// A page server has the pages, and knows which.
    is_remote: bool,
    /// Of this run.
    pub run_id: String,
}

impl Past {
    /// `watches`: changes are to be noted from now on.
    ///
    /// # Errors
    /// When the folder before is none.
    pub fn of(pids: &[i32], options: &Options, dir: &Dir, watches: bool) -> Result<Past, Failure> {
        let run_id = std::fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap_or_default();
        let run_id = run_id.trim_end().to_owned();
        let is_needed = watches || options.prev_images_dir.is_some();
        let known = if is_needed { Known::of(pids) } else { Known::default() };
        let mut parent = None;
        if let Some(name) = &options.prev_images_dir {
            // As the link in this folder will say it.
            let path = dir.path().join(name);
            if path.canonicalize().ok() == dir.path().canonicalize().ok() {
                let object = Object::Path(path.display().to_string());
                return Err(Failure::conflict(
                    object,
                    "use the images before",
                    "is the folder of these images",
                ));
            }
            let before = Dir::open(&path)?;
            let inventory: InventoryEntry =
                before.read_one(kind::INVENTORY, "inventory.img").map_err(|failure| {
                    failure.help(Remedy::Advice("a folder without it holds no finished dump"))
                })?;
            parent =
                Some((name.clone(), Chain::open(&before)?, inventory.dump_criu_run_id.unwrap_or_default()));
        }
        Ok(Past { known, parent, watches, is_remote: options.page_server, run_id })
    }

    /// What the kernel has to be asked about pages; none where nobody wants to know what changed.
    pub fn ask(&self) -> Option<Question> {
        (self.watches || self.parent.is_some()).then_some(Question::AndWhatIsNew)
    }

    /// Writes down which folder was before.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn link(&self, dir: &Dir) -> Result<(), Failure> {
        self.parent.as_ref().map_or(Ok(()), |(name, ..)| dir.link(PARENT_LINK, name))
    }

    /// Does a process have to make a userfaultfd?
    pub fn needs_userfault(&self, (pid, look): Seen) -> bool {
        self.watches && track::needs_new(&self.known, pid, look)
    }

    /// Begins to note changes of frozen processes, if that was asked for; `new` are the userfaultfds that they
    /// have made. What was noted before is forgotten: if this run fails, the next has to save all.
    pub fn watch(&mut self, looks: &[Seen], mut new: HashMap<i32, OwnedFd>) -> Vec<Watched> {
        if !self.watches {
            return Vec::new();
        }
        let held = looks.iter().filter_map(|(pid, look)| {
            let fd = new.remove(pid).map(Userfault::tracking).or_else(|| self.known.fetch(*pid));
            Some((*pid, *look, fd?))
        });
        let held: Vec<_> = held.collect();
        self.known.forget();
        let mut watched = Vec::with_capacity(held.len());
        for (pid, look, fd) in held {
            match fd.and_then(|userfault| track::watch(pid, userfault, look)) {
                Ok(one) => watched.push(one),
                Err(error) => {
                    let failure = error.on(Object::Task, "note changes of its memory").of(pid);
                    log::warn!("the next snapshot has to save all of it: {failure}");
                }
            }
        }
        watched
    }

    /// Was this process watched since the images before were written? Before [`Past::watch`].
    fn is_known(&self, pid: i32) -> bool {
        self.parent.as_ref().is_some_and(|(.., run_id)| self.known.is_since(pid, run_id))
    }

    /// The processes whose pages the images before have, as they are unless they were written since.
    ///
    /// # Errors
    /// When those images cannot be read.
    pub fn pages(&self, pids: impl Iterator<Item = i32>) -> Result<HashMap<i32, Vec<Run>>, Failure> {
        let mut pages = HashMap::new();
        let Some((name, chain, _)) = &self.parent else { return Ok(pages) };
        for pid in pids {
            if self.is_known(pid) && self.is_remote {
                pages.insert(pid, Vec::new());
            } else if self.is_known(pid) {
                pages.insert(pid, chain.load(&format!("pagemap-{pid}.img"))?.runs);
            } else {
                log::info!(
                    "pid {pid}: its changes since {} were not noted: all of it is saved",
                    name.display()
                );
            }
        }
        Ok(pages)
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

/// Splits off what is clean and known: it is not saved again.
pub fn divide(mut runs: Runs, known: Option<&Vec<Run>>) -> (Vec<Run>, Runs) {
    let Some(known) = known else {
        // Clean since some other time.
        runs.iter_mut().for_each(|(_, how)| how.is_clean = false);
        return (Vec::new(), runs);
    };
    let (unchanged, runs) = split(runs, |how: How| how.is_clean, known);
    (unchanged.into_iter().map(Run::in_parent).collect(), runs)
}
