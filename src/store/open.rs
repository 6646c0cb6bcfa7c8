//! From a URL and its options to a store that is ready to use.
//!
//! Owns: which driver a URL gets and what is wrapped around it, the first steps
//! in a new place, and the probe that shows what a store can do. Never here:
//! the environment (`cli` hands the cloud variables in), what to do about a finding.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;

use super::clients::{CloudEnvironment, Setup};
use super::cloud::CloudStore;
use super::file::FileStore;
use super::options::{OptionError, StoreOptions, spec};
use super::retry::{RetryPolicy, Retrying};
use super::url::RepoUrl;
use super::{Key, Store, StoreError};

/// Staging files of a local repository younger than this are left alone: an
/// upload that long is none.
pub const LEFTOVER_AGE_MIN: Duration = Duration::from_hours(24);

/// Why a store could not be opened. All are mistakes in settings.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// An option does not fit.
    #[error(transparent)]
    Option(#[from] OptionError),
}

/// Opens the repository's store: driver and retries. Touches neither disk nor network.
///
/// `environment` holds the cloud variables (see [`super::clients::is_cloud_variable`]).
///
/// # Errors
/// [`OpenError`] for options that do not fit the URL or each other. Wrong
/// credentials show at the first call, as [`StoreError::Denied`].
pub fn open(
    url: &RepoUrl,
    options: &StoreOptions,
    environment: CloudEnvironment,
) -> Result<Arc<dyn Store>, OpenError> {
    options.check_for(url.driver())?;
    let policy = RetryPolicy {
        repetitions: u32::try_from(options.count(&spec::RETRIES)).unwrap_or(u32::MAX),
        deadline: options.duration(&spec::RETRY_DEADLINE),
    };
    Ok(match url {
        RepoUrl::File { directory } => {
            let file = FileStore::new(directory, options.duration(&spec::STALL_TIMEOUT));
            Arc::new(Retrying::new(Arc::new(file), policy))
        }
        RepoUrl::Bucket { driver, bucket, prefix } => {
            let setup = Setup {
                driver: *driver,
                bucket: bucket.clone(),
                options: options.clone(),
                environment,
            };
            let cloud = CloudStore::new(setup, prefix, url.to_string());
            Arc::new(Retrying::new(Arc::new(cloud), policy))
        }
    })
}

/// Makes the place that `url` names if that is ours to make: a local directory,
/// durably. A bucket is made by its owner, so there is nothing to do.
///
/// # Errors
/// As [`FileStore::prepare`].
pub async fn prepare(url: &RepoUrl, options: &StoreOptions) -> Result<(), StoreError> {
    match url.directory() {
        Some(directory) => {
            FileStore::new(directory, options.duration(&spec::STALL_TIMEOUT)).prepare().await
        }
        None => Ok(()),
    }
}

/// Removes what killed writers left in a local repository, if it is older than
/// `older_than` (see [`LEFTOVER_AGE_MIN`]). Returns how many files were removed;
/// none in a bucket, where a put that was cut off leaves nothing.
///
/// # Errors
/// As [`FileStore::sweep_leftovers`].
pub async fn sweep_leftovers(
    url: &RepoUrl,
    options: &StoreOptions,
    older_than: Duration,
) -> Result<u64, StoreError> {
    match url.directory() {
        Some(directory) => {
            FileStore::new(directory, options.duration(&spec::STALL_TIMEOUT))
                .sweep_leftovers(older_than)
                .await
        }
        None => Ok(0),
    }
}

/// Where probes are; no cluster can have this name.
pub(super) const PROBE_DIRECTORY: &str = "probe";

/// What the probe tries, in its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeStep {
    /// Creating a small object.
    Create,
    /// Creating it again with other content, which must be refused.
    CreateAgain,
    /// Reading it back whole.
    Read,
    /// Reading a range of it.
    ReadRange,
    /// Reading a key that does not exist, which the store must say in so many words.
    ReadAbsent,
    /// Finding it in a listing.
    List,
    /// Finding it in a listing of one level.
    ListLevel,
    /// Deleting it.
    Delete,
    /// Reading it after that, which must say that it does not exist.
    ReadDeleted,
}

impl ProbeStep {
    /// Returns what is being tried, as a phrase for a report.
    pub fn title(self) -> &'static str {
        match self {
            Self::Create => "create an object",
            Self::CreateAgain => "refuse to replace an object",
            Self::Read => "read an object back",
            Self::ReadRange => "read a range of an object",
            Self::ReadAbsent => "say that an object does not exist",
            Self::List => "list objects",
            Self::ListLevel => "list one level",
            Self::Delete => "delete an object",
            Self::ReadDeleted => "say that a deleted object does not exist",
        }
    }
}

