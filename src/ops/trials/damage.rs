//! The table of damage: each kind of stored object, damaged in each way.

use futures_util::TryStreamExt;

use super::archive::{Archive, SIZE_BYTES, SYSTEM, contents};
use crate::failure::{Failure, Kind};
use crate::format::{
    Begun, Committed, Document, Drill, ENCRYPTED_IDENTITY_VERSION, HEADER_PROBE_BYTES, Identity,
    Pin, WalGap, encode_header_padded, parse_header,
};
use crate::ops::info;
use crate::pg::SystemId;
use crate::plan::target::RecoveryPoint;
use crate::store::Key;
use crate::store::faults::{Call, Fault};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Damage {
    Truncated,
    Zeroed,
    /// One bit, at this many 64ths of the object.
    BitFlipped(usize),
    SwappedWithASibling,
    Missing,
    NewerFormat,
    OfAnotherCluster,
}

use Damage::{
    BitFlipped, Missing, NewerFormat, OfAnotherCluster, SwappedWithASibling, Truncated, Zeroed,
};

pub(super) fn all_damage() -> Vec<Damage> {
    let mut all = vec![Truncated, Zeroed, SwappedWithASibling, Missing, NewerFormat];
    all.extend((0..64).step_by(3).map(BitFlipped));
    all
}

impl Archive {
    /// Damages the object `key`; the old bytes are returned.
    pub(super) async fn damage(&self, key: &str, sibling: &str, damage: Damage) -> bytes::Bytes {
        let good = self.memory.bytes(key).unwrap();
        let mut bad = good.to_vec();
        match damage {
            Truncated => bad.truncate(good.len() / 2),
            Zeroed => bad.fill(0),
            BitFlipped(at) => bad[good.len() * at / 64] ^= 1 << (at % 8),
            SwappedWithASibling => bad = self.memory.bytes(sibling).unwrap().to_vec(),
            NewerFormat => bad = self.stored_instead(key, of_newer_format).await,
            OfAnotherCluster => {
                bad = self.stored_instead(key, |good| of_another_cluster(key, good)).await;
            }
            Missing => {
                self.calm.store().delete(&Key::new(key)).await.unwrap();
                return good;
            }
        }
        assert_ne!(bad, good, "{key}: {damage:?} changed nothing");
        self.memory.overwrite(key, bad);
        good
    }

    /// Stores something else in the place of an object, as whoever stores objects here would, and returns its bytes.
    pub(super) async fn stored_instead(
        &self,
        key: &str,
        change: impl Fn(&[u8]) -> Vec<u8>,
    ) -> Vec<u8> {
        let (store, key) = (self.calm.store(), Key::new(key));
        let plain = store.read(&key, None).await.unwrap().bytes;
        let plain = plain.try_collect::<Vec<_>>().await.unwrap().concat();
        store.delete(&key).await.unwrap();
        store.create(&key, change(&plain).into()).await.unwrap();
        self.memory.bytes(key.as_str()).unwrap().to_vec()
    }
}

/// The object as another cluster of the same name would have stored it under the same key, all checksums right.
fn of_another_cluster(key: &str, good: &[u8]) -> Vec<u8> {
    let head = &good[..good.len().min(usize::try_from(HEADER_PROBE_BYTES).unwrap())];
    if let Ok((mut header, body)) = parse_header(head, good.len() as u64) {
        header.system_identifier = SystemId(7);
        let mut bad = encode_header_padded(&header, body).unwrap();
        bad.truncate(body);
        bad.extend_from_slice(&good[body..]);
        return bad;
    }
    let other = || "other".parse().unwrap();
    if key.ends_with("/committed.json") {
        return Committed { cluster: other(), ..Committed::parse(good).unwrap() }
            .to_json()
            .unwrap();
    }
    if key.contains("/identity/") {
        return Identity { cluster: other(), ..Identity::parse(good).unwrap() }.to_json().unwrap();
    }
    if key.contains("/gap/") {
        return WalGap { system_identifier: SystemId(7), ..WalGap::parse(good).unwrap() }
            .to_json()
            .unwrap();
    }
    // These name no cluster, only a backup.
    let id = super::archive::id(77);
    if key.ends_with("/begun.json") {
        return Begun { id, ..Begun::parse(good).unwrap() }.to_json().unwrap();
    }
    if key.contains("/drill/") {
        return Drill { id, ..Drill::parse(good).unwrap() }.to_json().unwrap();
    }
    Pin { backup: id, ..Pin::parse(good).unwrap() }.to_json().unwrap()
}

