//! The settings that say what is kept.

use std::time::Duration;

use super::setting_values::{within_count, within_duration};
use super::settings::{Check, Sourced};
use super::settings_table::Id;
use super::units::setting_duration;
use crate::failure::Failure;
use crate::plan::retention::Policy;

use super::settings::Origin;

/// What is kept; see [`Policy`].
#[derive(Clone)]
pub struct RetentionSettings {
    window: Option<Sourced<Duration>>,
    backups: Option<Sourced<usize>>,
    daily: Option<Sourced<usize>>,
    weekly: Option<Sourced<usize>>,
    monthly: Option<Sourced<usize>>,
    min_backups: Sourced<usize>,
    unfinished: Sourced<Duration>,
}

impl RetentionSettings {
    pub(super) fn validate(check: &Check<'_>) -> Result<Self, Failure> {
        let count = |id| check.one(id, |text| within_count(id, text));
        Ok(Self {
            window: check.one(Id::RetainWindow, |text| within_duration(Id::RetainWindow, text))?,
            backups: count(Id::RetainBackups)?,
            daily: count(Id::RetainDaily)?,
            weekly: count(Id::RetainWeekly)?,
            monthly: count(Id::RetainMonthly)?,
            min_backups: check
                .or_default(Id::MinBackups, |text| within_count(Id::MinBackups, text))?,
            unfinished: check.duration(Id::RetainUnfinished)?,
        })
    }

    /// Returns the policy.
    pub fn policy(&self) -> Policy {
        let count = |value: &Option<Sourced<usize>>| value.as_ref().map(|value| value.value);
        Policy {
            window: self.window.as_ref().map(|window| window.value),
            backups: count(&self.backups),
            daily: count(&self.daily),
            weekly: count(&self.weekly),
            monthly: count(&self.monthly),
            min_backups: self.min_backups.value,
            unfinished: self.unfinished.value,
        }
    }

    /// Returns one of them as text, and its origin; `None` if it is not set or not one of them.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        let count = match id {
            Id::RetainBackups => self.backups.as_ref(),
            Id::RetainDaily => self.daily.as_ref(),
            Id::RetainWeekly => self.weekly.as_ref(),
            Id::RetainMonthly => self.monthly.as_ref(),
            Id::MinBackups => Some(&self.min_backups),
            _ => None,
        };
        let time = match id {
            Id::RetainWindow => self.window.as_ref(),
            Id::RetainUnfinished => Some(&self.unfinished),
            _ => None,
        };
        let count = count.map(|c| (Some(c.value.to_string()), false, c.origin.clone()));
        let time = time.map(|t| (Some(setting_duration(t.value)), false, t.origin.clone()));
        count.or(time)
    }
}
