//! The flags of many mappings, faster than `smaps` tells them: [`crate::each`] tells the kernel's word of each, and what its bits are called is learned from mappings of our own, made for it,
//! of which both are read. What was not learned is not known, and `smaps` is to be asked.
//!
//! Source: fs/proc/task_mmu.c, show_smap_vma_flags: a name for each bit of vm_flags.

use crate::each::{Each, Sort, Word};
use crate::memory::PAGE;
use crate::proc::VmFlags;
use crate::userfault::Userfault;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

/// Starts of the mappings of a process, in their order, each with the kernel's word of its flags.
fn words(each: &Each, pid: i32) -> Option<Vec<(u64, u64)>> {
    Some(each.of(pid)?.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

/// Bits that had been set together, and what they are called together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Class {
    bits: u64,
    names: VmFlags,
}

/// What is known of the bits.
#[derive(Debug, Default)]
struct Names(Vec<Class>);

/// The two-letter names of one mapping.
type Words = BTreeSet<[u8; 2]>;

impl Names {
    /// From mappings of which both are known. Bits and names belong together that the same ones of them have.
    fn learn(samples: &[(u64, Words)]) -> Names {
        let mut classes: BTreeMap<Vec<bool>, (u64, Words)> = BTreeMap::new();
        for bit in (0..64).map(|bit| 1u64 << bit) {
            let who: Vec<bool> = samples.iter().map(|(word, _)| word & bit != 0).collect();
            classes.entry(who).or_default().0 |= bit;
        }
        for name in samples.iter().flat_map(|(_, names)| names) {
            let who: Vec<bool> = samples.iter().map(|(_, names)| names.contains(name)).collect();
            classes.entry(who).or_default().1.insert(*name);
        }
        // A bit without a name says something that is told elsewhere, such as a protection key.
        let classes = classes
            .into_iter()
            .filter(|(who, (bits, names))| who.contains(&true) && bits.count_ones() as usize == names.len());
        Names(
            classes
                .map(|(_, (bits, names))| Class {
                    bits,
                    names: VmFlags::of(names.iter().map(|name| &name[..])),
                })
                .collect(),
        )
    }

    /// What a word says; none when it has a bit that is not known, or parts bits that are known together.
    fn read(&self, word: u64) -> Option<VmFlags> {
        let mut rest = word;
        let mut flags = VmFlags::default();
        for class in &self.0 {
            match word & class.bits {
                0 => {}
                bits if bits == class.bits => flags = flags.and(class.names),
                _ => return None,
            }
            rest &= !class.bits;
        }
        (rest == 0).then_some(flags)
    }
}

/// Mappings of a page each, unlike each other, with room between them.
struct Samples {
    base: *mut libc::c_void,
    len: usize,
    /// Watches one of them.
    _watch: Option<Userfault>,
}

impl Samples {
    fn make() -> Option<Samples> {
        const NONE: i32 = libc::PROT_NONE;
        const READ: i32 = libc::PROT_READ;
        const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
        const EXECUTE: i32 = libc::PROT_READ | libc::PROT_EXEC;
        const PRIVATE: i32 = libc::MAP_PRIVATE;
        /// Since Linux 6.11.
        const MAP_DROPPABLE: i32 = 8;
        let kinds = [
            (NONE, PRIVATE),
            (READ, PRIVATE),
            (WRITE, PRIVATE),
            (EXECUTE, PRIVATE),
            (WRITE | EXECUTE, PRIVATE),
            (NONE, PRIVATE | libc::MAP_NORESERVE),
            (WRITE, PRIVATE | libc::MAP_NORESERVE),
            (WRITE, PRIVATE | libc::MAP_GROWSDOWN),
            (WRITE, PRIVATE | libc::MAP_LOCKED),
            (READ, libc::MAP_SHARED),
            (WRITE, libc::MAP_SHARED),
            (WRITE, MAP_DROPPABLE),
        ];
        let advice = [
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_MERGEABLE,
            libc::MADV_WIPEONFORK,
            libc::MADV_SEQUENTIAL,
            libc::MADV_RANDOM,
        ];
        let page = PAGE as usize;
        // Behind one that grows down the kernel wants room.
        let step = 512 * page;
        let len = step * (kinds.len() + advice.len() + 4);
        let map = |at, len, prot, flags| {
            // SAFETY: a new mapping, or one in the place of a part of our own that nobody uses.
            unsafe { libc::mmap(at, len, prot, flags | libc::MAP_ANONYMOUS, -1, 0) }
        };
        let base = map(std::ptr::null_mut(), len, NONE, PRIVATE | libc::MAP_NORESERVE);
        if base == libc::MAP_FAILED {
            return None;
        }
        let mut samples = Samples { base, len, _watch: None };
        // What this kernel does not have fails, and is not learned.
        let mut places = (1..).map(|number| base.wrapping_byte_add(number * step));
        for ((prot, flags), at) in kinds.into_iter().zip(&mut places) {
            map(at, page, prot, flags | libc::MAP_FIXED);
        }
        for (advice, at) in advice.into_iter().zip(&mut places) {
            map(at, page, WRITE, PRIVATE | libc::MAP_FIXED);
            // SAFETY: a page that was just mapped, and that nobody uses.
            unsafe { libc::madvise(at, page, advice) };
        }
        if let Some(at) = places.next() {
            map(at, page, WRITE, PRIVATE | libc::MAP_FIXED);
            // SAFETY: as above.
            unsafe { libc::mlock2(at, page, libc::MLOCK_ONFAULT) };
        }
        // One that could be shared for writing, if the file were open for that.
        if let (Some(at), Ok(file)) = (places.next(), std::fs::File::open("/proc/self/exe")) {
            // SAFETY: as above.
            unsafe { libc::mmap(at, page, READ, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd(), 0) };
        }
        if let Some(at) = places.next() {
            map(at, page, WRITE, PRIVATE | libc::MAP_FIXED);
            samples._watch = Userfault::own().ok();
            samples._watch.as_ref().map(|watch| watch.watch(at as u64..at as u64 + PAGE));
        }
        Some(samples)
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        // SAFETY: the mapping is our own, and nobody has a reference into it.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

/// Starts of mappings with the names of their flags.
fn named(smaps: &[u8]) -> Vec<(u64, Words)> {
    let mut found: Vec<(u64, Words)> = Vec::new();
    for line in smaps.split(|byte| *byte == b'\n') {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let words = flags.split(|byte| *byte == b' ').filter_map(|word| <[u8; 2]>::try_from(word).ok());
            found.last_mut().into_iter().for_each(|(_, names)| names.extend(words.clone()));
        } else if let Some(vma) = crate::proc::parse_vma_line(line) {
            found.push((vma.start, Words::new()));
        }
    }
    found
}

/// The program, loaded once, and what the bits are called.
fn learned() -> Option<&'static (Each, Names)> {
    static LEARNED: OnceLock<Option<(Each, Names)>> = OnceLock::new();
    let learn = || {
        let member = |name| [("vm_area_struct", name)];
        let (start, flags) = (member("vm_start"), member("vm_flags"));
        let each = Each::new(Sort::Mappings, &[Word::Member(&start, 0), Word::Member(&flags, 0)])?;
        let _samples = Samples::make()?;
        let told = || words(&each, crate::process::own_pid());
        let before = told()?;
        let named = named(&std::fs::read("/proc/self/smaps").ok()?);
        let after = told()?;
        let of = |words: &[(u64, u64)], start| {
            Some(words[words.binary_search_by_key(&start, |(start, _)| *start).ok()?].1)
        };
        // Other threads may map and unmap meanwhile; what is the same on both sides of a text is what it tells of.
        let find = |start| of(&before, start).filter(|word| of(&after, start) == Some(*word));
        let samples: Vec<(u64, Words)> =
            named.into_iter().filter_map(|(start, names)| Some((find(start)?, names))).collect();
        Some((each, Names::learn(&samples)))
    };
    LEARNED.get_or_init(learn).as_ref()
}

/// Starts of the mappings of a process that stands still, in their order, with their flags; none where this kernel
/// does not tell, or one of them has a flag that was not learned.
pub fn of(pid: i32) -> Option<Vec<(u64, VmFlags)>> {
    let (each, names) = learned()?;
    let mut last = None;
    let mut found = Vec::new();
    for (start, word) in words(each, pid)? {
        let flags = match last {
            Some((same, flags)) if same == word => flags,
            _ => names.read(word)?,
        };
        last = Some((word, flags));
        found.push((start, flags));
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn letters(text: &str) -> Words {
        text.split(" ").filter_map(|word| word.as_bytes().try_into().ok()).collect()
    }

    #[test]
    fn bits_and_names_that_the_same_mappings_have_belong_together() {
        let samples = [
            (0b0_0111, letters("rd mr gd")),
            (0b0_1011, letters("rd mr lo")),
            (0b0_0011, letters("rd mr")),
            (0b1_1000, letters("lo")),
            (0b0_0000, letters("")),
        ];
        let names = Names::learn(&samples);
        let has = |word, flag| names.read(word).map(|flags: VmFlags| flags.has(flag));
        assert_eq!((has(0b0111, "gd"), has(0b0111, "lo")), (Some(true), Some(false)));
        assert_eq!(has(0b1100, "lo"), Some(true));
        // Known together alone; without a name; never seen.
        assert_eq!(names.read(0b0001), None);
        assert_eq!(names.read(0b1_0000), None);
        assert_eq!(names.read(0b10_0000), None);
        assert_eq!(names.read(0), Some(VmFlags::default()));
    }

    #[test]
    fn what_is_learned_is_what_smaps_says() {
        let pid = crate::process::own_pid();
        let Some((each, names)) = learned() else { return println!("SKIP: no BPF iterators here") };
        assert!(names.0.iter().any(|class| class.names.has("gd")), "{names:x?}");
        for flag in ["dc", "dd", "hg", "nh", "wf", "sr", "rr", "nr", "lo", "de", "uw"] {
            let classes = names.0.iter().filter(|class| class.names.has(flag));
            assert_eq!(
                classes.map(|class| class.bits.count_ones()).collect::<Vec<_>>(),
                [1],
                "{flag} in {names:x?}"
            );
        }
        // What may be shared for writing, and what could be if its file were open for that (VM_SHARED, VM_MAYSHARE).
        assert!([0x8, 0x80].iter().all(|bit| names.0.iter().any(|class| class.bits == *bit)), "{names:x?}");
        let words = || words(each, pid).expect("words of our own");
        let found = words();
        let mut parser = crate::proc::SmapsParser::default();
        parser.feed(&std::fs::read("/proc/self/smaps").unwrap());
        let vmas = parser.finish().unwrap();
        let afterwards = words();
        let mut same = 0;
        for vma in vmas {
            // Other tests map and unmap meanwhile: most of those that are files stay as they are.
            if let Ok(at) = found.binary_search_by_key(&vma.start, |(start, _)| *start)
                && vma.inode != 0
                && afterwards.contains(&found[at])
            {
                assert_eq!(
                    names.read(found[at].1),
                    Some(vma.flags),
                    "{:x?} {vma:?} in {names:x?}",
                    found[at]
                );
                same += 1;
            }
        }
        assert!(same > 3);
    }
}
