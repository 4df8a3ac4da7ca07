//! A disk in memory that a running program uses: it counts, fails and records operations, and
//! loses its power. Knows no SQLite and no `std::fs`; what a loss leaves is decided in `medium`.
//!
//! One [`Disk`] is one run of the machine. Each is mounted at a path of its own, so that whatever
//! outlives a power loss (a connection, a thread) only ever meets its dead disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::medium::{Entry, FileId, FolderId, Image, Medium, Op, ROOT};
use crate::recording::Recording;

/// Every simulated path begins here; what does not is left to the real file system.
const MOUNTS: &str = "/simulated-disk";

/// What the disk tells SQLite about itself. What it does is in `medium`, whatever it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) sector_bytes: i32,
    /// `SQLITE_IOCAP_*`.
    pub(crate) characteristics: i32,
}

impl Device {
    /// Promises nothing. What every test uses that has no reason for another.
    pub(crate) const PLAIN: Self = Self { sector_bytes: 512, characteristics: 0 };
    /// `SQLITE_IOCAP_POWERSAFE_OVERWRITE`, as a bit.
    const POWERSAFE_OVERWRITE: i32 = 0x1000;
    /// What SQLite's own VFS tells on Linux: powersafe overwrites, reads of part of a page, and
    /// sectors of 4096 bytes.
    pub(crate) const LINUX: Self =
        Self { sector_bytes: 4096, characteristics: Self::POWERSAFE_OVERWRITE | 0x8000 };

    fn powersafe_overwrite(self) -> bool {
        self.characteristics & Self::POWERSAFE_OVERWRITE != 0
    }
}

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// EIO from anything that touches the disk, but for syncs.
    Io,
    /// ENOSPC from what needs space: a new name, or bytes past the end of a file.
    NoSpace,
    /// A write gets half of its bytes in, and ENOSPC for the rest.
    ShortWrite,
    /// EIO from a file sync. What was unsynced may be gone.
    FailedSync,
    /// EIO from a folder sync. The changes of names stay unsynced.
    FailedFolderSync,
}

/// Which operation fails, and how: the `nth` that could fail so, counted from 0.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) fault: Fault,
    pub(crate) nth: u64,
    /// Whether all later ones fail too, until [`Disk::heal`].
    pub(crate) from_then_on: bool,
    /// Only operations on paths (from the disk's root) that contain this.
    pub(crate) only: Option<String>,
    /// Decides what of the unsynced bytes a failed sync lets through.
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

    /// The path of the disk's root folder.
    pub(crate) fn root(&self) -> &Path {
        Path::new(&self.shared.root)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Writes into the recording that something was promised to the outside by now.
    pub(crate) fn note(&self, text: impl Into<String>) {
        let mut inner = self.shared.lock();
        // What is said after the power is gone reaches nobody.
        if inner.powered {
            inner.recording.note(text.into());
        }
    }

    /// What happened since power on. Cheap: the bytes are shared.
    pub(crate) fn recording(&self) -> Recording {
        self.shared.lock().recording.clone()
    }

    /// Sets the fault to come, in place of any other, and counts anew.
    pub(crate) fn fail(&self, plan: Plan) {
        let mut inner = self.shared.lock();
        (inner.plan, inner.candidates, inner.fired) = (Some(plan), 0, 0);
    }

    pub(crate) fn heal(&self) {
        self.shared.lock().plan = None;
    }

    /// How many operations failed by the last plan.
    pub(crate) fn fired(&self) -> u64 {
        self.shared.lock().fired
    }

    /// How many operations the programs asked for, reads and failed ones too.
    pub(crate) fn operations(&self) -> u64 {
        self.shared.lock().operations
    }

    /// Fails everything from now on, and changes nothing more.
    pub(crate) fn power_off(&self) {
        self.shared.lock().powered = false;
    }

    /// Loses power now. Boot what is left.
    pub(crate) fn cut(&self, seed: u64) -> Image {
        self.power_off();
        self.after_cut(seed)
    }

    /// What a cut now would leave, without one.
    pub(crate) fn after_cut(&self, seed: u64) -> Image {
        self.shared.device.cut(&self.shared.lock().medium, seed)
    }

    /// The programs die and the machine lives: everything is as they saw it, and as unsynced as
    /// before. The recording goes on.
    pub(crate) fn kill(&self) -> Self {
        let mut inner = self.shared.lock();
        inner.powered = false;
        Self::mount(inner.medium.clone(), inner.recording.clone(), self.shared.device)
    }
}

impl Drop for Disk {
    /// What still uses the disk meets a dead one.
    fn drop(&mut self) {
        self.power_off();
        mounts().remove(&self.shared.number);
    }
}

impl Device {
    /// A cut at one moment of a recording made on this device.
    pub(crate) fn cut(self, medium: &Medium, seed: u64) -> Image {
        medium.cut(seed, self.powersafe_overwrite())
    }
}

/// Finds the disk that a path lies on, and the path from its root.
///
/// # Errors
/// The disk is gone. `Ok(None)`: the path is not simulated.
pub(crate) fn resolve(path: &str) -> io::Result<Option<(Arc<Shared>, &str)>> {
    let Some(rest) = path.strip_prefix(MOUNTS).and_then(|rest| rest.strip_prefix('/')) else {
        return Ok(None);
    };
    let (number, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let disk = number.parse().ok().and_then(|number: u64| mounts().get(&number)?.upgrade());
    disk.map(|disk| Some((disk, rest))).ok_or_else(eio)
}

/// Whether a path lies on a simulated disk, one that is gone included.
pub(crate) fn is_simulated(path: &str) -> bool {
    path.strip_prefix(MOUNTS).is_some_and(|rest| rest.starts_with('/'))
}

fn mounts() -> MutexGuard<'static, BTreeMap<u64, Weak<Shared>>> {
    static MOUNTED: Mutex<BTreeMap<u64, Weak<Shared>>> = Mutex::new(BTreeMap::new());
    MOUNTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What open files share with the disk's owner. Paths here are from the root: `a.db`, `backup/a.db`.
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
    plan: Option<Plan>,
    /// Operations since the plan was set that could have failed by it.
    candidates: u64,
    fired: u64,
    operations: u64,
    /// What open files of one name have in common, for SQLite: `vfs` says what.
    open: HashMap<FileId, Weak<dyn std::any::Any + Send + Sync>>,
    locks: HashSet<FileId>,
}

