//! The settings for a store that is away.

use std::path::PathBuf;

use super::setting_check::Check;
use super::setting_values::{WalCopies, absolute, parse_copies, within_size};
use super::settings::{NOTHING_DONE, Origin, Sourced};
use super::settings_table::Id;
use super::units::setting_size;
use crate::failure::{Failure, Kind};

/// What is done with WAL that the store cannot take; by default PostgreSQL keeps it.
#[derive(Clone)]
pub struct StallSettings {
    /// Where WAL is kept meanwhile.
    pub spool: Option<Sourced<PathBuf>>,
    /// The most that may lie there, in bytes.
    pub spool_max_bytes: Sourced<u64>,
    /// From how many waiting bytes on WAL is let go.
    pub backlog_max_bytes: Option<Sourced<u64>>,
}

impl StallSettings {
    pub(super) fn validate(check: &Check<'_>) -> Result<Self, Failure> {
        let settings = Self {
            spool: check.one(Id::StallSpool, absolute)?,
            spool_max_bytes: check
                .or_default(Id::StallSpoolMax, |text| within_size(Id::StallSpoolMax, text))?,
            backlog_max_bytes: check
                .one(Id::WalBacklogMax, |text| within_size(Id::WalBacklogMax, text))?,
        };
        settings.refuse_against_two_copies(check)?;
        Ok(settings)
    }

    /// Whose WAL waits until both have it cannot wish as well that it is let go.
    fn refuse_against_two_copies(&self, check: &Check<'_>) -> Result<(), Failure> {
        let Some(max) = &self.backlog_max_bytes else { return Ok(()) };
        let second = check.one(Id::SecondRepo, |text| Some(text.to_owned()))?;
        let copies = check.or_default(Id::WalCopies, parse_copies)?;
        if second.is_none() || copies.value == WalCopies::Any {
            return Ok(());
        }
        let what = format!(
            "`wal_backlog_max` ({}) lets WAL go that `wal_copies = \"all\"` ({}) keeps until both repositories have it",
            max.origin, copies.origin
        );
        let next = "leave one of them out: with `wal_copies = \"any\"` WAL is let go only while neither repository takes it";
        Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next))
    }

    /// Returns whether anything is set.
    pub fn is_set(&self) -> bool {
        self.spool.is_some() || self.backlog_max_bytes.is_some()
    }

    /// Returns one of them as text, and its origin; `None` if it is not set or not one of them.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        let size =
            |size: &Sourced<u64>| (Some(setting_size(size.value)), false, size.origin.clone());
        match id {
            Id::StallSpool => self.spool.as_ref().map(|spool| {
                (Some(spool.value.display().to_string()), false, spool.origin.clone())
            }),
            Id::StallSpoolMax => Some(size(&self.spool_max_bytes)),
            Id::WalBacklogMax => self.backlog_max_bytes.as_ref().map(size),
            _ => None,
        }
    }
}
