//! Credentials as the kernel has them (`struct cred`), also where no thread has them any more: those that a file was given.
//!
//! Source: include/linux/cred.h.

use crate::inside::inside;
use crate::proc::Status;

/// Those at an address, as the status of a thread would tell them, and their securebits. None where the kernel does not
/// tell; nor where they are of another user namespace than ours, or ours counts ids in another way than the kernel.
pub fn at(address: u64) -> Option<(Status, u32)> {
    const CRED: &str = "cred";
    const GROUPS: &str = "group_info";
    /// Source: include/uapi/linux/limits.h.
    const NGROUPS_MAX: u32 = 65536;
    let inside = inside()?;
    let own = inside.member(inside.task(crate::process::own_pid())?, "task_struct", "cred")?;
    let space = |cred: u64| inside.member(cred, CRED, "user_ns");
    if space(address)? != space(own)? || !counts_as_the_kernel() {
        return None;
    }
    let int = |member: &str| inside.int(inside.at(address, CRED, member)?);
    let long = |member: &str| inside.member(address, CRED, member);
    let info = long("group_info")?;
    let count = inside.int(inside.at(info, GROUPS, "ngroups")?).filter(|count| *count <= NGROUPS_MAX)?;
    let first = inside.at(info, GROUPS, "gid")?;
    let status = Status {
        uid: [int("uid")?, int("euid")?, int("suid")?, int("fsuid")?],
        gid: [int("gid")?, int("egid")?, int("sgid")?, int("fsgid")?],
        groups: (0..count).map(|nth| inside.int(first + u64::from(nth) * 4)).collect::<Option<_>>()?,
        cap_inherited: long("cap_inheritable")?,
        cap_permitted: long("cap_permitted")?,
        cap_effective: long("cap_effective")?,
        cap_bounding: long("cap_bset")?,
        cap_ambient: long("cap_ambient")?,
        ..Status::default()
    };
    Some((status, int("securebits")?))
}

/// Does our user namespace have all ids, each as itself?
fn counts_as_the_kernel() -> bool {
    ["uid_map", "gid_map"].iter().all(|name| {
        let text = std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
        text.split_ascii_whitespace().eq(["0", "0", "4294967295"])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_credentials_are_those_that_proc_tells() {
        let Some(inside) = inside() else { return println!("SKIP: no BPF iterators here") };
        if !counts_as_the_kernel() {
            return println!("SKIP: in a user namespace");
        }
        // SAFETY: takes nothing.
        let me = unsafe { libc::gettid() };
        let task = inside.task(me).expect("a task");
        let address = inside.member(task, "task_struct", "cred").expect("credentials");
        let (told, _) = at(address).expect("what they are");
        let text = std::fs::read("/proc/thread-self/status").expect("read");
        let status = crate::proc::parse_status(&text).expect("understood");
        let ids = |status: &Status| (status.uid, status.gid, status.groups.clone());
        let caps = |status: &Status| {
            [
                status.cap_inherited,
                status.cap_permitted,
                status.cap_effective,
                status.cap_bounding,
                status.cap_ambient,
            ]
        };
        assert_eq!((ids(&told), caps(&told)), (ids(&status), caps(&status)));
        assert!(at(8).is_none());
    }
}
