//! The threads of this program that trace: ptrace(2) answers only the thread that attached, so each works
//! on what it attached to, which is a `T`. The first is the coordinator itself; the others start when there
//! is work for them and end, letting go what they hold, with the crew.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

type Order<T> = Box<dyn FnOnce(&mut T) + Send>;

#[derive(Debug, Default)]
pub struct Crew<T> {
    own: T,
    others: Vec<Hand<T>>,
}

#[derive(Debug)]
struct Hand<T> {
    orders: Option<Sender<Order<T>>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Default + 'static> Hand<T> {
    fn start() -> Hand<T> {
        let (orders, received): (Sender<Order<T>>, Receiver<Order<T>>) = channel();
        let thread = std::thread::spawn(move || {
            let mut held = T::default();
            for order in received {
                order(&mut held);
            }
        });
        Hand { orders: Some(orders), thread: Some(thread) }
    }
}

impl<T> Drop for Hand<T> {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // It has said why on standard error.
            let _ = thread.join();
        }
    }
}

/// How many can work at the same time.
pub fn size() -> usize {
    // Asked once: the library reads files of control groups for it.
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Divides work among the members, when there is so much of it that waking them pays.
pub fn shares<W, All>(all: All) -> impl Iterator<Item = (usize, Vec<W>)>
where
    All: IntoIterator<Item = W, IntoIter: ExactSizeIterator>,
{
    const MANY: usize = 64;
    let mut all = all.into_iter();
    let members = if all.len() < MANY { 1 } else { size() };
    let of_each = all.len().div_ceil(members);
    let share = move || Some(all.by_ref().take(of_each).collect()).filter(|share: &Vec<W>| !share.is_empty());
    std::iter::from_fn(share).enumerate()
}

/// Does work that needs no tracing on all processors, when there are so `many`; the results of each share are in the same
/// order.
pub fn in_parallel<T: Sync, R: Send>(all: &[T], many: usize, work: impl Fn(&[T]) -> R + Sync) -> Vec<R> {
    if all.len() < many {
        return vec![work(all)];
    }
    let work = &work;
    let mut shares = all.chunks(all.len().div_ceil(size()).max(1));
    let first = shares.next().unwrap_or_default();
    std::thread::scope(|scope| {
        let others: Vec<_> = shares.map(|share| scope.spawn(move || work(share))).collect();
        let others = others.into_iter().map(|other| other.join().expect("a worker does not panic"));
        [work(first)].into_iter().chain(others).collect()
    })
}

impl<T: Default + 'static> Crew<T> {
    /// How many have worked.
    pub fn len(&self) -> usize {
        1 + self.others.len()
    }

    pub fn is_empty(&self) -> bool {
        false
    }

    /// Has each task done by the member named with it; returns the results in the order of the tasks.
    pub fn each<W, R>(
        &mut self,
        tasks: impl IntoIterator<Item = (usize, W)>,
        work: impl Fn(&mut T, W) -> R + Send + Sync + 'static,
    ) -> Vec<R>
    where
        W: Send + 'static,
        R: Send + 'static,
    {
        let work = Arc::new(work);
        let (done, results) = channel();
        let mut own = Vec::new();
        let mut count = 0;
        for (at, (member, task)) in tasks.into_iter().enumerate() {
            count += 1;
            let Some(other) = member.checked_sub(1) else {
                own.push((at, task));
                continue;
            };
            while self.others.len() <= other {
                self.others.push(Hand::start());
            }
            let (work, done) = (work.clone(), done.clone());
            let order: Order<T> = Box::new(move |held| {
                // Nobody waits for it only when the coordinator itself has failed.
                let _ = done.send((at, work(held, task)));
            });
            let orders = self.others[other].orders.as_ref().expect("a hand takes orders until it is dropped");
            orders.send(order).expect("a hand ends only when it is dropped");
        }
        drop(done);
        let mut all: Vec<Option<R>> = std::iter::repeat_with(|| None).take(count).collect();
        for (at, task) in own {
            all[at] = Some(work(&mut self.own, task));
        }
        for (at, result) in results {
            all[at] = Some(result);
        }
        all.into_iter().map(|result| result.expect("every task was done")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_tasks() {
        let mut crew: Crew<()> = Crew::default();
        let results = crew.each((0..100).map(|n| (n % 3, n)), |_, n| {
            if n % 7 == 0 {
                std::thread::yield_now();
            }
            n * 2
        });
        assert_eq!(results, (0..100).map(|n| n * 2).collect::<Vec<usize>>());
        assert_eq!(crew.others.len(), 2);
    }
}
