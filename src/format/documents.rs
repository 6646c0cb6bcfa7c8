//! The JSON documents: identity, begun, committed, and the index of the file list.
//!
//! Each carries the format version and ends with a checksum of all bytes before it. A reader refuses
//! a newer version by name instead of guessing, and ignores fields it does not know within its own.
//!
//! ```text
//! {
//!   "format": 1,
//!   ...,
//!   "crc32c": "5b3fc1a4"        of the bytes up to and without the comma before this line
//! }
//! ```

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{BackupId, CHUNK_BYTES, ClusterName, Encryption, FrameRef};
use crate::pg::{Lsn, PgTimestamp, SegmentSize, SystemId, Timeline, crc32c};

/// The version of everything this room defines, but for one document.
pub const FORMAT_VERSION: u32 = 1;

/// The version of an encrypted cluster's identity: a reader of version 1 would store plain objects beside the
/// encrypted ones.
pub const ENCRYPTED_IDENTITY_VERSION: u32 = 2;

/// A stored document could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// It was written by a newer Highwater.
    #[error(
        "its {what} has format version {found}, and this version of Highwater reads up to {read}"
    )]
    Newer {
        /// Which document.
        what: &'static str,
        /// Its version.
        found: u32,
        /// The highest version that is read.
        read: u32,
    },
    /// Its bytes are not those that were written.
    #[error("its {what} is damaged (CRC-32C)")]
    Damaged {
        /// Which document.
        what: &'static str,
    },
    /// It is not the JSON that was expected.
    #[error("its {what} cannot be understood")]
    Malformed {
        /// Which document.
        what: &'static str,
        /// The parser's complaint.
        #[source]
        source: serde_json::Error,
    },
}

/// A versioned JSON document.
pub trait Document: Serialize + DeserializeOwned {
    /// What errors call it.
    const WHAT: &'static str;

    /// Whether it carries its own checksum; false where what surrounds it has one.
    const HAS_CHECKSUM: bool = true;

    /// The highest version that is read.
    const READS: u32 = FORMAT_VERSION;

    /// Returns the version it carries.
    fn format(&self) -> u32;

    /// Parses a document, looking at the version first.
    ///
    /// # Errors
    /// [`DocumentError`]; a retry does not help.
    fn parse(json: &[u8]) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let malformed = |source| DocumentError::Malformed { what: Self::WHAT, source };
        let version: Version = serde_json::from_slice(json).map_err(malformed)?;
        if version.format > Self::READS {
            let (what, found, read) = (Self::WHAT, version.format, Self::READS);
            return Err(DocumentError::Newer { what, found, read });
        }
        // A digit that flipped would still be JSON: another LSN, another timeline.
        if Self::HAS_CHECKSUM && !checksum_fits(json) {
            return Err(DocumentError::Damaged { what: Self::WHAT });
        }
        serde_json::from_slice(json).map_err(malformed)
    }

    /// Returns the document as JSON with its checksum and a newline, indented for people.
    ///
    /// # Errors
    /// [`DocumentError::Malformed`] if it cannot be written, which no document of ours can cause.
    fn to_json(&self) -> Result<Vec<u8>, DocumentError> {
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|source| DocumentError::Malformed { what: Self::WHAT, source })?;
        // Ends with a line break and the closing brace, which the checksum's line brings again.
        json.truncate(json.len().saturating_sub(2));
        let ending = checksum_ending(&json);
        json.extend_from_slice(ending.as_bytes());
        Ok(json)
    }
}

/// Returns what ends a document: the checksum of the bytes before it, and the closing brace.
fn checksum_ending(before: &[u8]) -> String {
    format!(",\n  \"crc32c\": \"{:08x}\"\n}}\n", crc32c(before))
}

fn checksum_fits(json: &[u8]) -> bool {
    let before = json.len().checked_sub(checksum_ending(&[]).len());
    let parts = before.and_then(|at| json.split_at_checked(at));
    parts.is_some_and(|(before, ending)| ending == checksum_ending(before).as_bytes())
}

