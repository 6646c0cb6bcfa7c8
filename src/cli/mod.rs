//! The command line: arguments, settings, output, exit codes.
//!
//! The top floor: it reads what surrounds the process, turns it into plain
//! values, lets `ops` do the work and prints the result. Never here: rules about
//! WAL, backups or retention.
//!
//! ```text
//! argv ─ args ──┐
//! env ─ environment ─ settings ─┐
//! file ─ settings_file ─────────┴─> dispatch ─> ops ─> output ─> exit code
//! ```
//!
//! The invariant: PostgreSQL never takes a mistake for an answer. Every end of an
//! `archive-get` that is not "here it is" or "certainly absent" exits above 125.

mod accepts;
mod agent;
mod ahead;
pub mod args;
pub mod config_report;
mod copy;
mod copy_args;
pub mod dispatch;
mod drill;
mod drill_args;
mod drill_settings;
mod drivers;
pub mod environment;
pub mod help;
mod info_report;
mod key_args;
pub mod key_settings;
mod key_source;
mod keys;
mod log;
mod log_args;
pub mod logging;
pub mod man;
pub mod output;
pub mod progress;
mod receive;
mod receive_args;
pub mod redact;
mod reports;
pub mod requests;
mod restore;
mod restore_args;
mod retention;
mod retention_args;
mod retention_settings;
mod schedule_settings;
mod second_repo;
mod second_settings;
mod setting_check;
pub mod setting_id;
mod setting_values;
pub mod settings;
pub mod settings_file;
pub mod settings_table;
mod signals;
mod spool_args;
mod stall;
mod stall_settings;
pub mod target;
mod target_args;
mod two;
pub mod units;
mod upkeep_settings;
mod usage;
mod verify;
mod verify_args;

use std::ffi::OsString;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use args::CommandLine;
use dispatch::{Ended, Surroundings, dispatch};
use environment::Environment;
use output::Output;
use settings::{RawSettings, Settings};

use crate::failure::{Failure, Kind};

/// Added to the exit code of an `archive-get` that does not know the answer.
const RECOVERY_OFFSET: u8 = 128;

/// Runs the command line and returns the exit code; `args` begin with the program's name.
///
/// Never panics and never exits by itself: a panic anywhere below becomes exit
/// code 70 (198 for `archive-get`).
pub fn run(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let recovery = is_recovery(&args);
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or(String::new(), |place| format!(" at {place}"));
        let payload = info.payload_as_str().unwrap_or("no message");
        let text = output::one_line(&format!("highwater: bug{place}: {payload}"));
        let _ = writeln!(std::io::stderr(), "{text}");
    }));
    let environment = Environment::of_process();
    let output = Output {
        json: args.iter().any(|arg| arg == "--json"),
        quiet: false,
        stderr_is_terminal: environment.stderr_is_terminal,
    };
    ExitCode::from(guarded(recovery, output, || run_parsed(&args, &environment, output)))
}

/// Turns a panic below into a failure that is printed, and its exit code.
fn guarded(recovery: bool, output: Output, run: impl FnOnce() -> u8) -> u8 {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let failure = Failure::new(
            Kind::Bug,
            "highwater has a bug and stopped",
            "nothing that was stored before was changed, and nothing unconfirmed counts as done",
            "run the command again, and report the line above with what you did",
        );
        let code = exit_code(failure.kind, recovery);
        output.failure(&failure, code);
        code
    })
}

/// Parses and runs; returns the exit code after everything was printed.
fn run_parsed(args: &[OsString], environment: &Environment, mut output: Output) -> u8 {
    let command_line = match CommandLine::try_parse_from(args) {
        Ok(command_line) => command_line,
        Err(error) => return end_of_parsing(&error, output, args),
    };
    output.json = command_line.global.json;
    output.quiet = command_line.global.quiet;
    // The log of a service tells what it does; other commands tell only what is wrong.
    let verbose = command_line.global.verbose.max(u8::from(command_line.command.is_service()));
    logging::start(verbose, command_line.global.quiet);
    match run_command(command_line, environment, output) {
        Ok(()) => 0,
        Err(Ended::Said(kind)) => exit_code(kind, is_recovery(args)),
        Err(Ended::Failed(failure)) => {
            let code = exit_code(failure.kind, is_recovery(args));
            output.failure(&failure, code);
            code
        }
    }
}

