//! Small attributes of a process or thread, most of them behind prctl(2): alternate signal stack, timer
//! slack, parent death signal, where the kernel clears the tid, subreaper, dumpable, huge pages, membarrier, break.
//!
//! Read from: the calls themselves, in the thread; or, for threads that are many, the kernel's tracing. Rebuilt by: their
//! counterparts.

use super::{Answers, Ask, ZERO, words};
use crate::contract::TaskOps;
use agent::Judge;
use image::ThreadSasEntry;
use model::Failure;
use sys::threads::Told;

const PR_GET_TID_ADDRESS: i32 = 40;
const MEMBARRIER_CMD_GET_REGISTRATIONS: i32 = 1 << 9;
/// The commands that register, by the bit of GET_REGISTRATIONS.
const MEMBARRIER_REGISTER: u32 = 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8;
const SS_DISABLE: u32 = 2;
const SS_AUTODISARM: u32 = 1 << 31;

/// Questions for every thread.
#[derive(Debug, Clone, Copy)]
pub struct AskedThread {
    stack: u64,
    death: u64,
    clear_tid: u64,
    slack: usize,
}

/// What a thread answered.
#[derive(Debug, Clone, PartialEq)]
pub struct ThreadAttributes {
    pub stack: ThreadSasEntry,
    pub death_signal: u32,
    /// Where the kernel writes zero when the thread ends.
    pub clear_tid: u64,
    /// How late its timers may be, in nanoseconds.
    pub timer_slack: u64,
}

fn prctl(ask: &mut Ask, option: i32, argument: u64) -> usize {
    ask.list.ok(libc::SYS_prctl, &[option.into(), argument.into(), ZERO, ZERO, ZERO])
}

pub fn ask_thread(ask: &mut Ask) -> Result<AskedThread, Failure> {
    let (stack, death, clear_tid) = (ask.room(24)?, ask.room(8)?, ask.room(8)?);
    ask.list.label("read the attributes of a thread");
    ask.list.ok(libc::SYS_sigaltstack, &[ZERO, stack.into()]);
    prctl(ask, libc::PR_GET_PDEATHSIG, death);
    prctl(ask, PR_GET_TID_ADDRESS, clear_tid);
    let slack = prctl(ask, libc::PR_GET_TIMERSLACK, 0);
    Ok(AskedThread { stack, death, clear_tid, slack })
}

impl AskedThread {
    pub fn answer(self, answers: Answers) -> ThreadAttributes {
        let [ss_sp, flags, ss_size] = answers.words(self.stack);
        let [death] = answers.words(self.death);
        let [clear_tid] = answers.words(self.clear_tid);
        // Whether the thread is on the stack now follows from its stack pointer.
        let ss_flags = flags as u32 & (SS_DISABLE | SS_AUTODISARM);
        ThreadAttributes {
            stack: ThreadSasEntry { ss_sp, ss_size, ss_flags },
            death_signal: death as u32,
            clear_tid,
            timer_slack: answers.result(self.slack) as u64,
        }
    }
}

impl From<&Told> for ThreadAttributes {
    fn from(told: &Told) -> ThreadAttributes {
        let (ss_sp, ss_size, flags) = told.stack;
        let disabled = if ss_size == 0 { SS_DISABLE } else { 0 };
        ThreadAttributes {
            stack: ThreadSasEntry { ss_sp, ss_size, ss_flags: flags & SS_AUTODISARM | disabled },
            death_signal: told.death_signal,
            clear_tid: told.clear_tid,
            timer_slack: told.timer_slack,
        }
    }
}

/// Sets how late timers may be; zero is that of a real-time thread, which has none to set.
pub fn restore_timer_slack(slack: Option<u64>, own: u64, ops: &mut TaskOps) {
    if let Some(slack) = slack.filter(|slack| *slack != own && *slack != 0) {
        ops.list.label("set the timer slack");
        ops.list.ok(libc::SYS_prctl, &[libc::PR_SET_TIMERSLACK.into(), slack.into(), ZERO, ZERO, ZERO]);
    }
}

/// Sets the alternate signal stack.
pub fn restore_stack(stack: &ThreadSasEntry, ops: &mut TaskOps) -> Result<(), Failure> {
    if stack.ss_flags & SS_DISABLE != 0 || stack.ss_size == 0 {
        return Ok(());
    }
    ops.list.label("set the alternate signal stack");
    let flags = stack.ss_flags & SS_AUTODISARM;
    let stack = ops.bytes(&words(&[stack.ss_sp, flags.into(), stack.ss_size]))?;
    ops.list.ok(libc::SYS_sigaltstack, &[stack.into(), ZERO]);
    Ok(())
}

