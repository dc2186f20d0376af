//! Handlers, masks, queued signals.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicUsize, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};

/// What the handler of [`count`] has seen last, and how often.
#[derive(Debug)]
pub struct Seen {
    pub times: AtomicU32,
    pub signal: AtomicI32,
    pub code: AtomicI32,
    pub value: AtomicUsize,
    /// An address inside the handler's stack frame.
    pub stack: AtomicUsize,
}

pub static SEEN: Seen = Seen {
    times: AtomicU32::new(0),
    signal: AtomicI32::new(0),
    code: AtomicI32::new(0),
    value: AtomicUsize::new(0),
    stack: AtomicUsize::new(0),
};

impl Seen {
    pub fn times(&self) -> u32 {
        self.times.load(Ordering::SeqCst)
    }
}

extern "C" fn record(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let here = 0_u8;
    SEEN.stack.store(&raw const here as usize, Ordering::SeqCst);
    SEEN.signal.store(signal, Ordering::SeqCst);
    // SAFETY: with SA_SIGINFO the kernel passes a siginfo that lives as long as the handler runs; si_value
    // lies inside its fixed size whatever the signal is.
    let (code, value) = unsafe { ((*info).si_code, (*info).si_value().sival_ptr as usize) };
    SEEN.code.store(code, Ordering::SeqCst);
    SEEN.value.store(value, Ordering::SeqCst);
    SEEN.times.fetch_add(1, Ordering::SeqCst);
}

/// Lets `signal` be counted in [`SEEN`].
#[track_caller]
pub fn count(signal: Signal, flags: SaFlags) {
    let action = SigAction::new(SigHandler::SigAction(record), flags | SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler only stores to atomics, which is async-signal-safe.
    unsafe { sigaction(signal, &action) }.expect("sigaction");
}

/// sigaction(2) for any number, real-time signals included, as `(handler, flags, mask)`.
#[track_caller]
pub fn action(signal: i32) -> (usize, i32, u64) {
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks only; the kernel writes one sigaction to the local, which is large enough, during the call.
    super::call::check("sigaction", unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) });
    // SAFETY: zeroed, then filled by the call above; every bit pattern of its integers is valid.
    let old = unsafe { old.assume_init() };
    let mut mask = 0;
    for number in 1..=64 {
        // SAFETY: reads one bit of a live local.
        if unsafe { libc::sigismember(&raw const old.sa_mask, number) } == 1 {
            mask |= 1 << (number - 1);
        }
    }
    (old.sa_sigaction, old.sa_flags, mask)
}

/// Sets an action of any number. `handler` is `SIG_IGN`, `SIG_DFL`, or [`recorder`].
#[track_caller]
pub fn set_action(signal: i32, handler: usize, flags: i32, masked: &[i32]) {
    assert!([libc::SIG_DFL, libc::SIG_IGN, recorder()].contains(&handler));
    // SAFETY: an all-zero sigaction is a valid value: default action, empty mask, no flags.
    let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler;
    new.sa_flags = flags;
    for number in masked {
        // SAFETY: sets one bit of a live local.
        unsafe { libc::sigaddset(&raw mut new.sa_mask, *number) };
    }
    // SAFETY: the kernel reads one live local; the handler is one of three that are safe to run at any time.
    super::call::check("sigaction", unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) });
}

/// The handler of [`count`] as a number.
pub fn recorder() -> usize {
    record as *const () as usize
}

pub fn set_of(signals: &[Signal]) -> SigSet {
    signals.iter().copied().collect()
}

#[track_caller]
pub fn block(signals: &[Signal]) {
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set_of(signals)), None).expect("sigprocmask");
}

#[track_caller]
pub fn unblock(signals: &[Signal]) {
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&set_of(signals)), None).expect("sigprocmask");
}

/// Blocks one signal by its number: real-time signals are no `Signal`.
#[track_caller]
pub fn block_number(signal: i32) {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: both calls write to, and the last reads from, one live local.
    let result = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    assert_eq!(result, 0, "pthread_sigmask");
}

/// sigqueue(3) to this process, or to one thread of it: `SI_QUEUE` with a value.
#[track_caller]
pub fn queue(tid: Option<i32>, signal: i32, value: usize) {
    let pid = std::process::id();
    // The layout of siginfo_t on 64-bit kernels for SI_QUEUE (asm-generic/siginfo.h).
    #[repr(C)]
    struct Queued {
        number: i32,
        errno: i32,
        code: i32,
        pad: i32,
        pid: u32,
        uid: u32,
        value: usize,
        rest: [u64; 12],
    }
    const { assert!(size_of::<Queued>() == 128) };
    let info =
        Queued { number: signal, errno: 0, code: libc::SI_QUEUE, pad: 0, pid, uid: 0, value, rest: [0; 12] };
    let result = match tid {
        // SAFETY: the kernel reads 128 bytes of a live local during the call.
        Some(tid) => unsafe { libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, tid, signal, &raw const info) },
        // SAFETY: as above.
        None => unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, &raw const info) },
    };
    super::call::check("rt_sigqueueinfo", result);
}

