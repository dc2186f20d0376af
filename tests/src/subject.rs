//! A process tree under test, and the tool that is run on it.
//!
//! What a trial does with any program, be it a workload that judges itself or one that is asked: dump it, see
//! that it is gone, restore it, see that nobody is left behind. Runs as the first process of fresh namespaces.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::reap::{Reaper, others, quiet};
use crate::sys::traced::{Call, Traced};
use crate::tool::{LIMIT, Ran, Tool, read_lossy, tail};

/// Where a program under test finds others.
pub const PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/sbin";

/// Two tools: most trials use the first for both halves.
#[derive(Debug, Clone)]
pub struct Tools {
    pub dump: Tool,
    pub restore: Tool,
}

/// A tree under way, and what belongs to it.
#[derive(Debug)]
pub struct Subject {
    pub pid: i32,
    pub reaper: Reaper,
    pub tools: Tools,
    directory: PathBuf,
    options: Vec<&'static str>,
    /// Given to the next dumps, and to the next restores.
    pub more_for_dump: Vec<String>,
    pub more_for_restore: Vec<String>,
    /// And to each, whatever the outside says.
    pub more_for_every_dump: Vec<&'static str>,
    pub more_for_every_restore: Vec<&'static str>,
    /// Processes beside the tree: nobody dumps them, and they stay.
    pub bystanders: Vec<i32>,
    steps: usize,
    /// Logs worth showing when something goes wrong, the latest last.
    logs: Vec<PathBuf>,
}

/// # Errors
/// When one of `words` is not in `said`.
pub fn says(said: &str, words: &[&str]) -> Result<(), String> {
    let lower = said.to_lowercase();
    let missing: Vec<&&str> = words.iter().filter(|word| !lower.contains(&word.to_lowercase())).collect();
    if missing.is_empty() { Ok(()) } else { Err(format!("the refusal does not say {missing:?}:\n{said}")) }
}

