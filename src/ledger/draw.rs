//! Drawing fresh values: uniform over what is free, unrelated to what was drawn before.

use rand::RngExt;
use rand::distr::Uniform;
use rand::seq::SliceRandom;
use rusqlite::{Connection, ErrorCode, Transaction, params};

use super::strata::{OpenStrata, STRATA, Strata, stratum_of};
use super::{LedgerError, State, retire};
use crate::batch::{Batch, BatchId, Generation, ShardIndex, Step, Tally};
use crate::space::Value;
use crate::sqlite::{self, rusqlite};

/// Open strata of a new ledger: 1/8 of all. Each halving doubles the draws, about 10 ns each.
const STRATA_OPEN_MIN: usize = STRATA / 8;

/// Values in a stratum, on the average, from which on more are opened. The fewer values each has, the
/// fewer pages a draw touches: with twice the strata, a part of as many has half the pages. A small
/// ledger leaves what it does not need to others.
const STRATUM_VALUES: u64 = 1 << 14;

/// The smallest part of the strata that a round draws from: 1/64 of all, for 64 tries a value.
const STRATA_PART_MIN: usize = STRATA / 64;

/// To insert into a page, which is written to the log and then to the file, costs about as much as this
/// many tries for each row that it has: 24 µs for 200 rows, beside 13 ns for a try.
const ROW_TRIES: u64 = 8;

/// Values that a round looks for: 32 MB of candidates.
const ROUND: u64 = 1 << 22;

/// A random try costs a draw and a hash, and hits a given free value in one part of 64; looking at
/// every value of the range costs a hash each. So the exact way is the cheaper one as soon as the
/// free values are no more than this many times what is missing.
const EXACT_BELOW: u64 = 64;

/// Values whose use the exact way looks up at once: 8 MB of marks.
const WINDOW: i64 = 1 << 23;

/// Values between two calls of the [`Step`].
const STEP: usize = 1 << 14;

const INSERT_VALUES: &str = "INSERT INTO used_numbers VALUES";
const INSERT_VALUE: &str = "INSERT OR IGNORE INTO used_numbers VALUES (?1, ?2, ?3)";
const SELECT_VALUES: &str =
    "SELECT value FROM used_numbers WHERE stratum = ?1 AND value BETWEEN ?2 AND ?3";
const SELECT_STRATUM: &str = "SELECT value FROM used_numbers WHERE stratum = ?1 ORDER BY value";
const SELECT_NEXT: &str = "SELECT
    (SELECT coalesce(max(id), 0) + 1 FROM batches),
    (SELECT coalesce(max(generation), 0) + 1 FROM batches WHERE shard = ?1)";
const INSERT_BATCH: &str =
    "INSERT INTO batches VALUES (?1, ?2, ?3, ?4, strftime('%FT%TZ', 'now'), NULL)";
const UPDATE_COUNT: &str = "UPDATE ledger SET count = ?1";

/// How values were found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draws {
    /// Values drawn at random.
    pub drawn: u64,
    /// Of these, outside the part of the strata that was drawn from: the price of touching few pages.
    pub elsewhere: u64,
    /// Of these, in the ledger already, or drawn twice.
    pub used: u64,
}

impl std::ops::AddAssign for Draws {
    fn add_assign(&mut self, more: Self) {
        self.drawn += more.drawn;
        self.elsewhere += more.elsewhere;
        self.used += more.used;
    }
}

/// Fresh values that are not yet in the ledger: [`Draw::commit`] puts them there, dropping the draw
/// forgets them.
#[derive(Debug)]
pub struct Draw<'l> {
    transaction: Transaction<'l>,
    state: &'l mut State,
    open: OpenStrata,
    batch: Batch,
    values: Vec<Value>,
    /// There was no more to find.
    used_up: bool,
}

