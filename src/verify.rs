//! Checks a whole folder: that every file is intact, that every number of a shard is in the ledger exactly
//! once and for that shard, that all counts are right, and that no number of a receipt can be handed out again.
//! Changes nothing. Reads each row once and keeps only sums. Numbers are looked up one by one only if the sums of
//! a shard and of its batch in the ledger differ.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::batch::{BatchId, Generation, ShardIndex};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::folder::{self, Known, PoolPaths, RECEIPTS};
use crate::ledger::{Drawn, Ledger, LedgerError};
use crate::receipts::{self, Checked, FileReader, Origin};
use crate::shard::{self, Audit, Label, Mark, ShardError, UnusedValues};
use crate::space::{Space, Value};
use crate::sqlite;

/// The number of violations of one kind in one file that are listed. The rest are counted.
const LINES_MAX: u64 = 10;

/// The file descriptors of a check besides those of the shards.
const OWN_FILES: u64 = 64;

/// The result of checking a folder.
#[derive(Debug, Default)]
pub struct Findings {
    /// The pools that could be read.
    pub pools: Vec<PoolSum>,
    /// The receipts, if they could be read.
    pub receipts: Option<ReceiptsSum>,
    /// Remarks that are not violations.
    pub notes: Vec<String>,
    /// Violations by file and kind.
    violations: BTreeMap<(String, &'static str), Violations>,
}

#[derive(Debug, Default)]
struct Violations {
    lines: Vec<String>,
    count: u64,
}

/// The sums of a pool's numbers.
#[derive(Clone, Debug)]
pub struct PoolSum {
    pub pool: PoolName,
    /// Its range.
    pub space: Space,
    /// Numbers that were handed out or burned.
    pub issued: u64,
    /// The part of `issued` that was burned, at most, as far as it was counted.
    pub burned: u64,
    /// The part of `issued` that was imported.
    pub imported: u64,
    /// Unused numbers in shards.
    pub pooled: u64,
    /// Numbers that are not in the ledger.
    pub free: u64,
}

impl fmt::Display for PoolSum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, space, issued, burned, imported, pooled, free } = self;
        let range = space.size();
        write!(
            formatter,
            "{pool}: {issued} issued + {pooled} pooled + {free} free = {range}, the range {space}"
        )?;
        if *burned > 0 {
            write!(formatter, "; at most {burned} of the issued were burned")?;
        }
        if *imported > 0 {
            write!(formatter, "; {imported} of the issued were imported")?;
        }
        Ok(())
    }
}

/// The sums of the receipts.
#[derive(Clone, Copy, Debug)]
pub struct ReceiptsSum(Checked);

impl fmt::Display for ReceiptsSum {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
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

    pub fn violation_count(&self) -> u64 {
        self.violations.values().map(|violations| violations.count).sum()
    }