/// Why a step of the probe failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeFault {
    /// The store did not do what was asked.
    #[error(transparent)]
    Failed(#[from] StoreError),
    /// The store did something else than it must.
    #[error("{0}")]
    Wrong(String),
}

/// What the probe found.
#[derive(Debug)]
pub struct ProbeReport {
    /// Each step that was tried, with its result. If the first fails it is the only one.
    pub steps: Vec<(ProbeStep, Result<(), ProbeFault>)>,
    /// Whether a second create of the same key was refused, as every rule of
    /// ours needs; `None` if that could not be found out.
    pub conditional_put: Option<bool>,
    /// How far the store's clock is ahead of ours, in milliseconds; negative if
    /// it is behind. Good to about the length of the probe and a second.
    pub clock_ahead_ms: Option<i64>,
}

impl ProbeReport {
    /// Returns whether every step succeeded.
    pub fn is_sound(&self) -> bool {
        self.steps.iter().all(|(_, result)| result.is_ok())
    }
}

/// Tries everything that we need of a store on a small object
/// `probe/<nonce>/object`, and deletes it again. `nonce` must be new each time
/// and fit into a key; `now` is our clock at the call.
pub async fn probe(store: &dyn Store, nonce: &str, now: SystemTime) -> ProbeReport {
    let directory = Key::new(format!("{PROBE_DIRECTORY}/{nonce}"));
    let key = Key::new(format!("{directory}/object"));
    let mut report = ProbeReport { steps: Vec::new(), conditional_put: None, clock_ahead_ms: None };
    let created = store.create(&key, PROBE_CONTENT.to_vec().into()).await;
    let exists = created.is_ok();
    report.note(ProbeStep::Create, created.map_err(Into::into));
    if !exists {
        return report;
    }
    let again = store.create(&key, PROBE_OTHER_CONTENT.to_vec().into()).await;
    report.conditional_put = match &again {
        Ok(()) => Some(false),
        Err(StoreError::Exists { .. }) => Some(true),
        Err(_) => None,
    };
    report.note(
        ProbeStep::CreateAgain,
        match again {
            Err(StoreError::Exists { .. }) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(()) => wrong("the store replaced an object although it was asked not to"),
        },
    );
    report.note(ProbeStep::Read, expect(store, &key, None, PROBE_CONTENT).await);
    report.note(ProbeStep::ReadRange, expect(store, &key, Some(3..7), &PROBE_CONTENT[3..7]).await);
    let absent = Key::new(format!("{directory}/absent"));
    report.note(ProbeStep::ReadAbsent, expect_absent(store, &absent).await);
    let listed = list(store, &directory, &key).await;
    if let Ok(modified) = &listed {
        report.clock_ahead_ms = Some(ahead_ms(*modified, now));
    }
    report.note(ProbeStep::List, listed.map(|_| ()));
    report.note(ProbeStep::ListLevel, list_level(store, nonce, &key).await);
    report.note(ProbeStep::Delete, store.delete(&key).await.map_err(Into::into));
    report.note(ProbeStep::ReadDeleted, expect_absent(store, &key).await);
    report
}

const PROBE_CONTENT: &[u8] = b"highwater probe";
const PROBE_OTHER_CONTENT: &[u8] = b"must never be seen";

impl ProbeReport {
    fn note(&mut self, step: ProbeStep, result: Result<(), ProbeFault>) {
        self.steps.push((step, result));
    }
}

fn wrong(what: &str) -> Result<(), ProbeFault> {
    Err(ProbeFault::Wrong(what.to_owned()))
}

async fn expect(
    store: &dyn Store,
    key: &Key,
    range: Option<std::ops::Range<u64>>,
    content: &[u8],
) -> Result<(), ProbeFault> {
    let mut reading = store.read(key, range).await?;
    let mut found = Vec::new();
    while let Some(piece) = reading.bytes.try_next().await? {
        found.extend_from_slice(&piece);
        if found.len() > content.len() {
            break;
        }
    }
    if found == content && reading.size_bytes == PROBE_CONTENT.len() as u64 {
        return Ok(());
    }
    wrong("the store gave back other bytes than were written")
}

async fn expect_absent(store: &dyn Store, key: &Key) -> Result<(), ProbeFault> {
    match store.read(key, None).await {
        Err(StoreError::Absent { .. }) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => wrong("the store gave an object that does not exist"),
    }
}

/// Returns when the store says that the object was written.
async fn list(store: &dyn Store, directory: &Key, key: &Key) -> Result<SystemTime, ProbeFault> {
    let found: Vec<_> = store.list(directory).try_collect().await?;
    match found.as_slice() {
        [one] if one.key == *key && one.size_bytes == PROBE_CONTENT.len() as u64 => {
            Ok(one.modified)
        }
        _ => Err(ProbeFault::Wrong("a listing does not show exactly what was written".to_owned())),
    }
}

