//! Everything that the test binaries share: a site (a temporary folder with a config), the real binaries that
//! run on it, clients that count what they receive, and queries on the files. Knows nothing of the crate's
//! own code: a test uses the product from outside.

#![allow(dead_code, reason = "each test binary uses its part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

pub(crate) mod engines;
pub(crate) mod keyed;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use deadpool_sqlite::rusqlite::{Connection, types::FromSql};
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use reqwest::{Method, header::HeaderMap};
use serde::Deserialize;
use serde_json::value::RawValue;
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The bound of every wait. Only a server that hangs reaches it; no test measures speed by it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// The pause between two polls, long enough to leave the server the CPU.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The message of a 503 `refilling`, word for word (`docs/http.md`).
pub(crate) const REFILLING: &str =
    "No available numbers. Shard is being refilled. Please retry shortly.";

/// Reports that a test, or a part of it, is skipped. With `SKIP_NOTHING=1`, which `.ci/run` sets, that is a
/// failure. The name does not begin with `TOMBOLA_`, because the servers inherit it and would take it for a
/// setting.
pub(crate) fn skipped(what: &str) {
    assert!(std::env::var_os("SKIP_NOTHING").is_none(), "nothing may be skipped: {what}");
    eprintln!("skipped: {what}");
}

/// Polls `probe` until it returns a value.
pub(crate) async fn eventually<T>(what: &str, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// A config file under construction: `key = value` lines with dotted keys.
#[derive(Clone)]
pub(crate) struct Config(BTreeMap<String, String>);

impl Config {
    /// Returns a config without pools: `int` and `float` are disabled until [`Config::pool`] adds them.
    pub(crate) fn new() -> Self {
        Self(BTreeMap::new())
            .set("server.listen", "'127.0.0.1:0'")
            .set("refill.retry_ms", 20)
            .set("refill.retry_limit_ms", 200)
            .set("pools.int.enabled", false)
            .set("pools.float.enabled", false)
    }

    /// Adds a pool of integers; for another kind, set `pools.NAME.decimals` as well.
    pub(crate) fn pool(
        self,
        name: &str,
        min: impl Display,
        max: impl Display,
        shards: u16,
        shard_size: u32,
    ) -> Self {
        self.set(&format!("pools.{name}.enabled"), true)
            .set(&format!("pools.{name}.min"), min)
            .set(&format!("pools.{name}.max"), max)
            .set(&format!("pools.{name}.decimals"), 0)
            .set(&format!("pools.{name}.shards"), shards)
            .set(&format!("pools.{name}.shard_size"), shard_size)
    }

    /// Adds the pool `int` of 0 to `last`, and the pool `float` of as many numbers with six decimals.
    pub(crate) fn int_and_float(self, last: u64, shards: u16, shard_size: u32) -> Self {
        let float_max = format!("{}.{:06}", last / 1_000_000, last % 1_000_000);
        self.pool("int", 0, last, shards, shard_size)
            .pool("float", "0.0", float_max, shards, shard_size)
            .set("pools.float.decimals", 6)
    }

    /// Sets a dotted key to a TOML value; strings need their quotes.
    pub(crate) fn set(mut self, key: &str, value: impl Display) -> Self {
        self.0.insert(key.to_owned(), value.to_string());
        self
    }
}

/// A temporary folder with `config.toml` and a data folder, for the servers of a test.
pub(crate) struct Site {
    folder: TempDir,
}

impl Site {
    pub(crate) fn new(config: &Config) -> Self {
        let site = Self { folder: tempfile::tempdir().unwrap() };
        site.configure(config);
        site
    }

    /// Writes the config file again.
    pub(crate) fn configure(&self, config: &Config) {
        let config = config.clone().set("storage.dir", format!("'{}'", self.data().display()));
        let text: String =
            config.0.iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        std::fs::write(self.folder.path().join("config.toml"), text).unwrap();
    }

    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.data().join(name)
    }

    /// Returns the sorted names of the files in the data folder that contain `part`.
    pub(crate) fn files(&self, part: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.data()) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(part))
            .collect();
        names.sort();
        names
    }

    /// Returns the server's command line for this site, without settings from the environment.
    pub(crate) fn tombola(&self) -> Command {
        self.console(&[])
    }

    /// Returns the same for a console command; `words` come first on the command line.
    pub(crate) fn console(&self, words: &[&str]) -> Command {
        self.command(env!("CARGO_BIN_EXE_tombola"), words)
    }

    /// Returns the same for `init-shards`.
    pub(crate) fn init_shards(&self) -> Command {
        self.command(env!("CARGO_BIN_EXE_init-shards"), &[])
    }

    fn command(&self, binary: &str, words: &[&str]) -> Command {
        let mut command = self.bare(binary, words);
        command.args(["--config", "config.toml"]);
        command
    }

    /// Returns a command line that names no settings file.
    pub(crate) fn bare(&self, binary: &str, words: &[&str]) -> Command {
        let mut command = Command::new(binary);
        command.args(words);
        command.current_dir(self.folder.path());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy().into_owned();
            if name.starts_with("TOMBOLA_") || name == "RUST_LOG" {
                command.env_remove(name);
            }
        }
        command
    }

    /// Starts the server and waits until it listens.
    pub(crate) async fn start(&self) -> Server {
        Server::start(self.tombola()).await
    }

    /// Fills every shard with `init-shards`.
    pub(crate) async fn fill(&self) {
        let finished = run(self.init_shards()).await;
        assert!(finished.status.success(), "{}", finished.stderr);
    }

    /// Starts a server that has to refuse, and returns its stderr.
    pub(crate) async fn refusal(&self) -> String {
        refusal(self.tombola()).await
    }

    /// Fills the shards, takes 60 % of all numbers, waits for a standby generation, and stops. Returns the
    /// numbers taken. With two shards, one is then below its low water, and neither is empty.
    pub(crate) async fn stop_with_standby(&self, shard_size: u32) -> Vec<String> {
        self.fill().await;
        let server = self.start().await;
        let mut numbers = Vec::new();
        for _ in 0..2 * shard_size * 6 / 10 {
            numbers.extend(server.take("int", None).await);
        }
        eventually("a standby generation", async || self.files(".db.next").first().map(drop)).await;
        server.stop().await;
        numbers
    }

    /// Makes every refill of the pool fail, as on a full disk: a folder takes the path where a build creates
    /// its file. [`Self::unblock_refills`] removes it.
    pub(crate) async fn block_refills(&self, pool: &str, shards: u16) {
        for path in self.build_paths(pool, shards) {
            eventually("a moment without a build", async || std::fs::create_dir(&path).ok()).await;
        }
    }

    pub(crate) fn unblock_refills(&self, pool: &str, shards: u16) {
        for path in self.build_paths(pool, shards) {
            std::fs::remove_dir(path).unwrap();
        }
    }

    fn build_paths(&self, pool: &str, shards: u16) -> impl Iterator<Item = PathBuf> {
        (0..shards).map(move |index| self.file(&format!("{pool}_shard_{index}.db.tmp")))
    }
}

