//! What a power loss leaves of files and folders. Pure: knows no paths' owners, errors, locks,
//! clocks or SQLite.
//!
//! **Assumptions about the medium**, the worst that POSIX allows with these exceptions:
//! - A file sync makes the file's bytes and length durable, never its name. A folder sync makes the
//!   folder's names durable, never a file's bytes.
//! - Unsynced bytes reach the disk in sectors of 512, each or not, in any order; a length may reach
//!   it without the bytes, and bytes without the truncation before them.
//! - A sector on its way may also come out as noise. Where the device does not promise powersafe
//!   overwrites, the noise fills the sector, else only the bytes that were written.
//! - Unsynced creations, removals and renames survive each or not. A rename is one change, and the
//!   changes to one file keep their order, so that a file never has two names.
//! - What was synced stays. Nothing is damaged that was not being written.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// What a disk writes whole or not at all (unless it comes out as noise).
pub(crate) const SECTOR_BYTES: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId(pub(crate) u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FolderId(pub(crate) u32);

pub(crate) const ROOT: FolderId = FolderId(0);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Entry {
    File(FileId),
    Folder(FolderId),
}

/// One change of a medium. A list of them, from a known beginning, is a whole history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    CreateFile {
        folder: FolderId,
        name: String,
        file: FileId,
    },
    CreateFolder {
        folder: FolderId,
        name: String,
        created: FolderId,
    },
    Rename {
        folder: FolderId,
        from: String,
        to: String,
    },
    Remove {
        folder: FolderId,
        name: String,
    },
    SyncFolder {
        folder: FolderId,
    },
    Write {
        file: FileId,
        offset: usize,
        bytes: Arc<[u8]>,
    },
    SetLength {
        file: FileId,
        length: usize,
    },
    SyncFile {
        file: FileId,
    },
    /// A sync that failed. As on Linux, what was unsynced is then clean in the cache and never
    /// written again, whatever part of it reached the disk; and the cache may forget it.
    FailSync {
        file: FileId,
        seed: u64,
    },
}

/// Files and folders, each as the programs see it and as the disk has it.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    files: BTreeMap<FileId, File>,
    folders: BTreeMap<FolderId, Folder>,
    next_id: u32,
}

/// A medium after a power loss: cache and disk agree, and nothing is unsynced.
#[derive(Clone, Debug)]
pub(crate) struct Image(Medium);

#[derive(Clone, Debug, Default)]
struct File {
    cached: Arc<Vec<u8>>,
    durable: Arc<Vec<u8>>,
    unsynced: Vec<FileChange>,
}

#[derive(Clone, Debug)]
enum FileChange {
    Write { offset: usize, bytes: Arc<[u8]> },
    SetLength { length: usize },
}

#[derive(Clone, Debug, Default)]
struct Folder {
    cached: BTreeMap<String, Entry>,
    durable: BTreeMap<String, Entry>,
    unsynced: Vec<FolderChange>,
}

/// What happens to the name or, for a rename, the two names of one entry.
#[derive(Clone, Debug)]
struct FolderChange {
    about: Entry,
    names: Vec<(String, Option<Entry>)>,
}

impl Medium {
    pub(crate) fn new() -> Self {
        Self {
            files: BTreeMap::new(),
            folders: BTreeMap::from([(ROOT, Folder::default())]),
            next_id: 1,
        }
    }

    /// An id for the next file or folder to be created.
    pub(crate) fn next_id(&self) -> u32 {
        self.next_id
    }

    pub(crate) fn entry(&self, folder: FolderId, name: &str) -> Option<Entry> {
        self.folders[&folder].cached.get(name).copied()
    }

    pub(crate) fn names(&self, folder: FolderId) -> impl Iterator<Item = (&str, Entry)> {
        self.folders[&folder].cached.iter().map(|(name, entry)| (name.as_str(), *entry))
    }

