//! The one table of options. The command line, the configuration files, the RPC, the man page and
//! the completions are all made from it.
//!
//! `table` holds the rows, `parse` reads words by the rules of getopt_long(3), `config` reads
//! configuration files, `request` merges every source into [`Options`], `help` prints the table.

pub mod config;
pub mod help;
pub mod parse;
pub mod request;
pub mod table;

pub use request::{Request, UsageError};
pub use table::*;

use crate::command::Command;
use crate::progress::ProgressSink;
use std::ffi::OsStr;
use std::path::PathBuf;

/// One option as it is spelled and documented.
#[derive(Debug)]
pub struct OptionSpec {
    /// Without the leading dashes.
    pub long: &'static str,
    /// Other long spellings of the same option.
    pub aliases: &'static [&'static str],
    pub short: Option<char>,
    pub value: ValueKind,
    /// `--no-LONG` exists, and undoes what an earlier source said.
    pub negatable: bool,
    /// Every use adds; otherwise the last use wins.
    pub repeatable: bool,
    /// The value that holds when the option is not given, as it would be written.
    pub default: Option<&'static str>,
    /// The commands that look at it, one [`Command::bit`] each; the others ignore it.
    pub commands: u16,
    pub section: Section,
    /// One sentence without a full stop.
    pub help: &'static str,
    pub support: Support,
    /// CRIU does not have it.
    pub own: bool,
}

/// What follows an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueKind {
    Flag,
    /// In the next word, after `=`, or glued to the short letter.
    Required(&'static str),
    /// Only after `=`, or glued to the short letter.
    Optional(&'static str),
}

/// How far an option is carried.
#[derive(Debug, Clone, Copy)]
pub enum Support {
    Yes(Setter),
    /// Looked at while the sources of options are found, before any is merged: `--help`, `--config`.
    Early,
    /// Known to CRIU; using it here is an error that says so, and nothing is touched.
    NotYet,
    /// CRIU dropped it too.
    Removed(&'static str),
}

/// Writes one use of an option into the options; the error says what is wrong with the value.
pub type Setter = fn(&mut Options, &Given<'_>) -> Result<(), String>;

/// One use of an option.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// False for `--no-LONG`.
    pub on: bool,
    pub value: Option<&'a OsStr>,
}

/// Where an option stands in the help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Generic,
    Files,
    Network,
    Cgroups,
    Memory,
    Session,
    Check,
}

impl Section {
    pub const ALL: [Section; 7] = [
        Section::Generic,
        Section::Files,
        Section::Network,
        Section::Cgroups,
        Section::Memory,
        Section::Session,
        Section::Check,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Section::Generic => "General",
            Section::Files => "Files and mounts",
            Section::Network => "Sockets and network",
            Section::Cgroups => "Control groups",
            Section::Memory => "Memory and page transfer",
            Section::Session => "Sessions",
            Section::Check => "Check",
        }
    }
}

impl OptionSpec {
    const fn new(long: &'static str, value: ValueKind) -> OptionSpec {
        OptionSpec {
            long,
            aliases: &[],
            short: None,
            value,
            negatable: false,
            repeatable: false,
            default: None,
            commands: ANY_COMMAND,
            section: Section::Generic,
            help: "",
            support: Support::NotYet,
            own: false,
        }
    }

    const fn flag(long: &'static str) -> OptionSpec {
        OptionSpec::new(long, ValueKind::Flag)
    }

    const fn required(long: &'static str, placeholder: &'static str) -> OptionSpec {
        OptionSpec::new(long, ValueKind::Required(placeholder))
    }

    const fn optional(long: &'static str, placeholder: &'static str) -> OptionSpec {
        OptionSpec::new(long, ValueKind::Optional(placeholder))
    }

