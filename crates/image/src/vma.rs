//! The bits of `VmaEntry::status`, and how a mapping is told from them.

pub const REGULAR: u32 = 1 << 0;
pub const STACK: u32 = 1 << 1;
pub const VSYSCALL: u32 = 1 << 2;
pub const VDSO: u32 = 1 << 3;
pub const HEAP: u32 = 1 << 5;
pub const FILE_PRIVATE: u32 = 1 << 6;
pub const FILE_SHARED: u32 = 1 << 7;
pub const ANON_SHARED: u32 = 1 << 8;
pub const ANON_PRIVATE: u32 = 1 << 9;
pub const SYSV: u32 = 1 << 10;
pub const SOCKET: u32 = 1 << 11;
pub const VVAR: u32 = 1 << 12;
pub const AIO_RING: u32 = 1 << 13;
pub const MEMFD: u32 = 1 << 14;
pub const SHADOW_STACK: u32 = 1 << 15;
/// A range of guard markers inside other mappings, not a mapping; listed after all of those.
pub const GUARD: u32 = 1 << 16;
pub const UPROBES: u32 = 1 << 17;

/// Everything that an image of this version may hold.
pub const CARRIED: u32 = REGULAR
    | STACK
    | VSYSCALL
    | VDSO
    | HEAP
    | FILE_PRIVATE
    | FILE_SHARED
    | ANON_SHARED
    | ANON_PRIVATE
    | SYSV
    | VVAR
    | AIO_RING
    | MEMFD
    | GUARD;
