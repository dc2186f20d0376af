//! The log, in the format of CRIU: people and programs search it for "Error" and for the last line.
//!
//! Levels are 1 errors, 2 warnings, 3 steps, 4 everything. From level 3 up each line begins with the
//! time since the start. Errors go to standard error as well when the log is a file.
//!
//! A line costs a copy into a buffer. The buffer is written at once for errors and warnings, when it is
//! full, when the last write is long ago, at the end of the program, and on a panic.

use crate::bar::Bar;
use log::{Level, LevelFilter, Log, Metadata, Record};
use model::Options;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const BUFFER_BYTES: usize = 32 * 1024;
/// Somebody who follows the log of a long run should not wait for a full buffer.
const STALE: Duration = Duration::from_millis(100);

/// The log of this program.
pub struct Logger {
    started: Instant,
    state: Mutex<State>,
}

struct State {
    target: Target,
    has_times: bool,
    buffer: Vec<u8>,
    written: Instant,
    bar: Option<Arc<Bar>>,
}

enum Target {
    Stderr,
    Stdout,
    File(File),
}

impl Logger {
    /// Starts to log warnings and errors to standard error.
    pub fn install() -> &'static Logger {
        let started = Instant::now();
        let state = State {
            target: Target::Stderr,
            has_times: false,
            buffer: Vec::new(),
            written: started,
            bar: None,
        };
        let logger: &'static Logger = Box::leak(Box::new(Logger { started, state: Mutex::new(state) }));
        // Fails only when there is a logger already, and this is called once, by main.
        let _ = log::set_logger(logger);
        log::set_max_level(LevelFilter::Warn);
        std::panic::set_hook(Box::new(|panic| logger.record_panic(panic)));
        logger
    }

    /// Goes on where the options say.
    pub fn open(&self, options: &Options, bar: Arc<Bar>) -> io::Result<()> {
        let target = match &options.log_file {
            None => Target::Stderr,
            Some(path) if path == Path::new("-") => Target::Stdout,
            Some(path) => Target::File(
                OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(true)
                    .mode(0o600)
                    .open(options.work_dir.join(path))?,
            ),
        };
        let mut state = self.state();
        state.target = target;
        state.has_times = options.log_level >= 3;
        state.bar = Some(bar);
        log::set_max_level(level_filter(options.log_level));
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The buffer must not be lost, whoever holds it: the thread that panicked may be the one.
    fn record_panic(&self, panic: &std::panic::PanicHookInfo<'_>) {
        let text = format!("Error (internal): {panic}\n");
        match self.state.try_lock() {
            Ok(mut state) => {
                // The panic may have come out of the bar: asking for its lock again would hang.
                state.bar = None;
                if !matches!(state.target, Target::Stderr) {
                    state.to_terminal(text.as_bytes());
                }
                state.buffer.extend_from_slice(text.as_bytes());
                state.flush();
            }
            Err(_) => drop(io::stderr().write_all(text.as_bytes())),
        }
    }
}

/// Level 0 is silence.
fn level_filter(level: u8) -> LevelFilter {
    match level {
        0 => LevelFilter::Off,
        1 => LevelFilter::Error,
        2 => LevelFilter::Warn,
        3 => LevelFilter::Info,
        _ => LevelFilter::Debug,
    }
}

/// `(SS.UUUUUU) `: always twelve characters. From 100 seconds on the last digits give way.
fn time_prefix(since_start: Duration) -> String {
    let time = format!("{:02}.{:06}", since_start.as_secs(), since_start.subsec_micros());
    format!("({}) ", &time[..9])
}

fn format_line(buffer: &mut Vec<u8>, time: Option<Duration>, record: &Record<'_>) {
    let place = (record.file().unwrap_or("?"), record.line().unwrap_or(0));
    let time = time.map(time_prefix).unwrap_or_default();
    let kind = match record.level() {
        Level::Error => format!("Error ({}:{}): ", place.0, place.1),
        Level::Warn => format!("Warn  ({}:{}): ", place.0, place.1),
        _ => String::new(),
    };
    // Writing to memory cannot fail.
    let _ = writeln!(buffer, "{time}{kind}{}", record.args());
}

