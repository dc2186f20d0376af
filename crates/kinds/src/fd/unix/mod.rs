//! UNIX sockets: pairs, named ones, listeners with connections that wait, datagram sockets that talk to servers
//! outside of the tree.
//!
//! Read from: sock_diag(7) by inode (type, name, peer, shutdown, what waits); SIOCUNIXFILE for the file of a name;
//! getsockopt(2); queued messages by MSG_PEEK with SO_PEEK_OFF, which leaves them in the queue and keeps their
//! boundaries; of empty messages, which are shown once, by the kernel's tracing.
//! Rebuilt by: socketpair(2), bind(2), connect(2), accept(2) in [`make`], all sockets of the images together.
//! Who made an end is noted by the kernel at the time of the call (SO_PEERCRED), so calls are made in the place of those
//! processes, see [`make`].
//! Refused for now: data in connections that were not accepted; urgent bytes (MSG_OOB). Of one that was sent in line
//! (SO_OOBINLINE) the place is lost, not the byte.
//! Not kept: when a message in a queue came (SO_TIMESTAMP); that the process of SO_PEERCRED lives (SO_PEERPIDFD); its pid,
//! where another process has that by now.

mod make;

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{Dir, FdTypes, FileEntry, FownEntry, Message, SkOptsEntry, SkShutdown, kind};
use model::options;
use model::{Errno, Failure, Failures, Object, Options, Remedy};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::os::fd::{AsFd, OwnedFd};
use sys::socket;
use sys::unix_diag::{Diag, UnixSocket};

pub static KIND: Unix = Unix;

#[derive(Debug)]
pub struct Unix;

#[derive(Clone, PartialEq, prost::Message)]
pub struct UnixSkEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub ino: u32,
    #[prost(uint32, required, tag = "3")]
    pub r#type: u32,
    #[prost(uint32, required, tag = "4")]
    pub state: u32,
    #[prost(uint32, required, tag = "5")]
    pub flags: u32,
    #[prost(uint32, required, tag = "6")]
    pub uflags: u32,
    #[prost(uint32, required, tag = "7")]
    pub backlog: u32,
    #[prost(uint32, required, tag = "8")]
    pub peer: u32,
    #[prost(message, required, tag = "9")]
    pub fown: FownEntry,
    #[prost(message, required, tag = "10")]
    pub opts: SkOptsEntry,
    #[prost(bytes = "vec", required, tag = "11")]
    pub name: Vec<u8>,
    #[prost(enumeration = "SkShutdown", optional, tag = "12")]
    pub shutdown: Option<i32>,
    #[prost(message, optional, tag = "13")]
    pub file_perms: Option<FilePermsEntry>,
    #[prost(string, optional, tag = "14")]
    pub name_dir: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub deleted: Option<bool>,
    #[prost(uint32, optional, tag = "16")]
    pub ns_id: Option<u32>,
    #[prost(sint32, optional, tag = "17")]
    pub mnt_id: Option<i32>,
    /// Ours: who made the other end, listened there, or listens here.
    #[prost(message, optional, tag = "1000")]
    pub peer_cred: Option<UnixCredEntry>,
    /// Ours: who waits to be accepted.
    #[prost(message, optional, tag = "1001")]
    pub own_cred: Option<UnixCredEntry>,
    /// Ours: where the next look into the queue begins (SO_PEEK_OFF).
    #[prost(uint32, optional, tag = "1002")]
    pub peek_offset: Option<u32>,
    /// Ours: a server outside of the tree, whose path is one in another root or mount namespace than ours.
    #[prost(bool, optional, tag = "1003")]
    pub elsewhere: Option<bool>,
}

impl UnixCredEntry {
    /// Can a process be like that?
    fn is_one(&self) -> bool {
        const PID_MAX: u32 = 1 << 22;
        const GROUPS_MAX: usize = 1 << 16;
        let ids = [self.uid, self.gid];
        self.pid < PID_MAX && !ids.contains(&u32::MAX) && self.groups.len() <= GROUPS_MAX
    }
}

