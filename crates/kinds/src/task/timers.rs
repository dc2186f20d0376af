//! Interval timers and POSIX timers.
//!
//! Read from: getitimer(2), timer_gettime(2), timer_getoverrun(2) in the process; `/proc/PID/timers` from outside.
//! Rebuilt by: setitimer(2); timer_create(2) with the same id, by PR_TIMER_CREATE_RESTORE_IDS since Linux 6.15,
//! before by making and deleting timers until the id comes round. Set at the very end, so that no time passes
//! for them while the tree is being built. A timer whose signal waits expires in the past, so that the kernel sends the
//! signal, and counts overruns, as it did. One whose overruns were told already sends a signal that nobody gets.
//! Not kept: overruns of timers of processor time, and those told to one thread; all that were told while a signal
//! waits again; those that wait, where the kernel tells its tracing no types. Of a signal that waits, its place in the queue.

use super::{Answers, Ask, ZERO, words};
use crate::contract::TaskOps;
use agent::Judge;
use image::{ItimerEntry, PosixTimerEntry, SignalQueueEntry, TaskTimersEntry};
use model::{Failure, Object, Remedy};
use std::collections::HashSet;
use sys::proc::Timer;

/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const ITIMERS: u64 = 3;
const SPEC: u64 = 32;
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const NSEC: u64 = 1_000_000_000;
const SIGEV_THREAD_ID: u32 = 4;
/// A timer id that has to be reached by counting would take too long beyond this.
pub const COUNTED_ID_MAX: u32 = 1 << 16;

#[derive(Debug)]
pub struct Asked {
    itimers: u64,
    posix: Vec<(Timer, u64, usize)>,
}

pub fn ask(timers: Vec<Timer>, ask: &mut Ask) -> Result<Asked, Failure> {
    let itimers = ask.room((ITIMERS * SPEC) as usize)?;
    ask.list.label("read the timers");
    for which in 0..ITIMERS {
        ask.list.ok(libc::SYS_getitimer, &[which.into(), (itimers + which * SPEC).into()]);
    }
    let mut posix = Vec::with_capacity(timers.len());
    for timer in timers {
        let spec = ask.room(SPEC as usize)?;
        ask.list.ok(libc::SYS_timer_gettime, &[timer.id.into(), spec.into()]);
        let overrun = ask.list.any(libc::SYS_timer_getoverrun, &[timer.id.into()]);
        posix.push((timer, spec, overrun));
    }
    Ok(Asked { itimers, posix })
}

impl Asked {
    /// What the threads of `pid` have answered, whose process has these signals pending.
    pub fn answer(self, pid: i32, pending: &[[u8; 128]], answers: Answers) -> TaskTimersEntry {
        let itimer = |which: u64| {
            let [isec, iusec, vsec, vusec] = answers.words(self.itimers + which * SPEC);
            // One that has expired stands still until its signal is delivered. A zero would end it.
            let (vsec, vusec) = if (vsec, vusec) == (0, 0) { (isec, iusec) } else { (vsec, vusec) };
            ItimerEntry { isec, iusec, vsec, vusec }
        };
        let posix = self.posix.iter().map(|(timer, spec, overrun)| {
            let [isec, insec, vsec, vnsec] = answers.words(*spec);
            let waits =
                timer.tid.is_some() || pending.iter().any(|info| timer_of(info) == Some(timer.id as u32));
            let overrun_of = || sys::timer::pending_overrun(pid, timer.id as u32).filter(|count| *count > 0);
            let is_periodic = (isec, insec) != (0, 0);
            PosixTimerEntry {
                it_id: timer.id as u32,
                clock_id: timer.clock as u32,
                si_signo: timer.signal as u32,
                it_sigev_notify: timer.notify | if timer.tid.is_some() { SIGEV_THREAD_ID } else { 0 },
                sival_ptr: timer.value,
                overrun: answers.result(*overrun).max(0) as u32,
                isec,
                insec,
                vsec,
                vnsec,
                notify_thread_id: timer.tid,
                pending_overrun: (waits && is_periodic).then(overrun_of).flatten(),
            }
        });
        TaskTimersEntry { real: itimer(0), virt: itimer(1), prof: itimer(2), posix: posix.collect() }
    }
}

/// The timer whose signal this is. Source: struct siginfo, si_code and si_tid.
pub fn timer_of(info: &[u8]) -> Option<u32> {
    let word = |at: usize| Some(i32::from_ne_bytes(info.get(at..at + 4)?.try_into().ok()?));
    (word(8)? == libc::SI_TIMER).then(|| word(16)).flatten().map(|id| id as u32)
}

/// The timers, and which of them are to send a signal at once.
#[derive(Debug)]
pub struct Senders<'e> {
    timers: &'e TaskTimersEntry,
    waiting: HashSet<u32>,
}

