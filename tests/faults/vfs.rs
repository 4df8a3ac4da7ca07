//! SQLite on a simulated disk: its default VFS in this process. It behaves as SQLite's own does on Linux
//! (`os_unix.c` of 3.53), except for the properties that the disk reports. Knows nothing of power loss and
//! faults, which happen in `disk`.
//!
//! Paths that are not simulated, and temporary files, are passed to SQLite's own VFS. Databases are not
//! mapped into memory. The index of a WAL is: SQLite writes to the heap, and the content after each change is
//! what the disk may have of the `-shm` file. If the first try to open that file fails, SQLite's own VFS
//! opens it read-only; this one can't open it.
//!
//! Crates were considered: `sqlite-plugin` 0.11 can be registered statically, but it needs libclang to build,
//! and it drops the flag of `xDelete` that requests a folder sync, which decides whether a deleted journal
//! stays deleted. `sqlite-vfs` 0.2 drops the flag too and dates from 2022.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::ptr;
use std::slice;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use deadpool_sqlite::rusqlite::ffi;

use crate::disk::{Shared, is_eio, resolve, split};
use crate::medium::FileId;

/// The name for `file:PATH?vfs=simulated`. Plain paths use this VFS too, since it is the default.
pub(crate) const NAME: &CStr = c"simulated";

/// Makes the simulation SQLite's default VFS in this process. Calling it again has no effect.
pub(crate) fn install() {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        // SAFETY: SQLite keeps the VFS, which is leaked, and never unregisters its own.
        let code = unsafe {
            let base = ffi::sqlite3_vfs_find(ptr::null());
            assert!(!base.is_null(), "SQLite has a VFS of its own");
            let file_bytes =
                size_of::<OpenFile>().max(usize::try_from((*base).szOsFile).unwrap_or(0));
            let vfs = ffi::sqlite3_vfs {
                iVersion: 2,
                szOsFile: c_int::try_from(file_bytes).expect("some hundred bytes"),
                mxPathname: (*base).mxPathname,
                pNext: ptr::null_mut(),
                zName: NAME.as_ptr(),
                pAppData: base.cast(),
                xOpen: Some(x_open),
                xDelete: Some(x_delete),
                xAccess: Some(x_access),
                xFullPathname: Some(x_full_pathname),
                xRandomness: Some(x_randomness),
                xSleep: Some(x_sleep),
                xCurrentTime: Some(x_current_time),
                xCurrentTimeInt64: Some(x_current_time_int64),
                xDlOpen: None,
                xDlError: None,
                xDlSym: None,
                xDlClose: None,
                xGetLastError: None,
                xSetSystemCall: None,
                xGetSystemCall: None,
                xNextSystemCall: None,
            };
            ffi::sqlite3_vfs_register(Box::leak(Box::new(vfs)), 1)
        };
        assert_eq!(code, ffi::SQLITE_OK, "SQLite must accept the VFS");
    });
}

type Code = c_int;

/// An open file, without pointers: the implementation of SQLite's methods.
struct Handle {
    disk: Arc<Shared>,
    file: FileId,
    /// The path from the disk's root with which the file was opened.
    path: String,
    common: Arc<Common>,
    lock: c_int,
    index: Option<Arc<Index>>,
    /// The bits of the index locks that this handle has.
    shared: u32,
    exclusive: u32,
    persist_wal: bool,
    /// SQLite's own VFS syncs the folder with the first sync of a journal that may be new.
    sync_folder_too: bool,
}

/// The state that the open files of one name share.
#[derive(Default)]
struct Common {
    locks: Mutex<Locks>,
    index: Mutex<Weak<Index>>,
}

/// The locks on a database file: the highest level (`SQLITE_LOCK_*`), and how many handles have one.
#[derive(Default)]
struct Locks {
    highest: c_int,
    holders: u32,
}

/// The shared memory of a WAL: a mapped file.
struct Index {
    file: FileId,
    path: String,
    regions: Mutex<Vec<Region>>,
    /// For each lock, the count of shared holders, or -1 if it is held exclusively.
    locks: Mutex<[i32; LOCKS]>,
}