fn of_newer_format(good: &[u8]) -> Vec<u8> {
    let newer = ENCRYPTED_IDENTITY_VERSION + 1;
    let head = &good[..good.len().min(usize::try_from(HEADER_PROBE_BYTES).unwrap())];
    if let Ok((mut header, body)) = parse_header(head, good.len() as u64) {
        header.format = newer;
        let mut bad = encode_header_padded(&header, body).unwrap();
        bad.truncate(body);
        bad.extend_from_slice(&good[body..]);
        return bad;
    }
    let text = std::str::from_utf8(good).unwrap();
    let newer = format!("\"format\": {newer}");
    let text = text.replacen("\"format\": 1", &newer, 1).replacen("\"format\": 2", &newer, 1);
    text.into_bytes()
}

#[tokio::test]
async fn nothing_damaged_is_handed_to_recovery() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    for number in [2, 3] {
        let (name, bytes) = archive.segment(number);
        archive.push(&name, &bytes).await.unwrap();
    }
    let (_, joined) = archive.segment(6);
    archive.put_pieces(6, &joined, &[0, 1 << 19, 1 << 20]).await;
    for n in [2, 3] {
        let history = "1\t0/300000\treason\n";
        archive.push(&format!("0000000{n}.history"), history.as_bytes()).await.unwrap();
    }
    let segment = |number| archive.segment(number).0;
    let key_of = |part: &str| archive.keys_below(part).into_iter().next().unwrap();
    let pieces = archive.keys_below(".parts/");
    let cases = [
        (segment(2), key_of(&segment(2)), key_of(&segment(3))),
        (segment(6), pieces[0].clone(), pieces[1].clone()),
        ("00000002.history".to_owned(), key_of("00000002.history"), key_of("00000003.history")),
    ];
    for (name, key, sibling) in cases {
        let expected = archive.get(&name).await.1.unwrap();
        for damage in all_damage() {
            let good = archive.damage(&key, &sibling, damage).await;
            let (outcome, handed_out) = archive.get(&name).await;
            archive.memory.overwrite(&key, good);
            let kind = outcome.as_ref().map_err(|failure| failure.kind).err();
            let wanted = match damage {
                Missing => Kind::Absent,
                NewerFormat => Kind::Usage,
                _ => Kind::Integrity,
            };
            // A few bits of a zstd frame's descriptor mean nothing: the same bytes come out.
            let same = matches!(damage, BitFlipped(_)) && handed_out.as_ref() == Some(&expected);
            assert!(kind == Some(wanted) || same, "{key}: {damage:?} gave {kind:?}");
            assert!(kind.is_none() || handed_out.is_none(), "{key}: {damage:?} was handed out");
        }
    }
}

fn kind_of<T>(outcome: &Result<T, Failure>) -> Option<Kind> {
    outcome.as_ref().err().map(|failure| failure.kind)
}

#[tokio::test]
async fn no_damaged_backup_is_restored_as_if_it_were_whole() {
    let (archive, [id, other]) = Archive::with_backups().await;
    let own = |what: &str| format!("main/backup/{id}/{what}");
    let others = |what: &str| format!("main/backup/{other}/{what}");
    let identity = archive.calm.place().identity(SYSTEM);
    let ancestor = archive.calm.place().identity(super::archive::ANCESTOR);
    let cases = [
        (own("pack/00000000"), others("pack/00000000"), Kind::Integrity),
        (own("files"), others("files"), Kind::Integrity),
        // Without this document there is no backup of that name.
        (own("committed.json"), others("committed.json"), Kind::Absent),
        (identity, ancestor, Kind::Integrity),
    ];
    for (key, sibling, missing) in cases {
        let is_pack = key.contains("/pack/");
        for damage in all_damage() {
            // A pack's header is padded to a fixed length, which the rewritten one is not; and
            // without its identity the place is its ancestor's.
            if (damage == NewerFormat && is_pack)
                || (damage == Missing && key.contains("/identity/"))
            {
                continue;
            }
            let good = archive.damage(&key, &sibling, damage).await;
            let outcome = archive.restore(&id).await;
            archive.memory.overwrite(&key, good);
            let kind = kind_of(&outcome);
            let same = outcome.is_ok_and(|files| files == contents(1));
            let fits = match damage {
                Missing => kind == Some(missing),
                NewerFormat => kind == Some(Kind::Usage),
                // The version's own digit may be what flipped.
                BitFlipped(_) => matches!(kind, Some(Kind::Integrity | Kind::Usage)) || same,
                _ => kind == Some(Kind::Integrity),
            };
            assert!(fits, "{key}: {damage:?} gave {kind:?}");
        }
    }
}

