//! What is set for a store that is away, whether it would work, and what such times have left.

use super::Report;
use crate::failure::Kind;
use crate::ops::stall::{HostState, Stall};

const SPOOL: &str = "stall spool";
const BACKLOG: &str = "waiting WAL";
const GAP: &str = "gaps";

/// Looks at this host.
pub(super) fn look_at_stall(stall: Option<&Stall>, report: &mut Report) {
    let Some(stall) = stall else { return };
    // Not made here: who runs this may be another user than PostgreSQL's.
    let parent = stall.directory.parent().filter(|parent| !parent.is_dir());
    if let Some(parent) = parent {
        return report.fail(
            SPOOL,
            Kind::Disk,
            format!("`{}` is not a directory", parent.display()),
            "Make it, for the user who runs PostgreSQL alone (mode 0700); is its disk mounted?",
        );
    }
    let state = match stall.host_state() {
        Ok(state) => state,
        Err(failure) => {
            let found = format!("{}: {}", failure.what, failure.causes().join(": "));
            return report.fail(SPOOL, failure.kind, found, failure.next);
        }
    };
    look_at_spool(&state, report);
    look_at_backlog(&state, stall.backlog_max_bytes, report);
    look_at_gaps(&state, report);
}

fn look_at_gaps(state: &HostState, report: &mut Report) {
    let (open, half): (Vec<_>, Vec<_>) =
        state.open_gaps.iter().partition(|gap| gap.closed_in.is_none());
    if let Some(first) = open.first() {
        let last = first.last_backup.as_deref().unwrap_or("no backup was tried yet");
        let more = open.len() - 1;
        report.fail(
            GAP,
            Kind::Integrity,
            format!(
                "WAL from {} to {} on timeline {} was let go, and {more} more gaps are open; {last}",
                first.start_lsn, first.end_lsn, first.timeline
            ),
            "Run `highwater backup`: no moment behind the gap can be reached before that.",
        );
    } else if let Some((gap, closed)) = half.first().and_then(|gap| Some((gap, gap.closed_in?))) {
        let lacking = closed.other().word();
        report.warn(
            GAP,
            format!(
                "the {lacking} repository has no backup behind WAL that was let go, from {} to {} on timeline {}; the {} one has",
                gap.start_lsn, gap.end_lsn, gap.timeline, closed.word()
            ),
            format!("One is taken when the {lacking} repository answers; or run `highwater copy --newest --wal`."),
        );
    }
}

fn look_at_spool(state: &HostState, report: &mut Report) {
    let Some(spool) = &state.spool else { return };
    if !spool.refused.is_empty() {
        report.fail(
            SPOOL,
            Kind::Conflict,
            format!(
                "{} files were acknowledged to PostgreSQL and are not in the repository: {}",
                spool.refused.len(),
                spool.refused.join(", ")
            ),
            format!(
                "They are kept in {}/refused. Find out who stored something else under their names; take a backup; then move them away.",
                spool.directory
            ),
        );
    } else if spool.files > 0 {
        let who =
            if spool.is_being_drained { "they are being drained" } else { "nobody drains it" };
        report.warn(
            SPOOL,
            format!("{} files of WAL are on this host only; {who}", spool.files),
            "Look why the store did not take them; `highwater spool --drain` tries it now.",
        );
    } else if spool.shares_disk_with_wal {
        report.warn(
            SPOOL,
            format!("{} lies on the file system of pg_wal", spool.directory),
            "Put it on another disk: there it takes the room that the server's own WAL needs.",
        );
    } else {
        report.ok(SPOOL, format!("{} is empty", spool.directory));
    }
}

fn look_at_backlog(state: &HostState, max: Option<u64>, report: &mut Report) {
    let Some(waiting) = &state.waiting else { return };
    let mib = waiting.bytes >> 20;
    let oldest = waiting.oldest_seconds.unwrap_or_default();
    let found = format!("{} files ({mib} MiB), the oldest for {oldest} s", waiting.files);
    match max {
        Some(max) if waiting.bytes > max / 2 => report.warn(
            BACKLOG,
            format!("{found}; from {} MiB on WAL is let go while the store is away", max >> 20),
            "Look why archiving does not keep up, before anything is let go.",
        ),
        _ => report.ok(BACKLOG, found),
    }
}
