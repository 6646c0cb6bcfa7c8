//! Copies between two repositories, with calls that fail on either side.

use std::time::Duration;

use super::archive::{
    Archive, MODES, SIZE_BYTES, begun, contents, id, make_backup, make_backup_of,
};
use crate::failure::{Failure, Kind};
use crate::ops::copy::{self, Choice, Outcome, Request, Side};
use crate::ops::{Silent, StopRequest, Which};
use crate::pg::PgTimestamp;
use crate::plan::retention::Policy;
use crate::plan::target::RecoveryPoint;

/// Everything, from the first into the second.
pub(super) fn everything() -> Request {
    Request {
        backups: Choice::All,
        wal: true,
        from: Some(Which::First),
        dry_run: false,
        host: "host".to_owned(),
        settle_after: Duration::ZERO,
    }
}

pub(super) fn side(which: Which, archive: &Archive) -> Side {
    Side { which, repository: archive.repository.clone(), policy: Policy::nothing_set() }
}

async fn copy(
    first: &Archive,
    second: &Archive,
    request: &Request,
) -> Result<copy::Report, Failure> {
    let sides = [side(Which::First, first), side(Which::Second, second)];
    let stop = StopRequest::new().1;
    copy::run(&sides[0], &sides[1], request, &Silent, stop).await
}

/// What stands in both but for `begun.json`, which tells who made it where.
fn objects(archive: &Archive) -> Vec<String> {
    let keys = archive.memory.keys().into_iter();
    keys.filter(|key| !key.ends_with("begun.json") && !key.contains("/key/")).collect()
}

