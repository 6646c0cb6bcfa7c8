//! The settings that say what is kept.

use std::time::Duration;

use super::setting_check::Check;
use super::setting_values::{within_count, within_duration};
use super::settings::Sourced;
use super::settings_table::Id;
use super::units::setting_duration;
use crate::failure::Failure;
use crate::plan::retention::Policy;

use super::settings::Origin;

/// The names of one repository's settings.
#[derive(Debug, Clone, Copy)]
pub(super) struct RetentionNames {
    window: Id,
    backups: Id,
    daily: Id,
    weekly: Id,
    monthly: Id,
    min_backups: Id,
    unfinished: Id,
}

impl RetentionNames {
    pub(super) const FIRST: Self = Self {
        window: Id::RetainWindow,
        backups: Id::RetainBackups,
        daily: Id::RetainDaily,
        weekly: Id::RetainWeekly,
        monthly: Id::RetainMonthly,
        min_backups: Id::MinBackups,
        unfinished: Id::RetainUnfinished,
    };
    pub(super) const SECOND: Self = Self {
        window: Id::SecondRetainWindow,
        backups: Id::SecondRetainBackups,
        daily: Id::SecondRetainDaily,
        weekly: Id::SecondRetainWeekly,
        monthly: Id::SecondRetainMonthly,
        min_backups: Id::SecondMinBackups,
        unfinished: Id::SecondRetainUnfinished,
    };
}

/// What is kept in one repository; see [`Policy`].
#[derive(Clone)]
pub struct RetentionSettings {
    names: RetentionNames,
    window: Option<Sourced<Duration>>,
    backups: Option<Sourced<usize>>,
    daily: Option<Sourced<usize>>,
    weekly: Option<Sourced<usize>>,
    monthly: Option<Sourced<usize>>,
    min_backups: Sourced<usize>,
    unfinished: Sourced<Duration>,
}

impl RetentionSettings {
    pub(super) fn validate(check: &Check<'_>, names: RetentionNames) -> Result<Self, Failure> {
        let count = |id| check.one(id, |text| within_count(id, text));
        Ok(Self {
            names,
            window: check.one(names.window, |text| within_duration(names.window, text))?,
            backups: count(names.backups)?,
            daily: count(names.daily)?,
            weekly: count(names.weekly)?,
            monthly: count(names.monthly)?,
            min_backups: check
                .or_default(names.min_backups, |text| within_count(names.min_backups, text))?,
            unfinished: check.duration(names.unfinished)?,
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
        let names = self.names;
        let count = match id {
            _ if id == names.backups => self.backups.as_ref(),
            _ if id == names.daily => self.daily.as_ref(),
            _ if id == names.weekly => self.weekly.as_ref(),
            _ if id == names.monthly => self.monthly.as_ref(),
            _ if id == names.min_backups => Some(&self.min_backups),
            _ => None,
        };
        let time = match id {
            _ if id == names.window => self.window.as_ref(),
            _ if id == names.unfinished => Some(&self.unfinished),
            _ => None,
        };
        let count = count.map(|c| (Some(c.value.to_string()), false, c.origin.clone()));
        let time = time.map(|t| (Some(setting_duration(t.value)), false, t.origin.clone()));
        count.or(time)
    }
}
