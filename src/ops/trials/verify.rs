//! `verify` on everything that can be wrong: the table of damage, flipped bits, a store that fails, losses and what they mean.

use std::time::Duration;

use super::archive::{
    Archive, IS_ENCRYPTED, MODES, SIZE_BYTES, SYSTEM, begun, contents, id, make_backup, noise,
    repository_key, wrapped_key,
};
use super::damage::{Damage, all_damage};
use super::drill::drill;
use crate::failure::{Failure, Kind};
use crate::format::{Depth, Document, KeyObject, Made, Pin, SecretKey, WalObject, WrappedKey};
use crate::ops::verify::{AcknowledgeRequest, Finding, Report, Request, acknowledge, run};
use crate::ops::{Silent, StopRequest, info};
use crate::pg::{Lsn, PgTimestamp, SegmentName, Timeline};
use crate::plan::retention::Policy;
use crate::repo::Repository;
use crate::store::Key;

fn asked(depth: Depth, again: bool) -> Request {
    Request {
        depth,
        again,
        older_than: Duration::from_hours(24 * 30),
        bytes_per_second: None,
        jobs: 2,
        look_again_after: Duration::from_millis(1),
        policy: Policy::nothing_set(),
        host: "host".to_owned(),
    }
}

async fn verify_with(repository: &Repository, request: &Request) -> Result<Report, Failure> {
    let (_sender, stop) = StopRequest::new();
    run(repository, request, &Silent, stop).await
}

impl Archive {
    pub(super) async fn verify(&self, depth: Depth) -> Report {
        verify_with(&self.repository, &asked(depth, true)).await.unwrap()
    }

    /// One of each kind of object, all of them needed or at least looked at.
    async fn with_everything() -> Self {
        let (archive, [id, other]) = Self::with_backups().await;
        let (_, bytes) = archive.segment(5);
        archive.put_pieces(5, &bytes, &[0, 1 << 19, 1 << 20]).await;
        let (name, bytes) = archive.segment(6);
        archive.push(&format!("{name}.partial"), &bytes).await.unwrap();
        let (first, _) = archive.segment(2);
        let history = format!(
            "START WAL LOCATION: 0/200000 (file {first})\nSTOP WAL LOCATION: 0/300100 (file {first})\n"
        );
        archive.push(&format!("{first}.00000028.backup"), history.as_bytes()).await.ok();
        for n in [2, 3] {
            let history = "1\t0/600000\treason\n";
            archive.push(&format!("0000000{n}.history"), history.as_bytes()).await.unwrap();
        }
        for id in [id, other] {
            let pin = Pin { reason: None, ..crate::ops::new_pin(id, "host".to_owned()) };
            archive.calm.put_pin(&pin).await.unwrap();
        }
        for host in ["one", "other"] {
            archive.calm.put_drill(&mut drill(host, PgTimestamp(0))).await.unwrap();
        }
        for number in [2, 3] {
            archive.calm.put_gap(&archive.gap(number, number + 1)).await.unwrap();
        }
        archive
    }

    async fn forget_proofs(&self) {
        for key in self.keys_below("/verify/") {
            self.calm.store().delete(&Key::new(key)).await.unwrap();
        }
    }

    fn is_own(key: &str) -> bool {
        key.contains("/verify/")
    }

    fn keys(&self) -> Vec<String> {
        self.memory.keys().into_iter().filter(|key| !Self::is_own(key)).collect()
    }
}

fn told(findings: &[Finding]) -> Vec<(&str, Option<&str>)> {
    findings.iter().map(|one| (one.fault, one.object.as_deref())).collect()
}

#[tokio::test]
async fn a_whole_repository_has_no_findings_and_is_not_read_twice() {
    let archive = Archive::with_everything().await;
    let plain = archive.verify(Depth::Header).await;
    assert_eq!(told(&plain.findings), []);
    assert_eq!(plain.notes, [""; 0], "nothing is strange");
    let deep = verify_with(&archive.repository, &asked(Depth::Whole, false)).await.unwrap();
    assert_eq!((told(&deep.findings), deep.failed()), (vec![], None));
    assert_eq!(deep.skipped, 0, "headers are no proof of the bytes behind them");
    let again = verify_with(&archive.repository, &asked(Depth::Whole, false)).await.unwrap();
    assert_eq!((told(&again.findings), again.read_bytes), (vec![], 0));
    assert!(again.skipped > 10, "{again:?}");
    let plain = verify_with(&archive.repository, &asked(Depth::Header, false)).await.unwrap();
    assert_eq!(plain.skipped, again.skipped - 2, "but for the contents of both backups");
    let all = archive.verify(Depth::Whole).await;
    assert_eq!((all.skipped, all.read_bytes), (0, deep.read_bytes));
}

