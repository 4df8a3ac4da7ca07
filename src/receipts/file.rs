//! Keeps receipts in a SQLite file, `receipts.db`. Its one writer is the thread that owns it. Knows nothing of
//! requests.
//!
//! The receipts are the truth, and everything else can be derived from them: the keys, in a table for each
//! [bucket](keys) of time, and the [index] of numbers.

mod check;
mod index;
mod keys;
mod read;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rusqlite::{Connection, Row, Transaction, TransactionBehavior, params};
use tracing::info;

pub(crate) use self::check::Checked;
use self::index::Index;
use self::keys::Keys;
pub(crate) use self::read::FileReader;
use super::chain::{Head, Link};
use super::record::{
    Caller, Draft, Given, KeyDigest, Label, Labelled, Origin, Receipt, from_millis, to_millis,
};
use super::store::{ReceiptStore, Saved, StoreError, Summary};
use crate::config::PoolName;
use crate::files::{self, FileError};
use crate::space::{CodeFormat, Space};
use crate::sqlite::{self, Checkpoint, ContentError, Fault, Format, Found, rusqlite};

/// The format of the tables below and of those of the modules.
const RECEIPTS_FILE: Format =
    Format { name: "a file of receipts", application_id: 0x5442_5243, version: 1 };

/// Pages of the log at which it is written back: 16 MB. Fewer would write the pages of the keys more often.
const LOG_PAGES: usize = 4 * sqlite::LOG_PAGES_MAX;

/// The page cache in KiB. It holds the inner pages of a hundred million keys.
const CACHE_KIB: i32 = 65_536;

const CREATE: &str = "
    CREATE TABLE state (
        known_since INTEGER NOT NULL,  -- ms since 1970: all keys used since then are known
        is_copy     INTEGER NOT NULL DEFAULT 0, -- keys used after the copy was made are not known
        clock_at    INTEGER NOT NULL,  -- ms since 1970: the clock when it was last trusted
        keyed_to    INTEGER NOT NULL,  -- the last receipt whose key is in a bucket, if it has one
        indexed_to  INTEGER NOT NULL   -- the last receipt whose numbers are in the index
    ) STRICT;
    CREATE TABLE pools (
        id          INTEGER PRIMARY KEY,
        name        TEXT    NOT NULL,
        decimals    INTEGER NOT NULL,
        pattern     TEXT    NOT NULL,  -- with alphabet and code_check: empty unless values are codes
        alphabet    TEXT    NOT NULL,
        code_check  TEXT    NOT NULL
    ) STRICT;
    CREATE TABLE callers (
        id          INTEGER PRIMARY KEY,
        owner       TEXT    NOT NULL,
        token       TEXT    NOT NULL
    ) STRICT;
    CREATE TABLE receipts (
        seq          INTEGER PRIMARY KEY, -- 1, 2, 3, ... in the order of the commits
        at           INTEGER NOT NULL,    -- ms since 1970
        pool         INTEGER NOT NULL REFERENCES pools,
        caller       INTEGER NOT NULL REFERENCES callers,
        label        TEXT,
        label_salt   BLOB,
        label_digest BLOB,                -- stays when the label is erased
        key_digest   BLOB,
        numbers      BLOB    NOT NULL,
        digest       BLOB    NOT NULL     -- of this receipt and all before it
    ) STRICT;
    CREATE INDEX receipts_by_label ON receipts (label) WHERE label IS NOT NULL;";

const INSERT_STATE: &str =
    "INSERT INTO state (known_since, clock_at, keyed_to, indexed_to) VALUES (?1, ?1, 0, 0)";
const SELECT_STATE: &str = "SELECT known_since, is_copy FROM state";
const UPDATE_KNOWN_SINCE: &str = "UPDATE state SET known_since = ?1, is_copy = 0";
const MARK_COPY: &str = "UPDATE state SET is_copy = 1";
const SELECT_POOLS: &str = "SELECT id, name, decimals, pattern, alphabet, code_check FROM pools";
const INSERT_POOL: &str = "
    INSERT INTO pools (name, decimals, pattern, alphabet, code_check)
    VALUES (?1, ?2, ?3, ?4, ?5)";
