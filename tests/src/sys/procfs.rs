//! What a workload reads about itself and its relatives in /proc.

use std::fs;

/// Field `name` of `/proc/<of>/status`, trimmed.
#[track_caller]
pub fn status(of: impl std::fmt::Display, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{of}/status")).expect("read status");
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {name} in the status of {of}"))
        .trim()
        .to_owned()
}

/// The fields of `/proc/<of>/stat` after the command: index 0 is the state, 1 the parent, 2 the group, 3 the
/// session.
#[track_caller]
pub fn stat(of: impl std::fmt::Display) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{of}/stat")).expect("read stat");
    // The command may hold blanks and brackets of its own: the fields begin after the last bracket.
    let (_, fields) = text.rsplit_once(')').expect("a command in brackets");
    fields.split_whitespace().map(str::to_owned).collect()
}

/// The state letter of a task: R, S, D, T, t, Z, X.
pub fn state(of: impl std::fmt::Display) -> char {
    stat(of)[0].chars().next().expect("a letter")
}

/// One mapping of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    pub start: usize,
    pub end: usize,
    pub protection: String,
    pub offset: u64,
    pub name: String,
    /// From smaps: `VmFlags` as two-letter words, and the counters in KiB by name.
    pub flags: Vec<String>,
    pub counters: Vec<(String, u64)>,
}

impl Mapping {
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.counters.iter().find(|(key, _)| key == name).expect("a counter of smaps").1
    }
}

/// The mappings of a process with what smaps says about each.
#[track_caller]
pub fn mappings(of: impl std::fmt::Display) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{of}/smaps")).expect("read smaps");
    let mut all: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().expect("no empty lines");
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            let last = all.last_mut().expect("a mapping first");
            last.flags = flags.split_whitespace().map(str::to_owned).collect();
        } else if let Some(key) = first.strip_suffix(':') {
            if let Some(value) = words.next().and_then(|word| word.parse().ok()) {
                all.last_mut().expect("a mapping first").counters.push((key.to_owned(), value));
            }
        } else {
            let (start, end) = first.split_once('-').expect("a range");
            let protection = words.next().expect("protection").to_owned();
            let offset = words.next().expect("offset");
            let name = words.skip(2).collect::<Vec<_>>().join(" ");
            all.push(Mapping {
                start: usize::from_str_radix(start, 16).expect("hexadecimal"),
                end: usize::from_str_radix(end, 16).expect("hexadecimal"),
                protection,
                offset: u64::from_str_radix(offset, 16).expect("hexadecimal"),
                name,
                flags: Vec::new(),
                counters: Vec::new(),
            });
        }
    }
    all
}

/// The mapping of this process that holds `address`.
#[track_caller]
pub fn mapping_at(address: usize) -> Mapping {
    mappings("self").into_iter().find(|m| m.start <= address && address < m.end).expect("mapped there")
}

/// Entries of `/proc/self/pagemap` for `pages` pages from `address`.
#[track_caller]
pub fn pagemap(address: usize, pages: usize) -> Vec<u64> {
    pagemap_of("self", address, pages)
}

/// Entries of another process's pagemap.
#[track_caller]
pub fn pagemap_of(of: impl std::fmt::Display, address: usize, pages: usize) -> Vec<u64> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::open(format!("/proc/{of}/pagemap")).expect("open pagemap");
    let mut bytes = vec![0; pages * 8];
    file.read_exact_at(&mut bytes, (address / super::memory::PAGE * 8) as u64).expect("read pagemap");
    bytes.chunks_exact(8).map(|entry| u64::from_ne_bytes(entry.try_into().expect("eight"))).collect()
}

/// A counter of all memory; none that the kernel does not have is zero. Source: `/proc/vmstat`.
pub fn vmstat(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/vmstat").expect("read vmstat");
    let mut counters = text.lines().filter_map(|line| line.split_once(' '));
    counters.find(|counter| counter.0 == name).map_or(0, |counter| counter.1.parse().expect("a number"))
}

/// Number, six arguments, stack and program counter of the system call that a task is blocked in; empty while
/// it runs.
pub fn syscall(of: impl std::fmt::Display) -> Vec<u64> {
    let text = fs::read_to_string(format!("/proc/{of}/syscall")).unwrap_or_default();
    text.split_whitespace()
        .map_while(|word| match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        })
        .collect()
}
