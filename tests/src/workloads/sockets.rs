//! UNIX socket pairs with queued data, listening sockets.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, SockaddrIn, bind, getsockopt, listen, recv, send,
    setsockopt, shutdown, socket, socketpair, sockopt,
};

use crate::case;
use crate::case::{Case, Moment, Outside, Trial};
use crate::sys::process::fork;

/// From Linux 6.16 on.
const PASSCRED: &str = "it asks internet sockets for SO_PASSCRED, which newer kernels refuse";

pub const CASES: &[Case] = &[
    case!(stream_pair_queue_survives_in_both_directions).exchange(),
    case!(datagram_pair_keeps_message_borders).exchange(),
    case!(seqpacket_pair_keeps_message_borders),
    case!(pair_shared_by_parent_and_child_survives).exchange(),
    case!(half_closed_pair_still_drains_its_data),
    case!(shut_down_directions_stay_shut_down),
    case!(shut_down_packet_sockets_stay_so),
    case!(ends_shut_down_in_different_ways_stay_so),
    case!(pair_options_and_flags_are_kept),
    case!(large_queue_survives),
    case!(empty_messages_survive).needs(crate::sys::strange::tells_types).peer_cannot("an empty datagram in a queue is lost"),
    case!(blocked_receiver_is_woken_by_its_peer),
    case!(listening_unix_socket_accepts_afterwards).exchange(),
    case!(listening_tcp_socket_accepts_afterwards).peer_cannot(PASSCRED),
    case!(listening_tcp6_socket_accepts_afterwards).peer_cannot(PASSCRED),
    case!(listening_socket_options_and_backlog_are_kept).peer_cannot(PASSCRED),
    case!(bound_but_not_listening_socket_survives).peer_cannot(PASSCRED),
    case!(unbound_tcp_socket_survives).peer_cannot(PASSCRED),
    case!(listener_shared_by_children_survives).peer_cannot(PASSCRED),
    case!(two_listeners_with_reuseport_survive).peer_cannot(PASSCRED),
    case!(netlink_socket_goes_on).peer_cannot(PASSCRED),
    case!(netlink_socket_with_groups_and_options_goes_on).peer_cannot(PASSCRED),
    case!(netlink_socket_with_unread_messages_is_refused).refused(&["fd", "netlink", "not read"]),
    case!(netlink_port_that_is_taken_is_refused_at_the_restore).outside(port_taken)
        .restore_refused(&["netlink", "port 4321", "somebody has its port"]),
    case!(blocked_accept_goes_on_waiting).peer_cannot(PASSCRED),
];

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        .expect("socketpair")
}

fn put(to: &OwnedFd, bytes: &[u8]) {
    assert_eq!(send(to.as_raw_fd(), bytes, MsgFlags::empty()), Ok(bytes.len()));
}

fn get(from: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut bytes = [0; 4096];
    recv(from.as_raw_fd(), &mut bytes, MsgFlags::empty()).map(|count| bytes[..count].to_vec())
}

fn stream_pair_queue_survives_in_both_directions(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    put(&a, b"to b");
    put(&b, b"to a");
    t.checkpoint();
    assert_eq!(get(&b), Ok(b"to b".to_vec()));
    assert_eq!(get(&a), Ok(b"to a".to_vec()));
    assert_eq!(get(&a), Err(Errno::EAGAIN));
    put(&a, b"again");
    assert_eq!(get(&b), Ok(b"again".to_vec()));
}

fn keeps_message_borders(t: &Trial, kind: SockType) {
    let (a, b) = pair(kind);
    for message in ["one", "three", "x"] {
        put(&a, message.as_bytes());
    }
    put(&b, b"back");
    t.checkpoint();
    for message in ["one", "three", "x"] {
        assert_eq!(get(&b), Ok(message.into()));
    }
    assert_eq!(get(&b), Err(Errno::EAGAIN));
    assert_eq!(get(&a), Ok(b"back".to_vec()));
}

fn datagram_pair_keeps_message_borders(t: &Trial) {
    keeps_message_borders(t, SockType::Datagram);
}

fn seqpacket_pair_keeps_message_borders(t: &Trial) {
    keeps_message_borders(t, SockType::SeqPacket);
}

