//! What a server makes of the folder and the settings it finds: it goes on, heals, or refuses
//! and says why. A refusal changes nothing.

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

/// Two shards of 200 in a range that can be drained in a moment.
fn small() -> Config {
    Config::new().pool("int", 1, 2_000, 2, SHARD_SIZE)
}

/// Takes what is left of the range on a server of its own.
async fn drain(site: &Site) -> Vec<String> {
    let server = site.start().await;
    let numbers = server.drain("int", 8, &[None, Some(20)]).await;
    server.stop().await;
    numbers
}

/// Removes a database as a whole: a `-wal` left alone is a state that SQLite never leaves.
fn remove(file: &Path) {
    for ending in ["-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{ending}", file.display()));
    }
    fs::remove_file(file).unwrap();
}

/// Story: a second server is started by mistake, both lease from the same shards, and the swap of
/// one pulls the files from under the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_folder_has_one_process() {
    let site = Site::new(&small());
    let first = site.start().await;
    let mut numbers = first.take("int", Some(10)).await;

    for _ in 0..2 {
        let message = site.refusal().await;
        assert_says(&message, &["process", "LOCK"]);
    }

    numbers.extend(first.take("int", Some(10)).await);
    // The lock ends with the process, however that ends.
    first.kill().await;
    let second = site.start().await;
    numbers.extend(second.take("int", Some(10)).await);
    second.stop().await;
    let third = site.start().await;
    numbers.extend(third.take("int", Some(10)).await);
    third.stop().await;
    missing(&numbers, 1..=2_000);
}

/// Story: the ledger is lost, a new one is begun beside full shards, and it draws what the
/// shards hold. The second start has to refuse as the first: a refusal leaves no new ledger.
#[tokio::test(flavor = "multi_thread")]
async fn a_missing_ledger_is_not_begun_anew() {
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

    // Nor when only a standby is left to tell that there was one.
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

/// Story: a ledger of zero bytes is a valid, empty database to SQLite. So is, with bad luck, what
/// a repair tool leaves.
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
    // Tables without rows, as after a `.dump` that was read back by half.
    let connection = Connection::open(&ledger).unwrap();
    connection.execute_batch("DELETE FROM ledger").unwrap();
    drop(connection);
    assert_says(&site.refusal().await, &[LEDGER, "restore"]);
    remove(&ledger);

    fs::write(&ledger, &kept).unwrap();
    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: after an update the server called a ledger damaged that was only older, and said to restore it.
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

/// Story: a shard is copied from another machine to save the filling. Its numbers are not in
/// this machine's ledger, so they will be drawn again.
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

/// Story: somebody copies shard 0 to have a shard 1, or a bug builds two shards from one draw.
/// Every number of it would be handed out twice.
#[tokio::test(flavor = "multi_thread")]
async fn two_shards_of_one_batch_are_refused() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    let shard = site.file(SHARD_1);
    let kept = fs::read(&shard).unwrap();

    remove(&shard);
    fs::copy(site.file(SHARD_0), &shard).unwrap();
    assert_says(&site.refusal().await, &[SHARD_1]);

    // The same, with a file that says it is shard 1.
    let connection = Connection::open(&shard).unwrap();
    connection.execute_batch("UPDATE shard SET idx = 1").unwrap();
    drop(connection);
    assert_says(&site.refusal().await, &[SHARD_1, "batch"]);

    remove(&shard);
    fs::write(&shard, kept).unwrap();
    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// One way to damage a file.
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

/// Story: a sector goes bad. One shard is out of use for as long as a rebuild takes; its numbers
/// are burned, since some may have been handed out, and the file is kept for whoever looks.
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
                // With its log, if it has one.
                let mut kept = site.files(&format!("{SHARD_0}.damaged-"));
                kept.retain(|name| !name.ends_with("-wal") && !name.ends_with("-shm"));
                assert_eq!(kept.len(), 1, "{damage}: {kept:?}");
                assert_eq!(fs::read(site.file(&kept[0])).unwrap(), damaged, "{damage}");
            }
        }
    }
}

/// Story: an operator deletes a shard to save space. That is an empty shard: it is filled again,
/// and with numbers that the ledger has never seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_shard_is_rebuilt_with_fresh_numbers() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    remove(&site.file(SHARD_0));
    numbers.extend(drain(&site).await);
    let burned = missing(&numbers, 1..=2_000);
    assert!(burned <= SHARD_SIZE as usize, "{burned} burned");
}

/// Story: killed between the ledger's commit and the rename. The ledger has the batch, so its
/// numbers will not be drawn again: a `.tmp` thrown away burns them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_the_ledger_has_is_adopted() {
    let site = Site::new(&small());
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    standbys_to_builds(&site);

    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: killed between the build and the ledger's commit. The ledger does not have the batch,
/// so its numbers will be drawn again: a `.tmp` adopted repeats them all.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_that_the_ledger_has_not_is_deleted() {
    let site = Site::new(&small());
    site.fill().await;
    let before = fs::read(site.file(LEDGER)).unwrap();
    let mut numbers = site.stop_with_standby(SHARD_SIZE).await;
    remove(&site.file(LEDGER));
    fs::write(site.file(LEDGER), before).unwrap();
    standbys_to_builds(&site);

    numbers.extend(drain(&site).await);
    assert_each_once(&numbers, 1..=2_000);
}

