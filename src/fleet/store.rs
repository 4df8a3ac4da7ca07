//! The store that a fleet agrees in: what is asked of any engine. Keys and values are text; what they
//! mean is said elsewhere.
//!
//! Three promises are asked for, and no others: what was read is the newest (linearizable), what is
//! there is never created twice, and a value is replaced only by who knows it. After an error nobody
//! knows whether a change was made: who must know reads.

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

/// Why the store could not be asked. A change may have been made or not.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the store {address} can't be asked: {problem}")]
pub struct StoreError {
    /// Where it is, as in the settings.
    pub address: String,
    /// What the engine or the network said.
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
    /// In memory, with faults.
    #[cfg(test)]
    Memory(memory::MemoryStore),
}

impl Store {
    /// The store of these settings. Reads what it needs of files, and connects when it is first asked.
    ///
    /// # Errors
    /// [`StoreError`] when a password or certificate can't be read or used.
    pub fn open(config: &StoreConfig) -> Result<Self, StoreError> {
        match &config.address {
            StoreAddress::File(path) => Ok(Self::File(file::FileStore::new(path))),
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

    /// What is wrong with what it has.
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

    /// The newest value of a key.
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

    /// The newest values of all keys that begin so.
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

    /// Creates each of these keys that is not there yet. Whose value stands then, reading tells.
    ///
    /// # Errors
    /// [`StoreError`]; some, all or none may be there then.
    pub async fn create(&self, entries: &[(String, String)]) -> Result<(), StoreError> {
        match self {
            Self::File(store) => store.create(entries).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.create(entries).await,
            #[cfg(feature = "postgres")]
            Self::Postgres(store) => store.create(entries).await,
            #[cfg(test)]
            Self::Memory(store) => store.create(entries).await,
        }
    }

    /// Replaces the value of a key if it is `from`. Answers whether it was.
    ///
    /// # Errors
    /// [`StoreError`]; it may be replaced or not, or will be when the error is long past.
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