/// Ours: a process, as the kernel noted it at the time of a call.
#[derive(Clone, PartialEq, prost::Message)]
pub struct UnixCredEntry {
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
    #[prost(uint32, repeated, tag = "4", packed = "false")]
    pub groups: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct FilePermsEntry {
    #[prost(uint32, required, tag = "1")]
    pub mode: u32,
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    #[prost(uint32, required, tag = "3")]
    pub gid: u32,
}

/// `sk-queues.img`: one message in the queue of file `id_for`; `length` bytes follow.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SkPacketEntry {
    #[prost(uint32, required, tag = "1")]
    pub id_for: u32,
    #[prost(uint32, required, tag = "2")]
    pub length: u32,
    #[prost(message, repeated, tag = "4")]
    pub scm: Vec<ScmEntry>,
    /// Of ours: the name of the sender of a datagram.
    #[prost(bytes = "vec", optional, tag = "1000")]
    pub from: Option<Vec<u8>>,
    /// Ours: who has sent it, for a socket that is told.
    #[prost(message, optional, tag = "1001")]
    pub sender: Option<UnixCredEntry>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ScmEntry {
    #[prost(uint32, required, tag = "1")]
    pub r#type: u32,
    #[prost(uint32, repeated, tag = "2", packed = "false")]
    pub rights: Vec<u32>,
}


const SO_PEEK_OFF: i32 = 42;
const CONNECTED: u32 = 1;
const CLOSED: u32 = 7;
const LISTENING: u32 = 10;
/// More than any one message that a queue can hold.
const MESSAGE_MAX: usize = 4 << 20;
/// Room for a name in `struct sockaddr_un`.
const NAME_MAX: usize = 108;
/// In `uflags`: stands for a socket outside of the tree.
const EXTERN: u32 = 1;
/// In `uflags`: not made, but given by `--inherit-fd`.
const INHERIT: u32 = 8;

/// The path of a name, if it is one: not abstract, without what follows a zero byte.
fn path_of(name: &[u8]) -> Option<&Path> {
    let path = name.split(|byte| *byte == 0).next().filter(|path| !path.is_empty())?;
    Some(Path::new(OsStr::from_bytes(path)))
}

/// A name as people write it: `@` for the zero byte of an abstract one.
fn shown(name: &[u8]) -> String {
    let name = match name {
        [0, rest @ ..] => [b"@", rest].concat(),
        path => path.strip_suffix(b"\0").unwrap_or(path).to_vec(),
    };
    String::from_utf8_lossy(&name).into_owned()
}

fn kind_name(kind: u32) -> &'static str {
    match kind as i32 {
        libc::SOCK_STREAM => "stream",
        libc::SOCK_DGRAM => "datagram",
        _ => "seqpacket",
    }
}

/// A socket of the tree that has to find others.
#[derive(Debug)]
struct Seen {
    id: u32,
    pid: i32,
    object: Object,
    kind: u8,
    peer: u32,
    has_name: bool,
    /// Bytes that it has sent and nobody has read.
    unread: i32,
}

#[derive(Debug, Default)]
struct Dumped {
    diag: Option<Diag>,
    asked: usize,
    /// Every socket there is, when it was worth while to ask for all.
    all: HashMap<u32, UnixSocket>,
    /// For messages.
    buffer: Vec<u8>,
    /// By inode: which sockets the tree has.
    seen: HashMap<u32, Seen>,
    /// Clients that wait to be accepted, and the listener that each waits for.
    waiting: HashMap<u32, u32>,
    packets: Vec<Packet>,
}

/// A message found in a queue, whose descriptors have no ids yet.
#[derive(Debug)]
struct Packet {
    entry: SkPacketEntry,
    bytes: Vec<u8>,
    /// In `DumpCx::flying`.
    rights: Range<usize>,
}