    pub(crate) fn bytes(&self, file: FileId) -> &[u8] {
        &self.files[&file].cached
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::CreateFile { folder, name, file } => {
                self.files.insert(*file, File::default());
                self.enter(*folder, name, Entry::File(*file), file.0);
            }
            Op::CreateFolder { folder, name, created } => {
                self.folders.insert(*created, Folder::default());
                self.enter(*folder, name, Entry::Folder(*created), created.0);
            }
            Op::Rename { folder, from, to } => {
                let about = self.entry(*folder, from).expect("a rename has a source");
                let names = vec![(from.clone(), None), (to.clone(), Some(about))];
                self.folder(*folder).change(FolderChange { about, names });
            }
            Op::Remove { folder, name } => {
                let about = self.entry(*folder, name).expect("what is removed is there");
                let names = vec![(name.clone(), None)];
                self.folder(*folder).change(FolderChange { about, names });
            }
            Op::SyncFolder { folder } => {
                let folder = self.folder(*folder);
                for change in folder.unsynced.drain(..) {
                    change.apply(&mut folder.durable);
                }
            }
            Op::Write { file, offset, bytes } => {
                let change = FileChange::Write { offset: *offset, bytes: bytes.clone() };
                self.file(*file).change(change);
            }
            Op::SetLength { file, length } => {
                self.file(*file).change(FileChange::SetLength { length: *length });
            }
            Op::SyncFile { file } => {
                let file = self.file(*file);
                let durable = Arc::make_mut(&mut file.durable);
                for change in file.unsynced.drain(..) {
                    change.apply(durable);
                }
            }
            Op::FailSync { file, seed } => self.file(*file).fail_sync(*seed),
        }
    }

    /// The power fails. `powersafe_overwrite`: noise stays within the bytes that were written.
    pub(crate) fn cut(&self, seed: u64, powersafe_overwrite: bool) -> Image {
        let random = &mut ChaCha20Rng::seed_from_u64(seed);
        let mut left = Medium::new();
        left.next_id = self.next_id;
        self.cut_folder(ROOT, random, powersafe_overwrite, &mut left);
        Image(left)
    }

    fn cut_folder(&self, id: FolderId, random: &mut ChaCha20Rng, psow: bool, left: &mut Medium) {
        let names = self.folders[&id].survivors(random);
        for entry in names.values() {
            match *entry {
                Entry::Folder(inner) => self.cut_folder(inner, random, psow, left),
                Entry::File(file) => {
                    let bytes = self.files[&file].survivors(random, psow);
                    let settled =
                        File { cached: bytes.clone(), durable: bytes, unsynced: Vec::new() };
                    let twin = left.files.insert(file, settled);
                    assert!(twin.is_none(), "{file:?} has two names");
                }
            }
        }
        let settled = Folder { cached: names.clone(), durable: names, unsynced: Vec::new() };
        left.folders.insert(id, settled);
    }

    fn enter(&mut self, folder: FolderId, name: &str, entry: Entry, id: u32) {
        self.next_id = self.next_id.max(id + 1);
        let names = vec![(name.to_owned(), Some(entry))];
        self.folder(folder).change(FolderChange { about: entry, names });
    }

    fn file(&mut self, file: FileId) -> &mut File {
        self.files.get_mut(&file).expect("files are kept as long as the medium")
    }

    fn folder(&mut self, folder: FolderId) -> &mut Folder {
        self.folders.get_mut(&folder).expect("folders are kept as long as the medium")
    }
}

impl Image {
    /// A disk fresh from the factory.
    pub(crate) fn empty() -> Self {
        Self(Medium::new())
    }

    pub(crate) fn medium(&self) -> &Medium {
        &self.0
    }

    /// A history that leads from an empty disk to this image.
    pub(crate) fn history(&self) -> Vec<Op> {
        let mut ops = Vec::new();
        self.describe(ROOT, &mut ops);
        ops
    }

    /// The image that a history leads to when everything in it survives.
    pub(crate) fn after(history: &[Op]) -> Self {
        let mut medium = Medium::new();
        for op in history {
            medium.apply(op);
        }
        let unsynced = medium.files.values().any(|file| !file.unsynced.is_empty())
            || medium.folders.values().any(|folder| !folder.unsynced.is_empty());
        assert!(!unsynced, "an image has nothing unsynced");
        Self(medium)
    }

