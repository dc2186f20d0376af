//! io_uring: rings that go on where they were.

use std::fs::{self, File};
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::process::fork;
use crate::sys::strange::{has_io_uring, has_io_uring_and_types};
use crate::sys::uring::{
    Buffers, COOP_TASKRUN, CQE32, DEFER_TASKRUN, IOPOLL, NO_SQARRAY, R_DISABLED, Request, Ring, SINGLE_ISSUER, SQE128, SUBMIT_ALL,
};

pub(super) const WHY: &str = "it refuses every ring";

pub const CASES: &[Case] = &[
    case!(ring_goes_on_with_its_counters).needs(has_io_uring).peer_cannot(WHY),
    case!(fresh_ring_goes_on).needs(has_io_uring).peer_cannot(WHY),
    case!(completions_not_seen_and_requests_not_told_are_kept).needs(has_io_uring).peer_cannot(WHY),
    case!(rings_of_every_layout_go_on).needs(has_io_uring).peer_cannot(WHY),
    case!(registered_buffers_and_files_go_on).needs(has_io_uring).peer_cannot(WHY),
    case!(ring_for_one_thread_goes_on).needs(has_io_uring).peer_cannot(WHY),
    case!(ring_of_a_child_goes_on).needs(has_io_uring).peer_cannot(WHY),
    case!(request_that_ends_soon_is_waited_for).needs(has_io_uring).peer_cannot(WHY),
    case!(ring_after_blocking_work_goes_on).restless().needs(has_io_uring).peer_cannot(WHY),
    case!(ring_with_an_eventfd_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_with_an_eventfd_for_later_ends_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(eventfd_that_is_closed_is_refused).refused(&["fd", "io_uring", "eventfd", "closed"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_that_is_not_enabled_yet_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_that_polls_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_submits_all_as_before).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_rings_of_threads_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_ring_that_is_closed_is_refused).refused(&["io_uring", "IORING_REGISTER_RING_FDS", "closed"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_files_of_one_name_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(requests_without_a_completion_are_counted).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(completions_without_a_request_are_counted).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(clock_that_has_told_once_is_refused).refused(&["fd", "io_uring", "in flight"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(provided_buffers_are_taken_in_their_order).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(rings_of_provided_buffers_go_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_of_buffers_beyond_a_round_goes_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_of_buffers_that_is_unmapped_is_refused).refused(&["fd", "io_uring", "provided buffers (40000)", "unmapped"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_file_that_is_closed_is_refused).refused(&["fd", "io_uring", "registered file 0"])
        .needs(has_io_uring).peer_cannot(WHY),
    case!(ring_of_one_thread_with_an_eventfd_goes_on).needs(has_io_uring_and_types).peer_cannot(WHY),
];

#[track_caller]
pub(super) fn works(ring: &mut Ring, count: u64) {
    for data in 0..count {
        ring.push(Request::nop(data + 1));
        assert_eq!(ring.submit(1), 1);
        assert_eq!(ring.reap(), Some((data + 1, 0)));
        assert_eq!(ring.reap(), None);
    }
}

fn ring_goes_on_with_its_counters(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 1001);
    t.checkpoint();
    works(&mut ring, 100);
    let file = File::create(t.path("file")).expect("create");
    ring.push(Request::write(file.as_fd(), b"written", 7));
    assert_eq!(ring.submit(1), 1);
    assert_eq!(ring.reap(), Some((7, 7)));
    assert_eq!(fs::read(t.path("file")).expect("read"), b"written");
}

fn fresh_ring_goes_on(t: &Trial) {
    let mut ring = Ring::new(16, 0);
    t.checkpoint();
    works(&mut ring, 100);
}

fn completions_not_seen_and_requests_not_told_are_kept(t: &Trial) {
    let file = File::create(t.path("file")).expect("create");
    let mut ring = Ring::new(4, 0);
    works(&mut ring, 6);
    for data in 1..4 {
        ring.push(Request::nop(data));
    }
    assert_eq!(ring.submit(3), 3);
    ring.push(Request::write(file.as_fd(), b"one ", 10));
    ring.push(Request::write(file.as_fd(), b"two", 11));
    t.checkpoint();
    assert_eq!(file.metadata().expect("stat").len(), 0);
    for data in 1..4 {
        assert_eq!(ring.reap(), Some((data, 0)));
    }
    assert_eq!(ring.reap(), None);
    assert_eq!(ring.submit(2), 2);
    assert_eq!((ring.reap(), ring.reap()), (Some((10, 4)), Some((11, 3))));
    assert_eq!(fs::read(t.path("file")).expect("read"), b"one two");
}

fn rings_of_every_layout_go_on(t: &Trial) {
    let mut rings = Vec::new();
    for flags in [0, SQE128, CQE32, SQE128 | CQE32, NO_SQARRAY, NO_SQARRAY | SQE128, NO_SQARRAY | CQE32] {
        for entries in [1, 8, 64, 256] {
            let mut ring = Ring::new(entries, flags);
            works(&mut ring, u64::from(entries) + 3);
            rings.push(ring);
        }
    }
    t.checkpoint();
    for ring in &mut rings {
        works(ring, 600);
    }
}

fn registered_buffers_and_files_go_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let files = ["one", "two"].map(|name| {
        fs::write(t.path(name), name).expect("write");
        // Writing goes to the position, which is that of the file's start.
        fs::OpenOptions::new().read(true).write(true).open(t.path(name)).expect("open")
    });
    let numbers = [files[0].as_raw_fd(), -1, files[1].as_raw_fd()];
    ring.register(2, &numbers);
    let buffer = Box::leak(vec![0_u8; 8192].into_boxed_slice());
    let address = buffer.as_mut_ptr();
    let vectors = [libc::iovec { iov_base: address.cast(), iov_len: 8192 }];
    ring.register(0, &vectors);
    t.checkpoint();
    ring.push(Request::fixed(false, 2, address as u64 + 5000, 3, 1));
    assert_eq!(ring.submit(1), 1);
    assert_eq!(ring.reap(), Some((1, 3)));
    assert_eq!(&buffer[5000..5003], b"two");
    ring.push(Request::fixed(true, 0, address as u64 + 5000, 3, 2));
    ring.push(Request::fixed(true, 1, address as u64 + 5000, 3, 3));
    assert_eq!(ring.submit(2), 2);
    let mut seen = [ring.reap(), ring.reap()];
    seen.sort_unstable();
    assert_eq!(seen, [Some((2, 3)), Some((3, -libc::EBADF))]);
    assert_eq!(fs::read(t.path("one")).expect("read"), b"two");
}

fn ring_for_one_thread_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, SINGLE_ISSUER | DEFER_TASKRUN);
    works(&mut ring, 50);
    let file = File::create(t.path("file")).expect("create");
    t.checkpoint();
    works(&mut ring, 50);
    ring.push(Request::write(file.as_fd(), b"written", 7));
    assert_eq!(ring.submit(1), 1);
    assert_eq!(ring.reap(), Some((7, 7)));
}

fn ring_of_a_child_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 20);
    let child = fork(|| {
        let mut own = Ring::new(8, 0);
        own.keep_from_children();
        works(&mut own, 10);
        t.mark("child");
        t.hold();
        works(&mut own, 10);
        t.await_mark("parent");
        // The one from before the fork, too.
        let shared = &ring.fd;
        assert!(nix::fcntl::fcntl(shared, nix::fcntl::FcntlArg::F_GETFD).is_ok());
    });
    t.await_mark("child");
    t.checkpoint();
    works(&mut ring, 20);
    t.mark("parent");
    child.succeed();
}

