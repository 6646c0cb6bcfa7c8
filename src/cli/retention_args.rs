//! Arguments of `expire`, `pin` and `unpin`.

use clap::Args;

use super::args::usage;
use super::environment::Environment;
use super::requests::{KeepUntil, PinRequest, Request};
use super::settings::FlagValues;
use super::settings_table::Id;
use super::target::parse_time;
use crate::failure::Failure;
use crate::format::PIN_REASON_BYTES_MAX;
use crate::plan::target::RecoveryPoint;

/// Arguments of `expire`.
#[derive(Args)]
pub struct ExpireArgs {
    /// Print what would be deleted, and why, and stop
    #[arg(long)]
    dry_run: bool,
    /// Every moment of this long ago until now, such as 30d [env: HIGHWATER_RETAIN_WINDOW]
    #[arg(long, value_name = "TIME")]
    retain_window: Option<String>,
    /// The newest N backups, with all WAL since [env: HIGHWATER_RETAIN_BACKUPS]
    #[arg(long, value_name = "N")]
    retain_backups: Option<String>,
    /// The last backup of each of N days, with its own WAL only [env: HIGHWATER_RETAIN_DAILY]
    #[arg(long, value_name = "N")]
    retain_daily: Option<String>,
    /// The same for N weeks [env: HIGHWATER_RETAIN_WEEKLY]
    #[arg(long, value_name = "N")]
    retain_weekly: Option<String>,
    /// The same for N months [env: HIGHWATER_RETAIN_MONTHLY]
    #[arg(long, value_name = "N")]
    retain_monthly: Option<String>,
    /// Never fewer usable backups than this [env: HIGHWATER_MIN_BACKUPS] [default: 1]
    #[arg(long, value_name = "N")]
    min_backups: Option<String>,
    /// After this long without a sign of life an unfinished backup is dead
    /// [env: HIGHWATER_RETAIN_UNFINISHED] [default: 7d]
    #[arg(long, value_name = "TIME")]
    retain_unfinished: Option<String>,
}

/// Arguments of `pin`.
#[derive(Args)]
pub struct PinArgs {
    /// The backup, as info shows it
    #[arg(value_name = "ID")]
    backup: String,
    /// Until when; without it until unpin
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Why, for whoever finds it later
    #[arg(long, value_name = "TEXT", value_parser = parse_reason)]
    reason: Option<String>,
}

/// Arguments of `unpin`.
#[derive(Args)]
pub struct UnpinArgs {
    /// The backup
    #[arg(value_name = "ID")]
    backup: String,
}

impl ExpireArgs {
    pub(super) fn into_request(self, flags: &mut FlagValues) -> Request {
        flags.set(Id::RetainWindow, self.retain_window);
        flags.set(Id::RetainBackups, self.retain_backups);
        flags.set(Id::RetainDaily, self.retain_daily);
        flags.set(Id::RetainWeekly, self.retain_weekly);
        flags.set(Id::RetainMonthly, self.retain_monthly);
        flags.set(Id::MinBackups, self.min_backups);
        flags.set(Id::RetainUnfinished, self.retain_unfinished);
        Request::Expire { dry_run: self.dry_run }
    }
}

impl PinArgs {
    pub(super) fn into_request(self, environment: &Environment) -> Result<Request, Failure> {
        let Self { backup, until, reason } = self;
        let until = keep_until("--until", until, environment)?;
        Ok(Request::Pin(PinRequest { backup, until, reason }))
    }
}

impl UnpinArgs {
    pub(super) fn into_request(self) -> Request {
        Request::Unpin { backup: self.backup }
    }
}

/// Reads the time until which a backup is kept, as `--to-time` is read.
pub(super) fn keep_until(
    flag: &str,
    text: Option<String>,
    environment: &Environment,
) -> Result<Option<KeepUntil>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let time = parse_time(&text, || environment.time_zone()).map_err(|error| {
        usage(&format!("{flag}: {error}"), "write the time out, such as 2027-01-31 00:00:00+00")
    })?;
    match time.point {
        RecoveryPoint::Time { unix_micros } => {
            Ok(Some(KeepUntil { unix_micros, in_full: time.in_full }))
        }
        _ => Ok(None),
    }
}

pub(super) fn parse_reason(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > PIN_REASON_BYTES_MAX || text.contains(char::is_control) {
        return Err(format!("a reason is one line of 1 to {PIN_REASON_BYTES_MAX} bytes"));
    }
    Ok(text.to_owned())
}
