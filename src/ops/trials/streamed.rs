//! WAL that is streamed piece by piece ends up as `archive-push` would have stored it.

use std::collections::BTreeSet;

use super::archive::{Archive, MODES, SIZE_BYTES, SYSTEM};
use crate::format::{Codec, WalObject};
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::pg::{PgTimestamp, SegmentName, Timeline};
use crate::repo::{Put, RepoError, Repository, SealedPiece, SegmentAssembly, SegmentSource};
use crate::store::Key;

/// Segments 2, 3 … of a busy server: commits, restore points and drops, records across every border.
fn busy_wal(archive: &Archive, segments: usize) -> Vec<Vec<u8>> {
    let mut builder = WalBuilder::new(Timeline(1), 2, archive.size, SYSTEM);
    let segment_bytes = u32::from(archive.size);
    let filler = segment_bytes as usize / 40;
    let end = archive.size.start_of(2 + segments as u64);
    let mut n = 0;
    while builder.lsn() <= end {
        n += 1;
        let time = PgTimestamp(1_000_000 * i64::from(n % 13));
        builder.add(&RecordSpec::commit(n, time));
        builder.add(&RecordSpec::filler(filler + 100 * n as usize));
        builder.add(&RecordSpec::abort(n, PgTimestamp(time.0 + 5)));
        builder.add(&RecordSpec::drop(n, time, &[(1663, 5, n)]));
        builder.add(&RecordSpec::restore_point(&format!("point {n}"), time));
    }
    let mut built = builder.into_segments();
    built.truncate(segments);
    built
}

async fn put(archive: &Archive, pieces: Vec<SealedPiece>) -> Vec<Put> {
    let mut outcomes = Vec::new();
    for piece in pieces {
        outcomes.push(archive.calm.put_sealed(&piece.key, &piece.sealed).await.unwrap());
    }
    outcomes
}

#[tokio::test]
async fn streamed_segments_are_what_archive_push_stores_of_them() {
    for segment_bytes in [SIZE_BYTES, 16 << 20, 64 << 20] {
        let (streamed, pushed) =
            (Archive::claimed(segment_bytes).await, Archive::claimed(segment_bytes).await);
        let mut carry = None;
        for (number, bytes) in (2..).zip(busy_wal(&pushed, 2)) {
            let segment = SegmentName::new(Timeline(1), number, pushed.size);
            pushed.push(&segment.to_string(), &bytes).await.unwrap();

            let codec = Codec::Lz4;
            let carried = carry.take();
            let mut assembly = SegmentAssembly::begin(
                &streamed.calm,
                SYSTEM,
                segment,
                streamed.size,
                codec,
                carried,
                None,
            )
            .unwrap();
            for block in bytes.chunks(bytes.len() / 23) {
                assembly.push(block, &mut |_| {}).unwrap();
                put(&streamed, assembly.cut().unwrap()).await;
                let units = assembly.take_units().into_iter().map(|unit| unit.seal().unwrap());
                put(&streamed, units.collect()).await;
            }
            (_, carry) = assembly.finish().unwrap();

            let name = segment.to_string();
            let none = BTreeSet::new();
            let tidied = streamed.calm.drop_redundant_pieces(SYSTEM, segment, streamed.size, &none);
            assert!(tidied.await.unwrap().dropped > 20);
            let report = streamed.push(&name, &bytes).await.unwrap();
            assert_eq!(report.outcome, Put::AlreadyThere, "the very same names and digests");
            assert_eq!(streamed.get(&name).await.1.unwrap(), bytes);
        }
        assert_same_headers(&streamed, &pushed).await;
    }
}

async fn assert_same_headers(streamed: &Archive, pushed: &Archive) {
    let keys = pushed.keys_below("/wal/");
    assert_eq!(streamed.keys_below("/wal/"), keys);
    for key in keys {
        let key = Key::new(key);
        let ours = streamed.calm.header(&key).await.unwrap();
        let mut expected = pushed.calm.header(&key).await.unwrap();
        // The codec differs here, and frames may.
        (expected.codec, expected.stored_bytes) = (ours.codec, ours.stored_bytes);
        assert_eq!(ours, expected);
    }
}

