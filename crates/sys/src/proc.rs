//! Pure parsers of `/proc` text over bytes.
//!
//! They answer `None` for text that the kernel does not write, and never panic: that is all that the
//! callers need to know, who name the file in the error.

/// One mapping, from `/proc/PID/smaps` (or `maps`, which has no flags).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    /// PROT_READ, PROT_WRITE, PROT_EXEC.
    pub prot: u32,
    pub is_shared: bool,
    /// Bytes into the file.
    pub offset: u64,
    /// Major and minor number of the device.
    pub dev: (u32, u32),
    pub inode: u64,
    /// As the kernel names it: a path, `[heap]`, or nothing. The escape of newlines is undone.
    pub name: Vec<u8>,
    /// That of the program for memory without a file (PR_SET_VMA_ANON_NAME).
    pub given_name: Option<Vec<u8>>,
    pub flags: VmFlags,
    /// Bytes of its pages, as far as the text tells: `smaps` alone does.
    pub page_size: u64,
    /// As far as the text tells.
    pub protection_key: u32,
}

/// The `VmFlags:` of a mapping: two letters each. Source: Documentation/filesystems/proc.rst.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VmFlags(u64);

/// The flags that something is done about; the place in this list is the bit.
const FLAGS: [&[u8; 2]; 25] = [
    b"gd", b"lo", b"dc", b"de", b"mg", b"hg", b"nh", b"dd", b"wf", b"ht", b"nr", b"um", b"uw", b"ui", b"ss",
    b"dp", b"sl", b"sr", b"rr", b"io", b"pf", b"lf", b"mm", b"sd", b"mw",
];

impl VmFlags {
    /// `flag` is one of the two-letter names.
    pub fn has(self, flag: &str) -> bool {
        FLAGS.iter().position(|known| *known == flag.as_bytes()).is_some_and(|bit| self.0 >> bit & 1 != 0)
    }

    pub fn remove(&mut self, flag: &str) {
        if let Some(bit) = FLAGS.iter().position(|known| *known == flag.as_bytes()) {
            self.0 &= !(1 << bit);
        }
    }

    /// Of two-letter names.
    pub fn of<'w>(words: impl Iterator<Item = &'w [u8]>) -> VmFlags {
        let known = words.filter_map(|word| FLAGS.iter().position(|known| *known == word));
        VmFlags(known.fold(0, |flags, bit| flags | 1 << bit))
    }

    /// Those of both.
    pub fn and(self, others: VmFlags) -> VmFlags {
        VmFlags(self.0 | others.0)
    }
}

fn hex(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() || bytes.len() > 16 {
        return None;
    }
    bytes.iter().try_fold(0u64, |value, byte| Some(value << 4 | u64::from((*byte as char).to_digit(16)?)))
}

/// A decimal number, the whole of `bytes`.
pub fn decimal<T: std::str::FromStr>(bytes: &[u8]) -> Option<T> {
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let place = bytes.iter().position(|byte| *byte == at)?;
    Some((&bytes[..place], &bytes[place + 1..]))
}

