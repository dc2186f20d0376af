//! A restore whose memory comes later: the server that hands out pages when they are touched, and the restore's
//! way to it.
//!
//! They meet at a stream socket in the work directory, as CRIU's do: for each process its pid (int32), then a byte
//! with its userfaultfd; then [`READY`], which the server says, too, when it can give all of that; when the tree runs,
//! [`RUNS`], and when it never will, [`FAILED`]. Where no server waits, the restore starts one. It stays until every page
//! has come, or every process has ended. If it is killed before, the memory that has not come reads as zeros: it is as
//! much a part of the tree as its memory. Not so while the restore has the descriptors too, until the server has been
//! told that the tree runs: a touch waits then, and the tree is killed.
//!
//! Pages are in the images, or still with the dump (`--page-server`). If that is lost midway, the tree is hit by SIGBUS
//! where it touches what has not come.

use crate::working_set::{Ahead, Recording};
use image::Dir;
use image::pagemap::{Pagemap, PagesFile, Run};
use model::{Errno, Failure, Failures, Object, Options};
use pages::away::Away;
use pages::background::{self, Starting};
use pages::chain::{self, Chain, Freeing};
use pages::compressed::Blocks;
use pages::lazy::{Source, Task, Waiting};
use pages::server;
use pages::take::pages_name;
use std::cell::{Cell, RefCell};
use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use sys::memory::View;
use sys::userfault::Userfault;

/// The name of the socket in the work directory.
const SOCKET: &str = "lazy-pages.socket";
/// The name to which a server binds it, to be seen by getpeername(2). One that does not is CRIU's: it says nothing, and
/// gives only pages that its own dump has marked.
const ANSWERING: &str = "lazy-pages.answer";
/// "The tree runs", in the place of a pid.
const RUNS: u32 = 0x5253_5446;
/// "The restore has failed, and nothing of the tree is left"; no pid either. Ours.
const FAILED: u32 = 0x8000_0000;
/// "Write down what is touched first"; before the first process. Ours.
const RECORD: u32 = 0x8000_0001;
/// "Free in the images what the tree has"; likewise.
const FREE: u32 = 0x8000_0002;
/// "That was all: is it there?", and the answer, that it is. Ours.
const READY: u32 = 0x8000_0003;

fn explain(doing: &'static str) -> impl Fn(Errno) -> Failure {
    move |error| error.on(Object::Named("lazy pages".into()), doing)
}

fn address(path: &Path) -> Vec<u8> {
    let name = [path.as_os_str().as_encoded_bytes(), &[0]].concat();
    sys::socket::unix_address(&name)
}

/// Says a word.
fn say(socket: &OwnedFd, word: u32) -> Result<(), Errno> {
    sys::socket::send_all(socket, &word.to_ne_bytes(), &[])
}

/// A server that will be needed. Its start, and its reading of the images, take their time beside the restore's.
#[derive(Debug)]
pub struct Coming<'o> {
    options: &'o Options,
    starting: Option<Starting>,
}

impl<'o> Coming<'o> {
    /// Starts a server, if none waits.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn begin(options: &'o Options) -> Result<Coming<'o>, Failure> {
        let is_there = options.work_dir.join(SOCKET).exists();
        let starting = (!is_there).then(|| begin(options)).transpose()?;
        Ok(Coming { options, starting })
    }

    fn ready(&mut self) -> Result<(), Failure> {
        self.starting.take().map_or(Ok(()), |starting| starting.ready().map(drop))
    }

    /// # Errors
    /// When the server has ended, or cannot be reached.
    pub fn reach(mut self) -> Result<Server, Failure> {
        self.ready()?;
        Server::reach(self.options)
    }
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        if self.starting.is_some() && self.ready().is_ok() {
            // It hears that there is no restore.
            drop(Server::find(self.options));
        }
    }
}

/// The way from a restore to the server. Dropped before the tree runs, it says that it never will.
#[derive(Debug)]
pub struct Server {
    socket: OwnedFd,
    /// The memory that was handed over. As long as we have it too, nobody finds zeros where something has not come.
    memories: RefCell<Vec<Userfault>>,
    runs: Cell<bool>,
}

