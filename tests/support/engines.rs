//! The engines that a fleet agrees in, as real processes on loopback: etcd's nodes, and PostgreSQL. What
//! is asked of them is the tests' affair.

use std::fs::Permissions;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

use super::{PATIENCE, Process, eventually, skipped};

/// `nobody` of Debian, and of most others: PostgreSQL refuses to run as root.
const NOBODY: u32 = 65_534;

/// An address that nobody listens on. Not one that the system gives to whoever asks for any, as all other
/// tests do (32768 and above on Linux): it would be taken before the server listens.
pub(crate) fn free_address() -> SocketAddr {
    let free = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok();
    let listener = std::iter::repeat_with(|| rand::random_range(16_000..32_000)).find_map(free);
    listener.unwrap().local_addr().unwrap()
}

/// A root and what it vouches for, as PEM files: `server` is for 127.0.0.1, `client` for the user
/// `tombola`, and `other-ca` is of somebody else.
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

/// Where a node of etcd listens, and where it says that it does: a proxy may be in between.
#[derive(Clone, Copy)]
pub(crate) struct Listens {
    pub(crate) client: SocketAddr,
    pub(crate) peer: SocketAddr,
    pub(crate) shown_client: SocketAddr,
    pub(crate) shown_peer: SocketAddr,
}

impl Listens {
    /// Free ports, and nothing in between.
    pub(crate) fn new() -> Self {
        let (client, peer) = (free_address(), free_address());
        Self { client, peer, shown_client: client, shown_peer: peer }
    }
}

/// A cluster of etcd, whose nodes come and go and keep their data.
pub(crate) struct Etcd {
    folder: TempDir,
    scheme: &'static str,
    flags: Vec<String>,
    listens: Vec<Listens>,
    nodes: Vec<Option<Process>>,
}

impl Etcd {
    /// None, with a line that says so, where it is not installed.
    pub(crate) async fn start(nodes: usize) -> Option<Self> {
        let listens: Vec<_> = (0..nodes).map(|_| Listens::new()).collect();
        Self::start_at(&listens, None).await
    }

    /// One that speaks TLS with clients that show a certificate of the same root.
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

    /// Waits until a node has a leader.
    pub(crate) async fn serves(&self, node: usize) {
        let process = self.nodes[node].as_ref().unwrap();
        eventually("a node of etcd that serves clients", async || {
            process.stderr.lock().unwrap().contains("serving client traffic").then_some(())
        })
        .await;
    }

    /// Where its clients reach it, each as `HOST:PORT`.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.listens.iter().map(|listens| listens.shown_client.to_string()).collect()
    }

    /// Starts a node, or starts it again.
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

    /// SIGKILL.
    pub(crate) async fn kill(&mut self, node: usize) {
        let mut process = self.nodes[node].take().unwrap();
        process.signal(Signal::SIGKILL);
        process.finish().await;
    }

    /// Once this returns, a node that was to stop says nothing any more: of the threads of a busy one
    /// some may go on for a while after the signal was sent.
    pub(crate) fn signal(&self, node: usize, signal: Signal) {
        let process = self.nodes[node].as_ref().unwrap();
        process.signal(signal);
        if signal == Signal::SIGSTOP {
            let id = Id::Pid(Pid::from_raw(process.id() as i32));
            waitid(id, WaitPidFlag::WSTOPPED).unwrap();
        }
    }

    /// One call of `etcdctl` at the first node; `root:secret` where users are asked for.
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

/// A server of PostgreSQL that comes and goes and keeps its data. Its superuser is `tombola` with the
/// password `secret`.
pub(crate) struct Postgres {
    folder: TempDir,
    programs: PathBuf,
    address: SocketAddr,
    settings: Vec<String>,
    server: Option<Process>,
}

impl Postgres {
    /// None, with a line that says so, where it is not installed. `settings` are as in
    /// `postgresql.conf`; with `pki` it speaks TLS only, with clients that show a certificate.
    pub(crate) async fn start(settings: &[&str], pki: Option<&Pki>) -> Option<Self> {
        let Some(programs) = postgres_programs() else {
            skipped("PostgreSQL is not installed (Debian: postgresql-15)");
            return None;
        };
        let mut postgres = Self {
            folder: tempfile::tempdir().unwrap(),
            programs,
            address: free_address(),
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            server: None,
        };
        let password = postgres.file("password");
        std::fs::write(&password, "secret\n").unwrap();
        own(postgres.folder.path());
        own(&password);
        let mut init = postgres.command("initdb");
        init.args(["--username=tombola", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"])
            .arg(format!("--pwfile={}", password.display()))
            // A folder that is lost in a crash is made anew by the next test.
            .args(["--no-sync", "--pgdata"])
            .arg(postgres.file("data"));
        let init = super::run(init).await;
        assert!(init.status.success(), "initdb: {}{}", init.stdout, init.stderr);
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

    /// Starts it, or starts it again, and waits until it serves.
    pub(crate) async fn run(&mut self) {
        let mut command = self.command("postgres");
        command
            .arg("-D")
            .arg(self.file("data"))
            .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .arg("-c")
            .arg(format!("port={}", self.address.port()));
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        let server = Process::spawn(command);
        server.says("database system is ready to accept connections").await;
        self.server = Some(server);
    }

    /// Ends it at once, as a crash would: what was committed is found again in its log.
    pub(crate) async fn stop(&mut self) {
        let mut server = self.server.take().unwrap();
        // Its own children end with it.
        server.signal(Signal::SIGQUIT);
        server.finish().await;
    }

    /// To the server and to those that it has started for its clients.
    pub(crate) fn signal(&self, signal: Signal) {
        let server = self.server.as_ref().unwrap();
        server.signal(signal);
        for child in children(server.id()) {
            // One may have ended just now.
            let _ = kill(child, signal);
        }
    }

    /// To those alone that serve its clients now: who connects anew is served.
    pub(crate) fn signal_sessions(&self, signal: Signal) {
        let mut sessions = children(self.server.as_ref().unwrap().id());
        sessions.retain(|session| {
            let title = std::fs::read_to_string(format!("/proc/{session}/cmdline"));
            title.is_ok_and(|title| title.starts_with("postgres: tombola "))
        });
        assert!(!sessions.is_empty(), "nobody is connected");
        for session in sessions {
            kill(session, signal).unwrap();
        }
    }

    /// `HOST:PORT`.
    pub(crate) fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Asks it something with `psql`.
    pub(crate) async fn sql(&self, statement: &str) {
        let mut command = self.command("psql");
        command
            .env("PGPASSWORD", "secret")
            .args(["--no-psqlrc", "--host=127.0.0.1", "--username=tombola", "--dbname=postgres"])
            .arg(format!("--port={}", self.address.port()))
            .arg(format!("--command={statement}"));
        let finished = super::run(command).await;
        assert!(finished.status.success(), "{statement}: {}", finished.stderr);
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
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
        let Some(server) = &mut self.server else { return };
        // SIGKILL would leave its children behind; a stopped process hears nothing else.
        let _ = kill(Pid::from_raw(server.id() as i32), Signal::SIGQUIT);
        for process in children(server.id()).into_iter().chain([Pid::from_raw(server.id() as i32)])
        {
            let _ = kill(process, Signal::SIGCONT);
        }
        let deadline = std::time::Instant::now() + PATIENCE;
        while server.is_running() && std::time::Instant::now() < deadline {
            std::thread::sleep(super::POLL_INTERVAL);
        }
    }
}

/// The newest that Debian has installed, or what the path leads to.
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

/// Gives a file to whoever PostgreSQL runs as.
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
