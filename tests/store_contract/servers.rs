//! The servers that the battery runs against: started once, stopped with the test.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, OnceLock};

use highwater::store::Store;
use highwater::store::open::open;
use highwater::store::options::StoreOptions;

pub(crate) const BUCKET: &str = "hw-bucket";
pub(crate) const RGW_KEY: &str = "HWTESTKEY";
pub(crate) const RGW_SECRET: &str = "hw-test-secret";
pub(crate) const AZURE_ACCOUNT: &str = "hwtest";
/// `only a key for tests`, in base64.
pub(crate) const AZURE_KEY: &str = "b25seSBhIGtleSBmb3IgdGVzdHM=";

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

fn start(script: &str, port: u16, arguments: &[String]) -> Server {
    let scripts = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/servers");
    // The script removes the directory; a short name, because sockets are in it.
    let directory = tempfile::Builder::new().prefix("hw").tempdir_in("/tmp").unwrap().keep();
    let mut child = Command::new("sh")
        .arg(scripts.join(script))
        .arg(&directory)
        .args(arguments)
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

/// Azurite: Azure Blob Storage.
pub(crate) fn azurite() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        let port = free_port();
        let names = [AZURE_ACCOUNT, AZURE_KEY, BUCKET].map(str::to_owned);
        let arguments = [vec![port.to_string()], names.to_vec()].concat();
        start("azurite-up.sh", port, &arguments)
    })
}

/// Opens a store as a user would: URL and options.
pub(crate) fn opened(url: &str, settings: &[(&str, &str)]) -> Arc<dyn Store> {
    let mut options = StoreOptions::default();
    for (name, value) in settings {
        options.set(name, value).unwrap();
    }
    open(&url.parse().unwrap(), &options, Default::default()).unwrap()
}

/// Opens the RGW bucket through `port`, with `more` options.
pub(crate) fn s3(port: u16, prefix: &str, more: &[(&str, &str)]) -> Arc<dyn Store> {
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut settings = vec![
        ("endpoint", endpoint.as_str()),
        ("allow_http", "true"),
        ("access_key_id", RGW_KEY),
        ("secret_access_key", RGW_SECRET),
    ];
    settings.extend(more);
    opened(&format!("s3://{BUCKET}/{prefix}"), &settings)
}

/// Opens the Azurite container, with `more` options.
pub(crate) fn azure(container: &str, more: &[(&str, &str)]) -> Arc<dyn Store> {
    let endpoint = format!("http://127.0.0.1:{}/{AZURE_ACCOUNT}", azurite().port);
    let mut settings = vec![
        ("endpoint", endpoint.as_str()),
        ("allow_http", "true"),
        ("azure_account", AZURE_ACCOUNT),
        ("azure_key", AZURE_KEY),
    ];
    settings.extend(more);
    opened(&format!("az://{container}/repo"), &settings)
}

/// Opens the fake of Google Cloud Storage.
pub(crate) fn gcs(port: u16, bucket: &str) -> Arc<dyn Store> {
    let endpoint = format!("http://127.0.0.1:{port}");
    let settings = [("endpoint", endpoint.as_str()), ("allow_http", "true"), ("anonymous", "true")];
    opened(&format!("gs://{bucket}/repo"), &settings)
}