    const fn aliases(mut self, aliases: &'static [&'static str]) -> OptionSpec {
        self.aliases = aliases;
        self
    }

    const fn short(mut self, letter: char) -> OptionSpec {
        self.short = Some(letter);
        self
    }

    const fn negatable(mut self) -> OptionSpec {
        self.negatable = true;
        self
    }

    const fn repeatable(mut self) -> OptionSpec {
        self.repeatable = true;
        self
    }

    const fn default(mut self, value: &'static str) -> OptionSpec {
        self.default = Some(value);
        self
    }

    const fn of(mut self, commands: u16) -> OptionSpec {
        self.commands = commands;
        self
    }

    const fn section(mut self, section: Section) -> OptionSpec {
        self.section = section;
        self
    }

    const fn help(mut self, help: &'static str) -> OptionSpec {
        self.help = help;
        self
    }

    const fn sets(mut self, setter: Setter) -> OptionSpec {
        self.support = Support::Yes(setter);
        self
    }

    const fn early(mut self) -> OptionSpec {
        self.support = Support::Early;
        self
    }

    const fn removed(mut self, why: &'static str) -> OptionSpec {
        self.support = Support::Removed(why);
        self
    }

    const fn own(mut self) -> OptionSpec {
        self.own = true;
        self
    }

    /// Does this command look at it?
    pub fn concerns(&self, command: Command) -> bool {
        self.commands & command.bit() != 0
    }

    /// Using it is an error for now.
    pub fn is_not_yet(&self) -> bool {
        matches!(self.support, Support::NotYet)
    }
}

/// How a reopened file is compared with the one that was dumped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FileValidation {
    Filesize,
    #[default]
    Buildid,
}

/// Parts of the processor that have to be the same where images are restored (`--cpu-cap`).
/// The bits are those of the RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuCap(pub u32);

impl CpuCap {
    pub const FPU: u32 = 1;
    pub const CPU: u32 = 2;
    pub const INS: u32 = 4;
    /// `cpuinfo.img` is written by a dump and compared by a restore: any use of the option.
    pub const IMAGE: u32 = 8;

    pub fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

impl Default for CpuCap {
    fn default() -> CpuCap {
        CpuCap(CpuCap::FPU | CpuCap::INS)
    }
}

/// How live connections are kept silent while their owner is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NetworkLock {
    #[default]
    Iptables,
    Nftables,
    Skip,
}

/// How pages are compressed (`--compress`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Lz4,
    Zstd,
}

impl Compression {
    pub const ALL: [Compression; 2] = [Compression::Lz4, Compression::Zstd];

    /// As the option has it.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }
}

/// What is done about the control groups of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ManageCgroups {
    /// Restored tasks stay in the group the restore runs in.
    #[default]
    Ignore,
    /// No group is made or changed.
    None,
}

/// When progress is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProgressMode {
    /// On a terminal, when the run takes long.
    #[default]
    Auto,
    Always,
    Never,
}

/// What `check` was asked for.
#[derive(Debug, Clone, Default)]
pub struct CheckOptions {
    pub extra: bool,
    pub experimental: bool,
    pub features: Vec<String>,
}

