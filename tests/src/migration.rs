//! Moves of a tree whose memory follows later, over a line that is slow, breaks, or is not used at all.
//!
//! The harness is the line: it sits between the dump that keeps the memory and the side that asks for it, and counts what
//! passes. So that a program ran before its memory came is seen by what had passed then, not by time.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use crate::case::GO;
use crate::namespace::beside;
use crate::reap::{Reaper, others};
use crate::round::Round;
use crate::subject::{Subject, says};
use crate::sys::traced::{Call, Traced};
use crate::tool::{LIMIT, Tool};
use crate::workloads::TOUCHED;

/// What is moved: 64 MiB, and a mark when it runs.
const WORKLOAD: &str = "memory::much_memory_is_walked_through";
/// What is restored several times: as much, of which few is touched.
const TOUCHING: &str = "memory::few_pages_of_much_memory_are_touched";
const RUNS: &str = "runs";
/// Where the dump waits, and the line.
const DUMP: &str = "4010";
const LINE: &str = "4011";

/// The workload of a trial.
pub fn workload(trial: &str) -> &'static str {
    if trial.starts_with("what_was_touched") { TOUCHING } else { WORKLOAD }
}

type Trial = fn(&mut Round) -> Result<(), String>;

/// Every trial by name.
pub const TRIALS: &[(&str, Trial)] = &[
    ("program_runs_before_its_memory_has_come", program_runs_before_its_memory_has_come),
    ("memory_of_a_broken_line_is_never_zero", memory_of_a_broken_line_is_never_zero),
    ("tree_that_nobody_asked_for_runs_on", tree_that_nobody_asked_for_runs_on),
    ("tree_that_could_not_be_restored_runs_on", tree_that_could_not_be_restored_runs_on),
    ("tree_runs_on_when_the_dump_is_asked_to_end", tree_runs_on_when_the_dump_is_asked_to_end),
    ("server_ends_when_the_dump_does", server_ends_when_the_dump_does),
    ("tree_that_is_kept_runs_on_both_sides", tree_that_is_kept_runs_on_both_sides),
    ("memory_comes_over_a_socket_that_is_passed_in", memory_comes_over_a_socket_that_is_passed_in),
    (
        "images_that_lie_about_what_comes_later_are_refused",
        images_that_lie_about_what_comes_later_are_refused,
    ),
    ("images_without_memory_are_refused", images_without_memory_are_refused),
    ("criu_asks_for_memory", criu_asks_for_memory),
    ("what_was_touched_first_comes_first", what_was_touched_first_comes_first),
    ("what_was_touched_is_freed_at_once", what_was_touched_is_freed_at_once),
    (
        "server_that_dies_as_the_tree_starts_takes_it_along",
        server_that_dies_as_the_tree_starts_takes_it_along,
    ),
    (
        "server_that_restore_started_and_that_dies_takes_the_tree_along",
        server_that_restore_started_and_that_dies_takes_the_tree_along,
    ),
    (
        "tree_whose_restore_dies_as_it_starts_has_its_memory",
        tree_whose_restore_dies_as_it_starts_has_its_memory,
    ),
    ("memory_comes_over_an_encrypted_line", memory_comes_over_an_encrypted_line),
    ("page_server_with_another_authority_gets_nothing", page_server_with_another_authority_gets_nothing),
    ("side_with_another_authority_gets_no_memory", side_with_another_authority_gets_no_memory),
    ("criu_server_is_refused", criu_server_is_refused),
    ("criu_encrypts_too", criu_encrypts_too),
    ("criu_is_not_sent_compressed_pages", criu_is_not_sent_compressed_pages),
    ("criu_keeps_pages", criu_keeps_pages),
    ("criu_keeps_encrypted_pages", criu_keeps_encrypted_pages),
];

fn there() -> Vec<&'static str> {
    vec!["--lazy-pages", "--page-server", "--address", "127.0.0.1", "--port", LINE]
}

