//! Running `drill`, and being its guard.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{host_name, open_repository, run_parallel};
use super::progress;
use super::requests::{DrillGoal, DrillRequest, RestoreRequest};
use super::restore::{restore_request, tell_target};
use super::signals;
use super::units::{human_duration, human_size};
use crate::drill::{self, Goal, Report};
use crate::failure::{Failure, Kind};
use crate::format::{CheckOutcome, Drill, DrillOutcome};
use crate::ops::info::DrillInfo;
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TargetAction, TimelineChoice};

/// How nice a drill is to everything else on the host; its server and its programs inherit it, and the kernel
/// derives the priority of reading and writing from it (ionice(1)).
const NICENESS: i32 = 10;

/// A variable of ours that may hold a secret and is no business of the server.
const DSN_VARIABLE: &str = "HIGHWATER_DSN";

/// Drills.
pub(super) fn drill(request: DrillRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let output = surroundings.output;
    let opened = open_repository(surroundings)?;
    let keep = request.keep;
    let request = drill_request(request, surroundings)?;
    be_nice();
    let listener = progress::listener("drill", output);
    let outcome = run_parallel(request.restore.jobs, async {
        let work = |stop| drill::run(&opened.repository, &request, listener.clone(), stop);
        signals::stoppable(output, work).await
    });
    listener.finish();
    let report = outcome?;
    let failed = report.failed();
    let kept_in = keep.then(|| request.scratch.clone());
    output.report(&Done::of(&report, kept_in), Done::text)?;
    if !output.json {
        for failure in report.failure.iter().chain(&report.not_stored) {
            output.failure(failure, failure.kind.exit_code());
        }
    }
    failed.map_or(Ok(()), |kind| Err(Ended::Said(kind)))
}

/// Waits for the end of a drill and clears up behind one that was killed.
pub(super) fn guard(root: &Path, keep: bool) -> Result<(), Failure> {
    drill::guard(root, keep).map_err(|why| {
        Failure::new(
            Kind::Disk,
            "could not clear up behind a drill that was killed",
            "Nothing but the drill's own was touched.",
            "The next drill in the same directory tries again.",
        )
        .because(why)
    })
}

fn drill_request(
    request: DrillRequest,
    surroundings: &Surroundings<'_>,
) -> Result<drill::Request, Failure> {
    let DrillRequest { backup, goal, target_in_full, timeout, keep } = request;
    let settings = surroundings.settings;
    let scratch = settings.drill.require_scratch()?.to_owned();
    let nowhere = RecoveryTarget {
        point: RecoveryPoint::Latest,
        inclusive: true,
        timeline: TimelineChoice::Latest,
        action: TargetAction::Promote,
    };
    let target = match &goal {
        DrillGoal::Target(target) => target.clone(),
        DrillGoal::RandomMoment { .. } => nowhere,
    };
    let restore = RestoreRequest {
        pgdata: scratch.clone(),
        backup,
        target,
        target_in_full,
        tablespace_map: Vec::new(),
        standby: false,
        dry_run: false,
        delta: false,
        take_over: false,
    };
    tell_target(&restore, surroundings.output);
    let restore = restore_request(restore, surroundings)?;
    let goal = match goal {
        DrillGoal::Target(target) => Goal::Target(target),
        DrillGoal::RandomMoment { seed } => {
            Goal::RandomMoment { seed: seed.unwrap_or_else(seed_of_now) }
        }
    };
    let drill = &settings.drill;
    let environment = surroundings.environment;
    let dsn = std::iter::once(DSN_VARIABLE.to_owned());
    Ok(drill::Request {
        restore,
        goal,
        scratch,
        keep,
        bindir: drill.bindir.as_ref().map(|bindir| bindir.value.clone()),
        search_path: environment.search_path.clone(),
        owner: drill.owner()?,
        checks: drill.checks.as_ref().map(|checks| checks.value.clone()),
        timeout,
        free_bytes_min: drill.free_bytes_min.value,
        preload: drill.preload.as_ref().map(|list| list.value.clone()).unwrap_or_default(),
        without_variables: environment.postgres.keys().cloned().chain(dsn).collect(),
        host: host_name(),
    })
}

/// A seed that is not likely to come twice, small enough to be typed again.
fn seed_of_now() -> u64 {
    let now = jiff::Timestamp::now().as_millisecond();
    now.unsigned_abs() % 1_000_000_000
}

/// Lets everything else on the host go first. Before any thread is made: threads and processes inherit it.
fn be_nice() {
    let now = rustix::process::getpriority_process(None).unwrap_or(0);
    if now < NICENESS
        && let Err(error) = rustix::process::setpriority_process(None, NICENESS)
    {
        tracing::debug!("the drill runs at normal priority: {error}");
    }
}

