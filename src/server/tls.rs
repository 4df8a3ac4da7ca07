//! Reads the certificate and its key from their files, and reads them again on request. Knows nothing of
//! connections.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{self, InconsistentKeys, ServerConfig};

use crate::config::TlsConfig;
use crate::pem::{self, PemError};

/// Why a certificate and its key can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    /// A file can't be read, or is not PEM.
    #[error(transparent)]
    File(#[from] PemError),
    /// Each file is valid, but they don't belong together.
    #[error(
        "{}: this is not the key of the first certificate in {}; give both files of the same pair",
        files.key.display(),
        files.cert.display()
    )]
    Mismatch { files: TlsConfig },
    /// The TLS library rejects them.
    #[error("{} and {}: {source}", files.cert.display(), files.key.display())]
    Unusable { files: TlsConfig, source: rustls::Error },
}

/// The certificate that new connections get.
#[derive(Debug)]
pub(super) struct Tls(ArcSwap<ServerConfig>);

/// A certificate and its key that were read and belong together.
#[derive(Debug)]
pub(super) struct Certificate(Arc<ServerConfig>);

impl Tls {
    /// Reads the files.
    pub(super) fn open(files: &TlsConfig) -> Result<Self, TlsError> {
        Self::read(files).map(|Certificate(config)| Self(ArcSwap::new(config)))
    }

    /// Reads the files.
    pub(super) fn read(files: &TlsConfig) -> Result<Certificate, TlsError> {
        read(files).map(Certificate)
    }

    /// Uses the certificate for new connections.
    pub(super) fn install(&self, Certificate(config): Certificate) {
        self.0.store(config);
    }

    /// Returns the acceptor for a new connection. Open connections keep the certificate that they began with.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.load_full())
    }
}

fn read(files: &TlsConfig) -> Result<Arc<ServerConfig>, TlsError> {
    let certificates = pem::certificates(&files.cert)?;
    let key = pem::key(&files.key)?;
    let unusable = |source| match source {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => {
            TlsError::Mismatch { files: files.clone() }
        }
        source => TlsError::Unusable { files: files.clone(), source },
    };
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(unusable)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