/// `identity/<system id>.json`: one incarnation of a cluster owns this place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The format version.
    pub format: u32,
    /// The cluster's name in the repository.
    pub cluster: ClusterName,
    /// The system identifier that every WAL segment and backup must carry.
    pub system_identifier: SystemId,
    /// The WAL segment size, in bytes.
    pub segment_size: SegmentSize,
    /// The major version of the server.
    pub postgres_major: u32,
    /// 1 for the first incarnation, one more for each successor after `pg_upgrade`.
    pub incarnation: u32,
    /// The incarnation before this one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub succeeds: Option<SystemId>,
    /// Present where everything else in the place is encrypted; then `format` is [`ENCRYPTED_IDENTITY_VERSION`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// When it was claimed, by the claimer's clock.
    pub claimed_at: PgTimestamp,
    /// The host that claimed it.
    pub claimed_by: String,
    /// The version of Highwater that claimed it.
    pub tool: String,
}

impl Document for Identity {
    const WHAT: &'static str = "identity document";
    const READS: u32 = ENCRYPTED_IDENTITY_VERSION;

    fn format(&self) -> u32 {
        self.format
    }
}

/// `begun.json`: a backup is being made, and which backup it leans on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begun {
    /// The format version.
    pub format: u32,
    /// The backup.
    pub id: BackupId,
    /// When, by the clock of the host that makes it.
    pub begun_at: PgTimestamp,
    /// The host that makes it.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// The backup whose chunks it may reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// Every other backup whose packs it may reference: those whose packs the parent references, and unfinished
    /// ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leans_on: Vec<BackupId>,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Begun {
    const WHAT: &'static str = "begun document";

    fn format(&self) -> u32 {
        self.format
    }
}

/// A tablespace as the server had it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceAt {
    /// The tablespace's OID, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it stood on the server.
    pub location: String,
}

/// Live bytes of one pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackUse {
    /// The pack's number.
    pub pack: u32,
    /// Stored bytes of it that this backup needs.
    pub live_bytes: u64,
}

/// The packs of one backup that this backup needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The backup that the packs belong to; may be the backup itself.
    pub backup: BackupId,
    /// Its packs, ascending.
    pub packs: Vec<PackUse>,
}

/// The most damaged pages that `committed.json` names.
pub const DAMAGED_PAGES_NAMED_MAX: usize = 100;

/// A page whose checksum was wrong on the server's own disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPage {
    /// The file, below the data directory.
    pub file: String,
    /// The block, counted from the beginning of that file.
    pub block: u64,
}

/// Pages that were damaged on the server's own disk when the backup read them; they are stored as
/// they were.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DamagedPages {
    /// How many.
    pub count: u64,
    /// The first [`DAMAGED_PAGES_NAMED_MAX`] of them.
    pub named: Vec<DamagedPage>,
}

impl DamagedPages {
    /// Returns whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds one.
    pub fn push(&mut self, page: DamagedPage) {
        self.count += 1;
        if self.named.len() < DAMAGED_PAGES_NAMED_MAX {
            self.named.push(page);
        }
    }
}

