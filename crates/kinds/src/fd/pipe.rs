//! pipe(2): bytes on their way from a write end to a read end.
//!
//! Read from: fstat(2) (the inode names the pipe), F_GETPIPE_SZ, and tee(2) to a pipe of our own, which
//! leaves the bytes where they are.
//! Rebuilt by: pipe2(2), F_SETPIPE_SZ, write(2) of the bytes; an end that was opened again by name is
//! opened again. An end that nobody holds is closed, so the other end sees what it saw before.
//! Not kept: boundaries of the kernel's buffers, other than those of packets (O_DIRECT).
//! Refused: a pipe whose other end a process outside the tree holds.

use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, reopen, set_new_status};
use image::{FdTypes, FownEntry, Reader, kind};
use model::{Errno, Failure, Failures, Object, Remedy};
use foldhash::{HashMap, HashMapExt, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

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
    fd: Arc<OwnedFd>,
    object: Object,
    pid: i32,
}

/// Pipes of a dump by inode.
#[derive(Debug, Default)]
struct Dumped(HashMap<u32, Ends>);

/// A pipe of a restore: both ends, of which each goes to one record; others open it again.
#[derive(Debug, Default)]
struct Both {
    ends: [Option<OwnedFd>; 2],
    /// Was it given to somebody?
    is_given: [bool; 2],
    /// Records that will open it again, and were not asked for yet.
    waiting: u32,
    /// It is written to in packets.
    has_packets: bool,
}

/// Was it opened by name? The kernel adds this flag for open(2).
fn is_opened(flags: u32) -> bool {
    /// Source: include/uapi/asm-generic/fcntl.h; the constant of libc is zero for programs of 64 bits.
    const O_LARGEFILE: u32 = 0o100_000;
    flags & O_LARGEFILE != 0
}

/// By `pipe_id`.
#[derive(Debug, Default)]
struct Opened(Option<HashMap<u32, Both>>);

impl Opened {
    fn of(&mut self, pipe_id: u32, files: &FileTable) -> &mut Both {
        let all = self.0.get_or_insert_with(|| {
            let mut all: HashMap<u32, Both> = HashMap::new();
            for end in files.entries::<Pipe>() {
                let both = all.entry(end.pipe_id).or_default();
                let is_made = &mut both.is_given[usize::from(is_writer(end.flags))];
                if is_opened(end.flags) || std::mem::replace(is_made, true) {
                    both.waiting += 1;
                }
                both.has_packets |= end.flags & libc::O_DIRECT as u32 != 0;
            }
            all.values_mut().for_each(|both| both.is_given = [false; 2]);
            all
        });
        all.entry(pipe_id).or_default()
    }
}

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
        let seen = Seen { fd: probe.fd.clone(), object: probe.object(), pid: probe.pid };
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

    fn group(&self, entry: &PipeEntry, _files: &FileTable) -> Option<u64> {
        Some(entry.pipe_id.into())
    }

    fn open(&self, entry: &PipeEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: Errno| error.on(Object::Named(format!("pipe {}", entry.pipe_id)), "make it");
        let files = cx.files;
        let both = cx.shelf.of::<Opened>().of(entry.pipe_id, files);
        let made = if both.has_packets { libc::O_DIRECT } else { 0 };
        if both.ends.iter().all(Option::is_none) {
            let (reader, writer) = sys::fd::pipe(made).map_err(explain)?;
            load_content(&writer, made, entry.pipe_id, "pipes-data.img", kind::PIPES_DATA, cx)?;
            cx.shelf.of::<Opened>().of(entry.pipe_id, files).ends = [Some(reader), Some(writer)];
        }
        let both = cx.shelf.of::<Opened>().of(entry.pipe_id, files);
        let nth = usize::from(is_writer(entry.flags));
        const GONE: Errno = Errno { call: "pipe", code: libc::EBADF };
        let end = both.ends[nth].as_ref().ok_or(GONE).map_err(explain)?;
        if is_opened(entry.flags) || std::mem::replace(&mut both.is_given[nth], true) {
            both.waiting = both.waiting.saturating_sub(1);
            return reopen(end, entry.flags).map_err(explain);
        }
        let own = match both.waiting {
            0 => both.ends[nth].take().ok_or(GONE),
            _ => end.try_clone().map_err(|error| sys::memory::io_errno("fcntl", &error)),
        };
        let own = own.map_err(explain)?;
        set_new_status(&own, made, entry.flags).map_err(explain)?;
        Ok(own)
    }

    fn owner<'e>(&self, entry: &'e PipeEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}

