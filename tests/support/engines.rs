//! The engines that can be a fleet's store, as real processes on loopback: nodes of etcd, and PostgreSQL.
//! Knows nothing of what the tests do with them.

use std::fs::Permissions;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::{PATIENCE, Process, eventually, skipped};

/// The user `nobody` of Debian and most other systems. PostgreSQL refuses to run as root.
const NOBODY: u32 = 65_534;

/// Returns an address that is not in use. Its port is below those that the system assigns by itself (32768
/// and above on Linux): all other tests use these, and one of them might take the port before the server
/// listens.
pub(crate) fn free_address() -> SocketAddr {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok();
    let listener = std::iter::repeat_with(|| rand::random_range(16_000..32_000)).find_map(free);
    listener.unwrap().local_addr().unwrap()
}

/// A root certificate and what it has signed, as PEM files: `server` is for 127.0.0.1, `client` is for the
/// user `tombola`, and `other-ca` is an unrelated root.
pub(crate) struct Pki {
    folder: TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let pki = Self { folder: tempfile::tempdir().unwrap() };
        let (ca, issuer) = root("a root for tests");
        std::fs::write(pki.path("ca.pem"), ca).unwrap();
        std::fs::write(pki.path("other-ca.pem"), root("another").0).unwrap();
        for (name, subject) in [("server", "127.0.0.1"), ("client", "tombola")] {
            let mut params = CertificateParams::new(vec![subject.to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, subject);
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &issuer).unwrap();
            std::fs::write(pki.path(&format!("{name}.pem")), certificate.pem()).unwrap();
            std::fs::write(pki.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        pki
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn root(name: &str) -> (String, Issuer<'static, KeyPair>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    (certificate.pem(), Issuer::new(params, key))
}

/// The addresses on which a node of etcd listens, and those that it advertises. They differ if there is a
/// proxy in between.
#[derive(Clone, Copy)]
pub(crate) struct Listens {
    pub(crate) client: SocketAddr,
    pub(crate) peer: SocketAddr,
    pub(crate) shown_client: SocketAddr,
    pub(crate) shown_peer: SocketAddr,
}

impl Listens {
    /// Returns free ports, with no proxy in between.
    pub(crate) fn new() -> Self {
        let (client, peer) = (free_address(), free_address());
        Self { client, peer, shown_client: client, shown_peer: peer }
    }
}

/// A cluster of etcd. Its nodes can be stopped and started again, and keep their data.
pub(crate) struct Etcd {
    folder: TempDir,
    scheme: &'static str,
    flags: Vec<String>,
    listens: Vec<Listens>,
    nodes: Vec<Option<Process>>,
}

impl Etcd {
    /// Starts a cluster. If etcd is not installed, reports that and returns `None`.
    pub(crate) async fn start(nodes: usize) -> Option<Self> {
        let listens: Vec<_> = (0..nodes).map(|_| Listens::new()).collect();
        Self::start_at(&listens, None).await
    }

    /// Starts one node that speaks TLS and requires a client certificate of the same root.
    pub(crate) async fn start_tls(pki: &Pki) -> Option<Self> {
        Self::start_at(&[Listens::new()], Some(pki)).await
    }

    pub(crate) async fn start_at(listens: &[Listens], pki: Option<&Pki>) -> Option<Self> {
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            skipped("etcd is not installed (Debian: etcd-server, etcd-client)");
            return None;
        }
        let flags = pki.map(|pki| {
            ["cert-file=server.pem", "key-file=server.key", "trusted-ca-file=ca.pem"]
                .map(|flag| {
                    let (flag, file) = flag.split_once('=').unwrap();
                    format!("--{flag}={}", pki.path(file).display())
                })
                .into_iter()
                .chain(["--client-cert-auth".to_owned()])
                .collect()
        });
        let mut etcd = Self {
            folder: tempfile::tempdir().unwrap(),
            scheme: if pki.is_some() { "https" } else { "http" },
            flags: flags.unwrap_or_default(),
            listens: listens.to_owned(),
            nodes: listens.iter().map(|_| None).collect(),
        };
        for node in 0..listens.len() {
            etcd.run(node);
        }
        for node in 0..listens.len() {
            etcd.serves(node).await;
        }
        Some(etcd)
    }

    /// Waits until a node serves clients, for which the cluster needs a leader.
    pub(crate) async fn serves(&self, node: usize) {
        let process = self.nodes[node].as_ref().unwrap();
        eventually("a node of etcd that serves clients", async || {
            process.stderr.lock().unwrap().contains("serving client traffic").then_some(())
        })
        .await;
    }

    /// Returns the addresses for clients, each as `HOST:PORT`.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.listens.iter().map(|listens| listens.shown_client.to_string()).collect()
    }

    /// Starts a node for the first time or again.
    pub(crate) fn run(&mut self, node: usize) {
        let listens = self.listens[node];
        let peers = self.listens.iter().enumerate();
        let cluster: Vec<_> =
            peers.map(|(node, at)| format!("node{node}=http://{}", at.shown_peer)).collect();
        let mut command = Command::new("etcd");
        command
            .arg(format!("--name=node{node}"))
            .arg(format!("--data-dir={}", self.folder.path().join(format!("node{node}")).display()))
            .arg(format!("--listen-client-urls={}://{}", self.scheme, listens.client))
            .arg(format!("--advertise-client-urls={}://{}", self.scheme, listens.shown_client))
            .arg(format!("--listen-peer-urls=http://{}", listens.peer))
            .arg(format!("--initial-advertise-peer-urls=http://{}", listens.shown_peer))
            .arg(format!("--initial-cluster={}", cluster.join(",")))
            .args(["--logger=zap", "--log-outputs=stderr"])
            .args(&self.flags);
        self.nodes[node] = Some(Process::spawn(command));
    }

    /// Sends SIGKILL to a node.
    pub(crate) async fn kill(&mut self, node: usize) {
        let mut process = self.nodes[node].take().unwrap();
        process.signal(Signal::SIGKILL);
        process.finish().await;
    }

    /// Stops a node with SIGSTOP, until SIGCONT.
    pub(crate) fn pause(&self, node: usize) {
        self.nodes[node].as_ref().unwrap().pause();
    }

    /// Sends a signal to a node.
    pub(crate) fn signal(&self, node: usize, signal: Signal) {
        self.nodes[node].as_ref().unwrap().signal(signal);
    }

    /// Runs `etcdctl` on the first node. `user` is `root:secret` if authentication is enabled.
    pub(crate) fn ctl(&self, user: Option<&str>, words: &[&str]) {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg(format!("--endpoints={}", self.endpoints()[0]));
        if let Some(user) = user {
            command.arg(format!("--user={user}"));
        }
        let output = command.args(words).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "etcdctl {words:?}: {output:?}");
    }
}

