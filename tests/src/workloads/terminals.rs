//! Terminals: pseudoterminals in all their states, and whose they are.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::errno::Errno;
use nix::unistd::{Pid, getpgrp, getsid, setpgid, setsid, tcgetpgrp, tcsetpgrp};

use crate::case;
use crate::case::{Case, Mode, Moment, Outside, Trial, until};
use crate::sys::process::fork;
use crate::sys::{procfs, pty};

const LOST: &str = "it does not keep this";
const JOB: &[&str] = &["--shell-job"];

pub const CASES: &[Case] = &[
    case!(pair_goes_on).exchange(),
    case!(pair_keeps_number_size_and_termios).exchange(),
    case!(two_slaves_of_one_master_go_on).exchange(),
    case!(pairs_of_several_numbers_keep_them).exchange(),
    case!(master_shared_through_fork_goes_on).exchange(),
    case!(master_of_the_file_system_goes_on),
    case!(master_without_slaves_waits_for_one).exchange(),
    case!(master_whose_slave_was_closed_says_so).peer_cannot(LOST),
    case!(slave_that_hung_up_stays_so).peer_cannot(LOST),
    case!(locked_and_exclusive_and_packet_mode_are_kept).exchange()
        .peer_cannot_in(&[Mode::ToPeer], "an exclusive slave is not in its restore"),
    case!(packet_mode_goes_on).exchange(),
    case!(owner_and_mode_of_the_slave_are_kept).peer_cannot(LOST),
    case!(status_flags_of_both_ends_are_kept).exchange(),
    case!(session_keeps_its_terminal_and_foreground_group).exchange()
        .peer_cannot_in(&[Mode::ToPeer], "the children of the leader have no terminal"),
    case!(terminal_without_descriptors_is_kept).exchange(),
    case!(terminal_that_is_nobodys_stays_so).exchange(),
    case!(process_that_left_its_terminal_has_none).peer_cannot(LOST),
    case!(alias_of_the_terminal_goes_on).peer_cannot("it refuses this"),
    case!(sessions_with_a_terminal_each_keep_theirs).exchange(),
    case!(hangup_still_signals_the_session),
    case!(output_that_nobody_has_read_is_kept).exchange(),
    case!(lines_of_output_are_kept).peer_cannot("it writes every end of a line twice"),
    case!(much_output_that_nobody_has_read_is_kept).peer_cannot(LOST),
    case!(output_of_a_closed_slave_is_kept).peer_cannot(LOST),
    case!(lines_that_nobody_has_read_are_kept).killed().peer_cannot(LOST),
    case!(typed_bytes_that_are_no_line_yet_are_kept).peer_cannot(LOST),
    case!(raw_input_is_kept).peer_cannot(LOST),
    case!(queue_in_packet_mode_is_kept).peer_cannot(LOST),
    case!(terminal_stopped_by_a_character_stays_so).peer_cannot(LOST),
    case!(terminal_stopped_by_a_call_stays_so).peer_cannot(LOST),
    case!(console_is_open_afterwards).needs(has_console),
    case!(virtual_terminal_is_open_afterwards).needs(has_virtual_terminal).exchange()
        .peer_cannot_in(&[Mode::ToPeer], "it does not open it again"),
    case!(slave_whose_master_is_outside_is_refused).outside(terminal)
        .refused(&["fd", "tty[", "outside of the tree", "--shell-job", "--external"]),
    case!(slave_is_passed_in).outside(terminal_passed_in).restless().exchange(),
    case!(session_whose_terminal_is_passed_in_has_it_again).outside(terminal_passed_in).restless()
        .peer_cannot("it does not give it to the session"),
    case!(terminal_of_another_session_is_refused_at_the_restore).outside(terminal_of_another_session).restless()
        .restore_refused(&["take the terminal of its session", "another session"]),
    case!(job_of_a_shell_goes_on).options(JOB).shell_job().outside(shell).exchange()
        .peer_cannot_in(&[Mode::Plain, Mode::Twice, Mode::ToPeer], "it wants the terminal as its standard input"),
    case!(job_in_the_foreground_stays_there).options(JOB).shell_job().outside(shell)
        .peer_cannot("it leaves the group where it is"),
    case!(number_that_is_taken_is_refused_at_the_restore).outside(taker)
        .restore_refused(&["pseudoterminal 0", "taken", "process 1 "]),
];

