//! Physical WAL streaming: START_REPLICATION and all that may follow it.
//!
//! ```text
//! START_REPLICATION ...
//!   E Z                        refused
//!   T D C C Z                  the timeline ended where we wanted to start
//!   W  d d d ...               the stream, in both directions
//!        c |> c  T D C C Z     the timeline ended      (|> what we send)
//!        |> c  d... c  C C Z   we ended the stream
//!        C, then closed        the server shuts down
//!        E Z                   an error on the way, such as WAL that is gone
//!
//! d from the server   w  start u64, server's end u64, time i64, WAL bytes
//!                     k  sent so far u64, time i64, reply wanted u8
//! d from us           r  write u64, flush u64, apply u64, time i64, reply wanted u8
//! ```
//!
//! Each WAL message begins where the one before ended; that is checked, so a
//! caller can add up bytes. Positions are "last byte + 1", times are
//! microseconds since 2000-01-01 UTC.
//!
//! Never here: what is safe to acknowledge, where to start, segment borders.
//!
//! Source: manual, "Streaming Replication Protocol";
//! `src/backend/replication/walsender.c` of PostgreSQL 14 to 18.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};

use crate::pg::{Lsn, PgTimestamp, Timeline};

use super::connection::Connection;
use super::error::PgError;
use super::quote::quote_identifier;
use super::replication::read_timeline;
use super::rows::RawRows;
use super::slots::SlotName;
use super::wire::Frame;

/// The first version whose walsender knows its timeline without being asked:
/// a standby of 14 refuses START_REPLICATION before IDENTIFY_SYSTEM (55000).
const SELF_KNOWING_VERSION: u32 = 150_000;

/// How long the server may take to end the stream after we asked for that.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// The most bytes that the server may still send after we ended the stream;
/// it looks for our word after each message of 128 KiB.
const STOP_BYTES_MAX: u64 = 64 << 20;

/// The bytes of a WAL message after its kind and before the WAL.
const WAL_HEAD_BYTES: usize = 24;

/// The bytes of a keepalive after its kind.
const KEEPALIVE_BYTES: usize = 17;

/// What to stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamStart {
    /// The slot to stream with; it is ours alone as long as the stream lasts.
    pub slot: Option<SlotName>,
    /// The first byte wanted (included); any position, but a segment's start is wise.
    pub start_lsn: Lsn,
    /// The timeline wanted; may be an earlier one of the server's history.
    pub timeline: Timeline,
}

/// What came from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// The next bytes of WAL, contiguous with those before.
    Wal {
        /// The position of the first byte of `data` (included).
        start_lsn: Lsn,
        /// 1 byte to 1 MiB; may cross a segment's border. A slice of the read
        /// buffer: keeping it long keeps the whole buffer.
        data: Bytes,
        /// How far the server's own WAL was flushed when it sent this
        /// (excluded); on a historic timeline, where that timeline ends.
        server_end_lsn: Lsn,
    },
    /// The server is alive.
    Keepalive {
        /// How far the server has sent (excluded). Says nothing about what we
        /// received, and must never be acknowledged.
        server_end_lsn: Lsn,
        /// The server wants a status at once: it is about to give us up, or
        /// waits for our last word before it shuts down.
        reply_requested: bool,
    },
    /// The timeline ended here. The connection is idle again.
    TimelineEnd {
        /// The timeline that the server's history goes on with.
        next: Timeline,
        /// Where the old one ends (excluded) and `next` begins. May be less
        /// than what was received: bytes from here on are not history.
        switch_lsn: Lsn,
    },
    /// The server ended the stream in good order, because it shuts down: it
    /// has the flush position of everything it sent. The connection is over.
    ServerStopped,
}

/// How far we are, for the server. The applied position is always sent as 0,
/// for nothing is applied here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamStatus {
    /// Received and written up to here (excluded). What is less than
    /// `flush_lsn` is sent as `flush_lsn`.
    pub write_lsn: Lsn,
    /// Safe against any crash up to here (excluded). The server lets go of
    /// WAL before it, and of commits that wait for it. 0: not reported; the
    /// slot stays where it is.
    pub flush_lsn: Lsn,
    /// Ask the server for a keepalive.
    pub reply_requested: bool,
}

