//! How far a run is: events from the engines to whoever watches (a bar on the terminal, a test).
//!
//! The engines call through [`ProgressSink`] in [`crate::Options`]; nobody listening costs one
//! indirect call of an empty function.

use crate::stats::{DumpStats, RestoreStats};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// Somebody who watches a run. Every method may come from any thread.
pub trait Progress: Send + Sync {
    /// A new part of the run begins: "freeze", "pages". Short, lower case.
    fn stage(&self, _name: &'static str) {}
    /// Pages that the current stage will move. May come more than once: the numbers add up.
    fn pages_total(&self, _count: u64) {}
    /// Pages moved since the last call.
    fn pages_done(&self, _count: u64) {}
    /// The dump is complete; the same numbers as in `stats-dump`.
    fn dumped(&self, _stats: &DumpStats) {}
    /// The restore is complete; the same numbers as in `stats-restore`.
    fn restored(&self, _stats: &RestoreStats) {}
}

struct Nobody;

impl Progress for Nobody {}

/// A shared handle to a watcher.
#[derive(Clone)]
pub struct ProgressSink(Arc<dyn Progress>);

impl ProgressSink {
    pub fn new(watcher: Arc<dyn Progress>) -> ProgressSink {
        ProgressSink(watcher)
    }
}

impl Default for ProgressSink {
    fn default() -> ProgressSink {
        ProgressSink(Arc::new(Nobody))
    }
}

impl Deref for ProgressSink {
    type Target = dyn Progress;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl fmt::Debug for ProgressSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressSink")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Default)]
    struct Sum(AtomicU64);

    impl Progress for Sum {
        fn pages_done(&self, count: u64) {
            self.0.fetch_add(count, Ordering::Relaxed);
        }
    }

    #[test]
    fn several_threads_report_to_one_watcher() {
        let sum = Arc::new(Sum::default());
        let sink = ProgressSink::new(sum.clone());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    sink.stage("pages");
                    sink.pages_done(10);
                });
            }
        });
        assert_eq!(sum.0.load(Ordering::Relaxed), 40);
    }
}
