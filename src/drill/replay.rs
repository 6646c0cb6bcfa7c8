//! Recovery in the private server: waited for, and where it has ended.
//!
//! The server promotes at the target, so that recovery is seen to end. What it then says of itself is believed: its
//! control file, the history file of the timeline it began, and three lines of its log.

use super::server::{CameUp, Launch};
use super::watch::Watch;
use super::{Phases, UNHARMED, not_on_disk};
use crate::failure::{Failure, Kind};
use crate::format::DrillReached;
use crate::ops::Progress;
use crate::pg::{ClusterState, Lsn, PgTimestamp, Timeline, TimelineHistory};
use crate::pgdata::DiskError;

/// Lets the server recover and stops it in good order.
///
/// # Errors
/// [`Kind::Integrity`] where the target was not reached, [`Kind::Store`] where the store was away, and what the watch
/// says.
pub(super) async fn recover(
    launch: &Launch<'_>,
    watch: &mut Watch,
    phases: &mut Phases,
    progress: &dyn Progress,
) -> Result<DrillReached, Failure> {
    progress.total(None);
    progress.note("starting the private server");
    phases.begin("starting");
    let mut server = launch.start()?;
    if let CameUp::Ended = server.begun(launch, watch).await? {
        return Err(ended(&launch.log_tail()));
    }
    phases.begin("replaying");
    progress.note("replaying WAL");
    if let CameUp::Ended = server.ready(launch, watch).await? {
        return Err(ended(&launch.log_tail()));
    }
    phases.begin("checking");
    progress.note("stopping the server in good order");
    let is_stopped = server.stop(watch).await?;
    let control = launch.control()?;
    if !is_stopped || control.state != ClusterState::ShutDown {
        let what = "the recovered server did not shut down in good order";
        let next = "Its log, above, says why; `--keep` keeps the files.";
        return Err(Failure::new(Kind::Integrity, what, UNHARMED, next));
    }
    reached(launch, control.checkpoint.timeline)
}

/// Reads where the timeline that was followed ends, and the time of the last commit.
fn reached(launch: &Launch<'_>, began: Timeline) -> Result<DrillReached, Failure> {
    let path = launch.scratch.data().join("pg_wal").join(began.history_file_name());
    let bytes = std::fs::read(&path).map_err(|e| not_on_disk(DiskError::new("read", &path, e)))?;
    let history = TimelineHistory::parse(began, &bytes).map_err(|error| {
        let what = "the recovered server wrote a history file that cannot be read";
        let next = "Please report this with the lines above.";
        Failure::new(Kind::Bug, what, UNHARMED, next).because(error)
    })?;
    let (timeline, end_lsn) = history.ancestors().last().copied().unwrap_or((began, Lsn::INVALID));
    let last_commit_time = last_commit_time(&launch.log_tail());
    Ok(DrillReached { timeline, end_lsn, last_commit_time })
}

/// Reads the time of the last commit or abort that was replayed; the log is in English, and its times are UTC's.
/// Source: `PerformWalRecovery` in `src/backend/access/transam/xlogrecovery.c` (`xlog.c` before 15).
fn last_commit_time(log: &str) -> Option<PgTimestamp> {
    const SAID: &str = "last completed transaction was at log time ";
    let line = log.lines().rfind(|line| line.contains(SAID))?;
    let text = line.split_once(SAID)?.1.trim();
    let text = text.strip_suffix("+00")?.replacen(' ', "T", 1);
    let time: jiff::Timestamp = format!("{text}Z").parse().ok()?;
    Some(PgTimestamp::from(time))
}

/// Says why a server ended before it took connections.
fn ended(log: &str) -> Failure {
    let (kind, next) = why_ended(log);
    let what = match kind {
        Kind::Integrity => "the private server ended before it had reached the target",
        _ => "the private server ended, and not because of what was restored",
    };
    let because = log.lines().rfind(|line| line.contains("FATAL:") || line.contains("PANIC:"));
    let because = because.unwrap_or("its log names no reason").to_owned();
    Failure::new(kind, what, UNHARMED, next).because(because)
}

