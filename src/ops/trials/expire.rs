//! `expire` on a store that fails, that refuses, and that others work in at the same time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::archive::{self, Archive, MODES, SIZE_BYTES, SYSTEM, contents, id, meta};
use crate::failure::{Failure, Kind};
use crate::format::{
    BackupId, Begun, CHUNK_BYTES, Codec, Committed, EntryKind, FileIndex, digest_chunk,
};
use crate::ops::expire::{LOOK_EVERY, Report, Request, run};
use crate::ops::{Progress, Silent, StopRequest, pin};
use crate::pg::Lsn;
use crate::plan::retention::{LOOK_HOLDS_FOR, Policy};
use crate::repo::{BackupWriter, FileMeta, FileRecorder, ParentFiles, Repository};
use crate::store::Key;
use crate::store::faults::{Call, Fault, Symptom};

/// The files of a backup: all of one content but for one file.
pub(super) fn files(seed: u64) -> Vec<(String, Vec<u8>)> {
    let mut files = contents(seed);
    files[2] = contents(1).remove(2);
    files
}

fn begun(id: &BackupId, parent: Option<&Committed>) -> Begun {
    let leans_on = parent.into_iter().flat_map(|parent| &parent.references);
    let leans_on: Vec<BackupId> = leans_on.map(|reference| reference.backup.clone()).collect();
    Begun { parent: parent.map(|parent| parent.id.clone()), ..archive::begun(id, &leans_on) }
}

/// Makes a backup that references what is unchanged since its parent; its WAL goes from segment `start` into the next.
pub(super) async fn back_up(repository: &Repository, seed: u64, parent: Option<u64>, start: u64) {
    back_up_in_packs_of(repository, 8 << 20, seed, parent, start).await;
}

/// The same in packs of this size.
pub(super) async fn back_up_in_packs_of(
    repository: &Repository,
    pack_bytes: usize,
    seed: u64,
    parent: Option<u64>,
    start: u64,
) {
    let second = |seed: u64| id(i64::try_from(seed).unwrap());
    let (id, size) = (second(seed), Archive::empty(SIZE_BYTES).size);
    let parent = match parent {
        Some(parent) => repository.committed(&second(parent)).await.unwrap(),
        None => None,
    };
    let mut before = None;
    if let Some(parent) = &parent {
        before = Some(ParentFiles::load(repository, &parent.id, 1 << 20, |_| false).await.unwrap());
    }
    let begun = begun(&id, parent.as_ref());
    let writer = BackupWriter::begin(repository, &begun, SYSTEM, Codec::DEFAULT, 2).await.unwrap();
    let mut recorder = FileRecorder::new(writer.with_packs_of(pack_bytes));
    for path in ["base", "base/1", "global"] {
        recorder.begin(meta(path, EntryKind::Directory, 0));
        recorder.end(None, None).await.unwrap();
    }
    for (path, content) in files(seed) {
        let of_file: FileMeta = meta(&path, EntryKind::File, content.len() as u64);
        recorder.begin(of_file);
        let mut known = Vec::new();
        if let Some(before) = &mut before
            && let Some(entry) = before.entry(path.as_bytes()).await.unwrap()
        {
            known = before.chunks(&entry, 0).await.unwrap();
        }
        for (n, chunk) in content.chunks(CHUNK_BYTES as usize).enumerate() {
            let digest = digest_chunk(chunk);
            match known.get(n).filter(|known| known.digest == digest) {
                Some(same) => recorder.reference(same.clone(), chunk.len() as u64).await.unwrap(),
                None => recorder.store(digest, chunk).await.unwrap(),
            }
        }
        recorder.end(None, None).await.unwrap();
    }
    let (writer, recorded) = recorder.finish().await.unwrap();
    let committed = Committed {
        cluster: repository.cluster().clone(),
        system_identifier: SYSTEM,
        segment_size: size,
        start_lsn: size.start_of(start),
        stop_lsn: Lsn(size.start_of(start + 1).0 + 0x100),
        files: recorded.files,
        size_bytes: recorded.size_bytes,
        packs: writer.packs(),
        references: recorded.references,
        parent: parent.map(|parent| parent.id),
        ..Committed::example(id.clone())
    };
    let index = FileIndex::new(id, recorded.entries, recorded.list_frames);
    writer.commit(&index, &committed).await.unwrap();
}

