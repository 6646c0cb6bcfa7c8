//! `global/pg_control`: what a cluster says of itself.
//!
//! The file has 8192 bytes, zeros after a struct of at most 512. The layout is
//! named by `pg_control_version`, and everything before the checksum is covered by it:
//!
//! ```text
//! 0  u64 system_identifier      8  u32 pg_control_version     12 u32 catalog_version_no
//! 16 u32 state                  24 i64 time (unix s)          32 u64 checkPoint
//! 40     checkPointCopy (88 bytes; 96 from 19 on), then the rest in the same order
//! ```
//!
//! Sources: `src/include/catalog/pg_control.h`, `src/common/controldata_utils.c`.

use super::bytes::{i32_at, i64_at, u32_at, u64_at};
use super::wal_record::checkpoint_time_offset;
use super::{Lsn, MajorVersion, PgTimestamp, SegmentSize, SystemId, Timeline, crc32c};

/// Size of the file on disk, in bytes (`PG_CONTROL_FILE_SIZE`).
pub const CONTROL_FILE_BYTES: usize = 8192;

/// What the cluster was doing when the file was written (`DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Starting up.
    StartingUp,
    /// Shut down cleanly.
    ShutDown,
    /// Shut down cleanly while a standby.
    ShutDownInRecovery,
    /// Shutting down.
    ShuttingDown,
    /// In crash recovery.
    InCrashRecovery,
    /// In archive recovery; a standby is.
    InArchiveRecovery,
    /// In production (or crashed there).
    InProduction,
}

/// How much the WAL carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalLevel {
    /// Not enough for archiving.
    Minimal,
    /// Enough for archiving and standbys.
    Replica,
    /// Enough for logical decoding too.
    Logical,
}

/// The facts in `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The cluster's system identifier.
    pub system_id: SystemId,
    /// `pg_control_version`: the layout, 1300, 1700, 1800 or 1902.
    pub control_version: u32,
    /// `catalog_version_no`; part of the name of tablespace directories.
    pub catalog_version: u32,
    /// The major version.
    pub version: MajorVersion,
    /// The state.
    pub state: ClusterState,
    /// When the file was last written; whole seconds.
    pub modified: PgTimestamp,
    /// Where the record of the latest checkpoint (or restartpoint) begins.
    pub checkpoint_lsn: Lsn,
    /// The latest checkpoint.
    pub checkpoint: CheckpointCopy,
    /// How far recovery must at least go before the data is consistent;
    /// [`Lsn::INVALID`] outside archive recovery.
    pub min_recovery_point: Lsn,
    /// The timeline of that point; 0 if there is none.
    pub min_recovery_point_timeline: u32,
    /// Where the base backup being recovered began, or [`Lsn::INVALID`].
    pub backup_start: Lsn,
    /// Where the base backup (from a standby) being recovered ended, or [`Lsn::INVALID`].
    pub backup_end: Lsn,
    /// Whether recovery must see the end of the base backup before it is consistent.
    pub backup_end_required: bool,
    /// The level of the WAL now being written.
    pub wal_level: WalLevel,
    /// Whether hint bits are logged in WAL.
    pub wal_log_hints: bool,
    /// The settings a standby must not undercut.
    pub limits: StandbyLimits,
    /// Data page size, in bytes.
    pub block_size: u32,
    /// Blocks in one file of a relation.
    pub relation_segment_blocks: u32,
    /// WAL page size, in bytes.
    pub wal_block_size: u32,
    /// WAL segment size.
    pub wal_segment_size: SegmentSize,
    /// 0 when data pages carry no checksums.
    pub data_checksum_version: u32,
}

/// What `pg_control` keeps of the latest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointCopy {
    /// Where redo from it begins.
    pub redo: Lsn,
    /// Its timeline.
    pub timeline: Timeline,
    /// The timeline before, different only where a timeline began.
    pub previous_timeline: Timeline,
    /// Whether full page writes were on.
    pub full_page_writes: bool,
    /// When it began; whole seconds.
    pub time: PgTimestamp,
}

/// The settings that a hot standby must have at least as large as here
/// (manual, "Hot Standby", "Administrator's Overview").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyLimits {
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_transaction: i32,
}