fn request_that_ends_soon_is_waited_for(t: &Trial) {
    static SOON: [i64; 2] = [0, 150_000_000];
    let mut ring = Ring::new(8, 0);
    ring.push(Request::timeout_or_after(&SOON, 9, 5));
    assert_eq!(ring.submit(0), 1);
    t.checkpoint();
    assert_eq!(ring.submit(1), 0);
    assert_eq!(ring.reap(), Some((5, -libc::ETIME)));
    works(&mut ring, 10);
}

/// Names of the threads, among them those of the kernel.
pub(super) fn kernel_threads() -> Vec<String> {
    let tasks = fs::read_dir("/proc/self/task").expect("tasks").flatten();
    tasks.filter_map(|task| fs::read_to_string(task.path().join("comm")).ok()).collect()
}

/// A request that a thread of the kernel carries out.
fn works_later(ring: &mut Ring) {
    let (reader, writer) = std::io::pipe().expect("pipe");
    let mut request = Request::read(reader.as_fd(), Box::leak(vec![0_u8; 1].into_boxed_slice()), 3);
    request.make_async();
    ring.push(request);
    assert_eq!(ring.submit(0), 1);
    nix::unistd::write(&writer, b"x").expect("write");
    assert_eq!(ring.submit(1), 0);
    assert_eq!(ring.reap(), Some((3, 1)));
}

fn ring_after_blocking_work_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    works_later(&mut ring);
    // A thread of the kernel waits for more to do.
    assert!(kernel_threads().iter().any(|name| name.starts_with("iou-wrk")), "{:?}", kernel_threads());
    t.checkpoint();
    works(&mut ring, 10);
}

