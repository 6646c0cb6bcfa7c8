//! Running `copy`, and how its report reads.

use std::fmt::Write;

use serde::Serialize;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{both_sides, host_name, run_parallel};
use super::requests::{CopiedBackups, CopyRequest};
use super::second_repo::Only;
use super::settings::NOTHING_DONE;
use super::units::human_size;
use super::{progress, signals};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, NameError};
use crate::ops;
use crate::ops::Which;
use crate::ops::copy::{BackupLine, Choice, Outcome, Report, WalLine, WayReport};
use crate::plan::retention::REMAINS_SETTLE_AFTER;

/// Threads: proving what is copied takes processors.
const THREADS: usize = 2;

pub(super) fn copy(request: CopyRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let (first, second) = both_sides(surroundings)?.ok_or_else(|| {
        let what = "there is one repository only, so that nothing can be copied";
        let next = "name the second: `url` under `[second_repo]` in the settings file, HIGHWATER_SECOND_REPO or --second-repo; and leave out --only";
        Failure::new(Kind::Usage, what, NOTHING_DONE, next)
    })?;
    let backups = match request.backups {
        CopiedBackups::Nothing => Choice::Nothing,
        CopiedBackups::All => Choice::All,
        CopiedBackups::Newest => Choice::Newest,
        CopiedBackups::Named(id) => Choice::Named(id.parse().map_err(|error: NameError| {
            let next = "`highwater info` lists the backups";
            let what = format!("`{id}` names no backup");
            Failure::new(Kind::Usage, what, NOTHING_DONE, next).because(error)
        })?),
    };
    let request = ops::copy::Request {
        backups,
        wal: request.wal,
        from: request.from.map(|only| match only {
            Only::First => Which::First,
            Only::Second => Which::Second,
        }),
        dry_run: request.dry_run,
        host: host_name(),
        settle_after: REMAINS_SETTLE_AFTER,
    };
    let listener = progress::listener("copy", surroundings.output);
    let outcome = run_parallel(THREADS, async {
        let work = |stop| ops::copy::run(&first, &second, &request, &*listener, stop);
        signals::stoppable(surroundings.output, work).await
    });
    listener.finish();
    let report = outcome?;
    surroundings.output.report(&report, text)?;
    report.failed().map_or(Ok(()), |kind| Err(Ended::Said(kind)))
}

/// What became of a backup's copy. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct SecondCopy {
    /// Where the backup was taken into: `first` or `second`.
    taken_into: &'static str,
    /// Whether it is in the other repository too.
    is_in_both: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl SecondCopy {
    /// Says it in a line.
    pub(super) fn text(&self) -> String {
        let other = if self.taken_into == "first" { "second" } else { "first" };
        match &self.why {
            None => format!("it was copied into the {other} repository\n"),
            Some(why) => format!(
                "it is NOT in the {other} repository: {why}; `highwater copy --newest` brings it there\n"
            ),
        }
    }
}

/// Copies a backup that was just taken into the other repository. That it cannot be copied now is told, and no
/// failure: `copy` does it later.
pub(super) fn to_the_other(
    id: &BackupId,
    from: Which,
    surroundings: &Surroundings<'_>,
) -> SecondCopy {
    let request = ops::copy::Request {
        backups: Choice::Named(id.clone()),
        wal: false,
        from: Some(from),
        dry_run: false,
        host: host_name(),
        settle_after: REMAINS_SETTLE_AFTER,
    };
    let copied = (|| {
        let Some((first, second)) = both_sides(surroundings)? else { return Ok(None) };
        let listener = progress::listener("copy", surroundings.output);
        let outcome = run_parallel(THREADS, async {
            let work = |stop| ops::copy::run(&first, &second, &request, &*listener, stop);
            signals::stoppable(surroundings.output, work).await
        });
        listener.finish();
        outcome.map(Some)
    })();
    let why = match copied {
        Ok(report) => report.and_then(|report| {
            let trouble = report.ways.iter().flat_map(|way| &way.troubles).next();
            let told = trouble.map(|trouble| format!("{}: {}", trouble.what, trouble.why));
            told.or_else(|| report.failed().map(|_| "not all of its WAL is there".to_owned()))
        }),
        Err(failure) => Some(failure.to_string()),
    };
    if let Some(why) = &why {
        tracing::warn!("backup {id} is in the {} repository only: {why}", from.word());
    }
    SecondCopy { taken_into: from.word(), is_in_both: why.is_none(), why }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for way in &report.ways {
        let (from, to) = (&way.from_repository, &way.to_repository);
        let _ = writeln!(
            text,
            "{} of {}, from the {} repository into the {}\n  {from}\n  -> {to}",
            if report.dry_run { "what would be copied" } else { "copied" },
            report.cluster,
            way.from,
            way.to,
        );
        text.push_str(&way_text(way, report.dry_run));
    }
    text
}