const SELECT_CALLERS: &str = "SELECT id, owner, token FROM callers";
const INSERT_CALLER: &str = "INSERT INTO callers (owner, token) VALUES (?1, ?2)";
const SELECT_HEAD: &str = "SELECT seq, digest FROM receipts ORDER BY seq DESC LIMIT 1";
const INSERT_RECEIPT: &str = "
    INSERT INTO receipts
        (seq, at, pool, caller, label, label_salt, label_digest, key_digest, numbers, digest)
    VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)";
const SELECT_RECEIPT: &str = "
    SELECT seq, at, pool, caller, label, label_salt, label_digest, key_digest, numbers, digest
    FROM receipts WHERE seq = ?1";
const SELECT_AFTER: &str = "
    SELECT seq, at, pool, caller, label, label_salt, label_digest, key_digest, numbers, digest
    FROM receipts WHERE seq > ?1 ORDER BY seq LIMIT ?2";
const ERASE_LABEL: &str = "
    UPDATE receipts SET label = NULL, label_salt = NULL WHERE label = ?1";

/// Why the store can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// SQLite's error, which may pass.
    #[error("{path}: {source}")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    /// The content is wrong.
    #[error(
        "{path} can't be used: {problem}. Only this file tells which idempotency keys were used, so restore it \
         from a backup; or move it away, and repetitions of old requests will get new numbers"
    )]
    Damaged { path: PathBuf, problem: String },
    /// Another version of this program wrote the file.
    #[error("{path} can't be used: {problem}")]
    OtherVersion { path: PathBuf, problem: String },
    /// The password or a certificate for the database can't be used.
    #[cfg(feature = "postgres")]
    #[error("the database {address} can't be used: {problem}")]
    Database { address: String, problem: String },
}

impl OpenError {
    fn new(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match sqlite::fault(&source) {
            Fault::Content => Self::Damaged { path, problem: source.to_string() },
            Fault::Passing | Fault::Io => Self::Sqlite { path, source },
        }
    }