/// The document of `drill`. Field names are part of the contract of `--json`.
#[derive(Serialize)]
struct Done<'a> {
    #[serde(flatten)]
    drill: &'a Drill,
    /// Whether it is on record in the repository.
    on_record: bool,
    /// What to do next, where something ended it early or it could not be put on record.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    next: Vec<&'a str>,
    /// Where the files were left.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_in: Option<PathBuf>,
}

impl<'a> Done<'a> {
    fn of(report: &'a Report, kept_in: Option<PathBuf>) -> Self {
        let failures = report.failure.iter().chain(&report.not_stored);
        Self {
            drill: &report.drill,
            on_record: report.not_stored.is_none(),
            next: failures.map(|failure| failure.next.as_str()).collect(),
            kept_in,
        }
    }

    fn text(&self) -> String {
        let drill = self.drill;
        let mut text = match &drill.backup {
            Some(backup) => format!(
                "drilled backup {backup} ({} in files) to {}\n",
                human_size(drill.size_bytes),
                drill.target
            ),
            None => format!("drilled to {}\n", drill.target),
        };
        if let (Some(reached), Some(millis)) = (&drill.reached, drill.recovery_millis) {
            let last = reached
                .last_commit_time
                .map_or_else(String::new, |time| format!(", last commit {time}"));
            let _ = writeln!(
                text,
                "  recovered in {}: {} of WAL, up to {} on timeline {}{last}",
                human_duration(Duration::from_millis(millis)),
                human_size(drill.wal_bytes),
                reached.end_lsn,
                reached.timeline,
            );
        }
        let took = |millis: u64| human_duration(Duration::from_millis(millis));
        let phases: Vec<String> = drill
            .phases
            .iter()
            .map(|phase| format!("{} {}", phase.name, took(phase.millis)))
            .collect();
        let _ = writeln!(text, "  {}", phases.join(", "));
        for check in &drill.checks {
            let word = match check.outcome {
                CheckOutcome::Passed => "ok     ",
                CheckOutcome::Failed => "FAILED ",
                CheckOutcome::Skipped => "skipped",
            };
            let said = match check.outcome {
                CheckOutcome::Passed => check.said.lines().last().unwrap_or_default().to_owned(),
                _ => check.said.replace('\n', "\n           "),
            };
            let said = if said.is_empty() { said } else { format!(": {said}") };
            let _ = writeln!(text, "  {word}  {} ({}){said}", check.name, took(check.millis));
        }
        if let Some(log) = drill.failure.as_ref().map(|failure| &failure.server_log)
            && !log.is_empty()
        {
            let _ = writeln!(text, "  what the private server said last:");
            for line in log.lines() {
                let _ = writeln!(text, "    {line}");
            }
        }
        for note in &drill.notes {
            let _ = writeln!(text, "  note: {note}");
        }
        if let Some(seed) = drill.seed {
            let _ = writeln!(text, "  the moment was chosen with --seed {seed}");
        }
        if let Some(place) = &self.kept_in {
            let _ = writeln!(text, "  files and logs are left in {}", place.display());
        }
        text.push_str(match drill.outcome {
            DrillOutcome::Passed => "\nPASSED: what is stored came back\n",
            DrillOutcome::Failed => "\nFAILED\n",
            DrillOutcome::Unfinished => "\nNOT FINISHED: nothing was proved\n",
        });
        text
    }
}

/// Tells of the last drill, for `info`.
pub(super) fn last_drill(last: Option<&DrillInfo>) -> String {
    let Some(last) = last else {
        return "no drill was ever done: `highwater drill` proves that what is stored comes back\n"
            .to_owned();
    };
    let age = jiff::Timestamp::now().as_microsecond()
        - last.finished_at.to_unix_micros().unwrap_or_default();
    let age = Duration::from_micros(u64::try_from(age).unwrap_or(0));
    let mut text = format!(
        "last drill {}, {} ago: {}",
        last.id,
        human_duration(age),
        last.outcome.word().to_uppercase()
    );
    if let Some(millis) = last.recovery_millis {
        let took = human_duration(Duration::from_millis(millis));
        let _ = write!(text, "; recovery took {took}");
    }
    if let Some(failure) = &last.failure {
        let _ = write!(text, "; {failure}");
    }
    if !last.failed_checks.is_empty() {
        let _ = write!(text, "; failed: {}", last.failed_checks.join(", "));
    }
    text.push('\n');
    text
}
