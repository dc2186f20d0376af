//! Hands: threads of a copy of a process that move its pages on into a file of ours, each in one step.
//!
//! UFFDIO_COPY gives pages to the address space that the userfaultfd belongs to, ours, and reads them in that of the caller. So
//! the caller is a thread that has the memory. A hand is traced from its start, runs lists and nothing else, and ends with
//! the copy. Whatever goes wrong with one, what it was to do can be done without it.

use crate::inject::{Copied, adopt};
use crate::list::{Arg, Judge, List, OP_SIZE, SCAN, slot};
use model::Errno;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use sys::memory::{PAGE, SharedMap};
use sys::ptrace::{self, Running, Stop};
use sys::userfault::{self, Growing, Userfault};

/// What one hand has of the area that the copy shares with us: its slot, a byte for each page of a part, and its list.
const REGION: usize = 64 << 10;
/// Bytes of memory that a hand is asked for at once.
pub const PART: usize = 4 << 20;
const FOUND_AT: usize = slot::SIZE;
const LIST_AT: usize = FOUND_AT + PART / PAGE as usize;
/// An operation, and what it points to.
const STEP: usize = OP_SIZE + size_of::<userfault::Copy>();
/// Steps of one list.
const STEPS: usize = (REGION - LIST_AT) / STEP;
/// How long to sleep before looking whether it is still at work.
const LOOK_NS: u64 = 50_000_000;

/// The hands of one process.
#[derive(Debug)]
pub struct Hands {
    /// Of our memory; they have it, too.
    userfault: Arc<Userfault>,
    hands: Vec<Mutex<Hand>>,
}

/// One of them.
#[derive(Debug)]
pub struct Hand {
    pid: i32,
    tid: i32,
    map: Arc<SharedMap>,
    /// Where the area begins in the copy.
    remote: u64,
    slot: usize,
    region: usize,
    idle: u32,
    /// Its number of our userfaultfd.
    userfault: i32,
    /// It did not answer.
    is_lost: bool,
}

const NO_ANSWER: Errno = Errno { call: "futex", code: libc::ESRCH };

impl Hands {
    pub fn userfault(&self) -> &Arc<Userfault> {
        &self.userfault
    }

    /// One that is free, if there is one.
    pub fn free(&self) -> Option<MutexGuard<'_, Hand>> {
        let free = self.hands.iter().filter_map(|hand| match hand.try_lock() {
            Ok(hand) => Some(hand),
            Err(TryLockError::Poisoned(held)) => Some(held.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        });
        free.into_iter().find(|hand| !hand.is_lost)
    }

    /// Makes `count` hands of a copy. It and its threads, of which `made` is told, run from then on; `options` are those of
    /// its tracing.
    ///
    /// # Errors
    /// Whatever stands in the way; the copy is good for being read, not for running.
    pub fn make(copied: Copied, count: usize, options: u64, made: &mut Vec<i32>) -> Result<Hands, Errno> {
        let Copied { stopped: copy, slot, map, area } = copied;
        let pid = copy.tid();
        let mut idle = [0; 4];
        map.read(slot.at() + slot::IDLE, &mut idle);
        // The first half is that of the lists before.
        let regions = (map.len() / 2..map.len()).step_by(REGION).take(count.max(1));
        let hand = |(at, region): (usize, usize)| Hand {
            pid,
            tid: pid,
            map: map.clone(),
            remote: area.start,
            slot: if at == 0 { slot.at() } else { region },
            region,
            idle: u32::from_ne_bytes(idle),
            userfault: -1,
            is_lost: false,
        };
        let mut hands: Vec<Hand> = regions.enumerate().map(hand).collect();
        copy.set_options(options | ptrace::EXIT_KILL | ptrace::TRACE_CLONE)?;
        let userfault = Arc::new(Userfault::own()?);
        let running = copy.resume(0)?;
        let number = hands[0].receive(&userfault)?;
        spawn(&mut hands, running, options, made)?;
        for hand in &mut hands {
            hand.userfault = number;
            // As we work: the program may be kept to a few processors, or wait for others.
            let _ = sys::process::work_as_this(hand.tid);
        }
        Ok(Hands { userfault, hands: hands.into_iter().map(Mutex::new).collect() })
    }
}

