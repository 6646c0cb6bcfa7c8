//! The command line: commands, flags and their one-line meanings.
//!
//! Owns what can be typed. Never here: settings' ranges (`settings_table`),
//! the checks of arguments (`requests`, `target`), what a command does.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, Parser, Subcommand};

use super::copy_args::CopyArgs;
use super::drill_args::{DrillArgs, DrillGuardArgs};
use super::environment::Environment;
use super::help;
use super::key_args::KeyCommand;
use super::log_args::LogArgs;
use super::receive_args::ReceiveArgs;
use super::requests::{
    AgentRequest, ArchiveGetRequest, ArchivePushRequest, BackupRequest, BackupSource, CheckRequest,
    InfoRequest, InitRequest, ManifestChecksums, Request, check_annotations, parse_annotation,
    parse_label, parse_max_rate,
};
use super::restore_args::RestoreArgs;
use super::retention_args::{ExpireArgs, PinArgs, UnpinArgs, keep_until};
use super::second_repo::Only;
use super::settings::{FlagValues, NOTHING_DONE};
use super::settings_table::Id;
use super::spool_args::SpoolArgs;
use super::target::{TargetTime, parse_time};
use super::verify_args::VerifyArgs;
use crate::failure::{Failure, Kind};

/// How long `check` waits for its segment unless told otherwise, in seconds.
const CHECK_WAIT_SECONDS: u64 = 60;

