//! What lies in the queues of UNIX sockets: descriptors, and the sockets themselves.

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send,
};

use crate::case;
use crate::case::{Case, Trial};

use super::unix::{LOST, passes};

pub const CASES: &[Case] = &[
    case!(pipe_end_in_flight_is_received_afterwards).exchange(),
    case!(both_ends_of_a_pipe_in_flight_survive).exchange(),
    case!(two_descriptors_in_one_datagram_survive).exchange(),
    case!(two_descriptors_in_one_packet_survive),
    case!(messages_with_a_descriptor_each_stay_in_order),
    case!(descriptors_come_with_their_bytes_of_a_stream).peer_cannot(LOST),
    case!(descriptor_of_a_closed_sender_is_received_afterwards),
    case!(two_control_messages_come_as_one),
    case!(descriptor_in_flight_shares_its_position),
    case!(unlinked_file_in_flight_survives),
    case!(socket_in_its_own_queue_survives).peer_cannot("it waits without end"),
    case!(socket_in_flight_with_a_queue_of_its_own_survives).peer_cannot(LOST),
    case!(userfaultfd_in_flight_is_refused).refused(&["userfaultfd", "in the queue"])
        .needs(crate::sys::strange::has_userfaultfd),
];

#[track_caller]
pub fn give(to: &OwnedFd, message: &[u8], rights: &[&OwnedFd]) {
    use nix::sys::socket::{ControlMessage, sendmsg};
    let numbers: Vec<i32> = rights.iter().map(|fd| fd.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&numbers)];
    let parts = [std::io::IoSlice::new(message)];
    assert_eq!(sendmsg::<()>(to.as_raw_fd(), &parts, &control, MsgFlags::empty(), None), Ok(message.len()));
}

/// What comes next, up to so many bytes, and the descriptors with it.
#[track_caller]
pub fn take(from: &OwnedFd, room: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    use nix::sys::socket::{ControlMessageOwned, recvmsg};
    let mut bytes = vec![0; room];
    let mut control = nix::cmsg_space!([i32; 8]);
    let (count, rights) = {
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let got = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut control), flags).expect("recvmsg");
        let mut rights = Vec::new();
        for message in got.cmsgs().expect("control messages") {
            let ControlMessageOwned::ScmRights(some) = message else { panic!("{message:?} came") };
            rights.extend(some);
        }
        (got.bytes, rights)
    };
    bytes.truncate(count);
    // SAFETY: recvmsg has just made these descriptors for the caller.
    (bytes, rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect())
}

pub fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    nix::sys::socket::socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("socketpair")
}

#[track_caller]
fn pipe_works(from: &OwnedFd, to: &OwnedFd, message: &str) {
    assert_eq!(nix::unistd::write(to, message.as_bytes()), Ok(message.len()));
    let mut bytes = [0; 50];
    let count = nix::unistd::read(from, &mut bytes).expect("read");
    assert_eq!(&bytes[..count], message.as_bytes());
}

fn pipe_end_in_flight_is_received_afterwards(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    give(&a, b"x", &[&to]);
    drop((to, a));
    t.checkpoint();
    let (bytes, rights) = take(&b, 10);
    assert_eq!((&*bytes, rights.len()), (&b"x"[..], 1));
    pipe_works(&from, &rights[0], "through the pipe");
}

fn both_ends_of_a_pipe_in_flight_survive(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    assert_eq!(nix::unistd::write(&to, b"queued"), Ok(6));
    give(&a, b"x", &[&from, &to]);
    drop((from, to));
    t.checkpoint();
    let (_, rights) = take(&b, 10);
    let mut bytes = [0; 6];
    assert_eq!(nix::unistd::read(&rights[0], &mut bytes), Ok(6));
    assert_eq!(&bytes, b"queued");
    pipe_works(&rights[0], &rights[1], "again");
}

fn two_descriptors_in_one_message_survive(t: &Trial, kind: SockType) {
    let (a, b) = pair(kind);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    give(&a, b"message", &[&from, &to]);
    t.checkpoint();
    let (bytes, rights) = take(&b, 20);
    assert_eq!((&*bytes, rights.len()), (&b"message"[..], 2));
    pipe_works(&rights[0], &to, "one");
    pipe_works(&from, &rights[1], "two");
}

fn two_descriptors_in_one_datagram_survive(t: &Trial) {
    two_descriptors_in_one_message_survive(t, SockType::Datagram);
}

fn two_descriptors_in_one_packet_survive(t: &Trial) {
    two_descriptors_in_one_message_survive(t, SockType::SeqPacket);
}

fn messages_with_a_descriptor_each_stay_in_order(t: &Trial) {
    let (a, b) = pair(SockType::Datagram);
    let pipes = [(); 3].map(|()| nix::unistd::pipe().expect("pipe"));
    for (n, (_, to)) in pipes.iter().enumerate() {
        give(&a, &[n as u8], &[to]);
    }
    send(a.as_raw_fd(), b"none", MsgFlags::empty()).expect("send");
    t.checkpoint();
    for (n, (from, _)) in pipes.iter().enumerate() {
        let (bytes, rights) = take(&b, 20);
        assert_eq!(bytes, [n as u8]);
        pipe_works(from, &rights[0], "in order");
    }
    let (bytes, rights) = take(&b, 20);
    assert_eq!((&*bytes, rights.len()), (&b"none"[..], 0));
}

