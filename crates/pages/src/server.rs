//! Pages over a connection: the protocol of CRIU's page server, both ends.
//!
//! A header with a command, a number of pages, an address, and the object that it is about; after some commands the
//! pages. CRIU up to 4.1 has headers of 24 bytes, later ones of 32; they do not tell each other which. The first
//! command is about an object, with no pages and no address, so the server sees from the place of the object which it is.
//! Who sends begins with a question in 24 bytes: a server that knows those answers, and so does ours; one that does not
//! waits for the rest, and gets it after a moment.
//!
//! Between two of us pages may come in compressed blocks, if the one who sends has asked before whether the other
//! understands that; CRIU ends at such a question.

use crate::chain::{Chain, PARENT_LINK};
use crate::compressed::{self, Packing};
use crate::take::{Job, Owner, RANGES, Read, pages_name};
use crate::tls::Securing;
use image::Dir;
use image::pagemap::{LAZY, PAGE, PARENT, PRESENT, Pagemap, PagesFile, Run};
use model::{Compression, Errno, Failure, Object, Options, Remedy};
use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

const OPEN2: u16 = 4;
const PARENT_EXISTS: u16 = 5;
pub(crate) const ADD_F: u16 = 6;
pub(crate) const CLOSE: u16 = 0x1023;
pub(crate) const FORCE_CLOSE: u16 = 0x1024;

/// "Do you understand blocks that are compressed in this way?" (in the place of flags); the answer is a zero of four bytes.
const ASK_BLOCKS: u16 = 0x2002;
/// A block: the way in the place of flags, ranges in that of pages, its length in that of the address. Each range as its
/// address and its pages, then the block.
const BLOCK: u16 = 0x2003;

/// The answer of our own server to the question for images before of a process that has no number: CRIU says 0.
const OURS: i32 = 2;

/// Types of objects.
const OF_TASK: u64 = 1;
const OF_SHARED: u64 = 2;
/// A process that has no number.
const NOBODY: u64 = OF_TASK;
/// The same, as older versions number them.
const TASKS: [u64; 5] = [OF_TASK, 10, 11, 16, 17];
const SHARED: [u64; 7] = [OF_SHARED, 27, 28, 29, 32, 33, 34];

/// The first number of a pages file here: the dump itself numbers its own from 1.
const FIRST_ID: u32 = 0x10001;
/// Bytes that are received at a time.
const CHUNK: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    pub command: u16,
    pub flags: u16,
    pub pages: u64,
    pub address: u64,
    pub object: u64,
}

impl Header {
    pub fn bytes(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&self.command.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.pages.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.address.to_ne_bytes());
        bytes[24..].copy_from_slice(&self.object.to_ne_bytes());
        bytes
    }

    /// As CRIU up to 4.1 has it.
    pub fn short_bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let long = self.bytes();
        bytes[..4].copy_from_slice(&long[..4]);
        bytes[4..8].copy_from_slice(&(self.pages as u32).to_ne_bytes());
        bytes[8..].copy_from_slice(&long[16..]);
        bytes
    }

    /// Of 24 or 32 bytes.
    pub fn parse(bytes: &[u8]) -> Header {
        let half = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().expect("two bytes"));
        let word = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let (pages, rest) = match bytes.len() {
            24 => (u64::from(half(4)) | u64::from(half(6)) << 16, 8),
            _ => (word(8), 16),
        };
        Header { command: half(0), flags: half(2), pages, address: word(rest), object: word(rest + 8) }
    }
}

pub(crate) fn explain(doing: &'static str) -> impl Fn(io::Error) -> Failure {
    move |error| {
        let object = Object::Named("page server".into());
        match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::UnexpectedEof, _) => {
                Errno { call: "read", code: libc::ECONNRESET }.on(object, doing)
            }
            // What is wrong with encryption the kernel does not know.
            (_, None) => Failure::conflict(object, doing, error.to_string()),
            _ => sys::memory::io_errno("read", &error).on(object, doing),
        }
    }
}

pub(crate) fn wrong(why: String) -> Failure {
    Failure::conflict(Object::Named("page server".into()), "understand what is sent", why)
}

/// Both directions of a connection.
pub trait Connection: io::Read + io::Write + Send {
    /// What it goes over, if the kernel knows.
    fn socket(&self) -> Option<BorrowedFd<'_>>;
}

