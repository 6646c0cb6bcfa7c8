mod acknowledging;
mod starts;

use proptest::prelude::*;

use super::*;

const SIZE: SegmentSize = SegmentSize::DEFAULT;

fn policy(synchronous: bool) -> CutPolicy {
    CutPolicy { rpo: Duration::from_secs(1), synchronous, uploads_max: 4 }
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn nothing_received_is_never_cut() {
    let uncut = Uncut { since: None, commits: 1, hurry: true };
    assert_eq!(when_to_cut(&policy(true), &uncut, 0, seconds(9)), Cut::Wait);
}

#[test]
fn by_default_wal_is_cut_when_it_is_as_old_as_may_be_lost() {
    let uncut = Uncut { since: Some(seconds(5)), commits: 1, hurry: false };
    assert_eq!(when_to_cut(&policy(false), &uncut, 0, seconds(5)), Cut::At(seconds(6)));
    assert_eq!(when_to_cut(&policy(false), &uncut, 3, seconds(6)), Cut::Now);
    assert_eq!(when_to_cut(&policy(false), &uncut, 4, seconds(60)), Cut::Wait, "no upload is free");
}

#[test]
fn a_synchronous_commit_is_cut_at_once_and_other_wal_is_not() {
    let commit = Uncut { since: Some(seconds(5)), commits: 1, hurry: false };
    let other = Uncut { commits: 0, ..commit };
    assert_eq!(when_to_cut(&policy(true), &commit, 3, seconds(5)), Cut::Now);
    assert_eq!(when_to_cut(&policy(true), &commit, 4, seconds(5)), Cut::Wait, "they gather");
    assert_eq!(when_to_cut(&policy(true), &other, 0, seconds(5)), Cut::At(seconds(6)));
}

#[test]
fn whoever_shuts_down_is_not_made_to_wait() {
    let uncut = Uncut { since: Some(seconds(5)), commits: 0, hurry: true };
    assert_eq!(when_to_cut(&policy(false), &uncut, 0, seconds(5)), Cut::Now);
}

#[test]
fn the_end_of_a_unit_is_a_piece_of_its_own_only_when_it_is_small_or_commits_wait() {
    assert!(!tail_is_cut(&policy(false), 0, 16, false), "nothing is left");
    assert!(tail_is_cut(&policy(false), 4, 16, true));
    assert!(!tail_is_cut(&policy(false), 5, 16, true));
    assert!(tail_is_cut(&policy(true), 5, 16, true));
    assert!(!tail_is_cut(&policy(true), 5, 16, false));
}

#[test]
fn what_is_stored_but_was_not_received_is_not_acknowledged() {
    let mut progress = Progress::begin(Lsn(100));
    progress.store(Lsn(100), Lsn(500));
    assert_eq!(progress.flush_lsn(), Lsn(100));
    progress.receive(Lsn(300));
    assert_eq!((progress.write_lsn(), progress.flush_lsn()), (Lsn(300), Lsn(300)));
    progress.receive(Lsn(600));
    assert_eq!((progress.write_lsn(), progress.flush_lsn()), (Lsn(600), Lsn(500)));
    assert_eq!(progress.stored_lsn(), Lsn(500));
}

proptest! {
    /// However pieces follow each other, merges cover pieces that are stored, without a hole, are
    /// never larger than allowed, and leave few pieces behind.
    #[test]
    fn merges_join_adjacent_stored_pieces_and_leave_few(
        bursts in prop::collection::vec((1usize..200, prop_oneof![1u32..600, 1u32..60_000]), 1..20),
        order in any::<prop::sample::Index>(),
    ) {
        let mut merges = Merges::default();
        let mut at = 0;
        let mut pieces = Vec::new();
        for (count, length) in bursts {
            for _ in 0..count {
                pieces.push((at, at + length));
                at += length;
            }
        }
        let late = order.index(pieces.len());
        let mut stored = BTreeMap::new();
        let late_piece = pieces.remove(late);
        for (start, end) in pieces.into_iter().chain([late_piece]) {
            merges.store(start, end);
            stored.insert(start, end);
            while let Some(merge) = merges.next_merge() {
                prop_assert!(merge.end - merge.start <= MERGE_BYTES_MAX);
                let mut covered = merge.start;
                while covered < merge.end {
                    covered = stored[&covered];
                }
                prop_assert_eq!(covered, merge.end);
                stored.retain(|start, _| !(merge.start..merge.end).contains(start));
                stored.insert(merge.start, merge.end);
                merges.merged(merge);
            }
        }
        let few = 8 * MERGE_COUNT + 2 * MERGE_COUNT * (at / MERGE_BYTES_MAX + 1) as usize;
        prop_assert!(stored.len() <= few, "{} pieces for {at} bytes", stored.len());
    }
}

fn seg(n: u64) -> Lsn {
    SIZE.start_of(n)
}

/// Timeline 2 forks off in the middle of segment 4.
fn forked() -> TimelineHistory {
    TimelineHistory::parse(Timeline(2), b"1\t0/4500000\tno recovery target specified\n").unwrap()
}

const FORK: Lsn = Lsn(0x450_0000);

fn coverage(parts: &[(u32, Lsn, Lsn)]) -> Coverage {
    let mut coverage = Coverage::new();
    for &(timeline, from, to) in parts {
        coverage.entry(Timeline(timeline)).or_default().push((from, to));
    }
    coverage
}

fn situation<'a>(
    history: &'a TimelineHistory,
    coverage: &'a Coverage,
    slot_lsn: Option<Lsn>,
    flush_lsn: Lsn,
) -> Situation<'a> {
    Situation {
        history,
        coverage,
        slot_lsn,
        slot_is_new: false,
        resume_lsn: None,
        flush_lsn,
        segment_size: SIZE,
    }
}

