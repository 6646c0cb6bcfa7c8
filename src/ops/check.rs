//! `check`: prove the whole path, each finding with its remedy.
//!
//! Repository, identity, server, role, replication line and archiver are looked
//! at one after another; then a WAL switch is forced and that very segment is
//! waited for. A finding never stops the next look unless nothing is left to look at.

use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use super::failures::{kind_of_repo, next_of_repo};
use crate::failure::Kind;
use crate::format::{Identity, WalObject};
use crate::pg::{Lsn, SegmentName, SegmentSize, ServerVersion, SystemId, Timeline, WalFileName};
use crate::repo::Repository;
use crate::store::open::probe;
use crate::walsender::{ConnInfo, Connection, Mode, PgError};

/// The pause between two looks for the forced segment.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Clocks that differ by more than this make times in reports confusing.
const CLOCK_TOLERANCE_MS: i64 = 5_000;

/// The oldest major version that is supported.
const MAJOR_MIN: u32 = 14;

const ARCHIVE_COMMAND: &str = "archive_command";
const ARCHIVE_MODE: &str = "archive_mode";
const SERVERS_IDENTITY: &str = "server's identity";
const SEGMENT_ARRIVES: &str = "segment arrives";

/// Without these no segment comes, and waiting for one would tell nothing more.
const ARRIVAL_NEEDS: [&str; 3] = [ARCHIVE_COMMAND, ARCHIVE_MODE, SERVERS_IDENTITY];

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The server.
    pub server: ConnInfo,
    /// How long to wait for the forced segment.
    pub wait: Duration,
    /// Do not force a WAL switch.
    pub no_switch: bool,
}

/// How a finding turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, but not as well as it could.
    Warning,
    /// It must be mended.
    Failed,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What.
    pub name: &'static str,
    /// How it turned out.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it; empty when nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
    #[serde(skip)]
    kind: Option<Kind>,
}

/// Everything that was looked at, in order.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The findings.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Returns the exit code's meaning: that of the first failed finding.
    pub fn failed(&self) -> Option<Kind> {
        self.findings.iter().find_map(|finding| finding.kind)
    }

    fn has_failed(&self, names: &[&str]) -> bool {
        self.findings
            .iter()
            .any(|finding| finding.status == Status::Failed && names.contains(&finding.name))
    }

    fn ok(&mut self, name: &'static str, found: impl Into<String>) {
        let (found, remedy) = (found.into(), String::new());
        self.findings.push(Finding { name, status: Status::Ok, found, remedy, kind: None });
    }

    fn warn(&mut self, name: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        let (found, remedy) = (found.into(), remedy.into());
        self.findings.push(Finding { name, status: Status::Warning, found, remedy, kind: None });
    }

    fn fail(
        &mut self,
        name: &'static str,
        kind: Kind,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let (found, remedy, kind) = (found.into(), remedy.into(), Some(kind));
        self.findings.push(Finding { name, status: Status::Failed, found, remedy, kind });
    }
}

/// Looks at everything.
pub async fn run(repository: &Repository, request: &Request) -> Report {
    let mut report = Report::default();
    look_at_store(repository, &mut report).await;
    let identity = look_at_identity(repository, &mut report).await;
    let connection = match Connection::connect(&request.server, Mode::Sql).await {
        Ok(connection) => connection,
        Err(error) => {
            report.fail(
                "connection",
                Kind::Postgres,
                error.to_string(),
                "Check that the server runs, `--dsn` or the PG* variables, and a line for this role and database in pg_hba.conf.",
            );
            return report;
        }
    };
    let mut server = Server { connection, report, in_recovery: false };
    server.look(identity.as_ref()).await;
    let Server { mut connection, mut report, in_recovery } = server;
    look_at_replication(&request.server, identity.as_ref(), &mut report).await;
    match identity {
        _ if request.no_switch => {}
        _ if report.has_failed(&ARRIVAL_NEEDS) => report.warn(
            SEGMENT_ARRIVES,
            "not tried: after the failures above nothing could arrive",
            "Mend them, then run `check` again.",
        ),
        _ if in_recovery => report.ok(
            SEGMENT_ARRIVES,
            "the server is a standby, which cannot end a segment; run `check` on the primary too",
        ),
        Some(identity) => {
            force_switch(repository, request, &identity, &mut connection, &mut report).await;
        }
        None => {}
    }
    connection.close().await;
    report
}