#[derive(Debug)]
enum Stage {
    /// Both directions are open; `stopping` once we closed ours.
    Streaming {
        stopping: bool,
    },
    /// Both directions are closed. A result set follows; if we closed first
    /// there may be none.
    Closing {
        rows: Option<RawRows>,
        stopping: bool,
    },
    /// The reply was read to its end.
    Ended,
    ServerStopped,
    Failed,
}

/// A stream of WAL; it has the connection for itself.
///
/// Dropping it at any time is safe: the server notices the closed socket and
/// frees the slot (which may take it a moment, or `wal_sender_timeout` where
/// the network lost us).
#[derive(Debug)]
pub struct WalStream {
    connection: Connection,
    stage: Stage,
    /// Where the next byte belongs.
    next_lsn: Lsn,
}

impl Connection {
    /// Asks for WAL. Needs [`Mode::Replication`](super::Mode::Replication).
    ///
    /// The silence limit of the connection holds for the stream. An idle
    /// server says nothing as long as statuses come, so ask for a reply in
    /// one of them well before the limit.
    ///
    /// Errors: `Server`, among others where the slot is
    /// [in use](PgError::is_slot_in_use), [absent](PgError::is_slot_absent) or
    /// [lost](PgError::is_slot_lost), or the start is
    /// [not in the server's history](PgError::is_not_in_history). Other
    /// refusals come from the first [`WalStream::next`].
    pub async fn stream_wal(mut self, start: &StreamStart) -> Result<WalStream, PgError> {
        if self.server_version_num() < SELF_KNOWING_VERSION {
            self.identify_system().await?;
        }
        self.send_query(&command(start)).await?;
        self.set_activity("waiting for WAL or a keepalive");
        let frame = self.next_frame().await?;
        let stage = match frame.tag {
            b'W' => Stage::Streaming { stopping: false },
            b'T' => {
                let rows = self.checked(RawRows::begin(frame.body))?;
                Stage::Closing { rows: Some(rows), stopping: false }
            }
            _ => return Err(self.unexpected(&frame, "where the stream begins")),
        };
        Ok(WalStream { connection: self, stage, next_lsn: start.start_lsn })
    }
}

