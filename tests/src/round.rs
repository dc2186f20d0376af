//! One trial: start the workload, run the tool around its checkpoint, let it judge, look for leftovers.
//!
//! Runs as the first process of fresh namespaces.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use crate::case::{Case, GO, Mode, READY};
use crate::fingerprint::Fingerprint;
use crate::reap::{Reaper, others, quiet};
use crate::tool::{LIMIT, Ran, Tool, read_lossy, tail};

/// The longest that a workload may take to get ready, or to check itself.
const PATIENCE: Duration = Duration::from_secs(40);

/// Two tools: most modes use the first for both halves.
#[derive(Debug, Clone)]
pub struct Tools {
    pub dump: Tool,
    pub restore: Tool,
}

/// A workload under way, and what belongs to it.
#[derive(Debug)]
pub struct Round {
    directory: PathBuf,
    reaper: Reaper,
    tools: Tools,
    options: Vec<&'static str>,
    pid: i32,
    steps: usize,
    /// Logs worth showing when something goes wrong.
    logs: Vec<PathBuf>,
}

/// Starts `program arguments` as a session leader (or not), its words going to `log`.
///
/// # Errors
/// When it cannot be started.
pub fn start(reaper: &mut Reaper, command: &mut Command, log: &Path, is_leader: bool) -> io::Result<i32> {
    quiet(command, log)?;
    command.env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LANG", "C.UTF-8");
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

impl Round {
    /// Starts the workload and waits until it is ready.
    ///
    /// # Errors
    /// With the reason as text for the person who reads the test's output.
    pub fn begin(
        program: &Path,
        name: &str,
        case: &Case,
        directory: &Path,
        tools: Tools,
    ) -> Result<Self, String> {
        let own = directory.join("w");
        fs::create_dir(&own).map_err(|e| format!("make the workload's directory: {e}"))?;
        let mut reaper = Reaper::default();
        let mut command = Command::new(program);
        command.arg(name).arg(&own).current_dir(&own);
        let pid = start(&mut reaper, &mut command, &own.join("log"), !case.shell_job)
            .map_err(|e| format!("start the workload: {e}"))?;
        let mut round = Self {
            directory: directory.to_path_buf(),
            reaper,
            tools,
            options: case.options.to_vec(),
            pid,
            steps: 0,
            logs: Vec::new(),
        };
        round.await_ready().map_err(|e| round.report(&e))?;
        Ok(round)
    }

    fn own(&self, name: &str) -> PathBuf {
        self.directory.join("w").join(name)
    }

    fn await_ready(&mut self) -> Result<(), String> {
        let ready = self.own(READY);
        let start = Instant::now();
        while !ready.exists() {
            if let Some(status) = self.reaper.ended(self.pid) {
                return Err(format!("the workload ended before its checkpoint: {status:?}"));
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("the workload was not ready after {PATIENCE:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// A text with the tails of all logs below it.
    fn report(&self, problem: &str) -> String {
        let mut text = format!("{problem}\n{}", tail("workload", &self.own("log"), 30));
        for log in self.logs.iter().rev().take(3) {
            text += &tail(&log.display().to_string(), log, 25);
        }
        text
    }

    fn step(&mut self, kind: &str) -> Result<PathBuf, String> {
        self.steps += 1;
        let images = self.directory.join(format!("{}-{kind}", self.steps));
        fs::create_dir(&images).map_err(|e| format!("make {}: {e}", images.display()))?;
        Ok(images)
    }

    fn run(&mut self, tool: &Tool, images: &Path, command: &str, more: &[&str]) -> Result<Ran, String> {
        let mut arguments: Vec<&str> = self.options.clone();
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

    fn dump(&mut self, images: &Path, more: &[&str]) -> Result<Ran, String> {
        let pid = self.pid.to_string();
        let mut arguments = vec!["-t", pid.as_str()];
        arguments.extend(more);
        self.run(&self.tools.dump.clone(), images, "dump", &arguments)
    }

    /// Dump, see that the whole tree is gone, restore, see that it looks as before.
    fn dump_and_restore(&mut self, is_restless: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.pid);
        let images = self.step("images")?;
        let ran = self.dump(&images, &[])?;
        if !ran.is_good() {
            return Err(format!("the dump failed: {:?}", ran.status));
        }
        match self.reaper.wait(self.pid, Duration::from_secs(5)) {
            Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => {}
            other => {
                return Err(format!("after the dump the program should be gone by SIGKILL, but: {other:?}"));
            }
        }
        self.see_nobody("after the dump")?;
        let pidfile = images.with_extension("pid");
        let path = pidfile.to_string_lossy().into_owned();
        let ran = self.run(&self.tools.restore.clone(), &images, "restore", &["-d", "--pidfile", &path])?;
        if !ran.is_good() {
            return Err(format!("the restore failed: {:?}", ran.status));
        }
        let written = read_lossy(&pidfile);
        if written.trim() != self.pid.to_string() {
            return Err(format!("the pidfile says {written:?}, the pid is {}", self.pid));
        }
        if let Some(status) = self.reaper.ended(self.pid) {
            return Err(format!("right after the restore the program ended: {status:?}"));
        }
        if is_restless {
            return Ok(());
        }
        self.compare(&before, "the dump and the restore")
    }

    /// Dumps the tree, sees that it is gone, and gives the images away.
    ///
    /// # Errors
    /// With the reason and the tails of the logs.
    pub fn dump_for_good(mut self) -> Result<PathBuf, String> {
        let images = self.step("images")?;
        let ran = self.dump(&images, &[])?;
        let result = match ran.is_good() {
            true => self.see_nobody("after the dump"),
            false => Err(format!("the dump failed: {:?}", ran.status)),
        };
        result.map(|()| images).map_err(|problem| self.report(&problem))
    }

    fn compare(&mut self, before: &Fingerprint, what: &str) -> Result<(), String> {
        // A tool that returns before every task runs again is given the time to finish.
        let start = Instant::now();
        loop {
            let differences = before.differences(&Fingerprint::of(self.pid));
            if differences.is_empty() {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(1) {
                let shown = differences.iter().take(40).cloned().collect::<Vec<_>>().join("\n");
                return Err(format!("{what} changed {} facts:\n{shown}", differences.len()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until whatever works for the tool has ended.
    fn see_only_the_tree(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let name = self.tools.dump.name();
        loop {
            self.reaper.collect();
            let is_tool = |pid: &i32| read_lossy(Path::new(&format!("/proc/{pid}/comm"))).trim() == name;
            if !others().iter().any(is_tool) {
                return Ok(());
            }
            if start.elapsed() > Duration::from_secs(5) {
                return Err("a part of the killed tool does not end".into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn see_nobody(&mut self, when: &str) -> Result<(), String> {
        let start = Instant::now();
        loop {
            self.reaper.forget();
            let left = others();
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

    fn snapshot(&mut self, is_restless: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.pid);
        let images = self.step("images")?;
        let ran = self.dump(&images, &["--leave-running"])?;
        if !ran.is_good() {
            return Err(format!("the snapshot failed: {:?}", ran.status));
        }
        self.still_there("after the snapshot")?;
        if is_restless { Ok(()) } else { self.compare(&before, "the snapshot") }
    }

    fn still_there(&mut self, when: &str) -> Result<(), String> {
        match self.reaper.ended(self.pid) {
            Some(status) => Err(format!("{when} the program should run on, but: {status:?}")),
            None => Ok(()),
        }
    }

    /// Three dumps that cannot succeed: no space for the second image file or so, none for much of the rest,
    /// and a script that says no when everything is written.
    fn failed_dumps(&mut self, is_restless: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.pid);
        let script = self.directory.join("refuse.sh");
        fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n")
            .and_then(|()| fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)))
            .map_err(|e| format!("write a script: {e}"))?;
        let script = script.to_string_lossy().into_owned();
        // The number of inodes includes the directory itself.
        for inodes in [Some(4), Some(9), None] {
            let images = self.step("images")?;
            let ran = match inodes {
                Some(count) => {
                    let options = format!("size=64k,nr_inodes={count}");
                    mount(Some("tmpfs"), &images, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
                        .map_err(|e| format!("mount a small tmpfs: {e}"))?;
                    self.dump(&images, &[])?
                }
                None => self.dump(&images, &["--action-script", &script])?,
            };
            if ran.is_good() {
                return Err(format!("a dump that cannot succeed ({inodes:?} inodes) did"));
            }
            let has_inventory = images.join("inventory.img").metadata().is_ok_and(|data| data.len() > 0);
            if inodes.is_some() {
                umount2(&images, MntFlags::MNT_DETACH).map_err(|e| format!("unmount: {e}"))?;
            }
            if !matches!(ran.status, Some(WaitStatus::Exited(..))) {
                return Err(format!("a dump without space ended with {:?}", ran.status));
            }
            if inodes.is_some() && has_inventory && !self.tools.dump.is_peer {
                return Err("the folder of a failed dump looks whole: it has an inventory".into());
            }
            self.still_there("after a failed dump")?;
            if !is_restless {
                self.compare(&before, "a failed dump")?;
            }
        }
        Ok(())
    }

    /// Dumps that are killed, at moments spread over the time that a dump takes.
    fn killed_dumps(&mut self) -> Result<(), String> {
        const KILLS: u32 = 40;
        let begin = Instant::now();
        self.snapshot(true)?;
        let whole = begin.elapsed();
        let before = Fingerprint::of(self.pid);
        for kill in 0..KILLS {
            let images = self.step("images")?;
            let tool = self.tools.dump.clone();
            let pid = self.pid.to_string();
            let arguments = ["-t", pid.as_str(), "--leave-running"];
            let delay = whole * kill / KILLS;
            let ran = tool
                .run_killed(&mut self.reaper, &images, "dump", &arguments, delay)
                .map_err(|e| format!("start {}: {e}", tool.path.display()))?;
            self.logs.push(ran.log);
            self.see_only_the_tree()?;
            self.still_there(&format!("after a dump that was killed after {delay:?}"))?;
        }
        self.compare(&before, "killed dumps")
    }

    fn refused(&mut self, words: &[&str]) -> Result<(), String> {
        let before = Fingerprint::of(self.pid);
        let images = self.step("images")?;
        let ran = self.dump(&images, &[])?;
        if ran.exit_code() != Some(1) {
            return Err(format!("the dump should be refused with status 1, but: {:?}", ran.status));
        }
        if !self.tools.dump.is_peer {
            let said = ran.said.to_lowercase();
            let missing: Vec<&&str> =
                words.iter().filter(|word| !said.contains(&word.to_lowercase())).collect();
            if !missing.is_empty() {
                return Err(format!("the refusal does not say {missing:?}:\n{}", ran.said));
            }
        }
        self.still_there("after the refusal")?;
        self.compare(&before, "the refused dump")
    }

    /// Lets the workload check itself, and sees that nothing of it or of the tool is left.
    fn finish(&mut self) -> Result<(), String> {
        fs::File::create(self.own(GO)).map_err(|e| format!("say go: {e}"))?;
        match self.reaper.wait(self.pid, PATIENCE) {
            Some(WaitStatus::Exited(_, 0)) => self.see_nobody("after the end"),
            Some(status) => Err(format!("the workload ended with {status:?}")),
            None => Err(format!("the workload did not end within {PATIENCE:?}")),
        }
    }

    /// Everything that `mode` asks for.
    ///
    /// # Errors
    /// With the reason and the tails of the logs.
    pub fn play(&mut self, case: &Case, mode: Mode) -> Result<(), String> {
        let is_restless = case.restless;
        let played = match mode {
            Mode::Plain | Mode::ToPeer | Mode::FromPeer => self.dump_and_restore(is_restless),
            Mode::Twice => {
                self.dump_and_restore(is_restless).and_then(|()| self.dump_and_restore(is_restless))
            }
            Mode::Snapshot => self.snapshot(is_restless),
            Mode::FailedDump => self.failed_dumps(is_restless),
            Mode::KilledDump => self.killed_dumps(),
            Mode::Refused => self.refused(case.refused),
        };
        let result = played.and_then(|()| self.finish());
        let result = result.map_err(|problem| self.report(&problem));
        self.reaper.clear();
        result
    }
}
