//! SysV shared memory, attached.

use super::call::check;

/// A segment that this process has attached.
#[derive(Debug, Clone, Copy)]
pub struct Attached {
    pub id: i32,
    pub address: usize,
    pub len: usize,
}

#[track_caller]
pub fn make(key: i32, len: usize, mode: i32) -> i32 {
    // SAFETY: shmget takes integers.
    check("shmget", unsafe { libc::shmget(key, len, libc::IPC_CREAT | libc::IPC_EXCL | mode) })
}

/// The id of the segment with this key.
pub fn find(key: i32) -> Option<i32> {
    // SAFETY: shmget takes integers.
    let id = unsafe { libc::shmget(key, 0, 0) };
    (id >= 0).then_some(id)
}

#[track_caller]
pub fn attach(id: i32, len: usize, flags: i32) -> Attached {
    // SAFETY: the kernel chooses where nothing is.
    let address = check("shmat", unsafe { libc::shmat(id, std::ptr::null(), flags) } as isize);
    Attached { id, address: address as usize, len }
}

/// `struct shmid_ds`.
#[track_caller]
pub fn stat(id: i32) -> libc::shmid_ds {
    let mut state = std::mem::MaybeUninit::zeroed();
    // SAFETY: IPC_STAT writes one shmid_ds to the local.
    check("shmctl", unsafe { libc::shmctl(id, libc::IPC_STAT, state.as_mut_ptr()) });
    // SAFETY: zeroed integers, then filled.
    unsafe { state.assume_init() }
}

#[track_caller]
pub fn set(id: i32, uid: u32, gid: u32, mode: u32) {
    let mut state = stat(id);
    (state.shm_perm.uid, state.shm_perm.gid, state.shm_perm.mode) = (uid, gid, mode as _);
    // SAFETY: IPC_SET reads one shmid_ds, a live local.
    check("shmctl", unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut state) });
}

#[track_caller]
pub fn remove(id: i32) {
    // SAFETY: IPC_RMID takes nothing more.
    check("shmctl", unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) });
}

#[track_caller]
pub fn lock(id: i32) {
    // SAFETY: SHM_LOCK takes nothing more.
    check("shmctl", unsafe { libc::shmctl(id, libc::SHM_LOCK, std::ptr::null_mut()) });
}

impl Attached {
    fn word(&self, at: usize) -> *mut u64 {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        (self.address + at) as *mut u64
    }

    pub fn put(&self, at: usize, value: u64) {
        // SAFETY: within what is attached; others write too, so it is volatile.
        unsafe { self.word(at).write_volatile(value) };
    }

    pub fn get(&self, at: usize) -> u64 {
        // SAFETY: as in `put`.
        unsafe { self.word(at).read_volatile() }
    }

    #[track_caller]
    pub fn detach(self) {
        // SAFETY: whoever detaches does not use it afterwards.
        check("shmdt", unsafe { libc::shmdt(self.address as *const libc::c_void) });
    }

    /// Changes the protection of a part.
    #[track_caller]
    pub fn protect(&self, from: usize, len: usize, prot: i32) {
        assert!(from + len <= self.len);
        // SAFETY: within what is attached, which nobody has a reference into.
        check("mprotect", unsafe { libc::mprotect((self.address + from) as *mut libc::c_void, len, prot) });
    }

    /// Takes a part out.
    #[track_caller]
    pub fn unmap(&self, from: usize, len: usize) {
        assert!(from + len <= self.len);
        // SAFETY: as in `protect`.
        check("munmap", unsafe { libc::munmap((self.address + from) as *mut libc::c_void, len) });
    }
}
