//! What is done for a store that is away: from settings to what is told, and the process left behind that ends it.
//!
//! Never here: when WAL is kept or let go, or how it is brought back (`ops`).

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::ahead::leave_session;
use super::dispatch::{Ended, Surroundings};
use super::drivers::{
    host_name, open_repository_retrying, open_second_retrying, program, repository_flags,
    run_light, run_parallel, second_for_push,
};
use super::key_source::source_of;
use super::redact;
use super::setting_values::WalCopies;
use super::settings::{NOTHING_DONE, Origin};
use super::settings_table::{Id, setting};
use super::signals;
use super::units::{human_duration, human_size};
use crate::failure::{Failure, Kind};
use crate::ops::Which;
use crate::ops::ahead::wal_directory_of_server;
use crate::ops::archive_push::{self, Pushed};
use crate::ops::spool::{Destinations, Drained, Keeping, OwnProgram, drain, keep_drained};
use crate::ops::stall::{HostState, SPOOL_STALL_MAX, SpoolState, Stall, StallSpool};
use crate::pg::PgTimestamp;
use crate::pgdata::StallDirectory;
use crate::repo::Repository;
use crate::store::file::FileStore;

/// The name of the directory of records in the directory of WAL, where no spool is set.
const BESIDE_WAL: &str = "highwater.stall";

/// The command that drains until nothing is left.
const DRAIN_SPOOL: &str = "drain-spool";

/// How long the store's own repetitions may go on where WAL has another place to go.
const RETRY_DEADLINE: Duration = Duration::from_secs(20);

/// Threads of `drain-spool`.
const THREADS: usize = 2;

const WAL_DIRECTORY: &str = "pg_wal";

/// Returns what is set for a store that is away; `None` if nothing is, or there is no place for it, or the second of two
/// repositories is meant alone: what lies here is sealed under the first's keys. `wal` is the directory of WAL, where it
/// is known.
pub(super) fn stall(
    wal: Option<&Path>,
    surroundings: &Surroundings<'_>,
) -> Result<Option<Stall>, Failure> {
    let settings = surroundings.settings;
    let is_named = settings.repo.is_some() && settings.cluster.is_some();
    if !settings.stall.is_set() || !is_named || settings.which == Which::Second {
        return Ok(None);
    }
    let cluster: crate::format::ClusterName =
        settings.require_cluster()?.parse().map_err(|error: crate::format::NameError| {
            let next = "choose another name";
            Failure::new(Kind::Usage, "the cluster's name cannot be used", NOTHING_DONE, next)
                .because(error)
        })?;
    let spool = settings.stall.spool.as_ref().map(|spool| spool.value.join(cluster.as_str()));
    let is_spool = spool.is_some();
    let Some(directory) = spool.or_else(|| Some(wal?.join(BESIDE_WAL))) else { return Ok(None) };
    let store = Arc::new(FileStore::new(StallDirectory::store_root(&directory), SPOOL_STALL_MAX));
    let repository = match settings.key.choice() {
        Some(choice) => Repository::encrypted(store, cluster, source_of(&choice.value)),
        None => Repository::new(store, cluster),
    };
    let max_bytes = settings.stall.spool_max_bytes.value;
    Ok(Some(Stall {
        directory,
        spool: is_spool.then_some(StallSpool { repository, max_bytes }),
        backlog_max_bytes: settings.stall.backlog_max_bytes.as_ref().map(|max| max.value),
        stands_in_for: redact::url(settings.require_repo()?).0,
        wal_directory: wal.map(Path::to_owned),
        host: host_name(),
    }))
}

/// The same for who was not called by the server: the directory of WAL is that of the data directory that is named.
pub(super) fn stall_of_host(surroundings: &Surroundings<'_>) -> Result<Option<Stall>, Failure> {
    stall(wal_directory(surroundings).as_deref(), surroundings)
}

