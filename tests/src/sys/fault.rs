//! Address space from underneath: probing accesses, the program break, code in data, the vdso.

use std::ffi::{CStr, c_void};
use std::io;

use super::memory::{Map, PAGE};

/// Can this process read the byte there? The kernel tries on its behalf: no signal is involved.
pub fn can_read(address: usize) -> bool {
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    // SAFETY: write(2) only reads the byte, and answers EFAULT where that is not allowed.
    let wrote = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), address as *const c_void, 1) };
    drop(reader);
    wrote == 1
}

/// Can this process write the byte there? The byte is given its own value again.
pub fn can_write(address: usize) -> bool {
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    let fd = std::os::fd::AsRawFd::as_raw_fd;
    // SAFETY: write(2) only reads the byte; read(2) puts the same value back, into a mapping of the caller to
    // which no reference exists. Both answer EFAULT where that is not allowed.
    unsafe {
        if libc::write(fd(&writer), address as *const c_void, 1) != 1 {
            return false;
        }
        libc::read(fd(&reader), address as *mut c_void, 1) == 1
    }
}

/// Moves the program break by `increment` and returns where it was.
#[track_caller]
pub fn program_break(increment: isize) -> usize {
    // SAFETY: only grows; what malloc holds below stays, and glibc copes with a break moved by others.
    let old = unsafe { libc::sbrk(increment) };
    assert_ne!(old as isize, -1, "sbrk: {}", io::Error::last_os_error());
    old as usize
}

impl Map {
    /// A mapping of the sort that grows downwards, at an address that has to be free.
    #[track_caller]
    pub fn grows_down(address: usize, length: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE refuses where something is mapped: no memory of ours changes.
        let start = unsafe { libc::mmap(address as *mut c_void, length, super::memory::RW, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        Self { address: start as usize, length }
    }
}

/// PR_SET_VMA_ANON_NAME; false where the kernel does not know it.
pub fn name_mapping(map: &Map, name: &CStr) -> bool {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    // SAFETY: the kernel copies the string, which outlives the call; the range is a mapping of the caller.
    unsafe { libc::prctl(PR_SET_VMA, 0, map.address, map.length, name.as_ptr()) == 0 }
}

/// Machine code of a function without arguments that returns `value`.
#[cfg(target_arch = "x86_64")]
pub fn code_that_returns(value: u8) -> [u8; 6] {
    // mov eax, value; ret
    [0xb8, value, 0, 0, 0, 0xc3]
}

/// Runs the code at the start of a mapping, written there by [`code_that_returns`].
pub fn run(map: &Map) -> u32 {
    // SAFETY: the mapping is executable (or this faults, which is a failed test) and holds a whole function
    // that follows the C calling convention and touches no memory.
    let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(map.address) };
    function()
}

/// Where clock_gettime of a vdso was moved to.
#[derive(Debug)]
pub struct MovedVdso {
    clock_gettime: usize,
}

/// Moves vdso and vvar elsewhere, as far as this process has them.
///
/// # Panics
/// When the kernel refuses to move them.
#[track_caller]
pub fn move_vdso() -> MovedVdso {
    let parts: Vec<_> = super::procfs::mappings("self")
        .into_iter()
        .filter(|m| m.name == "[vdso]" || m.name.starts_with("[vvar"))
        .collect();
    let (Some(first), Some(last)) = (parts.first(), parts.last()) else { panic!("no vdso is mapped") };
    let entry =
        symbol(parts.iter().find(|m| m.name == "[vdso]").expect("a vdso").start, "__vdso_clock_gettime");
    // A free place of the whole size, so that the distances between the parts stay: the code depends on them.
    let place = Map::anonymous(last.end - first.start, libc::PROT_NONE, libc::MAP_PRIVATE);
    place.unmap(0..place.length / PAGE);
    let distance = place.address.wrapping_sub(first.start);
    for part in &parts {
        let to = part.start.wrapping_add(distance) as *mut c_void;
        let length = part.end - part.start;
        // SAFETY: the target was free a moment ago and this process has one thread; glibc keeps pointers to
        // the old place, so nothing but `time_through` may ask for the time from here on (`std` does not
        // while it only sleeps and forks nothing).
        let moved = unsafe {
            libc::mremap(
                part.start as *mut c_void,
                length,
                length,
                libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED,
                to,
            )
        };
        assert!(moved != libc::MAP_FAILED, "mremap {}: {}", part.name, io::Error::last_os_error());
    }
    MovedVdso { clock_gettime: entry.wrapping_add(distance) }
}

/// Seconds of the monotonic clock, asked through the moved vdso.
pub fn time_through(vdso: &MovedVdso) -> i64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the address is that of the vdso's function of this type; it writes one live local.
    let result = unsafe {
        let function: extern "C" fn(i32, *mut libc::timespec) -> i32 =
            std::mem::transmute(vdso.clock_gettime);
        function(libc::CLOCK_MONOTONIC, &raw mut time)
    };
    assert_eq!(result, 0);
    time.tv_sec
}

/// The address of a function of an ELF image in memory, by its dynamic symbol table.
#[track_caller]
fn symbol(image: usize, name: &str) -> usize {
    fn read<T: Copy>(address: usize) -> T {
        // SAFETY: called below for addresses inside the vdso, which is mapped readable and is a whole ELF
        // file made by the kernel; T is a plain integer.
        unsafe { std::ptr::read_unaligned(address as *const T) }
    }
    // Offsets of elf(5), 64 bits: e_phoff, e_phnum; p_type, p_offset, p_vaddr; d_tag, d_val.
    let (headers, count) = (read::<u64>(image + 32) as usize, read::<u16>(image + 56) as usize);
    let header = |kind: u32| (0..count).map(|i| image + headers + i * 56).find(|h| read::<u32>(*h) == kind);
    let load = header(1).expect("PT_LOAD");
    let bias =
        image.wrapping_add(read::<u64>(load + 8) as usize).wrapping_sub(read::<u64>(load + 16) as usize);
    let dynamic = image + read::<u64>(header(2).expect("PT_DYNAMIC") + 8) as usize;
    let tag = |wanted: u64| {
        (0..64)
            .map(|i| dynamic + i * 16)
            .find(|entry| read::<u64>(*entry) == wanted)
            .map(|entry| bias.wrapping_add(read::<u64>(entry + 8) as usize))
    };
    let (strings, symbols) = (tag(5).expect("DT_STRTAB"), tag(6).expect("DT_SYMTAB"));
    for index in 1..64 {
        let entry = symbols + index * 24;
        let text = strings + read::<u32>(entry) as usize;
        // SAFETY: the string table of a well-formed image ends every name with a zero.
        let found = unsafe { CStr::from_ptr(text as *const libc::c_char) };
        if found.to_str() == Ok(name) {
            return bias.wrapping_add(read::<u64>(entry + 8) as usize);
        }
    }
    panic!("the vdso has no {name}");
}
