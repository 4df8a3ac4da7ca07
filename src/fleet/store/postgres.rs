//! A database that speaks PostgreSQL's protocol as the store: one table, on the host that can be written to.
//! Prepares no statements, because there may be a connection pooler in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};

use super::nodes::{Connect, Nodes, Unanswered, unusable};
use super::{FleetStore, FleetStoreError, Reply};
use crate::config::StoreConfig;
use crate::remote::postgres::{self, Connector};

/// The part of the settings that tells how to reach the database.
const SECTION: &str = "fleet";

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

/// Reads the password and the certificates. See the [module](self).
pub(super) fn open(config: &StoreConfig) -> Result<Nodes<Connector>, FleetStoreError> {
    let connector =
        Connector::open(config, SECTION).map_err(|problem| unusable(config, problem))?;
    let endpoints = connector.endpoints().to_owned();
    Ok(Nodes::new(connector, config, &endpoints))
}

impl FleetStore for Nodes<Connector> {
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

impl Connect for Connector {
    type Connection = Arc<Client>;

    async fn connect(&self, endpoint: &str) -> Result<Arc<Client>, String> {
        let client = self.connect(endpoint).await?;
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

fn columns(entries: &[(String, String)]) -> (Vec<&str>, Vec<&str>) {
    entries.iter().map(|(key, value)| (key.as_str(), value.as_str())).unzip()
}

fn entry(row: &Row) -> Result<(String, String), String> {
    Ok((row.try_get(0).map_err(problem)?, row.try_get(1).map_err(problem)?))
}

#[expect(clippy::needless_pass_by_value, reason = "it is what errors are mapped with")]
fn problem(error: Error) -> String {
    let problem = postgres::problem(SECTION, &error);
    match error.code() {
        Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => format!(
            "{problem}: the user of fleet.store needs SELECT, INSERT and UPDATE on the table tombola"
        ),
        _ => problem,
    }
}