/// What a run was asked to do, every source of options merged.
#[derive(Debug, Clone)]
pub struct Options {
    /// Root of the tree to dump, as seen from here.
    pub tree: Option<i32>,
    /// Absolute once the command line is read.
    pub images_dir: PathBuf,
    /// Logs, statistics and the pid file; the images directory when not given. Absolute once the
    /// command line is read, and then also the current directory.
    pub work_dir: PathBuf,
    pub leave_running: bool,
    pub leave_stopped: bool,
    /// Let the tree run on while its memory is read from copies; absent for where that is sure to be right.
    pub copy_on_write: Option<bool>,
    /// Save memory before the tree is frozen; absent for where that shortens the time in which it stands still.
    pub pre_copy: Option<bool>,
    /// Store pages once that relatives share.
    pub share_pages: bool,
    /// Of a dump: secret memory is stored, too.
    pub secret_memory: bool,
    /// Relative to the images directory.
    pub prev_images_dir: Option<PathBuf>,
    pub track_mem: bool,
    pub compress: Option<Compression>,
    pub auto_dedup: bool,
    /// Of a dump: memory goes to a server.
    pub page_server: bool,
    pub address: Option<String>,
    pub port: Option<u16>,
    /// An inherited connection to the server, or from the dump.
    pub ps_socket: Option<i32>,
    /// Pages are encrypted on their way, and both ends show certificates.
    pub tls: bool,
    /// PEM files, relative to the work directory: who is trusted; who is no more; what we show, and its key.
    pub tls_cacert: PathBuf,
    pub tls_cacrl: PathBuf,
    pub tls_cert: PathBuf,
    pub tls_key: PathBuf,
    /// The name in the certificate of a server does not matter.
    pub tls_no_cn_verify: bool,
    /// Of a restore: memory comes when it is touched.
    pub lazy_pages: bool,
    /// Of a lazy restore: what is touched first is written down.
    pub record_working_set: bool,
    /// An inherited descriptor that gets a zero byte when a server is ready.
    pub status_fd: Option<i32>,
    pub restore_detached: bool,
    pub restore_sibling: bool,
    pub shell_job: bool,
    /// Absolute once the command line is read. Made exclusively, mode 0600, no newline.
    pub pidfile: Option<PathBuf>,
    pub timeout_s: u32,
    pub root: Option<PathBuf>,
    /// Print the plan of a restore and stop.
    pub dry_run: bool,
    /// Relative to the work directory; `-` is standard output.
    pub log_file: Option<PathBuf>,
    /// 0 (nothing) to 4 (debug).
    pub log_level: u8,
    /// In the order given; [`crate::Hooks`] runs them last first.
    pub action_scripts: Vec<String>,
    pub display_stats: bool,
    /// Inodes of UNIX sockets that may have a peer outside of the tree; empty for all, absent for none.
    pub ext_unix_sk: Option<Vec<u32>>,
    /// Keys of what is left out of the images.
    pub external: Vec<String>,
    /// Our descriptors that stand for what was left out, with its keys.
    pub inherit_fd: Vec<(i32, String)>,
    pub link_remap: bool,
    pub file_locks: bool,
    /// Bytes that a file without a name may have allocated to be stored.
    pub ghost_limit: u64,
    pub force_irmap: bool,
    pub irmap_scan_paths: Vec<PathBuf>,
    pub skip_file_rwx_check: bool,
    pub file_validation: FileValidation,
    pub cpu_cap: CpuCap,
    pub manage_cgroups: ManageCgroups,
    pub network_lock: NetworkLock,
    /// Descriptors that the caller left open by mistake; closed before anything else.
    pub close: Vec<i32>,
    pub check: CheckOptions,
    pub progress_mode: ProgressMode,
    /// Where the engines tell how far they are. Silent unless somebody listens.
    pub progress: ProgressSink,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            tree: None,
            images_dir: PathBuf::from("."),
            work_dir: PathBuf::new(),
            leave_running: false,
            leave_stopped: false,
            copy_on_write: None,
            pre_copy: None,
            share_pages: true,
            secret_memory: false,
            prev_images_dir: None,
            track_mem: false,
            compress: None,
            auto_dedup: false,
            page_server: false,
            address: None,
            port: None,
            ps_socket: None,
            tls: false,
            tls_cacert: "/etc/pki/CA/cacert.pem".into(),
            tls_cacrl: "/etc/pki/CA/cacrl.pem".into(),
            tls_cert: "/etc/pki/criu/cert.pem".into(),
            tls_key: "/etc/pki/criu/private/key.pem".into(),
            tls_no_cn_verify: false,
            lazy_pages: false,
            record_working_set: false,
            status_fd: None,
            restore_detached: false,
            restore_sibling: false,
            shell_job: false,
            pidfile: None,
            timeout_s: 10,
            root: None,
            dry_run: false,
            log_file: None,
            log_level: 2,
            action_scripts: Vec::new(),
            display_stats: false,
            link_remap: false,
            file_locks: false,
            ghost_limit: 1 << 20,
            force_irmap: false,
            irmap_scan_paths: Vec::new(),
            ext_unix_sk: None,
            external: Vec::new(),
            inherit_fd: Vec::new(),
            skip_file_rwx_check: false,
            file_validation: FileValidation::default(),
            cpu_cap: CpuCap::default(),
            manage_cgroups: ManageCgroups::default(),
            network_lock: NetworkLock::default(),
            close: Vec::new(),
            check: CheckOptions::default(),
            progress_mode: ProgressMode::default(),
            progress: ProgressSink::default(),
        }
    }
}