/// Story: killed in the middle of writing the file: it is not even a database.
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

/// Turns every `.next` into the `.tmp` that it was a moment before.
fn standbys_to_builds(site: &Site) {
    for standby in site.files(".db.next") {
        let build = standby.replace(".next", ".tmp");
        fs::rename(site.file(&standby), site.file(&build)).unwrap();
    }
}

/// Story: a typing error in the config is ignored, the default takes its place, and nobody knows
/// until the range is used up. What is refused names the key, the value and what is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn impossible_settings_are_refused_with_what_is_allowed() {
    let cases: &[(&str, &str, &[&str])] = &[
        // Unknown keys, at every level.
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
        // Digits: 100 and 14 decimals are 17.
        ("pools.int.decimals", "14", &["pools.int", "decimals", "14", "15"]),
        ("pools.int.decimals", "15", &["pools.int.decimals", "15", "14"]),
        ("pools.int.decimals", "-1", &["pools.int.decimals", "-1"]),
        // Shards.
        ("pools.int.shards", "0", &["pools.int.shards", "0", "1"]),
        ("pools.int.shards", "-1", &["pools.int.shards", "-1"]),
        ("pools.int.shards", "'some'", &["pools.int.shards", "some", "auto"]),
        ("pools.int.shard_size", "0", &["pools.int.shard_size", "0", "1"]),
        ("pools.int.shard_size", "101", &["pools.int.shard_size", "101", "100"]),
        // Names that are to become file names.
        ("pools.'../int'.max", "10", &["../int", "a-z"]),
        ("pools.''.max", "10", &["pools", "a-z"]),
        ("pools.'with space'.max", "10", &["with space", "a-z"]),
        ("pools.1st.max", "10", &["1st", "a-z"]),
        ("pools.with-dash.max", "10", &["with-dash", "a-z"]),
        ("pools.a23456789_123456789_123456789_123.max", "10", &["a23456789_", "32"]),
        // The rest.
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
        // A pool that is wrong in its name or in one key only.
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

/// Story: the last pool is left out, and the server starts to answer 400 to everything.
#[tokio::test(flavor = "multi_thread")]
async fn a_config_without_pools_or_without_a_file_is_refused() {
    let site = Site::new(&Config::new());
    assert_says(&site.refusal().await, &["pools"]);

    fs::remove_file(site.folder().join("config.toml")).unwrap();
    assert_says(&site.refusal().await, &["config.toml"]);

    fs::write(site.folder().join("config.toml"), "[server\n").unwrap();
    assert_says(&site.refusal().await, &["config.toml"]);
}

/// Story: the container sets a variable, the file says otherwise, and each colleague believes
/// that his wins. File, then environment, then flags.
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
    assert!(!site.data().exists(), "the file's folder");

    let mut command = site.init_shards();
    command.env("TOMBOLA_POOLS__INT__SHARD_SIZE", "150");
    command.env("TOMBOLA_STORAGE__DIR", "from_env");
    command.args(["--size", "120", "--data-dir", "from_flag"]);
    assert!(run(command).await.status.success());
    assert_eq!(rows(&site, "from_flag"), 120);

    // 203.0.113.0/24 is nobody's (RFC 5737): whoever listens there fails.
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

/// Story: with `--log-format json` one line of plain text breaks the log pipeline; logs on stdout
/// break whoever reads the address from there.
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
    assert!(stdout.contains("/random"), "what to try: {stdout}");
    assert!(!stderr.is_empty());
    for line in stderr.lines() {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(line);
        assert!(parsed.is_ok_and(|value| value.is_object()), "{line}");
    }
    let lines = stderr.lines().count();
    assert!(lines < 1_000, "a line per request: {stderr}");
}

/// Story: Ctrl-C in a terminal, or a supervisor's SIGTERM, cuts off an answer whose numbers are
/// already marked as used. Both let it finish; whoever cannot wait sends the signal again.
#[tokio::test(flavor = "multi_thread")]
async fn a_stop_waits_for_a_request_and_a_second_signal_does_not() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        for patient in [true, false] {
            let site = Site::new(&small().set("server.drain_ms", 600_000));
            let mut server = site.start().await;
            let numbers = server.take("int", Some(10)).await;
            let mut caller = TcpStream::connect(server.address()).unwrap();
            caller.write_all(b"GET /random HTTP/1.1\r\nHost:").unwrap();
            eventually("the half request to be read", async || {
                is_read_by_peer(&caller).then_some(())
            })
            .await;

            server.process.signal(signal);
            eventually("the listener to close", async || {
                TcpStream::connect(server.address()).is_err().then_some(())
            })
            .await;
            assert!(server.process.is_running(), "a request is on its way");

            if patient {
                caller.write_all(b" tombola\r\n\r\n").unwrap();
                let answer = std::io::read_to_string(&mut caller).unwrap();
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                let finished = server.process.finish().await;
                assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
                let rest = drain(&site).await;
                let burned = missing(&[numbers, rest].concat(), 1..=2_000);
                assert_eq!(burned, 1, "the one in the last answer");
            } else {
                server.process.signal(signal);
                server.process.finish().await;
                missing(&[numbers, drain(&site).await].concat(), 1..=2_000);
            }
        }
    }
}

/// Whether the process at the other end has taken all bytes from its kernel (Linux: the receive
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

/// Fails unless the message has every word.
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in:\n{message}");
    }
}
