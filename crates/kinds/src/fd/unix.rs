//! UNIX sockets that are connected to each other inside the tree, without a name.
//!
//! Read from: sock_diag(7) by inode (type, peer, shutdown), getsockopt(2); queued messages by MSG_PEEK with
//! SO_PEEK_OFF, which leaves them in the queue and keeps their boundaries.
//! Rebuilt by: socketpair(2), the queue of each end sent from the other, shutdown(2).
//! Refused for now: names, listeners, peers outside, descriptors and credentials in queues.

use super::socket_options;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, set_status};
use image::{FdTypes, FownEntry, Reader, SkOptsEntry, SkShutdown, kind};
use model::options;
use model::{Errno, Failure, Failures, Object};
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use sys::socket;
use sys::unix_diag::Diag;

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
    #[prost(bytes = "vec", optional, tag = "14")]
    pub name_dir: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "15")]
    pub deleted: Option<bool>,
    #[prost(uint32, optional, tag = "16")]
    pub ns_id: Option<u32>,
    #[prost(sint32, optional, tag = "17")]
    pub mnt_id: Option<i32>,
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
const LISTENING: u8 = 10;
/// More than any one message that a queue can hold.
const MESSAGE_MAX: usize = 4 << 20;

#[derive(Debug, Default)]
struct Dumped {
    diag: Option<Diag>,
    /// By inode: which sockets the tree has.
    seen: HashMap<u32, u32>,
    /// Whose peer has to be one of those: its inode, and how to say where it is.
    wanted: Vec<(u32, Object, i32, u8)>,
}

/// Sockets of a restore by inode, made but not asked for yet, and those already given.
#[derive(Debug, Default)]
struct Opened {
    entries: HashMap<u32, UnixSkEntry>,
    queues: HashMap<u32, Vec<Vec<u8>>>,
    waiting: HashMap<u32, OwnedFd>,
    is_loaded: bool,
}

