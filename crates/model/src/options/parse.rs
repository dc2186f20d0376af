//! Words into uses of options, by the rules of getopt_long(3): options may stand before or after
//! operands, `--` ends them, long names may be cut short while they stay unique, short flags may
//! share one dash, and an optional value is only taken when it is glued to the option or follows `=`.

use super::request::UsageError;
use super::{OPTIONS, OptionSpec, ValueKind};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// One use of an option, not yet looked at.
#[derive(Debug, Clone)]
pub struct Use {
    pub spec: &'static OptionSpec,
    /// False for `--no-LONG`.
    pub on: bool,
    pub value: Option<OsString>,
}

/// A command line taken apart.
#[derive(Debug, Default)]
pub struct Words {
    pub uses: Vec<Use>,
    pub operands: Vec<OsString>,
}

/// Takes the words after the program's name apart.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Words, UsageError> {
    let mut words = Words::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            words.operands.extend(args);
            break;
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            words.uses.push(long_option(long, &mut args)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            short_options(&bytes[1..], &mut args, &mut words.uses)?;
        } else {
            words.operands.push(arg);
        }
    }
    Ok(words)
}

fn long_option(word: &[u8], args: &mut impl Iterator<Item = OsString>) -> Result<Use, UsageError> {
    let (name, glued) = match word.iter().position(|&byte| byte == b'=') {
        Some(at) => (&word[..at], Some(OsString::from_vec(word[at + 1..].to_vec()))),
        None => (word, None),
    };
    let (spec, on) = find_long(&String::from_utf8_lossy(name))?;
    let value = match (spec.value, glued) {
        (ValueKind::Flag, Some(_)) => {
            return Err(UsageError::new(format!("--{} takes no value", spec.long)));
        }
        (ValueKind::Required(what), None) => Some(args.next().ok_or_else(|| needs_value(spec, what))?),
        (_, glued) => glued,
    };
    Ok(Use { spec, on, value })
}

fn short_options(
    letters: &[u8],
    args: &mut impl Iterator<Item = OsString>,
    uses: &mut Vec<Use>,
) -> Result<(), UsageError> {
    for (at, &letter) in letters.iter().enumerate() {
        let spec = OPTIONS
            .iter()
            .find(|spec| spec.short == Some(letter as char))
            .ok_or_else(|| UsageError::new(format!("no option -{}", letter.escape_ascii())))?;
        let rest = OsStr::from_bytes(&letters[at + 1..]);
        let glued = (!rest.is_empty()).then(|| rest.to_owned());
        let value = match spec.value {
            ValueKind::Flag => {
                uses.push(Use { spec, on: true, value: None });
                continue;
            }
            ValueKind::Optional(_) => glued,
            ValueKind::Required(what) => {
                Some(glued.or_else(|| args.next()).ok_or_else(|| needs_value(spec, what))?)
            }
        };
        uses.push(Use { spec, on: true, value });
        break;
    }
    Ok(())
}

fn needs_value(spec: &OptionSpec, what: &str) -> UsageError {
    UsageError::new(format!("--{} needs a value: {what}", spec.long))
}