/// Returns the directory of WAL of the data directory that is named, or of the one we are in.
fn wal_directory(surroundings: &Surroundings<'_>) -> Option<PathBuf> {
    let said = surroundings.settings.pgdata.as_ref().map(|pgdata| pgdata.value.clone());
    let said = said.or_else(|| surroundings.environment.postgres.get("PGDATA").map(PathBuf::from));
    let wal = said.unwrap_or_default().join(WAL_DIRECTORY);
    wal.join("archive_status").is_dir().then_some(wal)
}

/// Tells the state of this host, where anything is known of it. That it cannot be looked at is told, and keeps nobody from
/// telling what the repository holds.
pub(super) fn host_state(surroundings: &Surroundings<'_>) -> Option<HostState> {
    let state = stall_of_host(surroundings).and_then(|stall| match stall {
        Some(stall) => stall.host_state().map(Some),
        None => Ok(wal_directory(surroundings).as_deref().map(HostState::of_wal)),
    });
    state.unwrap_or_else(|failure| {
        tracing::warn!("{failure}. {}", failure.next);
        None
    })
}

/// Stores a WAL file, or does with it what is set for a store that is away. Returns what the store has, and nothing for
/// a file that it has not: that is told here, louder.
pub(super) fn push(
    mut request: archive_push::Request,
    stall: &Stall,
    surroundings: &Surroundings<'_>,
) -> Result<Option<archive_push::Report>, Failure> {
    let opened = open_repository_retrying(surroundings, RETRY_DEADLINE)?;
    request.second = second_for_push(surroundings, RETRY_DEADLINE)?;
    let pushed = run_light(archive_push::run_despite(&opened.repository, &request, stall))?;
    match pushed {
        Pushed::Stored(report) => return Ok(Some(report)),
        Pushed::Spooled { report, held } => {
            let since = held.oldest.and_then(|since| jiff::Timestamp::try_from(since).ok());
            let since = since
                .map_or_else(String::new, |since| format!(", since {}", PgTimestamp::from(since)));
            tracing::warn!(
                "`{}` is kept on this host only: the store is away, and {} files ({}) wait for it in `{}`{since}. They are lost if this host is",
                report.name,
                held.files,
                human_size(held.bytes),
                stall.directory.display()
            );
        }
        Pushed::LetGo { name, gap: Some(gap) } => {
            tracing::error!(
                "`{name}` was LET GO and is not in the archive: {}. WAL from {} to {} on timeline {} is lost: no moment behind {} can be reached by recovery until the next backup, which is taken as soon as the store answers",
                gap.why,
                gap.start_lsn,
                gap.end_lsn,
                gap.timeline,
                gap.start_lsn
            );
        }
        Pushed::LetGo { name, gap: None } => {
            tracing::error!(
                "`{name}` was LET GO and is not in the archive, because too much WAL waits; no recovery needs it"
            );
        }
    }
    Ok(None)
}

/// Returns what is set for the server whose file this is.
pub(super) fn stall_of_server(
    path: &Path,
    surroundings: &Surroundings<'_>,
) -> Result<Option<Stall>, Failure> {
    stall(wal_directory_of_server(path), surroundings)
}

/// Leaves a process behind that drains the spool, if there is something to drain and nobody does. That it cannot be
/// started harms nothing: the next call tries again.
pub(super) fn leave_draining(stall: &Stall, surroundings: &Surroundings<'_>) {
    if !stall.is_pending() || stall.is_being_drained() {
        return;
    }
    let Ok(program) = program() else { return };
    let mut command = Command::new(program);
    command.args(repository_flags(surroundings)).arg(DRAIN_SPOOL);
    command.envs(dsn_variable(surroundings));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(child) => tracing::debug!("process {} drains the stall spool", child.id()),
        Err(error) => tracing::warn!("nobody drains the stall spool: {error}"),
    }
}

/// A connection string that was given by flag goes on as a variable: it may hold a password.
fn dsn_variable(surroundings: &Surroundings<'_>) -> Vec<(String, String)> {
    let dsn = surroundings.settings.dsn.as_ref();
    let by_flag = dsn.filter(|dsn| matches!(dsn.origin, Origin::Flag(_)));
    by_flag
        .map(|dsn| (setting(Id::Dsn).variable.to_owned(), dsn.value.clone()))
        .into_iter()
        .collect()
}

