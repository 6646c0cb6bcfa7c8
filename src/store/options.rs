//! What can be set about a store: one table, one bag of checked values.
//!
//! Owns: the name, meaning, default, secrecy and kind of every store option,
//! each declared once, so that `[repo.options]`, `HIGHWATER_REPO_<NAME>`, the
//! output of `config`, the reference page and spelling hints all come from
//! here. Never here: reading files or the environment (`cli` hands values in),
//! what a driver does with a value.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::url::Driver;
use crate::spelling::nearest;

/// What kind of value an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// Any text.
    Text,
    /// `true`, `false`, `on`, `off`, `yes` or `no`.
    Flag,
    /// A whole number, both bounds included.
    Count {
        /// The smallest accepted.
        min: u64,
        /// The largest accepted.
        max: u64,
    },
    /// A time such as `500ms`, `30s`, `3min` (a bare number is seconds), in
    /// milliseconds, both bounds included.
    Duration {
        /// The shortest accepted, in milliseconds.
        min_ms: u64,
        /// The longest accepted, in milliseconds.
        max_ms: u64,
    },
    /// One of a few words.
    Choice(&'static [&'static str]),
}

/// One option, as declared in [`OPTIONS`].
#[derive(Debug)]
pub struct OptionSpec {
    /// Its name in `[repo.options]`; in capitals behind `HIGHWATER_REPO_` in the environment.
    pub name: &'static str,
    /// What it does, one sentence for the reference page.
    pub meaning: &'static str,
    /// The value that holds when nothing is set, as a user would write it.
    pub default: Option<&'static str>,
    /// Whether the value must never be shown.
    pub secret: bool,
    /// The drivers that know it.
    pub drivers: &'static [Driver],
    /// What a value must look like.
    pub kind: OptionKind,
}

const ALL: &[Driver] = &[Driver::File, Driver::S3, Driver::Gcs, Driver::Azure];
const CLOUD: &[Driver] = &[Driver::S3, Driver::Gcs, Driver::Azure];
const S3: &[Driver] = &[Driver::S3];
const GCS: &[Driver] = &[Driver::Gcs];
const AZURE: &[Driver] = &[Driver::Azure];

const fn text(
    name: &'static str,
    drivers: &'static [Driver],
    default: Option<&'static str>,
    meaning: &'static str,
) -> OptionSpec {
    OptionSpec { name, meaning, default, secret: false, drivers, kind: OptionKind::Text }
}

const fn secret(
    name: &'static str,
    drivers: &'static [Driver],
    meaning: &'static str,
) -> OptionSpec {
    OptionSpec { name, meaning, default: None, secret: true, drivers, kind: OptionKind::Text }
}

const fn of_kind(
    name: &'static str,
    drivers: &'static [Driver],
    kind: OptionKind,
    default: Option<&'static str>,
    meaning: &'static str,
) -> OptionSpec {
    OptionSpec { name, meaning, default, secret: false, drivers, kind }
}

const fn time(
    name: &'static str,
    drivers: &'static [Driver],
    default: &'static str,
    meaning: &'static str,
) -> OptionSpec {
    let kind = OptionKind::Duration { min_ms: 10, max_ms: 24 * 3600 * 1000 };
    of_kind(name, drivers, kind, Some(default), meaning)
}

/// The declarations; the drivers name them, so that a slip is a compile error.
/// Each one's documentation is its `meaning`.
#[allow(missing_docs)]
pub mod spec {
    use super::{ALL, AZURE, CLOUD, GCS, OptionKind, OptionSpec, S3, of_kind, secret, text, time};

