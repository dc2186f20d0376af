//! How a process tree looks from outside, as text that can be compared before and after.
//!
//! Everything that /proc tells and that has to survive: a second judge beside the program itself, for what the
//! program did not think of asking. Numbers that the kernel hands out anew are blanked.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Facts by name: `2/maps`, `2/fd/7`, `2/task/3/status`, ...
#[derive(Debug, PartialEq, Eq, Clone, Default)]
pub struct Fingerprint {
    facts: BTreeMap<String, String>,
}

/// The lines of /proc/PID/status that a restore has to reproduce.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "State",
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpgid",
    "NSsid",
    "Kthread",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "VmLck",
    "CoreDumping",
];

/// The lines of fdinfo that belong to the open file and not to this boot.
const FDINFO: &[&str] = &[
    "pos",
    "flags",
    "eventfd-count",
    "eventfd-semaphore",
    "sigmask",
    "clockid",
    "settime flags",
    "it_interval",
    "lock",
    "Pid",
    "NSpid",
];

impl Fingerprint {
    /// Looks at `root` and all its descendants. A task that ends meanwhile is left out.
    pub fn of(root: i32) -> Self {
        let mut print = Self::default();
        let mut left = vec![root];
        while let Some(pid) = left.pop() {
            print.add_process(pid);
            left.extend(children(pid));
        }
        print
    }

    fn add(&mut self, key: String, fact: impl Into<String>) {
        self.facts.insert(key, fact.into());
    }

    fn add_process(&mut self, pid: i32) {
        let base = format!("/proc/{pid}");
        let base = Path::new(&base);
        if fs::read_to_string(base.join("stat")).is_ok_and(|stat| {
            let fields = stat_fields(&stat);
            fields.first().is_some_and(|state| *state == "Z")
        }) {
            // A zombie keeps its place in the tree and its name, hardly more.
            self.add(format!("{pid}/zombie"), stat_line(base));
            return;
        }
        for name in ["cmdline", "environ", "auxv", "limits", "oom_score_adj", "personality", "comm"] {
            let text = fs::read(base.join(name)).unwrap_or_default();
            self.add(format!("{pid}/{name}"), format!("{:?}", String::from_utf8_lossy(&text)));
        }
        for name in ["cwd", "root", "exe"] {
            self.add(format!("{pid}/{name}"), link(&base.join(name)));
        }
        self.add(format!("{pid}/stat"), stat_line(base));
        self.add(format!("{pid}/maps"), maps(&fs::read_to_string(base.join("maps")).unwrap_or_default()));
        self.add(
            format!("{pid}/timers"),
            timers(&fs::read_to_string(base.join("timers")).unwrap_or_default()),
        );
        for entry in fs::read_dir(base.join("fd")).into_iter().flatten().flatten() {
            let number = entry.file_name().to_string_lossy().into_owned();
            let info = fs::read_to_string(base.join("fdinfo").join(&number)).unwrap_or_default();
            self.add(
                format!("{pid}/fd/{number}"),
                format!("{}\n{}", link(&entry.path()), lines(&info, FDINFO)),
            );
        }
        for entry in fs::read_dir(base.join("task")).into_iter().flatten().flatten() {
            let tid = entry.file_name().to_string_lossy().into_owned();
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            self.add(format!("{pid}/task/{tid}/status"), state_blurred(&lines(&status, STATUS)));
        }
    }

    /// What differs, as readable lines; empty if nothing does.
    pub fn differences(&self, after: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for key in self.facts.keys().chain(after.facts.keys().filter(|key| !self.facts.contains_key(*key))) {
            match (self.facts.get(key), after.facts.get(key)) {
                (Some(before), Some(after)) if before == after => {}
                (Some(before), Some(after)) => {
                    let (was, is): (Vec<&str>, Vec<&str>) =
                        (before.lines().collect(), after.lines().collect());
                    for line in was.iter().filter(|line| !is.contains(line)) {
                        found.push(format!("{key}: was    {line}"));
                    }
                    for line in is.iter().filter(|line| !was.contains(line)) {
                        found.push(format!("{key}: is now {line}"));
                    }
                    if was.len() == is.len() && found.is_empty() {
                        found.push(format!("{key}: the same lines in another order"));
                    }
                }
                (Some(before), None) => {
                    found.push(format!("{key}: gone; was {}", before.replace('\n', " | ")))
                }
                (None, Some(after)) => found.push(format!("{key}: new: {}", after.replace('\n', " | "))),
                (None, None) => {}
            }
        }
        found
    }
}

