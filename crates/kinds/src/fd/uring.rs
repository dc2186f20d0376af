//! io_uring(7): rings through which a program and the kernel hand each other requests and completions.
//!
//! Read from: `fdinfo` (sizes, counters, registered files and buffers), the rings themselves, what threads of the
//! process are answered when they ask for what cannot be had, and what the kernel tells its tracing ([`Inner`]).
//! Rebuilt by: io_uring_setup(2), as many empty requests as it takes for the counters to be where they were, then
//! the content of the rings; in the task io_uring_register(2) of buffers and files. Its mappings: [`crate::vma`].
//! Provided buffers: [`buffers`]. The kernel's thread and personalities: [`identity`]. Requests that wait: [`armed`].
//! Refused: other requests in flight, after some waiting; rings in the program's own memory; registered files, eventfds and
//! rings that nobody has open. Where the kernel tells no types to its tracing, also SQPOLL, IOPOLL, restrictions in use,
//! provided buffers, and every registered eventfd or ring.
//! Not kept: SINGLE_ISSUER and DEFER_TASKRUN of a ring in use, see `docs/decisions/0019-io-uring.md`; where the kernel tells
//! no types, also SUBMIT_ALL, COOP_TASKRUN, personalities, restrictions, provided buffers with large numbers.

use crate::contract::{ArmCx, DumpCx, Errand, FdKind, FdProbe, FileTable, OpenCx, TaskOps, set_status};
use crate::task::{Answers, Ask, ZERO, words};
use agent::{Arg, Judge};
use image::{FdTypes, FownEntry, RegisteredRing, ThreadCoreEntry};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use sys::memory::SharedMap;
use sys::uring::{self, Inner, Params, RINGFD_REG_MAX, Restrictions, register, ring, setup};
use armed::{ArmedEntry, Held, UnderWay};
use buffers::RingBuffers;
use identity::{PersonalityEntry, SqThreadEntry};
use winding::Rings;

pub mod armed;
mod buffers;
mod identity;
mod winding;

pub static KIND: IoUring = IoUring;

#[derive(Debug)]
pub struct IoUring;

/// As the kernel names its mappings, too.
pub const NAME: &[u8] = b"anon_inode:[io_uring]";

#[derive(Clone, PartialEq, prost::Message)]
pub struct IoUringEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    /// As io_uring_setup(2) takes it.
    #[prost(uint32, required, tag = "4")]
    pub setup: u32,
    #[prost(uint32, required, tag = "5")]
    pub sq_entries: u32,
    #[prost(uint32, required, tag = "6")]
    pub cq_entries: u32,
    /// Requests taken, which is completions told, if these are not noted apart.
    #[prost(uint32, required, tag = "7")]
    pub done: u32,
    /// The rings as they are in memory: counters, completions, indices; and the requests.
    #[prost(bytes = "vec", required, tag = "8")]
    pub rings: Vec<u8>,
    #[prost(bytes = "vec", required, tag = "9")]
    pub requests: Vec<u8>,
    /// Registered files: the number of a descriptor for each, -1 for none.
    #[prost(sint32, repeated, tag = "10", packed = "false")]
    pub files: Vec<i32>,
    /// Registered buffers: address and length of each, zeros for none.
    #[prost(uint64, repeated, tag = "11", packed = "false")]
    pub buffers: Vec<u64>,
    /// The descriptor of the eventfd that is told of completions; is it told only of those that come later?
    #[prost(sint32, optional, tag = "12")]
    pub eventfd: Option<i32>,
    #[prost(bool, optional, tag = "13")]
    pub eventfd_async: Option<bool>,
    #[prost(message, repeated, tag = "14")]
    pub groups: Vec<RingBuffers>,
    #[prost(uint32, optional, tag = "15")]
    pub told: Option<u32>,
    #[prost(message, optional, tag = "16")]
    pub sq_thread: Option<SqThreadEntry>,
    /// By number, the lowest first.
    #[prost(message, repeated, tag = "17")]
    pub personalities: Vec<PersonalityEntry>,
    #[prost(message, optional, tag = "18")]
    pub restrictions: Option<RestrictionsEntry>,
    #[prost(message, repeated, tag = "19")]
    pub armed: Vec<ArmedEntry>,
}

/// What may be asked of it, see [`Restrictions`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct RestrictionsEntry {
    #[prost(uint64, required, tag = "1")]
    pub registrations: u64,
    #[prost(uint64, required, tag = "2")]
    pub operations: u64,
    #[prost(uint32, required, tag = "3")]
    pub flags_allowed: u32,
    #[prost(uint32, required, tag = "4")]
    pub flags_required: u32,
}

impl IoUringEntry {
    /// Completions told.
    fn completed(&self) -> u32 {
        self.told.unwrap_or(self.done)
    }

    /// Requests that are taken and completions that are told before the task is there.
    fn before_task(&self) -> (u32, u32) {
        let (_, later) = buffers::requests(&self.groups);
        match self.is_wound_late() {
            true => (0, 0),
            false => (self.done.wrapping_sub(later as u32), self.completed().wrapping_sub(later as u32)),
        }
    }

    /// Can it take requests only when all is registered with it?
    fn is_wound_late(&self) -> bool {
        self.sq_thread.is_some() || self.is_restricted() || !self.armed.is_empty()
    }

