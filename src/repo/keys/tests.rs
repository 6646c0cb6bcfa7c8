//! Whoever is interrupted wherever: everything stays readable, and the same call again ends it.

use std::sync::Arc;

use super::*;
use crate::repo::encrypting::tests::{claim, claimed, put, read, seen_by, taker, user_key};
use crate::store::Store;
use crate::store::faults::{Fault, FaultStore};
use crate::store::memory::MemoryStore;

const OLD: &str = "main/wal/old";

/// A place with one object, which user key 1 opens.
async fn place() -> (MemoryStore, FaultStore) {
    let memory = MemoryStore::new();
    put(&claimed(&memory).await, OLD, b"old").await;
    let faults = FaultStore::new(Arc::new(memory.clone()));
    (memory, faults)
}

fn calm(memory: &MemoryStore, user: u8) -> Repository {
    seen_by(Arc::new(memory.clone()), user)
}

/// Whether who holds this user key can read the object, in a new process.
async fn reads(memory: &MemoryStore, user: u8, key: &str) -> bool {
    read(&calm(memory, user), key, None).await.is_ok()
}

/// Whether who holds this user key can store, in a new process.
async fn stores(memory: &MemoryStore, user: u8, key: &str) -> bool {
    let repository = calm(memory, user);
    let is_taken = repository.identities().await.is_ok()
        && repository.store().create(&Key::new(key), b"new".to_vec().into()).await.is_ok();
    assert!(!is_taken || reads(memory, user, key).await);
    is_taken
}

/// Fails the Nth call for every N, before and after its effect, once and for ever.
fn modes(n: u64) -> [Fault; 4] {
    [
        Fault::anywhere().nth(n),
        Fault::anywhere().nth(n).after_effect(),
        Fault::anywhere().nth(n).for_ever(),
        Fault::anywhere().nth(n).after_effect().for_ever(),
    ]
}

#[tokio::test]
async fn a_claim_that_fails_anywhere_is_repeated_and_ends_with_one_key_that_opens() {
    for mode in 0..4 {
        for n in 1.. {
            let memory = MemoryStore::new();
            let faults = FaultStore::new(Arc::new(memory.clone()));
            faults.inject(modes(n)[mode].clone());
            let outcome = claim(&seen_by(Arc::new(faults.clone()), 1)).await;
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            claim(&calm(&memory, 1)).await.unwrap();
            assert!(stores(&memory, 1, OLD).await, "call {n}");
            assert_eq!(calm(&memory, 1).key_ring().await.unwrap().repository_keys().len(), 1);
            if !struck {
                assert!(outcome.is_ok() && n > 3);
                break;
            }
        }
    }
}

/// Of two that claim at once with keys of their own, one wins, and the other is told that its key opens nothing.
#[tokio::test]
async fn of_two_claims_with_two_keys_one_holds() {
    let memory = MemoryStore::new();
    let second = calm(&memory, 2);
    let prepared = second.encryption_for_claim(crate::pg::SystemId(7), true, &taker()).await;
    assert!(prepared.unwrap().is_some());
    claim(&calm(&memory, 1)).await.unwrap();
    let error = claim(&second).await.unwrap_err();
    assert!(matches!(error, RepoError::Key(KeyError::NotOpened { .. })), "{error}");
    assert!(stores(&memory, 1, OLD).await);
    assert!(!stores(&memory, 2, "main/wal/x").await);
    // The key that the other made was never used, and stands in nobody's way.
    calm(&memory, 1).add_user_key(&user_key(3), &taker()).await.unwrap();
    calm(&memory, 1).rotate(&[user_key(3)], &taker()).await.unwrap();
    calm(&memory, 3).remove_user_key(user_key(1).id(), &taker()).await.unwrap();
    assert!(stores(&memory, 3, "main/wal/3").await && reads(&memory, 3, OLD).await);
}

