//! A folder of images.
//!
//! A dump is whole when its `inventory.img` is there: it is removed before anything else is written,
//! and renamed into place after everything else. A failed dump removes what it wrote.

use crate::{Kind, Reader, Writer};
use model::{Failure, Object};
use prost::Message;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const INVENTORY: &str = "inventory.img";
const UNFINISHED: &str = ".inventory.img.unfinished";

/// Longer than the longest image that is read as a whole, a page map of terabytes in single pages.
const LENGTH_MAX: u64 = 4 << 30;

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
    crate::working_set::NAME,
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
        let explain = |call, error: std::io::Error| self.io(name, "read the image", call, &error);
        let Some((file, length)) = self.open_there(name)? else { return Ok(None) };
        if length > LENGTH_MAX {
            return Err(Failure::corrupt(name, None, format!("has {length} bytes, more than any image")));
        }
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(length as usize)
            .map_err(|_| Failure::errno(self.object(name), "read the image", "malloc", libc::ENOMEM))?;
        // Not what it has grown by meanwhile.
        file.take(length).read_to_end(&mut bytes).map_err(|error| explain("read", error))?;
        Ok(Some(bytes))
    }

    /// Opens a file that is one: a pipe or a device in its place would have no end. With its length.
    fn open_there(&self, name: &str) -> Result<Option<(File, u64)>, Failure> {
        let explain = |call, error: std::io::Error| self.io(name, "open the image", call, &error);
        // Opening a pipe would otherwise wait for somebody to write.
        let options = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(self.path.join(name));
        let file = match options {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(explain("open", error)),
        };
        let data = file.metadata().map_err(|error| explain("fstat", error))?;
        match data.is_file() {
            true => Ok(Some((file, data.len()))),
            false => Err(Failure::corrupt(name, None, "is no regular file")),
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

    pub fn has(&self, name: &str) -> bool {
        self.path.join(name).exists()
    }

    /// Opens a file of pages, whose content is not for this process's memory.
    pub fn open_file(&self, name: &str) -> Result<File, Failure> {
        let file = self.open_there(name)?.ok_or_else(|| Failure::corrupt(name, None, "is missing"))?;
        Ok(file.0)
    }

    /// The same, to make holes in it.
    pub fn open_file_to_change(&self, name: &str) -> Result<File, Failure> {
        // What it is was seen first: a pipe or a device is not opened for writing.
        self.open_file(name)?;
        OpenOptions::new()
            .write(true)
            .open(self.path.join(name))
            .map_err(|error| self.io(name, "change the image", "open", &error))
    }

    /// The names of all files.
    pub fn names(&self) -> Result<Vec<String>, Failure> {
        let explain = |error: std::io::Error| self.io("", "list the images", "readdir", &error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(explain)? {
            names.extend(entry.map_err(explain)?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Makes the folder say "no dump here" before the first image is written.
    pub fn begin(&self) -> Result<(), Failure> {
        let there = self.names()?;
        let is_there = |name: &&&str| there.binary_search_by(|one| one.as_str().cmp(name)).is_ok();
        [INVENTORY, UNFINISHED].iter().chain(OPTIONAL).filter(is_there).try_for_each(|name| self.remove(name))
    }

    /// Removes what an earlier dump left under a name, if anything.
    pub fn remove(&self, name: &str) -> Result<(), Failure> {
        match fs::remove_file(self.path.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(self.io(name, "remove what an earlier dump left", "unlink", &error))
            }
            _ => Ok(()),
        }
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

    /// Makes a new, empty file without a name, which may get one at [`Dir::free`].
    ///
    /// # Errors
    /// Not every file system has such files.
    pub fn create_nameless(&self) -> Result<File, Failure> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .mode(0o644)
            .custom_flags(libc::O_TMPFILE)
            .open(&self.path)
            .map_err(|error| self.io("", "create a file without a name", "open", &error))
    }

    /// Frees a name for a file that is made elsewhere, and returns its path.
    ///
    /// # Errors
    /// When what has the name cannot be removed.
    pub fn free(&self, name: &str) -> Result<PathBuf, Failure> {
        self.remove(name)?;
        self.written.lock().unwrap_or_else(|held| held.into_inner()).push(name.to_owned());
        Ok(self.path.join(name))
    }

    pub fn write(&self, name: &str, image: &Writer) -> Result<(), Failure> {
        self.create(name)?
            .write_all(image.bytes())
            .map_err(|error| self.io(name, "write the image", "write", &error))
    }

    /// Writes an image that others may be reading: they find the one before or this one, whole.
    ///
    /// # Errors
    /// When it cannot be written; the one before stays then.
    pub fn replace(&self, name: &str, image: &Writer) -> Result<(), Failure> {
        let unfinished = format!(".{name}.unfinished");
        self.write(&unfinished, image)?;
        let (from, to) = (self.path.join(unfinished), self.path.join(name));
        fs::rename(from, to).map_err(|error| self.io(name, "put the image in place", "rename", &error))
    }

    /// Makes a symbolic link.
    pub fn link(&self, name: &str, target: &Path) -> Result<(), Failure> {
        std::os::unix::fs::symlink(target, self.path.join(name))
            .map_err(|error| self.io(name, "make the link", "symlink", &error))?;
        self.written.lock().unwrap_or_else(|held| held.into_inner()).push(name.to_owned());
        Ok(())
    }

    /// Declares the dump whole.
    pub fn finish(&self, inventory: &Writer) -> Result<(), Failure> {
        self.write(UNFINISHED, inventory)?;
        fs::rename(self.path.join(UNFINISHED), self.path.join(INVENTORY))
            .map_err(|error| self.io(INVENTORY, "declare the dump whole", "rename", &error))?;
        self.written.lock().unwrap_or_else(|held| held.into_inner()).push(INVENTORY.to_owned());
        Ok(())
    }

    /// Takes back that the dump is whole.
    ///
    /// # Errors
    /// When the folder cannot be changed.
    pub fn retract(&self) -> Result<(), Failure> {
        self.remove(INVENTORY)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_or_has_no_end_is_not_read() {
        let path = std::env::temp_dir().join(format!("crtools-store-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        let dir = Dir::open(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path.join("device.img")).unwrap();
        fs::create_dir(path.join("folder.img")).unwrap();
        File::create(path.join("long.img")).and_then(|file| file.set_len(1 << 40)).unwrap();
        File::create(path.join("short.img")).unwrap();
        let said = |name: &str| dir.read(name).map_err(|failure| failure.to_string());
        let results = ["device.img", "folder.img", "long.img", "short.img", "none.img"].map(said);
        fs::remove_dir_all(&path).unwrap();
        let wrong = |name: &str, why: &str| Err(format!("{name}: {why}"));
        assert_eq!(results[0], wrong("device.img", "is no regular file"));
        assert_eq!(results[1], wrong("folder.img", "is no regular file"));
        assert_eq!(results[2], wrong("long.img", "has 1099511627776 bytes, more than any image"));
        assert_eq!(results[3..], [Ok(Some(Vec::new())), Ok(None)]);
    }
}
