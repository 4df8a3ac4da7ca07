//! A database that speaks PostgreSQL's protocol as the store: one table, on the host that can be written to.
//! Prepares no statements, because there may be a connection pooler in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::config::{SslMode, TargetSessionAttrs};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Error, NoTls, Row};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::nodes::{self, Connect, Nodes, Unanswered, describe, unusable};
use super::{FleetStore, FleetStoreError, Reply};
use crate::config::{StoreAddress, StoreConfig};
use crate::pem::{self, PemError};

/// Sent first, because creating a table that exists may be forbidden.
const MISSING: &str = "SELECT to_regclass('tombola') IS NULL";
const CREATE: &str =
    "CREATE TABLE IF NOT EXISTS tombola (key text PRIMARY KEY, value text NOT NULL)";
/// Locks the rows that it reads, so that reading commits like a write and waits for the synchronous standby.
/// Otherwise a primary could return a change, after a crash, that no standby has confirmed.
const SELECT: &str = "SELECT key, value FROM tombola WHERE key = $1 FOR KEY SHARE";
const SELECT_ALL: &str = "SELECT key, value FROM tombola WHERE substr(key, 1, length($1)) = $1
    FOR KEY SHARE";
/// Inserts in the order of the keys, so that two statements with the same keys can't deadlock.
const INSERT: &str = "INSERT INTO tombola (key, value)
    SELECT entry.key, entry.value FROM unnest($1, $2) AS entry (key, value)
    WHERE (SELECT count(*) FROM tombola JOIN unnest($3, $4) AS given (key, value) USING (key, value))
        = cardinality($3)
    ORDER BY entry.key ON CONFLICT (key) DO NOTHING";
const UPDATE: &str = "UPDATE tombola SET value = $3 WHERE key = $1 AND value = $2";

/// The access to any host.
pub(super) struct Postgres {
    /// Everything except the host.
    config: Config,
    tls: Option<MakeRustlsConnect>,
}

/// Reads the password and the certificates. See the [module](self).
pub(super) fn open(config: &StoreConfig) -> Result<Nodes<Postgres>, FleetStoreError> {
    let StoreAddress::Postgres { user, endpoints, database } = &config.address else {
        unreachable!("another engine's address: {}", config.address);
    };
    let tls = tls(config)?;
    let mut session = Config::new();
    session
        .dbname(database)
        .application_name("tombola")
        .ssl_mode(if tls.is_some() { SslMode::Require } else { SslMode::Disable })
        .target_session_attrs(TargetSessionAttrs::ReadWrite);
    if let Some(user) = user {
        session.user(user);
    }
    if let Some(password) = nodes::password(config)? {
        session.password(password);
    }
    let engine = Postgres { config: session, tls };
    Ok(Nodes::new(engine, config, endpoints))
}

impl FleetStore for Nodes<Postgres> {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<String>> {
        let question = move |client: Arc<Client>| async move {
            let row = client.query_typed_opt(SELECT, &[(&key, Type::TEXT)]).await;
            Ok(row.map_err(problem)?.as_ref().map(entry).transpose()?.map(|(_, value)| value))
        };
        Box::pin(self.ask(Unanswered::AskAgain, question))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, BTreeMap<String, String>> {
        let question = move |client: Arc<Client>| async move {
            let rows = client.query_typed(SELECT_ALL, &[(&prefix, Type::TEXT)]).await;
            rows.map_err(problem)?.iter().map(entry).collect()
        };
        Box::pin(self.ask(Unanswered::AskAgain, question))
    }

    fn create_where<'a>(
        &'a self,
        given: &'a [(String, String)],
        entries: &'a [(String, String)],
    ) -> Reply<'a, bool> {
        Box::pin(async move {
            let (keys, values) = &columns(entries);
            let (given_keys, given_values) = &columns(given);
            let question = |client: Arc<Client>| async move {
                let texts = [keys, values, given_keys, given_values]
                    .map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY));
                let created = client.execute_typed(INSERT, &texts).await.map_err(problem)?;
                Ok(created == entries.len() as u64)
            };
            self.ask(Unanswered::GiveUp, question).await
        })
    }

    fn replace<'a>(&'a self, key: &'a str, from: &'a str, to: &'a str) -> Reply<'a, bool> {
        let question = move |client: Arc<Client>| async move {
            let texts = [(&key as _, Type::TEXT), (&from as _, Type::TEXT), (&to as _, Type::TEXT)];
            Ok(client.execute_typed(UPDATE, &texts).await.map_err(problem)? == 1)
        };
        Box::pin(self.ask(Unanswered::GiveUp, question))
    }
}

