//! `cargo xtask test`: everything that is tested, in one command.

use crate::generate::root;
use std::fs;
use std::process::{Command, Stdio};

/// A test that hangs is a failure, not an endless wait.
const LIMIT: &str = "15m";

pub fn run(words: &[&str]) -> Result<(), String> {
    require_packages()?;
    if !is_root() {
        println!("Not run as root: tests that dump and restore processes will say that they are skipped.");
    }
    // The tests that start the command want it as users have it.
    cargo(&["build", "--release", "--package", "crtools"])?;
    let mut test = vec!["test", "--workspace"];
    test.extend(words);
    cargo(&test)
}

fn cargo(words: &[&str]) -> Result<(), String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let status = Command::new("timeout")
        .args(["--kill-after=10s", LIMIT, &cargo])
        .args(words)
        .current_dir(root())
        .status()
        .map_err(|error| format!("timeout: {error}; it comes with coreutils"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("cargo {}: {status}", words.join(" "))),
    }
}

pub fn is_root() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.is_some_and(|uids| uids.split_whitespace().nth(1) == Some("0"))
}

/// The tests with real programs need those programs; on a Debian host their packages can be named.
fn require_packages() -> Result<(), String> {
    let Ok(list) = fs::read_to_string(root().join("tests/packages.txt")) else { return Ok(()) };
    let missing: Vec<&str> = list
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|name| !name.is_empty())
        .filter(|name| is_installed(name) == Some(false))
        .collect();
    match missing.is_empty() {
        true => Ok(()),
        false => Err(format!("some programs are missing; run\n    apt-get install -y {}", missing.join(" "))),
    }
}

/// Nothing on a host without dpkg: there the tests themselves find what is missing.
fn is_installed(package: &str) -> Option<bool> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    Some(output.stdout == b"installed")
}
