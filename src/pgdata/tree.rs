//! Building a data directory, so that half of one can never start.
//!
//! Owns: the order of a restore on disk, directories, files, tablespace links,
//! owners and modes. Never here: where the bytes come from.
//!
//! ```text
//! NewTree::open           directories and links made, a marker in each
//!   create_directory
//!   create_file           -> NewFile: write_at ..., finish (mode, time, fsync)
//! NewTree::sync_all       every directory fsynced -> SyncedTree
//! SyncedTree::publish_control
//!                         markers removed, fsync, global/pg_control renamed into
//!                         place, fsync: from here on it is a cluster
//! ```
//!
//! Every file is fsynced through the descriptor that wrote it, when it is
//! finished. The faster ways are not safe: a file opened again for a pass at the
//! end, or a `syncfs`, may miss a write error that the kernel has already
//! dropped together with the page (Linux keeps it per descriptor since 4.13, and
//! tells `syncfs` only since 5.8). Restores finish many files side by side
//! ([`Finisher`](super::Finisher)), which lets the file system join their journal commits.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustix::fs::FallocateFlags;

use super::disk::{DiskError, Owner, parent_of, sync_directory};
use super::places::{CONTROL_FILE, Places, TABLESPACE_LINKS};
use super::restore_marker::{HeldMarker, RestoreMarker};
use super::staged::{Durability, Existing, StagedFile};
use super::takeover;
use super::tree_plan::{Access, TreeError, TreePlan};

/// Zeros written at a time where no hole can be made.
const ZEROS_BYTES_MAX: usize = 64 << 10;

/// Files of at least this size get their blocks when they are made: in few pieces, though they are written in another
/// order than they are read.
const PREALLOCATED_FROM_BYTES: u64 = 1 << 20;

/// A data directory being built. Usable from several threads at once.
///
/// Dropped before [`SyncedTree::publish_control`] succeeded, it leaves what it
/// wrote and its markers: a directory that PostgreSQL cannot start in.
#[derive(Debug)]
pub struct NewTree {
    places: Places,
    /// Whether what stands is taken over; else nothing stood.
    takes_over: bool,
    access: Access,
    owner: Option<Owner>,
    /// The data directory's own is the first.
    markers: Vec<HeldMarker>,
    created_roots: Vec<PathBuf>,
    /// Every directory made or taken over, absolute. Few compared to files.
    directories: Mutex<BTreeSet<PathBuf>>,
    unfinished: Arc<AtomicUsize>,
}

/// What a file shall be like when it is finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileAttributes {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its permission bits; those of others than user, group and world are dropped.
    pub mode: u32,
    /// Its last change, unix seconds.
    pub mtime_unix: i64,
}

impl NewTree {
    /// Checks the plan and begins: makes the directories, puts `marker` into each,
    /// makes the tablespace links. Where a cluster is taken over, its control file is
    /// removed as soon as the markers are durable.
    ///
    /// Everything that [`TreePlan::check`] refuses is refused before anything is
    /// created. On a later error what was created stays, marked.
    pub fn open(plan: &TreePlan, marker: &RestoreMarker) -> Result<Self, TreeError> {
        let owner = plan.check()?;
        let mut tree = Self {
            places: Places::of(plan),
            takes_over: plan.take_over.is_some(),
            access: plan.access,
            owner,
            markers: Vec::new(),
            created_roots: Vec::new(),
            directories: Mutex::default(),
            unfinished: Arc::default(),
        };
        tree.open_root(&plan.pgdata, marker)?;
        for tablespace in &plan.tablespaces {
            tree.open_root(&tablespace.target, marker)?;
        }
        let pgdata = &tree.places.pgdata;
        if tree.takes_over {
            // The markers stand: from here on this is no cluster any more.
            tree.make_directories(pgdata, parent_of(&pgdata.join(CONTROL_FILE)))?;
            takeover::retire_control(pgdata)?;
        }
        let links = pgdata.join(TABLESPACE_LINKS);
        tree.make_directories(pgdata, &links)?;
        for (oid, target) in &tree.places.tablespaces {
            let link = links.join(oid);
            if tree.takes_over && takeover::keeps_link(&link, target)? {
                continue;
            }
            std::os::unix::fs::symlink(target, &link)
                .map_err(|e| DiskError::new("create the link", &link, e))?;
            if let Some(owner) = owner {
                owner.give_path(&link)?;
            }
        }
        Ok(tree)
    }

