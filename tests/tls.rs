//! HTTPS: which certificate clients see, and what a bad certificate does to the server.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use support::{Config, One, PATIENCE, Server, Site, eventually};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{
    self, ClientConfig, ClientConnection, ProtocolVersion, RootCertStore, StreamOwned,
    SupportedProtocolVersion, crypto::ring, version,
};

/// The time that a client may keep the server waiting, in the test that waits for it.
const LIMIT: Duration = Duration::from_millis(500);

/// A self-signed certificate for `localhost`, and its key.
struct Pair(CertifiedKey<KeyPair>);

impl Pair {
    fn new() -> Self {
        Self(generate_simple_self_signed(["localhost".to_owned()]).unwrap())
    }

    fn write_certificate(&self, site: &Site) {
        std::fs::write(certificate(site), self.0.cert.pem()).unwrap();
    }

    fn write_key(&self, site: &Site) {
        std::fs::write(key(site), self.0.signing_key.serialize_pem()).unwrap();
    }

    fn write(&self, site: &Site) {
        self.write_certificate(site);
        self.write_key(site);
    }

    fn der(&self) -> &CertificateDer<'static> {
        self.0.cert.der()
    }
}

fn certificate(site: &Site) -> PathBuf {
    site.folder().join("cert.pem")
}

fn key(site: &Site) -> PathBuf {
    site.folder().join("key.pem")
}