/// Operations of io_uring_register(2).
const FILES: u32 = 2;
const EVENTFD: u32 = 4;
const EVENTFD_ASYNC: u32 = 7;
const ENABLE: u32 = 12;
const RING_FDS: u32 = 20;
const BUFFER_RING: u32 = 22;

fn ring_with_an_eventfd_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 3);
    // Another one before it.
    let _other = EventFd::new().expect("eventfd");
    let event = EventFd::new().expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD, &[number]);
    works(&mut ring, 2);
    t.checkpoint();
    works(&mut ring, 3);
    assert_eq!(event.read(), Ok(5));
}

fn ring_with_an_eventfd_for_later_ends_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD_ASYNC, &[number]);
    t.checkpoint();
    works(&mut ring, 3);
    assert!(event.read().is_err());
    works_later(&mut ring);
    assert_eq!(event.read(), Ok(1));
}

fn eventfd_that_is_closed_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let event = EventFd::new().expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD, &[number]);
    drop(event);
    t.checkpoint();
    works(&mut ring, 3);
}

fn ring_that_is_not_enabled_yet_goes_on(t: &Trial) {
    let flags = R_DISABLED | SINGLE_ISSUER | DEFER_TASKRUN;
    let mut rings = [Ring::new(8, flags), Ring::new(8, R_DISABLED)];
    let code = |ring: &Ring| ring.try_submit().expect_err("it is not enabled").raw_os_error();
    t.checkpoint();
    for ring in &mut rings {
        assert_eq!(code(ring), Some(libc::EBADFD));
        ring.register::<u8>(ENABLE, &[]);
        works(ring, 10);
    }
    // The first is for the one who enabled it, the other for all.
    let refused = std::thread::scope(|scope| {
        let [first, other] = &mut rings;
        first.push(Request::nop(1));
        other.push(Request::nop(1));
        let others = || rings.each_ref().map(|ring| ring.try_submit().err().and_then(|error| error.raw_os_error()));
        scope.spawn(others).join().expect("a thread")
    });
    assert_eq!(refused, [Some(libc::EEXIST), None]);
}

fn ring_that_polls_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, IOPOLL);
    works(&mut ring, 10);
    let (reader, _writer) = std::io::pipe().expect("pipe");
    t.checkpoint();
    works(&mut ring, 10);
    // A pipe cannot be polled for the end of a request.
    ring.push(Request::read(reader.as_fd(), Box::leak(vec![0_u8; 1].into_boxed_slice()), 3));
    assert_eq!(ring.submit(0), 1);
    assert_eq!(ring.reap(), Some((3, -libc::EOPNOTSUPP)));
}

fn ring_submits_all_as_before(t: &Trial) {
    let mut rings = [SUBMIT_ALL | COOP_TASKRUN, 0].map(|flags| Ring::new(8, flags));
    t.checkpoint();
    // What follows a request that is none is submitted, or left.
    let taken = rings.each_mut().map(|ring| {
        ring.push(Request::wrong(1));
        ring.push(Request::nop(2));
        ring.submit(0)
    });
    assert_eq!(taken, [2, 1]);
}

/// IORING_REGISTER_RING_FDS takes an index, or hands out the next, and a descriptor.
fn register_itself(ring: &Ring, index: u32) {
    let number = u64::from(ring.fd.as_raw_fd().cast_unsigned());
    assert_eq!(ring.register(RING_FDS, &[[u64::from(index), number]]), 1);
}

fn registered_rings_of_threads_go_on(t: &Trial) {
    let mut first = Ring::new(8, 0);
    let mut second = Ring::new(8, 0);
    register_itself(&second, 1);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            register_itself(&first, 3);
            t.mark("thread");
            t.hold();
            first.push(Request::nop(5));
            assert_eq!(first.submit_registered(3, 1).expect("its own"), 1);
            assert_eq!(first.reap(), Some((5, 0)));
            let code = first.submit_registered(1, 0).expect_err("of another thread").raw_os_error();
            assert!(matches!(code, Some(libc::EBADF | libc::EINVAL)), "{code:?}");
        });
        t.await_mark("thread");
        t.checkpoint();
        second.push(Request::nop(6));
        assert_eq!(second.submit_registered(1, 1).expect("its own"), 1);
        assert_eq!(second.reap(), Some((6, 0)));
        other.join().expect("the thread");
    });
}

