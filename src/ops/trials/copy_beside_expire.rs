//! A copy, and what a deleted backup has left at its destination, which an `expire` there is deleting.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{FutureExt, TryStreamExt};
use tokio::sync::watch;

use super::archive::{Archive, SIZE_BYTES, id, repository_in};
use super::copy::{everything, side};
use super::expire::{asked, back_up_in_packs_of, expire, files, policy};
use crate::failure::{Failure, Kind, StopSignal};
use crate::format::{BackupId, Depth};
use crate::ops::copy::{self, Choice, Outcome, Report, Request};
use crate::ops::{Progress, Silent, StopRequest, Which};
use crate::store::faults::{Call, Fault, FaultStore, Symptom};
use crate::store::memory::MemoryStore;
use crate::store::{Key, Store};

/// The backup that is copied, and the one of whose packs it needs some.
pub(super) const CHILD: i64 = 2;
pub(super) const PARENT: i64 = 1;

/// A repository with a backup and one that leans on it, in as many packs as can be.
pub(super) async fn source() -> Archive {
    let first = Archive::claimed(SIZE_BYTES).await;
    for number in 2..9 {
        let (name, bytes) = first.segment(number);
        first.push(&name, &bytes).await.unwrap();
    }
    back_up_in_packs_of(&first.calm, 1, 1, None, 2).await;
    back_up_in_packs_of(&first.calm, 1, 2, Some(1), 4).await;
    let needed = needed(&first).await;
    for owner in [PARENT, CHILD].map(id) {
        assert!(needed.iter().any(|(of, _)| *of == owner), "{needed:?}");
    }
    first
}

/// The packs that the child needs.
async fn needed(first: &Archive) -> Vec<(BackupId, u32)> {
    let child = first.calm.committed(&id(CHILD)).await.unwrap().unwrap();
    let of = |reference: crate::format::Reference| {
        let owner = reference.backup;
        reference.packs.into_iter().map(move |pack| (owner.clone(), pack.pack))
    };
    child.references.into_iter().flat_map(of).collect()
}

/// Copies one backup, as it was asked for by its name.
async fn copy_of(
    backup: i64,
    first: &Archive,
    second: &Archive,
    settle_after: Duration,
    progress: &dyn Progress,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let sides = [side(Which::First, first), side(Which::Second, second)];
    let backups = Choice::Named(id(backup));
    let request = Request { backups, wal: false, settle_after, ..everything() };
    copy::run(&sides[0], &sides[1], &request, progress, stop).await
}

/// The same undisturbed.
pub(super) async fn copied(
    backup: i64,
    first: &Archive,
    second: &Archive,
    settle_after: Duration,
) -> Report {
    let stop = StopRequest::new().1;
    copy_of(backup, first, second, settle_after, &Silent, stop).await.unwrap()
}

/// A destination at which everything of these backups stands but the documents that make them backups.
async fn with_remains_of(first: &Archive, backups: &[i64]) -> Archive {
    let second = Archive::claimed(SIZE_BYTES).await;
    for backup in backups {
        copied(*backup, first, &second, Duration::ZERO).await;
    }
    for backup in backups {
        for document in ["committed.json", "begun.json", "files"] {
            let key = format!("main/backup/{}/{document}", id(*backup));
            second.calm.store().delete(&Key::new(key)).await.unwrap();
        }
    }
    second
}

/// Every pack that the child needs, with its bytes.
async fn packs(first: &Archive, archive: &Archive) -> BTreeMap<String, Option<Bytes>> {
    let mut found = BTreeMap::new();
    for (owner, pack) in needed(first).await {
        let key = archive.calm.place().pack(&owner, pack);
        let bytes = match archive.calm.store().read(&Key::new(key.clone()), None).await {
            Ok(reading) => {
                let pieces: Vec<Bytes> = reading.bytes.try_collect().await.unwrap();
                Some(pieces.concat().into())
            }
            Err(_) => None,
        };
        found.insert(key, bytes);
    }
    found
}

/// The child is there, with every byte of every pack, and can be restored.
pub(super) async fn assert_whole(first: &Archive, second: &Archive, what: &str) {
    assert_eq!(packs(first, second).await, packs(first, first).await, "{what}");
    assert_eq!(second.restore(&id(CHILD)).await.unwrap(), files(2), "{what}");
    let report = second.verify(Depth::Whole).await;
    assert_eq!(report.failed(), None, "{what}: {:?}", report.findings);
}