impl Server {
    /// Finds the server of this work directory, or starts one.
    ///
    /// # Errors
    /// When none can be reached.
    fn reach(options: &Options) -> Result<Server, Failure> {
        let server = Server::find(options)?;
        for (word, is_wanted) in [(RECORD, options.record_working_set), (FREE, options.auto_dedup)] {
            if is_wanted {
                say(&server.socket, word).map_err(explain("tell the server what else is wanted"))?;
            }
        }
        Ok(server)
    }

    fn find(options: &Options) -> Result<Server, Failure> {
        let path = options.work_dir.join(SOCKET);
        let connect = || -> Result<OwnedFd, Errno> {
            let socket = sys::socket::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
            sys::socket::connect(&socket, &address(&path)).map(|()| socket)
        };
        let socket = match connect() {
            Err(error) if matches!(error.code, libc::ENOENT | libc::ECONNREFUSED) => {
                begin(options)?.ready()?;
                connect()
            }
            connected => connected,
        };
        let socket = socket.map_err(explain("reach the server"))?;
        let name = sys::socket::name(&socket, true).map_err(explain("reach the server"))?;
        if !name.ends_with(&[ANSWERING.as_bytes(), &[0]].concat()) {
            let why = "the server that waits there is not of this program, which needs its own";
            let failure = Failure::unsupported(Object::Path(path.display().to_string()), why);
            return Err(
                failure.help(model::Remedy::Advice("crtools lazy-pages, or none: then it is started"))
            );
        }
        Ok(Server { socket, memories: RefCell::default(), runs: Cell::new(false) })
    }

    /// Hands the memory of a process over.
    pub fn hand_over(&self, pid: i32, memory: Userfault) -> Result<(), Failure> {
        let send = |bytes: &[u8], rights: &[BorrowedFd]| {
            let sent = sys::socket::send_all(&self.socket, bytes, rights);
            sent.map_err(|error| self.failure(error, "hand the memory of a process to the server"))
        };
        send(&pid.to_ne_bytes(), &[])?;
        send(&[0], &[memory.as_fd()])?;
        self.memories.borrow_mut().push(memory);
        Ok(())
    }

    /// Everything was handed over: [`Server::await_ready`].
    pub fn ask_whether_ready(&self) -> Result<(), Failure> {
        say(&self.socket, READY).map_err(|error| self.failure(error, "ask the server whether it is ready"))
    }

    /// Waits until it has read all that it needs to give what was handed over.
    ///
    /// # Errors
    /// When it has ended: the tree must not run.
    pub fn await_ready(&self) -> Result<(), Failure> {
        let mut word = [0; 4];
        let answer = sys::fd::wait_readable(&self.socket)
            .and_then(|()| sys::socket::receive(&self.socket, &mut word))
            .map_err(|error| self.failure(error, "wait until the server is ready"))?;
        if answer.length < word.len() { Err(ended()) } else { self.is_there() }
    }

    /// # Errors
    /// When the server has ended: the tree must not run.
    pub fn is_there(&self) -> Result<(), Failure> {
        if sys::fd::hung_up(&self.socket) { Err(ended()) } else { Ok(()) }
    }

    /// The tree runs, and its memory is with the server alone.
    ///
    /// # Errors
    /// When it has ended: the tree has to, too.
    pub fn tell_that_it_runs(&self) -> Result<(), Failure> {
        say(&self.socket, RUNS).map_err(|error| self.failure(error, "tell the server that the tree runs"))?;
        self.runs.set(true);
        self.memories.take();
        Ok(())
    }

    /// What went wrong with it may be that it has ended.
    fn failure(&self, error: Errno, doing: &'static str) -> Failure {
        self.is_there().err().unwrap_or_else(|| explain(doing)(error))
    }
}