    fn of_content(path: &Path, error: ContentError) -> Self {
        let (path, problem) = (path.to_owned(), error.to_string());
        match error {
            ContentError::Sqlite(source) => Self::new(&path, source),
            ContentError::File(error) => error.into(),
            ContentError::OtherVersion { .. } => Self::OtherVersion { path, problem },
            ContentError::Damaged(_) => Self::Damaged { path, problem },
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct ReceiptFile {
    path: PathBuf,
    keep: Duration,
    has_index: bool,
    /// `None` until the first receipt creates the file, and after an error until it is opened again.
    open: Option<Open>,
    /// The head that the last save would have made, if the file was closed because its commit failed.
    undecided: Option<Head>,
}

/// The open file.
#[derive(Debug)]
struct Open {
    connection: Connection,
    known: Known,
    known_since: SystemTime,
    head: Head,
    keys: Keys,
    index: Option<Index>,
    /// The head that a commit makes which has begun and not succeeded.
    undecided: Option<Head>,
}

/// The pools and callers of the file, with their ids.
#[derive(Debug, Default)]
struct Known {
    pools: Vec<(i64, Arc<Origin>)>,
    callers: HashMap<Caller, i64>,
}

impl ReceiptFile {
    /// Opens the file, if there is one.
    pub(crate) fn open(path: &Path, keep: Duration, has_index: bool) -> Result<Self, OpenError> {
        let mut file = Self { path: path.to_owned(), keep, has_index, open: None, undecided: None };
        if files::length_bytes(path)?.is_some() {
            let open = || Open::new(path, keep, has_index);
            file.open = Some(match open() {
                // SQLite finds wrong content also if the disk can't read it.
                Err(OpenError::Damaged { .. }) => {
                    sqlite::read_through(path)?;
                    open()?
                }
                opened => opened?,
            });
        }
        Ok(file)
    }

    /// Does `work` on the open file. After an error that leaves the file's state unknown, the file is closed.
    fn work<R>(
        &mut self,
        work: impl FnOnce(&mut Open) -> Result<R, rusqlite::Error>,
    ) -> Result<Option<R>, StoreError> {
        let Some(open) = &mut self.open else { return Ok(None) };
        let error = match work(open) {
            Ok(done) => return Ok(Some(done)),
            Err(error) => error,
        };
        let undecided = open.undecided.take();
        let changed_nothing = match undecided {
            None => sqlite::fault(&error) == Fault::Passing,
            // A commit that lacks space is incomplete. After any other error, the log may have all of it: this
            // connection ignores it, but a crash would bring it back.
            Some(_) => sqlite::is_full(&error),
        };
        if changed_nothing {
            return Err(StoreError::Passing(error.to_string()));
        }
        (self.open, self.undecided) = (None, undecided);
        Err(StoreError::Unknown(error.to_string()))
    }

    /// Opens the file again after an error. Its log then has no commit that the connection ignores.
    fn reopen(&self) -> Result<Open, OpenError> {
        let open = Open::new(&self.path, self.keep, self.has_index)?;
        open.overwrite_log().map_err(|source| OpenError::new(&self.path, source))?;
        Ok(open)
    }

    /// Creates the file for the first receipt.
    fn create(&mut self) -> Result<(), StoreError> {
        let passing = |error: &dyn std::error::Error| StoreError::Passing(error.to_string());
        if files::length_bytes(&self.path).map_err(|error| passing(&error))?.is_none() {
            create(&self.path).map_err(|error| passing(&error))?;
        }
        let open = Open::new(&self.path, self.keep, self.has_index);
        self.open = Some(open.map_err(|error| passing(&error))?);
        Ok(())
    }
}

impl ReceiptStore for ReceiptFile {
    fn find(&mut self, keys: &[KeyDigest]) -> Result<Vec<Option<Receipt>>, StoreError> {
        let found = self.work(|open| {
            // One transaction, because each one locks the file. It only reads, so another program that writes does
            // not delay it.
            let behavior = TransactionBehavior::Deferred;
            let transaction = Transaction::new_unchecked(&open.connection, behavior)?;
            let find = |&key: &KeyDigest| match open.keys.find(&transaction, key)? {
                Some(seq) => read::receipt(&transaction, &open.known, seq),
                None => Ok(None),
            };
            keys.iter().map(find).collect()
        })?;
        Ok(found.unwrap_or_else(|| vec![None; keys.len()]))
    }

    fn save(&mut self, drafts: &[&Draft]) -> Result<Vec<Saved>, StoreError> {
        if self.open.is_none() {
            self.create()?;
        }
        self.work(|open| open.save(drafts))?;
        Ok(drafts.iter().map(|_| Saved::New).collect())
    }

    fn recover(&mut self, drafts: &[&Draft]) -> Result<Vec<Option<Saved>>, StoreError> {
        let open = self.reopen().map_err(|error| StoreError::Unknown(error.to_string()))?;
        // A save is one commit: all or none.
        let is_saved = self.undecided.take() == Some(open.head);
        self.open = Some(open);
        Ok(drafts.iter().map(|_| is_saved.then_some(Saved::New)).collect())
    }

    fn tidy(&mut self) -> Result<(), StoreError> {
        self.work(Open::tidy).map(drop)
    }

    fn summary(&self) -> Option<Summary> {
        let open = self.open.as_ref()?;
        let bytes = |path| files::length_bytes(path).ok().flatten().unwrap_or(0);
        Some(Summary {
            head: open.head,
            known_since: open.known_since,
            bytes: bytes(&self.path) + bytes(&sqlite::wal_of(&self.path)),
        })
    }

    fn close(mut self: Box<Self>) -> Result<(), StoreError> {
        match self.open.take() {
            None => Ok(()),
            Some(mut open) => {
                let flushed =
                    open.keys.flush(&mut open.connection, SystemTime::now(), open.head.seq);
                flushed
                    .and_then(|()| sqlite::close(open.connection))
                    .map_err(|error| StoreError::Unknown(error.to_string()))
            }
        }
    }
}

impl Open {
    fn new(path: &Path, keep: Duration, has_index: bool) -> Result<Self, OpenError> {
        let failed = |source| OpenError::new(path, source);
        let wrong = |error| OpenError::of_content(path, error);
        let log = Found::new(path).secure()?;
        let connection = sqlite::open_to_check(path).map_err(failed)?;
        sqlite::check_format(path, &connection, &RECEIPTS_FILE).map_err(wrong)?;
        drop(connection);
        let mut connection = log.open().map_err(wrong)?.into_connection();
        connection.set_transaction_behavior(TransactionBehavior::Immediate);
        connection.pragma_update(None, "cache_size", -CACHE_KIB).map_err(failed)?;
        Self::read(connection, keep, has_index).map_err(failed)
    }

    fn read(
        connection: Connection,
        keep: Duration,
        has_index: bool,
    ) -> Result<Self, rusqlite::Error> {
        let known = Known::read(&connection)?;
        let (mut known_since, is_copy): (i64, bool) =
            connection.query_row(SELECT_STATE, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        if is_copy {
            known_since = to_millis(SystemTime::now());
            connection.execute(UPDATE_KNOWN_SINCE, [known_since])?;
        }
        let head = read::head(&connection)?;
        let keys = Keys::read(&connection, keep)?;
        let index = if has_index { Some(Index::read(&connection)?) } else { None };
        let known_since = from_millis(known_since);
        let undecided = None;
        let mut open = Self { connection, known, known_since, head, keys, index, undecided };
        // The index may have been off, so that many numbers are not in it.
        open.extend_index()?;
        Ok(open)
    }

    /// Saves the drafts with one commit.
    fn save(&mut self, drafts: &[&Draft]) -> Result<(), rusqlite::Error> {
        let transaction = self.connection.transaction()?;
        let mut head = self.head;
        let mut known = Additions::default();
        for draft in drafts {
            let pool = self.known.pool(&transaction, &draft.origin, &mut known)?;
            let caller = self.known.caller(&transaction, &draft.caller, &mut known)?;
            head = Link::of(draft).append(head);
            insert(&transaction, head, draft, (pool, caller))?;
        }
        self.undecided = Some(head);
        // Invariant: saved, durably, before its numbers are handed out.
        transaction.commit()?;
        self.undecided = None;
        for (draft, seq) in drafts.iter().zip(self.head.seq + 1..) {
            if let Some(key) = draft.key {
                self.keys.add(key, seq);
            }
        }
        self.head = head;
        self.known.add(known);
        if let Some(index) = &mut self.index {
            index.waiting += drafts.iter().map(|draft| draft.count).sum::<usize>();
        }
        Ok(())
    }

    /// Overwrites the beginning of the log. If a reader has kept the index of the log, SQLite trusts it, and ignores
    /// a commit whose sync failed, although the log has it.
    fn overwrite_log(&self) -> Result<(), rusqlite::Error> {
        // SQLite writes this even if nothing changes, unlike a row.
        sqlite::mark_format(&self.connection, &RECEIPTS_FILE)
    }

    fn tidy(&mut self) -> Result<(), rusqlite::Error> {
        self.extend_index()?;
        self.keys.extend(&mut self.connection, SystemTime::now(), self.head.seq)?;
        // The time after the extension, because the steady clock is read next.
        self.keys.expire(&mut self.connection, SystemTime::now())?;
        if sqlite::log_backlog(&self.connection)? >= LOG_PAGES {
            sqlite::checkpoint(&self.connection, Checkpoint::Passive)?;
        }
        Ok(())
    }

    fn extend_index(&mut self) -> Result<(), rusqlite::Error> {
        if let Some(index) = &mut self.index {
            index.extend(&mut self.connection)?;
        }
        Ok(())
    }
}

fn insert(
    transaction: &Transaction<'_>,
    head: Head,
    draft: &Draft,
    (pool, caller): (i64, i64),
) -> Result<(), rusqlite::Error> {
    let label = draft.label.as_ref();
    let text = label.and_then(|labelled| labelled.label.as_ref());
    transaction
        .prepare_cached(INSERT_RECEIPT)?
        .execute(params![
            head.seq,
            to_millis(draft.at),
            pool,
            caller,
            text.map(|(label, _)| label.as_str()),
            text.map(|(_, salt)| salt),
            label.map(|labelled| &labelled.digest),
            draft.key.as_ref().map(|key| &key.0),
            draft.numbers,
            head.digest,
        ])
        .map(drop)
}

/// Pools and callers that a transaction added to the file.
#[derive(Default)]
struct Additions {
    pools: Vec<(i64, Arc<Origin>)>,
    callers: Vec<(Caller, i64)>,
}

impl Known {
    fn read(connection: &Connection) -> Result<Self, rusqlite::Error> {
        let mut pools = connection.prepare(SELECT_POOLS)?;
        let pools = pools.query_map([], |row| Ok((row.get(0)?, Arc::new(origin(row)?))))?;
        let mut callers = connection.prepare(SELECT_CALLERS)?;
        let callers = callers.query_map([], |row| Ok((caller(row)?, row.get(0)?)))?;
        Ok(Self {
            pools: pools.collect::<Result<_, _>>()?,
            callers: callers.collect::<Result<_, _>>()?,
        })
    }

    fn pool(
        &self,
        transaction: &Transaction<'_>,
        origin: &Arc<Origin>,
        added: &mut Additions,
    ) -> Result<i64, rusqlite::Error> {
        let mut all = self.pools.iter().chain(&added.pools);
        if let Some((id, _)) = all.find(|(_, known)| known.is(&origin.pool, &origin.space)) {
            return Ok(*id);
        }
        let codes = origin.space.codes();
        transaction.execute(
            INSERT_POOL,
            params![
                origin.pool.as_str(),
                origin.space.decimals(),
                codes.map_or("", CodeFormat::pattern),
                codes.map_or("", CodeFormat::alphabet),
                codes.map_or("", CodeFormat::check),
            ],
        )?;
        let id = transaction.last_insert_rowid();
        added.pools.push((id, Arc::clone(origin)));
        Ok(id)
    }

    fn caller(
        &self,
        transaction: &Transaction<'_>,
        caller: &Caller,
        added: &mut Additions,
    ) -> Result<i64, rusqlite::Error> {
        let known = self.callers.get(caller);
        let new = || added.callers.iter().find(|(known, _)| known == caller).map(|(_, id)| id);
        if let Some(&id) = known.or_else(new) {
            return Ok(id);
        }
        transaction.execute(INSERT_CALLER, [&*caller.owner, &*caller.token])?;
        let id = transaction.last_insert_rowid();
        added.callers.push((caller.clone(), id));
        Ok(id)
    }

    fn origin(&self, id: i64) -> Option<&Arc<Origin>> {
        self.pools.iter().find(|(known, _)| *known == id).map(|(_, origin)| origin)
    }

    fn add(&mut self, added: Additions) {
        self.pools.extend(added.pools);
        self.callers.extend(added.callers);
    }
}

/// Reads a row of `pools`.
fn origin(row: &Row<'_>) -> Result<Origin, rusqlite::Error> {
    let (name, decimals): (String, u8) = (row.get(1)?, row.get(2)?);
    let (pattern, alphabet, check): (String, String, String) =
        (row.get(3)?, row.get(4)?, row.get(5)?);
    let space = match &*pattern {
        "" => Space::widest(decimals),
        _ => CodeFormat::new(&pattern, &alphabet, &check).ok().map(Space::of_codes),
    };
    let origin = PoolName::new(&name).zip(space).map(|(pool, space)| Origin { pool, space });
    origin.ok_or(wrong("a pool of receipts"))
}

/// Reads a row of `callers`.
fn caller(row: &Row<'_>) -> Result<Caller, rusqlite::Error> {
    Ok(Caller { owner: row.get(1)?, token: row.get(2)? })
}

/// Returns the error for a row whose content is impossible.
fn wrong(what: &'static str) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(
        0,
        rusqlite::types::Type::Blob,
        format!("{what} is damaged").into(),
    )
}

/// Creates the file under another name and renames it, so that an incomplete file never has the name.
fn create(path: &Path) -> Result<(), OpenError> {
    let unfinished = files::unfinished(path);
    files::create(&unfinished)?;
    sqlite::open_for_build(&unfinished)
        .and_then(|connection| {
            connection.execute_batch(CREATE)?;
            connection.execute_batch(keys::CREATE)?;
            connection.execute_batch(index::CREATE)?;
            connection.execute(INSERT_STATE, [to_millis(SystemTime::now())])?;
            sqlite::mark_format(&connection, &RECEIPTS_FILE)?;
            connection.close().map_err(|(_, error)| error)
        })
        .map_err(|source| OpenError::new(&unfinished, source))?;
    files::sync_file(&unfinished)?;
    files::rename_durably(&unfinished, path)?;
    info!(file = %path.display(), "the file of receipts is created");
    Ok(())
}

/// Marks a copy of the file, if there is one, so that its first user knows that later keys are missing.
pub(crate) fn mark_copy(path: &Path) -> Result<(), OpenError> {
    if files::length_bytes(path)?.is_none() {
        return Ok(());
    }
    let failed = |source| OpenError::new(path, source);
    let connection = open_to_change(path)?;
    connection.execute(MARK_COPY, []).map_err(failed)?;
    sqlite::close(connection).map_err(failed)
}

/// Removes a label from all of its receipts, and its text from the file, which is replaced by a new one. No other
/// process may use the file. Returns the number of the receipts.
pub(crate) fn erase_label(path: &Path, label: &str) -> Result<usize, OpenError> {
    if files::length_bytes(path)?.is_none() {
        return Ok(0);
    }
    let failed = |source| OpenError::new(path, source);
    let connection = open_to_change(path)?;
    let erased = connection.execute(ERASE_LABEL, [label]).map_err(failed)?;
    // The free space of a page may contain rows that SQLite moved to another page, and secure_delete does not
    // overwrite these. So all rows are written to a new file, even if none had the label: an earlier attempt may
    // have failed after the update.
    let unfinished = files::unfinished(path);
    files::create(&unfinished)?;
    let name = unfinished.to_str().ok_or_else(|| OpenError::Sqlite {
        path: path.to_owned(),
        source: rusqlite::Error::InvalidPath(unfinished.clone()),
    })?;
    connection.execute("VACUUM INTO ?1", [name]).map_err(failed)?;
    // This removes the log, which belongs to the old file.
    sqlite::close(connection).map_err(failed)?;
    files::sync_file(&unfinished)?;
    files::rename_durably(&unfinished, path)?;
    Ok(erased)
}

fn open_to_change(path: &Path) -> Result<Connection, OpenError> {
    let wrong = |error| OpenError::of_content(path, error);
    let connection = Found::new(path).secure()?.open().map_err(wrong)?.into_connection();
    sqlite::check_marks(&connection, &RECEIPTS_FILE).map_err(wrong)?;
    Ok(connection)
}

/// Reads a row of `receipts` in the order of [`SELECT_RECEIPT`].
fn read_receipt(row: &Row<'_>, known: &Known) -> Result<(Receipt, Vec<u8>), rusqlite::Error> {
    let caller_id: i64 = row.get(3)?;
    let origin = known.origin(row.get(2)?).ok_or(wrong("the pool of a receipt"))?;
    let caller = known.callers.iter().find(|(_, id)| **id == caller_id).map(|(caller, _)| caller);
    let caller = caller.ok_or(wrong("the caller of a receipt"))?;
    let (label, salt): (Option<String>, Option<[u8; 16]>) = (row.get(4)?, row.get(5)?);
    let digest: Option<[u8; 16]> = row.get(6)?;
    let numbers: Vec<u8> = row.get(8)?;
    let given =
        Given::from_bytes(&origin.pool, &numbers).ok_or(wrong("the numbers of a receipt"))?;
    let receipt = Receipt {
        seq: row.get(0)?,
        at: from_millis(row.get(1)?),
        origin: Arc::clone(origin),
        caller: caller.clone(),
        label: digest
            .map(|digest| Labelled { label: label.and_then(Label::new).zip(salt), digest }),
        key: row.get::<_, Option<[u8; 16]>>(7)?.map(KeyDigest),
        given,
        digest: row.get(9)?,
    };
    Ok((receipt, numbers))
}
