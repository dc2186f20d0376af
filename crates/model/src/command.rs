//! The commands, as they are spelled on the command line.

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Command {
    Dump,
    PreDump,
    Restore,
    Check,
    PageServer,
    LazyPages,
    Service,
    Swrk,
    Dedup,
    Cpuinfo,
    Exec,
    Show,
}

/// How far a command is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandSupport {
    Yes,
    /// Known to CRIU; using it here is an error that says so.
    NotYet,
    /// CRIU dropped it too; the text says what took its place.
    Removed(&'static str),
}

/// One command as it is spelled and documented.
#[derive(Debug)]
pub struct CommandSpec {
    pub command: Command,
    pub name: &'static str,
    /// What follows the name: every word is needed.
    pub operands: &'static [&'static str],
    pub help: &'static str,
    pub support: CommandSupport,
    /// Not shown in the help: programs start it, people do not.
    pub hidden: bool,
}

const fn spec(
    command: Command,
    name: &'static str,
    support: CommandSupport,
    help: &'static str,
) -> CommandSpec {
    CommandSpec { command, name, operands: &[], help, support, hidden: false }
}

use CommandSupport::{NotYet, Removed, Yes};

pub static COMMANDS: &[CommandSpec] = &[
    spec(Command::Dump, "dump", Yes, "save a process tree to images, and end it"),
    spec(Command::PreDump, "pre-dump", Yes, "save only the memory of a tree, which runs on"),
    spec(Command::Restore, "restore", Yes, "bring a saved process tree back"),
    spec(Command::Check, "check", Yes, "ask the kernel for what dump and restore need"),
    spec(Command::PageServer, "page-server", Yes, "receive pages from a dump over the network"),
    spec(Command::LazyPages, "lazy-pages", Yes, "hand pages to restored tasks when they touch them"),
    spec(Command::Service, "service", NotYet, "answer requests on a UNIX socket"),
    CommandSpec {
        operands: &["FD"],
        hidden: true,
        ..spec(Command::Swrk, "swrk", NotYet, "answer the requests of the program that started this one")
    },
    spec(Command::Dedup, "dedup", Yes, "drop pages from parent images that newer images replace"),
    CommandSpec {
        operands: &["dump|check"],
        ..spec(Command::Cpuinfo, "cpuinfo", NotYet, "write down or compare the abilities of the processor")
    },
    CommandSpec {
        hidden: true,
        ..spec(Command::Exec, "exec", Removed("use `compel` to run system calls in a task"), "removed")
    },
    CommandSpec {
        hidden: true,
        ..spec(Command::Show, "show", Removed("use `crit` to look into images"), "removed")
    },
];

impl Command {
    /// The bit that stands for this command in [`crate::options::OptionSpec::commands`].
    pub const fn bit(self) -> u16 {
        1 << self as u8
    }

    pub fn spec(self) -> &'static CommandSpec {
        // Every variant is in the table: a test walks them.
        COMMANDS.iter().find(|spec| spec.command == self).expect("a command of the table")
    }

    pub fn by_name(name: &str) -> Option<&'static CommandSpec> {
        COMMANDS.iter().find(|spec| spec.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_row() {
        for bit in 0..=Command::Show as u8 {
            assert_eq!(COMMANDS.iter().filter(|spec| spec.command as u8 == bit).count(), 1);
        }
        assert_eq!(COMMANDS.len(), Command::Show as usize + 1);
    }
}