/// Returns this program with the same settings.
pub(super) fn own_program(surroundings: &Surroundings<'_>) -> Result<OwnProgram, Failure> {
    let (flags, variables) = (repository_flags(surroundings), dsn_variable(surroundings));
    Ok(OwnProgram { program: program()?, flags, variables })
}

/// Opens the repository, or both, as a drain takes them.
pub(super) fn destinations(surroundings: &Surroundings<'_>) -> Result<Destinations, Failure> {
    let first = open_repository_retrying(surroundings, RETRY_DEADLINE)?.repository;
    let second = open_second_retrying(surroundings, RETRY_DEADLINE)?;
    let second = second.map(|opened| opened.repository);
    let one_is_enough = surroundings.settings.second.wal_copies.value == WalCopies::Any;
    Ok(Destinations { first, second, one_is_enough })
}

/// Drains until nothing is left.
pub(super) fn drain_spool(surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    leave_session();
    let Some(stall) = stall_of_host(surroundings)? else { return Ok(()) };
    let into = destinations(surroundings)?;
    let program = own_program(surroundings)?;
    run_parallel(THREADS, async {
        let work = |stop| keep_drained(&into, &stall, Some(&program), Keeping::UntilEmpty, stop);
        signals::stoppable(surroundings.output, work).await
    })?;
    Ok(())
}

/// What `spool` tells.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    host: HostState,
    /// What was drained now.
    #[serde(skip_serializing_if = "Option::is_none")]
    drained: Option<Drained>,
}

/// Shows the spool, or drains it.
pub(super) fn spool(wants_drain: bool, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let Some(stall) = stall_of_host(surroundings)? else {
        if surroundings.settings.which == Which::Second {
            let next = "leave `--only second` out: `--drain` brings it into both repositories";
            let what = "what lies on this host is sealed under the keys of the first repository";
            return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next).into());
        }
        let next = "Set `stall_spool = \"/dir\"` to keep WAL on this host while the store is away; docs/guide.md, \"When the store is away\".";
        let what = "no `stall_spool` is set, and no `wal_backlog_max` with a data directory that is known here";
        return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next).into());
    };
    let drained = if wants_drain {
        let into = destinations(surroundings)?;
        let program = own_program(surroundings)?;
        Some(run_light(drain(&into, &stall, Some(&program)))?)
    } else {
        None
    };
    let report = Report { host: stall.host_state()?, drained };
    surroundings.output.report(&report, text)?;
    report.ending(wants_drain).map_or(Ok(()), |kind| Err(Ended::Said(kind)))
}

