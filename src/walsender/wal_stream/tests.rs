//! The stream of WAL against a server that is right, and against many that are not.

#![allow(clippy::unwrap_used, clippy::panic)]

use futures_util::FutureExt;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use super::*;
use crate::walsender::connection::Mode;
use crate::walsender::fake_server::{
    FakeServer, Visit, complete, message, parameter, ready, report, row_set,
};
use crate::walsender::mangling::{cases, mangled, manglings};

/// Where the streams here begin.
const START: u64 = 0x300_0000;

/// Longer than any test here takes.
const LIMIT: Duration = Duration::from_secs(20);

/// A limit that only a server that keeps silent for ever reaches.
const SHORT: Duration = Duration::from_millis(200);

fn start() -> StreamStart {
    StreamStart { slot: None, start_lsn: Lsn(START), timeline: Timeline(3) }
}

fn begin() -> Vec<u8> {
    message(b'W', b"\0\0\0")
}

fn wal(lsn: u64, data: &[u8]) -> Vec<u8> {
    let head = [lsn.to_be_bytes(), 0x400_0000u64.to_be_bytes(), [7; 8]].concat();
    message(b'd', &[b"w", &head[..], data].concat())
}

fn keepalive(lsn: u64, reply: u8) -> Vec<u8> {
    message(b'd', &[b"k", &lsn.to_be_bytes()[..], &[7; 8], &[reply]].concat())
}

fn copy_done() -> Vec<u8> {
    message(b'c', b"")
}

fn switch(next: &str, lsn: &str) -> Vec<u8> {
    let mut set = row_set(&["next_tli", "next_tli_startpos"], &[&[Some(next), Some(lsn)]]);
    set.truncate(set.len() - complete("SELECT").len());
    set
}

fn closing() -> Vec<u8> {
    [complete("START_STREAMING"), complete("START_REPLICATION"), ready()].concat()
}

fn wal_event(lsn: u64, data: &'static [u8]) -> StreamEvent {
    let (start_lsn, server_end_lsn) = (Lsn(lsn), Lsn(0x400_0000));
    StreamEvent::Wal { start_lsn, data: Bytes::from_static(data), server_end_lsn }
}

fn timeline_end() -> StreamEvent {
    StreamEvent::TimelineEnd { next: Timeline(4), switch_lsn: Lsn(START + 2) }
}

/// Asks a server for WAL that behaves as the test says once it has the command.
async fn ask<F, W>(behave: F) -> Result<WalStream, PgError>
where
    F: Fn(Visit) -> W + Clone + Send + 'static,
    W: Future<Output = ()> + Send + 'static,
{
    let server = FakeServer::start(move |mut visit| {
        let behave = behave.clone();
        async move {
            visit.log_in("18.1", "on").await;
            visit.query().await;
            behave(visit).await;
        }
    })
    .await;
    let mut connection = Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
    connection.set_silence_limit(Some(LIMIT));
    connection.stream_wal(&start()).await
}

/// Asks a server that answers `reply` and then holds the connection, or closes it.
async fn answered(reply: Vec<u8>, hold: bool) -> Result<WalStream, PgError> {
    ask(move |mut visit| {
        let reply = reply.clone();
        async move {
            visit.send(&reply).await;
            if hold {
                visit.hold().await;
            }
        }
    })
    .await
}

/// Reads a message of the client: its kind and its body.
async fn read_message(visit: &mut Visit) -> (u8, Vec<u8>) {
    let kind = visit.stream.read_u8().await.unwrap_or(0);
    (kind, visit.packet().await)
}

#[test]
fn the_command_names_slot_position_and_timeline() {
    assert_eq!(command(&start()), "START_REPLICATION PHYSICAL 0/3000000 TIMELINE 3");
    let with_slot = StreamStart { slot: Some("7up".parse().unwrap()), ..start() };
    assert_eq!(command(&with_slot), "START_REPLICATION SLOT \"7up\" PHYSICAL 0/3000000 TIMELINE 3");
}

#[tokio::test]
async fn version_14_is_asked_who_it_is_first_because_its_standbys_insist() {
    let server = FakeServer::start(|mut visit| async move {
        visit.log_in("14.23", "on").await;
        assert_eq!(visit.query().await, "IDENTIFY_SYSTEM");
        let columns = ["systemid", "timeline", "xlogpos", "dbname"];
        let row = [Some("7"), Some("3"), Some("0/3000000"), None];
        visit.send(&[row_set(&columns, &[&row]), ready()].concat()).await;
        visit.query().await;
        visit.send(&[begin(), wal(START, b"abc")].concat()).await;
        visit.hold().await;
    })
    .await;
    let connection = Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
    let mut stream = connection.stream_wal(&start()).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"abc"));
}

