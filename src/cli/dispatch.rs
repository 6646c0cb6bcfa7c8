//! From a request to the use case that does it.
//!
//! Owns the one `match` over commands. Never here: parsing, settings, rules.

use super::config_report::ConfigReport;
use super::environment::Environment;
use super::man;
use super::output::Output;
use super::requests::Request;
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