fn ended() -> Failure {
    let why = "it has ended; its log says why";
    Failure::conflict(Object::Named("lazy pages".into()), "rely on its server", why)
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.runs.get() {
            // If it hears nothing, it takes it for lost.
            let _ = say(&self.socket, FAILED);
        }
    }
}

/// Starts a server.
fn begin(options: &Options) -> Result<Starting, Failure> {
    let mut words: Vec<OsString> = vec!["-D".into(), options.images_dir.clone().into()];
    words.extend(["-W".into(), options.work_dir.clone().into(), format!("-v{}", options.log_level).into()]);
    words.extend(["-o".into(), "lazy-pages.log".into()]);
    words.extend(options.page_server.then(|| "--page-server".into()));
    words.extend(background::connection_words(options));
    background::begin("lazy-pages", words)
}

/// What the command `lazy-pages` does.
///
/// # Errors
/// When the images cannot be read, or nobody comes.
pub fn serve(options: &Options) -> Result<(), Failures> {
    let mut own_pid = sys::process::own_pid();
    if options.restore_detached {
        own_pid = begin(options)?.ready()?;
    }
    if let Some(path) = &options.pidfile {
        sys::pidfile::write(path, own_pid)?;
    }
    if options.restore_detached {
        return Ok(());
    }
    let dir = Dir::open(&options.images_dir)?;
    let away = options.page_server.then(|| server::connect(options)).transpose()?.map(Away::new);
    let mut pages =
        Pages { chain: Chain::open(&dir)?, views: HashMap::new(), maps: HashMap::new(), away, freeing: None };
    let path = options.work_dir.join(SOCKET);
    let listener = listen(&path)?;
    background::say_ready(options.status_fd)?;
    pages.read_ahead(&dir);
    let accepted = pages
        .wait(&listener)
        .and_then(|()| sys::socket::accept(&listener).map_err(explain("wait for a restore")));
    let _ = std::fs::remove_file(&path);
    let restore = accepted?;
    drop(listener);
    log::info!("a restore has come");
    let mut serving = Serving {
        tasks: Vec::new(),
        restore: Some(restore),
        pid: None,
        heard: Heard::Nothing,
        ahead: Ahead::read(&dir),
        recording: None,
        is_alone: true,
    };
    while !serving.is_done() {
        if let Err(failure) = serving.turn(&mut pages) {
            serving.give_up();
            return Err(failure.into());
        }
        if let Some(recording) = serving.recording.take_if(|recording| recording.rest().is_none()) {
            recording.end(&dir);
        }
    }
    if let Some(recording) = serving.recording.take().filter(|_| serving.heard == Heard::Runs) {
        recording.end(&dir);
    }
    if serving.heard != Heard::Runs {
        let why = match serving.heard {
            Heard::Failed => "the restore has failed",
            // A dump that has the memory keeps it, for the same reason.
            Heard::Ready => "the restore has ended without a word, and its tree may run",
            _ => "the restore has ended too early",
        };
        if let Some(away) = pages.away.filter(|_| serving.heard == Heard::Failed) {
            away.give_back()?;
        }
        return Err(Failure::conflict(Object::Named("lazy pages".into()), "hand them out", why).into());
    }
    log::info!("every page has come");
    if pages.freeing.take().is_some() {
        free(&dir);
    }
    if let Some(away) = pages.away {
        // They are all here: the tree needs nothing more from there.
        match away.close() {
            Ok(pages) => log::info!("{pages} pages came from the dump"),
            Err(failure) => log::warn!("{failure}"),
        }
    }
    Ok(())
}

/// Makes the socket at which a restore finds the server: bound to one name and linked to the other, once it listens.
fn listen(path: &Path) -> Result<OwnedFd, Failure> {
    let bound = path.with_file_name(ANSWERING);
    let failure = |path: &Path, error: Errno| {
        let failure = error.on(Object::Path(path.display().to_string()), "make its socket");
        match error.code {
            libc::EADDRINUSE | libc::EEXIST => {
                failure.help(model::Remedy::Advice("another server waits there, or one has died: remove it"))
            }
            _ => failure,
        }
    };
    let listener =
        sys::socket::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).map_err(explain("make its socket"))?;
    sys::socket::bind(&listener, &address(&bound)).map_err(|error| failure(&bound, error))?;
    let linked = sys::socket::listen(&listener, 1).map_err(explain("listen")).and_then(|()| {
        let linked = std::fs::hard_link(&bound, path);
        linked.map_err(|error| failure(path, sys::memory::io_errno("link", &error)))
    });
    let _ = std::fs::remove_file(&bound);
    linked.map(|()| listener)
}

