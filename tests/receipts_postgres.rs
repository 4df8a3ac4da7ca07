//! Receipts of a fleet in a PostgreSQL database: two instances, one database of real processes, and its failures. A
//! key has one response, whichever instance is asked and whatever fails in between.

#![cfg(feature = "postgres")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use reqwest::Method;
use serde::Deserialize;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use support::engines::{Pki, Postgres};
use support::{
    Answer, Client, Config, Failure, PATIENCE, Server, Site, Token, eventually, random, run,
    with_tokens,
};

/// The pause before a request is repeated.
const PAUSE: Duration = Duration::from_millis(20);

/// Only processes fail in these tests, not the machine, so commits need not wait for a busy disk.
const NO_SYNC: &str = "fsync=off";

/// The settings of the two instances of a fleet. Their other store is a file, so that only the receipts notice when
/// the database fails.
struct Fleet {
    config: Config,
    sites: [Site; 2],
    servers: Vec<Server>,
    /// The file through which the instances share their numbers, and the password of the database.
    _folder: TempDir,
}

impl Fleet {
    /// Starts two instances whose receipts are in this database, with these settings in addition.
    async fn start(postgres: &Postgres, set: impl Fn(Config) -> Config) -> Self {
        let mut fleet = Self::new(&[&postgres.endpoint()], set);
        fleet.run().await;
        fleet
    }

    /// Returns two instances that are not started.
    fn new(endpoints: &[&str], set: impl Fn(Config) -> Config) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let password = folder.path().join("password");
        std::fs::write(&password, "secret\n").unwrap();
        let config = Config::new()
            .pool("int", 0, 9_999_999, 2, 20_000)
            .set("fleet.store", format!("'file://{}'", folder.path().join("witness.db").display()))
            .set("fleet.space", "'raffle'")
            .set("receipts.store", format!("'postgres://tombola@{}/postgres'", endpoints.join(",")))
            .set("receipts.password_file", format!("'{}'", password.display()));
        let config = set(config);
        let sites = [Site::new(&config), Site::new(&config)];
        Self { config, sites, servers: Vec::new(), _folder: folder }
    }

    async fn run(&mut self) {
        for site in &self.sites {
            let server = site.start().await;
            server.take("int", Some(1)).await;
            self.servers.push(server);
        }
    }

    async fn stop(&mut self) {
        for server in self.servers.drain(..) {
            server.stop().await;
        }
    }

    fn client(&self, instance: usize) -> Client {
        self.servers[instance].client()
    }

    /// Sends a request with a key to an instance.
    async fn draw(&self, instance: usize, key: &str, count: u32) -> Answer {
        draw(&self.client(instance), key, count).await
    }

    /// Repeats a request with a key until the instance can keep receipts again.
    async fn draw_at_last(&self, instance: usize, key: &str, count: u32) -> Vec<String> {
        draw_at_last(&self.client(instance), key, count).await
    }

    /// Returns the receipts that an instance lists after this one.
    async fn receipts(&self, instance: usize, after: u64) -> Vec<Receipt> {
        let address = self.servers[instance].address().to_string();
        eventually("the receipts", async || receipts(&address, after).await).await
    }

    /// Checks that the receipts are numbered without gaps and their chain is whole, that no number is in two of them,
    /// that no key has two, and that the responses to these keys are what they say.
    async fn assert_books(&self, responses: &BTreeMap<String, Vec<String>>) {
        let receipts = self.receipts(0, 0).await;
        assert_eq!(receipts, self.receipts(1, 0).await, "both instances list the same");
        let seqs: Vec<_> = receipts.iter().map(|receipt| receipt.seq).collect();
        assert_eq!(seqs, (1..=receipts.len() as u64).collect::<Vec<_>>());
        let keys = receipts.iter().filter_map(|receipt| receipt.key_digest.as_ref());
        let distinct: BTreeSet<_> = keys.clone().collect();
        assert_eq!(distinct.len(), keys.count(), "a key has two receipts");
        let numbers = receipts.iter().flat_map(|receipt| receipt.texts());
        let distinct: BTreeSet<_> = numbers.clone().collect();
        assert_eq!(distinct.len(), numbers.count(), "a number is in two receipts");
        let verified = run(self.sites[0].console(&["receipts", "--verify"])).await;
        assert!(verified.status.success(), "{}{}", verified.stdout, verified.stderr);
        let given: BTreeSet<_> = receipts.iter().map(Receipt::texts).collect();
        for (key, numbers) in responses {
            assert!(given.contains(numbers), "the response to {key} has no receipt: {numbers:?}");
        }
    }
}

