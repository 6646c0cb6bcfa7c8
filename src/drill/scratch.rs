//! The directory of a drill: claimed, filled, and cleared away, by this drill or after its death.
//!
//! ```text
//! <scratch>/highwater-drill.json     whose it is; locked (`flock`) while the drill lives
//!           data/                    the restored data directory
//!           tablespaces/<oid>/       its tablespaces
//!           s/                       the server's socket; nobody else may enter
//!           *.conf, *.log, role.sql  the server's own settings, and what it says
//! ```
//!
//! Nothing is ever removed but these names, in a directory with that marker in it, which was empty when a drill
//! claimed it. No process is ever ended but a PostgreSQL server or one of this program whose working directory is
//! `data` of such a directory: a server has it as long as it lives, and nobody else's is there.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use crate::pgdata::{DiskError, Owner};

const MARKER: &str = "highwater-drill.json";

/// Everything that a drill makes beside its marker.
const OWN_NAMES: [&str; 9] = [
    "data",
    "tablespaces",
    "s",
    "postgresql.conf",
    "pg_hba.conf",
    "pg_ident.conf",
    "role.sql",
    "server.log",
    "tools.log",
];

/// The longest path of a socket (`sun_path` of 108 bytes, with its NUL).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// How long a server that is told to stop at once may take; PostgreSQL itself kills its children after 5 s.
const STOP_MAX: Duration = Duration::from_secs(30);

/// How long removing is tried again while somebody still writes there.
const REMOVE_MAX: Duration = Duration::from_secs(15);

/// The pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// How often a marker that goes away while it is being locked is looked for again.
const CLAIM_ATTEMPTS: u32 = 10;

/// A marker is never longer.
const MARKER_BYTES_MAX: u64 = 4 << 10;

/// Why a directory cannot be used, or not be cleared.
#[derive(Debug, thiserror::Error)]
pub(super) enum ScratchError {
    #[error("`{}` is, or lies in, the data directory `{}`", root.display(), pgdata.display())]
    InDataDirectory { root: PathBuf, pgdata: PathBuf },
    #[error("`{}` is not empty, and no drill has made what is in it (`{name}`)", root.display())]
    NotEmpty { root: PathBuf, name: String },
    #[error("another drill is at work in `{}`", root.display())]
    InUse { root: PathBuf },
    #[error("the path of a socket in `{}` would have {bytes} bytes; the system takes {SOCKET_PATH_BYTES_MAX}", root.display())]
    TooLong { root: PathBuf, bytes: usize },
    #[error("the server of an earlier drill in `{}` (process {pid}) does not end", root.display())]
    StillRunning { root: PathBuf, pid: u32 },
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What the marker says.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Marker {
    /// The drill's process.
    pid: u32,
    /// When it began.
    started: String,
    /// Whether it made the directory, which then goes with it.
    made: bool,
}

/// A claimed directory.
#[derive(Debug)]
pub(super) struct Scratch {
    root: PathBuf,
    marker: File,
    made: bool,
    owner: Option<Owner>,
    /// What an earlier drill had left here and was cleared away.
    pub(super) had_remains: bool,
}

impl Scratch {
    /// Claims a directory: new or empty, or with what a drill that died has left, which is cleared away first,
    /// its server too. `owner`: whose everything shall be, where root does this.
    ///
    /// # Errors
    /// [`ScratchError`]; nothing of anybody else is changed.
    pub(super) fn claim(
        root: &Path,
        owner: Option<Owner>,
        started: &str,
    ) -> Result<Self, ScratchError> {
        check_place(root)?;
        let mut made = false;
        if !root.exists() {
            DirBuilder::new()
                .mode(0o700)
                .create(root)
                .map_err(|error| DiskError::new("create", root, error))?;
            made = true;
            if let Some(Owner { uid, gid }) = owner {
                give(root, uid, gid)?;
            }
        }
        let root = fs::canonicalize(root).map_err(|e| DiskError::new("look at", root, e))?;
        check_place(&root)?;
        let socket_bytes = socket_path(&root).as_os_str().len();
        if socket_bytes > SOCKET_PATH_BYTES_MAX {
            if made {
                let _ = fs::remove_dir(&root);
            }
            return Err(ScratchError::TooLong { root, bytes: socket_bytes });
        }
        let (marker, left) = lock_marker(&root)?;
        let mut scratch = Self { made, owner, had_remains: left.is_some(), marker, root };
        if let Some(left) = left {
            scratch.made |= left.made;
            scratch.clear()?;
        }
        let said =
            Marker { pid: std::process::id(), started: started.to_owned(), made: scratch.made };
        scratch.write_marker(&said)?;
        Ok(scratch)
    }

