//! A TCP proxy that hurts a connection on demand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What happens to the bytes of answers, all connections together.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Harm {
    /// Nothing.
    None,
    /// After so many further bytes the connection is closed; then no more harm.
    CutAfter(u64),
    /// After so many further bytes the connection is held, and never moves
    /// again; then no more harm.
    StallAfter(u64),
}

pub(crate) struct Proxy {
    pub(crate) port: u16,
    harm: Arc<Mutex<Harm>>,
}

impl Proxy {
    /// Listens on a free port and passes everything on to `upstream`.
    pub(crate) async fn start(upstream: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let harm = Arc::new(Mutex::new(Harm::None));
        let shared = Arc::clone(&harm);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(server) = TcpStream::connect(("127.0.0.1", upstream)).await else {
                    continue;
                };
                tokio::spawn(pass(client, server, Arc::clone(&shared)));
            }
        });
        Self { port, harm }
    }

    /// Chooses what happens to the next bytes of answers.
    pub(crate) fn set(&self, harm: Harm) {
        *self.harm.lock().unwrap() = harm;
    }

    /// Returns whether the harm that was set has been done.
    pub(crate) fn is_done(&self) -> bool {
        matches!(*self.harm.lock().unwrap(), Harm::None)
    }
}

enum Verdict {
    Forward,
    Close,
    Hold,
}

async fn pass(client: TcpStream, server: TcpStream, harm: Arc<Mutex<Harm>>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let up = tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = from_server.read(&mut buffer).await {
        let (keep, verdict) = judge(&harm, count);
        if to_client.write_all(&buffer[..keep]).await.is_err() {
            break;
        }
        match verdict {
            Verdict::Forward => {}
            Verdict::Close => break,
            // Longer than any test; ends with the test's runtime.
            Verdict::Hold => tokio::time::sleep(Duration::from_hours(1)).await,
        }
    }
    up.abort();
}

fn judge(harm: &Mutex<Harm>, count: usize) -> (usize, Verdict) {
    let mut harm = harm.lock().unwrap();
    let (left, stall) = match *harm {
        Harm::None => return (count, Verdict::Forward),
        Harm::CutAfter(left) => (left, false),
        Harm::StallAfter(left) => (left, true),
    };
    if left >= count as u64 {
        let left = left - count as u64;
        *harm = if stall { Harm::StallAfter(left) } else { Harm::CutAfter(left) };
        return (count, Verdict::Forward);
    }
    *harm = Harm::None;
    (left as usize, if stall { Verdict::Hold } else { Verdict::Close })
}