/// The clocks of a server, by libfaketime. A file sets their offset, even while the server runs.
pub(crate) struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// Returns a clock without an offset for the servers of a site, or `None` if libfaketime is not installed.
    pub(crate) fn new(site: &Site) -> Option<Self> {
        // Debian installs it in the folder of the machine's architecture.
        let folders = std::fs::read_dir("/usr/lib").ok()?.flatten();
        let mut paths = folders.map(|folder| folder.path().join("faketime/libfaketime.so.1"));
        let library = paths.find(|path| path.exists())?;
        let clock = Self { library, file: site.folder().join("clock") };
        clock.shift(0);
        Some(clock)
    }

    pub(crate) fn shift(&self, seconds: i64) {
        // The file is replaced as a whole, because half a file would be another time.
        let next = self.file.with_extension("next");
        std::fs::write(&next, format!("{seconds:+}\n")).unwrap();
        std::fs::rename(next, &self.file).unwrap();
    }

    /// Gives a server this clock. Unless another variable says so, its monotonic clock is shifted too.
    pub(crate) fn set(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library);
        command.env("FAKETIME_TIMESTAMP_FILE", &self.file);
    }
}

/// A child process that ends with its test, and whose output is kept.
pub(crate) struct Process {
    child: Child,
    stdout: Arc<Mutex<String>>,
    stderr: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    pub(crate) fn spawn(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, read_stdout) = collect(child.stdout.take().unwrap());
        let (stderr, read_stderr) = collect(child.stderr.take().unwrap());
        Self { child, stdout, stderr, readers: vec![read_stdout, read_stderr] }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `words` are in its stderr.
    pub(crate) async fn says(&self, words: &str) {
        eventually(words, async || self.stderr.lock().unwrap().contains(words).then_some(())).await;
    }