impl Dumped {
    /// The kernel looks at all of its sockets for each question.
    fn ask(&mut self, inode: u32) -> Result<UnixSocket, Errno> {
        const FEW: usize = 16;
        if let Some(told) = self.all.get(&inode) {
            return Ok(told.clone());
        }
        let diag = match &mut self.diag {
            Some(diag) => diag,
            None => self.diag.insert(Diag::new()?),
        };
        self.asked += 1;
        if self.asked == FEW {
            self.all = diag.all()?.into_iter().map(|socket| (socket.inode, socket)).collect();
            if let Some(told) = self.all.get(&inode) {
                return Ok(told.clone());
            }
        }
        diag.ask(inode)
    }
}

/// Where the file of a name is.
#[derive(Debug, Default)]
struct Place {
    /// What a relative name starts from.
    dir: Option<String>,
    is_deleted: bool,
    perms: Option<FilePermsEntry>,
}

/// Finds the file of a bound socket.
///
/// # Errors
/// Why it could not be bound there again.
fn find_file(probe: &FdProbe, name: &[u8]) -> Result<Place, Failure> {
    let Some(path) = path_of(name) else { return Ok(Place::default()) };
    let explain = |error: Errno| probe.fail(error, "find the file of its name");
    let file = match socket::unix_file(&probe.fd) {
        Ok(file) => file,
        Err(error) if error.code == libc::ENOENT => return Ok(Place { is_deleted: true, ..Place::default() }),
        Err(error) => return Err(explain(error)),
    };
    let stat = sys::fd::stat(&file).map_err(explain)?;
    let perms = FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid };
    let place = Place { perms: Some(perms), ..Place::default() };
    if stat.st_nlink == 0 {
        return Ok(Place { is_deleted: true, ..place });
    }
    let is_it = |path: &Path| {
        sys::fd::stat_path(path, true)
            .is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
    };
    let text = sys::fd::Texts::of(probe.pid).and_then(|texts| texts.link(&file)).map_err(explain)?;
    let real = PathBuf::from(OsStr::from_bytes(&text));
    if path.is_absolute() {
        if is_it(path) {
            return Ok(place);
        }
    } else {
        let cwd = std::fs::read_link(format!("/proc/{}/cwd", probe.pid)).ok();
        let dirs = cwd.into_iter().chain(relative_to(&real, path));
        if let Some(dir) = dirs.into_iter().find(|dir| dir.is_absolute() && is_it(&dir.join(path))) {
            let dir = dir.into_os_string().into_string().ok();
            return dir
                .map(|dir| Place { dir: Some(dir), ..place })
                .ok_or_else(|| probe.refuse("is bound in a directory whose name is no text"));
        }
    }
    let why = format!("is bound to {}, whose file is {} now", shown(name), real.display());
    Err(probe.refuse(why).help(Remedy::Advice("sockets that were moved, or bound in a root of their own, are not carried yet")))
}

/// A directory from which the relative `path` leads to `real`, as far as one can be found by its form.
fn relative_to(real: &Path, path: &Path) -> Option<PathBuf> {
    let mut names = path.components().filter(|part| *part != Component::CurDir).peekable();
    let mut ups = 0;
    while names.next_if_eq(&Component::ParentDir).is_some() {
        ups += 1;
    }
    let mut dir = real.to_path_buf();
    for name in names.collect::<Vec<_>>().into_iter().rev() {
        let Component::Normal(name) = name else { return None };
        if dir.file_name()? != name {
            return None;
        }
        dir.pop();
    }
    deeper(dir, ups)
}

/// Any directory that lies so many levels below.
fn deeper(dir: PathBuf, levels: usize) -> Option<PathBuf> {
    if levels == 0 {
        return Some(dir);
    }
    let entries = std::fs::read_dir(&dir).ok()?.filter_map(Result::ok);
    let mut dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    dirs.find_map(|dir| deeper(dir.path(), levels - 1))
}

