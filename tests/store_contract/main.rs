//! One battery over every driver, and what each does when its server misbehaves.
//!
//! Needs `tests/servers/install.sh` to have run. S3 is Ceph RGW, Azure is
//! Azurite, Google Cloud Storage is a fake in this crate.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::cast_possible_truncation, clippy::default_trait_access, clippy::print_stderr)]
#![allow(clippy::format_push_string)]

mod battery;
mod fake_gcs;
#[allow(unreachable_pub)] // a file of the suite's too
#[path = "../suite/harness/not_run.rs"]
mod not_run;
mod proxy;
mod servers;
mod tls;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::TryStreamExt;
use highwater::store::memory::MemoryStore;
use highwater::store::open::{ProbeStep, open, prepare, probe};
use highwater::store::options::StoreOptions;
use highwater::store::{Store, StoreError};

use battery::{content, create, fill, key, read};
use proxy::{Harm, Proxy};
use servers::{BUCKET, azure, free_port, gcs, opened, rgw, s3};

/// Every request of these fails after a fraction of a second instead of half a minute.
const HASTY: [(&str, &str); 3] =
    [("stall_timeout", "1s"), ("connect_timeout", "1s"), ("retries", "2")];

fn cause(error: &StoreError) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_keeps_the_contract() {
    battery::run(Arc::new(MemoryStore::new())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_directory_keeps_the_contract() {
    let directory = tempfile::tempdir().unwrap();
    let url = format!("file://{}/repo", directory.path().display());
    prepare(&url.parse().unwrap(), &StoreOptions::default()).await.unwrap();
    battery::run(opened(&url, &[])).await;
}

/// A file system of 4 MiB, unmounted at the end. Needs the right to mount.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(&self, options: &str) {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(self.0.path());
        assert!(mount.status().unwrap().success(), "mount {options}");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

/// Runs one test of this program again in a mount namespace where it may mount,
/// as root or in a user namespace. Returns false in there: the test goes on.
fn runs_again_where_it_may_mount(test: &str) -> bool {
    if std::env::var_os("HIGHWATER_TEST_MAY_MOUNT").is_some() {
        return false;
    }
    let unshared = |extra: &[&str], program: &[&str]| {
        let mut unshare = std::process::Command::new("unshare");
        unshare.args(extra).arg("--mount").args(program).env("HIGHWATER_TEST_MAY_MOUNT", "yes");
        unshare.output().unwrap()
    };
    let ways: [&[&str]; 2] = [&[], &["--map-root-user"]];
    let probe = ["mount", "-t", "tmpfs", "tmpfs", "/tmp"];
    let Some(way) = ways.into_iter().find(|way| unshared(way, &probe).status.success()) else {
        not_run::not_run(test, "this system lets the test mount no small file system to fill");
        return true;
    };
    let this = std::env::current_exe().unwrap();
    let output = unshared(way, &[this.to_str().unwrap(), "--exact", test]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
    true
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_or_read_only_or_unmounted_disk_is_named_as_such() {
    if runs_again_where_it_may_mount("a_full_or_read_only_or_unmounted_disk_is_named_as_such") {
        return;
    }
    let disk = SmallDisk(tempfile::tempdir().unwrap());
    disk.mount("size=4m");
    let url = format!("file://{}", disk.0.path().display());
    prepare(&url.parse().unwrap(), &StoreOptions::default()).await.unwrap();
    let store = opened(&url, &[("retries", "0")]);
    create(&store, "small", b"x").await.unwrap();
    let error = create(&store, "large", &content(1, 8 << 20)).await.unwrap_err();
    assert!(matches!(error, StoreError::NoRoom { .. }), "{error:?}");
    assert!(read(&store, "large", None).await.unwrap_err().is_absent());
    // What did not fit is gone again, so that there is room for what does.
    create(&store, "medium", &content(1, 3 << 20)).await.unwrap();
    disk.mount("remount,ro,size=4m");
    let error = create(&store, "more", b"x").await.unwrap_err();
    assert!(matches!(error, StoreError::NoRoom { .. }), "{error:?}");
    assert_eq!(read(&store, "small", None).await.unwrap(), b"x");
    std::process::Command::new("umount").arg(disk.0.path()).status().unwrap();
    let error = read(&store, "small", None).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    assert!(cause(&error).contains("is its disk mounted?"), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_keeps_the_contract() {
    battery::run(s3(rgw().port, "some/prefix", &[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn azure_keeps_the_contract() {
    battery::run(azure(BUCKET, &[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fake_of_google_keeps_the_contract() {
    battery::run(gcs(fake_gcs::start(BUCKET).await, BUCKET)).await;
}

/// Tries every call on a store that cannot serve any, and hands the errors over.
async fn every_error(store: &Arc<dyn Store>) -> Vec<(&'static str, StoreError)> {
    vec![
        ("create", create(store, "a/b", b"x").await.unwrap_err()),
        ("read", read(store, "a/b", None).await.unwrap_err()),
        ("list", store.list(&key("a")).try_collect::<Vec<_>>().await.unwrap_err()),
        ("list_level", store.list_level(&key("")).await.unwrap_err()),
        ("delete", store.delete(&key("a/b")).await.unwrap_err()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_bucket_is_refused_by_name_and_never_absent() {
    let port = rgw().port;
    let endpoint = format!("http://127.0.0.1:{port}");
    let s3 = opened(
        "s3://hw-no-such-bucket/p",
        &[
            ("endpoint", &endpoint),
            ("allow_http", "true"),
            ("access_key_id", servers::RGW_KEY),
            ("secret_access_key", servers::RGW_SECRET),
        ],
    );
    let google = gcs(fake_gcs::start(BUCKET).await, "hw-no-such-bucket");
    for store in [s3, azure("hw-no-such-bucket", &[]), google] {
        for (call, error) in every_error(&store).await {
            let text = format!("{} {call}: {error:?}", store.describe());
            assert!(matches!(error, StoreError::Refused { .. }), "{text}");
            assert!(cause(&error).contains("create it, or correct"), "{text}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_credentials_are_denied_whatever_is_called() {
    let wrong_secret = s3(rgw().port, "p", &[("secret_access_key", "wrong")]);
    let unknown_key = s3(rgw().port, "p", &[("access_key_id", "NOBODY")]);
    let anonymous = s3(rgw().port, "p", &[("anonymous", "true")]);
    let wrong_account_key = azure(BUCKET, &[("azure_key", "d3Jvbmc=")]);
    for store in [wrong_secret, unknown_key, anonymous, wrong_account_key] {
        for (call, error) in every_error(&store).await {
            assert!(matches!(error, StoreError::Denied { .. }), "{call}: {error:?}");
            assert!(cause(&error).contains("403"), "{call}: {}", cause(&error));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_is_unavailable_within_the_deadlines() {
    let store = s3(free_port(), "p", &HASTY);
    let begun = Instant::now();
    for (call, error) in every_error(&store).await {
        assert!(matches!(error, StoreError::Unavailable { .. }), "{call}: {error:?}");
        assert!(cause(&error).contains("could not connect"), "{call}: {}", cause(&error));
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_answers_is_unavailable_within_the_stall_deadline() {
    // The kernel accepts; nobody ever reads.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let store = s3(port, "p", &[("stall_timeout", "300ms"), ("retries", "0")]);
    for call in ["create", "read", "list", "list_level", "delete"] {
        let begun = Instant::now();
        let error = match call {
            "create" => create(&store, "a", b"x").await.unwrap_err(),
            "read" => read(&store, "a", None).await.unwrap_err(),
            "list" => store.list(&key("")).try_next().await.unwrap_err(),
            "list_level" => store.list_level(&key("")).await.unwrap_err(),
            _ => store.delete(&key("a")).await.unwrap_err(),
        };
        assert!(matches!(error, StoreError::Unavailable { .. }), "{call}: {error:?}");
        assert!(cause(&error).contains("took longer than"), "{call}: {}", cause(&error));
        assert!(begun.elapsed() < Duration::from_secs(3), "{call} took {:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_taken_up_at_that_byte() {
    let proxy = Proxy::start(rgw().port).await;
    let store = s3(proxy.port, "cut", &HASTY);
    let bytes = content(3, 5_000_000);
    create(&store, "big", &bytes).await.unwrap();
    for harm in [Harm::CutAfter(1_234_567), Harm::StallAfter(1_234_567), Harm::CutAfter(100)] {
        for range in [None, Some(1000..4_999_999)] {
            proxy.set(harm);
            let expected = range.as_ref().map_or(&bytes[..], |_| &bytes[1000..4_999_999]);
            let found = read(&store, "big", range).await.unwrap();
            assert!(proxy.is_done(), "{harm:?} was not done");
            assert!(found == expected, "{harm:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_without_retries_is_an_error_and_not_a_short_object() {
    let proxy = Proxy::start(rgw().port).await;
    let store = s3(proxy.port, "short", &[("retries", "0"), ("stall_timeout", "1s")]);
    create(&store, "big", &content(4, 2_000_000)).await.unwrap();
    for harm in [Harm::CutAfter(1_000_000), Harm::StallAfter(1_000_000)] {
        proxy.set(harm);
        let error = read(&store, "big", None).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{harm:?}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_whose_answer_is_lost_took_effect_and_comes_back_as_exists() {
    let proxy = Proxy::start(rgw().port).await;
    let store = s3(proxy.port, "lost", &HASTY);
    for (name, harm) in [("cut", Harm::CutAfter(0)), ("held", Harm::StallAfter(0))] {
        proxy.set(harm);
        let error = create(&store, name, b"mine").await.unwrap_err();
        assert!(matches!(error, StoreError::Exists { .. }), "{name}: {error:?}");
        assert_eq!(read(&store, name, None).await.unwrap(), b"mine");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listing_that_breaks_off_between_pages_goes_on_and_is_complete() {
    let proxy = Proxy::start(rgw().port).await;
    let store = s3(proxy.port, "pages", &HASTY);
    // By one that waits: what is tried is the listing.
    fill(&s3(rgw().port, "pages", &[]), "many", 1100).await;
    for harm in [Harm::CutAfter(0), Harm::StallAfter(500), Harm::CutAfter(5000)] {
        let mut items = store.list(&key("many"));
        let first = items.try_next().await.unwrap().unwrap();
        proxy.set(harm);
        let mut names = vec![first.key];
        while let Some(item) = items.try_next().await.unwrap() {
            names.push(item.key);
        }
        assert!(proxy.is_done(), "{harm:?} was not done");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 1100, "{harm:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_conditional_put_an_existing_object_is_still_not_replaced() {
    let store = s3(rgw().port, "plain-put", &[("conditional_put", "off")]);
    create(&store, "a", b"one").await.unwrap();
    let error = create(&store, "a", b"two").await.unwrap_err();
    assert!(matches!(error, StoreError::Exists { .. }), "{error:?}");
    assert_eq!(read(&store, "a", None).await.unwrap(), b"one");
    let report = probe(&*store, "plain", SystemTime::now()).await;
    assert!(report.is_sound(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn options_that_change_requests_are_accepted_by_a_real_server() {
    for more in [
        &[("unsigned_payload", "true")][..],
        &[("checksum", "sha256")],
        &[("checksum", "crc64nvme")],
        &[("storage_class", "STANDARD")],
        &[("region", "eu-north-1")],
        &[("user_agent", "somebody/1")],
    ] {
        let store = s3(rgw().port, "options", more);
        let report = probe(
            &*store,
            &format!("{}-{}", more[0].0.replace('_', "-"), more[0].1.replace('/', "-")),
            SystemTime::now(),
        )
        .await;
        assert!(report.is_sound(), "{more:?}: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_profile_with_a_credential_process_opens_the_bucket() {
    let directory = tempfile::tempdir().unwrap();
    let json = format!(
        r#"{{"Version":1,"AccessKeyId":"{}","SecretAccessKey":"{}"}}"#,
        servers::RGW_KEY,
        servers::RGW_SECRET
    );
    let (answer, config) = (directory.path().join("answer.json"), directory.path().join("config"));
    std::fs::write(&answer, json).unwrap();
    let text = format!("[profile hw]\ncredential_process = /bin/cat {}\n", answer.display());
    std::fs::write(&config, text).unwrap();
    let environment = BTreeMap::from([
        ("AWS_CONFIG_FILE".to_owned(), config.display().to_string()),
        ("AWS_SHARED_CREDENTIALS_FILE".to_owned(), "/dev/null".to_owned()),
        // A profile that was asked for goes before keys of the environment.
        ("AWS_ACCESS_KEY_ID".to_owned(), "NOBODY".to_owned()),
        ("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()),
    ]);
    let mut options = StoreOptions::default();
    options.set("endpoint", &format!("http://127.0.0.1:{}", rgw().port)).unwrap();
    options.set("allow_http", "true").unwrap();
    options.set("profile", "hw").unwrap();
    let url = format!("s3://{BUCKET}/profile").parse().unwrap();
    let store = open(&url, &options, environment.clone()).unwrap();
    let report = probe(&*store, "profile", SystemTime::now()).await;
    assert!(report.is_sound(), "{report:?}");
    options.set("profile", "nobody").unwrap();
    let store = open(&url, &options, environment).unwrap();
    let report = probe(&*store, "profile", SystemTime::now()).await;
    let (step, result) = &report.steps[0];
    assert_eq!(*step, ProbeStep::Create);
    assert!(format!("{result:?}").contains("Denied"), "{result:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_in_the_variables_open_the_bucket() {
    let environment = BTreeMap::from(
        [
            ("AWS_ACCESS_KEY_ID", servers::RGW_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", servers::RGW_SECRET.to_owned()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", rgw().port)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            // Words that `object_store` knows and that must not count.
            ("AWS_BUCKET", "another-bucket".to_owned()),
            ("AWS_TIMEOUT", "1ms".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    let url = format!("s3://{BUCKET}/variables").parse().unwrap();
    let store = open(&url, &StoreOptions::default(), environment).unwrap();
    let report = probe(&*store, "variables", SystemTime::now()).await;
    assert!(report.is_sound(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_with_its_own_authority_is_trusted_through_ca_file_only() {
    let directory = tempfile::tempdir().unwrap();
    let (port, ca) = tls::start(rgw().port, directory.path()).await;
    let endpoint = format!("https://localhost:{port}");
    let settings = [
        ("endpoint", endpoint.as_str()),
        ("access_key_id", servers::RGW_KEY),
        ("secret_access_key", servers::RGW_SECRET),
    ];
    let url = format!("s3://{BUCKET}/tls");
    for (call, error) in every_error(&opened(&url, &settings)).await {
        assert!(matches!(error, StoreError::Refused { .. }), "{call}: {error:?}");
        assert!(cause(&error).contains("`ca_file`"), "{call}: {}", cause(&error));
    }
    let trusted = [&settings[..], &[("ca_file", ca.to_str().unwrap())]].concat();
    let report = probe(&*opened(&url, &trusted), "tls", SystemTime::now()).await;
    assert!(report.is_sound(), "{report:?}");
}
