//! What the command line asks of a use case, as plain data.
//!
//! Owns the checks of arguments that are not settings. Never here: reading
//! arguments (that is `args`), settings, or whether something can be done.

use std::path::{Path, PathBuf};

use super::second_repo::Only;
use crate::format::KeyId;
use crate::plan::log::filter::{Filter, RelationChoice};
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TimelineChoice};

/// Annotations are for people to find a backup again, not for storing data.
const ANNOTATIONS_MAX: usize = 64;
/// The longest annotation key, in bytes.
const ANNOTATION_KEY_BYTES_MAX: usize = 64;
/// The longest annotation value, in bytes.
const ANNOTATION_VALUE_BYTES_MAX: usize = 1024;
/// The longest backup label, in bytes (`MAXPGPATH` in PostgreSQL's `src/include/pg_config_manual.h`).
const LABEL_BYTES_MAX: usize = 1023;
/// `MAX_RATE_LOWER` and `MAX_RATE_UPPER` in `src/include/backup/basebackup.h`, in bytes per second.
const MAX_RATE_BYTES: std::ops::RangeInclusive<u64> = 32 << 10..=1 << 30;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `init`
    Init(InitRequest),
    /// `check`
    Check(CheckRequest),
    /// `archive-push`
    ArchivePush(ArchivePushRequest),
    /// `archive-get`
    ArchiveGet(ArchiveGetRequest),
    /// `spool`
    Spool {
        /// Drain it, and do not only show it.
        drain: bool,
    },
    /// `drain-spool`, which `archive-push` starts.
    DrainSpool,
    /// `fetch-ahead`, which `archive-get` starts.
    FetchAhead,
    /// `receive`
    Receive(ReceiveRequest),
    /// `agent`
    Agent(AgentRequest),
    /// `backup`
    Backup(BackupRequest),
    /// `restore`
    Restore(Box<RestoreRequest>),
    /// `info`
    Info(InfoRequest),
    /// `info --at`
    InfoAt {
        /// The time.
        point: RecoveryPoint,
        /// How it reads in full, to be told back.
        in_full: String,
    },
    /// `verify`
    Verify(VerifyRequest),
    /// `verify --acknowledge`
    Acknowledge {
        /// The finding; not yet checked.
        finding: String,
        /// Why.
        reason: String,
    },
    /// `drill`
    Drill(Box<DrillRequest>),
    /// `drill-guard`, which `drill` starts.
    DrillGuard {
        /// The scratch directory.
        root: PathBuf,
        /// Leave its files.
        keep: bool,
    },
    /// `log`
    Log(Box<LogRequest>),
    /// `expire`; what is kept is said by settings.
    Expire {
        /// Tell, and delete nothing.
        dry_run: bool,
    },
    /// `pin`
    Pin(PinRequest),
    /// `unpin`
    Unpin {
        /// The backup; not yet checked.
        backup: String,
    },
    /// `copy`
    Copy(CopyRequest),
    /// `key`
    Key(KeyRequest),
    /// `config`
    Config,
    /// `man`: write the manual pages into this directory.
    Man(PathBuf),
}

/// What `copy` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyRequest {
    /// Which backups.
    pub backups: CopiedBackups,
    /// All WAL that the destination keeps.
    pub wal: bool,
    /// The repository that is read; `None` for both ways.
    pub from: Option<Only>,
    /// Tell, and copy nothing.
    pub dry_run: bool,
}

/// Which backups `copy` is to bring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopiedBackups {
    /// None.
    Nothing,
    /// All.
    All,
    /// The newest.
    Newest,
    /// This one; not yet checked.
    Named(String),
}

/// What `key` is asked. Files hold user keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRequest {
    /// Make a key in a new file.
    New(PathBuf),
    /// Show who opens what.
    List,
    /// Let the key in this file open everything too.
    Add(PathBuf),
    /// Bring a new repository key into use.
    Rotate {
        /// The files of all other user keys that shall open it.
        also: Vec<PathBuf>,
        /// User keys that shall not.
        left_out: Vec<KeyId>,
    },
    /// Put the key in this file in the place of the one that is set.
    Rewrap(PathBuf),
    /// Make this user key open nothing any more.
    Remove(KeyId),
}

