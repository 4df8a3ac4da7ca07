//! The codes of a pool: the conversion between values and texts such as `SPRING-7K3M-X9QN`. Pure: no I/O, no
//! randomness, no pool.
//!
//! A code has a place for each character of its pattern. The symbols are the digits of the value in the base
//! of the alphabet's size, most significant first, with all leading zeros. So each value has exactly one code.
//! The check character, where there is one, follows from the symbols, and says nothing more about the value.

mod check;
#[cfg(test)]
mod tests;

use serde::{Serialize, Serializer};

use self::check::Check;
use crate::space::Value;

/// The maximum number of characters in a pattern, and so in a code.
pub(crate) const LENGTH_MAX: usize = 64;

/// The maximum number of symbols in an alphabet.
const ALPHABET_MAX: usize = 64;

/// The maximum number of symbols in a code: with two symbols in the alphabet, 62 of them give 2^62 codes.
const SYMBOLS_MAX: usize = i64::MAX.ilog2() as usize;

const DIGITS: &[u8] = b"0123456789";

/// The symbols of Crockford's Base 32 (<https://www.crockford.com/base32.html>): no I, L, O or U. When it is
/// read, O stands for 0, and I and L for 1.
const CROCKFORD32: &[u8] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// The alphabets that have a name. `noid29` is the extended digits of NOID, which has no vowels, `l` and `y`
/// (<https://metacpan.org/dist/Noid/view/noid>), and `hex` is Base 16 of RFC 4648, which is upper case.
const ALPHABETS: [(&str, &[u8]); 4] = [
    ("digits", DIGITS),
    ("crockford32", CROCKFORD32),
    ("noid29", b"0123456789bcdfghjkmnpqrstvwxz"),
    ("hex", b"0123456789ABCDEF"),
];

/// The reason that a pattern, an alphabet or a check was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum CodeError {
    /// The pattern or the alphabet contains a character that a code can't have.
    #[error("the {setting} contains {character:?}; only printable ASCII characters are allowed")]
    Character {
        /// `pattern` or `alphabet`.
        setting: &'static str,
        /// The character.
        character: char,
    },
    /// The pattern is too long.
    #[error("the pattern has {0} characters; at most {LENGTH_MAX} are allowed")]
    PatternLength(usize),
    /// A backslash in the pattern does not precede a character that can be escaped.
    #[error(
        r"a '\' in the pattern is not followed by '#', '?' or '\'; for a literal '\', write '\\'"
    )]
    Escape,
    /// The pattern has no place for a symbol.
    #[error("the pattern {0:?} has no '#', which is the place of a symbol; it needs at least one")]
    NoSymbol(String),
    /// The pattern has more than one place for a check character.
    #[error(
        "the pattern has {0} '?'; one check character is allowed. For a literal '?', write '\\?'"
    )]
    CheckPlaces(usize),
    /// The pattern has a place for a check character, and there is no check.
    #[error(
        "the pattern has a '?', but check is \"none\"; name a check ({names}), or write '\\?' for a literal '?'",
        names = check::names()
    )]
    NoCheck,
    /// There is a check, and the pattern has no place for its character.
    #[error("check {0:?} needs a '?' in the pattern, which is the place of the check character")]
    NoCheckPlace(&'static str),
    /// The alphabet has too few or too many symbols.
    #[error("the alphabet has {0} symbols; use 2 to {ALPHABET_MAX}, or the name of one: {names}", names = alphabet_names())]
    AlphabetSize(usize),
    /// The alphabet contains a symbol twice.
    #[error(
        "the alphabet {alphabet:?} repeats {symbol:?}; use distinct symbols, or the name of an alphabet: {names}",
        names = alphabet_names()
    )]
    Repeated {
        /// The alphabet as it was given.
        alphabet: String,
        /// The symbol.
        symbol: char,
    },
    /// The pattern has so many symbols that some codes would have no value.
    #[error(
        "{symbols} symbols of an alphabet of {size} give more than 9223372036854775807 (2^63-1) codes; use at most {max}"
    )]
    TooMany {
        /// The symbols in the pattern.
        symbols: usize,
        /// The symbols in the alphabet.
        size: usize,
        /// The largest number of symbols in a pattern with this alphabet.
        max: usize,
    },
    /// No check has this name.
    #[error("unknown check {0:?}; allowed are none, {names}", names = check::names())]
    UnknownCheck(String),
    /// The check is not defined for an odd number of symbols.
    #[error(
        "check {check:?} needs an alphabet with an even number of symbols, and this one has {size}; \
         for a prime number of symbols there is \"noid\""
    )]
    OddAlphabet {
        /// The name of the check.
        check: &'static str,
        /// The symbols in the alphabet.
        size: usize,
    },
    /// The check is defined for digits only.
    #[error(
        "check {0:?} needs the alphabet \"digits\"; \"iso7064\" works with every even number of symbols"
    )]
    NotDigits(&'static str),
    /// The check is defined for a prime number of symbols only.
    #[error(
        "check \"noid\" needs an alphabet with a prime number of symbols, such as \"noid29\", and this one has {0}"
    )]
    NotPrime(usize),
    /// The check misses errors in codes of this length.
    #[error(
        "check \"noid\" needs an alphabet with more symbols than '#' and '?' in the pattern, and this one has \
         {size} for {places}"
    )]
    SmallAlphabet {
        /// The symbols in the alphabet.
        size: usize,
        /// The symbols and the check character in the pattern.
        places: usize,
    },
}

