//! The Nth call of the store failing under the commands that only look, and under those that change little.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::archive::{Archive, MODES, SIZE_BYTES, contents, files_of, new_data_directory};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Codec, Depth};
use crate::ops::ahead::Ahead;
use crate::ops::archive_push::{Request, Resident, pushed_before, run as push};
use crate::ops::log::{self, BeforeDrop, NamesFrom, Told};
use crate::ops::verify::{self, AcknowledgeRequest};
use crate::ops::{Silent, StopRequest, info, pin};
use crate::pg::Timeline;
use crate::plan::log::filter::{Filter, Kinds};
use crate::plan::retention::Policy;
use crate::plan::target::{RecoveryPoint, TimelineChoice};
use crate::repo::Repository;

/// Runs something that only looks, with each call failing in turn: it says what it says when nothing fails, or that
/// the store failed, and it changes nothing.
async fn look<F: Future<Output = Result<String, Failure>>>(
    archive: &Archive,
    what: &str,
    at_least: u64,
    run: impl Fn(Repository) -> F,
) {
    let told = run(archive.calm.clone()).await.map_err(|failure| failure.kind);
    let before = archive.memory.keys();
    for mode in MODES {
        for n in 1.. {
            let calls = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = run(archive.repository.clone()).await;
            let struck = archive.faults.calls().len() as u64 - calls >= n;
            archive.faults.heal();
            match outcome {
                Ok(now) => assert_eq!(Ok(now), told, "{what}, call {n}"),
                Err(failure) if told == Err(failure.kind) => {}
                Err(failure) => {
                    assert_eq!(failure.kind, Kind::Store, "{what}, call {n}: {failure}");
                    assert!(struck, "{what}, call {n}: {failure}");
                }
            }
            assert_eq!(archive.memory.keys(), before, "{what}, call {n}");
            if !struck {
                assert!(n > at_least, "{what}: the fault never struck");
                break;
            }
        }
    }
}

