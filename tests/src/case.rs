//! What a workload is: a named function, and what the harness has to know about it.
//!
//! The function gets a [`Trial`], sets something up, calls [`Trial::checkpoint`] once, and asserts afterwards.
//! Waiting is done by looking for a file with short sleeps between: no signal, descriptor, timer or socket of
//! the harness is part of the state that is tested.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::sys;

/// Announced by the program: everything is set up, dump now.
pub const READY: &str = "ready";
/// Made by the harness when the program may check itself.
pub const GO: &str = "go";
/// The marker of the harness for memory that comes when it is touched.
pub const LATE: &str = "memory-comes-late";

/// The longest that a workload waits for anything that should happen by itself.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Answers why a case cannot run here, if it cannot.
pub type Need = fn() -> Result<(), String>;

/// What is around a tree and no part of it: sockets that the harness itself has, options that depend on them.
#[derive(Debug, Default)]
pub struct Outside {
    /// The workload's own directory.
    pub directory: PathBuf,
    /// The workload's root, from [`Moment::Ready`] on.
    pub pid: i32,
    pub held: Vec<OwnedFd>,
    /// Given to the next dumps, and to the next restores.
    pub dump: Vec<String>,
    pub restore: Vec<String>,
    /// Processes that are no part of the tree, and stay.
    pub bystanders: Vec<i32>,
    /// The tool is under a seccomp filter from now on.
    pub is_filtered: bool,
}

/// When the outside gets its turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the workload is started, in its directory.
    Begin,
    /// The workload waits at its checkpoint.
    Ready,
    /// The tree was dumped and is gone.
    Away,
    /// A restore was refused; the next should succeed.
    Mend,
    /// The tree was restored.
    Back,
    /// The workload has ended well.
    End,
}

/// One workload, and how to treat it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// A sentence about the behaviour that has to survive.
    pub name: &'static str,
    pub body: fn(&Trial),
    /// Given to both dump and restore.
    pub options: &'static [&'static str],
    /// Not empty: the dump must be refused, with these words in its message.
    pub refused: &'static [&'static str],
    /// Not empty: the first restore must be refused, with these words in its message.
    pub restore_refused: &'static [&'static str],
    /// What belongs to the case and is outside of the tree.
    pub outside: Option<fn(&mut Outside, Moment)>,
    /// Why CRIU 4.1.1 is no judge of this one.
    pub peer_cannot: Option<&'static str>,
    /// What crtools does not carry yet, so that only the peer can be asked.
    pub not_yet: Option<&'static str>,
    /// And in which modes; none means all.
    pub peer_cannot_in: &'static [Mode],
    /// Also run with the images written by one tool and restored by the other.
    pub exchange: bool,
    /// Also with dumps whose tool is killed.
    pub killed: bool,
    /// So large that others move its memory; also with dumps that are killed meanwhile.
    pub is_large: bool,
    /// Also restored elsewhere while it is still here: nothing of it can be in one place only.
    pub moves: bool,
    /// Also with images whose vdso is not quite that of this kernel.
    pub foreign_vdso: bool,
    /// The tree looks different from moment to moment: only the program itself can judge.
    pub restless: bool,
    /// Started in the session of the harness instead of as a session leader.
    pub shell_job: bool,
    pub need: Option<Need>,
    /// Huge pages that the host has to have for it.
    pub huge_pages: u64,
}

impl Case {
    pub const fn new(name: &'static str, body: fn(&Trial)) -> Self {
        Self {
            name,
            body,
            options: &[],
            refused: &[],
            restore_refused: &[],
            outside: None,
            peer_cannot: None,
            not_yet: None,
            peer_cannot_in: &[],
            exchange: false,
            killed: false,
            is_large: false,
            moves: false,
            foreign_vdso: false,
            restless: false,
            shell_job: false,
            need: None,
            huge_pages: 0,
        }
    }

