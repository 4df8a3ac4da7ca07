//! With which others numbers are shared out: the keys under `fleet`.

use std::path::PathBuf;

use serde::Deserialize;

use super::{ConfigError, LEASE_ROWS_MAX, LeaseConfig};

/// Strata claimed at a time when nothing is said: 1/64 of all.
const CLAIM_DEFAULT: u64 = 64;

/// All strata that there are: more can't be claimed.
const CLAIM_MAX: u64 = 4096;

/// Rows of a lease when nothing is said. Those of two shards last three seconds at the full load of two
/// cores, and a step of the fence is asked for when half of them are left.
const LEASE_ROWS_DEFAULT: u64 = 1 << 18;

/// Nodes of a store: more than anyone has.
const ENDPOINTS_MAX: usize = 32;

const STORE_ALLOWED: &str = "allowed are etcd://HOST:2379,HOST:2379,HOST:2379 and \
     postgres://HOST:5432/DATABASE, each with USER@ before the first host where it wants one, and \
     file:///FOLDER/FILE.db";

/// How this server shares numbers out with others.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// Where they agree.
    pub store: StoreConfig,
    /// The name of what they share.
    pub space: SpaceName,
    /// Strata claimed at a time, 1 to 4096.
    pub claim: usize,
    /// Rows that a shard leases ahead of need, in place of `lease.rows`.
    pub lease_rows: usize,
    /// Whether a folder that is an old copy is refused, rather than set aside and begun anew.
    pub refuse_if_stale: bool,
}

/// How to reach the store.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Which engine, and where.
    pub address: StoreAddress,
    /// File whose first line is the password of the user.
    pub password_file: Option<PathBuf>,
    /// With what to speak TLS.
    pub tls: Option<StoreTls>,
}

/// Which engine, and where. Shown, it is as it stands in the settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreAddress {
    /// Nodes of one etcd cluster, `HOST:PORT`.
    Etcd {
        /// Who asks.
        user: Option<String>,
        /// The nodes.
        endpoints: Vec<String>,
    },
    /// A database that speaks PostgreSQL's protocol.
    Postgres {
        /// Who asks.
        user: Option<String>,
        /// The hosts, `HOST:PORT`: the one that can be written to is used.
        endpoints: Vec<String>,
        /// The database.
        database: String,
    },
    /// A SQLite file on another volume of the same machine.
    File(PathBuf),
}

/// With what to speak TLS to the store.
#[derive(Clone, Debug)]
pub struct StoreTls {
    /// PEM file: the roots that its certificate must lead to.
    pub ca: PathBuf,
    /// PEM files: the certificate that this server shows, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A space's name, fit for a key of any store: 1 to 64 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceName(String);

impl SpaceName {
    /// The name, when it is fit.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        fit.then(|| Self(name.to_owned()))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for SpaceName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
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
        // A password would be shown wherever settings are.
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

/// `HOST:PORT`, with the engine's own port where none is said.
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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FleetKeys {
    store: String,
    space: String,
    claim: Option<u64>,
    lease_rows: Option<u64>,
    refuse_if_stale: Option<bool>,
    password_file: Option<PathBuf>,
    tls: Option<StoreTlsKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoreTlsKeys {
    ca: PathBuf,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl FleetKeys {
    pub(super) fn validate(
        self,
        lease: LeaseConfig,
        within: impl Fn(&str, u64, u64, u64) -> Result<u64, ConfigError>,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<FleetConfig, ConfigError> {
        let refused = |key: &str, problem: &str| refused(key, problem.to_owned());
        let address = StoreAddress::parse(&self.store)
            .ok_or_else(|| refused("fleet.store", STORE_ALLOWED))?;
        let engine = match &address {
            StoreAddress::Etcd { endpoints, .. } | StoreAddress::Postgres { endpoints, .. }
                if endpoints.len() > ENDPOINTS_MAX =>
            {
                let problem = format!("allowed are up to {ENDPOINTS_MAX} hosts");
                return Err(refused("fleet.store", &problem));
            }
            StoreAddress::Etcd { .. } if !cfg!(feature = "etcd") => Some("etcd"),
            StoreAddress::Postgres { .. } if !cfg!(feature = "postgres") => Some("postgres"),
            _ => None,
        };
        if let Some(feature) = engine {
            let problem =
                format!("this tombola was built without it: build with --features {feature}");
            return Err(refused("fleet.store", &problem));
        }
        let is_file = matches!(address, StoreAddress::File(_));
        if is_file && self.tls.is_some() {
            return Err(refused("fleet.tls", "a file is not reached by TLS"));
        }
        if self.password_file.is_some()
            && !matches!(
                &address,
                StoreAddress::Etcd { user: Some(_), .. }
                    | StoreAddress::Postgres { user: Some(_), .. }
            )
        {
            let problem = "a password needs a user: put USER@ before the host in fleet.store";
            return Err(refused("fleet.password_file", problem));
        }
        let space = SpaceName::new(&self.space).ok_or_else(|| {
            let problem = "allowed are 1 to 64 characters of a-z, A-Z, 0-9, '.', '_' and '-'";
            refused("fleet.space", problem)
        })?;
        let tls = self.tls.map(|keys| match (keys.cert, keys.key) {
            (None, None) => Ok(StoreTls { ca: keys.ca, identity: None }),
            (Some(cert), Some(key)) => Ok(StoreTls { ca: keys.ca, identity: Some((cert, key)) }),
            (Some(_), None) => Err(refused("fleet.tls.cert", "it needs its key, fleet.tls.key")),
            (None, Some(_)) => Err(refused("fleet.tls.key", "it needs its fleet.tls.cert")),
        });
        // Strict stays strict: nothing is leased ahead where nobody asked for it.
        let rows = match (self.lease_rows, lease.rows as u64) {
            (Some(rows), _) => within("fleet.lease_rows", rows, 0, LEASE_ROWS_MAX)?,
            (None, 0) => 0,
            (None, rows) => rows.max(LEASE_ROWS_DEFAULT),
        };
        let claim = within("fleet.claim", self.claim.unwrap_or(CLAIM_DEFAULT), 1, CLAIM_MAX)?;
        Ok(FleetConfig {
            store: StoreConfig {
                address,
                password_file: self.password_file,
                tls: tls.transpose()?,
            },
            space,
            claim: claim as usize,
            lease_rows: rows as usize,
            refuse_if_stale: self.refuse_if_stale.unwrap_or(false),
        })
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
