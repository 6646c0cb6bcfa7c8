//! Reading the settings file: TOML, with the line of every value.
//!
//! Owns which file is read, its syntax, unknown keys and its permissions. Never
//! here: whether a value is good; `settings` checks that for all sources alike.
//!
//! ```toml
//! cluster = "main"
//!
//! [repo]
//! url = "s3://backups/postgres"
//!
//! [repo.options]
//! region = "eu-north-1"
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::settings::{NOTHING_DONE, Origin, Raw};
use super::settings_table::{DEFAULT_FILE, Id, OPTIONS_KEY, SECOND_OPTIONS_KEY, TABLE};
use crate::failure::{Failure, Kind};
use crate::spelling::nearest;

/// A settings file is a page or two; more is a mistake.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a settings file says.
#[derive(Default)]
pub struct SettingsFile {
    /// Its path; `None` when no file was read.
    pub path: Option<PathBuf>,
    /// The settings in it.
    pub values: BTreeMap<Id, Raw>,
    /// The store options in it.
    pub repo_options: BTreeMap<String, Raw>,
    /// Those of the second repository.
    pub second_options: BTreeMap<String, Raw>,
    /// Whether users other than its owner (or other than root's chosen group) can read it.
    pub readable_by_others: bool,
}

impl SettingsFile {
    /// Reads `named`, or the default file where that exists, or nothing.
    ///
    /// # Errors
    /// [`Kind::Usage`] when the named file is not there, and when any file that
    /// is there cannot be read or is not good: guessing without it could mean another repository.
    pub fn read(named: Option<&Path>) -> Result<Self, Failure> {
        let path = named.unwrap_or(Path::new(DEFAULT_FILE));
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(unreadable(path, error)),
        };
        let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
        let mut text = String::new();
        let taken = (&mut file).take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        let length = taken.map_err(|error| unreadable(path, error))?;
        if length as u64 > FILE_BYTES_MAX {
            let error = format!("it is larger than {FILE_BYTES_MAX} bytes");
            return Err(unreadable(path, error));
        }
        let mut read = Self::parse(path, &text)?;
        // PostgreSQL's own rule for key files: root may let one group read it
        // (src/backend/libpq/be-secure-common.c).
        let forbidden = if metadata.uid() == 0 { 0o007 } else { 0o077 };
        read.readable_by_others = metadata.mode() & forbidden != 0;
        Ok(read)
    }

    /// Parses the text of the file at `path`, which is only used in messages.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Failure> {
        let document = DeTable::parse(text).map_err(|error| {
            let line = error.span().map_or(1, |span| line_of(text, span.start));
            let reason = error.message().replace('\n', ", ");
            Failure::new(
                Kind::Usage,
                format!("{}:{line} is not valid TOML", path.display()),
                NOTHING_DONE,
                "correct the line; texts stand in double quotes: cluster = \"main\"",
            )
            .because(reason)
        })?;
        let mut reader = Reader { path, text, file: Self::default() };
        reader.table("", document.get_ref())?;
        reader.file.path = Some(path.to_owned());
        Ok(reader.file)
    }
}

/// One walk over the document.
struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
    file: SettingsFile,
}

impl Reader<'_> {
    /// Takes all keys of one table, in the order of the file.
    fn table(&mut self, prefix: &str, table: &DeTable<'_>) -> Result<(), Failure> {
        let mut entries: Vec<_> = table.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        for (name, value) in entries {
            let key = format!("{prefix}{}", name.get_ref());
            let line = line_of(self.text, name.span().start);
            if let Some(table) = prefix.strip_suffix('.').filter(|table| is_options(table)) {
                self.option(table, name.get_ref(), line, value)?;
            } else if let (true, DeValue::Table(inner)) = (is_section(&key), value.get_ref()) {
                self.table(&format!("{key}."), inner)?;
            } else if let Some(setting) = TABLE.iter().find(|setting| setting.key == key) {
                self.file.values.insert(setting.id, self.raw(line, value));
            } else {
                return Err(self.unknown(&key, line));
            }
        }
        Ok(())
    }

    /// Takes one store option: any name, any plain value.
    fn option(
        &mut self,
        table: &str,
        name: &str,
        line: usize,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<(), Failure> {
        let raw = self.raw(line, value);
        if !matches!(raw.toml_type, Some("string" | "integer" | "boolean")) {
            return Err(Failure::new(
                Kind::Usage,
                format!(
                    "`{table}.{name}` in {} is of type {}, which no store option takes",
                    raw.origin,
                    raw.toml_type.unwrap_or("unknown")
                ),
                NOTHING_DONE,
                format!("give a text, a whole number or true/false: {name} = \"…\""),
            ));
        }
        let options = if table == SECOND_OPTIONS_KEY {
            &mut self.file.second_options
        } else {
            &mut self.file.repo_options
        };
        options.insert(name.to_owned(), raw);
        Ok(())
    }

    fn raw(&self, line: usize, value: &Spanned<DeValue<'_>>) -> Raw {
        let text = match value.get_ref() {
            DeValue::String(text) => text.to_string(),
            // Hexadecimal and the like keep their radix sign and are refused as numbers later.
            DeValue::Integer(number) => number.to_string(),
            DeValue::Boolean(on) => if *on { "on" } else { "off" }.to_owned(),
            _ => self.text.get(value.span()).unwrap_or_default().trim().to_owned(),
        };
        Raw {
            text,
            toml_type: Some(value.get_ref().type_str()),
            origin: Origin::File { path: self.path.to_owned(), line },
        }
    }

    fn unknown(&self, key: &str, line: usize) -> Failure {
        let known =
            TABLE.iter().map(|setting| setting.key).chain([OPTIONS_KEY, SECOND_OPTIONS_KEY]);
        // `url` at the top or `repo.cluster` differ from their key only by the table.
        let last = |key: &'_ str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let misplaced = known.clone().find(|known| last(known) == last(key));
        let next = match misplaced.or_else(|| nearest(key, known.clone())) {
            Some(near) => format!("did you mean `{near}`? {}", how_to_write(near)),
            None => format!("known are: {}", known.collect::<Vec<_>>().join(", ")),
        };
        Failure::new(
            Kind::Usage,
            format!("`{key}` in {}:{line} is not a setting", self.path.display()),
            NOTHING_DONE,
            next,
        )
    }
}

