//! What is deleted lies in something larger that was read back; nothing else ever goes.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::format::Codec;
use crate::pg::{Timeline, WalFileName};
use crate::repo::{PIECE_BYTES, WalSealer};
use crate::store::Store;
use crate::store::faults::{Call, Fault, FaultStore, Symptom};
use crate::store::memory::MemoryStore;

const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);
const MIB: u32 = 1 << 20;

struct Place {
    memory: MemoryStore,
    faults: FaultStore,
    repository: Repository,
    segment: SegmentName,
    size: SegmentSize,
}

impl Place {
    fn new(segment_bytes: u32) -> Self {
        let memory = MemoryStore::new();
        let faults = FaultStore::new(Arc::new(memory.clone()));
        let repository = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
        let size = SegmentSize::new(segment_bytes).unwrap();
        let segment = SegmentName::new(Timeline(1), 2, size);
        Self { memory, faults, repository, segment, size }
    }

    fn piece(&self, start: u32, end: u32) -> WalObject {
        WalObject::Piece { segment: self.segment, start, end }
    }

    async fn put(&self, object: WalObject, plain_bytes: usize) {
        let key = self.repository.wal_key(SYSTEM, object);
        let kind = match object {
            WalObject::Piece { .. } => Kind::Piece,
            _ => Kind::Segment,
        };
        let codec = Codec::DEFAULT;
        let header = Header::new(kind, self.repository.below(&key), SYSTEM, codec.packing());
        let mut sealer = WalSealer::new(codec, None).unwrap();
        sealer.push(&vec![0; plain_bytes]).unwrap();
        let sealed = sealer.finish(header).unwrap();
        self.repository.put_sealed(&key, &sealed).await.unwrap();
    }

    async fn put_pieces(&self, pieces: &[(u32, u32)]) {
        for &(start, end) in pieces {
            self.put(self.piece(start, end), (end - start) as usize).await;
        }
    }

    async fn put_whole(&self) {
        let whole = WalObject::File(WalFileName::Segment(self.segment));
        self.put(whole, u32::from(self.size) as usize).await;
    }

    async fn left(&self) -> Vec<(u32, u32)> {
        let pieces = self.repository.pieces(SYSTEM, self.segment).await.unwrap();
        pieces.into_iter().map(|piece| (piece.start, piece.end)).collect()
    }

    async fn drop_redundant(&self) -> Result<u64, RepoError> {
        let (place, none) = (&self.repository, BTreeSet::new());
        let tidied = place.drop_redundant_pieces(SYSTEM, self.segment, self.size, &none).await?;
        assert_eq!(tidied.rival, None);
        Ok(tidied.dropped)
    }

    async fn drop_inside(&self, start: u32, end: u32) -> Result<u64, RepoError> {
        let own = self.left().await.into_iter().collect();
        self.repository.drop_pieces_inside(SYSTEM, self.segment, (start, end), own).await
    }
}

#[tokio::test]
async fn pieces_go_only_once_the_whole_segment_stands() {
    let place = Place::new(MIB);
    let pieces = [(0, 100), (0, MIB), (100, 300)];
    place.put_pieces(&pieces).await;
    assert_eq!(place.drop_redundant().await.unwrap(), 0);
    assert_eq!(place.left().await, pieces);
    place.put_whole().await;
    assert_eq!(place.drop_redundant().await.unwrap(), 3);
    assert_eq!(place.drop_redundant().await.unwrap(), 0, "may be repeated");
    assert_eq!(place.memory.keys().len(), 1, "the whole segment stands");
}

#[tokio::test]
async fn of_a_large_segment_units_stay_and_only_what_lies_in_one_goes() {
    let place = Place::new(64 * MIB);
    let unit = PIECE_BYTES;
    let inside_first = [(0, 100), (100, unit)];
    // The second unit is not there; a piece across the border of two units lies in neither.
    let others = [(unit - 50, unit + 50), (unit, unit + 100), (unit + 100, 2 * unit)];
    let units = [(0, unit), (2 * unit, 3 * unit)];
    place.put_pieces(&inside_first).await;
    place.put_pieces(&others).await;
    place.put_pieces(&units).await;
    assert_eq!(place.drop_redundant().await.unwrap(), 2);
    let mut expected = [others.as_slice(), &units].concat();
    expected.sort_unstable();
    assert_eq!(place.left().await, expected);
}

#[tokio::test]
async fn what_a_merged_piece_holds_goes_once_it_was_read_back() {
    let place = Place::new(MIB);
    place.put_pieces(&[(0, 100), (100, 200), (150, 250), (200, 300)]).await;
    assert!(place.drop_inside(0, 250).await.unwrap_err().is_absent(), "no such piece is stored");
    assert_eq!(place.left().await.len(), 4);
    place.put_pieces(&[(0, 250)]).await;
    assert_eq!(place.drop_inside(0, 250).await.unwrap(), 3);
    assert_eq!(place.left().await, [(0, 250), (200, 300)]);
    assert_eq!(place.drop_inside(0, 250).await.unwrap(), 0, "never itself");
}

#[tokio::test]
async fn nothing_goes_on_account_of_an_object_that_cannot_be_believed() {
    let place = Place::new(MIB);
    place.put_pieces(&[(0, 100)]).await;
    let whole = WalObject::File(WalFileName::Segment(place.segment));
    place.put(whole, 5).await;
    assert!(matches!(place.drop_redundant().await, Err(RepoError::Damaged { .. })));
    place.put(place.piece(0, 200), 100).await;
    assert!(matches!(place.drop_inside(0, 200).await, Err(RepoError::Damaged { .. })));
    let key = place.repository.wal_key(SYSTEM, whole);
    place.memory.overwrite(key.as_str(), "not an object of ours");
    assert!(matches!(place.drop_redundant().await, Err(RepoError::Damaged { .. })));
    assert_eq!(place.left().await, [(0, 100), (0, 200)]);
}