const LOCKS: usize = ffi::SQLITE_SHM_NLOCK as usize;
const REGION_BYTES: usize = 32 * 1024;

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_out_of_space(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::StorageFull
}

impl Handle {
    /// Opens a file as `unixOpen` does. Returns the flags that apply in the end, too.
    fn open(disk: Arc<Shared>, path: &str, flags: c_int) -> Result<(Self, c_int), Code> {
        let mut flags = flags;
        let writable = flags & ffi::SQLITE_OPEN_READWRITE != 0;
        let may_create = flags & ffi::SQLITE_OPEN_CREATE != 0;
        let must_create = flags & ffi::SQLITE_OPEN_EXCLUSIVE != 0;
        let journal = flags
            & (ffi::SQLITE_OPEN_MAIN_JOURNAL
                | ffi::SQLITE_OPEN_SUPER_JOURNAL
                | ffi::SQLITE_OPEN_WAL)
            != 0;
        let there = disk.find(path).map_err(|_| ffi::SQLITE_CANTOPEN)?.is_some();
        let opened = match there {
            false if may_create => disk.create(path),
            true if must_create => Err(io::ErrorKind::AlreadyExists.into()),
            _ => disk.open(path),
        };
        let file = match opened {
            Ok(file) => file,
            // Like SQLite's own VFS, falls back to opening read-only, which makes the database read-only.
            Err(error) if writable && error.kind() != io::ErrorKind::IsADirectory => {
                flags &= !(ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_CREATE);
                flags |= ffi::SQLITE_OPEN_READONLY;
                disk.open(path).map_err(|_| ffi::SQLITE_CANTOPEN)?
            }
            Err(_) => return Err(ffi::SQLITE_CANTOPEN),
        };
        if flags & ffi::SQLITE_OPEN_DELETEONCLOSE != 0 {
            disk.remove(path).map_err(|_| ffi::SQLITE_CANTOPEN)?;
        }
        let common = disk.common(file);
        let handle = Self {
            disk,
            file,
            path: path.to_owned(),
            common,
            lock: ffi::SQLITE_LOCK_NONE,
            index: None,
            shared: 0,
            exclusive: 0,
            persist_wal: false,
            // Set even if the journal existed, as in SQLite's own VFS.
            sync_folder_too: journal && may_create,
        };
        Ok((handle, flags))
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), Code> {
        match self.disk.read(self.file, &self.path, offset, into) {
            Ok(length) if length < into.len() => {
                into[length..].fill(0);
                Err(ffi::SQLITE_IOERR_SHORT_READ)
            }
            Ok(_) => Ok(()),
            // The same code as from SQLite's own VFS. The program gets SQLITE_CORRUPT.
            Err(error) if is_eio(&error) => Err(ffi::SQLITE_IOERR_CORRUPTFS),
            Err(_) => Err(ffi::SQLITE_IOERR_READ),
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Code> {
        let written = self.disk.write(self.file, &self.path, offset, bytes);
        written.map_err(|error| match is_out_of_space(&error) {
            true => ffi::SQLITE_FULL,
            false => ffi::SQLITE_IOERR_WRITE,
        })
    }

    fn truncate(&self, length: usize) -> Result<(), Code> {
        let done = self.disk.set_length(self.file, &self.path, length);
        done.map_err(|_| ffi::SQLITE_IOERR_TRUNCATE)
    }

    fn sync(&mut self) -> Result<(), Code> {
        self.disk.sync(self.file, &self.path).map_err(|_| ffi::SQLITE_IOERR_FSYNC)?;
        if std::mem::take(&mut self.sync_folder_too) {
            // Like SQLite's own VFS, ignores the result.
            let _ = self.disk.sync_folder(split(&self.path).0);
        }
        Ok(())
    }

    fn length(&self) -> Result<usize, Code> {
        self.disk.length(self.file).map_err(|_| ffi::SQLITE_IOERR_FSTAT)
    }

    /// Works as `unixLock` does between the connections of one process.
    fn lock(&mut self, wanted: c_int) -> Result<(), Code> {
        if self.lock >= wanted {
            return Ok(());
        }
        self.length().map_err(|_| ffi::SQLITE_IOERR_LOCK)?;
        let mut locks = guard(&self.common.locks);
        let above_shared = wanted > ffi::SQLITE_LOCK_SHARED;
        let pending = locks.highest >= ffi::SQLITE_LOCK_PENDING;
        if self.lock != locks.highest && (pending || above_shared) {
            return Err(ffi::SQLITE_BUSY);
        }
        if wanted == ffi::SQLITE_LOCK_SHARED {
            locks.holders += 1;
            locks.highest = locks.highest.max(wanted);
        } else if wanted == ffi::SQLITE_LOCK_EXCLUSIVE && locks.holders > 1 {
            // Keeps new readers out while it waits for the others to leave.
            if self.lock == ffi::SQLITE_LOCK_RESERVED {
                (self.lock, locks.highest) = (ffi::SQLITE_LOCK_PENDING, ffi::SQLITE_LOCK_PENDING);
            }
            return Err(ffi::SQLITE_BUSY);
        } else {
            locks.highest = wanted;
        }
        self.lock = wanted;
        Ok(())
    }

    fn unlock(&mut self, wanted: c_int) {
        if self.lock <= wanted {
            return;
        }
        let mut locks = guard(&self.common.locks);
        if self.lock > ffi::SQLITE_LOCK_SHARED {
            locks.highest = ffi::SQLITE_LOCK_SHARED;
        }
        if wanted == ffi::SQLITE_LOCK_NONE {
            locks.holders -= 1;
            if locks.holders == 0 {
                locks.highest = ffi::SQLITE_LOCK_NONE;
            }
        }
        self.lock = wanted;
    }

    fn is_reserved(&self) -> bool {
        guard(&self.common.locks).highest > ffi::SQLITE_LOCK_SHARED
    }

    /// Returns whether the path no longer leads to this file.
    fn has_moved(&self) -> bool {
        self.disk.find(&self.path).ok().flatten() != Some(crate::medium::Entry::File(self.file))
    }

    /// Returns the memory of one region, or null if it does not exist and must not be created, as
    /// `unixShmMap` does.
    fn map(&mut self, region: usize, extend: bool) -> Result<*mut c_void, Code> {
        let index = match &self.index {
            Some(index) => Arc::clone(index),
            None => self.open_index()?,
        };
        let mut regions = guard(&index.regions);
        while regions.len() <= region {
            let length = (regions.len() + 1) * REGION_BYTES;
            let there = self.disk.length(index.file).map_err(|_| ffi::SQLITE_IOERR_SHMSIZE)?;
            if there < length && !extend {
                return Ok(ptr::null_mut());
            }
            if there < length {
                let grown = self.disk.set_length(index.file, &index.path, length);
                grown.map_err(|_| ffi::SQLITE_IOERR_SHMSIZE)?;
            }
            self.disk.map(&index.path).map_err(|_| ffi::SQLITE_IOERR_SHMMAP)?;
            regions.push(Region::new());
        }
        Ok(regions[region].0.cast())
    }

    /// Works as `unixOpenSharedMemory`: the first handle creates the file or empties it.
    fn open_index(&mut self) -> Result<Arc<Index>, Code> {
        let mut shared = guard(&self.common.index);
        let index = match shared.upgrade() {
            Some(index) => index,
            None => {
                let path = format!("{}-shm", self.path);
                let there = self.disk.find(&path).map_err(|_| ffi::SQLITE_CANTOPEN)?.is_some();
                let opened = if there { self.disk.open(&path) } else { self.disk.create(&path) };
                let file = opened.map_err(|_| ffi::SQLITE_CANTOPEN)?;
                // Length 3, as SQLite's own VFS sets it, so that people can see where it comes from.
                let emptied = self.disk.set_length(file, &path, 3);
                emptied.map_err(|_| ffi::SQLITE_IOERR_SHMOPEN)?;
                Arc::new(Index { file, path, regions: Mutex::default(), locks: Mutex::default() })
            }
        };
        *shared = Arc::downgrade(&index);
        self.index = Some(Arc::clone(&index));
        Ok(index)
    }

    /// Works as `unixShmLock` does between the connections of one process.
    fn lock_index(&mut self, first: usize, count: usize, flags: c_int) -> Result<(), Code> {
        let index = self.index.as_ref().ok_or(ffi::SQLITE_IOERR_SHMLOCK)?;
        let mut locks = guard(&index.locks);
        let locks = locks.get_mut(first..first + count).ok_or(ffi::SQLITE_IOERR_SHMLOCK)?;
        let mask = ((1 << count) - 1) << first;
        let alone = flags & ffi::SQLITE_SHM_EXCLUSIVE != 0;
        if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
            if alone {
                // The changes made under the lock are complete.
                index.write_back_at_will(&self.disk);
            }
            if (self.shared | self.exclusive) & mask != 0 {
                for lock in locks {
                    *lock = if alone { 0 } else { *lock - 1 };
                }
                self.shared &= !mask;
                self.exclusive &= !mask;
            }
        } else if alone {
            if locks.iter().any(|lock| *lock != 0) {
                return Err(ffi::SQLITE_BUSY);
            }
            locks.fill(-1);
            self.exclusive |= mask;
        } else if self.shared & mask == 0 {
            if locks.iter().any(|lock| *lock < 0) {
                return Err(ffi::SQLITE_BUSY);
            }
            locks[0] += 1;
            self.shared |= mask;
        }
        Ok(())
    }

    /// Works as `unixShmUnmap`.
    fn unmap(&mut self, delete: bool) {
        let shared = guard(&self.common.index);
        if let Some(index) = self.index.take().and_then(Arc::into_inner) {
            index.write_back_at_will(&self.disk);
            if delete {
                // Like SQLite's own VFS, ignores the result.
                let _ = self.disk.remove(&index.path);
            }
        }
        drop(shared);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.unlock(ffi::SQLITE_LOCK_NONE);
    }
}

impl Index {
    /// From now on, the kernel may write the current content of the memory to the disk.
    fn write_back_at_will(&self, disk: &Shared) {
        for (at, region) in guard(&self.regions).iter().enumerate() {
            disk.change_mapped(self.file, at * REGION_BYTES, &region.bytes());
        }
    }
}

/// 32 KiB that SQLite's connections share, under SQLite's own rules.
struct Region(*mut [u64; REGION_BYTES / 8]);

// SAFETY: only SQLite reads and writes it, under its own locks and barriers.
unsafe impl Send for Region {}

impl Region {
    fn new() -> Self {
        let zeroes: Box<[u64; REGION_BYTES / 8]> =
            vec![0; REGION_BYTES / 8].try_into().expect("as long as it says");
        Self(Box::into_raw(zeroes))
    }

