//! pidfds, of living and of dead processes.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::case;
use crate::case::{Case, Trial};
use crate::sys::process::{Child, fork};

pub const CASES: &[Case] = &[
    case!(pidfds_of_living_processes_go_on).exchange(),
    case!(pidfd_of_a_zombie_and_of_a_dead_process_survive),
    case!(pidfd_of_its_own_process_and_its_flags_are_kept).peer_cannot("it refuses flags"),
    case!(pidfd_of_a_process_outside_is_refused).refused(&["fd", "process 1", "outside"]),
    case!(pidfds_in_queues_arrive).peer_cannot("it loses them"),
    case!(pidfd_of_a_thread_goes_on).peer_cannot("it refuses this"),
    case!(pidfd_of_a_dead_thread_survives).peer_cannot("it refuses this"),
    case!(descriptor_taken_from_another_process_stays_shared),
];

fn open(pid: i32, flags: u32) -> OwnedFd {
    // SAFETY: takes integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    let fd = Errno::result(fd).expect("pidfd_open");
    // SAFETY: the kernel has just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).expect("a descriptor")) }
}

fn signal(pidfd: &OwnedFd, signal: i32) -> Result<(), Errno> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: takes integers and a null pointer.
    let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    Errno::result(sent).map(drop)
}

fn has_ended(pidfd: &OwnedFd) -> bool {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).expect("poll") == 1
}

fn waiting(t: &Trial) -> Child {
    let child = fork(|| {
        t.mark("child");
        loop {
            crate::sys::nap();
        }
    });
    t.await_mark("child");
    child
}

fn pidfds_of_living_processes_go_on(t: &Trial) {
    let child = waiting(t);
    let pidfd = open(child.pid.as_raw(), 0);
    let own = open(Pid::this().as_raw(), 0);
    let same = pidfd.try_clone().expect("dup");
    t.checkpoint();
    assert!(!has_ended(&pidfd) && !has_ended(&own));
    assert_eq!(signal(&own, 0), Ok(()));
    assert_eq!(signal(&same, libc::SIGKILL), Ok(()));
    crate::case::until("the end of the child", || has_ended(&pidfd));
    child.wait();
    assert_eq!(signal(&pidfd, 0), Err(Errno::ESRCH));
}

fn pidfd_of_a_zombie_and_of_a_dead_process_survive(t: &Trial) {
    let zombie = fork(|| {});
    let zombie_fd = open(zombie.pid.as_raw(), 0);
    let dead = fork(|| {});
    let dead_fd = open(dead.pid.as_raw(), 0);
    dead.succeed();
    crate::case::until("the zombie", || has_ended(&zombie_fd));
    t.checkpoint();
    assert!(has_ended(&dead_fd) && has_ended(&zombie_fd));
    assert_eq!(signal(&dead_fd, 0), Err(Errno::ESRCH));
    let id = nix::sys::wait::Id::PIDFd(std::os::fd::AsFd::as_fd(&zombie_fd));
    let status = nix::sys::wait::waitid(id, nix::sys::wait::WaitPidFlag::WEXITED);
    assert_eq!(status, Ok(nix::sys::wait::WaitStatus::Exited(zombie.pid, 0)));
}

fn pidfd_of_its_own_process_and_its_flags_are_kept(t: &Trial) {
    let pidfd = open(Pid::this().as_raw(), libc::PIDFD_NONBLOCK);
    t.checkpoint();
    let flags = nix::fcntl::fcntl(&pidfd, nix::fcntl::FcntlArg::F_GETFL).expect("F_GETFL");
    assert_eq!(flags & libc::O_NONBLOCK, libc::O_NONBLOCK);
    assert_eq!(signal(&pidfd, 0), Ok(()));
}

fn pidfd_of_a_process_outside_is_refused(t: &Trial) {
    let pidfd = open(1, 0);
    t.checkpoint();
    assert_eq!(signal(&pidfd, 0), Ok(()));
}

