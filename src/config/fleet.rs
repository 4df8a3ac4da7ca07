//! Fleet: instances that share one number space, and their store. The keys under `fleet`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::lease::LeaseRows;
use super::values::{Integer, NAME_ALLOWED, boolean, is_name, text};

/// The default number of partitions claimed at a time: 1/64 of all.
const CLAIM_DEFAULT: u64 = 64;

/// The number of all partitions.
const CLAIM_MAX: u64 = 4096;

/// The default number of rows of a lease. The leases of two shards last three seconds at the full load of two
/// cores, and the next step of the fence begins when half of a lease is left.
const LEASE_ROWS_DEFAULT: u64 = 1 << 18;

/// The default bound on the rows that all shards of a process lease: up to 16 shards have leases of the
/// default size. Each row takes up to 48 bytes of memory, because a shard holds up to one and a half leases,
/// in a buffer that grows by doubling.
const LEASED_ROWS_DEFAULT: u64 = 1 << 22;

/// The most nodes of a store, more than are used in practice.
const ENDPOINTS_MAX: usize = 32;

const STORE_ALLOWED: &str = "allowed: etcd://HOST:2379,HOST:2379,HOST:2379 or \
     postgres://HOST:5432/DATABASE, each with USER@ before the first host if it requires a user, or \
     file:///FOLDER/FILE.db";

/// How this server shares a number space with others.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// The store through which they agree.
    pub store: StoreConfig,
    pub space: SpaceName,
    /// Partitions claimed at a time, 1 to 4096.
    pub claim: usize,
    /// Whether to refuse a data folder that is an old copy, instead of setting its files aside and starting
    /// as a new instance.
    pub refuse_if_stale: bool,
}

/// How to reach the store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The engine and its address.
    pub address: StoreAddress,
    /// File whose first line is the password of the user.
    pub password_file: Option<PathBuf>,
    /// The files for TLS, if it is enabled.
    pub tls: Option<StoreTls>,
}

/// The engine and its address, which is displayed as in the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreAddress {
    /// Nodes of one etcd cluster, `HOST:PORT`.
    Etcd {
        user: Option<String>,
        /// The nodes.
        endpoints: Vec<String>,
    },
    /// A database that speaks PostgreSQL's protocol.
    Postgres {
        user: Option<String>,
        /// The hosts, `HOST:PORT`: the one that can be written to is used.
        endpoints: Vec<String>,
        database: String,
    },
    /// A SQLite file on another volume of the same machine.
    File(PathBuf),
}