fn registered_ring_that_is_closed_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    register_itself(&ring, 0);
    let other = Ring::new(8, 0);
    drop(std::mem::replace(&mut ring.fd, File::open("/dev/null").expect("open").into()));
    t.checkpoint();
    assert_eq!(other.submit(0), 0);
    ring.push(Request::nop(5));
    assert_eq!(ring.submit_registered(0, 1).expect("submit"), 1);
    assert_eq!(ring.reap(), Some((5, 0)));
}

fn registered_files_of_one_name_go_on(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    fs::write(t.path("file"), "12345678").expect("write");
    let files = [0, 1, 2].map(|_| File::open(t.path("file")).expect("open"));
    for (at, mut file) in (0_u64..).zip(&files) {
        std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(at)).expect("seek");
    }
    ring.register(FILES, &[files[2].as_raw_fd(), files[1].as_raw_fd()]);
    t.checkpoint();
    let bytes = Box::leak(vec![0_u8; 2].into_boxed_slice());
    let address = bytes.as_mut_ptr();
    for (index, offset) in [(0, 0), (1, 1)] {
        // From the position of the file, which only this open file has.
        ring.push(Request::read_registered(index, address as u64 + offset, 1, 7));
        assert_eq!(ring.submit(1), 1);
        assert_eq!(ring.reap(), Some((7, 1)));
    }
    assert_eq!(bytes, b"32");
}

fn requests_without_a_completion_are_counted(t: &Trial) {
    let mut rings = [0, SQE128 | CQE32, SINGLE_ISSUER | DEFER_TASKRUN].map(|flags| Ring::new(8, flags));
    let silent = |ring: &mut Ring, count: u32| {
        for _ in 0..count {
            let mut request = Request::nop(0);
            request.make_silent();
            ring.push(request);
            assert_eq!(ring.submit(0), 1);
            assert_eq!(ring.reap(), None);
        }
    };
    for ring in &mut rings {
        works(ring, 5);
        silent(ring, 101);
    }
    t.checkpoint();
    for ring in &mut rings {
        works(ring, 20);
        silent(ring, 3);
        works(ring, 3);
    }
}

fn completions_without_a_request_are_counted(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 5);
    let (reader, writer) = std::io::pipe().expect("pipe");
    ring.push(Request::watch(reader.as_fd(), 7));
    assert_eq!(ring.submit(0), 1);
    for _ in 0..10 {
        nix::unistd::write(&writer, b"x").expect("write");
        assert_eq!(ring.submit(1), 0);
        assert_eq!(ring.reap(), Some((7, libc::POLLIN.into())));
    }
    ring.push(Request::watch_no_more(7, 8));
    assert_eq!(ring.submit(2), 1);
    let mut ends = [ring.reap(), ring.reap()];
    ends.sort_unstable();
    assert_eq!(ends, [Some((7, -libc::ECANCELED)), Some((8, 0))]);
    t.checkpoint();
    works(&mut ring, 20);
}

fn clock_that_has_told_once_is_refused(t: &Trial) {
    static EVERY: [i64; 2] = [2, 0];
    let mut ring = Ring::new(8, 0);
    ring.push(Request::tick(&EVERY, 7));
    assert_eq!(ring.submit(1), 1);
    assert_eq!(ring.reap(), Some((7, -libc::ETIME)));
    t.checkpoint();
    // Every two seconds, until the program ends.
    assert_eq!(ring.submit(1), 0);
    assert_eq!(ring.reap(), Some((7, -libc::ETIME)));
}

/// Reads the next letter of a file into a buffer of a group: which one, or why not.
fn take(ring: &mut Ring, file: &File, group: u16) -> Result<u16, i32> {
    ring.push(Request::read_some(file.as_fd(), 1, group));
    assert_eq!(ring.submit(1), 1);
    match ring.reap_with_buffer() {
        Some((0, 1, Some(number))) => Ok(number),
        Some((0, error, None)) => Err(-error),
        other => panic!("{other:?}"),
    }
}

fn alphabet(t: &Trial) -> File {
    fs::write(t.path("alphabet"), "abcdefghijklmnopqrstuvwxyz").expect("write");
    File::open(t.path("alphabet")).expect("open")
}