    /// Returns the directories that did not exist before, outermost first: the
    /// data directory, tablespace directories, and missing parents of these.
    pub fn created_roots(&self) -> &[PathBuf] {
        &self.created_roots
    }

    /// Removes what stands in a tree that is taken over and is not what `belongs` to it, and returns how many
    /// names that were; see [`Places::strangers`].
    pub fn remove_strangers(&self, belongs: &dyn Fn(&Path) -> bool) -> Result<u64, TreeError> {
        let mut removed = 0;
        self.places.strangers(belongs, &mut |stranger| {
            removed += 1;
            Ok(takeover::remove_any(&stranger.path)?)
        })?;
        Ok(removed)
    }

    /// Returns the owner that everything is given, where root builds the tree.
    pub fn owner(&self) -> Option<Owner> {
        self.owner
    }

    /// Makes a directory and its missing parents; one of this tree is given the mode.
    ///
    /// `path` is relative to the data directory. Below `pg_tblspc/<oid>` of a mapped
    /// tablespace it goes to that tablespace's place, and for `pg_tblspc/<oid>`
    /// itself there is nothing to do. The owner always keeps full access.
    pub fn create_directory(&self, path: &Path, mode: u32) -> Result<(), TreeError> {
        let (root, path) = self.places.place_of(path)?;
        if path == root {
            return Ok(());
        }
        self.make_directories(root, &path)?;
        Ok(set_mode(&path, (mode & 0o777) | 0o700)?)
    }

    /// Creates a file of the given size, all zeros.
    ///
    /// Zeros need not be written. A small file has no blocks before it is written to; a larger one gets them here where
    /// the file system can, and what is zero gives them back ([`NewFile::clear`]). So a full
    /// disk shows when data is written, not here, and PostgreSQL needs space later
    /// when it fills a hole; compare [`free_bytes`](super::disk::free_bytes)
    /// with the size of the whole cluster beforehand.
    ///
    /// `path` is mapped as by [`create_directory`](Self::create_directory), and
    /// missing parents are made. A file of that name, or a link, is an error:
    /// nothing is ever overwritten or followed.
    ///
    /// In a tree that is taken over, a plain file of that name keeps its content as far as the
    /// size goes ([`NewFile::is_kept`]), and anything else is removed first.
    pub fn create_file(
        &self,
        path: &Path,
        attributes: FileAttributes,
    ) -> Result<NewFile, TreeError> {
        let (root, path) = self.places.place_of(path)?;
        self.make_directories(root, parent_of(&path))?;
        let kept = if self.takes_over { takeover::keep_file(&path)? } else { None };
        let is_kept = kept.is_some();
        let file = match kept {
            Some(file) => file,
            // `create_new` is O_CREAT with O_EXCL, which does not follow a link either.
            None => OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(|e| DiskError::new("create", &path, e))?,
        };
        self.unfinished.fetch_add(1, Ordering::SeqCst);
        let mut new = NewFile {
            file,
            path,
            is_kept,
            is_preallocated: false,
            attributes,
            owner: self.owner,
            unfinished: Arc::clone(&self.unfinished),
        };
        if !is_kept && attributes.size_bytes >= PREALLOCATED_FROM_BYTES {
            // Not every file system can, and one that is nearly full may still have room for what is not zeros.
            new.is_preallocated =
                rustix::fs::fallocate(&new.file, FallocateFlags::empty(), 0, attributes.size_bytes)
                    .is_ok();
        }
        let size_bytes = if is_kept { new.facts()?.len() } else { 0 };
        if attributes.size_bytes != size_bytes {
            new.file
                .set_len(attributes.size_bytes)
                .map_err(|e| DiskError::new("set the size of", &new.path, e))?;
        }
        Ok(new)
    }

