//! SysV shared memory: shmget(2), shmat(2), shmctl(2).

use crate::call::check;
use model::Errno;
use std::os::fd::OwnedFd;
use std::path::Path;

/// In [`Segment::mode`]: it is gone with the last that has it attached; it stays in memory.
pub const DEST: u32 = 0o1000;
pub const LOCKED: u32 = 0o2000;

/// Among the flags of a new segment: it consists of huge pages. Source: linux/shm.h SHM_HUGETLB.
pub const HUGE: u32 = 0o4000;

/// What the kernel tells of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub key: i32,
    pub uid: u32,
    pub gid: u32,
    pub creator_uid: u32,
    pub creator_gid: u32,
    /// Permissions, [`DEST`], [`LOCKED`].
    pub mode: u32,
    pub size: u64,
    /// How many mappings there are.
    pub attached: u64,
    /// SHM_HUGETLB with the size of the pages, which the kernel does not tell.
    pub huge: u32,
}

fn control(id: i32, command: i32, argument: *mut libc::shmid_ds) -> Result<(), Errno> {
    // SAFETY: the callers give a null pointer, or one to a struct that lives for the call.
    check("shmctl", unsafe { libc::shmctl(id, command, argument) }.into()).map(drop)
}

fn state(id: i32) -> Result<libc::shmid_ds, Errno> {
    // SAFETY: a struct of integers.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    control(id, libc::IPC_STAT, &mut state)?;
    Ok(state)
}

/// Source: shmctl(2) IPC_STAT.
///
/// # Errors
/// `EINVAL`, `EIDRM` when there is none with this id.
pub fn stat(id: i32) -> Result<Segment, Errno> {
    let state = state(id)?;
    let perm = &state.shm_perm;
    Ok(Segment {
        key: perm.__key,
        uid: perm.uid,
        gid: perm.gid,
        creator_uid: perm.cuid,
        creator_gid: perm.cgid,
        mode: perm.mode.into(),
        size: state.shm_segsz as u64,
        attached: state.shm_nattch,
        huge: 0,
    })
}

/// The id of the segment with this key, if there is one.
pub fn find(key: i32) -> Option<i32> {
    // SAFETY: integers only.
    check("shmget", unsafe { libc::shmget(key, 0, 0) }.into()).ok().map(|id| id as i32)
}

/// Makes a segment with this id, if its place in the kernel's table is free, as its creator; returns the id that it
/// got.
///
/// Source: shmget(2); `kernel.shm_next_id`, ipc/util.c ipc_idr_alloc(). The ids of a thread are its own alone, as
/// long as the calls do not go through the library.
///
/// # Errors
/// Those of shmget(2); `EEXIST` when the key is taken.
pub fn create(id: i32, segment: &Segment) -> Result<i32, Errno> {
    const KEPT: u32 = u32::MAX;
    let next = "/proc/sys/kernel/shm_next_id";
    std::fs::write(next, id.to_string()).map_err(|error| crate::memory::io_errno("write", &error))?;
    let (uid, gid) = (segment.creator_uid, segment.creator_gid);
    let (key, size, mode) = (segment.key, segment.size as usize, segment.mode & 0o777 | segment.huge);
    let become_creator = move || {
        // SAFETY: integers only; what changes is of this thread alone.
        unsafe {
            check("setresgid", libc::syscall(libc::SYS_setresgid, KEPT, gid, KEPT))?;
            check("setresuid", libc::syscall(libc::SYS_setresuid, KEPT, uid, KEPT))?;
            let flags = libc::IPC_CREAT | libc::IPC_EXCL | mode as i32;
            check("shmget", libc::shmget(key, size, flags).into()).map(|id| id as i32)
        }
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(become_creator);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Source: shmctl(2) IPC_SET.
pub fn set(id: i32, uid: u32, gid: u32, mode: u32) -> Result<(), Errno> {
    let mut state = state(id)?;
    (state.shm_perm.uid, state.shm_perm.gid) = (uid, gid);
    state.shm_perm.mode = (mode & 0o777) as _;
    control(id, libc::IPC_SET, &mut state)
}

/// Source: shmctl(2) SHM_LOCK.
pub fn lock(id: i32) -> Result<(), Errno> {
    control(id, libc::SHM_LOCK, std::ptr::null_mut())
}

/// Source: shmctl(2) IPC_RMID.
pub fn remove(id: i32) -> Result<(), Errno> {
    control(id, libc::IPC_RMID, std::ptr::null_mut())
}

/// A segment that this process has attached, until it is dropped.
#[derive(Debug)]
pub struct Attached(usize);

impl Attached {
    /// Source: shmat(2).
    pub fn new(id: i32) -> Result<Attached, Errno> {
        // SAFETY: the kernel chooses where nothing is; nobody looks at the memory.
        let address = unsafe { libc::shmat(id, std::ptr::null(), 0) };
        check("shmat", address as i64).map(|_| Attached(address as usize))
    }

    /// The file in memory that the segment is.
    pub fn file(&self) -> Result<OwnedFd, Errno> {
        let text = crate::fd::text("/proc/self/maps")?;
        let maps = text.split(|byte| *byte == b'\n').filter_map(crate::proc::parse_vma_line);
        let map = maps.into_iter().find(|map| map.start == self.0 as u64);
        let map = map.ok_or(Errno { call: "open", code: libc::ENOENT })?;
        let path = format!("/proc/self/map_files/{:x}-{:x}", map.start, map.end);
        crate::fd::open(Path::new(&path), libc::O_RDWR)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by us, and nobody has a reference into it.
        unsafe { libc::shmdt(self.0 as *const libc::c_void) };
    }
}

/// Takes all content out of a file in memory. Source: fallocate(2) FALLOC_FL_PUNCH_HOLE.
pub fn clear(file: &OwnedFd, size: u64) -> Result<(), Errno> {
    use std::os::fd::AsRawFd;
    let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let page = crate::fd::huge_page_of(file).unwrap_or(crate::memory::PAGE);
    // SAFETY: integers only.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), flags, 0, size.next_multiple_of(page) as i64) };
    check("fallocate", result.into()).map(drop)
}

/// Processes that have a segment attached, as far as they can be seen: pid and name.
pub fn holders(id: i32) -> Vec<(i32, String)> {
    let has_it = |pid: &i32| {
        let text = crate::fd::text(&format!("/proc/{pid}/maps")).unwrap_or_default();
        let mut maps = text.split(|byte| *byte == b'\n').filter_map(crate::proc::parse_vma_line);
        maps.any(|map| map.inode == id as u64 && map.name.starts_with(b"/SYSV"))
    };
    let all = crate::fd::numbers("/proc").unwrap_or_default().into_iter().filter(has_it);
    all.map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pid, name.trim_end().to_owned())
    })
    .collect()
}