fn descriptors_come_with_their_bytes_of_a_stream(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    send(a.as_raw_fd(), b"before", MsgFlags::empty()).expect("send");
    give(&a, b"first", &[&to]);
    give(&a, b"second", &[&from]);
    send(a.as_raw_fd(), b"after", MsgFlags::empty()).expect("send");
    t.checkpoint();
    let (bytes, rights) = take(&b, 6);
    assert_eq!((&*bytes, rights.len()), (&b"before"[..], 0));
    let (bytes, first) = take(&b, 100);
    assert_eq!((&*bytes, first.len()), (&b"first"[..], 1));
    let (bytes, second) = take(&b, 100);
    assert_eq!((&*bytes, second.len()), (&b"second"[..], 1));
    pipe_works(&second[0], &first[0], "both ends");
    let (bytes, rights) = take(&b, 100);
    assert_eq!((&*bytes, rights.len()), (&b"after"[..], 0));
}

fn descriptor_in_flight_shares_its_position(t: &Trial) {
    use std::io::{Seek, SeekFrom};
    let (a, b) = pair(SockType::Datagram);
    let mut file = std::fs::File::create(t.path("file")).expect("create");
    file.write_all(b"0123456789").expect("write");
    let duplicate = OwnedFd::from(file.try_clone().expect("dup"));
    give(&a, b"x", &[&duplicate]);
    drop(duplicate);
    t.checkpoint();
    let (_, mut rights) = take(&b, 10);
    let mut same = std::fs::File::from(rights.remove(0));
    assert_eq!(same.stream_position().expect("tell"), 10);
    file.seek(SeekFrom::Start(3)).expect("seek");
    assert_eq!(same.stream_position().expect("tell"), 3);
}

fn unlinked_file_in_flight_survives(t: &Trial) {
    use std::os::unix::fs::FileExt;
    let (a, b) = pair(SockType::Stream);
    let file = std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(t.path("file"));
    let file = file.expect("create");
    file.write_all_at(b"nobody has it", 0).expect("write");
    std::fs::remove_file(t.path("file")).expect("unlink");
    give(&a, b"x", &[&file.into()]);
    t.checkpoint();
    let (_, mut rights) = take(&b, 10);
    let mut bytes = [0; 13];
    std::fs::File::from(rights.remove(0)).read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"nobody has it");
}

fn socket_in_its_own_queue_survives(t: &Trial) {
    let (a, b) = pair(SockType::Datagram);
    give(&a, b"itself", &[&b]);
    give(&a, b"the other", &[&a]);
    t.checkpoint();
    let (bytes, own) = take(&b, 20);
    assert_eq!(bytes, b"itself");
    let (_, other) = take(&own[0], 20);
    passes(&other[0], &b, "through both");
    passes(&b, &a, "and back");
}

fn socket_in_flight_with_a_queue_of_its_own_survives(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    let (inner, far) = pair(SockType::SeqPacket);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    give(&far, b"deep", &[&to]);
    give(&a, b"carrier", &[&inner]);
    drop((inner, to));
    t.checkpoint();
    let (_, inner) = take(&b, 20);
    let (bytes, to) = take(&inner[0], 20);
    assert_eq!(bytes, b"deep");
    pipe_works(&from, &to[0], "from the deep");
    passes(&inner[0], &far, "answer");
}

fn userfaultfd_in_flight_is_refused(t: &Trial) {
    let (a, b) = pair(SockType::Datagram);
    give(&a, b"x", &[&crate::sys::strange::userfaultfd().expect("userfaultfd")]);
    t.checkpoint();
    assert_eq!(take(&b, 10).1.len(), 1);
}

/// The descriptor that comes with the next message.
#[track_caller]
pub fn receive_one(from: &OwnedFd) -> OwnedFd {
    crate::case::until("the descriptor", || {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        recv(from.as_raw_fd(), &mut [0; 1], flags).is_ok()
    });
    let (_, mut rights) = take(from, 10);
    assert_eq!(rights.len(), 1);
    rights.remove(0)
}

fn descriptor_of_a_closed_sender_is_received_afterwards(t: &Trial) {
    let ends = [SockType::Stream, SockType::SeqPacket].map(|kind| {
        let (a, b) = pair(kind);
        let (from, to) = nix::unistd::pipe().expect("pipe");
        give(&a, b"m", &[&to]);
        (b, from)
    });
    t.checkpoint();
    for (socket, from) in ends {
        let (bytes, rights) = take(&socket, 10);
        assert_eq!((&bytes[..], rights.len()), (&b"m"[..], 1));
        pipe_works(&from, &rights[0], "through it");
        // Nobody is at the other end.
        assert_eq!(take(&socket, 10).0, b"");
    }
}

fn two_control_messages_come_as_one(t: &Trial) {
    use nix::sys::socket::{ControlMessage, sendmsg};
    let (a, b) = pair(SockType::Stream);
    let (from, to) = nix::unistd::pipe().expect("pipe");
    let numbers = [[from.as_raw_fd()], [to.as_raw_fd()]];
    let control = [ControlMessage::ScmRights(&numbers[0]), ControlMessage::ScmRights(&numbers[1])];
    let parts = [std::io::IoSlice::new(b"both")];
    assert_eq!(sendmsg::<()>(a.as_raw_fd(), &parts, &control, MsgFlags::empty(), None), Ok(4));
    drop((from, to));
    t.checkpoint();
    let (bytes, rights) = take(&b, 10);
    assert_eq!((&bytes[..], rights.len()), (&b"both"[..], 2));
    pipe_works(&rights[0], &rights[1], "through them");
}
