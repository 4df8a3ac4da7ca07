//! How a server treats the folder and the settings it finds: it continues, repairs, or refuses with a reason.
//! A refusal changes nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;

use deadpool_sqlite::rusqlite::Connection;
use nix::sys::signal::Signal;
use support::{
    Config, Finished, Server, Site, assert_each_once, column, eventually, missing, refusal, run,
};

const LEDGER: &str = "used_numbers_int.db";
const SHARD_0: &str = "int_shard_0.db";
const SHARD_1: &str = "int_shard_1.db";
const SHARD_SIZE: u32 = 200;

/// Returns a config with two shards of 200, in a range that is quickly drained.
fn small() -> Config {
    Config::new().pool("int", 1, 2_000, 2, SHARD_SIZE)
}

/// Drains the rest of the range with a new server.
async fn drain(site: &Site) -> Vec<String> {
    let server = site.start().await;
    let numbers = server.drain("int", 8, &[None, Some(20)]).await;
    server.stop().await;
    numbers
}

/// Removes a database with its log and index: SQLite never leaves a `-wal` without its database.
fn remove(file: &Path) {
    for ending in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{ending}", file.display()));
    }
    fs::remove_file(file).unwrap();
}

/// Story: a second server was started by mistake. Both leased from the same shards, and the swap of one
/// replaced files that the other had open.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_has_one_process() {
    let site = Site::new(&small());
    let first = site.start().await;
    let mut numbers = first.take("int", Some(10)).await;

    let (second, third) = tokio::join!(site.refusal(), site.refusal());
    for message in [second, third] {
        assert_says(&message, &["process", "LOCK"]);
    }

    numbers.extend(first.take("int", Some(10)).await);
    // The lock ends with the process, in whatever way the process ends.
    first.kill().await;
    let second = site.start().await;
    numbers.extend(second.take("int", Some(10)).await);
    second.stop().await;
    let third = site.start().await;
    numbers.extend(third.take("int", Some(10)).await);
    third.stop().await;
    missing(&numbers, 1..=2_000);
}

/// Story: the ledger was lost, a new one was created beside full shards, and it drew numbers that the shards
/// already held. The second start has to refuse like the first, because a refusal creates no ledger.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_ledger_is_not_created_again() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    let ledger = site.file(LEDGER);
    let kept = fs::read(&ledger).unwrap();

    remove(&ledger);
    for _ in 0..2 {
        let message = site.refusal().await;
        assert_says(&message, &[LEDGER, "restore"]);
    }
    let message = refusal(site.init_shards()).await;
    assert_says(&message, &[LEDGER, "restore"]);

    // The same if only a standby is left as evidence that there was a ledger.
    let moved = site.folder().join("moved");
    fs::create_dir(&moved).unwrap();
    for shard in [SHARD_0, SHARD_1] {
        fs::rename(site.file(shard), moved.join(shard)).unwrap();
    }
    assert_says(&site.refusal().await, &[LEDGER, "restore"]);
    for shard in [SHARD_0, SHARD_1] {
        fs::rename(moved.join(shard), site.file(shard)).unwrap();
    }

    fs::write(&ledger, kept).unwrap();
    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: to SQLite, a ledger of zero bytes is a valid, empty database, and so may be the output of a repair
