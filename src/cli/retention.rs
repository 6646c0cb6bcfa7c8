//! Running `expire`, `pin` and `unpin`.

use std::fmt::Write;

use serde::Serialize;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{host_name, open_repository, run_light};
use super::output::columns;
use super::requests::PinRequest;
use super::retention_settings::RetentionSettings;
use super::settings::NOTHING_DONE;
use super::two::{Reported, each};
use super::units::{human_duration, human_size};
use super::{progress, signals};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, NameError, Pin};
use crate::ops;
use crate::ops::expire::{Report, WalLine};
use crate::pg::PgTimestamp;
use crate::plan::retention::{LOOK_HOLDS_FOR, Policy, PolicyInfo};

pub(super) fn expire(dry_run: bool, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let settings = surroundings.settings;
    let policies = [&settings.retention, &settings.second.retention].map(RetentionSettings::policy);
    // Where neither has one, each says what it takes.
    let is_any_set = settings.second.url.is_some() && policies.iter().any(Policy::is_set);
    each(surroundings, |one| {
        if is_any_set && !one.settings.retention.policy().is_set() {
            let text = |_: &NoRetention| {
                "no retention is set for it, so that nothing is ever deleted\n".to_owned()
            };
            return Reported::new(&NoRetention { retention: "not set" }, text, None);
        }
        expire_one(dry_run, one)
    })
}

/// What is told of a repository whose retention is not set.
#[derive(Serialize)]
struct NoRetention {
    retention: &'static str,
}

fn expire_one(dry_run: bool, surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let policy = surroundings.settings.retention.policy();
    let request =
        ops::expire::Request { policy, dry_run, now: None, look_holds_for: LOOK_HOLDS_FOR };
    let listener = progress::listener("expire", surroundings.output);
    let outcome = run_light(async {
        let work = |stop| ops::expire::run(&opened.repository, &request, &*listener, stop);
        signals::stoppable(surroundings.output, work).await
    });
    listener.finish();
    let report = outcome?;
    Reported::new(&report, text, report.failed())
}

pub(super) fn pin(request: &PinRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    let backup = backup_id(&request.backup)?;
    if let Some(until) = &request.until {
        surroundings.output.say(&format!("backup {backup} is to be kept until {}", until.in_full));
    }
    each(surroundings, |one| pin_one(backup.clone(), request.clone(), one))
}

fn pin_one(
    backup: BackupId,
    request: PinRequest,
    surroundings: &Surroundings<'_>,
) -> Result<Reported, Failure> {
    let opened = open_repository(surroundings)?;
    let request = ops::pin::Request {
        backup,
        until: request.until.map(|until| PgTimestamp::from_unix_micros(until.unix_micros)),
        reason: request.reason,
        host: host_name(),
    };
    let pin = run_light(ops::pin::pin(&opened.repository, &request))?;
    let text = |pin: &Pin| {
        let until =
            pin.until.map_or_else(|| "it is unpinned".to_owned(), |until| until.to_string());
        format!("backup {} is kept until {until}\n", pin.backup)
    };
    Reported::new(&pin, text, None)
}

pub(super) fn unpin(backup: &str, surroundings: &Surroundings<'_>) -> Result<Reported, Failure> {
    let id = backup_id(backup)?;
    let opened = open_repository(surroundings)?;
    let done = run_light(ops::pin::unpin(&opened.repository, &id))?;
    let text = |done: &ops::pin::Unpinned| {
        let pins = if done.removed == 1 { "its pin" } else { "all its pins" };
        format!("{pins} taken off backup {}: the retention policy decides alone\n", done.backup)
    };
    Reported::new(&done, text, None)
}

fn backup_id(text: &str) -> Result<BackupId, Failure> {
    text.parse().map_err(|error: NameError| {
        let next = "`highwater info` lists the backups";
        Failure::new(Kind::Usage, format!("`{text}` names no backup"), NOTHING_DONE, next)
            .because(error)
    })
}

