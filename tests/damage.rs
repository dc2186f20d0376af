//! What can be wrong with a set of images: each case takes a good one and damages it in one place.

use std::fs;
use std::path::{Path, PathBuf};

use image::{
    CoreEntry, FdTypes, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, Kind, Message, MmEntry,
    PagemapEntry, PagemapHead, PstreeEntry, Reader, SeccompEntry, SeccompFilter, SiginfoEntry,
    SignalQueueEntry, TaskKobjIdsEntry, VmaEntry, Writer, kind,
};
use kinds::fd::pipe::{PipeDataEntry, PipeEntry};
use kinds::fd::regular::RegFileEntry;

/// A folder of images of one process (two threads beside its leader) and its child.
#[derive(Debug)]
pub struct Set {
    pub path: PathBuf,
    pub root: u32,
    pub child: u32,
    pub thread: u32,
    /// Of the table of descriptors.
    pub files_id: u32,
}

/// What the restore has to make of a damaged set.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// The dry run refuses it already, with these words.
    Refused(&'static [&'static str]),
    /// The restore fails with these words; that it will, a plan need not know.
    Fails(&'static [&'static str]),
    /// It may be harmless.
    Either,
}

use Expect::{Either, Fails, Refused};

/// Name, expectation, damage.
pub type Case = (&'static str, Expect, fn(&Set));

impl Set {
    pub fn at(path: PathBuf) -> Set {
        let set = Set { path, root: 0, child: 0, thread: 0, files_id: 0 };
        let tree: Vec<PstreeEntry> = set.all(kind::PSTREE, "pstree.img");
        let ids: Vec<TaskKobjIdsEntry> = set.all(kind::IDS, &format!("ids-{}.img", tree[0].pid));
        let [root, child] = [tree[0].pid, tree[1].pid];
        Set { root, child, thread: tree[0].threads[1], files_id: ids[0].files_id, ..set }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.file(name)).unwrap_or_else(|error| panic!("read {name}: {error}"))
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.file(name), bytes).unwrap_or_else(|error| panic!("write {name}: {error}"));
    }

    fn all<M: Message + Default>(&self, kind: Kind, name: &str) -> Vec<M> {
        let bytes = self.bytes(name);
        Reader::open(kind, name, &bytes).and_then(|mut reader| reader.all()).expect("a good image")
    }

    fn write<M: Message>(&self, kind: Kind, name: &str, records: &[M]) {
        let mut writer = Writer::new(kind);
        for record in records {
            writer.record(record);
        }
        self.put(name, writer.bytes());
    }

    fn edit<M: Message + Default>(&self, kind: Kind, name: &str, change: impl FnOnce(&mut Vec<M>)) {
        let mut records = self.all(kind, name);
        change(&mut records);
        self.write(kind, name, &records);
    }

    fn tree(&self, change: impl FnOnce(&mut Vec<PstreeEntry>)) {
        self.edit(kind::PSTREE, "pstree.img", change);
    }

    fn inventory(&self, change: impl FnOnce(&mut InventoryEntry)) {
        self.edit(kind::INVENTORY, "inventory.img", |all| change(&mut all[0]));
    }

    fn core(&self, tid: u32, change: impl FnOnce(&mut CoreEntry)) {
        self.edit(kind::CORE, &format!("core-{tid}.img"), |all| change(&mut all[0]));
    }

    fn mm(&self, change: impl FnOnce(&mut MmEntry)) {
        self.edit(kind::MM, &format!("mm-{}.img", self.root), |all| change(&mut all[0]));
    }

    fn vmas(&self, change: impl FnOnce(&mut Vec<VmaEntry>)) {
        self.mm(|mm| change(&mut mm.vmas));
    }

    fn fs(&self, change: impl FnOnce(&mut FsEntry)) {
        self.edit(kind::FS, &format!("fs-{}.img", self.root), |all| change(&mut all[0]));
    }

    fn fds(&self, change: impl FnOnce(&mut Vec<FdinfoEntry>)) {
        self.edit(kind::FDINFO, &format!("fdinfo-{}.img", self.files_id), change);
    }

    fn files(&self, change: impl FnOnce(&mut Vec<FileEntry>)) {
        self.edit(kind::FILES, "files.img", change);
    }

    /// Changes the first record of one type in `files.img` that `is` names.
    fn body<M: Message + Default>(
        &self,
        kind: FdTypes,
        is: impl Fn(&M) -> bool,
        change: impl FnOnce(&mut M),
    ) {
        self.files(|files| {
            let mut found = files.iter_mut().filter(|file| file.kind == i32::from(kind)).filter_map(|file| {
                let (_, body) = file.body.as_mut()?;
                let record = M::decode(&**body).expect("a good record");
                is(&record).then_some((record, body))
            });
            let (mut record, body) = found.next().expect("a record of that type");
            change(&mut record);
            *body = record.encode_to_vec();
        });
    }

    /// The regular file that the tree writes to.
    fn regular(&self, change: impl FnOnce(&mut RegFileEntry)) {
        self.body(FdTypes::Reg, |file: &RegFileEntry| file.name.ends_with(b"/file"), change);
    }

    fn pagemap(&self, change: impl FnOnce(&mut u32, &mut Vec<PagemapEntry>)) {
        let name = format!("pagemap-{}.img", self.root);
        let bytes = self.bytes(&name);
        let mut reader = Reader::open(kind::PAGEMAP, &name, &bytes).expect("a good image");
        let mut head: PagemapHead = reader.one().expect("a head");
        let mut runs = reader.all().expect("runs");
        change(&mut head.pages_id, &mut runs);
        let mut writer = Writer::new(kind::PAGEMAP);
        writer.record(&head);
        for run in &runs {
            writer.record(run);
        }
        self.put(&name, writer.bytes());
    }

    fn pipe_data(&self, change: impl FnOnce(&mut PipeDataEntry)) {
        let bytes = self.bytes("pipes-data.img");
        let mut reader = Reader::open(kind::PIPES_DATA, "pipes-data.img", &bytes).expect("a good image");
        let mut entry: PipeDataEntry = reader.one().expect("a record");
        let content = reader.rest().to_vec();
        change(&mut entry);
        let mut writer = Writer::new(kind::PIPES_DATA);
        writer.record(&entry).payload(&content);
        self.put("pipes-data.img", writer.bytes());
    }

    /// Makes the child one that has ended with this status.
    fn zombie(&self, status: u32) {
        self.core(self.child, |core| {
            core.thread_core = None;
            core.thread_info = None;
            let tc = core.tc.as_mut().expect("a process");
            tc.task_state = 2;
            tc.exit_code = status;
        });
    }

    /// Lets a signal wait for the process.
    fn pending(&self, siginfo: Vec<u8>) {
        self.core(self.root, |core| {
            let queue = SignalQueueEntry { signals: vec![SiginfoEntry { siginfo }] };
            core.tc.as_mut().expect("a process").signals_s = Some(queue);
        });
    }

    fn filter(&self, number: u32, filters: &[(Option<u32>, usize)]) {
        self.core(self.thread, |core| {
            let thread = core.thread_core.as_mut().expect("a thread");
            thread.seccomp_mode = Some(2);
            thread.seccomp_filter = Some(number);
        });
        let filter = |(prev, length): &(Option<u32>, usize)| SeccompFilter {
            filter: vec![0; *length],
            prev: *prev,
            flags: None,
        };
        let entry = SeccompEntry { seccomp_filters: filters.iter().map(filter).collect() };
        self.write(kind::SECCOMP, "seccomp.img", &[entry]);
    }

    /// Puts something else in the place of an image.
    fn replace(&self, name: &str, make: impl FnOnce(&Path)) {
        fs::remove_file(self.file(name)).expect("remove the image");
        make(&self.file(name));
    }
}

