//! `compare`: starts the modes one after the other on empty folders, loads each the same way, and
//! prints one table. Loads with `stress-test` and measures nothing of the clients itself; what the
//! server costs, it asks the operating system (Linux only).

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use clap::builder::RangedU64ValueParser;
use serde::Deserialize;
use tombola::config::Mode;
use tombola::figures::{thousands, time};

/// Numbers issued before each measurement.
const LEVELS: [u64; 3] = [0, 10_000, 100_000];

/// Getting to the next level may take so many times as long as a measurement.
const FILL_TIMES: u32 = 12;

/// The load on the way to a level comes in pieces that last about so long.
const PIECE: Duration = Duration::from_secs(5);

/// Requests that show how fast a mode is, so that pieces can be cut.
const PROBE_REQUESTS: u64 = 256;

/// The first filling of ten million numbers takes seconds; this is for slow disks.
const READY_LIMIT: Duration = Duration::from_secs(300);

const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Clock ticks in a second as Linux shows them in `/proc` (`USER_HZ`), on every common machine.
const TICKS_PER_SECOND: f64 = 100.0;

/// Starts each mode on an empty folder, loads it, and prints what each gives and costs.
#[derive(Debug, Parser)]
#[command(name = "compare", version)]
struct Arguments {
    /// How long each measurement takes, about; getting to the next level may take twelve times as long
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = RangedU64ValueParser::<u64>::new().range(1..=3600))]
    seconds: u64,
    /// Which modes, in this order
    #[arg(long, value_enum, value_delimiter = ',',
          default_values = ["simple", "json", "sqlite", "sharded"])]
    modes: Vec<Mode>,
    /// How many connections ask at the same time
    #[arg(long, default_value_t = 64, value_parser = RangedU64ValueParser::<u32>::new().range(1..=256))]
    concurrency: u32,
    /// Where the empty folders are made: on the disk that is to be measured
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

/// What `stress-test --json` ends with.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Load {
    numbers: u64,
    elapsed_s: f64,
    p50_us: f64,
    p99_us: f64,
    failures: u64,
    duplicates: u64,
}

impl Load {
    fn rate(&self) -> f64 {
        self.numbers as f64 / self.elapsed_s.max(f64::MIN_POSITIVE)
    }
}

/// A line of the table.
#[derive(Debug)]
struct Row {
    mode: Mode,
    level: u64,
    measured: Option<Measured>,
    issued: u64,
}

#[derive(Debug)]
struct Measured {
    load: Load,
    cpu: Duration,
    disk_bytes: u64,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for &mode in &arguments.modes {
        eprintln!("{mode} ...");
        rows.extend(climb(arguments, mode).with_context(|| format!("the mode {mode}"))?);
    }
    print(arguments, &rows).context("can't write the table")
}

/// One mode, from the empty folder up.
fn climb(arguments: &Arguments, mode: Mode) -> anyhow::Result<Vec<Row>> {
    let measurement = Duration::from_secs(arguments.seconds);
    let mut server = Server::start(arguments, mode)?;
    server.wait_until_ready()?;
    let mut rate = server.load(arguments, PROBE_REQUESTS)?.rate();
    let mut rows = Vec::new();
    for (place, level) in LEVELS.into_iter().enumerate() {
        let fill_end = Instant::now() + measurement * FILL_TIMES;
        while server.issued < level && Instant::now() < fill_end {
            let piece = requests_in(PIECE, rate).min(level - server.issued);
            rate = server.load(arguments, piece)?.rate();
        }
        let mut measured = None;
        if server.issued >= level {
            // Not over the next level, whose figures are to be its own.
            let next = LEVELS.get(place + 1).copied().unwrap_or(u64::MAX);
            let requests = requests_in(measurement, rate).min(next.saturating_sub(server.issued));
            let cpu_before = server.cpu()?;
            let load = server.load(arguments, requests.max(PROBE_REQUESTS))?;
            let (cpu, disk_bytes) = (server.cpu()? - cpu_before, server.disk_bytes()?);
            measured = Some(Measured { load, cpu, disk_bytes });
            rate = load.rate();
        }
        let reached = measured.is_some();
        rows.push(Row { mode, level, measured, issued: server.issued });
        if !reached {
            break;
        }
    }
    Ok(rows)
}

fn requests_in(time: Duration, rate: f64) -> u64 {
    ((rate * time.as_secs_f64()) as u64).max(1)
}

/// The real server on a folder of its own, which goes with it.
struct Server {
    process: Child,
    address: String,
    folder: PathBuf,
    /// Numbers that it has handed out.
    issued: u64,
}

