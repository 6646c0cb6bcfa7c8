//! What must hold of a walk over a segment, on built segments of 1 MiB.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::super::wal_build::{PAGE_BYTES, RecordSpec, WalBuilder, build_segment};
use super::*;
use crate::pg::{ExpectedLink, PgTimestamp, WalEvent};

const SYSTEM: SystemId = SystemId(7_710_829_184_632_056_437);
const NUMBER: u64 = 5;

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn expectation(number: u64, extent: Extent) -> SegmentExpectation {
    let name = SegmentName::new(Timeline(1), number, size());
    SegmentExpectation::of(name, size(), Some(SYSTEM), extent).unwrap()
}

fn walk_as(bytes: &[u8], extent: Extent, block: usize) -> Result<SegmentFacts, WalDamage> {
    let mut walk = SegmentWalk::new(expectation(NUMBER, extent));
    for block in bytes.chunks(block) {
        walk.feed(block)?;
    }
    walk.finish()
}

fn walk(bytes: &[u8]) -> Result<SegmentFacts, WalDamage> {
    walk_as(bytes, Extent::Whole, 100_000)
}

fn builder() -> WalBuilder {
    WalBuilder::new(Timeline(1), NUMBER, size(), SYSTEM)
}

/// Records of many sizes, with marks among them, over a dozen pages.
fn records() -> Vec<RecordSpec> {
    let mut records = Vec::new();
    for at in 0..60u32 {
        records.push(RecordSpec::filler(at as usize * 53));
        records.push(RecordSpec::commit(1000 + at, PgTimestamp(i64::from(at % 7) * 10)));
    }
    records.push(RecordSpec::abort(9, PgTimestamp(1000)));
    records.push(RecordSpec::restore_point("before the drop", PgTimestamp(77)));
    records.push(RecordSpec::drop(10, PgTimestamp(5), &[(1663, 5, 16384), (1663, 5, 16387)]));
    records
}

fn segment() -> Vec<u8> {
    build_segment(Timeline(1), NUMBER, size(), SYSTEM, &records())
}

#[test]
fn a_sound_segment_tells_what_it_holds() {
    let facts = walk(&segment()).unwrap();
    assert_eq!((facts.system_id, facts.version.0, facts.block_size), (SYSTEM, 17, 8192));
    assert_eq!(facts.end, WalkEnd::Switched);
    assert_eq!(facts.valid_end, Lsn((NUMBER + 1) << 20));
    assert_eq!(facts.first_record_lsn, Some(Lsn((NUMBER << 20) + 40)));
    let marks = &facts.marks;
    assert_eq!(marks.records, records().len() as u64 + 1);
    let commits = marks.commits;
    assert_eq!(
        (commits.count, commits.first, commits.last),
        (61, Some(PgTimestamp(0)), Some(PgTimestamp(5)))
    );
    assert_eq!((commits.earliest, commits.latest), (Some(PgTimestamp(0)), Some(PgTimestamp(60))));
    assert_eq!(marks.latest_end(), Some(PgTimestamp(1000)), "an abort counts for reachability");
    assert_eq!(marks.restore_points[0].name, "before the drop");
    assert_eq!(marks.drops[0].relations[1].relation, 16387);
    assert_eq!((marks.drops[0].xid, marks.drops[0].relation_count), (Some(10), 2));
    assert_eq!(marks.unread_count, 0);
}

#[test]
fn marks_come_in_wal_order_with_their_lsn() {
    let mut walk = SegmentWalk::new(expectation(NUMBER, Extent::Whole));
    let mut seen = Vec::new();
    walk.feed_with(&segment(), &mut |mark| seen.push(mark.clone())).unwrap();
    assert_eq!(seen.len(), 64);
    assert!(seen.is_sorted_by_key(|mark| mark.lsn));
    let last = seen.last().unwrap();
    assert_eq!((&last.event, last.end_lsn), (&WalEvent::Switch, Lsn((NUMBER + 1) << 20)));
}

#[test]
fn what_follows_a_switch_is_not_looked_at() {
    let mut bytes = segment();
    let end = bytes.len();
    bytes[end - 3 * PAGE_BYTES..].fill(0xAB);
    assert_eq!(walk(&bytes).unwrap(), walk(&segment()).unwrap());
}

