//! pipe(2): bytes on their way from a write end to a read end.
//!
//! Read from: fstat(2) (the inode names the pipe), F_GETPIPE_SZ, and tee(2) to a pipe of our own, which
//! leaves the bytes where they are.
//! Rebuilt by: pipe2(2), F_SETPIPE_SZ, write(2) of the bytes; an end that was opened again by name is
//! opened again. An end that nobody holds is closed, so the other end sees what it saw before.
//! Not kept: boundaries of the kernel's buffers, other than those of packets (O_DIRECT).
//! Refused: a pipe whose other end a process outside the tree holds.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, reopen, set_status};
use image::{FdTypes, FownEntry, Reader, kind};
use model::{Errno, Failure, Failures, Object, Remedy};
use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

pub static KIND: Pipe = Pipe;

#[derive(Debug)]
pub struct Pipe;

/// `flags` tell which end it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PipeEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
}

/// `pipes-data.img`, `fifo-data.img`: `bytes` bytes follow; `size` is the capacity.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PipeDataEntry {
    #[prost(uint32, required, tag = "1")]
    pub pipe_id: u32,
    #[prost(uint32, required, tag = "2")]
    pub bytes: u32,
    #[prost(uint32, optional, tag = "3")]
    pub size: Option<u32>,
    /// Of ours: the lengths of packets, where there are several.
    #[prost(uint32, repeated, tag = "1000")]
    pub packets: Vec<u32>,
}


/// The two ends that a tree holds of one pipe.
#[derive(Debug, Default)]
struct Ends {
    reader: Option<Seen>,
    writer: Option<Seen>,
}

/// An end seen in a dump, kept to be asked about the other end later.
#[derive(Debug)]
struct Seen {
    fd: OwnedFd,
    object: Object,
    pid: i32,
}

/// Pipes of a dump by inode.
#[derive(Debug, Default)]
struct Dumped(HashMap<u32, Ends>);

/// Pipes of a restore by `pipe_id`: both ends, and whether each was given to somebody.
#[derive(Debug, Default)]
struct Opened(HashMap<u32, (OwnedFd, OwnedFd, [bool; 2])>);

/// Pipes that are written to in packets.
#[derive(Debug, Default)]
struct Packets(Option<HashSet<u32>>);

fn is_writer(flags: u32) -> bool {
    flags as i32 & libc::O_ACCMODE != libc::O_RDONLY
}

impl FdKind for Pipe {
    type Entry = PipeEntry;
    const NAME: &'static str = "pipe";
    const TYPE: FdTypes = FdTypes::Pipe;
    const TAG: u32 = 18;