#[tokio::test]
async fn damage_in_what_a_restore_does_not_need_does_not_stop_it() {
    let (archive, [id, other]) = Archive::with_backups().await;
    let keys = [
        format!("main/backup/{id}/begun.json"),
        format!("main/backup/{other}/committed.json"),
        format!("main/backup/{other}/files"),
    ];
    for key in keys {
        for damage in [Truncated, Zeroed, BitFlipped(20), Missing, NewerFormat] {
            let good = archive.damage(&key, &key, damage).await;
            let outcome = archive.restore(&id).await;
            archive.memory.overwrite(&key, good);
            assert_eq!(kind_of(&outcome), None, "{key}: {damage:?}");
            assert_eq!(outcome.unwrap(), contents(1), "{key}: {damage:?}");
        }
    }
}

#[tokio::test]
async fn a_backup_that_cannot_be_read_is_left_out_and_shown_and_stands_in_nobodys_way() {
    let (archive, [old, new]) = Archive::with_backups().await;
    let key = archive.calm.place().committed(&new);
    for damage in [Truncated, Zeroed, BitFlipped(20), NewerFormat, SwappedWithASibling] {
        let good = archive.damage(&key, &archive.calm.place().committed(&old), damage).await;
        let restored = archive.restore_with(None, RecoveryPoint::Latest).await;
        let before = RecoveryPoint::Lsn(archive.size.start_of(2));
        let too_early = archive.restore_with(None, before).await;
        let named = archive.restore(&new).await;
        let report =
            info::run(&archive.repository, &crate::plan::retention::Policy::nothing_set()).await;
        let listed = archive.repository.committed_backups(SYSTEM).await;
        archive.memory.overwrite(&key, good);

        let (plan, files) = restored.unwrap();
        assert_eq!((plan.backup, files), (old.clone(), contents(1)), "{damage:?}");
        let left_out: Vec<_> = plan.damaged_backups.iter().map(|left| &left.backup).collect();
        assert_eq!(left_out, [&new], "{damage:?}");
        let failure = too_early.unwrap_err();
        assert_eq!(failure.kind, Kind::Integrity, "{damage:?}");
        assert!(failure.next.contains(new.as_str()), "{damage:?}: {}", failure.next);
        let wanted = if damage == NewerFormat { Kind::Usage } else { Kind::Integrity };
        assert_eq!(kind_of(&named), Some(wanted), "{damage:?}");

        let report = report.unwrap();
        let whole: Vec<_> = report.backups.iter().map(|backup| &backup.id).collect();
        assert_eq!(whole, [&old], "{damage:?}");
        assert!(report.backups[0].usable && report.recovery_window.is_some(), "{damage:?}");
        assert_eq!(report.damaged_backups.len(), 1, "{damage:?}");
        assert_eq!(report.damaged_backups[0].id, new, "{damage:?}");
        assert!(report.damaged_backups[0].why.contains("committed.json"), "{damage:?}");
        let listed = listed.unwrap();
        assert_eq!((listed.readable.len(), listed.unreadable.len()), (1, 1), "{damage:?}");
        assert_eq!(listed.unreadable[0].is_newer, damage == NewerFormat);
    }
}

#[tokio::test]
async fn where_only_unreadable_backups_are_left_absence_is_not_claimed() {
    let (archive, ids) = Archive::with_backups().await;
    for id in &ids {
        let key = archive.calm.place().committed(id);
        archive.damage(&key, &key, Zeroed).await;
    }
    let failure = archive.restore_with(None, RecoveryPoint::Latest).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Integrity, "{failure}");
    for id in &ids {
        assert!(failure.next.contains(id.as_str()), "{}", failure.next);
    }
    let report = info::run(&archive.repository, &crate::plan::retention::Policy::nothing_set())
        .await
        .unwrap();
    assert_eq!((report.backups.len(), report.damaged_backups.len()), (0, 2));
}

#[tokio::test]
async fn a_store_that_fails_is_never_taken_for_a_damaged_backup() {
    let (archive, [_, new]) = Archive::with_backups().await;
    let key = archive.calm.place().committed(&new);
    archive.faults.inject(Fault::on(Call::Read).key_contains(&*key).for_ever());
    let failure = archive.restore_with(None, RecoveryPoint::Latest).await.unwrap_err();
    assert_eq!(failure.kind, Kind::Store, "{failure}");
    assert_eq!(
        info::run(&archive.repository, &crate::plan::retention::Policy::nothing_set())
            .await
            .unwrap_err()
            .kind,
        Kind::Store
    );
}

#[tokio::test]
async fn a_flipped_bit_in_a_document_is_always_noticed() {
    let (archive, [id, _]) = Archive::with_backups().await;
    let key = archive.calm.place().committed(&id);
    let good = archive.memory.bytes(&key).unwrap();
    for at in 0..good.len() {
        let mut bad = good.to_vec();
        bad[at] ^= 1;
        archive.memory.overwrite(&key, bad);
        assert!(archive.calm.committed(&id).await.is_err(), "byte {at}");
    }
}
