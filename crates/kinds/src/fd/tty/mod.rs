//! Terminals: pseudoterminals of the tree, the one of a shell job, consoles and serial lines.
//!
//! Read from: fstat(2), ioctl_tty(2) through a duplicate; whose terminal it is from `/proc/PID/stat`, which also tells
//! of one that no descriptor shows.
//! Rebuilt by: opening the multiplexer until it gives the same number; a session's leader takes its terminal before
//! it has children, which have it from birth; foreground groups are set when all groups are there.
//! Queues: see [`queue`].
//! Refused: slaves whose master is outside of the tree, but for the terminal of a shell job (`--shell-job`) and those
//! that are passed in (`--external tty[RDEV:DEV]`, `--inherit-fd`); line disciplines other than the usual one.
//! Not kept: the state of consoles and serial lines; a status of packet mode that nobody has read.

mod queue;

pub use queue::Queues;
use queue::Stop;

use super::regular;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, open_flags, reopen, set_status};
use image::{FdTypes, FownEntry, kind};
use model::options;
use model::{Errno, Failure, Failures, Object};
use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use sys::tty::{Termios, Winsize};

pub static KIND: Tty = Tty;

#[derive(Debug)]
pub struct Tty;

/// `regf_id` names the record of its path.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub tty_info_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, optional, tag = "6")]
    pub regf_id: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum TtyType {
    Unknown = 0,
    Pty = 1,
    Console = 2,
    Vt = 3,
    Ctty = 4,
    ExtTty = 5,
    Serial = 6,
}

/// `tty-info.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyInfoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(enumeration = "TtyType", required, tag = "2")]
    pub r#type: i32,
    #[prost(bool, required, tag = "3")]
    pub locked: bool,
    #[prost(bool, required, tag = "4")]
    pub exclusive: bool,
    #[prost(bool, required, tag = "5")]
    pub packet_mode: bool,
    #[prost(uint32, required, tag = "6")]
    pub sid: u32,
    #[prost(uint32, required, tag = "7")]
    pub pgrp: u32,
    #[prost(uint32, required, tag = "8")]
    pub rdev: u32,
    #[prost(message, optional, tag = "9")]
    pub termios: Option<TermiosEntry>,
    #[prost(message, optional, tag = "10")]
    pub termios_locked: Option<TermiosEntry>,
    #[prost(message, optional, tag = "11")]
    pub winsize: Option<WinsizeEntry>,
    #[prost(message, optional, tag = "12")]
    pub pty: Option<TtyPtyEntry>,
    #[prost(uint32, optional, tag = "13")]
    pub dev: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub uid: Option<u32>,
    #[prost(uint32, optional, tag = "15")]
    pub gid: Option<u32>,
    /// Ours: nobody is at the other end any more.
    #[prost(bool, optional, tag = "1000")]
    pub has_hung_up: Option<bool>,
    /// Ours: the permissions of a slave's node.
    #[prost(uint32, optional, tag = "1001")]
    pub mode: Option<u32>,
    /// Ours: lines that nobody has read, and what is no line yet, of a slave.
    #[prost(bytes = "vec", repeated, tag = "1002")]
    pub lines: Vec<Vec<u8>>,
    #[prost(bytes = "vec", optional, tag = "1003")]
    pub typed: Option<Vec<u8>>,
    /// Ours: its output stands still, by the character for that or by tcflow(3).
    #[prost(bool, optional, tag = "1004")]
    pub is_stopped_by_character: Option<bool>,
    #[prost(bool, optional, tag = "1005")]
    pub is_stopped_by_call: Option<bool>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TermiosEntry {
    #[prost(uint32, required, tag = "1")]
    pub c_iflag: u32,
    #[prost(uint32, required, tag = "2")]
    pub c_oflag: u32,
    #[prost(uint32, required, tag = "3")]
    pub c_cflag: u32,
    #[prost(uint32, required, tag = "4")]
    pub c_lflag: u32,
    #[prost(uint32, required, tag = "5")]
    pub c_line: u32,
    #[prost(uint32, required, tag = "6")]
    pub c_ispeed: u32,
    #[prost(uint32, required, tag = "7")]
    pub c_ospeed: u32,
    #[prost(uint32, repeated, tag = "8", packed = "false")]
    pub c_cc: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WinsizeEntry {
    #[prost(uint32, required, tag = "1")]
    pub ws_row: u32,
    #[prost(uint32, required, tag = "2")]
    pub ws_col: u32,
    #[prost(uint32, required, tag = "3")]
    pub ws_xpixel: u32,
    #[prost(uint32, required, tag = "4")]
    pub ws_ypixel: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyPtyEntry {
    #[prost(uint32, required, tag = "1")]
    pub index: u32,
}

/// `tty-data.img`: what the slave has written and nobody has read from the master.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub tty_id: u32,
    #[prost(bytes = "vec", required, tag = "2")]
    pub data: Vec<u8>,
}

/// Majors of terminals: consoles and serial lines, /dev/tty and /dev/console and the multiplexer, slaves.
const VIRTUAL: u32 = 4;
const ALTERNATE: u32 = 5;
const SLAVE: u32 = 136;
/// Minors of the second.
const ALIAS: u32 = 0;
const CONSOLE: u32 = 1;
const MULTIPLEXER: u32 = 2;
/// Minors of the first from here on are serial lines.
const FIRST_SERIAL: u32 = 64;

/// No kernel gives more. Source: drivers/tty/pty.c, NR_UNIX98_PTY_MAX.
const INDEX_MAX: u32 = 1 << 20;
/// Ids of what is no pseudoterminal.
const FIRST_ID: u32 = 2 * INDEX_MAX;

/// What is behind a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Master(u32),
    Slave(u32),
    /// /dev/tty, of somebody whose terminal is the slave.
    Alias(u32),
    Plain(TtyType),
}

