//! Where new WAL joins what is stored: right before it the server must have what is stored there.
//!
//! A server that was put back to an earlier state without recovery goes on under the same timeline, and writes other WAL at
//! positions that are stored. Within a segment the session compares every stored byte with the server's; where a stream
//! begins at a segment's border it would compare none, so the end of the segment before is compared here:
//!
//! ```text
//!   stored   … | segment before  [ up to 128 KiB, and the last page that holds something ] 0 0 0 |
//!   server   … |                 [ the same bytes?                                       ]       | stream from here
//! ```

use super::UNHARMED;
use super::source::{Facts, connect_aside};
use super::troubles::diverges;
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::ops::failures::{kind_of_repo, of_postgres, of_repo};
use crate::pg::{Lsn, SegmentName, Timeline, TimelineHistory};
use crate::plan::receive::Start;
use crate::repo::{Repository, StoredTail};
use crate::walsender::{PgError, StreamEvent, StreamStart};

/// A stretch of stored WAL.
struct Stretch {
    timeline: Timeline,
    start_lsn: Lsn,
    bytes: Vec<u8>,
}

/// Fails if the server's WAL right before `start` is not what is stored there, as far as both have it.
pub(super) async fn check(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    start: Start,
) -> Result<(), Failure> {
    if start.first_missing != start.lsn {
        return Ok(());
    }
    let Some(stored) = stored_before(repository, facts, history, start.lsn).await? else {
        return Ok(());
    };
    match sent(facts, &stored).await {
        Ok(Some(sent)) if sent != stored.bytes => {
            let end = Lsn(stored.start_lsn.0 + stored.bytes.len() as u64);
            Err(diverges(facts, &format!(" between {} and {end}", stored.start_lsn)))
        }
        Ok(_) => Ok(()),
        Err(error) if error.is_without_room() => {
            tracing::warn!(
                "whether this server is the one whose WAL is stored before {} could not be told, since it takes no second connection: {error}. Raise max_wal_senders",
                start.lsn
            );
            Ok(())
        }
        Err(error) => Err(of_postgres(error, "could not compare stored WAL", UNHARMED)),
    }
}

/// Returns the end of what is stored before `lsn`, a segment's border, with its last record; `None` where not all of that
/// segment is stored, or it cannot be read.
async fn stored_before(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    lsn: Lsn,
) -> Result<Option<Stretch>, Failure> {
    let size = facts.segment_size;
    let Some(number) = size.segment_of(lsn).checked_sub(1) else { return Ok(None) };
    let timeline = history.owner_of(Lsn(lsn.0 - 1));
    let segment = SegmentName::new(timeline, number, size);
    match repository.stored_tail(facts.system_id, segment, size).await {
        Ok(tail) => Ok(tail.map(|StoredTail { offset, bytes }| {
            let start_lsn = Lsn(size.start_of(number).0 + offset);
            Stretch { timeline, start_lsn, bytes }
        })),
        Err(error) if kind_of_repo(&error) == Kind::Store => {
            Err(of_repo(error, "could not read stored WAL", UNHARMED))
        }
        // An old object that cannot be read must not keep new ones from being stored.
        Err(error) => {
            tracing::error!(
                "whether this server is the one whose WAL is stored before {lsn} could not be told: {}",
                in_one_line(&error)
            );
            Ok(None)
        }
    }
}

/// Asks the server for the same stretch; `None` where it has not all of it.
async fn sent(facts: &Facts, stored: &Stretch) -> Result<Option<Vec<u8>>, PgError> {
    let connection = connect_aside(facts).await?;
    let start = StreamStart { slot: None, start_lsn: stored.start_lsn, timeline: stored.timeline };
    let mut stream = match connection.stream_wal(&start).await {
        Ok(stream) => stream,
        Err(error) if error.is_wal_removed() => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    while bytes.len() < stored.bytes.len() {
        match stream.next().await {
            Ok(StreamEvent::Wal { data, .. }) => bytes.extend_from_slice(&data),
            Ok(StreamEvent::Keepalive { .. }) => {}
            Ok(StreamEvent::TimelineEnd { .. } | StreamEvent::ServerStopped) => return Ok(None),
            Err(error) if error.is_wal_removed() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(stored.bytes.len());
    // Only a matter of good manners.
    drop(stream.stop().await);
    Ok(Some(bytes))
}
