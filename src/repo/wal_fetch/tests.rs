//! A segment that is fetched while others tidy it up, and pieces that do not fit together.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::format::{Codec, FORMAT_VERSION, Identity};
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::pg::{Lsn, PgTimestamp, Timeline};
use crate::repo::{SealedPiece, SegmentAssembly};
use crate::store::Store;
use crate::store::faults::{Fault, FaultStore, Symptom};
use crate::store::memory::MemoryStore;

const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);
const MIB: usize = 1 << 20;

fn pieces_of(ranges: &[(u32, u32)]) -> Vec<ListedPiece> {
    ranges.iter().map(|&(start, end)| ListedPiece { start, end, size_bytes: 1 }).collect()
}

fn ranges_of(chain: &[ListedPiece]) -> Vec<(u32, u32)> {
    chain.iter().map(|piece| (piece.start, piece.end)).collect()
}

#[test]
fn pieces_are_joined_only_where_they_are_unbroken() {
    let chain = |ranges: &[(u32, u32)], at| ranges_of(&unbroken_pieces(&pieces_of(ranges), at));
    assert_eq!(chain(&[], 0), []);
    assert_eq!(chain(&[(8, 16)], 0), [], "no start");
    assert_eq!(chain(&[(0, 8), (8, 16), (24, 32)], 0), [(0, 8), (8, 16)]);
    assert_eq!(chain(&[(0, 4), (0, 12), (4, 8), (8, 20)], 0), [(0, 12), (8, 20)]);
    assert_eq!(chain(&[(0, 4), (0, 12), (4, 8), (8, 20)], 13), [(8, 20)]);
}

proptest! {
    /// A byte is in the chain exactly if every byte up to it is in some piece.
    #[test]
    fn the_chain_covers_exactly_the_unbroken_bytes(
        mut pieces in proptest::collection::vec((0u32..24, 1u32..8), 0..10),
        from in 0u32..20,
    ) {
        for piece in &mut pieces {
            piece.1 += piece.0;
        }
        pieces.sort_unstable();
        let stored = |byte: u32| pieces.iter().any(|(start, end)| (*start..*end).contains(&byte));
        let unbroken = (from..60).find(|byte| !stored(*byte)).unwrap_or(60);
        let chain = ranges_of(&unbroken_pieces(&pieces_of(&pieces), from));
        prop_assert_eq!(chain.last().map_or(from, |piece| piece.1), unbroken);
        let mut at = from;
        for piece in &chain {
            prop_assert!(pieces.contains(piece));
            prop_assert!(piece.0 <= at && at < piece.1, "each carries on: {:?}", chain);
            at = piece.1;
        }
    }
}

#[test]
fn what_is_read_at_a_time_is_bounded_by_number_and_bytes() {
    let piece = |size_bytes| ListedPiece { start: 0, end: 1, size_bytes };
    assert_eq!(in_flight(&[piece(100); 50]), PIECES_IN_FLIGHT);
    assert_eq!(in_flight(&[piece(6 << 20); 5]), 2);
    assert_eq!(in_flight(&[piece(60 << 20); 5]), 1);
}

/// Lets somebody else act right before the call of the given number.
fn before_call(faults: &FaultStore, number: usize, act: impl Fn() + Send + Sync + 'static) {
    let no_delay = Symptom::Slow(Duration::ZERO);
    let fault = Fault::anywhere().nth(number as u64).symptom(no_delay);
    faults.inject(fault.hook(move |_, _| act()));
}

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn segment() -> SegmentName {
    SegmentName::new(Timeline(1), 2, size())
}

/// A full segment; `flavour` tells two servers apart.
fn wal(flavour: u32) -> Vec<u8> {
    let mut builder = WalBuilder::new(Timeline(1), 2, size(), SYSTEM);
    while builder.lsn() < Lsn(3 << 20) {
        builder.add(&RecordSpec::filler(3000 + 100 * flavour as usize));
        builder.add(&RecordSpec::commit(700 + flavour, PgTimestamp(1)));
    }
    builder.into_segments().swap_remove(0)
}

fn calm(memory: &MemoryStore) -> Repository {
    Repository::new(Arc::new(memory.clone()), "main".parse().unwrap())
}

/// Seals the stretches of a segment; the last result is the whole one, if `bytes` are.
fn sealed(bytes: &[u8], cuts: &[u32]) -> (Vec<SealedPiece>, Vec<SealedPiece>) {
    let place = calm(&MemoryStore::new());
    let codec = Codec::DEFAULT;
    let begun = SegmentAssembly::begin(&place, SYSTEM, segment(), size(), codec, None, None);
    let mut assembly = begun.unwrap();
    let mut pieces = Vec::new();
    let mut at = 0;
    for &cut in cuts {
        assembly.push(&bytes[at..cut as usize], &mut |_| {}).unwrap();
        pieces.extend(assembly.cut().unwrap());
        at = cut as usize;
    }
    assembly.push(&bytes[at..], &mut |_| {}).unwrap();
    let units = assembly.take_units().into_iter().map(|unit| unit.seal().unwrap());
    (pieces, units.collect())
}