impl<'l> Draw<'l> {
    pub(super) fn begin(
        connection: &'l mut Connection,
        state: &'l mut State,
        shard: ShardIndex,
        live: Option<Generation>,
        count: u64,
        step: Step<'_>,
    ) -> Result<Self, LedgerError> {
        let path = state.path.clone();
        let failed = |source| LedgerError::from_sqlite(&path, source);
        let transaction = connection.transaction().map_err(failed)?;
        let (id, generation) = transaction
            .query_row(SELECT_NEXT, [shard.0], |row| Ok((row.get(0)?, row.get(1)?)))
            .map_err(failed)?;

        let count = count.min(state.space.size() - state.count);
        let open = state.open.clone();
        let mut search = Search {
            connection: &transaction,
            state,
            open,
            batch: BatchId(id),
            fresh: Vec::with_capacity(usize::try_from(count).expect("a shard fits in memory")),
            used_up: false,
            step,
        };
        search.find(count)?;
        let Search { open, fresh: mut values, used_up, .. } = search;
        state.used_up |= used_up && values.is_empty();
        values.shuffle(&mut state.rng);

        let batch = Batch {
            id: BatchId(id),
            shard,
            generation: Generation(generation),
            count: values.len() as u64,
        };
        let draw = Self { transaction, state, open, batch, values, used_up };
        draw.write_batch(live).map_err(|source| draw.state.failed(source))?;
        Ok(draw)
    }

    /// What this draw will be in the ledger.
    #[must_use]
    pub fn batch(&self) -> Batch {
        self.batch
    }

    /// The values, in random order.
    #[must_use]
    pub fn values(&self) -> &[Value] {
        &self.values
    }

    /// Puts the values into the ledger, durably. Whoever serves them must have them on disk before.
    ///
    /// # Errors
    /// [`LedgerError::Sqlite`]; then they are not in the ledger and must not be served.
    pub fn commit(self) -> Result<Batch, LedgerError> {
        let Self { transaction, state, open, batch, used_up, .. } = self;
        transaction.commit().map_err(|source| state.failed(source))?;
        state.count += batch.count;
        state.used_up |= used_up;
        state.open = open;
        Ok(batch)
    }

    fn write_batch(&self, live: Option<Generation>) -> Result<(), rusqlite::Error> {
        let Batch { id, shard, generation, count } = self.batch;
        self.open.save(&self.state.open, &self.transaction)?;
        retire(&self.transaction, shard, live)?;
        self.transaction.execute(INSERT_BATCH, params![id.0, shard.0, generation.0, count])?;
        self.transaction.execute(UPDATE_COUNT, [self.state.count + count]).map(drop)
    }
}

/// The work of one draw.
struct Search<'s, 'c> {
    connection: &'c Connection,
    state: &'s mut State,
    open: OpenStrata,
    batch: BatchId,
    fresh: Vec<Value>,
    used_up: bool,
    step: Step<'s>,
}

impl Search<'_, '_> {
    /// Finds `count` fresh values, or all there are.
    fn find(&mut self, count: u64) -> Result<(), LedgerError> {
        let size = self.state.space.size();
        // Others hold all strata: what is free is theirs.
        self.used_up = self.state.shared && self.open.len() == 0;
        while (self.fresh.len() as u64) < count && !self.used_up {
            let missing = count - self.fresh.len() as u64;
            let used = self.state.count + self.fresh.len() as u64;
            let can_open = !self.state.shared && self.open.len() < STRATA;
            let in_open = u128::from(size) * self.open.len() as u128 / STRATA as u128;
            let free = in_open.saturating_sub(used.into());
            let crowded = (used + missing) / self.open.len().max(1) as u64 > STRATUM_VALUES;
            // In a shared space about so many values are free, as a stratum has more or less than its
            // share; and of a part of the space, fewer values are looked at in vain at random.
            let scarce =
                free * u128::from(size) <= u128::from(EXACT_BELOW) * u128::from(missing) * in_open;
            if can_open && (crowded || u128::from(used + missing) > in_open / 2) {
                self.open_more()?;
            } else if !can_open && scarce {
                self.take_from_all_free(missing)?;
            } else if self.try_at_random(missing.min(ROUND), used)? == 0 {
                // In a tiny range the open strata may have no value at all.
                match can_open {
                    true => self.open_more()?,
                    false => self.take_from_all_free(missing)?,
                }
            }
        }
        Ok(())
    }

