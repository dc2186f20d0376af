//! Pipes and fifos.

use std::fs::{File, OpenOptions};
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2};

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::call::is_same_file;
use crate::sys::process::fork;

pub const CASES: &[Case] = &[
    case!(full_pipe_keeps_every_byte),
    case!(pipe_capacity_is_kept).exchange(),
    case!(reader_whose_writers_are_gone_gets_the_rest_and_the_end).exchange(),
    case!(writer_whose_readers_are_gone_gets_a_broken_pipe).exchange(),
    case!(nonblocking_flag_belongs_to_one_end),
    case!(pipe_between_siblings_survives).exchange(),
    case!(end_opened_again_through_proc_stays_a_separate_description),
    case!(packet_mode_pipe_keeps_its_packets).peer_cannot("it refuses pipes with O_DIRECT"),
    case!(ring_of_processes_goes_on_passing_a_token).restless(),
    case!(many_readers_of_one_pipe_go_on).restless(),
    case!(blocked_reader_stays_blocked_and_is_woken),
    case!(fifo_with_queued_data_survives).exchange(),
    case!(fifo_with_one_side_open_survives),
    case!(deleted_fifo_with_data_survives),
    case!(two_thousand_pipes_survive).peer_cannot("its table of pipes with data has 1024 rows"),
];

fn pid() -> i32 {
    std::process::id() as i32
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn full_pipe_keeps_every_byte(t: &Trial) {
    let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).expect("pipe");
    let mut sent = Vec::new();
    for chunk in pattern(1 << 20).chunks(1000) {
        match nix::unistd::write(&writer, chunk) {
            Ok(count) => sent.extend_from_slice(&chunk[..count]),
            Err(Errno::EAGAIN) => break,
            Err(e) => panic!("write: {e}"),
        }
    }
    t.checkpoint();
    drop(writer);
    let mut got = Vec::new();
    File::from(reader).read_to_end(&mut got).expect("read");
    assert!(got == sent, "{} bytes sent, {} received, or other bytes", sent.len(), got.len());
}

fn pipe_capacity_is_kept(t: &Trial) {
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    let capacity = fcntl(&reader, FcntlArg::F_SETPIPE_SZ(256 * 1024)).expect("F_SETPIPE_SZ");
    writer.write_all(&pattern(200_000)).expect("write");
    t.checkpoint();
    assert_eq!(fcntl(&reader, FcntlArg::F_GETPIPE_SZ), Ok(capacity));
    drop(writer);
    let mut got = Vec::new();
    File::from(OwnedFd::from(reader)).read_to_end(&mut got).expect("read");
    assert!(got == pattern(200_000));
}

fn reader_whose_writers_are_gone_gets_the_rest_and_the_end(t: &Trial) {
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    writer.write_all(b"the rest").expect("write");
    drop(writer);
    t.checkpoint();
    let mut text = String::new();
    reader.read_to_string(&mut text).expect("read");
    assert_eq!(text, "the rest");
}

fn writer_whose_readers_are_gone_gets_a_broken_pipe(t: &Trial) {
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    drop(reader);
    t.checkpoint();
    let error = writer.write(b"x").expect_err("nobody reads");
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
}

fn nonblocking_flag_belongs_to_one_end(t: &Trial) {
    let (reader, writer) = std::io::pipe().expect("pipe");
    fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("fcntl");
    t.checkpoint();
    assert_eq!(nix::unistd::read(&reader, &mut [0]), Err(Errno::EAGAIN));
    let flags = OFlag::from_bits_retain(fcntl(&writer, FcntlArg::F_GETFL).expect("fcntl"));
    assert!(!flags.contains(OFlag::O_NONBLOCK));
}

