//! Loops that hold values in registers and nowhere else, until another thread says so.
//!
//! A dump that happens meanwhile stops the loop at any of its instructions.

use std::arch::{asm, global_asm};
use std::sync::atomic::AtomicU32;

/// int3: the debugger's instruction, here for a handler of SIGTRAP.
#[cfg(target_arch = "x86_64")]
pub fn breakpoint() {
    // SAFETY: raises SIGTRAP, for which the caller has a handler, and goes on behind it.
    unsafe { asm!("int3") };
}

/// A loop in assembly: loads a register file from `values`, adds `step` to nothing, spins until `*flag` is not
/// zero, then stores the registers to `values`.
type Holder = unsafe extern "C" fn(values: *mut u8, flag: *const u32);

global_asm!(
    // rdi: values, rsi: flag. Only registers that the C convention lets a function destroy are used, but for
    // the general ones, which are pushed.
    ".macro hold_until",
    "2: pause",
    "cmp dword ptr [rsi], 0",
    "je 2b",
    ".endm",
    ".globl crtools_hold_general",
    "crtools_hold_general:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "mov rax, [rdi]; mov rbx, [rdi+8]; mov rcx, [rdi+16]; mov rdx, [rdi+24]; mov rbp, [rdi+32]",
    "mov r8, [rdi+40]; mov r9, [rdi+48]; mov r10, [rdi+56]; mov r11, [rdi+64]; mov r12, [rdi+72]",
    "mov r13, [rdi+80]; mov r14, [rdi+88]; mov r15, [rdi+96]",
    "hold_until",
    "mov [rdi], rax; mov [rdi+8], rbx; mov [rdi+16], rcx; mov [rdi+24], rdx; mov [rdi+32], rbp",
    "mov [rdi+40], r8; mov [rdi+48], r9; mov [rdi+56], r10; mov [rdi+64], r11; mov [rdi+72], r12",
    "mov [rdi+80], r13; mov [rdi+88], r14; mov [rdi+96], r15",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    ".globl crtools_hold_sse",
    "crtools_hold_sse:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu xmm\\n, [rdi + 16*\\n]",
    ".endr",
    "hold_until",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu [rdi + 16*\\n], xmm\\n",
    ".endr",
    "ret",
    ".globl crtools_hold_avx",
    "crtools_hold_avx:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu ymm\\n, [rdi + 32*\\n]",
    ".endr",
    "hold_until",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu [rdi + 32*\\n], ymm\\n",
    ".endr",
    "vzeroupper",
    "ret",
    ".globl crtools_hold_avx512",
    "crtools_hold_avx512:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 zmm\\n, [rdi + 64*\\n]",
    ".endr",
    "hold_until",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 [rdi + 64*\\n], zmm\\n",
    ".endr",
    "vzeroupper",
    "ret",
    // Eight values on the stack of the floating-point unit, in full 80 bits.
    ".globl crtools_hold_x87",
    "crtools_hold_x87:",
    "fninit",
    ".irp n, 0,1,2,3,4,5,6,7",
    "fld tbyte ptr [rdi + 16*\\n]",
    ".endr",
    "hold_until",
    ".irp n, 7,6,5,4,3,2,1,0",
    "fstp tbyte ptr [rdi + 16*\\n]",
    ".endr",
    "ret",
    ".globl crtools_hold_mmx",
    "crtools_hold_mmx:",
    ".irp n, 0,1,2,3,4,5,6,7",
    "movq mm\\n, [rdi + 8*\\n]",
    ".endr",
    "hold_until",
    ".irp n, 0,1,2,3,4,5,6,7",
    "movq [rdi + 8*\\n], mm\\n",
    ".endr",
    "emms",
    "ret",
    // The control words: rounding and masks of both units.
    ".globl crtools_hold_control",
    "crtools_hold_control:",
    "sub rsp, 8",
    "stmxcsr [rsp]",
    "fnstcw [rsp+4]",
    "ldmxcsr [rdi]",
    "fldcw [rdi+4]",
    "hold_until",
    "stmxcsr [rdi]",
    "fnstcw [rdi+4]",
    "ldmxcsr [rsp]",
    "fldcw [rsp+4]",
    "add rsp, 8",
    "ret",
);