/// Where contents are copied to, with its capacity: empty between two of them.
#[derive(Debug, Default)]
struct Copy(Option<(OwnedFd, OwnedFd, i32)>);

impl Copy {
    /// A pipe that takes what one of this capacity holds.
    fn with(&mut self, capacity: i32) -> Result<(OwnedFd, OwnedFd, i32), Errno> {
        if let Some(known) = self.0.take_if(|known| known.2 >= capacity) {
            return Ok(known);
        }
        let (reader, writer) = sys::fd::pipe(libc::O_NONBLOCK)?;
        sys::fd::fcntl(&writer, libc::F_SETPIPE_SZ, capacity)?;
        Ok((reader, writer, capacity))
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
    // Both ends answer; only a read end can be read from, and any descriptor can be opened as one.
    let waiting = sys::fd::ioctl_read(&probe.fd, libc::FIONREAD).map_err(explain)? as usize;
    let capacity = sys::fd::fcntl(&probe.fd, libc::F_GETPIPE_SZ, 0).map_err(explain)?;
    let (mut content, mut packets) = (Vec::new(), Vec::new());
    if waiting > 0 {
        let copy = cx.shelf.of::<Copy>().with(capacity).map_err(explain)?;
        let count = match probe.flags as i32 & libc::O_ACCMODE {
            libc::O_RDONLY => sys::fd::tee(&probe.fd, &copy.1, waiting),
            _ => reopen(&probe.fd, (libc::O_RDONLY | libc::O_NONBLOCK) as u32)
                .and_then(|reader| sys::fd::tee(&reader, &copy.1, waiting)),
        };
        let count = count.map_err(explain)?;
        content.resize(count, 0);
        let mut filled = 0;
        // One packet at a time, if there are any; else all at once.
        while filled < count {
            let packet = sys::fd::read(&copy.0, &mut content[filled..]).map_err(explain)?;
            packets.push(packet as u32);
            filled += packet;
        }
        if packets.len() == 1 {
            packets.clear();
        }
        if count < waiting {
            return Err(probe.refuse(format!("holds {waiting} bytes, of which {count} could be copied")));
        }
        cx.shelf.of::<Copy>().0 = Some(copy);
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

/// Puts into a pipe that was opened with these flags what the dumped one held.
pub fn load_content(
    writer: impl AsFd,
    flags: i32,
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
    let mut now = sys::fd::fcntl(&writer, libc::F_GETPIPE_SZ, 0).map_err(explain)?;
    if let Some(capacity) = capacity.map(|capacity| capacity as i32).filter(|capacity| *capacity != now) {
        now = sys::fd::fcntl(&writer, libc::F_SETPIPE_SZ, capacity).map_err(explain)?;
    }
    // Never a wait for somebody who reads.
    let is_sure = packets.is_empty() && content.len() <= usize::try_from(now).unwrap_or(0);
    if !is_sure {
        set_new_status(&writer, flags, (flags | libc::O_NONBLOCK) as u32).map_err(explain)?;
    }
    let mut rest = &content[..];
    for packet in packets {
        let (packet, more) = rest.split_at(*packet as usize);
        sys::fd::write(&writer, packet).map_err(explain)?;
        rest = more;
    }
    while !rest.is_empty() {
        rest = &rest[sys::fd::write(&writer, rest).map_err(explain)?..];
    }
    if is_sure {
        return Ok(());
    }
    set_new_status(&writer, flags | libc::O_NONBLOCK, flags as u32).map_err(explain)
}