/// tool.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_ledger_is_refused() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    let ledger = site.file(LEDGER);
    let kept = fs::read(&ledger).unwrap();

    for (_, damage) in DAMAGES {
        damage(&ledger);
        for _ in 0..2 {
            let message = site.refusal().await;
            assert_says(&message, &[LEDGER, "restore"]);
        }
        remove(&ledger);
        fs::write(&ledger, &kept).unwrap();
    }
    // Tables without rows, as after a `.dump` that was only partly restored.
    let connection = Connection::open(&ledger).unwrap();
    connection.execute_batch("DELETE FROM ledger").unwrap();
    drop(connection);
    assert_says(&site.refusal().await, &[LEDGER, "restore"]);
    remove(&ledger);

    fs::write(&ledger, &kept).unwrap();
    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: after an update, the server reported a ledger of an older format as damaged and advised to restore
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_of_another_version_is_refused_and_no_damage() {
    let site = Site::new(&small());
    site.fill().await;
    let set_version = |version: i32| {
        let connection = Connection::open(site.file(LEDGER)).unwrap();
        connection.pragma_update(None, "user_version", version).unwrap();
    };
    let this = column::<i32>(&site.file(LEDGER), "PRAGMA user_version")[0];
    for other in [this - 1, this + 1] {
        set_version(other);
        let message = site.refusal().await;
        let (found, known) = (format!("has format {other}"), format!("knows {this}"));
        assert_says(&message, &[LEDGER, &found, &known, "Start that version"]);
        assert!(!message.contains("damaged"), "{message}");
    }
    set_version(this);
    assert_each_once(&drain(&site).await, 1..=2_000);
}

/// Story: a shard was copied from another machine to avoid the filling. Its numbers are not in this machine's
/// ledger, so they would be drawn again.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_of_another_ledger_is_refused() {
    let site = Site::new(&small());
    let other = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    other.stop_with_standby(SHARD_SIZE).await;
    let standby = site.files(".db.next").remove(0);
    let foreign = other.file(&other.files(".db.next")[0]);

    for (target, source) in [
        (site.file(SHARD_0), other.file(SHARD_0)),
        (site.file(&standby), foreign),
        (site.file(LEDGER), other.file(LEDGER)),
    ] {
        let kept = fs::read(&target).unwrap();
        remove(&target);
        fs::copy(source, &target).unwrap();
        assert_says(&site.refusal().await, &["int_shard_", "ledger"]);
        remove(&target);
        fs::write(&target, kept).unwrap();
    }

    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: an operator copied shard 0 to create shard 1, or a bug built two shards from one draw. Each of its
/// numbers would be handed out twice.
#[tokio::test(flavor = "multi_thread")]
async fn two_shards_of_one_batch_are_refused() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    let shard = site.file(SHARD_1);
    let kept = fs::read(&shard).unwrap();

    remove(&shard);
    fs::copy(site.file(SHARD_0), &shard).unwrap();
    assert_says(&site.refusal().await, &[SHARD_1]);

    // The same with a file that claims to be shard 1.
    let connection = Connection::open(&shard).unwrap();
    connection.execute_batch("UPDATE shard SET idx = 1").unwrap();
    drop(connection);
    assert_says(&site.refusal().await, &[SHARD_1, "batch"]);

    remove(&shard);
    fs::write(&shard, kept).unwrap();
    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// A name, and a function that damages a file.
type Damage = (&'static str, fn(&Path));

const DAMAGES: &[Damage] = &[
    ("the header overwritten", |file| overwrite(file, 0, 100)),
    ("all pages but the first overwritten", |file| {
        let length = fs::metadata(file).unwrap().len();
        overwrite(file, 4096, usize::try_from(length).unwrap() - 4096);
    }),
    ("truncated to half", |file| {
        let length = fs::metadata(file).unwrap().len();
        truncate(file, length / 2);
    }),
    ("emptied", |file| truncate(file, 0)),
];

fn overwrite(file: &Path, offset: usize, length: usize) {
    let mut bytes = fs::read(file).unwrap();
    bytes[offset..offset + length].fill(0xA5);
    fs::write(file, bytes).unwrap();
}

fn truncate(file: &Path, length: u64) {
    let file = fs::File::options().write(true).open(file).unwrap();
    file.set_len(length).unwrap();
}

/// Story: a sector went bad. One shard is unavailable until it is rebuilt. Its numbers are burned, since some
/// may have been handed out, and the file is kept for analysis.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_shard_is_set_aside_and_rebuilt_with_fresh_numbers() {
    for (damage, apply) in DAMAGES {
        for standby in [false, true] {
            let site = Site::new(&small());
            let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
            let name = match standby {
                true => site.files(".db.next").remove(0),
                false => SHARD_0.to_owned(),
            };
            let file = site.file(&name);
            apply(&file);
            let damaged = fs::read(&file).unwrap();

            let rest = drain(&site).await;
            assert!(!rest.is_empty(), "{name}: {damage}");
            numbers.extend(rest);
            let burned = missing(&numbers, 1..=2_000);
            assert!(burned <= SHARD_SIZE as usize, "{name}: {damage}: {burned}");
            if !standby {
                // The log is kept too, if there is one.
                let mut kept = site.files(&format!("{SHARD_0}.damaged-"));
                kept.retain(|name| !name.ends_with("-wal") && !name.ends_with("-shm"));
                assert_eq!(kept.len(), 1, "{damage}: {kept:?}");
                assert_eq!(fs::read(site.file(&kept[0])).unwrap(), damaged, "{damage}");
            }
        }
    }
}

