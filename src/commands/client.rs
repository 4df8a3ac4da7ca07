//! Sends requests to a running server, for the commands that inspect one or draw from it. Knows nothing of
//! paths or of what a response means.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::request::Builder;
use axum::http::uri::{Scheme, Uri};
use axum::http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};

use super::exit::{Ended, Exit};
use crate::config::{Config, Location, Overrides, TOKEN_VARIABLE};
use crate::{auth, pem};

/// The longest wait for a whole response to [`Client::get`], including the connection. A healthy server takes
/// milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest wait for a connection, or for the next bytes of a response. A server that is busy with a large
/// response or waits for a slow disk takes a second.
const SILENCE: Duration = Duration::from_secs(10);

/// The longest body that is read: `/status` of a thousand shards has a third of a megabyte.
const BODY_LIMIT_BYTES: usize = 16 << 20;

/// Characters of an unexpected response in an error message: a few lines of a terminal.
const EXCERPT_CHARS: usize = 200;

/// The server, and the root that vouches for it.
#[derive(Debug, clap::Args)]
pub(super) struct Target {
    /// The server, http:// or https:// [default: the address in the settings]
    #[arg(long, value_name = "URL")]
    url: Option<Address>,
    /// Settings file [default: config.toml in the working directory, if it exists]
    #[arg(long, value_name = "FILE", conflicts_with = "url")]
    config: Option<PathBuf>,
    /// PEM file of the root that vouches for the server's certificate, for https
    /// [default: the certificate in the settings]
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl Target {
    /// Returns the target at this URL.
    pub(super) fn new(url: Address, ca: Option<PathBuf>) -> Self {
        Self { url: Some(url), config: None, ca }
    }

    /// Returns the server that the flags name.
    ///
    /// # Errors
    /// If settings or certificates can't be used.
    pub(super) fn server(self) -> anyhow::Result<Client> {
        let (address, ca) = match self.url {
            Some(address) => (address, self.ca),
            None => {
                let location = Location { file: self.config, dir: None };
                let config = Config::load(&Overrides { location, ..Overrides::default() })?;
                let tls = config.server.tls.as_ref();
                let address = Address::of(&config)?;
                (address, self.ca.or_else(|| tls.map(|tls| tls.cert.clone())))
            }
        };
        let tls = match (address.tls, ca) {
            (false, _) => None,
            (true, Some(ca)) => Some(connector(&ca)?),
            (true, None) => {
                let problem = format!(
                    "{address}: https needs --ca FILE, a PEM file of the root that vouches for the \
                     server's certificate, such as /etc/ssl/certs/ca-certificates.crt"
                );
                return Err(Ended::error(Exit::Settings, problem));
            }
        };
        Ok(Client { address, tls })
    }
}

/// Returns the value of `Authorization`, if a token is given: in the file, or in the environment.
pub(super) fn credentials(file: Option<PathBuf>) -> anyhow::Result<Option<HeaderValue>> {
    let wrong = |from: &str, problem: &dyn fmt::Display| {
        Ended::error(Exit::Settings, format!("{from}: {problem}"))
    };
    let (from, text) = match file {
        Some(file) => {
            let from = format!("--token-file {}", file.display());
            let text = std::fs::read_to_string(&file);
            (from.clone(), text.map_err(|error| wrong(&from, &format!("can't be read: {error}")))?)
        }
        None => match std::env::var(TOKEN_VARIABLE) {
            Ok(text) if !text.is_empty() => (TOKEN_VARIABLE.to_owned(), text),
            _ => return Ok(None),
        },
    };
    let credentials = auth::credentials(&text).map_err(|problem| wrong(&from, &problem))?;
    let mut credentials = HeaderValue::try_from(credentials).expect("printable ASCII was checked");
    credentials.set_sensitive(true);
    Ok(Some(credentials))
}

/// The address of a server.
#[derive(Clone, Debug)]
pub(super) struct Address {
    tls: bool,
    host: String,
    port: u16,
}

impl Address {
    /// Returns the address at which this machine reaches a server with these settings.
    fn of(config: &Config) -> anyhow::Result<Self> {
        let listen = config.server.listen;
        if listen.port() == 0 {
            let problem = "the settings have port 0, for which the system picks a port: use --url \
                           with the address that the server printed when it started";
            return Err(Ended::error(Exit::Settings, problem));
        }
        let host = match listen.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => "127.0.0.1".to_owned(),
            IpAddr::V6(ip) if ip.is_unspecified() => "::1".to_owned(),
            ip => ip.to_string(),
        };
        Ok(Self { tls: config.server.tls.is_some(), host, port: listen.port() })
    }

    /// Returns the host and port, as in `Host` and in URLs.
    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(url: &str) -> Result<Self, String> {
        let uri: Uri = url.parse().map_err(|error| format!("not a URL: {error}"))?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            _ => return Err("a URL begins with http:// or https://".to_owned()),
        };
        let authority = uri.authority().ok_or("names no server")?;
        if authority.as_str().contains('@') {
            return Err(
                "a URL with a user or password is not supported: use --token-file".to_owned()
            );
        }
        if uri.path_and_query().is_some_and(|rest| rest.as_str() != "/") {
            return Err("give only the server, without a path".to_owned());
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err("names no server".to_owned());
        }
        let port = match authority.port() {
            Some(port) => port.as_str().parse().map_err(|error| format!("not a port: {error}"))?,
            None if tls => 443,
            None => 80,
        };
        Ok(Self { tls, host, port })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(formatter, "{scheme}://{}", self.authority())
    }
}

/// A server to send requests to.
pub(super) struct Client {
    address: Address,
    tls: Option<TlsConnector>,
}

impl fmt::Display for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(formatter)
    }
}

