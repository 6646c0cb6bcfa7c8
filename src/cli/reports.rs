//! What a person reads: the text of each command's report.
//!
//! The JSON of a report is the report itself, or a struct here where a command's
//! document is put together from several.

use serde::Serialize;

use super::copy::SecondCopy;
use super::units::human_size;
use crate::agent;
use crate::format::{BackupId, DamagedPages};
use crate::ops::restore::PlanReport;
use crate::ops::{archive_get, archive_push, backup, check, init, receive, restore};
use crate::pg::{Lsn, PgTimestamp, ServerVersion, Timeline};
use crate::repo::{Put, SegmentSource};

pub(super) fn init(report: &init::Report) -> String {
    let done = if report.claimed { "is set up" } else { "was set up already" };
    let encrypted = if report.encrypted {
        "  everything stored in it is encrypted; without a key that opens it nobody can read it\n"
    } else {
        ""
    };
    format!(
        "`{}` {done} in {}\n  system identifier {}, PostgreSQL {}, WAL segments of {}\n{encrypted}\
         next: set archive_mode = on and archive_command = 'highwater archive-push %p', restart the server, run `highwater check`\n",
        report.cluster,
        report.repository,
        report.system_identifier,
        report.postgres_major,
        human_size(report.wal_segment_bytes),
    )
}

pub(super) fn check(report: &check::Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let mark = match finding.status {
            check::Status::Ok => "ok     ",
            check::Status::Warning => "WARNING",
            check::Status::Failed => "FAILED ",
        };
        text.push_str(&format!("{mark}  {}: {}\n", finding.name, finding.found));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("         -> {}\n", finding.remedy));
        }
    }
    text
}

pub(super) fn archive_push(report: &archive_push::Report) -> String {
    match report.outcome {
        Put::Stored => format!(
            "stored `{}`: {} as {}",
            report.name,
            human_size(report.plain_bytes),
            human_size(report.stored_bytes)
        ),
        Put::AlreadyThere => format!("`{}` was stored already, with the same content", report.name),
    }
}

pub(super) fn archive_get(report: &archive_get::Report) -> String {
    let from = match report.source {
        None | Some(SegmentSource::Whole) => String::new(),
        Some(SegmentSource::Pieces { valid_bytes }) => {
            format!(", joined from pieces up to byte {valid_bytes}")
        }
        Some(SegmentSource::Partial { valid_bytes }) => {
            format!(", from the .partial that promotion left, up to byte {valid_bytes}")
        }
    };
    format!("brought `{}` back{from}", report.name)
}

pub(super) fn receive(report: &receive::Report) -> String {
    let upto = report.stored_lsn.map_or(String::new(), |lsn| format!(", stored up to {lsn}"));
    format!(
        "received {} of WAL{upto}: {} segments, {} pieces, {} in the store\n",
        human_size(report.wal_bytes),
        report.segments,
        report.pieces,
        human_size(report.stored_bytes)
    )
}

pub(super) fn agent(report: &agent::Report) -> String {
    let received = report.received.as_ref().map_or(String::new(), receive);
    let second = report.received_into_second.as_ref().map_or_else(String::new, |report| {
        format!("into the second repository: {}", receive(report))
    });
    let scheduled = report.scheduled.map_or_else(String::new, |runs| {
        format!("ran {} commands in their time; {} more failed\n", runs.done, runs.failed)
    });
    format!(
        "stored {} WAL files, answered {} commands, fetched {} segments ahead\n{scheduled}{received}{second}",
        report.stored_files, report.answered, report.fetched_segments
    )
}

/// The document of `backup`. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct BackupDone {
    id: BackupId,
    started_at: PgTimestamp,
    finished_at: PgTimestamp,
    timeline: Timeline,
    start_lsn: Lsn,
    stop_lsn: Lsn,
    files: u64,
    size_bytes: u64,
    stored_bytes: u64,
    referenced_bytes: u64,
    unread_bytes: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    resumed: Vec<BackupId>,
    #[serde(skip_serializing_if = "is_zero")]
    resumed_bytes: u64,
    parent: Option<BackupId>,
    source: String,
    taken_from: String,
    #[serde(skip_serializing_if = "DamagedPages::is_empty")]
    damaged_pages: DamagedPages,
    #[serde(skip_serializing_if = "Option::is_none")]
    second_copy: Option<SecondCopy>,
}

