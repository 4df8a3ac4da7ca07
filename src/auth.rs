//! Creates tokens, hashes them with SHA-256, and recognises them by their hash. Stores no token, and knows
//! nothing of HTTP.
//!
//! A token has 256 random bits, too many to guess, so a plain SHA-256 protects it as well as a slow hash.

use rand::TryRng;
use rand::rngs::SysRng;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config::{Scope, TokenConfig};

/// The prefix of every token, by which people and secret scanners recognise one.
const PREFIX: &str = "tombola_";

/// A token's position in the settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TokenIndex(pub u16);

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// The settings don't have it.
    Unknown,
    /// It lacks the scope.
    OtherScope,
}

/// Returns a new random token.
pub(crate) fn new_token() -> String {
    let mut secret = [0; 32];
    SysRng.try_fill_bytes(&mut secret).expect("the operating system has randomness");
    format!("{PREFIX}{}", hex::encode(secret))
}

/// Returns the value of `Authorization` for the token in `text`, which contains nothing else. If `text` can't
/// be a token, the error is the problem in words.
pub fn credentials(text: &str) -> Result<String, &'static str> {
    let token = text.trim();
    match !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()) {
        true => Ok(format!("Bearer {token}")),
        false => Err("holds no token: one word, as `tombola token new` printed it"),
    }
}

/// Returns the hash by which a token is recognised.
pub(crate) fn digest(token: &[u8]) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// Finds the entry of this token for this scope.
pub(crate) fn recognise(
    tokens: &[TokenConfig],
    token: &[u8],
    scope: Scope,
) -> Result<TokenIndex, Denied> {
    let digest = digest(token);
    let (mut known, mut found, mut place) = (Choice::from(0), Choice::from(0), 0);
    // Compares all entries without a branch, so that the time reveals nothing.
    for (entry, index) in tokens.iter().zip(0_u16..) {
        let same = entry.sha256.ct_eq(&digest);
        let opens = same & Choice::from(u8::from(entry.scope == scope));
        known |= same;
        found |= opens;
        place.conditional_assign(&index, opens);
    }
    match (bool::from(found), bool::from(known)) {
        (true, _) => Ok(TokenIndex(place)),
        (false, true) => Err(Denied::OtherScope),
        (false, false) => Err(Denied::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TokenName;

    fn entry(name: &str, scope: Scope, token: &str) -> TokenConfig {
        {
            let name: TokenName = name.parse().unwrap();
            let sha256 = digest(token.as_bytes());
            TokenConfig { owner: name.clone(), name, scope, sha256 }
        }
    }

    #[test]
    fn a_token_has_256_random_bits() {
        let tokens = [new_token(), new_token()];
        for token in &tokens {
            let secret = hex::decode(token.strip_prefix(PREFIX).unwrap()).unwrap();
            assert_eq!(secret.len(), 32);
            assert_ne!(secret, [0; 32]);
        }
        assert_ne!(tokens[0], tokens[1]);
    }

    /// The expected hash is the output of `printf %s abc | sha256sum`: a token hashed by hand must work.
    #[test]
    fn what_is_kept_is_the_plain_sha_256_of_the_text() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hex::encode(digest(b"abc")), expected);
    }

    #[test]
    fn each_entry_opens_its_own_door_wherever_it_stands() {
        let tokens = [
            entry("old", Scope::Draw, "a"),
            entry("new", Scope::Draw, "b"),
            entry("watch", Scope::Observe, "c"),
            entry("both", Scope::Draw, "d"),
            entry("both.observe", Scope::Observe, "d"),
        ];
        let check = |token: &str, scope, expected: Result<u16, Denied>| {
            let found = recognise(&tokens, token.as_bytes(), scope);
            assert_eq!(found, expected.map(TokenIndex), "{token} {scope:?}");
        };
        check("a", Scope::Draw, Ok(0));
        check("b", Scope::Draw, Ok(1));
        check("c", Scope::Observe, Ok(2));
        check("d", Scope::Draw, Ok(3));
        check("d", Scope::Observe, Ok(4));
        check("a", Scope::Observe, Err(Denied::OtherScope));
        check("c", Scope::Draw, Err(Denied::OtherScope));
        check("e", Scope::Draw, Err(Denied::Unknown));
        check("", Scope::Observe, Err(Denied::Unknown));
        check("A", Scope::Draw, Err(Denied::Unknown));
    }
}
