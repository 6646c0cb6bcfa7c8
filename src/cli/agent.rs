//! The resident service, from settings to its report.
//!
//! Never here: what it does (`agent`).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::future::{Either, select};

use super::ahead::ahead;
use super::dispatch::{DATA_DIRECTORY, Surroundings};
use super::drivers::{
    both_sides, host_name, open_repository, program, repository_flags, run_parallel,
    second_for_push,
};
use super::receive::streams;
use super::requests::AgentRequest;
use super::settings::{NOTHING_DONE, Origin};
use super::{reports, signals, stall};
use crate::agent;
use crate::failure::{Failure, Kind};
use crate::plan::schedule::Task;

/// Threads for stores that are far away; compression and disks have their own.
const THREADS: usize = 2;

/// libpq's tools and the server itself know the data directory by this variable.
const PGDATA: &str = "PGDATA";

/// Any file as PostgreSQL names it to its commands.
const A_WAL_FILE: &str = "pg_wal/0";
const WAL_DIRECTORY: &str = "pg_wal";

/// Serves a data directory until a signal comes.
pub(super) fn agent(request: AgentRequest, surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    let settings = surroundings.settings;
    let opened = open_repository(surroundings)?;
    let receiving =
        if settings.receive.value { streams(request.receive, surroundings)? } else { Vec::new() };
    let data_directory = data_directory(surroundings)?;
    enter(&data_directory)?;
    let ahead = ahead(Path::new(A_WAL_FILE), surroundings).ok_or_else(|| {
        let what = "the setting `spool` is `none`, which leaves the agent no place for its socket";
        Failure::new(Kind::Usage, what, NOTHING_DONE, "leave `spool` out, or name a directory")
    })?;
    let request = agent::Request {
        ahead,
        data_directory,
        wal_directory: PathBuf::from(WAL_DIRECTORY),
        codec: settings.compression.value,
        push_deadline: settings.archive_push_deadline.value,
        second: second_for_push(surroundings, Duration::MAX)?,
        both: both_sides(surroundings)?.map(|(first, second)| agent::Both {
            first,
            second,
            host: host_name(),
        }),
        receiving,
        scheduled: scheduled(surroundings)?,
        stalling: stalling(surroundings)?,
    };
    let report = run_parallel(THREADS, async {
        let work = |stop| agent::run(&opened.repository, &request, stop);
        let work = std::pin::pin!(signals::stoppable(surroundings.output, work));
        // Nobody waits for it.
        match select(work, std::pin::pin!(opened.sweep())).await {
            Either::Left((report, _)) => report,
            Either::Right(((), work)) => work.await,
        }
    })?;
    surroundings.output.report(&report, reports::agent)
}

/// Returns what the agent is to run by itself; what could never succeed is refused here.
fn scheduled(surroundings: &Surroundings<'_>) -> Result<Option<agent::Scheduled>, Failure> {
    let settings = surroundings.settings;
    let schedule = settings.schedule.schedule()?;
    if !schedule.is_set() {
        return Ok(None);
    }
    if schedule.rhythms[Task::Drill as usize].is_some() {
        settings.drill.require_scratch()?;
    }
    if schedule.rhythms[Task::Expire as usize].is_some() && !settings.retention.policy().is_set() {
        let what = "`expire_every` is set, and nothing says what is kept";
        let next =
            "set `retain_window`, `retain_backups` or another of them, or leave `expire_every` out";
        return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next));
    }
    let mut flags = repository_flags(surroundings);
    if let Some(dsn) = &settings.dsn
        && matches!(dsn.origin, Origin::Flag(_))
    {
        flags.extend(["--dsn".to_owned(), dsn.value.clone()]);
    }
    Ok(Some(agent::Scheduled { schedule, program: program()?, flags }))
}

/// Returns what is set for a store that is away, in the data directory that was entered.
fn stalling(surroundings: &Surroundings<'_>) -> Result<Option<agent::Stalling>, Failure> {
    let Some(stall) = stall::stall(Some(Path::new(WAL_DIRECTORY)), surroundings)? else {
        return Ok(None);
    };
    let into = stall::destinations(surroundings)?;
    Ok(Some(agent::Stalling { stall, into, program: stall::own_program(surroundings)? }))
}

/// Returns the data directory that was named: by the setting, or as PostgreSQL's own programs are told.
fn data_directory(surroundings: &Surroundings<'_>) -> Result<PathBuf, Failure> {
    let said = surroundings.settings.pgdata.as_ref().map(|pgdata| pgdata.value.clone());
    let pgdata = said.or_else(|| surroundings.environment.postgres.get(PGDATA).map(PathBuf::from));
    let pgdata = pgdata.map(|pgdata| std::path::absolute(&pgdata).unwrap_or(pgdata));
    pgdata.ok_or_else(|| {
        let next = "say which with `--pgdata DIR`, `pgdata` in the settings file, HIGHWATER_PGDATA or PGDATA";
        Failure::new(Kind::Usage, "no data directory is named", NOTHING_DONE, next)
    })
}

/// Makes it the working directory, as it is that of PostgreSQL's own commands: what they name is then the same, and
/// the path of the socket is short.
fn enter(directory: &Path) -> Result<(), Failure> {
    let shown = directory.display();
    std::env::set_current_dir(directory).map_err(|error| {
        let next = "check `--pgdata`, and run the agent as the user who runs PostgreSQL";
        Failure::new(Kind::Disk, format!("could not enter `{shown}`"), NOTHING_DONE, next)
            .because(error)
    })?;
    let owner = |path: &str| std::fs::metadata(path).map(|metadata| metadata.uid());
    let (Ok(owner), Ok(_)) = (owner(DATA_DIRECTORY), owner(WAL_DIRECTORY)) else {
        let next = "name the directory that holds PG_VERSION and pg_wal";
        let what = format!("`{shown}` is not a data directory");
        return Err(Failure::new(Kind::Disk, what, NOTHING_DONE, next));
    };
    if owner != rustix::process::geteuid().as_raw() {
        let what = format!("`{shown}` belongs to another user");
        let next = "run the agent as the user who runs PostgreSQL: its commands trust no other";
        return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next));
    }
    Ok(())
}
