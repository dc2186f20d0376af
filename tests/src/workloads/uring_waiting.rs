//! io_uring: requests that wait for their files go on waiting.

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::uring::{WHY, kernel_threads, works};
use super::uring_rights::goes;
use crate::case;
use crate::case::{Case, Trial, until};
use crate::sys::memory::Map;
use crate::sys::process::fork;
use crate::sys::strange::{has_io_uring, has_io_uring_and_types};
use crate::sys::uring::{Buffers, CQE32, DEFER_TASKRUN, Poller, Request, Ring, SINGLE_ISSUER, SQE128, opened};

pub const CASES: &[Case] = &[
    case!(poll_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(watch_that_has_told_nothing_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(watch_that_has_told_once_tells_no_more_than_before).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(watches_of_one_ring_are_more_than_its_entries).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(reading_and_writing_that_wait_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(reading_without_a_completion_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_file_is_waited_for).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(duplicate_of_a_closed_number_is_waited_for).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(event_that_was_not_looked_at_yet_is_told).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(thread_goes_on_waiting).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_with_a_thread_goes_on_waiting).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(wait_for_a_completion_is_not_disturbed).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(receiving_and_accepting_once_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(all_that_comes_is_read).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(echo_server_goes_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(times_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(reading_into_pieces_is_refused)
        .refused(&["fd", "io_uring", "requests in flight: READV (1) waits for pipe:[", "], which is not carried", "cancelled"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(wait_for_a_closed_file_is_refused)
        .refused(&["fd", "io_uring", "requests in flight: POLL_ADD (6) waits for a file that its process has closed"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(wait_as_somebody_else_is_refused)
        .refused(&["fd", "io_uring", "requests in flight: READ (22) waits for pipe:[", "], which is not carried"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(time_of_a_ring_with_a_thread_is_refused)
        .refused(&["fd", "io_uring", "requests in flight: TIMEOUT (11) waits for a time, which is not carried"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(buffers_of_requests_that_wait_are_refused)
        .refused(&["fd", "io_uring", "with provided buffers, most of which were taken by requests that still wait"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(request_of_a_thread_of_the_kernel_is_refused)
        .refused(&["fd", "io_uring", "is an io_uring with requests in flight: 1 were taken, 0 completed"])
        .needs(has_io_uring).peer_cannot(WHY),
];

/// Request 8 is to take back number 7, and does.
#[track_caller]
fn is_taken_back(ring: &mut Ring, request: Request) {
    ring.push(request);
    assert_eq!(ring.submit(2), 1);
    let mut ends = [ring.reap(), ring.reap()];
    ends.sort_unstable();
    assert_eq!(ends, [Some((7, -libc::ECANCELED)), Some((8, 0))]);
}

const FILES: u32 = 2;
const EVENTFD: u32 = 4;
const READABLE: i32 = libc::POLLIN as i32;

fn pipe() -> (PipeReader, PipeWriter) {
    std::io::pipe().expect("pipe")
}

#[track_caller]
fn asks(ring: &mut Ring, request: Request) {
    ring.push(request);
    assert_eq!(ring.submit(0), 1);
    assert_eq!(ring.reap(), None);
}

/// What the next completion tells, which is waited for.
#[track_caller]
fn told(ring: &mut Ring) -> (u64, i32) {
    ring.submit(1);
    ring.reap().expect("a completion")
}

#[track_caller]
fn is_quiet(ring: &mut Ring) {
    assert_eq!(ring.submit(0), 0);
    assert_eq!(ring.reap(), None);
}

fn room(length: usize) -> &'static mut [u8] {
    Box::leak(vec![0_u8; length].into_boxed_slice())
}

fn bytes(memory: &Map, at: usize, length: usize) -> Vec<u8> {
    (at..at + length).map(|at| memory.get(at)).collect()
}

fn poll_goes_on(t: &Trial) {
    let mut rings = [0, SQE128 | CQE32].map(|flags| Ring::new(8, flags));
    let (mut reader, mut writer) = pipe();
    for ring in &mut rings {
        works(ring, 5);
        asks(ring, Request::poll(reader.as_fd(), 7));
    }
    t.checkpoint();
    rings.iter_mut().for_each(is_quiet);
    writer.write_all(b"x").expect("write");
    for ring in &mut rings {
        assert_eq!(told(ring), (7, READABLE));
        works(ring, 9);
    }
    reader.read_exact(&mut [0]).expect("read");
    writer.write_all(b"x").expect("write");
    rings.iter_mut().for_each(is_quiet);
}

fn watch_that_has_told_nothing_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (mut reader, mut writer) = pipe();
    asks(&mut ring, Request::watch(reader.as_fd(), 7));
    t.checkpoint();
    is_quiet(&mut ring);
    for _ in 0..3 {
        writer.write_all(b"x").expect("write");
        assert_eq!(told(&mut ring), (7, READABLE));
        reader.read_exact(&mut [0]).expect("read");
    }
    is_taken_back(&mut ring, Request::watch_no_more(7, 8));
    works(&mut ring, 3);
}

fn watch_that_has_told_once_tells_no_more_than_before(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    asks(&mut ring, Request::watch(reader.as_fd(), 7));
    for _ in 0..20 {
        writer.write_all(b"x").expect("write");
        assert_eq!(told(&mut ring), (7, READABLE));
    }
    // Nothing is read, and one that is not seen.
    writer.write_all(b"x").expect("write");
    assert_eq!(ring.submit(1), 0);
    t.checkpoint();
    assert_eq!(ring.reap(), Some((7, READABLE)));
    is_quiet(&mut ring);
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, READABLE));
    is_quiet(&mut ring);
}

fn watches_of_one_ring_are_more_than_its_entries(t: &Trial) {
    let mut ring = Ring::new(4, 0);
    let mut pipes = Vec::new();
    for data in 0..7 {
        let (reader, writer) = pipe();
        asks(&mut ring, Request::watch(reader.as_fd(), data));
        pipes.push((reader, writer));
    }
    t.checkpoint();
    for (data, (_, writer)) in (0..).zip(&mut pipes) {
        writer.write_all(b"x").expect("write");
        assert_eq!(told(&mut ring), (data, READABLE));
    }
}

fn reading_and_writing_that_wait_go_on(t: &Trial) {
    const FULL: usize = 4096;
    let mut ring = Ring::new(8, 0);
    let ((empty, mut writer), (mut reader, full)) = (pipe(), pipe());
    nix::fcntl::fcntl(&full, nix::fcntl::FcntlArg::F_SETPIPE_SZ(FULL as i32)).expect("F_SETPIPE_SZ");
    (&full).write_all(&[1; FULL]).expect("write");
    let memory = Map::private(4096);
    asks(&mut ring, Request::read(empty.as_fd(), room(0), 7).with(&memory, 0, 16));
    asks(&mut ring, Request::write(full.as_fd(), b"written", 8));
    t.checkpoint();
    is_quiet(&mut ring);
    writer.write_all(b"to read").expect("write");
    assert_eq!(told(&mut ring), (7, 7));
    assert_eq!(bytes(&memory, 0, 7), b"to read");
    reader.read_exact(&mut [0; FULL]).expect("read");
    assert_eq!(told(&mut ring), (8, 7));
    let mut read = [0; 7];
    reader.read_exact(&mut read).expect("read");
    assert_eq!(&read, b"written");
}

fn reading_without_a_completion_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let mut request = Request::read(reader.as_fd(), room(1), 3);
    request.make_silent();
    asks(&mut ring, request);
    works(&mut ring, 3);
    t.checkpoint();
    writer.write_all(b"xy").expect("write");
    works(&mut ring, 3);
    // One byte is gone.
    assert_eq!((&reader).read(&mut [0; 4]).expect("read"), 1);
}

fn registered_file_is_waited_for(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    ring.register(FILES, &[-1, reader.as_raw_fd()]);
    asks(&mut ring, Request::watch(reader.as_fd(), 7).of_registered(1));
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, READABLE));
}

fn duplicate_of_a_closed_number_is_waited_for(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    asks(&mut ring, Request::watch(reader.as_fd(), 7));
    let _kept = reader.try_clone().expect("dup");
    // Another file has its number now.
    drop(reader);
    let _other = File::open("/dev/null").expect("open");
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, READABLE));
}

fn event_that_was_not_looked_at_yet_is_told(t: &Trial) {
    // Such a ring looks when its program asks.
    let mut ring = Ring::new(8, SINGLE_ISSUER | DEFER_TASKRUN);
    let (reader, mut writer) = pipe();
    asks(&mut ring, Request::watch(reader.as_fd(), 7));
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD, &[number]);
    writer.write_all(b"x").expect("write");
    t.checkpoint();
    assert!(event.read().is_ok());
    assert_eq!(told(&mut ring), (7, READABLE));
    is_quiet(&mut ring);
}

fn thread_goes_on_waiting(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let (other, held) = pipe();
    asks(&mut ring, Request::watch(other.as_fd(), 6));
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            asks(&mut ring, Request::watch(reader.as_fd(), 7));
            t.mark("thread");
            t.hold();
            assert_eq!(told(&mut ring), (7, READABLE));
        });
        t.await_mark("thread");
        t.checkpoint();
        writer.write_all(b"x").expect("write");
        thread.join().expect("the thread");
    });
    is_quiet(&mut ring);
    (&held).write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (6, READABLE));
}

