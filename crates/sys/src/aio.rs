//! What the kernel keeps of an AIO context beside its ring.

use crate::inside::inside;

/// How many requests of the context whose ring is at `ring` in a process have not ended; none where the kernel does not
/// tell. Its threads stand still.
///
/// Every request takes a place, of which each processor keeps some in store; an event that was not collected has one
/// still. Source: fs/aio.c, `get_reqs_available`, `refill_reqs_available`.
pub fn in_flight(pid: i32, ring: u64) -> Option<u32> {
    const CONTEXT: &str = "kioctx";
    const MANY: u32 = 4096;
    let inside = inside()?;
    let space = inside.member(inside.task(pid)?, "task_struct", "mm")?;
    let table = inside.member(space, "mm_struct", "ioctx_table")?;
    let count = inside.int(inside.at(table, "kioctx_table", "nr")?)?;
    let first = inside.at(table, "kioctx_table", "table")?;
    let contexts = (0..count.min(MANY)).filter_map(|nth| inside.long(first + u64::from(nth) * 8));
    let is_it = |context: &u64| inside.member(*context, CONTEXT, "user_id") == Some(ring);
    let context = contexts.into_iter().find(is_it)?;
    let int = |member: &str| inside.int(inside.at(context, CONTEXT, member)?);
    let stores = inside.member(context, CONTEXT, "cpu")?;
    let mut free = int("reqs_available")?.wrapping_add(int("completed_events")?);
    let mut shift = Some(inside.shift(0)?);
    for processor in 1.. {
        let Some(own) = shift else { break };
        let store = inside.at(stores.wrapping_add(own), "kioctx_cpu", "reqs_available")?;
        free = free.wrapping_add(inside.int(store)?);
        shift = inside.shift(processor);
    }
    // One event of the ring stays free.
    int("nr_events")?.checked_sub(1)?.checked_sub(free)
}
