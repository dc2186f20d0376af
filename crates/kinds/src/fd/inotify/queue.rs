//! Events that were not read: how a new queue comes to have the same.
//!
//! Nobody can put events in a queue. So what they tell is done once more, out of everybody's sight: with files and
//! folders in a file system of our own, watched under the old numbers, each watch for the one thing that is about to
//! happen. That such a watch ends is an event, too, and would be the last in the queue. So the queue is full by then,
//! and the kernel drops it: before all others it was filled with events of no meaning, up to the one that says that
//! some were lost, which is there only once. These are read, and those wanted are left.
//!
//! Source: fs/notify/notification.c, fsnotify_insert_event; fs/notify/inotify/inotify_fsnotify.c.

use model::Errno;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use sys::inotify::Event;

use libc::{
    IN_ACCESS, IN_ALL_EVENTS, IN_ATTRIB, IN_CLOSE_NOWRITE, IN_CLOSE_WRITE, IN_CREATE, IN_DELETE, IN_DELETE_SELF,
    IN_IGNORED, IN_ISDIR, IN_MODIFY, IN_MOVE_SELF, IN_MOVED_FROM, IN_MOVED_TO, IN_OPEN, IN_Q_OVERFLOW, IN_UNMOUNT,
};

/// How far apart in the queue the kernel's events may be that it makes together.
const NEAR: usize = 64;
/// Longer queues are not filled: it would take seconds.
const MUCH: usize = 1 << 20;
/// The bytes of an event without a name.
const EVENT: usize = size_of::<libc::inotify_event>();

/// The event that says that others were lost.
pub fn overflow() -> Event {
    Event { wd: -1, mask: IN_Q_OVERFLOW, ..Event::default() }
}

/// What stands for something that is watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Sort {
    is_folder: bool,
    /// On a file system of its own.
    is_apart: bool,
}

/// What is done next.
#[derive(Debug, PartialEq, Eq)]
enum Act<'e> {
    /// Something is watched from here on.
    Begin(i32, Sort),
    Touch(&'e Event),
    /// From here to there, with one cookie.
    Move(&'e Event, &'e Event),
    /// The watch ends, after this.
    End(i32, u32),
    Overflow,
}

/// Can it be done, with what stands for what is watched?
fn is_possible(event: &Event, sort: Sort) -> bool {
    let (what, in_folder) = (event.mask & !IN_ISDIR, event.mask & IN_ISDIR != 0);
    let is_name = |name: &[u8]| {
        name.len() <= libc::NAME_MAX as usize
            && ![&b"."[..], b".."].contains(&name)
            && !name.iter().any(|byte| [0, b'/'].contains(byte))
    };
    let fits_what = match what {
        IN_ACCESS | IN_OPEN | IN_CLOSE_NOWRITE | IN_ATTRIB => true,
        IN_MODIFY | IN_CLOSE_WRITE => !in_folder,
        IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO => !event.name.is_empty(),
        IN_MOVE_SELF => return !in_folder && event.name.is_empty(),
        _ => false,
    };
    let fits_place = match event.name.is_empty() {
        true => in_folder == sort.is_folder,
        false => sort.is_folder && is_name(&event.name),
    };
    fits_what && fits_place
}

/// What stands for each watch, by its number and how many with this number have ended before.
fn sorts(events: &[Event]) -> HashMap<(i32, u32), Sort> {
    let (mut sorts, mut ended) = (HashMap::new(), HashMap::new());
    for event in events {
        let ended: &mut u32 = ended.entry(event.wd).or_default();
        let sort: &mut Sort = sorts.entry((event.wd, *ended)).or_default();
        sort.is_folder |= !event.name.is_empty() || event.mask & IN_ISDIR != 0;
        sort.is_apart |= event.mask & IN_UNMOUNT != 0;
        *ended += u32::from(event.mask & IN_IGNORED != 0);
    }
    sorts
}