/// Settings, then the command.
fn run_command(
    command_line: CommandLine,
    environment: &Environment,
    output: Output,
) -> Result<(), Ended> {
    let only = command_line.global.only;
    let (flags, request) = command_line.into_request(environment)?;
    let raw = RawSettings::gather(&flags, environment)?;
    for warning in &raw.warnings {
        tracing::warn!("{warning}");
    }
    let all = Settings::validate(raw)?;
    let settings = all.only(only)?;
    let surroundings = Surroundings { settings: &settings, all: &all, only, environment, output };
    dispatch(request, &surroundings)
}

/// Prints help, the version, or what is wrong with the arguments.
fn end_of_parsing(error: &clap::Error, output: Output, args: &[OsString]) -> u8 {
    let usage_code = exit_code(Kind::Usage, is_recovery(args));
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // A broken pipe (`--help | head`) is no reason to complain.
            let _ = error.print();
            // Help printed to a recovering server has not brought it its file.
            if is_asked_by_server(args) { exit_code(Kind::Usage, true) } else { 0 }
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            usage_code
        }
        _ => {
            output.failure(&usage::failure(error, args), usage_code);
            usage_code
        }
    }
}

/// Returns the exit code for a failure.
///
/// PostgreSQL takes 1 to 125 from `restore_command` as "no such file" and may end
/// recovery there (`src/backend/access/transam/xlogarchive.c`); only "certainly absent" may say so.
fn exit_code(kind: Kind, recovery: bool) -> u8 {
    match kind {
        Kind::Absent => kind.exit_code(),
        _ if recovery => RECOVERY_OFFSET + kind.exit_code(),
        _ => kind.exit_code(),
    }
}

/// Returns whether this call brings a recovering server its WAL, judged without
/// parsing, because a call that cannot be parsed must not look like the end of the archive.
///
/// A server in recovery asks for `%p` by the names RECOVERYXLOG and
/// RECOVERYHISTORY only (`xlogrecovery.c`, `timeline.c`), so that even a
/// misspelt command is recognised.
fn is_recovery(args: &[OsString]) -> bool {
    args.iter().skip(1).any(|arg| arg == "archive-get") || is_asked_by_server(args)
}

/// Returns whether an argument is a `%p` that only a server in recovery gives.
fn is_asked_by_server(args: &[OsString]) -> bool {
    args.iter().skip(1).any(|arg| {
        let file_name = Path::new(arg).file_name().unwrap_or_default();
        file_name == "RECOVERYXLOG" || file_name == "RECOVERYHISTORY"
    })
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_has_an_exit_code_that_postgresql_takes_for_a_failure() {
        let output = Output { json: true, ..Output::default() };
        assert_eq!(guarded(false, output, || panic!("wanted by the test")), 70);
        assert_eq!(guarded(true, output, || panic!("wanted by the test")), 198);
        assert_eq!(guarded(true, output, || 5), 5);
    }

    #[test]
    fn only_certain_absence_tells_recovery_that_a_file_is_not_there() {
        let kinds = [
            Kind::Usage,
            Kind::Conflict,
            Kind::Integrity,
            Kind::Store,
            Kind::Postgres,
            Kind::Disk,
            Kind::Bug,
        ];
        for kind in kinds {
            assert!(exit_code(kind, true) > 125, "{}", kind.word());
            assert!((1..=125).contains(&exit_code(kind, false)), "{}", kind.word());
        }
        assert_eq!(exit_code(Kind::Absent, true), 1);
        assert_eq!(exit_code(Kind::Store, true), 133);
        assert_eq!(exit_code(Kind::Bug, true), 198);
    }

    #[test]
    fn a_recovering_server_is_known_however_the_command_is_spelt() {
        let is = |words: &[&str]| {
            let args: Vec<OsString> = words.iter().map(OsString::from).collect();
            is_recovery(&args)
        };
        assert!(is(&["highwater", "archive-get", "x", "y"]));
        assert!(is(&["highwater", "--repo", "s3://b", "archive-get"]));
        assert!(is(&["highwater", "archive-gte", "00000002.history", "pg_wal/RECOVERYHISTORY"]));
        assert!(is(&["highwater", "pg_wal/RECOVERYXLOG"]));
        assert!(!is(&["highwater", "archive-push", "pg_wal/000000010000000A000000FE"]));
        assert!(!is(&["archive-get", "info"]));
    }
}