/// Whoever sets the foreground group from the background would be stopped.
fn deaf() {
    crate::sys::signal::block(&[nix::sys::signal::Signal::SIGTTOU]);
}

/// A number of `/proc/PID/stat`, as proc_pid_stat(5) counts them: 7 is the terminal, 8 its foreground group.
fn stat(pid: i32, field: usize) -> String {
    procfs::stat(pid)[field - 3].clone()
}

#[track_caller]
fn says(from: &OwnedFd, to: &OwnedFd, text: &str) {
    assert_eq!(nix::unistd::write(from, text.as_bytes()), Ok(text.len()));
    hears(to, text);
}

#[track_caller]
fn hears(fd: &OwnedFd, text: &str) {
    let mut all = Vec::new();
    until(&format!("{text:?}, so far {}", String::from_utf8_lossy(&all)), || {
        let mut bytes = [0; 4096];
        if pty::poll(fd) & libc::POLLIN != 0 {
            let count = nix::unistd::read(fd, &mut bytes).expect("read");
            all.extend_from_slice(&bytes[..count]);
        }
        all.len() >= text.len()
    });
    assert_eq!(String::from_utf8_lossy(&all), text);
}

/// A conversation with echo, in lines.
#[track_caller]
fn talk(master: &OwnedFd, slave: &OwnedFd) {
    says(master, slave, "question\n");
    hears(master, "question\r\n");
    says(slave, master, "answer");
}

fn pair_goes_on(t: &Trial) {
    let (master, slave) = pty::pair();
    talk(&master, &slave);
    t.checkpoint();
    talk(&master, &slave);
    drop(pty::slave(&master));
}

fn pair_keeps_number_size_and_termios(t: &Trial) {
    let (master, slave) = pty::pair();
    pty::set_size(&master, 51, 133);
    let mut termios = pty::termios(&slave);
    // Another erase character, a time, no echo, upper case.
    termios[17 + 2] = b'#';
    termios[17 + 5] = 7;
    termios[12] &= !(libc::ECHO as u8);
    termios[4] |= libc::OLCUC as u8;
    pty::set_termios(&slave, termios);
    let before = (pty::number(&master), pty::size(&slave), pty::termios(&slave));
    t.checkpoint();
    assert_eq!((pty::number(&master), pty::size(&slave), pty::termios(&slave)), before);
    says(&master, &slave, "no echo\n");
    assert_eq!(nix::unistd::write(&slave, b"upper"), Ok(5));
    hears(&master, "UPPER");
}

fn two_slaves_of_one_master_go_on(t: &Trial) {
    let (master, slave) = pty::pair();
    let other = pty::slave(&master);
    let same = pty::again(&slave);
    t.checkpoint();
    talk(&master, &slave);
    talk(&master, &other);
    drop(slave);
    talk(&master, &same);
    drop((same, other));
    assert_eq!(pty::poll(&master) & libc::POLLHUP, libc::POLLHUP);
}

fn pairs_of_several_numbers_keep_them(t: &Trial) {
    let pairs: Vec<_> = (0..6).map(|_| pty::pair()).collect();
    let kept: Vec<_> = pairs.into_iter().enumerate().filter(|(at, _)| at % 2 == 1).map(|(_, pair)| pair).collect();
    let numbers: Vec<i32> = kept.iter().map(|(master, _)| pty::number(master)).collect();
    assert_eq!(numbers, [1, 3, 5]);
    t.checkpoint();
    assert_eq!(kept.iter().map(|(master, _)| pty::number(master)).collect::<Vec<_>>(), numbers);
    kept.iter().for_each(|(master, slave)| talk(master, slave));
    assert_eq!(pty::number(&pty::master()), 0);
}

fn master_shared_through_fork_goes_on(t: &Trial) {
    let (master, slave) = pty::pair();
    let child = fork(|| {
        t.mark("child");
        t.hold();
        says(&master, &slave, "of a child\n");
        t.mark("said");
    });
    t.await_mark("child");
    t.checkpoint();
    t.await_mark("said");
    hears(&master, "of a child\r\n");
    child.succeed();
}

