//! `core-*.img`: registers and the extended state of the processor, put into areas of several sizes.
//! The first two bytes are the size of the area that ptrace(2) would have given.
#![no_main]

use agent::arch::{self, record};
use image::{CoreEntry, Message, SeccompEntry};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [low, high, bytes @ ..] = data else { return };
    let size = usize::from(u16::from_le_bytes([*low, *high]));
    let Ok(core) = CoreEntry::decode(bytes) else { return };
    if let Some(thread) = &core.thread_core {
        let _ = kinds::task::seccomp::programs(thread, &SeccompEntry::default());
    }
    let Some(info) = &core.thread_info else { return };
    let mut xstate = vec![0xff; size];
    if record::fill_xstate(&info.fpregs, &mut xstate, "core-1.img").is_err() {
        return;
    }
    let registers = record::registers(&info.gpregs);
    // What was put there is what a dump would read.
    let again = record::thread_info(&registers, &xstate, info.clear_tid_addr);
    assert_eq!(again.fpregs.st_space, info.fpregs.st_space);
    assert_eq!(again.fpregs.xmm_space, info.fpregs.xmm_space);
    let (frame, _) = arch::signal_frame(&registers, &xstate, 0, 0x1000);
    assert!(frame.len() <= xstate.len() + arch::FRAME_MAX);
});
