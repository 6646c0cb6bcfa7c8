//! Arguments of `verify`.

use std::time::Duration;

use clap::Args;

use super::args::usage;
use super::requests::{Request, VerifyRequest, parse_max_rate};
use super::retention_args::parse_reason;
use super::settings::FlagValues;
use super::settings_table::Id;
use super::units::parse_duration;
use crate::failure::Failure;
use crate::format::is_finding_id;

/// Arguments of `verify`.
#[derive(Args)]
pub struct VerifyArgs {
    /// Read every object whole: each digest, each chunk of each backup, all WAL
    #[arg(long)]
    deep: bool,
    /// Look at everything, whatever was proven before
    #[arg(long)]
    all: bool,
    /// Look again at what was proven longer ago than this
    #[arg(long, value_name = "TIME", default_value = "30d", value_parser = parse_age)]
    older_than: Duration,
    /// The most that is read each second with --deep, such as 50MB
    #[arg(long, value_name = "RATE", value_parser = parse_max_rate)]
    rate: Option<u64>,
    /// Objects looked at at a time [env: HIGHWATER_JOBS]
    #[arg(long, value_name = "N")]
    jobs: Option<String>,
    /// Record that a finding is known, so that the next one can be told from it
    #[arg(long, value_name = "ID", requires = "reason", conflicts_with_all = ["deep", "all", "rate"])]
    acknowledge: Option<String>,
    /// Why it is accepted
    #[arg(long, value_name = "TEXT", requires = "acknowledge", value_parser = parse_reason)]
    reason: Option<String>,
}

impl VerifyArgs {
    pub(super) fn into_request(self, flags: &mut FlagValues) -> Result<Request, Failure> {
        flags.set(Id::Jobs, self.jobs);
        let Self { deep, all, older_than, rate, .. } = self;
        let Some((finding, reason)) = self.acknowledge.zip(self.reason) else {
            return Ok(Request::Verify(VerifyRequest { deep, all, older_than, rate }));
        };
        if !is_finding_id(&finding) {
            return Err(usage(
                &format!("`{finding}` names no finding"),
                "`highwater verify` names each: 12 digits and letters from a to f",
            ));
        }
        Ok(Request::Acknowledge { finding, reason })
    }
}

fn parse_age(text: &str) -> Result<Duration, String> {
    let day = Duration::from_hours(24);
    let age = parse_duration(text).filter(|age| *age >= day);
    age.ok_or_else(|| "an age is at least one day, for example 30d".to_owned())
}
