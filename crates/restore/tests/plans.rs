//! Checkpoints made by hand, and what is planned for them, as text.

use crtools_restore::load::load;
use crtools_restore::plan::plan;
use image::x86::{ThreadInfoX86, UserX86FpregsEntry};
use image::{
    CoreEntry, Dir, FdTypes, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, Kind, Message, MmEntry,
    PagemapEntry, PagemapHead, PstreeEntry, TaskCoreEntry, TaskKobjIdsEntry, ThreadCoreEntry, VmaEntry,
    Writer, kind,
};
use kinds::contract::FdKind;
use kinds::fd::regular::{RegFileEntry, Regular};
use model::Options;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder of images that is being made, and removed in the end.
struct Made {
    path: PathBuf,
    tree: Vec<PstreeEntry>,
}

/// The one file that there is: executable, root and working directory of all.
const FILE: u32 = 1;

impl Drop for Made {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

impl Made {
    fn new() -> Made {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("crtools-plans-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).expect("make a folder");
        let made = Made { path, tree: Vec::new() };
        let inventory = InventoryEntry { img_version: 2, fdinfo_per_id: Some(true), ..Default::default() };
        made.write(kind::INVENTORY, "inventory.img", &[inventory]);
        let file = RegFileEntry { id: FILE, name: b"/".to_vec(), ..RegFileEntry::default() };
        let file = FileEntry::new(FdTypes::Reg.into(), FILE, Regular::TAG, &file);
        made.write(kind::FILES, "files.img", &[file]);
        made
    }

    fn write<M: Message>(&self, kind: Kind, name: &str, records: &[M]) {
        let mut writer = Writer::new(kind);
        for record in records {
            writer.record(record);
        }
        std::fs::write(self.path.join(name), writer.bytes()).expect("write an image");
    }

    /// Adds a process: its id, its parent's, group and session.
    fn process(&mut self, [pid, ppid, pgid, sid]: [u32; 4]) -> &mut Made {
        self.tree.push(PstreeEntry { pid, ppid, pgid, sid, threads: vec![pid] });
        let state = TaskCoreEntry { task_state: 1, comm: b"some".to_vec(), ..TaskCoreEntry::default() };
        let core = CoreEntry { tc: Some(state), ..thread() };
        self.write(kind::CORE, &format!("core-{pid}.img"), &[core]);
        let ids = TaskKobjIdsEntry { vm_id: pid, files_id: pid, fs_id: pid, ..Default::default() };
        self.write(kind::IDS, &format!("ids-{pid}.img"), &[ids]);
        let fs = FsEntry { cwd_id: FILE, root_id: FILE, umask: None };
        self.write(kind::FS, &format!("fs-{pid}.img"), &[fs]);
        let fd = FdinfoEntry { id: FILE, r#type: FdTypes::Reg.into(), fd: 3, ..FdinfoEntry::default() };
        self.write(kind::FDINFO, &format!("fdinfo-{pid}.img"), &[fd]);
        self.memory(pid, &[0x40_0000])
    }

    /// Gives a process two pages of memory at each of these addresses, the first of them with content.
    fn memory(&mut self, pid: u32, starts: &[u64]) -> &mut Made {
        let vma = |start: &u64| VmaEntry {
            start: *start,
            end: start + 0x2000,
            prot: 3,
            flags: 0x22,
            status: image::vma::REGULAR | image::vma::ANON_PRIVATE,
            fd: -1,
            ..VmaEntry::default()
        };
        let vmas = starts.iter().map(vma).collect();
        let mm = MmEntry { exe_file_id: FILE, vmas, ..MmEntry::default() };
        self.write(kind::MM, &format!("mm-{pid}.img"), &[mm]);
        let mut pagemap = Writer::new(kind::PAGEMAP);
        pagemap.record(&PagemapHead { pages_id: pid });
        for start in starts {
            let run = PagemapEntry { vaddr: *start, nr_pages: Some(1), ..PagemapEntry::default() };
            pagemap.record(&run);
        }
        std::fs::write(self.path.join(format!("pagemap-{pid}.img")), pagemap.bytes()).expect("write");
        let pages = vec![0; starts.len() * 4096];
        std::fs::write(self.path.join(format!("pages-{pid}.img")), pages).expect("write");
        self
    }

    /// Adds a thread to the process that was added last.
    fn thread(&mut self, tid: u32) -> &mut Made {
        self.tree.last_mut().expect("a process").threads.push(tid);
        self.write(kind::CORE, &format!("core-{tid}.img"), &[thread()]);
        self
    }

    /// Adds a process that has ended.
    fn zombie(&mut self, [pid, ppid, pgid, sid]: [u32; 4], exit_code: u32) -> &mut Made {
        self.tree.push(PstreeEntry { pid, ppid, pgid, sid, threads: vec![pid] });
        let state = TaskCoreEntry { task_state: 2, exit_code, comm: b"gone".to_vec(), ..Default::default() };
        let core = CoreEntry { tc: Some(state), thread_core: None, thread_info: None, ..thread() };
        self.write(kind::CORE, &format!("core-{pid}.img"), &[core]);
        self
    }

    /// The plan, or every objection to it.
    fn planned(&self, options: &Options) -> String {
        self.write(kind::PSTREE, "pstree.img", &self.tree);
        let dir = Dir::open(&self.path).expect("the folder");
        let planned = load(&dir).and_then(|all| plan(&all, options).map(|plan| plan.describe(&all)));
        planned.unwrap_or_else(|failures| failures.iter().map(|failure| format!("{failure}\n")).collect())
    }
}

/// What every thread has.
fn thread() -> CoreEntry {
    let fpregs =
        UserX86FpregsEntry { st_space: vec![0; 32], xmm_space: vec![0; 64], ..UserX86FpregsEntry::default() };
    CoreEntry {
        mtype: agent::arch::record::MARCH.into(),
        thread_info: Some(ThreadInfoX86 { fpregs, ..ThreadInfoX86::default() }),
        thread_core: Some(ThreadCoreEntry::default()),
        ..CoreEntry::default()
    }
}

fn shell_job() -> Options {
    Options { shell_job: true, ..Options::default() }
}

#[test]
fn one_process_is_made_with_its_threads() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).thread(8).thread(9);
    assert_eq!(
        made.planned(&Options::default()),
        "process 7 (some): root; session 7, group 7; 3 threads, 1 mappings, 1 pages, 1 descriptors\n\
         agent at 0x100000000-0x140002000\n"
    );
}

#[test]
fn a_child_with_memory_of_its_parent_is_made_after_it_and_another_before() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).memory(7, &[0x40_0000, 0x80_0000]);
    made.process([8, 7, 7, 7]).memory(8, &[0x80_0000]);
    made.process([9, 7, 9, 7]).memory(9, &[0xc0_0000]);
    assert_eq!(
        made.planned(&Options::default()),
        "process 7 (some): root; session 7, group 7; 1 threads, 2 mappings, 2 pages, 1 descriptors\n\
         process 8 (some): child of 7, Sharing; session 7, group 7; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 9 (some): child of 7, Empty; session 7, group 9; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         agent at 0x100000000-0x140002000\n"
    );
}