/// Starts `program arguments` as a session leader (or not), its words going to `log`.
///
/// # Errors
/// When it cannot be started.
pub fn start(reaper: &mut Reaper, command: &mut Command, log: &Path, is_leader: bool) -> io::Result<i32> {
    quiet(command, log)?;
    command.env_clear().env("PATH", PATH).env("LANG", "C.UTF-8");
    // SAFETY: between fork and exec the closure makes two async-signal-safe calls without memory.
    unsafe {
        command.pre_exec(move || {
            // Whatever the shell or cargo left open lies on mounts of the machine and is nobody's state here.
            let marked = libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            if marked < 0 {
                return Err(io::Error::last_os_error());
            }
            if is_leader && libc::setsid() < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    reaper.start(command)
}

impl Subject {
    /// Starts `command` in a directory of its own, with its words in a file there.
    ///
    /// # Errors
    /// With the reason as text for the person who reads the test's output.
    pub fn begin(
        command: &mut Command,
        directory: &Path,
        tools: Tools,
        options: &[&'static str],
        is_leader: bool,
    ) -> Result<Self, String> {
        let own = directory.join("w");
        fs::create_dir_all(&own).map_err(|e| format!("make the program's directory: {e}"))?;
        let mut reaper = Reaper::default();
        command.current_dir(&own);
        let pid = start(&mut reaper, command, &own.join("log"), is_leader)
            .map_err(|e| format!("start {}: {e}", command.get_program().display()))?;
        Ok(Self {
            pid,
            reaper,
            tools,
            directory: directory.to_path_buf(),
            options: options.to_vec(),
            more_for_dump: Vec::new(),
            more_for_restore: Vec::new(),
            more_for_every_dump: Vec::new(),
            more_for_every_restore: Vec::new(),
            bystanders: Vec::new(),
            steps: 0,
            logs: Vec::new(),
        })
    }

    /// Where the trial keeps what is not the program's.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file of the program.
    pub fn own(&self, name: &str) -> PathBuf {
        self.directory.join("w").join(name)
    }

    /// A text with the tails of all logs below it.
    pub fn report(&self, problem: &str) -> String {
        let mut text = format!("{problem}\n{}", tail("program", &self.own("log"), 30));
        for log in self.logs.iter().rev().take(3) {
            text += &tail(&log.display().to_string(), log, 25);
        }
        text
    }

    /// A new folder for the images of one step.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn step(&mut self, kind: &str) -> Result<PathBuf, String> {
        self.steps += 1;
        let images = self.directory.join(format!("{}-{kind}", self.steps));
        fs::create_dir(&images).map_err(|e| format!("make {}: {e}", images.display()))?;
        Ok(images)
    }

    /// What the case gives to every dump.
    fn own_for_dump(&self) -> Vec<String> {
        self.options.iter().map(|option| (*option).to_owned()).chain(self.more_for_dump.clone()).collect()
    }

    fn run(&mut self, tool: &Tool, images: &Path, command: &str, more: &[&str]) -> Result<Ran, String> {
        let given = if command == "restore" { &self.more_for_restore } else { &self.more_for_dump };
        let mut arguments: Vec<&str> = Vec::new();
        if !matches!(command, "pre-dump" | "page-server") {
            arguments.extend(&self.options);
            arguments.extend(given.iter().map(String::as_str));
        }
        match command {
            "restore" => arguments.extend(&self.more_for_every_restore),
            "dump" => arguments.extend(&self.more_for_every_dump),
            _ => {}
        }
        arguments.extend(more);
        let ran = tool
            .run(&mut self.reaper, images, command, &arguments, LIMIT)
            .map_err(|e| format!("start {}: {e}", tool.path.display()))?;
        self.logs.push(ran.log.clone());
        self.logs.push(images.with_extension(format!("{command}.said")));
        if ran.status.is_none() {
            return Err(format!("{} {command} did not end within {LIMIT:?}", tool.name()));
        }
        // Wrong whatever the outcome should be.
        if ran.said.contains("panicked") {
            return Err(format!("{} {command} panicked:\n{}", tool.name(), ran.said));
        }
        Ok(ran)
    }

    /// # Errors
    /// When the tool cannot be run, hangs or panics. A refusal is not an error here but a status.
    pub fn dump(&mut self, images: &Path, more: &[&str]) -> Result<Ran, String> {
        let pid = self.pid.to_string();
        let mut arguments = vec!["-t", pid.as_str()];
        arguments.extend(more);
        self.run(&self.tools.dump.clone(), images, "dump", &arguments)
    }

    /// Saves the memory alone; the tree runs on.
    ///
    /// # Errors
    /// When that fails.
    pub fn save_memory(&mut self, images: &Path, more: &[&str]) -> Result<(), String> {
        let pid = self.pid.to_string();
        let arguments = [&["-t", pid.as_str()], more].concat();
        let ran = self.run(&self.tools.dump.clone(), images, "pre-dump", &arguments)?;
        if !ran.is_good() {
            return Err(format!("the pre-dump failed: {:?}", ran.status));
        }
        self.still_there("after a pre-dump")
    }

    /// Begins a dump, kills the tool after `delay`, and waits until whatever works for it has ended.
    ///
    /// # Errors
    /// When it cannot be started, or a part of it stays.
    pub fn dump_killed(&mut self, delay: Duration, more: &[&str]) -> Result<(), String> {
        let images = self.step("images")?;
        let tool = self.tools.dump.clone();
        let pid = self.pid.to_string();
        let given = ["-t", pid.as_str(), "--leave-running"];
        let own = self.own_for_dump();
        let arguments: Vec<&str> =
            own.iter().map(String::as_str).chain(given).chain(more.iter().copied()).collect();
        let ran = tool
            .run_killed(&mut self.reaper, &images, "dump", &arguments, delay)
            .map_err(|e| format!("start {}: {e}", tool.path.display()))?;
        self.logs.push(ran.log);
        let start = Instant::now();
        loop {
            self.reaper.collect();
            let is_tool =
                |pid: &i32| read_lossy(Path::new(&format!("/proc/{pid}/comm"))).trim() == tool.name();
            if !others().iter().any(is_tool) {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(5) {
                return Err("a part of the killed tool does not end".into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// A dump whose process is killed when it has made its copies and is about to use them. The first script waits for
    /// `gate`.
    ///
    /// # Errors
    /// When it comes to another end than the command of such a dump.
    pub fn dump_killed_at_its_copies(&mut self, more: &[&str], gate: &Path) -> Result<(), String> {
        let images = self.step("images")?;
        let tool = self.tools.dump.clone();
        let pid = self.pid.to_string();
        let own = self.own_for_dump();
        let given = own.iter().map(String::as_str).chain(["-t", pid.as_str()]);
        let arguments: Vec<&str> = given.chain(more.iter().copied()).collect();
        let (command, log) = tool
            .start(&mut self.reaper, &images, "dump", &arguments)
            .map_err(|e| format!("start {}: {e}", tool.path.display()))?;
        self.logs.push(log);
        let children = |pid: i32| -> Vec<i32> {
            let text = read_lossy(Path::new(&format!("/proc/{pid}/task/{pid}/children")));
            text.split_whitespace().filter_map(|word| word.parse().ok()).collect()
        };
        let mut worker = 0;
        // With its script it has begun.
        crate::case::until("the script of the dump", || {
            worker = children(command).first().copied().unwrap_or(0);
            worker != 0 && !children(worker).is_empty()
        });
        let traced = Traced::begin(worker)?;
        std::fs::File::create(gate).map_err(|e| format!("let the script end: {e}"))?;
        // It has the copies work as it does itself.
        let is_it = |call: &Call| call[0] == libc::SYS_sched_setaffinity as u64 && call[1] != 0;
        traced.before(is_it, || {
            kill(Pid::from_raw(worker), Signal::SIGKILL).map_err(|e| format!("kill the dump: {e}"))
        })?;
        match self.see_dump_end(command)? {
            WaitStatus::Exited(_, 137) => Ok(()),
            other => Err(format!("the command of a dump that was killed ended with {other:?}")),
        }
    }

    /// Begins a dump whose tree keeps its memory until it is asked for at `port`, and waits until it can be; returns the
    /// tool's pid.
    ///
    /// # Errors
    /// When it ends at once.
    pub fn dump_keeping_memory(&mut self, images: &Path, port: &str, more: &[&str]) -> Result<i32, String> {
        let tool = self.tools.dump.clone();
        let pid = self.pid.to_string();
        let given = ["-t", pid.as_str(), "--lazy-pages", "--address", "127.0.0.1", "--port", port];
        let own = self.own_for_dump();
        let own = own.iter().map(String::as_str);
        let arguments: Vec<&str> = own.chain(given).chain(more.iter().copied()).collect();
        let (dump, log) = tool
            .start(&mut self.reaper, images, "dump", &arguments)
            .map_err(|e| format!("start {}: {e}", tool.path.display()))?;
        self.logs.push(log);
        let inventory = images.join("inventory.img");
        let start = Instant::now();
        while !inventory.exists() {
            if let Some(status) = self.reaper.ended(dump) {
                return Err(format!("the dump ended at once: {status:?}"));
            }
            if start.elapsed() > LIMIT {
                return Err(format!("the dump was not ready after {LIMIT:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(dump)
    }

    /// Waits for a dump that was begun; the status with which it ended.
    ///
    /// # Errors
    /// When it does not end.
    pub fn see_dump_end(&mut self, dump: i32) -> Result<WaitStatus, String> {
        self.reaper.wait(dump, LIMIT).ok_or_else(|| "the dump did not end".into())
    }

    /// Dumps, and sees that the whole tree is gone.
    ///
    /// # Errors
    /// When it could not be dumped, or is still there.
    pub fn dump_away(&mut self) -> Result<PathBuf, String> {
        self.dump_away_with(&[])
    }

    /// The same with more options.
    ///
    /// # Errors
    /// As [`Subject::dump_away`].
    pub fn dump_away_with(&mut self, more: &[&str]) -> Result<PathBuf, String> {
        let images = self.step("images")?;
        self.dump_away_to(&images, more)?;
        Ok(images)
    }

    /// The same into a folder that is there.
    ///
    /// # Errors
    /// As [`Subject::dump_away`].
    pub fn dump_away_to(&mut self, images: &Path, more: &[&str]) -> Result<(), String> {
        let ran = self.dump(images, more)?;
        if !ran.is_good() {
            return Err(format!("the dump failed: {:?}", ran.status));
        }
        self.see_killed("after the dump")
    }

    /// Starts a page server in the background.
    ///
    /// # Errors
    /// When it does not start.
    pub fn receive_pages(&mut self, images: &Path, more: &[&str]) -> Result<(), String> {
        let arguments = [&["-d"], more].concat();
        let ran = self.run(&self.tools.restore.clone(), images, "page-server", &arguments)?;
        if ran.is_good() { Ok(()) } else { Err(format!("the page server did not start: {:?}", ran.status)) }
    }

    /// Sees the root end by SIGKILL, and all others with it.
    ///
    /// # Errors
    /// When it ended otherwise, or somebody is left.
    pub fn see_killed(&mut self, when: &str) -> Result<(), String> {
        match self.reaper.wait(self.pid, Duration::from_secs(5)) {
            Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => self.see_nobody(when),
            other => Err(format!("{when} the program should be gone by SIGKILL, but: {other:?}")),
        }
    }

    /// Brings the tree back from `images`.
    ///
    /// # Errors
    /// When it could not be restored, or ended at once.
    pub fn restore(&mut self, images: &Path) -> Result<(), String> {
        let pidfile = images.with_extension("pid");
        let path = pidfile.to_string_lossy().into_owned();
        let ran = self.run(&self.tools.restore.clone(), images, "restore", &["-d", "--pidfile", &path])?;
        if !ran.is_good() {
            return Err(format!("the restore failed: {:?}", ran.status));
        }
        let written = read_lossy(&pidfile);
        if written.trim() != self.pid.to_string() {
            return Err(format!("the pidfile says {written:?}, the pid is {}", self.pid));
        }
        if !self.tools.restore.is_peer && !images.join("stats-restore").is_file() {
            return Err("the restore wrote no statistics".into());
        }
        self.still_there("right after the restore")
    }

    /// Sees that a restore from `images` fails with `words` in what it says, and that nobody is left.
    ///
    /// # Errors
    /// When it does not fail, or not like that.
    pub fn restore_refused(&mut self, images: &Path, words: &[&str]) -> Result<(), String> {
        let ran = self.run(&self.tools.restore.clone(), images, "restore", &["-d"])?;
        if ran.exit_code() != Some(1) {
            return Err(format!("the restore should be refused with status 1, but: {:?}", ran.status));
        }
        if !self.tools.restore.is_peer {
            says(&ran.said, words)?;
        }
        self.see_nobody("after the refused restore")
    }

    fn others(&self) -> Vec<i32> {
        others().into_iter().filter(|pid| !self.bystanders.contains(pid)).collect()
    }

    /// Kills the whole tree and whoever works for it, and sees it end.
    ///
    /// # Errors
    /// When somebody stays.
    pub fn kill(&mut self, when: &str) -> Result<(), String> {
        let start = Instant::now();
        // Once is not enough where a process makes others meanwhile.
        while start.elapsed() < Duration::from_secs(5) {
            let left = self.others();
            if left.is_empty() {
                break;
            }
            for pid in left {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            self.reaper.collect();
        }
        self.see_killed(when)
    }

    /// # Errors
    /// When somebody besides this process and bystanders stays in the namespace.
    pub fn see_nobody(&mut self, when: &str) -> Result<(), String> {
        let start = Instant::now();
        loop {
            self.reaper.forget();
            let left = self.others();
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(5) {
                let named: Vec<String> = left
                    .iter()
                    .map(|pid| {
                        format!("{pid} ({})", read_lossy(Path::new(&format!("/proc/{pid}/comm"))).trim())
                    })
                    .collect();
                return Err(format!("{when} there are still processes: {}", named.join(", ")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// # Errors
    /// When the root has ended.
    pub fn still_there(&mut self, when: &str) -> Result<(), String> {
        match self.reaper.ended(self.pid) {
            Some(status) => Err(format!("{when} the program should run on, but: {status:?}")),
            None => Ok(()),
        }
    }

    /// Waits until the program ends well, and nobody is left.
    ///
    /// # Errors
    /// When it ends otherwise, or not within `limit`.
    pub fn see_good_end(&mut self, limit: Duration) -> Result<(), String> {
        match self.reaper.wait(self.pid, limit) {
            Some(WaitStatus::Exited(_, 0)) => self.see_nobody("after the end"),
            Some(status) => Err(format!("the program ended with {status:?}")),
            None => Err(format!("the program did not end within {limit:?}")),
        }
    }
}
