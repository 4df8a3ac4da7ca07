//! Each test fails if what it guards is broken. Exhaustive over short codes, random over long ones, and beside
//! other implementations of the checks.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Write;

use iso_7064::accumulator::{Accumulator, Hybrid};
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use verhoeff::Verhoeff;

use super::*;

const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const ALPHANUMERIC: &str = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
const BASE64: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Each check with alphabets of all kinds that it is defined for.
const CHECKED: [(&str, &str); 21] = [
    ("luhn", "01"),
    ("luhn", "abcdef"),
    ("luhn", "digits"),
    ("luhn", "hex"),
    ("luhn", LETTERS),
    ("luhn", "crockford32"),
    ("luhn", ALPHANUMERIC),
    ("luhn", BASE64),
    ("iso7064", "01"),
    ("iso7064", "abcdef"),
    ("iso7064", "digits"),
    ("iso7064", "hex"),
    ("iso7064", LETTERS),
    ("iso7064", "crockford32"),
    ("iso7064", ALPHANUMERIC),
    ("iso7064", BASE64),
    ("damm", "digits"),
    ("verhoeff", "digits"),
    ("noid", "0123456"),
    ("noid", "0123456789X"),
    ("noid", "noid29"),
];

fn format(pattern: &str, alphabet: &str, check: &str) -> CodeFormat {
    CodeFormat::new(pattern, alphabet, check)
        .unwrap_or_else(|error| panic!("{pattern:?}, {alphabet:?}, {check:?}: {error}"))
}

fn write(format: &CodeFormat, value: u64) -> String {
    format.write(Value(value as i64)).expect("the value is below the count").to_string()
}

fn codes(format: &CodeFormat) -> impl Iterator<Item = (Value, String)> {
    (0..format.count()).map(|value| (Value(value as i64), write(format, value)))
}

/// Returns all texts of `length` symbols.
fn texts(symbols: &[u8], length: usize) -> Vec<String> {
    (0..length).fold(vec![String::new()], |texts, _| {
        let extended = |text: &String| {
            symbols.iter().map(|&symbol| format!("{text}{}", char::from(symbol))).collect()
        };
        texts.iter().flat_map::<Vec<_>, _>(extended).collect()
    })
}

fn swapped(code: &str, place: usize) -> String {
    let mut bytes = code.as_bytes().to_vec();
    bytes.swap(place, place + 1);
    String::from_utf8(bytes).unwrap()
}

#[test]
fn codes_of_patterns() {
    let check = |pattern, alphabet, check, value, expected: &str| {
        assert_eq!(write(&format(pattern, alphabet, check), value), expected, "{pattern:?}");
    };
    check("######", "digits", "none", 0, "000000");
    check("######", "digits", "none", 123, "000123");
    check("######", "digits", "none", 999_999, "999999");
    check("SPRING-####-###", "crockford32", "none", 32_u64.pow(7) - 1, "SPRING-ZZZZ-ZZZ");
    check("####", "hex", "none", 0xBEEF, "BEEF");
    check("###", "noid29", "none", 28, "00z");
    check("###", "01", "none", 6, "110");
    check("###", "ba", "none", 3, "baa");
    check(r"\##\?\\#!", "digits", "none", 42, r"#4?\2!");
    check("#### #### #### ###?", "digits", "luhn", 400_012_345_678_901, "4000 1234 5678 9017");
    check("?-###", "digits", "damm", 572, "4-572");
    check("#-?-##", "digits", "damm", 572, "5-4-72");
    check("###?", "digits", "verhoeff", 236, "2363");
    check("####?", "digits", "iso7064", 794, "07945");
}

