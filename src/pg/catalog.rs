//! The catalog tables that give relations, schemas and databases their names.
//!
//! Their first columns have fixed places and are never null, so that a row's names can be read
//! without a server. `pg_filenode.map` says which files hold the tables that everything else is found by.
//!
//! ```text
//! pg_class      0 oid | 4 relname 64 | 68 relnamespace | 88 relfilenode | 92 reltablespace | 104 relallvisible
//!               [108 relallfrozen, from 18 on] | reltoastrelid | 4 bools and chars, the last of them relkind
//! pg_namespace  0 oid | 4 nspname 64          pg_database  0 oid | 4 datname 64
//!
//! pg_filenode.map  u32 magic | u32 count | 62 (64 from 16 on) of u32 oid, u32 file | u32 CRC-32C
//! ```
//!
//! Sources: `src/include/catalog/pg_class.h`, `pg_namespace.h`, `pg_database.h`, `src/backend/utils/cache/relmapper.c`.

use super::bytes::{u16_at, u32_at};
use super::heap::heap_tuples;
use super::wal_blocks::WalRecord;
use super::{MajorVersion, RelFileLocator, crc32c};

/// OIDs of catalog tables (`src/include/catalog/pg_class.h` and its like).
pub const PG_CLASS_OID: u32 = 1259;
/// See [`PG_CLASS_OID`].
pub const PG_NAMESPACE_OID: u32 = 2615;
/// See [`PG_CLASS_OID`].
pub const PG_DATABASE_OID: u32 = 1262;

/// `FirstNormalObjectId` in `src/include/access/transam.h`: lower OIDs are the server's own objects.
pub const FIRST_USER_OID: u32 = 16384;

/// `NAMEDATALEN`.
const NAME_BYTES: usize = 64;
/// `RELMAPPER_FILEMAGIC`.
const RELATION_MAP_MAGIC: u32 = 0x0059_2717;

const RMGR_SMGR: u8 = 2;
const RMGR_DATABASE: u8 = 4;
const RMGR_TABLESPACE: u8 = 5;
const RMGR_RELATION_MAP: u8 = 7;
const SMGR_CREATE: u8 = 0x10;
const RMGR_HEAP: u8 = 10;
const TABLESPACE_CREATE: u8 = 0x00;
const TABLESPACE_DROP: u8 = 0x10;
const HEAP_INPLACE: u8 = 0x70;

/// `GLOBALTABLESPACE_OID`.
const GLOBAL_TABLESPACE: u32 = 1664;

/// What of a row of `pg_class` is fixed and needed: up to the column `relkind`.
pub const CLASS_ROW_BYTES: usize = 120;

/// A row of `pg_class`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassRow {
    /// The relation's OID.
    pub oid: u32,
    /// Its name; bytes that are not UTF-8 show as U+FFFD.
    pub name: String,
    /// The OID of its schema.
    pub namespace: u32,
    /// The number of its files; 0 where it has none, or where `pg_filenode.map` says it.
    pub file: u32,
    /// The OID of its tablespace; 0 for that of its database.
    pub tablespace: u32,
    /// What it is.
    pub kind: RelationKind,
}

/// `relkind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RelationKind {
    /// An ordinary table.
    Table,
    /// An index, of a partitioned table too.
    Index,
    /// A sequence.
    Sequence,
    /// The long values of a table.
    Toast,
    /// A materialized view.
    MaterializedView,
    /// A partitioned table, which has no files.
    PartitionedTable,
    /// A view, a foreign table, a composite type: without files.
    Other,
}

impl RelationKind {
    /// Returns the kind of this `relkind`.
    pub fn from_letter(letter: u8) -> Self {
        match letter {
            b'r' => Self::Table,
            b'i' | b'I' => Self::Index,
            b'S' => Self::Sequence,
            b't' => Self::Toast,
            b'm' => Self::MaterializedView,
            b'p' => Self::PartitionedTable,
            _ => Self::Other,
        }
    }

