//! PostgreSQL's facts as types: no I/O, no clock, no async.
//!
//! Everything here is a value or a pure walk over bytes. Each outside fact
//! names the PostgreSQL source file or manual section it comes from.

mod backup_label;
mod bytes;
mod catalog;
mod control;
mod crc32c;
mod heap;
mod history;
mod lsn;
mod manifest;
mod manifest_write;
mod page;
mod record_walk;
mod relation_file;
mod tablespace_map;
mod timestamp;
mod version;
mod wal_blocks;
#[cfg(test)]
pub(crate) mod wal_build;
mod wal_damage;
mod wal_facts;
mod wal_name;
mod wal_page;
mod wal_record;
mod wal_walk;

pub use backup_label::{BackupFrom, BackupHistory, BackupLabel, BackupLabelError};
pub use catalog::{
    CLASS_ROW_BYTES, ClassRow, CommitLog, FIRST_USER_OID, PG_CLASS_OID, PG_DATABASE_OID,
    PG_NAMESPACE_OID, RelationKind, StorageChange, is_used_page, oid_and_name, parse_relation_map,
};
pub use control::{
    CONTROL_FILE_BYTES, CheckpointCopy, ClusterState, ControlFile, ControlFileError, StandbyLimits,
    WalLevel,
};
pub use crc32c::{Crc32c, crc32c, crc32c_joined};
pub use heap::{HeapChange, HeapTuple, LoggedColumns, RowPlace, RowState, heap_tuples};
pub use history::{HISTORY_FILE_BYTES_MAX, HistoryError, TimelineHistory, TimelineStretch};
pub use lsn::{Lsn, ParseLsnError, SegmentSize, SystemId, Timeline};
pub use manifest::{
    ChecksumAlgorithm, ManifestChecksum, ManifestEnd, ManifestError, ManifestFile, ManifestReader,
    WalRange,
};
pub use manifest_write::{ManifestWriter, ManifestedFile, wal_ranges_of};
pub use page::{PageState, page_checksum, page_lsn, page_state};
pub use relation_file::{Fork, RelationDirectory, RelationFile, is_temporary_relation};
pub use tablespace_map::{TablespaceMap, TablespaceMapEntry, TablespaceMapError};
pub use timestamp::{ParsePgTimestampError, PgTimestamp};
pub use version::{MajorVersion, ParseServerVersionError, ServerVersion};
pub use wal_blocks::{BlockRef, DATA_PAGE_BYTES, PageImage, RecordParts, WalRecord};
pub use wal_damage::{ExpectedLink, WalDamage};
pub use wal_facts::{
    DROPS_LISTED_MAX, EndTimes, IncompleteRecord, RELATIONS_PER_DROP_LISTED_MAX,
    RESTORE_POINTS_LISTED_MAX, RelationDrop, RestorePoint, SegmentFacts,
    TIMELINE_CHANGES_LISTED_MAX, TimelineChange, WalMarks, WalkEnd,
};
pub use wal_name::{ArchiveOrder, SegmentName, WalFileName, WalFileNameError};
pub use wal_page::{
    ClusterFacts, LONG_PAGE_HEADER_BYTES, PageFlags, PageHeader, PageHeaderError,
    SHORT_PAGE_HEADER_BYTES,
};
pub use wal_record::{
    DROPPED_RELATIONS_LISTED_MAX, Mark, RECORD_HEADER_BYTES, RecordHeader, RecordShapeError,
    RelFileLocator, TransactionEnd, WalEvent,
};
pub use wal_walk::{Extent, SegmentExpectation, SegmentWalk, WalCarry};
