//! UNIX sockets with names, connections that wait, and servers outside of the tree.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, connect, getpeername, getsockname,
    getsockopt, listen, recv, send, socket, socketpair, sockopt,
};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::process::fork;
use super::unix_queues::receive_one;

const EXT: &[&str] = &["--ext-unix-sk"];
pub const LOST: &str = "it does not keep this";

pub const CASES: &[Case] = &[
    case!(stream_server_with_a_connection_goes_on).exchange(),
    case!(seqpacket_server_with_a_connection_goes_on).exchange(),
    case!(names_of_a_connection_are_kept).peer_cannot(LOST),
    case!(datagram_server_and_its_clients_go_on).exchange(),
    case!(abstract_server_with_a_connection_goes_on).exchange(),
    case!(socket_bound_by_a_relative_path_survives).exchange(),
    case!(socket_bound_by_a_path_that_goes_up_survives).peer_cannot("it refuses this"),
    case!(socket_file_keeps_mode_and_owner).exchange(),
    case!(unlinked_listener_survives).exchange(),
    case!(listener_in_a_removed_folder_survives),
    case!(listener_whose_name_another_one_took_survives).peer_cannot(LOST),
    case!(connection_whose_listener_is_closed_survives).peer_cannot(LOST),
    case!(connection_of_a_bound_client_keeps_both_names).peer_cannot(LOST),
    case!(connection_not_yet_accepted_is_accepted_afterwards).exchange(),
    case!(connection_not_yet_accepted_with_data_is_refused).refused(&["not accepted", "data"]),
    case!(connection_not_yet_accepted_of_a_closed_client_is_refused).refused(&["not accepted", "closed"]),
    case!(connections_made_all_the_time_survive).restless().peer_cannot("it refuses data in those not accepted"),
    case!(queued_datagrams_keep_their_senders).peer_cannot(LOST),
    case!(bound_and_unbound_sockets_survive).exchange(),
    case!(datagram_socket_connected_to_itself_survives).peer_cannot(LOST),
    case!(client_of_a_server_outside_goes_on).options(EXT).outside(server).exchange(),
    case!(client_of_a_restarted_server_goes_on).options(EXT).outside(restarted_server),
    case!(client_of_an_abstract_server_outside_goes_on).options(EXT).outside(abstract_server),
    case!(client_of_a_server_with_a_relative_path_goes_on).options(EXT).outside(relative_server)
        .peer_cannot("it looks for the server's path in its own folder"),
    case!(clients_of_one_server_outside_go_on).options(EXT).outside(server_of_clients),
    case!(client_with_a_name_keeps_what_it_has_not_read).options(EXT).outside(answering_server)
        .peer_cannot("messages from outside are lost"),
    case!(server_with_clients_outside_goes_on).outside(clients).peer_cannot("it refuses this"),
    case!(sender_without_a_connection_goes_on).outside(server),
    case!(only_named_servers_are_allowed).outside(server_by_inode)
        .peer_cannot("it wants inodes of other sockets"),
    case!(other_servers_are_not_allowed).options(&["--ext-unix-sk=1"]).outside(server)
        .refused(&["fd", "/server", "--ext-unix-sk", "outside"]),
    case!(server_outside_without_the_option_is_refused).outside(server)
        .refused(&["fd", "/server", "--ext-unix-sk", "process 1 "]),
    case!(stream_server_outside_is_refused).options(EXT).outside(stream_server)
        .refused(&["fd", "process 1 ", "--external unix[", "--inherit-fd"]),
    case!(seqpacket_server_outside_is_refused).options(EXT).outside(seqpacket_server)
        .refused(&["fd", "process 1 ", "--external unix["]),
    case!(server_outside_without_a_name_is_refused).options(EXT).outside(nameless_server)
        .refused(&["fd", "no name"]),
    case!(missing_server_is_refused_at_the_restore).options(EXT).outside(missing_server)
        .restore_refused(&["there is no", "/server"]),
    case!(server_that_is_no_socket_is_refused_at_the_restore).options(EXT).outside(server_that_is_no_socket)
        .restore_refused(&["/server", "is no socket"]),
    case!(dead_server_is_refused_at_the_restore).options(EXT).outside(dead_server)
        .restore_refused(&["nobody serves", "/server"]),
    case!(server_of_another_type_is_refused_at_the_restore).options(EXT).outside(server_of_another_type)
        .restore_refused(&["/server", "is no datagram socket"]),
    case!(packet_connection_is_passed_in).outside(packet_connection_passed_in)
        .peer_cannot("it knows the option for datagram sockets alone"),
    case!(connection_is_passed_in).outside(connection_passed_in)
        .peer_cannot("it knows the option for datagram sockets alone"),
];

