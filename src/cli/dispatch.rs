//! From a request to the use case that does it.
//!
//! Owns the one `match` over commands. Never here: parsing, settings, rules.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::agent::agent;
use super::ahead::{ahead, leave_behind, leave_session};
use super::config_report::ConfigReport;
use super::drivers::{
    host_name, open_repository, open_second, run_light, run_parallel, second_for_push, server,
};
use super::environment::Environment;
use super::output::Output;
use super::receive::{receive, receiving_server, slot};
use super::requests::{
    ArchiveGetRequest, ArchivePushRequest, BackupRequest, BackupSource, CheckRequest, InfoRequest,
    InitRequest, ManifestChecksums, Request, RestoreRequest,
};
use super::restore::{restore, restore_request, too_little};
use super::second_repo::Only;
use super::settings::{NOTHING_DONE, Settings};
use super::two::{Reported, each, each_and_what_is_missing, either};
use super::{
    copy, drill, info_report, keys, log, man, progress, reports, retention, signals, stall, verify,
};
use crate::failure::{Failure, Kind};
use crate::ops;
use crate::ops::Which;
use crate::ops::stall::Stall;
use crate::pg::PgTimestamp;
use crate::plan::memory::backup_memory;
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TargetAction, TimelineChoice};
use crate::walsender;

/// Threads of `fetch-ahead`.
const FETCH_AHEAD_THREADS: usize = 2;

/// How long `archive-push` waits for an agent where WAL has another place to go.
const AGENT_PATIENCE: Duration = Duration::from_secs(30);

/// PostgreSQL runs its commands in the data directory, and names what recovery wants like this
/// (`src/backend/access/transam/xlogrecovery.c`).
pub(super) const DATA_DIRECTORY: &str = ".";
const WAL_ASKED_FOR: &str = "pg_wal/RECOVERYXLOG";

/// Everything that a command gets besides its request.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Checked settings, of the repositories that this command works on.
    pub settings: &'a Settings,
    /// All settings, for other processes.
    pub all: &'a Settings,
    /// Which of two repositories is meant, if it was said.
    pub only: Option<Only>,
    /// The process environment.
    pub environment: &'a Environment,
    /// How to print.
    pub output: Output,
}