fn pipe_between_siblings_survives(t: &Trial) {
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    writer.write_all(b"from the parent, ").expect("write");
    let sender = fork(|| {
        t.mark("sender");
        t.hold();
        writer.write_all(b"from the sender").expect("write");
    });
    let receiver = fork(|| {
        drop(writer.try_clone().expect("dup"));
        // SAFETY: this process's own copy of the write end, used no more; otherwise the end never comes.
        unsafe { libc::close(writer.as_raw_fd()) };
        t.mark("receiver");
        t.hold();
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("read");
        assert_eq!(text, "from the parent, from the sender");
    });
    t.await_mark("sender");
    t.await_mark("receiver");
    drop((reader, writer));
    t.checkpoint();
    sender.succeed();
    receiver.succeed();
}

fn end_opened_again_through_proc_stays_a_separate_description(t: &Trial) {
    let (reader, writer) = std::io::pipe().expect("pipe");
    let again = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", reader.as_raw_fd()))
        .expect("open again");
    t.checkpoint();
    assert!(!is_same_file((pid(), reader.as_raw_fd()), (pid(), again.as_raw_fd())));
    assert_eq!(nix::unistd::read(&again, &mut [0]), Err(Errno::EAGAIN));
    (&writer).write_all(b"x").expect("write");
    assert_eq!(nix::unistd::read(&again, &mut [0]), Ok(1));
}

fn packet_mode_pipe_keeps_its_packets(t: &Trial) {
    let (reader, writer) = pipe2(OFlag::O_DIRECT).expect("pipe");
    for packet in ["one", "three", "x"] {
        nix::unistd::write(&writer, packet.as_bytes()).expect("write");
    }
    t.checkpoint();
    let mut bytes = [0; 100];
    for packet in ["one", "three", "x"] {
        let count = nix::unistd::read(&reader, &mut bytes).expect("read");
        assert_eq!(&bytes[..count], packet.as_bytes());
    }
    nix::unistd::write(&writer, b"four").expect("write");
    nix::unistd::write(&writer, b"five").expect("write");
    // What a read leaves of a packet is gone.
    assert_eq!(nix::unistd::read(&reader, &mut bytes[..2]), Ok(2));
    assert_eq!(nix::unistd::read(&reader, &mut bytes), Ok(4));
    assert_eq!(&bytes[..4], b"five");
}

fn ring_of_processes_goes_on_passing_a_token(t: &Trial) {
    const LENGTH: usize = 6;
    let pipes: Vec<(PipeReader, PipeWriter)> = (0..LENGTH).map(|_| std::io::pipe().expect("pipe")).collect();
    let children: Vec<_> = (0..LENGTH)
        .map(|place| {
            fork(|| {
                let (mut from, mut to) = (&pipes[place].0, &pipes[(place + 1) % LENGTH].1);
                let mut last = 0;
                loop {
                    let mut token = [0; 8];
                    from.read_exact(&mut token).expect("read");
                    let value = u64::from_le_bytes(token);
                    if value == u64::MAX {
                        // The end goes round once; the first process does not get it back.
                        if place + 1 < LENGTH {
                            to.write_all(&token).expect("write");
                        }
                        return;
                    }
                    assert!(value > last || value == 1, "{value} came after {last}");
                    last = value;
                    to.write_all(&(value + 1).to_le_bytes()).expect("write");
                    if place == 0 && t.is_over() && value > 100 {
                        from.read_exact(&mut token).expect("read");
                        to.write_all(&u64::MAX.to_le_bytes()).expect("write");
                        return;
                    }
                }
            })
        })
        .collect();
    (&pipes[0].1).write_all(&1_u64.to_le_bytes()).expect("write");
    t.checkpoint();
    for child in children {
        child.succeed();
    }
}

fn blocked_reader_stays_blocked_and_is_woken(t: &Trial) {
    let (mut reader, mut writer) = std::io::pipe().expect("pipe");
    let child = fork(|| {
        let mut bytes = [0; 5];
        reader.read_exact(&mut bytes).expect("read");
        assert_eq!(&bytes, b"wake!");
    });
    crate::case::until("the read", || {
        crate::sys::procfs::syscall(child.pid).first().is_some_and(|nr| *nr == libc::SYS_read as u64)
    });
    t.checkpoint();
    writer.write_all(b"wake!").expect("write");
    child.succeed();
}