/// Undoes `\012` and its like, which seq_file writes for characters that would break a line.
pub fn unescape(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\' && tail.len() >= 3).then(|| {
            tail[..3].iter().try_fold(0u32, |value, byte| Some(value * 8 + (*byte as char).to_digit(8)?))
        });
        match octal.flatten().and_then(|value| u8::try_from(value).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

/// What the kernel calls shared anonymous memory, unless it was given a name (PR_SET_VMA_ANON_NAME).
const SHARED_ANONYMOUS: &[u8] = b"/dev/zero (deleted)";
/// How it shows those that were.
const NAMED: [&[u8]; 2] = [b"[anon_shmem:", b"[anon:"];

/// One header line of `maps` or `smaps`. Memory that was given a name is called the same as other of its kind.
pub fn parse_vma_line(line: &[u8]) -> Option<Vma> {
    let (start, rest) = split_once(line, b'-')?;
    let (end, rest) = split_once(rest, b' ')?;
    let (perms, rest) = split_once(rest, b' ')?;
    let (offset, rest) = split_once(rest, b' ')?;
    let (dev, rest) = split_once(rest, b' ')?;
    let (inode, name) = split_once(rest, b' ').unwrap_or((rest, b""));
    let (major, minor) = split_once(dev, b':')?;
    let [r, w, x, shared] = *perms.first_chunk()?;
    let bit = |have, letter, bit| if have == letter { bit } else { 0 };
    let name = &name[name.iter().position(|byte| *byte != b' ').unwrap_or(name.len())..];
    let given_name = NAMED.iter().find_map(|before| name.strip_prefix(*before)?.strip_suffix(b"]"));
    let given_name = given_name.map(unescape);
    let vma = Vma {
        start: hex(start)?,
        end: hex(end)?,
        prot: bit(r, b'r', 1) | bit(w, b'w', 2) | bit(x, b'x', 4),
        is_shared: shared == b's',
        offset: hex(offset)?,
        dev: (u32::try_from(hex(major)?).ok()?, u32::try_from(hex(minor)?).ok()?),
        inode: decimal(inode)?,
        name: match (&given_name, shared) {
            (None, _) => unescape(name),
            (Some(_), b's') => SHARED_ANONYMOUS.to_vec(),
            (Some(_), _) => Vec::new(),
        },
        given_name,
        flags: VmFlags::default(),
        page_size: crate::memory::PAGE,
        protection_key: 0,
    };
    (vma.start < vma.end).then_some(vma)
}

/// Collects mappings from `smaps` as the text arrives, piece by piece: for thousands of mappings it is
/// far larger than what it says.
#[derive(Debug, Default)]
pub struct SmapsParser {
    vmas: Vec<Vma>,
    partial: Vec<u8>,
    is_broken: bool,
}

impl SmapsParser {
    pub fn feed(&mut self, mut text: &[u8]) {
        while let Some((line, rest)) = split_once(text, b'\n') {
            if self.partial.is_empty() {
                self.line(line);
            } else {
                let mut whole = std::mem::take(&mut self.partial);
                whole.extend_from_slice(line);
                self.line(&whole);
            }
            text = rest;
        }
        self.partial.extend_from_slice(text);
    }

    fn line(&mut self, line: &[u8]) {
        // Details start with a capital letter, a mapping with a hexadecimal digit in lower case.
        if !line.first().is_some_and(u8::is_ascii_uppercase) {
            match parse_vma_line(line) {
                Some(vma) => self.vmas.push(vma),
                None => self.is_broken = true,
            }
        } else if let Some(flags) = line.strip_prefix(b"VmFlags:")
            && let Some(vma) = self.vmas.last_mut()
        {
            vma.flags = VmFlags::of(flags.split(|byte| *byte == b' '));
        } else if let Some(key) = line.strip_prefix(b"ProtectionKey:")
            && let Some(vma) = self.vmas.last_mut()
        {
            vma.protection_key = decimal(key.trim_ascii()).unwrap_or(0);
        } else if let Some(size) = line.strip_prefix(b"KernelPageSize:")
            && let Some(vma) = self.vmas.last_mut()
        {
            let kb = size.trim_ascii().strip_suffix(b" kB").and_then(decimal::<u64>);
            vma.page_size = kb.map_or(vma.page_size, |kb| kb << 10);
        }
    }

    /// Takes the mappings that are complete: all but the last, of which more may come.
    pub fn take(&mut self) -> Vec<Vma> {
        let last = self.vmas.pop();
        let complete = std::mem::take(&mut self.vmas);
        self.vmas.extend(last);
        complete
    }

    /// The mappings that were not taken; `None` when the text was not understood.
    pub fn finish(self) -> Option<Vec<Vma>> {
        (!self.is_broken && self.partial.is_empty()).then_some(self.vmas)
    }
}

/// What `/proc/PID/task/TID/status` says of a thread.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// At most 15 bytes.
    pub comm: Vec<u8>,
    pub state: u8,
    pub umask: Option<u32>,
    pub tgid: i32,
    pub ppid: i32,
    pub tracer: i32,
    /// Real, effective, saved, file system.
    pub uid: [u32; 4],
    pub gid: [u32; 4],
    pub groups: Vec<u32>,
    /// The tid in each pid namespace, ours first.
    pub ns_pid: Vec<i32>,
    pub cap_inherited: u64,
    pub cap_permitted: u64,
    pub cap_effective: u64,
    pub cap_bounding: u64,
    pub cap_ambient: u64,
    pub no_new_privs: u32,
    /// 0 disabled, 1 strict, 2 filter.
    pub seccomp: u32,
    pub thp_enabled: Option<bool>,
    /// Of memory that is locked, and of anonymous memory that is there or swapped out.
    pub locked_kb: u64,
    pub anonymous_kb: u64,
    /// Of page tables.
    pub tables_kb: u64,
}

fn numbers<T: std::str::FromStr>(value: &[u8]) -> Option<Vec<T>> {
    value.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty()).map(decimal).collect()
}

/// Undoes the two escapes of a name in `status`. Source: fs/proc/array.c, proc_task_name.
fn unescape_name(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut bytes = name.iter();
    while let Some(&byte) = bytes.next() {
        match (byte, bytes.as_slice().first()) {
            (b'\\', Some(b'n')) => out.push(b'\n'),
            (b'\\', Some(b'\\')) => out.push(b'\\'),
            _ => {
                out.push(byte);
                continue;
            }
        }
        bytes.next();
    }
    out
}

