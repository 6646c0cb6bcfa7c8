//! The window and the gaps, by values alone.

use super::*;
use crate::plan::examples::{Archive, backup, seg};

fn three_backups() -> Vec<crate::format::Committed> {
    vec![
        backup(1, 1, seg(2), seg(3), 100),
        backup(2, 1, seg(8), seg(9), 200),
        backup(3, 1, seg(14), seg(15), 300),
    ]
}

#[test]
fn gaps_are_the_holes_between_stretches_of_one_timeline() {
    let archive = Archive::default().wal(1, 1, 4).wal(1, 6, 9).wal(1, 10, 12).wal(2, 20, 22);
    let expected =
        [Gap { start_lsn: seg(4), end_lsn: seg(6) }, Gap { start_lsn: seg(9), end_lsn: seg(10) }];
    assert_eq!(gaps(&archive.coverage, Timeline(1)), expected);
    assert_eq!(gaps(&archive.coverage, Timeline(2)), [], "one stretch has no hole");
    assert_eq!(gaps(&archive.coverage, Timeline(3)), [], "nothing is stored of it");
}

#[test]
fn the_window_opens_at_the_oldest_backup_with_unbroken_wal() {
    let archive = Archive::with_backups(three_backups()).wal(1, 1, 20);
    let whole = archive.holdings();
    let found = window(&whole).unwrap();
    assert_eq!((found.earliest_lsn(), found.latest_lsn()), (seg(3), seg(20)));
    assert_eq!(found.earliest_time(), PgTimestamp(100));
    assert_eq!(found.newest.backup.stop_lsn, seg(15));
    let archive = Archive::with_backups(three_backups()).wal(1, 1, 5).wal(1, 8, 20);
    let broken = archive.holdings();
    let found = window(&broken).unwrap();
    assert_eq!((found.earliest_lsn(), found.latest_lsn()), (seg(9), seg(20)), "behind the gap");
}

#[test]
fn a_backup_without_its_own_wal_does_not_open_a_window() {
    assert_eq!(window(&Archive::default().wal(1, 1, 20).holdings()), None);
    let archive = Archive::with_backups(three_backups());
    assert_eq!(window(&archive.holdings()), None, "no WAL at all");
    let archive = Archive::with_backups(three_backups()).wal(1, 8, 11);
    let holdings = archive.holdings();
    let found = window(&holdings).unwrap();
    assert_eq!((found.earliest_lsn(), found.latest_lsn()), (seg(9), seg(11)), "the middle one");
}

#[test]
fn the_window_follows_the_newest_timeline_across_the_fork() {
    let archive = Archive::with_backups(three_backups())
        .wal(1, 1, 20)
        .wal(2, 10, 30)
        .history(2, &[(1, seg(10))]);
    let holdings = archive.holdings();
    let found = window(&holdings).unwrap();
    assert_eq!(found.way.timeline(), Timeline(2));
    assert_eq!((found.earliest_lsn(), found.latest_lsn()), (seg(3), seg(30)));
    assert_eq!(found.newest.backup.stop_lsn, seg(9), "the backup behind the fork is elsewhere");
}

#[test]
fn a_newest_timeline_that_no_backup_leads_to_does_not_hide_the_window() {
    // Timeline 3 left timeline 1 before the first backup; of timeline 4 there is no history.
    for stray in [3, 4] {
        let archive = Archive::with_backups(three_backups())
            .wal(1, 1, 20)
            .wal(stray, 1, 30)
            .history(3, &[(1, seg(1))]);
        let holdings = archive.holdings();
        let found = window(&holdings).unwrap();
        assert_eq!(found.way.timeline(), Timeline(1));
        assert_eq!((found.earliest_lsn(), found.latest_lsn()), (seg(3), seg(20)));
    }
}

