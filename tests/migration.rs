//! Moves of a tree whose memory follows later: `cargo test -p crtools-tests --test migration -- [FILTER]`.
//!
//! The tool is `$CRTOOLS_BIN`, or the `crtools` built beside this program. Root is needed for the namespaces.

mod harness;

use std::path::Path;

use crtools_tests::round::Round;
use crtools_tests::runner::{Verdict, inside};
use crtools_tests::subject::Tools;
use crtools_tests::{migration, tool, workloads};

fn main() {
    inside(play);
    harness::run(migration::TRIALS.iter().map(|(name, _)| format!("migration::{name}")));
}

/// The inner half, as the first process of the trial's namespaces.
fn play(name: &str, directory: &Path) -> Result<Verdict, String> {
    let trial = name.strip_prefix("migration::").ok_or("a trial is called migration::NAME")?;
    let tool = tool::under_test()?;
    if tool.is_peer {
        return Ok(Verdict::Skipped("the peer is not what is tested here".into()));
    }
    if trial.starts_with("criu_") && tool::peer().is_none() {
        return Ok(Verdict::Skipped("no peer is set up; tests/peer.sh does it".into()));
    }
    let case = workloads::by_name(migration::workload(trial)).ok_or("the workload is missing")?;
    let program = Path::new(env!("CARGO_BIN_EXE_workload"));
    let tools = Tools { dump: tool.clone(), restore: tool };
    let mut round = Round::begin(program, migration::workload(trial), &case, directory, tools)?;
    migration::play(&mut round, trial)?;
    Ok(Verdict::Passed)
}
