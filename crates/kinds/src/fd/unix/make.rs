//! All UNIX sockets of a set of images, made together: what one is connected to, it has to find.
//!
//! The kernel notes who makes a pair, connects or listens. So each of these calls is made by a child for a moment that has
//! the pid and the credentials of whoever made it, before the tree is there. Nobody hands its credentials to a message
//! later: those are sent by us with the right to name another, whose pid somebody has to have meanwhile.
//!
//! A socket whose name is gone from its folder gets that name in a file system of its own, which nobody else
//! sees and which ends with the restore.

use super::{CONNECTED, EXTERN, INHERIT, LISTENING, SkPacketEntry, UnixCredEntry, UnixSkEntry, kind_name, path_of, root_of, shown};
use crate::contract::{FileTable, OpenCx, set_new_status, set_status};
use crate::fd::socket_options;
use image::{Dir, Reader, SkOptsEntry, SkShutdown, kind};
use model::{Errno, Failure, IdMap, Object};
use std::collections::hash_map::Entry;
use foldhash::{HashMap, HashMapExt, HashSet, HashSetExt};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use sys::socket;
use sys::stand_in::{self, Call, Placeholder, Who};
use sys::unix_diag::{Diag, UnixSocket};

/// Messages by the id of the file that has them in its queue.
type Queues = HashMap<u32, Vec<(SkPacketEntry, Vec<u8>)>>;

/// The sockets of a restore that were not asked for yet, and those that could not be made, by inode.
#[derive(Debug, Default)]
struct Made {
    fds: HashMap<u32, OwnedFd>,
    failures: HashMap<u32, Failure>,
}

/// Is it one end of a connection, and not just sending to an address?
pub fn is_connection(entry: &UnixSkEntry) -> bool {
    entry.r#type as i32 != libc::SOCK_DGRAM
}

/// The socket of a record. The first call makes all of them.
pub fn take(entry: &UnixSkEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
    if entry.uflags & INHERIT != 0 {
        let why = format!("was left out of the dump; give one with --inherit-fd fd[N]:socket:[{}]", entry.ino);
        return Err(Failure::conflict(object(entry), "", why));
    }
    if cx.shelf.of::<Option<Made>>().is_none() {
        let opened = std::mem::take(&mut cx.opened);
        let made = make_all(cx, &opened);
        cx.opened = opened;
        *cx.shelf.of::<Option<Made>>() = Some(made?);
    }
    let made = cx.shelf.of::<Option<Made>>().get_or_insert_default();
    if let Some(failure) = made.failures.remove(&entry.ino) {
        return Err(failure);
    }
    let twice = || Failure::corrupt("files.img", None, format!("socket {} is there twice", entry.id));
    made.fds.remove(&entry.ino).ok_or_else(twice)
}

fn object(entry: &UnixSkEntry) -> Object {
    Object::Named(match &*entry.name {
        b"" => format!("unix socket {}", entry.ino),
        name => format!("unix socket {}", shown(name)),
    })
}

/// The options of new sockets, by type: what of a record is like that need not be set.
#[derive(Debug, Default)]
struct Fresh(HashMap<i32, SkOptsEntry>);

impl Fresh {
    fn of(&mut self, kind: i32) -> Result<&SkOptsEntry, Errno> {
        Ok(match self.0.entry(kind) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(socket_options::dump(socket::socket(libc::AF_UNIX, kind, 0)?)?)
            }
        })
    }
}

/// Where a name is looked up.
#[derive(Clone, Copy)]
enum Spot<'m> {
    Here,
    From(&'m Path),
    /// In a root of its own.
    Box(BorrowedFd<'m>),
}

impl Spot<'_> {
    fn within<R: Send>(self, work: impl FnOnce() -> R + Send) -> Result<R, Errno> {
        match self {
            Spot::Here => sys::place::within(None, None, work),
            Spot::From(dir) => sys::place::within(None, Some(dir), work),
            Spot::Box(root) => sys::place::within(Some(root), None, work),
        }
    }
}

