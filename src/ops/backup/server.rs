//! Choosing the server that gives the backup, and refusing one that cannot.

use std::time::Duration;

use tokio::time::Instant;

use super::{Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::Identity;
use crate::ops::failures::of_repo;
pub(super) use crate::ops::server_facts::ServerFacts as Facts;
use crate::ops::server_facts::{self, check_segment_size};
use crate::repo::Repository;
use crate::walsender::{ConnInfo, Connection};

/// How long a receiver has to store some of the server's latest WAL, and how often is looked.
const RECEIVER_SHOWS_WITHIN: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A server that is connected.
pub(super) struct Server {
    pub(super) connection: Connection,
    pub(super) facts: Facts,
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

async fn connect(server: &ConnInfo) -> Result<Server, Failure> {
    let what = "could not connect for a base backup";
    let (connection, facts) = server_facts::connect(server.clone(), what, UNHARMED).await?;
    Ok(Server { connection, facts })
}

/// Refuses a server whose backup could not be used.
pub(super) fn check_fit(facts: &Facts, identity: &Identity) -> Result<(), Failure> {
    check_segment_size("server", facts.segment_size, identity, UNHARMED)?;
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