/// Of "12 kB".
fn kilobytes(value: &[u8]) -> Option<u64> {
    decimal(value.strip_suffix(b" kB")?)
}

/// What `/proc/PID/statm` says of resident memory that is not of files, in bytes.
pub fn parse_private(text: &[u8]) -> Option<u64> {
    let mut words = text.split(|byte| *byte == b' ').skip(1).map(decimal::<u64>);
    let (resident, shared) = (words.next()??, words.next()??);
    resident.checked_sub(shared)?.checked_mul(4096)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
pub fn parse_available(text: &[u8]) -> Option<u64> {
    let line = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"MemAvailable:"))?;
    kilobytes(line.trim_ascii())?.checked_mul(1024)
}

pub fn parse_status(text: &[u8]) -> Option<Status> {
    let mut status = Status::default();
    for line in text.split(|byte| *byte == b'\n') {
        let Some((key, value)) = split_once(line, b':') else { continue };
        let value = value.trim_ascii();
        match key {
            b"Name" => status.comm = unescape_name(value),
            b"State" => status.state = *value.first()?,
            b"Umask" => status.umask = Some(u32::from_str_radix(std::str::from_utf8(value).ok()?, 8).ok()?),
            b"Tgid" => status.tgid = decimal(value)?,
            b"PPid" => status.ppid = decimal(value)?,
            b"TracerPid" => status.tracer = decimal(value)?,
            b"Uid" => status.uid = numbers(value)?.try_into().ok()?,
            b"Gid" => status.gid = numbers(value)?.try_into().ok()?,
            b"Groups" => status.groups = numbers(value)?,
            b"NSpid" => status.ns_pid = numbers(value)?,
            b"CapInh" => status.cap_inherited = hex(value)?,
            b"CapPrm" => status.cap_permitted = hex(value)?,
            b"CapEff" => status.cap_effective = hex(value)?,
            b"CapBnd" => status.cap_bounding = hex(value)?,
            b"CapAmb" => status.cap_ambient = hex(value)?,
            b"NoNewPrivs" => status.no_new_privs = decimal(value)?,
            b"Seccomp" => status.seccomp = decimal(value)?,
            b"VmLck" => status.locked_kb = kilobytes(value)?,
            b"VmPTE" => status.tables_kb = kilobytes(value)?,
            b"RssAnon" | b"VmSwap" => status.anonymous_kb += kilobytes(value)?,
            b"THP_enabled" => status.thp_enabled = Some(decimal::<u32>(value)? != 0),
            _ => {}
        }
    }
    (status.state != 0 && status.tgid != 0).then_some(status)
}

/// What `/proc/PID/stat` says of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    /// At most 15 bytes, of any value but zero.
    pub comm: Vec<u8>,
    pub state: u8,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    /// Device of its terminal; zero for none.
    pub tty: i32,
    /// The foreground group of that.
    pub tty_pgid: i32,
    /// PF_* of the kernel.
    pub flags: u32,
    /// Clock ticks after boot.
    pub start_time: u64,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub exit_signal: i32,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    /// As in wait(2).
    pub exit_code: i32,
}

/// Source: proc_pid_stat(5). The name may hold spaces and parentheses: its end is the last of those.
pub fn parse_stat(text: &[u8]) -> Option<Stat> {
    let open = text.iter().position(|byte| *byte == b'(')?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let comm = text.get(open + 1..close)?.to_vec();
    let fields: Vec<&[u8]> = text[close + 1..].trim_ascii().split(|byte| *byte == b' ').collect();
    // proc(5) counts the first field after the name as the third.
    let field = |number: usize| fields.get(number - 3).copied();
    let word = |number: usize| decimal::<u64>(field(number)?);
    let int = |number: usize| decimal::<i32>(field(number)?);
    Some(Stat {
        comm,
        state: *field(3)?.first()?,
        ppid: int(4)?,
        pgid: int(5)?,
        sid: int(6)?,
        tty: int(7)?,
        tty_pgid: int(8)?,
        flags: decimal(field(9)?)?,
        start_time: word(22)?,
        start_code: word(26)?,
        end_code: word(27)?,
        start_stack: word(28)?,
        exit_signal: int(38)?,
        start_data: word(45)?,
        end_data: word(46)?,
        start_brk: word(47)?,
        arg_start: word(48)?,
        arg_end: word(49)?,
        env_start: word(50)?,
        env_end: word(51)?,
        exit_code: int(52)?,
    })
}

/// One POSIX timer, from `/proc/PID/timers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timer {
    pub id: i32,
    pub signal: i32,
    /// The value that goes with the signal.
    pub value: u64,
    /// SIGEV_* without the thread bit.
    pub notify: u32,
    /// The thread that is told, for SIGEV_THREAD_ID.
    pub tid: Option<i32>,
    pub clock: i32,
}

