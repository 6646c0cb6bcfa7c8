//! One segment, record by record: what ends in it, and what its records say of transactions.
//!
//! A transaction's records may stand in many segments. What this segment has of those that end in it
//! goes with their end; the rest is left for [`super::order`], which joins segments in either order.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::filter::Filter;
use super::{
    CHANGES_MAX, CLASS_CHANGES_MAX, ClassChange, Entry, Found, Tally, TransactionFound,
    is_at_or_after,
};
use crate::pg::{
    Fork, HeapChange, Lsn, PG_CLASS_OID, RelFileLocator, StorageChange, TransactionEnd, WalEvent,
    WalRecord,
};

/// Transactions that are open at a time, of which records are counted; subtransactions count by themselves.
pub const OPEN_MAX: usize = 65_536;

/// Ends that one pass over a segment keeps. More of them take another pass.
pub const ENTRIES_MAX: usize = 50_000;

/// Which of the entries are kept if there are more than [`ENTRIES_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// The newest.
    Newest,
    /// The oldest.
    Oldest,
}

/// What a pass over a segment is to find.
#[derive(Debug, Clone)]
pub struct Pass {
    /// Entries whose records begin here are wanted.
    pub within: Range<Lsn>,
    /// Records must end at or before this: where a timeline was left.
    pub end_max: Lsn,
    /// Which are kept.
    pub keep: Keep,
    /// How many are kept.
    pub entries_max: usize,
}

impl Pass {
    /// The first pass over all that counts of a segment.
    pub fn whole(keep: Keep, end_max: Lsn) -> Self {
        Self { within: Lsn(0)..Lsn(u64::MAX), end_max, keep, entries_max: ENTRIES_MAX }
    }

    /// Returns the pass for what this one had no room for, from `cut` on.
    #[must_use]
    pub fn beyond(&self, cut: Lsn) -> Self {
        let within = match self.keep {
            Keep::Newest => self.within.start..cut,
            Keep::Oldest => cut..self.within.end,
        };
        Self { within, ..self.clone() }
    }
}

/// What a pass over a segment has found.
#[derive(Debug, Default)]
pub struct SegmentDigest {
    /// What ended in it and is wanted, in the order of WAL.
    pub entries: VecDeque<Entry>,
    /// What its records say of transactions that did not end in it, by id.
    pub left: BTreeMap<u32, Tally>,
    /// Transactions and subtransactions that ended in it and are not wanted.
    pub ended_unwanted: Vec<u32>,
    /// The next transaction id at the first moment of the segment at which that is known.
    pub first_next_xid: Option<u32>,
    /// Where it was cut because there were too many entries: the next pass goes on there.
    pub cut: Option<Lsn>,
    /// Whether records of some transactions could not be counted.
    pub is_spilled: bool,
}

/// The fold over the records of one segment.
#[derive(Debug)]
pub struct SegmentFold {
    pass: Pass,
    digest: SegmentDigest,
}

impl SegmentFold {
    /// Begins a pass.
    pub fn new(pass: Pass) -> Self {
        Self { pass, digest: SegmentDigest::default() }
    }

    /// Takes the next record, in the order of WAL.
    pub fn add(&mut self, record: &WalRecord<'_>, filter: &Filter) {
        if self.digest.first_next_xid.is_none() {
            self.digest.first_next_xid = record.next_xid();
        }
        if let Some(WalEvent::Transaction(end)) = record.event {
            self.end(record, end, filter);
            return;
        }
        if record.header.xid != 0 {
            self.count(record);
        }
        let found = match record.event {
            Some(WalEvent::RestorePoint { name, time }) => {
                Found::RestorePoint { name: name.clone(), time: *time }
            }
            Some(
                WalEvent::EndOfRecovery { time, timeline, previous_timeline }
                | WalEvent::Checkpoint { time, timeline, previous_timeline, .. },
            ) if timeline != previous_timeline => {
                Found::Promotion { time: *time, timeline: *timeline, previous: *previous_timeline }
            }
            _ => return,
        };
        let entry = Entry { lsn: record.lsn, end_lsn: record.end_lsn, found };
        if filter.may_want(&entry) {
            self.keep(entry);
        }
    }

    /// Ends the pass.
    pub fn finish(self) -> SegmentDigest {
        self.digest
    }

