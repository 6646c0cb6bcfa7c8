//! Running `copy`, and how its report reads.

use std::fmt::Write;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{both_sides, host_name, run_parallel};
use super::requests::{CopiedBackups, CopyRequest};
use super::second_repo::Only;
use super::settings::NOTHING_DONE;
use super::units::human_size;
use super::{progress, signals};
use crate::failure::{Failure, Kind};
use crate::format::NameError;
use crate::ops;
use crate::ops::Which;
use crate::ops::copy::{BackupLine, Choice, Outcome, Report, WalLine, WayReport};

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

/// Says how much WAL was copied, or is missing at the destination.
pub(super) fn wal_in_words(wal: &WalLine, dry_run: bool) -> String {
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
