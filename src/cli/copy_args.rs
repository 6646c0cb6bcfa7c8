//! Arguments of `copy`.

use clap::Args;

use super::args::usage;
use super::requests::{CopiedBackups, CopyRequest, Request};
use super::second_repo::Only;
use crate::failure::Failure;

/// Arguments of `copy`.
#[derive(Args)]
#[allow(clippy::struct_excessive_bools)] // each is a flag of its own
pub struct CopyArgs {
    /// A backup, as info shows it, with the WAL from its start to its stop
    #[arg(value_name = "BACKUP", conflicts_with_all = ["all", "newest"])]
    backup: Option<String>,
    /// All backups that retention at the destination would keep
    #[arg(long, conflicts_with = "newest")]
    all: bool,
    /// The newest backup
    #[arg(long)]
    newest: bool,
    /// All WAL that retention at the destination would keep
    #[arg(long)]
    wal: bool,
    /// Only from this one into the other: first or second (default: both ways)
    #[arg(long, value_name = "WHICH", hide_possible_values = true)]
    from: Option<Only>,
    /// Print what is missing, and stop
    #[arg(long)]
    dry_run: bool,
}

impl CopyArgs {
    pub(super) fn into_request(self) -> Result<Request, Failure> {
        let backups = match self.backup {
            Some(id) => CopiedBackups::Named(id),
            None if self.all => CopiedBackups::All,
            None if self.newest => CopiedBackups::Newest,
            None => CopiedBackups::Nothing,
        };
        if backups == CopiedBackups::Nothing && !self.wal {
            return Err(usage(
                "nothing is said to be copied",
                "name a backup, or say --newest, --all or --wal; `highwater copy --help` shows examples",
            ));
        }
        let Self { wal, from, dry_run, .. } = self;
        Ok(Request::Copy(CopyRequest { backups, wal, from, dry_run }))
    }
}
