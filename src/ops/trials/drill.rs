//! Records of drills on a store that fails, and how old ones go.

use super::archive::{Archive, MODES, SIZE_BYTES, id};
use super::expire::asked;
use crate::format::{Drill, DrillOutcome, FORMAT_VERSION};
use crate::ops::expire::{Request, run};
use crate::ops::{Silent, StopRequest};
use crate::pg::PgTimestamp;
use crate::plan::retention::Policy;

/// The record of a drill that proved nothing.
pub(super) fn drill(host: &str, at: PgTimestamp) -> Drill {
    Drill {
        format: FORMAT_VERSION,
        id: id(0),
        started_at: at,
        finished_at: at,
        host: host.to_owned(),
        outcome: DrillOutcome::Unfinished,
        backup: None,
        target: "the end of the archive".to_owned(),
        seed: None,
        reached: None,
        recovery_millis: None,
        size_bytes: 0,
        wal_bytes: 0,
        phases: Vec::new(),
        checks: Vec::new(),
        failure: None,
        notes: Vec::new(),
        tool: "test".to_owned(),
    }
}

#[tokio::test]
async fn a_record_whose_store_fails_anywhere_is_wholly_there_or_not_and_a_retry_ends_it() {
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let mut record = drill("host", PgTimestamp(0));
            let outcome = archive.repository.put_drill(&mut record).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            let stored = archive.calm.drill_ids().await.unwrap();
            assert!(outcome.is_err() || stored == [record.id.clone()], "call {n}: {stored:?}");
            for id in stored {
                assert_eq!(archive.calm.drill(&id).await.unwrap(), record, "call {n}");
            }
            archive.repository.put_drill(&mut record).await.expect("a retry succeeds");
            assert_eq!(archive.calm.drill_ids().await.unwrap().len(), 1, "call {n}");
            assert_eq!(archive.calm.last_drill().await.unwrap(), Some(record), "call {n}");
            if !struck {
                assert!(outcome.is_ok() && n > 1, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn drills_of_one_second_have_names_of_their_own_and_a_damaged_record_hides_no_other() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let mut names = Vec::new();
    for host in ["one", "two", "three"] {
        let mut record = drill(host, PgTimestamp(0));
        names.push(archive.repository.put_drill(&mut record).await.unwrap());
    }
    let ids = archive.calm.drill_ids().await.unwrap();
    assert_eq!(ids, names.iter().rev().cloned().collect::<Vec<_>>(), "newest first");
    archive.memory.overwrite(archive.calm.drill_key(&names[2]).as_str(), &b"{}"[..]);
    assert_eq!(archive.calm.last_drill().await.unwrap().unwrap().host, "two");
    assert!(archive.calm.drill(&names[2]).await.is_err());
}

#[tokio::test]
async fn old_records_go_with_expire_and_the_newest_stays_whatever_its_age() {
    let (archive, _) = Archive::with_backups().await;
    let day = |day: i64| PgTimestamp(day * 24 * 3600 * 1_000_000);
    for n in 0..3 {
        archive.repository.put_drill(&mut drill("host", day(n))).await.unwrap();
    }
    let policy = Policy { backups: Some(5), ..Policy::nothing_set() };
    let expire = async |now, dry_run| {
        let (_sender, stop) = StopRequest::new();
        let request = Request { dry_run, now: Some(now), ..asked(policy.clone()) };
        run(&archive.repository, &request, &Silent, stop).await.unwrap();
        archive.calm.drill_ids().await.unwrap().len()
    };
    assert_eq!(expire(day(400), false).await, 3);
    assert_eq!(expire(day(402), true).await, 3, "a dry run");
    assert_eq!(expire(day(402), false).await, 1);
    assert_eq!(expire(day(4000), false).await, 1);
    assert_eq!(archive.calm.last_drill().await.unwrap().unwrap().started_at, day(2));
}