/// What `init` is asked. Its data directory is a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitRequest {
    /// Claim the place as the successor of the cluster that lives there, after `pg_upgrade`.
    pub successor: bool,
}

/// What `check` is asked. Its data directory is a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckRequest {
    /// How long to wait for the forced segment, in seconds; at least 1.
    pub wait_seconds: u64,
    /// Do not force a WAL switch.
    pub no_switch: bool,
}

/// What `archive-push` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivePushRequest {
    /// The file, as PostgreSQL's `%p` names it: relative to the data directory.
    pub path: PathBuf,
    /// Store a damaged segment as damaged.
    pub accept_damaged: bool,
}

/// What `archive-get` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveGetRequest {
    /// The name of the file wanted, `%f`; not yet checked.
    pub name: String,
    /// Where it is to stand, `%p`.
    pub path: PathBuf,
}

/// What `receive` is asked beside its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceiveRequest {
    /// Follow a standby where no primary is to be found.
    pub from_standby: bool,
    /// Follow a server whose timeline another server has replaced.
    pub old_timeline: bool,
}

/// What `agent` is asked beside its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AgentRequest {
    /// How it receives, if a setting says that it does.
    pub receive: ReceiveRequest,
}

/// Where a backup's bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BackupSource {
    /// PostgreSQL sends them over a replication connection.
    Stream,
    /// They are read from the data directory, on the server's own host.
    Files,
}

/// Which checksums PostgreSQL is asked to put into the backup manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ManifestChecksums {
    /// CRC-32C: fast, finds damage.
    Crc32c,
    /// SHA-256: slower for the server, finds tampering.
    Sha256,
}

/// What `backup` is asked. Jobs and the WAL timeout are settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRequest {
    /// Where the bytes come from.
    pub source: BackupSource,
    /// Read every file, those too that nobody seems to have written to.
    pub rehash: bool,
    /// Ask for an immediate checkpoint instead of a spread one.
    pub fast: bool,
    /// Prefer a standby among the hosts of the connection string.
    pub prefer_standby: bool,
    /// Notes kept with the backup; keys are unique, in the order given.
    pub annotations: Vec<(String, String)>,
    /// The backup's label in `backup_label`; one line.
    pub label: Option<String>,
    /// The most that may be sent or read, in bytes per second.
    pub max_rate: Option<u64>,
    /// Checksums in the manifest.
    pub manifest_checksums: ManifestChecksums,
    /// Until when the backup is pinned from the beginning.
    pub keep_until: Option<KeepUntil>,
}

/// A moment until which a backup is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeepUntil {
    /// Microseconds since 1970-01-01 00:00:00 UTC.
    pub unix_micros: i64,
    /// How it reads in full, to be told back.
    pub in_full: String,
}

/// What `pin` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinRequest {
    /// The backup; not yet checked.
    pub backup: String,
    /// Until when; `None` until it is unpinned.
    pub until: Option<KeepUntil>,
    /// Why.
    pub reason: Option<String>,
}

/// One `--tablespace-map OLD=NEW`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceMapping {
    /// Where the tablespace was; absolute.
    pub old: PathBuf,
    /// Where it goes; absolute.
    pub new: PathBuf,
}

/// What `restore` is asked. Jobs is a setting; the data directory is not, since
/// a restore must never go to a directory that nobody named for it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each is a flag of its own
pub struct RestoreRequest {
    /// The directory to rebuild the cluster in; absolute.
    pub pgdata: PathBuf,
    /// The backup to begin with; `None` for the best for the target.
    pub backup: Option<String>,
    /// Where recovery goes.
    pub target: RecoveryTarget,
    /// How the target time reads in full, to be told before anything is done.
    pub target_in_full: Option<String>,
    /// Tablespaces that go elsewhere; each old place once.
    pub tablespace_map: Vec<TablespaceMapping>,
    /// Write `standby.signal` instead of `recovery.signal`.
    pub standby: bool,
    /// Print the plan and stop.
    pub dry_run: bool,
    /// Take over what stands in the directory.
    pub delta: bool,
    /// The copy becomes the cluster: it archives from here on.
    pub take_over: bool,
}

