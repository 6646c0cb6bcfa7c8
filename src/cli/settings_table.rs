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

pub use super::accepts::Accepts;
use super::second_settings::SECOND;
pub use super::setting_id::Id;
use super::upkeep_settings::UPKEEP;

/// The declaration of one setting.
#[derive(Debug, Clone, Copy)]
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

pub(super) const MIB: u64 = 1 << 20;
pub(super) const HOUR: u64 = 3_600;

/// How many settings there are.
const COUNT: usize = FIRST.len() + UPKEEP.len() + SECOND.len();

/// All settings, in the order in which they are shown.
pub static TABLE: [Setting; COUNT] = joined();

const fn joined() -> [Setting; COUNT] {
    let parts: [&[Setting]; 3] = [&FIRST, &UPKEEP, &SECOND];
    let mut all = [FIRST[0]; COUNT];
    let (mut place, mut part) = (0, 0);
    while part < parts.len() {
        let mut row = 0;
        while row < parts[part].len() {
            all[place] = parts[part][row];
            place += 1;
            row += 1;
        }
        part += 1;
    }
    all
}

/// Those that hold with one repository too.
const FIRST: [Setting; 30] = [
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
        meaning: "ceiling of memory for backup and restore; archiving takes less than 64 MiB",
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

/// [`OPTIONS_KEY`] of the second repository.
pub const SECOND_OPTIONS_KEY: &str = "second_repo.options";

/// [`OPTION_VARIABLE_PREFIX`] of the second repository.
pub const SECOND_OPTION_VARIABLE_PREFIX: &str = "HIGHWATER_SECOND_REPO_";

/// The variable that names the settings file; it is not a setting itself.
pub const CONFIG_VARIABLE: &str = "HIGHWATER_CONFIG";

/// The variable that holds the key itself. Neither a flag nor the settings file can.
pub const KEY_VARIABLE: &str = "HIGHWATER_KEY";

/// [`KEY_VARIABLE`] of the second repository.
pub const SECOND_KEY_VARIABLE: &str = "HIGHWATER_SECOND_KEY";

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
            let key = entry.key.strip_suffix(".url").unwrap_or(entry.key);
            let name = entry.flag.map_or_else(|| key.to_owned(), |flag| flag[2..].to_owned());
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