/// A small conversation in both directions.
#[track_caller]
fn talk(mut one: impl Read + Write, mut other: impl Read + Write) {
    one.write_all(b"there").expect("write");
    let mut bytes = [0; 5];
    other.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"there");
    other.write_all(b"back!").expect("write");
    one.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"back!");
}

pub fn make(kind: SockType) -> OwnedFd {
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).expect("socket")
}

pub fn named(path: &Path) -> UnixAddr {
    UnixAddr::new(path).expect("a short path")
}

/// Binds, listens, connects, accepts: listener, client, accepted.
pub fn connection(kind: SockType, name: &UnixAddr) -> (OwnedFd, OwnedFd, OwnedFd) {
    let listener = make(kind);
    bind(listener.as_raw_fd(), name).expect("bind");
    listen(&listener, Backlog::new(7).expect("small")).expect("listen");
    let (client, accepted) = another(kind, &listener, name);
    (listener, client, accepted)
}

pub fn another(kind: SockType, listener: &OwnedFd, name: &UnixAddr) -> (OwnedFd, OwnedFd) {
    let client = make(kind);
    connect(client.as_raw_fd(), name).expect("connect");
    (client, accept_one(listener))
}

pub fn accept_one(listener: &OwnedFd) -> OwnedFd {
    let fd = accept(listener.as_raw_fd()).expect("accept");
    // SAFETY: accept has just made this descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[track_caller]
pub fn passes(from: &OwnedFd, to: &OwnedFd, message: &str) {
    send(from.as_raw_fd(), message.as_bytes(), MsgFlags::MSG_NOSIGNAL).expect("send");
    arrives(to, message);
}

#[track_caller]
pub fn arrives(to: &OwnedFd, message: &str) {
    let mut bytes = [0; 100];
    let count = recv(to.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT).expect("recv");
    assert_eq!(String::from_utf8_lossy(&bytes[..count]), message);
}

#[track_caller]
pub fn is_empty(queue: &OwnedFd) {
    assert_eq!(recv(queue.as_raw_fd(), &mut [0; 100], MsgFlags::MSG_DONTWAIT), Err(Errno::EAGAIN));
}

fn names(fd: &OwnedFd) -> (Option<UnixAddr>, Option<UnixAddr>) {
    (getsockname(fd.as_raw_fd()).ok(), getpeername(fd.as_raw_fd()).ok())
}

fn server_with_a_connection_goes_on(t: &Trial, kind: SockType, name: &UnixAddr) {
    let (listener, client, accepted) = connection(kind, name);
    send(client.as_raw_fd(), b"request", MsgFlags::empty()).expect("send");
    send(accepted.as_raw_fd(), b"answer", MsgFlags::empty()).expect("send");
    t.checkpoint();
    assert_eq!(names(&listener).0.as_ref(), Some(name));
    assert_eq!(getsockopt(&listener, sockopt::AcceptConn), Ok(true));
    arrives(&accepted, "request");
    arrives(&client, "answer");
    passes(&client, &accepted, "one more");
    passes(&accepted, &client, "as well");
    let (newer, its) = another(kind, &listener, name);
    passes(&newer, &its, "hello");
    is_empty(&accepted);
}

fn names_of_a_connection_are_kept(t: &Trial) {
    let abstracted = UnixAddr::new_abstract(b"crtools\0test").expect("short");
    let all = [named(&t.path("server")), abstracted].map(|name| connection(SockType::Stream, &name));
    let look = || all.each_ref().map(|(listener, client, accepted)| [listener, client, accepted].map(names));
    let before = look();
    t.checkpoint();
    assert_eq!(look(), before);
    assert_eq!(before[0][1].1, Some(named(&t.path("server"))));
}

fn stream_server_with_a_connection_goes_on(t: &Trial) {
    server_with_a_connection_goes_on(t, SockType::Stream, &named(&t.path("server")));
}

fn seqpacket_server_with_a_connection_goes_on(t: &Trial) {
    server_with_a_connection_goes_on(t, SockType::SeqPacket, &named(&t.path("server")));
}

fn abstract_server_with_a_connection_goes_on(t: &Trial) {
    let name = UnixAddr::new_abstract(b"crtools\0test").expect("short");
    server_with_a_connection_goes_on(t, SockType::Stream, &name);
}

fn datagram_server_and_its_clients_go_on(t: &Trial) {
    let server = UnixDatagram::bind(t.path("server")).expect("bind");
    let connected = UnixDatagram::unbound().expect("socket");
    connected.connect(t.path("server")).expect("connect");
    let child = fork(|| {
        let other = UnixDatagram::unbound().expect("socket");
        other.connect(t.path("server")).expect("connect");
        t.mark("child");
        t.hold();
        other.send(b"from a child").expect("send");
        t.mark("sent");
    });
    t.await_mark("child");
    connected.send(b"one").expect("send");
    connected.send(b"three").expect("send");
    t.checkpoint();
    let mut bytes = [0; 20];
    for message in [&b"one"[..], b"three"] {
        assert_eq!(server.recv(&mut bytes).ok(), Some(message.len()));
        assert_eq!(&bytes[..message.len()], message);
    }
    t.await_mark("sent");
    connected.send(b"after").expect("send");
    assert_eq!(server.recv(&mut bytes).ok(), Some(12));
    assert_eq!(server.recv(&mut bytes).ok(), Some(5));
    child.succeed();
}

fn socket_bound_by_a_relative_path_survives(t: &Trial) {
    std::fs::create_dir(t.path("folder")).expect("mkdir");
    std::env::set_current_dir(t.path("folder")).expect("chdir");
    let server = UnixDatagram::bind("server").expect("bind");
    std::env::set_current_dir("/").expect("chdir");
    t.checkpoint();
    assert_eq!(server.local_addr().expect("name").as_pathname(), Some(Path::new("server")));
    let client = UnixDatagram::unbound().expect("socket");
    client.send_to(b"x", t.path("folder/server")).expect("send");
    assert_eq!(server.recv(&mut [0; 4]).ok(), Some(1));
}

fn socket_bound_by_a_path_that_goes_up_survives(t: &Trial) {
    std::fs::create_dir_all(t.path("one/two")).expect("mkdir");
    std::env::set_current_dir(t.path("one/two")).expect("chdir");
    let listener = UnixListener::bind("../../relative").expect("bind");
    std::env::set_current_dir("/").expect("chdir");
    t.checkpoint();
    assert_eq!(listener.local_addr().expect("name").as_pathname(), Some(Path::new("../../relative")));
    let client = UnixStream::connect(t.path("relative")).expect("connect");
    talk(client, listener.accept().expect("accept").0);
}

fn socket_file_keeps_mode_and_owner(t: &Trial) {
    let path = t.path("server");
    let _listener = UnixListener::bind(&path).expect("bind");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o751)).expect("chmod");
    std::os::unix::fs::chown(&path, Some(12), Some(34)).expect("chown");
    t.checkpoint();
    let found = std::fs::metadata(&path).expect("stat");
    assert_eq!((found.mode() & 0o7777, found.uid(), found.gid()), (0o751, 12, 34));
}

