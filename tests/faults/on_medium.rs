//! Tests of the simulated disk itself: data that may be lost is sometimes lost, and all other data never is.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tombola::internals::files::{self, FileError, LockError};

use crate::disk::{Disk, Fault, Plan, Shared};
use crate::medium::{Image, PAGE_BYTES, SECTOR_BYTES};
use crate::recording::Recording;

/// Returns all outcomes of many cuts at this moment, as text.
fn outcomes(disk: &Disk, describe: impl Fn(&Image) -> String) -> BTreeSet<String> {
    (0..2_000).map(|seed| describe(&disk.after_cut(seed))).collect()
}

fn names(image: &Image) -> String {
    image.files().into_keys().collect::<Vec<_>>().join(" ")
}

/// Describes each sector of `a` by its first byte: `-` for zero, `~` for noise.
fn sectors_of_a(image: &Image) -> String {
    let files = image.files();
    let Some(bytes) = files.get("a") else {
        return "gone".to_owned();
    };
    let letter = |sector: &[u8]| match sector {
        [first, ..] if sector.iter().any(|byte| byte != first) => '~',
        [0, ..] => '-',
        [first, ..] => char::from(*first),
        [] => unreachable!("no chunk is empty"),
    };
    bytes.chunks(SECTOR_BYTES).map(letter).collect()
}

fn set<const N: usize>(expected: [&str; N]) -> BTreeSet<String> {
    expected.map(str::to_owned).into()
}

/// Returns a disk whose root has these files, each containing its name, all synced.
fn disk_with(files: &[&str]) -> (Disk, Arc<Shared>) {
    let disk = Disk::new();
    let shared = disk.shared.clone();
    for name in files {
        let file = shared.create(name).unwrap();
        shared.write(file, name, 0, name.as_bytes()).unwrap();
        shared.sync(file, name).unwrap();
    }
    shared.sync_folder("").unwrap();
    (disk, shared)
}

#[test]
fn a_synced_file_without_a_synced_folder_may_vanish() {
    let (disk, shared) = disk_with(&[]);
    let file = shared.create("a").unwrap();
    shared.write(file, "a", 0, b"bytes").unwrap();
    shared.sync(file, "a").unwrap();
    let describe = |image: &Image| format!("{:?}", image.files().get("a"));
    let kept = format!("{:?}", Some(b"bytes".as_slice()));
    assert_eq!(outcomes(&disk, describe), set(["None", &kept]));

    shared.sync_folder("").unwrap();
    assert_eq!(outcomes(&disk, describe), set([&kept]));
}

#[test]
fn a_synced_folder_does_not_save_the_bytes() {
    let (disk, shared) = disk_with(&[]);
    let file = shared.create("a").unwrap();
    shared.write(file, "a", 0, &[b'1'; SECTOR_BYTES]).unwrap();
    shared.sync_folder("").unwrap();
    assert_eq!(outcomes(&disk, sectors_of_a), set(["", "-", "1", "~"]));
}

#[test]
fn a_rename_is_atomic_and_lost_until_the_folder_is_synced() {
    let (disk, shared) = disk_with(&["new", "old"]);
    let describe = |image: &Image| {
        let files = image.files();
        format!("{} {:?}", names(image), files["old"])
    };
    let before = format!("new old {:?}", b"old");
    let after = format!("old {:?}", b"new");
    shared.rename("new", "old").unwrap();
    assert_eq!(outcomes(&disk, describe), set([&before, &after]));
    shared.sync_folder("").unwrap();
    assert_eq!(outcomes(&disk, describe), set([&after]));
}

#[test]
fn each_name_ends_in_one_of_its_states_and_no_file_has_two_names() {
    let (disk, shared) = disk_with(&["a", "z"]);
    shared.rename("a", "b").unwrap();
    shared.rename("b", "c").unwrap();
    shared.remove("z").unwrap();
    let expected = ["a z", "b z", "c z", "a", "b", "c"];
    assert_eq!(outcomes(&disk, names), set(expected));
}

#[test]
fn unsynced_sectors_survive_each_or_not_and_synced_ones_always() {
    let (disk, shared) = disk_with(&[]);
    let file = shared.create("a").unwrap();
    shared.write(file, "a", 0, &[b'1'; 3 * SECTOR_BYTES]).unwrap();
    shared.sync(file, "a").unwrap();
    shared.sync_folder("").unwrap();
    shared.write(file, "a", SECTOR_BYTES, &[b'2'; 2 * SECTOR_BYTES]).unwrap();
    let expected = ["111", "112", "121", "122", "11~", "12~", "1~1", "1~2", "1~~"];
    assert_eq!(outcomes(&disk, sectors_of_a), set(expected));
}

