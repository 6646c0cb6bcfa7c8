//! What the recovered copy is asked.
//!
//! ```text
//! page-checksums   pg_checksums, while the server is stopped
//! databases        each that allows connections takes one and answers
//! pg_amcheck       tables and indexes of every database
//! sql:NAME.sql     the user's own questions, with the rows that NAME.expected holds
//! ```
//!
//! A check that fails ends nothing: all are done, and all are told.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use super::server::{CameUp, Launch, ROLE};
use super::watch::Watch;
use super::{UNHARMED, millis};
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::{CheckOutcome, DrillCheck, drill_text};
use crate::ops::Progress;
use crate::pgdata::DiskError;
use crate::plan::drill::{DRILL_PORT, database_of_check, difference, rows_as_text};
use crate::walsender::{ConnInfo, Connection, Mode, PgEnvironment, PgError};

/// The most checks of the user.
const USER_CHECKS_MAX: usize = 256;

/// The longest file of one, and of what it expects.
const USER_FILE_BYTES_MAX: u64 = 1 << 20;

/// One question of the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct UserCheck {
    name: String,
    database: String,
    sql: String,
    expected: Option<String>,
}

/// Reads the user's checks, in the order of their names.
///
/// # Errors
/// [`Kind::Usage`]: a directory that cannot be read or has none, too many or too long files.
pub(super) fn read_user_checks(directory: &Path) -> Result<Vec<UserCheck>, Failure> {
    let wrong = |what: String, next: &str| Failure::new(Kind::Usage, what, UNHARMED, next);
    let unreadable = |path: &Path, error: std::io::Error| {
        let what = format!("could not read the checks in {}", directory.display());
        let next = "Give a directory with files NAME.sql, and NAME.expected beside them where rows are expected; or leave `drill_checks` out.";
        wrong(what, next).because(DiskError::new("read", path, error))
    };
    let entries = std::fs::read_dir(directory).map_err(|error| unreadable(directory, error))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| unreadable(directory, error))?.path();
        if path.extension().is_some_and(|extension| extension == "sql") {
            files.push(path);
        }
    }
    files.sort_unstable();
    if files.is_empty() || files.len() > USER_CHECKS_MAX {
        let what = format!("{} holds {} files NAME.sql", directory.display(), files.len());
        let next = format!("Give 1 to {USER_CHECKS_MAX} of them, or leave `drill_checks` out.");
        return Err(wrong(what, &next));
    }
    let read = |path: &Path| {
        let length = std::fs::metadata(path).map_err(|error| unreadable(path, error))?.len();
        if length > USER_FILE_BYTES_MAX {
            let what = format!("{} has more than {USER_FILE_BYTES_MAX} bytes", path.display());
            return Err(wrong(what, "A check is a question; cut it into several files."));
        }
        std::fs::read_to_string(path).map_err(|error| unreadable(path, error))
    };
    let check = |path: PathBuf| {
        let sql = read(&path)?;
        let expected = path.with_extension("expected");
        let expected = if expected.exists() { Some(read(&expected)?) } else { None };
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(UserCheck { name, database: database_of_check(&sql).to_owned(), sql, expected })
    };
    files.into_iter().map(check).collect()
}

/// Everything that checks need.
pub(super) struct Checking<'a> {
    pub(super) launch: &'a Launch<'a>,
    pub(super) watch: &'a mut Watch,
    pub(super) progress: &'a dyn Progress,
    /// What came of them so far.
    pub(super) checks: &'a mut Vec<DrillCheck>,
}

