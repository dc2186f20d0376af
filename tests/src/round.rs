//! One trial: start the workload, run the tool around its checkpoint, let it judge, look for leftovers.
//!
//! Runs as the first process of fresh namespaces.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use image::pagemap::Pagemap;
use image::{Dir, MmEntry, kind};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::WaitStatus;

use crate::case::{Case, GO, LATE, Mode, Moment, Outside, READY};
use crate::fingerprint::Fingerprint;
use crate::namespace;
use crate::reap::Reaper;
use crate::subject::{Subject, Tools, says};

/// The longest that a workload may take to get ready, or to check itself.
const PATIENCE: Duration = Duration::from_secs(40);

/// A workload under way.
#[derive(Debug)]
pub struct Round {
    pub subject: Subject,
    outside: Outside,
    act: Option<fn(&mut Outside, Moment)>,
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
        let mut command = Command::new(program);
        command.arg(name).arg(directory.join("w"));
        let mut outside = Outside { directory: directory.join("w"), ..Outside::default() };
        fs::create_dir(&outside.directory).map_err(|e| format!("make the program's directory: {e}"))?;
        if let Some(act) = case.outside {
            act(&mut outside, Moment::Begin);
        }
        let subject = Subject::begin(&mut command, directory, tools, case.options, !case.shell_job)?;
        let mut round = Self { subject, outside, act: case.outside };
        round.await_ready().map_err(|e| round.subject.report(&e))?;
        round.outside.pid = round.subject.pid;
        round.let_outside_act(Moment::Ready);
        Ok(round)
    }

    fn let_outside_act(&mut self, moment: Moment) {
        let Some(act) = self.act else { return };
        act(&mut self.outside, moment);
        self.subject.more_for_dump.clone_from(&self.outside.dump);
        self.subject.more_for_restore.clone_from(&self.outside.restore);
        self.subject.bystanders.clone_from(&self.outside.bystanders);
        self.subject.tools.dump.is_filtered = self.outside.is_filtered;
        self.subject.tools.restore.is_filtered = self.outside.is_filtered;
    }

    fn await_ready(&mut self) -> Result<(), String> {
        let ready = self.subject.own(READY);
        let start = Instant::now();
        while !ready.exists() {
            if let Some(status) = self.subject.reaper.ended(self.subject.pid) {
                return Err(format!("the workload ended before its checkpoint: {status:?}"));
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("the workload was not ready after {PATIENCE:?}"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Dump, see that the whole tree is gone, restore, see that it looks as before.
    fn dump_and_restore(&mut self, is_restless: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let images = self.subject.dump_away()?;
        self.let_outside_act(Moment::Away);
        self.subject.restore(&images)?;
        self.let_outside_act(Moment::Back);
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
        self.subject.dump_away().map_err(|problem| self.subject.report(&problem))
    }

    fn compare(&mut self, before: &Fingerprint, what: &str) -> Result<(), String> {
        // A tool that returns before every task runs again is given the time to finish.
        let start = Instant::now();
        loop {
            let differences = before.differences(&Fingerprint::of(self.subject.pid));
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

    /// Memory alone, then the dump, each to a server of its own; with more options for servers and dumps.
    fn over_a_page_server(
        &mut self,
        is_restless: bool,
        server: &[&str],
        dump: &[&str],
    ) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let (first, second) = (self.subject.step("received")?, self.subject.step("received")?);
        let (memory, images) = (self.subject.step("memory")?, self.subject.step("images")?);
        self.subject.receive_pages(&first, &[&["--port", "4001"], server].concat())?;
        let to = [dump, &["--page-server", "--address", "127.0.0.1", "--port"]].concat();
        self.subject.save_memory(&memory, &[&to[..], &["4001"]].concat())?;
        let name = |path: &Path| format!("../{}", path.file_name().unwrap_or_default().to_string_lossy());
        let of_first = name(&first);
        let second_server = [&["--port", "4002", "--prev-images-dir", &of_first], server].concat();
        self.subject.receive_pages(&second, &second_server)?;
        let parent = name(&memory);
        let more = [&to[..], &["4002", "--prev-images-dir", &parent]].concat();
        self.subject.dump_away_to(&images, &more)?;
        for entry in fs::read_dir(&images).map_err(|e| format!("list the images: {e}"))? {
            let entry = entry.map_err(|e| format!("list the images: {e}"))?;
            let name = entry.file_name();
            if name.to_string_lossy().ends_with(".img") {
                fs::copy(entry.path(), second.join(name)).map_err(|e| format!("copy an image: {e}"))?;
            }
        }
        if server != dump {
            see_packed(&second)?;
        }
        self.let_outside_act(Moment::Away);
        self.subject.restore(&second)?;
        self.let_outside_act(Moment::Back);
        if is_restless { Ok(()) } else { self.compare(&before, "the dump and the restore") }
    }

    /// The tree is restored elsewhere while the dump has its memory, and checks itself there; only then is it gone here.
    fn post_copy(&mut self, is_restless: bool) -> Result<(), String> {
        const PORT: &str = "4003";
        let before = Fingerprint::of(self.subject.pid);
        let images = self.subject.step("images")?;
        let dump = self.subject.dump_keeping_memory(&images, PORT, &[])?;
        let problem = self.subject.directory().join("problem");
        let beside = namespace::beside(|| {
            self.subject.reaper = Reaper::default();
            let there = ["--lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", PORT];
            self.subject.more_for_every_restore.extend(there);
            let restored = self.subject.restore(&images).and_then(|()| match is_restless {
                true => Ok(()),
                false => self.compare(&before, "the move"),
            });
            match restored.and_then(|()| self.finish()) {
                Ok(()) => 0,
                Err(why) => {
                    let logged = fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default();
                    let report = self.subject.report(&format!("on the other side: {why}\n{logged}"));
                    fs::write(&problem, report).expect("write down what was wrong");
                    1
                }
            }
        });
        let beside = beside.map_err(|e| format!("make the other side: {e}"))?;
        match self.subject.reaper.wait(beside, PATIENCE * 2) {
            Some(WaitStatus::Exited(_, 0)) => {}
            other => {
                let problem = fs::read_to_string(&problem).unwrap_or_default();
                return Err(format!("the other side ended with {other:?}: {problem}"));
            }
        }
        match self.subject.see_dump_end(dump)? {
            WaitStatus::Exited(_, 0) => {}
            other => return Err(format!("the dump that kept the memory ended with {other:?}")),
        }
        let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        let handed = log.lines().find_map(|line| {
            let (_, rest) = line.split_once("handed out ")?;
            rest.split(' ').next()?.parse::<u64>().ok()
        });
        // Where all share, nothing is left to stay.
        let is_shared = log.contains("stored once that relatives have in common");
        if handed.is_none_or(|pages| pages == 0 && !is_shared) {
            return Err("the dump handed out no page".into());
        }
        self.subject.see_killed("after the move")
    }

    /// Memory alone, then the dump, which is restored and loses its pages; the program checks itself before that is seen.
    fn freed(&mut self, is_restless: bool, is_lazy: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let memory = self.subject.step("memory")?;
        self.subject.save_memory(&memory, &[])?;
        let parent = format!("../{}", memory.file_name().unwrap_or_default().to_string_lossy());
        let images = self.subject.dump_away_with(&["--prev-images-dir", &parent])?;
        self.let_outside_act(Moment::Away);
        let lazy: &[&str] = if is_lazy { &["--lazy-pages"] } else { &[] };
        self.subject.more_for_every_restore = [&["--auto-dedup"], lazy].concat();
        self.subject.restore(&images)?;
        self.let_outside_act(Moment::Back);
        if !is_restless {
            self.compare(&before, "the dump and the restore")?;
        }
        self.finish()?;
        for folder in [&images, &memory] {
            if folder.join("inventory.img").exists() {
                return Err(format!("{} looks whole without its pages", folder.display()));
            }
        }
        let mut length = 0;
        for entry in fs::read_dir(&images).map_err(|e| format!("list the images: {e}"))?.flatten() {
            let data = entry.metadata().map_err(|e| format!("measure an image: {e}"))?;
            if entry.file_name().to_string_lossy().starts_with("pages-") {
                length += data.len();
                if data.blocks() > 0 {
                    return Err(format!("{} still has {} blocks", entry.path().display(), data.blocks()));
                }
            }
        }
        if length == 0 { Err("there were no pages".into()) } else { Ok(()) }
    }

    /// Memory alone, several times, each time what has changed; a snapshot; and the dump proper. How often is
    /// `CRTOOLS_TEST_ROUNDS`, for a long test.
    fn incremental(&mut self, is_restless: bool) -> Result<(), String> {
        let rounds = std::env::var("CRTOOLS_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
        let before = Fingerprint::of(self.subject.pid);
        let mut last: Option<PathBuf> = None;
        let name = |images: &Path| {
            let name = images.file_name().unwrap_or_default().to_string_lossy().into_owned();
            ["--prev-images-dir".to_owned(), format!("../{name}")]
        };
        for round in 0..rounds.unwrap_or(3) {
            let images = self.subject.step("memory")?;
            let parent = last.as_deref().map(name).unwrap_or_default();
            let given: Vec<&str> =
                parent.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
            // Every second one without copies: the program stands still meanwhile. What it has anew is freed in the
            // folder before, where a restore must not look for it.
            let more = if round % 2 == 1 { &["--no-copy-on-write", "--auto-dedup"][..] } else { &[] };
            self.subject.save_memory(&images, &[&given, more].concat())?;
            last = Some(images);
        }
        if !is_restless {
            self.compare(&before, "saving its memory")?;
        }
        // One that knows nothing of those before.
        let images = self.subject.step("images")?;
        let ran = self.subject.dump(&images, &["--leave-running", "--no-copy-on-write"])?;
        if !ran.is_good() {
            return Err(format!("a snapshot of its own failed: {:?}", ran.status));
        }
        let images = self.subject.step("images")?;
        let parent = last.as_deref().map(name).unwrap_or_default();
        let given = [&parent[0], &parent[1], "--leave-running", "--track-mem", "--pre-copy"];
        let ran = self.subject.dump(&images, &given)?;
        if !ran.is_good() {
            return Err(format!("the snapshot failed: {:?}", ran.status));
        }
        let parent = name(&images);
        let images = self.subject.dump_away_with(&[&parent[0], &parent[1], "--auto-dedup"])?;
        self.let_outside_act(Moment::Away);
        self.subject.restore(&images)?;
        self.let_outside_act(Moment::Back);
        if is_restless { Ok(()) } else { self.compare(&before, "the dump and the restore") }
    }

    /// Memory that is saved while the program runs, of a snapshot and of the dump proper.
    fn ahead(&mut self, is_restless: bool) -> Result<(), String> {
        self.snapshot(is_restless, &["--pre-copy"])?;
        let before = Fingerprint::of(self.subject.pid);
        let images = self.subject.dump_away_with(&["--pre-copy"])?;
        let log = fs::read_to_string(images.join("dump.log")).unwrap_or_default();
        if !log.contains("memory is saved ahead") && !log.contains("saved memory ahead") {
            return Err("the dump did not even try to save memory ahead".into());
        }
        self.let_outside_act(Moment::Away);
        self.subject.restore(&images)?;
        self.let_outside_act(Moment::Back);
        if is_restless { Ok(()) } else { self.compare(&before, "the dump and the restore") }
    }

    fn snapshot(&mut self, is_restless: bool, more: &[&str]) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let images = self.subject.step("images")?;
        let ran = self.subject.dump(&images, &[&["--leave-running"], more].concat())?;
        if !ran.is_good() {
            return Err(format!("the snapshot failed: {:?}", ran.status));
        }
        self.subject.still_there("after the snapshot")?;
        if is_restless { Ok(()) } else { self.compare(&before, "the snapshot") }
    }

    /// Three dumps that cannot succeed: no space for the second image file or so, none for much of the rest,
    /// and a script that says no when everything is written.
    fn failed_dumps(&mut self, is_restless: bool) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let script = self.subject.directory().join("refuse.sh");
        fs::write(&script, "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ]\n")
            .and_then(|()| fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)))
            .map_err(|e| format!("write a script: {e}"))?;
        let script = script.to_string_lossy().into_owned();
        // The number of inodes includes the directory itself.
        for inodes in [Some(4), Some(9), None] {
            let images = self.subject.step("images")?;
            let ran = match inodes {
                Some(count) => {
                    let options = format!("size=64k,nr_inodes={count}");
                    mount(Some("tmpfs"), &images, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
                        .map_err(|e| format!("mount a small tmpfs: {e}"))?;
                    self.subject.dump(&images, &[])?
                }
                None => self.subject.dump(&images, &["--action-script", &script])?,
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
            if inodes.is_some() && has_inventory && !self.subject.tools.dump.is_peer {
                return Err("the folder of a failed dump looks whole: it has an inventory".into());
            }
            self.subject.still_there("after a failed dump")?;
            if !is_restless {
                self.compare(&before, "a failed dump")?;
            }
        }
        Ok(())
    }

    /// Dumps that are killed, at moments spread over the time that a dump takes.
    fn killed_dumps(&mut self, is_restless: bool) -> Result<(), String> {
        const KILLS: u32 = 40;
        let begin = Instant::now();
        self.snapshot(true, &["--pre-copy"])?;
        let whole = begin.elapsed();
        let before = Fingerprint::of(self.subject.pid);
        for kill in 0..KILLS {
            let delay = whole * kill / KILLS;
            let ahead: &[&str] = if kill % 2 == 1 { &["--pre-copy"] } else { &[] };
            self.subject.dump_killed(delay, ahead)?;
            self.subject.still_there(&format!("after a dump that was killed after {delay:?}"))?;
        }
        if is_restless { Ok(()) } else { self.compare(&before, "killed dumps") }
    }

    /// A dump that is killed when it has made who moves the pages: only its command can take that away.
    fn killed_worker(&mut self, is_restless: bool) -> Result<(), String> {
        let script = self.subject.directory().join("wait.sh");
        let gate = self.subject.directory().join("gate");
        let text = format!(
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != pre-dump ] || until [ -e {} ]; do sleep 0.01; done\n",
            gate.display()
        );
        fs::write(&script, text)
            .and_then(|()| fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)))
            .map_err(|e| format!("write a script: {e}"))?;
        let script = script.to_string_lossy().into_owned();
        let before = Fingerprint::of(self.subject.pid);
        for more in [&["--leave-running", "--copy-on-write"][..], &["--no-pre-copy"]] {
            let _ = fs::remove_file(&gate);
            self.subject.dump_killed_at_its_copies(&[more, &["--action-script", &script]].concat(), &gate)?;
            self.subject.still_there("after a dump that was killed")?;
            if !is_restless {
                self.compare(&before, "a dump that was killed")?;
            }
        }
        Ok(())
    }

    /// The last byte of a vdso is behind its code: with another one it is that of another kernel, and works.
    fn restore_with_a_foreign_vdso(&mut self) -> Result<(), String> {
        let images = self.subject.dump_away()?;
        change_vdso(&images, self.subject.pid)?;
        self.subject.restore(&images)
    }

    fn refused_restore(&mut self, words: &[&str]) -> Result<(), String> {
        let images = self.subject.dump_away()?;
        self.let_outside_act(Moment::Away);
        self.subject.restore_refused(&images, words)?;
        self.let_outside_act(Moment::Mend);
        self.subject.restore(&images)
    }

    fn refused(&mut self, words: &[&str]) -> Result<(), String> {
        let before = Fingerprint::of(self.subject.pid);
        let images = self.subject.step("images")?;
        let ran = self.subject.dump(&images, &[])?;
        if ran.exit_code() != Some(1) {
            return Err(format!("the dump should be refused with status 1, but: {:?}", ran.status));
        }
        if !self.subject.tools.dump.is_peer {
            says(&ran.said, words)?;
        }
        self.subject.still_there("after the refusal")?;
        self.compare(&before, "the refused dump")
    }

    /// Lets the workload check itself, and sees that nothing of it or of the tool is left.
    fn finish(&mut self) -> Result<(), String> {
        fs::File::create(self.subject.own(GO)).map_err(|e| format!("say go: {e}"))?;
        self.subject.see_good_end(PATIENCE)?;
        self.let_outside_act(Moment::End);
        Ok(())
    }

    /// Everything that `mode` asks for.
    ///
    /// # Errors
    /// With the reason and the tails of the logs.
    pub fn play(&mut self, case: &Case, mode: Mode) -> Result<(), String> {
        let is_restless = case.restless;
        if matches!(mode, Mode::Lazy | Mode::PackedServer | Mode::PostCopy | Mode::Freed) {
            std::fs::create_dir(self.subject.directory().join(LATE))
                .map_err(|e| format!("make a marker: {e}"))?;
        }
        let played = match mode {
            Mode::Plain | Mode::FromPeer => self.dump_and_restore(is_restless),
            Mode::ToPeer => {
                // It knows no pages that are stored with another process.
                self.subject.more_for_every_dump.push("--no-share-pages");
                self.dump_and_restore(is_restless)
            }
            Mode::Twice => {
                self.dump_and_restore(is_restless).and_then(|()| self.dump_and_restore(is_restless))
            }
            Mode::Snapshot => self.snapshot(is_restless, &[]),
            Mode::Ahead => self.ahead(is_restless),
            Mode::Compressed => {
                // The name of the workload says which way, so that both are tried.
                let how = if case.name.len().is_multiple_of(2) { "--compress" } else { "--compress=zstd" };
                self.subject.more_for_every_dump.push(how);
                self.dump_and_restore(is_restless)
            }
            Mode::PageServer => self.over_a_page_server(is_restless, &[], &[]),
            Mode::PackedServer => {
                // Three ways, of which the name of the workload says one.
                let (server, dump): (&[&str], &[&str]) = match case.name.len() % 3 {
                    0 => (&[], &["--compress=lz4"]),
                    1 => (&[], &["--compress=zstd"]),
                    _ => (&["--compress"], &[]),
                };
                self.subject.more_for_every_restore.push("--lazy-pages");
                self.over_a_page_server(is_restless, server, dump)
            }
            Mode::Lazy => {
                self.subject.more_for_every_restore.push("--lazy-pages");
                self.dump_and_restore(is_restless)
            }
            Mode::Incremental => self.incremental(is_restless),
            Mode::FailedDump => self.failed_dumps(is_restless),
            Mode::KilledDump => self.killed_dumps(is_restless),
            Mode::KilledWorker => self.killed_worker(is_restless),
            Mode::ForeignVdso => self.restore_with_a_foreign_vdso(),
            // What follows is done on the other side.
            Mode::PostCopy => {
                let result = self.post_copy(is_restless).map_err(|problem| self.subject.report(&problem));
                self.subject.reaper.clear();
                return result;
            }
            Mode::Freed => {
                let is_lazy = case.name.len().is_multiple_of(2);
                let result =
                    self.freed(is_restless, is_lazy).map_err(|problem| self.subject.report(&problem));
                self.subject.reaper.clear();
                return result;
            }
            Mode::Refused => self.refused(case.refused),
            Mode::RefusedRestore => self.refused_restore(case.restore_refused),
        };
        let result = played.and_then(|()| self.finish());
        let result = result.map_err(|problem| self.subject.report(&problem));
        self.subject.reaper.clear();
        result
    }
}

