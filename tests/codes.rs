//! Pools of codes, through the front door (`docs/codes.md`). The checks are compared with implementations that
//! share no code with the server's.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::collections::BTreeSet;

use reqwest::Method;
use serde_json::Value;
use support::{Answer, Config, Failure, Server, Site, column, run};
use verhoeff::Verhoeff;

/// The check digits of Damm's thesis (2004): row by row, the quasigroup of order 10.
const DAMM: [&str; 10] = [
    "0317598642",
    "7092154863",
    "4206871359",
    "1750983426",
    "6123045978",
    "3674209581",
    "5869720134",
    "8945362017",
    "9438617205",
    "2581436790",
];

/// A check, an alphabet, and whether a code is valid according to another implementation.
type Oracle = (&'static str, &'static str, fn(&str) -> bool);

const ORACLES: [Oracle; 5] = [
    ("luhn", "digits", |code| luhn3::decimal::valid(code.as_bytes())),
    ("iso7064", "digits", |code| iso_7064::MOD11_10.verify(code).unwrap()),
    ("damm", "digits", |code| {
        let step = |state: usize, digit: u8| {
            usize::from(DAMM[state].as_bytes()[usize::from(digit - b'0')] - b'0')
        };
        code.bytes().fold(0, step) == 0
    }),
    ("verhoeff", "digits", |code| code.validate_verhoeff_check_digit()),
    ("noid", "0123456", |code| {
        let alphabet = moid::Alphabet::new(b"0123456").unwrap();
        code.ends_with(alphabet.check_char(&code[..2]))
    }),
];

/// Returns a config with one pool of codes, which leases nothing ahead of need.
fn config(pattern: &str, alphabet: &str, check: &str) -> Config {
    Config::new()
        .set("lease.rows", 0)
        .set("pools.code.pattern", format!("'{pattern}'"))
        .set("pools.code.alphabet", format!("'{alphabet}'"))
        .set("pools.code.check", format!("'{check}'"))
        .set("pools.code.shards", 2)
        .set("pools.code.shard_size", 20)
}

/// Returns the codes of a response.
fn codes(answer: &Answer) -> Vec<String> {
    assert_eq!(answer.status, 200, "{}", answer.body);
    let body: Value = answer.parse();
    let text = |code: &Value| code.as_str().unwrap().to_owned();
    match body.get("code") {
        Some(code) => vec![text(code)],
        None => body["codes"].as_array().unwrap().iter().map(text).collect(),
    }
}

/// Takes codes until the range is used up, or until there are `limit` of them.
async fn take(server: &Server, codes_so_far: &mut Vec<String>, limit: usize) {
    while codes_so_far.len() < limit {
        let target = if codes_so_far.len().is_multiple_of(2) {
            "/random?type=code"
        } else {
            "/random?type=code&count=1"
        };
        let answer = server.send(Method::POST, target).await;
        match answer.status {
            410 => return,
            503 => tokio::task::yield_now().await,
            _ => codes_so_far.extend(codes(&answer)),
        }
    }
}

/// Returns all codes of two symbols and a check digit that the oracle accepts.
fn expected(symbols: &str, is_valid: fn(&str) -> bool) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for (a, b, check) in symbols
        .chars()
        .flat_map(|a| symbols.chars().map(move |b| (a, b)))
        .flat_map(|(a, b)| symbols.chars().map(move |check| (a, b, check)))
    {
        let code = format!("{a}{b}{check}");
        if is_valid(&code) {
            all.insert(code);
        }
    }
    all
}

