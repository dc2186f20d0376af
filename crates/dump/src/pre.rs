//! A dump of memory alone, while the tree runs: what has not changed by the time of the dump proper need not be
//! saved then. Every page is as it was at one moment, in which the tree stood still.

use crate::copies::{self, Seen};
use crate::freeze::{State, freeze};
use crate::observe::{self, Common, Depth};
use crate::past::{Past, divide};
use crate::run::{Saved, Taking, connect, dedup, micros, share};
use crate::{encode, track};
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
    let mut past = Past::of(&pids, options, dir, true)?;
    let depth = Depth { flags: false, pages: past.ask() };
    let common = Common::of(pids.len());
    let looks = tree.crew.each(alive, move |_, pid| observe::look(pid, depth, common.as_deref()));
    let mut looks = pids.iter().copied().zip(looks).map(|(pid, look)| look.map(|look| (pid, look)));
    let mut looks = looks.by_ref().collect::<Result<Vec<_>, Failure>>()?;
    let known = past.pages(pids.iter().copied())?;
    let watched;
    let is_copied;
    {
        let seen: Vec<Seen> = looks.iter().map(|(pid, look)| (*pid, look)).collect();
        let wants_copies = options.copy_on_write != Some(false);
        let visited = copies::visit(&mut tree, &seen, wants_copies, &|seen| past.needs_userfault(seen));
        is_copied = visited.0;
        watched = past.watch(&seen, visited.1);
    }
    let mut frozen_us = 0;
    if is_copied {
        tree.let_go();
        frozen_us = micros(frozen);
        log::info!("the tree stood still for {frozen_us} us");
    }
    let mut saved = Vec::with_capacity(looks.len());
    let mut scanned = 0;
    for (pid, look) in &mut looks {
        // The flags say what is not worth saving.
        let maps = match is_copied {
            true => copies::read(&tree.copies, *pid, None)?.memory.maps,
            false => observe::read_memory(*pid, None)?.maps,
        };
        look.memory.maps = maps;
        look.memory.keep_content();
        scanned += look.memory.pages.scanned_pages;
        let (elsewhere, runs) = divide(std::mem::take(&mut look.memory.pages.runs), known.get(pid));
        let memory_of = tree.copies.of(*pid).filter(|_| is_copied).map_or(*pid, |copy| copy.pid);
        saved.push(Saved { pid: *pid, parent: look.stat.ppid, memory_of, aside: None, runs, elsewhere });
    }
    dir.begin()?;
    past.link(dir)?;
    share(&mut saved, options)?;
    taking.memory(saved)?;
    taking.finish()?;
    sys::apart::go_on()?;
    if !is_copied {
        frozen_us = micros(frozen);
    }
    dir.finish(&encode::inventory_of_memory(&past.run_id))?;
    if let Err(failure) = track::keep(watched, &past.run_id) {
        log::warn!("the next snapshot has to save everything: {failure}");
    }
    drop(tree);
    dedup(options, dir);
    taking.report(freezing_us, frozen_us, scanned);
    Ok(())
}
