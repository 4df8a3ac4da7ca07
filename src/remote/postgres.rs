//! Connections to a database that speaks PostgreSQL's protocol. Knows nothing of its tables.

use std::fmt;
use std::sync::Arc;

use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, Error, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::{describe, host_and_port, password};
use crate::config::{StoreAddress, StoreConfig, StoreTls};
use crate::pem;

/// Connects to any host of a database.
pub(crate) struct Connector {
    /// Everything except the host.
    session: Config,
    tls: Option<MakeRustlsConnect>,
    endpoints: Vec<String>,
    /// The part of the settings that it was made from.
    section: &'static str,
}

impl Connector {
    /// Reads the password and the certificates.
    pub(crate) fn open(config: &StoreConfig, section: &'static str) -> Result<Self, String> {
        let StoreAddress::Postgres { user, endpoints, database } = &config.address else {
            unreachable!("another engine's address: {}", config.address);
        };
        let tls = config.tls.as_ref().map(tls).transpose()?;
        let mut session = Config::new();
        session
            .dbname(database)
            .application_name("tombola")
            .ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable })
            .target_session_attrs(TargetSessionAttrs::ReadWrite);
        if let Some(user) = user {
            session.user(user);
        }
        if let Some(password) = password(config)? {
            session.password(password);
        }
        Ok(Self { session, tls, endpoints: endpoints.clone(), section })
    }

    /// Returns the hosts, each as `HOST:PORT`.
    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// Connects to one of the [hosts](Self::endpoints), if it can be written to.
    pub(crate) async fn connect(&self, endpoint: &str) -> Result<Client, String> {
        let (host, port) = host_and_port(endpoint);
        let mut config = self.session.clone();
        config.host(host).port(port.parse().expect("the settings read it as a port"));
        // The connection's task ends when the client is dropped, or when the connection breaks, which the next
        // request notices.
        let problem = |error| problem(self.section, &error);
        match &self.tls {
            None => {
                let (client, connection) = config.connect(NoTls).await.map_err(problem)?;
                tokio::spawn(connection);
                Ok(client)
            }
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await.map_err(problem)?;
                tokio::spawn(connection);
                Ok(client)
            }
        }
    }
}

/// Omits the session, which contains the password.
impl fmt::Debug for Connector {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Connector")
            .field("endpoints", &self.endpoints)
            .finish_non_exhaustive()
    }
}

/// Describes an error, and the remedy if it is known. `section` is the part of the settings that tells how to reach
/// the database.
pub(crate) fn problem(section: &str, error: &Error) -> String {
    let Some(said) = error.as_db_error() else {
        let text = describe(section, error);
        return match text.contains("does not allow writes") {
            true => format!("{text}: give the host that can be written to as well"),
            false => text,
        };
    };
    let code = said.code();
    let advice = if [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION]
        .contains(code)
    {
        format!(
            "check the user in {section}.store, the password in {section}.password_file, the certificate in \
             {section}.tls, and its pg_hba.conf"
        )
    } else if *code == SqlState::INVALID_CATALOG_NAME {
        format!("create the database, or correct its name in {section}.store")
    } else {
        return said.message().to_owned();
    };
    format!("{}: {advice}", said.message())
}

fn tls(files: &StoreTls) -> Result<MakeRustlsConnect, String> {
    let certificates = |path| pem::certificates(path).map_err(|error| error.to_string());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(certificates(&files.ca)?);
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the suites of both versions")
        .with_root_certificates(roots);
    let tls = match &files.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(
                certificates(cert)?,
                pem::key(key).map_err(|error| error.to_string())?,
            )
            .map_err(|error| format!("{} and {}: {error}", cert.display(), key.display()))?,
    };
    Ok(MakeRustlsConnect::new(tls))
}
