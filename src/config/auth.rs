//! Authentication: the keys under `auth`.

use clap::ValueEnum;
use serde::Deserialize;

use super::ConfigError;

/// The most tokens. Each request is compared with all of them, about 20 ns each.
pub(super) const TOKENS_MAX: usize = 256;

/// The error for a wrong key under `auth`. It omits the value, which may be a token in place of its SHA-256.
pub(super) const AUTH_ALLOWED: &str = "allowed: auth.mode = \"none\", or [[auth.tokens]] with name, scope \
     and sha256, as `tombola token new --name NAME --scope draw` prints them";

/// The authentication of requests.
#[derive(Clone, Debug)]
pub enum AuthConfig {
    /// No authentication is configured: requests need no token, which is allowed on loopback only.
    Unsaid,
    /// Requests explicitly need no token.
    Anyone,
    /// Requests need one of these tokens, of which there is at least one.
    Tokens(Vec<TokenConfig>),
}

/// An entry that is enough to recognise a token, but not to use it.
#[derive(Clone, Debug)]
pub struct TokenConfig {
    /// Its name, for people.
    pub name: TokenName,
    /// Its scope.
    pub scope: Scope,
    /// The SHA-256 of its text.
    pub sha256: [u8; 32],
}

/// A token's name, fit for a config file and for a log: 1 to 64 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenName(String);

impl std::str::FromStr for TokenName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let fit = (1..=64).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        let problem = "allowed: 1 to 64 characters of a-z, A-Z, 0-9, '.', '_' and '-'";
        if fit { Ok(Self(name.to_owned())) } else { Err(problem) }
    }
}

impl std::fmt::Display for TokenName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// The requests that a token allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scope {
    /// Taking numbers
    Draw,
    /// Everything else
    Observe,
}

impl Scope {
    /// Returns the scope's name in the settings.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draw => "draw",
            Self::Observe => "observe",
        }
    }
}

/// Returns whether the value of a key may be a secret, and must not be printed.
pub(super) fn may_be_secret(key: &str) -> bool {
    key.starts_with("auth") && key != "auth.mode"
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthKeys {
    mode: Option<String>,
    #[serde(default)]
    tokens: Vec<TokenKeys>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TokenKeys {
    name: String,
    scope: String,
    sha256: String,
}

impl AuthKeys {
    pub(super) fn validate(
        self,
        refused: impl Fn(&str, String) -> ConfigError,
    ) -> Result<AuthConfig, ConfigError> {
        let refused = |key: &str, problem: &str| Err(refused(key, problem.to_owned()));
        match self.mode.as_deref() {
            Some("none") if self.tokens.is_empty() => return Ok(AuthConfig::Anyone),
            Some("none") => {
                return refused(
                    "auth.mode",
                    "there are tokens too; remove either the mode or the tokens",
                );
            }
            Some(_) => {
                return refused("auth.mode", "allowed: \"none\"; remove it to use tokens");
            }
            None if self.tokens.is_empty() => return Ok(AuthConfig::Unsaid),
            None if self.tokens.len() > TOKENS_MAX => {
                return refused("auth.tokens", &format!("allowed: up to {TOKENS_MAX}"));
            }
            None => {}
        }
        let mut tokens: Vec<TokenConfig> = Vec::with_capacity(self.tokens.len());
        for (index, TokenKeys { name, scope, sha256 }) in self.tokens.into_iter().enumerate() {
            let key = |field: &str| format!("auth.tokens[{index}].{field}");
            let name: TokenName = match name.parse() {
                Ok(name) => name,
                Err(problem) => return refused(&key("name"), problem),
            };
            if tokens.iter().any(|other| other.name == name) {
                let problem = format!("another token is called {name}; each needs its own name");
                return refused(&key("name"), &problem);
            }
            let scopes = Scope::value_variants();
            let Some(&scope) = scopes.iter().find(|known| known.as_str() == scope) else {
                return refused(&key("scope"), "allowed: \"draw\" and \"observe\"");
            };
            let mut digest = [0; 32];
            if hex::decode_to_slice(&sha256, &mut digest).is_err() {
                let problem = "allowed: 64 hexadecimal digits, the SHA-256 of the token and not \
                               the token itself, as `tombola token new` prints it";
                return refused(&key("sha256"), problem);
            }
            let same = |other: &&TokenConfig| other.sha256 == digest && other.scope == scope;
            if let Some(other) = tokens.iter().find(same) {
                let problem = format!(
                    "this is the token {} again; a second entry of the same token must have the \
                     other scope",
                    other.name
                );
                return refused(&key("sha256"), &problem);
            }
            tokens.push(TokenConfig { name, scope, sha256: digest });
        }
        Ok(AuthConfig::Tokens(tokens))
    }
}