fn unlinked_listener_survives(t: &Trial) {
    let name = named(&t.path("server"));
    let (listener, client, accepted) = connection(SockType::Stream, &name);
    std::fs::remove_file(t.path("server")).expect("unlink");
    t.checkpoint();
    assert_eq!(names(&listener).0, Some(name));
    assert!(!t.path("server").exists());
    assert_eq!(getsockopt(&listener, sockopt::AcceptConn), Ok(true));
    passes(&client, &accepted, "still there");
}

fn listener_in_a_removed_folder_survives(t: &Trial) {
    std::fs::create_dir(t.path("folder")).expect("mkdir");
    let listeners = ["one", "two"].map(|name| {
        UnixListener::bind(t.path("folder").join(name)).expect("bind")
    });
    std::fs::remove_dir_all(t.path("folder")).expect("remove");
    t.checkpoint();
    assert!(!t.path("folder").exists());
    for (listener, name) in listeners.iter().zip(["one", "two"]) {
        let path = t.path("folder").join(name);
        assert_eq!(listener.local_addr().expect("name").as_pathname(), Some(&*path));
    }
}

fn listener_whose_name_another_one_took_survives(t: &Trial) {
    let old = UnixListener::bind(t.path("server")).expect("bind");
    let client = UnixStream::connect(t.path("server")).expect("connect");
    let (accepted, _) = old.accept().expect("accept");
    std::fs::remove_file(t.path("server")).expect("unlink");
    let new = UnixListener::bind(t.path("server")).expect("bind");
    old.set_nonblocking(true).expect("O_NONBLOCK");
    t.checkpoint();
    assert_eq!(old.local_addr().expect("name").as_pathname(), Some(&*t.path("server")));
    talk(client, accepted);
    let client = UnixStream::connect(t.path("server")).expect("connect");
    assert_eq!(old.accept().expect_err("not its name").raw_os_error(), Some(libc::EAGAIN));
    talk(client, new.accept().expect("accept").0);
}