/// The parts of a receipt that these tests compare.
#[derive(Clone, Debug, Deserialize, PartialEq)]
struct Receipt {
    seq: u64,
    key_digest: Option<String>,
    numbers: Vec<serde_json::Number>,
    digest: String,
}

impl Receipt {
    fn texts(&self) -> Vec<String> {
        self.numbers.iter().map(ToString::to_string).collect()
    }
}

async fn draw(client: &Client, key: &str, count: u32) -> Answer {
    let target = random("int", Some(count));
    client.send_with(Method::POST, &target, &[("idempotency-key", key)]).await.unwrap()
}

async fn draw_at_last(client: &Client, key: &str, count: u32) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = draw(client, key, count).await;
        match answer.status {
            200 => return answer.numbers(),
            503 => {
                let code = answer.parse::<Failure>().code;
                assert!(["receipt_not_saved", "refilling"].contains(&&*code), "{code}");
            }
            status => panic!("{key}: {status} {}", answer.body),
        }
        assert!(Instant::now() < deadline, "{key}: {}", answer.body);
        tokio::time::sleep(PAUSE).await;
    }
}

/// Returns the receipts after this one, or `None` if they can't be read at the moment.
async fn receipts(address: &str, after: u64) -> Option<Vec<Receipt>> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let response = client.get(format!("http://{address}/receipts?after={after}")).send();
    let response = response.await.unwrap();
    if response.status() == 503 {
        return None;
    }
    let text = response.text().await.unwrap();
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    Some(text.lines().map(parse).collect())
}