/// Three backups, each leaning on the one before, what a dead one has left, what an interrupted `expire` has
/// left, and the WAL of segments 2 to 9.
pub(super) async fn archive() -> Archive {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let push = async |number| {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    };
    for number in 2..9 {
        push(number).await;
    }
    back_up(&archive.calm, 1, None, 2).await;
    back_up(&archive.calm, 2, Some(1), 4).await;
    back_up(&archive.calm, 3, Some(2), 6).await;
    let dead = begun(&id(4), None);
    drop(BackupWriter::begin(&archive.calm, &dead, SYSTEM, Codec::DEFAULT, 1).await.unwrap());
    for (backup, pack) in [(4, 0), (5, 0), (5, 1)] {
        let key = archive.calm.place().pack(&id(backup), pack);
        archive.memory.overwrite(&key, "a pack of nobody");
    }
    push(9).await;
    archive
}

/// Keep one, and take what is silent for dead.
pub(super) fn policy() -> Policy {
    Policy { backups: Some(1), unfinished: Duration::ZERO, ..Policy::nothing_set() }
}

pub(super) async fn expire(
    repository: &Repository,
    policy: Policy,
    dry_run: bool,
) -> Result<Report, Failure> {
    let request = Request { dry_run, ..asked(policy) };
    let (_sender, stop) = StopRequest::new();
    run(repository, &request, &Silent, stop).await
}

pub(super) fn asked(policy: Policy) -> Request {
    Request { policy, dry_run: false, now: None, look_holds_for: LOOK_HOLDS_FOR }
}

fn kept(report: &Report) -> Vec<BackupId> {
    report.backups.iter().filter(|backup| backup.kept).map(|backup| backup.id.clone()).collect()
}

/// Every backup that exists is whole, with its WAL.
async fn assert_whole(archive: &Archive, what: &str) {
    for seed in 1..4 {
        let backup = id(i64::try_from(seed).unwrap());
        if archive.calm.committed(&backup).await.unwrap().is_some() {
            let restored = archive.restore(&backup).await;
            assert_eq!(restored.unwrap(), files(seed), "{what}: backup {seed}");
        }
    }
}

/// The numbers of the stored segments.
pub(super) fn segments(archive: &Archive) -> Vec<u64> {
    let keys = archive.keys_below("/wal/");
    let number = |key: &String| u64::from_str_radix(&key[key.len() - 8..], 16).unwrap();
    keys.iter().map(number).collect()
}

#[tokio::test]
async fn what_is_not_kept_goes_and_what_kept_backups_need_stays() {
    let archive = archive().await;
    let before = archive.memory.keys();
    let dry = expire(&archive.repository, policy(), true).await.unwrap();
    assert_eq!(archive.memory.keys(), before, "a dry run deletes nothing");
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(kept(&report), [id(3)]);
    assert_eq!(dry.deleted.objects, report.deleted.objects);
    assert_eq!(dry.deleted.bytes, report.deleted.bytes);
    let gone = before.len() - archive.memory.keys().len();
    assert_eq!(report.deleted.objects, gone as u64, "each is counted");
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
    assert_eq!(archive.keys_below(id(1).as_str()).len(), 1, "the pack that all lean on");
    assert_eq!(report.kept_packs.len(), 1);
    for gone in [2, 4, 5] {
        assert_eq!(archive.keys_below(id(gone).as_str()), [""; 0]);
    }
    assert_eq!(archive.restore(&id(3)).await.unwrap(), files(3));
    let again = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(again.deleted.objects, 0, "twice is once");
}

#[tokio::test]
async fn without_a_policy_nothing_is_deleted_and_that_is_said() {
    let archive = archive().await;
    let before = archive.memory.keys();
    let failure = expire(&archive.repository, Policy::nothing_set(), false).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Usage);
    assert_eq!(archive.memory.keys(), before);
}

#[tokio::test]
async fn a_call_that_fails_anywhere_harms_nothing_and_the_next_run_finishes() {
    let calm = archive().await;
    expire(&calm.repository, policy(), false).await.unwrap();
    let finished = calm.memory.keys();
    for mode in MODES {
        for n in 1.. {
            let archive = archive().await;
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = expire(&archive.repository, policy(), false).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            if let Err(failure) = &outcome {
                assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}");
            }
            assert_whole(&archive, &format!("call {n}")).await;
            let stored = segments(&archive);
            assert!(stored.ends_with(&[6, 7, 8, 9]), "call {n}: {stored:?}");
            expire(&archive.repository, policy(), false).await.unwrap();
            assert_eq!(archive.memory.keys(), finished, "call {n}");
            if !struck {
                assert!(outcome.is_ok() && n > 20, "the fault never struck");
                break;
            }
        }
    }
}