fn connection_whose_listener_is_closed_survives(t: &Trial) {
    let name = named(&t.path("server"));
    let (listener, client, accepted) = connection(SockType::Stream, &name);
    drop(listener);
    send(client.as_raw_fd(), b"queued", MsgFlags::empty()).expect("send");
    t.checkpoint();
    assert_eq!(names(&client).1, Some(name));
    assert_eq!(names(&accepted).0, Some(name));
    arrives(&accepted, "queued");
    passes(&accepted, &client, "answer");
}

fn connection_of_a_bound_client_keeps_both_names(t: &Trial) {
    let (server, own) = (named(&t.path("server")), named(&t.path("client")));
    let listener = make(SockType::SeqPacket);
    bind(listener.as_raw_fd(), &server).expect("bind");
    listen(&listener, Backlog::new(1).expect("small")).expect("listen");
    let client = make(SockType::SeqPacket);
    bind(client.as_raw_fd(), &own).expect("bind");
    connect(client.as_raw_fd(), &server).expect("connect");
    let accepted = accept_one(&listener);
    t.checkpoint();
    assert_eq!(names(&client), (Some(own), Some(server)));
    assert_eq!(names(&accepted), (Some(server), Some(own)));
    passes(&client, &accepted, "one");
    passes(&accepted, &client, "two");
}

fn connection_not_yet_accepted_is_accepted_afterwards(t: &Trial) {
    let listener = UnixListener::bind(t.path("server")).expect("bind");
    let clients = [(); 3].map(|()| UnixStream::connect(t.path("server")).expect("connect"));
    t.checkpoint();
    for client in clients {
        talk(client, listener.accept().expect("accept").0);
    }
    listener.set_nonblocking(true).expect("O_NONBLOCK");
    assert_eq!(listener.accept().expect_err("nobody else").raw_os_error(), Some(libc::EAGAIN));
}

fn connection_not_yet_accepted_with_data_is_refused(t: &Trial) {
    let listener = UnixListener::bind(t.path("server")).expect("bind");
    let mut client = UnixStream::connect(t.path("server")).expect("connect");
    client.write_all(b"early").expect("write");
    t.checkpoint();
    let mut bytes = [0; 5];
    listener.accept().expect("accept").0.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"early");
}

fn connection_not_yet_accepted_of_a_closed_client_is_refused(t: &Trial) {
    let listener = UnixListener::bind(t.path("server")).expect("bind");
    drop(UnixStream::connect(t.path("server")).expect("connect"));
    t.checkpoint();
    assert_eq!(listener.accept().expect("accept").0.read(&mut [0; 5]).ok(), Some(0));
}

