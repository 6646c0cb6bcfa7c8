//! Choosing the server that gives the backup, and refusing one that cannot.

use std::time::Duration;

use tokio::time::Instant;

use super::{Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Identity};
use crate::ops::failures::{of_postgres, of_repo};
use crate::pg::{Lsn, SegmentSize, ServerVersion, SystemId, Timeline, WalFileName};
use crate::repo::Repository;
use crate::walsender::{ConnInfo, Connection, Mode, PgError};

/// The oldest major version that is supported.
const MAJOR_MIN: u32 = 14;

/// How long a receiver has to store some of the server's latest WAL, and how often is looked.
const RECEIVER_SHOWS_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A server that is connected.
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) facts: Facts,
}

/// What the server says of itself.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) system_id: SystemId,
    pub(super) timeline: Timeline,
    /// The end of its WAL when it was asked.
    pub(super) flush_lsn: Lsn,
    pub(super) version: ServerVersion,
    pub(super) segment_size: SegmentSize,
    pub(super) in_recovery: bool,
    pub(super) archive_mode: String,
    pub(super) wal_level: String,
    pub(super) place: String,
}

/// Connects to the server that shall give the backup.
pub(super) async fn choose(request: &Request) -> Result<Server, Failure> {
    if !request.prefer_standby {
        return connect(&request.server).await;
    }
    let mut fallback: Option<Server> = None;
    let mut last_failure = None;
    for host in request.server.each_host() {
        match connect(&host).await {
            Ok(server) if server.facts.in_recovery => return Ok(server),
            Ok(server) => fallback = fallback.or(Some(server)),
            Err(failure) => {
                tracing::warn!("{failure}");
                last_failure = Some(failure);
            }
        }
    }
    match (fallback, last_failure) {
        (Some(server), _) => {
            tracing::warn!("no standby is fit; the backup is taken from {}", server.facts.place);
            Ok(server)
        }
        (None, Some(failure)) => Err(failure),
        (None, None) => connect(&request.server).await,
    }
}

async fn connect(info: &ConnInfo) -> Result<Server, Failure> {
    let failed =
        |error: PgError| of_postgres(error, "could not connect for a base backup", UNHARMED);
    let mut connection = Connection::connect(info, Mode::Replication).await.map_err(failed)?;
    let version = ServerVersion(connection.server_version_num());
    if version.major().0 < MAJOR_MIN {
        return Err(Failure::new(
            Kind::Postgres,
            format!("the server is PostgreSQL {version}, and {MAJOR_MIN} is the oldest supported"),
            UNHARMED,
            "Upgrade the server; its own community has ended support for it too.",
        ));
    }
    let system = connection.identify_system().await.map_err(failed)?;
    let mut show = async |name: &str| -> Result<String, Failure> {
        connection.show(name).await.map_err(failed)
    };
    let size = show("wal_segment_size").await?;
    let archive_mode = show("archive_mode").await?;
    let wal_level = show("wal_level").await?;
    let segment_size = SegmentSize::parse_setting(&size).ok_or_else(|| {
        Failure::new(
            Kind::Postgres,
            format!("the server says that its wal_segment_size is `{size}`"),
            UNHARMED,
            "Check that the address is PostgreSQL's own and not a pooler's.",
        )
    })?;
    let in_recovery = connection.parameter("in_hot_standby") == Some("on");
    let place = connection.place().to_owned();
    let facts = Facts {
        system_id: system.system_id,
        timeline: system.timeline,
        flush_lsn: system.flush_lsn,
        version,
        segment_size,
        in_recovery,
        archive_mode,
        wal_level,
        place,
    };
    Ok(Server { connection, facts })
}

/// Stores the history file of the server's timeline, if it is not stored yet.
///
/// PostgreSQL archives it once, at the promotion. A cluster whose archiving began later would
/// have backups on a timeline that no recovery finds its way to.
pub(super) async fn store_history(
    server: &mut Server,
    repository: &Repository,
    codec: Codec,
) -> Result<(), Failure> {
    let timeline = server.facts.timeline;
    if timeline == Timeline::FIRST {
        return Ok(());
    }
    let file = server.connection.timeline_history(timeline).await.map_err(|error| {
        of_postgres(error, format!("could not read the history of timeline {timeline}"), UNHARMED)
    })?;
    let stored = repository
        .put_small(server.facts.system_id, WalFileName::History(timeline), &file.content, codec)
        .await;
    stored.map(drop).map_err(|error| {
        of_repo(error, format!("could not store the history of timeline {timeline}"), UNHARMED)
    })
}

/// Refuses a server whose backup could not be used.
pub(super) fn check_fit(facts: &Facts, identity: &Identity) -> Result<(), Failure> {
    if facts.segment_size != identity.segment_size {
        return Err(Failure::new(
            Kind::Conflict,
            format!(
                "the server has WAL segments of {}, and this place was set up for {}",
                facts.segment_size, identity.segment_size
            ),
            UNHARMED,
            "pg_resetwal has changed the segment size. Set up a new place with `highwater init` under another cluster name.",
        ));
    }
    if facts.wal_level == "minimal" {
        return Err(Failure::new(
            Kind::Postgres,
            "the server runs with wal_level = minimal, with which no backup can be restored",
            UNHARMED,
            "Set wal_level = replica in postgresql.conf and restart the server.",
        ));
    }
    Ok(())
}

/// Refuses a server whose WAL comes by no way: it does not archive, and nobody streams it into the
/// repository. A receiver has some time to show itself: it stores WAL only every so often, and has perhaps just begun.
pub(super) async fn check_wal_comes(facts: &Facts, repository: &Repository) -> Result<(), Failure> {
    if facts.archive_mode != "off" || facts.in_recovery {
        return Ok(());
    }
    let size = facts.segment_size;
    let recent = size.start_of(size.segment_of(facts.flush_lsn).saturating_sub(1));
    let deadline = Instant::now() + RECEIVER_SHOWS_WITHIN;
    loop {
        let stored =
            repository
                .wal_between(facts.system_id, size, recent, facts.flush_lsn)
                .await
                .map_err(|error| of_repo(error, "could not look for the server's WAL", UNHARMED))?;
        let coverage = stored.coverage();
        let ranges = coverage.get(&facts.timeline).map(Vec::as_slice).unwrap_or_default();
        if ranges.iter().any(|(_, end)| *end > recent) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(no_way_for_wal());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn no_way_for_wal() -> Failure {
    Failure::new(
        Kind::Postgres,
        "archive_mode is off on the server and `highwater receive` has stored none of its latest WAL: the WAL that makes a backup usable would never arrive",
        UNHARMED,
        "Start `highwater receive`, or set archive_mode = on and archive_command = 'highwater archive-push %p' and restart the server; then run `highwater check`.",
    )
}
