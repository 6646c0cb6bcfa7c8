//! Where a restore is to go, and whether it may go there.
//!
//! Owns: every reason to refuse a place, found out without touching anything.
//! Never here: creating, writing, removing.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use super::disk::{DiskError, Owner};
use super::restore_marker::{FoundMarker, RestoreMarker, find_marker};
use super::running::{PostmasterPidError, ServerState, server_state};
use super::safe_path::UnsafePath;
use super::takeover;
use crate::pg::SystemId;

/// How many names of a directory that is not empty are told.
pub(super) const FOUND_NAMES_MAX: usize = 5;

/// Who may read the data directory; PostgreSQL starts with no other modes
/// (`checkDataDir` in `src/backend/utils/init/miscinit.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its owner: directories 0700, files 0600.
    Owner,
    /// Its group too, as with `initdb -g`: directories 0750, files 0640.
    Group,
}

impl Access {
    /// Returns the access that a source's data directory had, from its mode.
    pub fn of_mode(mode: u32) -> Self {
        // `GetDataDirectoryCreatePerm` (src/common/file_perm.c) decides the same way.
        if mode & 0o750 == 0o750 { Self::Group } else { Self::Owner }
    }

    /// Returns the mode of directories.
    pub fn directory_mode(self) -> u32 {
        if self == Self::Group { 0o750 } else { 0o700 }
    }

    /// Returns the mode of files.
    pub fn file_mode(self) -> u32 {
        if self == Self::Group { 0o640 } else { 0o600 }
    }
}

/// A tablespace outside of the data directory. One inside it (an in-place
/// tablespace, 15 and later) is part of the tree and is not listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceTarget {
    /// Its object id, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was on the source.
    pub original: PathBuf,
    /// Where it goes; absolute.
    pub target: PathBuf,
}

/// Where a data directory is to be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreePlan {
    /// The data directory; absolute, missing or empty unless it may be taken over.
    pub pgdata: PathBuf,
    /// The tablespaces; each target missing or empty, or taken over as well.
    pub tablespaces: Vec<TablespaceTarget>,
    /// Who may read it.
    pub access: Access,
    /// For root only: whose it shall be. When left out, root takes the owner of
    /// the existing empty data directory.
    pub owner: Option<Owner>,
    /// The cluster whose directories may be taken over with what stands in them; `None` takes
    /// only empty ones.
    pub take_over: Option<SystemId>,
}

