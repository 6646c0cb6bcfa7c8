//! Building a tree over what stands already (`restore --delta`): whose it is, and how each name is taken.
//!
//! Owns: the proof that a directory may be changed at all, and replacing what is of another kind. Never
//! here: the content of files.
//!
//! | What stands | Taken over |
//! |---|---|
//! | a control file of the cluster, no server at work | yes |
//! | no control file, the marker of a restore that died | yes |
//! | nothing | yes, as any restore does |
//! | anything else | no |

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::disk::{DiskError, remove_if_there};
use super::places::{CONTROL_FILE, TABLESPACE_LINKS, is_plain, plain_only};
use super::restore_marker::{FoundMarker, find_marker};
use super::running::{ServerState, read_control_bytes, server_state};
use super::tree_plan::{FOUND_NAMES_MAX, TablespaceTarget, TreeError, check_empty};
use crate::pg::{ControlFile, SystemId};

/// Refuses a data directory that is not this cluster's, that a server may be using, or whose WAL is
/// nowhere else. Reads only.
pub(super) fn check_pgdata(pgdata: &Path, cluster: SystemId) -> Result<(), TreeError> {
    let path = || pgdata.to_owned();
    if let ServerState::Unreadable(why) = server_state(pgdata)? {
        return Err(TreeError::PidFileUnreadable { path: path(), why });
    }
    let marker = find_marker(pgdata)?;
    if marker == FoundMarker::Live {
        return Err(TreeError::RestoreRunning { path: path() });
    }
    match (read_control_bytes(pgdata), marker) {
        (Ok(bytes), _) => {
            let control = ControlFile::parse(&bytes);
            let control = control
                .map_err(|error| TreeError::NotProven { path: path(), why: error.to_string() })?;
            same_cluster(pgdata, cluster, control.system_id)?;
        }
        (Err(DiskError::Missing { .. }), FoundMarker::Dead(marker)) => {
            // Of a restore that began in an empty directory everything may be replaced.
            if let Some(found) = marker.took_over {
                same_cluster(pgdata, cluster, found)?;
            }
        }
        (Err(DiskError::Missing { .. }), _) => check_empty(pgdata, false)?,
        (Err(error), _) => return Err(error.into()),
    }
    check_wal_is_archived(pgdata)
}

fn same_cluster(path: &Path, expected: SystemId, found: SystemId) -> Result<(), TreeError> {
    let path = path.to_owned();
    if found == expected { Ok(()) } else { Err(TreeError::OtherCluster { path, expected, found }) }
}

/// Refuses a tablespace's place that is neither empty nor proven to be the cluster's: by the link of the
/// data directory, which was checked, or by the marker of a restore that died.
pub(super) fn check_tablespace(
    pgdata: &Path,
    tablespace: &TablespaceTarget,
    cluster: SystemId,
) -> Result<(), TreeError> {
    let place = &tablespace.target;
    match find_marker(place)? {
        FoundMarker::Live => return Err(TreeError::RestoreRunning { path: place.clone() }),
        FoundMarker::Dead(marker) => {
            return marker.took_over.map_or(Ok(()), |found| same_cluster(place, cluster, found));
        }
        FoundMarker::Absent => {}
    }
    let link = pgdata.join(TABLESPACE_LINKS).join(tablespace.oid.to_string());
    let is_linked = link.is_symlink()
        && fs::canonicalize(&link)
            .is_ok_and(|there| fs::canonicalize(place).is_ok_and(|p| p == there));
    if is_linked { Ok(()) } else { check_empty(place, false) }
}

/// Refuses when segments wait in `pg_wal` to be archived: they may be nowhere else. Where that is a
/// link, only the link goes.
fn check_wal_is_archived(pgdata: &Path) -> Result<(), TreeError> {
    let wal = pgdata.join("pg_wal");
    let is_directory = |path: &Path| fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir());
    let status = wal.join("archive_status");
    if !is_directory(&wal) || !is_directory(&status) {
        return Ok(());
    }
    let listing = fs::read_dir(&status).map_err(|e| DiskError::new("list", &status, e))?;
    let mut found = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|e| DiskError::new("list", &status, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(file) = name.strip_suffix(".ready")
            && wal.join(file).exists()
        {
            found.push(file.to_owned());
        }
    }
    found.sort_unstable();
    if found.is_empty() {
        return Ok(());
    }
    let more = found.len() > FOUND_NAMES_MAX;
    found.truncate(FOUND_NAMES_MAX);
    Err(TreeError::UnarchivedWal { path: wal, found, more })
}

/// Returns whether any file stands in `pg_wal` of a data directory.
pub fn holds_wal(pgdata: &Path) -> bool {
    let listing = fs::read_dir(pgdata.join("pg_wal"));
    let is_file = |entry: fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
    listing.is_ok_and(|listing| listing.flatten().any(is_file))
}

/// Removes what stands at `path`, whatever it is; of a link only the link.
pub(super) fn remove_any(path: &Path) -> Result<(), DiskError> {
    match fs::symlink_metadata(path) {
        Ok(facts) if facts.is_dir() => {
            fs::remove_dir_all(path).map_err(|e| DiskError::new("remove", path, e))
        }
        Ok(_) => remove_if_there(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(DiskError::new("read", path, e)),
    }
}

/// Removes the control file, which ends a cluster until another is put there. `global` must be
/// a directory, not a link.
pub(super) fn retire_control(pgdata: &Path) -> Result<(), DiskError> {
    let control = pgdata.join(CONTROL_FILE);
    remove_any(&control)?;
    super::disk::sync_directory(super::disk::parent_of(&control))
}

/// Makes room for a directory: returns true if one stands, else nothing does any more.
pub(super) fn keeps_directory(path: &Path) -> Result<bool, DiskError> {
    let stands = fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir());
    if !stands {
        tell_of_link(path, "a directory");
        remove_any(path)?;
    }
    Ok(stands)
}

/// Makes room for a link: returns true if the very same stands, else nothing does any more.
pub(super) fn keeps_link(link: &Path, target: &Path) -> Result<bool, DiskError> {
    let stands = fs::read_link(link).is_ok_and(|found| found == target);
    if !stands {
        remove_any(link)?;
    }
    Ok(stands)
}

/// Opens a plain file for writing, or makes room for a new one.
pub(super) fn keep_file(path: &Path) -> Result<Option<File>, DiskError> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).custom_flags(plain_only()).open(path);
    if let Ok(file) = opened
        && file.metadata().is_ok_and(|facts| is_plain(&facts))
    {
        return Ok(Some(file));
    }
    tell_of_link(path, "a file");
    remove_any(path)?;
    Ok(None)
}

/// Says that a link of the operator's is replaced; what it leads to stays.
fn tell_of_link(path: &Path, by: &str) {
    if let Ok(target) = fs::read_link(path) {
        tracing::warn!(
            "the link {} is replaced by {by}, as the backup has one there; {} was left as it is",
            path.display(),
            target.display()
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
