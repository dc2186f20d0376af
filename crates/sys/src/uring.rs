//! io_uring: setup, registration, and what a ring looks like in memory.

use crate::call::check;
use crate::inside::{Inside, inside, types};
use crate::memory::{PAGE, SharedMap, memfd};
use model::Errno;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

pub mod armed;

/// Flags of io_uring_setup(2). Source: include/uapi/linux/io_uring.h.
pub mod setup {
    pub const IOPOLL: u32 = 1;
    pub const SQPOLL: u32 = 1 << 1;
    pub const SQ_AFF: u32 = 1 << 2;
    pub const CQSIZE: u32 = 1 << 3;
    pub const ATTACH_WQ: u32 = 1 << 5;
    pub const R_DISABLED: u32 = 1 << 6;
    pub const SUBMIT_ALL: u32 = 1 << 7;
    pub const COOP_TASKRUN: u32 = 1 << 8;
    pub const TASKRUN_FLAG: u32 = 1 << 9;
    pub const SQE128: u32 = 1 << 10;
    pub const CQE32: u32 = 1 << 11;
    pub const SINGLE_ISSUER: u32 = 1 << 12;
    pub const DEFER_TASKRUN: u32 = 1 << 13;
    pub const NO_MMAP: u32 = 1 << 14;
    pub const NO_SQARRAY: u32 = 1 << 16;
    pub const HYBRID_IOPOLL: u32 = 1 << 17;
}

/// Operations of io_uring_register(2).
pub mod register {
    pub const BUFFERS: u32 = 0;
    pub const FILES: u32 = 2;
    pub const EVENTFD: u32 = 4;
    pub const EVENTFD_ASYNC: u32 = 7;
    pub const PERSONALITY: u32 = 9;
    pub const UNREGISTER_PERSONALITY: u32 = 10;
    pub const RESTRICTIONS: u32 = 11;
    pub const ENABLE_RINGS: u32 = 12;
    pub const RING_FDS: u32 = 20;
    pub const PBUF_RING: u32 = 22;
    pub const PBUF_STATUS: u32 = 26;
    pub const NAPI: u32 = 27;
}

/// Where the words of a ring are: `struct io_rings`. Source: include/linux/io_uring_types.h.
pub mod ring {
    pub const SQ_HEAD: usize = 0;
    pub const SQ_TAIL: usize = 4;
    pub const CQ_HEAD: usize = 8;
    pub const CQ_TAIL: usize = 12;
    pub const SQ_DROPPED: usize = 32;
    pub const SQ_FLAGS: usize = 36;
    /// Of those: the thread that looks for requests has to be woken.
    pub const NEED_WAKEUP: u32 = 1;
    pub const CQ_FLAGS: usize = 40;
    pub const CQ_OVERFLOW: usize = 44;
    pub const CQES: usize = 64;
}

/// Offsets for mmap(2).
pub const RINGS_AT: u64 = 0;
pub const SQES_AT: u64 = 0x1000_0000;

/// Where the kernel's memory of a ring of provided buffers is.
pub fn group_at(group: u16) -> u64 {
    0x8000_0000 | u64::from(group) << 16
}

/// A request: `struct io_uring_sqe`, the first half of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Request {
    pub operation: u8,
    pub flags: u8,
    /// Flags of some operations, in the place of a priority.
    pub priority: u16,
    pub fd: i32,
    pub offset: u64,
    pub address: u64,
    pub len: u32,
    /// Flags of most operations, or events.
    pub more: u32,
    /// What its completions tell.
    pub data: u64,
    pub group: u16,
    /// Where among the registered files a new one is put.
    pub file_index: u32,
}

impl Request {
    pub fn bytes(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..2].copy_from_slice(&[self.operation, self.flags]);
        bytes[2..4].copy_from_slice(&self.priority.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.fd.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.offset.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.address.to_ne_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_ne_bytes());
        bytes[28..32].copy_from_slice(&self.more.to_ne_bytes());
        bytes[32..40].copy_from_slice(&self.data.to_ne_bytes());
        bytes[40..42].copy_from_slice(&self.group.to_ne_bytes());
        bytes[44..48].copy_from_slice(&self.file_index.to_ne_bytes());
        bytes
    }
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Params {
    pub sq_entries: u32,
    pub cq_entries: u32,
    pub flags: u32,
    pub sq_thread_cpu: u32,
    pub sq_thread_idle: u32,
    pub features: u32,
    pub wq_fd: u32,
    pub resv: [u32; 3],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, ...
    pub sq_off: [u32; 10],
    /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, ...
    pub cq_off: [u32; 10],
}

