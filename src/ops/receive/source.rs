//! Choosing the server to follow and the place to begin, and refusing what would do harm.

use std::collections::{BTreeMap, BTreeSet};

use super::line::silence_max;
use super::unfinished::{Before, Left};
use super::{Request, UNHARMED, joint};
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Identity};
use crate::ops::claimed_identity;
use crate::ops::failures::{of_postgres, of_repo};
pub(super) use crate::ops::server_facts::ServerFacts as Facts;
use crate::ops::server_facts::{check_segment_size, connect, store_history};
use crate::ops::slot_view::view_slot;
use crate::ops::wal_times::histories_of;
use crate::pg::{Lsn, SegmentName, SystemId, Timeline, TimelineHistory};
use crate::plan::lineage::holes;
use crate::plan::receive::{
    AHEAD_SEGMENTS, Situation, Start, start_after_gap, start_at_switch, start_of, superseded_by,
};
use crate::repo::{Repository, WalInventory};
use crate::walsender::{ConnInfo, Connection, Mode, PgError, SlotName, SlotState, StreamStart};

/// Segments before the first missing byte whose names are made durable: as many as a receiver has in hand at a time.
const SETTLED_SEGMENTS: u64 = AHEAD_SEGMENTS + 1;

/// Of how many segments it is remembered that their pieces were compared.
const COMPARED_MAX: usize = 256;

/// What we are called where only a little WAL is asked for.
const ASIDE: &str = "highwater aside";

/// A connected server and where streaming from it begins.
pub(super) struct Source {
    pub(super) connection: Connection,
    pub(super) facts: Facts,
    pub(super) start: Start,
    /// Pieces that are not needed any more.
    pub(super) left: Left,
}

/// What earlier streams have stored: saves listing the whole archive at each reconnection.
#[derive(Debug, Default)]
pub(super) struct Memory {
    /// The end of unbroken stored WAL, and the timeline on which it was streamed.
    stored: Option<(Timeline, Lsn)>,
    /// The server said that it has not the WAL any more that we asked for.
    pub(super) wal_removed: bool,
    /// The server said that the slot protects nothing any more.
    pub(super) slot_lost: bool,
    /// Segments whose pieces were compared with their complete objects.
    compared: BTreeSet<SegmentName>,
}

impl Memory {
    /// Takes note of the end of unbroken stored WAL on a timeline.
    pub(super) fn note(&mut self, timeline: Timeline, stored_lsn: Lsn) {
        self.stored = Some((timeline, stored_lsn));
    }

    /// Takes note of segments whose pieces need not be compared; the oldest are forgotten.
    pub(super) fn note_compared(&mut self, segments: BTreeSet<SegmentName>) {
        self.compared.extend(segments);
        while self.compared.len() > COMPARED_MAX {
            self.compared.pop_first();
        }
    }

    /// Returns how much of that lies on this way; `None` where its timeline does not.
    fn stored_on(&self, way: &TimelineHistory) -> Option<Lsn> {
        let (timeline, lsn) = self.stored?;
        if timeline == way.timeline() {
            return Some(lsn);
        }
        way.switch_point(timeline).map(|switch_lsn| lsn.min(switch_lsn))
    }
}

/// Our slot on the server.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// From where on it keeps WAL, as far as that can be known.
    lsn: Option<Lsn>,
    /// Whether it was made just now.
    is_new: bool,
}