/// The process dies at the Nth deletion and all that were sent with it.
#[tokio::test]
async fn a_store_that_goes_away_for_good_at_any_call_leaves_every_backup_whole() {
    for n in 1.. {
        let archive = archive().await;
        let before = archive.faults.calls().len() as u64;
        archive.faults.inject(Fault::anywhere().nth(n).for_ever());
        let outcome = expire(&archive.repository, policy(), false).await;
        let struck = archive.faults.calls().len() as u64 - before >= n;
        archive.faults.heal();
        assert_whole(&archive, &format!("call {n}")).await;
        if !struck {
            outcome.unwrap();
            break;
        }
        assert_eq!(outcome.unwrap_err().kind, Kind::Store);
    }
}

#[tokio::test]
async fn a_backup_that_the_store_does_not_let_go_stays_whole() {
    let archive = archive().await;
    let lock = || Fault::on(Call::Delete).for_ever().symptom(Symptom::Denied);
    archive.faults.inject(lock().key_contains(format!("{}/committed.json", id(1))));
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(report.failed(), Some(Kind::Store));
    assert_eq!((report.refused.objects, kept(&report)), (1, vec![id(1), id(3)]));
    assert_whole(&archive, "a locked backup").await;
    assert_eq!(segments(&archive), [2, 3, 6, 7, 8, 9], "with its own WAL");
    archive.faults.heal();
    archive.faults.inject(lock());
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert!(report.refused.objects >= 1);
    assert_whole(&archive, "everything is locked").await;
    archive.faults.heal();
    expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
}

#[tokio::test]
async fn a_backup_that_begins_meanwhile_finds_its_parent_or_is_seen() {
    for key in ["committed.json", "begun.json"] {
        let archive = archive().await;
        let parent = archive.calm.committed(&id(2)).await.unwrap().unwrap();
        let (memory, place) = (archive.memory.clone(), archive.calm.place().clone());
        let begun = begun(&id(9), Some(&parent));
        let json = archive.as_stored(&place.begun(&id(9)), &begun).await;
        let part = format!("{}/{key}", id(2));
        let at_the_deletion = Fault::on(Call::Delete).key_contains(part);
        archive.faults.inject(
            at_the_deletion
                .symptom(Symptom::Slow(Duration::ZERO))
                .hook(move |_, _| memory.overwrite(&place.begun(&id(9)), json.clone())),
        );
        let report = expire(&archive.repository, policy(), false).await.unwrap();
        assert_eq!(kept(&report), [id(3)]);
        // It looks for its parent now and does not find it; had it looked before, everything is there still.
        for leant_on in [1, 2] {
            let packs = archive.keys_below(&format!("{}/pack/", id(leant_on)));
            assert!(!packs.is_empty(), "backup {leant_on}");
            assert!(!archive.keys_below(&format!("{}/files", id(leant_on))).is_empty());
        }
    }
}

/// A backup goes on from what a dead one has stored: it names that in its own `begun.json`, and looks
/// afterwards whether the other's still stands.
#[tokio::test]
async fn a_backup_that_begins_meanwhile_keeps_the_packs_of_the_dead_one_that_it_names() {
    let archive = archive().await;
    let (memory, place) = (archive.memory.clone(), archive.calm.place().clone());
    let resuming = Begun { leans_on: vec![id(4)], ..begun(&id(9), None) };
    let json = archive.as_stored(&place.begun(&id(9)), &resuming).await;
    let at_the_burial = Fault::on(Call::Delete).key_contains(format!("{}/begun.json", id(4)));
    archive.faults.inject(
        at_the_burial
            .symptom(Symptom::Slow(Duration::ZERO))
            .hook(move |_, _| memory.overwrite(&place.begun(&id(9)), json.clone())),
    );
    expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(archive.keys_below(id(4).as_str()).len(), 1, "its pack, and no begun.json");
    assert_eq!(archive.keys_below(id(5).as_str()), [""; 0], "nobody leans on that one");
}

