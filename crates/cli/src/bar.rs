//! Progress on the terminal: a bar that appears when a run takes long, and what the run measured.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use model::Progress;
use model::options::ProgressMode;
use model::stats::{DumpStats, RestoreStats};
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A run shorter than this draws nothing: a flash on the screen tells nobody anything.
const PATIENCE: Duration = Duration::from_millis(500);
const PAGE_BYTES: u64 = 4096;

/// Watches one run.
pub struct Bar {
    started: Instant,
    how: How,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Hidden,
    /// Drawn on the terminal once this much time has passed.
    After(Duration),
    /// There is no terminal but progress is wanted: one line for each stage.
    Lines,
}

#[derive(Default)]
struct State {
    stage: &'static str,
    pages_total: u64,
    pages_done: u64,
    drawn: Option<ProgressBar>,
    statistics: Option<String>,
}

impl Bar {
    pub fn new(mode: ProgressMode) -> Bar {
        let is_terminal = std::io::stderr().is_terminal();
        let how = match mode {
            ProgressMode::Never => How::Hidden,
            ProgressMode::Auto if is_terminal => How::After(PATIENCE),
            ProgressMode::Auto => How::Hidden,
            ProgressMode::Always if is_terminal => How::After(Duration::ZERO),
            ProgressMode::Always => How::Lines,
        };
        Bar { started: Instant::now(), how, state: Mutex::default() }
    }

    /// Writes to standard error without tearing the bar apart.
    pub fn over(&self, write: impl FnOnce()) {
        match &self.state().drawn {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// Takes the bar away: the run is over.
    pub fn clear(&self) {
        if let Some(bar) = self.state().drawn.take() {
            bar.finish_and_clear();
        }
    }

    /// What the engine measured, as text; nothing when it came to no end.
    pub fn statistics(&self) -> Option<String> {
        self.state().statistics.take()
    }

    /// Numbers stay usable after a panic in another thread.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn draw(&self, state: &mut State) {
        let How::After(patience) = self.how else { return };
        if state.drawn.is_none() && self.started.elapsed() < patience {
            return;
        }
        let bar = state.drawn.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) =
                ProgressStyle::with_template("{msg:12} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
            {
                bar.set_style(style);
            }
            bar
        });
        bar.set_message(state.stage);
        bar.set_length(state.pages_total * PAGE_BYTES);
        bar.set_position(state.pages_done * PAGE_BYTES);
    }
}

impl Progress for Bar {
    fn stage(&self, name: &'static str) {
        if self.how == How::Hidden {
            return;
        }
        let mut state = self.state();
        state.stage = name;
        if self.how == How::Lines {
            // A closed standard error is no reason to stop a dump.
            let _ = writeln!(std::io::stderr(), "{name}");
        }
        self.draw(&mut state);
    }

    fn pages_total(&self, count: u64) {
        if self.how != How::Hidden {
            self.state().pages_total += count;
        }
    }

    fn pages_done(&self, count: u64) {
        if self.how != How::Hidden {
            let mut state = self.state();
            state.pages_done += count;
            self.draw(&mut state);
        }
    }

    fn dumped(&self, stats: &DumpStats) {
        self.state().statistics = Some(stats.to_string());
    }

    fn restored(&self, stats: &RestoreStats) {
        self.state().statistics = Some(stats.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(how: How) -> Bar {
        Bar { started: Instant::now(), how, state: Mutex::default() }
    }

    #[test]
    fn a_short_run_draws_nothing() {
        let bar = bar(How::After(Duration::from_secs(60)));
        bar.stage("pages");
        bar.pages_total(10);
        bar.pages_done(10);
        assert!(bar.state().drawn.is_none());
    }

    #[test]
    fn a_long_run_draws_what_was_counted_from_its_start() {
        let bar = bar(How::After(Duration::ZERO));
        bar.stage("pages");
        bar.pages_total(10);
        bar.pages_total(6);
        bar.pages_done(4);
        let state = bar.state();
        let drawn = state.drawn.as_ref().unwrap();
        assert_eq!((drawn.length(), drawn.position()), (Some(16 * PAGE_BYTES), 4 * PAGE_BYTES));
    }

    #[test]
    fn statistics_are_kept_without_a_bar() {
        let bar = bar(How::Hidden);
        assert!(bar.statistics().is_none());
        bar.dumped(&DumpStats { pages_written: 7, ..DumpStats::default() });
        assert!(bar.statistics().unwrap().contains('7'));
    }
}
