//! Question pages of an address space hold something of its own.

use agent::crew;
use model::Errno;
use std::fs::File;
use std::ops::Range;
use sys::pagemap::{self, FILE, GUARD, PRESENT, Query, SWAPPED, WATCHED, WRITTEN, ZERO};

/// A mapping, as far as its pages go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    pub range: Range<u64>,
    /// The process itself may read it, so process_vm_readv(2) can.
    pub is_readable: bool,
    /// Every page is kept, whatever the kernel says of it.
    pub is_whole: bool,
    /// Without its own pages it shows a file: there a page of zeros says something.
    pub has_file: bool,
    /// The kernel notes writes to it.
    pub is_watched: bool,
}

/// What matters of the mapping that a run of pages is in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct How {
    pub is_readable: bool,
    pub keeps_zeros: bool,
    /// Not written since it was last saved.
    pub is_clean: bool,
    /// Writes to it are noted.
    pub is_watched: bool,
}

impl Area {
    fn how(&self) -> How {
        let (is_readable, keeps_zeros, is_watched) = (self.is_readable, self.has_file, self.is_watched);
        How { is_readable, keeps_zeros, is_clean: false, is_watched }
    }
}

/// What a scan of an address space finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Pages to keep: sorted, each inside one area.
    pub runs: Vec<(Range<u64>, How)>,
    /// Ranges of guard markers.
    pub guards: Vec<Range<u64>>,
    /// Pages that were looked at, which is what the kernel reports as there.
    pub scanned_pages: u64,
}

/// Is it asked which pages were written?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    WhatIsThere,
    AndWhatIsNew,
    /// And from then on nothing counts as written, until it is.
    AndBeginAnew,
}

/// Pages that are there or swapped out; guard markers look swapped out.
const THERE: Query = Query { inverted: 0, all: 0, any: PRESENT | SWAPPED, report: FILE | ZERO | GUARD };

/// Bytes of a mapping that is asked apart from others.
const LARGE: u64 = 4 << 20;

/// Bytes of mappings that are looked at on all processors.
const MUCH: u64 = 2 << 30;

/// Cuts the range from the first of some areas to the last into pieces that are looked at beside each other: one, if there is
/// not much in it.
fn cut(areas: &[Area]) -> Vec<Range<u64>> {
    let (mut start, last) = (areas[0].range.start, areas[areas.len() - 1].range.end);
    let total: u64 = areas.iter().map(|area| area.range.end - area.range.start).sum();
    let step = match total {
        ..MUCH => u64::MAX,
        _ => (total / (2 * crew::size() as u64)).max(MUCH / 2).next_multiple_of(1 << 21),
    };
    let (mut pieces, mut filled) = (Vec::new(), 0);
    for Area { range, .. } in areas {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min(at.saturating_add(step - filled));
            filled += end - at;
            at = end;
            if filled == step {
                pieces.push(start..at);
                (start, filled) = (at, 0);
            }
        }
    }
    if start < last {
        pieces.push(start..last);
    }
    pieces
}

/// Finds the pages to keep in `areas`, which are sorted: the mappings with content of their own.
///
/// # Errors
/// Of `PAGEMAP_SCAN` or of reading the page map.
pub fn select(pagemap: &File, areas: &[Area], question: Question) -> Result<Selection, Errno> {
    let mut selection = Selection::default();
    // With true where nothing was written since it was last protected.
    let mut found: Vec<(Range<u64>, bool)> = Vec::new();
    let query = match question {
        Question::WhatIsThere => THERE,
        _ => Query { report: THERE.report | WATCHED | WRITTEN, ..THERE },
    };
    let begins = |area: &Area| area.is_watched && question == Question::AndBeginAnew;
    // For that the kernel looks at what it knows of each page, which takes longer than all the rest.
    let is_of_file = |area: &Area| area.has_file || area.range.end - area.range.start < LARGE;
    let way = |area: &Area| (begins(area), is_of_file(area));
    let mut pieces = Vec::new();
    let all: u64 = areas.iter().map(|area| area.range.end - area.range.start).sum();
    let many = if all < MUCH { usize::MAX } else { 2 };
    for some in areas.chunk_by(|one, next| way(one) == way(next)) {
        pieces.extend(cut(some).into_iter().map(|piece| (piece, way(&some[0]))));
    }
    let scan_some = |pieces: &[(Range<u64>, (bool, bool))], query: Query| {
        let (mut found, mut guards) = (Vec::new(), Vec::new());
        for (piece, (begins, is_of_file)) in pieces {
            let mut note = |run, categories| match categories & !(WATCHED | WRITTEN) {
                0 => push(&mut found, run, categories & (WATCHED | WRITTEN) == WATCHED),
                GUARD => guards.push(run),
                _ => {}
            };
            let query = if *is_of_file { query } else { Query { report: query.report & !FILE, ..query } };
            match begins {
                true => pagemap::protect(pagemap, piece.clone(), query, &mut note)?,
                false => pagemap::scan(pagemap, piece.clone(), query, &mut note)?,
            }
        }
        Ok::<_, Errno>((found, guards))
    };
    let mut scan = |query: Query| {
        found.clear();
        selection.guards.clear();
        for scanned in crew::in_parallel(&pieces, many, |pieces| scan_some(pieces, query)) {
            let (some, mut guards) = scanned?;
            some.into_iter().for_each(|(run, is_clean)| push(&mut found, run, is_clean));
            selection.guards.append(&mut guards);
        }
        Ok::<(), Errno>(())
    };
    // Before Linux 6.15 there is no such category, and before 6.13 no such page.
    let scanned = match scan(query) {
        Err(error) if error.code == libc::EINVAL => scan(Query { report: query.report & !GUARD, ..query }),
        scanned => scanned,
    };
    match scanned {
        Err(error) if error.code == libc::ENOTTY => {
            for area in areas {
                pagemap::read(pagemap, area.range.clone(), |run, categories| {
                    if categories & FILE == 0 {
                        push(&mut found, run, false);
                    }
                })?;
            }
        }
        scanned => scanned?,
    }
    selection.scanned_pages = found.iter().map(|(run, _)| (run.end - run.start) / 4096).sum();
    selection.runs = intersect(&found, areas);
    Ok(selection)
}