    #[must_use]
    pub const fn options(mut self, options: &'static [&'static str]) -> Self {
        self.options = options;
        self
    }

    #[must_use]
    pub const fn refused(mut self, words: &'static [&'static str]) -> Self {
        self.refused = words;
        self
    }

    #[must_use]
    pub const fn restore_refused(mut self, words: &'static [&'static str]) -> Self {
        self.restore_refused = words;
        self
    }

    #[must_use]
    pub const fn outside(mut self, outside: fn(&mut Outside, Moment)) -> Self {
        self.outside = Some(outside);
        self
    }

    #[must_use]
    pub const fn peer_cannot(mut self, reason: &'static str) -> Self {
        self.peer_cannot = Some(reason);
        self
    }

    /// crtools does not carry it yet, for this reason.
    #[must_use]
    pub const fn not_yet(mut self, reason: &'static str) -> Self {
        self.not_yet = Some(reason);
        self
    }

    /// The peer is no judge in some modes.
    #[must_use]
    pub const fn peer_cannot_in(mut self, modes: &'static [Mode], reason: &'static str) -> Self {
        self.peer_cannot_in = modes;
        self.peer_cannot(reason)
    }

    /// Why the peer cannot run this case in `mode`, if so.
    pub fn peer_fails(&self, mode: Mode) -> Option<&'static str> {
        let concerns = self.peer_cannot_in.is_empty() || self.peer_cannot_in.contains(&mode);
        self.peer_cannot.filter(|_| concerns)
    }

    #[must_use]
    pub const fn exchange(mut self) -> Self {
        self.exchange = true;
        self
    }

    #[must_use]
    pub const fn restless(mut self) -> Self {
        self.restless = true;
        self
    }

    /// Also with images whose vdso is not quite that of this kernel.
    #[must_use]
    pub const fn foreign_vdso(mut self) -> Self {
        self.foreign_vdso = true;
        self
    }

    /// Also with dumps whose tool is killed.
    #[must_use]
    pub const fn killed(mut self) -> Self {
        self.killed = true;
        self
    }

    /// So large that others move its memory.
    #[must_use]
    pub const fn large(mut self) -> Self {
        self.is_large = true;
        self
    }

    /// Also restored elsewhere while it is still here.
    #[must_use]
    pub const fn moves(mut self) -> Self {
        self.moves = true;
        self
    }

    #[must_use]
    pub const fn shell_job(mut self) -> Self {
        self.shell_job = true;
        self
    }

    /// The host gets so many huge pages more, as long as the case lasts.
    #[must_use]
    pub const fn huge_pages(mut self, count: u64) -> Self {
        self.huge_pages = count;
        self
    }

    #[must_use]
    pub const fn needs(mut self, need: Need) -> Self {
        self.need = Some(need);
        self
    }

    /// The ways in which this case is run.
    pub fn modes(&self) -> Vec<Mode> {
        if !self.refused.is_empty() {
            return vec![Mode::Refused];
        }
        if !self.restore_refused.is_empty() {
            return vec![Mode::RefusedRestore];
        }
        let mut modes = vec![
            Mode::Plain,
            Mode::Twice,
            Mode::Snapshot,
            Mode::Ahead,
            Mode::Incremental,
            Mode::Lazy,
            Mode::Compressed,
            Mode::PageServer,
            Mode::FailedDump,
        ];
        if self.killed {
            modes.push(Mode::KilledDump);
        }
        if self.is_large {
            modes.push(Mode::KilledWorker);
        }
        if self.moves {
            modes.extend([Mode::PostCopy, Mode::PackedServer, Mode::Freed]);
        }
        if self.foreign_vdso {
            modes.push(Mode::ForeignVdso);
        }
        if self.exchange {
            let is_able = |mode: &Mode| !self.peer_cannot_in.contains(mode);
            modes.extend([Mode::ToPeer, Mode::FromPeer].into_iter().filter(is_able));
        }
        modes
    }
}

/// `case!(f)` is the case named and implemented by the function `f`.
#[macro_export]
macro_rules! case {
    ($body:ident) => {
        $crate::case::Case::new(stringify!($body), $body)
    };
}

