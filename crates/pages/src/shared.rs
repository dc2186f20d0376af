//! Pages that relatives still share copy-on-write since one made the other: they lie in one frame of memory, so
//! they are stored once.

use crate::chain::Told;
use model::Errno;
use std::fs::File;
use std::ops::Range;

const PAGE: u64 = 4096;
/// Pages that are compared at a time.
const BATCH: usize = 1 << 14;

/// Splits off the pages of `runs`, which are sorted, that `child` and `parent` have in the same frame. Both are
/// files `/proc/PID/pagemap`; `stored` are the pages of the parent that are found in its images.
///
/// Without the right to see frames nothing is shared.
///
/// # Errors
/// Of reading the page maps.
pub fn split<T: Copy>(
    child: &File,
    parent: &File,
    runs: Told<T>,
    stored: &[Range<u64>],
) -> Result<(Vec<Range<u64>>, Told<T>), Errno> {
    let (mut same, mut rest): (Vec<Range<u64>>, Told<T>) = (Vec::new(), Vec::new());
    let (mut ours, mut theirs) = (vec![None; BATCH], vec![None; BATCH]);
    let mut at = 0;
    for (range, how) in runs {
        let is_apart = !rest.is_empty() || !same.is_empty();
        let (mut first_same, mut first_rest) = (is_apart, is_apart);
        for start in range.clone().step_by(BATCH * PAGE as usize) {
            let count = (((range.end - start) / PAGE) as usize).min(BATCH);
            sys::pagemap::shared_frames(child, start, &mut ours[..count])?;
            if ours[..count].iter().any(Option::is_some) {
                sys::pagemap::shared_frames(parent, start, &mut theirs[..count])?;
            } else {
                theirs[..count].fill(None);
            }
            for (nth, (our, their)) in ours[..count].iter().zip(&theirs[..count]).enumerate() {
                let page = start + nth as u64 * PAGE;
                while stored.get(at).is_some_and(|run| run.end <= page) {
                    at += 1;
                }
                let is_stored = stored.get(at).is_some_and(|run| run.start <= page);
                if is_stored && our.is_some() && our == their {
                    match same.last_mut() {
                        Some(last) if last.end == page && !first_same => last.end += PAGE,
                        _ => same.push(page..page + PAGE),
                    }
                    first_same = false;
                } else {
                    match rest.last_mut() {
                        // Runs stay apart where they were: each is in one mapping.
                        Some((last, _)) if last.end == page && !first_rest => last.end += PAGE,
                        _ => rest.push((page..page + PAGE, how)),
                    }
                    first_rest = false;
                }
            }
        }
    }
    Ok((same, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shares_nothing_with_itself_that_is_its_own() {
        let memory = vec![7u8; 64 << 12];
        let base = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let runs = vec![(base..base + 8 * PAGE, ()), (base + 8 * PAGE..base + 9 * PAGE, ())];
        let stored: Vec<_> = runs.iter().map(|run| run.0.clone()).collect();
        let (same, rest) = split(&pagemap, &pagemap, runs.clone(), &stored).unwrap();
        assert_eq!((same, rest), (Vec::new(), runs));
    }
}