/// An `expire` that nobody could see deletes a pack, or the file list, at every moment up to the last look at it: before
/// the look before the commit, between that and the commit, and between the commit and the look behind it.
#[tokio::test]
async fn what_is_deleted_at_any_moment_up_to_the_look_behind_the_commit_is_brought_again() {
    let first = source().await;
    let mut doomed: Vec<(String, String)> = Vec::new();
    for (owner, pack) in needed(&first).await {
        doomed.push((first.calm.place().pack(&owner, pack), first.calm.place().packs_dir(&owner)));
    }
    let own = first.calm.place().backup_dir(&id(CHILD));
    doomed.push((first.calm.place().files(&id(CHILD)), own));
    for remains in [&[][..], &[PARENT], &[PARENT, CHILD]] {
        let stood = with_remains_of(&first, remains).await;
        for (key, directory) in &doomed {
            let (mut before, mut behind) = (0, 0);
            for n in 1.. {
                let second = Archive::empty(SIZE_BYTES);
                for key in stood.memory.keys() {
                    second.memory.overwrite(&key, stood.memory.bytes(&key).unwrap());
                }
                let memory = second.memory.clone();
                let gone = key.clone();
                let deletion = Fault::anywhere().nth(n).symptom(Symptom::Slow(Duration::ZERO));
                second.faults.inject(deletion.hook(move |_, _| take_away(&memory, &gone)));
                let report = copied(CHILD, &first, &second, Duration::ZERO).await;
                second.faults.heal();
                let calls = second.faults.calls();
                let is_look =
                    |(call, at): &(Call, Key)| *call == Call::ListLevel && at.as_str() == directory;
                let last_look = calls.iter().rposition(is_look).unwrap() as u64 + 1;
                if n > last_look {
                    break;
                }
                let is_commit = |(call, at): &(Call, Key)| {
                    *call == Call::Create && at.as_str().ends_with("/committed.json")
                };
                let commit = calls.iter().position(is_commit).unwrap() as u64 + 1;
                *(if n <= commit { &mut before } else { &mut behind }) += 1;
                let what = format!("{key} went before call {n} of {}: {remains:?}", calls.len());
                assert_eq!(report.ways[0].backups[0].outcome, Outcome::Copied, "{what}");
                assert_eq!(packs(&first, &second).await, packs(&first, &first).await, "{what}");
                assert!(second.memory.bytes(&second.calm.place().files(&id(CHILD))).is_some());
                if n + 1 >= commit {
                    assert_whole(&first, &second, &what).await;
                }
            }
            assert!(before > 5 && behind > 0, "{key}: {before} and {behind} moments");
        }
    }
}

/// Takes an object away, as a deletion does that was asked for long ago.
fn take_away(memory: &MemoryStore, key: &str) {
    memory.delete(&Key::new(key)).now_or_never().unwrap().unwrap();
}

/// The `expire` had looked before the copy began, and its deletions take effect when the copy has done all that it has to:
/// `committed.json` stood by then, and the look behind it found every pack.
#[tokio::test]
async fn a_copy_that_counts_on_remains_outwaits_an_expire_that_looked_before_it_began() {
    let first = source().await;
    let second = with_remains_of(&first, &[PARENT, CHILD]).await;
    // One that is kept, and the WAL since, or nothing would go.
    let kept = 3;
    back_up_in_packs_of(&second.calm, 1, 3, None, 2).await;
    let faults = FaultStore::new(std::sync::Arc::new(second.memory.clone()));
    let slow = Symptom::Slow(Duration::from_millis(300));
    let (began, mut begun) = watch::channel(false);
    for owner in [PARENT, CHILD] {
        let began = began.clone();
        let deletion = Fault::on(Call::Delete).key_contains(format!("{}/pack/", id(owner)));
        let hook = move |_: Call, _: &Key| {
            began.send_replace(true);
        };
        faults.inject(deletion.for_ever().symptom(slow).hook(hook));
    }
    let expiring = repository_in(std::sync::Arc::new(faults.clone()));
    let (expired, report) = tokio::join!(expire(&expiring, policy(), false), async {
        begun.wait_for(|begun| *begun).await.unwrap();
        copied(CHILD, &first, &second, Duration::from_secs(3)).await
    });
    assert!(expired.unwrap().deleted.objects > 0);
    assert_eq!(report.ways[0].backups[0].outcome, Outcome::Copied);
    assert!(report.ways[0].backups[0].packs > 0, "they were deleted, and brought again");
    assert_whole(&first, &second, "beside an expire").await;
    assert!(second.calm.committed(&id(kept)).await.unwrap().is_some());
}

/// Wants the work to stop as soon as it says that it waits.
struct StopsWaits(watch::Sender<Option<StopSignal>>);