    /// Waits until `words` are in its stdout.
    pub(crate) async fn prints(&self, words: &str) {
        eventually(words, async || self.stdout.lock().unwrap().contains(words).then_some(())).await;
    }

    /// Waits for a line of stdout that contains `words`, and returns it.
    pub(crate) async fn line(&self, words: &str) -> String {
        eventually(words, async || {
            let stdout = self.stdout.lock().unwrap();
            stdout.lines().find(|line| line.contains(words)).map(str::to_owned)
        })
        .await
    }

    /// Sends a signal. Panics if the process has ended and was waited for.
    pub(crate) fn signal(&self, signal: Signal) {
        let id = Pid::from_raw(self.id().try_into().unwrap());
        nix::sys::signal::kill(id, signal).unwrap();
    }

    /// Stops the process with SIGSTOP, and waits until all of its threads have stopped: those of a busy process
    /// may run for a while after the signal was sent. SIGCONT makes it continue.
    pub(crate) fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        let id = Id::Pid(Pid::from_raw(self.id().try_into().unwrap()));
        waitid(id, WaitPidFlag::WSTOPPED).unwrap();
    }

    /// Waits until the process has ended and all of its output is read.
    pub(crate) async fn finish(&mut self) -> Finished {
        let status =
            eventually("the end of the process", async || self.child.try_wait().unwrap()).await;
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        Finished {
            status,
            stdout: self.stdout.lock().unwrap().clone(),
            stderr: self.stderr.lock().unwrap().clone(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail if the process has already ended, and then there is nothing left to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stderr of the process:\n{}", self.stderr.lock().unwrap());
        }
    }
}

/// How a process ended, and its output.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs a command until it ends.
pub(crate) async fn run(command: Command) -> Finished {
    Process::spawn(command).finish().await
}

/// Runs a command that has to refuse with exit code 1 to 3, or 6, and a readable message. Returns the
/// message.
pub(crate) async fn refusal(command: Command) -> String {
    match Server::start_or_refusal(command).await {
        Ok(server) => panic!("it had to refuse, but serves on {}", server.address()),
        Err(message) => message,
    }
}

fn collect(stream: impl Read + Send + 'static) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let text = Arc::new(Mutex::new(String::new()));
    let target = Arc::clone(&text);
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let mut text = target.lock().unwrap();
            text.push_str(&line.unwrap());
            text.push('\n');
        }
    });
    (text, reader)
}

/// A running server.
pub(crate) struct Server {
    pub(crate) process: Process,
    client: Client,
}

impl Server {
    pub(crate) async fn start(command: Command) -> Self {
        Self::of(Process::spawn(command)).await
    }

