//! Formats counts and times for people. Knows nothing of what they measure.

use std::time::Duration;

/// Formats `1600` as `1,600`.
pub fn thousands(count: u64) -> String {
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

/// Formats a time with three digits and a suitable unit: `412 µs`, `1.07 ms`, `10 s`.
pub fn time(duration: Duration) -> String {
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

/// Formats a long time in a suitable unit: `12 s`, `5 min`, `3 h`, `4 days`, `38 years`, up to `over a
/// million years`.
pub(crate) fn span(seconds: f64) -> String {
    /// The seconds of each unit, and the amount up to which the unit is used.
    const UNITS: [(f64, f64, &str); 5] = [
        (1.0, 100.0, "s"),
        (60.0, 100.0, "min"),
        (3_600.0, 48.0, "h"),
        (86_400.0, 730.0, "days"),
        (31_556_952.0, 1e6, "years"),
    ];
    for (unit, limit, name) in UNITS {
        let amount = (seconds.max(0.0) / unit).round();
        if amount < limit {
            return format!("{} {name}", thousands(amount as u64));
        }
    }
    "over a million years".to_owned()
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

    #[test]
    fn long_times_are_in_the_unit_that_suits_them() {
        for (seconds, written) in [
            (-1.0, "0 s"),
            (0.4, "0 s"),
            (99.4, "99 s"),
            (99.6, "2 min"),
            (5_999.0, "2 h"),
            (86_400.0, "24 h"),
            (4.0 * 86_400.0, "4 days"),
            (1.2e9, "38 years"),
            (1e18, "over a million years"),
            (f64::INFINITY, "over a million years"),
        ] {
            assert_eq!(span(seconds), written, "{seconds}");
        }
    }
}