/// What a device of this number is; of /dev/tty nobody knows by the number.
fn plain(device: u64) -> Option<TtyType> {
    match (libc::major(device), libc::minor(device)) {
        (VIRTUAL, minor) if minor < FIRST_SERIAL => Some(TtyType::Vt),
        (VIRTUAL, _) => Some(TtyType::Serial),
        (ALTERNATE, CONSOLE) => Some(TtyType::Console),
        _ => None,
    }
}

fn end(probe: &FdProbe) -> Result<End, Failure> {
    let explain = |error: Errno| probe.fail(error, "ask which terminal it is");
    match probe.device() {
        (ALTERNATE, MULTIPLEXER) => sys::tty::index(&probe.fd).map(End::Master).map_err(explain),
        (ALTERNATE, ALIAS) => match sys::tty::device(&probe.fd) {
            Ok(device) if libc::major(device.into()) == SLAVE => Ok(End::Alias(libc::minor(device.into()))),
            Ok(_) => Err(probe.refuse("is /dev/tty of a terminal that is no pseudoterminal")),
            Err(error) if error.code == libc::EIO => {
                Err(probe.refuse("has hung up, and does not tell which terminal it was"))
            }
            Err(error) => Err(explain(error)),
        },
        (SLAVE, index) => Ok(End::Slave(index)),
        _ => Ok(End::Plain(plain(probe.stat.st_rdev).unwrap_or(TtyType::Unknown))),
    }
}

/// A terminal as it was seen first.
struct Seen {
    pid: i32,
    object: Object,
    fd: OwnedFd,
    stat: libc::stat,
    link: Vec<u8>,
}

impl Seen {
    fn of(probe: &FdProbe) -> Result<Seen, Failure> {
        let fd = probe.fd.try_clone().map_err(|error| {
            probe.fail(sys::memory::io_errno("dup", &error), "keep it for a moment")
        })?;
        Ok(Seen { pid: probe.pid, object: probe.object(), fd, stat: probe.stat, link: probe.link().to_vec() })
    }

    fn refuse(&self, why: impl Into<std::borrow::Cow<'static, str>>) -> Failure {
        Failure::unsupported(self.object.clone(), why).of(self.pid)
    }

    fn fail(&self, error: Errno, doing: &'static str) -> Failure {
        error.on(self.object.clone(), doing).of(self.pid)
    }

    fn key(&self) -> String {
        key(self.stat.st_rdev as u32, self.stat.st_dev as u32)
    }
}

/// How the command line calls a terminal.
fn key(rdev: u32, dev: u32) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

/// Both ends of a pseudoterminal, as far as the tree has them.
#[derive(Default)]
struct Pair {
    master: Option<Seen>,
    slave: Option<Seen>,
    alias: Option<Seen>,
    is_external: bool,
    has_hung_up: bool,
}

/// What a survey has found.
#[derive(Default)]
struct Dumped {
    pairs: BTreeMap<u32, Pair>,
    /// By device.
    others: BTreeMap<u64, Seen>,
}

/// A process and its controlling terminal.
#[derive(Debug, Clone, Copy)]
pub struct Person {
    pub sid: i32,
    /// Device of the terminal; zero for none.
    pub terminal: u32,
    /// The foreground group of it.
    pub group: i32,
}

/// The node of the slave that a master made, where it is expected.
fn node(multiplexer: &Path, index: u32) -> PathBuf {
    let folder = multiplexer.parent().unwrap_or(Path::new("/dev"));
    let beside = folder.join("pts");
    if beside.is_dir() { beside.join(index.to_string()) } else { folder.join(index.to_string()) }
}

/// As CRIU reads them: only masters have odd ones.
fn id_of(end: End, device: u64) -> u32 {
    match end {
        End::Master(index) => 2 * index + 1,
        End::Slave(index) => 2 * index,
        End::Alias(index) => FIRST_ID + 2 * index,
        End::Plain(_) => 2 * FIRST_ID + 2 * (device as u32 & 0xf_ffff),
    }
}

