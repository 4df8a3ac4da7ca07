//! Tests of the settings that are accepted and of those that are refused, through [`Config::explain_with`].

use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;

use super::auth::TOKENS_MAX;
use super::*;
use crate::space::Space;

/// Loads with this text as the user's file and these environment variables.
fn load(text: &str, variables: &[(&str, &str)]) -> Result<Config, String> {
    explain(text, variables).map(|(config, _)| config)
}

fn explain(text: &str, variables: &[(&str, &str)]) -> Result<(Config, Vec<Setting>), String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mine.toml");
    std::fs::write(&file, text).unwrap();
    let source = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let location = Location { file: Some(file), dir: None };
    let overrides = Overrides { location, ..Overrides::default() };
    Config::explain_with(&overrides, source).map_err(|error| error.to_string())
}

#[test]
fn the_defaults_hold_ten_million_numbers_on_two_cores() {
    let config = load("", &[]).unwrap();
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:8000");
    assert_eq!(config.server.count_limit.get(), 10_000);
    assert_eq!(config.dir, Path::new("shards"));
    assert_eq!(config.pools[0].lease.rows, 1024);
    let pools: Vec<_> = config
        .pools
        .iter()
        .map(|pool| (pool.name.as_str(), pool.space.clone(), pool.shard_size))
        .collect();
    let int = Space::new("0", "9007199254740991", 0).unwrap();
    let float = Space::new("0", "9999.999999", 6).unwrap();
    assert_eq!(pools, [("float", float, 2_500_000), ("int", int, 2_500_000)]);
    assert!(
        config.pools.iter().all(|pool| usize::from(pool.shards) == (num_cpus::get() / 2).max(2))
    );
}

/// Story: 64 shards in a fleet leased 262,144 rows each, and took a gigabyte.
#[test]
fn all_shards_of_a_fleet_lease_no_more_than_memory_has_room_for() {
    let lease_rows = |shards: u64, more: &str| {
        let text = format!(
            "[fleet]\nstore = 'file:///w/w.db'\nspace = 'x'\n{more}\n\
             [pools.int]\nshards = {shards}\n[pools.float]\nshards = {shards}\n"
        );
        load(&text, &[]).unwrap().pools[0].lease.rows
    };
    for (shards, rows) in [(2, 1 << 18), (8, 1 << 18), (32, 1 << 16), (1_024, 1 << 11)] {
        assert_eq!(lease_rows(shards, ""), rows, "2 x {shards} shards");
    }
    assert_eq!(lease_rows(32, "lease_rows = 500_000"), 500_000);
}