fn master_of_the_file_system_goes_on(t: &Trial) {
    let master = pty::open("/dev/pts/ptmx", 0);
    pty::set_locked(&master, false);
    let slave = pty::slave(&master);
    t.checkpoint();
    talk(&master, &slave);
}

fn master_without_slaves_waits_for_one(t: &Trial) {
    let master = pty::master();
    let number = pty::number(&master);
    t.checkpoint();
    assert_eq!(pty::poll(&master), libc::POLLOUT);
    assert_eq!(pty::number(&master), number);
    talk(&master, &pty::slave(&master));
}

fn master_whose_slave_was_closed_says_so(t: &Trial) {
    let (master, slave) = pty::pair();
    drop(slave);
    t.checkpoint();
    assert_eq!(pty::poll(&master) & libc::POLLHUP, libc::POLLHUP);
    assert_eq!(nix::unistd::read(&master, &mut [0; 9]), Err(Errno::EIO));
    talk(&master, &pty::slave(&master));
}

fn slave_that_hung_up_stays_so(t: &Trial) {
    let (master, slave) = pty::pair();
    drop(master);
    t.checkpoint();
    assert_eq!(nix::unistd::read(&slave, &mut [0; 9]), Ok(0));
    assert_eq!(nix::unistd::write(&slave, b"x"), Err(Errno::EIO));
    let (master, other) = pty::pair();
    assert_eq!(pty::number(&master), 1);
    talk(&master, &other);
}

fn locked_and_exclusive_and_packet_mode_are_kept(t: &Trial) {
    let locked = pty::open("/dev/ptmx", 0);
    let (exclusive, slave) = pty::pair();
    pty::set_exclusive(&slave);
    let (packets, other) = pty::pair();
    pty::set_packet_mode(&packets, true);
    let look = || {
        [&locked, &exclusive, &packets]
            .map(|fd| (pty::is_locked(fd), pty::is_packet_mode(fd)))
            .into_iter()
            .chain([(pty::is_exclusive(&slave), pty::is_exclusive(&other))])
            .collect::<Vec<_>>()
    };
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
    assert_eq!(before, [(true, false), (false, false), (false, true), (true, false)]);
    pty::set_locked(&locked, false);
    talk(&locked, &pty::slave(&locked));
}

fn packet_mode_goes_on(t: &Trial) {
    let (master, slave) = pty::pair();
    pty::make_raw(&slave);
    pty::set_packet_mode(&master, true);
    t.checkpoint();
    nix::unistd::write(&slave, b"data").expect("write");
    hears(&master, "\0data");
    // A stop of the output is told as a status.
    // SAFETY: TCXONC takes an integer.
    assert_eq!(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TCXONC, libc::TCOOFF) }, 0);
    hears(&master, "\u{4}");
}

fn owner_and_mode_of_the_slave_are_kept(t: &Trial) {
    let all = [pty::pair(), pty::pair()];
    let names = all.each_ref().map(|(master, _)| pty::name(master));
    for (name, mode) in names.iter().zip([0o600, 0o622]) {
        std::os::unix::fs::chown(name, Some(7), Some(9)).expect("chown");
        fs::set_permissions(name, fs::Permissions::from_mode(mode)).expect("chmod");
    }
    let [(_one, first), _two] = all;
    drop(first);
    let look = || {
        names.each_ref().map(|name| fs::metadata(name).map(|found| (found.uid(), found.gid(), found.mode())).expect("stat"))
    };
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
}

fn status_flags_of_both_ends_are_kept(t: &Trial) {
    let master = pty::open("/dev/ptmx", libc::O_NONBLOCK);
    pty::set_locked(&master, false);
    let slaves = [0, libc::O_NONBLOCK, libc::O_APPEND].map(|flags| pty::open(pty::name(&master), flags));
    let flags = || {
        let of = |fd: &OwnedFd| nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFL).expect("F_GETFL");
        std::iter::once(&master).chain(&slaves).map(of).collect::<Vec<_>>()
    };
    let before = flags();
    t.checkpoint();
    assert_eq!(flags(), before);
    assert_eq!(nix::unistd::read(&master, &mut [0; 9]), Err(Errno::EAGAIN));
}