    /// Are there things that it refuses by now?
    fn is_restricted(&self) -> bool {
        self.restrictions.is_some() && self.setup & setup::R_DISABLED == 0
    }

    fn restrict(&self, fd: &OwnedFd) -> Result<(), Errno> {
        let Some(told) = &self.restrictions else { return Ok(()) };
        let restrictions = Restrictions {
            registrations: told.registrations,
            operations: told.operations,
            flags_allowed: told.flags_allowed as u8,
            flags_required: told.flags_required as u8,
        };
        uring::restrict(fd, &restrictions)
    }
}

fn object() -> Object {
    Object::Named("io_uring".into())
}

/// The flags that it is made with.
fn made_with(entry: &IoUringEntry) -> u32 {
    let disabled = if entry.is_restricted() { setup::R_DISABLED } else { 0 };
    entry.setup | setup::CQSIZE | disabled
}

fn params(entry: &IoUringEntry) -> Params {
    let (sq_entries, cq_entries) = (entry.sq_entries, entry.cq_entries);
    Params { sq_entries, cq_entries, flags: made_with(entry), ..Params::default() }
}

/// Numbers of groups of provided buffers that a thread is asked about, and that are asked about from outside; all
/// would take a tenth of a second.
const GROUPS: u16 = 16;
const MANY_GROUPS: u16 = 1024;
/// More entries no ring has. Source: io_uring/io_uring.h.
const MAX_ENTRIES: u32 = 65536;
const MAX_REGISTERED: usize = 1 << 15;

// ------------------------------------------------------------------------------------------------ asking

/// What a thread is asked about the rings of its process.
#[derive(Debug)]
pub struct Asked {
    registered: Vec<usize>,
    rings: Vec<AskedRing>,
}

#[derive(Debug)]
struct AskedRing {
    number: i32,
    eventfd: usize,
    napi: usize,
    groups: Vec<usize>,
}

/// What it was answered.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Where it has registered descriptors of rings, which only it may use.
    registered: Vec<u32>,
    rings: Vec<ToldRing>,
}

#[derive(Debug, Clone)]
struct ToldRing {
    number: i32,
    /// What was said to the registration of an eventfd that is none, and to busy polling.
    eventfd: i64,
    napi: i64,
    has_groups: bool,
}

/// Descriptors of the rings with these inodes.
pub fn numbers(pid: i32, inodes: &[u64]) -> Vec<i32> {
    if inodes.is_empty() {
        return Vec::new();
    }
    let folder = format!("/proc/{pid}/fd");
    let is_ring = |number: &i32| {
        sys::fd::stat_path(Path::new(&format!("{folder}/{number}")), true)
            .is_ok_and(|stat| inodes.contains(&stat.st_ino))
    };
    sys::fd::numbers(&folder).unwrap_or_default().into_iter().filter(is_ring).collect()
}

/// Asks for what cannot be had: the argument lies nowhere.
pub fn ask(numbers: &[i32], ask: &mut Ask) -> Result<Asked, Failure> {
    const NOWHERE: u64 = 1;
    const ENTER_REGISTERED_RING: u64 = 1 << 4;
    ask.list.label("ask about its rings");
    let enter = |index: u32, ask: &mut Ask| {
        ask.list.any(
            libc::SYS_io_uring_enter,
            &[u64::from(index).into(), ZERO, ZERO, ENTER_REGISTERED_RING.into(), ZERO, ZERO],
        )
    };
    let registered = (0..RINGFD_REG_MAX).map(|index| enter(index, ask)).collect();
    let mut rings = Vec::with_capacity(numbers.len());
    for number in numbers {
        let refused = |operation: u32, ask: &mut Ask| {
            let args = [(*number).into(), u64::from(operation).into(), NOWHERE.into(), 1.into()];
            ask.list.any(libc::SYS_io_uring_register, &args)
        };
        let (eventfd, napi) = (refused(register::EVENTFD, ask), refused(register::NAPI, ask));
        let mut groups = Vec::new();
        for group in 0..GROUPS {
            let status = ask.put(&[&u32::from(group).to_ne_bytes()[..], &[0; 36]].concat())?;
            let operation = u64::from(register::PBUF_STATUS).into();
            let args = [(*number).into(), operation, status.into(), 1.into()];
            groups.push(ask.list.any(libc::SYS_io_uring_register, &args));
        }
        rings.push(AskedRing { number: *number, eventfd, napi, groups });
    }
    Ok(Asked { registered, rings })
}

impl Asked {
    pub fn answer(self, answers: Answers) -> Told {
        let rings = self.rings.into_iter().map(|ring| ToldRing {
            number: ring.number,
            eventfd: answers.result(ring.eventfd),
            napi: answers.result(ring.napi),
            has_groups: ring.groups.iter().any(|group| answers.result(*group) == 0),
        });
        // Of one that is not enabled yet the answer is another, but it is there.
        let is_there = |at: usize| answers.result(at) >= 0 || answers.result(at) == -i64::from(libc::EBADFD);
        let registered = (0..).zip(&self.registered).filter(|(_, at)| is_there(**at));
        Told { registered: registered.map(|(index, _)| index).collect(), rings: rings.collect() }
    }
}

#[derive(Debug, Default)]
struct Answered(HashMap<(i32, i32), Vec<ToldRing>>);