#[test]
fn a_switch_alone_in_the_first_page_is_a_whole_segment() {
    let facts = walk(&build_segment(Timeline(1), NUMBER, size(), SYSTEM, &[])).unwrap();
    assert_eq!((facts.marks.records, facts.end), (1, WalkEnd::Switched));
}

#[test]
fn another_cluster_size_or_place_is_told_apart() {
    let bytes = segment();
    let other = SystemId(1);
    let expect = |change: &dyn Fn(&mut SegmentExpectation)| {
        let mut expectation = expectation(NUMBER, Extent::Whole);
        change(&mut expectation);
        let mut walk = SegmentWalk::new(expectation);
        let first = walk.feed(&bytes).unwrap_err();
        assert_eq!(walk.feed(&bytes).unwrap_err(), first, "an error is final");
        first
    };
    assert_eq!(
        expect(&|e| e.system_id = Some(other)),
        WalDamage::WrongSystemId { expected: other, found: SYSTEM }
    );
    assert_eq!(
        expect(&|e| e.segment_size = SegmentSize::DEFAULT),
        WalDamage::WrongSegmentSize { expected: 16 << 20, found: 1 << 20 }
    );
    let (lsn, found) = (Lsn(6 << 20), Lsn(5 << 20));
    assert_eq!(expect(&|e| e.start_lsn = lsn), WalDamage::WrongPageAddress { lsn, found });
}

#[test]
fn a_forked_segment_begins_on_the_timeline_before() {
    let mut builder = builder();
    builder.add(&RecordSpec::filler(20_000));
    builder.timeline = Timeline(2);
    builder.add(&RecordSpec::end_of_recovery(PgTimestamp(1), Timeline(2), Timeline(1)));
    builder.add(&RecordSpec::filler(20_000));
    builder.add(&RecordSpec::switch());
    let bytes = builder.into_segments().swap_remove(0);
    let on = |timeline| {
        let expectation = SegmentExpectation {
            timeline: Timeline(timeline),
            ..expectation(NUMBER, Extent::Whole)
        };
        let mut walk = SegmentWalk::new(expectation);
        walk.feed(&bytes)?;
        walk.finish()
    };
    let facts = on(2).unwrap();
    assert_eq!((facts.first_timeline, facts.last_timeline), (Timeline(1), Timeline(2)));
    assert_eq!(facts.marks.timeline_changes[0].to, Timeline(2));
    assert!(matches!(on(1), Err(WalDamage::WrongTimeline { found: Timeline(2), .. })));
}

#[test]
fn a_timeline_never_goes_back_within_a_segment() {
    let mut builder = builder();
    builder.timeline = Timeline(3);
    builder.add(&RecordSpec::filler(10_000));
    builder.timeline = Timeline(2);
    builder.add(&RecordSpec::filler(10_000));
    builder.add(&RecordSpec::switch());
    let bytes = builder.into_segments().swap_remove(0);
    let mut walk = SegmentWalk::new(SegmentExpectation {
        timeline: Timeline(4),
        ..expectation(NUMBER, Extent::Whole)
    });
    assert!(matches!(
        walk.feed(&bytes),
        Err(WalDamage::WrongTimeline { at_least: Timeline(3), .. })
    ));
}

#[test]
fn a_record_longer_than_a_segment_makes_whole_segments_and_is_joined() {
    let mut builder = builder();
    builder.add(&RecordSpec::filler(10));
    let long = builder.add(&RecordSpec::filler(2_500_000));
    builder.add(&RecordSpec::commit(1, PgTimestamp(1)));
    builder.add(&RecordSpec::switch());
    let segments = builder.into_segments();
    assert_eq!(segments.len(), 3);
    let mut carry = None;
    let mut joined = Vec::new();
    for (number, bytes) in (NUMBER..).zip(&segments) {
        let mut alone = SegmentWalk::new(expectation(number, Extent::Whole));
        alone.feed(bytes).unwrap();
        let facts = alone.finish().unwrap();
        assert!(!facts.continued_is_joined);
        let expectation = expectation(number, Extent::Whole);
        let mut walk = match carry {
            Some(carry) => SegmentWalk::after(carry, expectation),
            None => SegmentWalk::new(expectation),
        };
        walk.feed(bytes).unwrap();
        let (facts, next) = walk.finish_with_carry().unwrap();
        carry = next;
        joined.push(facts);
    }
    let first = joined[0].incomplete.unwrap();
    assert_eq!(first.start_lsn, Some(long));
    assert_eq!(joined[1].continued_bytes.map(u64::from), Some(first.missing_bytes));
    assert_eq!(joined[1].first_record_lsn, None, "nothing but a piece of the record");
    assert_eq!(joined[1].valid_end, joined[1].start_lsn);
    assert!(joined[2].continued_is_joined);
    assert_eq!(joined[2].marks.records, 3, "the long record, the commit, the switch");
}