/// Story: a shop computed the check digit itself, over the wrong digits, and noticed when the cards were
/// printed. Each code comes once, through a restart and a kill, and all of them are valid.
#[tokio::test(flavor = "multi_thread")]
async fn every_code_of_a_pool_comes_once_and_is_valid() {
    for (check, alphabet, is_valid) in ORACLES {
        let site = Site::new(&config("##?", alphabet, check));
        let symbols = if alphabet == "digits" { "0123456789" } else { alphabet };
        let expected = expected(symbols, is_valid);
        assert_eq!(expected.len(), symbols.len().pow(2), "{check}");
        let mut taken = Vec::new();
        let server = site.start().await;
        take(&server, &mut taken, 20).await;
        server.stop().await;
        let server = site.start().await;
        take(&server, &mut taken, 40).await;
        server.kill().await;
        let server = site.start().await;
        take(&server, &mut taken, usize::MAX).await;
        server.stop().await;
        assert_eq!(taken.len(), expected.len(), "{check}");
        assert_eq!(taken.into_iter().collect::<BTreeSet<_>>(), expected, "{check}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_code_comes_once_from_a_fleet_of_two() {
    let store = tempfile::tempdir().unwrap();
    let address = format!("'file://{}'", store.path().join("witness.db").display());
    let config = config("##?", "digits", "damm").set("fleet.store", address);
    let config = config.set("fleet.space", "'codes'").set("fleet.lease_rows", 0);
    let sites = [Site::new(&config), Site::new(&config)];
    let mut taken = Vec::new();
    for site in &sites {
        let server = site.start().await;
        take(&server, &mut taken, 30).await;
        server.stop().await;
    }
    for site in &sites {
        let server = site.start().await;
        take(&server, &mut taken, usize::MAX).await;
        server.stop().await;
    }
    assert_eq!(taken.len(), 100);
    assert_eq!(taken.into_iter().collect::<BTreeSet<_>>(), expected("0123456789", ORACLES[2].2));

    // The space has the format too.
    let other = Site::new(&config.clone().set("pools.code.check", "'verhoeff'"));
    let refusal = other.refusal().await;
    assert!(refusal.contains("damm") && refusal.contains("verhoeff"), "{refusal}");
}

/// Story: leading zeros were lost, because a code was a number somewhere on the way.
#[tokio::test(flavor = "multi_thread")]
async fn a_code_is_a_text_everywhere() {
    let site = Site::new(&config("No ###", "digits", "none"));
    site.fill().await;
    let server = site.start().await;
    let one = server.get("/random?type=code").await;
    assert!(one.body.starts_with("{\"code\":\"No "), "{}", one.body);
    let many = server.get("/random?type=code&count=3").await;
    assert!(many.body.starts_with("{\"count\":3,\"codes\":[\"No "), "{}", many.body);
    let mut taken = codes(&one);
    taken.extend(codes(&many));
    assert!(taken.iter().all(|code| code.len() == 6), "{taken:?}");
    let status: Value = server.get("/status").await.parse();
    assert_eq!(status["pools"]["code"]["range"]["min"], "No 000");
    let console = run(site.bare(
        env!("CARGO_BIN_EXE_tombola"),
        &["status", "--url", &format!("http://{}", server.address())],
    ))
    .await;
    assert!(console.stdout.contains("No 000 to No 999"), "{}{}", console.stdout, console.stderr);
    server.stop().await;

    let used: Vec<String> = column(&site.file("used_numbers_code.db"), "SELECT number FROM used");
    assert_eq!(used.len(), 40);
    assert!(taken.iter().all(|code| used.contains(code)), "{taken:?}");
    let shards: Vec<String> = (0..2)
        .flat_map(|shard| {
            column(
                &site.file(&format!("code_shard_{shard}.db")),
                "SELECT number FROM pool WHERE used",
            )
        })
        .collect();
    assert_eq!(shards.into_iter().collect::<BTreeSet<_>>(), taken.iter().cloned().collect());

    // The export has the same texts.
    let dir = site.data().display().to_string();
    let export = run(site.console(&["export", "--data-dir", &dir, "--pool", "code"])).await;
    let exported: BTreeSet<&str> = export.stdout.lines().collect();
    assert_eq!(exported, used.iter().map(String::as_str).collect());
    // A build that a kill has left is no batch, and looking changes nothing.
    std::fs::write(site.file("code_shard_0.db.tmp"), "").unwrap();
    let before = site.files("");
    let file = site.folder().join("issued.txt");
    let issued =
        run(site.console(&["export", "--pool", "code", "--issued", file.to_str().unwrap()])).await;
    assert!(issued.status.success(), "{}", issued.stderr);
    assert_eq!(site.files(""), before);
    let issued = std::fs::read_to_string(&file).unwrap();
    assert_eq!(issued.lines().collect::<BTreeSet<_>>(), taken.iter().map(String::as_str).collect());
    for words in
        [&["export", "--pool", "nope"][..], &["export", "--pool", "code", file.to_str().unwrap()]]
    {
        assert!(!run(site.console(words)).await.status.success(), "{words:?}");
    }
    let server = site.start().await;
    assert_eq!(run(site.console(&["export", "--pool", "code"])).await.status.code(), Some(6));
    server.stop().await;
}

/// Codes with a check character are exported with it, although the view can't compute it.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_has_the_check_character() {
    let site = Site::new(&config("##?", "digits", "luhn"));
    site.fill().await;
    let export = run(site.console(&["export", "--pool", "code"])).await;
    assert_eq!(export.stdout.lines().count(), 40);
    assert!(export.stdout.lines().all(ORACLES[0].2), "{}", export.stdout);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_escapes_the_symbols_of_a_code() {
    let site = Site::new(&config("<#\\#", "\"\\", "none").set("pools.code.shard_size", 1));
    let server = site.start().await;
    let mut taken = Vec::new();
    take(&server, &mut taken, usize::MAX).await;
    assert_eq!(
        taken.into_iter().collect::<BTreeSet<_>>(),
        BTreeSet::from(["<\"#".into(), "<\\#".into()])
    );
    server.stop().await;
}

/// Story: a second deployment had another alphabet in its settings, and read the codes of the first as other
/// numbers.
#[tokio::test(flavor = "multi_thread")]
async fn another_format_is_refused_at_the_start() {
    let site = Site::new(&config("A-###", "digits", "none"));
    site.start().await.stop().await;
    for (pattern, alphabet, check) in [
        ("B-###", "digits", "none"),
        ("A-###", "hex", "none"),
        ("A-###?", "digits", "luhn"),
        ("A-####", "digits", "none"),
    ] {
        site.configure(&config(pattern, alphabet, check));
        let refusal = site.refusal().await;
        for text in ["\"A-###\"", pattern, alphabet, check] {
            assert!(refusal.contains(text), "{text} is not in {refusal}");
        }
    }
    site.configure(&config("A-###", "0123456789", "none"));
    site.start().await.stop().await;
    site.configure(&Config::new().pool("code", 0, 999, 2, 20));
    assert!(site.refusal().await.contains("\"A-###\""));
}

/// The description of the server has the form of its codes, and the load tool compares them as texts.
#[tokio::test(flavor = "multi_thread")]
async fn the_description_and_the_load_tool_know_codes() {
    let site = Site::new(&config("A-###?", "digits", "luhn").pool("int", 1, 100, 1, 100));
    site.fill().await;
    let server = site.start().await;
    let description: Value = server.get("/openapi.json").await.parse();
    let ok =
        &description["paths"]["/random"]["post"]["responses"]["200"]["content"]["application/json"];
    let example = ok["examples"]["?type=code"]["value"]["code"].as_str().unwrap();
    assert!(example.starts_with("A-") && example.len() == 6, "{example}");
    assert!(ok["examples"]["?type=code&count=1"]["value"]["codes"].is_array(), "{ok}");
    let schemas: Vec<_> = ok["schema"]["oneOf"].as_array().unwrap().iter().collect();
    assert_eq!(schemas.len(), 4, "{schemas:?}");

    let url = format!("http://{}", server.address());
    let words =
        ["--url", &url, "--type", "code", "--requests", "30", "--concurrency", "2", "--no-log"];
    let load = run(site.bare(env!("CARGO_BIN_EXE_stress-test"), &words)).await;
    assert!(load.status.success(), "{}{}", load.stdout, load.stderr);
    assert!(load.stdout.contains("30 different numbers"), "{}", load.stdout);
    server.stop().await;
}

/// The largest ranges are beyond what a number in JSON can hold.
#[tokio::test(flavor = "multi_thread")]
async fn a_range_may_have_2_to_the_62_codes() {
    let pattern = "#".repeat(62);
    let site = Site::new(&config(&pattern, "01", "none"));
    let server = site.start().await;
    let mut taken = Vec::new();
    take(&server, &mut taken, 50).await;
    assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), 50);
    assert!(taken.iter().any(|code| code.starts_with('1')), "{taken:?}");
    let status: Value = server.get("/status").await.parse();
    assert_eq!(status["pools"]["code"]["range"]["size"], 1_u64 << 62);
    server.get("/metrics").await.assert_status(200);
    server.stop().await;
    let verified = run(site.console(&["verify"])).await;
    assert!(verified.status.success(), "{}", verified.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_codes_are_checked_and_explained() {
    let site = Site::new(&config("SPRING-####-###?", "crockford32", "iso7064"));
    let shown = run(site.console(&["check-config"])).await.stdout;
    for text in [
        "codes such as SPRING-",
        "34,359,738,368 in all",
        "With 1,000 issued, a guess hits one in 34,359,739.",
        "With 1,000,000 issued, a guess hits one in 34,360.",
        "Warning: ",
    ] {
        assert!(shown.contains(text), "{text:?} is not in {shown}");
    }
    site.configure(&config("#", "digits", "none").set("pools.code.shard_size", 2));
    let shown = run(site.console(&["check-config"])).await.stdout;
    assert!(shown.contains("10 in all.\n# Warning: with 10 codes issued"), "{shown}");
    site.configure(&config("SPRING-####-####-####", "crockford32", "none"));
    let shown = run(site.console(&["check-config"])).await.stdout;
    assert!(!shown.contains("Warning"), "{shown}");
    for mode in ["simple", "json", "sqlite"] {
        site.configure(&config("###", "digits", "none").set("server.mode", format!("'{mode}'")));
        assert!(site.refusal().await.contains("pools.code.pattern"), "{mode}");
    }
    site.configure(&config("###", "digits", "none"));
    let server = site.start().await;
    let failure: Failure = server.get("/random?type=nope").await.parse();
    assert_eq!(failure.code, "unknown_type");
    server.stop().await;
}