    /// Returns the violations, one a line. After the first ten of a kind in a file, only their number
    /// follows.
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

/// Checks a folder that this process has locked or created.
///
/// # Errors
/// Returns [`FileError`] if the folder can't be listed. A problem with a file is a violation instead.
pub(crate) fn check(path: &Path) -> Result<Findings, FileError> {
    let survey = folder::survey(path)?;
    let mut findings = Findings::default();
    let mut files = Vec::new();
    for (pool, shards) in &survey.pools {
        let paths = PoolPaths::new(path, pool);
        files.extend(check_pool(&paths, shards.iter().copied(), &mut findings));
    }
    if survey.receipts
        && let Err(error) = check_receipts(&path.join(RECEIPTS), &files, &mut findings)
    {
        findings.violation(RECEIPTS, "not readable", &error.to_string());
    }
    for file in survey.set_aside {
        findings.notes.push(format!(
            "{file} was set aside as damaged or as an old copy, and is never served"
        ));
    }
    for file in survey.others {
        findings.notes.push(format!("{file} is not a file of tombola and was not checked"));
    }
    if let Some(file) = survey.store {
        findings.notes.push(format!(
            "{file} is of a mode below sharded and was not checked: its server checks it at each start"
        ));
    }
    Ok(findings)
}

/// A shard's file that could be read.
struct ShardFile {
    pool: PoolName,
    space: Space,
    path: PathBuf,
}

/// Checks a pool. Returns the files of its shards that could be read.
fn check_pool(
    paths: &PoolPaths,
    shards: impl Iterator<Item = ShardIndex>,
    findings: &mut Findings,
) -> Vec<ShardFile> {
    let name = file_name(&paths.ledger());
    let opened = Ledger::open_to_look(&paths.ledger()).and_then(|ledger| {
        let batches = ledger.audit(&mut |kind, what| findings.violation(&name, kind, &what))?;
        Ok((ledger, batches))
    });
    let (ledger, batches) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            findings.violation(&name, "not readable", &error.to_string());
            return Vec::new();
        }
    };
    let (files, readable) = (Vec::new(), Vec::new());
    let mut pool = PoolCheck { paths, ledger: &ledger, batches, files, readable, findings };
    for index in shards {
        pool.check_shard(index);
    }
    let file = |path| ShardFile { pool: paths.pool().clone(), space: ledger.space().clone(), path };
    let readable = pool.readable.drain(..).map(file).collect();
    pool.sum_up();
    readable
}

/// Checks the receipts, and that their numbers are not unused in these files. Whether the ledgers have these numbers
/// is not checked: in a fleet, an instance that began again keeps receipts of numbers that its ledgers never had.
fn check_receipts(
    path: &Path,
    files: &[ShardFile],
    findings: &mut Findings,
) -> Result<(), VerifyError> {
    // Each file of a shard is open, and another one in which SQLite sorts its values. If this fails, opening fails.
    let _ = rlimit::increase_nofile_limit(OWN_FILES + 2 * files.len() as u64);
    let connections = files.iter().map(|file| sqlite::open_to_look(&file.path));
    let connections = connections.collect::<Result<Vec<_>, _>>().map_err(ShardError::from)?;
    let selects = connections.iter().map(shard::select_unused);
    let mut selects = selects.collect::<Result<Vec<_>, _>>()?;
    let unused = selects.iter_mut().map(UnusedValues::new).collect::<Result<Vec<_>, _>>()?;
    let mut pools: BTreeMap<&PoolName, Vec<_>> = BTreeMap::new();
    for (file, values) in files.iter().zip(unused) {
        pools.entry(&file.pool).or_default().push((file, values));
    }
    let mut failed = None;
    let mut unused = |origin: &Origin, value| {
        for (file, values) in pools.get_mut(&origin.pool).into_iter().flatten() {
            if origin.is(&file.pool, &file.space) {
                match values.has(value) {
                    Ok(false) => {}
                    Ok(true) => return Some(file_name(&file.path)),
                    Err(error) => failed = Some(error),
                }
            }
        }
        None
    };
    let checked = FileReader::new(path, false)
        .check(&mut unused, &mut |kind, what| findings.violation(RECEIPTS, kind, &what))?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    if let Some(Checked { not_compared: count @ 1.., .. }) = checked {
        findings.notes.push(format!(
            "{count} numbers of receipts were not compared with each other and with the shards, because they are \
             not in the index: set receipts.lookups = true and start the server once"
        ));
    }
    findings.receipts = checked.map(ReceiptsSum);
    Ok(())
}

/// The check of one pool in progress.
struct PoolCheck<'p> {
    paths: &'p PoolPaths,
    ledger: &'p Ledger,
    batches: Vec<Drawn>,
    /// The results for the files that can be served.
    files: Vec<Audit>,
    /// All files that could be read.
    readable: Vec<PathBuf>,
    findings: &'p mut Findings,
}

