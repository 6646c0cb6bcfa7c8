//! Joining segments, against a count over all records at once.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::pg::{Lsn, PgTimestamp, RecordHeader, TransactionEnd, WalEvent, WalRecord};
use crate::plan::log::filter::{Filter, Kinds};
use crate::plan::log::fold::{Pass, SegmentFold};

/// One record of a made-up history.
#[derive(Debug, Clone)]
enum Made {
    Work { xid: u32 },
    End { xid: u32, subtransactions: Vec<u32>, committed: bool },
    Snapshot { next_xid: u32 },
}

/// Turns choices into a history that could be: ids are given out in order, and nothing follows an end.
fn history(choices: &[(u8, u8)]) -> Vec<Made> {
    let mut next = 100;
    let mut open: Vec<Vec<u32>> = Vec::new();
    let mut made = Vec::new();
    for &(what, which) in choices {
        let at = usize::from(which) % open.len().max(1);
        match what % 8 {
            0 | 1 => {
                open.push(vec![next]);
                made.push(Made::Work { xid: next });
                next += 1;
            }
            2 | 3 if !open.is_empty() => {
                let xids = &open[at];
                made.push(Made::Work { xid: xids[usize::from(what) % xids.len()] });
            }
            4 if !open.is_empty() => {
                open[at].push(next);
                made.push(Made::Work { xid: next });
                next += 1;
            }
            5 | 6 if !open.is_empty() => {
                let xids = open.remove(at);
                let subtransactions = xids[1..].to_vec();
                made.push(Made::End { xid: xids[0], subtransactions, committed: what % 8 == 5 });
            }
            _ => made.push(Made::Snapshot { next_xid: next }),
        }
    }
    made
}

fn fold(segment: &[(u64, Made)], keep: Keep, entries_max: usize) -> Vec<SegmentDigest> {
    let filter = Filter {
        since: None,
        until: None,
        xid: None,
        kinds: Kinds { aborts: true, ..Kinds::USUAL },
        large_delete_rows: 10,
    };
    let mut digests: Vec<SegmentDigest> = Vec::new();
    let mut pass = Pass { entries_max, ..Pass::whole(keep, Lsn(u64::MAX)) };
    loop {
        let mut fold = SegmentFold::new(pass.clone());
        for (lsn, made) in segment {
            add(&mut fold, *lsn, made, &filter);
        }
        let digest = fold.finish();
        let cut = digest.cut;
        digests.push(digest);
        match cut {
            Some(cut) => pass = pass.beyond(cut),
            None => return digests,
        }
    }
}

fn add(fold: &mut SegmentFold, lsn: u64, made: &Made, filter: &Filter) {
    let mut header = RecordHeader {
        total_bytes: 24,
        xid: 0,
        previous: Lsn(0),
        info: 0,
        resource_manager: 21,
        crc: 0,
    };
    let mut body = Vec::new();
    let mut event = None;
    match made {
        Made::Work { xid } => header.xid = *xid,
        Made::Snapshot { next_xid } => {
            (header.resource_manager, header.info) = (8, 0x10);
            body = vec![255, 24];
            body.extend([0; 12]);
            body.extend(next_xid.to_le_bytes());
            body.extend([0; 8]);
        }
        Made::End { xid, subtransactions, committed } => {
            (header.resource_manager, header.xid) = (1, *xid);
            event = Some(WalEvent::Transaction(TransactionEnd {
                committed: *committed,
                prepared: false,
                xid: Some(*xid),
                time: PgTimestamp(lsn.cast_signed()),
                database: None,
                subtransactions: subtransactions.clone(),
                subtransaction_count: subtransactions.len() as u32,
                dropped: Vec::new(),
                dropped_count: 0,
            }));
        }
    }
    header.total_bytes += body.len() as u32;
    let place = (Lsn(lsn), Lsn(lsn + 8));
    fold.add(&WalRecord::for_test(place, header, event.as_ref(), &body), filter);
}

/// What is told: where, how many records, whether that is exact.
fn told(
    history: &[Made],
    per_segment: usize,
    order: Keep,
    entries_max: usize,
) -> Vec<(u64, u64, bool)> {
    let numbered: Vec<(u64, Made)> = (0..).step_by(8).zip(history.iter().cloned()).collect();
    let mut segments: Vec<&[(u64, Made)]> = numbered.chunks(per_segment).collect();
    if order == Keep::Newest {
        segments.reverse();
    }
    let mut assembler = Assembler::new(order);
    let mut entries = Vec::new();
    for segment in segments {
        let digests = fold(segment, order, entries_max);
        let last = digests.len() - 1;
        for (at, digest) in digests.into_iter().enumerate() {
            entries.extend(assembler.add(digest, at == 0, at == last));
        }
    }
    entries.extend(assembler.flush());
    let told = entries.into_iter().map(|entry| match entry.found {
        Found::Transaction(end) => (entry.lsn.0, end.tally.records, end.is_exact),
        other => unreachable!("{other:?}"),
    });
    told.collect()
}

/// The same by looking at everything: all records, and whether a snapshot stands before the first of them.
fn truth(history: &[Made]) -> Vec<(u64, u64, bool)> {
    let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
    let mut first_next = None;
    let mut all = Vec::new();
    for (lsn, made) in (0..).step_by(8).zip(history) {
        match made {
            Made::Work { xid } => *counts.entry(*xid).or_default() += 1,
            Made::Snapshot { next_xid } => first_next = first_next.or(Some(*next_xid)),
            Made::End { xid, subtransactions, .. } => {
                let xids = std::iter::once(xid).chain(subtransactions);
                let records = xids.filter_map(|xid| counts.get(xid)).sum::<u64>() + 1;
                all.push((lsn, records, first_next.is_some_and(|next| *xid >= next)));
            }
        }
    }
    all
}

proptest! {
    /// Whatever the order, the borders of segments and the room for entries.
    #[test]
    fn both_orders_tell_what_is_there(
        choices in proptest::collection::vec(any::<(u8, u8)>(), 0..120),
        per_segment in 1usize..40,
        entries_max in 1usize..6,
    ) {
        let history = history(&choices);
        let mut expected = truth(&history);
        prop_assert_eq!(&told(&history, per_segment, Keep::Oldest, entries_max), &expected);
        expected.reverse();
        let newest = told(&history, per_segment, Keep::Newest, entries_max);
        if history.len() / per_segment < LOOK_BACK_MAX as usize {
            prop_assert_eq!(&newest, &expected);
        }
        for (found, expected) in newest.iter().zip(&expected) {
            prop_assert_eq!(found.0, expected.0);
            prop_assert!(found.1 <= expected.1 && (!found.2 || found == expected));
        }
    }
}

#[test]
fn a_transaction_that_began_far_back_does_not_hold_up_the_others() {
    let mut history = vec![Made::Snapshot { next_xid: 5 }, Made::Work { xid: 5 }];
    history.extend((0..200).map(|_| Made::Work { xid: 5 }));
    history.push(Made::End { xid: 5, subtransactions: Vec::new(), committed: true });
    let newest = told(&history, 1, Keep::Newest, 10);
    assert_eq!(newest.len(), 1);
    let (_, records, is_exact) = newest[0];
    assert!(!is_exact && records >= u64::from(LOOK_BACK_MAX), "{records}");
    assert_eq!(told(&history, 1, Keep::Oldest, 10)[0].1, 202);
}