/// Why bytes are not a usable `pg_control`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Fewer bytes than the struct has.
    #[error("pg_control is cut: {found} bytes")]
    Cut {
        /// How many bytes there were.
        found: usize,
    },
    /// The layout is not known: another version, or another byte order.
    #[error(
        "pg_control has version {control_version} (catalog {catalog_version}), which is not known"
    )]
    UnknownVersion {
        /// `pg_control_version`.
        control_version: u32,
        /// `catalog_version_no`.
        catalog_version: u32,
    },
    /// The checksum is wrong. A file read while the server wrote it looks so:
    /// read again; the same wrong checksum twice means damage.
    #[error("pg_control has the checksum {computed:08X}, it says {stored:08X}")]
    BadChecksum {
        /// The CRC-32C in the file.
        stored: u32,
        /// The CRC-32C of the bytes.
        computed: u32,
    },
    /// A field has a value that PostgreSQL never writes, under a right checksum.
    #[error("pg_control has the impossible value {found} for {field}")]
    BadField {
        /// The field's name.
        field: &'static str,
        /// The value found.
        found: u64,
    },
}

/// Where a layout differs from that of 1300.
struct Layout {
    /// Added to every offset after the checkpoint copy.
    shift: usize,
    /// Added to those after `relseg_size`, too.
    late_shift: usize,
    crc_offset: usize,
}

impl Layout {
    fn of(control_version: u32) -> Option<Self> {
        let (shift, late_shift, crc_offset) = match control_version {
            1300 | 1700 => (0, 0, 288),
            1800 => (0, 0, 292),
            1902 => (8, 12, 304),
            _ => return None,
        };
        Some(Self { shift, late_shift, crc_offset })
    }
}

impl ControlFile {
    /// Returns the facts in `bytes`, the file's beginning (512 bytes are always enough).
    ///
    /// Nothing is taken from a file with a wrong checksum.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlFileError> {
        let cut = || ControlFileError::Cut { found: bytes.len() };
        let control_version = u32_at(bytes, 8).ok_or_else(cut)?;
        let catalog_version = u32_at(bytes, 12).ok_or_else(cut)?;
        let unknown = ControlFileError::UnknownVersion { control_version, catalog_version };
        let Some(layout) = Layout::of(control_version) else { return Err(unknown) };
        let stored = u32_at(bytes, layout.crc_offset).ok_or_else(cut)?;
        let computed = crc32c(&bytes[..layout.crc_offset]);
        if stored != computed {
            return Err(ControlFileError::BadChecksum { stored, computed });
        }
        let version = match control_version {
            // Betas of 19 changed the catalog often; the layout is known all the same.
            1902 => MajorVersion(19),
            _ => MajorVersion::from_catalog_version(catalog_version).ok_or(unknown)?,
        };
        let fields = Fields { bytes, shift: layout.shift, late_shift: layout.late_shift };
        fields.read(version, control_version, catalog_version)
    }

    /// Returns the name of the directory that holds this cluster's part of a
    /// tablespace, such as `PG_18_202506291` (`TABLESPACE_VERSION_DIRECTORY`).
    pub fn tablespace_version_directory(&self) -> String {
        format!("PG_{}_{}", self.version, self.catalog_version)
    }
}

/// Typed reads over bytes whose length was checked by the checksum.
struct Fields<'a> {
    bytes: &'a [u8],
    shift: usize,
    late_shift: usize,
}

