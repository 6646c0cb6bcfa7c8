//! The grammar of keys: where each thing stands in a repository.
//!
//! ```text
//! <cluster>/identity/<system id>.json
//! <cluster>/wal/<system id>/<TLI+log, 16 digits>/<segment>
//! <cluster>/wal/<system id>/<16 digits>/<segment>.parts/<start>-<end>    byte offsets, 8 hex digits, end excluded
//! <cluster>/wal/<system id>/<16 digits>/<segment>.partial
//! <cluster>/wal/<system id>/<16 digits>/<segment>.damaged
//! <cluster>/wal/<system id>/<16 digits>/<segment>.<offset>.backup
//! <cluster>/wal/<system id>/<TLI>.history
//! <cluster>/backup/<id>/begun.json | files | committed.json | pack/<n, 8 digits>
//! <cluster>/pin/<id>/<second>.json                                       a second as in backup ids
//! <cluster>/verify/<second>/proof/<n, 8 digits>                          what one run of `verify` has proven
//! <cluster>/verify/<second>/report.json                                  and what it came to
//! <cluster>/drill/<second>.json                                          what a drill has proved
//! <cluster>/acknowledged/<finding, 12 digits>.json                       a loss that somebody knows of
//! <cluster>/gap/<system id>/<TLI>-<start>-<end>.json                   WAL that was let go: see `gap`
//! <cluster>/key/…                                                        see `keys`
//! ```
//!
//! A name never depends on codec or digest, so that it can be predicted
//! without a listing and can be claimed by a create.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{KeyObject, is_finding_id};
use crate::pg::{SegmentName, SystemId, Timeline, WalFileName};

/// Where `init` and `check` try a store, beside the clusters.
const PROBE_DIRECTORY: &str = "probe";

/// The text cannot be the name of a cluster or of a backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// A cluster's name has other characters than the keys allow.
    #[error(
        "`{0}` cannot be a cluster name: use letters, digits, `.`, `_` and `-`, beginning with a letter or digit, at most 63 characters"
    )]
    Cluster(String),
    /// The name is one of ours at the root of a repository.
    #[error("`{0}` cannot be a cluster name: Highwater keeps it for itself")]
    Reserved(String),
    /// A backup id is a time such as `20261122T031500Z`, with `-2`, `-3` … behind it when two fell in one second.
    #[error("`{0}` is not a backup id; one looks like `20261122T031500Z` (see `highwater info`)")]
    Backup(String),
}

/// The name under which a cluster lives in a repository.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ClusterName(String);

impl ClusterName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let first_ok = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        let rest_ok =
            text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if text == PROBE_DIRECTORY {
            return Err(NameError::Reserved(text.to_owned()));
        }
        if first_ok && rest_ok && text.len() <= 63 {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Cluster(text.to_owned()))
        }
    }
}

