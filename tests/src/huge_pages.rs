//! Huge pages of the host, lent to a trial.

use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// So many more than the host had; given back when it is dropped.
#[derive(Debug)]
#[must_use]
pub struct HugePages {
    lent: i64,
    /// Of this very program: one trial at a time has any.
    _lock: Option<Flock<File>>,
}

/// Changes how many there are; returns how many more there are.
fn change(by: i64) -> Result<i64, String> {
    let read = || -> Result<i64, String> {
        let text = fs::read_to_string(COUNT).map_err(|e| format!("the kernel has no huge pages: {e}"))?;
        text.trim().parse().map_err(|e| format!("{COUNT} holds {text:?}: {e}"))
    };
    let before = read()?;
    let wanted = (before + by).max(0);
    fs::write(COUNT, wanted.to_string())
        .map_err(|e| format!("the number of huge pages is not ours to change: {e}"))?;
    Ok(read()? - before)
}

impl HugePages {
    /// # Errors
    /// Why the host has none to lend.
    pub fn lend(count: u64) -> Result<Self, String> {
        if count == 0 {
            return Ok(Self { lent: 0, _lock: None });
        }
        let own = File::open("/proc/self/exe").map_err(|e| format!("cannot open this program: {e}"))?;
        let lock =
            Flock::lock(own, FlockArg::LockExclusive).map_err(|(_, e)| format!("cannot lock it: {e}"))?;
        let lent = Self { lent: change(count as i64)?.max(0), _lock: Some(lock) };
        if (lent.lent as u64) < count {
            return Err(format!("the host has {} huge pages to spare, not {count}", lent.lent));
        }
        Ok(lent)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.lent > 0 {
            let _ = change(-self.lent);
        }
    }
}
