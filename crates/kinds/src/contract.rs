//! What a kind of descriptor has to say, and what it is given to say it with.
//!
//! Proven against five unlike kinds: eventfd, pipe, epoll, UNIX socket, listening TCP.

use crate::fd::ghost::{self, FileAt, Remap, RemapFilePathEntry};
use crate::fd::socket_options;
use crate::fd::tty::{Control, Person, TtyInfoEntry};
use agent::crew::in_parallel;
use agent::{Area, List};
use image::{CredsEntry, Dir, FileEntry, FownEntry, Message, SkOptsEntry, Writer};
use model::{Errno, Failure, Failures, IdMap, Object, Options};
use std::any::{Any, TypeId};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use sys::each::Descriptor;
use sys::fd::Texts;
use sys::process::StandIn;
use sys::socket::int_option;

/// The number of what no process has.
const IN_FLIGHT: i32 = -1;

/// A descriptor of a frozen process, looked at through a duplicate of our own.
#[derive(Debug)]
pub struct FdProbe {
    pub pid: i32,
    pub number: i32,
    pub fd: Arc<OwnedFd>,
    pub stat: libc::stat,
    /// As F_GETFL gives them.
    pub flags: u32,
    pub position: u64,
    /// Where the kernel has the open file; zero where it does not tell.
    pub address: u64,
    /// Of a socket: AF_UNIX, AF_INET, ...
    pub family: Option<i32>,
    link: Vec<u8>,
    /// What its number is in `texts`, and what the kernel's tracing tells of it.
    number_there: i32,
    texts: Arc<Texts>,
    told: Option<Descriptor>,
    info: OnceLock<Vec<u8>>,
    owner: Result<FownEntry, Errno>,
    options: Option<Box<Result<SkOptsEntry, Errno>>>,
}

const NOBODY: FownEntry = FownEntry { uid: 0, euid: 0, signum: 0, pid_type: 0, pid: 0 };

fn read_owner(fd: &OwnedFd, flags: u32) -> Result<FownEntry, Errno> {
    if flags & libc::O_PATH as u32 != 0 {
        return Ok(NOBODY);
    }
    let (kind, id) = sys::fd::owner(fd)?;
    let signum = sys::fd::fcntl(fd, sys::fd::F_GETSIG, 0)? as u32;
    if id == 0 {
        return Ok(FownEntry { signum, ..NOBODY });
    }
    let (uid, euid) = sys::fd::owner_uids(fd)?;
    // On disk is the kernel's `enum pid_type`: 0 thread, 1 thread group, 2 process group.
    Ok(FownEntry { uid, euid, signum, pid_type: kind, pid: id as u32 })
}

impl FdProbe {
    /// Looks at descriptor `number` of `pid`, of which `fd` is a duplicate; `texts` are of that process.
    pub fn new(
        pid: i32,
        number: i32,
        fd: OwnedFd,
        texts: &Arc<Texts>,
        mut told: Option<Descriptor>,
    ) -> Result<FdProbe, Errno> {
        let stat = sys::fd::stat(&fd)?;
        let flags = told.as_ref().map_or_else(|| sys::fd::status_flags(&fd), |told| Ok(told.flags))?;
        let position = match stat.st_mode & libc::S_IFMT {
            libc::S_IFIFO | libc::S_IFSOCK => 0,
            _ => sys::fd::position(&fd).unwrap_or(0),
        };
        let may_have_owner = told.as_ref().is_none_or(|told| told.has_owner);
        let is_socket = stat.st_mode & libc::S_IFMT == libc::S_IFSOCK && flags & libc::O_PATH as u32 == 0;
        let probe = FdProbe {
            pid,
            number,
            stat,
            flags,
            position,
            address: told.as_ref().map_or(0, |told| told.file),
            family: is_socket
                .then(|| int_option(&fd, libc::SOL_SOCKET, libc::SO_DOMAIN))
                .and_then(Result::ok),
            // Of a socket the text says nothing new.
            link: match (is_socket, told.as_mut().and_then(|told| told.link.take())) {
                (true, _) => format!("socket:[{}]", stat.st_ino).into_bytes(),
                (false, Some(link)) => link,
                (false, None) => texts.link(&fd).unwrap_or_default(),
            },
            number_there: number,
            texts: texts.clone(),
            told,
            info: OnceLock::new(),
            owner: if may_have_owner { read_owner(&fd, flags) } else { Ok(NOBODY) },
            options: is_socket.then(|| Box::new(socket_options::dump(&fd))),
            fd: Arc::new(fd),
        };
        // Who is of this sort is told in that text alone; it is read here, where many are at work.
        if probe.format() == 0 {
            probe.info();
        }
        Ok(probe)
    }