/// Judges the log of a server that has ended.
fn why_ended(log: &str) -> (Kind, &'static str) {
    let is_said = |text: &str| log.lines().any(|line| line.contains(text));
    // The exit codes of `archive-get` are 128 and the kind of its failure (docs/reference.md).
    let exit = |code: u8| {
        log.lines()
            .any(|line| line.ends_with(&format!("child process exited with exit code {code}")))
    };
    if exit(133) {
        return (
            Kind::Store,
            "The store did not give WAL during recovery: nothing is known of what it holds. Run the drill again when it is well.",
        );
    }
    if exit(135) || is_said("No space left on device") {
        return (
            Kind::Disk,
            "Make room on the file system of the scratch directory, or choose another with `--scratch`.",
        );
    }
    if exit(130) {
        return (
            Kind::Usage,
            "`restore_command` could not work in the server's environment: with a server of another user (`drill_user`), settings, key and repository must be readable for that user.",
        );
    }
    if is_said("resource manager with ID") {
        return (
            Kind::Usage,
            "The WAL holds records of an extension: name its library in `drill_preload`, as the cluster has it in shared_preload_libraries.",
        );
    }
    if is_said("could not load library") || is_said("could not access file \"$libdir") {
        return (
            Kind::Postgres,
            "Install the libraries of `drill_preload` on this host, for this major version.",
        );
    }
    if is_said("could not create shared memory") || is_said("could not map anonymous shared memory")
    {
        return (
            Kind::Postgres,
            "The host has not enough memory for a second server; run the drill elsewhere.",
        );
    }
    (
        Kind::Integrity,
        "Run `highwater verify --deep`: it names what is damaged or missing, which moments that costs, and what to do. Take a new backup now.",
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// As a server of 18 wrote it.
    const LOG: &str = "\
2026-11-22 19:07:33.101 UTC [812] LOG:  starting point-in-time recovery to WAL location (LSN) \"0/50001A0\"
2026-11-22 19:07:33.262 UTC [812] LOG:  recovery stopping after WAL location (LSN) \"0/50001A0\"
2026-11-22 19:07:33.262 UTC [812] LOG:  redo done at 0/50001A0 system usage: CPU: user: 0.01 s, system: 0.00 s, elapsed: 0.15 s
2026-11-22 19:07:33.262 UTC [812] LOG:  last completed transaction was at log time 2026-11-22 19:07:31.9512+00
";

    #[test]
    fn the_time_of_the_last_commit_is_read_from_the_log() {
        let time = last_commit_time(LOG).unwrap();
        assert_eq!(time.to_unix_micros(), Some(1_795_374_451_951_200));
        assert_eq!(last_commit_time("LOG:  redo done at 0/50001A0"), None);
    }

    #[test]
    fn a_store_that_is_away_is_no_word_about_what_it_holds() {
        let died = |why: &str| why_ended(&format!("{LOG}2026 UTC [8] FATAL:  {why}\n")).0;
        let restore = "could not restore file \"00000001000000000000000A\" from archive: child process exited with exit code";
        assert_eq!(died(&format!("{restore} 133")), Kind::Store);
        assert_eq!(died(&format!("{restore} 132")), Kind::Integrity);
        assert_eq!(died(&format!("{restore} 130")), Kind::Usage);
        assert_eq!(died(&format!("{restore} 135")), Kind::Disk);
        assert_eq!(
            died("recovery ended before configured recovery target was reached"),
            Kind::Integrity
        );
        assert_eq!(died("resource manager with ID 128 not registered"), Kind::Usage);
        assert_eq!(
            died("could not write to file \"pg_wal/x\": No space left on device"),
            Kind::Disk
        );
        assert_eq!(why_ended("").0, Kind::Integrity);
    }
}
