//! Each number of a range is handed out, exactly once, whatever the clients ask for and however the server
//! ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::ops::RangeInclusive;

use support::{Config, Server, Site, assert_each_once, missing};

const RESTARTS: usize = 20;

/// Story: the refiller did not check the ledger, or built two shards from one draw. In a small range, that
/// repeats a number within the first refills.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_range_comes_out_once_each_to_64_clients() {
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 2, 100));
    let server = site.start().await;
    let numbers = server.drain("int", 64, &[None, Some(1), Some(7), None, Some(40)]).await;
    assert_each_once(&numbers, 1..=1_000);
    server.stop().await;
}

/// The same with more shards, many generations of each, and leases smaller than the counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_larger_range_comes_out_once_each_to_64_clients() {
    let config = Config::new().pool("int", -50_000, 49_999, 4, 2_000).set("lease.rows", 64);
    let site = Site::new(&config);
    let server = site.start().await;
    let numbers = server.drain("int", 64, &[None, Some(1), Some(10), Some(100), Some(500)]).await;
    assert_each_once(&numbers, -50_000..=49_999);
    server.stop().await;
}

/// Strict mode uses leases differently: each number is committed on its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_strict_pool_comes_out_once_each_to_64_clients() {
    let config = Config::new().pool("int", 1, 5_000, 2, 400).set("lease.rows", 0);
    let site = Site::new(&config);
    let server = site.start().await;
    let numbers = server.drain("int", 64, &[None, None, Some(3), Some(30)]).await;
    assert_each_once(&numbers, 1..=5_000);
    server.stop().await;
}

/// Story: ten seats were left, a group asked for eleven and was refused, and the ten were gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_takes_all_or_none() {
    for lease_rows in [0, 4, 1024] {
        let config = Config::new().pool("int", 1, 100, 2, 30).set("lease.rows", lease_rows);
        let site = Site::new(&config);
        let server = site.start().await;
        let mut numbers = Vec::new();
        for _ in 0..9 {
            numbers.extend(server.take("int", Some(10)).await);
        }

        for count in [11, 30, 10_000] {
            support::eventually("a final answer", async || {
                let answer = server.get(&format!("/random?count={count}")).await;
                match answer.status {
                    // The server does not know yet that the range is used up.
                    503 => answer.assert_refilling(),
                    _ => answer.assert_exhausted(),
                }
                (answer.status == 410).then_some(())
            })
            .await;
        }

        numbers.extend(server.take("int", Some(10)).await);
        assert_each_once(&numbers, 1..=100);
        server.get("/random").await.assert_exhausted();
        server.stop().await;
    }
}

/// Story: a shard held five numbers and its next generation a hundred. A request for ten found too few in
/// rotation and took none, so the shard never became empty and was never swapped, and "please retry shortly"
/// never came true.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_is_served_across_the_end_of_a_generation() {
    let site = Site::new(&Config::new().pool("int", 1, 1_000, 1, 100));
    site.fill().await;
    let server = site.start().await;
    let mut numbers = Vec::new();
    for count in [95, 10, 97, 50, 99, 100] {
        numbers.extend(server.take("int", Some(count)).await);
    }
    assert_eq!(missing(&numbers, 1..=1_000), 1_000 - 451);
    server.stop().await;
}

/// Story: a shard was above its low-water mark, so its next generation was not built. A request for more
/// numbers than it held was told to "retry shortly" without end.
#[tokio::test(flavor = "multi_thread")]
async fn a_count_larger_than_what_is_left_is_served_above_the_low_water_mark() {
    let config = Config::new().pool("int", 1, 1_000, 1, 100).set("refill.low_water", 0.01);
    let site = Site::new(&config);
    site.fill().await;
    let server = site.start().await;
    let mut numbers = server.take("int", Some(5)).await;
    for count in [97, 100, 250] {
        numbers.extend(server.take("int", Some(count)).await);
    }
    assert_eq!(missing(&numbers, 1..=1_000), 1_000 - 452);
    server.stop().await;
}