async fn look_at_store(repository: &Repository, report: &mut Report) {
    let found = probe(&**repository.store(), &super::nonce(), SystemTime::now()).await;
    let mut sound = true;
    for (step, result) in found.steps {
        let Err(error) = result else { continue };
        sound = false;
        let mut text = format!("cannot {}: {error}", step.title());
        let mut cause = std::error::Error::source(&error);
        while let Some(deeper) = cause {
            text = format!("{text}: {deeper}");
            cause = deeper.source();
        }
        let remedy = if found.conditional_put == Some(false) {
            "If only one host ever writes here, set the store option `conditional_put = \"off\"`; otherwise use a store that honours conditional puts."
        } else {
            "Check repository URL, store options and credentials; they must allow reading, writing, listing and deleting."
        };
        report.fail("store", Kind::Store, text, remedy);
    }
    if sound {
        report.ok(
            "store",
            format!("{} can be written once, read, listed and deleted from", repository.describe()),
        );
    }
    match found.clock_ahead_ms {
        Some(ahead) if ahead.abs() > CLOCK_TOLERANCE_MS => report.warn(
            "store's clock",
            format!("it differs from this host's by {ahead} ms"),
            "Let both follow a time server (NTP); signed requests fail when they differ by minutes.",
        ),
        _ => {}
    }
}

async fn look_at_identity(repository: &Repository, report: &mut Report) -> Option<Identity> {
    match repository.identities().await {
        Ok(identities) => {
            let owner = crate::repo::claim_of(&identities).cloned();
            match &owner {
                Some(owner) => report.ok(
                    "identity",
                    format!(
                        "`{}` belongs to the cluster with system identifier {}",
                        repository.cluster(),
                        owner.system_identifier
                    ),
                ),
                None => report.fail(
                    "identity",
                    Kind::Usage,
                    format!("`{}` was never set up here", repository.cluster()),
                    "Run `highwater init` once for this cluster.",
                ),
            }
            owner
        }
        Err(error) => {
            let (kind, remedy) = (kind_of_repo(&error), next_of_repo(&error));
            report.fail("identity", kind, error.to_string(), remedy);
            None
        }
    }
}

/// A server that is being looked at.
struct Server {
    connection: Connection,
    report: Report,
    in_recovery: bool,
}