#[tokio::test]
async fn wal_and_keepalives_come_as_they_were_sent() {
    let reply = [
        begin(),
        keepalive(START, 0),
        wal(START, b"abc"),
        parameter("in_hot_standby", "off"),
        wal(START + 3, b""),
        wal(START + 3, b"d"),
        keepalive(START + 4, 1),
    ];
    let mut stream = answered(reply.concat(), true).await.unwrap();
    let expected = [
        StreamEvent::Keepalive { server_end_lsn: Lsn(START), reply_requested: false },
        wal_event(START, b"abc"),
        wal_event(START + 3, b"d"),
        StreamEvent::Keepalive { server_end_lsn: Lsn(START + 4), reply_requested: true },
    ];
    for event in expected {
        assert_eq!(stream.next().await.unwrap(), event);
    }
    assert_eq!(stream.received_lsn(), Lsn(START + 4));
    assert_eq!(stream.connection().parameter("in_hot_standby"), Some("off"));
}

/// A server that sends its messages byte by byte, each after the client was
/// seen to give up waiting, and tells what the client says meanwhile.
async fn drip(
    mut visit: Visit,
    reply: Vec<u8>,
    permits: &mut mpsc::UnboundedReceiver<()>,
) -> Visit {
    for byte in reply {
        permits.recv().await;
        visit.send(&[byte]).await;
    }
    visit
}

#[tokio::test]
async fn a_call_dropped_anywhere_loses_nothing_and_says_nothing_twice() {
    let (permit, permits) = mpsc::unbounded_channel();
    let permits = std::sync::Arc::new(tokio::sync::Mutex::new(permits));
    let (said, mut heard) = mpsc::unbounded_channel();
    let mut stream = ask(move |mut visit| {
        let (permits, said) = (permits.clone(), said.clone());
        async move {
            visit.send(&begin()).await;
            let mut permits = permits.lock().await;
            let first =
                [wal(START, b"abc"), keepalive(START, 0), wal(START + 3, b"d"), copy_done()];
            let mut visit = drip(visit, first.concat(), &mut permits).await;
            said.send(read_message(&mut visit).await).unwrap();
            let last = [switch("4", "0/3000002"), closing()].concat();
            let mut visit = drip(visit, last, &mut permits).await;
            said.send(read_message(&mut visit).await).unwrap();
        }
    })
    .await
    .unwrap();
    let (mut events, mut dropped) = (Vec::new(), 0);
    let collect = async {
        while events.last() != Some(&timeline_end()) {
            match stream.next().now_or_never() {
                Some(event) => events.push(event.unwrap()),
                None => {
                    dropped += 1;
                    let _ = permit.send(());
                    tokio::task::yield_now().await;
                }
            }
        }
    };
    tokio::time::timeout(LIMIT, collect).await.unwrap();
    let keepalive = StreamEvent::Keepalive { server_end_lsn: Lsn(START), reply_requested: false };
    let expected =
        [wal_event(START, b"abc"), keepalive, wal_event(START + 3, b"d"), timeline_end()];
    assert_eq!(events, expected);
    assert!(dropped > 100, "only {dropped} calls were dropped");
    assert_eq!(heard.recv().await.unwrap(), (b'c', Vec::new()));
    stream.into_connection().close().await;
    assert_eq!(heard.recv().await.unwrap(), (b'X', Vec::new()), "more than one CopyDone");
}

#[tokio::test]
async fn an_error_is_not_lost_by_a_dropped_call() {
    let (permit, permits) = mpsc::unbounded_channel();
    let permits = std::sync::Arc::new(tokio::sync::Mutex::new(permits));
    let mut stream = ask(move |mut visit| {
        let permits = permits.clone();
        async move {
            visit.send(&begin()).await;
            let reply = [report(b'E', "ERROR", "58P01", "it is gone"), ready()].concat();
            drip(visit, reply, &mut *permits.lock().await).await.hold().await;
        }
    })
    .await
    .unwrap();
    let collect = async {
        loop {
            if let Some(event) = stream.next().now_or_never() {
                return event.unwrap_err();
            }
            permit.send(()).unwrap();
            tokio::task::yield_now().await;
        }
    };
    let error = tokio::time::timeout(LIMIT, collect).await.unwrap();
    assert!(error.is_wal_removed(), "{error}");
}

