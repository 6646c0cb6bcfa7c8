//! What `log` tells of WAL, as plain values: ends of transactions with what they did, restore points, promotions.
//!
//! ```text
//! segment, record by record -> fold::SegmentFold     what ends in it, with what its records of it say
//!                                    |               what did not end in it
//!          one after another -> order::Assembler     joined over segments, in the order asked for
//!                    filter::Filter  what is wanted; which segments need not be read
//!                    route           which segments there are on a way, and the gaps between them
//!                    last_drop       the last moment at which a table stood
//! ```
//!
//! Everything here has a bound. Where a bound or the beginning of WAL hides a part of a transaction, its numbers are
//! told as what they are at the least, and never as exact.

pub mod filter;
pub mod fold;
pub mod last_drop;
pub mod order;
pub mod route;

use std::collections::BTreeSet;

use crate::pg::{Lsn, PgTimestamp, RelFileLocator, RowPlace, Timeline};

/// How many relations of one transaction are told; records of others are counted.
pub const RELATIONS_MAX: usize = 64;

/// How many files that one transaction made are told, and so of databases and tablespaces that it dropped.
pub const CHANGES_MAX: usize = 64;

/// One thing that WAL tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where its record begins.
    pub lsn: Lsn,
    /// Where its record ends (excluded), rounded up to 8 bytes.
    pub end_lsn: Lsn,
    /// What it is.
    pub found: Found,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A transaction ended.
    Transaction(Box<TransactionFound>),
    /// `pg_create_restore_point` was called.
    RestorePoint {
        /// Its name.
        name: String,
        /// When.
        time: PgTimestamp,
    },
    /// A timeline began.
    Promotion {
        /// When; of a promotion by a checkpoint in whole seconds.
        time: PgTimestamp,
        /// The timeline that begins.
        timeline: Timeline,
        /// The one that was left.
        previous: Timeline,
    },
}

/// A transaction that ended, and what it did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionFound {
    /// True for commit, false for abort.
    pub committed: bool,
    /// True for `COMMIT PREPARED` and `ROLLBACK PREPARED`.
    pub prepared: bool,
    /// Its transaction id; `None` where the record was too long to be read to it.
    pub xid: Option<u32>,
    /// When it ended.
    pub time: PgTimestamp,
    /// The database, where the record says it.
    pub database: Option<u32>,
    /// How many subtransactions ended with it.
    pub subtransactions: u32,
    /// What its records say.
    pub tally: Tally,
    /// Whether `tally` holds all of its records. Otherwise there are at least as many.
    pub is_exact: bool,
    /// Files that its end removes: those listed in WAL, at most
    /// [`crate::pg::DROPPED_RELATIONS_LISTED_MAX`].
    pub removed: Vec<RelFileLocator>,
    /// How many such files there are.
    pub removed_count: u32,
    /// Its id and those of its subtransactions, as long as more of its records may be found.
    pub(crate) open_xids: Vec<u32>,
}

/// What the records of a transaction say, as far as they were seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Records, its end among them.
    pub records: u64,
    /// Relations that it touched, in the order of their first record; at most [`RELATIONS_MAX`].
    pub relations: Vec<Touched>,
    /// Whether it touched more of them.
    pub has_more_relations: bool,
    /// Rows that it deleted, in all relations.
    pub deleted_rows: u64,
    /// Relation files that it made, at most [`CHANGES_MAX`].
    pub created: Vec<RelFileLocator>,
    /// Databases that it dropped, and where the record is that removes their files: at once, not with the commit.
    pub dropped_databases: Vec<(u32, Lsn)>,
    /// Tablespaces that it dropped.
    pub dropped_tablespaces: Vec<u32>,
    /// Rows of `pg_class` that it inserted, replaced and deleted, at most [`CLASS_CHANGES_MAX`].
    pub(crate) class_changes: Vec<ClassChange>,
    /// Tables, by OID, that a TRUNCATE named; only with `wal_level = logical`.
    pub truncated: Vec<u32>,
}

/// How many changes of `pg_class` are followed in one transaction.
pub const CLASS_CHANGES_MAX: usize = 1024;

/// What happened to a row of `pg_class` of a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClassChange {
    Inserted(u32, RowPlace),
    Moved(u32, RowPlace, RowPlace),
    Deleted(u32, RowPlace),
}

/// One relation that a transaction touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// Its files.
    pub relation: RelFileLocator,
    /// Records that changed it.
    pub records: u64,
    /// Rows that were deleted from it.
    pub deleted_rows: u64,
}

impl Entry {
    /// Returns when it happened.
    pub fn time(&self) -> PgTimestamp {
        match &self.found {
            Found::Transaction(end) => end.time,
            Found::RestorePoint { time, .. } | Found::Promotion { time, .. } => *time,
        }
    }
}

impl TransactionFound {
    /// Returns whether anything that many would miss goes with it: files, a database, a tablespace, or all
    /// rows of a table.
    pub fn removes_anything(&self) -> bool {
        self.removed_count > 0
            || !self.tally.dropped_databases.is_empty()
            || !self.tally.dropped_tablespaces.is_empty()
            || !self.tally.truncated.is_empty()
    }

    /// Returns the OID of the database it worked in: what the record says, else that of its first relation.
    pub fn database(&self) -> Option<u32> {
        let files = self.tally.relations.iter().map(|touched| touched.relation.database);
        let files = files.chain(self.removed.iter().map(|removed| removed.database));
        self.database.or_else(|| files.into_iter().find(|database| *database != 0))
    }
}

