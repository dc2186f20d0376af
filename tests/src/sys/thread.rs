//! What the kernel knows about the calling thread.

use std::arch::asm;

/// Head and length of the calling thread's robust list.
#[track_caller]
pub fn robust_list() -> (usize, usize) {
    let (mut head, mut length) = (0_usize, 0_usize);
    // SAFETY: the kernel writes two words to live locals during the call.
    let result = unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) };
    super::call::check("get_robust_list", result);
    (head, length)
}

/// The processor that the kernel last noted in glibc's rseq area of this thread; none without such an area.
#[cfg(target_arch = "x86_64")]
pub fn rseq_cpu() -> Option<u32> {
    unsafe extern "C" {
        // glibc 2.35 and later: where the area lies from the thread pointer, and how much of it is in use.
        static __rseq_offset: isize;
        static __rseq_size: u32;
    }
    // SAFETY: both are constants that glibc sets before main.
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    if size == 0 {
        return None;
    }
    let mut thread: usize;
    // SAFETY: reads the first word of the thread control block, which by the ABI points to itself.
    unsafe { asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly, preserves_flags)) };
    // SAFETY: glibc registered the area at this offset for the life of the thread; cpu_id is its second word.
    Some(unsafe { std::ptr::read_volatile((thread.wrapping_add_signed(offset) + 4) as *const u32) })
}

/// Sets the base of the segment that user space has for itself.
#[cfg(target_arch = "x86_64")]
#[track_caller]
pub fn set_gs_base(base: u64) {
    const ARCH_SET_GS: i32 = 0x1001;
    // SAFETY: takes two integers; nothing in this program addresses through gs.
    super::call::check("arch_prctl", unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) });
}

/// What [`set_gs_base`] set.
#[cfg(target_arch = "x86_64")]
#[track_caller]
pub fn gs_base() -> u64 {
    const ARCH_GET_GS: i32 = 0x1004;
    let mut base = 0_u64;
    // SAFETY: the kernel writes one live local during the call.
    super::call::check("arch_prctl", unsafe {
        libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base)
    });
    base
}

/// Source: linux/mempolicy.h.
pub const MPOL_F_STATIC_NODES: i32 = 1 << 15;

/// Has the kernel put the memory of the calling thread on these nodes, the first 64 of them. Source: set_mempolicy(2).
///
/// # Errors
/// Where the kernel knows no nodes, or not these.
pub fn set_memory_policy(mode: i32, nodes: u64) -> std::io::Result<()> {
    // SAFETY: the kernel reads one word, a live local.
    match unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, 64) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Mode and nodes of the calling thread. Source: get_mempolicy(2).
///
/// # Errors
/// Where the kernel knows no nodes.
pub fn memory_policy() -> std::io::Result<(i32, u64)> {
    let (mut mode, mut nodes) = (0_i32, [0_u64; 16]);
    // SAFETY: the kernel writes an integer and 1024 bits, both live locals.
    let result =
        unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, 0, 0) };
    match result {
        0 => Ok((mode, nodes[0])),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// # Errors
/// Why not.
pub fn has_memory_policies() -> Result<(), String> {
    memory_policy().map(drop).map_err(|e| format!("no policies of memory here: {e}"))
}
