//! Pages that are saved while their process runs on. What it changes meanwhile is read when it stands still, and put in its
//! place when it runs again: a pages file is in the order of addresses, without gaps.

use crate::chain::{each_part, split};
use crate::take::{Job, Target, fill};
use image::Dir;
use image::pagemap::{PRESENT, PagesFile, Run};
use model::{Failure, Object};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes that are moved within a file at a time.
const PIECE: usize = 1 << 20;

/// Pages of one process in a file that has no name yet.
#[derive(Debug)]
pub struct Ahead {
    file: File,
    /// Sorted, and so is the file.
    stored: Vec<Run>,
    /// Sorted: of these, what is not stored is zero.
    read: Vec<Range<u64>>,
}

impl Ahead {
    /// Copies the pages of a job, as long as `go_on` has nothing against it. What the process has given back meanwhile is left
    /// out.
    ///
    /// # Errors
    /// When the folder cannot hold them.
    pub fn take(
        job: Job,
        dir: &Dir,
        go_on: &(dyn Fn() -> Result<(), Failure> + Sync),
    ) -> Result<Ahead, Failure> {
        let name = format!("{}, before it has a name", job.owner.pagemap().replace("pagemap", "pages"));
        let create =
            |job: &Job, workers: usize| Target::of(dir.create_nameless()?, name.clone(), job, workers, None);
        let mut jobs = [job];
        let (mut filled, _) = fill(&jobs, None, &create, go_on, &|_| ())?;
        let (target, place) = filled.remove(0);
        let runs = std::mem::take(&mut jobs[0].runs);
        let (_, read) = split(&runs, |_| true, &place.missing);
        let read = read.into_iter().map(|(range, _)| range).collect();
        let file = match target {
            Some(target) => {
                target.end(&place)?;
                target.into_file()
            }
            None => dir.create_nameless()?,
        };
        Ok(Ahead { file, stored: place.runs, read })
    }

    /// What was read.
    pub fn read(&self) -> &[Range<u64>] {
        &self.read
    }

    /// Forgets all pages but these, which are sorted.
    pub fn keep(&mut self, ranges: Vec<Range<u64>>) {
        let wanted: Vec<(Range<u64>, ())> = ranges.into_iter().map(|range| (range, ())).collect();
        let stored = std::mem::take(&mut self.stored);
        let mut at = 0;
        each_part(
            &wanted,
            |()| true,
            &stored,
            |range, (), is_stored| {
                if is_stored {
                    at += stored[at..].iter().take_while(|run| run.range.end <= range.start).count();
                    let offset = stored[at].offset + (range.start - stored[at].range.start);
                    self.stored.push(run(range, offset));
                }
            },
        );
    }

    /// Makes it the pages file `name`, with pages that are not kept, which are sorted. Returns what is where in it.
    ///
    /// # Errors
    /// When the folder cannot hold it.
    pub fn complete(self, dir: &Dir, name: &str, fresh: &[(Range<u64>, &[u8])]) -> Result<Vec<Run>, Failure> {
        let explain = |error: &std::io::Error, call| {
            sys::memory::io_errno(call, error).on(Object::Path(name.into()), "write pages")
        };
        let ranges: Vec<&Range<u64>> = fresh.iter().map(|(range, _)| range).collect();
        let layout = lay_out(&self.stored, &ranges);
        let mut buffer = Vec::new();
        for piece in layout.moves {
            piece.make(&self.file, &mut buffer).map_err(|error| explain(&error, "pread"))?;
        }
        for ((_, bytes), offset) in fresh.iter().zip(layout.places) {
            self.file.write_all_at(bytes, offset).map_err(|error| explain(&error, "pwrite"))?;
        }
        let explain = |error: model::Errno| error.on(Object::Path(name.into()), "give it its name");
        sys::fd::truncate(&self.file, layout.len).map_err(explain)?;
        sys::name::link(&self.file, &dir.free(name)?).map_err(explain)?;
        Ok(layout.runs)
    }
}

fn run(range: Range<u64>, offset: u64) -> Run {
    Run { range, flags: PRESENT, offset, file: PagesFile::default(), same_as: None }
}

/// A piece of a file on its way to another place.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Move {
    from: u64,
    to: u64,
    len: u64,
}

impl Move {
    /// In steps that overwrite nothing that is still to be moved.
    fn make(&self, file: &File, buffer: &mut Vec<u8>) -> std::io::Result<()> {
        buffer.resize(buffer.len().max(PIECE.min(self.len as usize)), 0);
        let mut done = 0;
        while done < self.len {
            let some = (self.len - done).min(PIECE as u64);
            let at = if self.to > self.from { self.len - done - some } else { done };
            let part = &mut buffer[..some as usize];
            file.read_exact_at(part, self.from + at)?;
            file.write_all_at(part, self.to + at)?;
            done += some;
        }
        Ok(())
    }
}

/// What goes where in a file.
#[derive(Debug, Default)]
struct Layout {
    /// To be made one after the other.
    moves: Vec<Move>,
    /// Of what is fresh.
    places: Vec<u64>,
    runs: Vec<Run>,
    len: u64,
}

