//! The numbers that were issued by other means before the space was made. Knows nothing of the store.

use std::fs::File;
use std::io::BufReader;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::task::spawn_blocking;

use super::FleetError;
use crate::config::PoolConfig;
use crate::import::{self, Layout};
use crate::space::Value;

/// The numbers in a pool's `used_file`.
#[derive(Clone, Debug, Default)]
pub(super) struct UsedNumbers {
    /// In ascending order.
    pub(super) values: Arc<[Value]>,
    /// The SHA-256 of the values, whatever their order and their texts in the file. `None` without a file.
    pub(super) digest: Option<String>,
}

impl UsedNumbers {
    /// Reads the file of a pool, if it has one.
    ///
    /// # Errors
    /// [`FleetError::UsedFile`] if it can't be read, or if a line is no number of the pool.
    pub(super) async fn read(config: &PoolConfig) -> Result<Self, FleetError> {
        let Some(path) = config.used_file.clone() else {
            return Ok(Self::default());
        };
        let pool = config.name.to_string();
        let unusable = |problem: String| FleetError::UsedFile { pool, problem };
        let space = config.space.clone();
        let read = spawn_blocking(move || {
            let file = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
            let mut values = import::read(BufReader::new(file), &Layout::default(), &space)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            values.sort_unstable();
            values.dedup();
            let mut digest = Sha256::new();
            values.iter().for_each(|value| digest.update(value.0.to_le_bytes()));
            Ok(Self { values: values.into(), digest: Some(hex::encode(digest.finalize())) })
        });
        read.await.expect("reading does not panic").map_err(unusable)
    }
}
