//! How long the stages of a restore take, for the log.

use std::time::Instant;

#[derive(Debug)]
pub struct Stage(Instant);

impl Stage {
    pub fn begin() -> Stage {
        Stage(Instant::now())
    }

    /// Says what was done since the last one ended.
    pub fn ends(&mut self, what: &str) {
        log::info!("{what} in {} us", self.0.elapsed().as_micros());
        *self = Stage::begin();
    }
}
