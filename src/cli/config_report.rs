//! What `highwater config` shows: every setting in force and where it came from.
//!
//! Secrets are hidden here, in text and in JSON alike. Never here: reading or checking settings.

use serde::Serialize;

use super::environment::Environment;
use super::output::columns;
use super::redact::HIDDEN;
use super::settings::{Origin, Settings};
use super::settings_table::{OPTIONS_KEY, SECOND_OPTIONS_KEY, TABLE};

/// The report; its fields are part of the contract.
#[derive(Serialize)]
pub struct ConfigReport {
    /// The settings file that was read, or null.
    pub config_file: Option<String>,
    /// Every setting, in the order of the table.
    pub settings: Vec<Shown>,
    /// The store options that were given, by name, those of the second repository behind the first's.
    pub repo_options: Vec<Shown>,
    /// Names (never values) of the `PG*` and cloud variables that are set and count too.
    pub other_variables: Vec<String>,
}

/// One setting.
#[derive(Serialize)]
pub struct Shown {
    /// Its key in the file.
    pub name: String,
    /// Its value as text, without secrets; null when it is not set.
    pub value: Option<String>,
    /// Whether a part of the value is hidden.
    pub hidden: bool,
    /// `flag`, `environment`, `file` or `default`.
    pub origin: &'static str,
    /// The flag, the variable, or file and line; null for a default.
    pub from: Option<String>,
}

impl Shown {
    fn new(name: String, value: Option<String>, hidden: bool, origin: &Origin) -> Self {
        let from = (*origin != Origin::Default).then(|| origin.to_string());
        Self { name, value, hidden, origin: origin.word(), from }
    }
}

impl ConfigReport {
    /// Gathers what may be shown.
    pub fn new(settings: &Settings, environment: &Environment) -> Self {
        let shown = TABLE.iter().map(|setting| {
            let (value, hidden, origin) = settings.shown(setting.id);
            Shown::new(setting.key.to_owned(), value, hidden, &origin)
        });
        let first = settings.repo_options.iter().map(|option| (OPTIONS_KEY, option));
        let second = settings.second.options.iter().map(|option| (SECOND_OPTIONS_KEY, option));
        let options = first.chain(second).map(|(table, (name, option))| {
            let text = if option.secret { HIDDEN.to_owned() } else { option.text.clone() };
            Shown::new(format!("{table}.{name}"), Some(text), option.secret, &option.origin)
        });
        Self {
            config_file: settings.file.as_ref().map(|file| file.display().to_string()),
            settings: shown.collect(),
            repo_options: options.collect(),
            other_variables: environment
                .postgres
                .keys()
                .chain(environment.cloud.keys())
                .cloned()
                .collect(),
        }
    }

    /// Returns the report for people.
    pub fn text(&self) -> String {
        let rows: Vec<Vec<String>> = self
            .settings
            .iter()
            .chain(&self.repo_options)
            .map(|shown| {
                let value = shown.value.clone().unwrap_or_else(|| "-".to_owned());
                let from = match (&shown.from, &shown.value) {
                    (Some(from), _) => from.clone(),
                    (None, Some(_)) => "default".to_owned(),
                    (None, None) => "not set".to_owned(),
                };
                vec![shown.name.clone(), value, from]
            })
            .collect();
        let file = self.config_file.as_deref().unwrap_or("none");
        let mut page = format!("settings file: {file}\n\n{}", columns(&rows));
        if !self.other_variables.is_empty() {
            let names = self.other_variables.join(", ");
            page.push_str("\nalso set and used: ");
            page.push_str(&names);
            page.push('\n');
        }
        page
    }
}
