//! What one process says of itself: its `/proc`, and the answers of its threads. Nothing here knows of
//! other processes, so that all are observed at the same time; what follows from it is for the survey.

use crate::identity::{At, Classes};
use crate::tracer::{Part, Thread, Tracer, read_stat};
use agent::inject::{BATCH, Door, Host};
use agent::{List, Watch};
use image::*;
use kinds::contract::FdProbe;
use kinds::fd::uring;
use kinds::task::numa::Policies;
use kinds::task::{Answers, Ask, attributes, creds, limits, numa, rseq, sched, seccomp, signals, timers};
use kinds::vma::{self, mm::Rules};
use model::{Errno, Failure, Object};
use pages::chain::split;
use pages::select::{Area, Question, Selection, select};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use sys::each::Descriptor;
use sys::fd::Texts;
use sys::proc::{SmapsParser, Stat, Status, Timer, Vma};
use sys::process::Kcmp;
use sys::threads::Told;

/// As `/proc/PID/ns` names them.
pub const NAMESPACES: [&str; 10] =
    ["pid", "pid_for_children", "net", "ipc", "uts", "mnt", "user", "cgroup", "time", "time_for_children"];

/// Inodes of the namespaces of a process.
pub type Namespaces = [Option<u64>; NAMESPACES.len()];

/// What a link of `/proc/PID` points to.
#[derive(Clone)]
pub struct Link {
    pub name: &'static str,
    pub path: Vec<u8>,
    pub stat: libc::stat,
}

/// What `/proc` tells of a process.
pub struct Look {
    pub stat: Stat,
    pub status: Status,
    pub namespaces: Namespaces,
    pub memory: Memory,
    /// Of its pages that no file has; the kernel's count may be off by some.
    pub private_bytes: u64,
    /// Some of its memory is locked.
    pub is_locked: bool,
    pub auxv: Vec<u8>,
    pub exe: Link,
    pub cwd: Link,
    pub root: Link,
    pub timers: Vec<Timer>,
    pub oom_score_adj: Option<i32>,
    /// Where the process has a `syscall` instruction.
    pub instruction: u64,
    /// Descriptors of rings that it has mapped.
    pub rings: Vec<i32>,
    /// What the kernel's tracing tells of the leader.
    pub told: Option<Told>,
}

/// What was read once, for all processes of which the kernel's tracing tells that they have the same.
#[derive(Default)]
pub struct Common {
    namespaces: Mutex<HashMap<[u64; 3], Namespaces>>,
    links: Mutex<HashMap<(&'static str, [u64; 2]), Link>>,
}

impl Common {
    /// Of so many processes; none when they are few.
    pub fn of(count: usize) -> Option<Arc<Common>> {
        (count >= sys::threads::MANY).then(Arc::default)
    }

    fn namespaces(&self, told: &Told, pid: i32) -> Namespaces {
        let known = || self.namespaces.lock().ok()?.get(&told.namespaces).copied();
        known().unwrap_or_else(|| {
            let read = namespaces(&pid.to_string());
            self.namespaces.lock().map(|mut known| known.insert(told.namespaces, read)).ok();
            read
        })
    }

    fn link(&self, key: [u64; 2], pid: i32, name: &'static str) -> Result<Link, Failure> {
        if let Ok(known) = self.links.lock()
            && let Some(link) = known.get(&(name, key))
        {
            return Ok(link.clone());
        }
        let read = link(pid, name)?;
        self.links.lock().map(|mut known| known.insert((name, key), read.clone())).ok();
        Ok(read)
    }
}

/// What a thread tells.
pub struct Seen {
    pub tid: i32,
    /// Without its seccomp filters.
    pub core: CoreEntry,
    /// The programs of those, oldest first.
    pub filters: Vec<Vec<u8>>,
    pub umask: Option<u32>,
    pub rings: Option<uring::Told>,
    /// Of the leader alone, of its process.
    pub policies: Policies,
    pub process: Option<(attributes::ProcessAttributes, Rules)>,
    pub failures: Vec<Failure>,
}

fn read(path: String) -> Result<Vec<u8>, Failure> {
    sys::fd::text(&path).map_err(|error| error.on(Object::Path(path), "read it"))
}

fn not_understood(object: Object, doing: &'static str) -> Failure {
    Failure::conflict(object, doing, "the text is not understood")
}

/// The namespaces of a process, by its name in `/proc`.
pub fn namespaces(pid: &str) -> Namespaces {
    let dir = sys::fd::open(Path::new(&format!("/proc/{pid}/ns")), libc::O_RDONLY | libc::O_DIRECTORY);
    NAMESPACES.map(|name| Some(sys::fd::stat_at(dir.as_ref().ok()?, Path::new(name)).ok()?.st_ino))
}

impl Look {
    /// Does a copy of the process tell all about its memory, later? Not of what others may change, and not
    /// which mappings were locked.
    pub fn is_plain(&self) -> bool {
        let deleted = |(map, _): &(Vma, VmaEntry)| {
            let has_file = map.inode != 0 || vma::sysv::is_segment(&map.name);
            has_file && map.name.ends_with(b" (deleted)")
        };
        !self.is_locked && !self.memory.maps.iter().any(deleted)
    }
}

/// How much is read of the memory of a process: where its mappings are, which the kernel says at once,
/// whatever is in them; and more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// The flags of the mappings: the kernel looks at every page for that.
    pub flags: bool,
    /// Question pages are its own.
    pub pages: Option<Question>,
}

