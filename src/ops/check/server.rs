//! What the server says of itself, over an ordinary connection.

use std::time::SystemTime;

use super::receiving;
use super::{ARCHIVE_COMMAND, ARCHIVE_MODE, CLOCK_TOLERANCE_MS, Report, SERVERS_IDENTITY};
use crate::failure::Kind;
use crate::format::Identity;
use crate::ops::server_facts::MAJOR_MIN;
use crate::pg::{ServerVersion, SystemId};
use crate::walsender::Connection;

/// A server that is being looked at.
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) report: Report,
    pub(super) in_recovery: bool,
    /// Whether `highwater receive` streams from it.
    pub(super) streams: bool,
}

impl Server {
    pub(super) async fn look(
        &mut self,
        identity: Option<&Identity>,
        receiver: &receiving::Expected,
    ) {
        self.version();
        self.owner(identity).await;
        self.in_recovery = self.value("SELECT pg_is_in_recovery()").await.as_deref() == Some("t");
        let found = receiving::ask(&mut self.connection, receiver).await;
        self.streams = found.as_ref().is_ok_and(receiving::Found::streams);
        self.settings().await;
        self.archive_command().await;
        self.archiver().await;
        match found {
            Ok(found) => receiving::judge(receiver, &found, &mut self.report),
            Err(error) => self.report.warn(receiving::NAME, error.to_string(), ""),
        }
        self.role().await;
        self.clock().await;
    }

    async fn value(&mut self, query: &str) -> Option<String> {
        match self.connection.query(query).await {
            Ok(rows) => rows.first().map(ToOwned::to_owned),
            Err(error) => {
                self.report.warn("query", error.to_string(), "");
                None
            }
        }
    }

    fn version(&mut self) {
        let version = ServerVersion(self.connection.server_version_num());
        if version.major().0 < MAJOR_MIN {
            self.report.fail(
                "server version",
                Kind::Postgres,
                format!("PostgreSQL {version}; {MAJOR_MIN} is the oldest supported"),
                "Upgrade the server.",
            );
        } else {
            self.report.ok("server version", format!("PostgreSQL {version}"));
        }
    }

    async fn owner(&mut self, identity: Option<&Identity>) {
        let text = self.value("SELECT system_identifier FROM pg_catalog.pg_control_system()").await;
        let ours = text.and_then(|text| text.parse::<i64>().ok());
        let ours = ours.map(|number| SystemId(number.cast_unsigned()));
        if let (Some(ours), Some(identity)) = (ours, identity)
            && ours != identity.system_identifier
        {
            self.report.fail(
                SERVERS_IDENTITY,
                Kind::Conflict,
                format!(
                    "the server's system identifier is {ours}, and this place belongs to {}",
                    identity.system_identifier
                ),
                "Use another `--cluster` name for this server; after pg_upgrade run `highwater init --successor`.",
            );
        }
    }

    async fn settings(&mut self) {
        let wal_level = self.value("SHOW wal_level").await.unwrap_or_default();
        if wal_level == "minimal" {
            self.report.fail(
                "wal_level",
                Kind::Postgres,
                "minimal: the WAL does not hold what recovery needs",
                "Set wal_level = replica and restart the server.",
            );
        } else {
            self.report.ok("wal_level", wal_level);
        }
        let archive_mode = self.value("SHOW archive_mode").await.unwrap_or_default();
        if archive_mode == "off" && self.streams {
            self.report.ok(ARCHIVE_MODE, "off; `highwater receive` brings all WAL");
        } else if archive_mode == "off" {
            self.report.fail(
                ARCHIVE_MODE,
                Kind::Postgres,
                "off, and no `highwater receive` streams from this server",
                "Set archive_mode = on and restart the server, or start `highwater receive`.",
            );
        } else {
            self.report.ok(ARCHIVE_MODE, archive_mode);
        }
        if self.value("SHOW full_page_writes").await.as_deref() == Some("off") {
            self.report.warn(
                "full_page_writes",
                "off: a torn page in a backup may not be mended by replay",
                "Set full_page_writes = on, unless the file system guarantees whole pages.",
            );
        }
        if self.value("SHOW archive_timeout").await.as_deref() == Some("0")
            && !self.in_recovery
            && !self.streams
        {
            self.report.warn(
                "archive_timeout",
                "0: a quiet server may hold its last commits back for hours, until a segment is full",
                "Set archive_timeout = '60s', or as much as you can afford to lose.",
            );
        }
    }

    async fn archive_command(&mut self) {
        if self.streams && self.value("SHOW archive_mode").await.as_deref() == Some("off") {
            return;
        }
        let library = self.value("SELECT current_setting('archive_library', true)").await;
        if let Some(library) = library.filter(|library| !library.is_empty()) {
            self.report.fail(
                ARCHIVE_COMMAND,
                Kind::Postgres,
                format!("archive_library = '{library}' is used instead of archive_command"),
                "Clear archive_library and set archive_command = 'highwater archive-push %p'.",
            );
            return;
        }
        let command = self.value("SHOW archive_command").await.unwrap_or_default();
        let calls_us = command.contains("archive-push") && command.contains("%p");
        if calls_us {
            self.report.ok(ARCHIVE_COMMAND, command);
        } else {
            let found = match command.as_str() {
                "" | "(disabled)" => "not set".to_owned(),
                other => format!("`{other}` does not call `highwater archive-push %p`"),
            };
            self.report.fail(
                ARCHIVE_COMMAND,
                Kind::Postgres,
                found,
                "Set archive_command = 'highwater archive-push %p' (with the program's full path) and reload the server.",
            );
        }
    }

    async fn archiver(&mut self) {
        let failing = self
            .value(
                "SELECT last_failed_wal FROM pg_stat_archiver WHERE last_failed_time > coalesce(last_archived_time, '-infinity')",
            )
            .await;
        if let Some(wal) = failing {
            self.report.warn(
                "archiver",
                format!("its last attempt failed, at {wal}"),
                "The server's log shows what highwater said. PostgreSQL keeps the WAL and tries again.",
            );
        }
    }

    async fn role(&mut self) {
        let may = self
            .value("SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user")
            .await;
        if may.as_deref() == Some("t") {
            self.report.ok("role", "it may start replication connections");
        } else {
            self.report.fail(
                "role",
                Kind::Postgres,
                "it has no REPLICATION attribute, which base backups need",
                "ALTER ROLE <role> REPLICATION, or connect as another role.",
            );
        }
    }

    async fn clock(&mut self) {
        let before = SystemTime::now();
        let text =
            self.value("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint").await;
        let theirs = text.and_then(|text| text.parse::<i64>().ok());
        let ours = before.duration_since(SystemTime::UNIX_EPOCH).ok();
        let ours = ours.and_then(|since| i64::try_from(since.as_millis()).ok());
        if let (Some(theirs), Some(ours)) = (theirs, ours) {
            let ahead = theirs - ours;
            if ahead.abs() > CLOCK_TOLERANCE_MS {
                self.report.warn(
                    "server's clock",
                    format!("it differs from this host's by {ahead} ms"),
                    "Let both follow a time server (NTP). Recovery to a time goes by the server's clock.",
                );
            } else {
                self.report.ok("server's clock", "as this host's, within 5 s");
            }
        }
    }
}
