//! Programs that count in a file: python3, java, and Rust programs linked in two ways.
//!
//! The file `counts` is replaced as a whole; it holds numbers that all grow, or what the program found wrong with
//! its own memory.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Program, command, put, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

/// What each count has to grow by until a look is satisfied.
const SOME: u64 = 3;

fn look(subject: &mut Subject, before: u64) -> Result<u64, String> {
    let counts = subject.own("counts");
    wait_for(subject, "higher counts", || {
        let text = read_lossy(&counts);
        let numbers: Option<Vec<u64>> = text.split_whitespace().map(|word| word.parse().ok()).collect();
        match numbers {
            Some(numbers) => Ok(numbers.into_iter().min().filter(|least| *least >= before + SOME)),
            None => Err(format!("the program says: {text}")),
        }
    })
}

/// Eight threads that check a heap of 300 MiB, timers of an asyncio loop, a subprocess that answers.
pub struct Python;

impl Program for Python {
    fn name(&self) -> &'static str {
        "python3"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["python3"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("work.py"), include_str!("work.py"))?;
        let mut python = command("python3")?;
        python.args(["-B", "work.py"]);
        Ok(python)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        look(subject, before)
    }
}

/// Many threads, a heap that grows, and a collector at work.
pub struct Java;

impl Program for Java {
    fn name(&self) -> &'static str {
        "java"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["java", "javac"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("Work.java"), include_str!("Work.java"))?;
        let mut java = command("java")?;
        // Its statistics are a mapped file that is unlinked while they are written; those are not carried yet.
        java.args(["-XX:-UsePerfData", "-Xms32m", "-Xmx160m", "Work.java"]);
        Ok(java)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        look(subject, before)
    }
}

/// A Rust program without shared libraries, at a fixed address or at any.
pub struct Static {
    pub is_pie: bool,
}

/// The compiler that built this.
fn compiler() -> PathBuf {
    Path::new(env!("CARGO")).with_file_name("rustc")
}

impl Program for Static {
    fn name(&self) -> &'static str {
        if self.is_pie { "static-pie" } else { "static" }
    }

    fn needs(&self) -> &'static [&'static str] {
        &[]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        let source = own.join("count.rs");
        put(&source, include_str!("count.rs.txt"))?;
        let program = own.join("count");
        let model = if self.is_pie { "relocation-model=pie" } else { "relocation-model=static" };
        let compiled = Command::new(compiler())
            .args(["--edition=2021", "-O", "-C", "target-feature=+crt-static", "-C", model, "-o"])
            .arg(&program)
            .arg(&source)
            .output()
            .map_err(|e| format!("run {}: {e}", compiler().display()))?;
        if !compiled.status.success() {
            return Err(format!("compile a program: {}", String::from_utf8_lossy(&compiled.stderr)));
        }
        // ET_EXEC is 2, ET_DYN 3: the linker has done as it was told.
        let kind = std::fs::read(&program).map_err(|e| format!("read it: {e}"))?[16];
        if kind != if self.is_pie { 3 } else { 2 } {
            return Err(format!("the program is of the ELF type {kind}"));
        }
        Ok(Command::new(program))
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        look(subject, before)
    }
}
