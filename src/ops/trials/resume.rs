//! Backups that die anywhere, and the next one that goes on from what they had stored.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::archive::{Archive, SIZE_BYTES, begun, contents, id, make_backup_of, noise};
use crate::format::BackupId;
use crate::repo::RepoError;
use crate::store::faults::{Call, Fault};
use crate::store::{Key, StoreError};

/// The same files each time, 11 MiB that do not compress: a few packs.
fn files() -> Vec<(String, Vec<u8>)> {
    let mut files = contents(1);
    files[2].1 = noise(9, 11 << 20);
    files
}

/// Room for headers, maps, lists and indexes of packs.
const AROUND_BYTES: u64 = 64 << 10;

impl Archive {
    async fn back_up(&self, id: &BackupId, after: &[BackupId]) -> Result<(u64, u64), RepoError> {
        make_backup_of(&self.repository, &begun(id, after), &files()).await
    }

    fn packs_of(&self, id: &BackupId) -> Vec<String> {
        self.keys_below(&format!("/backup/{id}/pack/"))
    }

    fn bytes_of(&self, id: &BackupId) -> u64 {
        let packs = self.packs_of(id);
        packs.iter().map(|key| self.memory.bytes(key).unwrap().len() as u64).sum()
    }

    /// Runs a backup whose store goes away for good at the `n`th call.
    async fn die(&self, id: &BackupId, after: &[BackupId], n: u64) -> bool {
        self.faults.inject(Fault::anywhere().nth(n).for_ever());
        let outcome = self.back_up(id, after).await;
        self.faults.heal();
        outcome.is_err()
    }

    /// An archive with a backup that died when all of its packs were stored.
    async fn with_a_dead_backup() -> (Self, BackupId) {
        let (archive, dead) = (Self::claimed(SIZE_BYTES).await, id(1));
        archive.push_wal().await;
        archive.faults.inject(Fault::on(Call::Create).key_contains("/files"));
        archive.back_up(&dead, &[]).await.unwrap_err();
        archive.faults.heal();
        assert!(archive.packs_of(&dead).len() >= 3);
        (archive, dead)
    }
}

#[tokio::test]
async fn a_backup_stores_only_what_those_that_died_anywhere_had_not() {
    let whole = {
        let archive = Archive::claimed(SIZE_BYTES).await;
        archive.back_up(&id(1), &[]).await.unwrap().0
    };
    let (first, second, third) = (id(1), id(2), id(3));
    for n in 1.. {
        let archive = Archive::claimed(SIZE_BYTES).await;
        archive.push_wal().await;
        let died = archive.die(&first, &[], n).await;
        let after = [first.clone(), second.clone()];
        // The second one dies as well, somewhere else.
        let died_again = archive.die(&second, &after[..1], n + 7).await;
        // One that has its list already may have been committed once, and is left alone.
        let has_no_list = |id: &&BackupId| archive.keys_below(&format!("{id}/files")).is_empty();
        let had: u64 = after.iter().filter(has_no_list).map(|id| archive.bytes_of(id)).sum();
        if died && died_again {
            let (stored, taken) = archive.back_up(&third, &after).await.unwrap();
            assert!(stored + had < whole + 3 * AROUND_BYTES, "call {n}: {had}, then {stored}");
            assert_eq!(taken > 0, had > AROUND_BYTES, "call {n}: {taken} of {had}");
            assert_eq!(archive.restore(&third).await.unwrap(), files(), "call {n}");
            // What is needed stays, and the backup with it.
            for dead in &after {
                archive.repository.forget_unfinished(dead).await.unwrap();
            }
            assert_eq!(archive.restore(&third).await.unwrap(), files(), "call {n}");
        }
        if !died {
            assert!(n > 6, "the store never went away");
            break;
        }
    }
}

#[tokio::test]
async fn packs_that_are_damaged_or_gone_are_not_taken_over() {
    for damage in 0..6 {
        let (archive, dead) = Archive::with_a_dead_backup().await;
        let pack = archive.packs_of(&dead)[1].clone();
        let good = archive.memory.bytes(&pack).unwrap();
        let mut bad = good.to_vec();
        match damage {
            0 => bad.truncate(good.len() - 1),
            1 => bad.push(0),
            2 => bad[100] ^= 1,
            3 => *bad.last_mut().unwrap() ^= 1,
            4 => bad = archive.memory.bytes(&archive.packs_of(&dead)[0]).unwrap().to_vec(),
            _ => archive.calm.store().delete(&Key::new(pack.clone())).await.unwrap(),
        }
        if damage < 5 {
            archive.memory.overwrite(&pack, bad);
        }
        let (stored, taken) = archive.back_up(&id(2), std::slice::from_ref(&dead)).await.unwrap();
        let pack_bytes = good.len() as u64;
        assert!(
            stored > pack_bytes / 2 && stored < pack_bytes + AROUND_BYTES,
            "{damage}: {stored}"
        );
        assert!(taken > pack_bytes, "{damage}: the other packs are good");
        assert_eq!(archive.restore(&id(2)).await.unwrap(), files(), "{damage}");
    }
}