/// Rings by their inode.
#[derive(Debug, Default)]
struct Known(HashMap<u64, u32>);

/// Keeps what a thread was answered; returns the rings that it has registered.
///
/// # Errors
/// When it is not known which these are.
pub fn keep(pid: i32, tid: i32, told: Told, cx: &mut DumpCx) -> Result<Vec<RegisteredRing>, Failure> {
    for ring in told.rings {
        cx.shelf.of::<Answered>().0.entry((pid, ring.number)).or_default().push(ring);
    }
    if told.registered.is_empty() {
        return Ok(Vec::new());
    }
    let refuse = |why: &str| {
        let why = format!("has registered the descriptor of an io_uring (IORING_REGISTER_RING_FDS){why}");
        Failure::unsupported(Object::Thread(tid), why).of(pid)
    };
    let files = uring::registered_rings(tid).ok_or_else(|| refuse(", and the kernel does not tell which"))?;
    let folder = format!("/proc/{pid}/fd");
    let is_ring = |number: &i32| {
        std::fs::read_link(format!("{folder}/{number}")).is_ok_and(|link| link.as_os_str().as_bytes() == NAME)
    };
    let numbers = sys::fd::numbers(&folder).unwrap_or_default().into_iter().filter(is_ring);
    let numbers: HashMap<u64, i32> =
        numbers.filter_map(|number| Some((sys::inside::inside()?.file(pid, number)?, number))).collect();
    let find = |index: u32| {
        let file = files.get(index as usize).copied().unwrap_or_default();
        let fd = numbers.get(&file).ok_or_else(|| refuse(" that it has closed, which is not carried"))?;
        Ok(RegisteredRing { index, fd: *fd })
    };
    told.registered.into_iter().map(find).collect()
}

/// Registers the rings of a thread under the same numbers.
pub fn restore(core: &ThreadCoreEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    if core.registered_rings.is_empty() {
        return Ok(());
    }
    ops.list.label("register the descriptors of rings");
    for ring in &core.registered_rings {
        // struct io_uring_rsrc_update: offset, reserved, data.
        let update = ops.bytes(&words(&[ring.index.into(), ring.fd as u64]))?;
        let args = [ring.fd.into(), u64::from(register::RING_FDS).into(), update.into(), 1.into()];
        ops.list.call(libc::SYS_io_uring_register, &args, Judge::Equal(1));
    }
    Ok(())
}

/// What requests hold that wait, to be let go with the program.
pub fn held(cx: &mut DumpCx) -> Held {
    std::mem::take(cx.shelf.of())
}

/// The record of the ring with this inode, if it was seen.
pub fn by_inode(inode: u64, cx: &mut DumpCx) -> Option<u32> {
    cx.shelf.of::<Known>().0.get(&inode).copied()
}

// ------------------------------------------------------------------------------------------------ dump

/// Lengths of the rings, and of the requests; and where the indices are.
fn layout(setup: u32, sq_entries: u32, cq_entries: u32) -> (usize, usize, usize) {
    let large = |bit: u32| usize::from(setup & bit != 0);
    let (sq, cq) = (sq_entries as usize, cq_entries as usize);
    // Where completions are large, the kernel doubles the head before them as well. Source: io_uring.c, rings_size.
    let array = ((ring::CQES + cq * 16) << large(setup::CQE32)).next_multiple_of(64);
    let indices = if setup & setup::NO_SQARRAY != 0 { 0 } else { sq * 4 };
    (array + indices, (sq * 64) << large(setup::SQE128), array)
}

fn pages(len: usize) -> usize {
    len.next_multiple_of(sys::memory::PAGE as usize)
}

/// Puts a word of a ring back.
struct Word<'m> {
    map: &'m SharedMap,
    at: usize,
    value: u32,
}

impl<'m> Word<'m> {
    fn set(map: &'m SharedMap, at: usize, value: u32) -> Word<'m> {
        Word { map, at, value: map.word(at).swap(value, Ordering::SeqCst) }
    }
}

impl Drop for Word<'_> {
    fn drop(&mut self) {
        self.map.word(self.at).store(self.value, Ordering::SeqCst);
    }
}

/// What `fdinfo` says while there is at least one request and one completion in the rings, which tells their sizes.
fn look_closely(probe: &FdProbe, map: &SharedMap) -> Result<sys::proc::Uring, Failure> {
    let explain = |error: Errno| probe.fail(error, "look at its rings");
    let texts = sys::fd::Texts::of(probe.pid).map_err(explain)?;
    let word = |at: usize| map.word(at).load(Ordering::SeqCst);
    let (taken, told) = (word(ring::SQ_HEAD), word(ring::CQ_TAIL));
    // Its program is stopped: nobody sees this.
    let _tail = (word(ring::SQ_TAIL) == taken).then(|| Word::set(map, ring::SQ_TAIL, taken.wrapping_add(1)));
    let _head = (word(ring::CQ_HEAD) == told).then(|| Word::set(map, ring::CQ_HEAD, told.wrapping_sub(1)));
    let text = texts.info(probe.number).map_err(explain)?;
    sys::proc::parse_uring(&text).ok_or_else(|| not_understood(probe))
}

fn not_understood(probe: &FdProbe) -> Failure {
    probe.refuse("the kernel tells its state in a way not understood")
}