    /// Looks at what was found in the queue of a socket of `pid`; `fd` is ours, and so are `texts`.
    pub fn in_flight(pid: i32, fd: OwnedFd, texts: &Arc<Texts>, address: u64) -> Result<FdProbe, Errno> {
        let number = fd.as_raw_fd();
        Ok(FdProbe { number: IN_FLIGHT, address, ..FdProbe::new(pid, number, fd, texts, None)? })
    }

    /// Device and inode.
    pub fn inode(&self) -> (u64, u64) {
        (self.stat.st_dev, self.stat.st_ino)
    }

    /// S_IFREG, S_IFIFO, ...; zero for anonymous inodes.
    pub fn format(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// Major and minor number of a device node.
    pub fn device(&self) -> (u32, u32) {
        (libc::major(self.stat.st_rdev), libc::minor(self.stat.st_rdev))
    }

    pub fn is_path_only(&self) -> bool {
        self.flags & libc::O_PATH as u32 != 0
    }

    /// What `/proc/PID/fd/N` points to; empty when it cannot be read.
    pub fn link(&self) -> &[u8] {
        &self.link
    }

    /// The name in brackets of an anonymous inode: "eventfd" of `anon_inode:[eventfd]`.
    pub fn anon_inode(&self) -> Option<&[u8]> {
        if self.format() != 0 {
            return None;
        }
        let name = self.link().strip_prefix(b"anon_inode:")?;
        Some(name.strip_prefix(b"[").and_then(|name| name.strip_suffix(b"]")).unwrap_or(name))
    }

    /// `/proc/PID/fdinfo/N`.
    pub fn info(&self) -> &[u8] {
        self.info.get_or_init(|| self.texts.info(self.number_there).unwrap_or_default())
    }

    /// May there be locks of it?
    pub fn may_have_locks(&self) -> bool {
        self.told.as_ref().is_none_or(|told| told.has_locks)
    }

    /// Options that sockets of all families have.
    pub fn socket_options(&self) -> Result<SkOptsEntry, Failure> {
        let none = Err(Errno { call: "getsockopt", code: libc::ENOTSOCK });
        let options = self.options.as_deref().cloned().unwrap_or(none);
        options.map_err(|error| self.fail(error, "ask about the socket"))
    }

    /// Is a program of eBPF attached to it? The kernel tells that nobody: it refuses to tell its options.
    pub fn has_program(&self) -> bool {
        matches!(self.options.as_deref(), Some(Err(error)) if error.code == libc::EACCES)
    }

    /// Is it closed when its process executes another program? The only thing that belongs to the
    /// descriptor and not to the open file.
    pub fn close_on_exec(&self) -> Result<bool, Failure> {
        if let Some(told) = &self.told {
            return Ok(told.closes_on_exec);
        }
        let flags = sys::proc::fdinfo(self.info(), "flags")
            .and_then(|flags| u32::from_str_radix(std::str::from_utf8(flags).ok()?, 8).ok())
            .ok_or_else(|| self.refuse("the kernel does not tell its flags"))?;
        Ok(flags & libc::O_CLOEXEC as u32 != 0)
    }

    /// A value of `fdinfo` that has to be there.
    pub fn info_hex(&self, key: &str) -> Result<u64, Failure> {
        sys::proc::fdinfo_hex(self.info(), key)
            .ok_or_else(|| self.refuse(format!("the kernel does not tell its {key}")))
    }

    /// F_SETOWN and F_SETSIG.
    pub fn owner(&self) -> Result<FownEntry, Failure> {
        self.owner.clone().map_err(|error| self.fail(error, "read who gets its signals"))
    }

    /// A link that opens the file once more.
    pub fn source(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd()).into()
    }

