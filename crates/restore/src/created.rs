//! Processes that a restore has made: whether they go on, and their end when it fails.

/// Kills what was made, unless all went well.
#[derive(Debug)]
pub struct Created {
    pub root: i32,
    pub is_kept: bool,
}

impl Drop for Created {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let mut all = vec![self.root];
        let mut threads = Vec::new();
        let mut at = 0;
        while at < all.len() {
            let tids = sys::fd::numbers(&format!("/proc/{}/task", all[at])).unwrap_or_default();
            for tid in tids {
                let text =
                    std::fs::read(format!("/proc/{}/task/{tid}/children", all[at])).unwrap_or_default();
                all.extend(text.split(|byte| *byte == b' ').filter_map(sys::proc::decimal::<i32>));
                threads.extend((tid != all[at]).then_some(tid));
            }
            at += 1;
        }
        for pid in all.iter().rev() {
            let _ = sys::process::kill(*pid, libc::SIGKILL);
        }
        // Whoever was attached to ends for its parent only when we have seen the end; and a leader only
        // after its threads. Others are none of ours to wait for, which is an error and means nothing.
        let has_ended = |status: i32| libc::WIFEXITED(status) || libc::WIFSIGNALED(status);
        for id in threads.iter().chain(all[1..].iter().rev()).chain([&self.root]) {
            while let Ok(Some(status)) = sys::process::wait(*id, true)
                && !has_ended(status)
            {}
        }
    }
}

/// Do all threads of a puppet go on with their lists?
///
/// Once attached to, one whose list leads it astray does not end: it stops for us to hear of the signal.
/// Nothing else stops a puppet, which is deaf to signals and not interrupted before all lists are done.
pub fn is_at_work(pid: i32) -> bool {
    let state = |path: String| {
        let text = std::fs::read(path).ok()?;
        sys::proc::parse_stat(&text).map(|stat| stat.state)
    };
    // None when it was not made by its parent, whose list comes before this one and was done.
    if matches!(state(format!("/proc/{pid}/stat")), None | Some(b'Z')) {
        return false;
    }
    let tids = sys::fd::numbers(&format!("/proc/{pid}/task")).unwrap_or_default();
    !tids.iter().any(|tid| state(format!("/proc/{pid}/task/{tid}/stat")) == Some(b't'))
}