fn is_replay(answer: &Answer) -> bool {
    answer.header("idempotent-replayed") == Some("true")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_key_at_two_instances_at_once_has_one_response() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let mut responses = BTreeMap::new();
    for round in 0..50 {
        let key = format!("key-{round}");
        let (one, other) = tokio::join!(fleet.draw(0, &key, 3), fleet.draw(1, &key, 3));
        one.assert_status(200);
        assert_eq!(one.body, other.body, "{key}");
        assert!(is_replay(&one) != is_replay(&other), "one of them drew the numbers");
        responses.insert(key, one.numbers());
    }
    fleet.assert_books(&responses).await;
    // A key that was used for another request is refused by both.
    for instance in 0..2 {
        let reused = fleet.draw(instance, "key-0", 4).await;
        assert_eq!((reused.status, reused.parse::<Failure>().code.as_str()), (422, "key_reused"));
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_key_of_many_clients_has_two_responses_and_no_number_two_receipts() {
    const CLIENTS: usize = 16;
    const KEYS: usize = 150;
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let mut clients = JoinSet::new();
    for index in 0..CLIENTS {
        let instances = [fleet.client(0), fleet.client(1)];
        clients.spawn(async move {
            let mut responses = BTreeMap::new();
            for step in 0..KEYS {
                // Half of the clients use the keys in the opposite order.
                let key = if index % 4 < 2 { step } else { KEYS - 1 - step };
                let key_text = format!("key-{key}");
                let count = 1 + key as u32 % 7;
                let client = &instances[(index + step) % 2];
                responses.insert(key_text.clone(), draw_at_last(client, &key_text, count).await);
            }
            responses
        });
    }
    let all = clients.join_all().await;
    for responses in &all {
        assert_eq!(*responses, all[0]);
    }
    assert_eq!(fleet.receipts(0, 0).await.len(), KEYS);
    fleet.assert_books(&all[0]).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_the_same_response_before_and_after_an_outage_of_the_database() {
    let Some(mut postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let before = fleet.draw(0, "before", 5).await.numbers();
    postgres.stop().await;
    for instance in 0..2 {
        for key in ["before", "during"] {
            fleet.draw(instance, key, 5).await.assert_unavailable("receipt_not_saved");
        }
        // Requests without a receipt are served.
        assert_eq!(fleet.servers[instance].take("int", Some(5)).await.len(), 5);
        let address = fleet.servers[instance].address().to_string();
        assert_eq!(receipts(&address, 0).await, None);
    }
    postgres.run().await;
    let mut responses = BTreeMap::new();
    for (key, instances) in [("before", [1, 0]), ("during", [0, 1])] {
        let [one, other] = [
            fleet.draw_at_last(instances[0], key, 5).await,
            fleet.draw_at_last(instances[1], key, 5).await,
        ];
        assert_eq!(one, other, "{key}");
        responses.insert(key.to_owned(), one);
    }
    assert_eq!(responses["before"], before);
    fleet.assert_books(&responses).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_starts_without_its_database() {
    let Some(mut postgres) = Postgres::new(&[NO_SYNC]) else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    fleet.draw(0, "key", 2).await.assert_unavailable("receipt_not_saved");
    assert_eq!(fleet.servers[0].take("int", Some(5)).await.len(), 5);
    postgres.init().await;
    postgres.run().await;
    let numbers = fleet.draw_at_last(0, "key", 2).await;
    assert_eq!(fleet.draw_at_last(1, "key", 2).await, numbers);
    fleet.assert_books(&[("key".to_owned(), numbers)].into()).await;
    fleet.stop().await;
}

/// Clients repeat each request until it is served, while the database is ended again and again, also while it
/// commits. So some commits have an unknown outcome.
#[tokio::test(flavor = "multi_thread")]
async fn no_end_of_the_database_gives_a_key_two_responses() {
    const CLIENTS: usize = 8;
    const ENDS: usize = 12;
    /// The responses between two ends of the database.
    const RESPONSES: usize = 60;
    let Some(mut postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for index in 0..CLIENTS {
        let client = fleet.client(index % 2);
        let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
        clients.spawn(async move {
            let mut responses = BTreeMap::new();
            for request in 0.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                let key = format!("key-{index}-{request}");
                responses.insert(key.clone(), draw_at_last(&client, &key, 4).await);
                served.fetch_add(1, Ordering::SeqCst);
            }
            responses
        });
    }
    for _ in 0..ENDS {
        let before = served.load(Ordering::SeqCst);
        eventually("some responses", async || {
            (served.load(Ordering::SeqCst) >= before + RESPONSES).then_some(())
        })
        .await;
        postgres.stop().await;
        postgres.run().await;
    }
    stop.store(true, Ordering::SeqCst);
    let responses: BTreeMap<_, _> = clients.join_all().await.into_iter().flatten().collect();
    for (key, numbers) in &responses {
        for instance in 0..2 {
            assert_eq!(fleet.draw_at_last(instance, key, 4).await, *numbers, "{key}");
        }
    }
    fleet.assert_books(&responses).await;
    fleet.stop().await;
}

/// The fate of the next commit on a [`Link`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    Nothing,
    /// The commit does not arrive, and the connection is closed.
    Request,
    /// The commit arrives, but the connection is closed instead of the response.
    Response,
    /// Neither the commit nor anything after it arrives, and the database is not told that its client is gone.
    Everything,
}

/// A proxy before the database that can lose a commit.
struct Link {
    endpoint: String,
    loss: watch::Sender<Loss>,
    _proxy: JoinSet<()>,
}

impl Link {
    async fn open(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = listener.local_addr().unwrap().to_string();
        let loss = watch::Sender::new(Loss::Nothing);
        let mut proxy = JoinSet::new();
        let next = loss.clone();
        proxy.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = UnixStream::connect(&socket).await;
                if let Ok(server) = server {
                    connections.spawn(carry(client, server, next.clone()));
                }
            }
        });
        Self { endpoint, loss, _proxy: proxy }
    }

    /// Loses the next commit in this way.
    fn lose(&self, loss: Loss) {
        self.loss.send_replace(loss);
    }

    fn has_lost(&self) -> bool {
        *self.loss.borrow() == Loss::Nothing
    }
}

/// Carries bytes in both directions until either side closes, or until a commit is to be lost.
async fn carry(mut client: TcpStream, mut server: UnixStream, loss: watch::Sender<Loss>) {
    /// The message as it is sent by itself, after the statements of a save were confirmed.
    const COMMIT: &[u8] = b"Q\0\0\0\x0bCOMMIT\0";
    let (mut asked, mut answered) = (Vec::new(), Vec::new());
    loop {
        let done = tokio::select! {
            read = client.read_buf(&mut asked) => match read {
                Ok(1..) => {
                    let next = match asked == COMMIT {
                        true => loss.send_replace(Loss::Nothing),
                        false => Loss::Nothing,
                    };
                    match next {
                        Loss::Request => return,
                        Loss::Everything => std::future::pending().await,
                        Loss::Nothing | Loss::Response => {}
                    }
                    let sent = server.write_all(&asked).await;
                    if next == Loss::Response {
                        let _ = server.read_buf(&mut answered).await;
                        return;
                    }
                    asked.clear();
                    sent
                }
                _ => return,
            },
            read = server.read_buf(&mut answered) => match read {
                Ok(1..) => {
                    let sent = client.write_all(&answered).await;
                    answered.clear();
                    sent
                }
                _ => return,
            },
        };
        if done.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_whose_outcome_is_unknown_is_found_out() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let link = Link::open(postgres.socket()).await;
    let mut fleet = Fleet::new(&[&link.endpoint], |config| config);
    fleet.run().await;
    let mut responses = BTreeMap::new();
    // The first request creates the tables.
    responses.insert("first".to_owned(), fleet.draw_at_last(0, "first", 2).await);

    // The receipt is saved, so the request that waited for it gets its numbers.
    link.lose(Loss::Response);
    let saved = fleet.draw(0, "saved", 2).await;
    assert!(link.has_lost());
    saved.assert_status(200);
    assert!(!is_replay(&saved));
    assert_eq!(fleet.receipts(0, 1).await.len(), 1);

    // It is not saved, so the request is refused, and gets numbers when it is repeated.
    link.lose(Loss::Request);
    let lost = fleet.draw(0, "lost", 2).await;
    assert!(link.has_lost());
    lost.assert_unavailable("receipt_not_saved");
    assert_eq!(fleet.receipts(0, 2).await, []);
    responses.insert("lost".to_owned(), fleet.draw_at_last(0, "lost", 2).await);

    responses.insert("saved".to_owned(), saved.numbers());
    for (key, numbers) in &responses {
        assert_eq!(fleet.draw_at_last(1, key, 2).await, *numbers, "{key}");
    }
    fleet.assert_books(&responses).await;
    fleet.stop().await;
}

/// Story: a primary waited with a commit for its standby, and crashed. After its restart it showed the receipt,
/// which no standby had. A repetition got its numbers, and would have got others from the standby that took over.
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_that_no_standby_has_is_not_handed_out() {
    let Some(mut postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    for instance in 0..2 {
        fleet.draw_at_last(instance, &format!("first-{instance}"), 1).await;
    }
    postgres.sql("ALTER SYSTEM SET synchronous_standby_names = 'missing'").await;
    postgres.sql("SELECT pg_reload_conf()").await;
    eventually("the server to wait for a standby", async || {
        let names = postgres.query("SHOW synchronous_standby_names").await;
        (names == "missing").then_some(())
    })
    .await;
    let client = fleet.client(0);
    let waiting = tokio::spawn(async move { draw(&client, "key", 3).await });
    eventually("a commit that waits for a standby", async || {
        let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        (postgres.query(waits).await != "0").then_some(())
    })
    .await;
    postgres.stop().await;
    postgres.run().await;
    let shown = postgres.query("SELECT count(*) FROM tombola_receipts WHERE seq = 3").await;
    assert_eq!(shown, "1", "the crash made the commit visible");

    fleet.draw(1, "key", 3).await.assert_unavailable("receipt_not_saved");
    let address = fleet.servers[1].address().to_string();
    assert_eq!(receipts(&address, 0).await, None, "nor is it listed");
    waiting.await.unwrap().assert_unavailable("receipt_not_saved");

    postgres.sql("ALTER SYSTEM RESET synchronous_standby_names").await;
    postgres.sql("SELECT pg_reload_conf()").await;
    let numbers = fleet.draw_at_last(1, "key", 3).await;
    assert_eq!(fleet.draw_at_last(0, "key", 3).await, numbers);
    let receipts = fleet.receipts(0, 2).await;
    assert_eq!(receipts.len(), 1, "the commit was kept");
    assert_eq!(receipts[0].texts(), numbers);
    fleet.assert_books(&[("key".to_owned(), numbers)].into()).await;
    fleet.stop().await;
}

/// Story: an instance was cut off in the middle of a save. The database did not notice, and kept the lock for which
/// the other instances wait.
#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_is_cut_off_in_a_save_does_not_stop_the_others() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let link = Link::open(postgres.socket()).await;
    let mut fleet = Fleet::new(&[&link.endpoint], |config| config);
    fleet.run().await;
    fleet.draw_at_last(0, "first", 1).await;
    link.lose(Loss::Everything);
    let other = async {
        eventually("a save that is cut off", async || link.has_lost().then_some(())).await;
        fleet.draw_at_last(1, "other", 2).await
    };
    let (cut_off, other) = tokio::join!(fleet.draw(0, "cut-off", 2), other);
    cut_off.assert_unavailable("receipt_not_saved");
    let again = fleet.draw_at_last(0, "cut-off", 2).await;
    let responses = [("cut-off".to_owned(), again), ("other".to_owned(), other)].into();
    fleet.assert_books(&responses).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_audit_skips_nothing_while_both_instances_write() {
    const CLIENTS: usize = 8;
    const ENOUGH: u64 = 1_500;
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet =
        Fleet::start(&postgres, |config| config.set("pools.int.receipts", "'all'")).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut writers = JoinSet::new();
    for index in 0..CLIENTS {
        let (client, stop) = (fleet.client(index % 2), Arc::clone(&stop));
        writers.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let answer = client.send(Method::POST, &random("int", None)).await.unwrap();
                assert!([200, 503].contains(&answer.status), "{}", answer.body);
            }
        });
    }
    let mut audits = JoinSet::new();
    for server in &fleet.servers {
        let address = server.address().to_string();
        audits.spawn(async move {
            let mut seen: Vec<Receipt> = Vec::new();
            while seen.len() < ENOUGH as usize {
                let after = seen.last().map_or(0, |receipt| receipt.seq);
                seen.extend(receipts(&address, after).await.unwrap());
            }
            seen.truncate(ENOUGH as usize);
            seen
        });
    }
    let audits = audits.join_all().await;
    stop.store(true, Ordering::SeqCst);
    writers.join_all().await;
    let seqs: Vec<_> = audits[0].iter().map(|receipt| receipt.seq).collect();
    assert_eq!(seqs, (1..=ENOUGH).collect::<Vec<_>>());
    assert_eq!(audits[0], audits[1]);
    fleet.assert_books(&BTreeMap::new()).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_looked_up_at_any_instance_also_if_look_ups_were_off_when_it_was_given() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config.set("receipts.lookups", false)).await;
    let mut numbers = fleet.draw_at_last(0, "large", 10_000).await;
    numbers.extend(fleet.draw_at_last(1, "small", 1).await);
    fleet.stop().await;
    for site in &fleet.sites {
        let config = fleet.config.clone().set("receipts.lookups", true);
        site.configure(&config.set("receipts.lookups_per_second", 1_000));
    }
    fleet.run().await;
    numbers.extend(fleet.draw_at_last(0, "later", 3).await);
    let unknown = fleet.servers[0].take("int", None).await;
    for (index, number) in numbers.iter().rev().step_by(399).enumerate() {
        let answer = fleet.servers[index % 2].get(&format!("/receipts/int/{number}")).await;
        answer.assert_status(200);
        assert!(answer.parse::<Receipt>().texts().contains(number));
    }
    assert_ne!(postgres.query("SELECT count(*) FROM tombola_numbers").await, "0");
    for instance in 0..2 {
        let target = format!("/receipts/int/{}", unknown[0]);
        fleet.servers[instance].get(&target).await.assert_status(404);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_up_finds_only_receipts_of_the_callers_owner_unless_it_audits() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let owned = async |owner: &str| {
        let draw = Token::new(owner, "draw").await;
        let lookup = Token::new(&format!("{owner}-look"), "lookup").await;
        let entry = lookup.entry.replace(" }", &format!(", owner = '{owner}' }}"));
        (draw, Token { entry, ..lookup })
    };
    let owners = [owned("shop").await, owned("rival").await];
    let auditor = Token::new("auditor", "audit").await;
    let fleet = Fleet::new(&[&postgres.endpoint()], |config| {
        let [(draw, look), (rival_draw, rival_look)] = &owners;
        with_tokens(config, &[draw, look, rival_draw, rival_look, &auditor])
            .set("receipts.lookups_per_second", 1_000)
    });
    let server = fleet.sites[0].start().await;
    let look_up = async |number: &str, token: &Token| {
        let target = format!("/receipts/int/{number}");
        let headers = [("authorization", &*token.header())];
        server.client().send_with(Method::GET, &target, &headers).await.unwrap()
    };
    // The first number is in the index, and the second one is not yet.
    for (owner, count) in [(0, 2_000), (1, 1)] {
        let target = random("int", Some(count));
        let headers = [("authorization", &*owners[owner].0.header()), ("idempotency-key", "key")];
        let answer = eventually("numbers", async || {
            let answer = server.client().send_with(Method::POST, &target, &headers).await.unwrap();
            (answer.status == 200).then_some(answer)
        });
        let number = &answer.await.numbers()[0];
        look_up(number, &owners[owner].1).await.assert_status(200);
        look_up(number, &auditor).await.assert_status(200);
        look_up(number, &owners[1 - owner].1).await.assert_status(404);
    }
    server.stop().await;
}