    fn count(&mut self, record: &WalRecord<'_>) {
        let xid = record.header.xid;
        let open = &mut self.digest.left;
        if !open.contains_key(&xid) && open.len() >= OPEN_MAX {
            self.digest.is_spilled = true;
            return;
        }
        let tally = open.entry(xid).or_default();
        tally.records += 1;
        let Some(parts) = record.parts() else { return };
        let deleted_rows = u64::from(record.is_row_deletion());
        let blocks = &parts.blocks;
        for (number, block) in blocks.iter().enumerate() {
            let relation = block.relation;
            let is_first = !blocks[..number].iter().any(|earlier| earlier.relation == relation);
            let is_rows = number == 0 && block.fork == Some(Fork::Main);
            if is_first {
                tally.touch(relation, 1, if is_rows { deleted_rows } else { 0 });
            }
        }
        match record.storage_change() {
            Some(StorageChange::Created(file)) if tally.created.len() < CHANGES_MAX => {
                tally.created.push(file);
            }
            Some(StorageChange::DatabaseDropped { database }) => {
                super::push_bounded(&mut tally.dropped_databases, [(database, record.lsn)]);
            }
            Some(StorageChange::TablespaceDropped { tablespace }) => {
                super::push_bounded(&mut tally.dropped_tablespaces, [tablespace]);
            }
            _ => {}
        }
        let of_class = |files: RelFileLocator| files.relation == PG_CLASS_OID;
        if blocks.first().is_some_and(|block| of_class(block.relation))
            && tally.class_changes.len() < CLASS_CHANGES_MAX
            && let Some((files, change)) = record.heap_change()
        {
            let database = files.database;
            tally.class_changes.push(match change {
                HeapChange::Insert { place, .. } => ClassChange::Inserted(database, place),
                HeapChange::Update { old, new, .. } => ClassChange::Moved(database, old, new),
                HeapChange::Delete { place } => ClassChange::Deleted(database, place),
            });
        }
        if let Some((_, tables)) = record.truncated_tables() {
            super::push_bounded(&mut tally.truncated, tables);
        }
    }

    fn end(&mut self, record: &WalRecord<'_>, end: &TransactionEnd, filter: &Filter) {
        let all = end.xid.into_iter().chain(end.subtransactions.iter().copied());
        let mut tally = Tally { records: 1, ..Tally::default() };
        for xid in all.clone() {
            if let Some(part) = self.digest.left.remove(&xid) {
                tally.absorb(part);
            }
        }
        let is_all_known = end.subtransactions.len() == end.subtransaction_count as usize;
        let began_here = match (end.xid, self.digest.first_next_xid) {
            // Subtransactions have later ids than the transaction they belong to.
            (Some(xid), Some(next)) => is_at_or_after(xid, next),
            _ => false,
        };
        let is_exact = is_all_known && began_here && !self.digest.is_spilled;
        let found = TransactionFound {
            committed: end.committed,
            prepared: end.prepared,
            xid: end.xid,
            time: end.time,
            database: end.database,
            subtransactions: end.subtransaction_count,
            tally,
            is_exact,
            removed: end.dropped.clone(),
            removed_count: end.dropped_count,
            open_xids: if is_exact || !is_all_known { Vec::new() } else { all.clone().collect() },
        };
        let (lsn, end_lsn) = (record.lsn, record.end_lsn);
        let entry = Entry { lsn, end_lsn, found: Found::Transaction(Box::new(found)) };
        if filter.may_want(&entry) && filter.may_want_xid(all.clone()) {
            self.keep(entry);
        } else if self.is_inside(&entry) {
            self.digest.ended_unwanted.extend(all);
        }
    }

    fn is_inside(&self, entry: &Entry) -> bool {
        self.pass.within.contains(&entry.lsn) && entry.end_lsn <= self.pass.end_max
    }

    fn keep(&mut self, entry: Entry) {
        if !self.is_inside(&entry) {
            return;
        }
        let digest = &mut self.digest;
        let is_full = digest.entries.len() >= self.pass.entries_max;
        match self.pass.keep {
            Keep::Oldest if is_full => digest.cut = digest.cut.or(Some(entry.lsn)),
            Keep::Oldest => digest.entries.push_back(entry),
            Keep::Newest => {
                digest.entries.push_back(entry);
                if is_full {
                    digest.entries.pop_front();
                    digest.cut = digest.entries.front().map(|oldest| oldest.lsn);
                }
            }
        }
    }
}