/// Questions for a process, asked of its leader.
#[derive(Debug, Clone, Copy)]
pub struct AskedProcess {
    subreaper: u64,
    dumpable: usize,
    thp: usize,
    membarrier: usize,
    brk: usize,
    personality: usize,
}

/// What a process answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessAttributes {
    pub is_subreaper: bool,
    /// 0 no, 1 yes, 2 for root alone.
    pub dumpable: i32,
    /// As PR_GET_THP_DISABLE tells it: bit 0, and flags.
    pub thp_disabled: u32,
    /// Registered commands of membarrier(2), as GET_REGISTRATIONS tells them.
    pub membarrier: u32,
    /// End of the heap.
    pub brk: u64,
    pub personality: u32,
}

pub fn ask_process(ask: &mut Ask) -> Result<AskedProcess, Failure> {
    let subreaper = ask.room(8)?;
    ask.list.label("read the attributes of a process");
    prctl(ask, libc::PR_GET_CHILD_SUBREAPER, subreaper);
    Ok(AskedProcess {
        subreaper,
        dumpable: prctl(ask, libc::PR_GET_DUMPABLE, 0),
        thp: prctl(ask, libc::PR_GET_THP_DISABLE, 0),
        // Linux 6.3; before, the registrations cannot be told.
        membarrier: ask
            .list
            .any(libc::SYS_membarrier, &[MEMBARRIER_CMD_GET_REGISTRATIONS.into(), ZERO, ZERO]),
        brk: ask.list.ok(libc::SYS_brk, &[ZERO]),
        personality: ask.list.ok(libc::SYS_personality, &[0xffff_ffffu64.into()]),
    })
}

impl AskedProcess {
    pub fn answer(self, answers: Answers) -> ProcessAttributes {
        let [subreaper] = answers.words(self.subreaper);
        ProcessAttributes {
            is_subreaper: subreaper as u32 != 0,
            dumpable: answers.result(self.dumpable) as i32,
            thp_disabled: answers.result(self.thp).max(0) as u32,
            membarrier: answers.result(self.membarrier).max(0) as u32,
            brk: answers.result(self.brk) as u64,
            personality: answers.result(self.personality) as u32,
        }
    }
}

/// Ends that a process adopts the orphans below it.
pub fn adopt_no_more(ops: &mut TaskOps) {
    ops.list.label("adopt no more orphans");
    ops.list.ok(libc::SYS_prctl, &[libc::PR_SET_CHILD_SUBREAPER.into(), ZERO, ZERO, ZERO, ZERO]);
}

/// Sets what a process has; not dumpability, which credentials reset.
pub fn restore_process(attributes: &ProcessAttributes, ops: &mut TaskOps) {
    ops.list.label("set the attributes of a process");
    let set = |ops: &mut TaskOps, option: i32, value: u64| {
        ops.list.ok(libc::SYS_prctl, &[option.into(), value.into(), ZERO, ZERO, ZERO]);
    };
    if attributes.is_subreaper {
        set(ops, libc::PR_SET_CHILD_SUBREAPER, 1);
    }
    if attributes.thp_disabled & 1 != 0 {
        let flags = u64::from(attributes.thp_disabled & !1);
        let args = [libc::PR_SET_THP_DISABLE.into(), 1.into(), flags.into(), ZERO, ZERO];
        ops.list.ok(libc::SYS_prctl, &args);
    }
    for bit in (0..32).filter(|bit| (attributes.membarrier & MEMBARRIER_REGISTER) >> bit & 1 != 0) {
        ops.list.ok(libc::SYS_membarrier, &[(1u64 << bit).into(), ZERO, ZERO]);
    }
    ops.list.ok(libc::SYS_personality, &[u64::from(attributes.personality).into()]);
}

/// Dumpability and the parent death signal: both are reset when credentials change.
pub fn restore_after_creds(dumpable: Option<i32>, death_signal: u32, ops: &mut TaskOps) {
    ops.list.label("set what credentials reset");
    if let Some(dumpable @ (0 | 1)) = dumpable {
        let args = [libc::PR_SET_DUMPABLE.into(), dumpable.into(), ZERO, ZERO, ZERO];
        ops.list.call(libc::SYS_prctl, &args, Judge::Ok);
    }
    if death_signal != 0 {
        let args = [libc::PR_SET_PDEATHSIG.into(), u64::from(death_signal).into(), ZERO, ZERO, ZERO];
        ops.list.ok(libc::SYS_prctl, &args);
    }
}
