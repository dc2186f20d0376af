//! The table as text for the terminal.

use super::{FEATURES, OPTIONS, OptionSpec, Section, Support, ValueKind};
use crate::command::{COMMANDS, CommandSpec, CommandSupport};
use std::fmt::Write;

const COLUMN: usize = 34;
const WIDTH: usize = 100;

/// How the program is called, in a few lines.
pub fn usage() -> String {
    let mut text = String::from("Usage: crtools COMMAND [OPTION]...\n\nCommands\n");
    for spec in COMMANDS.iter().filter(|spec| !spec.hidden) {
        entry(&mut text, &format!("  {}", command_heading(spec)), &note(spec.help, command_is_late(spec)));
    }
    text.push_str("\ncrtools --help lists the options.\n");
    text
}

/// Everything.
pub fn help() -> String {
    let mut text = usage();
    let short = "\ncrtools --help lists the options.\n";
    text.truncate(text.len() - short.len());
    for section in Section::ALL {
        let _ = writeln!(text, "\n{}", section.title());
        for spec in OPTIONS.iter().filter(|spec| spec.section == section) {
            if !matches!(spec.support, Support::Removed(_)) {
                entry(&mut text, &option_heading(spec), &option_help(spec));
            }
        }
    }
    text.push_str("\nFlags that --no-NAME turns off again\n");
    let negatable = OPTIONS.iter().filter(|spec| spec.negatable).map(|spec| spec.long);
    wrapped(&mut text, 2, &negatable.collect::<Vec<_>>().join(" "));
    text.push_str("\nFeatures that check --feature knows\n");
    wrapped(&mut text, 2, &FEATURES.join(" "));
    text.push_str(
        "\nConfiguration files, later ones win: /etc/criu/default.conf, /etc/crtools/default.conf,\n\
         $HOME/.criu/default.conf, $CRIU_CONFIG_FILE, --config FILE.\n",
    );
    text
}

/// Name and operands.
pub fn command_heading(spec: &CommandSpec) -> String {
    spec.operands.iter().fold(spec.name.to_owned(), |text, operand| format!("{text} {operand}"))
}

fn command_is_late(spec: &CommandSpec) -> bool {
    spec.support == CommandSupport::NotYet
}

fn note(help: &str, is_not_yet: bool) -> String {
    match is_not_yet {
        true => format!("{help} (not supported yet)"),
        false => help.to_owned(),
    }
}

/// The spellings of an option: `-t, --tree PID`.
fn option_heading(spec: &OptionSpec) -> String {
    let mut text = match spec.short {
        Some(letter) => format!("  -{letter}, "),
        None => "      ".to_owned(),
    };
    let _ = write!(text, "--{}", spec.long);
    for alias in spec.aliases {
        let _ = write!(text, ", --{alias}");
    }
    match spec.value {
        ValueKind::Flag => {}
        ValueKind::Required(what) => {
            let _ = write!(text, " {what}");
        }
        ValueKind::Optional(what) => {
            let _ = write!(text, "[={what}]");
        }
    }
    text
}

/// The sentence with what the table knows beside it.
pub fn option_help(spec: &OptionSpec) -> String {
    let mut text = spec.help.to_owned();
    if let Some(value) = spec.default {
        let _ = write!(text, " [{value}]");
    }
    note(&text, spec.is_not_yet())
}

fn entry(text: &mut String, heading: &str, help: &str) {
    let mut line = format!("{heading:COLUMN$}");
    if heading.len() >= COLUMN {
        let _ = writeln!(text, "{heading}");
        line = " ".repeat(COLUMN);
    }
    let mut rest = String::new();
    wrapped(&mut rest, COLUMN, help);
    let _ = write!(text, "{line}{}", &rest[COLUMN..]);
}

fn wrapped(text: &mut String, indent: usize, words: &str) {
    let mut column = usize::MAX;
    for word in words.split_whitespace() {
        if column == usize::MAX || column + 1 + word.len() > WIDTH {
            if column != usize::MAX {
                text.push('\n');
            }
            let _ = write!(text, "{:indent$}{word}", "");
            column = indent + word.len();
        } else {
            let _ = write!(text, " {word}");
            column += 1 + word.len();
        }
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_and_feature_is_in_the_help() {
        let text = help();
        for spec in OPTIONS.iter().filter(|spec| !matches!(spec.support, Support::Removed(_))) {
            assert!(text.contains(&format!("--{}", spec.long)), "--{}", spec.long);
        }
        for feature in FEATURES {
            assert!(text.contains(feature), "{feature}");
        }
    }

    #[test]
    fn no_line_is_too_long_and_none_ends_in_a_space() {
        for line in help().lines() {
            assert!(line.len() <= WIDTH, "{line}");
            assert_eq!(line, line.trim_end());
        }
    }

    #[test]
    fn what_is_not_supported_yet_says_so() {
        let text = help();
        let row = text.split("--libdir DIR").nth(1).unwrap().lines().next().unwrap();
        assert!(row.ends_with("(not supported yet)"), "{row}");
        let row = text.split("--tree PID").nth(1).unwrap().lines().next().unwrap();
        assert_eq!(row.trim(), "root of the process tree");
    }
}
