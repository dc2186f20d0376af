//! The program that is dumped: `bench-target CASE BOARD`.
//!
//! Sets up what the case names, then ticks until it is asked to check its memory. It makes nothing else: one
//! thread of the first process ticks, all others sleep.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::time::Duration;

use crtools_bench::served::{Postgres, Redis, Served};
use crtools_bench::{Board, Word, now};
use crtools_tests::sys::memory::{Map, PAGE, READ};
use crtools_tests::sys::process::fork;
use crtools_tests::sys::{call, exit_now};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::SignalFd;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

/// What has to be right at the end.
enum Content {
    Nothing,
    /// Every `step`th page of the mapping holds the pattern.
    Pages {
        map: Map,
        step: usize,
    },
    Files {
        files: Vec<File>,
    },
    Mixed {
        groups: Vec<Group>,
    },
    /// It is kept busy.
    Served(Box<dyn Served>),
}

/// Ten descriptors of eight kinds.
struct Group {
    file: File,
    folder: File,
    null: File,
    pipe: (OwnedFd, OwnedFd),
    event: EventFd,
    pair: (UnixStream, UnixStream),
    signal: SignalFd,
    timer: TimerFd,
}

impl Group {
    fn new(path: &Path) -> Group {
        let group = Group {
            file: File::open(path).expect("open"),
            folder: File::open("/").expect("open"),
            null: File::open("/dev/null").expect("open"),
            pipe: nix::unistd::pipe().expect("pipe"),
            event: EventFd::from_value(7).expect("eventfd"),
            pair: UnixStream::pair().expect("socketpair"),
            signal: SignalFd::new(&SigSet::from(Signal::SIGUSR1)).expect("signalfd"),
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).expect("timerfd"),
        };
        nix::unistd::write(&group.pipe.1, b"in a pipe").expect("write");
        (&group.pair.0).write_all(b"in a socket").expect("write");
        let hour = Expiration::OneShot(TimeSpec::new(3600, 0));
        group.timer.set(hour, TimerSetTimeFlags::empty()).expect("set");
        group
    }

    fn check(&self) {
        assert_eq!(self.file.metadata().expect("stat").len(), 100);
        assert!(self.folder.metadata().expect("stat").is_dir());
        assert_eq!((&self.null).read(&mut [0]).expect("read"), 0);
        let mut bytes = [0; 11];
        assert_eq!(nix::unistd::read(&self.pipe.0, &mut bytes).expect("read"), 9);
        (&self.pair.1).read_exact(&mut bytes).expect("read");
        assert_eq!(&bytes, b"in a socket");
        assert_eq!(self.event.read().expect("read"), 7);
        assert!(self.timer.get().expect("get").is_some());
        assert!(self.signal.as_fd().as_raw_fd() > 0);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, case, board] = arguments.as_slice() else {
        eprintln!("usage: bench-target CASE BOARD");
        std::process::exit(2);
    };
    let board_path = Path::new(board);
    let board = Board::open(board_path).expect("open the board");
    let (kind, number) = case.split_once('-').unwrap_or((case, "0"));
    let number: usize = number.trim_end_matches('g').parse().expect("a number");
    let folder = board_path.parent().expect("a folder");
    let mut content = match kind {
        "tiny" => Content::Nothing,
        "mem" | "snapshot" | "incr" => pages(number * 256, 1),
        "thp" => {
            let map = Map::anonymous(number << 20, READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
            map.advise(0..number * 256, libc::MADV_HUGEPAGE).expect("madvise");
            map.fill(0..number * 256, 7);
            Content::Pages { map, step: 1 }
        }
        // As many pages, however large it is.
        "sparse" => pages(number << 18, number << 18 >> 14),
        "zero" => half_zero(number * 256),
        "redis" => Content::Served(Box::new(Redis::begin(number, folder))),
        "postgres" => Content::Served(Box::new(Postgres::begin(number, folder))),
        "cow" => {
            let content = pages(number * 256, 1);
            for _ in 0..8 {
                fork(sleep_for_ever);
            }
            content
        }
        "vmas" => mappings(number),
        "fds" => Content::Files { files: files(&board_path.with_extension("data"), number) },
        "mixed" => {
            raise_limit();
            let path = board_path.with_extension("data");
            std::fs::write(&path, [1; 100]).expect("write");
            Content::Mixed { groups: (0..number / 10).map(|_| Group::new(&path)).collect() }
        }
        "threads" => {
            for _ in 1..number {
                std::thread::Builder::new().stack_size(64 * 1024).spawn(sleep_for_ever).expect("spawn");
            }
            Content::Nothing
        }
        "procs" => {
            for _ in 1..number {
                fork(sleep_for_ever);
            }
            Content::Nothing
        }
        _ => panic!("no case is called {case}"),
    };
    // Without it each sleep below ends up to 50 us late.
    call::prctl(libc::PR_SET_TIMERSLACK, [1, 0, 0, 0]);
    tick(&board, &mut content);
    let is_right = std::panic::catch_unwind(AssertUnwindSafe(|| check(&mut content))).is_ok();
    board.set(Word::Verdict, if is_right { 1 } else { 2 });
    exit_now(0);
}

