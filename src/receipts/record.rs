//! A receipt, and the form in which it is stored. Pure: knows nothing of the store.
//!
//! # The numbers of a response as bytes
//! ```text
//! short form  parts  (shard  count)*  width  value*
//! ```
//! The first five are variable-length integers (LEB128). A value has `width` bytes, as many as the largest
//! one needs: big endian, two's complement. So a number of the default pools takes 7 bytes (`int`) or 5
//! (`float`), and a response with one number takes 5 bytes more.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngExt;
use serde::ser::{SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::batch::ShardIndex;
use crate::config::PoolName;
use crate::folder;
use crate::space::{Space, Value};

/// The longest label in bytes.
pub(crate) const LABEL_BYTES_MAX: usize = 128;

/// The longest idempotency key in bytes.
pub(crate) const KEY_BYTES_MAX: usize = 255;

/// A pool, as far as its receipts need it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) pool: PoolName,
    /// Writes the values as texts.
    pub(crate) space: Space,
}

impl Origin {
    /// Returns whether this is the pool of this name, and its values are written in the same way.
    pub(crate) fn is(&self, pool: &PoolName, space: &Space) -> bool {
        self.pool == *pool
            && self.space.decimals() == space.decimals()
            && self.space.codes() == space.codes()
    }
}

/// The caller that numbers are given to. Both texts are empty if the server asks for no tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Caller {
    pub(crate) owner: Arc<str>,
    /// The name of the token.
    pub(crate) token: Arc<str>,
}

/// The first half of the SHA-256 of an owner and its idempotency key. The key itself is not stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct KeyDigest(pub(crate) [u8; 16]);

impl KeyDigest {
    pub(crate) fn new(owner: &str, key: &str) -> Self {
        // An owner's name contains no 0.
        let digest = Sha256::new().chain_update(owner).chain_update([0]).chain_update(key);
        Self(first_half(digest))
    }
}

impl std::fmt::Debug for KeyDigest {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&hex::encode(self.0))
    }
}

fn first_half(digest: Sha256) -> [u8; 16] {
    let whole: [u8; 32] = digest.finalize().into();
    *whole.first_chunk().expect("32 bytes")
}

/// A caller's text for a response, such as an order number: 1 to 128 bytes without control characters. It is
/// never interpreted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Label(String);

impl Label {
    /// Returns the label, if it is valid.
    pub(crate) fn new(text: String) -> Option<Self> {
        let fits = (1..=LABEL_BYTES_MAX).contains(&text.len());
        (fits && !text.contains(char::is_control)).then_some(Self(text))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// A label and the digest by which the chain covers it. The random salt is removed with the label, so that the
/// digest then tells nothing about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Labelled {
    /// `None` once it was erased.
    pub(crate) label: Option<(Label, [u8; 16])>,
    pub(crate) digest: [u8; 16],
}

impl Labelled {
    pub(crate) fn new(label: Label) -> Self {
        let salt: [u8; 16] = rand::rng().random();
        let digest = Self::digest(&label, salt);
        Self { label: Some((label, salt)), digest }
    }

    pub(crate) fn digest(label: &Label, salt: [u8; 16]) -> [u8; 16] {
        first_half(Sha256::new().chain_update(salt).chain_update(label.as_str()))
    }
}

/// The numbers of a response, grouped by the shards that they came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Given {
    /// Whether the response has the form of a request without `count`.
    pub(crate) is_short: bool,
    pub(crate) parts: Vec<(Arc<str>, Vec<Value>)>,
}

impl Given {
    pub(crate) fn values(&self) -> impl Iterator<Item = Value> {
        self.parts.iter().flat_map(|(_, values)| values).copied()
    }

