//! A primary of PostgreSQL and its synchronous standby, with a link of these tests in front of each for every
//! instance, and for the other server. The standby is promoted as by an operator: the old primary is ended
//! first, and comes back as the new standby.

use nix::sys::signal::Signal;

use crate::chaos::{Engine, how};
use crate::links::{Cut, Links};
use crate::support::engines::Postgres;
use crate::support::skipped;

/// The names of the servers, for each other and for the links.
const NAMES: [&str; 2] = ["postgres_0", "postgres_1"];

/// Settings of both servers, since each is the primary at times.
const SETTINGS: &[&str] = &[
    // Only the socket in its folder, so no other process can take its port while it is down.
    "listen_addresses=",
    "synchronous_standby_names=postgres_0,postgres_1",
    // Only processes fail, not the machine, so commits need not wait for a busy disk.
    "fsync=off",
    // A standby that was down finds the log that it missed here.
    "wal_keep_size=256MB",
    "wal_retrieve_retry_interval=100ms",
];

/// See the [module](self).
pub(crate) struct Pair {
    pub(crate) links: Links,
    servers: [Postgres; 2],
    primary: usize,
}

impl Pair {
    /// Starts both servers with `settings` in addition. If there is no PostgreSQL, reports that and returns
    /// `None`.
    pub(crate) async fn start(settings: &[&str]) -> Option<Self> {
        if !cfg!(feature = "postgres") {
            skipped("built without the feature postgres");
            return None;
        }
        let settings = [SETTINGS, settings].concat();
        let mut servers = [Postgres::new(&settings)?, Postgres::new(&settings)?];
        let mut links = Links::new();
        for (from, to) in [(0, 1), (1, 0)] {
            let link = links.open(Some(NAMES[from]), NAMES[to], servers[to].socket()).await;
            servers[from].set(format!(
                "primary_conninfo=host={} port={} user=tombola application_name={}",
                link.ip(),
                link.port(),
                NAMES[from],
            ));
        }
        servers[0].init().await;
        servers[0].run().await;
        let mut pair = Self { links, servers, primary: 0 };
        pair.rebuild_standby().await;
        Some(pair)
    }

    fn standby(&self) -> usize {
        1 - self.primary
    }

    pub(crate) fn server(&mut self, role: Role) -> &mut Postgres {
        let index = match role {
            Role::Primary => self.primary,
            Role::Standby => self.standby(),
        };
        &mut self.servers[index]
    }

    /// Cuts the standby off from its primary.
    pub(crate) fn part(&self, cut: Cut) {
        self.links.cut(NAMES[self.standby()], NAMES[self.primary], cut);
    }

    pub(crate) fn join(&self) {
        self.links.heal(NAMES[self.standby()], NAMES[self.primary]);
    }

    /// Waits until the standby has everything that the primary has, because a commit waits for that.
    pub(crate) async fn in_step(&self) {
        self.servers[self.primary].sql("SELECT pg_logical_emit_message(true, 'test', '')").await;
    }

    /// Ends the primary if it is running, and promotes the standby. There is no standby then.
    pub(crate) async fn promote_standby(&mut self) {
        let old = self.server(Role::Primary);
        if old.is_running() {
            old.stop().await;
        }
        self.join();
        self.primary = self.standby();
        self.servers[self.primary].promote().await;
    }

    /// Makes the other server the standby of the primary, with a copy of its data.
    pub(crate) async fn rebuild_standby(&mut self) {
        let [first, second] = &mut self.servers;
        let (primary, standby) = if self.primary == 0 { (first, second) } else { (second, first) };
        standby.copy(primary).await;
        standby.run().await;
        self.in_step().await;
    }
}

/// The faults of one server or both.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    Killed(Role),
    Paused(Role),
    Apart(Cut),
    BothKilled,
    /// The primary fails, and then its standby is promoted.
    Promoted(Loss),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Role {
    Primary,
    Standby,
}