fn siginfo(signal: i32) -> Vec<u8> {
    let mut info = signal.to_ne_bytes().to_vec();
    info.resize(128, 0);
    info
}

fn anonymous(start: u64, end: u64) -> VmaEntry {
    VmaEntry { start, end, prot: 3, flags: 0x22, status: 1 | 1 << 9, fd: -1, ..VmaEntry::default() }
}

/// Every damage that has a name.
pub const CASES: &[Case] = &[
    // The inventory.
    ("inventory_of_no_version", Refused(&["inventory.img#0", "version 0"]), |set| {
        set.inventory(|inventory| inventory.img_version = 0);
    }),
    ("inventory_of_a_later_version", Refused(&["inventory.img#0", "version 3"]), |set| {
        set.inventory(|inventory| inventory.img_version = 3);
    }),
    ("inventory_without_ids_of_tables", Refused(&["inventory.img#0"]), |set| {
        set.inventory(|inventory| inventory.fdinfo_per_id = None);
    }),
    ("namespaces_of_its_own", Refused(&["namespaces", "pid, mnt"]), |set| {
        set.inventory(|inventory| {
            let ids = inventory.root_ids.get_or_insert_default();
            (ids.pid_ns_id, ids.mnt_ns_id) = (Some(4242), Some(4243));
        });
    }),
    // The tree.
    ("process_that_is_its_own_parent", Refused(&["pstree.img#1", "parent"]), |set| {
        set.tree(|tree| tree[1].ppid = tree[1].pid);
    }),
    ("parents_in_a_loop", Refused(&["pstree.img#0", "parent"]), |set| {
        set.tree(|tree| tree[0].ppid = tree[1].pid);
    }),
    ("parent_that_is_nowhere", Refused(&["pstree.img#1", "4242"]), |set| {
        set.tree(|tree| tree[1].ppid = 4242);
    }),
    ("two_roots", Refused(&["pstree.img#1", "parent 0"]), |set| set.tree(|tree| tree[1].ppid = 0)),
    ("child_before_its_parent", Refused(&["pstree.img#"]), |set| set.tree(|tree| tree.reverse())),
    ("pid_twice", Refused(&["pstree.img#1", "taken"]), |set| {
        set.tree(|tree| tree[1].pid = tree[0].pid);
    }),
    ("process_twice", Refused(&["pstree.img#2", "taken"]), |set| {
        set.tree(|tree| tree.push(tree[1].clone()));
    }),
    ("thread_that_is_also_a_process", Refused(&["pstree.img#1", "taken"]), |set| {
        set.tree(|tree| tree[0].threads[1] = tree[1].pid);
    }),
    ("thread_twice", Refused(&["pstree.img#0", "taken"]), |set| {
        set.tree(|tree| tree[0].threads[1] = tree[0].threads[2]);
    }),
    ("leader_that_is_not_first", Refused(&["pstree.img#0", "thread"]), |set| {
        set.tree(|tree| tree[0].threads.reverse());
    }),
    ("process_without_threads", Refused(&["pstree.img#0", "thread"]), |set| {
        set.tree(|tree| tree[0].threads.clear());
    }),
    ("pid_of_zero", Refused(&["pstree.img#1"]), |set| set.tree(|tree| tree[1].pid = 0)),
    ("pid_beyond_all_pids", Refused(&["pstree.img#1"]), |set| set.tree(|tree| tree[1].pid = 1 << 22)),
    ("pid_that_is_negative", Refused(&["pstree.img#1"]), |set| set.tree(|tree| tree[1].pid = u32::MAX)),
    ("session_of_zero", Refused(&["pstree.img#1"]), |set| set.tree(|tree| tree[1].sid = 0)),
    ("session_of_a_thread", Refused(&["session", "thread"]), |set| {
        set.tree(|tree| tree[1].sid = set.thread);
    }),
    ("group_of_a_thread", Refused(&["group", "thread"]), |set| {
        set.tree(|tree| tree[1].pgid = set.thread);
    }),
    ("a_hundred_thousand_threads", Refused(&["core-"]), |set| {
        set.tree(|tree| tree[0].threads.extend(200_000..300_000));
    }),
    ("a_hundred_thousand_processes", Refused(&["core-200000.img"]), |set| {
        set.tree(|tree| {
            let child = tree[1].clone();
            tree.extend((200_000..300_000).map(|pid| PstreeEntry {
                pid,
                threads: vec![pid],
                ..child.clone()
            }));
        });
    }),
    // The state of processes and threads.
    ("core_of_another_architecture", Refused(&["core-", "architecture"]), |set| {
        set.core(set.root, |core| core.mtype = 3);
    }),
    ("thread_without_registers", Refused(&["core-", "registers"]), |set| {
        set.core(set.thread, |core| core.thread_info = None);
    }),
    ("process_without_state", Refused(&["core-"]), |set| set.core(set.root, |core| core.tc = None)),
    ("thread_without_state", Refused(&["core-"]), |set| {
        set.core(set.thread, |core| core.thread_core = None);
    }),
    ("root_that_has_ended", Refused(&["pstree.img#0", "ended"]), |set| {
        set.core(set.root, |core| {
            core.thread_core = None;
            core.tc.as_mut().expect("a process").task_state = 2;
        });
    }),
    ("state_of_no_process", Refused(&["core-", "state 99"]), |set| {
        set.core(set.root, |core| core.tc.as_mut().expect("a process").task_state = 99);
    }),
    ("ended_process_with_registers", Refused(&["core-", "state 2"]), |set| {
        set.core(set.child, |core| core.tc.as_mut().expect("a process").task_state = 2);
    }),
    ("ended_process", Either, |set| set.zombie(7 << 8)),
    ("process_ended_by_a_stop", Refused(&["core-", "exit"]), |set| set.zombie(19)),
    ("process_ended_by_a_harmless_signal", Refused(&["core-", "exit"]), |set| set.zombie(17)),
    ("process_ended_by_no_signal", Refused(&["core-", "exit"]), |set| set.zombie(0x7f)),
    ("stopped_by_what_does_not_stop", Refused(&["core-", "stop"]), |set| {
        set.core(set.root, |core| {
            let tc = core.tc.as_mut().expect("a process");
            (tc.task_state, tc.stop_signo) = (3, Some(9));
        });
    }),
    ("short_floating_point_state", Refused(&["core-", "length"]), |set| {
        set.core(set.root, |core| {
            core.thread_info.as_mut().expect("registers").fpregs.xmm_space.truncate(3);
        });
    }),
    ("short_extended_state", Refused(&["core-", "length"]), |set| {
        set.core(set.root, |core| {
            let registers = core.thread_info.as_mut().expect("registers");
            let xsave = registers.fpregs.xsave.as_mut().expect("an extended state");
            xsave.xstate_bv |= 1 << 2;
            xsave.ymmh_space.truncate(1);
        });
    }),
    ("registers_full_of_ones", Either, |set| {
        set.core(set.root, |core| {
            let registers = &mut core.thread_info.as_mut().expect("registers").gpregs;
            (registers.ip, registers.sp, registers.flags) = (u64::MAX, u64::MAX, u64::MAX);
            (registers.cs, registers.fs_base) = (0xffff, u64::MAX);
        });
    }),
    ("thread_with_a_segment_of_the_kernel", Fails(&["set its registers"]), |set| {
        set.core(set.thread, |core| {
            core.thread_info.as_mut().expect("registers").gpregs.cs = 0x10;
        });
    }),
    ("pending_signal_cut_short", Refused(&["core-", "signal"]), |set| set.pending(vec![10; 9])),
    ("pending_sigkill", Refused(&["core-", "signal 9"]), |set| set.pending(siginfo(9))),
    ("pending_sigstop", Refused(&["core-", "signal 19"]), |set| set.pending(siginfo(19))),
    ("pending_signal_of_no_number", Refused(&["core-", "signal -1"]), |set| set.pending(siginfo(-1))),
    ("timer_with_the_last_id", Refused(&["core-", "timer"]), |set| {
        set.core(set.root, |core| {
            let timers = core.tc.as_mut().expect("a process").timers.get_or_insert_default();
            timers.posix.push(image::PosixTimerEntry { it_id: u32::MAX, ..Default::default() });
        });
    }),
    ("timer_of_no_clock", Fails(&["timer"]), |set| {
        set.core(set.root, |core| {
            let timers = core.tc.as_mut().expect("a process").timers.get_or_insert_default();
            timers.posix.push(image::PosixTimerEntry { clock_id: 77, ..Default::default() });
        });
    }),
    ("groups_beyond_number", Fails(&["groups"]), |set| {
        set.core(set.root, |core| {
            let thread = core.thread_core.as_mut().expect("a thread");
            thread.creds.as_mut().expect("credentials").groups = (0..100_000).collect();
        });
    }),
    ("name_of_a_megabyte", Either, |set| {
        set.core(set.root, |core| core.tc.as_mut().expect("a process").comm = vec![b'x'; 1 << 20]);
    }),
    ("signal_stack_at_the_end_of_memory", Either, |set| {
        set.core(set.root, |core| {
            let thread = core.thread_core.as_mut().expect("a thread");
            thread.sas = Some(image::ThreadSasEntry { ss_sp: u64::MAX, ss_size: u64::MAX, ss_flags: 0 });
        });
    }),
    ("rseq_area_in_the_kernel", Fails(&["rseq"]), |set| {
        set.core(set.thread, |core| {
            let area = image::RseqEntry {
                rseq_abi_pointer: 0xffff_8000_0000_0000,
                rseq_abi_size: 32,
                signature: 1,
                rseq_cs_pointer: None,
            };
            core.thread_core.as_mut().expect("a thread").rseq_entry = Some(area);
        });
    }),
    ("rseq_area_in_memory_that_cannot_be_written", Fails(&["process"]), |set| {
        let mut area = 0;
        set.core(set.thread, |core| {
            let thread = core.thread_core.as_ref().expect("a thread");
            area = thread.rseq_entry.as_ref().expect("an rseq area").rseq_abi_pointer;
        });
        set.vmas(|vmas| {
            vmas.iter_mut().find(|vma| (vma.start..vma.end).contains(&area)).expect("its memory").prot = 1;
        });
    }),
    ("filter_that_is_not_there", Refused(&["seccomp.img", "5"]), |set| set.filter(5, &[])),
    ("filters_in_a_loop", Refused(&["seccomp.img", "end"]), |set| {
        set.filter(0, &[(Some(1), 8), (Some(0), 8)]);
    }),
    ("filter_of_half_an_instruction", Refused(&["seccomp.img"]), |set| set.filter(0, &[(None, 4)])),
    ("filter_mode_without_a_filter", Refused(&["seccomp", "filter"]), |set| {
        set.core(set.thread, |core| core.thread_core.as_mut().expect("a thread").seccomp_mode = Some(2));
    }),
    // Memory.
    ("mapping_that_is_reversed", Refused(&["mm-", "#0"]), |set| {
        set.vmas(|vmas| (vmas[0].start, vmas[0].end) = (vmas[0].end, vmas[0].start));
    }),
    ("mapping_that_is_empty", Refused(&["mm-", "#0"]), |set| set.vmas(|vmas| vmas[0].end = vmas[0].start)),
    ("mapping_that_is_not_aligned", Refused(&["mm-", "#1"]), |set| set.vmas(|vmas| vmas[1].start += 1)),
    ("mapping_that_overlaps", Refused(&["mm-", "overlap"]), |set| {
        set.vmas(|vmas| vmas[1].start = vmas[0].start);
    }),
    ("mappings_out_of_order", Refused(&["mm-", "overlap"]), |set| set.vmas(|vmas| vmas.swap(0, 1))),
    ("mapping_of_the_kernel", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| vmas.push(anonymous(0xffff_8000_0000_0000, 0xffff_8000_0001_0000)));
    }),
    ("mapping_at_the_end_of_all", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| vmas.push(anonymous(0xffff_ffff_ffff_e000, 0xffff_ffff_ffff_f000)));
    }),
    ("mapping_of_everything", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| *vmas = vec![anonymous(0, 0xffff_ffff_ffff_f000)]);
    }),
    ("mapping_that_leaves_no_room", Refused(&["pagemap-"]), |set| {
        set.vmas(|vmas| *vmas = vec![anonymous(0x1000, 0x7fff_ffff_f000)]);
        set.pagemap(|_, runs| runs.insert(0, PagemapEntry { vaddr: 0, ..runs[0].clone() }));
    }),
    ("mapping_where_the_agent_would_be", Either, |set| {
        set.vmas(|vmas| {
            let at = vmas.partition_point(|vma| vma.start < 0x1_0000_0000);
            vmas.insert(at, anonymous(0x1_0000_0000, 0x1_0000_2000));
        });
    }),
    ("mapping_without_room_beside_it", Refused(&["room"]), |set| {
        set.vmas(|vmas| {
            vmas.retain(|vma| vma.start < 0x1_0000_0000);
            vmas.push(anonymous(0x1_0000_0000, 0x7fff_ffff_f000));
        });
    }),
    ("mapping_of_a_file_that_is_not_there", Refused(&["files.img", "4242"]), |set| {
        set.vmas(|vmas| vmas.iter_mut().find(|vma| vma.status & 0x40 != 0).expect("a file").shmid = 4242);
    }),
    ("mapping_of_a_file_with_a_long_id", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| vmas.iter_mut().find(|vma| vma.status & 0x40 != 0).expect("a file").shmid |= 1 << 40);
    }),
    ("mapping_inside_a_page_of_its_file", Refused(&["mm-", "offset"]), |set| {
        set.vmas(|vmas| vmas.iter_mut().find(|vma| vma.status & 0x40 != 0).expect("a file").pgoff = 17);
    }),
    ("private_mapping_that_is_shared", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| vmas.iter_mut().find(|vma| vma.status & 0x40 != 0).expect("a file").flags = 1);
    }),
    ("mapping_of_an_unknown_kind", Refused(&["mapping", "not carried"]), |set| {
        set.vmas(|vmas| vmas[0].status |= 1 << 30);
    }),
    ("mapping_of_an_odd_protection", Refused(&["mm-", "protection"]), |set| {
        set.vmas(|vmas| vmas[0].prot = 0xffff_ffff);
    }),
    ("vdso_of_a_terabyte", Refused(&["mm-"]), |set| {
        set.vmas(|vmas| {
            let at = vmas.partition_point(|vma| vma.start < 0x100_0000_0000);
            let mut vdso = anonymous(0x100_0000_0000, 0x200_0000_0000);
            vdso.status |= 1 << 3;
            vmas.insert(at, vdso);
        });
    }),
    ("guard_in_no_mapping", Either, |set| {
        set.vmas(|vmas| vmas.push(VmaEntry { status: 1 << 16, ..anonymous(0x1000, 0x2000) }));
    }),
    ("half_a_million_mappings", Either, |set| {
        set.vmas(|vmas| {
            let at = vmas.partition_point(|vma| vma.start < 0x100_0000_0000);
            let more = (0..500_000u64).map(|nth| {
                let start = 0x100_0000_0000 + nth * 0x2000;
                anonymous(start, start + 0x1000)
            });
            vmas.splice(at..at, more);
        });
    }),
    ("executable_that_is_not_there", Refused(&["files.img", "executable"]), |set| {
        set.mm(|mm| mm.exe_file_id = 4242);
    }),
    ("executable_of_another_build", Fails(&["build id 07000000 ", "--file-validation filesize"]), |set| {
        let is_program = |file: &RegFileEntry| file.name.ends_with(b"/workload");
        set.body(FdTypes::Reg, is_program, |file| file.build_id = vec![7]);
    }),
    ("auxiliary_vector_without_end", Either, |set| set.mm(|mm| mm.mm_saved_auxv = vec![1; 1 << 16])),
    ("break_in_the_kernel", Fails(&["address space"]), |set| set.mm(|mm| mm.mm_brk = u64::MAX)),
    // Pages.
    ("pages_beyond_the_file", Refused(&["pagemap-", "pages-"]), |set| {
        set.pagemap(|_, runs| runs.last_mut().expect("a run").nr_pages = Some(1 << 20));
    }),
    ("pages_without_number", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs[0].nr_pages = Some(u64::MAX));
    }),
    ("pages_that_overlap", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs.insert(0, runs[0].clone()));
    }),
    ("pages_out_of_order", Refused(&["pagemap-"]), |set| set.pagemap(|_, runs| runs.reverse())),
    ("pages_that_are_not_aligned", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs[0].vaddr += 16);
    }),
    ("pages_of_the_kernel", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs.last_mut().expect("a run").vaddr = 0xffff_8000_0000_0000);
    }),
    ("pages_at_the_end_of_all", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs.last_mut().expect("a run").vaddr = 0xffff_ffff_ffff_f000);
    }),
    ("pages_where_nothing_is_mapped", Refused(&["pagemap-", "no mapping"]), |set| {
        set.pagemap(|_, runs| {
            let first = PagemapEntry { vaddr: 0x1000, nr_pages: Some(1), ..runs[0].clone() };
            runs[0].nr_pages = runs[0].nr_pages.map(|count| count - 1);
            runs.insert(0, first);
        });
    }),
    ("pages_of_a_parent_that_is_not_there", Refused(&["pagemap-"]), |set| {
        set.pagemap(|_, runs| runs[0].flags = Some(1));
    }),
    ("pages_that_stayed_with_a_dump", Refused(&["still with the dump", "--lazy-pages"]), |set| {
        set.pagemap(|_, runs| runs.iter_mut().for_each(|run| run.flags = Some(2)));
    }),
    ("pages_that_are_nowhere", Refused(&["pagemap-", "not in the images"]), |set| {
        set.pagemap(|_, runs| runs.last_mut().expect("a run").flags = Some(0));
    }),
    ("pages_with_flags_of_a_newer_version", Refused(&["pagemap-", "the flags 0x8", "crit"]), |set| {
        set.pagemap(|_, runs| runs[0].flags = Some(4 | 8));
    }),
    ("pages_in_blocks_of_a_newer_version", Refused(&["pagemap-", "not known here", "crit"]), |set| {
        // A field more, behind those of the last record: message 6 with two numbers.
        let name = format!("pagemap-{}.img", set.root);
        let (more, mut bytes) = ([6 << 3 | 2, 4, 8, 1, 16, 100], set.bytes(&name));
        let mut at = 8;
        let length = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
        };
        while at + 4 + length(&bytes, at) < bytes.len() {
            at += 4 + length(&bytes, at);
        }
        let longer = (length(&bytes, at) + more.len()) as u32;
        bytes[at..at + 4].copy_from_slice(&longer.to_le_bytes());
        bytes.extend(more);
        set.put(&name, &bytes);
    }),
    ("pages_of_another_file", Refused(&["pages-77.img"]), |set| set.pagemap(|id, _| *id = 77)),
    ("a_million_empty_runs", Either, |set| {
        set.pagemap(|_, runs| {
            let empty = PagemapEntry { vaddr: 0, nr_pages: Some(0), ..runs[0].clone() };
            runs.splice(0..0, std::iter::repeat_n(empty, 1 << 20));
        });
    }),
    // Descriptors and files.
    ("descriptor_of_no_file", Refused(&["files.img", "4242"]), |set| set.fds(|fds| fds[0].id = 4242)),
    ("descriptor_of_another_type", Refused(&["files.img"]), |set| {
        set.fds(|fds| fds[0].r#type = FdTypes::Timerfd.into());
    }),
    ("descriptor_that_is_negative", Refused(&["fdinfo-"]), |set| set.fds(|fds| fds[0].fd = u32::MAX)),
    ("descriptor_beyond_all_numbers", Refused(&["fdinfo-"]), |set| set.fds(|fds| fds[0].fd = 1 << 31)),
    ("descriptor_of_a_large_number", Either, |set| set.fds(|fds| fds[0].fd = (1 << 20) - 1)),
    ("descriptor_twice", Refused(&["fdinfo-"]), |set| set.fds(|fds| fds[1].fd = fds[0].fd)),
    ("table_that_is_not_there", Either, |set| {
        set.edit(kind::IDS, &format!("ids-{}.img", set.child), |ids: &mut Vec<TaskKobjIdsEntry>| {
            ids[0].files_id = 4242;
        });
    }),
    ("file_twice", Refused(&["files.img#", "taken"]), |set| set.files(|files| files.push(files[0].clone()))),
    ("file_of_an_unknown_type", Refused(&["files.img#0", "99"]), |set| set.files(|files| files[0].kind = 99)),
    ("file_without_a_body", Refused(&["files.img#0"]), |set| set.files(|files| files[0].body = None)),
    ("file_with_the_body_of_another", Refused(&["files.img#0"]), |set| {
        set.files(|files| files[0].body.as_mut().expect("a body").0 += 1);
    }),
    ("file_with_a_body_of_nonsense", Refused(&["files.img"]), |set| {
        set.files(|files| files[0].body.as_mut().expect("a body").1 = vec![0xff; 9]);
    }),
    ("path_with_a_zero_byte", Refused(&["files.img", "zero"]), |set| set.regular(|file| file.name[3] = 0)),
    ("path_that_is_empty", Either, |set| set.regular(|file| file.name.clear())),
    ("path_that_is_relative", Either, |set| set.regular(|file| file.name = b"../../..".to_vec())),
    ("path_of_a_megabyte", Fails(&["open"]), |set| {
        set.regular(|file| file.name = [b"/", &vec![b'x'; 1 << 20][..]].concat());
    }),
    ("path_of_a_fifo", Fails(&["fifo"]), |set| {
        let fifo = set.path.with_extension("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("make a fifo");
        set.regular(|file| {
            file.name = fifo.into_os_string().into_encoded_bytes();
            (file.flags, file.size, file.mode) = (0, None, None);
        });
    }),
    ("flags_that_do_not_exist", Either, |set| set.regular(|file| file.flags = u32::MAX)),
    ("position_beyond_all_files", Either, |set| set.regular(|file| file.pos = u64::MAX - 1)),
    ("file_of_another_size", Fails(&["bytes"]), |set| set.regular(|file| file.size = Some(1 << 60))),
    ("pipe_with_one_end_for_both", Refused(&["files.img", "pipe"]), |set| {
        set.body(FdTypes::Pipe, |_: &PipeEntry| true, |pipe| pipe.flags = 3);
    }),
    ("owner_of_signals_that_is_not_there", Either, |set| {
        set.regular(|file| (file.fown.pid, file.fown.signum, file.fown.pid_type) = (4242, 99, 77));
    }),
    ("pipe_with_more_bytes_than_there_are", Fails(&["pipes-data.img"]), |set| {
        set.pipe_data(|data| data.bytes = u32::MAX);
    }),
    ("pipe_of_a_huge_size", Fails(&["pipe"]), |set| set.pipe_data(|data| data.size = Some(u32::MAX))),
    ("working_directory_that_is_not_there", Refused(&["files.img", "working directory"]), |set| {
        set.fs(|fs| fs.cwd_id = 4242);
    }),
    ("root_that_is_not_there", Refused(&["files.img", "root"]), |set| set.fs(|fs| fs.root_id = 4242)),
    ("working_directory_that_is_a_file", Fails(&["directory"]), |set| {
        let exe: Vec<MmEntry> = set.all(kind::MM, &format!("mm-{}.img", set.root));
        set.fs(|fs| fs.cwd_id = exe[0].exe_file_id);
    }),
    // Images that are no files.
    ("image_that_is_a_fifo", Refused(&["pstree.img"]), |set| {
        set.replace("pstree.img", |path| {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("make a fifo");
        });
    }),
    ("image_that_is_a_device", Refused(&["files.img"]), |set| {
        set.replace("files.img", |path| std::os::unix::fs::symlink("/dev/zero", path).expect("a link"));
    }),
    ("image_that_is_a_folder", Refused(&["files.img"]), |set| {
        set.replace("files.img", |path| fs::create_dir(path).expect("make a folder"));
    }),
    ("image_that_is_a_loop", Refused(&["files.img"]), |set| {
        set.replace("files.img", |path| std::os::unix::fs::symlink("files.img", path).expect("a link"));
    }),
    ("image_of_a_terabyte", Refused(&["pstree.img"]), |set| {
        let file = fs::OpenOptions::new().write(true).open(set.file("pstree.img")).expect("open");
        file.set_len(1 << 40).expect("a file with a hole");
    }),
    ("pages_file_that_is_a_device", Refused(&["pages-"]), |set| {
        let mut id = 0;
        set.pagemap(|pages_id, _| id = *pages_id);
        set.replace(&format!("pages-{id}.img"), |path| {
            std::os::unix::fs::symlink("/dev/zero", path).expect("a link");
        });
    }),
];
