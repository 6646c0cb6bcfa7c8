//! Arguments that say where recovery goes; `restore` and `drill` take the same.
//!
//! Never here: what a time or a position looks like (`target`).

use clap::Args;

use super::args::usage;
use super::environment::Environment;
use super::target::{TargetTime, parse_lsn, parse_name, parse_time, parse_timeline, parse_xid};
use crate::failure::Failure;
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TargetAction, TimelineChoice};

/// The heading of these arguments.
pub(super) const TARGET_HEADING: &str = "Target (none: as far as the archive goes)";

/// Where recovery goes; at most one `--to-…`.
#[derive(Args)]
#[command(next_help_heading = TARGET_HEADING)]
pub(super) struct TargetArgs {
    /// To a time, such as '2026-11-22 03:00:00', with an offset or zone if wanted
    #[arg(long, value_name = "TIME", group = "target")]
    to_time: Option<String>,
    /// To a position in WAL, such as 16/B374D848
    #[arg(long, value_name = "LSN", group = "target")]
    to_lsn: Option<String>,
    /// To the end of a transaction
    #[arg(long, value_name = "XID", group = "target")]
    to_xid: Option<String>,
    /// To a restore point made by pg_create_restore_point()
    #[arg(long, value_name = "NAME", group = "target")]
    to_name: Option<String>,
    /// To the end of the backup
    #[arg(long, group = "target")]
    to_immediate: bool,
    /// Stop just before the time, position or transaction, not just after
    #[arg(long)]
    exclusive: bool,
    /// The timeline to follow: current (the backup's), latest or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    timeline: String,
}

impl TargetArgs {
    /// Returns the target and, for a time, how it reads in full.
    pub(super) fn into_target(
        self,
        action: TargetAction,
        environment: &Environment,
    ) -> Result<(RecoveryTarget, Option<String>), Failure> {
        let wrong = |flag: &str, reason: String| {
            usage(
                &format!("{flag}: {reason}"),
                "correct the target; `highwater restore --help` shows each form",
            )
        };
        let mut in_full = None;
        let point = if let Some(text) = self.to_time {
            let time = parse_time(&text, || environment.time_zone());
            let TargetTime { point, in_full: full } =
                time.map_err(|error| wrong("--to-time", error.to_string()))?;
            in_full = Some(full);
            point
        } else if let Some(text) = self.to_lsn {
            parse_lsn(&text).map_err(|error| wrong("--to-lsn", error.to_string()))?
        } else if let Some(text) = self.to_xid {
            parse_xid(&text).map_err(|error| wrong("--to-xid", error.to_string()))?
        } else if let Some(text) = self.to_name {
            parse_name(&text).map_err(|error| wrong("--to-name", error.to_string()))?
        } else if self.to_immediate {
            RecoveryPoint::Immediate
        } else {
            RecoveryPoint::Latest
        };
        if self.exclusive && !point.can_be_exclusive() {
            return Err(usage(
                "--exclusive goes only with --to-time, --to-lsn or --to-xid",
                "leave it out, or name one of these targets",
            ));
        }
        let timeline: TimelineChoice = parse_timeline(&self.timeline)
            .map_err(|error| wrong("--timeline", error.to_string()))?;
        Ok((RecoveryTarget { point, inclusive: !self.exclusive, timeline, action }, in_full))
    }
}
