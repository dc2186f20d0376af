//! What the ends of UNIX sockets have besides bytes in order: peers that are gone, places up to which somebody has looked,
//! bytes out of order, options.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, bind, recv, send, socketpair};

use crate::case;
use crate::case::{Case, Mode, Moment, Outside, Trial};
use crate::sys::call::check;
use crate::sys::process::fork;

use super::unix::{AFTER, BEFORE, LOST, arrives, connected, make, named, received, send_around};

pub const CASES: &[Case] = &[
    case!(peer_that_is_gone_stays_so)
        .peer_cannot_in(&[Mode::ToPeer], "a datagram socket has no peer then, instead of a dead one").exchange(),
    case!(place_up_to_which_somebody_has_looked_is_kept).peer_cannot(LOST),
    case!(byte_out_of_order_in_a_stream_is_refused).refused(&["fd", "urgent byte", "MSG_OOB"]),
    case!(options_of_every_sort_are_kept).peer_cannot(LOST),
    case!(server_in_a_root_of_its_own_is_found_again).options(EXT).outside(server_in_a_root)
        .peer_cannot("it looks for the server's path in its own root"),
    case!(server_in_a_mount_namespace_of_its_own_is_found_again).options(EXT).outside(server_in_a_namespace)
        .peer_cannot("it looks for the server's path in its own namespace"),
    case!(server_elsewhere_that_is_gone_is_refused_at_the_restore).options(EXT).outside(server_gone_from_its_root)
        .restore_refused(&["nobody serves", "in a root or mount namespace of its own"]),
    case!(servers_of_one_name_in_several_roots_are_refused_at_the_restore).options(EXT).outside(servers_in_two_roots)
        .restore_refused(&["several serve", "in a root or mount namespace of its own"]),
    case!(queue_of_a_socket_with_time_stamps_survives).peer_cannot(LOST),
    case!(filter_of_a_socket_goes_on).exchange(),
    case!(filter_of_ebpf_is_refused).refused(&["fd", "eBPF"]).needs(crate::sys::bpf::has_programs).peer_cannot(LOST),
    case!(many_unlinked_listeners_of_one_folder_survive),
    case!(unlinked_socket_file_keeps_owner_and_mode),
];

const EXT: &[&str] = &["--ext-unix-sk"];
/// Where a server is bound, in its own root or on a mount of its own.
const PATH: &str = "/run/served/server";

/// A process that has bound the socket after it went somewhere else.
fn serve(o: &mut Outside, server: &OwnedFd, folder: &str, go: fn(&Path)) {
    let root = o.directory.join(folder);
    std::fs::create_dir_all(root.join("run/served")).expect("mkdir");
    std::fs::create_dir_all("/run/served").expect("mkdir");
    let child = fork(|| {
        go(&root);
        bind(server.as_raw_fd(), &named(Path::new(PATH))).expect("bind");
        loop {
            crate::sys::nap();
        }
    });
    crate::case::until("the server", || nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(server.as_raw_fd())
        .is_ok_and(|name| name.path() == Some(Path::new(PATH))));
    o.bystanders.push(child.pid.as_raw());
}

fn stop(o: &mut Outside) {
    for pid in o.bystanders.drain(..) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
        // By then its descriptors are closed.
        let has_ended = || std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "));
        crate::case::until("the end of the server", has_ended);
    }
}

fn change_root(root: &Path) {
    nix::unistd::chroot(root).expect("chroot");
    nix::unistd::chdir("/").expect("chdir");
}

fn change_mounts(_: &Path) {
    use nix::mount::{MsFlags, mount};
    let nothing: Option<&str> = None;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing).expect("mount");
    mount(Some("tmpfs"), "/run/served", Some("tmpfs"), MsFlags::empty(), nothing).expect("mount");
}

fn server_elsewhere(o: &mut Outside, moment: Moment, go: fn(&Path)) {
    match moment {
        Moment::Begin => {
            let server = make(SockType::Datagram);
            serve(o, &server, "root", go);
            o.held.push(server);
        }
        Moment::End => {
            assert_eq!(received(&o.held[0]), [BEFORE, AFTER]);
            stop(o);
        }
        _ => {}
    }
}

fn server_in_a_root(o: &mut Outside, moment: Moment) {
    server_elsewhere(o, moment, change_root);
}

fn server_in_a_namespace(o: &mut Outside, moment: Moment) {
    server_elsewhere(o, moment, change_mounts);
}

fn server_gone_from_its_root(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => {
            assert_eq!(received(&o.held[0]), [BEFORE]);
            stop(o);
            o.held.clear();
        }
        Moment::Mend => server_elsewhere(o, Moment::Begin, |root| {
            std::fs::remove_file(root.join("run/served/server")).expect("unlink");
            change_root(root);
        }),
        Moment::End => {
            assert_eq!(received(&o.held[0]), [AFTER]);
            stop(o);
        }
        moment => server_elsewhere(o, moment, change_root),
    }
}

