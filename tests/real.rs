//! Programs of daily use, dumped at work: `cargo test -p crtools-tests --test real -- [FILTER]`.
//!
//! The tool is `$CRTOOLS_BIN`, or the `crtools` built beside this program. Root is needed for the namespaces, and
//! the packages of `packages.txt`: the trial of a program that is not there says that it is skipped.

mod harness;

use std::path::Path;

use crtools_tests::case::Mode;
use crtools_tests::real;
use crtools_tests::runner::{Verdict, inside};
use crtools_tests::subject::Tools;
use crtools_tests::tool;

fn main() {
    inside(play);
    let programs = real::all();
    let names = programs
        .iter()
        .flat_map(|program| real::MODES.map(|mode| format!("real::{}/{}", program.name(), mode.name())));
    harness::run(names.chain([MOVED.to_owned()]));
}

/// A server that is moved to another network while it is written to.
const MOVED: &str = "real::redis-server/moved";

/// The inner half, as the first process of the trial's namespaces.
fn play(name: &str, directory: &Path) -> Result<Verdict, String> {
    if name == MOVED {
        if let Some(missing) = real::moving::missing() {
            return Ok(Verdict::Skipped(missing));
        }
        let tool = tool::under_test()?;
        real::moving::play(directory, Tools { dump: tool.clone(), restore: tool })?;
        return Ok(Verdict::Passed);
    }
    let words = name.strip_prefix("real::").and_then(|name| name.split_once('/'));
    let (program, mode) = words.ok_or("a trial is called real::PROGRAM/MODE")?;
    let program = real::by_name(program).ok_or_else(|| format!("no program is called {program}"))?;
    let mode = Mode::by_name(mode).ok_or_else(|| format!("no mode is called {mode}"))?;
    if let Some(missing) = real::missing(program.as_ref()) {
        return Ok(Verdict::Skipped(missing));
    }
    let tool = tool::under_test()?;
    real::play(program.as_ref(), mode, directory, Tools { dump: tool.clone(), restore: tool })?;
    Ok(Verdict::Passed)
}
