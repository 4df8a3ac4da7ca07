//! A pool's range of numbers, and the conversion between values and texts. Pure: no I/O, no randomness, no
//! pool.
//!
//! A number is stored as a [`Value`], a scaled integer: `839.347209` with 6 decimals is `839347209`. A
//! [code](CodeFormat) is another way to write a value. Each value has exactly one text, and two numbers are the
//! same if their texts are the same.

mod code;

use std::sync::Arc;

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

pub(crate) use self::code::Place;
pub use self::code::{Code, CodeFormat, ReadError};

/// The largest magnitude of an integer: 2^53-1. Beyond it, JSON readers that store numbers as IEEE 754
/// doubles merge neighbouring integers (RFC 8259, section 6).
pub const INTEGER_MAX: i64 = (1 << 53) - 1;

/// The maximum number of significant digits in a number with decimals: a double represents any 15
/// (`DBL_DIG`).
pub(crate) const SIGNIFICANT_DIGITS_MAX: u32 = 15;

/// The maximum number of digits after the point: one less than the significant digits.
pub const DECIMALS_MAX: u8 = 14;

/// A number as a scaled integer: the number times 10^decimals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Value(pub i64);

/// The reason that a range or a number was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpaceError {
    /// The text is not a decimal number.
    #[error("{0:?} is not a decimal number")]
    NotANumber(String),
    /// The text has more digits after the point than the pool.
    #[error("{text} has more than {decimals} digits after the point")]
    TooManyDecimals {
        text: String,
        /// Digits after the point that are allowed.
        decimals: u8,
    },
    /// The number is so large that JSON readers could merge it with its neighbours.
    #[error("{text} is beyond {allowed}")]
    TooLarge {
        text: String,
        /// The allowed magnitude, as text.
        allowed: &'static str,
    },
    /// The range's lower end is above its upper end.
    #[error("min {min} is above max {max}")]
    Empty {
        /// Lower end as it was given.
        min: String,
        /// Upper end as it was given.
        max: String,
    },
    /// The text is not a code of the format.
    #[error(transparent)]
    Code(#[from] ReadError),
    /// There are more digits after the point than a number can have.
    #[error("{0} decimals are more than {DECIMALS_MAX}")]
    Decimals(u8),
}

/// A range of numbers with a fixed number of decimals, or all codes of a format. Both ends are included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Space {
    min: Value,
    max: Value,
    decimals: u8,
    /// The format of the codes, unless values are written as numbers.
    codes: Option<Arc<CodeFormat>>,
}

impl Space {
    /// Returns the range from `min` to `max`, which are decimal texts.
    ///
    /// # Errors
    /// Returns [`SpaceError`] if an end is not a number or has too many digits, or if the range is empty.
    pub fn new(min: &str, max: &str, decimals: u8) -> Result<Self, SpaceError> {
        if decimals > DECIMALS_MAX {
            return Err(SpaceError::Decimals(decimals));
        }
        let (min_value, max_value) = (parse(min, decimals)?, parse(max, decimals)?);
        let space = Self { min: min_value, max: max_value, decimals, codes: None };
        if space.min > space.max {
            return Err(SpaceError::Empty { min: min.to_owned(), max: max.to_owned() });
        }
        Ok(space)
    }

    /// Returns the range from `min` to `max`, or `None` if no [`Space`] can have these ends. They come from a
    /// file, which may be damaged.
    pub(crate) fn from_values(min: Value, max: Value, decimals: u8) -> Option<Self> {
        let fits = |value: Value| value.0.unsigned_abs() <= magnitude_max(decimals);
        let possible = decimals <= DECIMALS_MAX && min <= max && fits(min) && fits(max);
        possible.then_some(Self { min, max, decimals, codes: None })
    }

