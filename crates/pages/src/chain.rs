//! Snapshots that build on earlier ones: a folder with a link `parent` holds only what has changed since.
//!
//! A page map says of each run of pages whether its content is here or in the parent. [`Chain::load`] follows
//! that to the folder that has the bytes, so that nobody behind it knows of chains.

use crate::compressed::Compressed;
use crate::take::pages_name;
use image::Dir;
use image::pagemap::{LAZY, PAGE, PRESENT, Pagemap, PagesFile, Run};
use model::{Failure, Object};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;

/// The name of the link.
pub const PARENT_LINK: &str = "parent";
/// Longer than any chain that is made on purpose: a link that leads in a circle.
const LONGEST: usize = 1000;

/// A pages file as it is stored.
#[derive(Debug)]
pub enum Stored {
    Plain(File),
    Compressed(Compressed),
}

/// A folder and its parents, the newest first.
#[derive(Debug)]
pub struct Chain(Vec<Dir>);

impl Chain {
    /// # Errors
    /// When a parent is missing, or the links lead in a circle.
    pub fn open(dir: &Dir) -> Result<Chain, Failure> {
        let mut dirs = vec![Dir::open(dir.path())?];
        loop {
            let parent = dirs[dirs.len() - 1].path().join(PARENT_LINK);
            if std::fs::symlink_metadata(&parent).is_err() {
                return Ok(Chain(dirs));
            }
            if dirs.len() == LONGEST {
                return Err(Failure::corrupt(PARENT_LINK, None, "has no end: the links lead in a circle"));
            }
            // Each level by its real name: the path must not grow with the chain.
            let object = || Object::Path(parent.display().to_string());
            let real = std::fs::canonicalize(&parent).map_err(|error| {
                sys::memory::io_errno("open", &error).on(object(), "follow the link to the parent images")
            })?;
            dirs.push(Dir::open(&real)?);
        }
    }

    /// The newest folder.
    pub fn newest(&self) -> &Dir {
        &self.0[0]
    }

    /// Opens a pages file that [`Chain::load`] has named; one that is compressed is unpacked into memory.
    pub fn open_pages(&self, file: PagesFile) -> Result<File, Failure> {
        match self.find_pages(file)? {
            Stored::Plain(file) => Ok(file),
            Stored::Compressed(compressed) => compressed.unpack(),
        }
    }

    /// Finds a pages file that [`Chain::load`] has named.
    pub fn find_pages(&self, file: PagesFile) -> Result<Stored, Failure> {
        let dir = self.0.get(file.layer as usize);
        let missing = || Failure::corrupt(pages_name(file.id), None, "is of a folder that is not there");
        let dir = dir.ok_or_else(missing)?;
        match Compressed::open(dir, file.id)? {
            Some(compressed) => Ok(Stored::Compressed(compressed)),
            None => dir.open_file(&pages_name(file.id)).map(Stored::Plain),
        }
    }

    /// Opens a pages file that [`Chain::load`] has named, to free what is not needed any more.
    ///
    /// # Errors
    /// When it cannot be changed.
    pub fn to_free(&self, file: PagesFile) -> Result<Freeing, Failure> {
        let missing = || Failure::corrupt(pages_name(file.id), None, "is of a folder that is not there");
        let dir = self.0.get(file.layer as usize).ok_or_else(missing)?;
        let is_compressed = dir.has(&crate::compressed::name(file.id));
        let name = if is_compressed { crate::compressed::name(file.id) } else { pages_name(file.id) };
        Ok(Freeing { file: dir.open_file_to_change(&name)?, name, is_compressed })
    }

    /// Takes back that the folders are whole dumps: pages of them are about to be freed.
    ///
    /// # Errors
    /// When they cannot be changed.
    pub fn retract(&self) -> Result<(), Failure> {
        self.0.iter().try_for_each(Dir::retract)
    }

    /// The page map of a task or of a memory file, every run with the file that has its content; empty when
    /// there is none.
    ///
    /// # Errors
    /// `Corrupt` where a page is said to be in a parent that does not have it; for pages that are with the dump.
    pub fn load(&self, name: &str) -> Result<Pagemap, Failure> {
        let map = self.load_with_away(name)?;
        match map.runs.iter().find(|run| run.is_away()) {
            Some(run) => Err(away(name, run)),
            None => Ok(map),
        }
    }

