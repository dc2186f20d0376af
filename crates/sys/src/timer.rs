//! What the kernel keeps of a POSIX timer and no call tells.

use crate::inside::inside;

/// How often a timer of a process that stands still has expired since its signal was sent, which waits; zero where none
/// waits. None where the kernel does not tell. Source: kernel/time/posix-timers.c, `it_overrun`.
pub fn pending_overrun(pid: i32, id: u32) -> Option<u32> {
    const TIMER: &str = "k_itimer";
    const MANY: usize = 4096;
    let inside = inside()?;
    let signal = inside.member(inside.task(pid)?, "task_struct", "signal")?;
    let first = inside.member(inside.at(signal, "signal_struct", "posix_timers")?, "hlist_head", "first")?;
    let in_timer = inside.at(1, TIMER, "list")?.checked_sub(1)?;
    let next = |node: &u64| inside.member(*node, "hlist_node", "next");
    let timers = std::iter::successors(Some(first), next).take_while(|node| *node != 0).take(MANY);
    let is_it = |timer: &u64| inside.at(*timer, TIMER, "it_id").and_then(|at| inside.int(at)) == Some(id);
    let timer = timers.map(|node| node.wrapping_sub(in_timer)).find(is_it)?;
    let overrun = inside.member(timer, TIMER, "it_overrun")? as i64;
    // As timer_getoverrun(2) has it; below zero when nothing waits.
    Some(overrun.clamp(0, i32::MAX.into()) as u32)
}
