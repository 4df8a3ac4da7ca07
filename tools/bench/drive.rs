//! The load: `wrk` where it is installed, else a plain client of this program's own.

use std::io::Write;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What is asked, on how many connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load<'a> {
    /// Paths, asked in turn.
    pub(crate) paths: &'a [&'a str],
    pub(crate) connections: usize,
    pub(crate) length: Duration,
}

/// What came of it. Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Answers other than 200.
    pub(crate) refused: u64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
}

impl Outcome {
    pub(crate) fn per_second(&self) -> f64 {
        self.requests as f64 / self.seconds
    }
}

/// Whether wrk is there.
pub(crate) fn has_wrk() -> bool {
    Command::new("wrk").arg("--version").output().is_ok()
}

/// Asks as fast as answers come.
///
/// # Errors
/// When a connection fails: then nothing of the run is worth reporting.
pub(crate) fn drive(address: SocketAddr, load: Load<'_>) -> anyhow::Result<Outcome> {
    let outcome = if has_wrk() { wrk(address, load)? } else { own(address, load)? };
    ensure!(outcome.requests > 0, "no answer came from {address}");
    Ok(outcome)
}

/// One answer's body.
pub(crate) fn ask(address: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    runtime()?.block_on(async {
        let mut connection = Connection::open(address).await?;
        let (status, body) = connection.ask(&request(address, path)).await?;
        ensure!(status == 200, "{path} was answered {status}");
        Ok(body)
    })
}

/// One thread: the machine's other cores are the server's.
fn wrk(address: SocketAddr, load: Load<'_>) -> anyhow::Result<Outcome> {
    let mut script = tempfile::Builder::new().suffix(".lua").tempfile()?;
    if load.paths.len() > 1 {
        let formatted: Vec<_> =
            load.paths.iter().map(|path| format!("wrk.format('GET', '{path}')")).collect();
        writeln!(
            script,
            "local asked, at\nfunction init() asked = {{{}}} at = 0 end\n\
             function request() at = at % #asked + 1 return asked[at] end",
            formatted.join(", ")
        )?;
    }
    writeln!(
        script,
        "function done(summary, latency)\n\
         local e = summary.errors\n\
         io.write(string.format('RESULT %d %d %d %d %d %d %d\\n', summary.requests, summary.duration,\n\
         e.status, e.connect + e.read + e.write + e.timeout,\n\
         latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))\nend"
    )?;
    let output = Command::new("wrk")
        .args(["-t1", &format!("-c{}", load.connections)])
        // wrk takes whole seconds only.
        .arg(format!("-d{}s", load.length.as_secs().max(1)))
        .arg("-s")
        .arg(script.path())
        .arg(format!("http://{address}{}", load.paths[0]))
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.strip_prefix("RESULT "));
    let line =
        line.with_context(|| format!("wrk: {text}{}", String::from_utf8_lossy(&output.stderr)))?;
    let figures: Vec<u64> = line.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [requests, micros, refused, broken, p50, p99, p999] = figures[..] else {
        bail!("wrk: {line}");
    };
    ensure!(broken == 0, "{broken} connections to {address} failed");
    Ok(Outcome { requests, seconds: micros as f64 / 1e6, refused, p50, p99, p999 })
}

fn own(address: SocketAddr, load: Load<'_>) -> anyhow::Result<Outcome> {
    let requests: Vec<Vec<u8>> = load.paths.iter().map(|path| request(address, path)).collect();
    let requests: &'static [Vec<u8>] = requests.leak();
    runtime()?.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        let started = Instant::now();
        let end = started + load.length;
        for first in 0..load.connections {
            clients.spawn(async move {
                let mut connection = Connection::open(address).await?;
                let mut latencies = Histogram::<u64>::new(3)?;
                let mut refused = 0;
                for request in requests.iter().cycle().skip(first % requests.len()) {
                    let asked = Instant::now();
                    if asked >= end {
                        break;
                    }
                    let (status, _) = connection.ask(request).await?;
                    latencies.record(asked.elapsed().as_micros() as u64)?;
                    refused += u64::from(status != 200);
                }
                anyhow::Ok((latencies, refused))
            });
        }
        let (mut latencies, mut refused) = (Histogram::<u64>::new(3)?, 0);
        while let Some(client) = clients.join_next().await {
            let (of_one, refused_one) = client??;
            latencies.add(of_one)?;
            refused += refused_one;
        }
        Ok(Outcome {
            requests: latencies.len(),
            seconds: started.elapsed().as_secs_f64(),
            refused,
            p50: latencies.value_at_quantile(0.5),
            p99: latencies.value_at_quantile(0.99),
            p999: latencies.value_at_quantile(0.999),
        })
    })
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn request(address: SocketAddr, path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").into_bytes()
}

/// A keep-alive connection that reads answers with a `Content-Length`.
struct Connection {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Connection {
    async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: Vec::new() })
    }

    async fn ask(&mut self, request: &[u8]) -> anyhow::Result<(u16, Vec<u8>)> {
        self.stream.write_all(request).await?;
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 32];
            let mut answer = httparse::Response::new(&mut headers);
            if let httparse::Status::Complete(head) = answer.parse(&self.read)? {
                let status = answer.code.context("an answer has a status")?;
                let length =
                    answer.headers.iter().find(|h| h.name.eq_ignore_ascii_case("content-length"));
                let length = length.context("an answer has no Content-Length")?;
                let end = head + std::str::from_utf8(length.value)?.parse::<usize>()?;
                while self.read.len() < end {
                    ensure!(self.stream.read_buf(&mut self.read).await? > 0, "a body was cut off");
                }
                let body = self.read[head..end].to_vec();
                self.read.drain(..end);
                return Ok((status, body));
            }
            ensure!(self.stream.read_buf(&mut self.read).await? > 0, "a connection was cut off");
        }
    }
}