impl Connect for Postgres {
    type Connection = Arc<Client>;

    async fn connect(&self, endpoint: &str) -> Result<Arc<Client>, String> {
        let (host, port) = nodes::host_and_port(endpoint);
        let mut config = self.config.clone();
        config.host(host).port(port.parse().expect("the settings read it as a port"));
        // The connection's task ends when the last clone of the client is dropped, or when the connection
        // breaks, which the next request notices.
        let client = match &self.tls {
            None => {
                let (client, connection) = config.connect(NoTls).await.map_err(problem)?;
                tokio::spawn(connection);
                client
            }
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await.map_err(problem)?;
                tokio::spawn(connection);
                client
            }
        };
        let is_missing = async || {
            let row = client.query_typed_one(MISSING, &[]).await.map_err(problem)?;
            row.try_get::<_, bool>(0).map_err(problem)
        };
        if is_missing().await? {
            let created = client.batch_execute(CREATE).await;
            // If another instance was faster, this is an error too, about the keys of the system catalogue.
            if let (Err(error), true) = (created, is_missing().await?) {
                return Err(format!(
                    "{}: as a user who may create tables, run: {CREATE}; GRANT SELECT, INSERT, UPDATE \
                     ON tombola TO the user of fleet.store",
                    problem(error)
                ));
            }
        }
        Ok(Arc::new(client))
    }

    fn is_broken(client: &Arc<Client>) -> bool {
        client.is_closed()
    }
}

fn tls(config: &StoreConfig) -> Result<Option<MakeRustlsConnect>, FleetStoreError> {
    let Some(files) = &config.tls else { return Ok(None) };
    let unfit = |error: PemError| unusable(config, error.to_string());
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(pem::certificates(&files.ca).map_err(unfit)?);
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has the suites of both versions")
        .with_root_certificates(roots);
    let tls = match &files.identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(
                pem::certificates(cert).map_err(unfit)?,
                pem::key(key).map_err(unfit)?,
            )
            .map_err(|error| {
                unusable(config, format!("{} and {}: {error}", cert.display(), key.display()))
            })?,
    };
    Ok(Some(MakeRustlsConnect::new(tls)))
}

fn columns(entries: &[(String, String)]) -> (Vec<&str>, Vec<&str>) {
    entries.iter().map(|(key, value)| (key.as_str(), value.as_str())).unzip()
}

fn entry(row: &Row) -> Result<(String, String), String> {
    Ok((row.try_get(0).map_err(problem)?, row.try_get(1).map_err(problem)?))
}

#[expect(clippy::needless_pass_by_value, reason = "it is what errors are mapped with")]
fn problem(error: Error) -> String {
    let Some(said) = error.as_db_error() else {
        let text = describe(&error);
        return match text.contains("does not allow writes") {
            true => format!("{text}: give the host that can be written to as well"),
            false => text,
        };
    };
    let code = said.code();
    let advice = if [SqlState::INVALID_PASSWORD, SqlState::INVALID_AUTHORIZATION_SPECIFICATION]
        .contains(code)
    {
        "check the user in fleet.store, the password in fleet.password_file, the certificate in \
         fleet.tls, and its pg_hba.conf"
    } else if *code == SqlState::INVALID_CATALOG_NAME {
        "create the database, or correct its name in fleet.store"
    } else if *code == SqlState::INSUFFICIENT_PRIVILEGE {
        "the user of fleet.store needs SELECT, INSERT and UPDATE on the table tombola"
    } else {
        return said.message().to_owned();
    };
    format!("{}: {advice}", said.message())
}
