//! A disk in memory for a running program: it counts, fails and records operations, and loses its power.
//! Knows nothing of SQLite and `std::fs`; `medium` decides what a power loss leaves.
//!
//! One [`Disk`] is one run of the machine. Each is mounted at a path of its own, so a connection or a thread
//! that outlives a power loss only ever uses its dead disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::medium::{Entry, FileId, FolderId, Image, Medium, Op, PAGE_BYTES, ROOT};
use crate::recording::Recording;

/// The prefix of every simulated path. All other paths are left to the real file system.
const MOUNTS: &str = "/simulated-disk";

/// The properties that the disk reports to SQLite. Only powersafe overwrites change how it behaves; see
/// `medium`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) sector_bytes: i32,
    /// `SQLITE_IOCAP_*`.
    pub(crate) characteristics: i32,
}

impl Device {
    /// Promises nothing. The default for tests.
    pub(crate) const PLAIN: Self = Self { sector_bytes: 512, characteristics: 0 };
    /// `SQLITE_IOCAP_POWERSAFE_OVERWRITE`, as a bit.
    const POWERSAFE_OVERWRITE: i32 = 0x1000;
    /// The properties that SQLite's own VFS reports on Linux: powersafe overwrites, reads of part of a page,
    /// and sectors of 4096 bytes.
    pub(crate) const LINUX: Self =
        Self { sector_bytes: 4096, characteristics: Self::POWERSAFE_OVERWRITE | 0x8000 };

    fn powersafe_overwrite(self) -> bool {
        self.characteristics & Self::POWERSAFE_OVERWRITE != 0
    }
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// EIO from every operation except syncs and mappings.
    Io,
    /// ENOSPC from operations that need space: a new file or folder, or bytes past the end of a file.
    NoSpace,
    /// EDQUOT from operations that need space: the user's quota is used up, although the disk has space.
    Quota,
    /// A write stores half of its bytes, and returns ENOSPC.
    ShortWrite,
    /// EMFILE from operations that open a file: the process has reached its limit of open files.
    FilesOfProcess,
    /// ENFILE from operations that open a file: the machine has reached its limit of open files.
    FilesOfSystem,
    /// ENOMEM from every operation except syncs.
    NoMemory,
    /// EINTR from operations that a signal may interrupt before they have any effect, for example on a
    /// network file system: renames, removals and syncs.
    Interrupted,
    /// EIO from a sync of a file. The unsynced bytes may be lost.
    FailedSync,
    /// EIO from a sync of a folder. Its creations, renames and removals stay unsynced.
    FailedFolderSync,
}

impl Fault {
    /// Returns the error code of an operation that fails like this.
    fn errno(self) -> i32 {
        match self {
            Self::Interrupted => EINTR,
            Self::Io | Self::FailedSync | Self::FailedFolderSync => EIO,
            Self::NoMemory => ENOMEM,
            Self::FilesOfSystem => ENFILE,
            Self::FilesOfProcess => EMFILE,
            Self::NoSpace | Self::ShortWrite => ENOSPC,
            Self::Quota => EDQUOT,
        }
    }

    fn hits(self, class: Class) -> bool {
        let syncs = matches!(class, Class::Sync | Class::SyncFolder);
        match self {
            Self::Io => !syncs && class != Class::Map,
            Self::NoSpace | Self::Quota => {
                matches!(class, Class::Create | Class::Grow | Class::Write { grows: true })
            }
            Self::ShortWrite => matches!(class, Class::Write { .. }),
            Self::FilesOfProcess | Self::FilesOfSystem => {
                matches!(class, Class::Open | Class::Create)
            }
            Self::NoMemory => !syncs,
            Self::Interrupted => syncs || class == Class::Name,
            Self::FailedSync => class == Class::Sync,
            Self::FailedFolderSync => class == Class::SyncFolder,
        }
    }
}

/// Which operation fails, and how. `nth` counts, from 0, the operations that could fail like this.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) fault: Fault,
    pub(crate) nth: u64,
    /// Whether all later ones fail too, until [`Disk::heal`].
    pub(crate) from_then_on: bool,
    /// Only operations on paths (from the disk's root) that contain this text can fail.
    pub(crate) only: Option<String>,
    /// Decides which of the unsynced bytes reach the disk despite a failed sync.
    pub(crate) seed: u64,
}

impl Plan {
    pub(crate) fn once(fault: Fault, nth: u64) -> Self {
        Self { fault, nth, from_then_on: false, only: None, seed: nth }
    }