/// A shell and a job: a session with the terminal, and a group of it in the foreground.
fn session_keeps_its_terminal_and_foreground_group(t: &Trial) {
    let (master, slave) = pty::pair();
    let shell = fork(|| {
        setsid().expect("setsid");
        pty::take(&slave);
        let job = fork(|| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).expect("setpgid");
            t.mark("job");
            t.hold();
            assert_eq!(tcgetpgrp(&slave), Ok(getpgrp()));
            // Who is in the background would be stopped here.
            hears(&slave, "for the job\n");
            let own = pty::open("/dev/tty", 0);
            nix::unistd::write(&own, b"through the alias").expect("write");
        });
        t.await_mark("job");
        deaf();
        tcsetpgrp(&slave, job.pid).expect("tcsetpgrp");
        t.mark("shell");
        t.hold();
        assert_eq!(tcgetpgrp(&slave), Ok(job.pid));
        assert_eq!(stat(std::process::id() as i32, 8), job.pid.as_raw().to_string());
        job.succeed();
        tcsetpgrp(&slave, getpgrp()).expect("tcsetpgrp");
    });
    t.await_mark("shell");
    t.checkpoint();
    nix::unistd::write(&master, b"for the job\n").expect("write");
    hears(&master, "for the job\r\nthrough the alias");
    shell.succeed();
}

fn terminal_without_descriptors_is_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    let number = pty::number(&master);
    let child = fork(|| {
        setsid().expect("setsid");
        pty::take(&slave);
        // SAFETY: the number is not used again in this process.
        unsafe { libc::close(slave.as_raw_fd()) };
        // SAFETY: as above.
        unsafe { libc::close(master.as_raw_fd()) };
        t.mark("child");
        t.hold();
        let own = pty::open("/dev/tty", 0);
        nix::unistd::write(&own, b"here").expect("write");
        t.mark("said");
        t.await_mark("heard");
    });
    t.await_mark("child");
    drop(slave);
    t.checkpoint();
    assert_eq!(pty::number(&master), number);
    assert_eq!(stat(child.pid.as_raw(), 7), (136 << 8 | number).to_string());
    t.await_mark("said");
    hears(&master, "here");
    t.mark("heard");
    child.succeed();
}

fn terminal_that_is_nobodys_stays_so(t: &Trial) {
    let (_master, _slave) = pty::pair();
    t.checkpoint();
    assert_eq!(stat(std::process::id() as i32, 7), "0");
    assert_eq!(getsid(None), Ok(nix::unistd::getpid()));
    assert!(fs::File::open("/dev/tty").is_err());
}

fn process_that_left_its_terminal_has_none(t: &Trial) {
    let (_master, slave) = pty::pair();
    let leader = fork(|| {
        setsid().expect("setsid");
        pty::take(&slave);
        let member = fork(|| {
            let heir = fork(|| {
                t.mark("heir");
                t.hold();
                assert_ne!(stat(std::process::id() as i32, 7), "0");
            });
            pty::leave(&slave);
            t.mark("member");
            t.hold();
            assert!(fs::File::open("/dev/tty").is_err());
            heir.succeed();
        });
        t.await_mark("heir");
        t.await_mark("member");
        t.mark("leader");
        t.hold();
        assert!(fs::File::open("/dev/tty").is_ok());
        member.succeed();
    });
    t.await_mark("leader");
    t.checkpoint();
    leader.succeed();
}

fn alias_of_the_terminal_goes_on(t: &Trial) {
    let (master, slave) = pty::pair();
    let child = fork(|| {
        setsid().expect("setsid");
        pty::take(&slave);
        let alias = pty::open("/dev/tty", 0);
        t.mark("child");
        t.hold();
        hears(&alias, "hello\n");
        nix::unistd::write(&alias, b"alias").expect("write");
        t.await_mark("heard");
    });
    t.await_mark("child");
    t.checkpoint();
    nix::unistd::write(&master, b"hello\n").expect("write");
    hears(&master, "hello\r\nalias");
    t.mark("heard");
    child.succeed();
}

