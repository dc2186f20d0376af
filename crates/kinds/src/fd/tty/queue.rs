//! What is between the two ends of a pseudoterminal and was not read yet.
//!
//! The kernel has no way to look at it: it is read, and put in again when the tree goes on after all. So it is taken
//! last of all in a dump. Both ends take bytes by TIOCSTI as if they came from the other; more than a terminal
//! holds goes through the slave itself.
//!
//! Lines and the end of file keep their borders, and so does what is typed but is no line yet. Without echo, without
//! signals: all of that happened when it was typed.
//!
//! With both ends empty, a slave that cannot be written to is one whose output was stopped.
//!
//! Not kept: what was written to a slave that nobody has open; a status of packet mode, which cannot be taken
//! without losing it, so that the queue behind it stays where it is, with a warning.

use crate::contract::reopen;
use std::os::fd::OwnedFd;
use sys::Errno;
use sys::tty::{self, Termios};

/// What a terminal holds for reading, less what ends a line. Source: drivers/tty/n_tty.c, N_TTY_BUF_SIZE.
const ROOM: usize = 4095;
/// More is not between two ends.
const LIMIT: usize = 1 << 20;

/// Who has stopped the output of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The character for it, which another lets go on.
    Typed,
    /// tcflow(3).
    Called,
}

/// What was between them.
#[derive(Debug, Default)]
pub struct Taken {
    /// For the master.
    pub output: Vec<u8>,
    /// For the slave: whole lines, each as one read(2) gives it.
    pub lines: Vec<Vec<u8>>,
    pub typed: Vec<u8>,
    /// Not taken, only seen.
    pub stopped: Option<Stop>,
}

impl Taken {
    fn is_empty(&self) -> bool {
        self.output.is_empty() && self.lines.is_empty() && self.typed.is_empty()
    }
}

/// What a dump has taken. Dropped, it goes back to where it was.
#[must_use]
#[derive(Debug, Default)]
pub struct Queues(Vec<(OwnedFd, Option<OwnedFd>, Taken)>);

impl Queues {
    pub(super) fn push(&mut self, master: OwnedFd, slave: Option<OwnedFd>, taken: Taken) {
        if !taken.is_empty() {
            self.0.push((master, slave, taken));
        }
    }

    /// The tree is gone.
    pub fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        for (master, slave, taken) in &self.0 {
            let is_packet_mode = tty::is_packet_mode(master).unwrap_or(false);
            put(master, slave.as_ref(), taken);
            let _ = tty::set_packet_mode(master, is_packet_mode);
        }
    }
}

/// Reads both directions empty.
pub(super) fn take(master: &OwnedFd, slave: Option<&OwnedFd>) -> Taken {
    let mut taken = Taken::default();
    let is_packet_mode = tty::is_packet_mode(master).unwrap_or(false);
    if is_packet_mode && tty::poll(master) & libc::POLLPRI != 0 {
        log::warn!("a status of a pseudoterminal in packet mode and what follows it are not kept");
    } else {
        let mut some = vec![0; 1 << 16];
        while tty::poll(master) & libc::POLLIN != 0 && taken.output.len() < LIMIT {
            let Ok(count) = sys::fd::read(master, &mut some) else { break };
            let start = usize::from(is_packet_mode).min(count);
            taken.output.extend_from_slice(&some[start..count]);
        }
    }
    if let Some(slave) = slave
        && let Err(error) = take_input(slave, &mut taken)
    {
        log::warn!("what was typed on a pseudoterminal is not kept: {error}");
    }
    // In packet mode the question would be a status.
    if let Some(slave) = slave.filter(|_| !is_packet_mode) {
        taken.stopped = stopped(slave).unwrap_or(None);
    }
    taken
}

/// Does the output stand still, now that the other end has room? Then nothing can be written. Whether the character for
/// going on helps tells who has stopped it.
fn stopped(slave: &OwnedFd) -> Result<Option<Stop>, Errno> {
    if tty::poll(slave) & libc::POLLOUT != 0 {
        return Ok(None);
    }
    let termios = tty::termios(slave)?;
    if termios.iflag & libc::IXON == 0 {
        return Ok(Some(Stop::Called));
    }
    tty::put_in(slave, termios.cc[tty::VSTART])?;
    if tty::poll(slave) & libc::POLLOUT == 0 {
        return Ok(Some(Stop::Called));
    }
    tty::put_in(slave, termios.cc[tty::VSTOP])?;
    Ok(Some(Stop::Typed))
}

/// Stops the output of a terminal.
pub(super) fn stop(slave: &OwnedFd, how: Stop) -> Result<(), Errno> {
    let termios = tty::termios(slave)?;
    match how {
        Stop::Typed if termios.iflag & libc::IXON != 0 => tty::put_in(slave, termios.cc[tty::VSTOP]),
        _ => tty::stop(slave),
    }
}