impl Checking<'_> {
    /// Does all checks; the server is stopped before and may be left running.
    ///
    /// # Errors
    /// What ends the drill early; a check that fails is noted.
    pub(super) async fn run(&mut self, user_checks: &[UserCheck]) -> Result<(), Failure> {
        self.page_checksums().await?;
        self.progress.note("starting the server for checks");
        self.launch.make_role(self.watch).await?;
        let mut server = self.launch.start()?;
        if let CameUp::Ended = server.ready(self.launch, self.watch).await? {
            let what =
                "the recovered server did not start again after it was stopped in good order";
            let next = "Its log says why; `--keep` keeps the files.";
            return Err(Failure::new(Kind::Integrity, what, UNHARMED, next));
        }
        self.databases().await?;
        self.amcheck().await?;
        for check in user_checks {
            self.user_check(check).await?;
        }
        Ok(())
    }

    fn note(&mut self, name: &str, outcome: CheckOutcome, said: &str, began: Instant) {
        self.checks.push(DrillCheck {
            name: name.to_owned(),
            outcome,
            said: drill_text(said),
            millis: millis(began.elapsed()),
        });
    }

    /// Lets PostgreSQL's own program read every page of every file.
    async fn page_checksums(&mut self) -> Result<(), Failure> {
        const NAME: &str = "page-checksums";
        let began = Instant::now();
        if self.launch.control()?.data_checksum_version == 0 {
            self.note(NAME, CheckOutcome::Skipped, "the cluster has no page checksums", began);
            return Ok(());
        }
        if !self.launch.binaries.has("pg_checksums") {
            self.note(NAME, CheckOutcome::Skipped, "pg_checksums is not installed", began);
            return Ok(());
        }
        self.progress.note("checking page checksums");
        let mut command = self.launch.command("pg_checksums");
        command.arg("--check").arg("-D").arg(self.launch.scratch.data());
        let said = self.watch.program(command, Stdio::null(), self.launch.scratch).await?;
        let outcome =
            if said.code == Some(0) { CheckOutcome::Passed } else { CheckOutcome::Failed };
        self.note(NAME, outcome, &said.text, began);
        Ok(())
    }

    fn address(&self, database: &str) -> Result<ConnInfo, Failure> {
        let socket = self.launch.scratch.socket_directory().display().to_string();
        let socket = socket.replace('\\', "\\\\").replace('\'', "\\'");
        let dsn = format!(
            "host='{socket}' port={DRILL_PORT} user={ROLE} application_name='highwater drill'"
        );
        let address = ConnInfo::read(Some(&dsn), &PgEnvironment::default());
        let address = address.map_err(|error| {
            let what = "the address of the private server cannot be used";
            let next = "Choose another scratch directory with `--scratch`.";
            Failure::new(Kind::Usage, what, UNHARMED, next).because(error)
        })?;
        Ok(address.with_dbname(database))
    }

    async fn connect(&mut self, database: &str) -> Result<Result<Connection, PgError>, Failure> {
        let address = self.address(database)?;
        let connected = async {
            let mut connected = Connection::connect(&address, Mode::Sql).await;
            if let Ok(connection) = &mut connected {
                // A question may take long; the watch has its own limit.
                connection.set_silence_limit(None);
            }
            Ok(connected)
        };
        self.watch.over(connected).await
    }

    /// Asks in one database; every result set's rows, one after the other.
    async fn ask(&mut self, database: &str, sql: &str) -> Result<Result<String, PgError>, Failure> {
        let mut connection = match self.connect(database).await? {
            Ok(connection) => connection,
            Err(error) => return Ok(Err(error)),
        };
        let asking = async { Ok(connection.query_all(sql).await) };
        let answer = self.watch.over(asking).await?;
        if answer.is_ok() {
            connection.close().await;
        }
        Ok(answer.map(|sets| sets.iter().map(|set| rows_as_text(&set.rows)).collect()))
    }

    async fn databases(&mut self) -> Result<(), Failure> {
        const NAME: &str = "databases";
        const LIST: &str = "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY 1";
        self.progress.note("connecting to each database");
        let began = Instant::now();
        let mut names = Err(None);
        for database in ["postgres", "template1"] {
            names = match self.ask(database, LIST).await? {
                Ok(names) => Ok(names),
                Err(error) => Err(Some(error)),
            };
            if names.is_ok() {
                break;
            }
        }
        let names = match names {
            Ok(names) => names,
            Err(error) => {
                let why = error.map_or_else(String::new, |error| in_one_line(&error));
                let said = format!("neither postgres nor template1 takes connections: {why}");
                self.note(NAME, CheckOutcome::Failed, &said, began);
                return Ok(());
            }
        };
        let (mut said, mut failed, mut count) = (String::new(), 0, 0);
        for name in names.lines() {
            count += 1;
            let answer = self.ask(name, "SELECT count(*) FROM pg_catalog.pg_class").await?;
            if let Err(error) = answer {
                failed += 1;
                let _ = writeln!(said, "{name}: {}", in_one_line(&error));
            }
        }
        let _ = write!(said, "{} of {count} take connections and answer", count - failed);
        let outcome = if failed == 0 { CheckOutcome::Passed } else { CheckOutcome::Failed };
        self.note(NAME, outcome, &said, began);
        Ok(())
    }

    async fn amcheck(&mut self) -> Result<(), Failure> {
        const NAME: &str = "pg_amcheck";
        const IS_THERE: &str =
            "SELECT count(*) FROM pg_catalog.pg_available_extensions WHERE name = 'amcheck'";
        let began = Instant::now();
        let mut is_there = false;
        for database in ["postgres", "template1"] {
            is_there |= self.ask(database, IS_THERE).await?.is_ok_and(|text| text == "1\n");
        }
        if !is_there || !self.launch.binaries.has("pg_amcheck") {
            let said = "pg_amcheck or its extension is not installed on this host";
            self.note(NAME, CheckOutcome::Skipped, said, began);
            return Ok(());
        }
        self.progress.note("pg_amcheck in every database");
        let mut command = self.launch.command("pg_amcheck");
        let socket = self.launch.scratch.socket_directory();
        command.args(["--all", "--install-missing", "--no-password", "--jobs=1"]);
        command.arg("--host").arg(socket).args(["--username", ROLE]);
        command.arg(format!("--port={DRILL_PORT}"));
        command.env("PGCONNECT_TIMEOUT", "30");
        let said = self.watch.program(command, Stdio::null(), self.launch.scratch).await?;
        let outcome =
            if said.code == Some(0) { CheckOutcome::Passed } else { CheckOutcome::Failed };
        self.note(NAME, outcome, &said.text, began);
        Ok(())
    }

    async fn user_check(&mut self, check: &UserCheck) -> Result<(), Failure> {
        self.progress.note(&format!("asking {}", check.name));
        let began = Instant::now();
        let (outcome, said) = match self.ask(&check.database, &check.sql).await? {
            Err(error) => (CheckOutcome::Failed, in_one_line(&error)),
            Ok(found) => match check.expected.as_deref().and_then(|one| difference(one, &found)) {
                Some(difference) => (CheckOutcome::Failed, difference),
                None => (CheckOutcome::Passed, format!("{} rows", found.lines().count())),
            },
        };
        self.note(&format!("sql:{}", check.name), outcome, &said, began);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn checks_are_read_in_order_with_what_they_expect() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(read_user_checks(dir.path()).unwrap_err().kind, Kind::Usage);
        write("b.sql", "select 1");
        write("a.sql", "-- database: shop\nselect 2");
        write("a.expected", "2\n");
        write("README", "none of them");
        let checks = read_user_checks(dir.path()).unwrap();
        let seen: Vec<_> = checks
            .iter()
            .map(|one| (one.name.as_str(), one.database.as_str(), one.expected.as_deref()))
            .collect();
        assert_eq!(seen, [("a.sql", "shop", Some("2\n")), ("b.sql", "postgres", None)]);
        let failure = read_user_checks(&dir.path().join("none")).unwrap_err();
        assert_eq!(failure.kind, Kind::Usage);
    }
}
