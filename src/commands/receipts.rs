//! `tombola receipts`: prints the receipts in constant memory, whether or not a server uses the folder, and erases
//! labels.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{ValueEnum, value_parser};
use console::{Alignment, Term, measure_text_width, pad_str, truncate_str};

use super::exit::{Ended, Exit};
use crate::config::{Config, Location, Overrides, PoolName, ReceiptStoreConfig};
use crate::files::{self, LockError};
use crate::folder::RECEIPTS;
use crate::http::push_csv_field;
#[cfg(feature = "postgres")]
use crate::receipts::PostgresReader;
use crate::receipts::{self, FileReader, Filter, Head, Receipt, ReceiptReader, StoreError};
use crate::space::Value;
use crate::sqlite;

/// The receipts that are read at once.
const PAGE_RECEIPTS: usize = 1000;

/// The numbers of a receipt that the table shows.
const NUMBERS_SHOWN: usize = 3;

/// The flags that select receipts.
const SELECTING: [&str; 6] = ["after", "limit", "label", "pool", "number", "format"];

#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    #[command(flatten)]
    location: Location,
    /// Format of the output [default: a table on a terminal, ndjson otherwise]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Only receipts after this one
    #[arg(long, value_name = "SEQ", value_parser = value_parser!(u64).range(..=i64::MAX as u64))]
    after: Option<u64>,
    /// Up to this many receipts
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Only receipts with this label
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// The pool of --number
    #[arg(long, value_name = "NAME", requires = "number")]
    pool: Option<String>,
    /// Only the receipt of this number or code
    #[arg(
        long, value_name = "TEXT", requires = "pool", allow_hyphen_values = true,
        conflicts_with_all = ["after", "limit", "label"]
    )]
    number: Option<String>,
    /// Print the number of the last receipt, and the digest that covers all receipts up to it
    #[arg(long, conflicts_with_all = SELECTING)]
    head: bool,
    /// Remove this label from all receipts for good; unless they are in a database, the server must not be running
    #[arg(long, value_name = "LABEL", conflicts_with_all = SELECTING, conflicts_with = "head")]
    erase_label: Option<String>,
    /// Compute the digests of all receipts in the database again; for a data folder, use tombola verify
    #[arg(
        long, conflicts_with_all = SELECTING, conflicts_with = "head", conflicts_with = "erase_label"
    )]
    verify: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Aligned columns, with the first numbers of each receipt
    Table,
    /// One JSON object a line, as GET /receipts sends it
    Ndjson,
    /// One line a number, after a line with the names of the fields
    Csv,
}

pub(super) fn run(flags: Flags) -> anyhow::Result<()> {
    sqlite::check_version().map_err(anyhow::Error::msg)?;
    let Flags { location, format, after, limit, label, pool, number, head, erase_label, verify } =
        flags;
    let config = Config::load(&Overrides { location, ..Overrides::default() })?;
    let source = Source::of(&config)?;
    if let Some(label) = erase_label {
        return erase(&source, &label);
    }
    if verify {
        return check(&source);
    }
    let reader = source.reader();
    let mut out = BufWriter::new(io::stdout().lock());
    let printed = match pool.zip(number) {
        _ if head => {
            reader.head().map_err(Into::into).and_then(|head| Ok(writeln!(out, "{head}")?))
        }
        Some((pool, number)) => {
            let receipt = of_number(&config, &*reader, &pool, &number)?;
            Printer::new(format).print(&[receipt], &mut out).map_err(Into::into)
        }
        None => {
            let filter = Filter { after: after.unwrap_or(0), label };
            print(&*reader, filter, limit.unwrap_or(usize::MAX), format, &mut out)
        }
    };
    super::unless_pipe_is_closed(printed.and_then(|()| Ok(out.flush()?)))
}

/// The place of the receipts.
enum Source {
    Folder(PathBuf),
    #[cfg(feature = "postgres")]
    Database(Box<PostgresReader>),
}

impl Source {
    fn of(config: &Config) -> anyhow::Result<Self> {
        match &config.receipts.store {
            ReceiptStoreConfig::Folder => Ok(Self::Folder(super::existing(config.dir.clone())?)),
            #[cfg(feature = "postgres")]
            ReceiptStoreConfig::Postgres(store) => {
                let space = config.fleet.as_ref().map(|fleet| &fleet.space);
                Ok(Self::Database(Box::new(PostgresReader::alone(store, space)?)))
            }
            #[cfg(not(feature = "postgres"))]
            ReceiptStoreConfig::Postgres(store) => {
                unreachable!("refused by the settings: {}", store.address)
            }
        }
    }

