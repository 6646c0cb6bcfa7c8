//! The settings of a second repository, and which of two repositories a command works on.
//!
//! Owns: that everything a command needs to know of the second repository stands where the first's would, so that any
//! command can work on either. Never here: what a command does with two.

use std::collections::BTreeMap;

use clap::ValueEnum;

use super::key_settings::{KeyNames, KeySettings};
use super::redact;
use super::retention_settings::{RetentionNames, RetentionSettings};
use super::setting_check::Check;
use super::setting_values::{WalCopies, parse_copies};
use super::settings::{NOTHING_DONE, OptionValue, Origin, Raw, Settings, Sourced, option_values};
use super::settings_table::Id;
use crate::failure::{Failure, Kind};
use crate::ops::Which;

/// `--only`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Only {
    /// `repo`
    First,
    /// `second_repo`
    Second,
}

impl Only {
    /// Returns the word that the flag takes.
    pub fn word(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Second => "second",
        }
    }
}

/// What was said about a second repository. May hold secrets: deliberately without `Debug`.
#[derive(Clone)]
pub struct SecondRepo {
    /// Its URL, not yet parsed; `None` where there is only one.
    pub url: Option<Sourced<String>>,
    /// Where its key is.
    pub key: KeySettings,
    /// What is kept in it.
    pub retention: RetentionSettings,
    /// Its store options by name.
    pub options: BTreeMap<String, OptionValue>,
    /// In how many repositories WAL must be stored.
    pub wal_copies: Sourced<WalCopies>,
}

impl SecondRepo {
    pub(super) fn validate(
        check: &Check<'_>,
        key: Option<&Raw>,
        options: BTreeMap<String, Raw>,
    ) -> Result<Self, Failure> {
        let url = |text: &str| text.contains("://").then(|| text.to_owned());
        let (first, second) = (check.one(Id::Repo, url)?, check.one(Id::SecondRepo, url)?);
        if let (Some(first), Some(second)) = (first, &second)
            && first.value.trim_end_matches('/') == second.value.trim_end_matches('/')
        {
            let what = format!("the second repository ({}) is the first", second.origin);
            let next = "name another place: two copies in one place are one copy";
            return Err(Failure::new(Kind::Usage, what, NOTHING_DONE, next));
        }
        Ok(Self {
            url: second,
            key: KeySettings::validate(check, KeyNames::SECOND, key)?,
            retention: RetentionSettings::validate(check, RetentionNames::SECOND)?,
            options: option_values(options),
            wal_copies: check.or_default(Id::WalCopies, parse_copies)?,
        })
    }

    /// Returns a setting as it may be shown.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        match id {
            Id::SecondRepo => self.url.as_ref().map(|url| {
                let (text, hidden) = redact::url(&url.value);
                (Some(text), hidden, url.origin.clone())
            }),
            Id::SecondKeyFile | Id::SecondKeyCommand => self.key.shown(id),
            Id::WalCopies => {
                let word = match self.wal_copies.value {
                    WalCopies::Any => "any",
                    WalCopies::All => "all",
                };
                Some((Some(word.to_owned()), false, self.wal_copies.origin.clone()))
            }
            _ => self.retention.shown(id),
        }
    }
}

impl Settings {
    /// Returns the settings under which the second repository is the only one; `None` if there is none.
    pub fn of_second(&self) -> Option<Self> {
        let url = self.second.url.clone()?;
        let second = self.second.clone();
        Some(Self {
            repo: Some(url),
            key: second.key,
            retention: second.retention,
            repo_options: second.options,
            which: Which::Second,
            ..self.of_first()
        })
    }

    /// Returns the settings under which the first repository is the only one.
    #[must_use]
    pub fn of_first(&self) -> Self {
        let mut only = self.clone();
        only.second.url = None;
        only
    }

    /// Returns the settings of the repositories that a command works on.
    ///
    /// # Errors
    /// [`Kind::Usage`] if only the second is wanted, and there is none.
    pub fn only(&self, only: Option<Only>) -> Result<Self, Failure> {
        match only {
            None => Ok(self.clone()),
            Some(Only::First) => Ok(self.of_first()),
            Some(Only::Second) => self.of_second().ok_or_else(|| {
                Failure::new(
                    Kind::Usage,
                    "`--only second` is said, and no second repository is named",
                    NOTHING_DONE,
                    "name it: `--second-repo URL`, HIGHWATER_SECOND_REPO, or `url` under `[second_repo]` in the settings file",
                )
            }),
        }
    }
}
