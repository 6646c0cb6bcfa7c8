//! One WAL record: its header, and what the records mean that Highwater must know.
//!
//! ```text
//! 0  u32 xl_tot_len   whole record with this header
//! 4  u32 xl_xid
//! 8  u64 xl_prev      LSN of the record before
//! 16 u8  xl_info      high 4 bits belong to the resource manager
//! 17 u8  xl_rmid
//! 18     padding
//! 20 u32 xl_crc       CRC-32C of bytes 24.. first, then of bytes 0..20
//! 24 block and data headers, then block data, then main data (always last)
//! ```
//!
//! Sources: `src/include/access/xlogrecord.h`, `rmgrlist.h`, `xact.h`,
//! `src/include/catalog/pg_control.h`, `src/backend/access/rmgrdesc/xactdesc.c`.
//! Walking from record to record is `record_walk`'s part.

use super::bytes::{i64_at, u32_at, u64_at};
use super::{Lsn, MajorVersion, PgTimestamp, Timeline};

/// Bytes of a record header (`SizeOfXLogRecord`).
pub const RECORD_HEADER_BYTES: usize = 24;
/// How many dropped relations of one transaction are listed; the rest is counted.
pub const DROPPED_RELATIONS_LISTED_MAX: usize = 1024;

/// `XLogRecordMaxSize`, the longest record since PostgreSQL 16.
const RECORD_BYTES_MAX: u32 = 1020 << 20;
/// `MaxAllocSize`, the only limit before 16 (`src/include/utils/memutils.h`).
const RECORD_BYTES_MAX_BEFORE_16: u32 = 0x3FFF_FFFF;

const RMGR_XLOG: u8 = 0;
const RMGR_XACT: u8 = 1;

const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_SWITCH: u8 = 0x40;
const XLOG_BACKUP_END: u8 = 0x50;
const XLOG_RESTORE_POINT: u8 = 0x70;
const XLOG_END_OF_RECOVERY: u8 = 0x90;
const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

const XACT_COMMIT: u8 = 0x00;
const XACT_PREPARE: u8 = 0x10;
const XACT_ABORT: u8 = 0x20;
const XACT_COMMIT_PREPARED: u8 = 0x30;
const XACT_ABORT_PREPARED: u8 = 0x40;
const XACT_OPERATION_MASK: u8 = 0x70;
const XACT_HAS_INFO: u8 = 0x80;

/// The 24 bytes that start a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// Bytes of the whole record, this header included, page headers not.
    pub total_bytes: u32,
    /// The transaction that wrote the record; 0 for none.
    pub xid: u32,
    /// The start of the record before this one.
    pub previous: Lsn,
    /// What the record is to its resource manager, in the high four bits.
    pub info: u8,
    /// The resource manager (`src/include/access/rmgrlist.h`).
    pub resource_manager: u8,
    /// CRC-32C of the record.
    pub crc: u32,
}

impl RecordHeader {
    /// Returns the header in `bytes`, unchecked.
    pub fn parse(bytes: &[u8; RECORD_HEADER_BYTES]) -> Self {
        let word = |at: usize| u32_at(bytes, at).unwrap_or_default();
        Self {
            total_bytes: word(0),
            xid: word(4),
            previous: Lsn(u64_at(bytes, 8).unwrap_or_default()),
            info: bytes[16],
            resource_manager: bytes[17],
            crc: word(20),
        }
    }

    /// Returns whether a record of `version` can have this length.
    pub fn length_is_legal(total_bytes: u32, version: MajorVersion) -> bool {
        let max = if version.0 >= 16 { RECORD_BYTES_MAX } else { RECORD_BYTES_MAX_BEFORE_16 };
        (24..=max).contains(&total_bytes)
    }

    /// Returns whether `version` knows the resource manager: 0 to 21, 22 (XLOG2)
    /// from 19 on, and 128 to 255 (extensions) from 15 on.
    pub fn resource_manager_is_legal(&self, version: MajorVersion) -> bool {
        match self.resource_manager {
            0..=21 => true,
            22 => version.0 >= 19,
            128..=255 => version.0 >= 15,
            23..=127 => false,
        }
    }

    /// Returns whether the record ends its segment (`pg_switch_wal`, `archive_timeout`).
    pub fn is_switch(&self) -> bool {
        self.resource_manager == RMGR_XLOG && self.info & 0xF0 == XLOG_SWITCH
    }

    fn is_prepare(&self) -> bool {
        self.resource_manager == RMGR_XACT && self.info & XACT_OPERATION_MASK == XACT_PREPARE
    }

