//! Settings: flags over environment over file, checked once, with their origin.
//!
//! Two stages. [`RawSettings`] is text with an origin, merged by precedence;
//! [`Settings`] is checked and typed. Never here: the names and ranges (that is
//! `settings_table`), the file's syntax, the meaning of store options.
//!
//! ```text
//! --jobs 8        ┐
//! HIGHWATER_JOBS=4├─> RawSettings { Jobs: "8", from --jobs } ──> Settings { jobs: 8, from --jobs }
//! jobs = 2        ┘
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::drill_settings::DrillSettings;
use super::environment::Environment;
use super::key_settings::{KeyNames, KeySettings};
use super::redact;
use super::retention_settings::{RetentionNames, RetentionSettings};
use super::schedule_settings::ScheduleSettings;
use super::second_repo::SecondRepo;
use super::setting_check::{Check, required};
pub use super::setting_values::{SlotChoice, SpoolChoice};
use super::setting_values::{
    absolute, is_cluster_name, parse_slot, parse_spool, parse_switch, within_count, within_size,
};
use super::settings_file::SettingsFile;
use super::settings_table::{
    CONFIG_VARIABLE, Id, KEY_VARIABLE, OPTION_VARIABLE_PREFIX, SECOND_KEY_VARIABLE,
    SECOND_OPTION_VARIABLE_PREFIX, TABLE, is_secret_option, setting,
};
use super::stall_settings::StallSettings;
use super::units::{setting_duration, setting_size};
use crate::failure::Failure;
use crate::format::Codec;
use crate::ops::Which;
use crate::spelling::nearest;

/// What is true of every failure before a command begins.
pub const NOTHING_DONE: &str = "nothing was read from or written to the repository or PostgreSQL";

/// Without a setting, no more workers than this even on a large machine.
const DEFAULT_JOBS_MAX: usize = 4;

/// Archiving keeps to this much memory, whatever `memory_max` allows.
const ARCHIVING_MEMORY_BYTES: u64 = 64 << 20;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// This flag.
    Flag(&'static str),
    /// This environment variable.
    Environment(String),
    /// This line (from 1) of the settings file.
    File {
        /// The file.
        path: PathBuf,
        /// The line.
        line: usize,
    },
    /// Nobody said anything.
    Default,
}

impl Origin {
    /// Returns the word that `--json` prints.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Flag(_) => "flag",
            Self::Environment(_) => "environment",
            Self::File { .. } => "file",
            Self::Default => "default",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => f.write_str(flag),
            Self::Environment(name) => f.write_str(name),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sourced<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub origin: Origin,
}

impl<T> Sourced<T> {
    /// Makes another value of it, from the same place.
    pub fn map<U>(self, make: impl FnOnce(T) -> U) -> Sourced<U> {
        Sourced { value: make(self.value), origin: self.origin }
    }
}

/// A value as it was given. May be a secret: deliberately without `Debug`.
#[derive(Clone)]
pub struct Raw {
    /// Its text.
    pub text: String,
    /// Its type in the settings file; `None` where everything is text.
    pub toml_type: Option<&'static str>,
    /// Where it came from.
    pub origin: Origin,
}

/// What flags say about settings.
#[derive(Default)]
pub struct FlagValues {
    /// `--config`.
    pub config: Option<PathBuf>,
    /// Settings given by flag.
    pub values: Vec<(Id, String)>,
}

impl FlagValues {
    /// Adds a flag's value, if the flag was given.
    pub fn set(&mut self, id: Id, value: Option<impl Into<String>>) {
        self.values.extend(value.map(|value| (id, value.into())));
    }
}