/// Source: fs/proc/base.c, show_timer.
pub fn parse_timers(text: &[u8]) -> Option<Vec<Timer>> {
    let mut timers: Vec<Timer> = Vec::new();
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let (key, value) = split_once(line, b':')?;
        let value = value.trim_ascii();
        match key {
            b"ID" => timers.push(Timer {
                id: decimal(value)?,
                signal: 0,
                value: 0,
                notify: 0,
                tid: None,
                clock: 0,
            }),
            b"signal" => {
                let (signal, value) = split_once(value, b'/')?;
                let timer = timers.last_mut()?;
                timer.signal = decimal(signal)?;
                timer.value = hex(value.strip_prefix(b"0x").unwrap_or(value))?;
            }
            b"notify" => {
                let (how, who) = split_once(value, b'/')?;
                let timer = timers.last_mut()?;
                timer.notify = match how {
                    b"signal" => 0,
                    b"none" => 1,
                    b"thread" => 2,
                    _ => return None,
                };
                timer.tid = match who.strip_prefix(b"tid.") {
                    Some(tid) => Some(decimal(tid)?),
                    None => None,
                };
            }
            b"ClockID" => timers.last_mut()?.clock = decimal(value)?,
            _ => {}
        }
    }
    Some(timers)
}

/// `/proc/PID/fdinfo/N`: the value of the first line with this key.
pub fn fdinfo<'a>(text: &'a [u8], key: &str) -> Option<&'a [u8]> {
    text.split(|byte| *byte == b'\n').find_map(|line| {
        let (name, value) = split_once(line, b':')?;
        (name.trim_ascii() == key.as_bytes()).then(|| value.trim_ascii())
    })
}

/// A hexadecimal value of `fdinfo`, with or without `0x`.
pub fn fdinfo_hex(text: &[u8], key: &str) -> Option<u64> {
    let value = fdinfo(text, key)?;
    hex(value.strip_prefix(b"0x").unwrap_or(value))
}

/// A file that is watched, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    pub inode: u64,
    /// As the kernel has it: the minor number in the low 20 bits.
    pub device: u32,
    pub handle_type: u32,
    /// Empty where the file system has none.
    pub handle: Vec<u8>,
}

/// One watch of an inotify.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InotifyWatch {
    pub wd: i32,
    pub mask: u32,
    pub ignored_mask: u32,
    pub file: Watched,
}

/// The hexadecimal value behind `key:` in a line of words.
fn hex_word(line: &str, key: &str) -> Option<u64> {
    let value = line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix(':'))?;
    hex(value.as_bytes())
}

fn small_word(line: &str, key: &str) -> Option<u32> {
    u32::try_from(hex_word(line, key)?).ok()
}

/// Source: fs/notify/fdinfo.c, show_mark_fhandle.
fn parse_watched(line: &str) -> Option<Watched> {
    let text = line.split(' ').find_map(|word| word.strip_prefix("f_handle:")).unwrap_or_default();
    let bytes = text.as_bytes().chunks(2);
    let handle = bytes.map(|byte| hex(byte).map(|byte| byte as u8)).collect::<Option<Vec<_>>>()?;
    (handle.len() == small_word(line, "fhandle-bytes").unwrap_or(0) as usize).then_some(Watched {
        inode: hex_word(line, "ino")?,
        device: small_word(line, "sdev")?,
        handle_type: small_word(line, "fhandle-type").unwrap_or(0),
        handle,
    })
}

/// The lines of `fdinfo` that begin with a word, without it.
fn lines_of<'t>(text: &'t [u8], word: &'t [u8]) -> impl Iterator<Item = Option<&'t str>> {
    let lines = text.split(|byte| *byte == b'\n').filter_map(move |line| line.strip_prefix(word));
    lines.map(|line| std::str::from_utf8(line).ok())
}

/// The `inotify` lines of `fdinfo`. Source: fs/notify/fdinfo.c, inotify_fdinfo.
pub fn parse_inotify(text: &[u8]) -> Option<Vec<InotifyWatch>> {
    let watch = |line: Option<&str>| {
        let line = line?;
        Some(InotifyWatch {
            wd: i32::try_from(hex_word(line, "wd")?).ok()?,
            mask: small_word(line, "mask")?,
            ignored_mask: small_word(line, "ignored_mask")?,
            file: parse_watched(line)?,
        })
    };
    lines_of(text, b"inotify ").map(watch).collect()
}

/// What a fanotify mark is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Marked {
    File(Watched),
    /// By its id.
    Mount(u32),
    /// By its device.
    Filesystem(u32),
    /// A mount namespace, which is named by its inode.
    Namespace,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FanotifyMark {
    pub on: Marked,
    pub flags: u32,
    pub mask: u32,
    pub ignored_mask: u32,
}