impl Params {
    /// As they lie in memory.
    pub fn bytes(&self) -> Vec<u8> {
        let words = [
            self.sq_entries,
            self.cq_entries,
            self.flags,
            self.sq_thread_cpu,
            self.sq_thread_idle,
            self.features,
            self.wq_fd,
        ];
        let words = words.iter().chain(&self.resv).chain(&self.sq_off).chain(&self.cq_off);
        words.flat_map(|word| word.to_ne_bytes()).collect()
    }
}

const _: () = assert!(size_of::<Params>() == 120 && std::mem::offset_of!(Params, cq_off) == 80);

/// Makes a ring.
///
/// # Errors
/// `EPERM` where `kernel.io_uring_disabled` forbids it; `EINVAL` for flags that the kernel does not know.
///
/// Source: io_uring_setup(2).
pub fn new(params: &mut Params) -> Result<OwnedFd, Errno> {
    let entries = params.sq_entries;
    // SAFETY: the kernel reads and writes the params, which live for the call.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, &raw mut *params) };
    let fd = check("io_uring_setup", fd)?;
    // SAFETY: a descriptor that the kernel just made for us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    crate::fd::fcntl(&fd, libc::F_SETFD, libc::FD_CLOEXEC)?;
    Ok(fd)
}

/// Can one request take many buffers at a time? Linux 6.10.
pub fn has_bundles() -> bool {
    const FEAT_RECVSEND_BUNDLE: u32 = 1 << 14;
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let mut params = Params { sq_entries: 1, ..Params::default() };
        new(&mut params).is_ok() && params.features & FEAT_RECVSEND_BUNDLE != 0
    })
}

/// Submits entries of a ring of our own; returns how many. A thread of the kernel that takes them (SQPOLL) is woken.
///
/// # Errors
/// `EBADFD` when the ring is not enabled yet; `EOWNERDEAD` when that thread is no more.
///
/// Source: io_uring_enter(2).
pub fn submit(ring: impl AsFd, count: u32) -> Result<u32, Errno> {
    const SQ_WAKEUP: u32 = 1 << 1;
    enter(ring, count, SQ_WAKEUP)
}

fn enter(ring: impl AsFd, count: u32, flags: u32) -> Result<u32, Errno> {
    let ring = ring.as_fd().as_raw_fd();
    // SAFETY: integers and a null pointer; the entries are the caller's own, and name no memory.
    let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, ring, count, 0, flags, 0usize, 0) };
    check("io_uring_enter", done).map(|done| done as u32)
}

/// Is it not enabled yet? Nothing is submitted, and nobody woken.
pub fn is_disabled(ring: impl AsFd) -> bool {
    enter(ring, 0, 0).is_err_and(|error| error.code == libc::EBADFD)
}

/// The error of a registration whose argument lies nowhere: `EFAULT` when everything else was right.
pub fn refusal(ring: impl AsFd, operation: u32) -> i32 {
    const NOWHERE: usize = 1;
    let ring = ring.as_fd().as_raw_fd();
    // SAFETY: the kernel can read nothing at this address, so that nothing is registered.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, NOWHERE, 1) };
    check("io_uring_register", result).err().map_or(0, |error| error.code)
}

/// Makes a registration of which the kernel reads `count` records; returns what it says.
///
/// # Errors
/// Those of the operation.
///
/// Source: io_uring_register(2).
fn register(ring: impl AsFd, operation: u32, records: &[u8], count: usize) -> Result<i64, Errno> {
    let ring = ring.as_fd().as_raw_fd();
    let argument = if records.is_empty() { std::ptr::null() } else { records.as_ptr() };
    // SAFETY: the kernel reads as many records as there are in memory of the caller's, and keeps no address.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, argument, count) };
    check("io_uring_register", result)
}

