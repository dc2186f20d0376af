//! What follows from the observations of a tree: the census. Every objection is collected, none ends it
//! early.

use crate::freeze::{Process, State, Tree};
use crate::identity::{At, Classes};
use crate::observe::{
    self, Common, Depth, FileKey, Link, Look, Memory, NAMESPACES, Namespaces, Probed, Questions, Seen,
};
use agent::crew::{self, shares};
use image::*;
use kinds::contract::{DumpCx, FdProbe};
use kinds::fd::ghost::FileAt;
use kinds::fd::tty::Person;
use kinds::task::sessions::{self, Kin};
use kinds::task::{numa, seccomp};
use kinds::vma;
use model::{Errno, Failure, Failures, Object, Options};
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use sys::fd::Texts;
use sys::process::Kcmp;
use sys::threads::Told;

/// Processes that answer to one of the crew at the same time.
const PROCESSES_AT_ONCE: usize = 32;

/// Everything about one process.
#[derive(Debug)]
pub struct Surveyed {
    pub pid: i32,
    pub pstree: PstreeEntry,
    /// One record for each thread, the leader's first; a zombie has the leader's alone.
    pub cores: Vec<(i32, CoreEntry)>,
    pub ids: TaskKobjIdsEntry,
    pub mm: MmEntry,
    pub fs: FsEntry,
    pub fdinfo: Vec<FdinfoEntry>,
    /// Another process has the same table of descriptors, whose image is written for that one.
    pub is_fdinfo_shared: bool,
    /// Where its pages are read: itself, or its copy.
    pub memory_of: i32,
    pub runs: Vec<(Range<u64>, pages::select::How)>,
    pub scanned_pages: u64,
}

/// The whole tree.
#[derive(Debug)]
pub struct Census<'o> {
    pub processes: Vec<Surveyed>,
    pub cx: DumpCx<'o>,
    pub chains: seccomp::Chains,
}

/// Numbers of the namespaces that the tree and this program share.
pub fn namespace_ids() -> TaskKobjIdsEntry {
    let id = |name| kinds::fd::namespace::by_name(name).map(|namespace| namespace.id);
    TaskKobjIdsEntry {
        vm_id: 0,
        files_id: 0,
        fs_id: 0,
        sighand_id: 0,
        pid_ns_id: id("pid"),
        net_ns_id: id("net"),
        ipc_ns_id: id("ipc"),
        uts_ns_id: id("uts"),
        mnt_ns_id: id("mnt"),
        user_ns_id: id("user"),
        cgroup_ns_id: id("cgroup"),
        time_ns_id: id("time"),
    }
}

/// Objects of one sort that tasks may share.
struct Objects {
    what: Kcmp,
    /// The first process with the object of each, and the number of the object.
    by_pid: HashMap<i32, (i32, u32)>,
}

/// What two descriptors of one open file have in common, and no others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Same {
    /// Where the kernel has it.
    Place(u64),
    /// Who has it first, as kcmp(2) says.
    First(At),
}

/// The ids of open files that were seen, and their types.
type Known = HashMap<Same, (u32, i32)>;

/// A process of which all is known but what its memory consists of.
struct Found {
    process: usize,
    /// None for a zombie.
    alive: Option<(Look, Vec<Seen>, FsEntry, u32)>,
}

/// A tree of which all is known but what its memory consists of. Then it need not stand still any more,
/// if that is to be found out from copies.
pub struct Survey<'o> {
    options: &'o Options,
    cx: DumpCx<'o>,
    failures: Failures,
    own_namespaces: Namespaces,
    objects: Vec<Objects>,
    /// By process that is the first with them.
    tables: HashMap<i32, Vec<FdinfoEntry>>,
    chains: seccomp::Chains,
    pids: Vec<i32>,
    found: Vec<Found>,
}

/// Where the memory of a process is read, and what is known of it.
pub struct Reading {
    /// The process, or its copy.
    pub from: i32,
    pub memory: Memory,
}

