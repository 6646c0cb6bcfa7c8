//! From a request to the use case that does it.
//!
//! Owns the one `match` over commands. Never here: parsing, settings, rules.

use super::config_report::ConfigReport;
use super::environment::Environment;
use super::man;
use super::output::Output;
use super::requests::{Request, RestoreRequest};
use super::settings::{NOTHING_DONE, Settings};
use crate::failure::{Failure, Kind};

/// Everything that a command gets besides its request.
pub struct Surroundings<'a> {
    /// Checked settings.
    pub settings: &'a Settings,
    /// The process environment.
    pub environment: &'a Environment,
    /// How to print.
    pub output: Output,
}

/// Does what is asked.
///
/// # Errors
/// Whatever the use case says.
pub fn dispatch(request: Request, surroundings: &Surroundings<'_>) -> Result<(), Failure> {
    let Surroundings { settings, environment, output } = surroundings;
    if let Request::Restore(restore) = &request {
        tell_target(restore, *output);
    }
    match request {
        Request::Config => {
            output.report(&ConfigReport::new(settings, environment), ConfigReport::text)
        }
        Request::Man(directory) => man::write(&directory),
        Request::Init(_)
        | Request::Check(_)
        | Request::ArchivePush(_)
        | Request::ArchiveGet(_)
        | Request::Backup(_)
        | Request::Restore(_)
        | Request::Info(_) => {
            settings.require_repo()?;
            settings.require_cluster()?;
            Err(Failure::new(
                Kind::Bug,
                "the use case is not wired to the command line",
                NOTHING_DONE,
                "please report this",
            ))
        }
    }
}

/// Tells a time back in full before anything is done, since a zone was perhaps only meant.
fn tell_target(restore: &RestoreRequest, output: Output) {
    if let Some(in_full) = &restore.target_in_full {
        output.say(&format!("the target is {in_full}, which is {}", restore.target));
    }
}
