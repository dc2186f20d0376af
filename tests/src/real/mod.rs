//! Programs that know nothing of us: started, dumped while they work, restored, and asked what they still have.
//!
//! Each has a module that says how it is started and how it is asked. What they share: they work without end,
//! count what they do, and are looked at through their own interface. A look waits for work done since the last
//! one, so that no trial depends on time.

mod bash;
mod bus;
mod bus_client;
mod counting;
mod database;
mod logging;
pub mod moving;
mod panes;
mod serving;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::case::{Mode, Moment};
use crate::subject::{PATH, Subject, Tools};
use crate::sys;

/// The longest that a program may take for what is asked of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What each program goes through.
pub const MODES: [Mode; 3] = [Mode::Plain, Mode::Twice, Mode::Snapshot];

/// One program, and how to ask it.
pub trait Program {
    fn name(&self) -> &'static str;

    /// The commands that have to be installed.
    fn needs(&self) -> &'static [&'static str];

    /// Given to both dump and restore.
    fn options(&self) -> &'static [&'static str] {
        &[]
    }

    /// How it is started, with what it reads put into its own directory, which is where it runs.
    ///
    /// # Errors
    /// When that cannot be prepared.
    fn command(&self, own: &Path) -> Result<Command, String>;

    /// Waits until the program has done more than `before` units of work, sees that nothing of it is lost, and
    /// answers how many it has done. Nothing of the question is left in the program afterwards.
    ///
    /// # Errors
    /// With what is wrong, or that it did not go on.
    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String>;

    /// What is outside of the tree gets its turn: before a dump, and before a restore.
    ///
    /// # Errors
    /// With what went wrong there.
    fn outside(&self, _subject: &mut Subject, _moment: Moment) -> Result<(), String> {
        Ok(())
    }

    /// Asks it to end with status 0. Most look for a file.
    ///
    /// # Errors
    /// When it cannot be asked.
    fn end(&self, subject: &mut Subject) -> Result<(), String> {
        put(&subject.own("stop"), "")
    }
}

/// Every program that is tried.
pub fn all() -> Vec<Box<dyn Program>> {
    vec![
        Box::new(bash::Bash),
        Box::new(counting::Python),
        Box::new(serving::Node),
        Box::new(counting::Java),
        Box::new(serving::Redis),
        Box::new(serving::Nginx),
        Box::new(logging::Logger::default()),
        Box::new(bus::Dbus),
        Box::new(bus_client::BusClient::default()),
        Box::new(panes::Tmux),
        Box::new(database::Postgres),
        Box::new(counting::Static { is_pie: false }),
        Box::new(counting::Static { is_pie: true }),
    ]
}

pub fn by_name(name: &str) -> Option<Box<dyn Program>> {
    all().into_iter().find(|program| program.name() == name)
}

/// Why `program` cannot be tried here, if so.
pub fn missing(program: &dyn Program) -> Option<String> {
    absent(program.needs())
}

/// Which of these commands are not installed, if some are not, as a reason to try nothing with them.
pub fn absent(commands: &[&str]) -> Option<String> {
    let missing: Vec<&str> = commands.iter().copied().filter(|command| find(command).is_none()).collect();
    (!missing.is_empty())
        .then(|| format!("not installed: {}; the packages are in tests/packages.txt", missing.join(", ")))
}

/// Where a command is installed.
fn find(command: &str) -> Option<PathBuf> {
    let folders = PATH.split(':').map(PathBuf::from).chain(elsewhere());
    folders.map(|folder| folder.join(command)).find(|path| path.is_file())
}

/// Where packages put programs that several versions have, the newest last.
fn elsewhere() -> Vec<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = versions.map(|version| version.path().join("bin")).collect();
    folders.sort_unstable();
    folders
}

/// A command by its name, found where the program itself finds commands.
///
/// # Errors
/// When it is not installed.
pub fn command(name: &str) -> Result<Command, String> {
    find(name).map(Command::new).ok_or_else(|| format!("{name} is not installed"))
}

fn put(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("write {}: {e}", path.display()))
}

/// Waits until `answer` has one, while the program lives.
fn wait_for<T>(
    subject: &mut Subject,
    what: &str,
    mut answer: impl FnMut() -> Result<Option<T>, String>,
) -> Result<T, String> {
    let start = Instant::now();
    loop {
        if let Some(answer) = answer()? {
            return Ok(answer);
        }
        subject.still_there(&format!("waiting for {what}"))?;
        if start.elapsed() > PATIENCE {
            return Err(format!("waited {PATIENCE:?} in vain for {what}"));
        }
        sys::nap();
    }
}

/// Everything that `mode` asks for.
///
/// # Errors
/// With the reason and the tails of the logs.
pub fn play(program: &dyn Program, mode: Mode, directory: &Path, tools: Tools) -> Result<(), String> {
    let own = directory.join("w");
    fs::create_dir(&own).map_err(|e| format!("make the program's directory: {e}"))?;
    let mut command = program.command(&own)?;
    let mut subject = Subject::begin(&mut command, directory, tools, program.options(), true)?;
    let played = match mode {
        Mode::Plain => there_and_back(program, &mut subject, 1),
        Mode::Twice => there_and_back(program, &mut subject, 2),
        Mode::Snapshot => snapshot(program, &mut subject),
        other => Err(format!("real programs have no mode {}", other.name())),
    };
    let result = played
        .and_then(|()| program.end(&mut subject))
        .and_then(|()| subject.see_good_end(PATIENCE))
        .map_err(|problem| subject.report(&problem));
    subject.reaper.clear();
    result
}

fn there_and_back(program: &dyn Program, subject: &mut Subject, times: usize) -> Result<(), String> {
    let mut done = program.look(subject, 0)?;
    for _ in 0..times {
        program.outside(subject, Moment::Ready)?;
        let images = subject.dump_away()?;
        program.outside(subject, Moment::Away)?;
        subject.restore(&images)?;
        done = program.look(subject, done)?;
    }
    Ok(())
}

/// The program runs on after the dump; then it is killed, and goes on from where the images saw it.
fn snapshot(program: &dyn Program, subject: &mut Subject) -> Result<(), String> {
    let done = program.look(subject, 0)?;
    // The files belong to the images: they are copied while the program stands still.
    let own = subject.directory().join("w");
    let copy = subject.directory().join("w-at-the-dump");
    let script =
        format!("[ $CRTOOLS_SCRIPT_ACTION != post-dump ] || cp -a {} {}", own.display(), copy.display());
    program.outside(subject, Moment::Ready)?;
    let images = subject.step("images")?;
    let ran = subject.dump(&images, &["--leave-running", "--action-script", &script])?;
    if !ran.is_good() {
        return Err(format!("the snapshot failed: {:?}", ran.status));
    }
    subject.still_there("after the snapshot")?;
    program.look(subject, done)?;
    subject.kill("after the kill")?;
    fs::remove_dir_all(&own).map_err(|e| format!("remove the program's files: {e}"))?;
    fs::rename(&copy, &own).map_err(|e| format!("put the copy of the files in place: {e}"))?;
    program.outside(subject, Moment::Away)?;
    subject.restore(&images)?;
    program.look(subject, done).map(drop)
}