fn sessions_with_a_terminal_each_keep_theirs(t: &Trial) {
    let pairs = [pty::pair(), pty::pair(), pty::pair()];
    let children = [0, 1, 2].map(|at: usize| {
        fork(|| {
            setsid().expect("setsid");
            pty::take(&pairs[at].1);
            t.mark(&format!("child-{at}"));
            t.hold();
            let own = pty::open("/dev/tty", 0);
            nix::unistd::write(&own, format!("child {at}").as_bytes()).expect("write");
            t.await_mark("heard");
        })
    });
    (0..3).for_each(|at| t.await_mark(&format!("child-{at}")));
    t.checkpoint();
    for (at, (master, _)) in pairs.iter().enumerate() {
        hears(master, &format!("child {at}"));
    }
    t.mark("heard");
    children.iter().for_each(crate::sys::process::Child::succeed);
}

fn hangup_still_signals_the_session(t: &Trial) {
    let (master, slave) = pty::pair();
    let child = fork(|| {
        setsid().expect("setsid");
        pty::take(&slave);
        // SAFETY: the number is not used again in this process.
        unsafe { libc::close(master.as_raw_fd()) };
        t.mark("child");
        loop {
            crate::sys::nap();
        }
    });
    t.await_mark("child");
    t.checkpoint();
    drop((master, slave));
    use nix::sys::{signal::Signal, wait::WaitStatus};
    assert_eq!(child.wait(), WaitStatus::Signaled(child.pid, Signal::SIGHUP, false));
}

fn output_that_nobody_has_read_is_kept(t: &Trial) {
    keeps_output(t, "one two", "one two");
}

fn lines_of_output_are_kept(t: &Trial) {
    keeps_output(t, "one\ntwo", "one\r\ntwo");
}

fn keeps_output(t: &Trial, written: &str, read: &str) {
    let (master, slave) = pty::pair();
    nix::unistd::write(&slave, written.as_bytes()).expect("write");
    until("the output", || pty::poll(&master) & libc::POLLIN != 0);
    t.checkpoint();
    hears(&master, read);
    talk(&master, &slave);
}

fn much_output_that_nobody_has_read_is_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    let text: String = (0..4000).map(|number| format!("{number} ")).collect();
    let slave_again = pty::open(pty::name(&master), libc::O_NONBLOCK);
    // More than one end holds, and less than both.
    let count = nix::unistd::write(&slave_again, text.as_bytes()).expect("write");
    assert!(count > 5000);
    t.checkpoint();
    hears(&master, &text[..count]);
    talk(&master, &slave);
}

fn output_of_a_closed_slave_is_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    nix::unistd::write(&slave, b"last words").expect("write");
    drop(slave);
    t.checkpoint();
    hears(&master, "last words");
    assert_eq!(nix::unistd::read(&master, &mut [0; 9]), Err(Errno::EIO));
}

fn lines_that_nobody_has_read_are_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    let mut termios = pty::termios(&slave);
    termios[12] &= !(libc::ECHO as u8);
    pty::set_termios(&slave, termios);
    // Two lines, one that ends with the end of file, a quoted character, an end of file alone, and the next.
    nix::unistd::write(&master, b"one\ntwo\nthree\x04\x16\x03quoted\n\x04four\n").expect("write");
    until("the lines", || pty::poll(&slave) & libc::POLLIN != 0);
    t.checkpoint();
    let mut bytes = [0; 100];
    for line in ["one\n", "two\n", "three", "\u{3}quoted\n", "", "four\n"] {
        let count = nix::unistd::read(&slave, &mut bytes).expect("read");
        assert_eq!(String::from_utf8_lossy(&bytes[..count]), line);
    }
    assert_eq!(pty::poll(&slave) & libc::POLLIN, 0);
    assert_eq!(pty::poll(&master) & libc::POLLIN, 0);
    says(&master, &slave, "more\n");
}

fn typed_bytes_that_are_no_line_yet_are_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    nix::unistd::write(&master, b"whole\nhalg").expect("write");
    hears(&master, "whole\r\nhalg");
    t.checkpoint();
    hears(&slave, "whole\n");
    assert_eq!(pty::poll(&slave) & libc::POLLIN, 0);
    // The last can still be taken back.
    nix::unistd::write(&master, b"\x7ff\n").expect("write");
    hears(&slave, "half\n");
    hears(&master, "\x08 \x08f\r\n");
}

