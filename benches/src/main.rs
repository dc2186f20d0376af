//! `crtools-bench --tool NAME=PATH [--tool NAME=PATH ...] [--runs N] [--cases A,B,...]`
//!
//! Behind a path may follow words that are given to its dumps or restores: `"lazy=PATH restore:--lazy-pages"`.
//!
//! Runs the tools alternating on one target program in fresh namespaces, images on a tmpfs, and prints a
//! Markdown table of medians. In each run: one dump to warm up (a tool may keep a cache of what the kernel
//! can do), a dump with `--leave-running` for the longest gap that the target saw, a dump, a restore, and the
//! target's own check of its memory. In the cases `snapshot-MIB` and `incr-MIB` the program runs on after the dump, with
//! `--track-mem`; in the latter the dump is one of what changed since one of all, a tenth.
//! In the cases `redis-MIB` and `postgres-MIB` it is a server that is dumped, with the client that keeps it busy: the gap
//! is the longest that the client waited. They are skipped where the server is not installed.
//!
//! `crtools-bench --limits` prints what the machine gives: the same work without a tool.

mod limits;
mod table;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crtools_bench::served::missing;
use crtools_bench::{Board, Word, now};
use crtools_tests::reap::Reaper;
use crtools_tests::runner::{Verdict, inside, outside_saying};
use crtools_tests::subject::start;
use crtools_tests::tool::{profile_directory, tail};
use table::Sample;

const CASES: &[&str] = &[
    "tiny",
    "mem-512",
    "mem-2048",
    "sparse-8g",
    "sparse-64g",
    "zero-1024",
    "cow-512",
    "threads-100",
    "threads-1000",
    "procs-50",
    "procs-300",
    "fds-8000",
    "mixed-10000",
    "vmas-30000",
    "redis-400",
    "postgres-200",
];

struct Arguments {
    tools: Vec<(String, String)>,
    runs: usize,
    cases: Vec<String>,
}

fn main() {
    inside(measure);
    if std::env::args().nth(1).as_deref() == Some("--limits") {
        return print!("{}", limits::table());
    }
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) => {
            eprintln!("{problem}\nusage: crtools-bench --tool NAME=PATH... [--runs N] [--cases A,B]");
            std::process::exit(2);
        }
    };
    let names: Vec<&str> = arguments.tools.iter().map(|(name, _)| name.as_str()).collect();
    print!("{}", table::head(&names));
    let mut failures = 0;
    for case in &arguments.cases {
        if let Some(why) = missing(case) {
            eprintln!("SKIP {case}: {why}");
            continue;
        }
        let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); arguments.tools.len()];
        for run in 0..arguments.runs {
            // Every second run the other way round, so that none is always the first.
            let mut order: Vec<usize> = (0..arguments.tools.len()).collect();
            if run % 2 == 1 {
                order.reverse();
            }
            for tool in order {
                let (name, path) = &arguments.tools[tool];
                let said = outside_saying(&format!("{case}={path}"));
                match said
                    .and_then(|(status, said)| Sample::parse(&said).ok_or(format!("{status:?}\n{said}")))
                {
                    Ok(sample) => samples[tool].push(sample),
                    Err(problem) => {
                        eprintln!("{case}, {name}, run {run}: {problem}");
                        failures += 1;
                    }
                }
            }
        }
        print!("{}", table::rows(case, &names, &samples));
    }
    std::process::exit(i32::from(failures > 0));
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut arguments = Arguments {
        tools: Vec::new(),
        runs: 9,
        cases: CASES.iter().map(|case| (*case).to_owned()).collect(),
    };
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--tool" => {
                let value = value()?;
                let (name, path) = value.split_once('=').ok_or("--tool NAME=PATH")?;
                let (path, words) = path.split_once(' ').unwrap_or((path, ""));
                let path = std::fs::canonicalize(path).map_err(|e| format!("{path}: {e}"))?;
                let tool = format!("{} {words}", path.display()).trim_end().to_owned();
                arguments.tools.push((name.to_owned(), tool));
            }
            "--runs" => arguments.runs = value()?.parse().map_err(|e| format!("--runs: {e}"))?,
            "--cases" => arguments.cases = value()?.split(',').map(str::to_owned).collect(),
            _ => return Err(format!("{word} is not known")),
        }
    }
    if arguments.tools.is_empty() {
        return Err("no --tool is given".into());
    }
    Ok(arguments)
}