    fn open_more(&mut self) -> Result<(), LedgerError> {
        let target = (self.open.len() * 2).clamp(STRATA_OPEN_MIN, STRATA);
        self.open
            .open_up_to(target, self.connection, &mut self.state.rng)
            .map_err(|source| self.state.failed(source))
    }

    /// Draws uniform values, keeps those of a random part of the open strata, and keeps of these
    /// what the ledger does not have. Says how many it found.
    fn try_at_random(&mut self, wanted: u64, used: u64) -> Result<u64, LedgerError> {
        let part_size = part_size(wanted, used, self.open.len());
        let part = self.open.part(part_size, &mut self.state.rng);

        let space = self.state.space;
        let range = Uniform::new_inclusive(space.min().0, space.max().0)
            .expect("Space::new refuses an empty range");
        let key = self.state.key;
        let mut candidates = Candidates::new(part, wanted);
        // Twice what it takes on average, and some: that none is found by bad luck is out of the question,
        // and a part whose strata hold nothing must not keep the round for ever.
        let tries = (wanted * 2 + STRATA_PART_MIN as u64) * (STRATA / part_size) as u64;
        let mut drawn = 0;
        for tried in 0..tries {
            if candidates.count == wanted {
                break;
            }
            if tried % (STEP as u64 * 64) == 0 {
                self.report(0)?;
            }
            let value = Value(self.state.rng.sample(range));
            drawn += 1;
            candidates.offer(key.stratum(value), value);
        }
        let kept = candidates.count;
        let fresh = self.insert_fresh(candidates)?;
        self.state.draws += Draws { drawn, elsewhere: drawn - kept, used: kept - fresh };
        Ok(fresh)
    }

    /// Takes values at random from the exact set of free values of a random part of the strata,
    /// which is as large as it must be; in a shared space, from all that it may draw.
    fn take_from_all_free(&mut self, wanted: u64) -> Result<(), LedgerError> {
        let free = self.state.space.size() - self.state.count - self.fresh.len() as u64;
        // A quarter more than needed on average: should that be too few, the caller comes again.
        let share = (STRATA as u64).saturating_mul(wanted).div_ceil(free);
        let part_size = match self.state.shared {
            true => self.open.len(),
            false => (share + share / 4 + 16).min(STRATA as u64) as usize,
        };
        let part = self.open.part(part_size, &mut self.state.rng);
        let mut found = self.free_values(&part)?;
        let part_is_all = part.members().len() == STRATA;
        self.used_up = self.state.shared && found.len() as u64 <= wanted;
        let wanted = usize::try_from(wanted).expect("a shard fits in memory");
        let (taken, _) = found.partial_shuffle(&mut self.state.rng, wanted);
        let taken_count = taken.len() as u64;
        self.state.draws.drawn += taken_count;
        let mut candidates = Candidates::new(part, taken_count);
        for &value in taken.iter() {
            candidates.offer(self.state.key.stratum(value), value);
        }
        let inserted = self.insert_fresh(candidates)?;
        // Bound: each round adds all that it took, or ends the draw.
        if inserted < taken_count || (part_is_all && taken_count == 0 && !self.state.shared) {
            return Err(self
                .state
                .damaged(format!("it has not the {free} free values that it counts")));
        }
        Ok(())
    }

    /// Every value of these strata that the ledger does not have.
    fn free_values(&mut self, part: &Strata) -> Result<Vec<Value>, LedgerError> {
        let space = self.state.space;
        let mut free = Vec::new();
        let mut used = Vec::new();
        let mut start = space.min().0;
        loop {
            self.report(0)?;
            let end = space.max().0.min(start.saturating_add(WINDOW - 1));
            used.clear();
            used.resize((end - start + 1) as usize, false);
            self.mark_used(part, start, end, &mut used)
                .map_err(|source| self.state.failed(source))?;
            for (offset, used) in used.iter().enumerate() {
                let value = Value(start + offset as i64);
                if !used && part.contains(self.state.key.stratum(value)) {
                    free.push(value);
                }
            }
            if end == space.max().0 {
                return Ok(free);
            }
            start = end + 1;
        }
    }