/// Frees in the images what a tree that runs has. It runs in any case.
pub fn free(dir: &Dir) {
    match chain::free_restored(dir) {
        Ok(pages) => log::info!("freed {pages} pages in the images"),
        Err(failure) => log::warn!("the pages stay in the images: {failure}"),
    }
}

/// A pages file, ready to be read from.
#[derive(Debug)]
enum Stored {
    Mapped(View),
    Blocks(Blocks),
}

/// What a process waits for, and where that is.
#[derive(Debug)]
struct Map {
    waiting: Waiting,
    pages: u64,
    files: BTreeSet<PagesFile>,
    /// Some of it is with the dump, which may be an old CRIU.
    is_away: bool,
    is_old: bool,
}

/// The pages of an image set, and those that are with the dump.
#[derive(Debug)]
struct Pages {
    chain: Chain,
    views: HashMap<PagesFile, Stored>,
    /// By pid: those that were read before they are asked for.
    maps: HashMap<i32, Map>,
    away: Option<Away>,
    /// Pages are freed that the tree has.
    freeing: Option<HashMap<PagesFile, Freeing>>,
}

impl Pages {
    /// Waits for a restore to come.
    ///
    /// # Errors
    /// When the dump with its memory is gone before.
    fn wait(&self, listener: &OwnedFd) -> Result<(), Failure> {
        let away = self.away.as_ref();
        let waited: Vec<BorrowedFd> =
            [listener.as_fd()].into_iter().chain(away.and_then(Away::silent)).collect();
        loop {
            let is_ready = sys::fd::poll(&waited, -1).map_err(explain("wait for a restore"))?;
            match (is_ready[0], away) {
                (true, _) => return Ok(()),
                (false, Some(away)) if is_ready.get(1) == Some(&true) => return Err(away.lost()),
                _ => {}
            }
        }
    }

    /// Frees content that nobody waits for any more.
    fn free(&mut self, given: Vec<(Run, u64, u64)>) -> Result<(), Failure> {
        let Some(freeing) = &mut self.freeing else { return Ok(()) };
        for (run, offset, length) in given.into_iter().filter(|(run, ..)| !run.is_away()) {
            if let Entry::Vacant(place) = freeing.entry(run.file) {
                // Before the first is freed.
                self.chain.retract()?;
                place.insert(self.chain.to_free(run.file)?);
            }
            freeing[&run.file].free(offset, length)?;
        }
        Ok(())
    }

    /// Reads the page maps, of which nobody may have asked yet. What is wrong with one is said when it is asked for.
    fn read_ahead(&mut self, dir: &Dir) {
        let pid = |name: &String| name.strip_prefix("pagemap-")?.strip_suffix(".img")?.parse().ok();
        for pid in dir.names().unwrap_or_default().iter().filter_map(pid) {
            if let Ok(map) = self.read(pid) {
                self.maps.insert(pid, map);
            }
        }
    }

    fn read(&self, pid: i32) -> Result<Map, Failure> {
        let name = pages::take::Owner::Task(pid).pagemap();
        let Pagemap { runs, is_old, .. } = self.chain.load_with_away(&name)?;
        let mut files = BTreeSet::new();
        // Not by collect(), which sorts what are many of few.
        for run in runs.iter().filter(|run| !run.is_away()) {
            files.insert(run.file);
        }
        Ok(Map {
            files,
            is_away: runs.iter().any(Run::is_away),
            is_old,
            pages: runs.iter().map(Run::len).sum::<u64>() / 4096,
            waiting: Waiting::new(runs),
        })
    }