/// Sees that pages came, and came compressed.
fn see_packed(images: &Path) -> Result<(), String> {
    let entries = fs::read_dir(images).map_err(|e| format!("list the images: {e}"))?;
    let pages: Vec<(String, u64)> = entries
        .flatten()
        .map(|entry| {
            let length = entry.metadata().map_or(0, |data| data.len());
            (entry.file_name().to_string_lossy().into_owned(), length)
        })
        .filter(|(name, length)| name.starts_with("pages-") && *length > 0)
        .collect();
    match pages.iter().all(|(name, _)| name.ends_with(".img.z")) && !pages.is_empty() {
        true => Ok(()),
        false => Err(format!("not compressed: {pages:?}")),
    }
}

fn change_vdso(images: &Path, pid: i32) -> Result<(), String> {
    let dir = Dir::open(images).map_err(|e| e.to_string())?;
    let mm: MmEntry = dir.read_one(kind::MM, &format!("mm-{pid}.img")).map_err(|e| e.to_string())?;
    let vdso = mm.vmas.iter().find(|vma| vma.status & image::vma::VDSO != 0).ok_or("there is no vdso")?;
    let name = format!("pagemap-{pid}.img");
    let bytes = dir.need(&name).map_err(|e| e.to_string())?;
    let pagemap = Pagemap::parse(&name, &bytes, |_| Ok(u64::MAX)).map_err(|e| e.to_string())?;
    let run = pagemap.runs.iter().find(|run| run.range.contains(&(vdso.end - 1)));
    let run = run.ok_or("the vdso has no pages")?;
    let pages = images.join(format!("pages-{}.img", pagemap.pages_id));
    let pages = fs::OpenOptions::new().write(true).open(pages).map_err(|e| format!("open the pages: {e}"))?;
    let at = run.offset + (vdso.end - 1 - run.range.start);
    pages.write_all_at(&[0x5a], at).map_err(|e| format!("change the vdso: {e}"))
}