fn servers_in_two_roots(o: &mut Outside, moment: Moment) {
    match moment {
        Moment::Away => {
            let other = make(SockType::Datagram);
            serve(o, &other, "other", change_root);
            o.held.push(other);
        }
        Moment::Mend => {
            o.held.pop();
            let other = o.bystanders.pop().expect("the other one");
            let first = std::mem::take(&mut o.bystanders);
            o.bystanders.push(other);
            stop(o);
            o.bystanders = first;
        }
        moment => server_elsewhere(o, moment, change_root),
    }
}

/// Connects by the path that leads there from here, through the process that serves.
fn talks_to_a_server_elsewhere(t: &Trial) {
    let folder = t.path("root/run/served/server");
    // In another mount namespace only the server itself leads there.
    let client = match folder.exists() {
        true => connected(folder),
        false => connected("/proc/2/root/run/served/server"),
    };
    send_around(t, &client);
}

fn server_in_a_root_of_its_own_is_found_again(t: &Trial) {
    talks_to_a_server_elsewhere(t);
}

fn server_in_a_mount_namespace_of_its_own_is_found_again(t: &Trial) {
    talks_to_a_server_elsewhere(t);
}

fn server_elsewhere_that_is_gone_is_refused_at_the_restore(t: &Trial) {
    talks_to_a_server_elsewhere(t);
}

fn servers_of_one_name_in_several_roots_are_refused_at_the_restore(t: &Trial) {
    talks_to_a_server_elsewhere(t);
}

fn pair(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).expect("socketpair")
}

fn put(to: &OwnedFd, bytes: &[u8], flags: MsgFlags) -> Result<usize, Errno> {
    send(to.as_raw_fd(), bytes, flags | MsgFlags::MSG_NOSIGNAL)
}

fn look(at: &OwnedFd, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let count = recv(at.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT).expect("recv");
    bytes.truncate(count);
    bytes
}

fn peer_that_is_gone_stays_so(t: &Trial) {
    let left = [SockType::Stream, SockType::SeqPacket, SockType::Datagram].map(|kind| {
        let (one, other) = pair(kind);
        put(&other, b"last words", MsgFlags::empty()).expect("send");
        one
    });
    // One that has nothing to read, either.
    let (silent, _) = pair(SockType::Stream);
    t.checkpoint();
    let read = |from: &OwnedFd| recv(from.as_raw_fd(), &mut [0; 20], MsgFlags::MSG_DONTWAIT);
    for socket in &left {
        arrives(socket, "last words");
    }
    let [stream, packets, datagrams] = &left;
    for socket in [stream, packets, &silent] {
        assert_eq!(read(socket), Ok(0));
        assert_eq!(put(socket, b"x", MsgFlags::empty()), Err(Errno::EPIPE));
    }
    assert_eq!(read(datagrams), Err(Errno::EAGAIN));
    assert_eq!(put(datagrams, b"x", MsgFlags::empty()), Err(Errno::ECONNREFUSED));
    assert_eq!(put(datagrams, b"x", MsgFlags::empty()), Err(Errno::ENOTCONN));
}

fn int(socket: &OwnedFd, option: i32) -> i32 {
    let (mut value, mut len) = (0_i32, size_of::<i32>() as u32);
    // SAFETY: the kernel writes an int and its length to live locals.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
    };
    check("getsockopt", result);
    value
}

fn set(socket: &OwnedFd, option: i32, value: i32) {
    // SAFETY: the kernel reads an int of a live local.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const value).cast(), size_of::<i32>() as u32)
    };
    check("setsockopt", result);
}

const PEEK_OFF: i32 = 42;

fn place_up_to_which_somebody_has_looked_is_kept(t: &Trial) {
    let pairs = [SockType::Stream, SockType::Datagram, SockType::SeqPacket].map(pair);
    for (one, other) in &pairs {
        set(one, PEEK_OFF, 0);
        put(other, b"0123456789", MsgFlags::empty()).expect("send");
        assert_eq!(look(one, 4), b"0123");
    }
    t.checkpoint();
    for (one, _) in &pairs {
        assert_eq!(int(one, PEEK_OFF), 4);
        assert_eq!(look(one, 3), b"456");
        arrives(one, "0123456789");
        assert_eq!(int(one, PEEK_OFF), 0);
    }
}

/// The byte with MSG_OOB is read apart from the others.
fn byte_out_of_order_in_a_stream_is_refused(t: &Trial) {
    let (one, other) = pair(SockType::Stream);
    put(&other, b"before", MsgFlags::empty()).expect("send");
    put(&other, b"!", MsgFlags::MSG_OOB).expect("send");
    put(&other, b"behind", MsgFlags::empty()).expect("send");
    t.checkpoint();
    let mut byte = [0];
    assert_eq!(recv(one.as_raw_fd(), &mut byte, MsgFlags::MSG_OOB), Ok(1));
    assert_eq!(&byte, b"!");
    arrives(&one, "before");
    arrives(&one, "behind");
}