    /// Returns the current content. Another connection may be changing it, as when a kernel reads it.
    fn bytes(&self) -> Vec<u8> {
        // A volatile read of the whole array would compile to an instruction for each byte, in minutes.
        let word = |at| {
            // SAFETY: the region has this many words and lives as long as `self`.
            unsafe { self.0.cast::<u64>().add(at).read_volatile() }
        };
        (0..REGION_BYTES / 8).flat_map(|at| word(at).to_ne_bytes()).collect()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: created by `Box::into_raw`, and the last handle that mapped it has released it.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// The memory that SQLite keeps for an open file. SQLite itself knows only the first field.
#[repr(C)]
struct OpenFile {
    base: ffi::sqlite3_file,
    handle: *mut Handle,
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    // Version 2: with shared memory, without mapping of the database.
    iVersion: 2,
    xClose: Some(x_close),
    xRead: Some(x_read),
    xWrite: Some(x_write),
    xTruncate: Some(x_truncate),
    xSync: Some(x_sync),
    xFileSize: Some(x_file_size),
    xLock: Some(x_lock),
    xUnlock: Some(x_unlock),
    xCheckReservedLock: Some(x_check_reserved_lock),
    xFileControl: Some(x_file_control),
    xSectorSize: Some(x_sector_size),
    xDeviceCharacteristics: Some(x_device_characteristics),
    xShmMap: Some(x_shm_map),
    xShmLock: Some(x_shm_lock),
    xShmBarrier: Some(x_shm_barrier),
    xShmUnmap: Some(x_shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

fn code(result: Result<(), Code>) -> Code {
    result.err().unwrap_or(ffi::SQLITE_OK)
}

/// # Safety
/// `file` was opened by `x_open`, is not closed yet, and is used by one thread at a time, as SQLite promises.
unsafe fn handle<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Handle {
    // SAFETY: by the caller's promise, it is an `OpenFile` with a handle from `Box::into_raw`.
    unsafe { &mut *(*file.cast::<OpenFile>()).handle }
}

/// # Safety
/// `vfs` is the one from `install`.
unsafe fn base(vfs: *mut ffi::sqlite3_vfs) -> *mut ffi::sqlite3_vfs {
    // SAFETY: by the caller's promise, this is SQLite's own VFS.
    unsafe { (*vfs).pAppData.cast() }
}

/// Returns the disk of a name and the path on it, or `None` if the name is not simulated.
///
/// # Safety
/// `name` is null or ends in a zero.
unsafe fn simulated<'a>(name: *const c_char) -> Option<io::Result<(Arc<Shared>, &'a str)>> {
    if name.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let name = unsafe { CStr::from_ptr(name) }.to_str().ok()?;
    resolve(name).transpose()
}

unsafe extern "C" fn x_open(
    vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite passes this VFS, a null-terminated name or none, and `szOsFile` bytes, which are enough
    // for both kinds of file.
    unsafe {
        (*file).pMethods = ptr::null();
        let Some(place) = simulated(name) else {
            let base = base(vfs);
            return (*base)
                .xOpen
                .map_or(ffi::SQLITE_CANTOPEN, |open| open(base, name, file, flags, out_flags));
        };
        let opened = place
            .map_err(|_| ffi::SQLITE_CANTOPEN)
            .and_then(|(disk, path)| Handle::open(disk, path, flags));
        match opened {
            Ok((handle, flags)) => {
                if !out_flags.is_null() {
                    *out_flags = flags;
                }
                let base = ffi::sqlite3_file { pMethods: &METHODS };
                let handle = Box::into_raw(Box::new(handle));
                file.cast::<OpenFile>().write(OpenFile { base, handle });
                ffi::SQLITE_OK
            }
            Err(code) => code,
        }
    }
}

unsafe extern "C" fn x_delete(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    sync_folder: c_int,
) -> c_int {
    // SAFETY: SQLite passes this VFS and a null-terminated name.
    unsafe {
        match simulated(name) {
            None => {
                let base = base(vfs);
                (*base)
                    .xDelete
                    .map_or(ffi::SQLITE_IOERR_DELETE, |delete| delete(base, name, sync_folder))
            }
            Some(Err(_)) => ffi::SQLITE_IOERR_DELETE,
            Some(Ok((disk, path))) => code(delete(&disk, path, sync_folder & 1 != 0)),
        }
    }
}

fn delete(disk: &Shared, path: &str, sync_folder: bool) -> Result<(), Code> {
    disk.remove(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => ffi::SQLITE_IOERR_DELETE_NOENT,
        _ => ffi::SQLITE_IOERR_DELETE,
    })?;
    if sync_folder {
        disk.sync_folder(split(path).0).map_err(|_| ffi::SQLITE_IOERR_DIR_FSYNC)?;
    }
    Ok(())
}

unsafe extern "C" fn x_access(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite passes this VFS, a null-terminated name, and a place for the result.
    unsafe {
        match simulated(name) {
            None => {
                let base = base(vfs);
                (*base)
                    .xAccess
                    .map_or(ffi::SQLITE_IOERR_ACCESS, |access| access(base, name, flags, out))
            }
            Some(Err(_)) => ffi::SQLITE_IOERR_ACCESS,
            Some(Ok((disk, path))) => {
                // Like SQLite's own VFS, treats a file that it can't look at as missing.
                *out = c_int::from(accessible(&disk, path, flags).unwrap_or(false));
                ffi::SQLITE_OK
            }
        }
    }
}

fn accessible(disk: &Shared, path: &str, flags: c_int) -> io::Result<bool> {
    Ok(match disk.look(path)? {
        // Like SQLite's own VFS, treats an empty file as missing, so that an empty journal is no journal.
        Some(crate::medium::Entry::File(file)) if flags == ffi::SQLITE_ACCESS_EXISTS => {
            disk.length(file)? > 0
        }
        Some(_) => true,
        None => false,
    })
}

unsafe extern "C" fn x_full_pathname(
    vfs: *mut ffi::sqlite3_vfs,
    name: *const c_char,
    out_bytes: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite passes this VFS, a null-terminated name, and `out_bytes` bytes for the result.
    unsafe {
        if simulated(name).is_none() {
            let base = base(vfs);
            return (*base)
                .xFullPathname
                .map_or(ffi::SQLITE_CANTOPEN, |full| full(base, name, out_bytes, out));
        }
        let name = CStr::from_ptr(name).to_bytes_with_nul();
        if usize::try_from(out_bytes).is_ok_and(|out_bytes| name.len() <= out_bytes) {
            ptr::copy_nonoverlapping(name.as_ptr().cast(), out, name.len());
            ffi::SQLITE_OK
        } else {
            ffi::SQLITE_CANTOPEN
        }
    }
}

unsafe extern "C" fn x_randomness(
    vfs: *mut ffi::sqlite3_vfs,
    bytes: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: SQLite passes this VFS; its own gets the same arguments.
    unsafe {
        let base = base(vfs);
        (*base).xRandomness.map_or(0, |randomness| randomness(base, bytes, out))
    }
}

unsafe extern "C" fn x_sleep(vfs: *mut ffi::sqlite3_vfs, microseconds: c_int) -> c_int {
    // SAFETY: as in `x_randomness`.
    unsafe {
        let base = base(vfs);
        (*base).xSleep.map_or(0, |sleep| sleep(base, microseconds))
    }
}

unsafe extern "C" fn x_current_time(vfs: *mut ffi::sqlite3_vfs, out: *mut f64) -> c_int {
    // SAFETY: as in `x_randomness`.
    unsafe {
        let base = base(vfs);
        (*base).xCurrentTime.map_or(ffi::SQLITE_ERROR, |now| now(base, out))
    }
}

unsafe extern "C" fn x_current_time_int64(vfs: *mut ffi::sqlite3_vfs, out: *mut i64) -> c_int {
    // SAFETY: as in `x_randomness`.
    unsafe {
        let base = base(vfs);
        (*base).xCurrentTimeInt64.map_or(ffi::SQLITE_ERROR, |now| now(base, out))
    }
}

unsafe extern "C" fn x_close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes a file that `x_open` opened once, and does not use it afterwards.
    unsafe {
        drop(Box::from_raw((*file.cast::<OpenFile>()).handle));
        (*file).pMethods = ptr::null();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_read(
    file: *mut ffi::sqlite3_file,
    into: *mut c_void,
    length: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    let (Ok(length), Ok(offset)) = (usize::try_from(length), usize::try_from(offset)) else {
        return ffi::SQLITE_IOERR_READ;
    };
    // SAFETY: SQLite passes an open file and `length` bytes to read into.
    let (handle, into) =
        unsafe { (handle(file), slice::from_raw_parts_mut(into.cast::<u8>(), length)) };
    code(handle.read(offset, into))
}

unsafe extern "C" fn x_write(
    file: *mut ffi::sqlite3_file,
    bytes: *const c_void,
    length: c_int,
    offset: ffi::sqlite3_int64,
) -> c_int {
    let (Ok(length), Ok(offset)) = (usize::try_from(length), usize::try_from(offset)) else {
        return ffi::SQLITE_IOERR_WRITE;
    };
    // SAFETY: SQLite passes an open file and `length` bytes.
    let (handle, bytes) =
        unsafe { (handle(file), slice::from_raw_parts(bytes.cast::<u8>(), length)) };
    code(handle.write(offset, bytes))
}

unsafe extern "C" fn x_truncate(file: *mut ffi::sqlite3_file, length: ffi::sqlite3_int64) -> c_int {
    let Ok(length) = usize::try_from(length) else {
        return ffi::SQLITE_IOERR_TRUNCATE;
    };
    // SAFETY: SQLite passes an open file.
    code(unsafe { handle(file) }.truncate(length))
}

unsafe extern "C" fn x_sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: SQLite passes an open file.
    code(unsafe { handle(file) }.sync())
}

unsafe extern "C" fn x_file_size(
    file: *mut ffi::sqlite3_file,
    out: *mut ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite passes an open file and a place for the result.
    unsafe {
        let length = handle(file).length().and_then(|length| {
            ffi::sqlite3_int64::try_from(length).map_err(|_| ffi::SQLITE_IOERR_FSTAT)
        });
        code(length.map(|length| *out = length))
    }
}

unsafe extern "C" fn x_lock(file: *mut ffi::sqlite3_file, wanted: c_int) -> c_int {
    // SAFETY: SQLite passes an open file.
    code(unsafe { handle(file) }.lock(wanted))
}

unsafe extern "C" fn x_unlock(file: *mut ffi::sqlite3_file, wanted: c_int) -> c_int {
    // SAFETY: SQLite passes an open file.
    unsafe { handle(file) }.unlock(wanted);
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_check_reserved_lock(file: *mut ffi::sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: SQLite passes an open file and a place for the result.
    unsafe { *out = c_int::from(handle(file).is_reserved()) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_file_control(
    file: *mut ffi::sqlite3_file,
    control: c_int,
    argument: *mut c_void,
) -> c_int {
    // SAFETY: SQLite passes an open file and, for these controls, a number to read and write.
    unsafe {
        let handle = handle(file);
        let number = argument.cast::<c_int>();
        match control {
            ffi::SQLITE_FCNTL_HAS_MOVED => *number = c_int::from(handle.has_moved()),
            ffi::SQLITE_FCNTL_PERSIST_WAL if *number < 0 => {
                *number = c_int::from(handle.persist_wal)
            }
            ffi::SQLITE_FCNTL_PERSIST_WAL => handle.persist_wal = *number != 0,
            _ => return ffi::SQLITE_NOTFOUND,
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn x_sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite passes an open file.
    unsafe { handle(file) }.disk.device.sector_bytes
}

unsafe extern "C" fn x_device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite passes an open file.
    unsafe { handle(file) }.disk.device.characteristics
}

unsafe extern "C" fn x_shm_map(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    region_bytes: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    let Ok(region) = usize::try_from(region) else {
        return ffi::SQLITE_IOERR_SHMMAP;
    };
    if usize::try_from(region_bytes) != Ok(REGION_BYTES) {
        return ffi::SQLITE_IOERR_SHMMAP;
    }
    // SAFETY: SQLite passes an open file and a place for the result.
    unsafe {
        *out = ptr::null_mut();
        code(handle(file).map(region, extend != 0).map(|memory| *out = memory))
    }
}

unsafe extern "C" fn x_shm_lock(
    file: *mut ffi::sqlite3_file,
    first: c_int,
    count: c_int,
    flags: c_int,
) -> c_int {
    let (Ok(first), Ok(count)) = (usize::try_from(first), usize::try_from(count)) else {
        return ffi::SQLITE_IOERR_SHMLOCK;
    };
    // SAFETY: SQLite passes an open file.
    code(unsafe { handle(file) }.lock_index(first, count, flags))
}

unsafe extern "C" fn x_shm_barrier(file: *mut ffi::sqlite3_file) {
    fence(Ordering::SeqCst);
    // Like SQLite's own VFS, also takes a mutex, to be safe.
    // SAFETY: SQLite passes an open file.
    drop(guard(&unsafe { handle(file) }.common.index));
}

unsafe extern "C" fn x_shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    // SAFETY: SQLite passes an open file.
    unsafe { handle(file) }.unmap(delete != 0);
    ffi::SQLITE_OK
}
