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
