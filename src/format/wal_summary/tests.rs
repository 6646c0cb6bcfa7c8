//! The summary of a WAL file, mark by mark.

use proptest::prelude::*;

use super::*;
use crate::format::{HEADER_PROBE_BYTES, Header, Kind, Packing, encode_header, parse_header};
use crate::pg::{PgTimestamp, SystemId, TransactionEnd};

fn xact(at: u64, time: i64, committed: bool, dropped_count: u32) -> Mark {
    let end = TransactionEnd {
        committed,
        prepared: false,
        xid: Some(1),
        time: PgTimestamp(time),
        database: None,
        subtransactions: Vec::new(),
        subtransaction_count: 0,
        dropped: Vec::new(),
        dropped_count,
    };
    Mark { lsn: Lsn(at), end_lsn: Lsn(at + 40), event: WalEvent::Transaction(end) }
}

fn restore_point(at: u64, name: &str) -> Mark {
    let event = WalEvent::RestorePoint { name: name.to_owned(), time: PgTimestamp(1 << 49) };
    Mark { lsn: Lsn(at), end_lsn: Lsn(at + 104), event }
}

fn summary(marks: impl IntoIterator<Item = Mark>) -> WalSummary {
    builder(marks).summary
}

fn builder(marks: impl IntoIterator<Item = Mark>) -> SummaryBuilder {
    let mut builder = SummaryBuilder::new(Timeline(3), Lsn(0x100_0000));
    for mark in marks {
        builder.add(&mark);
    }
    builder
}

#[test]
fn times_are_the_earliest_and_the_latest_whatever_their_order() {
    let seen = summary([
        xact(0, 50, true, 0),
        xact(64, 90, false, 0),
        // The clock stepped back.
        xact(128, 20, true, 2),
        xact(192, 60, true, 0),
    ]);
    assert_eq!(seen.xacts, 4);
    assert_eq!(seen.first_xact_time, Some(PgTimestamp(20)));
    assert_eq!(seen.last_xact_time, Some(PgTimestamp(90)), "an abort counts as a stop");
    assert_eq!(seen.last_commit_time, Some(PgTimestamp(60)), "an abort is no commit");
    assert_eq!(seen.dropping_commits, 1);
}

#[test]
fn an_abort_that_drops_files_is_no_dropping_commit() {
    let seen = summary([xact(0, 50, false, 3)]);
    assert_eq!((seen.dropping_commits, seen.last_commit_time), (0, None));
    assert_eq!(summary([]).first_xact_time, None);
}

#[test]
fn restore_points_carry_the_lsn_at_which_recovery_to_them_ends() {
    let seen = summary([restore_point(0x100, "before")]);
    assert_eq!(seen.restore_points[0].lsn, Lsn(0x100 + 104));
    assert_eq!((seen.restore_points.len(), seen.restore_points_unlisted), (1, 0));
}

proptest! {
    #[test]
    fn parts_that_are_absorbed_in_order_tell_what_the_whole_tells(
        kinds in proptest::collection::vec((0u32..4, -5i64..5, 0usize..64), 0..120),
        cuts in proptest::collection::vec(0usize..120, 0..6),
    ) {
        let marks: Vec<Mark> = (0..).zip(&kinds).map(|(at, (kind, time, len))| match kind {
            0 => restore_point(at, &"\u{1}".repeat(*len)),
            kind => xact(at, *time, *kind > 1, kind - 1),
        }).collect();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(marks.len())).collect();
        cuts.extend([0, marks.len()]);
        cuts.sort_unstable();
        let mut joined = builder([]);
        for pair in cuts.windows(2) {
            joined.absorb(builder(marks[pair[0]..pair[1]].iter().cloned()));
        }
        prop_assert_eq!(joined.summary, summary(marks));
    }

    /// A name of 63 control characters takes six bytes for each in JSON. When restore points
    /// were bounded by number alone, 64 of those made a header that no reader accepts, and so
    /// an archived segment that could never be fetched again.
    #[test]
    fn no_restore_points_make_a_header_that_cannot_be_read(
        c in prop_oneof![Just('\u{1}'), Just('"'), Just('\u{fffd}'), Just('a'), any::<char>()],
        len in 0usize..64,
        count in 0u64..200,
    ) {
        let name: String = std::iter::repeat_n(c, len).collect();
        let seen = summary((0..count).map(|n| restore_point(u64::MAX / 2 + n, &name)));
        prop_assert_eq!(seen.restore_points.len() as u64 + seen.restore_points_unlisted, count);
        prop_assert!(count < 20 || seen.restore_points.len() >= 20, "room is used");
        let mut header = Header::new(Kind::Segment, "x".repeat(100), SystemId(u64::MAX), Packing::Zstd);
        header.wal = Some(seen);
        let bytes = encode_header(&header).unwrap();
        prop_assert!((bytes.len() as u64) < HEADER_PROBE_BYTES);
        prop_assert_eq!(parse_header(&bytes, bytes.len() as u64).unwrap().0, header);
    }
}