#[tokio::test]
async fn bytes_that_do_not_follow_those_before_are_refused() {
    for second in [START, START + 2, START + 4, START + 0x100_0000, 0] {
        let reply = [begin(), wal(START, b"abc"), wal(second, b"d")].concat();
        let mut stream = answered(reply, true).await.unwrap();
        assert_eq!(stream.next().await.unwrap(), wal_event(START, b"abc"));
        let error = stream.next().await.unwrap_err();
        assert!(matches!(error, PgError::Protocol { .. }), "{second:X}: {error}");
        assert!(error.to_string().contains("0/3000003 comes next"), "{error}");
        assert!(matches!(stream.next().await, Err(PgError::Closed { .. })), "it goes on");
    }
    let mut stream = answered([begin(), wal(START + 1, b"a")].concat(), true).await.unwrap();
    assert!(matches!(stream.next().await, Err(PgError::Protocol { .. })), "not what was asked for");
}

#[tokio::test]
async fn the_end_of_a_timeline_leaves_a_connection_that_can_stream_the_next() {
    let mut stream = ask(|mut visit| async move {
        visit.send(&[begin(), wal(START, b"abc"), copy_done()].concat()).await;
        assert_eq!(read_message(&mut visit).await, (b'c', Vec::new()));
        visit.send(&[parameter("in_hot_standby", "off"), switch("4", "0/3000002")].concat()).await;
        visit.send(&closing()).await;
        let command = visit.query().await;
        assert_eq!(command, "START_REPLICATION PHYSICAL 0/3000000 TIMELINE 4");
        visit.send(&[begin(), wal(START, b"abx")].concat()).await;
        visit.hold().await;
    })
    .await
    .unwrap();
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"abc"));
    assert_eq!(stream.next().await.unwrap(), timeline_end());
    // Nothing may be said any more, and that is no failure.
    let status = StreamStatus { write_lsn: Lsn(5), flush_lsn: Lsn(5), reply_requested: false };
    stream.send_status(&status, PgTimestamp(0)).await.unwrap();
    assert!(matches!(stream.next().await, Err(PgError::Closed { .. })));
    let next = StreamStart { timeline: Timeline(4), ..start() };
    let mut stream = stream.into_connection().stream_wal(&next).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), wal_event(START, b"abx"));
}

#[tokio::test]
async fn a_start_at_the_end_of_its_timeline_gives_that_end_without_a_stream() {
    let reply = [switch("4", "0/3000002"), closing()].concat();
    let mut stream = answered(reply.clone(), true).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), timeline_end());
    // Who does not want to know can have the connection all the same.
    answered(reply, true).await.unwrap().stop().await.unwrap();
}

#[tokio::test]
async fn a_refusal_comes_as_the_servers_error_before_and_after_the_stream_begins() {
    let error = report(b'E', "ERROR", "58P01", "it is gone");
    let before = answered([error.clone(), ready()].concat(), true).await.unwrap_err();
    assert!(before.is_wal_removed(), "{before}");
    let mut stream = ask(move |mut visit| {
        let reply = [begin(), error.clone(), ready()].concat();
        async move {
            visit.send(&reply).await;
            assert_eq!(visit.query().await, "IDENTIFY_SYSTEM");
            visit.send(&[row_set(&["systemid"], &[]), ready()].concat()).await;
            visit.hold().await;
        }
    })
    .await
    .unwrap();
    let after = stream.next().await.unwrap_err();
    assert!(after.is_wal_removed(), "{after}");
    assert!(matches!(stream.next().await, Err(PgError::Closed { .. })));
    stream.into_connection().query("IDENTIFY_SYSTEM").await.unwrap();
}

#[tokio::test]
async fn a_fatal_error_is_told_and_ends_the_connection() {
    let reply = [begin(), report(b'E', "FATAL", "57P01", "terminating")].concat();
    let mut stream = answered(reply, false).await.unwrap();
    let error = stream.next().await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("57P01"), "{error}");
    let mut connection = stream.into_connection();
    assert!(matches!(connection.query("x").await, Err(PgError::Closed { .. })));
}