    /// The same, also where pages of the newest folder are with the dump.
    ///
    /// # Errors
    /// `Corrupt` where a page is said to be in a parent that does not have it.
    pub fn load_with_away(&self, name: &str) -> Result<Pagemap, Failure> {
        self.load_from(0, name, 0)
    }

    fn load_from(&self, layer: usize, name: &str, steps: usize) -> Result<Pagemap, Failure> {
        if steps > LONGEST {
            return Err(Failure::corrupt(name, None, "its pages are said to be elsewhere again and again"));
        }
        let dir = &self.0[layer];
        let Some(bytes) = dir.read(name)? else { return Ok(Pagemap::default()) };
        let mut map = Pagemap::parse(name, &bytes, |id| {
            if let Some(compressed) = Compressed::open(dir, id)? {
                return Ok(compressed.length);
            }
            let file = dir.open_file(&pages_name(id))?;
            let length = file.metadata().map_err(|error| {
                sys::memory::io_errno("fstat", &error).on(Object::Path(name.into()), "measure the pages")
            })?;
            Ok(length.len())
        })?;
        // A dump hands out pages once: those of an older one are gone.
        if let Some(run) = map.runs.iter().find(|run| run.is_away() && (layer > 0 || run.flags & LAZY == 0)) {
            return Err(away(name, run));
        }
        for run in &mut map.runs {
            run.file.layer = layer as u32;
        }
        let Some(run) = map.runs.iter().find(|run| is_elsewhere(run)) else { return Ok(map) };
        // What is stored elsewhere, each place once.
        let elsewhere = map.runs.iter().filter(|run| is_elsewhere(run));
        let places: BTreeSet<Option<u32>> = elsewhere.map(|run| run.same_as).collect();
        if places.contains(&None) && layer + 1 == self.0.len() {
            let why = "its pages are in a parent folder, and there is no link to one";
            return Err(Failure::unsupported(object(name, run), why));
        }
        for place in places {
            let other = match place {
                None => self.load_from(layer + 1, name, steps + 1)?,
                Some(pid) => self.load_from(layer, &format!("pagemap-{pid}.img"), steps + 1)?,
            };
            map.runs = resolve(name, map.runs, place, &other.runs)?;
        }
        Ok(map)
    }
}

/// Is the content in another folder, or with another process?
fn is_elsewhere(run: &Run) -> bool {
    run.flags & PRESENT == 0 && !run.is_away()
}

fn object(name: &str, run: &Run) -> Object {
    Object::Vma { start: run.range.start, end: run.range.end, what: name.into() }
}

fn away(name: &str, run: &Run) -> Failure {
    let why = "its pages are not in the images: they stayed with the dump (--lazy-pages), or are lost";
    Failure::unsupported(object(name, run), why)
}

/// Frees the room of every page that a restore from the newest folder takes, in whatever folder it is, when the tree has
/// it. Without them the folders would give back zeros: none of them is a whole dump any more, and says so. Returns how
/// many pages were freed.
///
/// # Errors
/// When a folder cannot be read or changed.
pub fn free_restored(dir: &Dir) -> Result<u64, Failure> {
    let chain = Chain::open(dir)?;
    let mut taken: BTreeMap<PagesFile, Vec<Run>> = BTreeMap::new();
    for name in dir.names()?.iter().filter(|name| is_pagemap(name)) {
        for run in chain.load_with_away(name)?.runs.into_iter().filter(|run| !run.is_away()) {
            taken.entry(run.file).or_default().push(run);
        }
    }
    chain.retract()?;
    let mut freed = 0;
    for (file, runs) in taken {
        let freeing = chain.to_free(file)?;
        for run in &runs {
            freeing.free(run.offset, run.len())?;
        }
        freed += runs.iter().map(Run::len).sum::<u64>() / PAGE;
        freeing.end()?;
    }
    Ok(freed)
}

fn is_pagemap(name: &str) -> bool {
    name.starts_with("pagemap-") && name.ends_with(".img")
}