/// What leads to these events; none where nothing does.
fn plan(events: &[Event]) -> Option<Vec<Act<'_>>> {
    let sorts = sorts(events);
    let mut acts = Vec::new();
    let mut ended: HashMap<i32, u32> = HashMap::new();
    let mut begun = HashSet::new();
    let mut done = vec![false; events.len()];
    for (nth, event) in events.iter().enumerate() {
        if std::mem::replace(&mut done[nth], true) {
            continue;
        }
        if event.mask == IN_Q_OVERFLOW {
            acts.push(Act::Overflow);
            continue;
        }
        let mut with = |is_it: &dyn Fn(&Event) -> bool| {
            let found = (nth + 1..events.len()).take(NEAR).find(|at| !done[*at] && is_it(&events[*at]))?;
            done[found] = true;
            Some(&events[found])
        };
        let mut begin = |acts: &mut Vec<Act>, ended: &HashMap<i32, u32>, wd: i32| {
            let this = (wd, ended.get(&wd).copied().unwrap_or(0));
            let sort = *sorts.get(&this)?;
            if begun.insert(this) {
                acts.push(Act::Begin(wd, sort));
            }
            (wd > 0).then_some(sort)
        };
        let sort = begin(&mut acts, &ended, event.wd)?;
        let what = event.mask & !IN_ISDIR;
        match what {
            IN_DELETE_SELF | IN_UNMOUNT | IN_IGNORED => {
                if what != IN_IGNORED {
                    // It is the next that is heard of this watch.
                    with(&|other| other.wd == event.wd).filter(|other| other.mask == IN_IGNORED)?;
                }
                *ended.entry(event.wd).or_default() += 1;
                acts.push(Act::End(event.wd, what));
            }
            _ if !is_possible(event, sort) => return None,
            _ => {
                let arrives = (what == IN_MOVED_FROM)
                    .then(|| {
                        let mask = IN_MOVED_TO | event.mask & IN_ISDIR;
                        with(&|other| other.mask == mask && other.cookie == event.cookie)
                    })
                    .flatten();
                match arrives {
                    None => acts.push(Act::Touch(event)),
                    Some(to) => {
                        let there = begin(&mut acts, &ended, to.wd)?;
                        let is_one = event.wd == to.wd || !sort.is_apart && !there.is_apart;
                        (is_one && is_possible(to, there)).then_some(())?;
                        acts.push(Act::Move(event, to));
                    }
                }
            }
        }
    }
    let is_twice = acts.iter().filter(|act| **act == Act::Overflow).count() > 1;
    (!is_twice).then_some(acts)
}

/// Can a new queue come to have these events?
pub fn is_sound(events: &[Event]) -> bool {
    plan(events).is_some()
}

fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn make(path: &Path, is_folder: bool) -> std::io::Result<()> {
    if is_folder { fs::create_dir(path) } else { fs::write(path, b"x") }
}

fn clear(path: &Path) -> std::io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

struct Stand {
    path: PathBuf,
    /// What is an event now.
    mask: u32,
    /// What is in it, and whether that is a folder.
    holds: Option<(Vec<u8>, bool)>,
    /// The file system of its own.
    place: Option<OwnedFd>,
}

/// Where things happen.
struct Scene<'f> {
    inotify: &'f OwnedFd,
    place: OwnedFd,
    stands: HashMap<i32, Stand>,
    /// How many names were given.
    names: u64,
    /// Events of no meaning are those of this.
    noise: File,
    noise_wd: i32,
    noises: u64,
}

fn explain(error: &std::io::Error) -> Errno {
    sys::memory::io_errno("make events", error)
}