fn ring_with_a_thread_goes_on_waiting(t: &Trial) {
    let mut ring = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    let (reader, mut writer) = pipe();
    let (empty, mut other) = pipe();
    ring.push(Request::watch(reader.as_fd(), 7));
    ring.push(Request::read(empty.as_fd(), room(3), 8));
    ring.hand_over(0);
    goes(&mut ring, 5);
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    ring.hand_over(1);
    assert_eq!(ring.reap(), Some((7, READABLE)));
    other.write_all(b"abc").expect("write");
    ring.hand_over(1);
    assert_eq!(ring.reap(), Some((8, 3)));
    goes(&mut ring, 5);
}

fn wait_for_a_completion_is_not_disturbed(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    asks(&mut ring, Request::read(reader.as_fd(), room(1), 7));
    std::thread::scope(|scope| {
        let (tids, tid) = std::sync::mpsc::channel();
        let ring = &mut ring;
        let thread = scope.spawn(move || {
            tids.send(nix::unistd::gettid()).expect("send");
            // A call that fails is a panic.
            ring.submit(1);
        });
        let tid = tid.recv().expect("a thread");
        until("the thread waits", || {
            let call = crate::sys::procfs::syscall(format_args!("self/task/{tid}"));
            call.first() == Some(&(libc::SYS_io_uring_enter as u64))
        });
        t.checkpoint();
        writer.write_all(b"x").expect("write");
        thread.join().expect("the thread");
    });
    assert_eq!(ring.reap(), Some((7, 1)));
}