    /// Returns one word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Index => "index",
            Self::Sequence => "sequence",
            Self::Toast => "toast",
            Self::MaterializedView => "materialized-view",
            Self::PartitionedTable => "partitioned-table",
            Self::Other => "other",
        }
    }

    /// Returns whether people call it a table: it holds rows of theirs.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::MaterializedView | Self::PartitionedTable)
    }
}

impl ClassRow {
    /// Reads the columns of a row; `None` if they end too early.
    pub fn parse(columns: &[u8], version: MajorVersion) -> Option<Self> {
        // 18 put `relallfrozen` in front of `reltoastrelid`.
        let kind_at = if version.0 >= 18 { 119 } else { 115 };
        Some(Self {
            oid: u32_at(columns, 0)?,
            name: name_at(columns, 4)?,
            namespace: u32_at(columns, 68)?,
            file: u32_at(columns, 88)?,
            tablespace: u32_at(columns, 92)?,
            kind: RelationKind::from_letter(*columns.get(kind_at)?),
        })
    }
}

/// Reads the OID and the name that rows of `pg_namespace` and `pg_database` begin with.
pub fn oid_and_name(columns: &[u8]) -> Option<(u32, String)> {
    Some((u32_at(columns, 0)?, name_at(columns, 4)?))
}

fn name_at(columns: &[u8], at: usize) -> Option<String> {
    let name = columns.get(at..at + NAME_BYTES)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(name).into_owned())
}

/// Reads `pg_filenode.map`: pairs of a catalog's OID and the number of its files. `None` if its magic or
/// its checksum is wrong.
pub fn parse_relation_map(bytes: &[u8]) -> Option<Vec<(u32, u32)>> {
    // 62 pairs up to 15, padded to a disk sector; 64 from 16 on.
    let crc_at = if bytes.len() >= 524 { 520 } else { 504 };
    let stored = u32_at(bytes, crc_at)?;
    if u32_at(bytes, 0)? != RELATION_MAP_MAGIC || crc32c(&bytes[..crc_at]) != stored {
        return None;
    }
    let count = u32_at(bytes, 4)? as usize;
    let pairs = bytes.get(8..crc_at)?.chunks_exact(8).take(count);
    Some(pairs.filter_map(|pair| Some((u32_at(pair, 0)?, u32_at(pair, 4)?))).collect())
}

/// Says of transactions whether they committed, from the files below `pg_xact`.
///
/// Source: `src/backend/access/transam/clog.c`: two bits each, 32 pages a file.
#[derive(Debug, Clone, Default)]
pub struct CommitLog {
    segments: std::collections::BTreeMap<u32, Vec<u8>>,
}

impl CommitLog {
    /// Transactions that one file tells of.
    const PER_SEGMENT: u32 = 32 * 8192 * 4;

    /// Returns the number of the file that tells of a transaction; its name is this in four hex digits.
    pub fn segment_of(xid: u32) -> u32 {
        xid / Self::PER_SEGMENT
    }

    /// Takes one file.
    pub fn add(&mut self, segment: u32, bytes: Vec<u8>) {
        self.segments.insert(segment, bytes);
    }

    /// Returns whether a transaction committed; `None` where that is not known, or was not decided yet.
    pub fn committed(&self, xid: u32) -> Option<bool> {
        // Bootstrap and frozen.
        if xid == 1 || xid == 2 {
            return Some(true);
        }
        let bytes = self.segments.get(&Self::segment_of(xid))?;
        let in_segment = xid % Self::PER_SEGMENT;
        let byte = bytes.get(in_segment as usize / 4)?;
        match byte >> (in_segment % 4 * 2) & 3 {
            1 => Some(true),
            2 => Some(false),
            _ => None,
        }
    }
}