fn pidfds_in_queues_arrive(t: &Trial) {
    use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
    let (a, b) = std::os::unix::net::UnixDatagram::pair().expect("pair");
    let child = waiting(t);
    let pidfds = [open(Pid::this().as_raw(), 0), open(child.pid.as_raw(), 0)];
    // One is open besides, the other is only in the queue.
    for pidfd in &pidfds {
        let numbers = [pidfd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&numbers)];
        let parts = [std::io::IoSlice::new(b"x")];
        sendmsg::<()>(a.as_raw_fd(), &parts, &control, MsgFlags::empty(), None).expect("sendmsg");
    }
    let [kept, flying] = pidfds;
    drop(flying);
    t.checkpoint();
    let receive = || {
        let mut bytes = [0; 4];
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let mut room = nix::cmsg_space!([i32; 4]);
        let got = recvmsg::<()>(b.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::empty()).expect("recvmsg");
        let first = got.cmsgs().expect("whole messages").next();
        let Some(ControlMessageOwned::ScmRights(numbers)) = first else { panic!("no descriptor came") };
        // SAFETY: the kernel has just made this descriptor for the caller.
        unsafe { OwnedFd::from_raw_fd(numbers[0]) }
    };
    let (own, of_child) = (receive(), receive());
    assert_eq!((signal(&own, 0), signal(&kept, 0)), (Ok(()), Ok(())));
    assert_eq!(signal(&of_child, libc::SIGKILL), Ok(()));
    crate::case::until("the end of the child", || has_ended(&of_child));
    child.wait();
}

/// A thread that ends when it is told to, and its id.
fn thread() -> (std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>, i32) {
    let (end, told) = std::sync::mpsc::channel();
    let (say, id) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        say.send(nix::unistd::gettid().as_raw()).expect("send");
        told.recv().expect("the end");
    });
    let id = id.recv().expect("an id");
    (end, thread, id)
}

fn pidfd_of_a_thread_goes_on(t: &Trial) {
    let (end, thread, id) = thread();
    let pidfd = open(id, libc::PIDFD_THREAD);
    let leader = open(Pid::this().as_raw(), libc::PIDFD_THREAD);
    t.checkpoint();
    assert!(!has_ended(&pidfd) && !has_ended(&leader));
    end.send(()).expect("send");
    thread.join().expect("join");
    crate::case::until("the end of the thread", || has_ended(&pidfd));
    assert_eq!(signal(&pidfd, 0), Err(Errno::ESRCH));
    assert_eq!(signal(&leader, 0), Ok(()));
}

fn pidfd_of_a_dead_thread_survives(t: &Trial) {
    let (end, thread, id) = thread();
    let pidfd = open(id, libc::PIDFD_THREAD);
    end.send(()).expect("send");
    thread.join().expect("join");
    crate::case::until("the end of the thread", || has_ended(&pidfd));
    let flags = || nix::fcntl::fcntl(&pidfd, nix::fcntl::FcntlArg::F_GETFL).expect("F_GETFL");
    let before = flags();
    t.checkpoint();
    assert_eq!(flags(), before);
    assert!(has_ended(&pidfd));
    assert_eq!(signal(&pidfd, 0), Err(Errno::ESRCH));
}

fn descriptor_taken_from_another_process_stays_shared(t: &Trial) {
    use std::io::{Seek, SeekFrom, Write};
    let child = fork(|| {
        let mut file = std::fs::File::options().read(true).write(true).create_new(true).open(t.path("file"));
        let file = file.as_mut().expect("create");
        file.write_all(b"0123456789").expect("write");
        std::fs::write(t.path("number"), file.as_raw_fd().to_string()).expect("write");
        t.mark("child");
        t.hold();
        t.await_mark("moved");
        assert_eq!(file.stream_position().expect("position"), 3);
    });
    t.await_mark("child");
    let number: i32 = std::fs::read_to_string(t.path("number")).expect("read").parse().expect("a number");
    let mut file = std::fs::File::from(child.take_descriptor(number));
    t.checkpoint();
    assert_eq!(file.stream_position().expect("position"), 10);
    file.seek(SeekFrom::Start(3)).expect("seek");
    t.mark("moved");
    child.succeed();
}