fn sleep_for_ever() {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn tick(board: &Board, content: &mut Content) {
    let mut last = now();
    board.set(Word::LastTick, last);
    board.set(Word::Ready, 1);
    while board.get(Word::Check) == 0 {
        match content {
            Content::Served(server) => server.work(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
        let tick = now();
        if board.get(Word::Reset) != 0 {
            board.set(Word::LongestGap, 0);
            board.set(Word::Reset, 0);
        } else if tick - last > board.get(Word::LongestGap) {
            board.set(Word::LongestGap, tick - last);
        }
        last = tick;
        board.set(Word::LastTick, tick);
        if board.get(Word::Change) != 0
            && let Content::Pages { map, .. } = &*content
        {
            (0..map.length / PAGE).step_by(10).for_each(|page| map.fill(page..page + 1, 7));
            board.set(Word::Change, 0);
        }
        if board.get(Word::FirstTick) == 0 {
            board.set(Word::FirstTick, tick);
        }
    }
}

fn pages(count: usize, step: usize) -> Content {
    let map = Map::anonymous(count * PAGE, READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    for page in (0..count).step_by(step) {
        map.fill(page..page + 1, 7);
    }
    Content::Pages { map, step }
}

/// Every second page holds something, the others were written with zeros.
fn half_zero(count: usize) -> Content {
    let map = Map::private(count * PAGE);
    for page in 0..count {
        map.set(page * PAGE, 0);
    }
    for page in (0..count).step_by(2) {
        map.fill(page..page + 1, 7);
    }
    Content::Pages { map, step: 2 }
}

/// `count` mappings: neighbours differ in protection; every tenth page holds something.
fn mappings(count: usize) -> Content {
    let map = Map::private(count * PAGE);
    for page in (0..count).step_by(10) {
        map.fill(page..page + 1, 7);
    }
    for page in (1..count).step_by(2) {
        map.protect(page..page + 1, READ);
    }
    Content::Pages { map, step: 10 }
}

fn raise_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("setrlimit");
}

fn files(path: &Path, count: usize) -> Vec<File> {
    raise_limit();
    std::fs::write(path, [1; 100]).expect("write");
    (0..count).map(|_| File::open(path).expect("open")).collect()
}

fn check(content: &mut Content) {
    match content {
        Content::Nothing => {}
        Content::Pages { map, step } => {
            for page in (0..map.length / PAGE).step_by(*step) {
                map.check(page..page + 1, 7);
            }
        }
        Content::Mixed { groups } => groups.iter().for_each(Group::check),
        Content::Served(server) => {
            server.check();
            server.end();
        }
        Content::Files { files } => {
            for file in files {
                assert_eq!(file.metadata().expect("stat").len(), 100);
            }
        }
    }
}
