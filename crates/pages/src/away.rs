//! Pages that stay where a tree was dumped until its restore asks for them (post-copy): the dump that keeps them, and who
//! asks.
//!
//! They speak as a page server does: a request names a process, an address and a number of pages, the answer is a header
//! and that many pages or fewer. The one who asks ends it: with the word that all has come, or, which is ours, that the
//! tree was not restored and has its memory for itself again. CRIU's headers are of two sizes, as in [`crate::server`].
//! The dump sees it in the first question: in the longer header a small number is where the shorter one has the address.
//! Who asks sees it in the images: the versions with the longer one count pages in 64 bits there too.

use crate::lazy::Source;
use crate::server::{ADD_F, CLOSE, Connection, FORCE_CLOSE, Header, explain, look_up, wrong};
use image::pagemap::{LAZY, PAGE, PRESENT, Run};
use model::{Errno, Failure, Object};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

const GET: u16 = 7;
/// The tree was not restored. CRIU does not know it, and ends as at any word that it does not know.
const GIVE_BACK: u16 = 0x2001;
/// Pages of one answer.
const ANSWER: u64 = 1024;
/// Bytes that were asked for and are not used yet.
const IN_FLIGHT: u64 = 16 << 20;

// -------------------------------------------------------------------------------------------- keeping

/// Memory of frozen processes.
#[derive(Debug, Default)]
pub struct Kept(HashMap<i32, (File, Vec<Range<u64>>)>);

impl Kept {
    /// Adds ranges of one process, which are sorted.
    ///
    /// # Errors
    /// When its memory cannot be opened.
    pub fn add(&mut self, pid: i32, ranges: Vec<Range<u64>>) -> Result<(), Failure> {
        let memory = File::open(format!("/proc/{pid}/mem")).map_err(|error| {
            sys::memory::io_errno("open", &error).on(Object::Task, "keep its memory").of(pid)
        })?;
        self.0.insert(pid, (memory, ranges));
        Ok(())
    }

    /// How many pages that is.
    pub fn pages(&self) -> u64 {
        self.0.values().flat_map(|(_, ranges)| ranges).map(|range| (range.end - range.start) / PAGE).sum()
    }

    /// Pages from an address on: as many as are kept there, and as are asked for.
    fn read(&self, pid: i32, address: u64, pages: u64) -> Result<Vec<u8>, Failure> {
        let none = || wrong(format!("page {address:#x} of process {pid} is not kept for anybody"));
        let (memory, ranges) = self.0.get(&pid).ok_or_else(none)?;
        let at = ranges.partition_point(|range| range.end <= address);
        let range = ranges.get(at).filter(|range| range.start <= address).ok_or_else(none)?;
        let length = (range.end - address).min(pages.min(ANSWER) * PAGE);
        if length == 0 || !address.is_multiple_of(PAGE) {
            return Err(none());
        }
        let mut bytes = vec![0; length as usize];
        memory.read_exact_at(&mut bytes, address).map_err(|error| {
            sys::memory::io_errno("pread", &error).on(Object::Task, "read its memory").of(pid)
        })?;
        Ok(bytes)
    }
}

/// How it ended.
#[derive(Debug)]
pub enum Ended {
    /// Who asked has all that it wants, so many pages.
    Taken(u64),
    /// Nothing was asked for, or the tree was not restored. Why that is the end.
    Given(Failure),
    /// Pages are on the other side, and whether the tree runs there is not known.
    Torn(Failure),
}

/// Hands out pages, as long as `go_on` says so, until the other end has what it wants.
pub fn hand_out(
    connection: &mut dyn Connection,
    kept: &Kept,
    go_on: &dyn Fn() -> Result<(), Failure>,
) -> Ended {
    look_up(connection, true);
    let mut lending = Lending { connection, go_on, is_long: None, pages: 0 };
    match lending.turns(kept) {
        Ok(true) => Ended::Taken(lending.pages),
        Ok(false) => {
            let why = "the tree could not be restored there";
            Ended::Given(Failure::conflict(Object::Named("restore".into()), "hand the memory over", why))
        }
        Err(failure) if lending.pages == 0 => Ended::Given(failure),
        Err(failure) => Ended::Torn(failure),
    }
}

