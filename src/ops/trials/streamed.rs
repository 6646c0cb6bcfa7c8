//! WAL that is streamed piece by piece ends up as `archive-push` would have stored it.

use super::archive::{Archive, SIZE_BYTES, SYSTEM};
use crate::format::{Codec, WalObject};
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::pg::{PgTimestamp, SegmentName, Timeline};
use crate::repo::{Put, SealedPiece, SegmentAssembly, SegmentSource};

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
            let dropped = streamed.calm.drop_redundant_pieces(SYSTEM, segment, streamed.size);
            assert!(dropped.await.unwrap() > 20);
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
        let key = crate::store::Key::new(key);
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
    for block in bytes[..first].chunks(10_000) {
        assembly.push(block, &mut |_| {}).unwrap();
        put(&archive, assembly.cut().unwrap()).await;
    }
    // Another process goes on where the first one was killed.
    let stored = place.stored_prefix(SYSTEM, segment, archive.size).await.unwrap().unwrap();
    assert_eq!(stored.end as usize, first);
    let mut assembly = begin(Some(stored));
    assembly.push(&bytes[..second], &mut |_| {}).unwrap();
    let cut = assembly.cut().unwrap();
    let (start, end) = (stored.end, u32::try_from(second).unwrap());
    assert_eq!(cut[0].object, WalObject::Piece { segment, start, end });
    put(&archive, cut).await;
    put(&archive, vec![assembly.to_merge(0, end).unwrap().seal().unwrap()]).await;
    let dropped = place.drop_pieces_inside(SYSTEM, segment, 0, end).await.unwrap();
    assert_eq!(dropped, 32);
    assert_eq!(archive.keys_below(".parts/").len(), 1);

    let (report, given) = archive.get(&segment.to_string()).await;
    let valid_bytes = u64::from(end);
    assert_eq!(report.unwrap().source, Some(SegmentSource::Pieces { valid_bytes }));
    let given = given.unwrap();
    assert!(given[..second] == bytes[..second]);
    assert_eq!(given.len(), bytes.len());
}