/// A copy counts on what a deleted backup has left: that is looked for again before the next packs go. It may have the
/// name of a backup that was there when stock was taken: of one that was deleted since (2), or of the remains themselves (5).
#[tokio::test]
async fn what_begins_while_packs_are_deleted_keeps_those_that_are_left() {
    for begins in [9, 2, 5] {
        for (deleted, part, leant_on) in [(1, "files", 4), (1, "files", 5), (5, "pack/", 5)] {
            let archive = archive().await;
            for number in 2..200 {
                archive.memory.overwrite(&archive.calm.place().pack(&id(5), number), "of nobody");
            }
            let (memory, place) = (archive.memory.clone(), archive.calm.place().clone());
            let copying = Begun { leans_on: vec![id(leant_on)], ..begun(&id(begins), None) };
            let key = place.begun(&id(begins));
            let json = as_stored_again(&archive, &key, &copying).await;
            let meanwhile = Fault::on(Call::Delete).key_contains(format!("{}/{part}", id(deleted)));
            archive.faults.inject(
                meanwhile
                    .symptom(Symptom::Slow(Duration::ZERO))
                    .hook(move |_, _| memory.overwrite(&key, json.clone())),
            );
            expire(&archive.repository, policy(), false).await.unwrap();
            let left = archive.keys_below(&format!("{}/pack/", id(leant_on))).len();
            let wanted = if leant_on == 4 { 1 } else { 200 };
            let gone = if deleted == leant_on { LOOK_EVERY } else { 0 };
            let told = format!("{begins} began while {deleted} was deleted, on {leant_on}");
            assert_eq!(left, wanted - gone, "{told}");
            assert_whole(&archive, &told).await;
        }
    }
}

/// The bytes of a document under a key that may be taken.
async fn as_stored_again(archive: &Archive, key: &str, begun: &Begun) -> bytes::Bytes {
    let before = archive.memory.bytes(key);
    archive.calm.store().delete(&Key::new(key)).await.unwrap();
    let stored = archive.as_stored(key, begun).await;
    if let Some(before) = before {
        archive.memory.overwrite(key, before);
    }
    stored
}

/// What a copy has brought and committed under the name of a backup that was just deleted is not deleted along with it.
#[tokio::test]
async fn a_backup_that_is_copied_anew_while_what_it_left_goes_is_spared() {
    for document in ["begun.json", "committed.json"] {
        let archive = archive().await;
        let packs = archive.keys_below(&format!("{}/pack/", id(2)));
        let key = format!("main/backup/{}/{document}", id(2));
        let (memory, json) = (archive.memory.clone(), archive.memory.bytes(&key).unwrap());
        let meanwhile = Fault::on(Call::Delete).key_contains(format!("{}/files", id(1)));
        let hook = move |_: Call, _: &Key| memory.overwrite(&key, json.clone());
        archive.faults.inject(meanwhile.symptom(Symptom::Slow(Duration::ZERO)).hook(hook));
        expire(&archive.repository, policy(), false).await.unwrap();
        assert!(!packs.is_empty());
        assert_eq!(archive.keys_below(&format!("{}/pack/", id(2))), packs, "{document}");
    }
}

/// A copy believes after a while that nobody deletes any more who had not seen it: so whoever is slower than that stops.
#[tokio::test]
async fn an_expire_whose_store_is_slow_gives_up_in_time_and_the_next_ends_it() {
    let archive = archive().await;
    let slow = Fault::on(Call::Delete).key_contains(format!("{}/pack/", id(5))).for_ever();
    archive.faults.inject(slow.symptom(Symptom::Slow(Duration::from_hours(1))));
    let request = Request { look_holds_for: Duration::from_millis(50), ..asked(policy()) };
    let stop = StopRequest::new().1;
    let failure = run(&archive.repository, &request, &Silent, stop).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Store, "{failure}");
    assert!(failure.next.contains("highwater expire"), "{failure}");
    assert_eq!(
        archive.keys_below(&format!("{}/pack/", id(5))).len(),
        2,
        "given up, not done later"
    );
    assert_whole(&archive, "given up").await;
    archive.faults.heal();
    expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(archive.keys_below(&format!("{}/pack/", id(5))), [""; 0]);
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
}

/// A process that is suspended: `advance` lasts, once `next` is set.
pub(super) struct Suspended {
    pub(super) next: Arc<AtomicBool>,
    pub(super) lasts: Duration,
}