fn pair_shared_by_parent_and_child_survives(t: &Trial) {
    let (mut a, mut b) = UnixStream::pair().expect("pair");
    let child = fork(|| {
        t.mark("child");
        t.hold();
        b.write_all(b"from the child").expect("write");
        let mut bytes = [0; 8];
        b.read_exact(&mut bytes).expect("read");
        assert_eq!(&bytes, b"before||");
    });
    a.write_all(b"before||").expect("write");
    t.await_mark("child");
    t.checkpoint();
    let mut bytes = [0; 14];
    a.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"from the child");
    child.succeed();
}

fn half_closed_pair_still_drains_its_data(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    put(&a, b"last words");
    drop(a);
    t.checkpoint();
    assert_eq!(get(&b), Ok(b"last words".to_vec()));
    assert_eq!(get(&b), Ok(vec![]));
    assert_eq!(send(b.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL), Err(Errno::EPIPE));
}

fn shut_down_directions_stay_shut_down(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    put(&b, b"kept");
    shutdown(a.as_raw_fd(), Shutdown::Write).expect("shutdown");
    t.checkpoint();
    assert_eq!(send(a.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL), Err(Errno::EPIPE));
    assert_eq!(get(&b), Ok(vec![]));
    assert_eq!(get(&a), Ok(b"kept".to_vec()));
    put(&b, b"still open this way");
    assert_eq!(get(&a), Ok(b"still open this way".to_vec()));
}

fn shut_down_packet_sockets_stay_so(t: &Trial) {
    let (a, b) = pair(SockType::SeqPacket);
    put(&a, b"first");
    put(&a, b"last");
    put(&b, b"kept");
    shutdown(a.as_raw_fd(), Shutdown::Write).expect("shutdown");
    let (gone, left) = pair(SockType::SeqPacket);
    put(&gone, b"last words");
    drop(gone);
    t.checkpoint();
    assert_eq!(send(a.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL), Err(Errno::EPIPE));
    assert_eq!([get(&b), get(&b), get(&b)], [Ok(b"first".to_vec()), Ok(b"last".to_vec()), Ok(vec![])]);
    put(&b, b"still open this way");
    assert_eq!([get(&a), get(&a)], [Ok(b"kept".to_vec()), Ok(b"still open this way".to_vec())]);
    assert_eq!([get(&left), get(&left)], [Ok(b"last words".to_vec()), Ok(vec![])]);
}

fn ends_shut_down_in_different_ways_stay_so(t: &Trial) {
    let pairs = [SockType::Stream, SockType::SeqPacket].map(|kind| {
        let (a, b) = pair(kind);
        put(&b, b"to a");
        shutdown(a.as_raw_fd(), Shutdown::Write).expect("shutdown");
        shutdown(b.as_raw_fd(), Shutdown::Write).expect("shutdown");
        let (c, d) = pair(kind);
        shutdown(c.as_raw_fd(), Shutdown::Both).expect("shutdown");
        [a, b, c, d]
    });
    t.checkpoint();
    for ends in &pairs {
        let [a, b, ..] = ends;
        for end in ends {
            assert_eq!(send(end.as_raw_fd(), b"x", MsgFlags::MSG_NOSIGNAL), Err(Errno::EPIPE));
        }
        assert_eq!([get(a), get(a), get(b)], [Ok(b"to a".to_vec()), Ok(vec![]), Ok(vec![])]);
        assert_eq!([get(&ends[2]), get(&ends[3])], [Ok(vec![]), Ok(vec![])]);
    }
}

fn pair_options_and_flags_are_kept(t: &Trial) {
    let (a, b) = pair(SockType::Datagram);
    setsockopt(&a, sockopt::SndBuf, &100_000).expect("SO_SNDBUF");
    setsockopt(&b, sockopt::RcvBuf, &50_000).expect("SO_RCVBUF");
    setsockopt(&b, sockopt::PassCred, &true).expect("SO_PASSCRED");
    let time = nix::sys::time::TimeVal::new(7, 0);
    setsockopt(&a, sockopt::ReceiveTimeout, &time).expect("SO_RCVTIMEO");
    let asked = (getsockopt(&a, sockopt::SndBuf), getsockopt(&b, sockopt::RcvBuf));
    t.checkpoint();
    assert_eq!((getsockopt(&a, sockopt::SndBuf), getsockopt(&b, sockopt::RcvBuf)), asked);
    assert_eq!(getsockopt(&b, sockopt::PassCred), Ok(true));
    assert_eq!(getsockopt(&a, sockopt::PassCred), Ok(false));
    assert_eq!(getsockopt(&a, sockopt::ReceiveTimeout), Ok(time));
    assert_eq!(getsockopt(&a, sockopt::SockType), Ok(SockType::Datagram));
}

