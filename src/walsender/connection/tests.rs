//! The connection against a server that misbehaves in every way we thought of.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::time::Duration;

use super::*;
use crate::walsender::fake_server::{
    FakeServer, Visit, complete, info, message, parameter, ready, report, row_set,
};

/// A limit that only a server that keeps silent for ever reaches.
const SHORT: Duration = Duration::from_millis(100);

async fn connect(info: &ConnInfo) -> Result<Connection, PgError> {
    Connection::connect(info, Mode::Sql).await
}

/// Sends `reply` to one query and returns what came of it.
async fn ask(reply: Vec<u8>) -> (Result<Rows, PgError>, Connection) {
    let server = FakeServer::answering("18.1", reply).await;
    let mut connection = connect(&server.info("")).await.unwrap();
    connection.set_silence_limit(Some(Duration::from_secs(5)));
    (connection.query("SELECT 1").await, connection)
}

fn one_row() -> Vec<u8> {
    row_set(&["a"], &[&[Some("1")]])
}

#[test]
fn versions_are_numbered_as_the_server_numbers_them() {
    for (text, number) in [
        ("15.20 (Debian 15.20-0+deb12u1)", Some(150_020)),
        ("14.23", Some(140_023)),
        ("18beta1", Some(180_000)),
        ("19devel", Some(190_000)),
        ("", None),
        ("x", None),
        ("99999999999", None),
    ] {
        assert_eq!(server_version_num(text), number, "{text}");
    }
}

#[tokio::test]
async fn notices_and_parameters_in_the_middle_are_no_part_of_the_answer() {
    let rows = one_row();
    let (description, rest) = rows.split_at(rows.iter().position(|b| *b == b'D').unwrap());
    let reply = [
        description,
        &report(b'N', "WARNING", "01000", "mind the gap"),
        &parameter("in_hot_standby", "on"),
        &message(b'A', b"\0\0\0\0x\0y\0"),
        rest,
        &ready(),
    ]
    .concat();
    let (answer, connection) = ask(reply).await;
    assert_eq!(answer.unwrap().first(), Some("1"));
    assert_eq!(connection.parameter("in_hot_standby"), Some("on"));
    assert_eq!(connection.server_version_num(), 180_001);
}

#[tokio::test]
async fn every_result_set_is_returned_and_the_last_one_alone_by_query() {
    let two = [row_set(&["a"], &[&[None]]), complete("CHECKPOINT"), one_row(), ready()].concat();
    let server = FakeServer::answering("18.1", two.clone()).await;
    let mut connection = connect(&server.info("")).await.unwrap();
    let sets = connection.query_all("x").await.unwrap();
    assert_eq!(sets.len(), 3);
    assert_eq!((sets[0].first(), sets[1].rows.len(), sets[2].first()), (None, 0, Some("1")));
    assert_eq!(ask(two).await.0.unwrap().get(0, "a"), Some("1"));
}

#[tokio::test]
async fn after_an_error_in_the_middle_of_rows_the_connection_goes_on() {
    let server = FakeServer::start(|mut visit| async move {
        visit.log_in("18.1", "off").await;
        visit.query().await;
        let failed = report(b'E', "ERROR", "58P01", "no such file");
        // As TIMELINE_HISTORY does: the description first, then the error.
        visit.send(&[&message(b'T', b"\0\0")[..], &failed, &ready()].concat()).await;
        visit.query().await;
        visit.send(&[one_row(), ready()].concat()).await;
        visit.hold().await;
    })
    .await;
    let mut connection = connect(&server.info("")).await.unwrap();
    let error = connection.query("x").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("58P01"));
    assert_eq!(connection.query("y").await.unwrap().first(), Some("1"));
}

#[tokio::test]
async fn a_fatal_error_is_told_and_ends_the_connection() {
    let (answer, mut connection) =
        ask(report(b'E', "FATAL", "57P01", "terminating connection")).await;
    let error = answer.unwrap_err();
    assert_eq!(error.sqlstate(), Some("57P01"));
    assert!(error.is_transient());
    assert!(matches!(connection.query("x").await, Err(PgError::Closed { .. })));
}

