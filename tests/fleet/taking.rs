//! Taking numbers from instances that may end meanwhile, and what came of all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::Method;
use tokio::task::JoinSet;

use crate::support::{Client, Server, eventually, integers, random};

/// Few: what is shown is the protocol, and numbers come from memory anyway.
const CLIENTS: usize = 4;
/// What they ask for in turn; none is without a count.
const COUNTS: [Option<u32>; 3] = [None, Some(7), None];
/// Before a client that was turned away asks again.
const PAUSE: Duration = Duration::from_millis(5);

/// Clients at work on one instance, until they are told to stop, or it has ended, or has no more.
pub(crate) struct Takers {
    clients: JoinSet<Vec<i64>>,
    taken: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Takers {
    pub(crate) fn start(server: &Server) -> Self {
        let (taken, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let mut clients = JoinSet::new();
        for index in 0..CLIENTS {
            let counts = COUNTS.into_iter().cycle().skip(index);
            let (taken, stop) = (Arc::clone(&taken), Arc::clone(&stop));
            clients.spawn(take(server.client(), counts, taken, stop));
        }
        Self { clients, taken, stop }
    }

    /// Waits until so many came, or the instance has ended.
    pub(crate) async fn reach(&self, count: usize, server: &mut Server) {
        eventually("numbers, or an end", async || {
            let enough = self.taken.load(Ordering::SeqCst) >= count;
            (enough || !server.process.is_running()).then_some(())
        })
        .await;
    }

    pub(crate) async fn stop(self) -> Vec<i64> {
        self.stop.store(true, Ordering::SeqCst);
        self.clients.join_all().await.concat()
    }
}

async fn take(
    client: Client,
    mut counts: impl Iterator<Item = Option<u32>>,
    taken: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
) -> Vec<i64> {
    let mut numbers = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let count = counts.next().expect("for ever");
        let Ok(answer) = client.send(Method::GET, &random("int", count)).await else { break };
        match answer.status {
            200 => {
                let received = integers(&answer.numbers());
                taken.fetch_add(received.len(), Ordering::SeqCst);
                numbers.extend(received);
            }
            503 => tokio::time::sleep(PAUSE).await,
            410 => break,
            status => panic!("{status} {}", answer.body),
        }
    }
    numbers
}

/// Takes about so many, unless it ends before.
pub(crate) async fn take_some(server: &mut Server, count: usize) -> Vec<i64> {
    let takers = Takers::start(server);
    takers.reach(count, server).await;
    takers.stop().await
}

/// Every number that came, and from whom.
#[derive(Default)]
pub(crate) struct Came(HashMap<i64, String>);

impl Came {
    pub(crate) fn note(&mut self, numbers: Vec<i64>, whose: &str) {
        for number in numbers {
            let before = self.0.insert(number, whose.to_owned());
            assert_eq!(before, None, "{number} came twice, the second time from {whose}");
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}
