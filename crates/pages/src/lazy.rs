//! Memory that comes when it is touched: pages of a running process, out of images.
//!
//! The kernel tells of each touch of a page that is not there, and of everything that changes what an address
//! means: children, moves, dropped and unmapped memory. [`Task`] keeps which addresses still wait for which
//! content; it is a plain value, changed by events. What nobody touches comes in the background.

use image::pagemap::Run;
use model::{Errno, Failure, Object};
use std::collections::BTreeMap;
use std::ops::Range;
use sys::userfault::{Event, Userfault};

/// Pages that come together with one that was touched.
const AROUND: u64 = 64 << 10;
/// What comes at a time in the background: touches wait as long.
const AT_ONCE: u64 = 256 << 10;
/// What is asked for before it is needed, where that takes time.
const AHEAD: u64 = 4 * AT_ONCE;

/// Content that waits. Most of it comes and goes whole, so it stays in the list in which it was read until a part of it is
/// touched.
#[derive(Debug, Clone, Default)]
pub struct Waiting {
    /// Sorted. What became parts is empty.
    whole: Vec<Run>,
    /// Those before are empty.
    first: usize,
    /// By address, until where, and where the first byte is.
    parts: BTreeMap<u64, (u64, Run)>,
}

impl Waiting {
    /// `runs` are sorted.
    pub fn new(runs: Vec<Run>) -> Waiting {
        Waiting { whole: runs, ..Waiting::default() }
    }

    pub fn is_empty(&self) -> bool {
        self.first().is_none()
    }

    /// The first that waits.
    pub fn first(&self) -> Option<u64> {
        let part = self.parts.keys().next().copied();
        self.whole.get(self.first).map(|run| run.range.start).into_iter().chain(part).min()
    }

    /// What is whole in a range.
    fn whole_in(&self, range: Range<u64>) -> impl Iterator<Item = usize> {
        let from = self.first + self.whole[self.first..].partition_point(|run| run.range.end <= range.start);
        let len = self.whole[from..].partition_point(|run| run.range.start < range.end);
        (from..from + len).filter(|at| !self.whole[*at].is_empty())
    }

    /// Makes parts of what is in a range.
    fn break_up(&mut self, range: Range<u64>) {
        let found: Vec<usize> = self.whole_in(range).collect();
        for at in found {
            let run = self.whole[at].clone();
            self.whole[at].range.end = run.range.start;
            self.parts.insert(run.range.start, (run.range.end, run));
        }
        while self.whole.get(self.first).is_some_and(Run::is_empty) {
            self.first += 1;
        }
    }

    /// The first that waits in a range.
    fn first_in(&self, range: Range<u64>) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        let whole = self.whole_in(range.clone()).next().map(|at| self.whole[at].range.start);
        let before = self.parts.range(..range.start).next_back();
        let before = before.filter(|(_, (end, _))| *end > range.start).map(|(start, _)| *start);
        let part = before.or_else(|| self.parts.range(range.clone()).next().map(|(start, _)| *start));
        whole.into_iter().chain(part).min().map(|start| start.max(range.start))
    }

    /// What waits in `length` bytes from the first on, in the pieces in which it will be given if nothing else happens:
    /// each with the place of its content.
    fn next(&mut self, length: u64) -> Vec<(&Run, u64, u64)> {
        let mut pieces = Vec::new();
        let Some(first) = self.first() else { return pieces };
        let limit = first.saturating_add(length);
        self.break_up(first..limit);
        for (start, (end, run)) in self.parts.range(first..limit) {
            let mut at = *start;
            while at < limit.min(*end) {
                let border = first + (at - first) / AT_ONCE * AT_ONCE + AT_ONCE;
                let stop = border.min(*end);
                pieces.push((run, run.offset + (at - start), stop - at));
                at = stop;
            }
        }
        pieces
    }

    /// Takes out what is in `range`, piece by piece: the addresses, and the content from there on.
    pub fn take(&mut self, range: Range<u64>) -> Vec<(Range<u64>, Run)> {
        self.break_up(range.clone());
        let mut taken = Vec::new();
        let before = self.parts.range(..range.start).next_back().map(|(start, (end, _))| (*start, *end));
        let first = match before {
            Some((start, end)) if end > range.start => start,
            _ => range.start,
        };
        let touched: Vec<u64> = self.parts.range(first..range.end).map(|(start, _)| *start).collect();
        for start in touched {
            let Some((end, run)) = self.parts.remove(&start) else { continue };
            let part =
                |from: u64| Run { range: from..end, offset: run.offset + (from - start), ..run.clone() };
            let (from, to) = (start.max(range.start), end.min(range.end));
            if start < from {
                self.parts.insert(start, (from, run.clone()));
            }
            if to < end {
                self.parts.insert(to, (end, part(to)));
            }
            taken.push((from..to, part(from)));
        }
        taken
    }

    /// Puts something in the place where nothing waits.
    fn put(&mut self, range: Range<u64>, run: Run) {
        if !range.is_empty() {
            self.parts.insert(range.start, (range.end, run));
        }
    }

    fn move_by(&mut self, from: u64, to: u64, len: u64) {
        let moved = self.take(from..from.saturating_add(len));
        self.take(to..to.saturating_add(len));
        for (range, run) in moved {
            let start = range.start - from + to;
            self.put(start..start + (range.end - range.start), run);
        }
    }
}

