//! Every workload in every mode: `cargo test -p crtools-tests --test roundtrip -- [FILTER]`.
//!
//! The tool is `$CRTOOLS_BIN`, or the `crtools` built beside this program. Root is needed for the namespaces.

use std::path::Path;

use crtools_tests::case::{Case, Mode};
use crtools_tests::round::{Round, Tools};
use crtools_tests::runner::{Verdict, inside, outside};
use crtools_tests::{tool, workloads};
use libtest_mimic::{Arguments, Completion, Trial};

fn main() {
    inside(play);
    let mut arguments = Arguments::from_args();
    // A trial mostly waits: a few more than there are processors fill the gaps.
    arguments.test_threads = arguments
        .test_threads
        .or_else(|| std::thread::available_parallelism().ok().map(|count| count.get() + 1));
    let mut trials = Vec::new();
    for (area, case) in workloads::all() {
        for mode in case.modes() {
            let name = format!("{area}::{}/{}", case.name, mode.name());
            let trial = name.clone();
            trials.push(Trial::ignorable_test(name, move || match outside(&trial)? {
                Verdict::Passed => Ok(Completion::Completed),
                Verdict::Skipped(reason) => {
                    println!("SKIP {trial}: {reason}");
                    Ok(Completion::ignored_with(reason))
                }
            }));
        }
    }
    libtest_mimic::run(&arguments, trials).exit();
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