/// Has a ring that is not enabled yet allow these things alone, from then on.
///
/// # Errors
/// `EBADFD` for one that is enabled.
pub fn restrict(ring: impl AsFd, restrictions: &Restrictions) -> Result<(), Errno> {
    let records = restrictions.records();
    register(ring, register::RESTRICTIONS, &records.concat(), records.len()).map(drop)
}

/// Enables a ring that was made without.
pub fn enable(ring: impl AsFd) -> Result<(), Errno> {
    register(ring, register::ENABLE_RINGS, &[], 0).map(drop)
}

/// Registers the credentials of the calling thread; returns their number, the next that is free.
pub fn register_personality(ring: impl AsFd) -> Result<u32, Errno> {
    register(ring, register::PERSONALITY, &[], 0).map(|number| number as u32)
}

/// Forgets one.
pub fn forget_personality(ring: impl AsFd, number: u32) -> Result<(), Errno> {
    register(ring, register::UNREGISTER_PERSONALITY, &[], number as usize).map(drop)
}

/// Is there a ring of provided buffers with this number? Source: io_uring_register(2), Linux 6.8.
pub fn has_buffers(ring: impl AsFd, group: u16) -> bool {
    // struct io_uring_buf_status: group, head, reserved.
    let mut status = [0u32; 10];
    status[0] = group.into();
    let (ring, operation) = (ring.as_fd().as_raw_fd(), register::PBUF_STATUS);
    // SAFETY: the kernel reads and writes 40 bytes on this stack.
    let result =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, status.as_mut_ptr(), 1) };
    // A group of the older sort is refused with EINVAL, which a kernel without the question answers for all.
    result == 0
}

/// `struct io_uring_buf_reg`: a ring of provided buffers, in the program's memory or, without an address, in the kernel's.
pub fn buffer_ring(group: u16, entries: u32, address: Option<u64>, is_incremental: bool) -> [u8; 40] {
    let flags = u16::from(address.is_none()) | u16::from(is_incremental) << 1;
    let mut bytes = [0; 40];
    bytes[..8].copy_from_slice(&address.unwrap_or(0).to_ne_bytes());
    bytes[8..12].copy_from_slice(&entries.to_ne_bytes());
    bytes[12..14].copy_from_slice(&group.to_ne_bytes());
    bytes[14..16].copy_from_slice(&flags.to_ne_bytes());
    bytes
}

/// Registers it with a ring.
///
/// # Errors
/// `EEXIST` when the number is taken; `EINVAL` for a count that is no power of two.
///
/// Source: io_uring_register(2) IORING_REGISTER_PBUF_RING.
pub fn register_buffers(ring: impl AsFd, what: &[u8; 40]) -> Result<(), Errno> {
    let (ring, operation) = (ring.as_fd().as_raw_fd(), register::PBUF_RING);
    // SAFETY: the kernel reads 40 bytes; memory that they name is the caller's, who keeps it as long as the ring.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, what.as_ptr(), 1) };
    check("io_uring_register", result).map(drop)
}

/// How many descriptors of rings a thread can register. Source: include/linux/io_uring_types.h.
pub const RINGFD_REG_MAX: u32 = 16;

/// What the kernel keeps of a ring and tells nobody but its tracing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inner {
    /// With what flags it was made; R_DISABLED only as long as it is.
    pub setup: u32,
    /// The number of the registered eventfd, which its own `fdinfo` tells as well; is it for what ends later alone?
    pub eventfd: Option<(u32, bool)>,
    pub has_buffer_groups: bool,
    pub has_personalities: bool,
    /// What is allowed, or will be when it is enabled.
    pub restrictions: Option<Restrictions>,
    /// Requests that wait for a time, which may come again and again.
    pub has_timeouts: bool,
    /// The thread of the kernel that looks for requests.
    pub sq_thread: Option<SqThread>,
    context: u64,
}

/// What may be asked of a ring. Source: io_uring_register(2) IORING_REGISTER_RESTRICTIONS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restrictions {
    /// Bit n: registration n, or operation n, is allowed.
    pub registrations: u64,
    pub operations: u64,
    /// Flags that a request may have, and must have.
    pub flags_allowed: u8,
    pub flags_required: u8,
}

