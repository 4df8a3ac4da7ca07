//! Every file operation outside SQLite, so that the order of operations and the syncing can be read and
//! tested in one place. Knows nothing of what the files contain.
//!
//! Assumption about the medium: a rename is atomic, and it is durable once its folder is synced.

use std::fmt::Debug;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use tracing::warn;

/// The file that a process locks while it uses the folder.
pub(crate) const LOCK: &str = "LOCK";

/// The pause between attempts to lock a folder that another process uses: a fraction of the time a start
/// takes.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// Access for the user of the process only, since the files contain numbers that are not yet issued.
const FILE_MODE: u32 = 0o600;
const FOLDER_MODE: u32 = 0o700;

/// A file operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {path}: {source}")]
pub struct FileError {
    action: &'static str,
    path: PathBuf,
    /// The error of the operating system.
    pub source: io::Error,
}

/// The reason that a folder could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds the lock.
    #[error(
        "{folder} is in use: {holder} holds its LOCK. Stop that process first, or use another \
         folder with --data-dir"
    )]
    Held {
        folder: PathBuf,
        /// `process N`, or `another process` if its id is not known.
        holder: String,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// The lock of a folder. It is released when this is dropped or when the process ends, even by a crash.
#[derive(Debug)]
pub struct Lock {
    _file: LockedFile,
}

/// Creates the folder if it is missing, and locks it for this process. While another process holds the lock,
/// waits for up to `patience` and logs that it waits.
///
/// # Errors
/// Returns [`LockError::Held`] if another process still holds the lock after `patience`.
pub fn lock(folder: &Path, patience: Duration) -> Result<Lock, LockError> {
    create_folder(folder)?;
    let path = folder.join(LOCK);
    let started = Instant::now();
    let mut is_waiting = false;
    loop {
        let locked = files_of(folder).lock(&path).map_err(|error| failed("lock", &path, error))?;
        let holder = match locked {
            Locking::Locked(file) => return Ok(Lock { _file: file }),
            Locking::HeldBy(holder) => holder,
        };
        if started.elapsed() >= patience {
            return Err(LockError::Held { folder: folder.to_owned(), holder });
        }
        if !std::mem::replace(&mut is_waiting, true) {
            let (folder, seconds) = (folder.display(), patience.as_secs_f64());
            warn!(%folder, %holder, seconds, "the data folder is in use: waiting until it is free");
        }
        thread::sleep(LOCK_RETRY);
    }
}

/// Creates the folder if it is missing, and makes its name durable. If a folder vanished with its ledger, the
/// next start would begin a new number space.
pub fn create_folder(folder: &Path) -> Result<(), FileError> {
    if folder.parent().is_none() {
        return Ok(());
    }
    let parent = parent(folder);
    if length_bytes(folder)?.is_some() {
        // The process that created the folder may have been killed before it synced the name. If the parent
        // can't be opened, the folder's creator is responsible for its name.
        let _ = sync_folder(parent);
        return Ok(());
    }
    create_folder(parent)?;
    files_of(folder)
        .create_folder(folder)
        .map_err(|error| failed("create the folder", folder, error))?;
    sync_folder(parent)
}

/// Returns the folder that contains a path.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Returns whether a path is in a folder or is the folder itself, with symbolic links resolved. The path does
/// not have to exist.
pub(crate) fn lies_in(path: &Path, folder: &Path) -> Result<bool, FileError> {
    let real = |path: &Path| std::fs::canonicalize(path);
    let folder = real(folder).map_err(|error| failed("look at", folder, error))?;
    let absolute = std::path::absolute(path).map_err(|error| failed("look at", path, error))?;
    for there in absolute.ancestors() {
        match real(there) {
            Ok(there) => return Ok(there.starts_with(&folder)),
            // A path that does not exist will be created in the nearest folder that does.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("look at", there, error)),
        }
    }
    Ok(false)
}

/// Removes a folder and everything in it.
pub(crate) fn remove_folder(folder: &Path) -> Result<(), FileError> {
    std::fs::remove_dir_all(folder).map_err(|error| failed("remove", folder, error))
}

/// Returns the device and inode of a file, which stay the same when it is written to, or `None` if there is
/// no such file.
pub(crate) fn identity(path: &Path) -> Result<Option<(u64, u64)>, FileError> {
    match std::fs::metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// Creates an empty file for this user only, and replaces an existing one.
pub fn create(path: &Path) -> Result<(), FileError> {
    files_of(path).create(path).map_err(|error| failed("create", path, error))
}

/// Creates an empty file for this user only, if there is none.
pub(crate) fn create_if_absent(path: &Path) -> Result<(), FileError> {
    match create_new(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("create", path, error))
        }
        _ => Ok(()),
    }
}

/// Returns the content of a file, or `None` if there is no such file.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("read", path, error)),
    }
}

