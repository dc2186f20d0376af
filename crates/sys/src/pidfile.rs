//! Files that say which process something is.

use model::{Failure, Object};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Writes a pid to a new file, as a decimal number without an end of line, mode 0600.
///
/// # Errors
/// `EEXIST` when there is a file already.
pub fn write(path: &Path, pid: i32) -> Result<(), Failure> {
    let explain = |error: std::io::Error| {
        crate::memory::io_errno("open", &error)
            .on(Object::Path(path.display().to_string()), "write the pid file")
    };
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(explain)?;
    file.write_all(pid.to_string().as_bytes()).map_err(explain)
}