    pub(crate) fn from_then_on(fault: Fault, nth: u64) -> Self {
        Self { from_then_on: true, ..Self::once(fault, nth) }
    }

    pub(crate) fn only(self, part_of_path: &str) -> Self {
        Self { only: Some(part_of_path.to_owned()), ..self }
    }
}

/// One run of a machine with one disk, from power on to power loss.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) shared: Arc<Shared>,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self::boot(&Image::empty())
    }

    pub(crate) fn boot(image: &Image) -> Self {
        Self::boot_on(image, Device::PLAIN)
    }

    pub(crate) fn boot_on(image: &Image, device: Device) -> Self {
        Self::mount(image.medium().clone(), Recording::new(image.clone()), device)
    }

    fn mount(medium: Medium, recording: Recording, device: Device) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            number,
            root: format!("{MOUNTS}/{number}"),
            device,
            inner: Mutex::new(Inner {
                medium,
                recording,
                powered: true,
                capacity_bytes: None,
                denied: 0,
                plan: None,
                candidates: 0,
                fired: 0,
                operations: 0,
                open: HashMap::new(),
                locks: HashSet::new(),
            }),
        });
        mounts().insert(number, Arc::downgrade(&shared));
        Self { shared }
    }

    /// Returns the path of the disk's root folder.
    pub(crate) fn root(&self) -> &Path {
        Path::new(&self.shared.root)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Records that this was promised to clients.
    pub(crate) fn note(&self, text: impl Into<String>) {
        let mut inner = self.shared.lock();
        // A promise made after the power is lost reaches no client.
        if inner.powered {
            inner.recording.note(text.into());
        }
    }

    /// Returns the history since power on. This is cheap, because the bytes are shared.
    pub(crate) fn recording(&self) -> Recording {
        self.shared.lock().recording.clone()
    }

    /// Sets the next fault in place of any other, and resets the counts.
    pub(crate) fn fail(&self, plan: Plan) {
        let mut inner = self.shared.lock();
        (inner.plan, inner.candidates, inner.fired) = (Some(plan), 0, 0);
    }

    pub(crate) fn heal(&self) {
        self.shared.lock().plan = None;
    }

    /// Returns how many operations have failed because of the last plan.
    pub(crate) fn fired(&self) -> u64 {
        self.shared.lock().fired
    }

    /// Limits the size of all files together. Operations that need more fail with ENOSPC.
    pub(crate) fn set_capacity(&self, bytes: usize) {
        let mut inner = self.shared.lock();
        (inner.capacity_bytes, inner.denied) = (Some(bytes), 0);
    }

    /// Returns the size of all files together.
    pub(crate) fn used_bytes(&self) -> usize {
        self.shared.lock().medium.used_bytes()
    }

    /// Returns how many operations found no space since the capacity was set.
    pub(crate) fn denied(&self) -> u64 {
        self.shared.lock().denied
    }

    /// Returns how many operations the programs have requested, including reads and failed ones.
    pub(crate) fn operations(&self) -> u64 {
        self.shared.lock().operations
    }

    /// Fails all operations from now on, so that the disk no longer changes.
    pub(crate) fn power_off(&self) {
        self.shared.lock().powered = false;
    }

    /// Cuts the power now, and returns what is left, which can be booted.
    pub(crate) fn cut(&self, seed: u64) -> Image {
        self.power_off();
        self.after_cut(seed)
    }

    /// Returns what a cut now would leave, without making one.
    pub(crate) fn after_cut(&self, seed: u64) -> Image {
        self.shared.device.cut(&self.shared.lock().medium, seed)
    }

    /// Kills the programs while the machine keeps running: the files are as the programs saw them, and
    /// unsynced changes stay unsynced. The recording continues.
    pub(crate) fn kill(&self) -> Self {
        let mut inner = self.shared.lock();
        inner.powered = false;
        Self::mount(inner.medium.clone(), inner.recording.clone(), self.shared.device)
    }
}

impl Drop for Disk {
    /// Connections that outlive the disk find it dead.
    fn drop(&mut self) {
        self.power_off();
        mounts().remove(&self.shared.number);
    }
}

impl Device {
    /// Cuts the power at one moment of a recording made on this device.
    pub(crate) fn cut(self, medium: &Medium, seed: u64) -> Image {
        medium.cut(seed, self.powersafe_overwrite())
    }
}

