//! What the kernel has of every thread of a process, in one reading ([`crate::each`]): what otherwise each thread has to be
//! made to say by itself, or is written as text.
//!
//! Source: include/linux/sched.h, struct task_struct.

use crate::each::{Each, Sort, Word};
use crate::inside::types;
use std::sync::OnceLock;

/// What is told of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub tid: i32,
    /// At most 15 bytes.
    pub comm: Vec<u8>,
    /// The alternate signal stack: where, how long, its flags.
    pub stack: (u64, u64, u32),
    pub death_signal: u32,
    /// Where the kernel writes zero when the thread ends.
    pub clear_tid: u64,
    /// Nanoseconds.
    pub timer_slack: u64,
    /// Has it a policy for its memory?
    pub has_policy: bool,
    pub secure_bits: u32,
    /// Does a signal wait for this thread alone?
    pub has_pending: bool,
    /// Has it children of its own?
    pub has_children: bool,
    /// What is the same for threads that have the same ids, groups, capabilities, rights to gain new ones, and system call filters.
    pub identity: [u64; 3],
    /// What is the same for threads that have descriptors, and folders, in common.
    pub files: u64,
    pub folders: u64,
}

/// Bits of a thread's flags that are not told elsewhere: no_new_privs. Source: include/linux/sched.h, PFA_NO_NEW_PRIVS.
const NO_NEW_PRIVS: u64 = 1;
/// Namespaces of pids that may lie around ours.
const LEVELS: usize = 4;
/// Of a `struct upid`: number, and address of the namespace.
const UPID: u64 = 16;
const WORDS: usize = LEVELS + 19;

fn each() -> Option<&'static Each> {
    static EACH: OnceLock<Option<Each>> = OnceLock::new();
    let open = || {
        let types = types()?;
        let task = |member| [("task_struct", member)];
        let pid = |member| [("task_struct", "thread_pid"), ("pid", member)];
        let (numbers, level) = (pid("numbers"), pid("level"));
        let cred = [("task_struct", "cred"), ("cred", "securebits")];
        let names = [
            "comm",
            "sas_ss_sp",
            "sas_ss_size",
            "sas_ss_flags",
            "pdeath_signal",
            "clear_child_tid",
            "timer_slack_ns",
            "pending",
            "cred",
            "atomic_flags",
            "seccomp",
            "files",
            "fs",
            "children",
            "mempolicy",
        ]
        .map(task);
        let [
            comm,
            sp,
            size,
            flags,
            death,
            clear,
            slack,
            pending,
            creds,
            atomic,
            seccomp,
            files,
            fs,
            children,
            policy,
        ] = names.each_ref().map(|member| &member[..]);
        let has_policies = types.offset("task_struct", "mempolicy").is_some();
        let mut words = vec![Word::Address];
        words.extend((0..LEVELS as u64).map(|level| Word::Member(&numbers, level * UPID)));
        words.extend([
            Word::Member(&level, 0),
            Word::Member(comm, 0),
            Word::Member(comm, 8),
            Word::Member(sp, 0),
            Word::Member(size, 0),
            Word::Member(flags, 0),
            Word::Member(death, 0),
            Word::Member(clear, 0),
            Word::Member(slack, 0),
            // A kernel without nodes has none.
            if has_policies { Word::Member(policy, 0) } else { Word::Number },
            Word::Member(&cred, 0),
            Word::Member(pending, types.offset("sigpending", "signal")?),
            Word::Member(creds, 0),
            Word::Member(atomic, 0),
            Word::Member(seccomp, 0),
            Word::Member(files, 0),
            Word::Member(fs, 0),
            Word::Member(children, 0),
        ]);
        Each::new(Sort::Threads, &words)
    };
    EACH.get_or_init(open).as_ref()
}

/// How many namespaces of pids lie around ours.
fn own_level() -> Option<usize> {
    static LEVEL: OnceLock<Option<usize>> = OnceLock::new();
    let read = || {
        let words = each()?.of(crate::process::own_pid())?;
        Some(*words.get(1 + LEVELS)? as u32 as usize).filter(|level| *level < LEVELS)
    };
    *LEVEL.get_or_init(read)
}

/// Of each thread of a process that stands still; none where this kernel does not tell.
pub fn of(pid: i32) -> Option<Vec<Told>> {
    let level = own_level()?;
    let words = each()?.of(pid)?;
    let children_at = types()?.offset("task_struct", "children")?;
    let (all, _) = words.as_chunks::<WORDS>();
    let told = all.iter().map(|words| {
        let tid = words[1 + level] as u32 as i32;
        let &[
            _,
            name,
            more,
            sp,
            size,
            flags,
            death,
            clear_tid,
            timer_slack,
            policy,
            bits,
            pending,
            creds,
            atomic,
            seccomp,
            files,
            folders,
            children,
        ] = words.last_chunk::<18>().expect("there are more");
        let comm: Vec<u8> = [name, more].into_iter().flat_map(u64::to_ne_bytes).collect();
        Told {
            tid,
            comm: comm.split(|byte| *byte == 0).next().unwrap_or_default().to_vec(),
            stack: (sp, size, flags as u32),
            death_signal: death as u32,
            clear_tid,
            timer_slack,
            has_policy: policy != 0,
            secure_bits: bits as u32,
            has_pending: pending != 0,
            // A list without entries points to itself.
            has_children: children != words[0].wrapping_add(children_at),
            identity: [creds, atomic & NO_NEW_PRIVS, seccomp],
            files,
            folders,
        }
    });
    Some(told.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_what_the_thread_says() {
        let told = |tid| of(crate::process::own_pid())?.into_iter().find(|told| told.tid == tid);
        let Some(own) = told(crate::process::own_pid()) else {
            return println!("SKIP: no BPF iterators here");
        };
        std::thread::scope(|scope| {
            let name = "a thread".to_owned();
            let run = || {
                // SAFETY: takes nothing.
                let tid = unsafe { libc::gettid() };
                let mut stack = std::mem::MaybeUninit::<libc::stack_t>::uninit();
                // SAFETY: the structure is large enough.
                let stack = unsafe {
                    libc::sigaltstack(std::ptr::null(), stack.as_mut_ptr());
                    stack.assume_init()
                };
                // SAFETY: takes no addresses.
                let slack = unsafe {
                    libc::prctl(libc::PR_SET_TIMERSLACK, 12_345, 0, 0, 0);
                    libc::prctl(libc::PR_GET_TIMERSLACK, 0, 0, 0, 0)
                };
                let told = told(tid).expect("this thread");
                assert_eq!(told.comm, b"a thread");
                assert_eq!((told.stack.0, told.stack.1), (stack.ss_sp as u64, stack.ss_size as u64));
                assert_eq!((slack, told.timer_slack), (12_345, 12_345));
                assert_eq!((told.death_signal, told.has_policy, told.has_pending), (0, false, false));
                assert_ne!(told.clear_tid, 0);
                assert_eq!((told.identity, told.files, told.folders), (own.identity, own.files, own.folders));
            };
            std::thread::Builder::new().name(name).spawn_scoped(scope, run).unwrap().join().unwrap();
        });
    }
}