    /// Every file's path from the root, and its bytes.
    pub(crate) fn files(&self) -> BTreeMap<String, &[u8]> {
        let mut files = BTreeMap::new();
        self.collect(ROOT, "", &mut files);
        files
    }

    fn collect<'a>(&'a self, id: FolderId, prefix: &str, files: &mut BTreeMap<String, &'a [u8]>) {
        for (name, entry) in self.0.names(id) {
            match entry {
                Entry::File(file) => {
                    files.insert(format!("{prefix}{name}"), self.0.bytes(file));
                }
                Entry::Folder(inner) => self.collect(inner, &format!("{prefix}{name}/"), files),
            }
        }
    }

    fn describe(&self, folder: FolderId, ops: &mut Vec<Op>) {
        for (name, entry) in self.0.names(folder) {
            let name = name.to_owned();
            match entry {
                Entry::Folder(created) => {
                    ops.push(Op::CreateFolder { folder, name, created });
                    self.describe(created, ops);
                }
                Entry::File(file) => {
                    ops.push(Op::CreateFile { folder, name, file });
                    let bytes = self.0.bytes(file).into();
                    ops.push(Op::Write { file, offset: 0, bytes });
                    ops.push(Op::SyncFile { file });
                }
            }
        }
        ops.push(Op::SyncFolder { folder });
    }
}

impl File {
    fn change(&mut self, change: FileChange) {
        change.apply(Arc::make_mut(&mut self.cached));
        self.unsynced.push(change);
    }

    fn fail_sync(&mut self, seed: u64) {
        let random = &mut ChaCha20Rng::seed_from_u64(seed);
        let (durable, read_back) = self.lose(random, true);
        self.durable = Arc::new(durable);
        self.unsynced.clear();
        // Under memory pressure the clean pages are dropped, and reads see what the disk has.
        if random.random_bool(0.5) {
            self.cached = Arc::new(read_back);
        }
    }

    /// The bytes that are on the disk after a power loss.
    fn survivors(&self, random: &mut ChaCha20Rng, powersafe_overwrite: bool) -> Arc<Vec<u8>> {
        if self.unsynced.is_empty() {
            return self.durable.clone();
        }
        Arc::new(self.lose(random, powersafe_overwrite).0)
    }

    /// What of the unsynced changes reached the disk: as a machine finds it that starts anew, and
    /// as one reads it that runs on, which does not forget the file's length.
    fn lose(&self, random: &mut ChaCha20Rng, powersafe_overwrite: bool) -> (Vec<u8>, Vec<u8>) {
        let mut luck = Luck::draw(random, self.unsynced.iter().map(FileChange::pieces).sum());
        // Noise is rare, lest it drown the subtler losses.
        let noise = if random.random_bool(0.25) { 0.1 } else { 0.0 };
        let mut durable = self.durable.as_ref().clone();
        let mut running = durable.clone();
        for change in &self.unsynced {
            match change {
                FileChange::SetLength { length } => {
                    running.resize(*length, 0);
                    if luck.holds(random) {
                        durable.resize(*length, 0);
                    }
                }
                FileChange::Write { offset, bytes } => {
                    let end = offset + bytes.len();
                    grow(&mut running, end);
                    if luck.holds(random) {
                        grow(&mut durable, end);
                    }
                    for (start, sector) in sectors(*offset, bytes) {
                        if luck.holds(random) {
                            put(&mut running, start, sector);
                            put(&mut durable, start, sector);
                        }
                        if noise > 0.0 && random.random_bool(noise) {
                            let noise =
                                Noise::draw(start, sector.len(), powersafe_overwrite, random);
                            noise.put(&mut running);
                            noise.put(&mut durable);
                        }
                    }
                }
            }
        }
        (durable, running)
    }
}