/// The flags that a ring is to be made with, and its eventfd; or what it has that is not carried.
fn check(probe: &FdProbe, told: &[ToldRing], inner: Option<&Inner>) -> Result<(u32, Option<(u32, bool)>), Failure> {
    let refuse = |why: &str| Err(probe.refuse(format!("is an io_uring {why}, which is not carried")));
    let negated = |code: i32| -i64::from(code);
    // Of one that is enabled already this is refused as such.
    let has_restrictions = uring::refusal(&probe.fd, register::RESTRICTIONS) == libc::EBUSY;
    let is_disabled = uring::is_disabled(&probe.fd);
    if inner.is_none() && has_restrictions {
        return refuse("with restrictions, of which the kernel does not tell more here");
    }
    // From outside, where the ring answers us; otherwise by the thread that it is for.
    let mut eventfd = negated(uring::refusal(&probe.fd, register::EVENTFD));
    let mut napi = negated(uring::refusal(&probe.fd, register::NAPI));
    let mut has_groups = false;
    if eventfd == negated(libc::EEXIST) {
        let Some(told) = told.iter().find(|told| told.eventfd != negated(libc::EEXIST)) else {
            return Err(probe.refuse("is an io_uring for one thread (SINGLE_ISSUER), which has ended"));
        };
        (eventfd, napi, has_groups) = (told.eventfd, told.napi, told.has_groups);
    } else if inner.is_none() {
        has_groups |= (0..MANY_GROUPS).any(|group| uring::has_buffers(&probe.fd, group));
    }
    if has_groups && inner.is_none() {
        return refuse("with provided buffers, of which the kernel does not tell more here");
    }
    if let Some(inner) = inner {
        if inner.setup & setup::NO_MMAP != 0 {
            return refuse("in its program's own memory (NO_MMAP)");
        }
        if inner.setup & !KNOWN != 0 {
            return refuse(&format!("made with flags {:#x}", inner.setup & !KNOWN));
        }
        return Ok((kept(inner.setup), inner.eventfd));
    }
    if eventfd == negated(libc::EBUSY) {
        return refuse("with a registered eventfd, of which the kernel does not tell more here");
    }
    if eventfd != negated(libc::EFAULT) {
        return Err(not_understood(probe));
    }
    if napi == negated(libc::EINVAL) && knows_napi() {
        return refuse("that polls for completions (IOPOLL)");
    }
    Ok((if is_disabled { setup::R_DISABLED } else { 0 }, None))
}

/// The buffers that were provided to a ring which has taken so many requests.
fn groups(probe: &FdProbe, inner: Option<&Inner>, taken: u32) -> Result<Vec<RingBuffers>, Failure> {
    let Some(inner) = inner.filter(|inner| inner.has_buffer_groups) else { return Ok(Vec::new()) };
    let refuse = |why: &str| Err(probe.refuse(format!("is an io_uring with provided buffers{why}")));
    let Some(groups) = inner.groups() else { return refuse(", of which the kernel does not tell more here") };
    let groups = buffers::dump(probe, &groups)?;
    let (before, with) = buffers::requests(&groups);
    if before + with > taken.into() {
        return refuse(", most of which were taken by requests that still wait; this is not carried");
    }
    for (flag, why) in [(setup::IOPOLL, "polls for completions (IOPOLL)"), (setup::SQPOLL, "has a thread (SQPOLL)")] {
        if inner.setup & flag != 0 && groups.iter().any(|group| group.head() != 0) {
            return refuse(&format!(", some of which were taken, that {why}, which is not carried"));
        }
    }
    Ok(groups)
}

/// Flags whose meaning is known; those of sizes are found out in another way, too.
const KNOWN: u32 = (setup::HYBRID_IOPOLL << 1) - 1;
/// Flags that a record may have.
const CARRIED: u32 = setup::SQE128
    | setup::CQE32
    | setup::NO_SQARRAY
    | setup::IOPOLL
    | setup::HYBRID_IOPOLL
    | setup::R_DISABLED
    | setup::SUBMIT_ALL
    | setup::COOP_TASKRUN
    | setup::TASKRUN_FLAG
    | setup::SINGLE_ISSUER
    | setup::DEFER_TASKRUN;

/// The flags that a ring comes back with. Of one that is not enabled yet its thread is the one that enables it;
/// otherwise it would be us.
fn kept(setup: u32) -> u32 {
    let mut kept = setup & (CARRIED & !(setup::SQE128 | setup::CQE32 | setup::NO_SQARRAY));
    if setup & setup::R_DISABLED == 0 {
        kept &= !(setup::SINGLE_ISSUER | setup::DEFER_TASKRUN);
    }
    if kept & (setup::COOP_TASKRUN | setup::DEFER_TASKRUN) == 0 {
        kept &= !setup::TASKRUN_FLAG;
    }
    kept
}

/// The descriptor of an eventfd with this number.
fn find_eventfd(probe: &FdProbe, id: u32) -> Result<i32, Failure> {
    let texts = sys::fd::Texts::of(probe.pid).map_err(|error| probe.fail(error, "find its eventfd"))?;
    let is_it = |number: &i32| {
        let text = texts.info(*number).unwrap_or_default();
        sys::proc::fdinfo(&text, "eventfd-id").and_then(sys::proc::decimal) == Some(id)
    };
    let numbers = sys::fd::numbers(&format!("/proc/{}/fd", probe.pid)).unwrap_or_default();
    numbers
        .into_iter()
        .find(is_it)
        .ok_or_else(|| probe.refuse("is an io_uring with a registered eventfd that its process has closed"))
}

