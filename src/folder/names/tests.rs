//! [`survey`] recognises the names that [`PoolPaths`] creates.

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;

use super::*;

/// Pool names made of parts of file names, and any others.
fn pool_name() -> impl Strategy<Value = PoolName> {
    let words = [
        "shard",
        "_shard",
        "shard_",
        "used_numbers",
        "random_numbers",
        "_",
        "0",
        "17",
        "int",
        "db",
    ];
    let of_words = proptest::collection::vec(proptest::sample::select(words.to_vec()), 1..5);
    let text = prop_oneof![of_words.prop_map(|words| words.concat()), "[a-z][a-z0-9_]{0,31}"];
    text.prop_filter_map("not allowed as a name", |text| PoolName::new(&text))
}

proptest! {
    #[test]
    fn every_file_of_every_pool_is_found_as_what_it_is(
        pools in btree_map(pool_name(), btree_set(any::<u16>().prop_map(ShardIndex), 0..4), 1..6),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut files = BTreeSet::new();
        for (pool, shards) in &pools {
            let paths = PoolPaths::new(folder.path(), pool);
            let mut written = vec![paths.ledger()];
            for &shard in shards {
                written.extend([paths.live(shard), paths.standby(shard), paths.unfinished(shard)]);
                // Each of the three is enough to recognise the shard.
                files::create(&written[written.len() - 1 - usize::from(shard.0 % 3)]).unwrap();
            }
            files::create(&written[0]).unwrap();
            for file in written {
                prop_assert!(files.insert(file.clone()), "two files are called {}", file.display());
            }
        }
        let survey = survey(folder.path()).unwrap();
        prop_assert_eq!(survey.pools, pools);
        prop_assert_eq!((survey.store, survey.set_aside, survey.others), (None, vec![], vec![]));
    }
}

#[test]
fn what_is_no_file_of_a_pool_is_no_data() {
    let folder = tempfile::tempdir().unwrap();
    let create = |name: &str| files::create(&folder.path().join(name)).unwrap();
    let others = [
        "int_shard_+7.db",
        "int_shard_007.db",
        "int_shard_65536.db",
        "int_shard_7.db.old",
        "int_shard_x.db",
        "notes.txt",
        "used_numbers_int.db.old",
    ];
    let ours = [
        "LOCK",
        "README.md",
        "fleet.json",
        "fleet.json.tmp",
        "int_shard_7.db-wal",
        "int_shard_7.db-wal.tmp",
        "random_numbers.db.tmp",
        "receipts.db-wal",
        "receipts.db.copied",
        "receipts.db.tmp",
        "used_numbers.json.tmp",
        "used_numbers_int.db.tmp",
    ];
    others.into_iter().chain(ours).for_each(create);
    create("int_shard_3.db.damaged-1");
    let survey = survey(folder.path()).unwrap();
    assert_eq!(survey.others, others);
    assert_eq!(survey.set_aside, ["int_shard_3.db.damaged-1"]);
    assert_eq!((survey.pools.len(), survey.store, survey.receipts), (0, None, false));
}