/// Who has the content that processes wait for.
pub trait Source {
    /// Content of a process of the images: that of `run` from `offset` on, `length` bytes or fewer, but whole pages and
    /// at least one.
    ///
    /// # Errors
    /// When it does not have it, or cannot be reached.
    fn content(&mut self, pid: i32, run: &Run, offset: u64, length: u64) -> Result<&[u8], Failure>;

    /// It will be asked for this next, if nothing else is touched before.
    ///
    /// # Errors
    /// When it cannot be reached.
    fn announce(&mut self, _pid: i32, _run: &Run, _offset: u64, _length: u64) -> Result<(), Failure> {
        Ok(())
    }
}

/// One process, or none any more.
#[derive(Debug)]
pub struct Task {
    /// Of the process in the images whose memory it began with.
    pid: i32,
    memory: Userfault,
    waiting: Waiting,
    /// Touches that could not be answered yet: the process has to tell of something first.
    later: Vec<u64>,
    /// What came because some of it was touched, since that was last asked.
    touched: Vec<Range<u64>>,
    /// Content that came and is not needed for this process any more, since that was last asked: of a run, from a place
    /// on, bytes.
    given: Vec<(Run, u64, u64)>,
    has_ended: bool,
}

/// What became of a part of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Given {
    /// Its first page came, or was there.
    First,
    /// Nothing waited for its first page.
    Nothing,
    /// Not now.
    Later,
}

impl Task {
    pub fn new(pid: i32, memory: Userfault, waiting: Waiting) -> Task {
        Task {
            pid,
            memory,
            waiting,
            later: Vec::new(),
            touched: Vec::new(),
            given: Vec::new(),
            has_ended: false,
        }
    }

    fn explain(&self, error: Errno) -> Failure {
        error.on(Object::Task, "give it pages").of(self.pid)
    }

    /// Has it all, or is no more.
    pub fn is_done(&self) -> bool {
        self.has_ended || self.waiting.is_empty() && self.later.is_empty()
    }

    pub fn memory(&self) -> &Userfault {
        &self.memory
    }

    /// Answers everything that the process waits for; returns its new children.
    ///
    /// # Errors
    /// When the content cannot be had, or the kernel refuses.
    pub fn answer(&mut self, source: &mut dyn Source) -> Result<Vec<Task>, Failure> {
        let mut children = Vec::new();
        // One that ended never tells anything again.
        while let Some(event) = self.memory.event().map_err(|error| self.explain(error))? {
            match event {
                Event::Fault(at) => self.give_around(at, source)?,
                event => children.extend(self.note(event)),
            }
        }
        for at in std::mem::take(&mut self.later) {
            self.give_around(at, source)?;
        }
        Ok(children)
    }

    /// Takes note of what happened; of a new child, which it returns.
    fn note(&mut self, event: Event) -> Option<Task> {
        match event {
            Event::Fault(at) => self.later.push(at),
            Event::Fork(memory) => return Some(Task::new(self.pid, memory, self.waiting.clone())),
            Event::Moved(from, to, len) => self.waiting.move_by(from, to, len),
            Event::Dropped(range) | Event::Unmapped(range) => drop(self.waiting.take(range)),
        }
        None
    }

    /// Is somebody to be answered who told of nothing new?
    pub fn is_late(&self) -> bool {
        !self.later.is_empty()
    }

    fn give_around(&mut self, at: u64, source: &mut dyn Source) -> Result<(), Failure> {
        // The one that is waited for comes first.
        match self.give(at..at + 4096, source)? {
            Given::Later => self.later.push(at),
            Given::First => {
                let around = at / AROUND * AROUND;
                let around = around..around + AROUND;
                self.touched.push(around.clone());
                self.give(around, source)?;
            }
            Given::Nothing => match self.memory.zero(at) {
                Err(error) if error.code == libc::EAGAIN => self.later.push(at),
                Err(error) => self.excuse(error)?,
                Ok(()) => {}
            },
        }
        Ok(())
    }