struct Maker<'m> {
    files: &'m FileTable,
    /// Files that are no sockets.
    opened: &'m IdMap<OwnedFd>,
    entries: BTreeMap<u32, &'m UnixSkEntry>,
    queues: Queues,
    /// By inode.
    fds: HashMap<u32, OwnedFd>,
    /// Ends that nobody has, kept until queues are filled.
    ends: HashMap<u32, OwnedFd>,
    failures: HashMap<u32, Failure>,
    /// Roots for names that are gone.
    boxes: HashMap<u32, OwnedFd>,
    /// Those that have other options than new ones.
    changed: HashSet<u32>,
    fresh: Fresh,
    /// Was it said already that pids are taken?
    is_warned: AtomicBool,
    /// Devices and inodes of socket files that somebody is bound to.
    alive: Option<Vec<(u32, u32)>>,
}

/// What is done for every socket before the next is done for any.
type Step<'m> = fn(&mut Maker<'m>, &UnixSkEntry) -> Result<(), Failure>;

fn make_all(cx: &mut OpenCx, opened: &IdMap<OwnedFd>) -> Result<Made, Failure> {
    let files = cx.files;
    let mut entries: Vec<&UnixSkEntry> =
        files.entries::<super::Unix>().filter(|entry| entry.uflags & INHERIT == 0).collect();
    entries.sort_unstable_by_key(|entry| entry.id);
    let mut maker = Maker {
        entries: entries.iter().map(|entry| (entry.ino, *entry)).collect(),
        queues: load_queues(cx.images)?,
        files,
        opened,
        fds: HashMap::new(),
        ends: HashMap::new(),
        failures: HashMap::new(),
        boxes: HashMap::new(),
        changed: HashSet::new(),
        fresh: Fresh::default(),
        is_warned: AtomicBool::new(false),
        alive: None,
    };
    let own: Vec<&UnixSkEntry> = entries.into_iter().filter(|entry| entry.uflags & EXTERN == 0).collect();
    maker.make_pairs(&own);
    let steps: [Step; 8] = [
        Maker::make,
        Maker::bind,
        Maker::accept,
        Maker::fill,
        Maker::connect,
        Maker::listen,
        Maker::wait_to_be_accepted,
        Maker::finish,
    ];
    for step in steps {
        for entry in &own {
            if !maker.failures.contains_key(&entry.ino)
                && let Err(failure) = step(&mut maker, entry)
            {
                maker.failures.insert(entry.ino, failure);
            }
        }
    }
    maker.leave_boxes();
    let Maker { fds, mut failures, .. } = maker;
    for entry in own.iter().filter(|entry| !fds.contains_key(&entry.ino)) {
        let why = || Failure::conflict(object(entry), "make it", "another one could not be made");
        failures.entry(entry.ino).or_insert_with(why);
    }
    Ok(Made { fds, failures })
}

