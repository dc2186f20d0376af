//! The one table of options. The command line, the configuration files, the RPC, the man page and
//! the completions are all made from it.

use std::path::PathBuf;

/// One option as it is spelled and documented.
#[derive(Debug)]
pub struct OptionSpec {
    /// Without the leading dashes.
    pub long: &'static str,
}

macro_rules! specs {
    ($($name:ident = $long:literal;)*) => {
        $(pub static $name: OptionSpec = OptionSpec { long: $long };)*
        pub static OPTIONS: &[&OptionSpec] = &[$(&$name),*];
    };
}

specs! {
    SHELL_JOB = "shell-job";
    TCP_ESTABLISHED = "tcp-established";
    EXT_UNIX_SK = "ext-unix-sk";
    LINK_REMAP = "link-remap";
    GHOST_LIMIT = "ghost-limit";
    FILE_LOCKS = "file-locks";
    EXTERNAL = "external";
}

/// What a run was asked to do, every source of options merged.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Root of the tree to dump, as seen from here.
    pub tree: Option<i32>,
    pub images_dir: PathBuf,
    /// Logs, statistics and the pid file; the images directory when not given.
    pub work_dir: PathBuf,
    pub leave_running: bool,
    pub leave_stopped: bool,
    pub restore_detached: bool,
    pub restore_sibling: bool,
    pub shell_job: bool,
    pub pidfile: Option<PathBuf>,
    pub timeout_s: u32,
    pub root: Option<PathBuf>,
    /// Print the plan of a restore and stop.
    pub dry_run: bool,
}
