//! The command `crtools`: reads the options, opens the log, and hands over to an engine.
//!
//! Start-up is part of every dump, so nothing is done here that the command does not need.
#![forbid(unsafe_code)]

mod bar;
mod check;
mod logging;
mod page_server;

use bar::Bar;
use logging::Logger;
use model::hooks::Action;
use model::options::config::Environment;
use model::options::{Request, UsageError, help};
use model::{Cause, Command, Failures, Options, ProgressSink, version};
use restore::Outcome;
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

fn main() -> ExitCode {
    let logger = Logger::install();
    let status = run(logger);
    log::logger().flush();
    status
}

fn run(logger: &Logger) -> ExitCode {
    let environment =
        Environment { home: std::env::var_os("HOME"), config_file: std::env::var_os("CRIU_CONFIG_FILE") };
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    // Not a command for people: how a dump starts the process that holds what it watches.
    if args.first().is_some_and(|first| first == dump::KEEPER_COMMAND) {
        return keep(&args[1..]);
    }
    match Request::read(args, &environment, &mut read_if_there) {
        Err(error) => refuse(&error),
        Ok(Request::Help) => print(&help::help()),
        Ok(Request::Version) => print(&version_text()),
        Ok(Request::Run { command, options, warnings }) => follow(logger, command, *options, &warnings),
    }
}

fn keep(words: &[OsString]) -> ExitCode {
    let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    match dump::keeper(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::error!("{failure}");
            ExitCode::FAILURE
        }
    }
}

fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

fn refuse(error: &UsageError) -> ExitCode {
    for message in &error.messages {
        log::error!("{message}");
    }
    if error.shows_usage {
        // With standard error closed there is nobody left to tell.
        let _ = io::stderr().write_all(help::usage().as_bytes());
    }
    ExitCode::from(error.exit_status)
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The first line is the one that scripts look for when they want to know what CRIU can do.
fn version_text() -> String {
    format!("Version: {}.{}\ncrtools: {}\n", version::CRIU_MAJOR, version::CRIU_MINOR, version::CRTOOLS)
}

fn follow(logger: &Logger, command: Command, mut options: Options, warnings: &[String]) -> ExitCode {
    for &number in &options.close {
        sys::inherited::close(number);
    }
    let bar = Arc::new(Bar::new(options.progress_mode));
    options.progress = ProgressSink::new(bar.clone());
    if let Err(message) = go_to_work(&mut options) {
        log::error!("{message}");
        return ExitCode::FAILURE;
    }
    if let Err(error) = logger.open(&options, bar.clone()) {
        let file = options.log_file.unwrap_or_default();
        log::error!("{}: cannot open the log: {error}", file.display());
        return ExitCode::FAILURE;
    }
    introduce();
    for warning in warnings {
        log::warn!("{warning}");
    }
    match command {
        Command::Check => check::run(&options.check),
        Command::Dump | Command::PreDump => {
            let work = || {
                let status = dump(command, &options, &bar);
                log::logger().flush();
                status
            };
            dump::prepare();
            match sys::apart::run(work) {
                Ok(status) => {
                    // It was killed.
                    if status > 128 {
                        dump::mend();
                    }
                    ExitCode::from(status)
                }
                Err(error) => {
                    log::error!("cannot begin: {error}");
                    ExitCode::FAILURE
                }
            }
        }
        Command::Restore => restore(&options, &bar),
        Command::PageServer => match page_server::run(&options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failures) => ExitCode::from(fail(&failures, "Receiving pages FAILED.")),
        },
        Command::Dedup => match page_server::dedup(&options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failures) => ExitCode::from(fail(&failures, "Freeing pages FAILED.")),
        },
        Command::LazyPages => match restore::serve_pages(&options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failures) => ExitCode::from(fail(&failures, "Handing out pages FAILED.")),
        },
        other => {
            // Reading the options has refused these already.
            log::error!("{} is not supported yet by crtools", other.spec().name);
            ExitCode::FAILURE
        }
    }
}

/// Makes the paths absolute, then makes the work directory the current one: scripts of the user, and
/// relative names in their options, are looked for there.
fn go_to_work(options: &mut Options) -> Result<(), String> {
    options.images_dir = directory(&options.images_dir, "images")?;
    options.work_dir = match options.work_dir.as_os_str().is_empty() {
        true => options.images_dir.clone(),
        false => directory(&options.work_dir, "work")?,
    };
    std::env::set_current_dir(&options.work_dir).map_err(|error| {
        format!("{}: cannot go to the work directory: {error}", options.work_dir.display())
    })?;
    options.pidfile = options.pidfile.take().map(|file| options.work_dir.join(file));
    Ok(())
}

