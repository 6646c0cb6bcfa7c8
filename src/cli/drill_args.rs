//! Arguments of `drill`, and of the guard that it starts.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args};

use super::args::absolute_text;
use super::environment::Environment;
use super::requests::{DrillGoal, DrillRequest, Request};
use super::settings::FlagValues;
use super::settings_table::Id;
use super::target_args::TargetArgs;
use super::units::parse_duration;
use crate::failure::Failure;
use crate::plan::target::TargetAction;

/// Arguments of `drill`.
#[derive(Args)]
#[command(group = ArgGroup::new("target").multiple(false))]
pub struct DrillArgs {
    /// Where it may work: an empty directory or a new one [env: HIGHWATER_SCRATCH]
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// The backup to begin with (default: the best for the target)
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// To a random moment of those that can be reached
    #[arg(long, group = "target", conflicts_with_all = ["backup", "exclusive", "timeline"])]
    random_moment: bool,
    /// The seed of an earlier drill, for the same moment as then if nothing has come or gone since
    #[arg(long, value_name = "N", requires = "random_moment")]
    seed: Option<u64>,
    /// Your own checks: NAME.sql, and NAME.expected beside it [env: HIGHWATER_CHECKS]
    #[arg(long, value_name = "DIR")]
    checks: Option<PathBuf>,
    /// The directory of PostgreSQL's programs (default: looked for) [env: HIGHWATER_BINDIR]
    #[arg(long, value_name = "DIR")]
    bindir: Option<PathBuf>,
    /// How long recovery and checks may take together
    #[arg(long, value_name = "TIME", default_value = "12h", value_parser = parse_timeout)]
    timeout: Duration,
    /// Leave the files and the server's log in the scratch directory
    #[arg(long)]
    keep: bool,
    /// Workers that fetch and write [env: HIGHWATER_JOBS]
    #[arg(long, value_name = "N")]
    jobs: Option<String>,
    #[command(flatten)]
    target: TargetArgs,
}

/// Arguments of `drill-guard`.
#[derive(Args)]
pub struct DrillGuardArgs {
    /// The scratch directory
    #[arg(value_name = "DIR")]
    root: PathBuf,
    /// Leave its files
    #[arg(long)]
    keep: bool,
}

impl DrillArgs {
    pub(super) fn into_request(
        self,
        flags: &mut FlagValues,
        environment: &Environment,
    ) -> Result<Request, Failure> {
        flags.set(Id::Jobs, self.jobs);
        flags.set(Id::DrillScratch, absolute_text(self.scratch)?);
        flags.set(Id::DrillChecks, absolute_text(self.checks)?);
        flags.set(Id::PostgresBin, absolute_text(self.bindir)?);
        let (target, target_in_full) =
            self.target.into_target(TargetAction::Promote, environment)?;
        let goal = if self.random_moment {
            DrillGoal::RandomMoment { seed: self.seed }
        } else {
            DrillGoal::Target(target)
        };
        Ok(Request::Drill(Box::new(DrillRequest {
            backup: self.backup,
            goal,
            target_in_full,
            timeout: self.timeout,
            keep: self.keep,
        })))
    }
}

impl DrillGuardArgs {
    pub(super) fn into_request(self) -> Request {
        Request::DrillGuard { root: self.root, keep: self.keep }
    }
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_hours(24 * 30);
    let time = parse_duration(text).filter(|time| range.contains(time));
    time.ok_or_else(|| "a time from 1s to 30d, for example 6h".to_owned())
}