    /// What is to be recorded; `source` is [`FdProbe::source`].
    pub fn seen<'s>(&'s self, source: &'s Path) -> FileAt<'s> {
        FileAt { path: self.link(), stat: &self.stat, source }
    }

    pub fn object(&self) -> Object {
        let what = match self.link() {
            b"" => "a descriptor".into(),
            link => String::from_utf8_lossy(link).into_owned(),
        };
        if self.number == IN_FLIGHT {
            return Object::Named(format!("{what}, in the queue of a socket"));
        }
        Object::Fd { number: self.number, what }
    }

    pub fn fail(&self, error: Errno, doing: &'static str) -> Failure {
        error.on(self.object(), doing).of(self.pid)
    }

    pub fn refuse(&self, why: impl Into<std::borrow::Cow<'static, str>>) -> Failure {
        Failure::unsupported(self.object(), why).of(self.pid)
    }
}

/// What kinds keep between objects during one run, each under a type of its own.
#[derive(Debug, Default)]
pub struct Shelf(HashMap<TypeId, Box<dyn Any>>);

impl Shelf {
    pub fn of<T: Default + 'static>(&mut self) -> &mut T {
        let entry = self.0.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(T::default()));
        entry.downcast_mut().expect("the key is the type")
    }
}

/// A dump in progress, as kinds see it.
#[derive(Debug)]
pub struct DumpCx<'o> {
    pub options: &'o Options,
    pub shelf: Shelf,
    /// Records of `files.img`.
    pub files: Vec<FileEntry>,
    /// Images that belong to one kind, by name.
    pub images: HashMap<String, Writer>,
    /// What was found in queues, with the process whose socket it is for; and the ids that it got, in this order.
    pub flying: Vec<(i32, OwnedFd)>,
    pub flown: Vec<u32>,
    /// Every process of the tree, and every thread.
    pub pids: Vec<i32>,
    /// The session and terminal of each that lives.
    pub people: BTreeMap<i32, Person>,
    pub tids: HashSet<i32>,
    /// Contents that are stored as pages: the number in `pagemap-shmem-<n>.img`, and the file.
    pub contents: Vec<(u64, OwnedFd)>,
    /// The survey reads no further: what comes next could wait for the frozen tree without end.
    pub ends_here: bool,
    last_id: u32,
}

impl<'o> DumpCx<'o> {
    pub fn new(options: &'o Options, pids: Vec<i32>, tids: HashSet<i32>) -> DumpCx<'o> {
        DumpCx {
            options,
            shelf: Shelf::default(),
            files: Vec::new(),
            images: HashMap::new(),
            flying: Vec::new(),
            flown: Vec::new(),
            pids,
            people: BTreeMap::new(),
            tids,
            contents: Vec::new(),
            ends_here: false,
            last_id: 0,
        }
    }

    /// A new id for an open file; one counter serves all kinds.
    pub fn next_id(&mut self) -> u32 {
        self.last_id += 1;
        self.last_id
    }

    /// Notes what is stored as pages; returns the number that it got, the wanted one if that is free.
    pub fn content(&mut self, wanted: u64, file: OwnedFd) -> u64 {
        const FIRST: u64 = 1 << 31;
        let is_free = |number: &u64| self.contents.iter().all(|content| content.0 != *number);
        let number = std::iter::once(wanted).chain(FIRST..).find(is_free).unwrap_or(wanted);
        self.contents.push((number, file));
        number
    }

    pub fn image(&mut self, name: impl Into<String>, kind: image::Kind) -> &mut Writer {
        self.images.entry(name.into()).or_insert_with(|| Writer::new(kind))
    }
}

/// Files being opened by the coordinator of a restore.
#[allow(missing_debug_implementations)]
pub struct OpenCx<'r> {
    pub options: &'r Options,
    pub images: &'r Dir,
    pub shelf: Shelf,
    pub files: &'r FileTable,
    /// Those that are open already, for kinds that come last.
    pub opened: IdMap<OwnedFd>,
    /// What sessions have, as it is made.
    pub terminals: Vec<Control>,
    /// Stand-ins for processes that have ended, by id; they end with it.
    pub stand_ins: HashMap<i32, StandIn>,
    /// Puts the content of `pagemap-shmem-<n>.img` into a file.
    pub fill: &'r dyn Fn(u64, &OwnedFd) -> Result<(), Failure>,
}

