//! logger, which sends what a loop says to a server outside of the tree, as a daemon does to `/dev/log`.
//!
//! The server is a thread of the harness.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use super::{Program, command, put, wait_for};
use crate::subject::Subject;

/// What the count has to grow by until a look is satisfied.
const SOME: u64 = 30;
const SCRIPT: &str = r#"
while [ ! -e stop ]; do
    count=$((count + 1))
    echo "count $count"
    sleep 0.005
done | logger --socket ../log --tag work
"#;

#[derive(Default)]
pub struct Logger {
    said: Arc<Mutex<Said>>,
}

#[derive(Default)]
struct Said {
    last: u64,
    wrong: Option<String>,
}

impl Said {
    /// A message counts on, or begins again from where the images saw it.
    fn hear(&mut self, message: &str) {
        let number =
            message.rsplit("count ").next().and_then(|number| number.trim_matches('\0').trim().parse().ok());
        match number {
            Some(number) if number <= self.last + 1 => self.last = number,
            _ => self.wrong = Some(format!("{message:?} after {}", self.last)),
        }
    }
}

impl Program for Logger {
    fn name(&self) -> &'static str {
        "logger"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["bash", "logger", "sleep"]
    }

    fn options(&self) -> &'static [&'static str] {
        &["--ext-unix-sk"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        put(&own.join("work.sh"), SCRIPT)?;
        let server =
            UnixDatagram::bind(own.with_file_name("log")).map_err(|e| format!("bind the server: {e}"))?;
        let said = self.said.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 1024];
            while let Ok(count) = server.recv(&mut bytes) {
                said.lock().expect("nobody panics").hear(&String::from_utf8_lossy(&bytes[..count]));
            }
        });
        let mut bash = command("bash")?;
        bash.arg("work.sh");
        Ok(bash)
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        wait_for(subject, "more messages", || {
            let said = self.said.lock().map_err(|e| e.to_string())?;
            match &said.wrong {
                Some(wrong) => Err(format!("the server heard {wrong}")),
                None => Ok((said.last >= before + SOME).then_some(said.last)),
            }
        })
    }
}