/// Finds the server to follow and the first byte to ask it for.
pub(super) async fn choose(
    repository: &Repository,
    request: &Request,
    memory: &mut Memory,
) -> Result<Source, Failure> {
    let Candidate { mut connection, facts } = candidate(repository, request).await?;
    // Before any WAL of the timeline.
    let of = (facts.system_id, facts.timeline);
    let history = store_history(repository, &mut connection, of, request.codec, UNHARMED).await?;
    let slot = ready_slot(request, &mut connection, &facts, memory).await?;
    let resume_lsn = memory.stored_on(&history);
    let inventory = inventory(repository, &facts, resume_lsn, slot.lsn).await?;
    let coverage = inventory.coverage();
    let situation = Situation {
        history: &history,
        coverage: &coverage,
        slot_lsn: slot.lsn,
        slot_is_new: slot.is_new,
        resume_lsn,
        flush_lsn: facts.flush_lsn,
        segment_size: facts.segment_size,
    };
    let start = start_of(&situation);
    let start = if std::mem::take(&mut memory.wal_removed) {
        let number = oldest_segment(&facts, &history, start.lsn).await?;
        let later = start_after_gap(&situation, number);
        let size = facts.segment_size;
        for (from, to) in holes(&history, &coverage, start.first_missing, later.lsn, size) {
            tracing::error!(
                "GAP: WAL from {from} to {to} is neither in the repository nor on the server any more. No moment inside it can be reached, and no backup from before it reaches past it, unless archive_command still brings it. Take a base backup now"
            );
        }
        later
    } else {
        start
    };
    let codec = request.codec;
    let before = Before { facts: &facts, history: &history, inventory: &inventory, lsn: start.lsn };
    let mut left = before.compare(repository, &mut memory.compared).await?;
    left.extend(before.finish(repository, codec).await);
    joint::check(repository, &facts, &history, start).await?;
    settle_before(repository, &facts, &history, start.first_missing).await?;
    let of = (facts.system_id, start.timeline);
    store_ancestors(repository, &mut connection, of, &history, codec).await?;
    Ok(Source { connection, facts, start, left })
}

/// Stores the histories of the timelines between that on which streaming begins and the server's own: WAL of each
/// will come, and whoever looks for the newest timeline stops at the first without a history.
async fn store_ancestors(
    repository: &Repository,
    connection: &mut Connection,
    (system_id, first): (SystemId, Timeline),
    history: &TimelineHistory,
    codec: Codec,
) -> Result<(), Failure> {
    let ancestors = history.ancestors().iter().map(|(timeline, _)| *timeline);
    for timeline in ancestors.filter(|timeline| *timeline >= first) {
        match store_history(repository, connection, (system_id, timeline), codec, UNHARMED).await {
            Ok(_) => {}
            Err(failure) if is_absent_there(&failure) => tracing::warn!(
                "the server has not the history of timeline {timeline} any more; if it is not in the repository either, no recovery finds its way to that timeline alone"
            ),
            Err(failure) => return Err(failure),
        }
    }
    Ok(())
}

/// Returns whether the server says that it has no such file.
fn is_absent_there(failure: &Failure) -> bool {
    let cause = failure.cause.as_deref();
    let error = cause.and_then(|cause| cause.downcast_ref::<PgError>());
    error.is_some_and(PgError::is_file_absent)
}

/// Makes durable what an earlier receiver may have stored in the moment in which it died: as soon as WAL behind it is
/// acknowledged, the server may forget it.
async fn settle_before(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    lsn: Lsn,
) -> Result<(), Failure> {
    let size = facts.segment_size;
    let last = size.segment_of(lsn);
    let numbers = last.saturating_sub(SETTLED_SEGMENTS)..=last;
    let both_ends = |number| {
        let ends = [size.start_of(number), Lsn(size.start_of(number + 1).0 - 1)];
        ends.map(|end| SegmentName::new(history.owner_of(end), number, size))
    };
    let settled = repository.settle_segments(facts.system_id, numbers.flat_map(both_ends)).await;
    settled.map_err(|error| of_repo(error, "could not make stored WAL durable", UNHARMED))
}

/// Returns where to begin on a timeline that was just switched to.
pub(super) async fn at_switch(
    repository: &Repository,
    facts: &Facts,
    timeline: Timeline,
    switch_lsn: Lsn,
    memory: &mut Memory,
) -> Result<Start, Failure> {
    memory.note(timeline, switch_lsn);
    let size = facts.segment_size;
    let lsn = size.start_of(size.segment_of(switch_lsn));
    let inventory = inventory(repository, facts, Some(switch_lsn), Some(lsn)).await?;
    Ok(start_at_switch(&inventory.coverage(), timeline, switch_lsn, size))
}

struct Candidate {
    connection: Connection,
    facts: Facts,
}

