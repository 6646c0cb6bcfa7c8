//! What a user sees when something goes wrong.
//!
//! A [`Failure`] always says four things: what happened, what was *not*
//! harmed, what to do next, and the cause underneath. Only `ops` makes one, or
//! `cli` for settings; the floors below have small error enums of their own.
//! Nothing here prints or exits.

use std::fmt;

use crate::causes;

/// A signal that asked a command to end early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopSignal {
    /// SIGINT, as Ctrl-C sends it.
    Interrupt,
    /// SIGTERM, as `kill` and service managers send it.
    Terminate,
}

impl StopSignal {
    /// Returns the exit code by which shells tell this signal: 128 and its number.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Interrupt => 130,
            Self::Terminate => 143,
        }
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Why a command ended, as the exit code that scripts and PostgreSQL see.
///
/// The numbers are a contract (`docs/reference.md`). `archive-get` alone adds
/// 128 to every code but 0 and 1, because PostgreSQL takes 1–125 from a
/// `restore_command` as "no such file" and may then end recovery early
/// (`src/backend/access/transam/xlogarchive.c`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// 1: what was asked for certainly does not exist.
    Absent,
    /// 2: wrong use of the command, or wrong settings.
    Usage,
    /// 3: same name with other content, or another cluster's place.
    Conflict,
    /// 4: a checksum, a gap, a target that cannot be reached.
    Integrity,
    /// 5: the store could not be reached or refused.
    Store,
    /// 6: PostgreSQL could not be reached or refused.
    Postgres,
    /// 7: the local disk.
    Disk,
    /// 70: a broken invariant of our own.
    Bug,
    /// 130 or 143: a signal asked for it, and the work was given up cleanly.
    Stopped(StopSignal),
}

impl Kind {
    /// Returns the process exit code of this kind.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Absent => 1,
            Self::Usage => 2,
            Self::Conflict => 3,
            Self::Integrity => 4,
            Self::Store => 5,
            Self::Postgres => 6,
            Self::Disk => 7,
            Self::Bug => 70,
            Self::Stopped(signal) => signal.exit_code(),
        }
    }

    /// Returns the word that `--json` prints for this kind.
    pub fn word(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Usage => "usage",
            Self::Conflict => "conflict",
            Self::Integrity => "integrity",
            Self::Store => "store",
            Self::Postgres => "postgres",
            Self::Disk => "disk",
            Self::Bug => "bug",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// One failure, told in four parts.
#[derive(Debug)]
pub struct Failure {
    /// The exit code's meaning.
    pub kind: Kind,
    /// What happened: one short factual sentence without a full stop.
    pub what: String,
    /// What was not harmed.
    pub unharmed: String,
    /// What to do next.
    pub next: String,
    /// The error underneath, where there is one.
    pub cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Failure {
    /// Makes a failure; all three sentences are mandatory.
    pub fn new(
        kind: Kind,
        what: impl Into<String>,
        unharmed: impl Into<String>,
        next: impl Into<String>,
    ) -> Self {
        Self { kind, what: what.into(), unharmed: unharmed.into(), next: next.into(), cause: None }
    }

    /// Adds the error underneath.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// Puts in front what did not come about because of it.
    #[must_use]
    pub fn so(mut self, what: impl fmt::Display) -> Self {
        self.what = format!("{what}: {}", self.what);
        self
    }

    /// Returns the cause and its causes, outermost first, without repeats.
    pub fn causes(&self) -> Vec<String> {
        self.cause.as_ref().map(|cause| causes::told(cause.as_ref())).unwrap_or_default()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        for cause in self.causes() {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_contract() {
        let all = [
            (Kind::Absent, 1),
            (Kind::Usage, 2),
            (Kind::Conflict, 3),
            (Kind::Integrity, 4),
            (Kind::Store, 5),
            (Kind::Postgres, 6),
            (Kind::Disk, 7),
            (Kind::Bug, 70),
            (Kind::Stopped(StopSignal::Interrupt), 130),
            (Kind::Stopped(StopSignal::Terminate), 143),
        ];
        for (kind, code) in all {
            assert_eq!(kind.exit_code(), code, "{}", kind.word());
        }
    }

    #[test]
    fn causes_are_listed_once_each() {
        let io = std::io::Error::other("disk on fire");
        let failure = Failure::new(Kind::Disk, "could not write", "x", "y").because(io);
        assert_eq!(failure.causes(), ["disk on fire"]);
        assert_eq!(failure.to_string(), "could not write: disk on fire");
    }
}
