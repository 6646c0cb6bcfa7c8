//! The password file, `~/.pgpass`.
//!
//! ```text
//! hostname:port:database:username:password
//! db1:5432:replication:backup:it\:s secret
//! *:*:*:backup:other
//! ```
//!
//! The first line that fits counts. A `*` alone fits anything; a backslash
//! takes the next character as it is. A file that others may read is not used.
//!
//! Source: manual, "The Password File"; `src/interfaces/libpq/fe-connect.c`
//! (`passwordFromFile`).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::conninfo::Password;

/// The largest part of a password file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What is looked for; each field as it would stand in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    /// The host as given. A socket in a usual directory is `localhost`.
    pub(super) host: &'a str,
    pub(super) port: u16,
    /// The database; `replication` for a walsender.
    pub(super) dbname: &'a str,
    pub(super) user: &'a str,
}

/// Looks up a password.
///
/// Errors: a sentence that says why there is none, for the message about the
/// missing password. A file that others can read, or that is no regular file,
/// is passed over with a warning, as in libpq.
pub(super) fn look_up(path: &Path, wanted: &Wanted<'_>) -> Result<Password, String> {
    let place = path.display();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(format!("{place} does not exist"));
        }
        Err(error) => return Err(format!("{place} could not be read: {error}")),
    };
    let metadata =
        file.metadata().map_err(|error| format!("{place} could not be read: {error}"))?;
    let refusal = if !metadata.is_file() {
        Some(format!("{place} is not a plain file"))
    } else if metadata.mode() & 0o077 != 0 {
        Some(format!("{place} is not used because others may read it; give it mode 0600"))
    } else {
        None
    };
    if let Some(refusal) = refusal {
        tracing::warn!("password file {refusal}");
        return Err(refusal);
    }
    for line in BufReader::new(file.take(FILE_BYTES_MAX)).split(b'\n') {
        let line = line.map_err(|error| format!("{place} could not be read: {error}"))?;
        // A line that is not UTF-8 cannot be meant for settings that are.
        if let Some(secret) = std::str::from_utf8(&line).ok().and_then(|line| fits(line, wanted)) {
            return Ok(Password::new(secret));
        }
    }
    let Wanted { host, port, dbname, user } = wanted;
    Err(format!("{place} has no line for {host}:{port}:{dbname}:{user}"))
}

/// Returns the password of `line` if its first four fields fit.
fn fits(line: &str, wanted: &Wanted<'_>) -> Option<String> {
    let line = line.strip_suffix('\r').unwrap_or(line);
    if line.starts_with('#') {
        return None;
    }
    let port = wanted.port.to_string();
    let mut rest = line;
    for value in [wanted.host, port.as_str(), wanted.dbname, wanted.user] {
        rest = match rest.strip_prefix("*:") {
            Some(after) => after,
            None => after_field(rest, value)?,
        };
    }
    // Without an unescaped colon in the way, the rest is the password.
    let (secret, _) = unescape(rest, None);
    (!secret.is_empty()).then_some(secret)
}

/// Returns what follows the first field and its colon, if the field is `value`.
fn after_field<'a>(text: &'a str, value: &str) -> Option<&'a str> {
    let (field, rest) = unescape(text, Some(':'));
    (field == value).then(|| rest.strip_prefix(':')).flatten()
}

/// Reads up to `end` (excluded) or the end of the text, dropping backslashes.
fn unescape(text: &str, end: Option<char>) -> (String, &str) {
    let mut field = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        if Some(c) == end {
            return (field, &text[at..]);
        }
        if c == '\\' {
            field.extend(chars.next().map(|(_, escaped)| escaped));
        } else {
            field.push(c);
        }
    }
    (field, "")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::PermissionsExt;

    const WANTED: Wanted<'static> =
        Wanted { host: "db", port: 5432, dbname: "replication", user: "backup" };

    fn write(text: &str, mode: u32) -> tempfile::TempPath {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
        file.into_temp_path()
    }

    #[test]
    fn the_first_line_that_fits_counts() {
        let path = write(
            "#db:5432:replication:backup:comment\n\
             db:5433:replication:backup:port\n\
             db:5432:postgres:backup:database\n\
             *:*:replication:backup:right\r\n\
             db:5432:replication:backup:late\n",
            0o600,
        );
        assert_eq!(look_up(&path, &WANTED).unwrap().reveal(), "right");
        let other = Wanted { dbname: "other", ..WANTED };
        let why = look_up(&path, &other).unwrap_err();
        assert!(why.contains("no line for db:5432:other:backup"), "{why}");
    }

    #[test]
    fn escapes_and_stars_are_libpqs() {
        let wanted = Wanted { host: r"a:b\c", ..WANTED };
        assert_eq!(fits(r"a\:b\\c:*:*:*:p\:q\\r", &wanted).unwrap(), r"p:q\r");
        assert_eq!(fits(r"*:*:*:*:p:q", &wanted).unwrap(), "p:q");
        assert_eq!(fits(r"a*:*:*:*:p", &wanted), None);
        assert_eq!(fits(r"*:*:*:*:", &wanted), None);
        assert_eq!(fits(r"*:*:*", &wanted), None);
        // A star with a backslash is a star, not everything.
        assert_eq!(fits(r"\*:*:*:*:p", &wanted), None);
    }

    #[test]
    fn a_file_that_others_can_read_is_not_used() {
        for mode in [0o640, 0o604, 0o660] {
            let why = look_up(&write("*:*:*:*:p\n", mode), &WANTED).unwrap_err();
            assert!(why.contains("0600"), "{why}");
        }
        let why = look_up(Path::new("/nonexistent/pgpass"), &WANTED).unwrap_err();
        assert!(why.contains("does not exist"), "{why}");
        let why = look_up(tempfile::tempdir().unwrap().path(), &WANTED).unwrap_err();
        assert!(why.contains("not a plain file"), "{why}");
    }

    proptest! {
        #[test]
        fn any_field_survives_escaping(host in "[^\r\n\0]{1,20}", secret in "[^\r\n\0]{1,20}") {
            let escape = |text: &str| text.replace('\\', r"\\").replace(':', r"\:");
            let line = format!("{}:*:*:*:{}", escape(&host), escape(&secret));
            prop_assume!(!line.starts_with(['#', '*']));
            prop_assert_eq!(fits(&line, &Wanted { host: &host, ..WANTED }), Some(secret));
        }
    }
}