fn has_lines(termios: &Termios) -> bool {
    termios.lflag & libc::ICANON != 0
}

fn take_input(slave: &OwnedFd, taken: &mut Taken) -> Result<(), Errno> {
    // A file of our own: reads of the tree's may wait.
    let slave = reopen(slave, (libc::O_RDWR | libc::O_NONBLOCK) as u32)?;
    let termios = tty::termios(&slave)?;
    let mut some = vec![0; 1 << 16];
    if has_lines(&termios) {
        while tty::poll(&slave) & libc::POLLIN != 0 && taken.lines.len() < ROOM {
            let count = sys::fd::read(&slave, &mut some)?;
            taken.lines.push(some[..count].to_vec());
        }
        // What is no line yet can be read when there are no lines.
        let mut raw = Termios { lflag: termios.lflag & !libc::ICANON, ..termios };
        raw.cc[tty::VMIN] = 1;
        tty::set_termios(&slave, raw)?;
    }
    while let Ok(count @ 1..) = sys::fd::read(&slave, &mut some)
        && taken.typed.len() < LIMIT
    {
        taken.typed.extend_from_slice(&some[..count]);
    }
    if has_lines(&termios) {
        tty::set_termios(&slave, termios)?;
    }
    Ok(())
}

/// Puts in again what was taken; what finds no room is lost, with a warning. Packet mode is off afterwards.
pub(super) fn put(master: &OwnedFd, slave: Option<&OwnedFd>, taken: &Taken) {
    if !taken.lines.is_empty() || !taken.typed.is_empty() {
        let done = slave.map(|slave| put_input(slave, taken));
        if let Some(Err(error)) = done {
            log::warn!("what was typed on a pseudoterminal is lost: {error}");
        }
    }
    if taken.output.is_empty() {
        return;
    }
    let done = put_output(master, &taken.output);
    if let Err(error) = done {
        log::warn!("what was written to a pseudoterminal is lost: {error}");
    }
}

fn put_output(master: &OwnedFd, output: &[u8]) -> Result<(), Errno> {
    tty::set_packet_mode(master, false)?;
    let (first, mut rest) = output.split_at(output.len().min(ROOM));
    first.iter().try_for_each(|byte| tty::put_in(master, *byte))?;
    if rest.is_empty() {
        return Ok(());
    }
    let slave = tty::peer(master, libc::O_RDWR | libc::O_NONBLOCK)?;
    let termios = tty::termios(&slave)?;
    tty::set_termios(&slave, Termios { oflag: termios.oflag & !libc::OPOST, ..termios })?;
    let mut written = Ok(());
    while !rest.is_empty() && written.is_ok() {
        written = sys::fd::write(&slave, rest).map(|count| rest = &rest[count..]);
    }
    tty::set_termios(&slave, termios)?;
    written
}

fn put_input(slave: &OwnedFd, taken: &Taken) -> Result<(), Errno> {
    let termios = tty::termios(slave)?;
    // Nothing is done about any byte but the ends of lines. Without IXON a terminal that is stopped would go on.
    let mut quiet = Termios {
        iflag: termios.iflag & libc::IXON,
        lflag: termios.lflag & (libc::ICANON | libc::IEXTEN | libc::EXTPROC),
        ..termios
    };
    for (at, character) in quiet.cc.iter_mut().enumerate() {
        if ![tty::VSTART, tty::VSTOP, tty::VEOL, tty::VEOL2].contains(&at) {
            *character = 0;
        }
    }
    let ends = [b'\n', termios.cc[tty::VEOL], termios.cc[tty::VEOL2]];
    let is_used = |byte: &u8| ends.contains(byte) || taken.lines.iter().flatten().chain(&taken.typed).any(|c| c == byte);
    let end_of_file = (1..=u8::MAX).find(|byte| !is_used(byte));
    if has_lines(&termios) {
        quiet.cc[tty::VEOF] = end_of_file.unwrap_or(0);
    }
    tty::set_termios(slave, quiet)?;
    let put = |bytes: &[u8]| bytes.iter().try_for_each(|byte| tty::put_in(slave, *byte));
    let mut done = Ok(());
    for line in &taken.lines {
        let is_ended = line.last().is_some_and(|last| *last != 0 && ends.contains(last));
        let end = end_of_file.filter(|_| !is_ended);
        done = done.and_then(|()| put(line)).and_then(|()| end.map_or(Ok(()), |end| tty::put_in(slave, end)));
    }
    let done = done.and_then(|()| put(&taken.typed));
    tty::set_termios(slave, termios)?;
    done
}
