//! From settings to the things that `ops` works with: the store, the repository,
//! the server's address, and a runtime.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::dispatch::Surroundings;
use super::key_source::source_of;
use super::setting_values::WalCopies;
use super::settings::{NOTHING_DONE, Origin};
use crate::failure::{Failure, Kind};
use crate::ops::Which;
use crate::ops::archive_push::Second;
use crate::ops::copy::Side;
use crate::repo::Repository;
use crate::store::clients::is_cloud_variable;
use crate::store::open::{LEFTOVER_AGE_MIN, open, prepare, sweep_leftovers};
use crate::store::options::StoreOptions;
use crate::store::url::RepoUrl;
use crate::walsender::{ConnInfo, PgEnvironment};

/// Threads for work that blocks (compression, disk); the pool grows only when needed.
const BLOCKING_THREADS_MAX: usize = 16;

/// Small stacks: hosts with strict overcommit count address space.
pub(super) const THREAD_STACK_BYTES: usize = 512 << 10;

/// How long background work may go on once a command has its result.
const SHUTDOWN_GRACE: Duration = Duration::from_millis(100);

/// A repository that was opened.
pub(super) struct Opened {
    pub(super) repository: Repository,
    url: RepoUrl,
    options: StoreOptions,
}

impl Opened {
    /// Makes the place that the URL names, where that is ours to make.
    pub(super) async fn prepare(&self) -> Result<(), Failure> {
        prepare(&self.url, &self.options).await.map_err(|error| {
            Failure::new(
                Kind::Store,
                format!("could not make the repository's directory {}", self.url),
                NOTHING_DONE,
                "make the directory yourself and give it to the user who runs highwater, or choose another",
            )
            .because(error)
        })
    }
}

impl Opened {
    /// Removes what writers that were killed have left in a local directory. Nobody waits
    /// for it: what cannot be removed now is removed another time.
    pub(super) async fn sweep(&self) {
        match sweep_leftovers(&self.url, &self.options, LEFTOVER_AGE_MIN).await {
            Ok(0) => {}
            Ok(count) => tracing::info!("removed {count} files that killed writers had left"),
            Err(error) => {
                tracing::warn!("could not look for files that killed writers left: {error}");
            }
        }
    }
}

/// Opens the repository; nothing is read or written yet.
pub(super) fn open_repository(surroundings: &Surroundings<'_>) -> Result<Opened, Failure> {
    open_repository_retrying(surroundings, Duration::MAX)
}

/// As [`open_repository`], for a caller that repeats by itself what failed for `retry_deadline_max`.
pub(super) fn open_repository_retrying(
    surroundings: &Surroundings<'_>,
    retry_deadline_max: Duration,
) -> Result<Opened, Failure> {
    let settings = surroundings.settings;
    let usage = |what: &str, next: &str| Failure::new(Kind::Usage, what, NOTHING_DONE, next);
    let text = settings.require_repo()?;
    let cluster = settings.require_cluster()?;
    let url: RepoUrl = text.parse().map_err(|error: crate::store::url::UrlError| {
        usage(
            "the repository's URL cannot be used",
            "write it as file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
        )
        .because(error)
    })?;
    let cluster = cluster.parse().map_err(|error: crate::format::NameError| {
        usage("the cluster's name cannot be used", "choose another name").because(error)
    })?;
    let mut options = StoreOptions::default();
    for (name, value) in &settings.repo_options {
        options.set(name, &value.text).map_err(|error| {
            usage(
                &format!("the store option `{name}` ({}) cannot be used", value.origin),
                "docs/reference.md lists the options of each store",
            )
            .because(error)
        })?;
    }
    options.shorten_retries(retry_deadline_max);
    let cloud = surroundings.environment.cloud.iter();
    let cloud = cloud.filter(|(name, _)| is_cloud_variable(name));
    let environment = cloud.map(|(name, value)| (name.clone(), value.clone())).collect();
    let store = open(&url, &options, environment).map_err(|error| {
        usage(
            "the store options do not fit the repository",
            "docs/reference.md lists the options of each store",
        )
        .because(error)
    })?;
    let repository = match settings.key.choice() {
        Some(choice) => Repository::encrypted(store, cluster, source_of(&choice.value)),
        None => Repository::new(store, cluster),
    };
    Ok(Opened { repository, url, options })
}

/// Opens the second repository, where there is one; nothing is read or written yet.
pub(super) fn open_second(surroundings: &Surroundings<'_>) -> Result<Option<Opened>, Failure> {
    open_second_retrying(surroundings, Duration::MAX)
}

/// As [`open_second`], for a caller that repeats by itself what failed for `retry_deadline_max`.
pub(super) fn open_second_retrying(
    surroundings: &Surroundings<'_>,
    retry_deadline_max: Duration,
) -> Result<Option<Opened>, Failure> {
    let Some(settings) = surroundings.settings.of_second() else { return Ok(None) };
    let of_second = Surroundings { settings: &settings, ..*surroundings };
    open_repository_retrying(&of_second, retry_deadline_max).map(Some)
}