/// The place cannot be used, or a file does not belong in it. Nothing is ever
/// overwritten or removed because of one of these.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A server is at work there.
    #[error("a PostgreSQL server (process {pid}) is running in `{}`", path.display())]
    ServerRunning {
        /// The data directory.
        path: PathBuf,
        /// The server's process.
        pid: u32,
    },
    /// Another restore is at work there.
    #[error("another restore is filling `{}`", path.display())]
    RestoreRunning {
        /// The directory.
        path: PathBuf,
    },
    /// A restore died there. It had found the directory empty and it never became
    /// a cluster, so the directory may be emptied.
    #[error(
        "`{}` holds the files of a restore of backup {} that did not finish",
        path.display(),
        if marker.backup.is_empty() { "(unknown)" } else { &marker.backup }
    )]
    DeadRestore {
        /// The directory.
        path: PathBuf,
        /// What that restore said of itself; empty text where it got no further.
        marker: RestoreMarker,
    },
    /// It cannot be told whether a server is at work there.
    #[error("whether a server is running in `{}` cannot be told: {why}", path.display())]
    PidFileUnreadable {
        /// The data directory.
        path: PathBuf,
        /// What is wrong with its `postmaster.pid`.
        why: PostmasterPidError,
    },
    /// What stands is another cluster's.
    #[error("`{}` holds a cluster with system identifier {found}, and the backup is of {expected}", path.display())]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// The backup's cluster.
        expected: SystemId,
        /// The one that stands.
        found: SystemId,
    },
    /// Nothing proves that what stands is this cluster's.
    #[error("whose files `{}` holds cannot be told from its global/pg_control: {why}", path.display())]
    NotProven {
        /// The data directory.
        path: PathBuf,
        /// What is wrong with the control file.
        why: String,
    },
    /// WAL stands there that is not archived.
    #[error("`{}` holds WAL that is not archived yet: {}", path.display(), listed(found, *more))]
    UnarchivedWal {
        /// The directory of WAL.
        path: PathBuf,
        /// Up to five names in it, sorted.
        found: Vec<String>,
        /// True if there are others.
        more: bool,
    },
    /// The directory has something in it.
    #[error("directory `{}` is not empty: it holds {}", path.display(), listed(found, *more))]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// Up to five names in it, sorted.
        found: Vec<String>,
        /// True if there are others.
        more: bool,
    },
    /// The directory holds only `lost+found`: it is the root of a file system.
    /// As with `initdb`, a directory below it is the right place.
    #[error("`{}` is a mount point (it holds `lost+found`)", path.display())]
    MountPoint {
        /// The directory.
        path: PathBuf,
    },
    /// Something else stands where a directory shall be.
    #[error("`{}` is not a directory", path.display())]
    NotADirectory {
        /// The path.
        path: PathBuf,
    },
    /// Relative, or with `..`.
    #[error("`{}` is not a plain absolute path", path.display())]
    NotAbsolute {
        /// The path as given.
        path: PathBuf,
    },
    /// One directory is, or lies in, another.
    #[error("`{}` lies in `{}`, or is the same", inner.display(), outer.display())]
    Nested {
        /// The inner one.
        inner: PathBuf,
        /// The outer one.
        outer: PathBuf,
    },
    /// Two entries for one tablespace.
    #[error("tablespace {oid} is given twice")]
    TablespaceTwice {
        /// Its object id.
        oid: u32,
    },
    /// Root may not own a data directory: PostgreSQL refuses to run as root.
    #[error("running as root, and nothing says which user shall own `{}`", path.display())]
    RunningAsRoot {
        /// The data directory.
        path: PathBuf,
    },
    /// PostgreSQL starts only in a data directory of its own user.
    #[error("`{}` belongs to user {owner_uid}, not to user {our_uid} who runs this", path.display())]
    WrongOwner {
        /// The data directory.
        path: PathBuf,
        /// Its owner, or the one asked for.
        owner_uid: u32,
        /// Who we are.
        our_uid: u32,
    },
    /// A name from the backup that points outside.
    #[error(transparent)]
    UnsafePath(#[from] UnsafePath),
    /// A name that only the end of the restore may make.
    #[error("`{}` is written by the restore itself, last", path.display())]
    HeldBack {
        /// The name.
        path: PathBuf,
    },
    /// Bytes beyond the size that the file was created with.
    #[error("`{}` has {size_bytes} bytes; writing up to byte {end} was asked", path.display())]
    BeyondEnd {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// End of the refused write, excluded.
        end: u64,
    },
    /// Files were created and never finished.
    #[error("{count} files are not finished")]
    Unfinished {
        /// How many.
        count: usize,
    },
    /// A file without which a start would be silent corruption, or a second
    /// cluster on the source's timeline.
    #[error("`{}` is missing", path.display())]
    Incomplete {
        /// The file.
        path: PathBuf,
    },
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

fn listed(found: &[String], more: bool) -> String {
    let names: Vec<_> = found.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ") + if more { ", ..." } else { "" }
}

impl TreePlan {
    /// Finds out whether the tree can be built here; reads only.
    ///
    /// Returns the owner that everything will be given, which is `None` unless
    /// root does it. What was true here may have changed a moment later;
    /// [`NewTree::open`](super::tree::NewTree::open) looks again, and creates
    /// nothing over anything.
    pub fn check(&self) -> Result<Option<Owner>, TreeError> {
        self.check_paths()?;
        if directory_exists(&self.pgdata)? {
            if let ServerState::Running(found) = server_state(&self.pgdata)? {
                return Err(TreeError::ServerRunning { path: self.pgdata.clone(), pid: found.pid });
            }
            // The control file is written after the markers are gone, so a directory
            // with both has been a cluster: its files are more than a dead restore's.
            let control = self.pgdata.join("global/pg_control");
            match self.take_over {
                Some(cluster) => takeover::check_pgdata(&self.pgdata, cluster)?,
                None => check_empty(&self.pgdata, !control.exists())?,
            }
        }
        for tablespace in &self.tablespaces {
            if directory_exists(&tablespace.target)? {
                match self.take_over {
                    Some(cluster) => {
                        takeover::check_tablespace(&self.pgdata, tablespace, cluster)?;
                    }
                    None => check_empty(&tablespace.target, true)?,
                }
            }
        }
        self.check_owner()
    }

    fn check_paths(&self) -> Result<(), TreeError> {
        let mut oids = BTreeSet::new();
        let mut places = vec![(&self.pgdata, resolved(&self.pgdata)?)];
        for tablespace in &self.tablespaces {
            if !oids.insert(tablespace.oid) {
                return Err(TreeError::TablespaceTwice { oid: tablespace.oid });
            }
            places.push((&tablespace.target, resolved(&tablespace.target)?));
        }
        for (at, (inner, inner_resolved)) in places.iter().enumerate() {
            for (other, (outer, outer_resolved)) in places.iter().enumerate() {
                if at != other && inner_resolved.starts_with(outer_resolved) {
                    let (inner, outer) = ((*inner).clone(), (*outer).clone());
                    return Err(TreeError::Nested { inner, outer });
                }
            }
        }
        Ok(())
    }

    fn check_owner(&self) -> Result<Option<Owner>, TreeError> {
        let path = self.pgdata.clone();
        let present = match fs::metadata(&path) {
            Ok(facts) => Some(Owner { uid: facts.uid(), gid: facts.gid() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(DiskError::new("read", &path, e).into()),
        };
        let our_uid = rustix::process::geteuid().as_raw();
        if our_uid == 0 {
            return match self.owner.or(present) {
                Some(owner) if owner.uid != 0 => Ok(Some(owner)),
                _ => Err(TreeError::RunningAsRoot { path }),
            };
        }
        match present.into_iter().chain(self.owner).find(|owner| owner.uid != our_uid) {
            Some(Owner { uid, .. }) => Err(TreeError::WrongOwner { path, owner_uid: uid, our_uid }),
            None => Ok(None),
        }
    }
}

/// Returns `path` with the symbolic links in its existing part followed.
fn resolved(path: &Path) -> Result<PathBuf, TreeError> {
    let plain = |c| matches!(c, Component::Normal(_) | Component::RootDir | Component::CurDir);
    if !path.is_absolute() || !path.components().all(plain) {
        return Err(TreeError::NotAbsolute { path: path.to_owned() });
    }
    for ancestor in path.ancestors() {
        match ancestor.canonicalize() {
            Ok(there) => {
                let rest = path.strip_prefix(ancestor).unwrap_or(Path::new(""));
                return Ok(if rest.as_os_str().is_empty() { there } else { there.join(rest) });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {}
            Err(e) => return Err(DiskError::new("follow the links of", ancestor, e).into()),
        }
    }
    Ok(path.to_owned())
}

/// Returns whether there is a directory at `path`; anything else there is an error.
fn directory_exists(path: &Path) -> Result<bool, TreeError> {
    let not_a_directory = || Err(TreeError::NotADirectory { path: path.to_owned() });
    match fs::metadata(path) {
        Ok(facts) if facts.is_dir() => Ok(true),
        Ok(_) => not_a_directory(),
        // A link to nowhere cannot become a directory either.
        Err(e) if e.kind() == io::ErrorKind::NotFound && !path.is_symlink() => Ok(false),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            not_a_directory()
        }
        Err(e) => Err(DiskError::new("read", path, e).into()),
    }
}

/// Refuses a directory that is not empty, saying what is in it.
pub(super) fn check_empty(path: &Path, may_be_dead_restore: bool) -> Result<(), TreeError> {
    let listing = fs::read_dir(path).map_err(|e| DiskError::new("list", path, e))?;
    match find_marker(path)? {
        FoundMarker::Live => return Err(TreeError::RestoreRunning { path: path.to_owned() }),
        FoundMarker::Dead(marker) if may_be_dead_restore => {
            return Err(TreeError::DeadRestore { path: path.to_owned(), marker });
        }
        FoundMarker::Dead(_) | FoundMarker::Absent => {}
    }
    // One name more than is told shows whether there are others.
    let mut found = Vec::new();
    for entry in listing.take(FOUND_NAMES_MAX + 1) {
        let entry = entry.map_err(|e| DiskError::new("list", path, e))?;
        found.push(entry.file_name().to_string_lossy().into_owned());
    }
    if found.is_empty() {
        return Ok(());
    }
    if found == ["lost+found"] {
        return Err(TreeError::MountPoint { path: path.to_owned() });
    }
    let more = found.len() > FOUND_NAMES_MAX;
    found.truncate(FOUND_NAMES_MAX);
    found.sort_unstable();
    Err(TreeError::NotEmpty { path: path.to_owned(), found, more })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pgdata::restore_marker::RESTORE_MARKER_NAME;

    /// Root must name an owner; everyone else is one.
    fn owner() -> Option<Owner> {
        rustix::process::geteuid().is_root().then_some(Owner { uid: 65534, gid: 65534 })
    }

    fn plan(pgdata: &Path, tablespaces: &[&Path]) -> TreePlan {
        let target = |(n, path): (usize, &&Path)| TablespaceTarget {
            oid: 16400 + u32::try_from(n).unwrap(),
            original: "/mnt/old".into(),
            target: path.to_path_buf(),
        };
        TreePlan {
            pgdata: pgdata.to_owned(),
            tablespaces: tablespaces.iter().enumerate().map(target).collect(),
            access: Access::Owner,
            owner: owner(),
            take_over: None,
        }
    }

    #[test]
    fn missing_and_empty_directories_are_taken_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(plan(dir.path(), &[]).check().unwrap(), owner());
        let missing = dir.path().join("a/b");
        let tablespace = dir.path().join("t");
        plan(&missing, &[&tablespace]).check().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn directory_with_content_is_refused_naming_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["PG_VERSION", ".hidden"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(error.to_string().ends_with("it holds `.hidden`, `PG_VERSION`"), "{error}");
        for n in 0..4 {
            fs::write(dir.path().join(n.to_string()), "").unwrap();
        }
        let error = plan(dir.path(), &[]).check().unwrap_err();
        let TreeError::NotEmpty { found, more, .. } = error else { unreachable!("{error}") };
        assert_eq!((found.len(), more), (5, true));
    }

    #[test]
    fn tablespace_directory_with_content_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tablespace = dir.path().join("t");
        fs::create_dir_all(tablespace.join("PG_18_202506291")).unwrap();
        let error = plan(&dir.path().join("d"), &[&tablespace]).check().unwrap_err();
        assert!(matches!(error, TreeError::NotEmpty { path, .. } if path == tablespace));
    }

    #[test]
    fn mount_point_is_refused_as_initdb_does() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("lost+found")).unwrap();
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(matches!(error, TreeError::MountPoint { .. }));
    }

    #[test]
    fn running_server_is_refused_and_a_stale_pid_file_is_just_content() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("postmaster.pid");
        let live = std::os::unix::process::parent_id();
        fs::write(&file, format!("{live}\n")).unwrap();
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(matches!(error, TreeError::ServerRunning { pid, .. } if pid == live));
        fs::write(&file, "4194321\n").unwrap();
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(matches!(error, TreeError::NotEmpty { .. }));
    }

    #[test]
    fn dead_restore_is_known_by_its_marker_but_never_where_a_control_file_stands() {
        let dir = tempfile::tempdir().unwrap();
        let marker = r#"{"backup":"b7","started":"2026-11-22T03:10:00Z"}"#;
        fs::write(dir.path().join(RESTORE_MARKER_NAME), marker).unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(matches!(&error, TreeError::DeadRestore { marker, .. } if marker.backup == "b7"));

        fs::write(dir.path().join("global/pg_control"), "").unwrap();
        let error = plan(dir.path(), &[]).check().unwrap_err();
        assert!(matches!(error, TreeError::NotEmpty { .. }));
    }

    #[test]
    fn nested_or_repeated_places_are_refused_through_links_too() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let nested = |pgdata: &str, tablespaces: &[&Path]| {
            let error = plan(&at(pgdata), tablespaces).check().unwrap_err();
            assert!(matches!(error, TreeError::Nested { .. }), "{error}");
        };
        nested("d", &[&at("d/t")]);
        nested("t/d", &[&at("t")]);
        nested("d", &[&at("d")]);
        nested("d", &[&at("t"), &at("t/u")]);
        fs::create_dir(at("real")).unwrap();
        std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
        nested("real", &[&at("link/t")]);
        // A shared beginning of the name is no nesting.
        plan(&at("d"), &[&at("d2")]).check().unwrap();

        let mut twice = plan(&at("d"), &[&at("t"), &at("u")]);
        twice.tablespaces[1].oid = twice.tablespaces[0].oid;
        assert!(matches!(twice.check(), Err(TreeError::TablespaceTwice { oid: 16400 })));
    }

    #[test]
    fn only_plain_absolute_directories_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: &Path| plan(path, &[]).check();
        assert!(matches!(check(Path::new("data")), Err(TreeError::NotAbsolute { .. })));
        let dotted = dir.path().join("a/../b");
        assert!(matches!(check(&dotted), Err(TreeError::NotAbsolute { .. })));
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(check(&file), Err(TreeError::NotADirectory { .. })));
        let below = file.join("x");
        assert!(matches!(check(&below), Err(TreeError::NotADirectory { .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link).unwrap();
        assert!(matches!(check(&link), Err(TreeError::NotADirectory { .. })));
    }

    #[test]
    fn root_must_know_an_owner_and_others_must_be_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut plan = plan(dir.path(), &[]);
        if rustix::process::geteuid().is_root() {
            plan.owner = None;
            assert!(matches!(plan.check(), Err(TreeError::RunningAsRoot { .. })));
            let nobody = Owner { uid: 65534, gid: 65534 };
            nobody.give_path(dir.path()).unwrap();
            assert_eq!(plan.check().unwrap(), Some(nobody));
        } else {
            plan.owner = Some(Owner { uid: 0, gid: 0 });
            assert!(matches!(plan.check(), Err(TreeError::WrongOwner { owner_uid: 0, .. })));
        }
    }

    #[test]
    fn access_follows_the_mode_of_the_source() {
        assert_eq!(Access::of_mode(0o040_700), Access::Owner);
        assert_eq!(Access::of_mode(0o040_750), Access::Group);
        assert_eq!(Access::of_mode(0o040_710), Access::Owner);
    }
}
