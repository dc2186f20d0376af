//! A dump of memory alone, while the tree runs: what has not changed by the time of the dump proper need not be
//! saved then. Every page is as it was at one moment, in which the tree stood still.

use crate::copies::{self, Seen, Way};
use crate::freeze::{State, Tree, freeze};
use crate::observe::{self, Common, Depth};
use crate::past::{Past, divide};
use crate::run::{Saved, Taking, connect, dedup, micros, put_aside, share};
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
    let mut rooms = past.make_room(options, dir);
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
    let known = past.pages(&pids);
    let watched = past.watch(&mut tree, looks.iter_mut().map(|(pid, look)| (*pid, look)))?;
    let seen: Vec<Seen> = looks.iter().map(|(pid, look)| (*pid, look)).collect();
    let way = match (options.copy_on_write, copies::shorter(&seen, &known, &rooms)) {
        (Some(false), _) => Way::StandsStill,
        (None, Some(shorter)) => shorter,
        _ => copies::make(&mut tree, &seen),
    };
    let mut frozen_us = None;
    let let_go = |tree: &mut Tree| {
        tree.let_go();
        let us = micros(frozen);
        log::info!("the tree stood still for {us} us");
        Some(us)
    };
    if way == Way::Copied {
        frozen_us = let_go(&mut tree);
    }
    let mut saved = Vec::with_capacity(looks.len());
    let mut scanned = 0;
    for (pid, look) in &mut looks {
        // The flags say what is not worth saving.
        let maps = match way {
            Way::Copied => copies::read(&tree.copies, *pid, None)?.memory.maps,
            _ => observe::read_memory(*pid, None)?.maps,
        };
        look.memory.maps = maps;
        look.memory.keep_content();
        scanned += look.memory.pages.scanned_pages;
        let (elsewhere, runs) = divide(std::mem::take(&mut look.memory.pages.runs), known.get(pid));
        let memory_of = tree.copies.of(*pid).filter(|_| way == Way::Copied).map_or(*pid, |copy| copy.pid);
        let room = rooms.remove(pid);
        saved.push(Saved {
            pid: *pid,
            parent: look.stat.ppid,
            memory_of,
            aside: None,
            room,
            hands: None,
            runs,
            elsewhere,
        });
    }
    share(&mut saved, options)?;
    dir.begin()?;
    past.link(dir)?;
    match way {
        Way::PutAside => put_aside(&mut saved)?,
        Way::WrittenFirst => taking.memory(std::mem::take(&mut saved))?,
        Way::StandsStill | Way::Copied => {}
    }
    if matches!(way, Way::PutAside | Way::WrittenFirst) {
        frozen_us = let_go(&mut tree);
    }
    if way != Way::WrittenFirst {
        hands::give(&mut tree, &mut saved, options, dir);
        taking.memory(saved)?;
        hands::end(&mut tree);
    }
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