fn large_queue_survives(t: &Trial) {
    let (a, b) = pair(SockType::Stream);
    let mut sent = Vec::new();
    loop {
        let chunk: Vec<u8> = (0..1000).map(|i| (i * 7 + sent.len() / 13) as u8).collect();
        match send(a.as_raw_fd(), &chunk, MsgFlags::empty()) {
            Ok(count) => sent.extend_from_slice(&chunk[..count]),
            Err(Errno::EAGAIN) => break,
            Err(e) => panic!("send: {e}"),
        }
    }
    t.checkpoint();
    let mut got = Vec::new();
    while let Ok(bytes) = get(&b) {
        got.extend(bytes);
    }
    assert!(got == sent, "{} bytes sent, {} received, or other bytes", sent.len(), got.len());
}

fn empty_messages_survive(t: &Trial) {
    const ALL: [&[u8]; 6] = [b"", b"x", b"", b"", b"yz", b""];
    let (a, b) = pair(SockType::Datagram);
    let (c, d) = pair(SockType::SeqPacket);
    let (gone, left) = pair(SockType::SeqPacket);
    for message in ALL {
        [&a, &c, &gone].into_iter().for_each(|end| put(end, message));
    }
    let (one, other) = pair(SockType::Datagram);
    put(&one, b"");
    drop(gone);
    t.checkpoint();
    for end in [&b, &d, &left] {
        assert_eq!(ALL.map(|_| get(end)), ALL.map(|message| Ok(message.to_vec())));
    }
    assert_eq!([get(&b), get(&d), get(&left)], [Err(Errno::EAGAIN), Err(Errno::EAGAIN), Ok(vec![])]);
    assert_eq!([get(&other), get(&other)], [Ok(vec![]), Err(Errno::EAGAIN)]);
}

fn blocked_receiver_is_woken_by_its_peer(t: &Trial) {
    let (mut a, mut b) = UnixStream::pair().expect("pair");
    let child = fork(|| {
        let mut bytes = [0; 4];
        b.read_exact(&mut bytes).expect("read");
        assert_eq!(&bytes, b"wake");
    });
    let numbers = [libc::SYS_recvfrom as u64, libc::SYS_read as u64];
    crate::case::until("the read", || {
        crate::sys::procfs::syscall(child.pid).first().is_some_and(|nr| numbers.contains(nr))
    });
    t.checkpoint();
    a.write_all(b"wake").expect("write");
    child.succeed();
}

fn talk(mut client: impl Read + Write, mut server: impl Read + Write) {
    client.write_all(b"hello").expect("write");
    let mut bytes = [0; 5];
    server.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"hello");
    server.write_all(b"world").expect("write");
    client.read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"world");
}

fn listening_unix_socket_accepts_afterwards(t: &Trial) {
    let listener = UnixListener::bind(t.path("socket")).expect("bind");
    t.checkpoint();
    let client = UnixStream::connect(t.path("socket")).expect("connect");
    talk(client, listener.accept().expect("accept").0);
}

fn accepts(t: &Trial, address: &str) {
    let listener = TcpListener::bind(address).expect("bind");
    let local = listener.local_addr().expect("address");
    t.checkpoint();
    assert_eq!(listener.local_addr().expect("address"), local);
    let client = TcpStream::connect(local).expect("connect");
    talk(client, listener.accept().expect("accept").0);
}

fn listening_tcp_socket_accepts_afterwards(t: &Trial) {
    accepts(t, "127.0.0.1:0");
}

fn listening_tcp6_socket_accepts_afterwards(t: &Trial) {
    accepts(t, "[::1]:0");
}

