//! bpf(2): maps that are arrays or hash tables.

use crate::call::check;
use model::Errno;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Commands. Source: include/uapi/linux/bpf.h.
const MAP_CREATE: i32 = 0;
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const MAP_GET_NEXT_KEY: i32 = 4;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const MAP_FREEZE: i32 = 22;

pub const HASH: u32 = 1;
pub const ARRAY: u32 = 2;
pub const PERCPU_ARRAY: u32 = 6;

/// Makes a call with attributes in words of eight.
///
/// # Safety
/// Addresses among the words must be those of memory as large as the command takes it to be.
pub(crate) unsafe fn bpf(command: i32, attributes: &mut [u64]) -> Result<i64, Errno> {
    let (at, size) = (attributes.as_mut_ptr(), size_of_val(attributes));
    // SAFETY: the kernel reads the attributes; for memory that they name the caller vouches.
    check("bpf", unsafe { libc::syscall(libc::SYS_bpf, command, at, size) })
}

pub(crate) fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

pub(crate) fn number(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd() as u32
}

/// Takes ownership of a number that the kernel has just returned for a new descriptor.
pub(crate) fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the callers have it from the kernel, which made it for us alone.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

fn refused(code: i32) -> Errno {
    Errno { call: "bpf", code }
}

/// What a map is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shape {
    pub kind: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
    pub extra: u64,
    /// Ends with zeros.
    pub name: [u8; 16],
}

/// A map, whose shape is what the kernel says.
#[derive(Debug)]
pub struct Map<F> {
    pub fd: F,
    pub shape: Shape,
    pub id: u32,
    /// It is for programs on this network device.
    pub device: u32,
}

impl<F: AsFd> Map<F> {
    /// Asks what a map is. Source: BPF_OBJ_GET_INFO_BY_FD, struct bpf_map_info.
    pub fn of(fd: F) -> Result<Map<F>, Errno> {
        let mut info = [0u32; 22];
        let mut words = [pair(number(&fd), size_of_val(&info) as u32), info.as_mut_ptr() as u64];
        // SAFETY: the kernel writes at most as much as the length says, which is that of the array.
        unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut words) }?;
        let [kind, id, key_size, value_size, max_entries, flags, ..] = info;
        let mut shape = Shape { kind, key_size, value_size, max_entries, flags, ..Shape::default() };
        for (to, from) in shape.name.chunks_mut(4).zip(&info[6..10]) {
            to.copy_from_slice(&from.to_ne_bytes());
        }
        shape.extra = pair(info[20], info[21]);
        Ok(Map { fd, shape, id, device: info[10] })
    }

    /// Does a value lie in memory as its size says, and not once for each processor?
    fn is_plain(&self) -> bool {
        matches!(self.shape.kind, HASH | ARRAY) && self.shape.key_size > 0 && self.shape.value_size > 0
    }

    /// All keys and values, of a map that nobody changes.
    ///
    /// # Errors
    /// `EPERM` when the descriptor is for writing alone; `EINVAL` for other sorts of maps.
    pub fn content(&self) -> Result<(Vec<u8>, Vec<u8>), Errno> {
        if !self.is_plain() {
            return Err(refused(libc::EINVAL));
        }
        let Shape { key_size, value_size, max_entries, .. } = self.shape;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let (mut key, mut next) = (vec![0u8; key_size as usize], vec![0u8; key_size as usize]);
        let mut value = vec![0u8; value_size as usize];
        for nth in 0..=max_entries {
            let from = if nth > 0 { key.as_ptr() as u64 } else { 0 };
            let mut words = [number(&self.fd).into(), from, next.as_mut_ptr() as u64];
            // SAFETY: both keys are as long as those of the map.
            match unsafe { bpf(MAP_GET_NEXT_KEY, &mut words) } {
                Err(error) if error.code == libc::ENOENT => return Ok((keys, values)),
                result => result?,
            };
            std::mem::swap(&mut key, &mut next);
            let mut words = [number(&self.fd).into(), key.as_ptr() as u64, value.as_mut_ptr() as u64, 0];
            // SAFETY: key and value are as long as those of the map.
            unsafe { bpf(MAP_LOOKUP_ELEM, &mut words) }?;
            keys.extend_from_slice(&key);
            values.extend_from_slice(&value);
        }
        // More than there can be: somebody changes it.
        Err(refused(libc::EBUSY))
    }

    /// Sets values.
    ///
    /// # Errors
    /// `EINVAL` when they are not of the shape of this map.
    pub fn fill(&self, keys: &[u8], values: &[u8]) -> Result<(), Errno> {
        let (key_size, value_size) = (self.shape.key_size as usize, self.shape.value_size as usize);
        if !self.is_plain() || keys.len() / key_size != values.len() / value_size {
            return Err(refused(libc::EINVAL));
        }
        for (key, value) in keys.chunks_exact(key_size).zip(values.chunks_exact(value_size)) {
            let mut words = [number(&self.fd).into(), key.as_ptr() as u64, value.as_ptr() as u64, 0];
            // SAFETY: key and value are as long as those of the map.
            unsafe { bpf(MAP_UPDATE_ELEM, &mut words) }?;
        }
        Ok(())
    }

    /// Nobody writes to it by system calls any more. Source: BPF_MAP_FREEZE, Linux 5.2.
    pub fn freeze(&self) -> Result<(), Errno> {
        // SAFETY: no addresses.
        unsafe { bpf(MAP_FREEZE, &mut [number(&self.fd).into()]) }.map(drop)
    }

    /// Another descriptor of it; `access` is BPF_F_RDONLY, BPF_F_WRONLY, or none for both.
    pub fn reopen(&self, access: u32) -> Result<OwnedFd, Errno> {
        let mut words = [pair(self.id, 0), pair(access, 0)];
        // SAFETY: no addresses.
        unsafe { bpf(MAP_GET_FD_BY_ID, &mut words) }.map(owned)
    }
}

impl Map<OwnedFd> {
    /// Makes a map. Source: BPF_MAP_CREATE.
    pub fn new(shape: &Shape) -> Result<Map<OwnedFd>, Errno> {
        // map_type, key_size, value_size, max_entries, map_flags, inner_map_fd, numa_node, map_name, ifindex, three of
        // types, two more, map_extra.
        let mut halves = [0u32; 18];
        halves[..5].copy_from_slice(&[
            shape.kind,
            shape.key_size,
            shape.value_size,
            shape.max_entries,
            shape.flags,
        ]);
        for (to, from) in halves[7..11].iter_mut().zip(shape.name.chunks_exact(4)) {
            *to = u32::from_ne_bytes(from.try_into().expect("four bytes"));
        }
        (halves[16], halves[17]) = (shape.extra as u32, (shape.extra >> 32) as u32);
        let mut words: Vec<u64> = halves.chunks_exact(2).map(|two| pair(two[0], two[1])).collect();
        // SAFETY: no addresses.
        Map::of(owned(unsafe { bpf(MAP_CREATE, &mut words) }?))
    }
}