    /// Writes a whole file that is in memory, and finishes it.
    ///
    /// For `backup_label`, `tablespace_map` and the like.
    pub fn write_file(
        &self,
        path: &Path,
        bytes: &[u8],
        mode: u32,
        mtime_unix: i64,
    ) -> Result<(), TreeError> {
        let size_bytes = bytes.len() as u64;
        let file = self.create_file(path, FileAttributes { size_bytes, mode, mtime_unix })?;
        file.write_at(bytes, 0)?;
        file.finish()
    }

    /// Makes every name in every directory of the tree durable.
    ///
    /// Refused while a file is unfinished, also one that was given up: then the
    /// tree is not whole and must not become a cluster.
    pub fn sync_all(self) -> Result<SyncedTree, TreeError> {
        let count = self.unfinished.load(Ordering::SeqCst);
        if count > 0 {
            return Err(TreeError::Unfinished { count });
        }
        // A directory's own name stands in its parent.
        for created in &self.created_roots {
            sync_directory(parent_of(created))?;
        }
        for directory in self.directories.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            sync_directory(directory)?;
        }
        Ok(SyncedTree { tree: self })
    }

    /// Makes or takes over the data directory or a tablespace's, and marks it.
    fn open_root(&mut self, root: &Path, marker: &RestoreMarker) -> Result<(), TreeError> {
        let missing: Vec<&Path> = root.ancestors().take_while(|p| !p.exists()).collect();
        for directory in missing.into_iter().rev() {
            // Parents must let the server's user through, whatever our umask is.
            let mode = if directory == root { self.access.directory_mode() } else { 0o755 };
            make_directory(directory, mode, self.owner)?;
            self.created_roots.push(directory.to_owned());
        }
        self.markers.push(if self.takes_over {
            HeldMarker::take(root, marker, self.owner)?
        } else {
            HeldMarker::create(root, marker, self.owner)?
        });
        if let Some(owner) = self.owner {
            owner.give_path(&fs::canonicalize(root).unwrap_or_else(|_| root.to_owned()))?;
        }
        set_mode(root, self.access.directory_mode())?;
        sync_directory(root)?;
        let directories = self.directories.get_mut().unwrap_or_else(PoisonError::into_inner);
        directories.insert(root.to_owned());
        Ok(())
    }

    /// Makes `directory` and what is missing between it and `root`, so that every
    /// directory written to is one of ours and never a link someone put there.
    fn make_directories(&self, root: &Path, directory: &Path) -> Result<(), DiskError> {
        let mut known = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        let mut current = root.to_owned();
        for name in directory.strip_prefix(root).unwrap_or(Path::new("")).components() {
            current.push(name);
            if !known.contains(&current) {
                let mode = self.access.directory_mode();
                if self.takes_over && takeover::keeps_directory(&current)? {
                    adopt_directory(&current, mode, self.owner)?;
                } else {
                    make_directory(&current, mode, self.owner)?;
                }
                known.insert(current.clone());
            }
        }
        Ok(())
    }
}

/// A file of a [`NewTree`], to be written in any order, from several threads.
///
/// One dropped without [`finish`](Self::finish) keeps the tree from becoming a cluster.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    path: PathBuf,
    is_kept: bool,
    is_preallocated: bool,
    attributes: FileAttributes,
    owner: Option<Owner>,
    unfinished: Arc<AtomicUsize>,
}

