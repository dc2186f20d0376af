//! What a run measured: filled by the engines, written to `stats-dump` and `stats-restore`,
//! printed by `--display-stats`. The fields are those of the images' `stats_entry`.

use std::fmt;

/// Of a dump. Times are microseconds; they wrap in the image, which has 32 bits for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpStats {
    /// From the first stop to the last.
    pub freezing_us: u64,
    /// From the first stop until the tree ran again, or ended.
    pub frozen_us: u64,
    /// Finding out which pages there are, and taking them.
    pub memdump_us: u64,
    /// Writing them to the images.
    pub memwrite_us: u64,
    pub pages_scanned: u64,
    pub pages_skipped_parent: u64,
    pub pages_written: u64,
    pub pages_lazy: u64,
    pub shared_pages_scanned: u64,
    pub shared_pages_skipped_parent: u64,
    pub shared_pages_written: u64,
}

/// Of a restore. Times are microseconds; they wrap in the image, which has 32 bits for each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Pages compared with those of the parent.
    pub pages_compared: u64,
    /// Pages left shared with the parent, copy on write.
    pub pages_skipped_cow: u64,
    pub pages_restored: u64,
    /// Until every process existed.
    pub forking_us: u64,
    /// Until every process ran.
    pub restore_us: u64,
}

impl fmt::Display for DumpStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Dump statistics")?;
        writeln!(f, "  stopping the tree:         {} us", self.freezing_us)?;
        writeln!(f, "  tree was stopped for:      {} us", self.frozen_us)?;
        writeln!(f, "  taking memory:             {} us", self.memdump_us)?;
        writeln!(f, "  writing memory:            {} us", self.memwrite_us)?;
        writeln!(f, "  pages looked at:           {}", self.pages_scanned)?;
        writeln!(f, "  pages left to the parent:  {}", self.pages_skipped_parent)?;
        writeln!(f, "  pages written:             {}", self.pages_written)?;
        writeln!(f, "  pages kept for later:      {}", self.pages_lazy)?;
        writeln!(f, "  shared pages looked at:    {}", self.shared_pages_scanned)?;
        writeln!(f, "  shared, left to parent:    {}", self.shared_pages_skipped_parent)?;
        writeln!(f, "  shared pages written:      {}", self.shared_pages_written)
    }
}

impl fmt::Display for RestoreStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Restore statistics")?;
        writeln!(f, "  all tasks existed after:   {} us", self.forking_us)?;
        writeln!(f, "  all tasks ran after:       {} us", self.restore_us)?;
        writeln!(f, "  pages restored:            {}", self.pages_restored)?;
        writeln!(f, "  pages compared:            {}", self.pages_compared)?;
        writeln!(f, "  pages shared with parent:  {}", self.pages_skipped_cow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_say_their_unit() {
        let text = DumpStats { frozen_us: 1234, ..Default::default() }.to_string();
        assert!(text.contains("stopped for:      1234 us\n"), "{text}");
        let text = RestoreStats { restore_us: 99, ..Default::default() }.to_string();
        assert!(text.contains("ran after:       99 us\n"), "{text}");
    }
}