/// What an operation is, as far as faults go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Neither needs space nor syncs.
    Plain,
    Write {
        grows: bool,
    },
    Grow,
    Sync,
    SyncFolder,
}

impl Shared {
    pub(crate) fn open(&self, path: &str) -> io::Result<FileId> {
        let mut inner = self.lock();
        inner.step(Class::Plain, path)?;
        inner.find_file(path)
    }

    /// Creates a file that must not be there.
    pub(crate) fn create(&self, path: &str) -> io::Result<FileId> {
        let mut inner = self.lock();
        inner.step(Class::Grow, path)?;
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

    /// How many bytes there were to read, at most as many as asked for.
    pub(crate) fn read(
        &self,
        file: FileId,
        path: &str,
        offset: usize,
        into: &mut [u8],
    ) -> io::Result<usize> {
        let mut inner = self.lock();
        inner.step(Class::Plain, path)?;
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
        inner.apply(Op::Write { file, offset, bytes: bytes.into() });
        Ok(())
    }

    pub(crate) fn set_length(&self, file: FileId, path: &str, length: usize) -> io::Result<()> {
        let mut inner = self.lock();
        let grows = inner.medium.bytes(file).len() < length;
        inner.step(if grows { Class::Grow } else { Class::Plain }, path)?;
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
        if let Err(StepError { fault: Some(_) }) = fault {
            let seed = inner.plan.as_ref().map_or(0, |plan| plan.seed) + inner.fired;
            inner.apply(Op::FailSync { file, seed });
        }
        fault?;
        inner.apply(Op::SyncFile { file });
        Ok(())
    }

    pub(crate) fn sync_folder(&self, path: &str) -> io::Result<()> {
        let mut inner = self.lock();
        // File systems either get a change of names to the disk with a later try, or stop.
        inner.step(Class::SyncFolder, path)?;
        let folder = inner.find_folder(path)?;
        inner.apply(Op::SyncFolder { folder });
        Ok(())
    }

    /// Within one folder; replaces what has the name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut inner = self.lock();
        inner.step(Class::Plain, from)?;
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
        inner.step(Class::Plain, path)?;
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

    /// The names in a folder, in order.
    pub(crate) fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut inner = self.lock();
        inner.step(Class::Plain, path)?;
        let folder = inner.find_folder(path)?;
        Ok(inner.medium.names(folder).map(|(name, _)| name.to_owned()).collect())
    }

    /// Takes the advisory lock of a file, as `flock` does. False: another has it.
    pub(crate) fn lock_file(&self, file: FileId) -> io::Result<bool> {
        let mut inner = self.lock();
        inner.check_power()?;
        Ok(inner.locks.insert(file))
    }

    pub(crate) fn unlock_file(&self, file: FileId) {
        self.lock().locks.remove(&file);
    }

    /// What the open files of one name have in common: made by the first, dropped with the last.
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
        // A panic elsewhere fails its own test; the disk is whole between operations.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn check_power(&self) -> io::Result<()> {
        if self.powered { Ok(()) } else { Err(eio()) }
    }

    /// Counts an operation, and says whether it is to fail.
    fn step(&mut self, class: Class, path: &str) -> Result<(), StepError> {
        self.operations += 1;
        if !self.powered {
            return Err(StepError { fault: None });
        }
        let Some(plan) = &self.plan else {
            return Ok(());
        };
        let elsewhere = plan.only.as_ref().is_some_and(|part| !path.contains(part.as_str()));
        let possible = match plan.fault {
            Fault::Io => !matches!(class, Class::Sync | Class::SyncFolder),
            Fault::NoSpace => matches!(class, Class::Grow | Class::Write { grows: true }),
            Fault::ShortWrite => matches!(class, Class::Write { .. }),
            Fault::FailedSync => class == Class::Sync,
            Fault::FailedFolderSync => class == Class::SyncFolder,
        };
        if elsewhere || !possible {
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

    /// The folder of a path and the name in it, whether or not there is something.
    fn place(&self, path: &str) -> io::Result<(FolderId, String)> {
        let (folder, name) = split(path);
        // White space would break the lines of a recording.
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok((self.find_folder(folder)?, name.to_owned()))
    }

    /// A place with nothing there.
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

/// An operation fails by plan, or (no fault) since the power is off.
#[derive(Clone, Copy)]
struct StepError {
    fault: Option<Fault>,
}

impl From<StepError> for io::Error {
    fn from(error: StepError) -> Self {
        match error.fault {
            Some(Fault::NoSpace | Fault::ShortWrite) => Self::from_raw_os_error(ENOSPC),
            Some(Fault::Io | Fault::FailedSync | Fault::FailedFolderSync) | None => eio(),
        }
    }
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn eio() -> io::Error {
    io::Error::from_raw_os_error(EIO)
}

/// `a/b/c` is `c` in `a/b`; `c` is `c` in the root.
pub(crate) fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}