impl FdKind for Unix {
    type Entry = UnixSkEntry;
    const NAME: &'static str = "unix socket";
    const TYPE: FdTypes = FdTypes::Unixsk;
    const TAG: u32 = 16;
    const COMES_LAST: bool = true;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.family == Some(libc::AF_UNIX)
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<UnixSkEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "ask about the socket");
        let inode = probe.stat.st_ino as u32;
        let told = cx.shelf.of::<Dumped>().ask(inode).map_err(explain)?;
        let name = told.name.clone().unwrap_or_default();
        let what = match &*name {
            b"" => format!("unix socket {inode}"),
            name => format!("unix socket {}", shown(name)),
        };
        let object = Object::Fd { number: probe.number, what };
        let refuse = |why: &'static str| Err(Failure::unsupported(object.clone(), why).of(probe.pid));
        if probe.has_program() {
            return refuse("has a program of eBPF attached");
        }
        // A datagram socket that others have connected to is no connection.
        let state = match told.peer {
            None if i32::from(told.kind) == libc::SOCK_DGRAM => CLOSED,
            _ => told.state.into(),
        };
        let place = find_file(probe, &name)?;
        if state == LISTENING {
            if told.pending.len() != told.queues.0 as usize || told.pending.contains(&0) {
                let why = "has connections that were not accepted, whose other ends are closed";
                return refuse(why).map_err(Failure::passes);
            }
            let dumped = cx.shelf.of::<Dumped>();
            dumped.waiting.extend(told.pending.iter().map(|client| (*client, inode)));
        }
        let unread = match i32::from(told.kind) {
            libc::SOCK_DGRAM => 0,
            _ if state == LISTENING => 0,
            _ => sys::fd::ioctl_read(&probe.fd, libc::TIOCOUTQ).unwrap_or(0),
        };
        let peer = told.peer.unwrap_or(0);
        let seen = Seen { id, pid: probe.pid, object, kind: told.kind, peer, has_name: !name.is_empty(), unread };
        cx.shelf.of::<Dumped>().seen.insert(inode, seen);
        let is_given = is_given(cx.options, inode, peer);
        let entry = UnixSkEntry {
            id,
            ino: inode,
            r#type: told.kind.into(),
            state,
            flags: probe.flags,
            uflags: if is_given { INHERIT } else { 0 },
            backlog: if state == LISTENING { told.queues.1 } else { 0 },
            peer,
            fown: probe.owner()?,
            opts: probe.socket_options()?,
            name,
            shutdown: (told.shutdown != 0).then_some(told.shutdown.into()),
            file_perms: place.perms,
            name_dir: place.dir,
            deleted: place.is_deleted.then_some(true),
            ns_id: None,
            mnt_id: None,
            peer_cred: peer_cred(&probe.fd),
            own_cred: None,
            elsewhere: None,
            peek_offset: peek_offset(&probe.fd).map_err(|error| probe.fail(error, "read its options"))?,
        };
        if state != LISTENING && !is_given {
            save_queue(probe, &entry, cx)?;
        }
        Ok(entry)
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        let mut dumped = std::mem::take(cx.shelf.of::<Dumped>());
        let mut failures = Failures::new();
        for Packet { mut entry, bytes, rights } in dumped.packets.drain(..) {
            if !rights.is_empty() {
                let rights = cx.flown.get(rights).map(<[u32]>::to_vec).unwrap_or_default();
                entry.scm.push(ScmEntry { r#type: libc::SCM_RIGHTS as u32, rights });
            }
            cx.image("sk-queues.img", kind::SK_QUEUES).record(&entry).payload(&bytes);
        }
        let mut changed: HashMap<u32, (u32, i32)> = HashMap::new();
        let mut outside: HashMap<u32, UnixSkEntry> = HashMap::new();
        for (client, listener) in &dumped.waiting {
            let server = &dumped.seen[listener];
            let mut refuse = |why: &str| {
                let failure = Failure::unsupported(server.object.clone(), why.to_owned());
                failures.push(failure.of(server.pid).passes());
            };
            match dumped.seen.get(client) {
                None => refuse("has a connection that was not accepted, from outside of the tree"),
                Some(client) if client.unread != 0 => {
                    refuse("has a connection that was not accepted, with data in it, which is not carried yet");
                }
                Some(client) => {
                    changed.insert(client.id, (*listener, client.pid));
                }
            }
        }
        let mut seen: Vec<(u32, Seen)> = dumped.seen.drain().collect();
        seen.sort_unstable_by_key(|(_, socket)| socket.id);
        let by_inode: HashMap<u32, (u32, bool)> =
            seen.iter().map(|(inode, socket)| (*inode, (socket.peer, socket.has_name))).collect();
        for (inode, socket) in seen.iter().filter(|(_, socket)| socket.peer != 0) {
            if is_given(cx.options, *inode, socket.peer) {
                continue;
            }
            match by_inode.get(&socket.peer) {
                Some((back, has_name)) => {
                    if back != inode && !has_name {
                        let why = "is connected to a socket without a name, which is not connected to it";
                        failures.push(Failure::unsupported(socket.object.clone(), why).of(socket.pid));
                    }
                }
                None => match outside_peer(*inode, socket, &mut dumped, cx.options) {
                    Ok(entry) => {
                        outside.insert(socket.peer, entry);
                    }
                    Err(failure) => failures.push(failure.of(socket.pid)),
                },
            }
        }
        for (_, entry) in outside {
            let id = cx.next_id();
            let record = FileEntry::new(FdTypes::Unixsk.into(), id, Unix::TAG, &UnixSkEntry { id, ..entry });
            // CRIU wants to know them before those that are connected to them.
            cx.files.insert(0, record);
        }
        for file in cx.files.iter_mut().filter(|file| file.kind == i32::from(FdTypes::Unixsk)) {
            if let (Some((listener, client)), Some((_, body))) = (changed.get(&file.id), &mut file.body)
                && let Ok(mut entry) = UnixSkEntry::decode(&**body)
            {
                entry.peer = *listener;
                entry.own_cred = cred_of(*client);
                *body = entry.encode_to_vec();
            }
        }
        failures
    }

    fn link(&self, entries: &[(u32, &UnixSkEntry)], _files: &FileTable) -> Failures {
        let mut by_inode: HashMap<u32, &UnixSkEntry> = HashMap::new();
        let mut failures = Failures::new();
        for (id, entry) in entries {
            let mut corrupt =
                |why: &str| failures.push(Failure::corrupt("files.img", None, format!("unix socket {id} {why}")));
            if by_inode.insert(entry.ino, entry).is_some() {
                corrupt("has an inode that another one has");
            }
            if ![libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET].contains(&(entry.r#type as i32)) {
                corrupt("is of no type");
            }
            if entry.name.len() > NAME_MAX || entry.state == LISTENING && entry.name.is_empty() {
                corrupt("has a name that is none");
            }
            if entry.name_dir.as_ref().is_some_and(|dir| dir.contains('\0') || !dir.starts_with('/')) {
                corrupt("is bound in a directory that is none");
            }
            if [&entry.peer_cred, &entry.own_cred].into_iter().flatten().any(|cred| !cred.is_one()) {
                corrupt("has credentials that nobody has");
            }
        }
        for (id, entry) in entries.iter().filter(|(_, entry)| entry.peer != 0 && entry.uflags & INHERIT == 0) {
            let object = || Object::Named(format!("unix socket {id}"));
            match by_inode.get(&entry.peer) {
                None => failures.push(Failure::unsupported(object(), "its peer is not in the image")),
                Some(peer) if peer.r#type != entry.r#type => {
                    failures.push(Failure::corrupt("files.img", None, format!("socket {id} and its peer differ")));
                }
                Some(peer) if peer.peer != entry.ino && peer.name.is_empty() => {
                    failures.push(Failure::unsupported(object(), "its peer has no name to connect to"));
                }
                Some(peer) if peer.peer != entry.ino && make::is_connection(entry) && peer.state != LISTENING => {
                    failures.push(Failure::unsupported(object(), "its peer is connected to another socket"));
                }
                Some(_) => {}
            }
        }
        failures
    }

    fn key(&self, entry: &UnixSkEntry, _files: &FileTable) -> Option<String> {
        Some(format!("socket:[{}]", entry.ino))
    }

    /// The end that is given belongs to the tree alone: whether it waits is as the program expects, which would
    /// stand still for ever in a call that it made not to wait.
    fn inherited(&self, entry: &UnixSkEntry, fd: &OwnedFd, _cx: &mut OpenCx) -> Result<(), Failure> {
        let object = || Object::Named(format!("unix socket {}", entry.ino));
        set_status(fd, entry.flags).map_err(|error| error.on(object(), "set the flags of the descriptor given for it"))
    }

    fn holds(&self, images: &Dir) -> Result<Vec<u32>, Failure> {
        let queues = make::load_queues(images)?;
        let packets = queues.into_values().flatten().map(|(packet, _)| packet);
        Ok(packets.flat_map(|packet| packet.scm).flat_map(|scm| scm.rights).collect())
    }

    fn open(&self, entry: &UnixSkEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        make::take(entry, cx)
    }

    fn owner<'e>(&self, entry: &'e UnixSkEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Who the kernel says is at the other end. Nobody has a number that is none.
fn peer_cred(fd: &OwnedFd) -> Option<UnixCredEntry> {
    let (pid, uid, gid) = socket::peer_credentials(fd).ok()?;
    let groups = socket::peer_groups(fd).unwrap_or_default();
    (uid != u32::MAX).then_some(UnixCredEntry { pid: pid as u32, uid, gid, groups })
}

/// Who a process is now.
fn cred_of(pid: i32) -> Option<UnixCredEntry> {
    let text = sys::fd::text(&format!("/proc/{pid}/status")).ok()?;
    let status = sys::proc::parse_status(&text)?;
    Some(UnixCredEntry { pid: pid as u32, uid: status.uid[1], gid: status.gid[1], groups: status.groups })
}

/// Is the socket, or the one at its other end, named by `--external unix[INODE]`?
fn is_given(options: &Options, inode: u32, peer: u32) -> bool {
    let keys = [Some(inode), (peer != 0).then_some(peer)];
    keys.into_iter().flatten().any(|inode| options.external.contains(&format!("unix[{inode}]")))
}

/// A record for a server outside of the tree that `socket` is to be connected to again.
fn outside_peer(inode: u32, socket: &Seen, dumped: &mut Dumped, options: &Options) -> Result<UnixSkEntry, Failure> {
    let holders = || sys::fd::holders(socket.peer.into());
    let told = dumped.ask(socket.peer).unwrap_or_default();
    let name = told.name.clone().unwrap_or_default();
    let whose = || {
        let names: Vec<String> = holders().iter().map(|(pid, name)| format!("process {pid} ({name})")).collect();
        let named = if name.is_empty() { String::new() } else { format!("{}, ", shown(&name)) };
        match names.is_empty() {
            true => format!("is connected to {named}socket {}, which no process of the tree has", socket.peer),
            false => format!("is connected to {named}socket {} of {} outside of the tree", socket.peer, names.join(", ")),
        }
    };
    if i32::from(socket.kind) != libc::SOCK_DGRAM {
        let advice = "a connection cannot be made again unnoticed; pass one in with --external unix[INODE] at the dump \
                      and --inherit-fd fd[N]:socket:[INODE] at the restore";
        return Err(Failure::unsupported(socket.object.clone(), whose()).help(Remedy::Advice(advice)));
    }
    let is_allowed = options.ext_unix_sk.as_ref().is_some_and(|inodes| {
        inodes.is_empty() || inodes.contains(&inode) || inodes.contains(&socket.peer)
    });
    if !is_allowed {
        return Err(Failure::policy(socket.object.clone(), whose(), &options::EXT_UNIX_SK));
    }
    if name.is_empty() {
        let why = format!("{}; it has no name to connect to again", whose());
        return Err(Failure::unsupported(socket.object.clone(), why));
    }
    let (mut name_dir, mut elsewhere) = (None, None);
    if let Some(path) = path_of(&name) {
        let is_it = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|found| {
                found.file_type().is_socket() && told.vfs.is_none_or(|(_, inode)| found.ino() as u32 == inode)
            })
        };
        let found = if path.is_absolute() {
            elsewhere = (!is_it(path)).then_some(true);
            elsewhere.is_none() || root_of(&told, path).is_some()
        } else {
            let cwds = holders().into_iter().filter_map(|(pid, _)| std::fs::read_link(format!("/proc/{pid}/cwd")).ok());
            name_dir = cwds.into_iter().find(|cwd| is_it(&cwd.join(path))).and_then(|cwd| cwd.into_os_string().into_string().ok());
            name_dir.is_some()
        };
        if !found {
            let why = format!("{}; its path does not lead to it from here", whose());
            return Err(Failure::unsupported(socket.object.clone(), why));
        }
    }
    Ok(UnixSkEntry {
        ino: socket.peer,
        r#type: socket.kind.into(),
        state: LISTENING,
        uflags: EXTERN,
        name,
        name_dir,
        elsewhere,
        ..UnixSkEntry::default()
    })
}

