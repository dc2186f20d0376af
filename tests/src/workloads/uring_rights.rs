//! io_uring: rings that the kernel looks into by itself, and what their requests may do.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;

use nix::unistd::{Uid, seteuid};

use super::uring::{WHY, kernel_threads, works};
use crate::case;
use crate::case::{Case, Moment, Outside, Trial, until};
use crate::sys::process::fork;
use crate::sys::strange::has_io_uring_and_types;
use crate::sys::uring::{Poller, R_DISABLED, Request, Ring, SUBMIT_ALL};

pub const CASES: &[Case] = &[
    case!(ring_with_a_thread_goes_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(requests_that_wait_for_a_sleeping_thread_are_kept).outside(nothing_is_written).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(thread_is_as_it_was_asked_for).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(rings_share_a_thread_as_before).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_with_a_thread_of_the_parent_serves_a_child).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(thread_keeps_the_rights_of_its_maker).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(registered_things_serve_a_ring_with_a_thread).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(ring_with_a_thread_that_is_not_enabled_yet_goes_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(thread_that_has_ended_is_refused)
        .refused(&["fd", "io_uring", "is an io_uring with a thread of the kernel (SQPOLL) that has ended with the process"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(personalities_keep_their_numbers_and_rights).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(personalities_of_a_ring_with_a_thread_go_on).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(restrictions_stay_in_force).restless().needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(restrictions_of_a_ring_that_is_not_enabled_yet_go_on).needs(has_io_uring_and_types).peer_cannot(WHY),
    case!(restrictions_and_provided_buffers_are_refused)
        .refused(&["fd", "io_uring", "is an io_uring with restrictions and provided buffers, which is not carried"])
        .needs(has_io_uring_and_types).peer_cannot(WHY),
];

/// Operations of io_uring_register(2).
const FILES: u32 = 2;
const EVENTFD: u32 = 4;
const RESTRICTIONS: u32 = 11;
const ENABLE: u32 = 12;

/// Of a ring whose requests are taken by the kernel's thread.
#[track_caller]
pub(super) fn goes(ring: &mut Ring, count: u64) {
    for data in 0..count {
        ring.push(Request::nop(data + 1));
        ring.hand_over(1);
        assert_eq!(ring.reap(), Some((data + 1, 0)));
    }
}

fn pollers() -> usize {
    kernel_threads().iter().filter(|name| name.starts_with("iou-sqp")).count()
}

#[track_caller]
fn falls_asleep(ring: &Ring) {
    until("its thread sleeps", || ring.is_asleep());
}

/// A file that only root can open.
fn secret(t: &Trial) -> &'static CStr {
    let path = t.path("secret");
    fs::write(&path, "secret").expect("write");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    Box::leak(CString::new(path.to_str().expect("text")).expect("no zero").into_boxed_c_str())
}

/// Is the file opened? If not, why.
#[track_caller]
fn opens(ring: &mut Ring, path: &'static CStr, personality: u16, hand_over: fn(&Ring)) -> Result<(), i32> {
    ring.push(Request::open(path, personality, 5));
    hand_over(ring);
    match ring.reap() {
        Some((5, number)) if number >= 0 => Ok(()),
        Some((5, error)) => Err(-error),
        other => panic!("{other:?}"),
    }
}

const NOBODY: u32 = 65_534;

fn as_nobody<T>(work: impl FnOnce() -> T) -> T {
    seteuid(Uid::from_raw(NOBODY)).expect("seteuid");
    let result = work();
    seteuid(Uid::from_raw(0)).expect("seteuid");
    result
}

fn ring_with_a_thread_goes_on(t: &Trial) {
    let mut ring = Ring::polled(8, Poller { idle: 100, ..Poller::default() });
    goes(&mut ring, 1001);
    until("the name of its thread", || pollers() == 1);
    let file = File::create(t.path("file")).expect("create");
    t.checkpoint();
    assert_eq!(pollers(), 1);
    goes(&mut ring, 100);
    ring.push(Request::write(file.as_fd(), b"written", 7));
    ring.hand_over(1);
    assert_eq!(ring.reap(), Some((7, 7)));
    assert_eq!(fs::read(t.path("file")).expect("read"), b"written");
    falls_asleep(&ring);
    goes(&mut ring, 3);
}

/// By a thread that nobody has woken.
fn nothing_is_written(o: &mut Outside, moment: Moment) {
    // Later it may look by itself, as a new one does at first.
    if moment == Moment::Away && File::create_new(o.directory.join("away")).is_ok() {
        assert_eq!(fs::metadata(o.directory.join("file")).expect("stat").len(), 0);
    }
}

fn requests_that_wait_for_a_sleeping_thread_are_kept(t: &Trial) {
    let mut ring = Ring::polled(8, Poller { idle: 8, ..Poller::default() });
    goes(&mut ring, 5);
    ring.push(Request::nop(6));
    ring.hand_over(1);
    let file = File::create(t.path("file")).expect("create");
    falls_asleep(&ring);
    ring.push(Request::write(file.as_fd(), b"one ", 10));
    ring.push(Request::write(file.as_fd(), b"two", 11));
    ring.tell();
    t.checkpoint();
    // A completion that was not seen; the kernel takes what is in the queue when it is told, or by itself.
    assert_eq!(ring.reap(), Some((6, 0)));
    ring.hand_over(2);
    assert_eq!((ring.reap(), ring.reap(), ring.reap()), (Some((10, 4)), Some((11, 3)), None));
    assert_eq!(fs::read(t.path("file")).expect("read"), b"one two");
}

fn thread_is_as_it_was_asked_for(t: &Trial) {
    // For longer than a dump would wait.
    let mut restless = Ring::polled(8, Poller { idle: 600_000, cpu: Some(0), of: None });
    goes(&mut restless, 10);
    t.checkpoint();
    goes(&mut restless, 10);
    let tasks = fs::read_dir("/proc/self/task").expect("tasks").flatten();
    let named = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("iou-sqp"))
    };
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status")).expect("status");
    let statuses: Vec<String> = tasks.filter(named).map(status).collect();
    assert_eq!(statuses.len(), 1);
    assert!(statuses[0].contains("\nCpus_allowed_list:\t0\n"), "{}", statuses[0]);
    assert!(!restless.is_asleep());
}

