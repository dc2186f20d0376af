//! Damaged images: `cargo test -p crtools-tests --test hostile -- [FILTER]`.
//!
//! One small tree is dumped; its images are then damaged in hundreds of ways, and each set is planned
//! (`--dry-run`) and restored. Whatever the damage: no panic, no hang, bounded memory, and after a failure an
//! error that says where it is, and no process left. Root is needed for the namespaces.

mod damage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crtools_tests::reap::{Reaper, others, quiet};
use crtools_tests::round::Round;
use crtools_tests::runner::{Verdict, inside, outside};
use crtools_tests::subject::Tools;
use crtools_tests::tool::{self, Tool, read_lossy};
use crtools_tests::workloads;
use damage::{CASES, Expect, Set};
use libtest_mimic::{Arguments, Completion, Trial};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::WaitStatus;

const WORKLOAD: &str = "basic::threads_beside_a_child_with_pipe_and_file_survive";
/// For the trials whose damage does not depend on what is there.
const VARIED: &str = "ghosts::varied_target";
/// The longest that one run of the tool may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Address space of the tool in KiB. The area for lists is 1 GiB of it, of which next to nothing is used.
const ADDRESS_SPACE: u32 = 3 << 20;
/// Trials of random damage, and sets damaged in each.
const RANDOM_TRIALS: u64 = 4;
const RANDOM_SETS: u64 = 100;

