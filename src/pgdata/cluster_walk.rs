//! Walking a running cluster's data directory as `BASE_BACKUP` does.
//!
//! Owns: which files belong to a base backup and which do not, the order, tablespaces. Never here:
//! reading files, or what becomes of them. `global/pg_control` is left out, since it is read last.
//!
//! Directories come before what they hold, names in order of their bytes, tablespaces after the data
//! directory; their files as `pg_tblspc/<oid>/PG_…/…`. Memory: the names of the directories on the
//! way down, each with five bytes besides. Source of every rule: `src/backend/backup/basebackup.c` (`sendDir`, `sendTablespace`,
//! `excludeFiles`, `excludeDirContents`).

use std::collections::{HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::disk::DiskError;
use crate::pg::{Fork, MajorVersion, RelationDirectory, RelationFile, is_temporary_relation};

/// Files that are left out wherever they stand.
const EXCLUDED_FILES: [&[u8]; 8] = [
    b"postgresql.auto.conf.tmp",
    b"current_logfiles.tmp",
    b"backup_label",
    b"tablespace_map",
    b"backup_manifest",
    b"postmaster.pid",
    b"postmaster.opts",
    b".DS_Store",
];

/// What begins so is left out: relation cache files, and temporary files of queries.
const EXCLUDED_PREFIXES: [&[u8]; 2] = [b"pg_internal.init", b"pgsql_tmp"];

/// Directories whose contents are made anew by every server.
const EMPTIED_DIRECTORIES: [&[u8]; 7] = [
    b"pg_stat_tmp",
    b"pg_replslot",
    b"pg_dynshmem",
    b"pg_notify",
    b"pg_serial",
    b"pg_snapshots",
    b"pg_subtrans",
];

/// From this version on there are WAL summaries, and `.DS_Store` is left out.
const SUMMARIES_FROM: MajorVersion = MajorVersion(17);

/// Permission bits that are kept.
const MODE_BITS: u32 = 0o7777;

/// What must be known of a cluster to walk it.
#[derive(Debug, Clone)]
pub struct WalkRules {
    /// The major version.
    pub version: MajorVersion,
    /// `PG_<major>_<catalog version>`: the server's own directory in each tablespace.
    pub version_directory: String,
    /// `stats_temp_directory` below the data directory, on PostgreSQL 14 if it is not the usual one.
    pub stats_temp_directory: Option<Vec<u8>>,
}

/// A tablespace, as its entry in `pg_tblspc` has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceLink {
    /// The OID, the entry's name.
    pub oid: u32,
    /// Where its link leads; `pg_tblspc/<oid>` for an in-place tablespace, which is a directory there.
    pub location: PathBuf,
}

/// A directory that belongs to the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundDirectory {
    /// Its path below the data directory.
    pub path: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
}

/// Facts about a file that change with every write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileLook {
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Change time, nanoseconds since 1970; no program can set it.
    pub ctime_ns: i64,
    /// The inode's number.
    pub inode: u64,
}

/// A regular file that belongs to the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// Its path below the data directory.
    pub path: Vec<u8>,
    /// Where it stands.
    pub place: PathBuf,
    /// Its length when it was looked at, in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// What else tells whether somebody wrote to it.
    pub look: FileLook,
    /// The relation that it belongs to: then it consists of pages.
    pub relation: Option<(RelationDirectory, RelationFile)>,
}

/// What the walk comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A directory.
    Directory(FoundDirectory),
    /// A file.
    File(FoundFile),
    /// A socket, a device, or a symbolic link outside `pg_tblspc`: left out, and worth a warning.
    Special(PathBuf),
}

/// A walk in progress. Ends after the first error.
#[derive(Debug)]
pub struct ClusterWalk {
    pgdata: PathBuf,
    /// Permission bits of the data directory, for what was a link and becomes a directory.
    directory_mode: u32,
    rules: WalkRules,
    tablespaces: VecDeque<TablespaceLink>,
    /// Tablespaces inside the data directory, by their place: they are walked as tablespaces.
    inside: Vec<PathBuf>,
    /// The innermost last.
    open: Vec<OpenDirectory>,
    ready: VecDeque<Found>,
    failed: bool,
}

