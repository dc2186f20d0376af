//! Whose rights the requests of an io_uring have: the kernel's thread that looks for them (SQPOLL), and personalities.
//!
//! Read from: what the kernel tells its tracing.
//! Rebuilt by: a thread of the process that has made the ring makes it, with the credentials that its maker had, or registers
//! the credentials that it takes for it. Numbers between those of personalities are handed out to ourselves for as long.
//! Refused: a thread that has ended with its process; credentials of another user namespace.

use super::IoUringEntry;
use crate::contract::{DumpCx, Errand, FdProbe, TaskOps};
use crate::task::creds;
use agent::{Arg, Judge};
use image::CredsEntry;
use model::{Errno, Failure};
use std::os::fd::OwnedFd;
use sys::uring::{self, Inner, Params, SqThread, register, setup};

/// The kernel's thread of a ring.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SqThreadEntry {
    /// The process that it belongs to.
    #[prost(int32, required, tag = "1")]
    pub maker: i32,
    /// How long it looks for requests before it sleeps, in milliseconds.
    #[prost(uint32, required, tag = "2")]
    pub idle_ms: u32,
    #[prost(message, required, tag = "3")]
    pub creds: CredsEntry,
    /// The one processor that it runs on.
    #[prost(uint32, optional, tag = "4")]
    pub cpu: Option<u32>,
    /// The ring that had it first.
    #[prost(uint32, optional, tag = "5")]
    pub first: Option<u32>,
}

/// Credentials that requests can ask for by their number.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PersonalityEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(message, required, tag = "2")]
    pub creds: CredsEntry,
}

/// Rings that have a thread, by what they have in common.
#[derive(Debug, Default)]
struct Threads(std::collections::HashMap<u64, u32>);

fn creds_at(probe: &FdProbe, address: u64) -> Result<CredsEntry, Failure> {
    let (status, securebits) = sys::cred::at(address)
        .ok_or_else(|| probe.refuse("is an io_uring with credentials of which the kernel does not tell more here"))?;
    Ok(creds::record(&status, securebits))
}

/// The record of the thread of ring `id`.
pub fn dump(
    probe: &FdProbe,
    id: u32,
    known: &sys::proc::Uring,
    thread: &SqThread,
    cx: &mut DumpCx,
) -> Result<SqThreadEntry, Failure> {
    let refuse = |why: &str| probe.refuse(format!("is an io_uring with a thread of the kernel (SQPOLL) {why}"));
    let inside = sys::inside::inside();
    let leads = |pid: &&i32| inside.and_then(|inside| inside.task(**pid)) == Some(thread.leader);
    let maker = cx.pids.iter().find(leads).copied();
    let maker = maker.ok_or_else(|| match thread.task {
        0 => refuse("that has ended with the process that made the ring"),
        _ => refuse("of a process outside of the tree"),
    })?;
    let first = *cx.shelf.of::<Threads>().0.entry(thread.data).or_insert(id);
    Ok(SqThreadEntry {
        maker,
        idle_ms: thread.idle_ms,
        creds: creds_at(probe, thread.cred)?,
        cpu: u32::try_from(known.sq_cpu).ok().filter(|_| thread.is_bound),
        first: (first != id).then_some(first),
    })
}

/// The records of its personalities.
pub fn personalities(probe: &FdProbe, inner: Option<&Inner>) -> Result<Vec<PersonalityEntry>, Failure> {
    let Some(inner) = inner.filter(|inner| inner.has_personalities) else { return Ok(Vec::new()) };
    let found = inner
        .personalities()
        .ok_or_else(|| probe.refuse("is an io_uring with personalities, of which the kernel does not tell more here"))?;
    let record = |(id, address): (u64, u64)| Ok(PersonalityEntry { id: id as u32, creds: creds_at(probe, address)? });
    found.into_iter().map(record).collect()
}