    pub static ENDPOINT: OptionSpec = text(
        "endpoint",
        CLOUD,
        None,
        "Base URL of the server, where it is not the provider's own, such as `https://minio.example:9000` (Azure: with the account as path if the server wants it so).",
    );
    pub static REGION: OptionSpec = text(
        "region",
        S3,
        None,
        "Region of the bucket. Unset: AWS_REGION, AWS_DEFAULT_REGION, the profile, the instance (if its role is used), then `us-east-1`.",
    );
    pub static PATH_STYLE: OptionSpec = of_kind(
        "path_style",
        S3,
        OptionKind::Flag,
        Some("true"),
        "Puts the bucket into the path of requests; `false` puts it into the host name (then `endpoint` names the bucket's own host).",
    );
    pub static CA_FILE: OptionSpec = text(
        "ca_file",
        CLOUD,
        None,
        "PEM file of certificate authorities to trust: instead of the system's where the settings hold both `endpoint` and keys, in addition to them where an identity is fetched from another server.",
    );
    pub static ALLOW_HTTP: OptionSpec = of_kind(
        "allow_http",
        CLOUD,
        OptionKind::Flag,
        Some("false"),
        "Permits `http://` endpoints, where anybody on the way can read everything.",
    );
    pub static STORAGE_CLASS: OptionSpec = text(
        "storage_class",
        CLOUD,
        None,
        "Storage class of new objects (Azure: access tier). Never an archive class that needs a thaw: restore could not read it.",
    );
    pub static SSE: OptionSpec = of_kind(
        "sse",
        S3,
        OptionKind::Choice(&["none", "aes256", "aws:kms", "aws:kms:dsse"]),
        Some("none"),
        "Encryption that the server is asked for; `none` leaves it to the bucket's default.",
    );
    pub static SSE_KMS_KEY: OptionSpec =
        text("sse_kms_key", S3, None, "KMS key identity for `sse = aws:kms` and `aws:kms:dsse`.");
    pub static ACCESS_KEY_ID: OptionSpec = text(
        "access_key_id",
        S3,
        None,
        "Access key; unset: AWS_ACCESS_KEY_ID and the rest of the chain.",
    );
    pub static SECRET_ACCESS_KEY: OptionSpec =
        secret("secret_access_key", S3, "The secret that goes with `access_key_id`.");
    pub static SESSION_TOKEN: OptionSpec =
        secret("session_token", S3, "Session token of temporary credentials.");
    pub static PROFILE: OptionSpec = text(
        "profile",
        S3,
        None,
        "Profile of the AWS configuration files (keys, SSO, credential_process, assumed roles); goes before keys of the environment.",
    );
    pub static ANONYMOUS: OptionSpec = of_kind(
        "anonymous",
        CLOUD,
        OptionKind::Flag,
        Some("false"),
        "Sends requests without any identity, for stores behind a gateway.",
    );
    pub static AZURE_ACCOUNT: OptionSpec =
        text("azure_account", AZURE, None, "Storage account; unset: AZURE_STORAGE_ACCOUNT_NAME.");
    pub static AZURE_KEY: OptionSpec = secret("azure_key", AZURE, "Access key of the account.");
    pub static AZURE_SAS: OptionSpec =
        secret("azure_sas", AZURE, "Shared access signature, with or without the leading `?`.");
    pub static AZURE_EMULATOR: OptionSpec = of_kind(
        "azure_emulator",
        AZURE,
        OptionKind::Flag,
        Some("false"),
        "Talks to Azurite on `http://127.0.0.1:10000` (or AZURITE_BLOB_STORAGE_URL) with its well-known account.",
    );
    pub static GCS_SERVICE_ACCOUNT: OptionSpec = text(
        "gcs_service_account",
        GCS,
        None,
        "Path of a service account's JSON key; unset: GOOGLE_APPLICATION_CREDENTIALS, then the metadata server (workload identity).",
    );
    pub static CONDITIONAL_PUT: OptionSpec = of_kind(
        "conditional_put",
        S3,
        OptionKind::Choice(&["on", "off"]),
        Some("on"),
        "`off`, for stores without `If-None-Match`: looks before it writes, which is safe only while there is a single writer.",
    );
    pub static STALL_TIMEOUT: OptionSpec = time(
        "stall_timeout",
        ALL,
        "30s",
        "How long a request may make no progress. Uploads have it plus the time of their size at 128 KiB/s.",
    );
    pub static CONNECT_TIMEOUT: OptionSpec =
        time("connect_timeout", CLOUD, "5s", "How long a connection may take to be established.");
    pub static RETRIES: OptionSpec = of_kind(
        "retries",
        ALL,
        OptionKind::Count { min: 0, max: 100 },
        Some("8"),
        "How often a request is repeated after a failure that may pass.",
    );
    pub static RETRY_DEADLINE: OptionSpec = time(
        "retry_deadline",
        ALL,
        "180s",
        "No attempt begins later than this after the first one (or after the last progress of a read).",
    );
    pub static UNSIGNED_PAYLOAD: OptionSpec = of_kind(
        "unsigned_payload",
        S3,
        OptionKind::Flag,
        Some("false"),
        "Leaves the SHA-256 of the body out of the signature: saves CPU, trusts TLS alone.",
    );
    pub static CHECKSUM: OptionSpec = of_kind(
        "checksum",
        S3,
        OptionKind::Choice(&["none", "sha256", "crc64nvme"]),
        Some("none"),
        "Checksum sent with each upload for the server to verify and keep.",
    );
    pub static USER_AGENT: OptionSpec = text(
        "user_agent",
        CLOUD,
        Some(concat!("highwater/", env!("CARGO_PKG_VERSION"))),
        "Name by which requests introduce themselves.",
    );
}

