//! The backup's stream against a server that is right, and against many that are not.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::*;
use crate::walsender::connection::Mode;
use crate::walsender::fake_server::{FakeServer, complete, message, ready, report, row_set};

const POSITION: [&str; 2] = ["recptr", "tli"];

fn position(lsn: &str) -> Vec<u8> {
    row_set(&POSITION, &[&[Some(lsn), Some("3")]])
}

fn opening() -> Vec<u8> {
    let spaces = row_set(
        &["spcoid", "spclocation", "size"],
        &[&[Some("16400"), Some("/ts"), Some("7")], &[None, None, Some("9")]],
    );
    [position("0/2000028"), spaces].concat()
}

fn closing() -> Vec<u8> {
    [position("0/2000100"), complete("BASE_BACKUP"), ready()].concat()
}

fn copy(messages: &[Vec<u8>]) -> Vec<u8> {
    let messages: Vec<_> = messages.iter().flat_map(|body| message(b'd', body)).collect();
    [message(b'H', b"\0\0\0"), messages, message(b'c', b"")].concat()
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    [&[kind], body].concat()
}

fn closed_archive(data: &[u8]) -> Vec<u8> {
    [data, &TAR_TRAILER].concat()
}

/// The frames of a right typed stream.
fn typed_frames() -> Vec<Vec<u8>> {
    vec![
        frame(b'n', b"16400.tar\0/ts\0"),
        frame(b'd', &closed_archive(b"space")),
        frame(b'p', &1029u64.to_be_bytes()),
        frame(b'n', b"base.tar\0\0"),
        frame(b'd', &closed_archive(b"base")),
        frame(b'd', b""),
        frame(b'p', &2057u64.to_be_bytes()),
        frame(b'm', b""),
        frame(b'd', b"{}"),
    ]
}

async fn begin(version: &'static str, reply: Vec<u8>) -> Result<BaseBackup, PgError> {
    let server = FakeServer::answering(version, reply).await;
    let connection = Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
    let options = BackupOptions {
        checkpoint_limit: Duration::from_secs(2),
        silence_limit: Duration::from_millis(300),
        ..BackupOptions::default()
    };
    BaseBackup::start(connection, &options).await
}

/// Collects the events up to the end or the first error.
async fn events(version: &'static str, reply: Vec<u8>) -> (Vec<BackupEvent>, Option<PgError>) {
    let mut events = Vec::new();
    let mut backup = match begin(version, reply).await {
        Ok(backup) => backup,
        Err(error) => return (events, Some(error)),
    };
    loop {
        match backup.next().await {
            Ok(Some(event)) => events.push(event),
            Ok(None) => return (events, None),
            Err(error) => {
                assert!(backup.next().await.is_err(), "a failed backup goes on");
                return (events, Some(error));
            }
        }
    }
}

/// Joins pieces of data, whose borders mean nothing.
fn joined(events: Vec<BackupEvent>) -> Vec<BackupEvent> {
    let mut joined: Vec<BackupEvent> = Vec::new();
    for event in events {
        match (joined.last_mut(), event) {
            (Some(BackupEvent::Data(before)), BackupEvent::Data(more)) => {
                *before = [&before[..], &more].concat().into();
            }
            (_, event) => joined.push(event),
        }
    }
    joined
}

#[tokio::test]
async fn both_forms_of_the_stream_give_the_same_events() {
    let typed = [opening(), copy(&typed_frames()), closing()].concat();
    let separate = [
        opening(),
        copy(&[b"sp".to_vec(), b"ace".to_vec()]),
        copy(&[b"base".to_vec()]),
        copy(&[b"{}".to_vec()]),
        closing(),
    ]
    .concat();
    let (typed, none) = events("15.4", typed).await;
    assert!(none.is_none(), "{none:?}");
    let (separate, none) = events("14.9", separate).await;
    assert!(none.is_none(), "{none:?}");
    let space = Tablespace { oid: 16400, location: "/ts".to_owned(), size_kb: Some(7) };
    let expected = [
        BackupEvent::Start {
            start_lsn: Lsn(0x200_0028),
            timeline: Timeline(3),
            tablespaces: vec![space.clone()],
            data_directory_kb: Some(9),
        },
        BackupEvent::ArchiveBegin { tablespace: Some(space) },
        BackupEvent::Data(closed_archive(b"space").into()),
        BackupEvent::Progress { bytes_done: 1029 },
        BackupEvent::ArchiveBegin { tablespace: None },
        BackupEvent::Data(closed_archive(b"base").into()),
        BackupEvent::Progress { bytes_done: 2057 },
        BackupEvent::ManifestBegin,
        BackupEvent::Data(Bytes::from_static(b"{}")),
        BackupEvent::End { stop_lsn: Lsn(0x200_0100), timeline: Timeline(3) },
    ];
    assert_eq!(joined(typed), expected);
    assert_eq!(joined(separate), expected);
}

#[tokio::test]
async fn an_error_after_the_last_byte_means_no_backup() {
    let bad = report(b'E', "ERROR", "XX001", "checksum verification failure during base backup");
    for reply in [
        // As the server does it: after the end position.
        [opening(), copy(&typed_frames()), position("0/2000100"), bad.clone(), ready()].concat(),
        // And even between CommandComplete and ReadyForQuery.
        [
            opening(),
            copy(&typed_frames()),
            position("0/2000100"),
            complete("BASE_BACKUP"),
            bad,
            ready(),
        ]
        .concat(),
    ] {
        let (events, error) = events("18.1", reply).await;
        assert!(!events.iter().any(|event| matches!(event, BackupEvent::End { .. })));
        assert_eq!(error.unwrap().sqlstate(), Some("XX001"));
    }
}