/// A pages file that loses pages.
#[derive(Debug)]
pub struct Freeing {
    name: String,
    file: File,
    /// Its pages cannot be freed singly, but together.
    is_compressed: bool,
}

impl Freeing {
    /// Makes a hole where pages were.
    ///
    /// # Errors
    /// Of fallocate(2): not every file system has holes.
    pub fn free(&self, offset: u64, length: u64) -> Result<(), Failure> {
        if self.is_compressed {
            return Ok(());
        }
        self.punch(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), Failure> {
        sys::fd::punch(&self.file, offset, length)
            .map_err(|error| error.on(Object::Path(self.name.clone()), "free pages that are restored"))
    }

    /// Every page of it that somebody needed is freed.
    fn end(&self) -> Result<(), Failure> {
        let length = self.file.metadata().map_or(0, |data| data.len());
        if self.is_compressed && length > 0 { self.punch(0, length) } else { Ok(()) }
    }
}

/// Frees the room of pages in older folders that a newer one has anew. The newest folder stays as it is. Returns how
/// many pages were freed.
///
/// # Errors
/// When a folder cannot be read or written; what was freed was not needed.
pub fn dedup(dir: &Dir) -> Result<u64, Failure> {
    let chain = Chain::open(dir)?;
    let names = dir.names()?;
    let mut freed = 0;
    for name in names.iter().filter(|name| is_pagemap(name)) {
        // What newer folders have, so far.
        let mut newer: Vec<Run> = Vec::new();
        for (layer, dir) in chain.0.iter().enumerate() {
            let Some(bytes) = dir.read(name)? else { break };
            let map = Pagemap::parse(name, &bytes, |_| Ok(u64::MAX))?;
            let own: Vec<Run> = map.runs.into_iter().filter(|run| run.flags & PRESENT != 0).collect();
            if layer > 0 {
                let told: Told<()> = own.iter().map(|run| (run.range.clone(), ())).collect();
                let (superseded, _) = split(&told, |()| true, &newer);
                freed += punch(dir, &own, &superseded)?;
            }
            newer.extend(own);
            newer.sort_by_key(|run| run.range.start);
            newer = merged(newer);
        }
    }
    Ok(freed)
}

/// Ranges without overlaps; where they lie in files does not matter any more.
fn merged(runs: Vec<Run>) -> Vec<Run> {
    let mut merged: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match merged.last_mut() {
            Some(last) if run.range.start <= last.range.end => {
                last.range.end = last.range.end.max(run.range.end);
            }
            _ => merged.push(run),
        }
    }
    merged
}

/// Makes holes where the pages of `ranges` were, which are parts of `runs`.
fn punch(dir: &Dir, runs: &[Run], ranges: &[Range<u64>]) -> Result<u64, Failure> {
    let (Some(first), false) = (runs.first(), ranges.is_empty()) else { return Ok(0) };
    let name = pages_name(first.file.id);
    if dir.has(&crate::compressed::name(first.file.id)) {
        let object = Object::Path(dir.path().join(name).display().to_string());
        return Err(Failure::unsupported(object, "is compressed: its pages cannot be freed singly"));
    }
    let file = dir.open_file_to_change(&name)?;
    let mut freed = 0;
    for range in ranges {
        let at = runs.partition_point(|run| run.range.end <= range.start);
        for run in runs[at..].iter().take_while(|run| run.range.start < range.end) {
            let (start, end) = (run.range.start.max(range.start), run.range.end.min(range.end));
            sys::fd::punch(&file, run.offset + (start - run.range.start), end - start).map_err(|error| {
                error.on(Object::Path(name.clone()), "free pages that a newer folder has")
            })?;
            freed += (end - start) / PAGE;
        }
    }
    Ok(freed)
}

