//! What a tree touches first, for the next lazy restore of the same images: written down while it is touched, and given
//! in that order before anything else the next time.

use image::Dir;
use image::working_set::{self, Touched};
use model::Failure;
use pages::lazy::{Source, Task};
use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

/// What is touched after nothing was for so long is work of another time.
const QUIET: Duration = Duration::from_secs(1);
/// A tree that is never quiet has shown enough.
const ENOUGH: Duration = Duration::from_secs(30);
/// Ranges looked through at a time, of which nothing waits any more.
const TURN: usize = 256;

/// Ranges that are asked for before they are needed, where that takes time.
const SOON: usize = 16;

/// Touches that are written down. Meanwhile nothing comes in the background: it would hide them.
#[derive(Debug)]
pub struct Recording {
    touched: Vec<Touched>,
    known: HashSet<Touched>,
    begun: Instant,
    last: Instant,
}

impl Recording {
    pub fn begin() -> Recording {
        let now = Instant::now();
        Recording { touched: Vec::new(), known: HashSet::new(), begun: now, last: now }
    }

    /// The tree runs from now on.
    pub fn starts(&mut self) {
        self.begun = Instant::now();
        self.last = self.begun;
    }

    /// Notes what came because it was touched.
    pub fn note(&mut self, task: &mut Task) {
        for range in task.take_touched() {
            let touched = Touched { pid: task.pid(), range };
            self.last = Instant::now();
            if self.known.insert(touched.clone()) {
                self.touched.push(touched);
            }
        }
    }

    /// How long to wait for more; none when it is enough.
    pub fn rest(&self) -> Option<Duration> {
        let until = (self.last + QUIET).min(self.begun + ENOUGH);
        until.checked_duration_since(Instant::now()).filter(|rest| !rest.is_zero())
    }

    /// Writes it down. A tree that runs does not stop for want of it.
    pub fn end(self, dir: &Dir) {
        match working_set::write(dir, &self.touched) {
            Ok(()) => log::info!("{} ranges were touched first", self.touched.len()),
            Err(failure) => log::warn!("what was touched first is not known the next time: {failure}"),
        }
    }
}

/// What was touched first the last time, as far as it has not come.
#[derive(Debug)]
pub struct Ahead(VecDeque<Touched>);

impl Ahead {
    /// What the images say. If that is damaged, nothing: it only makes things quicker.
    pub fn read(dir: &Dir) -> Ahead {
        let found = working_set::read(dir).unwrap_or_else(|failure| {
            log::warn!("what was touched first the last time is not known: {failure}");
            Vec::new()
        });
        Ahead(found.into())
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Gives some of it.
    ///
    /// # Errors
    /// As [`Task::answer`].
    pub fn give(&mut self, tasks: &mut [Task], source: &mut dyn Source) -> Result<(), Failure> {
        for _ in 0..TURN {
            let Some(Touched { pid, range }) = self.0.front() else { return Ok(()) };
            let task = tasks.iter_mut().find(|task| task.pid() == *pid);
            let Some(task) = task.filter(|task| task.waits_in(range.clone())) else {
                self.0.pop_front();
                continue;
            };
            log::debug!("pid {pid}: {:#x}-{:#x} was touched early", range.start, range.end);
            for next in self.0.iter().take(SOON).filter(|next| next.pid == *pid) {
                task.announce(&next.range, source)?;
            }
            if task.give_of(range.clone(), source)? {
                self.0.pop_front();
            }
            return Ok(());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_that_is_quiet_ends() {
        let mut recording = Recording::begin();
        assert!(recording.rest().is_some_and(|rest| rest <= QUIET));
        recording.last = Instant::now() - QUIET;
        assert!(recording.rest().is_none());
        recording.last = Instant::now() + ENOUGH;
        recording.begun = Instant::now() - ENOUGH;
        assert!(recording.rest().is_none());
    }
}