/// At many moments there is a connection that was not accepted yet, with data in it.
fn connections_made_all_the_time_survive(t: &Trial) {
    let listener = UnixListener::bind(t.path("server")).expect("bind");
    let client = fork(|| {
        let mut rounds = 0;
        while !t.is_over() || rounds < 20 {
            let mut connection = UnixStream::connect(t.path("server")).expect("connect");
            connection.write_all(b"there").expect("write");
            let mut bytes = [0; 5];
            connection.read_exact(&mut bytes).expect("read");
            assert_eq!(&bytes, b"there");
            crate::sys::nap();
            rounds += 1;
        }
        UnixStream::connect(t.path("server")).expect("connect").write_all(b"done!").expect("write");
    });
    let server = fork(|| {
        loop {
            crate::sys::nap();
            let mut connection = listener.accept().expect("accept").0;
            let mut bytes = [0; 5];
            connection.read_exact(&mut bytes).expect("read");
            if &bytes == b"done!" {
                return;
            }
            connection.write_all(&bytes).expect("write");
        }
    });
    t.checkpoint();
    client.succeed();
    server.succeed();
}

fn queued_datagrams_keep_their_senders(t: &Trial) {
    let server = UnixDatagram::bind(t.path("server")).expect("bind");
    let path = UnixDatagram::bind(t.path("client")).expect("bind");
    let abstracted = SocketAddr::from_abstract_name(b"sender").expect("short");
    let abstracted = UnixDatagram::bind_addr(&abstracted).expect("bind");
    let gone = UnixDatagram::bind(t.path("gone")).expect("bind");
    path.send_to(b"1", t.path("server")).expect("send");
    abstracted.send_to(b"2", t.path("server")).expect("send");
    gone.send_to(b"3", t.path("server")).expect("send");
    path.send_to(b"4", t.path("server")).expect("send");
    UnixDatagram::unbound().expect("socket").send_to(b"5", t.path("server")).expect("send");
    drop(gone);
    std::fs::remove_file(t.path("gone")).expect("unlink");
    t.checkpoint();
    let mut bytes = [0];
    let mut next = || server.recv_from(&mut bytes).expect("recv").1;
    assert_eq!(next().as_pathname(), Some(&*t.path("client")));
    assert_eq!(next().as_abstract_name(), Some(&b"sender"[..]));
    assert_eq!(next().as_pathname(), Some(&*t.path("gone")));
    assert_eq!(next().as_pathname(), Some(&*t.path("client")));
    assert!(next().is_unnamed());
    server.send_to(b"answer", t.path("client")).expect("send");
    assert_eq!(path.recv(&mut [0; 10]).ok(), Some(6));
}

fn bound_and_unbound_sockets_survive(t: &Trial) {
    let kinds = [SockType::Stream, SockType::SeqPacket, SockType::Datagram];
    let unbound = kinds.map(make);
    let bound = [make(SockType::Stream), make(SockType::SeqPacket)];
    let paths = ["one", "two"].map(|name| named(&t.path(name)));
    for (fd, path) in bound.iter().zip(&paths) {
        bind(fd.as_raw_fd(), path).expect("bind");
    }
    t.checkpoint();
    for (fd, kind) in unbound.iter().zip(kinds) {
        assert_eq!(getsockopt(fd, sockopt::SockType), Ok(kind));
        let error = connect(fd.as_raw_fd(), &named(&t.path("nothing"))).expect_err("nobody");
        assert_eq!(error, Errno::ENOENT);
    }
    for ((listener, path), kind) in bound.iter().zip(&paths).zip(kinds) {
        listen(listener, Backlog::new(1).expect("small")).expect("listen");
        let (client, accepted) = another(kind, listener, path);
        passes(&client, &accepted, "hello");
    }
}

fn datagram_socket_connected_to_itself_survives(t: &Trial) {
    let socket = UnixDatagram::bind(t.path("self")).expect("bind");
    socket.connect(t.path("self")).expect("connect");
    socket.send(b"before").expect("send");
    t.checkpoint();
    let mut bytes = [0; 10];
    assert_eq!(socket.recv(&mut bytes).ok(), Some(6));
    socket.send(b"after").expect("send");
    assert_eq!(socket.recv(&mut bytes).ok(), Some(5));
}

// Servers outside: the harness itself has them.

pub const BEFORE: &[u8] = b"before the dump";
pub const AFTER: &[u8] = b"after the restore";

/// Everything in the queue of the server.
pub fn received(server: &OwnedFd) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut bytes = [0; 100];
    // Nothing at all is the end of a connection.
    while let Ok(count @ 1..) = recv(server.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
        all.push(bytes[..count].to_vec());
    }
    all
}

