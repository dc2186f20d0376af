//! The rules about folders that `docs/architecture.md` states, as tests.

use crate::generate::root;
use std::fs;
use std::path::{Path, PathBuf};

fn crates() -> Vec<String> {
    let entries = fs::read_dir(root().join("crates")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The crates of ours that one uses, tests left aside.
fn uses(name: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).unwrap();
    let section = text.split("\n[dependencies]\n").nth(1).unwrap_or_default();
    let section = section.split("\n[").next().unwrap_or_default();
    let words = section.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
    words.filter(|word| crates().iter().any(|name| name == word)).map(str::to_owned).collect()
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, found),
            false if path.extension().is_some_and(|end| end == "rs") => found.push(path),
            false => {}
        }
    }
}

#[test]
fn crates_use_only_what_stands_below_them() {
    for name in crates() {
        let allowed: &[&str] = match name.as_str() {
            "model" => &[],
            // The error type is shared, and the architecture's record of registers is the agent's.
            "sys" | "image" => &["model"],
            "agent" => &["sys", "model", "image"],
            "pages" => &["sys", "image", "model", "agent"],
            "kinds" => &["sys", "image", "model", "agent"],
            "dump" | "restore" => &["sys", "image", "model", "agent", "pages", "kinds"],
            _ => continue,
        };
        for used in uses(&name) {
            assert!(allowed.contains(&used.as_str()), "{name} uses {used}");
        }
    }
}

#[test]
fn unsafe_code_is_forbidden_outside_of_sys_and_agent() {
    for name in crates().iter().filter(|name| !["sys", "agent"].contains(&name.as_str())) {
        let source = root().join("crates").join(name).join("src");
        let start = ["lib.rs", "main.rs"].map(|file| source.join(file));
        let text = start.iter().find_map(|path| fs::read_to_string(path).ok()).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name}");
    }
}

#[test]
fn no_file_outgrows_its_reader() {
    let mut files = Vec::new();
    for dir in ["crates", "xtask", "tests"] {
        sources(&root().join(dir), &mut files);
    }
    for path in files {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 1000, "{} has {lines} lines", path.display());
    }
}
