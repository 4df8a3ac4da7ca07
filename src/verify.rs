//! Whether a folder is what it should be: every file whole, every number of a shard in the ledger, once
//! and for that shard alone, and all that is counted counted right. Changes nothing. Reads each row
//! once, and keeps only sums: numbers are looked up one by one where the sums of a shard and of its
//! batch in the ledger differ.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::batch::{BatchId, Generation, ShardIndex};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::folder::{self, PoolPaths};
use crate::ledger::{Drawn, Ledger, LedgerError};
use crate::shard::{self, Audit, Label, ShardError};
use crate::space::{Space, Value};
use crate::sqlite;

/// Violations of one kind in one file that are written out; the rest are counted.
const LINES_MAX: u64 = 10;

/// What a full reading of a folder found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The pools that could be read.
    pub pools: Vec<PoolSum>,
    /// What is worth knowing and no violation.
    pub notes: Vec<String>,
    /// By file and kind.
    violations: BTreeMap<(String, &'static str), Violations>,
}

#[derive(Debug, Default)]
struct Violations {
    lines: Vec<String>,
    count: u64,
}

/// Where the numbers of a pool are.
#[derive(Clone, Debug)]
pub struct PoolSum {
    /// Which pool.
    pub pool: PoolName,
    /// Its range.
    pub space: Space,
    /// Not to come any more: handed out, or burned.
    pub issued: u64,
    /// Of those, at most so many were burned and not handed out, as far as anyone counted.
    pub burned: u64,
    /// In shards and unused.
    pub pooled: u64,
    /// Not in the ledger.
    pub free: u64,
}

impl fmt::Display for PoolSum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, space, issued, burned, pooled, free } = self;
        let range = space.size();
        write!(
            formatter,
            "{pool}: {issued} issued + {pooled} pooled + {free} free = {range}, the range {space}"
        )?;
        match burned {
            0 => Ok(()),
            burned => write!(formatter, "; of the issued, at most {burned} were burned"),
        }
    }
}

impl Findings {
    fn violation(&mut self, file: &str, kind: &'static str, what: &str) {
        let violations = self.violations.entry((file.to_owned(), kind)).or_default();
        violations.count += 1;
        if violations.count <= LINES_MAX {
            violations.lines.push(format!("{file}: {what}"));
        }
    }

    /// How many violations there are in all.
    #[must_use]
    pub fn violation_count(&self) -> u64 {
        self.violations.values().map(|violations| violations.count).sum()
    }

    /// The violations, one a line; after the first ten of a kind in a file only how many they are.
    #[must_use]
    pub fn violation_lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for ((file, kind), violations) in &self.violations {
            lines.extend(violations.lines.iter().cloned());
            if violations.count > LINES_MAX {
                lines.push(format!("{file}: {kind}: {} in all", violations.count));
            }
        }
        lines
    }
}

/// Reads all of a folder that this process has locked, or that nobody else knows of.
///
/// # Errors
/// The folder can't be listed. What is wrong with a file is a violation.
pub fn check(path: &Path) -> Result<Findings, FileError> {
    let survey = folder::survey(path)?;
    let mut findings = Findings::default();
    for (pool, shards) in &survey.pools {
        check_pool(&PoolPaths::new(path, pool), shards.iter().copied(), &mut findings);
    }
    for file in survey.set_aside {
        findings.notes.push(format!(
            "{file} was set aside as damaged or as an old copy, and is never served"
        ));
    }
    for file in survey.others {
        findings.notes.push(format!("{file} is no file of tombola's, and was not looked at"));
    }
    if let Some(file) = survey.store {
        findings.notes.push(format!(
            "{file} is of a mode below sharded, and was not looked at: its server checks it at each start"
        ));
    }
    Ok(findings)
}

fn check_pool(
    paths: &PoolPaths,
    shards: impl Iterator<Item = ShardIndex>,
    findings: &mut Findings,
) {
    let name = file_name(&paths.ledger());
    let opened = Ledger::open_to_look(&paths.ledger()).and_then(|ledger| {
        let batches = ledger.audit(&mut |kind, what| findings.violation(&name, kind, &what))?;
        Ok((ledger, batches))
    });
    let (ledger, batches) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            findings.violation(&name, "not readable", &error.to_string());
            return;
        }
    };
    let mut pool = PoolCheck { paths, ledger: &ledger, batches, files: Vec::new(), findings };
    for index in shards {
        pool.check_shard(index);
    }
    pool.sum_up();
}

/// The work on one pool.
struct PoolCheck<'p> {
    paths: &'p PoolPaths,
    ledger: &'p Ledger,
    batches: Vec<Drawn>,
    /// What was found in the files that can be served.
    files: Vec<Audit>,
    findings: &'p mut Findings,
}

