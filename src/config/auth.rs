//! Authentication: the keys under `auth`.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::RefusedKey;
use super::values::{NAME_ALLOWED, is_name};

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
    /// The owner of what it draws. A token that replaces another one has the same owner.
    pub owner: TokenName,
    pub scope: Scope,
    pub sha256: [u8; 32],
}

/// A token's name, fit for a config file and for a log: 1 to 64 of `a-z A-Z 0-9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenName(String);

impl std::str::FromStr for TokenName {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        if is_name(name) { Ok(Self(name.to_owned())) } else { Err(NAME_ALLOWED) }
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
    /// Looking up who got a number, among the receipts of the token's owner
    Lookup,
    /// Reading all receipts
    Audit,
    /// Importing numbers that were issued by other means
    Admin,
    /// Everything else
    Observe,
}

impl Scope {
    /// Returns the scope's name in the settings.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Draw => "draw",
            Self::Lookup => "lookup",
            Self::Audit => "audit",
            Self::Admin => "admin",
            Self::Observe => "observe",
        }
    }
}

/// Returns whether the value of a key may be a secret, and must not be printed.
pub(super) fn may_be_secret(key: &str) -> bool {
    key.starts_with("auth") && key != "auth.mode"
}

#[derive(Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuthKeys {
    mode: Option<String>,
    tokens: Option<Vec<TokenKeys>>,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct TokenKeys {
    name: String,
    owner: Option<String>,
    scope: String,
    sha256: String,
}

impl AuthKeys {
    pub(super) fn validate(&self) -> Result<AuthConfig, RefusedKey> {
        let refused = |key: &str, problem: &str| Err(RefusedKey::new(key, problem));
        let tokens = self.tokens.as_deref().unwrap_or_default();
        match self.mode.as_deref() {
            Some("none") if tokens.is_empty() => Ok(AuthConfig::Anyone),
            Some("none") => {
                refused("auth.mode", "there are tokens too; remove either the mode or the tokens")
            }
            Some(_) => refused("auth.mode", "allowed: \"none\"; remove it to use tokens"),
            None if tokens.is_empty() => Ok(AuthConfig::Unsaid),
            None if tokens.len() > TOKENS_MAX => {
                refused("auth.tokens", &format!("allowed: up to {TOKENS_MAX}"))
            }
            None => {
                let mut known = Vec::with_capacity(tokens.len());
                for (index, keys) in tokens.iter().enumerate() {
                    let token = keys.validate(&known).map_err(|(field, problem)| {
                        RefusedKey::new(format!("auth.tokens[{index}].{field}"), problem)
                    })?;
                    known.push(token);
                }
                Ok(AuthConfig::Tokens(known))
            }
        }
    }
}

impl TokenKeys {
    /// Validates an entry. An error is the field that is wrong, and the problem. `known` are the entries
    /// before this one.
    fn validate(&self, known: &[TokenConfig]) -> Result<TokenConfig, (&'static str, String)> {
        let name: TokenName =
            self.name.parse().map_err(|problem: &str| ("name", problem.to_owned()))?;
        if known.iter().any(|other| other.name == name) {
            let problem = format!("another token is called {name}; each needs its own name");
            return Err(("name", problem));
        }
        let owner = match &self.owner {
            Some(owner) => owner.parse().map_err(|problem: &str| ("owner", problem.to_owned()))?,
            None => name.clone(),
        };
        let scopes = Scope::value_variants();
        let scope = *scopes.iter().find(|known| known.as_str() == self.scope).ok_or_else(|| {
            (
                "scope",
                "allowed: \"draw\", \"lookup\", \"audit\", \"admin\" and \"observe\"".to_owned(),
            )
        })?;
        let mut sha256 = [0; 32];
        hex::decode_to_slice(&self.sha256, &mut sha256).map_err(|_| {
            let problem = "allowed: 64 hexadecimal digits, the SHA-256 of the token and not the \
                           token itself, as `tombola token new` prints it";
            ("sha256", problem.to_owned())
        })?;
        if let Some(other) = known.iter().find(|t| t.sha256 == sha256 && t.scope == scope) {
            let problem = format!(
                "this is the token {} again; a second entry of the same token must have another \
                 scope",
                other.name
            );
            return Err(("sha256", problem));
        }
        Ok(TokenConfig { name, owner, scope, sha256 })
    }
}
