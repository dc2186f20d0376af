//! Interval timers and POSIX timers.
//!
//! Read from: getitimer(2), timer_gettime(2), timer_getoverrun(2) in the process; `/proc/PID/timers` from outside.
//! Rebuilt by: setitimer(2); timer_create(2) with the same id, by PR_TIMER_CREATE_RESTORE_IDS since Linux 6.15,
//! before by making and deleting timers until the id comes round. Set at the very end, so that no time passes
//! for them while the tree is being built.
//! Not kept: the count of overruns that was not asked for yet.

use super::{Answers, Ask, ZERO, words};
use crate::contract::TaskOps;
use agent::Judge;
use image::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use model::{Failure, Object, Remedy};
use sys::proc::Timer;

/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
const ITIMERS: u64 = 3;
const SPEC: u64 = 32;
const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const NSEC: u64 = 1_000_000_000;
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
    pub fn answer(self, answers: Answers) -> TaskTimersEntry {
        let itimer = |which: u64| {
            let [isec, iusec, vsec, vusec] = answers.words(self.itimers + which * SPEC);
            // One that has expired stands still until its signal is delivered. A zero would end it.
            let (vsec, vusec) = if (vsec, vusec) == (0, 0) { (isec, iusec) } else { (vsec, vusec) };
            ItimerEntry { isec, iusec, vsec, vusec }
        };
        let posix = self.posix.iter().map(|(timer, spec, overrun)| {
            let [isec, insec, vsec, vnsec] = answers.words(*spec);
            const SIGEV_THREAD_ID: u32 = 4;
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
            }
        });
        TaskTimersEntry { real: itimer(0), virt: itimer(1), prof: itimer(2), posix: posix.collect() }
    }
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
pub fn arm(entry: &TaskTimersEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    ops.list.label("set the timers");
    for (which, timer) in [&entry.real, &entry.virt, &entry.prof].into_iter().enumerate() {
        if (timer.vsec, timer.vusec) != (0, 0) {
            let spec = ops.bytes(&words(&[timer.isec, timer.iusec, timer.vsec, timer.vusec]))?;
            ops.list.ok(libc::SYS_setitimer, &[(which as u64).into(), spec.into(), ZERO]);
        }
    }
    for timer in &entry.posix {
        if (timer.vsec, timer.vnsec) != (0, 0) {
            let (vnsec, insec) = (timer.vnsec.min(NSEC - 1), timer.insec.min(NSEC - 1));
            let spec = ops.bytes(&words(&[timer.isec, insec, timer.vsec, vnsec]))?;
            ops.list.ok(libc::SYS_timer_settime, &[u64::from(timer.it_id).into(), ZERO, spec.into(), ZERO]);
        }
    }
    Ok(())
}