#[tokio::test]
async fn a_copy_that_fails_anywhere_on_either_side_is_whole_once_it_is_repeated() {
    let (first, ids) = Archive::with_backups().await;
    for is_second in [false, true] {
        for mode in MODES {
            for n in 1.. {
                let second = Archive::claimed(SIZE_BYTES).await;
                let struck_side = if is_second { &second } else { &first };
                let before = struck_side.faults.calls().len() as u64;
                struck_side.faults.inject(mode(n));
                let outcome = copy(&first, &second, &everything()).await;
                let struck = struck_side.faults.calls().len() as u64 - before >= n;
                struck_side.faults.heal();
                if let Err(failure) = &outcome {
                    let word = if is_second { "second" } else { "first" };
                    assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                    assert!(failure.what.contains(word), "call {n}: {failure}");
                }
                for (seed, id) in (1..).zip(&ids) {
                    // Whatever is committed is whole.
                    if second.calm.committed(id).await.unwrap().is_some() {
                        assert_eq!(second.restore(id).await.unwrap(), contents(seed), "call {n}");
                    } else {
                        assert!(outcome.is_err(), "call {n}: success without a backup");
                    }
                }
                let report = copy(&first, &second, &everything()).await.unwrap();
                assert!(report.failed().is_none(), "call {n}: {report:?}");
                assert_eq!(objects(&second), objects(&first), "call {n}");
                for (seed, id) in (1..).zip(&ids) {
                    assert_eq!(second.restore(id).await.unwrap(), contents(seed), "call {n}");
                }
                if !struck {
                    assert!(outcome.is_ok() && n > 20, "the fault never struck");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn what_stands_there_is_not_sent_again() {
    let (first, _) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    let dry = Request { dry_run: true, ..everything() };
    let told = copy(&first, &second, &dry).await.unwrap();
    assert_eq!(told.ways[0].wal.segments, 3);
    assert!(told.ways[0].backups.iter().all(|b| b.outcome == Outcome::WouldBeCopied));
    assert_eq!(second.keys_below("/wal/"), [""; 0], "a dry run stores nothing");
    copy(&first, &second, &everything()).await.unwrap();
    let stored = second.memory.keys();
    let report = copy(&first, &second, &Request { from: None, ..everything() }).await.unwrap();
    for way in &report.ways {
        assert_eq!((way.wal.objects, way.wal.bytes), (0, 0));
        assert!(way.backups.iter().all(|b| b.outcome == Outcome::AlreadyThere && b.packs == 0));
    }
    assert_eq!(second.memory.keys(), stored);
}

#[tokio::test]
async fn each_has_what_the_other_lacked() {
    let first = Archive::claimed(SIZE_BYTES).await;
    let second = Archive::claimed(SIZE_BYTES).await;
    for number in 2..8 {
        let (name, bytes) = first.segment(number);
        // 4 and 5 reached the second only, 6 and 7 the first only.
        if !(4..6).contains(&number) {
            first.push(&name, &bytes).await.unwrap();
        }
        if number < 6 {
            second.push(&name, &bytes).await.unwrap();
        }
    }
    let wal = Request { backups: Choice::Nothing, from: None, ..everything() };
    let report = copy(&first, &second, &wal).await.unwrap();
    assert_eq!(report.ways.iter().map(|way| way.wal.segments).collect::<Vec<_>>(), [2, 2]);
    assert_eq!(objects(&first), objects(&second));
    for number in 2..8 {
        let (name, bytes) = first.segment(number);
        for archive in [&first, &second] {
            assert_eq!(archive.get(&name).await.1.as_ref(), Some(&bytes), "{name}");
        }
    }
}

/// What a server has acknowledged stands there in pieces; a copy of it has archived the segment here.
#[tokio::test]
async fn a_segment_is_not_brought_over_pieces_of_other_wal() {
    let (first, _) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    second.put_pieces(2, &vec![7; SIZE_BYTES as usize], &[0, 20_000]).await;
    let pieces = second.keys_below(".parts/");
    let wal = Request { backups: Choice::Nothing, ..everything() };
    let report = copy(&first, &second, &wal).await.unwrap();
    assert_eq!(report.failed(), Some(Kind::Conflict), "{report:?}");
    assert!(report.ways[0].troubles[0].why.contains(".parts/"));
    assert_eq!(second.keys_below(".parts/"), pieces, "they are still there");
    let (name, _) = first.segment(2);
    assert!(!second.memory.keys().iter().any(|key| key.ends_with(&name)), "and not hidden");
}

#[tokio::test]
async fn pieces_come_along_and_go_when_the_whole_segment_does() {
    let first = Archive::claimed(SIZE_BYTES).await;
    let second = Archive::claimed(SIZE_BYTES).await;
    let (name, bytes) = first.segment(2);
    first.put_pieces(2, &bytes, &[0, 30_000, SIZE_BYTES / 2]).await;
    second.put_pieces(2, &bytes, &[0, 20_000]).await;
    let wal = Request { backups: Choice::Nothing, ..everything() };
    copy(&first, &second, &wal).await.unwrap();
    assert_eq!(second.keys_below(".parts/").len(), 3);
    first.push(&name, &bytes).await.unwrap();
    copy(&first, &second, &wal).await.unwrap();
    assert_eq!(second.keys_below(".parts/"), [""; 0]);
    assert_eq!(second.get(&name).await.1, Some(bytes));
    // The other way, pieces that lie in what stands there are not brought.
    let back = Request { from: Some(Which::Second), ..wal };
    assert_eq!(copy(&first, &second, &back).await.unwrap().ways[0].wal.objects, 0);
}

#[tokio::test]
async fn what_is_damaged_is_told_and_not_copied_and_stops_nothing_else() {
    let (first, ids) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    let segment = first.keys_below("/wal/")[0].clone();
    let pack = first.keys_below(&format!("{}/pack/", ids[0]))[0].clone();
    for key in [&segment, &pack] {
        let mut bytes = first.memory.bytes(key).unwrap().to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        first.memory.overwrite(key, bytes);
    }
    let report = copy(&first, &second, &everything()).await.unwrap();
    assert_eq!(report.failed(), Some(Kind::Integrity));
    let outcomes: Vec<_> = report.ways[0].backups.iter().map(|backup| backup.outcome).collect();
    assert_eq!(outcomes, [Outcome::NotCopied, Outcome::Copied]);
    assert!(second.memory.bytes(&segment).is_none());
    assert!(second.memory.bytes(&pack).is_none());
    assert!(second.calm.committed(&ids[0]).await.unwrap().is_none());
    assert_eq!(report.ways[0].backups[1].wal_complete, Some(false));
}

#[tokio::test]
async fn another_content_of_the_same_name_is_refused_and_stays() {
    let (first, ids) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    make_backup(&second.calm, &ids[0], 7).await.unwrap();
    let report = copy(&first, &second, &everything()).await.unwrap();
    assert_eq!(report.failed(), Some(Kind::Conflict));
    assert_eq!(report.ways[0].backups[0].outcome, Outcome::NotCopied);
    assert_eq!(report.ways[0].backups[1].outcome, Outcome::Copied);
    assert_eq!(second.restore(&ids[0]).await.unwrap(), contents(7));
    assert_eq!(second.restore(&ids[1]).await.unwrap(), contents(2));
}

#[tokio::test]
async fn a_copy_stands_alone_though_what_it_leans_on_is_not_there() {
    let first = Archive::claimed(SIZE_BYTES).await;
    first.push_wal().await;
    let [parent, child] = [1, 2].map(id);
    // It never came to exist; the next backup took over what it had stored.
    let unfinished = make_backup_of(&first.calm, &begun(&parent, &[]), &contents(1)).await;
    unfinished.unwrap();
    let committed = crate::store::Key::new(first.calm.place().committed(&parent));
    let files = crate::store::Key::new(first.calm.place().files(&parent));
    for key in [&committed, &files] {
        first.calm.store().delete(key).await.unwrap();
    }
    let leaning = begun(&child, std::slice::from_ref(&parent));
    let (_, resumed) = make_backup_of(&first.calm, &leaning, &contents(1)).await.unwrap();
    assert!(resumed > 0, "the second backup must lean on the first");
    let second = Archive::claimed(SIZE_BYTES).await;
    let report = copy(&first, &second, &everything()).await.unwrap();
    assert_eq!(report.ways[0].backups.len(), 1);
    assert_ne!(second.keys_below(&format!("{parent}/pack/")), [""; 0]);
    assert_eq!(second.restore(&child).await.unwrap(), contents(1));
}

#[tokio::test]
async fn what_retention_there_has_deleted_does_not_come_back() {
    let (first, ids) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    let policy = Policy { backups: Some(1), ..Policy::nothing_set() };
    let sides = [
        side(Which::First, &first),
        Side { policy: policy.clone(), ..side(Which::Second, &second) },
    ];
    let request = everything();
    for _ in 0..2 {
        let stop = StopRequest::new().1;
        let report = copy::run(&sides[0], &sides[1], &request, &Silent, stop).await.unwrap();
        let outcomes: Vec<_> = report.ways[0].backups.iter().map(|b| b.outcome).collect();
        assert_eq!(outcomes[0], Outcome::NotKept);
        assert!(second.calm.committed(&ids[1]).await.unwrap().is_some());
    }
    // By name it comes, and stays until retention looks.
    let named = Request { backups: Choice::Named(ids[0].clone()), wal: false, ..request };
    let stop = StopRequest::new().1;
    let report = copy::run(&sides[0], &sides[1], &named, &Silent, stop).await.unwrap();
    assert_eq!(report.ways[0].backups[0].outcome, Outcome::Copied);
    assert_eq!(second.restore(&ids[0]).await.unwrap(), contents(1));
}

#[tokio::test]
async fn a_backup_that_is_in_neither_is_absent() {
    let (first, _) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    let named = Request { backups: Choice::Named(id(77)), wal: false, ..everything() };
    assert_eq!(copy(&first, &second, &named).await.unwrap_err().kind, Kind::Absent);
}

/// The restored copy goes as far as the archive it was copied from.
#[tokio::test]
async fn a_restore_from_the_copy_alone_reaches_what_the_source_reaches() {
    let (first, ids) = Archive::with_backups().await;
    let second = Archive::claimed(SIZE_BYTES).await;
    copy(&first, &second, &everything()).await.unwrap();
    let unix_micros = PgTimestamp(4_000_000).to_unix_micros().unwrap();
    let point = RecoveryPoint::Time { unix_micros };
    let of = async |archive: &Archive| {
        let planned = archive.restore_with(Some(&ids[0]), point.clone()).await;
        planned.map(|(_, files)| files).map_err(|failure| failure.kind)
    };
    assert_eq!(of(&second).await, of(&first).await);
}
