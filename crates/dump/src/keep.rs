//! A dump whose tree keeps its memory until the restore has asked for it (post-copy): which pages stay, and who gets
//! them.
//!
//! The tree stands still meanwhile. It is ended when the other side says that it has all; it runs on when nothing was
//! asked for, or nothing came of it there; it is left stopped when the other side is lost with a part of it, for nobody
//! here can know whether it runs there.

use crate::past::Runs;
use crate::run::Saved;
use crate::survey::Surveyed;
use image::pagemap::Run;
use kinds::task::sessions::{self, Kin, Way};
use kinds::vma;
use model::{Failure, Options};
use pages::away::{Ended, Kept, hand_out};
use pages::background;
use pages::server::Door;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// The memory that stays, and the way to it.
#[derive(Debug)]
pub struct Keeping {
    door: Door,
    kept: Kept,
}

impl Keeping {
    /// Makes the way to it, before anything is stopped.
    ///
    /// # Errors
    /// When that cannot be.
    pub fn begin(options: &Options) -> Result<Keeping, Failure> {
        Ok(Keeping { door: Door::open(options)?, kept: Kept::default() })
    }

    /// Takes out of what is saved what can come later. `sharing` are the processes that are to share pages with their parents
    /// again.
    ///
    /// # Errors
    /// When memory cannot be kept.
    pub fn keep(
        &mut self,
        saved: &mut [Saved],
        processes: &[Surveyed],
        sharing: &HashSet<i32>,
    ) -> Result<(), Failure> {
        // From an earlier try.
        self.kept = Kept::default();
        let surveyed: HashMap<i32, &Surveyed> =
            processes.iter().map(|process| (process.pid, process)).collect();
        let needed = needed_at_birth(processes, sharing);
        for one in saved.iter_mut().filter(|one| !needed.contains(&one.pid)) {
            let vmas = surveyed[&one.pid].mm.vmas.iter().filter(|entry| vma::may_come_later(entry));
            let later: Vec<Range<u64>> = vmas.map(|entry| entry.start..entry.end).collect();
            let (away, runs) = part(std::mem::take(&mut one.runs), &later);
            one.runs = runs;
            one.elsewhere.extend(away.iter().cloned().map(Run::away));
            self.kept.add(one.pid, away)?;
        }
        log::info!("{} pages stay until they are asked for", self.kept.pages());
        Ok(())
    }

    /// Waits for the other side, and gives it what it asks for.
    ///
    /// # Errors
    /// When nobody came.
    pub fn hand_out(self, options: &Options) -> Result<Ended, Failure> {
        background::say_ready(options.status_fd)?;
        let mut connection = self.door.accept(&sys::apart::go_on)?;
        Ok(hand_out(&mut *connection, &self.kept, &sys::apart::go_on))
    }
}

/// Processes whose memory others begin with, for these share it or by ways that a restore cannot do without, and those who
/// begin with it.
fn needed_at_birth(processes: &[Surveyed], sharing: &HashSet<i32>) -> HashSet<i32> {
    let places: HashMap<u32, usize> =
        processes.iter().enumerate().map(|(at, process)| (process.pstree.pid, at)).collect();
    let kin: Vec<Kin> = processes
        .iter()
        .map(|process| Kin {
            pid: process.pid,
            sid: process.pstree.sid as i32,
            parent: places.get(&process.pstree.ppid).copied(),
            has_ended: process.cores[0].1.thread_core.is_none(),
        })
        .collect();
    let (mut makers, mut heirs) = (HashSet::new(), HashSet::new());
    for (own, way) in kin.iter().zip(sessions::ways(&kin)) {
        let parent = own.parent.map(|parent| kin[parent].pid);
        let leads_others =
            own.has_ended && kin.iter().any(|other| other.sid == own.pid && other.pid != own.pid);
        let begins_with_it = way == Ok(Way::Orphaned) || sharing.contains(&own.pid);
        if begins_with_it || leads_others {
            makers.extend(parent);
        }
        // A child of one that was not empty at its birth finds the same.
        if begins_with_it || parent.is_some_and(|parent| heirs.contains(&parent)) {
            heirs.insert(own.pid);
        }
    }
    &makers | &heirs
}

/// Splits sorted runs into what is in `ranges`, which are sorted too, joined where it can be, and the rest.
fn part(runs: Runs, ranges: &[Range<u64>]) -> (Vec<Range<u64>>, Runs) {
    // Each run is inside one mapping.
    let is_in = |run: &Range<u64>| {
        let at = ranges.partition_point(|range| range.end <= run.start);
        ranges.get(at).is_some_and(|range| range.start <= run.start)
    };
    let (inside, outside): (Runs, Runs) = runs.into_iter().partition(|(run, _)| is_in(run));
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(inside.len());
    for (run, _) in inside {
        match joined.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => joined.push(run),
        }
    }
    (joined, outside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pages::select::How;

    #[test]
    fn runs_stay_that_are_in_mappings_that_may_come_later() {
        let how = How { is_readable: true, ..How::default() };
        let runs = [0x1000..0x3000, 0x3000..0x4000, 0x6000..0x7000, 0x9000..0xa000].map(|run| (run, how));
        let (away, rest) = part(runs.to_vec(), &[0x0..0x3000, 0x3000..0x5000, 0x9000..0xb000]);
        assert_eq!(away, [0x1000..0x4000, 0x9000..0xa000]);
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].0, 0x6000..0x7000);
    }
}
