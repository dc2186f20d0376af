//! Which memory changes between one snapshot and the next.
//!
//! The kernel notes the first write to every page that was protected through a userfaultfd(2) of the process
//! (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7), and `PAGEMAP_SCAN` tells of it. That lasts as long as the descriptor
//! lives. Between two runs of this program it is held by a *keeper*: this program again, under the name
//! `crtools-keeper`, which does nothing but wait for the end of the processes. Its command line says what it
//! has: the id of the run whose images hold the pages as they were protected, and pairs of descriptors, a
//! pidfd and the userfaultfd of that process.
//!
//! When the keeper is killed, the process is as if nobody had ever watched it, and the next snapshot is whole.
//! Not noted, and so always saved: memory that was mapped or moved since, children, and a program that was
//! executed since.

use crate::observe::{areas, find_pages};
use image::{VmaEntry, vma as status};
use kinds::fd::uring;
use kinds::vma;
use model::{Errno, Failure, Object};
use pages::select::{Question, Selection};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use sys::proc::Vma;
use sys::userfault::Userfault;

/// The name of a keeper in `/proc/PID/comm`.
pub const KEEPER: &str = "crtools-keeper";
/// The command that makes this program one.
pub const COMMAND: &str = "keep";
/// Descriptors that a keeper inherits have numbers from here on.
const FIRST: i32 = 100;

/// What a keeper has of one process.
#[derive(Debug, Clone)]
struct Held {
    keeper: i32,
    userfault: i32,
    run_id: String,
}

/// What is known of the processes of a tree from earlier runs.
#[derive(Debug, Default)]
pub struct Known(HashMap<i32, Held>);

impl Known {
    /// Asks the keepers of this host, which run as the same user.
    pub fn find() -> Known {
        let mut known = Known::default();
        let own = fs::metadata("/proc/self").map(|meta| meta.uid()).ok();
        for keeper in sys::fd::numbers("/proc").unwrap_or_default() {
            let path = format!("/proc/{keeper}");
            let is_keeper =
                fs::read(format!("{path}/comm")).is_ok_and(|comm| comm.trim_ascii() == KEEPER.as_bytes());
            if !is_keeper || fs::metadata(&path).map(|meta| meta.uid()).ok() != own {
                continue;
            }
            let text = fs::read(format!("{path}/cmdline")).unwrap_or_default();
            let Some((run_id, pairs)) = parse(&text) else { continue };
            for (pidfd, userfault) in pairs {
                let info = sys::fd::text(&format!("{path}/fdinfo/{pidfd}")).unwrap_or_default();
                let pid = sys::proc::fdinfo(&info, "Pid").and_then(sys::proc::decimal::<i32>);
                if let Some(pid) = pid {
                    known.0.insert(pid, Held { keeper, userfault, run_id: run_id.clone() });
                }
            }
        }
        known
    }

    /// Leaves out all processes but these.
    pub fn keep(&mut self, pids: &[i32]) {
        self.0.retain(|pid, _| pids.contains(pid));
    }

    /// The processes in which what is not marked as written is as it is in the images of `run_id`.
    pub fn since(&self, run_id: &str) -> Vec<i32> {
        let since = self.0.iter().filter(|(_, held)| held.run_id == run_id);
        since.map(|(pid, _)| *pid).collect()
    }

    pub fn has(&self, pid: i32) -> bool {
        self.0.contains_key(&pid)
    }

    /// The userfaultfd of a process, if somebody has one.
    pub fn fetch(&self, pid: i32) -> Option<Result<Userfault, Errno>> {
        let held = self.0.get(&pid)?;
        let fetch = |keeper| sys::process::pidfd_getfd(&keeper, held.userfault).map(Userfault::ready);
        Some(sys::process::pidfd_open(held.keeper).and_then(fetch))
    }

    /// Ends the keepers: nobody is watched any more.
    pub fn forget(&mut self) {
        for (_, held) in self.0.drain() {
            let _ = sys::process::kill(held.keeper, libc::SIGKILL);
        }
    }
}

/// The run id and the pairs of descriptors in a keeper's command line.
fn parse(text: &[u8]) -> Option<(String, Vec<(i32, i32)>)> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split_terminator('\0').skip(1);
    if words.next()? != COMMAND {
        return None;
    }
    let run_id = words.next()?.to_owned();
    let pair = |word: &str| {
        let (pidfd, userfault) = word.split_once(':')?;
        Some((pidfd.parse().ok()?, userfault.parse().ok()?))
    };
    Some((run_id, words.map(pair).collect::<Option<_>>()?))
}

/// A process whose writes will be noted.
#[derive(Debug)]
pub struct Watched {
    pid: i32,
    userfault: Userfault,
}

impl Watched {
    pub fn is_of(&self, pid: i32) -> bool {
        self.pid == pid
    }

    pub fn into_userfault(self) -> Userfault {
        self.userfault
    }
}

/// The mappings of a process, with their records.
pub type Maps = [(Vma, VmaEntry)];

/// Is a userfaultfd good for this process, which may have become another program since it was made?
pub fn is_good(userfault: &Userfault, maps: &Maps) -> bool {
    // One of a program that is no more answers ESRCH.
    let first = maps.iter().find(|(map, entry)| is_watchable(map, entry));
    first.is_none_or(|(map, _)| userfault.watch(map.start..map.end).is_ok())
}