/// Replaces runs that are stored at `place` by those that are there. Both are sorted.
///
/// Another process may lack a page that is said to be the same: it was zero, and not stored at all.
fn resolve(name: &str, mut runs: Vec<Run>, place: Option<u32>, parent: &[Run]) -> Result<Vec<Run>, Failure> {
    // As a rule each is a part of one of theirs, and the list stays as long as it is.
    let mut at = 0;
    let are_parts = runs.iter_mut().filter(|run| is_elsewhere(run) && run.same_as == place).all(|run| {
        let Range { start, end } = run.range;
        at += parent[at..].iter().take_while(|theirs| theirs.range.end <= start).count();
        let theirs = parent.get(at).filter(|theirs| theirs.range.start <= start && end <= theirs.range.end);
        theirs.is_some_and(|theirs| {
            *run = Run {
                range: start..end,
                offset: theirs.offset + (start - theirs.range.start),
                ..theirs.clone()
            };
            true
        })
    });
    if are_parts {
        return Ok(runs);
    }
    let mut resolved = Vec::with_capacity(runs.len());
    let mut at = 0;
    for run in runs {
        if !is_elsewhere(&run) || run.same_as != place {
            resolved.push(run);
            continue;
        }
        let mut start = run.range.start;
        while start < run.range.end {
            while parent.get(at).is_some_and(|theirs| theirs.range.end <= start) {
                at += 1;
            }
            let Some(theirs) = parent.get(at).filter(|theirs| theirs.range.start <= start) else {
                if place.is_none() {
                    return Err(Failure::corrupt(
                        name,
                        None,
                        format!("page {start:#x} is not in the parent"),
                    ));
                }
                start = parent.get(at).map_or(u64::MAX, |theirs| theirs.range.start);
                continue;
            };
            let end = theirs.range.end.min(run.range.end);
            resolved.push(Run {
                range: start..end,
                offset: theirs.offset + (start - theirs.range.start),
                ..theirs.clone()
            });
            start = end;
        }
    }
    Ok(resolved)
}

/// Ranges, each with something said of it.
pub type Told<T> = Vec<(Range<u64>, T)>;

/// Something with a range of pages.
pub trait Spans {
    fn span(&self) -> &Range<u64>;
}

impl Spans for Range<u64> {
    fn span(&self) -> &Range<u64> {
        self
    }
}

impl<T> Spans for (Range<u64>, T) {
    fn span(&self) -> &Range<u64> {
        &self.0
    }
}

impl Spans for Run {
    fn span(&self) -> &Range<u64> {
        &self.range
    }
}

/// Splits sorted `runs` into what is in `known` too, which is sorted, and the rest.
pub fn split<T: Copy>(
    runs: &[(Range<u64>, T)],
    is_candidate: impl Fn(T) -> bool,
    known: &[impl Spans],
) -> (Vec<Range<u64>>, Told<T>) {
    let (mut both, mut rest) = (Vec::new(), Vec::with_capacity(runs.len()));
    each_part(runs, is_candidate, known, |range, how, is_known| match is_known {
        true => both.push(range),
        false => rest.push((range, how)),
    });
    (both, rest)
}

/// Calls `found` with each part of `runs`, and whether it is a candidate and in `known` too. Both are sorted.
pub fn each_part<T: Copy>(
    runs: &[(Range<u64>, T)],
    is_candidate: impl Fn(T) -> bool,
    known: &[impl Spans],
    mut found: impl FnMut(Range<u64>, T, bool),
) {
    let mut at = 0;
    for (range, how) in runs {
        if !is_candidate(*how) {
            found(range.clone(), *how, false);
            continue;
        }
        let mut start = range.start;
        while start < range.end {
            while known.get(at).is_some_and(|one| one.span().end <= start) {
                at += 1;
            }
            let next = known.get(at).map_or(u64::MAX, |one| one.span().start);
            let is_known = next <= start;
            let end = if is_known { known[at].span().end } else { next }.min(range.end);
            found(start..end, *how, is_known);
            start = end;
        }
    }
}

const _: () = assert!(PAGE == sys::memory::PAGE);

#[cfg(test)]
mod tests {
    use super::*;
    use image::pagemap::PARENT;

    fn run(pages: Range<u64>, flags: u32, offset: u64, layer: u32) -> Run {
        let file = PagesFile { layer, id: 1 };
        let range = pages.start * PAGE..pages.end * PAGE;
        Run { range, flags, offset: offset * PAGE, file, same_as: None }
    }