impl PoolCheck<'_> {
    fn check_shard(&mut self, index: ShardIndex) {
        let standby = self.check_file(index, &self.paths.standby(index));
        let live = self.check_file(index, &self.paths.live(index));
        let unfinished = self.paths.unfinished(index);
        if files::length_bytes(&unfinished).is_ok_and(|length| length.is_some()) {
            self.check_unfinished(index, &unfinished);
        }
        if let Some(live) = live
            && let Err(error) =
                folder::refuse_stale(self.paths, self.ledger, &live, standby.as_ref())
        {
            let name = self.paths.shard_name(index);
            self.findings.violation(&name, "an old copy", &error.to_string());
        }
    }

    /// What a start would adopt, if the ledger has it, or else remove.
    fn check_unfinished(&mut self, index: ShardIndex, path: &Path) {
        let known = shard::read_label(path)
            .is_ok_and(|label| self.batches.iter().any(|drawn| drawn.batch.id == label.batch));
        if known {
            self.check_file(index, path);
        } else {
            let name = file_name(path);
            self.findings.notes.push(format!("{name} is an unfinished build: a start removes it"));
        }
    }

    fn check_file(&mut self, index: ShardIndex, path: &Path) -> Option<Label> {
        if !files::length_bytes(path).is_ok_and(|length| length.is_some()) {
            return None;
        }
        let name = file_name(path);
        match self.audit(&name, path) {
            Ok(audit) => {
                let label = audit.label.clone();
                let refused =
                    folder::refuse_unexpected(self.paths, self.ledger, index, path, &label);
                if let Err(error) = refused {
                    self.findings.violation(
                        &name,
                        "not expected by the ledger",
                        &error.to_string(),
                    );
                } else if self.files.iter().any(|file| file.label.batch == label.batch) {
                    let what = format!("another file has its batch {}, too", label.batch.0);
                    self.findings.violation(&name, "numbers in two shards", &what);
                } else {
                    self.files.push(audit);
                }
                Some(label)
            }
            Err(error) => {
                self.findings.violation(&name, "not readable", &error.to_string());
                None
            }
        }
    }

    fn audit(&mut self, name: &str, path: &Path) -> Result<Audit, VerifyError> {
        sqlite::check_log(path)?.map_err(ShardError::Damaged)?;
        let connection = sqlite::open_to_look(path).map_err(ShardError::from)?;
        let audit =
            shard::audit(&connection, |value| self.ledger.hash(value), &mut |kind, what| {
                self.findings.violation(name, kind, &what)
            })?;
        let drawn = self.batches.iter().find(|drawn| drawn.batch.id == audit.label.batch);
        if let Some(drawn) = drawn.copied()
            && drawn.tally != audit.tally
        {
            self.look_up_each(name, &connection, &drawn)?;
        }
        Ok(audit)
    }

    /// Names the numbers by which a shard and its batch in the ledger differ.
    fn look_up_each(
        &mut self,
        name: &str,
        connection: &sqlite::rusqlite::Connection,
        drawn: &Drawn,
    ) -> Result<(), VerifyError> {
        let space = *self.ledger.space();
        let mut both = 0;
        let mut failed = None;
        let mut look_up = |value: Value| match self.ledger.batch_of(value) {
            Ok(Some(batch)) if batch == drawn.batch.id => both += 1,
            Ok(Some(BatchId(other))) => {
                let number = space.number(value);
                let what = format!(
                    "{number} is in the ledger for batch {other}, not for its own, {}: another shard \
                     may have it",
                    drawn.batch.id.0
                );
                self.findings.violation(name, "a number of another batch", &what);
            }
            Ok(None) => {
                let what = format!("{} is not in the ledger", space.number(value));
                self.findings.violation(name, "a number that the ledger does not have", &what);
            }
            Err(error) => failed = Some(error),
        };
        shard::each_value(connection, &mut look_up)?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let twice = shard::twice(connection, LINES_MAX as usize)?;
        for &value in &twice {
            let what = format!("{} stands in it twice", space.number(value));
            self.findings.violation(name, "a number twice", &what);
        }
        if twice.is_empty() && both < drawn.tally.count {
            let (count, id) = (drawn.tally.count - both, drawn.batch.id.0);
            let what = format!("{count} numbers of its batch {id} are in the ledger and not in it");
            self.findings.violation(name, "numbers that it lacks", &what);
        }
        Ok(())
    }

    fn sum_up(self) {
        let Self { paths, ledger, batches, files, findings } = self;
        let pooled: u64 = files.iter().map(|file| file.unused).sum();
        let used: u64 = files.iter().map(|file| file.tally.count - file.unused).sum();
        let here = |id: BatchId| files.iter().any(|file| file.label.batch == id);
        let gone = batches.iter().filter(|drawn| !here(drawn.batch.id));
        let gone: u64 = gone.map(|drawn| drawn.batch.count).sum();
        for Drawn { batch, .. } in &batches {
            let newest = files.iter().filter(|file| file.label.index == batch.shard);
            let newest = newest.map(|file| file.label.generation).max().unwrap_or(Generation(0));
            if batch.generation > newest {
                findings.notes.push(format!(
                    "generation {} of {} has no file: what was not issued of its {} numbers never comes",
                    batch.generation.0,
                    paths.shard_name(batch.shard),
                    batch.count
                ));
            }
        }
        let space = *ledger.space();
        let sum = PoolSum {
            pool: paths.pool().clone(),
            space,
            issued: used + gone,
            burned: ledger.burned() + files.iter().map(|file| file.open_rows).sum::<u64>(),
            pooled,
            free: space.size() - ledger.count(),
        };
        if sum.issued + sum.pooled + sum.free != space.size() {
            let found = sum.issued + sum.pooled + sum.free;
            let what = format!("issued, pooled and free are {found}, not {}", space.size());
            findings.violation(&file_name(&paths.ledger()), "a wrong sum", &what);
        }
        findings.pools.push(sum);
    }
}

/// Why a file could not be read to its end.
#[derive(Debug, thiserror::Error)]
enum VerifyError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("it can't be read: {0}")]
    Shard(#[from] ShardError),
}

fn file_name(path: &Path) -> String {
    path.file_name().map(PathBuf::from).unwrap_or_default().display().to_string()
}
