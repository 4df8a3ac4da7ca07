//! etcd as the store: changes are transactions, and all reads are linearizable.

use std::collections::BTreeMap;

use etcd_client::{
    Channel, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, KeyValue, KvClient,
    Txn, TxnOp, TxnOpResponse,
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use super::nodes::{Connect, Nodes, Unanswered, unusable};
use super::{FleetStore, FleetStoreError, Reply};
use crate::config::{StoreAddress, StoreConfig};
use crate::pem::{self, PemError};
use crate::remote;

/// Keys created in one transaction. Each is an operation with another one inside, and etcd accepts at most
/// 128 (`--max-txn-ops`).
const CREATE_BATCH: usize = 100;

/// The most bytes of one listing. A pool's partitions take half a megabyte, so those of 100 pools would fit.
const LIST_MAX_BYTES: usize = 64 << 20;

/// The access to any node.
pub(super) struct Etcd {
    credentials: Option<(String, String)>,
    tls: Option<ClientTlsConfig>,
}

/// Reads the password and the certificates. See the [module](self).
pub(super) fn open(config: &StoreConfig) -> Result<Nodes<Etcd>, FleetStoreError> {
    let StoreAddress::Etcd { user, endpoints } = &config.address else {
        unreachable!("another engine's address: {}", config.address);
    };
    let password = remote::password(config).map_err(|problem| unusable(config, problem))?;
    let credentials = match (user, password) {
        (Some(user), Some(password)) => Some((user.clone(), password)),
        (Some(_), None) => {
            let problem = "a user of etcd needs a password: set fleet.password_file";
            return Err(unusable(config, problem));
        }
        (None, _) => None,
    };
    let engine = Etcd { credentials, tls: tls(config)? };
    Ok(Nodes::new(engine, config, endpoints))
}

impl FleetStore for Nodes<Etcd> {
    fn address(&self) -> String {
        self.address.clone()
    }

    fn get<'a>(&'a self, key: &'a str) -> Reply<'a, Option<String>> {
        let question = move |mut client: KvClient| async move {
            let found = client.get(key, None).await.map_err(problem)?.take_kvs().pop();
            found.map(|entry| Ok(text(entry)?.1)).transpose()
        };
        Box::pin(self.ask(Unanswered::AskAgain, question))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> Reply<'a, BTreeMap<String, String>> {
        let question = move |mut client: KvClient| async move {
            let options = GetOptions::new().with_prefix();
            let mut found = client.get(prefix, Some(options)).await.map_err(problem)?;
            found.take_kvs().into_iter().map(text).collect()
        };
        Box::pin(self.ask(Unanswered::AskAgain, question))
    }

    fn create_where<'a>(
        &'a self,
        given: &'a [(String, String)],
        entries: &'a [(String, String)],
    ) -> Reply<'a, bool> {
        Box::pin(async move {
            let mut all = true;
            for batch in entries.chunks(CREATE_BATCH) {
                let question = move |mut client: KvClient| async move {
                    let is_there = |(key, value): &(String, String)| {
                        Compare::value(key.as_str(), CompareOp::Equal, value.as_str())
                    };
                    let transaction = Txn::new()
                        .when(given.iter().map(is_there).collect::<Vec<_>>())
                        .and_then(batch.iter().map(create).collect::<Vec<_>>());
                    let done = client.txn(transaction).await.map_err(problem)?;
                    let is_created = |response: &TxnOpResponse| matches!(response, TxnOpResponse::Txn(created) if created.succeeded());
                    Ok(done.succeeded() && done.op_responses().iter().all(is_created))
                };
                all &= self.ask(Unanswered::GiveUp, question).await?;
            }
            Ok(all)
        })
    }

    fn replace<'a>(&'a self, key: &'a str, from: &'a str, to: &'a str) -> Reply<'a, bool> {
        let question = move |mut client: KvClient| async move {
            // A missing key has no value, so this comparison fails for it.
            let transaction = Txn::new()
                .when([Compare::value(key, CompareOp::Equal, from)])
                .and_then([TxnOp::put(key, to, None)]);
            Ok(client.txn(transaction).await.map_err(problem)?.succeeded())
        };
        Box::pin(self.ask(Unanswered::GiveUp, question))
    }
}