    /// Returns the `count` of the request, or `None` for the short form.
    pub(crate) fn count(&self) -> Option<usize> {
        (!self.is_short).then(|| self.values().count())
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let width = self.values().map(width).max().unwrap_or(1);
        let mut bytes =
            Vec::with_capacity(8 + 5 * self.parts.len() + width * self.values().count());
        push(&mut bytes, self.is_short.into());
        push(&mut bytes, self.parts.len() as u64);
        for (shard, values) in &self.parts {
            let (_, index) = folder::parse_shard_file(shard).expect("the name of a shard's file");
            push(&mut bytes, index.0.into());
            push(&mut bytes, values.len() as u64);
        }
        push(&mut bytes, width as u64);
        for value in self.values() {
            bytes.extend_from_slice(&value.0.to_be_bytes()[8 - width..]);
        }
        bytes
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote, or returns `None` if the bytes can't be that.
    pub(crate) fn from_bytes(pool: &PoolName, bytes: &[u8]) -> Option<Self> {
        let Header { is_short, counts, width, values } = Header::read(bytes)?;
        let mut values = values_of(values, width);
        let parts = counts.into_iter().map(|(shard, count)| {
            let part: Vec<_> = values.by_ref().take(usize::try_from(count).ok()?).collect();
            let shard = folder::shard_name(pool, shard).into();
            (part.len() as u64 == count).then_some((shard, part))
        });
        let parts = parts.collect::<Option<_>>()?;
        values.next().is_none().then_some(Self { is_short, parts })
    }

    /// Reads only the values, or returns `None` if these bytes are not numbers of a response.
    pub(crate) fn values_in(bytes: &[u8]) -> Option<impl Iterator<Item = Value>> {
        Header::read(bytes).map(|header| values_of(header.values, header.width))
    }
}

/// The parts of [`Given`] as bytes.
struct Header<'b> {
    is_short: bool,
    counts: Vec<(ShardIndex, u64)>,
    width: usize,
    values: &'b [u8],
}

impl<'b> Header<'b> {
    fn read(mut bytes: &'b [u8]) -> Option<Self> {
        let is_short = pull(&mut bytes)? != 0;
        let mut counts = Vec::new();
        for _ in 0..pull(&mut bytes)? {
            let shard = ShardIndex(pull(&mut bytes)?.try_into().ok()?);
            counts.push((shard, pull(&mut bytes)?));
        }
        let width =
            usize::try_from(pull(&mut bytes)?).ok().filter(|width| (1..=8).contains(width))?;
        Some(Self { is_short, counts, width, values: bytes })
    }
}

fn values_of(bytes: &[u8], width: usize) -> impl Iterator<Item = Value> {
    bytes.chunks(width).map(move |bytes| {
        let filler = if bytes[0] >= 0x80 { 0xff } else { 0 };
        let mut whole = [filler; 8];
        whole[8 - bytes.len()..].copy_from_slice(bytes);
        Value(i64::from_be_bytes(whole))
    })
}

/// Returns how many bytes a value needs.
fn width(value: Value) -> usize {
    let magnitude = if value.0 < 0 { !value.0 } else { value.0 };
    // One more bit for the sign.
    (65 - magnitude.leading_zeros() as usize).div_ceil(8)
}

fn push(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn pull(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// A receipt that is not saved yet.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) at: SystemTime,
    pub(crate) origin: Arc<Origin>,
    pub(crate) caller: Caller,
    pub(crate) label: Option<Labelled>,
    pub(crate) key: Option<KeyDigest>,
    /// See [`Given::is_short`].
    pub(crate) is_short: bool,
    /// [`Given`] as bytes.
    pub(crate) numbers: Vec<u8>,
    /// The number of numbers.
    pub(crate) count: usize,
}

/// A saved receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Receipt {
    /// Counts up from 1, in the order of the commits.
    pub(crate) seq: u64,
    pub(crate) at: SystemTime,
    pub(crate) origin: Arc<Origin>,
    pub(crate) caller: Caller,
    pub(crate) label: Option<Labelled>,
    pub(crate) key: Option<KeyDigest>,
    pub(crate) given: Given,
    /// The digest of this receipt and all before it.
    pub(crate) digest: [u8; 32],
}