    /// Returns the widest range of numbers with this many decimals, or `None` if numbers can't have as many.
    pub(crate) fn widest(decimals: u8) -> Option<Self> {
        let max = i64::try_from(magnitude_max(decimals.min(DECIMALS_MAX))).expect("below 2^54");
        Self::from_values(Value(-max), Value(max), decimals)
    }

    /// Returns the range of all codes of a format.
    pub(crate) fn of_codes(format: CodeFormat) -> Self {
        let last = format.count() - 1;
        let max = Value(last.try_into().expect("a format has at most 2^63-1 codes"));
        Self { min: Value(0), max, decimals: 0, codes: Some(Arc::new(format)) }
    }

    /// Returns the format of the codes, or `None` if values are written as numbers.
    pub(crate) fn codes(&self) -> Option<&CodeFormat> {
        self.codes.as_deref()
    }

    /// Returns the smallest value.
    pub fn min(&self) -> Value {
        self.min
    }

    /// Returns the largest value.
    pub fn max(&self) -> Value {
        self.max
    }

    /// Returns the number of digits after the point.
    pub fn decimals(&self) -> u8 {
        self.decimals
    }

    /// Returns the number of values in the range: 1 to 2^54-1, or to 2^63-1 if they are codes.
    pub fn size(&self) -> u64 {
        self.max.0.abs_diff(self.min.0) + 1
    }

    /// Returns whether the value is in the range.
    pub fn contains(&self, value: Value) -> bool {
        (self.min..=self.max).contains(&value)
    }

    /// Returns whether every number of `other` is a number of this range, with the same text.
    pub fn covers(&self, other: &Self) -> bool {
        (self.decimals, &self.codes) == (other.decimals, &other.codes)
            && self.min <= other.min
            && other.max <= self.max
    }

    /// Returns the value of a number's text.
    ///
    /// # Errors
    /// Returns [`SpaceError`] if the text is not a number with at most this space's decimals, or not a code of
    /// its format.
    pub fn parse(&self, text: &str) -> Result<Value, SpaceError> {
        match self.codes() {
            Some(format) => Ok(format.read(text)?),
            None => parse(text, self.decimals),
        }
    }

    /// Returns the text of a value: its code, or a number with exactly the space's number of decimals.
    pub fn number(&self, value: Value) -> Number {
        let code = self.codes().and_then(|format| format.write(value));
        code.map_or_else(|| Number::new(value, self.decimals), Number::Code)
    }
}

impl std::fmt::Display for Space {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.codes() {
            None => write!(formatter, "{} to {}", self.number(self.min), self.number(self.max)),
            Some(format) => format.fmt(formatter),
        }
    }
}

/// The text of a value, stored inline. A number serialises as a JSON number with exactly these digits, and a code
/// as a string.
#[derive(Clone, Copy)]
pub enum Number {
    Decimal(Decimal),
    Code(Code),
}

/// The text of a number.
#[derive(Clone, Copy)]
pub struct Decimal {
    text: [u8; Self::LENGTH_MAX],
    start: usize,
}

impl Decimal {
    /// The space for a sign, the 19 digits of the largest magnitude, and a point. A number of a [`Space`] has
    /// at most 16 digits, but a damaged file can contain any value, and its text is needed to report it.
    const LENGTH_MAX: usize = 21;
}

impl Number {
    /// Formats any value with up to [`DECIMALS_MAX`] decimals.
    fn new(value: Value, decimals: u8) -> Self {
        let mut text = [0; Decimal::LENGTH_MAX];
        let mut start = Decimal::LENGTH_MAX;
        let mut push = |byte| {
            start -= 1;
            text[start] = byte;
        };
        let mut rest = value.0.unsigned_abs();
        let mut digits = 0;
        // At least one digit precedes the point.
        while rest > 0 || digits <= decimals {
            if digits == decimals && decimals > 0 {
                push(b'.');
            }
            push(b'0' + (rest % 10) as u8);
            rest /= 10;
            digits += 1;
        }
        if value.0 < 0 {
            push(b'-');
        }
        Self::Decimal(Decimal { text, start })
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Decimal(Decimal { text, start }) => {
                str::from_utf8(&text[*start..]).expect("only ASCII was pushed in Number::new")
            }
            Self::Code(code) => code.as_str(),
        }
    }

    /// Appends the number as JSON.
    pub(crate) fn push_json(&self, json: &mut String) {
        match self {
            Self::Decimal(_) => json.push_str(self.as_str()),
            Self::Code(code) => {
                json.push('"');
                for character in code.as_str().chars() {
                    // A code has no other characters that JSON escapes.
                    if matches!(character, '"' | '\\') {
                        json.push('\\');
                    }
                    json.push(character);
                }
                json.push('"');
            }
        }
    }
}