#[tokio::test]
async fn a_cut_in_the_middle_of_a_message_is_a_lost_connection() {
    let whole = [one_row(), ready()].concat();
    for end in [0, 1, 5, 20, whole.len() - 1] {
        let part = whole[..end].to_vec();
        let server = FakeServer::start(move |mut visit| {
            let part = part.clone();
            async move {
                visit.log_in("18.1", "off").await;
                visit.query().await;
                visit.send(&part).await;
            }
        })
        .await;
        let mut connection = connect(&server.info("")).await.unwrap();
        let error = connection.query("x").await.unwrap_err();
        assert!(matches!(error, PgError::Closed { .. }) && error.is_transient(), "{end}: {error}");
    }
}

#[tokio::test]
async fn impossible_messages_break_the_connection() {
    let cases: [(&str, Vec<u8>); 9] = [
        ("a length of 2 GiB", b"D\x7f\xff\xff\xff".to_vec()),
        ("a length above the limit", b"D\x04\0\0\x01".to_vec()),
        ("copy data above its own limit", b"d\0\x20\0\0".to_vec()),
        ("a length below 4", b"D\0\0\0\x03".to_vec()),
        ("an unknown kind", message(b'?', b"")),
        ("a copy where rows belong", message(b'H', b"\0\0\0")),
        ("a row without a description", message(b'D', b"\0\0")),
        ("a row that is cut", [message(b'T', b"\0\0"), message(b'D', b"\0\x01")].concat()),
        ("the end inside a result set", [message(b'T', b"\0\0"), ready()].concat()),
    ];
    for (case, reply) in cases {
        let (answer, mut connection) = ask(reply).await;
        let error = answer.unwrap_err();
        assert!(matches!(error, PgError::Protocol { .. }), "{case}: {error}");
        assert!(!error.is_transient(), "{case}");
        assert!(connection.query("x").await.is_err(), "{case}: usable afterwards");
    }
}

#[tokio::test]
async fn a_huge_message_before_the_login_is_refused() {
    let server = FakeServer::start(|mut visit| async move {
        visit.packet().await;
        visit.send(b"R\0\x10\0\0").await;
        visit.hold().await;
    })
    .await;
    assert!(matches!(connect(&server.info("")).await, Err(PgError::Protocol { .. })));
}

#[tokio::test]
async fn a_server_that_wants_another_protocol_version_is_named_as_such() {
    let server = FakeServer::start(|mut visit| async move {
        visit.packet().await;
        visit.send(&message(b'v', &[0; 8])).await;
        visit.hold().await;
    })
    .await;
    let error = connect(&server.info("")).await.unwrap_err();
    assert!(error.to_string().contains("protocol 3.0"), "{error}");
}

#[tokio::test]
async fn silence_ends_at_the_limit_and_the_late_answer_is_never_taken() {
    let server = FakeServer::answering("18.1", Vec::new()).await;
    let mut connection = connect(&server.info("")).await.unwrap();
    connection.set_silence_limit(Some(SHORT));
    assert!(matches!(connection.query("x").await, Err(PgError::Timeout { .. })));
    assert!(matches!(connection.query("y").await, Err(PgError::Closed { .. })));
}

