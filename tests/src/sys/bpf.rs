//! bpf(2): maps with keys and values of four bytes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const LOOKUP: i32 = 1;
const UPDATE: i32 = 2;
const GET_FD_BY_ID: i32 = 14;
const FREEZE: i32 = 22;

fn bpf(command: i32, words: &mut [u64]) -> io::Result<i64> {
    let size = size_of_val(words);
    // SAFETY: the kernel reads the attributes; keys and values that they name are live locals of four bytes, which is
    // the size of those of every map here.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, words.as_mut_ptr(), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

#[derive(Debug)]
pub struct Map(pub OwnedFd);

impl Map {
    /// # Errors
    /// Where the kernel forbids it.
    pub fn new(kind: u32, entries: u32, flags: u32) -> io::Result<Self> {
        let name = u64::from_le_bytes(*b"a_map\0\0\0");
        let mut words = [
            u64::from(kind) | 4 << 32,
            4 | u64::from(entries) << 32,
            flags.into(),
            name << 32,
            name >> 32,
            0,
        ];
        bpf(0, &mut words).map(|fd| Self(owned(fd)))
    }

    fn number(&self) -> u64 {
        self.0.as_raw_fd() as u64
    }

    pub fn get(&self, key: u32) -> io::Result<u32> {
        let mut value = 0_u32;
        bpf(LOOKUP, &mut [self.number(), (&raw const key) as u64, (&raw mut value) as u64, 0]).map(|_| value)
    }

    pub fn set(&self, key: u32, value: u32) -> io::Result<()> {
        bpf(UPDATE, &mut [self.number(), (&raw const key) as u64, (&raw const value) as u64, 0]).map(drop)
    }

    pub fn freeze(&self) -> io::Result<()> {
        bpf(FREEZE, &mut [self.number()]).map(drop)
    }

    /// Its line of this name in `fdinfo`.
    pub fn fact(&self, name: &str) -> String {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.number())).expect("fdinfo");
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
        line.trim_start_matches(':').trim().to_owned()
    }

    /// The same map, to be read alone.
    pub fn to_read(&self) -> io::Result<Self> {
        const RDONLY: u64 = 8;
        let id: u64 = self.fact("map_id").parse().expect("a number");
        bpf(GET_FD_BY_ID, &mut [id, RDONLY]).map(|fd| Self(owned(fd)))
    }
}

/// A program for sockets that lets one byte of each message through.
fn program() -> io::Result<OwnedFd> {
    const LOAD: i32 = 5;
    const SOCKET_FILTER: u64 = 1;
    // r0 = 1; exit
    let code = [0xb7_u64 | 1 << 32, 0x95];
    let mut words =
        [SOCKET_FILTER | (code.len() as u64) << 32, code.as_ptr() as u64, c"GPL".as_ptr() as u64, 0, 0, 0];
    bpf(LOAD, &mut words).map(owned)
}

/// # Errors
/// Why not.
pub fn has_programs() -> Result<(), String> {
    program().map(drop).map_err(|error| format!("no programs of eBPF here: {error}"))
}

#[track_caller]
pub fn attach_program(socket: &OwnedFd) {
    let loaded = program().expect("a program");
    let program = loaded.as_raw_fd();
    let (number, len) = (socket.as_raw_fd(), size_of::<i32>() as u32);
    // SAFETY: the kernel reads an int of a live local.
    let result = unsafe {
        libc::setsockopt(number, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, (&raw const program).cast(), len)
    };
    super::call::check("setsockopt", result);
}