/// Operations for one task, and the memory for what they point to.
#[derive(Debug)]
pub struct TaskOps<'r> {
    pub list: &'r mut List,
    pub area: &'r Area,
}

impl TaskOps<'_> {
    /// Puts bytes where a call can read them; returns the address.
    pub fn bytes(&self, bytes: &[u8]) -> Result<u64, Failure> {
        self.area.put(bytes).map_err(|error| error.on(Object::Tree, "prepare operations"))
    }

    pub fn room(&self, len: usize) -> Result<u64, Failure> {
        self.area.room(len).map_err(|error| error.on(Object::Tree, "prepare operations"))
    }
}

/// One kind of file behind descriptors.
pub trait FdKind: Sync {
    /// Its record: the field of `files.img` that its type names.
    type Entry: Message + Default + 'static;
    const NAME: &'static str;
    /// The number of the type in `fdinfo-*.img`.
    const TYPE: image::FdTypes;
    /// The number of the field in `files.img`.
    const TAG: u32;
    /// Are all other files there when those of this kind are opened?
    const COMES_LAST: bool = false;

    /// Is this object mine? Exactly one kind says yes; the order in which they are asked means nothing.
    fn claims(&self, probe: &FdProbe) -> bool;

    /// Reads the object, once for each open file.
    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<Self::Entry, Failure>;

    /// Looks at all objects of this kind together, when all were read: who is missing?
    fn settle(&self, _cx: &mut DumpCx) -> Failures {
        Failures::new()
    }

    /// Judges the records of an image set, without touching anything: every reason to refuse.
    fn link(&self, _entries: &[(u32, &Self::Entry)], _files: &FileTable) -> Failures {
        Failures::new()
    }

    /// The number of those that are made one after the other, without a look at others: many groups are made at the
    /// same time. None where it is not so.
    fn group(&self, _entry: &Self::Entry, _files: &FileTable) -> Option<u64> {
        None
    }

    /// The key by which `--inherit-fd` gives a descriptor in its place.
    fn key(&self, _entry: &Self::Entry, _files: &FileTable) -> Option<String> {
        None
    }

    /// Takes note of a descriptor that was given in its place.
    fn inherited(&self, _entry: &Self::Entry, _fd: &OwnedFd, _cx: &mut OpenCx) -> Result<(), Failure> {
        Ok(())
    }

    /// Files that objects of this kind hold, whether or not a task has them too.
    fn holds(&self, _images: &Dir) -> Result<Vec<u32>, Failure> {
        Ok(Vec::new())
    }

    /// Other files that the object is made of or with.
    fn needs(&self, _entry: &Self::Entry) -> Vec<u32> {
        Vec::new()
    }

    /// Makes the object.
    fn open(&self, entry: &Self::Entry, cx: &mut OpenCx) -> Result<OwnedFd, Failure>;

    /// Can it be opened only when all threads of the tree, which have these ids, are there?
    fn is_late(&self, _entry: &Self::Entry, _files: &FileTable, _tids: &HashSet<i32>) -> bool {
        false
    }

    /// What is done for it by threads with other credentials, in this order.
    fn errands<'e>(&self, _entry: &'e Self::Entry) -> Vec<Errand<'e>> {
        Vec::new()
    }

    /// Adds the calls of errand `nth`; `fd` is ours, `at_hand` the number of what the thread has for it. Returns the call
    /// that makes the file, if it does.
    fn run_errand(
        &self,
        _entry: &Self::Entry,
        _nth: usize,
        _fd: &OwnedFd,
        _at_hand: i32,
        _ops: &mut TaskOps,
    ) -> Result<Option<usize>, Failure> {
        Ok(None)
    }

    /// What has to wait until the descriptors of a task are in place, or is bound to the task: links
    /// that may be circular, signals. `number` is the descriptor in the first task that has it.
    fn finish(&self, _entry: &Self::Entry, _number: i32, _ops: &mut TaskOps) -> Result<(), Failure> {
        Ok(())
    }

    /// Who gets its signals; set in a task, when tasks have their ids and credentials.
    fn owner<'e>(&self, _entry: &'e Self::Entry) -> Option<&'e FownEntry> {
        None
    }

    /// Threads that make a call of their own for it, in this order, when each is what it was.
    fn repeats(&self, _entry: &Self::Entry) -> Vec<i32> {
        Vec::new()
    }

    /// Adds call `nth` of those; what is ours to do before is done at once. `number` is the descriptor in the process of
    /// the thread.
    fn repeat(
        &self,
        _entry: &Self::Entry,
        _nth: usize,
        _fd: &OwnedFd,
        _number: i32,
        _cx: &ArmCx,
        _ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        Ok(())
    }

    /// Sets going what must not run before everything is there.
    fn arm(&self, _entry: &Self::Entry, _fd: &OwnedFd, _cx: &ArmCx) -> Result<(), Failure> {
        Ok(())
    }
}

