//! The descriptors of a task, put in their places.

use super::{Exec, tree_error};
use crate::load::{Checkpoint, Task};
use agent::Judge;
use image::FdinfoEntry;
use kinds::contract::TaskOps;
use model::{Failure, IdMap};
use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use sys::socket;

/// From so many on it pays to send them, many with one message.
const MANY: usize = 256;
/// Descriptors of one message. Source: include/net/scm.h SCM_MAX_FD.
const OF_MESSAGE: usize = 253;
/// `struct cmsghdr` in front of them.
const HEAD: usize = 16;

/// Both ends of a connection with messages in it, open until they were received.
pub struct Courier {
    _near: OwnedFd,
    far: OwnedFd,
    /// How many descriptors are in them.
    count: usize,
}

/// By the id of the table.
pub type Couriers = HashMap<u32, Courier>;

/// Is there something that pays to be sent?
pub fn is_large(checkpoint: &Checkpoint) -> bool {
    checkpoint.tables.values().any(|entries| in_a_row(entries) >= MANY)
}

/// Sends the descriptors of every large table.
pub fn send(checkpoint: &Checkpoint, files: &IdMap<OwnedFd>) -> Result<Couriers, Failure> {
    let rows = checkpoint.tables.iter().map(|(id, entries)| (*id, &entries[..in_a_row(entries)]));
    rows.filter(|(_, row)| row.len() >= MANY)
        .map(|(id, row)| Ok((id, Courier::send(row, |entry| files[entry.id].as_fd())?)))
        .collect()
}

impl Courier {
    /// Sends what these entries refer to, in pieces, as long as it is taken.
    fn send<'f>(
        entries: &[FdinfoEntry],
        file: impl Fn(&FdinfoEntry) -> BorrowedFd<'f>,
    ) -> Result<Courier, Failure> {
        const ROOM: i32 = 16 << 20;
        let (near, far) = socket::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0).map_err(tree_error)?;
        // As much as it lets us: the rest is fetched.
        let _ = socket::set_option(&near, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &ROOM.to_ne_bytes());
        let is_taken = |piece: &&[FdinfoEntry]| {
            let fds: Vec<BorrowedFd> = piece.iter().map(&file).collect();
            socket::send_with(&near, &[0], None, &fds, None).is_ok()
        };
        let count = entries.chunks(OF_MESSAGE).take_while(is_taken).map(<[FdinfoEntry]>::len).sum();
        Ok(Courier { _near: near, far, count })
    }
}

/// How many of these have numbers that the kernel hands out one after the other, from the lowest on.
fn in_a_row(entries: &[FdinfoEntry]) -> usize {
    entries.iter().zip(0..).take_while(|(entry, number)| entry.fd == *number).count()
}

impl Exec<'_> {
    /// Gets every descriptor of the task's table to its number, lowest first, so that the number that the kernel hands
    /// out next is known.
    pub(super) fn descriptors(
        &self,
        at: usize,
        task: &Task,
        couriers: &Couriers,
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        ops.list.label("put the descriptors in place");
        let entries = &self.checkpoint.tables[&task.ids.files_id];
        let mut lowest = 0;
        if let Some(courier) = couriers.get(&task.ids.files_id) {
            self.receive(courier, self.service.exe + at as i32, &entries[..courier.count], ops)?;
            lowest = courier.count as i32;
        }
        for entry in &entries[lowest as usize..] {
            let (number, is_cloexec) = (entry.fd as i32, entry.flags & 1 != 0);
            self.reach().fetch(self.open.files[entry.id].as_raw_fd(), ops);
            if number != lowest {
                let flags = if is_cloexec { libc::O_CLOEXEC } else { 0 };
                ops.list.ok(libc::SYS_dup3, &[lowest.into(), number.into(), flags.into()]);
                ops.list.ok(libc::SYS_close, &[lowest.into()]);
            } else {
                lowest += 1;
                if !is_cloexec {
                    ops.list.ok(libc::SYS_fcntl, &[number.into(), libc::F_SETFD.into(), 0.into()]);
                }
            }
        }
        Ok(())
    }

    /// Has a task take what was sent; `number` is free in it.
    fn receive(
        &self,
        courier: &Courier,
        number: i32,
        entries: &[FdinfoEntry],
        ops: &mut TaskOps,
    ) -> Result<(), Failure> {
        self.reach().fetch_to(courier.far.as_raw_fd(), number, ops);
        let byte = ops.room(8)?;
        let iovec = ops.bytes(&[byte.to_ne_bytes(), 1u64.to_ne_bytes()].concat())?;
        let control = ops.room(HEAD + 4 * OF_MESSAGE)?;
        for piece in entries.chunks(OF_MESSAGE) {
            let closing = piece.iter().filter(|entry| entry.flags & 1 != 0).count();
            let is_cloexec = 2 * closing > piece.len();
            // struct msghdr: name (two words), iovec and their number, control and its length, flags.
            let length = (HEAD + 4 * piece.len()) as u64;
            let words = [0, 0, iovec, 1, control, length, 0];
            let header = ops.bytes(&words.map(u64::to_ne_bytes).concat())?;
            let flags = if is_cloexec { libc::MSG_CMSG_CLOEXEC } else { 0 };
            ops.list.call(libc::SYS_recvmsg, &[number.into(), header.into(), flags.into()], Judge::Equal(1));
            // The kernel leaves out, without an error, what there is no room for; it is there when the last one is.
            let last = piece.last().map_or(0, |entry| entry.fd);
            ops.list.ok(libc::SYS_fcntl, &[(last as i32).into(), libc::F_GETFD.into(), 0.into()]);
            for entry in piece.iter().filter(|entry| (entry.flags & 1 != 0) != is_cloexec) {
                let flags = if is_cloexec { 0 } else { libc::FD_CLOEXEC };
                let number = (entry.fd as i32).into();
                ops.list.ok(libc::SYS_fcntl, &[number, libc::F_SETFD.into(), flags.into()]);
            }
        }
        ops.list.ok(libc::SYS_close, &[number.into()]);
        Ok(())
    }
}