    /// The content that a process waits for.
    fn of(&mut self, pid: i32) -> Result<Waiting, Failure> {
        let read = self.maps.remove(&pid);
        let map = read.map_or_else(|| self.read(pid), Ok)?;
        if map.is_away {
            let Some(away) = &mut self.away else {
                let why =
                    "are still with the dump: lazy-pages needs --page-server, with its --address and --port";
                return Err(Failure::unsupported(Object::Named("pages".into()), why).of(pid));
            };
            away.is_old = map.is_old;
        }
        for file in map.files {
            if let Entry::Vacant(place) = self.views.entry(file) {
                place.insert(match self.chain.find_pages(file)? {
                    chain::Stored::Compressed(compressed) => Stored::Blocks(Blocks::new(compressed)),
                    chain::Stored::Plain(content) => Stored::Mapped(map_pages(file, &content)?),
                });
            }
        }
        log::info!("pid {pid}: {} pages wait", map.pages);
        Ok(map.waiting)
    }
}

fn map_pages(file: PagesFile, content: &File) -> Result<View, Failure> {
    let explain = |error: Errno| error.on(Object::Path(pages_name(file.id)), "map the pages");
    let len = content.metadata().map_err(|error| explain(sys::memory::io_errno("fstat", &error)))?.len();
    View::new(content, len as usize).map_err(explain)
}

impl Source for Pages {
    fn content(&mut self, pid: i32, run: &Run, offset: u64, length: u64) -> Result<&[u8], Failure> {
        if let Some(away) = self.away.as_mut().filter(|_| run.is_away()) {
            return away.content(pid, run, offset, length);
        }
        let part = offset as usize..(offset + length) as usize;
        let found = match self.views.get_mut(&run.file) {
            Some(Stored::Mapped(view)) => view.bytes().get(part),
            Some(Stored::Blocks(blocks)) => {
                let content = blocks.content(offset, length)?;
                // Whole pages: blocks of other makers may end anywhere.
                content.get(..content.len() / 4096 * 4096)
            }
            None => None,
        };
        let short = || Failure::corrupt(pages_name(run.file.id), None, "is shorter than it was").of(pid);
        found.filter(|bytes| !bytes.is_empty()).ok_or_else(short)
    }

    fn announce(&mut self, pid: i32, run: &Run, offset: u64, length: u64) -> Result<(), Failure> {
        match self.away.as_mut().filter(|_| run.is_away()) {
            Some(away) => away.announce(pid, run, offset, length),
            None => Ok(()),
        }
    }
}

/// What a restore has said of its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Nothing,
    /// It was told that it may let the tree run.
    Ready,
    Runs,
    Failed,
}

struct Serving {
    tasks: Vec<Task>,
    /// Until it has said all.
    restore: Option<OwnedFd>,
    /// Whose memory comes next.
    pid: Option<i32>,
    heard: Heard,
    ahead: Ahead,
    recording: Option<Recording>,
    /// Nobody else has ever waited for the content of the only task.
    is_alone: bool,
}

impl Serving {
    fn is_done(&self) -> bool {
        self.restore.is_none() && self.tasks.is_empty()
    }

    /// Does the tree run, as far as is known? It may if the restore has ended where it could have let it run.
    fn runs(&self) -> bool {
        self.heard == Heard::Runs || self.heard == Heard::Ready && self.restore.is_none()
    }