#[test]
fn refusals_name_the_key_the_value_and_what_is_allowed() {
    let check = |text: &str, expected: [&str; 3]| {
        let error = load(text, &[]).expect_err(text);
        for part in expected {
            assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
        }
    };
    check("[server]\nlistne = 'x'", ["server.listne", "x", "listen"]);
    check("[sever]\nlisten = 'x'", ["sever", "x", "server"]);
    check("[server]\nlisten = 'x'", ["server.listen", "x", "socket address"]);
    check("[server]\nmode = 'jsn'", ["server.mode", "jsn", "simple"]);
    check("[server]\nhosts = ['a', 'b:1']", ["server.hosts[1]", "b:1", "without a port"]);
    // As a text, it would be 2.1.
    let fleet = "[fleet]\nstore = 'file:///w/witness.db'\nspace = 2.10";
    check(fleet, ["fleet.space", "of the type float instead of a text", "in quotes"]);
    check("[storage]\ndir = 7", ["storage.dir", "7", "text in quotes"]);
    check("[server]\ncount_limit = 0", ["server.count_limit", "0", "1 to 1000000"]);
    check("[server]\nconnections = 0", ["server.connections", "0", "1 to 1048576"]);
    check("[server]\nclient_timeout_ms = 0", ["server.client_timeout_ms", "0", "1 to 3600000"]);
    check("[server.tls]\ncert = 'c.pem'", ["server.tls.cert", "c.pem", "server.tls.key"]);
    check("[server.tls]\nkey = 'k.pem'", ["server.tls.key", "k.pem", "server.tls.cert"]);
    check("[server.tls]\ncrt = 'c.pem'", ["server.tls.crt", "c.pem", "cert"]);
    check("[lease]\nrows = -1", ["lease.rows", "-1", "0 to 1000000"]);
    check("[lease]\nrows = 'many'", ["lease.rows", "many", "integer"]);
    check("[refill]\nlow_water = 1.5", ["refill.low_water", "1.5", "up to 1"]);
    check("[refill]\nretry_ms = 60000", ["refill.retry_ms", "60000", "retry_limit_ms"]);
    check("[pools.int]\nmin = 6\nmax = 5", ["pools.int.min = 6", "above max 5", "min up to max"]);
    check("[pools.int]\nshards = 0", ["pools.int.shards", "0", "1 to 1024"]);
    check("[pools.int]\nshards = 'some'", ["pools.int.shards", "some", "1 to 1024"]);
    check("[pools.int]\nmax = 1000", ["pools.int.shard_size", "2500000", "1 to 1001"]);
    check("[pools.int]\nmax = 9007199254740992", ["pools.int.max", "9007199254740992", "2^53-1"]);
    check("[pools.float]\nmax = 1234567890.0", ["pools.float.max", "1234567890", "15 significant"]);
    check("[pools.float]\nmax = 0.1234567", ["pools.float.max", "0.1234567", "6 digits"]);
    check("[pools.float]\ndecimals = 15", ["pools.float.decimals", "15", "14"]);
    check("[pools.'../x']\nmin = 1\nmax = 2", ["pools.../x", "file name", "a-z"]);
    check("[pools.Ticket]\nmin = 1\nmax = 2", ["pools.Ticket", "file name", "a-z"]);
    check("[pools.a_shard_b]\nmin = 1\nmax = 2", ["pools.a_shard_b", "another pool", "_shard_"]);
    check("[pools.used_numbers]\nmin = 1\nmax = 2", ["pools.used_numbers", "shard_0", "not used"]);
    check("[pools.ticket]\nmin = 1", ["pools.ticket", "max", "missing"]);
    check(
        "[pools.int]\nenabled = false\n[pools.float]\nenabled = false",
        ["pools", "no pool", "float, int"],
    );
}

#[test]
fn a_pool_of_ones_own_needs_only_its_range() {
    let config = load("[pools.ticket]\nmin = 1\nmax = 1000\nshards = 3", &[]).unwrap();
    let ticket = config.pools.iter().find(|pool| pool.name.as_str() == "ticket").unwrap();
    assert_eq!((ticket.shards, ticket.shard_size, ticket.space.decimals()), (3, 334, 0));
}

/// Story: the mode's port was set after the user's file, and overrode it.
#[test]
fn a_mode_listens_on_its_own_port_unless_the_user_says_otherwise() {
    let listens = |text: &str, variables: &[(&str, &str)], expected: &str| {
        let config = load(text, variables).unwrap();
        assert_eq!(config.server.listen.to_string(), expected, "{text} {variables:?}");
    };
    listens("", &[], "127.0.0.1:8000");
    listens("[server]\nmode = 'simple'", &[], "127.0.0.1:5000");
    listens("[server]\nmode = 'json'", &[], "127.0.0.1:8000");
    listens("", &[("TOMBOLA_SERVER__MODE", "simple")], "127.0.0.1:5000");
    listens("[server]\nmode = 'simple'\nlisten = '[::1]:1'", &[], "[::1]:1");
    let address = ("TOMBOLA_SERVER__LISTEN", "127.0.0.1:2");
    listens("[server]\nmode = 'simple'", &[address], "127.0.0.1:2");

    let flag = Overrides { mode: Some(Mode::Simple), ..Overrides::default() };
    let (config, _) = Config::explain_with(&flag, BTreeMap::new()).unwrap();
    assert_eq!(config.server.mode, Mode::Simple);
    assert_eq!(config.server.listen.port(), 5000);
}

const ENTRY: &str = "[[auth.tokens]]\nname = 'shop'\nscope = 'draw'\nsha256 = ";