impl WalStream {
    /// Returns what comes next.
    ///
    /// Cancel-safe: a call that is dropped loses nothing, and the silence
    /// limit counts on over dropped calls.
    ///
    /// Errors: any [`PgError`]. `Server` may come at any time, also before the
    /// first byte: the start [is gone](PgError::is_wal_removed) or
    /// [ahead of the server](PgError::is_ahead_of_server). After an error, and
    /// after [`StreamEvent::TimelineEnd`] and [`StreamEvent::ServerStopped`],
    /// further calls fail with `Closed`.
    pub async fn next(&mut self) -> Result<StreamEvent, PgError> {
        match self.advance().await {
            Ok(Some(event)) => Ok(event),
            // Only `stop` ends a stream without an event, and it takes the stream away.
            Ok(None) => Err(self.over()),
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Tells the server how far we are; `now` is our clock.
    ///
    /// Any status keeps the connection alive for the server. With a slot,
    /// `flush_lsn` moves the slot, also back, and the server believes
    /// whatever it is told. Once the server has begun to end the stream
    /// nothing more can be said, and nothing is sent.
    ///
    /// Waits until the status is sent, no longer than the silence limit.
    /// Errors: `Closed`, `Timeout`, `Tls`; the stream is over then.
    pub async fn send_status(
        &mut self,
        status: &StreamStatus,
        now: PgTimestamp,
    ) -> Result<(), PgError> {
        match self.stage {
            Stage::Streaming { stopping: false } => {}
            Stage::Streaming { stopping: true } | Stage::Closing { .. } | Stage::Ended => {
                return Ok(());
            }
            Stage::ServerStopped | Stage::Failed => return Err(self.over()),
        }
        // What a dropped call left goes first, so that little ever waits.
        let outcome = match self.connection.flush().await {
            Ok(()) => {
                self.connection.put(|output| put_status(output, status, now));
                self.connection.flush().await
            }
            failed => failed,
        };
        outcome.map_err(|error| self.failed(error))
    }

    /// Ends the stream from our side and gives the connection back, idle.
    ///
    /// What the server sends until it has our word is thrown away. Takes at
    /// most 30 s. Errors: any [`PgError`]; the connection is gone then, which
    /// does no harm.
    pub async fn stop(mut self) -> Result<Connection, PgError> {
        match tokio::time::timeout(STOP_LIMIT, self.drain()).await {
            Ok(Ok(())) => Ok(self.connection),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(PgError::Timeout {
                place: self.connection.place().to_owned(),
                activity: "ending the stream of WAL",
                limit: STOP_LIMIT,
            }),
        }
    }

    /// Gives the connection back. It can be used after
    /// [`StreamEvent::TimelineEnd`], and after a `Server` error that was not
    /// fatal; otherwise it only says that a reply was not read to its end.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    /// Sets the longest silence allowed from now on; see [`Connection::set_silence_limit`].
    pub fn set_silence_limit(&mut self, limit: Option<Duration>) {
        self.connection.set_silence_limit(limit);
    }

    /// Returns the connection, for what can be read from it.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Returns where the bytes received so far end (excluded).
    pub fn received_lsn(&self) -> Lsn {
        self.next_lsn
    }

    /// Closes our direction and reads up to the end of the reply.
    async fn drain(&mut self) -> Result<(), PgError> {
        match &mut self.stage {
            Stage::Streaming { stopping } => {
                *stopping = true;
                self.connection.put(put_copy_done);
            }
            Stage::Closing { stopping, .. } => *stopping = true,
            Stage::Ended => return Ok(()),
            Stage::ServerStopped | Stage::Failed => return Err(self.over()),
        }
        let enough = Lsn(self.next_lsn.0.saturating_add(STOP_BYTES_MAX));
        while !matches!(self.stage, Stage::Ended) {
            self.advance().await?;
            if self.next_lsn > enough {
                return Err(self.connection.broken("it goes on sending WAL after the end"));
            }
        }
        Ok(())
    }

    /// Reads up to the next event; `None` once the stream that we stopped is
    /// over. All that a dropped call must not lose is in `self`.
    async fn advance(&mut self) -> Result<Option<StreamEvent>, PgError> {
        if matches!(self.stage, Stage::Ended | Stage::ServerStopped | Stage::Failed) {
            return Err(self.over());
        }
        loop {
            self.connection.flush().await?;
            let frame = self.connection.next_frame().await?;
            let event = self.take(frame)?;
            if event.is_some() || matches!(self.stage, Stage::Ended) {
                return Ok(event);
            }
        }
    }

    /// Takes one message; what it says about the stage is noted at once.
    fn take(&mut self, frame: Frame) -> Result<Option<StreamEvent>, PgError> {
        match (&mut self.stage, frame.tag) {
            (Stage::Streaming { .. }, b'd') => self.take_data(frame.body),
            (Stage::Streaming { stopping }, b'c') => {
                let stopping = *stopping;
                if !stopping {
                    self.connection.put(put_copy_done);
                }
                self.stage = Stage::Closing { rows: None, stopping };
                Ok(None)
            }
            // What `COPY 0` and a closed connection mean: WalSndDone.
            (Stage::Streaming { .. }, b'C') if frame.body.starts_with(b"COPY") => {
                self.stage = Stage::ServerStopped;
                Ok(Some(StreamEvent::ServerStopped))
            }
            (Stage::Closing { rows: rows @ None, .. }, b'T') => {
                *rows = Some(self.connection.checked(RawRows::begin(frame.body))?);
                Ok(None)
            }
            (Stage::Closing { rows: Some(rows), .. }, b'D') => {
                self.connection.checked(rows.push(frame.body))?;
                Ok(None)
            }
            // One for the streaming, one for the command.
            (Stage::Closing { .. }, b'C') => Ok(None),
            (Stage::Closing { rows, stopping }, b'Z') => {
                let (rows, stopping) = (rows.take(), *stopping);
                let event = match rows {
                    Some(rows) => Some(self.read_switch(rows)?),
                    None if stopping => None,
                    None => {
                        return Err(self.connection.broken("it ended the stream without a reason"));
                    }
                };
                self.stage = Stage::Ended;
                Ok(event)
            }
            (Stage::Streaming { .. }, _) => {
                Err(self.connection.unexpected(&frame, "in the stream of WAL"))
            }
            _ => Err(self.connection.unexpected(&frame, "at the end of the stream of WAL")),
        }
    }

    /// Takes the content of a CopyData message.
    fn take_data(&mut self, mut body: Bytes) -> Result<Option<StreamEvent>, PgError> {
        let kind = body.try_get_u8().ok();
        match kind {
            Some(b'w') if body.len() >= WAL_HEAD_BYTES => {
                let start_lsn = Lsn(body.get_u64());
                let server_end_lsn = Lsn(body.get_u64());
                body.advance(size_of::<i64>());
                self.take_wal(start_lsn, body, server_end_lsn)
            }
            Some(b'k') if body.len() == KEEPALIVE_BYTES => {
                let server_end_lsn = Lsn(body.get_u64());
                body.advance(size_of::<i64>());
                let reply_requested = body.get_u8() != 0;
                Ok(Some(StreamEvent::Keepalive { server_end_lsn, reply_requested }))
            }
            Some(kind @ (b'w' | b'k')) => {
                let (kind, length) = (kind.escape_ascii(), body.len());
                let reason = format!("a stream message of kind {kind} has {length} bytes");
                Err(self.connection.broken(reason))
            }
            Some(kind) => {
                let kind = kind.escape_ascii();
                Err(self.connection.broken(format!("a stream message of unknown kind {kind}")))
            }
            None => Err(self.connection.broken("a stream message has no kind")),
        }
    }

    fn take_wal(
        &mut self,
        start_lsn: Lsn,
        data: Bytes,
        server_end_lsn: Lsn,
    ) -> Result<Option<StreamEvent>, PgError> {
        let expected = self.next_lsn;
        if start_lsn != expected {
            let reason = format!("it sent WAL from {start_lsn} where {expected} comes next");
            return Err(self.connection.broken(reason));
        }
        let Some(end_lsn) = start_lsn.checked_add(data.len() as u64) else {
            return Err(self.connection.broken("it sent WAL past the last position there is"));
        };
        self.next_lsn = end_lsn;
        let event = StreamEvent::Wal { start_lsn, data, server_end_lsn };
        Ok((end_lsn > start_lsn).then_some(event))
    }

    /// Reads the one row `next_tli, next_tli_startpos`.
    fn read_switch(&mut self, rows: RawRows) -> Result<StreamEvent, PgError> {
        let rows = self.connection.checked(rows.into_text())?;
        let switch = rows
            .get(0, "next_tli")
            .and_then(read_timeline)
            .zip(rows.get(0, "next_tli_startpos").and_then(|text| text.parse().ok()));
        let (next, switch_lsn) =
            self.connection.checked(switch.ok_or("the end of the timeline makes no sense"))?;
        Ok(StreamEvent::TimelineEnd { next, switch_lsn })
    }

    fn failed(&mut self, error: PgError) -> PgError {
        if !matches!(self.stage, Stage::Ended | Stage::ServerStopped) {
            self.stage = Stage::Failed;
        }
        error
    }

    fn over(&self) -> PgError {
        let reason = match self.stage {
            Stage::ServerStopped => "the server ended the stream because it shuts down",
            Stage::Failed => "the stream of WAL has failed before",
            _ => "the stream of WAL has ended before",
        };
        PgError::Closed { place: self.connection.place().to_owned(), reason: reason.to_owned() }
    }
}

/// Puts the command together. TIMELINE is always given, so that the server
/// cannot switch to another without saying so.
fn command(start: &StreamStart) -> String {
    let StreamStart { slot, start_lsn, timeline } = start;
    let slot = slot.as_ref().map(|slot| format!("SLOT {} ", quote_identifier(slot.as_str())));
    let slot = slot.unwrap_or_default();
    format!("START_REPLICATION {slot}PHYSICAL {start_lsn} TIMELINE {timeline}")
}

/// Writes CopyData with a standby status update.
fn put_status(output: &mut impl BufMut, status: &StreamStatus, now: PgTimestamp) {
    const LENGTH: u32 = 4 + 34;
    output.put_u8(b'd');
    output.put_u32(LENGTH);
    output.put_u8(b'r');
    output.put_u64(status.write_lsn.max(status.flush_lsn).0);
    output.put_u64(status.flush_lsn.0);
    output.put_u64(Lsn::INVALID.0);
    output.put_i64(now.0);
    output.put_u8(u8::from(status.reply_requested));
}

/// Writes CopyDone.
fn put_copy_done(output: &mut bytes::BytesMut) {
    output.put_u8(b'c');
    output.put_u32(4);
}

#[cfg(test)]
mod tests;
