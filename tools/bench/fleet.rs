//! The cost of a shared space: instances of a fleet beside each other, and the one etcd node that they
//! share. All of them use this machine's cores, so more instances are not faster here. The cost of each
//! number for the store shows how large a fleet can be.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, ensure};

use crate::Plan;
use crate::drive::{Load, ask, drive};
use crate::peers::{free_address, is_installed, wait_for};
use crate::report::Report;
use crate::side::{Side, Site, cpu_seconds};

/// Numbers of instances.
const FLEETS: [usize; 3] = [1, 2, 4];

/// One node without others, killed when dropped. Every write is synced by it alone.
struct Etcd {
    process: Child,
    client: SocketAddr,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Measures fleets of 1, 2 and 4 instances, where etcd is installed and compiled in.
pub(crate) fn fleet(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    if !cfg!(feature = "etcd") || !is_installed("etcd")? {
        eprintln!(
            "etcd is not installed, or this was built without --features etcd: fleet is left out"
        );
        return Ok(());
    }
    for count in FLEETS {
        let dir = plan.dir.join("etcd");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        let etcd = Etcd::start(&dir)?;
        let settings = format!("[fleet]\nstore = \"etcd://{}\"\nspace = \"bench\"\n", etcd.client);
        let sites: Vec<Site> = (0..count)
            .map(|instance| Site::new(&plan.dir, &format!("fleet_{instance}"), &settings))
            .collect::<Result<_, _>>()?;
        for site in &sites {
            site.fill()?;
        }
        let sides: Vec<Side> = sites.iter().map(Site::serve).collect::<Result<_, _>>()?;
        measure(plan, report, &etcd, &sides)?;
        for side in sides {
            side.stop()?;
        }
        drop(etcd);
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

fn measure(plan: &Plan, report: &mut Report, etcd: &Etcd, sides: &[Side]) -> anyhow::Result<()> {
    let load = Load { paths: &["/random"], connections: 64, length: plan.run(), keyed: false };
    let (mut rates, mut own, mut stores, mut per_store) = (vec![], vec![], vec![], vec![]);
    for _ in 0..plan.pairs {
        let before = (own_cpu(sides)?, etcd.cpu_seconds()?, etcd.requests()?);
        let outcomes = thread::scope(|scope| {
            let runs: Vec<_> =
                sides.iter().map(|side| scope.spawn(|| drive(side.address, load))).collect();
            runs.into_iter()
                .map(|run| run.join().expect("driving does not panic"))
                .collect::<anyhow::Result<Vec<_>>>()
        })?;
        ensure!(outcomes.iter().all(|outcome| outcome.refused == 0), "an instance refused");
        let numbers: f64 = outcomes.iter().map(|outcome| outcome.requests as f64).sum();
        rates.push(outcomes.iter().map(|outcome| outcome.per_second()).sum());
        own.push((own_cpu(sides)? - before.0) / numbers * 1e6);
        stores.push((etcd.cpu_seconds()? - before.1) / numbers * 1e6);
        per_store.push((etcd.requests()? - before.2) / numbers * 1e6);
    }
    let what = |what: &str| format!("fleet of {}: {what}", sides.len());
    report.figure(what("numbers"), "numbers/s", &rates, None, "64 connections each");
    report.figure(what("instances' CPU"), "µs/number", &own, None, "");
    report.figure(what("the store's CPU"), "µs/number", &stores, None, "one etcd node");
    report.figure(what("requests to the store"), "per million", &per_store, None, "");
    Ok(())
}

fn own_cpu(sides: &[Side]) -> anyhow::Result<f64> {
    sides.iter().map(Side::cpu_seconds).sum()
}

impl Etcd {
    fn start(dir: &Path) -> anyhow::Result<Self> {
        let (client, peer) = (free_address()?, free_address()?);
        let process = Command::new("etcd")
            .args(["--name", "bench", "--logger", "zap", "--log-level", "error"])
            .arg("--data-dir")
            .arg(dir.join("data"))
            .args(["--listen-client-urls", &format!("http://{client}")])
            .args(["--advertise-client-urls", &format!("http://{client}")])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(["--initial-cluster", &format!("bench=http://{peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let etcd = Self { process, client };
        wait_for(client)?;
        Ok(etcd)
    }

    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        cpu_seconds(self.process.id())
    }

    /// Returns how many requests its key-value service has handled, by its own count.
    fn requests(&self) -> anyhow::Result<f64> {
        let text = String::from_utf8(ask(self.client, "/metrics")?)?;
        let counts = text.lines().filter(|line| {
            line.starts_with("grpc_server_handled_total")
                && line.contains("grpc_service=\"etcdserverpb.KV\"")
        });
        counts
            .map(|line| {
                let count = line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
                count.context("etcd's metrics are numbers")
            })
            .sum()
    }
}