impl FileChange {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => put(file, *offset, bytes),
            Self::SetLength { length } => file.resize(*length, 0),
        }
    }

    /// How many things about this change can survive or not: its length, its sectors.
    fn pieces(&self) -> usize {
        match self {
            Self::Write { offset, bytes } => 1 + sectors(*offset, bytes).count(),
            Self::SetLength { .. } => 1,
        }
    }
}

impl Folder {
    fn change(&mut self, change: FolderChange) {
        change.apply(&mut self.cached);
        self.unsynced.push(change);
    }

    /// The names that are on the disk after a power loss.
    fn survivors(&self, random: &mut ChaCha20Rng) -> BTreeMap<String, Entry> {
        // They are few, and it is a later one without an earlier one that does harm.
        let mut luck = match random.random_bool(0.5) {
            true => Luck::Each(0.5),
            false => Luck::draw(random, self.unsynced.len()),
        };
        let drawn: Vec<bool> = self.unsynced.iter().map(|_| luck.holds(random)).collect();
        // A change that holds takes the earlier ones about the same entry with it: else a file
        // renamed twice could be found under its first and its last name.
        let mut about_held = BTreeSet::new();
        let mut held: Vec<&FolderChange> = Vec::new();
        for (change, drawn) in self.unsynced.iter().zip(drawn).rev() {
            if drawn || about_held.contains(&change.about) {
                about_held.insert(change.about);
                held.push(change);
            }
        }
        let mut durable = self.durable.clone();
        for change in held.into_iter().rev() {
            change.apply(&mut durable);
        }
        durable
    }
}

impl FolderChange {
    fn apply(&self, names: &mut BTreeMap<String, Entry>) {
        for (name, entry) in &self.names {
            match entry {
                Some(entry) => drop(names.insert(name.clone(), *entry)),
                None => drop(names.remove(name)),
            }
        }
    }
}

/// Which unsynced pieces survive. Independent coins alone would hardly ever draw the telling
/// cases: all, none, and all up to some moment.
enum Luck {
    Each(f64),
    First(usize),
}

impl Luck {
    fn draw(random: &mut ChaCha20Rng, pieces: usize) -> Self {
        match random.random_range(0..5) {
            0 => Self::Each(0.0),
            1 => Self::Each(1.0),
            2 => Self::Each(0.5),
            3 => Self::Each(random.random()),
            _ => Self::First(random.random_range(0..=pieces)),
        }
    }

    fn holds(&mut self, random: &mut ChaCha20Rng) -> bool {
        match self {
            Self::Each(chance) => random.random_bool(*chance),
            Self::First(left) => {
                let holds = *left > 0;
                *left = left.saturating_sub(1);
                holds
            }
        }
    }
}

/// Splits a write where it crosses the borders of sectors.
fn sectors(offset: usize, bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let (mut start, mut rest) = (offset, bytes);
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (sector, after) = rest.split_at(rest.len().min(SECTOR_BYTES - start % SECTOR_BYTES));
        let at = start;
        (start, rest) = (start + sector.len(), after);
        Some((at, sector))
    })
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    grow(file, end);
    file[offset..end].copy_from_slice(bytes);
}

fn grow(file: &mut Vec<u8>, length: usize) {
    if file.len() < length {
        file.resize(length, 0);
    }
}

/// What a sector becomes when the power fails while it is written.
struct Noise {
    start: usize,
    bytes: Vec<u8>,
}

impl Noise {
    fn draw(
        start: usize,
        length: usize,
        powersafe_overwrite: bool,
        random: &mut ChaCha20Rng,
    ) -> Self {
        let (start, length) = match powersafe_overwrite {
            true => (start, length),
            false => (start - start % SECTOR_BYTES, SECTOR_BYTES),
        };
        let mut bytes = vec![0; length];
        random.fill_bytes(&mut bytes);
        Self { start, bytes }
    }

    /// The file's length is not a sector's business.
    fn put(&self, file: &mut [u8]) {
        let end = file.len().min(self.start + self.bytes.len());
        if self.start < end {
            file[self.start..end].copy_from_slice(&self.bytes[..end - self.start]);
        }
    }
}
