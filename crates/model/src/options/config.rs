//! Configuration files: one option a line, without the dashes.
//!
//! ```text
//! # a comment, up to the end of the line wherever it begins
//! tcp-established
//! no-display-stats
//! work-dir "/var/tmp/with \"quotes\" and spaces"
//! ```
//!
//! An option that repeats is on a line for each value. Commands and short letters have no place here.
//! `option=value` is read too: it is the only way for CRIU to give a value that is optional.

use super::parse::{Use, find_long};
use super::request::UsageError;
use super::{Support, ValueKind};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file for the whole host that CRIU reads, and ours, which can also hold options of our own.
const HOST_FILES: [&str; 2] = ["/etc/criu/default.conf", "/etc/crtools/default.conf"];
/// The file of one user, under their home directory.
const USER_FILE: &str = ".criu/default.conf";

/// What of the environment decides about configuration files.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `HOME`
    pub home: Option<OsString>,
    /// `CRIU_CONFIG_FILE`
    pub config_file: Option<OsString>,
}

/// The files to read, the one that wins last.
pub fn files(uses: &[Use], environment: &Environment) -> Vec<PathBuf> {
    let last = |spec| uses.iter().rev().find(|given| std::ptr::eq(given.spec, spec));
    let named = last(&super::CONFIG);
    let mut files = Vec::new();
    if named.is_none() && last(&super::NO_DEFAULT_CONFIG).is_none() {
        files.extend(HOST_FILES.map(PathBuf::from));
        files.extend(environment.home.as_ref().map(|home| Path::new(home).join(USER_FILE)));
    }
    files.extend(environment.config_file.as_ref().map(PathBuf::from));
    files.extend(named.and_then(|given| given.value.as_ref()).map(PathBuf::from));
    files
}

/// Reads the text of one file. An error names the line.
pub fn parse(text: &[u8]) -> Result<Vec<(usize, Use)>, UsageError> {
    let mut uses = Vec::new();
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let number = index + 1;
        let parsed = parse_line(line).map_err(|error| error.within(&format!("line {number}")))?;
        uses.extend(parsed.map(|given| (number, given)));
    }
    Ok(uses)
}

fn parse_line(line: &[u8]) -> Result<Option<Use>, UsageError> {
    let line = line.split(|&byte| byte == b'#').next().unwrap_or_default().trim_ascii();
    if line.is_empty() {
        return Ok(None);
    }
    let end = line.iter().position(|&byte| byte.is_ascii_whitespace() || byte == b'=');
    let (name, rest) = line.split_at(end.unwrap_or(line.len()));
    let name = String::from_utf8_lossy(name);
    if name.starts_with('-') {
        return Err(UsageError::new(format!("{name}: options are written without dashes here")));
    }
    let (spec, on) = find_long(&name)?;
    if matches!(spec.support, Support::Early) {
        return Err(UsageError::new(format!("{name} has no place in a configuration file")));
    }
    let value = parse_value(rest)?;
    match (spec.value, &value) {
        (ValueKind::Flag, Some(_)) => Err(UsageError::new(format!("{} takes no value", spec.long))),
        (ValueKind::Required(what), None) => {
            Err(UsageError::new(format!("{} needs a value: {what}", spec.long)))
        }
        _ => Ok(Some(Use { spec, on, value })),
    }
}