#[test]
fn a_child_of_the_session_before_is_made_before_its_parent_leads_one() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).process([8, 7, 8, 8]).process([9, 8, 7, 7]);
    assert_eq!(
        made.planned(&Options::default()),
        "process 7 (some): root; session 7, group 7; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 8 (some): child of 7, Sharing; session 8, group 8; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 9 (some): child of 8, BeforeSession; session 7, group 7; 1 threads, 1 mappings, 1 pages, \
         1 descriptors\n\
         agent at 0x100000000-0x140002000\n"
    );
}

#[test]
fn a_group_without_its_leader_gets_one_for_a_moment() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).process([8, 7, 4, 7]).process([9, 7, 4, 7]).zombie([10, 7, 7, 7], 9);
    assert_eq!(
        made.planned(&Options::default()),
        "process 7 (some): root; session 7, group 7; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 8 (some): child of 7, Sharing; session 7, group 4; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 9 (some): child of 7, Sharing; session 7, group 4; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         process 10 (gone): zombie of 7; session 7, group 7; 1 threads, 0 mappings, 0 pages, 0 descriptors\n\
         process group 4: led for a moment by a child of 8\n\
         agent at 0x100000000-0x140002000\n"
    );
}

#[test]
fn a_shell_job_needs_its_option() {
    let mut made = Made::new();
    made.process([7, 0, 7, 3]);
    assert_eq!(
        made.planned(&Options::default()),
        "pid 7: its session 3 is led from outside of the tree; --shell-job allows it\n"
    );
    assert_eq!(
        made.planned(&shell_job()),
        "process 7 (some): root; session 3, group 7; 1 threads, 1 mappings, 1 pages, 1 descriptors\n\
         agent at 0x100000000-0x140002000\n"
    );
}