#[tokio::test]
async fn what_is_streamed_of_a_segment_can_be_fetched_before_it_is_complete() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let bytes = busy_wal(&archive, 1).remove(0);
    let segment = SegmentName::new(Timeline(1), 2, archive.size);
    let place = &archive.calm;
    let begin = |stored| {
        let codec = Codec::DEFAULT;
        SegmentAssembly::begin(place, SYSTEM, segment, archive.size, codec, None, stored).unwrap()
    };
    let (first, second) = (300_001, 700_000);
    let mut assembly = begin(None);
    let mut own = BTreeSet::new();
    let mut note = |pieces: &[SealedPiece]| {
        own.extend(pieces.iter().filter_map(|piece| match piece.object {
            WalObject::Piece { start, end, .. } => Some((start, end)),
            _ => None,
        }));
    };
    for block in bytes[..first].chunks(10_000) {
        assembly.push(block, &mut |_| {}).unwrap();
        let cut = assembly.cut().unwrap();
        note(&cut);
        put(&archive, cut).await;
    }
    // Another process goes on where the first one was killed.
    let stored = place.stored_prefix(SYSTEM, segment, archive.size).await.unwrap().unwrap();
    assert_eq!(stored.end as usize, first);
    let mut assembly = begin(Some(stored));
    assembly.push(&bytes[..second], &mut |_| {}).unwrap();
    let cut = assembly.cut().unwrap();
    let (start, end) = (stored.end, u32::try_from(second).unwrap());
    assert_eq!(cut[0].object, WalObject::Piece { segment, start, end });
    note(&cut);
    put(&archive, cut).await;
    put(&archive, vec![assembly.to_merge(0, end).unwrap().seal().unwrap()]).await;
    let dropped = place.drop_pieces_inside(SYSTEM, segment, (0, end), own).await.unwrap();
    assert_eq!(dropped, 32);
    assert_eq!(archive.keys_below(".parts/").len(), 1);

    let (report, given) = archive.get(&segment.to_string()).await;
    let valid_bytes = u64::from(end);
    assert_eq!(report.unwrap().source, Some(SegmentSource::Pieces { valid_bytes }));
    let given = given.unwrap();
    assert!(given[..second] == bytes[..second]);
    assert_eq!(given.len(), bytes.len());
}

/// Stores a segment in pieces only, but for these units of a large one, as a receiver leaves it that dies before the rest
/// is stored.
async fn leave_in_pieces(archive: &Archive, segment: SegmentName, bytes: &[u8], units: &[usize]) {
    let codec = Codec::DEFAULT;
    let (place, size) = (&archive.calm, archive.size);
    let mut assembly =
        SegmentAssembly::begin(place, SYSTEM, segment, size, codec, None, None).unwrap();
    let mut number = 0;
    for block in bytes.chunks(bytes.len() / 23) {
        assembly.push(block, &mut |_| {}).unwrap();
        put(archive, assembly.cut().unwrap()).await;
        for unit in assembly.take_units() {
            if units.contains(&number) {
                put(archive, vec![unit.seal().unwrap()]).await;
            }
            number += 1;
        }
    }
    assembly.finish().unwrap();
}

/// Returns the segments that a listing shows as stored, and not complete.
async fn unfinished(archive: &Archive) -> Vec<SegmentName> {
    let inventory = archive.calm.wal_inventory(SYSTEM, archive.size).await.unwrap();
    inventory.timelines.get(&Timeline(1)).map(|wal| wal.unfinished.clone()).unwrap_or_default()
}

