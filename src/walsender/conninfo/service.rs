//! The connection service file: named sets of connection settings.
//!
//! ```text
//! # comment
//! [production]
//! host=db1,db2
//! user=backup
//! ```
//!
//! Source: manual, "The Connection Service File";
//! `src/interfaces/libpq/fe-connect.c` (`parseServiceInfo`).

use std::path::{Path, PathBuf};

use super::grammar;
use super::{PgEnvironment, SettingsError, Values};

/// The largest service file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Returns the settings of service `name`.
///
/// Looked for in `servicefile` (or `~/.pg_service.conf`), then in
/// `$PGSYSCONFDIR/pg_service.conf`; the first file that has the section counts.
pub(super) fn load(
    name: &str,
    servicefile: Option<&str>,
    environment: &PgEnvironment,
) -> Result<Values, SettingsError> {
    let own = servicefile
        .map(PathBuf::from)
        .or_else(|| environment.home.as_ref().map(|home| home.join(".pg_service.conf")));
    let system = environment
        .vars
        .get("PGSYSCONFDIR")
        .map(|directory| Path::new(directory).join("pg_service.conf"));
    let mut looked_in = Vec::new();
    for path in own.into_iter().chain(system) {
        // A file that is named must exist; the default ones need not.
        let named = servicefile.is_some_and(|servicefile| Path::new(servicefile) == path);
        if let Some(text) = super::read_text(&path, FILE_BYTES_MAX, named)?
            && let Some(values) = section(&text, name, &path)?
        {
            return Ok(values);
        }
        looked_in.push(path.display().to_string());
    }
    Err(SettingsError::ServiceNotFound { name: name.to_owned(), looked_in: looked_in.join(", ") })
}

/// Returns the settings in the section `[name]`, or `None` if there is no such section.
fn section(text: &str, name: &str, path: &Path) -> Result<Option<Values>, SettingsError> {
    let mut values: Option<Values> = None;
    for (number, line) in text.lines().enumerate() {
        let bad = |problem: &'static str| SettingsError::ServiceFile {
            path: path.to_owned(),
            line: number + 1,
            problem,
        };
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            if values.is_some() {
                break;
            }
            if header.strip_suffix(']') == Some(name) {
                values = Some(Values::new());
            }
            continue;
        }
        let Some(values) = values.as_mut() else { continue };
        if line.starts_with("ldap") && line.contains("://") {
            return Err(bad("LDAP lookup is not supported"));
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(bad("a line in the section is not `key=value`"));
        };
        if matches!(key, "service" | "servicefile") {
            return Err(bad("a service cannot name another service"));
        }
        // Of a keyword given twice in a section libpq takes the first.
        if !values.contains_key(key) {
            grammar::store(values, key, value.to_owned())?;
        }
    }
    Ok(values)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn read(text: &str, name: &str) -> Result<Option<Values>, SettingsError> {
        section(text, name, Path::new("svc.conf"))
    }

    #[test]
    fn only_the_named_section_counts() {
        let text =
            "host=stray\n# c\n[a]\nhost=one\n\n[b]\n host=two\nport=1\nport=2\n[c]\nhost=three\n";
        let values = read(text, "b").unwrap().unwrap();
        assert_eq!(values["host"], "two");
        assert_eq!(values["port"], "1");
        assert_eq!(values.len(), 2);
        assert!(read(text, "d").unwrap().is_none());
    }

    #[test]
    fn a_broken_line_is_named_by_number() {
        for text in ["[a]\nhost=x\nnonsense\n", "[a]\n#\nservice=b\n", "[a]\n\nldap://x/y\n"] {
            let Err(SettingsError::ServiceFile { line, .. }) = read(text, "a") else {
                panic!("accepted {text:?}");
            };
            assert_eq!(line, 3);
        }
        assert!(matches!(read("[a]\nhots=x\n", "a"), Err(SettingsError::UnknownKeyword { .. })));
    }

    #[test]
    fn a_missing_service_names_the_files_searched() {
        let home = tempfile::tempdir().unwrap();
        let environment =
            PgEnvironment { home: Some(home.path().to_owned()), ..PgEnvironment::default() };
        let message = load("nope", None, &environment).unwrap_err().to_string();
        assert!(message.contains("nope") && message.contains(".pg_service.conf"), "{message}");
    }
}
