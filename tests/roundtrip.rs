//! Every workload in every mode: `cargo test -p crtools-tests --test roundtrip -- [FILTER]`.
//!
//! The tool is `$CRTOOLS_BIN`, or the `crtools` built beside this program. Root is needed for the namespaces.

mod harness;

use std::path::Path;

use crtools_tests::case::{Case, Mode};
use crtools_tests::huge_pages::HugePages;
use crtools_tests::round::Round;
use crtools_tests::runner::{Verdict, inside};
use crtools_tests::subject::Tools;
use crtools_tests::{tool, workloads};

fn main() {
    inside(play);
    harness::run(workloads::all().flat_map(|(area, case)| {
        case.modes().into_iter().map(move |mode| format!("{area}::{}/{}", case.name, mode.name()))
    }));
}

/// The inner half, as the first process of the trial's namespaces.
fn play(name: &str, directory: &Path) -> Result<Verdict, String> {
    let (workload, mode) = name.rsplit_once('/').ok_or("a trial is called WORKLOAD/MODE")?;
    let case = workloads::by_name(workload).ok_or_else(|| format!("no workload is called {workload}"))?;
    let mode = Mode::by_name(mode).ok_or_else(|| format!("no mode is called {mode}"))?;
    let tools = match choose(&case, mode)? {
        Ok(tools) => tools,
        Err(reason) => return Ok(Verdict::Skipped(reason)),
    };
    if let Some(need) = case.need
        && let Err(reason) = need()
    {
        return Ok(Verdict::Skipped(reason));
    }
    let _huge_pages = match HugePages::lend(case.huge_pages) {
        Ok(lent) => lent,
        Err(reason) => return Ok(Verdict::Skipped(reason)),
    };
    let program = Path::new(env!("CARGO_BIN_EXE_workload"));
    Round::begin(program, workload, &case, directory, tools)?.play(&case, mode)?;
    Ok(Verdict::Passed)
}

/// The tools of a mode, or the reason why it cannot run.
fn choose(case: &Case, mode: Mode) -> Result<Result<Tools, String>, String> {
    let ours = tool::under_test()?;
    if let (true, Some(reason)) = (ours.is_peer, case.peer_fails(mode)) {
        return Ok(Err(format!("the peer cannot: {reason}")));
    }
    if let (false, Some(reason)) = (ours.is_peer, case.not_yet) {
        return Ok(Err(format!("not carried yet: {reason}")));
    }
    let exchanged = matches!(mode, Mode::ToPeer | Mode::FromPeer);
    if !exchanged {
        return Ok(Ok(Tools { dump: ours.clone(), restore: ours }));
    }
    let Some(peer) = tool::peer() else {
        return Ok(Err("no peer is set up; tests/peer.sh does it".into()));
    };
    Ok(Ok(match mode {
        Mode::ToPeer => Tools { dump: ours, restore: peer },
        _ => Tools { dump: peer, restore: ours },
    }))
}
