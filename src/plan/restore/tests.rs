//! Which backup, which way, which target: every border by values alone.

use proptest::prelude::*;

use super::*;
use crate::plan::examples::{Archive, backup, seg};

/// Two backups on timeline 1 with WAL up to segment 20: the first makes every time from
/// 100 reachable, the second every time from 200.
fn two_backups() -> Archive {
    let (old, new) = (
        backup(1, 1, seg(2), Lsn(seg(2).0 + 500), 100),
        backup(2, 1, seg(9), Lsn(seg(9).0 + 500), 200),
    );
    Archive::with_backups([old, new]).wal(1, 1, 20)
}

/// The nearest moments on both sides; nothing where the refusal names one only.
fn sides(refusal: Unreachable) -> Vec<String> {
    match refusal {
        Unreachable::Between { before, after, .. } => vec![before, after],
        _ => Vec::new(),
    }
}

fn on_first(archive: &Archive) -> Vec<Candidate<'_>> {
    candidates(&archive.holdings(), &TimelineHistory::first(), None).unwrap()
}

fn last_xact(time: i64) -> impl Fn(&Candidate<'_>) -> Reach {
    move |_| Reach { last_xact_time: Some(PgTimestamp(time)), last_record_lsn: None }
}

/// The second in which the chosen backup began.
fn chosen(result: Result<Candidate<'_>, Unreachable>) -> String {
    result.unwrap().backup.id.to_string()
}

const OLD: &str = "19700101T000001Z";
const NEW: &str = "19700101T000002Z";

#[test]
fn a_repository_without_backups_reaches_nothing() {
    let archive = Archive::default().wal(1, 1, 20);
    let found = way(&archive.holdings(), TimelineChoice::Latest, None);
    assert_eq!(found, Err(Unreachable::NoBackup));
    let none = candidates(&archive.holdings(), &TimelineHistory::first(), None);
    assert_eq!(none, Err(Unreachable::NotOnTimeline { timeline: Timeline(1) }));
}

#[test]
fn candidates_come_newest_first() {
    let archive = two_backups();
    let ids: Vec<String> = on_first(&archive).iter().map(|c| c.backup.id.to_string()).collect();
    assert_eq!(ids, [NEW, OLD]);
}

#[test]
fn an_inclusive_time_needs_a_later_commit_and_an_exclusive_one_an_equal_one() {
    let archive = two_backups();
    let usable = on_first(&archive);
    let stop =
        |time, inclusive| for_time(&usable, PgTimestamp(time), inclusive, false, last_xact(300));
    assert_eq!(chosen(stop(299, true)), NEW);
    assert!(matches!(stop(300, true), Err(Unreachable::TooLate { .. })), "none is later than 300");
    assert_eq!(chosen(stop(300, false)), NEW, "stops before the commit at 300");
    assert!(matches!(stop(301, false), Err(Unreachable::TooLate { .. })));
}

#[test]
fn a_time_at_which_a_backup_becomes_consistent_is_its_own_only_if_inclusive() {
    let archive = two_backups();
    let usable = on_first(&archive);
    let stop =
        |time, inclusive| for_time(&usable, PgTimestamp(time), inclusive, false, last_xact(300));
    assert_eq!(chosen(stop(200, true)), NEW);
    // A commit at 200 may lie before the new backup's end, and stopping before it would be fatal.
    assert_eq!(chosen(stop(200, false)), OLD);
    assert_eq!(chosen(stop(201, false)), NEW);
    assert_eq!(chosen(stop(199, true)), OLD);
    assert_eq!(chosen(stop(100, true)), OLD);
    assert!(matches!(stop(99, true), Err(Unreachable::TooEarly { .. })));
    assert!(matches!(stop(100, false), Err(Unreachable::TooEarly { .. })));
}

/// The nearest points that a refusal names must be reachable themselves.
#[test]
fn the_nearest_times_that_a_refusal_names_can_be_reached() {
    let archive = two_backups();
    let usable = on_first(&archive);
    for inclusive in [true, false] {
        for last in [100, 101, 102, 199, 200, 201, 202, 300] {
            let stop =
                |time| for_time(&usable, PgTimestamp(time), inclusive, false, last_xact(last));
            let reachable: Vec<i64> = (90..=310).filter(|time| stop(*time).is_ok()).collect();
            let named = |time: i64| PgTimestamp(time).to_string();
            match stop(310).unwrap_err() {
                Unreachable::TooLate { latest, .. } => match reachable.last() {
                    Some(time) => assert_eq!(latest, named(*time), "last commit at {last}"),
                    None => assert_eq!(latest, format!("LSN {}", seg(20))),
                },
                other => panic_with(&other),
            }
            match stop(90).unwrap_err() {
                Unreachable::TooEarly { earliest, .. } => {
                    assert_eq!(earliest, named(100 + i64::from(!inclusive)));
                }
                other => panic_with(&other),
            }
        }
    }
}