    /// Of which process of the images it is.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// What came because some of it was touched, since the last call.
    pub fn take_touched(&mut self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.touched)
    }

    /// Content that came since the last call: of a run, from a place on, bytes.
    pub fn take_given(&mut self) -> Vec<(Run, u64, u64)> {
        std::mem::take(&mut self.given)
    }

    pub fn waits_in(&self, range: Range<u64>) -> bool {
        !self.has_ended && self.waiting.first_in(range).is_some()
    }

    /// What waits in `range` will be given soon.
    ///
    /// # Errors
    /// When who has it cannot be reached.
    pub fn announce(&mut self, range: &Range<u64>, source: &mut dyn Source) -> Result<(), Failure> {
        self.waiting.break_up(range.clone());
        let before = self.waiting.parts.range(..range.end).rev();
        for (start, (end, run)) in before.take_while(|(_, (end, _))| *end > range.start) {
            let (from, to) = ((*start).max(range.start), (*end).min(range.end));
            // A range may be all there is.
            let length = to.saturating_sub(from).min(AT_ONCE);
            if length > 0 {
                source.announce(self.pid, run, run.offset + (from - start), length)?;
            }
        }
        Ok(())
    }

    /// Some of what waits in `range`; says whether that was all of it.
    ///
    /// # Errors
    /// As [`Task::answer`].
    pub fn give_of(&mut self, range: Range<u64>, source: &mut dyn Source) -> Result<bool, Failure> {
        // Not all at once: a touch would wait as long.
        let Some(first) = self.waiting.first_in(range.clone()) else { return Ok(true) };
        let end = range.end.min(first.saturating_add(AT_ONCE));
        self.give(first..end, source)?;
        Ok(!self.waits_in(range))
    }

    /// Some of what nobody has touched.
    ///
    /// # Errors
    /// As [`Task::answer`].
    pub fn give_more(&mut self, source: &mut dyn Source) -> Result<(), Failure> {
        let Some(first) = self.waiting.first() else { return Ok(()) };
        for (run, offset, length) in self.waiting.next(AHEAD) {
            source.announce(self.pid, run, offset, length)?;
        }
        self.give(first..first + AT_ONCE, source).map(drop)
    }

    /// Gives what waits in `range`.
    fn give(&mut self, range: Range<u64>, source: &mut dyn Source) -> Result<Given, Failure> {
        let mut given = Given::Nothing;
        let mut parts = self.waiting.take(range.clone()).into_iter();
        while let Some((part, run)) = parts.next() {
            let (mut at, mut end) = (part.start, part.end);
            while at < part.end && !self.has_ended {
                let offset = run.offset + (at - part.start);
                let bytes = match source.content(self.pid, &run, offset, end - at) {
                    Ok(bytes) => bytes,
                    Err(failure) => {
                        self.waiting.put(at..part.end, Run { offset, ..run });
                        parts.for_each(|(part, run)| self.waiting.put(part, run));
                        return Err(failure);
                    }
                };
                end = at + bytes.len() as u64;
                match self.memory.give(at, bytes) {
                    Ok(count) => {
                        at += count as u64;
                        self.given.push((run.clone(), offset, count as u64));
                    }
                    // It tells of something first: what is left waits again.
                    Err(error) if error.code == libc::EAGAIN => {
                        self.waiting.put(at..part.end, Run { offset, ..run });
                        parts.for_each(|(part, run)| self.waiting.put(part, run));
                        return Ok(if at == range.start { Given::Later } else { given });
                    }
                    // Part of it is there already, or not mapped any more, or in another mapping: page by page.
                    Err(error) if matches!(error.code, libc::EEXIST | libc::ENOENT) => {
                        if end - at == 4096 {
                            at += 4096;
                        }
                        end = (at + 4096).min(part.end);
                        continue;
                    }
                    Err(error) => self.excuse(error)?,
                }
                end = part.end;
                if part.start == range.start {
                    given = Given::First;
                }
            }
        }
        Ok(given)
    }

    /// Errors that only mean that nobody waits.
    fn excuse(&mut self, error: Errno) -> Result<(), Failure> {
        match error.code {
            libc::EEXIST | libc::ENOENT => Ok(()),
            libc::ESRCH => {
                self.has_ended = true;
                Ok(())
            }
            _ => Err(self.explain(error)),
        }
    }

    /// Content cannot be had any more: whoever touches what has not come is hit by SIGBUS, instead of finding zeros. Returns
    /// children of which that was not known.
    ///
    /// # Errors
    /// `EINVAL` before Linux 6.6, which knows no such thing.
    pub fn give_up(&mut self) -> Result<Vec<Task>, Failure> {
        let mut children = Vec::new();
        loop {
            while let Some(event) = self.memory.event().map_err(|error| self.explain(error))? {
                children.extend(self.note(event));
            }
            match self.poison() {
                // It tells of something first.
                Err(error) if error.code == libc::EAGAIN => {}
                Err(error) => return self.excuse(error).map(|()| children),
                Ok(()) => return Ok(children),
            }
        }
    }

    fn poison(&mut self) -> Result<(), Errno> {
        while let Some(start) = self.waiting.first() {
            self.waiting.break_up(start..start + 1);
            let Some((end, _)) = self.waiting.parts.get(&start) else { break };
            self.memory.poison(start..*end)?;
            self.waiting.parts.remove(&start);
        }
        // Nothing waited there: it was zero.
        while let Some(at) = self.later.last() {
            match self.memory.zero(*at) {
                Err(error) if error.code != libc::EEXIST => return Err(error),
                _ => self.later.pop(),
            };
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::pagemap::{PRESENT, PagesFile};

    fn run(range: Range<u64>, offset: u64) -> Run {
        Run { range, flags: PRESENT, offset, file: PagesFile::default(), same_as: None }
    }

    fn places(waiting: &Waiting) -> Vec<(Range<u64>, u64)> {
        let whole = waiting.whole_in(0..u64::MAX).map(|at| &waiting.whole[at]);
        let mut places: Vec<_> = whole.map(|run| (run.range.clone(), run.offset)).collect();
        places.extend(waiting.parts.iter().map(|(start, (end, run))| (*start..*end, run.offset)));
        places.sort_by_key(|place| place.0.start);
        places
    }

    #[test]
    fn what_is_taken_out_of_the_middle_leaves_both_ends() {
        let mut waiting = Waiting::new(vec![run(0x1000..0x9000, 0x10000), run(0xa000..0xb000, 0x18000)]);
        let taken = waiting.take(0x3000..0x5000);
        assert_eq!(taken.len(), 1);
        assert_eq!((&taken[0].0, taken[0].1.offset), (&(0x3000..0x5000), 0x12000));
        let left = [(0x1000..0x3000, 0x10000), (0x5000..0x9000, 0x14000), (0xa000..0xb000, 0x18000)];
        assert_eq!(places(&waiting), left);
        assert!(waiting.take(0x3000..0x5000).is_empty());
        assert_eq!(waiting.take(0..u64::MAX).len(), 3);
        assert!(waiting.is_empty());
    }

    #[test]
    fn what_was_touched_and_what_is_whole_go_out_in_order() {
        let runs = (0..6).map(|at| run(at * 0x3000 + 0x1000..at * 0x3000 + 0x3000, at * 0x2000)).collect();
        let mut waiting = Waiting::new(runs);
        waiting.take(0x8000..0x9000);
        waiting.take(0x1000..0x2000);
        let starts =
            |pieces: Vec<(&Run, u64, u64)>| pieces.into_iter().map(|(_, at, _)| at).collect::<Vec<_>>();
        assert_eq!(
            (waiting.first(), starts(waiting.next(0xa000))),
            (Some(0x2000), vec![0x1000, 0x2000, 0x4000, 0x6000])
        );
        let left = [0x1000, 0x2000, 0x4000, 0x6000, 0x8000, 0xa000];
        assert_eq!(places(&waiting).into_iter().map(|place| place.1).collect::<Vec<_>>(), left);
        assert_eq!(waiting.first_in(0x8000..0xb000), Some(0xa000));
        assert_eq!(waiting.take(0..u64::MAX).len(), 6);
        assert!(waiting.is_empty());
    }

    #[test]
    fn the_first_that_waits_in_a_range_is_found() {
        let waiting = Waiting::new(vec![run(0x1000..0x3000, 0), run(0x8000..0xa000, 0x2000)]);
        let wanted = [(0..0x1000, None), (0x2000..0x9000, Some(0x2000)), (0x3000..0x9000, Some(0x8000))];
        for (range, first) in wanted {
            assert_eq!(waiting.first_in(range.clone()), first, "{range:x?}");
        }
        assert_eq!(waiting.first_in(0x2000..0x2000), None);
        assert_eq!(waiting.first_in(0xa000..u64::MAX), None);
    }

    #[test]
    fn what_moves_takes_its_content_along_and_ends_what_was_there() {
        let mut waiting = Waiting::new(vec![run(0x1000..0x4000, 0), run(0x8000..0xa000, 0x3000)]);
        waiting.move_by(0x2000, 0x9000, 0x2000);
        let left = [(0x1000..0x2000, 0), (0x8000..0x9000, 0x3000), (0x9000..0xb000, 0x1000)];
        assert_eq!(places(&waiting), left);
    }
}