fn start(o: &mut Outside) {
    o.held.push(UnixDatagram::bind(o.directory.join("server")).expect("bind").into());
}

/// What was sent arrives once, whatever happened between.
pub fn server(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Begin => start(o),
        Moment::End => assert_eq!(received(&o.held[0]), [BEFORE, AFTER]),
        _ => {}
    }
}

/// A client that sees no error.
pub fn send_around(t: &Trial, client: &UnixDatagram) {
    client.send(BEFORE).expect("send");
    let before = names(&OwnedFd::from(client.try_clone().expect("dup")));
    t.checkpoint();
    assert_eq!(names(&OwnedFd::from(client.try_clone().expect("dup"))), before);
    client.send(AFTER).expect("send");
    assert_eq!(client.take_error().expect("SO_ERROR").map(|e| e.to_string()), None);
}

pub fn connected(path: impl AsRef<Path>) -> UnixDatagram {
    let client = UnixDatagram::unbound().expect("socket");
    client.connect(path).expect("connect");
    client
}

fn client_of_a_server_outside_goes_on(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn restarted_server(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Begin => start(o),
        Moment::Away => {
            assert_eq!(received(&o.held.remove(0)), [BEFORE]);
            std::fs::remove_file(o.directory.join("server")).expect("unlink");
            start(o);
            // What it would have got before: the second time it is judged the same way.
            UnixDatagram::unbound().expect("socket").send_to(BEFORE, o.directory.join("server")).expect("send");
        }
        moment => server(o, moment),
    }
}

fn client_of_a_restarted_server_goes_on(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

const ABSTRACT: &[u8] = b"a server outside";

fn abstract_server(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Begin => {
            let name = SocketAddr::from_abstract_name(ABSTRACT).expect("short");
            o.held.push(UnixDatagram::bind_addr(&name).expect("bind").into());
        }
        moment => server(o, moment),
    }
}

fn client_of_an_abstract_server_outside_goes_on(t: &Trial) {
    let client = UnixDatagram::unbound().expect("socket");
    client.connect_addr(&SocketAddr::from_abstract_name(ABSTRACT).expect("short")).expect("connect");
    send_around(t, &client);
}

fn relative_server(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Begin => {
            std::env::set_current_dir(&o.directory).expect("chdir");
            o.held.push(UnixDatagram::bind("server").expect("bind").into());
        }
        moment => server(o, moment),
    }
}

fn client_of_a_server_with_a_relative_path_goes_on(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn server_of_clients(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::End => {
            let mut all = received(&o.held[0]);
            all.sort();
            assert_eq!(all, [AFTER, AFTER, AFTER, BEFORE, BEFORE, BEFORE]);
        }
        moment => server(o, moment),
    }
}

fn clients_of_one_server_outside_go_on(t: &Trial) {
    let clients = [(); 2].map(|()| connected(t.path("server")));
    let child = fork(|| {
        let client = connected(t.path("server"));
        client.send(BEFORE).expect("send");
        t.mark("child");
        t.hold();
        client.send(AFTER).expect("send");
    });
    t.await_mark("child");
    for client in &clients {
        client.send(BEFORE).expect("send");
    }
    t.checkpoint();
    for client in &clients {
        client.send(AFTER).expect("send");
    }
    child.succeed();
}

fn answering_server(o: &mut Outside, moment: Moment) {
    if moment == Moment::Ready {
        let client = named(&o.directory.join("client"));
        for answer in [&b"one"[..], b"two"] {
            let flags = MsgFlags::empty();
            nix::sys::socket::sendto(o.held[0].as_raw_fd(), answer, &client, flags).expect("send");
        }
    }
    server(o, moment);
}

fn client_with_a_name_keeps_what_it_has_not_read(t: &Trial) {
    let client = UnixDatagram::bind(t.path("client")).expect("bind");
    client.connect(t.path("server")).expect("connect");
    send_around(t, &client);
    let mut bytes = [0; 10];
    for answer in [&b"one"[..], b"two"] {
        let (count, from) = client.recv_from(&mut bytes).expect("recv");
        assert_eq!(&bytes[..count], answer);
        assert_eq!(from.as_pathname(), Some(&*t.path("server")));
    }
    client.set_nonblocking(true).expect("O_NONBLOCK");
    assert_eq!(client.recv(&mut bytes).expect_err("nothing").raw_os_error(), Some(libc::EAGAIN));
}