#[derive(Debug)]
struct OpenDirectory {
    path: Vec<u8>,
    place: PathBuf,
    names: Names,
    relations: Option<RelationDirectory>,
    /// Relations of it that are unlogged.
    unlogged: HashSet<u32>,
}

/// The names of a directory that are still to come: their bytes one after another, since a database may have a million
/// of them, and each ends with a zero, which no name holds.
#[derive(Debug, Default)]
struct Names {
    bytes: Vec<u8>,
    /// Where each begins, the next last.
    starts: Vec<u32>,
}

impl Names {
    fn push(&mut self, name: &OsStr) -> io::Result<()> {
        let start = u32::try_from(self.bytes.len());
        self.starts.push(start.map_err(|_| io::Error::other("its names are longer than 4 GiB"))?);
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        Ok(())
    }

    /// Puts the first in order of their bytes last, where it is taken first.
    fn sort(&mut self) {
        let bytes = &self.bytes;
        self.starts.sort_unstable_by(|one, other| name_at(bytes, *other).cmp(name_at(bytes, *one)));
    }

    fn pop(&mut self) -> Option<OsString> {
        let start = self.starts.pop()?;
        Some(OsString::from_vec(name_at(&self.bytes, start).to_vec()))
    }
}

fn name_at(bytes: &[u8], start: u32) -> &[u8] {
    let rest = &bytes[start as usize..];
    &rest[..rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len())]
}

impl ClusterWalk {
    /// Begins at the data directory.
    ///
    /// Errors: a directory that cannot be read.
    pub fn begin(pgdata: &Path, rules: WalkRules) -> Result<Self, DiskError> {
        let directory_mode = look_at(pgdata)?.mode() & MODE_BITS;
        let tablespaces: VecDeque<TablespaceLink> = tablespaces_of(pgdata)?.into();
        let resolved = fs::canonicalize(pgdata).unwrap_or_else(|_| pgdata.to_owned());
        let below = |link: &TablespaceLink| {
            let rest =
                [pgdata, &*resolved].iter().find_map(|of| link.location.strip_prefix(of).ok());
            rest.map(|rest| pgdata.join(rest))
        };
        let inside = tablespaces.iter().filter_map(below).collect();
        let open = vec![OpenDirectory::read(Vec::new(), pgdata.to_owned())?];
        let (ready, failed) = (VecDeque::new(), false);
        let pgdata = pgdata.to_owned();
        Ok(Self { pgdata, directory_mode, rules, tablespaces, inside, open, ready, failed })
    }

    fn advance(&mut self) -> Result<Option<Found>, DiskError> {
        loop {
            if let Some(found) = self.ready.pop_front() {
                return Ok(Some(found));
            }
            let Some(directory) = self.open.last_mut() else {
                let Some(tablespace) = self.tablespaces.pop_front() else { return Ok(None) };
                self.enter_tablespace(&tablespace)?;
                continue;
            };
            let Some(name) = directory.names.pop() else {
                self.open.pop();
                continue;
            };
            let (path, place) = (directory.path_of(&name), directory.place.join(&name));
            let relation = RelationFile::parse(name.as_bytes());
            let relation = directory.relations.zip(relation);
            if self.leaves_out(&path, &name, relation) {
                continue;
            }
            // Whatever vanishes while the server runs was dropped; WAL says so too.
            let Some(about) = if_there(look_at(&place))? else { continue };
            self.sort(path, place, &about, relation)?;
        }
    }

    fn leaves_out(
        &self,
        path: &[u8],
        name: &OsString,
        relation: Option<(RelationDirectory, RelationFile)>,
    ) -> bool {
        let name = name.as_bytes();
        let is_kept = name == b".DS_Store" && self.rules.version < SUMMARIES_FROM;
        if (EXCLUDED_FILES.contains(&name) && !is_kept)
            || EXCLUDED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            || path == b"global/pg_control"
        {
            return true;
        }
        let Some(directory) = self.open.last() else { return false };
        match relation {
            // An unlogged relation is made anew from its init fork.
            Some((_, file)) => file.fork != Fork::Init && directory.unlogged.contains(&file.number),
            None => {
                directory.relations.is_some_and(|at| at.database != 0)
                    && is_temporary_relation(name)
            }
        }
    }