fn lsns(found: &[Stretch<'_>]) -> Vec<(Lsn, Lsn)> {
    found.iter().map(|one| (one.start_lsn, one.end_lsn)).collect()
}

#[test]
fn what_can_be_reached_begins_where_a_backup_is_consistent_and_ends_at_a_hole() {
    let archive = Archive::with_backups(three_backups()).wal(1, 1, 5).wal(1, 8, 12).wal(1, 14, 20);
    let holdings = archive.holdings();
    let way = TimelineHistory::first();
    let found = stretches(&holdings, &way);
    assert_eq!(lsns(&found), [(seg(3), seg(5)), (seg(9), seg(12)), (seg(15), seg(20))]);
    assert_eq!(found[1].earliest_time(), PgTimestamp(200));
    let archive = Archive::with_backups(three_backups()).wal(1, 1, 20);
    assert_eq!(lsns(&stretches(&archive.holdings(), &way)), [(seg(3), seg(20))]);
}

#[test]
fn holes_are_told_up_to_the_end_of_what_is_stored_or_wanted() {
    let way = TimelineHistory::first();
    let hole =
        |start, end| Hole { timeline: Timeline(1), start_lsn: seg(start), end_lsn: seg(end) };
    let archive = Archive::default().wal(1, 1, 5).wal(1, 8, 12).wal(1, 14, 20);
    let found =
        |from, to| holes(&way, &archive.coverage, crate::plan::examples::SIZE, seg(from), seg(to));
    assert_eq!(found(2, 3), [hole(5, 8), hole(12, 14)]);
    assert_eq!(found(9, 10), [hole(12, 14)]);
    assert_eq!(found(15, 16), []);
    assert_eq!(found(15, 22), [hole(20, 22)]);
    assert_eq!(found(22, 23), [hole(22, 23)]);
    assert_eq!(found(6, 7), [hole(6, 8), hole(12, 14)]);
}

#[test]
fn a_hole_at_a_fork_belongs_to_who_owns_its_first_byte() {
    let archive = Archive::default().wal(1, 1, 8).wal(2, 12, 30).history(2, &[(1, seg(10))]);
    let way = &archive.histories[&Timeline(2)];
    let size = crate::plan::examples::SIZE;
    let found = holes(way, &archive.coverage, size, seg(2), seg(3));
    let hole = Hole { timeline: Timeline(1), start_lsn: seg(8), end_lsn: seg(12) };
    assert_eq!(found, [hole]);
    let whole = filled(&archive.coverage, way, &found);
    assert_eq!(holes(way, &whole, size, seg(2), seg(3)), []);
    assert_eq!(whole[&Timeline(2)], [(seg(10), seg(30))]);
}

#[test]
fn holes_that_retention_made_between_backups_that_stand_alone_harm_nobody() {
    let archive = Archive::with_backups(three_backups()).wal(1, 2, 4).wal(1, 8, 10).wal(1, 14, 20);
    let holdings = archive.holdings();
    let newest = |backup: &crate::format::Committed| backup.start_lsn == seg(14);
    assert_eq!(harmful_holes(&holdings, newest), []);
    assert_eq!(harmful_holes(&holdings, |_| true).len(), 2);
    // One of them lacks a part of its own.
    let archive = Archive::with_backups(three_backups()).wal(1, 2, 4).wal(1, 14, 20);
    let own = harmful_holes(&archive.holdings(), newest);
    let hole = Hole { timeline: Timeline(1), start_lsn: seg(8), end_lsn: seg(14) };
    assert_eq!(own, [hole]);
}

#[test]
fn a_hole_takes_the_moments_up_to_the_next_backup_behind_it() {
    let way = TimelineHistory::first();
    let whole = Archive::with_backups(three_backups()).wal(1, 1, 20);
    let cut = without(&whole.coverage, Timeline(1), seg(10), seg(11));
    assert_eq!(cut[&Timeline(1)], [(seg(1), seg(10)), (seg(11), seg(20))]);
    let (before, holdings) = (whole.holdings(), whole.holdings());
    let after = Holdings { coverage: &cut, ..holdings };
    let after = stretches(&after, &way);
    let found = lost(&stretches(&before, &way), &after);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].after_lsn, Some(seg(10)));
    assert_eq!((found[0].start_lsn, found[0].end_lsn), (seg(10), seg(15)));
    assert_eq!(found[0].before.unwrap().earliest_time(), PgTimestamp(300));
}

