//! Claims of one place by two clusters, with calls that fail.

use super::archive::{Archive, MODES, SIZE_BYTES, SYSTEM, control_file};
use crate::failure::{Failure, Kind};
use crate::format::Document;
use crate::ops::init;
use crate::pg::SystemId;
use crate::walsender::{ConnInfo, PgEnvironment};

const RIVAL: SystemId = SystemId(42);

async fn init(archive: &Archive) -> Result<init::Report, Failure> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("global")).unwrap();
    std::fs::write(directory.path().join("global/pg_control"), control_file(17)).unwrap();
    let environment = PgEnvironment { user: Some("nobody".to_owned()), ..PgEnvironment::default() };
    let request = init::Request {
        server: ConnInfo::read(None, &environment).unwrap(),
        pgdata: Some(directory.path().to_owned()),
        successor: false,
        host: "host".to_owned(),
    };
    init::run(&archive.repository, &request).await
}

async fn owners(archive: &Archive) -> Vec<SystemId> {
    let identities = archive.calm.identities().await.unwrap();
    identities.iter().map(|identity| identity.system_identifier).collect()
}

#[tokio::test]
async fn an_init_that_fails_anywhere_succeeds_when_repeated_and_claims_once() {
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::empty(SIZE_BYTES);
            archive.faults.inject(mode(n));
            let outcome = init(&archive).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            match &outcome {
                Ok(report) => assert_eq!(report.system_identifier, SYSTEM),
                Err(failure) => assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}"),
            }
            let claimed = owners(&archive).await;
            assert!(outcome.is_err() || claimed == [SYSTEM], "call {n}");
            // Whoever says that nothing was changed must not have claimed the place.
            if let Err(failure) = &outcome
                && failure.unharmed.contains("was not claimed")
            {
                assert_eq!(claimed, [], "call {n}");
            }
            assert_eq!(init(&archive).await.unwrap().claimed, claimed.is_empty(), "call {n}");
            assert_eq!(owners(&archive).await, [SYSTEM], "call {n}");
            if !struck {
                assert!(outcome.is_ok() && n > 5, "the fault never struck");
                break;
            }
        }
    }
}

/// The other cluster claims while one of our calls fails, before our claim stands; it looked and saw
/// nobody, so the place is its own. An init that died before its second look used to
/// find its own identity at the next call and to ask no further: two owners.
#[tokio::test]
async fn a_claim_that_lost_a_race_is_withdrawn_by_whichever_init_sees_it() {
    let mut raced = 0;
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::empty(SIZE_BYTES);
            let rival = archive.identity(RIVAL, 1).to_json().unwrap();
            let (memory, place) = (archive.memory.clone(), archive.calm.place().clone());
            archive.faults.inject(mode(n).hook(move |_, _| {
                if memory.bytes(&place.identity(SYSTEM)).is_none() {
                    memory.overwrite(&place.identity(RIVAL), rival.clone());
                }
            }));
            let first = init(&archive).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            let is_rivals = archive.memory.bytes(&archive.calm.place().identity(RIVAL)).is_some();
            let again = init(&archive).await;
            if is_rivals {
                raced += 1;
                assert!(first.is_err(), "call {n}: the place was the rival's");
                assert_eq!(again.unwrap_err().kind, Kind::Conflict, "call {n}");
                assert_eq!(owners(&archive).await, [RIVAL], "call {n}");
            } else {
                again.unwrap();
                assert_eq!(owners(&archive).await, [SYSTEM], "call {n}");
            }
            if !struck {
                break;
            }
        }
    }
    assert!(raced > 5, "the race was never run");
}

#[tokio::test]
async fn a_claim_under_which_wal_was_stored_is_not_taken_back() {
    let archive = Archive::empty(SIZE_BYTES);
    archive.calm.claim(&archive.identity(SYSTEM, 1)).await.unwrap();
    let (name, bytes) = archive.segment(2);
    archive.push(&name, &bytes).await.unwrap();
    archive.calm.claim(&archive.identity(RIVAL, 1)).await.unwrap();
    assert_eq!(init(&archive).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(owners(&archive).await.len(), 2, "for people to settle");
}
