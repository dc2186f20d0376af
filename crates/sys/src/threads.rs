//! What the kernel has of every thread of a process, in one reading ([`crate::each`]): what otherwise each thread has to be
//! made to say by itself, or is written as text.
//!
//! Source: include/linux/sched.h, struct task_struct.

use crate::each::{Each, Sort, Word};
use crate::inside::types;
use std::sync::OnceLock;

/// Of so many threads or processes it is faster to ask the kernel's tracing: to load a program takes time, too.
pub const MANY: usize = 16;

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
    /// Is it one of the kernel's, see [`is_of_kernel`]?
    pub is_of_kernel: bool,
    /// What is the same for threads that have the same ids, groups, capabilities, rights to gain new ones, and system call filters.
    pub identity: [u64; 3],
    /// What is the same for threads that have these in common: memory, descriptors, handlers of signals, and folders.
    pub memory: u64,
    pub files: u64,
    pub handlers: u64,
    pub folders: u64,
    /// What is the same for threads in the same namespaces, of whatever kind.
    pub namespaces: [u64; 3],
    /// The same for the same executable, root and working directory.
    pub exe: [u64; 2],
    pub root: [u64; 2],
    pub cwd: [u64; 2],
}

/// Is a thread with these flags one of the kernel that works for the process, on its io_uring requests? It runs no code of
/// the process. Source: include/linux/sched.h, PF_IO_WORKER and PF_USER_WORKER.
pub fn is_of_kernel(flags: u32) -> bool {
    flags & (0x10 | 0x4000) != 0
}

/// Bits of a thread's flags that are not told elsewhere: no_new_privs. Source: include/linux/sched.h, PFA_NO_NEW_PRIVS.
const NO_NEW_PRIVS: u64 = 1;
/// Namespaces of pids that may lie around ours.
const LEVELS: usize = 4;
/// Bytes of a `struct upid`: number, and address of the namespace.
const UPID: u64 = 16;
/// Of a `struct pid` the number and namespace at each level, and then all else.
const WORDS: usize = 2 * LEVELS + 29;

fn each() -> Option<&'static Each> {
    static EACH: OnceLock<Option<Each>> = OnceLock::new();
    let open = || {
        let types = types()?;
        let task = |member| [("task_struct", member)];
        let behind = |first, structure, member| [("task_struct", first), (structure, member)];
        let (numbers, level) = (behind("thread_pid", "pid", "numbers"), behind("thread_pid", "pid", "level"));
        let [secure_bits, users] = ["securebits", "user_ns"].map(|member| behind("cred", "cred", member));
        let [root, cwd] = ["root", "pwd"].map(|member| behind("fs", "fs_struct", member));
        let exe = behind("mm", "mm_struct", "exe_file");
        let own = [
            "sas_ss_sp",
            "sas_ss_size",
            "sas_ss_flags",
            "pdeath_signal",
            "clear_child_tid",
            "timer_slack_ns",
            "cred",
            "atomic_flags",
            "seccomp",
            "mm",
            "files",
            "sighand",
            "fs",
            "nsproxy",
            "children",
            "flags",
        ]
        .map(task);
        let (comm, pending, policy) = (task("comm"), task("pending"), task("mempolicy"));
        let mut words = vec![Word::Address, Word::Member(&level, 0)];
        words.extend((0..2 * LEVELS as u64).map(|nth| Word::Member(&numbers, nth * UPID / 2)));
        words.extend(own.iter().map(|member| Word::Member(member, 0)));
        words.extend([&secure_bits, &users, &exe].map(|member| Word::Member(member, 0)));
        words.extend([&comm, &comm].into_iter().zip([0, 8]).map(|(member, at)| Word::Member(member, at)));
        for path in [&root, &cwd] {
            words.extend([0, 8].map(|at| Word::Member(path, at)));
        }
        words.push(Word::Member(&pending, types.offset("sigpending", "signal")?));
        // A kernel without nodes has none.
        let has_policies = types.offset("task_struct", "mempolicy").is_some();
        words.push(if has_policies { Word::Member(&policy, 0) } else { Word::Number });
        debug_assert_eq!(words.len(), WORDS);
        Each::new(Sort::Threads, &words)
    };
    EACH.get_or_init(open).as_ref()
}

/// How many namespaces of pids lie around ours.
fn own_level() -> Option<usize> {
    static LEVEL: OnceLock<Option<usize>> = OnceLock::new();
    let read = || {
        let words = each()?.of(crate::process::own_pid())?;
        Some(*words.get(1)? as u32 as usize).filter(|level| *level < LEVELS)
    };
    *LEVEL.get_or_init(read)
}

/// Of each thread of a process; some may be missing unless it stands still. None where this kernel does not tell.
pub fn of(pid: i32) -> Option<Vec<Told>> {
    let level = own_level()?;
    let words = each()?.of(pid)?;
    let children_at = types()?.offset("task_struct", "children")?;
    let (all, _) = words.as_chunks::<WORDS>();
    Some(all.iter().map(|words| told(words, level, children_at)).collect())
}

fn told(words: &[u64; WORDS], level: usize, children_at: u64) -> Told {
    let mut words = words.iter().copied();
    let mut next = || words.next().expect("as many as there are");
    let (address, own_level) = (next(), next() as u32 as usize);
    let levels: [(u64, u64); LEVELS] = std::array::from_fn(|_| (next(), next()));
    let stack = (next(), next(), next() as u32);
    let (death_signal, clear_tid, timer_slack) = (next() as u32, next(), next());
    let identity = [next(), next() & NO_NEW_PRIVS, next()];
    let (memory, files, handlers, folders) = (next(), next(), next(), next());
    let (nsproxy, children, flags) = (next(), next(), next() as u32);
    let (secure_bits, users, exe) = (next() as u32, next(), next());
    let comm: Vec<u8> = [next(), next()].into_iter().flat_map(u64::to_ne_bytes).collect();
    let (root, cwd) = ([next(), next()], [next(), next()]);
    let (pending, policy) = (next(), next());
    let pids = levels.get(own_level).map_or(0, |(_, namespace)| *namespace);
    Told {
        tid: levels[level].0 as u32 as i32,
        comm: comm.split(|byte| *byte == 0).next().unwrap_or_default().to_vec(),
        stack,
        death_signal,
        clear_tid,
        timer_slack,
        has_policy: policy != 0,
        secure_bits,
        has_pending: pending != 0,
        // A list without entries points to itself.
        has_children: children != address.wrapping_add(children_at),
        is_of_kernel: is_of_kernel(flags),
        identity,
        memory,
        files,
        handlers,
        folders,
        // One that lies deeper than is looked is like no other.
        namespaces: [nsproxy, users, if pids == 0 { address } else { pids }],
        exe: [exe, 0],
        root,
        cwd,
    }
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
                // A thread of another test that ends at this moment ends the list, too.
                let told =
                    std::iter::repeat_with(|| told(tid)).take(1000).flatten().next().expect("this thread");
                assert_eq!(told.comm, b"a thread");
                assert_eq!((told.stack.0, told.stack.1), (stack.ss_sp as u64, stack.ss_size as u64));
                assert_eq!((slack, told.timer_slack), (12_345, 12_345));
                assert_eq!((told.death_signal, told.has_policy, told.has_pending), (0, false, false));
                assert!(!told.is_of_kernel);
                assert_ne!(told.clear_tid, 0);
                assert_eq!((told.identity, told.files, told.folders), (own.identity, own.files, own.folders));
            };
            std::thread::Builder::new().name(name).spawn_scoped(scope, run).unwrap().join().unwrap();
        });
    }
}
