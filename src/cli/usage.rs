//! Mistakes in the arguments, told as every other failure is.
//!
//! Owns the translation of clap's errors. Never here: which arguments there are.

use std::ffi::OsString;

use clap::CommandFactory;

use super::args::CommandLine;
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
pub(super) fn failure(error: &clap::Error, args: &[OsString]) -> Failure {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let mut what: Vec<&str> = Vec::new();
    let mut tips: Vec<&str> = Vec::new();
    let mut in_usage = false;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(tip) = line.strip_prefix("tip: ") {
            tips.push(tip);
        } else if line.starts_with("Usage: ") {
            in_usage = true;
        } else if !in_usage && !line.starts_with("For more information") {
            what.push(line);
        }
    }
    let mut next = format!("`{} --help` shows what it takes", command_in(args));
    if !tips.is_empty() {
        next = format!("{}; {next}", tips.join("; "));
    }
    Failure::new(Kind::Usage, what.join(" "), NOTHING_DONE, next)
}

/// Returns the command whose help fits: the first argument that names one.
fn command_in(args: &[OsString]) -> String {
    let known = CommandLine::command();
    let named = args.iter().skip(1).find_map(|arg| known.find_subcommand(arg));
    named.map_or_else(
        || "highwater".to_owned(),
        |command| format!("highwater {}", command.get_name()),
    )
}