/// Finds the disk of a path, and the path from its root. Returns `Ok(None)` for a path that is not simulated.
///
/// # Errors
/// The disk is gone.
pub(crate) fn resolve(path: &str) -> io::Result<Option<(Arc<Shared>, &str)>> {
    let Some(rest) = path.strip_prefix(MOUNTS).and_then(|rest| rest.strip_prefix('/')) else {
        return Ok(None);
    };
    let (number, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let disk = number.parse().ok().and_then(|number: u64| mounts().get(&number)?.upgrade());
    disk.map(|disk| Some((disk, rest))).ok_or_else(eio)
}

/// Returns whether a path is on a simulated disk, even if that disk is gone.
pub(crate) fn is_simulated(path: &str) -> bool {
    path.strip_prefix(MOUNTS).is_some_and(|rest| rest.starts_with('/'))
}

fn mounts() -> MutexGuard<'static, BTreeMap<u64, Weak<Shared>>> {
    static MOUNTED: Mutex<BTreeMap<u64, Weak<Shared>>> = Mutex::new(BTreeMap::new());
    MOUNTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The state that open files share with the owner of the disk. Paths here are from the root: `a.db`,
/// `backup/a.db`.
pub(crate) struct Shared {
    number: u64,
    root: String,
    pub(crate) device: Device,
    inner: Mutex<Inner>,
}

struct Inner {
    medium: Medium,
    recording: Recording,
    powered: bool,
    capacity_bytes: Option<usize>,
    denied: u64,
    plan: Option<Plan>,
    /// The count of operations since the plan was set that it could have failed.
    candidates: u64,
    fired: u64,
    operations: u64,
    /// The state that the open files of one name share; `vfs` defines it.
    open: HashMap<FileId, Weak<dyn std::any::Any + Send + Sync>>,
    locks: HashSet<FileId>,
}

/// The kind of an operation, which decides the faults that can hit it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Reads, or asks what exists.
    Read,
    /// Needs a file descriptor.
    Open,
    /// Needs a file descriptor and space.
    Create,
    Write {
        grows: bool,
    },
    Grow,
    Shrink,
    /// Maps a file into memory.
    Map,
    /// Renames or removes.
    Name,
    Sync,
    SyncFolder,
}

impl Shared {
    pub(crate) fn open(&self, path: &str) -> io::Result<FileId> {
        let mut inner = self.lock();
        inner.step(Class::Open, path)?;
        inner.find_file(path)
    }

    /// Opens a folder, the first step of syncing or listing it.
    pub(crate) fn open_folder(&self, path: &str) -> io::Result<FolderId> {
        let mut inner = self.lock();
        inner.step(Class::Open, path)?;
        inner.find_folder(path)
    }

    /// Creates a file that must not exist.
    pub(crate) fn create(&self, path: &str) -> io::Result<FileId> {
        let mut inner = self.lock();
        inner.step(Class::Create, path)?;
        let (folder, name) = inner.vacancy(path)?;
        let file = FileId(inner.medium.next_id());
        inner.apply(Op::CreateFile { folder, name, file });
        Ok(file)
    }

    pub(crate) fn create_folder(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step(Class::Grow, path)?;
        let (folder, name) = inner.vacancy(path)?;
        let created = FolderId(inner.medium.next_id());
        inner.apply(Op::CreateFolder { folder, name, created });
        Ok(())
    }

    /// Reads at most as many bytes as `into` holds, and returns how many there were.
    pub(crate) fn read(
        &self,
        file: FileId,
        path: &str,
        offset: usize,
        into: &mut [u8],
    ) -> io::Result<usize> {
        let mut inner = self.lock();
        inner.step(Class::Read, path)?;
        let bytes = inner.medium.bytes(file);
        let bytes = bytes.get(offset..).unwrap_or_default();
        let length = bytes.len().min(into.len());
        into[..length].copy_from_slice(&bytes[..length]);
        Ok(length)
    }

    pub(crate) fn write(
        &self,
        file: FileId,
        path: &str,
        offset: usize,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut inner = self.lock();
        let grows = inner.medium.bytes(file).len() < offset + bytes.len();
        let fault = inner.step(Class::Write { grows }, path);
        if let Err(StepError { fault: Some(Fault::ShortWrite) }) = fault {
            let bytes = bytes[..bytes.len() / 2].into();
            inner.apply(Op::Write { file, offset, bytes });
        }
        fault?;
        let room = inner.length_max(file).saturating_sub(offset);
        let there_is_room = bytes.len() <= room;
        let bytes = &bytes[..bytes.len().min(room)];
        if !bytes.is_empty() {
            inner.apply(Op::Write { file, offset, bytes: bytes.into() });
        }
        inner.deny_unless(there_is_room)
    }