impl FdKind for Unix {
    type Entry = UnixSkEntry;
    const NAME: &'static str = "unix socket";
    const TYPE: FdTypes = FdTypes::Unixsk;
    const TAG: u32 = 16;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.format() == libc::S_IFSOCK
            && socket::int_option(&probe.fd, libc::SOL_SOCKET, libc::SO_DOMAIN) == Ok(libc::AF_UNIX)
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<UnixSkEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "ask about the socket");
        let inode = probe.stat.st_ino as u32;
        let dumped = cx.shelf.of::<Dumped>();
        let diag = match &dumped.diag {
            Some(diag) => diag,
            None => dumped.diag.insert(Diag::new().map_err(explain)?),
        };
        let told = diag.ask(inode).map_err(explain)?;
        let name = told.name.as_deref().unwrap_or(b"");
        let shown = String::from_utf8_lossy(name).replace('\0', "@");
        let object = match &*shown {
            "" => Object::Fd { number: probe.number, what: format!("unix socket {inode}") },
            name => Object::Fd { number: probe.number, what: format!("unix socket {name}") },
        };
        let refuse = |why: &'static str| Err(Failure::unsupported(object.clone(), why).of(probe.pid));
        if told.state == LISTENING {
            return refuse("listens; UNIX sockets with a name are not carried yet");
        }
        if !name.is_empty() {
            return refuse("is bound; UNIX sockets with a name are not carried yet");
        }
        let peer = told.peer.unwrap_or(0);
        dumped.seen.insert(inode, id);
        if peer != 0 {
            dumped.wanted.push((peer, object.clone(), probe.pid, told.kind));
        }
        let entry = UnixSkEntry {
            id,
            ino: inode,
            r#type: told.kind.into(),
            state: told.state.into(),
            flags: probe.flags,
            uflags: 0,
            backlog: 0,
            peer,
            fown: probe.owner()?,
            opts: socket_options::dump(&probe.fd).map_err(explain)?,
            name: Vec::new(),
            shutdown: (told.shutdown != 0).then_some(told.shutdown.into()),
            file_perms: None,
            name_dir: None,
            deleted: None,
            ns_id: None,
            mnt_id: None,
        };
        if socket_options::has_filter(&probe.fd) {
            return refuse("has a BPF filter attached");
        }
        save_queue(probe, &entry, cx)?;
        Ok(entry)
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        let dumped = std::mem::take(cx.shelf.of::<Dumped>());
        let missing = dumped.wanted.into_iter().filter(|wanted| !dumped.seen.contains_key(&wanted.0));
        missing
            .map(|(peer, object, pid, kind)| {
                let why = format!("is connected to socket {peer}, which no process of the tree has");
                match i32::from(kind) {
                    libc::SOCK_DGRAM => Failure::policy(object, why, &options::EXT_UNIX_SK),
                    _ => Failure::unsupported(object, why),
                }
                .of(pid)
            })
            .collect()
    }

    fn link(&self, entries: &[(u32, &UnixSkEntry)], _files: &FileTable) -> Failures {
        let by_inode: HashMap<u32, &UnixSkEntry> = entries.iter().map(|(_, entry)| (entry.ino, *entry)).collect();
        let mut failures = Failures::new();
        for (id, entry) in entries {
            let object = || Object::Named(format!("unix socket {id}"));
            if !entry.name.is_empty() || entry.state == LISTENING.into() {
                let why = "UNIX sockets with a name are not carried yet";
                failures.push(Failure::unsupported(object(), why));
            } else if entry.peer != 0 {
                match by_inode.get(&entry.peer) {
                    None => failures.push(Failure::unsupported(object(), "its peer is not in the image")),
                    Some(peer) if peer.peer != 0 && peer.peer != entry.ino || peer.ino == entry.ino => {
                        failures.push(Failure::unsupported(object(), "its peer is connected to another socket"));
                    }
                    Some(peer) if peer.r#type != entry.r#type => {
                        failures.push(Failure::corrupt("files.img", None, format!("socket {id} and its peer differ")));
                    }
                    Some(_) => {}
                }
            }
        }
        failures
    }

    fn open(&self, entry: &UnixSkEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named("unix socket".into()), "make it");
        load(cx)?;
        if let Some(fd) = cx.shelf.of::<Opened>().waiting.remove(&entry.ino) {
            return Ok(fd);
        }
        let opened = cx.shelf.of::<Opened>();
        let kind = entry.r#type as i32;
        if entry.peer == 0 && entry.state != CONNECTED && entry.shutdown.is_none() {
            let fd = socket::socket(libc::AF_UNIX, kind, 0).map_err(explain)?;
            socket_options::restore(&fd, &entry.opts).map_err(explain)?;
            set_status(&fd, entry.flags).map_err(explain)?;
            return Ok(fd);
        }
        let (this, that) = socket::socketpair(libc::AF_UNIX, kind, 0).map_err(explain)?;
        let peer = opened.entries.get(&entry.peer).cloned();
        socket_options::restore(&this, &entry.opts).map_err(explain)?;
        if let Some(peer) = &peer {
            socket_options::restore(&that, &peer.opts).map_err(explain)?;
            fill(&this, opened.queues.get(&peer.id), &entry.opts).map_err(explain)?;
        }
        let sender = peer.as_ref().map_or(&entry.opts, |peer| &peer.opts);
        fill(&that, opened.queues.get(&entry.id), sender).map_err(explain)?;
        shut(&this, entry).map_err(explain)?;
        set_status(&this, entry.flags).map_err(explain)?;
        // Without a peer in the image that end closes here, as it was when the dump was made.
        if let Some(peer) = peer {
            shut(&that, &peer).map_err(explain)?;
            set_status(&that, peer.flags).map_err(explain)?;
            opened.waiting.insert(peer.ino, that);
        }
        Ok(this)
    }

    fn owner<'e>(&self, entry: &'e UnixSkEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Records the messages in the receive queue.