    /// Waits until the server in `process` listens.
    pub(crate) async fn of(mut process: Process) -> Self {
        let url = eventually("the line \"Listening on\"", async || {
            assert!(process.is_running(), "the server ended before it listened");
            let stdout = process.stdout.lock().unwrap();
            let line = stdout.split_inclusive('\n').find(|line| line.ends_with('\n'))?;
            let url = line.strip_prefix("Listening on ");
            Some(url.expect("the first line names the address").trim().to_owned())
        })
        .await;
        Self { process, client: Client::new(url) }
    }

    /// Starts a server that may refuse with exit code 1 to 3, or 6, and a readable message.
    pub(crate) async fn start_or_refusal(command: Command) -> Result<Self, String> {
        Self::start_or_end(command).await.map_err(|Finished { status, stderr, .. }| {
            assert!(matches!(status.code(), Some(1..=3 | 6)), "{status}: {stderr}");
            assert!(stderr.contains("Error: ") && !stderr.contains("panicked"), "{stderr}");
            stderr
        })
    }

    /// Starts a server that may end before it listens.
    pub(crate) async fn start_or_end(command: Command) -> Result<Self, Finished> {
        let mut process = Process::spawn(command);
        let url = eventually("a start or an end", async || {
            let stdout = process.stdout.lock().unwrap().clone();
            let line = stdout.lines().next().and_then(|line| line.strip_prefix("Listening on "));
            match line {
                Some(url) if stdout.contains('\n') => Some(Some(url.trim().to_owned())),
                _ => (!process.is_running()).then_some(None),
            }
        })
        .await;
        match url {
            Some(url) => Ok(Self { process, client: Client::new(url) }),
            None => Err(process.finish().await),
        }
    }

    /// Returns `127.0.0.1:PORT`, for tests that open a connection of their own.
    pub(crate) fn address(&self) -> &str {
        self.client.url.split_once("://").unwrap().1
    }

    /// Returns a client for requests in parallel with others.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    pub(crate) async fn send(&self, method: Method, target: &str) -> Answer {
        self.client.send(method, target).await.unwrap()
    }

    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.send(Method::GET, target).await
    }

    /// Takes one number, or `count` of them, and retries as long as the status is 503.
    pub(crate) async fn take(&self, pool: &str, count: Option<u32>) -> Vec<String> {
        let target = random(pool, count);
        eventually("numbers instead of 503", async || {
            let answer = self.get(&target).await;
            match answer.status {
                503 => {
                    answer.assert_refilling();
                    None
                }
                200 => Some(answer.numbers()),
                status => panic!("{target}: {status} {}", answer.body),
            }
        })
        .await
    }

    /// Takes numbers with many clients until the range is used up, and returns all of them. Client k begins
    /// with `counts[k]` and cycles through `counts`; `None` is a request without a count.
    pub(crate) async fn drain(
        &self,
        pool: &str,
        clients: usize,
        counts: &'static [Option<u32>],
    ) -> Vec<String> {
        let mut numbers = Vec::new();
        for taken in self.load(pool, clients, counts).join().await {
            assert_eq!(taken.end, End::Exhausted);
            numbers.extend(taken.numbers);
        }
        let after = self.get(&random(pool, None)).await;
        assert_eq!(after.status, 410, "exhaustion is permanent: {}", after.body);
        numbers
    }

    /// Starts clients as [`Server::drain`] does, and returns at once.
    pub(crate) fn load(&self, pool: &str, clients: usize, counts: &'static [Option<u32>]) -> Load {
        let (total, taken) = watch::channel(0);
        let mut load = Load { clients: JoinSet::new(), taken };
        for index in 0..clients {
            let counts = counts.iter().copied().cycle().skip(index % counts.len());
            load.clients.spawn(take_until_end(
                self.client.clone(),
                pool.to_owned(),
                counts,
                total.clone(),
            ));
        }
        load
    }

    /// Sends SIGTERM, after which the exit code has to be 0.
    pub(crate) async fn stop(mut self) {
        self.process.signal(Signal::SIGTERM);
        let finished = self.process.finish().await;
        assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    }

    /// Sends SIGKILL. The process loses whatever it has not handed to the kernel.
    pub(crate) async fn kill(mut self) {
        self.process.signal(Signal::SIGKILL);
        self.process.finish().await;
    }
}