/// A fanotify group: the flags that it and its events were made with, and its marks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fanotify {
    pub flags: u32,
    pub event_flags: u32,
    pub marks: Vec<FanotifyMark>,
}

/// The `fanotify` lines of `fdinfo`. Source: fs/notify/fdinfo.c, fanotify_show_fdinfo.
pub fn parse_fanotify(text: &[u8]) -> Option<Fanotify> {
    let mut lines = lines_of(text, b"fanotify ");
    let first = lines.next()??;
    let mark = |line: Option<&str>| {
        let line = line?;
        let on = match line.split(':').next()? {
            "ino" => Marked::File(parse_watched(line)?),
            "mnt_id" => Marked::Mount(small_word(line, "mnt_id")?),
            "sdev" => Marked::Filesystem(small_word(line, "sdev")?),
            "mnt_ns" => Marked::Namespace,
            _ => return None,
        };
        let (flags, mask) = (small_word(line, "mflags")?, small_word(line, "mask")?);
        Some(FanotifyMark { on, flags, mask, ignored_mask: small_word(line, "ignored_mask")? })
    };
    Some(Fanotify {
        flags: small_word(first, "flags")?,
        event_flags: small_word(first, "event-flags")?,
        marks: lines.map(mark).collect::<Option<_>>()?,
    })
}

/// Where a mount of `mountinfo` is. Source: proc_pid_mountinfo(5).
pub fn mount_point(mountinfo: &[u8], id: u32) -> Option<Vec<u8>> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let mut mounts = lines.map(|line| line.split(|byte| *byte == b' '));
    mounts.find_map(|mut words| (decimal::<u32>(words.next()?)? == id).then(|| words.nth(3).map(unescape))?)
}

/// What `fdinfo` tells of an io_uring.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uring {
    pub sq_entries: u32,
    pub cq_entries: u32,
    pub sq_tail: u32,
    pub cq_head: u32,
    /// How many requests the kernel has taken, and how many completions it has told, as numbers that wrap around.
    pub taken: u32,
    pub told: u32,
    /// -1 where no thread of the kernel looks for requests.
    pub sq_thread: i32,
    /// The processor that it is on.
    pub sq_cpu: i32,
    /// Lines of requests and completions that are in the rings, and whether the latter have more words.
    pub has_sqe_lines: bool,
    pub has_cqe_lines: bool,
    pub has_large_cqes: bool,
    /// Registered files by index, and the size of the table.
    pub files: Vec<(u32, Vec<u8>)>,
    pub file_count: u32,
    /// Registered buffers: address and length.
    pub buffers: Vec<Option<(u64, u64)>>,
    /// Operations that wait for a file to become ready.
    pub polls: Vec<u32>,
    pub has_overflow: bool,
}

/// Source: io_uring/fdinfo.c.
pub fn parse_uring(text: &[u8]) -> Option<Uring> {
    let number = |key: &str| decimal::<u32>(fdinfo(text, key)?);
    let mask = |key: &str| u32::try_from(fdinfo_hex(text, key)?).ok()?.checked_add(1);
    let mut ring = Uring {
        sq_entries: mask("SqMask")?,
        cq_entries: mask("CqMask")?,
        sq_tail: number("SqTail")?,
        cq_head: number("CqHead")?,
        taken: number("CachedSqHead")?,
        told: number("CachedCqTail")?,
        sq_thread: decimal(fdinfo(text, "SqThread")?)?,
        sq_cpu: fdinfo(text, "SqThreadCpu").and_then(decimal).unwrap_or(-1),
        file_count: number("UserFiles")?,
        ..Uring::default()
    };
    let mut section: &[u8] = b"";
    for line in text.split(|byte| *byte == b'\n') {
        if line.first() != Some(&b' ') {
            section = line.split(|byte| *byte == b':').next()?;
            continue;
        }
        let line = line.trim_ascii_start();
        let indexed =
            || split_once(line, b':').and_then(|(index, rest)| Some((decimal::<u32>(index)?, &rest[1..])));
        match section {
            b"SQEs" => ring.has_sqe_lines = true,
            b"CQEs" => {
                ring.has_cqe_lines = true;
                ring.has_large_cqes |= line.windows(7).any(|word| word == b"extra1:");
            }
            b"UserFiles" => {
                let (index, name) = indexed()?;
                ring.files.push((index, unescape(name)));
            }
            b"UserBufs" => {
                let (_, range) = indexed()?;
                ring.buffers.push(match range {
                    b"<none>" => None,
                    range => {
                        let (address, len) = split_once(range, b'/')?;
                        Some((hex(address.strip_prefix(b"0x")?)?, decimal(len)?))
                    }
                });
            }
            b"PollList" => {
                let op = line.strip_prefix(b"op=")?.split(|byte| *byte == b',').next()?;
                ring.polls.push(decimal(op)?);
            }
            b"CqOverflowList" => ring.has_overflow = true,
            _ => {}
        }
    }
    Some(ring)
}

