//! Servers that a script in this directory starts: once for each test program, stopped with it.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;

/// The bucket (or container) that every script makes.
pub(crate) const BUCKET: &str = "hw-bucket";
pub(crate) const RGW_KEY: &str = "HWTESTKEY";
pub(crate) const RGW_SECRET: &str = "hw-test-secret";

/// A running server. Its script stops it when the pipe to it closes, so it goes
/// away even if the test is killed.
pub(crate) struct Server {
    pub(crate) port: u16,
    _stdin: ChildStdin,
    _child: Child,
}

/// Returns a port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Starts a script and waits until it says that its server is ready.
pub(crate) fn start(script: &str, port: u16, arguments: &[String]) -> Server {
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/servers");
    // The script removes the directory; a short name, because sockets are in it.
    let directory = tempfile::Builder::new().prefix("hw").tempdir_in("/tmp").unwrap().keep();
    let mut child = Command::new("sh")
        .arg(scripts.join(script))
        .arg(&directory)
        .args(arguments)
        // Else each small answer comes 40 ms late: Nagle's algorithm there, delayed ACK here.
        .env("RGW_MORE_FRONTEND", "tcp_nodelay=1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(
        line.trim(),
        "ready",
        "{script} did not start its server (see {}); run tests/servers/install.sh first",
        directory.display()
    );
    Server { port, _stdin: child.stdin.take().unwrap(), _child: child }
}

/// Ceph RGW: an S3 server that verifies signatures.
pub(crate) fn rgw() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let port = free_port();
        let ports = [port, free_port(), free_port()].map(|port| port.to_string());
        let names = [RGW_KEY, RGW_SECRET, BUCKET].map(str::to_owned);
        start("rgw-up.sh", port, &[ports, names].concat())
    })
}