impl Fields<'_> {
    fn u32(&self, offset: usize) -> u32 {
        u32_at(self.bytes, offset).unwrap_or_default()
    }

    fn lsn(&self, offset: usize) -> Lsn {
        Lsn(u64_at(self.bytes, offset).unwrap_or_default())
    }

    fn i32(&self, offset: usize) -> i32 {
        i32_at(self.bytes, offset).unwrap_or_default()
    }

    fn seconds(&self, offset: usize) -> PgTimestamp {
        PgTimestamp::from_unix_seconds(i64_at(self.bytes, offset).unwrap_or_default())
    }

    fn bool(&self, offset: usize) -> bool {
        self.bytes.get(offset).is_some_and(|&byte| byte != 0)
    }

    fn read(
        &self,
        version: MajorVersion,
        control_version: u32,
        catalog_version: u32,
    ) -> Result<ControlFile, ControlFileError> {
        let (s, late) = (self.shift, self.late_shift);
        Ok(ControlFile {
            system_id: SystemId(self.lsn(0).0),
            control_version,
            catalog_version,
            version,
            state: self.state()?,
            modified: self.seconds(24),
            checkpoint_lsn: self.lsn(32),
            checkpoint: CheckpointCopy {
                redo: self.lsn(40),
                timeline: Timeline(self.u32(48)),
                previous_timeline: Timeline(self.u32(52)),
                full_page_writes: self.bool(56),
                time: self.seconds(40 + checkpoint_time_offset(version)),
            },
            min_recovery_point: self.lsn(136 + s),
            min_recovery_point_timeline: self.u32(144 + s),
            backup_start: self.lsn(152 + s),
            backup_end: self.lsn(160 + s),
            backup_end_required: self.bool(168 + s),
            wal_level: self.wal_level(172 + s)?,
            wal_log_hints: self.bool(176 + s),
            limits: StandbyLimits {
                max_connections: self.i32(180 + s),
                max_worker_processes: self.i32(184 + s),
                max_wal_senders: self.i32(188 + s),
                max_prepared_transactions: self.i32(192 + s),
                max_locks_per_transaction: self.i32(196 + s),
            },
            block_size: self.u32(216 + s),
            relation_segment_blocks: self.u32(220 + s),
            wal_block_size: self.u32(224 + late),
            wal_segment_size: self.segment_size(228 + late)?,
            data_checksum_version: self.u32(252 + late),
        })
    }

    fn state(&self) -> Result<ClusterState, ControlFileError> {
        Ok(match self.u32(16) {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            found => return Err(bad_field("state", found)),
        })
    }

    fn wal_level(&self, offset: usize) -> Result<WalLevel, ControlFileError> {
        Ok(match self.u32(offset) {
            0 => WalLevel::Minimal,
            1 => WalLevel::Replica,
            2 => WalLevel::Logical,
            found => return Err(bad_field("wal_level", found)),
        })
    }

    fn segment_size(&self, offset: usize) -> Result<SegmentSize, ControlFileError> {
        let found = self.u32(offset);
        SegmentSize::new(found).ok_or(bad_field("xlog_seg_size", found))
    }
}

