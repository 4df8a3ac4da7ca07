//! Everything the product does to files outside SQLite: one small place, so that its order and its
//! syncing can be read, and tested, in one place. Knows nothing of what the files hold.
//!
//! Assumption about the medium: a rename is atomic, and it is durable once its folder is synced.

use std::fmt::Debug;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The file whose lock says that a process uses the folder.
pub const LOCK: &str = "LOCK";

/// Data is for the user who runs the process: numbers still to be issued are in it.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// What could not be done to which file.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {path}: {source}")]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    /// What the operating system said.
    pub source: io::Error,
}

/// Why a folder could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error(
        "{folder} is in use: {holder} holds its LOCK; stop that process first, or use another \
         folder with --data-dir"
    )]
    Held {
        /// The folder.
        folder: PathBuf,
        /// `process N`, or `another process` where that is not known.
        holder: String,
    },
    /// The file system refused.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A folder held by this process, until this is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _held: Held,
}

/// Creates the folder where it is missing and locks it for this process alone.
///
/// # Errors
/// [`LockError::Held`] when another process holds it.
pub fn lock(folder: &Path) -> Result<Lock, LockError> {
    create_folder(folder)?;
    let path = folder.join(LOCK);
    match files_of(folder).lock(&path).map_err(|error| failed("lock", &path, error))? {
        Ok(held) => Ok(Lock { _held: held }),
        Err(HeldBy(holder)) => Err(LockError::Held { folder: folder.to_owned(), holder }),
    }
}

/// Creates the folder where it is missing, and makes its name durable: a folder that vanished with
/// its ledger would look like a new number space.
///
/// # Errors
/// What the operating system refused.
pub fn create_folder(folder: &Path) -> Result<(), FileError> {
    if folder.parent().is_none() {
        return Ok(());
    }
    let parent = parent(folder);
    if length_bytes(folder)?.is_some() {
        // The process that created it may have been killed before it could sync it. Where the
        // parent may not be read, whoever made the folder answers for its name.
        let _ = sync_folder(parent);
        return Ok(());
    }
    create_folder(parent)?;
    files_of(folder)
        .create_folder(folder)
        .map_err(|error| failed("create the folder", folder, error))?;
    sync_folder(parent)
}

/// The folder that a path lies in.
#[must_use]
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Whether a path lies in a folder, or is it, by whatever names; it need not be there yet.
///
/// # Errors
/// What the operating system refused.
pub fn lies_in(path: &Path, folder: &Path) -> Result<bool, FileError> {
    let real = |path: &Path| std::fs::canonicalize(path);
    let folder = real(folder).map_err(|error| failed("look at", folder, error))?;
    let absolute = std::path::absolute(path).map_err(|error| failed("look at", path, error))?;
    for there in absolute.ancestors() {
        match real(there) {
            Ok(there) => return Ok(there.starts_with(&folder)),
            // It will come to lie where the nearest folder above it does.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", there, error)),
        }
    }
    Ok(false)
}

/// Removes a folder and all that is in it.
///
/// # Errors
/// What the operating system refused.
pub fn remove_folder(folder: &Path) -> Result<(), FileError> {
    std::fs::remove_dir_all(folder).map_err(|error| failed("remove", folder, error))
}

/// Which file the name stands for, whatever is written to it; nothing where there is none.
///
/// # Errors
/// What the operating system refused.
pub fn identity(path: &Path) -> Result<Option<(u64, u64)>, FileError> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// Creates an empty file for this user alone, replacing what stood there.
///
/// # Errors
/// What the operating system refused.
pub fn create(path: &Path) -> Result<(), FileError> {
    files_of(path).create(path).map_err(|error| failed("create", path, error))
}

/// The content, or nothing where there is no such file.
///
/// # Errors
/// What the operating system refused.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, error)),
    }
}

/// Replaces a file's content, durably once this returns. At every moment, a crash included, its name
/// stands for all of the old content or all of the new.
///
/// # Errors
/// What the operating system refused. Which of the two contents a crash leaves is then not known.
pub fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let unfinished = unfinished(path);
    create(&unfinished)?;
    OpenOptions::new()
        .write(true)
        .open(&unfinished)
        // Invariant: synced before the name stands for it.
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .map_err(|error| failed("write", &unfinished, error))?;
    rename(&unfinished, path)?;
    sync_folder(path.parent().expect("a file lies in a folder"))
}

/// Where [`replace`] writes before it renames: a crash may leave it.
#[must_use]
pub fn unfinished(path: &Path) -> PathBuf {
    beside(path, ".tmp")
}

/// The path of a companion, whose name is the file's and a suffix.
#[must_use]
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Renames atomically; durable after [`sync_folder`].
///
/// # Errors
/// What the operating system refused.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    files_of(from).rename(from, to).map_err(|error| failed("rename", from, error))
}

/// Removes a file, if it is there.
///
/// # Errors
/// What the operating system refused.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match files_of(path).remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

/// Makes a file's content durable. Its name is durable after [`sync_folder`].
///
/// # Errors
/// What the operating system refused.
pub fn sync_file(path: &Path) -> Result<(), FileError> {
    files_of(path).sync_file(path).map_err(|error| failed("sync", path, error))
}

