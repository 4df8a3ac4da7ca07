//! Reloads: how long each kind takes, beside few and many pools.

use std::time::Instant;

use sha2::{Digest, Sha256};

use crate::Plan;
use crate::drive::send;
use crate::report::Report;
use crate::side::Site;

/// The pools beside which reloads are measured.
const POOLS: [u64; 2] = [2, 200];

/// Numbers in each of the two shards of a pool, as many as a small campaign needs.
const SHARD_SIZE: u64 = 5_000;

/// The token that may reload.
const ADMIN: &str = "tombola_bench_admin";

/// The settings of a run, as far as a reload changes them.
struct Settings {
    pools: u64,
    /// A token beside that of the administrator.
    token: String,
    /// Numbers in each shard of the first pool.
    first_size: u64,
    low_water: f64,
}

/// Measures reloads of a running server, each of which changes one thing and so does the next one.
pub(crate) fn reload(plan: &Plan, report: &mut Report) -> anyhow::Result<()> {
    let authorization = format!("Authorization: Bearer {ADMIN}\r\n");
    for pools in POOLS {
        let mut settings =
            Settings { pools, token: String::new(), first_size: SHARD_SIZE, low_water: 0.5 };
        let site = Site::new(&plan.dir, &format!("reload_{pools}"), &settings.text())?;
        site.fill()?;
        let side = site.serve()?;
        let mut row = |what: &str, change: &dyn Fn(&mut Settings, u64)| {
            let mut runs = Vec::new();
            for run in 0..plan.pairs as u64 {
                change(&mut settings, run);
                site.configure(&settings.text())?;
                let started = Instant::now();
                send(side.address, "POST /reload", &authorization, "")?;
                runs.push(started.elapsed().as_secs_f64() * 1e3);
            }
            report.figure(format!("reload beside {pools} pools: {what}"), "ms", &runs, None, "");
            anyhow::Ok(())
        };
        row("a token", &|settings, run| settings.token = format!("token {run}"))?;
        row("a pool of 2 shards is opened again", &|settings, run| {
            settings.first_size = SHARD_SIZE - 1 - run % 2;
        })?;
        row("all pools are opened again", &|settings, run| {
            settings.low_water = 0.4 + 0.01 * (run % 2) as f64;
        })?;
        row("a new pool", &|settings, _| settings.pools += 1)?;
        side.stop()?;
    }
    Ok(())
}

impl Settings {
    fn text(&self) -> String {
        let token = |name: &str, scope: &str, text: &str| {
            let digest = hex::encode(Sha256::digest(text));
            format!("[[auth.tokens]]\nname = '{name}'\nscope = '{scope}'\nsha256 = '{digest}'\n")
        };
        let mut text = token("admin", "admin", ADMIN) + &token("shop", "draw", &self.token);
        text += &format!("[refill]\nlow_water = {}\n", self.low_water);
        text += "[pools.int]\nenabled = false\n[pools.float]\nenabled = false\n";
        for pool in 0..self.pools {
            let size = if pool == 0 { self.first_size } else { SHARD_SIZE };
            text += &format!(
                "[pools.campaign_{pool:04}]\nmin = 0\nmax = 999_999_999_999\nshards = 2\nshard_size = {size}\n"
            );
        }
        text
    }
}
