//! A server for tests that says exactly what a test tells it to, right or wrong.
//!
//! It knows just enough of the protocol to read start-up packets and queries;
//! what it sends is up to the test.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::conninfo::{ConnInfo, PgEnvironment};

/// A listening fake; it ends with the test's runtime.
pub(super) struct FakeServer {
    pub(super) port: u16,
    visits: Arc<AtomicUsize>,
}

impl FakeServer {
    /// Listens, and lets `behave` deal with each connection.
    pub(super) async fn start<F, W>(behave: F) -> Self
    where
        F: Fn(Visit) -> W + Send + 'static,
        W: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let visits = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&visits);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counter.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(behave(Visit { stream }));
            }
        });
        Self { port, visits }
    }

    /// Listens, logs everybody in as a server of `version`, sends `reply` to
    /// the first query, and then does nothing but hold the connection.
    pub(super) async fn answering(version: &'static str, reply: Vec<u8>) -> Self {
        Self::start(move |mut visit| {
            let reply = reply.clone();
            async move {
                visit.log_in(version, "off").await;
                visit.query().await;
                visit.send(&reply).await;
                visit.hold().await;
            }
        })
        .await
    }

    /// Returns how many connections were made.
    pub(super) fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }

    /// Returns settings that lead here, with `more` words added.
    pub(super) fn info(&self, more: &str) -> ConnInfo {
        info(&format!("host=127.0.0.1 port={} sslmode=disable user=u {more}", self.port))
    }
}

/// Reads settings with nothing from the environment.
pub(super) fn info(dsn: &str) -> ConnInfo {
    ConnInfo::read(Some(dsn), &PgEnvironment::default()).unwrap()
}

/// One connection to the fake.
pub(super) struct Visit {
    pub(super) stream: TcpStream,
}

impl Visit {
    /// Reads a packet without a kind (start-up, SSLRequest) and returns its body.
    pub(super) async fn packet(&mut self) -> Vec<u8> {
        let length = self.stream.read_u32().await.unwrap_or(4);
        let mut body = vec![0; length as usize - 4];
        let _ = self.stream.read_exact(&mut body).await;
        body
    }

    /// Reads a query and returns its text.
    pub(super) async fn query(&mut self) -> String {
        let _kind = self.stream.read_u8().await;
        let text = self.packet().await;
        String::from_utf8_lossy(&text).trim_end_matches('\0').to_owned()
    }

    /// Lets the client in.
    pub(super) async fn log_in(&mut self, version: &str, in_hot_standby: &str) {
        self.packet().await;
        let parts = [
            message(b'R', &0u32.to_be_bytes()),
            parameter("server_version", version),
            parameter("in_hot_standby", in_hot_standby),
            message(b'K', &[0; 8]),
            ready(),
        ];
        self.send(&parts.concat()).await;
    }

    /// Sends bytes; the client may be gone.
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes).await;
        let _ = self.stream.flush().await;
    }

    /// Keeps silent until the client goes away.
    pub(super) async fn hold(&mut self) {
        let mut sink = [0; 1024];
        while self.stream.read(&mut sink).await.unwrap_or(0) > 0 {}
    }
}

pub(super) fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[kind], &length.to_be_bytes()[..], body].concat()
}

pub(super) fn parameter(name: &str, value: &str) -> Vec<u8> {
    message(b'S', format!("{name}\0{value}\0").as_bytes())
}

pub(super) fn ready() -> Vec<u8> {
    message(b'Z', b"I")
}

pub(super) fn complete(tag: &str) -> Vec<u8> {
    message(b'C', format!("{tag}\0").as_bytes())
}

/// An ErrorResponse (`E`) or NoticeResponse (`N`).
pub(super) fn report(kind: u8, severity: &str, sqlstate: &str, text: &str) -> Vec<u8> {
    message(kind, format!("S{severity}\0V{severity}\0C{sqlstate}\0M{text}\0\0").as_bytes())
}

/// RowDescription, DataRows and CommandComplete.
pub(super) fn row_set(columns: &[&str], rows: &[&[Option<&str>]]) -> Vec<u8> {
    let count = u16::try_from(columns.len()).unwrap().to_be_bytes();
    let mut head = count.to_vec();
    for column in columns {
        head.extend(column.bytes());
        head.extend([0; 19]);
    }
    let mut bytes = message(b'T', &head);
    for row in rows {
        let mut body = count.to_vec();
        for value in *row {
            match value {
                Some(value) => {
                    body.extend(i32::try_from(value.len()).unwrap().to_be_bytes());
                    body.extend(value.bytes());
                }
                None => body.extend((-1i32).to_be_bytes()),
            }
        }
        bytes.extend(message(b'D', &body));
    }
    bytes.extend(complete("SELECT"));
    bytes
}