struct Lending<'c> {
    connection: &'c mut dyn Connection,
    go_on: &'c dyn Fn() -> Result<(), Failure>,
    /// The size of headers, once one has come.
    is_long: Option<bool>,
    pages: u64,
}

impl Lending<'_> {
    /// Returns whether the other end has all, or gives everything back.
    fn turns(&mut self, kept: &Kept) -> Result<bool, Failure> {
        loop {
            let header = self.header()?;
            match header.command {
                GET => {
                    let bytes = kept.read(header.object as i32, header.address, header.pages)?;
                    let pages = bytes.len() as u64 / PAGE;
                    let answer = Header { command: ADD_F, flags: PRESENT as u16, pages, ..header };
                    // From now on somebody may have it.
                    self.pages += pages;
                    match self.is_long {
                        Some(false) => self.write(&answer.short_bytes())?,
                        _ => self.write(&answer.bytes())?,
                    }
                    self.write(&bytes)?;
                }
                CLOSE | FORCE_CLOSE => {
                    // It has all; whether it hears of the end does not matter.
                    let _ = self.write(&0i32.to_ne_bytes());
                    return Ok(true);
                }
                GIVE_BACK => return Ok(false),
                other => return Err(wrong(format!("{other:#x} is no command of a dump that keeps memory"))),
            }
        }
    }

    fn header(&mut self) -> Result<Header, Failure> {
        let mut bytes = [0; 32];
        self.read(&mut bytes[..24])?;
        let command = Header::parse(&bytes[..24]).command;
        let second = u64::from_ne_bytes(bytes[8..16].try_into().expect("eight bytes"));
        match self.is_long {
            // What ends it says nothing else; more may not come.
            _ if command != GET => return Ok(Header { command, ..Header::default() }),
            None => self.is_long = Some(second < PAGE),
            Some(_) => {}
        }
        if self.is_long == Some(false) {
            return Ok(Header::parse(&bytes[..24]));
        }
        self.read(&mut bytes[24..])?;
        Ok(Header::parse(&bytes))
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut at = 0;
        while at < bytes.len() {
            let count = self.connection.read(&mut bytes[at..]);
            at += self.went(count)?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let mut at = 0;
        while at < bytes.len() {
            let count = self.connection.write(&bytes[at..]);
            at += self.went(count)?;
        }
        loop {
            match self.connection.flush() {
                Err(error) => self.went(Err(error))?,
                Ok(()) => return Ok(()),
            };
        }
    }

    /// What a call on the connection came to; nothing, when it was only time to ask whether to go on.
    fn went(&self, count: std::io::Result<usize>) -> Result<usize, Failure> {
        match count {
            Ok(0) => Err(explain("hand out pages")(std::io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => Ok(count),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                (self.go_on)().map(|()| 0)
            }
            Err(error) => Err(explain("hand out pages")(error)),
        }
    }
}

// --------------------------------------------------------------------------------------------- asking

/// Memory that is with a dump.
pub struct Away {
    connection: Box<dyn Connection>,
    /// The dump knows short headers only.
    pub is_old: bool,
    /// Asked for, in this order: of which process, from which address, bytes.
    asked: VecDeque<(i32, u64, u64)>,
    /// Answered, by process and address.
    answered: BTreeMap<(i32, u64), Vec<u8>>,
    /// The part of an answer that the last question got: which, from where, to where in it.
    used: Option<((i32, u64), usize, usize)>,
    pages: u64,
}

impl std::fmt::Debug for Away {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("Away")
    }
}

impl Away {
    pub fn new(connection: Box<dyn Connection>) -> Away {
        let (asked, answered) = (VecDeque::new(), BTreeMap::new());
        Away { connection, is_old: false, asked, answered, used: None, pages: 0 }
    }