/// What a record did to files, databases and tablespaces at once, without waiting for a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StorageChange {
    /// The files of a relation were made.
    Created(RelFileLocator),
    /// A database's directories were removed.
    DatabaseDropped {
        /// Its OID.
        database: u32,
    },
    /// A database was marked as invalid, because its removal begins: nobody can connect to it any more.
    DatabaseInvalidated {
        /// Its OID.
        database: u32,
    },
    /// A tablespace was made, at a path of its own: replay makes a link there and writes into it.
    TablespaceCreated {
        /// Its OID.
        tablespace: u32,
        /// Where; empty for one inside the data directory.
        location: String,
    },
    /// A tablespace was removed.
    TablespaceDropped {
        /// Its OID.
        tablespace: u32,
    },
    /// `pg_filenode.map` of a database was replaced.
    MapReplaced {
        /// The database's OID; 0 for the shared catalogs.
        database: u32,
        /// The new pairs of a catalog's OID and the number of its files.
        files: Vec<(u32, u32)>,
    },
}

impl WalRecord<'_> {
    /// Returns what the record did to files, databases or tablespaces; `None` for other kinds. Sources:
    /// `storage_xlog.h`, `dbcommands_xlog.h`, `tablespace.h`, `relmapper.h`.
    pub fn storage_change(&self) -> Option<StorageChange> {
        let operation = self.header.info & 0xF0;
        // 15 made room for a second way of CREATE DATABASE.
        let database_drop = if self.version().0 >= 15 { 0x20 } else { 0x10 };
        match (self.header.resource_manager, operation) {
            (RMGR_SMGR, SMGR_CREATE) => {
                let main = self.parts()?.main;
                let word = |at| u32_at(main, at);
                // Only the rows' own file; its other forks come with it.
                (word(12)? == 0).then_some(())?;
                Some(StorageChange::Created(RelFileLocator {
                    tablespace: word(0)?,
                    database: word(4)?,
                    relation: word(8)?,
                }))
            }
            (RMGR_DATABASE, operation) if operation == database_drop => {
                Some(StorageChange::DatabaseDropped { database: u32_at(self.parts()?.main, 0)? })
            }
            (RMGR_HEAP, _) if self.header.info & 0x70 == HEAP_INPLACE => {
                self.invalidated_database()
            }
            (RMGR_TABLESPACE, TABLESPACE_CREATE) => {
                let main = self.parts()?.main;
                let path = main.get(4..)?.split(|byte| *byte == 0).next()?;
                Some(StorageChange::TablespaceCreated {
                    tablespace: u32_at(main, 0)?,
                    location: String::from_utf8_lossy(path).into_owned(),
                })
            }
            (RMGR_TABLESPACE, TABLESPACE_DROP) => {
                let tablespace = u32_at(self.parts()?.main, 0)?;
                Some(StorageChange::TablespaceDropped { tablespace })
            }
            (RMGR_RELATION_MAP, 0) => {
                let main = self.parts()?.main;
                let files = parse_relation_map(main.get(12..)?)?;
                Some(StorageChange::MapReplaced { database: u32_at(main, 0)?, files })
            }
            _ => None,
        }
    }

    /// Source: `dropdb` in `src/backend/commands/dbcommands.c`, `DATCONNLIMIT_INVALID_DB` in `pg_database.h`.
    fn invalidated_database(&self) -> Option<StorageChange> {
        const INVALID: u32 = (-2i32).cast_unsigned();
        let parts = self.parts()?;
        let block = parts.blocks.first()?;
        (block.relation.tablespace == GLOBAL_TABLESPACE).then_some(())?;
        let page = block.image.and_then(|image| image.page());
        let columns = match &page {
            None => block.data.to_vec(),
            Some(page) => {
                let offset = u16_at(parts.main, 0)?;
                let mut tuples = heap_tuples(page).into_iter();
                tuples.find(|tuple| tuple.offset == offset)?.columns.to_vec()
            }
        };
        // Two names of 64 bytes stood before `datconnlimit` up to 14.
        let limit_at = if self.version().0 >= 15 { 80 } else { 208 };
        let database = u32_at(&columns, 0)?;
        (u32_at(&columns, limit_at)? == INVALID)
            .then_some(StorageChange::DatabaseInvalidated { database })
    }

    /// Returns the tables that a TRUNCATE named, with `wal_level = logical`: the OID of their database, and theirs.
    pub fn truncated_tables(&self) -> Option<(u32, Vec<u32>)> {
        self.is_logged_truncate().then_some(())?;
        let main = self.parts()?.main;
        let count = u32_at(main, 4)? as usize;
        let oids = main.get(12..)?.chunks_exact(4).take(count);
        Some((u32_at(main, 0)?, oids.filter_map(|oid| u32_at(oid, 0)).collect()))
    }

    /// Returns the next transaction id at a moment at which none was being given out: every record of that
    /// transaction and of later ones stands behind this one. `None` for other records.
    ///
    /// Source: `LogStandbySnapshot` in `src/backend/storage/ipc/standby.c`, which holds `XidGenLock`
    /// until the record is in WAL.
    pub fn next_xid(&self) -> Option<u32> {
        const RMGR_STANDBY: u8 = 8;
        const RUNNING_XACTS: u8 = 0x10;
        let is_snapshot = self.header.resource_manager == RMGR_STANDBY
            && self.header.info & 0xF0 == RUNNING_XACTS;
        is_snapshot.then(|| u32_at(self.parts()?.main, 12)).flatten()
    }
}