/// Reads what `/proc` tells of a frozen process.
///
/// # Errors
/// The first thing that cannot be read.
pub fn look(pid: i32, depth: Depth, common: Option<&Common>) -> Result<Look, Failure> {
    let told = common.and_then(|_| sys::threads::of(pid)?.into_iter().find(|told| told.tid == pid));
    let shared = common.zip(told.as_ref());
    let link = |name, key: fn(&Told) -> [u64; 2]| match shared {
        Some((common, told)) => common.link(key(told), pid, name),
        None => link(pid, name),
    };
    let memory = match depth {
        Depth { flags: true, pages } => read_memory(pid, pages)?,
        Depth { flags: false, pages } => {
            let maps = read_maps(pid)?;
            let pages = pages.map(|question| find_pages(pid, &areas(&maps), question)).transpose()?;
            Memory { maps, pages: pages.unwrap_or_default() }
        }
    };
    let timers = read(format!("/proc/{pid}/timers"))?;
    let status = status(pid, pid)?;
    let rings = memory.maps.iter().filter(|(map, _)| *map.name == *uring::NAME);
    let rings: Vec<u64> = rings.map(|(map, _)| map.inode).collect();
    Ok(Look {
        private_bytes: status.anonymous_kb * 1024,
        is_locked: status.locked_kb != 0,
        stat: read_stat(pid)?,
        namespaces: shared
            .map_or_else(|| namespaces(&pid.to_string()), |(common, told)| common.namespaces(told, pid)),
        auxv: read(format!("/proc/{pid}/auxv"))?,
        exe: link("exe", |told| told.exe)?,
        cwd: link("cwd", |told| told.cwd)?,
        root: link("root", |told| told.root)?,
        timers: sys::proc::parse_timers(&timers)
            .ok_or_else(|| not_understood(Object::Task, "read its timers"))?,
        oom_score_adj: sys::proc::decimal(read(format!("/proc/{pid}/oom_score_adj"))?.trim_ascii()),
        instruction: find_instruction(pid, &memory.maps)?,
        rings: uring::numbers(pid, &rings),
        memory,
        told,
        status,
    })
}

fn link(pid: i32, name: &'static str) -> Result<Link, Failure> {
    let path = PathBuf::from(format!("/proc/{pid}/{name}"));
    let explain = |error: Errno| error.on(Object::Named(name.into()), "read its link").of(pid);
    let target =
        std::fs::read_link(&path).map_err(|error| explain(sys::memory::io_errno("readlink", &error)))?;
    let stat = sys::fd::stat_path(&path, true).map_err(explain)?;
    Ok(Link { name, path: target.as_os_str().as_bytes().to_vec(), stat })
}

/// The mappings of a process, and which of their pages are its own.
#[derive(Debug, Default)]
pub struct Memory {
    /// Each with its record, in which the file is missing.
    pub maps: Vec<(Vma, VmaEntry)>,
    pub pages: Selection,
}

impl Memory {
    /// Adds mappings at higher addresses.
    fn add(&mut self, vmas: Vec<Vma>, pagemap: &File, question: Option<Question>) -> Result<(), Errno> {
        let first = self.maps.len();
        self.maps.extend(vmas.into_iter().map(described));
        if let Some(question) = question {
            let areas = areas(&self.maps[first..]);
            self.pages.append(select(pagemap, &areas, question)?);
        }
        Ok(())
    }
}

fn described(map: Vma) -> (Vma, VmaEntry) {
    let entry = vma::describe(&map);
    (map, entry)
}

/// The mappings that have content.
pub fn areas(maps: &[(Vma, VmaEntry)]) -> Vec<Area> {
    maps.iter()
        .map(|(_, entry)| entry)
        .filter(|entry| vma::content(entry) != vma::Content::None)
        .map(|entry| Area {
            range: entry.start..entry.end,
            is_readable: entry.prot & libc::PROT_READ as u32 != 0,
            is_whole: vma::content(entry) == vma::Content::Whole,
            has_file: vma::has_file(entry),
            is_watched: false,
        })
        .collect()
}

