//! Where the PostgreSQL servers are, and as whom they run.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Every major version that is supported, each of them tested.
pub const MAJORS: [u32; 5] = [14, 15, 16, 17, 18];

/// The major version for tests in which the version makes no difference.
pub const NEWEST: u32 = 18;

/// One installed PostgreSQL.
#[derive(Debug, Clone)]
pub struct Tree {
    pub root: PathBuf,
}

impl Tree {
    /// Returns the tree of a major version, or fails saying how to get it.
    pub fn of(major: u32) -> Self {
        let root = servers().join(major.to_string());
        assert!(
            root.join("bin/postgres").exists(),
            "PostgreSQL {major} is not in {}: run `make test`, which installs it, or set \
             HIGHWATER_TEST_PG to a directory with <major>/bin",
            root.display()
        );
        Self { root }
    }

    /// Returns a command for one of the tree's programs, to run as the server's
    /// user, with a small fixed environment.
    pub fn tool(&self, name: &str) -> Command {
        let mut command = as_server_user(self.root.join("bin").join(name));
        command
            // libpqwalreceiver would otherwise take the system's libpq, which
            // may be older and then never streams.
            .env("LD_LIBRARY_PATH", self.root.join("lib"))
            .env("PATH", format!("{}:/usr/bin:/bin", self.root.join("bin").display()));
        command
    }
}

/// Returns the directory that `tests/setup/install.sh` fills; the order of
/// places is the same as there.
pub fn cache() -> PathBuf {
    if let Some(path) = std::env::var_os("HIGHWATER_TEST_CACHE") {
        return path.into();
    }
    if rustix::process::geteuid().is_root() {
        return "/var/cache/highwater-test".into();
    }
    let home = || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache");
    std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("highwater-test")
}

fn servers() -> PathBuf {
    std::env::var_os("HIGHWATER_TEST_PG").map_or_else(|| cache().join("pg"), PathBuf::from)
}

/// The unprivileged user for servers and for the binary under test, where the
/// tests run as root: PostgreSQL refuses root.
pub(super) fn server_user() -> Option<(u32, u32)> {
    static USER: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    *USER.get_or_init(|| {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let passwd = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
        let ids = |name: &str| {
            let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        let found = ids("postgres").or_else(|| ids("nobody"));
        Some(found.expect("a user named postgres or nobody exists"))
    })
}

/// Returns a command that runs as the server's user with an empty environment.
pub fn as_server_user(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").env("TZ", "UTC");
    // pg_waldump and others insist on a current directory they can read.
    command.current_dir("/");
    if let Some((uid, gid)) = server_user() {
        command.uid(uid).gid(gid);
    }
    command
}

/// Gives a file or directory to the server's user.
pub fn give_to_server_user(path: &Path) {
    if let Some((uid, gid)) = server_user() {
        std::os::unix::fs::lchown(path, Some(uid), Some(gid))
            .unwrap_or_else(|error| panic!("chown {}: {error}", path.display()));
    }
}
