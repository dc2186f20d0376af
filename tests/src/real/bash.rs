//! bash in a loop: a pipeline of three programs is started in each turn, and another takes what the turns say.
//!
//! There is hardly a moment without a process that is being made or is ending, and data are in the pipes.

use std::path::Path;
use std::process::Command;

use super::{Program, command, put, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

const SCRIPT: &str = include_str!("loop.sh");

/// The lines that a look waits for.
const SOME: u64 = 20;

pub struct Bash;

impl Program for Bash {
    fn name(&self) -> &'static str {
        "bash"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["bash", "tr", "sed", "cat", "grep"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("loop.sh"), SCRIPT)?;
        let mut bash = command("bash")?;
        bash.arg("loop.sh");
        Ok(bash)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        let (turns, lines) = (subject.own("turns"), subject.own("lines"));
        wait_for(subject, "more lines", || {
            let turns = sequence(&read_lossy(&turns), "TURN ", "!")?;
            let lines = sequence(&read_lossy(&lines), "<", ">")?;
            Ok(turns.min(lines)).map(|done| (done >= before + SOME).then_some(done))
        })
    }
}

/// How far a text counts: every line from 1 on once, whole and in order.
fn sequence(text: &str, left: &str, right: &str) -> Result<u64, String> {
    let mut count = 0;
    for line in text.split_inclusive('\n') {
        count += 1;
        let expected = format!("{left}{count}{right}\n");
        if line != expected {
            return Err(format!("line {count} is {line:?} and not {expected:?}"));
        }
    }
    Ok(count)
}