fn receiving_and_accepting_once_go_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (here, mut there) = UnixStream::pair().expect("socketpair");
    let listener = UnixListener::bind(t.path("socket")).expect("bind");
    let memory = Map::private(4096);
    asks(&mut ring, Request::receive(here.as_fd(), 7).with(&memory, 0, 8));
    asks(&mut ring, Request::accept(listener.as_fd(), false, 8));
    t.checkpoint();
    there.write_all(b"hello").expect("write");
    assert_eq!(told(&mut ring), (7, 5));
    assert_eq!(bytes(&memory, 0, 5), b"hello");
    let mut client = UnixStream::connect(t.path("socket")).expect("connect");
    let (data, number) = told(&mut ring);
    assert_eq!(data, 8);
    let mut accepted = UnixStream::from(opened(number));
    client.write_all(b"x").expect("write");
    accepted.read_exact(&mut [0]).expect("read");
}

fn all_that_comes_is_read(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let memory = Map::private(4096);
    let buffers = Buffers::register(&ring, 3, 8, false, false);
    (0..8).for_each(|number| buffers.add(memory.address as u64 + u64::from(number) * 16, number));
    works(&mut ring, 1);
    asks(&mut ring, Request::read_each(reader.as_fd(), 3, 7));
    for number in 0..3 {
        writer.write_all(b"x").expect("write");
        ring.submit(1);
        assert_eq!(ring.reap_with_buffer(), Some((7, 1, Some(number))));
    }
    t.checkpoint();
    for number in 3..8 {
        writer.write_all(b"y").expect("write");
        ring.submit(1);
        assert_eq!(ring.reap_with_buffer(), Some((7, 1, Some(number))));
    }
    assert_eq!([2, 3].map(|number| memory.get(number * 16)), *b"xy");
}

/// Sends back what clients send, until the first of them hangs up.
fn serve(listener: &UnixListener, t: &Trial) {
    const LISTENER: u64 = 1 << 30;
    const SENT: u64 = 1 << 31;
    const GROUP: u16 = 9;
    let mut ring = Ring::new(8, 0);
    let memory = Map::private(4096);
    let buffers = Buffers::register(&ring, GROUP, 16, false, false);
    let address = |number: u16| memory.address as u64 + u64::from(number) * 16;
    (0..16).for_each(|number| buffers.add(address(number), number));
    ring.push(Request::accept(listener.as_fd(), true, LISTENER));
    t.mark("server");
    let mut clients: HashMap<u64, UnixStream> = HashMap::new();
    loop {
        ring.submit(1);
        let Some((data, result, buffer)) = ring.reap_with_buffer() else { continue };
        assert!(result >= 0, "{data}: {result}");
        if data == LISTENER {
            clients.insert(result as u64, opened(result).into());
            ring.push(Request::receive_each(result, GROUP, result as u64));
            continue;
        }
        if data & SENT != 0 {
            let number = data as u16;
            buffers.add(address(number), number);
            continue;
        }
        let Some(number) = buffer else { return };
        let said = usize::from(number) * 16;
        ring.push(Request::send(clients[&data].as_fd(), SENT | u64::from(number)).with(&memory, said, result as u32));
    }
}