/// Finds the pages of mappings that are known.
pub fn find_pages(pid: i32, areas: &[Area], question: Question) -> Result<Selection, Failure> {
    let path = format!("/proc/{pid}/pagemap");
    let explain = |error: Errno| error.on(Object::Path(path.clone()), "find its pages").of(pid);
    let pagemap = File::open(&path).map_err(|error| explain(sys::memory::io_errno("open", &error)))?;
    select(&pagemap, areas, question).map_err(explain)
}

impl Memory {
    /// Does somebody note writes to it by a userfaultfd?
    pub fn is_watched(&self) -> bool {
        self.maps.iter().any(|(map, _)| map.flags.has("uw"))
    }

    /// Takes the userfaultfd over mappings for ours: it is no part of the process.
    pub fn forget_watch(&mut self) {
        self.maps.iter_mut().for_each(|(map, _)| map.flags.remove("uw"));
    }

    /// Leaves out what is in mappings without content. What is in none stays: the process may have unmapped it since.
    pub fn keep_content(&mut self) {
        let entries = self.maps.iter().map(|(_, entry)| entry);
        let without = entries.filter(|entry| vma::content(entry) == vma::Content::None);
        let without: Vec<Range<u64>> = without.map(|entry| entry.start..entry.end).collect();
        (_, self.pages.runs) = split(&self.pages.runs, |_| true, &without);
    }
}

/// The mappings of a process, without their flags.
pub fn read_maps(pid: i32) -> Result<Vec<(Vma, VmaEntry)>, Failure> {
    let path = format!("/proc/{pid}/maps");
    let text = read(path.clone())?;
    let mut parser = SmapsParser::default();
    parser.feed(&text);
    let maps = parser.finish().ok_or_else(|| not_understood(Object::Path(path), "read it"))?;
    let found = maps.into_iter().map(|mut map| {
        vma::hugetlb::find(pid, &mut map);
        described(map)
    });
    Ok(found.collect())
}

/// Text of many mappings is taken in pieces of so many bytes: some hundred mappings.
const PIECE: usize = 256 << 10;

/// Reads the mappings of a process that stands still with their flags, and finds its pages, if that is asked. The kernel's text of many
/// mappings, or of much memory, takes long to write: then the flags are asked for in another way, where there is one.
pub fn read_memory(pid: i32, question: Option<Question>) -> Result<Memory, Failure> {
    /// Bytes of memory that take longer to be looked at than the other way takes, and page tables, however little is in
    /// them.
    const LARGE: u64 = 192 << 20;
    const LARGE_TABLES_KB: u64 = 24 << 10;
    let path = format!("/proc/{pid}/pagemap");
    let explain = |error: Errno| error.on(Object::Path(path.clone()), "find its pages").of(pid);
    let pagemap = File::open(&path).map_err(|error| explain(sys::memory::io_errno("open", &error)))?;
    let mut memory = Memory::default();
    let statm = sys::fd::text(&format!("/proc/{pid}/statm")).unwrap_or_default();
    // So large are they only where much is mapped.
    let may_be_sparse = sys::proc::decimal(statm.split(|byte| *byte == b' ').next().unwrap_or_default())
        .is_some_and(|pages: u64| pages > LARGE_TABLES_KB << 10 >> 3);
    let is_large = sys::proc::parse_private(&statm).is_some_and(|bytes| bytes > LARGE)
        || may_be_sparse && status(pid, pid).is_ok_and(|status| status.tables_kb > LARGE_TABLES_KB);
    let mut smaps = Text::open(pid, "smaps")?;
    let first = if is_large { Vec::new() } else { smaps.read()? };
    if is_large || first.len() == PIECE {
        // Asked when the first text is there, so that more is being written meanwhile.
        let mut flags = None;
        let mut is_complete = true;
        Text::open(pid, "maps")?.each(Vec::new(), |mut vmas| {
            let flags =
                flags.get_or_insert_with(|| sys::vmflags::of(pid).unwrap_or_default().into_iter().peekable());
            for vma in vmas.iter_mut().filter(|vma| vma.name != b"[vsyscall]") {
                match flags.next_if(|(start, _)| *start == vma.start) {
                    Some((_, flags)) => vma.flags = flags,
                    None => is_complete = false,
                }
            }
            if is_complete { memory.add(vmas, &pagemap, question).map_err(explain) } else { Ok(()) }
        })?;
        if is_complete {
            return Ok(memory);
        }
        memory = Memory::default();
    }
    smaps.each(first, |vmas| memory.add(vmas, &pagemap, question).map_err(explain))?;
    Ok(memory)
}