/// The option of that name, or the only one whose name begins so. The flag is false for `no-NAME`.
pub fn find_long(name: &str) -> Result<(&'static OptionSpec, bool), UsageError> {
    let mut found: Vec<(&'static OptionSpec, bool, String)> = Vec::new();
    for &spec in OPTIONS {
        for &spelled in spec.aliases.iter().chain([&spec.long]) {
            if spelled == name {
                return Ok((spec, true));
            }
            if spelled.starts_with(name) {
                found.push((spec, true, spelled.to_owned()));
            }
            if let Some(positive) = name.strip_prefix("no-")
                && spec.negatable
                && spelled == positive
            {
                return Ok((spec, false));
            }
            // Also for a name that ends within "no-".
            if spec.negatable && starts_with_no(spelled, name) {
                found.push((spec, false, format!("no-{spelled}")));
            }
        }
    }
    // An abbreviation means what it means to CRIU, whatever options of our own begin so.
    if found.iter().any(|(spec, ..)| !spec.own) {
        found.retain(|(spec, ..)| !spec.own);
    }
    let Some((spec, on, _)) = found.first() else {
        return Err(UsageError::new(format!("no option --{name}")));
    };
    // Two spellings of one option are no ambiguity.
    if found.iter().all(|(other, other_on, _)| std::ptr::eq(*other, *spec) && other_on == on) {
        return Ok((spec, *on));
    }
    let names: Vec<String> = found.iter().map(|(_, _, name)| format!("--{name}")).collect();
    Err(UsageError::new(format!("--{name} could be {}", names.join(", "))))
}

fn starts_with_no(spelled: &str, name: &str) -> bool {
    match name.strip_prefix("no-") {
        Some(positive) => spelled.starts_with(positive),
        None => "no-".starts_with(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options;

    /// Every use as `name=value`, then the operands.
    fn taken_apart(line: &str) -> Result<(Vec<String>, Vec<String>), String> {
        let words = parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())?;
        let uses = words.uses.iter().map(|given| {
            let name = if given.on { given.spec.long.to_owned() } else { format!("no-{}", given.spec.long) };
            match &given.value {
                Some(value) => format!("{name}={}", value.display()),
                None => name,
            }
        });
        let operands = words.operands.iter().map(|word| word.display().to_string());
        Ok((uses.collect(), operands.collect()))
    }

    fn uses(line: &str) -> Vec<String> {
        taken_apart(line).unwrap().0
    }

    fn refusal(line: &str) -> String {
        taken_apart(line).unwrap_err()
    }

    #[test]
    fn options_may_stand_on_both_sides_of_the_command() {
        let (uses, operands) = taken_apart("-t 5 dump --images-dir x -R").unwrap();
        assert_eq!(uses, ["tree=5", "images-dir=x", "leave-running"]);
        assert_eq!(operands, ["dump"]);
    }

    #[test]
    fn values_may_be_glued_or_in_the_next_word() {
        for line in ["-t5", "-t 5", "--tree 5", "--tree=5", "--tre=5", "--tre 5"] {
            assert_eq!(uses(line), ["tree=5"], "{line}");
        }
        assert_eq!(uses("--images-dir="), ["images-dir="]);
        assert_eq!(uses("-D=x"), ["images-dir==x"]);
        assert_eq!(uses("-o -"), ["log-file=-"]);
        assert_eq!(uses("-t --tree"), ["tree=--tree"], "a value may look like an option");
    }

    #[test]
    fn flags_may_share_a_dash_and_end_with_a_value() {
        assert_eq!(uses("-dSs"), ["restore-detached", "restore-sibling", "leave-stopped"]);
        assert_eq!(uses("-Rjt7"), ["leave-running", "shell-job", "tree=7"]);
        assert_eq!(uses("-dDx"), ["restore-detached", "images-dir=x"]);
    }

    #[test]
    fn an_optional_value_is_never_the_next_word() {
        let (given, operands) = taken_apart("-v 4").unwrap();
        assert_eq!((given, operands), (vec!["verbosity".to_owned()], vec!["4".to_owned()]));
        assert_eq!(uses("-v4"), ["verbosity=4"]);
        assert_eq!(uses("-vvv"), ["verbosity=vv"]);
        assert_eq!(uses("--verbosity=3"), ["verbosity=3"]);
        assert_eq!(uses("--cpu-cap"), ["cpu-cap"]);
        assert_eq!(uses("-x12,13"), ["ext-unix-sk=12,13"]);
        let (given, operands) = taken_apart("--cpu-cap all").unwrap();
        assert_eq!((given, operands), (vec!["cpu-cap".to_owned()], vec!["all".to_owned()]));
    }

    #[test]
    fn long_names_may_be_cut_while_unique() {
        assert_eq!(uses("--leave-r"), ["leave-running"]);
        assert_eq!(uses("--tcp-e"), ["tcp-established"]);
        assert_eq!(uses("--daem"), ["restore-detached"]);
        assert_eq!(uses("--no-shell"), ["no-shell-job"]);
        assert_eq!(uses("--no-def"), ["no-default-config"]);
        assert_eq!(refusal("--leave"), "--leave could be --leave-stopped, --leave-running");
        assert!(refusal("--no-").contains("--no-default-config"));
        assert!(refusal("--n").contains("--network-lock"));
    }

    #[test]
    fn a_whole_name_wins_over_longer_ones() {
        assert_eq!(uses("--tls"), ["tls"]);
        assert_eq!(uses("--all"), ["all"], "although --allow-uprobes begins so");
        assert_eq!(uses("--lazy-pages"), ["lazy-pages"]);
        assert_eq!(uses("--cgroup-props x"), ["cgroup-props=x"]);
        assert_eq!(uses("--config x"), ["config=x"]);
    }

    #[test]
    fn only_negatable_flags_can_be_undone() {
        assert_eq!(uses("--no-restore-detached --no-daemon"), ["no-restore-detached"; 2]);
        assert_eq!(refusal("--no-leave-running"), "no option --no-leave-running");
        assert_eq!(refusal("--no-tree"), "no option --no-tree");
        assert_eq!(refusal("--no-lazy-pages"), "no option --no-lazy-pages");
    }

    #[test]
    fn two_dashes_end_the_options() {
        let (given, operands) = taken_apart("restore -d -- -t 5 --").unwrap();
        assert_eq!(given, ["restore-detached"]);
        assert_eq!(operands, ["restore", "-t", "5", "--"]);
    }

    #[test]
    fn one_dash_is_an_operand() {
        assert_eq!(taken_apart("-").unwrap().1, ["-"]);
    }

    #[test]
    fn what_is_not_in_the_table_is_refused_by_name() {
        assert_eq!(refusal("--nonsense"), "no option --nonsense");
        assert_eq!(refusal("-q"), "no option -q");
        assert_eq!(refusal("--shell-job=yes"), "--shell-job takes no value");
        assert_eq!(refusal("--tree"), "--tree needs a value: PID");
        assert_eq!(refusal("-dt"), "--tree needs a value: PID");
        let bad = OsString::from_vec(vec![b'-', 0xff]);
        assert_eq!(parse([bad]).unwrap_err().to_string(), "no option -\\xff");
        let bad = OsString::from_vec(vec![b'-', b'-', 0xff]);
        assert!(parse([bad]).is_err());
    }

    #[test]
    fn values_need_not_be_text() {
        let bad = OsString::from_vec(vec![b'-', b'D', 0xff]);
        assert_eq!(parse([bad]).unwrap().uses[0].value, Some(OsString::from_vec(vec![0xff])));
    }

    #[test]
    fn our_own_options_make_no_abbreviation_of_criu_ambiguous() {
        for spec in options::OPTIONS.iter().filter(|spec| !spec.own) {
            for end in 1..spec.long.len() {
                let cut = &spec.long[..end];
                let criu_only = options::OPTIONS
                    .iter()
                    .filter(|other| !other.own)
                    .flat_map(|other| other.aliases.iter().chain([&other.long]))
                    .filter(|name| name.starts_with(cut))
                    .count();
                let negated = "no-".starts_with(cut) || cut.starts_with("no-");
                if criu_only == 1 && !negated {
                    assert!(find_long(cut).is_ok(), "--{cut}");
                }
            }
        }
    }
}
