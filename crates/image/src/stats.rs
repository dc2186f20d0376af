//! `stats-dump` and `stats-restore`: what a run measured, in the folder of the log.

use crate::{DumpStatsEntry, RestoreStatsEntry, StatsEntry, Writer, kind};
use model::stats::{DumpStats, RestoreStats};
use std::path::Path;

impl From<&DumpStats> for StatsEntry {
    fn from(stats: &DumpStats) -> StatsEntry {
        let dump = DumpStatsEntry {
            freezing_time: stats.freezing_us as u32,
            frozen_time: stats.frozen_us as u32,
            memdump_time: stats.memdump_us as u32,
            memwrite_time: stats.memwrite_us as u32,
            pages_scanned: stats.pages_scanned,
            pages_skipped_parent: stats.pages_skipped_parent,
            pages_written: stats.pages_written,
            ..DumpStatsEntry::default()
        };
        StatsEntry { dump: Some(dump), restore: None }
    }
}

impl From<&RestoreStats> for StatsEntry {
    fn from(stats: &RestoreStats) -> StatsEntry {
        let restore = RestoreStatsEntry {
            pages_compared: stats.pages_compared,
            pages_skipped_cow: stats.pages_skipped_cow,
            forking_time: stats.forking_us as u32,
            restore_time: stats.restore_us as u32,
            pages_restored: Some(stats.pages_restored),
        };
        StatsEntry { dump: None, restore: Some(restore) }
    }
}

impl StatsEntry {
    /// Writes `stats-dump` or `stats-restore`; a run that succeeded does not fail for want of it.
    pub fn write(&self, folder: &Path) {
        let name = if self.dump.is_some() { "stats-dump" } else { "stats-restore" };
        let mut image = Writer::new(kind::STATS);
        image.record(self);
        if let Err(error) = std::fs::write(folder.join(name), image.bytes()) {
            log::warn!("the statistics could not be written: {error}");
        }
    }
}