/// Replaces a file's content, durably once this returns. At every moment, even after a crash, the file has
/// either all of the old content or all of the new.
///
/// # Errors
/// Returns [`FileError`] if the operating system refuses. It is then unknown which of the two contents a
/// crash leaves.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let unfinished = unfinished(path);
    create(&unfinished)?;
    OpenOptions::new()
        .write(true)
        .open(&unfinished)
        // Invariant: synced before the file gets its name.
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()))
        .map_err(|error| failed("write", &unfinished, error))?;
    rename_durably(&unfinished, path)
}

/// Returns the path that [`replace`] writes to before it renames. A crash may leave this file.
pub(crate) fn unfinished(path: &Path) -> PathBuf {
    beside(path, ".tmp")
}

/// Returns the path of a companion file, whose name is the file's name plus a suffix.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Renames a file atomically. The new name is durable after [`sync_folder`].
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    files_of(from).rename(from, to).map_err(|error| failed("rename", from, error))
}

/// Renames a file atomically and durably, within its folder.
///
/// # Errors
/// Returns [`FileError`] if the operating system refuses. It is then unknown which name a crash leaves.
pub(crate) fn rename_durably(from: &Path, to: &Path) -> Result<(), FileError> {
    rename(from, to)?;
    sync_folder(parent(to))
}

/// Removes a file if it exists.
pub fn remove(path: &Path) -> Result<(), FileError> {
    match files_of(path).remove(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

/// Makes a file's content durable. Its name is durable after [`sync_folder`].
pub fn sync_file(path: &Path) -> Result<(), FileError> {
    files_of(path).sync_file(path).map_err(|error| failed("sync", path, error))
}

/// Copies a file, which must not change at the same time. The copy is for this user only, and is not synced.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), FileError> {
    let bytes = length_bytes(from)?.unwrap_or(0);
    create(to)?;
    files_of(from).copy(from, to, bytes).map_err(|error| failed("copy", from, error))
}

/// Replaces a file by a durable copy of its first `bytes`, regardless of earlier syncs: after a failed sync,
/// the system may treat data as written that is not. No process may have the file open.
///
/// # Errors
/// Returns [`FileError`] if the operating system refuses. If copying fails, the file is unchanged and the
/// copy is removed.
pub(crate) fn rewrite(path: &Path, bytes: u64) -> Result<(), FileError> {
    // A power loss during a write in place could damage data that was durable.
    let copy = unfinished(path);
    create(&copy)?;
    let copied = files_of(path)
        .copy(path, &copy, bytes)
        .map_err(|error| failed("copy", path, error))
        .and_then(|()| sync_file(&copy))
        .and_then(|()| rename(&copy, path));
    if let Err(error) = copied {
        // The copy would take space that a full disk does not have.
        let _ = remove(&copy);
        return Err(error);
    }
    sync_folder(parent(path))
}

/// Appends zeros to a file, durably, until it has `bytes` or the disk is full. Overwriting them later needs
/// no more space.
///
/// # Errors
/// Returns [`FileError`] if the operating system refuses for another reason than a full disk.
pub(crate) fn reserve(path: &Path, bytes: u64) -> Result<(), FileError> {
    let missing = bytes.saturating_sub(length_bytes(path)?.unwrap_or(0));
    match files_of(path).append_zeros(path, missing) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
        {
            return Err(failed("extend", path, error));
        }
        _ => {}
    }
    sync_file(path)
}

/// Makes the names in a folder durable: files that were created, renamed or removed.
pub fn sync_folder(folder: &Path) -> Result<(), FileError> {
    files_of(folder).sync_folder(folder).map_err(|error| failed("sync", folder, error))
}

/// Returns a file's length in bytes, or `None` if there is no such file.
pub fn length_bytes(path: &Path) -> Result<Option<u64>, FileError> {
    match files_of(path).length_bytes(path) {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at", path, error)),
    }
}

/// Returns the permission bits if they give access to others than the owner.
pub(crate) fn wide_mode(path: &Path) -> Option<u32> {
    let metadata = std::fs::metadata(path).ok()?;
    let mode = metadata.permissions().mode() & 0o777;
    Some(mode).filter(|mode| mode & 0o077 != 0)
}

/// Opens a file to read its bytes. Returns `None` if there is no such file.
pub(crate) fn open_to_read(path: &Path) -> Result<Option<Box<dyn Read>>, FileError> {
    match files_of(path).open_to_read(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("open", path, error)),
    }
}

/// Reads a file to its end, if it exists, to find out whether the disk can read all of it.
pub(crate) fn read_through(path: &Path) -> Result<(), FileError> {
    let Some(mut content) = open_to_read(path)? else {
        return Ok(());
    };
    io::copy(&mut content, &mut io::sink()).map(drop).map_err(|error| failed("read", path, error))
}