impl Tally {
    /// Counts a relation of one record.
    pub(crate) fn touch(&mut self, relation: RelFileLocator, records: u64, deleted_rows: u64) {
        self.deleted_rows += deleted_rows;
        let has_room = self.relations.len() < RELATIONS_MAX;
        match self.relations.iter_mut().find(|touched| touched.relation == relation) {
            Some(touched) => {
                touched.records += records;
                touched.deleted_rows += deleted_rows;
            }
            None if has_room => self.relations.push(Touched { relation, records, deleted_rows }),
            None => self.has_more_relations = true,
        }
    }

    /// Takes in what other records of the same transaction say.
    pub(crate) fn absorb(&mut self, other: Self) {
        let all = self.deleted_rows + other.deleted_rows;
        self.records += other.records;
        self.has_more_relations |= other.has_more_relations;
        for touched in other.relations {
            self.touch(touched.relation, touched.records, touched.deleted_rows);
        }
        // Rows of relations that are not told count as well.
        self.deleted_rows = all;
        push_bounded(&mut self.created, other.created);
        push_bounded(&mut self.dropped_databases, other.dropped_databases);
        push_bounded(&mut self.dropped_tablespaces, other.dropped_tablespaces);
        push_bounded(&mut self.truncated, other.truncated);
        let room = CLASS_CHANGES_MAX.saturating_sub(self.class_changes.len());
        self.class_changes.extend(other.class_changes.into_iter().take(room));
    }

    /// Returns how many relations it dropped that it had not made itself, as far as its changes of `pg_class` say it.
    /// VACUUM FULL and its like make a relation for a moment and drop it again.
    pub fn dropped_relations(&self) -> u64 {
        let mut own: BTreeSet<(u32, RowPlace)> = BTreeSet::new();
        // Parts of a transaction may have come in any order.
        loop {
            let before = own.len();
            for change in &self.class_changes {
                match *change {
                    ClassChange::Inserted(database, place) => {
                        own.insert((database, place));
                    }
                    ClassChange::Moved(database, old, new) if own.contains(&(database, old)) => {
                        own.insert((database, new));
                    }
                    ClassChange::Moved(..) | ClassChange::Deleted(..) => {}
                }
            }
            if own.len() == before {
                break;
            }
        }
        let is_drop = |change: &&ClassChange| matches!(change, ClassChange::Deleted(of, place) if !own.contains(&(*of, *place)));
        self.class_changes.iter().filter(is_drop).count() as u64
    }
}

/// Appends what is not there yet, up to the bound.
fn push_bounded<T: PartialEq>(list: &mut Vec<T>, more: impl IntoIterator<Item = T>) {
    for item in more {
        if list.len() < CHANGES_MAX && !list.contains(&item) {
            list.push(item);
        }
    }
}

/// Returns whether transaction `xid` began at the same time as `other` or later, in the circle of 32-bit ids.
///
/// Source: `TransactionIdFollowsOrEquals` in `src/backend/access/transam/transam.c`.
pub(crate) fn is_at_or_after(xid: u32, other: u32) -> bool {
    xid.wrapping_sub(other) < 1 << 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(relation: u32) -> RelFileLocator {
        RelFileLocator { tablespace: 1663, database: 5, relation }
    }

    #[test]
    fn parts_of_a_transaction_add_up_whatever_their_order() {
        let mut first = Tally { records: 3, ..Tally::default() };
        first.touch(file(1), 2, 1);
        first.created.push(file(9));
        let mut second = Tally { records: 4, ..Tally::default() };
        second.touch(file(1), 1, 5);
        second.touch(file(2), 3, 0);
        second.created.push(file(9));
        let mut joined = first.clone();
        joined.absorb(second.clone());
        second.absorb(first);
        assert_eq!((joined.records, joined.deleted_rows), (7, 6));
        assert_eq!(joined.relations[0], Touched { relation: file(1), records: 3, deleted_rows: 6 });
        assert_eq!((second.records, second.deleted_rows), (7, 6));
        assert_eq!((joined.created.len(), second.created.len()), (1, 1));
    }

    #[test]
    fn rows_of_relations_that_are_not_told_are_counted() {
        let mut tally = Tally::default();
        for number in 0..100 {
            tally.touch(file(number), 1, 2);
        }
        assert_eq!((tally.relations.len(), tally.deleted_rows), (RELATIONS_MAX, 200));
        let mut joined = Tally::default();
        joined.absorb(tally);
        assert!(joined.has_more_relations);
        assert_eq!(joined.deleted_rows, 200);
    }

    #[test]
    fn a_relation_that_was_made_for_a_moment_is_no_drop() {
        let at = |offset| RowPlace { block: 0, offset };
        let tally = |class_changes: &[ClassChange]| Tally {
            class_changes: class_changes.to_vec(),
            ..Tally::default()
        };
        let made = [
            ClassChange::Moved(5, at(2), at(3)),
            ClassChange::Moved(5, at(1), at(2)),
            ClassChange::Inserted(5, at(1)),
            ClassChange::Deleted(5, at(3)),
        ];
        assert_eq!(tally(&made).dropped_relations(), 0);
        assert_eq!(tally(&made[3..]).dropped_relations(), 1);
        let mut later = tally(&made[3..]);
        later.absorb(tally(&made[..3]));
        assert_eq!(later.dropped_relations(), 0, "its beginning was seen last");
        let other = [ClassChange::Inserted(6, at(3)), ClassChange::Deleted(5, at(3))];
        assert_eq!(tally(&other).dropped_relations(), 1, "of another database");
    }

    #[test]
    fn transaction_ids_go_round() {
        assert!(is_at_or_after(5, 5) && is_at_or_after(6, 5) && !is_at_or_after(4, 5));
        assert!(is_at_or_after(3, u32::MAX - 3) && !is_at_or_after(u32::MAX - 3, 3));
    }
}
