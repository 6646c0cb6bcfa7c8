//! The servers that the battery runs against: started once, stopped with the test.

use std::sync::{Arc, OnceLock};

use highwater::store::Store;
use highwater::store::open::open;
use highwater::store::options::StoreOptions;

#[path = "../servers/script.rs"]
mod script;
pub(crate) use script::{BUCKET, RGW_KEY, RGW_SECRET, free_port, rgw};
use script::{Server, start};

pub(crate) const AZURE_ACCOUNT: &str = "hwtest";
/// `only a key for tests`, in base64.
pub(crate) const AZURE_KEY: &str = "b25seSBhIGtleSBmb3IgdGVzdHM=";

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