    fn mark_used(
        &self,
        part: &Strata,
        start: i64,
        end: i64,
        used: &mut [bool],
    ) -> Result<(), rusqlite::Error> {
        let mut select = self.connection.prepare_cached(SELECT_VALUES)?;
        for &stratum in part.members() {
            let mut rows = select.query(params![stratum, start, end])?;
            while let Some(row) = rows.next()? {
                // One that is elsewhere is damage, which the check before the insert finds.
                let offset = row.get::<_, i64>(0)?.wrapping_sub(start);
                if let Some(used) = used.get_mut(offset as usize) {
                    *used = true;
                }
            }
        }
        Ok(())
    }

    /// Inserts the candidates in the ledger's order and keeps those that were not there.
    fn insert_fresh(&mut self, mut candidates: Candidates) -> Result<u64, LedgerError> {
        self.check(&mut candidates)?;
        let before = self.fresh.len();
        let mut rows = Vec::with_capacity(STEP);
        let mut sorted = candidates.sorted().peekable();
        while sorted.peek().is_some() {
            rows.clear();
            rows.extend(sorted.by_ref().take(STEP));
            let start = self.fresh.len();
            self.insert_chunk(&rows).map_err(|source| self.state.failed(source))?;
            self.report((self.fresh.len() - start) as u64)?;
        }
        Ok((self.fresh.len() - before) as u64)
    }

    /// Reads each stratum of the part that this process has not read before, holds it against its
    /// tally, and drops the candidates that it has.
    ///
    /// Invariant: before anything is drawn from a stratum, all its rows are seen to be what was drawn.
    /// A row that changed on the disk would be drawn again; or, standing out of order, hide others from
    /// an insert. So as long as not every stratum was seen, what a stratum has is found here, by reading
    /// it in order, and not by a search that may pass rows of strata not yet seen. Those come first in a
    /// [part](OpenStrata::part), so that none is drawn from again before all were read.
    fn check(&mut self, candidates: &mut Candidates) -> Result<(), LedgerError> {
        for (&stratum, values) in candidates.part.members().iter().zip(&mut candidates.values) {
            values.sort_unstable();
            if self.open.is_checked(stratum) {
                continue;
            }
            self.report(0)?;
            let found =
                self.check_stratum(stratum, values).map_err(|source| self.state.failed(source))?;
            if let Err(problem) = found {
                return Err(self.state.damaged(problem));
            }
        }
        for &stratum in candidates.part.members() {
            self.open.set_checked(stratum);
        }
        Ok(())
    }

    /// Drops those of the sorted values that the stratum has.
    fn check_stratum(
        &self,
        stratum: u16,
        values: &mut Vec<Value>,
    ) -> Result<Result<(), String>, rusqlite::Error> {
        let mut used = vec![false; values.len()];
        let mut next = 0;
        let mut last = None;
        let mut found = Tally::default();
        let mut select = self.connection.prepare_cached(SELECT_STRATUM)?;
        let mut rows = select.query([stratum])?;
        while let Some(row) = rows.next()? {
            let value = Value(row.get(0)?);
            let hash = self.state.key.hash(value);
            if stratum_of(hash) != stratum || last >= Some(value) {
                let at = self.state.space.number(value);
                return Ok(Err(format!("{at} is not where it belongs")));
            }
            last = Some(value);
            found.add(hash);
            while values.get(next).is_some_and(|&candidate| candidate < value) {
                next += 1;
            }
            while values.get(next) == Some(&value) {
                used[next] = true;
                next += 1;
            }
        }
        let drawn = self.open.tally(stratum);
        if found != drawn {
            return Ok(Err(format!(
                "of the {} values that were drawn from stratum {stratum}, it has {} and not all of them",
                drawn.count, found.count
            )));
        }
        let mut used = used.into_iter();
        values.retain(|_| used.next() == Some(false));
        Ok(Ok(()))
    }

