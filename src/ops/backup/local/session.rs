//! The session that holds the server in backup mode, and the proof that the data directory here is
//! that server's.
//!
//! Backup mode belongs to the session: it ends with it, however that comes about, and leaves nothing
//! behind. So the session stays open and is used now and then, and a lost one voids the backup.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::server::Facts;
use super::super::{Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::ops::failures::{of_disk, of_postgres};
use crate::pg::{Lsn, PgTimestamp};
use crate::pgdata::{DiskError, exported_snapshot};
use crate::plan::file_reading::is_on_the_same_host;
use crate::walsender::{Connection, Mode, PgError, Rows, quote_literal};

/// The longest wait for the checkpoint that a backup begins with.
const CHECKPOINT_LIMIT: Duration = Duration::from_hours(1);

/// The longest wait for any other answer.
const SILENCE_LIMIT: Duration = Duration::from_mins(10);

/// From this version on the functions are called `pg_backup_start` and `pg_backup_stop`.
const NEW_NAMES_FROM: u32 = 15;

/// A session with the server.
pub(super) struct Session {
    connection: Connection,
    new_names: bool,
}

/// What the server says when the backup begins.
pub(super) struct Started {
    pub(super) start_lsn: Lsn,
    /// The server's clock after that, seconds since 1970, rounded down.
    pub(super) clock_unix: i64,
    /// This host's clock after that.
    pub(super) read_from: PgTimestamp,
}

/// What the server says when the backup ends.
pub(super) struct Ended {
    pub(super) stop_lsn: Lsn,
    /// The content of `backup_label`.
    pub(super) label: String,
    /// The content of `tablespace_map`; may be empty.
    pub(super) tablespace_map: String,
}

impl Session {
    /// Opens an ordinary connection to the server that was chosen.
    pub(super) async fn open(request: &Request, facts: &Facts) -> Result<Self, Failure> {
        let mut last = None;
        for host in request.server.each_host() {
            match Connection::connect(&host, Mode::Sql).await {
                Ok(connection) if connection.place() == facts.place => {
                    let mut session =
                        Self { connection, new_names: facts.version.major().0 >= NEW_NAMES_FROM };
                    session.connection.set_silence_limit(Some(SILENCE_LIMIT));
                    session.prepare().await?;
                    return Ok(session);
                }
                Ok(connection) => connection.close().await,
                Err(error) => last = Some(error),
            }
        }
        let what = format!(
            "could not open an ordinary connection to {}, which `--source files` needs beside the one for replication",
            facts.place
        );
        Err(match last {
            Some(error) if error.sqlstate() == Some("3D000") => {
                let next = "Name a database that exists in the connection string, for example `dbname=postgres`.";
                Failure::new(Kind::Postgres, what, UNHARMED, next).because(error)
            }
            Some(error) => of_postgres(error, what, UNHARMED),
            None => {
                let next = "The host's name leads to another server now; try again.";
                Failure::new(Kind::Postgres, what, UNHARMED, next)
            }
        })
    }

    /// Keeps the server from ending a session that is idle for as long as the files are read.
    async fn prepare(&mut self) -> Result<(), Failure> {
        let settings = "SET idle_session_timeout = 0; SET statement_timeout = 0; \
                        SET lock_timeout = 0; SET standard_conforming_strings = on";
        self.ask(settings, "could not prepare the session").await.map(drop)
    }

    pub(super) async fn ask(&mut self, query: &str, what: &str) -> Result<Rows, Failure> {
        self.connection.query(query).await.map_err(|error| of_postgres(error, what, UNHARMED))
    }

    /// Returns the value of a setting; `None` where the role may not see it.
    pub(super) async fn setting(&mut self, name: &str) -> Result<Option<String>, Failure> {
        match self.connection.query(&format!("SHOW {name}")).await {
            Ok(rows) => Ok(rows.first().map(str::to_owned)),
            Err(error) if error.sqlstate() == Some("42501") => Ok(None),
            Err(error) => Err(of_postgres(error, "could not ask the server", UNHARMED)),
        }
    }

    /// Returns the data directory: the one that was named, else what the server says.
    pub(super) async fn data_directory(
        &mut self,
        named: Option<&Path>,
    ) -> Result<PathBuf, Failure> {
        if let Some(named) = named {
            return Ok(named.to_owned());
        }
        self.setting("data_directory").await?.map(PathBuf::from).ok_or_else(|| {
            Failure::new(
                Kind::Usage,
                "the role may not ask the server where its data directory is",
                UNHARMED,
                "Name it with `--pgdata DIR` (or the setting `pgdata`), or `GRANT pg_read_all_settings` to the role.",
            )
        })
    }

    /// Proves that the server whose session this is works in `pgdata`, as seen from here: a file
    /// that it makes for us appears there, names this session, and goes away again.
    ///
    /// System identifier, path and port prove nothing: a copy has them all, and a file of process
    /// numbers may be another container's. An exported snapshot is a small file that every role may
    /// have made, on primaries and standbys, and that lives exactly as long as its transaction.
    pub(super) async fn prove(&mut self, pgdata: &Path, place: &str) -> Result<(), Failure> {
        const COULD_NOT: &str = "could not prove whose data directory this is";
        let rows = self
            .ask(
                "SELECT pg_catalog.pg_backend_pid() AS pid, \
                 pg_catalog.host(pg_catalog.inet_client_addr()) AS client, \
                 pg_catalog.host(pg_catalog.inet_server_addr()) AS server",
                COULD_NOT,
            )
            .await?;
        if !is_on_the_same_host(rows.get(0, "client"), rows.get(0, "server")) {
            return Err(Failure::new(
                Kind::Usage,
                format!(
                    "the server at {place} is on another host, and `--source files` reads its data directory"
                ),
                UNHARMED,
                "Run this on the server's own host, over its Unix socket; from elsewhere, use `--source stream`.",
            ));
        }
        let pid = rows.get(0, "pid").and_then(|pid| pid.parse::<u32>().ok());
        let exported = self
            .ask(
                "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_catalog.pg_export_snapshot()",
                COULD_NOT,
            )
            .await?;
        let name = exported.first().unwrap_or_default().to_owned();
        let during = look(pgdata, &name)?;
        self.ask("ROLLBACK", COULD_NOT).await?;
        let after = look(pgdata, &name)?;
        if during.is_some() && during == pid && after.is_none() {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Conflict,
            format!(
                "`{}` is not the data directory of the server at {place}, or not as seen from here",
                pgdata.display()
            ),
            UNHARMED,
            "Name the server's own data directory with `--pgdata DIR`, and see that the connection string leads to the server that works in it. In a container, its volume must be mounted here.",
        ))
    }

    /// Begins the backup: waits for its checkpoint.
    pub(super) async fn start(&mut self, label: &str, fast: bool) -> Result<Started, Failure> {
        let label = quote_literal(label);
        let call = if self.new_names {
            format!("SELECT pg_catalog.pg_backup_start({label}, {fast}) AS lsn")
        } else {
            format!("SELECT pg_catalog.pg_start_backup({label}, {fast}, false) AS lsn")
        };
        self.connection.set_silence_limit(Some(CHECKPOINT_LIMIT));
        let rows = self.connection.query(&call).await.map_err(|error| self.refused(error))?;
        self.connection.set_silence_limit(Some(SILENCE_LIMIT));
        let lsn = rows.first().and_then(|lsn| lsn.parse().ok());
        let clock =
            "SELECT pg_catalog.floor(EXTRACT(epoch FROM pg_catalog.clock_timestamp()))::bigint";
        let rows = self.ask(clock, "could not ask the server for its time").await?;
        let clock = rows.first().and_then(|seconds| seconds.parse().ok());
        let (Some(start_lsn), Some(clock_unix)) = (lsn, clock) else { return Err(nonsense()) };
        Ok(Started { start_lsn, clock_unix, read_from: crate::ops::now() })
    }

    /// Uses the session, so that nobody takes it for dead and a lost one is noticed.
    pub(super) async fn pulse(&mut self) -> Result<(), Failure> {
        self.connection.query("SELECT 1").await.map(drop).map_err(lost)
    }

    /// Closes a session that holds no backup.
    pub(super) async fn close(self) {
        self.connection.close().await;
    }

    /// Ends the backup, without waiting for the archive.
    pub(super) async fn stop(mut self) -> Result<Ended, Failure> {
        let call =
            if self.new_names { "pg_backup_stop(false)" } else { "pg_stop_backup(false, false)" };
        let query = format!("SELECT lsn, labelfile, spcmapfile FROM pg_catalog.{call}");
        let rows = match self.connection.query(&query).await {
            Ok(rows) => rows,
            Err(error @ PgError::Server(_)) => return Err(self.refused(error)),
            Err(error) => return Err(lost(error)),
        };
        self.connection.close().await;
        let stop_lsn = rows.get(0, "lsn").and_then(|lsn| lsn.parse().ok());
        let (Some(stop_lsn), Some(label)) = (stop_lsn, rows.get(0, "labelfile")) else {
            return Err(nonsense());
        };
        let tablespace_map = rows.get(0, "spcmapfile").unwrap_or_default().to_owned();
        Ok(Ended { stop_lsn, label: label.to_owned(), tablespace_map })
    }

    fn refused(&self, error: PgError) -> Failure {
        let what = "the server did not let a backup begin or end";
        if error.sqlstate() != Some("42501") {
            return of_postgres(error, what, UNHARMED);
        }
        let functions = if self.new_names {
            "pg_backup_start(text, boolean), pg_backup_stop(boolean)"
        } else {
            "pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)"
        };
        let next = format!(
            "As a superuser, in the database that the connection string names: GRANT EXECUTE ON FUNCTION {functions} TO the role. `--source stream` needs no more than REPLICATION."
        );
        Failure::new(Kind::Postgres, what, UNHARMED, next).because(error)
    }
}

fn look(pgdata: &Path, name: &str) -> Result<Option<u32>, Failure> {
    exported_snapshot(pgdata, name).map_err(|error: DiskError| {
        let what = format!("could not look into the data directory `{}`", pgdata.display());
        of_disk(error, what, UNHARMED)
    })
}

fn lost(error: PgError) -> Failure {
    Failure::new(
        Kind::Postgres,
        "the session that held the server in backup mode was lost, and the backup with it",
        UNHARMED,
        "The server left backup mode by itself; nothing is to be cleaned up there. Look into its log for why, then take the backup again.",
    )
    .because(error)
}

pub(super) fn nonsense() -> Failure {
    Failure::new(
        Kind::Postgres,
        "the server's answer about the backup cannot be understood",
        UNHARMED,
        "Check that the address is PostgreSQL's own and not a pooler's.",
    )
}
