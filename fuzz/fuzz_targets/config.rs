//! A user's config.toml is refused with a reason, or gives a configuration with consistent pools.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use tombola::internals::{Config, Location, Overrides};

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|text: &str| {
    let file: PathBuf = FOLDER.path().join("config.toml");
    std::fs::write(&file, text).expect("a file");
    let location = Location { file: Some(file), dir: None };
    match Config::load(&Overrides { location, ..Overrides::default() }) {
        Ok(config) => {
            assert!(!config.pools.is_empty());
            for pool in &config.pools {
                assert!(pool.shards > 0 && pool.shard_size > 0, "{pool:?}");
                assert!(u64::from(pool.shard_size) <= pool.space.size(), "{pool:?}");
                assert!(config.refill.low_water_rows(pool.shard_size) <= pool.shard_size.into());
            }
        }
        Err(error) => assert!(!error.to_string().trim().is_empty()),
    }
});