    fn insert_chunk(&mut self, chunk: &[(u16, Value)]) -> Result<(), rusqlite::Error> {
        for candidates in chunk.chunks(sqlite::ROWS_AT_ONCE) {
            let row = |&(stratum, value): &(u16, Value)| [stratum.into(), value.0, self.batch.0];
            let rows: Vec<[i64; 3]> = candidates.iter().map(row).collect();
            // Invariant: a value is fresh only if this insert put it into the ledger.
            match sqlite::insert(self.connection, INSERT_VALUES, &rows) {
                Ok(()) => candidates.iter().for_each(|&(_, value)| self.is_fresh(value)),
                Err(error) if is_taken(&error) => self.insert_one_by_one(candidates)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn insert_one_by_one(&mut self, candidates: &[(u16, Value)]) -> Result<(), rusqlite::Error> {
        let mut insert = self.connection.prepare_cached(INSERT_VALUE)?;
        for &(stratum, value) in candidates {
            if insert.execute(params![stratum, value.0, self.batch.0])? == 1 {
                self.is_fresh(value);
            }
        }
        Ok(())
    }

    fn is_fresh(&mut self, value: Value) {
        self.fresh.push(value);
        self.open.add(self.state.key.hash(value));
    }

    fn report(&mut self, done: u64) -> Result<(), LedgerError> {
        if (self.step)(done).is_break() { Err(LedgerError::Cancelled) } else { Ok(()) }
    }
}

/// Values of a part of the strata that a ledger may have already, each with those of its stratum.
struct Candidates {
    part: Strata,
    /// In the order of the part's members.
    values: Vec<Vec<Value>>,
    count: u64,
}

impl Candidates {
    /// None yet, with room for about `wanted`.
    fn new(part: Strata, wanted: u64) -> Self {
        let each = wanted as usize / part.members().len().max(1);
        let values =
            part.members().iter().map(|_| Vec::with_capacity(each + each / 8 + 8)).collect();
        Self { part, values, count: 0 }
    }

    /// Keeps the value if its stratum is in the part.
    fn offer(&mut self, stratum: u16, value: Value) {
        if let Some(place) = self.part.place(stratum) {
            self.values[place].push(value);
            self.count += 1;
        }
    }

    /// In the ledger's order, when those of each stratum are.
    fn sorted(self) -> impl Iterator<Item = (u16, Value)> {
        let strata = self.part.into_members().into_iter().zip(self.values);
        strata.flat_map(|(stratum, values)| values.into_iter().map(move |value| (stratum, value)))
    }
}

/// How many of the open strata a round of `wanted` values draws from, into a ledger of `used`.
///
/// A part of p strata costs `STRATA / p` tries for each value wanted, and the pages of p strata. The sum
/// is least where both are the same.
fn part_size(wanted: u64, used: u64, open: usize) -> usize {
    let rows_per_stratum = used as f64 / open as f64;
    let tries = wanted as f64 * STRATA as f64;
    let part = (tries / (rows_per_stratum * ROW_TRIES as f64)).sqrt();
    (part as usize).clamp(STRATA_PART_MIN.min(open), open)
}

/// Whether a row was there already.
fn is_taken(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::ConstraintViolation)
}

#[cfg(test)]
mod tests {
    use super::part_size;

    #[test]
    fn the_part_shrinks_as_the_ledger_outgrows_the_round() {
        let check = |wanted, used, open, expected| {
            assert_eq!(part_size(wanted, used, open), expected, "{wanted} into {used}");
        };
        check(1_000_000, 0, 512, 512);
        check(1_000_000, 1_000_000, 512, 512);
        check(1_000_000, 10_000_000, 1024, 228);
        check(1_000_000, 200_000_000, 4096, 102);
        check(2_500_000, 200_000_000, 4096, 161);
        check(1_000_000, 1_000_000_000, 4096, 64);
        check(10, 1_000_000_000, 4096, 64);
        check(10, 1_000_000, 7, 7);
    }
}
