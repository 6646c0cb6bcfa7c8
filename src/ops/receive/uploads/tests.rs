//! What is on its way is counted until it is stored, or has failed.

use std::sync::Arc;

use super::*;
use crate::format::Codec;
use crate::pg::Timeline;
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::plan::receive::{MERGE_COUNT, Merges};
use crate::repo::SegmentAssembly;
use crate::store::faults::{Fault, FaultStore};
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

/// The Nth call fails, or it and the next two: before its effect, or after it.
fn faults_at(n: u64, mode: u32) -> Vec<Fault> {
    let fault = |n| Fault::anywhere().nth(n);
    let after = |n| fault(n).after_effect();
    match mode {
        0 => vec![fault(n)],
        1 => vec![after(n)],
        2 => (n..n + 3).map(fault).collect(),
        _ => (n..n + 3).map(after).collect(),
    }
}

#[tokio::test]
async fn what_counts_as_stored_is_stored_whatever_fails_and_all_is_stored_in_the_end() {
    for mode in 0..4 {
        for n in 1.. {
            let memory = MemoryStore::new();
            let faults = FaultStore::new(Arc::new(memory.clone()));
            let place = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
            let (mut assembly, pieces) = received(&place, 700);
            for fault in faults_at(n, mode) {
                faults.inject(fault);
            }
            let mut uploads = Uploads::new(&place, SYSTEM, size());
            let mut keys: Vec<(Lsn, Lsn, String)> = Vec::new();
            let key_of = |piece: &SealedPiece| {
                (piece.start_lsn, piece.end_lsn, piece.key.as_str().to_owned())
            };
            for piece in &pieces[..3] {
                keys.push(key_of(piece));
                uploads.put_piece(segment(), piece.clone());
            }
            uploads.put_unit(segment(), unit_of(&mut assembly));
            let mut told = 0;
            while !uploads.is_empty() {
                match uploads.next().await.unwrap() {
                    Settled::Sealed(piece) => keys.push(key_of(&piece)),
                    Settled::Stored(stored) => {
                        told += 1;
                        let is_it = |one: &&(Lsn, Lsn, String)| {
                            (one.0, one.1) == (stored.start_lsn, stored.end_lsn)
                        };
                        let (_, _, key) = keys.iter().find(is_it).unwrap();
                        assert!(memory.bytes(key).is_some(), "call {n}: `{key}` was told");
                    }
                    Settled::Tidied => {}
                }
            }
            assert_eq!((told, memory.keys().len()), (4, 4), "call {n}");
            // What is left over after a failure is left to retention, and the whole segment stays.
            uploads.tidy(segment());
            assert!(matches!(uploads.next().await.unwrap(), Settled::Tidied));
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            place.drop_redundant_pieces(SYSTEM, segment(), size()).await.unwrap();
            assert_eq!(memory.keys(), [keys[3].2.clone()], "call {n}");
            if !struck {
                assert!(n > 6, "the fault never struck");
                break;
            }
        }
    }
}

#[tokio::test]
async fn pieces_are_waited_for_only_until_their_unit_is_stored_and_kept_only_until_the_next_is() {
    let memory = MemoryStore::new();
    let faults = FaultStore::new(Arc::new(memory.clone()));
    let place = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
    let (mut assembly, pieces) = received(&place, 700);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    faults.inject(Fault::anywhere().key_contains(".parts/").for_ever());
    for piece in &pieces[..2] {
        uploads.put_piece(segment(), piece.clone());
    }
    uploads.put_unit(segment(), unit_of(&mut assembly));
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    assert_eq!(memory.keys().len(), 1, "the unit alone is stored");
    assert_eq!(uploads.pieces(), 0, "they are in nobody's way");
    assert!(uploads.has_piece_of(segment()), "tidying now would miss what arrives yet");
    let next = SegmentName::new(Timeline(1), 3, size());
    let stored = Stored {
        purpose: Purpose::Unit,
        segment: next,
        start_lsn: Lsn(3 << 20),
        end_lsn: Lsn(4 << 20),
        object_bytes: 0,
    };
    uploads.unit_bytes += 1;
    uploads.forget(&stored);
    assert!(!uploads.has_piece_of(segment()), "given up");
    assert!(matches!(uploads.next().await.unwrap(), Settled::Tidied));
    assert!(uploads.is_empty());
}

#[tokio::test]
async fn a_segment_of_somebody_else_over_acknowledged_pieces_is_said_with_both_names() {
    for has_pieces in [true, false] {
        let memory = MemoryStore::new();
        let place = repository(&memory);
        let mut uploads = Uploads::new(&place, SYSTEM, size());
        uploads.put_unit(segment(), unit_of(&mut received(&place, 900).0));
        while !uploads.is_empty() {
            uploads.next().await.unwrap();
        }
        let theirs = memory.keys().remove(0);
        let (mut assembly, pieces) = received(&place, 700);
        if has_pieces {
            uploads.put_piece(segment(), pieces[0].clone());
            assert!(matches!(uploads.next().await.unwrap(), Settled::Stored(_)));
        }
        uploads.put_unit(segment(), unit_of(&mut assembly));
        assert!(matches!(uploads.next().await.unwrap(), Settled::Sealed(_)));
        let failure = uploads.next().await.err().unwrap();
        assert_eq!(failure.kind, Kind::Conflict);
        if has_pieces {
            let stem = pieces[0].key.as_str().rsplit_once('/').unwrap().0;
            assert!(failure.unharmed.contains(stem) && failure.unharmed.contains(&theirs));
            assert!(failure.next.contains(&theirs), "{}", failure.next);
        } else {
            assert_eq!(failure.unharmed, UNHARMED);
        }
    }
}