/// Looks at every host, and takes the primary on the newest timeline: after a failover the old
/// primary may be up again too.
async fn candidate(repository: &Repository, request: &Request) -> Result<Candidate, Failure> {
    let mut best: Option<Candidate> = None;
    let mut last_failure = None;
    for host in request.server.each_host() {
        match look(repository, request, host).await {
            Ok(found) => {
                let rank = |candidate: &Candidate| {
                    (!candidate.facts.in_recovery, candidate.facts.timeline)
                };
                if best.as_ref().is_none_or(|known| rank(&found) > rank(known)) {
                    best = Some(found);
                }
            }
            Err(failure) => {
                if request.server.host_count() > 1 {
                    tracing::info!("{failure}");
                }
                last_failure = Some(failure);
            }
        }
    }
    match (best, last_failure) {
        (Some(candidate), _) => Ok(candidate),
        (None, Some(failure)) => Err(failure),
        (None, None) => Err(Failure::new(
            Kind::Usage,
            "the connection settings name no server",
            UNHARMED,
            "Name it with `--dsn` or the PG* variables.",
        )),
    }
}

async fn look(
    repository: &Repository,
    request: &Request,
    host: ConnInfo,
) -> Result<Candidate, Failure> {
    let what = "could not connect for streaming";
    let (connection, facts) = connect(host, what, UNHARMED).await?;
    let identity = claimed_identity(repository, facts.system_id, UNHARMED).await?;
    check_fit(request, &facts, &identity)?;
    refuse_old_timeline(repository, request, &facts).await?;
    Ok(Candidate { connection, facts })
}

fn check_fit(request: &Request, facts: &Facts, identity: &Identity) -> Result<(), Failure> {
    check_segment_size("server", facts.segment_size, identity, UNHARMED)?;
    if facts.in_recovery && !request.from_standby {
        return Err(Failure::new(
            Kind::Postgres,
            format!("{} is a standby", facts.place),
            UNHARMED,
            "Name the primary, or all hosts of the cluster: the primary among them is followed. `--from-standby` follows a standby where no primary is to be found.",
        ));
    }
    Ok(())
}

/// An old primary that came back must not be followed instead of the one that replaced it.
async fn refuse_old_timeline(
    repository: &Repository,
    request: &Request,
    facts: &Facts,
) -> Result<(), Failure> {
    let failed = |error| of_repo(error, "could not read the timeline histories", UNHARMED);
    let newer = repository.stored_histories(facts.system_id).await.map_err(failed)?;
    let newer = newer.into_iter().filter(|timeline| *timeline > facts.timeline);
    let histories: BTreeMap<Timeline, TimelineHistory> =
        histories_of(repository, facts.system_id, newer).await.map_err(failed)?;
    let Some((newest, switch_lsn)) = superseded_by(facts.timeline, histories.values()) else {
        return Ok(());
    };
    if request.old_timeline {
        tracing::warn!(
            "{} writes timeline {}, which timeline {newest} replaced at {switch_lsn}; it is followed because `--old-timeline` says so",
            facts.place,
            facts.timeline
        );
        return Ok(());
    }
    Err(Failure::new(
        Kind::Postgres,
        format!(
            "{} still writes timeline {}, which timeline {newest} replaced at {switch_lsn}",
            facts.place, facts.timeline
        ),
        UNHARMED,
        format!(
            "It looks like an old primary that came back after a failover: stop it, or rebuild it as a standby. If timeline {newest} came from a copy, and this server is the real one, run `highwater receive --old-timeline`."
        ),
    ))
}

/// Makes sure that the slot is there and usable; returns what it keeps.
async fn ready_slot(
    request: &Request,
    connection: &mut Connection,
    facts: &Facts,
    memory: &mut Memory,
) -> Result<Slot, Failure> {
    let Some(slot) = &request.slot else { return Ok(Slot::default()) };
    let failed = |error: PgError, what: &str| {
        of_postgres(error, format!("could not {what} replication slot `{slot}`"), UNHARMED)
    };
    if memory.slot_lost {
        tracing::error!(
            "replication slot `{slot}` was invalidated: the server removed WAL that was not stored yet. It is made anew; look at max_slot_wal_keep_size"
        );
        match connection.drop_slot(slot).await {
            Err(error) if !error.is_slot_absent() => return Err(failed(error, "remove")),
            _ => memory.slot_lost = false,
        }
    }
    let mut is_new = false;
    let mut state = connection.read_slot(slot).await.map_err(|error| failed(error, "read"))?;
    if matches!(state, SlotState::Absent | SlotState::Unknown) {
        match connection.create_physical_slot(slot).await {
            Ok(()) => {
                tracing::info!("created replication slot `{slot}` on {}", facts.place);
                is_new = true;
                state = connection.read_slot(slot).await.map_err(|error| failed(error, "read"))?;
            }
            Err(error) if error.is_slot_there_already() => {}
            Err(error) => return Err(failed(error, "create")),
        }
    }
    if let SlotState::Physical { restart_lsn: None, .. } = state {
        // It keeps nothing: it was made without reserving WAL, or the server gave it up.
        tracing::warn!("replication slot `{slot}` keeps no WAL; it is made anew");
        connection.drop_slot(slot).await.map_err(|error| failed(error, "remove"))?;
        connection.create_physical_slot(slot).await.map_err(|error| failed(error, "create"))?;
        is_new = true;
        state = connection.read_slot(slot).await.map_err(|error| failed(error, "read"))?;
    }
    let lsn = match state {
        SlotState::Physical { restart_lsn, .. } => restart_lsn,
        SlotState::Unknown => read_slot_aside(facts, slot).await,
        SlotState::Absent => None,
    };
    Ok(Slot { lsn, is_new })
}

