//! What a dump leaves in the processes of a tree if it is killed: a child that has ended, and the agent's memory. It works in a
//! process of its own (decision 8), so the command outlives it, and takes that away. Both see one page, in which the dump
//! writes down what it has made.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use sys::memory::{PAGE, SharedMap};

/// What a process has of its copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Left {
    pub of: i32,
    pub pid: i32,
    /// What the agent runs in, where the two have the same memory.
    pub shared: Option<Range<u64>>,
}

/// Words of one note: the copy's pid, that of its original, and where the agent is. The first one says that it counts.
const WORDS: usize = 6;
const NOTES: usize = PAGE as usize / 4 / WORDS;
/// How long a copy may take to end when its tracer has.
const PATIENCE: Duration = Duration::from_secs(2);

static PAPER: OnceLock<Option<SharedMap>> = OnceLock::new();

/// To be called before the dump gets its process. Without it nothing is written down.
pub fn prepare() {
    PAPER.get_or_init(make);
}

fn make() -> Option<SharedMap> {
    let file = sys::memory::memfd(c"crtools-left", false).ok()?;
    sys::fd::truncate(&file, PAGE).ok()?;
    SharedMap::new(&file, 0, PAGE as usize).ok()
}

fn paper() -> Option<&'static SharedMap> {
    PAPER.get()?.as_ref()
}

fn words(paper: &SharedMap, note: usize) -> [&AtomicU32; WORDS] {
    std::array::from_fn(|word| paper.word((note * WORDS + word) * 4))
}

fn write(paper: &SharedMap, left: &Left) {
    let mut notes = (0..NOTES).map(|note| words(paper, note));
    // Several threads write: each takes a free one first.
    let Some([pid, _, rest @ ..]) = notes.find(|words| {
        words[1].compare_exchange(0, left.of as u32, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }) else {
        return;
    };
    let agent = left.shared.clone().unwrap_or_default();
    let halves = [agent.start, agent.end].map(|end| [end as u32, (end >> 32) as u32]);
    for (word, half) in rest.into_iter().zip(halves.as_flattened()) {
        word.store(*half, Ordering::Relaxed);
    }
    pid.store(left.pid as u32, Ordering::Release);
}

fn strike(paper: &SharedMap, pid: i32) {
    for [noted, of, ..] in (0..NOTES).map(|note| words(paper, note)) {
        if noted.compare_exchange(pid as u32, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            of.store(0, Ordering::Release);
        }
    }
}

fn read(paper: &SharedMap) -> Vec<Left> {
    let notes = (0..NOTES).map(|note| words(paper, note).map(|word| word.load(Ordering::Acquire)));
    let made = notes.filter(|[pid, ..]| *pid != 0).map(|[pid, of, words @ ..]| {
        let address = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let agent = address(words[0], words[1])..address(words[2], words[3]);
        Left { of: of as i32, pid: pid as i32, shared: Some(agent).filter(|agent| !agent.is_empty()) }
    });
    made.collect()
}

/// Writes down what was made.
pub fn note(left: &Left) {
    paper().into_iter().for_each(|paper| write(paper, left));
}

/// It is gone.
pub fn forget(pid: i32) {
    paper().into_iter().for_each(|paper| strike(paper, pid));
}

/// Takes away what a dump that was killed has left.
pub fn mend() {
    for left in paper().map(read).unwrap_or_default() {
        // It is killed with its tracer.
        let end = Instant::now() + PATIENCE;
        // Nobody can wait for it before all its threads have ended.
        let threads = || sys::fd::numbers(&format!("/proc/{}/task", left.pid)).map_or(0, |tids| tids.len());
        let state = || crate::tracer::read_stat(left.pid).map_or(b'Z', |stat| stat.state);
        while (threads() > 1 || state() != b'Z') && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        match crate::copies::take_away(&left) {
            Ok(()) => log::info!("pid {}: nothing is left of the dump that was killed", left.of),
            Err(failure) => log::warn!("something is left of the dump that was killed: {failure}"),
        }
        forget(left.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_down_is_read_until_it_is_struck_out() {
        let paper = make().unwrap();
        let left = |pid, shared| Left { of: 7, pid, shared };
        let agent = 0x7f12_3456_7000..0x7f12_3466_7000;
        let all = [left(8, None), left(9, Some(agent)), left(10, None)];
        all.iter().for_each(|left| write(&paper, left));
        assert_eq!(read(&paper), all);
        strike(&paper, 9);
        assert_eq!(read(&paper), [all[0].clone(), all[2].clone()]);
        write(&paper, &left(11, None));
        assert_eq!(read(&paper).len(), 3);
        // What finds no room is not written, and nothing else is lost.
        (0..2 * NOTES as i32).for_each(|pid| write(&paper, &left(100 + pid, None)));
        assert_eq!(read(&paper).len(), NOTES);
    }
}
