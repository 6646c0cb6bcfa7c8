//! Messages on the wire: cutting them out of the stream, with limits.
//!
//! ```text
//! +-----+-------------+------------------+
//! | tag | length u32  | body             |      length counts itself, not the tag
//! +-----+-------------+------------------+
//! ```
//!
//! A body is a slice of the read buffer, not a copy. A length is believed only
//! up to a limit by kind of message, and memory grows with the bytes that
//! came, not with the length that was claimed. Messages that may come at any
//! time (notices, parameter changes, notifications) are dealt with here, so
//! callers see the reply only.
//!
//! Source: manual, "Message Formats" (`doc/src/sgml/protocol.sgml`). The
//! decoder of the postgres-protocol crate is not used: it knows neither
//! CopyBothResponse nor NegotiateProtocolVersion, and has no limits.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::error::{PgError, ServerError};
use super::tls;

/// The longest message taken before the login is done, in bytes. libpq has
/// 2000 for authentication and 30000 for errors.
const LOGIN_BYTES_MAX: usize = 64 << 10;

/// The longest CopyData taken: the server sends at most 128 KiB of WAL or
/// 32 KiB of backup in one, with a short header.
const COPY_DATA_BYTES_MAX: usize = (1 << 20) + 64;

/// The longest message of any other kind.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// How much room a read gets.
const READ_BYTES: usize = 256 << 10;

/// Below this much room a new buffer is taken.
const READ_BYTES_MIN: usize = 16 << 10;

/// The most server parameters remembered; PostgreSQL reports about fifteen.
const PARAMETERS_MAX: usize = 256;

/// A byte stream to a server: TCP, Unix socket, or TLS over TCP.
pub(super) trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

