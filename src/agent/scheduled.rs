//! Backups, `expire`, `verify` and drills in their time, as children: each is the command that a person would run.
//!
//! Never here: when what is due (`plan::schedule`), or what the commands do.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde::Serialize;

use crate::ops::{StopRequest, control_of, now};
use crate::pg::{ClusterState, PgTimestamp, SystemId};
use crate::plan::schedule::{Attempt, Due, Known, Schedule, Task, next};
use crate::repo::{BackupState, RepoError, Repository};

/// How often it looks what is due, at least: clocks are set, hosts sleep, standbys are promoted.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// How often a child is looked at.
const CHILD_LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a child may take to end in good order at a stop; then it is killed, which every command survives.
const CHILD_STOP_MAX: Duration = Duration::from_mins(1);

/// A backup that is not finished is taken for one that runs as long as it has stored something within this time.
const RUNNING_MAX: Duration = Duration::from_mins(30);

/// How often it looks what has become of such a backup: it may have died.
const RUNNING_LOOK_EVERY: Duration = Duration::from_mins(5);

/// So many of the newest backups are looked at for one that counts.
const BACKUPS_LOOKED_AT_MAX: usize = 32;

/// What is to be run, and how.
#[derive(Debug, Clone)]
pub struct Scheduled {
    /// When.
    pub schedule: Schedule,
    /// This program, by its full path.
    pub program: PathBuf,
    /// The flags by which it finds the same settings.
    pub flags: Vec<String>,
}

/// What was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Runs {
    /// Commands that ended with 0.
    pub done: u64,
    /// Commands that did not.
    pub failed: u64,
}

/// The newest on record of one task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Newest {
    at: PgTimestamp,
    /// Whether it is a backup that somebody is taking now, and that may never be finished.
    is_running: bool,
}

/// What is remembered of one task.
#[derive(Debug, Clone, Copy, Default)]
struct Page {
    /// The newest on record, and since when that is known here.
    newest: Option<(Newest, Instant)>,
    /// When the last attempt began and ended, and how many have failed in a row.
    last: Option<(Instant, Instant, u32)>,
}

impl Page {
    fn note(&mut self, newest: Option<Newest>) {
        if self.newest.map(|(known, _)| known) != newest || newest.is_some_and(|new| new.is_running)
        {
            self.newest = newest.map(|newest| (newest, Instant::now()));
        }
    }

    fn tried(&mut self, began: Instant, is_done: bool) {
        let failures = self.last.map_or(0, |(_, _, failures)| failures);
        let failures = if is_done { 0 } else { failures.saturating_add(1) };
        self.last = Some((began, Instant::now(), failures));
    }

    fn known(&self, now: PgTimestamp) -> Known {
        // One that may have died meanwhile is as good as unknown, so that it is looked at again.
        let is_known =
            |seen: &Instant, new: &Newest| !new.is_running || seen.elapsed() < RUNNING_LOOK_EVERY;
        let newest = self.newest.filter(|(new, seen)| is_known(seen, new));
        Known {
            age: newest.map(|(new, seen)| age(new.at, now, seen.elapsed())),
            last: self.last.map(|(began, ended, failures)| Attempt {
                began_ago: began.elapsed(),
                ended_ago: ended.elapsed(),
                failures,
            }),
        }
    }
}

/// Returns how old something is. Where it lies in the future, since a clock was set back, only that counts for how
/// long it has been known.
fn age(at: PgTimestamp, now: PgTimestamp, known_for: Duration) -> Duration {
    let by_clock = u64::try_from(now.0.saturating_sub(at.0)).unwrap_or(0);
    Duration::from_micros(by_clock).max(known_for)
}