impl<'m> Maker<'m> {
    /// The other end of a connection or pair, if that is in the images.
    fn mate(&self, entry: &UnixSkEntry) -> Option<&'m UnixSkEntry> {
        let mate = *self.entries.get(&entry.peer)?;
        (mate.peer == entry.ino && mate.ino != entry.ino && mate.uflags & EXTERN == 0).then_some(mate)
    }

    /// An end whose other end is gone.
    fn is_half(&self, entry: &UnixSkEntry) -> bool {
        let is_bound_datagram = !is_connection(entry) && !entry.name.is_empty();
        entry.peer == 0
            && entry.state != LISTENING
            && (entry.state == CONNECTED && !is_bound_datagram || entry.shutdown.is_some())
    }

    /// Has its name from a listener that accepted it: two cannot be bound to one name.
    fn is_accepted(&self, entry: &UnixSkEntry) -> bool {
        is_connection(entry)
            && entry.state != LISTENING
            && !entry.name.is_empty()
            && self.entries.values().any(|other| {
                other.ino != entry.ino && (&other.name, &other.name_dir) == (&entry.name, &entry.name_dir)
            })
    }

    /// A datagram socket of the images that has an abstract name. (A path can be had twice.)
    fn with_name(&self, name: &[u8], of: &UnixSkEntry) -> Option<(&OwnedFd, &'m UnixSkEntry)> {
        let has_it = |entry: &&&UnixSkEntry| {
            path_of(name).is_none() && entry.name == name && entry.r#type == of.r#type && entry.uflags & EXTERN == 0
        };
        let sender = self.entries.values().find(has_it)?;
        Some((self.fd(sender.ino)?, *sender))
    }

    /// The descriptors that go with a message.
    fn rights(&self, packet: &SkPacketEntry) -> Result<Vec<BorrowedFd<'_>>, Failure> {
        let ids = packet.scm.iter().flat_map(|scm| &scm.rights);
        ids.map(|id| {
            let own = self.files.entry::<super::Unix>(*id).and_then(|entry| self.fd(entry.ino));
            let fd = own.or_else(|| self.opened.get(*id));
            fd.map(AsFd::as_fd).ok_or_else(|| {
                Failure::conflict(Object::Named(format!("file {id}")), "put it into a queue", "it could not be opened")
            })
        })
        .collect()
    }

    /// Sends what the other end has to receive. Has it changed the size of the sender's buffer?
    ///
    /// What is in flight counts against that, and could have come from a larger one.
    fn send_all(
        &self,
        sender: &OwnedFd,
        messages: &[(SkPacketEntry, Vec<u8>)],
        to: Option<&[u8]>,
        sndbuf: u32,
    ) -> Result<Result<bool, Errno>, Failure> {
        let rights: Vec<Vec<BorrowedFd>> =
            messages.iter().map(|(packet, _)| self.rights(packet)).collect::<Result<_, _>>()?;
        let send = || {
            let total: usize = messages.iter().map(|(_, message)| message.len() + 1024).sum();
            let set = |size: u32| {
                socket::set_option(sender, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &size.to_ne_bytes())
            };
            let needed = (total as u32).saturating_mul(2);
            let is_small = socket::int_option(sender, libc::SOL_SOCKET, libc::SO_SNDBUF)? < needed as i32;
            if is_small {
                set(needed.max(sndbuf))?;
            }
            for ((packet, message), rights) in messages.iter().zip(&rights) {
                let mut rest = &message[..];
                let mut rights = &rights[..];
                let who = packet.sender.as_ref().map(|who| (who.pid as i32, who.uid, who.gid));
                let _placeholder = who.map(|(pid, ..)| Placeholder::new(pid)).transpose()?;
                loop {
                    let count = socket::send_with(sender, rest, to, rights, who)?;
                    (rest, rights) = (&rest[count..], &[]);
                    if rest.is_empty() {
                        break;
                    }
                }
            }
            if is_small {
                set(sndbuf / 2)?;
            }
            Ok(is_small)
        };
        Ok(send())
    }

    fn fd(&self, inode: u32) -> Option<&OwnedFd> {
        self.fds.get(&inode)
    }

    fn spot(&self, entry: &'m UnixSkEntry) -> Spot<'_> {
        match (self.boxes.get(&entry.ino), &entry.name_dir) {
            (Some(root), _) => Spot::Box(root.as_fd()),
            (None, Some(dir)) => Spot::From(Path::new(dir)),
            (None, None) => Spot::Here,
        }
    }

    /// Makes pairs, those of each process together.
    fn make_pairs(&mut self, own: &[&'m UnixSkEntry]) {
        let mut by_maker: BTreeMap<Who, Vec<&UnixSkEntry>> = BTreeMap::new();
        for entry in own {
            let mate = self.mate(entry);
            let is_second = mate.is_some_and(|mate| mate.id < entry.id);
            let is_pair = (mate.is_some() || self.is_half(entry)) && !is_second && !self.is_of_connection(entry);
            if let (true, Some(cred)) = (is_pair, &entry.peer_cred) {
                by_maker.entry(who(cred)).or_default().push(entry);
            }
        }
        for (who, entries) in by_maker {
            let calls: Vec<Call> = entries.iter().map(|entry| Call::Pair(entry.r#type as i32)).collect();
            let made = match stand_in::run(&who, &calls) {
                Ok((made, is_exact)) => {
                    self.warn(&who, is_exact);
                    made
                }
                Err(error) => calls.iter().map(|_| Err(error)).collect(),
            };
            for (entry, made) in entries.into_iter().zip(made) {
                match made {
                    Ok(Some((this, that))) => self.keep_pair(entry, this, that),
                    Ok(None) => {}
                    Err(error) => {
                        let failure = error.on(object(entry), "make it in the place of another process");
                        self.failures.insert(entry.ino, failure);
                    }
                }
            }
        }
    }

    fn keep_pair(&mut self, entry: &UnixSkEntry, this: OwnedFd, that: OwnedFd) {
        self.fds.insert(entry.ino, this);
        match self.mate(entry) {
            Some(mate) => self.fds.insert(mate.ino, that),
            None => self.ends.insert(entry.ino, that),
        };
    }

    /// Makes a call in the place of another process, if it is known of which.
    fn call(&self, cred: Option<&UnixCredEntry>, call: Call) -> Result<(), Errno> {
        let Some(cred) = cred else {
            return match call {
                Call::Listen(fd, backlog) => socket::listen(fd, backlog),
                Call::Connect(fd, address) => socket::connect(fd, address),
                Call::Pair(_) => Ok(()),
            };
        };
        let who = who(cred);
        let (made, is_exact) = stand_in::run(&who, &[call])?;
        self.warn(&who, is_exact);
        made.into_iter().try_for_each(|made| made.map(drop))
    }

    fn warn(&self, who: &Who, is_exact: bool) {
        if !is_exact && !self.is_warned.swap(true, Ordering::Relaxed) {
            log::warn!("SO_PEERCRED of UNIX sockets tells another pid than {}, which is taken", who.pid);
        }
    }

    /// Has one of both ends its name from a listener?
    fn is_of_connection(&self, entry: &UnixSkEntry) -> bool {
        self.is_accepted(entry) || self.mate(entry).is_some_and(|mate| self.is_accepted(mate))
    }

    fn make(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(entry), "make it");
        let kind = entry.r#type as i32;
        let mate = self.mate(entry);
        if self.fds.contains_key(&entry.ino) || self.is_of_connection(entry) {
            return Ok(());
        }
        if mate.is_none() && !self.is_half(entry) {
            let fd = socket::socket(libc::AF_UNIX, kind, 0).map_err(explain)?;
            self.fds.insert(entry.ino, fd);
            return Ok(());
        }
        let (this, that) = socket::socketpair(libc::AF_UNIX, kind, 0).map_err(explain)?;
        self.keep_pair(entry, this, that);
        Ok(())
    }

    fn bind(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        if entry.name.is_empty() || self.is_accepted(entry) {
            return Ok(());
        }
        let explain = |error: Errno| error.on(object(entry), "bind it");
        let address = socket::unix_address(&entry.name);
        let Some(fd) = self.fds.remove(&entry.ino) else { return Ok(()) };
        let result = match path_of(&entry.name) {
            None => socket::bind(&fd, &address).map_err(|error| match error.code {
                libc::EADDRINUSE => Failure::conflict(object(entry), "bind it", "the name is in use"),
                _ => explain(error),
            }),
            Some(path) if entry.deleted == Some(true) => self.bind_in_box(entry, path, &fd, &address),
            Some(path) => self.bind_to_path(entry, path, &fd, &address),
        };
        self.fds.insert(entry.ino, fd);
        result
    }

    fn bind_in_box(
        &mut self,
        entry: &UnixSkEntry,
        path: &Path,
        fd: &OwnedFd,
        address: &[u8],
    ) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(entry), "bind it where nobody sees it");
        let root = sys::place::nowhere().map_err(explain)?;
        let bound = sys::place::within(Some(root.as_fd()), None, || {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|error| sys::memory::io_errno("mkdir", &error))?;
            }
            socket::bind(fd, address)?;
            give_perms(entry, path)
        });
        bound.and_then(|bound| bound).map_err(explain)?;
        self.boxes.insert(entry.ino, root);
        Ok(())
    }

    fn bind_to_path(
        &mut self,
        entry: &UnixSkEntry,
        path: &Path,
        fd: &OwnedFd,
        address: &[u8],
    ) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(entry), "bind it");
        let taken = |why: &str| Failure::conflict(object(entry), "bind it", why.to_owned());
        let whole = entry.name_dir.as_ref().map_or(path.to_path_buf(), |dir| Path::new(dir).join(path));
        match std::fs::symlink_metadata(&whole) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(taken("at its path there is a file that is no socket"));
            }
            Ok(found) if self.alive().map_err(explain)?.contains(&(kernel_device(found.dev()), found.ino() as u32)) => {
                return Err(taken("another socket is bound to its path"));
            }
            // Left behind when the tree was dumped.
            Ok(_) => std::fs::remove_file(&whole).map_err(|error| explain(sys::memory::io_errno("unlink", &error)))?,
            Err(_) => {}
        }
        let bound = self.spot_of(entry).within(|| {
            socket::bind(fd, address)?;
            give_perms(entry, path)
        });
        bound.and_then(|bound| bound).map_err(explain)
    }

    fn spot_of<'e>(&self, entry: &'e UnixSkEntry) -> Spot<'e> {
        entry.name_dir.as_ref().map_or(Spot::Here, |dir| Spot::From(Path::new(dir)))
    }

    /// The files that sockets of this net namespace are bound to.
    fn alive(&mut self) -> Result<&[(u32, u32)], Errno> {
        if self.alive.is_none() {
            let all = Diag::new()?.all()?;
            self.alive = Some(all.iter().filter_map(|socket| socket.vfs).collect());
        }
        Ok(self.alive.as_deref().unwrap_or_default())
    }

    /// Makes a connection whose one end was accepted: the other end connects, as it did.
    fn accept(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        if !self.is_accepted(entry) || self.fds.contains_key(&entry.ino) {
            return Ok(());
        }
        let explain = |error: Errno| error.on(object(entry), "connect it as it was");
        let kind = entry.r#type as i32;
        let is_it = |other: &&&UnixSkEntry| {
            other.state == LISTENING
                && other.uflags & EXTERN == 0
                && (&other.name, &other.name_dir) == (&entry.name, &entry.name_dir)
        };
        let listener = self.entries.values().find(is_it).copied();
        let address = socket::unix_address(&entry.name);
        let client = socket::socket(libc::AF_UNIX, kind, 0).map_err(explain)?;
        let mate = self.mate(entry);
        if let Some(mate) = mate {
            self.fds.insert(mate.ino, client);
            self.bind(mate)?;
        } else {
            self.ends.insert(entry.ino, client);
        }
        let client = mate.map_or(self.ends.get(&entry.ino), |mate| self.fds.get(&mate.ino));
        let Some(client) = client else { return Ok(()) };
        let (connects, listens) = (entry.peer_cred.as_ref(), mate.and_then(|mate| mate.peer_cred.as_ref()));
        let server = match listener {
            Some(listener) => {
                let Some(acceptor) = self.fd(listener.ino) else { return Ok(()) };
                self.call(listens, Call::Listen(acceptor.as_fd(), 1)).map_err(explain)?;
                let connect = || self.call(connects, Call::Connect(client.as_fd(), &address));
                let connected = self.spot(listener).within(connect);
                connected.and_then(|connected| connected).map_err(explain)?;
                socket::accept(acceptor).map_err(explain)?
            }
            None => {
                // The listener is gone: one for this moment, where nobody sees it.
                let acceptor = socket::socket(libc::AF_UNIX, kind, 0).map_err(explain)?;
                let root = sys::place::nowhere().map_err(explain)?;
                let connected = sys::place::within(Some(root.as_fd()), None, || {
                    if let Some(parent) = path_of(&entry.name).and_then(Path::parent) {
                        std::fs::create_dir_all(parent).map_err(|error| sys::memory::io_errno("mkdir", &error))?;
                    }
                    socket::bind(&acceptor, &address)?;
                    self.call(listens, Call::Listen(acceptor.as_fd(), 1))?;
                    self.call(connects, Call::Connect(client.as_fd(), &address))?;
                    if let Some(path) = path_of(&entry.name) {
                        let _ = std::fs::remove_file(path);
                    }
                    Ok(())
                });
                connected.and_then(|connected| connected).map_err(explain)?;
                socket::accept(&acceptor).map_err(explain)?
            }
        };
        self.fds.insert(entry.ino, server);
        self.changed.insert(entry.ino);
        Ok(())
    }

    /// Puts messages into the receive queue: from the other end, or from whoever has the sender's name.
    fn fill(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(entry), "fill its queue");
        let Some(messages) = self.queues.remove(&entry.id) else { return Ok(()) };
        let mate = self.mate(entry);
        if let Some(sender) = mate.map_or(self.ends.get(&entry.ino), |mate| self.fds.get(&mate.ino)) {
            let name = mate.map_or(&[][..], |mate| &mate.name);
            let stranger = messages.iter().find_map(|(packet, _)| packet.from.as_deref().filter(|from| *from != name));
            if let Some(stranger) = stranger.filter(|_| !is_connection(entry)) {
                let why = format!("has a message from {} in its queue, but is connected to another", shown(stranger));
                return Err(Failure::unsupported(object(entry), why));
            }
            let sndbuf = mate.map_or(entry.opts.so_sndbuf, |mate| mate.opts.so_sndbuf);
            let is_changed = self.send_all(sender, &messages, None, sndbuf)?.map_err(explain)?;
            self.changed.extend(mate.filter(|_| is_changed).map(|mate| mate.ino));
            return Ok(());
        }
        let Some(fd) = self.fd(entry.ino) else { return Ok(()) };
        if entry.name.is_empty() {
            return Err(Failure::corrupt("sk-queues.img", None, format!("socket {} cannot have messages", entry.id)));
        }
        let sndbuf = socket::int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF).map_err(explain)? as u32;
        let address = socket::unix_address(&entry.name);
        let mut changed = Vec::new();
        for of_sender in messages.chunk_by(|one, next| one.0.from == next.0.from) {
            let spot = self.spot(self.entries[&entry.ino]);
            let from = of_sender[0].0.from.as_deref();
            let known = from.and_then(|from| self.with_name(from, entry));
            let sent = match known {
                Some((sender, entry)) => {
                    spot.within(|| self.send_all(sender, of_sender, Some(&address), entry.opts.so_sndbuf))
                }
                None => {
                    let sender = socket::socket(libc::AF_UNIX, entry.r#type as i32, 0).map_err(explain)?;
                    if let Some(from) = from {
                        bind_for_a_moment(&sender, from).map_err(|error| match error.code {
                            libc::EADDRINUSE => {
                                let why = format!("somebody else has the sender's name {}", shown(from));
                                Failure::conflict(object(entry), "fill its queue", why)
                            }
                            _ => explain(error),
                        })?;
                    }
                    spot.within(|| self.send_all(&sender, of_sender, Some(&address), sndbuf))
                }
            };
            if sent.map_err(explain)??.map_err(explain)? {
                changed.extend(known.map(|(_, sender)| sender.ino));
            }
        }
        self.changed.extend(changed);
        Ok(())
    }

    /// Connects a datagram socket to the address that it sends to.
    fn connect(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        if is_connection(entry) || entry.peer == 0 || self.mate(entry).is_some() {
            return Ok(());
        }
        let (Some(fd), Some(peer)) = (self.fd(entry.ino), self.entries.get(&entry.peer)) else { return Ok(()) };
        let address = socket::unix_address(&peer.name);
        let root = match peer.elsewhere {
            Some(true) => Some(elsewhere(peer).map_err(|why| Failure::conflict(object(entry), OUTSIDE, why))?),
            _ => None,
        };
        let spot = root.as_ref().map_or(self.spot(peer), |root| Spot::Box(root.as_fd()));
        let connected = spot.within(|| socket::connect(fd, &address));
        connected.and_then(|connected| connected).map_err(|error| {
            let name = shown(&peer.name);
            let place = peer.name_dir.as_ref().map_or(String::new(), |dir| format!(" (in {dir})"));
            let why = match error.code {
                libc::ENOENT => format!("there is no {name}{place}"),
                libc::ECONNREFUSED => {
                    let whole = path_of(&peer.name).map(|path| Path::new(peer.name_dir.as_deref().unwrap_or("/")).join(path));
                    match whole.and_then(|path| std::fs::metadata(path).ok()) {
                        Some(found) if !found.file_type().is_socket() => format!("{name}{place} is no socket"),
                        _ => format!("nobody serves {name}{place}"),
                    }
                }
                libc::EPROTOTYPE => format!("{name}{place} is no {} socket", kind_name(entry.r#type)),
                libc::EPERM => format!("{name}{place} is connected to another socket"),
                _ => format!("{name}{place}: {error}"),
            };
            let doing = if peer.uflags & EXTERN == 0 { "connect it" } else { OUTSIDE };
            Failure::conflict(object(entry), doing, why)
        })
    }

    fn listen(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        match self.fd(entry.ino) {
            Some(fd) if entry.state == LISTENING => self
                .call(
                    entry.peer_cred.as_ref(),
                    Call::Listen(fd.as_fd(), entry.backlog.min(i32::MAX as u32) as i32),
                )
                .map_err(|error| error.on(object(entry), "have it listen")),
            _ => Ok(()),
        }
    }

    /// Connects to a listener of the tree that has not accepted it yet.
    fn wait_to_be_accepted(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        if !is_connection(entry) || entry.peer == 0 || self.mate(entry).is_some() {
            return Ok(());
        }
        let (Some(fd), Some(peer)) = (self.fd(entry.ino), self.entries.get(&entry.peer)) else { return Ok(()) };
        let explain = |error: Errno| error.on(object(entry), "have it wait to be accepted");
        set_status(fd, libc::O_NONBLOCK as u32).map_err(explain)?;
        let address = socket::unix_address(&peer.name);
        let connect = || self.call(entry.own_cred.as_ref(), Call::Connect(fd.as_fd(), &address));
        self.spot(peer).within(connect).and_then(|connected| connected).map_err(explain)?;
        set_status(fd, 0).map_err(explain)
    }

    fn finish(&mut self, entry: &UnixSkEntry) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(entry), "set its options");
        self.ends.remove(&entry.ino);
        let Some(fd) = self.fds.get(&entry.ino) else { return Ok(()) };
        shut(fd, entry).map_err(explain)?;
        let now = match self.changed.contains(&entry.ino) {
            true => &socket_options::dump(fd).map_err(explain)?,
            false => self.fresh.of(entry.r#type as i32).map_err(explain)?,
        };
        socket_options::restore(fd, &entry.opts, now).map_err(explain)?;
        if let Some(offset) = entry.peek_offset {
            super::set_peek_offset(fd, offset as i32).map_err(explain)?;
        }
        set_new_status(fd, 0, entry.flags).map_err(explain)
    }

    /// Takes the names that are gone away again.
    fn leave_boxes(&self) {
        for (inode, root) in &self.boxes {
            if let Some(path) = self.entries.get(inode).and_then(|entry| path_of(&entry.name)) {
                let _ = sys::place::within(Some(root.as_fd()), None, || std::fs::remove_file(path));
            }
        }
    }
}