impl State {
    fn to_terminal(&self, bytes: &[u8]) {
        // With standard error closed there is nobody left to tell.
        let write = || drop(io::stderr().write_all(bytes));
        match &self.bar {
            Some(bar) => bar.over(write),
            None => write(),
        }
    }

    fn flush(&mut self) {
        if self.buffer.is_empty() {
            return;
        }
        let buffer = std::mem::take(&mut self.buffer);
        let result = match &mut self.target {
            Target::Stderr => {
                self.to_terminal(&buffer);
                Ok(())
            }
            Target::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(&buffer).and_then(|()| stdout.flush())
            }
            Target::File(file) => file.write_all(&buffer),
        };
        if let Err(error) = result {
            self.target = Target::Stderr;
            let text = format!("Error (log): cannot write the log, it goes on here: {error}\n");
            self.to_terminal(text.as_bytes());
            self.to_terminal(&buffer);
        }
        self.buffer = buffer;
        self.buffer.clear();
        self.written = Instant::now();
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let mut state = self.state();
        let since_start = self.started.elapsed();
        let begin = state.buffer.len();
        let time = state.has_times.then_some(since_start);
        format_line(&mut state.buffer, time, record);
        let is_error = record.level() == Level::Error;
        if is_error && !matches!(state.target, Target::Stderr) {
            state.to_terminal(&state.buffer[begin..]);
        }
        let is_stale = state.written.duration_since(self.started) + STALE < since_start;
        if record.level() <= Level::Warn
            || state.buffer.len() > BUFFER_BYTES
            || is_stale
            || matches!(state.target, Target::Stderr)
        {
            state.flush();
        }
    }

    fn flush(&self) {
        self.state().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(level: Level, time: Option<Duration>) -> String {
        let mut buffer = Vec::new();
        let mut record = Record::builder();
        record.level(level).file(Some("crates/dump/src/run.rs")).line(Some(12));
        format_line(&mut buffer, time, &record.args(format_args!("text")).build());
        String::from_utf8(buffer).unwrap()
    }

    #[test]
    fn errors_and_warnings_name_their_place() {
        assert_eq!(line(Level::Error, None), "Error (crates/dump/src/run.rs:12): text\n");
        assert_eq!(line(Level::Warn, None), "Warn  (crates/dump/src/run.rs:12): text\n");
        assert_eq!(line(Level::Info, None), "text\n");
        let time = Some(Duration::from_micros(1_000_002));
        assert_eq!(line(Level::Debug, time), "(01.000002) text\n");
        assert!(line(Level::Error, time).starts_with("(01.000002) Error (crates/"));
    }

    #[test]
    fn steps_wait_in_the_buffer_and_an_error_takes_them_along() {
        let path = std::env::temp_dir().join(format!("crtools-log-{}", std::process::id()));
        let written = || std::fs::read_to_string(&path).unwrap();
        let started = Instant::now();
        let target = Target::File(File::create(&path).unwrap());
        let state = State { target, has_times: false, buffer: Vec::new(), written: started, bar: None };
        let logger = Logger { started, state: Mutex::new(state) };
        let log = |level| logger.log(&Record::builder().level(level).args(format_args!("{level}")).build());
        log::set_max_level(LevelFilter::Info);
        log(Level::Info);
        log(Level::Debug);
        assert_eq!(written(), "");
        log(Level::Error);
        assert_eq!(written(), "INFO\nError (?:0): ERROR\n");
        log(Level::Info);
        logger.flush();
        assert!(written().ends_with("\nINFO\n"));
        let _ = std::fs::remove_file(&path);
    }

    #[test]
    fn the_time_is_twelve_characters_wide_for_eleven_days() {
        for (seconds, prefix) in
            [(0, "(00.000007) "), (59, "(59.000007) "), (100, "(100.00000) "), (1_000_000, "(1000000.0) ")]
        {
            assert_eq!(time_prefix(Duration::from_micros(seconds * 1_000_000 + 7)), prefix);
            assert_eq!(prefix.len(), 12);
        }
        // Longer than anybody waits; it must only not panic.
        time_prefix(Duration::MAX);
    }
}
