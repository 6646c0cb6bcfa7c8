//! The settings that say what the agent runs by itself, and how often.

use std::time::Duration;

use super::setting_check::Check;
use super::setting_values::{parse_switch, within_duration};
use super::settings::{NOTHING_DONE, Origin, Sourced};
use super::settings_table::Id;
use super::units::setting_duration;
use crate::failure::{Failure, Kind};
use crate::plan::schedule::{Rhythm, Schedule, Task, TimeOfDay};

const DAY: Duration = Duration::from_hours(24);

/// What runs by itself.
#[derive(Clone)]
pub struct ScheduleSettings {
    /// By task, in the order of [`Task::ALL`].
    every: [Option<Sourced<Duration>>; 4],
    backup_at: Option<Sourced<TimeOfDay>>,
    backup_on_standby: Sourced<bool>,
}

/// The settings of [`ScheduleSettings::every`].
const EVERY: [Id; 4] = [Id::BackupEvery, Id::ExpireEvery, Id::VerifyEvery, Id::DrillEvery];

impl ScheduleSettings {
    pub(super) fn validate(check: &Check<'_>) -> Result<Self, Failure> {
        let every = |id| check.one(id, |text| within_duration(id, text));
        let [backup, expire, verify, drill] = EVERY;
        Ok(Self {
            every: [every(backup)?, every(expire)?, every(verify)?, every(drill)?],
            backup_at: check.one(Id::BackupAt, TimeOfDay::parse)?,
            backup_on_standby: check.or_default(Id::BackupOnStandby, parse_switch)?,
        })
    }

    /// Returns what is wanted.
    ///
    /// # Errors
    /// [`Kind::Usage`] for a time of day with a period that is no number of days.
    pub fn schedule(&self) -> Result<Schedule, Failure> {
        let mut rhythms = self.every.each_ref().map(|every| {
            let every = every.as_ref()?.value;
            Some(Rhythm { every, at: None })
        });
        if let Some(at) = &self.backup_at {
            let is_days = |every: Duration| {
                !every.is_zero() && every.as_nanos().is_multiple_of(DAY.as_nanos())
            };
            match &mut rhythms[Task::Backup as usize] {
                Some(backup) if is_days(backup.every) => backup.at = Some(at.value),
                _ => {
                    let what = format!(
                        "`backup_at` ({}) is a time of day, and `backup_every` is no number of days",
                        at.origin
                    );
                    let next = "set `backup_every` to `24h` or `7d`, or leave `backup_at` out";
                    return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next));
                }
            }
        }
        Ok(Schedule { rhythms, backup_on_standby: self.backup_on_standby.value })
    }

    /// Returns one of them as it may be shown; `None` if it is not set or not one of them.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        match id {
            Id::BackupAt => {
                let at = self.backup_at.as_ref()?;
                Some((Some(at.value.to_string()), false, at.origin.clone()))
            }
            Id::BackupOnStandby => {
                let word = if self.backup_on_standby.value { "on" } else { "off" };
                Some((Some(word.to_owned()), false, self.backup_on_standby.origin.clone()))
            }
            _ => {
                let place = EVERY.iter().position(|every| *every == id)?;
                let every = self.every[place].as_ref()?;
                Some((Some(setting_duration(every.value)), false, every.origin.clone()))
            }
        }
    }
}