#[test]
fn refused_formats() {
    let check = |pattern: &str, alphabet: &str, check: &str, expected: &str| {
        let error = CodeFormat::new(pattern, alphabet, check).expect_err(pattern);
        assert_eq!(error.to_string(), expected, "{pattern:?}, {alphabet:?}, {check:?}");
    };
    let long = "-".repeat(64) + "#";
    let no_symbol = |pattern| {
        format!(
            "the pattern {pattern:?} has no '#', which is the place of a symbol; it needs at least one"
        )
    };
    check("", "digits", "none", &no_symbol(""));
    check("ABC", "digits", "none", &no_symbol("ABC"));
    check(r"\#", "digits", "none", &no_symbol(r"\#"));
    check("?", "digits", "luhn", &no_symbol("?"));
    check(&long, "digits", "none", "the pattern has 65 characters; at most 64 are allowed");
    let printable = |setting, character: char| {
        format!("the {setting} contains {character:?}; only printable ASCII characters are allowed")
    };
    check("#\n", "digits", "none", &printable("pattern", '\n'));
    check("#\u{7f}", "digits", "none", &printable("pattern", '\u{7f}'));
    check("№#", "digits", "none", &printable("pattern", '№'));
    check("#", "01\t", "none", &printable("alphabet", '\t'));
    check("#", "aäoö", "none", &printable("alphabet", 'ä'));
    let escape =
        r"a '\' in the pattern is not followed by '#', '?' or '\'; for a literal '\', write '\\'";
    check(r"#\", "digits", "none", escape);
    check(r"\A#", "digits", "none", escape);
    let twice =
        r"the pattern has 2 '?'; one check character is allowed. For a literal '?', write '\?'";
    check("#??", "digits", "luhn", twice);
    check("?#?", "digits", "none", twice);
    let no_check = "the pattern has a '?', but check is \"none\"; name a check (luhn, iso7064, damm, verhoeff, noid), \
                    or write '\\?' for a literal '?'";
    check("#?", "digits", "none", no_check);
    let no_place =
        "check \"luhn\" needs a '?' in the pattern, which is the place of the check character";
    check("###", "digits", "luhn", no_place);
    check(r"###\?", "digits", "luhn", no_place);
    let size = |size| {
        format!(
            "the alphabet has {size} symbols; use 2 to 64, or the name of one: digits, crockford32, noid29, hex"
        )
    };
    check("#", "", "none", &size(0));
    check("#", "x", "none", &size(1));
    check("#", &format!("{BASE64}-"), "none", &size(65));
    let repeated = |alphabet, symbol: char| {
        format!(
            "the alphabet {alphabet:?} repeats {symbol:?}; use distinct symbols, or the name of an alphabet: \
             digits, crockford32, noid29, hex"
        )
    };
    check("#", "Digits", "none", &repeated("Digits", 'i'));
    check("#", "0120", "none", &repeated("0120", '0'));
    let unknown = |name| {
        format!("unknown check {name:?}; allowed are none, luhn, iso7064, damm, verhoeff, noid")
    };
    check("#?", "digits", "crc32", &unknown("crc32"));
    check("#?", "digits", "Luhn", &unknown("Luhn"));
    check("#", "digits", "", &unknown(""));
    let odd = |check, size| {
        format!(
            "check {check:?} needs an alphabet with an even number of symbols, and this one has {size}; \
             for a prime number of symbols there is \"noid\""
        )
    };
    check("##?", "noid29", "luhn", &odd("luhn", 29));
    check("##?", "012", "iso7064", &odd("iso7064", 3));
    let digits = |check| {
        format!(
            "check {check:?} needs the alphabet \"digits\"; \"iso7064\" works with every even number of symbols"
        )
    };
    check("##?", "hex", "damm", &digits("damm"));
    check("##?", "1234567890", "verhoeff", &digits("verhoeff"));
    let prime = |size| {
        format!(
            "check \"noid\" needs an alphabet with a prime number of symbols, such as \"noid29\", and this one has {size}"
        )
    };
    check("##?", "digits", "noid", &prime(10));
    check("##?", "crockford32", "noid", &prime(32));
    check("##?", "012345678", "noid", &prime(9));
    let small = |size, places| {
        format!(
            "check \"noid\" needs an alphabet with more symbols than '#' and '?' in the pattern, and this one has \
             {size} for {places}"
        )
    };
    check("#?", "01", "noid", &small(2, 2));
    check("####?", "01234", "noid", &small(5, 5));
    let many = |symbols, size, max| {
        format!(
            "{symbols} symbols of an alphabet of {size} give more than 9223372036854775807 (2^63-1) codes; \
             use at most {max}"
        )
    };
    check(&"#".repeat(64), "digits", "none", &many(64, 10, 18));
    check(&"#".repeat(63), "01", "none", &many(63, 2, 62));
    check(&"#".repeat(21), "01234567", "none", &many(21, 8, 20));
    check(&"#".repeat(13), "crockford32", "none", &many(13, 32, 12));
    check(&"#".repeat(11), BASE64, "none", &many(11, 64, 10));
}

#[test]
fn texts_that_are_read() {
    let check = |pattern, alphabet, check, text: &str, value| {
        assert_eq!(
            format(pattern, alphabet, check).read(text),
            Ok(Value(value)),
            "{pattern:?}, {text:?}"
        );
    };
    // Case, separators and look-alikes.
    for text in [
        "V-10AZ-9",
        "v-10az-9",
        "v10az9",
        " V 10 AZ 9 ",
        "V--10-AZ--9",
        "v-Ioaz-9",
        "V-LOAZ-9",
        "v-lOaZ-9",
    ] {
        check("V-####-#", "crockford32", "none", text, ((32 * 32 + 10) * 32 + 31) * 32 + 9);
    }
    check("#?", "crockford32", "luhn", "OO", 0);
    check("##", "0123456789ABCDEFGHJKMNPQRSTVWXYZ", "none", "ol", 1);
    check("####", "hex", "none", "beef", 0xBEEF);
    check("####", "noid29", "none", "000Z", 28);
    // Letters whose two cases are two symbols.
    check("##", "aAb", "none", "aA", 1);
    check("##", "aAb", "none", "Aa", 3);
    check("##", "aAb", "none", "Bb", 8);
    // A separator that is a symbol, and the other one, which is not.
    check("#-#", "01-", "none", "0-1", 1);
    check("#-#", "01-", "none", "---", 8);
    check("# #", "01-", "none", "-1", 7);
    check("#-#", "01 ", "none", "  ", 8);
    // A literal that is also a symbol, or that is read as one.
    check("1#1", "digits", "none", "111", 1);
    check("A-A#", "hex", "none", "aaf", 15);
    check("O#L", "crockford32", "none", "olL", 1);
    // Separators that are all that a pattern has beside one symbol.
    check("- #-", "digits", "none", "7", 7);
}

#[test]
fn texts_that_are_refused() {
    let check = |pattern, alphabet, check, text: &str, expected: &str| {
        let error = format(pattern, alphabet, check).read(text).expect_err(text);
        assert_eq!(error.to_string(), expected, "{pattern:?}, {text:?}");
    };
    let length = |given, pattern, expected| {
        format!(
            "the text has {given} characters without separators; codes of the pattern {pattern:?} have {expected}"
        )
    };
    check("V-####", "digits", "none", "", &length(0, "V-####", 5));
    check("V-####", "digits", "none", "V-123", &length(4, "V-####", 5));
    check("V-####", "digits", "none", "1234", &length(4, "V-####", 5));
    check("V-####", "digits", "none", "V-12345", &length(6, "V-####", 5));
    check("#-#", "01-", "none", "01", &length(2, "#-#", 3));
    check("##", "digits", "none", "1\u{a0}2", &length(3, "##", 2));
    check("##", "digits", "none", "12\n", &length(3, "##", 2));
    let literal = "character 3 is 'W'; codes of the pattern \"V-V##\" have 'V' there";
    check("V-V##", "digits", "none", "V-W12", literal);
    let literal = "character 1 is '0'; codes of the pattern \"O#\" have 'O' there";
    check("O#", "crockford32", "none", "01", literal);
    let symbol = |position: usize, found: char, alphabet| {
        format!("character {position} is {found:?}, which is not in the alphabet {alphabet:?}")
    };
    check("V-####", "crockford32", "none", "V-12U4", &symbol(5, 'U', "crockford32"));
    check("V-####", "crockford32", "none", "v 1 2 u4", &symbol(7, 'u', "crockford32"));
    check("##", "noid29", "none", "1y", &symbol(2, 'y', "noid29"));
    check("##", "digits", "none", "O1", &symbol(1, 'O', "digits"));
    check("##", "digits", "none", "1٢", &symbol(2, '٢', "digits"));
    check("##", "ABC", "none", "AſB", &length(3, "##", 2));
    check("##", "KLM", "none", "K\u{212a}", &symbol(2, '\u{212a}', "KLM"));
    let wrong = "the check character does not match; at least one character of the code is wrong";
    check("##?", "digits", "damm", "573", wrong);
    check("V-###?", "digits", "damm", "V-5725", wrong);
    check("##?", "digits", "damm", "57x", &symbol(3, 'x', "digits"));
}

#[test]
fn values_that_no_code_has() {
    let format = format("##?", "digits", "luhn");
    assert_eq!(format.count(), 100);
    assert!(format.write(Value(99)).is_some());
    for value in [100, -1, i64::MAX, i64::MIN] {
        assert_eq!(format.write(Value(value)), None, "{value}");
    }
}

#[test]
fn a_format_is_the_same_after_its_parts_were_stored() {
    for (pattern, alphabet, check) in [
        ("SPRING-####-###?", "crockford32", "iso7064"),
        (r"\##\\", "xyz", "none"),
        ("#-?", "noid29", "noid"),
    ] {
        let format = format(pattern, alphabet, check);
        assert_eq!(
            (format.pattern(), format.alphabet(), format.check()),
            (pattern, alphabet, check)
        );
        assert_eq!(
            CodeFormat::new(format.pattern(), format.alphabet(), format.check()),
            Ok(format)
        );
    }
    let hex = format("##?", "hex", "luhn");
    assert_eq!(hex, format("##?", "0123456789ABCDEF", "luhn"), "a name stands for its symbols");
    assert_ne!(hex, format("##?", "0123456789abcdef", "luhn"));
    assert_ne!(hex, format("##?", "hex", "iso7064"));
    assert_ne!(hex, format("#?#", "hex", "luhn"));
    assert_ne!(hex, format("##-?", "hex", "luhn"));
}

#[test]
fn json_escapes_a_code() {
    let format = format(r#"<"\\#>"#, "digits", "none");
    assert_eq!(serde_json::to_string(&format.write(Value(5))).unwrap(), r#""<\"\\5>""#);
}

/// Writing is one-to-one, reading is its inverse, and of all texts of a code's length only codes are accepted:
/// the others are told apart by their check character alone.
#[test]
fn short_codes_are_one_to_one() {
    for (check, alphabet) in CHECKED {
        for pattern in ["#?", "?##", "#?#"] {
            let format = format(pattern, alphabet, check);
            let written: HashSet<String> = codes(&format).map(|(_, code)| code).collect();
            assert_eq!(written.len() as u64, format.count());
            for (value, code) in codes(&format) {
                assert_eq!(format.read(&code), Ok(value), "{code:?} of {format:?}");
            }
            for text in
                texts(&format.symbols, pattern.len()).iter().filter(|text| !written.contains(*text))
            {
                assert_eq!(format.read(text), Err(ReadError::Check), "{text:?} of {format:?}");
            }
        }
    }
    for alphabet in
        ["01", "aA", "- ", "#?", r#"\""#, "012", "aAbB", "digits", "crockford32", "noid29", BASE64]
    {
        for pattern in ["#", "##", "#-#", r"a# \?#A", r"\#\\#-# "] {
            let format = format(pattern, alphabet, "none");
            for (value, code) in codes(&format) {
                assert_eq!(format.read(&code), Ok(value), "{code:?} of {format:?}");
            }
        }
    }
}

#[test]
fn each_single_wrong_symbol_is_caught() {
    for (check, alphabet) in CHECKED {
        for pattern in ["##?", "?##", "-#?-#"] {
            let format = format(pattern, alphabet, check);
            for (_, code) in codes(&format) {
                for place in 0..code.len() {
                    for &symbol in &format.symbols {
                        let mut wrong = code.clone().into_bytes();
                        let given = std::mem::replace(&mut wrong[place], symbol);
                        if given != symbol && given != b'-' {
                            let wrong = String::from_utf8(wrong).unwrap();
                            assert_eq!(
                                format.read(&wrong),
                                Err(ReadError::Check),
                                "{wrong:?} for {code:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Also in the longest codes that NOID accepts, where the weight of a place is almost the size of the alphabet.
#[test]
fn damm_verhoeff_and_noid_catch_each_swap_of_neighbours() {
    let promised = [
        ("###?", "digits", "damm"),
        ("###?", "digits", "verhoeff"),
        ("####?", "digits", "verhoeff"),
        ("##?", "noid29", "noid"),
        ("###?", "0123456789X", "noid"),
        ("#?", "012", "noid"),
        ("###?", "01234", "noid"),
        ("#####?", "0123456", "noid"),
    ];
    for (pattern, alphabet, check) in promised {
        let format = format(pattern, alphabet, check);
        for (_, code) in codes(&format) {
            for place in 0..code.len() - 1 {
                let wrong = swapped(&code, place);
                if wrong != code {
                    assert_eq!(
                        format.read(&wrong),
                        Err(ReadError::Check),
                        "{wrong:?} for {code:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn luhn_misses_only_swaps_of_the_first_symbol_with_the_last() {
    for (_, alphabet) in CHECKED.iter().filter(|(check, _)| *check == "luhn") {
        let format = format("##?", alphabet, "luhn");
        let ends = [format.symbols[0], format.symbols[format.symbols.len() - 1]];
        for (_, code) in codes(&format) {
            for place in 0..code.len() - 1 {
                let wrong = swapped(&code, place);
                let pair = [code.as_bytes()[place], code.as_bytes()[place + 1]];
                let missed =
                    pair[0] == pair[1] || ends.contains(&pair[0]) && ends.contains(&pair[1]);
                assert_eq!(format.read(&wrong).is_ok(), missed, "{wrong:?} for {code:?}");
            }
        }
    }
}

/// After each beginning of a code, the swaps of exactly one pair are missed. Its symbols are neighbours in the
/// alphabet, in which the last symbol precedes the first one.
#[test]
fn iso7064_misses_one_pair_of_neighbours_in_the_alphabet() {
    for (_, alphabet) in CHECKED.iter().filter(|(check, _)| *check == "iso7064") {
        let format = format("###?", alphabet, "iso7064");
        let size = format.symbols.len();
        let digit = |byte: u8| usize::from(format.digit(char::from(byte)).unwrap());
        let pair = |bytes: &[u8]| BTreeSet::from([digit(bytes[0]), digit(bytes[1])]);
        // Returns the pairs that are missed after these symbols. The symbols after the pair do not matter.
        let missed_after = |prefix: &str| -> BTreeSet<BTreeSet<usize>> {
            let rest = char::from(format.symbols[0]).to_string().repeat(1 - prefix.len());
            texts(&format.symbols, 2)
                .into_iter()
                .filter(|text| text.as_bytes()[0] != text.as_bytes()[1])
                .filter(|text| {
                    let symbols = format!("{prefix}{text}{rest}");
                    let digits = symbols.bytes().fold(0, |value, byte| value * size + digit(byte));
                    let code = write(&format, digits as u64);
                    format.read(&swapped(&code, prefix.len())).is_ok()
                })
                .map(|text| pair(text.as_bytes()))
                .collect()
        };
        assert_eq!(
            missed_after(""),
            BTreeSet::from([BTreeSet::from([size / 2, (size / 2 + 1) % size])])
        );
        for prefix in texts(&format.symbols, 1) {
            let missed: Vec<_> = missed_after(&prefix).into_iter().collect();
            assert_eq!(missed.len(), 1, "after {prefix:?}: {missed:?}");
            let (low, high) = (*missed[0].first().unwrap(), *missed[0].last().unwrap());
            assert!(high - low == 1 || high - low == size - 1, "after {prefix:?}: {missed:?}");
        }
    }
    // The last symbol and the check character: two codes of all that begin with one or two symbols.
    for (pattern, expected) in [("#?", 0), ("##?", 2), ("###?", 20)] {
        let format = format(pattern, "digits", "iso7064");
        let missed = codes(&format).filter(|(_, code)| {
            let wrong = swapped(code, code.len() - 2);
            wrong != *code && format.read(&wrong).is_ok()
        });
        assert_eq!(missed.count(), expected, "{pattern}");
    }
}

#[test]
fn published_examples() {
    let check = |name, symbols: &str, expected: &str| {
        for text in expected.split(' ') {
            let digits: Vec<u8> =
                text.bytes().map(|byte| symbols.find(char::from(byte)).unwrap() as u8).collect();
            let (last, digits) = digits.split_last().unwrap();
            let check = Check::parse(name).unwrap().unwrap();
            assert_eq!(check.digit(digits, symbols.len()), *last, "{name} {text}");
        }
    };
    let digits = "0123456789";
    // Wikipedia, "Luhn algorithm"; test card numbers of Visa, Mastercard and American Express.
    check(
        "luhn",
        digits,
        "17893729974 79927398713 4111111111111111 5555555555554444 378282246310005",
    );
    // Wikipedia, "Luhn mod N algorithm"; Wikipedia, "Mobile equipment identifier".
    check("luhn", "abcdef", "abcdefe");
    check("luhn", "0123456789ABCDEF", "AF0123450ABCDEC");
    // ISO/IEC 7064:2003, MOD 11,10.
    check("iso7064", digits, "07945");
    // The Global Release Identifier Standard (GRid) of the IFPI, MOD 37,36.
    check("iso7064", ALPHANUMERIC, "A12425GABC1234002M");
    // Wikipedia and Rosetta Code, "Damm algorithm"; the tests of Algorithm::Damm (CPAN) and of CheckDigits.Net.
    check("damm", digits, "5724 112946 57240 5762 57620");
    check("damm", digits, "123456789018 1234567890123450 112233445566778899006");
    // Wikipedia and Rosetta Code, "Verhoeff algorithm".
    check("verhoeff", digits, "2363 123451 1234567890120 84736430954837284567892");
    // The manual of NOID; n2t.net; demonstration ARKs of EZID. A '/' has a place and counts as 0.
    let noid = "0123456789bcdfghjkmnpqrstvwxz";
    check("noid", noid, "130300xf93gt2q 130300tf5p30086k 999990fk4ck01k77 999990fk44479c3d");
}

/// Compares a check with another implementation: all codes of up to three digits, and random longer ones.
fn compare(check: Check, size: usize, oracle: impl Fn(&[u8]) -> u8) {
    let mut digits = vec![0_u8];
    while digits.len() <= 3 {
        assert_eq!(check.digit(&digits, size), oracle(&digits), "{check:?} of {digits:?}");
        match digits.iter().rposition(|&digit| usize::from(digit) < size - 1) {
            Some(place) => {
                digits[place] += 1;
                digits[place + 1..].fill(0);
            }
            None => digits = vec![0; digits.len() + 1],
        }
    }
    proptest!(|(digits in prop::collection::vec(0..size as u8, 1..=SYMBOLS_MAX))| {
        prop_assert_eq!(check.digit(&digits, size), oracle(&digits));
    });
}

fn decimal(digits: &[u8]) -> Vec<u8> {
    digits.iter().map(|digit| b'0' + digit).collect()
}

#[test]
fn luhn_is_that_of_other_implementations() {
    compare(Check::Luhn, 10, |digits| luhn3::decimal::checksum(&decimal(digits)).unwrap() - b'0');
    // By the definition: the sum of the digits of the doubled digit, in the base of the alphabet.
    for size in (2..=64).step_by(2) {
        compare(Check::Luhn, size, |digits| {
            let doubled = |(place, &digit): (usize, &u8)| usize::from(digit) * (2 - place % 2);
            let sum: usize = digits
                .iter()
                .rev()
                .enumerate()
                .map(doubled)
                .map(|sum| sum / size + sum % size)
                .sum();
            (0..size).find(|check| (sum + check).is_multiple_of(size)).unwrap() as u8
        });
    }
}

#[test]
fn iso7064_is_that_of_another_implementation() {
    fn compare_size<const SIZE: u32>() {
        compare(Check::Iso7064, SIZE as usize, |digits| {
            let mut accumulator = Hybrid::<SIZE>::default();
            digits.iter().for_each(|&digit| {
                accumulator.accumulate(u32::from(digit));
            });
            let [check] = accumulator.compute();
            check as u8
        });
    }
    compare_size::<2>();
    compare_size::<4>();
    compare_size::<10>();
    compare_size::<16>();
    compare_size::<26>();
    compare_size::<32>();
    compare_size::<36>();
    compare_size::<62>();
    compare_size::<64>();
}

#[test]
fn verhoeff_is_that_of_another_implementation() {
    compare(Check::Verhoeff, 10, |digits| digits.calculate_verhoeff_check_digit());
}

#[test]
fn noid_is_that_of_another_implementation() {
    for symbols in ["012", "0123456", "0123456789bcdfghjkmnpqrstvwxz", &BASE64[..61]] {
        let alphabet = moid::Alphabet::new(symbols.as_bytes()).unwrap();
        compare(Check::Noid, symbols.len(), |digits| {
            let text: String =
                digits.iter().map(|&digit| alphabet.symbol(usize::from(digit))).collect();
            alphabet.ordinal(alphabet.check_char(&text)).unwrap() as u8
        });
    }
}

#[test]
fn the_largest_formats() {
    for (length, alphabet) in [
        (62, "01"),
        (39, "012"),
        (18, "digits"),
        (15, "hex"),
        (12, "crockford32"),
        (12, "noid29"),
        (10, BASE64),
    ] {
        let format = format(&"#".repeat(length), alphabet, "none");
        let (size, last) = (format.symbols.len() as u64, format.count() - 1);
        assert_eq!(format.count(), size.pow(length as u32));
        assert!(
            size.pow(length as u32).saturating_mul(size) > i64::MAX.unsigned_abs(),
            "one symbol more is too many"
        );
        let symbol = char::from(format.symbols[format.symbols.len() - 1]).to_string();
        assert_eq!(write(&format, last), symbol.repeat(length));
        for value in [0, 1, last / 2, last - 1, last] {
            assert_eq!(
                format.read(&write(&format, value)),
                Ok(Value(value as i64)),
                "{value} of {alphabet}"
            );
        }
    }
}

/// A literal character of a pattern, escaped where it has to be.
fn literal() -> impl Strategy<Value = String> {
    (b' '..=b'~').prop_map(|byte| match byte {
        b'#' | b'?' | b'\\' => format!("\\{}", char::from(byte)),
        _ => char::from(byte).to_string(),
    })
}

/// A format of a few to 2^63-1 codes, with a value of it.
fn any_format() -> impl Strategy<Value = (CodeFormat, u64)> {
    let own = subsequence((b' '..=b'~').collect::<Vec<_>>(), 2..=ALPHABET_MAX).prop_shuffle();
    let own = own.prop_map(|symbols| String::from_utf8(symbols).unwrap());
    let named = select(vec!["digits", "crockford32", "noid29", "hex"]).prop_map(str::to_owned);
    let check = select(vec!["none", "luhn", "iso7064", "damm", "verhoeff", "noid"]);
    let place = prop_oneof![3 => Just("#".to_owned()), 1 => literal()];
    let places = prop::collection::vec(place, 0..=LENGTH_MAX / 2 - 2);
    (places, prop_oneof![own, named], check, any::<prop::sample::Index>(), any::<u64>())
        .prop_filter_map(
            "the parts do not fit each other",
            |(mut places, alphabet, check, index, value)| {
                places.push("#".to_owned());
                if check != "none" {
                    places.insert(index.index(places.len()), "?".to_owned());
                }
                let format = CodeFormat::new(&places.concat(), &alphabet, check).ok()?;
                let value = value % format.count();
                Some((format, value))
            },
        )
}

proptest! {
    #[test]
    fn reading_is_the_inverse_of_writing((format, value) in any_format()) {
        let code = write(&format, value);
        prop_assert_eq!(format.read(&code), Ok(Value(value as i64)), "{:?} of {:?}", code, format);
        prop_assert_eq!(code.len(), format.places.len());
        // By the definition: the symbols are the digits of the value.
        let symbols = code.bytes().zip(&format.places).filter(|(_, place)| matches!(place, Place::Symbol));
        let digits = symbols.map(|(byte, _)| format.symbols.iter().position(|&symbol| symbol == byte).unwrap());
        let sum = digits.fold(0, |sum, digit| sum * format.symbols.len() as u64 + digit as u64);
        prop_assert_eq!(sum, value);
    }

    /// Whatever people do to a code that leaves no doubt, it is read as the same value.
    #[test]
    fn case_and_separators_do_not_matter((format, value) in any_format(), flips: u64, separators: u64) {
        let code = write(&format, value);
        let mut text = String::new();
        for (place, character) in code.chars().enumerate() {
            let other_case = if character.is_ascii_lowercase() {
                character.to_ascii_uppercase()
            } else {
                character.to_ascii_lowercase()
            };
            let is_symbol = |character: char| format.symbols.contains(&(character as u8));
            let flipped = flips >> place & 1 == 1 && !is_symbol(other_case);
            let separator = [' ', '-'][place % 2];
            if separators >> place & 1 == 1 && !is_symbol(separator) {
                text.push(separator);
            }
            if is_symbol(character) || !matches!(character, ' ' | '-') {
                text.push(if flipped { other_case } else { character });
            }
        }
        prop_assert_eq!(format.read(&text), Ok(Value(value as i64)), "{:?} for {:?} of {:?}", text, code, format);
    }

    #[test]
    fn a_wrong_symbol_is_caught_in_long_codes((format, value) in any_format(), at: prop::sample::Index, other: prop::sample::Index) {
        let mut code = write(&format, value).into_bytes();
        let symbols: Vec<usize> =
            (0..code.len()).filter(|&index| !matches!(format.places[index], Place::Literal(_))).collect();
        let place = symbols[at.index(symbols.len())];
        let given = std::mem::replace(&mut code[place], format.symbols[other.index(format.symbols.len())]);
        prop_assume!(given != code[place]);
        let read = format.read(str::from_utf8(&code).unwrap());
        match format.check {
            Some(_) => prop_assert_eq!(read, Err(ReadError::Check)),
            None => prop_assert!(read.is_ok_and(|read| read.0 as u64 != value)),
        }
    }

    /// The error says nothing about the check character that would be right.
    #[test]
    fn a_wrong_check_character_is_all_that_is_said((format, value) in any_format(), other: prop::sample::Index) {
        prop_assume!(format.check.is_some());
        let mut code = write(&format, value).into_bytes();
        let place = format.places.iter().position(|place| matches!(place, Place::Check)).unwrap();
        let given = std::mem::replace(&mut code[place], format.symbols[other.index(format.symbols.len())]);
        prop_assume!(given != code[place]);
        let error = format.read(str::from_utf8(&code).unwrap()).unwrap_err();
        let mut said = String::new();
        write!(said, "{error} {error:?}").unwrap();
        prop_assert_eq!(said, "the check character does not match; at least one character of the code is wrong Check");
    }

    #[test]
    fn no_text_panics(text in "\\PC*", pattern in "\\PC*", alphabet in "\\PC*", (format, value) in any_format(), at: prop::sample::Index) {
        let _ = CodeFormat::new(&pattern, &alphabet, "none");
        let _ = CodeFormat::new(&pattern, "digits", &alphabet);
        let _ = format.read(&text);
        // Texts that are almost codes.
        let mut code = write(&format, value);
        code.insert_str(at.index(code.len() + 1), text.get(..text.len().min(1)).unwrap_or("ß"));
        let _ = format.read(&code);
        let _ = format.read(&code[..code.floor_char_boundary(at.index(code.len()))]);
    }

    #[test]
    fn no_pattern_of_its_own_characters_panics(pattern in "[#?\\\\ aA0-]{0,70}", alphabet in "[ -~]{0,70}", check in select(vec!["none", "luhn", "iso7064", "damm", "verhoeff", "noid"])) {
        if let Ok(format) = CodeFormat::new(&pattern, &alphabet, check) {
            let last = format.count() - 1;
            prop_assert_eq!(format.read(&write(&format, last)), Ok(Value(last as i64)));
        }
    }
}
