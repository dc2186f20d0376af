//! UNIX sockets tell who made them, who connected, and who sent.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use nix::sys::socket::{
    Backlog, MsgFlags, SockType, UnixAddr, bind, connect,
    getsockopt, listen, recv, send, sockopt,
};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::process::fork;

use super::unix::{LOST, accept_one, another, arrives, connection, is_empty, make, named, passes};
use super::unix_queues::{give, pair, take};

pub const CASES: &[Case] = &[
    case!(pair_tells_who_made_it).peer_cannot(LOST),
    case!(pair_of_a_dead_process_tells_who_made_it).peer_cannot(LOST),
    case!(pair_of_a_process_outside_goes_on).outside(giver).peer_cannot(LOST),
    case!(connection_tells_who_connected_and_who_listened).peer_cannot(LOST),
    case!(connection_whose_listener_is_closed_tells_who_was_there).peer_cannot(LOST),
    case!(connection_that_waits_tells_who_connected).peer_cannot(LOST),
    case!(queued_messages_tell_who_sent_them).peer_cannot("it refuses this"),
    case!(queued_bytes_of_several_senders_stay_apart).peer_cannot("it refuses this"),
];

/// Pid, uid, gid and groups at the other end.
fn peer(fd: &OwnedFd) -> (i32, u32, u32, Vec<u32>) {
    let cred = getsockopt(fd, sockopt::PeerCredentials).expect("SO_PEERCRED");
    let mut groups = [0u32; 64];
    let mut length = size_of_val(&groups) as u32;
    // SAFETY: the kernel writes at most `length` bytes to the local.
    let got = unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS, groups.as_mut_ptr().cast(), &mut length)
    };
    assert_eq!(got, 0, "SO_PEERGROUPS");
    (cred.pid(), cred.uid(), cred.gid(), groups[..length as usize / 4].to_vec())
}

const OTHER: (u32, u32) = (12, 34);

/// Another user, with groups.
fn become_another(t: &Trial) {
    std::fs::set_permissions(t.directory(), PermissionsExt::from_mode(0o777)).expect("chmod");
    nix::unistd::setgroups(&[5.into(), 6.into()]).expect("setgroups");
    nix::unistd::setgid(OTHER.1.into()).expect("setgid");
    nix::unistd::setuid(OTHER.0.into()).expect("setuid");
}

fn pair_tells_who_made_it(t: &Trial) {
    let (one, other) = UnixStream::pair().expect("pair");
    let (third, fourth) = UnixDatagram::pair().expect("pair");
    let child = fork(|| {
        let ends = UnixStream::pair().expect("pair");
        t.mark("child");
        let before = peer(&ends.0.into());
        let other = OwnedFd::from(ends.1);
        t.hold();
        assert_eq!(peer(&other), before);
        assert_eq!(before.0, std::process::id() as i32);
    });
    t.await_mark("child");
    let all: [OwnedFd; 4] = [one.into(), other.into(), third.into(), fourth.into()];
    let before = all.each_ref().map(peer);
    t.checkpoint();
    assert_eq!(all.each_ref().map(peer), before);
    assert_eq!((before[0].0, before[0].1), (std::process::id() as i32, 0));
    passes(&all[0], &all[1], "still a pair");
    child.succeed();
}

fn pair_of_a_dead_process_tells_who_made_it(t: &Trial) {
    let (to, from) = pair(SockType::Datagram);
    let child = fork(|| {
        become_another(t);
        let (one, other) = pair(SockType::Stream);
        give(&to, b"x", &[&one, &other]);
    });
    child.succeed();
    let (_, ends) = take(&from, 1);
    let before = [peer(&ends[0]), peer(&ends[1])];
    t.checkpoint();
    assert_eq!([peer(&ends[0]), peer(&ends[1])], before);
    assert_eq!(before[0], (child.pid.as_raw(), OTHER.0, OTHER.1, vec![5, 6]));
    passes(&ends[0], &ends[1], "still a pair");
}

/// Gives away a pair that it has made itself.
fn giver(outside: &mut Outside, moment: Moment) {
    if moment == Moment::Begin {
        let listener = UnixListener::bind(outside.directory.join("giver")).expect("bind");
        std::thread::spawn(move || {
            let (one, other) = pair(SockType::SeqPacket);
            give(&listener.accept().expect("accept").0.into(), b"x", &[&one, &other]);
        });
    }
}

fn pair_of_a_process_outside_goes_on(t: &Trial) {
    let client = UnixStream::connect(t.path("giver")).expect("connect");
    let mut ends = Vec::new();
    crate::case::until("the gift", || {
        let mut byte = [0];
        if recv(client.as_raw_fd(), &mut byte, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).is_err() {
            return false;
        }
        ends = take(&client.as_fd().try_clone_to_owned().expect("dup"), 1).1;
        true
    });
    drop(client);
    std::fs::remove_file(t.path("giver")).expect("unlink");
    assert_eq!(peer(&ends[0]), (1, 0, 0, peer(&ends[0]).3));
    t.checkpoint();
    // That one still has its pid, so another stands for it.
    assert_eq!((peer(&ends[1]).1, peer(&ends[1]).2), (0, 0));
    passes(&ends[0], &ends[1], "still a pair");
    passes(&ends[1], &ends[0], "in both directions");
}