/// Asks PostgreSQL 14 for a slot's position, on an ordinary connection; `None` where that is not allowed.
async fn read_slot_aside(facts: &Facts, slot: &SlotName) -> Option<Lsn> {
    let mut connection = Connection::connect(&facts.server, Mode::Sql).await.ok()?;
    let view = view_slot(&mut connection, slot).await.ok()?;
    connection.close().await;
    view?.restart_lsn
}

/// Lists stored WAL: all of it at first, later only what lies around the known end.
async fn inventory(
    repository: &Repository,
    facts: &Facts,
    stored_lsn: Option<Lsn>,
    slot_lsn: Option<Lsn>,
) -> Result<WalInventory, Failure> {
    let (system_id, size) = (facts.system_id, facts.segment_size);
    let listed = match stored_lsn {
        None => repository.wal_inventory(system_id, size).await,
        Some(stored_lsn) => {
            let from = slot_lsn.map_or(stored_lsn, |slot| slot.min(stored_lsn));
            // The segment before, so that the end of a stretch is seen as one.
            let from = Lsn(from.0.saturating_sub(size.bytes()));
            repository.wal_between(system_id, size, from, facts.flush_lsn.max(stored_lsn)).await
        }
    };
    listed.map_err(|error| of_repo(error, "could not list stored WAL", UNHARMED))
}

/// Finds the oldest segment at or after `from_lsn` that the server still has.
async fn oldest_segment(
    facts: &Facts,
    history: &TimelineHistory,
    from_lsn: Lsn,
) -> Result<u64, Failure> {
    let size = facts.segment_size;
    // `gone` is not there, `there` is: the segment that is being written.
    let (mut gone, mut there) = (size.segment_of(from_lsn), size.segment_of(facts.flush_lsn));
    while gone + 1 < there {
        let middle = gone + (there - gone) / 2;
        let lsn = size.start_of(middle);
        if has_wal(facts, history.owner_of(lsn), lsn).await? {
            there = middle;
        } else {
            gone = middle;
        }
    }
    Ok(there)
}

/// Connects beside the stream, under a name of its own: whoever looks who streams, or waits for whom, must not take it for
/// us.
pub(super) async fn connect_aside(facts: &Facts) -> Result<Connection, PgError> {
    let server = facts.server.clone().with_application_name(ASIDE);
    let mut connection = Connection::connect(&server, Mode::Replication).await?;
    connection.set_silence_limit(Some(silence_max(facts)));
    Ok(connection)
}

/// Asks the server whether it still has the segment that begins at `lsn`, and is complete, on a
/// connection of its own: to ask for it is the only way that every role and version allows.
async fn has_wal(facts: &Facts, timeline: Timeline, lsn: Lsn) -> Result<bool, Failure> {
    let failed = |error: PgError| of_postgres(error, "could not ask the server for WAL", UNHARMED);
    let connection = connect_aside(facts).await.map_err(failed)?;
    let start = StreamStart { slot: None, start_lsn: lsn, timeline };
    let mut stream = match connection.stream_wal(&start).await {
        Ok(stream) => stream,
        Err(error) if error.is_wal_removed() => return Ok(false),
        Err(error) => return Err(failed(error)),
    };
    match stream.next().await {
        Ok(_) => Ok(true),
        Err(error) if error.is_wal_removed() => Ok(false),
        Err(error) => Err(failed(error)),
    }
}
