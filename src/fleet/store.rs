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

use crate::config::{StoreAddress, StoreConfig};

/// Why a request to the store failed. A change may have been made or not.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the store {address} can't be used: {problem}")]
pub struct StoreError {
    /// Its address, as in the settings.
    pub address: String,
    /// The error of the engine or the network.
    pub problem: String,
}

/// A store, connected or about to be.
#[derive(Debug)]
pub enum Store {
    /// See [`StoreAddress::File`].
    File(file::FileStore),
    /// See [`StoreAddress::Etcd`].
    #[cfg(feature = "etcd")]
    Etcd(etcd::EtcdStore),
    /// See [`StoreAddress::Postgres`].
    #[cfg(feature = "postgres")]
    Postgres(postgres::PostgresStore),
    /// A store in memory, with faults, for tests.
    #[cfg(test)]
    Memory(memory::MemoryStore),
}

impl Store {
    /// Opens the store of these settings. Reads passwords and certificates now, and connects at the first
    /// request.
    ///
    /// # Errors
    /// [`StoreError`] if a password or certificate can't be read or used.
    pub fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        Self::open_for(config, file::Access::Change)
    }

    /// Opens the store of these settings for reading: a file is neither created nor changed.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_to_look(config: &StoreConfig) -> Result<Self, StoreError> {
        Self::open_for(config, file::Access::Look)
    }

    fn open_for(config: &StoreConfig, access: file::Access) -> Result<Self, StoreError> {
        match &config.address {
            StoreAddress::File(path) => Ok(Self::File(file::FileStore::new(path, access))),
            #[cfg(feature = "etcd")]
            StoreAddress::Etcd { .. } => Ok(Self::Etcd(etcd::EtcdStore::new(config)?)),
            #[cfg(feature = "postgres")]
            StoreAddress::Postgres { .. } => {
                Ok(Self::Postgres(postgres::PostgresStore::new(config)?))
            }
            #[cfg(not(all(feature = "etcd", feature = "postgres")))]
            other => unreachable!("refused by the settings: {other}"),
        }
    }

    /// Returns an error of this store with this problem.
    pub(super) fn error(&self, problem: &str) -> StoreError {
        let address = match self {
            Self::File(store) => store.address(),
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.address(),
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.address(),
            #[cfg(test)]
            Self::Memory(_) => "memory".to_owned(),
        };
        StoreError { address, problem: problem.to_owned() }
    }

    /// Returns the newest value of a key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get(&self, key: &str) -> Result<Option<String>, StoreError> {
        match self {
            Self::File(store) => store.get(key).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.get(key).await,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.get(key).await,
            #[cfg(test)]
            Self::Memory(store) => store.get(key).await,
        }
    }

    /// Returns the newest values of all keys with this prefix.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, prefix: &str) -> Result<BTreeMap<String, String>, StoreError> {
        match self {
            Self::File(store) => store.list(prefix).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.list(prefix).await,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.list(prefix).await,
            #[cfg(test)]
            Self::Memory(store) => store.list(prefix).await,
        }
    }

    /// Creates each of these keys that does not exist yet. Returns whether all were created.
    ///
    /// # Errors
    /// [`StoreError`]; some, all or none of the keys may then exist.
    pub async fn create(&self, entries: &[(String, String)]) -> Result<bool, StoreError> {
        self.create_where(&[], entries).await
    }

    /// Creates each of these keys that does not exist yet, if each key of `given` has its value at the same
    /// moment. Returns whether all were created.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub async fn create_where(
        &self,
        given: &[(String, String)],
        entries: &[(String, String)],
    ) -> Result<bool, StoreError> {
        match self {
            Self::File(store) => store.create(given, entries).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.create(given, entries).await,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.create(given, entries).await,
            #[cfg(test)]
            Self::Memory(store) => store.create(given, entries).await,
        }
    }

    /// Replaces the value of a key if it is `from`. Returns whether it did.
    ///
    /// # Errors
    /// [`StoreError`]; the value may be replaced or not, or may be replaced long after the error.
    pub async fn replace(&self, key: &str, from: &str, to: &str) -> Result<bool, StoreError> {
        match self {
            Self::File(store) => store.replace(key, from, to).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.replace(key, from, to).await,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.replace(key, from, to).await,
            #[cfg(test)]
            Self::Memory(store) => store.replace(key, from, to).await,
        }
    }
}
