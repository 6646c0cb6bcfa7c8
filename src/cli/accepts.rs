//! What settings take, in types and in words.
//!
//! Never here: which setting takes what (`settings_table`), or reading a value (`setting_values`).

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
    /// A user of this system.
    User,
    /// Names of libraries.
    Libraries,
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
    /// `any` or `all`.
    Copies,
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
            Self::User => "a user of this system, or uid:gid".into(),
            Self::Libraries => "names of libraries, with commas between them".into(),
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
            Self::Copies => "any or all".into(),
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