/// Does this kernel know busy polling at all? Linux 6.9.
fn knows_napi() -> bool {
    let mut params = Params { sq_entries: 1, ..Params::default() };
    uring::new(&mut params).is_ok_and(|ring| uring::refusal(&ring, register::NAPI) == libc::EFAULT)
}

/// The numbers of the descriptors that are registered files.
fn find_files(probe: &FdProbe, known: &sys::proc::Uring, inner: Option<&Inner>) -> Result<Vec<i32>, Failure> {
    let mut files = vec![-1; known.file_count as usize];
    if known.files.is_empty() {
        return Ok(files);
    }
    let folder = format!("/proc/{}/fd", probe.pid);
    let numbers = sys::fd::numbers(&folder).map_err(|error| probe.fail(error, "find its registered files"))?;
    let mut by_name: HashMap<Vec<u8>, Vec<i32>> = HashMap::new();
    for number in numbers {
        use std::os::unix::ffi::OsStringExt;
        if let Ok(link) = std::fs::read_link(format!("{folder}/{number}")) {
            by_name.entry(link.into_os_string().into_vec()).or_default().push(number);
        }
    }
    let pointers = inner.and_then(Inner::files);
    for (index, name) in &known.files {
        let found = by_name.get(name).map(Vec::as_slice).unwrap_or_default();
        let is_one = |number: &i32| {
            let pair = ((probe.pid, found[0]), (probe.pid, *number));
            sys::process::kcmp(sys::process::Kcmp::File, pair.0, pair.1).is_ok_and(|order| order.is_eq())
        };
        let is_it = |number: &&i32| {
            let file = sys::inside::inside().and_then(|inside| inside.file(probe.pid, **number));
            file.is_some() && file == pointers.as_ref().and_then(|all| all.get(*index as usize)).copied()
        };
        let shown = || String::from_utf8_lossy(name).into_owned();
        let it = match &pointers {
            Some(_) => found.iter().find(is_it),
            None if found.iter().all(is_one) => found.first(),
            None => {
                let why = format!("is an io_uring whose registered file {index} is one of several called {}", shown());
                return Err(probe.refuse(why));
            }
        };
        let Some(it) = it else {
            let why = format!("is an io_uring whose registered file {index} ({}) nobody has open", shown());
            return Err(probe.refuse(why).help(Remedy::Advice("the kernel gives registered files to nobody")));
        };
        *files.get_mut(*index as usize).ok_or_else(|| not_understood(probe))? = *it;
    }
    Ok(files)
}

/// Addresses and lengths of the registered buffers, which have to be in memory still.
fn buffers(probe: &FdProbe, known: &sys::proc::Uring) -> Result<Vec<u64>, Failure> {
    for (address, len) in known.buffers.iter().flatten() {
        let mut byte = [0];
        let mut is_there = |at: u64| sys::memory::read_remote(probe.pid, at, &mut byte).is_ok_and(|count| count == 1);
        if !(is_there(*address) && len.checked_sub(1).is_none_or(|last| is_there(address.saturating_add(last)))) {
            let why = format!("is an io_uring with a registered buffer at {address:#x}, which is unmapped");
            return Err(probe.refuse(why));
        }
    }
    Ok(known.buffers.iter().flat_map(|buffer| buffer.map_or([0, 0], |(address, len)| [address, len])).collect())
}

impl IoUring {
    /// The requests that are under way, which have to be such that wait. Whether there are others is counted in the end;
    /// where the kernel tells its tracing nothing, there are none if as many ended as were taken, but for those that end
    /// more than once.
    fn in_flight(
        &self,
        probe: &FdProbe,
        known: &sys::proc::Uring,
        inner: Option<&Inner>,
        cx: &mut DumpCx,
    ) -> Result<Vec<ArmedEntry>, Failure> {
        let why = || {
            let (taken, told) = (known.taken, known.told);
            let mut why = format!("is an io_uring with requests in flight: {taken} were taken, {told} completed");
            if !known.polls.is_empty() {
                let polls: Vec<String> = known.polls.iter().map(u32::to_string).collect();
                why += &format!("; operations that wait for a file: {}", polls.join(", "));
            }
            if known.has_overflow {
                why += "; completions for which there is no room";
            }
            let advice = Remedy::Advice("they have to end, or to be cancelled, first");
            probe.refuse(why).help(advice).passes()
        };
        if known.has_overflow {
            return Err(why());
        }
        let waits = !known.polls.is_empty() || inner.is_some_and(|inner| inner.has_timeouts);
        let is_even = known.taken == known.told;
        let Some(inner) = inner else { return if waits || !is_even { Err(why()) } else { Ok(Vec::new()) } };
        let armed = if waits { armed::dump(probe, inner, known.cq_entries, cx)? } else { Vec::new() };
        cx.shelf.of::<UnderWay>().note(why(), waits || !is_even, armed.len(), inner);
        Ok(armed)
    }
}

