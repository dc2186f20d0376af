//! What has to be made by a process, or with the credentials of somebody: each by a thread that is there for this alone.

use super::{CLONE_THREAD_FLAGS, Exec, tree_error};
use crate::created::is_at_work;
use crate::load::Task;
use crate::memory;
use agent::puppet::CloneArgs;
use agent::{Judge, List};
use kinds::contract::{AnyFdKind, ArmCx, Errand, TaskOps};
use kinds::task::creds;
use model::{Errno, Failure, Object};
use std::any::Any;
use std::os::fd::{AsRawFd, OwnedFd};

/// A file with errands, whose thread has `number` for what it needs.
struct File<'e> {
    kind: &'static dyn AnyFdKind,
    entry: &'e dyn Any,
    fd: &'e OwnedFd,
    number: i32,
}

impl Exec<'_> {
    /// Runs the errands of all files, and maps what was made.
    pub(super) fn run_errands(&self, sources: &memory::Sources) -> Result<(), Failure> {
        for (id, fd, kind, entry) in self.checkpoint.files.opened(self.open.files) {
            for (nth, errand) in kind.errands(entry).into_iter().enumerate() {
                let wanted = errand.pid.or_else(|| self.checkpoint.first_with(id));
                let found = self.tasks().find(|(_, task)| Some(task.pid) == wanted && !task.is_zombie());
                let (at, _) = found.ok_or_else(|| {
                    let why = format!("file {id} needs a process that is not there");
                    Failure::corrupt("files.img", None, why)
                })?;
                let file = File { kind, entry, fd, number: self.service.exe + at as i32 };
                self.run_errand(at, nth, &errand, &file)?;
            }
        }
        let mut runs = Vec::new();
        for (at, task) in self.tasks().filter(|(_, task)| !task.is_zombie()) {
            let mut list = List::new();
            memory::map_made_rings(task, sources, &mut TaskOps { list: &mut list, area: &self.area })?;
            if !list.is_empty() {
                runs.push((task.pid, self.area.start(self.slots[at][0], list).map_err(tree_error)?));
            }
        }
        self.wait_all(runs)
    }

    /// Has threads make the calls that only they can make, as who they are by now.
    pub(super) fn repeat(&self) -> Result<(), Failure> {
        let first_with = |id: u32| self.checkpoint.first_with(id);
        let cx = ArmCx { files: self.open.files, first_with: &first_with };
        for (id, fd, kind, entry) in self.checkpoint.files.opened(self.open.files) {
            for (call, tid) in kind.repeats(entry).into_iter().enumerate() {
                let nth = |task: &Task| task.tids.iter().position(|its| *its == tid);
                let number = |task: &Task| {
                    let table = self.checkpoint.tables.get(&task.ids.files_id)?;
                    table.iter().find(|entry| entry.id == id).map(|entry| entry.fd as i32)
                };
                let mut alive = self.tasks().filter(|(_, task)| !task.is_zombie());
                let found = alive.find_map(|(at, task)| Some((at, nth(task)?, number(task)?)));
                let (at, nth, number) = found.ok_or_else(|| {
                    let why = format!("file {id} needs a thread {tid} that has it open, which is not there");
                    Failure::corrupt("files.img", None, why)
                })?;
                let mut list = List::new();
                let ops = &mut TaskOps { list: &mut list, area: &self.area };
                kind.repeat(entry, call, fd, number, &cx, ops)?;
                let run = self.area.start(self.slots[at][nth], list).map_err(tree_error)?;
                self.wait(self.checkpoint.tasks[at].pid, run)?;
            }
        }
        Ok(())
    }

    fn run_errand(&self, at: usize, nth: usize, errand: &Errand, file: &File) -> Result<(), Failure> {
        let pid = self.checkpoint.tasks[at].pid;
        let slot = self.area.slot(0).map_err(tree_error)?;
        let mut list = List::new();
        let ops = &mut TaskOps { list: &mut list, area: &self.area };
        ops.list.label("make a thread for an errand");
        let args = CloneArgs { flags: CLONE_THREAD_FLAGS as u64, ..CloneArgs::default() };
        let args = ops.bytes(&args.bytes())?;
        let made = [args.into(), CloneArgs::SIZE.into()];
        let made = ops.list.call(libc::SYS_clone3, &made, Judge::Spawn(slot.address()));
        let run = self.area.start(self.slots[at][0], list).map_err(tree_error)?;
        let tid = List::result(&self.wait(pid, run)?, made) as i32;

        let mut list = List::new();
        let ops = &mut TaskOps { list: &mut list, area: &self.area };
        if let Some(with) = errand.with {
            let fd = self.open.files.get(with).ok_or_else(|| {
                Failure::corrupt("files.img", None, format!("file {with} is needed, which is none"))
            })?;
            self.reach().fetch_to(fd.as_raw_fd(), file.number, ops);
        }
        creds::take(errand.creds, &self.own, sys::process::own_securebits(), Object::Task, ops)
            .map_err(|failure| failure.of(pid))?;
        let result = file.kind.run_errand(file.entry, nth, file.fd, file.number, ops)?;
        let run = self.area.start(slot, list).map_err(tree_error)?;
        let executed = self.wait(pid, run)?;
        let mut list = List::new();
        if let Some(result) = result {
            let number = List::result(&executed, result) as i32;
            let explain = |error: Errno| error.on(Object::Task, "take what it has made").of(pid);
            let taken = sys::process::pidfd_open(pid)
                .and_then(|process| sys::process::pidfd_getfd(process, number))
                .map_err(explain)?;
            sys::fd::replace(file.fd, &taken).map_err(explain)?;
            list.ok(libc::SYS_close, &[number.into()]);
        }
        if errand.with.is_some() {
            list.ok(libc::SYS_close, &[file.number.into()]);
        }
        list.ok(libc::SYS_exit, &[0.into()]);
        let _ = self.area.start(slot, list).map_err(tree_error)?;
        while std::path::Path::new(&format!("/proc/{pid}/task/{tid}")).exists() {
            if !is_at_work(pid) {
                let why = "the process ended, or was stopped by a fault";
                return Err(Failure::conflict(Object::Task, "build it", why).of(pid));
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