/// A PostgreSQL server that can be stopped and started again, and keeps its data. Its superuser is `tombola`
/// with the password `secret`, which its Unix socket does not require.
pub(crate) struct Postgres {
    folder: TempDir,
    programs: PathBuf,
    address: SocketAddr,
    settings: Vec<String>,
    server: Option<Process>,
}

impl Postgres {
    /// Starts a server. If PostgreSQL is not installed, reports that and returns `None`. `settings` are lines
    /// of `postgresql.conf`. With `pki` it accepts TLS only, and requires a client certificate.
    pub(crate) async fn start(settings: &[&str], pki: Option<&Pki>) -> Option<Self> {
        let mut postgres = Self::new(settings)?;
        postgres.init().await;
        if let Some(pki) = pki {
            for (setting, name) in [
                ("ssl_cert_file", "server.pem"),
                ("ssl_key_file", "server.key"),
                ("ssl_ca_file", "ca.pem"),
            ] {
                let copy = postgres.file(name);
                std::fs::copy(pki.path(name), &copy).unwrap();
                std::fs::set_permissions(&copy, Permissions::from_mode(0o600)).unwrap();
                own(&copy);
                postgres.settings.push(format!("{setting}={}", copy.display()));
            }
            postgres.settings.push("ssl=on".to_owned());
            let rule = "hostssl all all 127.0.0.1/32 scram-sha-256 clientcert=verify-full\n";
            std::fs::write(postgres.file("data").join("pg_hba.conf"), rule).unwrap();
        }
        postgres.run().await;
        Some(postgres)
    }

    /// Returns a server without data, which [`Self::init`] or [`Self::copy`] creates. Returns `None` under
    /// the same condition as [`Self::start`].
    pub(crate) fn new(settings: &[&str]) -> Option<Self> {
        let Some(programs) = postgres_programs() else {
            skipped("PostgreSQL is not installed (Debian: postgresql-15)");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        own(folder.path());
        let settings = settings.iter().map(|&setting| setting.to_owned()).collect();
        Some(Self { folder, programs, address: free_address(), settings, server: None })
    }

    /// Creates the data of a new server.
    pub(crate) async fn init(&self) {
        let password = self.file("password");
        std::fs::write(&password, "secret\n").unwrap();
        own(&password);
        let mut init = self.command("initdb");
        init.args(["--username=tombola", "--auth-host=scram-sha-256", "--auth-local=trust"])
            .args(["--encoding=UTF8", "--locale=C"])
            .arg(format!("--pwfile={}", password.display()))
            // A small segment of the log keeps copies fast, for which tests wait.
            .arg("--wal-segsize=1")
            // No sync: after a crash of the machine, the next test creates its own folder.
            .args(["--no-sync", "--pgdata"])
            .arg(self.file("data"));
        let init = super::run(init).await;
        assert!(init.status.success(), "initdb: {}{}", init.stdout, init.stderr);
    }

    /// Creates the data of a standby of `primary`, which has to be running. Earlier data is lost.
    pub(crate) async fn copy(&self, primary: &Self) {
        let data = self.file("data");
        if data.exists() {
            std::fs::remove_dir_all(&data).unwrap();
        }
        let mut copy = primary.client("pg_basebackup");
        copy.args(["--checkpoint=fast", "--no-sync", "--write-recovery-conf", "--pgdata"])
            .arg(data);
        let copy = super::run(copy).await;
        assert!(copy.status.success(), "pg_basebackup: {}", copy.stderr);
    }

    /// Starts the server for the first time or again, and waits until it serves. A standby serves reads only.
    pub(crate) async fn run(&mut self) {
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.file("data"))
            .args(["-c", "listen_addresses=127.0.0.1", "-c"])
            .arg(format!("unix_socket_directories={}", self.folder.path().display()))
            .arg("-c")
            .arg(format!("port={}", self.address.port()));
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let server = Process::spawn(command);
        server.says("database system is ready to accept").await;
        self.server = Some(server);
    }