impl Connection for TcpStream {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Connection for File {
    fn socket(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

/// Has reads and writes end with `EAGAIN` now and then when nothing comes or goes, or wait as long as it takes.
pub(crate) fn look_up(connection: &dyn Connection, now_and_then: bool) {
    let micros = if now_and_then { TURN.as_micros() as u64 } else { 0 };
    let time = [0u64.to_ne_bytes(), micros.to_ne_bytes()].concat();
    for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        // Where that cannot be said, they wait as long as it takes.
        let _ = connection.socket().map(|fd| sys::socket::set_option(fd, libc::SOL_SOCKET, name, &time));
    }
}

/// How often it is asked whether to go on, while nothing comes.
const TURN: Duration = Duration::from_millis(500);

/// A connection that whoever started this program has made (`--ps-socket`).
fn inherited(number: i32) -> Result<Box<dyn Connection>, Failure> {
    let object = || Object::Named(format!("--ps-socket {number}"));
    let fd = sys::inherited::duplicate(number).map_err(|error| error.on(object(), "use the connection"))?;
    tend(&fd);
    Ok(Box::new(File::from(fd)))
}

fn place(host: &str, port: u16) -> Object {
    Object::Named(format!("page server at {host}:{port}"))
}

/// Connects to a server, as the options say.
///
/// # Errors
/// When it cannot be reached.
pub fn connect(options: &Options) -> Result<Box<dyn Connection>, Failure> {
    let securing = Securing::client(options)?;
    let connection = reach(options)?;
    match securing {
        Some(securing) => securing.secure(connection, &|| Ok(())),
        None => Ok(connection),
    }
}

fn reach(options: &Options) -> Result<Box<dyn Connection>, Failure> {
    if let Some(fd) = options.ps_socket {
        return inherited(fd);
    }
    let (host, port) = (options.address.as_deref().unwrap_or("127.0.0.1"), options.port.unwrap_or(0));
    let stream = TcpStream::connect((host, port))
        .map_err(|error| sys::memory::io_errno("connect", &error).on(place(host, port), "reach it"))?;
    tend(&stream);
    Ok(Box::new(stream))
}

/// Headers are small, and answers are waited for; a host that is gone without a word is noticed after a minute or
/// two. What a socket of another sort does not know does not matter to it.
fn tend(socket: impl AsFd) {
    let word = |value: i32| value.to_ne_bytes();
    let _ = sys::socket::set_option(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, &word(1));
    for (name, value) in
        [(libc::TCP_NODELAY, 1), (libc::TCP_KEEPIDLE, 30), (libc::TCP_KEEPINTVL, 10), (libc::TCP_KEEPCNT, 6)]
    {
        let _ = sys::socket::set_option(&socket, libc::IPPROTO_TCP, name, &word(value));
    }
}

/// Where the other end comes in.
pub struct Door {
    way: Way,
    securing: Option<Securing>,
}

enum Way {
    Listener(TcpListener, Object),
    /// It is there already.
    Inherited(Box<dyn Connection>),
}

impl Door {
    /// Waits where the options say.
    ///
    /// # Errors
    /// When it cannot.
    pub fn open(options: &Options) -> Result<Door, Failure> {
        let securing = Securing::server(options)?;
        if let Some(fd) = options.ps_socket {
            return Ok(Door { way: Way::Inherited(inherited(fd)?), securing });
        }
        let (host, port) = (options.address.as_deref().unwrap_or("0.0.0.0"), options.port.unwrap_or(0));
        let listener = TcpListener::bind((host, port))
            .map_err(|error| sys::memory::io_errno("bind", &error).on(place(host, port), "wait there"))?;
        if let Ok(address) = listener.local_addr() {
            log::info!("page server waits at {address}");
        }
        Ok(Door { way: Way::Listener(listener, place(host, port)), securing })
    }