    /// Returns whether [`decode_event`] finds an event in such a record.
    pub(super) fn has_event(&self) -> bool {
        match self.resource_manager {
            RMGR_XLOG => matches!(
                self.info & 0xF0,
                XLOG_CHECKPOINT_SHUTDOWN
                    | XLOG_CHECKPOINT_ONLINE
                    | XLOG_SWITCH
                    | XLOG_BACKUP_END
                    | XLOG_RESTORE_POINT
                    | XLOG_END_OF_RECOVERY
                    | XLOG_OVERWRITE_CONTRECORD
            ),
            RMGR_XACT => matches!(
                self.info & XACT_OPERATION_MASK,
                XACT_COMMIT
                    | XACT_PREPARE
                    | XACT_ABORT
                    | XACT_COMMIT_PREPARED
                    | XACT_ABORT_PREPARED
            ),
            _ => false,
        }
    }
}

/// Which file set holds a relation (`RelFileLocator`, `RelFileNode` before 16).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelFileLocator {
    /// OID of the tablespace.
    pub tablespace: u32,
    /// OID of the database; 0 for shared relations.
    pub database: u32,
    /// The relation's file number (`pg_class.relfilenode`).
    pub relation: u32,
}

/// The end of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionEnd {
    /// True for commit, false for abort.
    pub committed: bool,
    /// True when a prepared transaction ended (`COMMIT PREPARED`, `ROLLBACK PREPARED`).
    pub prepared: bool,
    /// The transaction, as `recovery_target_xid` means it: for a prepared one the
    /// xid it was prepared under. `None` when the record is so long that this part was not kept.
    pub xid: Option<u32>,
    /// When it ended, by the server's clock; not monotonic in WAL order.
    pub time: PgTimestamp,
    /// OID of the database, where the record says it.
    pub database: Option<u32>,
    /// The subtransactions that ended with it; fewer than `subtransaction_count` when the record is so
    /// long that the rest was not kept.
    pub subtransactions: Vec<u32>,
    /// How many there are.
    pub subtransaction_count: u32,
    /// Relation files that the end of the transaction removes: tables and indexes
    /// dropped, but also what TRUNCATE, VACUUM FULL, CLUSTER and REINDEX replaced. At most
    /// [`DROPPED_RELATIONS_LISTED_MAX`].
    pub dropped: Vec<RelFileLocator>,
    /// How many such files there are.
    pub dropped_count: u32,
}

/// What a record means, of those that Highwater must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// A transaction committed or aborted.
    Transaction(TransactionEnd),
    /// A transaction was prepared (`PREPARE TRANSACTION`); whether it commits is still open.
    Prepared,
    /// `pg_create_restore_point` was called.
    RestorePoint {
        /// The name, at most 63 bytes; bytes that are not UTF-8 show as U+FFFD.
        name: String,
        /// When.
        time: PgTimestamp,
    },
    /// The rest of the segment is padding.
    Switch,
    /// Archive recovery ended with a promotion that took no checkpoint.
    EndOfRecovery {
        /// When.
        time: PgTimestamp,
        /// The timeline that begins here.
        timeline: Timeline,
        /// The timeline it left.
        previous_timeline: Timeline,
    },
    /// A checkpoint completed.
    Checkpoint {
        /// True for the checkpoint of a shutdown or of the end of recovery.
        shutdown: bool,
        /// Where redo from this checkpoint begins.
        redo: Lsn,
        /// When it began; whole seconds only.
        time: PgTimestamp,
        /// The timeline it is on.
        timeline: Timeline,
        /// The timeline before; differs only where a timeline begins.
        previous_timeline: Timeline,
    },
    /// A record cut by a crash was given up; this one stands where it would have continued.
    OverwriteContrecord {
        /// Where the abandoned record began.
        abandoned: Lsn,
        /// When.
        time: PgTimestamp,
    },
    /// A base backup from a primary ended; replaying this makes it consistent.
    BackupEnd {
        /// The backup's start (its redo position).
        start: Lsn,
    },
}

/// A record with an event in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Where the record begins.
    pub lsn: Lsn,
    /// Where it ends, rounded up to 8 bytes (excluded); of a switch, the end of the segment.
    pub end_lsn: Lsn,
    /// What it means.
    pub event: WalEvent,
}

/// A record with a right checksum does not have the shape its kind has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the record's parts do not fit its length")]
pub struct RecordShapeError;

