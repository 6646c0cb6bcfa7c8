//! `check`: prove the whole path, each finding with its remedy.
//!
//! Repository, identity, server, role, replication line and archiver are looked
//! at one after another; then a WAL switch is forced and that very segment is
//! waited for. A finding never stops the next look unless nothing is left to look at.

mod receiving;
mod server;
mod stalling;

use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

pub use self::receiving::Expected;
use self::server::Server;
use super::failures::{kind_of_repo, next_of_repo};
use super::stall::Stall;
use crate::causes::in_one_line;
use crate::failure::Kind;
use crate::format::{DrillOutcome, Identity, WalObject};
use crate::pg::{Lsn, SegmentName, SegmentSize, Timeline, WalFileName};
use crate::plan::retention::Policy;
use crate::repo::Repository;
use crate::store::open::probe;
use crate::walsender::{ConnInfo, Connection, Mode, PgError};

/// The pause between two looks for the forced segment.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Clocks that differ by more than this make times in reports confusing.
const CLOCK_TOLERANCE_MS: i64 = 5_000;

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
    /// The receiver as it would run with these settings.
    pub receiver: Expected,
    /// What `expire` would keep with these settings.
    pub retention: Policy,
    /// What is set for a store that is away.
    pub stall: Option<Stall>,
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
    if repository.is_encrypted() && identity.is_some() {
        look_at_keys(repository, &mut report).await;
    }
    judge_retention(&request.retention, &mut report);
    stalling::look_at_stall(request.stall.as_ref(), &mut report);
    if identity.is_some() {
        look_at_drills(repository, &mut report).await;
    }
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
    let mut server = Server { connection, report, in_recovery: false, streams: false };
    server.look(identity.as_ref(), &request.receiver).await;
    let Server { mut connection, mut report, in_recovery, .. } = server;
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

/// When it was last proved that what is stored comes back.
async fn look_at_drills(repository: &Repository, report: &mut Report) {
    let name = "drill";
    let last = match repository.last_drill().await {
        Ok(last) => last,
        Err(error) => return report.warn(name, error.to_string(), next_of_repo(&error)),
    };
    let Some(last) = last else {
        return report.ok(
            name,
            "none was done yet; `highwater drill` restores, starts and asks a copy, and tells how long that takes",
        );
    };
    let found = format!("the last one, of {}, {}", last.finished_at, last.outcome.word());
    if last.outcome == DrillOutcome::Passed {
        report.ok(name, found);
    } else {
        let remedy = "`highwater info` tells why; mend that, and run `highwater drill` again.";
        report.warn(name, found, remedy);
    }
}

fn judge_retention(policy: &Policy, report: &mut Report) {
    if policy.is_set() {
        return report.ok("retention", "set; `info` tells what it keeps");
    }
    report.warn(
        "retention",
        "none is set here, so that nothing is ever deleted and the repository only grows",
        "Say what is to be kept, such as `retain_window = \"30d\"`, and run `highwater expire` once a day; it changes nothing with `--dry-run`. Rules of the bucket cannot do it: they do not know what backups share.",
    );
}

async fn look_at_store(repository: &Repository, report: &mut Report) {
    let found = probe(&**repository.store(), &super::nonce(), SystemTime::now()).await;
    let mut sound = true;
    for (step, result) in found.steps {
        let Err(error) = result else { continue };
        sound = false;
        let text = format!("cannot {}: {}", step.title(), in_one_line(&error));
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

/// Who can open what is stored: one key that is lost must not be all there is.
async fn look_at_keys(repository: &Repository, report: &mut Report) {
    let name = "encryption";
    let ring = match repository.key_ring().await {
        Ok(ring) => ring,
        Err(error) => {
            let (kind, remedy) = (kind_of_repo(&error), next_of_repo(&error));
            return report.fail(name, kind, error.to_string(), remedy);
        }
    };
    let keys = ring.user_keys().len();
    let found = format!("repository key {} is in use, and {keys} user keys open it", ring.in_use());
    if let Some(closed) = ring.not_opened().first() {
        let remedy = "Set a key that opens everything, or have this one added by who holds such a key: `highwater key add`.";
        report.warn(name, format!("the key that is set does not open {closed}"), remedy);
    } else if keys == 1 {
        let remedy = "Add a second one and keep it elsewhere (`highwater key new`, `highwater key add`): without a key nothing can be read, by anybody.";
        let found =
            format!("repository key {} is in use, and one user key opens it", ring.in_use());
        report.warn(name, found, remedy);
    } else {
        report.ok(name, found);
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
