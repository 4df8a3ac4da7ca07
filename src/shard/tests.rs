use std::collections::BTreeSet;
use std::path::PathBuf;

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;

const LAST: i64 = 1000;

/// A shard of 1..=1000, in that order so that a test sees which row is which.
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
    build(&path, &label, &values, &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(read_label(&path).unwrap(), label);
    path
}

fn open(path: &Path) -> (Connection, Shard) {
    let mut connection = sqlite::open(path).unwrap();
    let shard = Shard::open(&mut connection).unwrap();
    (connection, shard)
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

    assert_eq!(recover(&path).unwrap().1, 0, "nothing was burned");
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
    // A crash: the log stays. SQLite removes it when the last connection closes.
    let crashed = folder.path().join("crashed.db");
    std::fs::copy(&path, &crashed).unwrap();
    std::fs::copy(sqlite::wal_of(&path), sqlite::wal_of(&crashed)).unwrap();

    // A start that gets no further than that changes nothing.
    for _ in 0..2 {
        let (label, burned) = recover(&crashed).unwrap();
        assert_eq!((label.rows, burned), (1000, 140));
    }
    end_use(&crashed).unwrap();
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
    for _ in 0..2 {
        let error = recover(&crashed).unwrap_err();
        assert!(matches!(error, ShardError::Damaged(_)), "{error}");
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

/// Two workers on one file would each think that a row is theirs.
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

#[test]
fn a_view_shows_numbers_as_callers_see_them() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("float_shard_0.db");
    let batch = Batch { id: BatchId(1), shard: ShardIndex(0), generation: Generation(1), count: 3 };
    let label = Label::new(Uuid::nil(), &PoolName::new("float").unwrap(), 6, batch);
    let values = [839_347_209, 5_100_000, -1].map(Value);
    build(&path, &label, &values, &mut |_| ControlFlow::Continue(())).unwrap();
    let connection = sqlite::open(&path).unwrap();
    let mut select = connection.prepare("SELECT number FROM pool ORDER BY id").unwrap();
    let numbers: Result<Vec<String>, _> = select.query_map([], |row| row.get(0)).unwrap().collect();
    assert_eq!(numbers.unwrap(), ["839.347209", "5.100000", "-0.000001"]);
}
