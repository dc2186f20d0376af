//! Which CRIU this program can stand in for, and its own version.

/// The version of CRIU whose options, images and requests are understood. Clients ask for it before
/// they use an ability, so it is the first thing `--version` says.
pub const CRIU_MAJOR: u32 = 4;
pub const CRIU_MINOR: u32 = 2;

/// Our own.
pub const CRTOOLS: &str = env!("CARGO_PKG_VERSION");
