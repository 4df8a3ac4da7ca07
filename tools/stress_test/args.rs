//! The command line. Everything is checked here, so that the other modules can rely on it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow, ensure};
use clap::Parser;
use clap::builder::RangedU64ValueParser;
use hyper::http::HeaderValue;
use hyper::http::uri::{Scheme, Uri};

/// Most clients at once: beyond this, one machine runs out of ports and file descriptors.
const CONCURRENCY_LIMIT: u64 = 10_000;
/// Most numbers in one response: 100 times what a server grants by default.
const COUNT_LIMIT: u64 = 1_000_000;
/// Longest `--timeout` and `--duration`: far from the ends of the clock's arithmetic.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// Longest name of a pool, as in the server's settings.
const POOL_NAME_LIMIT_BYTES: usize = 32;

const AFTER_HELP: &str = "\
What counts as a failure:
  Expected, so reported and no failure:
    200 with the numbers that were asked for
    503 or 429 with Retry-After in seconds   the server says when to come back
    410 with the code \"exhausted\"            the range is used up
  Everything else is a failure: any other status, 503 or 429 without Retry-After, a 200 with other
  content, a timeout, a broken connection, no connection.
  A number that comes twice for one type, as exact text, in this run or in --seen, fails the run.

A request is repeated only if the server asks for that (--retry). After a timeout or a broken
connection, the client opens a new connection and makes its next request.

Ctrl-C ends the run early, with a summary and --seen up to date. A second Ctrl-C quits at once.

Exit codes: 0 nothing failed, 1 a number came twice or something failed, 2 bad arguments.";

/// Requests numbers from a server as fast as they come, and checks that none comes twice
#[derive(Debug, Parser)]
#[command(name = "stress-test", version, after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The server, http:// only, with the path /random unless it names another
    #[arg(long, default_value = "http://127.0.0.1:8000", value_parser = parse_url)]
    pub(crate) url: Uri,

    /// Send the token in FILE, as `tombola token new` printed it
    #[arg(long = "token-file", value_name = "FILE", value_parser = read_token)]
    pub(crate) authorization: Option<HeaderValue>,

    /// How many requests to make
    #[arg(short = 'n', long, default_value_t = 1600, conflicts_with = "duration",
          value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    pub(crate) requests: u64,

    /// Make requests for this long instead, like 30s, 5m or 2.5 (seconds)
    #[arg(short = 'd', long, value_parser = parse_duration)]
    pub(crate) duration: Option<Duration>,

    /// How many clients make requests at the same time, each on one connection
    #[arg(short = 'c', long, default_value_t = 4,
          value_parser = RangedU64ValueParser::<u32>::new().range(1..=CONCURRENCY_LIMIT))]
    pub(crate) concurrency: u32,

    /// Which numbers: int, float, mix (int or float, at random for each request) or the name of a pool
    #[arg(long = "type", value_name = "TYPE", default_value = "int", value_parser = parse_pool)]
    pub(crate) pool: String,

    /// How many numbers to ask for in one request
    #[arg(long, value_parser = RangedU64ValueParser::<u32>::new().range(1..=COUNT_LIMIT))]
    pub(crate) count: Option<u32>,

    /// Longest wait for a response, including the time to connect
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,

    /// Repeat a request up to N times when the response is 503 or 429 with Retry-After, after that time
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) retry: u32,

    /// Print only the summary, and no line for each request
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,

    /// The file of the log, which is replaced [default: stress_log_TIME.txt in the working directory]
    #[arg(long, value_name = "FILE", conflicts_with = "no_log")]
    pub(crate) log: Option<PathBuf>,

    /// Write no log
    #[arg(long)]
    pub(crate) no_log: bool,

    /// Remember numbers across runs: those in FILE count as handed out, and new ones are appended,
    /// one line each, "type number"
    #[arg(long, value_name = "FILE")]
    pub(crate) seen: Option<PathBuf>,
}

impl Args {
    /// Returns `host` or `host:port`, for the header `Host`.
    pub(crate) fn authority(&self) -> &str {
        self.url.authority().expect("checked in parse_url").as_str()
    }

    /// Returns `host:port`, to connect to.
    pub(crate) fn address(&self) -> String {
        let port = if self.url.port().is_some() { "" } else { ":80" };
        format!("{}{port}", self.authority())
    }

