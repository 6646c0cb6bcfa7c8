//! What can be wrong with connection settings.
//!
//! No text here repeats a value that could be a password, or a part of one.

use std::io;
use std::path::PathBuf;

use super::keywords;

/// The connection settings are wrong or contradict each other. Never worth a retry.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The text is neither a URI nor `key=value` words.
    #[error("the connection string is malformed at byte {at}: {problem}")]
    Syntax {
        /// Offset in bytes from the start of the text.
        at: usize,
        /// What is wrong there.
        problem: &'static str,
    },
    /// libpq has no such keyword.
    #[error("`{name}` is not a connection setting; the nearest one is `{nearest}`")]
    UnknownKeyword {
        /// The word given; dots if it does not look like a keyword.
        name: String,
        /// The most similar keyword.
        nearest: &'static str,
    },
    /// libpq has this setting, and obeying it is not possible here.
    #[error("the connection setting `{keyword}` cannot be used: {why}")]
    Unsupported {
        /// The keyword.
        keyword: &'static str,
        /// Why, and what to do instead.
        why: &'static str,
    },
    /// The value is none of those the setting takes.
    #[error("`{value}` is not a value of the connection setting `{keyword}`: expected {expected}")]
    Invalid {
        /// The keyword.
        keyword: &'static str,
        /// The value given.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// Two settings contradict each other.
    #[error("the connection settings contradict each other: {0}")]
    Contradiction(&'static str),
    /// The lists of hosts, addresses and ports do not fit together.
    #[error("{count} values of `{keyword}` do not fit {hosts} hosts")]
    Count {
        /// The keyword with the wrong number of values.
        keyword: &'static str,
        /// How many values it has.
        count: usize,
        /// How many hosts there are.
        hosts: usize,
    },
    /// No user was given and the operating system user is unknown.
    #[error("no database user: give `user` or PGUSER, since the operating system user is unknown")]
    NoUser,
    /// There is no host to try.
    #[error("no host to connect to")]
    NoHost,
    /// No service file has the section asked for.
    #[error("service `{name}` is not defined in: {looked_in}")]
    ServiceNotFound {
        /// The service.
        name: String,
        /// The files that were looked for, whether they exist or not.
        looked_in: String,
    },
    /// A service file is malformed.
    #[error("{}, line {line}: {problem}", path.display())]
    ServiceFile {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A file that the settings name could not be read.
    #[error("could not read {}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

impl SettingsError {
    /// Names an unknown keyword, unless it might be the tail of a password with a space.
    pub(super) fn unknown_keyword(name: &str) -> Self {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        if name.len() <= 32 && name.bytes().all(plain) {
            Self::UnknownKeyword { name: name.to_owned(), nearest: keywords::nearest(name) }
        } else {
            Self::Syntax {
                at: 0,
                problem: "a word before `=` is not a keyword (a value with a space needs \
                          single quotes)",
            }
        }
    }
}