    /// Waits for something to do, and does it; what nobody touches comes meanwhile, once the tree runs.
    fn turn(&mut self, pages: &mut Pages) -> Result<(), Failure> {
        let runs = self.runs();
        let comes_meanwhile = runs && self.recording.is_none();
        let has_more = self.tasks.iter().any(|task| comes_meanwhile || task.is_late());
        // A little later than it should be, rather than often.
        let rest = self.recording.as_ref().and_then(Recording::rest).filter(|_| runs);
        let patience_ms = rest.map_or(-1, |rest| rest.as_millis() as i32 + 1);
        let mut waited: Vec<BorrowedFd> = self.tasks.iter().map(|task| task.memory().as_fd()).collect();
        waited.extend(self.restore.as_ref().map(AsFd::as_fd));
        let before = waited.len();
        waited.extend(pages.away.as_ref().and_then(Away::silent));
        let is_ready =
            sys::fd::poll(&waited, if has_more { 0 } else { patience_ms }).map_err(explain("wait"))?;
        if let (Some(true), Some(away)) = (is_ready.get(before), &pages.away) {
            return Err(away.lost());
        }
        let mut children = Vec::new();
        for (task, is_ready) in self.tasks.iter_mut().zip(&is_ready) {
            if *is_ready || task.is_late() {
                children.extend(task.answer(pages)?);
                match &mut self.recording {
                    Some(recording) => recording.note(task),
                    None => drop(task.take_touched()),
                }
            }
        }
        // One piece for each, so that no touch waits long.
        if comes_meanwhile && !is_ready.contains(&true) && !self.ahead.is_empty() {
            self.ahead.give(&mut self.tasks, pages)?;
        } else if comes_meanwhile && !is_ready.contains(&true) {
            for task in &mut self.tasks {
                task.give_more(pages)?;
            }
        }
        self.tasks.extend(children);
        self.is_alone &= self.tasks.len() < 2;
        for task in &mut self.tasks {
            let given = task.take_given();
            if self.is_alone
                && self.heard == Heard::Runs
                && let Err(failure) = pages.free(given)
            {
                log::warn!("the pages stay in the images: {failure}");
                pages.freeing = None;
            }
        }
        if runs {
            self.tasks.retain(|task| !task.is_done());
        }
        if self.restore.is_some() && is_ready[before - 1] {
            self.listen(pages)?;
        }
        Ok(())
    }

    /// What has not come will never come.
    fn give_up(&mut self) {
        while let Some(mut task) = self.tasks.pop() {
            match task.give_up() {
                Ok(children) => self.tasks.extend(children),
                Err(failure) => log::error!("what has not come reads as zeros: {failure}"),
            }
        }
    }

    /// Hears the next word of the restore.
    fn listen(&mut self, pages: &mut Pages) -> Result<(), Failure> {
        let explain = explain("hear of the restore");
        let Some(restore) = &self.restore else { return Ok(()) };
        let mut word = [0u8; 4];
        let room = if self.pid.is_some() { &mut word[..1] } else { &mut word[..] };
        let (length, mut rights) = match sys::socket::receive(restore, room) {
            Ok(heard) => (heard.length, heard.rights),
            // It has ended without having read our answer.
            Err(error) if error.code == libc::ECONNRESET => (0, Vec::new()),
            Err(error) => return Err(explain(error)),
        };
        match (self.pid.take(), length) {
            (_, 0) => {
                // It has said all, or failed: then there is nobody to serve.
                self.restore = None;
                if !self.runs() {
                    self.tasks.clear();
                }
            }
            (None, 4) => match u32::from_ne_bytes(word) {
                READY => {
                    self.heard = Heard::Ready;
                    // If it has ended, the next look tells.
                    let _ = say(restore, READY);
                }
                RUNS => {
                    self.heard = Heard::Runs;
                    self.recording.iter_mut().for_each(Recording::starts);
                }
                FAILED => self.heard = Heard::Failed,
                FREE => pages.freeing = Some(HashMap::new()),
                RECORD => self.recording = Some(Recording::begin()),
                pid => self.pid = Some(pid as i32).filter(|pid| *pid > 0),
            },
            (Some(pid), _) => {
                let fd =
                    rights.pop().ok_or(Errno { call: "recvmsg", code: libc::EBADMSG }).map_err(explain)?;
                let waiting = pages.of(pid)?;
                self.tasks.push(Task::new(pid, Userfault::ready(fd), waiting));
            }
            (None, _) => return Err(explain(Errno { call: "recvmsg", code: libc::EBADMSG })),
        }
        Ok(())
    }
}

/// Flags for the userfaultfd of a process whose memory comes later: it also waits where the kernel touches it.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
