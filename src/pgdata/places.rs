//! Where a path of a backup belongs on this disk.
//!
//! Owns: the mapping of tablespaces, and the one walk over what stands there. Never here: writing
//! or removing.
//!
//! ```text
//! base/5/1259                             pgdata/base/5/1259
//! pg_tblspc/16400                         pgdata/pg_tblspc/16400, a link to the tablespace's place
//! pg_tblspc/16400/PG_18_202506291/5/77    <place of 16400>/PG_18_202506291/5/77
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

use super::disk::DiskError;
use super::restore_marker::RESTORE_MARKER_NAME;
use super::safe_path::safe_path;
use super::tree_plan::{TreeError, TreePlan};

/// The control file's place in a data directory.
pub(super) const CONTROL_FILE: &str = "global/pg_control";

/// The directory of tablespace links.
pub(super) const TABLESPACE_LINKS: &str = "pg_tblspc";

/// The data directory and the places of tablespaces outside of it.
#[derive(Debug, Clone)]
pub struct Places {
    pub(super) pgdata: PathBuf,
    /// Mapped tablespaces: name of the link, place.
    pub(super) tablespaces: BTreeMap<String, PathBuf>,
}

/// Something that stands in a tree and does not belong there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stranger {
    /// Where it stands, absolute.
    pub path: PathBuf,
    /// Whether it is a directory, with all that is in it; a link to one is none.
    pub is_directory: bool,
}

impl Places {
    /// Returns the places of a plan.
    pub fn of(plan: &TreePlan) -> Self {
        let tablespaces = plan.tablespaces.iter();
        let tablespaces = tablespaces.map(|space| (space.oid.to_string(), space.target.clone()));
        Self { pgdata: plan.pgdata.clone(), tablespaces: tablespaces.collect() }
    }

    /// Opens for reading what stands where `path` belongs, if it is a plain file that has this one
    /// name. A file with another name may be another cluster's too (`pg_upgrade --link`).
    pub fn open_plain(&self, path: &Path) -> Option<File> {
        let (_, path) = self.place_of(path).ok()?;
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(plain_only()).open(path).ok()?;
        is_plain(&file.metadata().ok()?).then_some(file)
    }

    /// Shows everything that stands in the tree and is not what `belongs` to it (paths as in a
    /// backup), a directory before what is in it and instead of that. Follows no link.
    ///
    /// In a tablespace's place only the directories that belong are looked into: it may hold those of
    /// other clusters. `lost+found` is the file system's.
    pub fn strangers(
        &self,
        belongs: &dyn Fn(&Path) -> bool,
        found: &mut dyn FnMut(Stranger) -> Result<(), TreeError>,
    ) -> Result<(), TreeError> {
        let links = Path::new(TABLESPACE_LINKS);
        let spaces = self.tablespaces.iter().map(|(oid, place)| (place.clone(), links.join(oid)));
        let mut directories: Vec<(PathBuf, PathBuf)> = spaces.collect();
        directories.push((self.pgdata.clone(), PathBuf::new()));
        let is_link = |path: &Path| {
            path.strip_prefix(links).is_ok_and(|oid| {
                let name = oid.to_str().unwrap_or_default();
                name.is_empty() || self.tablespaces.contains_key(name)
            })
        };
        while let Some((directory, path)) = directories.pop() {
            let is_shared = is_link(&path) && path != links;
            let listing = match fs::read_dir(&directory) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                listing => listing.map_err(|e| DiskError::new("list", &directory, e))?,
            };
            for entry in listing {
                let entry = entry.map_err(|e| DiskError::new("list", &directory, e))?;
                let (standing, name) = (entry.path(), entry.file_name());
                let kind = entry.file_type().map_err(|e| DiskError::new("read", &standing, e))?;
                let is_root = is_shared || path.as_os_str().is_empty();
                if (is_root && name == RESTORE_MARKER_NAME)
                    || (kind.is_dir() && name == "lost+found")
                {
                    continue;
                }
                let path = path.join(name);
                if belongs(&path) || is_link(&path) {
                    if kind.is_dir() {
                        directories.push((standing, path));
                    }
                } else if !is_shared {
                    found(Stranger { path: standing, is_directory: kind.is_dir() })?;
                }
            }
        }
        Ok(())
    }

    /// Returns where `path` belongs: the root it lies in, and its absolute place.
    ///
    /// # Errors
    /// [`TreeError::UnsafePath`], and [`TreeError::HeldBack`] for what only the end of a restore may make.
    pub(super) fn place_of(&self, path: &Path) -> Result<(&Path, PathBuf), TreeError> {
        let path = safe_path(path.as_os_str().as_bytes())?;
        if path == Path::new(CONTROL_FILE) || path == Path::new(RESTORE_MARKER_NAME) {
            return Err(TreeError::HeldBack { path });
        }
        let mut names = path.components().map(Component::as_os_str);
        if names.next().is_some_and(|name| name == TABLESPACE_LINKS)
            && let Some(oid) = names.next().and_then(|name| name.to_str())
            && let Some(target) = self.tablespaces.get(oid)
        {
            let rest: PathBuf = names.collect();
            let place =
                if rest.as_os_str().is_empty() { target.clone() } else { target.join(&rest) };
            if rest == Path::new(RESTORE_MARKER_NAME) {
                return Err(TreeError::HeldBack { path });
            }
            return Ok((target, place));
        }
        Ok((&self.pgdata, self.pgdata.join(path)))
    }
}