fn clients(o: &mut Outside, moment: Moment) {
    if moment == Moment::Ready {
        let client = connected(o.directory.join("server"));
        client.send(b"from a connected one").expect("send");
        o.held.push(client.into());
        let client = UnixDatagram::bind(o.directory.join("client")).expect("bind");
        client.send_to(b"from a named one", o.directory.join("server")).expect("send");
        o.held.push(client.into());
    }
}

fn server_with_clients_outside_goes_on(t: &Trial) {
    let server = UnixDatagram::bind(t.path("server")).expect("bind");
    t.checkpoint();
    let mut bytes = [0; 50];
    let (count, from) = server.recv_from(&mut bytes).expect("recv");
    assert_eq!(&bytes[..count], b"from a connected one");
    assert!(from.is_unnamed());
    let (count, from) = server.recv_from(&mut bytes).expect("recv");
    assert_eq!(&bytes[..count], b"from a named one");
    assert_eq!(from.as_pathname(), Some(&*t.path("client")));
    server.send_to(b"answer", t.path("client")).expect("send");
    connected(t.path("server")).send(b"again").expect("send");
    assert_eq!(server.recv(&mut bytes).ok(), Some(5));
}

fn sender_without_a_connection_goes_on(t: &Trial) {
    let client = UnixDatagram::unbound().expect("socket");
    client.send_to(BEFORE, t.path("server")).expect("send");
    t.checkpoint();
    client.send_to(AFTER, t.path("server")).expect("send");
}

/// Numbers of the sockets that a process has.
fn sockets_of(pid: i32) -> Vec<u64> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("read");
    let links = links.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    links.filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()).collect()
}

fn server_by_inode(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Ready | Moment::Back => {
            let all: Vec<String> = sockets_of(o.pid).iter().map(u64::to_string).collect();
            o.dump = vec![format!("--ext-unix-sk={}", all.join(","))];
        }
        moment => server(o, moment),
    }
}