#[tokio::test]
async fn a_segment_that_was_left_in_pieces_becomes_what_archive_push_stores_of_it() {
    for (segment_bytes, units, missing) in
        [(SIZE_BYTES, &[][..], 1), (16 << 20, &[], 1), (64 << 20, &[0, 2], 2)]
    {
        let (left, pushed) =
            (Archive::claimed(segment_bytes).await, Archive::claimed(segment_bytes).await);
        for (number, bytes) in (2..).zip(busy_wal(&pushed, 2)) {
            let segment = SegmentName::new(Timeline(1), number, pushed.size);
            let name = segment.to_string();
            pushed.push(&name, &bytes).await.unwrap();
            leave_in_pieces(&left, segment, &bytes, units).await;
            assert_eq!(unfinished(&left).await, [segment]);

            let complete = || left.calm.complete_segment(SYSTEM, segment, left.size, Codec::Lz4);
            assert_eq!(complete().await.unwrap(), missing);
            assert_eq!(complete().await.unwrap(), 0, "it is complete");
            assert_eq!(unfinished(&left).await, []);
            let none = BTreeSet::new();
            let tidied = left.calm.drop_redundant_pieces(SYSTEM, segment, left.size, &none);
            assert!(tidied.await.unwrap().dropped > 10, "pieces stay until they are told to go");
            assert!(left.get(&name).await.1.unwrap() == bytes);
            let report = left.push(&name, &bytes).await.unwrap();
            assert_eq!(report.outcome, Put::AlreadyThere, "the very same names and digests");
        }
        assert_same_headers(&left, &pushed).await;
    }
}

#[tokio::test]
async fn pieces_that_are_not_all_of_a_segment_are_left_as_they_are() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let bytes = busy_wal(&archive, 1).remove(0);
    let segment = SegmentName::new(Timeline(1), 2, archive.size);
    leave_in_pieces(&archive, segment, &bytes, &[]).await;
    let complete = || archive.calm.complete_segment(SYSTEM, segment, archive.size, Codec::DEFAULT);
    let all = archive.keys_below(".parts/");
    let (last, inside) = (all.last().unwrap().clone(), all[7].clone());
    for gone in [inside, last] {
        let stored = archive.memory.bytes(&gone).unwrap();
        archive.calm.store().delete(&Key::new(gone.clone())).await.unwrap();
        let left = archive.memory.keys();
        assert_eq!(complete().await.unwrap(), 0);
        assert_eq!(archive.memory.keys(), left, "nothing was stored, and nothing went");
        assert_eq!(unfinished(&archive).await, []);
        archive.memory.overwrite(&gone, stored);
    }
    assert_eq!(complete().await.unwrap(), 1);
}

#[tokio::test]
async fn a_damaged_piece_is_never_made_part_of_a_complete_segment() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let bytes = busy_wal(&archive, 1).remove(0);
    let segment = SegmentName::new(Timeline(1), 2, archive.size);
    leave_in_pieces(&archive, segment, &bytes, &[]).await;
    let keys = archive.memory.keys();
    let damaged = &archive.keys_below(".parts/")[5];
    let mut stored = archive.memory.bytes(damaged).unwrap().to_vec();
    let last = stored.len() - 1;
    stored[last] ^= 1;
    archive.memory.overwrite(damaged, stored);
    let completed = archive.calm.complete_segment(SYSTEM, segment, archive.size, Codec::DEFAULT);
    assert!(matches!(completed.await, Err(RepoError::Damaged { .. })));
    assert_eq!(archive.memory.keys(), keys);
}

/// Whatever call fails, and however: the segment can be read all the time, and the next who tries completes it.
#[tokio::test]
async fn a_segment_whose_completion_fails_anywhere_can_be_read_and_completed() {
    let bytes = busy_wal(&Archive::claimed(SIZE_BYTES).await, 1).remove(0);
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            let segment = SegmentName::new(Timeline(1), 2, archive.size);
            leave_in_pieces(&archive, segment, &bytes, &[]).await;
            let complete = |place: Repository| async move {
                place.complete_segment(SYSTEM, segment, archive.size, Codec::DEFAULT).await
            };
            let before = archive.faults.calls().len() as u64;
            archive.faults.inject(mode(n));
            let outcome = complete(archive.repository.clone()).await;
            let struck = archive.faults.calls().len() as u64 - before >= n;
            archive.faults.heal();
            assert!(struck || outcome.is_ok(), "call {n}: {outcome:?}");
            let given = archive.get(&segment.to_string()).await.1;
            assert!(given.unwrap() == bytes, "call {n}");
            complete(archive.calm.clone()).await.unwrap();
            assert_eq!(unfinished(&archive).await, []);
            let given = archive.get(&segment.to_string()).await.1;
            assert!(given.unwrap() == bytes, "call {n}");
            if !struck {
                assert!(n > 20, "the fault never struck");
                break;
            }
        }
    }
}
