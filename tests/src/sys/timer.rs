//! Timers and sleeps by the raw calls: the numbers and flags themselves are under test.

use std::time::Duration;

use super::call::check;

fn timespec(length: Duration) -> libc::timespec {
    libc::timespec { tv_sec: length.as_secs() as i64, tv_nsec: i64::from(length.subsec_nanos()) }
}

fn timeval(length: Duration) -> libc::timeval {
    libc::timeval { tv_sec: length.as_secs() as i64, tv_usec: i64::from(length.subsec_micros()) }
}

/// setitimer(2).
#[track_caller]
pub fn set_interval_timer(kind: i32, first: Duration, every: Duration) {
    let new = libc::itimerval { it_interval: timeval(every), it_value: timeval(first) };
    // SAFETY: the kernel reads one live local during the call.
    let result = unsafe { libc::syscall(libc::SYS_setitimer, kind, &raw const new, 0) };
    check("setitimer", result);
}

/// getitimer(2) as `(left, every)`.
#[track_caller]
pub fn interval_timer(kind: i32) -> (Duration, Duration) {
    let zero = timeval(Duration::ZERO);
    let mut now = libc::itimerval { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes one live local during the call.
    let result = unsafe { libc::syscall(libc::SYS_getitimer, kind, &raw mut now) };
    check("getitimer", result);
    let length = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    (length(now.it_value), length(now.it_interval))
}

/// What a POSIX timer does when it fires.
#[derive(Debug, Clone, Copy)]
pub enum Notify {
    None,
    /// A signal with a value.
    Signal(i32, usize),
    /// The same for one thread.
    Thread(i32, usize, i32),
}

/// timer_create(2); the kernel's own id.
#[track_caller]
pub fn create(clock: i32, notify: Notify) -> i32 {
    // SAFETY: an all-zero sigevent is a valid value.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    match notify {
        Notify::None => event.sigev_notify = libc::SIGEV_NONE,
        Notify::Signal(signal, value) => {
            event.sigev_notify = libc::SIGEV_SIGNAL;
            event.sigev_signo = signal;
            event.sigev_value.sival_ptr = value as *mut libc::c_void;
        }
        Notify::Thread(signal, value, tid) => {
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_value.sival_ptr = value as *mut libc::c_void;
            event.sigev_notify_thread_id = tid;
        }
    }
    let mut id = 0_i32;
    // SAFETY: the kernel reads one sigevent and writes one int, both live locals, during the call.
    check("timer_create", unsafe {
        libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id)
    });
    id
}

/// timer_settime(2), relative.
#[track_caller]
pub fn set(id: i32, first: Duration, every: Duration) {
    let new = libc::itimerspec { it_interval: timespec(every), it_value: timespec(first) };
    // SAFETY: the kernel reads one live local during the call.
    check("timer_settime", unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &raw const new, 0) });
}

/// timer_settime(2) to a time of its clock, which may be past.
#[track_caller]
pub fn set_at(id: i32, first: Duration, every: Duration) {
    let new = libc::itimerspec { it_interval: timespec(every), it_value: timespec(first) };
    let flags = libc::TIMER_ABSTIME;
    // SAFETY: the kernel reads one live local during the call.
    check("timer_settime", unsafe { libc::syscall(libc::SYS_timer_settime, id, flags, &raw const new, 0) });
}

/// timer_gettime(2) as `(left, every)`.
#[track_caller]
pub fn get(id: i32) -> (Duration, Duration) {
    let zero = timespec(Duration::ZERO);
    let mut now = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the kernel writes one live local during the call.
    check("timer_gettime", unsafe { libc::syscall(libc::SYS_timer_gettime, id, &raw mut now) });
    let length = |t: libc::timespec| Duration::new(t.tv_sec as u64, t.tv_nsec as u32);
    (length(now.it_value), length(now.it_interval))
}

#[track_caller]
pub fn overrun(id: i32) -> i64 {
    // SAFETY: timer_getoverrun takes an integer and touches no memory.
    check("timer_getoverrun", unsafe { libc::syscall(libc::SYS_timer_getoverrun, id) })
}

#[track_caller]
pub fn delete(id: i32) {
    // SAFETY: timer_delete takes an integer and touches no memory.
    check("timer_delete", unsafe { libc::syscall(libc::SYS_timer_delete, id) });
}

/// clock_gettime(2) as the time since the clock's zero.
pub fn now(clock: i32) -> Duration {
    let mut time = timespec(Duration::ZERO);
    // SAFETY: writes one live local during the call.
    check("clock_gettime", unsafe { libc::clock_gettime(clock, &raw mut time) });
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// clock_nanosleep(2), once.
///
/// # Errors
/// When a signal's handler interrupted it.
pub fn sleep(clock: i32, length: Duration, is_absolute: bool) -> Result<(), i32> {
    let time = timespec(length);
    let flags = if is_absolute { libc::TIMER_ABSTIME } else { 0 };
    // SAFETY: the kernel reads one live local; nothing is written without a second pointer.
    match unsafe { libc::clock_nanosleep(clock, flags, &raw const time, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(error),
    }
}

/// poll(2) of no descriptors, once, for whole milliseconds rounded up.
pub fn poll_nothing(limit: Duration) -> bool {
    // SAFETY: with a count of zero the pointer is not used.
    unsafe { libc::syscall(libc::SYS_poll, 0, 0, limit.as_micros().div_ceil(1000) as i32) == 0 }
}