/// The fault of a primary that is replaced by its standby.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Loss {
    Killed,
    Paused,
    /// It is cut off from its standby, and instances keep using it until it is ended.
    Apart(Cut),
}

/// Faults choose a role by number, since neither server keeps its role.
fn role(server: usize) -> Role {
    if server == 0 { Role::Primary } else { Role::Standby }
}

impl Engine for Pair {
    type Fault = Fault;

    const NODES: &str = "a primary of PostgreSQL with a standby";
    const COUNT: usize = 2;
    const HAS_RECEIPTS: bool = true;
    const FAULTS: &[fn(usize, Cut) -> Fault] = &[
        |server, _| Fault::Killed(role(server)),
        |server, _| Fault::Paused(role(server)),
        |_, cut| Fault::Apart(cut),
        |_, _| Fault::BothKilled,
        |_, _| Fault::Promoted(Loss::Killed),
        |_, _| Fault::Promoted(Loss::Paused),
        |_, cut| Fault::Promoted(Loss::Apart(cut)),
    ];

    fn kind(fault: Fault) -> String {
        match fault {
            Fault::Killed(Role::Primary) => "PostgreSQL's primary ended (immediate)".into(),
            Fault::Killed(Role::Standby) => "PostgreSQL's standby ended (immediate)".into(),
            Fault::Paused(Role::Primary) => "PostgreSQL's primary paused (SIGSTOP)".into(),
            Fault::Paused(Role::Standby) => "PostgreSQL's standby paused (SIGSTOP)".into(),
            Fault::Apart(cut) => format!("standby cut off from its primary, {}", how(cut)),
            Fault::BothKilled => "primary and standby ended (immediate)".into(),
            Fault::Promoted(Loss::Killed) => "primary ended (immediate), standby promoted".into(),
            Fault::Promoted(Loss::Paused) => "primary paused, standby promoted".into(),
            Fault::Promoted(Loss::Apart(cut)) => {
                format!("standby cut off from its primary, {}, and promoted", how(cut))
            }
        }
    }

    /// A commit needs both servers.
    fn stops_writes(_: Fault) -> bool {
        true
    }

    async fn begin_fault(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(role) => self.server(role).stop().await,
            Fault::Paused(role) => self.server(role).signal(Signal::SIGSTOP),
            Fault::BothKilled => {
                for server in &mut self.servers {
                    server.stop().await;
                }
            }
            Fault::Promoted(Loss::Killed) => self.server(Role::Primary).stop().await,
            Fault::Promoted(Loss::Paused) => self.server(Role::Primary).signal(Signal::SIGSTOP),
            Fault::Apart(cut) | Fault::Promoted(Loss::Apart(cut)) => self.part(cut),
        }
    }

    async fn end_fault(&mut self, fault: Fault) {
        match fault {
            Fault::Killed(role) => self.server(role).run().await,
            Fault::Paused(role) => self.server(role).signal(Signal::SIGCONT),
            Fault::Apart(_) => self.join(),
            Fault::BothKilled => {
                for server in &mut self.servers {
                    server.run().await;
                }
            }
            Fault::Promoted(_) => {
                self.promote_standby().await;
                self.rebuild_standby().await;
            }
        }
        self.in_step().await;
    }

    async fn address_for(&mut self, client: &str) -> String {
        let mut endpoints = Vec::new();
        for (name, server) in NAMES.iter().zip(&self.servers) {
            endpoints.push(self.links.open(Some(client), name, server.socket()).await.to_string());
        }
        format!("postgres://tombola@{}/postgres", endpoints.join(","))
    }

    fn cut_off(&self, client: &str, cut: Cut) {
        for server in NAMES {
            self.links.cut(client, server, cut);
        }
    }

    fn heal(&self, client: &str) {
        for server in NAMES {
            self.links.heal(client, server);
        }
    }
}