/// The stream and its buffers.
pub(super) struct Wire {
    stream: Box<dyn Socket>,
    input: BytesMut,
    /// What is to be sent by the next [`Wire::flush`].
    pub(super) output: BytesMut,
    /// Bytes were written that the stream may still hold back (TLS).
    unflushed: bool,
    /// How long reads have waited since the last byte came, dropped calls included.
    waited: Duration,
    place: String,
    parameters: BTreeMap<String, String>,
    logged_in: bool,
    /// The longest silence, in either direction; `None` waits without end.
    pub(super) silence_limit: Option<Duration>,
    /// What a timeout says was being done.
    pub(super) activity: &'static str,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Wire {
    /// Takes over a fresh stream to the server at `place`.
    pub(super) fn new(stream: Box<dyn Socket>, place: String) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
            waited: Duration::ZERO,
            place,
            parameters: BTreeMap::new(),
            logged_in: false,
            silence_limit: None,
            activity: "logging in",
        }
    }

    /// Returns who is at the other end, for messages.
    pub(super) fn place(&self) -> &str {
        &self.place
    }

    /// Returns the last value that the server reported for a parameter.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Allows messages of the usual size from here on.
    pub(super) fn login_is_done(&mut self) {
        self.logged_in = true;
    }

    /// Returns how much room the read buffer has, in bytes.
    #[cfg(test)]
    pub(super) fn input_room(&self) -> usize {
        self.input.capacity()
    }

    /// Sends all of `output`.
    ///
    /// Errors: `Closed`, `Timeout`, `Tls`; all leave the connection unusable.
    /// Cancel-safe: after a call that is dropped, the next one sends the rest.
    pub(super) async fn flush(&mut self) -> Result<(), PgError> {
        let Self { stream, output, unflushed, silence_limit, place, .. } = self;
        let sent = within(*silence_limit, async {
            while !output.is_empty() {
                *unflushed = true;
                if stream.write_buf(output).await? == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            stream.flush().await?;
            *unflushed = false;
            Ok(())
        });
        let outcome = sent.await;
        if !matches!(outcome, Some(Ok(()))) {
            output.clear();
        }
        match outcome {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => Err(tls::stream_failure(&error, place)),
            None => Err(self.too_slow("sending a request")),
        }
    }

    /// Returns whether a dropped [`Wire::flush`] left something to send.
    pub(super) fn has_output(&self) -> bool {
        self.unflushed || !self.output.is_empty()
    }

    /// Ends the connection politely; what goes wrong no longer matters.
    pub(super) async fn shut_down(&mut self) {
        if self.flush().await.is_ok() {
            let _ = self.stream.shutdown().await;
        }
    }

    /// Returns the next message of the reply.
    ///
    /// Errors: `Closed`, `Timeout`, `Protocol`, `Tls`; all leave the
    /// connection unusable. An ErrorResponse is returned as the frame it is.
    /// Cancel-safe: a call that is dropped loses no byte.
    pub(super) async fn next(&mut self) -> Result<Frame, PgError> {
        loop {
            let frame = loop {
                match self.cut()? {
                    Some(frame) => break frame,
                    None => self.fill().await?,
                }
            };
            match frame.tag {
                b'N' => self.log_notice(&frame.body),
                b'S' => self.note_parameter(&frame.body)?,
                b'A' => {}
                _ => return Ok(frame),
            }
        }
    }

    /// Returns the error that an ErrorResponse body tells.
    pub(super) fn server_error(&self, body: &Bytes) -> ServerError {
        ServerError::from_body(&self.place, body)
    }

    /// Returns a protocol error.
    pub(super) fn broken(&self, reason: impl Into<String>) -> PgError {
        PgError::Protocol { place: self.place.clone(), reason: reason.into() }
    }

    /// Cuts one whole message out of the buffer, if there is one.
    fn cut(&mut self) -> Result<Option<Frame>, PgError> {
        let Some((tag, length)) = self.input.split_first_chunk::<5>().map(|(head, _)| {
            (head[0], u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize)
        }) else {
            return Ok(None);
        };
        let bytes_max = match tag {
            _ if !self.logged_in => LOGIN_BYTES_MAX,
            b'd' => COPY_DATA_BYTES_MAX,
            _ => MESSAGE_BYTES_MAX,
        };
        if length < 4 || length > bytes_max {
            return Err(self.broken(format!(
                "a message of kind {} claims a length of {length} bytes",
                tag.escape_ascii()
            )));
        }
        if self.input.len() <= length {
            return Ok(None);
        }
        let mut body = self.input.split_to(length + 1).freeze();
        body.advance(5);
        Ok(Some(Frame { tag, body }))
    }

    /// Reads some bytes.
    ///
    /// The limit is on all the waiting since the last byte, because a caller
    /// that drops the call at every tick of a clock would else wait for ever.
    async fn fill(&mut self) -> Result<(), PgError> {
        if self.input.capacity() - self.input.len() < READ_BYTES_MIN {
            self.input.reserve(READ_BYTES);
        }
        let Self { stream, input, waited, silence_limit, place, .. } = self;
        let rest = silence_limit.map(|limit| limit.saturating_sub(*waited));
        let clock = Waiting { since: Instant::now(), waited };
        let outcome = within(rest, stream.read_buf(input)).await;
        drop(clock);
        if outcome.is_some() {
            *waited = Duration::ZERO;
        }
        match outcome {
            Some(Ok(0)) => Err(PgError::Closed {
                place: place.clone(),
                reason: if input.is_empty() {
                    "the server closed it".to_owned()
                } else {
                    "it ended in the middle of a message".to_owned()
                },
            }),
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(tls::stream_failure(&error, place)),
            None => Err(self.too_slow(self.activity)),
        }
    }

    fn too_slow(&self, activity: &'static str) -> PgError {
        let limit = self.silence_limit.unwrap_or_default();
        PgError::Timeout { place: self.place.clone(), activity, limit }
    }

    fn log_notice(&self, body: &Bytes) {
        let notice = self.server_error(body);
        if notice.severity == "WARNING" {
            tracing::warn!("{notice}");
        } else {
            tracing::info!("{notice}");
        }
    }

    fn note_parameter(&mut self, body: &Bytes) -> Result<(), PgError> {
        let mut parts = body.split(|byte| *byte == 0);
        let (Some(name), Some(value)) = (parts.next(), parts.next()) else {
            return Err(self.broken("a ParameterStatus message is malformed"));
        };
        let name = String::from_utf8_lossy(name).into_owned();
        if self.parameters.len() >= PARAMETERS_MAX && !self.parameters.contains_key(&name) {
            return Err(self.broken("too many different parameters were reported"));
        }
        self.parameters.insert(name, String::from_utf8_lossy(value).into_owned());
        Ok(())
    }
}

