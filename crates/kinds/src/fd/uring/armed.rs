//! Requests of an io_uring that wait for a file to become ready, polls and those that are tried again then, or for a time.
//!
//! Read from: what the kernel tells its tracing of each, which is the request as it was.
//! Rebuilt by: the thread that has asked for it asks again. A poll that tells again and again has told already that its file
//! is ready; that it tells so once more is no news, and is counted among the completions of before. Of a time what is left is
//! waited for: the clock stands during the freeze.
//! Refused: operations whose arguments may be gone by now (a message, a list of buffers) or were carried out in part; those
//! with the credentials of a personality; files that their process has closed; times that come again and again, or end with
//! so many completions.

use super::IoUringEntry;
use crate::contract::{DumpCx, FdProbe, TaskOps};
use crate::task::words;
use model::{Errno, Failure, Failures, Remedy};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};
use sys::uring::armed::{Armed, FIXED_FILE, POLL_MULTI, op};
use sys::uring::{self, Inner, Request, setup};

/// A request that waits for its file.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ArmedEntry {
    /// As a `struct io_uring_sqe`.
    #[prost(bytes = "vec", required, tag = "1")]
    pub request: Vec<u8>,
    /// The thread that has asked for it; none for the kernel's.
    #[prost(int32, optional, tag = "2")]
    pub tid: Option<i32>,
    /// It has told already that its file is ready.
    #[prost(bool, optional, tag = "3")]
    pub has_told: Option<bool>,
    /// The time that it waits for, in nanoseconds: how long, or until when, as the request says.
    #[prost(uint64, optional, tag = "4")]
    pub time: Option<u64>,
}

impl ArmedEntry {
    /// What its completions tell.
    pub fn data(&self) -> u64 {
        self.request[32..40].try_into().map_or(0, u64::from_ne_bytes)
    }

    /// The request for a thread that makes it, with its time in memory where the kernel reads it.
    pub fn in_task(&self, ops: &TaskOps) -> Result<ArmedEntry, Failure> {
        const ADDRESS: std::ops::Range<usize> = 16..24;
        let mut request = self.request.clone();
        if let Some(time) = self.time {
            // struct __kernel_timespec.
            let time = ops.bytes(&words(&[time / 1_000_000_000, time % 1_000_000_000]))?;
            request[ADDRESS].copy_from_slice(&time.to_ne_bytes());
        }
        Ok(ArmedEntry { request, ..self.clone() })
    }
}

/// Threads by their `task_struct`.
#[derive(Debug, Default)]
struct Threads(Option<HashMap<u64, i32>>);

/// Files that requests wait for. When a program ends, the kernel lets go of them a moment later.
#[derive(Debug, Default)]
pub struct Held(HashMap<u64, OwnedFd>);