fn options_of_every_sort_are_kept(t: &Trial) {
    const PASSPIDFD: i32 = 76;
    let choices = [
        (libc::SO_PASSCRED, 1),
        (libc::SO_PASSSEC, 1),
        (PASSPIDFD, 1),
        (libc::SO_TIMESTAMPNS, 1),
        (libc::SO_PRIORITY, 5),
        (libc::SO_MARK, 77),
        (libc::SO_RCVLOWAT, 3),
        (libc::SO_BROADCAST, 1),
        (libc::SO_KEEPALIVE, 1),
        (libc::SO_NO_CHECK, 1),
        (libc::SO_TIMESTAMP, 1),
    ];
    let sockets = choices.map(|(option, value)| {
        let socket = make(SockType::Datagram);
        set(&socket, option, value);
        assert_eq!(int(&socket, option), value, "option {option}");
        socket
    });
    t.checkpoint();
    for (socket, (option, value)) in sockets.iter().zip(choices) {
        assert_eq!(int(socket, option), value, "option {option}");
    }
}

fn queue_of_a_socket_with_time_stamps_survives(t: &Trial) {
    use nix::sys::socket::{ControlMessageOwned, recvmsg};
    let (one, other) = pair(SockType::Datagram);
    set(&one, libc::SO_TIMESTAMPNS, 1);
    put(&other, b"before", MsgFlags::empty()).expect("send");
    t.checkpoint();
    put(&other, b"after", MsgFlags::empty()).expect("send");
    for expected in ["before", "after"] {
        let mut bytes = [0; 20];
        let mut room = nix::cmsg_space!(nix::sys::time::TimeSpec);
        let mut parts = [std::io::IoSliceMut::new(&mut bytes)];
        let got = recvmsg::<()>(one.as_raw_fd(), &mut parts, Some(&mut room), MsgFlags::MSG_DONTWAIT).expect("recvmsg");
        let stamps = got.cmsgs().expect("control messages").filter(|message| matches!(message, ControlMessageOwned::ScmTimestampns(_)));
        assert_eq!((got.bytes, stamps.count()), (expected.len(), 1));
        assert_eq!(&bytes[..expected.len()], expected.as_bytes());
    }
}

fn filter_of_a_socket_goes_on(t: &Trial) {
    let (one, other) = pair(SockType::Datagram);
    let instruction = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    // Three bytes of each message pass.
    let program = [instruction(libc::BPF_RET | libc::BPF_K, 3)];
    let program = libc::sock_fprog { len: 1, filter: program.as_ptr().cast_mut() };
    let (from, len) = ((&raw const program).cast(), size_of_val(&program) as u32);
    // SAFETY: the kernel reads the structure and the instructions that it names, which live in this frame.
    let result =
        unsafe { libc::setsockopt(one.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, from, len) };
    check("setsockopt", result);
    let passes = |message: &[u8], part: &str| {
        put(&other, message, MsgFlags::empty()).expect("send");
        arrives(&one, part);
    };
    passes(b"before", "bef");
    t.checkpoint();
    passes(b"after", "aft");
}

fn filter_of_ebpf_is_refused(t: &Trial) {
    let (one, other) = pair(SockType::Datagram);
    crate::sys::bpf::attach_program(&one);
    t.checkpoint();
    put(&other, b"message", MsgFlags::empty()).expect("send");
    arrives(&one, "m");
}

fn many_unlinked_listeners_of_one_folder_survive(t: &Trial) {
    std::fs::create_dir(t.path("folder")).expect("mkdir");
    let paths: Vec<_> = (0..5).map(|nth| t.path(&format!("folder/{nth}"))).collect();
    let listeners: Vec<UnixListener> = paths.iter().map(|path| UnixListener::bind(path).expect("bind")).collect();
    std::fs::remove_dir_all(t.path("folder")).expect("rmdir");
    t.checkpoint();
    for (listener, path) in listeners.iter().zip(&paths) {
        assert_eq!(listener.local_addr().expect("a name").as_pathname(), Some(&**path));
        listener.set_nonblocking(true).expect("fcntl");
        assert_eq!(listener.accept().expect_err("nobody").raw_os_error(), Some(libc::EAGAIN));
    }
    assert!(!t.path("folder").exists());
}

fn unlinked_socket_file_keeps_owner_and_mode(t: &Trial) {
    let path = t.path("socket");
    let _listener = UnixListener::bind(&path).expect("bind");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o610)).expect("chmod");
    std::os::unix::fs::chown(&path, Some(12), Some(34)).expect("chown");
    let open = |path: &std::path::Path| {
        use std::os::unix::fs::OpenOptionsExt;
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).expect("open")
    };
    let file = open(&path);
    std::fs::remove_file(&path).expect("unlink");
    t.checkpoint();
    let found = file.metadata().expect("stat");
    assert_eq!((found.uid(), found.gid(), found.mode()), (12, 34, libc::S_IFSOCK | 0o610));
    assert_eq!(found.nlink(), 0);
}