impl CodeError {
    /// Returns the setting that is wrong.
    pub(crate) fn setting(&self) -> &'static str {
        match self {
            Self::Character { setting, .. } => setting,
            Self::PatternLength(_)
            | Self::Escape
            | Self::NoSymbol(_)
            | Self::CheckPlaces(_)
            | Self::NoCheck
            | Self::TooMany { .. } => "pattern",
            Self::AlphabetSize(_) | Self::Repeated { .. } => "alphabet",
            Self::NoCheckPlace(_)
            | Self::UnknownCheck(_)
            | Self::OddAlphabet { .. }
            | Self::NotDigits(_)
            | Self::NotPrime(_)
            | Self::SmallAlphabet { .. } => "check",
        }
    }
}

/// The reason that a text is not a code of a format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReadError {
    /// The text is too short or too long.
    #[error(
        "the text has {given} characters without separators; codes of the pattern {pattern:?} have {expected}"
    )]
    Length {
        /// The characters in the text, without separators.
        given: usize,
        /// The characters in a code, without separators.
        expected: usize,
        /// The pattern of the format.
        pattern: String,
    },
    /// A character of the text is not the one that all codes of the format have in its place.
    #[error(
        "character {position} is {found:?}; codes of the pattern {pattern:?} have {expected:?} there"
    )]
    Literal {
        /// The character's place in the text, counted from 1.
        position: usize,
        /// The character.
        found: char,
        /// The character that all codes have there.
        expected: char,
        /// The pattern of the format.
        pattern: String,
    },
    /// A character of the text is not in the alphabet.
    #[error("character {position} is {found:?}, which is not in the alphabet {alphabet:?}")]
    Symbol {
        /// The character's place in the text, counted from 1.
        position: usize,
        /// The character.
        found: char,
        /// The alphabet as it was given.
        alphabet: String,
    },
    /// The check character is not the one that follows from the symbols. The error does not name that one: a
    /// caller could make any text valid with it.
    #[error("the check character does not match; at least one character of the code is wrong")]
    Check,
}

/// A place in a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Symbol,
    Check,
    Literal(u8),
}

/// The format of a pool's codes. Two formats are equal if they have the same pattern, symbols and check: then
/// every value has the same code in both.
#[derive(Clone, Debug)]
pub struct CodeFormat {
    /// The pattern as it was given. Each pattern has only one spelling.
    pattern: String,
    /// The alphabet as it was given: a name, or the symbols.
    alphabet: String,
    check: Option<Check>,
    /// The pattern, without its escapes.
    places: Vec<Place>,
    /// The symbols of the alphabet, in the order of their digits.
    symbols: Vec<u8>,
    /// The digit that each ASCII character is read as.
    digits: [Option<u8>; 128],
    /// The number of symbols in a code.
    symbol_count: usize,
    /// The number of codes.
    count: u64,
}

impl PartialEq for CodeFormat {
    fn eq(&self, other: &Self) -> bool {
        (&self.pattern, &self.symbols, self.check) == (&other.pattern, &other.symbols, other.check)
    }
}

impl Eq for CodeFormat {}

impl std::fmt::Display for CodeFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { pattern, alphabet, .. } = self;
        write!(
            formatter,
            "codes {pattern:?} of the alphabet {alphabet:?} with the check {}",
            self.check()
        )
    }
}