/// Returns the event of a record, or `None` when its kind has none.
///
/// `body` is the record from byte 24 on, or as much of its beginning as was kept;
/// what lies beyond is left out of the event, never guessed.
pub(super) fn decode_event(
    header: &RecordHeader,
    body: &[u8],
    version: MajorVersion,
) -> Result<Option<WalEvent>, RecordShapeError> {
    if header.is_switch() {
        return Ok(Some(WalEvent::Switch));
    }
    if !header.has_event() {
        return Ok(None);
    }
    if header.is_prepare() {
        return Ok(Some(WalEvent::Prepared));
    }
    let main = main_data(header, body, version).ok_or(RecordShapeError)?;
    let event = match header.resource_manager {
        RMGR_XACT => decode_transaction(header, main, version).map(WalEvent::Transaction),
        _ => decode_xlog(header, main, version),
    };
    event.map(Some).ok_or(RecordShapeError)
}

/// Returns the main data, or as much of it as `body` holds.
fn main_data<'a>(header: &RecordHeader, body: &'a [u8], version: MajorVersion) -> Option<&'a [u8]> {
    let body_bytes = (header.total_bytes as usize).checked_sub(RECORD_HEADER_BYTES)?;
    let mut at = 0;
    let main_bytes = loop {
        match *body.get(at)? {
            255 => break usize::from(*body.get(at + 1)?),
            254 => break u32_at(body, at + 1)? as usize,
            253 => at += 3,
            252 => at += 5,
            0..=32 => at = after_block_header(body, at, version)?,
            33..=251 => return None,
        }
    };
    let start = body_bytes.checked_sub(main_bytes)?;
    (start > at).then(|| body.get(start..)).flatten()
}

/// Returns where the block header at `at` ends.
fn after_block_header(body: &[u8], at: usize, version: MajorVersion) -> Option<usize> {
    const HAS_IMAGE: u8 = 0x10;
    const SAME_RELATION: u8 = 0x80;
    const IMAGE_HAS_HOLE: u8 = 0x01;
    // 14 and before: one compression bit (0x02); from 15 on one per method.
    let compressed_bits = if version.0 >= 15 { 0x1C } else { 0x02 };
    let fork_flags = *body.get(at + 1)?;
    let mut end = at + 4;
    if fork_flags & HAS_IMAGE != 0 {
        let image_info = *body.get(end + 4)?;
        let hole_length = image_info & IMAGE_HAS_HOLE != 0 && image_info & compressed_bits != 0;
        end += if hole_length { 7 } else { 5 };
    }
    if fork_flags & SAME_RELATION == 0 {
        end += 12;
    }
    Some(end + 4)
}

fn decode_xlog(header: &RecordHeader, main: &[u8], version: MajorVersion) -> Option<WalEvent> {
    let time_at = |at| i64_at(main, at).map(PgTimestamp);
    let timeline_at = |at| u32_at(main, at).map(Timeline);
    Some(match header.info & 0xF0 {
        info @ (XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE) => WalEvent::Checkpoint {
            shutdown: info == XLOG_CHECKPOINT_SHUTDOWN,
            redo: Lsn(u64_at(main, 0)?),
            timeline: timeline_at(8)?,
            previous_timeline: timeline_at(12)?,
            time: PgTimestamp::from_unix_seconds(i64_at(main, checkpoint_time_offset(version))?),
        },
        XLOG_BACKUP_END => WalEvent::BackupEnd { start: Lsn(u64_at(main, 0)?) },
        XLOG_RESTORE_POINT => {
            let name = main.get(8..72)?.split(|&byte| byte == 0).next()?;
            let name = String::from_utf8_lossy(name).into_owned();
            WalEvent::RestorePoint { name, time: time_at(0)? }
        }
        XLOG_END_OF_RECOVERY => WalEvent::EndOfRecovery {
            time: time_at(0)?,
            timeline: timeline_at(8)?,
            previous_timeline: timeline_at(12)?,
        },
        XLOG_OVERWRITE_CONTRECORD => {
            WalEvent::OverwriteContrecord { abandoned: Lsn(u64_at(main, 0)?), time: time_at(8)? }
        }
        _ => return None,
    })
}

/// Returns where the time (Unix seconds) stands in the `CheckPoint` struct.
pub(super) fn checkpoint_time_offset(version: MajorVersion) -> usize {
    if version.0 >= 19 { 72 } else { 64 }
}