/// A text of the kernel about mappings.
struct Text {
    path: String,
    file: File,
}

impl Text {
    fn open(pid: i32, name: &str) -> Result<Text, Failure> {
        let path = format!("/proc/{pid}/{name}");
        let file = File::open(&path).map_err(|error| {
            sys::memory::io_errno("open", &error).on(Object::Path(path.clone()), "read its mappings").of(pid)
        })?;
        Ok(Text { path, file })
    }

    /// The next piece, which is shorter when it is the last.
    fn read(&mut self) -> Result<Vec<u8>, Failure> {
        let mut text = Vec::with_capacity(PIECE);
        Read::take(&mut self.file, PIECE as u64).read_to_end(&mut text).map_err(|error| {
            sys::memory::io_errno("read", &error).on(Object::Path(self.path.clone()), "read its mappings")
        })?;
        Ok(text)
    }

    /// Hands on what follows a first piece, some mappings at a time, while more is being read.
    fn each(
        mut self,
        first: Vec<u8>,
        mut take: impl FnMut(Vec<Vma>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let path = self.path.clone();
        let mut parser = SmapsParser::default();
        parser.feed(&first);
        if first.is_empty() || first.len() == PIECE {
            std::thread::scope(|scope| {
                let (sender, texts) = std::sync::mpsc::sync_channel(16);
                scope.spawn(move || {
                    loop {
                        let text = self.read();
                        let is_last = text.as_ref().map_or(true, |text| text.len() < PIECE);
                        if sender.send(text).is_err() || is_last {
                            return;
                        }
                    }
                });
                for text in texts {
                    parser.feed(&text?);
                    take(parser.take())?;
                }
                Ok(())
            })?;
        }
        take(parser.finish().ok_or_else(|| not_understood(Object::Path(path), "read it"))?)
    }
}

pub fn find_instruction(pid: i32, maps: &[(Vma, VmaEntry)]) -> Result<u64, Failure> {
    // The vdso has one; without it any code that the process may execute will do.
    let maps = || maps.iter().map(|(map, _)| map);
    let is_vdso = |map: &&Vma| map.name == b"[vdso]";
    let is_code = |map: &&Vma| map.prot & libc::PROT_EXEC as u32 != 0 && map.name != b"[vsyscall]";
    for map in maps().filter(is_vdso).chain(maps().filter(is_code)) {
        let mut code = vec![0; (map.end - map.start).min(1 << 22) as usize];
        let count = sys::memory::read_remote(pid, map.start, &mut code).unwrap_or(0);
        if let Some(at) = agent::remote::find_instruction(&code[..count], map.start) {
            return Ok(at);
        }
    }
    Err(Failure::unsupported(Object::Task, "has no system call instruction in its memory"))
}

/// A process, and what its threads answered.
pub type Answered = (i32, Result<Vec<Seen>, Failure>);

/// Device, inode, flags, position, and the number of an eventfd: what descriptors of one open file have in common, where
/// the kernel does not tell where it has that.
pub type FileKey = (u64, u64, u32, u64, u64);

/// A descriptor, and what the kernel's tracing tells of it.
pub type Noted = (At, Option<Descriptor>);

pub fn key(probe: &FdProbe) -> FileKey {
    let number = match probe.anon_inode() {
        Some(b"eventfd") => sys::proc::fdinfo(probe.info(), "eventfd-id").and_then(sys::proc::decimal),
        _ => None,
    };
    (probe.stat.st_dev, probe.stat.st_ino, probe.flags, probe.position, number.unwrap_or(0))
}

/// Descriptors of which the kernel's tracing is asked.
const MANY: usize = 256;

/// Gets ready for a process that has so many descriptors, beside what comes first.
pub fn expect_descriptors(count: usize) {
    if count >= MANY {
        std::thread::spawn(sys::each::prepare_descriptors);
    }
}

/// The descriptors of all these processes. Of none is told where one is not, or they are few, for to ask takes time, too.
///
/// # Errors
/// When the folder of one cannot be read.
pub fn descriptors(pids: &[i32]) -> Result<Vec<Noted>, Failure> {
    let counts: Option<Vec<usize>> = pids.iter().map(|pid| sys::fd::count(*pid)).collect();
    let told = || {
        let counts = counts.filter(|counts| counts.iter().sum::<usize>() >= MANY)?;
        let mut all = Vec::with_capacity(counts.iter().sum());
        for (pid, count) in pids.iter().zip(counts) {
            let told = sys::each::descriptors(*pid).filter(|told| told.len() == count)?;
            all.extend(told.into_iter().map(|told| ((*pid, told.number), Some(told))));
        }
        Some(all)
    };
    if let Some(told) = told() {
        return Ok(told);
    }
    let mut all = Vec::new();
    for pid in pids {
        let numbers = sys::fd::numbers(&format!("/proc/{pid}/fd"))
            .map_err(|error| error.on(Object::Task, "read its descriptors").of(*pid))?;
        all.extend(numbers.into_iter().map(|number| ((*pid, number), None)));
    }
    Ok(all)
}

/// Descriptors, each looked at, and which of them are one open file.
#[derive(Debug)]
pub struct Probed {
    pub probes: Vec<(At, Result<FdProbe, Errno>)>,
    pub files: Classes<FileKey>,
}

/// Looks at descriptors.
///
/// # Errors
/// When a process or its descriptors cannot be asked at all.
pub fn probe(mut descriptors: Vec<Noted>) -> Result<Probed, Failure> {
    let explain = |pid: i32| move |error: Errno| error.on(Object::Task, "read its descriptors").of(pid);
    let mut probes = Vec::with_capacity(descriptors.len());
    for of_process in descriptors.chunk_by_mut(|one, next| one.0.0 == next.0.0) {
        let pid = of_process[0].0.0;
        let pidfd: OwnedFd = sys::process::pidfd_open(pid).map_err(explain(pid))?;
        let texts = Texts::of(pid).map(Arc::new).map_err(explain(pid))?;
        probes.extend(of_process.iter_mut().map(|(at, told)| {
            let fd = sys::process::pidfd_getfd(&pidfd, at.1);
            (*at, fd.and_then(|fd| FdProbe::new(pid, at.1, fd, &texts, told.take())))
        }));
    }
    let untold = probes.iter().filter_map(|(at, probe)| Some((at, probe.as_ref().ok()?)));
    let candidates = untold.filter(|(_, probe)| probe.address == 0).map(|(at, probe)| (key(probe), *at));
    let files = Classes::new(Kcmp::File, candidates)
        .map_err(|error| error.on(Object::Tree, "compare its descriptors"))?;
    Ok(Probed { probes, files })
}

/// What the leader is asked about its process, when its turn comes.
#[derive(Debug)]
pub struct Questions {
    pub instruction: u64,
    pub rings: Vec<i32>,
    /// Beginnings of mappings.
    pub mappings: Vec<u64>,
    pub stat: Stat,
    pub status: Status,
    pub timers: Vec<Timer>,
}

/// A process that answers: the threads of it that one tracer holds.
struct Guest {
    part: Part,
    stat: Stat,
    /// Of the leader.
    status: Status,
    timers: Option<Vec<Timer>>,
    rings: Vec<i32>,
    mappings: Vec<u64>,
    instruction: u64,
    /// None when the agent could not enter, or nobody is asked.
    host: Option<Host>,
    /// The threads that are asked, and which of them is the first of the next round.
    asked: Vec<usize>,
    next: usize,
    seen: Vec<Seen>,
    failure: Option<Failure>,
}

/// What a leader is asked about its process.
type Whole = (
    attributes::AskedProcess,
    vma::mm::AskedRules,
    signals::Asked,
    limits::Asked,
    timers::Asked,
    numa::AskedMappings,
);

/// What one thread is asked.
struct Asked {
    list: List,
    creds: creds::Asked,
    own: attributes::AskedThread,
    numa: numa::Asked,
    rings: Option<uring::Asked>,
    whole: Option<Whole>,
}

/// Has every thread that `tracer` holds of these processes answer what only it can, all at the same time
/// as far as there is room.
///
/// # Errors
/// For each process the first that went wrong; the threads are as they were all the same.
pub fn ask(tracer: &mut Tracer, processes: Vec<(i32, Questions)>) -> Result<Vec<Answered>, Failure> {
    let watch = Watch::new().map_err(|error| error.on(Object::Tree, "prepare operations"))?;
    let watch = Rc::new(watch);
    let mut guests: Vec<Guest> = processes
        .into_iter()
        .map(|(pid, questions)| Guest {
            part: tracer.take(pid),
            stat: questions.stat,
            status: questions.status,
            timers: Some(questions.timers),
            rings: questions.rings,
            mappings: questions.mappings,
            instruction: questions.instruction,
            host: None,
            asked: Vec::new(),
            next: 0,
            seen: Vec::new(),
            failure: None,
        })
        .collect();
    for guest in &mut guests {
        guest.failure = guest.listen().err();
    }
    enter(&mut guests, &watch);
    while guests.iter().any(Guest::has_more) {
        round(&mut guests);
    }
    leave(&mut guests);
    let mut results = Vec::with_capacity(guests.len());
    for guest in guests {
        results.push((guest.part.pid, guest.failure.map_or(Ok(guest.seen), Err)));
        tracer.parts.push(guest.part);
    }
    Ok(results)
}

fn enter(guests: &mut [Guest], watch: &Rc<Watch>) {
    let mut doors = Vec::with_capacity(guests.len());
    let mut entering = Vec::with_capacity(guests.len());
    for guest in guests.iter_mut().filter(|guest| !guest.asked.is_empty() && guest.failure.is_none()) {
        let Guest { part, instruction, host, failure, .. } = guest;
        let Some(Thread { context, stopped, .. }) = part.threads.first_mut() else { continue };
        let thread = stopped.take().expect("a frozen thread is stopped");
        doors.push(Door { pid: part.pid, thread, context, instruction: *instruction });
        entering.push((host, stopped, failure));
    }
    for ((host, stopped, failure), entered) in entering.into_iter().zip(Host::enter_all(doors, watch)) {
        match entered {
            Ok((new, thread)) => (*host, *stopped) = (Some(new), Some(thread)),
            Err(error) => *failure = Some(error),
        }
    }
}

fn leave(guests: &mut [Guest]) {
    let mut leaving = Vec::with_capacity(guests.len());
    let mut left = Vec::with_capacity(guests.len());
    for guest in guests {
        let Guest { part, host, failure, .. } = guest;
        let Some(host) = host.take() else { continue };
        let Thread { context, stopped, .. } = &mut part.threads[0];
        // A thread that is gone has taken its process along, and the agent with it.
        let Some(thread) = stopped.take() else { continue };
        leaving.push((host, thread, &*context));
        left.push((stopped, failure));
    }
    for ((stopped, failure), thread) in left.into_iter().zip(Host::leave_all(leaving)) {
        match thread {
            Ok(thread) => *stopped = Some(thread),
            Err(error) => {
                failure.get_or_insert(error);
            }
        }
    }
}

/// Some threads of each process answer, all at once. Every thread that was sent off is collected,
/// whatever happens.
fn round(guests: &mut [Guest]) {
    let mut asked: Vec<Vec<Asked>> = Vec::with_capacity(guests.len());
    for guest in guests.iter_mut() {
        asked.push(match guest.prepare() {
            Ok(asked) => asked,
            Err(failure) => {
                guest.failure = Some(failure);
                Vec::new()
            }
        });
    }
    let mut runs = Vec::new();
    for (at, (guest, asked)) in guests.iter_mut().zip(&mut asked).enumerate() {
        let (Some(host), first) = (&guest.host, guest.next) else { continue };
        for (nth, asked) in asked.iter_mut().enumerate() {
            let thread = &mut guest.part.threads[guest.asked[first + nth]];
            let stopped = thread.stopped.take().expect("a frozen thread is stopped");
            match host.start(stopped, &thread.context, std::mem::take(&mut asked.list)) {
                Ok((running, run)) => runs.push((at, guest.asked[first + nth], running, run)),
                Err(failure) => {
                    guest.failure.get_or_insert(failure);
                }
            }
        }
    }
    // All are told to stop before the first is waited for.
    let mut stopping = Vec::with_capacity(runs.len());
    for (at, nth, running, run) in runs {
        let host = guests[at].host.as_ref().expect("it started the list");
        let result = host.collect(&running, run);
        stopping.push((at, nth, running, result));
    }
    let mut executed: Vec<Vec<Vec<u8>>> = guests.iter().map(|_| Vec::new()).collect();
    for (at, nth, running, result) in stopping {
        let guest = &mut guests[at];
        let host = guest.host.as_ref().expect("it started the list");
        let thread = &mut guest.part.threads[nth];
        let result = match host.retrieve(running, &thread.context) {
            Ok(stopped) => {
                thread.stopped = Some(stopped);
                result
            }
            Err(failure) => Err(failure),
        };
        let failed = |failed: agent::Failed| failed.errno().on(Object::Thread(thread.tid), failed.doing);
        match result.and_then(|result| result.map_err(failed)) {
            Ok(ops) => executed[at].push(ops),
            Err(failure) => {
                guest.failure.get_or_insert(failure);
            }
        }
    }
    for ((guest, asked), executed) in guests.iter_mut().zip(asked).zip(executed) {
        if guest.failure.is_none()
            && let Err(failure) = guest.understand(asked, &executed)
        {
            guest.failure = Some(failure);
        }
    }
}

impl Guest {
    fn has_more(&self) -> bool {
        self.host.is_some() && self.failure.is_none() && self.next < self.asked.len()
    }