async fn list_level(store: &dyn Store, nonce: &str, key: &Key) -> Result<(), ProbeFault> {
    let above = store.list_level(&Key::new(PROBE_DIRECTORY)).await?;
    let level = store.list_level(&Key::new(format!("{PROBE_DIRECTORY}/{nonce}"))).await?;
    let shown = above.directories.iter().any(|name| name == nonce)
        && level.directories.is_empty()
        && level.objects.len() == 1
        && level.objects[0].key == *key;
    if shown { Ok(()) } else { wrong("a listing of one level does not show what was written") }
}

fn ahead_ms(theirs: SystemTime, ours: SystemTime) -> i64 {
    let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
    match theirs.duration_since(ours) {
        Ok(ahead) => millis(ahead),
        Err(behind) => -millis(behind.duration()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::faults::{Call, Fault, FaultStore, Symptom};
    use super::super::memory::MemoryStore;
    use super::*;

    #[tokio::test]
    async fn a_sound_store_passes_the_probe_and_keeps_nothing_of_it() {
        let store = MemoryStore::new();
        let report = probe(&store, "n1", SystemTime::now()).await;
        assert!(report.is_sound(), "{report:?}");
        assert_eq!(report.steps.len(), 9);
        assert_eq!(report.conditional_put, Some(true));
        assert!(report.clock_ahead_ms.unwrap().abs() < 60_000);
        assert!(store.keys().is_empty());
    }

    #[tokio::test]
    async fn the_clock_difference_has_the_sign_of_the_stores_lead() {
        let an_hour_ago = SystemTime::now() - Duration::from_hours(1);
        let report = probe(&MemoryStore::new(), "n1", an_hour_ago).await;
        assert!((3_590_000..3_660_000).contains(&report.clock_ahead_ms.unwrap()), "{report:?}");
    }

    #[tokio::test]
    async fn a_store_that_replaces_objects_is_found_out() {
        let memory = MemoryStore::new();
        let store = FaultStore::new(Arc::new(memory.clone()));
        // Whoever creates for the second time finds the place free again.
        store.inject(Fault::on(Call::Create).nth(2).symptom(Symptom::Slow(Duration::ZERO)).hook(
            move |_, key| {
                let key = key.clone();
                futures_util::FutureExt::now_or_never(memory.delete(&key)).unwrap().unwrap();
            },
        ));
        let report = probe(&store, "n1", SystemTime::now()).await;
        assert_eq!(report.conditional_put, Some(false));
        assert!(!report.is_sound());
        let failed: Vec<_> =
            report.steps.iter().filter(|(_, r)| r.is_err()).map(|(step, _)| *step).collect();
        assert!(failed.contains(&ProbeStep::CreateAgain) && failed.contains(&ProbeStep::Read));
    }

    #[tokio::test]
    async fn each_failing_step_is_reported_by_name() {
        for (call, step) in [
            (Call::Create, ProbeStep::Create),
            (Call::Read, ProbeStep::Read),
            (Call::List, ProbeStep::List),
            (Call::ListLevel, ProbeStep::ListLevel),
            (Call::Delete, ProbeStep::Delete),
        ] {
            let store = FaultStore::new(Arc::new(MemoryStore::new()));
            store.inject(Fault::on(call).for_ever().symptom(Symptom::Denied));
            let report = probe(&store, "n1", SystemTime::now()).await;
            let (first, _) = report.steps.iter().find(|(_, r)| r.is_err()).unwrap();
            assert_eq!(*first, step);
        }
    }

    #[test]
    fn options_of_another_driver_do_not_open() {
        let mut options = StoreOptions::default();
        options.set("region", "eu-west-1").unwrap();
        let error = open(&"file:///srv".parse().unwrap(), &options, CloudEnvironment::new());
        assert!(error.unwrap_err().to_string().contains("`region`"));
    }

    #[tokio::test]
    async fn a_local_repository_is_opened_prepared_and_probed() {
        let directory = tempfile::tempdir().unwrap();
        let url: RepoUrl =
            format!("file://{}/new/repo", directory.path().display()).parse().unwrap();
        let options = StoreOptions::default();
        prepare(&url, &options).await.unwrap();
        let store = open(&url, &options, CloudEnvironment::new()).unwrap();
        assert_eq!(store.describe(), url.to_string());
        let report = probe(&*store, "n1", SystemTime::now()).await;
        assert!(report.is_sound(), "{report:?}");
        assert!(!directory.path().join("new/repo/probe").exists(), "a directory is left");
        assert_eq!(sweep_leftovers(&url, &options, Duration::ZERO).await.unwrap(), 0);
    }
}
