//! The server at the other end: who it is, whether it can be served, and its timeline's history.
//!
//! Shared by the use cases that stream from a server. Never here: which of several servers is taken,
//! and what a use case alone asks of it.

use super::failures::{of_postgres, of_repo};
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Identity};
use crate::pg::{
    Lsn, SegmentSize, ServerVersion, SystemId, Timeline, TimelineHistory, WalFileName,
};
use crate::repo::Repository;
use crate::walsender::{ConnInfo, Connection, Mode, PgError};

/// The oldest major version that is supported.
pub(super) const MAJOR_MIN: u32 = 14;

/// What a server says of itself on a replication connection.
#[derive(Debug, Clone)]
pub(super) struct ServerFacts {
    pub(super) system_id: SystemId,
    pub(super) timeline: Timeline,
    /// The end of its WAL when it was asked.
    pub(super) flush_lsn: Lsn,
    pub(super) version: ServerVersion,
    pub(super) segment_size: SegmentSize,
    pub(super) in_recovery: bool,
    pub(super) archive_mode: String,
    pub(super) wal_level: String,
    /// As SHOW prints it.
    pub(super) wal_sender_timeout: String,
    /// Where it is, for people.
    pub(super) place: String,
    /// How to reach this very server.
    pub(super) server: ConnInfo,
}

/// Connects for replication and asks the server what it is. `what` and `unharmed` are said if that fails.
///
/// # Errors
/// [`Kind::Postgres`]: it cannot be reached, refuses us, is too old or is not PostgreSQL.
pub(super) async fn connect(
    server: ConnInfo,
    what: &str,
    unharmed: &str,
) -> Result<(Connection, ServerFacts), Failure> {
    let failed = |error: PgError| of_postgres(error, what, unharmed);
    let mut connection = Connection::connect(&server, Mode::Replication).await.map_err(failed)?;
    let version = ServerVersion(connection.server_version_num());
    check_version("server", version.major().0, unharmed)?;
    let system = connection.identify_system().await.map_err(failed)?;
    let mut show = async |name: &str| connection.show(name).await.map_err(failed);
    let size = show("wal_segment_size").await?;
    let archive_mode = show("archive_mode").await?;
    let wal_level = show("wal_level").await?;
    let wal_sender_timeout = show("wal_sender_timeout").await?;
    let segment_size = SegmentSize::parse_setting(&size).ok_or_else(|| {
        Failure::new(
            Kind::Postgres,
            format!("the server says that its wal_segment_size is `{size}`"),
            unharmed,
            "Check that the address is PostgreSQL's own and not a pooler's.",
        )
    })?;
    let facts = ServerFacts {
        system_id: system.system_id,
        timeline: system.timeline,
        flush_lsn: system.flush_lsn,
        version,
        segment_size,
        in_recovery: connection.parameter("in_hot_standby") == Some("on"),
        archive_mode,
        wal_level,
        wal_sender_timeout,
        place: connection.place().to_owned(),
        server,
    };
    Ok((connection, facts))
}

/// Refuses what is older than the oldest supported version; `whose` is "server" or "cluster".
pub(super) fn check_version(whose: &str, major: u32, unharmed: &str) -> Result<(), Failure> {
    if major >= MAJOR_MIN {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Postgres,
        format!("the {whose} is PostgreSQL {major}, and {MAJOR_MIN} is the oldest supported"),
        unharmed,
        "Upgrade the server; its own community has ended support for it too.",
    ))
}

/// Refuses a cluster whose segments have another size than those that are stored: `whose` is "server"
/// or "cluster".
pub(super) fn check_segment_size(
    whose: &str,
    segment_size: SegmentSize,
    identity: &Identity,
    unharmed: &str,
) -> Result<(), Failure> {
    if segment_size == identity.segment_size {
        return Ok(());
    }
    Err(Failure::new(
        Kind::Conflict,
        format!(
            "the {whose} has WAL segments of {segment_size}, and this place was set up for {}",
            identity.segment_size
        ),
        unharmed,
        "pg_resetwal has changed the segment size. Set up a new place with `highwater init` under another cluster name.",
    ))
}

/// Reads a timeline's history from the server and stores its file, unless it is stored already.
///
/// PostgreSQL archives it once, at the promotion: a cluster whose archiving began later would have WAL and
/// backups on a timeline that no recovery finds its way to.
///
/// # Errors
/// [`Kind::Integrity`] for a file that makes no sense, which is not stored; otherwise the server's or the store's.
pub(super) async fn store_history(
    repository: &Repository,
    connection: &mut Connection,
    of: (SystemId, Timeline),
    codec: Codec,
    unharmed: &str,
) -> Result<TimelineHistory, Failure> {
    let (system_id, timeline) = of;
    if timeline == Timeline::FIRST {
        return Ok(TimelineHistory::first());
    }
    let file = connection.timeline_history(timeline).await.map_err(|error| {
        of_postgres(error, format!("could not read the history of timeline {timeline}"), unharmed)
    })?;
    let history = TimelineHistory::parse(timeline, &file.content).map_err(|error| {
        Failure::new(
            Kind::Integrity,
            format!("the server's history of timeline {timeline} makes no sense"),
            unharmed,
            "Look at the file in the server's pg_wal directory.",
        )
        .because(error)
    })?;
    let name = WalFileName::History(timeline);
    match repository.put_small(system_id, name, &file.content, codec).await {
        Ok(_) => Ok(history),
        Err(error) => {
            let what = format!("could not store the history of timeline {timeline}");
            Err(of_repo(error, what, unharmed))
        }
    }
}