/// Opens the second repository as `archive-push` takes it.
pub(super) fn second_for_push(
    surroundings: &Surroundings<'_>,
    retry_deadline_max: Duration,
) -> Result<Option<Arc<Second>>, Failure> {
    let one_is_enough = surroundings.settings.second.wal_copies.value == WalCopies::Any;
    let second = open_second_retrying(surroundings, retry_deadline_max)?;
    Ok(second.map(|opened| Arc::new(Second::new(opened.repository, one_is_enough))))
}

/// Opens both repositories as `copy` takes them; `None` if there is only one.
pub(super) fn both_sides(surroundings: &Surroundings<'_>) -> Result<Option<(Side, Side)>, Failure> {
    let Some(second) = open_second(surroundings)? else { return Ok(None) };
    let settings = surroundings.settings;
    let first = Side {
        which: Which::First,
        repository: open_repository(surroundings)?.repository,
        policy: settings.retention.policy(),
    };
    let policy = settings.second.retention.policy();
    let second = Side { which: Which::Second, repository: second.repository, policy };
    Ok(Some((first, second)))
}

/// Reads where PostgreSQL is: `--dsn`, `PG*` variables, service file, defaults.
pub(super) fn server(surroundings: &Surroundings<'_>) -> Result<ConnInfo, Failure> {
    let environment = surroundings.environment;
    let pg = PgEnvironment {
        vars: environment.postgres.clone(),
        home: environment.home.clone(),
        user: environment.user_name(),
    };
    let dsn = surroundings.settings.dsn.as_ref().map(|dsn| dsn.value.as_str());
    ConnInfo::read(dsn, &pg).map_err(|error| {
        Failure::new(
            Kind::Usage,
            "the connection settings of PostgreSQL cannot be used",
            NOTHING_DONE,
            "correct `--dsn` or the PG* variables; the keywords are libpq's",
        )
        .because(error)
    })
}

/// Runs a use case on this thread alone: what `archive-push` and `archive-get` start fastest with.
pub(super) fn run_light<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    run_on(&mut tokio::runtime::Builder::new_current_thread(), work)
}

/// Runs a use case with worker threads.
pub(super) fn run_parallel<T>(
    jobs: usize,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(jobs.clamp(1, BLOCKING_THREADS_MAX));
    run_on(&mut builder, work)
}

fn run_on<T>(
    builder: &mut tokio::runtime::Builder,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let runtime = builder
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .thread_stack_size(THREAD_STACK_BYTES)
        .build()
        .map_err(|error| {
            Failure::new(
                Kind::Bug,
                "could not start the runtime",
                NOTHING_DONE,
                "check the limits on threads and open files of this user",
            )
            .because(error)
        })?;
    let result = runtime.block_on(work);
    // A thread that hangs in a dead network file system must not hold the answer back.
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    result
}

/// Returns this host's name.
pub(super) fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown".to_owned() } else { name.to_owned() }
}

/// Returns this program's full path.
pub(super) fn program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|error| {
        Failure::new(
            Kind::Disk,
            "could not find out where this program is",
            NOTHING_DONE,
            "run highwater by its full path",
        )
        .because(error)
    })
}

/// Returns the flags with which `restore_command` finds the repository again, without any secret.
pub(super) fn repository_flags(surroundings: &Surroundings<'_>) -> Vec<String> {
    let settings = surroundings.all;
    let mut flags = Vec::new();
    if let Some(file) = &settings.file {
        let file = std::path::absolute(file).unwrap_or_else(|_| file.clone());
        flags.extend(["--config".to_owned(), file.display().to_string()]);
    }
    let said = [
        ("--repo", &settings.repo),
        ("--cluster", &settings.cluster),
        ("--second-repo", &settings.second.url),
    ];
    for (flag, value) in said {
        if let Some(value) = value
            && !matches!(value.origin, Origin::File { .. })
        {
            flags.extend([flag.to_owned(), value.value.clone()]);
        }
    }
    flags.extend(settings.key.flags());
    flags.extend(settings.second.key.flags());
    if let Some(only) = surroundings.only {
        flags.extend(["--only".to_owned(), only.word().to_owned()]);
    }
    flags
}

/// Returns the names of variables of this environment that the server's environment needs
/// as well, for `restore_command` to work there.
pub(super) fn needed_variables(surroundings: &Surroundings<'_>) -> Vec<String> {
    let settings = surroundings.all;
    let options = settings.repo_options.values().chain(settings.second.options.values());
    let own = options.filter_map(|value| match &value.origin {
        Origin::Environment(name) => Some(name.clone()),
        _ => None,
    });
    let urls = [&settings.repo, &settings.second.url];
    let is_file = urls.into_iter().flatten().all(|url| url.value.starts_with("file:"));
    let cloud = surroundings.environment.cloud.keys();
    let cloud = cloud.filter(|name| !is_file && is_cloud_variable(name)).cloned();
    let keys = [settings.key.needed_variable(), settings.second.key.needed_variable()];
    own.chain(cloud).chain(keys.into_iter().flatten().map(str::to_owned)).collect()
}