/// Returns whether the beginning of a page is that of a used heap page: for files that are read without their server.
pub fn is_used_page(page: &[u8]) -> bool {
    let (lower, upper) = (u16_at(page, 12).unwrap_or(0), u16_at(page, 14).unwrap_or(0));
    lower >= 24 && lower <= upper
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn class_columns(oid: u32, name: &str, namespace: u32, file: u32) -> Vec<u8> {
        let mut columns = vec![0; 160];
        columns[0..4].copy_from_slice(&oid.to_le_bytes());
        columns[4..4 + name.len()].copy_from_slice(name.as_bytes());
        columns[68..72].copy_from_slice(&namespace.to_le_bytes());
        columns[88..92].copy_from_slice(&file.to_le_bytes());
        columns[115] = b'r';
        columns
    }

    #[test]
    fn a_class_row_has_its_kind_where_the_version_puts_it() {
        let mut columns = class_columns(16384, "orders", 2200, 16999);
        let row = ClassRow::parse(&columns, MajorVersion(17)).unwrap();
        assert_eq!((row.oid, row.name.as_str(), row.namespace), (16384, "orders", 2200));
        assert_eq!((row.file, row.kind), (16999, RelationKind::Table));
        columns[119] = b'i';
        let row = ClassRow::parse(&columns, MajorVersion(18)).unwrap();
        assert_eq!(row.kind, RelationKind::Index);
        assert_eq!(ClassRow::parse(&columns[..115], MajorVersion(17)), None);
    }

    #[test]
    fn a_map_with_a_wrong_checksum_is_none() {
        for (length, crc_at) in [(512, 504), (524, 520)] {
            let mut bytes = vec![0; length];
            bytes[0..4].copy_from_slice(&RELATION_MAP_MAGIC.to_le_bytes());
            bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
            for (at, word) in [(8, 1259u32), (12, 1259), (16, 1249), (20, 16400)] {
                bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
            let crc = crc32c(&bytes[..crc_at]);
            bytes[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(parse_relation_map(&bytes), Some(vec![(1259, 1259), (1249, 16400)]));
            bytes[12] ^= 1;
            assert_eq!(parse_relation_map(&bytes), None);
        }
    }

    #[test]
    fn the_commit_log_has_two_bits_for_each_transaction() {
        let mut log = CommitLog::default();
        log.add(1, vec![0b10_01_00_11]);
        let first = 1 << 20;
        assert_eq!(CommitLog::segment_of(first), 1);
        let told: Vec<_> = (0..5).map(|n| log.committed(first + n)).collect();
        assert_eq!(told, [None, None, Some(true), Some(false), None]);
        assert_eq!((log.committed(2), log.committed(5)), (Some(true), None));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = parse_relation_map(&bytes);
            let _ = ClassRow::parse(&bytes, MajorVersion(18));
            let _ = oid_and_name(&bytes);
            let _ = is_used_page(&bytes);
        }
    }
}