impl TryFrom<String> for ClusterName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ClusterName> for String {
    fn from(name: ClusterName) -> Self {
        name.0
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The id of a backup: the UTC time it began, to the second. Ids sort by time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(Arc<str>);

impl BackupId {
    /// Returns the id of a backup that begins at `at`; `attempt` above 1 tells
    /// backups of one second apart.
    pub fn at(at: jiff::Timestamp, attempt: u32) -> Self {
        let stem = at.strftime("%Y%m%dT%H%M%SZ").to_string();
        if attempt <= 1 { Self(stem.into()) } else { Self(format!("{stem}-{attempt}").into()) }
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BackupId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || NameError::Backup(text.to_owned());
        let (stem, attempt) = match text.split_once('-') {
            Some((stem, attempt)) => (stem, Some(attempt)),
            None => (text, None),
        };
        let shape: String =
            stem.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
        let attempt_ok = attempt.is_none_or(|number| {
            number.len() <= 4
                && !number.starts_with(['0', '+'])
                && number.parse::<u32>().is_ok_and(|n| n >= 2)
        });
        if shape == "99999999T999999Z" && attempt_ok { Ok(Self(text.into())) } else { Err(bad()) }
    }
}

impl TryFrom<String> for BackupId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0.as_ref().to_owned()
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One object below `wal/<system id>/<group>/`, as its key's tail tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WalObject {
    /// A complete segment, a `.partial`, a `.backup` or a history file.
    File(WalFileName),
    /// A piece of a segment: byte offsets within it, the end excluded.
    Piece {
        /// The segment it is a piece of.
        segment: SegmentName,
        /// The offset of its first byte.
        start: u32,
        /// The offset behind its last byte.
        end: u32,
    },
    /// A segment that the server itself has damaged and an operator has accepted as lost.
    Damaged(SegmentName),
}

impl WalObject {
    /// Returns the tail of the key below `wal/<system id>/`; unique within a cluster's lineage.
    pub fn tail(self) -> String {
        match self {
            Self::File(WalFileName::History(timeline)) => timeline.history_file_name(),
            Self::File(
                name @ (WalFileName::Segment(segment)
                | WalFileName::Partial(segment)
                | WalFileName::Backup(segment, _)),
            ) => format!("{}/{name}", segment.group()),
            Self::Damaged(segment) => format!("{}/{segment}.damaged", segment.group()),
            Self::Piece { segment, start, end } => {
                format!("{}/{segment}.parts/{start:08X}-{end:08X}", segment.group())
            }
        }
    }
}

/// Parses the tail of a key below `wal/<system id>/`; `None` for anything that
/// this version does not store.
pub fn parse_wal_object(tail: &str) -> Option<WalObject> {
    let parts: Vec<&str> = tail.split('/').collect();
    let object = match parts.as_slice() {
        [_, name] if name.strip_suffix(".damaged").is_some() => {
            WalObject::Damaged(SegmentName::parse(name.strip_suffix(".damaged")?)?)
        }
        [name] | [_, name] => WalObject::File(WalFileName::parse(name).ok()?),
        [_, directory, range] => {
            let segment = SegmentName::parse(directory.strip_suffix(".parts")?)?;
            let (start, end) = range.split_once('-')?;
            let offset = |digits: &str| {
                (digits.len() == 8).then(|| u32::from_str_radix(digits, 16).ok()).flatten()
            };
            let (start, end) = (offset(start)?, offset(end)?);
            (start < end).then_some(WalObject::Piece { segment, start, end })?
        }
        _ => return None,
    };
    // Only the one spelling that `tail` writes is ours.
    (object.tail() == tail).then_some(object)
}

impl WalObject {
    /// Returns the segment that it belongs to; a history file belongs to none.
    pub fn segment(self) -> Option<SegmentName> {
        match self {
            Self::File(name) => name.segment(),
            Self::Piece { segment, .. } | Self::Damaged(segment) => Some(segment),
        }
    }
}

/// One object below `backup/<id>/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupObject {
    /// Who began it.
    Begun,
    /// Pack `n`.
    Pack(u32),
    /// The index of its file list.
    Files,
    /// What makes it exist.
    Committed,
}

/// Parses the tail of a key below `backup/<id>/`; `None` for anything that this version does not store.
pub fn parse_backup_object(tail: &str) -> Option<BackupObject> {
    match tail {
        "begun.json" => Some(BackupObject::Begun),
        "files" => Some(BackupObject::Files),
        "committed.json" => Some(BackupObject::Committed),
        _ => {
            let digits = tail.strip_prefix("pack/")?;
            let is_number = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| digits.parse().ok().map(BackupObject::Pack)).flatten()
        }
    }
}

/// Parses the tail of a key below `pin/`: the backup that is pinned.
pub fn parse_pin(tail: &str) -> Option<BackupId> {
    let (id, name) = tail.split_once('/')?;
    let _second: BackupId = name.strip_suffix(".json")?.parse().ok()?;
    id.parse().ok()
}

/// Parses the tail of a key below `verify/`: the run, and the number of the object of proofs or `None` for the report.
pub fn parse_proof(tail: &str) -> Option<(BackupId, Option<u32>)> {
    let (run, rest) = tail.split_once('/')?;
    let run = run.parse().ok()?;
    if rest == "report.json" {
        return Some((run, None));
    }
    let digits = rest.strip_prefix("proof/")?;
    let is_number = digits.len() == 8 && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok().map(|number| (run, Some(number)))).flatten()
}

/// Parses the tail of a key below `drill/`: the drill.
pub fn parse_drill(tail: &str) -> Option<BackupId> {
    tail.strip_suffix(".json")?.parse().ok()
}

/// Parses the tail of a key below `acknowledged/`: the id of the finding.
pub fn parse_acknowledged(tail: &str) -> Option<&str> {
    tail.strip_suffix(".json").filter(|id| is_finding_id(id))
}

/// A cluster's place in a repository: makes every key below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    cluster: ClusterName,
}

impl Place {
    /// Returns the place of `cluster`.
    pub fn new(cluster: ClusterName) -> Self {
        Self { cluster }
    }

    /// Returns the cluster's name.
    pub fn cluster(&self) -> &ClusterName {
        &self.cluster
    }

    /// Returns the directory of the identities.
    pub fn identity_dir(&self) -> String {
        format!("{}/identity", self.cluster)
    }

