//! timerfd(2): a timer whose expirations are read from a file.
//!
//! Read from: `fdinfo` (clock, ticks that were not read, flags, time left, interval).
//! Rebuilt by: timerfd_create(2); at the very end TFD_IOC_SET_TICKS and timerfd_settime(2), so that no time
//! passes for it while the tree is being built. Time left is relative: the clock stands during the freeze.
//! Not kept: the point in time of an absolute timer; it fires after the time that was left.

use crate::contract::{FileTable, DumpCx, FdKind, FdProbe, OpenCx, set_new_status};
use image::{FdTypes, FownEntry};
use model::{Errno, Failure, Object};
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};

pub static KIND: Timerfd = Timerfd;

#[derive(Debug)]
pub struct Timerfd;

/// Value and interval, in seconds and nanoseconds.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TimerfdEntry {
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    #[prost(uint32, required, tag = "2")]
    pub flags: u32,
    #[prost(message, required, tag = "3")]
    pub fown: FownEntry,
    #[prost(uint32, required, tag = "4")]
    pub clockid: u32,
    #[prost(uint64, required, tag = "5")]
    pub ticks: u64,
    #[prost(uint32, required, tag = "6")]
    pub settime_flags: u32,
    #[prost(uint64, required, tag = "7")]
    pub vsec: u64,
    #[prost(uint64, required, tag = "8")]
    pub vnsec: u64,
    #[prost(uint64, required, tag = "9")]
    pub isec: u64,
    #[prost(uint64, required, tag = "10")]
    pub insec: u64,
}


const NSEC: u64 = 1_000_000_000;
/// Flags of timerfd_settime(2).
const ABSOLUTE: u32 = 1;
const CANCEL_ON_SET: u32 = 2;

/// "(seconds, nanoseconds)" of an `it_value:` line.
fn parse_time(text: &[u8]) -> Option<(u64, u64)> {
    let text = std::str::from_utf8(text).ok()?.trim().strip_prefix('(')?.strip_suffix(')')?;
    let (seconds, nanoseconds) = text.split_once(',')?;
    Some((seconds.trim().parse().ok()?, nanoseconds.trim().parse().ok()?))
}

impl FdKind for Timerfd {
    type Entry = TimerfdEntry;
    const NAME: &'static str = "timerfd";
    const TYPE: FdTypes = FdTypes::Timerfd;
    const TAG: u32 = 12;

    fn claims(&self, probe: &FdProbe) -> bool {
        probe.anon_inode() == Some(b"timerfd")
    }

    fn dump(&self, probe: &FdProbe, id: u32, _cx: &mut DumpCx) -> Result<TimerfdEntry, Failure> {
        let mut info = std::borrow::Cow::Borrowed(probe.info());
        let is = |info: &[u8], key: &str| sys::proc::fdinfo(info, key).and_then(parse_time) != Some((0, 0));
        if !is(&info, "it_value") && is(&info, "it_interval") {
            // It has expired and waits for a reader to count how often; to ask for the time left does as well.
            let explain = |error: Errno| probe.fail(error, "count its expirations");
            sys::fd::timerfd_get(&probe.fd).map_err(explain)?;
            let texts = sys::fd::Texts::of(std::process::id() as i32).map_err(explain)?;
            info = texts.info(probe.fd.as_raw_fd()).map_err(explain)?.into();
        }
        let text = |key: &str| sys::proc::fdinfo(&info, key);
        let missing = || probe.refuse("the kernel does not tell its state (CONFIG_CHECKPOINT_RESTORE)");
        let number = |key: &str| text(key).and_then(sys::proc::decimal::<u64>).ok_or_else(missing);
        let time = |key: &str| text(key).and_then(parse_time).ok_or_else(missing);
        let flags = text("settime flags").and_then(|flags| {
            u32::from_str_radix(std::str::from_utf8(flags).ok()?.trim_start_matches("0"), 8).ok().or(Some(0))
        });
        let ((vsec, vnsec), (isec, insec)) = (time("it_value")?, time("it_interval")?);
        Ok(TimerfdEntry {
            id,
            flags: probe.flags,
            fown: probe.owner()?,
            clockid: number("clockid")? as u32,
            ticks: number("ticks")?,
            settime_flags: flags.ok_or_else(missing)?,
            vsec,
            vnsec,
            isec,
            insec,
        })
    }

    fn group(&self, entry: &TimerfdEntry, _files: &FileTable) -> Option<u64> {
        Some(entry.id.into())
    }

    fn open(&self, entry: &TimerfdEntry, _cx: &mut OpenCx) -> Result<OwnedFd, Failure> {
        let explain = |error: model::Errno| error.on(Object::Named("timerfd".into()), "make it");
        let fd = sys::fd::timerfd(entry.clockid as i32).map_err(explain)?;
        set_new_status(&fd, 0, entry.flags).map_err(explain)?;
        Ok(fd)
    }

    fn owner<'e>(&self, entry: &'e TimerfdEntry) -> Option<&'e FownEntry> {
        Some(&entry.fown)
    }

    fn arm(
        &self,
        entry: &TimerfdEntry,
        fd: &OwnedFd,
        _files: &HashMap<u32, OwnedFd>,
    ) -> Result<(), Failure> {
        let explain = |error: model::Errno| error.on(Object::Named("timerfd".into()), "arm it");
        let (mut vsec, mut vnsec) = (entry.vsec, entry.vnsec);
        if (vsec, vnsec) == (0, 0) && entry.ticks != 0 {
            // In images of CRIU one that has expired before anybody read it.
            (vsec, vnsec) = (entry.isec, entry.insec);
        }
        if (vsec, vnsec) != (0, 0) {
            let is_absolute = entry.settime_flags & ABSOLUTE != 0;
            if is_absolute {
                // The clock has gone on meanwhile; the timer takes up where it was, as a relative one does.
                // Alarms have the time of the clock without; the kernel tells theirs only where it could sleep.
                let clock = match entry.clockid as i32 {
                    libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
                    libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
                    clock => clock,
                };
                let due = sys::clock::now_ns(clock)
                    .saturating_add(vsec.saturating_mul(NSEC))
                    .saturating_add(vnsec);
                (vsec, vnsec) = (due / NSEC, due % NSEC);
            }
            let flags = (entry.settime_flags & (ABSOLUTE | CANCEL_ON_SET)) as i32;
            sys::fd::timerfd_set(fd, flags, (vsec, vnsec), (entry.isec, entry.insec)).map_err(explain)?;
        }
        if entry.ticks != 0 {
            sys::fd::timerfd_set_ticks(fd, entry.ticks).map_err(explain)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_time_in_parentheses_is_understood() {
        assert_eq!(super::parse_time(b"(12, 345)"), Some((12, 345)));
        assert_eq!(super::parse_time(b"12, 345"), None);
    }
}