/// Where file systems of a device, as the kernel has its number, are mounted. Source: proc_pid_mountinfo(5).
pub fn mounts_of(mountinfo: &[u8], device: u32) -> Vec<Vec<u8>> {
    let (major, minor) = (device >> 20, device & 0xf_ffff);
    let wanted = format!("{major}:{minor}").into_bytes();
    let lines = mountinfo.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut words = line.split(|byte| *byte == b' ');
            (words.nth(2)? == wanted).then(|| words.nth(1).map(unescape))?
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockKind {
    Posix,
    Flock,
    Ofd,
    Lease,
    BreakingLease,
}

/// A lock on a file: bytes from `start` to `end`, both among them, or without end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileLock {
    pub kind: LockKind,
    pub is_write: bool,
    /// Who took it; -1 for one that belongs to the open file.
    pub pid: i32,
    pub start: u64,
    pub end: Option<u64>,
}

/// The `lock:` lines of an open file's `fdinfo`. Source: fs/locks.c, lock_get_status.
pub fn parse_locks(text: &[u8]) -> Option<Vec<FileLock>> {
    let lines = text.split(|byte| *byte == b'\n').filter_map(|line| line.strip_prefix(b"lock:"));
    lines
        .map(|line| {
            // "1: POSIX  ADVISORY  WRITE 42 00:1c:77 0 EOF"
            let words: Vec<&str> = std::str::from_utf8(line).ok()?.split_ascii_whitespace().collect();
            let [_, kind, state, access, pid, _, start, end] = words[..] else { return None };
            let kind = match (kind, state) {
                ("POSIX", _) => LockKind::Posix,
                ("FLOCK", _) => LockKind::Flock,
                ("OFDLCK", _) => LockKind::Ofd,
                ("LEASE", "ACTIVE") => LockKind::Lease,
                ("LEASE", _) => LockKind::BreakingLease,
                _ => return None,
            };
            let is_write = match access {
                "WRITE" => true,
                "READ" => false,
                _ => return None,
            };
            let start = start.parse().ok()?;
            let end = if end == "EOF" { None } else { Some(end.parse().ok()?) };
            let pid = pid.parse().ok()?;
            end.is_none_or(|end| end >= start && end < i64::MAX as u64).then_some(FileLock {
                kind,
                is_write,
                pid,
                start,
                end,
            })
        })
        .collect()
}

/// One watched descriptor of an epoll set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EpollTarget {
    pub fd: u32,
    pub events: u32,
    pub data: u64,
    pub position: u64,
    pub inode: u64,
    pub dev: u32,
}

/// The `tfd:` lines of an epoll set's `fdinfo`. Source: fs/eventpoll.c, ep_show_fdinfo.
pub fn parse_epoll(text: &[u8]) -> Option<Vec<EpollTarget>> {
    text.split(|byte| *byte == b'\n')
        .filter(|line| line.starts_with(b"tfd:"))
        .map(|line| {
            // "tfd:        5 events:       19 data:                5  pos:0 ino:1 sdev:2", keys glued or not.
            let text = std::str::from_utf8(line).ok()?;
            let value = |key: &str| {
                let rest = text[text.find(key)? + key.len()..].trim_start();
                Some(rest.split(' ').next().unwrap_or(rest))
            };
            let number = |key: &str| hex(value(key)?.as_bytes());
            Some(EpollTarget {
                fd: value("tfd:")?.parse().ok()?,
                events: u32::try_from(number("events:")?).ok()?,
                data: number("data:")?,
                position: value("pos:")?.parse().ok()?,
                inode: number("ino:")?,
                dev: u32::try_from(number("sdev:")?).ok()?,
            })
        })
        .collect()
}

/// A row of `/proc/net/tcp` or `tcp6`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpRow {
    pub local_port: u16,
    /// As in include/net/tcp_states.h: 10 listens.
    pub state: u8,
    /// Zero when no descriptor is left.
    pub inode: u64,
}

