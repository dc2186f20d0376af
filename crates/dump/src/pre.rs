//! A dump of memory alone, while the tree runs: what has not changed by the time of the dump proper need not be
//! saved then. Pages are copied while the tree runs on, as they are by then: what it writes from the moment on in which it
//! stood still is noted, and saved again. Only pages that processes have in common have to be as they were in that moment,
//! for they are stored once.

use crate::ahead::{self, Outline};
use crate::copies::{self, Seen, Way};
use crate::freeze::{State, Tree, freeze};
use crate::observe::{self, Common, Depth};
use crate::past::{Past, bytes_to_save, divide};
use crate::run::{Saved, Taking, connect, dedup, micros, share};
use crate::{encode, hands, track};
use image::Dir;
use model::hooks::Action;
use model::{Failure, Failures, Hooks, Object, Options};
use std::time::{Duration, Instant};

/// Saves the memory of a tree, and notes from then on what changes.
///
/// # Errors
/// Everything that stands in the way. The tree runs on in any case; after an error the folder holds nothing.
pub fn run(options: &Options) -> Result<(), Failures> {
    let root = options.tree.ok_or_else(|| Failure::conflict(Object::Tree, "", "no process is named"))?;
    let dir = Dir::open(&options.images_dir)?;
    Hooks::new(options.action_scripts.clone()).run(Action::PreDump, dir.path(), Some(root))?;
    pre_dump(root, options, &dir).inspect_err(|_| dir.discard())
}

fn pre_dump(root: i32, options: &Options, dir: &Dir) -> Result<(), Failures> {
    let start = Instant::now();
    options.progress.stage("freeze");
    sys::apart::go_on()?;
    let mut receiver = connect(options)?;
    let mut taking = Taking::new(dir, options, receiver.as_mut());
    let mut past = Past::of(options, dir, true)?;
    let mut tree = freeze(root, Duration::from_secs(options.timeout_s.max(1).into()))?;
    let frozen = Instant::now();
    let freezing_us = micros(start);
    let alive: Vec<(usize, i32)> = tree
        .processes
        .iter()
        .filter(|process| process.state != State::Zombie)
        .map(|process| (process.members[0], process.pid))
        .collect();
    let pids: Vec<i32> = alive.iter().map(|(_, pid)| *pid).collect();
    past.is_of(&pids);
    let depth = Depth { flags: false, pages: None };
    let common = Common::of(pids.len());
    let looks = tree.crew.each(alive, move |_, pid| observe::look(pid, depth, common.as_deref()));
    let mut looks = pids.iter().copied().zip(looks).map(|(pid, look)| look.map(|look| (pid, look)));
    let mut looks = looks.by_ref().collect::<Result<Vec<_>, Failure>>()?;
    past.tell(&pids);
    let watched = past.watch(&mut tree, looks.iter_mut().map(|(pid, look)| (*pid, look)))?;
    let seen: Vec<Seen> = looks.iter().map(|(pid, look)| (*pid, look)).collect();
    let outlines: Vec<Outline> = seen
        .iter()
        .map(|(pid, look)| (*pid, look.stat.ppid, bytes_to_save(&look.memory.pages.runs, past.pages(*pid))))
        .collect();
    let way = match options.copy_on_write {
        Some(false) => Way::StandsStill,
        None if ahead::pays(&outlines, 0, options.share_pages) => Way::RunsOn,
        _ => copies::make(&mut tree, &seen),
    };
    let runs_on = way == Way::RunsOn;
    let mut frozen_us = None;
    let let_go = |tree: &mut Tree| {
        tree.let_go();
        let us = micros(frozen);
        log::info!("the tree stood still for {us} us");
        Some(us)
    };
    if matches!(way, Way::Copied | Way::RunsOn) {
        frozen_us = let_go(&mut tree);
    }
    let mut saved = Vec::with_capacity(looks.len());
    let mut scanned = 0;
    for (pid, look) in &mut looks {
        // The flags say what is not worth saving.
        let maps = match way {
            Way::Copied => copies::read(&tree.copies, *pid, None)?.memory.maps,
            _ => match observe::read_memory(*pid, None) {
                Ok(memory) => memory.maps,
                // It has ended since.
                Err(failure) if runs_on => {
                    log::info!("{failure}");
                    continue;
                }
                Err(failure) => return Err(failure.into()),
            },
        };
        look.memory.maps = maps;
        look.memory.keep_content();
        scanned += look.memory.pages.scanned_pages;
        let (elsewhere, runs) = divide(std::mem::take(&mut look.memory.pages.runs), past.pages(*pid));
        let memory_of = tree.copies.of(*pid).filter(|_| way == Way::Copied).map_or(*pid, |copy| copy.pid);
        let (pid, parent) = (*pid, look.stat.ppid);
        let (aside, ahead, hands) = (None, None, None);
        saved.push(Saved { pid, parent, memory_of, runs_on, aside, ahead, hands, runs, elsewhere });
    }
    if !runs_on {
        share(&mut saved, options)?;
    }
    dir.begin()?;
    past.link(dir)?;
    hands::give(&mut tree, &mut saved, options, dir);
    taking.memory(saved)?;
    hands::end(&mut tree);
    taking.finish()?;
    sys::apart::go_on()?;
    let frozen_us = frozen_us.unwrap_or_else(|| micros(frozen));
    dir.finish(&encode::inventory_of_memory(&past.run_id))?;
    if let Err(failure) = track::keep(watched, &past.run_id) {
        log::warn!("the next snapshot has to save everything: {failure}");
    }
    drop(tree);
    dedup(options, dir);
    taking.report(freezing_us, frozen_us, scanned);
    Ok(())
}