impl FdKind for IoUring {
    type Entry = IoUringEntry;
    const NAME: &'static str = "io_uring";
    const TYPE: FdTypes = FdTypes::IoUring;
    const TAG: u32 = 1000;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.link() == NAME
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<IoUringEntry, Failure> {
        // Objections to it are not repeated for its mappings.
        cx.shelf.of::<Known>().0.insert(probe.stat.st_ino, id);
        // The kernel tells nothing while it is at work with the ring.
        let known = sys::proc::parse_uring(probe.info()).ok_or_else(|| not_understood(probe).passes())?;
        let told = cx.shelf.of::<Answered>().0.remove(&(probe.pid, probe.number)).unwrap_or_default();
        let inner = Inner::of(probe.pid, probe.number, known.sq_entries, known.cq_entries);
        let (mut setup, eventfd) = check(probe, &told, inner.as_ref())?;
        let thread = inner.as_ref().and_then(|inner| inner.sq_thread.as_ref());
        if thread.is_none() && known.sq_thread != -1 {
            let why = "is an io_uring with a thread of the kernel (SQPOLL), of which the kernel does not tell more here";
            return Err(probe.refuse(why));
        }
        let sq_thread = thread.map(|thread| identity::dump(probe, id, &known, thread, cx)).transpose()?;
        let armed = self.in_flight(probe, &known, inner.as_ref(), cx)?;
        if !can_wind(known.taken, known.sq_entries) || !can_differ(known.taken, known.told) {
            let why = format!("is an io_uring that has taken {} requests, too many to do again", known.taken);
            return Err(probe.refuse(why));
        }
        let explain = |error: Errno| match error.code {
            libc::EINVAL => probe.refuse("is an io_uring in its program's own memory (NO_MMAP), which is not carried"),
            _ => probe.fail(error, "map its rings"),
        };
        // As much as there is at least, to find out how much there is.
        let (sq, cq) = (known.sq_entries, known.cq_entries);
        let map = |offset: u64, len: usize| SharedMap::new(&probe.fd, offset, pages(len)).map_err(explain);
        let head = map(uring::RINGS_AT, ring::CQES)?;
        let word = |at: usize| head.word(at).load(Ordering::SeqCst);
        if let Some(thread) = thread {
            // Its counters are not to be moved, for it is at work.
            setup |= inner.as_ref().map_or(0, |inner| inner.setup & LAYOUT);
            let (is_asked, waiting) =
                (word(ring::SQ_FLAGS) & ring::NEED_WAKEUP != 0, word(ring::SQ_TAIL).wrapping_sub(known.taken));
            if setup & setup::R_DISABLED == 0 && !identity::is_settled(thread, is_asked, waiting) {
                let why = "is an io_uring with requests that the kernel's thread (SQPOLL) is about to take";
                return Err(probe.refuse(why).passes());
            }
        } else {
            setup |= look_at_layout(probe, &head, (sq, cq), &map)?;
        }
        let (rings_len, requests_len, _) = layout(setup, sq, cq);
        let (mut rings, mut requests) = (vec![0; rings_len], vec![0; requests_len]);
        map(uring::RINGS_AT, rings_len)?.read(0, &mut rings);
        map(uring::SQES_AT, requests_len)?.read(0, &mut requests);
        Ok(IoUringEntry {
            id,
            flags: probe.flags,
            fown: probe.owner()?,
            setup,
            sq_entries: sq,
            cq_entries: cq,
            done: known.taken,
            rings,
            requests,
            files: find_files(probe, &known, inner.as_ref())?,
            buffers: buffers(probe, &known)?,
            eventfd: eventfd.map(|(id, _)| find_eventfd(probe, id)).transpose()?,
            eventfd_async: eventfd.filter(|(_, is_async)| *is_async).map(|_| true),
            groups: groups(probe, inner.as_ref(), ended(known.taken, known.told, &armed))?,
            told: (known.told != known.taken).then_some(known.told),
            sq_thread,
            personalities: identity::personalities(probe, inner.as_ref())?,
            restrictions: restrictions(probe, inner.as_ref(), &known)?,
            armed,
        })
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        std::mem::take(cx.shelf.of::<UnderWay>()).judge(cx)
    }