impl Receipt {
    /// Returns whether the request of the receipt had this label. Any label is the same as one that was erased.
    pub(crate) fn has_label(&self, label: Option<&Label>) -> bool {
        match (&self.label, label) {
            (None, None) => true,
            (Some(Labelled { label: None, .. }), Some(_)) => true,
            (Some(Labelled { label: Some((label, _)), .. }), Some(other)) => label == other,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    /// Returns the label, unless there is none or it was erased.
    pub(crate) fn label(&self) -> Option<&str> {
        self.label.as_ref()?.label.as_ref().map(|(label, _)| label.as_str())
    }
}

/// The numbers of a receipt as a list of texts.
struct Numbers<'r>(&'r Receipt);

impl Serialize for Numbers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Receipt { origin, given, .. } = self.0;
        let mut list = serializer.serialize_seq(Some(given.values().count()))?;
        for value in given.values() {
            list.serialize_element(&origin.space.number(value))?;
        }
        list.end()
    }
}

impl Serialize for Receipt {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |text: &Arc<str>| (!text.is_empty()).then(|| text.to_string());
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("seq", &self.seq)?;
        map.serialize_entry("at", &humantime::format_rfc3339_millis(self.at).to_string())?;
        map.serialize_entry("pool", self.origin.pool.as_str())?;
        map.serialize_entry("owner", &text(&self.caller.owner))?;
        map.serialize_entry("token", &text(&self.caller.token))?;
        map.serialize_entry("label", &self.label())?;
        map.serialize_entry("key_digest", &self.key.map(|key| hex::encode(key.0)))?;
        map.serialize_entry("count", &self.given.values().count())?;
        let name = if self.origin.space.codes().is_some() { "codes" } else { "numbers" };
        map.serialize_entry(name, &Numbers(self))?;
        map.serialize_entry("digest", &hex::encode(self.digest))?;
        map.end()
    }
}

/// Returns a time in milliseconds since 1970.
pub(crate) fn to_millis(at: SystemTime) -> i64 {
    let millis = at.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
    i64::try_from(millis).unwrap_or(i64::MAX)
}

/// Returns the time that is this many milliseconds after 1970.
pub(crate) fn from_millis(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_are_read_as_they_were_given(
            is_short: bool,
            parts in prop::collection::vec(
                (0..1024_u16, prop::collection::vec(prop_oneof![any::<i64>(), -300..300_i64], 0..9)),
                0..4,
            ),
        ) {
            let pool = PoolName::new("int").unwrap();
            let part = |(shard, values): (u16, Vec<i64>)| {
                let shard = folder::shard_name(&pool, ShardIndex(shard)).into();
                (shard, values.into_iter().map(Value).collect())
            };
            let given = Given { is_short, parts: parts.into_iter().map(part).collect() };
            let bytes = given.to_bytes();
            prop_assert_eq!(Given::from_bytes(&pool, &bytes), Some(given));
        }

        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let _ = Given::from_bytes(&PoolName::new("int").unwrap(), &bytes);
        }
    }

    #[test]
    fn a_value_takes_as_many_bytes_as_it_needs() {
        let check = |value: i64, bytes: usize| assert_eq!(width(Value(value)), bytes, "{value}");
        check(0, 1);
        check(127, 1);
        check(128, 2);
        check(-128, 1);
        check(-129, 2);
        check((1 << 53) - 1, 7);
        check(10_i64.pow(10) - 1, 5);
        check(i64::MAX, 8);
        check(i64::MIN, 8);
    }

    #[test]
    fn a_label_has_no_control_characters_and_a_bound() {
        let valid = |text: &str| Label::new(text.to_owned()).is_some();
        assert!(valid("Bestellung 17 für Ö"));
        assert!(valid(&"x".repeat(128)));
        for text in ["", "a\nb", "\u{7f}", "\u{85}", &"x".repeat(129)] {
            assert!(!valid(text), "{text:?}");
        }
    }
}
