//! A copy of an old backup, and WAL at its destination that no backup there needs, which an `expire` there is deleting.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::watch;

use super::archive::{Archive, SIZE_BYTES, begun, id, repository_in};
use super::copy::{everything, side};
use super::copy_beside_expire::{CHILD, PARENT, assert_whole, copied, source, waits};
use super::expire::{Suspended, archive, asked, back_up, expire, files, policy, segments};
use crate::failure::Kind;
use crate::format::Depth;
use crate::ops::copy::{self, Choice, Outcome, Request};
use crate::ops::expire::run;
use crate::ops::verify::Finding;
use crate::ops::{Silent, StopRequest, Which};
use crate::store::Key;
use crate::store::faults::{Call, Fault, FaultStore, Symptom};

/// Backups at the destination alone: one was begun before those that are copied, the other after them.
const OLDER: u64 = 0;
const NEWER: u64 = 3;

/// A destination that has this WAL, and these backups from their first segments on.
async fn destination(wal: std::ops::Range<u64>, backups: &[(u64, u64)]) -> Archive {
    let second = Archive::claimed(SIZE_BYTES).await;
    for number in wal {
        let (name, bytes) = second.segment(number);
        second.push(&name, &bytes).await.unwrap();
    }
    for (backup, start) in backups {
        back_up(&second.calm, *backup, None, *start).await;
    }
    second
}

/// Whoever begins before the last look keeps the WAL that was stored since; nobody knows of who begins later.
#[tokio::test]
async fn wal_stays_as_soon_as_a_backup_that_may_need_it_was_seen_to_begin() {
    let (mut kept, mut gone) = (0, 0);
    for n in 1.. {
        let archive = archive().await;
        let (memory, key) = (archive.memory.clone(), archive.calm.place().begun(&id(9)));
        let json = archive.as_stored(&key, &begun(&id(9), &[])).await;
        archive.calm.store().delete(&Key::new(key.clone())).await.unwrap();
        let before = archive.faults.calls().len();
        let begins = Fault::anywhere().nth(n).symptom(Symptom::Slow(Duration::ZERO));
        archive.faults.inject(begins.hook(move |_, _| memory.overwrite(&key, json.clone())));
        expire(&archive.repository, policy(), false).await.unwrap();
        let calls = &archive.faults.calls()[before..];
        let is_of_wal =
            |(call, key): &(Call, Key)| *call == Call::Delete && key.as_str().contains("/wal/");
        let first_deleted = calls.iter().position(is_of_wal);
        let deleted: Vec<u64> = (2..6).filter(|one| !segments(&archive).contains(one)).collect();
        match first_deleted {
            None => kept += 1,
            Some(first) => {
                let is_look = |(call, key): &(Call, Key)| {
                    *call == Call::ListLevel && key.as_str().ends_with("/backup")
                };
                let last_look = calls[..first].iter().rposition(is_look).unwrap() as u64 + 1;
                assert!(n > last_look, "it began at call {n}, and {deleted:?} went");
                assert_eq!(deleted, [2, 3, 4, 5], "call {n}");
                gone += 1;
            }
        }
        if n > calls.len() as u64 {
            break;
        }
    }
    assert!(kept > 20 && gone > 3, "{kept} and {gone}");
}

/// The process was suspended while it deleted: it cannot know before, and must not hide it afterwards.
#[tokio::test]
async fn an_expire_that_was_suspended_tells_what_wal_it_may_have_taken() {
    let holds_for = Duration::from_secs(1);
    for somebody_began in [true, false] {
        let archive = archive().await;
        let (memory, key) = (archive.memory.clone(), archive.calm.place().begun(&id(9)));
        let json = archive.as_stored(&key, &begun(&id(9), &[])).await;
        archive.calm.store().delete(&Key::new(key.clone())).await.unwrap();
        let suspended = Suspended { next: Arc::default(), lasts: 2 * holds_for };
        let next = suspended.next.clone();
        let hook = move |_: Call, _: &Key| {
            if somebody_began {
                memory.overwrite(&key, json.clone());
            }
            next.store(true, Ordering::SeqCst);
        };
        let meanwhile = Fault::on(Call::Delete).key_contains("/wal/");
        archive.faults.inject(meanwhile.symptom(Symptom::Slow(Duration::ZERO)).hook(hook));
        let request = crate::ops::expire::Request { look_holds_for: holds_for, ..asked(policy()) };
        let outcome = run(&archive.repository, &request, &suspended, StopRequest::new().1).await;
        match outcome {
            Ok(_) => assert!(!somebody_began, "it said nothing"),
            Err(failure) => {
                assert!(somebody_began, "nobody needs it: {failure}");
                assert_eq!(failure.kind, Kind::Integrity, "{failure}");
                assert!(failure.next.contains("highwater copy"), "{failure}");
            }
        }
    }
}