#[tokio::test]
async fn proofs_of_a_run_that_was_stopped_are_believed_and_those_of_whole_runs_replace_them() {
    let archive = Archive::with_everything().await;
    let (sender, stop) = StopRequest::new();
    // The store is asked for the second pack: then somebody wants the work to stop.
    let hook = move |_: crate::store::faults::Call, _: &Key| {
        let _ = sender.send(Some(crate::failure::StopSignal::Terminate));
    };
    let slow = crate::store::faults::Symptom::Slow(Duration::ZERO);
    let fault = crate::store::faults::Fault::on(crate::store::faults::Call::Read);
    let fault = fault.key_contains("/pack/").nth(3).symptom(slow).hook(hook);
    archive.faults.inject(fault);
    let request = asked(Depth::Whole, false);
    let stopped = run(&archive.repository, &request, &Silent, stop).await.unwrap_err();
    assert!(matches!(stopped.kind, Kind::Stopped(_)), "{stopped}");
    archive.faults.heal();
    let proofs = archive.keys_below("/verify/");
    assert_eq!(proofs.len(), 1, "{proofs:?}");
    let second = verify_with(&archive.repository, &request).await.unwrap();
    assert!(second.skipped >= 6, "all WAL had been proven: {second:?}");
    assert_eq!(told(&second.findings), []);
    let left = archive.keys_below("/verify/");
    assert!(!left.contains(&proofs[0]), "{left:?}");
    assert_eq!(left.iter().filter(|key| key.contains("/proof/")).count(), 1, "{left:?}");
}

#[tokio::test]
async fn a_proof_is_believed_for_so_long_only_and_never_of_an_object_that_looks_otherwise() {
    let archive = Archive::with_everything().await;
    let whole = archive.verify(Depth::Whole).await;
    let old = Request { older_than: Duration::ZERO, ..asked(Depth::Whole, false) };
    let again = verify_with(&archive.repository, &old).await.unwrap();
    assert_eq!((again.skipped, again.read_bytes), (0, whole.read_bytes));
    let key = archive.keys_below("/pack/")[0].clone();
    let bytes = archive.memory.bytes(&key).unwrap();
    let length = bytes.len() as u64;
    archive.memory.overwrite(&key, bytes);
    let touched = verify_with(&archive.repository, &asked(Depth::Whole, false)).await.unwrap();
    assert_eq!(told(&touched.findings), [], "the same bytes, stored anew");
    assert!(touched.read_bytes >= length, "{touched:?}");
}

/// What `verify` must say of a kind of object.
struct Kinds {
    key: String,
    sibling: String,
    /// Whether its absence harms, or shows at all.
    missing: bool,
    is_document: bool,
}

fn kinds_of(archive: &Archive) -> Vec<Kinds> {
    let key_of = |part: &str| {
        let keys = archive.keys_below(part);
        (keys[0].clone(), keys[keys.len() - 1].clone())
    };
    let wal = |number: u64| {
        archive
            .calm
            .wal_key(
                SYSTEM,
                WalObject::File(crate::pg::WalFileName::Segment(SegmentName::new(
                    Timeline(1),
                    number,
                    archive.size,
                ))),
            )
            .as_str()
            .to_owned()
    };
    let kinds = |(key, sibling): (String, String), missing, is_document| Kinds {
        key,
        sibling,
        missing,
        is_document,
    };
    let identities = (
        archive.calm.place().identity(SYSTEM),
        archive.calm.place().identity(super::archive::ANCESTOR),
    );
    vec![
        kinds((wal(3), wal(2)), true, false),
        kinds(key_of(".parts/"), true, false),
        // Nothing but a copy of what the next timeline repeats.
        kinds((key_of(".partial").0, wal(2)), false, false),
        // No WAL is stored of timelines 2 and 3.
        kinds(key_of(".history"), false, false),
        kinds(key_of("/pack/"), true, false),
        kinds(
            (archive.keys_below("/files")[0].clone(), archive.keys_below("/files")[1].clone()),
            true,
            false,
        ),
        // Without this document there is no backup.
        kinds(key_of("/committed.json"), false, true),
        kinds(key_of("/begun.json"), true, true),
        kinds(key_of("/pin/"), false, true),
        kinds(key_of("/drill/"), false, true),
        // What was let go came all the same.
        kinds(key_of("/gap/"), false, true),
        kinds(identities, true, true),
    ]
}