/// Source: Documentation/networking/proc_net_tcp.rst. Rows that are none are left out.
pub fn parse_net_tcp(text: &[u8]) -> Vec<TcpRow> {
    let row = |line: &[u8]| {
        let line = std::str::from_utf8(line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let local_port = u16::from_str_radix(words.nth(1)?.rsplit_once(':')?.1, 16).ok()?;
        let state = u8::from_str_radix(words.nth(1)?, 16).ok()?;
        let inode = words.nth(5)?.parse().ok()?;
        Some(TcpRow { local_port, state, inode })
    };
    text.split(|byte| *byte == b'\n').filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_shared_memory_is_shared_memory() {
        let named = parse_vma_line(b"7f24-7f25 rw-s 00000000 00:01 1587496    [anon_shmem:a name]");
        let plain = parse_vma_line(b"7f24-7f25 rw-s 00000000 00:01 1587496    /dev/zero (deleted)");
        assert_eq!(named.as_ref().and_then(|vma| vma.given_name.as_deref()), Some(&b"a name"[..]));
        assert_eq!(named.map(|vma| Vma { given_name: None, ..vma }), plain);
    }

    #[test]
    fn a_mapping_with_flags_and_an_odd_name_is_understood() {
        let text = b"7f00-7f01 rw-s 00002000 fe:01 77     /tmp/a\\012b (deleted)\n\
            Size:  4 kB\nKernelPageSize:     2048 kB\nProtectionKey:         3\nVmFlags: rd wr sh gd lo dc\n";
        let mut parser = SmapsParser::default();
        for piece in text.chunks(7) {
            parser.feed(piece);
        }
        let vmas = parser.finish().unwrap();
        assert_eq!(vmas.len(), 1);
        let vma = &vmas[0];
        assert_eq!((vma.start, vma.end, vma.prot, vma.is_shared), (0x7f00, 0x7f01, 3, true));
        assert_eq!((vma.offset, vma.dev, vma.inode), (0x2000, (0xfe, 1), 77));
        assert_eq!(vma.name, b"/tmp/a\nb (deleted)");
        assert_eq!((vma.page_size, vma.protection_key), (2 << 20, 3));
        assert!(vma.flags.has("gd") && vma.flags.has("lo") && vma.flags.has("dc") && !vma.flags.has("mg"));
    }

    #[test]
    fn own_proc_files_are_understood() {
        let mut parser = SmapsParser::default();
        parser.feed(&std::fs::read("/proc/self/smaps").unwrap());
        let vmas = parser.finish().unwrap();
        assert!(vmas.iter().any(|vma| vma.name == b"[vdso]" && vma.flags.has("de")));
        let status = parse_status(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(status.tgid, std::process::id() as i32);
        let stat = parse_stat(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert_eq!(stat.ppid, status.ppid);
        assert!(stat.arg_start < stat.arg_end);
    }

    #[test]
    fn a_comm_may_hold_parentheses_and_spaces() {
        let fields: Vec<String> = (4..=52).map(|number| number.to_string()).collect();
        let text = format!("12 (a) b (c)) S {}", fields.join(" "));
        let stat = parse_stat(text.as_bytes()).unwrap();
        assert_eq!(stat.comm, b"a) b (c)");
        assert_eq!((stat.ppid, stat.exit_code), (4, 52));
    }

    #[test]
    fn timers_and_epoll_sets_are_understood() {
        let text = b"ID: 1\nsignal: 60/00007fff\nnotify: signal/tid.33\nClockID: 1\nID: 2\nsignal: 0/0\nnotify: none/pid.3\nClockID: 0\n";
        let timers = parse_timers(text).unwrap();
        assert_eq!(timers[0], Timer { id: 1, signal: 60, value: 0x7fff, notify: 0, tid: Some(33), clock: 1 });
        assert_eq!((timers[1].notify, timers[1].tid), (1, None));
        let text = b"pos:\t0\nflags:\t02\ntfd:        5 events:       1d data: ffffffffffffffff  pos:0 ino:61af sdev:7\n";
        let targets = parse_epoll(text).unwrap();
        let target = EpollTarget { fd: 5, events: 0x1d, data: u64::MAX, position: 0, inode: 0x61af, dev: 7 };
        assert_eq!(targets, [target]);
    }

    #[test]
    fn nonsense_is_no_panic() {
        for text in
            [&b"\\"[..], b"-", b"1-2 ", b"\xff\xfe:", b"ID: x", b"tfd:", b"1-0 r--p 0 0:0 0", b")(", b"() "]
        {
            parse_vma_line(text);
            parse_status(text);
            parse_stat(text);
            parse_timers(text);
            parse_epoll(text);
            parse_inotify(text);
            parse_fanotify(text);
            parse_uring(text);
            unescape(text);
        }
    }

    #[test]
    fn rows_of_tcp_tell_port_state_and_inode() {
        let text = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 31337 1 x 100 0\n\
            \x20  1: nonsense\n";
        assert_eq!(parse_net_tcp(text), [TcpRow { local_port: 8080, state: 10, inode: 31337 }]);
    }

    #[test]
    fn locks_of_all_kinds_are_read() {
        let text = b"pos:\t0\nlock:\t1: FLOCK  ADVISORY  WRITE 7 00:1c:77 0 EOF\n\
            lock:\t2: POSIX  ADVISORY  READ 7 00:1c:77 10 19\nlock:\t3: OFDLCK ADVISORY  READ -1 00:1c:77 0 0\n\
            lock:\t4: LEASE  ACTIVE    WRITE 7 00:1c:77 0 EOF\nlock:\t5: LEASE  BREAKING  READ 7 00:1c:77 0 EOF\n";
        let lock = |kind, is_write, start, end| {
            let pid = if kind == LockKind::Ofd { -1 } else { 7 };
            FileLock { kind, is_write, pid, start, end }
        };
        let expected = [
            lock(LockKind::Flock, true, 0, None),
            lock(LockKind::Posix, false, 10, Some(19)),
            lock(LockKind::Ofd, false, 0, Some(0)),
            lock(LockKind::Lease, true, 0, None),
            lock(LockKind::BreakingLease, false, 0, None),
        ];
        assert_eq!(parse_locks(text).unwrap(), expected);
        assert_eq!(parse_locks(b"lock:\t1: FLOCK ADVISORY WRITE 7 00:1c:77 5 4"), None);
        assert_eq!(parse_locks(b"lock:\t1: NEW ADVISORY WRITE 7 00:1c:77 0 EOF"), None);
    }

    #[test]
    fn inotify_watches_and_mounts_are_read() {
        let text = b"pos:\t0\nflags:\t00\ninotify wd:1a ino:9e7e sdev:800013 mask:800afce ignored_mask:0 \
            fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n";
        let watches = parse_inotify(text).unwrap();
        let file = &watches[0].file;
        assert_eq!((watches[0].wd, file.inode, file.device), (0x1a, 0x9e7e, 0x80_0013));
        assert_eq!(file.handle, [0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d]);
        assert_eq!(parse_inotify(b"inotify wd:1"), None);
        let mounts = b"36 35 98:0 /mnt1 /mnt\\0402 rw - ext3 /dev/root rw\n37 35 8:19 / /a rw - ext4 x rw\n";
        assert_eq!(mounts_of(mounts, 98 << 20), [b"/mnt 2"]);
        assert_eq!(mounts_of(mounts, 0x80_0013), [b"/a"]);
        assert_eq!((mount_point(mounts, 36), mount_point(mounts, 9)), (Some(b"/mnt 2".to_vec()), None));
    }

    #[test]
    fn rings_are_read() {
        let text = b"SqMask:\t0x7\nSqHead:\t1\nSqTail:\t2\nCachedSqHead:\t1\nCqMask:\t0xf\nCqHead:\t4294967295\n\
            CqTail:\t0\nCachedCqTail:\t0\nSQEs:\t1\n    0: opcode:NOP, fd:0\nCQEs:\t1\n   15: user_data:0, extra1:0\n\
            SqThread:\t-1\nUserFiles:\t4\n    0: /dev/null\n    2: pipe:[8]\nUserBufs:\t2\n    0: 0x5000/50\n\
            \x20   1: <none>\nPollList:\n  op=22, task_works=0\nCqOverflowList:\nNAPI:\tdisabled\n";
        let ring = parse_uring(text).unwrap();
        assert_eq!((ring.sq_entries, ring.cq_entries, ring.taken, ring.told), (8, 16, 1, 0));
        assert_eq!((ring.sq_tail, ring.cq_head, ring.sq_thread), (2, u32::MAX, -1));
        assert!(ring.has_sqe_lines && ring.has_cqe_lines && ring.has_large_cqes && !ring.has_overflow);
        assert_eq!(ring.files, [(0, b"/dev/null".to_vec()), (2, b"pipe:[8]".to_vec())]);
        assert_eq!((ring.file_count, ring.polls), (4, vec![22]));
        assert_eq!(ring.buffers, [Some((0x5000, 50)), None]);
        assert_eq!(parse_uring(b"SqMask:\t0x7"), None);
    }

    #[test]
    fn fanotify_marks_are_read() {
        let text = b"pos:\t0\nfanotify flags:10 event-flags:8000\n\
            fanotify ino:4f969 sdev:800013 mflags:0 mask:3b ignored_mask:40000000 fhandle-bytes:2 \
            fhandle-type:1 f_handle:69f9\n\
            fanotify mnt_id:12 mflags:40 mask:20 ignored_mask:0\nfanotify sdev:1a mflags:0 mask:1 ignored_mask:0\n";
        let group = parse_fanotify(text).unwrap();
        assert_eq!((group.flags, group.event_flags, group.marks.len()), (0x10, 0x8000, 3));
        assert!(matches!(&group.marks[0].on, Marked::File(file) if file.handle == [0x69, 0xf9]));
        assert_eq!((&group.marks[1].on, group.marks[1].flags), (&Marked::Mount(0x12), 0x40));
        assert_eq!((&group.marks[2].on, group.marks[2].mask), (&Marked::Filesystem(0x1a), 1));
        assert_eq!(parse_fanotify(b"fanotify mnt_id:12"), None);
    }
}