/// Every option, in the order of the reference page.
pub static OPTIONS: &[&OptionSpec] = &[
    &spec::ENDPOINT,
    &spec::REGION,
    &spec::PATH_STYLE,
    &spec::CA_FILE,
    &spec::ALLOW_HTTP,
    &spec::ACCESS_KEY_ID,
    &spec::SECRET_ACCESS_KEY,
    &spec::SESSION_TOKEN,
    &spec::PROFILE,
    &spec::ANONYMOUS,
    &spec::AZURE_ACCOUNT,
    &spec::AZURE_KEY,
    &spec::AZURE_SAS,
    &spec::AZURE_EMULATOR,
    &spec::GCS_SERVICE_ACCOUNT,
    &spec::STORAGE_CLASS,
    &spec::SSE,
    &spec::SSE_KMS_KEY,
    &spec::CONDITIONAL_PUT,
    &spec::CHECKSUM,
    &spec::UNSIGNED_PAYLOAD,
    &spec::STALL_TIMEOUT,
    &spec::CONNECT_TIMEOUT,
    &spec::RETRIES,
    &spec::RETRY_DEADLINE,
    &spec::USER_AGENT,
];

/// Why an option was not accepted. No retry cures one; none repeats a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// There is no option of this name.
    #[error("there is no store option `{name}`{hint}")]
    Unknown {
        /// The name written.
        name: String,
        /// A ready phrase that names the nearest option, or nothing.
        hint: String,
    },
    /// The value is not of the option's kind.
    #[error("store option `{name}`: {what}")]
    BadValue {
        /// The option.
        name: &'static str,
        /// What would have been accepted, and what was written unless it is a secret.
        what: String,
    },
    /// The option belongs to another kind of repository.
    #[error(
        "store option `{name}` means nothing to a `{scheme}://` repository; it belongs to {known}"
    )]
    NotForDriver {
        /// The option.
        name: &'static str,
        /// The scheme of the repository's URL.
        scheme: &'static str,
        /// The schemes that know it, ready to print.
        known: String,
    },
    /// Two options that need each other or exclude each other.
    #[error("{what}")]
    Combination {
        /// What is wrong, naming both options.
        what: String,
    },
}

/// Checked values of store options. `Debug` shows no secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoreOptions {
    values: BTreeMap<&'static str, String>,
}

