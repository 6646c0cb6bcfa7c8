//! A store that is away: what was acknowledged is somewhere, whole, whatever fails and wherever it stops.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::archive::{Archive, Got, SIZE_BYTES, SYSTEM, control_file, repository_in};
use super::damage::{Damage, all_damage};
use super::expire::{back_up, expire, policy};
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Depth, WalGap, parse_gap};
use crate::ops::archive_push::{Pushed, Request, Second, run_despite};
use crate::ops::spool::{Destinations, Drained, drain};
use crate::ops::stall::{Stall, StallSpool};
use crate::ops::{archive_push, info};
use crate::pgdata::StallDirectory;
use crate::plan::retention::Policy;
use crate::store::faults::{Fault, FaultStore, Symptom};
use crate::store::file::FileStore;

pub(super) const HISTORY: (&str, &[u8]) =
    ("00000002.history", b"1\t0/300000\tno recovery target specified\n");

/// A server's host: an archive whose store may be away, a data directory, and a spool whose disk may fail.
pub(super) struct Host {
    pub(super) archive: Archive,
    /// A second archive, and whether one of both is enough.
    pub(super) second: Option<(Archive, bool)>,
    place: tempfile::TempDir,
    pub(super) disk: FaultStore,
    pub(super) stall: Stall,
}

impl Host {
    /// A host that has pushed before, so that it knows whose place it is.
    async fn new(segment_bytes: u32) -> Self {
        let archive = Archive::claimed(segment_bytes).await;
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("main");
        let files = FileStore::new(StallDirectory::store_root(&directory), Duration::from_secs(30));
        let disk = FaultStore::new(Arc::new(files));
        let repository = repository_in(Arc::new(disk.clone()));
        let wal = place.path().join("data/pg_wal");
        std::fs::create_dir_all(wal.join("archive_status")).unwrap();
        std::fs::create_dir_all(place.path().join("data/global")).unwrap();
        std::fs::write(place.path().join("data/global/pg_control"), control_file(17)).unwrap();
        let stall = Stall {
            directory,
            spool: Some(StallSpool { repository, max_bytes: 1 << 30 }),
            backlog_max_bytes: None,
            stands_in_for: "s3://x".to_owned(),
            wal_directory: Some(wal),
            host: "host".to_owned(),
        };
        stall.keep_claims(&archive.repository).await;
        Self { archive, second: None, place, disk, stall }
    }

    /// The same with two archives.
    pub(super) async fn with_two(one_is_enough: bool) -> Self {
        let second = Archive::claimed(SIZE_BYTES).await;
        Self { second: Some((second, one_is_enough)), ..Self::new(SIZE_BYTES).await }
    }

    fn wal(&self) -> PathBuf {
        self.place.path().join("data/pg_wal")
    }

    pub(super) fn store_goes_away(&self) {
        self.archive.faults.inject(Fault::anywhere().for_ever());
    }

    pub(super) fn all_is_well(&self) {
        self.archive.faults.heal();
        self.disk.heal();
    }

    /// As PostgreSQL does: the file, its `.ready`, the command; and `.done` once that has succeeded.
    pub(super) async fn push(&self, name: &str, bytes: &[u8]) -> Result<Pushed, Failure> {
        let (path, ready) = (self.wal().join(name), self.ready(name));
        std::fs::write(&path, bytes).unwrap();
        std::fs::write(&ready, "").unwrap();
        let deadline = Duration::from_mins(1);
        let codec = Codec::DEFAULT;
        let second = self.second.as_ref().map(|(archive, one_is_enough)| {
            Arc::new(Second::new(archive.repository.clone(), *one_is_enough))
        });
        let request = Request { path, codec, deadline, accept_damaged: false, ahead: None, second };
        let pushed = run_despite(&self.archive.repository, &request, &self.stall).await?;
        std::fs::remove_file(ready).unwrap();
        Ok(pushed)
    }

    /// From now on there is no spool, and WAL is let go while so much waits.
    pub(super) fn lets_go(&mut self, backlog_max_bytes: u64) {
        self.stall.spool = None;
        self.stall.backlog_max_bytes = Some(backlog_max_bytes);
    }

    fn ready(&self, name: &str) -> PathBuf {
        self.wal().join("archive_status").join(format!("{name}.ready"))
    }

    pub(super) async fn drain(&self) -> Result<Drained, Failure> {
        drain(&self.destinations(), &self.stall, None).await
    }