#[tokio::test]
async fn a_server_that_shuts_down_in_good_order_is_told_from_one_that_is_lost() {
    let reply = [begin(), wal(START, b"abc"), complete("COPY 0")].concat();
    let mut stream = answered(reply, false).await.unwrap();
    stream.next().await.unwrap();
    assert_eq!(stream.next().await.unwrap(), StreamEvent::ServerStopped);
    assert!(matches!(stream.next().await, Err(PgError::Closed { .. })));
    let status = StreamStatus { write_lsn: Lsn(5), flush_lsn: Lsn(5), reply_requested: false };
    assert!(stream.send_status(&status, PgTimestamp(0)).await.is_err());
    assert!(matches!(stream.stop().await, Err(PgError::Closed { .. })));
    let mut stream = answered([begin(), wal(START, b"abc")].concat(), false).await.unwrap();
    stream.next().await.unwrap();
    assert!(matches!(stream.next().await, Err(PgError::Closed { .. })));
}

#[tokio::test]
async fn what_breaks_the_protocol_is_refused_by_name() {
    let stream_messages = [
        (message(b'd', b""), "has no kind"),
        (message(b'd', b"z123"), "unknown kind z"),
        (message(b'd', b"s"), "unknown kind s"),
        (message(b'd', &[b'w'; 24]), "kind w has 23 bytes"),
        (message(b'd', &[b'k'; 17]), "kind k has 16 bytes"),
        (message(b'd', &[b'k'; 19]), "kind k has 18 bytes"),
        (ready(), "a message of kind Z in the stream"),
        (switch("4", "0/0"), "a message of kind T in the stream"),
        (complete("SELECT 1"), "a message of kind C in the stream"),
        (begin(), "a message of kind W in the stream"),
        ([copy_done(), closing()].concat(), "without a reason"),
        ([copy_done(), wal(START, b"a")].concat(), "a message of kind d at the end"),
        ([copy_done(), copy_done()].concat(), "a message of kind c at the end"),
        ([copy_done(), switch("0", "0/1"), closing()].concat(), "makes no sense"),
        ([copy_done(), switch("4", "1"), closing()].concat(), "makes no sense"),
        ([copy_done(), message(b'T', b"\0\0"), closing()].concat(), "makes no sense"),
        ([copy_done(), message(b'T', b"\0\x05"), closing()].concat(), "RowDescription"),
    ];
    for (bytes, expected) in stream_messages {
        let mut stream = answered([begin(), bytes].concat(), true).await.unwrap();
        let error = stream.next().await.unwrap_err();
        assert!(matches!(error, PgError::Protocol { .. }), "{expected}: {error}");
        assert!(error.to_string().contains(expected), "{expected}: {error}");
        assert!(matches!(stream.next().await, Err(PgError::Closed { .. })), "{expected}");
    }
    let error = answered(message(b'H', b"\0\0\0"), true).await.unwrap_err();
    assert!(matches!(error, PgError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn wal_past_the_last_position_is_refused() {
    let last = StreamStart { start_lsn: Lsn(u64::MAX - 2), ..start() };
    let server = FakeServer::answering("18.1", [begin(), wal(u64::MAX - 2, b"abc")].concat()).await;
    let connection = Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
    let mut stream = connection.stream_wal(&last).await.unwrap();
    assert!(matches!(stream.next().await, Err(PgError::Protocol { .. })));
}

#[tokio::test]
async fn a_status_has_the_manuals_layout_and_never_writes_less_than_it_flushes() {
    let (said, mut heard) = mpsc::unbounded_channel();
    let mut stream = ask(move |mut visit| {
        let said = said.clone();
        async move {
            visit.send(&begin()).await;
            while said.send(read_message(&mut visit).await).is_ok() {}
        }
    })
    .await
    .unwrap();
    let now = PgTimestamp(0x0102_0304_0506_0708);
    for (write, flush, reply_requested, sent_write, sent_flush, sent_reply) in [
        (0x22u64, 0x11u64, false, 0x22u8, 0x11u8, 0u8),
        (0x11, 0x22, true, 0x22, 0x22, 1),
        (0x22, 0, false, 0x22, 0, 0),
    ] {
        let status = StreamStatus { write_lsn: Lsn(write), flush_lsn: Lsn(flush), reply_requested };
        stream.send_status(&status, now).await.unwrap();
        let (kind, body) = heard.recv().await.unwrap();
        let mut expected = vec![b'r', 0, 0, 0, 0, 0, 0, 0, sent_write];
        expected.extend([0, 0, 0, 0, 0, 0, 0, sent_flush]);
        expected.extend([0; 8]);
        expected.extend([1, 2, 3, 4, 5, 6, 7, 8, sent_reply]);
        assert_eq!((kind, body), (b'd', expected));
    }
}

#[tokio::test]
async fn stopping_throws_the_rest_away_and_leaves_an_idle_connection() {
    let stream = ask(|mut visit| async move {
        visit.send(&[begin(), wal(START, b"abc")].concat()).await;
        assert_eq!(read_message(&mut visit).await, (b'c', Vec::new()));
        visit.send(&[wal(START + 3, b"d"), keepalive(START, 1), copy_done()].concat()).await;
        visit.send(&closing()).await;
        assert_eq!(visit.query().await, "SHOW \"x\"");
        visit.send(&[row_set(&["x"], &[&[Some("1")]]), ready()].concat()).await;
        visit.hold().await;
    })
    .await
    .unwrap();
    let mut connection = stream.stop().await.unwrap();
    assert_eq!(connection.show("x").await.unwrap(), "1");
}

#[tokio::test]
async fn stopping_ends_also_where_the_timeline_just_ended() {
    let stream = ask(|mut visit| async move {
        visit.send(&begin()).await;
        assert_eq!(read_message(&mut visit).await, (b'c', Vec::new()));
        visit.send(&[copy_done(), switch("4", "0/3000002"), closing()].concat()).await;
        visit.hold().await;
    })
    .await
    .unwrap();
    stream.stop().await.unwrap();
}

#[tokio::test]
async fn stopping_ends_also_where_the_server_never_does() {
    let mut connection = {
        let server = FakeServer::answering("18.1", begin()).await;
        Connection::connect(&server.info(""), Mode::Replication).await.unwrap()
    };
    connection.set_silence_limit(Some(SHORT));
    let stream = connection.stream_wal(&start()).await.unwrap();
    assert!(matches!(stream.stop().await, Err(PgError::Timeout { .. })), "a silent server");
    let stream = ask(|mut visit| async move {
        visit.send(&begin()).await;
        let data = vec![0; 1 << 20];
        for number in 0.. {
            visit.send(&wal(START + (number << 20), &data)).await;
            if number > 200 {
                break;
            }
        }
        visit.hold().await;
    })
    .await
    .unwrap();
    let error = stream.stop().await.unwrap_err();
    assert!(matches!(error, PgError::Protocol { .. }), "an endless server: {error}");
}

#[tokio::test]
async fn silence_ends_the_stream_however_often_the_caller_looks_away() {
    let server = FakeServer::answering("18.1", begin()).await;
    let mut connection = Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
    connection.set_silence_limit(Some(SHORT));
    let mut stream = connection.stream_wal(&start()).await.unwrap();
    let tick = SHORT / 10;
    let look = async {
        loop {
            if let Ok(event) = tokio::time::timeout(tick, stream.next()).await {
                return event;
            }
        }
    };
    let event = tokio::time::timeout(LIMIT, look).await.unwrap();
    assert!(matches!(event, Err(PgError::Timeout { .. })), "{event:?}");
}

/// What a server may send, right or wrong, in any order.
fn any_message() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        (START - 2..START + 9, prop::collection::vec(any::<u8>(), 0..9))
            .prop_map(|(lsn, data)| wal(lsn, &data)),
        any::<u8>().prop_map(|reply| keepalive(START, reply)),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|body| message(b'd', &body)),
        (prop::sample::select(&b"WTDCZcESNA"[..]), prop::collection::vec(any::<u8>(), 0..40))
            .prop_map(|(kind, body)| message(kind, &body)),
        Just(copy_done()),
        Just(switch("4", "0/3000002")),
        Just(closing()),
        Just(complete("COPY 0")),
        Just(report(b'E', "ERROR", "58P01", "it is gone")),
        prop::collection::vec(any::<u8>(), 0..40),
    ]
}