    fn say(&mut self, header: Header) -> Result<(), Failure> {
        let (long, short) = (header.bytes(), header.short_bytes());
        let bytes = if self.is_old { &short[..] } else { &long };
        let said = self.connection.write_all(bytes).and_then(|()| self.connection.flush());
        said.map_err(explain("ask for pages"))
    }

    fn ask(&mut self, pid: i32, address: u64, length: u64) -> Result<(), Failure> {
        let length = length.min(ANSWER * PAGE);
        self.say(Header { command: GET, flags: 0, pages: length / PAGE, address, object: pid as u64 })?;
        self.asked.push_back((pid, address, length));
        Ok(())
    }

    /// The connection, while no answer is awaited: nothing comes then but its end.
    pub fn silent(&self) -> Option<BorrowedFd<'_>> {
        self.connection.socket().filter(|_| self.asked.is_empty())
    }

    /// Why nothing more will come, when something came where nothing can.
    pub fn lost(&self) -> Failure {
        explain("have memory kept")(std::io::ErrorKind::UnexpectedEof.into())
    }

    /// Waits for the next answer.
    fn hear(&mut self) -> Result<(), Failure> {
        let hear = explain("hear of pages");
        let mut bytes = [0; 32];
        let bytes = if self.is_old { &mut bytes[..24] } else { &mut bytes };
        self.connection.read_exact(bytes).map_err(&hear)?;
        let header = Header::parse(bytes);
        let (pid, address, length) =
            self.asked.pop_front().ok_or_else(|| wrong("an answer to nothing".into()))?;
        let is_answer = header.command == ADD_F
            && u32::from(header.flags) & !(LAZY | PRESENT) == 0
            && (header.object, header.address) == (pid as u64, address)
            && (1..=length / PAGE).contains(&header.pages);
        if !is_answer {
            return Err(wrong(format!("no answer to a question for page {address:#x} of process {pid}")));
        }
        let mut pages = vec![0; (header.pages * PAGE) as usize];
        self.connection.read_exact(&mut pages).map_err(hear)?;
        self.pages += header.pages;
        self.answered.insert((pid, address), pages);
        Ok(())
    }

    fn hear_all(&mut self) -> Result<(), Failure> {
        while !self.asked.is_empty() {
            self.hear()?;
        }
        Ok(())
    }

    /// The answer that has this page.
    fn find(&self, pid: i32, address: u64) -> Option<(i32, u64)> {
        let (key, bytes) = self.answered.range(..=(pid, address)).next_back()?;
        (key.0 == pid && address < key.1 + bytes.len() as u64).then_some(*key)
    }

    /// Forgets what somebody has by now.
    fn drop_used(&mut self) {
        let Some((key, from, to)) = self.used.take() else { return };
        let Some(mut before) = self.answered.remove(&key) else { return };
        let behind = before.split_off(to);
        before.truncate(from);
        for (at, bytes) in [(key.1, before), (key.1 + to as u64, behind)] {
            if !bytes.is_empty() {
                self.answered.insert((key.0, at), bytes);
            }
        }
    }

    fn is_coming(&self, pid: i32, address: u64) -> bool {
        self.asked.iter().any(|(of, from, length)| *of == pid && (*from..*from + *length).contains(&address))
    }

    /// Says that this was all, and waits until the dump knows. Returns how many pages came.
    ///
    /// # Errors
    /// When the dump is gone.
    pub fn close(mut self) -> Result<u64, Failure> {
        self.hear_all()?;
        self.say(Header { command: CLOSE, ..Header::default() })?;
        let mut status = [0; 4];
        self.connection.read_exact(&mut status).map_err(explain("end it"))?;
        Ok(self.pages)
    }

    /// Says that the tree was not restored: it can run on where it was.
    ///
    /// # Errors
    /// When the dump is gone.
    pub fn give_back(mut self) -> Result<(), Failure> {
        self.hear_all()?;
        self.say(Header { command: GIVE_BACK, ..Header::default() })
    }
}