fn listening_socket_options_and_backlog_are_kept(t: &Trial) {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).expect("socket");
    setsockopt(&fd, sockopt::ReuseAddr, &true).expect("SO_REUSEADDR");
    setsockopt(&fd, sockopt::KeepAlive, &true).expect("SO_KEEPALIVE");
    setsockopt(&fd, sockopt::TcpNoDelay, &true).expect("TCP_NODELAY");
    setsockopt(&fd, sockopt::RcvBuf, &60_000).expect("SO_RCVBUF");
    bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 4321)).expect("bind");
    listen(&fd, Backlog::new(2).expect("small")).expect("listen");
    let buffer = getsockopt(&fd, sockopt::RcvBuf);
    t.checkpoint();
    assert_eq!(getsockopt(&fd, sockopt::ReuseAddr), Ok(true));
    assert_eq!(getsockopt(&fd, sockopt::KeepAlive), Ok(true));
    assert_eq!(getsockopt(&fd, sockopt::TcpNoDelay), Ok(true));
    assert_eq!(getsockopt(&fd, sockopt::RcvBuf), buffer);
    assert_eq!(getsockopt(&fd, sockopt::AcceptConn), Ok(true));
    let listener = TcpListener::from(fd);
    assert_eq!(listener.accept().expect_err("nobody yet").raw_os_error(), Some(libc::EAGAIN));
    let table = std::fs::read_to_string("/proc/net/tcp").expect("read");
    assert_eq!(table.lines().filter(|line| line.contains("0100007F:10E1 00000000:0000 0A")).count(), 1);
}

fn bound_but_not_listening_socket_survives(t: &Trial) {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).expect("socket");
    bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 4322)).expect("bind");
    t.checkpoint();
    listen(&fd, Backlog::new(5).expect("small")).expect("listen");
    let client = TcpStream::connect("127.0.0.1:4322").expect("connect");
    talk(client, TcpListener::from(fd).accept().expect("accept").0);
}

fn unbound_tcp_socket_survives(t: &Trial) {
    let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).expect("socket");
    t.checkpoint();
    let listener = TcpListener::bind("127.0.0.1:4323").expect("bind");
    nix::sys::socket::connect(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 4323)).expect("connect");
    talk(TcpStream::from(fd), listener.accept().expect("accept").0);
}

fn listener_shared_by_children_survives(t: &Trial) {
    let listener = TcpListener::bind("127.0.0.1:4324").expect("bind");
    let children: Vec<_> = (0..2)
        .map(|number| {
            fork(|| {
                t.mark(&format!("child-{number}"));
                t.hold();
                let (mut server, _) = listener.accept().expect("accept");
                server.write_all(b"x").expect("write");
            })
        })
        .collect();
    t.await_mark("child-0");
    t.await_mark("child-1");
    t.checkpoint();
    for _ in 0..2 {
        let mut byte = [0];
        TcpStream::connect("127.0.0.1:4324").expect("connect").read_exact(&mut byte).expect("read");
    }
    for child in children {
        child.succeed();
    }
}

fn two_listeners_with_reuseport_survive(t: &Trial) {
    let make = || {
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).expect("socket");
        setsockopt(&fd, sockopt::ReusePort, &true).expect("SO_REUSEPORT");
        bind(fd.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 4325)).expect("bind");
        listen(&fd, Backlog::new(5).expect("small")).expect("listen");
        TcpListener::from(fd)
    };
    let both = [make(), make()];
    t.checkpoint();
    let _client = TcpStream::connect("127.0.0.1:4325").expect("connect");
    assert_eq!(both.iter().filter(|listener| listener.accept().is_ok()).count(), 1);
}

fn blocked_accept_goes_on_waiting(t: &Trial) {
    let listener = TcpListener::bind("127.0.0.1:4326").expect("bind");
    let child = fork(|| {
        listener.accept().expect("accept").0.write_all(b"x").expect("write");
    });
    crate::case::until("the accept", || {
        crate::sys::procfs::syscall(child.pid).first().is_some_and(|nr| *nr == libc::SYS_accept4 as u64)
    });
    t.checkpoint();
    let mut byte = [0];
    TcpStream::connect("127.0.0.1:4326").expect("connect").read_exact(&mut byte).expect("read");
    child.succeed();
}

/// A netlink socket for routes, bound to a port and groups.
fn netlink(port: u32, groups: u32) -> OwnedFd {
    use nix::sys::socket::{NetlinkAddr, SockProtocol};
    let route = SockProtocol::NetlinkRoute;
    let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_NONBLOCK, route).expect("socket");
    bind(fd.as_raw_fd(), &NetlinkAddr::new(port, groups)).expect("bind");
    fd
}