fn save_queue(probe: &FdProbe, entry: &UnixSkEntry, cx: &mut DumpCx) -> Result<(), Failure> {
    let explain = |error: Errno| probe.fail(error, "read the queue");
    if sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).map_err(explain)? == 0 {
        // No bytes; an empty message may still wait.
        let mut nothing = [0; 1];
        match socket::peek(&probe.fd, &mut nothing) {
            Err(error) if error.code == libc::EAGAIN => return Ok(()),
            Ok(_) if entry.r#type as i32 == libc::SOCK_STREAM => return Ok(()),
            Ok(_) => {}
            Err(error) if matches!(error.code, libc::ECONNRESET | libc::ENOTCONN | libc::EINVAL) => return Ok(()),
            Err(error) => return Err(explain(error)),
        }
    }
    let before = socket::int_option(&probe.fd, libc::SOL_SOCKET, SO_PEEK_OFF).map_err(explain)?;
    let set = |offset: i32| {
        socket::set_option(&probe.fd, libc::SOL_SOCKET, SO_PEEK_OFF, &offset.to_ne_bytes()).map_err(explain)
    };
    set(0)?;
    let result = copy_queue(probe, entry, cx);
    set(before)?;
    result
}

fn copy_queue(probe: &FdProbe, entry: &UnixSkEntry, cx: &mut DumpCx) -> Result<(), Failure> {
    let is_stream = entry.r#type as i32 == libc::SOCK_STREAM;
    let mut buffer = vec![0u8; MESSAGE_MAX];
    loop {
        let message = match socket::peek(&probe.fd, &mut buffer) {
            Err(error) if error.code == libc::EAGAIN => return Ok(()),
            Err(error) => return Err(probe.fail(error, "read the queue")),
            Ok(message) => message,
        };
        if is_stream && message.length == 0 {
            return Ok(());
        }
        if message.has_control {
            return Err(probe.refuse("has descriptors or credentials in its queue, which are not carried yet"));
        }
        if message.is_cut {
            return Err(probe.refuse("has a message in its queue that is too long"));
        }
        let packet = SkPacketEntry { id_for: entry.id, length: message.length as u32, scm: Vec::new() };
        cx.image("sk-queues.img", kind::SK_QUEUES).record(&packet).payload(&buffer[..message.length]);
    }
}

/// Reads the queues and finds the sockets by inode, once.
fn load(cx: &mut OpenCx) -> Result<(), Failure> {
    let files = cx.files;
    let images = cx.images;
    let opened = cx.shelf.of::<Opened>();
    if std::mem::replace(&mut opened.is_loaded, true) {
        return Ok(());
    }
    opened.entries = files.entries::<Unix>().map(|entry| (entry.ino, entry.clone())).collect();
    if let Some(bytes) = images.read("sk-queues.img")? {
        let mut reader = Reader::open(kind::SK_QUEUES, "sk-queues.img", &bytes)?;
        while let Some(packet) = reader.record::<SkPacketEntry>()? {
            let payload = reader.payload(packet.length as usize)?.to_vec();
            if !packet.scm.is_empty() {
                return Err(reader.corrupt("has descriptors in a queue, which are not carried yet".into()));
            }
            opened.queues.entry(packet.id_for).or_default().push(payload);
        }
    }
    Ok(())
}

/// Sends what the other end has to receive.
///
/// What is in flight counts against the sender's buffer, and could have come from a larger one.
fn fill(sender: impl AsFd, messages: Option<&Vec<Vec<u8>>>, opts: &SkOptsEntry) -> Result<(), Errno> {
    let Some(messages) = messages else { return Ok(()) };
    let sender = sender.as_fd();
    // More than the queue takes is an error then, not a wait for a reader that never comes.
    set_status(sender, libc::O_NONBLOCK as u32)?;
    let total: usize = messages.iter().map(|message| message.len() + 1024).sum();
    let set = |size: u32| {
        socket::set_option(sender, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &size.to_ne_bytes())
    };
    set((total as u32).saturating_mul(2).max(opts.so_sndbuf))?;
    for message in messages {
        let mut rest = &message[..];
        loop {
            let count = socket::send(sender, rest, None)?;
            rest = &rest[count..];
            if rest.is_empty() {
                break;
            }
        }
    }
    set(opts.so_sndbuf / 2)
}

fn shut(fd: impl AsFd, entry: &UnixSkEntry) -> Result<(), Errno> {
    let how = match entry.shutdown.and_then(|how| SkShutdown::try_from(how).ok()) {
        None | Some(SkShutdown::None) => return Ok(()),
        Some(SkShutdown::Read) => libc::SHUT_RD,
        Some(SkShutdown::Write) => libc::SHUT_WR,
        Some(SkShutdown::Both) => libc::SHUT_RDWR,
    };
    socket::shutdown(fd, how)
}