/// The direct children of every thread of a process.
pub fn children(pid: i32) -> Vec<i32> {
    let mut all = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let text = fs::read_to_string(entry.path().join("children")).unwrap_or_default();
        all.extend(text.split_whitespace().filter_map(|word| word.parse::<i32>().ok()));
    }
    all
}

fn stat_fields(stat: &str) -> Vec<&str> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default()
}

/// Parent, group, session, terminal, exit signal, nice, policy and real-time priority.
fn stat_line(base: &Path) -> String {
    let stat = fs::read_to_string(base.join("stat")).unwrap_or_default();
    let fields = stat_fields(&stat);
    let named = [
        ("ppid", 1),
        ("pgrp", 2),
        ("session", 3),
        ("tty", 4),
        ("nice", 16),
        ("exit_signal", 35),
        ("rt_priority", 37),
        ("policy", 38),
    ];
    named
        .iter()
        .map(|(name, index)| format!("{name} {}", fields.get(*index).unwrap_or(&"?")))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A sleeping task may be caught running and the other way round; stopped and traced are real differences.
fn state_blurred(status: &str) -> String {
    status
        .replace("State: R (running)", "State: S (sleeping)")
        .replace("State: D (disk sleep)", "State: S (sleeping)")
}

fn lines(text: &str, wanted: &[&str]) -> String {
    text.lines()
        .filter(|line| line.split_once(':').is_some_and(|(name, _)| wanted.contains(&name.trim())))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A link's text without the inode numbers of objects that have no name.
fn link(path: &Path) -> String {
    let text = fs::read_link(path).map(|to| to.to_string_lossy().into_owned()).unwrap_or_default();
    match text.split_once(":[") {
        Some((kind @ ("pipe" | "socket"), _)) => format!("{kind}:[]"),
        _ => text,
    }
}

/// Mappings without device and inode, and with neighbours joined that differ in nothing but how the kernel
/// came to split them.
fn maps(text: &str) -> String {
    let mut all: Vec<(u64, u64, String, u64, String)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some((start, end)) = words.next().and_then(|range| range.split_once('-')) else { continue };
        let protection = words.next().unwrap_or_default().to_owned();
        let offset = words.next().unwrap_or_default();
        let mut name = words.skip(2).collect::<Vec<_>>().join(" ");
        // Shared anonymous memory: a tool that needs a descriptor for it makes it as a memfd.
        if name == "/memfd:/dev/zero (deleted)" {
            name = "/dev/zero (deleted)".into();
        } else if name == "/memfd:/anon_hugepage (deleted)" {
            name = "/anon_hugepage (deleted)".into();
        }
        let hex = |digits: &str| u64::from_str_radix(digits, 16).unwrap_or_default();
        let (start, end, mut offset) = (hex(start), hex(end), hex(offset));
        // Private huge pages have a file of the kernel's, which says nothing.
        if name == "/anon_hugepage (deleted)" && protection.ends_with('p') {
            offset = start;
        }
        if let Some(last) = all.last_mut() {
            let follows = last.1 == start && last.2 == protection && last.4 == name;
            let continues = name.is_empty() || name.starts_with('[') || last.3 + (last.1 - last.0) == offset;
            if follows && continues {
                last.1 = end;
                continue;
            }
        }
        all.push((start, end, protection, offset, name));
    }
    all.iter()
        .map(|(start, end, p, offset, name)| format!("{start:x}-{end:x} {p} {offset:x} {name}\n"))
        .collect()
}

/// POSIX timers without the kernel's pointers.
fn timers(text: &str) -> String {
    lines(text, &["ID", "notify", "ClockID"])
}