impl Report {
    /// Returns the exit code's meaning: the state of what was put aside counts whoever drained.
    fn ending(&self, wants_drain: bool) -> Option<Kind> {
        if !wants_drain {
            return None;
        }
        let refused = self.drained.iter().flat_map(|drained| &drained.refused);
        let kinds =
            refused.map(|one| if one.is_conflict { Kind::Conflict } else { Kind::Integrity });
        let worst = kinds.min_by_key(|kind| kind.exit_code());
        let spool = self.host.spool.as_ref();
        let is_kept = spool.is_some_and(|spool| !spool.refused.is_empty());
        let is_left = spool.is_some_and(|spool| spool.files > 0);
        // One that is closed in one repository waits for the other.
        let is_open = self.host.open_gaps.iter().any(|gap| gap.closed_in.is_none());
        worst
            .or(is_kept.then_some(Kind::Conflict))
            .or(is_open.then_some(Kind::Integrity))
            .or((is_left || !self.host.open_gaps.is_empty()).then_some(Kind::Store))
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    if let Some(drained) = &report.drained {
        if drained.is_drained_by_another {
            text.push_str("another process drains the spool now\n");
        } else {
            let _ = writeln!(
                text,
                "brought {} files ({}) into the repository",
                drained.stored,
                human_size(drained.stored_bytes)
            );
        }
        for one in &drained.refused {
            let _ = writeln!(
                text,
                "PUT ASIDE `{}`: {}\n  it is kept at {}",
                one.name,
                one.why,
                one.kept_at.display()
            );
        }
    }
    text.push_str(&host(&report.host));
    text
}

/// Tells what is true of this host alone.
pub(super) fn host(state: &HostState) -> String {
    let mut text = "on this host:\n".to_owned();
    match &state.waiting {
        None => text.push_str(
            "  waiting for archive_command: not known here (name the data directory: `pgdata`)\n",
        ),
        Some(waiting) if waiting.files == 0 => {
            text.push_str("  waiting for archive_command: nothing\n");
        }
        Some(waiting) => {
            let oldest = Duration::from_secs(waiting.oldest_seconds.unwrap_or_default());
            let _ = writeln!(
                text,
                "  waiting for archive_command: {} files ({}), the oldest for {}",
                waiting.files,
                human_size(waiting.bytes),
                human_duration(oldest)
            );
        }
    }
    if state.store_is_away {
        text.push_str("  the store was away a moment ago\n");
    }
    if let Some(spool) = &state.spool {
        text.push_str(&spool_text(spool));
    }
    for gap in &state.open_gaps {
        if let Some(closed) = gap.closed_in {
            let _ = writeln!(
                text,
                "  GAP: WAL from {} to {} on timeline {} was let go at {}; a backup behind it stands in the {} repository, and the {} one lacks one still",
                gap.start_lsn,
                gap.end_lsn,
                gap.timeline,
                gap.let_go_at,
                closed.word(),
                closed.other().word()
            );
            continue;
        }
        let recorded = if gap.stored { "recorded" } else { "not recorded in the repository yet" };
        let _ = writeln!(
            text,
            "  OPEN GAP: WAL from {} to {} on timeline {} was let go at {} ({recorded}); no moment behind it can be reached until a backup is taken",
            gap.start_lsn, gap.end_lsn, gap.timeline, gap.let_go_at
        );
        if let Some(last) = &gap.last_backup {
            let _ = writeln!(text, "    last backup to close it: {last}");
        }
    }
    text
}

fn spool_text(spool: &SpoolState) -> String {
    let mut text = String::new();
    let max = human_size(spool.max_bytes);
    if spool.files == 0 {
        let _ = writeln!(text, "  stall spool {}: empty (at most {max})", spool.directory);
    } else {
        let since = spool.since.map_or_else(String::new, |since| format!(", since {since}"));
        let who = if spool.is_being_drained { "" } else { "; nobody drains it now" };
        let _ = writeln!(
            text,
            "  stall spool {}: {} files ({} of {max}) are ON THIS HOST ONLY{since}{who}",
            spool.directory,
            spool.files,
            human_size(spool.bytes),
        );
    }
    for name in &spool.refused {
        let _ = writeln!(
            text,
            "  PUT ASIDE: `{name}` was acknowledged to PostgreSQL and is not in the repository; see {}/refused",
            spool.directory
        );
    }
    text
}

/// Returns what `info` adds: WAL that was let go, and this host, where there is anything to tell.
pub(super) fn of_info(report: &crate::ops::info::Report) -> String {
    let mut text = String::new();
    for gap in &report.let_go {
        let state = gap.closed_by.as_ref().map_or_else(
            || "OPEN: no moment behind it can be reached until a backup is taken".to_owned(),
            |id| format!("closed by backup {id}"),
        );
        let _ = writeln!(
            text,
            "WAL LET GO: {} to {} on timeline {} at {} on {}: {}\n  {state}",
            gap.start_lsn, gap.end_lsn, gap.timeline, gap.let_go_at, gap.host, gap.why
        );
    }
    if let Some(state) = report.host.as_ref().filter(|state| !state.is_calm()) {
        text.push_str(&host(state));
    }
    text
}

/// Returns what `verify` adds: WAL that no repository can tell of.
pub(super) fn note(state: &HostState) -> Option<String> {
    let spool = state.spool.as_ref().filter(|spool| spool.files > 0)?;
    Some(format!(
        "{} files of WAL are on this host only, in the stall spool {}",
        spool.files, spool.directory
    ))
}