#[tokio::test]
async fn every_damage_to_every_kind_of_object_is_found() {
    let archive = Archive::with_everything().await;
    assert_eq!(told(&archive.verify(Depth::Whole).await.findings), []);
    for Kinds { key, sibling, missing, is_document } in kinds_of(&archive) {
        for damage in all_damage().into_iter().chain([Damage::OfAnotherCluster]) {
            let good = archive.damage(&key, &sibling, damage).await;
            let plain = archive.verify(Depth::Header).await;
            let deep = archive.verify(Depth::Whole).await;
            archive.memory.overwrite(&key, good);
            let found = deep.failed().is_some();
            let wanted = damage != Damage::Missing || missing;
            assert_eq!(found, wanted, "{key}: {damage:?} gave {:?}", deep.findings);
            // One look at the header shows everything but a flipped bit in the body.
            let in_plain = plain.failed().is_some();
            let body = matches!(damage, Damage::BitFlipped(_)) && !is_document;
            assert!(in_plain == wanted || body, "{key}: {damage:?} gave {:?}", plain.findings);
            let named =
                |one: &Finding| one.object.as_deref() == Some(&*key) || one.object.is_none();
            let strange = damage == Damage::OfAnotherCluster;
            assert!(
                strange || deep.findings.iter().all(named),
                "{key}: {damage:?} blames others: {:?}",
                deep.findings
            );
            for one in &deep.findings {
                assert!(!one.consequence.is_empty() && !one.remedy.is_empty(), "{one:?}");
            }
        }
    }
    assert_eq!(told(&archive.verify(Depth::Whole).await.findings), [], "all is whole again");
}

#[tokio::test]
async fn a_damaged_document_about_keys_is_found_and_costs_no_moment() {
    let (archive, _) = Archive::with_backups().await;
    let (name, user_key) = (repository_key().0, SecretKey::new([3; 32]));
    let made = Made { at: PgTimestamp(0), host: "host".to_owned(), tool: "test".to_owned() };
    let cluster = archive.calm.cluster().clone();
    let wrapped = WrappedKey::new(&cluster, name, &repository_key().1, &user_key, made).unwrap();
    let of = |user_key| archive.calm.place().key(KeyObject::Wrapped { key: name, user_key });
    let (key, other) = (of(user_key.id()), of(SecretKey::new([4; 32]).id()));
    archive.memory.overwrite(&key, wrapped.to_json().unwrap());
    let report = archive.verify(Depth::Header).await;
    assert_eq!((told(&report.findings), report.notes), (vec![], vec![]));
    // Whole, and not what its name says.
    archive.memory.overwrite(&other, wrapped.to_json().unwrap());
    archive.damage(&key, "", Damage::Truncated).await;
    let report = archive.verify(Depth::Header).await;
    let mut found = told(&report.findings);
    found.sort_unstable();
    let mut wanted = [("damaged", Some(&*key)), ("damaged", Some(&*other))];
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    for one in &report.findings {
        assert_eq!((one.lost_backups.len(), one.lost_moments.len()), (0, 0));
        assert!(one.consequence.contains("user key"), "{one:?}");
    }
}

