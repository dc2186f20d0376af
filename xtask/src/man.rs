//! The manual page, from the table of options.

use model::command::{COMMANDS, CommandSupport};
use model::options::help::command_heading;
use model::options::{OPTIONS, OptionSpec, Section, Support, ValueKind};
use model::version;
use std::fmt::Write;

const INTRODUCTION: &str = r#".SH DESCRIPTION
.B crtools
stops a process tree, writes its whole state to a directory of images, and brings it back later with the
same process ids, memory, files and timers.
Its command line and its images are those of
.BR criu (8),
so that one can take the place of the other.
.PP
A command comes first; options may stand before and after it.
Long options may be cut short while they stay unique.
An optional value has to be joined to its option:
.B \-v4
or
.BR \-\-verbosity=4 .
Flags that have a
.BI \-\-no\- NAME
form are turned off with it, which undoes what a configuration file says.
.PP
Whatever cannot be carried is found before anything is changed, and all of it is reported together; the tree
then runs on. A state that the tree is only passing through, such as a connection with data in it that was not accepted
yet, is given a second to pass first.
.SH COMMANDS
"#;

const REST: &str = r#".SH SOCKETS OUTSIDE OF THE TREE
A UNIX datagram socket that is connected to a server outside of the tree, a client of
.I /dev/log
for instance, is refused: the message names the process, the descriptor, the server's name and who has it. With
.B \-\-ext\-unix\-sk
it is saved, with what it has not read, and connected again at the restore by the server's name: a path, a
relative path from the folder of the server, or an abstract name. The server may have been started anew meanwhile.
If it is missing, is no socket, is of another type, or serves nobody, the restore fails, says so, and leaves
nothing. Give the option to both commands.
.PP
A connection (stream, seqpacket) cannot be made again without notice of the other end. Leave it out with
.B \-\-external unix[INODE]
at the dump, and give a new one at the restore with
.BR "\-\-inherit\-fd fd[N]:socket:[INODE]" ,
where N is a descriptor of crtools itself.
.SH TERMINALS
A pseudoterminal of which the tree has the master is saved and made again with its number; if somebody else has that by
then, the restore fails and says who. One whose master is outside of the tree is refused, unless it is that of a shell
job
.RB ( \-\-shell\-job :
the terminal on which crtools runs takes its place, on both sides), or left out with
.B \-\-external tty[RDEV:DEV]
at the dump and given at the restore with
.BR "\-\-inherit\-fd fd[N]:tty[RDEV:DEV]" .
RDEV is the device of the terminal and DEV the one that its node lies on, both in hexadecimal; the refusal names them.
.SH REMOVED FILES
A file that is open or mapped and has no name any more travels in the images, up to
.B \-\-ghost\-limit
bytes allocated (1M): content, holes, size, owner, mode and times; folders, fifos, links and devices as well. After the
restore it is without a name again. Its old name exists for a moment; if somebody else has it by then, another
one beside it does.
.PP
A file that was opened under a name that is gone and lives on under others is refused. With
.B \-\-link\-remap
the dump makes a link
.I link_remap.N
beside the old name, which the restore removes. A failed dump leaves no link, and neither does
.BR \-\-leave\-running :
then the restore finds the file by its handle, as long as it exists.
.SH SNAPSHOTS AND WHAT CHANGED
With
.B \-\-leave\-running
the tree runs on as soon as its processes have been copied by
.BR fork (2);
memory is read from the copies. For a moment it may take twice the memory. When that is not free, when mappings are
not inherited (MADV_DONTFORK), or when an action script follows the steps, the tree stands still until all is saved;
.B \-\-copy\-on\-write
asks for copies in spite of scripts.
.PP
.B pre\-dump
saves memory alone. From then on a process named
.I crtools\-keeper
holds what notes changes of the tree, until the tree ends or is dumped. A later
.B pre\-dump
or
.B dump
with
.B \-\-prev\-images\-dir
saves what has changed, and makes a link
.I parent
to the folder before, which a restore needs too. When the keeper was killed, everything is saved.
.SH MEMORY THAT COMES LATER
With
.B restore \-\-lazy\-pages
the tree runs before its memory is there. A server,
.BR "crtools lazy\-pages" ,
is started if none waits in the work directory, and stays until all has come. If it is killed before, what has not come
reads as zeros.
.PP
With
.B \-\-record\-working\-set
nothing comes but what is touched, until nothing was for a second (thirty at most); that is noted in
.I working\-set.img
and comes first in later lazy restores from this folder.
.PP
With
.B \-\-auto\-dedup
pages are freed in the images when the tree runs and has them, one by one if it has one process, otherwise in the end. These
folders, and those before, then hold no dump any more.
.PP
.B dump \-\-lazy\-pages
writes images without the memory that can come later, and keeps the tree stopped until the other host has asked for all
of it, at
.BR \-\-port .
There,
.B restore \-\-lazy\-pages \-\-page\-server
with
.B \-\-address
and
.B \-\-port
(or
.B lazy\-pages
with the latter three) asks. When all has come, the dump ends the tree. If nobody asks, or the restore fails before the tree
runs, it runs on here. If the connection breaks midway, the dump leaves the tree stopped, with all of its memory, and the
restored tree is ended by SIGBUS where it touches what has not come (before Linux 6.6 it finds zeros); see that it is gone,
and let the tree here go on with
.BR "kill \-CONT" .
Processes that share memory copy-on-write each have their own afterwards.
.SH ENCRYPTED PAGE TRANSFER
With
.B \-\-tls
on both sides, pages are encrypted between
.B dump
or
.B pre\-dump
and
.BR page\-server ,
and between
.B dump \-\-lazy\-pages
and
.B lazy\-pages
or
.BR restore .
Each side shows the certificate
.B \-\-tls\-cert
and trusts those that
.B \-\-tls\-cacert
has signed and
.B \-\-tls\-cacrl
does not list. Who connects also compares
.B \-\-address
with the names in the certificate (subjectAltName). Files are in the form of PEM, and relative to the work directory.
.SH CONFIGURATION FILES
Read in this order, later ones win:
.IR /etc/criu/default.conf ,
.IR /etc/crtools/default.conf ,
.IR $HOME/.criu/default.conf ,
the file that
.B CRIU_CONFIG_FILE
names, the file of
.BR \-\-config ,
then the command line.
.B \-\-config
takes the place of the first three,
.B \-\-no\-default\-config
leaves them out.
A file that does not exist is passed over.
.PP
Each line holds one option without its dashes, then its value, in double quotes if it has spaces; a quote
inside is written \e\(dq.
A # begins a comment wherever it stands.
.SH ACTION SCRIPTS
The command of
.B \-\-action\-script
runs by the shell at each step of the work, with these variables set:
.TP
.B CRTOOLS_SCRIPT_ACTION
The step: pre\-dump, post\-dump, pre\-restore, post\-restore, pre\-resume, post\-resume, network\-lock,
network\-unlock, setup\-namespaces, post\-setup\-namespaces and others.
.TP
.B CRTOOLS_IMAGE_DIR
Where the images are.
.TP
.B CRTOOLS_INIT_PID
The root of the tree, where it is known.
.PP
Where several are given the last runs first, and the first that fails ends the series.
.SH EXIT STATUS
.TP
.B 0
Done.
A restore that stays until the tree ends does not report the status of the tree.
.TP
.B 1
Refused or failed, also for a mistake on the command line; the log says why.
.TP
.B 255
The command does not exist any more.
.PP
A post\-dump script that fails decides the status itself, and the tree runs on.
.SH LOG
Errors are printed to standard error, and to the log file if there is one.
From level 3 up each line begins with the time since the start in seconds.
.SH EXAMPLES
.nf
crtools dump \-t 4242 \-D images             # saved, and gone
crtools restore \-D images \-d               # back again
crtools dump \-t 4242 \-D images \-R          # saved; it runs on
crtools check                              # will it work on this host?
.fi
.SH SEE ALSO
.BR criu (8),
.BR ptrace (2),
.BR namespaces (7)
"#;

/// The page, in the man macros.
pub fn page() -> String {
    let mut page = String::from(".\\\" Made from the table of options by `cargo xtask generate`.\n");
    let _ = writeln!(page, ".TH CRTOOLS 8 \"\" \"crtools {}\" \"System Administration\"", version::CRTOOLS);
    page.push_str(".SH NAME\ncrtools \\- save running processes to images, and bring them back\n");
    page.push_str(".SH SYNOPSIS\n.B crtools\n.I COMMAND\n.RI [ OPTION ]...\n");
    page.push_str(INTRODUCTION);
    for spec in COMMANDS.iter().filter(|spec| !spec.hidden) {
        let late = late(spec.support == CommandSupport::NotYet);
        let heading = command_heading(spec);
        let _ = writeln!(page, ".TP\n.B {}\n{}.{late}", escaped(&heading), escaped(&sentence(spec.help)));
    }
    page.push_str(".SH OPTIONS\n");
    for section in Section::ALL {
        let _ = writeln!(page, ".SS {}", section.title());
        let shown = |spec: &&&OptionSpec| !matches!(spec.support, Support::Removed(_));
        for spec in OPTIONS.iter().filter(|spec| spec.section == section).filter(shown) {
            option(&mut page, spec);
        }
    }
    page.push_str(REST);
    page
}

fn option(page: &mut String, spec: &OptionSpec) {
    let mut names: Vec<String> = spec.short.iter().map(|letter| format!("-{letter}")).collect();
    names.push(format!("--{}", spec.long));
    names.extend(spec.aliases.iter().map(|alias| format!("--{alias}")));
    if spec.negatable {
        names.push(format!("--no-{}", spec.long));
    }
    let names: Vec<String> = names.iter().map(|name| format!("\\fB{}\\fR", escaped(name))).collect();
    let value = match spec.value {
        ValueKind::Flag => String::new(),
        ValueKind::Required(what) => format!(" \\fI{}\\fR", escaped(what)),
        ValueKind::Optional(what) => format!("[=\\fI{}\\fR]", escaped(what)),
    };
    let _ = writeln!(page, ".TP\n{}{value}", names.join(", "));
    let _ = write!(page, "{}.", escaped(&sentence(spec.help)));
    if let Some(value) = spec.default {
        let _ = write!(page, " The default is {}.", escaped(value));
    }
    if spec.repeatable {
        page.push_str(" May be given several times.");
    }
    if spec.own {
        page.push_str(" CRIU does not have it.");
    }
    let _ = writeln!(page, "{}", late(spec.is_not_yet()));
}

fn late(is_not_yet: bool) -> &'static str {
    if is_not_yet { " Not supported yet: using it is an error." } else { "" }
}

fn sentence(help: &str) -> String {
    let mut letters = help.chars();
    match letters.next() {
        // An option's name keeps its spelling.
        Some(first) if first != '-' => first.to_uppercase().chain(letters).collect(),
        _ => help.to_owned(),
    }
}

/// Dashes that are to be copied to a shell, and what would begin a request, are written for roff.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-").replace('^', "\\(ha")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_is_on_the_page_with_its_letter() {
        let page = page();
        for spec in OPTIONS.iter().filter(|spec| !matches!(spec.support, Support::Removed(_))) {
            assert!(page.contains(&escaped(&format!("--{}", spec.long))), "--{}", spec.long);
            if let Some(letter) = spec.short {
                assert!(page.contains(&format!("\\fB\\-{letter}\\fR, ")), "-{letter}");
            }
        }
    }

    #[test]
    fn no_text_begins_a_request_by_chance() {
        for line in page().lines().filter(|line| line.starts_with('.')) {
            let known =
                [".TH", ".SH", ".SS", ".TP", ".B", ".BR", ".RB", ".I", ".RI", ".PP", ".nf", ".fi", ".\\\""];
            assert!(known.iter().any(|request| line.starts_with(request)), "{line}");
        }
    }
}
