//! Reads certificates and keys from PEM files, for the code that speaks TLS. Knows nothing of connections.

use std::path::{Path, PathBuf};

use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Why a file can't be used: it can't be read, is not PEM, or lacks the certificate or key.
#[derive(Debug, thiserror::Error)]
#[error("{}: {problem}", path.display())]
pub(crate) struct PemError {
    pub path: PathBuf,
    /// The problem, and what to do about it.
    pub problem: String,
}

/// Reads all certificates of a file, which has at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match found {
        Ok(found) if found.is_empty() => {
            Err(unfit(path, "there is no certificate in it (-----BEGIN CERTIFICATE-----)"))
        }
        Ok(found) => Ok(found),
        Err(error) => Err(unfit(path, format!("this is not a PEM file: {error}"))),
    }
}

/// Reads the first key of a file.
pub(crate) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, PemError> {
    const ENCRYPTED: [&str; 2] = ["BEGIN ENCRYPTED PRIVATE KEY", "Proc-Type: 4,ENCRYPTED"];
    let text = read(path)?;
    let is_in = |words: &&str| text.windows(words.len()).any(|part| part == words.as_bytes());
    if ENCRYPTED.iter().any(is_in) {
        let problem = "the key is encrypted, and the server has no password for it; decrypt it \
                       (openssl pkey -in FILE -out FILE2) and protect the file (chmod 600)";
        return Err(unfit(path, problem));
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        pem::Error::NoItemsFound => {
            unfit(path, "there is no private key in it (-----BEGIN PRIVATE KEY-----)")
        }
        error => unfit(path, format!("this is not a PEM file: {error}")),
    })
}

/// Reads a file, whose content is not checked.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, PemError> {
    std::fs::read(path).map_err(|error| unfit(path, format!("can't be read: {error}")))
}

fn unfit(path: &Path, problem: impl Into<String>) -> PemError {
    PemError { path: path.to_owned(), problem: problem.into() }
}