    /// Records that a program has changed mapped memory: `bytes` is all of it, from `offset` in the file.
    /// This can't fail and needs no space, because SQLite has the file system reserve it first.
    pub(crate) fn change_mapped(&self, file: FileId, offset: usize, bytes: &[u8]) {
        let mut inner = self.lock();
        if !inner.powered {
            return;
        }
        for (offset, page) in (offset..).step_by(PAGE_BYTES).zip(bytes.chunks(PAGE_BYTES)) {
            let known = inner.medium.bytes(file).get(offset..offset + page.len());
            if known != Some(page) {
                inner.apply(Op::ChangePage { file, offset, bytes: page.into() });
            }
        }
    }

    /// Maps a file into memory.
    pub(crate) fn map(&self, path: &str) -> io::Result<()> {
        Ok(self.lock().step(Class::Map, path)?)
    }

    pub(crate) fn set_length(&self, file: FileId, path: &str, length: usize) -> io::Result<()> {
        let mut inner = self.lock();
        let grows = inner.medium.bytes(file).len() < length;
        inner.step(if grows { Class::Grow } else { Class::Shrink }, path)?;
        let there_is_room = !grows || length <= inner.length_max(file);
        inner.deny_unless(there_is_room)?;
        inner.apply(Op::SetLength { file, length });
        Ok(())
    }

    pub(crate) fn length(&self, file: FileId) -> io::Result<usize> {
        let inner = self.lock();
        inner.check_power()?;
        Ok(inner.medium.bytes(file).len())
    }

    pub(crate) fn sync(&self, file: FileId, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        let fault = inner.step(Class::Sync, path);
        if let Err(StepError { fault: Some(Fault::FailedSync) }) = fault {
            let seed = inner.plan.as_ref().map_or(0, |plan| plan.seed) + inner.fired;
            inner.apply(Op::FailSync { file, seed });
        }
        fault?;
        inner.apply(Op::SyncFile { file });
        Ok(())
    }

    pub(crate) fn sync_folder(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        // After a failure, file systems either write the change of names at a later try, or stop.
        inner.step(Class::SyncFolder, path)?;
        let folder = inner.find_folder(path)?;
        inner.apply(Op::SyncFolder { folder });
        Ok(())
    }

    /// Renames within one folder, and replaces an existing file of the new name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step(Class::Name, from)?;
        let (folder, from) = inner.place(from)?;
        let (other, to) = inner.place(to)?;
        if folder != other {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        let source = inner.medium.entry(folder, &from).ok_or(io::ErrorKind::NotFound)?;
        match (source, inner.medium.entry(folder, &to)) {
            (Entry::File(_), Some(Entry::Folder(_))) => Err(io::ErrorKind::IsADirectory.into()),
            (Entry::Folder(_), Some(_)) => Err(io::ErrorKind::AlreadyExists.into()),
            _ if from == to => Ok(()),
            _ => {
                inner.apply(Op::Rename { folder, from, to });
                Ok(())
            }
        }
    }

    pub(crate) fn remove(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step(Class::Name, path)?;
        inner.find_file(path)?;
        let (folder, name) = inner.place(path)?;
        inner.apply(Op::Remove { folder, name });
        Ok(())
    }

    pub(crate) fn find(&self, path: &str) -> io::Result<Option<Entry>> {
        let inner = self.lock();
        inner.check_power()?;
        Ok(inner.find(path))
    }

    /// Does the same as `find`, but counts as an operation of a program.
    pub(crate) fn look(&self, path: &str) -> io::Result<Option<Entry>> {
        let mut inner = self.lock();
        inner.step(Class::Read, path)?;
        Ok(inner.find(path))
    }