fn rings_share_a_thread_as_before(t: &Trial) {
    let mut first = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    let of = Some(first.fd.as_raw_fd());
    let mut second = Ring::polled(16, Poller { idle: 40, cpu: None, of });
    let mut alone = Ring::polled(4, Poller { idle: 20, ..Poller::default() });
    for ring in [&mut first, &mut second, &mut alone] {
        goes(ring, 30);
    }
    assert_eq!(pollers(), 2);
    t.checkpoint();
    assert_eq!(pollers(), 2);
    for ring in [&mut first, &mut second, &mut alone] {
        goes(ring, 30);
    }
}

fn ring_with_a_thread_of_the_parent_serves_a_child(t: &Trial) {
    let mut ring = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    goes(&mut ring, 5);
    let child = fork(|| {
        t.mark("child");
        t.hold();
        goes(&mut ring, 10);
        assert_eq!(pollers(), 0);
    });
    t.await_mark("child");
    t.checkpoint();
    child.succeed();
    assert_eq!(pollers(), 1);
}

fn thread_keeps_the_rights_of_its_maker(t: &Trial) {
    let path = secret(t);
    let idle = Poller { idle: 20, ..Poller::default() };
    let mut weak = as_nobody(|| Ring::polled(8, idle));
    let child = fork(|| {
        let mut strong = Ring::polled(8, idle);
        nix::unistd::setgroups(&[7, 8, 9].map(nix::unistd::Gid::from_raw)).expect("setgroups");
        nix::unistd::setgid(nix::unistd::Gid::from_raw(NOBODY)).expect("setgid");
        t.mark("child");
        t.hold();
        nix::unistd::setuid(Uid::from_raw(NOBODY)).expect("setuid");
        assert!(File::open(t.path("secret")).is_err());
        assert_eq!(opens(&mut strong, path, 0, |ring| ring.hand_over(1)), Ok(()));
    });
    t.await_mark("child");
    t.checkpoint();
    assert!(File::open(t.path("secret")).is_ok());
    assert_eq!(opens(&mut weak, path, 0, |ring| ring.hand_over(1)), Err(libc::EACCES));
    child.succeed();
}