    /// Waits for the other end, as long as `go_on` says so.
    ///
    /// # Errors
    /// That of `go_on`, or of accept(2); that it is not to be trusted.
    pub fn accept(self, go_on: &dyn Fn() -> Result<(), Failure>) -> Result<Box<dyn Connection>, Failure> {
        let connection = self.way.accept(go_on)?;
        let Some(securing) = self.securing else { return Ok(connection) };
        look_up(&*connection, true);
        let secured = securing.secure(connection, go_on)?;
        look_up(&*secured, false);
        Ok(secured)
    }
}

impl Way {
    fn accept(self, go_on: &dyn Fn() -> Result<(), Failure>) -> Result<Box<dyn Connection>, Failure> {
        let (listener, place) = match self {
            Way::Listener(listener, place) => (listener, place),
            Way::Inherited(connection) => return Ok(connection),
        };
        let explain = |error: Errno| error.on(place.clone(), "wait for somebody to come");
        while sys::fd::poll(&[listener.as_fd()], TURN.as_millis() as i32).map_err(explain)? != [true] {
            go_on()?;
        }
        let (stream, from) =
            listener.accept().map_err(|error| explain(sys::memory::io_errno("accept", &error)))?;
        log::info!("{from} has come");
        tend(&stream);
        Ok(Box::new(stream))
    }
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Door")
    }
}

// ------------------------------------------------------------------------------------------ receiving

/// Receives pages into a folder until the other end says that it has sent all. `parent` are the images before, if
/// there are some. What comes as it is is compressed, if that is wished. Returns how many pages came.
///
/// # Errors
/// When the other end says something that is none of this, or leaves early; what was written is to be discarded.
pub fn receive(
    connection: &mut dyn Connection,
    dir: &Dir,
    parent: Option<&Chain>,
    compression: Option<Compression>,
) -> Result<u64, Failure> {
    let read = explain("receive pages");
    let mut first = [0; 24];
    connection.read_exact(&mut first).map_err(&read)?;
    // The newer header has the address there, which is none in the first command.
    let is_long = first[16..] == [0; 8];
    let mut receiving = Receiving { dir, parent, compression, next_id: FIRST_ID, open: None, pages: 0 };
    let mut given = Some(first);
    loop {
        let mut bytes = [0; 32];
        let start = match given.take() {
            Some(first) => {
                bytes[..24].copy_from_slice(&first);
                24
            }
            None => 0,
        };
        let length = if is_long { 32 } else { 24 };
        connection.read_exact(&mut bytes[start..length]).map_err(&read)?;
        let header = Header::parse(&bytes[..length]);
        match header.command {
            OPEN2 => {
                let has_parent = receiving.open(header.object)?;
                connection.write_all(&[has_parent.into()]).map_err(&read)?;
            }
            PARENT_EXISTS => {
                let answer = match header.object {
                    NOBODY => OURS,
                    object => receiving.before(&name_of(object)?)?.is_some().into(),
                };
                connection.write_all(&answer.to_ne_bytes()).map_err(&read)?;
            }
            ADD_F => receiving.add(connection, &header)?,
            ASK_BLOCKS => {
                // What is asked is whether it is known at all.
                let is_known = compressed::by_number(header.flags.into()).is_some();
                connection.write_all(&i32::from(!is_known).to_ne_bytes()).map_err(&read)?;
            }
            BLOCK => receiving.add_block(connection, &header)?,
            CLOSE | FORCE_CLOSE => {
                receiving.close()?;
                connection.write_all(&0i32.to_ne_bytes()).map_err(&read)?;
                return Ok(receiving.pages);
            }
            other => return Err(wrong(format!("{other:#x} is no command of this server"))),
        }
        connection.flush().map_err(&read)?;
    }
}

fn name_of(object: u64) -> Result<String, Failure> {
    let (id, kind) = (object >> 8, object & 0xff);
    match kind {
        kind if TASKS.contains(&kind) => Ok(Owner::Task(i32::try_from(id).unwrap_or(0)).pagemap()),
        kind if SHARED.contains(&kind) => Ok(Owner::Shared(id).pagemap()),
        kind => Err(wrong(format!("{kind} is no type of memory"))),
    }
}

struct Receiving<'d> {
    dir: &'d Dir,
    parent: Option<&'d Chain>,
    compression: Option<Compression>,
    next_id: u32,
    open: Option<Open>,
    pages: u64,
}

/// An object whose pages come.
struct Open {
    name: String,
    id: u32,
    /// Once pages came.
    store: Option<Store>,
    runs: Vec<Run>,
    /// What the images before have of it.
    before: Vec<Run>,
}

/// A pages file that grows.
enum Store {
    Plain(File, u64),
    Packed(Packing),
}

impl Store {
    fn new(dir: &Dir, id: u32, compression: Option<Compression>) -> Result<Store, Failure> {
        let (plain, packed) = (pages_name(id), compressed::name(id));
        let explain = |error: io::Error| failed_write(id, &error);
        match compression {
            None => {
                dir.remove(&packed)?;
                Ok(Store::Plain(dir.create(&plain)?, 0))
            }
            Some(how) => {
                dir.remove(&plain)?;
                Ok(Store::Packed(Packing::new(dir.create(&packed)?, how).map_err(explain)?))
            }
        }
    }