/// Decodes `xl_xact_commit` or `xl_xact_abort`: the time, then, announced by the
/// bits of `xinfo`, in this order: database, subtransactions, relations, dropped
/// statistics (15 on), invalidations, two-phase xid. Later parts are not needed.
fn decode_transaction(
    header: &RecordHeader,
    main: &[u8],
    version: MajorVersion,
) -> Option<TransactionEnd> {
    let operation = header.info & XACT_OPERATION_MASK;
    let prepared = matches!(operation, XACT_COMMIT_PREPARED | XACT_ABORT_PREPARED);
    let mut end = TransactionEnd {
        committed: matches!(operation, XACT_COMMIT | XACT_COMMIT_PREPARED),
        prepared,
        xid: (!prepared).then_some(header.xid),
        time: PgTimestamp(i64_at(main, 0)?),
        database: None,
        subtransactions: Vec::new(),
        subtransaction_count: 0,
        dropped: Vec::new(),
        dropped_count: 0,
    };
    if header.info & XACT_HAS_INFO != 0 {
        let xinfo = u32_at(main, 8)?;
        // `None`: the kept part of the record ended; the time is known all the same.
        let _ = decode_transaction_parts(&mut end, xinfo, main.get(12..)?, version);
    }
    Some(end)
}

fn decode_transaction_parts(
    end: &mut TransactionEnd,
    xinfo: u32,
    parts: &[u8],
    version: MajorVersion,
) -> Option<()> {
    let has = |bit: u32| xinfo & (1 << bit) != 0;
    let mut at = 0;
    if has(0) {
        end.database = Some(u32_at(parts, at)?);
        at += 8;
    }
    if has(1) {
        end.subtransaction_count = u32_at(parts, at)?;
        let kept = parts.get(at + 4..)?.chunks_exact(4);
        let listed = kept.take(end.subtransaction_count as usize);
        end.subtransactions = listed.filter_map(|xid| u32_at(xid, 0)).collect();
        at = after_array(parts, at, 4)?;
    }
    if has(2) {
        end.dropped_count = u32_at(parts, at)?;
        let kept = parts.get(at + 4..)?.chunks_exact(12);
        let listed = (end.dropped_count as usize).min(DROPPED_RELATIONS_LISTED_MAX);
        end.dropped = kept.take(listed).filter_map(locator).collect();
        at = after_array(parts, at, 12)?;
    }
    if has(8) {
        // `xl_xact_stats_item` grew from 12 to 16 bytes in 18.
        at = after_array(parts, at, if version.0 >= 18 { 16 } else { 12 })?;
    }
    if has(3) {
        at = after_array(parts, at, 16)?;
    }
    if has(4) && end.prepared {
        end.xid = Some(u32_at(parts, at)?);
    }
    Some(())
}

/// Returns where an array ends: a u32 count, then `item_bytes` for each.
fn after_array(parts: &[u8], at: usize, item_bytes: usize) -> Option<usize> {
    (u32_at(parts, at)? as usize).checked_mul(item_bytes)?.checked_add(at + 4)
}