/// How a command ended without success.
pub enum Ended {
    /// A failure that is still to be told.
    Failed(Failure),
    /// The report has told it; only the exit code is left.
    Said(Kind),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// Does what is asked.
///
/// # Errors
/// Whatever the use case says.
pub fn dispatch(request: Request, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let Surroundings { settings, environment, output, .. } = surroundings;
    match request {
        Request::Config => {
            output.report(&ConfigReport::new(settings, environment), ConfigReport::text)?;
        }
        Request::Man(directory) => man::write(&directory)?,
        Request::Init(request) => return each(surroundings, |one| init(&request, one)),
        Request::Check(request) => {
            return each_and_what_is_missing(surroundings, |one| check(&request, one));
        }
        Request::ArchivePush(request) => archive_push(request, surroundings)?,
        Request::ArchiveGet(request) => return archive_get(request, surroundings),
        Request::FetchAhead => fetch_ahead(surroundings)?,
        Request::Spool { drain } => return stall::spool(drain, surroundings),
        Request::DrainSpool => stall::drain_spool(surroundings)?,
        Request::Receive(request) => return receive(request, surroundings),
        Request::Agent(request) => agent(request, surroundings)?,
        Request::Backup(request) => return backup(request, surroundings),
        Request::Restore(request) => restore(&request, surroundings)?,
        Request::Info(request) if request.backup.is_some() => {
            return each(surroundings, |one| info(&request, one));
        }
        Request::Info(request) => {
            return each_and_what_is_missing(surroundings, |one| info(&request, one));
        }
        Request::InfoAt { point, in_full } => info_at(&point, &in_full, surroundings)?,
        Request::Verify(request) => {
            return each_and_what_is_missing(surroundings, |one| verify::verify(&request, one));
        }
        Request::Acknowledge { finding, reason } => {
            return each(surroundings, |one| verify::acknowledge(&finding, &reason, one));
        }
        Request::Drill(request) => return drill::drill(*request, surroundings),
        Request::DrillGuard { root, keep } => drill::guard(&root, keep)?,
        Request::Log(request) => return log::log(*request, surroundings),
        Request::Expire { dry_run } => return retention::expire(dry_run, surroundings),
        Request::Pin(request) => return retention::pin(&request, surroundings),
        Request::Unpin { backup } => {
            return each(surroundings, |one| retention::unpin(&backup, one));
        }
        Request::Copy(request) => return copy::copy(request, surroundings),
        Request::Key(request) => keys::key(request, surroundings)?,
    }
    Ok(())
}

fn init(request: &InitRequest, surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let pgdata = surroundings.settings.pgdata.as_ref().map(|pgdata| pgdata.value.clone());
    let request = ops::init::Request {
        server: server(surroundings)?,
        pgdata,
        successor: request.successor,
        host: host_name(),
    };
    let report = run_light(async {
        opened.prepare().await?;
        ops::init::run(&opened.repository, &request).await
    })?;
    Reported::new(&report, reports::init, None)
}

fn check(request: &CheckRequest, surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let receiver = ops::check::Expected {
        slot: slot(surroundings)?,
        application_name: receiving_server(surroundings)?.application_name().to_owned(),
        synchronous: surroundings.settings.synchronous.value,
    };
    let request = ops::check::Request {
        server: server(surroundings)?,
        wait: Duration::from_secs(request.wait_seconds),
        no_switch: request.no_switch,
        receiver,
        retention: surroundings.settings.retention.policy(),
        stall: stall::stall_of_host(surroundings)?,
    };
    let report = run_light(async { Ok(ops::check::run(&opened.repository, &request).await) })?;
    Reported::new(&report, reports::check, report.failed())
}

fn archive_push(
    request: ArchivePushRequest,
    surroundings: &Surroundings<'_>,
) -> Result<(), Failure> {
    // A damaged segment is looked at by itself.
    let ahead = if request.accept_damaged { None } else { ahead(&request.path, surroundings) };
    let stall = stall::stall_of_server(&request.path, surroundings)?;
    let mut request = ops::archive_push::Request {
        path: request.path,
        codec: surroundings.settings.compression.value,
        deadline: surroundings.settings.archive_push_deadline.value,
        accept_damaged: request.accept_damaged,
        ahead,
        second: None,
    };
    let done = match (done_before(&mut request, stall.as_ref()), &stall) {
        (Some(report), _) => Ok(Some(report)),
        (None, Some(stall)) => stall::push(request, stall, surroundings),
        (None, None) => {
            let opened = open_repository(surroundings)?;
            request.second = second_for_push(surroundings, Duration::MAX)?;
            run_light(ops::archive_push::run(&opened.repository, &request)).map(Some)
        }
    };
    if let Some(stall) = &stall {
        stall::leave_draining(stall, surroundings);
    }
    if let Some(report) = done? {
        tracing::info!("{}", reports::archive_push(&report));
    }
    Ok(())
}

/// Answers from what an earlier call or the agent has done: without the repository, and without any thread. `None`:
/// all is to be done still, within what is left of the deadline.
fn done_before(
    request: &mut ops::archive_push::Request,
    stall: Option<&Stall>,
) -> Option<ops::archive_push::Report> {
    let began = Instant::now();
    let report = ops::archive_push::pushed_before(request).or_else(|| {
        // Half of the time is left for the direct way.
        let patience = match stall {
            Some(stall) if stall.is_away() => return None,
            Some(Stall { spool: Some(_), .. }) => AGENT_PATIENCE.min(request.deadline / 2),
            _ => request.deadline / 2,
        };
        crate::agent::ask_stored(request.ahead.as_ref()?, &request.path, patience)
    });
    request.deadline = request.deadline.saturating_sub(began.elapsed());
    report
}

fn archive_get(request: ArchiveGetRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let mut request = ops::archive_get::Request {
        name: request.name,
        ahead: ahead(&request.path, surroundings),
        target: request.path,
        data_directory: PathBuf::from(DATA_DIRECTORY),
        deadline: surroundings.settings.archive_get_deadline.value,
        second: None,
    };
    let got = match ops::archive_get::take_fetched(&request) {
        Some(report) => Ok(report),
        None => {
            let stall = stall::stall_of_server(&request.target, surroundings)?;
            let opened = open_repository(surroundings)?;
            request.second = open_second(surroundings)?.map(|second| second.repository);
            let stall = stall.as_ref();
            run_light(ops::archive_get::run_beside(&opened.repository, &request, stall))
        }
    };
    match got {
        Ok(report) => {
            tracing::info!("{}", reports::archive_get(&report));
            if ops::archive_get::wants_fetching(&request, &report) {
                leave_behind(surroundings);
            }
            Ok(())
        }
        // PostgreSQL asks for files that are not there all the time; its log is no place for that.
        Err(failure) if failure.kind == Kind::Absent && !surroundings.output.json => {
            tracing::info!("{failure}");
            Err(Ended::Said(Kind::Absent))
        }
        Err(failure) if may_be_asked_again(&failure, &request, surroundings) => {
            let next = "A standby asks again by itself; its replay waits meanwhile.";
            let failure = Failure { next: next.to_owned(), ..failure };
            surroundings.output.failure(&failure, Kind::Absent.exit_code());
            Err(Ended::Said(Kind::Absent))
        }
        Err(failure) => Err(failure.into()),
    }
}

/// A standby loops over its sources and never ends recovery by itself, so "not there"
/// only makes it wait, where any other exit would stop it.
fn may_be_asked_again(
    failure: &Failure,
    request: &ops::archive_get::Request,
    surroundings: &Surroundings<'_>,
) -> bool {
    surroundings.settings.standby_fallback.value
        && failure.kind == Kind::Store
        && request.data_directory.join("standby.signal").exists()
}

/// Fetches ahead of recovery in this data directory.
fn fetch_ahead(surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    leave_session();
    let Some(ahead) = ahead(Path::new(WAL_ASKED_FOR), surroundings) else { return Ok(()) };
    let opened = open_repository(surroundings)?;
    let directory = PathBuf::from(DATA_DIRECTORY);
    let second = open_second(surroundings)?;
    let both = [Some(opened), second].into_iter().flatten();
    let repositories: Vec<_> = both.map(|opened| opened.repository).collect();
    let work = ops::archive_get::fetch_ahead(&repositories, ahead, directory);
    let fetched = run_parallel(FETCH_AHEAD_THREADS, work)?;
    tracing::info!("fetched {fetched} segments ahead");
    Ok(())
}

/// Takes a backup, and brings it to the second repository if there is one: the server is read once.
fn backup(request: BackupRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let settings = surroundings.settings;
    let (report, copied) = match settings.of_second() {
        None => (backup_into(request, surroundings)?, None),
        Some(second) => {
            let first = settings.of_first();
            let into = |settings| {
                let one = Surroundings { settings, ..*surroundings };
                backup_into(request.clone(), &one)
            };
            let (report, from) = match into(&first) {
                Err(failure) if failure.kind == Kind::Store => {
                    let failure = failure.so("in the first repository");
                    tracing::warn!("{failure}; the backup is taken into the second");
                    (into(&second)?, Which::Second)
                }
                outcome => (outcome?, Which::First),
            };
            let copied = copy::to_the_other(&report.backup.id, from, surroundings);
            (report, Some(copied))
        }
    };
    let done = reports::BackupDone::of(&report, copied);
    surroundings.output.report(&done, reports::BackupDone::text)?;
    // The backup stands, and whoever looks at exit codes must hear of it all the same.
    let is_sound = report.backup.damaged_pages.is_empty();
    if is_sound { Ok(()) } else { Err(Ended::Said(Kind::Integrity)) }
}

fn backup_into(
    request: BackupRequest,
    surroundings: &Surroundings<'_>,
) -> Result<ops::backup::Report, Failure> {
    let opened = open_repository(surroundings)?;
    let settings = surroundings.settings;
    let (jobs, codec) = (settings.jobs.value, settings.compression.value);
    let memory_max = settings.memory_max_bytes.value;
    let is_encrypted = opened.repository.is_encrypted();
    let memory = backup_memory(memory_max, jobs, codec.working_bytes(), is_encrypted);
    let pgdata = settings.pgdata.as_ref().map(|pgdata| pgdata.value.clone());
    let request = ops::backup::Request {
        source: match request.source {
            BackupSource::Stream => ops::backup::Source::Stream,
            BackupSource::Files => ops::backup::Source::Files { pgdata, rehash: request.rehash },
        },
        server: server(surroundings)?,
        prefer_standby: request.prefer_standby,
        label: request.label.unwrap_or_else(|| "highwater".to_owned()),
        annotations: request.annotations.into_iter().collect(),
        fast_checkpoint: request.fast,
        max_rate_kb: request.max_rate.map(|bytes| u32::try_from(bytes >> 10).unwrap_or(u32::MAX)),
        manifest_checksums: match request.manifest_checksums {
            ManifestChecksums::Crc32c => walsender::ManifestChecksums::Crc32c,
            ManifestChecksums::Sha256 => walsender::ManifestChecksums::Sha256,
        },
        codec,
        jobs,
        memory: memory.map_err(|little| too_little(&little, settings))?,
        wal_timeout: settings.wal_timeout.value,
        host: host_name(),
        keep_until: request
            .keep_until
            .map(|until| PgTimestamp::from_unix_micros(until.unix_micros)),
    };
    let listener = progress::listener("backup", surroundings.output);
    let outcome = run_parallel(jobs, async {
        opened.sweep().await;
        let work = |stop| ops::backup::run(&opened.repository, &request, listener.clone(), stop);
        signals::stoppable(surroundings.output, work).await
    });
    listener.finish();
    outcome
}

fn info(request: &InfoRequest, surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let policy = surroundings.settings.retention.policy();
    let mut report = run_light(ops::info::run(&opened.repository, &policy))?;
    report.host = stall::host_state(surroundings);
    if let Some(id) = &request.backup {
        report.backups.retain(|backup| backup.id.as_str() == id);
        report.damaged_backups.retain(|backup| backup.id.as_str() == id);
        if report.backups.is_empty() && report.damaged_backups.is_empty() {
            return Err(Failure::new(
                Kind::Absent,
                format!("there is no backup `{id}` of `{}`", report.cluster),
                NOTHING_DONE,
                "`highwater info` without a name lists all backups",
            ));
        }
    }
    Reported::new(&report, info_report::info, None)
}

/// Tells what a restore to a time would use.
fn info_at(
    point: &RecoveryPoint,
    in_full: &str,
    surroundings: &Surroundings<'_>,
) -> Result<(), Failure> {
    surroundings.output.say(&format!("the time is {in_full}"));
    let outlook = either(surroundings, |one, _| outlook(point.clone(), one))?;
    surroundings.output.report(&outlook, verify::outlook)
}

fn outlook(
    point: RecoveryPoint,
    surroundings: &Surroundings<'_>,
) -> Result<ops::restore::Outlook, Failure> {
    let opened = open_repository(surroundings)?;
    let target = RecoveryTarget {
        point,
        inclusive: true,
        timeline: TimelineChoice::Latest,
        action: TargetAction::Pause,
    };
    // As a restore without any flag would be asked; its directory is never looked at.
    let request = RestoreRequest {
        pgdata: PathBuf::from(DATA_DIRECTORY),
        backup: None,
        target,
        target_in_full: None,
        tablespace_map: Vec::new(),
        standby: false,
        dry_run: true,
        delta: false,
        take_over: false,
    };
    let request = restore_request(request, surroundings)?;
    run_light(ops::restore::outlook(&opened.repository, &request))
}
