//! Clients that take numbers from instances that may end, and the numbers received from all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::Method;
use tokio::task::JoinSet;

use crate::support::{Client, Finished, Server, eventually, integers, random};

/// A few are enough: these tests exercise the protocol, and numbers are served from memory.
const CLIENTS: usize = 4;
/// The counts that clients ask for in turn; `None` is a request without a count.
const COUNTS: [Option<u32>; 3] = [None, Some(7), None];
/// The pause of a client after a refused request.
const PAUSE: Duration = Duration::from_millis(5);

/// The exit code for a folder that is not the instance's own, or that the store contradicts.
pub(crate) const NOT_OURS: i32 = 5;

/// Takes numbers until the instance ends because its folder is not its own. Returns its stderr.
pub(crate) async fn take_until_not_ours(mut server: Server, came: &mut Came, name: &str) -> String {
    let takers = Takers::start(&server);
    takers.reach(usize::MAX, &mut server).await;
    came.note(takers.stop().await, name);
    let Finished { status, stderr, .. } = server.process.finish().await;
    assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
    stderr
}

/// Clients of one instance. They run until they are stopped, the instance ends, or the range is used up.
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

    /// Waits until the clients have received `count` numbers, or the instance has ended.
    pub(crate) async fn reach(&self, count: usize, server: &mut Server) {
        eventually("enough numbers or the end of the instance", async || {
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
        let count = counts.next().expect("counts repeat endlessly");
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

/// Takes about `count` numbers, or fewer if the instance ends before.
pub(crate) async fn take_some(server: &mut Server, count: usize) -> Vec<i64> {
    let takers = Takers::start(server);
    takers.reach(count, server).await;
    takers.stop().await
}

/// All numbers received, with the instance that handed them out.
#[derive(Default)]
pub(crate) struct Came(HashMap<i64, String>);

impl Came {
    pub(crate) fn note(&mut self, numbers: Vec<i64>, whose: &str) {
        for number in numbers {
            let before = self.0.insert(number, whose.to_owned());
            assert_eq!(before, None, "{number} was issued twice, the second time by {whose}");
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }
}