/// Settings that a server must have at least when it replays this cluster's WAL
/// with `hot_standby = on` (PostgreSQL manual, "Hot Standby", administrator's overview).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(clippy::struct_field_names)]
pub struct ServerLimits {
    /// `max_connections`
    pub max_connections: i32,
    /// `max_worker_processes`
    pub max_worker_processes: i32,
    /// `max_wal_senders`
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`
    pub max_prepared_transactions: i32,
    /// `max_locks_per_transaction`
    pub max_locks_per_transaction: i32,
}

/// `committed.json`: written last; the backup exists from here on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The format version.
    pub format: u32,
    /// The backup.
    pub id: BackupId,
    /// The cluster.
    pub cluster: ClusterName,
    /// The cluster's system identifier.
    pub system_identifier: SystemId,
    /// `server_version_num` of the server that gave it.
    pub postgres_version: u32,
    /// The server's catalog version, which names tablespace directories.
    pub catalog_version: u32,
    /// The WAL segment size.
    pub segment_size: SegmentSize,
    /// Whether the cluster has data page checksums.
    pub data_checksums: bool,
    /// Whether the server's group may read the data directory (`initdb -g`).
    #[serde(default)]
    pub group_access: bool,
    /// The label given to `BASE_BACKUP`.
    pub label: String,
    /// What the operator wrote beside it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// How it was taken: `stream` or `files`.
    pub source: String,
    /// `primary` or `standby`.
    pub taken_from: String,
    /// When it began, by the clock of the host that made it.
    pub started_at: PgTimestamp,
    /// When it was committed, by the same clock.
    pub finished_at: PgTimestamp,
    /// The timeline it began on.
    pub timeline: Timeline,
    /// Where replay begins (included).
    pub start_lsn: Lsn,
    /// Where it becomes consistent (excluded).
    pub stop_lsn: Lsn,
    /// The timeline at its end; differs when a standby followed a switch.
    pub stop_timeline: Timeline,
    /// The earliest time that recovery from this backup may be asked to reach:
    /// no commit before `stop_lsn` is later.
    pub reaches_from: PgTimestamp,
    /// Tablespaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tablespaces: Vec<TablespaceAt>,
    /// Files in the list, directories excluded.
    pub files: u64,
    /// Bytes of all files.
    pub size_bytes: u64,
    /// Bytes this backup added to the repository.
    pub stored_bytes: u64,
    /// Packs of its own: numbers from 0 to this, excluded.
    pub packs: u32,
    /// Every pack that it needs.
    pub references: Vec<Reference>,
    /// The backup it referenced chunks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<BackupId>,
    /// When the reading of files began, by the clock of their host; only where they were read from
    /// the data directory itself. A file's stamp that is well before this is worth comparing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_from: Option<PgTimestamp>,
    /// Pages that were damaged on the server's disk already.
    #[serde(default, skip_serializing_if = "DamagedPages::is_empty")]
    pub damaged_pages: DamagedPages,
    /// The least settings for replay.
    pub limits: ServerLimits,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Committed {
    const WHAT: &'static str = "committed document";

    fn format(&self) -> u32 {
        self.format
    }
}

/// `files`: where the frames of the file list stand. Its lines are described in [`super::FileEntry`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIndex {
    /// The format version.
    pub format: u32,
    /// The backup.
    pub id: BackupId,
    /// The bytes of one chunk.
    pub chunk_bytes: u32,
    /// Entries in the list, directories included.
    pub entries: u64,
    /// The frames that hold the list's lines, in order; no line crosses from one to the next.
    pub frames: Vec<FrameRef>,
}

impl FileIndex {
    /// Makes the index of a list of so many entries, in today's format.
    pub fn new(id: BackupId, entries: u64, frames: Vec<FrameRef>) -> Self {
        Self { format: FORMAT_VERSION, id, chunk_bytes: CHUNK_BYTES, entries, frames }
    }
}

impl Document for FileIndex {
    const WHAT: &'static str = "file index";

    fn format(&self) -> u32 {
        self.format
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Committed {
    /// A backup of nothing, for tests to change what they are about.
    pub(crate) fn example(id: BackupId) -> Self {
        Self {
            format: FORMAT_VERSION,
            id,
            cluster: "main".parse().unwrap(),
            system_identifier: SystemId(7),
            postgres_version: 170_000,
            catalog_version: 202_406_281,
            segment_size: SegmentSize::DEFAULT,
            data_checksums: true,
            group_access: false,
            label: "test".to_owned(),
            annotations: BTreeMap::new(),
            source: "stream".to_owned(),
            taken_from: "primary".to_owned(),
            started_at: PgTimestamp(0),
            finished_at: PgTimestamp(0),
            timeline: Timeline::FIRST,
            start_lsn: Lsn(1),
            stop_lsn: Lsn(2),
            stop_timeline: Timeline::FIRST,
            reaches_from: PgTimestamp(0),
            tablespaces: Vec::new(),
            files: 0,
            size_bytes: 0,
            stored_bytes: 0,
            packs: 0,
            references: Vec::new(),
            parent: None,
            read_from: None,
            damaged_pages: DamagedPages::default(),
            limits: ServerLimits {
                max_connections: 100,
                max_worker_processes: 8,
                max_wal_senders: 10,
                max_prepared_transactions: 0,
                max_locks_per_transaction: 64,
            },
            tool: "test".to_owned(),
        }
    }
}