/// Everything that was said, merged by precedence, not yet checked.
#[derive(Default)]
pub struct RawSettings {
    /// The settings file that was read.
    pub file: Option<PathBuf>,
    /// Settings by identity.
    pub values: BTreeMap<Id, Raw>,
    /// Store options by name, in lower case.
    pub repo_options: BTreeMap<String, Raw>,
    /// The key itself.
    pub key: Option<Raw>,
    /// Store options of the second repository by name, in lower case.
    pub second_options: BTreeMap<String, Raw>,
    /// The key of the second repository itself.
    pub second_key: Option<Raw>,
    /// Sentences for stderr: unknown variables, a file that others can read.
    pub warnings: Vec<String>,
}

impl RawSettings {
    /// Gathers from file, environment and flags; the later wins.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::failure::Kind::Usage) for a settings file that cannot be read or understood.
    pub fn gather(flags: &FlagValues, environment: &Environment) -> Result<Self, Failure> {
        let named = environment.own.get(CONFIG_VARIABLE).map(Path::new);
        let file = SettingsFile::read(flags.config.as_deref().or(named))?;
        let mut raw = Self {
            file: file.path,
            values: file.values,
            repo_options: file.repo_options,
            key: None,
            second_options: file.second_options,
            second_key: None,
            warnings: Vec::new(),
        };
        if file.readable_by_others && raw.holds_secret() {
            raw.warnings.push(format!(
                "{} holds secrets and can be read by other users; chmod 600 (or 640 if root owns it)",
                raw.file.as_deref().unwrap_or(Path::new("")).display()
            ));
        }
        raw.add_environment(environment);
        for (id, value) in &flags.values {
            let origin = Origin::Flag(setting(*id).flag.unwrap_or_default());
            raw.values.insert(*id, Raw { text: value.clone(), toml_type: None, origin });
        }
        Ok(raw)
    }

    fn add_environment(&mut self, environment: &Environment) {
        for (name, value) in &environment.own {
            let origin = Origin::Environment(name.clone());
            let raw = Raw { text: value.clone(), toml_type: None, origin };
            if let Some(setting) = TABLE.iter().find(|setting| setting.variable == name) {
                self.values.insert(setting.id, raw);
            } else if name == KEY_VARIABLE {
                self.key = Some(raw);
            } else if name == SECOND_KEY_VARIABLE {
                self.second_key = Some(raw);
            } else if let Some(option) = name.strip_prefix(SECOND_OPTION_VARIABLE_PREFIX) {
                self.second_options.insert(option.to_ascii_lowercase(), raw);
            } else if let Some(option) = name.strip_prefix(OPTION_VARIABLE_PREFIX) {
                self.repo_options.insert(option.to_ascii_lowercase(), raw);
            } else if name != CONFIG_VARIABLE {
                let others = [CONFIG_VARIABLE, KEY_VARIABLE, SECOND_KEY_VARIABLE];
                let known = TABLE.iter().map(|setting| setting.variable).chain(others);
                let near = nearest(name, known).map(|near| format!("; did you mean {near}?"));
                self.warnings.push(format!(
                    "the variable {name} is not a setting and was ignored{}",
                    near.unwrap_or_default()
                ));
            }
        }
        for name in &environment.not_text {
            self.warnings.push(format!("the variable {name} is not UTF-8 and was ignored"));
        }
    }

    /// Whether any value seen so far is a secret.
    fn holds_secret(&self) -> bool {
        let secret = |id: Id, hide: fn(&str) -> (String, bool)| {
            self.values.get(&id).is_some_and(|raw| hide(&raw.text).1)
        };
        secret(Id::Dsn, redact::conninfo)
            || secret(Id::Repo, redact::url)
            || secret(Id::SecondRepo, redact::url)
            || self.repo_options.keys().any(|name| is_secret_option(name))
            || self.second_options.keys().any(|name| is_secret_option(name))
    }
}

/// One store option as text; `store` checks its name and value.
#[derive(Clone, PartialEq, Eq)]
pub struct OptionValue {
    /// The text that was given.
    pub text: String,
    /// Whether it must never be shown.
    pub secret: bool,
    /// Where it came from.
    pub origin: Origin,
}