/// What happens around the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Dump, gone, restore.
    Plain,
    /// That, two times in a row.
    Twice,
    /// `--leave-running`: the program never notices.
    Snapshot,
    /// Its memory is saved while it runs, and what it changed when it stands still: a snapshot, then a dump.
    Ahead,
    /// Its memory is saved first, while it runs, several times; the dump adds what has changed since.
    Incremental,
    /// Dump, gone, restore with memory that comes when it is touched.
    Lazy,
    /// Restored elsewhere while the dump still has its memory, which comes when it is touched.
    PostCopy,
    /// Dump with compressed pages, gone, restore.
    Compressed,
    /// Its memory goes to a page server, before the dump and with it; restored from what came there.
    PageServer,
    /// The same with compressed pages, restored with memory that comes when it is touched.
    PackedServer,
    /// Restored from images that lose the pages which the tree has.
    Freed,
    /// Dumps that fail early, in the middle and late: the program never notices.
    FailedDump,
    /// Dumps whose tool is killed at many moments: the program never notices.
    KilledDump,
    /// Dumps whose process, not the command, is killed while others move the pages: nothing is left of it.
    KilledWorker,
    /// Restored as if another kernel had made the images: its vdso has other code.
    ForeignVdso,
    /// Dumped by the tool, restored by the peer.
    ToPeer,
    /// Dumped by the peer, restored by the tool.
    FromPeer,
    /// The dump is refused with a reason, the program never notices.
    Refused,
    /// The restore is refused with a reason and leaves nothing; when that is mended, it succeeds.
    RefusedRestore,
}

impl Mode {
    pub const ALL: [Self; 19] = [
        Self::Plain,
        Self::Twice,
        Self::Snapshot,
        Self::Ahead,
        Self::Incremental,
        Self::Lazy,
        Self::PostCopy,
        Self::Compressed,
        Self::PageServer,
        Self::PackedServer,
        Self::Freed,
        Self::FailedDump,
        Self::KilledDump,
        Self::KilledWorker,
        Self::ForeignVdso,
        Self::ToPeer,
        Self::FromPeer,
        Self::Refused,
        Self::RefusedRestore,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Twice => "twice",
            Self::Snapshot => "snapshot",
            Self::Ahead => "ahead",
            Self::Incremental => "incremental",
            Self::Lazy => "lazy",
            Self::PostCopy => "post-copy",
            Self::Compressed => "compressed",
            Self::PageServer => "page-server",
            Self::PackedServer => "packed-server",
            Self::Freed => "freed",
            Self::FailedDump => "failed-dump",
            Self::KilledDump => "killed-dump",
            Self::KilledWorker => "killed-worker",
            Self::ForeignVdso => "foreign-vdso",
            Self::ToPeer => "to-peer",
            Self::FromPeer => "from-peer",
            Self::Refused => "refused",
            Self::RefusedRestore => "refused-restore",
        }
    }

    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// The workload's side of the agreement with the harness.
#[derive(Debug)]
pub struct Trial {
    directory: PathBuf,
    checkpointed: AtomicBool,
}

impl Trial {
    pub fn new(directory: PathBuf) -> Self {
        Self { directory, checkpointed: AtomicBool::new(false) }
    }

    /// The workload's own directory, empty at the start but for its log.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Announces that all is set up, and returns when the harness has done what the mode says.
    pub fn checkpoint(&self) {
        assert!(!self.checkpointed.swap(true, Ordering::SeqCst), "a workload has one checkpoint");
        self.mark(READY);
        self.hold();
    }

    /// Waits for the end of the checkpoint: for the children and threads of a workload, whose main thread
    /// announces it.
    pub fn hold(&self) {
        let go = self.path(GO);
        while !go.exists() {
            sys::nap();
        }
    }

    /// Has the checkpoint passed? For the loops of programs that work meanwhile.
    pub fn is_over(&self) -> bool {
        self.path(GO).exists()
    }

    /// Does its memory come when it is touched?
    pub fn memory_comes_late(&self) -> bool {
        self.directory.parent().is_some_and(|outer| outer.join(LATE).exists())
    }

    /// Leaves a marker for the relatives of this process.
    ///
    /// A directory, because it is made at once and whole: a file would be a descriptor for a moment.
    pub fn mark(&self, name: &str) {
        std::fs::create_dir(self.path(name)).unwrap_or_else(|e| panic!("cannot make the marker {name}: {e}"));
    }

    /// Waits for a marker of a relative.
    pub fn await_mark(&self, name: &str) {
        let marker = self.path(name);
        until(&format!("the marker {name}"), || marker.exists());
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// When it does not within [`PATIENCE`].
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
        sys::nap();
    }
}
