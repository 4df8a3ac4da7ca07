//! The digest that links each receipt to the one before it. Pure.
//!
//! A receipt that is changed, removed or inserted later changes the digests of all receipts after it. So
//! anyone who holds an older [`Head`] can tell whether the receipts up to it are still the same. To anyone
//! else the chain proves nothing, because whoever can change the file can compute it again.

use sha2::{Digest as _, Sha256};

use super::record::{Caller, Draft, KeyDigest, Labelled, Origin, Receipt, to_millis};

/// The last receipt of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// Its sequence number, or 0 if there is none.
    pub(crate) seq: u64,
    /// Its digest, or 0 if there is none.
    pub(crate) digest: [u8; 32],
}

impl Head {
    /// The head of an empty chain.
    pub(crate) const START: Self = Self { seq: 0, digest: [0; 32] };
}

impl std::fmt::Display for Head {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {}", self.seq, hex::encode(self.digest))
    }
}

/// The fields of a receipt that its digest covers.
pub(super) struct Link<'r> {
    pub(super) at_ms: i64,
    pub(super) origin: &'r Origin,
    pub(super) caller: &'r Caller,
    pub(super) label: Option<&'r Labelled>,
    pub(super) key: Option<KeyDigest>,
    pub(super) numbers: &'r [u8],
}

impl<'r> Link<'r> {
    pub(super) fn of(draft: &'r Draft) -> Self {
        Self {
            at_ms: to_millis(draft.at),
            origin: &draft.origin,
            caller: &draft.caller,
            label: draft.label.as_ref(),
            key: draft.key,
            numbers: &draft.numbers,
        }
    }

    /// Returns the head of the chain after this receipt is appended to it.
    pub(super) fn append(&self, head: Head) -> Head {
        let seq = head.seq + 1;
        let mut digest = Sha256::new();
        digest.update(head.digest);
        digest.update(seq.to_be_bytes());
        digest.update(self.at_ms.to_be_bytes());
        // The length before each text makes the beginning of the next one unambiguous.
        let mut text = |bytes: &[u8]| {
            digest.update((bytes.len() as u64).to_be_bytes());
            digest.update(bytes);
        };
        let space = &self.origin.space;
        text(self.origin.pool.as_str().as_bytes());
        match space.codes() {
            None => text(&[space.decimals()]),
            Some(codes) => {
                for part in [codes.pattern(), codes.alphabet(), codes.check()] {
                    text(part.as_bytes());
                }
            }
        }
        text(self.caller.owner.as_bytes());
        text(self.caller.token.as_bytes());
        text(self.label.map_or(&[], |label| &label.digest));
        text(self.key.as_ref().map_or(&[], |key| &key.0));
        text(self.numbers);
        Head { seq, digest: digest.finalize().into() }
    }
}

/// Returns whether a receipt, with its stored numbers, is the next one of the chain after `head`.
pub(super) fn continues(head: Head, receipt: &Receipt, numbers: &[u8]) -> bool {
    let label = receipt.label.as_ref();
    let is_of_label = label.is_none_or(|labelled| match &labelled.label {
        Some((label, salt)) => Labelled::digest(label, *salt) == labelled.digest,
        None => true,
    });
    let link = Link {
        at_ms: to_millis(receipt.at),
        origin: &receipt.origin,
        caller: &receipt.caller,
        label,
        key: receipt.key,
        numbers,
    };
    let next = Head { seq: receipt.seq, digest: receipt.digest };
    is_of_label && link.append(head) == next
}

/// Returns why a receipt does not continue the chain after another one.
pub(super) fn broken(head: Head, next: Head) -> String {
    match next.seq - head.seq {
        1 => format!(
            "receipt {} does not continue the chain after receipt {}: one of them was changed",
            next.seq, head.seq
        ),
        2 => format!("receipt {} is missing", head.seq + 1),
        _ => format!("the receipts {} to {} are missing", head.seq + 1, next.seq - 1),
    }
}