/// The root of a process that has the socket and in which its path leads to it.
fn root_of(socket: &UnixSocket, path: &Path) -> Option<OwnedFd> {
    let inside = path.strip_prefix("/").ok()?;
    sys::fd::holders(socket.inode.into()).into_iter().find_map(|(pid, _)| {
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let found = std::fs::metadata(root.join(inside)).ok()?;
        let is_it = found.file_type().is_socket() && socket.vfs.is_some_and(|(_, inode)| found.ino() as u32 == inode);
        is_it.then(|| sys::fd::open(&root, libc::O_PATH | libc::O_DIRECTORY).ok()).flatten()
    })
}

/// Where the next look into the queue begins, if that is somewhere else than where bytes are taken from.
fn peek_offset(fd: &OwnedFd) -> Result<Option<u32>, Errno> {
    Ok(u32::try_from(socket::int_option(fd, libc::SOL_SOCKET, SO_PEEK_OFF)?).ok())
}

fn set_peek_offset(fd: &OwnedFd, offset: i32) -> Result<(), Errno> {
    socket::set_option(fd, libc::SOL_SOCKET, SO_PEEK_OFF, &offset.to_ne_bytes())
}

/// Records the messages in the receive queue.
fn save_queue(probe: &FdProbe, entry: &UnixSkEntry, cx: &mut DumpCx) -> Result<(), Failure> {
    let explain = |error: Errno| probe.fail(error, "read the queue");
    if sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).map_err(explain)? == 0 {
        // No bytes; an empty message may still wait. It is not looked at here: the kernel shows it once.
        let is_stream = entry.r#type as i32 == libc::SOCK_STREAM;
        if is_stream || !sys::fd::poll(&[probe.fd.as_fd()], 0).map_err(explain)?[0] {
            return Ok(());
        }
    }
    if entry.r#type as i32 == libc::SOCK_STREAM && socket::has_urgent(&probe.fd) {
        return Err(probe.refuse("has an urgent byte (MSG_OOB) in its queue, which is not carried yet").passes());
    }
    let set = |offset: i32| set_peek_offset(&probe.fd, offset).map_err(explain);
    set(0)?;
    let result = copy_queue(probe, entry, cx, &set);
    set(entry.peek_offset.map_or(-1, |offset| offset as i32))?;
    result
}