#[test]
fn an_entry_says_whose_token_it_is_and_what_for() {
    let digits = "0123456789abcdef".repeat(4);
    let auth = load(&format!("{ENTRY}'{digits}'"), &[]).unwrap().auth;
    let AuthConfig::Tokens(tokens) = auth else { panic!("{auth:?}") };
    assert_eq!((tokens[0].name.to_string().as_str(), tokens[0].scope), ("shop", Scope::Draw));
    assert_eq!(hex::encode(tokens[0].sha256), digits);
    assert!(matches!(load("", &[]).unwrap().auth, AuthConfig::Unsaid));
    assert!(matches!(load("auth.mode = 'none'", &[]).unwrap().auth, AuthConfig::Anyone));
    let variable = ("TOMBOLA_AUTH__MODE", "none");
    assert!(matches!(load("", &[variable]).unwrap().auth, AuthConfig::Anyone));
}

#[test]
fn entries_that_can_t_be_used_are_refused() {
    let digits = "0123456789abcdef".repeat(4);
    let entry = format!("{ENTRY}'{digits}'\n");
    let check = |text: &str, parts: &[&str]| {
        let error = load(text, &[]).expect_err(text);
        for part in parts {
            assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
        }
        assert!(!error.contains(&digits[1..]), "{error}");
    };
    check("auth.mode = 'all'", &["auth.mode = all", "mine.toml", "\"none\""]);
    check(&format!("auth.mode = 'none'\n{entry}"), &["auth.mode", "tokens too"]);
    check(&format!("{entry}{entry}"), &["auth.tokens[1].name", "mine.toml", "shop"]);
    let second = entry.replace("shop", "web");
    check(&format!("{entry}{second}"), &["auth.tokens[1].sha256", "the token shop again"]);
    check(&entry.replace("shop", "the shop"), &["auth.tokens[0].name", "a-z"]);
    check(&entry.replace("draw", "all"), &["auth.tokens[0].scope", "\"draw\"", "\"observe\""]);
    check(&entry.replace("01", ""), &["auth.tokens[0].sha256", "64 hexadecimal"]);
    check(&entry.replace("01", "xy"), &["auth.tokens[0].sha256", "64 hexadecimal"]);
    check(&format!("{entry}{}", "colour = 'red'"), &["auth.tokens[0]", "name, scope"]);
    check("[[auth.tokens]]\nname = 'a'", &["auth.tokens[0]", "name, scope", "sha256"]);
    let many: String = (0..=TOKENS_MAX).map(|n| entry.replace("shop", &n.to_string())).collect();
    check(&many, &["auth.tokens", "256"]);
    let variable = ("TOMBOLA_AUTH__TOKENS", "tombola_secret");
    let error = load("", &[variable]).unwrap_err();
    assert!(error.contains("auth.tokens") && !error.contains("secret"), "{error}");
    for (text, variables) in [
        ("", &[("TOMBOLA_FLEET__STORE", "postgres://user:secret@host/db")][..]),
        ("", &[("TOMBOLA_FLEET__STORE", "postgres://host/db?password=secret")]),
        ("", &[("TOMBOLA_FLEET__PASSWORD", "secret")]),
        ("[fleet]\npassword = 'secret'", &[]),
        ("[fleet]\nstore = 'postgres://user:secret@host/db", &[]),
    ] {
        let error = load(text, variables).unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
    assert!(load("a = 1\nb = 'x", &[]).unwrap_err().contains("mine.toml: line 2: "));
}

#[test]
fn codes_have_a_pattern_in_place_of_a_range() {
    let refused = |keys: &str, words: &[&str]| {
        let error = load(&format!("[pools.code]\n{keys}"), &[]).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{keys}: {word} is not in {error}");
        }
    };
    refused("pattern = '##'\nmin = 1", &["pools.code.min = 1", "pattern"]);
    refused("pattern = '##'\nmax = 1", &["pools.code.max", "pattern"]);
    refused("pattern = '##'\ndecimals = 0", &["pools.code.decimals", "pattern"]);
    refused("min = 1\nmax = 2\ncheck = 'luhn'", &["pools.code.check", "pattern"]);
    refused("min = 1\nmax = 2\nalphabet = 'hex'", &["pools.code.alphabet", "pattern"]);
    refused("min = 1", &["pools.code.max", "missing", "pattern"]);
    refused("pattern = 'AB'", &["pools.code.pattern = AB", "'#'"]);
    refused("pattern = '#?'", &["pools.code.pattern", "check"]);
    refused("pattern = '#'\ncheck = 'luhn'", &["pools.code.check = luhn", "'?'"]);
    refused("pattern = '#'\nalphabet = 'AA'", &["pools.code.alphabet = AA", "'A'"]);
    refused("pattern = '#?'\nalphabet = 'abc'\ncheck = 'luhn'", &["pools.code.check", "even"]);
    refused(&format!("pattern = '{}'", "#".repeat(19)), &["pools.code.pattern", "2^63-1"]);
    let config = load("[pools.code]\npattern = 'A-##'", &[]).unwrap();
    let pool = config.pools.iter().find(|pool| pool.name.as_str() == "code").unwrap();
    assert_eq!((pool.space.size(), pool.space.number(pool.space.min()).as_str()), (100, "A-00"));
}