impl StoreOptions {
    /// Sets one option from text, replacing an earlier value.
    ///
    /// # Errors
    /// [`OptionError::Unknown`] and [`OptionError::BadValue`]; the options are unchanged then.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), OptionError> {
        let Some(found) = OPTIONS.iter().find(|option| option.name == name) else {
            let hint = nearest(name, OPTIONS.iter().map(|option| option.name))
                .map_or_else(String::new, |near| format!(" (did you mean `{near}`?)"));
            return Err(OptionError::Unknown { name: name.to_owned(), hint });
        };
        check(found, value)?;
        self.values.insert(found.name, value.to_owned());
        Ok(())
    }

    /// Returns what was set as text, secrets included: show a value only if its
    /// [`OptionSpec::secret`] is false.
    pub fn values(&self) -> impl Iterator<Item = (&'static OptionSpec, &str)> {
        OPTIONS.iter().filter_map(|option| Some((*option, self.values.get(option.name)?.as_str())))
    }

    /// Checks that every option that is set belongs to `driver`, and that they go together.
    ///
    /// # Errors
    /// [`OptionError::NotForDriver`], [`OptionError::Combination`].
    pub fn check_for(&self, driver: Driver) -> Result<(), OptionError> {
        for (option, _) in self.values() {
            if !option.drivers.contains(&driver) {
                let known: Vec<String> =
                    option.drivers.iter().map(|d| format!("`{}://`", d.scheme())).collect();
                return Err(OptionError::NotForDriver {
                    name: option.name,
                    scheme: driver.scheme(),
                    known: known.join(", "),
                });
            }
        }
        let both = |one: &'static OptionSpec, other: &'static OptionSpec| {
            if self.text(one).is_some() == self.text(other).is_some() {
                return Ok(());
            }
            let what =
                format!("`{}` and `{}` are set together or not at all", one.name, other.name);
            Err(OptionError::Combination { what })
        };
        both(&spec::ACCESS_KEY_ID, &spec::SECRET_ACCESS_KEY)?;
        if self.text(&spec::SSE_KMS_KEY).is_some() && !self.word(&spec::SSE).starts_with("aws:kms")
        {
            let what = "`sse_kms_key` needs `sse = aws:kms` or `sse = aws:kms:dsse`".to_owned();
            return Err(OptionError::Combination { what });
        }
        if self.text(&spec::ENDPOINT).is_some_and(|url| url.starts_with("http://"))
            && !self.flag(&spec::ALLOW_HTTP)
        {
            let what = "`endpoint` is an `http://` URL: use `https://`, or set `allow_http = true` if the network can be trusted".to_owned();
            return Err(OptionError::Combination { what });
        }
        Ok(())
    }

    /// Returns the value of an option that was set to something.
    pub(super) fn text(&self, option: &'static OptionSpec) -> Option<&str> {
        self.values.get(option.name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Returns the value or the default, as a word.
    pub(super) fn word(&self, option: &'static OptionSpec) -> &str {
        self.text(option).or(option.default).unwrap_or_default()
    }

    /// Returns a flag, or its default.
    pub(super) fn flag(&self, option: &'static OptionSpec) -> bool {
        parse_flag(self.word(option)).unwrap_or(false)
    }

    /// Returns a duration, or its default.
    /// Makes the store's own repetitions end after `deadline_max` at the latest.
    pub fn shorten_retries(&mut self, deadline_max: Duration) {
        if self.duration(&spec::RETRY_DEADLINE) > deadline_max {
            let text = format!("{}ms", deadline_max.as_millis());
            self.values.insert(spec::RETRY_DEADLINE.name, text);
        }
    }

    pub(super) fn duration(&self, option: &'static OptionSpec) -> Duration {
        Duration::from_millis(parse_ms(self.word(option)).unwrap_or_default())
    }

    /// Returns a number, or its default.
    pub(super) fn count(&self, option: &'static OptionSpec) -> u64 {
        self.word(option).parse().unwrap_or_default()
    }
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self
            .values()
            .map(|(option, value)| (option.name, if option.secret { "(hidden)" } else { value }));
        f.debug_map().entries(shown).finish()
    }
}

fn check(option: &'static OptionSpec, value: &str) -> Result<(), OptionError> {
    let wanted = match option.kind {
        OptionKind::Text if value.contains(char::is_control) => {
            "holds a control character, such as a line end".to_owned()
        }
        OptionKind::Text => return Ok(()),
        OptionKind::Flag if parse_flag(value).is_some() => return Ok(()),
        OptionKind::Flag => "expects `true` or `false`".to_owned(),
        OptionKind::Choice(words) if words.contains(&value) => return Ok(()),
        OptionKind::Choice(words) => format!("expects one of `{}`", words.join("`, `")),
        OptionKind::Count { min, max } => {
            if value.parse::<u64>().is_ok_and(|n| (min..=max).contains(&n)) {
                return Ok(());
            }
            format!("expects a whole number from {min} to {max}")
        }
        OptionKind::Duration { min_ms, max_ms } => {
            if parse_ms(value).is_some_and(|ms| (min_ms..=max_ms).contains(&ms)) {
                return Ok(());
            }
            format!(
                "expects a time such as `500ms`, `30s` or `3min`, from {min_ms} ms to {} h",
                max_ms / 3_600_000
            )
        }
    };
    let what = if option.secret { wanted } else { format!("{wanted}, not `{value}`") };
    Err(OptionError::BadValue { name: option.name, what })
}