fn locator(bytes: &[u8]) -> Option<RelFileLocator> {
    Some(RelFileLocator {
        tablespace: u32_at(bytes, 0)?,
        database: u32_at(bytes, 4)?,
        relation: u32_at(bytes, 8)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V14: MajorVersion = MajorVersion(14);
    const V15: MajorVersion = MajorVersion(15);
    const V18: MajorVersion = MajorVersion(18);

    fn record(resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> RecordHeader {
        let total_bytes = u32::try_from(24 + body.len()).unwrap();
        RecordHeader { total_bytes, xid, previous: Lsn(0), info, resource_manager, crc: 0 }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn with_short_header(main: &[u8]) -> Vec<u8> {
        let mut body = vec![255, u8::try_from(main.len()).unwrap()];
        body.extend(main);
        body
    }

    fn transaction(info: u8, body: &[u8], version: MajorVersion) -> TransactionEnd {
        match decode_event(&record(1, info, 77, body), body, version).unwrap().unwrap() {
            WalEvent::Transaction(end) => end,
            other => unreachable!("{other:?}"),
        }
    }

    /// Every array that may stand before the two-phase xid, with a size that depends on the version.
    fn prepared_commit(stats_item_words: usize) -> Vec<u8> {
        let mut main = 5i64.to_le_bytes().to_vec();
        let xinfo = 1 | 1 << 1 | 1 << 2 | 1 << 8 | 1 << 3 | 1 << 4 | 1 << 7;
        main.extend(words(&[xinfo, 16384, 1663])); // database
        main.extend(words(&[2, 100, 101])); // subtransactions
        main.extend(words(&[1, 1663, 16384, 24576])); // relations
        main.extend(words(&[1])); // dropped statistics
        main.extend(words(&vec![9; stats_item_words]));
        main.extend(words(&[2])); // invalidations
        main.extend(words(&[0; 8]));
        main.extend(words(&[4242]));
        main.extend(b"gid\0");
        with_short_header(&main)
    }

    #[test]
    fn the_xid_of_a_prepared_transaction_is_found_behind_everything_before_it() {
        for (version, item) in [(V15, 3), (MajorVersion(17), 3), (V18, 4)] {
            let body = prepared_commit(item);
            let end = transaction(0x30 | 0x80, &body, version);
            assert_eq!(end.xid, Some(4242), "{version}");
            assert_eq!(end.database, Some(16384));
            assert_eq!((end.subtransaction_count, end.subtransactions), (2, vec![100, 101]));
            assert_eq!(
                end.dropped,
                [RelFileLocator { tablespace: 1663, database: 16384, relation: 24576 }]
            );
            assert!(end.committed && end.prepared);
        }
    }

    #[test]
    fn a_commit_without_xinfo_is_a_time_and_the_records_own_xid() {
        let body = with_short_header(&7i64.to_le_bytes());
        let end = transaction(0, &body, V14);
        assert_eq!((end.xid, end.time, end.database), (Some(77), PgTimestamp(7), None));
        assert!(!transaction(0x20, &body, V14).committed);
    }

    #[test]
    fn a_prepare_is_an_event_whatever_its_body() {
        let header = record(RMGR_XACT, XACT_PREPARE, 9, &[1, 2, 3]);
        assert_eq!(decode_event(&header, &[1, 2, 3], V18), Ok(Some(WalEvent::Prepared)));
    }

    #[test]
    fn a_commit_whose_kept_part_ends_early_still_has_its_time() {
        let mut main = 7i64.to_le_bytes().to_vec();
        main.extend(words(&[1 << 2, 100_000]));
        main.extend(words(&[1, 2, 3, 4, 5, 6]));
        let mut body = vec![254];
        body.extend(words(&[12 + 4 + 1_200_000]));
        body.extend(main);
        let header =
            RecordHeader { total_bytes: 24 + 5 + 16 + 1_200_000, ..record(1, 0xB0, 1, &[]) };
        let Ok(Some(WalEvent::Transaction(end))) = decode_event(&header, &body, V15) else {
            unreachable!()
        };
        assert_eq!((end.time, end.dropped_count, end.dropped.len()), (PgTimestamp(7), 100_000, 2));
        assert_eq!(end.xid, None, "it stands beyond the kept part");
    }

    #[test]
    fn main_data_is_found_behind_block_headers_of_each_version() {
        let image_info = |info: u8, hole: bool| {
            let mut body = vec![0, 0x10, 0, 0, 4, 0, 0, 0, info];
            body.extend(if hole { &[8, 0][..] } else { &[] });
            body.extend(words(&[1663, 5, 1000, 0]));
            body.extend([253, 1, 0, 252, 1, 0, 0, 0, 255, 8]);
            body.extend([1, 2, 3, 4]); // the page image
            body.extend(9i64.to_le_bytes());
            body
        };
        for (version, info, hole) in [
            (V14, 0x01, false),
            (V14, 0x03, true),
            (V15, 0x03, false),
            (V15, 0x05, true),
            (V18, 0x11, true),
        ] {
            let body = image_info(info, hole);
            let main = main_data(&record(1, 0, 0, &body), &body, version);
            assert_eq!(main, Some(&9i64.to_le_bytes()[..]), "{version} {info:#x}");
        }
    }

    #[test]
    fn lengths_and_resource_managers_follow_the_version() {
        assert!(!RecordHeader::length_is_legal(23, V18));
        assert!(RecordHeader::length_is_legal(1020 << 20, V18));
        assert!(!RecordHeader::length_is_legal((1020 << 20) + 1, V18));
        assert!(RecordHeader::length_is_legal((1020 << 20) + 1, V15));
        let legal = |id, version| record(id, 0, 0, &[]).resource_manager_is_legal(version);
        assert!(legal(21, V14) && !legal(22, V18) && legal(22, MajorVersion(19)));
        assert!(!legal(128, V14) && legal(128, V15) && !legal(127, V18));
    }

    proptest! {
        #[test]
        fn no_body_panics(
            resource_manager in 0u8..2,
            info: u8,
            version in 13u32..20,
            cut in 0u32..100,
            body in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut header = record(resource_manager, info, 1, &body);
            header.total_bytes = (header.total_bytes + cut).saturating_sub(50);
            let _ = decode_event(&header, &body, MajorVersion(version));
            let _ = decode_event(&header, &with_short_header(&body), MajorVersion(version));
        }
    }
}
