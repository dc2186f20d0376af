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