/// What `info` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoRequest {
    /// Only this backup.
    pub backup: Option<String>,
}

/// What `verify` is asked. Jobs and retention are settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyRequest {
    /// Read everything and look at every digest.
    pub deep: bool,
    /// Look at everything, whatever was proven before.
    pub all: bool,
    /// Look again at what was proven longer ago than this.
    pub older_than: std::time::Duration,
    /// The most bytes read in a second.
    pub rate: Option<u64>,
}

/// What `drill` is asked. The scratch directory, programs and checks are settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DrillRequest {
    /// The backup to begin with; `None` for the best for the target.
    pub backup: Option<String>,
    /// Where recovery goes.
    pub goal: DrillGoal,
    /// How the target time reads in full, to be told before anything is done.
    pub target_in_full: Option<String>,
    /// How long recovery and checks may take together.
    pub timeout: std::time::Duration,
    /// Leave the files in the scratch directory.
    pub keep: bool,
}

/// What a drill goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DrillGoal {
    /// A target, as `restore` has it.
    Target(RecoveryTarget),
    /// A random moment.
    RandomMoment {
        /// The seed; one of its own for `None`.
        seed: Option<u64>,
    },
}

/// What `log` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRequest {
    /// The timeline whose way is read.
    pub timeline: TimelineChoice,
    /// What is wanted.
    pub filter: Filter,
    /// How times in it read in full, to be told before anything is done.
    pub in_full: Vec<String>,
    /// Only transactions that touched this relation.
    pub relation: Option<RelationChoice>,
    /// Only transactions in this database: a name or an OID.
    pub database: Option<String>,
    /// Oldest first.
    pub oldest_first: bool,
    /// So many lines at most.
    pub limit: Option<u64>,
    /// Where names come from.
    pub names: NamesSource,
    /// Look for the last drop of this table instead.
    pub before_drop: Option<DroppedTable>,
}

/// Where `log` takes names from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum NamesSource {
    /// The catalogs of the nearest backups.
    Backup,
    /// The server, as it is now.
    Server,
    /// Nothing: files are told by number.
    None,
}

/// What `log --before-drop` is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DroppedTable {
    /// Its schema, if it was given.
    pub schema: Option<String>,
    /// Its name.
    pub name: String,
    /// The directory that the printed command restores into.
    pub pgdata: Option<PathBuf>,
}

/// Reads one `--annotate KEY=VALUE`, for clap.
///
/// # Errors
/// A sentence about what is wrong.
pub fn parse_annotation(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it has the form KEY=VALUE")?;
    if key.is_empty() || key.len() > ANNOTATION_KEY_BYTES_MAX {
        return Err(format!("the key has 1 to {ANNOTATION_KEY_BYTES_MAX} bytes"));
    }
    if value.len() > ANNOTATION_VALUE_BYTES_MAX {
        return Err(format!("the value has at most {ANNOTATION_VALUE_BYTES_MAX} bytes"));
    }
    if text.contains(char::is_control) {
        return Err("line breaks and other control characters are not taken".into());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Checks that no annotation is given twice and that there are not too many.
///
/// # Errors
/// A sentence about what is wrong.
pub fn check_annotations(annotations: &[(String, String)]) -> Result<(), String> {
    if annotations.len() > ANNOTATIONS_MAX {
        return Err(format!("a backup takes at most {ANNOTATIONS_MAX} annotations"));
    }
    let mut keys: Vec<&str> = annotations.iter().map(|(key, _)| key.as_str()).collect();
    keys.sort_unstable();
    match keys.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("the annotation `{}` is given twice", pair[0])),
        None => Ok(()),
    }
}

/// Reads `--label`, for clap.
///
/// # Errors
/// A sentence about what is wrong.
pub fn parse_label(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > LABEL_BYTES_MAX || text.contains(char::is_control) {
        return Err(format!("a label is one line of 1 to {LABEL_BYTES_MAX} bytes"));
    }
    Ok(text.to_owned())
}