fn raw_input_is_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    pty::make_raw(&slave);
    nix::unistd::write(&master, b"\x03a\n\x04\x7f\x00z").expect("write");
    until("the input", || pty::poll(&slave) & libc::POLLIN != 0);
    t.checkpoint();
    hears(&slave, "\u{3}a\n\u{4}\u{7f}\0z");
    assert_eq!(pty::poll(&master) & libc::POLLIN, 0);
}

fn queue_in_packet_mode_is_kept(t: &Trial) {
    let (master, slave) = pty::pair();
    pty::set_packet_mode(&master, true);
    nix::unistd::write(&slave, b"data").expect("write");
    until("the output", || pty::poll(&master) & libc::POLLIN != 0);
    t.checkpoint();
    hears(&master, "\0data");
}

/// A pair whose slave does not wait when it is stopped.
fn pair_without_waiting() -> (OwnedFd, OwnedFd) {
    let master = pty::master();
    let slave = pty::open(pty::name(&master), libc::O_NONBLOCK);
    (master, slave)
}

fn is_stopped(slave: &OwnedFd) -> bool {
    nix::unistd::write(slave, b"x") == Err(Errno::EAGAIN)
}

fn terminal_stopped_by_a_character_stays_so(t: &Trial) {
    let (master, slave) = pair_without_waiting();
    nix::unistd::write(&slave, b"before").expect("write");
    nix::unistd::write(&master, b"\x13").expect("write");
    until("the stop", || pty::poll(&slave) & libc::POLLOUT == 0);
    t.checkpoint();
    hears(&master, "before");
    assert!(is_stopped(&slave));
    nix::unistd::write(&master, b"\x11").expect("write");
    until("the end of the stop", || !is_stopped(&slave));
    hears(&master, "x");
}

fn flow(slave: &OwnedFd, action: i32) {
    // SAFETY: TCXONC takes an integer.
    assert_eq!(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TCXONC, action) }, 0);
}

fn terminal_stopped_by_a_call_stays_so(t: &Trial) {
    let (master, slave) = pair_without_waiting();
    flow(&slave, libc::TCOOFF);
    t.checkpoint();
    assert!(is_stopped(&slave));
    nix::unistd::write(&master, b"\x11\n").expect("write");
    until("the line", || pty::poll(&slave) & libc::POLLIN != 0);
    assert!(is_stopped(&slave));
    flow(&slave, libc::TCOON);
    assert!(!is_stopped(&slave));
}

fn has(path: &str) -> Result<(), String> {
    fs::File::open(path).map(drop).map_err(|e| format!("{path}: {e}"))
}

fn has_virtual_terminal() -> Result<(), String> {
    has("/dev/tty9")
}

fn has_console() -> Result<(), String> {
    has("/dev/console")
}

fn is_open_afterwards(t: &Trial, path: &str) {
    let terminal = pty::open(path, libc::O_NONBLOCK);
    let before = pty::termios(&terminal);
    t.checkpoint();
    assert_eq!(pty::termios(&terminal), before);
}

fn virtual_terminal_is_open_afterwards(t: &Trial) {
    is_open_afterwards(t, "/dev/tty9");
}

fn console_is_open_afterwards(t: &Trial) {
    is_open_afterwards(t, "/dev/console");
}

/// A terminal whose master is the harness's.
fn terminal(outside: &mut Outside, moment: Moment) {
    if moment == Moment::Begin {
        let (master, slave) = pty::pair();
        fs::write(outside.directory.join("terminal"), pty::name(&master)).expect("write");
        outside.held = vec![master, slave];
    }
}

fn terminal_of(t: &Trial) -> OwnedFd {
    pty::open(fs::read_to_string(t.path("terminal")).expect("read"), 0)
}

fn slave_whose_master_is_outside_is_refused(t: &Trial) {
    let slave = terminal_of(t);
    t.checkpoint();
    nix::unistd::write(&slave, b"x").expect("write");
}