fn registered_things_serve_a_ring_with_a_thread(t: &Trial) {
    let mut ring = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    fs::write(t.path("file"), "12345678").expect("write");
    let file = File::open(t.path("file")).expect("open");
    let event = nix::sys::eventfd::EventFd::new().expect("eventfd");
    ring.register(FILES, &[file.as_raw_fd()]);
    let number = event.as_fd().as_raw_fd();
    ring.register(EVENTFD, &[number]);
    goes(&mut ring, 2);
    t.checkpoint();
    let bytes = Box::leak(vec![0_u8; 2].into_boxed_slice());
    ring.push(Request::read_registered(0, bytes.as_mut_ptr() as u64, 2, 7));
    ring.hand_over(1);
    assert_eq!(ring.reap(), Some((7, 2)));
    assert_eq!(bytes, b"12");
    // It is told after the completion is there.
    let mut told = 0;
    while told < 3 {
        told += event.read().expect("read");
    }
    assert_eq!(told, 3);
}

fn ring_with_a_thread_that_is_not_enabled_yet_goes_on(t: &Trial) {
    let mut ring = Ring::polled_but_disabled(8, Poller { idle: 20, ..Poller::default() });
    ring.push(Request::nop(9));
    ring.tell();
    t.checkpoint();
    assert_eq!(ring.reap(), None);
    ring.register::<u8>(ENABLE, &[]);
    ring.hand_over(1);
    assert_eq!(ring.reap(), Some((9, 0)));
    goes(&mut ring, 10);
}

fn thread_that_has_ended_is_refused(t: &Trial) {
    let child = fork(|| {
        let ring = Ring::polled(8, Poller::default());
        fs::write(t.path("number"), ring.fd.as_raw_fd().to_string()).expect("write");
        t.mark("child");
        t.await_mark("taken");
    });
    t.await_mark("child");
    let number = fs::read_to_string(t.path("number")).expect("read").parse().expect("a number");
    let _taken = child.take_descriptor(number);
    t.mark("taken");
    child.succeed();
    t.checkpoint();
}

fn personalities_keep_their_numbers_and_rights(t: &Trial) {
    let path = secret(t);
    let mut ring = Ring::new(8, 0);
    works(&mut ring, 3);
    let numbers = [(); 5].map(|()| ring.register_personality());
    let weak = as_nobody(|| ring.register_personality());
    for number in [numbers[0], numbers[2], numbers[3]] {
        ring.forget_personality(number);
    }
    let submit = |ring: &Ring| assert_eq!(ring.submit(1), 1);
    assert_eq!(opens(&mut ring, path, weak, submit), Err(libc::EACCES));
    t.checkpoint();
    assert_eq!(opens(&mut ring, path, weak, submit), Err(libc::EACCES));
    for number in [numbers[1], numbers[4]] {
        assert_eq!(opens(&mut ring, path, number, submit), Ok(()));
        assert_eq!(as_nobody(|| opens(&mut ring, path, number, submit)), Ok(()));
    }
    // Of a number that there is not the kernel says this.
    for number in [numbers[0], numbers[2], numbers[3]] {
        assert_eq!(opens(&mut ring, path, number, submit), Err(libc::EINVAL));
    }
    let next = ring.register_personality();
    assert!(next > weak, "{next}");
}