    /// Returns the names in a folder, in order.
    pub(crate) fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let folder = self.open_folder(path)?;
        let inner = self.lock();
        Ok(inner.medium.names(folder).map(|(name, _)| name.to_owned()).collect())
    }

    /// Takes the advisory lock of a file, as `flock` does. Returns `false` if it is taken.
    pub(crate) fn lock_file(&self, file: FileId) -> io::Result<bool> {
        let mut inner = self.lock();
        inner.check_power()?;
        Ok(inner.locks.insert(file))
    }

    pub(crate) fn unlock_file(&self, file: FileId) {
        self.lock().locks.remove(&file);
    }

    /// Returns the state that the open files of one name share. The first one creates it, and it is dropped
    /// with the last.
    pub(crate) fn common<T>(&self, file: FileId) -> Arc<T>
    where
        T: Default + Send + Sync + 'static,
    {
        let mut inner = self.lock();
        if let Some(common) = inner.open.get(&file).and_then(Weak::upgrade) {
            return common.downcast().expect("one type for all open files");
        }
        let common = Arc::new(T::default());
        let weak: Weak<T> = Arc::downgrade(&common);
        inner.open.insert(file, weak);
        common
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic elsewhere fails its own test; the disk is consistent between operations.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn check_power(&self) -> io::Result<()> {
        if self.powered { Ok(()) } else { Err(eio()) }
    }

    /// Counts an operation, and returns an error if it has to fail.
    fn step(&mut self, class: Class, path: &str) -> Result<(), StepError> {
        self.operations += 1;
        if !self.powered {
            return Err(StepError { fault: None });
        }
        let Some(plan) = &self.plan else {
            return Ok(());
        };
        let elsewhere = plan.only.as_ref().is_some_and(|part| !path.contains(part.as_str()));
        if elsewhere || !plan.fault.hits(class) {
            return Ok(());
        }
        let nth = self.candidates;
        self.candidates += 1;
        if nth == plan.nth || (plan.from_then_on && nth > plan.nth) {
            self.fired += 1;
            return Err(StepError { fault: Some(plan.fault) });
        }
        Ok(())
    }

    /// Returns the greatest length that a file can have.
    fn length_max(&self, file: FileId) -> usize {
        let Some(capacity_bytes) = self.capacity_bytes else {
            return usize::MAX;
        };
        let free = capacity_bytes.saturating_sub(self.medium.used_bytes());
        // Space is allocated in whole pages. The file already has all of its last page.
        self.medium.bytes(file).len().next_multiple_of(PAGE_BYTES) + free / PAGE_BYTES * PAGE_BYTES
    }

    fn deny_unless(&mut self, there_is_room: bool) -> io::Result<()> {
        if there_is_room {
            return Ok(());
        }
        self.denied += 1;
        Err(io::Error::from_raw_os_error(ENOSPC))
    }

    fn apply(&mut self, op: Op) {
        self.medium.apply(&op);
        self.recording.push(op);
    }

    fn find(&self, path: &str) -> Option<Entry> {
        let mut found = Entry::Folder(ROOT);
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let Entry::Folder(folder) = found else {
                return None;
            };
            found = self.medium.entry(folder, name)?;
        }
        Some(found)
    }

    fn find_file(&self, path: &str) -> io::Result<FileId> {
        match self.find(path).ok_or(io::ErrorKind::NotFound)? {
            Entry::File(file) => Ok(file),
            Entry::Folder(_) => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn find_folder(&self, path: &str) -> io::Result<FolderId> {
        match self.find(path).ok_or(io::ErrorKind::NotFound)? {
            Entry::Folder(folder) => Ok(folder),
            Entry::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// Returns the folder and the name of a path, which need not exist.
    fn place(&self, path: &str) -> io::Result<(FolderId, String)> {
        let (folder, name) = split(path);
        // White space in a name would break the format of a recording.
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((self.find_folder(folder)?, name.to_owned()))
    }

    /// Returns the same for a path that must not exist.
    fn vacancy(&self, path: &str) -> io::Result<(FolderId, String)> {
        match self.find(path) {
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => self.place(path),
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("root", &self.root).finish_non_exhaustive()
    }
}

/// An operation failed as planned, or, without a fault, because the power is off.
#[derive(Clone, Copy)]
struct StepError {
    fault: Option<Fault>,
}

impl From<StepError> for io::Error {
    fn from(error: StepError) -> Self {
        Self::from_raw_os_error(error.fault.map_or(EIO, Fault::errno))
    }
}

const EINTR: i32 = 4;
const EIO: i32 = 5;
const ENOMEM: i32 = 12;
const ENFILE: i32 = 23;
const EMFILE: i32 = 24;
const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;

pub(crate) fn is_eio(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EIO)
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(EIO)
}

/// Splits a path into folder and name: `a/b/c` is `c` in `a/b`, and `c` is `c` in the root.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