/// Checked settings. May hold secrets (`repo`, `dsn`, options): deliberately without `Debug`.
#[derive(Clone)]
pub struct Settings {
    /// The settings file that was read.
    pub file: Option<PathBuf>,
    /// The repository's URL, not yet parsed; see [`Self::require_repo`].
    pub repo: Option<Sourced<String>>,
    /// The cluster's name; see [`Self::require_cluster`].
    pub cluster: Option<Sourced<String>>,
    /// The connection string, not yet parsed; `PG*` variables fill what it leaves out.
    pub dsn: Option<Sourced<String>>,
    /// The data directory.
    pub pgdata: Option<Sourced<PathBuf>>,
    /// How stored objects are compressed.
    pub compression: Sourced<Codec>,
    /// Workers of a backup or restore; at least 1.
    pub jobs: Sourced<usize>,
    /// Ceiling of memory for backup and restore, in bytes.
    pub memory_max_bytes: Sourced<u64>,
    /// How long one `archive-push` may take.
    pub archive_push_deadline: Sourced<Duration>,
    /// How long one `archive-get` may take.
    pub archive_get_deadline: Sourced<Duration>,
    /// Whether `archive-get` on a standby ends with 1 when its retries are used up.
    pub standby_fallback: Sourced<bool>,
    /// How long a backup waits for its WAL.
    pub wal_timeout: Sourced<Duration>,
    /// How long `receive` may hold WAL before it goes to the store.
    pub rpo: Sourced<Duration>,
    /// Whether `receive` stores each commit at once.
    pub synchronous: Sourced<bool>,
    /// The replication slot of `receive`; the default where nothing was said.
    pub slot: Option<Sourced<SlotChoice>>,
    /// Pieces that `receive` has on their way at a time; at least 1.
    pub uploads: Sourced<usize>,
    /// Whether the agent receives.
    pub receive: Sourced<bool>,
    /// Where work ahead of PostgreSQL is noted.
    pub spool: Sourced<SpoolChoice>,
    /// The most WAL that is kept fetched ahead, in bytes.
    pub spool_max_bytes: Sourced<u64>,
    /// What is done while the store is away.
    pub stall: StallSettings,
    /// What is kept.
    pub retention: RetentionSettings,
    /// Where the key is that everything is encrypted with.
    pub key: KeySettings,
    /// What a drill may use.
    pub drill: DrillSettings,
    /// What the agent runs by itself.
    pub schedule: ScheduleSettings,
    /// Store options by name.
    pub repo_options: BTreeMap<String, OptionValue>,
    /// What was said about a second repository.
    pub second: SecondRepo,
    /// Which of two repositories stands in `repo`.
    pub which: Which,
}

/// Takes store options as they were given.
pub(super) fn option_values(options: BTreeMap<String, Raw>) -> BTreeMap<String, OptionValue> {
    let value = |(name, raw): (String, Raw)| {
        let secret = is_secret_option(&name);
        (name, OptionValue { text: raw.text, secret, origin: raw.origin })
    };
    options.into_iter().map(value).collect()
}