impl Connect for Etcd {
    type Connection = KvClient;

    async fn connect(&self, endpoint: &str) -> Result<KvClient, String> {
        let described = |error: tonic::transport::Error| describe(&error);
        let channel = match &self.tls {
            None => Endpoint::from_shared(format!("http://{endpoint}")).map_err(described)?,
            Some(tls) => {
                let (host, _) = remote::host_and_port(endpoint);
                Endpoint::from_shared(format!("https://{endpoint}"))
                    .and_then(|endpoint| endpoint.tls_config(tls.clone().domain_name(host)))
                    .map_err(described)?
            }
        };
        let channel = channel.connect().await.map_err(described)?;
        // A node that knows that it is cut off fails at once. A request with an expired token was not
        // processed, so it may be sent again.
        let mut options =
            ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
        if let Some((user, password)) = &self.credentials {
            options = options.with_user(user, password);
        }
        let channel = Channel::Tonic(channel);
        let client = Client::from_channel(channel, Some(options)).await.map_err(problem)?;
        Ok(client.kv_client().max_decoding_message_size(LIST_MAX_BYTES))
    }

    /// Returns false, because the channel reconnects by itself before it sends a request.
    fn is_broken(_: &KvClient) -> bool {
        false
    }
}

fn tls(config: &StoreConfig) -> Result<Option<ClientTlsConfig>, FleetStoreError> {
    let Some(files) = &config.tls else { return Ok(None) };
    let unfit = |error: PemError| unusable(config, error.to_string());
    // The files are checked here, because tonic does not say what is wrong with a bad file, and accepts a
    // file without certificates.
    let read = |path| pem::read(path).map_err(unfit);
    pem::certificates(&files.ca).map_err(unfit)?;
    let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&files.ca)?));
    if let Some((cert, key)) = &files.identity {
        pem::certificates(cert).map_err(unfit)?;
        pem::key(key).map_err(unfit)?;
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(Some(tls))
}

fn create((key, value): &(String, String)) -> TxnOp {
    let transaction = Txn::new()
        .when([Compare::create_revision(key.as_str(), CompareOp::Equal, 0)])
        .and_then([TxnOp::put(key.as_str(), value.as_str(), None)]);
    TxnOp::txn(transaction)
}

fn text(entry: KeyValue) -> Result<(String, String), String> {
    let (key, value) = entry.into_key_value();
    let text = |bytes: Vec<u8>| {
        String::from_utf8(bytes).map_err(|error| format!("an entry in it is not text: {error}"))
    };
    Ok((text(key)?, text(value)?))
}

fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    remote::describe("fleet", error)
}

fn problem(error: Error) -> String {
    let status = match error {
        Error::GRpcStatus(status) => status,
        error => return describe(&error),
    };
    let advice = advice(&status);
    let said = match std::error::Error::source(&status) {
        // A network error, whose status code is only guessed on this side.
        Some(source) => describe(source),
        None => status.message().to_owned(),
    };
    match advice {
        Some(advice) => format!("{said}: {advice}"),
        None => said,
    }
}

/// Returns the remedy for an error message of etcd (its `rpctypes/error.go`).
fn advice(status: &Status) -> Option<&'static str> {
    let is = |words: &str| status.message().contains(words);
    if is("invalid user ID or password") {
        Some("check the user in fleet.store and the password in fleet.password_file")
    } else if is("user name is empty") {
        Some("it requires a user: put USER@ before the first host of fleet.store")
    } else if is("authentication is not enabled") {
        Some("leave out USER@ in fleet.store, or enable authentication: etcdctl auth enable")
    } else if status.code() == Code::PermissionDenied {
        Some(
            "grant it: etcdctl role grant-permission ROLE --prefix=true readwrite tombola/, and \
             etcdctl user grant-role USER ROLE",
        )
    } else if is("database space exceeded") {
        Some("compact and defragment it, then: etcdctl alarm disarm")
    } else {
        None
    }
}