/// The tables that a settings file may have. `repo = "…"` is refused as a wrong key, with a hint.
fn is_section(key: &str) -> bool {
    matches!(key, "repo" | "second_repo") || is_options(key)
}

fn is_options(key: &str) -> bool {
    key == OPTIONS_KEY || key == SECOND_OPTIONS_KEY
}

/// Says where in the file a key stands, for keys within a table.
fn how_to_write(key: &str) -> String {
    match key.rsplit_once('.') {
        Some(_) if is_options(key) => format!("(a table: `[{key}]`)"),
        Some((table, name)) => format!("(write `{name} = …` under `[{table}]`)"),
        None => format!("(write `{key} = …` above the first table)"),
    }
}

fn unreadable(path: &Path, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::new(
        Kind::Usage,
        format!("could not read the settings file {}", path.display()),
        NOTHING_DONE,
        "check its path, and that the user who runs this command may read it",
    )
    .because(cause)
}

/// Returns the line, counted from 1, of the byte at `offset`.
fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<SettingsFile, Failure> {
        SettingsFile::parse(Path::new("/x.toml"), text)
    }

    #[test]
    fn every_value_knows_its_line() {
        let file = parse(
            "# c\ncluster = \"main\"\njobs = 3\nstandby_fallback = false\n\n[repo]\nurl = \"file:///r\"\n\
             [repo.options]\nregion = \"eu\"\nretries = 3\n",
        )
        .unwrap();
        let seen: Vec<_> =
            file.values.values().map(|raw| (raw.text.as_str(), raw.origin.to_string())).collect();
        let at = |line| format!("/x.toml:{line}");
        assert_eq!(seen, [("file:///r", at(7)), ("main", at(2)), ("3", at(3)), ("off", at(4))]);
        assert_eq!(file.repo_options["region"].origin.to_string(), "/x.toml:9");
        assert_eq!(file.repo_options["retries"].text, "3");
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest() {
        let cases = [
            ("\ncompresion = \"lz4\"", "`compresion` in /x.toml:2", "`compression`"),
            ("url = \"file:///r\"", "`url` in /x.toml:1", "`repo.url`"),
            ("[repo]\ncluster = \"x\"", "`repo.cluster` in /x.toml:2", "`cluster`"),
            ("[repo.option]\nregion = \"x\"", "`repo.option` in /x.toml:1", "`repo.options`"),
            ("repo = \"file:///r\"", "`repo` in /x.toml:1", "`repo.url`"),
            ("[wal.push]\nx = 1", "`wal` in /x.toml:1", "known are"),
        ];
        for (text, what, next) in cases {
            let failure = parse(text).err().unwrap();
            assert!(failure.what.contains(what), "{}", failure.what);
            assert!(failure.next.contains(next), "{text}: {}", failure.next);
        }
    }

    #[test]
    fn broken_toml_names_its_line() {
        let failure = parse("cluster = \"a\"\njobs = = 3\n").err().unwrap();
        assert_eq!(failure.what, "/x.toml:2 is not valid TOML");
    }

    #[test]
    fn a_named_file_that_is_missing_is_an_error() {
        let failure = SettingsFile::read(Some(Path::new("/nonexistent/x.toml"))).err().unwrap();
        assert_eq!(failure.kind, Kind::Usage);
    }

    #[test]
    fn a_file_that_others_can_read_is_noticed() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("h.toml");
        std::fs::write(&path, "cluster = \"a\"").unwrap();
        for (mode, others) in [(0o600, false), (0o644, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(SettingsFile::read(Some(&path)).unwrap().readable_by_others, others);
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_stumble(text in "[a-z=\"\\[\\]. \n0-9#']{0,80}") {
            let _ = parse(&text);
        }
    }
}