    fn claims(&self, probe: &FdProbe) -> bool {
        // A named fifo is another kind; its inode is in a file system.
        probe.format() == libc::S_IFIFO && probe.link().starts_with(b"pipe:[") && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<PipeEntry, Failure> {
        let pipe_id = probe.stat.st_ino as u32;
        let duplicate = probe.fd.try_clone().map_err(|error| {
            probe.fail(sys::memory::io_errno("fcntl", &error), "keep the pipe")
        })?;
        let seen = Seen { fd: duplicate, object: probe.object(), pid: probe.pid };
        let known = cx.shelf.of::<Dumped>().0.entry(pipe_id).or_default();
        let is_first = known.reader.is_none() && known.writer.is_none();
        if probe.flags as i32 & libc::O_ACCMODE == libc::O_RDWR {
            return Err(probe.refuse("is open for both reading and writing"));
        }
        *(if is_writer(probe.flags) { &mut known.writer } else { &mut known.reader }) = Some(seen);
        if is_first {
            save_content(probe, pipe_id, "pipes-data.img", kind::PIPES_DATA, cx)?;
        }
        Ok(PipeEntry { id, pipe_id, flags: probe.flags, fown: probe.owner()? })
    }

    fn settle(&self, cx: &mut DumpCx) -> Failures {
        let dumped = std::mem::take(cx.shelf.of::<Dumped>());
        let outside = |seen: &Seen, other: &str| {
            Failure::unsupported(seen.object.clone(), format!("its {other} is held outside of the tree"))
                .of(seen.pid)
                .help(Remedy::Advice("start the program with its input and output redirected to files"))
        };
        let mut failures = Failures::new();
        for ends in dumped.0.into_values() {
            match (&ends.reader, &ends.writer) {
                // A pipe without a writer is at its end, one without a reader broken; else someone is there.
                (Some(reader), None) if !sys::fd::hung_up(&reader.fd) => {
                    failures.push(outside(reader, "write end"));
                }
                (None, Some(writer)) if !sys::fd::hung_up(&writer.fd) => {
                    failures.push(outside(writer, "read end"));
                }
                _ => {}
            }
        }
        failures
    }

    fn link(&self, entries: &[(u32, &PipeEntry)], _files: &FileTable) -> Failures {
        entries
            .iter()
            .filter(|(_, entry)| entry.flags as i32 & libc::O_ACCMODE > libc::O_WRONLY)
            .map(|(id, _)| Failure::corrupt("files.img", None, format!("pipe {id} is no single end")))
            .collect()
    }

    fn key(&self, entry: &PipeEntry, _files: &FileTable) -> Option<String> {
        Some(format!("pipe:[{}]", entry.pipe_id))
    }

    fn open(&self, entry: &PipeEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named(format!("pipe {}", entry.pipe_id)), "make it");
        if !cx.shelf.of::<Opened>().0.contains_key(&entry.pipe_id) {
            let (files, packets) = (cx.files, cx.shelf.of::<Packets>());
            let packets = packets.0.get_or_insert_with(|| {
                let in_packets = files.entries::<Pipe>().filter(|end| end.flags & libc::O_DIRECT as u32 != 0);
                in_packets.map(|end| end.pipe_id).collect()
            });
            let flags = if packets.contains(&entry.pipe_id) { libc::O_DIRECT } else { 0 };
            let (reader, writer) = sys::fd::pipe(flags).map_err(explain)?;
            load_content(&writer, entry.pipe_id, "pipes-data.img", kind::PIPES_DATA, cx)?;
            cx.shelf.of::<Opened>().0.insert(entry.pipe_id, (reader, writer, [false; 2]));
        }
        // Just put there.
        let (reader, writer, is_given) = cx.shelf.of::<Opened>().0.get_mut(&entry.pipe_id).unwrap();
        let (end, given) = match is_writer(entry.flags) {
            false => (&*reader, &mut is_given[0]),
            true => (&*writer, &mut is_given[1]),
        };
        if std::mem::replace(given, true) {
            return reopen(end, entry.flags).map_err(explain);
        }
        let fd = end.try_clone().map_err(|error| explain(sys::memory::io_errno("fcntl", &error)))?;
        set_status(&fd, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e PipeEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Records what is in a pipe or fifo, and its capacity.
pub fn save_content(
    probe: &FdProbe,
    pipe_id: u32,
    name: &'static str,
    kind: image::Kind,
    cx: &mut DumpCx,
) -> Result<(), Failure> {
    let explain = |error: Errno| probe.fail(error, "read what is in the pipe");
    // Both ends answer; only a read end can be read from, and any descriptor can be made one.
    let waiting = sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).map_err(explain)? as usize;
    let capacity = sys::fd::fcntl(&probe.fd, libc::F_GETPIPE_SZ, 0).map_err(explain)?;
    let (mut content, mut packets) = (Vec::new(), Vec::new());
    if waiting > 0 {
        let reader = reopen(&probe.fd, (libc::O_RDONLY | libc::O_NONBLOCK) as u32).map_err(explain)?;
        let (copy_reader, copy_writer) = sys::fd::pipe(libc::O_NONBLOCK).map_err(explain)?;
        sys::fd::fcntl(&copy_writer, libc::F_SETPIPE_SZ, capacity).map_err(explain)?;
        let count = sys::fd::tee(&reader, &copy_writer, waiting).map_err(explain)?;
        content.resize(count, 0);
        let mut filled = 0;
        // One packet at a time, if there are any; else all at once.
        while filled < count {
            let packet = sys::fd::read(&copy_reader, &mut content[filled..]).map_err(explain)?;
            packets.push(packet as u32);
            filled += packet;
        }
        if packets.len() == 1 {
            packets.clear();
        }
        if count < waiting {
            return Err(probe.refuse(format!("holds {waiting} bytes, of which {count} could be copied")));
        }
    }
    let entry = PipeDataEntry { pipe_id, bytes: content.len() as u32, size: Some(capacity as u32), packets };
    cx.image(name, kind).record(&entry).payload(&content);
    Ok(())
}

/// Capacity and bytes of one pipe, and the lengths of its packets if they are several.
type Content = (Option<u32>, Vec<u8>, Vec<u32>);

/// What `pipes-data.img` or `fifo-data.img` holds, read once.
#[derive(Debug, Default)]
struct Contents {
    by_name: HashMap<&'static str, HashMap<u32, Content>>,
    used: HashSet<(&'static str, u32)>,
}

/// Puts into a new pipe what the dumped one held.
pub fn load_content(
    writer: impl AsFd,
    pipe_id: u32,
    name: &'static str,
    kind: image::Kind,
    cx: &mut OpenCx,
) -> Result<(), Failure> {
    if !cx.shelf.of::<Contents>().by_name.contains_key(name) {
        let mut contents = HashMap::new();
        if let Some(bytes) = cx.images.read(name)? {
            let mut reader = Reader::open(kind, name, &bytes)?;
            while let Some(entry) = reader.record::<PipeDataEntry>()? {
                let payload = reader.payload(entry.bytes as usize)?.to_vec();
                if !entry.packets.is_empty()
                    && entry.packets.iter().map(|length| u64::from(*length)).sum::<u64>() != u64::from(entry.bytes)
                {
                    return Err(reader.corrupt("has packets that are not its bytes".into()));
                }
                contents.insert(entry.pipe_id, (entry.size, payload, entry.packets));
            }
        }
        cx.shelf.of::<Contents>().by_name.insert(name, contents);
    }
    let contents = cx.shelf.of::<Contents>();
    if !contents.used.insert((name, pipe_id)) {
        return Ok(());
    }
    let Some((capacity, content, packets)) = contents.by_name[name].get(&pipe_id) else { return Ok(()) };
    let explain = |error: Errno| error.on(Object::Named(format!("pipe {pipe_id}")), "fill it");
    if let Some(capacity) = capacity {
        sys::fd::fcntl(&writer, libc::F_SETPIPE_SZ, *capacity as i32).map_err(explain)?;
    }
    let flags = sys::fd::status_flags(&writer).map_err(explain)?;
    set_status(&writer, flags | libc::O_NONBLOCK as u32).map_err(explain)?;
    let mut rest = &content[..];
    for packet in packets {
        let (packet, more) = rest.split_at(*packet as usize);
        sys::fd::write(&writer, packet).map_err(explain)?;
        rest = more;
    }
    while !rest.is_empty() {
        rest = &rest[sys::fd::write(&writer, rest).map_err(explain)?..];
    }
    set_status(&writer, flags).map_err(explain)
}