fn port_and_groups(fd: &OwnedFd) -> (u32, u32) {
    let address: nix::sys::socket::NetlinkAddr = nix::sys::socket::getsockname(fd.as_raw_fd()).expect("getsockname");
    (address.pid(), address.groups())
}

/// Asks for the links; the answer begins with one.
fn ask_for_links(fd: &OwnedFd) {
    const RTM_GETLINK: u16 = 18;
    const RTM_NEWLINK: u16 = 16;
    let mut question = [0u8; 32];
    question[..4].copy_from_slice(&32u32.to_ne_bytes());
    question[4..6].copy_from_slice(&RTM_GETLINK.to_ne_bytes());
    // NLM_F_REQUEST, NLM_F_DUMP.
    question[6..8].copy_from_slice(&0x301u16.to_ne_bytes());
    put(fd, &question);
    let answer = get(fd).expect("an answer");
    assert_eq!(answer[4..6], RTM_NEWLINK.to_ne_bytes());
}

fn drain(fd: &OwnedFd) {
    while get(fd).is_ok() {}
}

fn netlink_socket_goes_on(t: &Trial) {
    let fd = netlink(0, 0);
    ask_for_links(&fd);
    drain(&fd);
    let before = port_and_groups(&fd);
    let unbound = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::empty(), None).expect("socket");
    t.checkpoint();
    assert_eq!(port_and_groups(&fd), before);
    assert_eq!(get(&fd), Err(Errno::EAGAIN));
    ask_for_links(&fd);
    assert_eq!(port_and_groups(&unbound).0, 0);
    assert_eq!(getsockopt(&unbound, sockopt::SockType), Ok(SockType::Datagram));
}

fn netlink_option(fd: &OwnedFd, name: i32) -> i32 {
    let (mut value, mut length) = (0i32, 4);
    // SAFETY: the kernel writes one int to the local.
    let got = unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, name, (&raw mut value).cast(), &mut length) };
    assert_eq!(got, 0);
    value
}

fn netlink_socket_with_groups_and_options_goes_on(t: &Trial) {
    // Links and IPv4 addresses; one more above the first 32.
    let fd = netlink(77, 0x11);
    for (name, value) in [(libc::NETLINK_ADD_MEMBERSHIP, 33i32), (libc::NETLINK_EXT_ACK, 1), (libc::NETLINK_CAP_ACK, 1)] {
        // SAFETY: the kernel reads one int, a live local.
        let set = unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, name, (&raw const value).cast(), 4) };
        assert_eq!(set, 0);
    }
    let memberships = || {
        let (mut words, mut length) = ([0u32; 8], 32);
        let name = libc::NETLINK_LIST_MEMBERSHIPS;
        // SAFETY: the kernel writes at most 32 bytes to the local.
        let got = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_NETLINK, name, words.as_mut_ptr().cast(), &mut length)
        };
        assert_eq!(got, 0);
        words
    };
    let look = || (port_and_groups(&fd), memberships(), [10, 11, 12].map(|name| netlink_option(&fd, name)));
    let before = look();
    assert_eq!((before.0, before.1[..2].to_vec(), before.2), ((77, 0x11), vec![0x11, 1], [1, 1, 0]));
    t.checkpoint();
    assert_eq!(look(), before);
    // A change of a link is told to the group.
    let any = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).expect("socket");
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_mtu = 60_000;
    // SAFETY: SIOCSIFMTU reads one ifreq, a live local.
    assert_eq!(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFMTU, &raw const request) }, 0);
    crate::case::until("the news of a link", || get(&fd).is_ok_and(|news| news[4..6] == 16u16.to_ne_bytes()));
}

fn netlink_socket_with_unread_messages_is_refused(t: &Trial) {
    let fd = netlink(0, 0);
    ask_for_links(&fd);
    t.checkpoint();
    drain(&fd);
}

fn port_taken(outside: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => outside.held.push(netlink(4321, 0)),
        Moment::Mend => outside.held.clear(),
        _ => {}
    }
}

fn netlink_port_that_is_taken_is_refused_at_the_restore(t: &Trial) {
    let fd = netlink(4321, 0);
    t.checkpoint();
    ask_for_links(&fd);
}
