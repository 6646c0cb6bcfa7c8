//! Mistakes in the arguments, told as every other failure is.
//!
//! Owns the translation of clap's errors. Never here: which arguments there are.

use super::settings::NOTHING_DONE;
use crate::failure::{Failure, Kind};

/// Turns clap's error into a failure: its sentence, its tips, and where help is.
///
/// Clap's text has the form:
///
/// ```text
/// error: unexpected argument '--clustr' found
///
///   tip: a similar argument exists: '--cluster'
///
/// Usage: highwater info [OPTIONS]
/// ```
pub(super) fn failure(error: &clap::Error) -> Failure {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let mut what: Vec<&str> = Vec::new();
    let mut tips: Vec<&str> = Vec::new();
    let mut usage = "";
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(tip) = line.strip_prefix("tip: ") {
            tips.push(tip);
        } else if let Some(line) = line.strip_prefix("Usage: ") {
            usage = line;
        } else if usage.is_empty() && !line.starts_with("For more information") {
            what.push(line);
        }
    }
    // The words before the first argument are the command: `highwater info [OPTIONS]`.
    let command: Vec<&str> = usage
        .split(' ')
        .take_while(|word| word.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    let command = if command.is_empty() { "highwater".to_owned() } else { command.join(" ") };
    let mut next = format!("`{command} --help` shows what it takes");
    if !tips.is_empty() {
        next = format!("{}; {next}", tips.join("; "));
    }
    Failure::new(Kind::Usage, what.join(" "), NOTHING_DONE, next)
}