/// Runs what is due, one at a time, until it is asked to stop.
///
/// Failures are told in the log and tried again: whatever becomes of a run, archiving goes on.
pub(super) async fn keep(
    scheduled: &Scheduled,
    repositories: &[Repository],
    data_directory: &Path,
    mut stop: StopRequest,
) -> Runs {
    let mut runs = Runs::default();
    let mut pages = [Page::default(); 4];
    let mut was_standby = false;
    while !stop.is_wanted() {
        let is_standby = is_standby(data_directory);
        let schedule = scheduled.schedule.beside(is_standby);
        if is_standby && !was_standby && schedule != scheduled.schedule {
            tracing::info!("this server is a standby: no backups are taken here");
        }
        was_standby = is_standby;
        let due = due(&schedule, &pages);
        let wait = due.map_or(LOOK_EVERY, |due| due.wait.min(LOOK_EVERY));
        if !wait.is_zero() {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = stop.wanted() => break,
            }
            continue;
        }
        let Some(Due { task, .. }) = due else { continue };
        let began = Instant::now();
        let page = &mut pages[task as usize];
        match newest(task, repositories, data_directory).await {
            Ok(newest) => page.note(newest),
            Err(error) => {
                let command = task.words().join(" ");
                tracing::warn!("whether `{command}` is due cannot be found out now: {error}");
                page.tried(began, false);
            }
        }
        // Somebody else may have done it.
        let still = self::due(&schedule, &pages);
        if still.is_some_and(|still| still.wait.is_zero() && still.task == task) {
            let is_done = run(scheduled, task, &mut stop).await;
            pages[task as usize].tried(began, is_done);
            *(if is_done { &mut runs.done } else { &mut runs.failed }) += 1;
        }
    }
    runs
}

fn due(schedule: &Schedule, pages: &[Page; 4]) -> Option<Due> {
    let now = now();
    let known = pages.each_ref().map(|page| page.known(now));
    let seconds = now.to_unix_micros().map_or(0, |micros| micros / 1_000_000);
    next(schedule, &known, u64::try_from(seconds).unwrap_or(0))
}

fn is_standby(data_directory: &Path) -> bool {
    let state = control_of(data_directory).map(|control| control.state);
    let states = [ClusterState::InArchiveRecovery, ClusterState::ShutDownInRecovery];
    state.is_some_and(|state| states.contains(&state))
}