    fn reader(self) -> Box<dyn ReceiptReader> {
        match self {
            Self::Folder(dir) => Box::new(FolderReader(dir)),
            #[cfg(feature = "postgres")]
            Self::Database(reader) => reader,
        }
    }
}

/// Returns a reader of the receipts, for a command that has locked the data folder.
pub(super) fn locked_reader(config: &Config) -> anyhow::Result<Box<dyn ReceiptReader>> {
    Ok(match Source::of(config)? {
        Source::Folder(dir) => Box::new(FileReader::new(&dir.join(RECEIPTS), false)),
        #[cfg(feature = "postgres")]
        Source::Database(reader) => reader,
    })
}

fn erase(source: &Source, label: &str) -> anyhow::Result<()> {
    let (count, rest) = match source {
        Source::Folder(dir) => {
            let advice = "has its receipts open: stop the server, then erase the label";
            let _lock = super::lock(dir, advice)?;
            let count = receipts::erase_label(&dir.join(RECEIPTS), label)?;
            let rest = format!(
                "{RECEIPTS} no longer contains it. Backups and other copies of the file, and of its log, still do."
            );
            (count, rest)
        }
        #[cfg(feature = "postgres")]
        Source::Database(reader) => {
            let rest = "The database no longer shows it. Its files, its log and its backups may still contain it.";
            (reader.erase_label(label)?, rest.to_owned())
        }
    };
    let mut out = io::stdout().lock();
    writeln!(out, "receipts that had the label: {count}\n{rest}")?;
    Ok(out.flush()?)
}

fn check(source: &Source) -> anyhow::Result<()> {
    match source {
        Source::Folder(_) => Err(Ended::error(
            Exit::Settings,
            "the receipts are in the data folder: check it with tombola verify",
        )),
        #[cfg(feature = "postgres")]
        Source::Database(reader) => {
            let mut violations = Vec::new();
            let checked = reader.check(&mut |_, what| violations.push(what))?;
            let mut out = io::stdout().lock();
            writeln!(out, "{checked}")?;
            for violation in &violations {
                writeln!(out, "violation: {violation}")?;
            }
            out.flush()?;
            match violations.len() {
                0 => Ok(()),
                count => bail!("the receipts failed the verification; violations: {count}"),
            }
        }
    }
}

/// Reads the receipts of a folder, whether or not a server uses it.
#[derive(Debug)]
struct FolderReader(PathBuf);

impl FolderReader {
    fn read<R>(
        &self,
        read: impl FnOnce(&FileReader) -> Result<R, StoreError>,
    ) -> Result<R, StoreError> {
        // The lock is held only while a page is read, so that a server can start while the output is displayed.
        let lock = match files::lock(&self.0, Duration::ZERO) {
            Ok(lock) => Some(lock),
            Err(LockError::Held { .. }) => None,
            Err(LockError::File(error)) => return Err(StoreError::Passing(error.to_string())),
        };
        read(&FileReader::new(&self.0.join(RECEIPTS), lock.is_none()))
    }
}

impl ReceiptReader for FolderReader {
    fn head(&self) -> Result<Head, StoreError> {
        self.read(|reader| reader.head())
    }

    fn page(&self, filter: &Filter, limit: usize) -> Result<Vec<Receipt>, StoreError> {
        self.read(|reader| reader.page(filter, limit))
    }

    fn of_number(
        &self,
        pool: &PoolName,
        value: Value,
        owner: Option<&str>,
    ) -> Result<Option<Receipt>, StoreError> {
        self.read(|reader| reader.of_number(pool, value, owner))
    }
}

fn of_number(
    config: &Config,
    reader: &dyn ReceiptReader,
    pool: &str,
    number: &str,
) -> anyhow::Result<Receipt> {
    let found = config.pools.iter().find(|known| known.name.as_str() == pool);
    let pool = found.with_context(|| format!("the settings have no pool {pool:?}"))?;
    let value = pool.space.parse(number)?;
    match reader.of_number(&pool.name, value, None)? {
        Some(receipt) => Ok(receipt),
        None => bail!("no receipt has {} of the pool {}", pool.space.number(value), pool.name),
    }
}

/// Prints all receipts that the filter selects, up to `limit`.
fn print(
    reader: &dyn ReceiptReader,
    mut filter: Filter,
    mut limit: usize,
    format: Option<Format>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let mut printer = Printer::new(format);
    printer.print(&[], out)?;
    while limit > 0 {
        let page = reader.page(&filter, limit.min(PAGE_RECEIPTS))?;
        let Some(last) = page.last() else { break };
        filter.after = last.seq;
        limit -= page.len();
        printer.print(&page, out)?;
    }
    Ok(())
}

