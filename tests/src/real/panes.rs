//! tmux, with a loop that counts in one pane and a shell that is typed to in another.
//!
//! Its panes are pseudoterminals, each the terminal of a session of its own.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use super::{PATIENCE, Program, command, put, wait_for};
use crate::subject::Subject;
use crate::tool::read_lossy;

/// What the count has to grow by until a look is satisfied.
const SOME: u64 = 10;
const LOOP: &str = "while :; do count=$((count + 1)); echo \"count $count\"; sleep 0.02; done\n";
/// The panes of the one window.
const COUNTING: &str = "work:0.0";
const SHELL: &str = "work:0.1";

pub struct Tmux;

/// Runs a command of tmux; what it printed, or `None` when it failed.
fn ask(subject: &Subject, words: &[&str]) -> Result<Option<String>, String> {
    let mut tmux = command("tmux")?;
    tmux.arg("-S").arg(subject.own("socket")).args(words).env_remove("TMUX");
    let ran = tmux.output().map_err(|e| format!("run tmux: {e}"))?;
    Ok(ran.status.success().then(|| String::from_utf8_lossy(&ran.stdout).into_owned()))
}

fn tell(subject: &Subject, words: &[&str]) -> Result<String, String> {
    ask(subject, words)?.ok_or_else(|| format!("tmux cannot {words:?}"))
}

/// All that a pane has shown.
fn shown(subject: &Subject, pane: &str) -> Result<String, String> {
    tell(subject, &["capture-pane", "-t", pane, "-p", "-S", "-"])
}

/// The last number of a text that counts without a gap.
fn last(text: &str) -> Result<u64, String> {
    let numbers = text.lines().filter_map(|line| line.strip_prefix("count ")?.parse::<u64>().ok());
    let numbers: Vec<u64> = numbers.collect();
    match numbers.windows(2).find(|pair| pair[0] + 1 != pair[1]) {
        Some(pair) => Err(format!("{} is followed by {}", pair[0], pair[1])),
        None => Ok(numbers.last().copied().unwrap_or(0)),
    }
}

/// Types a question into the shell, and waits for the answer: something that only it computes, and the size that its
/// terminal has for it.
fn converse(subject: &mut Subject, number: u64) -> Result<(), String> {
    let size = tell(subject, &["display-message", "-t", SHELL, "-p", "#{pane_height} #{pane_width}"])?;
    // tmux tells the terminal a little later.
    let terminal = tell(subject, &["display-message", "-t", SHELL, "-p", "#{pane_tty}"])?;
    wait_for(subject, "the new size", || {
        let ran = command("stty")?.args(["-F", terminal.trim(), "size"]).output();
        let ran = ran.map_err(|e| format!("run stty: {e}"))?;
        Ok((String::from_utf8_lossy(&ran.stdout).trim() == size.trim()).then_some(()))
    })?;
    let question = format!("echo answer $(({number} * 2)) $(stty size)");
    tell(subject, &["send-keys", "-t", SHELL, &question, "Enter"])?;
    let answer = format!("{} {}\n", answer(number), size.trim());
    let start = Instant::now();
    loop {
        let text = shown(subject, SHELL)?;
        if text.contains(&answer) {
            return Ok(());
        }
        subject.still_there("waiting for the shell")?;
        if start.elapsed() > PATIENCE {
            return Err(format!("waited {PATIENCE:?} in vain for {answer:?}:\n{text}"));
        }
        crate::sys::nap();
    }
}

fn answer(number: u64) -> String {
    format!("answer {}", number * 2)
}

impl Program for Tmux {
    fn name(&self) -> &'static str {
        "tmux"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["tmux", "bash", "stty", "sleep"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("loop.sh"), LOOP)?;
        let mut tmux = command("tmux")?;
        tmux.arg("-S").arg(own.join("socket")).args(["-f", "/dev/null", "-D"]);
        Ok(tmux)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        if before == 0 {
            let socket = subject.own("socket");
            wait_for(subject, "the server", || Ok(socket.exists().then_some(())))?;
            let work = format!("bash {}", subject.own("loop.sh").display());
            let size = ["-x", "133", "-y", "41"];
            tell(subject, &[&["new-session", "-d", "-s", "work"], &size[..], &[work.as_str()]].concat())?;
            tell(subject, &["split-window", "-t", "work", "-d", "bash --norc --noprofile"])?;
        } else {
            let text = shown(subject, SHELL)?;
            if !text.contains(&answer(before)) {
                return Err(format!("the shell's pane has lost {:?}:\n{text}", answer(before)));
            }
        }
        let start = Instant::now();
        let count = loop {
            let count = last(&shown(subject, COUNTING)?)?;
            if count >= before + SOME {
                break count;
            }
            subject.still_there("waiting for a higher count")?;
            if start.elapsed() > PATIENCE {
                return Err(format!("the loop counts no further than {count}"));
            }
            crate::sys::nap();
        };
        // In another size each time.
        converse(subject, count)?;
        let (width, height) = ((100 + count % 50).to_string(), (30 + count % 10).to_string());
        tell(subject, &["resize-window", "-t", "work", "-x", &width, "-y", &height])?;
        converse(subject, count + 1)?;
        // The server may hear of the end of a connection after the client.
        let name = subject.own("socket").display().to_string();
        wait_for(subject, "the end of all connections", || {
            let table = read_lossy(Path::new("/proc/self/net/unix"));
            Ok((table.lines().filter(|line| line.ends_with(&name)).count() == 1).then_some(()))
        })?;
        Ok(count)
    }

    fn end(&self, subject: &mut Subject) -> Result<(), String> {
        ask(subject, &["kill-server"]).map(drop)
    }
}