fn echo_server_goes_on(t: &Trial) {
    let listener = UnixListener::bind(t.path("socket")).expect("bind");
    let server = fork(|| serve(&listener, t));
    t.await_mark("server");
    let client = || UnixStream::connect(t.path("socket")).expect("connect");
    let asks = |mut client: &UnixStream, rounds: u32| {
        for round in 0..rounds {
            let sent = format!("round {round}");
            client.write_all(sent.as_bytes()).expect("write");
            let mut got = vec![0; sent.len()];
            client.read_exact(&mut got).expect("read");
            assert_eq!(got, sent.as_bytes());
        }
    };
    let old = [client(), client(), client()];
    old.iter().for_each(|client| asks(client, 50));
    t.checkpoint();
    old.iter().for_each(|client| asks(client, 50));
    let new = [client(), client()];
    new.iter().chain(&old).for_each(|client| asks(client, 20));
    let [first, ..] = old;
    first.shutdown(std::net::Shutdown::Write).expect("shutdown");
    server.succeed();
}

fn times_go_on(t: &Trial) {
    static SOON: [i64; 2] = [0, 300_000_000];
    static LONG: [i64; 2] = [3600, 5];
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("clock_gettime");
    let end = Box::leak(Box::new([now.tv_sec() + 1, 0]));
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 3);
    asks(&mut ring, Request::timeout(&SOON, 5));
    asks(&mut ring, Request::timeout_at(end, 6));
    asks(&mut ring, Request::timeout(&LONG, 7));
    t.checkpoint();
    let mut ends = [told(&mut ring), told(&mut ring)];
    ends.sort_unstable();
    assert_eq!(ends, [(5, -libc::ETIME), (6, -libc::ETIME)]);
    is_quiet(&mut ring);
    is_taken_back(&mut ring, Request::timeout_no_more(7, 8));
    works(&mut ring, 3);
}

fn time_of_a_ring_with_a_thread_is_refused(t: &Trial) {
    static LONG: [i64; 2] = [3600, 0];
    let mut ring = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    ring.push(Request::timeout(&LONG, 7));
    ring.hand_over(0);
    goes(&mut ring, 3);
    t.checkpoint();
    goes(&mut ring, 3);
}

fn reading_into_pieces_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let bytes = room(4);
    let pieces = vec![libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: 4 }];
    asks(&mut ring, Request::read_pieces(reader.as_fd(), Box::leak(pieces.into_boxed_slice()), 7));
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, 1));
}

fn wait_for_a_closed_file_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    asks(&mut ring, Request::watch(reader.as_fd(), 7));
    drop(reader);
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, READABLE));
}

fn wait_as_somebody_else_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let number = ring.register_personality();
    asks(&mut ring, Request::read(reader.as_fd(), room(1), 7).as_somebody(number));
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, 1));
}

fn request_of_a_thread_of_the_kernel_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    // To open it takes somebody who opens the other end.
    let path = t.path("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let name = std::ffi::CString::new(path.to_str().expect("text")).expect("no zero");
    let mut request = Request::open(Box::leak(name.into_boxed_c_str()), 0, 7);
    request.make_async();
    asks(&mut ring, request);
    until("the name of its thread", || kernel_threads().iter().any(|name| name.starts_with("iou-wrk")));
    t.checkpoint();
    let _end = File::options().write(true).open(path).expect("open");
    assert!(told(&mut ring).1 >= 0);
}

fn buffers_of_requests_that_wait_are_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let (reader, mut writer) = pipe();
    let memory = Map::private(4096);
    let buffers = Buffers::register(&ring, 3, 8, false, false);
    (0..8).for_each(|number| buffers.add(memory.address as u64 + u64::from(number) * 16, number));
    asks(&mut ring, Request::read_each(reader.as_fd(), 3, 7));
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, 1));
    t.checkpoint();
    writer.write_all(b"x").expect("write");
    assert_eq!(told(&mut ring), (7, 1));
}