fn config() -> Config {
    let config = Config::new().pool("int", 1, 1_000, 1, 500);
    config.set("server.tls.cert", "'cert.pem'").set("server.tls.key", "'key.pem'")
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

/// Completes a handshake for the name `localhost` with these TLS versions, trusting only these certificates.
fn connect(
    server: &Server,
    trusted: &[&Pair],
    versions: &[&'static SupportedProtocolVersion],
) -> Result<Stream, std::io::Error> {
    let mut roots = RootCertStore::empty();
    for pair in trusted {
        roots.add(pair.der().clone()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from("localhost").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(server.address()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = StreamOwned::new(client, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// Sends one request on a connection that stays open, and returns the response.
fn get(stream: &mut Stream, target: &str) -> String {
    write!(stream, "GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"}") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.push(byte[0]);
    }
    String::from_utf8(answer).unwrap()
}

fn number(stream: &mut Stream) -> String {
    let answer = get(stream, "/random");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let one: One<'_> = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    one.number.get().to_owned()
}

/// Returns the certificate that new connections get now.
fn presented(server: &Server, pairs: &[&Pair]) -> CertificateDer<'static> {
    let stream = connect(server, pairs, rustls::DEFAULT_VERSIONS).unwrap();
    stream.conn.peer_certificates().unwrap()[0].clone()
}

/// Story: a server that spoke only TLS 1.3 locked out old clients, or a server offered HTTP/2 and then spoke
/// HTTP/1.1.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_come_over_tls_1_2_and_1_3() {
    let site = Site::new(&config());
    let pair = Pair::new();
    pair.write(&site);
    site.fill().await;
    let server = site.start().await;

    let mut numbers = Vec::new();
    for (version, expected) in
        [(&version::TLS12, ProtocolVersion::TLSv1_2), (&version::TLS13, ProtocolVersion::TLSv1_3)]
    {
        let mut stream = connect(&server, &[&pair], &[version]).unwrap();
        assert_eq!(stream.conn.protocol_version(), Some(expected));
        assert_eq!(stream.conn.alpn_protocol(), Some(&b"http/1.1"[..]));
        numbers.extend([number(&mut stream), number(&mut stream)]);
    }
    assert_eq!(support::missing(&numbers, 1..=1_000), 996);

    // A client that does not trust the certificate refuses it.
    let stranger = connect(&server, &[&Pair::new()], rustls::DEFAULT_VERSIONS);
    assert!(stranger.unwrap_err().to_string().contains("invalid peer certificate"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simplest_mode_serves_https_too() {
    let site = Site::new(&config().set("server.mode", "'simple'"));
    let pair = Pair::new();
    pair.write(&site);
    let server = site.start().await;
    let mut stream = connect(&server, &[&pair], rustls::DEFAULT_VERSIONS).unwrap();
    for _ in 0..2 {
        let response = get(&mut stream, "/random");
        assert!(response.starts_with("HTTP/1.1 200"), "{response}");
    }
    server.stop().await;
}

/// Story: a certificate was renewed, and clients saw the old one until it expired.
#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_signal_brings_the_new_certificate_and_leaves_open_connections_alone() {
    let site = Site::new(&config());
    let (old, new) = (Pair::new(), Pair::new());
    old.write(&site);
    site.fill().await;
    let server = site.start().await;
    let mut before = connect(&server, &[&old], rustls::DEFAULT_VERSIONS).unwrap();
    let mut numbers = vec![number(&mut before)];

    new.write(&site);
    assert_eq!(&presented(&server, &[&old, &new]), old.der(), "the file was read without SIGHUP");
    server.process.signal(Signal::SIGHUP);
    eventually("the new certificate", async || {
        (presented(&server, &[&old, &new]) == *new.der()).then_some(())
    })
    .await;

    numbers.push(number(&mut before));
    let mut after = connect(&server, &[&new], rustls::DEFAULT_VERSIONS).unwrap();
    numbers.push(number(&mut after));
    assert_eq!(support::missing(&numbers, 1..=1_000), 997);
    server.stop().await;
}

/// Story: half a renewal, the new certificate with the old key, ended the server or its TLS.
#[tokio::test(flavor = "multi_thread")]
async fn bad_files_at_a_reload_are_told_and_change_nothing() {
    let site = Site::new(&config());
    let (old, new, newest) = (Pair::new(), Pair::new(), Pair::new());
    old.write(&site);
    let mut server = site.start().await;

    new.write_certificate(&site);
    server.process.signal(Signal::SIGHUP);
    server.process.says("key of the first certificate").await;
    assert_eq!(&presented(&server, &[&old, &new]), old.der());
    std::fs::remove_file(certificate(&site)).unwrap();
    server.process.signal(Signal::SIGHUP);
    server.process.says("cert.pem: can't be read").await;
    assert_eq!(&presented(&server, &[&old, &new]), old.der());

    newest.write(&site);
    server.process.signal(Signal::SIGHUP);
    eventually("the newest certificate", async || {
        (presented(&server, &[&old, &newest]) == *newest.der()).then_some(())
    })
    .await;
    assert!(server.process.is_running());
    server.stop().await;
}

/// Story: SIGHUP ended a process that did not expect it.
#[tokio::test(flavor = "multi_thread")]
async fn a_hang_up_signal_without_a_change_does_nothing() {
    for mode in ["sharded", "json", "simple"] {
        let config = Config::new().pool("int", 1, 10, 1, 5).set("server.mode", format!("'{mode}'"));
        let site = Site::new(&config);
        let server = site.start().await;

        server.process.signal(Signal::SIGHUP);
        server.process.says("The settings were reloaded; none changed").await;

        server.take("int", None).await;
        server.stop().await;
    }
}

/// Story: an unusable certificate was noticed only by the first client.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_refuses_what_can_not_be_used_and_names_the_file() {
    let site = Site::new(&config());
    let (pair, other) = (Pair::new(), Pair::new());
    let refused = async |what: &[&str]| {
        let refusal = site.refusal().await;
        for part in what {
            assert!(refusal.contains(part), "{part:?} is not in {refusal}");
        }
        assert!(!refusal.contains("PRIVATE KEY-----\n"), "the key is in the message: {refusal}");
    };
    let write = |path: &Path, text: &str| std::fs::write(path, text).unwrap();

    refused(&["cert.pem", "can't be read", "No such file"]).await;
    pair.write_certificate(&site);
    refused(&["key.pem", "can't be read", "No such file"]).await;
    other.write_key(&site);
    refused(&["key.pem", "not the key", "cert.pem"]).await;
    write(&key(&site), &pair.0.cert.pem());
    refused(&["key.pem", "no private key in it"]).await;
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
    write(&key(&site), encrypted);
    refused(&["key.pem", "encrypted", "openssl pkey"]).await;
    pair.write_key(&site);
    write(&certificate(&site), "not PEM at all");
    refused(&["cert.pem", "no certificate in it"]).await;
    write(&certificate(&site), "-----BEGIN CERTIFICATE-----\nAAAA\n");
    refused(&["cert.pem", "not a PEM file"]).await;
    write(&certificate(&site), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    refused(&["cert.pem", "invalid peer certificate"]).await;
    pair.write(&site);
    site.start().await.stop().await;
}

/// Story: clients that still used plain http, or did not finish their handshake, held connections or ended
/// the server.
#[tokio::test(flavor = "multi_thread")]
async fn connections_without_a_handshake_are_closed_and_harm_no_others() {
    let site = Site::new(&config().set("server.client_timeout_ms", LIMIT.as_millis()));
    let pair = Pair::new();
    pair.write(&site);
    site.fill().await;
    let server = site.start().await;

    for (says, waits) in [
        (&b"GET /random HTTP/1.1\r\nhost: localhost\r\n\r\n"[..], false),
        // The beginning of a record that never completes.
        (&[0x16, 3, 1, 2, 0][..], true),
        (&[][..], true),
    ] {
        let begun = Instant::now();
        let mut stream = TcpStream::connect(server.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(says).unwrap();
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{says:?}: {error}"),
            _ => assert!(!answer.starts_with(b"HTTP"), "{answer:?}"),
        }
        assert!(!waits || begun.elapsed() >= LIMIT, "closed after {:?}", begun.elapsed());
    }
    let begun = Instant::now();
    let mut idle = connect(&server, &[&pair], rustls::DEFAULT_VERSIONS).unwrap();
    let _ended = idle.read(&mut [0]);
    assert!(begun.elapsed() >= LIMIT, "closed after {:?}", begun.elapsed());

    number(&mut connect(&server, &[&pair], rustls::DEFAULT_VERSIONS).unwrap());
    server.stop().await;
}

/// Story: a port scanner connected and sent nothing, and a stop waited for its handshake.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_does_not_wait_for_a_handshake() {
    const NEVER_MS: u64 = 3_600_000;
    let config =
        config().set("server.client_timeout_ms", NEVER_MS).set("server.drain_ms", NEVER_MS);
    let site = Site::new(&config);
    let pair = Pair::new();
    pair.write(&site);
    site.fill().await;
    let server = site.start().await;
    let _silent = TcpStream::connect(server.address()).unwrap();
    // This connection is accepted after the silent one.
    number(&mut connect(&server, &[&pair], rustls::DEFAULT_VERSIONS).unwrap());

    server.stop().await;
}
