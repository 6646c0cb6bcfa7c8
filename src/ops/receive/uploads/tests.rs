//! What is on its way is counted until it is stored, or has failed.

use std::sync::Arc;

use super::*;
use crate::format::Codec;
use crate::pg::Timeline;
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::plan::receive::{MERGE_COUNT, Merges};
use crate::repo::SegmentAssembly;
use crate::store::memory::MemoryStore;

const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn segment() -> SegmentName {
    SegmentName::new(Timeline(1), 2, size())
}

/// A complete segment in the hands of a receiver, cut after every kilobyte of its first half.
fn received(repository: &Repository, filler: usize) -> (SegmentAssembly, Vec<SealedPiece>) {
    let mut builder = WalBuilder::new(Timeline(1), 2, size(), SYSTEM);
    while builder.lsn() < Lsn(3 << 20) {
        builder.add(&RecordSpec::filler(filler));
    }
    let bytes = builder.into_segments().swap_remove(0);
    let (codec, half) = (Codec::DEFAULT, bytes.len() / 2);
    let begun = SegmentAssembly::begin(repository, SYSTEM, segment(), size(), codec, None, None);
    let mut assembly = begun.unwrap();
    let mut pieces = Vec::new();
    for block in bytes[..half].chunks(1024) {
        assembly.push(block, &mut |_| {}).unwrap();
        pieces.extend(assembly.cut().unwrap());
    }
    assembly.push(&bytes[half..], &mut |_| {}).unwrap();
    (assembly, pieces)
}

fn repository(memory: &MemoryStore) -> Repository {
    Repository::new(Arc::new(memory.clone()), "main".parse().unwrap())
}

fn unit_of(assembly: &mut SegmentAssembly) -> Unsealed {
    assembly.take_units().remove(0)
}

#[tokio::test]
async fn a_unit_counts_with_what_is_made_of_it_until_it_is_sealed_then_as_it_is_until_it_is_stored()
{
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let (mut assembly, _) = received(&place, 700);
    let held_before = assembly.held_bytes();
    let unit = unit_of(&mut assembly);
    let promised = unit.held_bytes();
    assert!(promised > held_before - assembly.held_bytes(), "sealing takes room as well");
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    uploads.put_unit(segment(), unit);
    assert_eq!(uploads.held_bytes(), promised);
    assert!(!uploads.is_settled());

    let Settled::Sealed(piece) = uploads.next().await.unwrap() else { unreachable!() };
    let stored_bytes = piece.sealed.header.stored_bytes;
    assert_eq!(uploads.held_bytes(), stored_bytes);
    assert!(!uploads.is_settled(), "sealed is not stored");

    let Settled::Stored(stored) = uploads.next().await.unwrap() else { unreachable!() };
    assert_eq!((stored.purpose, stored.object_bytes), (Purpose::Unit, stored_bytes));
    assert_eq!((stored.start_lsn, stored.end_lsn), (Lsn(2 << 20), Lsn(3 << 20)));
    assert_eq!(uploads.held_bytes(), 0);
    assert!(uploads.is_settled() && uploads.is_empty());
    assert!(memory.bytes(piece.key.as_str()).is_some());
}

#[tokio::test]
async fn merged_pieces_are_one_object_first_and_gone_then() {
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let (mut assembly, pieces) = received(&place, 700);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    let mut merges = Merges::default();
    for (n, piece) in (0u32..).zip(&pieces[..MERGE_COUNT]) {
        uploads.put_piece(segment(), piece.clone());
        merges.store(n * 1024, (n + 1) * 1024);
    }
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    assert_eq!(memory.keys().len(), MERGE_COUNT);
    let merge = merges.next_merge().unwrap();
    uploads.put_merge(segment(), merge, assembly.to_merge(merge.start, merge.end).unwrap());
    assert!(uploads.is_tidying() && uploads.is_settled());
    let Settled::Sealed(piece) = uploads.next().await.unwrap() else { unreachable!() };
    assert_eq!(memory.keys().len(), MERGE_COUNT, "sealing stores nothing");
    assert!(uploads.is_tidying());
    assert!(matches!(uploads.next().await.unwrap(), Settled::Stored(_)));
    assert!(!uploads.is_tidying());
    assert_eq!(memory.keys(), [piece.key.as_str()]);
}

#[tokio::test]
async fn what_was_refused_is_waited_for_no_longer() {
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    uploads.put_unit(segment(), unit_of(&mut received(&place, 700).0));
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    // Another server's segment of the same name.
    uploads.put_unit(segment(), unit_of(&mut received(&place, 900).0));
    assert!(matches!(uploads.next().await.unwrap(), Settled::Sealed(_)));
    let failure = uploads.next().await.err().unwrap();
    assert_eq!(failure.kind, Kind::Conflict);
    assert!(uploads.is_settled(), "else whoever drains would wait for ever");
}