/// Story: a shard's file was copied, numbers were issued, and the copy, which was of the same generation, was
/// put back: 208 numbers were issued again, and `verify` found nothing. If `running`, the copy is made while
/// the server runs, and includes the log.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_copy_of_the_same_generation_is_refused() {
    for running in [false, true] {
        let site = Site::new(&small());
        site.fill().await;
        let first = site.start().await;
        first.take("int", Some(10)).await;
        let names = [SHARD_0.to_owned(), format!("{SHARD_0}-wal")];
        let mut server = Some(first);
        if !running {
            server.take().unwrap().stop().await;
        }
        let copies: Vec<_> =
            names.iter().filter_map(|name| Some((name, fs::read(site.file(name)).ok()?))).collect();
        assert_eq!(copies.len(), 1 + usize::from(running));
        let server = match server {
            Some(server) => server,
            None => site.start().await,
        };
        server.take("int", Some(100)).await;
        server.stop().await;

        for (name, content) in &copies {
            fs::write(site.file(name), content).unwrap();
        }
        let refused = site.refusal().await;
        assert!(refused.contains("older copy of generation 1"), "{running}: {refused}");
        let verified = run(site.console(&["verify"])).await;
        assert_eq!(verified.status.code(), Some(1), "{running}: {}", verified.stdout);
        assert!(verified.stdout.contains("older copy of generation 1"), "{}", verified.stdout);
    }
}

/// Story: an operator deleted a shard to save space. It counts as empty and is filled again, with numbers
/// that are new to the ledger.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_shard_is_rebuilt_with_fresh_numbers() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    remove(&site.file(SHARD_0));
    numbers.extend(drain(&site).await);
    let burned = missing(&numbers, 1..=2_000);
    assert!(burned <= SHARD_SIZE as usize, "{burned} burned");
}

/// Story: killed between the ledger's commit and the rename. The batch is in the ledger, so its numbers will
/// not be drawn again, and deleting the `.tmp` would burn them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_the_ledger_has_is_adopted() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    standbys_to_builds(&site);

    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: killed between the build and the ledger's commit. The batch is not in the ledger, so its numbers
/// will be drawn again, and adopting the `.tmp` would repeat them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_the_ledger_has_not_is_deleted() {
    let site = Site::new(&small());
    site.fill().await;
    let build = site.file("int_shard_0.db.tmp");
    fs::copy(site.file(SHARD_0), &build).unwrap();
    let connection = Connection::open(&build).unwrap();
    connection.execute("UPDATE shard SET batch = 99, generation = 2", []).unwrap();
    connection.close().unwrap();

    assert_each_once(&drain(&site).await, 1..=2_000);
    assert!(!build.exists());
}

/// Story: killed while the file was being written, so it is not even a database.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_is_half_written_is_deleted() {
    for (damage, apply) in DAMAGES {
        let site = Site::new(&small());
        site.fill().await;
        let build = site.file("int_shard_0.db.tmp");
        fs::copy(site.file(SHARD_0), &build).unwrap();
        apply(&build);

        let burned = missing(&drain(&site).await, 1..=2_000);
        assert_eq!(burned, 0, "{damage}");
    }
}

