//! A range and a number of it, as text: what is accepted keeps its text, whatever it was written as.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tombola::space::{DECIMALS_MAX, INTEGER_MAX, Space};

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
    // Readers that keep numbers as doubles tell it from its neighbours.
    let double: f64 = number.as_str().parse().expect("a number's text is a number");
    assert_eq!(format!("{double:.*}", usize::from(decimals)), number.as_str());
});
