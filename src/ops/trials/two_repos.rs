//! Storing into two repositories and reading from either, with calls that fail.

use std::sync::Arc;
use std::time::Duration;

use super::archive::{Archive, MODES, SIZE_BYTES, SYSTEM};
use crate::failure::{Failure, Kind};
use crate::ops::archive_get;
use crate::ops::archive_push::{self, Second};
use crate::repo::SegmentSource;
use crate::store::faults::{Fault, Symptom};

async fn push(
    first: &Archive,
    second: &Archive,
    number: u64,
    one_is_enough: bool,
) -> Result<archive_push::Report, Failure> {
    let (name, bytes) = first.segment(number);
    let mut request = first.push_request(&name, &bytes, false);
    let second = Second::new(second.repository.clone(), one_is_enough);
    request.second = Some(Arc::new(second));
    archive_push::run(&first.repository, &request).await
}

async fn get(
    first: &Archive,
    second: &Archive,
    name: &str,
) -> (Result<archive_get::Report, Failure>, Option<Vec<u8>>) {
    first.get_or_from(Some(second), None, name).await
}

async fn has(archive: &Archive, number: u64) -> bool {
    let (name, bytes) = archive.segment(number);
    let calm = archive.faults.clone();
    calm.heal();
    archive.get(&name).await.1 == Some(bytes)
}

/// Every call fails, for ever.
fn down(archive: &Archive) {
    archive.faults.inject(Fault::anywhere().for_ever());
}

#[tokio::test]
async fn success_means_that_at_least_one_holds_it_whichever_call_fails() {
    for strikes_second in [false, true] {
        for mode in MODES {
            for n in 1.. {
                let (first, second) =
                    (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
                let struck_side = if strikes_second { &second } else { &first };
                let before = struck_side.faults.calls().len() as u64;
                struck_side.faults.inject(mode(n));
                let outcome = push(&first, &second, 2, true).await;
                let struck = struck_side.faults.calls().len() as u64 - before >= n;
                struck_side.faults.heal();
                assert!(outcome.is_ok(), "call {n}: {outcome:?}");
                let (whole, other) =
                    if strikes_second { (&first, &second) } else { (&second, &first) };
                assert!(has(whole, 2).await, "call {n}");
                if !struck {
                    assert!(has(other, 2).await && n > 2, "the fault never struck");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn one_that_is_away_stops_the_server_only_if_both_copies_are_wanted() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    for (gone, here) in [(&first, &second), (&second, &first)] {
        down(gone);
        let failure = push(&first, &second, 3, false).await.unwrap_err();
        assert_eq!(failure.kind, Kind::Store);
        push(&first, &second, 3, true).await.unwrap();
        assert!(has(here, 3).await);
        gone.faults.heal();
    }
    down(&first);
    down(&second);
    assert_eq!(push(&first, &second, 4, true).await.unwrap_err().kind, Kind::Store);
}

#[tokio::test]
async fn one_that_refuses_is_never_passed_over() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    let (name, bytes) = first.segment(2);
    let other = crate::pg::wal_build::build_segment(
        crate::pg::Timeline(1),
        2,
        first.size,
        SYSTEM,
        &[crate::pg::wal_build::RecordSpec::filler(100)],
    );
    second.push(&name, &other).await.unwrap();
    let failure = push(&first, &second, 2, true).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Conflict, "{failure}");
    assert!(failure.what.contains("second"), "{failure}");
    assert_eq!(second.get(&name).await.1, Some(other));
    assert_eq!(first.get(&name).await.1, Some(bytes));
}

#[tokio::test]
async fn one_that_hangs_is_waited_for_some_seconds_and_once() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    let hour = Symptom::Slow(Duration::from_hours(1));
    second.faults.inject(Fault::anywhere().for_ever().symptom(hour));
    let keeps = Arc::new(Second::new(second.repository.clone(), true));
    let began = std::time::Instant::now();
    for number in 2..5 {
        let (name, bytes) = first.segment(number);
        let mut request = first.push_request(&name, &bytes, false);
        request.second = Some(keeps.clone());
        archive_push::run(&first.repository, &request).await.unwrap();
    }
    let waited = began.elapsed();
    // One wait and not three.
    assert!((10..20).contains(&waited.as_secs()), "{waited:?}");
    assert!(has(&first, 4).await);
}

#[tokio::test]
async fn absent_is_said_only_if_both_say_so_whichever_call_fails() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    first.push_wal().await;
    let (absent, bytes) = (first.segment(9).0, first.segment(2).1);
    let present = first.segment(2).0;
    second.push(&present, &bytes).await.unwrap();
    for struck_side in [&first, &second] {
        for (number, mode) in (0..).zip(MODES) {
            for n in 1.. {
                let before = struck_side.faults.calls().len() as u64;
                struck_side.faults.inject(mode(n));
                let (outcome, handed_out) = get(&first, &second, &absent).await;
                let struck = struck_side.faults.calls().len() as u64 - before >= n;
                struck_side.faults.heal();
                let kind = outcome.unwrap_err().kind;
                assert_eq!(handed_out, None);
                // What is absent cannot be cut short: there the store has truly answered.
                let may_be_certain = !struck || number == 2;
                let fits = kind == Kind::Store || (kind == Kind::Absent && may_be_certain);
                assert!(fits, "call {n}: {kind:?}");
                if !struck {
                    assert!(kind == Kind::Absent && n > 1, "the fault never struck");
                    break;
                }
                // What is there comes from the other, whatever fails here.
                struck_side.faults.inject(mode(n));
                assert_eq!(get(&first, &second, &present).await.1.as_ref(), Some(&bytes));
                struck_side.faults.heal();
            }
        }
    }
}

#[tokio::test]
async fn damage_in_one_is_made_good_from_the_other() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    for archive in [&first, &second] {
        archive.push_wal().await;
    }
    let (name, bytes) = first.segment(3);
    let key = first.keys_below(&name)[0].clone();
    let mut damaged = first.memory.bytes(&key).unwrap().to_vec();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    first.memory.overwrite(&key, damaged);
    assert_eq!(get(&first, &second, &name).await.1, Some(bytes));
    second.calm.store().delete(&crate::store::Key::new(key)).await.unwrap();
    let (outcome, handed_out) = get(&first, &second, &name).await;
    assert_eq!((outcome.unwrap_err().kind, handed_out), (Kind::Integrity, None));
}

#[tokio::test]
async fn the_longer_truth_wins_and_a_part_is_the_end_only_if_both_were_asked() {
    let (first, second) = (Archive::claimed(SIZE_BYTES).await, Archive::claimed(SIZE_BYTES).await);
    let (name, bytes) = first.segment(2);
    first.put_pieces(2, &bytes, &[0, 20_000]).await;
    let source = async || get(&first, &second, &name).await.0.map(|report| report.source);
    let pieces = |valid_bytes| Some(SegmentSource::Pieces { valid_bytes });
    assert_eq!(source().await.unwrap(), pieces(20_000));
    second.put_pieces(2, &bytes, &[0, 25_000]).await;
    assert_eq!(source().await.unwrap(), pieces(25_000));
    down(&second);
    assert_eq!(source().await.unwrap_err().kind, Kind::Store, "the other may hold the rest");
    second.faults.heal();
    second.push(&name, &bytes).await.unwrap();
    assert_eq!(source().await.unwrap(), Some(SegmentSource::Whole));
    down(&first);
    assert_eq!(get(&first, &second, &name).await.1, Some(bytes));
}