/// Renames each `.next` to the `.tmp` that it was before.
fn standbys_to_builds(site: &Site) {
    for standby in site.files(".db.next") {
        let build = standby.replace(".next", ".tmp");
        fs::rename(site.file(&standby), site.file(&build)).unwrap();
    }
}

/// Story: a typo in the config was ignored and the default was used, unnoticed until the range was used up. A
/// refusal names the key, the value and what is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn impossible_settings_are_refused_with_what_is_allowed() {
    let cases: &[(&str, &str, &[&str])] = &[
        // Unknown keys at every level.
        ("server.lisen", "'127.0.0.1:0'", &["lisen", "listen"]),
        ("sever.listen", "'127.0.0.1:0'", &["sever", "server"]),
        ("pools.int.shard_sise", "10", &["shard_sise", "shard_size"]),
        ("pools.ticket.maximum", "10", &["pools.ticket", "maximum", "max"]),
        // Ranges.
        ("pools.int.min", "101", &["pools.int", "min", "101", "max", "100"]),
        (
            "pools.int.max",
            "9007199254740992",
            &["pools.int.max", "9007199254740992", "9007199254740991"],
        ),
        (
            "pools.int.min",
            "-9007199254740992",
            &["pools.int.min", "-9007199254740992", "-9007199254740991"],
        ),
        ("pools.int.max", "99999999999999999999", &["max = 99999999999999999999", "config.toml"]),
        ("pools.int.max", "'many'", &["pools.int.max", "many"]),
        ("pools.int.max", "99.5", &["pools.int.max", "99.5"]),
        ("pools.int.max", "inf", &["pools.int.max", "inf"]),
        ("pools.int.max", "nan", &["pools.int.max", "NaN"]),
        // Digits: 100 (three digits) with 14 decimals has 17.
        ("pools.int.decimals", "14", &["pools.int", "decimals", "14", "15"]),
        ("pools.int.decimals", "15", &["pools.int.decimals", "15", "14"]),
        ("pools.int.decimals", "-1", &["pools.int.decimals", "-1"]),
        // Shards.
        ("pools.int.shards", "0", &["pools.int.shards", "0", "1"]),
        ("pools.int.shards", "-1", &["pools.int.shards", "-1"]),
        ("pools.int.shards", "'some'", &["pools.int.shards", "some", "auto"]),
        ("pools.int.shard_size", "0", &["pools.int.shard_size", "0", "1"]),
        ("pools.int.shard_size", "101", &["pools.int.shard_size", "101", "100"]),
        // Names that would become file names.
        ("pools.'../int'.max", "10", &["../int", "a-z"]),
        ("pools.''.max", "10", &["pools", "a-z"]),
        ("pools.'with space'.max", "10", &["with space", "a-z"]),
        ("pools.1st.max", "10", &["1st", "a-z"]),
        ("pools.with-dash.max", "10", &["with-dash", "a-z"]),
        ("pools.a23456789_123456789_123456789_123.max", "10", &["a23456789_", "32"]),
        // Other settings.
        ("server.listen", "'nowhere'", &["server.listen", "nowhere"]),
        ("server.count_limit", "0", &["server.count_limit", "0", "1"]),
        ("lease.rows", "-1", &["lease.rows", "-1"]),
        ("refill.low_water", "1.5", &["refill.low_water", "1.5", "1"]),
        ("refill.low_water", "-0.1", &["refill.low_water", "-0.1", "0"]),
        ("refill.retry_ms", "201", &["refill.retry", "201", "200"]),
    ];
    let config = Config::new().pool("int", 1, 100, 1, 50);
    let site = Site::new(&config);
    let mut unsaid = Vec::new();

    for (key, value, words) in cases {
        let mut changed = config.clone().set(key, value);
        // For a pool that is wrong only in its name or in one key, the other keys are set too.
        if let Some((pool, "max" | "maximum")) = key.rsplit_once('.')
            && pool != "pools.int"
        {
            for (key, value) in [("min", 1), ("max", 10), ("shards", 1), ("shard_size", 5)] {
                changed = changed.set(&format!("{pool}.{key}"), value);
            }
        }
        site.configure(&changed);
        for command in [site.tombola(), site.init_shards()] {
            let message = refusal(command).await;
            for word in words.iter().filter(|word| !message.contains(**word)) {
                unsaid.push(format!("{key} = {value}: {word:?} is not in: {message}"));
            }
        }
        assert_eq!(site.files(""), [""; 0], "{key} = {value}");
    }
    assert!(unsaid.is_empty(), "{}", unsaid.concat());
}

