//! Arguments of `spool`.

use std::path::PathBuf;

use clap::Args;

/// Arguments of `spool`.
#[derive(Args)]
pub struct SpoolArgs {
    /// Bring what lies there into the repository now, and close gaps
    #[arg(long)]
    pub(super) drain: bool,
    /// The cluster's data directory, if it is on this machine [env: HIGHWATER_PGDATA]
    #[arg(long, value_name = "DIR")]
    pub(super) pgdata: Option<PathBuf>,
}