    fn destinations(&self) -> Destinations {
        let mut into = Destinations::only(&self.archive.repository);
        if let Some((second, one_is_enough)) = &self.second {
            into.second = Some(second.repository.clone());
            into.one_is_enough = *one_is_enough;
        }
        into
    }

    /// Gets a file as recovery on this host does.
    pub(super) async fn get(&self, name: &str) -> Got {
        self.archive.get_or_from(None, Some(&self.stall), name).await
    }

    pub(super) fn held(&self) -> u64 {
        self.stall.host_state().unwrap().spool.unwrap().files
    }

    pub(super) fn files(&self, directory: &str) -> usize {
        let path = self.stall.directory.join(directory);
        std::fs::read_dir(path).map_or(0, Iterator::count)
    }
}

pub(super) fn is_spooled(pushed: &Result<Pushed, Failure>) -> bool {
    matches!(pushed, Ok(Pushed::Spooled { .. }))
}

#[tokio::test]
async fn what_the_store_cannot_take_is_kept_given_back_and_brought_over_byte_for_byte() {
    let host = Host::new(SIZE_BYTES).await;
    let twin = Archive::claimed(SIZE_BYTES).await;
    let mut files = vec![(HISTORY.0.to_owned(), HISTORY.1.to_vec())];
    files.extend((2..6).map(|number| host.archive.segment(number)));
    files.push((format!("{}.partial", files[4].0), files[4].1.clone()));
    for (name, bytes) in &files {
        twin.push(name, bytes).await.unwrap();
    }
    host.store_goes_away();
    for (at, (name, bytes)) in files.iter().enumerate() {
        let Pushed::Spooled { report, held } = host.push(name, bytes).await.unwrap() else {
            panic!("{name} is not in the spool");
        };
        assert_eq!((report.name.to_string(), held.files), (name.clone(), at as u64 + 1));
        assert!(held.oldest.is_some() && host.stall.is_pending() && host.stall.is_away());
    }
    assert_eq!(host.archive.keys_below("/wal/"), [""; 0]);
    for (name, bytes) in files.iter().filter(|(name, _)| !name.ends_with(".partial")) {
        assert_eq!(host.get(name).await.1.as_deref(), Some(&**bytes), "{name}, the store is away");
    }
    let absent = host.get("0000000100000000000000FF").await.0.unwrap_err();
    assert_eq!(absent.kind, Kind::Store, "away is not absent: {absent}");
    assert_eq!(host.drain().await.unwrap_err().kind, Kind::Store);
    assert_eq!(host.held(), files.len() as u64);
    host.all_is_well();
    let drained = host.drain().await.unwrap();
    assert_eq!((drained.stored, drained.refused), (files.len() as u64, Vec::new()));
    assert!(!host.stall.is_pending() && !host.stall.is_away());
    assert_eq!(host.archive.keys_below("/wal/"), twin.keys_below("/wal/"));
    if !host.archive.repository.is_encrypted() {
        for key in twin.keys_below("/wal/") {
            assert_eq!(host.archive.memory.bytes(&key), twin.memory.bytes(&key), "{key}");
        }
    }
    for (name, bytes) in files.iter().filter(|(name, _)| !name.ends_with(".partial")) {
        assert_eq!(host.get(name).await.1.as_deref(), Some(&**bytes), "{name}");
    }
    assert_eq!(host.get("0000000100000000000000FF").await.0.unwrap_err().kind, Kind::Absent);
}

/// How a store or a disk ends for good at the Nth call: before its effect, or after it.
pub(super) const ENDS: [fn(u64) -> Fault; 2] = [
    |n| Fault::anywhere().nth(n).for_ever(),
    |n| Fault::anywhere().nth(n).for_ever().after_effect(),
];

