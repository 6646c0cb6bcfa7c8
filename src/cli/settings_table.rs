//! Every setting, declared once: its names, what it takes, its default.
//!
//! The reading of files and variables, the messages about wrong values and the
//! `config` command all follow this table. Store options (`[repo.options]`) are
//! not here: the stores know their own. Never here: reading or checking values.
//!
//! A setting has up to three names. The variable is the flag's name in capitals:
//!
//! ```text
//! file      wal_timeout = "10min"        repo.url means the key `url` under `[repo]`
//! variable  HIGHWATER_WAL_TIMEOUT=10min
//! flag      --wal-timeout 10min
//! ```

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
}

/// What a setting takes. Bounds are included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepts {
    /// A repository URL.
    RepoUrl,
    /// A cluster name.
    ClusterName,
    /// A libpq connection string.
    Conninfo,
    /// A directory.
    Directory,
    /// A file.
    File,
    /// A command for the shell.
    Command,
    /// `zstd[:level]`, `lz4` or `none`.
    Compression,
    /// A whole number.
    Count {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// A size, in bytes.
    Size {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// A duration, in seconds.
    Duration {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// On or off.
    Switch,
    /// The name of a replication slot, or `none`.
    Slot,
    /// A directory, `pg_wal` or `none`.
    Spool,
}

impl Accepts {
    /// Says in words what is accepted, to follow "takes".
    pub fn in_words(self) -> String {
        use super::units::{setting_duration, setting_size};
        let seconds = |n| setting_duration(std::time::Duration::from_secs(n));
        match self {
            Self::RepoUrl => {
                "a URL: file:///path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix".into()
            }
            Self::ClusterName => {
                "1 to 63 letters, digits, dots, dashes and underscores, the first a letter or digit".into()
            }
            Self::Conninfo => "a libpq connection string or postgresql:// URI".into(),
            Self::Directory => "the absolute path of a directory".into(),
            Self::File => "the absolute path of a file".into(),
            Self::Command => "a command for the shell".into(),
            Self::Compression => "zstd, zstd:1 to zstd:19, lz4 or none".into(),
            Self::Count { min, max } => format!("a whole number from {min} to {max}"),
            Self::Size { min, max } => format!(
                "a size from {} to {}: a number of bytes, or a number with kB, MB, GB, KiB, MiB or GiB",
                setting_size(min),
                setting_size(max)
            ),
            Self::Duration { min, max } => format!(
                "a time from {} to {}: a number of seconds, or a number with ms, s, min, h or d",
                seconds(min),
                seconds(max)
            ),
            Self::Switch => "on or off (in the file: true or false)".into(),
            Self::Slot => {
                "1 to 63 small letters, digits and underscores, or `none` for no slot".into()
            }
            Self::Spool => {
                "the absolute path of a directory, `pg_wal` for one beside the WAL itself, or `none`".into()
            }
        }
    }

    /// Returns whether a TOML value of this type can be meant (`string`, `integer`, `boolean`, …).
    pub fn takes_toml(self, toml_type: &str) -> bool {
        match self {
            Self::Count { .. } => toml_type == "integer",
            Self::Switch => toml_type == "boolean",
            Self::Size { .. } | Self::Duration { .. } => matches!(toml_type, "integer" | "string"),
            _ => toml_type == "string",
        }
    }
}

/// The declaration of one setting.
#[derive(Debug)]
pub struct Setting {
    /// Which one.
    pub id: Id,
    /// Its key in the file, with its table: `repo.url`.
    pub key: &'static str,
    /// Its environment variable.
    pub variable: &'static str,
    /// Its flag, where there is one.
    pub flag: Option<&'static str>,
    /// Its type, unit and range.
    pub accepts: Accepts,
    /// Its default as text, `None` when it has none. What is computed is said in `meaning`.
    pub default: Option<&'static str>,
    /// A value that is accepted, as text.
    pub example: &'static str,
    /// One line for people.
    pub meaning: &'static str,
}

const MIB: u64 = 1 << 20;
const HOUR: u64 = 3_600;

/// All settings, in the order in which they are shown.
pub static TABLE: [Setting; 30] = [
    Setting {
        id: Id::Repo,
        key: "repo.url",
        variable: "HIGHWATER_REPO",
        flag: Some("--repo"),
        accepts: Accepts::RepoUrl,
        default: None,
        example: "s3://backups/postgres",
        meaning: "where the repository is",
    },
    Setting {
        id: Id::Cluster,
        key: "cluster",
        variable: "HIGHWATER_CLUSTER",
        flag: Some("--cluster"),
        accepts: Accepts::ClusterName,
        default: None,
        example: "main",
        meaning: "the cluster's name in the repository",
    },
    Setting {
        id: Id::Dsn,
        key: "dsn",
        variable: "HIGHWATER_DSN",
        flag: Some("--dsn"),
        accepts: Accepts::Conninfo,
        default: None,
        example: "host=/run/postgresql user=highwater",
        meaning: "how to reach PostgreSQL, over what PG* variables say",
    },
    Setting {
        id: Id::Pgdata,
        key: "pgdata",
        variable: "HIGHWATER_PGDATA",
        flag: Some("--pgdata"),
        accepts: Accepts::Directory,
        default: None,
        example: "/var/lib/postgresql/18/main",
        meaning: "the data directory of the cluster (restore has its own --pgdata)",
    },
    Setting {
        id: Id::Compression,
        key: "compression",
        variable: "HIGHWATER_COMPRESSION",
        flag: None,
        accepts: Accepts::Compression,
        default: Some("zstd:1"),
        example: "zstd:3",
        meaning: "how objects are compressed when they are stored",
    },
    Setting {
        id: Id::Jobs,
        key: "jobs",
        variable: "HIGHWATER_JOBS",
        flag: Some("--jobs"),
        accepts: Accepts::Count { min: 1, max: 64 },
        default: None,
        example: "4",
        meaning: "workers of a backup or restore; by default one per processor, at most 4",
    },
    Setting {
        id: Id::MemoryMax,
        key: "memory_max",
        variable: "HIGHWATER_MEMORY_MAX",
        flag: None,
        accepts: Accepts::Size { min: 64 * MIB, max: MIB << 20 },
        default: Some("256MiB"),
        example: "512MiB",
        meaning: "ceiling of memory for backup and restore; archiving keeps to 64 MiB of it",
    },
    Setting {
        id: Id::ArchivePushDeadline,
        key: "archive_push_deadline",
        variable: "HIGHWATER_ARCHIVE_PUSH_DEADLINE",
        flag: None,
        accepts: Accepts::Duration { min: 1, max: 24 * HOUR },
        default: Some("5min"),
        example: "5min",
        meaning: "how long one archive-push may take, retries included",
    },
    Setting {
        id: Id::ArchiveGetDeadline,
        key: "archive_get_deadline",
        variable: "HIGHWATER_ARCHIVE_GET_DEADLINE",
        flag: None,
        accepts: Accepts::Duration { min: 1, max: 24 * HOUR },
        default: Some("2min"),
        example: "2min",
        meaning: "how long one archive-get may take, retries included",
    },
    Setting {
        id: Id::StandbyFallback,
        key: "standby_fallback",
        variable: "HIGHWATER_STANDBY_FALLBACK",
        flag: None,
        accepts: Accepts::Switch,
        default: Some("on"),
        example: "on",
        meaning: "archive-get on a standby exits 1 when the store stays away, so that streaming goes on",
    },
    Setting {
        id: Id::WalTimeout,
        key: "wal_timeout",
        variable: "HIGHWATER_WAL_TIMEOUT",
        flag: Some("--wal-timeout"),
        accepts: Accepts::Duration { min: 1, max: 7 * 24 * HOUR },
        default: Some("10min"),
        example: "10min",
        meaning: "how long a backup waits for its WAL to arrive in the repository",
    },
    Setting {
        id: Id::Rpo,
        key: "rpo",
        variable: "HIGHWATER_RPO",
        flag: Some("--rpo"),
        accepts: Accepts::Duration { min: 0, max: HOUR },
        default: Some("1s"),
        example: "500ms",
        meaning: "how long receive may hold WAL before it goes to the store: the most that is lost with the server",
    },
    Setting {
        id: Id::Synchronous,
        key: "synchronous",
        variable: "HIGHWATER_SYNCHRONOUS",
        flag: Some("--synchronous"),
        accepts: Accepts::Switch,
        default: Some("off"),
        example: "on",
        meaning: "receive stores each commit at once, for servers whose commits wait for it",
    },
    Setting {
        id: Id::Slot,
        key: "slot",
        variable: "HIGHWATER_SLOT",
        flag: Some("--slot"),
        accepts: Accepts::Slot,
        default: None,
        example: "highwater_main",
        meaning: "the replication slot of receive; by default highwater_ and the cluster's name",
    },
    Setting {
        id: Id::Uploads,
        key: "uploads",
        variable: "HIGHWATER_UPLOADS",
        flag: Some("--uploads"),
        accepts: Accepts::Count { min: 1, max: 64 },
        default: Some("8"),
        example: "16",
        meaning: "the most pieces of WAL that receive has on their way to the store at a time",
    },
    Setting {
        id: Id::Receive,
        key: "receive",
        variable: "HIGHWATER_RECEIVE",
        flag: Some("--receive"),
        accepts: Accepts::Switch,
        default: Some("off"),
        example: "on",
        meaning: "the agent streams WAL into the repository as well",
    },
    Setting {
        id: Id::Spool,
        key: "spool",
        variable: "HIGHWATER_SPOOL",
        flag: None,
        accepts: Accepts::Spool,
        default: Some("pg_wal"),
        example: "/var/spool/highwater",
        meaning: "where archive-push and archive-get keep what they did ahead; none: nothing is done ahead",
    },
    Setting {
        id: Id::SpoolMax,
        key: "spool_max",
        variable: "HIGHWATER_SPOOL_MAX",
        flag: None,
        accepts: Accepts::Size { min: MIB, max: 64 << 30 },
        default: Some("128MiB"),
        example: "256MiB",
        meaning: "the most WAL that archive-get keeps fetched ahead",
    },
    Setting {
        id: Id::StallSpool,
        key: "stall_spool",
        variable: "HIGHWATER_STALL_SPOOL",
        flag: None,
        accepts: Accepts::Directory,
        default: None,
        example: "/var/spool/highwater-stall",
        meaning: "where archive-push keeps WAL while the store is away; by default PostgreSQL keeps it",
    },
    Setting {
        id: Id::StallSpoolMax,
        key: "stall_spool_max",
        variable: "HIGHWATER_STALL_SPOOL_MAX",
        flag: None,
        accepts: Accepts::Size { min: 32 * MIB, max: MIB << 20 },
        default: Some("10GiB"),
        example: "50GiB",
        meaning: "the most that may lie in stall_spool, as stored",
    },
    Setting {
        id: Id::WalBacklogMax,
        key: "wal_backlog_max",
        variable: "HIGHWATER_WAL_BACKLOG_MAX",
        flag: None,
        accepts: Accepts::Size { min: 32 * MIB, max: MIB << 20 },
        default: None,
        example: "50GiB",
        meaning: "from this much waiting WAL on it is LET GO while the store is away; by default never",
    },
    Setting {
        id: Id::RetainWindow,
        key: "retain_window",
        variable: "HIGHWATER_RETAIN_WINDOW",
        flag: Some("--retain-window"),
        accepts: Accepts::Duration { min: HOUR, max: 3650 * 24 * HOUR },
        default: None,
        example: "30d",
        meaning: "expire keeps every moment of this long ago until now: backups and all their WAL",
    },
    Setting {
        id: Id::RetainBackups,
        key: "retain_backups",
        variable: "HIGHWATER_RETAIN_BACKUPS",
        flag: Some("--retain-backups"),
        accepts: Accepts::Count { min: 1, max: 10_000 },
        default: None,
        example: "7",
        meaning: "expire keeps so many of the newest backups, with all WAL since",
    },
    Setting {
        id: Id::RetainDaily,
        key: "retain_daily",
        variable: "HIGHWATER_RETAIN_DAILY",
        flag: Some("--retain-daily"),
        accepts: Accepts::Count { min: 1, max: 10_000 },
        default: None,
        example: "14",
        meaning: "expire keeps the last backup of each of so many days, with its own WAL only",
    },
    Setting {
        id: Id::RetainWeekly,
        key: "retain_weekly",
        variable: "HIGHWATER_RETAIN_WEEKLY",
        flag: Some("--retain-weekly"),
        accepts: Accepts::Count { min: 1, max: 10_000 },
        default: None,
        example: "8",
        meaning: "the same for weeks",
    },
    Setting {
        id: Id::RetainMonthly,
        key: "retain_monthly",
        variable: "HIGHWATER_RETAIN_MONTHLY",
        flag: Some("--retain-monthly"),
        accepts: Accepts::Count { min: 1, max: 10_000 },
        default: None,
        example: "12",
        meaning: "the same for months",
    },
    Setting {
        id: Id::MinBackups,
        key: "min_backups",
        variable: "HIGHWATER_MIN_BACKUPS",
        flag: Some("--min-backups"),
        accepts: Accepts::Count { min: 1, max: 1000 },
        default: Some("1"),
        example: "2",
        meaning: "expire never leaves fewer usable backups than this; deletes nothing by itself",
    },
    Setting {
        id: Id::RetainUnfinished,
        key: "retain_unfinished",
        variable: "HIGHWATER_RETAIN_UNFINISHED",
        flag: Some("--retain-unfinished"),
        accepts: Accepts::Duration { min: HOUR, max: 3650 * 24 * HOUR },
        default: Some("7d"),
        example: "7d",
        meaning: "after so long without a sign of life expire takes an unfinished backup for dead",
    },
    Setting {
        id: Id::KeyFile,
        key: "key_file",
        variable: "HIGHWATER_KEY_FILE",
        flag: Some("--key-file"),
        accepts: Accepts::File,
        default: None,
        example: "/etc/highwater/main.key",
        meaning: "the file that holds the key: everything that is stored is encrypted",
    },
    Setting {
        id: Id::KeyCommand,
        key: "key_command",
        variable: "HIGHWATER_KEY_COMMAND",
        flag: Some("--key-command"),
        accepts: Accepts::Command,
        default: None,
        example: "vault kv get -field=key secret/highwater",
        meaning: "a command that prints the key, within 30 s; instead of a file",
    },
];

/// Returns the declaration of `id`.
pub fn setting(id: Id) -> &'static Setting {
    // The test below holds the order of the table to the order of `Id`.
    &TABLE[id as usize]
}

/// The key of the table that holds store options, in the file.
pub const OPTIONS_KEY: &str = "repo.options";

/// What a store option's variable begins with; the rest is the option's name in capitals.
pub const OPTION_VARIABLE_PREFIX: &str = "HIGHWATER_REPO_";

/// The variable that names the settings file; it is not a setting itself.
pub const CONFIG_VARIABLE: &str = "HIGHWATER_CONFIG";

/// The variable that holds the key itself. Neither a flag nor the settings file can.
pub const KEY_VARIABLE: &str = "HIGHWATER_KEY";

/// The settings file that is read, where it exists, when none is named.
pub const DEFAULT_FILE: &str = "/etc/highwater/highwater.toml";

/// Returns whether the store option of this name holds a secret, judged by its
/// words: `secret_access_key` does, `access_key_id` and `sse_kms_key` (names of keys) do not.
pub fn is_secret_option(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    if ["secret", "token", "password", "passphrase"].iter().any(|word| name.contains(word)) {
        return true;
    }
    let words: Vec<&str> = name.split(['_', '-', '.']).collect();
    words.iter().enumerate().any(|(i, word)| match *word {
        "sas" => true,
        "key" => words.get(i + 1) != Some(&"id") && (i == 0 || words[i - 1] != "kms"),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_its_ids() {
        for (place, entry) in TABLE.iter().enumerate() {
            assert_eq!(entry.id as usize, place, "{}", entry.key);
            assert_eq!(setting(entry.id).key, entry.key);
        }
    }

    #[test]
    fn a_variable_is_the_flags_name_in_capitals() {
        for entry in &TABLE {
            let name = entry.flag.map_or_else(|| entry.key.to_owned(), |flag| flag[2..].to_owned());
            let expected = format!("HIGHWATER_{}", name.to_uppercase().replace(['-', '.'], "_"));
            assert_eq!(entry.variable, expected);
        }
    }

    #[test]
    fn options_that_hold_secrets_are_known_by_name() {
        for name in [
            "secret_access_key",
            "session_token",
            "azure_key",
            "azure_sas",
            "sas_token",
            "account_key",
            "client_secret",
            "PASSWORD",
        ] {
            assert!(is_secret_option(name), "{name}");
        }
        for name in ["access_key_id", "endpoint", "sse_kms_key", "region", "monkey", "profile"] {
            assert!(!is_secret_option(name), "{name}");
        }
    }
}