    /// Of many threads the kernel is asked itself: of those that differ from their leader in nothing that it does
    /// not tell.
    fn listen(&mut self) -> Result<(), Failure> {
        let pid = self.part.pid;
        let is_told = self.part.threads.len() >= sys::threads::MANY && self.rings.is_empty();
        let told = if is_told { sys::threads::of(pid) } else { None };
        let told: HashMap<i32, Told> =
            told.unwrap_or_default().into_iter().map(|told| (told.tid, told)).collect();
        let leader = told.get(&pid);
        for (at, thread) in self.part.threads.iter().enumerate() {
            let (Some(told), Some(leader)) = (told.get(&thread.tid), leader) else {
                self.asked.push(at);
                continue;
            };
            if thread.tid == pid || told.identity != leader.identity || told.has_policy {
                self.asked.push(at);
                continue;
            }
            let status = Status { comm: told.comm.clone(), ..self.status.clone() };
            let mut seen = see(pid, thread, &status, &told.into(), Some((told, leader)))?;
            if let Some(core) = &mut seen.core.thread_core {
                core.creds = Some(creds::record(&status, told.secure_bits));
            }
            self.seen.push(seen);
        }
        Ok(())
    }

    /// The questions for the threads of the next round.
    fn prepare(&mut self) -> Result<Vec<Asked>, Failure> {
        let Some(host) = self.host.as_ref().filter(|_| self.has_more()) else { return Ok(Vec::new()) };
        host.next_batch();
        let end = self.asked.len().min(self.next + BATCH);
        let mut all = Vec::with_capacity(end - self.next);
        for thread in self.asked[self.next..end].iter().map(|at| &self.part.threads[*at]) {
            let mut list = List::new();
            let mut ask = Ask { list: &mut list, area: host.area() };
            let creds = creds::ask(&mut ask);
            let own = attributes::ask_thread(&mut ask)?;
            let numa = numa::ask(&mut ask)?;
            let whole = match self.timers.take_if(|_| thread.tid == self.part.pid) {
                Some(timers) => Some((
                    attributes::ask_process(&mut ask)?,
                    vma::mm::ask_rules(&mut ask)?,
                    signals::ask(&mut ask)?,
                    limits::ask(&mut ask)?,
                    timers::ask(timers, &mut ask)?,
                    numa::ask_mappings(&self.mappings, &mut ask)?,
                )),
                None => None,
            };
            let rings = match self.rings.is_empty() {
                true => None,
                false => Some(uring::ask(&self.rings, &mut Ask { list: &mut list, area: host.area() })?),
            };
            all.push(Asked { list, creds, own, numa, rings, whole });
        }
        Ok(all)
    }

