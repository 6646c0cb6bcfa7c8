//! Facts about a data directory as it stands: is a server at work in it, which
//! version made it, will it recover, and its control file's bytes.
//!
//! Owns: reading `postmaster.pid`, `PG_VERSION`, the signal files and torn-prone
//! small files. Never here: what the bytes of `pg_control` mean, and any write.
//!
//! ```text
//! postmaster.pid, one value a line (src/include/utils/pidfile.h):
//!   1 pid (negative: a standalone backend)   5 first socket directory (may be empty)
//!   2 data directory                         6 first listen address (may be empty)
//!   3 start time, unix seconds               7 shared memory key
//!   4 port                                   8 status: starting, ready, standby, stopping
//! ```
//! A server that is starting has written only the first lines.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Pid;

use super::disk::DiskError;

/// Size of `global/pg_control`: `PG_CONTROL_FILE_SIZE` in `src/include/catalog/pg_control.h`.
pub const CONTROL_FILE_BYTES: u64 = 8192;

/// Largest `postmaster.pid` or `PG_VERSION` read; real ones have well under 4 KiB.
const SMALL_FILE_BYTES_MAX: u64 = 16 << 10;

/// What `postmaster.pid` says. Lines not written yet, or empty, are `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PostmasterPid {
    /// The process, always positive.
    pub pid: u32,
    /// True for a standalone backend (`postgres --single`, also run by `initdb`).
    pub standalone: bool,
    /// The data directory as the server was given it.
    pub data_directory: Option<PathBuf>,
    /// When the server started, unix seconds.
    pub started_unix: Option<i64>,
    /// The TCP port, which also names the socket file.
    pub port: Option<u16>,
    /// The first directory of `unix_socket_directories`.
    pub socket_directory: Option<PathBuf>,
    /// The first address listened on.
    pub listen_address: Option<String>,
    /// `starting`, `stopping`, `ready` (it takes connections), `standby` (for reading only).
    pub status: Option<String>,
}

/// `postmaster.pid` has no process id in its first line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the first line of postmaster.pid is not a process id: `{0}`")]
pub struct PostmasterPidError(pub String);

impl PostmasterPid {
    /// Parses the text of a `postmaster.pid`.
    pub fn parse(text: &str) -> Result<Self, PostmasterPidError> {
        let lines: Vec<&str> = text.lines().take(8).map(str::trim).collect();
        let line = |n: usize| lines.get(n).copied().filter(|l| !l.is_empty());
        let first = line(0).unwrap_or("");
        let bad = || PostmasterPidError(first.chars().take(40).collect());
        let signed: i32 = first.parse().map_err(|_| bad())?;
        if signed == 0 || signed == i32::MIN {
            return Err(bad());
        }
        Ok(Self {
            pid: signed.unsigned_abs(),
            standalone: signed < 0,
            data_directory: line(1).map(PathBuf::from),
            started_unix: line(2).and_then(|l| l.parse().ok()),
            port: line(3).and_then(|l| l.parse().ok()).filter(|p| *p != 0),
            socket_directory: line(4).map(PathBuf::from),
            listen_address: line(5).map(str::to_owned),
            status: line(7).map(str::to_owned),
        })
    }
}

/// Whether a server is at work in a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerState {
    /// No `postmaster.pid`.
    NoPidFile,
    /// The file is there, its process is not: the server died, or it runs on
    /// another host or in another container, which cannot be seen from here.
    Stale(PostmasterPid),
    /// A process of that number exists. It may have inherited the number from a
    /// dead server; only an operator can tell, so it counts as the server.
    Running(PostmasterPid),
    /// The file has no process id (cut off, or being written).
    Unreadable(PostmasterPidError),
}

/// Returns whether a server is at work in `pgdata`. A missing directory has none.
pub fn server_state(pgdata: &Path) -> Result<ServerState, DiskError> {
    let path = pgdata.join("postmaster.pid");
    let bytes = match read_at_most(&path, SMALL_FILE_BYTES_MAX) {
        Ok(bytes) => bytes,
        Err(DiskError::Missing { .. }) => return Ok(ServerState::NoPidFile),
        Err(e) => return Err(e),
    };
    Ok(match PostmasterPid::parse(&String::from_utf8_lossy(&bytes)) {
        Err(error) => ServerState::Unreadable(error),
        // Our own pid in the file was written by an earlier holder of the number,
        // as happens in containers; PostgreSQL's CreateLockFile reasons the same way.
        Ok(found) if found.pid != std::process::id() && process_is_alive(found.pid) => {
            ServerState::Running(found)
        }
        Ok(found) => ServerState::Stale(found),
    })
}

/// Returns whether a process of this number exists, whoever owns it.
///
/// Asks with signal 0 as PostgreSQL does; `/proc` may be hidden from other users.
pub fn process_is_alive(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return false };
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

/// Which signal files stand in a data directory; `standby.signal` wins when both do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SignalFiles {
    /// `recovery.signal`: archive recovery up to a target or the end of WAL.
    pub recovery: bool,
    /// `standby.signal`: standby mode, which does not end by itself.
    pub standby: bool,
}

