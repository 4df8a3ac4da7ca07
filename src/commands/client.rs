//! Sends a request to a running server, for the commands that inspect one.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, HOST};
use axum::http::uri::{Scheme, Uri};
use axum::http::{HeaderValue, Request};
use http_body_util::{BodyExt as _, Empty, Limited};
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
use crate::config::{Config, Location, Overrides};
use crate::pem;

/// The longest wait for a whole response, including the connection. A healthy server takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

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

/// The address of a server.
#[derive(Clone, Debug)]
struct Address {
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
        let problem = match tokio::time::timeout(PATIENCE, self.exchange(path, credentials)).await {
            Ok(Ok(response)) => return Ok(response),
            Ok(Err(problem)) => problem,
            Err(_) => format!("no response within {} s", PATIENCE.as_secs()),
        };
        let message = format!(
            "{self} does not respond: {problem}. Check that tombola is running there, or name another \
             server with --url"
        );
        Err(Ended::error(Exit::Unreachable, message))
    }

    async fn exchange(
        &self,
        path: &'static str,
        credentials: Option<&HeaderValue>,
    ) -> Result<HttpResponse, String> {
        let Address { host, port, .. } = &self.address;
        let mut request = Request::get(path).header(HOST, self.address.authority());
        if let Some(credentials) = credentials {
            request = request.header(AUTHORIZATION, credentials);
        }
        let request = request.body(Empty::new()).map_err(|error| error.to_string())?;
        let socket = TcpStream::connect((&**host, *port)).await.map_err(|e| e.to_string())?;
        let Some(tls) = &self.tls else {
            return ask(socket, request).await.map_err(|error| match error {
                Failure::NotHttp(problem) => {
                    format!("{problem}; for a server with a certificate use https://")
                }
                Failure::Broken(problem) => problem,
            });
        };
        let name = ServerName::try_from(host.clone()).map_err(|error| error.to_string())?;
        let stream = tls.connect(name, socket).await.map_err(|error| {
            format!(
                "{error}. --url has to name the server as its certificate does, and --ca the root \
                 that vouches for it; for a server without a certificate use http://"
            )
        })?;
        ask(stream, request).await.map_err(|error| match error {
            Failure::NotHttp(problem) | Failure::Broken(problem) => problem,
        })
    }
}

/// Why there was no response on an open connection.
enum Failure {
    NotHttp(String),
    Broken(String),
}

impl From<hyper::Error> for Failure {
    fn from(error: hyper::Error) -> Self {
        match error.is_parse() {
            true => Self::NotHttp(format!("the response is not HTTP ({error})")),
            false => Self::Broken(error.to_string()),
        }
    }
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<Empty<Bytes>>,
) -> Result<HttpResponse, Failure> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let exchange = async move {
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), BODY_LIMIT_BYTES).collect().await;
        let body = body.map_err(|error| Failure::Broken(error.to_string()))?;
        Ok(HttpResponse { status, body: body.to_bytes().to_vec() })
    };
    // The connection ends once the exchange drops its sender. Its own error reaches the exchange too.
    let (response, _) = tokio::join!(exchange, connection);
    response
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