/// The files for TLS to the store.
#[derive(Clone, Debug)]
pub struct StoreTls {
    /// PEM file: the roots, one of which must vouch for the store's certificate.
    pub ca: PathBuf,
    /// PEM files: the certificate that this server shows, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A space's name, fit for a key of any store: 1 to 64 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceName(String);

impl SpaceName {
    /// Returns the name, if it is valid.
    pub fn new(name: &str) -> Option<Self> {
        is_name(name).then(|| Self(name.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for SpaceName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl StoreConfig {
    /// Returns whether a password crosses the network in plain text.
    pub fn shows_password(&self) -> bool {
        let (StoreAddress::Etcd { endpoints, .. } | StoreAddress::Postgres { endpoints, .. }) =
            &self.address
        else {
            return false;
        };
        self.password_file.is_some()
            && self.tls.is_none()
            && !endpoints.iter().all(|endpoint| is_loopback(endpoint))
    }
}

/// Returns whether `HOST:PORT` is on this machine.
fn is_loopback(endpoint: &str) -> bool {
    let (host, _) = endpoint.rsplit_once(':').unwrap_or((endpoint, ""));
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.to_canonical().is_loopback())
}

impl StoreAddress {
    fn parse(text: &str) -> Option<Self> {
        let (engine, rest) = text.split_once("://")?;
        if engine == "file" {
            let path = PathBuf::from(rest);
            return (path.is_absolute() && path.file_name().is_some()).then_some(Self::File(path));
        }
        let (user, rest) = match rest.split_once('@') {
            Some((user, rest)) => (Some(user.to_owned()), rest),
            None => (None, rest),
        };
        // A password is refused here, because addresses are displayed.
        if user.as_ref().is_some_and(|user| user.is_empty() || user.contains([':', '/'])) {
            return None;
        }
        let (hosts, database) = match rest.split_once('/') {
            Some((hosts, database)) => (hosts, Some(database)),
            None => (rest, None),
        };
        let port = if engine == "etcd" { 2379 } else { 5432 };
        let endpoints = hosts.split(',').map(|host| endpoint(host, port)).collect::<Option<_>>()?;
        match (engine, database) {
            ("etcd", None | Some("")) => Some(Self::Etcd { user, endpoints }),
            ("postgres" | "postgresql", Some(database))
                if !database.is_empty() && !database.contains(['/', '?']) =>
            {
                Some(Self::Postgres { user, endpoints, database: database.to_owned() })
            }
            _ => None,
        }
    }
}

/// Returns `HOST:PORT`, with the engine's default port if the text has none.
fn endpoint(text: &str, port: u16) -> Option<String> {
    let authority: axum::http::uri::Authority = text.parse().ok()?;
    let port = if authority.host() == text { port } else { authority.port_u16()? };
    let fits = !authority.host().is_empty() && !text.contains('@');
    fits.then(|| format!("{}:{port}", authority.host()))
}

impl std::fmt::Display for StoreAddress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |user: &Option<String>| {
            user.as_ref().map(|user| format!("{user}@")).unwrap_or_default()
        };
        match self {
            Self::Etcd { user, endpoints } => {
                write!(formatter, "etcd://{}{}", at(user), endpoints.join(","))
            }
            Self::Postgres { user, endpoints, database } => {
                write!(formatter, "postgres://{}{}/{database}", at(user), endpoints.join(","))
            }
            Self::File(path) => write!(formatter, "file://{}", path.display()),
        }
    }
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct FleetKeys {
    store: String,
    #[serde(deserialize_with = "text")]
    space: String,
    claim: Option<Integer<1, CLAIM_MAX>>,
    lease_rows: Option<LeaseRows>,
    #[serde(default, deserialize_with = "boolean")]
    refuse_if_stale: bool,
    password_file: Option<PathBuf>,
    tls: Option<StoreTlsKeys>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct StoreTlsKeys {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl FleetKeys {
    /// Validates the keys, and sets `claim` if it is not set.
    pub(super) fn validate(&mut self) -> Result<FleetConfig, RefusedKey> {
        let store = StoreKeys {
            section: "fleet",
            address: &self.store,
            allowed: STORE_ALLOWED,
            password_file: self.password_file.as_ref(),
            tls: self.tls.as_ref(),
        };
        let store = store.validate()?;
        let space = SpaceName::new(&self.space)
            .ok_or_else(|| RefusedKey::new("fleet.space", NAME_ALLOWED))?;
        Ok(FleetConfig {
            store,
            space,
            claim: self.claim.get_or_insert(Integer(CLAIM_DEFAULT)).0 as usize,
            refuse_if_stale: self.refuse_if_stale,
        })
    }

    /// Returns the rows that each shard leases, and sets `lease_rows` if it is not set. `rows` is
    /// `lease.rows`, and `shards` is the number of shards of all pools.
    pub(super) fn lease_rows(&mut self, rows: LeaseRows, shards: u64) -> LeaseRows {
        // If `lease.rows` is 0, a fleet leases nothing ahead either, unless it is told to.
        let default = match rows.0 {
            0 => 0,
            rows => rows.max(LEASE_ROWS_DEFAULT.min(LEASED_ROWS_DEFAULT / shards.max(1))),
        };
        *self.lease_rows.get_or_insert(Integer(default))
    }
}

/// The keys of a section that say how to reach a store.
pub(super) struct StoreKeys<'k> {
    pub(super) section: &'static str,
    pub(super) address: &'k str,
    /// The error for a wrong address.
    pub(super) allowed: &'static str,
    pub(super) password_file: Option<&'k PathBuf>,
    pub(super) tls: Option<&'k StoreTlsKeys>,
}

impl StoreKeys<'_> {
    pub(super) fn validate(self) -> Result<StoreConfig, RefusedKey> {
        let Self { section, password_file, .. } = self;
        let refused =
            |key: &str, problem: String| Err(RefusedKey::new(format!("{section}.{key}"), problem));
        let address = self.address()?;
        let user = match &address {
            StoreAddress::Etcd { user, .. } | StoreAddress::Postgres { user, .. } => user.as_ref(),
            StoreAddress::File(_) if self.tls.is_some() => {
                return refused("tls", format!("a file needs no TLS; remove [{section}.tls]"));
            }
            StoreAddress::File(_) => None,
        };
        if password_file.is_some() && user.is_none() {
            let problem =
                format!("a password needs a user: put USER@ before the host in {section}.store");
            return refused("password_file", problem);
        }
        let tls = self.tls.map(|tls| tls.validate(section)).transpose()?;
        Ok(StoreConfig { address, password_file: password_file.cloned(), tls })
    }

    fn address(&self) -> Result<StoreAddress, RefusedKey> {
        let refused =
            |problem: &str| Err(RefusedKey::new(format!("{}.store", self.section), problem));
        let Some(address) = StoreAddress::parse(self.address) else {
            return refused(self.allowed);
        };
        let feature = match &address {
            StoreAddress::Etcd { endpoints, .. } | StoreAddress::Postgres { endpoints, .. }
                if endpoints.len() > ENDPOINTS_MAX =>
            {
                return refused(&format!("allowed: up to {ENDPOINTS_MAX} hosts"));
            }
            StoreAddress::Etcd { .. } if !cfg!(feature = "etcd") => "etcd",
            StoreAddress::Postgres { .. } if !cfg!(feature = "postgres") => "postgres",
            _ => return Ok(address),
        };
        let problem =
            format!("this tombola was built without {feature}; build with --features {feature}");
        refused(&problem)
    }
}

impl StoreTlsKeys {
    fn validate(&self, section: &str) -> Result<StoreTls, RefusedKey> {
        let refused = |key: &str, problem: String| {
            Err(RefusedKey::new(format!("{section}.tls.{key}"), problem))
        };
        let identity = match (&self.cert, &self.key) {
            (None, None) => None,
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (Some(_), None) => {
                let problem = format!("the certificate needs its key; set {section}.tls.key");
                return refused("cert", problem);
            }
            (None, Some(_)) => {
                let problem = format!("the key needs its certificate; set {section}.tls.cert");
                return refused("key", problem);
            }
        };
        Ok(StoreTls { ca: self.ca.clone(), identity })
    }
}

#[cfg(test)]
mod tests {
    use super::StoreAddress;

    #[test]
    fn an_address_is_read_and_shown_as_it_stands() {
        let same = [
            "etcd://a:2379,b:2379,c:2379",
            "etcd://root@127.0.0.1:2379",
            "etcd://[::1]:2379",
            "postgres://tombola@db:5432/numbers",
            "postgres://a:26257,b:26257/numbers",
            "file:///other/volume/witness.db",
        ];
        for text in same {
            let address = StoreAddress::parse(text).unwrap_or_else(|| panic!("{text}"));
            assert_eq!(address.to_string(), text);
        }
        let short = StoreAddress::parse("postgresql://db/numbers").map(|a| a.to_string());
        assert_eq!(short.as_deref(), Some("postgres://db:5432/numbers"));
        for text in [
            "",
            "a:2379",
            "http://a:2379",
            "etcd://",
            "etcd://a:1,,b:1",
            "etcd://a:2379/x",
            "etcd://user:secret@a:2379",
            "etcd://a b:1",
            "postgres://db",
            "postgres://db/a/b",
            "postgres://db/a?sslmode=disable",
            "file://relative.db",
            "file:///",
            "etcd://a:99999",
        ] {
            assert_eq!(StoreAddress::parse(text), None, "{text}");
        }
    }
}