    fn link(&self, entries: &[(u32, &IoUringEntry)], _files: &FileTable) -> Failures {
        let is_wrong = |id: u32, entry: &IoUringEntry| {
            let is_size = |size: u32| size.is_power_of_two() && size <= MAX_ENTRIES;
            let told = entry.completed();
            entry.setup & !CARRIED != 0
                || !is_size(entry.sq_entries)
                || !is_size(entry.cq_entries)
                || entry.cq_entries < entry.sq_entries
                || {
                    let (rings, requests, _) = layout(entry.setup, entry.sq_entries, entry.cq_entries);
                    (rings, requests) != (entry.rings.len(), entry.requests.len())
                }
                || !can_wind(entry.done, entry.sq_entries)
                || !can_differ(entry.done, told)
                || entry.setup & setup::R_DISABLED != 0 && (entry.done, told) != (0, 0)
                || entry.files.len() > MAX_REGISTERED
                || !entry.buffers.len().is_multiple_of(2)
                || entry.buffers.len() > 2 * MAX_REGISTERED
                || !buffers::are_right(&entry.groups)
                || !identity::is_right(id, entry, entries)
                || !armed::is_right(entry)
                || {
                    let (before, with) = buffers::requests(&entry.groups);
                    before + with > ended(entry.done, told, &entry.armed).into()
                }
        };
        let wrong = entries.iter().filter(|(id, entry)| is_wrong(*id, entry));
        wrong
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("io_uring {id} is none")))
            .collect()
    }

    fn group(&self, entry: &IoUringEntry, _files: &FileTable) -> Option<u64> {
        Some(entry.id.into())
    }

    fn open(&self, entry: &IoUringEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(object(), "make it");
        let mut params = params(entry);
        let fd = uring::new(&mut params).map_err(explain)?;
        let (_, _, array) = layout(entry.setup, entry.sq_entries, entry.cq_entries);
        let is_as_before = params.cq_off[5] as usize == ring::CQES
            && params.sq_off[..2] == [ring::SQ_HEAD as u32, ring::SQ_TAIL as u32]
            && params.cq_off[..2] == [ring::CQ_HEAD as u32, ring::CQ_TAIL as u32]
            && (entry.setup & setup::NO_SQARRAY != 0 || params.sq_off[6] as usize == array);
        if !is_as_before {
            return Err(Failure::unsupported(object(), "this kernel arranges its rings in another way"));
        }
        // What is with the task comes when that is there.
        if !entry.is_wound_late() {
            let wind = |mut ring: Rings| ring.provide().and_then(|()| ring.wind(entry.before_task()));
            Rings::map(&fd, entry).and_then(wind).map_err(explain)?;
            if entry.setup & setup::R_DISABLED != 0 {
                entry.restrict(&fd).map_err(explain)?;
            }
        }
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn errands<'e>(&self, entry: &'e IoUringEntry) -> Vec<Errand<'e>> {
        identity::errands(entry.id, entry)
    }

    fn run_errand(
        &self,
        entry: &IoUringEntry,
        nth: usize,
        fd: &OwnedFd,
        at_hand: i32,
        ops: &mut TaskOps,
    ) -> Result<Option<usize>, Failure> {
        identity::run_errand(entry, nth, fd, at_hand, ops)
    }

    fn finish(&self, entry: &IoUringEntry, number: i32, ops: &mut TaskOps) -> Result<(), Failure> {
        buffers::register(number, &entry.groups, ops)?;
        let mut register = |operation: u32, argument: &[u8], count: usize| -> Result<(), Failure> {
            let argument = ops.bytes(argument)?;
            let args: [Arg; 4] =
                [number.into(), u64::from(operation).into(), argument.into(), (count as u64).into()];
            ops.list.label("register buffers, files and an eventfd with a ring").ok(libc::SYS_io_uring_register, &args);
            Ok(())
        };
        if !entry.buffers.is_empty() {
            // Each a struct iovec.
            register(register::BUFFERS, &words(&entry.buffers), entry.buffers.len() / 2)?;
        }
        if !entry.files.is_empty() {
            let numbers: Vec<u8> = entry.files.iter().flat_map(|number| number.to_ne_bytes()).collect();
            register(register::FILES, &numbers, entry.files.len())?;
        }
        if let Some(eventfd) = entry.eventfd {
            let is_async = entry.eventfd_async == Some(true);
            let operation = if is_async { register::EVENTFD_ASYNC } else { register::EVENTFD };
            register(operation, &eventfd.to_ne_bytes(), 1)?;
        }
        Ok(())
    }

    fn arm(&self, entry: &IoUringEntry, fd: &OwnedFd, cx: &ArmCx) -> Result<(), Failure> {
        let explain = |error: Errno| error.on(object(), "bring it to where it was");
        identity::tidy(entry, fd).map_err(explain)?;
        if entry.is_wound_late() {
            set_status(fd, entry.flags).map_err(explain)?;
            entry.restrict(fd).map_err(explain)?;
        }
        if entry.is_restricted() {
            uring::enable(fd).map_err(explain)?;
        }
        let pid = (cx.first_with)(entry.id);
        let wind = |mut ring: Rings| {
            if !entry.is_wound_late() || ring.is_new() {
                begin(&mut ring, entry, pid)?;
            }
            if entry.sq_thread.is_some() {
                armed::batches(entry).iter().try_for_each(|batch| ring.wait_again(batch))?;
            }
            ring.settle()?;
            ring.wind((entry.done, entry.completed()))?;
            ring.fill()?;
            match (entry.eventfd, pid) {
                (Some(eventfd), Some(pid)) if ring.has_news() => tell(pid, eventfd),
                _ => Ok(()),
            }
        };
        Rings::map(fd, entry).and_then(wind).map_err(explain)
    }

    fn repeats(&self, entry: &IoUringEntry) -> Vec<i32> {
        armed::batches(entry).iter().filter_map(|batch| batch.first()?.tid).collect()
    }

    fn repeat(
        &self,
        entry: &IoUringEntry,
        nth: usize,
        fd: &OwnedFd,
        number: i32,
        cx: &ArmCx,
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        let batch: Vec<ArmedEntry> =
            armed::batches(entry)[nth].iter().map(|armed| armed.in_task(ops)).collect::<Result<_, _>>()?;
        let begin = |mut ring: Rings| {
            if ring.is_new() {
                begin(&mut ring, entry, (cx.first_with)(entry.id))?;
            }
            ring.put(&batch);
            Ok(())
        };
        Rings::map(fd, entry).and_then(begin).map_err(|error| error.on(object(), "bring it to where it was"))?;
        let count = batch.len() as u64;
        let args = [number.into(), count.into(), ZERO, ZERO, ZERO, ZERO];
        ops.list.label("wait for files again").call(libc::SYS_io_uring_enter, &args, Judge::Equal(count as i64));
        Ok(())
    }

    fn owner<'e>(&self, entry: &'e IoUringEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// What comes before all else when the task is there.