/// The inner half: one run of one tool on one case, as the first process of fresh namespaces.
fn measure(name: &str, directory: &Path) -> Result<Verdict, String> {
    let (case, tool) = name.split_once('=').ok_or("CASE=TOOL")?;
    let board_path = directory.join("board");
    let board = Board::open(&board_path).map_err(|e| format!("make the board: {e}"))?;
    let mut reaper = Reaper::default();
    let mut command = Command::new(profile_directory().join("bench-target"));
    command.arg(case).arg(&board_path).current_dir(directory);
    let pid = start(&mut reaper, &mut command, &directory.join("target.log"), true)
        .map_err(|e| format!("start the target: {e}"))?;
    wait_for("the target", &directory.join("target.log"), || board.get(Word::Ready) == 1)?;
    let mut words = tool.split(' ');
    let tool = Path::new(words.next().unwrap_or_default());
    let bench = Bench { tool, words: words.collect(), directory, pid, board };
    bench.dump("warm-up", true)?;
    std::fs::remove_dir_all(directory.join("warm-up")).map_err(|e| e.to_string())?;

    bench.forget_gaps()?;
    bench.dump("snapshot", true)?;
    bench.see_ticks()?;
    let gap = board.get(Word::LongestGap);
    std::fs::remove_dir_all(directory.join("snapshot")).map_err(|e| e.to_string())?;

    bench.forget_gaps()?;
    let goes_on = ["--leave-running", "--track-mem"];
    let dump = if case.starts_with("incr-") {
        bench.dump_with("full", &goes_on)?;
        board.set(Word::Change, 1);
        wait_for("the change", &directory.join("target.log"), || board.get(Word::Change) == 0)?;
        bench.dump_with("images", &[&goes_on[..], &["--prev-images-dir", "../full"]].concat())?
    } else if case.starts_with("snapshot-") {
        bench.dump_with("images", &goes_on)?
    } else {
        bench.dump("images", false)?
    };
    if case.starts_with("incr-") || case.starts_with("snapshot-") {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
            .map_err(|e| format!("end the target: {e}"))?;
    }
    reaper.wait(pid, Duration::from_secs(20)).ok_or("the target is not gone after the dump")?;
    let size = size_of_images(&directory.join("images"))?;
    board.set(Word::FirstTick, 0);
    let begin = now();
    let restore = bench.run("images", "restore", &["-d"])?;
    bench.see_ticks()?;
    // The target sets it behind the other.
    wait_for("the first tick", &directory.join("target.log"), || board.get(Word::FirstTick) != 0)?;
    let first = board.get(Word::FirstTick).saturating_sub(begin) as f64 / 1e6;

    board.set(Word::Check, 1);
    wait_for("the check", &directory.join("target.log"), || board.get(Word::Verdict) != 0)?;
    if board.get(Word::Verdict) != 1 {
        return Err(format!(
            "the target's memory is wrong\n{}",
            tail("target", &directory.join("target.log"), 10)
        ));
    }
    let sample = Sample {
        dump: dump.0,
        restore: restore.0,
        gap: gap as f64 / 1e6,
        first,
        size,
        dump_rss: dump.1,
        restore_rss: restore.1,
    };
    println!("{sample}");
    Ok(Verdict::Passed)
}

/// KiB that a folder takes on its file system.
fn size_of_images(images: &Path) -> Result<u64, String> {
    use std::os::unix::fs::MetadataExt;
    let mut blocks = 0;
    for entry in std::fs::read_dir(images).map_err(|e| e.to_string())? {
        blocks += entry.and_then(|entry| entry.metadata()).map_err(|e| e.to_string())?.blocks();
    }
    Ok(blocks / 2)
}

fn wait_for(what: &str, log: &Path, mut condition: impl FnMut() -> bool) -> Result<(), String> {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(60) {
            return Err(format!("waited a minute in vain for {what}\n{}", tail("target", log, 10)));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

struct Bench<'a> {
    tool: &'a Path,
    /// `dump:WORD` and `restore:WORD`: more for its command line.
    words: Vec<&'a str>,
    directory: &'a Path,
    pid: i32,
    board: Board,
}

impl Bench<'_> {
    fn forget_gaps(&self) -> Result<(), String> {
        self.board.set(Word::Reset, 1);
        wait_for("a tick", &self.directory.join("target.log"), || self.board.get(Word::Reset) == 0)
    }

    /// Waits until the target has ticked after this moment: the gap before is complete then.
    fn see_ticks(&self) -> Result<(), String> {
        let moment = now();
        wait_for("a tick", &self.directory.join("target.log"), || self.board.get(Word::LastTick) > moment)
    }

    fn dump(&self, images: &str, leave_running: bool) -> Result<(f64, u64), String> {
        self.dump_with(images, if leave_running { &["--leave-running"] } else { &[] })
    }

    fn dump_with(&self, images: &str, arguments: &[&str]) -> Result<(f64, u64), String> {
        std::fs::create_dir(self.directory.join(images)).map_err(|e| format!("make {images}: {e}"))?;
        let pid = self.pid.to_string();
        self.run(images, "dump", &[&["-t", &pid], arguments].concat())
    }

    /// One run of the tool: milliseconds from fork to end, and its peak memory in KiB.
    fn run(&self, images: &str, command: &str, arguments: &[&str]) -> Result<(f64, u64), String> {
        let images = self.directory.join(images);
        let log = format!("{command}.log");
        let mut tool = Command::new(self.tool);
        tool.arg(command).arg("-D").arg(&images).args(["-o", &log]).args(arguments);
        let own = |word: &&str| {
            word.split_once(':').filter(|(of, _)| *of == command).map(|(_, word)| word.to_owned())
        };
        tool.args(self.words.iter().filter_map(own));
        crtools_tests::reap::quiet(&mut tool, &self.directory.join("said")).map_err(|e| e.to_string())?;
        let begin = Instant::now();
        let child = tool.spawn().map_err(|e| format!("start {}: {e}", self.tool.display()))?;
        let (status, peak) =
            crtools_tests::reap::wait_with_peak(child.id() as i32).map_err(|e| e.to_string())?;
        let took = begin.elapsed().as_secs_f64() * 1e3;
        if status != 0 {
            let said = tail("said", &self.directory.join("said"), 20);
            return Err(format!(
                "{command} ended with {status:#x}\n{said}{}",
                tail("log", &images.join(log), 20)
            ));
        }
        Ok((took, peak))
    }
}