/// What a thread of a process does for a file, with credentials that it takes for this alone: when all threads of the tree
/// are there, so that no id is taken that one of them needs, and none has a descriptor of its own.
#[derive(Debug)]
pub struct Errand<'e> {
    /// The process; none for the first that has the file.
    pub pid: Option<i32>,
    pub creds: &'e CredsEntry,
    /// A file that it has at hand for it.
    pub with: Option<u32>,
    /// Does it make the file? What was opened before only stands for it.
    pub makes: bool,
}

/// What is there at the end.
#[allow(missing_debug_implementations)]
pub struct ArmCx<'a> {
    /// Files that are open, by id.
    pub files: &'a IdMap<OwnedFd>,
    /// The first task that has a file, in which it was finished.
    pub first_with: &'a dyn Fn(u32) -> Option<i32>,
}

/// A record of some kind: its `FdKind::Entry`.
type AnyEntry = Box<dyn Any + Send + Sync>;

/// [`FdKind`] without its type. Entries are those that the kind itself decoded.
pub trait AnyFdKind: Sync {
    fn name(&self) -> &'static str;
    fn file_type(&self) -> i32;
    fn tag(&self) -> u32;
    fn claims(&self, probe: &FdProbe) -> bool;
    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<FileEntry, Failure>;
    fn settle(&self, cx: &mut DumpCx) -> Failures;
    fn decode(&self, body: &[u8]) -> Result<AnyEntry, String>;
    fn link(&self, entries: &[(u32, &dyn Any)], files: &FileTable) -> Failures;
    fn group(&self, entry: &dyn Any, files: &FileTable) -> Option<u64>;
    fn key(&self, entry: &dyn Any, files: &FileTable) -> Option<String>;
    fn inherited(&self, entry: &dyn Any, fd: &OwnedFd, cx: &mut OpenCx) -> Result<(), Failure>;
    fn comes_last(&self) -> bool;
    fn is_late(&self, entry: &dyn Any, files: &FileTable, tids: &HashSet<i32>) -> bool;
    fn holds(&self, images: &Dir) -> Result<Vec<u32>, Failure>;
    fn open(&self, entry: &dyn Any, cx: &mut OpenCx) -> Result<OwnedFd, Failure>;
    fn errands<'e>(&self, entry: &'e dyn Any) -> Vec<Errand<'e>>;
    fn run_errand(
        &self,
        entry: &dyn Any,
        nth: usize,
        fd: &OwnedFd,
        at_hand: i32,
        ops: &mut TaskOps,
    ) -> Result<Option<usize>, Failure>;
    fn finish(&self, entry: &dyn Any, number: i32, ops: &mut TaskOps) -> Result<(), Failure>;
    fn owner<'e>(&self, entry: &'e dyn Any) -> Option<&'e FownEntry>;
    fn needs(&self, entry: &dyn Any) -> Vec<u32>;
    fn repeats(&self, entry: &dyn Any) -> Vec<i32>;
    fn repeat(
        &self,
        entry: &dyn Any,
        nth: usize,
        fd: &OwnedFd,
        number: i32,
        cx: &ArmCx,
        ops: &mut TaskOps,
    ) -> Result<(), Failure>;
    fn arm(&self, entry: &dyn Any, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure>;
}

fn typed<K: FdKind>(entry: &dyn Any) -> &K::Entry {
    entry.downcast_ref().expect("a kind is given what it decoded")
}