    /// Decides what an entry is, and goes into directories.
    fn sort(
        &mut self,
        path: Vec<u8>,
        place: PathBuf,
        about: &Metadata,
        relation: Option<(RelationDirectory, RelationFile)>,
    ) -> Result<(), DiskError> {
        let kind = about.file_type();
        let mode = if kind.is_symlink() { self.directory_mode } else { about.mode() & MODE_BITS };
        let directory = |path: &[u8]| {
            Found::Directory(FoundDirectory { path: path.to_owned(), mode, mtime: about.mtime() })
        };
        let can_be_directory = kind.is_dir() || kind.is_symlink();
        if path == b"pg_wal" && can_be_directory {
            self.ready.push_back(directory(b"pg_wal"));
            self.ready.push_back(directory(b"pg_wal/archive_status"));
            if self.rules.version >= SUMMARIES_FROM {
                self.ready.push_back(directory(b"pg_wal/summaries"));
            }
        } else if can_be_directory && self.is_emptied(&path) {
            self.ready.push_back(directory(&path));
        } else if kind.is_dir() {
            self.ready.push_back(directory(&path));
            if !self.inside.contains(&place)
                && let Some(open) = if_there(OpenDirectory::read(path, place))?
            {
                self.open.push(open);
            }
        } else if kind.is_file() {
            let (size, mtime, look) = (about.len(), about.mtime(), look_of(about));
            self.ready.push_back(Found::File(FoundFile {
                path,
                place,
                size,
                mode,
                mtime,
                look,
                relation,
            }));
        } else {
            self.ready.push_back(Found::Special(place));
        }
        Ok(())
    }

    fn is_emptied(&self, path: &[u8]) -> bool {
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        EMPTIED_DIRECTORIES.contains(&name)
            // Its entries are tablespaces, which come last.
            || path == b"pg_tblspc"
            || self.rules.stats_temp_directory.as_deref() == Some(path)
    }

    fn enter_tablespace(&mut self, tablespace: &TablespaceLink) -> Result<(), DiskError> {
        let version = &self.rules.version_directory;
        let path = format!("pg_tblspc/{}/{version}", tablespace.oid).into_bytes();
        let place = self.pgdata.join("pg_tblspc").join(tablespace.oid.to_string()).join(version);
        // A tablespace that went away meanwhile is no error, nor is one of another version's server.
        let Some(about) = if_there(look_at(&place))? else { return Ok(()) };
        if about.is_dir()
            && let Some(open) = if_there(OpenDirectory::read(path.clone(), place))?
        {
            let (mode, mtime) = (about.mode() & MODE_BITS, about.mtime());
            self.ready.push_back(Found::Directory(FoundDirectory { path, mode, mtime }));
            self.open.push(open);
        }
        Ok(())
    }
}

impl Iterator for ClusterWalk {
    type Item = Result<Found, DiskError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let next = self.advance();
        self.failed = next.is_err();
        next.transpose()
    }
}

impl OpenDirectory {
    fn read(path: Vec<u8>, place: PathBuf) -> Result<Self, DiskError> {
        let failed = |error| DiskError::new("read the directory", &place, error);
        let relations = RelationDirectory::at(&path);
        let mut names = Names::default();
        let mut unlogged = HashSet::new();
        for entry in fs::read_dir(&place).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let file = relations.and_then(|_| RelationFile::parse(name.as_bytes()));
            if let Some(file) = file.filter(|file| file.fork == Fork::Init) {
                unlogged.insert(file.number);
            }
            names.push(&name).map_err(failed)?;
        }
        names.sort();
        Ok(Self { path, place, names, relations, unlogged })
    }

    fn path_of(&self, name: &OsString) -> Vec<u8> {
        let mut path = self.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name.as_bytes());
        path
    }
}