fn who(cred: &UnixCredEntry) -> Who {
    Who { pid: cred.pid as i32, uid: cred.uid, gid: cred.gid, groups: cred.groups.clone() }
}

/// A device number as sock_diag(7) gives it. Source: include/linux/kdev_t.h.
fn kernel_device(device: u64) -> u32 {
    libc::major(device) << 20 | libc::minor(device)
}

/// Owner and mode of the file of a socket that was just bound.
fn give_perms(entry: &UnixSkEntry, path: &Path) -> Result<(), Errno> {
    let Some(perms) = &entry.file_perms else { return Ok(()) };
    let explain = |call| move |error: std::io::Error| sys::memory::io_errno(call, &error);
    std::os::unix::fs::lchown(path, Some(perms.uid), Some(perms.gid)).map_err(explain("lchown"))?;
    let mode = std::fs::Permissions::from_mode(perms.mode & 0o7777);
    std::fs::set_permissions(path, mode).map_err(explain("chmod"))
}

/// Gives a sender a name, where nobody sees it.
fn bind_for_a_moment(sender: &OwnedFd, name: &[u8]) -> Result<(), Errno> {
    let address = socket::unix_address(name);
    let Some(path) = path_of(name) else { return socket::bind(sender, &address) };
    let root = sys::place::nowhere()?;
    sys::place::within(Some(root.as_fd()), None, || {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| sys::memory::io_errno("mkdir", &error))?;
        }
        socket::bind(sender, &address)
    })?
}

