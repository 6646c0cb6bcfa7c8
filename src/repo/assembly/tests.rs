//! Any pushes and any cuts give the same bytes, digests and facts.

mod switches;

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::format::{CodecError, read_frames};
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::pg::{PgTimestamp, Timeline};
use crate::store::memory::MemoryStore;

const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);
const MIB: usize = 1 << 20;
const CODECS: [Codec; 3] = [Codec::Zstd(1), Codec::Lz4, Codec::None];

fn size(bytes: usize) -> SegmentSize {
    SegmentSize::new(u32::try_from(bytes).unwrap()).unwrap()
}

fn repository() -> Repository {
    Repository::new(Arc::new(MemoryStore::new()), "main".parse().unwrap())
}

/// Segments 2, 3 … of WAL whose records run across every border.
fn wal(segment_bytes: usize, segments: usize) -> Vec<Vec<u8>> {
    let mut builder = WalBuilder::new(Timeline(1), 2, size(segment_bytes), SYSTEM);
    let end = Lsn(builder.lsn().0 + (segments * segment_bytes) as u64);
    for n in 0u32.. {
        let time = PgTimestamp(1_000_000 * i64::from(n % 7 * 100 + n));
        builder.add(&RecordSpec::commit(700 + n, time));
        if n % 50 == 3 {
            builder.add(&RecordSpec::restore_point(&format!("point {n}"), time));
        }
        builder.add(&RecordSpec::filler(700 + n as usize * 7919 % 60_000));
        if builder.lsn() > end {
            break;
        }
    }
    let mut segments_built = builder.into_segments();
    segments_built.truncate(segments);
    segments_built
}

fn name(bytes: usize, number: u64) -> SegmentName {
    SegmentName::new(Timeline(1), number, size(bytes))
}

fn begin(bytes: usize, codec: Codec, stored: Option<StoredPrefix>) -> SegmentAssembly {
    SegmentAssembly::begin(&repository(), SYSTEM, name(bytes, 2), size(bytes), codec, None, stored)
        .unwrap()
}

fn push(assembly: &mut SegmentAssembly, bytes: &[u8]) {
    assembly.push(bytes, &mut |_| {}).unwrap();
}

/// The plain bytes of a sealed piece, after a look that its header tells the truth.
fn plain(piece: &SealedPiece) -> Vec<u8> {
    let header = &piece.sealed.header;
    let stored: Vec<u8> = piece.sealed.body.pieces().iter().flatten().copied().collect();
    assert_eq!(header.stored_bytes, stored.len() as u64);
    assert!(piece.key.as_str().ends_with(&header.name), "{} {}", piece.key, header.name);
    let mut plain = Vec::new();
    read_frames(header.codec, stored.as_slice(), header.plain_bytes, |block| {
        plain.extend_from_slice(block);
        Ok::<_, CodecError>(())
    })
    .unwrap();
    assert_eq!(header.blake3, Some(blake3::hash(&plain).to_hex().to_string()));
    assert_eq!(piece.end_lsn.0 - piece.start_lsn.0, plain.len() as u64);
    plain
}

fn offsets(piece: &SealedPiece) -> (u32, u32) {
    match piece.object {
        WalObject::Piece { start, end, .. } => (start, end),
        other => unreachable!("{other:?}"),
    }
}

fn units(assembly: &mut SegmentAssembly) -> Vec<SealedPiece> {
    assembly.take_units().into_iter().map(|unit| unit.seal().unwrap()).collect()
}

/// Merges as the receiver does.
fn merge(assembly: &mut SegmentAssembly, start: u32, end: u32) -> SealedPiece {
    let merged = assembly.to_merge(start, end).unwrap().seal().unwrap();
    assembly.adopt(&merged);
    merged
}