/// Stores pieces at once: what a test's own hand does is not interrupted.
fn put(memory: &MemoryStore, pieces: &[SealedPiece]) {
    for piece in pieces {
        let mut bytes = crate::format::encode_header(&piece.sealed.header).unwrap();
        bytes.extend(piece.sealed.body.pieces().iter().flatten());
        memory.overwrite(piece.key.as_str(), bytes);
    }
}

fn delete(memory: &MemoryStore, pieces: &[SealedPiece]) {
    for piece in pieces {
        let key = piece.key.clone();
        memory.delete(&key).now_or_never().unwrap().unwrap();
    }
}

/// A claimed place: the store below, what stands in between, and the repository on it.
async fn claimed() -> (MemoryStore, FaultStore, Repository) {
    let memory = MemoryStore::new();
    let faults = FaultStore::new(Arc::new(memory.clone()));
    let identity = Identity {
        format: FORMAT_VERSION,
        encryption: None,
        cluster: "main".parse().unwrap(),
        system_identifier: SYSTEM,
        segment_size: size(),
        postgres_major: 17,
        incarnation: 1,
        succeeds: None,
        claimed_at: PgTimestamp(0),
        claimed_by: "host".to_owned(),
        tool: "test".to_owned(),
    };
    calm(&memory).claim(&identity).await.unwrap();
    let repository = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
    (memory, faults, repository)
}

/// Puts the larger objects and deletes what they stand for.
fn tidy_up(
    memory: &MemoryStore,
    larger: &[SealedPiece],
    going: &[SealedPiece],
) -> impl Fn() + use<> {
    let (memory, larger, going) = (memory.clone(), larger.to_vec(), going.to_vec());
    move || {
        put(&memory, &larger);
        delete(&memory, &going);
    }
}

async fn fetched(repository: &Repository) -> (Result<Option<SegmentSource>, RepoError>, Vec<u8>) {
    let mut bytes = Vec::new();
    let sink = |block: &[u8]| {
        bytes.extend_from_slice(block);
        Ok(())
    };
    let outcome = repository.fetch_segment(SYSTEM, segment(), size(), sink).await;
    (outcome, bytes)
}

const CUTS: [u32; 10] =
    [9_000, 30_000, 31_000, 100_000, 250_000, 251_000, 400_000, 600_000, 800_000, 1 << 20];

#[tokio::test]
async fn a_segment_that_is_stored_whole_while_it_is_fetched_comes_back_whole() {
    let bytes = wal(1);
    let (pieces, whole) = sealed(&bytes, &CUTS);
    for number in 1.. {
        let (memory, faults, repository) = claimed().await;
        put(&memory, &pieces);
        before_call(&faults, number, tidy_up(&memory, &whole, &pieces));
        let (outcome, given) = fetched(&repository).await;
        assert!(outcome.unwrap().is_some(), "call {number}");
        assert!(given == bytes, "call {number}: {} bytes", given.len());
        if faults.calls().len() < number {
            assert!(number > 10, "it never happened");
            break;
        }
    }
}

#[tokio::test]
async fn an_unfinished_segment_that_is_merged_and_then_whole_never_comes_back_shorter() {
    let bytes = wal(1);
    let (pieces, whole) = sealed(&bytes, &CUTS);
    let end = CUTS[6] as usize;
    let (prefix, merged) = (&pieces[..7], sealed(&bytes, &[9_000, 250_000, 400_000]).0);
    for first in 1..16 {
        for second in first + 2..18 {
            let (memory, faults, repository) = claimed().await;
            put(&memory, prefix);
            let in_first = tidy_up(&memory, &merged[1..2], &pieces[1..5]);
            let in_second = tidy_up(&memory, &merged[2..3], &pieces[5..7]);
            let all = tidy_up(&memory, &whole, &[prefix, &merged].concat());
            before_call(&faults, first, in_first);
            before_call(&faults, first + 1, in_second);
            before_call(&faults, second, all);
            let (outcome, given) = fetched(&repository).await;
            let calls = format!("calls {first} and {second}");
            match outcome.unwrap().expect(&calls) {
                SegmentSource::Pieces { valid_bytes } => {
                    assert_eq!(valid_bytes, end as u64, "{calls}");
                    assert!(given[..end] == bytes[..end], "{calls}");
                    assert!(given[end..].iter().all(|byte| *byte == 0), "{calls}");
                }
                SegmentSource::Whole => assert!(given == bytes, "{calls}"),
                SegmentSource::Partial { .. } => unreachable!("{calls}"),
            }
            assert_eq!(given.len(), MIB, "{calls}");
        }
    }
}

