//! The files and folders that are left after a power loss. Pure: knows nothing of paths, errors, locks,
//! clocks or SQLite.
//!
//! **Assumptions about the medium**: the worst that POSIX allows, with these restrictions:
//! - A file sync makes the file's bytes and length durable, but not its name. A folder sync makes the
//!   folder's names durable, but not the bytes of any file.
//! - Unsynced bytes reach the disk in sectors of 512, in any combination and order. A length may reach it
//!   without the bytes, and bytes without the truncation before them.
//! - A sector that is being written may become noise. If the device does not promise powersafe overwrites,
//!   the noise fills the sector; otherwise it is limited to the bytes that were written.
//! - Unsynced creations, removals and renames survive in any combination. A rename is one change, and the
//!   changes to one file keep their order, so that a file never has two names.
//! - The kernel writes a page of a mapped file whenever it likes: the disk has any version of it since the
//!   last sync, independently of the other pages of the file.
//! - Synced data stays. Only data that was being written can be damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

/// The unit that a disk writes entirely or not at all, unless it becomes noise.
pub(crate) const SECTOR_BYTES: usize = 512;

/// The unit in which a kernel writes a mapped file, and in which a file system allocates space.
pub(crate) const PAGE_BYTES: usize = 4096;

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

/// One change of a medium. A list of them, applied to a known start, is a complete history.
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
    /// A program changed a page of a file that it has mapped into memory.
    ChangePage {
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
    /// A sync failed. As on Linux, the unsynced pages then count as clean and are not written again, whether
    /// or not they reached the disk, and the cache may drop them.
    FailSync {
        file: FileId,
        seed: u64,
    },
}

/// Files and folders, each as the programs see it and as it is on the disk.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    files: BTreeMap<FileId, File>,
    folders: BTreeMap<FolderId, Folder>,
    next_id: u32,
}

/// A medium after a power loss: cache and disk are equal, and nothing is unsynced.
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
    Page { offset: usize, bytes: Arc<[u8]> },
    SetLength { length: usize },
}

#[derive(Clone, Debug, Default)]
struct Folder {
    cached: BTreeMap<String, Entry>,
    durable: BTreeMap<String, Entry>,
    unsynced: Vec<FolderChange>,
}

