//! Creates tokens, hashes them with SHA-256, and recognises them by their hash. Stores no token, and knows
//! nothing of HTTP.
//!
//! A token has 256 random bits, too many to guess, so a plain SHA-256 protects it as well as a slow hash.

use std::time::{Duration, SystemTime};

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
    /// It has expired.
    Expired,
}

/// How long before its end an expiring token is reported.
const NOTICE: Duration = Duration::from_secs(7 * 86_400);

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
    // Compares all entries without a branch on secrets, so that the time reveals nothing.
    for (entry, index) in tokens.iter().zip(0_u16..) {
        let mut same = entry.sha256.ct_eq(&digest);
        if let Some(next) = &entry.next_sha256 {
            same |= next.ct_eq(&digest);
        }
        let opens = same & Choice::from(u8::from(entry.scope == scope));
        known |= same;
        found |= opens;
        place.conditional_assign(&index, opens);
    }
    match (bool::from(found), bool::from(known)) {
        (true, _) if has_expired(&tokens[usize::from(place)]) => Err(Denied::Expired),
        (true, _) => Ok(TokenIndex(place)),
        (false, true) => Err(Denied::OtherScope),
        (false, false) => Err(Denied::Unknown),
    }
}

fn has_expired(token: &TokenConfig) -> bool {
    token.expires.is_some_and(|expires| expires <= SystemTime::now())
}

/// Returns a sentence about each token that has expired, or will within a week.
pub(crate) fn notices(tokens: &[TokenConfig], now: SystemTime) -> Vec<String> {
    let notice = |token: &TokenConfig| {
        let expires = token.expires.filter(|&expires| expires <= now + NOTICE)?;
        let at = humantime::format_rfc3339_seconds(expires);
        let name = &token.name;
        Some(match expires <= now {
            true => format!("The token {name} expired at {at} and is refused"),
            false => format!("The token {name} expires at {at}"),
        })
    };
    tokens.iter().filter_map(notice).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TokenName;

    fn entry(name: &str, scope: Scope, token: &str) -> TokenConfig {
        let name: TokenName = name.parse().unwrap();
        TokenConfig {
            owner: name.clone(),
            name,
            scope,
            sha256: digest(token.as_bytes()),
            next_sha256: None,
            pools: None,
            expires: None,
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

    #[test]
    fn both_tokens_of_an_entry_are_accepted_until_it_expires() {
        let second = Duration::from_secs(1);
        let mut tokens = [entry("other", Scope::Draw, "c"), entry("shop", Scope::Draw, "a")];
        tokens[1].next_sha256 = Some(digest(b"b"));
        let check = |tokens: &[TokenConfig], expected| {
            for token in [b"a", b"b"] {
                assert_eq!(recognise(tokens, token, Scope::Draw), expected);
                assert_eq!(recognise(tokens, token, Scope::Observe), Err(Denied::OtherScope));
            }
            assert_eq!(recognise(tokens, b"c", Scope::Draw), Ok(TokenIndex(0)));
        };
        check(&tokens, Ok(TokenIndex(1)));
        tokens[1].expires = Some(SystemTime::now() + 3600 * second);
        check(&tokens, Ok(TokenIndex(1)));
        tokens[1].expires = Some(SystemTime::now() - second);
        check(&tokens, Err(Denied::Expired));
    }

    #[test]
    fn a_token_is_reported_in_its_last_week() {
        let end = humantime::parse_rfc3339("2027-01-31T00:00:00Z").unwrap();
        let second = Duration::from_secs(1);
        let mut token = entry("shop", Scope::Draw, "a");
        let tokens = |token: &TokenConfig| [entry("other", Scope::Draw, "c"), token.clone()];
        assert!(notices(&tokens(&token), end).is_empty());
        token.expires = Some(end);
        assert!(notices(&tokens(&token), end - NOTICE - second).is_empty());
        let expected = "The token shop expires at 2027-01-31T00:00:00Z";
        assert_eq!(notices(&tokens(&token), end - NOTICE), [expected]);
        let expected = "The token shop expired at 2027-01-31T00:00:00Z and is refused";
        assert_eq!(notices(&tokens(&token), end), [expected]);
    }
}
