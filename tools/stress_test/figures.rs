//! How counts and times are written for people. Knows nothing of what they measure.

use std::time::Duration;

/// `1600` as `1,600`.
pub(crate) fn thousands(count: u64) -> String {
    let digits = count.to_string();
    let mut written = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.char_indices() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            written.push(',');
        }
        written.push(digit);
    }
    written
}

/// Three digits and the unit that suits them: `412 µs`, `1.07 ms`, `10 s`.
pub(crate) fn time(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    let (amount, unit) = if seconds < 1e-3 {
        (seconds * 1e6, "µs")
    } else if seconds < 1.0 {
        (seconds * 1e3, "ms")
    } else {
        (seconds, "s")
    };
    let decimals = match amount {
        _ if amount < 9.995 => 2,
        _ if amount < 99.95 => 1,
        _ => 0,
    };
    let written = format!("{amount:.decimals$}");
    let short = match written.contains('.') {
        true => written.trim_end_matches('0').trim_end_matches('.'),
        false => &written,
    };
    format!("{short} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_grouped_by_thousands() {
        for (count, written) in [(0, "0"), (999, "999"), (1_000, "1,000"), (1_234_567, "1,234,567")]
        {
            assert_eq!(thousands(count), written);
        }
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        for (nanos, written) in [
            (0, "0 µs"),
            (1_500, "1.5 µs"),
            (412_300, "412 µs"),
            (1_070_000, "1.07 ms"),
            (99_960_000, "100 ms"),
            (10_000_000_000, "10 s"),
            (100_000_000_000, "100 s"),
        ] {
            assert_eq!(time(Duration::from_nanos(nanos)), written);
        }
    }
}
