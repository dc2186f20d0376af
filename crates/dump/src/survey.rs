//! Reads everything about a frozen tree: the census. Every objection is collected, none ends it early.

use crate::freeze::{Process, State, Tree};
use crate::identity::{Files, Known};
use agent::List;
use agent::inject::{BATCH, Host};
use image::*;
use kinds::contract::{DumpCx, FdProbe};
use kinds::task::{Answers, Ask, attributes, creds, limits, rseq, sched, seccomp, signals, timers};
use kinds::vma;
use model::{Errno, Failure, Failures, Object, Options};
use pages::select::Area;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use sys::proc::{SmapsParser, Status, Vma};
use sys::process::Kcmp;

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
    TaskKobjIdsEntry {
        vm_id: 0,
        files_id: 0,
        fs_id: 0,
        sighand_id: 0,
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(3),
        uts_ns_id: Some(4),
        mnt_ns_id: Some(5),
        user_ns_id: Some(6),
        cgroup_ns_id: Some(7),
        time_ns_id: Some(8),
    }
}

/// As `/proc/PID/ns` names them.
const NAMESPACES: [&str; 10] =
    ["pid", "pid_for_children", "net", "ipc", "uts", "mnt", "user", "cgroup", "time", "time_for_children"];

struct Survey<'t, 'o> {
    options: &'o Options,
    cx: DumpCx<'o>,
    failures: Failures,
    own_namespaces: Vec<Option<u64>>,
    files: Files,
    tables: Known<u32>,
    vms: Known<u32>,
    fss: Known<u32>,
    sighands: Known<u32>,
    last_object: u32,
    chains: seccomp::Chains,
    pids: &'t [i32],
}

fn namespaces(pid: &str) -> Vec<Option<u64>> {
    use std::os::unix::fs::MetadataExt;
    let inode = |name: &&str| std::fs::metadata(format!("/proc/{pid}/ns/{name}")).ok().map(|meta| meta.ino());
    NAMESPACES.iter().map(inode).collect()
}

/// Reads the tree.
///
/// # Errors
/// Everything that is not carried.
pub fn survey<'o>(tree: &mut Tree, options: &'o Options) -> Result<Census<'o>, Failures> {
    let pids: Vec<i32> = tree.processes.iter().map(|process| process.pid).collect();
    let mut survey = Survey {
        options,
        cx: DumpCx::new(options),
        failures: Failures::new(),
        own_namespaces: namespaces("self"),
        files: Files::default(),
        tables: Known::default(),
        vms: Known::default(),
        fss: Known::default(),
        sighands: Known::default(),
        last_object: 0,
        chains: seccomp::Chains::default(),
        pids: &pids,
    };
    survey.check_tree(tree);
    let mut processes = Vec::with_capacity(tree.processes.len());
    for process in &mut tree.processes {
        let pid = process.pid;
        let surveyed = match process.state {
            State::Zombie => survey.zombie(process),
            _ => survey.process(process),
        };
        match surveyed {
            Ok(surveyed) => processes.push(surveyed),
            Err(failure) => survey.failures.push(failure.of(pid)),
        }
    }
    for kind in kinds::fd::KINDS {
        let failures = kind.settle(&mut survey.cx);
        survey.failures.extend(failures);
    }
    if !survey.failures.is_empty() {
        return Err(survey.failures);
    }
    Ok(Census { processes, cx: survey.cx, chains: survey.chains })
}

fn read(path: String) -> Result<Vec<u8>, Failure> {
    std::fs::read(&path)
        .map_err(|error| sys::memory::io_errno("read", &error).on(Object::Path(path), "read it"))
}