impl PoolCheck<'_> {
    fn check_shard(&mut self, index: ShardIndex) {
        let standby = self.check_file(index, &self.paths.standby(index));
        let live = self.check_file(index, &self.paths.live(index));
        let unfinished = self.paths.unfinished(index);
        let unfinished = match files::length_bytes(&unfinished) {
            Ok(Some(_)) => self.check_unfinished(index, &unfinished),
            Ok(None) | Err(_) => None,
        };
        if let Some(live) = live {
            // A start would make the unfinished build the standby.
            let standby = standby.or(unfinished).map(|standby| standby.label);
            let known = self.known(index, &live.label);
            let current = known.and_then(|known| {
                known.is_current(&live.label, live.token, live.in_use, standby.as_ref())
            });
            if let Err(problem) = current {
                self.findings.violation(&self.paths.shard_name(index), "an old copy", &problem);
            }
        }
    }

    /// Reads the ledger's records of a shard and of the batch in this label.
    fn known(&self, index: ShardIndex, label: &Label) -> Result<Known, String> {
        let (pool, batch) = (self.paths.pool(), label.batch);
        Known::of(self.ledger, pool, index, &[batch], Some(batch))
            .map_err(|error| error.to_string())
    }

    /// Checks an unfinished build if the ledger has its batch, since a start would adopt it. Otherwise a
    /// start would remove it.
    fn check_unfinished(&mut self, index: ShardIndex, path: &Path) -> Option<Audit> {
        let known = shard::read_label(path)
            .is_ok_and(|label| self.batches.iter().any(|drawn| drawn.id == label.batch));
        if known {
            return self.check_file(index, path);
        }
        let name = file_name(path);
        self.findings.notes.push(format!("{name} is an unfinished build: a start removes it"));
        None
    }

    fn check_file(&mut self, index: ShardIndex, path: &Path) -> Option<Audit> {
        if !files::length_bytes(path).is_ok_and(|length| length.is_some()) {
            return None;
        }
        let name = file_name(path);
        match self.audit(&name, path) {
            Ok(audit) => {
                self.readable.push(path.to_owned());
                let label = &audit.label;
                let expected = self.known(index, label).and_then(|known| known.expects(label));
                if let Err(problem) = expected {
                    self.findings.violation(&name, "not expected by the ledger", &problem);
                } else if self.files.iter().any(|file| file.label.batch == label.batch) {
                    let what = format!("another file has its batch {} too", label.batch.0);
                    self.findings.violation(&name, "numbers in two shards", &what);
                } else {
                    self.files.push(audit.clone());
                }
                Some(audit)
            }
            Err(error) => {
                self.findings.violation(&name, "not readable", &error.to_string());
                None
            }
        }
    }

    fn audit(&mut self, name: &str, path: &Path) -> Result<Audit, VerifyError> {
        let connection = sqlite::open_to_look(path).map_err(ShardError::from)?;
        let audit =
            shard::audit(&connection, |value| self.ledger.hash(value), &mut |kind, what| {
                self.findings.violation(name, kind, &what)
            })?;
        let drawn = self.batches.iter().find(|drawn| drawn.id == audit.label.batch);
        if let Some(drawn) = drawn.copied() {
            if drawn.tally != audit.tally {
                self.look_up_each(name, &connection, &drawn)?;
            }
            if drawn.marked != audit.imported {
                self.look_up_imported(name, &connection, &drawn)?;
            }
        }
        Ok(audit)
    }

    /// Reports the imported numbers of a batch that are unused in its file.
    fn look_up_imported(
        &mut self,
        name: &str,
        connection: &sqlite::rusqlite::Connection,
        drawn: &Drawn,
    ) -> Result<(), VerifyError> {
        let imported = self.ledger.imported(drawn.id)?;
        let space = self.ledger.space();
        shard::each_value(connection, |value, mark| {
            if mark == Some(Mark::Unused) && imported.binary_search(&value).is_ok() {
                let what = format!("{} was imported but is unused", space.number(value));
                self.findings.violation(name, "an imported number that is unused", &what);
            }
        })?;
        Ok(())
    }

    /// Reports the numbers by which a shard and its batch in the ledger differ.
    fn look_up_each(
        &mut self,
        name: &str,
        connection: &sqlite::rusqlite::Connection,
        drawn: &Drawn,
    ) -> Result<(), VerifyError> {
        let space = self.ledger.space().clone();
        let mut both = 0;
        let mut failed = None;
        let look_up = |value: Value, _| match self.ledger.batch_of(value) {
            Ok(Some(batch)) if batch == drawn.id => both += 1,
            Ok(Some(BatchId(other))) => {
                let number = space.number(value);
                let what = format!(
                    "{number} is in the ledger for batch {other}, not for its own, {}: another shard \
                     may contain it",
                    drawn.id.0
                );
                self.findings.violation(name, "a number of another batch", &what);
            }
            Ok(None) => {
                let what = format!("{} is not in the ledger", space.number(value));
                self.findings.violation(name, "a number that the ledger does not have", &what);
            }
            Err(error) => failed = Some(error),
        };
        shard::each_value(connection, look_up)?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        let twice = shard::twice(connection, LINES_MAX as usize)?;
        for &value in &twice {
            let what = format!("{} is in it twice", space.number(value));
            self.findings.violation(name, "a number twice", &what);
        }
        if twice.is_empty() && both < drawn.tally.count {
            let (count, id) = (drawn.tally.count - both, drawn.id.0);
            let what = format!("{count} numbers of its batch {id} are in the ledger but not in it");
            self.findings.violation(name, "numbers that it lacks", &what);
        }
        Ok(())
    }

    fn sum_up(self) {
        let Self { paths, ledger, batches, files, findings, .. } = self;
        let pooled = total(files.iter().map(|file| file.unused));
        let used = total(files.iter().map(|file| file.tally.count - file.unused));
        let here = |id: BatchId| files.iter().any(|file| file.label.batch == id);
        let gone = batches.iter().filter(|drawn| !here(drawn.id));
        let gone = total(gone.map(|drawn| drawn.count));
        let imported = batches.iter().map(|drawn| match drawn.file {
            Some(_) => drawn.marked.count,
            None => drawn.count,
        });
        for drawn in &batches {
            let Some((shard, generation)) = drawn.file else { continue };
            let newest = files.iter().filter(|file| file.label.index == shard);
            let newest = newest.map(|file| file.label.generation).max().unwrap_or(Generation(0));
            if generation > newest {
                findings.notes.push(format!(
                    "generation {} of {} has no file: the unissued ones of its {} numbers are lost",
                    generation.0,
                    paths.shard_name(shard),
                    drawn.count
                ));
            }
        }
        let name = file_name(&paths.ledger());
        match ledger.has_open_import() {
            Ok(true) => findings.notes.push(format!(
                "{name}: an import was interrupted, so numbers that it should have marked may still be issued: \
                 run it again"
            )),
            Ok(false) => {}
            Err(error) => findings.violation(&name, "not readable", &error.to_string()),
        }
        let space = ledger.space().clone();
        let sum = PoolSum {
            pool: paths.pool().clone(),
            space: space.clone(),
            issued: total([used, gone]),
            burned: total(files.iter().map(|file| file.open_rows).chain([ledger.burned()])),
            imported: total(imported),
            pooled,
            free: space.size() - ledger.count(),
        };
        let found = total([sum.issued, sum.pooled, sum.free]);
        if found != space.size() {
            let what = format!("issued, pooled and free add up to {found}, not {}", space.size());
            findings.violation(&name, "a wrong sum", &what);
        }
        findings.pools.push(sum);
    }
}

/// The reason that a file could not be read to its end.
#[derive(Debug, thiserror::Error)]
enum VerifyError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error("it can't be read: {0}")]
    Shard(#[from] ShardError),
    #[error(transparent)]
    Receipts(#[from] receipts::OpenError),
}

/// Returns the sum of the counts, or `u64::MAX` if it overflows: a damaged file may contain any count.
fn total(counts: impl IntoIterator<Item = u64>) -> u64 {
    counts.into_iter().fold(0, u64::saturating_add)
}

fn file_name(path: &Path) -> String {
    path.file_name().map(PathBuf::from).unwrap_or_default().display().to_string()
}