#[test]
fn the_agent_goes_where_nobody_has_memory() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).process([8, 7, 7, 7]);
    // Between the first two there is too little room, below the third enough.
    made.memory(7, &[0x1_0000_0000]).memory(8, &[0x1_8000_0000, 0x2_8000_0000]);
    let text = made.planned(&Options::default());
    assert!(text.ends_with("agent at 0x180200000-0x1c0202000\n"), "{text}");
}

#[test]
fn a_tree_that_fills_its_address_space_is_refused() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]);
    let every_gigabyte = (4..0x7f00_0000_0000_u64 >> 30).map(|nth| nth << 30);
    made.memory(7, &every_gigabyte.chain([0x7eff_ffc0_0000]).collect::<Vec<_>>());
    assert_eq!(
        made.planned(&Options::default()),
        "tree: leaves no room for the agent in its address spaces\n"
    );
}

#[test]
fn orphans_are_made_by_the_leader_of_their_session() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]).process([8, 7, 5, 5]).process([9, 8, 5, 5]);
    let text = made.planned(&Options::default());
    assert!(text.contains("process 8 (some): child of 7, Orphaned; session 5"), "{text}");
    assert!(text.contains("session 5: led for a moment by a child of 7\n"), "{text}");
    assert!(!text.contains("process 9 (some): child of 8, Orphaned"), "{text}");
    assert!(!text.contains("process group"), "{text}");
}

#[test]
fn every_objection_is_told_at_once() {
    let mut made = Made::new();
    // The leader lives, and did not make them.
    made.process([7, 0, 7, 7]).process([8, 7, 8, 8]).process([9, 7, 9, 8]).process([11, 7, 11, 8]);
    assert_eq!(
        made.planned(&Options::default()),
        "pid 9: its session 8 cannot be reached from its parent 7\n\
         pid 11: its session 8 cannot be reached from its parent 7\n"
    );
    made.tree.pop();
    // A set of images that is none is not planned for.
    made.tree[1].ppid = 70;
    made.tree[2].threads = vec![7];
    made.zombie([10, 7, 7, 7], 19);
    assert_eq!(
        made.planned(&Options::default()),
        "pstree.img#1: process 8 has the parent 70, which is not before it\n\
         pstree.img#2: process 9 is not its own first thread\n\
         core-10.img#0: has the exit code 0x13, with which no process ends\n"
    );
}

#[test]
fn descriptors_and_mappings_of_files_that_are_not_there_are_named() {
    let mut made = Made::new();
    made.process([7, 0, 7, 7]);
    let fd = |id, fd| FdinfoEntry { id, r#type: FdTypes::Reg.into(), fd, ..FdinfoEntry::default() };
    made.write(kind::FDINFO, "fdinfo-7.img", &[fd(FILE, 5), fd(77, 4), fd(FILE, 1 << 30)]);
    assert_eq!(
        made.planned(&Options::default()),
        "fdinfo-7.img: has fd 1073741824, which is none\n\
         files.img: has no file 77, which is fd 4 of fdinfo-7.img\n"
    );
}
