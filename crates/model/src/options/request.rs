//! What a command line asks for, every source of options merged: configuration files first, the
//! command line last, so that the later one wins.

use super::config::{self, Environment};
use super::parse::{self, Use};
use super::{Given, HELP, Options, Support, VERSION};
use crate::command::{Command, CommandSupport};
use std::ffi::OsString;
use std::fmt;
use std::path::Path;

/// What to do.
#[derive(Debug)]
pub enum Request {
    Help,
    Version,
    Run {
        command: Command,
        options: Box<Options>,
        /// To be logged once there is a log.
        warnings: Vec<String>,
    },
}

/// A command line that cannot be followed. Nothing was touched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageError {
    /// One line for each mistake.
    pub messages: Vec<String>,
    pub exit_status: u8,
    /// The user does not know the commands: show them.
    pub shows_usage: bool,
}

impl UsageError {
    pub fn new(message: impl Into<String>) -> UsageError {
        UsageError { messages: vec![message.into()], exit_status: 1, shows_usage: false }
    }

    /// Says where the mistake is.
    pub fn within(mut self, place: &str) -> UsageError {
        for message in &mut self.messages {
            *message = format!("{place}: {message}");
        }
        self
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.messages.join("\n"))
    }
}

impl std::error::Error for UsageError {}

impl Request {
    /// Reads the words after the program's name.
    ///
    /// `read_file` hands out the content of a configuration file, or nothing where there is none.
    pub fn read(
        args: Vec<OsString>,
        environment: &Environment,
        read_file: &mut dyn FnMut(&Path) -> std::io::Result<Option<Vec<u8>>>,
    ) -> Result<Request, UsageError> {
        // Help is for people whose other words are wrong, so those are not even looked at.
        if args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "-h" || arg == "--help") {
            return Ok(Request::Help);
        }
        let words = parse::parse(args)?;
        let asks_for = |spec| words.uses.iter().any(|given| std::ptr::eq(given.spec, spec));
        if asks_for(&HELP) {
            return Ok(Request::Help);
        }
        if asks_for(&VERSION) {
            return Ok(Request::Version);
        }
        let command = command(&words.operands)?;

        let mut merged = Merge::new(command);
        for path in config::files(&words.uses, environment) {
            let place = path.display().to_string();
            let text = read_file(&path).map_err(|error| UsageError::new(error.to_string()).within(&place))?;
            for (line, given) in config::parse(&text.unwrap_or_default()).map_err(|e| e.within(&place))? {
                merged.apply(given).map_err(|error| error.within(&format!("{place}: line {line}")))?;
            }
        }
        for given in words.uses {
            merged.apply(given)?;
        }
        merged.finish()
    }
}

fn command(operands: &[OsString]) -> Result<Command, UsageError> {
    let usage = |message: String| UsageError { shows_usage: true, ..UsageError::new(message) };
    let Some((name, rest)) = operands.split_first() else {
        return Err(usage("a command is needed".into()));
    };
    let spec = name
        .to_str()
        .and_then(Command::by_name)
        .ok_or_else(|| usage(format!("no command {}", name.display())))?;
    match spec.support {
        CommandSupport::Yes => {}
        CommandSupport::NotYet => {
            return Err(UsageError::new(format!(
                "the command {} is known but not supported yet by crtools; nothing was touched",
                spec.name
            )));
        }
        CommandSupport::Removed(instead) => {
            let error = UsageError::new(format!("the command {} is gone: {instead}", spec.name));
            return Err(UsageError { exit_status: 255, ..error });
        }
    }
    match rest.get(spec.operands.len()) {
        Some(word) => Err(UsageError::new(format!("{}: one word too many", word.display()))),
        None if rest.len() < spec.operands.len() => {
            Err(UsageError::new(format!("{} needs {}", spec.name, spec.operands.join(" "))))
        }
        None => Ok(spec.command),
    }
}

/// Options as far as the sources are read.
struct Merge {
    command: Command,
    options: Options,
    /// Uses of what is not supported yet, in order. A later `--no-NAME` takes one back.
    not_yet: Vec<Use>,
    tree_was_given: bool,
}

impl Merge {
    fn new(command: Command) -> Merge {
        Merge { command, options: Options::default(), not_yet: Vec::new(), tree_was_given: false }
    }