/// A stream from a server that says `reply`, whatever it is asked, and then nothing any more.
async fn said(reply: Vec<u8>) -> (tokio::io::DuplexStream, Result<WalStream, PgError>) {
    let (mut server, client) = tokio::io::duplex(64 << 10);
    // No reply here is longer than the buffer.
    server.write_all(&reply).await.unwrap();
    server.shutdown().await.unwrap();
    let stream = Connection::over(Box::new(client)).stream_wal(&start()).await;
    (server, stream)
}

/// What a server says that is right, message by message, each with what comes of it.
fn valid_conversation() -> impl Strategy<Value = Vec<(Vec<u8>, Option<StreamEvent>)>> {
    let part = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 1..60).prop_map(Part::Wal),
        2 => any::<bool>().prop_map(Part::Keepalive),
        1 => Just(Part::Aside(parameter("in_hot_standby", "off"))),
        1 => Just(Part::Aside(report(b'N', "WARNING", "01000", "look out"))),
        1 => Just(Part::Aside(message(b'A', b"\0\0\0\x01a\0b\0"))),
    ];
    (prop::collection::vec(part, 0..10), 0u32..4).prop_map(|(parts, end)| {
        let mut said = vec![(begin(), None)];
        let mut at = START;
        for part in parts {
            match part {
                Part::Wal(data) => {
                    let (start_lsn, server_end_lsn) = (Lsn(at), Lsn(0x400_0000));
                    let bytes = wal(at, &data);
                    at += data.len() as u64;
                    let data = Bytes::from(data);
                    said.push((bytes, Some(StreamEvent::Wal { start_lsn, data, server_end_lsn })));
                }
                Part::Keepalive(reply_requested) => {
                    let event = StreamEvent::Keepalive { server_end_lsn: Lsn(at), reply_requested };
                    said.push((keepalive(at, u8::from(reply_requested)), Some(event)));
                }
                Part::Aside(bytes) => said.push((bytes, None)),
            }
        }
        match end {
            0 => said.push((complete("COPY 0"), Some(StreamEvent::ServerStopped))),
            1 => {
                let bytes = [copy_done(), switch("4", "0/3000002"), closing()].concat();
                said.push((bytes, Some(timeline_end())));
            }
            2 => {
                let bytes = [report(b'E', "ERROR", "58P01", "it is gone"), ready()].concat();
                said.push((bytes, None));
            }
            _ => {}
        }
        said
    })
}