    #[test]
    fn what_is_in_the_parent_is_found_there_piece_by_piece() {
        let runs = vec![run(0..2, PRESENT, 0, 0), run(2..8, PARENT, 2, 0)];
        let parent = [run(1..4, PRESENT, 5, 1), run(4..9, PRESENT, 0, 2)];
        let resolved = resolve("x", runs.clone(), None, &parent).unwrap();
        let wanted = [run(0..2, PRESENT, 0, 0), run(2..4, PRESENT, 6, 1), run(4..8, PRESENT, 0, 2)];
        assert_eq!(resolved, wanted);
        assert!(resolve("x", runs, None, &parent[..1]).is_err());
    }

    #[test]
    fn parts_of_what_is_in_the_parent_are_found_where_they_are() {
        let runs = vec![
            run(0..2, PRESENT, 0, 0),
            run(2..3, PARENT, 2, 0),
            run(3..4, PRESENT, 2, 0),
            run(6..8, PARENT, 3, 0),
        ];
        let parent = [run(1..4, PRESENT, 5, 1), run(4..9, PRESENT, 8, 2)];
        let resolved = resolve("x", runs.clone(), None, &parent).unwrap();
        let wanted = [runs[0].clone(), run(2..3, PRESENT, 6, 1), runs[2].clone(), run(6..8, PRESENT, 10, 2)];
        assert_eq!(resolved, wanted);
    }

    #[test]
    fn pages_that_stayed_with_a_dump_are_only_those_of_the_newest_folder() {
        let path = std::env::temp_dir().join(format!("crtools-away-{}", std::process::id()));
        let folder = |name: &str, runs: Vec<Run>| {
            let path = path.join(name);
            std::fs::create_dir_all(&path).unwrap();
            let dir = Dir::open(&path).unwrap();
            dir.write("pagemap-5.img", &Pagemap { pages_id: 1, runs, is_old: false }.encode()).unwrap();
            dir
        };
        let away = Run::away(PAGE..3 * PAGE);
        let first = folder("1", vec![away.clone()]);
        let second = folder("2", vec![Run::in_parent(PAGE..2 * PAGE)]);
        std::os::unix::fs::symlink("../1", path.join("2").join(PARENT_LINK)).unwrap();
        let nowhere = folder("3", vec![Run { flags: 0, ..away.clone() }]);
        let load = |dir: &Dir| Chain::open(dir).unwrap().load_with_away("pagemap-5.img").map(|map| map.runs);
        let strict = Chain::open(&first).unwrap().load("pagemap-5.img");
        let results = [load(&first), load(&second), load(&nowhere)];
        std::fs::remove_dir_all(&path).unwrap();
        assert!(strict.is_err());
        let [first, second, nowhere] = results;
        let first = first.unwrap();
        assert_eq!((first.len(), &first[0].range, first[0].offset), (1, &away.range, PAGE));
        assert!(second.is_err() && nowhere.is_err());
    }

    #[test]
    fn what_another_process_does_not_store_is_zero() {
        let same = |pages: Range<u64>| Run::same_as(pages.start * PAGE..pages.end * PAGE, 7);
        let runs = vec![run(0..1, PRESENT, 0, 0), same(1..6), run(6..7, PARENT, 0, 0)];
        let theirs = [run(2..4, PRESENT, 1, 0)];
        let resolved = resolve("x", runs, Some(7), &theirs).unwrap();
        assert_eq!(resolved, [run(0..1, PRESENT, 0, 0), run(2..4, PRESENT, 1, 0), run(6..7, PARENT, 0, 0)]);
    }

    #[test]
    fn only_candidates_that_are_known_are_split_off() {
        let known = [run(2..4, PRESENT, 0, 0), run(6..7, PRESENT, 0, 0)];
        let runs = vec![(0..5 * PAGE, true), (6 * PAGE..7 * PAGE, false)];
        let (both, rest) = split(&runs, |is_clean| is_clean, &known);
        assert_eq!((both.len(), &both[0]), (1, &(2 * PAGE..4 * PAGE)));
        assert_eq!(rest, [(0..2 * PAGE, true), (4 * PAGE..5 * PAGE, true), (6 * PAGE..7 * PAGE, false)]);
    }