const OUTSIDE: &str = "connect it to its server outside of the tree";

/// The root in which the one server that is called so is found, and which is not ours.
fn elsewhere(server: &UnixSkEntry) -> Result<OwnedFd, String> {
    let name = shown(&server.name);
    let path = path_of(&server.name).ok_or_else(|| format!("{name} is no path"))?;
    let here = std::fs::metadata(path).map(|found| found.ino() as u32).ok();
    let all = Diag::new().and_then(|mut diag| diag.all()).map_err(|error| error.to_string())?;
    let is_it = |socket: &&UnixSocket| {
        socket.name.as_deref() == Some(&*server.name)
            && u32::from(socket.kind) == server.r#type
            && socket.vfs.map(|(_, inode)| inode) != here
    };
    let mut roots: Vec<OwnedFd> = all.iter().filter(is_it).filter_map(|socket| root_of(socket, path)).collect();
    match roots.len() {
        0 => Err(format!("nobody serves {name} in a root or mount namespace of its own")),
        1 => Ok(roots.remove(0)),
        _ => Err(format!("several serve {name}, each in a root or mount namespace of its own")),
    }
}

/// Reads the queues.
pub fn load_queues(images: &Dir) -> Result<Queues, Failure> {
    let mut queues = Queues::new();
    if let Some(bytes) = images.read("sk-queues.img")? {
        let mut reader = Reader::open(kind::SK_QUEUES, "sk-queues.img", &bytes)?;
        while let Some(packet) = reader.record::<SkPacketEntry>()? {
            let payload = reader.payload(packet.length as usize)?.to_vec();
            if packet.scm.iter().any(|scm| scm.r#type as i32 != libc::SCM_RIGHTS) {
                return Err(reader.corrupt("has a control message that is not known".into()));
            }
            if packet.sender.as_ref().is_some_and(|sender| !sender.is_one() || sender.pid == 0) {
                return Err(reader.corrupt("has a message of a sender that is none".into()));
            }
            queues.entry(packet.id_for).or_default().push((packet, payload));
        }
    }
    Ok(queues)
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
