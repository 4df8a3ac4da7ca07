//! Stores on other machines: the password, the host, and the remedies for errors of the network. Knows nothing of
//! what they store.

#[cfg(feature = "postgres")]
pub(crate) mod postgres;

use std::error::Error;

use crate::config::StoreConfig;

/// Splits `HOST:PORT` into the host, as certificates name it, and the port.
pub(crate) fn host_and_port(endpoint: &str) -> (&str, &str) {
    let (host, port) = endpoint.rsplit_once(':').expect("the settings add the port");
    (host.trim_start_matches('[').trim_end_matches(']'), port)
}

/// Reads the user's password, if one is set.
pub(crate) fn password(config: &StoreConfig) -> Result<Option<String>, String> {
    let Some(path) = &config.password_file else { return Ok(None) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("{}: the password can't be read: {error}", path.display()))?;
    match text.lines().next() {
        Some(password) if !password.is_empty() => Ok(Some(password.to_owned())),
        _ => Err(format!("{}: there is no password in its first line", path.display())),
    }
}

/// Describes an error with all its causes, and the remedy if it is known. `section` is the part of the settings
/// that tells how to reach the store.
pub(crate) fn describe(section: &str, error: &(dyn Error + 'static)) -> String {
    let mut texts = Vec::<String>::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if texts.last().is_none_or(|last| !last.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    let mut text = texts.join(": ");
    const UNTRUSTED: &str = "SECTION.tls.ca does not lead to its certificate";
    const UNENCRYPTED: &str =
        "it does not speak TLS there: enable TLS in the store, or remove [SECTION.tls]";
    let advice = [
        ("invalid peer certificate: UnknownIssuer", UNTRUSTED),
        // Another root with the same name.
        ("invalid peer certificate: BadSignature", UNTRUSTED),
        (
            "invalid peer certificate",
            "its certificate is not for this host, or is not valid at this time",
        ),
        (
            "received fatal alert",
            "it requires a certificate that it trusts: set SECTION.tls.cert and .key",
        ),
        // The alert is lost if the request is written before it arrives.
        (
            "stream closed because of a broken pipe",
            "it closed the connection: if it requires a certificate, set SECTION.tls.cert and .key",
        ),
        ("InvalidContentType", UNENCRYPTED),
        ("does not support TLS", UNENCRYPTED),
    ];
    if let Some((_, advice)) = advice.iter().find(|(sign, _)| text.contains(sign)) {
        text = format!("{text}: {}", advice.replace("SECTION", section));
    }
    text
}
