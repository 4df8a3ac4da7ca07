//! Receipts and idempotency keys: the keys under `receipts`.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::fleet::{StoreAddress, StoreConfig, StoreKeys, StoreTlsKeys};
use super::values::{Integer, boolean, text};

/// How long a key may be honoured.
const KEEP: RangeInclusive<Duration> =
    Duration::from_secs(3_600)..=Duration::from_secs(10 * 365 * 86_400);

/// The most look-ups that each caller may make in a second.
const LOOKUPS_MAX: u64 = 1_000_000;

const KEEP_ALLOWED: &str = "allowed: 1h to 3650d, such as \"30d\" or \"12h\"";

const STORE_ALLOWED: &str = "allowed: \"folder\" for the data folder, or \
     postgres://HOST:5432/DATABASE with USER@ before the host if it requires a user";

/// How receipts and idempotency keys are kept.
#[derive(Clone, Debug)]
pub struct ReceiptsConfig {
    /// How long a key is honoured at least, 1 hour to 10 years.
    pub keep: Duration,
    pub store: ReceiptStoreConfig,
    /// Whether requests may have a key.
    pub keys: bool,
    /// The look-ups that each caller may make in a second, or `None` if numbers can't be looked up.
    pub lookups: Option<NonZeroU32>,
}

/// Where receipts are kept.
#[derive(Clone, Debug)]
pub enum ReceiptStoreConfig {
    /// `receipts.db` in the data folder.
    Folder,
    /// A PostgreSQL database that all instances of a fleet share.
    Postgres(StoreConfig),
}

/// The responses of a pool that leave a receipt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum Recorded {
    /// No response leaves one, so requests can't have a key.
    Off,
    /// Those to requests with a key or a label.
    #[default]
    Keyed,
    /// All.
    All,
}

impl TryFrom<String> for Recorded {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match &*text {
            "off" => Ok(Self::Off),
            "keyed" => Ok(Self::Keyed),
            "all" => Ok(Self::All),
            _ => Err("allowed: \"off\", \"keyed\" and \"all\""),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct ReceiptsKeys {
    #[serde(deserialize_with = "text")]
    keep: String,
    store: Option<String>,
    password_file: Option<PathBuf>,
    tls: Option<StoreTlsKeys>,
    #[serde(deserialize_with = "boolean")]
    lookups: bool,
    lookups_per_second: Integer<1, LOOKUPS_MAX>,
}

impl ReceiptsKeys {
    /// Validates the keys. In a fleet, requests may have a key only if `store` is set.
    pub(super) fn validate(&self, in_fleet: bool) -> Result<ReceiptsConfig, RefusedKey> {
        let keep = humantime::parse_duration(&self.keep).ok().filter(|keep| KEEP.contains(keep));
        let keep = keep.ok_or_else(|| RefusedKey::new("receipts.keep", KEEP_ALLOWED))?;
        let lookups = u32::try_from(self.lookups_per_second.0).ok().and_then(NonZeroU32::new);
        let lookups = lookups.expect("its type allows 1 to LOOKUPS_MAX");
        Ok(ReceiptsConfig {
            keep,
            store: self.store()?,
            keys: !in_fleet || self.store.is_some(),
            lookups: self.lookups.then_some(lookups),
        })
    }

    fn store(&self) -> Result<ReceiptStoreConfig, RefusedKey> {
        let address = match self.store.as_deref() {
            Some(address) if address != "folder" => address,
            _ if self.password_file.is_some() || self.tls.is_some() => {
                let problem = "the data folder needs no password and no TLS; remove them";
                return Err(RefusedKey::new("receipts.store", problem));
            }
            _ => return Ok(ReceiptStoreConfig::Folder),
        };
        let store = StoreKeys {
            section: "receipts",
            address,
            allowed: STORE_ALLOWED,
            password_file: self.password_file.as_ref(),
            tls: self.tls.as_ref(),
        };
        match store.validate()? {
            store @ StoreConfig { address: StoreAddress::Postgres { .. }, .. } => {
                Ok(ReceiptStoreConfig::Postgres(store))
            }
            StoreConfig { .. } => Err(RefusedKey::new("receipts.store", STORE_ALLOWED)),
        }
    }
}