impl Server {
    async fn look(&mut self, identity: Option<&Identity>) {
        self.version();
        self.owner(identity).await;
        self.in_recovery = self.value("SELECT pg_is_in_recovery()").await.as_deref() == Some("t");
        self.settings().await;
        self.archive_command().await;
        self.archiver().await;
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
        if archive_mode == "off" {
            self.report.fail(
                ARCHIVE_MODE,
                Kind::Postgres,
                "off",
                "Set archive_mode = on and restart the server.",
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
        if self.value("SHOW archive_timeout").await.as_deref() == Some("0") && !self.in_recovery {
            self.report.warn(
                "archive_timeout",
                "0: a quiet server may hold its last commits back for hours, until a segment is full",
                "Set archive_timeout = '60s', or as much as you can afford to lose.",
            );
        }
    }

    async fn archive_command(&mut self) {
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

async fn look_at_replication(server: &ConnInfo, identity: Option<&Identity>, report: &mut Report) {
    let asked = async {
        let mut connection = Connection::connect(server, Mode::Replication).await?;
        let system = connection.identify_system().await?;
        let senders = connection.show("max_wal_senders").await?;
        connection.close().await;
        Ok::<_, PgError>((system, senders))
    };
    match asked.await {
        Ok((system, senders)) => {
            let other = identity.filter(|known| known.system_identifier != system.system_id);
            match other {
                Some(_) => report.fail(
                    "replication connection",
                    Kind::Conflict,
                    "it reaches another cluster than the ordinary connection",
                    "Check the addresses in `--dsn`.",
                ),
                None => report.ok(
                    "replication connection",
                    format!("granted; max_wal_senders = {senders}"),
                ),
            }
        }
        Err(error) => report.fail(
            "replication connection",
            Kind::Postgres,
            error.to_string(),
            "Add `host replication <role> <address> scram-sha-256` (or `local replication <role> peer`) to pg_hba.conf and reload; a line for `all` does not cover replication.",
        ),
    }
}

/// Ends the current segment on the server and waits for it in the repository.
async fn force_switch(
    repository: &Repository,
    request: &Request,
    identity: &Identity,
    connection: &mut Connection,
    report: &mut Report,
) {
    const NAME: &str = SEGMENT_ARRIVES;
    let segment = match switch(connection, identity.segment_size).await {
        Ok(Some(segment)) => segment,
        Ok(None) => {
            report.fail(
                NAME,
                Kind::Postgres,
                "the server's answer to pg_switch_wal() makes no sense",
                "Check that the address is PostgreSQL's own and not a pooler's.",
            );
            return;
        }
        Err(error) => {
            report.fail(
                NAME,
                Kind::Postgres,
                format!("could not force a WAL switch: {error}"),
                "GRANT EXECUTE ON FUNCTION pg_switch_wal() TO <role>, or run with `--no-switch`.",
            );
            return;
        }
    };
    let object = WalObject::File(WalFileName::Segment(segment));
    let key = repository.wal_key(identity.system_identifier, object);
    let began = Instant::now();
    loop {
        match repository.header(&key).await {
            Ok(_) => {
                let seconds = began.elapsed().as_secs_f64();
                report.ok(NAME, format!("{segment} was in the repository after {seconds:.1} s"));
                return;
            }
            // A large segment is stored as pieces.
            Err(error) if error.is_absent() => {
                if is_complete(repository, identity, segment).await {
                    report.ok(NAME, format!("{segment} is in the repository"));
                    return;
                }
            }
            Err(error) => {
                report.fail(NAME, kind_of_repo(&error), error.to_string(), next_of_repo(&error));
                return;
            }
        }
        if began.elapsed() >= request.wait {
            report.fail(
                NAME,
                Kind::Integrity,
                format!("{segment} did not arrive within {} s", request.wait.as_secs()),
                "The server's log shows what archive_command said. Check that the server's own environment (not your shell's) has the repository's settings and credentials.",
            );
            return;
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

async fn is_complete(repository: &Repository, identity: &Identity, segment: SegmentName) -> bool {
    let size = identity.segment_size;
    let Some(start) = segment.start_lsn(size) else { return false };
    let end = Lsn(start.0 + size.bytes());
    let found = repository.wal_between(identity.system_identifier, size, start, end).await;
    found.is_ok_and(|inventory| {
        let ranges = inventory.timelines.get(&segment.timeline).map(|wal| wal.ranges.clone());
        ranges.unwrap_or_default().iter().any(|range| range.0 <= start && end <= range.1)
    })
}

/// Writes a little WAL, so that there is something to archive, and ends the segment.
async fn switch(
    connection: &mut Connection,
    size: SegmentSize,
) -> Result<Option<SegmentName>, PgError> {
    connection.query("SELECT txid_current()").await?;
    let rows = connection
        .query("SELECT s AS lsn, substr(pg_walfile_name(s), 1, 8) AS timeline FROM pg_switch_wal() AS s")
        .await?;
    let lsn = rows.get(0, "lsn").and_then(|text| text.parse::<Lsn>().ok());
    let timeline = rows.get(0, "timeline").and_then(|text| u32::from_str_radix(text, 16).ok());
    let (Some(lsn), Some(timeline)) = (lsn, timeline) else { return Ok(None) };
    Ok(Some(SegmentName::new(Timeline(timeline), size.segment_before(lsn), size)))
}