impl Server {
    fn start(arguments: &Arguments, mode: Mode) -> anyhow::Result<Self> {
        let folder = arguments.dir.join(format!("tombola-compare-{}-{mode}", std::process::id()));
        fs::create_dir(&folder).with_context(|| format!("can't make {}", folder.display()))?;
        let mut command = beside("tombola")?;
        // No settings but the defaults, whatever the surroundings say.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TOMBOLA_") {
                command.env_remove(name);
            }
        }
        command.current_dir(&folder).args(["--mode", mode.as_str()]);
        command.args(["--data-dir", "data", "--listen", "127.0.0.1:0"]);
        let process = command
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("can't start tombola")?;
        let mut server = Self { process, address: String::new(), folder, issued: 0 };
        let stdout = server.process.stdout.take().context("its output is a pipe")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().strip_prefix("Listening on http://");
        address.context("the server did not start")?.clone_into(&mut server.address);
        Ok(server)
    }

    /// Until nothing is left to be prepared before the first request.
    fn wait_until_ready(&self) -> anyhow::Result<()> {
        let limit = Instant::now() + READY_LIMIT;
        while !self.is_ready()? {
            ensure!(Instant::now() < limit, "it was not ready after {}", time(READY_LIMIT));
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn is_ready(&self) -> anyhow::Result<bool> {
        #[derive(Deserialize)]
        struct Health {
            pools: BTreeMap<String, PoolHealth>,
        }
        /// The rungs below the pool server have no shards, and so all of them.
        #[derive(Deserialize)]
        struct PoolHealth {
            shards: Option<u64>,
            shards_in_rotation: Option<u64>,
        }

        let mut stream = TcpStream::connect(&self.address)?;
        stream.write_all(b"GET /health HTTP/1.1\r\nHost: compare\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("/health has no body")?;
        let health: Health = serde_json::from_str(body).context("/health is not as it was")?;
        Ok(health.pools.values().all(|pool| pool.shards == pool.shards_in_rotation))
    }

    fn load(&mut self, arguments: &Arguments, requests: u64) -> anyhow::Result<Load> {
        let output = beside("stress-test")?
            .args(["--json", "--quiet", "--no-log", "--type", "mix", "--timeout", "60s"])
            .args(["--url", &format!("http://{}", self.address)])
            .args(["--requests", &requests.to_string()])
            .args(["--concurrency", &arguments.concurrency.to_string()])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .context("can't start stress-test")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().last().unwrap_or_default();
        let load: Load = serde_json::from_str(line)
            .with_context(|| format!("stress-test ended with {line:?}"))?;
        if load.failures > 0 || load.duplicates > 0 {
            bail!("{} failures and {} duplicates under load", load.failures, load.duplicates);
        }
        ensure!(load.numbers > 0, "no numbers came");
        self.issued += load.numbers;
        Ok(load)
    }

    /// Processor time of all its threads so far, in user mode and in the kernel.
    fn cpu(&self) -> anyhow::Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id()))?;
        // After the name, which may hold anything, come the fields from the third on; proc(5).
        let (_, fields) = stat.rsplit_once(')').context("no name in /proc/PID/stat")?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let ticks = |field: usize| -> anyhow::Result<u64> {
            Ok(fields.get(field - 3).context("a short /proc/PID/stat")?.parse()?)
        };
        let (user, system) = (ticks(14)?, ticks(15)?);
        Ok(Duration::from_secs_f64((user + system) as f64 / TICKS_PER_SECOND))
    }

    /// Blocks that its files take.
    fn disk_bytes(&self) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in fs::read_dir(self.folder.join("data"))? {
            // A file may be renamed just now.
            bytes += entry?.metadata().map_or(0, |metadata| metadata.blocks() * 512);
        }
        Ok(bytes)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Either fails only when there is nothing left to end or to remove.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A binary of the same build.
fn beside(name: &str) -> anyhow::Result<Command> {
    let own = std::env::current_exe().context("where is this program?")?;
    let path = own.parent().unwrap_or(Path::new(".")).join(name);
    ensure!(path.exists(), "{} is not there: run cargo build first", path.display());
    Ok(Command::new(path))
}

fn print(arguments: &Arguments, rows: &[Row]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let (concurrency, seconds) = (arguments.concurrency, arguments.seconds);
    writeln!(
        out,
        "{concurrency} connections, int and float mixed, about {seconds} s a measurement\n"
    )?;
    writeln!(
        out,
        "| mode | issued before | numbers/s | p50 | p99 | CPU per number | on disk | bytes per \
         number issued |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )?;
    for Row { mode, level, measured, issued } in rows {
        write!(out, "| {mode} | {} |", thousands(*level))?;
        let Some(Measured { load, cpu, disk_bytes }) = measured else {
            let limit = time(Duration::from_secs(seconds) * FILL_TIMES);
            writeln!(out, " not reached: {} after {limit} more | | | | | |", thousands(*issued))?;
            continue;
        };
        let micros = |micros: f64| time(Duration::from_secs_f64(micros / 1e6));
        writeln!(
            out,
            " {} | {} | {} | {} | {:.2} MB | {} |",
            thousands(load.rate() as u64),
            micros(load.p50_us),
            micros(load.p99_us),
            time(cpu.div_f64(load.numbers as f64)),
            *disk_bytes as f64 / 1e6,
            thousands(disk_bytes / issued),
        )?;
    }
    if rows.iter().any(|row| row.mode == Mode::Sharded) {
        writeln!(
            out,
            "\nOn the disk of sharded lies its supply of numbers that are not yet issued, too."
        )?;
    }
    Ok(())
}