/// A whole response.
#[derive(Debug)]
pub(super) struct HttpResponse {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

impl HttpResponse {
    /// Returns the beginning of the body, safe to print: a server can't use it to control or flood the
    /// terminal.
    pub(super) fn excerpt(&self) -> String {
        let body = String::from_utf8_lossy(&self.body);
        body.chars().filter(|c| !c.is_control()).take(EXCERPT_CHARS).collect()
    }
}

impl Client {
    /// Sends a GET request for `path`.
    ///
    /// # Errors
    /// [`Exit::Unreachable`] if no whole response arrives.
    pub(super) async fn get(
        &self,
        path: &'static str,
        credentials: Option<&HeaderValue>,
    ) -> anyhow::Result<HttpResponse> {
        let exchange = async {
            let request = self.request(Method::GET, path, credentials).body(Full::default());
            let request = request.map_err(|error| error.to_string())?;
            self.connect().await?.send(request, BODY_LIMIT_BYTES).await
        };
        let problem = match tokio::time::timeout(PATIENCE, exchange).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(problem)) => problem,
            Err(_) => format!("no response within {} s", PATIENCE.as_secs()),
        };
        Err(self.unreachable(&problem))
    }

    /// Returns the error for a server from which no whole response arrives.
    pub(super) fn unreachable(&self, problem: &str) -> anyhow::Error {
        let message = format!(
            "{self} does not respond: {problem}. Check that tombola is running there, or name another \
             server with --url"
        );
        Ended::error(Exit::Unreachable, message)
    }

    /// Returns the head of a request to this server, which may get more headers.
    pub(super) fn request(
        &self,
        method: Method,
        target: &str,
        credentials: Option<&HeaderValue>,
    ) -> Builder {
        let request =
            Request::builder().method(method).uri(target).header(HOST, self.address.authority());
        match credentials {
            Some(credentials) => request.header(AUTHORIZATION, credentials),
            None => request,
        }
    }

    /// Opens a connection, which needs the runtime as long as it exists.
    pub(super) async fn connect(&self) -> Result<Connection, String> {
        in_time(async {
            let Address { host, port, .. } = &self.address;
            let socket = TcpStream::connect((&**host, *port)).await.map_err(|e| e.to_string())?;
            let Some(tls) = &self.tls else {
                return Connection::open(socket, "; for a server with a certificate use https://")
                    .await;
            };
            let name = ServerName::try_from(host.clone()).map_err(|error| error.to_string())?;
            let stream = tls.connect(name, socket).await.map_err(|error| {
                format!(
                    "{error}. --url has to name the server as its certificate does, and --ca the root \
                     that vouches for it; for a server without a certificate use http://"
                )
            })?;
            Connection::open(stream, "").await
        })
        .await
    }
}

/// An open connection, for one request after another.
pub(super) struct Connection {
    requests: http1::SendRequest<Full<Bytes>>,
    /// The end of the error for a server that does not speak HTTP.
    advice: &'static str,
    /// The longest wait for the head of a response.
    patience: Duration,
}

impl Connection {
    async fn open(
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        advice: &'static str,
    ) -> Result<Self, String> {
        let opened = http1::handshake(TokioIo::new(stream)).await;
        let (requests, connection) = opened.map_err(|error| error.to_string())?;
        // The task ends when `requests` is dropped. Its own error reaches the request too.
        tokio::spawn(connection);
        Ok(Self { requests, advice, patience: SILENCE })
    }

    /// Waits up to `patience` for the head of each response.
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Returns whether the server has not closed it, as far as is known.
    pub(super) fn is_open(&self) -> bool {
        !self.requests.is_closed()
    }

    /// Sends a request, and returns the response once all of it has arrived.
    ///
    /// # Errors
    /// Returns what happened if no whole response arrives, or if its body is larger than the limit. The
    /// connection can't be used after that.
    pub(super) async fn send(
        &mut self,
        request: Request<Full<Bytes>>,
        limit_bytes: usize,
    ) -> Result<HttpResponse, String> {
        let advice = self.advice;
        let problem = |error: hyper::Error| match error.is_parse() {
            true => format!("the response is not HTTP ({error}){advice}"),
            false => error.to_string(),
        };
        in_time(async { self.requests.ready().await.map_err(problem) }).await?;
        let response = self.requests.send_request(request);
        let response = tokio::time::timeout(self.patience, response).await;
        let response = response.map_err(|_| silent(self.patience))?.map_err(problem)?;
        let (head, body) = response.into_parts();
        let mut rest = Limited::new(body, limit_bytes);
        let mut body = Vec::new();
        while let Some(frame) = in_time(async { Ok(rest.frame().await) }).await? {
            let frame = frame.map_err(|error| error.to_string())?;
            body.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        }
        Ok(HttpResponse { status: head.status.as_u16(), headers: head.headers, body })
    }
}

/// Waits for a step of an exchange, but no longer than [`SILENCE`].
async fn in_time<T>(step: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match tokio::time::timeout(SILENCE, step).await {
        Ok(done) => done,
        Err(_) => Err(silent(SILENCE)),
    }
}

fn silent(patience: Duration) -> String {
    format!("nothing arrived within {} s", patience.as_secs())
}

fn connector(ca: &Path) -> anyhow::Result<TlsConnector> {
    let unfit = |problem: &dyn fmt::Display| {
        let problem = format!("{problem}; --ca takes a PEM file of certificates");
        Ended::error(Exit::Settings, problem)
    };
    let unusable = |error: rustls::Error| unfit(&format!("{}: {error}", ca.display()));
    let mut roots = RootCertStore::empty();
    for certificate in pem::certificates(ca).map_err(|error| unfit(&error))? {
        roots.add(certificate).map_err(unusable)?;
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}