#[tokio::test]
async fn a_push_into_the_spool_that_stops_anywhere_is_whole_or_not_acknowledged() {
    let (name, bytes) = Archive::empty(SIZE_BYTES).segment(2);
    for end in ENDS {
        for n in 1.. {
            let host = Host::new(SIZE_BYTES).await;
            host.store_goes_away();
            let before = host.disk.calls().len() as u64;
            host.disk.inject(end(n));
            let pushed = host.push(&name, &bytes).await;
            let struck = host.disk.calls().len() as u64 - before >= n;
            host.disk.heal();
            if is_spooled(&pushed) {
                assert_eq!(host.get(&name).await.1.as_deref(), Some(&*bytes), "call {n}");
            } else {
                assert_eq!(pushed.unwrap_err().kind, Kind::Store, "call {n}");
            }
            // PostgreSQL asks again, now or after a crash.
            assert!(is_spooled(&host.push(&name, &bytes).await), "call {n}");
            host.all_is_well();
            assert_eq!(host.drain().await.unwrap().stored, 1, "call {n}");
            assert_eq!(host.archive.get(&name).await.1.as_deref(), Some(&*bytes), "call {n}");
            if !struck {
                assert!(n > 1, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_drain_that_stops_anywhere_has_lost_nothing_and_the_next_ends_it() {
    let files: Vec<_> = (2..4).map(|n| Archive::empty(SIZE_BYTES).segment(n)).collect();
    for at_the_disk in [true, false] {
        for end in ENDS {
            for n in 1.. {
                let host = Host::new(SIZE_BYTES).await;
                host.store_goes_away();
                for (name, bytes) in &files {
                    assert!(is_spooled(&host.push(name, bytes).await));
                }
                host.all_is_well();
                let faults = if at_the_disk { &host.disk } else { &host.archive.faults };
                let before = faults.calls().len() as u64;
                faults.inject(end(n));
                let drained = host.drain().await;
                let struck = faults.calls().len() as u64 - before >= n;
                assert!(!struck || drained.is_err() || drained.unwrap().stored == 2, "call {n}");
                host.all_is_well();
                for (name, bytes) in &files {
                    assert_eq!(host.get(name).await.1.as_deref(), Some(&**bytes), "call {n}");
                }
                host.drain().await.unwrap();
                assert_eq!((host.held(), host.files("refused")), (0, 0), "call {n}");
                for (name, bytes) in &files {
                    assert_eq!(
                        host.archive.get(name).await.1.as_deref(),
                        Some(&**bytes),
                        "call {n}"
                    );
                }
                if !struck {
                    assert!(n > 3, "the fault never struck");
                    break;
                }
            }
        }
    }
}

#[tokio::test]
async fn the_same_name_again_is_acknowledged_for_the_same_bytes_only() {
    let host = Host::new(SIZE_BYTES).await;
    let (name, bytes) = host.archive.segment(2);
    let (_, others) = Archive::empty(SIZE_BYTES).segment(2);
    assert_eq!(bytes, others, "segments of a trial are always the same");
    host.store_goes_away();
    assert!(is_spooled(&host.push(&name, &bytes).await));
    assert!(is_spooled(&host.push(&name, &bytes).await));
    assert_eq!(host.held(), 1);
    let (history, bytes) = HISTORY;
    assert!(is_spooled(&host.push(history, bytes).await));
    let other = b"1\t0/400000\tno recovery target specified\n";
    let failure = host.push(history, other).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Conflict, "{failure}");
    assert_eq!(host.get(history).await.1.as_deref(), Some(bytes));
}

#[tokio::test]
async fn what_is_damaged_or_of_another_cluster_does_not_go_into_the_spool_either() {
    let host = Host::new(SIZE_BYTES).await;
    let (name, bytes) = host.archive.segment(2);
    host.store_goes_away();
    let mut torn = bytes.clone();
    torn[9_000] ^= 1;
    assert_eq!(host.push(&name, &torn).await.unwrap_err().kind, Kind::Integrity);
    let mut foreign = bytes.clone();
    foreign[24] ^= 1;
    let kind = host.push(&name, &foreign).await.unwrap_err().kind;
    assert!(matches!(kind, Kind::Conflict | Kind::Store), "{kind:?}");
    assert_eq!(host.push(HISTORY.0, b"nonsense").await.unwrap_err().kind, Kind::Integrity);
    assert_eq!(host.held(), 0);
}

#[tokio::test]
async fn without_a_copy_of_the_identity_nothing_is_taken() {
    let host = Host::new(SIZE_BYTES).await;
    std::fs::remove_dir_all(StallDirectory::store_root(&host.stall.directory)).unwrap();
    let (name, bytes) = host.archive.segment(2);
    host.store_goes_away();
    assert_eq!(host.push(&name, &bytes).await.unwrap_err().kind, Kind::Store);
    assert_eq!(host.held(), 0);
}

#[tokio::test]
async fn a_failure_that_is_not_the_stores_is_no_reason_for_the_spool() {
    let host = Host::new(SIZE_BYTES).await;
    let (name, bytes) = host.archive.segment(2);
    host.archive.push(&name, &bytes).await.unwrap();
    let (history, _) = HISTORY;
    host.archive.push(history, HISTORY.1).await.unwrap();
    let other = b"1\t0/400000\tno recovery target specified\n";
    assert_eq!(host.push(history, other).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(host.held(), 0);
    // What is there already when the store returns is no conflict, and what differs is kept.
    host.store_goes_away();
    assert!(is_spooled(&host.push(&name, &bytes).await));
    assert!(is_spooled(&host.push(history, other).await));
    host.all_is_well();
    let drained = host.drain().await.unwrap();
    assert_eq!((drained.stored, drained.refused.len()), (1, 1));
    assert!(drained.refused[0].is_conflict && drained.refused[0].name == history);
    assert!(drained.refused[0].kept_at.exists());
    assert!(!host.stall.is_pending(), "what is put aside is not tried for ever");
    assert_eq!(host.archive.get(history).await.1.as_deref(), Some(HISTORY.1));
    assert_eq!(
        host.get(history).await.1.as_deref(),
        Some(HISTORY.1),
        "the store's, once it is known"
    );
}

/// While the store was away it could not be seen that another server's WAL stands there.
#[tokio::test]
async fn a_spooled_segment_over_pieces_of_other_wal_is_put_aside_and_named() {
    let host = Host::new(SIZE_BYTES).await;
    let (name, bytes) = host.archive.segment(2);
    let theirs = vec![7; bytes.len()];
    host.archive.put_pieces(2, &theirs, &[0, 1000]).await;
    host.store_goes_away();
    assert!(is_spooled(&host.push(&name, &bytes).await));
    host.all_is_well();
    let drained = host.drain().await.unwrap();
    assert_eq!((drained.stored, drained.refused.len()), (0, 1));
    let refused = &drained.refused[0];
    assert!(refused.is_conflict && refused.name == name && refused.kept_at.exists());
    assert!(refused.why.contains(".parts/"), "{}", refused.why);
    assert_eq!(host.archive.keys_below("/wal/").len(), 1, "nothing was stored");
}

#[tokio::test]
async fn damage_in_the_spool_is_put_aside_never_stored_and_never_given_out() {
    let host = Host::new(SIZE_BYTES).await;
    host.store_goes_away();
    let files: Vec<_> = (2..4).map(|number| host.archive.segment(number)).collect();
    for (name, bytes) in &files {
        assert!(is_spooled(&host.push(name, bytes).await));
    }
    let root = StallDirectory::store_root(&host.stall.directory).join(format!("main/wal/{SYSTEM}"));
    let group = std::fs::read_dir(root).unwrap().next().unwrap().unwrap().path();
    let path = group.join(&files[0].0);
    let mut stored = std::fs::read(&path).unwrap();
    let last = stored.len() - 5;
    stored[last] ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, stored).unwrap();
    let (outcome, given) = host.get(&files[0].0).await;
    assert_eq!((outcome.unwrap_err().kind, given), (Kind::Store, None));
    host.all_is_well();
    let (outcome, given) = host.get(&files[0].0).await;
    assert_eq!((outcome.unwrap_err().kind, given), (Kind::Integrity, None), "not absent");
    let drained = host.drain().await.unwrap();
    assert_eq!((drained.stored, drained.refused.len()), (1, 1));
    assert!(!drained.refused[0].is_conflict);
    assert_eq!(host.archive.keys_below("/wal/").len(), 1);
}

#[tokio::test]
async fn pieces_of_a_large_segment_leave_the_spool_together() {
    let host = Host::new(32 << 20).await;
    host.store_goes_away();
    let (name, bytes) = host.archive.segment(2);
    assert!(is_spooled(&host.push(&name, &bytes).await));
    assert_eq!(host.held(), 2, "two pieces of 16 MiB");
    host.all_is_well();
    // The second piece does not arrive: the first stays here too, for recovery on this host.
    host.archive.faults.inject(Fault::anywhere().key_contains("-02000000").for_ever());
    assert_eq!(host.drain().await.unwrap_err().kind, Kind::Store);
    assert_eq!(host.held(), 2);
    assert!(host.get(&name).await.1 == Some(bytes.clone()));
    host.all_is_well();
    assert_eq!(host.drain().await.unwrap().stored, 2);
    assert!(host.archive.get(&name).await.1 == Some(bytes));
}

#[tokio::test]
async fn a_full_spool_takes_nothing_and_the_default_lets_nothing_go() {
    let mut host = Host::new(SIZE_BYTES).await;
    host.stall.spool.as_mut().unwrap().max_bytes = 1 << 20;
    host.store_goes_away();
    let (name, bytes) = host.archive.segment(2);
    assert_eq!(host.push(&name, &bytes).await.unwrap_err().kind, Kind::Store);
    host.stall.spool = None;
    for number in 2..12 {
        let (name, bytes) = host.archive.segment(number);
        assert_eq!(host.push(&name, &bytes).await.unwrap_err().kind, Kind::Store);
    }
    assert!(host.stall.host_state().unwrap().open_gaps.is_empty());
}

/// A server of 1 MiB segments, as its control file says, that has nothing but `wal_backlog_max`.
async fn letting_go(backlog_max_bytes: u64) -> Host {
    let mut host = Host::new(SIZE_BYTES).await;
    host.lets_go(backlog_max_bytes);
    host.store_goes_away();
    host
}

#[tokio::test]
async fn wal_is_let_go_down_to_below_the_maximum_and_each_byte_of_it_is_recorded() {
    let host = letting_go(4 << 20).await;
    let all: Vec<_> = (2..8).map(|number| host.archive.segment(number)).collect();
    for (name, bytes) in &all {
        std::fs::write(host.wal().join(name), bytes).unwrap();
        std::fs::write(host.ready(name), "").unwrap();
    }
    let mut gone = 0;
    for (name, bytes) in &all {
        match host.push(name, bytes).await {
            Ok(Pushed::LetGo { gap: Some(gap), .. }) => {
                gone += 1;
                assert_eq!(gap.start_lsn, host.archive.size.start_of(2));
                assert_eq!(gap.end_lsn, host.archive.size.start_of(2 + gone));
            }
            Ok(other) => panic!("{other:?}"),
            Err(failure) => {
                assert_eq!(failure.kind, Kind::Store);
                break;
            }
        }
    }
    // Six wait: 6, 5 and 4 are too many, 3 are not.
    assert_eq!(gone, 3);
    let (history, bytes) = HISTORY;
    let (name, more) = host.archive.segment(8);
    std::fs::write(host.wal().join(&name), more).unwrap();
    std::fs::write(host.ready(&name), "").unwrap();
    assert!(host.push(history, bytes).await.is_err(), "a history file is never let go");
    let state = host.stall.host_state().unwrap();
    assert_eq!(state.open_gaps.len(), 1);
    assert!(!state.open_gaps[0].stored);
    host.all_is_well();
    assert_eq!(host.drain().await.unwrap().gaps_recorded, 1);
    let keys = host.archive.keys_below("/gap/");
    let (_, _, start, end) = parse_gap(keys[0].split_once("/gap/").unwrap().1).unwrap();
    assert_eq!((start, end), (host.archive.size.start_of(2), host.archive.size.start_of(5)));
    // What goes afterwards is a record of its own.
    host.store_goes_away();
    let (name, bytes) = &all[3];
    assert!(matches!(host.push(name, bytes).await, Ok(Pushed::LetGo { .. })));
    assert_eq!(host.stall.host_state().unwrap().open_gaps.len(), 2);
}

#[tokio::test]
async fn nothing_is_let_go_that_cannot_be_recorded_or_that_the_server_does_not_wait_for() {
    let host = letting_go(1 << 20).await;
    let (name, bytes) = host.archive.segment(2);
    let lets_go = |pushed: Result<Pushed, Failure>| matches!(pushed, Ok(Pushed::LetGo { .. }));
    // Another cluster's, by its first page; a name that is not its own.
    let mut foreign = bytes.clone();
    foreign[24] ^= 1;
    assert!(!lets_go(host.push(&name, &foreign).await));
    assert!(!lets_go(host.push(&host.archive.segment(3).0, &bytes).await));
    // The record cannot be written: a directory stands in its way.
    let record = StallDirectory::gap_name(1, host.archive.size.start_of(2).0);
    let in_its_way = host.stall.directory.join(&record);
    std::fs::create_dir(&in_its_way).unwrap();
    assert!(!lets_go(host.push(&name, &bytes).await));
    std::fs::remove_dir(&in_its_way).unwrap();
    // By hand: no `.ready`.
    let path = host.wal().join(&name);
    std::fs::remove_file(host.ready(&name)).unwrap();
    let (codec, deadline) = (Codec::DEFAULT, Duration::from_mins(1));
    let request =
        Request { path, codec, deadline, accept_damaged: false, ahead: None, second: None };
    let repository = &host.archive.repository;
    assert!(!lets_go(run_despite(repository, &request, &host.stall).await));
    // The store answers, and says no.
    host.all_is_well();
    host.archive.faults.inject(Fault::anywhere().for_ever().symptom(Symptom::CutAfter(3)));
    assert!(lets_go(host.push(&name, &bytes).await), "cut answers are a store that is away");
    assert!(Path::new(&host.stall.directory).join(&record).exists());
    let report = archive_push::run(&host.archive.calm, &request).await;
    assert!(report.is_ok(), "it can still be stored while the server has it");
}

impl Archive {
    /// The record of segments of timeline 1 that were let go, `end` excluded.
    pub(super) fn gap(&self, first: u64, end: u64) -> WalGap {
        let [first, end] = [first, end].map(|number| self.size.start_of(number).0);
        WalGap { system_identifier: SYSTEM, ..WalGap::sample(first, end) }
    }
}

#[tokio::test]
async fn a_gap_is_a_finding_until_a_backup_begins_behind_it_and_goes_with_the_wal_around_it() {
    let (archive, _) = Archive::with_backups().await;
    archive.calm.put_gap(&archive.gap(5, 7)).await.unwrap();
    let unset = Policy::nothing_set();
    let open = archive.verify(Depth::Header).await;
    let [finding] = &open.findings[..] else { panic!("{:?}", open.findings) };
    assert!(finding.fault == "gap" && finding.what.contains("let go"), "{finding:?}");
    assert!(finding.remedy.contains("backup"), "{}", finding.remedy);
    let moments = &finding.lost_moments[0];
    assert_eq!((moments.from_lsn, moments.open), (archive.size.start_of(5), true));
    // WAL goes on behind it: it is the same finding still.
    for number in 7..9 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let again = archive.verify(Depth::Header).await;
    assert_eq!(again.findings.len(), 1, "{:?}", again.findings);
    assert_eq!(again.findings[0].id, finding.id);
    let info = info::run(&archive.calm, &unset).await.unwrap();
    assert_eq!((info.let_go.len(), &info.let_go[0].closed_by), (1, &None));
    assert!(info.wal[0].gaps[0].why.as_ref().unwrap().contains("let go"), "{:?}", info.wal);
    // What is kept from before it needs it.
    expire(&archive.calm, policy(), false).await.unwrap();
    assert_eq!(archive.keys_below("/gap/").len(), 1);
    back_up(&archive.calm, 9, None, 7).await;
    let closed = archive.verify(Depth::Header).await;
    assert_eq!(closed.findings.len(), 0, "{:?}", closed.findings);
    assert!(
        closed.notes.iter().any(|note| note.contains("begins behind it")),
        "{:?}",
        closed.notes
    );
    let info = info::run(&archive.calm, &unset).await.unwrap();
    assert!(info.let_go[0].closed_by.is_some());
    assert!(info.recovery_window.unwrap().earliest_lsn >= archive.size.start_of(7));
    expire(&archive.calm, policy(), false).await.unwrap();
    assert_eq!(archive.keys_below("/gap/"), [""; 0]);
    assert_eq!(archive.verify(Depth::Header).await.findings.len(), 0);
}

#[tokio::test]
async fn damage_to_a_record_hides_no_gap_and_wal_that_came_all_the_same_is_none() {
    let (archive, _) = Archive::with_backups().await;
    for (first, end) in [(3, 4), (5, 7)] {
        archive.calm.put_gap(&archive.gap(first, end)).await.unwrap();
    }
    for number in 7..9 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let keys = archive.keys_below("/gap/");
    let gaps = async || {
        let report = archive.verify(Depth::Header).await;
        let gaps = report.findings.into_iter().filter(|one| one.fault == "gap");
        gaps.map(|one| one.id).collect::<Vec<_>>()
    };
    let whole = gaps().await;
    assert_eq!(whole.len(), 1, "segment 3 is stored, 5 and 6 are not");
    for damage in all_damage().into_iter().chain([Damage::OfAnotherCluster]) {
        for (key, sibling) in [(&keys[0], &keys[1]), (&keys[1], &keys[0])] {
            let good = archive.damage(key, sibling, damage).await;
            assert_eq!(gaps().await, whole, "{key}: {damage:?}");
            let told = info::run(&archive.calm, &Policy::nothing_set()).await.unwrap();
            assert_eq!(told.let_go.len(), usize::from(*key == keys[0]), "{key}: {damage:?}");
            archive.memory.overwrite(key, good);
        }
    }
}
