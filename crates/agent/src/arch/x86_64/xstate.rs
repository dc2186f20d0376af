//! The extended state: x87, SSE, AVX, AVX-512, protection keys, AMX and what comes after them.

use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// More than any processor has today: AMX tiles are 8 KiB of 11.
pub const XSTATE_MAX: usize = 1 << 16;

/// Where this processor keeps each component in the uncompacted format, which is what ptrace(2) and the
/// signal frame use. Source: Intel SDM volume 1, chapter 13.
#[derive(Debug, Clone, Copy)]
pub struct Layout;

/// Offset of the header: the components that are not in their initial state.
pub const HEADER_AT: usize = 512;
/// Where the first component behind the header may be.
pub const EXTENDED_AT: usize = 576;

impl Layout {
    /// Offset and length of `component` (2 is AVX, 5 to 7 AVX-512, 9 PKRU, 18 AMX tiles), when there is one.
    pub fn component(self, component: u32) -> Option<(usize, usize)> {
        // Asked once, of those that there are: the instruction is an expensive one in a virtual machine.
        static COMPONENTS: OnceLock<[(u32, u32); 63]> = OnceLock::new();
        let components = COMPONENTS.get_or_init(|| {
            // The leaf exists wherever the kernel keeps an extended state at all.
            let all = __cpuid_count(0xd, 0);
            let all = u64::from(all.edx) << 32 | u64::from(all.eax);
            std::array::from_fn(|component| {
                if component < 2 || all >> component & 1 == 0 {
                    return (0, 0);
                }
                let leaf = __cpuid_count(0xd, component as u32);
                (leaf.ebx, leaf.eax)
            })
        });
        let (offset, length) = *components.get(component as usize).filter(|_| component >= 2)?;
        (length != 0).then_some((offset as usize, length as usize))
    }

    /// Bytes for the components in `mask`.
    pub fn size(self, mask: u64) -> usize {
        (2..63)
            .filter(|component| mask >> component & 1 != 0)
            .filter_map(|component| self.component(component))
            .map(|(offset, length)| offset + length)
            .fold(EXTENDED_AT, usize::max)
    }
}
