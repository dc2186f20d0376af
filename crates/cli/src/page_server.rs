//! The command `page-server`: receives the pages of one dump.

use image::Dir;
use model::{Failure, Failures, Object, Options};
use pages::server::{Connection, Door};
use pages::{background, server};

/// # Errors
/// When nobody can reach it, or what comes is not understood. What was written is removed then.
pub fn run(options: &Options) -> Result<(), Failures> {
    let mut pid = sys::process::own_pid();
    if options.restore_detached {
        pid = in_background(options)?;
    }
    if let Some(path) = &options.pidfile {
        sys::pidfile::write(path, pid)?;
    }
    if options.restore_detached {
        return Ok(());
    }
    let dir = Dir::open(&options.images_dir)?;
    let door = Door::open(options)?;
    background::say_ready(options.status_fd)?;
    let mut connection = door.accept(&|| Ok(()))?;
    let received = receive(options, &dir, &mut *connection);
    let pages = received.inspect_err(|_| dir.discard())?;
    log::info!("{pages} pages have come");
    if options.auto_dedup {
        dedup(options)?;
    }
    Ok(())
}

/// The command `dedup`: frees pages in the folders before that the newest has anew.
///
/// # Errors
/// When there is none before, or one of them cannot be changed.
pub fn dedup(options: &Options) -> Result<(), Failures> {
    let dir = Dir::open(&options.images_dir)?;
    if !dir.has(pages::chain::PARENT_LINK) {
        let object = Object::Path(dir.path().display().to_string());
        return Err(Failure::conflict(object, "free pages", "has no parent images").into());
    }
    let freed = pages::chain::dedup(&dir)?;
    log::info!("freed {freed} pages in the images before");
    Ok(())
}

fn receive(options: &Options, dir: &Dir, connection: &mut dyn Connection) -> Result<u64, Failure> {
    let parent = options.prev_images_dir.as_deref().map(|name| server::link_parent(dir, name)).transpose()?;
    server::receive(connection, dir, parent.as_ref(), options.compress)
}

fn in_background(options: &Options) -> Result<i32, Failure> {
    let mut words: Vec<std::ffi::OsString> = vec!["-D".into(), options.images_dir.clone().into()];
    words.extend(["-W".into(), options.work_dir.clone().into(), format!("-v{}", options.log_level).into()]);
    words.extend(["-o".into(), options.log_file.clone().unwrap_or_else(|| "page-server.log".into()).into()]);
    words.extend(background::connection_words(options));
    words.extend(options.prev_images_dir.iter().flat_map(|dir| ["--prev-images-dir".into(), dir.into()]));
    words.extend(options.compress.map(|how| format!("--compress={}", how.name()).into()));
    words.extend(options.auto_dedup.then(|| "--auto-dedup".into()));
    background::start("page-server", words)
}
