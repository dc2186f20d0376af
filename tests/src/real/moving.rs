//! redis-server, moved to another network while a client writes: its memory goes over in rounds, and the last of it with the
//! dump. No write that was acknowledged is lost.
//!
//! A connection cannot be moved yet, so the client opens one for each batch, and pauses at the last dump. How long nobody
//! could write is printed.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::unistd::ForkResult;

use super::serving::{ask, await_silence};
use super::{PATIENCE, absent, command, wait_for};
use crate::namespace::far;
use crate::reap::Reaper;
use crate::runner::NOTE;
use crate::subject::{Subject, Tools};
use crate::sys;

const HERE: &str = "127.0.0.1:6379";
const THERE: &str = "10.98.0.2:6379";
/// Of the far network, for the page servers.
const FAR: &str = "10.98.0.2";
/// Snapshots of memory before the dump.
const ROUNDS: usize = 3;
/// Keys that are there before, and writes of one connection.
const KEYS: &str = "400000";
const BATCH: u64 = 200;
/// Writes between two rounds.
const WORK: u64 = 5000;

/// Why it cannot be tried here, if so.
pub fn missing() -> Option<String> {
    absent(&["redis-server", "redis-cli", "ip"])
}

/// The folder in which both sides and the client tell each other how far they are.
#[derive(Clone)]
struct Marks(PathBuf);

impl Marks {
    fn set(&self, name: &str, text: &str) -> Result<(), String> {
        let (new, path) = (self.0.join(format!("{name}.new")), self.0.join(name));
        fs::write(&new, text).and_then(|()| fs::rename(&new, path)).map_err(|e| format!("mark {name}: {e}"))
    }

    fn is_set(&self, name: &str) -> bool {
        self.0.join(name).exists()
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.0.join(name)).unwrap_or_default()
    }

    fn wait(&self, name: &str) -> Result<String, String> {
        let start = Instant::now();
        while !self.is_set(name) {
            if self.is_set("failed") {
                return Err(self.text("failed"));
            }
            if start.elapsed() > PATIENCE {
                return Err(format!("waited {PATIENCE:?} in vain for {name}"));
            }
            sys::nap();
        }
        Ok(self.text(name))
    }

    /// What came of `what`, as an exit status; a failure is for all to see.
    fn status(&self, what: &str, result: Result<(), String>) -> i32 {
        result.map_or_else(
            |why| {
                let _ = self.set("failed", &format!("{what}: {why}"));
                1
            },
            |()| 0,
        )
    }
}

/// Sends commands over a connection of their own, and takes as many answers of one line.
fn talk(address: &str, commands: &str, answers: u64) -> std::io::Result<Vec<String>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(commands.as_bytes())?;
    let (mut said, mut buffer) = (Vec::new(), [0; 1 << 16]);
    while (said.iter().filter(|byte| **byte == b'\n').count() as u64) < answers {
        match stream.read(&mut buffer)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            count => said.extend_from_slice(&buffer[..count]),
        }
    }
    Ok(String::from_utf8_lossy(&said).lines().map(str::to_owned).collect())
}

