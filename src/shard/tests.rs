use std::collections::BTreeSet;
use std::path::PathBuf;

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;

const LAST: i64 = 1000;

/// A shard of 1..=1000 in ascending order, so that a test can tell the rows apart.
fn build_shard(folder: &Path) -> PathBuf {
    let path = folder.join("int_shard_0.db");
    let batch = Batch {
        id: BatchId(1),
        shard: ShardIndex(0),
        generation: Generation(1),
        count: LAST as u64,
    };
    let label = Label::new(Uuid::nil(), &PoolName::new("int").unwrap(), 0, batch);
    let values: Vec<_> = (1..=LAST).map(Value).collect();
    let space = Space::new("1", &LAST.to_string(), 0).unwrap();
    build(&path, &label, &space, &values, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(read_label(&path).unwrap(), label);
    path
}

fn open(path: &Path) -> (Connection, Shard) {
    let mut connection = Found::new(path).secure().unwrap().open().unwrap();
    let shard = Shard::open(path, &mut connection).unwrap();
    (connection.into_connection(), shard)
}

fn rng() -> ChaCha20Rng {
    ChaCha20Rng::seed_from_u64(7)
}

#[test]
fn leases_of_any_size_hand_out_each_row_once() {
    for size in [1, 3, 256, 300, 5000] {
        let folder = tempfile::tempdir().unwrap();
        let (mut connection, mut shard) = open(&build_shard(folder.path()));
        let mut rng = rng();
        let mut seen = BTreeSet::new();
        while shard.left() > 0 {
            let rows = shard.lease(&mut connection, size, Some(0), &mut rng).unwrap();
            assert_eq!(rows.len(), size.min(LAST as usize - seen.len()));
            assert!(rows.iter().all(|row| seen.insert(row.value.0)), "leases of {size}");
        }
        assert!(seen.into_iter().eq(1..=LAST));
        assert_eq!(shard.lease(&mut connection, size, Some(0), &mut rng).unwrap(), []);
    }
}

#[test]
fn rows_given_back_come_again_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    let mut rng = rng();
    let mut rows = shard.lease(&mut connection, 600, Some(0), &mut rng).unwrap();
    let unserved = rows.split_off(450);
    shard.give_back(&mut connection, unserved).unwrap();
    connection.close().unwrap();

    assert_eq!(Left::open(&path).unwrap().seen.open_rows, 0, "nothing was burned");
    let (mut connection, mut shard) = open(&path);
    assert_eq!(shard.left(), 550);
    let again = shard.lease(&mut connection, 5000, Some(0), &mut rng).unwrap();
    let all: BTreeSet<_> = rows.iter().chain(&again).map(|row| row.value.0).collect();
    assert_eq!((again.len(), all.len()), (550, 1000));
}

#[test]
fn a_crash_burns_what_was_leased_and_says_how_much() {
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    let first = shard.lease(&mut connection, 100, Some(0), &mut rng()).unwrap();
    let second = shard.lease(&mut connection, 100, Some(40), &mut rng()).unwrap();
    // A crash: the log stays. Otherwise SQLite removes it when the last connection closes.
    let crashed = folder.path().join("crashed.db");
    std::fs::copy(&path, &crashed).unwrap();
    std::fs::copy(sqlite::wal_of(&path), sqlite::wal_of(&crashed)).unwrap();

    // A start that ends before it takes the file over changes nothing.
    for _ in 0..2 {
        let seen = Left::open(&crashed).unwrap().seen;
        assert_eq!((seen.label.rows, seen.open_rows, seen.in_use), (1000, 140, true));
        assert_eq!((seen.problem(), seen.unused), (None, 800));
    }
    drop(Left::open(&crashed).unwrap().take_over(Token(7)).unwrap());
    let seen = Left::open(&crashed).unwrap().seen;
    assert_eq!((seen.token, seen.open_rows, seen.in_use), (Token(7), 0, false));
    let (mut connection, mut shard) = open(&crashed);
    let rest = shard.lease(&mut connection, 1000, Some(0), &mut rng()).unwrap();
    let all: BTreeSet<_> =
        first.iter().chain(&second).chain(&rest).map(|row| row.value.0).collect();
    assert_eq!((rest.len(), all.len()), (800, 1000));
}

#[test]
fn a_file_in_use_without_its_log_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    shard.lease(&mut connection, 100, Some(0), &mut rng()).unwrap();
    let crashed = folder.path().join("crashed.db");
    std::fs::copy(&path, &crashed).unwrap();
    let seen = Left::open(&crashed).unwrap().seen;
    assert!(seen.problem().is_some(), "{seen:?}");
}

/// Story: SQLite skips a write that changes nothing, so a log that should have had space for 64 pages had one
/// page.
#[test]
fn the_log_of_an_open_shard_has_its_space_on_the_disk() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    let reserved = log_bytes(std::fs::metadata(&path).unwrap().len() / PAGE_BYTES);
    for _ in 0..3 {
        let log = std::fs::metadata(sqlite::wal_of(&path)).unwrap();
        assert!(log.len() >= reserved, "{} bytes", log.len());
        assert!(log.blocks() * 512 >= reserved, "{} blocks", log.blocks());
        shard.lease(&mut connection, 100, Some(0), &mut rng()).unwrap();
        sqlite::checkpoint(&connection, Checkpoint::Restart).unwrap();
    }
}