#[test]
fn damage_in_a_joined_record_is_found_and_alone_it_is_not_seen() {
    let mut builder = builder();
    builder.add(&RecordSpec::filler(1_200_000));
    builder.add(&RecordSpec::switch());
    let mut segments = builder.into_segments();
    segments[1][100] ^= 1;
    let mut walk = SegmentWalk::new(expectation(NUMBER, Extent::Whole));
    walk.feed(&segments[0]).unwrap();
    let (_, carry) = walk.finish_with_carry().unwrap();
    let next = expectation(NUMBER + 1, Extent::Whole);
    let mut joined = SegmentWalk::after(carry.unwrap(), next);
    assert!(matches!(joined.feed(&segments[1]), Err(WalDamage::BadChecksum { .. })));
    let mut alone = SegmentWalk::new(next);
    alone.feed(&segments[1]).unwrap();
}

#[test]
fn a_record_cut_by_a_crash_is_passed_over_in_mid_segment_and_at_its_start() {
    // In mid segment.
    let mut one = builder();
    one.add(&RecordSpec::filler(100));
    let abandoned = one.add_cut(&RecordSpec::filler(30_000), 12_000);
    one.add(&RecordSpec::overwrite_contrecord(abandoned));
    one.add(&RecordSpec::switch());
    let facts = walk(&one.into_segments()[0]).unwrap();
    assert_eq!((facts.marks.records, facts.marks.abandoned_record_count), (3, 1));
    // Over the border: both segments are sound, joined or not.
    let mut two = builder();
    two.add(&RecordSpec::filler(1_010_000));
    // So many bytes of it that the last page of the segment is begun.
    let offset = size().offset_of(two.lsn()) as usize;
    let headers = (1 << 20) / PAGE_BYTES - 1 - offset / PAGE_BYTES;
    let cut = (1 << 20) - offset - headers * 24 - 100;
    let abandoned = two.add_cut(&RecordSpec::filler(200_000), cut);
    two.add(&RecordSpec::overwrite_contrecord(abandoned));
    two.add(&RecordSpec::switch());
    let segments = two.into_segments();
    let mut first = SegmentWalk::new(expectation(NUMBER, Extent::Whole));
    first.feed(&segments[0]).unwrap();
    let (facts, carry) = first.finish_with_carry().unwrap();
    assert_eq!(facts.incomplete.unwrap().start_lsn, Some(abandoned));
    for mut next in [
        SegmentWalk::new(expectation(NUMBER + 1, Extent::Whole)),
        SegmentWalk::after(carry.unwrap(), expectation(NUMBER + 1, Extent::Whole)),
    ] {
        next.feed(&segments[1]).unwrap();
        let facts = next.finish().unwrap();
        assert_eq!((facts.marks.abandoned_record_count, facts.continued_is_joined), (1, false));
    }
}

#[test]
fn a_switch_record_split_by_the_border_is_understood_without_the_segment_before() {
    for head_bytes in [8, 16] {
        let mut builder = builder();
        builder.add(&RecordSpec::filler(1_000_000));
        let border = (NUMBER + 1) << 20;
        loop {
            let lsn = builder.lsn().0;
            let page_left = PAGE_BYTES as u64 - lsn % PAGE_BYTES as u64;
            if border - lsn == head_bytes {
                break;
            }
            // 24 bytes of header and 2 before short main data; the page header if one comes.
            let gap = (border - lsn).min(page_left) - head_bytes;
            let wanted = if border - lsn > page_left { 1000 } else { gap };
            builder.add(&RecordSpec::filler(wanted.clamp(26, 1000) as usize - 26));
            assert!(builder.lsn().0 < border, "overshot");
        }
        builder.add(&RecordSpec::switch());
        let segments = builder.into_segments();
        assert_eq!(segments.len(), 2);
        walk(&segments[0]).unwrap();
        for block in [1, 7, 4096] {
            let mut alone = SegmentWalk::new(expectation(NUMBER + 1, Extent::Whole));
            for block in segments[1].chunks(block) {
                alone.feed(block).unwrap();
            }
            let facts = alone.finish().unwrap();
            assert_eq!(facts.end, WalkEnd::Switched);
            assert_eq!(facts.valid_end, Lsn((NUMBER + 2) << 20));
        }
    }
}