#[tokio::test]
async fn a_second_key_opens_all_that_the_first_does() {
    for mode in 0..4 {
        for n in 1.. {
            let (memory, faults) = place().await;
            calm(&memory, 1).rotate(&[], &taker()).await.unwrap();
            faults.inject(modes(n)[mode].clone());
            let outcome =
                seen_by(Arc::new(faults.clone()), 1).add_user_key(&user_key(2), &taker()).await;
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            assert!(reads(&memory, 1, OLD).await);
            calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
            assert!(reads(&memory, 2, OLD).await && stores(&memory, 2, "main/wal/new").await);
            if !struck {
                assert_eq!(outcome.unwrap(), 2);
                assert_eq!(calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap(), 0);
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_rotation_that_fails_anywhere_leaves_everybody_reading_and_storing() {
    for mode in 0..4 {
        for n in 1.. {
            let (memory, faults) = place().await;
            calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
            faults.inject(modes(n)[mode].clone());
            let repository = seen_by(Arc::new(faults.clone()), 1);
            let outcome = repository.rotate(&[user_key(2)], &taker()).await;
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            for user in [1, 2] {
                assert!(reads(&memory, user, OLD).await, "call {n}");
                assert!(stores(&memory, user, &format!("main/wal/{user}")).await, "call {n}");
                assert!(reads(&memory, 3 - user, &format!("main/wal/{user}")).await, "call {n}");
            }
            let before = calm(&memory, 1).key_ring().await.unwrap().in_use();
            let rotated = calm(&memory, 2).rotate(&[user_key(1)], &taker()).await.unwrap();
            assert!(rotated.number > before.number);
            assert_eq!(calm(&memory, 1).key_ring().await.unwrap().in_use(), rotated);
            if !struck {
                assert_eq!(outcome.unwrap(), before);
                break;
            }
        }
    }
}

#[tokio::test]
async fn objects_say_under_which_key_they_stand_and_old_ones_stay_readable() {
    let (memory, _) = place().await;
    let running = calm(&memory, 1);
    running.identities().await.unwrap();
    let rotated = calm(&memory, 1).rotate(&[], &taker()).await.unwrap();
    put(
        &{
            let new = calm(&memory, 1);
            new.identities().await.unwrap();
            new
        },
        "main/wal/new",
        b"new",
    )
    .await;
    let id_of = |key: &str| {
        crate::format::EncryptedHead::parse(&memory.bytes(key).unwrap()).unwrap().repository_key
    };
    assert_eq!(id_of("main/wal/new"), rotated.id);
    assert_ne!(id_of(OLD), rotated.id);
    // A process that read the keys before finds the new one when it meets it.
    assert_eq!(read(&running, "main/wal/new", None).await.unwrap().1, b"new");
    assert_eq!(read(&running, OLD, None).await.unwrap().1, b"old");
}

/// Each damage of an old repository key costs what stands under it, and nothing else.
#[tokio::test]
async fn a_damaged_key_stands_in_the_way_of_nothing_but_its_own() {
    let (memory, _) = place().await;
    let first = memory.keys().into_iter().find(|key| key.contains("/key/0001-")).unwrap();
    let first_id = crate::format::EncryptedHead::parse(&memory.bytes(OLD).unwrap()).unwrap();
    let rotated = calm(&memory, 1).rotate(&[], &taker()).await.unwrap();
    let second = memory.keys().into_iter().find(|key| key.contains("/key/0002-")).unwrap();
    let good = memory.bytes(&first).unwrap();
    let text = String::from_utf8(good.to_vec()).unwrap();
    let mut flipped = good.to_vec();
    flipped[good.len() / 2] ^= 1;
    let damages: [bytes::Bytes; 5] = [
        good.slice(..good.len() / 2),
        vec![0; good.len()].into(),
        flipped.into(),
        memory.bytes(&second).unwrap(),
        text.replace("\"format\": 1", "\"format\": 2").into(),
    ];
    put(
        &{
            let new = calm(&memory, 1);
            new.identities().await.unwrap();
            new
        },
        "main/wal/new",
        b"new",
    )
    .await;
    for (n, bad) in damages.into_iter().enumerate() {
        memory.overwrite(&first, bad);
        assert!(reads(&memory, 1, "main/wal/new").await);
        assert!(stores(&memory, 1, &format!("main/wal/{n}")).await);
        let error = read(&calm(&memory, 1), OLD, None).await.unwrap_err();
        let RepoError::Key(KeyError::Unreadable { repository_key, document, .. }) = error else {
            panic!("{error}");
        };
        assert_eq!(document.as_str(), first);
        assert_eq!(repository_key, first_id.repository_key);
        assert_ne!(repository_key, rotated.id);
        memory.overwrite(&first, good.clone());
        assert!(reads(&memory, 1, OLD).await);
    }
}

#[tokio::test]
async fn who_was_left_out_of_a_rotation_reads_what_was_and_stores_nothing() {
    let (memory, _) = place().await;
    calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
    calm(&memory, 1).rotate(&[], &taker()).await.unwrap();
    assert!(stores(&memory, 1, "main/wal/new").await);
    assert!(reads(&memory, 2, OLD).await && !reads(&memory, 2, "main/wal/new").await);
    assert!(!stores(&memory, 2, "main/wal/x").await);
    let error = calm(&memory, 2).add_user_key(&user_key(3), &taker()).await.unwrap_err();
    assert!(matches!(error, RepoError::Key(KeyError::NotOpened { .. })), "{error}");
    calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
    assert!(stores(&memory, 2, "main/wal/x").await);
}

#[tokio::test]
async fn a_removal_that_fails_anywhere_leaves_the_other_key_and_can_be_repeated() {
    for mode in 0..4 {
        for n in 1.. {
            let (memory, faults) = place().await;
            calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
            calm(&memory, 1).rotate(&[user_key(2)], &taker()).await.unwrap();
            faults.inject(modes(n)[mode].clone());
            let repository = seen_by(Arc::new(faults.clone()), 2);
            let outcome = repository.remove_user_key(user_key(1).id(), &taker()).await;
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            assert!(reads(&memory, 2, OLD).await && stores(&memory, 2, "main/wal/2").await);
            calm(&memory, 2).remove_user_key(user_key(1).id(), &taker()).await.unwrap();
            assert!(!reads(&memory, 1, OLD).await);
            assert!(reads(&memory, 2, OLD).await);
            let ring = calm(&memory, 2).key_ring().await.unwrap();
            assert_eq!(ring.leaving(), []);
            assert_eq!(ring.user_keys().into_iter().collect::<Vec<_>>(), [user_key(2).id()]);
            if !struck {
                assert_eq!(outcome.unwrap(), 2);
                break;
            }
        }
    }
}

#[tokio::test]
async fn the_last_key_is_never_removed_nor_our_own() {
    let (memory, _) = place().await;
    let own = user_key(1).id();
    let error = calm(&memory, 1).remove_user_key(own, &taker()).await.unwrap_err();
    assert!(matches!(error, RepoError::LastKey { .. }), "{error}");
    calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
    assert!(calm(&memory, 1).remove_user_key(own, &taker()).await.is_err());
    // 2 opens the old repository key only.
    calm(&memory, 1).rotate(&[], &taker()).await.unwrap();
    assert!(calm(&memory, 2).remove_user_key(own, &taker()).await.is_err());
    assert!(reads(&memory, 1, OLD).await && reads(&memory, 2, OLD).await);
    let keys = memory.keys();
    assert!(!keys.iter().any(|key| key.contains("leaving")), "{keys:?}");
}

/// Two hosts remove each other's key: the second runs as a whole before each call of the first.
#[tokio::test]
async fn two_that_remove_each_others_key_never_both_succeed() {
    for n in 1.. {
        let (memory, faults) = place().await;
        calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
        let other: Arc<dyn Store> = Arc::new(memory.clone());
        let rival = std::sync::Mutex::new(None);
        let rival = Arc::new(rival);
        let seen = Arc::clone(&rival);
        let strike = Fault::anywhere()
            .nth(n)
            .symptom(crate::store::faults::Symptom::Slow(std::time::Duration::ZERO))
            .hook(move |_, _| {
                let other = Arc::clone(&other);
                let run = std::thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                    runtime.block_on(async {
                        let own = seen_by(other, 2);
                        own.remove_user_key(user_key(1).id(), &taker()).await.is_ok()
                    })
                });
                *seen.lock().unwrap() = Some(run.join().unwrap());
            });
        faults.inject(strike);
        let first = seen_by(Arc::new(faults.clone()), 1);
        let removed = first.remove_user_key(user_key(2).id(), &taker()).await.is_ok();
        let Some(rival_removed) = *rival.lock().unwrap() else {
            assert!(removed && n > 5);
            break;
        };
        assert!(!(removed && rival_removed), "call {n}");
        let readers = [reads(&memory, 1, OLD).await, reads(&memory, 2, OLD).await];
        assert!(readers.contains(&true), "call {n}: nobody can read it any more");
    }
}

/// The second host stops dead between any two of its calls, and the first goes on.
#[tokio::test]
async fn a_removal_that_died_half_way_makes_no_other_removal_fatal() {
    for n in 1.. {
        let (memory, faults) = place().await;
        calm(&memory, 1).add_user_key(&user_key(2), &taker()).await.unwrap();
        faults.inject(Fault::anywhere().nth(n).for_ever());
        let died = seen_by(Arc::new(faults.clone()), 2);
        let removed = died.remove_user_key(user_key(1).id(), &taker()).await.is_ok();
        let _ = calm(&memory, 1).remove_user_key(user_key(2).id(), &taker()).await;
        let readers = [reads(&memory, 1, OLD).await, reads(&memory, 2, OLD).await];
        assert!(readers.contains(&true), "call {n}: nobody can read it any more");
        let ring = calm(&memory, 2).key_ring().await;
        if ring.is_ok_and(|ring| ring.leaving().contains(&user_key(1).id())) {
            let added = calm(&memory, 2).add_user_key(&user_key(1), &taker()).await;
            assert!(matches!(added, Err(RepoError::Leaving { .. })), "{added:?}");
            calm(&memory, 2).remove_user_key(user_key(1).id(), &taker()).await.unwrap();
            calm(&memory, 2).add_user_key(&user_key(1), &taker()).await.unwrap();
            assert!(reads(&memory, 1, OLD).await);
        }
        if removed {
            break;
        }
    }
}