fn path(link: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt;
    Path::new(std::ffi::OsStr::from_bytes(link))
}

impl FdKind for Tty {
    type Entry = TtyFileEntry;
    const NAME: &'static str = "terminal";
    const TYPE: FdTypes = FdTypes::Tty;
    const TAG: u32 = 19;

    fn claims(&self, probe: &FdProbe) -> bool {
        let (major, minor) = probe.device();
        let is_terminal = match major {
            VIRTUAL | SLAVE => true,
            ALTERNATE => minor <= MULTIPLEXER,
            _ => false,
        };
        probe.format() == libc::S_IFCHR && is_terminal && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<TtyFileEntry, Failure> {
        let end = end(probe)?;
        let mut has_path = true;
        let seen = Seen::of(probe)?;
        let dumped = cx.shelf.of::<Dumped>();
        match end {
            End::Master(index) => {
                let pair = dumped.pairs.entry(index).or_default();
                if pair.master.replace(seen).is_some() {
                    return Err(probe.refuse(format!("is the second pseudoterminal with the number {index}")));
                }
            }
            End::Slave(index) => {
                let pair = dumped.pairs.entry(index).or_default();
                let other = pair.slave.get_or_insert(seen);
                if other.stat.st_dev != probe.stat.st_dev {
                    return Err(probe.refuse(format!("is the second pseudoterminal with the number {index}")));
                }
                let state = sys::tty::termios(&probe.fd);
                pair.has_hung_up = state.is_err_and(|error| error.code == libc::EIO);
                has_path = !pair.has_hung_up;
            }
            End::Alias(index) => {
                dumped.pairs.entry(index).or_default().alias.get_or_insert(seen);
            }
            End::Plain(_) => {
                dumped.others.entry(probe.stat.st_rdev).or_insert(seen);
            }
        }
        let regf_id = match has_path {
            true => Some(
                regular::record(&probe.seen(&probe.source()), probe.flags, &|| probe.object(), cx)
                    .map_err(|failure| failure.of(probe.pid))?,
            ),
            false => None,
        };
        Ok(TtyFileEntry {
            id,
            tty_info_id: id_of(end, probe.stat.st_rdev),
            flags: probe.flags,
            fown: probe.owner()?,
            regf_id,
        })
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        let options = cx.options;
        let people: Vec<(i32, Person)> = cx.people.iter().map(|(pid, person)| (*pid, *person)).collect();
        let is_inside = |sid: i32| people.iter().any(|(pid, _)| *pid == sid);
        let dumped = cx.shelf.of::<Dumped>();
        let mut failures = Failures::new();
        let mut has_shells = false;
        for (index, pair) in &mut dumped.pairs {
            for seen in [&pair.master, &pair.slave].into_iter().flatten() {
                if !pair.has_hung_up && sys::tty::discipline(&seen.fd).is_ok_and(|line| line != sys::tty::N_TTY) {
                    failures.push(seen.refuse("has a line discipline that is not carried"));
                }
            }
            if let (Some(master), Some(slave)) = (&pair.master, &pair.slave) {
                let made = sys::fd::stat_path(&node(path(&master.link), *index), true);
                if !made.is_ok_and(|made| (made.st_dev, made.st_ino) == (slave.stat.st_dev, slave.stat.st_ino)) {
                    failures.push(slave.refuse(format!("is another pseudoterminal {index} than that of the tree")));
                }
            }
            let Some(slave) = pair.slave.as_ref().or(pair.alias.as_ref()) else { continue };
            if pair.master.is_some() || pair.has_hung_up {
                continue;
            }
            pair.is_external = options.external.contains(&slave.key());
            if pair.is_external {
                continue;
            }
            if !options.shell_job {
                let why = format!(
                    "is the terminal {}, whose master is outside of the tree (others can be passed in with --external \
                     and --inherit-fd)",
                    slave.key()
                );
                failures.push(Failure::policy(slave.object.clone(), why, &options::SHELL_JOB).of(slave.pid));
            } else if std::mem::replace(&mut has_shells, true) {
                failures.push(slave.refuse(format!(
                    "is a second terminal {} whose master is outside of the tree; a shell job has one, others are \
                     passed in with --external and --inherit-fd",
                    slave.key()
                )));
            }
        }
        for (pid, person) in &people {
            let device = u64::from(person.terminal);
            let is_known = libc::major(device) == SLAVE && dumped.pairs.contains_key(&libc::minor(device));
            if person.terminal != 0 && *pid == person.sid && is_inside(person.sid) && !is_known {
                let why = "is that of its session, and is outside of the tree";
                let name = format!("terminal {}:{}", libc::major(device), libc::minor(device));
                failures.push(Failure::unsupported(Object::Named(name), why).of(*pid));
            }
        }
        failures
    }

    fn link(&self, entries: &[(u32, &TtyFileEntry)], files: &FileTable) -> Failures {
        let mut failures = Failures::new();
        let mut masters = HashMap::new();
        for (id, entry) in entries {
            let mut corrupt = |why: &str| {
                failures.push(Failure::corrupt("files.img", None, format!("terminal {id} {why}")));
            };
            let Some(info) = files.terminals.get(&entry.tty_info_id) else {
                corrupt("has no state in tty-info.img");
                continue;
            };
            if let Err(why) = check(info) {
                corrupt(why);
            }
            if is_master(info) && masters.insert(index(info), *id).is_some() {
                corrupt("is the second master of one pseudoterminal");
            }
            let regular = entry.regf_id.map(|id| files.entry::<regular::Regular>(id));
            if regular.is_some_and(|found| found.is_none()) {
                corrupt("has the path of no file");
            }
        }
        failures
    }

    fn key(&self, entry: &TtyFileEntry, files: &FileTable) -> Option<String> {
        let info = files.terminals.get(&entry.tty_info_id)?;
        (info.r#type() == TtyType::ExtTty).then(|| key(info.rdev, info.dev.unwrap_or(0)))
    }

    fn open(&self, entry: &TtyFileEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        if !cx.shelf.of::<Made>().is_made {
            cx.shelf.of::<Made>().is_made = true;
            let made = make(cx);
            *cx.shelf.of::<Made>() = made;
        }
        let made = cx.shelf.of::<Made>().files.remove(&entry.id);
        made.unwrap_or_else(|| Err(Failure::corrupt("files.img", None, format!("has the terminal {} twice", entry.id))))
    }

    fn inherited(&self, entry: &TtyFileEntry, fd: &OwnedFd, cx: &mut OpenCx) -> Result<(), Failure> {
        let files = cx.files;
        let Some(info) = files.terminals.get(&entry.tty_info_id).filter(|info| info.sid != 0) else { return Ok(()) };
        let (session, group) = (info.sid as i32, info.pgrp as i32);
        if cx.terminals.iter().all(|other| other.session != session) {
            let object = || Object::Named(key(info.rdev, info.dev.unwrap_or(0)));
            let fd = reopen(fd, libc::O_RDWR as u32).map_err(|error| error.on(object(), "open it again"))?;
            cx.terminals.push(Control { session, group, fd });
        }
        Ok(())
    }

    fn owner<'e>(&self, entry: &'e TtyFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

fn is_master(info: &TtyInfoEntry) -> bool {
    let rdev = u64::from(info.rdev);
    info.r#type() == TtyType::Pty && (libc::major(rdev), libc::minor(rdev)) == (ALTERNATE, MULTIPLEXER)
}

fn is_slave(info: &TtyInfoEntry) -> bool {
    info.r#type() == TtyType::Pty && !is_master(info)
}

fn index(info: &TtyInfoEntry) -> u32 {
    info.pty.as_ref().map_or(0, |pty| pty.index)
}

fn check(info: &TtyInfoEntry) -> Result<(), &'static str> {
    let is_pty = info.r#type() == TtyType::Pty;
    if is_pty && info.pty.as_ref().is_none_or(|pty| pty.index >= INDEX_MAX) {
        return Err("has no number of a pseudoterminal");
    }
    let is_kept = is_pty || info.r#type() == TtyType::ExtTty || info.r#type() == TtyType::Ctty;
    if !is_kept && plain(info.rdev.into()).is_none() {
        return Err("is of no known kind");
    }
    if [&info.termios, &info.termios_locked].into_iter().flatten().any(|termios| termios.c_cc.len() > 19) {
        return Err("has too many control characters");
    }
    if info.mode.is_some_and(|mode| mode & !0o7777 != 0) {
        return Err("has permissions that are none");
    }
    Ok(())
}

/// CRIU keeps the characters as their bytes are in memory, four to a word; what follows says nothing.
fn record(termios: &Termios) -> TermiosEntry {
    let mut words: Vec<u32> = termios.cc.chunks(4).map(word).collect();
    words.resize(termios.cc.len(), 0);
    TermiosEntry {
        c_iflag: termios.iflag,
        c_oflag: termios.oflag,
        c_cflag: termios.cflag,
        c_lflag: termios.lflag,
        c_line: termios.line.into(),
        c_ispeed: termios.ispeed,
        c_ospeed: termios.ospeed,
        c_cc: words,
    }
}

/// Up to four bytes, the lowest first.
fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))
}