/// File systems whose times are kept by another machine or program, by their numbers in `statfs(2)`:
/// NFS, SMB (three), FUSE, 9P, Ceph, AFS (two), VirtualBox folders.
const FOREIGN_TIMES: [u32; 10] = [
    0x6969,
    0x517B,
    0xFF53_4D42,
    0xFE53_4D42,
    0x6573_5546,
    0x0102_1997,
    0x00C3_6400,
    0x5346_414F,
    0x6B41_4653,
    0x786F_4256,
];

/// Returns whether the times of files at `place` are set by this very kernel, so that they can be
/// compared with its clock.
///
/// Errors: a place that cannot be looked at.
pub fn has_own_times(place: &Path) -> Result<bool, DiskError> {
    let facts = rustix::fs::statfs(place)
        .map_err(|error| DiskError::new("look at the file system of", place, error.into()))?;
    // The numbers have 32 bits, whatever the type of the field.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let kind = facts.f_type as u32;
    Ok(!FOREIGN_TIMES.contains(&kind))
}

/// Returns the tablespaces that `pg_tblspc` names, by OID.
///
/// Errors: a directory or link that cannot be read.
pub fn tablespaces_of(pgdata: &Path) -> Result<Vec<TablespaceLink>, DiskError> {
    let root = pgdata.join("pg_tblspc");
    let failed = |error| DiskError::new("read the directory", &root, error);
    let mut tablespaces = Vec::new();
    for entry in fs::read_dir(&root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let plain = name.as_bytes().iter().all(u8::is_ascii_digit);
        let oid = plain.then(|| name.to_str()?.parse().ok()).flatten();
        let Some(oid) = oid else { continue };
        let place = entry.path();
        let Some(about) = if_there(look_at(&place))? else { continue };
        if about.is_symlink() {
            let read = fs::read_link(&place);
            let target = read.map_err(|error| DiskError::new("read the link", &place, error));
            let Some(location) = if_there(target)? else { continue };
            tablespaces.push(TablespaceLink { oid, location });
        } else if about.is_dir() {
            let location = PathBuf::from(OsString::from_vec(format!("pg_tblspc/{oid}").into()));
            tablespaces.push(TablespaceLink { oid, location });
        }
    }
    tablespaces.sort_unstable_by_key(|tablespace| tablespace.oid);
    Ok(tablespaces)
}

fn look_of(about: &Metadata) -> FileLook {
    let ns = |seconds: i64, rest: i64| seconds.saturating_mul(1_000_000_000).saturating_add(rest);
    FileLook {
        mtime_ns: ns(about.mtime(), about.mtime_nsec()),
        ctime_ns: ns(about.ctime(), about.ctime_nsec()),
        inode: about.ino(),
    }
}

fn look_at(place: &Path) -> Result<Metadata, DiskError> {
    fs::symlink_metadata(place).map_err(|error| DiskError::new("look at", place, error))
}