fn main() {
    inside(play);
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments
        .test_threads
        .or_else(|| std::thread::available_parallelism().ok().map(|count| count.get() + 1));
    let random = (0..RANDOM_TRIALS).map(|seed| format!("random_bytes_{seed}"));
    let names =
        ["named_damage", "cut_images", "cut_images_of_more_kinds", "images_that_are_missing_or_wrong"];
    let names = names.map(str::to_owned);
    let trials = names.into_iter().chain(random).map(|name| {
        let trial = name.clone();
        Trial::ignorable_test(name, move || match outside(&trial)? {
            Verdict::Passed => Ok(Completion::Completed),
            Verdict::Skipped(reason) => {
                println!("SKIP {trial}: {reason}");
                Ok(Completion::ignored_with(reason))
            }
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit();
}

/// The inner half, as the first process of the trial's namespaces.
fn play(name: &str, directory: &Path) -> Result<Verdict, String> {
    let ours = tool::under_test()?;
    if ours.is_peer {
        return Ok(Verdict::Skipped("the peer is not what is tested here".into()));
    }
    let seed = name.rsplit_once('_').and_then(|(_, seed)| seed.parse::<u64>().ok());
    let is_varied = seed.is_some_and(|seed| seed % 2 == 1) || name == "cut_images_of_more_kinds";
    let workload = if is_varied { VARIED } else { WORKLOAD };
    let case = workloads::by_name(workload).ok_or("the workload is missing")?;
    let program = Path::new(env!("CARGO_BIN_EXE_workload"));
    let tools = Tools { dump: ours.clone(), restore: ours.clone() };
    let images = Round::begin(program, workload, &case, directory, tools)?.dump_for_good()?;
    // A process that goes on with wrong registers may call anything: the machine's files are not to change.
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>)
        .map_err(|e| format!("make the root read-only: {e}"))?;
    let mut lab = Lab { tool: ours, directory: directory.to_path_buf(), images, reaper: Reaper::default() };
    // Undamaged, it has to work, or nothing below means anything.
    let healthy = lab.examine("healthy", Expect::Either, |_| {});
    if !matches!(healthy, Ok(true)) {
        return Err(format!("the images are not restored without damage either: {healthy:?}"));
    }
    let problems = match seed {
        Some(seed) => lab.random(seed),
        None => match name {
            "named_damage" => lab.named(),
            "cut_images" | "cut_images_of_more_kinds" => lab.cut(),
            _ => lab.wrong(),
        },
    };
    match problems.is_empty() {
        true => Ok(Verdict::Passed),
        false => {
            Err(format!("{} sets were not treated as they should:\n{}", problems.len(), problems.join("\n")))
        }
    }
}

/// Where sets of images are damaged and tried.
struct Lab {
    tool: Tool,
    directory: PathBuf,
    images: PathBuf,
    reaper: Reaper,
}

/// One run of the tool.
struct Ran {
    /// 0 or 1: everything else is a problem of its own.
    is_good: bool,
    said: String,
}

impl Lab {
    /// The images that a restore reads, without those that are only contents.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.images)
            .expect("read the folder")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                name.ends_with(".img") && !name.starts_with("pages-") && !name.starts_with("timens")
            })
            .collect();
        names.sort();
        names
    }

    /// Runs the tool on `set`, with a limit on its memory.
    fn run(&mut self, set: &Path, how: &str) -> Result<Ran, String> {
        let log = set.join("restore.log");
        let _ = fs::remove_file(&log);
        let said = set.with_extension("said");
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(format!("ulimit -v {ADDRESS_SPACE}; exec \"$0\" \"$@\"")).arg(&self.tool.path);
        command.arg("restore").arg("-D").arg(set).args(["-o", "restore.log", "-v4", how]);
        let _ = fs::remove_file(&said);
        let pid = quiet(&mut command, &said)
            .and_then(|()| self.reaper.start(&mut command))
            .map_err(|e| format!("start the tool: {e}"))?;
        let status = self.reaper.wait(pid, LIMIT);
        let stuck = if status.is_none() { who_waits() } else { String::new() };
        let text = read_lossy(&said) + &read_lossy(&log);
        let problem = |what: String| {
            let lines: Vec<&str> = text.lines().collect();
            Err(format!("{how}: {what}\n    {}", lines[lines.len().saturating_sub(6)..].join("\n    ")))
        };
        if text.contains("panicked") || text.contains("memory allocation") {
            return problem("it panicked".into());
        }
        match status {
            Some(WaitStatus::Exited(_, code @ (0 | 1))) => Ok(Ran { is_good: code == 0, said: text }),
            Some(status) => problem(format!("it ended with {status:?}")),
            None => problem(format!("it did not end within {LIMIT:?}{stuck}")),
        }
    }

    /// Damages a copy of the images and sees what the tool makes of it; answers whether it was restored.
    fn examine(&mut self, name: &str, expect: Expect, damage: impl FnOnce(&Set)) -> Result<bool, String> {
        let path = self.directory.join("set");
        let copied = fs::create_dir(&path).and_then(|()| {
            for entry in fs::read_dir(&self.images)? {
                let entry = entry?;
                fs::copy(entry.path(), path.join(entry.file_name()))?;
            }
            Ok(())
        });
        copied.map_err(|e| format!("{name}: copy the images: {e}"))?;
        let set = Set::at(path.clone());
        damage(&set);
        let judged = self.judge(&path, expect);
        self.reaper.clear();
        fs::remove_dir_all(&path).map_err(|e| format!("{name}: remove the set: {e}"))?;
        judged.map_err(|problem| format!("{name}: {problem}"))
    }

    fn judge(&mut self, set: &Path, expect: Expect) -> Result<bool, String> {
        let planned = self.run(set, "--dry-run")?;
        self.see_nobody()?;
        let restored = self.run(set, "-d")?;
        if !restored.is_good {
            self.see_nobody()?;
        }
        let (first, words) = match expect {
            Expect::Refused(words) => (&planned, words),
            Expect::Fails(words) => (&restored, words),
            Expect::Either => (&restored, &[][..]),
        };
        if !matches!(expect, Expect::Either) && (first.is_good || restored.is_good) {
            return Err("it was not refused".into());
        }
        for ran in [&planned, &restored].into_iter().filter(|ran| !ran.is_good) {
            let errors: Vec<&str> = ran.said.lines().filter(|line| line.contains("Error")).collect();
            // The last one only says that there was one.
            if errors.len() < 2 {
                return Err(format!("it gave no reason: {}", ran.said));
            }
        }
        let errors: Vec<&str> = first.said.lines().filter(|line| line.contains("Error")).collect();
        match words.iter().find(|word| !errors.iter().any(|line| line.contains(**word))) {
            Some(word) => Err(format!("its errors do not say {word:?}:\n    {}", errors.join("\n    "))),
            None => Ok(restored.is_good),
        }
    }

    fn see_nobody(&mut self) -> Result<(), String> {
        let start = Instant::now();
        loop {
            self.reaper.forget();
            let left = others();
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(2) {
                return Err(format!("it left processes behind: {left:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn named(&mut self) -> Vec<String> {
        let run = |(name, expect, damage): &damage::Case| self.examine(name, *expect, damage).err();
        CASES.iter().filter_map(run).collect()
    }

    /// Every image cut at several places.
    fn cut(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        for image in self.names() {
            let length = fs::metadata(self.images.join(&image)).expect("an image").len() as usize;
            let places =
                [1, 4, 6, 8, 9, 12, 13, length / 4, length / 2, length * 3 / 4, length - 4, length - 1];
            let mut places: Vec<usize> = places.into_iter().filter(|place| *place < length).collect();
            places.sort_unstable();
            places.dedup();
            for place in places {
                let result = self.examine(&format!("{image} cut at {place}"), Expect::Either, |set| {
                    set.put(&image, &set.bytes(&image)[..place]);
                });
                match result {
                    // A list that ends early after a whole record is a shorter list.
                    Ok(true) if !is_boundary(&self.images.join(&image), place) => {
                        problems.push(format!("{image} cut at {place}: it was not refused"));
                    }
                    Ok(_) => {}
                    Err(problem) => problems.push(problem),
                }
            }
        }
        problems
    }

    /// Every image missing, empty, of another kind, followed by nonsense, or with a record of a huge length.
    fn wrong(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        for image in self.names() {
            let head = if image == "inventory.img" { 4 } else { 8 };
            // Without these there is only nothing to say.
            let may_be_missing =
                ["seccomp", "pipes-data", "fdinfo"].iter().any(|prefix| image.starts_with(prefix));
            let missing = if may_be_missing { Expect::Either } else { Expect::Refused(&[]) };
            // Contents of pipes are read when the pipe is made.
            let refused = if image == "pipes-data.img" { Expect::Fails(&[]) } else { Expect::Refused(&[]) };
            let mut results = vec![
                self.examine(&format!("{image} missing"), missing, |set| {
                    fs::remove_file(set.file(&image)).expect("remove an image");
                }),
                self.examine(&format!("{image} empty"), refused, |set| set.put(&image, &[])),
                self.examine(&format!("{image} without records"), Expect::Either, |set| {
                    set.put(&image, &set.bytes(&image)[..head]);
                }),
                self.examine(&format!("{image} of a huge record"), refused, |set| {
                    let mut bytes = set.bytes(&image);
                    bytes[head..head + 4].fill(0xff);
                    set.put(&image, &bytes);
                }),
            ];
            for at in (0..head).step_by(4) {
                results.push(self.examine(&format!("{image} with another magic at {at}"), refused, |set| {
                    let mut bytes = set.bytes(&image);
                    bytes[at] ^= 1;
                    set.put(&image, &bytes);
                }));
            }
            // Files of one record are read no further.
            results.push(self.examine(&format!("{image} followed by nonsense"), Expect::Either, |set| {
                let mut bytes = set.bytes(&image);
                bytes.extend_from_slice(&[0xff; 7]);
                set.put(&image, &bytes);
            }));
            problems.extend(results.into_iter().filter_map(Result::err));
        }
        problems
    }

    /// Bytes changed at random, with a seed of one's own for each set.
    fn random(&mut self, trial: u64) -> Vec<String> {
        let names = self.names();
        let mut problems = Vec::new();
        for seed in trial * RANDOM_SETS..(trial + 1) * RANDOM_SETS {
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
            let mut done = Vec::new();
            let result = self.examine(&format!("seed {seed}"), Expect::Either, |set| {
                for _ in 0..1 + random.below(4) {
                    let name = &names[random.below(names.len())];
                    let mut bytes = set.bytes(name);
                    // Mostly behind the magic numbers, which are soon tried out.
                    let from = if random.below(16) == 0 { 0 } else { 8.min(bytes.len() - 1) };
                    let at = from + random.below(bytes.len() - from);
                    let change = 1 << random.below(8);
                    bytes[at] =
                        if random.below(4) == 0 { random.below(256) as u8 } else { bytes[at] ^ change };
                    done.push(format!("{name}[{at}] = {}", bytes[at]));
                    set.put(name, &bytes);
                }
            });
            problems.extend(result.err().map(|problem| format!("{problem} ({})", done.join(", "))));
        }
        problems
    }
}

/// What every thread here is doing, to tell why nothing goes on.
fn who_waits() -> String {
    let mut text = String::new();
    for pid in others() {
        for entry in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let read = |name: &str| read_lossy(&entry.path().join(name)).trim().replace('\n', "; ");
            let status = read("status");
            let state = status.split("; ").filter(|line| {
                ["Name", "State", "Pid", "TracerPid", "SigPnd", "ShdPnd"]
                    .iter()
                    .any(|key| line.starts_with(key))
            });
            let state: Vec<&str> = state.collect();
            text += &format!("\n    {}; {}; call {}", state.join(" "), read("wchan"), read("syscall"));
        }
    }
    text
}

/// Does a record of this image end at `place`?
fn is_boundary(image: &Path, place: usize) -> bool {
    let bytes = fs::read(image).expect("read an image");
    let is_inventory = image.ends_with("inventory.img");
    let mut at = if is_inventory { 4 } else { 8 };
    while at < place {
        let Some(length) = bytes.get(at..at + 4) else { return false };
        at += 4 + u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
    }
    at == place
}

/// xorshift64: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % limit
    }
}