impl CodeFormat {
    /// Returns the format with this pattern, alphabet and check.
    ///
    /// In the pattern, `#` is the place of a symbol, `?` is the place of the check character, and `\` makes a
    /// `#`, `?` or `\` that follows it literal. All other characters are literal. The alphabet is a name
    /// (`digits`, `crockford32`, `noid29` or `hex`) or the symbols themselves. The check is `none`, `luhn`,
    /// `iso7064`, `damm`, `verhoeff` or `noid`; it covers the symbols in their order, wherever the check
    /// character stands.
    ///
    /// # Errors
    /// Returns [`CodeError`] if one of the three is malformed, if they do not fit each other, or if there are
    /// more than 2^63-1 codes.
    pub(crate) fn new(pattern: &str, alphabet: &str, check: &str) -> Result<Self, CodeError> {
        let places = parse_pattern(pattern)?;
        let symbols = parse_alphabet(alphabet)?;
        let check = Check::parse(check)?;
        let number_of = |wanted| places.iter().filter(|&&place| place == wanted).count();
        let symbol_count = number_of(Place::Symbol);
        if symbol_count == 0 {
            return Err(CodeError::NoSymbol(pattern.to_owned()));
        }
        match (number_of(Place::Check), check) {
            (0, Some(check)) => return Err(CodeError::NoCheckPlace(check.name())),
            (1, None) => return Err(CodeError::NoCheck),
            (0, None) => {}
            (1, Some(check)) => check.validate(&symbols, symbol_count)?,
            (places, _) => return Err(CodeError::CheckPlaces(places)),
        }
        let size = symbols.len() as u64;
        let max = i64::MAX.unsigned_abs().ilog(size) as usize;
        if symbol_count > max {
            return Err(CodeError::TooMany { symbols: symbol_count, size: symbols.len(), max });
        }
        Ok(Self {
            pattern: pattern.to_owned(),
            alphabet: alphabet.to_owned(),
            check,
            places,
            digits: digits_of(&symbols),
            count: size.pow(symbol_count as u32),
            symbols,
            symbol_count,
        })
    }

    /// Returns the pattern as it was given.
    pub(crate) fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Returns the alphabet as it was given: a name, or the symbols.
    pub(crate) fn alphabet(&self) -> &str {
        &self.alphabet
    }

    /// Returns the name of the check: `none` if there is none.
    pub(crate) fn check(&self) -> &'static str {
        self.check.map_or(check::NONE, Check::name)
    }

    /// Returns the places of a code.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Returns the symbols of the alphabet, in the order of their digits.
    pub(crate) fn symbols(&self) -> &str {
        str::from_utf8(&self.symbols).expect("CodeFormat::new accepts only ASCII")
    }

    /// Returns the number of codes: 2 to 2^63-1. The values are 0 to one less.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Returns the code of the value, or `None` if no code has this value. A value may come from a file, which
    /// may be damaged.
    pub(crate) fn write(&self, value: Value) -> Option<Code> {
        let mut rest = u64::try_from(value.0).ok().filter(|&value| value < self.count)?;
        let size = self.symbols.len() as u64;
        let mut digits = [0; SYMBOLS_MAX];
        let digits = &mut digits[..self.symbol_count];
        for digit in digits.iter_mut().rev() {
            *digit = (rest % size) as u8;
            rest /= size;
        }
        let check = self.check.map_or(0, |check| check.digit(digits, self.symbols.len()));
        let mut text = [0; LENGTH_MAX];
        let mut next = digits.iter();
        for (byte, place) in text.iter_mut().zip(&self.places) {
            *byte = match place {
                Place::Symbol => self.symbols[usize::from(*next.next().expect("counted in new"))],
                Place::Check => self.symbols[usize::from(check)],
                Place::Literal(literal) => *literal,
            };
        }
        Some(Code { text, length: self.places.len() })
    }

    /// Returns the value of a code. This is the inverse of [`CodeFormat::write`], and also accepts what people
    /// make of a code:
    /// - Spaces and hyphens may be left out or added, except for one that is a symbol of the alphabet.
    /// - Letters may have the other case, unless the alphabet contains both cases of the letter.
    /// - With the symbols of `crockford32`, O is read as 0, and I and L as 1.
    ///
    /// # Errors
    /// Returns [`ReadError`] if the text is not a code of this format. [`ReadError::Check`] means that
    /// everything but the check character is well-formed.
    pub(crate) fn read(&self, text: &str) -> Result<Value, ReadError> {
        let characters =
            text.chars().zip(1..).filter(|&(character, _)| !self.is_separator(character));
        let places = self.places.iter().filter(|place| match place {
            Place::Literal(literal) => !self.is_separator(char::from(*literal)),
            _ => true,
        });
        let (given, expected) = (characters.clone().count(), places.clone().count());
        if given != expected {
            return Err(ReadError::Length { given, expected, pattern: self.pattern.clone() });
        }
        let mut digits = [0; SYMBOLS_MAX];
        let mut next = digits.iter_mut();
        let mut check = None;
        for (place, (found, position)) in places.zip(characters) {
            let not_a_symbol = || {
                let alphabet = self.alphabet.clone();
                ReadError::Symbol { position, found, alphabet }
            };
            let digit = || self.digit(found).ok_or_else(not_a_symbol);
            match *place {
                Place::Symbol => *next.next().expect("counted in new") = digit()?,
                Place::Check => check = Some(digit()?),
                Place::Literal(literal) => {
                    let expected = char::from(literal);
                    if !found.eq_ignore_ascii_case(&expected) {
                        let pattern = self.pattern.clone();
                        return Err(ReadError::Literal { position, found, expected, pattern });
                    }
                }
            }
        }
        let digits = &digits[..self.symbol_count];
        if check != self.check.map(|check| check.digit(digits, self.symbols.len())) {
            return Err(ReadError::Check);
        }
        let size = self.symbols.len() as i64;
        Ok(Value(digits.iter().fold(0, |value, &digit| value * size + i64::from(digit))))
    }

    /// Returns whether a character may be left out of a code, and added to it.
    fn is_separator(&self, character: char) -> bool {
        // Invariant: a symbol of the alphabet is never a separator.
        matches!(character, ' ' | '-') && self.digit(character).is_none()
    }

    /// Returns the digit that a character is read as, or `None` if it is not in the alphabet.
    fn digit(&self, character: char) -> Option<u8> {
        self.digits.get(character as usize).copied().flatten()
    }
}