#[tokio::test]
async fn where_the_object_that_our_own_key_opens_is_damaged_verify_names_it_and_stops() {
    if !IS_ENCRYPTED {
        return;
    }
    let (archive, _) = Archive::with_backups().await;
    let key = wrapped_key(repository_key().0);
    let ancestor = archive.calm.place().identity(super::archive::ANCESTOR);
    for damage in
        [Damage::Truncated, Damage::Zeroed, Damage::BitFlipped(40), Damage::SwappedWithASibling]
    {
        let good = archive.damage(&key, &ancestor, damage).await;
        let fresh = archive.reopened();
        let failure = verify_with(&fresh, &asked(Depth::Whole, true)).await.unwrap_err();
        archive.memory.overwrite(&key, good);
        assert_eq!(failure.kind, Kind::Integrity, "{damage:?}: {failure}");
        let told = failure.causes().join(": ");
        assert!(told.contains(&key), "{damage:?}: {told}");
        assert!(failure.next.contains("key add"), "{damage:?}: {}", failure.next);
    }
    assert_eq!(told(&archive.verify(Depth::Whole).await.findings), []);
}

#[tokio::test]
async fn a_damaged_object_of_a_key_that_was_rotated_costs_what_was_stored_under_it() {
    if !IS_ENCRYPTED {
        return;
    }
    let (archive, [one, _]) = Archive::with_backups().await;
    archive.calm.rotate(&[], &crate::ops::key_taker("host".to_owned())).await.unwrap();
    let late = id(3);
    let later = archive.reopened();
    make_backup(&later, &late, 3).await.unwrap();
    let key = wrapped_key(repository_key().0);
    let good = archive.damage(&key, "", Damage::Zeroed).await;
    let fresh = archive.reopened();
    let report = verify_with(&fresh, &asked(Depth::Whole, true)).await.unwrap();
    let of_key = report.findings.iter().find(|one| one.object.as_deref() == Some(&*key)).unwrap();
    assert_eq!(of_key.fault, "damaged");
    let lost: Vec<_> = report.findings.iter().flat_map(|one| &one.lost_backups).collect();
    assert!(lost.contains(&&one), "{:?}", report.findings);
    archive.memory.overwrite(&key, good);
    let report = verify_with(&archive.reopened(), &asked(Depth::Whole, true)).await.unwrap();
    assert_eq!(told(&report.findings), []);
}

/// What `verify` remembers is worth a second look at the most: nothing that is wrong with it is a loss, or hides one.
#[tokio::test]
async fn damage_to_reports_and_proofs_costs_a_second_reading_and_nothing_else() {
    let archive = Archive::with_everything().await;
    archive.verify(Depth::Whole).await;
    archive.verify(Depth::Header).await;
    let remembered = archive.keys_below("/verify/");
    assert!(remembered.len() >= 3, "{remembered:?}");
    let good = |key: &String| (key.clone(), archive.memory.bytes(key).unwrap());
    let good: Vec<_> = remembered.iter().map(good).collect();
    let lost = archive.keys_below("/pack/").remove(0);
    for key in &remembered {
        let sibling = remembered.iter().find(|other| *other != key).unwrap();
        for damage in all_damage() {
            archive.damage(key, sibling, damage).await;
            info::run(&archive.reopened(), &Policy::nothing_set()).await.unwrap();
            let request = asked(Depth::Whole, false);
            let report = verify_with(&archive.reopened(), &request).await.unwrap();
            let about_others = |one: &&Finding| one.object.as_deref() != Some(&**key);
            let others: Vec<_> = report.findings.iter().filter(about_others).collect();
            assert!(others.is_empty(), "{key}: {damage:?}: {others:?}");
            // And a pack that was cut since is found, whatever is remembered.
            let whole = archive.damage(&lost, "", Damage::Truncated).await;
            let report = verify_with(&archive.reopened(), &request).await.unwrap();
            assert!(report.failed().is_some(), "{key}: {damage:?}");
            archive.memory.overwrite(&lost, whole);
            // A run replaces what it remembers: all as it was.
            for new in archive.keys_below("/verify/") {
                archive.calm.store().delete(&Key::new(new)).await.unwrap();
            }
            for (key, bytes) in &good {
                archive.memory.overwrite(key, bytes.clone());
            }
        }
    }
}