/// Reads the tree, its memory to this depth. `own_namespaces` are those of this program.
///
/// # Errors
/// Everything that cannot be asked. What is not carried is only noted.
pub fn survey<'o>(
    tree: &mut Tree,
    options: &'o Options,
    depth: Depth,
    own_namespaces: Namespaces,
) -> Result<Survey<'o>, Failures> {
    let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
    let tids = tree.processes.iter().flat_map(|process| &process.tids).chain(&pids).copied().collect();
    let mut survey = Survey {
        options,
        cx: DumpCx::new(options, pids.clone(), tids),
        failures: Failures::new(),
        own_namespaces,
        objects: Vec::new(),
        tables: HashMap::new(),
        chains: seccomp::Chains::default(),
        pids,
        found: Vec::new(),
    };
    survey.check_tree(tree);
    let alive = tree.processes.iter().filter(|process| process.state != State::Zombie);
    survey.cx.people = alive.map(|process| (process.pid, person(&process.stat))).collect();
    let mut observed = observe_all(tree, depth);
    for (process, observed) in tree.processes.iter().zip(&mut observed) {
        let Some(Ok((_, seen))) = observed else { continue };
        for seen in seen {
            let Some(told) = seen.rings.take() else { continue };
            match (
                kinds::fd::uring::keep(process.pid, seen.tid, told, &mut survey.cx),
                &mut seen.core.thread_core,
            ) {
                (Ok(registered), Some(core)) => core.registered_rings = registered,
                (Err(objection), _) => survey.failures.push(objection),
                (Ok(_), None) => {}
            }
        }
    }
    let told = observed.iter().flatten().filter_map(|observed| observed.as_ref().ok()?.0.told.as_ref());
    survey.objects = objects(tree, &told.map(|told| (told.tid, told)).collect())?;
    survey.all_descriptors(tree)?;
    if survey.cx.ends_here {
        return Err(survey.failures);
    }
    for (at, observed) in observed.into_iter().enumerate() {
        let pid = tree.processes[at].pid;
        let alive = match observed {
            None => None,
            Some(Ok((look, seen))) => Some(survey.links(pid, look, seen)),
            Some(Err(failure)) => {
                survey.failures.push(failure.of(pid));
                continue;
            }
        };
        survey.found.push(Found { process: at, alive });
    }
    for kind in kinds::fd::KINDS {
        let failures = kind.settle(&mut survey.cx);
        survey.failures.extend(failures);
    }
    survey.failures.extend(vma::sysv::settle(&mut survey.cx));
    kinds::fd::locks::settle(&mut survey.cx);
    Ok(survey)
}

fn person(stat: &sys::proc::Stat) -> Person {
    Person { sid: stat.sid, terminal: stat.tty as u32, group: stat.tty_pgid }
}

/// Tells which objects tasks share. Those of which the kernel's tracing has told are compared only where it seems so.
fn objects(tree: &mut Tree, told: &HashMap<i32, &Told>) -> Result<Vec<Objects>, Failure> {
    const WHATS: [Kcmp; 4] = [Kcmp::Vm, Kcmp::Fs, Kcmp::Sighand, Kcmp::Files];
    let explain = |error: Errno| error.on(Object::Tree, "compare what its processes share");
    let alive = tree.processes.iter().filter(|process| process.state != State::Zombie);
    let alive: Vec<At> = alive.map(|process| (process.pid, 0)).collect();
    let all_told: Option<Vec<[u64; 4]>> = alive
        .iter()
        .map(|(pid, _)| told.get(pid).map(|told| [told.memory, told.folders, told.handlers, told.files]))
        .collect();
    let keys = all_told.unwrap_or_else(|| vec![[0; 4]; alive.len()]);
    let keyed: Vec<(At, [u64; 4])> = alive.iter().copied().zip(keys).collect();
    let sorted = tree.crew.each(shares(keyed), |_, share: Vec<(At, [u64; 4])>| {
        let sort = |nth: usize| Classes::new(WHATS[nth], share.iter().map(|(at, keys)| (keys[nth], *at)));
        [0, 1, 2, 3].map(sort)
    });
    let mut all = WHATS.map(|_| Classes::default());
    for sorted in sorted {
        for ((what, classes), more) in WHATS.iter().zip(&mut all).zip(sorted) {
            classes.add(*what, more.map_err(explain)?).map_err(explain)?;
        }
    }
    let mut last = 0;
    let numbered = WHATS.iter().zip(&all).map(|(what, classes)| {
        let firsts = classes.firsts();
        let mut by_pid: HashMap<i32, (i32, u32)> = HashMap::new();
        for (pid, _) in &alive {
            let first = firsts[&(*pid, 0)].0;
            let number = by_pid.get(&first).map_or_else(
                || {
                    last += 1;
                    last
                },
                |known| known.1,
            );
            by_pid.insert(*pid, (first, number));
        }
        Objects { what: *what, by_pid }
    });
    Ok(numbered.collect())
}