#[allow(clippy::panic)]
fn panic_with(error: &Unreachable) {
    panic!("{error}");
}

#[test]
fn without_any_commit_behind_a_backup_no_time_is_promised() {
    let archive = two_backups();
    let usable = on_first(&archive);
    for reach in [
        Reach::default(),
        // The last commit lies inside the oldest backup itself.
        Reach { last_xact_time: Some(PgTimestamp(50)), last_record_lsn: None },
    ] {
        let stopped = for_time(&usable, PgTimestamp(250), true, false, |_| reach);
        let text = stopped.unwrap_err().to_string();
        assert!(text.contains("no commit or abort after the end of a backup"), "{text}");
        assert!(!text.contains("2000-01-01 00:00:00.000049"), "{text}");
    }
}

/// Clocks step back: a commit of time 300 is followed by one of 250. PostgreSQL stops at the
/// first commit that is later than the target, so the latest time is what counts.
#[test]
fn a_clock_that_stepped_back_does_not_take_times_away() {
    let archive = two_backups();
    let usable = on_first(&archive);
    assert_eq!(chosen(for_time(&usable, PgTimestamp(280), true, false, last_xact(300))), NEW);
    // And a newer backup whose clock was behind: 150 is inside the older one's window only.
    let behind = Archive::with_backups([
        backup(1, 1, seg(2), Lsn(seg(2).0 + 500), 180),
        backup(2, 1, seg(9), Lsn(seg(9).0 + 500), 120),
    ])
    .wal(1, 1, 20);
    let usable = on_first(&behind);
    assert_eq!(chosen(for_time(&usable, PgTimestamp(150), true, false, last_xact(300))), NEW);
    let early = for_time(&usable, PgTimestamp(110), true, false, last_xact(300)).unwrap_err();
    let earliest = PgTimestamp(120).to_string();
    assert!(
        matches!(&early, Unreachable::TooEarly { earliest: e, .. } if *e == earliest),
        "{early}"
    );
}

#[test]
fn an_lsn_is_reached_from_the_backups_end_to_the_last_record() {
    let archive = two_backups();
    let usable = on_first(&archive);
    let last = Lsn(seg(19).0 + 0x28);
    let stop = |lsn| {
        let reach = Reach { last_xact_time: None, last_record_lsn: Some(last) };
        for_lsn(&usable, lsn, false, |_| reach)
    };
    let (old_end, new_end) = (Lsn(seg(2).0 + 500), Lsn(seg(9).0 + 500));
    assert_eq!(chosen(stop(new_end)), NEW, "equal to the backup's stop");
    assert_eq!(chosen(stop(Lsn(new_end.0 - 1))), OLD);
    assert_eq!(chosen(stop(old_end)), OLD);
    assert!(matches!(stop(Lsn(old_end.0 - 1)), Err(Unreachable::TooEarly { .. })));
    assert_eq!(chosen(stop(last)), NEW, "equal to the last record's start");
    let late = stop(Lsn(last.0 + 1)).unwrap_err().to_string();
    assert!(late.contains(&format!("lies behind LSN {last}")), "{late}");
    let unread = for_lsn(&usable, seg(10), false, |_| Reach::default());
    assert!(matches!(unread, Err(Unreachable::TooLate { .. })));
}

#[test]
fn what_was_found_needs_a_backup_that_ends_before_it() {
    let archive = two_backups();
    let usable = on_first(&archive);
    let find = |end_lsn| for_found(&usable, &RecoveryPoint::Xid(7), FoundAt { end_lsn }, false);
    assert_eq!(chosen(find(Lsn(seg(9).0 + 500))), NEW);
    assert_eq!(chosen(find(Lsn(seg(9).0 + 499))), OLD);
    assert_eq!(chosen(find(seg(20))), NEW);
    assert!(find(Lsn(seg(2).0 + 499)).is_err());
    assert!(find(Lsn(seg(20).0 + 8)).is_err(), "behind the end of unbroken WAL");
}

