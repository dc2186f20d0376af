//! On which nodes of memory the kernel puts what a thread touches: set_mempolicy(2); and the pages of a mapping: mbind(2).
//!
//! Read from: get_mempolicy(2) in the thread, for a mapping in any. Rebuilt by: the same two calls, on a host that has the
//! nodes; elsewhere the host decides, as it does where there is no policy. A mapping has it before it has pages.
//! Not kept: on which node a page was; policies of mappings of files and of SysV segments, and of those beyond the first [`MAPPINGS`].

use super::{Answers, Ask, ZERO};
use crate::contract::TaskOps;
use crate::vma;
use image::{ThreadCoreEntry, VmaEntry, vma as status};
use model::Failure;
use std::collections::HashMap;

/// More nodes than a kernel knows: the answer has a bit for each.
const NODES: u64 = 1024;
const BYTES: usize = NODES as usize / 8;

/// More mappings of a process are not asked about.
pub const MAPPINGS: usize = 1024;

/// Where the answers of a thread are.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    call: usize,
    mode: u64,
    nodes: u64,
}

pub fn ask(ask: &mut Ask) -> Result<Asked, Failure> {
    ask.list.label("read the policy of its memory");
    ask_one(None, ask)
}

/// Asks for the policy of the thread, or of the mapping at an address.
fn ask_one(mapping: Option<u64>, ask: &mut Ask) -> Result<Asked, Failure> {
    let (mode, nodes) = (ask.room(8)?, ask.room(BYTES)?);
    /// Source: linux/mempolicy.h.
    const MPOL_F_ADDR: u64 = 1 << 1;
    let of_address = if mapping.is_some() { MPOL_F_ADDR } else { 0 };
    // A kernel without nodes has no such call.
    let args = [mode.into(), nodes.into(), NODES.into(), mapping.unwrap_or(0).into(), of_address.into()];
    Ok(Asked { call: ask.list.any(libc::SYS_get_mempolicy, &args), mode, nodes })
}

/// A policy: how, and among which nodes.
type Policy = (u32, Vec<u8>);

impl Asked {
    fn policy(self, answers: Answers) -> Option<Policy> {
        let [mode] = answers.words(self.mode);
        let mode = mode as u32;
        if answers.result(self.call) != 0 || mode == libc::MPOL_DEFAULT as u32 {
            return None;
        }
        let mut nodes = answers.area.get(self.nodes, BYTES);
        nodes.truncate(nodes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        Some((mode, nodes))
    }

    /// Puts the policy in the record of the thread, if it has one.
    pub fn answer(self, answers: Answers, core: &mut ThreadCoreEntry) {
        (core.numa_mode, core.numa_nodes) = self.policy(answers).unzip();
    }
}

/// The mappings that are asked about: those that have pages which are no file's.
pub fn asked_mappings<'e>(mappings: impl Iterator<Item = &'e VmaEntry>) -> Vec<u64> {
    const OWN: u32 = status::ANON_PRIVATE | status::ANON_SHARED | status::FILE_PRIVATE | status::MEMFD;
    let is_own = |entry: &&VmaEntry| entry.status & OWN != 0 && !vma::is_special(entry);
    mappings.filter(is_own).map(|entry| entry.start).take(MAPPINGS).collect()
}

/// Where the answers about mappings are, by their beginnings.
#[derive(Debug)]
pub struct AskedMappings(Vec<(u64, Asked)>);

pub fn ask_mappings(mappings: &[u64], ask: &mut Ask) -> Result<AskedMappings, Failure> {
    ask.list.label("read the policies of its mappings");
    let asked = mappings.iter().map(|start| Ok((*start, ask_one(Some(*start), ask)?)));
    asked.collect::<Result<_, Failure>>().map(AskedMappings)
}

/// Those of mappings that have one, by their beginnings.
#[derive(Debug, Default)]
pub struct Policies(HashMap<u64, Policy>);

impl AskedMappings {
    pub fn answer(self, answers: Answers) -> Policies {
        Policies(
            self.0.into_iter().filter_map(|(start, asked)| Some((start, asked.policy(answers)?))).collect(),
        )
    }
}

impl Policies {
    /// Puts its policy in the record of a mapping, if it has one.
    pub fn note(&self, entry: &mut VmaEntry) {
        (entry.numa_mode, entry.numa_nodes) = self.0.get(&entry.start).cloned().unzip();
    }
}

/// Where a policy lies for a call.
fn put(nodes: Option<&[u8]>, ops: &mut TaskOps) -> Result<u64, Failure> {
    let mut nodes = nodes.unwrap_or_default().to_vec();
    nodes.resize(BYTES, 0);
    ops.bytes(&nodes)
}

/// Gives a mapping its policy.
pub fn restore_mapping(entry: &VmaEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    let Some(mode) = entry.numa_mode else { return Ok(()) };
    let nodes = put(entry.numa_nodes.as_deref(), ops)?;
    let (start, len) = (entry.start, entry.end - entry.start);
    let args = [start.into(), len.into(), u64::from(mode).into(), nodes.into(), NODES.into(), ZERO];
    ops.list.any(libc::SYS_mbind, &args);
    Ok(())
}

/// Gives a thread its policy.
pub fn restore(core: &ThreadCoreEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    let Some(mode) = core.numa_mode else { return Ok(()) };
    ops.list.label("set the policy of its memory");
    let nodes = put(core.numa_nodes.as_deref(), ops)?;
    ops.list.any(libc::SYS_set_mempolicy, &[u64::from(mode).into(), nodes.into(), NODES.into()]);
    Ok(())
}
