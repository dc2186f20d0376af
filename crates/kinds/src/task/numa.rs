//! On which nodes of memory the kernel puts what a thread touches: set_mempolicy(2).
//!
//! Read from: get_mempolicy(2) in the thread. Rebuilt by: set_mempolicy(2), on a host that has the nodes; elsewhere the
//! host decides, as it does for a thread without a policy.
//! Not kept: policies of mappings (mbind(2)), and on which node a page was.

use super::{Answers, Ask, ZERO};
use crate::contract::TaskOps;
use image::ThreadCoreEntry;
use model::Failure;

/// More nodes than a kernel knows: the answer has a bit for each.
const NODES: u64 = 1024;
const BYTES: usize = NODES as usize / 8;

/// Where the answers of a thread are.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    call: usize,
    mode: u64,
    nodes: u64,
}

pub fn ask(ask: &mut Ask) -> Result<Asked, Failure> {
    let (mode, nodes) = (ask.room(8)?, ask.room(BYTES)?);
    ask.list.label("read the policy of its memory");
    // A kernel without nodes has no such call.
    let args = [mode.into(), nodes.into(), NODES.into(), ZERO, ZERO];
    Ok(Asked { call: ask.list.any(libc::SYS_get_mempolicy, &args), mode, nodes })
}

impl Asked {
    /// Puts the policy in the record of the thread, if it has one.
    pub fn answer(self, answers: Answers, core: &mut ThreadCoreEntry) {
        if answers.result(self.call) != 0 {
            return;
        }
        let [mode] = answers.words(self.mode);
        let mode = mode as u32;
        if mode == libc::MPOL_DEFAULT as u32 {
            return;
        }
        let mut nodes = answers.area.get(self.nodes, BYTES);
        nodes.truncate(nodes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        (core.numa_mode, core.numa_nodes) = (Some(mode), Some(nodes));
    }
}

/// Gives a thread its policy.
pub fn restore(core: &ThreadCoreEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    let Some(mode) = core.numa_mode else { return Ok(()) };
    let mut nodes = core.numa_nodes.clone().unwrap_or_default();
    nodes.resize(BYTES, 0);
    ops.list.label("set the policy of its memory");
    let nodes = ops.bytes(&nodes)?;
    ops.list.any(libc::SYS_set_mempolicy, &[u64::from(mode).into(), nodes.into(), NODES.into()]);
    Ok(())
}