#[tokio::test]
async fn every_damage_to_marks_and_keys_of_others_is_found_and_costs_no_moment() {
    if !IS_ENCRYPTED {
        return;
    }
    let (archive, _) = Archive::with_backups().await;
    let taker = crate::ops::key_taker("host".to_owned());
    archive.calm.add_user_key(&SecretKey::new([3; 32]), &taker).await.unwrap();
    archive.calm.rotate(&[SecretKey::new([3; 32])], &taker).await.unwrap();
    let own = archive.keys_below(
        &crate::repo::KeySource::user_key(&super::archive::UserKey).unwrap().id().to_string(),
    );
    let keys = archive.keys_below("/key/");
    let others: Vec<&String> = keys.iter().filter(|key| !own.contains(key)).collect();
    assert!(others.len() >= 3, "two wrapped keys and a mark: {keys:?}");
    for key in &others {
        let sibling = others.iter().find(|other| *other != key).unwrap();
        for damage in all_damage().into_iter().filter(|damage| *damage != Damage::Missing) {
            let good = archive.damage(key, sibling, damage).await;
            let report =
                verify_with(&archive.reopened(), &asked(Depth::Header, true)).await.unwrap();
            archive.memory.overwrite(key, good);
            let found = told(&report.findings);
            assert!(found.iter().any(|(_, object)| *object == Some(key)), "{key}: {damage:?}");
            for one in &report.findings {
                assert_eq!((one.lost_backups.len(), one.lost_moments.len()), (0, 0), "{one:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_damaged_pack_costs_the_backups_that_need_it_and_no_other() {
    let (archive, [one, other]) = Archive::with_backups().await;
    let key = format!("main/backup/{one}/pack/00000000");
    archive.damage(&key, &key, Damage::Zeroed).await;
    let report = archive.verify(Depth::Header).await;
    assert_eq!(told(&report.findings), [("damaged", Some(&*key))]);
    let finding = &report.findings[0];
    assert_eq!(finding.lost_backups, std::slice::from_ref(&one));
    assert_eq!(finding.lost_moments, [], "backup {other} reaches the same");
    archive.damage(&format!("main/backup/{other}/files"), "", Damage::Missing).await;
    let report = archive.verify(Depth::Header).await;
    let missing = report.findings.iter().find(|one| one.fault == "missing").unwrap();
    assert_eq!(missing.lost_backups, [other]);
}

#[tokio::test]
async fn a_hole_tells_which_moments_are_lost_and_is_green_again_once_it_is_acknowledged() {
    let (archive, _) = Archive::with_backups().await;
    for number in 5..9 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let (gone, _) = archive.segment(6);
    archive.damage(&archive.keys_below(&gone)[0].clone(), "", Damage::Missing).await;
    let report = archive.verify(Depth::Header).await;
    assert_eq!(told(&report.findings), [("gap", None)]);
    assert_eq!(report.failed(), Some(Kind::Integrity));
    let finding = &report.findings[0];
    assert_eq!(
        finding.what,
        "WAL from 0/600000 to 0/700000 of timeline 1 is not in the repository"
    );
    let moments = &finding.lost_moments[0];
    assert_eq!((moments.from_lsn, moments.to_lsn), (Lsn(0x60_0000), Lsn(0x90_0000)));
    assert_eq!((moments.from_is_lost, moments.open), (false, true));
    assert_eq!(moments.from_time, Some(PgTimestamp(5_000_000)), "the commit in the segment before");

    let ask = |finding: &str| AcknowledgeRequest {
        finding: finding.to_owned(),
        reason: "the disk died".to_owned(),
        host: "host".to_owned(),
    };
    let unknown = acknowledge(&archive.repository, &ask("0123456789ab")).await.unwrap_err();
    assert_eq!(unknown.kind, Kind::Absent);
    acknowledge(&archive.repository, &ask(&finding.id)).await.unwrap();
    let twice = acknowledge(&archive.repository, &ask(&finding.id)).await.unwrap_err();
    assert_eq!(twice.kind, Kind::Conflict);
    let report = archive.verify(Depth::Whole).await;
    assert_eq!((report.findings.len(), report.failed()), (1, None));
    assert_eq!(report.findings[0].acknowledged.as_ref().unwrap().reason, "the disk died");

    // More of it is another loss.
    let (gone, _) = archive.segment(7);
    archive.damage(&archive.keys_below(&gone)[0].clone(), "", Damage::Missing).await;
    let report = archive.verify(Depth::Header).await;
    assert_eq!(report.failed(), Some(Kind::Integrity));
    assert_ne!(report.findings[0].id, finding.id);
    let key = archive.keys_below("/acknowledged/")[0].clone();
    archive.damage(&key, &key, Damage::Zeroed).await;
    let report = archive.verify(Depth::Header).await;
    assert!(told(&report.findings).contains(&("damaged", Some(&*key))), "{:?}", report.findings);
}

#[tokio::test]
async fn a_segment_accepted_as_damaged_is_one_finding_and_no_hole_besides() {
    let (archive, _) = Archive::with_backups().await;
    let (name, mut bytes) = archive.segment(5);
    bytes[9_000] ^= 1;
    archive.push_damaged(&name, &bytes).await;
    for number in 6..8 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let report = archive.verify(Depth::Whole).await;
    let key = archive.keys_below(".damaged")[0].clone();
    assert_eq!(told(&report.findings), [("accepted", Some(&*key))]);
    let moments = &report.findings[0].lost_moments[0];
    assert_eq!((moments.from_lsn, moments.to_lsn), (Lsn(0x50_0000), Lsn(0x80_0000)));
}

#[tokio::test]
async fn a_bit_that_no_codec_reads_is_found_once_all_was_proven_and_then_known() {
    let archive = Archive::with_everything().await;
    assert_eq!(archive.verify(Depth::Whole).await.failed(), None);
    let (name, bytes) = archive.segment(3);
    let key = archive.keys_below(&name)[0].clone();
    // Behind zstd's magic, the bit of the frame header that decoders ignore (RFC 8878, 3.1.1.1.1.3).
    let magic = 0xFD2F_B528_u32.to_le_bytes();
    let flip = |good: &[u8]| {
        let frame = good.windows(4).position(|four| four == magic).unwrap();
        let mut bad = good.to_vec();
        bad[frame + 4] ^= 1 << 4;
        bad
    };
    archive.stored_instead(&key, flip).await;
    assert_eq!(archive.get(&name).await.1, Some(bytes), "nothing is lost");
    for depth in [Depth::Whole, Depth::Whole] {
        let report = archive.verify(depth).await;
        assert_eq!(told(&report.findings), [("changed", Some(&*key))]);
    }
    let finding = archive.verify(Depth::Whole).await.findings.remove(0);
    let (reason, host) = ("put back".to_owned(), "host".to_owned());
    let known = AcknowledgeRequest { finding: finding.id, reason, host };
    acknowledge(&archive.repository, &known).await.unwrap();
    let report = verify_with(&archive.repository, &asked(Depth::Whole, false)).await.unwrap();
    assert_eq!(told(&report.findings), [], "it is what is compared with from now on");
}

#[tokio::test]
async fn a_store_that_fails_at_any_call_ends_it_and_is_never_a_finding() {
    let archive = Archive::with_everything().await;
    for depth in [Depth::Header, Depth::Whole] {
        for mode in MODES {
            for n in 1.. {
                // What runs that failed have proven would let each next one do more, or less.
                archive.forget_proofs().await;
                let before = archive.faults.calls().len() as u64;
                archive.faults.inject(mode(n));
                let outcome = verify_with(&archive.repository, &asked(depth, n % 2 == 0)).await;
                let struck = archive.faults.calls().len() as u64 - before >= n;
                archive.faults.heal();
                match outcome {
                    Ok(report) => assert_eq!(told(&report.findings), [], "call {n}"),
                    Err(failure) => assert_eq!(failure.kind, Kind::Store, "call {n}: {failure}"),
                }
                if !struck {
                    assert!(n > 20, "the fault never struck");
                    break;
                }
            }
        }
    }
    let report = archive.verify(Depth::Whole).await;
    assert_eq!(told(&report.findings), []);
}

#[tokio::test]
async fn what_is_stored_and_deleted_beside_it_is_no_finding() {
    let (archive, [_, other]) = Archive::with_backups().await;
    // At each call in turn, another backup is deleted as `expire` does it, and WAL is stored.
    for n in (1..120).step_by(7) {
        let (name, bytes) = archive.segment(5 + n / 7);
        let calm = archive.calm.clone();
        let memory = archive.memory.clone();
        let other_id = other.clone();
        let hook = move |_: crate::store::faults::Call, _: &Key| {
            for key in memory.keys().into_iter().filter(|key| key.contains(other_id.as_str())) {
                futures_util::FutureExt::now_or_never(calm.store().delete(&Key::new(key)));
            }
        };
        let slow = crate::store::faults::Symptom::Slow(Duration::ZERO);
        archive
            .faults
            .inject(crate::store::faults::Fault::anywhere().nth(n).symptom(slow).hook(hook));
        let report = archive.verify(Depth::Whole).await;
        archive.faults.heal();
        assert_eq!(told(&report.findings), [], "call {n}");
        if archive.memory.keys().iter().any(|key| key.contains(other.as_str())) {
            assert!(n > 20, "nothing was deleted beside it");
            break;
        }
        archive.push(&name, &bytes).await.unwrap();
        archive.calm.forget_unfinished(&other).await.unwrap();
        make_backup(&archive.calm, &other, 2).await.unwrap();
    }
}

#[tokio::test]
async fn wal_that_only_a_self_contained_backup_lacks_is_no_finding() {
    let (archive, _) = Archive::with_backups().await;
    for number in 7..9 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let report = archive.verify(Depth::Header).await;
    assert_eq!(told(&report.findings), [("gap", None)], "nothing says that it may be missing");
    let unfinished = begun(&id(9), &[]);
    assert_eq!(unfinished.parent, None);
}

/// Flips bits one at a time in a repository of 500 objects: each is found, and nothing else comes back.
async fn flip_bits(rounds: u64) {
    let (archive, ids) = Archive::with_backups().await;
    for number in 5..510 {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    assert_eq!(told(&archive.verify(Depth::Whole).await.findings), []);
    let keys = archive.keys();
    assert!(keys.len() >= 500, "{}", keys.len());
    for round in 0..rounds {
        let random = noise(round ^ 0x5eed, 32);
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&random[at..at + 8]);
            usize::try_from(u64::from_le_bytes(bytes) >> 1).unwrap()
        };
        // Every other time among the few objects of backups.
        let of_backups: Vec<&String> = keys.iter().filter(|key| key.contains("/backup/")).collect();
        let key = if round % 2 == 0 {
            &keys[number(0) % keys.len()]
        } else {
            of_backups[number(0) % of_backups.len()]
        };
        let good = archive.memory.bytes(key).unwrap();
        let mut bad = good.to_vec();
        let at = number(8) % bad.len();
        bad[at] ^= 1 << (number(16) % 8);
        archive.memory.overwrite(key, bad);
        let request = asked(Depth::Whole, round % 10 == 0);
        let report = verify_with(&archive.repository, &request).await.unwrap();
        assert!(report.failed().is_some(), "round {round}: `{key}`, byte {at}, was not found");
        if key.contains("/wal/") {
            let name = key.rsplit('/').next().unwrap();
            let (outcome, handed_out) = archive.get(name).await;
            let number =
                SegmentName::parse(name).and_then(|name| name.number(archive.size)).unwrap();
            let same = handed_out == Some(archive.segment(number).1);
            assert!(outcome.is_err() || same, "round {round}: `{key}`, byte {at}, was handed out");
        } else {
            for (seed, id) in (1..).zip(&ids) {
                if let Ok(files) = archive.restore(id).await {
                    assert_eq!(files, contents(seed), "round {round}: `{key}`, byte {at}");
                }
            }
        }
        archive.memory.overwrite(key, good);
    }
    assert_eq!(told(&archive.verify(Depth::Whole).await.findings), []);
}

#[tokio::test]
async fn a_bit_flipped_anywhere_is_found_and_reaches_nobody() {
    // `make soak` asks for 50 rounds of ten.
    let set = std::env::var("HIGHWATER_SOAK_ROUNDS").ok();
    flip_bits(10 * set.map_or(4, |rounds| rounds.parse::<u64>().unwrap())).await;
}

#[tokio::test]
async fn a_place_that_nobody_claimed_is_the_stores_failure() {
    let archive = Archive::empty(SIZE_BYTES);
    let failure = verify_with(&archive.repository, &asked(Depth::Header, false)).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Store);
}