fn termios(entry: &TermiosEntry) -> Termios {
    let mut cc = [0; 19];
    let bytes = entry.c_cc.iter().flat_map(|word| word.to_le_bytes());
    cc.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    Termios {
        iflag: entry.c_iflag,
        oflag: entry.c_oflag,
        cflag: entry.c_cflag,
        lflag: entry.c_lflag,
        line: entry.c_line as u8,
        cc,
        ispeed: entry.c_ispeed,
        ospeed: entry.c_ospeed,
    }
}

/// What a terminal says of itself.
fn state_of(fd: &OwnedFd) -> Result<TtyInfoEntry, Errno> {
    let size = sys::tty::size(fd)?;
    Ok(TtyInfoEntry {
        r#type: TtyType::Pty.into(),
        termios: Some(record(&sys::tty::termios(fd)?)),
        termios_locked: Some(record(&sys::tty::locked_termios(fd)?)),
        winsize: Some(WinsizeEntry {
            ws_row: size.rows.into(),
            ws_col: size.columns.into(),
            ws_xpixel: size.x_pixels.into(),
            ws_ypixel: size.y_pixels.into(),
        }),
        ..TtyInfoEntry::default()
    })
}

/// Writes the state of every terminal, and takes what is in the queues of those that the tree has both ends of. To
/// drop what comes back puts it in again.
///
/// # Errors
/// When the kernel does not tell a state.
pub fn write(cx: &mut DumpCx) -> Result<Queues, Failure> {
    let Dumped { pairs, others } = std::mem::take(cx.shelf.of::<Dumped>());
    let mut queues = Queues::default();
    let mut infos = Vec::new();
    let mut data = Vec::new();
    for (index, pair) in pairs {
        let device = libc::makedev(SLAVE, index) as u32;
        let theirs = cx.people.values().find(|person| person.terminal == device);
        let (sid, pgrp) = theirs.map_or((0, 0), |person| (person.sid as u32, person.group.max(0) as u32));
        let mut info = |end: End, seen: &Seen, mut info: TtyInfoEntry| {
            info.id = id_of(end, seen.stat.st_rdev);
            info.rdev = seen.stat.st_rdev as u32;
            info.dev = Some(seen.stat.st_dev as u32);
            info.uid = Some(seen.stat.st_uid);
            info.gid = Some(seen.stat.st_gid);
            infos.push(info);
        };
        let seen = pair.slave.as_ref().or(pair.master.as_ref()).or(pair.alias.as_ref());
        let Some(seen) = seen else { continue };
        let pty = Some(TtyPtyEntry { index });
        if pair.has_hung_up {
            let hung_up = TtyInfoEntry {
                r#type: TtyType::Pty.into(),
                pty,
                has_hung_up: Some(true),
                ..TtyInfoEntry::default()
            };
            info(End::Slave(index), seen, hung_up);
            continue;
        }
        let explain = |error: Errno| seen.fail(error, "read the terminal");
        let state = TtyInfoEntry { sid, pgrp, pty, ..state_of(&seen.fd).map_err(explain)? };
        let exclusive = |seen: &Seen| sys::tty::is_exclusive(&seen.fd).map_err(explain);
        let mut taken = queue::Taken::default();
        if let Some(master) = &pair.master {
            taken = queue::take(&master.fd, pair.slave.as_ref().map(|slave| &slave.fd));
            if !taken.output.is_empty() {
                data.push(TtyDataEntry { tty_id: id_of(End::Master(index), 0), data: taken.output.clone() });
            }
            let hung_up = sys::tty::poll(&master.fd) & libc::POLLHUP != 0;
            let of_master = TtyInfoEntry {
                locked: sys::tty::is_locked(&master.fd).map_err(explain)?,
                packet_mode: sys::tty::is_packet_mode(&master.fd).map_err(explain)?,
                exclusive: exclusive(master)?,
                has_hung_up: hung_up.then_some(true),
                ..state.clone()
            };
            info(End::Master(index), master, of_master);
            // The node of a slave has an owner even when nobody has it open.
            if pair.slave.is_none()
                && let Ok(stat) = sys::fd::stat_path(&node(path(&master.link), index), true)
                && stat.st_rdev == device.into()
            {
                let fd = master.fd.try_clone().map_err(|error| explain(sys::memory::io_errno("dup", &error)))?;
                let seen = Seen { fd, stat, object: master.object.clone(), link: Vec::new(), ..*master };
                let mode = Some(stat.st_mode & 0o7777);
                info(End::Slave(index), &seen, TtyInfoEntry { mode, ..state.clone() });
            }
        }
        if let Some(slave) = &pair.slave {
            let (r#type, pty) = if pair.is_external { (TtyType::ExtTty, None) } else { (TtyType::Pty, state.pty.clone()) };
            let of_slave = TtyInfoEntry {
                r#type: r#type.into(),
                pty,
                exclusive: exclusive(slave)?,
                mode: Some(slave.stat.st_mode & 0o7777),
                lines: taken.lines.clone(),
                typed: Some(taken.typed.clone()).filter(|typed| !typed.is_empty()),
                is_stopped_by_character: (taken.stopped == Some(Stop::Typed)).then_some(true),
                is_stopped_by_call: (taken.stopped == Some(Stop::Called)).then_some(true),
                ..state.clone()
            };
            info(End::Slave(index), slave, of_slave);
        }
        if let Some(alias) = &pair.alias {
            let of_alias = TtyInfoEntry { r#type: TtyType::Ctty.into(), pty: None, ..state.clone() };
            info(End::Alias(index), alias, of_alias);
        }
        if let Some(master) = pair.master {
            queues.push(master.fd, pair.slave.map(|slave| slave.fd), taken);
        }
    }
    for (device, seen) in others {
        let kind = plain(device).unwrap_or(TtyType::Unknown);
        let is_external = cx.options.external.contains(&seen.key());
        infos.push(TtyInfoEntry {
            id: id_of(End::Plain(kind), device),
            r#type: if is_external { TtyType::ExtTty } else { kind }.into(),
            rdev: device as u32,
            dev: Some(seen.stat.st_dev as u32),
            // Nobody's to set, but CRIU wants to see it.
            ..state_of(&seen.fd).unwrap_or_default()
        });
    }
    for info in &infos {
        cx.image("tty-info.img", kind::TTY_INFO).record(info);
    }
    for data in &data {
        cx.image("tty-data.img", kind::TTY_DATA).record(data);
    }
    Ok(queues)
}

/// A terminal that a session of the tree has.
#[derive(Debug)]
pub struct Control {
    pub session: i32,
    /// Its foreground group; zero when it is nobody's.
    pub group: i32,
    /// The slave.
    pub fd: OwnedFd,
}

/// What was made of the images.
#[derive(Default)]
struct Made {
    is_made: bool,
    files: HashMap<u32, Result<OwnedFd, Failure>>,
    /// Masters of those that hang up when this is dropped.
    _held: Vec<OwnedFd>,
}

/// Makes every terminal. What goes wrong concerns one; whoever asks for it is told.
fn make(cx: &mut OpenCx) -> Made {
    let files = cx.files;
    let mut made = Made { is_made: true, ..Made::default() };
    let data: HashMap<u32, Vec<u8>> = match cx.images.read_all::<TtyDataEntry>(kind::TTY_DATA, "tty-data.img") {
        Ok(data) => data.into_iter().map(|data| (data.tty_id, data.data)).collect(),
        Err(failure) => {
            made.files.extend(files.entries::<Tty>().map(|entry| (entry.id, Err(failure.clone()))));
            return made;
        }
    };
    let mut pairs: BTreeMap<u32, Vec<&TtyFileEntry>> = BTreeMap::new();
    for entry in files.entries::<Tty>() {
        let Some(info) = files.terminals.get(&entry.tty_info_id) else { continue };
        match info.r#type() {
            TtyType::Pty => pairs.entry(index(info)).or_default().push(entry),
            TtyType::Ctty => match pair_of(info, &files.terminals) {
                Some(index) => pairs.entry(index).or_default().push(entry),
                None => {
                    let object = Object::Named("/dev/tty".into());
                    let why = "is that of a session without a terminal";
                    made.files.insert(entry.id, Err(Failure::unsupported(object, why)));
                }
            },
            TtyType::ExtTty => {
                let name = key(info.rdev, info.dev.unwrap_or(0));
                let why = "comes from outside; pass one in with --inherit-fd fd[N]:";
                let failure = Failure::conflict(Object::Named(name.clone()), "", format!("{why}{name}"));
                made.files.insert(entry.id, Err(failure));
            }
            _ => {
                made.files.insert(entry.id, open_plain(entry, info, cx));
            }
        }
    }
    // In the order of their numbers: the multiplexer gives the lowest that is free.
    let mut spare = Vec::new();
    for (index, entries) in pairs {
        match make_pair(index, &entries, &data, &mut spare, cx) {
            Ok(pair) => {
                made.files.extend(pair.files.into_iter().map(|(id, fd)| (id, Ok(fd))));
                made._held.extend(pair.master);
            }
            Err(failure) => made.files.extend(entries.iter().map(|entry| (entry.id, Err(failure.clone())))),
        }
    }
    made
}

/// The pseudoterminal that is the one of the same session.
fn pair_of(info: &TtyInfoEntry, terminals: &HashMap<u32, TtyInfoEntry>) -> Option<u32> {
    let mut all = terminals.values().filter(|other| other.r#type() == TtyType::Pty);
    all.find(|other| other.sid != 0 && other.sid == info.sid).map(index)
}

fn path_of(entry: &TtyFileEntry, files: &FileTable) -> Option<PathBuf> {
    files.entry::<regular::Regular>(entry.regf_id?).map(regular::path_of)
}

fn open_plain(entry: &TtyFileEntry, info: &TtyInfoEntry, cx: &OpenCx) -> Result<OwnedFd, Failure> {
    let path = path_of(entry, cx.files).ok_or_else(|| {
        Failure::corrupt("files.img", None, format!("terminal {} has no path", entry.id))
    })?;
    let explain = |error: Errno| error.on(Object::Path(path.display().to_string()), "open the terminal again");
    // Not to wait for a carrier.
    let flags = open_flags(entry.flags) | libc::O_NONBLOCK;
    let fd = sys::fd::open(&path, flags).map_err(explain)?;
    if sys::fd::stat(&fd).map_err(explain)?.st_rdev != u64::from(info.rdev) {
        return Err(Failure::conflict(Object::Path(path.display().to_string()), "", "is another device now"));
    }
    set_status(&fd, entry.flags).map_err(explain)?;
    Ok(fd)
}

/// A pseudoterminal that is there again.
struct MadePair {
    files: Vec<(u32, OwnedFd)>,
    master: Option<OwnedFd>,
}

fn make_pair(
    index: u32,
    entries: &[&TtyFileEntry],
    data: &HashMap<u32, Vec<u8>>,
    spare: &mut Vec<OwnedFd>,
    cx: &mut OpenCx,
) -> Result<MadePair, Failure> {
    let files = cx.files;
    let info_of = |entry: &TtyFileEntry| files.terminals.get(&entry.tty_info_id);
    let is_masters = |entry: &TtyFileEntry| info_of(entry).is_some_and(is_master);
    let master_entry = entries.iter().find(|entry| is_masters(entry));
    let of_pair = |is_it: fn(&TtyInfoEntry) -> bool| {
        files.terminals.values().find(|info| is_it(info) && self::index(info) == index)
    };
    let slave_info = of_pair(is_slave);
    let info = slave_info.or(of_pair(is_master));
    let Some(info) = info else { return Err(Failure::corrupt("tty-info.img", None, "lacks a pseudoterminal")) };
    let hangs_up = master_entry.is_none() && slave_info.is_some_and(|info| info.has_hung_up == Some(true));
    let object = || Object::Named(format!("pseudoterminal {index}"));
    let explain = |error: Errno| error.on(object(), "make it");
    let mut pair = MadePair { files: Vec::new(), master: None };
    let find = || {
        let (entry, path) = match master_entry {
            Some(entry) => (entry.flags, path_of(entry, files)),
            None => (libc::O_RDWR as u32, None),
        };
        let path = path.unwrap_or_else(|| PathBuf::from("/dev/ptmx"));
        (path, entry)
    };
    if master_entry.is_none() && !hangs_up {
        let fd = shells(cx)?;
        if let Some(entry) = &info.termios {
            sys::tty::set_termios(&fd, termios(entry)).map_err(explain)?;
        }
        for entry in entries {
            let is_alias = info_of(entry).is_some_and(|info| info.r#type() == TtyType::Ctty);
            let opened = match is_alias {
                true => sys::fd::open(Path::new("/dev/tty"), open_flags(entry.flags)),
                false => reopen(&fd, entry.flags),
            };
            pair.files.push((entry.id, opened.map_err(|error| error.on(object(), "open it"))?));
        }
        cx.terminals.push(Control { session: info.sid as i32, group: info.pgrp as i32, fd });
        return Ok(pair);
    }
    let (multiplexer, flags) = find();
    let master = open_numbered(&multiplexer, index, flags, spare)?;
    sys::tty::set_locked(&master, false).map_err(explain)?;
    if let Some(entry) = &info.termios {
        sys::tty::set_termios(&master, termios(entry)).map_err(explain)?;
    }
    if let Some(size) = &info.winsize {
        let size = Winsize {
            rows: size.ws_row as u16,
            columns: size.ws_col as u16,
            x_pixels: size.ws_xpixel as u16,
            y_pixels: size.ws_ypixel as u16,
        };
        sys::tty::set_size(&master, size).map_err(explain)?;
    }
    let name = node(&multiplexer, index);
    if let (Some(info), Ok(stat)) = (slave_info, sys::fd::stat_path(&name, true))
        && stat.st_rdev == libc::makedev(SLAVE, index)
    {
        let named = |error: std::io::Error| explain(sys::memory::io_errno("chown", &error));
        std::os::unix::fs::chown(&name, info.uid, info.gid).map_err(named)?;
        if let Some(mode) = info.mode {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(&name, mode).map_err(named)?;
        }
    }
    let is_own = |fd: &OwnedFd| sys::tty::device(fd).is_ok_and(|found| u64::from(found) == libc::makedev(SLAVE, index));
    let mut slave = None;
    for entry in entries.iter().filter(|entry| !is_masters(entry)) {
        let is_alias = info_of(entry).is_some_and(|info| info.r#type() == TtyType::Ctty);
        let flags = open_flags(entry.flags);
        let fd = match is_alias {
            true => sys::tty::open_alias(&sys::tty::peer(&master, libc::O_RDWR).map_err(explain)?, flags),
            false => {
                let named = path_of(entry, files).and_then(|path| sys::fd::open(&path, flags).ok());
                named.filter(is_own).map_or_else(|| sys::tty::peer(&master, flags), Ok)
            }
        };
        let fd = fd.map_err(|error| error.on(object(), "open its slave"))?;
        if !is_alias && slave.is_none() {
            slave = Some(fd.as_raw_fd());
            let is_exclusive = info_of(entry).is_some_and(|info| info.exclusive);
            if is_exclusive {
                sys::tty::set_exclusive(&fd).map_err(explain)?;
            }
        }
        pair.files.push((entry.id, fd));
    }
    let master_info = master_entry.and_then(|entry| info_of(entry));
    let sid = [Some(info), master_info].into_iter().flatten().map(|info| (info.sid, info.pgrp)).find(|(sid, _)| *sid != 0);
    if let Some((session, group)) = sid {
        let fd = sys::tty::peer(&master, libc::O_RDWR).map_err(explain)?;
        cx.terminals.push(Control { session: session as i32, group: group as i32, fd });
    }
    if let (Some(entry), Some(state)) = (master_entry, master_info) {
        if state.has_hung_up == Some(true) {
            sys::tty::peer(&master, libc::O_RDWR).map_err(explain)?;
        }
        let taken = queue::Taken {
            output: data.get(&state.id).cloned().unwrap_or_default(),
            lines: info.lines.clone(),
            typed: info.typed.clone().unwrap_or_default(),
            stopped: match (info.is_stopped_by_character, info.is_stopped_by_call) {
                (Some(true), _) => Some(Stop::Typed),
                (_, Some(true)) => Some(Stop::Called),
                _ => None,
            },
        };
        let open = pair.files.iter().find(|(_, fd)| Some(fd.as_raw_fd()) == slave).map(|(_, fd)| fd);
        queue::put(&master, open, &taken);
        if let (Some(slave), Some(stopped)) = (open, taken.stopped) {
            queue::stop(slave, stopped).map_err(explain)?;
        }
        if let Some(entry) = info.termios_locked.as_ref().filter(|entry| **entry != TermiosEntry::default()) {
            sys::tty::set_locked_termios(&master, termios(entry)).map_err(explain)?;
        }
        if state.exclusive {
            sys::tty::set_exclusive(&master).map_err(explain)?;
        }
        sys::tty::set_packet_mode(&master, state.packet_mode).map_err(explain)?;
        sys::tty::set_locked(&master, state.locked).map_err(explain)?;
        set_status(&master, entry.flags).map_err(explain)?;
        pair.files.push((entry.id, master));
    } else {
        pair.master = Some(master);
    }
    Ok(pair)
}

/// The terminal of our session, under its own name if it has one here.
fn own() -> Option<OwnedFd> {
    let alias = sys::fd::open(Path::new("/dev/tty"), libc::O_RDWR).ok()?;
    let device = u64::from(sys::tty::device(&alias).ok()?);
    let named = sys::fd::open(&node(Path::new("/dev/ptmx"), libc::minor(device)), libc::O_RDWR).ok();
    let is_it = |fd: &OwnedFd| sys::fd::stat(fd).is_ok_and(|stat| stat.st_rdev == device);
    named.filter(is_it).or(Some(alias))
}

/// The terminal that this program runs on.
fn shells(cx: &OpenCx) -> Result<OwnedFd, Failure> {
    let object = || Object::Named("terminal".into());
    if !cx.options.shell_job {
        let why = "the tree had a terminal of the shell that started it";
        return Err(Failure::policy(object(), why, &options::SHELL_JOB));
    }
    let ours = [0, 1, 2].into_iter().find_map(sys::fd::standard_terminal);
    let ours = ours.or_else(own);
    ours.ok_or_else(|| Failure::conflict(object(), "restore a shell job", "no terminal is here"))
}

/// Opens the multiplexer until it gives this number; what it gives before goes to `spare`.
fn open_numbered(path: &Path, wanted: u32, flags: u32, spare: &mut Vec<OwnedFd>) -> Result<OwnedFd, Failure> {
    let object = || Object::Named(format!("pseudoterminal {wanted}"));
    loop {
        let explain = |error: Errno| error.on(object(), format!("open {}", path.display()));
        let master = sys::fd::open(path, open_flags(flags)).map_err(explain)?;
        let index = sys::tty::index(&master).map_err(explain)?;
        if index == wanted {
            return Ok(master);
        }
        if index > wanted {
            let who = holders(wanted);
            let by = if who.is_empty() { String::new() } else { format!(" by {who}") };
            return Err(Failure::conflict(object(), "make it", format!("its number is taken{by}")));
        }
        spare.push(master);
    }
}

/// Who has the master with this number, as far as it can be seen.
fn holders(index: u32) -> String {
    let has_it = |pid: &i32| {
        let numbers = sys::fd::numbers(&format!("/proc/{pid}/fd")).unwrap_or_default();
        numbers.iter().any(|number| {
            let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
            let is_it = |text: Vec<u8>| {
                let found = sys::proc::fdinfo(&text, "tty-index").and_then(sys::proc::decimal::<u32>);
                found == Some(index)
            };
            link.ends_with("ptmx")
                && sys::fd::text(&format!("/proc/{pid}/fdinfo/{number}")).is_ok_and(is_it)
        })
    };
    let all = sys::fd::numbers("/proc").unwrap_or_default().into_iter().filter(has_it);
    let named = all.map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("process {pid} ({})", name.trim_end())
    });
    named.collect::<Vec<_>>().join(", ")
}