/// Says in words what a policy keeps.
pub(super) fn policy_in_words(policy: &PolicyInfo) -> String {
    let mut parts = Vec::new();
    if let Some(seconds) = policy.retain_window_seconds {
        let window = human_duration(std::time::Duration::from_secs(seconds));
        parts.push(format!("every moment of the last {window}"));
    }
    let counts = [
        (policy.retain_backups, "newest backups with all WAL since"),
        (policy.retain_daily, "daily"),
        (policy.retain_weekly, "weekly"),
        (policy.retain_monthly, "monthly"),
    ];
    for (count, what) in counts {
        parts.extend(count.map(|count| format!("{count} {what}")));
    }
    parts.push(format!("at least {} usable", policy.min_backups));
    parts.join(", ")
}

fn text(report: &Report) -> String {
    let mut text = format!(
        "{} of {} in {}\n  kept: {}\n",
        if report.dry_run {
            "what expire would do, and did not,"
        } else {
            "expired backups and WAL"
        },
        report.cluster,
        report.repository,
        policy_in_words(&report.policy),
    );
    if report.is_resting {
        let _ = writeln!(
            text,
            "  nothing has been stored since {}: ages are counted from there, and retention rests",
            report.as_of
        );
    }
    if let Some(start) = report.window_start {
        let _ = writeln!(text, "  the window begins at {start}");
    }
    text.push('\n');
    text.push_str(&backups(report));
    for line in &report.wal {
        text.push_str(&wal(line));
    }
    text.push_str(&ending(report));
    text
}

fn backups(report: &Report) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for backup in &report.backups {
        let fate = match (backup.kept, backup.point_in_time) {
            (true, true) => "stays",
            (true, false) => "stays alone",
            (false, _) => "goes",
        };
        let unusable = if backup.usable { "" } else { "(not usable: its WAL is not here) " };
        let why = format!("{unusable}{}", backup.why.join("; "));
        rows.push(vec![backup.id.to_string(), fate.to_owned(), why]);
    }
    for backup in &report.unfinished_backups {
        let (fate, why) = match backup.state {
            "running" => ("stays", "unfinished: it may be running"),
            "dead" => ("goes", "unfinished: no sign of life for too long"),
            _ => ("goes", "what is left of a deleted backup"),
        };
        let host = backup.host.as_ref().map_or_else(String::new, |host| format!(", on {host}"));
        rows.push(vec![backup.id.to_string(), fate.to_owned(), format!("{why}{host}")]);
    }
    for backup in &report.damaged_backups {
        let why = format!("DAMAGED: {}; no WAL is deleted while it is there", backup.why);
        rows.push(vec![backup.id.to_string(), "stays".to_owned(), why]);
    }
    let mut text = columns(&rows);
    for kept in &report.kept_packs {
        let packs = kept.packs.map_or("everything".to_owned(), |packs| format!("{packs} packs"));
        let _ = writeln!(text, "  {packs} of {} stay: {}", kept.backup, kept.by);
    }
    text.push('\n');
    text
}

fn wal(line: &WalLine) -> String {
    let of = line.system_identifier.map_or_else(String::new, |id| format!(" of cluster {id}"));
    let mut text = format!("WAL of timeline {}{of}\n", line.timeline);
    for kept in &line.kept {
        let end = kept.end_lsn.map_or_else(|| "the end".to_owned(), |end| end.to_string());
        let _ = writeln!(text, "  stays  {} to {end}: {}", kept.start_lsn, kept.why);
    }
    for gone in &line.deleted {
        let _ = writeln!(text, "  goes   {} to {}", gone.start_lsn, gone.end_lsn);
    }
    text
}

fn ending(report: &Report) -> String {
    let deleted = &report.deleted;
    let mut text = format!(
        "\n{}: {} backups, {} objects, {}\n",
        if report.dry_run { "would be deleted" } else { "deleted" },
        deleted.backups,
        deleted.objects,
        human_size(deleted.bytes),
    );
    if report.refused.objects > 0 {
        let _ = writeln!(
            text,
            "REFUSED by the store: {} objects, which stay (a lock or retention of the bucket, or credentials that may not delete):",
            report.refused.objects
        );
        for refusal in &report.refused.named {
            let _ = writeln!(text, "  {}: {}", refusal.key, refusal.why);
        }
    }
    text
}