#[test]
fn a_quota_is_off_until_it_has_a_rate() {
    let quota = |text: &str| load(&format!("[quota]\n{text}"), &[]).map(|c| c.quota.unwrap());
    assert!(load("", &[]).unwrap().quota.is_none());
    for (text, period, burst) in [
        ("numbers_per_second = 100", Duration::from_millis(10), 100),
        ("numbers_per_second = 2.5", Duration::from_millis(400), 3),
        ("numbers_per_second = 0.001\nburst = 7", Duration::from_secs(1_000), 7),
        ("numbers_per_second = 1_000_000", Duration::from_micros(1), 1_000_000),
    ] {
        let quota = quota(text).unwrap();
        assert_eq!((quota.period, quota.burst.get()), (period, burst), "{text}");
    }
    let proxies = "numbers_per_second = 1\ntrusted_proxies = ['10.0.0.1', '2001:db8::/32']";
    let proxies = quota(proxies).unwrap().trusted_proxies;
    let expected: [IpNet; 2] = ["10.0.0.1/32", "2001:db8::/32"].map(|n| n.parse().unwrap());
    assert_eq!(proxies, expected);

    for (text, parts) in [
        ("burst = 5", ["quota", "numbers_per_second"]),
        ("numbers_per_second = 0", ["quota.numbers_per_second = 0", "0.001 to 1000000"]),
        ("numbers_per_second = -1", ["quota.numbers_per_second = -1", "0.001"]),
        ("numbers_per_second = nan", ["quota.numbers_per_second", "0.001"]),
        ("numbers_per_second = 'fast'", ["quota.numbers_per_second = fast", "allowed: a number"]),
        ("numbers_per_second = 1\nburst = 0", ["quota.burst = 0", "1 to 1000000"]),
        ("numbers_per_second = 1\nbrust = 5", ["quota.brust", "burst"]),
        (
            "numbers_per_second = 1\ntrusted_proxies = ['10.0.0.1', 'proxy']",
            ["quota.trusted_proxies[1] (in ", "\"proxy\" is not an address"],
        ),
    ] {
        let error = quota(text).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{text}\ngave {error:?}\nwithout {part:?}");
        }
    }
}

#[test]
fn variables_override_the_file_and_keep_every_digit() {
    let file = "[pools.float]\nmax = 1.5\nshard_size = 10";
    let config = load(file, &[("TOMBOLA_POOLS__FLOAT__MAX", "99999.999999")]).unwrap();
    let float = &config.pools[0];
    assert_eq!(float.space.number(float.space.max()).as_str(), "99999.999999");
    let error = load("", &[("TOMBOLA_SERVER__PORT", "1")]).unwrap_err();
    assert!(error.contains("server.port") && error.contains("environment"), "{error}");
}