/// Why writes of a process cannot be noted: the kernel writes to pages that were handed to it before, and protection says
/// nothing of that.
fn hides_writes(pid: i32, maps: &Maps) -> Option<&'static str> {
    let has = |is: &dyn Fn(&Vma) -> bool| maps.iter().any(|(map, _)| is(map));
    if has(&|map| *map.name == *uring::NAME) {
        return Some("it has an io_uring");
    }
    let is_busy = |map: &Vma| sys::aio::in_flight(pid, map.start).is_none_or(|count| count != 0);
    has(&|map| vma::aio::is_ring(&map.name) && is_busy(map)).then_some("it waits for AIO requests")
}

/// Has the kernel note writes of a frozen process, and finds its pages: those that were not written since that was last
/// done are clean, and from now on all of them are.
///
/// # Errors
/// When its writes cannot be noted, or its pages not found.
pub fn watch(pid: i32, userfault: Userfault, maps: &Maps) -> Result<(Watched, Selection), Failure> {
    if let Some(why) = hides_writes(pid, maps) {
        return Err(Failure::conflict(Object::Task, "note changes of its memory", why).of(pid));
    }
    // One that cannot be watched counts as changed.
    let watches = |(map, entry): &(Vma, VmaEntry)| {
        is_watchable(map, entry) && userfault.watch(map.start..map.end).is_ok()
    };
    let watched: HashSet<u64> = maps.iter().filter(|map| watches(map)).map(|(map, _)| map.start).collect();
    let mut areas = areas(maps);
    areas.iter_mut().for_each(|area| area.is_watched = watched.contains(&area.range.start));
    let pages = find_pages(pid, &areas, Question::AndBeginAnew)?;
    Ok((Watched { pid, userfault }, pages))
}

fn is_watchable(map: &Vma, entry: &VmaEntry) -> bool {
    !map.is_shared
        && !vma::hugetlb::is_huge(map)
        && vma::content(entry) == vma::Content::Private
        && entry.status & (status::VDSO | status::VVAR | status::VSYSCALL | status::AIO_RING) == 0
}

/// Hands what is watched to a new keeper.
///
/// # Errors
/// When it cannot be started; then nobody is watched.
pub fn keep(watched: Vec<Watched>, run_id: &str) -> Result<(), Failure> {
    if watched.is_empty() {
        return Ok(());
    }
    let explain = |error: Errno| error.on(Object::Tree, "start the keeper of what is watched");
    let mut command = Command::new("/proc/self/exe");
    command.arg0("crtools").arg(COMMAND).arg(run_id);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .current_dir("/")
        .process_group(0);
    let mut held = Vec::new();
    for Watched { pid, userfault } in &watched {
        let pidfd = sys::process::pidfd_open(*pid).map_err(explain)?;
        let pidfd = sys::fd::duplicate_from(&pidfd, FIRST).map_err(explain)?;
        let userfault = sys::fd::duplicate_from(userfault, FIRST).map_err(explain)?;
        command.arg(format!("{}:{}", pidfd.as_raw_fd(), userfault.as_raw_fd()));
        held.extend([pidfd, userfault]);
    }
    let started = command.spawn().map_err(|error| explain(sys::memory::io_errno("execve", &error)))?;
    // From its first word on it can be found.
    let mut word = [0];
    let said = started.stdout.map_or(Ok(0), |mut stdout| stdout.read(&mut word));
    match said {
        Ok(1) => Ok(()),
        _ => Err(Failure::conflict(Object::Tree, "start the keeper of what is watched", "it ended at once")),
    }
}

/// What a keeper does: waits until every process that it has a descriptor of has ended. `words` are what
/// follows the command.
///
/// # Errors
/// For words that no run of this program has written.
pub fn keeper(words: &[String]) -> Result<(), Failure> {
    let wrong = || Failure::conflict(Object::Named("keep".into()), "", "is started by other commands alone");
    let line: String = ["", COMMAND]
        .into_iter()
        .chain(words.iter().map(String::as_str))
        .map(|word| format!("{word}\0"))
        .collect();
    let (_, pairs) = parse(line.as_bytes()).ok_or_else(wrong)?;
    let is_held = |number: i32| pairs.iter().any(|pair| number == pair.0 || number == pair.1);
    for number in sys::fd::numbers("/proc/self/fd").map_err(|_| wrong())? {
        // Whatever else this program was started with is not for a process that stays.
        if number > 2 && !is_held(number) {
            sys::inherited::close(number);
        }
    }
    let mut pidfds = Vec::with_capacity(pairs.len());
    for (pidfd, _) in &pairs {
        pidfds.push(sys::inherited::duplicate(*pidfd).map_err(|_| wrong())?);
    }
    fs::write("/proc/self/comm", KEEPER).map_err(|_| wrong())?;
    sys::process::lead_session();
    std::io::stdout().write_all(b"\n").and_then(|()| std::io::stdout().flush()).map_err(|_| wrong())?;
    sys::inherited::close(1);
    for pidfd in pidfds {
        sys::fd::wait_readable(&pidfd).map_err(|_| wrong())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_of_a_keeper_is_understood_and_others_are_not() {
        let line = b"crtools\0keep\0some-run\x00100:101\x00102:103\0";
        assert_eq!(parse(line), Some(("some-run".to_owned(), vec![(100, 101), (102, 103)])));
        assert_eq!(parse(b"crtools\0dump\0-t\x005\0"), None);
        assert_eq!(parse(b"crtools\0keep\0some-run\0nonsense\0"), None);
        assert_eq!(parse(b""), None);
    }
}