impl<K: FdKind> AnyFdKind for K {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn file_type(&self) -> i32 {
        K::TYPE.into()
    }

    fn tag(&self) -> u32 {
        K::TAG
    }

    fn claims(&self, probe: &FdProbe) -> bool {
        FdKind::claims(self, probe)
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<FileEntry, Failure> {
        Ok(FileEntry::new(K::TYPE.into(), id, K::TAG, &FdKind::dump(self, probe, id, cx)?))
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        FdKind::settle(self, cx)
    }

    fn decode(&self, body: &[u8]) -> Result<AnyEntry, String> {
        match K::Entry::decode(body) {
            Ok(entry) => Ok(Box::new(entry)),
            Err(error) => Err(format!("is no {}: {error}", K::NAME)),
        }
    }

    fn link(&self, entries: &[(u32, &dyn Any)], files: &FileTable) -> Failures {
        let entries: Vec<(u32, &K::Entry)> =
            entries.iter().map(|(id, entry)| (*id, typed::<K>(*entry))).collect();
        FdKind::link(self, &entries, files)
    }

    fn group(&self, entry: &dyn Any, files: &FileTable) -> Option<u64> {
        FdKind::group(self, typed::<K>(entry), files)
    }

    fn key(&self, entry: &dyn Any, files: &FileTable) -> Option<String> {
        FdKind::key(self, typed::<K>(entry), files)
    }

    fn inherited(&self, entry: &dyn Any, fd: &OwnedFd, cx: &mut OpenCx) -> Result<(), Failure> {
        FdKind::inherited(self, typed::<K>(entry), fd, cx)
    }

    fn comes_last(&self) -> bool {
        K::COMES_LAST
    }

    fn is_late(&self, entry: &dyn Any, files: &FileTable, tids: &HashSet<i32>) -> bool {
        FdKind::is_late(self, typed::<K>(entry), files, tids)
    }

    fn holds(&self, images: &Dir) -> Result<Vec<u32>, Failure> {
        FdKind::holds(self, images)
    }

    fn open(&self, entry: &dyn Any, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        FdKind::open(self, typed::<K>(entry), cx)
    }

    fn errands<'e>(&self, entry: &'e dyn Any) -> Vec<Errand<'e>> {
        FdKind::errands(self, typed::<K>(entry))
    }

    fn run_errand(
        &self,
        entry: &dyn Any,
        nth: usize,
        fd: &OwnedFd,
        at_hand: i32,
        ops: &mut TaskOps,
    ) -> Result<Option<usize>, Failure> {
        FdKind::run_errand(self, typed::<K>(entry), nth, fd, at_hand, ops)
    }

    fn finish(&self, entry: &dyn Any, number: i32, ops: &mut TaskOps) -> Result<(), Failure> {
        FdKind::finish(self, typed::<K>(entry), number, ops)
    }

    fn owner<'e>(&self, entry: &'e dyn Any) -> Option<&'e FownEntry> {
        FdKind::owner(self, typed::<K>(entry))
    }

    fn needs(&self, entry: &dyn Any) -> Vec<u32> {
        FdKind::needs(self, typed::<K>(entry))
    }

    fn repeats(&self, entry: &dyn Any) -> Vec<i32> {
        FdKind::repeats(self, typed::<K>(entry))
    }

    fn repeat(
        &self,
        entry: &dyn Any,
        nth: usize,
        fd: &OwnedFd,
        number: i32,
        cx: &ArmCx,
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        FdKind::repeat(self, typed::<K>(entry), nth, fd, number, cx, ops)
    }

    fn arm(&self, entry: &dyn Any, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure> {
        FdKind::arm(self, typed::<K>(entry), fd, cx)
    }
}