/// Returns the target of a request for one number, or for `count` of them.
pub(crate) fn random(pool: &str, count: Option<u32>) -> String {
    match count {
        None => format!("/random?type={pool}"),
        Some(count) => format!("/random?type={pool}&count={count}"),
    }
}

#[derive(Clone)]
pub(crate) struct Client {
    url: String,
    http: reqwest::Client,
}

impl Client {
    fn new(url: String) -> Self {
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Self { url, http }
    }

    /// Returns the same client on another address of this machine.
    pub(crate) fn at(&self, address: &str) -> Self {
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE);
        let http = http.local_address(Some(address.parse().unwrap())).build().unwrap();
        Self { url: self.url.clone(), http }
    }

    pub(crate) async fn send(&self, method: Method, target: &str) -> reqwest::Result<Answer> {
        self.send_with(method, target, &[]).await
    }

    /// Sends a request with these headers. Every response, errors included, has to be JSON (metrics are text)
    /// that is neither cached nor rendered as a page, and must not reveal the server's software.
    pub(crate) async fn send_with(
        &self,
        method: Method,
        target: &str,
        headers: &[(&str, &str)],
    ) -> reqwest::Result<Answer> {
        self.send_body(method, target, headers, "").await
    }

    /// Sends a request with these headers and this body, and checks the response in the same way.
    pub(crate) async fn send_body(
        &self,
        method: Method,
        target: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> reqwest::Result<Answer> {
        let mut request = self.http.request(method, format!("{}{target}", self.url));
        if !body.is_empty() {
            request = request.body(body.to_owned());
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await?;
        let answer = Answer {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            body: response.text().await?,
        };
        let content_type = match (target, answer.status) {
            ("/metrics", 200) => "text/plain; version=0.0.4; charset=utf-8",
            (target, 200) if target.split('?').next() == Some("/receipts") => {
                "application/x-ndjson"
            }
            _ => "application/json",
        };
        for (name, value) in [
            ("content-type", content_type),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
            ("referrer-policy", "no-referrer"),
            ("x-frame-options", "DENY"),
        ] {
            let found: Vec<_> = answer.headers.get_all(name).iter().collect();
            assert_eq!(found, [value], "{name} of {} {target}", answer.status);
        }
        for banner in ["server", "x-powered-by", "via"] {
            assert_eq!(answer.header(banner), None, "{target}");
        }
        Ok(answer)
    }
}

/// A response as it was received.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: String,
}

/// `{"number": ..., "shard": ...}` and no other fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct One<'a> {
    #[serde(borrow)]
    pub(crate) number: &'a RawValue,
    pub(crate) shard: String,
}

/// `{"number": ...}` and no other field: the response of the modes `simple`, `json` and `sqlite`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Bare<'a> {
    #[serde(borrow)]
    pub(crate) number: &'a RawValue,
}

/// `{"count": ..., "numbers": [...], "shards": {...}}`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Many<'a> {
    pub(crate) count: usize,
    #[serde(borrow)]
    pub(crate) numbers: Vec<&'a RawValue>,
    pub(crate) shards: BTreeMap<String, usize>,
}

/// `{"error": ..., "code": ...}`
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Failure {
    pub(crate) error: String,
    pub(crate) code: String,
}

/// `{"status": ..., "pools": {...}}`: the response of `/health`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Health {
    pub(crate) status: String,
    pub(crate) pools: BTreeMap<String, PoolHealth>,
}