impl<'e> Senders<'e> {
    /// `queues` are the signals that wait in the process and its threads.
    pub fn new<'q>(
        timers: &'e TaskTimersEntry,
        queues: impl Iterator<Item = &'q SignalQueueEntry>,
    ) -> Senders<'e> {
        let waiting = queues.flat_map(|queue| &queue.signals).filter_map(|signal| timer_of(&signal.siginfo));
        let waiting: HashSet<u32> = waiting.collect();
        let is_sent = |timer: &&PosixTimerEntry| waiting.contains(&timer.it_id) && first(timer, 0).is_some();
        let sent = timers.posix.iter().filter(is_sent).map(|timer| timer.it_id).collect();
        Senders { timers, waiting: sent }
    }

    /// Has this timer told of overruns that it is to tell again, and can it?
    fn tells(&self, timer: &PosixTimerEntry) -> bool {
        let is_periodic = (timer.isec, timer.insec) != (0, 0) && (timer.vsec, timer.vnsec) != (0, 0);
        let (notify, signal) = (timer.it_sigev_notify as i32, timer.si_signo as i32);
        // Any child that ends would send the same.
        let is_free = notify == libc::SIGEV_SIGNAL && (1..=64).contains(&signal) && signal != libc::SIGCHLD;
        let waits = self.waiting.contains(&timer.it_id);
        timer.overrun > 0 && is_periodic && is_free && !waits && first(timer, timer.overrun).is_some()
    }

    /// Is this signal sent by its timer itself?
    pub fn sends(&self, info: &[u8]) -> bool {
        timer_of(info).is_some_and(|id| self.waiting.contains(&id))
    }
}

/// When a timer has to have begun to expire, for its signal to tell so many overruns and the next expiry to be as far
/// off as it was: nanoseconds of a clock that says `now`. Fewer overruns where the clock has not run that long, and none
/// at all where it has not run for one interval.
fn past(timer: &PosixTimerEntry, now: u64, overruns: u32) -> Option<u64> {
    let ns = |seconds: u64, ns: u64| seconds.saturating_mul(NSEC).saturating_add(ns.min(NSEC - 1));
    let (every, left) = (ns(timer.isec, timer.insec), ns(timer.vsec, timer.vnsec));
    if every == 0 {
        return now.checked_sub(1).filter(|first| *first > 0);
    }
    let next = now.saturating_add(left.min(every));
    let fit = (next.saturating_sub(1) / every).min(u64::from(overruns) + 1);
    (fit > 0).then(|| next - fit * every).filter(|first| *first < now)
}

/// The same by the clock of the timer; none also for processor time, of which a new process has had none.
fn first(timer: &PosixTimerEntry, overruns: u32) -> Option<u64> {
    const CLOCKS: [i32; 6] = [
        libc::CLOCK_REALTIME,
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_BOOTTIME,
        libc::CLOCK_REALTIME_ALARM,
        libc::CLOCK_BOOTTIME_ALARM,
        libc::CLOCK_TAI,
    ];
    let clock = timer.clock_id as i32;
    CLOCKS.contains(&clock).then(|| past(timer, sys::clock::now_ns(clock), overruns)).flatten()
}

/// Has the kernel note overruns that were told: the timer sends a signal, which is taken away. Before any other signal
/// waits, as the kernel would give the first.
pub fn tell_overruns(senders: &Senders, ops: &mut TaskOps) -> Result<(), Failure> {
    for timer in senders.timers.posix.iter().filter(|timer| senders.tells(timer)) {
        ops.list.label("have a timer count its overruns");
        set_past(timer, timer.overrun, ops)?;
        let set = ops.bytes(&(1u64 << (timer.si_signo - 1)).to_ne_bytes())?;
        // It is there at once, or never.
        let limit = ops.bytes(&words(&[1, 0]))?;
        ops.list.any(libc::SYS_rt_sigtimedwait, &[set.into(), ZERO, limit.into(), 8.into()]);
    }
    Ok(())
}

fn set_past(timer: &PosixTimerEntry, overruns: u32, ops: &mut TaskOps) -> Result<(), Failure> {
    // Only of those that have one.
    let first = first(timer, overruns).unwrap_or(1);
    let spec = words(&[timer.isec, timer.insec.min(NSEC - 1), first / NSEC, first % NSEC]);
    let spec = ops.bytes(&spec)?;
    let args = [u64::from(timer.it_id).into(), libc::TIMER_ABSTIME.into(), spec.into(), ZERO];
    ops.list.ok(libc::SYS_timer_settime, &args);
    Ok(())
}

/// Why these timers cannot be made, if so.
pub fn check(entry: &TaskTimersEntry) -> Option<String> {
    let wrong = entry.posix.iter().find(|timer| timer.it_id > i32::MAX as u32);
    wrong.map(|timer| format!("the timer {} has no id", timer.it_id))
}

