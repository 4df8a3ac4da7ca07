use std::collections::BTreeSet;

use proptest::prelude::*;
use tokio::sync::oneshot::error::TryRecvError;

use super::*;
use crate::shard::Row;

/// The rows of a file, as the worker sees it.
struct File {
    unused: BTreeSet<u32>,
    imported: BTreeSet<u32>,
}

impl File {
    fn new() -> Self {
        Self { unused: rows_of(1).collect(), imported: BTreeSet::new() }
    }

    fn left(&self) -> u64 {
        self.unused.len() as u64
    }

    fn lease(&mut self, count: usize) -> Vec<Row> {
        let leased = (0..count).map_while(|_| self.unused.pop_first());
        leased.map(Row::for_test).collect()
    }

    fn import(&mut self, rows: &[Row], leased: &BTreeSet<Row>) -> Vec<Row> {
        let marks = |row: &&Row| self.unused.remove(&row.id_for_test()) || leased.contains(row);
        let marked: Vec<Row> = rows.iter().filter(marks).copied().collect();
        for row in &marked {
            assert!(self.imported.insert(row.id_for_test()), "a row was imported twice");
        }
        marked
    }
}

/// Returns the ids of the rows of a generation.
fn rows_of(generation: i64) -> std::ops::Range<u32> {
    let end = ROWS as u32 * generation as u32;
    end - ROWS as u32..end
}

/// The message that a waiting request receives.
type Rows = (Vec<Row>, Generation);

/// A request that waits, or holds rows which it may return.
enum Request {
    Waits(oneshot::Receiver<Rows>),
    Holds(Vec<Row>, Generation),
}

/// An action of a test on a buffer, between two runs of the worker.
#[derive(Clone, Copy, Debug)]
enum Act {
    Pop,
    Take { count: usize, partial: bool },
    Vanish(usize),
    Settle(usize),
    Return(usize),
    Standby,
    Import(u32),
    Work,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let act = prop_oneof![
        2 => Just(Act::Pop),
        4 => (1..40_usize, any::<bool>()).prop_map(|(count, partial)| Act::Take { count, partial }),
        1 => any::<usize>().prop_map(Act::Vanish),
        2 => any::<usize>().prop_map(Act::Settle),
        2 => any::<usize>().prop_map(Act::Return),
        1 => Just(Act::Standby),
        1 => (0..4_u32).prop_map(Act::Import),
        4 => Just(Act::Work),
    ];
    proptest::collection::vec(act, 1..200)
}

/// A buffer with a simulated worker, which does the steps of `Slot` and `Worker` one at a time.
struct Model {
    buffer: Buffer<Rows>,
    file: File,
    generation: i64,
    requests: Vec<Request>,
    handed_out: BTreeSet<u32>,
    /// The import in progress: its result, and the standby that it holds.
    importing: Option<(oneshot::Receiver<Vec<Value>>, Option<u64>)>,
    /// Rows that were used when they were imported.
    conflicts: BTreeSet<Row>,
    /// Rows that were on loan when they were imported, and came back.
    withheld: u64,
    /// Whether the worker will look at the buffer again without being called.
    awake: bool,
}

const ROWS: u64 = 50;

fn live(unused: u64) -> Live {
    Live { generation: Generation(1), rows: ROWS, unused }
}

/// Returns a buffer whose file is open and full.
fn serving() -> Buffer<Rows> {
    let mut buffer = Buffer::new(10, 0, Some(live(ROWS)), None);
    buffer.opened(Generation(1), ROWS);
    buffer
}