/// Returns when the newest was made that is on record in any repository which can be read.
///
/// # Errors
/// None of them can be read.
async fn newest(
    task: Task,
    repositories: &[Repository],
    data_directory: &Path,
) -> Result<Option<Newest>, RepoError> {
    let done = |at| Newest { at, is_running: false };
    let mut newest: Option<Newest> = None;
    let mut failed = None;
    let mut is_known = false;
    for repository in repositories {
        let found = match task {
            Task::Backup => {
                last_backup(repository, control_of(data_directory).map(|c| c.system_id)).await
            }
            // It leaves nothing behind, and is the same twice as once.
            Task::Expire => Ok(None),
            Task::Verify => {
                let reports = repository.verifications(1).await;
                reports.map(|reports| reports.first().map(|report| done(report.finished_at)))
            }
            Task::Drill => {
                let drill = repository.last_drill().await;
                drill.map(|drill| drill.map(|drill| done(drill.finished_at)))
            }
        };
        match found {
            Ok(found) => {
                newest = newest.into_iter().chain(found).max_by_key(|newest| newest.at);
                is_known = true;
            }
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if !is_known => Err(error),
        _ => Ok(newest),
    }
}

/// Returns when the last backup of this cluster began that is complete, or that somebody is taking now.
async fn last_backup(
    repository: &Repository,
    ours: Option<SystemId>,
) -> Result<Option<Newest>, RepoError> {
    let ids = repository.backup_ids().await?;
    for id in ids.iter().rev().take(BACKUPS_LOOKED_AT_MAX) {
        match repository.backup_state(id).await? {
            BackupState::Committed(backup) => {
                if ours.is_none_or(|ours| ours == backup.system_identifier) {
                    return Ok(Some(Newest { at: backup.started_at, is_running: false }));
                }
            }
            BackupState::Unfinished(backup) => {
                let stored = repository.last_stored_of(id).await?;
                let is_running =
                    stored.is_some_and(|stored| stored.elapsed().unwrap_or_default() < RUNNING_MAX);
                if let Some(begun) = backup.begun.filter(|_| is_running) {
                    return Ok(Some(Newest { at: begun.begun_at, is_running: true }));
                }
            }
            BackupState::Unreadable(_) => {}
        }
    }
    Ok(None)
}

/// A child; asked to end when it is dropped.
struct Running {
    child: Child,
    has_ended: bool,
}

impl Running {
    fn ended(&mut self) -> std::io::Result<Option<ExitStatus>> {
        let status = self.child.try_wait()?;
        self.has_ended = status.is_some();
        Ok(status)
    }

    fn signal(&self, signal: Signal) {
        // It was not waited for yet, so that its number is nobody else's.
        if !self.has_ended
            && let Some(pid) = Pid::from_raw(self.child.id().cast_signed())
            && let Err(error) = rustix::process::kill_process(pid, signal)
        {
            tracing::debug!("a child could not be told to end: {error}");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
    }
}

/// Runs one command to its end; returns whether it succeeded. At a stop it is told to end, and waited for.
async fn run(scheduled: &Scheduled, task: Task, stop: &mut StopRequest) -> bool {
    let words = task.words().join(" ");
    tracing::info!("`{words}` is due and begins");
    let began = Instant::now();
    let mut command = Command::new(&scheduled.program);
    command.args(&scheduled.flags).args(task.words());
    // What it says goes where ours goes. Signals of a terminal are for us to pass on: two would end it at once.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let mut running = match command.spawn() {
        Ok(child) => Running { child, has_ended: false },
        Err(error) => {
            tracing::error!("`{words}` could not be started: {error}; archiving goes on");
            return false;
        }
    };
    match wait(&mut running, stop).await {
        Ok(status) if status.success() => {
            tracing::info!("`{words}` has ended well after {} s", began.elapsed().as_secs());
            true
        }
        Ok(_) if stop.is_wanted() => {
            tracing::info!("`{words}` was ended, since the agent is to end");
            false
        }
        Ok(status) => {
            tracing::error!(
                "`{words}` has failed ({status}): what it said stands above. It comes again while it is due; archiving goes on"
            );
            false
        }
        Err(error) => {
            tracing::error!("`{words}` could not be waited for: {error}");
            false
        }
    }
}

async fn wait(running: &mut Running, stop: &mut StopRequest) -> std::io::Result<ExitStatus> {
    let mut told: Option<Instant> = None;
    loop {
        if let Some(status) = running.ended()? {
            return Ok(status);
        }
        match told {
            None => tokio::select! {
                () = tokio::time::sleep(CHILD_LOOK_EVERY) => {}
                _ = stop.wanted() => {
                    running.signal(Signal::TERM);
                    told = Some(Instant::now());
                }
            },
            Some(at) => {
                if at.elapsed() > CHILD_STOP_MAX {
                    tracing::warn!(
                        "a child does not end within {} s and is killed",
                        CHILD_STOP_MAX.as_secs()
                    );
                    running.signal(Signal::KILL);
                }
                tokio::time::sleep(CHILD_LOOK_EVERY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_the_future_ages_from_when_it_was_first_seen() {
        let hour = Duration::from_hours(1);
        let (at, later) = (PgTimestamp(0), PgTimestamp(3_600_000_000));
        assert_eq!(age(at, later, Duration::ZERO), hour);
        assert_eq!(age(at, later, hour * 2), hour * 2, "the clock was set back meanwhile");
        assert_eq!(age(later, at, Duration::ZERO), Duration::ZERO);
        assert_eq!(age(later, at, hour), hour);
        assert_eq!(age(PgTimestamp(i64::MAX), PgTimestamp(i64::MIN), hour), hour);
    }

    #[test]
    fn a_record_that_is_read_again_is_no_new_one_and_failures_are_counted_in_a_row() {
        let mut page = Page::default();
        let done = |at| Some(Newest { at: PgTimestamp(at), is_running: false });
        page.note(done(5));
        let first = page.newest;
        page.note(done(5));
        assert_eq!(page.newest, first);
        page.note(done(6));
        assert_ne!(page.newest, first);
        let failures = |page: &Page| page.last.map(|last| last.2);
        for (is_done, wanted) in [(false, 1), (false, 2), (true, 0), (false, 1)] {
            page.tried(Instant::now(), is_done);
            assert_eq!(failures(&page), Some(wanted));
        }
    }

    #[test]
    fn a_backup_that_somebody_takes_puts_ours_off_only_until_it_is_looked_at_again() {
        let begun = PgTimestamp(5);
        let minutes = |minutes: i64| PgTimestamp(5 + minutes * 60_000_000);
        for is_running in [true, false] {
            let mut page = Page::default();
            page.note(Some(Newest { at: begun, is_running }));
            assert_eq!(page.known(minutes(9)).age, Some(Duration::from_mins(9)));
            let Some(earlier) = Instant::now().checked_sub(RUNNING_LOOK_EVERY) else { return };
            page.newest = page.newest.map(|(newest, _)| (newest, earlier));
            let known = page.known(minutes(9)).age;
            assert_eq!(known, (!is_running).then_some(Duration::from_mins(9)));
            page.note(Some(Newest { at: begun, is_running }));
            assert_eq!(page.known(minutes(9)).age, Some(Duration::from_mins(9)), "it still runs");
        }
    }
}
