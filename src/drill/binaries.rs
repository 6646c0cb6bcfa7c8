//! Finding the PostgreSQL programs of the right major version.
//!
//! Never here: what is done with them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::UNHARMED;
use crate::failure::{Failure, Kind};

/// Where packages put them: Debian's, and that of the RPMs of the PostgreSQL project.
const USUAL_PLACES: [(&str, &str); 2] = [("/usr/lib/postgresql/", "/bin"), ("/usr/pgsql-", "/bin")];

/// The programs of one installation.
#[derive(Debug, Clone)]
pub(super) struct Binaries {
    directory: PathBuf,
}

impl Binaries {
    /// Looks for programs of `major`: in `named` alone, if a directory was named, else in the usual places and then
    /// in the directories of `path`, a search path.
    ///
    /// # Errors
    /// [`Kind::Postgres`], telling each place and why not.
    pub(super) fn find(named: Option<&Path>, path: &str, major: u32) -> Result<Self, Failure> {
        let places: Vec<PathBuf> = match named {
            Some(named) => vec![named.to_owned()],
            None => {
                let usual = USUAL_PLACES.map(|(before, after)| format!("{before}{major}{after}"));
                let usual = usual.into_iter().map(PathBuf::from);
                usual.chain(std::env::split_paths(path)).collect()
            }
        };
        let mut looked = Vec::new();
        for directory in places.into_iter().filter(|place| place.is_absolute()) {
            match major_of(&directory) {
                Ok(found) if found == major => return Ok(Self { directory }),
                Ok(found) => looked.push(format!("{} has {found}", directory.display())),
                Err(why) if named.is_some() || directory.join("postgres").exists() => {
                    looked.push(format!("{}: {why}", directory.display()));
                }
                Err(_) => looked.push(directory.display().to_string()),
            }
        }
        looked.dedup();
        Err(Failure::new(
            Kind::Postgres,
            format!(
                "the backup is of PostgreSQL {major}, and its server program was not found (looked in {})",
                looked.join(", ")
            ),
            UNHARMED,
            "Install that major version on this host, or name the directory of its programs: `postgres_bin` in the settings, `--bindir`.",
        ))
    }

    /// Returns the path of a program, which need not exist.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns whether a program is installed.
    pub(super) fn has(&self, name: &str) -> bool {
        self.path(name).exists()
    }
}

/// Asks `postgres --version` in a directory: `postgres (PostgreSQL) 18.1 (Debian …)`, `… 19beta1`.
fn major_of(directory: &Path) -> Result<u32, String> {
    let program = directory.join("postgres");
    let mut command = Command::new(&program);
    let answer = command.arg("--version").stdin(Stdio::null()).output();
    let answer = answer.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&answer.stdout);
    parse_major(&text).ok_or_else(|| {
        let said = String::from_utf8_lossy(&answer.stderr);
        format!(
            "`postgres --version` says `{}`",
            text.lines().chain(said.lines()).next().unwrap_or("")
        )
    })
}

fn parse_major(text: &str) -> Option<u32> {
    let version = text.strip_prefix("postgres (PostgreSQL) ")?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A directory with a program that answers as `postgres --version` does.
    fn installation(root: &Path, name: &str, answer: &str) -> PathBuf {
        let directory = root.join(name);
        std::fs::create_dir(&directory).unwrap();
        let program = directory.join("postgres");
        std::fs::write(&program, format!("#!/bin/sh\necho '{answer}'\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    #[test]
    fn versions_are_read_as_every_server_prints_them() {
        assert_eq!(parse_major("postgres (PostgreSQL) 14.19\n"), Some(14));
        assert_eq!(parse_major("postgres (PostgreSQL) 18.1 (Debian 18.1-1.pgdg13+2)"), Some(18));
        assert_eq!(parse_major("postgres (PostgreSQL) 19beta1"), Some(19));
        assert_eq!(parse_major("postgres (EnterpriseDB) 18.1"), None);
        assert_eq!(parse_major(""), None);
    }

    #[test]
    fn only_the_right_major_is_taken_and_each_place_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let old = installation(dir.path(), "old", "postgres (PostgreSQL) 3.1");
        let right = installation(dir.path(), "right", "postgres (PostgreSQL) 4.0");
        let none = dir.path().join("none");
        let path = std::env::join_paths([&old, &none, &right]).unwrap().into_string().unwrap();
        let found = Binaries::find(None, &path, 4).unwrap();
        assert_eq!(found.path("initdb"), right.join("initdb"));
        assert!(found.has("postgres") && !found.has("initdb"));
        let failure = Binaries::find(None, &path, 5).unwrap_err();
        assert_eq!(failure.kind, Kind::Postgres);
        for told in ["/usr/lib/postgresql/5/bin", "/usr/pgsql-5/bin", "has 3", "has 4", "none"] {
            assert!(failure.what.contains(told), "{told}: {}", failure.what);
        }
        // A directory that was named is the only one.
        let failure = Binaries::find(Some(&old), &path, 4).unwrap_err();
        assert!(failure.what.contains("has 3") && !failure.what.contains("right"), "{failure}");
    }
}
