//! What each thread of the new tree has of its own, which it takes by itself: the last lists of the agents.

use super::{Exec, SIGSET, tree_error};
use crate::load::Task;
use agent::{Arg, List};
use kinds::contract::TaskOps;
use kinds::fd::uring;
use kinds::task::{attributes, creds, limits, numa, rseq, sched, seccomp, signals, timers};
use kinds::vma;
use model::{Failure, Object};
use std::collections::HashSet;

impl Exec<'_> {
    pub(super) fn set_name(&self, comm: &[u8], ops: &mut TaskOps) -> Result<(), Failure> {
        let name = ops.bytes(&[&comm[..comm.len().min(15)], &[0][..]].concat())?;
        let zero = Arg::Value(0);
        ops.list
            .label("set the name")
            .ok(libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into(), zero, zero, zero]);
        Ok(())
    }

    /// What each thread has of its own, credentials last.
    pub(super) fn set_own(&self) -> Result<(), Failure> {
        let can_raise = self.own.cap_effective >> 24 & 1 != 0;
        let is_own_everywhere = sched::is_everywhere(&sys::process::affinity(0).map_err(tree_error)?);
        let own_slack = sys::process::own_timer_slack();
        let own_securebits = sys::process::own_securebits();
        let own_sched = sys::process::sched(0).map_err(tree_error)?;
        let can_choose_timers = sys::probe::timer_cr_ids().is_ok();
        let mut runs = Vec::new();
        let mut finished: HashSet<u32> = HashSet::new();
        for (at, task) in self.tasks().filter(|(_, task)| !task.is_zombie()) {
            let tc = task.tc();
            for (nth, (tid, core)) in task.tids.iter().zip(&task.cores).enumerate() {
                let mut list = List::new();
                let ops = &mut TaskOps { list: &mut list, area: &self.area };
                // The loader has seen to it that both are there.
                let (Some(thread), Some(info)) = (&core.thread_core, &core.thread_info) else { continue };
                if nth == 0 {
                    self.drain_child_signals(ops)?;
                    signals::restore(&tc.sigactions, ops)?;
                    if let Some(entry) = &tc.timers {
                        timers::create(entry, can_choose_timers, ops)?;
                    }
                    if self.plan.adopts(&self.checkpoint, at) && tc.child_subreaper != Some(true) {
                        attributes::adopt_no_more(ops);
                    }
                    attributes::restore_process(
                        &attributes::ProcessAttributes {
                            is_subreaper: tc.child_subreaper == Some(true),
                            dumpable: 1,
                            thp_disabled: u32::from(task.mm.thp_disabled == Some(true))
                                | task.mm.thp_flags.unwrap_or(0),
                            membarrier: tc.membarrier_registration_mask.unwrap_or(0),
                            brk: task.mm.mm_brk,
                            personality: tc.personality,
                        },
                        ops,
                    );
                }
                self.set_name(thread.comm.as_deref().unwrap_or(&tc.comm), ops)?;
                if let Some(stack) = &thread.sas {
                    attributes::restore_stack(stack, ops)?;
                }
                if thread.futex_rla != 0 {
                    let args = [thread.futex_rla.into(), u64::from(thread.futex_rla_len).into()];
                    ops.list.label("set the robust list").ok(libc::SYS_set_robust_list, &args);
                }
                ops.list.label("set where its id is cleared");
                ops.list.ok(libc::SYS_set_tid_address, &[info.clear_tid_addr.into()]);
                if let Some(entry) = &thread.rseq_entry {
                    rseq::restore(entry, ops)?;
                }
                // Before the policy: a real-time thread has no slack to set.
                attributes::restore_timer_slack(thread.timer_slack, own_slack, ops);
                sched::restore_affinity(thread, is_own_everywhere, ops)?;
                numa::restore(thread, ops)?;
                uring::restore(thread, ops)?;
                sched::restore(thread, &own_sched, ops)?;
                if nth == 0 {
                    if let Some(limits) = &tc.rlimits {
                        limits::restore(limits, can_raise, task.pid, ops)?;
                    }
                    self.finish_files(task, &mut finished, ops)?;
                    for entry in &task.mm.vmas {
                        vma::seal(entry, ops);
                    }
                }
                seccomp::restore(thread, &self.checkpoint.chains, ops)?;
                if let Some(entry) = &thread.creds {
                    let missing = creds::missing(entry, &self.own);
                    if missing != 0 {
                        let why = format!("has capabilities that this program lacks: {missing:#x}");
                        return Err(
                            Failure::conflict(Object::Thread(*tid), "set the capabilities", why).of(task.pid)
                        );
                    }
                    if !creds::has_already(entry, &self.own, own_securebits) {
                        creds::restore(entry, &self.own, ops)?;
                    }
                }
                let dumpable = if nth == 0 { task.mm.dumpable } else { None };
                attributes::restore_after_creds(dumpable, thread.pdeath_sig.unwrap_or(0), ops);
                runs.push((task.pid, self.area.start(self.slots[at][nth], list).map_err(tree_error)?));
            }
        }
        self.wait_all(runs)
    }

    /// Zombies have just ended, which is old news to their parents.
    fn drain_child_signals(&self, ops: &mut TaskOps) -> Result<(), Failure> {
        let set = ops.bytes(&(1u64 << (libc::SIGCHLD - 1)).to_ne_bytes())?;
        let now = ops.bytes(&[0; 16])?;
        ops.list.any(libc::SYS_rt_sigtimedwait, &[set.into(), 0.into(), now.into(), SIGSET.into()]);
        Ok(())
    }

    /// Links between descriptors, and who gets their signals: once for each open file, in a task that has it.
    fn finish_files(
        &self,
        task: &Task,
        finished: &mut HashSet<u32>,
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        for entry in &self.checkpoint.tables[&task.ids.files_id] {
            let Some((kind, record)) = self.checkpoint.files.get(entry.id) else { continue };
            if !finished.insert(entry.id) {
                continue;
            }
            kind.finish(record, entry.fd as i32, ops)?;
            if let Some(owner) = kind.owner(record).filter(|owner| owner.pid != 0 || owner.signum != 0) {
                const F_SETOWN_EX: i32 = 15;
                ops.list.label("set who gets a file's signals");
                let who = ops.bytes(&[owner.pid_type.to_ne_bytes(), owner.pid.to_ne_bytes()].concat())?;
                let number = entry.fd as i32;
                ops.list.ok(libc::SYS_fcntl, &[number.into(), F_SETOWN_EX.into(), who.into()]);
                ops.list.ok(
                    libc::SYS_fcntl,
                    &[number.into(), sys::fd::F_SETSIG.into(), u64::from(owner.signum).into()],
                );
                let flags = self.open.files.get(entry.id).and_then(|fd| sys::fd::status_flags(fd).ok());
                if let Some(flags) = flags.filter(|flags| flags & libc::O_ASYNC as u32 != 0) {
                    // The signals tell the number under which they were asked for: not ours.
                    for flags in [flags & !(libc::O_ASYNC as u32), flags] {
                        let flags = u64::from(flags).into();
                        ops.list.ok(libc::SYS_fcntl, &[number.into(), libc::F_SETFL.into(), flags]);
                    }
                }
            }
        }
        // To close a number lets record locks go, so they come last.
        for lock in self.checkpoint.locks.iter().filter(|lock| lock.pid == task.pid) {
            kinds::fd::locks::finish(lock, ops)?;
        }
        Ok(())
    }

    /// Pending signals and timers: the last that the agents do.
    pub(super) fn start_timers(&self) -> Result<(), Failure> {
        let mut runs = Vec::new();
        for (at, task) in self.tasks().filter(|(_, task)| !task.is_zombie()) {
            let threads = task.cores.iter().filter_map(|core| core.thread_core.as_ref()?.signals_p.as_ref());
            let queues = threads.chain(&task.tc().signals_s);
            let senders = task.tc().timers.as_ref().map(|entry| timers::Senders::new(entry, queues));
            for (nth, (tid, core)) in task.tids.iter().zip(&task.cores).enumerate() {
                let mut list = List::new();
                let ops = &mut TaskOps { list: &mut list, area: &self.area };
                let Some(thread) = &core.thread_core else { continue };
                if let Some(senders) = senders.as_ref().filter(|_| nth == 0) {
                    timers::tell_overruns(senders, ops)?;
                }
                if let Some(queue) = &thread.signals_p {
                    signals::restore_pending(queue, senders.as_ref(), task.pid, Some(*tid), ops)?;
                }
                if nth == 0 {
                    if let Some(queue) = &task.tc().signals_s {
                        signals::restore_pending(queue, senders.as_ref(), task.pid, None, ops)?;
                    }
                    if let Some(senders) = &senders {
                        timers::arm(senders, ops)?;
                    }
                }
                if !list.is_empty() {
                    runs.push((task.pid, self.area.start(self.slots[at][nth], list).map_err(tree_error)?));
                }
            }
        }
        self.wait_all(runs)
    }
}