#[tokio::test]
async fn what_is_being_removed_is_not_taken_over() {
    // Its `begun.json` is gone already; or it was committed once, as its list shows.
    for case in ["begun.json", "committed.json"] {
        let (archive, dead) = Archive::with_a_dead_backup().await;
        let after = std::slice::from_ref(&dead);
        let once = id(5);
        archive.back_up(&once, after).await.unwrap();
        let gone = if case == "begun.json" { &dead } else { &once };
        let key = archive.keys_below(&format!("{gone}/{case}")).remove(0);
        archive.calm.store().delete(&Key::new(key)).await.unwrap();
        let (_, taken) = archive.back_up(&id(6), std::slice::from_ref(gone)).await.unwrap();
        assert_eq!(taken, 0, "{case}");
        assert_eq!(archive.restore(&id(6)).await.unwrap(), files(), "{case}");
    }
}

#[tokio::test]
async fn what_another_backup_leans_on_is_not_removed_and_goes_when_none_does() {
    let (archive, dead) = Archive::with_a_dead_backup().await;
    let after = std::slice::from_ref(&dead);
    // One that has only begun counts as much as one that is committed.
    let (next, packs) = (id(2), archive.packs_of(&dead));
    assert!(archive.die(&next, after, 12).await);
    assert!(!archive.calm.forget_unfinished(&dead).await.unwrap());
    assert_eq!(archive.packs_of(&dead), packs);
    assert!(archive.calm.forget_unfinished(&next).await.unwrap());
    assert!(archive.calm.forget_unfinished(&dead).await.unwrap());
    assert_eq!(archive.keys_below("/backup/"), [""; 0]);

    let (archive, dead) = Archive::with_a_dead_backup().await;
    archive.back_up(&next, std::slice::from_ref(&dead)).await.unwrap();
    assert!(!archive.calm.forget_unfinished(&dead).await.unwrap());
    let committed = archive.keys_below(&format!("{next}/committed.json")).remove(0);
    archive.calm.store().delete(&Key::new(committed)).await.unwrap();
    for gone in [&next, &dead] {
        assert!(archive.calm.forget_unfinished(gone).await.unwrap());
    }
    assert_eq!(archive.keys_below("/backup/"), [""; 0]);
}

/// Whoever removes a backup and whoever leans on it meet at every point of each other's way.
#[tokio::test]
async fn removing_and_leaning_never_miss_each_other() {
    for n in 1..30 {
        let (archive, dead) = Archive::with_a_dead_backup().await;
        let (calm, gone) = (archive.calm.clone(), dead.clone());
        // At its nth call the new backup stands still, until the other has removed what it removes.
        let remove = move || {
            let (calm, gone) = (calm.clone(), gone.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(calm.forget_unfinished(&gone)).unwrap();
            })
            .join()
            .unwrap();
        };
        let slow = crate::store::faults::Symptom::Slow(std::time::Duration::ZERO);
        let fault = Fault::anywhere().nth(n).symptom(slow).hook(move |_, _| remove());
        archive.faults.inject(fault);
        archive.back_up(&id(2), std::slice::from_ref(&dead)).await.unwrap();
        archive.faults.heal();
        assert_eq!(archive.restore(&id(2)).await.unwrap(), files(), "call {n}");
    }
}

/// A removal that was cut short leaves packs under an id that another backup of the same second would take.
#[tokio::test]
async fn an_id_under_which_something_is_left_is_not_taken_again() {
    for keeps in ["/pack/", "/files"] {
        let archive = Archive::claimed(SIZE_BYTES).await;
        archive.push_wal().await;
        let old = id(1);
        archive.back_up(&old, &[]).await.unwrap();
        let keys = archive.keys_below(&format!("/backup/{old}/"));
        for key in keys.iter().filter(|key| !key.contains(keeps)) {
            archive.calm.store().delete(&Key::new(key.clone())).await.unwrap();
        }
        let left = archive.keys_below("/backup/");
        assert!(!left.is_empty());
        let refused = archive.back_up(&old, &[]).await.unwrap_err();
        assert!(matches!(refused, RepoError::Store(StoreError::Exists { .. })), "{refused}");
        assert_eq!(archive.keys_below("/backup/"), left, "{keeps}");
        assert!(archive.calm.forget_unfinished(&old).await.unwrap());
        archive.back_up(&old, &[]).await.unwrap();
        assert_eq!(archive.restore(&old).await.unwrap(), files(), "{keeps}");
    }
}

/// Whoever removes a backup never removes what another one stores under the same id.
#[tokio::test]
async fn removing_and_beginning_under_the_same_id_never_miss_each_other() {
    let mut taken = 0;
    for n in 1..30 {
        let (archive, dead) = Archive::with_a_dead_backup().await;
        let (calm, again) = (archive.calm.clone(), dead.clone());
        let begin = move || {
            let (calm, again) = (calm.clone(), again.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(make_backup_of(&calm, &begun(&again, &[]), &files())).is_ok()
            })
            .join()
            .unwrap()
        };
        let began = Arc::new(AtomicBool::new(false));
        let tell = Arc::clone(&began);
        let slow = crate::store::faults::Symptom::Slow(std::time::Duration::ZERO);
        archive.faults.inject(
            Fault::anywhere()
                .nth(n)
                .symptom(slow)
                .hook(move |_, _| tell.store(begin(), Ordering::SeqCst)),
        );
        archive.repository.forget_unfinished(&dead).await.unwrap();
        archive.faults.heal();
        if began.load(Ordering::SeqCst) {
            taken += 1;
            assert_eq!(archive.restore(&dead).await.unwrap(), files(), "call {n}");
        }
    }
    assert!(taken < 2, "only when all is gone may it begin: {taken}");
}