/// Flags with which a link is not followed, and a pipe without a writer not waited for.
pub(super) fn plain_only() -> i32 {
    (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()
}

/// Returns whether this is a plain file with one name only.
pub(super) fn is_plain(facts: &fs::Metadata) -> bool {
    facts.is_file() && facts.nlink() == 1
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn strangers_are_shown_once_and_no_link_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let elsewhere = at("elsewhere/kept");
        for directory in ["data/base/5", "data/old/deep", "data/pg_tblspc", "data/lost+found"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        for directory in ["space/PG_18_1/5", "space/PG_17_1/5"] {
            fs::create_dir_all(at(directory)).unwrap();
        }
        fs::create_dir_all(&elsewhere).unwrap();
        fs::write(elsewhere.join("file"), "x").unwrap();
        symlink(at("elsewhere"), at("data/link")).unwrap();
        symlink(at("elsewhere"), at("data/base/kept")).unwrap();
        symlink(at("space"), at("data/pg_tblspc/16400")).unwrap();
        symlink(at("elsewhere"), at("data/pg_tblspc/16401")).unwrap();
        for file in ["base/5/1", "base/5/2", "old/deep/3", "lost+found/4"] {
            fs::write(at("data").join(file), "x").unwrap();
        }
        fs::write(at("data").join(RESTORE_MARKER_NAME), "").unwrap();
        fs::write(at("space").join(RESTORE_MARKER_NAME), "").unwrap();
        fs::write(at("space/others"), "x").unwrap();
        fs::write(at("space/PG_18_1/5/6"), "x").unwrap();
        fs::write(at("space/PG_18_1/5/7"), "x").unwrap();

        let places = Places {
            pgdata: at("data"),
            tablespaces: BTreeMap::from([("16400".to_owned(), at("space"))]),
        };
        let listed = [
            "base",
            "base/5",
            "base/5/1",
            "base/kept",
            "base/kept/kept",
            "pg_tblspc/16400/PG_18_1",
            "pg_tblspc/16400/PG_18_1/5",
            "pg_tblspc/16400/PG_18_1/5/6",
        ];
        let belongs = |path: &Path| listed.iter().any(|listed| Path::new(listed) == path);
        let mut found = BTreeSet::new();
        let mut note = |stranger: Stranger| {
            let name = stranger.path.strip_prefix(dir.path()).unwrap().to_owned();
            assert!(found.insert((name, stranger.is_directory)));
            Ok(())
        };
        places.strangers(&belongs, &mut note).unwrap();
        let expected = [
            ("data/base/5/2", false),
            ("data/link", false),
            ("data/old", true),
            ("data/pg_tblspc/16401", false),
            ("space/PG_18_1/5/7", false),
        ];
        assert_eq!(found, expected.map(|(name, is)| (PathBuf::from(name), is)).into());
    }

    #[test]
    fn only_a_plain_file_with_one_name_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { pgdata: dir.path().to_owned(), tablespaces: BTreeMap::new() };
        for name in ["plain", "twice"] {
            fs::write(dir.path().join(name), "x").unwrap();
        }
        fs::hard_link(dir.path().join("twice"), dir.path().join("again")).unwrap();
        symlink(dir.path().join("plain"), dir.path().join("link")).unwrap();
        fs::create_dir(dir.path().join("directory")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("pipe"), 0o600.into()).unwrap();
        assert!(places.open_plain(Path::new("plain")).is_some());
        for name in ["twice", "again", "link", "directory", "pipe", "missing", "../x"] {
            assert!(places.open_plain(Path::new(name)).is_none(), "{name}");
        }
    }
}
