//! The simulated version of `tombola::internals::files`: the product's operations on whole files, on a
//! [`Disk`](crate::disk::Disk).

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use tombola::internals::files::{Files, Locking, stand_in};

use crate::disk::{Shared, is_simulated, resolve};
use crate::medium::{Entry, FileId};

/// Makes the product's file operations use simulated disks. Calling it again has no effect.
pub(crate) fn install() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| stand_in(Box::new(SimulatedFiles)));
}

/// Finds the disk by the path, as the VFS does, so that both always use the same one.
#[derive(Debug)]
struct SimulatedFiles;

impl Files for SimulatedFiles {
    fn holds(&self, path: &Path) -> bool {
        path.to_str().is_some_and(is_simulated)
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let (disk, path) = place(folder)?;
        disk.create_folder(path)
    }

    fn lock(&self, path: &Path) -> io::Result<Locking> {
        let (disk, path) = place(path)?;
        let file = match disk.find(path)? {
            None => disk.create(path)?,
            Some(_) => disk.open(path)?,
        };
        if !disk.lock_file(file)? {
            return Ok(Locking::HeldBy("another process".to_owned()));
        }
        Ok(Locking::Locked(Box::new(SimulatedLock { disk, file })))
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = place(path)?;
        match disk.find(path)? {
            None => disk.create(path).map(drop),
            Some(_) => disk.set_length(disk.open(path)?, path, 0),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((disk, from), (other, to)) = (place(from)?, place(to)?);
        if !Arc::ptr_eq(&disk, &other) {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = place(path)?;
        disk.remove(path)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        let (disk, path) = place(path)?;
        let file = disk.open(path)?;
        retried(|| disk.sync(file, path))
    }

    fn copy(&self, from: &Path, to: &Path, bytes: u64) -> io::Result<()> {
        let ((disk, from), (_, to)) = (place(from)?, place(to)?);
        let file = disk.open(from)?;
        let mut content = vec![0; disk.length(file)?.min(bytes as usize)];
        disk.read(file, from, 0, &mut content)?;
        disk.write(disk.open(to)?, to, 0, &content)
    }

    fn append_zeros(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let (disk, path) = place(path)?;
        let file = disk.open(path)?;
        disk.write(file, path, disk.length(file)?, &vec![0; bytes as usize])
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let (disk, path) = place(folder)?;
        disk.open_folder(path)?;
        retried(|| disk.sync_folder(path))
    }

    fn length_bytes(&self, path: &Path) -> io::Result<u64> {
        let (disk, path) = place(path)?;
        match disk.look(path)? {
            Some(Entry::File(file)) => Ok(disk.length(file)? as u64),
            Some(Entry::Folder(_)) => Ok(0),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        let (disk, path) = place(path)?;
        let file = disk.open(path)?;
        let mut bytes = vec![0; disk.length(file)?];
        disk.read(file, path, 0, &mut bytes)?;
        Ok(Box::new(io::Cursor::new(bytes)))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        let (disk, path) = place(folder)?;
        disk.list(path)
    }
}

#[derive(Debug)]
struct SimulatedLock {
    disk: Arc<Shared>,
    file: FileId,
}

impl Drop for SimulatedLock {
    fn drop(&mut self) {
        self.disk.unlock_file(self.file);
    }
}

/// Repeats an interrupted call, as `std::fs` does, except for renames and removals.
fn retried(mut work: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    loop {
        match work() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn place(path: &Path) -> io::Result<(Arc<Shared>, &str)> {
    let path = path.to_str().ok_or(io::ErrorKind::InvalidInput)?;
    resolve(path)?.ok_or_else(|| io::ErrorKind::Unsupported.into())
}
