//! What of WAL is wanted, and which segments need not be read for it.

use super::{Entry, Found, TransactionFound};
use crate::pg::{Lsn, PgTimestamp, RelFileLocator};

/// How far apart the times of neighbouring commits may stand against their order in WAL: transactions take
/// their time a moment before they take their place.
const DISORDER_MICROS: i64 = 60_000_000;

/// One end of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// A moment.
    Time(PgTimestamp),
    /// A position.
    Lsn(Lsn),
}

/// Kinds of entries that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each is a kind of its own
pub struct Kinds {
    /// Every commit.
    pub commits: bool,
    /// Every abort.
    pub aborts: bool,
    /// Restore points.
    pub restore_points: bool,
    /// Beginnings of timelines.
    pub promotions: bool,
    /// Commits that remove files, databases, tablespaces or all rows of a table.
    pub drops: bool,
    /// Commits that delete many rows.
    pub large_deletes: bool,
}

impl Kinds {
    /// Everything but aborts.
    pub const USUAL: Self = Self {
        commits: true,
        aborts: false,
        restore_points: true,
        promotions: true,
        drops: true,
        large_deletes: true,
    };

    /// Nothing.
    pub const NONE: Self = Self {
        commits: false,
        aborts: false,
        restore_points: false,
        promotions: false,
        drops: false,
        large_deletes: false,
    };
}

/// What is wanted, as far as it is decided without names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// From where on (included).
    pub since: Option<Bound>,
    /// Up to where (excluded).
    pub until: Option<Bound>,
    /// Only this transaction, or the one that this subtransaction belongs to.
    pub xid: Option<u32>,
    /// Only these kinds.
    pub kinds: Kinds,
    /// How many deleted rows make a large delete.
    pub large_delete_rows: u64,
}

/// Which relation is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelationChoice {
    /// Its name, with its schema or without.
    Name {
        /// The schema.
        schema: Option<String>,
        /// The relation.
        name: String,
    },
    /// The number of its files.
    File(u32),
    /// The same with tablespace and database.
    Locator(RelFileLocator),
}

impl RelationChoice {
    /// Reads `orders`, `public.orders`, `16385` or `1663/5/16385`. Names are taken as the catalog has
    /// them, without quotes; all digits are a file's number.
    pub fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| text.parse::<u32>().ok();
        let parts: Vec<&str> = text.split('/').collect();
        if let [tablespace, database, relation] = parts[..]
            && let (Some(tablespace), Some(database), Some(relation)) =
                (number(tablespace), number(database), number(relation))
        {
            return Some(Self::Locator(RelFileLocator { tablespace, database, relation }));
        }
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return number(text).map(Self::File);
        }
        let (schema, name) = match text.split_once('.') {
            Some((schema, name)) => (Some(schema.to_owned()), name),
            None => (None, text),
        };
        let is_empty = name.is_empty() || schema.as_ref().is_some_and(String::is_empty);
        (!is_empty).then(|| Self::Name { schema, name: name.to_owned() })
    }
}

/// Why a segment needs not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outside {
    /// It lies before what is wanted.
    Before,
    /// It lies behind it.
    Behind,
}

/// The times of commits and aborts in a segment, as its header tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentTimes {
    /// The earliest.
    pub first: PgTimestamp,
    /// The latest.
    pub last: PgTimestamp,
}

impl Filter {
    /// Returns whether an entry is wanted, as far as its own record says it: what other records of its
    /// transaction say may still rule it out.
    pub fn may_want(&self, entry: &Entry) -> bool {
        let kinds = self.kinds;
        let is_wanted_kind = match &entry.found {
            Found::Transaction(end) if end.committed => {
                kinds.commits || kinds.drops || kinds.large_deletes
            }
            Found::Transaction(_) => kinds.aborts,
            Found::RestorePoint { .. } => kinds.restore_points,
            Found::Promotion { .. } => kinds.promotions,
        };
        let is_transaction = matches!(entry.found, Found::Transaction(_));
        is_wanted_kind && (self.xid.is_none() || is_transaction) && self.is_in_range(entry)
    }

    /// Returns whether a transaction of these ids is wanted.
    pub fn may_want_xid(&self, mut xids: impl Iterator<Item = u32>) -> bool {
        self.xid.is_none_or(|wanted| xids.any(|xid| xid == wanted))
    }

    /// Returns whether an entry of which everything is known is wanted.
    pub fn wants(&self, entry: &Entry) -> bool {
        let kinds = self.kinds;
        self.may_want(entry)
            && match &entry.found {
                Found::Transaction(end) if end.committed => {
                    kinds.commits
                        || (kinds.drops && end.removes_anything())
                        || (kinds.large_deletes && self.is_large_delete(end))
                }
                _ => true,
            }
    }

    /// Returns whether a transaction deleted so many rows that it is told by itself.
    pub fn is_large_delete(&self, end: &TransactionFound) -> bool {
        end.committed && end.tally.deleted_rows >= self.large_delete_rows
    }

    fn is_in_range(&self, entry: &Entry) -> bool {
        let is_before = |bound: &Bound| match bound {
            Bound::Time(time) => entry.time() < *time,
            Bound::Lsn(lsn) => entry.lsn < *lsn,
        };
        !self.since.as_ref().is_some_and(is_before) && self.until.as_ref().is_none_or(is_before)
    }

    /// Returns whether a bound is a time, so that headers tell which segments it rules out.
    pub fn has_time(&self) -> bool {
        [self.since, self.until].iter().any(|bound| matches!(bound, Some(Bound::Time(_))))
    }