/// Carries bytes between who comes and the dump until both have nothing more to say, or `passing`, which is told how many
/// came from the dump so far, says no. Returns that number.
fn carry(listener: &TcpListener, passing: &mut dyn FnMut(u64) -> bool) -> Result<u64, String> {
    let wrong = |what: &'static str| move |e: std::io::Error| format!("{what}: {e}");
    listener.set_nonblocking(true).map_err(wrong("listen"))?;
    let start = Instant::now();
    let mut asking = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(e) if e.kind() == ErrorKind::WouldBlock && start.elapsed() < LIMIT => crate::sys::nap(),
            Err(e) => return Err(format!("nobody came: {e}")),
        }
    };
    let mut dump =
        TcpStream::connect(("127.0.0.1", DUMP.parse().expect("a port"))).map_err(wrong("reach the dump"))?;
    let mut passed = 0;
    let mut buffer = vec![0; 64 << 10];
    for stream in [&asking, &dump] {
        stream.set_nonblocking(true).map_err(wrong("ready a stream"))?;
    }
    let (mut is_asking, mut is_answering) = (true, true);
    while is_asking || is_answering {
        let mut is_idle = true;
        for answers in [false, true] {
            let (from, to) = if answers { (&mut dump, &mut asking) } else { (&mut asking, &mut dump) };
            match from.read(&mut buffer) {
                Ok(0) => {
                    let _ = to.shutdown(std::net::Shutdown::Write);
                    *(if answers { &mut is_answering } else { &mut is_asking }) = false;
                }
                Ok(count) => {
                    is_idle = false;
                    to.set_nonblocking(false).map_err(wrong("ready a stream"))?;
                    // Whoever does not listen any more will be seen to.
                    let _ = to.write_all(&buffer[..count]);
                    to.set_nonblocking(true).map_err(wrong("ready a stream"))?;
                    passed += if answers { count as u64 } else { 0 };
                    if answers && !passing(passed) {
                        return Ok(passed);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(_) => *(if answers { &mut is_answering } else { &mut is_asking }) = false,
            }
        }
        if is_idle {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(passed)
}

/// Restores the tree in another pid namespace, with the line as the way to its memory, and lets `judge` see to it there.
/// Returns what to wait for.
fn restore_beside(
    subject: &mut Subject,
    images: &Path,
    judge: impl FnOnce(&mut Subject) -> Result<(), String>,
) -> Result<i32, String> {
    let made = beside(|| {
        subject.reaper = Reaper::default();
        subject.more_for_every_restore.extend(there());
        let images = images.to_path_buf();
        match subject.restore(&images).and_then(|()| judge(subject)) {
            Ok(()) => 0,
            Err(why) => {
                let logged = fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default();
                println!("on the other side: {}\n{logged}", subject.report(&why));
                1
            }
        }
    });
    made.map_err(|e| format!("make the other side: {e}"))
}

fn see_end(subject: &mut Subject, beside: i32) -> Result<(), String> {
    match subject.reaper.wait(beside, LIMIT) {
        Some(WaitStatus::Exited(_, 0)) => Ok(()),
        other => Err(format!("the other side ended with {other:?}")),
    }
}

fn line() -> Result<TcpListener, String> {
    TcpListener::bind(("127.0.0.1", LINE.parse().expect("a port"))).map_err(|e| format!("make a line: {e}"))
}

fn begin(subject: &mut Subject) -> Result<(std::path::PathBuf, i32), String> {
    let images = subject.step("images")?;
    let dump = subject.dump_keeping_memory(&images, DUMP, &[])?;
    Ok((images, dump))
}

/// Sees the dump end well, and the tree that it kept with it.
fn see_moved(subject: &mut Subject, dump: i32) -> Result<(), String> {
    match subject.see_dump_end(dump)? {
        WaitStatus::Exited(_, 0) => subject.see_killed("after the move"),
        other => Err(format!("the dump ended with {other:?}")),
    }
}

/// Has the whole memory of the program gone over the line?
fn all_has_passed(bytes: u64) -> Result<(), String> {
    match bytes < 64 << 20 {
        true => Err(format!("only {bytes} bytes came from the dump")),
        false => Ok(()),
    }
}

/// Sees the dump fail with `words`, and no images that look whole.
fn see_failed(subject: &mut Subject, dump: i32, images: &Path, words: &[&str]) -> Result<(), String> {
    match subject.see_dump_end(dump)? {
        WaitStatus::Exited(_, 1) => {}
        other => return Err(format!("the dump should fail with status 1, but: {other:?}")),
    }
    says(&fs::read_to_string(images.join("dump.log")).unwrap_or_default(), words)?;
    match images.join("inventory.img").exists() {
        true => Err("the folder of a failed dump looks whole".into()),
        false => Ok(()),
    }
}

/// The state letter of a process.
fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn await_state(pid: i32, wanted: &[char]) -> Result<(), String> {
    let start = Instant::now();
    while !state(pid).is_some_and(|state| wanted.contains(&state)) {
        if start.elapsed() > LIMIT {
            return Err(format!("process {pid} is in the state {:?}, not in {wanted:?}", state(pid)));
        }
        crate::sys::nap();
    }
    Ok(())
}

/// Lets the program check itself here.
fn finish(subject: &mut Subject) -> Result<(), String> {
    fs::File::create(subject.own(GO)).map_err(|e| format!("say go: {e}"))?;
    subject.see_good_end(LIMIT)
}

fn program_runs_before_its_memory_has_come(round: &mut Round) -> Result<(), String> {
    const ALL: u64 = 64 << 20;
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    let listener = line()?;
    let other_side = restore_beside(subject, &images, finish)?;
    let runs = subject.own(RUNS);
    let mut before = None;
    let passed = carry(&listener, &mut |passed| {
        if before.is_none() && runs.exists() {
            before = Some(passed);
        }
        // Some 16 MiB a second.
        std::thread::sleep(Duration::from_millis(4));
        true
    })?;
    see_end(subject, other_side)?;
    match before {
        Some(before) if before < ALL / 2 && passed > ALL => {}
        other => return Err(format!("{passed} bytes passed, {other:?} before the program said that it ran")),
    }
    see_moved(subject, dump)
}

/// The tree is stopped here with all that it has; there it ends where it touches what did not come.
fn memory_of_a_broken_line_is_never_zero(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    let listener = line()?;
    let go = subject.own(GO);
    let other_side = restore_beside(subject, &images, |subject| {
        fs::File::create(&go).map_err(|e| format!("say go: {e}"))?;
        match subject.reaper.wait(subject.pid, LIMIT) {
            Some(WaitStatus::Signaled(_, Signal::SIGBUS, _)) => subject.see_nobody("after the broken line"),
            other => Err(format!("the program should be ended by SIGBUS, but: {other:?}")),
        }
    })?;
    let runs = subject.own(RUNS);
    carry(&listener, &mut |passed| {
        std::thread::sleep(Duration::from_millis(2));
        passed < 40 << 20 || !runs.exists()
    })?;
    drop(listener);
    see_end(subject, other_side)?;
    see_failed(subject, dump, &images, &["stopped here", "kill -CONT"])?;
    await_state(subject.pid, &['T'])?;
    kill(Pid::from_raw(subject.pid), Signal::SIGCONT).map_err(|e| format!("let it go on: {e}"))?;
    subject.see_good_end(LIMIT)
}

/// Starts a server of pages, and waits until it can be reached; its pid and its log.
fn serve(
    subject: &mut Subject,
    tool: &Tool,
    images: &Path,
    words: &[&str],
) -> Result<(i32, std::path::PathBuf), String> {
    let started = tool.start(&mut subject.reaper, images, "lazy-pages", words);
    let start = Instant::now();
    while !images.join("lazy-pages.socket").exists() {
        if start.elapsed() > LIMIT {
            return Err("the server does not wait for a restore".into());
        }
        crate::sys::nap();
    }
    started.map_err(|e| format!("start the server: {e}"))
}

/// Before a restore has come: nothing is to be restored any more.
fn server_ends_when_the_dump_does(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    let words = ["--page-server", "--address", "127.0.0.1", "--port", DUMP];
    let tool = subject.tools.restore.clone();
    let (server, log) = serve(subject, &tool, &images, &words)?;
    let socket = images.join("lazy-pages.socket");
    kill(Pid::from_raw(dump), Signal::SIGTERM).map_err(|e| format!("ask it to end: {e}"))?;
    see_failed(subject, dump, &images, &["interrupted by signal 15"])?;
    match subject.reaper.wait(server, LIMIT) {
        Some(WaitStatus::Exited(_, 1)) if !socket.exists() => {}
        other => return Err(format!("the server should fail, and remove its socket: {other:?}")),
    }
    says(&fs::read_to_string(log).unwrap_or_default(), &["cannot have memory kept"])?;
    finish(subject)
}

fn tree_that_is_kept_runs_on_both_sides(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let images = subject.step("images")?;
    let dump = subject.dump_keeping_memory(&images, DUMP, &["--leave-running"])?;
    let listener = line()?;
    let other_side = restore_beside(subject, &images, finish)?;
    carry(&listener, &mut |_| true)?;
    see_end(subject, other_side)?;
    match subject.see_dump_end(dump)? {
        // It was told to go on over there.
        WaitStatus::Exited(_, 0) => subject.see_good_end(LIMIT),
        other => Err(format!("the dump ended with {other:?}")),
    }
}

fn memory_comes_over_a_socket_that_is_passed_in(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let wrong = |e: nix::Error| format!("make a socket: {e}");
    let (here, there) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty()).map_err(wrong)?;
    let (here, there) = ([here.as_raw_fd().to_string()], [there.as_raw_fd().to_string()]);
    let images = subject.step("images")?;
    let dump = subject.dump_keeping_memory(&images, DUMP, &["--ps-socket", &here[0]])?;
    let other_side = beside(|| {
        subject.reaper = Reaper::default();
        let more = ["--lazy-pages", "--page-server", "--ps-socket", there[0].clone().leak()];
        subject.more_for_every_restore.extend(more);
        match subject.restore(&images).and_then(|()| finish(subject)) {
            Ok(()) => 0,
            Err(why) => {
                println!("on the other side: {}", subject.report(&why));
                1
            }
        }
    })
    .map_err(|e| format!("make the other side: {e}"))?;
    see_end(subject, other_side)?;
    see_moved(subject, dump)
}

/// Pages of mapped files and of the vdso are said to come later, one mapping after the other.
fn images_that_lie_about_what_comes_later_are_refused(round: &mut Round) -> Result<(), String> {
    use image::{Dir, MmEntry, kind, pagemap::Pagemap};
    let subject = &mut round.subject;
    let images = subject.dump_away()?;
    let dir = Dir::open(&images).map_err(|e| e.to_string())?;
    let mm: MmEntry =
        dir.read_one(kind::MM, &format!("mm-{}.img", subject.pid)).map_err(|e| e.to_string())?;
    let name = format!("pagemap-{}.img", subject.pid);
    let good = dir.need(&name).map_err(|e| e.to_string())?;
    let mut tried = 0;
    for vma in &mm.vmas {
        let mut map = Pagemap::parse(&name, &good, |_| Ok(u64::MAX)).map_err(|e| e.to_string())?;
        let is_in = |at: u64| (vma.start..vma.end).contains(&at);
        let Some(run) = map.runs.iter_mut().find(|run| is_in(run.range.start)) else { continue };
        if vma.status & (image::vma::VDSO | image::vma::FILE_PRIVATE) == 0 {
            continue;
        }
        run.flags = image::pagemap::LAZY;
        fs::write(images.join(&name), map.encode().bytes()).map_err(|e| format!("damage it: {e}"))?;
        subject.more_for_every_restore = vec!["--lazy-pages"];
        subject.restore_refused(&images, &["comes later, where it cannot"])?;
        tried += 1;
    }
    if tried < 2 {
        return Err(format!("{tried} kinds of memory that is needed at once were found"));
    }
    fs::write(images.join(&name), good).map_err(|e| format!("mend it: {e}"))?;
    subject.restore(&images)?;
    finish(subject)
}

fn tree_that_nobody_asked_for_runs_on(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    drop(TcpStream::connect(("127.0.0.1", DUMP.parse().expect("a port"))));
    see_failed(subject, dump, &images, &["hand out pages"])?;
    await_state(subject.pid, &['S', 'R'])?;
    finish(subject)
}

/// Its pid is taken there.
fn tree_that_could_not_be_restored_runs_on(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    let listener = line()?;
    let beside = beside(|| {
        // The second half of the restore finds no place for this.
        let pidfile = images.join("taken");
        fs::write(&pidfile, "taken").expect("write a file");
        let more = [&there()[..], &["-d", "--pidfile", pidfile.to_str().expect("a plain path")]].concat();
        let mut reaper = Reaper::default();
        let ran = subject.tools.restore.clone().run(&mut reaper, &images, "restore", &more, LIMIT);
        // The server says there that it was in vain.
        subject.reaper = reaper;
        i32::from(ran.is_ok_and(|ran| ran.is_good()) || subject.see_nobody("after the restore").is_err())
    })
    .map_err(|e| format!("make the other side: {e}"))?;
    carry(&listener, &mut |_| true)?;
    see_end(subject, beside)?;
    see_failed(subject, dump, &images, &["could not be restored there"])?;
    await_state(subject.pid, &['S', 'R'])?;
    finish(subject)
}

fn tree_runs_on_when_the_dump_is_asked_to_end(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    kill(Pid::from_raw(dump), Signal::SIGTERM).map_err(|e| format!("ask it to end: {e}"))?;
    see_failed(subject, dump, &images, &["interrupted by signal 15"])?;
    await_state(subject.pid, &['S', 'R'])?;
    finish(subject)
}

fn images_without_memory_are_refused(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (images, dump) = begin(subject)?;
    for (more, words) in [
        (vec![], &["still with the dump", "--lazy-pages"][..]),
        (vec!["--lazy-pages"], &["lazy pages", "ended"]),
    ] {
        let copy = images.clone();
        let beside = beside(|| {
            subject.reaper = Reaper::default();
            subject.more_for_every_restore.extend(more);
            match subject.restore_refused(&copy, words) {
                Ok(()) => 0,
                Err(why) => {
                    println!("on the other side: {}", subject.report(&why));
                    1
                }
            }
        });
        see_end(subject, beside.map_err(|e| format!("make the other side: {e}"))?)?;
    }
    kill(Pid::from_raw(dump), Signal::SIGTERM).map_err(|e| format!("ask it to end: {e}"))?;
    see_failed(subject, dump, &images, &[])?;
    finish(subject)
}

/// The other side is CRIU: its server for memory, and its restore.
fn criu_asks_for_memory(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let peer = crate::tool::peer().ok_or("there is no peer")?;
    let (images, dump) = begin(subject)?;
    let listener = line()?;
    let copy = images.clone();
    let other_side = beside(|| {
        subject.reaper = Reaper::default();
        let server = serve(subject, &peer, &copy, &there()[1..]);
        subject.tools.restore = peer;
        subject.more_for_every_restore.push("--lazy-pages");
        let restored = server.and_then(|_| subject.restore(&copy).and_then(|()| finish(subject)));
        match restored {
            Ok(()) => 0,
            Err(why) => {
                println!("on the other side: {}", subject.report(&why));
                1
            }
        }
    })
    .map_err(|e| format!("make the other side: {e}"))?;
    let passed = carry(&listener, &mut |_| true)?;
    see_end(subject, other_side)?;
    all_has_passed(passed)?;
    see_moved(subject, dump)
}

/// It would give only some of the pages that are expected of it.
fn criu_server_is_refused(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let peer = crate::tool::peer().ok_or("there is no peer")?;
    let images = subject.dump_away()?;
    let (server, _) = serve(subject, &peer, &images, &[])?;
    subject.bystanders.push(server);
    subject.more_for_every_restore = vec!["--lazy-pages"];
    subject.restore_refused(&images, &["not of this program", "crtools lazy-pages"])?;
    subject.bystanders.clear();
    // It may have ended by itself.
    let _ = kill(Pid::from_raw(server), Signal::SIGKILL);
    subject.see_nobody("after the refusal")?;
    fs::remove_file(images.join("lazy-pages.socket")).map_err(|e| format!("remove its socket: {e}"))?;
    subject.restore(&images)?;
    finish(subject)
}

fn criu_is_not_sent_compressed_pages(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let peer = crate::tool::peer().ok_or("there is no peer")?;
    let (images, received) = (subject.step("images")?, subject.step("received")?);
    let at = ["--address", "127.0.0.1", "--port", DUMP];
    let ours = std::mem::replace(&mut subject.tools.restore, peer);
    subject.receive_pages(&received, &at)?;
    subject.tools.restore = ours;
    let ran = subject.dump(&images, &[&["--page-server", "--compress"], &at[..]].concat())?;
    if ran.exit_code() != Some(1) {
        return Err(format!("the dump should be refused, but: {:?}", ran.status));
    }
    says(&ran.said, &["does not understand compressed pages", "CRIU"])?;
    finish(subject)
}

/// The pages of a pre-dump and of the dump after it go to CRIU's page servers; restored from what came there.
fn keep_with_criu(subject: &mut Subject, more: &[&str]) -> Result<(), String> {
    let peer = crate::tool::peer().ok_or("there is no peer")?;
    let ours = std::mem::replace(&mut subject.tools.restore, peer);
    let (first, second) = (subject.step("received")?, subject.step("received")?);
    let (memory, images) = (subject.step("memory")?, subject.step("images")?);
    let name = |path: &Path| format!("../{}", path.file_name().unwrap_or_default().to_string_lossy());
    let at = [&["--address", "127.0.0.1", "--port", DUMP], more].concat();
    let to = [&["--page-server"], &at[..]].concat();
    subject.receive_pages(&first, &at)?;
    subject.save_memory(&memory, &to)?;
    subject.receive_pages(&second, &[&at[..], &["--prev-images-dir", &name(&first)]].concat())?;
    subject.dump_away_to(&images, &[&to[..], &["--prev-images-dir", &name(&memory)]].concat())?;
    subject.tools.restore = ours;
    for entry in fs::read_dir(&images).map_err(|e| format!("list the images: {e}"))?.flatten() {
        if entry.file_name().to_string_lossy().ends_with(".img") {
            fs::copy(entry.path(), second.join(entry.file_name()))
                .map_err(|e| format!("copy an image: {e}"))?;
        }
    }
    let pages = |folder: &Path| -> u64 {
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        let files = files.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        files.filter_map(|entry| entry.metadata().ok()).map(|data| data.len()).sum()
    };
    if pages(&first) < 64 << 20 || pages(&second) > 32 << 20 || pages(&images) + pages(&memory) > 0 {
        return Err(format!("{} and {} bytes have come", pages(&first), pages(&second)));
    }
    subject.restore(&second)?;
    finish(subject)
}

fn criu_keeps_pages(round: &mut Round) -> Result<(), String> {
    keep_with_criu(&mut round.subject, &[])
}

fn criu_keeps_encrypted_pages(round: &mut Round) -> Result<(), String> {
    let tls = certificates(&mut round.subject)?;
    keep_with_criu(&mut round.subject, &tls)
}

/// Restores the tree lazily until it has touched some pages. Returns what the server logged.
fn restore_and_touch(subject: &mut Subject, images: &Path, more: &[&'static str]) -> Result<String, String> {
    subject.more_for_every_restore = [&["--lazy-pages"], more].concat();
    subject.restore(images)?;
    let start = Instant::now();
    // The server ends when all is there; while it records it waits for touches first.
    while !subject.own("touched").exists() || others().len() > 1 {
        subject.still_there("after the restore")?;
        // One that pauses goes on when everything is there.
        if subject.own("pauses").exists() && !subject.own("on").exists() && others().len() == 1 {
            fs::create_dir(subject.own("on")).map_err(|e| format!("make a mark: {e}"))?;
        }
        if start.elapsed() > LIMIT {
            return Err("the program does not touch its memory, or the server does not end".into());
        }
        crate::sys::nap();
    }
    Ok(fs::read_to_string(images.join("lazy-pages.log")).unwrap_or_default())
}

fn kill_it(subject: &mut Subject, images: &Path) -> Result<(), String> {
    kill(Pid::from_raw(-1), Signal::SIGKILL).map_err(|e| format!("kill the program: {e}"))?;
    subject.see_killed("after the kill")?;
    let removed = fs::remove_file(images.with_extension("pid"));
    removed.and_then(|()| fs::remove_dir(subject.own("touched"))).map_err(|e| format!("remove a mark: {e}"))
}

/// The places of `wanted` in `all`, which has them in this order.
fn is_in_order(wanted: &[u64], all: &[std::ops::Range<u64>]) -> bool {
    let mut rest = all.iter();
    wanted.iter().all(|address| rest.any(|range| range.contains(address)))
}

fn what_was_touched_first_comes_first(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    fs::create_dir(subject.own("slowly")).map_err(|e| format!("make a mark: {e}"))?;
    let text = fs::read_to_string(subject.own("where")).map_err(|e| format!("read where it is: {e}"))?;
    let base: u64 = text.trim().parse().map_err(|e| format!("{text} is no address: {e}"))?;
    let touched: Vec<u64> = TOUCHED.map(|page| base + page as u64 * 4096).to_vec();
    let images = subject.dump_away()?;
    fs::File::create(subject.own(GO)).map_err(|e| format!("say go: {e}"))?;

    restore_and_touch(subject, &images, &["--record-working-set"])?;
    kill_it(subject, &images)?;
    let dir = image::Dir::open(&images).map_err(|e| e.to_string())?;
    let recorded = image::working_set::read(&dir).map_err(|e| e.to_string())?;
    let recorded: Vec<_> = recorded.into_iter().map(|touched| touched.range).collect();
    let bytes: u64 = recorded.iter().map(|range| range.end - range.start).sum();
    if !is_in_order(&touched, &recorded) || bytes > 4 << 20 {
        return Err(format!("touched were {touched:x?}, recorded are {recorded:x?}"));
    }

    // What was recorded is given in its order, as far as it was not touched before: it has time for that.
    fs::create_dir(subject.own("pauses")).map_err(|e| format!("make a mark: {e}"))?;
    let log = restore_and_touch(subject, &images, &[])?;
    kill_it(subject, &images)?;
    let given = log.lines().filter_map(|line| {
        let (range, _) = line.split_once(" was touched early")?;
        let (start, end) = range.rsplit(' ').next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        Some(hex(start)?..hex(end)?)
    });
    let given: Vec<_> = given.collect();
    let mut rest = recorded.iter();
    if given.len() < 3 || !given.iter().all(|range| rest.any(|recorded| recorded == range)) {
        return Err(format!("recorded are {recorded:x?}, given were {given:x?}:\n{log}"));
    }

    // Damaged, it is of no use and no harm.
    let file = images.join(image::working_set::NAME);
    let good = fs::read(&file).map_err(|e| format!("read what was recorded: {e}"))?;
    for at in [0, 5, 9, 12, 16, 20, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0xff;
        fs::write(&file, &bad).map_err(|e| format!("damage what was recorded: {e}"))?;
        restore_and_touch(subject, &images, &[])?;
        kill_it(subject, &images)?;
    }
    fs::write(&file, &good[..good.len() / 2]).map_err(|e| format!("cut what was recorded: {e}"))?;
    restore_and_touch(subject, &images, &[])?;
    fs::create_dir(subject.own("all")).map_err(|e| format!("make a mark: {e}"))?;
    subject.see_good_end(LIMIT)
}

/// Images lose pages one by one as a lazy restore gives them, not only in the end.
fn what_was_touched_is_freed_at_once(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    fs::create_dir(subject.own("slowly")).map_err(|e| format!("make a mark: {e}"))?;
    let images = subject.dump_away()?;
    let blocks = || -> u64 {
        let entries = fs::read_dir(&images).into_iter().flatten().flatten();
        let pages = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
        pages.filter_map(|entry| entry.metadata().ok()).map(|data| data.blocks()).sum()
    };
    let all = blocks();
    fs::File::create(subject.own(GO)).map_err(|e| format!("say go: {e}"))?;
    // With the first option nothing comes but what is touched.
    subject.more_for_every_restore = vec!["--record-working-set", "--lazy-pages", "--auto-dedup"];
    subject.restore(&images)?;
    let start = Instant::now();
    let mut seen = Vec::new();
    while blocks() > 0 {
        seen.push(blocks());
        subject.still_there("after the restore")?;
        if start.elapsed() > LIMIT {
            return Err(format!("{} of {all} blocks stay", blocks()));
        }
        crate::sys::nap();
    }
    if !seen.iter().any(|blocks| *blocks < all && *blocks > all / 2) {
        return Err(format!("of {all} blocks there were, one after the other, {seen:?}"));
    }
    if images.join("inventory.img").exists() {
        return Err("the folder looks whole without its pages".into());
    }
    fs::create_dir(subject.own("all")).map_err(|e| format!("make a mark: {e}"))?;
    subject.see_good_end(LIMIT)
}

/// A lazy restore that is held in the moment in which its tree is about to run: its pid, and that of the server. The program
/// has been told to look at its memory as soon as it runs.
fn restore_held(subject: &mut Subject, has_server: bool) -> Result<(i32, i32, Traced), String> {
    let images = subject.dump_away()?;
    fs::File::create(subject.own(GO)).map_err(|e| format!("say go: {e}"))?;
    let tool = subject.tools.restore.clone();
    let wrong = |e: std::io::Error| format!("start the tool: {e}");
    if has_server {
        serve(subject, &tool, &images, &[])?;
    }
    let (there, go_on) = (subject.own("there"), subject.own("go-on"));
    let script = format!(
        "[ $CRTOOLS_SCRIPT_ACTION = pre-resume ] || exit 0; mkdir {}; until [ -e {} ]; do sleep 0.01; done",
        there.display(),
        go_on.display()
    );
    let words = ["-d", "--lazy-pages", "--action-script", &script];
    let (restore, _) = tool.start(&mut subject.reaper, &images, "restore", &words).map_err(wrong)?;
    let start = Instant::now();
    while !there.exists() {
        if start.elapsed() > LIMIT || subject.reaper.ended(restore).is_some() {
            return Err("the restore does not come to its end".into());
        }
        crate::sys::nap();
    }
    let is_server = |pid: &i32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).nth(1) == Some(b"lazy-pages")
    };
    let server = others().into_iter().find(is_server).ok_or("there is no server")?;
    let traced = Traced::begin(restore)?;
    fs::create_dir(go_on).map_err(|e| format!("let the restore go on: {e}"))?;
    Ok((restore, server, traced))
}

/// The last moment in which a restore could look for its server is over: no thread of the tree runs yet.
fn see_taken_along(subject: &mut Subject, has_server: bool) -> Result<(), String> {
    let (restore, server, traced) = restore_held(subject, has_server)?;
    let lets_go = |call: &Call| call[..2] == [libc::SYS_ptrace as u64, u64::from(libc::PTRACE_DETACH)];
    traced.before(lets_go, || {
        kill(Pid::from_raw(server), Signal::SIGKILL)
            .map_err(|e| e.to_string())
            .and_then(|()| await_state(server, &['Z']))
    })?;
    match subject.reaper.wait(restore, LIMIT) {
        Some(WaitStatus::Exited(_, 1)) => {}
        other => return Err(format!("the restore should fail with status 1, but: {other:?}")),
    }
    // One that finds zeros ends by itself, and then it is we who hear of it.
    match subject.reaper.ended(subject.pid) {
        None | Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => subject.see_nobody("after the restore"),
        other => Err(format!("the program ended with {other:?}")),
    }
}

fn server_that_dies_as_the_tree_starts_takes_it_along(round: &mut Round) -> Result<(), String> {
    see_taken_along(&mut round.subject, true)
}

fn server_that_restore_started_and_that_dies_takes_the_tree_along(round: &mut Round) -> Result<(), String> {
    see_taken_along(&mut round.subject, false)
}

/// Nobody tells the server that the tree runs, and it does.
fn tree_whose_restore_dies_as_it_starts_has_its_memory(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (restore, _, traced) = restore_held(subject, true)?;
    let says = |call: &Call| call[0] == libc::SYS_sendto as u64;
    traced.before(says, || {
        kill(Pid::from_raw(restore), Signal::SIGKILL).map_err(|e| format!("kill the restore: {e}"))
    })?;
    match subject.reaper.wait(restore, LIMIT) {
        Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => subject.see_good_end(LIMIT),
        other => Err(format!("the restore should be killed, but: {other:?}")),
    }
}

fn certificates(subject: &mut Subject) -> Result<Vec<&'static str>, String> {
    let words = crate::certificates::make(&subject.step("certificates")?)?;
    // For the rest of this process, which ends with the trial.
    Ok(words.into_iter().map(|word| &*word.leak()).collect())
}