fn fifo_with_queued_data_survives(t: &Trial) {
    mkfifo(&t.path("fifo"), Mode::S_IRUSR | Mode::S_IWUSR).expect("mkfifo");
    let mut fifo = OpenOptions::new().read(true).write(true).open(t.path("fifo")).expect("open");
    fifo.write_all(b"queued").expect("write");
    t.checkpoint();
    let mut bytes = [0; 6];
    fifo.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"queued");
    let mut writer = OpenOptions::new().write(true).open(t.path("fifo")).expect("open by name");
    writer.write_all(b"again!").expect("write");
    fifo.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"again!");
}

fn fifo_with_one_side_open_survives(t: &Trial) {
    mkfifo(&t.path("fifo"), Mode::S_IRUSR | Mode::S_IWUSR).expect("mkfifo");
    let reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(t.path("fifo"))
        .expect("open");
    t.checkpoint();
    assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(0));
    let mut writer = OpenOptions::new().write(true).open(t.path("fifo")).expect("open");
    writer.write_all(b"x").expect("write");
    assert_eq!(nix::unistd::read(&reader, &mut [0]), Ok(1));
}

fn deleted_fifo_with_data_survives(t: &Trial) {
    mkfifo(&t.path("fifo"), Mode::S_IRUSR | Mode::S_IWUSR).expect("mkfifo");
    let mut fifo = OpenOptions::new().read(true).write(true).open(t.path("fifo")).expect("open");
    fifo.write_all(b"queued").expect("write");
    std::fs::remove_file(t.path("fifo")).expect("remove");
    t.checkpoint();
    assert!(!t.path("fifo").exists());
    let mut bytes = [0; 6];
    fifo.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"queued");
}

fn two_thousand_pipes_survive(t: &Trial) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("getrlimit");
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(5000), hard).expect("setrlimit");
    let mut pipes: Vec<_> = (0..2000).map(|_| std::io::pipe().expect("pipe")).collect();
    for (number, (_, writer)) in pipes.iter_mut().enumerate() {
        writer.write_all(&(number as u32).to_le_bytes()).expect("write");
    }
    t.checkpoint();
    for (number, (reader, _)) in pipes.iter_mut().enumerate() {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).expect("read");
        assert_eq!(u32::from_le_bytes(bytes), number as u32);
    }
}

/// Each number comes to one of the readers, and none is lost.
fn many_readers_of_one_pipe_go_on(t: &Trial) {
    const READERS: usize = 16;
    let (reader, writer) = std::io::pipe().expect("pipe");
    let sums = crate::sys::memory::Map::shared(READERS * 8);
    let children: Vec<_> = (0..READERS)
        .map(|own| {
            fork(|| {
                // The other end is the parent's alone, so that it ends.
                nix::unistd::close(writer.as_raw_fd()).expect("close");
                let mut bytes = [0; 8];
                let mut sum = 0;
                while (&reader).read(&mut bytes).expect("read") == 8 {
                    sum += u64::from_ne_bytes(bytes);
                }
                sums.word(own * 8).store(sum, std::sync::atomic::Ordering::SeqCst);
            })
        })
        .collect();
    let whole = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (mut sum, mut number) = (0, 0_u64);
            while number < 5000 || !t.is_over() {
                (&writer).write_all(&number.to_ne_bytes()).expect("write");
                sum += number;
                number += 1;
                if number == 2000 {
                    t.mark("works");
                }
                if number.is_multiple_of(64) {
                    crate::sys::nap();
                }
            }
            sum
        });
        t.await_mark("works");
        t.checkpoint();
        thread.join().expect("the writer")
    });
    drop(writer);
    children.iter().for_each(crate::sys::process::Child::succeed);
    let sum: u64 = (0..READERS).map(|own| sums.word(own * 8).load(std::sync::atomic::Ordering::SeqCst)).sum();
    assert_eq!(sum, whole);
}