/// Reads `--max-rate` into bytes per second, for clap.
///
/// # Errors
/// A sentence about what is wrong.
pub fn parse_max_rate(text: &str) -> Result<u64, String> {
    super::units::parse_size(text)
        .filter(|rate| MAX_RATE_BYTES.contains(rate))
        .ok_or_else(|| "a rate is from 32kB to 1GB per second, for example 50MB".into())
}

/// Reads `--tablespace-map OLD=NEW`, for clap. `\=` stands for `=` within a
/// path, as in `pg_basebackup --tablespace-mapping`.
///
/// # Errors
/// A sentence about what is wrong.
pub fn parse_tablespace_mapping(text: &str) -> Result<TablespaceMapping, String> {
    let mut sides = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.next_if_eq(&'=').is_some() => {
                sides.iter_mut().last().map(|s| s.push('='))
            }
            '=' => {
                sides.push(String::new());
                None
            }
            c => sides.iter_mut().last().map(|s| s.push(c)),
        };
    }
    let [old, new] = &sides[..] else {
        return Err("it has the form OLD=NEW; write `\\=` for an equals sign within a path".into());
    };
    if !Path::new(old).is_absolute() || !Path::new(new).is_absolute() {
        return Err("both directories are absolute paths".into());
    }
    Ok(TablespaceMapping { old: trim_slash(old), new: trim_slash(new) })
}

/// PostgreSQL keeps tablespace locations without a trailing slash (`canonicalize_path`).
fn trim_slash(path: &str) -> PathBuf {
    let trimmed = path.trim_end_matches('/');
    PathBuf::from(if trimmed.is_empty() { "/" } else { trimmed })
}

/// Checks that no old place is mapped twice and no two go to one place.
///
/// # Errors
/// A sentence about what is wrong.
pub fn check_tablespace_map(map: &[TablespaceMapping]) -> Result<(), String> {
    for (i, mapping) in map.iter().enumerate() {
        for other in &map[..i] {
            if other.old == mapping.old {
                return Err(format!("the tablespace {} is mapped twice", mapping.old.display()));
            }
            if other.new == mapping.new {
                return Err(format!("two tablespaces are mapped to {}", mapping.new.display()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn tablespace_maps_follow_pg_basebackup() {
        let parsed = parse_tablespace_mapping("/a/x=/b/y/").unwrap();
        assert_eq!(parsed, TablespaceMapping { old: "/a/x".into(), new: "/b/y".into() });
        let parsed = parse_tablespace_mapping("/a\\=1=/b").unwrap();
        assert_eq!(parsed.old, PathBuf::from("/a=1"));
        for bad in ["", "/a", "/a=/b=/c", "a=/b", "/a=b", "=/b", "/a="] {
            assert!(parse_tablespace_mapping(bad).is_err(), "{bad}");
        }
        let one = parse_tablespace_mapping("/a=/b").unwrap();
        assert!(check_tablespace_map(std::slice::from_ref(&one)).is_ok());
        assert!(check_tablespace_map(&[one.clone(), one]).is_err());
    }

    #[test]
    fn annotations_are_unique_pairs() {
        assert_eq!(parse_annotation("why=a=b").unwrap(), ("why".into(), "a=b".into()));
        for bad in ["", "why", "=x", "a=b\nc"] {
            assert!(parse_annotation(bad).is_err(), "{bad}");
        }
        let pair = ("a".to_owned(), "1".to_owned());
        assert!(check_annotations(&[pair.clone(), pair]).is_err());
    }

    #[test]
    fn the_rate_is_within_what_the_server_takes() {
        assert_eq!(parse_max_rate("32kB"), Ok(32_768));
        assert_eq!(parse_max_rate("1GB"), Ok(1 << 30));
        for bad in ["31kB", "100", "2GB", "fast"] {
            assert!(parse_max_rate(bad).is_err(), "{bad}");
        }
    }
}