fn directory(path: &Path, what: &str) -> Result<PathBuf, String> {
    let wrong = |error| format!("{}: cannot use the {what} directory: {error}", path.display());
    match fs::metadata(path).map_err(wrong)?.is_dir() {
        true => std::path::absolute(path).map_err(wrong),
        false => Err(wrong(ErrorKind::NotADirectory.into())),
    }
}

/// Says in the log who runs where, for whoever reads it on another host.
fn introduce() {
    if !log::log_enabled!(log::Level::Info) {
        return;
    }
    let read = |name: &str| match fs::read_to_string(format!("/proc/sys/kernel/{name}")) {
        Ok(text) => text.trim_end().to_owned(),
        Err(_) => "?".to_owned(),
    };
    log::info!("Run ID: {}", read("random/uuid"));
    log::info!("Version: {}.{} (crtools {})", version::CRIU_MAJOR, version::CRIU_MINOR, version::CRTOOLS);
    log::info!(
        "Running on {} Linux {} {} {}",
        read("hostname"),
        read("osrelease"),
        read("version"),
        std::env::consts::ARCH
    );
}

fn dump(command: Command, options: &Options, bar: &Bar) -> u8 {
    let (result, what) = match command {
        Command::PreDump => (dump::pre_dump(options), "Pre-dumping"),
        _ => (dump::run(options), "Dumping"),
    };
    bar.clear();
    match result {
        Ok(()) => {
            log::info!("{what} finished successfully");
            display_stats(options, bar);
            0
        }
        Err(failures) => fail(&failures, &format!("{what} FAILED.")),
    }
}

fn restore(options: &Options, bar: &Bar) -> ExitCode {
    let result = restore::run(options);
    bar.clear();
    let waited = match result {
        Ok(Outcome::Planned(plan)) => return print(&plan),
        Ok(Outcome::Resumed(tree)) => {
            log::info!("Restore finished successfully. Tasks resumed.");
            display_stats(options, bar);
            // The tree may run for days: who looks into the log must find that line.
            log::logger().flush();
            if options.restore_detached { Ok(()) } else { tree.wait() }
        }
        Err(failures) => Err(failures),
    };
    match waited {
        Ok(()) => ExitCode::SUCCESS,
        Err(failures) => ExitCode::from(fail(&failures, "Restoring FAILED.")),
    }
}

fn display_stats(options: &Options, bar: &Bar) {
    if let (true, Some(text)) = (options.display_stats, bar.statistics()) {
        // The tree is saved or runs; a closed standard output does not change that.
        print(&text);
    }
}

fn fail(failures: &Failures, marker: &str) -> u8 {
    for failure in failures {
        log::error!("{failure}");
    }
    log::error!("{marker}");
    exit_status(failures)
}

/// 1, but a script that stops a dump after its images are complete decides itself: clients tell with
/// it why the tree runs on.
fn exit_status(failures: &Failures) -> u8 {
    let of_script = failures.iter().find_map(|failure| match failure.cause {
        Cause::Script { action: Action::PostDump, status: Some(status) } => u8::try_from(status).ok(),
        _ => None,
    });
    of_script.filter(|&status| status != 0).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Failure, Object};

    #[test]
    fn the_first_line_of_the_version_is_the_one_clients_parse() {
        let text = version_text();
        assert_eq!(text.lines().next(), Some("Version: 4.2"));
        assert!(!text.lines().nth(1).unwrap().contains("Version"));
    }

    #[test]
    fn a_post_dump_script_decides_the_exit_status() {
        let script = |action, status| {
            vec![
                Failure::unsupported(Object::Tree, "something else"),
                Failure::new(Object::Tree, "", Cause::Script { action, status }),
            ]
        };
        assert_eq!(exit_status(&script(Action::PostDump, Some(32))), 32);
        assert_eq!(exit_status(&script(Action::PostDump, None)), 1);
        assert_eq!(exit_status(&script(Action::PreDump, Some(32))), 1);
        assert_eq!(exit_status(&vec![Failure::unsupported(Object::Tree, "x")]), 1);
    }
}