/// Makes the POSIX timers, not running yet. `can_choose` says whether the kernel lets ids be chosen.
pub fn create(entry: &TaskTimersEntry, can_choose: bool, ops: &mut TaskOps) -> Result<(), Failure> {
    if entry.posix.is_empty() {
        return Ok(());
    }
    ops.list.label("make the POSIX timers");
    if can_choose {
        ops.list.ok(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), 1.into(), ZERO, ZERO, ZERO]);
    }
    let mut timers: Vec<&PosixTimerEntry> = entry.posix.iter().collect();
    timers.sort_by_key(|timer| timer.it_id);
    if let Some(last) = timers.last().filter(|last| !can_choose && last.it_id > COUNTED_ID_MAX) {
        let object = Object::Named(format!("timer {}", last.it_id));
        let why = "an id as high as this cannot be reached on this kernel";
        return Err(Failure::unsupported(object, why).help(Remedy::Kernel("Linux 6.15")));
    }
    let mut next = 0;
    for timer in timers {
        let id = ops.bytes(&words(&[timer.it_id.into()]))?;
        while !can_choose && next < timer.it_id {
            ops.list.ok(libc::SYS_timer_create, &[libc::CLOCK_MONOTONIC.into(), ZERO, id.into()]);
            ops.list.ok(libc::SYS_timer_delete, &[u64::from(next).into()]);
            next += 1;
        }
        next = timer.it_id + 1;
        // struct sigevent: value, signal, how, thread.
        let mut event = timer.sival_ptr.to_ne_bytes().to_vec();
        for word in [timer.si_signo, timer.it_sigev_notify, timer.notify_thread_id.unwrap_or(0) as u32] {
            event.extend_from_slice(&word.to_ne_bytes());
        }
        event.resize(64, 0);
        let event = ops.bytes(&event)?;
        let clock = i64::from(timer.clock_id as i32) as u64;
        ops.list.call(libc::SYS_timer_create, &[clock.into(), event.into(), id.into()], Judge::Ok);
    }
    if can_choose {
        ops.list.ok(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS.into(), ZERO, ZERO, ZERO, ZERO]);
    }
    Ok(())
}

/// Sets all timers going.
pub fn arm(senders: &Senders, ops: &mut TaskOps) -> Result<(), Failure> {
    let entry = senders.timers;
    ops.list.label("set the timers");
    for (which, timer) in [&entry.real, &entry.virt, &entry.prof].into_iter().enumerate() {
        if (timer.vsec, timer.vusec) != (0, 0) {
            let spec = ops.bytes(&words(&[timer.isec, timer.iusec, timer.vsec, timer.vusec]))?;
            ops.list.ok(libc::SYS_setitimer, &[(which as u64).into(), spec.into(), ZERO]);
        }
    }
    for timer in &entry.posix {
        if senders.waiting.contains(&timer.it_id) {
            set_past(timer, timer.pending_overrun.unwrap_or(0), ops)?;
        } else if !senders.tells(timer) && (timer.vsec, timer.vnsec) != (0, 0) {
            let (vnsec, insec) = (timer.vnsec.min(NSEC - 1), timer.insec.min(NSEC - 1));
            let spec = ops.bytes(&words(&[timer.isec, insec, timer.vsec, vnsec]))?;
            ops.list.ok(libc::SYS_timer_settime, &[u64::from(timer.it_id).into(), ZERO, spec.into(), ZERO]);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overruns_are_intervals_in_the_past() {
        let timer = |isec: u64, vsec: u64| PosixTimerEntry { isec, vsec, ..PosixTimerEntry::default() };
        // Expired at 30, 40 and 50, next at 60: two overruns.
        assert_eq!(past(&timer(10, 7), 53 * NSEC, 2), Some(30 * NSEC));
        // The clock has not run that long.
        assert_eq!(past(&timer(10, 7), 53 * NSEC, 1000), Some(10 * NSEC));
        assert_eq!(past(&timer(100, 7), 53 * NSEC, 0), None);
        assert_eq!(past(&timer(0, 0), 53 * NSEC, 0), Some(53 * NSEC - 1));
        assert_eq!(past(&timer(u64::MAX, u64::MAX), u64::MAX, u32::MAX), None);
    }

    #[test]
    fn a_signal_tells_its_timer() {
        let mut info = [0u8; 128];
        info[8..12].copy_from_slice(&libc::SI_TIMER.to_ne_bytes());
        info[16] = 7;
        assert_eq!(timer_of(&info), Some(7));
        info[8..12].copy_from_slice(&libc::SI_QUEUE.to_ne_bytes());
        assert_eq!(timer_of(&info), None);
        assert_eq!(timer_of(&[0; 5]), None);
    }
}
