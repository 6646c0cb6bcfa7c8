//! Data directories as `initdb` makes them, made once and copied from then on: `initdb` takes a second or two of every
//! test, and makes the same each time but for the system identifier.

use super::cluster::finish;
use super::lab::copy_tree;
use super::trees::{Tree, cache, give_to_server_user};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// What `initdb` is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kind {
    pub(super) major: u32,
    pub(super) segment_mib: u32,
    pub(super) checksums: bool,
}

/// Larger segments are made as they are needed: their first one takes too much of the disk to be kept.
const SEGMENT_MIB_MAX: u32 = 64;

impl Kind {
    /// Makes a data directory with `initdb`.
    pub(super) fn make(self, pgdata: &Path) {
        let mut initdb = self.initdb(pgdata);
        // Nobody pulls the plug on a test.
        initdb.arg("-N");
        finish(initdb);
    }

    /// Makes a data directory that is a copy of the kind's template. Every copy has the same system identifier.
    pub(super) fn copy(self, pgdata: &Path) {
        copy_tree(&self.template(), pgdata);
    }

    /// Returns whether there is a template of this kind.
    pub(super) fn has_template(self) -> bool {
        self.segment_mib <= SEGMENT_MIB_MAX
    }

    fn initdb(self, pgdata: &Path) -> Command {
        let mut initdb = Tree::of(self.major).tool("initdb");
        initdb.arg("-D").arg(pgdata).args(["-U", "postgres", "-A", "trust"]);
        initdb.args(["--no-locale", "-E", "UTF8", "--no-instructions"]);
        initdb.arg(format!("--wal-segsize={}", self.segment_mib));
        if self.checksums {
            initdb.arg("-k");
        } else if self.major >= 18 {
            initdb.arg("--no-data-checksums");
        }
        initdb
    }

    /// Returns the template's directory, which is made if this is the first test that asks for it. It is kept for the
    /// next test program, and synced for that.
    fn template(self) -> PathBuf {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let all = cache().join("templates");
        let place = all.join(self.name());
        if !place.exists() {
            std::fs::create_dir_all(&all).unwrap();
            give_to_server_user(&all);
            let stage = all.join(format!("stage-{}", std::process::id()));
            std::fs::remove_dir_all(&stage).ok();
            finish(self.initdb(&stage));
            // Another test program may have been at it as well; then its own stays.
            if std::fs::rename(&stage, &place).is_err() {
                std::fs::remove_dir_all(&stage).unwrap();
            }
        }
        place
    }

    /// Names the kind, its exact version included: another `initdb` may make something else.
    fn name(self) -> String {
        let mut version = Tree::of(self.major).tool("postgres");
        version.arg("--version");
        let version = String::from_utf8(finish(version).stdout).unwrap();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let version: String = version.trim().chars().map(plain).collect();
        let checksums = if self.checksums { "checksums" } else { "plain" };
        format!("{version}-{}MiB-{checksums}", self.segment_mib)
    }
}