/// Can there be such a ring, whose number is `id`?
pub fn is_right(id: u32, entry: &IoUringEntry, all: &[(u32, &IoUringEntry)]) -> bool {
    let numbers = entry.personalities.iter().map(|personality| personality.id);
    let is_thread = |thread: &SqThreadEntry| {
        let first = thread.first.map(|first| all.iter().find(|(id, _)| *id == first));
        first.is_none_or(|first| {
            let first = first.filter(|(first, _)| *first < id).and_then(|(_, first)| first.sq_thread.as_ref());
            first.is_some_and(|first| first.maker == thread.maker && first.first.is_none())
        })
    };
    numbers.clone().all(|number| (1..=u16::MAX.into()).contains(&number))
        && numbers.is_sorted_by(|one, next| one < next)
        && entry.sq_thread.as_ref().is_none_or(is_thread)
}

/// What is done by threads with these rights: the ring is made, then its personalities are registered.
pub fn errands(id: u32, entry: &IoUringEntry) -> Vec<Errand<'_>> {
    let thread = entry.sq_thread.as_ref();
    let pid = thread.map(|thread| thread.maker);
    let made = thread.map(|thread| Errand { pid, creds: &thread.creds, with: thread.first, makes: true });
    let registered = entry.personalities.iter();
    let registered = registered.map(|one| Errand { pid, creds: &one.creds, with: Some(id), makes: false });
    made.into_iter().chain(registered).collect()
}

/// Adds the calls of one of them.
pub fn run_errand(
    entry: &IoUringEntry,
    nth: usize,
    fd: &OwnedFd,
    at_hand: i32,
    ops: &mut TaskOps,
) -> Result<Option<usize>, Failure> {
    let nth = match (&entry.sq_thread, nth) {
        (None, nth) => nth,
        (Some(thread), 0) => return make(entry, thread, at_hand, ops).map(Some),
        (Some(_), nth) => nth - 1,
    };
    let before = nth.checked_sub(1).map_or(0, |last| entry.personalities[last].id);
    let id = entry.personalities[nth].id;
    for number in before + 1..id {
        let given = uring::register_personality(fd).and_then(|given| match given == number {
            true => Ok(()),
            false => Err(Errno { call: "io_uring_register", code: libc::EEXIST }),
        });
        given.map_err(|error| error.on(super::object(), "register personalities"))?;
    }
    ops.list.label("register a personality with a ring");
    let args = [at_hand.into(), u64::from(register::PERSONALITY).into(), Arg::Value(0), Arg::Value(0)];
    ops.list.call(libc::SYS_io_uring_register, &args, Judge::Equal(id.into()));
    Ok(None)
}

fn make(entry: &IoUringEntry, thread: &SqThreadEntry, first: i32, ops: &mut TaskOps) -> Result<usize, Failure> {
    let flag = |is_there: bool, flag: u32| if is_there { flag } else { 0 };
    let params = Params {
        flags: super::made_with(entry)
            | setup::SQPOLL
            | flag(thread.cpu.is_some(), setup::SQ_AFF)
            | flag(thread.first.is_some(), setup::ATTACH_WQ),
        sq_thread_cpu: thread.cpu.unwrap_or(0),
        sq_thread_idle: thread.idle_ms,
        wq_fd: if thread.first.is_some() { first as u32 } else { 0 },
        ..super::params(entry)
    };
    let params = ops.bytes(&params.bytes())?;
    let args = [u64::from(entry.sq_entries).into(), params.into()];
    Ok(ops.list.label("make a ring with a thread of the kernel").ok(libc::SYS_io_uring_setup, &args))
}

/// Takes those back that were handed out to ourselves.
pub fn tidy(entry: &IoUringEntry, fd: &OwnedFd) -> Result<(), Errno> {
    let last = entry.personalities.last().map_or(0, |last| last.id);
    let is_kept = |number: &u32| entry.personalities.iter().any(|kept| kept.id == *number);
    (1..last).filter(|number| !is_kept(number)).try_for_each(|number| uring::forget_personality(fd, number))
}

/// Are requests in its queue, if there are any, left there until the program wakes the thread? It goes on looking while its
/// program stands still.
pub fn is_settled(thread: &SqThread, is_asked_to_wake: bool, waiting: u32) -> bool {
    waiting == 0 || is_asked_to_wake && thread.sleeps() == Some(true)
}