#[test]
fn a_lost_backup_takes_only_what_no_other_reaches() {
    let way = TimelineHistory::first();
    let all = Archive::with_backups(three_backups()).wal(1, 1, 20);
    let before = all.holdings();
    let without_one = |gone: usize| {
        let mut backups = three_backups();
        backups.remove(gone);
        let left = Archive::with_backups(backups).wal(1, 1, 20);
        let found = lost(&stretches(&before, &way), &stretches(&left.holdings(), &way));
        found.iter().map(|one| (one.start_lsn, one.end_lsn)).collect::<Vec<_>>()
    };
    assert_eq!(without_one(1), [], "recovery from the one before it takes longer, and no more");
    assert_eq!(without_one(0), [(seg(3), seg(9))]);
    let nothing = Archive::default().wal(1, 1, 20);
    let found = stretches(&before, &way);
    let found = lost(&found, &stretches(&nothing.holdings(), &way));
    assert_eq!((found[0].after_lsn, found[0].start_lsn, found[0].end_lsn), (None, seg(3), seg(20)));
}

proptest::proptest! {
    /// Against the plain definition: a position is reachable if some backup reaches it.
    #[test]
    fn stretches_and_losses_agree_with_their_definition(
        begins in proptest::collection::vec((0u64..40, 1u64..3), 0..6),
        stored in proptest::collection::vec(proptest::bool::ANY, 45),
        gone in 0usize..45,
    ) {
        let way = TimelineHistory::first();
        let mut begins = begins;
        begins.sort_unstable();
        let backups: Vec<_> = begins
            .iter()
            .enumerate()
            .map(|(n, (start, len))| {
                backup(i64::try_from(n).unwrap(), 1, seg(*start), seg(start + len), 0)
            })
            .collect();
        let archive = |skip: Option<usize>| {
            let mut archive = Archive::with_backups(backups.clone());
            for number in (0..45).filter(|n| stored[*n] && Some(*n) != skip) {
                let number = number as u64;
                let ranges = archive.coverage.entry(Timeline(1)).or_default();
                super::add(ranges, seg(number), seg(number + 1));
            }
            archive
        };
        let reaches = |archive: &Archive, at: u64| {
            archive.backups.iter().any(|backup| {
                let size = crate::plan::examples::SIZE;
                let end = unbroken_end(&way, &archive.coverage, backup.start_lsn, size);
                backup.stop_lsn <= seg(at) && seg(at) <= end
            })
        };
        let (before, after) = (archive(None), archive(Some(gone)));
        let (whole, left) = (before.holdings(), after.holdings());
        let (whole, left) = (stretches(&whole, &way), stretches(&left, &way));
        let lost = lost(&whole, &left);
        for at in 0..45u64 {
            let inside = |found: &[Stretch<'_>]| {
                found.iter().any(|one| one.start_lsn <= seg(at) && seg(at) <= one.end_lsn)
            };
            proptest::prop_assert_eq!(inside(&whole), reaches(&before, at));
            proptest::prop_assert_eq!(inside(&left), reaches(&after, at));
            if reaches(&before, at) && !reaches(&after, at) {
                let told = lost.iter().any(|one| one.start_lsn <= seg(at) && seg(at) <= one.end_lsn);
                proptest::prop_assert!(told, "segment {} is lost and not told", at);
            }
        }
        for one in &lost {
            proptest::prop_assert!(one.start_lsn <= one.end_lsn);
        }
    }

    #[test]
    fn filling_every_hole_leaves_none(stored in proptest::collection::vec(proptest::bool::ANY, 20)) {
        let way = TimelineHistory::first();
        let mut archive = Archive::default();
        for number in (0..20).filter(|n| stored[*n]) {
            let number = number as u64;
            let ranges = archive.coverage.entry(Timeline(1)).or_default();
            super::add(ranges, seg(number), seg(number + 1));
        }
        let size = crate::plan::examples::SIZE;
        let found = holes(&way, &archive.coverage, size, seg(0), seg(20));
        let whole = filled(&archive.coverage, &way, &found);
        proptest::prop_assert_eq!(holes(&way, &whole, size, seg(0), seg(20)), []);
        proptest::prop_assert_eq!(unbroken_end(&way, &whole, seg(0), size), seg(20));
        for hole in &found {
            for (number, is_stored) in (0..).zip(&stored) {
                let inside = hole.start_lsn <= seg(number) && seg(number) < hole.end_lsn;
                proptest::prop_assert!(!inside || !is_stored);
            }
        }
    }
}