#[test]
fn truncations_and_extensions_survive_each_or_not() {
    let (disk, shared) = disk_with(&[]);
    let file = shared.create("a").unwrap();
    shared.write(file, "a", 0, &[b'1'; 2 * SECTOR_BYTES]).unwrap();
    shared.sync(file, "a").unwrap();
    shared.sync_folder("").unwrap();
    shared.set_length(file, "a", 0).unwrap();
    assert_eq!(outcomes(&disk, sectors_of_a), set(["", "11"]));
    shared.set_length(file, "a", 3 * SECTOR_BYTES).unwrap();
    assert_eq!(outcomes(&disk, sectors_of_a), set(["", "11", "---", "11-"]));
}

/// A kernel writes a mapped page whenever it likes, independently of other pages.
#[test]
fn a_mapped_page_ends_in_any_of_its_versions() {
    let (disk, shared) = disk_with(&[]);
    let file = shared.create("a").unwrap();
    shared.set_length(file, "a", 2 * PAGE_BYTES).unwrap();
    shared.sync(file, "a").unwrap();
    shared.sync_folder("").unwrap();
    for pages in [b"12", b"13", b"43"] {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| [*page; PAGE_BYTES]).collect();
        shared.change_mapped(file, 0, &bytes);
    }
    let first_of_pages = |image: &Image| {
        let sectors = sectors_of_a(image);
        let (first, second) = sectors.split_at(PAGE_BYTES / SECTOR_BYTES);
        assert_eq!(first, first[..1].repeat(first.len()), "a page must be written as a whole");
        format!("{}{}", &first[..1], &second[..1])
    };
    let expected = ["--", "-2", "-3", "1-", "12", "13", "4-", "42", "43"];
    assert_eq!(outcomes(&disk, first_of_pages), set(expected));
    shared.sync(file, "a").unwrap();
    assert_eq!(outcomes(&disk, first_of_pages), set(["43"]));
}

#[test]
fn a_disk_takes_what_fits_and_denies_the_rest() {
    let (disk, shared) = disk_with(&["a"]);
    disk.set_capacity(3 * PAGE_BYTES);
    let file = shared.open("a").unwrap();
    let error = shared.write(file, "a", 0, &[b'1'; 4 * PAGE_BYTES]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(shared.length(file).unwrap(), 3 * PAGE_BYTES);
    shared.write(file, "a", 0, b"2").expect("no space is needed to overwrite");
    assert_eq!((disk.used_bytes(), disk.denied()), (3 * PAGE_BYTES, 1));
    shared.set_length(file, "a", 0).unwrap();
    let file = shared.create("b").unwrap();
    shared.write(file, "b", 0, &[b'1'; 3 * PAGE_BYTES]).expect("freed space can be used again");
    shared.remove("b").unwrap();
    assert_eq!(disk.used_bytes(), 0);
}

#[test]
fn after_a_failed_sync_a_good_one_does_not_bring_the_bytes_back() {
    let mut seen = BTreeSet::new();
    for seed in 0..200 {
        let (disk, shared) = disk_with(&["a"]);
        let file = shared.open("a").unwrap();
        shared.write(file, "a", 0, &[b'2'; SECTOR_BYTES]).unwrap();
        disk.fail(Plan { seed, ..Plan::once(Fault::FailedSync, 0) });
        let error = shared.sync(file, "a").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5));
        shared.sync(file, "a").unwrap();
        let mut cached = [0];
        shared.read(file, "a", 0, &mut cached).unwrap();
        let durable = disk.cut(seed).files()["a"][0];
        seen.insert((char::from(cached[0]), char::from(durable)));
    }
    // In the cache and on the disk, only in the cache, and lost from both.
    for state in [('2', '2'), ('2', 'a'), ('a', 'a')] {
        assert!(seen.contains(&state), "never seen: {state:?}");
    }
}