/// A part of a conversation.
#[derive(Debug, Clone)]
enum Part {
    Wal(Vec<u8>),
    Keepalive(bool),
    /// What has nothing to do with the stream.
    Aside(Vec<u8>),
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn a_mangled_stream_gives_the_events_before_and_then_wal_without_a_hole_or_an_error(
        conversation in valid_conversation(),
        manglings in manglings(),
    ) {
        let valid: Vec<u8> = conversation.iter().flat_map(|(bytes, _)| bytes).copied().collect();
        let (sent, intact) = mangled(valid, &manglings);
        let room_max = 2 * (sent.len() + (256 << 10));
        let (mut end, mut expected) = (0, Vec::new());
        for (bytes, event) in conversation {
            end += bytes.len();
            expected.extend(event.filter(|_| end <= intact));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let read = async {
            let mut got = Vec::new();
            let (_server, stream) = said(sent).await;
            let Ok(mut stream) = stream else { return got };
            let mut position = START;
            while let Ok(event) = stream.next().await {
                if let StreamEvent::Wal { start_lsn, data, .. } = &event {
                    assert_eq!(*start_lsn, Lsn(position));
                    assert!(!data.is_empty());
                    position += data.len() as u64;
                }
                assert!(stream.connection().input_room() <= room_max);
                got.push(event);
            }
            assert!(stream.connection().input_room() <= room_max, "a length was believed");
            got
        };
        let got = runtime.block_on(async { tokio::time::timeout(LIMIT, read).await.unwrap() });
        prop_assert!(got.len() >= expected.len(), "{:?} of {:?}", got, expected);
        prop_assert_eq!(&got[..expected.len()], &expected[..]);
    }

    #[test]
    fn no_bytes_make_the_stream_fall_or_hang_or_skip(
        messages in prop::collection::vec(any_message(), 0..12),
        begun: bool,
        stop: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let read = async {
            let head = if begun { begin() } else { Vec::new() };
            let (_server, stream) = said([head, messages.concat()].concat()).await;
            let Ok(mut stream) = stream else { return };
            let mut position = START;
            loop {
                match stream.next().await {
                    Ok(StreamEvent::Wal { start_lsn, data, .. }) => {
                        assert_eq!(start_lsn, Lsn(position));
                        assert!(!data.is_empty());
                        position += data.len() as u64;
                    }
                    Ok(StreamEvent::Keepalive { .. }) if stop => break,
                    Ok(_) => {}
                    Err(_) => return,
                }
            }
            let _ = stream.stop().await;
        };
        runtime.block_on(async { tokio::time::timeout(LIMIT, read).await.unwrap() });
    }
}