    /// Returns why nothing that begins from `start_lsn` to `end_lsn` (excluded) is wanted, if only positions decide it.
    pub fn outside_by_place(&self, start_lsn: Lsn, end_lsn: Lsn) -> Option<Outside> {
        match (self.since, self.until) {
            (Some(Bound::Lsn(since)), _) if end_lsn <= since => Some(Outside::Before),
            (_, Some(Bound::Lsn(until))) if until <= start_lsn => Some(Outside::Behind),
            _ => None,
        }
    }

    /// Returns why nothing in a segment is wanted. What stands at its end and goes on into the next segment
    /// is in no header, and was written between what `own` and `next` tell.
    pub fn outside_by_time(
        &self,
        own: Option<SegmentTimes>,
        next: Option<SegmentTimes>,
    ) -> Option<Outside> {
        let shifted = |time: PgTimestamp, by: i64| PgTimestamp(time.0.saturating_add(by));
        if let (Some(Bound::Time(until)), Some(own)) = (self.until, own)
            && own.first >= shifted(until, DISORDER_MICROS)
        {
            return Some(Outside::Behind);
        }
        if let (Some(Bound::Time(since)), Some(next)) = (self.since, next)
            && own.is_none_or(|own| own.last < shifted(since, -DISORDER_MICROS))
            && next.first < shifted(since, -DISORDER_MICROS)
        {
            return Some(Outside::Before);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::log::Tally;

    fn filter() -> Filter {
        Filter { since: None, until: None, xid: None, kinds: Kinds::USUAL, large_delete_rows: 10 }
    }

    fn commit(lsn: u64, time: i64, deleted_rows: u64, removed_count: u32) -> Entry {
        let found = TransactionFound {
            committed: true,
            prepared: false,
            xid: Some(9),
            time: PgTimestamp(time),
            database: None,
            subtransactions: 0,
            tally: Tally { deleted_rows, ..Tally::default() },
            is_exact: true,
            removed: Vec::new(),
            removed_count,
            open_xids: Vec::new(),
        };
        let found = Found::Transaction(Box::new(found));
        Entry { lsn: Lsn(lsn), end_lsn: Lsn(lsn + 8), found }
    }

    #[test]
    fn a_range_includes_its_beginning_and_not_its_end() {
        let by = |since, until| Filter { since, until, ..filter() };
        let time = |time| Some(Bound::Time(PgTimestamp(time)));
        let lsn = |lsn| Some(Bound::Lsn(Lsn(lsn)));
        let entry = commit(100, 7, 0, 0);
        assert!(by(time(7), time(8)).wants(&entry) && !by(time(8), None).wants(&entry));
        assert!(!by(None, time(7)).wants(&entry));
        assert!(by(lsn(100), lsn(101)).wants(&entry) && !by(None, lsn(100)).wants(&entry));
        assert!(!by(lsn(101), None).wants(&entry));
    }

    #[test]
    fn a_relation_is_named_or_numbered() {
        let name = |schema: Option<&str>, name: &str| RelationChoice::Name {
            schema: schema.map(Into::into),
            name: name.into(),
        };
        assert_eq!(RelationChoice::parse("t"), Some(name(None, "t")));
        assert_eq!(RelationChoice::parse("s.a.b"), Some(name(Some("s"), "a.b")));
        assert_eq!(RelationChoice::parse("16385"), Some(RelationChoice::File(16385)));
        let locator = RelFileLocator { tablespace: 1663, database: 5, relation: 16385 };
        let parsed = RelationChoice::parse("1663/5/16385");
        assert_eq!(parsed, Some(RelationChoice::Locator(locator)));
        for bad in ["", ".t", "s.", "99999999999"] {
            assert_eq!(RelationChoice::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn drops_and_large_deletes_can_be_asked_for_alone() {
        let only = |kinds| Filter { kinds, ..filter() };
        let drops = only(Kinds { drops: true, ..Kinds::NONE });
        let deletes = only(Kinds { large_deletes: true, ..Kinds::NONE });
        assert!(drops.wants(&commit(1, 1, 0, 1)) && !drops.wants(&commit(1, 1, 99, 0)));
        assert!(deletes.wants(&commit(1, 1, 10, 0)) && !deletes.wants(&commit(1, 1, 9, 1)));
        assert!(deletes.may_want(&commit(1, 1, 0, 0)), "the rest of it may delete rows");
    }

    #[test]
    fn a_segment_is_left_out_only_if_neither_it_nor_its_border_can_hold_what_is_wanted() {
        let minutes = |first: i64, last: i64| {
            let at = |minutes| PgTimestamp(minutes * DISORDER_MICROS);
            Some(SegmentTimes { first: at(first), last: at(last) })
        };
        let bound = |minutes| Some(Bound::Time(PgTimestamp(minutes * DISORDER_MICROS)));
        let since = Filter { since: bound(100), ..filter() };
        assert_eq!(since.outside_by_time(minutes(1, 5), minutes(6, 9)), Some(Outside::Before));
        assert_eq!(since.outside_by_time(None, minutes(6, 9)), Some(Outside::Before));
        assert_eq!(since.outside_by_time(minutes(1, 5), None), None, "its border may hold it");
        assert_eq!(since.outside_by_time(minutes(1, 5), minutes(120, 121)), None);
        assert_eq!(since.outside_by_time(minutes(1, 99), minutes(99, 99)), None);
        let until = Filter { until: bound(100), ..filter() };
        assert_eq!(until.outside_by_time(minutes(102, 103), None), Some(Outside::Behind));
        assert_eq!(until.outside_by_time(minutes(100, 103), None), None);
    }
}
