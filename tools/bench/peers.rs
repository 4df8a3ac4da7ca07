//! An alternative to the product: `SPOP` of random members from a Redis set, over HTTP by webdis, with
//! every pop on the disk before its response.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rand::RngExt;

use crate::Plan;
use crate::drive::{Load, ask, drive};
use crate::report::Report;
use crate::side::Site;

/// Members of the set at the start.
const MEMBERS: usize = 3_000_000;

/// A process that is killed when dropped.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures requests/s, leased and strict, in pairs with Redis.
pub(crate) fn peers(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    if !is_installed("redis-server")? || !is_installed("webdis")? {
        eprintln!("redis-server or webdis is not installed: the part peers is left out");
        return Ok(());
    }
    let dir = plan.dir.join("redis");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    let (redis, webdis) = (free_address()?, free_address()?);
    let _redis = start_redis(&dir, redis)?;
    let members = fill_set(redis)?;
    let _webdis = start_webdis(&dir, redis, webdis)?;

    for (what, settings) in [("leased", ""), ("strict", "[lease]\nrows = 0\n")] {
        let site = Site::new(&plan.dir, "peers", settings)?;
        site.fill()?;
        let side = site.serve()?;
        let load = Load { paths: &["/random"], connections: 64, length: plan.run(), keyed: false };
        let pops = Load { paths: &["/SPOP/numbers"], ..load };
        let mut pairs = Vec::new();
        for _ in 0..plan.pairs {
            let pair = (drive(side.address, load)?, drive(webdis, pops)?);
            ensure!(pair.0.refused + pair.1.refused == 0, "a side refused");
            pairs.push((pair.0.per_second(), pair.1.per_second()));
        }
        ensure!(left(webdis)? > 0, "the set of {members} members was used up");
        let what =
            format!("{what}, 64 connections, against Redis SPOP (fsync always) behind webdis");
        report.compare(what, "requests/s", &pairs, None, "");
        side.stop()?;
    }
    Ok(fs::remove_dir_all(&dir)?)
}

/// Returns whether a program is on the path. It is not started, because webdis takes `--version` for the
/// name of its settings, and serves.
pub(crate) fn is_installed(program: &str) -> anyhow::Result<bool> {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output()?;
    Ok(found.status.success())
}

/// Returns how many members the set has.
fn left(webdis: SocketAddr) -> anyhow::Result<u64> {
    let response: serde_json::Value = serde_json::from_slice(&ask(webdis, "/SCARD/numbers")?)?;
    response["SCARD"].as_u64().context("SCARD is a number")
}

/// Returns an address that was free a moment ago, for servers that do not take port 0.
pub(crate) fn free_address() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

fn start_redis(dir: &Path, address: SocketAddr) -> anyhow::Result<Peer> {
    let process = Command::new("redis-server")
        .args(["--bind", "127.0.0.1", "--port", &address.port().to_string(), "--save", ""])
        .args(["--appendonly", "yes", "--appendfsync", "always", "--dir"])
        .arg(dir.canonicalize()?)
        .stdout(Stdio::null())
        .spawn()?;
    let peer = Peer(process);
    wait_for(address)?;
    Ok(peer)
}

fn start_webdis(dir: &Path, redis: SocketAddr, address: SocketAddr) -> anyhow::Result<Peer> {
    let settings = dir.join("webdis.json");
    let text = serde_json::json!({
        "redis_host": "127.0.0.1", "redis_port": redis.port(),
        "http_host": "127.0.0.1", "http_port": address.port(),
        "threads": 2, "pool_size": 20, "daemonize": false, "websockets": false, "database": 0,
        "verbosity": 0, "logfile": "/dev/null",
    });
    fs::write(&settings, text.to_string())?;
    let process = Command::new("webdis").arg(&settings).stdout(Stdio::null()).spawn()?;
    let peer = Peer(process);
    wait_for(address)?;
    Ok(peer)
}

/// Waits until a server listens.
pub(crate) fn wait_for(address: SocketAddr) -> anyhow::Result<()> {
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(10) {
        if TcpStream::connect(address).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    bail!("no server listens on {address} after ten seconds")
}

/// Adds random members, a thousand in each command. Returns how many.
fn fill_set(redis: SocketAddr) -> anyhow::Result<usize> {
    const EACH: usize = 1000;
    let mut stream = TcpStream::connect(redis)?;
    let mut random = rand::rng();
    for _ in 0..MEMBERS / EACH {
        let mut command = format!("*{}\r\n$4\r\nSADD\r\n$7\r\nnumbers\r\n", EACH + 2);
        for _ in 0..EACH {
            let member = random.random_range(0..1_u64 << 53).to_string();
            command += &format!("${}\r\n{member}\r\n", member.len());
        }
        stream.write_all(command.as_bytes())?;
        let mut reply = [0; 16];
        let length = stream.read(&mut reply)?;
        ensure!(reply[..length].starts_with(b":"), "SADD: {}", String::from_utf8_lossy(&reply));
    }
    Ok(MEMBERS)
}