    fn add(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Store::Plain(file, length) => {
                file.write_all_at(bytes, *length)?;
                *length += bytes.len() as u64;
                Ok(())
            }
            Store::Packed(packing) => packing.add(bytes),
        }
    }
}

fn failed_write(id: u32, error: &io::Error) -> Failure {
    sys::memory::io_errno("pwrite", error).on(Object::Path(pages_name(id)), "write pages")
}

impl Receiving<'_> {
    fn before(&self, name: &str) -> Result<Option<Vec<Run>>, Failure> {
        let Some(parent) = self.parent.filter(|parent| parent.newest().has(name)) else { return Ok(None) };
        Ok(Some(parent.load(name)?.runs))
    }

    fn open(&mut self, object: u64) -> Result<bool, Failure> {
        self.close()?;
        let name = name_of(object)?;
        let before = self.before(&name)?;
        let id = self.next_id;
        self.next_id += 1;
        let has_parent = before.is_some();
        let before = before.unwrap_or_default();
        self.open = Some(Open { name, id, store: None, runs: Vec::new(), before });
        Ok(has_parent)
    }

    fn close(&mut self) -> Result<(), Failure> {
        let Some(open) = self.open.take() else { return Ok(()) };
        match open.store {
            Some(Store::Packed(packing)) => {
                packing.finish().map_err(|error| failed_write(open.id, &error))?
            }
            Some(Store::Plain(..)) => {}
            // A page map without pages names a file all the same.
            None => drop(Store::new(self.dir, open.id, None)?),
        }
        let pagemap = Pagemap { pages_id: open.id, runs: open.runs, is_old: false };
        self.dir.write(&open.name, &pagemap.encode())
    }

    fn add(&mut self, connection: &mut dyn Connection, header: &Header) -> Result<(), Failure> {
        let read = explain("receive pages");
        let open = self.open.as_mut().ok_or_else(|| wrong("pages of nothing".into()))?;
        // Pages in a form of a later version must not be taken for plain ones.
        let unknown = u32::from(header.flags) & !(PARENT | LAZY | PRESENT);
        if unknown != 0 {
            return Err(wrong(format!("pages with the flags {unknown:#x}, which are not known here")));
        }
        let range = open.next(header.address, header.pages)?;
        if u32::from(header.flags) & PRESENT == 0 {
            if u32::from(header.flags) & PARENT != 0 {
                open.keep(range);
            }
            return Ok(());
        }
        if open.store.is_none() {
            open.store = Some(Store::new(self.dir, open.id, self.compression)?);
        }
        let mut left = range.end - range.start;
        let mut buffer = vec![0; CHUNK.min(left as usize)];
        while left > 0 {
            let part = &mut buffer[..(left as usize).min(CHUNK)];
            connection.read_exact(part).map_err(&read)?;
            let added = open.store.as_mut().map_or(Ok(()), |store| store.add(part));
            added.map_err(|error| failed_write(open.id, &error))?;
            left -= part.len() as u64;
        }
        self.pages += header.pages;
        open.add(range);
        Ok(())
    }

    fn add_block(&mut self, connection: &mut dyn Connection, header: &Header) -> Result<(), Failure> {
        let read = explain("receive pages");
        let open = self.open.as_mut().ok_or_else(|| wrong("a block of nothing".into()))?;
        let how = compressed::by_number(header.flags.into())
            .ok_or_else(|| wrong(format!("a block that is compressed in the way {}", header.flags)))?;
        let (ranges, length) = (header.pages as usize, header.address as usize);
        if ranges > RANGES || length > 2 * compressed::BLOCK {
            return Err(wrong(format!("a block of {ranges} ranges and {length} bytes")));
        }
        let mut told = vec![0; ranges * 16];
        connection.read_exact(&mut told).map_err(&read)?;
        let mut content = 0;
        for range in told.chunks_exact(16) {
            let word = |at: usize| u64::from_ne_bytes(range[at..at + 8].try_into().expect("eight bytes"));
            let range = open.next(word(0), word(8))?;
            content += range.end - range.start;
            if content > compressed::BLOCK as u64 {
                return Err(wrong("a block that is too long".into()));
            }
            open.add(range);
        }
        let mut packed = vec![0; length];
        connection.read_exact(&mut packed).map_err(&read)?;
        // It is kept as it came; that it can be unpacked is better known now than later.
        if !compressed::fills(how, &packed, &mut vec![0; content as usize]) {
            return Err(wrong("a damaged block".into()));
        }
        if open.store.is_none() {
            open.store = Some(Store::new(self.dir, open.id, Some(how))?);
        }
        match &mut open.store {
            Some(Store::Packed(packing)) if packing.how() == how => {
                let put = packing.block(&packed, content as u32);
                put.map_err(|error| failed_write(open.id, &error))?;
            }
            _ => return Err(wrong("a block among pages of another sort".into())),
        }
        self.pages += content / PAGE;
        Ok(())
    }
}

