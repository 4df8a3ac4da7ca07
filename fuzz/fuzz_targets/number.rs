//! A range, and a number in it, as text: a number that is accepted keeps its canonical text, whatever it was
//! parsed from.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tombola::internals::{DECIMALS_MAX, INTEGER_MAX, Space};

fuzz_target!(|input: (u8, &str, &str, &str)| {
    let (decimals, min, max, text) = input;
    let Ok(space) = Space::new(min, max, decimals) else {
        return;
    };
    assert!(space.decimals() <= DECIMALS_MAX && space.size() < 1 << 54);
    for end in [space.min(), space.max()] {
        assert!(space.contains(end));
        let number = space.number(end);
        assert_eq!(space.parse(number.as_str()), Ok(end), "{number}");
    }
    let Ok(value) = space.parse(text) else {
        return;
    };
    let number = space.number(value);
    assert_eq!(space.parse(number.as_str()), Ok(value), "{text} became {number}");
    assert!(decimals > 0 || value.0.abs() <= INTEGER_MAX, "{number}");
    // A reader that keeps numbers as doubles can still tell the number from its neighbours.
    let double: f64 = number.as_str().parse().expect("a number's text is a number");
    assert_eq!(format!("{double:.*}", usize::from(decimals)), number.as_str());
});