#[test]
fn zeros_without_a_switch_are_damage_in_a_segment_and_the_end_in_a_prefix() {
    let mut builder = builder();
    builder.add(&RecordSpec::filler(20_000));
    builder.add(&RecordSpec::commit(1, PgTimestamp(3)));
    let lsn = builder.lsn();
    let bytes = builder.into_segments().swap_remove(0);
    assert_eq!(walk(&bytes), Err(WalDamage::EndInside { lsn }));
    let facts = walk_as(&bytes, Extent::Prefix, 5000).unwrap();
    assert_eq!((facts.valid_end, facts.incomplete), (lsn, None));
    assert_eq!(facts.end, WalkEnd::Stopped(WalDamage::EndInside { lsn }));
    let cut = &bytes[..size().offset_of(lsn) as usize];
    let facts = walk_as(cut, Extent::Prefix, 5000).unwrap();
    assert_eq!((facts.valid_end, facts.end), (lsn, WalkEnd::Cut));
}

#[test]
fn a_recycled_tail_is_told_by_its_page_address() {
    let old = build_segment(Timeline(1), NUMBER - 3, size(), SYSTEM, &records());
    let mut bytes = segment();
    bytes[2 * PAGE_BYTES..].copy_from_slice(&old[2 * PAGE_BYTES..]);
    let lsn = Lsn((NUMBER << 20) + 2 * PAGE_BYTES as u64);
    let found = Lsn(lsn.0 - (3 << 20));
    assert_eq!(walk(&bytes), Err(WalDamage::WrongPageAddress { lsn, found }));
    let facts = walk_as(&bytes, Extent::Prefix, 8192).unwrap();
    assert!(facts.valid_end <= lsn);
    assert_eq!(facts.end, WalkEnd::Stopped(WalDamage::WrongPageAddress { lsn, found }));
}

#[test]
fn a_zeroed_page_is_not_an_unknown_one() {
    let lsn = Lsn((NUMBER << 20) + PAGE_BYTES as u64);
    let mut bytes = segment();
    bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(0);
    assert_eq!(walk(&bytes), Err(WalDamage::ZeroedPage { lsn }));
    bytes[PAGE_BYTES..2 * PAGE_BYTES].fill(0x20);
    assert_eq!(walk(&bytes), Err(WalDamage::UnknownMagic { lsn, found: 0x2020 }));
    assert_eq!(walk(&vec![0; 1 << 20]), Err(WalDamage::ZeroedPage { lsn: Lsn(NUMBER << 20) }));
}

#[test]
fn a_file_that_is_cut_or_too_long_is_refused() {
    let bytes = segment();
    let wrong = |found| Err(WalDamage::WrongSize { expected: 1 << 20, found });
    assert_eq!(walk(&bytes[..bytes.len() - 1]), wrong((1 << 20) - 1));
    assert_eq!(walk(&bytes[..30]), wrong(30));
    assert_eq!(walk(&[]), wrong(0));
    let long = [&bytes[..], b"x"].concat();
    assert_eq!(walk(&long), wrong((1 << 20) + 1));
    assert_eq!(walk_as(&long, Extent::Prefix, 4096), wrong((1 << 20) + 1));
    assert_eq!(walk_as(&bytes[..30], Extent::Prefix, 4096), wrong(30));
}

#[test]
fn a_broken_link_names_both_ends() {
    let mut builder = builder();
    let first = builder.add(&RecordSpec::filler(10));
    builder.previous = Lsn(first.0 - 8);
    let lsn = builder.add(&RecordSpec::filler(10));
    let found = Lsn(first.0 - 8);
    let bytes = builder.into_segments().swap_remove(0);
    let expected = ExpectedLink::Record(first);
    assert_eq!(walk(&bytes), Err(WalDamage::BadPreviousLink { lsn, expected, found }));
}