#[test]
fn an_empty_repository_begins_at_the_slot_or_else_at_the_end_of_the_servers_wal() {
    let (first, nothing) = (TimelineHistory::first(), Coverage::new());
    let flush = Lsn(seg(7).0 + 0x1234);
    let at = |slot| start_of(&situation(&first, &nothing, slot, flush));
    assert_eq!(at(None), Start { timeline: Timeline(1), lsn: seg(7), first_missing: flush });
    let slot = Lsn(seg(5).0 + 8);
    assert_eq!(at(Some(slot)), Start { timeline: Timeline(1), lsn: seg(5), first_missing: slot });
}

#[test]
fn streaming_goes_on_at_the_first_byte_that_is_not_stored() {
    let first = TimelineHistory::first();
    let stored_end = Lsn(seg(6).0 + 0x2000);
    let stored = coverage(&[(1, seg(2), seg(4)), (1, seg(5), stored_end)]);
    let flush = seg(9);
    let at = |slot| start_of(&situation(&first, &stored, slot, flush));
    let expected = Start { timeline: Timeline(1), lsn: seg(6), first_missing: stored_end };
    assert_eq!(at(Some(stored_end)), expected);
    assert_eq!(at(Some(seg(5))), expected, "archive_command stored what the slot still holds");
    assert_eq!(at(Some(seg(8))), expected, "the slot is ahead of what is stored");
    let hole = Start { timeline: Timeline(1), lsn: seg(4), first_missing: seg(4) };
    assert_eq!(at(Some(seg(3))), hole, "the server still has what is missing");
}

#[test]
fn what_uploads_left_out_that_overtook_each_other_is_asked_for_where_no_slot_tells() {
    let first = TimelineHistory::first();
    let flush = seg(90);
    // A receiver died while a part of segment 42 was on its way, and WAL behind it stood already.
    let hole = Lsn(seg(42).0 + 0x4000);
    let stored = coverage(&[(1, seg(2), seg(4)), (1, seg(5), hole), (1, seg(43), seg(70))]);
    let start = Start { timeline: Timeline(1), lsn: seg(42), first_missing: hole };
    let unknown = situation(&first, &stored, None, flush);
    assert_eq!(start_of(&unknown), start);
    let new = Situation { slot_lsn: Some(seg(80)), slot_is_new: true, ..unknown };
    assert_eq!(start_of(&new), start, "a slot that was just made says nothing");
    let behind = Start { timeline: Timeline(1), lsn: seg(70), first_missing: seg(70) };
    let known = Situation { slot_lsn: Some(seg(60)), ..unknown };
    assert_eq!(start_of(&known), behind, "what the slot passed was stored");
    let resumed = Situation { resume_lsn: Some(seg(60)), ..unknown };
    assert_eq!(start_of(&resumed), behind, "this process has stored it");
    // None of them gets further ahead than this.
    let older = coverage(&[(1, seg(2), seg(4)), (1, seg(5), seg(70))]);
    assert_eq!(start_of(&situation(&first, &older, None, flush)), behind);
    let mut progress = Progress::begin(seg(4));
    progress.receive(seg(4 + AHEAD_SEGMENTS));
    assert!(!progress.is_far_ahead(SIZE));
    progress.receive(Lsn(seg(4 + AHEAD_SEGMENTS).0 + 1));
    assert!(progress.is_far_ahead(SIZE));
}

