//! A cluster of etcd processes, with a link of these tests in front of every address. Each node listens on
//! Unix sockets in its folder, so no port is used that another process might take.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use serde::Deserialize;
use tempfile::TempDir;

use crate::chaos::{Engine, how};
use crate::links::{Cut, Links};
use crate::store::copy_folder;
use crate::support::{Process, eventually, run, skipped};

/// The names of the sockets. Etcd requires the form of an address.
const PEERS: &str = "127.0.0.1:1";
const CLIENTS: &str = "127.0.0.1:2";

/// Returns whether a fleet can use etcd here, and reports what is missing.
pub(crate) fn is_there() -> bool {
    let installed = |program| Command::new(program).arg("--help").output().is_ok();
    let missing = if !cfg!(feature = "etcd") {
        "built without the feature etcd"
    } else if !installed("etcd") || !installed("etcdctl") {
        "etcd is not installed"
    } else {
        return true;
    };
    skipped(missing);
    false
}

pub(crate) struct Cluster {
    pub(crate) links: Links,
    pub(crate) nodes: Vec<Node>,
    folder: TempDir,
}

pub(crate) struct Node {
    pub(crate) name: String,
    /// The id that the node uses towards its peers, known once the cluster runs.
    id: String,
    folder: PathBuf,
    /// The address for its peers.
    peer: String,
    process: Option<Process>,
}

impl Node {
    fn endpoint(&self) -> String {
        format!("unix://{}", self.folder.join(CLIENTS).display())
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }
}

#[derive(Deserialize)]
struct Members {
    members: Vec<Member>,
}

#[derive(Deserialize)]
struct Member {
    #[serde(rename = "ID")]
    id: u64,
    name: String,
}

impl Cluster {
    /// Starts `size` nodes and waits until they serve.
    pub(crate) async fn start(size: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut links = Links::new();
        let mut nodes = Vec::new();
        for index in 0..size {
            let name = format!("etcd-{index}");
            let folder = folder.path().join(&name);
            std::fs::create_dir(&folder).unwrap();
            let peer = links.open(None, &name, folder.join(PEERS)).await.to_string();
            nodes.push(Node { name, id: String::new(), folder, peer, process: None });
        }
        let mut cluster = Self { links, nodes, folder };
        for index in 0..size {
            cluster.begin(index);
        }
        cluster.serves().await;
        let listed = cluster.control(&["member", "list", "-w", "json"]).await.unwrap();
        let Members { members } = serde_json::from_str(&listed).unwrap();
        for node in &mut cluster.nodes {
            let member = members.iter().find(|member| member.name == node.name).unwrap();
            node.id = format!("{:x}", member.id);
        }
        cluster
    }

    /// Returns the store's address for the client of this name, which has links of its own to all nodes.
    pub(crate) async fn address_for(&mut self, from: &str) -> String {
        let mut endpoints = Vec::new();
        for node in &self.nodes {
            let socket = node.folder.join(CLIENTS);
            endpoints.push(self.links.open(Some(from), &node.name, socket).await.to_string());
        }
        format!("etcd://{}", endpoints.join(","))
    }

    /// Starts a node that is not running, without waiting for it.
    pub(crate) fn begin(&mut self, index: usize) {
        let peers = self.nodes.iter().map(|node| format!("{}=http://{}", node.name, node.peer));
        let peers = peers.collect::<Vec<_>>().join(",");
        let node = &mut self.nodes[index];
        for socket in [PEERS, CLIENTS] {
            // A killed node leaves its sockets behind.
            let _ = std::fs::remove_file(node.folder.join(socket));
        }
        let peer = format!("http://{}", node.peer);
        let mut command = Command::new("etcd");
        command.current_dir(&node.folder).args(["--name", &node.name, "--data-dir", "data"]);
        command.args(["--listen-peer-urls", &format!("unix://{PEERS}")]);
        command.args(["--listen-client-urls", &format!("unix://{CLIENTS}")]);
        command.args(["--initial-advertise-peer-urls", &peer, "--initial-cluster", &peers]);
        // Clients are given all addresses, so they don't use this one.
        command.args(["--advertise-client-urls", &peer, "--enable-grpc-gateway=false"]);
        command.args(["--logger", "zap", "--log-level", "warn", "--log-outputs", "stderr"]);
        node.process = Some(Process::spawn(command));
    }

    /// Waits until the cluster responds.
    pub(crate) async fn serves(&self) {
        eventually("a cluster that serves", async || self.control(&["get", "anything"]).await.ok())
            .await;
    }

    /// Sends SIGKILL to a node.
    pub(crate) async fn kill(&mut self, index: usize) {
        let mut process = self.nodes[index].process.take().unwrap();
        process.signal(Signal::SIGKILL);
        process.finish().await;
    }

    pub(crate) fn signal(&self, index: usize, signal: Signal) {
        self.nodes[index].process.as_ref().unwrap().signal(signal);
    }

    /// Cuts a node off from all others or, if there is no `index`, all nodes from one another.
    pub(crate) fn part(&self, index: Option<usize>, cut: Cut) {
        self.each_link_of(index, |from, to| self.links.cut(from, to, cut));
    }

    pub(crate) fn join(&self, index: Option<usize>) {
        self.each_link_of(index, |from, to| self.links.heal(from, to));
    }

    fn each_link_of(&self, index: Option<usize>, change: impl Fn(&str, &str)) {
        for (from, sender) in self.nodes.iter().enumerate() {
            for (to, receiver) in self.nodes.iter().enumerate() {
                if from != to && index.is_none_or(|index| index == from || index == to) {
                    change(&sender.id, &receiver.name);
                }
            }
        }
    }

