//! Clients with idempotency keys, of a server that ends at any moment and starts again. Each key is sent until it has
//! a response, and again later: its responses are all the same.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand::RngExt;
use reqwest::Method;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Client, Server, random};

/// The numbers of each request.
pub(crate) const COUNT: u32 = 3;
/// Clients send the first keys without a response, up to this many, so that they often send the same one.
const AHEAD: usize = 3;
/// The pause after a refused request.
const PAUSE: Duration = Duration::from_millis(2);

/// The keys for one pool, and their responses from all servers.
#[derive(Clone)]
pub(crate) struct Keyed {
    pool: &'static str,
    /// The body of the response to each key, by the key's number.
    responses: Arc<Mutex<Vec<Option<String>>>>,
}

/// Running clients.
pub(crate) struct KeyedLoad(JoinSet<()>);

impl KeyedLoad {
    /// Waits until the server is gone.
    pub(crate) async fn join(self) {
        self.0.join_all().await;
    }
}

impl Keyed {
    pub(crate) fn new(pool: &'static str) -> Self {
        Self { pool, responses: Arc::default() }
    }

    /// Starts clients that send keys while there is `work`, until the server is gone.
    pub(crate) fn load(
        &self,
        server: &Server,
        clients: usize,
        work: &watch::Receiver<bool>,
    ) -> KeyedLoad {
        let mut load = JoinSet::new();
        for _ in 0..clients {
            let (keyed, client, mut work) = (self.clone(), server.client(), work.clone());
            load.spawn(async move {
                while keyed.send(&client, keyed.choose()).await.is_some() {
                    // An error means that the server is gone too.
                    let _ = work.wait_for(|work| *work).await;
                }
            });
        }
        KeyedLoad(load)
    }

    /// Sends every key that has no response until it has one, and compares the responses with the receipts: each key
    /// has one, and no number is in two.
    pub(crate) async fn finish(&self, server: &Server) {
        let client = server.client();
        while let Some(key) = self.without_response(0).first() {
            self.send(&client, *key).await.expect("the server runs");
        }
        let listed = client.send(Method::GET, "/receipts").await.unwrap();
        listed.assert_status(200);
        let (mut receipts, mut seen) = (Vec::new(), BTreeSet::new());
        for line in listed.body.lines() {
            let receipt: Value = serde_json::from_str(line).unwrap();
            if receipt["pool"] != self.pool {
                continue;
            }
            let numbers = receipt["numbers"].to_string();
            for number in receipt["numbers"].as_array().unwrap() {
                assert!(seen.insert(number.to_string()), "{number} is in two receipts");
            }
            receipts.push(numbers);
        }
        receipts.sort();
        let mut expected: Vec<_> = self.bodies().iter().map(|body| list_of(body)).collect();
        expected.sort();
        assert_eq!(expected, receipts, "each key has one receipt with the numbers of its response");
    }

    /// Returns the numbers of all responses, as texts. Those of a key are counted once.
    pub(crate) fn numbers(&self) -> Vec<String> {
        let lists = self.bodies();
        let numbers = lists.iter().flat_map(|body| {
            let list = list_of(body);
            let list = list.trim_matches(['[', ']']);
            list.split(',').map(str::to_owned).collect::<Vec<_>>()
        });
        numbers.collect()
    }

    fn bodies(&self) -> Vec<String> {
        self.responses.lock().unwrap().iter().flatten().cloned().collect()
    }

    /// Returns the first keys without a response, after adding keys until there are `least`.
    fn without_response(&self, least: usize) -> Vec<usize> {
        let mut responses = self.responses.lock().unwrap();
        let answered = responses.iter().flatten().count();
        let keys = responses.len().max(answered + least);
        responses.resize(keys, None);
        let open = responses.iter().enumerate().filter(|(_, body)| body.is_none());
        open.map(|(key, _)| key).take(AHEAD).collect()
    }

    /// Returns a key to send: most often one without a response, sometimes an older one.
    fn choose(&self) -> usize {
        let open = self.without_response(AHEAD);
        let mut random = rand::rng();
        match random.random_ratio(1, 5) {
            true => random.random_range(0..=open[0]),
            false => open[random.random_range(0..open.len())],
        }
    }

    /// Sends a key once. Returns `None` if the server is gone.
    async fn send(&self, client: &Client, key: usize) -> Option<()> {
        let name = format!("{}-{key}", self.pool);
        let header = [("idempotency-key", &*name)];
        let target = random(self.pool, Some(COUNT));
        let answer = client.send_with(Method::POST, &target, &header).await.ok()?;
        match answer.status {
            200 => {
                let mut responses = self.responses.lock().unwrap();
                let before = responses[key].get_or_insert_with(|| answer.body.clone());
                assert_eq!(*before, answer.body, "the key {name} has two responses");
            }
            503 => tokio::time::sleep(PAUSE).await,
            status => panic!("{name}: {status} {}", answer.body),
        }
        Some(())
    }
}

/// Returns the list of numbers in a response, as it was sent.
fn list_of(body: &str) -> String {
    let begin = body.find('[').unwrap();
    body[begin..=body.find(']').unwrap()].to_owned()
}