/// Returns which signal files stand in `pgdata` (`.` for a `restore_command`,
/// which PostgreSQL runs in its data directory).
pub fn signal_files(pgdata: &Path) -> Result<SignalFiles, DiskError> {
    let there = |name| {
        let path = pgdata.join(name);
        path.try_exists().map_err(|e| DiskError::new("look for", &path, e))
    };
    Ok(SignalFiles { recovery: there("recovery.signal")?, standby: there("standby.signal")? })
}

/// Returns the process that exported the snapshot of this name, if its file stands in `pgdata`.
///
/// The file lives as long as the transaction that exported it (`ExportSnapshot` in
/// `src/backend/utils/time/snapmgr.c`), and its second line is `pid:<backend>`.
///
/// Errors: a directory that may not be looked into. A missing file or directory is `None`.
pub fn exported_snapshot(pgdata: &Path, name: &str) -> Result<Option<u32>, DiskError> {
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-') {
        return Ok(None);
    }
    let place = pgdata.join("pg_snapshots").join(name);
    let bytes = match read_at_most(&place, SMALL_FILE_BYTES_MAX) {
        Err(DiskError::Missing { .. }) => return Ok(None),
        read => read?,
    };
    let text = String::from_utf8_lossy(&bytes);
    Ok(text.lines().find_map(|line| line.strip_prefix("pid:")?.parse().ok()))
}

/// Why `PG_VERSION` gave no version.
#[derive(Debug, thiserror::Error)]
pub enum PgVersionError {
    /// The file could not be read; missing means this is no data directory.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The file holds something else than a major version.
    #[error("PG_VERSION does not hold a major version: `{0}`")]
    Malformed(String),
}

/// Returns the major version in `pgdata/PG_VERSION` (`14`, `18`).
pub fn major_version(pgdata: &Path) -> Result<u32, PgVersionError> {
    let bytes = read_at_most(&pgdata.join("PG_VERSION"), SMALL_FILE_BYTES_MAX)?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim();
    // Before 10 there were two parts, `9.6`; those have no place here.
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain
        .then(|| text.parse().ok())
        .flatten()
        .ok_or_else(|| PgVersionError::Malformed(text.chars().take(40).collect()))
}

/// Returns the bytes of `pgdata/global/pg_control`, at most [`CONTROL_FILE_BYTES`].
///
/// A running server may be writing them: use [`read_stable`] with a check of the
/// file's CRC unless the server is known to be down.
pub fn read_control_bytes(pgdata: &Path) -> Result<Vec<u8>, DiskError> {
    read_at_most(&pgdata.join("global/pg_control"), CONTROL_FILE_BYTES)
}

/// Why [`read_stable`] gave up.
#[derive(Debug, thiserror::Error)]
pub enum StableReadError<E: std::error::Error + 'static> {
    /// The file could not be read.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// No reading was accepted; this is what the last one was refused for.
    #[error(transparent)]
    Refused(E),
}

/// How often and how patiently [`read_stable`] reads again.
#[derive(Debug, Clone, Copy)]
pub struct Rereads {
    /// Readings in all; 0 counts as 1.
    pub attempts_max: u32,
    /// Pause between two readings.
    pub pause: Duration,
}

impl Rereads {
    /// Half a second in all, with the 10 ms pause of PostgreSQL's own reader
    /// (`get_controlfile` in `src/common/controldata_utils.c`).
    pub const DEFAULT: Self = Self { attempts_max: 50, pause: Duration::from_millis(10) };
}

/// Reads until `accept` takes what `read` returned, and returns what it made of it.
///
/// For small files that a server may be writing while we read. Blocks the
/// thread; at most `attempts_max` readings and the pauses between them.
pub fn read_stable<T, E: std::error::Error + 'static>(
    rereads: Rereads,
    mut read: impl FnMut() -> Result<Vec<u8>, DiskError>,
    mut accept: impl FnMut(&[u8]) -> Result<T, E>,
) -> Result<T, StableReadError<E>> {
    let mut attempt = 1;
    loop {
        match accept(&read()?) {
            Ok(value) => return Ok(value),
            Err(refused) if attempt >= rereads.attempts_max => {
                return Err(StableReadError::Refused(refused));
            }
            Err(_) => attempt += 1,
        }
        std::thread::sleep(rereads.pause);
    }
}