/// Writes until it is told to stop, then reads all that was acknowledged.
fn write_all_the_time(marks: &Marks) -> Result<(), String> {
    let (mut written, mut address) = (0, HERE);
    let mut away: Option<Instant> = None;
    while !marks.is_set("stop") {
        if away.is_none() && address == HERE && marks.is_set("pause") {
            away = Some(Instant::now());
            marks.set("paused", &written.to_string())?;
            marks.wait("moved")?;
            address = THERE;
        }
        let numbers = written..written + BATCH;
        let commands: String = numbers.map(|number| format!("SET written:{number} {number}\r\n")).collect();
        let answers = match talk(address, &commands, BATCH) {
            Ok(answers) => answers,
            // It is not there yet.
            Err(_) if away.is_some_and(|away| away.elapsed() < PATIENCE) => {
                sys::nap();
                continue;
            }
            Err(error) => return Err(format!("after {written} writes: {error}")),
        };
        if answers.iter().any(|answer| answer != "+OK") {
            return Err(format!("a write was answered with {answers:?}"));
        }
        written += BATCH;
        marks.set("written", &written.to_string())?;
        if let Some(away) = away.take() {
            marks.set("downtime", &away.elapsed().as_millis().to_string())?;
        }
    }
    for from in (0..written).step_by(1000) {
        let numbers = from..written.min(from + 1000);
        let commands: String = numbers.clone().map(|number| format!("GET written:{number}\r\n")).collect();
        let wanted = numbers.clone().flat_map(|number| {
            let text = number.to_string();
            [format!("${}", text.len()), text]
        });
        let count = 2 * (numbers.end - numbers.start);
        let found = talk(address, &commands, count).map_err(|e| format!("read from {from} on: {e}"))?;
        if !wanted.eq(found.iter().cloned()) {
            return Err(format!("of the writes from {from} on some are lost: {found:?}"));
        }
    }
    marks.set("checked", &written.to_string())
}

fn ip(words: &str) -> Result<(), String> {
    let ran = command("ip")?.args(words.split(' ')).output().map_err(|e| format!("run ip: {e}"))?;
    match ran.status.success() {
        true => Ok(()),
        false => Err(format!("ip {words}: {}", String::from_utf8_lossy(&ran.stderr))),
    }
}

/// The far side: page servers for each round, the restore, and the end.
fn receive(subject: &mut Subject, folders: &[PathBuf], marks: &Marks) -> Result<(), String> {
    subject.reaper = Reaper::default();
    marks.set("far", "")?;
    marks.wait("linked")?;
    ip(&format!("addr add {FAR}/24 dev far"))?;
    ip("link set far up")?;
    for (round, folder) in folders.iter().enumerate() {
        let port = (4001 + round).to_string();
        let before =
            format!("../{}", round.checked_sub(1).map_or(String::new(), |before| name(&folders[before])));
        let mut words = vec!["--port", &port];
        if round > 0 {
            words.extend(["--prev-images-dir", &before]);
        }
        subject.receive_pages(folder, &words)?;
    }
    marks.set("ready", "")?;
    marks.wait("dumped")?;
    let last = folders.last().ok_or("no folder")?;
    subject.restore(last)?;
    marks.set("moved", "")?;
    marks.wait("checked")?;
    ask("redis-cli", &["shutdown", "nosave"])?;
    subject.see_good_end(PATIENCE)
}