/// Returns the names of the files in a folder, sorted.
pub fn list(folder: &Path) -> Result<Vec<String>, FileError> {
    let names = files_of(folder).list(folder);
    let mut names = names.map_err(|error| failed("list", folder, error))?;
    names.sort();
    Ok(names)
}

pub(crate) fn failed(action: &'static str, path: &Path, source: io::Error) -> FileError {
    FileError { action, path: path.to_owned(), source }
}

/// The file-system operations behind this module, each documented at the function of the same name above.
/// Only tests use another implementation than `System`.
#[doc(hidden)]
pub trait Files: Debug + Send + Sync {
    /// Returns whether the path belongs to this implementation. The path alone decides, as in SQLite's
    /// stand-in, so that a folder's files and its databases are always on the same disk.
    fn holds(&self, path: &Path) -> bool;
    fn create_folder(&self, folder: &Path) -> io::Result<()>;
    fn lock(&self, path: &Path) -> io::Result<Locking>;
    fn create(&self, path: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// Copies the first `bytes` of a file into an existing empty file.
    fn copy(&self, from: &Path, to: &Path, bytes: u64) -> io::Result<()>;
    /// Writes the zeros, since a hole in a file reserves no space.
    fn append_zeros(&self, path: &Path, bytes: u64) -> io::Result<()>;
    fn sync_folder(&self, folder: &Path) -> io::Result<()>;
    fn length_bytes(&self, path: &Path) -> io::Result<u64>;
    fn open_to_read(&self, path: &Path) -> io::Result<Box<dyn Read>>;
    fn list(&self, folder: &Path) -> io::Result<Vec<String>>;
}

/// A locked file. Dropping it releases the lock.
#[doc(hidden)]
pub(crate) type LockedFile = Box<dyn Debug + Send + Sync>;

/// The result of locking a file.
#[doc(hidden)]
#[derive(Debug)]
pub enum Locking {
    /// This process holds the lock.
    Locked(LockedFile),
    /// Another process holds it. The text says which one, for people.
    HeldBy(String),
}

static STAND_IN: OnceLock<Box<dyn Files>> = OnceLock::new();

/// Installs a simulated disk for the paths that it [holds](Files::holds), for the rest of the process. Tests
/// also install one for SQLite, which is process-wide and selects by path as well.
///
/// # Panics
/// Panics if one is already installed.
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

/// Creates an empty file for this user only, or fails if there is one. If root creates it, it gets the folder's owner,
/// since the server of another user could not open a file of root.
fn create_new(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(FILE_MODE).open(path)?;
    let folder = std::fs::metadata(parent(path))?;
    if file.metadata()?.uid() != folder.uid() {
        // Only root may do this. Any other process created the file for itself.
        let _ = fchown(&file, Some(folder.uid()), Some(folder.gid()));
    }
    Ok(file)
}

/// Opens a file to read and write, and [creates](create_new) it if there is none.
fn open_or_create(path: &Path, truncate: bool) -> io::Result<File> {
    match create_new(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut options = OpenOptions::new();
            // In the folder of another user, a link could lead root to a file elsewhere.
            options.read(true).write(true).truncate(truncate).custom_flags(libc::O_NOFOLLOW);
            options.open(path)
        }
        created => created,
    }
}

impl Files for System {
    fn holds(&self, _path: &Path) -> bool {
        true
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        DirBuilder::new().mode(FOLDER_MODE).create(folder)
    }

    fn lock(&self, path: &Path) -> io::Result<Locking> {
        let mut file = open_or_create(path, false)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut id = String::new();
                let known = file.read_to_string(&mut id).is_ok() && !id.trim().is_empty();
                let holder =
                    if known { format!("process {}", id.trim()) } else { "another process".into() };
                return Ok(Locking::HeldBy(holder));
            }
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The process id is only for people: the kernel holds the lock. So a full disk does not matter here.
        let _ = file.set_len(0).and_then(|()| file.rewind());
        let _ = writeln!(file, "{}", std::process::id());
        Ok(Locking::Locked(Box::new(file)))
    }

    fn create(&self, path: &Path) -> io::Result<()> {
        open_or_create(path, true).map(drop)
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

    fn copy(&self, from: &Path, to: &Path, bytes: u64) -> io::Result<()> {
        // Copies bytes, not extents: a copy that shares blocks with the original would share their damage.
        let mut to = OpenOptions::new().write(true).open(to)?;
        let mut from = BufReader::with_capacity(1 << 20, File::open(from)?.take(bytes));
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

    fn append_zeros(&self, path: &Path, bytes: u64) -> io::Result<()> {
        let file = OpenOptions::new().append(true).open(path)?;
        let mut file = BufWriter::with_capacity(1 << 18, file);
        io::copy(&mut io::repeat(0).take(bytes), &mut file)?;
        file.flush()
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
