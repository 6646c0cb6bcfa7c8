//! The Nth call of the store failing, for every N: before its effect, after it, cut short, and all from it on.

use super::archive::{Archive, MODES, SIZE_BYTES, contents, id, make_backup};
use crate::failure::Kind;

const HISTORY: &[u8] = b"1\t0/300000\tno recovery target specified\n";

#[tokio::test]
async fn a_push_that_fails_anywhere_leaves_nothing_or_the_whole_and_a_retry_ends_it() {
    let (segment, bytes) = Archive::empty(SIZE_BYTES).segment(2);
    let partial = format!("{segment}.partial");
    for (name, bytes) in [(&*segment, &*bytes), (&*partial, &*bytes), ("00000002.history", HISTORY)]
    {
        for mode in MODES {
            for n in 1.. {
                let archive = Archive::claimed(SIZE_BYTES).await;
                archive.faults.inject(mode(n));
                let outcome = archive.push(name, bytes).await;
                let struck = archive.faults.calls().len() as u64 >= n;
                archive.faults.heal();
                if let Err(failure) = &outcome {
                    assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                } else {
                    assert_eq!(archive.get(name).await.1.as_deref(), Some(bytes), "call {n}");
                }
                for key in archive.keys_below("/wal/") {
                    let key = crate::store::Key::new(key);
                    archive.calm.fetch(&key, |_| Ok(())).await.expect("a half object");
                }
                archive.push(name, bytes).await.expect("a retry succeeds");
                assert_eq!(archive.get(name).await.1.as_deref(), Some(bytes), "call {n}");
                assert_eq!(archive.keys_below("/wal/").len(), 1, "call {n}");
                if !struck {
                    assert!(outcome.is_ok() && n > 2, "the fault never struck");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_get_says_absent_only_when_no_call_failed() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let (whole, whole_bytes) = archive.segment(2);
    archive.push(&whole, &whole_bytes).await.unwrap();
    let (pieces, pieces_bytes) = archive.segment(3);
    archive.put_pieces(3, &pieces_bytes, &[0, 1 << 19, 1 << 20]).await;
    let (partial, partial_bytes) = archive.segment(4);
    archive.push(&format!("{partial}.partial"), &partial_bytes).await.unwrap();
    archive.push("00000002.history", HISTORY).await.unwrap();
    let absent = archive.segment(9).0;
    let cases = [
        (&*whole, Some(&*whole_bytes)),
        (&*pieces, Some(&*pieces_bytes)),
        (&*partial, Some(&*partial_bytes)),
        ("00000002.history", Some(HISTORY)),
        (&*absent, None),
        ("00000003.history", None),
    ];
    for (name, expected) in cases {
        for (number, mode) in (0..).zip(MODES) {
            for n in 1.. {
                let before = archive.faults.calls().len() as u64;
                archive.faults.inject(mode(n));
                let (outcome, handed_out) = archive.get(name).await;
                let struck = archive.faults.calls().len() as u64 - before >= n;
                archive.faults.heal();
                match (&outcome, expected) {
                    (Ok(_), Some(bytes)) => assert_eq!(handed_out.as_deref(), Some(bytes)),
                    (Ok(_), None) => panic!("`{name}` was made up"),
                    (Err(failure), _) => {
                        assert_eq!(handed_out, None, "{name}, call {n}: {failure}");
                        // What is absent cannot be cut short: there the store has truly answered.
                        let answered = !struck || number == 2;
                        let fits = failure.kind == Kind::Store
                            || (failure.kind == Kind::Absent && answered && expected.is_none());
                        assert!(fits, "{name}, call {n}: {failure}");
                    }
                }
                if !struck {
                    assert_eq!(outcome.is_ok(), expected.is_some(), "{name}");
                    assert!(n > 1, "the fault never struck");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_backup_that_fails_anywhere_is_either_wholly_there_or_not_at_all() {
    let id = id(1);
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            archive.push_wal().await;
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = make_backup(&archive.repository, &id, 1).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            // This is what `backup` does after its failure; where the store is gone for good, the next one does.
            if outcome.is_err() && archive.repository.forget_unfinished(&id).await.is_err() {
                archive.faults.heal();
                archive.repository.forget_unfinished(&id).await.unwrap();
            }
            archive.faults.heal();
            let committed = archive.calm.committed(&id).await.unwrap();
            assert!(committed.is_some() || outcome.is_err(), "call {n}: success without a backup");
            if committed.is_none() {
                assert_eq!(archive.keys_below("/backup/"), [""; 0], "call {n}: remains");
                make_backup(&archive.repository, &id, 1).await.expect("a retry succeeds");
            }
            assert_eq!(archive.restore(&id).await.unwrap(), contents(1), "call {n}");
            if !struck {
                assert!(outcome.is_ok() && n > 4, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn forgetting_a_backup_may_fail_anywhere_and_be_repeated() {
    for mode in MODES {
        for n in 1.. {
            let (archive, [kept, dead]) = Archive::with_backups().await;
            let committed = archive.keys_below(&format!("{dead}/committed.json"));
            let key = crate::store::Key::new(committed[0].clone());
            archive.calm.store().delete(&key).await.unwrap();
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = archive.repository.forget_unfinished(&dead).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            assert!(archive.calm.committed(&dead).await.unwrap().is_none(), "call {n}");
            archive.repository.forget_unfinished(&dead).await.unwrap();
            assert_eq!(archive.keys_below(dead.as_str()), [""; 0], "call {n}");
            archive.repository.forget_unfinished(&kept).await.unwrap();
            assert_eq!(archive.restore(&kept).await.unwrap(), contents(1), "committed ones stay");
            if !struck {
                assert!(outcome.is_ok() && n > 1);
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_restore_that_fails_anywhere_cannot_be_started_and_succeeds_when_repeated() {
    let (archive, [id, _]) = Archive::with_backups().await;
    for mode in MODES {
        for n in 1.. {
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = archive.restore(&id).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            match outcome {
                Ok(files) => assert_eq!(files, contents(1), "call {n}"),
                Err(failure) => {
                    assert!(struck);
                    assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                }
            }
            if !struck {
                assert!(n > 5);
                break;
            }
        }
    }
}