#[test]
fn a_gap_ends_what_the_backups_before_it_can_reach() {
    let archive = Archive::with_backups(two_backups().backups).wal(1, 1, 5).wal(1, 8, 20);
    let usable = on_first(&archive);
    let ends: Vec<Lsn> = usable.iter().map(|candidate| candidate.unbroken_end).collect();
    assert_eq!(ends, [seg(20), seg(5)]);
    let reach_of = |candidate: &Candidate<'_>| {
        let time = if candidate.unbroken_end == seg(5) { 150 } else { 300 };
        let last = Lsn(candidate.unbroken_end.0 - 0x28);
        Reach { last_xact_time: Some(PgTimestamp(time)), last_record_lsn: Some(last) }
    };
    assert_eq!(chosen(for_time(&usable, PgTimestamp(149), true, false, reach_of)), OLD);
    assert!(for_time(&usable, PgTimestamp(150), true, false, reach_of).is_err(), "in the gap");
    assert_eq!(chosen(for_time(&usable, PgTimestamp(200), true, false, reach_of)), NEW);
    assert_eq!(chosen(for_lsn(&usable, seg(4), false, reach_of)), OLD);
    assert!(for_lsn(&usable, seg(6), false, reach_of).is_err(), "in the gap");
    assert_eq!(chosen(for_lsn(&usable, seg(10), false, reach_of)), NEW);
}

#[test]
fn a_gap_inside_a_backups_own_wal_makes_it_unusable() {
    let long = backup(1, 1, seg(2), seg(6), 100);
    let archive = Archive::with_backups([long.clone()]).wal(1, 1, 4).wal(1, 5, 20);
    let refused = candidates(&archive.holdings(), &TimelineHistory::first(), None).unwrap_err();
    let expected = Unreachable::NotConsistent {
        id: long.id.clone(),
        start_lsn: seg(2),
        stop_lsn: seg(6),
        unbroken_end: seg(4),
    };
    assert_eq!(refused, expected);
    let whole = Archive::with_backups([long]).wal(1, 2, 6);
    assert_eq!(on_first(&whole)[0].unbroken_end, seg(6), "exactly up to the stop is enough");
}

/// Timeline 2 leaves timeline 1 at segment 10; one backup before the fork, one on the old
/// timeline behind the fork, one on the new timeline.
fn forked() -> Archive {
    Archive::with_backups([
        backup(1, 1, seg(2), seg(3), 100),
        backup(2, 1, seg(12), seg(13), 200),
        backup(3, 2, seg(14), seg(15), 300),
    ])
    .wal(1, 1, 20)
    .wal(2, 10, 30)
    .history(2, &[(1, seg(10))])
}

fn ids_on(archive: &Archive, choice: TimelineChoice, named: Option<&BackupId>) -> Vec<String> {
    let way = way(&archive.holdings(), choice, named).unwrap();
    let usable = candidates(&archive.holdings(), &way, named).unwrap();
    usable.iter().map(|candidate| candidate.backup.id.to_string()).collect()
}

#[test]
fn a_backup_taken_behind_the_fork_serves_only_its_own_branch() {
    let archive = forked();
    let (first, behind, branch) = ("19700101T000001Z", "19700101T000002Z", "19700101T000003Z");
    assert_eq!(ids_on(&archive, TimelineChoice::Latest, None), [branch, first]);
    assert_eq!(ids_on(&archive, TimelineChoice::Number(Timeline(1)), None), [behind, first]);
    let named = archive.backups[1].id.clone();
    assert_eq!(ids_on(&archive, TimelineChoice::Current, Some(&named)), [behind]);
    let way = way(&archive.holdings(), TimelineChoice::Latest, Some(&named)).unwrap();
    let refused = candidates(&archive.holdings(), &way, Some(&named)).unwrap_err();
    assert_eq!(refused, Unreachable::NotOnTimeline { timeline: Timeline(2) });
}

#[test]
fn a_backup_serves_the_new_timeline_if_it_ends_at_the_fork_or_before() {
    let usable = |stop: u64| {
        let archive = Archive::with_backups([backup(1, 1, seg(2), Lsn(stop), 100)])
            .wal(1, 1, 20)
            .wal(2, 10, 30)
            .history(2, &[(1, seg(10))]);
        let way = way(&archive.holdings(), TimelineChoice::Latest, None).unwrap();
        candidates(&archive.holdings(), &way, None).is_ok()
    };
    assert!(usable(seg(10).0), "ends exactly at the fork");
    assert!(!usable(seg(10).0 + 8), "ends behind it");
}

#[test]
fn a_way_needs_its_history_file() {
    let archive =
        Archive::with_backups([backup(1, 1, seg(2), seg(3), 100)]).wal(1, 1, 9).wal(3, 9, 12);
    let missing = Err(Unreachable::NoSuchTimeline(Timeline(3)));
    assert_eq!(way(&archive.holdings(), TimelineChoice::Latest, None), missing);
    assert_eq!(way(&archive.holdings(), TimelineChoice::Number(Timeline(3)), None), missing);
    let current = way(&archive.holdings(), TimelineChoice::Current, None);
    assert_eq!(current, Ok(TimelineHistory::first()));
}