unsafe extern "C" {
    fn crtools_hold_general(values: *mut u8, flag: *const u32);
    fn crtools_hold_sse(values: *mut u8, flag: *const u32);
    fn crtools_hold_avx(values: *mut u8, flag: *const u32);
    fn crtools_hold_avx512(values: *mut u8, flag: *const u32);
    fn crtools_hold_x87(values: *mut u8, flag: *const u32);
    fn crtools_hold_mmx(values: *mut u8, flag: *const u32);
    fn crtools_hold_control(values: *mut u8, flag: *const u32);
}

/// A set of registers and its size in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum File {
    General,
    Sse,
    Avx,
    Avx512,
    X87,
    Mmx,
    Control,
}

impl File {
    fn holder(self) -> (Holder, usize) {
        match self {
            Self::General => (crtools_hold_general, 13 * 8),
            Self::Sse => (crtools_hold_sse, 16 * 16),
            Self::Avx => (crtools_hold_avx, 16 * 32),
            Self::Avx512 => (crtools_hold_avx512, 32 * 64),
            Self::X87 => (crtools_hold_x87, 8 * 16),
            Self::Mmx => (crtools_hold_mmx, 8 * 8),
            Self::Control => (crtools_hold_control, 6),
        }
    }

    /// Values that each register can hold unchanged.
    pub fn values(self, seed: u8) -> Vec<u8> {
        let (_, length) = self.holder();
        let mut bytes: Vec<u8> = (0..length).map(|i| (i as u8).wrapping_mul(37) ^ seed).collect();
        match self {
            Self::X87 => {
                for value in bytes.chunks_exact_mut(16) {
                    // A normal number: the explicit integer bit set, an exponent in the middle. The six bytes
                    // above ten are never touched.
                    value[7] |= 0x80;
                    value[8] = seed;
                    value[9] = 0x3f;
                    value[10..].fill(0);
                }
            }
            Self::Control => {
                // Round towards zero, all exceptions masked, flush to zero; round up, single precision.
                bytes[..4].copy_from_slice(&0xff80_u32.to_le_bytes());
                bytes[4..].copy_from_slice(&0x087f_u16.to_le_bytes());
            }
            _ => {}
        }
        bytes
    }

    pub fn is_here(self) -> Result<(), String> {
        let there = match self {
            Self::Avx => std::arch::is_x86_feature_detected!("avx"),
            Self::Avx512 => std::arch::is_x86_feature_detected!("avx512f"),
            _ => true,
        };
        if there { Ok(()) } else { Err(format!("this processor has no {self:?}")) }
    }

    /// Holds `values` in the registers until `flag` is set, and gives back what they hold then.
    pub fn hold(self, values: &[u8], flag: &AtomicU32) -> Vec<u8> {
        let (holder, length) = self.holder();
        assert_eq!(values.len(), length);
        let mut bytes = values.to_vec();
        // SAFETY: reads and writes `length` bytes of a live local vector and reads the flag, which outlives the
        // call; it keeps the C convention (callee-saved and control registers are put back), and the callers
        // have asked `is_here`.
        unsafe { holder(bytes.as_mut_ptr(), flag.as_ptr()) };
        bytes
    }
}

/// Fills what lies below the stack pointer, says so by `begun`, and waits for `flag`; is it still there?
pub fn keeps_below_the_stack(begun: &AtomicU32, flag: &AtomicU32) -> bool {
    // The 128 bytes that belong to the function, and far more that a signal handler would overwrite.
    const BYTES: u64 = 4096;
    let mut same: u64;
    // SAFETY: the memory below the stack pointer is mapped, as the stack is that large, and nobody's: an assembly block
    // without the option `nostack` may use it. The two words are live atomics.
    unsafe {
        asm!(
            "mov {at}, -8",
            "2:",
            "mov qword ptr [rsp + {at}], {at}",
            "sub {at}, 8",
            "cmp {at}, {end}",
            "jge 2b",
            "mov dword ptr [{begun}], 1",
            "3:",
            "pause",
            "cmp dword ptr [{flag}], 0",
            "je 3b",
            "mov {same}, 1",
            "mov {at}, -8",
            "4:",
            "cmp qword ptr [rsp + {at}], {at}",
            "je 5f",
            "mov {same}, 0",
            "5:",
            "sub {at}, 8",
            "cmp {at}, {end}",
            "jge 4b",
            at = out(reg) _,
            same = out(reg) same,
            end = const -(BYTES as i64),
            begun = in(reg) begun.as_ptr(),
            flag = in(reg) flag.as_ptr(),
        );
    }
    same == 1
}