fn push(found: &mut Vec<(Range<u64>, bool)>, run: Range<u64>, is_clean: bool) {
    match found.last_mut() {
        Some((last, same)) if last.end == run.start && *same == is_clean => last.end = run.end,
        _ => found.push((run, is_clean)),
    }
}

impl Selection {
    /// Appends what was found at higher addresses.
    pub fn append(&mut self, mut higher: Selection) {
        self.runs.append(&mut higher.runs);
        self.guards.append(&mut higher.guards);
        self.scanned_pages += higher.scanned_pages;
    }
}

/// The parts of `found` that are inside areas, and the areas that are kept whole.
fn intersect(found: &[(Range<u64>, bool)], areas: &[Area]) -> Vec<(Range<u64>, How)> {
    let mut runs = Vec::with_capacity(found.len());
    let mut at = 0;
    for area in areas {
        if area.is_whole {
            runs.push((area.range.clone(), area.how()));
            continue;
        }
        while found.get(at).is_some_and(|(run, _)| run.end <= area.range.start) {
            at += 1;
        }
        // The last one may reach into the next area.
        for (run, is_clean) in found[at..].iter().take_while(|(run, _)| run.start < area.range.end) {
            let part = run.start.max(area.range.start)..run.end.min(area.range.end);
            runs.push((part, How { is_clean: *is_clean, ..area.how() }));
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(range: Range<u64>, is_whole: bool) -> Area {
        Area { range, is_readable: true, is_whole, has_file: false, is_watched: false }
    }

    #[test]
    fn runs_are_cut_at_the_borders_of_mappings() {
        let areas = [area(10..20, false), area(20..30, false), area(40..50, true), area(60..70, false)];
        let runs = intersect(&[5..12, 15..25, 35..36, 62..80].map(|run| (run, false)), &areas);
        let ranges: Vec<Range<u64>> = runs.into_iter().map(|run| run.0).collect();
        assert_eq!(ranges, [10..12, 15..20, 20..25, 40..50, 62..70]);
    }

    #[test]
    fn much_is_cut_into_pieces_and_nothing_is_left_out() {
        const GIB: u64 = 1 << 30;
        let much =
            [area(GIB..2 * GIB, false), area(90 * GIB..200 * GIB, false), area(999 * GIB..1000 * GIB, false)];
        let pieces = cut(&much);
        assert!(pieces.len() > crew::size() && pieces.iter().all(|piece| !piece.is_empty()));
        assert_eq!((pieces[0].start, pieces[pieces.len() - 1].end), (GIB, 1000 * GIB));
        assert!(pieces.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert_eq!((cut(&much[..1]).len(), cut(&much[..1])[0].clone()), (1, GIB..2 * GIB));
        // As much as two pieces, and no third one.
        assert_eq!(cut(&[area(0..2 * GIB, false)]).last(), Some(&(GIB..2 * GIB)));
    }

    #[test]
    fn a_touched_page_is_found_and_an_untouched_one_is_not() {
        // So much that the allocator asks the kernel for it, whatever others have given back.
        let mut memory = vec![0u8; 64 << 20];
        let base = (memory.as_ptr() as u64).next_multiple_of(4096);
        let offset = (base - memory.as_ptr() as u64) as usize;
        memory[offset + (5 << 12)] = 1;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let runs =
            select(&pagemap, &[area(base..base + (32 << 12), false)], Question::WhatIsThere).unwrap().runs;
        assert!(runs.iter().any(|run| run.0.contains(&(base + (5 << 12)))));
        assert!(!runs.iter().any(|run| run.0.contains(&(base + (9 << 12)))));
    }
}