type Observed = Result<(Look, Vec<Seen>), Failure>;

/// Looks at all processes and asks their threads, everybody in the crew at the same time. None for a
/// zombie.
fn observe_all(tree: &mut Tree, depth: Depth) -> Vec<Option<Observed>> {
    let alive = || tree.processes.iter().filter(|process| process.state != State::Zombie);
    let looks: Vec<(usize, i32)> = alive().map(|process| (process.members[0], process.pid)).collect();
    let common = Common::of(looks.len());
    let looks = tree.crew.each(looks, move |_, pid| observe::look(pid, depth, common.as_deref()));
    // Mappings were read everywhere before the agent makes one of its own.
    let mut batches: Vec<(usize, Vec<(i32, Questions)>)> = Vec::new();
    for member in 0..crew::size() {
        let of_member: Vec<(i32, Questions)> = alive()
            .zip(&looks)
            .filter(|(process, _)| process.members.contains(&member))
            .filter_map(|(process, look)| {
                let look = look.as_ref().ok()?;
                let (stat, status) = (look.stat.clone(), look.status.clone());
                let (rings, timers) = (look.rings.clone(), look.timers.clone());
                let mappings = numa::asked_mappings(look.memory.maps.iter().map(|(_, entry)| entry));
                let instruction = look.instruction;
                Some((process.pid, Questions { instruction, rings, mappings, stat, status, timers }))
            })
            .collect();
        let mut rest = of_member.into_iter().peekable();
        while rest.peek().is_some() {
            batches.push((member, rest.by_ref().take(PROCESSES_AT_ONCE).collect()));
        }
    }
    let answers = tree.crew.each(batches, observe::ask);
    let mut seen: HashMap<i32, Result<Vec<Seen>, Failure>> = HashMap::new();
    let mut failed = None;
    for answers in answers {
        match answers {
            Ok(answers) => {
                for (pid, threads) in answers {
                    let known = seen.entry(pid).or_insert_with(|| Ok(Vec::new()));
                    match (known, threads) {
                        (Ok(all), Ok(threads)) => all.extend(threads),
                        (Err(_), _) => {}
                        (known, Err(failure)) => *known = Err(failure),
                    }
                }
            }
            Err(failure) => failed = Some(failure),
        }
    }
    let mut looks = looks.into_iter();
    let unanswered = |failed: &mut Option<Failure>| {
        failed.take().unwrap_or_else(|| Failure::conflict(Object::Task, "ask it", "it did not answer"))
    };
    tree.processes
        .iter()
        .map(|process| {
            if process.state == State::Zombie {
                return None;
            }
            Some(looks.next()?.and_then(|look| {
                let mut threads =
                    seen.remove(&process.pid).unwrap_or_else(|| Err(unanswered(&mut failed)))?;
                threads.sort_unstable_by_key(|seen| (seen.tid != process.pid, seen.tid));
                Ok((look, threads))
            }))
        })
        .collect()
}

impl<'o> Survey<'o> {
    /// What was found that is not carried, if anything.
    ///
    /// # Errors
    /// All of that.
    fn check(&mut self) -> Result<(), Failures> {
        if self.is_good() { Ok(()) } else { Err(std::mem::take(&mut self.failures)) }
    }

    pub fn is_good(&self) -> bool {
        self.failures.is_empty()
    }