#[test]
fn a_named_backup_is_the_only_candidate() {
    let archive = two_backups();
    let old = archive.backups[0].id.clone();
    assert_eq!(ids_on(&archive, TimelineChoice::Latest, Some(&old)), [OLD]);
    let unknown: BackupId = "20300101T000000Z".parse().unwrap();
    let refused = way(&archive.holdings(), TimelineChoice::Latest, Some(&unknown));
    assert_eq!(refused, Err(Unreachable::NoSuchBackup(unknown)));
    let new = archive.backups[1].id.clone();
    let usable = candidates(&archive.holdings(), &TimelineHistory::first(), Some(&new)).unwrap();
    let early = for_time(&usable, PgTimestamp(150), true, true, last_xact(300)).unwrap_err();
    assert!(early.to_string().ends_with("from that backup"), "{early}");
}

proptest! {
    /// Whatever is chosen can do what was asked, and nothing newer could.
    #[test]
    fn the_chosen_backup_is_the_newest_that_reaches_the_time(
        reaches in proptest::collection::vec(0i64..100, 1..6),
        target in 0i64..120,
        last in 0i64..120,
        inclusive: bool,
    ) {
        let backups = (1u32..).zip(&reaches).map(|(at, reaches_from)| {
            let start = seg(u64::from(at) * 3);
            backup(i64::from(at), 1, start, Lsn(start.0 + 64), *reaches_from)
        });
        let archive = Archive::with_backups(backups).wal(1, 1, 40);
        let usable = on_first(&archive);
        let consistent = |candidate: &Candidate<'_>| {
            let from = candidate.backup.reaches_from.0;
            if inclusive { from <= target } else { from < target }
        };
        let seen = if inclusive { last > target } else { last >= target };
        match for_time(&usable, PgTimestamp(target), inclusive, false, last_xact(last)) {
            Ok(chosen) => {
                prop_assert!(seen && consistent(&chosen));
                let newest = usable.iter().find(|candidate| consistent(candidate)).unwrap();
                prop_assert_eq!(&newest.backup.id, &chosen.backup.id);
            }
            Err(Unreachable::TooEarly { .. }) => prop_assert!(!usable.iter().any(consistent)),
            Err(other) => prop_assert!(!seen, "{}", other),
        }
    }
}

#[test]
fn a_target_in_a_hole_is_refused_with_the_nearest_on_both_sides() {
    let archive = Archive::with_backups([
        backup(1, 1, seg(2), seg(3), 100),
        backup(2, 1, seg(8), seg(9), 200),
    ])
    .wal(1, 1, 5)
    .wal(1, 8, 20);
    let holdings = archive.holdings();
    let usable = candidates(&holdings, &TimelineHistory::first(), None).unwrap();
    let reach_of = |candidate: &Candidate<'_>| Reach {
        last_xact_time: Some(PgTimestamp(if candidate.backup.start_lsn == seg(2) {
            150
        } else {
            300
        })),
        last_record_lsn: Some(Lsn(candidate.unbroken_end.0 - 8)),
    };
    let between = for_time(&usable, PgTimestamp(170), true, false, reach_of).unwrap_err();
    assert_eq!(sides(between), [PgTimestamp(149).to_string(), PgTimestamp(200).to_string()]);
    assert!(for_time(&usable, PgTimestamp(149), true, false, reach_of).is_ok());
    assert!(for_time(&usable, PgTimestamp(200), true, false, reach_of).is_ok());
    let late = for_time(&usable, PgTimestamp(300), true, false, reach_of).unwrap_err();
    assert!(matches!(late, Unreachable::TooLate { .. }), "{late}");
    for inside in [seg(5), seg(7), seg(8)] {
        let between = for_lsn(&usable, inside, false, reach_of).unwrap_err();
        let last = Lsn(seg(5).0 - 8);
        assert_eq!(sides(between), [format!("LSN {last}"), format!("LSN {}", seg(9))]);
    }
    assert!(for_lsn(&usable, Lsn(seg(5).0 - 8), false, reach_of).is_ok());
    let found = FoundAt { end_lsn: Lsn(seg(8).0 + 16) };
    let point = RecoveryPoint::Name("inside the backup".to_owned());
    let between = for_found(&usable, &point, found, false).unwrap_err();
    assert_eq!(sides(between), [format!("LSN {}", seg(5)), format!("LSN {}", seg(9))]);
}