/// A code's text, stored inline. It is ASCII, and may contain any printable character: JSON has to escape it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code {
    text: [u8; LENGTH_MAX],
    length: usize,
}

impl Code {
    /// Returns the text.
    pub(crate) fn as_str(&self) -> &str {
        str::from_utf8(&self.text[..self.length]).expect("CodeFormat::new accepts only ASCII")
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.pad(self.as_str())
    }
}

impl std::fmt::Debug for Code {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Returns the places of a pattern.
fn parse_pattern(pattern: &str) -> Result<Vec<Place>, CodeError> {
    require_printable("pattern", pattern)?;
    if pattern.len() > LENGTH_MAX {
        return Err(CodeError::PatternLength(pattern.len()));
    }
    let mut places = Vec::new();
    let mut bytes = pattern.bytes();
    while let Some(byte) = bytes.next() {
        places.push(match byte {
            b'#' => Place::Symbol,
            b'?' => Place::Check,
            b'\\' => match bytes.next() {
                Some(escaped @ (b'#' | b'?' | b'\\')) => Place::Literal(escaped),
                _ => return Err(CodeError::Escape),
            },
            literal => Place::Literal(literal),
        });
    }
    Ok(places)
}

/// Returns the symbols of an alphabet, in the order of their digits.
fn parse_alphabet(alphabet: &str) -> Result<Vec<u8>, CodeError> {
    if let Some((_, symbols)) = ALPHABETS.iter().find(|(name, _)| *name == alphabet) {
        return Ok(symbols.to_vec());
    }
    require_printable("alphabet", alphabet)?;
    let symbols = alphabet.as_bytes();
    if let Some(repeated) =
        (1..symbols.len()).find(|&index| symbols[..index].contains(&symbols[index]))
    {
        let symbol = char::from(symbols[repeated]);
        return Err(CodeError::Repeated { alphabet: alphabet.to_owned(), symbol });
    }
    if !(2..=ALPHABET_MAX).contains(&symbols.len()) {
        return Err(CodeError::AlphabetSize(symbols.len()));
    }
    Ok(symbols.to_vec())
}

fn require_printable(setting: &'static str, text: &str) -> Result<(), CodeError> {
    match text.chars().find(|character| !matches!(character, ' '..='~')) {
        Some(character) => Err(CodeError::Character { setting, character }),
        None => Ok(()),
    }
}

fn alphabet_names() -> String {
    ALPHABETS.map(|(name, _)| name).join(", ")
}

/// Returns the digit that each ASCII character is read as.
fn digits_of(symbols: &[u8]) -> [Option<u8>; 128] {
    let mut digits = [None; 128];
    for (&symbol, digit) in symbols.iter().zip(0..) {
        digits[usize::from(symbol)] = Some(digit);
    }
    for &symbol in symbols {
        // Invariant: a symbol is never read as the other case of another one.
        let other_case = usize::from(symbol ^ 0x20);
        if symbol.is_ascii_alphabetic() && digits[other_case].is_none() {
            digits[other_case] = digits[usize::from(symbol)];
        }
    }
    if symbols == CROCKFORD32 {
        for (look_alike, digit) in
            [(b'O', 0), (b'o', 0), (b'I', 1), (b'i', 1), (b'L', 1), (b'l', 1)]
        {
            digits[usize::from(look_alike)] = Some(digit);
        }
    }
    digits
}
