//! The vdso: code that the kernel maps into every process, and its data (vvar) before it.
//!
//! A process keeps addresses of its functions, so after a restore they must lead somewhere. On the same
//! kernel build the new one is mapped where the old one was. Otherwise the old code stays where it was,
//! as plain memory, and each of its functions begins with a jump to the new one of that name.

use std::collections::HashMap;

/// arch_prctl(2) code: map a vdso, with its data before it, at an address.
pub const ARCH_MAP_VDSO: i64 = 0x2003;

/// `movabs rax, imm64; jmp rax`. rax is the caller's to lose at the entry of any function.
fn jump(to: u64) -> [u8; 12] {
    let mut code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0];
    code[2..10].copy_from_slice(&to.to_le_bytes());
    code
}

/// Functions by name: their offsets in the vdso.
pub fn functions(vdso: &[u8]) -> Option<HashMap<Vec<u8>, u64>> {
    // An image says all this: no offset is to be trusted, nor the sum of two.
    let half = |at: usize| Some(u16::from_le_bytes(vdso.get(at..at.checked_add(2)?)?.try_into().ok()?));
    let word32 = |at: usize| Some(u32::from_le_bytes(vdso.get(at..at.checked_add(4)?)?.try_into().ok()?));
    let word = |at: usize| Some(u64::from_le_bytes(vdso.get(at..at.checked_add(8)?)?.try_into().ok()?));
    if vdso.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let headers = word(32)? as usize;
    let count = usize::from(half(56)?);
    let (mut load, mut dynamic) = (None, None);
    for header in (0..count).filter_map(|index| headers.checked_add(index * 56)) {
        match word32(header)? {
            1 if load.is_none() => load = Some(word(header + 16)?.wrapping_sub(word(header + 8)?)),
            2 => dynamic = Some(word(header + 8)? as usize),
            _ => {}
        }
    }
    let (bias, mut at) = (load?, dynamic?);
    let (mut strings, mut symbols, mut hash) = (None, None, None);
    loop {
        let (tag, value) = (word(at)?, word(at + 8)?.wrapping_sub(bias) as usize);
        match tag {
            0 => break,
            4 => hash = Some(value),
            5 => strings = Some(value),
            6 => symbols = Some(value),
            _ => {}
        }
        at += 16;
    }
    let (strings, symbols) = (strings?, symbols?);
    // The old hash table says how many symbols there are; without it they end where the strings begin.
    let count = match hash {
        Some(hash) => word32(hash.checked_add(4)?)? as usize,
        None => strings.checked_sub(symbols)? / 24,
    };
    let mut functions = HashMap::new();
    for symbol in (0..count.min(1024)).filter_map(|index| symbols.checked_add(index * 24)) {
        let name = vdso.get(strings.checked_add(word32(symbol)? as usize)?..)?;
        let name = &name[..name.iter().position(|byte| *byte == 0)?];
        let is_function = vdso.get(symbol + 4)? & 0xf == 2;
        if is_function && half(symbol + 6)? != 0 {
            functions.insert(name.to_vec(), word(symbol + 8)?.wrapping_sub(bias));
        }
    }
    Some(functions)
}

/// Makes every function of the `old` vdso jump to its namesake in the new one at `address`.
///
/// # Errors
/// The name of a function that the new one does not have.
pub fn redirect(old: &mut [u8], new: &[u8], address: u64) -> Result<(), String> {
    let (Some(from), Some(to)) = (functions(old), functions(new)) else {
        return Err("a table of functions".into());
    };
    // Several names may share an entry; one jump each.
    for (name, offset) in from {
        let Some(target) = to.get(&name) else {
            return Err(String::from_utf8_lossy(&name).into_owned());
        };
        let Some(code) =
            usize::try_from(offset).ok().and_then(|offset| old.get_mut(offset..offset.checked_add(12)?))
        else {
            return Err(String::from_utf8_lossy(&name).into_owned());
        };
        code.copy_from_slice(&jump(address.wrapping_add(*target)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Vec<u8> {
        let maps = std::fs::read("/proc/self/maps").unwrap();
        let vma = maps
            .split(|byte| *byte == b'\n')
            .filter_map(sys::proc::parse_vma_line)
            .find(|vma| vma.name == b"[vdso]")
            .unwrap();
        let mut bytes = vec![0; (vma.end - vma.start) as usize];
        sys::memory::read_remote(std::process::id() as i32, vma.start, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_own_vdso_has_a_clock() {
        let functions = functions(&own()).unwrap();
        assert!(functions.contains_key(&b"__vdso_clock_gettime"[..]));
    }

    #[test]
    fn an_old_vdso_leads_to_the_new_one() {
        let (mut old, new) = (own(), own());
        redirect(&mut old, &new, 0x7000_0000).unwrap();
        let at = functions(&new).unwrap()[&b"__vdso_getcpu"[..]];
        assert_eq!(old[at as usize..][..12], jump(0x7000_0000 + at));
    }

    #[test]
    fn nonsense_is_no_vdso() {
        let whole = own();
        for length in 0..512 {
            functions(&whole[..length]);
        }
        assert!(functions(b"\x7fELF\x02 not really an executable").is_none());
        // Program headers at the very end of the address space.
        let mut far = whole[..64].to_vec();
        far[32..40].fill(0xff);
        assert!(functions(&far).is_none());
    }
}
