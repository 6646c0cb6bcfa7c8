//! Rows of heap tables: in pages, and in the WAL records that insert, update and delete them.
//!
//! ```text
//! page   header 24 | line pointers, 4 bytes each, up to pd_lower | ... | tuples
//! tuple  0 u32 xmin | 4 u32 xmax | 18 u16 infomask2 | 20 u16 infomask | 22 u8 hoff | hoff: the columns
//! ```
//!
//! Whether a row is to be seen is told as far as the tuple itself and a commit log say it. Sources:
//! `src/include/storage/itemid.h`, `src/include/access/htup_details.h`, `heapam_xlog.h`,
//! `src/backend/access/heap/heapam.c` (`heap_xlog_insert`, `heap_xlog_update`; from 18 on `heapam_xlog.c`).

use super::bytes::{u16_at, u32_at};
use super::wal_blocks::WalRecord;
use super::{Fork, RelFileLocator};

const PAGE_HEADER_BYTES: usize = 24;
const TUPLE_HEADER_BYTES: usize = 23;
/// `xl_heap_header`: infomask2, infomask, hoff.
const LOGGED_HEADER_BYTES: usize = 5;
/// `LP_NORMAL`: the line pointer leads to a tuple.
const LINE_POINTER_NORMAL: u32 = 1;

const XMAX_LOCK_ONLY: u16 = 0x0080;
const XMIN_COMMITTED: u16 = 0x0100;
const XMIN_INVALID: u16 = 0x0200;
const XMAX_COMMITTED: u16 = 0x0400;
const XMAX_INVALID: u16 = 0x0800;
const XMAX_IS_MULTI: u16 = 0x1000;

const RMGR_HEAP: u8 = 10;
const HEAP_OPERATION_MASK: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_TRUNCATE: u8 = 0x30;
const HEAP_HOT_UPDATE: u8 = 0x40;

const UPDATE_PREFIX_FROM_OLD: u8 = 1 << 5;
const UPDATE_SUFFIX_FROM_OLD: u8 = 1 << 6;

/// Where a row stands in its table (`ItemPointerData`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowPlace {
    /// The block.
    pub block: u32,
    /// Its line pointer there, from 1.
    pub offset: u16,
}

/// Whether a row is there, as far as it is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RowState {
    /// It never was: its transaction aborted.
    Aborted,
    /// It was deleted, or replaced by another version.
    Gone,
    /// Nothing says whether its transaction committed.
    Unknown,
    /// It stands.
    Live,
}

/// One tuple of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapTuple<'a> {
    /// Its line pointer, from 1.
    pub offset: u16,
    /// The transaction that made it.
    pub xmin: u32,
    /// The transaction that deleted or locked it.
    pub xmax: u32,
    infomask: u16,
    /// The columns.
    pub columns: &'a [u8],
}

impl HeapTuple<'_> {
    /// Returns whether the row stands; `committed` says it of a transaction, as far as that is known.
    pub fn state(&self, committed: impl Fn(u32) -> Option<bool>) -> RowState {
        let has = |bit| self.infomask & bit != 0;
        let made = match (has(XMIN_COMMITTED), has(XMIN_INVALID)) {
            // Both bits together say that it is frozen.
            (true, _) => Some(true),
            (false, true) => Some(false),
            (false, false) => committed(self.xmin),
        };
        let is_kept = self.xmax == 0 || has(XMAX_INVALID) || has(XMAX_LOCK_ONLY);
        let deleted = if is_kept {
            Some(false)
        } else if has(XMAX_COMMITTED) {
            Some(true)
        } else if has(XMAX_IS_MULTI) {
            None
        } else {
            committed(self.xmax)
        };
        match (made, deleted) {
            (Some(false), _) => RowState::Aborted,
            (_, Some(true)) => RowState::Gone,
            (Some(true), Some(false)) => RowState::Live,
            _ => RowState::Unknown,
        }
    }
}

/// Returns the tuples of a heap page, in the order of their line pointers. What does not fit into the
/// page is left out.
pub fn heap_tuples(page: &[u8]) -> Vec<HeapTuple<'_>> {
    let lower = usize::from(u16_at(page, 12).unwrap_or(0)).min(page.len());
    let count = lower.saturating_sub(PAGE_HEADER_BYTES) / 4;
    let tuple = |number: usize| {
        let pointer = u32_at(page, PAGE_HEADER_BYTES + 4 * number)?;
        let (start, flags) = ((pointer & 0x7FFF) as usize, pointer >> 15 & 3);
        let bytes = (pointer >> 17) as usize;
        let tuple = page.get(start..start.checked_add(bytes)?)?;
        let hoff = usize::from(*tuple.get(22)?);
        let is_normal = flags == LINE_POINTER_NORMAL && hoff >= TUPLE_HEADER_BYTES;
        is_normal.then_some(())?;
        Some(HeapTuple {
            offset: u16::try_from(number + 1).ok()?,
            xmin: u32_at(tuple, 0)?,
            xmax: u32_at(tuple, 4)?,
            infomask: u16_at(tuple, 20)?,
            columns: tuple.get(hoff..)?,
        })
    };
    (0..count).filter_map(tuple).collect()
}