    /// Copies all data of the store. Its nodes must not be running.
    pub(crate) fn copy_data(&self) -> TempDir {
        let copy = tempfile::tempdir().unwrap();
        for node in &self.nodes {
            copy_folder(&node.data(), &copy.path().join(&node.name));
        }
        copy
    }

    /// Replaces the data of the store with a copy. Its nodes must not be running.
    pub(crate) fn restore_data(&self, copy: &Path) {
        for node in &self.nodes {
            std::fs::remove_dir_all(node.data()).unwrap();
            copy_folder(&copy.join(&node.name), &node.data());
        }
    }

    /// Runs etcdctl on all nodes, without the links. Returns its output, or its error.
    pub(crate) async fn control(&self, words: &[&str]) -> Result<String, String> {
        let endpoints = self.nodes.iter().map(Node::endpoint).collect::<Vec<_>>().join(",");
        self.control_by(&endpoints, words).await
    }

    /// Does the same through these endpoints.
    async fn control_by(&self, endpoints: &str, words: &[&str]) -> Result<String, String> {
        let mut command = Command::new("etcdctl");
        command.current_dir(self.folder.path()).args(["--endpoints", endpoints]);
        command.env("ETCDCTL_API", "3").args(["--command-timeout", "2s"]).args(words);
        let finished = run(command).await;
        if finished.status.success() { Ok(finished.stdout) } else { Err(finished.stderr) }
    }
}

/// The faults of the node of this number, or of several.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    NodeKilled(usize),
    NodePaused(usize),
    /// A minority of the nodes is cut off.
    NodeCutOff(usize, Cut),
    /// No majority is left.
    NodesApart(Cut),
    /// All nodes are killed at once.
    StoreKilled,
}

impl Engine for Cluster {
    type Fault = Fault;

    const NODES: &str = "three nodes of etcd";
    const COUNT: usize = 3;
    const HAS_RECEIPTS: bool = false;
    const FAULTS: &[fn(usize, Cut) -> Fault] = &[
        |node, _| Fault::NodeKilled(node),
        |node, _| Fault::NodePaused(node),
        Fault::NodeCutOff,
        |_, cut| Fault::NodesApart(cut),
        |_, _| Fault::StoreKilled,
    ];

    fn kind(fault: Fault) -> String {
        match fault {
            Fault::NodeKilled(_) => "etcd node killed (-9)".into(),
            Fault::NodePaused(_) => "etcd node paused (SIGSTOP)".into(),
            Fault::NodeCutOff(_, cut) => format!("etcd node cut off from the others, {}", how(cut)),
            Fault::NodesApart(cut) => format!("all etcd nodes apart, {}", how(cut)),
            Fault::StoreKilled => "all etcd nodes killed (-9)".into(),
        }
    }

    fn stops_writes(fault: Fault) -> bool {
        matches!(fault, Fault::NodesApart(_) | Fault::StoreKilled)
    }

    async fn begin_fault(&mut self, fault: Fault) {
        match fault {
            Fault::NodeKilled(index) => self.kill(index).await,
            Fault::NodePaused(index) => self.signal(index, Signal::SIGSTOP),
            Fault::NodeCutOff(index, cut) => self.part(Some(index), cut),
            Fault::NodesApart(cut) => self.part(None, cut),
            Fault::StoreKilled => {
                for index in 0..self.nodes.len() {
                    self.kill(index).await;
                }
            }
        }
    }

    async fn end_fault(&mut self, fault: Fault) {
        match fault {
            Fault::NodeKilled(index) => self.begin(index),
            Fault::NodePaused(index) => self.signal(index, Signal::SIGCONT),
            Fault::NodeCutOff(index, _) => self.join(Some(index)),
            Fault::NodesApart(_) => self.join(None),
            Fault::StoreKilled => {
                for index in 0..self.nodes.len() {
                    self.begin(index);
                }
            }
        }
    }

    async fn address_for(&mut self, client: &str) -> String {
        Self::address_for(self, client).await
    }

    fn cut_off(&self, client: &str, cut: Cut) {
        for node in &self.nodes {
            self.links.cut(client, &node.name, cut);
        }
    }

    fn heal(&self, client: &str) {
        for node in &self.nodes {
            self.links.heal(client, &node.name);
        }
    }
}

/// The other tests rely on this: a cut link carries nothing, and a healed one carries everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_what_its_links_let_it_be() {
    if !is_there() {
        return;
    }
    let mut cluster = Cluster::start(3).await;
    let address = cluster.address_for("somebody").await;
    let links = address.strip_prefix("etcd://").unwrap();
    let get = ["get", "anything"];
    for cut in [Cut::Refused, Cut::Silent, Cut::Mute] {
        // Requests that were in progress when the cut began end after a while.
        cluster.part(None, cut);
        eventually("a cluster without a leader", async || cluster.control(&get).await.err()).await;
        cluster.join(None);
        cluster.serves().await;
        cluster.part(Some(0), cut);
        cluster.serves().await;
        cluster.join(Some(0));

        // A node that joins again may start an election, in which requests time out.
        let through_links = async || cluster.control_by(links, &get).await.ok();
        eventually("a response through the links", through_links).await;
        for node in &cluster.nodes {
            cluster.links.cut("somebody", &node.name, cut);
        }
        cluster.control_by(links, &get).await.unwrap_err();
        for node in &cluster.nodes {
            cluster.links.heal("somebody", &node.name);
        }
        eventually("a response through the healed links", through_links).await;
    }
}