/// A record, and the kind that it is of.
type File = (&'static dyn AnyFdKind, AnyEntry);

/// Records that are decoded on all processors.
const MANY: usize = 512;

fn decode_file(index: usize, body: &[u8]) -> Result<(u32, File), Failure> {
    let corrupt = |why: String| Failure::corrupt("files.img", Some(index), why);
    let entry = FileEntry::decode(body).map_err(|error| corrupt(error.to_string()))?;
    let Some(kind) = crate::fd::KINDS.iter().find(|kind| kind.file_type() == entry.kind) else {
        let name = image::FdTypes::try_from(entry.kind)
            .map_or("unknown".into(), |kind| format!("{kind:?}").to_lowercase());
        let object = Object::Image { file: "files.img".into(), entry: Some(index) };
        let why = format!("a file of type {} ({name}) is not carried yet", entry.kind);
        return Err(Failure::unsupported(object, why));
    };
    match &entry.body {
        Some((tag, body)) if *tag == kind.tag() => {
            kind.decode(body).map(|decoded| (entry.id, (*kind, decoded))).map_err(corrupt)
        }
        _ => Err(corrupt(format!("has no body of a {}", kind.name()))),
    }
}

/// The open files of an image set, by id.
#[derive(Default)]
pub struct FileTable {
    files: IdMap<File>,
    /// The ids of each kind, by the number of its type, in their order.
    of_kind: HashMap<i32, Vec<u32>>,
    remaps: HashMap<u32, Remap>,
    /// By id.
    pub terminals: HashMap<u32, TtyInfoEntry>,
}

impl std::fmt::Debug for FileTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.files.iter().map(|(id, file)| (id, file.0.name()))).finish()
    }
}

impl FileTable {
    /// Decodes the records of `files.img` and sorts them by kind, those of `remap-fpath.img` by file, and those of `tty-info.img`.
    ///
    /// # Errors
    /// Every record of a kind that is not carried, and every one that is no record of its kind.
    pub fn new(
        entries: &[&[u8]],
        remaps: Vec<RemapFilePathEntry>,
        terminals: Vec<TtyInfoEntry>,
    ) -> Result<FileTable, Failures> {
        let mut failures = Failures::new();
        let terminals = terminals.into_iter().map(|info| (info.id, info)).collect();
        let mut table = FileTable { terminals, ..FileTable::default() };
        let entries: Vec<(usize, &[u8])> = entries.iter().copied().enumerate().collect();
        let decode = |share: &[(usize, &[u8])]| {
            // A failure is many times as large as a file, and rare.
            let (mut files, mut failures) = (Vec::with_capacity(share.len()), Vec::new());
            for (index, body) in share {
                match decode_file(*index, body) {
                    Ok(file) => files.push(file),
                    Err(failure) => failures.push(failure),
                }
            }
            (files, failures)
        };
        let sound = in_parallel(&entries, MANY, decode).into_iter().flat_map(|(files, more)| {
            failures.extend(more);
            files
        });
        if !table.files.add(sound).is_empty() {
            let mut seen = HashSet::new();
            for (index, body) in &entries {
                let Ok(FileEntry { id, .. }) = FileEntry::decode(*body) else { continue };
                if !seen.insert(id) {
                    let why = format!("the id {id} is taken");
                    failures.push(Failure::corrupt("files.img", Some(*index), why));
                }
            }
        }
        for (id, (kind, _)) in table.files.iter() {
            table.of_kind.entry(kind.file_type()).or_default().push(id);
        }
        match ghost::remaps(remaps, &table) {
            Ok(remaps) => table.remaps = remaps,
            Err(more) => failures.extend(more),
        }
        for kind in crate::fd::KINDS {
            let Some(ids) = table.of_kind.get(&kind.file_type()) else { continue };
            let entries: Vec<(u32, &dyn Any)> =
                ids.iter().map(|id| (*id, &*table.files[*id].1 as _)).collect();
            failures.extend(kind.link(&entries, &table));
        }
        if failures.is_empty() { Ok(table) } else { Err(failures) }
    }

    pub fn len(&self) -> usize {
        self.files.len()
    }

    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// A record and its kind.
    pub fn get(&self, id: u32) -> Option<(&'static dyn AnyFdKind, &dyn Any)> {
        self.files.get(id).map(|(kind, entry)| (*kind, &**entry as &dyn Any))
    }