impl NewFile {
    /// Returns where the file is, after tablespace mapping.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes all of `bytes` from byte `offset` on; never past the file's size.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), TreeError> {
        let size_bytes = self.attributes.size_bytes;
        let end = offset.saturating_add(bytes.len() as u64);
        if end > size_bytes {
            return Err(TreeError::BeyondEnd { path: self.path.clone(), size_bytes, end });
        }
        self.file
            .write_all_at(bytes, offset)
            .map_err(|e| DiskError::new("write", &self.path, e).into())
    }

    /// Reads exactly `bytes.len()` bytes from byte `offset` on, as they were written.
    ///
    /// # Errors
    /// [`TreeError::Disk`], also where the file ends before that.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), TreeError> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|e| DiskError::new("read", &self.path, e).into())
    }

    /// Returns whether the file stood already, with content that was kept. What of it lies behind its old end,
    /// and every byte of a file that did not stand, is zero.
    pub fn is_kept(&self) -> bool {
        self.is_kept
    }

    /// Makes bytes zero, of which as much as can be given back to the disk becomes a hole.
    pub fn clear(&self, offset: u64, bytes: u64) -> Result<(), TreeError> {
        if !(self.is_kept || self.is_preallocated) || bytes == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, hole, offset, bytes).is_ok() {
            return Ok(());
        }
        // Not every file system can; if something else was wrong, writing says so.
        let zeros = vec![0; usize::try_from(bytes).unwrap_or(ZEROS_BYTES_MAX).min(ZEROS_BYTES_MAX)];
        let mut done = 0;
        while done < bytes {
            let now = zeros.len().min(usize::try_from(bytes - done).unwrap_or(ZEROS_BYTES_MAX));
            self.write_at(&zeros[..now], offset + done)?;
            done += now as u64;
        }
        Ok(())
    }

    /// Sets owner, mode and time, and makes the content durable.
    pub fn finish(self) -> Result<(), TreeError> {
        let path = self.path.as_path();
        let failed = |action| move |e| DiskError::new(action, path, e);
        let facts = self.facts()?;
        if let Some(owner) = self.owner
            && (facts.uid(), facts.gid()) != (owner.uid, owner.gid)
        {
            owner.give_file(&self.file, &self.path)?;
        }
        let mode = self.attributes.mode & 0o777;
        // Of a file that is right already nothing is changed, which makes its fsync cheap.
        if facts.mode() & 0o7777 != mode {
            let mode = fs::Permissions::from_mode(mode);
            self.file.set_permissions(mode).map_err(failed("set the mode of"))?;
        }
        if facts.mtime() != self.attributes.mtime_unix
            && let Some(time) = system_time(self.attributes.mtime_unix)
        {
            let times = FileTimes::new().set_accessed(time).set_modified(time);
            self.file.set_times(times).map_err(failed("set the time of"))?;
        }
        self.file.sync_all().map_err(failed("fsync"))?;
        self.unfinished.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn facts(&self) -> Result<fs::Metadata, DiskError> {
        self.file.metadata().map_err(|e| DiskError::new("read", &self.path, e))
    }
}

/// A tree in which everything but the control file is durable.
#[derive(Debug)]
pub struct SyncedTree {
    tree: NewTree,
}

impl SyncedTree {
    /// Turns the tree into a cluster: writes `global/pg_control`, the last file.
    ///
    /// `backup_label` and a signal file must be there, for without them PostgreSQL
    /// would start from a wrong checkpoint, or on the source's own timeline. Until
    /// this returns `Ok` a start fails for want of the control file, with one
    /// exception: if only the very last fsync failed, the file is there, and may be
    /// gone after a power cut.
    pub fn publish_control(self, control: &[u8]) -> Result<(), TreeError> {
        let tree = self.tree;
        let require = |names: &[&str]| {
            let there = names.iter().any(|name| tree.places.pgdata.join(name).is_file());
            let path = tree.places.pgdata.join(names.last().unwrap_or(&""));
            if there { Ok(()) } else { Err(TreeError::Incomplete { path }) }
        };
        require(&["backup_label"])?;
        require(&["standby.signal", "recovery.signal"])?;

        let mut staged = StagedFile::create(&tree.places.pgdata.join(CONTROL_FILE))?;
        staged.append(control)?;
        staged.set_mode(tree.access.file_mode())?;
        if let Some(owner) = tree.owner {
            staged.set_owner(owner)?;
        }
        staged.sync()?;

        // The markers go first: one that stood beside a control file would call a
        // cluster a dead restore. The data directory's own goes last of them.
        for marker in tree.markers.into_iter().rev() {
            marker.remove()?;
        }
        for root in tree.places.tablespaces.values().chain([&tree.places.pgdata]) {
            sync_directory(root)?;
        }
        staged.publish(Durability::Fsync, Existing::Refuse)?;
        Ok(())
    }
}