/// The memory of a pre-dump and of a dump goes to encrypted page servers, and its last to a side that asks for it.
fn memory_comes_over_an_encrypted_line(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let tls = certificates(subject)?;
    let (memory, received) = (subject.step("memory")?, subject.step("received")?);
    let to = |port: &'static str| [&["--address", "127.0.0.1", "--port", port], &tls[..]].concat();
    subject.receive_pages(&received, &to("4012"))?;
    subject.save_memory(&memory, &[&["--page-server", "--compress"], &to("4012")[..]].concat())?;
    if !received.join("pages-65537.img.z").exists() {
        return Err("the page server has kept no pages".into());
    }
    let images = subject.step("images")?;
    let dump = subject.dump_keeping_memory(&images, DUMP, &tls)?;
    let listener = line()?;
    subject.more_for_every_restore.extend(&tls);
    let other_side = restore_beside(subject, &images, finish)?;
    let passed = carry(&listener, &mut |_| true)?;
    see_end(subject, other_side)?;
    all_has_passed(passed)?;
    see_moved(subject, dump)
}

/// The dump is refused before it touches anything, and no page has left.
fn page_server_with_another_authority_gets_nothing(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (ours, theirs) = (certificates(subject)?, certificates(subject)?);
    let (images, received) = (subject.step("images")?, subject.step("received")?);
    let at = ["--address", "127.0.0.1", "--port", DUMP];
    subject.receive_pages(&received, &[&at[..], &theirs].concat())?;
    let ran = subject.dump(&images, &[&["--page-server"], &at[..], &ours].concat())?;
    if ran.exit_code() != Some(1) {
        return Err(format!("the dump should be refused, but: {:?}", ran.status));
    }
    says(&ran.said, &["cannot agree on encryption", "--tls-cacert"])?;
    let log = fs::read_to_string(&ran.log).unwrap_or_default();
    if log.contains("froze") {
        return Err(format!("the tree was stopped all the same:\n{log}"));
    }
    let left: Vec<_> =
        fs::read_dir(&received).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    if left.iter().any(|name| name.to_string_lossy().starts_with("pages")) {
        return Err(format!("the page server has {left:?}"));
    }
    finish(subject)
}