impl BackupDone {
    pub(super) fn of(report: &backup::Report, second_copy: Option<SecondCopy>) -> Self {
        let made = &report.backup;
        Self {
            id: made.id.clone(),
            started_at: made.started_at,
            finished_at: made.finished_at,
            timeline: made.timeline,
            start_lsn: made.start_lsn,
            stop_lsn: made.stop_lsn,
            files: made.files,
            size_bytes: made.size_bytes,
            stored_bytes: made.stored_bytes,
            referenced_bytes: report.referenced_bytes,
            unread_bytes: report.unread_bytes,
            resumed: report.resumed.clone(),
            resumed_bytes: report.resumed_bytes,
            parent: made.parent.clone(),
            source: made.source.clone(),
            taken_from: made.taken_from.clone(),
            damaged_pages: made.damaged_pages.clone(),
            second_copy,
        }
    }

    pub(super) fn text(&self) -> String {
        let parent = self.parent.as_ref().map_or_else(String::new, |parent| {
            let unread = match self.unread_bytes {
                0 => String::new(),
                bytes => format!(" ({} of it not read again)", human_size(bytes)),
            };
            format!("; {} is unchanged since {parent}{unread}", human_size(self.referenced_bytes))
        });
        let resumed = if self.resumed.is_empty() {
            String::new()
        } else {
            let ids: Vec<&str> = self.resumed.iter().map(BackupId::as_str).collect();
            let bytes = human_size(self.resumed_bytes);
            format!("{bytes} had been stored by {}, which was never finished\n", ids.join(", "))
        };
        let damaged = damaged_pages(&self.damaged_pages);
        let copied = self.second_copy.as_ref().map_or_else(String::new, SecondCopy::text);
        format!(
            "backup {} is complete: {} in {} files, {} stored{parent}\n{resumed}\
             its WAL, {} to {} on timeline {}, is in the repository\n{copied}{damaged}",
            self.id,
            human_size(self.size_bytes),
            self.files,
            human_size(self.stored_bytes),
            self.start_lsn,
            self.stop_lsn,
            self.timeline,
        )
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Says which pages were damaged, and what that means.
pub(super) fn damaged_pages(pages: &DamagedPages) -> String {
    if pages.is_empty() {
        return String::new();
    }
    let mut text = format!(
        "DAMAGED ON THE SERVER: {} pages fail their checksum and are stored as they are. Keep all earlier backups, \
         and find out what holds them (pg_amcheck, pg_checksums) before anything else:\n",
        pages.count
    );
    for page in &pages.named {
        text.push_str(&format!("  {}, block {}\n", page.file, page.block));
    }
    text
}

pub(super) fn restore_plan(plan: &PlanReport) -> String {
    let at_most = if plan.delta && plan.survey.is_none() { "at most " } else { "" };
    let mut text = format!(
        "plan: backup {} ({} in {} files, {at_most}{} to fetch) into {}\n\
         plan: then WAL from {} to {} along timeline {}, to {}\n",
        plan.backup,
        human_size(plan.size_bytes),
        plan.files,
        human_size(plan.fetch_bytes),
        plan.pgdata.display(),
        plan.wal_start_lsn,
        plan.wal_end_lsn,
        plan.timeline,
        plan.target,
    );
    if let Some(survey) = &plan.survey {
        text.push_str(&format!(
            "plan: {} stand as they should be; {} in {} files do not; {} names do not belong there and are removed\n",
            human_size(survey.kept_bytes),
            human_size(survey.changed_bytes),
            survey.changed_files,
            survey.removed,
        ));
    } else if plan.delta {
        text.push_str(
            "plan: what stands there and is right is kept, and what does not belong is removed\n",
        );
    }
    for tablespace in &plan.tablespaces {
        text.push_str(&format!(
            "plan: tablespace {} from {} goes to {}\n",
            tablespace.oid,
            tablespace.from,
            tablespace.to.display()
        ));
    }
    if let Some(time) = plan.last_commit_time {
        text.push_str(&format!("plan: the last archived commit on this way is of {time}\n"));
    }
    text
}

/// The plan as a dry run prints it: it has read the WAL as well.
pub(super) fn dry_restore_plan(plan: &PlanReport) -> String {
    let mut text = restore_plan(plan);
    for line in made_by_replay(plan) {
        text.push_str(&format!("plan: {line}\n"));
    }
    text
}

/// Warns of tablespaces that no map of ours can put elsewhere.
fn made_by_replay(plan: &PlanReport) -> Vec<String> {
    let Some(made) = &plan.made_by_replay else {
        return vec![
            "the WAL was not read for tablespaces younger than the backup, which replay makes at their own path; --dry-run reads it"
                .to_owned(),
        ];
    };
    let line = |made: &restore::MadeByReplay| {
        let restore::MadeByReplay { oid, location, lsn, stands_here } = made;
        let what = format!("WARNING: replay makes tablespace {oid} at `{location}` (at {lsn})");
        if *stands_here {
            format!(
                "{what}, where files stand on this host, and writes into them, the files of the cluster's own server too. \
                 Do not start this copy beside its origin: restore on another host, or stop the origin and move that directory away first; \
                 or take a new backup and put its tablespaces elsewhere with --tablespace-map; or choose a target before that LSN"
            )
        } else {
            format!(
                "{what}: make that directory first, empty and owned by the server's user, or recovery stops there"
            )
        }
    };
    made.iter().map(line).collect()
}

/// The document of `restore`. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
#[allow(clippy::struct_excessive_bools)] // each is a fact of its own
pub(super) struct RestoreDone {
    #[serde(flatten)]
    plan: PlanReport,
    restore_command: String,
    archiving_off: bool,
    has_postgresql_conf: bool,
    standby: bool,
    ends_by_itself: bool,
    /// Whether the server stops at the target.
    #[serde(skip)]
    shuts_down: bool,
    environment_needed: Vec<String>,
    /// Bytes that stood already and names that were removed; only with `--delta`.
    #[serde(skip_serializing_if = "Option::is_none")]
    kept_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    removed: Option<u64>,
}

impl RestoreDone {
    pub(super) fn of(
        plan: PlanReport,
        report: &restore::Report,
        request: &restore::Request,
        environment_needed: Vec<String>,
    ) -> Self {
        use crate::plan::target::{RecoveryPoint, TargetAction};
        let target = &request.target;
        Self {
            plan,
            restore_command: report.restore_command.clone(),
            archiving_off: report.archiving_off,
            has_postgresql_conf: report.has_postgresql_conf,
            standby: request.standby,
            ends_by_itself: !request.standby
                && (target.point == RecoveryPoint::Latest
                    || target.action == TargetAction::Promote),
            shuts_down: target.action == TargetAction::Shutdown,
            environment_needed,
            kept_bytes: request.delta.then_some(report.kept_bytes),
            removed: request.delta.then_some(report.removed),
        }
    }

    pub(super) fn text(&self) -> String {
        let pgdata = self.plan.pgdata.display();
        let major = ServerVersion(self.plan.postgres_version).major().0;
        let mut text = format!("restored backup {} into {pgdata}\n", self.plan.backup);
        if let (Some(kept), Some(removed)) = (self.kept_bytes, self.removed) {
            let of = human_size(self.plan.size_bytes);
            let kept = human_size(kept);
            text.push_str(&format!("{kept} of its {of} stood already; {removed} names did not belong and were removed\n"));
        }
        for line in made_by_replay(&self.plan) {
            text.push_str(&format!("{line}\n"));
        }
        text.push_str("\nnext:\n");
        let mut step = 1;
        let mut say = |line: String| {
            text.push_str(&format!("  {step}. {line}\n"));
            step += 1;
        };
        if !self.has_postgresql_conf {
            say("the backup has no postgresql.conf (Debian keeps it in /etc/postgresql): put the server's configuration in place".to_owned());
        }
        if !self.environment_needed.is_empty() {
            say(format!(
                "the server's environment needs {} as this shell has them",
                self.environment_needed.join(", ")
            ));
        }
        say(format!("start PostgreSQL {major}: pg_ctl -D {pgdata} start"));
        if self.standby {
            say("it follows the archive as a standby until `pg_ctl promote`".to_owned());
        } else if self.ends_by_itself {
            say("it replays WAL and then takes writes on a new timeline".to_owned());
        } else if self.shuts_down {
            say("it replays WAL and shuts down at the target".to_owned());
        } else {
            say("it replays WAL and pauses at the target, open for reading; look at the data, then SELECT pg_wal_replay_resume() to end recovery and take writes there. A table that the next transaction drops or alters is locked until then".to_owned());
        }
        if self.archiving_off {
            say("ARCHIVING IS OFF in this copy, so that it cannot disturb its origin. If it is the cluster from now on: ALTER SYSTEM RESET archive_mode, restart, and take a new backup".to_owned());
        }
        text
    }
}
