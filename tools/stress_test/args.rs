//! The command line: parsed and refused at the edge, so that everything behind it is known to be
//! good. Opens nothing but the file of a token.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use clap::value_parser;
use hyper::http::HeaderValue;
use hyper::http::uri::{Scheme, Uri};

/// Most connections at once: beyond this, ports and file descriptors of one machine run out.
const CONCURRENCY_LIMIT: u64 = 10_000;
/// Most numbers in one answer: 100 times what a server grants by default.
const COUNT_LIMIT: u64 = 1_000_000;
/// Longest `--timeout` and `--duration`: a year, far from the ends of the clock's arithmetic.
const DURATION_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);
/// Longest name of a pool, as the server has it.
const POOL_NAME_LIMIT_BYTES: usize = 32;

const AFTER_HELP: &str = "\
What counts as a failure:
  Expected, so reported and no failure:
    200 with the numbers that were asked for
    503 or 429 with Retry-After in seconds   the server says when to come back
    410 with the code \"exhausted\"            the range is used up
  Everything else is a failure: any other status, 503 or 429 without Retry-After, a 200 that is not
  what was asked for, a time-out, a broken connection, no connection.
  A number that comes twice for one type, as exact text, in this run or in --seen, fails the run.

Only what the server asked to repeat is repeated (--retry). After a time-out or a broken connection
the connection is replaced and the run goes on with the next request.

Ctrl-C ends the run early: what came is summed up and remembered. A second one quits at once.

Exit codes: 0 nothing failed, 1 a number came twice or something failed, 2 bad arguments.";

/// Asks a server for numbers as fast as it answers, and checks that none comes twice.
#[derive(Clone, Debug, Parser)]
#[command(name = "stress-test", version, after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The server, http:// only. /random is asked unless a path is given
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: Target,

    /// Send the token that FILE holds, as `tombola token new` printed it
    #[arg(long = "token-file", value_name = "FILE", value_parser = read_token)]
    pub(crate) authorization: Option<HeaderValue>,

    /// How many requests to make
    #[arg(short = 'n', long, default_value_t = 1600, conflicts_with = "duration",
          value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    pub(crate) requests: u64,

    /// Make requests for this long instead, like 30s, 5m or 2.5 (seconds)
    #[arg(short = 'd', long, value_parser = parse_duration)]
    pub(crate) duration: Option<Duration>,

    /// How many connections ask at the same time
    #[arg(short = 'c', long, default_value_t = 4,
          value_parser = RangedU64ValueParser::<u32>::new().range(1..=CONCURRENCY_LIMIT))]
    pub(crate) concurrency: u32,

    /// Which numbers: int, float, mix (each request int or float at random) or the name of a pool
    #[arg(long = "type", value_name = "TYPE", default_value = "int")]
    pub(crate) pools: Pools,

    /// Ask for this many numbers a request
    #[arg(long, value_parser = RangedU64ValueParser::<u32>::new().range(1..=COUNT_LIMIT))]
    pub(crate) count: Option<u32>,

    /// Longest wait for an answer, connecting included
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,

    /// Repeat a request up to N times when the answer is 503 or 429 with Retry-After, after the
    /// time it names
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = value_parser!(u32))]
    pub(crate) retry: u32,

    /// A progress bar instead of a line for each outcome
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,

    /// End with one line of JSON for programs instead of the page for people
    #[arg(long)]
    pub(crate) json: bool,

    /// Where the complete log goes; what the file held is replaced
    /// [default: stress_log_TIME.txt in the working directory]
    #[arg(long, value_name = "FILE", conflicts_with = "no_log")]
    pub(crate) log: Option<PathBuf>,

    /// Write no log
    #[arg(long)]
    pub(crate) no_log: bool,

    /// Remember numbers across runs: one that is in FILE has come before; new ones are added at the
    /// end. A line each, "type number"
    #[arg(long, value_name = "FILE")]
    pub(crate) seen: Option<PathBuf>,
}

/// Which pool of [`Pools`] a request asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolIndex(pub(crate) u8);

/// The pools that requests choose from, each as likely as another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pools {
    names: Vec<String>,
    written: String,
}

impl Pools {
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    pub(crate) fn name(&self, pool: PoolIndex) -> &str {
        &self.names[usize::from(pool.0)]
    }

    /// One of them, at random.
    pub(crate) fn draw(&self) -> PoolIndex {
        match self.names.len() {
            1 => PoolIndex(0),
            _ => PoolIndex(u8::from(rand::random::<bool>())),
        }
    }
}

impl FromStr for Pools {
    type Err = String;

    fn from_str(written: &str) -> Result<Self, String> {
        let names = match written {
            "mix" => vec!["int".to_owned(), "float".to_owned()],
            name => vec![parse_pool_name(name)?],
        };
        Ok(Self { names, written: written.to_owned() })
    }
}

impl fmt::Display for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.written)
    }
}