/// Makes one directory. An existing one is an error: it is not ours.
fn make_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), DiskError> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(|e| DiskError::new("create the directory", path, e))?;
    adopt_directory(path, mode, owner)
}

/// Gives a directory its owner and mode.
fn adopt_directory(path: &Path, mode: u32, owner: Option<Owner>) -> Result<(), DiskError> {
    if let Some(owner) = owner {
        owner.give_path(path)?;
    }
    set_mode(path, mode)
}

fn set_mode(path: &Path, mode: u32) -> Result<(), DiskError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .map_err(|e: io::Error| DiskError::new("set the mode of", path, e))
}

/// `None` for a time that the system cannot hold; such a file keeps today's.
fn system_time(unix: i64) -> Option<SystemTime> {
    let distance = Duration::from_secs(unix.unsigned_abs());
    if unix < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::pgdata::RESTORE_MARKER_NAME;
    use crate::pgdata::tree_plan::TablespaceTarget;
    use std::os::unix::fs::MetadataExt;

    fn owner() -> Option<Owner> {
        rustix::process::geteuid().is_root().then_some(Owner { uid: 65534, gid: 65533 })
    }

    fn plan(directory: &Path) -> TreePlan {
        TreePlan {
            pgdata: directory.join("deep/data"),
            tablespaces: vec![TablespaceTarget {
                oid: 16400,
                original: "/mnt/fast".into(),
                target: directory.join("fast"),
            }],
            access: Access::Owner,
            owner: owner(),
            take_over: None,
        }
    }

    fn open(directory: &Path) -> NewTree {
        let marker = RestoreMarker { backup: "b1".into(), started: "then".into(), took_over: None };
        NewTree::open(&plan(directory), &marker).unwrap()
    }

    fn attributes(size_bytes: u64) -> FileAttributes {
        FileAttributes { size_bytes, mode: 0o640, mtime_unix: 1_000_000_000 }
    }

    /// All that `publish_control` wants to see.
    fn complete(tree: &NewTree) {
        for name in ["backup_label", "recovery.signal", "global/pg_filenode.map"] {
            tree.write_file(Path::new(name), b"x", 0o600, 0).unwrap();
        }
    }

    fn refused(result: Result<impl std::fmt::Debug, TreeError>) -> TreeError {
        result.unwrap_err()
    }

    #[test]
    fn finished_tree_has_every_file_with_its_bytes_mode_time_and_owner() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        assert_eq!(
            tree.created_roots(),
            [dir.path().join("deep"), dir.path().join("deep/data"), dir.path().join("fast")]
        );
        tree.create_directory(Path::new("pg_wal/archive_status"), 0o700).unwrap();
        let file = tree.create_file(Path::new("./base/5/1259"), attributes(8192)).unwrap();
        file.write_at(b"end", 8189).unwrap();
        file.write_at(b"start", 0).unwrap();
        file.finish().unwrap();
        complete(&tree);
        tree.sync_all().unwrap().publish_control(b"control").unwrap();

        let data = dir.path().join("deep/data");
        let bytes = fs::read(data.join("base/5/1259")).unwrap();
        assert_eq!((bytes.len(), &bytes[..5], &bytes[8189..]), (8192, &b"start"[..], &b"end"[..]));
        assert!(bytes[5..8189].iter().all(|b| *b == 0));
        let facts = fs::metadata(data.join("base/5/1259")).unwrap();
        assert_eq!((facts.mode() & 0o7777, facts.mtime()), (0o640, 1_000_000_000));
        assert!(data.join("pg_wal/archive_status").is_dir());
        assert_eq!(fs::read(data.join("global/pg_control")).unwrap(), b"control");
        assert_eq!(fs::metadata(&data).unwrap().mode() & 0o7777, 0o700);
        if let Some(owner) = owner() {
            for name in ["", "base", "base/5/1259", "pg_tblspc/16400", "global/pg_control"] {
                let facts = fs::symlink_metadata(data.join(name)).unwrap();
                assert_eq!((facts.uid(), facts.gid()), (owner.uid, owner.gid), "{name}");
            }
        }
        let global: Vec<_> = fs::read_dir(data.join("global")).unwrap().collect();
        assert_eq!(global.len(), 2, "a temporary file is left");
        for root in [&data, &dir.path().join("fast")] {
            assert!(!root.join(RESTORE_MARKER_NAME).exists());
        }
    }

    #[test]
    fn tablespace_files_go_to_their_mapped_place_and_the_link_points_there() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        let fast = dir.path().join("fast");
        tree.create_directory(Path::new("pg_tblspc/16400"), 0o700).unwrap();
        tree.create_directory(Path::new("pg_tblspc/16400/PG_18_202506291/5"), 0o700).unwrap();
        tree.write_file(Path::new("pg_tblspc/16400/PG_18_202506291/5/9"), b"t", 0o600, 0).unwrap();
        // An in-place tablespace is an ordinary directory.
        tree.write_file(Path::new("pg_tblspc/16401/PG_18_202506291/5/9"), b"i", 0o600, 0).unwrap();

        assert_eq!(fs::read(fast.join("PG_18_202506291/5/9")).unwrap(), b"t");
        let data = dir.path().join("deep/data");
        assert_eq!(fs::read_link(data.join("pg_tblspc/16400")).unwrap(), fast);
        assert_eq!(fs::read(data.join("pg_tblspc/16400/PG_18_202506291/5/9")).unwrap(), b"t");
        assert!(fs::symlink_metadata(data.join("pg_tblspc/16401")).unwrap().is_dir());
    }

    #[test]
    fn dropped_tree_is_a_dead_restore_without_control_file() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        complete(&tree);
        assert!(matches!(plan(dir.path()).check(), Err(TreeError::RestoreRunning { .. })));
        drop(tree.sync_all().unwrap());
        assert!(!dir.path().join("deep/data/global/pg_control").exists());
        let error = refused(plan(dir.path()).check());
        assert!(error.to_string().contains("restore of backup b1 that did not finish"), "{error}");

        // The tablespace directory tells the same when only that is left.
        fs::remove_dir_all(dir.path().join("deep")).unwrap();
        let error = refused(plan(dir.path()).check());
        let fast = dir.path().join("fast");
        assert!(matches!(error, TreeError::DeadRestore { path, .. } if path == fast));
    }

    #[test]
    fn tree_with_an_unfinished_file_never_becomes_a_cluster() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        complete(&tree);
        drop(tree.create_file(Path::new("base/1/1"), attributes(1)).unwrap());
        assert!(matches!(refused(tree.sync_all()), TreeError::Unfinished { count: 1 }));
    }

    #[test]
    fn control_file_waits_for_backup_label_and_signal_file() {
        for missing in ["backup_label", "recovery.signal"] {
            let dir = tempfile::tempdir().unwrap();
            let tree = open(dir.path());
            complete(&tree);
            let path = dir.path().join("deep/data").join(missing);
            fs::remove_file(&path).unwrap();
            let error = refused(tree.sync_all().unwrap().publish_control(b"c"));
            assert!(matches!(error, TreeError::Incomplete { path: p } if p == path));
            assert!(!dir.path().join("deep/data/global/pg_control").exists());
            assert!(dir.path().join("deep/data").join(RESTORE_MARKER_NAME).exists());
        }
    }

    #[test]
    fn names_from_outside_cannot_leave_the_tree_or_take_reserved_places() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        let create = |path: &str| refused(tree.create_file(Path::new(path), attributes(0)));
        for path in ["/etc/x", "../x", "base/../../x", "pg_tblspc/16400/../x", ""] {
            assert!(matches!(create(path), TreeError::UnsafePath(_)), "{path}");
        }
        for path in [
            "global/pg_control",
            "./global//pg_control",
            RESTORE_MARKER_NAME,
            "pg_tblspc/16400/highwater-restore-in-progress",
        ] {
            assert!(matches!(create(path), TreeError::HeldBack { .. }), "{path}");
        }
    }

    #[test]
    fn planted_links_are_neither_followed_nor_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        let data = dir.path().join("deep/data");
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, data.join("base")).unwrap();
        std::os::unix::fs::symlink(outside.join("x"), data.join("PG_VERSION")).unwrap();
        for path in ["base/x", "PG_VERSION"] {
            let error = refused(tree.create_file(Path::new(path), attributes(0)));
            assert!(matches!(error, TreeError::Disk(DiskError::Exists { .. })), "{error}");
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn same_file_twice_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        tree.write_file(Path::new("a/b"), b"1", 0o600, 0).unwrap();
        let error = refused(tree.write_file(Path::new("a/b"), b"2", 0o600, 0));
        assert!(matches!(error, TreeError::Disk(DiskError::Exists { .. })));
        assert_eq!(fs::read(dir.path().join("deep/data/a/b")).unwrap(), b"1");
    }

    #[test]
    fn nothing_is_written_past_the_size_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        let file = tree.create_file(Path::new("f"), attributes(10)).unwrap();
        file.write_at(&[1; 10], 0).unwrap();
        for (bytes, offset) in [(1, 10), (2, 9), (1, u64::MAX)] {
            let error = refused(file.write_at(&vec![1; bytes], offset));
            assert!(matches!(error, TreeError::BeyondEnd { size_bytes: 10, .. }));
        }
        file.finish().unwrap();
        assert_eq!(fs::metadata(dir.path().join("deep/data/f")).unwrap().len(), 10);
    }

    #[test]
    fn zeros_take_no_space_once_they_are_known_to_be_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        let file = tree.create_file(Path::new("f"), attributes(64 << 20)).unwrap();
        file.write_at(&[1; 8192], 8192).unwrap();
        file.clear(64 << 10, (64 << 20) - (64 << 10)).unwrap();
        let path = file.path().to_owned();
        file.finish().unwrap();
        let facts = fs::metadata(&path).unwrap();
        assert_eq!(facts.len(), 64 << 20);
        let content = fs::read(path).unwrap();
        assert!(content[8192..16384] == [1; 8192] && content[16384..].iter().all(|b| *b == 0));
        assert!(facts.blocks() * 512 < 1 << 20, "{} blocks", facts.blocks());
    }

    #[test]
    fn group_access_of_the_source_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let plan = TreePlan { access: Access::Group, ..plan(dir.path()) };
        let tree = NewTree::open(&plan, &RestoreMarker::default()).unwrap();
        complete(&tree);
        tree.sync_all().unwrap().publish_control(b"c").unwrap();
        let mode = |name| fs::metadata(plan.pgdata.join(name)).unwrap().mode() & 0o7777;
        assert_eq!((mode("."), mode("global"), mode("global/pg_control")), (0o750, 0o750, 0o640));
    }

    #[test]
    fn times_before_1970_and_beyond_all_bounds_are_survived() {
        assert_eq!(system_time(-1), SystemTime::UNIX_EPOCH.checked_sub(Duration::from_secs(1)));
        let _ = system_time(i64::MAX);
        let _ = system_time(i64::MIN);
    }

    #[test]
    fn files_are_written_from_many_threads() {
        let dir = tempfile::tempdir().unwrap();
        let tree = open(dir.path());
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let tree = &tree;
                scope.spawn(move || {
                    for n in 0..10 {
                        let path = PathBuf::from(format!("base/{n}/{thread}"));
                        tree.write_file(&path, b"x", 0o600, 0).unwrap();
                    }
                });
            }
        });
        complete(&tree);
        tree.sync_all().unwrap().publish_control(b"c").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("deep/data/base/9")).unwrap().count(), 4);
    }
}