impl Source for Away {
    fn content(&mut self, pid: i32, _: &Run, address: u64, length: u64) -> Result<&[u8], Failure> {
        self.drop_used();
        let key = loop {
            if let Some(key) = self.find(pid, address) {
                break key;
            }
            if !self.is_coming(pid, address) {
                self.ask(pid, address, length)?;
            }
            self.hear()?;
        };
        let none = Errno { call: "read", code: libc::ENODATA };
        let bytes = self.answered.get(&key).ok_or_else(|| none.on(Object::Task, "ask for pages").of(pid))?;
        let from = (address - key.1) as usize;
        let to = bytes.len().min(from + length as usize);
        self.used = Some((key, from, to));
        Ok(&bytes[from..to])
    }

    fn announce(&mut self, pid: i32, _: &Run, address: u64, length: u64) -> Result<(), Failure> {
        let asked: u64 = self.asked.iter().map(|asked| asked.2).sum();
        let answered: u64 = self.answered.values().map(|bytes| bytes.len() as u64).sum();
        if answered > IN_FLIGHT {
            // Others were touched, and these came with them.
            self.answered.clear();
            self.used = None;
        }
        if asked + length > IN_FLIGHT || self.is_coming(pid, address) || self.find(pid, address).is_some() {
            return Ok(());
        }
        self.ask(pid, address, length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::pagemap::PagesFile;
    use std::io::{Read, Write};

    /// Memory with a number in each page, and where its pages begin.
    struct Memory {
        _bytes: Vec<u8>,
        base: u64,
    }

    impl Memory {
        fn new(pages: u64) -> Memory {
            let mut bytes = vec![0u8; (pages + 1) as usize * PAGE as usize];
            let base = (bytes.as_ptr() as u64).next_multiple_of(PAGE);
            let offset = (base - bytes.as_ptr() as u64) as usize;
            (0..pages as usize).for_each(|page| bytes[offset + page * PAGE as usize] = page as u8 + 1);
            Memory { _bytes: bytes, base }
        }

        fn kept(&self, pages: &[Range<u64>]) -> Kept {
            let mut kept = Kept::default();
            let ranges =
                pages.iter().map(|range| self.base + range.start * PAGE..self.base + range.end * PAGE);
            kept.add(sys::process::own_pid(), ranges.collect()).unwrap();
            kept
        }
    }

    fn pair() -> (File, File) {
        let (one, other) = sys::socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        (File::from(one), File::from(other))
    }

    fn on() -> Result<(), Failure> {
        Ok(())
    }

    #[test]
    fn pages_come_ahead_and_out_of_turn_and_are_what_they_were() {
        let memory = Memory::new(64);
        let (kept, pid) = (memory.kept(&[0..40, 50..64]), sys::process::own_pid());
        for is_old in [false, true] {
            let (mut here, there) = pair();
            std::thread::scope(|scope| {
                let dump = scope.spawn(|| hand_out(&mut here, &kept, &on));
                let mut away = Away::new(Box::new(there));
                away.is_old = is_old;
                let run = Run::away(0..0);
                let page = |number: u64| memory.base + number * PAGE;
                away.announce(pid, &run, page(0), 16 * PAGE).unwrap();
                away.announce(pid, &run, page(16), 16 * PAGE).unwrap();
                let mut first = |number: u64, length: u64| {
                    let bytes = away.content(pid, &run, page(number), length * PAGE).unwrap();
                    (bytes[0], bytes.len() as u64 / PAGE)
                };
                assert_eq!(first(50, 1), (51, 1));
                assert_eq!(first(3, 4), (4, 4));
                // What somebody has is forgotten, and what is around it is not.
                assert_eq!(first(0, 16), (1, 3));
                assert_eq!(first(7, 16), (8, 9));
                assert_eq!(first(16, 64), (17, 16));
                // Not more than is kept in one place.
                assert_eq!(first(39, 8), (40, 1));
                assert_eq!(away.close().unwrap(), 34);
                assert!(matches!(dump.join().unwrap(), Ended::Taken(34)));
            });
        }
    }

    #[test]
    fn what_is_not_kept_is_not_handed_out() {
        let memory = Memory::new(8);
        let kept = memory.kept(&[2..3, 3..4]);
        let own = sys::process::own_pid() as u64;
        let get = Header { command: GET, flags: 0, pages: 1, address: memory.base + 2 * PAGE, object: own };
        let wrong = [
            Header { address: memory.base, ..get },
            Header { address: memory.base + 4 * PAGE, ..get },
            Header { address: memory.base + 2 * PAGE + 8, ..get },
            Header { address: !4095, ..get },
            Header { object: 1, ..get },
            Header { object: u64::MAX, ..get },
            Header { pages: 0, ..get },
            Header { command: 99, ..get },
        ];
        for header in wrong {
            for bytes in [&header.bytes()[..], &header.short_bytes()] {
                let (mut here, mut there) = pair();
                there.write_all(bytes).unwrap();
                // As far as a longer header may be waited for.
                there.write_all(&[0; 32]).unwrap();
                sys::socket::shutdown(&there, libc::SHUT_WR).unwrap();
                assert!(matches!(hand_out(&mut here, &kept, &on), Ended::Given(_)), "{header:?}");
                let mut heard = Vec::new();
                drop(here);
                there.read_to_end(&mut heard).unwrap_or(0);
                assert!(heard.is_empty(), "{header:?}");
            }
        }
    }

    #[test]
    fn how_it_ended_is_told_apart() {
        let memory = Memory::new(4);
        let kept = memory.kept(&[0..2, 2..4]);
        let object = sys::process::own_pid() as u64;
        let get = Header { command: GET, flags: 0, pages: 1, address: memory.base, object };
        let say = |words: &[Header]| {
            let (mut here, mut there) = pair();
            words.iter().for_each(|header| there.write_all(&header.bytes()).unwrap());
            sys::socket::shutdown(&there, libc::SHUT_WR).unwrap();
            let ended = hand_out(&mut here, &kept, &on);
            drop(there);
            ended
        };
        let end = |command| Header { command, ..Header::default() };
        assert!(matches!(say(&[]), Ended::Given(_)));
        assert!(matches!(say(&[end(CLOSE)]), Ended::Taken(0)));
        assert!(matches!(say(&[get, end(FORCE_CLOSE)]), Ended::Taken(1)));
        assert!(matches!(say(&[get, end(GIVE_BACK)]), Ended::Given(_)));
        assert!(matches!(say(&[get]), Ended::Torn(_)));
        // It is asked whether to go on while nothing comes.
        let (mut here, _there) = pair();
        let stop = || Err(Failure::conflict(Object::Tree, "", "enough"));
        assert!(matches!(hand_out(&mut here, &kept, &stop), Ended::Given(_)));
    }

    #[test]
    fn answers_that_are_none_are_errors() {
        let run = Run { file: PagesFile::default(), ..Run::away(0..0) };
        let right = Header { command: ADD_F, flags: 4, pages: 2, address: 0x5000, object: 7 };
        for header in [
            Header { command: GET, ..right },
            Header { flags: 4 | 8, ..right },
            Header { address: 0x6000, ..right },
            Header { object: 8, ..right },
            Header { pages: 0, ..right },
            Header { pages: 3, ..right },
            Header { pages: u64::MAX, ..right },
        ] {
            let (mut here, there) = pair();
            here.write_all(&header.bytes()).unwrap();
            sys::socket::shutdown(&here, libc::SHUT_WR).unwrap();
            assert!(Away::new(Box::new(there)).content(7, &run, 0x5000, 2 * PAGE).is_err(), "{header:?}");
        }
        let (here, there) = pair();
        drop(here);
        assert!(Away::new(Box::new(there)).content(7, &run, 0x5000, 2 * PAGE).is_err());
    }
}
