//! The settings that say where the user key comes from.
//!
//! Never here: reading it (`key_source`). A key itself is taken from a variable only: flags show in process lists, and
//! a settings file is copied around.

use std::path::PathBuf;

use super::setting_check::Check;
use super::setting_values::absolute;
use super::settings::{NOTHING_DONE, Origin, Raw, Sourced};
use super::settings_table::{Id, KEY_VARIABLE, SECOND_KEY_VARIABLE, setting};
use crate::failure::{Failure, Kind};
use crate::format::SecretKey;

/// Where the key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyChoice {
    /// In this file; absolute.
    File(PathBuf),
    /// This command prints it.
    Command(String),
    /// In the variable `HIGHWATER_KEY`.
    Variable(SecretKey),
}

/// The names under which one repository's key is spoken of.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeyNames {
    pub(super) file: Id,
    pub(super) command: Id,
    pub(super) variable: &'static str,
}

impl KeyNames {
    pub(super) const FIRST: Self =
        Self { file: Id::KeyFile, command: Id::KeyCommand, variable: KEY_VARIABLE };
    pub(super) const SECOND: Self = Self {
        file: Id::SecondKeyFile,
        command: Id::SecondKeyCommand,
        variable: SECOND_KEY_VARIABLE,
    };
}

/// What was said about the key of one repository.
#[derive(Clone)]
pub struct KeySettings {
    names: KeyNames,
    file: Option<Sourced<PathBuf>>,
    command: Option<Sourced<String>>,
    choice: Option<Sourced<KeyChoice>>,
}

impl KeySettings {
    pub(super) fn validate(
        check: &Check<'_>,
        names: KeyNames,
        variable: Option<&Raw>,
    ) -> Result<Self, Failure> {
        let file = check.one(names.file, absolute)?;
        let command =
            check.one(names.command, |text| (!text.is_empty()).then(|| text.to_owned()))?;
        let variable = variable.map(|raw| in_variable(names.variable, raw)).transpose()?;
        let mut choices: Vec<Sourced<KeyChoice>> = Vec::new();
        choices.extend(file.clone().map(|file| file.map(KeyChoice::File)));
        choices.extend(command.clone().map(|command| command.map(KeyChoice::Command)));
        choices.extend(variable.map(|key| key.map(KeyChoice::Variable)));
        choices.sort_by_key(|choice| rank(&choice.origin));
        let last = choices.pop();
        if let (Some(last), Some(other)) = (&last, choices.last())
            && rank(&last.origin) == rank(&other.origin)
        {
            return Err(Failure::new(
                Kind::Usage,
                format!(
                    "the key is said to be in two places: {} and {}",
                    last.origin, other.origin
                ),
                NOTHING_DONE,
                "leave one of them out",
            ));
        }
        Ok(Self { names, file, command, choice: last })
    }

    /// Returns where the key is; `None` where nothing is encrypted.
    pub fn choice(&self) -> Option<&Sourced<KeyChoice>> {
        self.choice.as_ref()
    }

    /// Returns a setting as it may be shown.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        match id {
            _ if id == self.names.file => self
                .file
                .as_ref()
                .map(|file| (Some(file.value.display().to_string()), false, file.origin.clone())),
            _ => self
                .command
                .as_ref()
                .map(|command| (Some(command.value.clone()), false, command.origin.clone())),
        }
    }

    /// Returns the flags with which another process finds the key, if this one was told by flag or variable; never
    /// the key itself.
    pub fn flags(&self) -> Vec<String> {
        let Some(choice) = &self.choice else { return Vec::new() };
        if matches!(choice.origin, Origin::File { .. }) {
            return Vec::new();
        }
        let flag = |id| setting(id).flag.unwrap_or_default().to_owned();
        match &choice.value {
            KeyChoice::File(path) => vec![flag(self.names.file), path.display().to_string()],
            KeyChoice::Command(command) => vec![flag(self.names.command), command.clone()],
            KeyChoice::Variable(_) => Vec::new(),
        }
    }

    /// Returns the variable that holds the key and that another process needs, if one does.
    pub fn needed_variable(&self) -> Option<&'static str> {
        let choice = self.choice.as_ref()?;
        matches!(choice.value, KeyChoice::Variable(_)).then_some(self.names.variable)
    }
}

fn rank(origin: &Origin) -> u8 {
    match origin {
        Origin::Flag(_) => 3,
        Origin::Environment(_) => 2,
        Origin::File { .. } => 1,
        Origin::Default => 0,
    }
}

fn in_variable(variable: &str, raw: &Raw) -> Result<Sourced<SecretKey>, Failure> {
    let key = SecretKey::parse(&raw.text).ok_or_else(|| {
        Failure::new(
            Kind::Usage,
            format!("`{variable}` holds no key; it takes 64 hex digits"),
            NOTHING_DONE,
            "set it to what a key file holds (`highwater key new FILE` makes one), or unset it",
        )
    })?;
    Ok(Sourced { value: key, origin: raw.origin.clone() })
}