    /// Promotes a standby to a server that accepts writes, and waits until it does.
    pub(crate) async fn promote(&self) {
        let mut promote = self.command("pg_ctl");
        promote.args(["promote", "--pgdata"]).arg(self.file("data"));
        let promote = super::run(promote).await;
        assert!(promote.status.success(), "{}{}", promote.stdout, promote.stderr);
    }

    pub(crate) fn is_running(&self) -> bool {
        self.server.is_some()
    }

    /// Ends the server at once, as a crash would, even after SIGSTOP. It recovers committed data from its
    /// log.
    pub(crate) async fn stop(&mut self) {
        self.end_at_once();
        self.server.take().unwrap().finish().await;
    }

    /// Sends SIGQUIT, because SIGKILL would leave the child processes behind. A process stopped by SIGSTOP
    /// handles it only after SIGCONT.
    fn end_at_once(&self) {
        self.server.as_ref().unwrap().signal(Signal::SIGQUIT);
        self.signal(Signal::SIGCONT);
    }

    /// Sends a signal to the server and to the processes that it has started for its clients.
    pub(crate) fn signal(&self, signal: Signal) {
        let server = self.server.as_ref().unwrap();
        server.signal(signal);
        for child in children(server.id()) {
            // The child may have ended in the meantime.
            let _ = kill(child, signal);
        }
    }

    /// Sends a signal only to the processes that serve current connections. New connections are served.
    pub(crate) fn signal_sessions(&self, signal: Signal) {
        let mut sessions = children(self.server.as_ref().unwrap().id());
        sessions.retain(|session| {
            let title = std::fs::read_to_string(format!("/proc/{session}/cmdline"));
            title.is_ok_and(|title| title.starts_with("postgres: tombola "))
        });
        assert!(!sessions.is_empty(), "no client is connected");
        for session in sessions {
            kill(session, signal).unwrap();
        }
    }

    /// `HOST:PORT`.
    pub(crate) fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Returns the Unix socket on which it listens too, without a password.
    pub(crate) fn socket(&self) -> PathBuf {
        self.file(&format!(".s.PGSQL.{}", self.address.port()))
    }

    /// Adds a setting, which takes effect at the next start.
    pub(crate) fn set(&mut self, setting: String) {
        self.settings.push(setting);
    }

    /// Runs a statement with `psql`.
    pub(crate) async fn sql(&self, statement: &str) {
        let mut command = self.client("psql");
        command.args(["--no-psqlrc", "--dbname=postgres", "--command", statement]);
        let finished = super::run(command).await;
        assert!(finished.status.success(), "{statement}: {}", finished.stderr);
    }

    /// Runs a query with `psql`, and returns the one value that it selects.
    pub(crate) async fn query(&self, query: &str) -> String {
        let mut command = self.client("psql");
        command.args(["--no-psqlrc", "--tuples-only", "--no-align", "--dbname=postgres"]);
        command.args(["--command", query]);
        let finished = super::run(command).await;
        assert!(finished.status.success(), "{query}: {}", finished.stderr);
        finished.stdout.trim().to_owned()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the command line of a program that connects to the server.
    fn client(&self, program: &str) -> Command {
        let mut command = self.command(program);
        command
            .arg("--username=tombola")
            .arg(format!("--host={}", self.folder.path().display()))
            .arg(format!("--port={}", self.address.port()));
        command
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.programs.join(program));
        command.current_dir(self.folder.path());
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.server.as_mut().is_none_or(|server| !server.is_running()) {
            return;
        }
        self.end_at_once();
        let server = self.server.as_mut().unwrap();
        let deadline = std::time::Instant::now() + PATIENCE;
        while server.is_running() && std::time::Instant::now() < deadline {
            std::thread::sleep(super::POLL_INTERVAL);
        }
    }
}

/// Returns the programs of the newest version that Debian has installed, or else those on the `PATH`.
fn postgres_programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten();
    let debian = versions.map(|version| version.unwrap().path().join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found: Vec<_> = debian.filter(|folder| folder.join("initdb").exists()).collect();
    found.sort();
    found
        .pop()
        .or_else(|| std::env::split_paths(&path).find(|folder| folder.join("initdb").exists()))
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// Gives a file to the user that PostgreSQL runs as.
fn own(path: &Path) {
    if is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

fn children(id: u32) -> Vec<Pid> {
    let list = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
    let list = list.unwrap_or_default();
    list.split_whitespace().map(|child| Pid::from_raw(child.parse().unwrap())).collect()
}