fn provided_buffers_are_taken_in_their_order(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let file = alphabet(t);
    let memory = crate::sys::memory::Map::private(4096);
    let give = |ring: &mut Ring, count: i32, first: u16, group: u16| {
        let address = memory.address as u64 + u64::from(first) * 16;
        ring.push(Request::provide(address, count, first, group));
        assert_eq!(ring.submit(1), 1);
        assert!(ring.reap().is_some_and(|(_, result)| result >= 0));
    };
    give(&mut ring, 4, 10, 3);
    give(&mut ring, 1, 70, 500);
    for number in [10, 11] {
        assert_eq!(take(&mut ring, &file, 3), Ok(number));
    }
    give(&mut ring, 1, 10, 3);
    t.checkpoint();
    for number in [12, 13, 10] {
        assert_eq!(take(&mut ring, &file, 3), Ok(number));
    }
    assert_eq!([10, 11, 12, 13].map(|number| memory.get(number * 16)), *b"ebcd");
    assert_eq!(take(&mut ring, &file, 3), Err(libc::ENOBUFS));
    assert_eq!(take(&mut ring, &file, 500), Ok(70));
    give(&mut ring, 1, 11, 3);
    assert_eq!(take(&mut ring, &file, 3), Ok(11));
}

fn rings_of_provided_buffers_go_on(t: &Trial) {
    let mut file = alphabet(t);
    let memory = crate::sys::memory::Map::private(4096);
    let address = |number: u16| memory.address as u64 + u64::from(number) * 16;
    let mut ring = Ring::new(8, 0);
    let groups = [(1, false, false), (2, true, false), (40_000, false, true), (900, true, true)];
    let groups = groups.map(|(id, is_of_kernel, is_incremental)| {
        (Buffers::register(&ring, id, 4, is_of_kernel, is_incremental), is_incremental)
    });
    for (buffers, is_incremental) in &groups {
        (0..3).for_each(|number| buffers.add(address(number), number));
        assert_eq!(take(&mut ring, &file, buffers.group()), Ok(0));
        assert_eq!(take(&mut ring, &file, buffers.group()), Ok(u16::from(!is_incremental)));
    }
    // One that was never used.
    let unused = Buffers::register(&ring, 7, 8, false, false);
    t.checkpoint();
    unused.add(address(9), 9);
    assert_eq!(take(&mut ring, &file, 7), Ok(9));
    for (buffers, is_incremental) in &groups {
        // Those that are taken byte by byte have 16 bytes each, of which the first has 14 left.
        let expected = if *is_incremental { [vec![0; 14], vec![1; 16], vec![2; 16]].concat() } else { vec![2] };
        for number in expected {
            file.rewind().expect("rewind");
            assert_eq!(take(&mut ring, &file, buffers.group()), Ok(number));
        }
        assert_eq!(take(&mut ring, &file, buffers.group()), Err(libc::ENOBUFS));
        buffers.add(address(5), 5);
        assert_eq!(take(&mut ring, &file, buffers.group()), Ok(5));
    }
}

fn ring_of_buffers_beyond_a_round_goes_on(t: &Trial) {
    let mut file = alphabet(t);
    let memory = crate::sys::memory::Map::private(4096);
    let mut ring = Ring::new(8, SQE128 | CQE32);
    let groups = [false, true].map(|is_of_kernel| Buffers::register(&ring, u16::from(is_of_kernel), 2, is_of_kernel, false));
    let mut next = |ring: &mut Ring, count: u32| {
        for number in (0..count).map(|count| count as u16) {
            for buffers in &groups {
                file.rewind().expect("rewind");
                buffers.add(memory.address as u64, number);
                assert_eq!(take(ring, &file, buffers.group()), Ok(number));
            }
        }
    };
    // The positions are 16 bits wide.
    next(&mut ring, 65_536 + 1001);
    let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD, &[number]);
    t.checkpoint();
    assert!(event.read().is_err(), "nothing has ended since");
    next(&mut ring, 10);
}

fn ring_of_buffers_that_is_unmapped_is_refused(t: &Trial) {
    let mut ring = Ring::new(8, 0);
    let memory = crate::sys::memory::Map::private(4096);
    // struct io_uring_buf_reg: address, entries, and a number; reserved.
    ring.register(BUFFER_RING, &[[memory.address as u64, 8 | 40_000 << 32, 0, 0, 0]]);
    memory.unmap(0..1);
    t.checkpoint();
    works(&mut ring, 3);
}

fn registered_file_that_is_closed_is_refused(t: &Trial) {
    let ring = Ring::new(8, 0);
    let file = File::create(t.path("file")).expect("create");
    let number = file.as_raw_fd();
    ring.register(2, &[number]);
    drop(file);
    t.checkpoint();
    assert_eq!(ring.submit(0), 0);
}

fn ring_of_one_thread_with_an_eventfd_goes_on(t: &Trial) {
    let mut ring = Ring::new(8, SINGLE_ISSUER);
    let event = EventFd::new().expect("eventfd");
    let number = event.as_fd().as_raw_fd();
    ring.register(4, &[number]);
    t.checkpoint();
    works(&mut ring, 3);
    assert_eq!(event.read(), Ok(3));
}