#[test]
fn a_stream_that_had_stored_nothing_yet_is_taken_up_where_it_began() {
    let (first, nothing) = (TimelineHistory::first(), Coverage::new());
    let before = situation(&first, &nothing, None, seg(9));
    let start = start_of(&Situation { resume_lsn: Some(seg(3)), ..before });
    assert_eq!((start.lsn, start.first_missing), (seg(3), seg(3)));
}

#[test]
fn after_a_failover_the_old_timeline_is_followed_to_the_fork_and_then_left() {
    let history = forked();
    let flush = seg(6);
    let within = Lsn(FORK.0 - 0x1000);
    let stored = coverage(&[(1, seg(2), within)]);
    assert_eq!(
        start_of(&situation(&history, &stored, None, flush)),
        Start { timeline: Timeline(1), lsn: seg(4), first_missing: within }
    );
    // What the dead primary wrote past the fork is stored and does not count.
    let stored = coverage(&[(1, seg(2), Lsn(FORK.0 + 0x5000))]);
    assert_eq!(
        start_of(&situation(&history, &stored, None, flush)),
        Start { timeline: Timeline(2), lsn: seg(4), first_missing: FORK }
    );
}

#[test]
fn a_server_with_less_than_is_stored_is_asked_for_what_it_has() {
    let first = TimelineHistory::first();
    let stored = coverage(&[(1, seg(2), seg(9))]);
    let flush = Lsn(seg(5).0 + 0x100);
    assert_eq!(
        start_of(&situation(&first, &stored, None, flush)),
        Start { timeline: Timeline(1), lsn: seg(5), first_missing: seg(9) }
    );
}

#[test]
fn behind_a_gap_streaming_begins_with_the_oldest_segment_left() {
    let first = TimelineHistory::first();
    let stored = coverage(&[(1, seg(2), seg(4)), (1, seg(7), seg(8))]);
    let start = |n| start_after_gap(&situation(&first, &stored, None, seg(9)), n);
    assert_eq!(start(6).first_missing, seg(6));
    assert_eq!(start(7), Start { timeline: Timeline(1), lsn: seg(7), first_missing: seg(8) });
}

#[test]
fn a_server_on_a_timeline_that_was_left_is_known_as_an_old_primary() {
    let history = forked();
    assert_eq!(superseded_by(Timeline(1), [&history]), Some((Timeline(2), FORK)));
    assert_eq!(superseded_by(Timeline(2), [&history]), None);
    assert_eq!(superseded_by(Timeline(1), [&TimelineHistory::first()]), None);
    let cousin = TimelineHistory::parse(Timeline(3), b"1\t0/3000000\tx\n").unwrap();
    assert_eq!(superseded_by(Timeline(2), [&history, &cousin]), None, "3 is no child of 2");
}

#[test]
fn at_a_switch_the_new_timelines_first_segment_is_asked_for_whole_and_known_from_its_own_name() {
    let start = |stored: &Coverage| start_at_switch(stored, Timeline(2), FORK, SIZE);
    let begin = |first_missing| Start { timeline: Timeline(2), lsn: seg(4), first_missing };
    assert_eq!(start(&Coverage::new()), begin(seg(4)));
    assert_eq!(
        start(&coverage(&[(1, seg(2), FORK)])),
        begin(seg(4)),
        "the old name does not count"
    );
    let beyond = Lsn(FORK.0 + 0x100);
    assert_eq!(start(&coverage(&[(2, seg(4), beyond)])), begin(beyond));
    assert_eq!(start(&coverage(&[(2, seg(5), seg(6))])), begin(seg(4)), "it begins behind a hole");
}