/// PostgreSQL WAL archiving, base backups and point-in-time recovery over object storage.
#[derive(Parser)]
#[command(
    name = "highwater",
    version,
    after_help = help::MAIN,
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct CommandLine {
    /// Flags that every command takes.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes, before or after its name.
#[derive(Args)]
#[command(next_help_heading = "Options of every command")]
pub struct GlobalArgs {
    /// Settings file [env: HIGHWATER_CONFIG]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Repository: file:///path, s3://…, gs://… or az://… [env: HIGHWATER_REPO]
    #[arg(long, global = true, value_name = "URL")]
    repo: Option<String>,
    /// The cluster's name in the repository [env: HIGHWATER_CLUSTER]
    #[arg(long, global = true, value_name = "NAME")]
    cluster: Option<String>,
    /// libpq connection string or URI; PG* variables fill the rest [env: HIGHWATER_DSN]
    #[arg(long, global = true, value_name = "CONNINFO")]
    dsn: Option<String>,
    /// The file that holds the key of an encrypted cluster [env: HIGHWATER_KEY_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// A command that prints that key [env: HIGHWATER_KEY_COMMAND]
    #[arg(long, global = true, value_name = "COMMAND")]
    key_command: Option<String>,
    /// A second repository, which holds everything once more [env: HIGHWATER_SECOND_REPO]
    #[arg(long, global = true, value_name = "URL")]
    second_repo: Option<String>,
    /// The file that holds the second repository's key [env: HIGHWATER_SECOND_KEY_FILE]
    #[arg(long, global = true, value_name = "FILE")]
    second_key_file: Option<PathBuf>,
    /// A command that prints that key [env: HIGHWATER_SECOND_KEY_COMMAND]
    #[arg(long, global = true, value_name = "COMMAND")]
    second_key_command: Option<String>,
    /// Work on one of two repositories alone: first or second
    #[arg(long, global = true, value_name = "WHICH", hide_possible_values = true)]
    pub only: Option<Only>,
    /// Report as JSON on stdout, failures too
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on stderr; twice for still more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Say nothing on stderr but errors
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// The commands.
#[derive(Subcommand)]
pub enum Command {
    /// Claim a place in the repository for this PostgreSQL cluster
    #[command(after_help = help::INIT)]
    Init(InitArgs),
    /// Prove the whole path: settings, permissions, storage, a WAL segment that arrives
    #[command(after_help = help::CHECK)]
    Check(CheckArgs),
    /// Store one WAL file: PostgreSQL's archive_command
    #[command(after_help = help::ARCHIVE_PUSH)]
    ArchivePush(ArchivePushArgs),
    /// Bring one WAL file back: PostgreSQL's restore_command
    #[command(after_help = help::ARCHIVE_GET)]
    ArchiveGet(ArchiveGetArgs),
    /// Fetch ahead of recovery, in its data directory; archive-get starts it
    #[command(hide = true)]
    FetchAhead,
    /// Stream WAL into the repository as it is written: a service
    #[command(after_help = help::RECEIVE)]
    Receive(ReceiveArgs),
    /// Serve a cluster: archive and fetch WAL before it is asked for: a service
    #[command(after_help = help::AGENT)]
    Agent(AgentArgs),
    /// Take a base backup
    #[command(after_help = help::BACKUP)]
    Backup(BackupArgs),
    /// Rebuild a data directory, as of any moment in the archive
    #[command(after_help = help::RESTORE)]
    Restore(Box<RestoreArgs>),
    /// Show backups, WAL coverage, gaps and the recovery window
    #[command(after_help = help::INFO)]
    Info(InfoArgs),
    /// Prove that what is stored is whole and WAL unbroken
    #[command(after_help = help::VERIFY)]
    Verify(VerifyArgs),
    /// Prove that it comes back: restore, start, replay and ask a copy, and tell how long it took
    #[command(after_help = help::DRILL)]
    Drill(Box<DrillArgs>),
    /// Clear up behind a drill that is killed; drill starts it
    #[command(hide = true)]
    DrillGuard(DrillGuardArgs),
    /// Tell commits, restore points and drops in archived WAL: find the moment to go back to
    #[command(after_help = help::LOG)]
    Log(Box<LogArgs>),
    /// Show or drain what lies on this host while the store is away
    #[command(after_help = help::SPOOL)]
    Spool(SpoolArgs),
    /// Drain the spool until it is empty; archive-push starts it
    #[command(hide = true)]
    DrainSpool,
    /// Delete backups and WAL that the retention policy does not keep
    #[command(after_help = help::EXPIRE)]
    Expire(ExpireArgs),
    /// Keep a backup whatever the retention policy says
    #[command(after_help = help::PIN)]
    Pin(PinArgs),
    /// Take all pins off a backup
    Unpin(UnpinArgs),
    /// Bring what one of two repositories has and the other has not into the other
    #[command(after_help = help::COPY)]
    Copy(CopyArgs),
    /// Make and change the keys of an encrypted cluster
    #[command(subcommand, after_help = help::KEY)]
    Key(KeyCommand),
    /// Show the settings in force and where each came from
    #[command(after_help = help::CONFIG)]
    Config,
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// An existing directory
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// Arguments of `init`.
#[derive(Args)]
pub struct InitArgs {
    /// Claim the place as the successor of its cluster, after pg_upgrade
    #[arg(long)]
    successor: bool,
    /// The cluster's data directory, if it is on this machine [env: HIGHWATER_PGDATA]
    #[arg(long, value_name = "DIR")]
    pgdata: Option<PathBuf>,
}

/// Arguments of `check`.
#[derive(Args)]
pub struct CheckArgs {
    /// The cluster's data directory, if it is on this machine [env: HIGHWATER_PGDATA]
    #[arg(long, value_name = "DIR")]
    pgdata: Option<PathBuf>,
    /// How long to wait for the segment to arrive, in seconds
    #[arg(
        long, value_name = "SECONDS", default_value_t = CHECK_WAIT_SECONDS,
        value_parser = clap::value_parser!(u64).range(1..=86_400)
    )]
    wait_seconds: u64,
    /// Do not force a WAL switch; look only
    #[arg(long)]
    no_switch: bool,
}

/// Arguments of `archive-push`.
#[derive(Args)]
pub struct ArchivePushArgs {
    /// The WAL file, %p in archive_command
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// By hand only: store a segment that pg_waldump refuses too as damaged, so that archiving goes on
    #[arg(long)]
    accept_damaged: bool,
}

/// Arguments of `archive-get`.
#[derive(Args)]
pub struct ArchiveGetArgs {
    /// The name of the WAL file, %f in restore_command
    #[arg(value_name = "NAME")]
    name: String,
    /// Where to put it, %p in restore_command
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

/// Arguments of `agent`.
#[derive(Args)]
pub struct AgentArgs {
    /// The cluster's data directory [env: HIGHWATER_PGDATA, PGDATA]
    #[arg(long, value_name = "DIR")]
    pgdata: Option<PathBuf>,
    /// Stream WAL into the repository as well, as the command receive does [env: HIGHWATER_RECEIVE]
    #[arg(long)]
    receive: bool,
    #[command(flatten, next_help_heading = "With --receive")]
    receiving: ReceiveArgs,
}

/// Arguments of `backup`.
#[derive(Args)]
pub struct BackupArgs {
    /// Where the files come from: stream (a replication connection) or files (the data
    /// directory, on the server's own host)
    #[arg(long, value_name = "SOURCE", default_value = "stream", hide_possible_values = true)]
    source: BackupSource,
    /// The data directory for --source files, if the server may not be asked [env: HIGHWATER_PGDATA]
    #[arg(long, value_name = "DIR")]
    pgdata: Option<PathBuf>,
    /// With --source files: read every file, those too that look untouched since the last backup
    #[arg(long)]
    rehash: bool,
    /// Workers that read, compress and store [env: HIGHWATER_JOBS]
    #[arg(long, value_name = "N")]
    jobs: Option<String>,
    /// Begin with an immediate checkpoint instead of a spread one
    #[arg(long)]
    fast: bool,
    /// Take the backup from a standby, if one of the hosts in the connection string is fit
    #[arg(long)]
    prefer_standby: bool,
    /// A note kept with the backup; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_annotation)]
    annotate: Vec<(String, String)>,
    /// The label in backup_label
    #[arg(long, value_name = "TEXT", value_parser = parse_label)]
    label: Option<String>,
    /// The most that is sent or read each second, such as 50MB
    #[arg(long, value_name = "RATE", value_parser = parse_max_rate)]
    max_rate: Option<u64>,
    /// How long to wait for the backup's WAL [env: HIGHWATER_WAL_TIMEOUT]
    #[arg(long, value_name = "TIME")]
    wal_timeout: Option<String>,
    /// Checksums in the manifest: crc32c (fast) or sha256
    #[arg(long, value_name = "KIND", default_value = "crc32c", hide_possible_values = true)]
    manifest_checksums: ManifestChecksums,
    /// Pin it from the beginning: expire keeps it at least until then
    #[arg(long, value_name = "TIME")]
    keep_until: Option<String>,
}

/// Arguments of `info`.
#[derive(Args)]
pub struct InfoArgs {
    /// Only this backup
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
    /// What a restore to this time would use, and how long it would take
    #[arg(long, value_name = "TIME", conflicts_with = "backup")]
    at: Option<String>,
}

impl Command {
    /// Returns whether the command runs until it is told to stop.
    pub fn is_service(&self) -> bool {
        matches!(self, Self::Receive(_) | Self::Agent(_))
    }
}

impl GlobalArgs {
    fn into_flags(self) -> Result<FlagValues, Failure> {
        let mut flags = FlagValues { config: self.config, values: Vec::new() };
        flags.set(Id::Repo, self.repo);
        flags.set(Id::Cluster, self.cluster);
        flags.set(Id::Dsn, self.dsn);
        flags.set(Id::KeyFile, absolute_text(self.key_file)?);
        flags.set(Id::KeyCommand, self.key_command);
        flags.set(Id::SecondRepo, self.second_repo);
        flags.set(Id::SecondKeyFile, absolute_text(self.second_key_file)?);
        flags.set(Id::SecondKeyCommand, self.second_key_command);
        if self.quiet && self.verbose > 0 {
            let what = "--quiet and --verbose contradict each other";
            return Err(usage(what, "leave one of them out"));
        }
        Ok(flags)
    }
}

impl CommandLine {
    /// Turns arguments into what flags say about settings and what is asked for.
    ///
    /// # Errors
    /// [`Kind::Usage`] for arguments that are wrong or contradict each other.
    pub fn into_request(self, environment: &Environment) -> Result<(FlagValues, Request), Failure> {
        let mut flags = self.global.into_flags()?;
        let request = match self.command {
            Command::Init(args) => {
                flags.set(Id::Pgdata, absolute_text(args.pgdata)?);
                Request::Init(InitRequest { successor: args.successor })
            }
            Command::Check(args) => {
                flags.set(Id::Pgdata, absolute_text(args.pgdata)?);
                let CheckArgs { wait_seconds, no_switch, .. } = args;
                Request::Check(CheckRequest { wait_seconds, no_switch })
            }
            Command::ArchivePush(args) => Request::ArchivePush(ArchivePushRequest {
                path: args.path,
                accept_damaged: args.accept_damaged,
            }),
            Command::ArchiveGet(ArchiveGetArgs { name, path }) => {
                Request::ArchiveGet(ArchiveGetRequest { name, path })
            }
            Command::FetchAhead => Request::FetchAhead,
            Command::Receive(args) => Request::Receive(args.into_request(&mut flags)),
            Command::Agent(args) => {
                flags.set(Id::Pgdata, absolute_text(args.pgdata)?);
                flags.set(Id::Receive, args.receive.then_some("on"));
                let receive = args.receiving.into_request(&mut flags);
                Request::Agent(AgentRequest { receive })
            }
            Command::Backup(args) => {
                flags.set(Id::Jobs, args.jobs.clone());
                flags.set(Id::WalTimeout, args.wal_timeout.clone());
                flags.set(Id::Pgdata, absolute_text(args.pgdata.clone())?);
                Request::Backup(args.into_request(environment)?)
            }
            Command::Restore(args) => {
                Request::Restore(Box::new(args.into_request(&mut flags, environment)?))
            }
            Command::Info(args) => args.into_request(environment)?,
            Command::Verify(args) => args.into_request(&mut flags)?,
            Command::Drill(args) => args.into_request(&mut flags, environment)?,
            Command::DrillGuard(args) => args.into_request(),
            Command::Log(args) => Request::Log(Box::new(args.into_request(environment)?)),
            Command::Spool(args) => {
                flags.set(Id::Pgdata, absolute_text(args.pgdata)?);
                Request::Spool { drain: args.drain }
            }
            Command::DrainSpool => Request::DrainSpool,
            Command::Expire(args) => args.into_request(&mut flags),
            Command::Pin(args) => args.into_request(environment)?,
            Command::Unpin(args) => args.into_request(),
            Command::Copy(args) => args.into_request()?,
            Command::Key(command) => Request::Key(command.into_request()?),
            Command::Config => Request::Config,
            Command::Man { directory } => Request::Man(directory),
        };
        Ok((flags, request))
    }
}

impl BackupArgs {
    fn into_request(self, environment: &Environment) -> Result<BackupRequest, Failure> {
        check_annotations(&self.annotate)
            .map_err(|reason| usage(&reason, "give each annotation once: --annotate KEY=VALUE"))?;
        Ok(BackupRequest {
            source: self.source,
            rehash: self.rehash,
            fast: self.fast,
            prefer_standby: self.prefer_standby,
            annotations: self.annotate,
            label: self.label,
            max_rate: self.max_rate,
            manifest_checksums: self.manifest_checksums,
            keep_until: keep_until("--keep-until", self.keep_until, environment)?,
        })
    }
}

impl InfoArgs {
    fn into_request(self, environment: &Environment) -> Result<Request, Failure> {
        let Some(text) = self.at else {
            return Ok(Request::Info(InfoRequest { backup: self.backup }));
        };
        let time = parse_time(&text, || environment.time_zone());
        let TargetTime { point, in_full } = time.map_err(|error| {
            usage(&format!("--at: {error}"), "write the time out, such as 2026-11-22 03:00:00+00")
        })?;
        Ok(Request::InfoAt { point, in_full })
    }
}

pub(super) fn usage(what: &str, next: &str) -> Failure {
    Failure::new(Kind::Usage, what, NOTHING_DONE, next)
}

/// Makes a path absolute by the working directory, without asking the disk.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| {
        usage(
            &format!("`{}` cannot be made an absolute path", path.display()),
            "give the whole path",
        )
        .because(error)
    })
}

pub(super) fn absolute_text(path: Option<PathBuf>) -> Result<Option<String>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let text = absolute(&path)?.into_os_string().into_string();
    text.map(Some).map_err(|path| {
        usage(
            &format!("the path {} is not UTF-8", path.display()),
            "use a path of UTF-8 characters",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }
}
