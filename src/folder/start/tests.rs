use super::*;

const LEDGER: Uuid = Uuid::from_u128(1);

/// A batch of 100 numbers of shard 0, whose id equals its generation.
fn batch(generation: i64) -> Batch {
    let (id, shard) = (BatchId(generation), ShardIndex(0));
    Batch { id, shard, generation: Generation(generation), count: 100 }
}

fn label(generation: i64) -> Label {
    Label::new(LEDGER, &PoolName::new("int").unwrap(), 0, batch(generation))
}

fn seen(generation: i64) -> Seen {
    let (token, in_use) = (Token(7), false);
    Seen { label: label(generation), token, in_use, open_rows: 0, unused: 50, had_log: false }
}

/// A ledger that has generations 1 to 3, of which `served` may be served, and whose last token is 7.
fn known(served: &[i64]) -> Known {
    Known {
        ledger_id: LEDGER,
        pool: PoolName::new("int").unwrap(),
        index: ShardIndex(0),
        served: served.iter().map(|&generation| batch(generation)).collect(),
        named: vec![batch(1), batch(2), batch(3)],
        opening: Opening { token: Token(7), next: None, closed: false },
    }
}

fn found(unfinished: Option<i64>, standby: Option<i64>, live: Option<i64>) -> Found {
    Found {
        unfinished: unfinished.map(|generation| Ok(label(generation))),
        standby: standby.map(|generation| Ok(label(generation))),
        live: live.map(|generation| Ok(seen(generation))),
    }
}

/// `Ok` with the resulting (unfinished, standby, live), or the file that is refused.
type Verdict = Result<(Option<Unfinished>, Option<i64>, Option<i64>), File>;

fn verdict(found: Found, known: &Known) -> Verdict {
    let plan = judge(found, known).map_err(|refusal| refusal.file)?;
    let standby = plan.standby.map(|label| label.map_or(-1, |label| label.generation.0));
    let live = plan.live.map(|live| live.map_or(-1, |seen| seen.label.generation.0));
    Ok((plan.unfinished, standby, live))
}

#[test]
fn files_are_kept_adopted_removed_or_refused_by_what_the_ledger_has() {
    use Unfinished::{Adopt, Remove};
    let check =
        |files: (Option<i64>, Option<i64>, Option<i64>), served: &[i64], expected: Verdict| {
            let (unfinished, standby, live) = files;
            let verdict = verdict(found(unfinished, standby, live), &known(served));
            assert_eq!(verdict, expected, "{files:?}, served: {served:?}");
        };
    check((None, None, None), &[], Ok((None, None, None)));
    check((None, None, Some(1)), &[1], Ok((None, None, Some(1))));
    check((None, Some(2), Some(1)), &[1, 2], Ok((None, Some(2), Some(1))));
    // A crash during a swap, after the old file was removed.
    check((None, Some(2), None), &[1, 2], Ok((None, Some(2), None)));
    // The ledger has a batch only if its build is complete.
    check((Some(2), None, Some(1)), &[1, 2], Ok((Some(Adopt), Some(2), Some(1))));
    check((Some(4), None, Some(1)), &[1], Ok((Some(Remove), None, Some(1))));
    check((Some(2), Some(2), Some(1)), &[1, 2], Ok((Some(Remove), Some(2), Some(1))));
    // Older generations, in place of the newest or beside it.
    check((None, None, Some(1)), &[2], Err(File::Live));
    check((None, None, Some(1)), &[1, 2], Err(File::Live));
    check((None, Some(2), Some(2)), &[2], Err(File::Live));
    check((None, Some(1), Some(2)), &[2], Err(File::Standby));
    // The ledger itself is older than the file.
    check((None, None, Some(4)), &[3], Err(File::Live));
    check((None, Some(4), Some(3)), &[3], Err(File::Standby));
}

#[test]
fn a_file_of_another_ledger_pool_or_shard_is_refused() {
    let check = |change: fn(&mut Label)| {
        let mut files = found(None, None, Some(1));
        change(&mut files.live.as_mut().unwrap().as_mut().unwrap().label);
        assert_eq!(verdict(files, &known(&[1])), Err(File::Live));
    };
    check(|label| label.ledger_id = Uuid::from_u128(2));
    check(|label| label.pool = PoolName::new("float").unwrap());
    check(|label| label.index = ShardIndex(1));
    check(|label| label.rows = 99);
}

#[test]
fn an_older_copy_of_the_same_generation_is_refused() {
    let check = |opening: Opening, token: i64, in_use: bool, expected: Verdict| {
        let known = Known { opening, ..known(&[1]) };
        let live = Seen { token: Token(token), in_use, had_log: true, ..seen(1) };
        let files = Found { live: Some(Ok(live)), ..Found::default() };
        assert_eq!(verdict(files, &known), expected, "{opening:?}, {token}, {in_use}");
    };
    let kept = Ok((None, None, Some(1)));
    let open = Opening { token: Token(7), next: None, closed: false };
    check(open, 7, true, kept);
    check(open, 7, false, kept);
    check(open, 6, false, Err(File::Live));
    check(open, 0, false, Err(File::Live));
    // A copy from before a graceful stop is still marked as in use.
    let closed = Opening { closed: true, ..open };
    check(closed, 7, false, kept);
    check(closed, 7, true, Err(File::Live));
    // A crash during a start.
    let starting = Opening { next: Some(Token(8)), ..closed };
    check(starting, 7, false, kept);
    check(starting, 8, false, kept);
    check(starting, 8, true, kept);
    check(starting, 6, false, Err(File::Live));
}

#[test]
fn only_content_sets_a_file_aside() {
    let damaged = || Some(Err("a page is damaged".to_owned()));
    let standby =
        Found { standby: Some(Err("a page is damaged".to_owned())), ..found(None, None, Some(1)) };
    assert_eq!(verdict(standby, &known(&[1, 2])), Ok((None, Some(-1), Some(1))));
    let live = Found { live: damaged(), ..found(None, Some(2), None) };
    assert_eq!(verdict(live, &known(&[1, 2])), Ok((None, Some(2), Some(-1))));
    // A file in use without the log that may have held leases.
    let check = |had_log, unused, expected| {
        let live = Seen { in_use: true, had_log, unused, ..seen(1) };
        let files = Found { live: Some(Ok(live)), ..Found::default() };
        assert_eq!(verdict(files, &known(&[1])), Ok((None, None, Some(expected))));
    };
    check(true, 50, 1);
    check(false, 50, -1);
    check(false, 0, 1);
}