impl Model {
    fn new(lease_rows: usize) -> Self {
        let mut buffer = Buffer::new(lease_rows, ROWS / 2, Some(live(ROWS)), None);
        buffer.opened(Generation(1), ROWS);
        Self {
            buffer,
            file: File::new(),
            generation: 1,
            requests: Vec::new(),
            handed_out: BTreeSet::new(),
            importing: None,
            conflicts: BTreeSet::new(),
            withheld: 0,
            awake: true,
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Pop => {
                let row = self.buffer.pop();
                self.hand_out(row);
            }
            Act::Take { count, partial } => match self.buffer.take(count, partial) {
                Take::Rows(rows, generation) => {
                    assert!(rows.len() == count, "a take at once gives all that was asked for");
                    self.requests.push(Request::Holds(rows, generation));
                }
                Take::Wait(reply) => self.requests.push(Request::Waits(reply)),
                Take::Short => {}
            },
            Act::Vanish(which) => self.end(which, |model, request| {
                if let Request::Holds(mut rows, generation) = request {
                    model.give_back(&mut rows, generation);
                }
            }),
            Act::Settle(which) => self.end(which, |model, request| match request {
                Request::Holds(rows, _) => {
                    model.buffer.loan_settled(rows.len());
                    model.hand_out(rows);
                }
                waits @ Request::Waits(_) => model.requests.push(waits),
            }),
            Act::Return(which) => self.end(which, |model, request| match request {
                Request::Holds(mut rows, generation) => model.give_back(&mut rows, generation),
                waits @ Request::Waits(_) => model.requests.push(waits),
            }),
            // The refiller does one thing at a time.
            Act::Standby | Act::Import(_) if self.importing.is_some() => {}
            Act::Standby => {
                self.buffer.standby_ready(ROWS);
                self.awake = true;
            }
            Act::Import(place) => {
                if let Ok(standby) = self.buffer.hold_standby() {
                    let rows = rows_of(self.generation).filter(|id| id % 4 == place);
                    let rows = rows.filter(|id| !self.file.imported.contains(id));
                    let result = self.buffer.begin_import(rows.map(Row::for_test).collect());
                    self.importing = Some((result, standby));
                    self.awake = true;
                }
            }
            Act::Work => return self.work(),
        }
        self.awake |= self.buffer.calls_worker();
    }

    fn end(&mut self, which: usize, then: impl FnOnce(&mut Self, Request)) {
        if !self.requests.is_empty() {
            let request = self.requests.swap_remove(which % self.requests.len());
            then(self, request);
        }
    }

    fn give_back(&mut self, rows: &mut Vec<Row>, generation: Generation) {
        let conflicts = rows.iter().filter(|row| self.conflicts.contains(row));
        self.withheld += conflicts.count() as u64;
        let burned = self.buffer.loan_returned(rows, generation);
        assert_eq!(burned, 0, "no generation ends while a loan of it is out");
    }

    fn hand_out(&mut self, rows: impl IntoIterator<Item = Row>) {
        for row in rows {
            let id = row.id_for_test();
            assert!(self.handed_out.insert(id), "a row was handed out twice");
            assert!(!self.file.imported.contains(&id), "a row was handed out after its import");
        }
    }

    /// Runs the worker until it sleeps.
    fn work(&mut self) {
        loop {
            let mut deliveries = Vec::new();
            let task = self.buffer.next(&mut deliveries);
            self.buffer.calls_refiller();
            for Delivery { rows, generation, reply } in deliveries {
                assert!(!rows.is_empty(), "a delivery is never empty");
                reply.send((rows, generation)).expect("a dropped request is never served");
            }
            self.receive();
            match task {
                Task::Lease(count) => {
                    let rows = self.file.lease(count);
                    self.buffer.add_lease(rows, self.file.left());
                }
                Task::Import => self.import(),
                Task::Swap => {
                    self.generation += 1;
                    self.file.unused = rows_of(self.generation).collect();
                    self.buffer.installed();
                }
                Task::Open => {
                    self.buffer.opened(Generation(self.generation), ROWS);
                }
                Task::Retire => {}
                Task::Sleep => break,
                Task::Stop => unreachable!("the model is never stopped"),
            }
        }
        self.awake = false;
    }

    /// Marks the next rows of an import. At its end, the standby is ready again.
    fn import(&mut self) {
        if let Some((rows, leased)) = self.buffer.import_rows() {
            let marked = self.file.import(&rows, &leased);
            self.buffer.imported(&rows, &marked, self.file.left());
            self.conflicts.extend(rows.iter().filter(|row| !marked.contains(row)));
        }
        if let Some((mut result, standby)) = self.importing.take() {
            match result.try_recv() {
                Ok(marked) => {
                    let imported = |value: &Value| self.file.imported.contains(&(value.0 as u32));
                    assert!(marked.iter().all(imported));
                    self.buffer.release_standby(standby);
                }
                Err(TryRecvError::Empty) => self.importing = Some((result, standby)),
                Err(TryRecvError::Closed) => panic!("no import is given up"),
            }
        }
    }

    /// Updates the requests: those that were served hold their rows, and those that were turned away end.
    fn receive(&mut self) {
        for request in std::mem::take(&mut self.requests) {
            let Request::Waits(mut reply) = request else {
                self.requests.push(request);
                continue;
            };
            match reply.try_recv() {
                Ok((rows, generation)) => self.requests.push(Request::Holds(rows, generation)),
                Err(TryRecvError::Empty) => self.requests.push(Request::Waits(reply)),
                Err(TryRecvError::Closed) => {}
            }
        }
    }

