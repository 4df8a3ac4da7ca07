//! The check characters of codes: five published systems. Knows nothing of texts: a code is a sequence of
//! digits, from 0 to one less than the size of its alphabet.
//!
//! Every system catches each single wrong symbol. The systems differ in which swaps of two neighbouring symbols
//! they catch, and in the alphabets that they are defined for. The check digit counts as the symbol after the
//! last one.
//!
//! | check | alphabet | swaps of neighbours that it misses |
//! | --- | --- | --- |
//! | `luhn` | even size | the first symbol of the alphabet with the last one (`09` and `90`) |
//! | `iso7064` | even size | after each beginning of a code one pair, of symbols that follow each other in the alphabet or are its ends |
//! | `damm`, `verhoeff` | digits | none |
//! | `noid` | prime size, larger than the number of symbols with the check character | none |

use super::{CodeError, DIGITS};

/// A system of check characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Luhn,
    Iso7064,
    Damm,
    Verhoeff,
    Noid,
}

/// The name that stands for no check.
pub(super) const NONE: &str = "none";

impl Check {
    const ALL: [Self; 5] = [Self::Luhn, Self::Iso7064, Self::Damm, Self::Verhoeff, Self::Noid];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Luhn => "luhn",
            Self::Iso7064 => "iso7064",
            Self::Damm => "damm",
            Self::Verhoeff => "verhoeff",
            Self::Noid => "noid",
        }
    }

    /// Returns the check of this name, or `None` for the name [`NONE`].
    pub(super) fn parse(name: &str) -> Result<Option<Self>, CodeError> {
        match Self::ALL.into_iter().find(|check| check.name() == name) {
            None if name != NONE => Err(CodeError::UnknownCheck(name.to_owned())),
            check => Ok(check),
        }
    }

    /// Returns an error if the check does not work for codes of `length` symbols of this alphabet.
    pub(super) fn validate(self, symbols: &[u8], length: usize) -> Result<(), CodeError> {
        let (check, size, places) = (self.name(), symbols.len(), length + 1);
        match self {
            // Doubling is a permutation of the digits only if their number is even.
            Self::Luhn | Self::Iso7064 if size % 2 == 1 => {
                Err(CodeError::OddAlphabet { check, size })
            }
            Self::Damm | Self::Verhoeff if symbols != DIGITS => Err(CodeError::NotDigits(check)),
            // The weight of each place must have an inverse, and so must the difference of two neighbouring ones.
            Self::Noid if (2..size).any(|factor| size % factor == 0) => {
                Err(CodeError::NotPrime(size))
            }
            Self::Noid if size <= places => Err(CodeError::SmallAlphabet { size, places }),
            _ => Ok(()),
        }
    }

    /// Returns the check digit of the digits of a code, in an alphabet of `size` symbols.
    pub(super) fn digit(self, digits: &[u8], size: usize) -> u8 {
        let digits = digits.iter().map(|&digit| usize::from(digit));
        let check = match self {
            Self::Luhn => luhn(digits, size),
            Self::Iso7064 => iso7064(digits, size),
            Self::Damm => damm(digits),
            Self::Verhoeff => verhoeff(digits),
            Self::Noid => noid(digits, size),
        };
        check as u8
    }
}

/// Returns the names of all checks, for error messages.
pub(super) fn names() -> String {
    Check::ALL.map(Check::name).join(", ")
}

/// Computes Luhn's check digit modulo `size`: ISO/IEC 7812-1, annex B, for 10 digits, and 3GPP2 X.S0048 (MEID)
/// for 16. From the right, every second digit is doubled, and the two digits of the result are added.
fn luhn(digits: impl DoubleEndedIterator<Item = usize>, size: usize) -> usize {
    let sum: usize = digits
        .rev()
        .enumerate()
        .map(|(place, digit)| match place % 2 {
            0 => 2 * digit - (size - 1) * usize::from(2 * digit >= size),
            _ => digit,
        })
        .sum();
    (size - sum % size) % size
}

/// Computes the check digit of ISO/IEC 7064, hybrid system MOD `size`+1,`size`. The standard defines the systems
/// for 10, 26 and 36 symbols. Other even sizes are an extension by the same construction.
fn iso7064(digits: impl Iterator<Item = usize>, size: usize) -> usize {
    let product = digits.fold(size, |product, digit| {
        // Both are 1 to `size`: the standard writes `size` instead of 0.
        let sum = reduce(product + digit - 1, size) + 1;
        reduce(2 * sum, size + 1)
    });
    (size + 1 - product) % size
}