impl Progress for StopsWaits {
    fn total(&self, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn note(&self, message: &str) {
        if message.contains("`expire`") {
            self.0.send_replace(Some(StopSignal::Terminate));
        }
    }
    fn finish(&self) {}
}

/// Copies the child and returns whether it would have waited for an hour.
pub(super) async fn waits(first: &Archive, second: &Archive) -> bool {
    let (sender, stop) = StopRequest::new();
    let hour = Duration::from_hours(1);
    let began = Instant::now();
    let outcome = copy_of(CHILD, first, second, hour, &StopsWaits(sender), stop).await;
    assert!(began.elapsed() < hour, "a stop ends the wait");
    match outcome {
        Ok(report) => {
            assert_eq!(report.ways[0].backups[0].outcome, Outcome::Copied);
            false
        }
        Err(failure) => {
            assert_eq!(failure.kind, Kind::Stopped(StopSignal::Terminate), "{failure}");
            true
        }
    }
}

#[tokio::test]
async fn only_a_copy_that_counts_on_what_nobody_holds_waits_and_a_stop_ends_that() {
    let first = source().await;
    // Nothing stood there.
    let second = Archive::claimed(SIZE_BYTES).await;
    assert!(!waits(&first, &second).await);
    assert_whole(&first, &second, "nothing stood there").await;
    // What it leans on is there.
    let second = Archive::claimed(SIZE_BYTES).await;
    copied(PARENT, &first, &second, Duration::ZERO).await;
    assert!(!waits(&first, &second).await);
    // What it leans on was deleted, and another that is there needs every pack that it needs of it.
    back_up_in_packs_of(&first.calm, 1, 3, Some(1), 6).await;
    for (other, is_held) in [(3, true), (4, false)] {
        let second = with_remains_of(&first, &[PARENT]).await;
        if other == 3 {
            copied(other, &first, &second, Duration::ZERO).await;
        } else {
            back_up_in_packs_of(&second.calm, 1, 4, None, 2).await;
        }
        assert_eq!(waits(&first, &second).await, !is_held, "beside {other}");
    }
    for remains in [&[PARENT][..], &[CHILD], &[PARENT, CHILD]] {
        let second = with_remains_of(&first, remains).await;
        assert!(waits(&first, &second).await, "{remains:?}");
        assert!(second.calm.committed(&id(CHILD)).await.unwrap().is_none());
        // The next finds it announced, and knows all the same that packs stood there before.
        assert!(waits(&first, &second).await, "{remains:?}, again");
        copied(CHILD, &first, &second, Duration::ZERO).await;
        assert_whole(&first, &second, "afterwards").await;
    }
}

/// A copy that was killed goes on without a wait where nothing stood before it: what stands is its own.
#[tokio::test]
async fn what_an_earlier_copy_has_brought_is_counted_on_at_once() {
    let first = source().await;
    let mut resumed = 0;
    for n in 1.. {
        let second = Archive::claimed(SIZE_BYTES).await;
        copied(PARENT, &first, &second, Duration::ZERO).await;
        let calls = second.faults.calls().len();
        second.faults.inject(Fault::anywhere().nth(n).for_ever());
        let stop = StopRequest::new().1;
        let died = copy_of(CHILD, &first, &second, Duration::ZERO, &Silent, stop).await.is_err();
        second.faults.heal();
        if !died {
            assert!(((second.faults.calls().len() - calls) as u64) < n, "the fault struck");
            break;
        }
        let is_there = second.calm.committed(&id(CHILD)).await.unwrap().is_some();
        if !is_there {
            resumed += 1;
            assert!(!waits(&first, &second).await, "died at call {n}");
            assert_whole(&first, &second, "resumed").await;
        }
    }
    assert!(resumed > 5, "{resumed}");
}

/// The copy slept between its last look and the commit, and was taken for dead: it announces itself again, so that no
/// `expire` goes on deleting what it leans on, and looks once more.
#[tokio::test]
async fn a_copy_that_was_taken_for_dead_while_it_was_committed_announces_itself_again() {
    let first = source().await;
    let second = with_remains_of(&first, &[PARENT]).await;
    let begun = format!("main/backup/{}/begun.json", id(CHILD));
    let doomed = [packs(&first, &first).await.into_keys().collect(), vec![begun.clone()]].concat();
    let memory = second.memory.clone();
    let at_the_commit = Fault::on(Call::Create).key_contains("committed.json");
    let hook = move |_: Call, _: &Key| doomed.iter().for_each(|key| take_away(&memory, key));
    second.faults.inject(at_the_commit.symptom(Symptom::Slow(Duration::ZERO)).hook(hook));
    let report = copied(CHILD, &first, &second, Duration::ZERO).await;
    assert_eq!(report.ways[0].backups[0].outcome, Outcome::Copied);
    assert!(second.memory.bytes(&begun).is_some());
    assert_whole(&first, &second, "taken for dead").await;
    assert!(asked(policy()).look_holds_for < crate::plan::retention::REMAINS_SETTLE_AFTER);
}

/// What is missing of a backup that is there comes with the next copy: its file list as well.
#[tokio::test]
async fn whatever_is_missing_of_a_backup_that_is_there_is_brought() {
    let first = source().await;
    let mut doomed: Vec<String> = packs(&first, &first).await.into_keys().collect();
    doomed.push(first.calm.place().files(&id(CHILD)));
    for key in doomed {
        let second = Archive::claimed(SIZE_BYTES).await;
        copied(CHILD, &first, &second, Duration::ZERO).await;
        take_away(&second.memory, &key);
        let report = copied(CHILD, &first, &second, Duration::ZERO).await;
        assert_eq!(report.ways[0].backups[0].outcome, Outcome::AlreadyThere, "{key}");
        assert_whole(&first, &second, &key).await;
    }
}