#[test]
fn the_same_seed_leaves_the_same_disk_and_a_recording_survives_its_file() {
    let (disk, shared) = disk_with(&["a", "b"]);
    shared.create_folder("backup").unwrap();
    let file = shared.create("backup/c").unwrap();
    shared.write(file, "backup/c", 700, &[7; 2000]).unwrap();
    shared.set_length(file, "backup/c", 1500).unwrap();
    disk.fail(Plan::once(Fault::FailedSync, 0));
    assert!(shared.sync(file, "backup/c").is_err());
    disk.note("promised \\ \"ü\"\n");
    shared.rename("a", "b").unwrap();
    shared.remove("b").unwrap();
    let recording = disk.recording();
    let reread = Recording::from_text(&recording.to_text()).unwrap();
    assert_eq!(recording.ops(), reread.ops());
    let end = recording.len();
    assert_eq!(reread.notes(end), ["promised \\ \"ü\"\n"]);
    assert!(reread.notes(end - 3).is_empty());
    let device = shared.device;
    for seed in 0..100 {
        let image = disk.cut(seed);
        for other in [&recording, &reread] {
            assert_eq!(image.files(), other.cut(end, seed, device).files());
        }
        // The same holds for a recording that begins with what was left.
        let next = Recording::new(image.clone());
        let next = Recording::from_text(&next.to_text()).unwrap();
        assert_eq!(image.files(), next.cut(0, seed, device).files());
    }
}

#[test]
fn a_killed_process_loses_nothing_but_what_was_unsynced_stays_so() {
    let (disk, shared) = disk_with(&["a"]);
    shared.rename("a", "b").unwrap();
    let next = disk.kill();
    assert_eq!(next.shared.list("").unwrap(), ["b"]);
    assert!(shared.list("").is_err(), "the dead process has no disk");
    assert_eq!(outcomes(&next, names), set(["a", "b"]));
}

#[test]
fn a_disk_without_power_fails_everything_and_takes_no_promises() {
    let (disk, shared) = disk_with(&["a"]);
    let file = shared.open("a").unwrap();
    disk.power_off();
    disk.note("too late");
    assert!(shared.write(file, "a", 0, b"x").is_err());
    assert!(shared.sync(file, "a").is_err());
    assert!(shared.open("a").is_err());
    assert!(shared.find("a").is_err());
    assert!(disk.recording().notes(usize::MAX).is_empty());
}

#[test]
fn faults_hit_what_they_name_and_nothing_else() {
    let (disk, shared) = disk_with(&["a", "b"]);
    let (a, b) = (shared.open("a").unwrap(), shared.open("b").unwrap());

    disk.fail(Plan::from_then_on(Fault::NoSpace, 1));
    shared.write(a, "a", 0, b"xy").unwrap();
    shared.write(a, "a", 0, b"x").unwrap();
    assert_eq!(disk.fired(), 0);
    for _ in 0..2 {
        let error = shared.write(a, "a", 0, b"xyz").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(shared.create("c").is_err());
    }
    shared.write(a, "a", 0, b"y").expect("no space is needed to overwrite");
    shared.sync(a, "a").unwrap();
    assert_eq!(disk.fired(), 4);
    disk.heal();
    shared.write(a, "a", 0, b"xyz").unwrap();

    disk.fail(Plan::once(Fault::ShortWrite, 0).only("b"));
    shared.write(a, "a", 0, b"12345678").unwrap();
    assert!(shared.write(b, "b", 0, b"12345678").is_err());
    assert_eq!(shared.length(b).unwrap(), 4);
    shared.write(b, "b", 0, b"12345678").unwrap();
    assert_eq!(disk.fired(), 1);

    disk.fail(Plan::from_then_on(Fault::Io, 0));
    let before = disk.operations();
    assert!(shared.open("a").is_err());
    assert!(shared.read(a, "a", 0, &mut [0]).is_err());
    assert!(shared.rename("a", "c").is_err());
    assert!(shared.remove("a").is_err());
    assert!(shared.list("").is_err());
    shared.sync(a, "a").expect("syncs have a fault of their own");
    shared.sync_folder("").expect("syncs have a fault of their own");
    assert_eq!((disk.fired(), disk.operations() - before), (5, 7));

    disk.fail(Plan::once(Fault::FailedFolderSync, 0));
    shared.sync(a, "a").unwrap();
    assert!(shared.sync_folder("").is_err());
    shared.sync_folder("").unwrap();

    // For each fault, its error code and the kinds of operations that it hits.
    let faults = [
        (Fault::Quota, 122, "grow create"),
        (Fault::FilesOfProcess, 24, "open create list"),
        (Fault::FilesOfSystem, 23, "open create list"),
        (Fault::NoMemory, 12, "look open read overwrite grow create map list rename remove"),
        (Fault::Interrupted, 4, "rename remove sync sync-folder"),
    ];
    for (fault, errno, expected) in faults {
        let (disk, shared) = disk_with(&["a", "b"]);
        let a = shared.open("a").unwrap();
        disk.fail(Plan::from_then_on(fault, 0));
        let operations: [(&str, &dyn Fn() -> io::Result<()>); 12] = [
            ("look", &|| shared.look("a").map(drop)),
            ("open", &|| shared.open("a").map(drop)),
            ("read", &|| shared.read(a, "a", 0, &mut [0]).map(drop)),
            ("overwrite", &|| shared.write(a, "a", 0, b"x")),
            ("grow", &|| shared.write(a, "a", 0, b"xyz")),
            ("create", &|| shared.create("c").map(drop)),
            ("map", &|| shared.map("a")),
            ("list", &|| shared.list("").map(drop)),
            ("rename", &|| shared.rename("b", "d")),
            ("remove", &|| shared.remove("a")),
            ("sync", &|| shared.sync(a, "a")),
            ("sync-folder", &|| shared.sync_folder("")),
        ];
        let failed = operations.iter().filter_map(|(name, operation)| {
            let error = operation().err()?;
            assert_eq!(error.raw_os_error(), Some(errno), "{fault:?}: {name}");
            Some(*name)
        });
        assert_eq!(failed.collect::<Vec<_>>().join(" "), expected, "{fault:?}");
    }
}