impl Open {
    /// So many pages from an address on, which come next.
    fn next(&self, address: u64, pages: u64) -> Result<Range<u64>, Failure> {
        let last = self.runs.last().map_or(0, |run| run.range.end);
        let end = pages.checked_mul(PAGE).and_then(|length| address.checked_add(length));
        end.filter(|_| address.is_multiple_of(PAGE) && address >= last)
            .map(|end| address..end)
            .ok_or_else(|| wrong(format!("{pages} pages at {address:#x} are no run in order")))
    }

    /// Pages that are here.
    fn add(&mut self, range: Range<u64>) {
        let file = PagesFile { layer: 0, id: self.id };
        self.push(Run { range, flags: PRESENT, offset: 0, file, same_as: None });
    }

    /// Pages that have not changed. One that is not in the images before was zero then, and still is.
    fn keep(&mut self, range: Range<u64>) {
        let (both, _) = crate::chain::split(&[(range, ())], |()| true, &self.before);
        both.into_iter().for_each(|range| self.push(Run::in_parent(range)));
    }

    /// Runs come in pieces.
    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last) if last.flags == run.flags && last.range.end == run.range.start => {
                last.range.end = run.range.end;
            }
            _ => self.runs.push(run),
        }
    }
}

/// Makes the link to the images before, and opens them. `name` is relative to `dir`.
///
/// # Errors
/// When there is no such folder.
pub fn link_parent(dir: &Dir, name: &std::path::Path) -> Result<Chain, Failure> {
    let chain = Chain::open(&Dir::open(&dir.path().join(name))?)?;
    dir.link(PARENT_LINK, name)?;
    Ok(chain)
}

// -------------------------------------------------------------------------------------------- sending

fn object(owner: Owner) -> u64 {
    match owner {
        Owner::Task(pid) => (pid as u64) << 8 | OF_TASK,
        Owner::Shared(id) => id << 8 | OF_SHARED,
    }
}

/// A server that pages go to. It is to be told when that was all: [`Receiver::close`].
pub struct Receiver {
    connection: Box<dyn Connection>,
    /// It reads headers of 24 bytes.
    is_short: bool,
    /// It is one of ours.
    is_ours: bool,
    /// Pages go to it in blocks that are compressed so.
    compression: Option<Compression>,
}

impl Receiver {
    /// Finds out what a server understands. With `compression` it is to understand blocks.
    ///
    /// # Errors
    /// When it is gone, or does not understand what it has to.
    pub fn new(
        connection: Box<dyn Connection>,
        compression: Option<Compression>,
    ) -> Result<Receiver, Failure> {
        let mut receiver = Receiver { connection, is_short: true, is_ours: false, compression };
        receiver.find_size().map_err(explain("find out what the server understands"))?;
        if let Some(how) = compression {
            receiver.ask_for_blocks(how)?;
        }
        Ok(receiver)
    }