impl Restrictions {
    /// None inside where there are none; none at all where there are more than is known.
    fn of(inside: &Inside, address: u64) -> Option<Option<Restrictions>> {
        const RESTRICTION: &str = "io_restriction";
        let at = |member: &str| inside.at(address, RESTRICTION, member);
        let word = |member: &str| inside.long(at(member)?);
        let byte = |member: &str| inside.int(at(member)?).map(|word| word as u8);
        let is_known = [("register_op", "sqe_op"), ("sqe_op", "sqe_flags_allowed")]
            .iter()
            .all(|(one, next)| at(one).zip(at(next)).is_some_and(|(one, next)| next - one == 8));
        if byte("registered")? == 0 {
            return Some(None);
        }
        is_known.then_some(())?;
        Some(Some(Restrictions {
            registrations: word("register_op")?,
            operations: word("sqe_op")?,
            flags_allowed: byte("sqe_flags_allowed")?,
            flags_required: byte("sqe_flags_required")?,
        }))
    }

    /// An array of `struct io_uring_restriction`: what, which, reserved.
    pub fn records(&self) -> Vec<[u8; 16]> {
        const REGISTER_OP: u16 = 0;
        const SQE_OP: u16 = 1;
        const FLAGS_ALLOWED: u16 = 2;
        const FLAGS_REQUIRED: u16 = 3;
        let record = |what: u16, which: u8| {
            let mut bytes = [0; 16];
            bytes[..2].copy_from_slice(&what.to_ne_bytes());
            bytes[2] = which;
            bytes
        };
        let each = |what: u16, bits: u64| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| record(what, bit))
        };
        let flags = [record(FLAGS_ALLOWED, self.flags_allowed), record(FLAGS_REQUIRED, self.flags_required)];
        each(REGISTER_OP, self.registrations).chain(each(SQE_OP, self.operations)).chain(flags).collect()
    }
}

/// A thread of the kernel that looks for requests (SQPOLL), and what it has for one ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SqThread {
    /// What rings have in common that share it.
    pub data: u64,
    /// The `task_struct` of the thread, zero when it has ended, and that of the leader of its process.
    pub task: u64,
    pub leader: u64,
    /// How long it looks before it sleeps, in milliseconds.
    pub idle_ms: u32,
    /// Does it run on one processor alone (SQ_AFF)?
    pub is_bound: bool,
    /// Where the kernel has the credentials (`struct cred`) of the ring's requests.
    pub cred: u64,
}

impl SqThread {
    fn of(inside: &Inside, context: u64, setup: u32) -> Option<SqThread> {
        const CONTEXT: &str = "io_ring_ctx";
        let data = inside.member(context, CONTEXT, "sq_data")?;
        let task = inside.member(data, "io_sq_data", "thread")?;
        let idle = inside.int(inside.at(context, CONTEXT, "sq_thread_idle")?)?;
        Some(SqThread {
            data,
            task,
            leader: if task == 0 { 0 } else { inside.member(task, "task_struct", "group_leader")? },
            idle_ms: crate::clock::ticks_to_ms(idle),
            is_bound: setup & setup::SQ_AFF != 0,
            cred: inside.member(context, CONTEXT, "sq_creds")?,
        })
    }

    /// Does it sleep until it is woken?
    pub fn sleeps(&self) -> Option<bool> {
        let inside = inside()?;
        Some(inside.int(inside.at(self.task, "task_struct", "on_rq")?)? == 0)
    }
}

