//! The signal frame: a whole thread context in memory, which one rt_sigreturn(2) puts back.

use super::Registers;
use super::xstate::{HEADER_AT, Layout};
use zerocopy::IntoBytes;

/// Offset of the extended state in the frame; it has to be aligned to 64 bytes.
const STATE_AT: usize = 512;
/// A frame is at most this much longer than the extended state in it.
pub const FRAME_MAX: usize = STATE_AT + 512;
/// Where fxsave keeps the bytes that say that more follows, and the marks at both ends of it.
const SW_RESERVED_AT: usize = 464;
const MAGIC1: u32 = 0x4650_5853;
const MAGIC2: u32 = 0x4650_5845;
/// UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
const UC_FLAGS: u64 = 7;

/// The bytes of a frame to lie at `address` (aligned to 64), and the stack pointer to call
/// rt_sigreturn(2) with.
///
/// The alternate signal stack stays as it is: the frame names one that cannot be, which the kernel ignores.
///
/// Source: arch/x86/include/asm/sigframe.h, uapi/asm/sigcontext.h; arch/x86/kernel/signal_64.c.
pub fn signal_frame(registers: &Registers, xstate: &[u8], mask: u64, address: u64) -> (Vec<u8>, u64) {
    let r = registers;
    // struct ucontext begins behind the return address, which rt_sigreturn steps over.
    let mut frame = vec![0u8; 8];
    let mut put = |bytes: &[u8]| frame.extend_from_slice(bytes);
    // Flags that do not exist.
    let stack = [0u64, 0xff, 0];
    put([UC_FLAGS, 0].as_bytes());
    put(stack.as_bytes());
    put([r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15].as_bytes());
    put([r.di, r.si, r.bp, r.bx, r.dx, r.ax, r.cx, r.sp, r.ip, r.flags].as_bytes());
    put([r.cs as u16, r.gs as u16, r.fs as u16, r.ss as u16].as_bytes());
    // Error code, trap number, old mask, fault address.
    put([0u64; 4].as_bytes());
    put([address + STATE_AT as u64].as_bytes());
    put([0u64; 8].as_bytes());
    put(mask.as_bytes());
    assert!(frame.len() <= STATE_AT);
    frame.resize(STATE_AT, 0);

    let features = xstate
        .get(HEADER_AT..HEADER_AT + 8)
        .map_or(3, |bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) | 3);
    let size = Layout.size(features).min(xstate.len().max(512));
    frame.extend_from_slice(&xstate[..size.min(xstate.len())]);
    let mut reserved = Vec::with_capacity(48);
    reserved.extend_from_slice([MAGIC1, size as u32 + 4].as_bytes());
    reserved.extend_from_slice(features.as_bytes());
    reserved.extend_from_slice((size as u32).as_bytes());
    frame[STATE_AT + SW_RESERVED_AT..][..reserved.len()].copy_from_slice(&reserved);
    frame.extend_from_slice(MAGIC2.as_bytes());
    (frame, address + 8)
}