/// A segment pushed at once, without a cut.
fn uncut(segment_bytes: usize, bytes: &[u8]) -> Vec<SealedPiece> {
    let mut assembly = begin(segment_bytes, Codec::DEFAULT, None);
    push(&mut assembly, bytes);
    units(&mut assembly)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_pushes_and_cuts_give_the_same_bytes_digests_and_facts(
        steps in proptest::collection::vec((1usize..90_000, 0u32..4), 12..60),
        stored in 0usize..MIB,
        which in 0usize..3,
    ) {
        let bytes = wal(MIB, 1).remove(0);
        let prefix = StoredPrefix {
            end: u32::try_from(stored).unwrap(),
            digest: blake3::hash(&bytes[..stored]),
            is_complete: false,
        };
        let mut assembly = begin(MIB, CODECS[which], Some(prefix));
        let mut cut: Vec<SealedPiece> = Vec::new();
        let mut rest = bytes.as_slice();
        for (n, action) in steps {
            let (now, later) = rest.split_at(n.min(rest.len()));
            push(&mut assembly, now);
            rest = later;
            if action == 0 {
                cut.extend(assembly.cut().unwrap());
                prop_assert_eq!(assembly.cut_position(), assembly.position().max(prefix.end));
            }
        }
        push(&mut assembly, rest);
        cut.extend(assembly.cut().unwrap());

        let mut at = stored;
        for piece in &cut {
            let (start, end) = offsets(piece);
            prop_assert_eq!(start as usize, at, "pieces follow each other");
            prop_assert_eq!(&plain(piece), &bytes[start as usize..end as usize]);
            at = end as usize;
        }
        prop_assert_eq!(at, MIB);

        // Merging any of them gives what lies between, and merging leaves the whole as it is.
        if let Some((first, last)) = cut.first().zip(cut.get(cut.len() / 2)) {
            let (start, end) = (offsets(first).0, offsets(last).1);
            let merged = merge(&mut assembly, start, end);
            prop_assert_eq!(offsets(&merged), (start, end));
            prop_assert_eq!(&plain(&merged), &bytes[start as usize..end as usize]);
            let parts: u64 = cut[..=cut.len() / 2].iter().map(xacts).sum();
            prop_assert_eq!(xacts(&merged), parts);
        }
        let whole = units(&mut assembly);
        prop_assert_eq!(whole.len(), 1);
        prop_assert_eq!(&plain(&whole[0]), &bytes);
        let expected = &uncut(MIB, &bytes)[0];
        prop_assert_eq!(&whole[0].key, &expected.key);
        prop_assert_eq!(&whole[0].sealed.header.wal, &expected.sealed.header.wal);
        prop_assert_eq!(whole[0].sealed.header.kind, Kind::Segment);
        prop_assert_eq!(assembly.take_units().len(), 0, "handed out once");
        prop_assert_eq!(assembly.cut().unwrap().len(), 0);
        let (facts, carry) = assembly.finish().unwrap();
        prop_assert_eq!(facts.valid_end, expected.sealed.header.wal.as_ref().unwrap().end_lsn);
        prop_assert!(carry.is_some());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn frames_made_aside_give_the_same_objects_as_frames_made_in_place(
        steps in proptest::collection::vec((1usize..2_500_000, 0u32..4), 1..8),
        stored in 0usize..3 * MIB,
        until in 0u32..4 << 20,
        which in 0usize..3,
    ) {
        let (codec, bytes) = (CODECS[which], wal(4 * MIB, 1).remove(0));
        let prefix = StoredPrefix {
            end: u32::try_from(stored).unwrap(),
            digest: blake3::hash(&bytes[..stored]),
            is_complete: false,
        };
        let run = |maker: Option<&FrameMaker>| {
            let mut assembly = begin(4 * MIB, codec, Some(prefix));
            if let Some(maker) = maker {
                assembly.make_frames_with(maker);
            }
            let mut made = Vec::new();
            let mut rest = bytes.as_slice();
            for (n, action) in &steps {
                let (now, later) = rest.split_at(rest.len().min(*n));
                push(&mut assembly, now);
                rest = later;
                if *action == 0 {
                    made.extend(assembly.cut().unwrap());
                }
            }
            let cut = (made.first().map(offsets), made.last().map(offsets));
            if let (Some((start, _)), Some((_, end))) = cut {
                made.push(assembly.to_merge(start, end).unwrap().seal().unwrap());
            }
            if stored > 0 && assembly.position() as usize >= stored {
                made.push(assembly.to_merge(0, prefix.end).unwrap().seal().unwrap());
            }
            if until < assembly.position() {
                made.extend(assembly.cut_until(until).unwrap());
            } else {
                push(&mut assembly, rest);
                made.extend(units(&mut assembly));
                assert!(assembly.held_bytes() <= 2 << 20, "{}", assembly.held_bytes());
            }
            made
        };
        let (aside, in_place) = (run(Some(&FrameMaker::start(codec))), run(None));
        prop_assert_eq!(aside.len(), in_place.len());
        for (ours, expected) in aside.iter().zip(&in_place) {
            prop_assert_eq!(&ours.sealed.header, &expected.sealed.header);
            prop_assert_eq!(plain(ours), plain(expected));
        }
    }
}

#[test]
fn a_frame_that_was_lost_aside_is_in_no_object() {
    let bytes = wal(4 * MIB, 1).remove(0);
    let mut assembly = begin(4 * MIB, Codec::Lz4, None);
    assembly.make_frames_with(&FrameMaker::start(Codec::Lz4));
    push(&mut assembly, &bytes[..MIB + 10]);
    assembly.open.frames[0] = Frame::InMaking(std::sync::mpsc::sync_channel(1).1);
    assert!(assembly.cut().is_err());
    assert!(assembly.cut().is_err(), "nor when it is asked again");
    assert_eq!(assembly.cut_position(), 0);
    push(&mut assembly, &bytes[MIB + 10..]);
    assert!(assembly.to_merge(0, u32::try_from(MIB + 10).unwrap()).is_err());
    assert!(assembly.take_units().remove(0).seal().is_err());
}

fn xacts(piece: &SealedPiece) -> u64 {
    piece.sealed.header.wal.as_ref().unwrap().xacts
}

#[test]
fn a_large_segment_is_handed_out_unit_by_unit_and_not_held() {
    let bytes = wal(64 * MIB, 1).remove(0);
    let mut assembly = begin(64 * MIB, Codec::DEFAULT, None);
    let mut units = Vec::new();
    let mut pieces = Vec::new();
    for block in bytes.chunks(1_500_000) {
        push(&mut assembly, block);
        pieces.extend(assembly.cut().unwrap());
        units.extend(super::tests::units(&mut assembly));
        assert!(assembly.held_bytes() < 20 << 20, "{}", assembly.held_bytes());
    }
    let unit = PIECE_BYTES as usize;
    for (number, piece) in units.iter().enumerate() {
        let range = number * unit..(number + 1) * unit;
        let (start, end) = offsets(piece);
        assert_eq!(start as usize..end as usize, range);
        assert!(plain(piece) == bytes[range], "unit {number}");
        assert_eq!(piece.sealed.header.kind, Kind::Piece);
    }
    assert_eq!(units.len(), 4);
    assert!(assembly.held_bytes() < 3 << 20, "{}", assembly.held_bytes());
    let joined: Vec<u8> = pieces.iter().flat_map(plain).collect();
    assert!(joined == bytes, "pieces are all of it as well");
    let crossing = |piece: &&SealedPiece| {
        let (start, end) = offsets(piece);
        start / PIECE_BYTES != (end - 1) / PIECE_BYTES
    };
    assert_eq!(pieces.iter().filter(crossing).count(), 0);
    let uncut = uncut(64 * MIB, &bytes);
    for (ours, expected) in units.iter().zip(&uncut) {
        assert_eq!(ours.sealed.header.wal, expected.sealed.header.wal);
    }
}

#[test]
fn many_small_frames_are_made_anew_and_large_ones_are_shared() {
    let bytes = wal(MIB, 1).remove(0);
    let mut assembly = begin(MIB, Codec::DEFAULT, None);
    for block in bytes[..MIB / 2].chunks(1000) {
        push(&mut assembly, block);
        assembly.cut().unwrap();
    }
    let held = assembly.held_bytes();
    let merged = merge(&mut assembly, 0, u32::try_from(MIB / 2).unwrap());
    assert_eq!(merged.sealed.body.pieces().len(), 1, "one large frame");
    assert!(assembly.held_bytes() < held / 2, "{held}, then {}", assembly.held_bytes());
    push(&mut assembly, &bytes[MIB / 2..]);
    let whole = units(&mut assembly);
    let shared = whole[0].sealed.body.pieces()[0].as_ptr();
    assert_eq!(shared, merged.sealed.body.pieces()[0].as_ptr(), "not copied");
    assert_eq!(plain(&whole[0]), bytes);
}

#[test]
fn a_merge_that_is_late_changes_nothing_and_has_the_right_bytes() {
    let bytes = wal(MIB, 2);
    let mut assembly = begin(MIB, Codec::DEFAULT, None);
    for block in bytes[0][..MIB / 2].chunks(1000) {
        push(&mut assembly, block);
        assembly.cut().unwrap();
    }
    let half = u32::try_from(MIB / 2).unwrap();
    let merge = assembly.to_merge(0, half).unwrap();
    push(&mut assembly, &bytes[0][MIB / 2..]);
    let unit = assembly.take_units().remove(0);
    let held = assembly.held_bytes();
    let merged = merge.seal().unwrap();
    assembly.adopt(&merged);
    assert_eq!(assembly.held_bytes(), held, "the unit is gone already");
    assert_eq!(plain(&merged), bytes[0][..MIB / 2]);
    let promised = unit.held_bytes();
    let whole = unit.seal().unwrap();
    assert!(whole.sealed.header.stored_bytes < promised);
    assert_eq!(plain(&whole), bytes[0]);
    assert_eq!(whole.sealed.header.wal, uncut(MIB, &bytes[0])[0].sealed.header.wal);

    // The next segment has a stretch at the same offsets.
    let codec = Codec::DEFAULT;
    let begun =
        SegmentAssembly::begin(&repository(), SYSTEM, name(MIB, 3), size(MIB), codec, None, None);
    let mut next = begun.unwrap();
    push(&mut next, &bytes[1][..MIB / 2]);
    let cut = next.cut().unwrap();
    next.adopt(&merged);
    assert_eq!(plain(&next.to_merge(0, half).unwrap().seal().unwrap()), plain(&cut[0]));
}

#[test]
fn an_object_of_other_bytes_than_were_taken_is_not_made() {
    let bytes = wal(MIB, 1).remove(0);
    let mut assembly = begin(MIB, Codec::None, None);
    for half in bytes.chunks(MIB / 2) {
        push(&mut assembly, half);
        assembly.cut().unwrap();
    }
    // Memory that went bad.
    let frame = &mut assembly.spans[1].frames[0];
    let mut bad = frame.wait().unwrap().to_vec();
    bad[77] ^= 1;
    *frame = Frame::Made(bad.into());
    let error = assembly.take_units().remove(0).seal().unwrap_err();
    assert!(error.to_string().contains("not the bytes that were taken"), "{error}");
}

#[test]
fn only_stretches_that_were_cut_can_be_merged() {
    let bytes = wal(32 * MIB, 1).remove(0);
    let mut assembly = begin(32 * MIB, Codec::Lz4, None);
    for cut in bytes[..17 * MIB].chunks(MIB / 2) {
        push(&mut assembly, cut);
        assembly.cut().unwrap();
    }
    let at = |half: usize| u32::try_from(half * MIB / 2).unwrap();
    for (start, end) in [(0, 100), (100, at(1)), (at(2), at(1)), (at(1), at(1)), (at(30), at(33))] {
        let error = assembly.to_merge(start, end).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{start} {end}");
    }
    assert_eq!(plain(&merge(&mut assembly, at(31), at(32))), bytes[31 * MIB / 2..16 * MIB]);
    merge(&mut assembly, at(1), at(5));
    assert!(assembly.to_merge(at(2), at(5)).is_err(), "that place is gone");
    let merged = merge(&mut assembly, at(1), at(6));
    assert!(plain(&merged) == bytes[MIB / 2..3 * MIB]);
}

/// Two segments with a commit record and a restore point across their border.
fn wal_with_a_commit_across_the_border() -> Vec<Vec<u8>> {
    let mut builder = WalBuilder::new(Timeline(1), 2, size(MIB), SYSTEM);
    let border = Lsn(3 << 20);
    while builder.lsn().0 + 5000 < border.0 {
        builder.add(&RecordSpec::filler(2000));
    }
    let mut closer = (0..5000).map(|bytes| {
        let mut builder = builder.clone();
        builder.add(&RecordSpec::filler(bytes));
        builder
    });
    let mut builder =
        closer.find(|builder| (1..=24).contains(&(border.0 - builder.lsn().0))).unwrap();
    builder.add(&RecordSpec::commit(900, PgTimestamp(1)));
    builder.add(&RecordSpec::filler(3000));
    builder.add(&RecordSpec::switch());
    builder.into_segments()
}

#[test]
fn a_walk_that_goes_on_from_the_segment_before_makes_the_same_objects() {
    for segments in [wal(MIB, 3), wal_with_a_commit_across_the_border()] {
        let mut carry = None;
        let mut is_across = false;
        for (number, bytes) in (2..).zip(&segments) {
            let begin = |carry| {
                let (place, codec) = (repository(), Codec::DEFAULT);
                let segment = name(MIB, number);
                SegmentAssembly::begin(&place, SYSTEM, segment, size(MIB), codec, carry, None)
                    .unwrap()
            };
            let mut alone = begin(None);
            push(&mut alone, bytes);
            let mut assembly = begin(carry.take());
            let start_lsn = assembly.start_lsn();
            let mut see = |mark: &Mark| is_across |= mark.lsn < start_lsn;
            assembly.push(bytes, &mut see).unwrap();
            let (ours, expected) = (units(&mut assembly), units(&mut alone));
            assert_eq!(ours[0].sealed.header, expected[0].sealed.header);
            let (facts, next) = assembly.finish().unwrap();
            assert_eq!(facts.continued_is_joined, number > 2);
            carry = next;
        }
        assert_eq!(is_across, segments.len() == 2, "the caller sees the record across the border");
    }
}

#[test]
fn other_bytes_than_those_stored_are_noticed_where_the_stored_ones_end() {
    let bytes = wal(MIB, 1).remove(0);
    let digest = blake3::hash(b"another server's");
    let stored = StoredPrefix { end: 300_000, digest, is_complete: false };
    let mut assembly = begin(MIB, Codec::DEFAULT, Some(stored));
    push(&mut assembly, &bytes[..299_999]);
    assert_eq!(assembly.cut().unwrap().len(), 0, "what is stored is not cut again");
    let error = assembly.push(&bytes[299_999..], &mut |_| {}).unwrap_err();
    let (start_lsn, end_lsn) = (Lsn(2 << 20), Lsn((2 << 20) + 300_000));
    let is_right = matches!(error, AssemblyError::Diverges { start_lsn: s, end_lsn: e, .. } if (s, e) == (start_lsn, end_lsn));
    assert!(is_right, "{error:?}");
    assert_eq!(assembly.cut().unwrap().len(), 0);
    assert!(matches!(assembly.push(&[0], &mut |_| {}), Err(AssemblyError::Ended)));
}

#[test]
fn damage_ends_the_segment_and_what_came_before_it_can_still_be_cut() {
    let mut bytes = wal(MIB, 1).remove(0);
    bytes[500_000] ^= 1;
    let mut assembly = begin(MIB, Codec::DEFAULT, None);
    let blocks: Vec<&[u8]> = bytes.chunks(50_000).collect();
    let failed =
        blocks.iter().position(|block| assembly.push(block, &mut |_| {}).is_err()).unwrap();
    assert!(failed >= 10);
    let cut = assembly.cut().unwrap();
    assert_eq!(plain(&cut[0]), bytes[..failed * 50_000]);
    let told = cut[0].sealed.header.wal.clone().unwrap();
    assert!(told.last_record_lsn.unwrap() < cut[0].end_lsn, "nothing behind the end is told");
    assert!(matches!(assembly.push(&[0], &mut |_| {}), Err(AssemblyError::Ended)));
    assert!(matches!(assembly.finish(), Err(AssemblyError::Damage(_))));
}

#[test]
fn bytes_past_the_end_and_a_missing_end_are_refused() {
    let mut bytes = wal(MIB, 1).remove(0);
    let mut short = begin(MIB, Codec::None, None);
    push(&mut short, &bytes[..MIB - 1]);
    assert_eq!(short.take_units().len(), 0);
    let missing = short.finish().unwrap_err();
    assert!(matches!(missing, AssemblyError::Damage(WalDamage::WrongSize { .. })), "{missing}");
    bytes.push(0);
    let past = begin(MIB, Codec::None, None).push(&bytes, &mut |_| {}).unwrap_err();
    assert!(matches!(past, AssemblyError::Damage(WalDamage::WrongSize { .. })), "{past}");
}