/// Reads a file, but never more than `bytes_max`; the rest is left out.
pub(super) fn read_at_most(path: &Path, bytes_max: u64) -> Result<Vec<u8>, DiskError> {
    let failed = |e| DiskError::new("read", path, e);
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(bytes_max).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;

    /// As PostgreSQL 18 wrote it.
    const PID_FILE: &str = "23120\n/var/lib/postgresql/18/main\n1795316420\n5432\n\
                            /run/postgresql\nlocalhost\n  3670030         0\nready   \n";

    /// Above Linux's largest possible pid (`PID_MAX_LIMIT`, 2^22).
    const DEAD_PID: u32 = 4_194_304 + 17;

    #[test]
    fn pid_file_of_a_running_server_is_read() {
        let found = PostmasterPid::parse(PID_FILE).unwrap();
        assert_eq!(found.pid, 23120);
        assert!(!found.standalone);
        assert_eq!(found.port, Some(5432));
        assert_eq!(found.started_unix, Some(1_795_316_420));
        assert_eq!(found.socket_directory, Some(PathBuf::from("/run/postgresql")));
        assert_eq!(found.listen_address.as_deref(), Some("localhost"));
        assert_eq!(found.status.as_deref(), Some("ready"));
    }

    #[test]
    fn pid_file_of_a_starting_or_standalone_server_is_read() {
        let found = PostmasterPid::parse("-77\n/d\n1795316420\n5432\n\n\n").unwrap();
        assert_eq!((found.pid, found.standalone), (77, true));
        assert_eq!((found.socket_directory, found.listen_address), (None, None));
        assert_eq!(PostmasterPid::parse("77\n").unwrap().port, None);
        for bad in ["", "\n", "0\n", "x", "-2147483648", "99999999999"] {
            assert!(PostmasterPid::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn server_counts_as_running_only_while_its_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let state = |text: String| {
            fs::write(dir.path().join("postmaster.pid"), text).unwrap();
            server_state(dir.path()).unwrap()
        };
        assert_eq!(server_state(&dir.path().join("no")).unwrap(), ServerState::NoPidFile);
        let parent = std::os::unix::process::parent_id();
        assert!(matches!(state(format!("{parent}\n")), ServerState::Running(_)));
        assert!(matches!(state(format!("-{parent}\n")), ServerState::Running(_)));
        assert!(matches!(state(format!("{DEAD_PID}\n")), ServerState::Stale(_)));
        let own = std::process::id();
        assert!(matches!(state(format!("{own}\n")), ServerState::Stale(_)));
        assert!(matches!(state(String::new()), ServerState::Unreadable(_)));
    }

    #[test]
    fn version_and_signal_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            major_version(dir.path()),
            Err(PgVersionError::Disk(DiskError::Missing { .. }))
        ));
        fs::write(dir.path().join("PG_VERSION"), "18\n").unwrap();
        assert_eq!(major_version(dir.path()).unwrap(), 18);
        fs::write(dir.path().join("PG_VERSION"), "9.6\n").unwrap();
        assert!(matches!(major_version(dir.path()), Err(PgVersionError::Malformed(_))));

        assert_eq!(signal_files(dir.path()).unwrap(), SignalFiles::default());
        fs::write(dir.path().join("standby.signal"), "").unwrap();
        assert_eq!(
            signal_files(dir.path()).unwrap(),
            SignalFiles { recovery: false, standby: true }
        );
    }

    #[test]
    fn an_exported_snapshot_tells_its_process_while_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let pid_in = |name: &str| exported_snapshot(dir.path(), name).unwrap();
        assert_eq!(pid_in("00000005-00000002-1"), None);
        fs::create_dir(dir.path().join("pg_snapshots")).unwrap();
        assert_eq!(pid_in("00000005-00000002-1"), None);
        // As PostgreSQL 18 wrote it.
        let text = "vxid:5/2\npid:12345\ndbid:5\niso:2\nro:0\nxmin:754\nxmax:754\nxcnt:0\n";
        fs::write(dir.path().join("pg_snapshots/00000005-00000002-1"), text).unwrap();
        assert_eq!(pid_in("00000005-00000002-1"), Some(12345));
        fs::write(dir.path().join("other"), text).unwrap();
        assert_eq!((pid_in("../other"), pid_in("")), (None, None));
    }

    #[test]
    fn control_file_is_never_read_past_its_size() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::write(dir.path().join("global/pg_control"), vec![1; 10_000]).unwrap();
        assert_eq!(read_control_bytes(dir.path()).unwrap().len(), 8192);
    }

    #[test]
    fn torn_reading_is_repeated_until_accepted_or_the_bound() {
        let quick = |attempts_max| Rereads { attempts_max, pause: Duration::ZERO };
        let accept = |bytes: &[u8]| {
            if bytes == [3] { Ok(3) } else { Err(PostmasterPidError("torn".into())) }
        };
        let mut reading = 0;
        let mut read = || {
            reading += 1;
            Ok(vec![reading])
        };
        assert_eq!(read_stable(quick(3), &mut read, accept).unwrap(), 3);

        let mut readings = 0;
        let torn = read_stable(
            quick(2),
            || {
                readings += 1;
                Ok(vec![0])
            },
            accept,
        );
        assert!(matches!(torn, Err(StableReadError::Refused(_))));
        assert_eq!(readings, 2);
    }

    proptest! {
        #[test]
        fn any_pid_file_text_is_survived(text in "\\PC{0,200}", pid in 1..i32::MAX) {
            let _ = PostmasterPid::parse(&text);
            let parsed = PostmasterPid::parse(&format!("{pid}\n{text}")).unwrap();
            prop_assert_eq!(parsed.pid, pid.unsigned_abs());
        }
    }
}