fn bad_field(field: &'static str, found: u32) -> ControlFileError {
    ControlFileError::BadField { field, found: u64::from(found) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The first 512 bytes of a real `pg_control`, and what that version's
    /// `pg_controldata` printed of it, for each supported major version.
    const REAL: [(u32, &[u8], &str); 5] = [
        (
            14,
            include_bytes!("../../tests/fixtures/pg/pg_control.14"),
            include_str!("../../tests/fixtures/pg/pg_controldata.14.txt"),
        ),
        (
            15,
            include_bytes!("../../tests/fixtures/pg/pg_control.15"),
            include_str!("../../tests/fixtures/pg/pg_controldata.15.txt"),
        ),
        (
            16,
            include_bytes!("../../tests/fixtures/pg/pg_control.16"),
            include_str!("../../tests/fixtures/pg/pg_controldata.16.txt"),
        ),
        (
            17,
            include_bytes!("../../tests/fixtures/pg/pg_control.17"),
            include_str!("../../tests/fixtures/pg/pg_controldata.17.txt"),
        ),
        (
            18,
            include_bytes!("../../tests/fixtures/pg/pg_control.18"),
            include_str!("../../tests/fixtures/pg/pg_controldata.18.txt"),
        ),
    ];

    fn on_off(value: bool) -> String {
        if value { "on" } else { "off" }.to_owned()
    }

    /// What `pg_controldata` would print for the fields we read.
    fn lines(file: &ControlFile) -> Vec<(&'static str, String)> {
        let limits = file.limits;
        let shut_down = matches!(file.state, ClusterState::ShutDown);
        let level = match file.wal_level {
            WalLevel::Minimal => "minimal",
            WalLevel::Replica => "replica",
            WalLevel::Logical => "logical",
        };
        vec![
            ("pg_control version number:", file.control_version.to_string()),
            ("Catalog version number:", file.catalog_version.to_string()),
            ("Database system identifier:", file.system_id.to_string()),
            ("Database cluster state:", if shut_down { "shut down" } else { "?" }.to_owned()),
            ("Latest checkpoint location:", file.checkpoint_lsn.to_string()),
            ("Latest checkpoint's REDO location:", file.checkpoint.redo.to_string()),
            ("Latest checkpoint's TimeLineID:", file.checkpoint.timeline.to_string()),
            ("Latest checkpoint's PrevTimeLineID:", file.checkpoint.previous_timeline.to_string()),
            ("Latest checkpoint's full_page_writes:", on_off(file.checkpoint.full_page_writes)),
            ("Minimum recovery ending location:", file.min_recovery_point.to_string()),
            ("Min recovery ending loc's timeline:", file.min_recovery_point_timeline.to_string()),
            ("Backup start location:", file.backup_start.to_string()),
            ("Backup end location:", file.backup_end.to_string()),
            (
                "End-of-backup record required:",
                if file.backup_end_required { "yes" } else { "no" }.to_owned(),
            ),
            ("wal_level setting:", level.to_owned()),
            ("wal_log_hints setting:", on_off(file.wal_log_hints)),
            ("max_connections setting:", limits.max_connections.to_string()),
            ("max_worker_processes setting:", limits.max_worker_processes.to_string()),
            ("max_wal_senders setting:", limits.max_wal_senders.to_string()),
            ("max_prepared_xacts setting:", limits.max_prepared_transactions.to_string()),
            ("max_locks_per_xact setting:", limits.max_locks_per_transaction.to_string()),
            ("Database block size:", file.block_size.to_string()),
            ("Blocks per segment of large relation:", file.relation_segment_blocks.to_string()),
            ("WAL block size:", file.wal_block_size.to_string()),
            ("Bytes per WAL segment:", file.wal_segment_size.bytes().to_string()),
            ("Data page checksum version:", file.data_checksum_version.to_string()),
        ]
    }

    #[test]
    fn every_field_is_what_pg_controldata_prints() {
        for (major, bytes, printed) in REAL {
            let file = ControlFile::parse(bytes).unwrap();
            assert_eq!(file.version, MajorVersion(major));
            for (label, value) in lines(&file) {
                let line = printed.lines().find_map(|line| line.strip_prefix(label));
                let line = line.unwrap_or_else(|| panic!("{major}: no line {label}"));
                assert_eq!(line.trim(), value, "{major}: {label}");
            }
            let checkpoint_time = printed
                .lines()
                .find_map(|line| line.strip_prefix("Time of latest checkpoint:"))
                .unwrap();
            // `Sun Nov 22 03:12:01 2026`, printed in UTC here.
            let time = file.checkpoint.time.to_jiff().unwrap();
            let shown = time.strftime("%a %b %e %H:%M:%S %Y").to_string();
            assert_eq!(checkpoint_time.trim(), shown);
        }
    }

    #[test]
    fn a_torn_file_is_told_by_its_checksum() {
        for (major, bytes, _) in REAL {
            for at in [0, 16, 100, 200, 287] {
                let mut torn = bytes.to_vec();
                torn[at] ^= 0x40;
                let error = ControlFile::parse(&torn).unwrap_err();
                assert!(matches!(error, ControlFileError::BadChecksum { .. }), "{major} {at}");
            }
        }
    }

    #[test]
    fn an_unknown_version_and_the_other_byte_order_are_refused() {
        let mut bytes = REAL[4].1.to_vec();
        bytes[8..12].copy_from_slice(&1800u32.to_be_bytes());
        let error = ControlFile::parse(&bytes).unwrap_err();
        assert!(matches!(error, ControlFileError::UnknownVersion { .. }), "{error}");
    }

    #[test]
    fn the_tablespace_directory_carries_both_versions() {
        let file = ControlFile::parse(REAL[1].1).unwrap();
        assert_eq!(file.tablespace_version_directory(), "PG_15_202209061");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), major in 0usize..5) {
            let _ = ControlFile::parse(&bytes);
            let _ = ControlFile::parse(&REAL[major].1[..bytes.len()]);
        }
    }
}