fn personalities_of_a_ring_with_a_thread_go_on(t: &Trial) {
    let path = secret(t);
    let mut ring = Ring::polled(8, Poller { idle: 20, ..Poller::default() });
    let weak = as_nobody(|| ring.register_personality());
    goes(&mut ring, 3);
    t.checkpoint();
    assert_eq!(opens(&mut ring, path, weak, |ring| ring.hand_over(1)), Err(libc::EACCES));
    assert_eq!(opens(&mut ring, path, 0, |ring| ring.hand_over(1)), Ok(()));
}

/// `struct io_uring_restriction`: what, which; reserved.
fn restriction(what: u64, which: u64) -> [u64; 2] {
    [what | which << 16, 0]
}

/// Allows reading and eventfds.
fn restrict(ring: &Ring) {
    const REGISTER: u64 = 0;
    const OPERATION: u64 = 1;
    const FLAGS_ALLOWED: u64 = 2;
    const READ: u64 = 22;
    let allowed = [(REGISTER, EVENTFD.into()), (OPERATION, READ), (FLAGS_ALLOWED, 1)];
    ring.register(RESTRICTIONS, &allowed.map(|(what, which)| restriction(what, which)));
}

/// Reads two bytes of a registered file, and is refused everything else.
#[track_caller]
fn is_restricted(ring: &mut Ring, submit: u32) {
    let bytes = Box::leak(vec![0_u8; 2].into_boxed_slice());
    ring.push(Request::read_registered(0, bytes.as_mut_ptr() as u64, 2, 7));
    assert_eq!(ring.submit(1), 1);
    assert_eq!(ring.reap(), Some((7, 2)));
    for data in 0..submit.into() {
        ring.push(Request::nop(data));
        assert_eq!(ring.submit(1), 1);
        assert_eq!(ring.reap(), Some((data, -libc::EACCES)));
    }
    let number = ring.fd.as_raw_fd();
    let refused = ring.try_register(FILES, &[number]).expect_err("it is restricted");
    assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
}

fn restrictions_stay_in_force(t: &Trial) {
    let mut rings = [R_DISABLED, R_DISABLED | SUBMIT_ALL].map(|flags| Ring::new(8, flags));
    fs::write(t.path("file"), "0123456789".repeat(10)).expect("write");
    let files = [0, 1].map(|_| File::open(t.path("file")).expect("open"));
    let event = nix::sys::eventfd::EventFd::new().expect("eventfd");
    for (ring, file) in rings.iter_mut().zip(&files) {
        ring.register(FILES, &[file.as_raw_fd()]);
        restrict(ring);
        ring.register::<u8>(ENABLE, &[]);
        is_restricted(ring, 9);
        let number = event.as_fd().as_raw_fd();
        ring.register(EVENTFD, &[number]);
    }
    t.checkpoint();
    for ring in &mut rings {
        is_restricted(ring, 19);
    }
    assert_eq!(event.read(), Ok(40));
}

fn restrictions_of_a_ring_that_is_not_enabled_yet_go_on(t: &Trial) {
    let mut ring = Ring::new(8, R_DISABLED);
    restrict(&ring);
    fs::write(t.path("file"), "0123456789").expect("write");
    let file = File::open(t.path("file")).expect("open");
    t.checkpoint();
    ring.register(FILES, &[file.as_raw_fd()]);
    ring.register::<u8>(ENABLE, &[]);
    is_restricted(&mut ring, 3);
}

fn restrictions_and_provided_buffers_are_refused(t: &Trial) {
    let ring = Ring::new(8, R_DISABLED);
    let _buffers = crate::sys::uring::Buffers::register(&ring, 3, 4, false, false);
    restrict(&ring);
    t.checkpoint();
    ring.register::<u8>(ENABLE, &[]);
}