fn begin(ring: &mut Rings, entry: &IoUringEntry, pid: Option<i32>) -> Result<(), Errno> {
    ring.be_quiet();
    if entry.is_wound_late() {
        ring.provide()?;
    }
    pid.map_or(Ok(()), |pid| ring.go_on(pid))
}

/// Tells an eventfd of a process of completions.
fn tell(pid: i32, eventfd: i32) -> Result<(), Errno> {
    let fd = sys::process::pidfd_getfd(sys::process::pidfd_open(pid)?, eventfd)?;
    sys::fd::write(&fd, &1u64.to_ne_bytes()).map(drop)
}

/// Flags of how its memory is arranged.
const LAYOUT: u32 = setup::SQE128 | setup::CQE32 | setup::NO_SQARRAY;

/// Those of a ring that nobody works with; `head` is the start of its rings, `map` maps as much as it is told to.
fn look_at_layout(
    probe: &FdProbe,
    head: &SharedMap,
    (sq, cq): (u32, u32),
    map: &dyn Fn(u64, usize) -> Result<SharedMap, Failure>,
) -> Result<u32, Failure> {
    let closely = look_closely(probe, head)?;
    if !closely.has_cqe_lines {
        return Err(not_understood(probe));
    }
    let mut setup = if closely.has_large_cqes { setup::CQE32 } else { 0 };
    if has_large_requests(probe, sq).map_err(|error| probe.fail(error, "map its rings"))? {
        setup |= setup::SQE128;
    }
    // Of large requests the kernel tells none. Without indices in memory it makes no difference.
    let has_indices = || -> Result<bool, Failure> {
        let (len, _, array) = layout(setup, sq, cq);
        let mut indices = vec![0; len - array];
        map(uring::RINGS_AT, len)?.read(array, &mut indices);
        Ok(indices.iter().any(|byte| *byte != 0))
    };
    if !closely.has_sqe_lines && (setup & setup::SQE128 == 0 || !has_indices()?) {
        setup |= setup::NO_SQARRAY;
    }
    Ok(setup)
}

/// What may be asked of a ring. One in use gets its counters back by requests that it refuses.
fn restrictions(
    probe: &FdProbe,
    inner: Option<&Inner>,
    known: &sys::proc::Uring,
) -> Result<Option<RestrictionsEntry>, Failure> {
    let Some(inner) = inner else { return Ok(None) };
    let Some(restrictions) = &inner.restrictions else { return Ok(None) };
    if known.taken != known.told || inner.has_buffer_groups {
        let what = if inner.has_buffer_groups { "provided buffers" } else { "requests without a completion of their own" };
        return Err(probe.refuse(format!("is an io_uring with restrictions and {what}, which is not carried")));
    }
    Ok(Some(RestrictionsEntry {
        registrations: restrictions.registrations,
        operations: restrictions.operations,
        flags_allowed: restrictions.flags_allowed.into(),
        flags_required: restrictions.flags_required.into(),
    }))
}

/// Are requests 128 bytes long? Where twice as many pages are, or where there is something in the second half of what
/// short ones would leave free.
fn has_large_requests(probe: &FdProbe, sq_entries: u32) -> Result<bool, Errno> {
    let short = sq_entries as usize * 64;
    if pages(2 * short) > pages(short) {
        // Reading beyond the end of the rings would be a fault of ours: the kernel reads.
        let map = SharedMap::new(&probe.fd, uring::SQES_AT, pages(2 * short));
        let Ok(map) = map else { return Ok(false) };
        let mut byte = [0];
        let at = map.address(pages(2 * short) - 1);
        return Ok(sys::memory::read_remote(sys::process::own_pid(), at, &mut byte).is_ok());
    }
    let map = SharedMap::new(&probe.fd, uring::SQES_AT, pages(2 * short))?;
    let mut rest = vec![0; short];
    map.read(short, &mut rest);
    Ok(rest.iter().any(|byte| *byte != 0))
}

/// Requests that one can do with as one likes: those that ended, and were told of.
fn ended(taken: u32, told: u32, armed: &[ArmedEntry]) -> u32 {
    taken.saturating_sub(armed.len() as u32).min(told)
}

/// Can as many completions without requests, or requests without completions, be made in less than a minute?
fn can_differ(taken: u32, told: u32) -> bool {
    const MANY: u32 = 1 << 25;
    told.wrapping_sub(taken).cast_signed().unsigned_abs() <= MANY
}

/// Is it a matter of less than a minute to bring a ring there?
fn can_wind(done: u32, sq_entries: u32) -> bool {
    const REQUESTS: u32 = 1 << 30;
    const CALLS: u32 = 1 << 26;
    done <= REQUESTS && done / sq_entries <= CALLS
}