#[test]
fn a_value_or_mark_that_changed_on_the_disk_is_found() {
    let check = |damage: &str| {
        let folder = tempfile::tempdir().unwrap();
        let path = build_shard(folder.path());
        let (mut connection, mut shard) = open(&path);
        shard.lease(&mut connection, 10, Some(0), &mut rng()).unwrap();
        shard.give_back(&mut connection, Vec::new()).unwrap();
        connection.execute(damage, []).unwrap();
        connection.close().unwrap();
        let (mut connection, mut shard) = open(&path);
        let error = shard.lease(&mut connection, 1000, Some(0), &mut rng()).unwrap_err();
        assert!(matches!(error, ShardError::Damaged(_)), "{damage}: {error}");
    };
    check("UPDATE numbers SET value = value + 1 WHERE id = 700");
    check("UPDATE numbers SET used = 0 WHERE used = 1");
    check("UPDATE numbers SET used = 1 WHERE id = (SELECT min(id) FROM numbers WHERE used = 0)");
    check("DELETE FROM numbers WHERE id = 700");
    check("UPDATE numbers SET value = 702 - (id - 700) WHERE id IN (700, 701)");
}

/// Two workers on one file must not hand out the same row.
#[test]
fn a_row_that_another_marked_is_not_handed_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    shard.lease(&mut connection, 1, Some(0), &mut rng()).unwrap();
    connection.execute("UPDATE numbers SET used = 1", []).unwrap();
    let error = shard.lease(&mut connection, 10, Some(0), &mut rng()).unwrap_err();
    assert!(matches!(error, ShardError::Damaged(_)), "{error}");
}

/// A row that is imported is not leased, whether its block was loaded before or not, and does not come back with
/// the rows that are given back.
#[test]
fn an_imported_row_is_never_leased() {
    let folder = tempfile::tempdir().unwrap();
    let path = build_shard(folder.path());
    let (mut connection, mut shard) = open(&path);
    let mut rng = rng();
    let leased = shard.lease(&mut connection, 300, Some(0), &mut rng).unwrap();
    let values: Vec<_> = (1..=LAST).step_by(2).map(Value).collect();
    let Sought { unused, used, imported } = seek(&connection, &values).unwrap();
    assert_eq!((unused.len() + used.len(), imported.len()), (500, 0));
    let withdrawn: BTreeSet<Row> = used.iter().copied().take(20).collect();
    let mut rows = [unused.clone(), used.clone()].concat();
    rows.sort_unstable();
    let marked = shard.import(&mut connection, &rows, &withdrawn).unwrap();
    assert_eq!(marked.len(), unused.len() + 20);
    let again = shard.import(&mut connection, &rows, &withdrawn).unwrap();
    assert_eq!(again.len(), marked.len(), "what is marked stays marked");
    let rest = shard.lease(&mut connection, 1000, Some(0), &mut rng).unwrap();
    assert_eq!(rest.len() as u64, 700 - unused.len() as u64);
    assert!(rest.iter().all(|row| row.value.0 % 2 == 0));
    let back: Vec<_> = leased.iter().filter(|row| row.value.0 % 2 == 0).copied().collect();
    let count = back.len() as u64;
    shard.give_back(&mut connection, back).unwrap();
    connection.close().unwrap();
    assert_eq!(unused_rows(&path).unwrap(), count);
    let connection = sqlite::open_to_look(&path).unwrap();
    let mut problems = Vec::new();
    let report = &mut |kind: &'static str, what: String| problems.push(format!("{kind}: {what}"));
    let audit = audit(&connection, |value| value.0.unsigned_abs(), report).unwrap();
    assert_eq!((problems, audit.imported.count), (Vec::<String>::new(), marked.len() as u64));
    assert_eq!(
        seek(&connection, &[Value(LAST + 1)]).unwrap_err().to_string(),
        "it has 0 of 1 numbers of its batch"
    );
}

#[test]
fn a_view_shows_numbers_as_callers_see_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("float_shard_0.db");
    let batch = Batch { id: BatchId(1), shard: ShardIndex(0), generation: Generation(1), count: 3 };
    let label = Label::new(Uuid::nil(), &PoolName::new("float").unwrap(), 6, batch);
    let values = [839_347_209, 5_100_000, -1].map(Value);
    let space = Space::new("-1", "900", 6).unwrap();
    build(&path, &label, &space, &values, &mut |_| ControlFlow::Continue(())).unwrap();
    let connection = sqlite::open_to_read(&path).unwrap();
    let mut select = connection.prepare("SELECT number FROM pool ORDER BY id").unwrap();
    let numbers: Result<Vec<String>, _> = select.query_map([], |row| row.get(0)).unwrap().collect();
    assert_eq!(numbers.unwrap(), ["839.347209", "5.100000", "-0.000001"]);
}