/// The server's rule for names, which also keeps them safe in a URL and on a line.
pub(crate) fn is_pool_name(name: &str) -> bool {
    name.len() <= POOL_NAME_LIMIT_BYTES
        && name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_'))
}

fn parse_pool_name(name: &str) -> Result<String, String> {
    match is_pool_name(name) {
        true => Ok(name.to_owned()),
        false => Err("a pool is named by 1 to 32 of a-z, 0-9 and _, a letter first".to_owned()),
    }
}

/// Where numbers are asked for: host, port and path, without a query.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    host: String,
    port: u16,
    authority: HeaderValue,
    path: String,
}

impl Target {
    /// What the system's resolver takes: no brackets around an IPv6 address.
    pub(crate) fn host_and_port(&self) -> (&str, u16) {
        (self.host.trim_start_matches('[').trim_end_matches(']'), self.port)
    }

    /// The `Host` of every request.
    pub(crate) fn authority(&self) -> &HeaderValue {
        &self.authority
    }

    /// Path and query that ask for `count` numbers of a pool.
    pub(crate) fn question(&self, pool: &str, count: Option<u32>) -> Uri {
        let count = count.map_or(String::new(), |count| format!("&count={count}"));
        format!("{}?type={pool}{count}", self.path)
            .parse()
            .expect("a parsed path, then a name checked by is_pool_name and a number")
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("not a URL: {error}"))?;
        match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => {}
            Some(scheme) => return Err(format!("{scheme}:// is not spoken here, only http://")),
            None => return Err("a URL begins with http://".to_owned()),
        }
        if uri.query().is_some() {
            return Err("no query here: --type and --count make it".to_owned());
        }
        let authority = uri.authority().ok_or("names no server")?;
        if authority.as_str().contains('@') {
            return Err("no user or password here: the server asks for none".to_owned());
        }
        if uri.host().unwrap_or_default().is_empty() {
            return Err("names no server".to_owned());
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|error| format!("not a port: {error}"))?,
            None => 80,
        };
        Ok(Self {
            host: authority.host().to_owned(),
            port,
            authority: HeaderValue::from_str(authority.as_str())
                .map_err(|error| format!("not a server's name: {error}"))?,
            path: match uri.path() {
                "/" | "" => "/random".to_owned(),
                path => path.to_owned(),
            },
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let authority = self.authority.to_str().unwrap_or(&self.host);
        write!(f, "http://{authority}{}", self.path)
    }
}

/// What proves a token, from its file: arguments can be read by all on the machine.
fn read_token(path: &str) -> Result<HeaderValue, String> {
    let text = std::fs::read_to_string(path).map_err(|error| format!("can't be read: {error}"))?;
    let credentials = tombola::auth::credentials(&text)?;
    let mut value = HeaderValue::try_from(credentials).expect("printable ASCII was checked");
    value.set_sensitive(true);
    Ok(value)
}

/// `30s`, `1m 30s`, or a bare number of seconds.
fn parse_duration(written: &str) -> Result<Duration, String> {
    let duration = match written.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?,
        Err(_) => humantime::parse_duration(written).map_err(|error| error.to_string())?,
    };
    if duration.is_zero() {
        return Err("must be longer than nothing".to_owned());
    }
    if duration > DURATION_LIMIT {
        return Err("must be at most a year".to_owned());
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_read_from_its_url() {
        for (url, shown, host, port) in [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000/random", "127.0.0.1", 8000),
            ("http://localhost/", "http://localhost/random", "localhost", 80),
            ("HTTP://[::1]:5000/a/random", "http://[::1]:5000/a/random", "::1", 5000),
        ] {
            let target: Target = url.parse().expect(url);
            assert_eq!(target.to_string(), shown);
            assert_eq!(target.host_and_port(), (host, port));
        }
    }

    #[test]
    fn a_question_names_pool_and_count() {
        let target: Target = "http://h:1/x".parse().expect("a URL");
        assert_eq!(target.question("int", None).to_string(), "/x?type=int");
        assert_eq!(target.question("a_1", Some(7)).to_string(), "/x?type=a_1&count=7");
    }

    #[test]
    fn durations_are_units_or_seconds() {
        for (written, millis) in
            [("2.5", 2_500), ("10", 10_000), ("300ms", 300), ("1m 30s", 90_000)]
        {
            assert_eq!(parse_duration(written), Ok(Duration::from_millis(millis)));
        }
        for refused in ["0", "-1", "nan", "soon", "1e99", "2 years", ""] {
            parse_duration(refused).expect_err(refused);
        }
    }

    #[test]
    fn mix_is_int_or_float_and_nothing_else() {
        let mix: Pools = "mix".parse().expect("mix");
        assert_eq!(mix.names(), ["int", "float"]);
        let drawn: Vec<u8> = (0..200).map(|_| mix.draw().0).collect();
        // 200 equal bits come once in 2^199 runs.
        assert!(drawn.contains(&0) && drawn.contains(&1));
    }
}
