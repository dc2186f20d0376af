//! A client of a dbus-daemon that is outside of the tree, as nearly every service of a machine is one.
//!
//! A connection to it cannot be made again unnoticed, for the daemon would see a stranger. It is left out of the
//! dump by name, and the restore is given another one, on which the daemon knows its client already.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Instant;

use super::{PATIENCE, Program, bus, command, put, wait_for};
use crate::case::Moment;
use crate::reap::quiet;
use crate::subject::{Subject, says};
use crate::sys;
use crate::tool::read_lossy;

/// The calls of a look.
const SOME: u64 = 5;
/// The descriptor that the tool inherits.
const NUMBER: i32 = 100;

#[derive(Default)]
pub struct BusClient {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    daemon: i32,
    bus: PathBuf,
    given: Option<OwnedFd>,
}

/// Reads one message: 16 bytes that tell how long the rest is. Source: D-Bus Specification, "Message Format".
fn skip_message(from: &mut impl Read) -> io::Result<()> {
    let mut head = [0; 16];
    from.read_exact(&mut head)?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (fields, body) = (word(12).next_multiple_of(8), word(4));
    io::copy(&mut from.take(u64::from(fields + body)), &mut io::sink()).map(drop)
}

/// The call that a bus wants first: little endian, a method call, version 1, no body, serial 1; then its fields.
fn hello() -> Vec<u8> {
    const PATH: u8 = 1;
    const INTERFACE: u8 = 2;
    const MEMBER: u8 = 3;
    const DESTINATION: u8 = 6;
    let mut fields = Vec::new();
    for (code, kind, text) in [
        (PATH, b'o', "/org/freedesktop/DBus"),
        (INTERFACE, b's', "org.freedesktop.DBus"),
        (MEMBER, b's', "Hello"),
        (DESTINATION, b's', "org.freedesktop.DBus"),
    ] {
        fields.resize(usize::next_multiple_of(fields.len(), 8), 0);
        fields.extend([code, 1, kind, 0]);
        fields.extend((text.len() as u32).to_le_bytes());
        fields.extend(text.as_bytes());
        fields.push(0);
    }
    let mut message = vec![b'l', 1, 0, 1];
    for word in [0, 1, fields.len() as u32] {
        message.extend(u32::to_le_bytes(word));
    }
    message.extend(&fields);
    message.resize(message.len().next_multiple_of(8), 0);
    message
}

/// A connection that the daemon has accepted as that of a client, with nothing unread in it.
fn connect(bus: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(bus)?;
    let (mut to, mut from) = (&stream, BufReader::new(&stream));
    let me: String = nix::unistd::getuid().to_string().bytes().map(|digit| format!("{digit:02x}")).collect();
    to.write_all(format!("\0AUTH EXTERNAL {me}\r\n").as_bytes())?;
    let mut line = String::new();
    from.read_line(&mut line)?;
    if !line.starts_with("OK ") {
        return Err(io::Error::other(format!("the daemon says {line:?}")));
    }
    to.write_all(&[b"BEGIN\r\n", &hello()[..]].concat())?;
    // The name that it has, and that it has it.
    skip_message(&mut from)?;
    skip_message(&mut from)?;
    assert!(from.buffer().is_empty());
    drop(from);
    Ok(stream)
}

/// The inode of the one socket of a process.
fn socket_of(pid: i32) -> Result<String, String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).map_err(|e| format!("list descriptors: {e}"))?;
    let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .next()
        .ok_or_else(|| "the client has no socket".into())
}

impl Program for BusClient {
    fn name(&self) -> &'static str {
        "dbus-client"
    }

    fn needs(&self) -> &'static [&'static str] {
        &["dbus-daemon", "python3"]
    }

    fn command(&self, own: &Path) -> Result<Command, String> {
        let outside = own.with_file_name("outside");
        fs::create_dir(&outside).map_err(|e| format!("make the daemon's directory: {e}"))?;
        bus::configure(&outside)?;
        let mut daemon = command("dbus-daemon")?;
        daemon.arg("--config-file").arg(outside.join("bus.conf")).args(["--nofork", "--nopidfile"]);
        quiet(&mut daemon, &outside.join("log")).map_err(|e| format!("write the daemon's log: {e}"))?;
        let daemon = daemon.spawn().map_err(|e| format!("start dbus-daemon: {e}"))?;
        let bus = outside.join("bus");
        let start = Instant::now();
        while UnixStream::connect(&bus).is_err() {
            if start.elapsed() > PATIENCE {
                return Err(format!("the daemon does not listen: {}", read_lossy(&outside.join("log"))));
            }
            sys::nap();
        }
        let address = format!("unix:path={}", bus.display());
        *self.state.lock().map_err(|e| e.to_string())? =
            State { daemon: daemon.id() as i32, bus, given: None };
        put(&own.join("client.py"), include_str!("bus_client.py"))?;
        let mut python = command("python3")?;
        python.args(["-B", "client.py", &address]);
        Ok(python)
    }

    fn outside(&self, subject: &mut Subject, moment: Moment) -> Result<(), String> {
        let mut state = self.state.lock().map_err(|e| e.to_string())?;
        let inode = socket_of(subject.pid);
        match moment {
            Moment::Ready => {
                let inode = inode?;
                subject.more_for_dump.clear();
                let images = subject.step("images")?;
                let ran = subject.dump(&images, &[])?;
                if ran.exit_code() != Some(1) {
                    return Err(format!("a dump without options should be refused, but: {:?}", ran.status));
                }
                let (pid, daemon) =
                    (format!("pid {}: fd ", subject.pid), format!("process {} (dbus-daemon)", state.daemon));
                let bus = state.bus.display().to_string();
                says(&ran.said, &[&pid, &daemon, &bus, "--external unix[", "--inherit-fd"])?;
                subject.still_there("after the refusal")?;
                subject.more_for_dump = vec!["--external".into(), format!("unix[{inode}]")];
                subject.more_for_restore =
                    vec!["--inherit-fd".into(), format!("fd[{NUMBER}]:socket:[{inode}]")];
            }
            _ => {
                let stream = connect(&state.bus).map_err(|e| format!("connect to the bus: {e}"))?;
                // Without close-on-exec, so that the tool inherits it.
                // SAFETY: integers; nobody else uses this number.
                if unsafe { libc::dup2(stream.as_raw_fd(), NUMBER) } != NUMBER {
                    return Err(format!("duplicate the connection: {}", io::Error::last_os_error()));
                }
                if state.given.is_none() {
                    // SAFETY: the number was just made, and belongs to nobody else.
                    state.given = Some(unsafe { OwnedFd::from_raw_fd(NUMBER) });
                }
            }
        }
        Ok(())
    }

    fn look(&self, subject: &mut Subject, before: u64) -> Result<u64, String> {
        subject.bystanders = vec![self.state.lock().map_err(|e| e.to_string())?.daemon];
        let wanted = before + SOME;
        let new = subject.own("asked.new");
        put(&new, &wanted.to_string())?;
        fs::rename(&new, subject.own("asked")).map_err(|e| format!("ask: {e}"))?;
        let file = subject.own("answered");
        wait_for(subject, "answers", || match read_lossy(&file) {
            text if text.is_empty() => Ok(None),
            text => match text.parse::<u64>() {
                Ok(count) => Ok((count == wanted).then_some(count)),
                Err(_) => Err(format!("the client says: {text}")),
            },
        })
    }
}