    pub fn cx(&mut self) -> &mut DumpCx<'o> {
        &mut self.cx
    }

    /// Every living process, with what is known of its memory.
    pub fn looks(&self) -> impl Iterator<Item = (i32, &Look)> {
        self.found.iter().filter_map(|found| Some((self.pids[found.process], &found.alive.as_ref()?.0)))
    }

    pub fn looks_mut(&mut self) -> impl Iterator<Item = (i32, &mut Look)> {
        let pids = &self.pids;
        self.found.iter_mut().filter_map(|found| Some((pids[found.process], &mut found.alive.as_mut()?.0)))
    }

    /// Reads what is left to know; `reading` says of each process where its memory is read.
    ///
    /// # Errors
    /// Everything that is not carried.
    pub fn conclude(
        mut self,
        tree: &Tree,
        reading: &dyn Fn(i32, &mut Look) -> Result<Reading, Failure>,
    ) -> Result<Census<'o>, Failures> {
        let mut processes = Vec::with_capacity(self.found.len());
        for Found { process, alive } in std::mem::take(&mut self.found) {
            let process = &tree.processes[process];
            let surveyed = match alive {
                None => self.zombie(process),
                Some((mut look, seen, fs, exe)) => reading(process.pid, &mut look)
                    .and_then(|reading| self.process(process, look, seen, fs, exe, reading)),
            };
            match surveyed {
                Ok(surveyed) => processes.push(surveyed),
                Err(failure) => self.failures.push(failure.of(process.pid)),
            }
        }
        for process in &processes {
            let why = vma::sysv::check_own(&process.mm.vmas, &mut self.cx);
            self.failures.extend(why.map(|why| Failure::unsupported(Object::Task, why).of(process.pid)));
        }
        vma::sysv::write(namespace_ids().ipc_ns_id.unwrap_or(0), &mut self.cx);
        self.check()?;
        Ok(Census { processes, cx: self.cx, chains: self.chains })
    }

    /// Records for what the links of a process point to.
    fn links(&mut self, pid: i32, look: Look, seen: Vec<Seen>) -> (Look, Vec<Seen>, FsEntry, u32) {
        self.check_namespaces(pid, &look.namespaces);
        let fs = FsEntry {
            cwd_id: self.link_record(pid, &look.cwd),
            root_id: self.link_record(pid, &look.root),
            umask: seen.first().and_then(|seen| seen.umask),
        };
        let exe = self.link_record(pid, &look.exe);
        for (map, _) in &look.memory.maps {
            if vma::sysv::is_segment(&map.name) {
                self.failures.extend(vma::sysv::note(pid, map, &mut self.cx).err());
            }
            if vma::aio::is_ring(&map.name) {
                self.failures.extend(vma::aio::check_in_flight(pid, map));
            }
        }
        (look, seen, fs, exe)
    }

    /// Sessions and groups have to be inside the tree, or be those of the shell.
    fn check_tree(&mut self, tree: &Tree) {
        let Some(root) = tree.processes.first() else { return };
        let (own_sid, own_pgid) = (root.stat.sid, root.stat.pgid);
        if root.state == State::Zombie {
            let why = "has ended; there is nothing to bring back";
            self.failures.push(Failure::unsupported(Object::Task, why).of(root.pid));
        }
        let places: HashMap<i32, usize> = self.pids.iter().enumerate().map(|(at, pid)| (*pid, at)).collect();
        let kin: Vec<Kin> = tree
            .processes
            .iter()
            .enumerate()
            .map(|(at, process)| Kin {
                pid: process.pid,
                sid: process.stat.sid,
                parent: places.get(&process.stat.ppid).copied().filter(|parent| *parent < at),
                has_ended: process.state == State::Zombie,
            })
            .collect();
        for (process, way) in tree.processes.iter().zip(sessions::ways(&kin)) {
            let is_inside = |id: i32| self.pids.contains(&id);
            let is_shell = |id: i32, shell: i32| self.options.shell_job && id == shell;
            let is_led = |id: i32| std::path::Path::new(&format!("/proc/{id}")).exists();
            let sid = process.stat.sid;
            let is_root = process.pid == root.pid;
            if !is_inside(sid) && !is_shell(sid, own_sid) && (is_root || sid == own_sid || is_led(sid)) {
                let why = format!("its session {sid} is led from outside of the tree");
                let failure = Failure::policy(Object::Task, why, &model::options::SHELL_JOB).of(process.pid);
                self.failures.push(failure);
                continue;
            }
            if let Err(why) = way {
                self.failures.push(Failure::unsupported(Object::Task, why).of(process.pid));
            }
            // A group whose leader has ended can be made again, except that it is the shell's.
            let pgid = process.stat.pgid;
            if !is_inside(pgid) && !is_shell(pgid, own_pgid) && is_led(pgid) {
                let why = format!("its process group {pgid} is led from outside of the tree");
                self.failures.push(Failure::unsupported(Object::Task, why).of(process.pid));
            }
        }
    }

    fn pstree(&self, process: &Process) -> PstreeEntry {
        let pid = process.pid as u32;
        let is_root = self.pids.first() == Some(&process.pid);
        PstreeEntry {
            pid,
            ppid: if is_root { 0 } else { process.stat.ppid as u32 },
            pgid: process.stat.pgid as u32,
            sid: process.stat.sid as u32,
            threads: match process.state {
                State::Zombie => vec![pid],
                _ => process.tids.iter().map(|tid| *tid as u32).collect(),
            },
        }
    }

    fn zombie(&mut self, process: &Process) -> Result<Surveyed, Failure> {
        let stat = &process.stat;
        let core = CoreEntry {
            mtype: agent::arch::record::MARCH.into(),
            tc: Some(TaskCoreEntry {
                task_state: 2,
                exit_code: stat.exit_code as u32,
                comm: stat.comm.clone(),
                ..TaskCoreEntry::default()
            }),
            ..CoreEntry::default()
        };
        Ok(Surveyed {
            pid: process.pid,
            pstree: self.pstree(process),
            cores: vec![(process.pid, core)],
            ids: TaskKobjIdsEntry::default(),
            mm: MmEntry::default(),
            fs: FsEntry::default(),
            fdinfo: Vec::new(),
            is_fdinfo_shared: false,
            memory_of: process.pid,
            runs: Vec::new(),
            scanned_pages: 0,
        })
    }

    fn process(
        &mut self,
        process: &Process,
        look: Look,
        mut seen: Vec<Seen>,
        fs: FsEntry,
        exe: u32,
        reading: Reading,
    ) -> Result<Surveyed, Failure> {
        let pid = process.pid;
        if let State::Stopped(signal) = process.state
            && !matches!(signal, libc::SIGSTOP | libc::SIGTSTP)
        {
            let why = format!("is stopped by signal {signal}; only SIGSTOP and SIGTSTP can be restored");
            self.failures.push(Failure::unsupported(Object::Task, why).of(pid));
        }
        let ids = self.object_ids(process);
        let Some((attributes, rules)) = seen.first().and_then(|seen| seen.process) else {
            return Err(Failure::conflict(Object::Task, "ask it", "its leader did not answer"));
        };
        let Reading { from, memory } = reading;
        let mut mm = vma::mm::record(&look.stat, attributes.brk, &look.auxv, exe);
        mm.dumpable = Some(attributes.dumpable);
        mm.thp_disabled = Some(attributes.thp_disabled != 0);
        mm.thp_flags = Some(attributes.thp_disabled & !1).filter(|flags| *flags != 0);
        rules.note(&mut mm);
        let policies = seen.first_mut().map(|seen| std::mem::take(&mut seen.policies)).unwrap_or_default();
        for (map, entry) in memory.maps {
            if vma::aio::is_ring(&map.name) {
                mm.aios.push(vma::aio::dump(from, &map)?);
            }
            match vma::dump(from, &map, entry, &mut self.cx) {
                Ok(mut entry) => {
                    policies.note(&mut entry);
                    vma::push(&mut mm.vmas, entry);
                }
                Err(failure) => self.failures.push(failure.of(pid)),
            }
        }
        mm.vmas.extend(memory.pages.guards.iter().map(|range| vma::guard(range.start, range.end)));

        let mut cores = Vec::with_capacity(seen.len());
        for mut seen in seen {
            if let Some(core) = &mut seen.core.thread_core {
                core.seccomp_filter = self.chains.add(seen.filters);
            }
            self.failures.extend(seen.failures);
            cores.push((seen.tid, seen.core));
        }
        if let Some(tc) = &mut cores[0].1.tc {
            tc.oom_score_adj = look.oom_score_adj;
            // A session of the shell has its terminal.
            let sid = process.stat.sid;
            let leader = self.cx.people.get(&sid);
            let sessions = leader.map_or(self.options.shell_job, |leader| leader.terminal != 0);
            tc.has_no_terminal = (process.stat.tty == 0 && sessions).then_some(true);
            (tc.task_state, tc.stop_signo) = match process.state {
                State::Stopped(signal) => (3, Some(signal as u32)),
                _ => (1, None),
            };
        }
        let fdinfo = self.tables.remove(&pid);
        Ok(Surveyed {
            pid,
            pstree: self.pstree(process),
            cores,
            ids,
            mm,
            fs,
            is_fdinfo_shared: fdinfo.is_none(),
            fdinfo: fdinfo.unwrap_or_default(),
            memory_of: from,
            runs: memory.pages.runs,
            scanned_pages: memory.pages.scanned_pages,
        })
    }

    fn check_namespaces(&mut self, pid: i32, namespaces: &Namespaces) {
        for ((name, own), theirs) in NAMESPACES.iter().zip(&self.own_namespaces).zip(namespaces) {
            if own != theirs && theirs.is_some() {
                let object = Object::Named(format!("{name} namespace"));
                let why = "is another than that of this program, which is not carried yet";
                self.failures.push(
                    Failure::unsupported(object, why)
                        .of(pid)
                        .help(model::Remedy::Advice("run crtools inside the namespace")),
                );
            }
        }
    }

    /// The numbers of the objects of a process; only its table of descriptors may be shared.
    fn object_ids(&mut self, process: &Process) -> TaskKobjIdsEntry {
        let mut ids = namespace_ids();
        for objects in &self.objects {
            let (id, name) = match objects.what {
                Kcmp::Vm => (&mut ids.vm_id, "memory (CLONE_VM)"),
                Kcmp::Fs => (&mut ids.fs_id, "working directory and root (CLONE_FS)"),
                Kcmp::Sighand => (&mut ids.sighand_id, "signal handlers"),
                _ => {
                    ids.files_id = objects.by_pid[&process.pid].1;
                    continue;
                }
            };
            let (first, number) = objects.by_pid[&process.pid];
            *id = number;
            if first != process.pid {
                let why = format!("shares its {name} with another process, which is not carried");
                self.failures.push(Failure::unsupported(Object::Task, why).of(process.pid));
            }
        }
        ids
    }

    /// A record for what a link of `/proc/PID` points to; zero, with an objection noted, where that is
    /// not carried.
    fn link_record(&mut self, pid: i32, link: &Link) -> u32 {
        let object = || Object::Named(format!("{} {}", link.name, String::from_utf8_lossy(&link.path)));
        let flags = libc::O_RDONLY as u32;
        let source = PathBuf::from(format!("/proc/{pid}/{}", link.name));
        let seen = FileAt { path: &link.path, stat: &link.stat, source: &source };
        kinds::fd::regular::record(&seen, flags, &object, &mut self.cx).unwrap_or_else(|failure| {
            self.failures.push(failure.of(pid));
            0
        })
    }

    /// Reads every table of descriptors once.
    fn all_descriptors(&mut self, tree: &mut Tree) -> Result<(), Failure> {
        let Some(owners) = self.objects.iter().find(|objects| objects.what == Kcmp::Files) else {
            return Ok(());
        };
        let has_table = |pid: &i32| owners.by_pid.get(pid).is_some_and(|(first, _)| first == pid);
        let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).filter(has_table).collect();
        let mut all = observe::descriptors(&pids)?;
        let are_told = all.iter().any(|(_, told)| told.is_some());
        self.tables.extend(pids.iter().map(|pid| (*pid, Vec::new())));
        let mut files: Classes<FileKey> = Classes::default();
        let mut known = Known::new();
        // A duplicate of each is ours for a moment.
        while !all.is_empty() {
            let round = all.drain(..all.len().min(sys::fd::room() / 2));
            let mut probes = Vec::with_capacity(round.len());
            for probed in tree.crew.each(shares(round), |_, share| observe::probe(share)) {
                let Probed { probes: more, files: sorted } = probed?;
                probes.extend(more);
                files
                    .add(Kcmp::File, sorted)
                    .map_err(|error| error.on(Object::Tree, "compare its descriptors"))?;
            }
            let firsts = if are_told { HashMap::new() } else { files.firsts() };
            for (at, probe) in &probes {
                let object = || Object::Fd { number: at.1, what: "a descriptor".into() };
                let probe = probe.as_ref().map_err(|error| (*error).on(object(), "look at it"));
                let same = |probe: &FdProbe| match probe.address {
                    0 => Same::First(firsts[at]),
                    address => Same::Place(address),
                };
                match probe.and_then(|probe| self.descriptor(probe, same(probe), &mut known)) {
                    Ok(entry) => self.tables.entry(at.0).or_default().push(entry),
                    Err(failure) => self.failures.push(failure.of(at.0)),
                }
            }
            let probes = probes.into_iter().filter_map(|(_, probe)| probe.ok());
            sys::fd::close(probes.filter_map(|probe| Arc::into_inner(probe.fd)));
        }
        self.in_flight(&mut files, are_told, &mut known)
    }

    /// Looks at what is in queues, and at what is in the queues of that.
    fn in_flight(
        &mut self,
        files: &mut Classes<FileKey>,
        by_address: bool,
        known: &mut Known,
    ) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(Object::Tree, "look at descriptors in queues");
        // Of the others it is known.
        let address = |fd: i32| match by_address {
            true => sys::inside::inside().and_then(|inside| inside.file(std::process::id() as i32, fd)),
            false => Some(0),
        };
        const NOT_TOLD: Errno = Errno { call: "bpf", code: libc::ENODATA };
        let me = std::process::id() as i32;
        let texts = Texts::of(me).map(Arc::new).map_err(explain)?;
        while let Some((pid, fd)) = self.cx.flying.get(self.cx.flown.len()) {
            let (pid, at) = (*pid, (me, fd.as_raw_fd()));
            let fd = fd.try_clone().map_err(|error| explain(sys::memory::io_errno("dup", &error)))?;
            let address = address(at.1).ok_or_else(|| explain(NOT_TOLD))?;
            let probe = FdProbe::in_flight(pid, fd, &texts, address).map_err(explain)?;
            let same = match address {
                0 => {
                    let one = Classes::new(Kcmp::File, [(observe::key(&probe), at)]).map_err(explain)?;
                    files.add(Kcmp::File, one).map_err(explain)?;
                    Same::First(files.firsts()[&at])
                }
                address => Same::Place(address),
            };
            let id = match self.file(&probe, same, known) {
                Ok((id, _)) => id,
                Err(failure) => {
                    self.failures.push(failure.of(pid));
                    0
                }
            };
            self.cx.flown.push(id);
        }
        Ok(())
    }

    /// The record of a descriptor, and of its open file when that is seen first.
    fn descriptor(&mut self, probe: &FdProbe, same: Same, known: &mut Known) -> Result<FdinfoEntry, Failure> {
        let (id, file_type) = self.file(probe, same, known)?;
        kinds::fd::locks::dump(probe, id, &mut self.cx)?;
        // The duplicate has flags of its own; fdinfo tells those of the original.
        let flags = probe.close_on_exec()?;
        Ok(FdinfoEntry {
            id,
            flags: flags.into(),
            r#type: file_type,
            fd: probe.number as u32,
            xattr_security_selinux: None,
        })
    }

    /// The record of an open file, made when it is seen first.
    fn file(&mut self, probe: &FdProbe, same: Same, known: &mut Known) -> Result<(u32, i32), Failure> {
        if let Some(known) = known.get(&same) {
            return Ok(*known);
        }
        let kind = kinds::fd::kind_of(probe);
        let kind = kind.ok_or_else(|| probe.refuse("a descriptor of this kind is not carried yet"))?;
        let id = self.cx.next_id();
        known.insert(same, (id, kind.file_type()));
        let entry = kind.dump(probe, id, &mut self.cx)?;
        self.cx.files.push(entry);
        Ok((id, kind.file_type()))
    }
}