    fn write_marker(&mut self, said: &Marker) -> Result<(), DiskError> {
        let path = self.root.join(MARKER);
        let failed = |error| DiskError::new("write", &path, error);
        let text = serde_json::to_vec(said).map_err(|error| failed(io::Error::other(error)))?;
        self.marker.set_len(0).map_err(failed)?;
        self.marker.write_all(&text).and_then(|()| self.marker.sync_all()).map_err(failed)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub(super) fn socket_directory(&self) -> PathBuf {
        self.root.join("s")
    }

    pub(super) fn tablespace(&self, oid: u32) -> PathBuf {
        self.root.join("tablespaces").join(oid.to_string())
    }

    /// Makes the directories that restore and server need.
    pub(super) fn make_directories(&self) -> Result<(), DiskError> {
        for name in ["data", "tablespaces", "s"] {
            let path = self.root.join(name);
            let made = DirBuilder::new().mode(0o700).create(&path);
            made.map_err(|error| DiskError::new("create", &path, error))?;
            self.give(&path)?;
        }
        Ok(())
    }

    /// Writes a file that the server reads.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), DiskError> {
        let path = self.root.join(name);
        self.write_at(&path, text.as_bytes())
    }

    /// The same at any path below it.
    pub(super) fn write_at(&self, path: &Path, bytes: &[u8]) -> Result<(), DiskError> {
        let mut file = self.open(path)?;
        file.set_len(0)
            .and_then(|()| file.write_all(bytes))
            .map_err(|error| DiskError::new("write", path, error))
    }

    /// Opens a file for what a program says; it is made if need be, and added to.
    pub(super) fn open(&self, path: &Path) -> Result<File, DiskError> {
        let mut options = OpenOptions::new();
        let file = options.append(true).create(true).mode(0o600).open(path);
        let file = file.map_err(|error| DiskError::new("create", path, error))?;
        self.give(path)?;
        Ok(file)
    }

    fn give(&self, path: &Path) -> Result<(), DiskError> {
        self.owner.map_or(Ok(()), |Owner { uid, gid }| give(path, uid, gid))
    }

    /// Ends every process that works here and removes everything but the marker.
    pub(super) fn clear(&self) -> Result<(), ScratchError> {
        stop_all(&self.root)?;
        remove_own(&self.root)?;
        Ok(())
    }

    /// Ends every process that works here, clears the directory, and gives it up; it goes too if a drill made it.
    pub(super) fn remove(self) -> Result<(), ScratchError> {
        self.clear()?;
        let marker = self.root.join(MARKER);
        fs::remove_file(&marker).map_err(|error| DiskError::new("remove", &marker, error))?;
        if self.made {
            // Whoever has put something of their own there meanwhile keeps it.
            let _ = fs::remove_dir(&self.root);
        }
        Ok(())
    }

