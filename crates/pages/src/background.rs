//! Servers of pages in the background: this program again, which says when it can be reached.

use model::{Failure, Object, Options};
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdout, Command, Stdio};

/// A server that is being started.
#[derive(Debug)]
pub struct Starting {
    command: &'static str,
    pid: i32,
    status: Option<ChildStdout>,
}

fn explain(command: &'static str, error: &std::io::Error) -> Failure {
    sys::memory::io_errno("execve", error).on(Object::Named(command.into()), "start it in the background")
}

impl Starting {
    /// Waits until it says that it is ready (`--status-fd`). Returns its pid.
    ///
    /// # Errors
    /// When it ends before.
    pub fn ready(self) -> Result<i32, Failure> {
        let mut byte = [1];
        match self.status.map_or(Ok(0), |mut status| status.read(&mut byte)) {
            Ok(1) => Ok(self.pid),
            _ => {
                let why = "it ended at once; its log says why";
                Err(Failure::conflict(Object::Named(self.command.into()), "start it in the background", why))
            }
        }
    }
}

/// Starts this program with a command and its words, in a process group of its own.
///
/// # Errors
/// When it cannot be started.
pub fn begin<W: AsRef<OsStr>>(
    command: &'static str,
    words: impl IntoIterator<Item = W>,
) -> Result<Starting, Failure> {
    let mut program = Command::new("/proc/self/exe");
    program.arg0("crtools").arg(command).args(words);
    program.args(["--no-default-config", "--status-fd", "1"]);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
    let started = program.spawn().map_err(|error| explain(command, &error))?;
    Ok(Starting { command, pid: started.id() as i32, status: started.stdout })
}

/// The same, and waits until it is ready. Returns its pid.
///
/// # Errors
/// When it cannot be started, or ends before.
pub fn start<W: AsRef<OsStr>>(
    command: &'static str,
    words: impl IntoIterator<Item = W>,
) -> Result<i32, Failure> {
    begin(command, words)?.ready()
}

/// The words that say to a server how its connection is made.
pub fn connection_words(options: &Options) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    words.extend(options.address.iter().flat_map(|host| ["--address".into(), host.into()]));
    words.extend(options.port.iter().flat_map(|port| ["--port".into(), port.to_string().into()]));
    words.extend(options.ps_socket.iter().flat_map(|fd| ["--ps-socket".into(), fd.to_string().into()]));
    if options.tls {
        words.push("--tls".into());
        let files = [
            ("--tls-cacert", &options.tls_cacert),
            ("--tls-cacrl", &options.tls_cacrl),
            ("--tls-cert", &options.tls_cert),
            ("--tls-key", &options.tls_key),
        ];
        words.extend(files.into_iter().flat_map(|(name, file)| [name.into(), file.into()]));
        words.extend(options.tls_no_cn_verify.then(|| "--tls-no-cn-verify".into()));
    }
    words
}

/// What a server does when it can be reached: `fd` is what `--status-fd` names.
///
/// # Errors
/// When it is no descriptor that can be written to.
pub fn say_ready(fd: Option<i32>) -> Result<(), Failure> {
    let Some(number) = fd else { return Ok(()) };
    let explain = |error: model::Errno| {
        error.on(Object::Named(format!("--status-fd {number}")), "say that it is ready")
    };
    let status = sys::inherited::duplicate(number).map_err(explain)?;
    sys::inherited::close(number);
    sys::fd::write(&status, &[0]).map_err(explain).map(drop)
}
