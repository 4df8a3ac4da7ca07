//! The processes under measurement: how they start and end, and their CPU time and memory.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Clock ticks of `/proc/PID/stat` in a second: `USER_HZ`, 100 on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// A server under measurement. It is killed when dropped.
#[derive(Debug)]
pub(crate) struct Side {
    process: Child,
    pub(crate) address: SocketAddr,
}

/// The folder of a product run and its settings, those that differ from the defaults.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) dir: PathBuf,
    settings: PathBuf,
}

impl Site {
    /// Removes what a run before has left, and writes the settings.
    pub(crate) fn new(bench: &Path, name: &str, settings: &str) -> anyhow::Result<Self> {
        let dir = bench.join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("can't empty {}", dir.display()))?;
        }
        let file = bench.join(format!("{name}.toml"));
        fs::write(&file, settings)?;
        Ok(Self { dir, settings: file })
    }

    /// Writes the settings again.
    pub(crate) fn configure(&self, settings: &str) -> anyhow::Result<()> {
        Ok(fs::write(&self.settings, settings)?)
    }

    /// Fills all shards. Returns how long that took, and the process's peak memory in bytes.
    pub(crate) fn fill(&self) -> anyhow::Result<(Duration, u64)> {
        let started = Instant::now();
        let mut command = self.command(env!("CARGO_BIN_EXE_init-shards"));
        let mut process = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let (status, peak) = wait(&mut process)?;
        ensure!(status.success(), "init-shards failed: {status}");
        Ok((started.elapsed(), peak))
    }

    /// Starts a server on the folder.
    pub(crate) fn serve(&self) -> anyhow::Result<Side> {
        let mut command = self.command(env!("CARGO_BIN_EXE_tombola"));
        command.args(["--listen", "127.0.0.1:0"]).env("RUST_LOG", "warn");
        Side::start(&mut command)
    }

    /// Removes the folder. The next process on it creates it.
    pub(crate) fn clear(&self) -> anyhow::Result<()> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        Ok(())
    }

    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        self.flags(&mut command);
        command
    }

    /// Adds the flags that name the settings and the folder.
    pub(crate) fn flags<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.arg("--config").arg(&self.settings).arg("--data-dir").arg(&self.dir);
        command.stdout(Stdio::piped())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // Gigabytes that are no longer needed.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Side {
    /// Starts a server that prints its address at the end of its first line.
    pub(crate) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().expect("it is piped")).read_line(&mut line)?;
        let address = line.trim().rsplit_once('/').and_then(|(_, address)| address.parse().ok());
        let address = address.with_context(|| format!("no address in {line:?}"))?;
        Ok(Self { process, address })
    }

    /// Wraps a server process that listens on this address.
    pub(crate) fn of(process: Child, address: SocketAddr) -> Self {
        Self { process, address }
    }

    /// Starts this program's own server of a constant of `length` bytes.
    pub(crate) fn constant(length: usize) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        Self::start(Command::new(program).arg("constant").arg(length.to_string()))
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Returns the user and system time of the process so far, in seconds.
    pub(crate) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        cpu_seconds(self.process.id())
    }

    /// Returns the peak memory of the process so far, in bytes.
    pub(crate) fn peak_memory(&self) -> anyhow::Result<u64> {
        peak_memory(self.process.id()).context("/proc/PID/status has no VmHWM")
    }

    /// Stops it gracefully.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGTERM)?;
        self.process.wait()?;
        Ok(())
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits for the end of a process. Returns its status, and its peak memory in bytes.
pub(crate) fn wait(process: &mut Child) -> anyhow::Result<(ExitStatus, u64)> {
    let mut peak = 0;
    loop {
        if let Some(status) = process.try_wait()? {
            return Ok((status, peak));
        }
        peak = peak.max(peak_memory(process.id()).unwrap_or(0));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Returns the user and system time of a process so far, in seconds.
pub(crate) fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name, in parentheses, may hold anything; utime and stime are the 12th and 13th after it.
    let (_, rest) = stat.rsplit_once(')').context("/proc/PID/stat has no name")?;
    let ticks: Vec<f64> =
        rest.split_whitespace().skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<f64>() / TICKS_PER_SECOND)
}

fn peak_memory(pid: u32) -> Option<u64> {
    status(pid, "VmHWM:").map(|kilobytes| kilobytes * 1024)
}

/// Returns the resident memory of a process in bytes.
pub(crate) fn resident_memory(pid: u32) -> anyhow::Result<u64> {
    let kilobytes = status(pid, "VmRSS:").context("/proc/PID/status has no VmRSS")?;
    Ok(kilobytes * 1024)
}

/// Returns the number of threads of a process.
pub(crate) fn threads(pid: u32) -> anyhow::Result<u64> {
    status(pid, "Threads:").context("/proc/PID/status has no Threads")
}

/// Returns the number of open files of a process.
pub(crate) fn open_files(pid: u32) -> anyhow::Result<u64> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64)
}

/// Returns a number of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