/// A change of the name or, for a rename, of the two names of one entry.
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

    /// Returns the id for the next file or folder.
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

    /// Returns the space taken by the files that have a name.
    pub(crate) fn used_bytes(&self) -> usize {
        let entries = self.folders.values().flat_map(|folder| folder.cached.values());
        let bytes = entries.map(|entry| match entry {
            Entry::File(file) => self.bytes(*file).len().next_multiple_of(PAGE_BYTES),
            Entry::Folder(_) => 0,
        });
        bytes.sum()
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
            Op::ChangePage { file, offset, bytes } => {
                let change = FileChange::Page { offset: *offset, bytes: bytes.clone() };
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

    /// Cuts the power. With `powersafe_overwrite`, noise stays within the bytes that were written.
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
    /// Returns an empty disk.
    pub(crate) fn empty() -> Self {
        Self(Medium::new())
    }

    pub(crate) fn medium(&self) -> &Medium {
        &self.0
    }

    /// Returns a history that leads from an empty disk to this image.
    pub(crate) fn history(&self) -> Vec<Op> {
        let mut ops = Vec::new();
        self.describe(ROOT, &mut ops);
        ops
    }

    /// Returns the image that a history leads to if everything in it survives.
    pub(crate) fn after(history: &[Op]) -> Self {
        let mut medium = Medium::new();
        for op in history {
            medium.apply(op);
        }
        let unsynced = medium.files.values().any(|file| !file.unsynced.is_empty())
            || medium.folders.values().any(|folder| !folder.unsynced.is_empty());
        assert!(!unsynced, "an image must have nothing unsynced");
        Self(medium)
    }

    /// Returns the path of each file from the root, and its bytes.
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
        // Under memory pressure the clean pages are dropped, and reads see what is on the disk.
        if random.random_bool(0.5) {
            self.cached = Arc::new(read_back);
        }
    }

    /// Returns the bytes that are on the disk after a power loss.
    fn survivors(&self, random: &mut ChaCha20Rng, powersafe_overwrite: bool) -> Arc<Vec<u8>> {
        if self.unsynced.is_empty() {
            return self.durable.clone();
        }
        Arc::new(self.lose(random, powersafe_overwrite).0)
    }

    /// Decides which unsynced changes reached the disk. Returns the file as a restarted machine finds it, and
    /// as a machine that keeps running reads it back, which still knows the file's length.
    fn lose(&self, random: &mut ChaCha20Rng, powersafe_overwrite: bool) -> (Vec<u8>, Vec<u8>) {
        let mut luck = Luck::draw(random, self.unsynced.iter().map(FileChange::pieces).sum());
        // Noise is rare, so that subtler losses show too.
        let noise = if random.random_bool(0.25) { 0.1 } else { 0.0 };
        let written_back = self.written_back(random);
        let mut durable = self.durable.as_ref().clone();
        let mut running = durable.clone();
        for (at, change) in self.unsynced.iter().enumerate() {
            match change {
                FileChange::Page { offset, bytes } => {
                    if written_back.get(offset) == Some(&at) {
                        put(&mut running, *offset, bytes);
                        put(&mut durable, *offset, bytes);
                    }
                }
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

    /// Returns which unsynced version of each mapped page was the last to reach the disk, if any, as its
    /// index among the changes. A kernel writes all pages of a file at one moment, or each at its own.
    fn written_back(&self, random: &mut ChaCha20Rng) -> BTreeMap<usize, usize> {
        let changes = self.unsynced.len();
        let moment = random.random_range(0..=changes);
        let together = random.random_bool(0.5);
        let mut moments = BTreeMap::new();
        let mut written = BTreeMap::new();
        for (at, change) in self.unsynced.iter().enumerate() {
            if let FileChange::Page { offset, .. } = change {
                let moment = *moments.entry(*offset).or_insert_with(|| match together {
                    true => moment,
                    false => random.random_range(0..=changes),
                });
                if at < moment {
                    written.insert(*offset, at);
                }
            }
        }
        written
    }
}

impl FileChange {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } | Self::Page { offset, bytes } => {
                put(file, *offset, bytes);
            }
            Self::SetLength { length } => file.resize(*length, 0),
        }
    }

    /// Returns how many parts of this change can survive independently: its length and its sectors.
    fn pieces(&self) -> usize {
        match self {
            Self::Write { offset, bytes } => 1 + sectors(*offset, bytes).count(),
            Self::SetLength { .. } => 1,
            Self::Page { .. } => 0,
        }
    }
}

impl Folder {
    fn change(&mut self, change: FolderChange) {
        change.apply(&mut self.cached);
        self.unsynced.push(change);
    }

    /// Returns the names that are on the disk after a power loss.
    fn survivors(&self, random: &mut ChaCha20Rng) -> BTreeMap<String, Entry> {
        // Name changes are few, and the harmful case is a later one without an earlier one.
        let mut luck = match random.random_bool(0.5) {
            true => Luck::Each(0.5),
            false => Luck::draw(random, self.unsynced.len()),
        };
        let drawn: Vec<bool> = self.unsynced.iter().map(|_| luck.holds(random)).collect();
        // A change that survives takes the earlier ones of the same entry with it. Otherwise, a file renamed
        // twice could have its first and its last name.
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

/// Decides which unsynced pieces survive. Independent coin flips alone would rarely produce the revealing
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

/// Splits a write at sector boundaries.
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

/// The content of a sector if the power fails while it is written.
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

    /// Noise does not change the length of the file.
    fn put(&self, file: &mut [u8]) {
        let end = file.len().min(self.start + self.bytes.len());
        if self.start < end {
            file[self.start..end].copy_from_slice(&self.bytes[..end - self.start]);
        }
    }
}