/// What a record did to one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeapChange {
    /// A row was inserted.
    Insert {
        /// Where.
        place: RowPlace,
        /// Its columns.
        columns: LoggedColumns,
    },
    /// A row was deleted.
    Delete {
        /// Where it stood.
        place: RowPlace,
    },
    /// A row was replaced by a new version.
    Update {
        /// Where the old version stood.
        old: RowPlace,
        /// Where the new one stands.
        new: RowPlace,
        /// Its columns.
        columns: LoggedColumns,
    },
}

/// The columns of a row as a record holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LoggedColumns {
    /// All of them.
    Whole(Vec<u8>),
    /// What differs from the old version: its first and last bytes are the same.
    Middle {
        /// Bytes taken over from the beginning of the old columns.
        prefix_bytes: usize,
        /// What stands between.
        middle: Vec<u8>,
        /// Bytes taken over from their end.
        suffix_bytes: usize,
    },
    /// They are in a page image only, or were not kept.
    Elsewhere,
}

impl LoggedColumns {
    /// Returns the columns; `old` are those of the version before, where they are known.
    pub fn join(&self, old: Option<&[u8]>) -> Option<Vec<u8>> {
        match self {
            Self::Whole(columns) => Some(columns.clone()),
            Self::Elsewhere => None,
            Self::Middle { prefix_bytes, middle, suffix_bytes } => {
                let old = old?;
                let suffix_at = old.len().checked_sub(*suffix_bytes)?;
                let parts = [old.get(..*prefix_bytes)?, middle, old.get(suffix_at..)?];
                Some(parts.concat())
            }
        }
    }
}

impl WalRecord<'_> {
    /// Returns whether this record deleted a row, for good: a new version of a row is no deletion.
    pub fn is_row_deletion(&self) -> bool {
        self.heap_operation() == Some(HEAP_DELETE)
    }

    /// Returns whether it is the note of a TRUNCATE that `wal_level = logical` makes the server write.
    pub fn is_logged_truncate(&self) -> bool {
        self.heap_operation() == Some(HEAP_TRUNCATE)
    }

    fn heap_operation(&self) -> Option<u8> {
        let is_heap = self.header.resource_manager == RMGR_HEAP;
        is_heap.then_some(self.header.info & HEAP_OPERATION_MASK)
    }

    /// Returns what the record did to a row, and of which table; `None` for every other kind of record.
    pub fn heap_change(&self) -> Option<(RelFileLocator, HeapChange)> {
        let operation = self.heap_operation()?;
        let is_known =
            matches!(operation, HEAP_INSERT | HEAP_DELETE | HEAP_UPDATE | HEAP_HOT_UPDATE);
        is_known.then_some(())?;
        let parts = self.parts()?;
        let first = parts.blocks.first().filter(|block| block.fork == Some(Fork::Main))?;
        let main = parts.main;
        let place = |block, at| Some(RowPlace { block, offset: u16_at(main, at)? });
        let change = match operation {
            HEAP_INSERT => HeapChange::Insert {
                place: place(first.block, 0)?,
                columns: inserted_columns(first.data),
            },
            HEAP_DELETE => HeapChange::Delete { place: place(first.block, 4)? },
            _ => {
                // The old version's block is named only if it is another one.
                let old_block = parts.blocks.get(1).map_or(first.block, |block| block.block);
                HeapChange::Update {
                    old: place(old_block, 4)?,
                    new: place(first.block, 12)?,
                    columns: updated_columns(first.data, *main.get(7)?),
                }
            }
        };
        Some((first.relation, change))
    }
}

fn inserted_columns(data: &[u8]) -> LoggedColumns {
    columns_behind_header(data)
        .map_or(LoggedColumns::Elsewhere, |columns| LoggedColumns::Whole(columns.to_vec()))
}

/// Returns what follows `xl_heap_header`, the bitmap of nulls and its padding.
fn columns_behind_header(data: &[u8]) -> Option<&[u8]> {
    let hoff = usize::from(*data.get(4)?);
    data.get(LOGGED_HEADER_BYTES + hoff.checked_sub(TUPLE_HEADER_BYTES)?..)
}