fn side_with_another_authority_gets_no_memory(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let (ours, theirs) = (certificates(subject)?, certificates(subject)?);
    let images = subject.step("images")?;
    let dump = subject.dump_keeping_memory(&images, DUMP, &ours)?;
    let listener = line()?;
    let copy = images.clone();
    let beside = beside(|| {
        subject.reaper = Reaper::default();
        // It trusts the dump, which does not trust it.
        let trusts = ours.windows(2).find(|pair| pair[0] == "--tls-cacert").map(|pair| pair[1]);
        subject.more_for_every_restore = [there(), theirs].concat();
        subject.more_for_every_restore.extend(["--tls-cacert", trusts.unwrap_or_default()]);
        match subject.restore_refused(&copy, &["lazy-pages", "its log says why"]) {
            Ok(()) => 0,
            Err(why) => {
                println!("on the other side: {}", subject.report(&why));
                1
            }
        }
    })
    .map_err(|e| format!("make the other side: {e}"))?;
    carry(&listener, &mut |_| true)?;
    see_end(subject, beside)?;
    see_failed(subject, dump, &images, &["cannot agree on encryption"])?;
    await_state(subject.pid, &['S', 'R'])?;
    finish(subject)
}

/// CRIU sends the memory of a snapshot to a page server here, encrypted.
fn criu_encrypts_too(round: &mut Round) -> Result<(), String> {
    let subject = &mut round.subject;
    let peer = crate::tool::peer().ok_or("there is no peer")?;
    let tls = certificates(subject)?;
    let (images, received) = (subject.step("images")?, subject.step("received")?);
    let at = [&["--address", "127.0.0.1", "--port", DUMP], &tls[..]].concat();
    subject.receive_pages(&received, &at)?;
    subject.tools.dump = peer;
    let ran = subject.dump(&images, &[&["--leave-running", "--page-server"], &at[..]].concat())?;
    if !ran.is_good() {
        let log = fs::read_to_string(received.join("page-server.log")).unwrap_or_default();
        return Err(format!("the dump of CRIU failed: {:?}\n{log}", ran.status));
    }
    let pages = fs::read_dir(&received).into_iter().flatten().flatten();
    let pages = pages.filter(|entry| entry.file_name().to_string_lossy().starts_with("pages-"));
    let length: u64 = pages.filter_map(|entry| entry.metadata().ok()).map(|data| data.len()).sum();
    if length < 64 << 20 {
        return Err(format!("only {length} bytes have come"));
    }
    finish(subject)
}

/// Plays one trial.
///
/// # Errors
/// With the reason and the tails of the logs.
pub fn play(round: &mut Round, trial: &str) -> Result<(), String> {
    let (_, trial) = TRIALS.iter().find(|(name, _)| *name == trial).ok_or("no such trial")?;
    let result = trial(round).map_err(|problem| round.subject.report(&problem));
    round.subject.reaper.clear();
    result
}