impl std::fmt::Display for Number {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl std::fmt::Debug for Number {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Decimal(_) => {
                // A raw value keeps the digits unchanged: as a double, 5.100000 would become 5.1.
                let raw: &RawValue =
                    serde_json::from_str(self.as_str()).expect("a number's text is a JSON number");
                raw.serialize(serializer)
            }
            Self::Code(code) => code.serialize(serializer),
        }
    }
}

/// Returns the largest magnitude of a value that every JSON reader represents exactly.
fn magnitude_max(decimals: u8) -> u64 {
    match decimals {
        0 => INTEGER_MAX.unsigned_abs(),
        _ => 10_u64.pow(SIGNIFICANT_DIGITS_MAX) - 1,
    }
}

/// Parses `[-]digits[.digits]`. Missing digits after the point are zeros.
fn parse(text: &str, decimals: u8) -> Result<Value, SpaceError> {
    let not_a_number = || SpaceError::NotANumber(text.to_owned());
    let (negative, unsigned) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, "0"));
    let all_digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) {
        return Err(not_a_number());
    }
    let fraction = fraction.trim_end_matches('0');
    let Some(padding) = usize::from(decimals).checked_sub(fraction.len()) else {
        return Err(SpaceError::TooManyDecimals { text: text.to_owned(), decimals });
    };
    let allowed = if decimals == 0 {
        "-9007199254740991 to 9007199254740991 (2^53-1)"
    } else {
        "15 significant digits"
    };
    let too_large = || SpaceError::TooLarge { text: text.to_owned(), allowed };
    let digits = format!("{whole}{fraction}{}", "0".repeat(padding));
    let magnitude: i64 = digits.parse().map_err(|_| too_large())?;
    if magnitude.unsigned_abs() > magnitude_max(decimals) {
        return Err(too_large());
    }
    Ok(Value(if negative { -magnitude } else { magnitude }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn number_texts() {
        let check = |value, decimals, expected: &str| {
            assert_eq!(Number::new(Value(value), decimals).as_str(), expected);
        };
        check(0, 0, "0");
        check(4_837_201, 0, "4837201");
        check(-7, 0, "-7");
        check(839_347_209, 6, "839.347209");
        check(5_100_000, 6, "5.100000");
        check(1, 6, "0.000001");
        check(-1, 6, "-0.000001");
        check(0, 2, "0.00");
        check(INTEGER_MAX, 0, "9007199254740991");
        check(-INTEGER_MAX, 0, "-9007199254740991");
        check(999_999_999_999_999, 14, "9.99999999999999");
        // A damaged file can contain any of these.
        check(i64::MAX, 0, "9223372036854775807");
        check(i64::MIN, 0, "-9223372036854775808");
        check(i64::MIN, 14, "-92233.72036854775808");
    }

    #[test]
    fn refused_texts() {
        let check = |text: &str, decimals, expected: &str| {
            let error = parse(text, decimals).expect_err(text);
            assert_eq!(error.to_string(), expected);
        };
        check("", 0, "\"\" is not a decimal number");
        check("-", 0, "\"-\" is not a decimal number");
        check("1.", 2, "\"1.\" is not a decimal number");
        check(".5", 2, "\".5\" is not a decimal number");
        check("1e3", 2, "\"1e3\" is not a decimal number");
        check("+1", 2, "\"+1\" is not a decimal number");
        check("NaN", 2, "\"NaN\" is not a decimal number");
        check("0.125", 2, "0.125 has more than 2 digits after the point");
        check(
            "9007199254740992",
            0,
            "9007199254740992 is beyond -9007199254740991 to 9007199254740991 (2^53-1)",
        );
        check("1000000000", 6, "1000000000 is beyond 15 significant digits");
        check(
            "99999999999999999999",
            0,
            "99999999999999999999 is beyond -9007199254740991 to 9007199254740991 (2^53-1)",
        );
    }

    #[test]
    fn ranges() {
        let size = |min, max, decimals| Space::new(min, max, decimals).map(|space| space.size());
        assert_eq!(size("1", "1000", 0), Ok(1000));
        assert_eq!(size("0.0", "9999.999999", 6), Ok(10_000_000_000));
        assert_eq!(size("-1", "1", 1), Ok(21));
        assert_eq!(size("5", "5", 0), Ok(1));
        assert_eq!(
            size("-9007199254740991", "9007199254740991", 0),
            Ok(2 * INTEGER_MAX as u64 + 1)
        );
        assert_eq!(size("2", "1", 0), Err(SpaceError::Empty { min: "2".into(), max: "1".into() }));
        assert_eq!(size("0", "1", 15), Err(SpaceError::Decimals(15)));
    }

    #[test]
    fn ranges_of_a_file() {
        let check = |min, max, decimals, possible| {
            let space = Space::from_values(Value(min), Value(max), decimals);
            assert_eq!(space.is_some(), possible, "{min} to {max} with {decimals} decimals");
        };
        check(-INTEGER_MAX, INTEGER_MAX, 0, true);
        check(5, 5, 14, true);
        check(5, 4, 0, false);
        check(0, 1, 15, false);
        check(0, INTEGER_MAX + 1, 0, false);
        check(0, 10_i64.pow(15), 1, false);
        check(i64::MIN, i64::MAX, 0, false);
    }

    proptest! {
        #[test]
        fn text_and_value_are_one_to_one(value in -999_999_999_999_999..=999_999_999_999_999_i64, decimals in 0..=14_u8) {
            let number = Number::new(Value(value), decimals);
            prop_assert_eq!(parse(number.as_str(), decimals), Ok(Value(value)));
            let fraction = number.as_str().split_once('.').map_or(0, |(_, digits)| digits.len());
            prop_assert_eq!(fraction, usize::from(decimals));
        }

        /// A JSON reader that stores numbers as doubles does not merge a number with another one.
        #[test]
        fn a_double_keeps_every_number(value in -999_999_999_999_999..=999_999_999_999_999_i64, decimals in 0..=14_u8) {
            let read: f64 = Number::new(Value(value), decimals).as_str().parse().unwrap();
            let again = format!("{read:.*}", usize::from(decimals));
            prop_assert_eq!(parse(&again, decimals).unwrap(), Value(value));
        }

        #[test]
        fn json_keeps_every_digit(value in -999_999_999_999_999..=999_999_999_999_999_i64, decimals in 0..=14_u8) {
            let number = Number::new(Value(value), decimals);
            prop_assert_eq!(serde_json::to_string(&number).unwrap(), number.as_str());
        }

        #[test]
        fn every_value_has_a_text_of_its_own(value: i64, decimals in 0..=DECIMALS_MAX) {
            let text = Number::new(Value(value), decimals).to_string();
            prop_assert_eq!(text.replacen('.', "", 1).parse(), Ok(value));
            prop_assert_eq!(text.contains('.'), decimals > 0);
        }

        #[test]
        fn no_text_panics(text in "\\PC*", decimals in 0..=14_u8) {
            let _ = parse(&text, decimals);
        }
    }
}
