//! Where recovery is to stop, as plain data.
//!
//! Owns the words of PostgreSQL's recovery target settings. Never here: parsing
//! of what a user typed (that is `cli`), or whether a target can be reached.
//!
//! ```text
//! --to-time 2026-11-22T03:00:00+02:00   recovery_target_time = '2026-11-22 01:00:00.000000+00'
//! --to-lsn 0/3000028 --exclusive        recovery_target_lsn = '0/3000028', recovery_target_inclusive = off
//! ```
//!
//! Source: PostgreSQL manual, "Recovery Target" (`doc/src/sgml/config.sgml`).

use std::fmt;

use crate::pg::{Lsn, Timeline};

/// The point at which replay stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveryPoint {
    /// As far as the archive goes.
    Latest,
    /// As soon as the backup is consistent.
    Immediate,
    /// The last commit or abort at or before this moment (before it, if exclusive).
    Time {
        /// Microseconds since 1970-01-01 00:00:00 UTC.
        unix_micros: i64,
    },
    /// The record that begins at or after this position.
    Lsn(Lsn),
    /// The commit or abort of this transaction.
    Xid(u32),
    /// The first restore point of this name; 1 to 63 bytes.
    Name(String),
}

impl RecoveryPoint {
    /// Returns PostgreSQL's setting and its value, unquoted, or `None` for
    /// [`Self::Latest`]. A time always carries `+00`, because the server would
    /// read a bare one in its own `timezone`.
    pub fn parameter(&self) -> Option<(&'static str, String)> {
        match self {
            Self::Latest => None,
            Self::Immediate => Some(("recovery_target", "immediate".to_owned())),
            Self::Time { unix_micros } => {
                Some(("recovery_target_time", utc_with_offset(*unix_micros)))
            }
            Self::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
            Self::Xid(xid) => Some(("recovery_target_xid", xid.to_string())),
            Self::Name(name) => Some(("recovery_target_name", name.clone())),
        }
    }

    /// Returns whether `recovery_target_inclusive` has a meaning for this point.
    pub fn can_be_exclusive(&self) -> bool {
        matches!(self, Self::Time { .. } | Self::Lsn(_) | Self::Xid(_))
    }
}

impl fmt::Display for RecoveryPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("the end of the archive"),
            Self::Immediate => f.write_str("the end of the backup"),
            Self::Time { unix_micros } => f.write_str(&utc_with_offset(*unix_micros)),
            Self::Lsn(lsn) => write!(f, "LSN {lsn}"),
            Self::Xid(xid) => write!(f, "transaction {xid}"),
            Self::Name(name) => write!(f, "restore point `{name}`"),
        }
    }
}

/// `recovery_target_timeline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimelineChoice {
    /// The timeline of the backup.
    Current,
    /// The newest timeline in the archive.
    #[default]
    Latest,
    /// This timeline.
    Number(Timeline),
}

impl fmt::Display for TimelineChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Current => f.write_str("current"),
            Self::Latest => f.write_str("latest"),
            Self::Number(timeline) => timeline.fmt(f),
        }
    }
}

/// `recovery_target_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetAction {
    /// Stay in recovery, open for reading, until somebody says `pg_wal_replay_resume()`.
    #[default]
    Pause,
    /// End recovery and take writes.
    Promote,
    /// Stop the server.
    Shutdown,
}

impl fmt::Display for TargetAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        })
    }
}

/// All that a user says about where recovery goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryTarget {
    /// Where replay stops.
    pub point: RecoveryPoint,
    /// `recovery_target_inclusive`: whether the point itself is replayed. Always
    /// true where [`RecoveryPoint::can_be_exclusive`] is false.
    pub inclusive: bool,
    /// Which timeline is followed.
    pub timeline: TimelineChoice,
    /// What the server does when it is there.
    pub action: TargetAction,
}

impl fmt::Display for RecoveryTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.point.fmt(f)?;
        if !self.inclusive {
            f.write_str(" (exclusive)")?;
        }
        if self.timeline != TimelineChoice::Latest {
            write!(f, " on timeline {}", self.timeline)?;
        }
        Ok(())
    }
}

/// Writes a moment as PostgreSQL reads it back without any other setting.
fn utc_with_offset(unix_micros: i64) -> String {
    jiff::Timestamp::from_microsecond(unix_micros).map_or_else(
        |_| format!("{unix_micros} microseconds since 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_what_postgresql_reads() {
        // The time is that of postgres-facts: a moment seen in a real commit record.
        let cases = [
            (RecoveryPoint::Latest, None),
            (RecoveryPoint::Immediate, Some(("recovery_target", "immediate"))),
            (
                RecoveryPoint::Time { unix_micros: 1_795_307_367_243_882 },
                Some(("recovery_target_time", "2026-11-22 00:29:27.243882+00")),
            ),
            (RecoveryPoint::Lsn(Lsn(0x300_0028)), Some(("recovery_target_lsn", "0/3000028"))),
            (RecoveryPoint::Xid(742), Some(("recovery_target_xid", "742"))),
            (RecoveryPoint::Name("before".into()), Some(("recovery_target_name", "before"))),
        ];
        for (point, expected) in cases {
            let seen = point.parameter();
            assert_eq!(seen.as_ref().map(|(k, v)| (*k, v.as_str())), expected);
        }
    }

    #[test]
    fn a_target_reads_as_a_sentence_part() {
        let target = RecoveryTarget {
            point: RecoveryPoint::Lsn(Lsn(0x28)),
            inclusive: false,
            timeline: TimelineChoice::Number(Timeline(10)),
            action: TargetAction::Pause,
        };
        assert_eq!(target.to_string(), "LSN 0/28 (exclusive) on timeline 10");
    }
}
