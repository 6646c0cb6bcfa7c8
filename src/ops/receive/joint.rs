//! Where new WAL joins what is stored: right before it the server must have what is stored there.
//!
//! A server that was put back to an earlier state without recovery goes on under the same timeline, and writes other WAL at
//! positions that are stored. Within a segment the session compares every stored byte with the server's; where a stream
//! begins at a segment's border it would compare none, so the end of the segment before is compared here:
//!
//! ```text
//!   stored   … | segment before  [ compared: up to 128 KiB, the page of the last record included ] 0 0 0 |
//!   server   … |                 [ the same bytes?                                                ]      | stream from here
//! ```

use super::UNHARMED;
use super::line::silence_max;
use super::source::Facts;
use super::troubles::diverges;
use crate::causes::in_one_line;
use crate::failure::Failure;
use crate::format::WalObject;
use crate::ops::failures::{of_postgres, of_repo};
use crate::pg::{Lsn, SegmentName, Timeline, TimelineHistory, WalFileName};
use crate::plan::receive::Start;
use crate::repo::{PIECE_BYTES, RepoError, Repository, WHOLE_SEGMENT_BYTES_MAX};
use crate::walsender::{Connection, PgError, StreamEvent, StreamStart};

/// How much is compared, at most: a last record alone may be the same in two histories by chance.
const COMPARED_BYTES: u64 = 128 << 10;

/// The usual page of WAL. Where pages are larger, a little less than the last record's is compared.
const PAGE_BYTES: u64 = 8 << 10;

/// A stretch of stored WAL.
struct Stretch {
    timeline: Timeline,
    start_lsn: Lsn,
    bytes: Vec<u8>,
}

/// Fails if the server's WAL right before `start` is not what is stored there, as far as both have it. Gives the
/// connection back, idle.
pub(super) async fn check(
    repository: &Repository,
    facts: &Facts,
    history: &TimelineHistory,
    start: Start,
    connection: Connection,
) -> Result<Connection, Failure> {
    if start.first_missing != start.lsn {
        return Ok(connection);
    }
    let Some(stored) = stored_before(repository, facts, history, start.lsn).await? else {
        return Ok(connection);
    };
    let failed = |error| of_postgres(error, "could not compare stored WAL", UNHARMED);
    let (sent, connection) = sent(facts, &stored, connection).await.map_err(failed)?;
    if sent.is_none_or(|sent| sent == stored.bytes) {
        return Ok(connection);
    }
    let end = Lsn(stored.start_lsn.0 + stored.bytes.len() as u64);
    Err(diverges(facts, &format!(" between {} and {end}", stored.start_lsn)))
}

/// Returns the end of what is stored before `lsn`, a segment's border, with its last record; `None` where no complete
/// segment is stored there that can be read.
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
    let (object, object_bytes) = if size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
        let end = u32::from(size);
        (WalObject::Piece { segment, start: end - PIECE_BYTES, end }, u64::from(PIECE_BYTES))
    } else {
        (WalObject::File(WalFileName::Segment(segment)), size.bytes())
    };
    let key = repository.wal_key(facts.system_id, object);
    let mut bytes = Vec::new();
    let fetched = repository.fetch(&key, |block| {
        bytes.extend_from_slice(block);
        Ok(())
    });
    let header = match fetched.await {
        Ok(header) => header,
        Err(error) if error.is_absent() => return Ok(None),
        Err(error @ RepoError::Damaged { .. }) => {
            tracing::error!(
                "{}: whether this server is the one whose WAL is stored before {lsn} could not be told",
                in_one_line(&error)
            );
            return Ok(None);
        }
        Err(error) => return Err(of_repo(error, "could not read stored WAL", UNHARMED)),
    };
    let first_lsn = Lsn(lsn.0 - object_bytes);
    let last_record = header.wal.and_then(|wal| wal.last_record_lsn).unwrap_or(lsn);
    let (from, to) = compared(first_lsn, last_record, lsn);
    let offset = |at: Lsn| usize::try_from(at.0 - first_lsn.0).unwrap_or(usize::MAX);
    let compared = bytes.get(offset(from)..offset(to)).map(<[u8]>::to_vec);
    Ok(compared.map(|bytes| Stretch { timeline, start_lsn: from, bytes }))
}

/// Chooses what to compare of the WAL from `first` to `end`: up to the end of the page on which the last record begins.
fn compared(first: Lsn, last_record: Lsn, end: Lsn) -> (Lsn, Lsn) {
    let to = Lsn((last_record.0 / PAGE_BYTES + 1) * PAGE_BYTES).min(end);
    (Lsn(to.0.saturating_sub(COMPARED_BYTES)).max(first), to)
}

/// Asks the server for the same stretch; `None` where it has not all of it.
async fn sent(
    facts: &Facts,
    stored: &Stretch,
    mut connection: Connection,
) -> Result<(Option<Vec<u8>>, Connection), PgError> {
    connection.set_silence_limit(Some(silence_max(facts)));
    let start = StreamStart { slot: None, start_lsn: stored.start_lsn, timeline: stored.timeline };
    let mut stream = connection.stream_wal(&start).await?;
    let mut bytes = Vec::new();
    while bytes.len() < stored.bytes.len() {
        match stream.next().await {
            Ok(StreamEvent::Wal { data, .. }) => bytes.extend_from_slice(&data),
            Ok(StreamEvent::Keepalive { .. }) => {}
            Ok(StreamEvent::TimelineEnd { .. } | StreamEvent::ServerStopped) => {
                return Ok((None, stream.into_connection()));
            }
            Err(error) if error.is_wal_removed() => return Ok((None, stream.into_connection())),
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(stored.bytes.len());
    Ok((Some(bytes), stream.stop().await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compared_is_what_ends_with_the_page_of_the_last_record() {
        let (first, end) = (Lsn(0x500_0000), Lsn(0x600_0000));
        let cases = [
            (Lsn(0x5FF_FFD8), (Lsn(0x5FE_0000), end)),
            // Behind a switch there are zeros.
            (Lsn(0x580_1010), (Lsn(0x57E_2000), Lsn(0x580_2000))),
            (Lsn(0x500_0028), (first, Lsn(0x500_2000))),
            // None begins here: all of it belongs to one that began before.
            (end, (Lsn(0x5FE_0000), end)),
        ];
        for (last_record, expected) in cases {
            assert_eq!(compared(first, last_record, end), expected, "{last_record}");
        }
    }
}
