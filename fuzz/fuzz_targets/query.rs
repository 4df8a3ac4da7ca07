//! A query string is refused with a reason, or gives an existing pool and a count within the limit.
#![no_main]

use std::num::NonZeroU32;

use libfuzzer_sys::fuzz_target;
use tombola::internals::PoolName;
use tombola::internals::parse_query;

fuzz_target!(|query: &str| {
    let pools = ["float", "int", "ticket"].map(|name| PoolName::new(name).expect("a name"));
    let limit = NonZeroU32::new(10_000).expect("some");
    match parse_query(&pools, limit, query) {
        Ok((pool, count)) => {
            assert!(count.is_none_or(|count| count <= limit));
            let mut plain = form_urlencoded::Serializer::new(String::new());
            plain.append_pair("type", pools[pool].as_str());
            if let Some(count) = count {
                plain.append_pair("count", &count.to_string());
            }
            let again = parse_query(&pools, limit, &plain.finish());
            assert_eq!(again, Ok((pool, count)));
        }
        Err(refusal) => assert!(!refusal.is_empty()),
    }
});
