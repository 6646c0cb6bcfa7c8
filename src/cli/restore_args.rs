//! Arguments of `restore`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueEnum};

use super::args::{absolute, usage};
use super::environment::Environment;
use super::requests::{
    RestoreRequest, TablespaceMapping, check_tablespace_map, parse_tablespace_mapping,
};
use super::settings::FlagValues;
use super::settings_table::Id;
use super::target_args::{TARGET_HEADING, TargetArgs};
use crate::failure::Failure;
use crate::plan::target::TargetAction;

/// Arguments of `restore`.
#[derive(Args)]
#[command(group = ArgGroup::new("target").multiple(false))]
#[allow(clippy::struct_excessive_bools)] // each is a flag of its own
pub struct RestoreArgs {
    /// The directory to rebuild the cluster in; empty or absent without --delta
    #[arg(long, value_name = "DIR")]
    pgdata: PathBuf,
    /// The backup to begin with (default: the best for the target)
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// Put a tablespace elsewhere; may be repeated
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace_mapping)]
    tablespace_map: Vec<TablespaceMapping>,
    /// Keep what stands there and is right: fetch only what differs, remove the rest
    #[arg(long)]
    delta: bool,
    /// Make a standby: standby.signal instead of recovery.signal
    #[arg(long, conflicts_with = "target")]
    standby: bool,
    /// This copy becomes the cluster and archives in its place
    #[arg(long)]
    take_over: bool,
    /// Print the plan and stop
    #[arg(long)]
    dry_run: bool,
    /// Workers that fetch and write [env: HIGHWATER_JOBS]
    #[arg(long, value_name = "N")]
    jobs: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
    /// What the server does at the target: pause (the default), promote or shutdown
    #[arg(
        long, value_name = "ACTION", requires = "target", hide_possible_values = true,
        help_heading = TARGET_HEADING
    )]
    target_action: Option<ActionArg>,
}

/// `--target-action`.
#[derive(Clone, Copy, ValueEnum)]
enum ActionArg {
    Pause,
    Promote,
    Shutdown,
}

impl RestoreArgs {
    pub(super) fn into_request(
        self,
        flags: &mut FlagValues,
        environment: &Environment,
    ) -> Result<RestoreRequest, Failure> {
        flags.set(Id::Jobs, self.jobs);
        check_tablespace_map(&self.tablespace_map).map_err(|reason| {
            usage(&reason, "give each tablespace once: --tablespace-map OLD=NEW")
        })?;
        let action = match self.target_action {
            None | Some(ActionArg::Pause) => TargetAction::Pause,
            Some(ActionArg::Promote) => TargetAction::Promote,
            Some(ActionArg::Shutdown) => TargetAction::Shutdown,
        };
        let (target, target_in_full) = self.target.into_target(action, environment)?;
        Ok(RestoreRequest {
            pgdata: absolute(&self.pgdata)?,
            backup: self.backup,
            target,
            target_in_full,
            tablespace_map: self.tablespace_map,
            standby: self.standby,
            dry_run: self.dry_run,
            delta: self.delta,
            take_over: self.take_over,
        })
    }
}