/// Story: `2.10` became `2.1`, another space, and `007` became `7`, an empty folder.
#[test]
fn a_text_of_a_variable_stays_as_it_is() {
    let fleet = "[fleet]\nstore = 'file:///w/witness.db'\nspace = 'file'";
    for text in ["2.10", "1e5", "007", "7", "true", "inf", "0x10", "1_000", "-1.50"] {
        let variables = [("TOMBOLA_FLEET__SPACE", text), ("TOMBOLA_STORAGE__DIR", text)];
        let allowed = SpaceName::new(text).is_some();
        let variables = if allowed { &variables[..] } else { &variables[1..] };
        let config = load(fleet, variables).unwrap();
        assert_eq!(config.dir, Path::new(text));
        let expected = if allowed { text } else { "file" };
        assert_eq!(config.fleet.unwrap().space.as_str(), expected);
    }
}

/// The printed settings have the types of their keys, whichever layer sets them.
#[test]
fn settings_are_explained_with_their_types_and_origins() {
    let file =
        "server.hosts = [\n'a']\n[quota]\nnumbers_per_second = 2.5\n[pools.int]\nenabled = false";
    let variables = [("TOMBOLA_POOLS__INT__MAX", "9999999"), ("TOMBOLA_QUOTA__BURST", "7")];
    let (_, settings) = explain(file, &variables).unwrap();
    let check = |table: &str, key: &str, value: toml::Value, origin: &str| {
        let found = settings.iter().find(|s| s.table == table && s.key == key).unwrap();
        assert_eq!(found.value, value, "{table}.{key}");
        let shown = found.origin.to_string();
        assert!(shown.ends_with(origin), "{table}.{key}: {shown}");
    };
    check("pools.int", "max", 9_999_999.into(), "environment TOMBOLA_POOLS__INT__MAX");
    check("quota", "burst", 7.into(), "environment TOMBOLA_QUOTA__BURST");
    check("quota", "numbers_per_second", 2.5.into(), "mine.toml, line 4");
    check("pools.int", "enabled", false.into(), "mine.toml, line 6");
    check("pools.float", "min", 0.0.into(), "default");
    check("server", "listen", "127.0.0.1:8000".into(), "default");
    let error = load("server.hosts = [\n'a',\n'b:1']", &[]).unwrap_err();
    assert!(error.contains("mine.toml, line 3"), "{error}");
    let error = load("", &[("TOMBOLA_FLEET__SPACE", "x")]).unwrap_err();
    assert!(error.starts_with("fleet (in environment TOMBOLA_FLEET__SPACE): "), "{error}");
}

#[test]
fn numbers_and_booleans_of_variables_are_read() {
    let fleet = "[fleet]\nstore = 'file:///w/witness.db'\nspace = 'file'";
    let config = load(
        fleet,
        &[
            ("TOMBOLA_FLEET__REFUSE_IF_STALE", "true"),
            ("TOMBOLA_FLEET__CLAIM", "7"),
            ("TOMBOLA_SERVER__COUNT_LIMIT", "500"),
            ("TOMBOLA_REFILL__LOW_WATER", "0.25"),
            ("TOMBOLA_POOLS__INT__ENABLED", "false"),
            ("TOMBOLA_POOLS__FLOAT__MIN", "-0.5"),
            ("TOMBOLA_POOLS__FLOAT__SHARDS", "3"),
            ("TOMBOLA_QUOTA__NUMBERS_PER_SECOND", "2.5"),
        ],
    );
    let config = config.unwrap();
    let fleet = config.fleet.unwrap();
    assert_eq!((fleet.refuse_if_stale, fleet.claim), (true, 7));
    assert_eq!((config.server.count_limit.get(), config.pools[0].refill.low_water), (500, 0.25));
    assert_eq!(config.quota.unwrap().burst.get(), 3);
    assert_eq!((config.pools.len(), config.pools[0].shards), (1, 3));
    assert_eq!(config.pools[0].space.to_string(), "-0.500000 to 9999.999999");
    let error = load("", &[("TOMBOLA_LEASE__ROWS", "many")]).unwrap_err();
    assert!(error.contains("lease.rows") && error.contains("TOMBOLA_LEASE__ROWS"), "{error}");
}
