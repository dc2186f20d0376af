//! Who moves the pages of large processes into images in one step: threads of a copy of each, see [`agent::hands`].
//!
//! Where the tree runs on, the copies are there. Where it stands still they are made for this alone, and are gone before
//! anything else is done. A process that gets no hands is read as others are.

use crate::copies;
use crate::freeze::Tree;
use crate::observe::{find_instruction, read_maps};
use crate::past::bytes_to_save;
use crate::run::Saved;
use crate::tracer::Tracer;
use agent::crew;
use agent::hands::Hands;
use image::Dir;
use model::{Failure, Options};

/// Bytes of a process from which on hands pay.
const WORTH_IT: u64 = 16 << 20;
/// Bytes of a run, on the average, below which a call for each takes longer than a second copy.
const RUN: u64 = 64 << 10;

/// Gives hands to the processes for which they pay.
pub fn give(tree: &mut Tree, saved: &mut [Saved], options: &Options, dir: &Dir) {
    if options.page_server || options.compress.is_some() {
        return;
    }
    let wanting: Vec<usize> = (0..saved.len()).filter(|at| is_worth_it(&saved[*at])).collect();
    if wanting.is_empty() || !is_in_memory(dir) {
        return;
    }
    let holders = wanting.iter().filter_map(|at| Some((*at, tree.holder(saved[*at].pid)?)));
    let (places, tasks): (Vec<usize>, Vec<_>) =
        holders.map(|(at, holder)| (at, (holder, saved[at].pid))).unzip();
    let made = tree.crew.each(tasks, make);
    for (at, made) in places.into_iter().zip(made) {
        match made {
            Ok(hands) => saved[at].hands = Some(hands),
            Err(failure) => log::info!("pages go by way of a buffer: {failure}"),
        }
    }
}

fn is_worth_it(saved: &Saved) -> bool {
    let bytes = bytes_to_save(&saved.runs, None);
    !saved.runs_on && saved.aside.is_none() && bytes >= WORTH_IT && bytes / saved.runs.len() as u64 >= RUN
}

/// A copy that there is becomes hands; otherwise there is none, for what stands still need not be copied.
fn make(tracer: &mut Tracer, pid: i32) -> Result<Hands, Failure> {
    if let Some(held) = tracer.copies.iter_mut().find(|held| held.left.of == pid) {
        return held.hands(crew::size());
    }
    let instruction = find_instruction(pid, &read_maps(pid)?)?;
    copies::accompany(tracer, pid, instruction)?.hands(crew::size())
}

/// Ends the copies of processes that stand still.
pub fn end(tree: &mut Tree) {
    let members = 0..tree.crew.len();
    tree.crew.each(members.map(|member| (member, ())), |tracer, ()| copies::end(tracer));
}

/// Other files have no pages that come by a userfaultfd.
fn is_in_memory(dir: &Dir) -> bool {
    std::fs::File::open(dir.path()).is_ok_and(sys::fd::is_in_memory)
}