fn key_of(master: &OwnedFd) -> String {
    let stat = fs::metadata(pty::name(master)).expect("stat");
    format!("tty[{:x}:{:x}]", stat.rdev(), stat.dev())
}

fn terminal_passed_in(outside: &mut Outside, moment: Moment) {
    terminal(outside, moment);
    match moment {
        Moment::Ready => {
            let key = key_of(&outside.held[0]);
            outside.dump = vec!["--external".into(), key.clone()];
            let (master, slave) = pty::pair();
            // The tool gets it from us, as one that a program keeps.
            nix::fcntl::fcntl(&slave, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).expect("F_SETFD");
            outside.restore = vec!["--inherit-fd".into(), format!("fd[{}]:{key}", slave.as_raw_fd())];
            outside.held.extend([master, slave]);
        }
        Moment::Back => {
            let key = key_of(&outside.held[2]);
            outside.dump = vec!["--external".into(), key.clone()];
            outside.restore = vec!["--inherit-fd".into(), format!("fd[{}]:{key}", outside.held[3].as_raw_fd())];
        }
        Moment::End => {
            let at = if outside.held.len() > 2 && pty::poll(&outside.held[2]) & libc::POLLIN != 0 { 2 } else { 0 };
            hears(&outside.held[at], "from inside");
        }
        _ => {}
    }
}

fn slave_is_passed_in(t: &Trial) {
    let slave = terminal_of(t);
    t.checkpoint();
    nix::unistd::write(&slave, b"from inside").expect("write");
}

fn session_whose_terminal_is_passed_in_has_it_again(t: &Trial) {
    let slave = terminal_of(t);
    pty::take(&slave);
    t.checkpoint();
    assert_eq!(tcgetpgrp(&slave), Ok(getpgrp()));
    nix::unistd::write(pty::open("/dev/tty", 0), b"from inside").expect("write");
}

/// Passes a terminal in that is somebody's.
fn terminal_of_another_session(outside: &mut Outside, moment: Moment) {
    terminal_passed_in(outside, moment);
    match moment {
        Moment::Away => {
            setsid().expect("setsid");
            pty::take(&outside.held[3]);
        }
        Moment::Mend => {
            // SAFETY: SIG_IGN runs no code of ours.
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
            pty::leave(&outside.held[3]);
        }
        _ => {}
    }
}

fn terminal_of_another_session_is_refused_at_the_restore(t: &Trial) {
    session_whose_terminal_is_passed_in_has_it_again(t);
}

/// The harness leads a session on a terminal, as a shell does.
fn shell(outside: &mut Outside, moment: Moment) {
    if moment == Moment::Begin {
        terminal(outside, moment);
        setsid().expect("setsid");
        pty::take(&outside.held[1]);
        deaf();
    }
    if moment == Moment::Away {
        // As a shell does when a job is gone.
        let mut termios = pty::termios(&outside.held[1]);
        termios[12] |= libc::ECHO as u8;
        pty::set_termios(&outside.held[1], termios);
    }
    if moment == Moment::End {
        hears(&outside.held[0], "from the job");
    }
}

fn job_of_a_shell_goes_on(t: &Trial) {
    let slave = terminal_of(t);
    let mut termios = pty::termios(&slave);
    termios[12] &= !(libc::ECHO as u8);
    pty::set_termios(&slave, termios);
    t.checkpoint();
    assert_eq!(pty::termios(&slave), termios);
    assert!(fs::File::open("/dev/tty").is_ok());
    nix::unistd::write(&slave, b"from the job").expect("write");
}

fn job_in_the_foreground_stays_there(t: &Trial) {
    let slave = terminal_of(t);
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).expect("setpgid");
    deaf();
    tcsetpgrp(&slave, getpgrp()).expect("tcsetpgrp");
    t.checkpoint();
    assert_eq!(tcgetpgrp(&slave), Ok(getpgrp()));
    nix::unistd::write(&slave, b"from the job").expect("write");
}

fn taker(outside: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => outside.held.push(pty::master()),
        Moment::Mend => outside.held.clear(),
        _ => {}
    }
}

fn number_that_is_taken_is_refused_at_the_restore(t: &Trial) {
    let (master, slave) = pty::pair();
    t.checkpoint();
    talk(&master, &slave);
}