/// What is missing is `None` instead of an error; so is what lies below something that is no
/// directory any more.
fn if_there<T>(result: Result<T, DiskError>) -> Result<Option<T>, DiskError> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(DiskError::Missing { .. }) => Ok(None),
        Err(DiskError::Other { source, .. }) if source.kind() == io::ErrorKind::NotADirectory => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    fn rules(version: u32) -> WalkRules {
        let version_directory = "PG_18_202506291".to_owned();
        WalkRules { version: MajorVersion(version), version_directory, stats_temp_directory: None }
    }

    /// A directory with these files in it (each with one byte); what ends in `/` is a directory.
    fn tree(names: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in names.iter().chain(&["pg_tblspc/"]) {
            let place = root.path().join(name);
            fs::create_dir_all(if name.ends_with('/') { &place } else { place.parent().unwrap() })
                .unwrap();
            if !name.ends_with('/') {
                fs::write(place, b"x").unwrap();
            }
        }
        root
    }

    /// What is found: directories end in `/`, special files begin with `!`.
    fn walked(pgdata: &Path, rules: WalkRules) -> Vec<String> {
        let told = |found| match found {
            Found::Directory(directory) => {
                format!("{}/", String::from_utf8_lossy(&directory.path))
            }
            Found::File(file) => String::from_utf8_lossy(&file.path).into_owned(),
            Found::Special(place) => {
                format!("!{}", place.strip_prefix(pgdata).unwrap().display())
            }
        };
        ClusterWalk::begin(pgdata, rules).unwrap().map(|found| told(found.unwrap())).collect()
    }

    #[test]
    fn what_a_server_makes_anew_is_left_out_and_its_directories_are_kept() {
        let root = tree(&[
            "PG_VERSION",
            "postmaster.pid",
            "postmaster.opts",
            "postmaster.pid.old",
            "backup_label",
            "backup_label.old",
            "tablespace_map",
            "backup_manifest",
            "postgresql.auto.conf",
            "postgresql.auto.conf.tmp",
            "current_logfiles.tmp",
            "global/pg_control",
            "global/pg_filenode.map",
            "global/pg_internal.init.123",
            "pg_wal/000000010000000000000001",
            "pg_wal/archive_status/x.ready",
            "pg_replslot/mine/state",
            "pg_notify/0000",
            "pg_xact/0000",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "base/5/pgsql_tmp7",
            "log/.DS_Store",
        ]);
        let wanted = [
            "PG_VERSION",
            "backup_label.old",
            "base/",
            "base/5/",
            "global/",
            "global/pg_filenode.map",
            "log/",
            "pg_notify/",
            "pg_replslot/",
            "pg_tblspc/",
            "pg_wal/",
            "pg_wal/archive_status/",
            "pg_wal/summaries/",
            "pg_xact/",
            "pg_xact/0000",
            "postgresql.auto.conf",
            "postmaster.pid.old",
        ];
        assert_eq!(walked(root.path(), rules(18)), wanted);
        let older = walked(root.path(), rules(16));
        assert!(older.contains(&"log/.DS_Store".to_owned()));
        assert!(!older.contains(&"pg_wal/summaries/".to_owned()));
    }

    #[test]
    fn unlogged_and_temporary_relations_are_left_out_and_init_forks_kept() {
        let root = tree(&[
            "base/5/16384",
            "base/5/16384.1",
            "base/5/16384_init",
            "base/5/16384_fsm",
            "base/5/16385",
            "base/5/16385_vm",
            "base/5/t3_16386",
            "base/5/t3_16386_fsm.1",
            "base/5/t3_x",
            "base/t3_1",
            "global/1262",
            "global/t3_1",
        ]);
        let wanted = [
            "base/",
            "base/5/",
            "base/5/16384_init",
            "base/5/16385",
            "base/5/16385_vm",
            "base/5/t3_x",
            "base/t3_1",
            "global/",
            "global/1262",
            "global/t3_1",
            "pg_tblspc/",
        ];
        assert_eq!(walked(root.path(), rules(18)), wanted);
    }

    #[test]
    fn only_files_of_relations_consist_of_pages() {
        let root = tree(&["base/5/16384", "base/5/PG_VERSION", "pg_xact/0000", "global/1262"]);
        let walk = ClusterWalk::begin(root.path(), rules(18)).unwrap();
        let pages: Vec<bool> = walk
            .filter_map(|found| match found.unwrap() {
                Found::File(file) => Some(file.relation.is_some()),
                _ => None,
            })
            .collect();
        assert_eq!(pages, [true, false, true, false]);
    }

    #[test]
    fn tablespaces_come_last_and_only_with_this_versions_directory() {
        let aside = tree(&["PG_18_202506291/16400/1", "PG_17_202406281/16400/1", "other"]);
        let root = tree(&[
            "base/5/1",
            "pg_tblspc/16390/PG_18_202506291/5/2",
            "pg_tblspc/junk/x",
            "inner/PG_18_202506291/5/3",
        ]);
        symlink(aside.path(), root.path().join("pg_tblspc/16385")).unwrap();
        symlink(root.path().join("inner"), root.path().join("pg_tblspc/16399")).unwrap();
        symlink("/nowhere", root.path().join("pg_tblspc/16400")).unwrap();
        let found = walked(root.path(), rules(18));
        let wanted = [
            "base/",
            "base/5/",
            "base/5/1",
            "inner/",
            "pg_tblspc/",
            "pg_tblspc/16385/PG_18_202506291/",
            "pg_tblspc/16385/PG_18_202506291/16400/",
            "pg_tblspc/16385/PG_18_202506291/16400/1",
            "pg_tblspc/16390/PG_18_202506291/",
            "pg_tblspc/16390/PG_18_202506291/5/",
            "pg_tblspc/16390/PG_18_202506291/5/2",
            "pg_tblspc/16399/PG_18_202506291/",
            "pg_tblspc/16399/PG_18_202506291/5/",
            "pg_tblspc/16399/PG_18_202506291/5/3",
        ];
        assert_eq!(found, wanted);
        let tablespaces = tablespaces_of(root.path()).unwrap();
        let places: Vec<_> =
            tablespaces.iter().map(|t| (t.oid, t.location.to_str().unwrap())).collect();
        assert_eq!(places[0], (16385, aside.path().to_str().unwrap()));
        assert_eq!(places[1], (16390, "pg_tblspc/16390"));
        assert_eq!(places.len(), 4);
    }

    #[test]
    fn links_and_sockets_are_told_and_never_followed() {
        let outside = tree(&["secret"]);
        let root = tree(&["base/5/1"]);
        symlink(outside.path(), root.path().join("linked")).unwrap();
        symlink(outside.path().join("secret"), root.path().join("base/5/2")).unwrap();
        symlink(outside.path(), root.path().join("pg_wal")).unwrap();
        symlink(outside.path(), root.path().join("pg_replslot")).unwrap();
        let _socket = UnixListener::bind(root.path().join("socket")).unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let found = walked(root.path(), rules(14));
        let wanted = [
            "base/",
            "base/5/",
            "base/5/1",
            "!base/5/2",
            "!linked",
            "pg_replslot/",
            "pg_tblspc/",
            "pg_wal/",
            "pg_wal/archive_status/",
            "!socket",
        ];
        assert_eq!(found, wanted);
        let mut walk = ClusterWalk::begin(root.path(), rules(14)).unwrap();
        let mode = walk.find_map(|found| match found.unwrap() {
            Found::Directory(directory) if directory.path == b"pg_wal" => Some(directory.mode),
            _ => None,
        });
        assert_eq!(mode, Some(0o750));
    }

    #[test]
    fn every_write_changes_how_a_file_looks() {
        let root = tree(&["base/5/1"]);
        let place = root.path().join("base/5/1");
        assert!(has_own_times(&place).unwrap());
        let look = || look_of(&look_at(&place).unwrap());
        let before = look();
        assert_eq!(look(), before);
        // A write within one tick of the clock leaves no trace, so this goes on until one does.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while look() == before && std::time::Instant::now() < deadline {
            fs::write(&place, b"y").unwrap();
        }
        assert!(look().ctime_ns > before.ctime_ns && look().inode == before.inode);
        let written = look();
        fs::File::options()
            .write(true)
            .open(&place)
            .unwrap()
            .set_modified(std::time::UNIX_EPOCH)
            .unwrap();
        assert!(look().ctime_ns >= written.ctime_ns && look() != written);
    }

    #[test]
    fn what_vanishes_during_the_walk_is_no_error() {
        let root = tree(&["base/5/1", "base/5/2", "base/6/1", "pg_xact/0000"]);
        let mut walk = ClusterWalk::begin(root.path(), rules(18)).unwrap();
        // base/, base/5/
        walk.next().unwrap().unwrap();
        walk.next().unwrap().unwrap();
        fs::remove_dir_all(root.path().join("base/5")).unwrap();
        fs::remove_dir_all(root.path().join("base/6")).unwrap();
        let left: Vec<_> = walk.map(Result::unwrap).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    #[test]
    fn the_directory_of_statistics_on_14_is_kept_empty() {
        let root = tree(&["stats/in/x", "stats/y"]);
        let rules = WalkRules { stats_temp_directory: Some(b"stats".to_vec()), ..rules(14) };
        assert_eq!(walked(root.path(), rules), ["pg_tblspc/", "stats/"]);
    }
}