impl Held {
    /// Waits until nobody has them any more, so that their names and ports are free when the dump is done.
    pub fn await_end(self) {
        const PATIENCE: Duration = Duration::from_millis(300);
        if self.0.is_empty() {
            return;
        }
        let (begun, Some(inside)) = (Instant::now(), sys::inside::inside()) else { return };
        for file in self.0.values() {
            while inside.is_ours_alone(file) == Some(false) && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

/// What the requests of the tree that are under way are compared with.
#[derive(Debug, Default)]
pub struct UnderWay {
    /// Why each ring is refused if there are others than those that are known; and is it likely to be the one?
    rings: Vec<(bool, Failure)>,
    known: usize,
    /// Threads of the kernel: their `task_struct`.
    threads: Vec<u64>,
}

impl UnderWay {
    /// Notes a ring, of whose requests so many are known. One that does not have as many completions as requests `is_likely`
    /// to have more.
    pub fn note(&mut self, why: Failure, is_likely: bool, known: usize, inner: &Inner) {
        self.rings.push((is_likely, why));
        self.known += known;
        self.threads.extend(inner.sq_thread.as_ref().map(|thread| thread.task));
    }

    /// The objections, unless all requests of the tree that are under way are known.
    pub fn judge(mut self, cx: &DumpCx) -> Failures {
        if self.rings.is_empty() {
            return Failures::new();
        }
        self.threads.sort_unstable();
        self.threads.dedup();
        let threads = self.threads.iter().map(|task| uring::in_flight_of(*task));
        let under_way = cx.tids.iter().map(|tid| uring::in_flight(*tid)).chain(threads).sum::<Option<i64>>();
        let is_one_likely = self.rings.iter().any(|(is_likely, _)| *is_likely);
        let is_it = |is_likely: bool| match under_way {
            Some(count) if count == self.known as i64 => false,
            Some(_) => is_likely || !is_one_likely,
            None => is_likely,
        };
        self.rings.into_iter().filter(|(is_likely, _)| is_it(*is_likely)).map(|(_, why)| why).collect()
    }
}

fn name(operation: u8) -> String {
    let known = [
        (1, "READV"),
        (2, "WRITEV"),
        (op::POLL_ADD, "POLL_ADD"),
        (9, "SENDMSG"),
        (10, "RECVMSG"),
        (op::TIMEOUT, "TIMEOUT"),
        (op::ACCEPT, "ACCEPT"),
        (16, "CONNECT"),
        (op::READ, "READ"),
        (op::WRITE, "WRITE"),
        (op::SEND, "SEND"),
        (op::RECV, "RECV"),
        (op::READ_MULTISHOT, "READ_MULTISHOT"),
    ];
    known.iter().find(|known| known.0 == operation).map_or_else(|| operation.to_string(), |known| known.1.into())
}

/// A file that is waited for: a thread whose process has it, under which number.
struct Waited {
    tid: i32,
    number: i32,
}

impl Waited {
    /// That with this address in the kernel; `likely` is the number that it had.
    fn find(tid: i32, file: u64, likely: i32) -> Option<Waited> {
        let inside = sys::inside::inside()?;
        let is_it = |number: &i32| inside.file(tid, *number) == Some(file);
        let others = || sys::fd::numbers(&format!("/proc/{tid}/fd")).unwrap_or_default().into_iter();
        let number = Some(likely).filter(is_it).or_else(|| others().find(is_it))?;
        Some(Waited { tid, number })
    }

    fn link(&self) -> String {
        let link = std::fs::read_link(format!("/proc/{}/fd/{}", self.tid, self.number));
        link.map_or_else(|_| "a file".into(), |link| link.display().to_string())
    }

    fn fetch(&self) -> Result<OwnedFd, Errno> {
        let status = sys::fd::text(&format!("/proc/{}/status", self.tid))?;
        let pid = sys::proc::parse_status(&status).map_or(self.tid, |status| status.tgid);
        sys::process::pidfd_getfd(sys::process::pidfd_open(pid)?, self.number)
    }
}

/// The records of what waits, in the order of the kernel's table.
pub fn dump(probe: &FdProbe, inner: &Inner, cq_entries: u32, cx: &mut DumpCx) -> Result<Vec<ArmedEntry>, Failure> {
    let refuse = |why: String| {
        let advice = Remedy::Advice("they have to end, or to be cancelled, first");
        probe.refuse(format!("is an io_uring with requests in flight: {why}")).help(advice).passes()
    };
    let armed = inner.armed().ok_or_else(|| refuse("some wait for a file, of which the kernel does not tell more".into()))?;
    if armed.len() > cq_entries as usize {
        return Err(refuse(format!("{} wait for files, more than there is room for completions", armed.len())));
    }
    let registered = inner.files().unwrap_or_default();
    armed.into_iter().map(|armed| record(probe, inner, &armed, &registered, &refuse, cx)).collect()
}

fn record(
    probe: &FdProbe,
    inner: &Inner,
    armed: &Armed,
    registered: &[u64],
    refuse: &dyn Fn(String) -> Failure,
    cx: &mut DumpCx,
) -> Result<ArmedEntry, Failure> {
    let operation = format!("{} ({})", name(armed.operation), armed.operation);
    let thread = inner.sq_thread.as_ref().filter(|thread| thread.task == armed.task);
    let tid = match thread {
        Some(_) => None,
        None => Some(thread_at(armed.task, cx).ok_or_else(|| refuse(format!("{operation} of a thread that has ended, or is not of the tree")))?),
    };
    if let Some(time) = armed.time {
        let request = armed.request.filter(|_| tid.is_some());
        let request = request.ok_or_else(|| refuse(format!("{operation} waits for a time, which is not carried")))?;
        return Ok(ArmedEntry { request: request.bytes().to_vec(), tid, has_told: None, time: Some(time) });
    }
    // The descriptors of the kernel's thread are those of its process.
    let owner = tid.unwrap_or(probe.pid);
    let likely = armed.request.as_ref().map_or(-1, |request| request.fd);
    let waited = Waited::find(owner, armed.file, likely).ok_or_else(|| {
        refuse(format!("{operation} waits for a file that its process has closed"))
    })?;
    let file = waited.link();
    let Some(mut request) = armed.request else {
        return Err(refuse(format!("{operation} waits for {file}, which is not carried")));
    };
    if request.flags & FIXED_FILE == 0 {
        request.fd = waited.number;
    } else if registered.get(request.fd as usize) != Some(&armed.file) {
        return Err(refuse(format!("{operation} waits for {file}, which is no longer registered")));
    }
    if inner.setup & setup::R_DISABLED == 0 && inner.restrictions.is_some() {
        return Err(refuse(format!("{operation} waits for {file} in a ring with restrictions, which is not carried")));
    }
    let explain = |error: Errno| probe.fail(error, "look at a file that it waits for");
    let fetched = waited.fetch().map_err(explain)?;
    let has_told = has_told(armed, &request, &fetched).map_err(explain)?;
    if has_told && thread.is_some() {
        let why = format!("{operation} of the kernel's thread (SQPOLL) has told that {file} is ready, which is not carried");
        return Err(refuse(why));
    }
    cx.shelf.of::<Held>().0.insert(armed.file, fetched);
    Ok(ArmedEntry { request: request.bytes().to_vec(), tid, has_told: has_told.then_some(true), time: None })
}

/// Does a poll tell of each change, and has told of the last one?
fn has_told(armed: &Armed, request: &Request, file: &OwnedFd) -> Result<bool, Errno> {
    let tells_again = request.operation == op::POLL_ADD && request.len & POLL_MULTI != 0;
    Ok(tells_again && !armed.is_pending && sys::fd::is_ready(file, request.more as i16)?)
}

fn thread_at(task: u64, cx: &mut DumpCx) -> Option<i32> {
    let tids: Vec<i32> = cx.tids.iter().copied().collect();
    let threads = cx.shelf.of::<Threads>().0.get_or_insert_with(|| {
        let inside = sys::inside::inside();
        tids.into_iter().filter_map(|tid| Some((inside?.task(tid)?, tid))).collect()
    });
    threads.get(&task).copied()
}

/// Can there be such requests?
pub fn is_right(entry: &IoUringEntry) -> bool {
    const KNOWN: [u8; 7] = [op::TIMEOUT, op::POLL_ADD, op::ACCEPT, op::READ, op::WRITE, op::RECV, op::READ_MULTISHOT];
    entry.armed.len() <= entry.cq_entries.min(entry.done) as usize
        && entry.armed.iter().filter(|armed| armed.has_told == Some(true)).count() <= entry.completed() as usize
        && entry.armed.iter().all(|armed| {
            armed.request.len() == 64
                && KNOWN.contains(&armed.request[0])
                && armed.tid.is_some() == entry.sq_thread.is_none()
                && (armed.request[0] == op::TIMEOUT) == armed.time.is_some()
                && (armed.time.is_none() || armed.tid.is_some())
        })
}

/// Those of each thread, no more at a time than there is room for in the queue.
pub fn batches(entry: &IoUringEntry) -> Vec<Vec<ArmedEntry>> {
    let mut sorted = entry.armed.clone();
    sorted.sort_by_key(|armed| armed.tid);
    let of_threads = sorted.chunk_by(|one, next| one.tid == next.tid);
    of_threads.flat_map(|all| all.chunks(entry.sq_entries as usize)).map(<[ArmedEntry]>::to_vec).collect()
}