    /// Returns the key of one incarnation's identity.
    pub fn identity(&self, system_id: SystemId) -> String {
        format!("{}/identity/{system_id}.json", self.cluster)
    }

    /// Returns the directory of the keys of an encrypted cluster.
    pub fn keys_dir(&self) -> String {
        format!("{}/key", self.cluster)
    }

    /// Returns the key of a document about keys.
    pub fn key(&self, object: KeyObject) -> String {
        format!("{}/key/{}", self.cluster, object.tail())
    }

    /// Returns the name by which an object is encrypted: its key below the cluster's place. `None` for what
    /// is never encrypted: identities and documents about keys, which are read before any key is at hand, and what
    /// is not the cluster's.
    pub fn encrypted_name<'a>(&self, key: &'a str) -> Option<&'a str> {
        let name = key.strip_prefix(self.cluster.as_str())?.strip_prefix('/')?;
        let is_plain = name.starts_with("identity/") || name.starts_with("key/");
        (!is_plain).then_some(name)
    }

    /// Returns the directory of all WAL of one incarnation.
    pub fn wal_dir(&self, system_id: SystemId) -> String {
        format!("{}/wal/{system_id}", self.cluster)
    }

    /// Returns the directory of one group: 4 GiB of WAL of one timeline.
    pub fn wal_group_dir(&self, system_id: SystemId, group: &str) -> String {
        format!("{}/wal/{system_id}/{group}", self.cluster)
    }

    /// Returns the directory of a segment's pieces.
    pub fn pieces_dir(&self, system_id: SystemId, segment: SegmentName) -> String {
        format!("{}/wal/{system_id}/{}/{segment}.parts", self.cluster, segment.group())
    }

    /// Returns the key of one WAL object.
    pub fn wal(&self, system_id: SystemId, object: WalObject) -> String {
        format!("{}/wal/{system_id}/{}", self.cluster, object.tail())
    }

    /// Returns the key of a timeline's history file.
    pub fn history(&self, system_id: SystemId, timeline: Timeline) -> String {
        self.wal(system_id, WalObject::File(WalFileName::History(timeline)))
    }

    /// Returns the directory of all backups.
    pub fn backups_dir(&self) -> String {
        format!("{}/backup", self.cluster)
    }

    /// Returns the key that says who began a backup.
    pub fn begun(&self, id: &BackupId) -> String {
        format!("{}/backup/{id}/begun.json", self.cluster)
    }

    /// Returns the directory of a backup's packs.
    pub fn packs_dir(&self, id: &BackupId) -> String {
        format!("{}/backup/{id}/pack", self.cluster)
    }

    /// Returns the key of pack `number`.
    pub fn pack(&self, id: &BackupId, number: u32) -> String {
        format!("{}/backup/{id}/pack/{number:08}", self.cluster)
    }

    /// Returns the key of the index of the file list.
    pub fn files(&self, id: &BackupId) -> String {
        format!("{}/backup/{id}/files", self.cluster)
    }

    /// Returns the directory of one backup.
    pub fn backup_dir(&self, id: &BackupId) -> String {
        format!("{}/backup/{id}", self.cluster)
    }

    /// Returns the directory of all pins.
    pub fn pins_dir(&self) -> String {
        format!("{}/pin", self.cluster)
    }

    /// Returns the directory of the pins of one backup.
    pub fn pins_of_dir(&self, id: &BackupId) -> String {
        format!("{}/pin/{id}", self.cluster)
    }

    /// Returns the key of a pin made at that moment; `attempt` above 1 tells pins of one second apart.
    pub fn pin(&self, id: &BackupId, at: jiff::Timestamp, attempt: u32) -> String {
        format!("{}/pin/{id}/{}.json", self.cluster, BackupId::at(at, attempt))
    }

    /// Returns the directory of everything that runs of `verify` have left.
    pub fn verify_dir(&self) -> String {
        format!("{}/verify", self.cluster)
    }

    /// Returns the key of the `number`th object of proofs of one run.
    pub fn proof(&self, run: &BackupId, number: u32) -> String {
        format!("{}/verify/{run}/proof/{number:08}", self.cluster)
    }

    /// Returns the key of the report of one run.
    pub fn verification(&self, run: &BackupId) -> String {
        format!("{}/verify/{run}/report.json", self.cluster)
    }

    /// Returns the directory of all acknowledgements.
    pub fn acknowledged_dir(&self) -> String {
        format!("{}/acknowledged", self.cluster)
    }

    /// Returns the key of the acknowledgement of one finding.
    pub fn acknowledged(&self, finding: &str) -> String {
        format!("{}/acknowledged/{finding}.json", self.cluster)
    }

    /// Returns the directory of all records of gaps.
    pub fn gaps_dir(&self) -> String {
        format!("{}/gap", self.cluster)
    }

    /// Returns the key of the record of a gap; see [`super::WalGap::tail`].
    pub fn gap(&self, system_id: SystemId, tail: &str) -> String {
        format!("{}/gap/{system_id}/{tail}", self.cluster)
    }

    /// Returns the directory of the records of drills.
    pub fn drills_dir(&self) -> String {
        format!("{}/drill", self.cluster)
    }

    /// Returns the key of the record of one drill.
    pub fn drill(&self, id: &BackupId) -> String {
        format!("{}/drill/{id}.json", self.cluster)
    }

    /// Returns the key whose existence makes the backup exist.
    pub fn committed(&self, id: &BackupId) -> String {
        format!("{}/backup/{id}/committed.json", self.cluster)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pg::{Lsn, SegmentSize};
    use proptest::prelude::*;

    #[test]
    fn keys_are_as_the_format_page_draws_them() {
        let place = Place::new("main".parse().unwrap());
        let id = SystemId(7_000_000_000_000_000_001);
        let segment = SegmentName::parse("000000010000000A000000FE").unwrap();
        let key = |object| place.wal(id, object);
        assert_eq!(
            key(WalObject::File(WalFileName::Segment(segment))),
            "main/wal/7000000000000000001/000000010000000A/000000010000000A000000FE"
        );
        assert_eq!(
            key(WalObject::Piece { segment, start: 0, end: 0x1_0000 }),
            "main/wal/7000000000000000001/000000010000000A/000000010000000A000000FE.parts/00000000-00010000"
        );
        assert_eq!(place.history(id, Timeline(2)), "main/wal/7000000000000000001/00000002.history");
        let backup = BackupId::at("2026-11-22T03:15:00Z".parse().unwrap(), 1);
        assert_eq!(place.pack(&backup, 7), "main/backup/20261122T031500Z/pack/00000007");
        assert_eq!(place.committed(&backup), "main/backup/20261122T031500Z/committed.json");
    }

    #[test]
    fn names_that_would_leave_the_place_are_refused() {
        for bad in ["", "..", ".hidden", "a/b", "-x", "ä", "probe", &"x".repeat(64)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
        for bad in ["", "latest", "20261122T031500", "20261122T031500Z-1", "20261122T031500Z-x"] {
            assert!(bad.parse::<BackupId>().is_err(), "{bad}");
        }
        assert!("20261122T031500Z-12".parse::<BackupId>().is_ok());
    }

    #[test]
    fn foreign_tails_are_not_taken_for_wal() {
        for tail in [
            "",
            "000000010000000A/README",
            "000000010000000B/000000010000000A000000FE",
            "000000010000000A/000000010000000A000000FE.parts/00000010-00000010",
            "000000010000000A/000000010000000A000000FE.parts/0-10",
            "a/b/c/d",
        ] {
            assert_eq!(parse_wal_object(tail), None, "{tail}");
        }
    }

    #[test]
    fn the_objects_of_a_backup_are_told_apart() {
        let place = Place::new("main".parse().unwrap());
        let id: BackupId = "20261122T031500Z".parse().unwrap();
        let tail = |key: String| {
            parse_backup_object(key.strip_prefix(&format!("{}/", place.backup_dir(&id))).unwrap())
        };
        assert_eq!(tail(place.begun(&id)), Some(BackupObject::Begun));
        assert_eq!(tail(place.files(&id)), Some(BackupObject::Files));
        assert_eq!(tail(place.committed(&id)), Some(BackupObject::Committed));
        assert_eq!(tail(place.pack(&id, 12_345_678)), Some(BackupObject::Pack(12_345_678)));
        for foreign in ["", "pack", "pack/1", "pack/+0000001", "pack/00000001/x", "files.old"] {
            assert_eq!(parse_backup_object(foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn every_tail_is_understood_again(
            timeline in 1u32.., lsn: u64, start in 0u32..1 << 30, len in 1u32..1 << 20, kind in 0..6,
        ) {
            let segment = SegmentName::containing(Timeline(timeline), Lsn(lsn), SegmentSize::DEFAULT);
            let object = match kind {
                0 => WalObject::File(WalFileName::Segment(segment)),
                1 => WalObject::File(WalFileName::Partial(segment)),
                2 => WalObject::File(WalFileName::Backup(segment, start)),
                3 => WalObject::File(WalFileName::History(Timeline(timeline))),
                4 => WalObject::Damaged(segment),
                _ => WalObject::Piece { segment, start, end: start + len },
            };
            prop_assert_eq!(parse_wal_object(&object.tail()), Some(object));
        }
    }
}