impl Settings {
    /// Checks everything that was said; the only place where values are checked.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::failure::Kind::Usage), naming the setting, where it was said, what was given and what is accepted.
    pub fn validate(raw: RawSettings) -> Result<Self, Failure> {
        let check = Check { values: &raw.values };
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let jobs = check.one(Id::Jobs, |text| within_count(Id::Jobs, text))?;
        Ok(Self {
            repo: check.one(Id::Repo, |text| text.contains("://").then(|| text.to_owned()))?,
            cluster: check
                .one(Id::Cluster, |text| is_cluster_name(text).then(|| text.to_owned()))?,
            dsn: check.one(Id::Dsn, |text| {
                (text.contains('=') || text.contains("://")).then(|| text.to_owned())
            })?,
            pgdata: check.one(Id::Pgdata, absolute)?,
            compression: check.or_default(Id::Compression, |text| text.parse::<Codec>().ok())?,
            jobs: jobs.unwrap_or(Sourced {
                value: processors.min(DEFAULT_JOBS_MAX),
                origin: Origin::Default,
            }),
            memory_max_bytes: check
                .or_default(Id::MemoryMax, |text| within_size(Id::MemoryMax, text))?,
            archive_push_deadline: check.duration(Id::ArchivePushDeadline)?,
            archive_get_deadline: check.duration(Id::ArchiveGetDeadline)?,
            standby_fallback: check.or_default(Id::StandbyFallback, parse_switch)?,
            wal_timeout: check.duration(Id::WalTimeout)?,
            rpo: check.duration(Id::Rpo)?,
            synchronous: check.or_default(Id::Synchronous, parse_switch)?,
            slot: check.one(Id::Slot, parse_slot)?,
            uploads: check.or_default(Id::Uploads, |text| within_count(Id::Uploads, text))?,
            receive: check.or_default(Id::Receive, parse_switch)?,
            spool: check.or_default(Id::Spool, parse_spool)?,
            spool_max_bytes: check
                .or_default(Id::SpoolMax, |text| within_size(Id::SpoolMax, text))?,
            stall: StallSettings::validate(&check)?,
            retention: RetentionSettings::validate(&check, RetentionNames::FIRST)?,
            key: KeySettings::validate(&check, KeyNames::FIRST, raw.key.as_ref())?,
            drill: DrillSettings::validate(&check)?,
            schedule: ScheduleSettings::validate(&check)?,
            second: SecondRepo::validate(&check, raw.second_key.as_ref(), raw.second_options)?,
            repo_options: option_values(raw.repo_options),
            which: Which::First,
            file: raw.file,
        })
    }

    /// Returns the repository's URL.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::failure::Kind::Usage) when nobody named one.
    pub fn require_repo(&self) -> Result<&str, Failure> {
        required(self.repo.as_ref(), Id::Repo, "no repository is named", self.file.as_deref())
    }

    /// Returns the cluster's name.
    ///
    /// # Errors
    /// [`Kind::Usage`](crate::failure::Kind::Usage) when nobody named one.
    pub fn require_cluster(&self) -> Result<&str, Failure> {
        required(self.cluster.as_ref(), Id::Cluster, "no cluster is named", self.file.as_deref())
    }

    /// Returns the ceiling of memory for archiving, in bytes.
    pub fn archiving_memory_bytes(&self) -> u64 {
        self.memory_max_bytes.value.min(ARCHIVING_MEMORY_BYTES)
    }