    #[test]
    fn pages_that_a_newer_folder_has_are_freed_and_others_stay() {
        use std::os::unix::fs::MetadataExt;
        let path = std::env::temp_dir().join(format!("crtools-dedup-{}", std::process::id()));
        let folder = |name: &str, runs: &[Run], parent: Option<&str>| {
            let path = path.join(name);
            std::fs::create_dir_all(&path).unwrap();
            let dir = Dir::open(&path).unwrap();
            dir.write("pagemap-5.img", &Pagemap { pages_id: 1, runs: runs.to_vec(), is_old: false }.encode())
                .unwrap();
            let pages = runs.iter().filter(|run| run.flags & PRESENT != 0).map(Run::len).sum::<u64>();
            std::fs::write(path.join("pages-1.img"), vec![7; pages as usize]).unwrap();
            if let Some(parent) = parent {
                std::os::unix::fs::symlink(format!("../{parent}"), path.join(PARENT_LINK)).unwrap();
            }
            dir
        };
        folder("1", &[run(0..8, PRESENT, 0, 0), run(20..24, PRESENT, 8, 0)], None);
        folder("2", &[run(2..4, PRESENT, 0, 0)], Some("1"));
        let newest = folder("3", &[run(3..5, PRESENT, 0, 0), run(23..24, PRESENT, 2, 0)], Some("2"));
        // Of the second its page 3; of the first its pages 2 to 4, and 23.
        assert_eq!(dedup(&newest).unwrap(), 1 + 3 + 1);
        let first = std::fs::read(path.join("1/pages-1.img")).unwrap();
        let is_kept = |page: usize| first[page * 4096] == 7;
        let blocks = std::fs::metadata(path.join("1/pages-1.img")).unwrap().blocks();
        let kept: Vec<bool> = (0..12).map(is_kept).collect();
        std::fs::remove_dir_all(&path).unwrap();
        let wanted = [true, true, false, false, false, true, true, true, true, true, true, false];
        assert_eq!((kept.as_slice(), first.len()), (wanted.as_slice(), 12 * 4096));
        assert!(blocks <= 8 * 8 + 8, "{blocks} blocks are still taken");
    }

    #[test]
    fn what_is_restored_is_freed_in_every_folder_and_none_looks_whole() {
        use std::os::unix::fs::MetadataExt;
        let path = std::env::temp_dir().join(format!("crtools-freed-{}", std::process::id()));
        let folder = |name: &str, runs: Vec<Run>, pages: usize| {
            let path = path.join(name);
            std::fs::create_dir_all(&path).unwrap();
            let dir = Dir::open(&path).unwrap();
            dir.write("pagemap-5.img", &Pagemap { pages_id: 1, runs, is_old: false }.encode()).unwrap();
            std::fs::write(path.join("pages-1.img"), vec![7; pages * 4096]).unwrap();
            std::fs::write(path.join("inventory.img"), "whole").unwrap();
            dir
        };
        folder("1", vec![run(0..8, PRESENT, 0, 0)], 8);
        let newest = folder("2", vec![run(0..2, PRESENT, 0, 0), Run::in_parent(4 * PAGE..6 * PAGE)], 2);
        std::os::unix::fs::symlink("../1", path.join("2").join(PARENT_LINK)).unwrap();
        let freed = free_restored(&newest);
        let first = std::fs::read(path.join("1/pages-1.img")).unwrap();
        let kept: Vec<usize> = (0..8).filter(|page| first[page * 4096] == 7).collect();
        let second = std::fs::metadata(path.join("2/pages-1.img")).unwrap();
        let is_whole = ["1", "2"].map(|name| path.join(name).join("inventory.img").exists());
        std::fs::remove_dir_all(&path).unwrap();
        assert_eq!((freed.unwrap(), second.blocks(), second.len()), (4, 0, 8192));
        assert_eq!((kept, is_whole), (vec![0, 1, 2, 3, 6, 7], [false, false]));
    }

    #[test]
    fn links_in_a_circle_come_to_an_end() {
        let path = std::env::temp_dir().join(format!("crtools-chain-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        std::os::unix::fs::symlink(".", path.join(PARENT_LINK)).unwrap();
        let opened = Chain::open(&Dir::open(&path).unwrap()).map(drop);
        std::fs::remove_dir_all(&path).unwrap();
        assert!(opened.is_err());
    }
}