/// Story: rows that were leased but not handed out stayed marked as used after a stop. Each deploy burned a
/// thousand numbers of every shard, and the range was never issued completely.
#[tokio::test(flavor = "multi_thread")]
async fn graceful_restarts_burn_nothing() {
    for lease_rows in [1024, 16, 0] {
        let config = Config::new().pool("int", 1, 60_000, 2, 2_000).set("lease.rows", lease_rows);
        let restarts =
            Restarts { per_run: 500, clients: 8, counts: &[None, Some(20), None, Some(1), None] };
        let burned = restarts.burned(&config, 1..=60_000, Server::stop).await;
        assert_eq!(burned, 0, "with leases of {lease_rows}");
    }
}

/// Story: a number was handed out, the process was killed before its row was marked, and the next run handed
/// it out again. Or a run marked half of the shard to be safe, and burned it when it ended.
#[tokio::test(flavor = "multi_thread")]
async fn kills_repeat_nothing_and_burn_at_most_the_leases() {
    let config = Config::new().pool("int", 1, 100_000, 2, 2_000).set("lease.rows", 16);
    let restarts =
        Restarts { per_run: 1_000, clients: 16, counts: &[None, None, Some(20), Some(1)] };
    let burned = restarts.burned(&config, 1..=100_000, Server::kill).await;
    restarts.assert_burned_at_most(2 * 2 * 16, burned);
}

/// The same with the default lease, which is larger than what a run takes.
#[tokio::test(flavor = "multi_thread")]
async fn kills_burn_at_most_the_leases_of_the_default_size() {
    let config = Config::new().pool("int", 1, 150_000, 2, 10_000);
    let restarts = Restarts { per_run: 500, clients: 8, counts: &[None, Some(10)] };
    let burned = restarts.burned(&config, 1..=150_000, Server::kill).await;
    restarts.assert_burned_at_most(2 * 2 * 1024, burned);
}

/// In strict mode a commit is in progress nearly all the time, so nearly every kill interrupts one. A number
/// that was served before its commit would be repeated.
#[tokio::test(flavor = "multi_thread")]
async fn kills_of_a_strict_server_burn_only_what_was_in_flight() {
    let config = Config::new().pool("int", 1, 60_000, 2, 2_000).set("lease.rows", 0);
    let restarts = Restarts { per_run: 500, clients: 16, counts: &[None, None, None, Some(5)] };
    let burned = restarts.burned(&config, 1..=60_000, Server::kill).await;
    restarts.assert_burned_at_most(0, burned);
}

/// Runs of a server under load, each ended while the clients keep sending requests.
struct Restarts {
    /// The count of numbers received before a run is ended.
    per_run: usize,
    clients: usize,
    counts: &'static [Option<u32>],
}

impl Restarts {
    /// Ends [`RESTARTS`] runs with `end`, then drains the range. Fails if a number was repeated, and returns
    /// how many numbers were never received.
    async fn burned(
        &self,
        config: &Config,
        range: RangeInclusive<i64>,
        end: impl AsyncFn(Server),
    ) -> usize {
        let site = Site::new(config);
        let mut numbers = Vec::new();
        for _ in 0..RESTARTS {
            let server = site.start().await;
            let mut load = server.load("int", self.clients, self.counts);
            load.reach(self.per_run).await;
            end(server).await;
            numbers.extend(load.join_numbers().await);
        }
        let server = site.start().await;
        let counts = &[None, Some(100), Some(1_000)];
        numbers.extend(server.drain("int", self.clients, counts).await);
        server.stop().await;
        missing(&numbers, range)
    }

    /// Fails if more numbers were burned than the kills account for. `leased` is the most that one kill may
    /// burn in addition to what was in flight.
    fn assert_burned_at_most(&self, leased: usize, burned: usize) {
        let largest = self.counts.iter().map(|count| count.unwrap_or(1)).max();
        let in_flight = self.clients * largest.unwrap() as usize;
        let bound = RESTARTS * (leased + in_flight);
        assert!(burned <= bound, "{burned} burned, at most {bound} allowed");
    }
}
