//! A folder of images.
//!
//! A dump is whole when its `inventory.img` is there: it is removed before anything else is written,
//! and renamed into place after everything else. A failed dump removes what it wrote.

use crate::{Kind, Reader, Writer};
use model::{Failure, Object};
use prost::Message;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const INVENTORY: &str = "inventory.img";
const UNFINISHED: &str = ".inventory.img.unfinished";

/// Files of which a dump writes at most one, and only when it has something to say: one that an earlier
/// dump left in the folder would be taken for this one's.
const OPTIONAL: &[&str] = &[
    "pipes-data.img",
    "fifo-data.img",
    "sk-queues.img",
    "remap-fpath.img",
    "memfd.img",
    "tty-info.img",
    "tty-data.img",
    "filelocks.img",
    "cgroup.img",
    "cpuinfo.img",
    "bpfmap-data.img",
    "apparmor.img",
    "parent",
];

#[derive(Debug)]
pub struct Dir {
    path: PathBuf,
    /// What this run has written, for [`Dir::discard`].
    written: Mutex<Vec<String>>,
}

impl Dir {
    /// # Errors
    /// When `path` is no directory.
    pub fn open(path: &Path) -> Result<Dir, Failure> {
        let dir = Dir { path: path.to_owned(), written: Mutex::default() };
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => Ok(dir),
            Ok(_) => Err(Failure::conflict(dir.object(""), "open the images directory", "is no directory")),
            Err(error) => Err(dir.io("", "open the images directory", "stat", &error)),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    fn object(&self, name: &str) -> Object {
        Object::Path(self.path.join(name).display().to_string())
    }

    fn io(&self, name: &str, doing: &'static str, call: &'static str, error: &std::io::Error) -> Failure {
        Failure::errno(self.object(name), doing, call, error.raw_os_error().unwrap_or(0))
    }

    /// The whole file, or `None` when there is none: that is how a dump says "nothing of this kind".
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, Failure> {
        match fs::read(self.path.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.io(name, "read the image", "read", &error)),
        }
    }

    /// The whole file, which must be there.
    pub fn need(&self, name: &str) -> Result<Vec<u8>, Failure> {
        self.read(name)?.ok_or_else(|| Failure::corrupt(name, None, "is missing"))
    }

    /// The one record of a file that must be there.
    pub fn read_one<M: Message + Default>(&self, kind: Kind, name: &str) -> Result<M, Failure> {
        let bytes = self.need(name)?;
        Reader::open(kind, name, &bytes)?.one()
    }

    /// Every record of a file; none when there is no such file.
    pub fn read_all<M: Message + Default>(&self, kind: Kind, name: &str) -> Result<Vec<M>, Failure> {
        match self.read(name)? {
            Some(bytes) => Reader::open(kind, name, &bytes)?.all(),
            None => Ok(Vec::new()),
        }
    }

    /// Opens a file of pages, whose content is not for this process's memory.
    pub fn open_file(&self, name: &str) -> Result<File, Failure> {
        File::open(self.path.join(name)).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Failure::corrupt(name, None, "is missing"),
            _ => self.io(name, "open the image", "open", &error),
        })
    }

    /// Makes the folder say "no dump here" before the first image is written.
    pub fn begin(&self) -> Result<(), Failure> {
        for name in [INVENTORY, UNFINISHED].iter().chain(OPTIONAL) {
            match fs::remove_file(self.path.join(name)) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(self.io(name, "remove what an earlier dump left", "unlink", &error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes a new, empty file for content that is written piece by piece.
    pub fn create(&self, name: &str) -> Result<File, Failure> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(self.path.join(name))
            .map_err(|error| self.io(name, "create the image", "open", &error))?;
        self.written.lock().unwrap_or_else(|held| held.into_inner()).push(name.to_owned());
        Ok(file)
    }

    pub fn write(&self, name: &str, image: &Writer) -> Result<(), Failure> {
        self.create(name)?
            .write_all(image.bytes())
            .map_err(|error| self.io(name, "write the image", "write", &error))
    }

    /// Declares the dump whole.
    pub fn finish(&self, inventory: &Writer) -> Result<(), Failure> {
        self.write(UNFINISHED, inventory)?;
        fs::rename(self.path.join(UNFINISHED), self.path.join(INVENTORY))
            .map_err(|error| self.io(INVENTORY, "declare the dump whole", "rename", &error))?;
        self.written.lock().unwrap_or_else(|held| held.into_inner()).push(INVENTORY.to_owned());
        Ok(())
    }

    /// Removes everything that this run wrote.
    pub fn discard(&self) {
        for name in self.written.lock().unwrap_or_else(|held| held.into_inner()).drain(..) {
            if let Err(error) = fs::remove_file(self.path.join(&name))
                && error.kind() != ErrorKind::NotFound
            {
                log::warn!("{name} of the failed dump could not be removed: {error}");
            }
        }
    }
}