fn name(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Moves the server.
///
/// # Errors
/// With the reason and the tails of the logs.
pub fn play(directory: &Path, tools: Tools) -> Result<(), String> {
    let mut redis = command("redis-server")?;
    redis.args([
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--enable-debug-command",
        "yes",
    ]);
    let mut subject = Subject::begin(&mut redis, directory, tools, &[], true)?;
    let result = run(&mut subject).map_err(|problem| subject.report(&problem));
    subject.reaper.clear();
    result
}

fn run(subject: &mut Subject) -> Result<(), String> {
    wait_for(subject, "an answer", || Ok(ask("redis-cli", &["ping"])?.filter(|said| said == "PONG")))?;
    ask("redis-cli", &["debug", "populate", KEYS, "key"])?;
    let marks = Marks(subject.step("marks")?);
    let folders = (0..=ROUNDS).map(|_| subject.step("received")).collect::<Result<Vec<_>, _>>()?;
    // As many processes as it takes, each made while this one has one thread.
    let there = far(|| {
        let result = receive(subject, &folders, &marks).map_err(|problem| subject.report(&problem));
        marks.status("on the far side", result)
    })
    .map_err(|e| format!("make the far side: {e}"))?;
    marks.wait("far")?;
    ip(&format!("link add near type veth peer name far netns {there}"))?;
    ip("addr add 10.98.0.1/24 dev near")?;
    ip("link set near up")?;
    marks.set("linked", "")?;
    marks.wait("ready")?;
    // SAFETY: this process has one thread, and the child does not return from here.
    let client = match unsafe { nix::unistd::fork() }.map_err(|e| format!("make a client: {e}"))? {
        ForkResult::Parent { child } => child.as_raw(),
        ForkResult::Child => {
            let result = write_all_the_time(&marks);
            sys::exit_now(marks.status("the client", result))
        }
    };
    let written = |marks: &Marks| marks.text("written").parse::<u64>().unwrap_or(0);
    let mut before = 0;
    let mut last: Option<PathBuf> = None;
    let name_of = |last: &Option<PathBuf>| last.as_deref().map(|folder| format!("../{}", name(folder)));
    for round in 0..ROUNDS {
        wait_for(subject, "writes", || {
            if marks.is_set("failed") {
                return Err(marks.text("failed"));
            }
            Ok((written(&marks) >= before + WORK).then_some(()))
        })?;
        before = written(&marks);
        let images = subject.step("memory")?;
        let port = (4001 + round).to_string();
        let parent = name_of(&last);
        let mut words = vec!["--page-server", "--address", FAR, "--port", &port];
        words.extend(parent.iter().flat_map(|parent| ["--prev-images-dir", parent]));
        subject.save_memory(&images, &words)?;
        last = Some(images);
    }
    marks.set("pause", "")?;
    let paused: u64 =
        marks.wait("paused")?.parse().map_err(|e| format!("what was written is no number: {e}"))?;
    await_silence(subject)?;
    let images = subject.step("images")?;
    let (port, parent) = ((4001 + ROUNDS).to_string(), name_of(&last).unwrap_or_default());
    let words = ["--page-server", "--address", FAR, "--port", &port, "--prev-images-dir", &parent];
    let dumped = subject.dump(&images, &words)?;
    if !dumped.is_good() {
        return Err(format!("the dump failed: {:?}", dumped.status));
    }
    let target = &folders[ROUNDS];
    for entry in fs::read_dir(&images).map_err(|e| format!("list the images: {e}"))?.flatten() {
        let file = entry.file_name();
        if file.to_string_lossy().ends_with(".img") {
            fs::copy(entry.path(), target.join(file)).map_err(|e| format!("copy an image: {e}"))?;
        }
    }
    marks.set("dumped", "")?;
    let downtime = marks.wait("downtime")?;
    // It goes on being written to.
    wait_for_more(&marks, paused + WORK)?;
    marks.set("stop", "")?;
    let checked = marks.wait("checked")?;
    for (what, pid) in [("the client", client), ("the far side", there)] {
        match subject.reaper.wait(pid, PATIENCE) {
            Some(nix::sys::wait::WaitStatus::Exited(_, 0)) => {}
            other => return Err(format!("{what} ended with {other:?}: {}", marks.text("failed"))),
        }
    }
    let pages = |folder: &Path| -> u64 {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let pages = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages.filter_map(|entry| entry.metadata().ok()).map(|data| data.len() / 4096).sum()
    };
    let sent: Vec<u64> = folders.iter().map(|folder| pages(folder)).collect();
    println!(
        "{NOTE}{checked} acknowledged writes are there, {paused} of them from before; nobody could write for {downtime} ms; \
         pages of each round: {sent:?}"
    );
    // The last round would be worth nothing if it took all again.
    if sent[ROUNDS] * 2 > sent[0] {
        return Err(format!("the dump sent again what was there: {sent:?}"));
    }
    subject.see_killed("after the move")
}

fn wait_for_more(marks: &Marks, wanted: u64) -> Result<(), String> {
    let start = Instant::now();
    while marks.text("written").parse::<u64>().unwrap_or(0) < wanted {
        if marks.is_set("failed") || start.elapsed() > PATIENCE {
            return Err(format!("nothing is written after the move: {}", marks.text("failed")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
