//! A standby of PostgreSQL that is promoted without some commits of its primary.

use std::time::Duration;

use crate::chaos::Engine;
use crate::links::Cut;
use crate::postgres::{Pair, Role};
use crate::store::in_fleet;
use crate::support::{Config, Finished, Server, Site, integers, random, run};
use crate::taking::{Came, NOT_OURS, take_some, take_until_not_ours};

const ENOUGH: usize = 1_500;

/// Replication is asynchronous, so the primary acknowledges steps that its standby never receives.
#[tokio::test(flavor = "multi_thread")]
async fn no_instance_goes_on_with_a_standby_that_misses_its_steps() {
    let Some(mut pair) = Pair::start(&["synchronous_commit=local"]).await else { return };
    let config = in_fleet(Config::new(), &pair.address_for("instance").await)
        .pool("int", 0, 99_999, 2, 500)
        .set("fleet.lease_rows", 32);
    let names = ["the running instance", "the stopped instance"];
    let sites = names.map(|_| Site::new(&config));
    let mut came = Came::default();
    let mut servers = Vec::new();
    for (site, name) in sites.iter().zip(names) {
        let mut server = site.start().await;
        came.note(take_some(&mut server, ENOUGH).await, name);
        servers.push(server);
    }
    pair.part(Cut::Refused);
    for (server, name) in servers.iter_mut().zip(names) {
        came.note(take_some(server, ENOUGH).await, name);
    }
    servers.pop().unwrap().stop().await;
    pair.promote_standby().await;

    let stderr = take_until_not_ours(servers.pop().unwrap(), &mut came, names[0]).await;
    assert!(stderr.contains("the store is behind this data folder"), "{stderr}");
    for site in &sites {
        let Err(Finished { status, stderr, .. }) = Server::start_or_end(site.tombola()).await
        else {
            panic!("it started although the store lacks its steps");
        };
        assert_eq!(status.code(), Some(NOT_OURS), "{stderr}");
        let reseeded = run(site.console(&["fleet", "reseed"])).await;
        assert_eq!(reseeded.status.code(), Some(0), "{}", reseeded.stderr);
    }
    for (site, name) in sites.iter().zip(names) {
        let mut server = site.start().await;
        came.note(take_some(&mut server, ENOUGH).await, name);
        server.stop().await;
    }
}

/// Story: a primary without its standby crashed twice. Commits that had waited for the standby, and were
/// never acknowledged, could be read after each crash. An instance took its claims and its step as committed,
/// and handed out numbers. The standby, which had neither, was promoted, and another instance claimed the
/// same partitions.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_primary_shows_before_its_standby_has_it_is_not_relied_on() {
    const CRASHES: usize = 8;
    /// The instance stops waiting for a commit after two seconds, and checks whether it was made.
    const TRIES: usize = 60;
    const PAUSE: Duration = Duration::from_millis(50);
    let Some(mut pair) = Pair::start(&[]).await else { return };
    let config = in_fleet(Config::new(), &pair.address_for("instance").await)
        .pool("int", 0, 9_999, 2, 100)
        .set("fleet.lease_rows", 32);
    // The standby has the space.
    Site::new(&config.clone().set("fleet.claim", 1)).start().await.stop().await;
    let config = config.set("fleet.claim", 4_096);
    let (site, other) = (Site::new(&config), Site::new(&config));
    pair.part(Cut::Refused);
    let mut came = Came::default();
    let mut first = Server::start_or_end(site.tombola()).await.ok();
    for _ in 0..CRASHES {
        pair.server(Role::Primary).stop().await;
        pair.server(Role::Primary).run().await;
        let Some(server) = &first else {
            first = Server::start_or_end(site.tombola()).await.ok();
            continue;
        };
        for _ in 0..TRIES {
            let answer = server.get(&random("int", Some(5))).await;
            if answer.status == 200 {
                came.note(integers(&answer.numbers()), "the instance of the old primary");
            }
            tokio::time::sleep(PAUSE).await;
        }
        if came.count() > 0 {
            break;
        }
    }
    drop(first);
    pair.promote_standby().await;
    pair.rebuild_standby().await;
    let mut second = other.start().await;
    came.note(take_some(&mut second, 5_000).await, "another, of the promoted standby");
}