impl Survey<'_, '_> {
    /// Sessions and groups have to be inside the tree, or be those of the shell.
    fn check_tree(&mut self, tree: &Tree) {
        let Some(root) = tree.processes.first() else { return };
        let (own_sid, own_pgid) = (root.stat.sid, root.stat.pgid);
        if root.state == State::Zombie {
            let why = "has ended; there is nothing to bring back";
            self.failures.push(Failure::unsupported(Object::Task, why).of(root.pid));
        }
        for process in &tree.processes {
            let is_inside = |id: i32| self.pids.contains(&id);
            let is_shell = |id: i32, shell: i32| self.options.shell_job && id == shell;
            let sid = process.stat.sid;
            if !is_inside(sid) && !is_shell(sid, own_sid) {
                let why = format!("its session {sid} is led from outside of the tree");
                let failure = Failure::policy(Object::Task, why, &model::options::SHELL_JOB).of(process.pid);
                self.failures.push(failure);
                continue;
            }
            // A group whose leader has ended can be made again, except that it is the shell's.
            let pgid = process.stat.pgid;
            if !is_inside(pgid)
                && !is_shell(pgid, own_pgid)
                && std::path::Path::new(&format!("/proc/{pgid}")).exists()
            {
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
                _ => process.threads.iter().map(|thread| thread.tid as u32).collect(),
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
            runs: Vec::new(),
            scanned_pages: 0,
        })
    }

    fn process(&mut self, process: &mut Process) -> Result<Surveyed, Failure> {
        let pid = process.pid;
        if let State::Stopped(signal) = process.state
            && !matches!(signal, libc::SIGSTOP | libc::SIGTSTP)
        {
            let why = format!("is stopped by signal {signal}; only SIGSTOP and SIGTSTP can be restored");
            self.failures.push(Failure::unsupported(Object::Task, why).of(pid));
        }
        self.check_namespaces(pid);
        let stat = crate::freeze::read_stat(pid)?;
        let statuses = self.statuses(process)?;
        let maps = read_smaps(pid)?;
        let ids = self.object_ids(process)?;

        let answered = self.ask(process, &stat, &statuses, &maps)?;
        let fs = self.fs(pid, &statuses[0])?;
        let exe = self.link_record(pid, "exe")?;
        let auxv = read(format!("/proc/{pid}/auxv"))?;
        let mut mm = vma::mm::record(&stat, answered.attributes.brk, &auxv, exe);
        mm.dumpable = Some(answered.attributes.dumpable);
        mm.thp_disabled = Some(answered.attributes.is_thp_disabled);
        for map in &maps {
            match vma::dump(pid, map, &mut self.cx) {
                Ok(entry) => vma::push(&mut mm.vmas, entry),
                Err(failure) => self.failures.push(failure),
            }
        }
        let selection = self.pages(pid, &mm)?;
        mm.vmas.extend(selection.guards.iter().map(|range| vma::guard(range.start, range.end)));

        let mut cores = answered.cores;
        self.finish_leader(process, &answered.attributes, &mut cores[0].1, pid)?;
        let (fdinfo, files_id, is_fdinfo_shared) = self.descriptors(pid)?;
        let ids = TaskKobjIdsEntry { files_id, ..ids };
        cores[0].1.ids = None;
        Ok(Surveyed {
            pid,
            pstree: self.pstree(process),
            cores,
            ids,
            mm,
            fs,
            fdinfo,
            is_fdinfo_shared,
            runs: selection.runs,
            scanned_pages: selection.scanned_pages,
        })
    }