/// One pool's part of [`Health`].
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PoolHealth {
    pub(crate) status: String,
    pub(crate) shards: usize,
    pub(crate) shards_in_rotation: usize,
    pub(crate) reason: Option<String>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// Parses the body, which has to have exactly the fields of `T`.
    pub(crate) fn parse<'a, T: Deserialize<'a>>(&'a self) -> T {
        serde_json::from_str(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {} {}", self.status, self.body))
    }

    /// Returns the numbers of any kind of response, each as the exact text that was sent.
    pub(crate) fn numbers(&self) -> Vec<String> {
        if self.body.contains("\"numbers\"") {
            let many: Many<'_> = self.parse();
            assert_eq!(many.count, many.numbers.len(), "{}", self.body);
            let shares: usize = many.shards.values().sum();
            assert_eq!(many.count, shares, "{}", self.body);
            let texts = many.numbers.iter().map(|number| number.get().to_owned());
            texts.collect()
        } else if self.body.contains("\"shard\"") {
            vec![self.parse::<One<'_>>().number.get().to_owned()]
        } else {
            vec![self.parse::<Bare<'_>>().number.get().to_owned()]
        }
    }

    pub(crate) fn assert_status(&self, status: u16) {
        assert_eq!(self.status, status, "{}", self.body);
    }

    pub(crate) fn assert_refilling(&self) {
        assert_eq!(self.status, 503, "{}", self.body);
        let failure: Failure = self.parse();
        assert_eq!(failure.error, REFILLING);
        assert_eq!(failure.code, "refilling");
        let seconds = self.header("retry-after").expect("Retry-After with a 503");
        assert!(seconds.parse::<u32>().is_ok(), "Retry-After: {seconds}");
    }

    /// Fails unless this is a 503 with this code and a `Retry-After`.
    pub(crate) fn assert_unavailable(&self, code: &str) {
        assert_eq!(self.status, 503, "{}", self.body);
        assert_eq!(self.parse::<Failure>().code, code);
        let seconds = self.header("retry-after").expect("Retry-After with a 503");
        assert!(seconds.parse::<u32>().is_ok(), "Retry-After: {seconds}");
    }

    pub(crate) fn assert_exhausted(&self) {
        assert_eq!(self.status, 410, "{}", self.body);
        assert_eq!(self.parse::<Failure>().code, "exhausted");
    }
}

/// Running clients.
pub(crate) struct Load {
    clients: JoinSet<Taken>,
    /// The count of numbers that all clients together have received.
    taken: watch::Receiver<usize>,
}

/// The numbers that one client received, in order.
pub(crate) struct Taken {
    pub(crate) numbers: Vec<String>,
    pub(crate) end: End,
}

/// Why a client ended.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    /// The range is used up: not even one number is left.
    Exhausted,
    /// The server is gone: no response came, or it is stopping.
    Gone(String),
}

impl Load {
    /// Waits until the clients together have received `count` numbers.
    pub(crate) async fn reach(&mut self, count: usize) {
        let reached = self.taken.wait_for(|taken| *taken >= count);
        let reached = tokio::time::timeout(PATIENCE, reached).await;
        reached.expect("numbers in time").expect("clients at work");
    }

    pub(crate) async fn join(self) -> Vec<Taken> {
        self.clients.join_all().await
    }

    /// Returns the numbers that all clients received.
    pub(crate) async fn join_numbers(self) -> Vec<String> {
        let clients = self.join().await.into_iter();
        clients.flat_map(|taken| taken.numbers).collect()
    }
}

/// Runs one client. If a count exceeds what is left in the range, it is halved, down to one.
async fn take_until_end(
    client: Client,
    pool: String,
    mut counts: impl Iterator<Item = Option<u32>>,
    total: watch::Sender<usize>,
) -> Taken {
    let mut numbers = Vec::new();
    let mut limit = u32::MAX;
    let mut progress = Instant::now();
    loop {
        let count = counts.next().flatten().map(|count| count.min(limit));
        let answer = match client.send(Method::GET, &random(&pool, count)).await {
            Ok(answer) => answer,
            Err(error) => {
                let end = End::Gone(format!("{error:?}"));
                return Taken { numbers, end };
            }
        };
        match answer.status {
            200 => {
                let received = answer.numbers();
                assert_eq!(received.len(), count.unwrap_or(1) as usize);
                total.send_modify(|total| *total += received.len());
                numbers.extend(received);
                progress = Instant::now();
            }
            410 => {
                answer.assert_exhausted();
                match count {
                    Some(count) if count > 1 => limit = count / 2,
                    _ => {
                        let end = End::Exhausted;
                        return Taken { numbers, end };
                    }
                }
            }
            _ => {
                answer.assert_refilling();
                assert!(progress.elapsed() < PATIENCE, "no end of refilling");
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
    }
}

/// Parses the texts as integers, in order.
pub(crate) fn integers(numbers: &[String]) -> Vec<i64> {
    let parse = |text: &String| {
        let number: i64 = text.parse().unwrap();
        assert_eq!(*text, number.to_string(), "not the usual text of an integer");
        number
    };
    numbers.iter().map(parse).collect()
}

/// Returns how many numbers of `range` are not in `numbers`. Fails if `numbers` has a repeat or a number
/// outside the range.
pub(crate) fn missing(numbers: &[String], range: RangeInclusive<i64>) -> usize {
    let mut sorted = integers(numbers);
    sorted.sort_unstable();
    let outside: Vec<_> = sorted.iter().filter(|n| !range.contains(n)).take(10).collect();
    assert!(outside.is_empty(), "outside {range:?}: {outside:?} ...");
    let pairs = sorted.windows(2).filter(|pair| pair[0] == pair[1]);
    let repeats: Vec<_> = pairs.map(|pair| pair[0]).collect();
    assert!(
        repeats.is_empty(),
        "{} repeats among {} numbers: {:?} ...",
        repeats.len(),
        sorted.len(),
        &repeats[..repeats.len().min(10)]
    );
    range.count() - sorted.len()
}

/// Fails unless `numbers` are the numbers of `range`, each exactly once.
pub(crate) fn assert_each_once(numbers: &[String], range: RangeInclusive<i64>) {
    let missing = missing(numbers, range.clone());
    assert_eq!(missing, 0, "missing from {range:?}, though no number may be burned");
}

/// A token, as `tombola token new` creates it.
#[derive(Clone)]
pub(crate) struct Token {
    pub(crate) text: String,
    /// The entry for the config, as an inline table.
    pub(crate) entry: String,
}

impl Token {
    pub(crate) async fn new(name: &str, scope: &str) -> Self {
        Self::with(name, scope, &[]).await
    }

    /// Creates a token with more flags.
    pub(crate) async fn with(name: &str, scope: &str, flags: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tombola"));
        command.args(["token", "new", "--name", name, "--scope", scope]).args(flags);
        let Finished { status, stdout, stderr } = run(command).await;
        assert_eq!(status.code(), Some(0), "{stderr}");
        let lines = stdout.trim().strip_prefix("[[auth.tokens]]\n").unwrap().replace('\n', ", ");
        Self { text: stderr.trim().to_owned(), entry: format!("{{ {lines} }}") }
    }

    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.text)
    }
}

pub(crate) fn with_tokens(config: Config, tokens: &[&Token]) -> Config {
    let entries: Vec<_> = tokens.iter().map(|token| token.entry.as_str()).collect();
    config.set("auth.tokens", format!("[{}]", entries.join(", ")))
}

/// Returns the first column of a query on a database file.
pub(crate) fn column<T: FromSql>(file: &Path, sql: &str) -> Vec<T> {
    let connection = Connection::open(file).unwrap();
    let mut statement = connection.prepare(sql).unwrap();
    let rows = statement.query_map((), |row| row.get(0)).unwrap();
    rows.collect::<Result<_, _>>().unwrap()
}