    /// Returns path and query of a request to a pool.
    pub(crate) fn resource(&self, pool: &str) -> String {
        let count = self.count.map_or(String::new(), |count| format!("&count={count}"));
        format!("{}?type={pool}{count}", self.url.path())
    }

    /// Returns the pool for the next request.
    pub(crate) fn pick_pool(&self) -> &str {
        match self.pool.as_str() {
            "mix" if rand::random() => "int",
            "mix" => "float",
            name => name,
        }
    }
}

/// Parses the server's URL, and adds the path `/random` unless there is another.
fn parse_url(url: &str) -> anyhow::Result<Uri> {
    let uri: Uri = url.parse()?;
    let scheme = uri.scheme().context("a URL begins with http://")?;
    ensure!(*scheme == Scheme::HTTP, "{scheme}:// is not spoken here, only http://");
    ensure!(uri.query().is_none(), "no query here: use --type and --count");
    let authority = uri.authority().context("names no server")?;
    ensure!(!authority.host().is_empty(), "names no server");
    ensure!(!authority.as_str().contains('@'), "no user or password here, only --token-file");
    let path = if uri.path() == "/" { "/random" } else { uri.path() };
    Ok(format!("http://{authority}{path}").parse()?)
}

fn parse_pool(name: &str) -> anyhow::Result<String> {
    let rule = "a pool is named by 1 to 32 of a-z, 0-9 and _, a letter first";
    ensure!(is_pool_name(name), rule);
    Ok(name.to_owned())
}

/// Returns true for a name that the server's settings allow. Such a name is safe in a URL and on a line.
pub(crate) fn is_pool_name(name: &str) -> bool {
    name.len() <= POOL_NAME_LIMIT_BYTES
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

/// Reads a token into the header that proves it. A file, because arguments are visible to all users.
fn read_token(path: &str) -> anyhow::Result<HeaderValue> {
    let text = std::fs::read_to_string(path).map_err(|error| anyhow!("can't be read: {error}"))?;
    let credentials = tombola::internals::credentials(&text).map_err(anyhow::Error::msg)?;
    let mut value = HeaderValue::try_from(credentials)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Parses `30s`, `1m 30s`, or a number of seconds.
fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let duration = match text.parse() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds)?,
        Err(_) => humantime::parse_duration(text)?,
    };
    ensure!(!duration.is_zero() && duration <= YEAR, "must be longer than nothing, at most a year");
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(flags: &[&str]) -> Args {
        Args::parse_from([&["stress-test"], flags].concat())
    }

    #[test]
    fn a_server_is_read_from_its_url() {
        for (url, shown, address) in [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000/random", "127.0.0.1:8000"),
            ("http://localhost/", "http://localhost/random", "localhost:80"),
            ("HTTP://[::1]:5000/a/random", "http://[::1]:5000/a/random", "[::1]:5000"),
        ] {
            let args = args(&["--url", url]);
            assert_eq!((args.url.to_string().as_str(), args.address().as_str()), (shown, address));
        }
    }

    #[test]
    fn a_request_names_pool_and_count() {
        assert_eq!(args(&["--url", "http://h:1/x"]).resource("int"), "/x?type=int");
        let counted = args(&["--url", "http://h:1/x", "--count", "7"]);
        assert_eq!(counted.resource("a_1"), "/x?type=a_1&count=7");
    }

    #[test]
    fn durations_are_units_or_seconds() {
        for (text, millis) in [("2.5", 2_500), ("10", 10_000), ("300ms", 300), ("1m 30s", 90_000)] {
            assert_eq!(parse_duration(text).expect(text), Duration::from_millis(millis));
        }
        for refused in ["0", "-1", "nan", "soon", "1e99", "2 years", ""] {
            parse_duration(refused).expect_err(refused);
        }
    }

    #[test]
    fn mix_is_int_or_float_and_nothing_else() {
        let args = args(&["--type", "mix"]);
        let picked: Vec<&str> = (0..200).map(|_| args.pick_pool()).collect();
        // 200 equal bits come once in 2^199 runs.
        assert!(picked.contains(&"int") && picked.contains(&"float"));
        assert!(picked.iter().all(|pool| ["int", "float"].contains(pool)));
    }
}
