//! Registers and extended state as `core-<tid>.img` holds them.

use super::Registers;
use super::xstate::{EXTENDED_AT, HEADER_AT, Layout};
use image::CoreEntryMarch;
use image::x86::*;
use model::Failure;

/// The architecture of a core image made here.
pub const MARCH: CoreEntryMarch = CoreEntryMarch::X86_64;

/// Components that have fields of their own; the others go to one of ours.
const YMM: u32 = 2;
const BNDREG: u32 = 3;
const BNDCSR: u32 = 4;
const OPMASK: u32 = 5;
const ZMM_UPPER: u32 = 6;
const HI16_ZMM: u32 = 7;
const PKRU: u32 = 9;
const NAMED: [u32; 7] = [YMM, BNDREG, BNDCSR, OPMASK, ZMM_UPPER, HI16_ZMM, PKRU];

fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
}

/// The record of a thread with these registers (as it should go on with) and this extended state (as
/// ptrace gives it).
pub fn thread_info(r: &Registers, xstate: &[u8], clear_tid: u64) -> ThreadInfoX86 {
    let component = |number| {
        let (offset, length) = Layout.component(number)?;
        xstate.get(offset..offset + length)
    };
    let narrow = |number| component(number).map(words32).unwrap_or_default();
    let wide = |number| component(number).map(words64).unwrap_or_default();
    let half = |at| u32::from(u16::from_le_bytes([xstate[at], xstate[at + 1]]));
    let xstate_bv = words64(&xstate[HEADER_AT..HEADER_AT + 8])[0];
    let other = (10..63)
        .filter(|number| xstate_bv >> number & 1 != 0 && !NAMED.contains(number))
        .filter_map(|number| Some(XstateComponent { number, state: component(number)?.to_vec() }))
        .collect();
    ThreadInfoX86 {
        clear_tid_addr: clear_tid,
        gpregs: UserX86RegsEntry {
            r15: r.r15,
            r14: r.r14,
            r13: r.r13,
            r12: r.r12,
            bp: r.bp,
            bx: r.bx,
            r11: r.r11,
            r10: r.r10,
            r9: r.r9,
            r8: r.r8,
            ax: r.ax,
            cx: r.cx,
            dx: r.dx,
            si: r.si,
            di: r.di,
            orig_ax: r.orig_ax,
            ip: r.ip,
            cs: r.cs,
            flags: r.flags,
            sp: r.sp,
            ss: r.ss,
            fs_base: r.fs_base,
            gs_base: r.gs_base,
            ds: r.ds,
            es: r.es,
            fs: r.fs,
            gs: r.gs,
            mode: Some(UserX86RegsMode::Native.into()),
        },
        fpregs: UserX86FpregsEntry {
            cwd: half(0),
            swd: half(2),
            twd: half(4),
            fop: half(6),
            rip: words64(&xstate[8..16])[0],
            rdp: words64(&xstate[16..24])[0],
            mxcsr: words32(&xstate[24..28])[0],
            mxcsr_mask: words32(&xstate[28..32])[0],
            st_space: words32(&xstate[32..160]),
            xmm_space: words32(&xstate[160..416]),
            padding: vec![0; 24],
            xsave: Some(UserX86XsaveEntry {
                xstate_bv,
                ymmh_space: narrow(YMM),
                bndreg_state: wide(BNDREG),
                bndcsr_state: wide(BNDCSR),
                opmask_reg: wide(OPMASK),
                zmm_upper: wide(ZMM_UPPER),
                hi16_zmm: wide(HI16_ZMM),
                pkru: narrow(PKRU),
                cet: None,
                other,
            }),
        },
        tls: Vec::new(),
    }
}

/// The registers of a record. Segment selectors are the user's own, whatever the image says: the kernel
/// refuses others.
pub fn registers(r: &UserX86RegsEntry) -> Registers {
    Registers {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.bp,
        bx: r.bx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.ax,
        cx: r.cx,
        dx: r.dx,
        si: r.si,
        di: r.di,
        orig_ax: u64::MAX,
        ip: r.ip,
        cs: r.cs,
        flags: r.flags,
        sp: r.sp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
    }
}

/// Puts the extended state of a record into `xstate`, an area that ptrace gave on this host.
///
/// # Errors
/// `Corrupt` for arrays of a wrong length; a conflict when this processor lacks a component that is in use.
pub fn fill_xstate(fp: &UserX86FpregsEntry, xstate: &mut [u8], image: &str) -> Result<(), Failure> {
    let corrupt = |what: &str| Failure::corrupt(image, None, format!("{what} has a wrong length"));
    if xstate.len() < EXTENDED_AT {
        return Err(Failure::unsupported(
            model::Object::Named("processor".into()),
            "keeps no extended state in the format that images use",
        ));
    }
    if fp.st_space.len() != 32 || fp.xmm_space.len() != 64 {
        return Err(corrupt("the floating point state"));
    }
    xstate.fill(0);
    for (at, value) in [(0, fp.cwd), (2, fp.swd), (4, fp.twd), (6, fp.fop)] {
        xstate[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
    let mut put = |at: usize, bytes: &mut dyn Iterator<Item = u8>| {
        for (to, byte) in xstate[at..].iter_mut().zip(bytes) {
            *to = byte;
        }
    };
    put(8, &mut fp.rip.to_le_bytes().into_iter().chain(fp.rdp.to_le_bytes()));
    put(24, &mut fp.mxcsr.to_le_bytes().into_iter().chain(fp.mxcsr_mask.to_le_bytes()));
    put(32, &mut fp.st_space.iter().chain(&fp.xmm_space).flat_map(|word| word.to_le_bytes()));
    let Some(xsave) = &fp.xsave else {
        // x87 and SSE, as an image of an old processor holds them.
        put(HEADER_AT, &mut 3u64.to_le_bytes().into_iter());
        return Ok(());
    };
    let narrow = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let wide = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let named = NAMED.into_iter().map(|number| (number, None));
    let others = xsave.other.iter().map(|other| (other.number, Some(&other.state)));
    let mut present = 3u64;
    for (number, state) in named.chain(others) {
        if number > 62 || xsave.xstate_bv >> number & 1 == 0 {
            continue;
        }
        let state = match (number, state) {
            (_, Some(state)) => state.clone(),
            (YMM, _) => narrow(&xsave.ymmh_space),
            (BNDREG, _) => wide(&xsave.bndreg_state),
            (BNDCSR, _) => wide(&xsave.bndcsr_state),
            (OPMASK, _) => wide(&xsave.opmask_reg),
            (ZMM_UPPER, _) => wide(&xsave.zmm_upper),
            (HI16_ZMM, _) => wide(&xsave.hi16_zmm),
            _ => narrow(&xsave.pkru),
        };
        let Some((offset, length)) =
            Layout.component(number).filter(|(offset, length)| offset + length <= xstate.len())
        else {
            let why = format!("this processor lacks the extended state {number}, which the process uses");
            return Err(Failure::conflict(model::Object::Named("processor".into()), "", why));
        };
        // Arrays may be longer than the component: CRIU pads some.
        let state = state.get(..length).ok_or_else(|| corrupt("an extended state"))?;
        xstate[offset..offset + length].copy_from_slice(state);
        present |= 1 << number;
    }
    xstate[HEADER_AT..HEADER_AT + 8].copy_from_slice(&(xsave.xstate_bv & present).to_le_bytes());
    Ok(())
}