/// Makes a file's content durable whatever came of earlier syncs: after one that failed, the system may
/// take for written what is not. So the file is replaced by a copy; nobody may have it open. Does nothing
/// where there is no such file or it is empty.
///
/// # Errors
/// What the operating system refused.
pub fn write_anew(path: &Path) -> Result<(), FileError> {
    if length_bytes(path)?.is_none_or(|length| length == 0) {
        return Ok(());
    }
    // Not in place: a power loss meanwhile could damage what was durable.
    let copy = unfinished(path);
    create(&copy)?;
    files_of(path).copy(path, &copy).map_err(|error| failed("copy", path, error))?;
    sync_file(&copy)?;
    rename(&copy, path)?;
    sync_folder(path.parent().expect("a file lies in a folder"))
}

/// Makes the folder's names durable: what was created, renamed and removed in it.
///
/// # Errors
/// What the operating system refused.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    files_of(folder).sync_folder(folder).map_err(|error| failed("sync", folder, error))
}

/// The length in bytes, or nothing where there is no such file.
///
/// # Errors
/// What the operating system refused.
pub fn length_bytes(path: &Path) -> Result<Option<u64>, FileError> {
    match files_of(path).length_bytes(path) {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// The permission bits, where they let others than the owner in.
#[must_use]
pub fn wide_mode(path: &Path) -> Option<u32> {
    let metadata = std::fs::metadata(path).ok()?;
    let mode = metadata.permissions().mode() & 0o777;
    Some(mode).filter(|mode| mode & 0o077 != 0)
}

/// Opens a file to read its bytes, or nothing where there is no such file.
///
/// # Errors
/// What the operating system refused.
pub fn open_to_read(path: &Path) -> Result<Option<Box<dyn Read>>, FileError> {
    match files_of(path).open_to_read(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("open", path, error)),
    }
}

/// The names of the files in a folder, sorted.
///
/// # Errors
/// What the operating system refused.
pub fn list(folder: &Path) -> Result<Vec<String>, FileError> {
    let names = files_of(folder).list(folder);
    let mut names = names.map_err(|error| failed("list", folder, error))?;
    names.sort();
    Ok(names)
}

fn failed(action: &'static str, path: &Path, source: io::Error) -> FileError {
    FileError { action, path: path.to_owned(), source }
}

/// The operations of this module as a file system does them; what each is for is said above, at the
/// function of its name. Only tests have another than the machine's own.
#[doc(hidden)]
pub trait Files: Debug + Send + Sync {
    /// Whether the path is one of its own. Decided by the path alone, as SQLite's stand-in does it,
    /// so that a folder's files and its databases always lie on the same disk.
    fn holds(&self, path: &Path) -> bool;
    fn create_folder(&self, folder: &Path) -> io::Result<()>;
    fn lock(&self, path: &Path) -> io::Result<Result<Held, HeldBy>>;
    fn create(&self, path: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// All bytes of a file into one that is there and empty.
    fn copy(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
    fn length_bytes(&self, path: &Path) -> io::Result<u64>;
    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn Read>>;
    fn list(&self, folder: &Path) -> io::Result<Vec<String>>;
}

/// A locked file, until dropped.
#[doc(hidden)]
pub type Held = Box<dyn Debug + Send + Sync>;

/// Who has the lock, for people.
#[doc(hidden)]
#[derive(Debug)]
pub struct HeldBy(pub String);

static STAND_IN: OnceLock<Box<dyn Files>> = OnceLock::new();

/// Puts a simulated disk under the paths that it [holds](Files::holds), for the rest of the process.
/// For tests: they put one under SQLite too, which also is process-wide and goes by paths.
///
/// # Panics
/// There is one already.
#[doc(hidden)]
pub fn stand_in(files: Box<dyn Files>) {
    STAND_IN.set(files).expect("a process has one stand-in");
}

fn files_of(path: &Path) -> &'static dyn Files {
    match STAND_IN.get() {
        Some(stand_in) if stand_in.holds(path) => &**stand_in,
        _ => &System,
    }
}

/// The machine's file systems.
#[derive(Debug)]
struct System;

impl Files for System {
    fn holds(&self, _path: &Path) -> bool {
        true
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        DirBuilder::new().mode(FOLDER_MODE).create(folder)
    }

    fn lock(&self, path: &Path) -> io::Result<Result<Held, HeldBy>> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut id = String::new();
                let known = file.read_to_string(&mut id).is_ok() && !id.trim().is_empty();
                let holder =
                    if known { format!("process {}", id.trim()) } else { "another process".into() };
                return Ok(Err(HeldBy(holder)));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The process id is for people; the lock itself is the kernel's. A full disk does not matter.
        let _ = file.set_len(0).and_then(|()| file.rewind());
        let _ = writeln!(file, "{}", std::process::id());
        Ok(Ok(Box::new(file)))
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(FILE_MODE).open(path).map(drop)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        // Byte by byte: a copy that shares its blocks with the original would share their fate.
        let mut to = OpenOptions::new().write(true).open(to)?;
        let mut from = BufReader::with_capacity(1 << 20, File::open(from)?);
        loop {
            let piece = from.fill_buf()?;
            if piece.is_empty() {
                return Ok(());
            }
            to.write_all(piece)?;
            let length = piece.len();
            from.consume(length);
        }
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        File::open(folder)?.sync_all()
    }

    fn length_bytes(&self, path: &Path) -> io::Result<u64> {
        Ok(std::fs::metadata(path)?.len())
    }

    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn Read>> {
        Ok(Box::new(File::open(path)?))
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<String>> {
        let names = std::fs::read_dir(folder)?;
        names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }
}