fn updated_columns(data: &[u8], flags: u8) -> LoggedColumns {
    let mut rest = data;
    let mut length = |bit| {
        if flags & bit == 0 {
            return Some(0);
        }
        let bytes = usize::from(u16_at(rest, 0)?);
        rest = rest.get(2..)?;
        Some(bytes)
    };
    let lengths = length(UPDATE_PREFIX_FROM_OLD).zip(length(UPDATE_SUFFIX_FROM_OLD));
    let found = lengths.zip(columns_behind_header(rest));
    found.map_or(LoggedColumns::Elsewhere, |((prefix_bytes, suffix_bytes), middle)| {
        let middle = middle.to_vec();
        if prefix_bytes + suffix_bytes == 0 {
            return LoggedColumns::Whole(middle);
        }
        LoggedColumns::Middle { prefix_bytes, middle, suffix_bytes }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A heap page with these tuples: xmin, xmax, infomask, columns.
    pub(crate) fn page_of(tuples: &[(u32, u32, u16, &[u8])]) -> Vec<u8> {
        let mut page = vec![0; 8192];
        let mut upper = page.len();
        for (number, (xmin, xmax, infomask, columns)) in tuples.iter().enumerate() {
            let mut tuple = vec![0; 24];
            tuple[0..4].copy_from_slice(&xmin.to_le_bytes());
            tuple[4..8].copy_from_slice(&xmax.to_le_bytes());
            tuple[20..22].copy_from_slice(&infomask.to_le_bytes());
            tuple[22] = 24;
            tuple.extend(*columns);
            upper = (upper - tuple.len()) & !7;
            page[upper..upper + tuple.len()].copy_from_slice(&tuple);
            let pointer = upper as u32 | 1 << 15 | (tuple.len() as u32) << 17;
            page[24 + 4 * number..28 + 4 * number].copy_from_slice(&pointer.to_le_bytes());
        }
        page[12..14].copy_from_slice(&((24 + 4 * tuples.len()) as u16).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        page
    }

    #[test]
    fn a_rows_state_is_what_its_hints_say_or_else_the_commit_log() {
        let log = |xid| match xid {
            10 => Some(true),
            11 => Some(false),
            _ => None,
        };
        let cases = [
            (3, 0, XMIN_COMMITTED | XMAX_INVALID, RowState::Live),
            (2, 0, XMIN_COMMITTED | XMIN_INVALID | XMAX_INVALID, RowState::Live),
            (10, 0, XMAX_INVALID, RowState::Live),
            (11, 0, XMAX_INVALID, RowState::Aborted),
            (99, 0, XMAX_INVALID, RowState::Unknown),
            (3, 10, XMIN_COMMITTED, RowState::Gone),
            (3, 11, XMIN_COMMITTED, RowState::Live),
            (3, 99, XMIN_COMMITTED | XMAX_COMMITTED, RowState::Gone),
            (3, 99, XMIN_COMMITTED | XMAX_LOCK_ONLY, RowState::Live),
            (3, 10, XMIN_COMMITTED | XMAX_IS_MULTI, RowState::Unknown),
        ];
        for (xmin, xmax, infomask, expected) in cases {
            let page = page_of(&[(xmin, xmax, infomask, b"columns")]);
            let tuples = heap_tuples(&page);
            assert_eq!(tuples[0].columns, b"columns");
            assert_eq!(tuples[0].state(log), expected, "{xmin} {xmax} {infomask:#x}");
        }
    }

    #[test]
    fn an_update_takes_over_the_ends_of_the_old_version() {
        let mut data = 2u16.to_le_bytes().to_vec();
        data.extend(3u16.to_le_bytes());
        data.extend([0, 0, 0, 0, 24, 0]); // header, one byte of padding
        data.extend(b"NEW");
        let both = UPDATE_PREFIX_FROM_OLD | UPDATE_SUFFIX_FROM_OLD;
        let logged = updated_columns(&data, both);
        assert_eq!(logged.join(Some(b"abold!xyz")).unwrap(), b"abNEWxyz");
        assert_eq!(logged.join(None), None);
        assert_eq!(logged.join(Some(b"a")), None);
        let whole = updated_columns(&data[4..], 0);
        assert_eq!(whole.join(None).unwrap(), b"NEW");
        assert_eq!(updated_columns(&[], both), LoggedColumns::Elsewhere);
    }

    proptest! {
        #[test]
        fn no_page_and_no_data_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
            flags: u8,
        ) {
            for tuple in heap_tuples(&bytes) {
                let _ = tuple.state(|_| None);
            }
            let _ = updated_columns(&bytes, flags).join(Some(&bytes));
            let _ = inserted_columns(&bytes);
        }
    }
}