    fn check_namespaces(&mut self, pid: i32) {
        for ((name, own), theirs) in
            NAMESPACES.iter().zip(&self.own_namespaces).zip(namespaces(&pid.to_string()))
        {
            if *own != theirs && theirs.is_some() {
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

    fn statuses(&mut self, process: &Process) -> Result<Vec<Status>, Failure> {
        let pid = process.pid;
        process
            .threads
            .iter()
            .map(|thread| {
                let text = read(format!("/proc/{pid}/task/{}/status", thread.tid))?;
                sys::proc::parse_status(&text).ok_or_else(|| {
                    Failure::conflict(
                        Object::Thread(thread.tid),
                        "read its status",
                        "the text is not understood",
                    )
                })
            })
            .collect()
    }

    /// Tells which objects tasks share; only a table of descriptors may be.
    fn object_ids(&mut self, process: &Process) -> Result<TaskKobjIdsEntry, Failure> {
        let pid = process.pid;
        let at = (pid, 0);
        let explain = |error: Errno| error.on(Object::Task, "compare what it shares").of(pid);
        let mut next = self.last_object;
        let mut ids = namespace_ids();
        let mut shared = Vec::new();
        for (what, known, id, name) in [
            (Kcmp::Vm, &mut self.vms, &mut ids.vm_id, "memory (CLONE_VM)"),
            (Kcmp::Fs, &mut self.fss, &mut ids.fs_id, "working directory and root (CLONE_FS)"),
            (Kcmp::Sighand, &mut self.sighands, &mut ids.sighand_id, "signal handlers"),
        ] {
            next += 1;
            let (found, is_new) = known.find(what, at, || next).map_err(explain)?;
            *id = found;
            if !is_new {
                shared.push(name);
            }
        }
        self.last_object = next;
        for name in shared {
            let why = format!("shares its {name} with another process, which is not carried");
            self.failures.push(Failure::unsupported(Object::Task, why).of(pid));
        }
        for thread in &process.threads[1..] {
            for (what, name) in [(Kcmp::Files, "descriptors"), (Kcmp::Fs, "working directory")] {
                let order = sys::process::kcmp(what, at, (thread.tid, 0)).map_err(explain)?;
                if order.is_ne() {
                    let why = format!("has {name} of its own, apart from its process, which is not carried");
                    self.failures.push(Failure::unsupported(Object::Thread(thread.tid), why).of(pid));
                }
            }
        }
        Ok(ids)
    }

    fn fs(&mut self, pid: i32, status: &Status) -> Result<FsEntry, Failure> {
        Ok(FsEntry {
            cwd_id: self.link_record(pid, "cwd")?,
            root_id: self.link_record(pid, "root")?,
            umask: status.umask,
        })
    }

    /// A record for what a link of `/proc/PID` points to; zero, with an objection noted, where that is
    /// not carried.
    fn link_record(&mut self, pid: i32, name: &str) -> Result<u32, Failure> {
        let link = std::path::PathBuf::from(format!("/proc/{pid}/{name}"));
        let explain = |error: Errno| error.on(Object::Named(name.into()), "read its link").of(pid);
        let path =
            std::fs::read_link(&link).map_err(|error| explain(sys::memory::io_errno("readlink", &error)))?;
        let stat = sys::fd::stat_path(&link, true).map_err(explain)?;
        let bytes = path.as_os_str().as_bytes();
        let object = || Object::Named(format!("{name} {}", path.display()));
        kinds::fd::regular::record(bytes, libc::O_RDONLY as u32, &stat, object, &mut self.cx).or_else(
            |failure| {
                self.failures.push(failure.of(pid));
                Ok(0)
            },
        )
    }

    fn pages(&mut self, pid: i32, mm: &MmEntry) -> Result<pages::select::Selection, Failure> {
        let areas: Vec<Area> = mm
            .vmas
            .iter()
            .filter(|entry| vma::content(entry) != vma::Content::None)
            .map(|entry| Area {
                range: entry.start..entry.end,
                is_readable: entry.prot & libc::PROT_READ as u32 != 0,
                is_whole: vma::content(entry) == vma::Content::Whole,
                has_file: vma::file_id(entry).is_some(),
            })
            .collect();
        let path = format!("/proc/{pid}/pagemap");
        let explain = |error: Errno| error.on(Object::Path(path.clone()), "find its pages").of(pid);
        let pagemap = File::open(&path).map_err(|error| explain(sys::memory::io_errno("open", &error)))?;
        pages::select::select(&pagemap, &areas).map_err(explain)
    }

    fn descriptors(&mut self, pid: i32) -> Result<(Vec<FdinfoEntry>, u32, bool), Failure> {
        let explain = |error: Errno| error.on(Object::Task, "read its descriptors").of(pid);
        let next = self.last_object + 1;
        let (files_id, is_new) = self.tables.find(Kcmp::Files, (pid, 0), || next).map_err(explain)?;
        if !is_new {
            return Ok((Vec::new(), files_id, true));
        }
        self.last_object = next;
        let pidfd = sys::process::pidfd_open(pid).map_err(explain)?;
        let mut entries = Vec::new();
        for number in sys::fd::numbers(&format!("/proc/{pid}/fd")).map_err(explain)? {
            match self.descriptor(pid, number, &pidfd) {
                Ok(entry) => entries.push(entry),
                Err(failure) => self.failures.push(failure.of(pid)),
            }
        }
        Ok((entries, files_id, false))
    }

    fn descriptor(
        &mut self,
        pid: i32,
        number: i32,
        pidfd: &std::os::fd::OwnedFd,
    ) -> Result<FdinfoEntry, Failure> {
        let object = || Object::Fd { number, what: "a descriptor".into() };
        let explain = |error: Errno| error.on(object(), "look at it");
        let fd = sys::process::pidfd_getfd(pidfd, number).map_err(explain)?;
        let probe = FdProbe::new(pid, number, fd).map_err(explain)?;
        let (dev, ino) = probe.inode();
        let cx = &mut self.cx;
        let key = (dev, ino, probe.flags, probe.position);
        let kind = kinds::fd::kind_of(&probe);
        let kind = kind.ok_or_else(|| probe.refuse("a descriptor of this kind is not carried yet"))?;
        let ((id, file_type), is_new) = self
            .files
            .find(key, (pid, number), || (cx.next_id(), kind.file_type()))
            .map_err(|error| probe.fail(error, "compare it"))?;
        if is_new {
            let entry = kind.dump(&probe, id, cx)?;
            cx.files.push(entry);
        }
        if sys::proc::fdinfo(probe.info(), "lock").is_some() {
            let why = "holds a file lock";
            return Err(Failure::policy(probe.object(), why, &model::options::FILE_LOCKS));
        }
        // The duplicate has flags of its own; fdinfo tells those of the original.
        let flags = probe.close_on_exec()?;
        Ok(FdinfoEntry {
            id,
            flags: flags.into(),
            r#type: file_type,
            fd: number as u32,
            xattr_security_selinux: None,
        })
    }

    /// Has every thread answer what only it can.
    fn ask(
        &mut self,
        process: &mut Process,
        stat: &sys::proc::Stat,
        statuses: &[Status],
        maps: &[Vma],
    ) -> Result<Answered, Failure> {
        let pid = process.pid;
        let instruction = find_instruction(pid, maps)?;
        let leader = &mut process.threads[0];
        let stopped = leader.stopped.take().expect("a frozen thread is stopped");
        let (host, stopped) = Host::enter(pid, stopped, &leader.context, instruction)?;
        leader.stopped = Some(stopped);
        let result = self.ask_all(process, stat, statuses, &host);
        let leader = &mut process.threads[0];
        let stopped = leader.stopped.take().expect("every list was collected");
        leader.stopped = Some(host.leave(stopped, &leader.context)?);
        result
    }

    fn ask_all(
        &mut self,
        process: &mut Process,
        stat: &sys::proc::Stat,
        statuses: &[Status],
        host: &Host,
    ) -> Result<Answered, Failure> {
        let pid = process.pid;
        let timers = read(format!("/proc/{pid}/timers"))?;
        let timers = sys::proc::parse_timers(&timers).ok_or_else(|| {
            Failure::conflict(Object::Task, "read its timers", "the text is not understood")
        })?;
        let mut timers = Some(timers);
        let mut cores = Vec::with_capacity(process.threads.len());
        let mut attributes = None;
        let mut first = Ok(());
        for (batch, threads) in process.threads.chunks_mut(BATCH).enumerate() {
            host.next_batch();
            // What each is asked.
            let mut lists = Vec::with_capacity(threads.len());
            for _ in threads.iter() {
                let mut list = List::new();
                let mut ask = Ask { list: &mut list, area: host.area() };
                let creds = creds::ask(&mut ask);
                let own = attributes::ask_thread(&mut ask)?;
                let whole = match timers.take() {
                    Some(timers) => Some((
                        attributes::ask_process(&mut ask)?,
                        signals::ask(&mut ask)?,
                        limits::ask(&mut ask)?,
                        timers::ask(timers, &mut ask)?,
                    )),
                    None => None,
                };
                lists.push((list, creds, own, whole));
            }
            // All at once; and every one that was sent off is collected, whatever happens.
            let mut runs = Vec::with_capacity(threads.len());
            for (thread, asked) in threads.iter_mut().zip(&lists) {
                let stopped = thread.stopped.take().expect("a frozen thread is stopped");
                match host.start(stopped, &thread.context, &asked.0) {
                    Ok(run) => runs.push(Some(run)),
                    Err(failure) => {
                        first = first.and(Err(failure));
                        runs.push(None);
                    }
                }
            }
            // All are told to stop before the first is waited for.
            let mut stopping = Vec::with_capacity(threads.len());
            for run in runs {
                stopping.push(match run {
                    Some((running, run)) => {
                        let result = host.collect(&running, run);
                        Some((running, result))
                    }
                    None => None,
                });
            }
            let mut answers = Vec::with_capacity(threads.len());
            for (thread, stopping) in threads.iter_mut().zip(stopping) {
                let Some((running, result)) = stopping else { continue };
                match host.retrieve(running, &thread.context) {
                    Ok(stopped) => thread.stopped = Some(stopped),
                    Err(failure) => first = first.and(Err(failure)),
                }
                match result {
                    Ok(Ok(ops)) => answers.push(ops),
                    Ok(Err(failed)) => {
                        let object = Object::Thread(thread.tid);
                        first = first.and(Err(failed.errno().on(object, failed.doing)));
                    }
                    Err(failure) => first = first.and(Err(failure)),
                }
            }
            first?;
            first = Ok(());
            for (at, ((thread, asked), ops)) in threads.iter().zip(lists).zip(&answers).enumerate() {
                let status = &statuses[batch * BATCH + at];
                let answers = Answers { ops, area: host.area() };
                let (_, creds, own, whole) = asked;
                let own = own.answer(answers);
                let mut core = self.thread(pid, thread, status, &own)?;
                if let Some(thread_core) = &mut core.thread_core {
                    thread_core.creds = Some(creds.answer(status, answers));
                }
                if let Some((process, actions, limits, timers)) = whole {
                    let process = process.answer(answers);
                    core.tc = Some(TaskCoreEntry {
                        personality: process.personality,
                        flags: stat.flags,
                        blk_sigset: thread.context.mask,
                        comm: status.comm.clone(),
                        timers: Some(timers.answer(answers)),
                        rlimits: Some(limits.answer(answers)),
                        sigactions: actions.answer(answers),
                        exit_signal: (stat.exit_signal != libc::SIGCHLD).then_some(stat.exit_signal as u32),
                        child_subreaper: Some(process.is_subreaper),
                        membarrier_registration_mask: (process.membarrier != 0).then_some(process.membarrier),
                        ..TaskCoreEntry::default()
                    });
                    attributes = Some(process);
                }
                cores.push((thread.tid, core));
            }
        }
        let attributes = attributes.expect("the leader is in the first batch");
        Ok(Answered { cores, attributes })
    }

    /// The record of one thread.
    fn thread(
        &mut self,
        pid: i32,
        thread: &crate::freeze::Thread,
        status: &Status,
        own: &attributes::ThreadAttributes,
    ) -> Result<CoreEntry, Failure> {
        let tid = thread.tid;
        let stopped = thread.stopped.as_ref().expect("every list was collected");
        let explain = |error: Errno| error.on(Object::Thread(tid), "read its state").of(pid);
        let mut registers = agent::arch::restart_interrupted_call(&thread.context.registers);
        let registered = stopped.rseq().map_err(explain)?;
        let read = |address: u64, bytes: &mut [u8]| {
            sys::memory::read_remote(pid, address, bytes).is_ok_and(|count| count == bytes.len())
        };
        if let Some(abort) = rseq::abort_address(registered, registers.ip, read) {
            registers.ip = abort;
        }
        let (futex_rla, futex_rla_len) = sys::process::robust_list(tid).map_err(explain)?;
        let pending = stopped.pending(false).map_err(explain)?;
        self.check_pending(pid, tid, &pending);
        let mode = seccomp::mode(status.seccomp)?;
        let seccomp_filter = match mode {
            SeccompMode::Filter => self.filters(stopped).map_err(explain)?,
            _ => None,
        };
        let mut core = ThreadCoreEntry {
            futex_rla,
            futex_rla_len: futex_rla_len as u32,
            blk_sigset: Some(thread.context.mask),
            sas: Some(own.stack.clone()),
            pdeath_sig: (own.death_signal != 0).then_some(own.death_signal),
            signals_p: Some(signals::queue(pending)),
            seccomp_mode: Some(mode.into()),
            seccomp_filter,
            comm: Some(status.comm.clone()),
            rseq_entry: rseq::record(registered),
            ..ThreadCoreEntry::default()
        };
        let scheduling = sys::process::sched(tid).map_err(explain)?;
        if scheduling.policy & 0xff == sched::SCHED_DEADLINE {
            let why = "is scheduled by deadlines, which is not carried yet";
            self.failures.push(Failure::unsupported(Object::Thread(tid), why).of(pid));
        }
        sched::record(scheduling, &mut core);
        Ok(CoreEntry {
            mtype: agent::arch::record::MARCH.into(),
            thread_info: Some(agent::arch::record::thread_info(
                &registers,
                &thread.context.xstate,
                own.clear_tid,
            )),
            thread_core: Some(core),
            ..CoreEntry::default()
        })
    }

    fn filters(&mut self, thread: &sys::ptrace::Stopped) -> Result<Option<u32>, Errno> {
        let mut programs = Vec::new();
        while let Some(program) = sys::ptrace::seccomp_filter(thread, programs.len() as u64)? {
            programs.push(program);
        }
        Ok(self.chains.add(programs))
    }

    fn check_pending(&mut self, pid: i32, tid: i32, pending: &[[u8; 128]]) {
        if pending
            .iter()
            .any(|info| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]) == libc::SIGTRAP)
        {
            let why = "has a SIGTRAP pending, which cannot be told from our own";
            self.failures.push(Failure::unsupported(Object::Thread(tid), why).of(pid));
        }
    }

    fn finish_leader(
        &mut self,
        process: &Process,
        attributes: &attributes::ProcessAttributes,
        core: &mut CoreEntry,
        pid: i32,
    ) -> Result<(), Failure> {
        let stopped = process.threads[0].stopped.as_ref().expect("a frozen thread is stopped");
        let explain = |error: Errno| error.on(Object::Task, "read its state").of(pid);
        let shared = stopped.pending(true).map_err(explain)?;
        self.check_pending(pid, pid, &shared);
        let score = read(format!("/proc/{pid}/oom_score_adj"))?;
        let Some(tc) = &mut core.tc else { return Ok(()) };
        tc.signals_s = Some(signals::queue(shared));
        tc.oom_score_adj = sys::proc::decimal(score.trim_ascii());
        tc.cg_set = Some(1);
        (tc.task_state, tc.stop_signo) = match process.state {
            State::Stopped(signal) => (3, Some(signal as u32)),
            _ => (1, None),
        };
        debug_assert_eq!(tc.personality, attributes.personality);
        Ok(())
    }
}

struct Answered {
    cores: Vec<(i32, CoreEntry)>,
    attributes: attributes::ProcessAttributes,
}

fn read_smaps(pid: i32) -> Result<Vec<Vma>, Failure> {
    let path = format!("/proc/{pid}/smaps");
    let explain = |error: std::io::Error| {
        sys::memory::io_errno("read", &error).on(Object::Path(path.clone()), "read its mappings")
    };
    let mut file = File::open(&path).map_err(explain)?;
    let mut parser = SmapsParser::default();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(explain)? {
            0 => break,
            count => parser.feed(&buffer[..count]),
        }
    }
    parser
        .finish()
        .ok_or_else(|| Failure::conflict(Object::Path(path.clone()), "read it", "the text is not understood"))
}

/// Where the process has a `syscall` instruction.
fn find_instruction(pid: i32, maps: &[Vma]) -> Result<u64, Failure> {
    // The vdso has one; without it any code that the process may execute will do.
    let is_vdso = |map: &&Vma| map.name == b"[vdso]";
    let is_code = |map: &&Vma| map.prot & libc::PROT_EXEC as u32 != 0 && map.name != b"[vsyscall]";
    for map in maps.iter().filter(is_vdso).chain(maps.iter().filter(is_code)) {
        let mut code = vec![0; (map.end - map.start).min(1 << 22) as usize];
        let count = sys::memory::read_remote(pid, map.start, &mut code).unwrap_or(0);
        if let Some(at) = agent::remote::find_instruction(&code[..count], map.start) {
            return Ok(at);
        }
    }
    Err(Failure::unsupported(Object::Task, "has no system call instruction in its memory"))
}
