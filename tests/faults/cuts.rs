//! Thousands of power losses in one recorded run. Knows nothing of SQLite and the product: the caller's
//! verdict says what must hold after a loss.
//!
//! `FAULTS_CUTS=N` sets the number of cuts, `FAULTS_SEED=N` the first seed. A failure prints
//! `FAULTS_REPLAY=FILE:SEED`. Put before the test's command, it repeats that cut of that recording exactly,
//! whatever threads and random numbers did when it was made.

use std::any::Any;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::thread;

use rand::seq::IndexedRandom as _;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::disk::{Device, Disk};
use crate::medium::Op;
use crate::recording::Recording;

/// Checks a disk that lost its power after these promises. An error says what does not hold; a panic counts
/// as an error.
pub(crate) trait Verdict: Fn(&Disk, &[&str]) -> Result<(), String> + Sync {}

impl<F: Fn(&Disk, &[&str]) -> Result<(), String> + Sync> Verdict for F {}

/// The moment and the outcome of a power loss. Both follow from the seed.
#[derive(Clone, Copy, Debug)]
struct Cut {
    point: usize,
    seed: u64,
}

#[derive(Debug)]
pub(crate) struct Failure {
    cut: Cut,
    pub(crate) why: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}, after operation {}: {}", self.cut.seed, self.cut.point, self.why)
    }
}

/// Cuts a run at random moments, and panics if the verdict fails.
///
/// # Panics
/// The message contains the command that repeats the first failure.
pub(crate) fn survive(
    test: &str,
    device: Device,
    cuts: u64,
    record: impl FnOnce() -> Recording,
    verdict: impl Verdict,
) {
    if let Some((recording, seed)) = replay_wanted(test) {
        let failures = failures(&recording, device, seed..seed + 1, &verdict);
        assert!(failures.is_empty(), "replayed: {}", failures[0]);
        return;
    }
    let recording = record();
    let failures = failures(&recording, device, seeds(cuts), verdict);
    let Some(first) = failures.first() else {
        return;
    };
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}.recording"));
    fs::write(&file, recording.to_text()).expect("the target folder is writable");
    panic!(
        "{} of {} cuts failed; {first}\nto repeat: FAULTS_REPLAY={}:{} cargo test --test faults {test}",
        failures.len(),
        variable("FAULTS_CUTS").unwrap_or(cuts),
        file.display(),
        first.cut.seed,
    );
}

/// Returns the seeds to try: `cuts` of them, unless the environment sets another number.
fn seeds(cuts: u64) -> Range<u64> {
    let first = variable("FAULTS_SEED").unwrap_or(1);
    first..first + variable("FAULTS_CUTS").unwrap_or(cuts)
}

/// Returns the cuts after which the verdict fails, in the order of their seeds.
pub(crate) fn failures(
    recording: &Recording,
    device: Device,
    seeds: Range<u64>,
    verdict: impl Verdict,
) -> Vec<Failure> {
    let moments = Moments::of(recording);
    let mut cuts: Vec<Cut> = seeds.map(|seed| moments.draw(seed)).collect();
    cuts.sort_by_key(|cut| cut.point);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let mut failures: Vec<Failure> = thread::scope(|scope| {
        let verdict = &verdict;
        let workers: Vec<_> = cuts
            .chunks(cuts.len().div_ceil(threads).max(1))
            .map(|cuts| scope.spawn(move || try_all(recording, device, cuts, verdict)))
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("caught inside")).collect()
    });
    failures.sort_by_key(|failure| failure.cut.seed);
    failures
}

/// Cuts a disk's run at a random moment. Returns the disk after it, and the promises made before.
pub(crate) fn cut_somewhere(disk: &Disk, seed: u64) -> (Disk, Vec<String>) {
    let device = disk.shared.device;
    disk.power_off();
    let recording = disk.recording();
    let cut = Moments::of(&recording).draw(seed);
    let next = Disk::boot_on(&recording.cut(cut.point, seed, device), device);
    (next, recording.notes(cut.point).into_iter().map(str::to_owned).collect())
}

/// The moments at which to cut a recording. Most operations are writes, and a rename whose folder has to be
/// synced is one in thousands: moments drawn evenly would rarely hit it.
struct Moments {
    all: usize,
    /// The moments before and after operations that are not writes.
    turns: Vec<usize>,
    /// The moments before and after operations that change or sync names.
    names: Vec<usize>,
}

impl Moments {
    fn of(recording: &Recording) -> Self {
        let is_write = |op: &Op| matches!(op, Op::Write { .. } | Op::ChangePage { .. });
        let is_file = |op: &Op| {
            matches!(op, Op::SyncFile { .. } | Op::FailSync { .. } | Op::SetLength { .. })
        };
        Self {
            all: recording.len(),
            turns: recording.moments(|op| !is_write(op)),
            names: recording.moments(|op| !is_write(op) && !is_file(op)),
        }
    }

    fn draw(&self, seed: u64) -> Cut {
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let chosen = match random.random_range(0..4) {
            0 => self.turns.choose(&mut random),
            1 => self.names.choose(&mut random),
            _ => None,
        };
        let point = chosen.copied().unwrap_or_else(|| random.random_range(0..=self.all));
        Cut { point, seed }
    }
}

/// Tries cuts, which are in the order of their points.
fn try_all(
    recording: &Recording,
    device: Device,
    cuts: &[Cut],
    verdict: &impl Verdict,
) -> Vec<Failure> {
    let mut playback = recording.playback();
    let mut failures = Vec::new();
    for &cut in cuts {
        playback.advance(cut.point);
        let disk = Disk::boot_on(&device.cut(playback.medium(), cut.seed), device);
        let notes = recording.notes(cut.point);
        let result = catch_unwind(AssertUnwindSafe(|| verdict(&disk, &notes)));
        let result = result.unwrap_or_else(|panic| Err(said(panic.as_ref())));
        failures.extend(result.err().map(|why| Failure { cut, why }));
    }
    failures
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a message"))
}

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

fn replay_wanted(test: &str) -> Option<(Recording, u64)> {
    let value = std::env::var("FAULTS_REPLAY").ok()?;
    let (file, seed) = value.rsplit_once(':').expect("FAULTS_REPLAY=FILE:SEED");
    // The command may also run other tests, whose names have this one as a prefix.
    if Path::new(file).file_stem()? != test {
        return None;
    }
    let text = fs::read_to_string(file).expect("FAULTS_REPLAY names a file");
    let recording = Recording::from_text(&text).expect("FAULTS_REPLAY names a recording");
    Some((recording, seed.parse().expect("FAULTS_REPLAY ends in a seed")))
}