#[tokio::test]
async fn a_login_that_hangs_ends_at_connect_timeout_and_the_next_host_is_tried() {
    let mute = FakeServer::start(|mut visit| async move { visit.hold().await }).await;
    let good = FakeServer::answering("18.1", Vec::new()).await;
    let dsn = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=u sslmode=disable connect_timeout=1",
        mute.port, good.port
    );
    assert!(connect(&info(&dsn)).await.is_ok());
    let error = connect(&mute.info("connect_timeout=1")).await.unwrap_err();
    assert!(matches!(error, PgError::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_query_that_was_dropped_half_way_leaves_nothing_to_mistake_for_an_answer() {
    let server = FakeServer::answering("18.1", Vec::new()).await;
    let mut connection = connect(&server.info("")).await.unwrap();
    assert!(tokio::time::timeout(SHORT, connection.query("x")).await.is_err());
    let error = connection.query("y").await.unwrap_err();
    assert!(matches!(error, PgError::Closed { .. }), "{error}");
    connection.close().await;
}

async fn tls_answer(answer: &'static [u8]) -> FakeServer {
    FakeServer::start(move |mut visit: Visit| async move {
        visit.packet().await;
        visit.send(answer).await;
        if answer == b"N" {
            visit.log_in("18.1", "off").await;
        }
        visit.hold().await;
    })
    .await
}

fn with_tls(server: &FakeServer, mode: &str) -> ConnInfo {
    info(&format!("host=127.0.0.1 port={} user=u sslmode={mode} connect_timeout=2", server.port))
}

#[tokio::test]
async fn plain_text_that_follows_the_yes_to_tls_is_never_taken_for_a_login() {
    // CVE-2021-23222: everything needed to "log in", sent before the handshake.
    let early = [&b"S"[..], &message(b'R', &[0; 4]), &ready()].concat();
    let server = tls_answer(Box::leak(early.into_boxed_slice())).await;
    let error = connect(&with_tls(&server, "require")).await.unwrap_err();
    assert!(matches!(error, PgError::Tls { .. }), "{error}");
}

#[tokio::test]
async fn a_server_without_tls_is_refused_or_taken_as_the_mode_says() {
    let server = tls_answer(b"N").await;
    for mode in ["require", "verify-ca", "verify-full"] {
        let error = connect(&with_tls(&server, mode)).await.unwrap_err();
        assert!(matches!(error, PgError::Tls { .. }) && !error.is_transient(), "{mode}: {error}");
    }
    assert!(connect(&with_tls(&server, "prefer")).await.is_ok());
}

#[tokio::test]
async fn an_error_text_before_tls_is_not_repeated() {
    let server = tls_answer(b"ESFATAL\0Mcall this number\0\0").await;
    let error = connect(&with_tls(&server, "require")).await.unwrap_err();
    assert!(!error.to_string().contains("number"), "{error}");
}

async fn refusing(severity: &'static str, sqlstate: &'static str) -> FakeServer {
    FakeServer::start(move |mut visit| async move {
        visit.packet().await;
        visit.send(&report(b'E', severity, sqlstate, "no")).await;
    })
    .await
}

#[tokio::test]
async fn hosts_are_tried_in_order_past_those_that_cannot_serve_now() {
    let starting = refusing("FATAL", "57P03").await;
    let good = FakeServer::answering("18.1", Vec::new()).await;
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed_port = gone.local_addr().unwrap().port();
    drop(gone);
    let dsn = format!(
        "hostaddr=127.0.0.1,127.0.0.1,127.0.0.1 port={closed_port},{},{} user=u sslmode=disable",
        starting.port, good.port
    );
    let connection = connect(&info(&dsn)).await.unwrap();
    assert!(connection.place().ends_with(&good.port.to_string()), "{}", connection.place());
    assert_eq!(starting.visits(), 1);
}

#[tokio::test]
async fn a_refused_login_ends_the_search() {
    let wrong = refusing("FATAL", "28P01").await;
    let good = FakeServer::answering("18.1", Vec::new()).await;
    let dsn = format!(
        "host=127.0.0.1,127.0.0.1 port={},{} user=u sslmode=disable",
        wrong.port, good.port
    );
    let error = connect(&info(&dsn)).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("28P01"));
    assert_eq!((wrong.visits(), good.visits()), (1, 0));
}

#[tokio::test]
async fn the_kind_of_server_decides_which_host_is_taken() {
    let host = |standby| {
        FakeServer::start(move |mut visit| async move {
            visit.log_in("18.1", standby).await;
            visit.query().await;
            // `default_transaction_read_only` was not reported, so it is asked for.
            visit.send(&[row_set(&["x"], &[&[Some("off")]]), ready()].concat()).await;
            visit.hold().await;
        })
    };
    let (primary, standby) = (host("off").await, host("on").await);
    for (wanted, first, second, taken) in [
        ("any", &primary, &standby, Some(&primary)),
        ("primary", &standby, &primary, Some(&primary)),
        ("read-write", &standby, &primary, Some(&primary)),
        ("read-only", &primary, &standby, Some(&standby)),
        ("standby", &primary, &standby, Some(&standby)),
        ("standby", &primary, &primary, None),
        ("prefer-standby", &primary, &standby, Some(&standby)),
        ("prefer-standby", &primary, &primary, Some(&primary)),
    ] {
        let dsn = format!(
            "host=127.0.0.1,127.0.0.1 port={},{} user=u sslmode=disable target_session_attrs={wanted}",
            first.port, second.port
        );
        let port = connect(&info(&dsn)).await.ok().map(|connection| connection.place().to_owned());
        let expected = taken.map(|server| format!("127.0.0.1:{}", server.port));
        assert_eq!(port, expected, "{wanted}");
    }
}

/// A server that sends these authentication requests, one after each answer,
/// and then, if the client still answers, lets it in.
async fn asking(requests: Vec<Vec<u8>>) -> FakeServer {
    FakeServer::start(move |mut visit| {
        let requests = requests.clone();
        async move {
            visit.packet().await;
            for (number, request) in requests.iter().enumerate() {
                visit.send(&message(b'R', request)).await;
                if number + 1 < requests.len() {
                    visit.query().await;
                }
            }
            visit.hold().await;
        }
    })
    .await
}

#[tokio::test]
async fn a_login_that_leaves_out_the_servers_proof_is_refused() {
    let sasl = [&10u32.to_be_bytes()[..], b"SCRAM-SHA-256\0\0"].concat();
    let server = asking(vec![sasl, 0u32.to_be_bytes().to_vec()]).await;
    let error = connect(&server.info("password=p")).await.unwrap_err();
    assert!(error.to_string().contains("left out a step"), "{error}");
}

#[tokio::test]
async fn nothing_secret_is_sent_to_a_server_that_asks_in_a_way_the_settings_rule_out() {
    let clear = vec![3u32.to_be_bytes().to_vec()];
    for wish in ["require_auth=scram-sha-256", "require_auth=!password"] {
        let server = asking(clear.clone()).await;
        let error = connect(&server.info(&format!("password=p {wish}"))).await.unwrap_err();
        assert!(matches!(error, PgError::Auth { .. }), "{wish}: {error}");
    }
    let trusting = asking(vec![0u32.to_be_bytes().to_vec()]).await;
    for wish in ["require_auth=md5", "require_auth=!none"] {
        let error = connect(&trusting.info(wish)).await.unwrap_err();
        assert!(matches!(error, PgError::Auth { .. }), "{wish}: {error}");
    }
}

#[tokio::test]
async fn channel_binding_that_is_required_is_never_done_without() {
    // Modes without TLS, so that it is the login that must refuse.
    for request in [
        0u32.to_be_bytes().to_vec(),
        3u32.to_be_bytes().to_vec(),
        [&5u32.to_be_bytes()[..], b"salt"].concat(),
        [&10u32.to_be_bytes()[..], b"SCRAM-SHA-256\0SCRAM-SHA-256-PLUS\0\0"].concat(),
    ] {
        let server = asking(vec![request.clone()]).await;
        let info = server.info("password=p channel_binding=require");
        let error = connect(&info).await.unwrap_err();
        assert!(error.to_string().contains("channel_binding=require"), "{request:?}: {error}");
    }
}

#[tokio::test]
async fn a_missing_password_says_where_it_was_looked_for() {
    let server = asking(vec![3u32.to_be_bytes().to_vec()]).await;
    let error = connect(&server.info("passfile=/nonexistent/pgpass")).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, PgError::Auth { .. }), "{text}");
    assert!(text.contains("`u`") && text.contains("/nonexistent/pgpass"), "{text}");
}

#[tokio::test]
async fn a_method_that_is_not_spoken_is_named() {
    let server = asking(vec![7u32.to_be_bytes().to_vec()]).await;
    let error = connect(&server.info("")).await.unwrap_err();
    assert!(error.to_string().contains("GSSAPI"), "{error}");
}