    /// All records and their kinds, in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, (&'static dyn AnyFdKind, &dyn Any))> {
        self.files.iter().map(|(id, (kind, entry))| (id, (*kind, &**entry as &dyn Any)))
    }

    /// Those of the records whose files are open, with these, in the order of their ids.
    pub fn opened<'f>(
        &'f self,
        open: &'f IdMap<OwnedFd>,
    ) -> impl Iterator<Item = (u32, &'f OwnedFd, &'static dyn AnyFdKind, &'f dyn Any)> {
        self.iter().filter_map(|(id, (kind, entry))| Some((id, open.get(id)?, kind, entry)))
    }

    /// What stands for a file that is not found by its name.
    pub fn remap(&self, id: u32) -> Option<&Remap> {
        self.remaps.get(&id)
    }

    /// The process that has ended, of which a file that is not remapped is one more. CRIU notes but one.
    pub fn ended(&self, path: &Path) -> Option<i32> {
        let is_it = |remap: &Remap, pid: i32| *remap == Remap::Process(pid);
        if !self.remaps.values().any(|remap| matches!(remap, Remap::Process(_))) {
            return None;
        }
        let (pid, _) = crate::fd::process::of_path(path)?;
        self.remaps.values().any(|remap| is_it(remap, pid)).then_some(pid)
    }

    /// The files that something of this sort stands for.
    pub fn remapped(&self, is_it: impl Fn(&Remap) -> bool) -> impl Iterator<Item = u32> {
        self.remaps.iter().filter(move |(_, remap)| is_it(remap)).map(|(id, _)| *id)
    }

    /// The records of links that a dump has made.
    pub fn links(&self) -> HashSet<u32> {
        let link = |remap: &Remap| match remap {
            Remap::Link(id, _) => Some(*id),
            Remap::Ghost(_) | Remap::Process(_) => None,
        };
        self.remaps.values().filter_map(link).collect()
    }

    /// Every record of one kind.
    pub fn entries<K: FdKind>(&self) -> impl Iterator<Item = &K::Entry> {
        let ids = self.of_kind.get(&i32::from(K::TYPE)).into_iter().flatten();
        ids.filter_map(|id| self.files.get(*id)?.1.downcast_ref())
    }

    /// What all files need of others, without an end at what these need in turn.
    pub fn needs(&self) -> impl Iterator<Item = (u32, u32)> {
        self.files
            .iter()
            .flat_map(|(id, (kind, entry))| kind.needs(&**entry).into_iter().map(move |needed| (id, needed)))
    }

    /// Is it made by a process itself, see [`Errand`]?
    pub fn is_made_by_task(&self, id: u32) -> bool {
        self.get(id).is_some_and(|(kind, entry)| kind.errands(entry).iter().any(|errand| errand.makes))
    }

    /// The record of a file that must be of one kind.
    pub fn entry<K: FdKind>(&self, id: u32) -> Option<&K::Entry> {
        self.files.get(id)?.1.downcast_ref()
    }
}

/// Opens again, with other flags, what `fd` refers to: a new open file of the same object.
pub fn reopen(fd: impl AsFd, flags: u32) -> Result<OwnedFd, Errno> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    sys::fd::open(std::path::Path::new(&path), open_flags(flags))
}

/// Flags that open(2) takes again: without those that act on the name at the moment of opening.
pub fn open_flags(flags: u32) -> i32 {
    let nameless = if is_nameless(flags) { libc::O_TMPFILE } else { 0 };
    flags as i32
        & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY | libc::O_CLOEXEC | nameless)
}

/// Was it opened as a new file without a name? O_TMPFILE is a bit of its own and O_DIRECTORY.
pub fn is_nameless(flags: u32) -> bool {
    flags as i32 & libc::O_TMPFILE == libc::O_TMPFILE
}

/// Status flags that F_SETFL can change, for objects that are not made by open(2).
pub fn set_status(fd: impl AsFd, flags: u32) -> Result<(), Errno> {
    sys::fd::fcntl(fd, libc::F_SETFL, flags as i32 & !libc::O_CLOEXEC).map(drop)
}

/// The same for an object that was just made, with the flags `made`: mostly there is nothing to change.
pub fn set_new_status(fd: impl AsFd, made: i32, flags: u32) -> Result<(), Errno> {
    const SETTABLE: i32 =
        libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME | libc::O_ASYNC;
    if (made ^ flags as i32) & SETTABLE == 0 {
        return Ok(());
    }
    set_status(fd, flags)
}
