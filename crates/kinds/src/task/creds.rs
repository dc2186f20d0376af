//! Identity: uids, gids, groups, capabilities, securebits, no_new_privs. Each thread has its own.
//!
//! Read from: `/proc/PID/task/TID/status`; PR_GET_SECUREBITS in the thread.
//! Rebuilt by: the calls of credentials(7), in the order in which each still has the right to be made.

use super::{Answers, Ask, ZERO};
use crate::contract::TaskOps;
use agent::Judge;
use image::CredsEntry;
use model::{Failure, Object};
use sys::proc::Status;

/// CAP_CHECKPOINT_RESTORE, the last that Linux has.
const CAP_LAST: u32 = 40;
const CAP_VERSION_3: u32 = 0x2008_0522;
const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
/// PR_CAP_AMBIENT and its command to add one.
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;

#[derive(Debug, Clone, Copy)]
pub struct Asked(usize);

pub fn ask(ask: &mut Ask) -> Asked {
    ask.list.label("read the credentials");
    Asked(ask.list.ok(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into(), ZERO, ZERO, ZERO, ZERO]))
}

fn pair(set: u64) -> Vec<u32> {
    vec![set as u32, (set >> 32) as u32]
}

fn set(pair: &[u32]) -> u64 {
    pair.iter().take(2).enumerate().fold(0, |set, (at, word)| set | u64::from(*word) << (32 * at))
}

impl Asked {
    pub fn answer(self, status: &Status, answers: Answers) -> CredsEntry {
        record(status, answers.result(self.0) as u32)
    }
}

/// The record of a thread's status and securebits.
pub fn record(status: &Status, secbits: u32) -> CredsEntry {
    let ([uid, euid, suid, fsuid], [gid, egid, sgid, fsgid]) = (status.uid, status.gid);
    CredsEntry {
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        cap_inh: pair(status.cap_inherited),
        cap_prm: pair(status.cap_permitted),
        cap_eff: pair(status.cap_effective),
        cap_bnd: pair(status.cap_bounding),
        secbits,
        groups: status.groups.clone(),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: Some(status.no_new_privs),
        cap_amb: pair(status.cap_ambient),
    }
}

/// Bytes of the data of capset(2): effective, permitted, inheritable; low words, then high words.
fn capability_data(effective: u64, permitted: u64, inheritable: u64) -> Vec<u8> {
    [0, 32]
        .into_iter()
        .flat_map(|shift| [effective >> shift, permitted >> shift, inheritable >> shift])
        .flat_map(|word| (word as u32).to_ne_bytes())
        .collect()
}

/// Does a puppet have them already? It was executed by the coordinator, which `own` is, with these securebits: one of root
/// that has all that it may have is the same after an execve(2). Threads that need no change go on sharing theirs.
fn has_already(entry: &CredsEntry, own: &Status, secbits: u32) -> bool {
    let keeps_all = own.cap_permitted == own.cap_bounding && own.cap_effective == own.cap_bounding;
    own.uid == [0; 4] && keeps_all && own.cap_ambient == 0 && secbits == 0 && *entry == record(own, secbits)
}

/// Takes them, if there is anything to take. `own` is what the coordinator, and with it the puppet, has.
///
/// # Errors
/// When `who` would have capabilities that the coordinator lacks.
pub fn take(
    entry: &CredsEntry,
    own: &Status,
    own_securebits: u32,
    who: Object,
    ops: &mut TaskOps,
) -> Result<(), Failure> {
    let missing = missing(entry, own);
    if missing != 0 {
        let why = format!("has capabilities that this program lacks: {missing:#x}");
        return Err(Failure::conflict(who, "set the capabilities", why));
    }
    if has_already(entry, own, own_securebits) { Ok(()) } else { restore(entry, own, ops) }
}

fn restore(entry: &CredsEntry, own: &Status, ops: &mut TaskOps) -> Result<(), Failure> {
    let prctl = |ops: &mut TaskOps, args: [u64; 3]| {
        ops.list.ok(libc::SYS_prctl, &[args[0].into(), args[1].into(), args[2].into(), ZERO, ZERO]);
    };
    ops.list.label("set the groups");
    let groups: Vec<u8> = entry.groups.iter().flat_map(|group| group.to_ne_bytes()).collect();
    let groups = ops.bytes(&groups)?;
    ops.list.ok(libc::SYS_setgroups, &[(entry.groups.len() as u64).into(), groups.into()]);
    // Without this, leaving uid 0 would take away the capabilities that the rest needs.
    ops.list.label("set the uids and gids");
    prctl(ops, [libc::PR_SET_SECUREBITS as u64, SECBIT_NO_SETUID_FIXUP, 0]);
    let ids = [entry.gid, entry.egid, entry.sgid].map(|id| u64::from(id).into());
    ops.list.ok(libc::SYS_setresgid, &ids);
    let ids = [entry.uid, entry.euid, entry.suid].map(|id| u64::from(id).into());
    ops.list.ok(libc::SYS_setresuid, &ids);
    // These two return the former id, whether they succeed or not.
    ops.list.any(libc::SYS_setfsgid, &[u64::from(entry.fsgid).into()]);
    ops.list.any(libc::SYS_setfsuid, &[u64::from(entry.fsuid).into()]);

    ops.list.label("set the capabilities");
    let header = ops.bytes(&[CAP_VERSION_3.to_ne_bytes(), [0; 4]].concat())?;
    let inheritable = set(&entry.cap_inh);
    let all = own.cap_permitted;
    let first = ops.bytes(&capability_data(all, all, inheritable))?;
    ops.list.ok(libc::SYS_capset, &[header.into(), first.into()]);
    let ambient = set(&entry.cap_amb);
    for cap in (0..=CAP_LAST).filter(|cap| ambient >> cap & 1 != 0) {
        let args = [PR_CAP_AMBIENT.into(), PR_CAP_AMBIENT_RAISE.into(), u64::from(cap).into(), ZERO, ZERO];
        ops.list.ok(libc::SYS_prctl, &args);
    }
    let bounding = set(&entry.cap_bnd);
    for cap in (0..=CAP_LAST).filter(|cap| bounding >> cap & 1 == 0 && own.cap_bounding >> cap & 1 != 0) {
        prctl(ops, [libc::PR_CAPBSET_DROP as u64, cap.into(), 0]);
    }
    ops.list.label("set the securebits");
    prctl(ops, [libc::PR_SET_SECUREBITS as u64, entry.secbits.into(), 0]);
    if entry.no_new_privs.is_some_and(|value| value != 0) {
        ops.list.label("set no_new_privs");
        prctl(ops, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0]);
    }
    ops.list.label("set the capabilities");
    let last = capability_data(set(&entry.cap_eff), set(&entry.cap_prm), inheritable);
    let last = ops.bytes(&last)?;
    ops.list.call(libc::SYS_capset, &[header.into(), last.into()], Judge::Ok);
    Ok(())
}

/// Capabilities that a record asks for and this host's root does not have.
fn missing(entry: &CredsEntry, own: &Status) -> u64 {
    set(&entry.cap_prm) & !own.cap_permitted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_survive_the_way_through_words() {
        let caps = 0x1ff_feff_ffff;
        assert_eq!(set(&pair(caps)), caps);
        assert_eq!(capability_data(caps, 0, 0)[..4], (caps as u32).to_ne_bytes());
        assert_eq!(capability_data(caps, 0, 0)[12..16], ((caps >> 32) as u32).to_ne_bytes());
    }
}