fn connection_tells_who_connected_and_who_listened(t: &Trial) {
    let name = named(&t.path("server"));
    let listener = make(SockType::Stream);
    bind(listener.as_raw_fd(), &name).expect("bind");
    std::fs::set_permissions(t.path("server"), PermissionsExt::from_mode(0o777)).expect("chmod");
    listen(&listener, Backlog::new(7).expect("small")).expect("listen");
    let child = fork(|| {
        become_another(t);
        let client = make(SockType::Stream);
        connect(client.as_raw_fd(), &name).expect("connect");
        let before = peer(&client);
        t.mark("child");
        t.hold();
        assert_eq!(peer(&client), before);
        arrives(&client, "hello");
    });
    let accepted = accept_one(&listener);
    let (own, accepted_own) = another(SockType::Stream, &listener, &name);
    t.await_mark("child");
    // Whoever listens again is told of from then on.
    let again = fork(|| {
        become_another(t);
        listen(&listener, Backlog::new(7).expect("small")).expect("listen");
    });
    again.succeed();
    send(accepted.as_raw_fd(), b"hello", MsgFlags::empty()).expect("send");
    let look = || [&listener, &accepted, &own, &accepted_own].map(peer);
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
    assert_eq!(before[0], (again.pid.as_raw(), OTHER.0, OTHER.1, vec![5, 6]));
    assert_eq!(before[1], (child.pid.as_raw(), OTHER.0, OTHER.1, vec![5, 6]));
    assert_eq!(before[2].0, std::process::id() as i32);
    child.succeed();
}

fn connection_whose_listener_is_closed_tells_who_was_there(t: &Trial) {
    let (listener, client, accepted) = connection(SockType::SeqPacket, &named(&t.path("server")));
    drop(listener);
    let before = [peer(&client), peer(&accepted)];
    t.checkpoint();
    assert_eq!([peer(&client), peer(&accepted)], before);
    passes(&client, &accepted, "one");
}

fn connection_that_waits_tells_who_connected(t: &Trial) {
    let name = UnixAddr::new_abstract(b"crtools\0test").expect("short");
    let listener = make(SockType::Stream);
    bind(listener.as_raw_fd(), &name).expect("bind");
    listen(&listener, Backlog::new(7).expect("small")).expect("listen");
    let child = fork(|| {
        become_another(t);
        let client = make(SockType::Stream);
        connect(client.as_raw_fd(), &name).expect("connect");
        t.mark("child");
        t.hold();
        assert_eq!(peer(&client).0, std::os::unix::process::parent_id() as i32);
        t.await_mark("accepted");
    });
    t.await_mark("child");
    t.checkpoint();
    let accepted = accept_one(&listener);
    assert_eq!(peer(&accepted), (child.pid.as_raw(), OTHER.0, OTHER.1, vec![5, 6]));
    t.mark("accepted");
    child.succeed();
}

/// A message with its sender.
#[track_caller]
fn arrives_from(fd: &OwnedFd, text: &str, sender: Option<(i32, u32, u32)>) {
    use nix::sys::socket::{ControlMessageOwned, UnixCredentials, recvmsg};
    let mut bytes = [0; 64];
    let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(UnixCredentials);
    let message = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT).expect("recvmsg");
    let told = message.cmsgs().expect("whole").find_map(|control| match control {
        ControlMessageOwned::ScmCredentials(cred) => Some((cred.pid(), cred.uid(), cred.gid())),
        _ => None,
    });
    let count = message.bytes;
    assert_eq!(String::from_utf8_lossy(&bytes[..count]), text);
    assert_eq!(told.filter(|told| told.0 != 0), sender);
}

fn queued_messages_tell_who_sent_them(t: &Trial) {
    let server = make(SockType::Datagram);
    bind(server.as_raw_fd(), &named(&t.path("server"))).expect("bind");
    send_to_server(t, b"before anybody asks");
    nix::sys::socket::setsockopt(&server, sockopt::PassCred, &true).expect("SO_PASSCRED");
    let dead = fork(|| send_to_server(t, b"of a dead process"));
    dead.succeed();
    let alive = fork(|| {
        std::fs::set_permissions(t.path("server"), PermissionsExt::from_mode(0o777)).expect("chmod");
        become_another(t);
        send_to_server(t, b"of another user");
        t.mark("sent");
        t.hold();
    });
    t.await_mark("sent");
    send_to_server(t, b"of its own");
    t.checkpoint();
    arrives_from(&server, "before anybody asks", None);
    arrives_from(&server, "of a dead process", Some((dead.pid.as_raw(), 0, 0)));
    arrives_from(&server, "of another user", Some((alive.pid.as_raw(), OTHER.0, OTHER.1)));
    arrives_from(&server, "of its own", Some((std::process::id() as i32, 0, 0)));
    alive.succeed();
}

fn send_to_server(t: &Trial, message: &[u8]) {
    let client = UnixDatagram::unbound().expect("socket");
    client.send_to(message, t.path("server")).expect("send");
}

fn queued_bytes_of_several_senders_stay_apart(t: &Trial) {
    let (one, other) = UnixStream::pair().expect("pair");
    let (one, other) = (OwnedFd::from(one), OwnedFd::from(other));
    nix::sys::socket::setsockopt(&other, sockopt::PassCred, &true).expect("SO_PASSCRED");
    let child = fork(|| {
        become_another(t);
        send(one.as_raw_fd(), b"first", MsgFlags::empty()).expect("send");
    });
    child.succeed();
    send(one.as_raw_fd(), b"second", MsgFlags::empty()).expect("send");
    t.checkpoint();
    arrives_from(&other, "first", Some((child.pid.as_raw(), OTHER.0, OTHER.1)));
    arrives_from(&other, "second", Some((std::process::id() as i32, 0, 0)));
    is_empty(&other);
}