impl Progress for Suspended {
    fn total(&self, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {
        if self.next.swap(false, Ordering::SeqCst) {
            std::thread::sleep(self.lasts);
        }
    }
    fn note(&self, _message: &str) {}
    fn finish(&self) {}
}

/// The process was suspended between its look and a deletion: it cannot know before, and must not hide it afterwards.
#[tokio::test]
async fn an_expire_that_was_suspended_looks_again_and_tells_what_it_may_have_taken() {
    let holds_for = Duration::from_secs(2);
    for (in_the_request, somebody_began) in
        [(true, true), (true, false), (false, true), (false, false)]
    {
        let archive = archive().await;
        let (memory, key) = (archive.memory.clone(), archive.calm.place().begun(&id(9)));
        let copying = Begun { leans_on: vec![id(5)], ..begun(&id(9), None) };
        let json = archive.as_stored(&key, &copying).await;
        let suspended = Suspended { next: Arc::default(), lasts: 2 * holds_for };
        let next = suspended.next.clone();
        let meanwhile = Fault::on(Call::Delete).key_contains(format!("{}/pack/", id(5)));
        archive.faults.inject(meanwhile.symptom(Symptom::Slow(Duration::ZERO)).hook(
            move |_, _| {
                if somebody_began {
                    memory.overwrite(&key, json.clone());
                }
                if in_the_request {
                    std::thread::sleep(2 * holds_for);
                } else {
                    next.store(true, Ordering::SeqCst);
                }
            },
        ));
        let request = Request { look_holds_for: holds_for, ..asked(policy()) };
        let outcome = run(&archive.repository, &request, &suspended, StopRequest::new().1).await;
        let left = archive.keys_below(&format!("{}/pack/", id(5))).len();
        assert!(left < 2, "some went late");
        match outcome {
            Ok(_) => assert!(!in_the_request && !somebody_began, "it said nothing"),
            Err(failure) if somebody_began => {
                assert_eq!(failure.kind, Kind::Integrity, "{failure}");
                assert!(failure.next.contains("highwater copy"), "{failure}");
            }
            Err(failure) => {
                assert!(in_the_request, "nobody needs them: {failure}");
                assert_eq!(failure.kind, Kind::Store, "{failure}");
            }
        }
        assert_whole(&archive, "suspended").await;
    }
}

#[tokio::test]
async fn two_runs_at_once_do_what_one_does() {
    let archive = archive().await;
    let (one, other) = tokio::join!(
        expire(&archive.repository, policy(), false),
        expire(&archive.calm, policy(), false),
    );
    one.unwrap();
    other.unwrap();
    assert_whole(&archive, "two runs").await;
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
}

#[tokio::test]
async fn a_dead_backup_that_wakes_up_cannot_be_committed() {
    let archive = archive().await;
    let slow = begun(&id(7), None);
    let writer =
        BackupWriter::begin(&archive.calm, &slow, SYSTEM, Codec::DEFAULT, 1).await.unwrap();
    let recorder = FileRecorder::new(writer);
    let (writer, recorded) = recorder.finish().await.unwrap();
    let (name, bytes) = archive.segment(10);
    archive.push(&name, &bytes).await.unwrap();
    expire(&archive.repository, policy(), false).await.unwrap();
    let index = FileIndex::new(id(7), recorded.entries, recorded.list_frames);
    let error = writer.commit(&index, &Committed::example(id(7))).await.unwrap_err();
    assert!(error.is_absent(), "{error}");
    assert!(archive.calm.committed(&id(7)).await.unwrap().is_none());
}

#[tokio::test]
async fn a_damaged_committed_document_keeps_all_wal_and_all_it_may_lean_on() {
    let archive = archive().await;
    let key = archive.calm.place().committed(&id(2));
    let mut bytes = archive.memory.bytes(&key).unwrap().to_vec();
    bytes[40] ^= 1;
    archive.memory.overwrite(&key, bytes);
    let before = (segments(&archive), archive.keys_below(&format!("{}/pack/", id(1))));
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(report.failed(), Some(Kind::Integrity));
    assert_eq!(report.damaged_backups.len(), 1);
    let after = (segments(&archive), archive.keys_below(&format!("{}/pack/", id(1))));
    assert_eq!(before, after);
    assert!(archive.memory.bytes(&key).is_some());
    assert!(
        archive.calm.committed(&id(1)).await.unwrap().is_none(),
        "the first is not needed as a backup"
    );
}

async fn pinned(archive: &Archive, backup: i64) -> Result<(), Failure> {
    let (until, reason) = (None, Some("audit".to_owned()));
    let request = pin::Request { backup: id(backup), until, reason, host: "host".to_owned() };
    pin::pin(&archive.repository, &request).await.map(drop)
}

#[tokio::test]
async fn a_pinned_backup_stays_with_its_own_wal_until_it_is_unpinned() {
    let archive = archive().await;
    pinned(&archive, 1).await.unwrap();
    pinned(&archive, 1).await.unwrap();
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(kept(&report), [id(1), id(3)]);
    assert_eq!(segments(&archive), [2, 3, 6, 7, 8, 9]);
    assert_whole(&archive, "a pin").await;
    assert_eq!(pinned(&archive, 2).await.unwrap_err().kind, Kind::Absent);
    assert_eq!(archive.keys_below("/pin/").len(), 2, "no pin on what is gone");
    let unpinned = pin::unpin(&archive.repository, &id(1)).await.unwrap();
    assert_eq!(unpinned.removed, 2);
    let absent = pin::unpin(&archive.repository, &id(1)).await.unwrap_err();
    assert_eq!(absent.kind, Kind::Absent);
    expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
    assert_whole(&archive, "unpinned").await;
}

#[tokio::test]
async fn a_damaged_pin_holds_and_one_set_meanwhile_is_seen() {
    let archive = archive().await;
    pinned(&archive, 1).await.unwrap();
    let key = archive.keys_below("/pin/").remove(0);
    archive.memory.overwrite(&key, "{}");
    let (memory, other) = (archive.memory.clone(), key.replace(id(1).as_str(), id(2).as_str()));
    // While the first backup that goes is looked at, somebody pins it.
    let looking = Fault::on(Call::ListLevel).key_contains("/pin/");
    archive.faults.inject(looking.symptom(Symptom::Slow(Duration::ZERO)).hook(move |_, _| {
        memory.overwrite(&other, "{}");
    }));
    let report = expire(&archive.repository, policy(), false).await.unwrap();
    assert_eq!(kept(&report), [id(1), id(2), id(3)]);
    assert_whole(&archive, "pins").await;
}

#[tokio::test]
async fn a_stop_ends_between_two_deletions_and_the_next_run_goes_on() {
    let archive = archive().await;
    let (sender, stop) = StopRequest::new();
    let sent = AtomicBool::new(false);
    let deletion = Fault::on(Call::Delete).key_contains("begun.json");
    archive.faults.inject(deletion.symptom(Symptom::Slow(Duration::ZERO)).hook(move |_, _| {
        sent.store(true, Ordering::SeqCst);
        sender.send_replace(Some(crate::failure::StopSignal::Terminate));
    }));
    let request = asked(policy());
    let failure = run(&archive.repository, &request, &Silent, stop).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Stopped(crate::failure::StopSignal::Terminate));
    assert_eq!(segments(&archive).len(), 8, "nothing after the stop");
    assert_whole(&archive, "a stop").await;
    expire(&archive.calm, policy(), false).await.unwrap();
    assert_eq!(segments(&archive), [6, 7, 8, 9]);
}

#[tokio::test]
async fn what_is_not_ours_stays() {
    let archive = archive().await;
    let foreign = [
        format!("main/backup/{}/notes.txt", id(1)),
        format!("main/wal/{SYSTEM}/0000000100000000/README"),
        format!("main/wal/{SYSTEM}/00000002.history"),
    ];
    let (name, history) = ("00000002.history", b"1\t0/300000\tno recovery target specified\n");
    archive.push(name, history).await.unwrap();
    for key in &foreign[..2] {
        archive.memory.overwrite(key, "somebody's");
    }
    expire(&archive.repository, policy(), false).await.unwrap();
    let left: BTreeSet<String> = archive.memory.keys().into_iter().collect();
    for key in foreign {
        assert!(left.contains(&key), "{key}");
    }
}

#[tokio::test]
async fn a_damaged_history_file_stops_everything_before_the_first_deletion() {
    let archive = archive().await;
    let key = Key::new(archive.calm.place().history(SYSTEM, crate::pg::Timeline(2)));
    archive.memory.overwrite(key.as_str(), "not sealed");
    let before = archive.memory.keys();
    let failure = expire(&archive.repository, policy(), false).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Integrity, "{failure}");
    assert_eq!(archive.memory.keys(), before);
}
