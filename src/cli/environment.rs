//! Everything that the process is told by its surroundings.
//!
//! This is the only place that reads environment variables, so that everything
//! else works on values and can be tested with any surroundings. Never here:
//! what a variable means; `settings` and the rooms below decide that.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::PathBuf;

use jiff::tz::TimeZone;

/// The prefix of the variables that belong to us.
const OWN_PREFIX: &str = "HIGHWATER_";

/// These name places for this project's own tests and are no settings.
const TEST_PREFIX: &str = "HIGHWATER_TEST_";

/// Prefixes of the variables that cloud credential chains know.
/// `MSI_` and `IDENTITY_` are Azure's managed identity endpoints.
const CLOUD_PREFIXES: [&str; 5] = ["AWS_", "GOOGLE_", "AZURE_", "MSI_", "IDENTITY_"];

/// A user database larger than this is not searched.
const PASSWD_BYTES_MAX: u64 = 16 << 20;

/// The surroundings of one run. Holds secrets: deliberately without `Debug`.
#[derive(Default)]
pub struct Environment {
    /// `HIGHWATER_*`, by full name.
    pub own: BTreeMap<String, String>,
    /// `PG*` in capitals (libpq's variables), by full name.
    pub postgres: BTreeMap<String, String>,
    /// The usual cloud variables (`AWS_*`, `GOOGLE_*`, `AZURE_*` and Azure's
    /// identity endpoints), by full name.
    pub cloud: BTreeMap<String, String>,
    /// Names of variables of these families that are not UTF-8 and were left out.
    pub not_text: Vec<String>,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `USER`; see [`Self::user_name`].
    pub user: Option<String>,
    /// `PATH`, in which programs are looked for.
    pub search_path: String,
    /// Whether stdout is a terminal.
    pub stdout_is_terminal: bool,
    /// Whether stderr is a terminal.
    pub stderr_is_terminal: bool,
    /// The time zone, if a test pins one; otherwise it is the machine's.
    pub pinned_zone: Option<TimeZone>,
}

impl Environment {
    /// Reads the surroundings of this process.
    pub fn of_process() -> Self {
        let mut environment = Self::of_variables(std::env::vars_os());
        environment.stdout_is_terminal = std::io::stdout().is_terminal();
        environment.stderr_is_terminal = std::io::stderr().is_terminal();
        environment
    }

    /// Sorts variables into their families. A variable set to nothing counts as
    /// not set, because container files cannot unset one.
    pub fn of_variables(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables {
            let Ok(name) = name.into_string() else { continue };
            if value.is_empty() || name.starts_with(TEST_PREFIX) {
                continue;
            }
            let family = if name.starts_with(OWN_PREFIX) {
                &mut environment.own
            } else if is_libpq_name(&name) {
                &mut environment.postgres
            } else if CLOUD_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
                &mut environment.cloud
            } else {
                match name.as_str() {
                    "HOME" => environment.home = Some(PathBuf::from(value)),
                    "USER" => environment.user = value.into_string().ok(),
                    "PATH" => environment.search_path = value.into_string().unwrap_or_default(),
                    _ => {}
                }
                continue;
            };
            match value.into_string() {
                Ok(value) => {
                    family.insert(name, value);
                }
                Err(_) => environment.not_text.push(name),
            }
        }
        environment
    }

    /// Returns the name of the user that this process runs as: what the user
    /// database says of the real user id, as libpq does, else `USER`.
    pub fn user_name(&self) -> Option<String> {
        let uid = rustix::process::getuid().as_raw();
        let passwd = std::fs::File::open("/etc/passwd").ok();
        passwd
            .and_then(|file| name_of_uid(BufReader::new(file.take(PASSWD_BYTES_MAX)), uid))
            .or_else(|| self.user.clone())
    }

    /// Returns the machine's time zone (`TZ`, then `/etc/localtime`), or `None`
    /// when neither names one.
    pub fn time_zone(&self) -> Option<TimeZone> {
        let zone = self.pinned_zone.clone().or_else(|| TimeZone::try_system().ok())?;
        (!zone.is_unknown()).then_some(zone)
    }
}

/// libpq's variables are `PG` and capitals; `PGP…` of other programs are harmless.
fn is_libpq_name(name: &str) -> bool {
    name.strip_prefix("PG").is_some_and(|rest| {
        !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_')
    })
}

/// Finds the name in the seven fields of `passwd(5)`: `name:x:uid:gid:…`.
fn name_of_uid(passwd: impl BufRead, uid: u32) -> Option<String> {
    passwd.lines().map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let line_uid: u32 = fields.nth(1)?.parse().ok()?;
        (line_uid == uid && !name.is_empty()).then(|| name.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Environment {
        Environment::of_variables(variables.iter().map(|(k, v)| (k.into(), v.into())))
    }

    #[test]
    fn variables_go_to_their_family_and_nowhere_else() {
        let environment = of(&[
            ("HIGHWATER_REPO", "file:///r"),
            ("HIGHWATER_TEST_CACHE", "/var/cache"),
            ("PGHOST", "/run"),
            ("PGPASSWORD", "x"),
            ("PG_COLOR", "never"),
            ("PGhost", "no"),
            ("AWS_REGION", "eu"),
            ("IDENTITY_ENDPOINT", "http://x"),
            ("SECRET", "no"),
            ("HOME", "/h"),
        ]);
        assert_eq!(environment.own.keys().collect::<Vec<_>>(), ["HIGHWATER_REPO"]);
        let postgres: Vec<_> = environment.postgres.keys().collect();
        assert_eq!(postgres, ["PGHOST", "PGPASSWORD", "PG_COLOR"]);
        assert_eq!(
            environment.cloud.keys().collect::<Vec<_>>(),
            ["AWS_REGION", "IDENTITY_ENDPOINT"]
        );
        assert_eq!(environment.home, Some(PathBuf::from("/h")));
    }

    #[test]
    fn an_empty_variable_is_not_set() {
        assert!(of(&[("HIGHWATER_REPO", ""), ("PGHOST", "")]).own.is_empty());
    }

    #[test]
    fn the_user_database_is_read_by_uid() {
        let passwd: &[u8] =
            b"root:x:0:0:root:/root:/bin/sh\nbroken\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(name_of_uid(passwd, 101).as_deref(), Some("postgres"));
        assert_eq!(name_of_uid(passwd, 7), None);
    }
}
