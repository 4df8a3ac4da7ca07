//! The load, which is made by `wrk`, and single requests.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};

/// Longest wait for a single response.
const RESPONSE_LIMIT: Duration = Duration::from_secs(10);

/// Requests on a number of connections, each followed by the next as soon as its response is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load<'a> {
    /// Paths, requested in turn.
    pub(crate) paths: &'a [&'a str],
    pub(crate) connections: usize,
    pub(crate) length: Duration,
    /// Whether the requests are POST with a key that no other request has.
    pub(crate) keyed: bool,
}

/// The result of a load. Latencies are in microseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) seconds: f64,
    /// Responses other than 200.
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

/// Checks that wrk is installed.
///
/// # Errors
/// It isn't.
pub(crate) fn require_wrk() -> anyhow::Result<()> {
    match Command::new("wrk").arg("--version").output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("wrk, which makes the load, is not installed. On Debian: apt-get install wrk")
        }
        result => result.map(drop).context("can't run wrk"),
    }
}

/// Loads a server with wrk, on one thread: the machine's other cores are the server's.
///
/// # Errors
/// A connection failed. Then nothing of the run is worth reporting.
pub(crate) fn drive(address: SocketAddr, load: Load<'_>) -> anyhow::Result<Outcome> {
    let mut script = tempfile::Builder::new().suffix(".lua").tempfile()?;
    if load.keyed {
        let run = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
        writeln!(
            script,
            "local count, head = 0, 'POST {} HTTP/1.1\\r\\nHost: {address}\\r\\nIdempotency-Key: {run}-'\n\
             function request() count = count + 1 return head .. count .. '\\r\\n\\r\\n' end",
            load.paths[0]
        )?;
    } else if load.paths.len() > 1 {
        let formatted: Vec<_> =
            load.paths.iter().map(|path| format!("wrk.format('GET', '{path}')")).collect();
        writeln!(
            script,
            "local requests, at\nfunction init() requests = {{{}}} at = 0 end\n\
             function request() at = at % #requests + 1 return requests[at] end",
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
    ensure!(requests > 0, "no response came from {address}");
    Ok(Outcome { requests, seconds: micros as f64 / 1e6, refused, p50, p99, p999 })
}

/// Requests a path once, and returns the body.
///
/// # Errors
/// The status is not 200.
pub(crate) fn ask(address: SocketAddr, path: &str) -> anyhow::Result<Vec<u8>> {
    send(address, &format!("GET {path}"), "", "")
}

/// Sends a request, such as `GET /health`, with further lines of the head and a body. Returns the body of the response.
///
/// # Errors
/// The status is not 200.
pub(crate) fn send(
    address: SocketAddr,
    request: &str,
    head: &str,
    body: &str,
) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(RESPONSE_LIMIT))?;
    // In HTTP/1.0, a response ends with its connection.
    write!(
        stream,
        "{request} HTTP/1.0\r\nHost: {address}\r\nContent-Length: {}\r\n{head}\r\n{body}",
        body.len()
    )?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    let end = response.windows(4).position(|bytes| bytes == b"\r\n\r\n");
    let end = end.with_context(|| format!("{request}: no whole response"))?;
    let body = response.split_off(end + 4);
    let status = String::from_utf8_lossy(response.get(9..12).unwrap_or_default());
    ensure!(status == "200", "{request}: {status} {}", String::from_utf8_lossy(&body));
    Ok(body)
}