/// Runs the same steps in any folder, and returns their results.
fn use_folder(folder: &Path) -> Vec<String> {
    let mut seen = Vec::new();
    let mut saw = |what: &str, result: Result<String, FileError>| {
        let result = result.map_err(|error| error.source.kind());
        seen.push(format!("{what}: {result:?}"));
    };
    let done = |result: Result<(), FileError>| result.map(|()| String::new());
    let (a, b) = (folder.join("a"), folder.join("b"));
    saw("list what is not there", files::list(folder).map(|names| names.join(" ")));
    let lock = files::lock(folder, Duration::ZERO).unwrap();
    assert!(matches!(files::lock(folder, Duration::ZERO), Err(LockError::Held { .. })));
    drop(lock);
    drop(files::lock(folder, Duration::ZERO).unwrap());
    saw("create", done(files::create(&a)));
    saw("create what is there", done(files::create(&a)));
    saw("rename", done(files::rename(&a, &b)));
    saw("rename what is not there", done(files::rename(&a, &b)));
    saw("sync a file", done(files::sync_file(&b)));
    saw("sync a file that is not there", done(files::sync_file(&a)));
    saw("list", files::list(folder).map(|names| names.join(" ")));
    saw("length", files::length_bytes(&b).map(|length| format!("{length:?}")));
    saw("length of what is not there", files::length_bytes(&a).map(|length| format!("{length:?}")));
    saw("create another", done(files::create(&a)));
    saw("rename over", done(files::rename(&a, &b)));
    saw("list", files::list(folder).map(|names| names.join(" ")));
    saw("sync", done(files::sync_folder(folder)));
    saw("remove", done(files::remove(&b)));
    saw("remove again", done(files::remove(&b)));
    saw("list", files::list(folder).map(|names| names.join(" ")));
    seen
}

#[test]
fn a_simulated_folder_does_what_a_real_one_does() {
    crate::install();
    let real = tempfile::tempdir().unwrap();
    let disk = Disk::new();
    let name = "deep/shards";
    assert_eq!(use_folder(&real.path().join(name)), use_folder(&disk.path(name)));
}

#[test]
fn what_the_product_does_not_sync_may_be_undone() {
    crate::install();
    let disk = Disk::new();
    let file = disk.path("b");
    files::create(&file).unwrap();
    files::sync_folder(disk.root()).unwrap();
    drop(files::lock(disk.root(), Duration::ZERO).unwrap());
    files::remove(&file).unwrap();
    assert_eq!(outcomes(&disk, names), set(["b", "LOCK b", "LOCK", ""]));
}

#[test]
fn a_lock_dies_with_its_machine() {
    crate::install();
    let disk = Disk::new();
    let _lock = files::lock(disk.root(), Duration::ZERO).unwrap();
    for next in [Disk::boot(&disk.after_cut(1)), disk.kill()] {
        files::lock(next.root(), Duration::ZERO).unwrap();
    }
}

#[test]
fn a_removed_simulated_disk_is_not_the_real_disk() {
    crate::install();
    let path = Disk::new().path("a");
    assert_eq!(files::create(&path).unwrap_err().source.raw_os_error(), Some(5));
}