fn only_named_servers_are_allowed(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn other_servers_are_not_allowed(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn server_outside_without_the_option_is_refused(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn listening_server(o: &mut Outside, moment: Moment, kind: SockType) {
    match moment {
        Moment::Begin => {
            let listener = make(kind);
            bind(listener.as_raw_fd(), &named(&o.directory.join("server"))).expect("bind");
            listen(&listener, Backlog::new(4).expect("small")).expect("listen");
            o.held.push(listener);
        }
        Moment::Ready => {
            let accepted = accept_one(&o.held[0]);
            o.held.push(accepted);
        }
        Moment::End => assert_eq!(received(&o.held[1]), [BEFORE]),
        _ => {}
    }
}

fn connected_connection_is_refused(t: &Trial, kind: SockType) {
    let client = make(kind);
    connect(client.as_raw_fd(), &named(&t.path("server"))).expect("connect");
    t.checkpoint();
    send(client.as_raw_fd(), BEFORE, MsgFlags::MSG_NOSIGNAL).expect("send");
}

fn stream_server(o: &mut Outside, moment: Moment) {
    listening_server(o, moment, SockType::Stream);
}

fn stream_server_outside_is_refused(t: &Trial) {
    connected_connection_is_refused(t, SockType::Stream);
}

fn seqpacket_server(o: &mut Outside, moment: Moment) {
    listening_server(o, moment, SockType::SeqPacket);
}

fn seqpacket_server_outside_is_refused(t: &Trial) {
    connected_connection_is_refused(t, SockType::SeqPacket);
}

/// One end of a pair, which the program gets as its standard input would be too simple: it is sent to it.
fn nameless_server(o: &mut Outside, moment: Moment) {
    use nix::sys::socket::{ControlMessage, sendmsg};
    match moment {
        Moment::Begin => {
            let (mine, yours) = UnixDatagram::pair().expect("pair");
            let carrier = UnixDatagram::unbound().expect("socket");
            o.held.extend([OwnedFd::from(mine), yours.into(), carrier.into()]);
            let directory = o.directory.clone();
            let (yours, carrier) = (o.held.remove(1), o.held.remove(1));
            std::thread::spawn(move || {
                let path = directory.join("receiver");
                crate::case::until("the receiver", || path.exists());
                let rights = [yours.as_raw_fd()];
                let parts = [std::io::IoSlice::new(b"x")];
                let control = [ControlMessage::ScmRights(&rights)];
                sendmsg(carrier.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&named(&path))).expect("send");
            });
        }
        Moment::End => assert_eq!(received(&o.held[0]), [BEFORE, AFTER]),
        _ => {}
    }
}

fn server_outside_without_a_name_is_refused(t: &Trial) {
    let receiver = UnixDatagram::bind(t.path("receiver")).expect("bind");
    let client = receive_one(&receiver.into());
    std::fs::remove_file(t.path("receiver")).expect("unlink");
    send_around(t, &client.into());
}

/// A server that is broken before the restore, and mended when that was refused.
fn broken_server(o: &mut Outside, moment: Moment, break_it: fn(&mut Outside, &Path)) {
    let path = o.directory.join("server");
    match moment {
        Moment::Begin => start(o),
        Moment::Away => {
            assert_eq!(received(&o.held[0]), [BEFORE]);
            o.held.clear();
            std::fs::remove_file(&path).expect("unlink");
            break_it(o, &path);
        }
        Moment::Mend => {
            o.held.clear();
            let _ = std::fs::remove_file(&path);
            start(o);
        }
        Moment::End => assert_eq!(received(&o.held[0]), [AFTER]),
        Moment::Ready | Moment::Back => {}
    }
}

fn missing_server(o: &mut Outside, moment: Moment) {
    broken_server(o, moment, |_, _| {});
}

fn missing_server_is_refused_at_the_restore(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn server_that_is_no_socket(o: &mut Outside, moment: Moment) {
    broken_server(o, moment, |_, path| drop(std::fs::File::create(path).expect("create")));
}

fn server_that_is_no_socket_is_refused_at_the_restore(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn dead_server(o: &mut Outside, moment: Moment) {
    broken_server(o, moment, |_, path| drop(UnixDatagram::bind(path).expect("bind")));
}

fn dead_server_is_refused_at_the_restore(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

fn server_of_another_type(o: &mut Outside, moment: Moment) {
    broken_server(o, moment, |o, path| o.held.push(UnixListener::bind(path).expect("bind").into()));
}

fn server_of_another_type_is_refused_at_the_restore(t: &Trial) {
    send_around(t, &connected(t.path("server")));
}

/// Tells the next dump and the next restore which socket of the workload is meant.
fn name_it(o: &mut Outside) {
    let inode = sockets_of(o.pid)[0];
    o.dump = vec![format!("--external=unix[{inode}]")];
    o.restore = vec![format!("--inherit-fd=fd[{NUMBER}]:socket:[{inode}]")];
}

/// The descriptor that the harness gives to the tool.
const NUMBER: i32 = 100;

/// A connection to a server outside: left out of the dump, and given at the restore.
fn connection_passed_in(o: &mut Outside, moment: Moment) {
    other_end_passed_in(o, moment, SockType::Stream);
}

fn packet_connection_passed_in(o: &mut Outside, moment: Moment) {
    other_end_passed_in(o, moment, SockType::SeqPacket);
}

fn other_end_passed_in(o: &mut Outside, moment: Moment, kind: SockType) {
    match moment {
        Moment::Ready => {
            listening_server(o, moment, kind);
            name_it(o);
        }
        Moment::Away => {
            let (mine, yours) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("socketpair");
            // SAFETY: nobody else uses this number; without close-on-exec the tool inherits it.
            assert_eq!(unsafe { libc::dup2(yours.as_raw_fd(), NUMBER) }, NUMBER);
            o.held[1] = mine;
        }
        Moment::Back => name_it(o),
        moment => listening_server(o, moment, kind),
    }
}

fn packet_connection_is_passed_in(t: &Trial) {
    connected_connection_is_refused(t, SockType::SeqPacket);
}

fn connection_is_passed_in(t: &Trial) {
    connected_connection_is_refused(t, SockType::Stream);
}