/// Returns `sum` modulo `modulus`, for a sum of less than twice the modulus.
fn reduce(sum: usize, modulus: usize) -> usize {
    // Without a branch, which would depend on random digits: for 15 of them it cost 50 ns.
    sum.min(sum.wrapping_sub(modulus))
}

/// Computes Damm's check digit, with the quasigroup of order 10 in H. M. Damm, "Total anti-symmetrische
/// Quasigruppen" (Marburg, 2004), page 111, rearranged so that its diagonal is zero: with the check digit at the
/// end the result is 0.
fn damm(digits: impl Iterator<Item = usize>) -> usize {
    const TABLE: [[u8; 10]; 10] = [
        [0, 3, 1, 7, 5, 9, 8, 6, 4, 2],
        [7, 0, 9, 2, 1, 5, 4, 8, 6, 3],
        [4, 2, 0, 6, 8, 7, 1, 3, 5, 9],
        [1, 7, 5, 0, 9, 8, 3, 4, 2, 6],
        [6, 1, 2, 3, 0, 4, 5, 9, 7, 8],
        [3, 6, 7, 4, 2, 0, 9, 5, 8, 1],
        [5, 8, 6, 9, 7, 2, 0, 1, 3, 4],
        [8, 9, 4, 5, 3, 6, 2, 0, 1, 7],
        [9, 4, 3, 8, 6, 1, 7, 2, 0, 5],
        [2, 5, 8, 1, 4, 3, 6, 7, 9, 0],
    ];
    digits.fold(0, |interim, digit| usize::from(TABLE[interim][digit]))
}

/// Computes Verhoeff's check digit (J. Verhoeff, "Error Detecting Decimal Codes", Amsterdam, 1969): a product in
/// the dihedral group of order 10, in which the digits from the right are permuted once more at each place.
fn verhoeff(digits: impl DoubleEndedIterator<Item = usize>) -> usize {
    const PRODUCT: [[u8; 10]; 10] = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [1, 2, 3, 4, 0, 6, 7, 8, 9, 5],
        [2, 3, 4, 0, 1, 7, 8, 9, 5, 6],
        [3, 4, 0, 1, 2, 8, 9, 5, 6, 7],
        [4, 0, 1, 2, 3, 9, 5, 6, 7, 8],
        [5, 9, 8, 7, 6, 0, 4, 3, 2, 1],
        [6, 5, 9, 8, 7, 1, 0, 4, 3, 2],
        [7, 6, 5, 9, 8, 2, 1, 0, 4, 3],
        [8, 7, 6, 5, 9, 3, 2, 1, 0, 4],
        [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    ];
    const INVERSE: [u8; 10] = [0, 4, 3, 2, 1, 5, 6, 7, 8, 9];
    const PERMUTATION: [[u8; 10]; 8] = [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        [1, 5, 7, 6, 2, 8, 3, 0, 9, 4],
        [5, 8, 0, 3, 7, 9, 6, 1, 4, 2],
        [8, 9, 1, 6, 0, 4, 3, 5, 2, 7],
        [9, 4, 5, 3, 1, 2, 6, 8, 7, 0],
        [4, 2, 8, 6, 5, 7, 3, 9, 0, 1],
        [2, 7, 9, 3, 8, 0, 6, 4, 1, 5],
        [7, 0, 4, 6, 9, 1, 3, 2, 5, 8],
    ];
    // The check digit has place 0.
    let product = digits.rev().zip(1..).fold(0, |product, (digit, place)| {
        usize::from(PRODUCT[product][usize::from(PERMUTATION[place % 8][digit])])
    });
    usize::from(INVERSE[product])
}

/// Computes the check digit of NOID (J. Kunze, <https://metacpan.org/dist/Noid/view/noid>, "NOID CHECK DIGIT
/// ALGORITHM"): the sum of the digits, each times its place from the left. NOID also counts the places of
/// characters that are not symbols, such as `/`, with the digit 0; here they are not counted.
fn noid(digits: impl Iterator<Item = usize>, size: usize) -> usize {
    digits.zip(1..).map(|(digit, place)| digit * place).sum::<usize>() % size
}