/// Two backups, WAL with a gap in it, a pin, a verification, and an acknowledgement.
async fn much() -> (Archive, BackupId, String) {
    let (archive, [first, _]) = Archive::with_backups().await;
    for number in [5, 7, 8] {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    archive.push("00000002.history", b"1\t0/600000\treason\n").await.unwrap();
    let asked =
        pin::Request { backup: first.clone(), until: None, reason: None, host: "host".to_owned() };
    pin::pin(&archive.calm, &asked).await.unwrap();
    let finding = verified(&archive).await;
    (archive, first, finding)
}

/// Runs `verify`, and returns the name of what it found.
async fn verified(archive: &Archive) -> String {
    let request = verify::Request {
        depth: Depth::Header,
        again: true,
        older_than: Duration::from_hours(1),
        bytes_per_second: None,
        jobs: 1,
        look_again_after: Duration::ZERO,
        policy: Policy::nothing_set(),
        host: "host".to_owned(),
    };
    let (_sender, stop) = StopRequest::new();
    let report = verify::run(&archive.calm, &request, &Silent, stop).await.unwrap();
    report.findings[0].id.clone()
}

#[tokio::test]
async fn info_tells_everything_or_that_the_store_failed() {
    let (archive, _, finding) = much().await;
    let known = AcknowledgeRequest { finding, reason: "known".to_owned(), host: "host".to_owned() };
    verify::acknowledge(&archive.calm, &known).await.unwrap();
    look(&archive, "info", 10, |repository| async move {
        let report = info::run(&repository, &Policy::nothing_set()).await?;
        Ok(serde_json::to_string(&report).unwrap())
    })
    .await;
}

#[tokio::test]
async fn log_tells_everything_or_that_the_store_failed_and_never_takes_a_failure_for_a_gap() {
    let (archive, _, _) = much().await;
    for oldest_first in [false, true] {
        look(&archive, "log", 8, |repository| async move {
            let request = log::Request {
                timeline: TimelineChoice::Number(Timeline(1)),
                filter: Filter {
                    since: None,
                    until: None,
                    xid: None,
                    kinds: Kinds::USUAL,
                    large_delete_rows: 1,
                },
                relation: None,
                database: None,
                oldest_first,
                limit: None,
                names: NamesFrom::Nowhere,
            };
            let mut lines = Vec::new();
            let mut listen = |line: &log::Line| {
                lines.push(serde_json::to_string(line).unwrap());
                Ok(Told::GoOn)
            };
            let end = log::run(&repository, &request, &mut listen).await?;
            assert_eq!(end.gaps, 1);
            Ok(format!("{lines:?} {end:?}"))
        })
        .await;
    }
    look(&archive, "log --before-drop", 5, |repository| async move {
        let asked = BeforeDrop {
            timeline: TimelineChoice::Number(Timeline(1)),
            schema: None,
            name: "nobody".to_owned(),
            database: None,
        };
        log::before_drop(&repository, &asked).await.map(|found| format!("{found:?}"))
    })
    .await;
}

async fn pins(archive: &Archive, id: &BackupId) -> usize {
    archive.calm.pins_of(id).await.unwrap().len()
}

#[tokio::test]
async fn a_pin_that_failed_says_that_it_may_stand_and_unpinning_takes_off_every_one() {
    for mode in MODES {
        for n in 1.. {
            let (archive, [id, _]) = Archive::with_backups().await;
            let asked = pin::Request {
                backup: id.clone(),
                until: None,
                reason: Some("why".to_owned()),
                host: "host".to_owned(),
            };
            archive.faults.inject(mode(n));
            let outcome = pin::pin(&archive.repository, &asked).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            let stands = pins(&archive, &id).await;
            match outcome {
                Ok(_) => assert_eq!(stands, 1, "call {n}"),
                Err(failure) => {
                    assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                    let nothing = failure.unharmed == "Nothing was changed.";
                    assert!(stands == 0 || !nothing, "call {n}: {failure}");
                }
            }
            pin::pin(&archive.calm, &asked).await.unwrap();
            assert!(pins(&archive, &id).await > 0, "call {n}");

            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = pin::unpin(&archive.repository, &id).await;
            let struck = struck || archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            let left = pins(&archive, &id).await;
            match outcome {
                Ok(_) => assert_eq!(left, 0, "call {n}"),
                Err(failure) => assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}"),
            }
            let again = pin::unpin(&archive.calm, &id).await.map_err(|failure| failure.kind);
            assert_eq!(again.is_ok(), left > 0, "call {n}");
            assert_eq!(pins(&archive, &id).await, 0, "call {n}");
            if !struck {
                assert!(n > 4, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn an_acknowledgement_that_failed_may_stand_and_is_settled_by_the_next() {
    for mode in MODES {
        for n in 1.. {
            let (archive, _, finding) = much().await;
            let asked =
                AcknowledgeRequest { finding, reason: "known".to_owned(), host: "host".to_owned() };
            archive.faults.inject(mode(n));
            let outcome = verify::acknowledge(&archive.repository, &asked).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            let stands = archive.calm.acknowledgements().await.unwrap().len();
            match outcome {
                Ok(_) => assert_eq!(stands, 1, "call {n}"),
                Err(failure) => {
                    assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                    let nothing = failure.unharmed == "Nothing was changed.";
                    assert!(stands == 0 || !nothing, "call {n}: {failure}");
                }
            }
            let again = verify::acknowledge(&archive.calm, &asked).await;
            let wanted = if stands == 1 { Err(Kind::Conflict) } else { Ok(()) };
            assert_eq!(again.map(drop).map_err(|failure| failure.kind), wanted, "call {n}");
            let known = archive.calm.acknowledgements().await.unwrap();
            assert_eq!(known.len(), 1, "call {n}");
            assert_eq!(known[0].1.as_ref().unwrap().reason, "known");
            if !struck {
                assert!(n > 3, "the fault never struck");
                break;
            }
        }
    }
}

/// Segments 2 to 5 in a directory of WAL, all of them `.ready`, and the request for the first.
fn backlog(archive: &Archive, directory: &Path) -> (Vec<(String, Vec<u8>)>, Request) {
    let wal = directory.join("pg_wal");
    std::fs::create_dir_all(wal.join("archive_status")).unwrap();
    let segments: Vec<_> = (2..6).map(|number| archive.segment(number)).collect();
    for (name, bytes) in &segments {
        std::fs::write(wal.join(name), bytes).unwrap();
        std::fs::write(wal.join(format!("archive_status/{name}.ready")), "").unwrap();
    }
    let ahead = Ahead {
        spool: wal.join("highwater.spool"),
        place: "place".to_owned(),
        room_bytes: 1 << 30,
    };
    let request = Request {
        path: wal.join(&segments[0].0),
        codec: Codec::DEFAULT,
        deadline: Duration::from_mins(1),
        accept_damaged: false,
        ahead: Some(ahead),
        second: None,
    };
    (segments, request)
}

#[tokio::test]
async fn what_is_noted_as_pushed_ahead_is_stored_whatever_fails() {
    let mut noted = 0;
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            let directory = tempfile::tempdir().unwrap();
            let (segments, request) = backlog(&archive, directory.path());
            archive.faults.inject(mode(n));
            let outcome = push(&archive.repository, &request).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            match &outcome {
                Ok(_) => assert_eq!(
                    archive.get(&segments[0].0).await.1.as_ref(),
                    Some(&segments[0].1),
                    "call {n}"
                ),
                Err(failure) => assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}"),
            }
            for (name, bytes) in &segments[1..] {
                let path = request.path.with_file_name(name);
                let request = Request { path, ..request.clone() };
                if pushed_before(&request).is_some() {
                    noted += 1;
                    assert_eq!(archive.get(name).await.1.as_ref(), Some(bytes), "call {n}");
                }
                push(&archive.calm, &request).await.unwrap();
                assert_eq!(archive.get(name).await.1.as_ref(), Some(bytes), "call {n}");
            }
            if !struck {
                assert!(outcome.is_ok() && n > 4, "the fault never struck");
                break;
            }
        }
    }
    assert!(noted > 20, "{noted}: nothing was pushed ahead");
}

#[tokio::test]
async fn what_an_agent_says_is_stored_is_stored_whatever_fails() {
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            let directory = tempfile::tempdir().unwrap();
            let (segments, request) = backlog(&archive, directory.path());
            let resident =
                Resident::new(&archive.repository, None, Codec::DEFAULT, Duration::from_mins(1));
            archive.faults.inject(mode(n));
            let paths: Vec<PathBuf> =
                segments.iter().map(|(name, _)| request.path.with_file_name(name)).collect();
            let pushes = paths.iter().map(|path| resident.push(path));
            let outcomes = futures_util::future::join_all(pushes).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            for ((name, bytes), outcome) in segments.iter().zip(outcomes) {
                match outcome {
                    Ok(_) => assert_eq!(
                        archive.get(name).await.1.as_ref(),
                        Some(bytes),
                        "call {n}: {name}"
                    ),
                    Err(failure) => assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}"),
                }
            }
            for path in &paths {
                resident.push(path).await.unwrap();
            }
            assert_eq!(archive.keys_below("/wal/").len(), segments.len(), "call {n}");
            if !struck {
                assert!(n > 8, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_delta_restore_that_fails_anywhere_cannot_be_started_half_and_succeeds_when_repeated() {
    let (archive, [first, second]) = Archive::with_backups().await;
    let (_directory, pgdata) = new_data_directory();
    archive.restore_into(&pgdata, Some(&second), RecoveryPoint::Latest, false).await.unwrap();
    assert_eq!(files_of(&pgdata), contents(2));
    let mut now = 2;
    for mode in MODES {
        for n in 1.. {
            // To and fro: there is always something to fetch.
            let (id, seed) = if now == 2 { (&first, 1) } else { (&second, 2) };
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome =
                archive.restore_into(&pgdata, Some(id), RecoveryPoint::Latest, true).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            if let Err(failure) = outcome {
                assert!(struck);
                assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
                let can_start = pgdata.join("global/pg_control").exists();
                assert!(!can_start || files_of(&pgdata) == contents(now), "call {n}");
                archive.restore_into(&pgdata, Some(id), RecoveryPoint::Latest, true).await.unwrap();
            }
            assert_eq!(files_of(&pgdata), contents(seed), "call {n}");
            now = seed;
            if !struck {
                assert!(n > 5, "the fault never struck");
                break;
            }
        }
    }
}