/// Writes receipts in a format.
struct Printer {
    format: Format,
    /// Whether the line with the names of the fields is written.
    has_head: bool,
    /// The widths of the table's columns.
    widths: [usize; Self::COLUMNS.len()],
    /// The columns of the terminal.
    columns: usize,
}

impl Printer {
    const COLUMNS: [&str; 8] =
        ["SEQ", "TIME", "POOL", "OWNER", "TOKEN", "LABEL", "COUNT", "NUMBERS"];
    const FIELDS: &str = "seq,at,pool,owner,token,label,key_digest,number";

    fn new(format: Option<Format>) -> Self {
        let is_terminal = io::stdout().is_terminal();
        let default = if is_terminal { Format::Table } else { Format::Ndjson };
        let columns = if is_terminal { Term::stdout().size().1.into() } else { usize::MAX };
        let widths = Self::COLUMNS.map(measure_text_width);
        Self { format: format.unwrap_or(default), has_head: false, widths, columns }
    }

    fn print(&mut self, receipts: &[Receipt], out: &mut impl Write) -> io::Result<()> {
        match self.format {
            Format::Table => self.print_table(receipts, out),
            Format::Csv => self.print_csv(receipts, out),
            Format::Ndjson => receipts.iter().try_for_each(|receipt| {
                serde_json::to_writer(&mut *out, receipt)?;
                writeln!(out)
            }),
        }
    }

    /// Writes lines whose columns are as wide as those of this page and the pages before need.
    fn print_table(&mut self, receipts: &[Receipt], out: &mut impl Write) -> io::Result<()> {
        let head =
            (!self.has_head && !receipts.is_empty()).then(|| Self::COLUMNS.map(str::to_owned));
        self.has_head |= head.is_some();
        let lines: Vec<_> = head.into_iter().chain(receipts.iter().map(cells)).collect();
        for line in &lines {
            for (width, cell) in self.widths.iter_mut().zip(line) {
                *width = measure_text_width(cell).max(*width);
            }
        }
        for line in &lines {
            let cells = line.iter().zip(self.widths).enumerate().map(|(column, (cell, width))| {
                let is_count = matches!(Self::COLUMNS[column], "SEQ" | "COUNT");
                let side = if is_count { Alignment::Right } else { Alignment::Left };
                pad_str(cell, width, side, None)
            });
            let line = cells.collect::<Vec<_>>().join("  ");
            writeln!(out, "{}", truncate_str(line.trim_end(), self.columns, "…"))?;
        }
        Ok(())
    }

    fn print_csv(&mut self, receipts: &[Receipt], out: &mut impl Write) -> io::Result<()> {
        if !self.has_head {
            self.has_head = true;
            writeln!(out, "{}", Self::FIELDS)?;
        }
        let mut line = String::new();
        for receipt in receipts {
            line.clear();
            for field in [
                &*receipt.seq.to_string(),
                &humantime::format_rfc3339_millis(receipt.at).to_string(),
                receipt.origin.pool.as_str(),
                &receipt.caller.owner,
                &receipt.caller.token,
                receipt.label().unwrap_or_default(),
                &receipt.key.map(|key| hex::encode(key.0)).unwrap_or_default(),
            ] {
                push_csv_field(field, &mut line);
                line.push(',');
            }
            let start = line.len();
            for value in receipt.given.values() {
                line.truncate(start);
                push_csv_field(receipt.origin.space.number(value).as_str(), &mut line);
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    }
}

/// Returns a receipt's line of the table.
fn cells(receipt: &Receipt) -> [String; Printer::COLUMNS.len()] {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let count = receipt.given.values().count();
    let shown = receipt.given.values().take(NUMBERS_SHOWN);
    let shown = shown.map(|value| receipt.origin.space.number(value).as_str().to_owned());
    let more = if count > NUMBERS_SHOWN { ", …" } else { "" };
    [
        receipt.seq.to_string(),
        humantime::format_rfc3339_seconds(receipt.at).to_string(),
        receipt.origin.pool.to_string(),
        or_dash(&receipt.caller.owner),
        or_dash(&receipt.caller.token),
        or_dash(receipt.label().unwrap_or_default()),
        count.to_string(),
        shown.collect::<Vec<_>>().join(", ") + more,
    ]
}