    fn waiting(&self) -> usize {
        self.requests.iter().filter(|request| matches!(request, Request::Waits(_))).count()
    }

    fn loans(&self) -> usize {
        self.requests.iter().filter(|request| matches!(request, Request::Holds(..))).count()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

/// A waiting request that is never served would hang until its client gives up.
    #[test]
    fn no_request_waits_while_the_worker_sleeps(lease_rows in prop_oneof![Just(0), 1..80_usize], acts in acts()) {
        let mut model = Model::new(lease_rows);
        for act in acts {
            model.act(act);
            if !model.awake {
                let loans = model.loans();
                prop_assert!(model.waiting() == 0 || loans > 0, "a request is forgotten after {act:?}");
            }
        }
        // When all loans have ended and the worker has run, no request waits, and every row is accounted for.
        while model.loans() > 0 || model.awake {
            let held = model.requests.iter().position(|request| matches!(request, Request::Holds(..)));
            if let Some(held) = held {
                model.act(Act::Return(held));
            }
            model.act(Act::Work);
        }
        prop_assert_eq!(model.waiting(), 0);
        prop_assert!(model.importing.is_none(), "an import is forgotten");
        prop_assert_eq!(model.buffer.handed_out(), model.handed_out.len() as u64 + model.withheld);
        let rest: Vec<_> = model.buffer.take_leased();
        model.hand_out(rest);
        let kept = model.file.left() + model.file.imported.len() as u64 + model.withheld;
        prop_assert_eq!(model.handed_out.len() as u64 + kept, ROWS * model.generation as u64);
    }
}

/// Rows that were not handed out of a file that is set aside are burned: leased or not, on loan or not.
#[test]
fn what_is_lost_is_burned_and_what_was_issued_is_not() {
    let mut buffer = serving();
    buffer.add_lease((0..10).map(Row::for_test).collect(), ROWS - 10);
    buffer.pop();
    let Take::Rows(mut rows, generation) = buffer.take(3, false) else {
        panic!("the rows are ready");
    };
    assert_eq!(buffer.handed_out(), 1);
    assert_eq!(buffer.lost(), ROWS - 4);
    assert!(buffer.is_damaged());
    assert_eq!(buffer.loan_returned(&mut rows, generation), 3);
    assert_eq!((buffer.handed_out(), buffer.burned()), (1, ROWS - 1));
    buffer.standby_ready(ROWS);
    assert_eq!(buffer.next(&mut Vec::new()), Task::Swap);
    buffer.installed();
    assert_eq!(buffer.opened(Generation(2), ROWS), 0);
    assert!(!buffer.is_damaged());
}

/// If an installed standby can't be opened, all of its rows are burned.
#[test]
fn a_standby_that_is_set_aside_is_burned() {
    let mut buffer: Buffer<Rows> = Buffer::new(10, 0, Some(live(0)), Some(ROWS));
    buffer.opened(Generation(1), 0);
    assert_eq!(buffer.next(&mut Vec::new()), Task::Swap);
    buffer.installed();
    assert_eq!(buffer.lost(), ROWS);
    assert_eq!((buffer.burned(), buffer.has_standby()), (ROWS, false));
}

/// A disk fault closes the file, which is then opened again. Rows leased earlier stay valid, and only the
/// failed lease may be burned.
#[test]
fn a_fault_of_the_disk_burns_no_more_than_the_lease_that_failed() {
    let mut buffer = serving();
    buffer.standby_ready(ROWS);
    buffer.add_lease((0..10).map(Row::for_test).collect(), ROWS - 10);
    buffer.closed();
    buffer.pause(Leasing::FileFails);
    assert!(buffer.pop().is_some(), "what is leased is served while the file is closed");
    assert_eq!(buffer.next(&mut Vec::new()), Task::Open);
    assert!(!buffer.remembers(ROWS - 9), "a lease that was committed is not forgotten");
    assert!(buffer.remembers(ROWS - 30));
    assert_eq!(buffer.opened(Generation(1), ROWS - 30), 20);
    assert_eq!((buffer.burned(), buffer.left(), buffer.standby()), (20, ROWS - 21, Some(ROWS)));
}

/// Story: on a full disk, a load balancer was told to send requests that could not be served.
#[test]
fn a_shard_that_fails_serves_while_it_has_leased_rows() {
    let mut buffer = serving();
    buffer.add_lease(vec![Row::for_test(0)], ROWS - 1);
    buffer.pause(Leasing::FileFails);
    assert!(buffer.can_serve());
    buffer.pop();
    assert!(!buffer.can_serve());
    buffer.retry();
    assert!(buffer.can_serve());
}
