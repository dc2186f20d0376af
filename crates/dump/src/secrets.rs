//! Secret memory that nobody has open is read by the agent, in each process that has it mapped.

use crate::freeze::Tree;
use crate::observe::{find_instruction, read_maps};
use crate::tracer::Tracer;
use agent::List;
use kinds::fd::secret::Reading;
use kinds::task::{Answers, Ask};
use model::{Failure, Object};

/// Reads it, in a tree that stands still.
///
/// # Errors
/// The first that was not to be read; the threads are whole all the same.
pub fn read(tree: &mut Tree, readings: Vec<(i32, Reading)>) -> Result<(), Failure> {
    let mut tasks = Vec::with_capacity(readings.len());
    for (pid, reading) in readings {
        let none = || Failure::conflict(Object::Task, "enter it", "nobody holds it").of(pid);
        tasks.push((tree.holder(pid).ok_or_else(none)?, (pid, reading)));
    }
    tree.crew.each(tasks, |tracer, (pid, reading)| enter(tracer, pid, reading)).into_iter().collect()
}

fn enter(tracer: &mut Tracer, pid: i32, mut reading: Reading) -> Result<(), Failure> {
    let instruction = find_instruction(pid, &read_maps(pid)?)?;
    tracer.with_agent(pid, instruction, |host, mut thread, context| {
        let mut result = sys::apart::go_on();
        while result.is_ok() {
            host.next_batch();
            let mut list = List::new();
            match reading.ask(&mut Ask { list: &mut list, area: host.area() }) {
                Ok(true) => {}
                Ok(false) => break,
                Err(failure) => {
                    result = Err(failure);
                    break;
                }
            }
            let (stopped, done) = host.run(thread, context, list)?;
            thread = stopped;
            result = done
                .map_err(|failed| reading.failed(failed.errno()))
                .and_then(|ops| reading.answer(Answers { ops: &ops, area: host.area() }))
                .and_then(|()| sys::apart::go_on());
        }
        Ok((thread, result))
    })?
}
