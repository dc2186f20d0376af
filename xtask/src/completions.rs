//! Completions for three shells, from the table of options. What would only be refused is left out.

use model::command::{COMMANDS, CommandSpec, CommandSupport};
use model::options::{FEATURES, OPTIONS, OptionSpec, Support, ValueKind};
use std::fmt::Write;

const HEADER: &str = "# Made from the table of options by `cargo xtask generate`.\n";

fn options() -> impl Iterator<Item = &'static OptionSpec> {
    let is_usable = |spec: &&OptionSpec| matches!(spec.support, Support::Yes(_) | Support::Early);
    OPTIONS.iter().copied().filter(is_usable)
}

fn commands() -> impl Iterator<Item = &'static CommandSpec> {
    COMMANDS.iter().filter(|spec| spec.support == CommandSupport::Yes && !spec.hidden)
}

/// What the value of an option can be, as far as a shell can know.
enum Values {
    Nothing,
    Directory,
    File,
    Pid,
    Words(Vec<&'static str>),
    Unknown,
}

fn values(spec: &OptionSpec) -> Values {
    let (ValueKind::Required(what) | ValueKind::Optional(what)) = spec.value else {
        return Values::Nothing;
    };
    match (spec.long, what) {
        ("feature", _) => Values::Words(FEATURES.to_vec()),
        ("progress", _) => Values::Words(vec!["auto", "always", "never"]),
        ("verbosity", _) => Values::Words(vec!["0", "1", "2", "3", "4"]),
        ("file-validation", _) => Values::Words(vec!["filesize", "buildid"]),
        ("network-lock", _) => Values::Words(vec!["iptables", "nftables", "skip", "none"]),
        ("manage-cgroups", _) => Values::Words(vec!["ignore", "none"]),
        (_, "DIR") => Values::Directory,
        (_, "FILE" | "PATH") => Values::File,
        (_, "PID") => Values::Pid,
        _ => Values::Unknown,
    }
}

fn long_names(spec: &OptionSpec) -> Vec<String> {
    let names = spec.aliases.iter().chain([&spec.long]);
    let mut all: Vec<String> = names.map(|name| name.to_string()).collect();
    if spec.negatable {
        all.push(format!("no-{}", spec.long));
    }
    all
}

pub fn bash() -> String {
    let mut text = format!("{HEADER}_crtools() {{\n");
    text.push_str("    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}\n");
    // Bash takes --name=value apart at the equals sign.
    text.push_str("    [[ $word == = ]] && word=\n");
    text.push_str("    [[ $before == = ]] && before=${COMP_WORDS[COMP_CWORD-2]}\n");
    text.push_str("    case $before in\n");
    for spec in options() {
        let action = match values(spec) {
            Values::Nothing | Values::Unknown => continue,
            Values::Directory => "-d".to_owned(),
            Values::File => "-f".to_owned(),
            Values::Pid => "-W \"$(cd /proc && echo [0-9]*)\"".to_owned(),
            Values::Words(words) => format!("-W \"{}\"", words.join(" ")),
        };
        let short = match (spec.short, spec.value) {
            (Some(letter), ValueKind::Required(_)) => format!("-{letter}|"),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "        {short}--{}) mapfile -t COMPREPLY < <(compgen {action} -- \"$word\"); return ;;",
            spec.long
        );
    }
    text.push_str("    esac\n");
    let names: Vec<String> = options().flat_map(long_names).map(|name| format!("--{name}")).collect();
    let verbs: Vec<&str> = commands().map(|spec| spec.name).collect();
    let _ = writeln!(text, "    local options=\"{}\"", names.join(" "));
    let _ = writeln!(text, "    local commands=\"{}\"", verbs.join(" "));
    text.push_str("    [[ $word == -* ]] || options=$commands\n");
    text.push_str("    mapfile -t COMPREPLY < <(compgen -W \"$options\" -- \"$word\")\n");
    text.push_str("}\ncomplete -F _crtools crtools\n");
    text
}

pub fn zsh() -> String {
    let mut text = format!("#compdef crtools\n{HEADER}_arguments -s \\\n");
    for spec in options() {
        let help = spec.help.replace(['[', ']'], "").replace('\'', "").replace(':', ",");
        let value = match values(spec) {
            Values::Nothing => String::new(),
            Values::Directory => ":directory:_files -/".into(),
            Values::File => ":file:_files".into(),
            Values::Pid => ":pid:_pids".into(),
            Values::Words(words) => format!(":value:({})", words.join(" ")),
            Values::Unknown => ":value: ".into(),
        };
        let repeat = if spec.repeatable { "*" } else { "" };
        for name in long_names(spec) {
            let joint = match spec.value {
                ValueKind::Flag => "",
                ValueKind::Required(_) => "=",
                ValueKind::Optional(_) => "=-",
            };
            // Two colons: the value may be missing.
            let optional = if matches!(spec.value, ValueKind::Optional(_)) { ":" } else { "" };
            let _ = writeln!(text, "    '{repeat}--{name}{joint}[{help}]{optional}{value}' \\");
        }
        if let Some(letter) = spec.short {
            let joint = match spec.value {
                ValueKind::Flag => "",
                ValueKind::Required(_) => "+",
                ValueKind::Optional(_) => "-",
            };
            let optional = if matches!(spec.value, ValueKind::Optional(_)) { ":" } else { "" };
            let _ = writeln!(text, "    '{repeat}-{letter}{joint}[{help}]{optional}{value}' \\");
        }
    }
    let verbs: Vec<&str> = commands().map(|spec| spec.name).collect();
    let _ = writeln!(text, "    '1:command:({})'", verbs.join(" "));
    text
}

pub fn fish() -> String {
    let mut text = format!("{HEADER}complete -c crtools -f\n");
    for spec in commands() {
        let _ = writeln!(
            text,
            "complete -c crtools -n __fish_use_subcommand -a {} -d '{}'",
            spec.name, spec.help
        );
    }
    for spec in options() {
        let value = match (values(spec), spec.value) {
            (Values::Nothing, _) => String::new(),
            (Values::Directory, _) => " -x -a '(__fish_complete_directories)'".into(),
            (Values::File, _) => " -r -F".into(),
            (Values::Pid, _) => " -x -a '(__fish_complete_pids)'".into(),
            (Values::Words(words), ValueKind::Required(_)) => format!(" -x -a '{}'", words.join(" ")),
            (Values::Words(words), _) => format!(" -a '{}'", words.join(" ")),
            (Values::Unknown, ValueKind::Required(_)) => " -x".into(),
            (Values::Unknown, _) => String::new(),
        };
        let short = spec.short.map(|letter| format!(" -s {letter}")).unwrap_or_default();
        let help = spec.help.replace('\'', "");
        for (index, name) in long_names(spec).iter().enumerate() {
            let short = if index == 0 { short.as_str() } else { "" };
            let _ = writeln!(text, "complete -c crtools{short} -l {name}{value} -d '{help}'");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    #[test]
    fn every_usable_option_is_offered_and_no_other() {
        for (shell, text) in [("bash", bash()), ("zsh", zsh()), ("fish", fish())] {
            for spec in options() {
                assert!(text.contains(spec.long), "{shell}: --{}", spec.long);
            }
            assert!(!text.contains("tcp-established") || !model::options::TCP_ESTABLISHED.is_not_yet());
        }
    }

    #[test]
    fn bash_completes_commands_options_and_values() {
        let complete = |line: &str| {
            let words: Vec<&str> = line.split(' ').collect();
            let script = format!(
                "{}\nCOMP_WORDS=({}) COMP_CWORD={}\n_crtools\necho \"${{COMPREPLY[*]}}\"",
                bash(),
                words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
                words.len() - 1
            );
            let mut shell = Command::new("bash")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("the tests need bash");
            shell.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
            let output = shell.wait_with_output().unwrap();
            assert!(output.status.success());
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        assert_eq!(complete("crtools du"), "dump");
        assert_eq!(complete("crtools dump --leave-r"), "--leave-running");
        assert_eq!(complete("crtools dump --progress al"), "always");
        assert_eq!(complete("crtools dump --progress = n"), "never");
        assert_eq!(complete("crtools check --feature pagemap_scan_g"), "pagemap_scan_guard_pages");
    }
}