fn copy_queue(
    probe: &FdProbe,
    entry: &UnixSkEntry,
    cx: &mut DumpCx,
    set: &dyn Fn(i32) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut buffer = std::mem::take(&mut cx.shelf.of::<Dumped>().buffer);
    buffer.resize(MESSAGE_MAX, 0);
    let result = copy_messages(probe, entry, cx, set, &mut buffer);
    cx.shelf.of::<Dumped>().buffer = buffer;
    result
}

fn copy_messages(
    probe: &FdProbe,
    entry: &UnixSkEntry,
    cx: &mut DumpCx,
    set: &dyn Fn(i32) -> Result<(), Failure>,
    buffer: &mut [u8],
) -> Result<(), Failure> {
    let is_stream = entry.r#type as i32 == libc::SOCK_STREAM;
    let first_packet = cx.shelf.of::<Dumped>().packets.len();
    let (mut at, mut full_count) = (0, 0);
    loop {
        let mut message = match socket::peek(&probe.fd, buffer) {
            Err(error) if matches!(error.code, libc::EAGAIN | libc::ECONNRESET | libc::ENOTCONN | libc::EINVAL) => break,
            Err(error) => return Err(probe.fail(error, "read the queue")),
            Ok(message) => message,
        };
        // Where nothing more can come, the end of it looks like an empty message, again and again.
        let is_shut = entry.shutdown.is_some_and(|how| how & SkShutdown::Read as i32 != 0);
        let is_packets = entry.r#type as i32 == libc::SOCK_SEQPACKET;
        let is_end = || {
            let lengths = socket::queued_lengths(&probe.fd).unwrap_or_default();
            lengths.into_iter().filter(|length| *length > 0).count() == full_count
        };
        if message.length == 0 && (is_stream || is_packets && is_shut && message.rights.is_empty() && is_end()) {
            break;
        }
        full_count += usize::from(message.length > 0);
        if let Some(kind) = message.other {
            let why = format!("has control messages of type {kind} in its queue, which are not carried yet");
            return Err(probe.refuse(why));
        }
        if message.is_cut {
            return Err(probe.refuse("has a message in its queue that is too long"));
        }
        if is_stream && !message.rights.is_empty() {
            // One look may have gone past bytes that came before those with the descriptors.
            set(at)?;
            let plain = socket::bytes_before_last(&probe.fd, message.length)
                .map_err(|error| probe.fail(error, "read the queue"))?;
            if plain > 0 {
                message.length = plain;
                message.rights.clear();
            }
            set(at + message.length as i32)?;
        }
        at += message.length as i32;
        let from = message.from.get(2..).filter(|name| !name.is_empty()).map(<[u8]>::to_vec);
        let sender = message.sender.filter(|(pid, ..)| *pid != 0);
        let sender =
            sender.map(|(pid, uid, gid)| UnixCredEntry { pid: pid as u32, uid, gid, groups: Vec::new() });
        let length = message.length as u32;
        let packet = SkPacketEntry { id_for: entry.id, length, scm: Vec::new(), from, sender };
        let first = cx.flying.len();
        cx.flying.extend(message.rights.into_iter().map(|fd| (probe.pid, fd)));
        let rights = first..cx.flying.len();
        let bytes = buffer[..message.length].to_vec();
        cx.shelf.of::<Dumped>().packets.push(Packet { entry: packet, bytes, rights });
    }
    if !is_stream {
        let packets = &mut cx.shelf.of::<Dumped>().packets;
        let seen = packets.split_off(first_packet);
        packets.extend(with_hidden(entry.id, seen, &probe.fd));
    }
    Ok(())
}

/// Adds the empty messages that somebody has looked at before, and the kernel therefore shows to nobody who looks; where it
/// tells its tracing of them.
fn with_hidden(id: u32, seen: Vec<Packet>, fd: &OwnedFd) -> Vec<Packet> {
    if socket::queued_count(fd).is_none_or(|count| count as usize == seen.len()) {
        return seen;
    }
    let Some(lengths) = socket::queued_lengths(fd) else { return seen };
    let mut all = Vec::with_capacity(lengths.len());
    let mut seen = seen.into_iter().peekable();
    for length in lengths {
        let is_next = seen.peek().is_some_and(|packet| packet.entry.length == length);
        all.extend(match length {
            0 if !is_next => {
                let entry = SkPacketEntry { id_for: id, ..SkPacketEntry::default() };
                Some(Packet { entry, bytes: Vec::new(), rights: 0..0 })
            }
            _ => seen.next(),
        });
    }
    all.extend(seen);
    all
}
