//! The `highwater` binary: parse, dispatch, exit code. Everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    highwater::cli::run(std::env::args_os())
}