fn parse_flag(value: &str) -> Option<bool> {
    match value {
        "true" | "on" | "yes" | "1" => Some(true),
        "false" | "off" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// Reads `500ms`, `30s`, `3min`, `1h`, or bare seconds; the units are those of
/// PostgreSQL's own settings.
fn parse_ms(value: &str) -> Option<u64> {
    let digits = value.len() - value.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = value.split_at(digits);
    let factor = match unit.trim() {
        "ms" => 1,
        "" | "s" => 1000,
        "min" | "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_default_is_a_value_that_its_option_accepts() {
        for option in OPTIONS {
            if let Some(default) = option.default {
                check(option, default).unwrap();
            }
            assert!(option.meaning.ends_with('.'), "{}", option.name);
            assert!(!option.drivers.is_empty(), "{}", option.name);
        }
    }

    #[test]
    fn names_are_unique_and_fit_an_environment_variable() {
        let mut names: Vec<_> = OPTIONS.iter().map(|option| option.name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(
            names.iter().all(|n| n
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'))
        );
    }

    #[test]
    fn a_misspelt_option_names_the_nearest_one() {
        let error = StoreOptions::default().set("endpiont", "x").unwrap_err();
        assert_eq!(
            error.to_string(),
            "there is no store option `endpiont` (did you mean `endpoint`?)"
        );
    }

    #[test]
    fn an_option_of_another_driver_is_refused_by_name() {
        let mut options = StoreOptions::default();
        options.set("azure_account", "a").unwrap();
        let error = options.check_for(Driver::S3).unwrap_err().to_string();
        assert!(error.contains("`azure_account`") && error.contains("`az://`"), "{error}");
        options.check_for(Driver::Azure).unwrap();
        let mut options = StoreOptions::default();
        options.set("endpoint", "https://x").unwrap();
        assert!(options.check_for(Driver::File).is_err());
    }

    #[test]
    fn a_secret_is_in_no_debug_text_and_in_no_error() {
        let mut options = StoreOptions::default();
        options.set("secret_access_key", "hunter2").unwrap();
        options.set("access_key_id", "AK").unwrap();
        let shown = format!("{options:?}");
        assert!(!shown.contains("hunter2") && shown.contains("AK"), "{shown}");
        let error = options.set("secret_access_key", "hunter3\n").unwrap_err().to_string();
        assert!(!error.contains("hunter3"), "{error}");
    }

    #[test]
    fn values_out_of_bounds_are_refused_and_change_nothing() {
        let mut options = StoreOptions::default();
        options.set("retries", "3").unwrap();
        for (name, value) in [
            ("retries", "101"),
            ("retries", "-1"),
            ("stall_timeout", "0s"),
            ("stall_timeout", "3 days"),
            ("sse", "AES"),
            ("path_style", "maybe"),
        ] {
            assert!(
                matches!(options.set(name, value), Err(OptionError::BadValue { .. })),
                "{name}={value}"
            );
        }
        assert_eq!(options.count(&spec::RETRIES), 3);
    }

    #[test]
    fn durations_are_read_with_postgresql_units() {
        for (text, ms) in
            [("30", 30_000), ("30s", 30_000), ("500ms", 500), ("3min", 180_000), ("1 h", 3_600_000)]
        {
            assert_eq!(parse_ms(text), Some(ms), "{text}");
        }
        for text in ["", "s", "-1s", "1.5s", "99999999999999999999h"] {
            assert_eq!(parse_ms(text), None, "{text}");
        }
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        let refused = |pairs: &[(&str, &str)]| {
            let mut options = StoreOptions::default();
            for (name, value) in pairs {
                options.set(name, value).unwrap();
            }
            matches!(options.check_for(Driver::S3), Err(OptionError::Combination { .. }))
        };
        assert!(refused(&[("access_key_id", "x")]));
        assert!(refused(&[("sse_kms_key", "x")]));
        assert!(refused(&[("endpoint", "http://x")]));
        assert!(!refused(&[("endpoint", "http://x"), ("allow_http", "true")]));
    }

    proptest! {
        #[test]
        fn setting_never_panics(name in ".{0,20}", value in ".{0,40}") {
            let mut options = StoreOptions::default();
            let _ = options.set(&name, &value);
            for option in OPTIONS {
                let _ = options.set(option.name, &value);
            }
        }
    }
}