/// What follows the name: nothing, one word, or one quoted string.
fn parse_value(rest: &[u8]) -> Result<Option<OsString>, UsageError> {
    let (rest, assigned) = match rest.strip_prefix(b"=") {
        Some(rest) => (rest, true),
        None => (rest.trim_ascii(), false),
    };
    if rest.is_empty() {
        return Ok(assigned.then(OsString::new));
    }
    let Some(quoted) = rest.strip_prefix(b"\"") else {
        return match rest.iter().any(u8::is_ascii_whitespace) {
            true => Err(UsageError::new("more than one word; put the value in double quotes")),
            false => Ok(Some(OsStr::from_bytes(rest).to_owned())),
        };
    };
    let mut value = Vec::with_capacity(quoted.len());
    let mut bytes = quoted.iter();
    loop {
        match bytes.next() {
            None => return Err(UsageError::new("the closing quote is missing")),
            Some(b'"') => break,
            Some(b'\\') if bytes.as_slice().first() == Some(&b'"') => {
                value.push(b'"');
                bytes.next();
            }
            Some(&byte) => value.push(byte),
        }
    }
    match bytes.as_slice().trim_ascii().is_empty() {
        true => Ok(Some(OsString::from_vec(value))),
        false => Err(UsageError::new("something follows the closing quote")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<String>, String> {
        let uses = parse(text.as_bytes()).map_err(|error| error.to_string())?;
        let shown = uses.into_iter().map(|(line, given)| {
            let no = if given.on { "" } else { "no-" };
            let value = given.value.map_or("-".to_owned(), |value| value.display().to_string());
            format!("{line} {no}{} {value}", given.spec.long)
        });
        Ok(shown.collect())
    }

    #[test]
    fn one_option_a_line_with_comments_and_blanks() {
        let text = "# top\n\ntcp-established\n\t work-dir   /tmp/x  # where\nno-shell-job#end\n";
        assert_eq!(read(text).unwrap(), ["3 tcp-established -", "4 work-dir /tmp/x", "5 no-shell-job -"]);
    }

    #[test]
    fn quotes_hold_spaces_and_quotes() {
        let text = r#"action-script "echo \"a b\" \n""#;
        assert_eq!(read(text).unwrap(), [r#"1 action-script echo "a b" \n"#]);
        assert_eq!(read("work-dir \"\"").unwrap(), ["1 work-dir "]);
    }

    #[test]
    fn a_comment_begins_inside_a_value_too() {
        assert_eq!(read("log-file a#b").unwrap(), ["1 log-file a"]);
        assert_eq!(read("log-file \"a#b\"").unwrap_err(), "line 1: the closing quote is missing");
    }

    #[test]
    fn optional_values_can_be_given_in_both_ways() {
        assert_eq!(read("verbosity 4").unwrap(), ["1 verbosity 4"]);
        assert_eq!(read("verbosity=4").unwrap(), ["1 verbosity 4"]);
        assert_eq!(read("verbosity").unwrap(), ["1 verbosity -"]);
    }

    #[test]
    fn mistakes_name_their_line() {
        assert_eq!(read("\nnonsense").unwrap_err(), "line 2: no option --nonsense");
        assert_eq!(
            read("work-dir a b").unwrap_err(),
            "line 1: more than one word; put the value in double quotes"
        );
        assert_eq!(read("tree").unwrap_err(), "line 1: tree needs a value: PID");
        assert_eq!(read("shell-job yes").unwrap_err(), "line 1: shell-job takes no value");
        assert_eq!(read("work-dir \"a\" b").unwrap_err(), "line 1: something follows the closing quote");
        assert_eq!(
            read("--shell-job").unwrap_err(),
            "line 1: --shell-job: options are written without dashes here"
        );
        assert_eq!(read("help").unwrap_err(), "line 1: help has no place in a configuration file");
        assert!(read("dump").is_err(), "a command");
    }

    #[test]
    fn a_named_file_takes_the_place_of_the_default_files_only() {
        let environment = Environment { home: Some("/home/u".into()), config_file: Some("/env.conf".into()) };
        let shown = |line: &str| {
            let words = crate::options::parse::parse(line.split_whitespace().map(OsString::from)).unwrap();
            let files = files(&words.uses, &environment);
            files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(
            shown("dump"),
            [
                "/etc/criu/default.conf",
                "/etc/crtools/default.conf",
                "/home/u/.criu/default.conf",
                "/env.conf"
            ]
        );
        assert_eq!(shown("dump --no-default-config"), ["/env.conf"]);
        assert_eq!(shown("dump --config /a --config /b"), ["/env.conf", "/b"]);
        assert!(super::files(&[], &Environment::default()).len() == HOST_FILES.len());
    }
}
