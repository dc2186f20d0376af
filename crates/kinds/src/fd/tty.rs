//! The terminal that a shell job has from its shell, with `--shell-job`.
//!
//! Read from: fstat(2), TIOCGSID and TIOCGPGRP, the termios.
//! Rebuilt by: the terminal that the restore runs on takes its place.
//! Refused: a terminal without `--shell-job`; a second terminal; masters of pseudoterminals.

use super::regular;
use crate::contract::{DumpCx, FdKind, FdProbe, FileTable, OpenCx, reopen};
use image::{FdTypes, FownEntry, kind};
use model::options;
use model::{Errno, Failure, Failures, Object};
use std::os::fd::OwnedFd;

pub static KIND: Tty = Tty;

#[derive(Debug)]
pub struct Tty;

/// `regf_id` names the record of its path.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyFileEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub tty_info_id: u32,
    #[prost(uint32, required, tag = "3")]
    pub flags: u32,
    #[prost(message, required, tag = "4")]
    pub fown: FownEntry,
    #[prost(uint32, optional, tag = "6")]
    pub regf_id: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum TtyType {
    Unknown = 0,
    Pty = 1,
    Console = 2,
    Vt = 3,
    Ctty = 4,
    ExtTty = 5,
    Serial = 6,
}

/// `tty-info.img`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyInfoEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(enumeration = "TtyType", required, tag = "2")]
    pub r#type: i32,
    #[prost(bool, required, tag = "3")]
    pub locked: bool,
    #[prost(bool, required, tag = "4")]
    pub exclusive: bool,
    #[prost(bool, required, tag = "5")]
    pub packet_mode: bool,
    #[prost(uint32, required, tag = "6")]
    pub sid: u32,
    #[prost(uint32, required, tag = "7")]
    pub pgrp: u32,
    #[prost(uint32, required, tag = "8")]
    pub rdev: u32,
    #[prost(message, optional, tag = "9")]
    pub termios: Option<TermiosEntry>,
    #[prost(message, optional, tag = "10")]
    pub termios_locked: Option<TermiosEntry>,
    #[prost(message, optional, tag = "11")]
    pub winsize: Option<WinsizeEntry>,
    #[prost(message, optional, tag = "12")]
    pub pty: Option<TtyPtyEntry>,
    #[prost(uint32, optional, tag = "13")]
    pub dev: Option<u32>,
    #[prost(uint32, optional, tag = "14")]
    pub uid: Option<u32>,
    #[prost(uint32, optional, tag = "15")]
    pub gid: Option<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TermiosEntry {
    #[prost(uint32, required, tag = "1")]
    pub c_iflag: u32,
    #[prost(uint32, required, tag = "2")]
    pub c_oflag: u32,
    #[prost(uint32, required, tag = "3")]
    pub c_cflag: u32,
    #[prost(uint32, required, tag = "4")]
    pub c_lflag: u32,
    #[prost(uint32, required, tag = "5")]
    pub c_line: u32,
    #[prost(uint32, required, tag = "6")]
    pub c_ispeed: u32,
    #[prost(uint32, required, tag = "7")]
    pub c_ospeed: u32,
    #[prost(uint32, repeated, tag = "8", packed = "false")]
    pub c_cc: Vec<u32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct WinsizeEntry {
    #[prost(uint32, required, tag = "1")]
    pub ws_row: u32,
    #[prost(uint32, required, tag = "2")]
    pub ws_col: u32,
    #[prost(uint32, required, tag = "3")]
    pub ws_xpixel: u32,
    #[prost(uint32, required, tag = "4")]
    pub ws_ypixel: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct TtyPtyEntry {
    #[prost(uint32, required, tag = "1")]
    pub index: u32,
}


/// Majors of terminals: consoles and serial lines, /dev/tty and /dev/console, masters, slaves.
const VIRTUAL: u32 = 4;
const ALTERNATE: u32 = 5;
const MASTERS: std::ops::RangeInclusive<u32> = 128..=135;
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

const TIOCGSID: u64 = 0x5429;
const TIOCGPGRP: u64 = 0x540f;
const TIOCGWINSZ: u64 = 0x5413;
const TCGETS: u64 = 0x5401;

/// The one terminal of a dump: its device.
#[derive(Debug, Default)]
struct Dumped(Option<u64>);

impl FdKind for Tty {
    type Entry = TtyFileEntry;
    const NAME: &'static str = "terminal";
    const TYPE: FdTypes = FdTypes::Tty;
    const TAG: u32 = 19;

    fn claims(&self, probe: &FdProbe) -> bool {
        let (major, minor) = probe.device();
        let is_terminal = match major {
            VIRTUAL => true,
            ALTERNATE => minor <= 2,
            _ => MASTERS.contains(&major) || SLAVES.contains(&major),
        };
        probe.format() == libc::S_IFCHR && is_terminal && !probe.is_path_only()
    }

    fn dump(&self, probe: &FdProbe, id: u32, cx: &mut DumpCx) -> Result<TtyFileEntry, Failure> {
        let explain = |error: Errno| probe.fail(error, "read the terminal");
        let (major, minor) = probe.device();
        if MASTERS.contains(&major) || (major, minor) == (ALTERNATE, 2) {
            return Err(probe.refuse("is the master of a pseudoterminal, which is not carried yet"));
        }
        if !cx.options.shell_job {
            let why = "is a terminal of the shell that started the process";
            return Err(Failure::policy(probe.object(), why, &options::SHELL_JOB).of(probe.pid));
        }
        let device = cx.shelf.of::<Dumped>().0.replace(probe.stat.st_rdev);
        if device.is_some_and(|device| device != probe.stat.st_rdev) {
            return Err(probe.refuse("is a second terminal; a shell job has one"));
        }
        let object = || probe.object();
        let regf_id = regular::record(&probe.seen(&probe.source()), probe.flags, &object, cx)
            .map_err(|failure| failure.of(probe.pid))?;
        let info_id = probe.stat.st_rdev as u32;
        if device.is_none() {
            let id_of = |request| sys::fd::ioctl_read(&probe.fd, request).unwrap_or(0).max(0) as u32;
            let mut size = [0u8; 64];
            sys::fd::ioctl_bytes(&probe.fd, TIOCGWINSZ, &mut size).map_err(explain)?;
            let half = |at: usize| u32::from(u16::from_ne_bytes([size[at], size[at + 1]]));
            let mut raw = [0u8; 64];
            sys::fd::ioctl_bytes(&probe.fd, TCGETS, &mut raw).map_err(explain)?;
            let word = |at: usize| u32::from_ne_bytes(raw[at..at + 4].try_into().expect("four bytes"));
            let info = TtyInfoEntry {
                id: info_id,
                r#type: TtyType::Pty.into(),
                locked: false,
                exclusive: false,
                packet_mode: false,
                sid: id_of(TIOCGSID),
                pgrp: id_of(TIOCGPGRP),
                rdev: probe.stat.st_rdev as u32,
                // struct termios: four words, the line discipline, nineteen control characters.
                termios: Some(TermiosEntry {
                    c_iflag: word(0),
                    c_oflag: word(4),
                    c_cflag: word(8),
                    c_lflag: word(12),
                    c_line: raw[16].into(),
                    c_ispeed: 0,
                    c_ospeed: 0,
                    c_cc: raw[17..36].iter().map(|c| u32::from(*c)).collect(),
                }),
                termios_locked: None,
                winsize: Some(WinsizeEntry {
                    ws_row: half(0),
                    ws_col: half(2),
                    ws_xpixel: half(4),
                    ws_ypixel: half(6),
                }),
                pty: Some(TtyPtyEntry { index: minor }),
                dev: None,
                uid: Some(probe.stat.st_uid),
                gid: Some(probe.stat.st_gid),
            };
            cx.image("tty-info.img", kind::TTY_INFO).record(&info);
        }
        Ok(TtyFileEntry {
            id,
            tty_info_id: info_id,
            flags: probe.flags,
            fown: probe.owner()?,
            regf_id: Some(regf_id),
        })
    }

    fn link(&self, entries: &[(u32, &TtyFileEntry)], _files: &FileTable) -> Failures {
        let mut infos: Vec<u32> = entries.iter().map(|(_, entry)| entry.tty_info_id).collect();
        infos.dedup();
        match infos.len() {
            0 | 1 => Failures::new(),
            count => vec![Failure::unsupported(
                Object::Tree,
                format!("uses {count} terminals; a shell job has one, others are not carried yet"),
            )],
        }
    }

    fn open(&self, entry: &TtyFileEntry, cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let object = || Object::Named("terminal".into());
        if !cx.options.shell_job {
            let why = "the tree had a terminal of the shell that started it";
            return Err(Failure::policy(object(), why, &options::SHELL_JOB));
        }
        let ours = [0, 1, 2].into_iter().find_map(sys::fd::standard_terminal);
        let ours = ours.ok_or_else(|| Failure::conflict(object(), "restore a shell job", "no terminal is here"))?;
        reopen(&ours, entry.flags).map_err(|error| error.on(object(), "open it"))
    }

    fn owner<'e>(&self, entry: &'e TtyFileEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }
}