/// Adds the time of one wait, also of one that is dropped.
struct Waiting<'a> {
    since: Instant,
    waited: &'a mut Duration,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.waited = self.waited.saturating_add(self.since.elapsed());
    }
}

/// Runs `work`; `None` if it took longer than `limit`.
async fn within<T>(
    limit: Option<Duration>,
    work: impl Future<Output = io::Result<T>>,
) -> Option<io::Result<T>> {
    match limit {
        Some(limit) => tokio::time::timeout(limit, work).await.ok(),
        None => Some(work.await),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::walsender::fake_server::{complete, message, parameter, ready, report, row_set};
    use crate::walsender::mangling::{cases, mangled, manglings};
    use futures_util::FutureExt;
    use proptest::prelude::*;

    /// Reads frames from `pieces`, each of which arrives by itself, until the stream ends. Nothing
    /// takes room that only a length speaks of.
    fn frames(pieces: Vec<Vec<u8>>) -> (Vec<Frame>, PgError) {
        let sent_bytes = pieces.iter().map(Vec::len).sum::<usize>();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let (mut server, client) = tokio::io::duplex(64);
            let mut wire = Wire::new(Box::new(client), "test".to_owned());
            wire.login_is_done();
            let send = async move {
                for piece in pieces {
                    if server.write_all(&piece).await.is_err() {
                        break;
                    }
                }
            };
            let read = async move {
                let mut frames = Vec::new();
                loop {
                    let next = wire.next().await;
                    let room = wire.input_room();
                    assert!(room <= 2 * (sent_bytes + READ_BYTES), "{room} of {sent_bytes} bytes");
                    match next {
                        Ok(frame) => frames.push(frame),
                        Err(error) => return (frames, error),
                    }
                }
            };
            tokio::join!(send, read).1
        })
    }

    fn wire(limit: Duration) -> (tokio::io::DuplexStream, Wire) {
        let (server, client) = tokio::io::duplex(64);
        let mut wire = Wire::new(Box::new(client), "test".to_owned());
        wire.silence_limit = Some(limit);
        (server, wire)
    }

    #[tokio::test]
    async fn a_dropped_send_is_taken_up_where_it_was() {
        let (mut server, mut wire) = wire(Duration::from_secs(20));
        let message: Vec<u8> = (0..200).collect();
        wire.output.extend_from_slice(&message);
        let mut sent = Vec::new();
        while wire.flush().now_or_never().is_none() {
            assert!(wire.has_output());
            let mut piece = [0; 7];
            server.read_exact(&mut piece).await.unwrap();
            sent.extend(piece);
        }
        assert!(!wire.has_output());
        drop(wire);
        server.read_to_end(&mut sent).await.unwrap();
        assert_eq!(sent, message);
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_ends_a_send_at_the_limit() {
        let (_server, mut wire) = wire(Duration::from_millis(100));
        wire.output.extend_from_slice(&[0; 65]);
        let sent = tokio::time::timeout(Duration::from_secs(20), wire.flush()).await.unwrap();
        assert!(matches!(sent, Err(PgError::Timeout { .. })), "{sent:?}");
    }

    /// Messages as a server sends them, each with whether a caller sees it.
    fn valid_message() -> impl Strategy<Value = (Vec<u8>, bool)> {
        let text = "[a-z]{1,12}";
        let body = || prop::collection::vec(any::<u8>(), 0..80);
        prop_oneof![
            4 => body().prop_map(|body| (message(b'd', &body), true)),
            1 => (text, text).prop_map(|(name, value)| (parameter(&name, &value), false)),
            1 => text.prop_map(|text| (report(b'N', "WARNING", "01000", &text), false)),
            1 => text.prop_map(|text| (report(b'E', "ERROR", "58P01", &text), true)),
            1 => body().prop_map(|body| (message(b'A', &body), false)),
            1 => text.prop_map(|tag| (complete(&tag), true)),
            1 => Just((ready(), true)),
            1 => text.prop_map(|value| {
                let mut set = row_set(&["a", "b"], &[&[Some(&value), None]]);
                // The first of its messages alone.
                set.truncate(1 + u32::from_be_bytes([set[1], set[2], set[3], set[4]]) as usize);
                (set, true)
            }),
        ]
    }

    proptest! {
        #![proptest_config(cases(64))]

        #[test]
        fn messages_are_the_same_however_the_stream_is_cut(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..8),
            cuts in prop::collection::vec(1usize..100, 1..20),
        ) {
            let mut rest: Vec<u8> = Vec::new();
            for body in &bodies {
                rest.push(b'd');
                rest.extend(u32::try_from(body.len() + 4).unwrap().to_be_bytes());
                rest.extend(body);
            }
            let mut pieces = Vec::new();
            for cut in cuts {
                let after = rest.split_off(cut.min(rest.len()));
                pieces.push(std::mem::replace(&mut rest, after));
            }
            pieces.push(rest);
            let (frames, end) = frames(pieces);
            let got: Vec<_> = frames.into_iter().map(|frame| frame.body.to_vec()).collect();
            prop_assert_eq!(got, bodies);
            let closed = matches!(end, PgError::Closed { .. });
            prop_assert!(closed, "{}", end);
        }

        #[test]
        fn a_mangled_stream_gives_what_came_before_and_then_messages_or_an_error(
            messages in prop::collection::vec(valid_message(), 1..10),
            manglings in manglings(),
            cut in any::<prop::sample::Index>(),
        ) {
            let valid: Vec<u8> = messages.iter().flat_map(|(bytes, _)| bytes).copied().collect();
            let (mut first, intact) = mangled(valid, &manglings);
            let sent = first.clone();
            let second = first.split_off(cut.index(first.len() + 1));
            let (got, end) = frames(vec![first, second]);
            let refused = matches!(end, PgError::Closed { .. } | PgError::Protocol { .. });
            prop_assert!(refused, "{}", end);
            let (mut at, mut expected) = (0, Vec::new());
            for (bytes, is_seen) in &messages {
                at += bytes.len();
                if *is_seen && at <= intact {
                    expected.push(Frame { tag: bytes[0], body: Bytes::copy_from_slice(&bytes[5..]) });
                }
            }
            prop_assert!(got.len() >= expected.len(), "{} of {}", got.len(), expected.len());
            prop_assert_eq!(&got[..expected.len()], &expected[..]);
            // Nothing is made up: each message is bytes that came, in their order.
            let mut rest = sent.as_slice();
            for frame in &got {
                let length = u32::try_from(frame.body.len() + 4).unwrap();
                let whole = [&[frame.tag], &length.to_be_bytes()[..], &frame.body].concat();
                let found = rest.windows(whole.len()).position(|bytes| bytes == whole);
                prop_assert!(found.is_some(), "{:?} did not come", frame);
                rest = &rest[found.unwrap() + whole.len()..];
            }
        }

        #[test]
        fn no_bytes_make_the_reader_fall_or_hang(bytes: Vec<u8>) {
            let _ = frames(vec![bytes]);
        }
    }
}
