//! The HTTP side: the keys under `server`.

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::values::{Integer, WaitMs};

/// The most numbers in one response, about 20 bytes of JSON each.
pub(super) const COUNT_LIMIT_MAX: u64 = 1_000_000;

/// The most connections at once. Each is a file descriptor, and Linux lets one process open this many
/// (`fs.nr_open`).
const CONNECTIONS_MAX: u64 = 1_048_576;

/// The error for a wrong `server.listen`.
const LISTEN_ALLOWED: &str = "not a socket address; allowed: an IP address and a port, such as \
     127.0.0.1:8000 or [::1]:8000, but no host name";

/// How numbers are made and stored. Each mode is faster than the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(try_from = "String", rename_all = "lowercase")]
pub enum Mode {
    /// One thread, one JSON file
    Simple,
    /// The same file; concurrent requests share a write
    Json,
    /// A table with a UNIQUE constraint; concurrent requests share a commit
    Sqlite,
    /// Numbers made ahead of need, in shards
    Sharded,
}

impl Mode {
    /// Returns the mode's name in the settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Simple => "simple",
            Self::Json => "json",
            Self::Sqlite => "sqlite",
            Self::Sharded => "sharded",
        }
    }

    /// Returns the address to listen on if no layer sets one.
    fn listen_default(self) -> &'static str {
        match self {
            Self::Simple => "127.0.0.1:5000",
            Self::Json | Self::Sqlite | Self::Sharded => "127.0.0.1:8000",
        }
    }
}

impl TryFrom<String> for Mode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let allowed = Self::value_variants();
        let names: Vec<_> = allowed.iter().map(|mode| mode.as_str()).collect();
        let found = allowed.iter().find(|mode| mode.as_str() == text).copied();
        found.ok_or_else(|| format!("unknown mode; allowed: {}", names.join(", ")))
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// The HTTP side.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// How numbers are made and stored.
    pub mode: Mode,
    /// Address and port.
    pub listen: SocketAddr,
    /// The largest `count` of one request.
    pub count_limit: NonZeroU32,
    /// The host names of this server, besides IP addresses and `localhost`.
    pub hosts: Vec<String>,
    /// The most connections at once.
    pub connections: usize,
    /// How long a client may keep the server waiting.
    pub client_timeout: Duration,
    /// How long a stop waits for requests in flight.
    pub drain: Duration,
    /// The files for https, if it is enabled.
    pub tls: Option<TlsConfig>,
}

/// The files for https.
#[derive(Clone, Debug)]
pub struct TlsConfig {
    /// PEM file: the server's certificate, then those that lead to a root.
    pub cert: PathBuf,
    /// PEM file: the key of the first certificate.
    pub key: PathBuf,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub(super) struct ServerKeys {
    mode: Mode,
    listen: Option<String>,
    hosts: Vec<String>,
    count_limit: Integer<1, COUNT_LIMIT_MAX>,
    connections: Integer<1, CONNECTIONS_MAX>,
    client_timeout_ms: WaitMs,
    drain_ms: WaitMs,
    tls: Option<TlsKeys>,
}

#[derive(Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct TlsKeys {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl ServerKeys {
    /// Validates the keys, and sets `listen` if it is not set.
    pub(super) fn validate(&mut self) -> Result<ServerConfig, RefusedKey> {
        let listen = self.listen.get_or_insert_with(|| self.mode.listen_default().to_owned());
        let listen =
            listen.parse().map_err(|_| RefusedKey::new("server.listen", LISTEN_ALLOWED))?;
        if let Some((index, name)) = self.hosts.iter().enumerate().find(|(_, name)| !is_host(name))
        {
            let problem = format!("{name:?} is not a host name; allowed: names without a port");
            return Err(RefusedKey::new(format!("server.hosts[{index}]"), problem));
        }
        Ok(ServerConfig {
            mode: self.mode,
            listen,
            hosts: self.hosts.clone(),
            count_limit: u32::try_from(self.count_limit.0)
                .ok()
                .and_then(NonZeroU32::new)
                .expect("its type allows 1 to COUNT_LIMIT_MAX"),
            connections: self.connections.0 as usize,
            client_timeout: self.client_timeout_ms.duration(),
            drain: self.drain_ms.duration(),
            tls: self.tls.clone().map_or(Ok(None), TlsKeys::validate)?,
        })
    }
}

impl TlsKeys {
    fn validate(self) -> Result<Option<TlsConfig>, RefusedKey> {
        match (self.cert, self.key) {
            (None, None) => Ok(None),
            (Some(cert), Some(key)) => Ok(Some(TlsConfig { cert, key })),
            (Some(_), None) => {
                let problem = "TLS also needs the certificate's key; set server.tls.key";
                Err(RefusedKey::new("server.tls.cert", problem))
            }
            (None, Some(_)) => {
                let problem = "TLS also needs the key's certificate; set server.tls.cert";
                Err(RefusedKey::new("server.tls.key", problem))
            }
        }
    }
}

fn is_host(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b".-_".contains(&b))
}