fn word_at(bytes: &[u8], at: usize) -> i32 {
    i32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Has the first hand make the others as threads beside it.
fn spawn(hands: &mut [Hand], first: Running, options: u64, made: &mut Vec<i32>) -> Result<(), Errno> {
    const THREAD: i32 = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM;
    let mut list = List::new();
    for hand in &hands[1..] {
        hand.lay_slot();
        let mut args = [Arg::Value(0); 5];
        args[0] = THREAD.into();
        list.call(libc::SYS_clone, &args, Judge::Spawn(hand.remote + hand.slot as u64));
    }
    hands[0].start(&list);
    let mut running = first;
    let before = made.len();
    while !hands[0].is_done() {
        running = match running.look()? {
            Err(running) => {
                std::thread::yield_now();
                running
            }
            Ok(Stop::Event(stopped, ptrace::EVENT_CLONE)) => {
                let tid = stopped.event_message()? as i32;
                made.push(tid);
                adopt(tid, options)?.resume(0)?;
                stopped.resume(0)?
            }
            Ok(Stop::Signal(stopped, signal)) => stopped.resume(signal)?,
            Ok(Stop::Trap(stopped) | Stop::Group(stopped, _)) => stopped.resume(0)?,
            Ok(Stop::Event(stopped, _) | Stop::Syscall(stopped)) => stopped.resume(0)?,
            Ok(Stop::Exited(_)) => return Err(NO_ANSWER),
        };
    }
    hands[0].judge(&list)?;
    for (hand, tid) in hands[1..].iter_mut().zip(&made[before..]) {
        hand.tid = *tid;
        // It reads from the list above which slot is its own: that stays until it has answered.
        hand.run(&List::new())?;
    }
    Ok(())
}

impl Hand {
    /// Which pages of `runs`, of at most [`PART`] bytes, hold something: a byte for each. Those of zeros count if `keeps_zeros`.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn find(&mut self, runs: &[Range<u64>]) -> Result<Vec<u8>, Errno> {
        let pages = |run: &Range<u64>| ((run.end - run.start) / PAGE) as usize;
        let total: usize = runs.iter().map(pages).sum();
        assert!(total <= PART / PAGE as usize, "the hand has a byte for each page");
        let found = self.remote + (self.region + FOUND_AT) as u64;
        let mut at = 0;
        for some in runs.chunks(STEPS) {
            let mut list = List::new();
            for run in some {
                list.ok(SCAN.into(), &[run.start.into(), run.end.into(), (found + at as u64).into()]);
                at += pages(run);
            }
            self.run(&list)?;
        }
        let mut bytes = vec![0; total];
        self.map.read(self.region + FOUND_AT, &mut bytes);
        Ok(bytes)
    }

    /// Moves pages to `at` in the file, one run behind the other.
    ///
    /// # Errors
    /// `EFAULT` where it cannot read one, `ENOMEM` where the file system is full: some of the pages may be there.
    pub fn put(&mut self, growing: &Growing, at: u64, runs: &[Range<u64>]) -> Result<(), Errno> {
        let begin = at;
        let mut at = at;
        for some in runs.chunks(STEPS) {
            let mut list = List::new();
            let arguments = self.region + LIST_AT + some.len() * OP_SIZE;
            for (index, run) in some.iter().enumerate() {
                let argument = arguments + index * size_of::<userfault::Copy>();
                let copy = growing.copy_of(at, run.clone());
                self.map.write(argument, &copy.words().map(u64::to_ne_bytes).concat());
                let address = self.remote + argument as u64;
                list.ok(
                    libc::SYS_ioctl,
                    &[self.userfault.into(), userfault::UFFDIO_COPY.into(), address.into()],
                );
                at += run.end - run.start;
            }
            self.run(&list)?;
        }
        growing.forget(begin..at);
        Ok(())
    }

    /// Gives it the userfaultfd, by way of a pair of sockets; returns its number there.
    fn receive(&mut self, userfault: &Userfault) -> Result<i32, Errno> {
        // Behind the list: the ends of the pair, and a message of one byte with one descriptor.
        let room = self.region + REGION / 2;
        let base = self.remote + room as u64;
        let address = |at: u64| base + at;
        let (header, vector, byte, control) = (64, 128, 192, 256);
        let mut list = List::new();
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        list.ok(libc::SYS_socketpair, &[libc::AF_UNIX.into(), kind.into(), 0.into(), base.into()]);
        self.run(&list)?;
        let mut ends = [0; 8];
        self.map.read(room, &mut ends);
        let [first, second] = [0, 4].map(|at| word_at(&ends, at));
        let ours = sys::process::pidfd_getfd(&sys::process::pidfd_open(self.pid)?, first)?;
        sys::socket::send_with(&ours, b"u", None, &[userfault.as_fd()], None)?;
        // struct iovec; struct msghdr.
        let words = |at: u64, words: &[u64]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            self.map.write(room + at as usize, &bytes);
        };
        words(vector, &[address(byte), 1]);
        words(header, &[0, 0, address(vector), 1, address(control), 24, 0]);
        let mut list = List::new();
        let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        list.ok(libc::SYS_recvmsg, &[second.into(), address(header).into(), flags.into()]);
        list.ok(libc::SYS_close, &[first.into()]);
        list.ok(libc::SYS_close, &[second.into()]);
        self.run(&list)?;
        // struct cmsghdr: its length, level and type, then what it carries.
        let mut told = [0; 24];
        self.map.read(room + control as usize, &mut told);
        match (word_at(&told, 8), word_at(&told, 12)) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => Ok(word_at(&told, 16)),
            _ => Err(Errno { call: "recvmsg", code: libc::EMFILE }),
        }
    }

    /// Makes its slot.
    fn lay_slot(&self) {
        self.map.write(self.slot, &[0; slot::SIZE]);
        self.map.write(self.slot + slot::IDLE, &self.idle.to_ne_bytes());
        self.map.word(self.slot + slot::TURN).store(self.idle, Ordering::Release);
    }

    fn start(&self, list: &List) {
        let bytes = list.bytes();
        let at = self.region + LIST_AT;
        self.map.write(at, &bytes);
        let address = self.remote + at as u64;
        self.map.write(self.slot + slot::LIST, &address.to_ne_bytes());
        self.map.write(self.slot + slot::END, &(address + bytes.len() as u64).to_ne_bytes());
        let turn = self.map.word(self.slot + slot::TURN);
        turn.store(self.idle & !crate::area::FUTEX_WAITERS, Ordering::Release);
        sys::memory::futex_wake(turn);
    }

    fn is_done(&self) -> bool {
        self.map.word(self.slot + slot::TURN).load(Ordering::Acquire) == self.idle
    }

    /// What came of a list that is done.
    fn judge(&self, list: &List) -> Result<(), Errno> {
        let mut stopped = [0; 8];
        self.map.read(self.slot + slot::STOPPED, &mut stopped);
        let Some(at) = u64::from_ne_bytes(stopped).checked_sub(self.remote) else { return Ok(()) };
        let index = (at as usize).saturating_sub(self.region + LIST_AT) / OP_SIZE;
        if index >= list.len() {
            return Err(NO_ANSWER);
        }
        let mut op = [0; OP_SIZE];
        self.map.read(self.region + LIST_AT + index * OP_SIZE, &mut op);
        Err(list.failed(index, List::result(&op, 0)).errno())
    }

    fn run(&mut self, list: &List) -> Result<(), Errno> {
        self.start(list);
        let turn = self.map.word(self.slot + slot::TURN);
        loop {
            let value = turn.load(Ordering::Acquire);
            if value == self.idle {
                return self.judge(list);
            }
            sys::memory::futex_wait(turn, value, LOOK_NS);
            if turn.load(Ordering::Acquire) != self.idle && !self.is_at_work() {
                self.is_lost = true;
                return Err(NO_ANSWER);
            }
        }
    }

    /// Is it neither gone nor stopped, by a signal that somebody sent or that it brought about?
    fn is_at_work(&self) -> bool {
        let text = sys::fd::text(&format!("/proc/{}/task/{}/stat", self.pid, self.tid)).ok();
        let stat = text.and_then(|text| sys::proc::parse_stat(&text));
        stat.is_some_and(|stat| !matches!(stat.state, b't' | b'T' | b'Z' | b'X'))
    }
}

const _: () = assert!(STEPS > PART / PAGE as usize / 2);