    /// Asks whether there are images before of nobody.
    fn find_size(&mut self) -> io::Result<()> {
        let question = Header { command: PARENT_EXISTS, object: NOBODY, ..Header::default() };
        self.connection.write_all(&question.short_bytes())?;
        self.connection.flush()?;
        let mut answer = [0; 4];
        look_up(&*self.connection, true);
        let answered = self.connection.read(&mut answer[..1]);
        look_up(&*self.connection, false);
        match answered {
            Ok(1) => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                // The object of a long header. To one who was only slow it is the beginning of a command that is none.
                self.is_short = false;
                self.connection.write_all(&object(Owner::Task(0xff)).to_ne_bytes())?;
                self.connection.flush()?;
                self.connection.read_exact(&mut answer[..1])?;
            }
            Err(error) => return Err(error),
        }
        self.connection.read_exact(&mut answer[1..])?;
        self.is_ours = i32::from_ne_bytes(answer) == OURS;
        Ok(())
    }

    fn ask_for_blocks(&mut self, how: Compression) -> Result<(), Failure> {
        let flags = compressed::number(how) as u16;
        let asked = self
            .say(Header { command: ASK_BLOCKS, flags, ..Header::default() })
            .and_then(|()| self.connection.flush());
        let mut answer = [0; 4];
        match asked.and_then(|()| self.connection.read_exact(&mut answer)) {
            Ok(()) if i32::from_ne_bytes(answer) == 0 => Ok(()),
            _ => {
                let why = "it does not understand compressed pages";
                let advice = "--compress is for a page server of crtools; CRIU's takes pages as they are";
                let object = Object::Named("page server".into());
                Err(Failure::conflict(object, "", why).help(Remedy::Advice(advice)))
            }
        }
    }

    fn say(&mut self, header: Header) -> io::Result<()> {
        match self.is_short {
            true => self.connection.write_all(&header.short_bytes()),
            false => self.connection.write_all(&header.bytes()),
        }
    }

    fn send_block(
        &mut self,
        how: Compression,
        object: u64,
        ranges: &[Range<u64>],
        bytes: &[u8],
    ) -> Result<(), Failure> {
        let packed = compressed::compress(how, bytes)
            .map_err(|error| error.on(Object::Named("page server".into()), "compress pages"))?;
        let (pages, address) = (ranges.len() as u64, packed.len() as u64);
        let words = ranges.iter().flat_map(|range| [range.start, (range.end - range.start) / PAGE]);
        let told: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        self.say(Header { command: BLOCK, flags: compressed::number(how) as u16, pages, address, object })
            .and_then(|()| self.connection.write_all(&told))
            .and_then(|()| self.connection.write_all(&packed))
            .map_err(explain("send pages"))
    }

    /// Sends what a job says, while other threads read what comes next. Clean pages are only named when the server
    /// has images before. CRIU has to have each of those there, so it also gets pages of zeros. Returns how many pages were
    /// sent.
    ///
    /// # Errors
    /// When they cannot be read, or the server is gone.
    pub fn send(&mut self, job: &Job) -> Result<u64, Failure> {
        self.say(Header { command: OPEN2, object: object(job.owner), ..Header::default() })
            .map_err(explain("send pages"))?;
        let mut has_parent = [0];
        self.connection.read_exact(&mut has_parent).map_err(explain("ask the server"))?;
        let is_kept = |is_clean: bool| is_clean && has_parent == [1];
        let mut sent = 0;
        let keeps_zeros = !self.is_ours;
        crate::take::read_in_order(job, keeps_zeros, &is_kept, &mut |part: Read| {
            let add = |flags: u32, range: &Range<u64>| Header {
                command: ADD_F,
                flags: flags as u16,
                pages: (range.end - range.start) / PAGE,
                address: range.start,
                object: object(job.owner),
            };
            match part {
                Read::Kept(range) => self.say(add(PARENT, &range)).map_err(explain("send pages")),
                Read::Pages(_, []) => Ok(()),
                Read::Pages(ranges, mut bytes) => {
                    if let Some(how) = self.compression {
                        sent += bytes.len() as u64 / PAGE;
                        return self.send_block(how, object(job.owner), &ranges, bytes);
                    }
                    for range in ranges {
                        let (pages, rest) = bytes.split_at((range.end - range.start) as usize);
                        self.say(add(PRESENT, &range))
                            .and_then(|()| self.connection.write_all(pages))
                            .map_err(explain("send pages"))?;
                        sent += (range.end - range.start) / PAGE;
                        bytes = rest;
                    }
                    Ok(())
                }
            }
        })?;
        Ok(sent)
    }

    /// Says that this was all, and waits until the server has it.
    ///
    /// # Errors
    /// When the server could not keep it.
    pub fn close(&mut self) -> Result<(), Failure> {
        self.say(Header { command: CLOSE, ..Header::default() })
            .and_then(|()| self.connection.flush())
            .map_err(explain("send pages"))?;
        let mut status = [0; 4];
        self.connection.read_exact(&mut status).map_err(explain("hear whether all has come"))?;
        match i32::from_ne_bytes(status) {
            0 => Ok(()),
            status => Err(wrong(format!("the server could not keep the pages: {status}"))),
        }
    }
}

impl std::fmt::Debug for Receiver {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Receiver")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes, and what was answered.
    struct Line(io::Cursor<Vec<u8>>, Vec<u8>);

    impl io::Read for Line {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl io::Write for Line {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Connection for Line {
        fn socket(&self) -> Option<BorrowedFd<'_>> {
            None
        }
    }

