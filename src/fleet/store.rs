//! The store through which a fleet agrees, for any engine. Keys and values are text. Knows nothing of their
//! meaning.
//!
//! An engine has to keep three promises: a read returns the newest value (linearizable), a key is created
//! only once, and a value is replaced only if it is the expected one. After an error it is unknown whether a
//! change was made. A change is sent only once, so that `true` and `false` are the outcome of this very try.

#[cfg(feature = "etcd")]
mod etcd;
mod file;
#[cfg(test)]
pub(crate) mod memory;
#[cfg(any(feature = "etcd", feature = "postgres"))]
mod nodes;
#[cfg(feature = "postgres")]
mod postgres;

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::Pin;
use std::sync::Arc;

use self::file::{Access, FileStore};
use crate::config::{StoreAddress, StoreConfig};

/// Why a request to the store failed. A change may have been made or not.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the store {address} can't be used: {problem}")]
pub struct FleetStoreError {
    /// Its address, as in the settings.
    pub address: String,
    /// The error of the engine or the network.
    pub problem: String,
}

/// The reply to a request.
pub(crate) type Reply<'a, T> =
    Pin<Box<dyn Future<Output = Result<T, FleetStoreError>> + Send + 'a>>;

/// A store, connected or about to be.
pub trait FleetStore: Debug + Send + Sync {
    /// Returns the address, as in the settings.
    fn address(&self) -> String;

    /// Returns the newest value of a key.
    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<String>>;

    /// Returns the newest values of all keys with this prefix.
    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, BTreeMap<String, String>>;

    /// Creates each of these keys that does not exist yet, if each key of `given` has its value at the same
    /// moment. Returns whether all were created. After an error some, all or none of the keys may exist.
    fn create_where<'a>(
        &'a self,
        given: &'a [(String, String)],
        entries: &'a [(String, String)],
    ) -> Reply<'a, bool>;

    /// Replaces the value of a key if it is `from`. Returns whether it did. After an error the value may be
    /// replaced or not, or may be replaced long after the error.
    fn replace<'a>(&'a self, key: &'a str, from: &'a str, to: &'a str) -> Reply<'a, bool>;

    /// Creates each of these keys that does not exist yet, as [`create_where`](Self::create_where) does.
    fn create<'a>(&'a self, entries: &'a [(String, String)]) -> Reply<'a, bool> {
        self.create_where(&[], entries)
    }

    /// Returns an error of this store with this problem.
    fn error(&self, problem: &str) -> FleetStoreError {
        FleetStoreError { address: self.address(), problem: problem.to_owned() }
    }
}

/// Opens the store of these settings. Reads passwords and certificates now, and connects at the first
/// request.
///
/// # Errors
/// [`FleetStoreError`] if a password or certificate can't be read or used.
pub fn open(config: &StoreConfig) -> Result<Arc<dyn FleetStore>, FleetStoreError> {
    open_for(config, Access::Change)
}

/// Opens the store of these settings for reading: a file is neither created nor changed.
pub(crate) fn open_to_look(config: &StoreConfig) -> Result<Arc<dyn FleetStore>, FleetStoreError> {
    open_for(config, Access::Look)
}

fn open_for(config: &StoreConfig, access: Access) -> Result<Arc<dyn FleetStore>, FleetStoreError> {
    Ok(match &config.address {
        StoreAddress::File(path) => Arc::new(FileStore::new(path, access)),
        #[cfg(feature = "etcd")]
        StoreAddress::Etcd { .. } => Arc::new(etcd::open(config)?),
        #[cfg(feature = "postgres")]
        StoreAddress::Postgres { .. } => Arc::new(postgres::open(config)?),
        #[cfg(not(all(feature = "etcd", feature = "postgres")))]
        other => unreachable!("refused by the settings: {other}"),
    })
}