impl Inner {
    /// Of the ring behind a descriptor of a process that stands still, with so many entries; none where the kernel
    /// does not tell, or has other structures by now.
    pub fn of(pid: i32, number: i32, sq_entries: u32, cq_entries: u32) -> Option<Inner> {
        const CONTEXT: &str = "io_ring_ctx";
        let inside = inside()?;
        let context = inside.member(inside.file(pid, number)?, "file", "private_data")?;
        let int = |member: &str| inside.int(inside.at(context, CONTEXT, member)?);
        let is_there =
            |array: &str| Some(inside.member(inside.at(context, CONTEXT, array)?, "xarray", "xa_head")? != 0);
        if (int("sq_entries")?, int("cq_entries")?) != (sq_entries, cq_entries) {
            return None;
        }
        let eventfd = match inside.member(context, CONTEXT, "io_ev_fd")? {
            0 => None,
            registered => {
                let counter = inside.member(registered, "io_ev_fd", "cq_ev_fd")?;
                let is_async = inside.int(inside.at(registered, "io_ev_fd", "eventfd_async")?)? & 1 != 0;
                Some((inside.int(inside.at(counter, "eventfd_ctx", "id")?)?, is_async))
            }
        };
        let timeouts = inside.at(context, CONTEXT, "timeout_list");
        let setup = int("flags")?;
        let restrictions = inside.at(context, CONTEXT, "restrictions")?;
        Some(Inner {
            setup,
            eventfd,
            has_buffer_groups: is_there("io_bl_xa")?,
            has_personalities: is_there("personalities")?,
            restrictions: Restrictions::of(inside, restrictions)?,
            // An empty list leads to itself.
            has_timeouts: timeouts.is_some_and(|list| inside.long(list) != Some(list)),
            sq_thread: match setup & setup::SQPOLL {
                0 => None,
                _ => Some(SqThread::of(inside, context, setup)?),
            },
            context,
        })
    }

    /// What its program has provided of buffers and the kernel has not taken yet.
    pub fn groups(&self) -> Option<Vec<Group>> {
        const GROUP: &str = "io_buffer_list";
        const IS_RING: u16 = 1;
        const IS_INCREMENTAL: u16 = 2;
        const IS_OF_USER: u32 = 2;
        let inside = inside()?;
        let group = |address: u64| {
            let half = |member: &str| inside.half(address, GROUP, member);
            // Since Linux 6.14 the memory has a structure of its own, and the flags are these.
            let region = inside.at(address, GROUP, "region")?;
            let flags = half("flags")?;
            let buffers = match flags & IS_RING {
                0 => Buffers::Listed(listed(inside.at(address, GROUP, "buf_list")?)?),
                _ => {
                    let int = |member: &str| inside.int(inside.at(region, "io_mapped_region", member)?);
                    let (count, pages) =
                        (int("nr_pages")?, inside.member(region, "io_mapped_region", "pages")?);
                    let page = |nth: u32| inside.long(pages.checked_add(u64::from(nth) * 8)?);
                    Buffers::Ring {
                        entries: half("nr_entries")?.into(),
                        head: half("head")?,
                        is_incremental: flags & IS_INCREMENTAL != 0,
                        pages: match int("flags")? & IS_OF_USER {
                            0 => None,
                            _ => Some((0..count).map(page).collect::<Option<_>>()?),
                        },
                    }
                }
            };
            Some(Group { id: half("bgid")?, buffers })
        };
        let groups = inside.entries(inside.at(self.context, "io_ring_ctx", "io_bl_xa")?)?;
        groups.into_iter().map(|(_, address)| group(address)).collect()
    }

    /// The registered personalities: number, and where the kernel has the credentials (`struct cred`).
    pub fn personalities(&self) -> Option<Vec<(u64, u64)>> {
        let inside = inside()?;
        inside.entries(inside.at(self.context, "io_ring_ctx", "personalities")?)
    }

    /// The `struct file` of each registered file, zero for none.
    pub fn files(&self) -> Option<Vec<u64>> {
        /// What is kept in the lowest bits. Source: io_uring/filetable.h.
        const FLAGS: u64 = 3;
        let inside = inside()?;
        let table = inside.at(self.context, "io_ring_ctx", "file_table")?;
        let data = inside.at(table, "io_file_table", "data")?;
        let count = inside.int(inside.at(data, "io_rsrc_data", "nr")?)?;
        let nodes = inside.member(data, "io_rsrc_data", "nodes")?;
        let file = |index: u32| {
            let node = inside.long(nodes.checked_add(u64::from(index) * 8)?)?;
            Some(if node == 0 { 0 } else { inside.member(node, "io_rsrc_node", "file_ptr")? & !FLAGS })
        };
        (0..count).map(file).collect()
    }
}

