//! Files that ship with the binary: the systemd unit, the Dockerfile, the manifests of a fleet, the licence.
//! They are compared with the code, because nothing else notices when they diverge.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use support::{Config, Site, skipped};

const UNIT: &str = include_str!("../ops/tombola.service");
const DOCKERFILE: &str = include_str!("../Dockerfile");
const COMPOSE: &str = include_str!("../ops/fleet/compose.yaml");
const KUBERNETES: &str = include_str!("../ops/fleet/kubernetes.yaml");
const MANIFEST: &str = include_str!("../Cargo.toml");
const LICENSE: &str = include_str!("../LICENSE");

/// The highest exposure that `systemd-analyze security` may report, in tenths. 10 is the worst score of a
/// service and 0 the best; a service that uses the network can't be below 0.8.
const EXPOSURE_LIMIT_TENTHS: &str = "12";

/// Runs `systemd-analyze`, or reports that it is missing.
fn systemd_analyze(arguments: &[&str], unit: &Path) -> Option<Output> {
    match Command::new("systemd-analyze").args(arguments).arg(unit).output() {
        Ok(output) => Some(output),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::NotFound, "systemd-analyze: {error}");
            skipped("systemd-analyze is missing (Debian package systemd)");
            None
        }
    }
}

/// Writes the unit to `folder`, with the binary under test instead of the installed one, and returns its
/// path.
fn unit(folder: &tempfile::TempDir) -> PathBuf {
    let path = folder.path().join("tombola.service");
    let text = UNIT.replace("=tombola serve", &format!("={} serve", env!("CARGO_BIN_EXE_tombola")));
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn systemd_takes_the_unit_without_a_complaint() {
    let folder = tempfile::tempdir().unwrap();
    let Some(output) = systemd_analyze(&["verify", "--man=no"], &unit(&folder)) else { return };
    let said = String::from_utf8(output.stderr).unwrap();
    // Complaints about other units of this machine don't count.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("tombola")).collect();
    assert!(ours.is_empty(), "{said}");
    assert!(output.status.success(), "{said}");
}

#[tokio::test]
async fn the_unit_reloads_with_the_signal_that_the_server_knows() {
    let command = UNIT.lines().find_map(|line| line.strip_prefix("ExecReload=")).unwrap();
    let site = Site::new(&Config::new().pool("int", 0, 99, 1, 10));
    let server = site.start().await;
    let id = server.process.id().to_string();
    let status = Command::new("sh").args(["-c", command]).env("MAINPID", id).status().unwrap();
    assert!(status.success(), "{command}");
    server.process.says("The settings were reloaded").await;
    server.stop().await;
}

/// Story: the documented path of the witness was in a folder that the service could not write to, and the
/// store's password was in a file that it could not read.
#[test]
fn the_unit_has_room_for_a_witness_and_can_be_given_secrets() {
    let witness =
        tombola::internals::DEFAULTS.lines().find_map(|l| l.strip_prefix("# store = \"file://"));
    let folder = Path::new(witness.unwrap().trim_end_matches('"')).parent().unwrap();
    let states = UNIT.lines().find_map(|line| line.strip_prefix("StateDirectory=")).unwrap();
    let mut states = states.split(' ').map(|name| Path::new("/var/lib").join(name));
    assert!(states.any(|state| state == folder), "{}", folder.display());

    let uncommented = UNIT.replace("\n#LoadCredential=", "\nLoadCredential=");
    for name in ["cert.pem", "key.pem", "store.password", "store-ca.pem"] {
        assert!(uncommented.contains(&format!("\nLoadCredential={name}:/etc/tombola/{name}\n")));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = unit(&folder);
    std::fs::write(&path, uncommented.replace("=tombola serve", "=/bin/true")).unwrap();
    let Some(output) = systemd_analyze(&["verify", "--man=no"], &path) else { return };
    let said = String::from_utf8(output.stderr).unwrap();
    let ours: Vec<_> = said.lines().filter(|line| line.contains("tombola")).collect();
    assert!(ours.is_empty() && output.status.success(), "{said}");
}

/// Story: "auto" is half a file per core of the node, and a pod with a limit of 512 MiB had 64.
#[test]
fn the_manifests_of_a_fleet_set_how_many_shards_there_are() {
    for (text, settings) in [
        (KUBERNETES, ["[pools.int]\n    shards = ", "[pools.float]\n    shards = "]),
        (COMPOSE, ["TOMBOLA_POOLS__INT__SHARDS: ", "TOMBOLA_POOLS__FLOAT__SHARDS: "]),
    ] {
        assert!(settings.iter().all(|setting| text.contains(setting)), "{settings:?}");
    }
}

#[test]
fn the_unit_gives_the_service_little() {
    let folder = tempfile::tempdir().unwrap();
    let threshold = format!("--threshold={EXPOSURE_LIMIT_TENTHS}");
    let flags = ["security", "--offline=true", "--no-pager", &threshold];
    let Some(output) = systemd_analyze(&flags, &unit(&folder)) else { return };
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// A kill while the server still drains would burn the leased rows.
#[test]
fn service_managers_wait_longer_than_a_stop_takes() {
    let drain_ms = tombola::internals::DEFAULTS.lines().find_map(|l| l.strip_prefix("drain_ms = "));
    let drain_ms: u64 = drain_ms.unwrap().replace('_', "").parse().unwrap();
    for (text, key) in [
        (UNIT, "TimeoutStopSec="),
        (COMPOSE, "stop_grace_period: "),
        (KUBERNETES, "terminationGracePeriodSeconds: "),
    ] {
        let value = text.lines().find_map(|line| line.trim_start().strip_prefix(key));
        let seconds: u64 = value.unwrap().trim_end_matches('s').parse().unwrap();
        assert!(seconds * 1_000 >= 2 * drain_ms, "{key}{seconds} s, {drain_ms} ms");
    }
}

/// Each setting in the manifests exists.
#[test]
fn the_manifests_of_a_fleet_are_understood() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let lines = KUBERNETES.lines().skip_while(|line| !line.ends_with("config.toml: |")).skip(1);
    let lines = lines.take_while(|line| line.is_empty() || line.starts_with("    "));
    std::fs::write(&config, lines.map(str::trim).collect::<Vec<_>>().join("\n")).unwrap();
    let check = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tombola"));
        command.args(["check-config", "--listen", "0.0.0.0:8000"]).current_dir(folder.path());
        command
    };
    understood(check());

    std::fs::remove_file(&config).unwrap();
    let variables = COMPOSE.lines().filter_map(|line| line.trim_start().split_once(": "));
    let variables = variables.filter(|(name, _)| name.starts_with("TOMBOLA_"));
    let variables = variables.map(|(name, value)| (name, value.trim_matches('"')));
    let mut command = check();
    assert!(command.envs(variables).get_envs().len() >= 3);
    understood(command);
}

fn understood(mut command: Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    if cfg!(feature = "etcd") {
        assert!(output.status.success(), "{said}");
    } else {
        // An unknown setting would be reported before this error.
        assert!(said.contains("build with --features etcd"), "{said}");
    }
}

#[test]
fn the_unit_does_not_restart_after_errors_that_need_an_operator() {
    use tombola::Exit;
    let line = UNIT.lines().find_map(|line| line.strip_prefix("RestartPreventExitStatus="));
    let found: Vec<u8> = line.unwrap().split(' ').map(|code| code.parse().unwrap()).collect();
    assert_eq!(found, [Exit::Settings as u8, Exit::Folder as u8, Exit::Lost as u8]);
    // systemd checks the exit code of the main process only.
    assert!(!UNIT.contains("\nExecStartPre="));
}

#[test]
fn the_dockerfile_builds_with_the_stated_rust_from_files_that_are_there() {
    let value = |text: &str, key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key}")).trim_matches('"').to_owned()
    };
    let stated = value(MANIFEST, "rust-version = ");
    assert!(value(DOCKERFILE, "ARG RUST_VERSION=").starts_with(&stated), "{stated}");

    let top = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ignored = std::fs::read_to_string(top.join(".dockerignore")).unwrap();
    for line in DOCKERFILE.lines().filter(|line| line.starts_with("COPY ") && !line.contains("--"))
    {
        let words: Vec<_> = line.split_whitespace().collect();
        for source in &words[1..words.len() - 1] {
            assert!(top.join(source).exists(), "{line}");
            let passed = format!("!{}", source.trim_end_matches('/'));
            assert!(ignored.lines().any(|l| l == passed), ".dockerignore excludes {source}");
        }
    }
    // The folders of all targets that have an explicit path are copied too.
    for path in MANIFEST.lines().filter_map(|line| line.strip_prefix("path = ")) {
        let mut folders = Path::new(path.trim_matches('"')).ancestors().skip(1);
        let copied = folders.any(|folder| {
            let folder = folder.display();
            DOCKERFILE.contains(&format!("COPY {folder}/ {folder}/"))
        });
        assert!(copied, "{path}");
    }
}

#[test]
fn the_licence_has_both_texts() {
    assert_eq!(env!("CARGO_PKG_LICENSE"), "MIT OR Apache-2.0");
    for part in [
        "SPDX-License-Identifier: MIT OR Apache-2.0",
        "Permission is hereby granted, free of charge, to any",
        "END OF TERMS AND CONDITIONS",
    ] {
        assert!(LICENSE.contains(part), "{part}");
    }
}