/// PostgreSQL refuses to begin a record there ("contrecord is requested", `XLogReadRecord`).
#[test]
fn a_first_page_that_continues_nothing_and_says_it_does_is_refused() {
    let mut bytes = segment();
    assert_eq!((bytes[2], &bytes[16..20]), (2, &[0; 4][..]));
    bytes[2] |= 1;
    let damage = WalDamage::BadPageFlags { lsn: Lsn(NUMBER << 20), found: 3 };
    assert_eq!(walk(&bytes), Err(damage.clone()));
    assert_eq!(walk_as(&bytes, Extent::Prefix, 4096), Err(damage));
}

/// Bytes that PostgreSQL does not check either: padding, hints, and a remainder
/// length where nothing is continued.
fn is_unchecked(bytes: &[u8], at: usize, bit: u8) -> bool {
    let page = at / PAGE_BYTES * PAGE_BYTES;
    let continued = bytes[page + 2] & 1 != 0;
    match at - page {
        2 => bit & 0x0C != 0,
        16..20 => !continued,
        20..24 => true,
        _ => false,
    }
}

/// Where the records of a segment without padding between them end.
fn aligned_segment() -> (Vec<u8>, usize) {
    let mut builder = builder();
    for at in 0..40usize {
        // 24 + 2 + n is a multiple of 8: no byte of padding.
        builder.add(&RecordSpec::filler(6 + at % 20 * 8));
    }
    builder.add(&RecordSpec::filler(9_003));
    let end = (builder.lsn().0 - (NUMBER << 20)) as usize;
    builder.add(&RecordSpec::switch());
    (builder.into_segments().swap_remove(0), end)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_flipped_bit_before_the_end_is_always_found(at: prop::sample::Index, bit in 0u8..8) {
        let (mut bytes, end) = aligned_segment();
        let at = at.index(end);
        prop_assume!(!is_unchecked(&bytes, at, 1 << bit));
        bytes[at] ^= 1 << bit;
        prop_assert!(walk(&bytes).is_err(), "byte {at}");
    }

    #[test]
    fn blocks_of_any_size_give_the_same_facts(
        blocks in proptest::collection::vec(1usize..70_000, 1..30), prefix: bool, cut in 0usize..200_000,
    ) {
        let bytes = segment();
        let (extent, bytes) = if prefix {
            (Extent::Prefix, &bytes[..cut])
        } else {
            (Extent::Whole, &bytes[..])
        };
        let mut walk = SegmentWalk::new(expectation(NUMBER, extent));
        let mut rest = bytes;
        for block in blocks.iter().cycle() {
            if rest.is_empty() { break }
            let (head, tail) = rest.split_at((*block).min(rest.len()));
            walk.feed(head).unwrap();
            rest = tail;
        }
        prop_assert_eq!(walk.finish(), walk_as(bytes, extent, usize::MAX));
    }

    #[test]
    fn blocks_of_any_size_give_the_same_damage(at in 0usize..120_000, value: u8, block in 1usize..300) {
        let mut bytes = segment();
        bytes[at] = value;
        for extent in [Extent::Whole, Extent::Prefix] {
            let bytes = &bytes[..130_000];
            prop_assert_eq!(walk_as(bytes, extent, block), walk_as(bytes, extent, usize::MAX));
        }
    }

    #[test]
    fn no_bytes_panic(
        noise in proptest::collection::vec((0usize..100_000, any::<u8>()), 0..30), cut in 0usize..100_000,
    ) {
        let mut bytes = segment();
        for (at, byte) in noise { bytes[at] = byte; }
        let _ = walk(&bytes);
        let _ = walk_as(&bytes[..cut], Extent::Prefix, 777);
        let mut walk = SegmentWalk::new(expectation(NUMBER, Extent::Prefix));
        let _ = walk.feed(&bytes);
        if let Ok((_, Some(carry))) = walk.finish_with_carry() {
            let mut next = SegmentWalk::after(carry, expectation(NUMBER + 1, Extent::Prefix));
            let _ = next.feed(&bytes);
        }
    }
}