    fn conversation(encode: fn(Header) -> Vec<u8>) -> Vec<u8> {
        let object = object(Owner::Task(7));
        let open = Header { command: OPEN2, object, ..Header::default() };
        let add = Header { command: ADD_F, flags: PRESENT as u16, pages: 2, address: 0x5000, object };
        let kept = Header { flags: PARENT as u16, address: 0x9000, ..add };
        let close = Header { command: CLOSE, ..Header::default() };
        [encode(open), encode(add), vec![9; 8192], encode(kept), encode(close)].concat()
    }

    fn receive_into(name: &str, bytes: Vec<u8>) -> (Result<u64, Failure>, Option<Vec<u8>>, Vec<u8>) {
        let path = std::env::temp_dir().join(format!("crtools-server-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let dir = Dir::open(&path).unwrap();
        let mut line = Line(io::Cursor::new(bytes), Vec::new());
        let result = receive(&mut line, &dir, None, None);
        let pages = dir.read("pages-65537.img").unwrap();
        std::fs::remove_dir_all(&path).unwrap();
        (result, pages, line.1)
    }

    #[test]
    fn both_sizes_of_headers_are_understood() {
        for (name, encode) in [
            ("long", (|header: Header| header.bytes().to_vec()) as fn(Header) -> Vec<u8>),
            ("short", |header| header.short_bytes().to_vec()),
        ] {
            let (result, pages, answers) = receive_into(name, conversation(encode));
            assert_eq!(result.unwrap(), 2, "{name}");
            assert_eq!(pages, Some(vec![9; 8192]));
            assert_eq!(answers, [0, 0, 0, 0, 0]);
        }
    }

    fn pair() -> (File, File) {
        let (one, other) = sys::socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        (File::from(one), File::from(other))
    }

    fn block(ranges: &[Range<u64>], content: &[u8]) -> Vec<u8> {
        let (here, mut there) = pair();
        let mut receiver =
            Receiver { connection: Box::new(here), is_short: false, is_ours: true, compression: None };
        receiver.send_block(Compression::Lz4, object(Owner::Task(7)), ranges, content).unwrap();
        drop(receiver);
        let mut said = Vec::new();
        io::Read::read_to_end(&mut there, &mut said).unwrap();
        said
    }

    /// A server that reads headers of so many bytes, answers the first, and tells what it got and how many bytes came as
    /// the second.
    fn serve(mut there: File, length: usize) -> (Header, Header) {
        use io::{Read, Write};
        let mut header = || {
            let mut bytes = vec![0; length];
            there.read_exact(&mut bytes).unwrap();
            let header = Header::parse(&bytes);
            there.write_all(if header.command == PARENT_EXISTS { &[0; 4] } else { &[] }).unwrap();
            header
        };
        (header(), header())
    }

    #[test]
    fn headers_are_of_the_size_that_the_server_reads() {
        for length in [24, 32] {
            let (here, there) = pair();
            let server = std::thread::spawn(move || serve(there, length));
            let mut receiver = Receiver::new(Box::new(here), None).unwrap();
            assert_eq!((receiver.is_short, receiver.is_ours), (length == 24, false));
            let add = Header { command: ADD_F, flags: 4, pages: 3, address: 0x5000, object: 0x701 };
            receiver.say(add).unwrap();
            let (question, second) = server.join().unwrap();
            assert_eq!((question.command, question.object & 0xff, second), (PARENT_EXISTS, OF_TASK, add));
        }
    }

    #[test]
    fn our_own_server_takes_short_headers() {
        let path = std::env::temp_dir().join(format!("crtools-server-own-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let dir = Dir::open(&path).unwrap();
        let (here, mut there) = pair();
        let server = std::thread::spawn(move || receive(&mut there, &dir, None, None).unwrap());
        let mut receiver = Receiver::new(Box::new(here), Some(Compression::Zstd)).unwrap();
        assert!(receiver.is_short && receiver.is_ours);
        receiver.close().unwrap();
        assert_eq!(server.join().unwrap(), 0);
        std::fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn a_server_that_is_gone_is_an_error() {
        let (here, there) = pair();
        drop(there);
        assert!(Receiver::new(Box::new(here), None).is_err());
    }

    #[test]
    fn blocks_are_kept_as_they_come_and_pages_are_compressed_if_that_is_wished() {
        let object = object(Owner::Task(7));
        let say = |command, flags| Header { command, flags, object, ..Header::default() }.bytes().to_vec();
        let content: Vec<u8> = (0..3 * 4096u32).map(|at| (at / 4096) as u8 + 1).collect();
        let ranges = [0x5000..0x7000, 0x9000..0xa000];
        let blocks = [say(OPEN2, 0), say(ASK_BLOCKS, 1), say(ASK_BLOCKS, 9), block(&ranges, &content)];
        let plain = conversation(|header| header.bytes().to_vec());
        for (name, bytes, wish, answers) in [
            (
                "blocks",
                [blocks.concat(), say(CLOSE, 0)].concat(),
                None,
                &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0][..],
            ),
            ("wished", plain, Some(Compression::Zstd), &[0; 5]),
        ] {
            let path = std::env::temp_dir().join(format!("crtools-server-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            let dir = Dir::open(&path).unwrap();
            let mut line = Line(io::Cursor::new(bytes), Vec::new());
            let result = receive(&mut line, &dir, None, wish);
            let chain = Chain::open(&dir).unwrap();
            let runs = chain.load("pagemap-7.img").map(|map| map.runs);
            let has_plain = dir.has("pages-65537.img");
            let read = chain.open_pages(PagesFile { layer: 0, id: 65537 }).map(|mut file| {
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut file, &mut bytes).unwrap();
                bytes
            });
            std::fs::remove_dir_all(&path).unwrap();
            assert_eq!((line.1.as_slice(), has_plain), (answers, false), "{name}");
            match wish {
                None => {
                    assert!(result.unwrap() == 3 && read.unwrap() == content);
                    let found: Vec<Range<u64>> = runs.unwrap().into_iter().map(|run| run.range).collect();
                    assert_eq!(found, ranges);
                }
                Some(_) => assert!(result.unwrap() == 2 && read.unwrap() == [9; 8192]),
            }
        }
    }

    #[test]
    fn blocks_that_are_none_are_errors() {
        let open = Header { command: OPEN2, object: object(Owner::Task(7)), ..Header::default() }.bytes();
        let good = block(&[0x5000..0x6000, 0x7000..0x8000], &[7; 8192]);
        let from = |at: usize, bytes: &[u8]| {
            let mut block = good.clone();
            block[at..at + bytes.len()].copy_from_slice(bytes);
            [&open[..], &block].concat()
        };
        let long = u64::MAX.to_ne_bytes();
        for (name, bytes) in [
            ("none-open", good.clone()),
            ("way", from(2, &9u16.to_ne_bytes())),
            ("ranges", from(8, &long)),
            ("length", from(16, &long)),
            ("place", from(32, &long)),
            ("pages", from(40, &long)),
            ("more-pages", from(40, &300u64.to_ne_bytes())),
            ("other-pages", from(40, &2u64.to_ne_bytes())),
            ("order", from(48, &0x1000u64.to_ne_bytes())),
            ("content", from(64, &[0xff; 8])),
            ("cut", [&open[..], &good[..good.len() - 1]].concat()),
        ] {
            assert!(receive_into(name, bytes).0.is_err(), "{name}");
        }
    }

    #[test]
    fn a_server_that_does_not_know_blocks_is_said_to() {
        let (here, there) = pair();
        // It reads the question as a command that is none.
        let server = std::thread::spawn(move || serve(there, 24));
        let failure = Receiver::new(Box::new(here), Some(Compression::Lz4)).unwrap_err().to_string();
        server.join().unwrap();
        assert!(failure.contains("does not understand compressed pages"), "{failure}");
    }

    #[test]
    fn an_end_without_a_word_and_nonsense_are_errors() {
        let whole = conversation(|header| header.bytes().to_vec());
        assert!(receive_into("cut", whole[..whole.len() - 32].to_vec()).0.is_err());
        assert!(receive_into("short-data", whole[..100].to_vec()).0.is_err());
        assert!(receive_into("empty", Vec::new()).0.is_err());
        let mut strange = whole.clone();
        strange[0] = 99;
        assert!(receive_into("strange", strange).0.is_err());
        let add = Header { command: ADD_F, flags: 4, pages: u64::MAX, address: 0x5000, object: 0x701 };
        let huge = [&whole[..32], &add.bytes()].concat();
        assert!(receive_into("huge", huge).0.is_err());
        let mut newer = whole.clone();
        newer[32 + 2] |= 8;
        let said = receive_into("newer", newer).0.unwrap_err().to_string();
        assert!(said.contains("the flags 0x8"), "{said}");
    }
}