fn way_text(way: &WayReport, dry_run: bool) -> String {
    let mut text = String::new();
    for backup in &way.backups {
        let _ = writeln!(text, "  backup {}: {}", backup.id, backup_in_words(backup));
    }
    let _ = writeln!(text, "  WAL: {}", wal_in_words(&way.wal, dry_run));
    for trouble in &way.troubles {
        let (what, which) = (&trouble.what, trouble.repository);
        let _ = writeln!(text, "  NOT COPIED: {what}: in the {which} repository, {}", trouble.why);
    }
    if way.troubles_unnamed > 0 {
        let _ = writeln!(text, "  NOT COPIED: {} more", way.troubles_unnamed);
    }
    text
}

fn backup_in_words(backup: &BackupLine) -> String {
    let mut words = match backup.outcome {
        Outcome::Copied => {
            format!("copied, {} packs, {}", backup.packs, human_size(backup.bytes))
        }
        Outcome::WouldBeCopied => "would be copied".to_owned(),
        Outcome::AlreadyThere if backup.packs > 0 => {
            format!("was there; {} packs that were missing were brought", backup.packs)
        }
        Outcome::AlreadyThere => "was there already".to_owned(),
        Outcome::NotKept => "left out: retention would delete it there".to_owned(),
        Outcome::NotCopied => "NOT COPIED, see below".to_owned(),
    };
    if backup.wal_complete == Some(false) {
        words.push_str("; WAL that it needs is MISSING in both");
    }
    words
}

/// Says what each repository lacks.
pub(super) fn missing_in_words(ways: &[WayReport]) -> String {
    let mut text = String::new();
    for way in ways {
        let missing = |backup: &&BackupLine| backup.outcome == Outcome::WouldBeCopied;
        let backups = way.backups.iter().filter(missing).count();
        if backups == 0 && way.wal.objects == 0 && way.troubles.is_empty() {
            let _ = writeln!(text, "the {} lacks nothing that the {} has", way.to, way.from);
            continue;
        }
        let _ = writeln!(
            text,
            "the {} LACKS what the {} has: {backups} backups; WAL: {}",
            way.to,
            way.from,
            wal_in_words(&way.wal, true)
        );
        if let Some(since) = way.wal.since {
            let _ = writeln!(
                text,
                "  the oldest of it was stored {since}; `highwater copy --all --wal` brings it"
            );
        }
    }
    text
}

/// Says how much WAL was copied, or is missing at the destination.
fn wal_in_words(wal: &WalLine, dry_run: bool) -> String {
    if wal.objects == 0 {
        return "nothing is missing".to_owned();
    }
    let done = if dry_run { "missing" } else { "copied" };
    let mut words = format!(
        "{} objects of {} segments {done}, {}",
        wal.objects,
        wal.segments,
        human_size(wal.bytes)
    );
    if let (Some(start), Some(end)) = (wal.start_lsn, wal.end_lsn) {
        let _ = write!(words, ", from {start} to {end}");
    }
    words
}