#[tokio::test]
async fn a_backup_whose_end_is_not_confirmed_has_no_end() {
    let whole = [opening(), copy(&typed_frames()), closing()].concat();
    // Without ReadyForQuery, and without CommandComplete.
    for missing in [ready().len(), ready().len() + complete("BASE_BACKUP").len()] {
        let (events, error) = events("18.1", whole[..whole.len() - missing].to_vec()).await;
        assert!(!events.iter().any(|event| matches!(event, BackupEvent::End { .. })));
        assert!(matches!(error, Some(PgError::Timeout { .. })), "{error:?}");
    }
}

#[tokio::test]
async fn frames_out_of_turn_break_the_protocol() {
    let without = |unwanted: usize| {
        let mut frames = typed_frames();
        frames.remove(unwanted);
        frames
    };
    let with = |at: usize, body: Vec<u8>| {
        let mut frames = typed_frames();
        frames.insert(at, body);
        frames
    };
    let cases = [
        ("data before an archive", with(0, frame(b'd', b"x"))),
        ("an unknown kind", with(3, frame(b'q', b""))),
        ("no kind at all", with(3, Vec::new())),
        ("an archive twice", with(3, frame(b'n', b"16400.tar\0/ts\0"))),
        ("an archive nobody announced", with(3, frame(b'n', b"16401.tar\0/ts\0"))),
        ("the manifest before the last archive", with(3, frame(b'm', b""))),
        ("the manifest twice", with(8, frame(b'm', b""))),
        ("an archive after the manifest", with(8, frame(b'n', b"base.tar\0\0"))),
        ("a missing archive", without(3)),
        ("a missing manifest", typed_frames()[..7].to_vec()),
        ("a progress message that is cut", with(2, frame(b'p', b"\0"))),
    ];
    for (case, frames) in cases {
        let (_, error) = events("18.1", [opening(), copy(&frames), closing()].concat()).await;
        assert!(matches!(error, Some(PgError::Protocol { .. })), "{case}: {error:?}");
    }
}

#[tokio::test]
async fn separate_copies_that_are_too_few_or_too_many_break_the_protocol() {
    let one = copy(&[b"x".to_vec()]);
    for count in [0, 1, 2, 4] {
        let reply = [opening(), one.repeat(count), closing()].concat();
        let (_, error) = events("14.9", reply).await;
        assert!(matches!(error, Some(PgError::Protocol { .. })), "{count}: {error:?}");
    }
}

#[tokio::test]
async fn an_opening_that_makes_no_sense_is_refused() {
    let spaces = |rows: &[&[Option<&str>]]| row_set(&["spcoid", "spclocation", "size"], rows);
    let data_directory: &[Option<&str>] = &[None, None, None];
    for (case, reply) in [
        ("no position", [row_set(&POSITION, &[]), opening()].concat()),
        ("timeline 0", row_set(&POSITION, &[&[Some("0/0"), Some("0")]])),
        ("no data directory", [position("0/1"), spaces(&[])].concat()),
        ("two data directories", [position("0/1"), spaces(&[data_directory; 2])].concat()),
        ("half a tablespace", {
            [position("0/1"), spaces(&[data_directory, &[Some("1"), None, None]])].concat()
        }),
    ] {
        let (events, error) = events("18.1", reply).await;
        assert!(events.is_empty(), "{case}");
        assert!(matches!(error, Some(PgError::Protocol { .. })), "{case}: {error:?}");
    }
}

#[tokio::test]
async fn a_refused_command_leaves_the_connection_unharmed_and_names_the_reason() {
    let reply = [report(b'E', "ERROR", "42601", "syntax error"), ready()].concat();
    assert_eq!(begin("18.1", reply).await.unwrap_err().sqlstate(), Some("42601"));
}

#[test]
fn the_command_is_in_the_grammar_of_the_version() {
    let options = BackupOptions {
        label: "it's me".to_owned(),
        fast_checkpoint: true,
        max_rate_kb: Some(1024),
        manifest_checksums: ManifestChecksums::Sha256,
        progress: true,
        verify_checksums: false,
        ..BackupOptions::default()
    };
    assert_eq!(
        command(&options, true).unwrap(),
        "BASE_BACKUP (LABEL 'it''s me', PROGRESS true, CHECKPOINT 'fast', WAIT false, \
         MAX_RATE 1024, TABLESPACE_MAP true, VERIFY_CHECKSUMS false, MANIFEST 'yes', \
         MANIFEST_CHECKSUMS 'SHA256')"
    );
    assert_eq!(
        command(&options, false).unwrap(),
        "BASE_BACKUP LABEL 'it''s me' PROGRESS FAST NOWAIT MAX_RATE 1024 TABLESPACE_MAP \
         NOVERIFY_CHECKSUMS MANIFEST 'yes' MANIFEST_CHECKSUMS 'SHA256'"
    );
}

#[test]
fn a_label_or_rate_that_would_do_harm_is_refused_before_it_is_sent() {
    for label in ["a\nb", "a\rb", "a\0b", &"x".repeat(1025)] {
        let options = BackupOptions { label: label.to_owned(), ..BackupOptions::default() };
        assert!(matches!(command(&options, true), Err(PgError::Request(_))), "{label:?}");
    }
    for rate in [0, 31, 1_048_577] {
        let options = BackupOptions { max_rate_kb: Some(rate), ..BackupOptions::default() };
        assert!(matches!(command(&options, false), Err(PgError::Request(_))), "{rate}");
    }
    let longest = BackupOptions { label: "x".repeat(1024), ..BackupOptions::default() };
    assert!(command(&longest, true).is_ok());
}
