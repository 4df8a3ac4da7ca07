//! What sharing a space costs: instances of a fleet beside each other, and the one etcd node in which they
//! agree. All of them share this machine's cores, so that the whole does not get faster with more
//! instances; what each number costs the store is what says how far a fleet goes.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use anyhow::{Context, ensure};

use crate::Plan;
use crate::drive::{Load, drive};
use crate::peers::{free_address, is_installed, wait_for};
use crate::report::Report;
use crate::side::{Side, Site, cpu_seconds};

/// Instances beside each other.
const FLEETS: [usize; 3] = [1, 2, 4];

/// One node, alone: every write is synced by it and by no other.
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
    let load = Load { paths: &["/random"], connections: 64, length: plan.run() };
    let (mut rates, mut own, mut stores, mut asked) = (vec![], vec![], vec![], vec![]);
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
        asked.push((etcd.requests()? - before.2) / numbers * 1e6);
    }
    let what = |what: &str| format!("fleet of {}: {what}", sides.len());
    report.figure(what("numbers"), "numbers/s", &rates, None, "64 connections each");
    report.figure(what("instances' CPU"), "µs/number", &own, None, "");
    report.figure(what("the store's CPU"), "µs/number", &stores, None, "one etcd node");
    report.figure(what("requests to the store"), "per million", &asked, None, "");
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

    /// Questions of the key-value service that it has answered, by its own count.
    fn requests(&self) -> anyhow::Result<f64> {
        let mut stream = TcpStream::connect(self.client)?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
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