/// Puts fresh pages between those that are stored. Both are sorted, and have none in common.
fn lay_out(stored: &[Run], fresh: &[&Range<u64>]) -> Layout {
    let mut layout = Layout::default();
    let mut moves: Vec<Move> = Vec::new();
    let (mut stored, mut fresh) = (stored.iter().peekable(), fresh.iter().peekable());
    loop {
        let is_stored = match (stored.peek(), fresh.peek()) {
            (Some(one), Some(other)) => one.range.start < other.start,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => break,
        };
        let offset = layout.len;
        let range = if is_stored {
            let one = stored.next().expect("it was seen");
            match moves.last_mut() {
                Some(last) if last.from + last.len == one.offset && last.to + last.len == offset => {
                    last.len += one.len();
                }
                _ => moves.push(Move { from: one.offset, to: offset, len: one.len() }),
            }
            one.range.clone()
        } else {
            layout.places.push(offset);
            (*fresh.next().expect("it was seen")).clone()
        };
        layout.len += range.end - range.start;
        match layout.runs.last_mut() {
            Some(last) if last.range.end == range.start => last.range.end = range.end,
            _ => layout.runs.push(run(range, offset)),
        }
    }
    // What goes towards the end makes room from the last one on; what goes towards the beginning, from the first one on. The
    // two are never in each other's way: places are in the same order as before.
    for group in moves.chunk_by(|one, next| (one.to > one.from) == (next.to > next.from)) {
        let away = group.iter().filter(|piece| piece.to != piece.from).cloned();
        match group[0].to > group[0].from {
            true => layout.moves.extend(away.rev()),
            false => layout.moves.extend(away),
        }
    }
    layout
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    /// A file of one number for each page: its address, and the time it was written.
    fn page(address: u64, time: u8) -> [u8; PAGE as usize] {
        let mut page = [time; PAGE as usize];
        page[..8].copy_from_slice(&address.to_le_bytes());
        page
    }

    /// Pages `0..64`, of which `was` were stored, `kept` are kept, and `fresh` are fresh: what comes of it.
    fn check(was: u64, kept: u64, fresh: u64) {
        let folder = std::path::Path::new("/dev/shm").join(format!("crtools-ahead-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let dir = Dir::open(&folder).unwrap();
        let pages = |set: u64| (0..64).filter(move |at| set >> at & 1 == 1);
        let ranges = |set: u64| {
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for at in pages(set) {
                match ranges.last_mut() {
                    Some(last) if last.end == at * PAGE => last.end += PAGE,
                    _ => ranges.push(at * PAGE..(at + 1) * PAGE),
                }
            }
            ranges
        };
        let file = dir.create_nameless().unwrap();
        let (mut stored, mut offset) = (Vec::new(), 0);
        for range in ranges(was) {
            stored.push(run(range.clone(), offset));
            for address in range.step_by(PAGE as usize) {
                file.write_all_at(&page(address, 1), offset).unwrap();
                offset += PAGE;
            }
        }
        let mut ahead = Ahead { file, stored, read: ranges(was) };
        ahead.keep(ranges(kept & was));
        let content: Vec<(Range<u64>, Vec<u8>)> = ranges(fresh & !(kept & was))
            .into_iter()
            .map(|range| (range.clone(), range.step_by(PAGE as usize).flat_map(|at| page(at, 2)).collect()))
            .collect();
        let parts: Vec<(Range<u64>, &[u8])> =
            content.iter().map(|(range, bytes)| (range.clone(), &bytes[..])).collect();
        let runs = ahead.complete(&dir, "pages-1.img", &parts).unwrap();
        let all = (kept & was) | (fresh & !(kept & was));
        let found: Vec<Range<u64>> = runs.iter().map(|run| run.range.clone()).collect();
        assert_eq!(found, ranges(all));
        let file = std::fs::read(folder.join("pages-1.img")).unwrap();
        let wanted: Vec<u8> = pages(all)
            .flat_map(|at| page(at * PAGE, if (kept & was) >> at & 1 == 1 { 1 } else { 2 }))
            .collect();
        assert!(file == wanted, "{was:#x} {kept:#x} {fresh:#x}");
        let offsets: Vec<u64> =
            runs.iter().scan(0, |at, run| Some(std::mem::replace(at, *at + run.len()))).collect();
        assert!(runs.iter().map(|run| run.offset).eq(offsets));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn pages_that_come_and_go_leave_the_file_in_order() {
        check(0xff, 0xff, 0);
        check(0xff, 0xf0, 0xf);
        check(0xff00, 0xff00, 0xff00ff);
        check(0xffff, 0xff0f, 0xff0000);
        check(0, 0, 7);
        check(7, 0, 0);
        // xorshift64, so that it is the same each time.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..300 {
            check(next() | next(), next() | next(), next() & next());
        }
    }

    #[test]
    fn what_is_longer_than_a_piece_is_moved_over_itself() {
        let file = File::from(sys::memory::memfd(c"ahead", false).unwrap());
        let content: Vec<u8> = (0..3 * PIECE + 5000).map(|at| (at / 997) as u8).collect();
        for (from, to) in [(4096, 8192), (8192, 4096)] {
            file.write_all_at(&content, from).unwrap();
            let len = content.len() as u64;
            Move { from, to, len }.make(&file, &mut Vec::new()).unwrap();
            let mut moved = vec![0; content.len()];
            file.read_exact_at(&mut moved, to).unwrap();
            assert!(moved == content, "from {from} to {to}");
        }
    }
}