    fn apply(&mut self, given: Use) -> Result<(), UsageError> {
        let spec = given.spec;
        match spec.support {
            Support::Early => Ok(()),
            Support::Removed(why) => Err(UsageError::new(format!("--{} is gone: {why}", spec.long))),
            Support::NotYet => {
                self.not_yet.retain(|other| !std::ptr::eq(other.spec, spec));
                // What the command ignores anyway is ignored here too: configuration files are
                // shared between commands.
                if given.on && spec.concerns(self.command) {
                    self.not_yet.push(given);
                }
                Ok(())
            }
            Support::Yes(setter) => {
                self.tree_was_given |= std::ptr::eq(spec, &super::TREE);
                let value = given.value.as_deref();
                setter(&mut self.options, &Given { on: given.on, value }).map_err(|error| {
                    let value = value.map(|value| format!(" {}", value.display())).unwrap_or_default();
                    UsageError::new(format!("--{}{value}: {error}", spec.long))
                })
            }
        }
    }

    fn finish(self) -> Result<Request, UsageError> {
        let Merge { command, options, not_yet, tree_was_given } = self;
        let mut messages = Vec::new();
        let mut warnings = Vec::new();
        for given in not_yet {
            messages.push(format!(
                "--{} is known but not supported yet by crtools; nothing was touched",
                given.spec.long
            ));
        }
        if matches!(command, Command::Dump | Command::PreDump) && options.tree.is_none() {
            messages.push(format!("{} needs --tree PID", command.spec().name));
        }
        let reaches = options.port.is_some() || options.ps_socket.is_some();
        if command == Command::PreDump && options.lazy_pages {
            messages.push("pre-dump has no --lazy-pages: the tree runs on, and its memory with it".into());
        }
        if command == Command::Dump && options.lazy_pages {
            if options.page_server {
                messages
                    .push("--lazy-pages and --page-server of dump are two ways for the same pages".into());
            } else if !reaches {
                messages.push(
                    "--lazy-pages of dump needs --port or --ps-socket, where pages are asked for".into(),
                );
            }
        }
        if options.pre_copy == Some(true) {
            let elsewhere = [
                (options.page_server, "--page-server: pre-dump sends memory there while the tree runs"),
                (options.lazy_pages, "--lazy-pages of dump, which copies nothing before it is asked for"),
                (
                    options.compress.is_some(),
                    "--compress: pages that changed have to take the places of others",
                ),
                (options.copy_on_write == Some(true), "--copy-on-write, another way to the same end"),
            ];
            for (_, why) in elsewhere.into_iter().filter(|(is_given, _)| *is_given) {
                messages.push(format!("--pre-copy does not go with {why}"));
            }
        }
        if options.page_server && !matches!(command, Command::PageServer) {
            let uses = match command {
                Command::Dump | Command::PreDump | Command::LazyPages => true,
                Command::Restore => options.lazy_pages,
                _ => false,
            };
            if uses && !reaches {
                messages.push("--page-server needs --port or --ps-socket".into());
            }
        }
        if command == Command::PageServer && options.lazy_pages {
            messages.push(
                "page-server has no --lazy-pages: dump --lazy-pages and lazy-pages --page-server are the two ends"
                    .into(),
            );
        }
        if command == Command::Restore {
            if options.record_working_set && !options.lazy_pages {
                messages.push("--record-working-set works only with --lazy-pages".into());
            }
            if options.restore_sibling && !options.restore_detached {
                messages.push("--restore-sibling works only with --restore-detached".into());
            }
            if tree_was_given {
                warnings.push("--tree is obsolete for restore: the images know their root".into());
            }
        }
        if options.manage_cgroups == super::ManageCgroups::None {
            warnings
                .push("control groups are not carried yet: the tree gets the group of the restore".into());
        }
        if !messages.is_empty() {
            return Err(UsageError { messages, exit_status: 1, shows_usage: false });
        }
        Ok(Request::Run { command, options: Box::new(options), warnings })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::OPTIONS;
    use std::collections::HashMap;

    fn read_with(line: &str, files: &[(&str, &str)]) -> Result<Request, UsageError> {
        let files: HashMap<_, _> = files.iter().copied().collect();
        let environment = Environment { home: Some("/home/u".into()), config_file: Some("/env.conf".into()) };
        let args = line.split_whitespace().map(OsString::from).collect();
        Request::read(args, &environment, &mut |path| {
            Ok(files.get(path.to_str().unwrap()).map(|text| text.as_bytes().to_vec()))
        })
    }

    fn read(line: &str) -> Result<Request, UsageError> {
        read_with(line, &[])
    }

    fn run_with(line: &str, files: &[(&str, &str)]) -> (Command, Options, Vec<String>) {
        match read_with(line, files) {
            Ok(Request::Run { command, options, warnings }) => (command, *options, warnings),
            other => panic!("{line}: {other:?}"),
        }
    }

    fn options(line: &str) -> Options {
        run_with(line, &[]).1
    }

    fn refusal(line: &str) -> UsageError {
        match read(line) {
            Err(error) => error,
            Ok(request) => panic!("{line}: {request:?}"),
        }
    }

    #[test]
    fn a_dump_has_its_options() {
        let (command, options, warnings) = run_with("dump -t 42 -D /img -W /var/w -o d.log -v4 -R -j", &[]);
        assert_eq!(command, Command::Dump);
        assert_eq!(options.tree, Some(42));
        assert_eq!(options.images_dir, Path::new("/img"));
        assert_eq!(options.work_dir, Path::new("/var/w"));
        assert_eq!(options.log_file.as_deref(), Some(Path::new("d.log")));
        assert_eq!(options.log_level, 4);
        assert!(options.leave_running && options.shell_job);
        assert!(warnings.is_empty());
    }

    #[test]
    fn a_restore_has_its_options() {
        let options =
            options("restore -dS --pidfile p --timeout 3 --action-script a --action-script b -r /r");
        assert!(options.restore_detached && options.restore_sibling);
        assert_eq!(options.pidfile.as_deref(), Some(Path::new("p")));
        assert_eq!(options.root.as_deref(), Some(Path::new("/r")));
        assert_eq!(options.action_scripts, ["a", "b"]);
        assert_eq!(options.timeout_s, 3);
    }

    #[test]
    fn the_last_final_state_wins() {
        let both = options("dump -t 1 -s -R");
        assert!(both.leave_running && !both.leave_stopped);
        let both = options("dump -t 1 -R -s");
        assert!(!both.leave_running && both.leave_stopped);
    }

    #[test]
    fn help_wins_over_every_mistake() {
        for line in ["-h", "--help", "nonsense -h", "--nonsense --help dump", "--hel", "dump -Rh"] {
            assert!(matches!(read(line), Ok(Request::Help)), "{line}");
        }
        assert!(read("dump -t 1 -- -h").is_err());
    }

    #[test]
    fn version_needs_no_command() {
        for line in ["-V", "--version", "dump --vers"] {
            assert!(matches!(read(line), Ok(Request::Version)), "{line}");
        }
    }

    #[test]
    fn without_a_known_command_the_usage_is_shown() {
        for line in ["", "-D x", "dmup", "Dump"] {
            let error = refusal(line);
            assert!(error.shows_usage && error.exit_status == 1, "{line}");
        }
    }

    #[test]
    fn removed_commands_end_with_255() {
        assert_eq!(refusal("show").exit_status, 255);
        assert_eq!(refusal("exec").exit_status, 255);
    }

    #[test]
    fn commands_to_come_say_so() {
        let error = refusal("swrk 3");
        assert!(error.messages[0].contains("swrk is known but not supported yet"), "{error}");
        assert_eq!(error.exit_status, 1);
    }

    #[test]
    fn words_too_many_are_refused() {
        assert_eq!(refusal("dump -t 1 extra").to_string(), "extra: one word too many");
        assert_eq!(refusal("dump -v 4 -t 1").to_string(), "4: one word too many");
    }

    #[test]
    fn all_options_to_come_are_named_together() {
        let error = refusal("dump -t 1 --tcp-established --stream --skip-in-flight");
        assert_eq!(error.messages.len(), 3);
        assert!(error.messages[1].starts_with("--stream is known but not supported yet"));
        assert!(error.messages.iter().all(|message| message.ends_with("nothing was touched")));
    }

    #[test]
    fn an_option_to_come_can_be_taken_back() {
        run_with("dump -t 1 --tcp-established --no-tcp-established", &[]);
        run_with("dump -t 1 --no-tcp-established", &[("/env.conf", "tcp-established")]);
    }

    #[test]
    fn a_command_ignores_options_of_others() {
        run_with("restore", &[("/env.conf", "enable-external-masters\ntree 5\nleave-running")]);
        run_with("check --tcp-established", &[]);
        assert!(read_with("dump -t 1", &[("/env.conf", "enable-external-masters")]).is_err());
    }

    #[test]
    fn every_option_of_the_table_is_followed_or_refused_by_name() {
        for spec in OPTIONS {
            let value = match spec.value {
                crate::options::ValueKind::Required(_) => "=1",
                _ => "",
            };
            match (spec.support, read(&format!("dump -t 1 --{}{value}", spec.long))) {
                (Support::NotYet | Support::Removed(_), Err(error)) => {
                    assert!(error.to_string().contains(&format!("--{}", spec.long)), "{error}");
                }
                (Support::NotYet, Ok(_)) => assert!(!spec.concerns(Command::Dump), "--{}", spec.long),
                (Support::Removed(_), Ok(_)) => panic!("--{}", spec.long),
                (Support::Yes(_), Err(error)) => {
                    assert!(error.to_string().starts_with(&format!("--{}", spec.long)), "{error}");
                }
                (Support::Yes(_) | Support::Early, _) => {}
            }
        }
    }

    #[test]
    fn dump_needs_a_tree_and_a_sibling_needs_to_be_detached() {
        assert_eq!(refusal("dump").to_string(), "dump needs --tree PID");
        assert!(refusal("restore -S").to_string().contains("--restore-detached"));
        assert_eq!(refusal("dump -t 0").to_string(), "--tree 0: a pid is greater than 0");
    }

    #[test]
    fn a_tree_for_restore_is_a_warning() {
        assert_eq!(run_with("restore -t 5", &[]).2.len(), 1);
    }

    #[test]
    fn ways_of_memory_that_follow_later_need_a_place() {
        for (line, wrong) in [
            ("dump -t 1 --lazy-pages", "needs --port or --ps-socket"),
            ("dump -t 1 --lazy-pages --page-server --port 5", "two ways"),
            ("pre-dump -t 1 --lazy-pages --port 5", "pre-dump has no --lazy-pages"),
            ("dump -t 1 --pre-copy --page-server --port 5", "--pre-copy does not go with --page-server"),
            ("dump -t 1 --pre-copy --lazy-pages --port 5", "--pre-copy does not go with --lazy-pages"),
            ("dump -t 1 --pre-copy --compress", "--pre-copy does not go with --compress"),
            ("dump -t 1 --pre-copy --copy-on-write", "--pre-copy does not go with --copy-on-write"),
            ("lazy-pages --page-server", "--page-server needs --port"),
            ("restore --lazy-pages --page-server", "--page-server needs --port"),
            ("restore --record-working-set", "works only with --lazy-pages"),
            ("page-server --lazy-pages --port 5", "page-server has no --lazy-pages"),
        ] {
            let error = refusal(line).to_string();
            assert!(error.contains(wrong), "{line}: {error}");
        }
        for line in [
            "dump -t 1 --lazy-pages --port 5",
            "dump -t 1 --lazy-pages --ps-socket 5",
            "lazy-pages --page-server --port 5 --address there",
            "restore --lazy-pages --page-server --port 5",
            "restore --page-server",
        ] {
            options(line);
        }
    }

    #[test]
    fn later_sources_win() {
        let files = [
            ("/etc/criu/default.conf", "timeout 1\nwork-dir /a\nshell-job\naction-script one"),
            ("/etc/crtools/default.conf", "timeout 2\nprogress never"),
            ("/home/u/.criu/default.conf", "timeout 3"),
            ("/env.conf", "timeout 4"),
            ("/named.conf", "timeout 5\naction-script three"),
        ];
        let line = "restore --action-script two --no-shell-job";
        let options = run_with(line, &files).1;
        assert_eq!(options.timeout_s, 4);
        assert_eq!(options.work_dir, Path::new("/a"));
        assert_eq!(options.action_scripts, ["one", "two"]);
        assert!(!options.shell_job);
        let options = run_with("restore --config /named.conf", &files).1;
        assert_eq!((options.timeout_s, options.work_dir.as_path()), (5, Path::new("")));
        let options = run_with("restore --config /named.conf --timeout 6", &files).1;
        assert_eq!(options.timeout_s, 6);
        let options = run_with("restore --no-default-config", &files).1;
        assert_eq!(options.timeout_s, 4);
    }

    #[test]
    fn a_mistake_in_a_file_names_file_and_line() {
        let error = read_with("check", &[("/env.conf", "\ntimeout soon")]).unwrap_err();
        assert_eq!(error.to_string(), "/env.conf: line 2: --timeout soon: is not a number that fits");
        let error = read_with("check", &[("/env.conf", "a b c")]).unwrap_err();
        assert!(error.to_string().starts_with("/env.conf: line 1: "), "{error}");
    }

    #[test]
    fn an_unreadable_file_is_not_a_missing_one() {
        let environment = Environment { home: None, config_file: Some("/env.conf".into()) };
        let error = Request::read(vec!["check".into()], &environment, &mut |path| match path
            == Path::new("/env.conf")
        {
            true => Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied)),
            false => Ok(None),
        });
        assert!(error.unwrap_err().to_string().starts_with("/env.conf: "));
    }
}