#[tokio::test]
async fn a_piece_that_one_listing_missed_is_no_end_of_the_archive() {
    let bytes = wal(1);
    let (pieces, _) = sealed(&bytes, &CUTS);
    let (memory, faults, repository) = claimed().await;
    put(&memory, &pieces);
    // A listing of several pages, between which this piece was replaced by another.
    before_call(&faults, 2, tidy_up(&memory, &[], &pieces[3..4]));
    before_call(&faults, 3, tidy_up(&memory, &pieces[3..4], &[]));
    let (outcome, given) = fetched(&repository).await;
    assert_eq!(outcome.unwrap(), Some(SegmentSource::Pieces { valid_bytes: MIB as u64 }));
    assert!(given == bytes);
}

#[tokio::test]
async fn pieces_that_go_away_for_nothing_are_no_end_of_the_archive() {
    let bytes = wal(1);
    let pieces = sealed(&bytes, &CUTS).0;
    let mut struck = 0;
    for number in 1..16 {
        let (memory, faults, repository) = claimed().await;
        put(&memory, &pieces);
        before_call(&faults, number, tidy_up(&memory, &[], &pieces));
        let (outcome, given) = fetched(&repository).await;
        match outcome {
            Ok(Some(_)) => assert!(given == bytes, "call {number}"),
            // Gone before anything was listed.
            Ok(None) => assert!(number <= 2 && given.is_empty(), "call {number}"),
            Err(RepoError::Store(error)) => {
                assert!(error.is_transient() && !error.is_absent(), "call {number}: {error}");
                struck += 1;
            }
            Err(other) => unreachable!("call {number}: {other}"),
        }
    }
    assert!(struck > 3, "{struck}");
}

#[tokio::test]
async fn the_pieces_of_two_servers_never_become_one_segment() {
    let (ours, others) = (wal(1), wal(2));
    let (memory, _, repository) = claimed().await;
    put(&memory, &sealed(&ours, &[250_000]).0);
    put(&memory, &sealed(&others, &[250_000, 400_000]).0[1..]);
    let (outcome, _) = fetched(&repository).await;
    let error = outcome.unwrap_err().to_string();
    assert!(error.contains("000000010000000000000002.parts") && error.contains("0/23"), "{error}");
    let prefix = repository.stored_prefix(SYSTEM, segment(), size()).await;
    assert!(matches!(prefix, Err(RepoError::Damaged { .. })), "{prefix:?}");

    // The whole segment is the other server's, and comes while our pieces are read.
    let (pieces, _) = sealed(&ours, &CUTS);
    let (_, whole) = sealed(&others, &[]);
    let (memory, faults, repository) = claimed().await;
    put(&memory, &pieces);
    // Whole, listing, eight pieces: the next one is gone.
    before_call(&faults, 11, tidy_up(&memory, &whole, &pieces));
    let (outcome, given) = fetched(&repository).await;
    assert!(matches!(outcome, Err(RepoError::Damaged { .. })), "{outcome:?}");
    assert!(given == ours[..CUTS[7] as usize], "what was given before is not mixed");
}

#[tokio::test]
async fn a_record_may_be_cut_by_the_very_end_only() {
    let bytes = wal(1);
    // Within a record header, a page header, and a record's body.
    for end in [8_192 * 3 + 4, 8_192 * 5 + 20, 50_001, 123_456] {
        let (memory, _, repository) = claimed().await;
        put(&memory, &sealed(&bytes, &[10_000, end]).0);
        let (outcome, given) = fetched(&repository).await;
        let valid_bytes = u64::from(end);
        assert_eq!(outcome.unwrap(), Some(SegmentSource::Pieces { valid_bytes }));
        assert!(given[..end as usize] == bytes[..end as usize]);
    }
}

#[tokio::test]
async fn many_small_pieces_are_read_some_at_a_time() {
    let bytes = wal(1);
    let cuts: Vec<u32> = (1..300).map(|n| n * 700).collect();
    let (memory, _, repository) = claimed().await;
    put(&memory, &sealed(&bytes, &cuts).0);
    let (outcome, given) = fetched(&repository).await;
    let valid = 299 * 700;
    assert_eq!(outcome.unwrap(), Some(SegmentSource::Pieces { valid_bytes: valid as u64 }));
    assert!(given[..valid] == bytes[..valid]);
}

#[tokio::test]
async fn the_stored_prefix_is_what_an_unbroken_read_gives() {
    let bytes = wal(1);
    let (pieces, whole) = sealed(&bytes, &CUTS);
    let (memory, _, repository) = claimed().await;
    let ask = || repository.stored_prefix(SYSTEM, segment(), size());
    assert_eq!(ask().await.unwrap(), None);
    put(&memory, &pieces[1..3]);
    assert_eq!(ask().await.unwrap(), None, "no start");
    put(&memory, &pieces[..2]);
    let prefix = |end: u32, is_complete| StoredPrefix {
        end,
        digest: blake3::hash(&bytes[..end as usize]),
        is_complete,
    };
    assert_eq!(ask().await.unwrap(), Some(prefix(CUTS[2], false)));
    put(&memory, &pieces);
    assert_eq!(ask().await.unwrap(), Some(prefix(1 << 20, false)), "not as archive-push stores it");
    put(&memory, &whole);
    assert_eq!(ask().await.unwrap(), Some(prefix(1 << 20, true)));
}