    /// Returns a setting as it may be shown: its text without secrets (`None` when
    /// it is not set), whether something is hidden, and its origin.
    pub fn shown(&self, id: Id) -> (Option<String>, bool, Origin) {
        fn text<T>(
            value: &Sourced<T>,
            show: impl Fn(&T) -> String,
        ) -> (Option<String>, bool, Origin) {
            (Some(show(&value.value)), false, value.origin.clone())
        }
        let redacted = |value: Option<&Sourced<String>>, hide: fn(&str) -> (String, bool)| {
            value.map(|value| {
                let (text, hidden) = hide(&value.value);
                (Some(text), hidden, value.origin.clone())
            })
        };
        let seconds = |value: &Sourced<Duration>| text(value, |time| setting_duration(*time));
        let switch =
            |value: &Sourced<bool>| text(value, |on| if *on { "on" } else { "off" }.to_owned());
        let shown = match id {
            Id::Repo => redacted(self.repo.as_ref(), redact::url),
            Id::Cluster => self.cluster.as_ref().map(|value| text(value, String::clone)),
            Id::Dsn => redacted(self.dsn.as_ref(), redact::conninfo),
            Id::Pgdata => {
                self.pgdata.as_ref().map(|value| text(value, |path| path.display().to_string()))
            }
            Id::Compression => Some(text(&self.compression, ToString::to_string)),
            Id::Jobs => Some(text(&self.jobs, ToString::to_string)),
            Id::MemoryMax => Some(text(&self.memory_max_bytes, |bytes| setting_size(*bytes))),
            Id::ArchivePushDeadline => Some(seconds(&self.archive_push_deadline)),
            Id::ArchiveGetDeadline => Some(seconds(&self.archive_get_deadline)),
            Id::StandbyFallback => Some(switch(&self.standby_fallback)),
            Id::WalTimeout => Some(seconds(&self.wal_timeout)),
            Id::Rpo => Some(seconds(&self.rpo)),
            Id::Synchronous => Some(switch(&self.synchronous)),
            Id::Slot => self.slot.as_ref().map(|value| {
                text(value, |slot| slot.0.as_ref().map_or("none".to_owned(), ToString::to_string))
            }),
            Id::Uploads => Some(text(&self.uploads, ToString::to_string)),
            Id::Receive => Some(switch(&self.receive)),
            Id::Spool => Some(text(&self.spool, |choice| match choice {
                SpoolChoice::BesideWal => "pg_wal".to_owned(),
                SpoolChoice::Directory(path) => path.display().to_string(),
                SpoolChoice::None => "none".to_owned(),
            })),
            Id::SpoolMax => Some(text(&self.spool_max_bytes, |bytes| setting_size(*bytes))),
            Id::StallSpool | Id::StallSpoolMax | Id::WalBacklogMax => self.stall.shown(id),
            Id::RetainWindow
            | Id::RetainBackups
            | Id::RetainDaily
            | Id::RetainWeekly
            | Id::RetainMonthly
            | Id::MinBackups
            | Id::RetainUnfinished => self.retention.shown(id),
            Id::KeyFile | Id::KeyCommand => self.key.shown(id),
            Id::DrillScratch
            | Id::PostgresBin
            | Id::DrillChecks
            | Id::DrillUser
            | Id::DrillPreload
            | Id::DrillDiskFreeMin => self.drill.shown(id),
            Id::BackupEvery
            | Id::BackupAt
            | Id::BackupOnStandby
            | Id::ExpireEvery
            | Id::VerifyEvery
            | Id::DrillEvery => self.schedule.shown(id),
            // All others are the second repository's.
            _ => self.second.shown(id),
        };
        shown.unwrap_or((None, false, Origin::Default))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::failure::Kind;
    use std::os::unix::fs::PermissionsExt;

    fn gather(flags: &[(Id, &str)], variables: &[(&str, &str)], file: &str) -> RawSettings {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("h.toml");
        std::fs::write(&path, file).unwrap();
        // Whatever the umask of whoever runs the tests: readable by others.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let values = flags.iter().map(|(id, text)| (*id, (*text).to_owned())).collect();
        let environment =
            Environment::of_variables(variables.iter().map(|(k, v)| (k.into(), v.into())));
        RawSettings::gather(&FlagValues { config: Some(path), values }, &environment).unwrap()
    }

    fn settings(
        flags: &[(Id, &str)],
        variables: &[(&str, &str)],
        file: &str,
    ) -> Result<Settings, Failure> {
        Settings::validate(gather(flags, variables, file))
    }

    #[test]
    fn wal_is_not_to_be_let_go_and_kept_until_both_repositories_have_it() {
        let (any, all) = ("wal_copies = \"any\"", "wal_copies = \"all\"");
        let (max, spool) = ("wal_backlog_max = \"1GiB\"", "stall_spool = \"/s\"");
        let one = "[repo]\nurl = \"file:///a\"\n";
        let both = format!("{one}[second_repo]\nurl = \"file:///b\"\n");
        let read = |lines: [&str; 2], repos: &str| {
            settings(&[], &[], &format!("{}\n{}\n{repos}", lines[0], lines[1])).err()
        };
        for accepted in [
            read([max, any], &both),
            read([max, all], one),
            read([spool, all], &both),
            read([spool, max], &both),
        ] {
            assert!(accepted.is_none());
        }
        let refused = read([max, all], &both).unwrap();
        assert_eq!(refused.kind, Kind::Usage);
        for told in ["wal_backlog_max", "h.toml:1", "wal_copies", "h.toml:2"] {
            assert!(refused.what.contains(told), "{}", refused.what);
        }
    }

    #[test]
    fn flags_win_over_environment_and_environment_over_the_file() {
        let file =
            "cluster = \"file\"\ncompression = \"lz4\"\njobs = 2\n[repo.options]\nregion = \"a\"";
        let variables = [
            ("HIGHWATER_CLUSTER", "variable"),
            ("HIGHWATER_JOBS", "3"),
            ("HIGHWATER_REPO_REGION", "b"),
        ];
        let settings = settings(&[(Id::Jobs, "4")], &variables, file).ok().unwrap();
        assert_eq!(settings.jobs, Sourced { value: 4, origin: Origin::Flag("--jobs") });
        assert_eq!(settings.require_cluster().ok(), Some("variable"));
        assert_eq!(settings.compression.value, Codec::Lz4);
        assert_eq!(settings.memory_max_bytes.origin, Origin::Default);
        assert_eq!(settings.repo_options["region"].text, "b");
    }

    #[test]
    fn every_default_is_accepted_by_its_own_check() {
        let settings = settings(&[], &[], "").ok().unwrap();
        assert_eq!(settings.compression.value, Codec::Zstd(1));
        assert_eq!(settings.memory_max_bytes.value, 256 << 20);
        assert_eq!(settings.archiving_memory_bytes(), 64 << 20);
        assert_eq!(settings.archive_push_deadline.value, Duration::from_mins(5));
        assert_eq!(settings.archive_get_deadline.value, Duration::from_mins(2));
        assert_eq!(settings.wal_timeout.value, Duration::from_mins(10));
        assert!(settings.standby_fallback.value);
        assert!((1..=DEFAULT_JOBS_MAX).contains(&settings.jobs.value));
        assert_eq!(settings.require_repo().err().unwrap().kind, Kind::Usage);
    }

    #[test]
    fn every_example_in_the_table_is_accepted() {
        for entry in &TABLE {
            let variables = [(entry.variable, entry.example)];
            let settings = settings(&[], &variables, "");
            let settings = settings.unwrap_or_else(|failure| panic!("{}: {failure}", entry.key));
            let (text, hidden, origin) = settings.shown(entry.id);
            assert_eq!(text.as_deref(), Some(entry.example), "{}", entry.key);
            assert_eq!(origin, Origin::Environment(entry.variable.to_owned()));
            assert!(!hidden);
        }
    }

    #[test]
    fn a_wrong_value_is_refused_with_place_and_remedy() {
        for (variable, value) in [
            ("HIGHWATER_JOBS", "0"),
            ("HIGHWATER_JOBS", "65"),
            ("HIGHWATER_JOBS", "two"),
            ("HIGHWATER_COMPRESSION", "zstd:20"),
            ("HIGHWATER_COMPRESSION", "zstd:0"),
            ("HIGHWATER_COMPRESSION", "zstd:+3"),
            ("HIGHWATER_COMPRESSION", "gzip"),
            ("HIGHWATER_MEMORY_MAX", "63MiB"),
            ("HIGHWATER_WAL_TIMEOUT", "0"),
            ("HIGHWATER_STANDBY_FALLBACK", "maybe"),
            ("HIGHWATER_CLUSTER", "-a"),
            ("HIGHWATER_CLUSTER", "a/b"),
            ("HIGHWATER_CLUSTER", ".."),
            ("HIGHWATER_CLUSTER", "é"),
            ("HIGHWATER_PGDATA", "data"),
            ("HIGHWATER_REPO", "/var/backups"),
            ("HIGHWATER_DSN", "localhost"),
        ] {
            let failure = settings(&[], &[(variable, value)], "").err();
            let failure = failure.unwrap_or_else(|| panic!("{variable}={value} was accepted"));
            assert_eq!(failure.kind, Kind::Usage);
            assert!(failure.what.starts_with(&format!("`{variable}` is")), "{}", failure.what);
            assert!(failure.next.contains(&format!("{variable}=")), "{}", failure.next);
        }
        for (text, what) in [
            ("jobs = \"4\"", "`jobs` in "),
            ("jobs = 0x4", "`jobs` in "),
            ("standby_fallback = \"on\"", "is the string \"on\""),
            ("cluster = 3", "is `3`"),
            ("cluster = [1]", "is `[1]`"),
        ] {
            let failure = settings(&[], &[], text).err().unwrap();
            assert!(failure.what.contains(what), "{}", failure.what);
        }
    }

    #[test]
    fn the_longest_cluster_name_is_63_bytes() {
        assert!(is_cluster_name(&"a".repeat(63)));
        assert!(!is_cluster_name(&"a".repeat(64)));
        assert!(!is_cluster_name(""));
    }

    #[test]
    fn an_unknown_variable_is_a_warning_that_names_the_nearest() {
        let raw = gather(&[], &[("HIGHWATER_CLUSTR", "x"), ("HIGHWATER_REPO_ANY", "y")], "");
        assert_eq!(raw.warnings.len(), 1);
        assert!(raw.warnings[0].ends_with("did you mean HIGHWATER_CLUSTER?"), "{:?}", raw.warnings);
    }

    #[test]
    fn a_file_with_a_secret_that_others_can_read_draws_a_warning() {
        let raw = gather(&[], &[], "[repo.options]\nsecret_access_key = \"s\"");
        assert!(raw.warnings[0].contains("chmod"), "{:?}", raw.warnings);
        assert!(gather(&[], &[], "cluster = \"a\"").warnings.is_empty());
    }

    #[test]
    fn the_key_comes_from_one_place_and_the_nearest_wins() {
        use crate::cli::key_settings::KeyChoice;
        let key = "0123456789abcdef".repeat(4);
        let file = "key_command = \"from-file\"";
        let chosen = |flags: &[(Id, &str)], variables: &[(&str, &str)]| {
            settings(flags, variables, file).ok().unwrap().key.choice().cloned().unwrap()
        };
        assert_eq!(chosen(&[], &[]).value, KeyChoice::Command("from-file".to_owned()));
        let variable = [("HIGHWATER_KEY", &*key)];
        assert!(matches!(chosen(&[], &variable).value, KeyChoice::Variable(_)));
        let flag = chosen(&[(Id::KeyFile, "/k")], &variable);
        assert_eq!(flag.value, KeyChoice::File("/k".into()));
        assert_eq!(flag.origin, Origin::Flag("--key-file"));
        let two = [("HIGHWATER_KEY", &*key), ("HIGHWATER_KEY_FILE", "/k")];
        let failure = settings(&[], &two, file).err().unwrap();
        assert!(failure.what.contains("HIGHWATER_KEY_FILE"), "{}", failure.what);
        let failure = settings(&[], &[("HIGHWATER_KEY", &key[1..])], "").err().unwrap();
        assert!(!format!("{failure}").contains(&key[1..9]), "{failure}");
        assert!(
            SettingsFile::parse(Path::new("h.toml"), "key = \"x\"").is_err(),
            "never from the file"
        );
    }

    #[test]
    fn a_broken_connection_string_is_never_shown() {
        let failure = settings(&[], &[("HIGHWATER_DSN", "geheim")], "").err().unwrap();
        assert!(!failure.what.contains("geheim"), "{}", failure.what);
    }
}