/// Deletions that hang are given up in time, and the next run ends them.
#[tokio::test]
async fn an_expire_whose_store_does_not_delete_wal_gives_up_in_time() {
    let archive = archive().await;
    let slow = Fault::on(Call::Delete).key_contains("/wal/").for_ever();
    archive.faults.inject(slow.symptom(Symptom::Slow(Duration::from_hours(1))));
    let look_holds_for = Duration::from_millis(50);
    let request = crate::ops::expire::Request { look_holds_for, ..asked(policy()) };
    let outcome = run(&archive.repository, &request, &Silent, StopRequest::new().1).await;
    let failure = outcome.unwrap_err();
    assert_eq!(failure.kind, Kind::Store, "{failure}");
    assert!(failure.what.contains("WAL"), "{failure}");
    assert_eq!(segments(&archive), [2, 3, 4, 5, 6, 7, 8, 9]);
    archive.faults.heal();
    expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
}

/// The `expire` had looked before the copy began, and its deletions take effect when the copy has found all WAL there.
#[tokio::test]
async fn a_copy_that_counts_on_old_wal_outwaits_an_expire_that_looked_before_it_began() {
    let first = source().await;
    let second = destination(2..9, &[(NEWER, 7)]).await;
    let faults = FaultStore::new(Arc::new(second.memory.clone()));
    let (began, mut begun) = watch::channel(false);
    let hook = move |_: Call, _: &Key| {
        began.send_replace(true);
    };
    let slow = Symptom::Slow(Duration::from_millis(300));
    let deletion = Fault::on(Call::Delete).key_contains("/wal/").for_ever();
    faults.inject(deletion.symptom(slow).hook(hook));
    let expiring = repository_in(Arc::new(faults.clone()));
    let (expired, report) = tokio::join!(expire(&expiring, policy(), false), async {
        begun.wait_for(|begun| *begun).await.unwrap();
        copied(CHILD, &first, &second, Duration::from_secs(3)).await
    });
    assert!(expired.unwrap().deleted.objects > 0);
    let way = &report.ways[0];
    assert_eq!(way.backups[0].outcome, Outcome::Copied);
    assert_eq!(way.backups[0].wal_complete, Some(true));
    assert!(way.wal.objects > 0, "it was deleted, and brought again");
    assert_eq!(segments(&second), [4, 5, 7, 8], "its own, and what the other needs");
    assert_eq!(second.restore(&id(CHILD)).await.unwrap(), files(2));
    // It has its own WAL and no more, as it was asked for.
    let found = second.verify(Depth::Whole).await.findings;
    let is_behind = |gap: &Finding| gap.fault == "gap" && gap.lost_backups.is_empty();
    assert!(found.iter().all(is_behind), "{found:?}");
}

#[tokio::test]
async fn only_a_copy_that_counts_on_wal_which_some_retention_may_let_go_waits() {
    let first = source().await;
    for (wal, backups, does) in [
        // There is a newer one, which is all that some retention keeps.
        (2..9, &[(NEWER, 7)][..], true),
        (2..9, &[(OLDER, 2), (NEWER, 7)], true),
        // One piece of it is enough.
        (5..9, &[(NEWER, 7)], true),
        // Nothing of it stands there.
        (6..9, &[(NEWER, 7)], false),
        // What the newest there needs, every retention keeps, and all behind it.
        (2..9, &[(OLDER, 2)], false),
        (2..9, &[(OLDER, 4)], false),
        // Nobody knows yet who needs it.
        (2..9, &[], false),
    ] {
        let second = destination(wal.clone(), backups).await;
        assert_eq!(waits(&first, &second).await, does, "{wal:?} with {backups:?}");
        copied(CHILD, &first, &second, Duration::ZERO).await;
        assert_whole(&first, &second, "afterwards").await;
    }
}

/// Several that must wait do it together: each is announced and brought before the first is committed.
#[tokio::test]
async fn while_one_copy_waits_the_next_is_brought() {
    let first = source().await;
    let second = destination(2..9, &[(NEWER, 7)]).await;
    let sides = [side(Which::First, &first), side(Which::Second, &second)];
    let settle_after = Duration::from_secs(2);
    let request = Request { backups: Choice::All, settle_after, ..everything() };
    let stop = StopRequest::new().1;
    let report = copy::run(&sides[0], &sides[1], &request, &Silent, stop).await.unwrap();
    let lines = &report.ways[0].backups;
    assert_eq!(
        lines.iter().map(|line| line.id.clone()).collect::<Vec<_>>(),
        [PARENT, CHILD].map(id)
    );
    assert!(lines.iter().all(|line| line.outcome == Outcome::Copied));
    let calls = second.faults.calls();
    let at = |backup: i64, document: &str| {
        let key = format!("{}/{document}", id(backup));
        let is_it = |(call, at): &(Call, Key)| *call == Call::Create && at.as_str().ends_with(&key);
        calls.iter().position(is_it).unwrap()
    };
    assert!(at(CHILD, "begun.json") < at(PARENT, "committed.json"));
    assert!(at(PARENT, "committed.json") < at(CHILD, "committed.json"));
    assert_whole(&first, &second, "both").await;
}
