//! Checking one value against its declaration, and telling what is wrong with it.
//!
//! Never here: which settings there are (`settings_table`), or what a value means (`setting_values`).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::redact;
use super::setting_values::within_duration;
use super::settings::{NOTHING_DONE, Origin, Raw, Sourced};
use super::settings_table::{Accepts, Id, setting};
use crate::failure::{Failure, Kind};

/// The values to check.
pub(super) struct Check<'a> {
    pub(super) values: &'a BTreeMap<Id, Raw>,
}

impl Check<'_> {
    /// Checks one setting, if it was given.
    pub(super) fn one<T>(
        &self,
        id: Id,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<Sourced<T>>, Failure> {
        let Some(raw) = self.values.get(&id) else { return Ok(None) };
        let typed = raw.toml_type.is_none_or(|toml_type| setting(id).accepts.takes_toml(toml_type));
        let value = typed.then(|| parse(raw.text.trim())).flatten();
        let value = value.ok_or_else(|| wrong_value(id, raw))?;
        Ok(Some(Sourced { value, origin: raw.origin.clone() }))
    }

    /// Checks one setting that has a default.
    pub(super) fn or_default<T>(
        &self,
        id: Id,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Result<Sourced<T>, Failure> {
        if let Some(given) = self.one(id, &parse)? {
            return Ok(given);
        }
        let default = setting(id).default.and_then(parse).ok_or_else(|| {
            Failure::new(
                Kind::Bug,
                format!("the default of `{}` is not accepted", setting(id).key),
                NOTHING_DONE,
                "please report this",
            )
        })?;
        Ok(Sourced { value: default, origin: Origin::Default })
    }

    pub(super) fn duration(&self, id: Id) -> Result<Sourced<Duration>, Failure> {
        self.or_default(id, |text| within_duration(id, text))
    }
}

/// Tells what is wrong with a value, in a form that can be corrected at sight.
fn wrong_value(id: Id, raw: &Raw) -> Failure {
    let setting = setting(id);
    let shown = match id {
        Id::Repo | Id::SecondRepo => redact::url(&raw.text).0,
        Id::Dsn => redact::conninfo(&raw.text).0,
        _ => raw.text.clone(),
    };
    let given = match raw.toml_type {
        Some("string") => format!("the string \"{shown}\""),
        _ => format!("`{shown}`"),
    };
    let example = setting.example;
    let corrected = match &raw.origin {
        Origin::Flag(flag) => format!("{flag} {}", shell_word(example)),
        Origin::Environment(name) => format!("{name}={}", shell_word(example)),
        Origin::File { .. } | Origin::Default => {
            let name = setting.key.rsplit('.').next().unwrap_or(setting.key);
            match setting.accepts {
                Accepts::Count { .. } => format!("{name} = {example}"),
                Accepts::Switch => format!("{name} = true"),
                _ => format!("{name} = \"{example}\""),
            }
        }
    };
    let origin = match &raw.origin {
        Origin::File { .. } => format!("`{}` in {}", setting.key, raw.origin),
        other => format!("`{other}`"),
    };
    Failure::new(
        Kind::Usage,
        format!("{origin} is {given}; it takes {}", setting.accepts.in_words()),
        NOTHING_DONE,
        format!("correct it, for example: {corrected}"),
    )
}

fn shell_word(text: &str) -> String {
    if text.contains(' ') { format!("'{text}'") } else { text.to_owned() }
}

/// Returns a value that must have been said.
pub(super) fn required<'a>(
    value: Option<&'a Sourced<String>>,
    id: Id,
    what: &str,
    file: Option<&Path>,
) -> Result<&'a str, Failure> {
    value.map(|value| value.value.as_str()).ok_or_else(|| {
        let setting = setting(id);
        let flag = setting.flag.unwrap_or_default();
        let file = file.map_or("no settings file was read".to_owned(), |file| {
            format!("`{}` is not in {}", setting.key, file.display())
        });
        Failure::new(
            Kind::Usage,
            what,
            NOTHING_DONE,
            format!(
                "give {flag} {}, set {}, or write it in the settings file ({file})",
                setting.example, setting.variable
            ),
        )
    })
}
