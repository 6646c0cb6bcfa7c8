//! Which settings there are, by name.
//!
//! Never here: what they take and mean (`settings_table`), or their values (`settings`).

/// One setting, for code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Id {
    /// Where the repository is.
    Repo,
    /// The cluster's name in the repository.
    Cluster,
    /// How to reach PostgreSQL.
    Dsn,
    /// The data directory.
    Pgdata,
    /// How stored objects are compressed.
    Compression,
    /// How many workers work in parallel.
    Jobs,
    /// The ceiling of memory.
    MemoryMax,
    /// How long one `archive-push` may take.
    ArchivePushDeadline,
    /// How long one `archive-get` may take.
    ArchiveGetDeadline,
    /// What `archive-get` says on a standby when it could not find out.
    StandbyFallback,
    /// How long `backup` waits for its WAL.
    WalTimeout,
    /// How much received WAL may be lost, as time.
    Rpo,
    /// Whether commits wait for `receive`.
    Synchronous,
    /// The replication slot of `receive`.
    Slot,
    /// How many pieces `receive` has on their way.
    Uploads,
    /// Whether the agent receives.
    Receive,
    /// Where work ahead of PostgreSQL is noted.
    Spool,
    /// The most WAL in the spool.
    SpoolMax,
    /// Where WAL is kept while the store is away.
    StallSpool,
    /// The most WAL that is kept there.
    StallSpoolMax,
    /// From how much waiting WAL on it is let go.
    WalBacklogMax,
    /// How far back every moment can be gone back to.
    RetainWindow,
    /// How many of the newest backups stay.
    RetainBackups,
    /// Of how many days a backup stays.
    RetainDaily,
    /// Of how many weeks a backup stays.
    RetainWeekly,
    /// Of how many months a backup stays.
    RetainMonthly,
    /// The fewest backups that are left.
    MinBackups,
    /// How long an unfinished backup may be silent.
    RetainUnfinished,
    /// The file that holds the key.
    KeyFile,
    /// The command that prints the key.
    KeyCommand,
    /// Where a drill may work.
    DrillScratch,
    /// The directory of the user's own checks.
    DrillChecks,
    /// The room that a drill leaves free.
    DrillDiskFreeMin,
    /// Whose the server of a drill is, where root drills.
    DrillUser,
    /// Libraries that recovery needs.
    DrillPreload,
    /// Where PostgreSQL's programs are.
    PostgresBin,
    /// How often the agent takes a backup.
    BackupEvery,
    /// At what time of day it does.
    BackupAt,
    /// Whether it does beside a standby too.
    BackupOnStandby,
    /// How often the agent runs `expire`.
    ExpireEvery,
    /// How often the agent runs `verify`.
    VerifyEvery,
    /// How often the agent runs `drill`.
    DrillEvery,
    /// Where the second repository is.
    SecondRepo,
    /// The file that holds the second repository's key.
    SecondKeyFile,
    /// The command that prints the second repository's key.
    SecondKeyCommand,
    /// [`Id::RetainWindow`] of the second repository.
    SecondRetainWindow,
    /// [`Id::RetainBackups`] of the second repository.
    SecondRetainBackups,
    /// [`Id::RetainDaily`] of the second repository.
    SecondRetainDaily,
    /// [`Id::RetainWeekly`] of the second repository.
    SecondRetainWeekly,
    /// [`Id::RetainMonthly`] of the second repository.
    SecondRetainMonthly,
    /// [`Id::MinBackups`] of the second repository.
    SecondMinBackups,
    /// [`Id::RetainUnfinished`] of the second repository.
    SecondRetainUnfinished,
    /// In how many repositories WAL must be stored before the server may let it go.
    WalCopies,
}