/// Story: the last pool was disabled, and the server started and responded to everything with 400.
#[tokio::test(flavor = "multi_thread")]
async fn a_config_without_pools_or_without_a_file_is_refused() {
    let site = Site::new(&Config::new());
    assert_says(&site.refusal().await, &["pools"]);

    fs::remove_file(site.folder().join("config.toml")).unwrap();
    assert_says(&site.refusal().await, &["config.toml"]);

    fs::write(site.folder().join("config.toml"), "[server\n").unwrap();
    assert_says(&site.refusal().await, &["config.toml"]);
}

/// Story: a container set a variable, the file had another value, and two operators disagreed about which one
/// applied. The order is file, then environment, then flags.
#[tokio::test(flavor = "multi_thread")]
async fn the_environment_overrides_the_file_and_flags_override_both() {
    let rows = |site: &Site, folder: &str| -> i64 {
        let shard = site.folder().join(folder).join(SHARD_0);
        support::column(&shard, "SELECT count(*) FROM numbers")[0]
    };
    let site = Site::new(&small());

    let mut command = site.init_shards();
    command.env("TOMBOLA_POOLS__INT__SHARD_SIZE", "150");
    command.env("TOMBOLA_STORAGE__DIR", "from_env");
    assert!(run(command).await.status.success());
    assert_eq!(rows(&site, "from_env"), 150);
    assert!(!site.data().exists(), "the folder from the file was created");

    let mut command = site.init_shards();
    command.env("TOMBOLA_POOLS__INT__SHARD_SIZE", "150");
    command.env("TOMBOLA_STORAGE__DIR", "from_env");
    command.args(["--size", "120", "--data-dir", "from_flag"]);
    assert!(run(command).await.status.success());
    assert_eq!(rows(&site, "from_flag"), 120);

    // 203.0.113.0/24 belongs to no machine (RFC 5737), so a server can't listen there.
    site.configure(&small().set("server.listen", "'203.0.113.1:1'"));
    let mut command = site.tombola();
    command.env("TOMBOLA_SERVER__LISTEN", "127.0.0.1:0");
    Server::start(command).await.stop().await;
    let mut command = site.tombola();
    command.env("TOMBOLA_SERVER__LISTEN", "203.0.113.1:2");
    command.args(["--listen", "127.0.0.1:0"]);
    Server::start(command).await.stop().await;
    assert_says(&site.refusal().await, &["203.0.113.1:1"]);

    let mut command = site.tombola();
    command.env("TOMBOLA_POOLS__INT__SHARD_SISE", "150");
    let message = refusal(command).await.to_lowercase();
    assert_says(&message, &["shard_sise", "shard_size"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_flags_end_with_code_2() {
    let site = Site::new(&small());
    for arguments in [["--nope", "1"], ["--log-format", "xml"]] {
        let mut command = site.tombola();
        command.args(arguments);
        let Finished { status, stderr, .. } = run(command).await;
        assert_eq!(status.code(), Some(2), "{stderr}");
        assert_says(&stderr, &[arguments[0]]);
    }
    for arguments in [["--nope", "1"], ["--shards", "0.5"], ["--size", "some"]] {
        let mut command = site.init_shards();
        command.args(arguments);
        let Finished { status, stderr, .. } = run(command).await;
        assert_eq!(status.code(), Some(2), "{stderr}");
        assert_says(&stderr, &[arguments[0]]);
    }
}

/// Story: with `--log-format json`, one line of plain text broke the log pipeline, and logs on stdout broke
/// programs that read the address there.
#[tokio::test(flavor = "multi_thread")]
async fn logs_go_to_stderr_in_the_format_asked_for() {
    let site = Site::new(&small());
    let mut command = site.tombola();
    command.args(["--log-format", "json"]);
    let mut server = Server::start(command).await;
    for _ in 0..1_000 {
        server.get("/random").await;
    }
    server.process.signal(Signal::SIGTERM);
    let Finished { status, stdout, stderr } = server.process.finish().await;

    assert_eq!(status.code(), Some(0), "{stderr}");
    assert!(stdout.contains("/random"), "the suggested command is missing: {stdout}");
    assert!(!stderr.is_empty());
    for line in stderr.lines() {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(parsed.is_ok_and(|value| value.is_object()), "{line}");
    }
    let lines = stderr.lines().count();
    assert!(lines < 1_000, "the log has a line for each request: {stderr}");
}

/// Story: a server without the pools `int` and `float` suggested requests that it refused.
#[tokio::test(flavor = "multi_thread")]
async fn the_requests_that_a_start_suggests_succeed() {
    for pools in [&["ticket"][..], &["int"], &["gift", "int", "ticket"]] {
        let config =
            pools.iter().fold(Config::new(), |config, pool| config.pool(pool, 0, 99, 1, 50));
        let site = Site::new(&config);
        site.fill().await;
        let server = site.start().await;
        server.process.prints("/health").await;
        for words in ["/random", "&count=5", "/health"] {
            let line = server.process.line(words).await;
            let target = line.split_once(server.address()).unwrap().1.trim_end_matches('\'');
            server.get(target).await.assert_status(200);
        }
        server.stop().await;
    }
}

/// Story: Ctrl-C in a terminal, or SIGTERM from a supervisor, cut off a response whose numbers were already
/// marked as used. Both signals let the response finish; a second signal ends the server at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_a_request_and_a_second_signal_does_not() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        for patient in [true, false] {
            let site = Site::new(&small().set("server.drain_ms", 600_000));
            let mut server = site.start().await;
            let numbers = server.take("int", Some(10)).await;
            let mut caller = TcpStream::connect(server.address()).unwrap();
            caller.write_all(b"GET /random HTTP/1.1\r\nHost:").unwrap();
            eventually("half of the request to be read", async || {
                is_read_by_peer(&caller).then_some(())
            })
            .await;

            server.process.signal(signal);
            eventually("the listener to close", async || {
                TcpStream::connect(server.address()).is_err().then_some(())
            })
            .await;
            assert!(server.process.is_running(), "a request is still being received");

            if patient {
                caller.write_all(b" localhost\r\n\r\n").unwrap();
                let answer = std::io::read_to_string(&mut caller).unwrap();
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                let finished = server.process.finish().await;
                assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
                let rest = drain(&site).await;
                let burned = missing(&[numbers, rest].concat(), 1..=2_000);
                assert_eq!(burned, 1, "only the number in the last response");
            } else {
                server.process.signal(signal);
                server.process.finish().await;
                missing(&[numbers, drain(&site).await].concat(), 1..=2_000);
            }
        }
    }
}

/// Returns whether the peer process has read all bytes from its kernel (on Linux, according to the receive
/// queue in /proc/net/tcp, whose ports are in hexadecimal).
fn is_read_by_peer(stream: &TcpStream) -> bool {
    let port = |address: std::io::Result<SocketAddr>| format!(":{:04X}", address.unwrap().port());
    let (peer, own) = (port(stream.peer_addr()), port(stream.local_addr()));
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[1].ends_with(&peer) && fields[2].ends_with(&own) && fields[4].ends_with(":00000000")
    })
}

/// Fails unless the message contains each of the words.
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in:\n{message}");
    }
}
