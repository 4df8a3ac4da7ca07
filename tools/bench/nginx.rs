//! nginx as a control: a web server in C that returns a constant.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::peers::{free_address, is_installed as is_on_path, wait_for};
use crate::side::Side;

pub(crate) fn is_installed() -> anyhow::Result<bool> {
    is_on_path("nginx")
}

/// Starts nginx with one worker and no log. It returns a constant of `length` bytes at `/random`.
pub(crate) fn constant(dir: &Path, length: usize) -> anyhow::Result<Side> {
    let address = free_address()?;
    let dir = dir.join("nginx");
    fs::create_dir_all(&dir)?;
    let body = "x".repeat(length);
    // In one process, so that its CPU time is the server's. By default, nginx closes a connection after 1,000
    // requests.
    let settings = format!(
        "daemon off; master_process off; error_log stderr crit; pid nginx.pid;
         events {{ worker_connections 1024; }}
         http {{
             access_log off;
             keepalive_requests 1000000000;
             server {{
                 listen {address};
                 location = /random {{ default_type application/json; return 200 '{body}'; }}
             }}
         }}"
    );
    fs::write(dir.join("nginx.conf"), settings)?;
    let process = Command::new("nginx")
        .args(["-c", "nginx.conf", "-p"])
        .arg(dir.canonicalize()?)
        .stdout(Stdio::null())
        .spawn()?;
    let side = Side::of(process, address);
    wait_for(address)?;
    Ok(side)
}