#[tokio::test]
async fn a_store_that_allows_no_delete_is_told_from_one_that_fails() {
    let place = Place::new(MIB);
    place.put_pieces(&[(0, 100), (100, 200)]).await;
    place.put_whole().await;
    place.faults.inject(Fault::on(Call::Delete).symptom(Symptom::Denied).for_ever());
    assert!(place.drop_redundant().await.unwrap_err().is_not_allowed());
    place.faults.heal();
    place.faults.inject(Fault::on(Call::Delete).nth(2).after_effect());
    let error = place.drop_redundant().await.unwrap_err();
    assert!(!error.is_not_allowed(), "{error}");
    place.faults.heal();
    place.drop_redundant().await.unwrap();
    assert_eq!(place.left().await, []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_stored_byte_loses_its_last_object(
        mut pieces in proptest::collection::vec((0u32..40, 1u32..20), 1..12),
        merged in 0usize..12,
    ) {
        for piece in &mut pieces {
            piece.1 += piece.0;
        }
        pieces.sort_unstable();
        pieces.dedup();
        let (start, end) = pieces[merged % pieces.len()];
        let covered = |pieces: &[(u32, u32)]| {
            (0..64).map(|byte| pieces.iter().any(|(s, e)| (*s..*e).contains(&byte))).collect::<Vec<_>>()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let left = runtime.block_on(async {
            let place = Place::new(MIB);
            place.put_pieces(&pieces).await;
            place.drop_inside(start, end).await.unwrap();
            place.left().await
        });
        prop_assert_eq!(covered(&left), covered(&pieces));
        prop_assert!(left.contains(&(start, end)));
        let gone = pieces.iter().filter(|piece| !left.contains(piece));
        for (s, e) in gone {
            prop_assert!(start <= *s && *e <= end);
        }
    }
}

impl Place {
    /// Puts a piece of these bytes: other WAL than the zeros of [`Self::put`].
    async fn put_other(&self, (start, end): (u32, u32)) {
        let key = self.repository.wal_key(SYSTEM, self.piece(start, end));
        let codec = Codec::DEFAULT;
        let header = Header::new(Kind::Piece, self.repository.below(&key), SYSTEM, codec.packing());
        let mut sealer = WalSealer::new(codec, None).unwrap();
        sealer.push(&vec![7; (end - start) as usize]).unwrap();
        self.repository.put_sealed(&key, &sealer.finish(header).unwrap()).await.unwrap();
    }
}

#[tokio::test]
async fn anothers_piece_goes_only_if_it_holds_the_same_and_the_callers_own_without_a_look() {
    let unit = PIECE_BYTES;
    for size in [MIB, 64 * MIB] {
        let place = Place::new(size);
        let own = [(0, 100), (100, 200)];
        place.put_pieces(&own).await;
        place.put_pieces(&[(0, 150)]).await;
        place.put_other((120, 220)).await;
        let is_large = size > unit;
        if is_large {
            place.put_pieces(&[(0, unit)]).await;
        } else {
            place.put_whole().await;
        }
        let own = BTreeSet::from(own);
        let drop =
            || place.repository.drop_redundant_pieces(SYSTEM, place.segment, place.size, &own);
        let tidied = drop().await.unwrap();
        let rival = tidied.rival.unwrap();
        let theirs = place.repository.wal_key(SYSTEM, place.piece(120, 220));
        assert_eq!((tidied.dropped, rival.piece), (2, theirs.clone()));
        assert!(place.memory.bytes(theirs.as_str()).is_some(), "what differs is never deleted");
        assert!(!place.left().await.iter().any(|at| own.contains(at)));

        // Alone, what is the same goes.
        place.repository.store().delete(&theirs).await.unwrap();
        place.put_pieces(&[(300, 400)]).await;
        let tidied = drop().await.unwrap();
        assert_eq!((tidied.dropped, tidied.rival), (2, None));
        assert_eq!(place.left().await, if is_large { vec![(0, unit)] } else { vec![] });
    }
}

#[tokio::test]
async fn a_merged_piece_takes_only_those_it_was_made_of() {
    let place = Place::new(MIB);
    place.put_pieces(&[(0, 100), (100, 200), (0, 200)]).await;
    place.put_other((50, 150)).await;
    let own = BTreeSet::from([(0, 100), (100, 200)]);
    let dropped = place.repository.drop_pieces_inside(SYSTEM, place.segment, (0, 200), own);
    assert_eq!(dropped.await.unwrap(), 2);
    assert_eq!(place.left().await, [(0, 200), (50, 150)]);
}

/// Their own receiver removes them meanwhile; the listing is then repeated.
#[tokio::test]
async fn pieces_that_go_away_while_they_are_compared_hide_no_other_wal() {
    let place = Place::new(MIB);
    place.put_pieces(&[(0, 100), (100, 110)]).await;
    place.put_other((120, 220)).await;
    place.put_whole().await;
    let going = place.repository.wal_key(SYSTEM, place.piece(0, 100));
    let memory = place.memory.clone();
    let hook = move |_, key: &Key| drop(memory.delete(key).now_or_never());
    let slow = Symptom::Slow(Duration::ZERO);
    let fault = Fault::on(Call::Read).key_contains(going.as_str()).symptom(slow);
    place.faults.inject(fault.hook(hook));
    let found = place.repository.compare_pieces(SYSTEM, place.segment, place.size).await.unwrap();
    let theirs = place.repository.wal_key(SYSTEM, place.piece(120, 220));
    assert_eq!(found.rival.unwrap().piece, theirs);
    assert!(place.memory.bytes(going.as_str()).is_none(), "it went away");
}