    /// Makes records of the answers.
    fn understand(&mut self, asked: Vec<Asked>, executed: &[Vec<u8>]) -> Result<(), Failure> {
        let Some(host) = &self.host else { return Ok(()) };
        let pid = self.part.pid;
        let first = self.next;
        self.next += asked.len();
        for ((at, asked), ops) in self.asked[first..].iter().zip(asked).zip(executed) {
            let thread = &self.part.threads[*at];
            let is_leader = thread.tid == pid;
            let status = if is_leader { self.status.clone() } else { status(pid, thread.tid)? };
            let answers = Answers { ops, area: host.area() };
            let own = asked.own.answer(answers);
            let mut seen = see(pid, thread, &status, &own, None)?;
            seen.rings = asked.rings.map(|rings| rings.answer(answers));
            if let Some(thread_core) = &mut seen.core.thread_core {
                thread_core.creds = Some(asked.creds.answer(&status, answers));
                asked.numa.answer(answers, thread_core);
            }
            if let Some((process, rules, actions, limits, timers, mappings)) = asked.whole {
                seen.policies = mappings.answer(answers);
                let process = process.answer(answers);
                let stopped = thread.stopped.as_ref().expect("every list was collected");
                let shared = stopped
                    .pending(true)
                    .map_err(|error| error.on(Object::Task, "read its state").of(pid))?;
                check_pending(pid, pid, &shared, &mut seen.failures);
                let stat = &self.stat;
                seen.core.tc = Some(TaskCoreEntry {
                    personality: process.personality,
                    flags: stat.flags,
                    blk_sigset: thread.context.mask,
                    comm: status.comm.clone(),
                    timers: Some(timers.answer(pid, &shared, answers)),
                    rlimits: Some(limits.answer(answers)),
                    signals_s: Some(signals::queue(shared)),
                    sigactions: actions.answer(answers),
                    exit_signal: (stat.exit_signal != libc::SIGCHLD).then_some(stat.exit_signal as u32),
                    child_subreaper: Some(process.is_subreaper),
                    membarrier_registration_mask: (process.membarrier != 0).then_some(process.membarrier),
                    cg_set: Some(1),
                    ..TaskCoreEntry::default()
                });
                seen.process = Some((process, rules.answer(answers)));
            }
            self.seen.push(seen);
        }
        Ok(())
    }
}

fn status(pid: i32, tid: i32) -> Result<Status, Failure> {
    let text = read(format!("/proc/{pid}/task/{tid}/status"))?;
    sys::proc::parse_status(&text).ok_or_else(|| not_understood(Object::Thread(tid), "read its status"))
}

/// The record of one thread. `told` is what the kernel tells of it and of its leader.
fn see(
    pid: i32,
    thread: &Thread,
    status: &Status,
    own: &attributes::ThreadAttributes,
    told: Option<(&Told, &Told)>,
) -> Result<Seen, Failure> {
    let tid = thread.tid;
    let mut failures = Vec::new();
    let stopped = thread.stopped.as_ref().expect("every list was collected");
    let explain = |error: Errno| error.on(Object::Thread(tid), "read its state").of(pid);
    let shares_all =
        told.is_some_and(|(own, leader)| (own.files, own.folders) == (leader.files, leader.folders));
    if tid != pid && !shares_all {
        for (what, name) in [(Kcmp::Files, "descriptors"), (Kcmp::Fs, "working directory")] {
            let order = sys::process::kcmp(what, (pid, 0), (tid, 0)).map_err(explain)?;
            if order.is_ne() {
                let why = format!("has {name} of its own, apart from its process, which is not carried");
                failures.push(Failure::unsupported(Object::Thread(tid), why).of(pid));
            }
        }
    }
    let mut registers = agent::arch::restart_interrupted_call(&thread.context.registers, thread.context.rest);
    let restart = agent::arch::restart_code(&thread.context.registers, &registers);
    let registered = stopped.rseq().map_err(explain)?;
    let read = |address: u64, bytes: &mut [u8]| {
        sys::memory::read_remote(pid, address, bytes).is_ok_and(|count| count == bytes.len())
    };
    if let Some(abort) = rseq::abort_address(registered, registers.ip, read) {
        registers.ip = abort;
    }
    let (futex_rla, futex_rla_len) = sys::process::robust_list(tid).map_err(explain)?;
    let pending = match told {
        Some((told, _)) if !told.has_pending => Vec::new(),
        _ => stopped.pending(false).map_err(explain)?,
    };
    check_pending(pid, tid, &pending, &mut failures);
    let mode = seccomp::mode(status.seccomp)?;
    let filters = match mode {
        SeccompMode::Filter => seccomp::read(stopped).map_err(explain)?,
        _ => Vec::new(),
    };
    let mut core = ThreadCoreEntry {
        futex_rla,
        futex_rla_len: futex_rla_len as u32,
        blk_sigset: Some(thread.context.mask),
        sas: Some(own.stack.clone()),
        pdeath_sig: (own.death_signal != 0).then_some(own.death_signal),
        signals_p: Some(signals::queue(pending)),
        seccomp_mode: Some(mode.into()),
        comm: Some(status.comm.clone()),
        rseq_entry: rseq::record(registered),
        timer_slack: Some(own.timer_slack),
        restart,
        ..ThreadCoreEntry::default()
    };
    let scheduling = sys::process::sched(tid).map_err(explain)?;
    if scheduling.policy & 0xff == sched::SCHED_DEADLINE {
        let why = "is scheduled by deadlines, which is not carried yet";
        failures.push(Failure::unsupported(Object::Thread(tid), why).of(pid));
    }
    sched::record(scheduling, &mut core);
    sched::record_affinity(sys::process::affinity(tid).map_err(explain)?, &mut core);
    let info = agent::arch::record::thread_info(&registers, &thread.context.xstate, own.clear_tid);
    let core = CoreEntry {
        mtype: agent::arch::record::MARCH.into(),
        thread_info: Some(info),
        thread_core: Some(core),
        ..CoreEntry::default()
    };
    Ok(Seen {
        tid,
        core,
        filters,
        umask: status.umask,
        rings: None,
        policies: Policies::default(),
        process: None,
        failures,
    })
}

fn check_pending(pid: i32, tid: i32, pending: &[[u8; 128]], failures: &mut Vec<Failure>) {
    if pending.iter().any(|info| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) == libc::SIGTRAP) {
        let why = "has a SIGTRAP pending, which cannot be told from our own";
        failures.push(Failure::unsupported(Object::Thread(tid), why).of(pid));
    }
}