/// The `struct file` of each descriptor of a ring that a thread has registered, by index.
pub fn registered_rings(tid: i32) -> Option<[u64; RINGFD_REG_MAX as usize]> {
    let inside = inside()?;
    let own = inside.member(inside.task(tid)?, "task_struct", "io_uring")?;
    let mut rings = [0; RINGFD_REG_MAX as usize];
    if own != 0 {
        let first = inside.at(own, "io_uring_task", "registered_rings")?;
        for (index, ring) in (0..).zip(&mut rings) {
            *ring = inside.long(first + index * 8)?;
        }
    }
    Some(rings)
}

/// How many requests of a thread, which stands still, are under way, in whatever rings.
pub fn in_flight(tid: i32) -> Option<i64> {
    in_flight_of(inside()?.task(tid)?)
}

/// The same by its `task_struct`.
pub fn in_flight_of(task: u64) -> Option<i64> {
    const TASK: &str = "io_uring_task";
    const COUNTER: &str = "percpu_counter";
    let inside = inside()?;
    let own = inside.member(task, "task_struct", "io_uring")?;
    if own == 0 {
        return Some(0);
    }
    let counter = inside.at(own, TASK, "inflight")?;
    let mut count = inside.member(counter, COUNTER, "count")? as i64;
    let parts = inside.member(counter, COUNTER, "counters")?;
    for shift in (0..).map_while(|processor| inside.shift(processor)) {
        count += i64::from(inside.int(parts.wrapping_add(shift))? as i32);
    }
    // Some are counted in advance.
    Some(count - i64::from(inside.int(inside.at(own, TASK, "cached_refs")?)? as i32))
}

/// Buffers that a program has provided under one number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub id: u16,
    pub buffers: Buffers,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Buffers {
    /// Handed over one by one (IORING_OP_PROVIDE_BUFFERS): the next to be taken comes first.
    Listed(Vec<Buffer>),
    /// In a ring (IORING_REGISTER_PBUF_RING).
    Ring {
        entries: u32,
        /// Of the next to be taken: it goes on counting beyond `entries`.
        head: u16,
        is_incremental: bool,
        /// Where the kernel describes the program's memory, page by page (see [`frame`]); none if it is the kernel's.
        pages: Option<Vec<u64>>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    pub id: u16,
}

/// Those of a list that begins there.
fn listed(head: u64) -> Option<Vec<Buffer>> {
    const BUFFER: &str = "io_buffer";
    let inside = inside()?;
    let within = types()?.offset(BUFFER, "list")?;
    let mut buffers = Vec::new();
    for node in inside.nodes(head, head) {
        let buffer = node?.checked_sub(within)?;
        let len = inside.int(inside.at(buffer, BUFFER, "len")?)?;
        let (address, id) = (inside.member(buffer, BUFFER, "addr")?, inside.half(buffer, BUFFER, "bid")?);
        buffers.push(Buffer { address, len, id });
        // Numbers have 16 bits.
        if buffers.len() > 1 << 16 {
            return None;
        }
    }
    Some(buffers)
}

/// The frame of memory that the kernel describes at this address (`struct page`), as `/proc/PID/pagemap` counts them.
pub fn frame(page: u64) -> Option<u64> {
    static FIRST: OnceLock<Option<u64>> = OnceLock::new();
    let size = types()?.size("page")?;
    // Where frame 0 is described differs from boot to boot. Of one of our own both are known.
    let find = || {
        let memory = SharedMap::new(memory_of_own()?, 0, PAGE as usize).ok()?;
        memory.write(0, &[1]);
        let ring = new(&mut Params { sq_entries: 1, ..Params::default() }).ok()?;
        register_buffers(&ring, &buffer_ring(0, 1, Some(memory.address(0)), false)).ok()?;
        let own = crate::process::own_pid();
        let inner = Inner::of(own, ring.as_raw_fd(), 1, 2)?;
        let group = inner.groups()?.pop()?;
        let Buffers::Ring { pages: Some(pages), .. } = group.buffers else { return None };
        let frame = crate::pagemap::own_frame(memory.address(0))?;
        pages.first()?.checked_sub(frame * size)
    };
    let first = FIRST.get_or_init(find).as_ref()?;
    Some(page.checked_sub(*first)? / size)
}

fn memory_of_own() -> Option<OwnedFd> {
    let fd = memfd(c"crtools-page", false).ok()?;
    crate::fd::truncate(&fd, PAGE).ok()?;
    Some(fd)
}