/// The tables are made to look older, since a key is kept for an hour at least.
#[tokio::test(flavor = "multi_thread")]
async fn keys_expire_by_the_clock_of_the_database_unless_it_jumps() {
    const OLDER: &str = "
        UPDATE tombola_buckets SET began_at = began_at - interval '20 min';
        UPDATE tombola_buckets SET ended_at = ended_at - interval '2 h';";
    const BUCKETS: &str = "SELECT count(*) FROM tombola_buckets";
    const TABLES: &str = "
        SELECT count(*) FROM pg_class WHERE relname LIKE 'tombola_keys\\__' AND relkind = 'r'";
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config.set("receipts.keep", "'1h'")).await;
    let old = fleet.draw_at_last(0, "old", 2).await;
    fleet.stop().await;
    postgres.sql(OLDER).await;

    // A start begins a bucket, and its first request removes expired ones.
    fleet.run().await;
    let new = fleet.draw_at_last(0, "new", 2).await;
    assert_eq!(fleet.draw_at_last(0, "old", 2).await, old, "its hour has just begun");
    assert_eq!(postgres.query(BUCKETS).await, "2");
    fleet.stop().await;
    postgres.sql(OLDER).await;
    postgres.sql("UPDATE tombola_heads SET clock_at = clock_at - interval '1 day'").await;

    // The clock seems to have jumped by a day, so nothing expires.
    fleet.run().await;
    assert_eq!(fleet.draw_at_last(1, "new", 2).await, new);
    fleet.servers[1].process.says("the clock is far ahead").await;
    assert_eq!(fleet.draw_at_last(1, "old", 2).await, old);
    fleet.stop().await;
    postgres.sql("UPDATE tombola_heads SET clock_at = now()").await;

    fleet.run().await;
    assert_eq!(fleet.draw_at_last(0, "new", 2).await, new);
    fleet.servers[0].process.says("idempotency keys expired").await;
    assert_eq!(postgres.query(TABLES).await, "2");
    let again = fleet.draw_at_last(1, "old", 2).await;
    assert_ne!(again, old, "the key has expired");
    assert_eq!(fleet.draw_at_last(1, "new", 2).await, new);
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_lost_receipts_is_noticed() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    fleet.draw_at_last(0, "first", 1).await;
    fleet.draw_at_last(0, "second", 1).await;
    // The content of a standby that missed the last commit.
    postgres
        .sql(
            "UPDATE tombola_heads SET seq = 1, digest = (SELECT digest FROM tombola_receipts WHERE seq = 1);
             DELETE FROM tombola_keys WHERE seq = 2;
             DELETE FROM tombola_receipts WHERE seq = 2",
        )
        .await;
    let third = fleet.draw_at_last(0, "third", 1).await;
    fleet.servers[0].process.says("the database has lost the last receipt").await;
    fleet.assert_books(&[("third".to_owned(), third)].into()).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_reads_a_database_and_finds_a_receipt_that_was_changed() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let console = async |words: &[&str]| run(fleet.sites[1].console(words)).await;
    let empty = console(&["receipts", "--verify"]).await;
    assert!(
        empty.stdout.starts_with("receipts: 0 receipts, 0 numbers, head 0 "),
        "{}",
        empty.stderr
    );
    for (key, label) in [("one", "first"), ("other", "second")] {
        let target = format!("/random?count=3&label={label}");
        let headers = [("idempotency-key", key)];
        let answer = fleet.client(0).send_with(Method::POST, &target, &headers).await.unwrap();
        answer.assert_status(200);
    }
    let receipts = fleet.receipts(0, 0).await;
    let printed = console(&["receipts", "--format", "ndjson"]).await.stdout;
    let printed: Vec<Receipt> =
        printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(printed, receipts);
    let head = console(&["receipts", "--head"]).await.stdout;
    assert_eq!(head.trim(), format!("2 {}", receipts[1].digest));
    let number = receipts[0].texts()[0].clone();
    let found = console(&["receipts", "--pool", "int", "--number", &number]).await.stdout;
    assert_eq!(serde_json::from_str::<Receipt>(&found).unwrap(), receipts[0]);

    let erased = console(&["receipts", "--erase-label", "first"]).await.stdout;
    assert!(erased.starts_with("receipts that had the label: 1\n"), "{erased}");
    assert_eq!(console(&["receipts", "--label", "first"]).await.stdout, "");
    fleet.assert_books(&BTreeMap::new()).await;

    let change = |column: &str| format!("UPDATE tombola_receipts SET {column} WHERE seq = 2");
    for (damage, repair) in [
        ("owner = 'another'", "owner = ''"),
        ("label = 'third'", "label = 'second'"),
        ("at = at - interval '1 ms'", "at = at + interval '1 ms'"),
        ("seq = 3", "owner = ''"),
    ] {
        postgres.sql(&change(damage)).await;
        let found = console(&["receipts", "--verify"]).await;
        assert_eq!(found.status.code(), Some(1), "{damage}: {}", found.stdout);
        assert!(found.stdout.contains("violation: receipt"), "{damage}: {}", found.stdout);
        postgres.sql(&change(repair)).await;
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_is_reached_by_tls_and_password_and_errors_name_their_settings() {
    let pki = Pki::new();
    let Some(postgres) = Postgres::start(&[NO_SYNC], Some(&pki)).await else { return };
    let path = |name: &str| format!("'{}'", pki.path(name).display());
    let mut fleet = Fleet::start(&postgres, |config| {
        let config = config.set("receipts.tls.ca", path("ca.pem"));
        let config = config.set("receipts.tls.cert", path("client.pem"));
        config.set("receipts.tls.key", path("client.key"))
    })
    .await;
    let numbers = fleet.draw_at_last(0, "key", 2).await;
    assert_eq!(fleet.draw_at_last(1, "key", 2).await, numbers);
    fleet.stop().await;

    let wrong = fleet.sites[0].folder().join("wrong");
    std::fs::write(&wrong, "wrong\n").unwrap();
    let wrong = format!("'{}'", wrong.display());
    for (key, value, advice) in [
        ("receipts.password_file", &*wrong, "the password in receipts.password_file"),
        ("receipts.tls.ca", &*path("other-ca.pem"), "receipts.tls.ca does not lead to"),
    ] {
        fleet.sites[0].configure(&fleet.config.clone().set(key, value));
        let server = fleet.sites[0].start().await;
        server.take("int", Some(1)).await;
        draw(&server.client(), "key", 2).await.assert_unavailable("receipt_not_saved");
        server.process.says(advice).await;
        server.stop().await;
    }
    for key in ["receipts.password_file", "receipts.tls.ca"] {
        fleet.sites[0].configure(&fleet.config.clone().set(key, "'nowhere'"));
        let refusal = fleet.sites[0].refusal().await;
        assert!(refusal.contains("nowhere"), "{refusal}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn spaces_in_one_database_share_no_keys() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    let mut other = Fleet::start(&postgres, |config| config.set("fleet.space", "'other'")).await;
    let ours = fleet.draw_at_last(0, "key", 2).await;
    let theirs = other.draw(0, "key", 3).await;
    theirs.assert_status(200);
    assert!(!is_replay(&theirs));
    fleet.assert_books(&[("key".to_owned(), ours)].into()).await;
    other.assert_books(&[("key".to_owned(), theirs.numbers())].into()).await;
    fleet.stop().await;
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_without_a_store_of_receipts_refuses_keys() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::new()
        .pool("int", 0, 99_999, 2, 1_000)
        .set("fleet.store", format!("'file://{}'", folder.path().join("witness.db").display()))
        .set("fleet.space", "'raffle'");
    let site = Site::new(&config);
    let server = site.start().await;
    let refused = draw(&server.client(), "key", 1).await;
    assert_eq!((refused.status, refused.parse::<Failure>().code.as_str()), (400, "keys_off"));
    server.stop().await;
}

/// Story: the database stood still for the length of a commit. Its instance gave up waiting, and did not know whether
/// the receipt was saved.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_stands_still_gives_no_key_two_responses() {
    let Some(postgres) = Postgres::start(&[NO_SYNC], None).await else { return };
    let mut fleet = Fleet::start(&postgres, |config| config).await;
    fleet.draw_at_last(0, "first", 1).await;
    fleet.draw_at_last(1, "first", 1).await;
    postgres.signal(Signal::SIGSTOP);
    let (one, other) = tokio::join!(fleet.draw(0, "key", 2), fleet.draw(1, "key", 2));
    one.assert_unavailable("receipt_not_saved");
    other.assert_unavailable("receipt_not_saved");
    postgres.signal(Signal::SIGCONT);
    let numbers = fleet.draw_at_last(0, "key", 2).await;
    assert_eq!(fleet.draw_at_last(1, "key", 2).await, numbers);
    fleet.assert_books(&[("key".to_owned(), numbers)].into()).await;
    fleet.stop().await;
}
