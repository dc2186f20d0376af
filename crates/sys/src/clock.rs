//! Clocks.

/// Nanoseconds of `clock` (`libc::CLOCK_MONOTONIC`, ...). Source: clock_gettime(2).
pub fn now_ns(clock: libc::clockid_t) -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which lives on this stack.
    unsafe { libc::clock_gettime(clock, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Ticks of the kernel (jiffies) in milliseconds, rounded down: the kernel, which rounds up, makes as many ticks of them.
/// Source: clock_getres(2) of a coarse clock, which a tick moves.
pub fn ticks_to_ms(ticks: u32) -> u32 {
    let mut tick = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, which lives on this stack.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut tick) };
    u32::try_from(u64::from(ticks) * tick.tv_nsec as u64 / 1_000_000).unwrap_or(u32::MAX)
}