    /// Ends every process that works here and leaves the files to the user: the directory is no drill's any more.
    pub(super) fn leave(self) -> Result<(), ScratchError> {
        stop_all(&self.root)?;
        let marker = self.root.join(MARKER);
        fs::remove_file(&marker).map_err(|error| DiskError::new("remove", &marker, error))?;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Closing is not enough at once: a child that is just being started shares the lock until its exec.
        let _ = self.marker.unlock();
    }
}

/// Clears what the drill in `root` has left, once it is dead; waits up to `patience` for that. With `keep` its
/// files stay. Nothing is done where there is no drill's marker.
pub(super) fn clear_after(root: &Path, keep: bool, patience: Duration) -> Result<(), ScratchError> {
    let until = Instant::now() + patience;
    while root.join(MARKER).exists() {
        match lock_marker(root) {
            Ok((marker, left)) => {
                let made = left.is_some_and(|left| left.made);
                let root = root.to_owned();
                let scratch = Scratch { root, marker, made, owner: None, had_remains: true };
                return if keep { scratch.leave() } else { scratch.remove() };
            }
            Err(ScratchError::InUse { .. }) if Instant::now() < until => {
                std::thread::sleep(LOOK_PAUSE);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Refuses a directory in which, or above which, a cluster's files are.
fn check_place(root: &Path) -> Result<(), ScratchError> {
    let holds_cluster = |place: &Path| {
        // A tablespace's own directory: PG_18_202506291.
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let of_tablespace = name.strip_prefix("PG_").and_then(|rest| rest.split_once('_'));
        let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        of_tablespace.is_some_and(|(major, catalog)| is_number(major) && is_number(catalog))
            || place.join("PG_VERSION").exists()
    };
    match root.ancestors().find(|place| holds_cluster(place)) {
        None => Ok(()),
        Some(pgdata) => {
            Err(ScratchError::InDataDirectory { root: root.to_owned(), pgdata: pgdata.to_owned() })
        }
    }
}

/// Locks the marker in `root`, which is made in an empty directory. Returns what stood in it, if one did: then its
/// drill is dead.
fn lock_marker(root: &Path) -> Result<(File, Option<Marker>), ScratchError> {
    let path = root.join(MARKER);
    for _ in 0..CLAIM_ATTEMPTS {
        let is_new = !path.exists();
        if is_new {
            check_empty(root)?;
        }
        let mut options = OpenOptions::new();
        options.read(true).append(true).create_new(is_new).mode(0o600);
        let file = match options.open(&path) {
            Ok(file) => file,
            // It came, or went, between the two.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(DiskError::new("open", &path, error).into()),
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(ScratchError::InUse { root: root.to_owned() });
            }
            Err(TryLockError::Error(error)) => {
                return Err(DiskError::new("lock", &path, error).into());
            }
        }
        let links = file.metadata().map_err(|e| DiskError::new("look at", &path, e))?.nlink();
        if links == 0 {
            continue;
        }
        if is_new {
            return Ok((file, None));
        }
        let mut text = Vec::new();
        let read = io::Read::read_to_end(&mut io::Read::take(&file, MARKER_BYTES_MAX), &mut text);
        read.map_err(|error| DiskError::new("read", &path, error))?;
        // A drill that died while it wrote has made nothing yet.
        return Ok((file, Some(serde_json::from_slice(&text).unwrap_or_default())));
    }
    Err(ScratchError::InUse { root: root.to_owned() })
}

fn check_empty(root: &Path) -> Result<(), ScratchError> {
    let entries = fs::read_dir(root).map_err(|error| DiskError::new("list", root, error))?;
    for entry in entries {
        let entry = entry.map_err(|error| DiskError::new("list", root, error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // What comes between the two looks is another drill's marker.
        if name != MARKER {
            return Err(ScratchError::NotEmpty { root: root.to_owned(), name });
        }
    }
    Ok(())
}

fn socket_path(root: &Path) -> PathBuf {
    root.join("s").join(format!(".s.PGSQL.{}", crate::plan::drill::DRILL_PORT))
}

fn give(path: &Path, uid: u32, gid: u32) -> Result<(), DiskError> {
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .map_err(|error| DiskError::new("change the owner of", path, error))
}

/// Removes what a drill makes. Links are removed and not followed.
fn remove_own(root: &Path) -> Result<(), DiskError> {
    let until = Instant::now() + REMOVE_MAX;
    for name in OWN_NAMES {
        let path = root.join(name);
        loop {
            let removed = match fs::symlink_metadata(&path) {
                Ok(facts) if facts.is_dir() => fs::remove_dir_all(&path),
                Ok(_) => fs::remove_file(&path),
                Err(error) => Err(error),
            };
            match removed {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !path.exists() => break,
                // Tasks that a drill has given up may still write.
                Err(_) if Instant::now() < until => std::thread::sleep(LOOK_PAUSE),
                Err(error) => return Err(DiskError::new("remove", &path, error)),
            }
        }
    }
    Ok(())
}

/// Ends every process of a drill in `root`: the server at once, without a checkpoint, and its children with it.
fn stop_all(root: &Path) -> Result<(), ScratchError> {
    let data = root.join("data");
    let began = Instant::now();
    loop {
        let there = processes_in(&data);
        let Some(first) = there.first() else { return Ok(()) };
        let age = began.elapsed();
        if age > STOP_MAX * 2 {
            return Err(ScratchError::StillRunning { root: root.to_owned(), pid: first.pid });
        }
        // The server ends its own children; each of them is told as well, for it may be dead already.
        for process in there {
            let signal = match process.is_server {
                _ if age > STOP_MAX => Signal::KILL,
                true => Signal::QUIT,
                false => Signal::TERM,
            };
            if let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
        std::thread::sleep(LOOK_PAUSE);
    }
}

/// A process of a drill.
#[derive(Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// PostgreSQL's; else this program's, as `restore_command` or what that has left behind.
    is_server: bool,
}

/// Returns the processes that are PostgreSQL's or this program's and work in `data`. Source: proc(5).
fn processes_in(data: &Path) -> Vec<Process> {
    let Ok(data) = fs::canonicalize(data) else { return Vec::new() };
    let own = fs::read_link("/proc/self/exe").unwrap_or_default();
    let process = |pid: u32| {
        let link = |name: &str| fs::read_link(format!("/proc/{pid}/{name}")).ok();
        (pid != std::process::id() && link("cwd")? == data).then_some(())?;
        let program = link("exe")?;
        // A program that was replaced meanwhile is called `…/highwater (deleted)`.
        let name = program.file_name()?.to_str()?.trim_end_matches(" (deleted)");
        let is_server = name == "postgres";
        (is_server || Some(name) == own.file_name()?.to_str()).then_some(Process { pid, is_server })
    };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.filter_map(|one| one.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter_map(process).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::Builder::new().prefix("hw-").tempdir_in("/tmp").unwrap();
        let root = dir.path().join("x");
        (dir, root)
    }

    fn claim(root: &Path) -> Result<Scratch, ScratchError> {
        Scratch::claim(root, None, "now")
    }

    #[test]
    fn a_new_directory_goes_with_the_drill_and_an_empty_one_stays_empty() {
        let (_dir, root) = place();
        let scratch = claim(&root).unwrap();
        scratch.make_directories().unwrap();
        scratch.write("pg_hba.conf", "x").unwrap();
        assert_eq!(fs::metadata(&root).unwrap().mode() & 0o777, 0o700);
        scratch.remove().unwrap();
        assert!(!root.exists());
        fs::create_dir(&root).unwrap();
        claim(&root).unwrap().remove().unwrap();
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    }

    #[test]
    fn one_drill_is_at_work_and_what_a_dead_one_left_is_cleared() {
        let (_dir, root) = place();
        let first = claim(&root).unwrap();
        first.make_directories().unwrap();
        assert!(matches!(claim(&root), Err(ScratchError::InUse { .. })));
        // Its process dies: the lock goes, the files stay.
        drop(first);
        fs::write(root.join("data/PG_VERSION"), "18").unwrap();
        fs::write(root.join("somebody's"), "x").unwrap();
        let second = claim(&root).unwrap();
        assert!(second.had_remains && !root.join("data").exists());
        second.remove().unwrap();
        assert_eq!(fs::read(root.join("somebody's")).unwrap(), b"x", "none of a drill's names");
    }

    #[test]
    fn what_is_somebody_elses_is_refused_and_left_alone() {
        let (dir, root) = place();
        fs::create_dir(&root).unwrap();
        fs::write(root.join("data"), "x").unwrap();
        assert!(matches!(claim(&root), Err(ScratchError::NotEmpty { .. })));
        assert_eq!(fs::read_dir(&root).unwrap().count(), 1);
        let pgdata = dir.path().join("pgdata");
        fs::create_dir_all(pgdata.join("base")).unwrap();
        fs::write(pgdata.join("PG_VERSION"), "18").unwrap();
        for inside in ["", "base", "base/new"] {
            let refused = claim(&pgdata.join(inside));
            assert!(matches!(refused, Err(ScratchError::InDataDirectory { .. })), "{inside}");
        }
        // By another name, too.
        std::os::unix::fs::symlink(pgdata.join("base"), dir.path().join("link")).unwrap();
        let refused = claim(&dir.path().join("link"));
        assert!(matches!(refused, Err(ScratchError::InDataDirectory { .. })));
        let tablespace = dir.path().join("PG_18_202506291");
        fs::create_dir(&tablespace).unwrap();
        let refused = claim(&tablespace.join("x"));
        assert!(matches!(refused, Err(ScratchError::InDataDirectory { .. })));
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_and_nothing_is_left() {
        let (dir, _) = place();
        let root = dir.path().join("x".repeat(100));
        assert!(matches!(claim(&root), Err(ScratchError::TooLong { .. })));
        assert!(!root.exists());
    }

    #[test]
    fn what_is_kept_is_no_drills_any_more() {
        let (_dir, root) = place();
        let scratch = claim(&root).unwrap();
        scratch.make_directories().unwrap();
        scratch.leave().unwrap();
        assert!(root.join("data").exists());
        assert!(matches!(claim(&root), Err(ScratchError::NotEmpty { .. })));
        clear_after(&root, false, Duration::ZERO).unwrap();
        assert!(root.join("data").exists(), "without a marker nothing is cleared");
    }

    #[test]
    fn after_a_drill_that_died_everything_goes_but_a_living_one_is_left_alone() {
        let (_dir, root) = place();
        let scratch = claim(&root).unwrap();
        scratch.make_directories().unwrap();
        let refused = clear_after(&root, false, Duration::ZERO);
        assert!(matches!(refused, Err(ScratchError::InUse { .. })));
        drop(scratch);
        clear_after(&root, false, Duration::ZERO).unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn links_out_of_the_directory_are_not_followed() {
        let (dir, root) = place();
        let scratch = claim(&root).unwrap();
        scratch.make_directories().unwrap();
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        fs::write(theirs.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(&theirs, root.join("data/link")).unwrap();
        scratch.remove().unwrap();
        assert!(theirs.join("file").exists() && !root.exists());
    }

    #[test]
    fn only_servers_and_this_program_count_as_processes_of_a_drill() {
        let (_dir, root) = place();
        fs::create_dir(&root).unwrap();
        let mut somebody =
            std::process::Command::new("sleep").arg("60").current_dir(&root).spawn().unwrap();
        assert_eq!(processes_in(&root), []);
        somebody.kill().unwrap();
        somebody.wait().unwrap();
    }
}