impl<'f> Scene<'f> {
    fn new(inotify: &'f OwnedFd, events: &[Event]) -> Result<Scene<'f>, Errno> {
        let numbers: HashSet<i32> = events.iter().map(|event| event.wd).collect();
        let free = (1..).find(|number| !numbers.contains(number));
        sys::inotify::set_next(inotify, free.unwrap_or(i32::MAX))?;
        let place = sys::place::nowhere()?;
        // A memfd would be watched in vain: since Linux 6.14 what is read and written there is no event.
        let path = path_of(&place).join("noise");
        let noise = File::options().read(true).write(true).create_new(true).open(path);
        let noise = noise.map_err(|error| explain(&error))?;
        let noise_wd = sys::inotify::watch(inotify, &noise, IN_ACCESS | IN_MODIFY)?;
        Ok(Scene { inotify, place, stands: HashMap::new(), names: 0, noise, noise_wd, noises: 0 })
    }

    /// As many events of no meaning.
    fn make_noise(&mut self, count: usize) -> std::io::Result<()> {
        for _ in 0..count {
            // Equal ones in a row would be one.
            match self.noises % 2 {
                0 => self.noise.write_at(b"x", 0)?,
                _ => self.noise.read_at(&mut [0], 0)?,
            };
            self.noises += 1;
        }
        Ok(())
    }

    /// Takes what is first in the queue.
    fn drop_first(&self, mut bytes: usize) -> Result<(), Errno> {
        let mut events = vec![0; bytes.min(1 << 16)];
        while bytes > 0 {
            let some = bytes.min(events.len());
            bytes -= sys::fd::read(self.inotify, &mut events[..some])?;
        }
        Ok(())
    }

    fn new_name(&mut self) -> String {
        self.names += 1;
        self.names.to_string()
    }

    fn stand(&mut self, wd: i32) -> Result<&mut Stand, Errno> {
        self.stands.get_mut(&wd).ok_or(Errno { call: "inotify_add_watch", code: libc::ENOENT })
    }

    /// From here on, this is an event.
    fn watch(&mut self, wd: i32, mask: u32) -> Result<(), Errno> {
        let inotify = self.inotify;
        let stand = self.stand(wd)?;
        if stand.mask != mask {
            let file = sys::fd::open(&stand.path, libc::O_PATH | libc::O_CLOEXEC)?;
            if sys::inotify::watch(inotify, &file, mask)? != wd {
                return Err(Errno { call: "inotify_add_watch", code: libc::EBUSY });
            }
            stand.mask = mask;
        }
        Ok(())
    }

    /// From here on, nothing is an event.
    fn rest(&mut self, wd: i32) -> Result<(), Errno> {
        // Nothing moves it unless it is meant to.
        self.watch(wd, IN_MOVE_SELF)
    }

    fn begin(&mut self, wd: i32, sort: Sort) -> Result<(), Errno> {
        let place = sort.is_apart.then(sys::place::nowhere).transpose()?;
        let path = path_of(place.as_ref().unwrap_or(&self.place)).join(self.new_name());
        make(&path, sort.is_folder).map_err(|error| explain(&error))?;
        self.stands.insert(wd, Stand { path, mask: 0, holds: None, place });
        sys::inotify::set_next(self.inotify, wd)?;
        self.rest(wd)
    }

    /// What the folder that stands for `wd` holds is this, or there is nothing in it.
    fn hold(&mut self, wd: i32, what: Option<(&[u8], bool)>) -> Result<(), Errno> {
        let held = self.stand(wd)?.holds.clone();
        if held.as_ref().map(|(name, is_folder)| (&name[..], *is_folder)) == what {
            return Ok(());
        }
        self.rest(wd)?;
        let stand = self.stand(wd)?;
        let exchange = || {
            if let Some((name, _)) = held {
                clear(&stand.path.join(OsStr::from_bytes(&name)))?;
            }
            what.map_or(Ok(()), |(name, is_folder)| make(&stand.path.join(OsStr::from_bytes(name)), is_folder))
        };
        exchange().map_err(|error| explain(&error))?;
        stand.holds = what.map(|(name, is_folder)| (name.to_vec(), is_folder));
        Ok(())
    }

    fn touch(&mut self, event: &Event) -> Result<(), Errno> {
        let (what, is_folder) = (event.mask & IN_ALL_EVENTS, event.mask & IN_ISDIR != 0);
        let child = (!event.name.is_empty()).then_some((&event.name[..], is_folder));
        if child.is_some() {
            let is_there = !matches!(what, IN_CREATE | IN_MOVED_TO);
            self.hold(event.wd, child.filter(|_| is_there))?;
        }
        // A name for something on its way.
        let name = self.new_name();
        let stand = self.stand(event.wd)?;
        let beside = stand.path.with_file_name(name);
        let path = child.map_or(stand.path.clone(), |(name, _)| stand.path.join(OsStr::from_bytes(name)));
        if what == IN_MOVED_TO {
            make(&beside, is_folder).map_err(|error| explain(&error))?;
        }
        self.watch(event.wd, what)?;
        let done = match what {
            IN_ACCESS if is_folder => fs::read_dir(&path).map(|all| all.for_each(drop)),
            IN_ACCESS => fs::read(&path).map(drop),
            IN_MODIFY => fs::write(&path, b"x"),
            IN_CLOSE_WRITE => File::options().write(true).open(&path).map(drop),
            IN_OPEN | IN_CLOSE_NOWRITE => File::open(&path).map(drop),
            IN_ATTRIB => fs::metadata(&path).and_then(|there| fs::set_permissions(&path, there.permissions())),
            IN_CREATE => make(&path, is_folder),
            IN_DELETE => clear(&path),
            IN_MOVED_FROM => fs::rename(&path, &beside).and_then(|()| clear(&beside)),
            IN_MOVED_TO => fs::rename(&beside, &path),
            _ => fs::rename(&path, &beside),
        };
        done.map_err(|error| explain(&error))?;
        let stand = self.stand(event.wd)?;
        match what {
            IN_DELETE | IN_MOVED_FROM => stand.holds = None,
            IN_CREATE | IN_MOVED_TO => stand.holds = child.map(|(name, is_folder)| (name.to_vec(), is_folder)),
            IN_MOVE_SELF => stand.path = beside,
            _ => {}
        }
        Ok(())
    }

    fn rename(&mut self, from: &Event, to: &Event) -> Result<(), Errno> {
        let child = |event: &Event| (event.name.clone(), event.mask & IN_ISDIR != 0);
        if from.wd != to.wd {
            self.hold(to.wd, None)?;
        }
        self.hold(from.wd, Some((&from.name, from.mask & IN_ISDIR != 0)))?;
        let old = self.stand(from.wd)?.path.join(OsStr::from_bytes(&from.name));
        let new = self.stand(to.wd)?.path.join(OsStr::from_bytes(&to.name));
        if from.wd == to.wd {
            self.watch(from.wd, IN_MOVED_FROM | IN_MOVED_TO)?;
        } else {
            self.watch(from.wd, IN_MOVED_FROM)?;
            self.watch(to.wd, IN_MOVED_TO)?;
        }
        fs::rename(old, new).map_err(|error| explain(&error))?;
        self.stand(from.wd)?.holds = None;
        self.stand(to.wd)?.holds = Some(child(to));
        Ok(())
    }

    fn end(&mut self, wd: i32, last: u32) -> Result<(), Errno> {
        if last == IN_DELETE_SELF {
            self.hold(wd, None)?;
            self.watch(wd, IN_DELETE_SELF)?;
        }
        let Some(stand) = self.stands.remove(&wd) else { return Ok(()) };
        match last {
            IN_DELETE_SELF => clear(&stand.path).map_err(|error| explain(&error)),
            IN_UNMOUNT => {
                drop(stand.place);
                Ok(())
            }
            _ => sys::inotify::remove(self.inotify, wd),
        }
    }

    /// `before` events are to be in the queue before that of lost ones, and `after` behind it.
    fn play(&mut self, acts: &[Act], limit: usize, before: usize, after: usize) -> Result<(), Errno> {
        let mut noise = limit - before;
        self.make_noise(noise).map_err(|error| explain(&error))?;
        for act in acts {
            match act {
                Act::Begin(wd, sort) => self.begin(*wd, *sort)?,
                Act::Touch(event) => self.touch(event)?,
                Act::Move(from, to) => self.rename(from, to)?,
                Act::End(wd, last) => self.end(*wd, *last)?,
                Act::Overflow => {
                    self.make_noise(1).map_err(|error| explain(&error))?;
                    // One more than fits is in there; with those to come it is full again.
                    let room = if after > 0 { after + 1 } else { 0 };
                    self.drop_first(room * EVENT)?;
                    noise -= room;
                }
            }
        }
        for wd in self.stands.keys().chain([&self.noise_wd]) {
            sys::inotify::remove(self.inotify, *wd)?;
        }
        self.drop_first(noise * EVENT)
    }
}

/// Puts these events in an empty queue; false if that cannot be done, and it is empty again. The next number of a
/// watch is another one afterwards.
pub fn fill(inotify: &OwnedFd, events: &[Event]) -> Result<bool, Errno> {
    let Some(mut acts) = plan(events) else { return Ok(false) };
    let told = events.iter().position(|event| event.mask == IN_Q_OVERFLOW);
    let before = told.unwrap_or(0);
    let after = events.len() - before - usize::from(told.is_some());
    let Some(limit) = sys::inotify::limit().filter(|limit| *limit <= MUCH) else { return Ok(false) };
    // The reading makes room for one event more than is put in.
    if before > limit || after > 0 && after >= limit - before {
        return Ok(false);
    }
    if told.is_none() {
        acts.insert(0, Act::Overflow);
    }
    let mut scene = Scene::new(inotify, events)?;
    let played = scene.play(&acts, limit, before, after);
    let result = played.and_then(|()| if told.is_none() { scene.drop_first(EVENT) } else { Ok(()) });
    let wanted: usize = events.iter().map(Event::size).sum();
    let waiting = sys::inotify::waiting(inotify)?;
    if result.is_ok() && waiting == wanted {
        return Ok(true);
    }
    log::debug!("events that were not read cannot be made again: {waiting} of {wanted} bytes: {result:?}");
    // Nothing is watched any more.
    for wd in scene.stands.keys().chain([&scene.noise_wd]) {
        let _ = sys::inotify::remove(inotify, *wd);
    }
    scene.drop_first(sys::inotify::waiting(inotify)?)?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(wd: i32, mask: u32, cookie: u32, name: &str) -> Event {
        Event { wd, mask, cookie, name: name.as_bytes().to_vec() }
    }

    #[test]
    fn what_the_kernel_makes_together_is_done_at_once() {
        let from = event(1, IN_MOVED_FROM, 5, "a");
        let between = event(3, IN_OPEN, 0, "");
        let to = event(2, IN_MOVED_TO, 5, "b");
        let events = [from.clone(), between.clone(), to.clone(), event(3, IN_IGNORED, 0, "")];
        let folder = Sort { is_folder: true, is_apart: false };
        let expected = vec![
            Act::Begin(1, folder),
            Act::Begin(2, folder),
            Act::Move(&from, &to),
            Act::Begin(3, Sort::default()),
            Act::Touch(&between),
            Act::End(3, IN_IGNORED),
        ];
        assert_eq!(plan(&events), Some(expected));
    }

    #[test]
    fn nothing_leads_to_some_events() {
        let wrong = [
            event(1, IN_OPEN | IN_ACCESS, 0, "a"),
            event(1, IN_MODIFY | IN_ISDIR, 0, "a"),
            event(1, IN_CREATE, 0, ""),
            event(1, IN_CREATE, 0, "a/b"),
            event(1, IN_CREATE, 0, ".."),
            event(1, IN_CREATE, 0, &"n".repeat(256)),
            event(0, IN_OPEN, 0, ""),
            event(-1, IN_OPEN, 0, ""),
            event(1, 0, 0, ""),
            // What is gone is watched no more.
            event(1, IN_DELETE_SELF, 0, ""),
        ];
        for event in wrong {
            assert_eq!(plan(std::slice::from_ref(&event)), None, "{event:?}");
        }
        // Neither a file nor a folder.
        assert_eq!(plan(&[event(1, IN_OPEN, 0, ""), event(1, IN_OPEN, 0, "a")]), None);
        assert_eq!(plan(&[overflow(), overflow()]), None);
    }

    #[test]
    fn a_new_queue_has_the_same_events() {
        if let Err(error) = sys::place::nowhere() {
            return println!("SKIP: no file system of our own: {error}");
        }
        let events = [
            event(9, IN_MOVED_FROM | IN_ISDIR, 5, "a"),
            event(2, IN_MOVED_TO | IN_ISDIR, 5, "b"),
            event(4, IN_DELETE_SELF, 0, ""),
            event(4, IN_IGNORED, 0, ""),
            event(4, IN_ACCESS | IN_ISDIR, 0, "again"),
            event(5, IN_UNMOUNT | IN_ISDIR, 0, ""),
            event(5, IN_IGNORED, 0, ""),
            event(4, IN_MOVE_SELF, 0, ""),
        ];
        let inotify = sys::inotify::init(libc::IN_NONBLOCK).expect("inotify_init1");
        assert_eq!(fill(&inotify, &events), Ok(true));
        let mut bytes = vec![0; 4096];
        let read = sys::fd::read(&inotify, &mut bytes).expect("read");
        assert_eq!(read, events.iter().map(Event::size).sum::<usize>());
        let number = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("four"));
        let mut at = 0;
        let mut cookies = Vec::new();
        for event in &events {
            assert_eq!((number(at), number(at + 4)), (event.wd as u32, event.mask));
            cookies.push(number(at + 8));
            assert!(bytes[at + 16..].starts_with(&event.name));
            at += event.size();
        }
        assert!(cookies[0] == cookies[1] && cookies[0] != 0 && cookies[2..].iter().all(|cookie| *cookie == 0));
        assert_eq!(fill(&inotify, &[overflow()]), Ok(true));
    }
}