/// One pending signal as `(signal, code, value)`, taken from the queue, or none.
///
/// Not through the C library, which turns `SI_TKILL` into `SI_USER`.
pub fn take(signals: &[i32]) -> Option<(i32, i32, usize)> {
    let set: u64 = signals.iter().map(|signal| 1 << (signal - 1)).sum();
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel reads eight bytes of set and the timeout, and writes one siginfo, all live locals,
    // during the call.
    let signal = unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const set,
            info.as_mut_ptr(),
            &raw const now,
            size_of::<u64>(),
        )
    };
    if signal < 0 {
        return None;
    }
    // SAFETY: zeroed, then written by the kernel; si_value lies inside its fixed size.
    let (code, value) = unsafe {
        let info = info.assume_init();
        (info.si_code, info.si_value().sival_ptr as usize)
    };
    Some((signal as i32, code, value))
}

/// Installs an alternate stack of `length` bytes that stays for the life of the process.
#[track_caller]
/// Takes a pending signal of a file: its number, and the descriptor that it tells.
pub fn take_of_file(signal: i32) -> Option<(i32, i32)> {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: sets and records are integers, for which zero is valid; all live for the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, signal);
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let got = libc::sigtimedwait(&raw const set, &raw mut info, &raw const now);
        // Three integers and a pad, the band, then the descriptor.
        (got > 0).then(|| (got, (&raw const info).cast::<i32>().add(6).read()))
    }
}

/// Has `fd` send `signal` when it becomes ready, to an owner of this kind (F_SETOWN_EX).
pub fn send_for(fd: std::os::fd::BorrowedFd, kind: i32, id: i32, signal: i32) {
    use std::os::fd::AsRawFd;
    const F_SETOWN_EX: i32 = 15;
    const F_SETSIG: i32 = 10;
    let owner = [kind, id];
    let number = fd.as_raw_fd();
    // SAFETY: the kernel reads two integers of a live local.
    super::call::check("F_SETOWN_EX", unsafe { libc::fcntl(number, F_SETOWN_EX, owner.as_ptr()) });
    // SAFETY: takes integers.
    super::call::check("F_SETSIG", unsafe { libc::fcntl(number, F_SETSIG, signal) });
    // SAFETY: takes integers.
    let flags = super::call::check("F_GETFL", unsafe { libc::fcntl(number, libc::F_GETFL) });
    // SAFETY: takes integers.
    super::call::check("F_SETFL", unsafe { libc::fcntl(number, libc::F_SETFL, flags | libc::O_ASYNC) });
}

pub fn alternate_stack(length: usize) -> usize {
    let map = super::memory::Map::private(length);
    let stack = libc::stack_t { ss_sp: map.address as *mut libc::c_void, ss_flags: 0, ss_size: length };
    // SAFETY: the kernel reads one live local; the stack is a mapping that is never unmapped.
    super::call::check("sigaltstack", unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) });
    map.address
}

/// The alternate stack as `(address, flags, length)`.
#[track_caller]
pub fn current_alternate_stack() -> (usize, i32, usize) {
    let mut stack = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: 0, ss_size: 0 };
    // SAFETY: the kernel writes one live local during the call.
    super::call::check("sigaltstack", unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) });
    (stack.ss_sp as usize, stack.ss_flags, stack.ss_size)
}

/// What the handler of [`call_inside`] calls, as the address of a fat reference.
static INSIDE: AtomicUsize = AtomicUsize::new(0);

extern "C" fn run_inside(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let address = INSIDE.load(Ordering::SeqCst) as *const &dyn Fn();
    // SAFETY: `call_inside` leaked the reference that lies there, and its closure is kept by the caller's frame
    // below this one until the signal has been handled.
    unsafe { (*address)() };
    record(signal, info, context);
}

/// Lets `body` run inside the handler of `signal`, which the calling thread must raise itself while `body` lives.
#[track_caller]
pub fn call_inside(signal: Signal, flags: SaFlags, body: &dyn Fn()) {
    // SAFETY: only the lifetime is erased; the callers raise the signal while the closure lives.
    let body: &'static dyn Fn() = unsafe { std::mem::transmute(body) };
    INSIDE.store(std::ptr::from_ref(Box::leak(Box::new(body))) as usize, Ordering::SeqCst);
    let action =
        SigAction::new(SigHandler::SigAction(run_inside), flags | SaFlags::SA_SIGINFO, SigSet::empty());
    // SAFETY: the handler runs synchronously by raise(3), where nothing of this thread holds a lock.
    unsafe { sigaction(signal, &action) }.expect("sigaction");
}
