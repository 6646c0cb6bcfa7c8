//! `drill/<second>.json`: what one drill has proved, and how long it took.
//!
//! Written once, when everything of the drill is over and cleared away. Never here: what is checked, or what a
//! failed check means.

use serde::{Deserialize, Serialize};

use super::{BackupId, Document};
use crate::pg::{Lsn, PgTimestamp, Timeline};

/// The longest text that a check or a log gives to a record, in bytes; the end of a longer one is kept.
pub const DRILL_TEXT_BYTES_MAX: usize = 4 << 10;

/// What a drill came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DrillOutcome {
    /// The target was reached and every check passed.
    Passed,
    /// The target was not reached, or a check failed.
    Failed,
    /// Something else ended it (the store, the disk, no server to start): nothing was proved either way.
    Unfinished,
}

impl DrillOutcome {
    /// Returns the word that is stored and told.
    pub fn word(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::Unfinished => "unfinished",
        }
    }
}

/// One part of a drill and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillPhase {
    /// `choosing`, `reading-wal`, `restoring`, `starting`, `replaying`, `checking` or `cleaning`.
    pub name: String,
    /// How long it took.
    pub millis: u64,
}

/// How one check turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckOutcome {
    /// As it should be.
    Passed,
    /// Something is wrong with what was restored.
    Failed,
    /// It could not be done here; `said` tells why.
    Skipped,
}

/// One check of what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillCheck {
    /// `page-checksums`, `databases`, `pg_amcheck`, or `sql:` and the name of the user's file.
    pub name: String,
    /// How it turned out.
    pub outcome: CheckOutcome,
    /// What was seen, at most [`DRILL_TEXT_BYTES_MAX`] bytes.
    pub said: String,
    /// How long it took.
    pub millis: u64,
}

/// Where recovery has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillReached {
    /// The timeline that was followed.
    pub timeline: Timeline,
    /// The end of the last record that was replayed (excluded), as the server's own history file names it.
    pub end_lsn: Lsn,
    /// The time of the last commit or abort that was replayed; absent if none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit_time: Option<PgTimestamp>,
}

/// What ended a drill before its checks were over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillFailure {
    /// The phase in which it happened.
    pub phase: String,
    /// The word of the exit code: `integrity`, `store`, `postgres`, `disk`, …
    pub kind: String,
    /// What happened, in one sentence.
    pub what: String,
    /// The errors underneath, outermost first.
    pub causes: Vec<String>,
    /// The end of the private server's log, where there was one; at most [`DRILL_TEXT_BYTES_MAX`] bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub server_log: String,
}

/// `drill/<second>.json`: what one drill has proved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drill {
    /// The format version.
    pub format: u32,
    /// The drill: the second in which it began.
    pub id: BackupId,
    /// When it began, by the clock of its host.
    pub started_at: PgTimestamp,
    /// When it ended, by the same clock.
    pub finished_at: PgTimestamp,
    /// The host that did it.
    pub host: String,
    /// What it came to.
    pub outcome: DrillOutcome,
    /// The backup that was restored; absent where none was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// The target in words.
    pub target: String,
    /// The seed, where the target was a random moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Where recovery has ended; absent where it did not get to its target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<DrillReached>,
    /// From the first byte fetched to a server that takes connections at the target, in milliseconds: what a
    /// recovery takes. Absent where it did not come to that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery_millis: Option<u64>,
    /// Bytes of the files that were restored.
    pub size_bytes: u64,
    /// Bytes of WAL between the backup's start and the end of recovery.
    pub wal_bytes: u64,
    /// How long each part took, in order.
    pub phases: Vec<DrillPhase>,
    /// What was checked, in order.
    pub checks: Vec<DrillCheck>,
    /// What ended it early.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<DrillFailure>,
    /// What is worth knowing and harms nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Drill {
    const WHAT: &'static str = "record of a drill";

    fn format(&self) -> u32 {
        self.format
    }
}

impl Drill {
    /// Returns the names of the checks that failed.
    pub fn failed_checks(&self) -> Vec<&str> {
        let failed = self.checks.iter().filter(|check| check.outcome == CheckOutcome::Failed);
        failed.map(|check| check.name.as_str()).collect()
    }
}

/// Returns the end of a text, at most [`DRILL_TEXT_BYTES_MAX`] bytes of it, from the beginning of a character.
pub fn drill_text(text: &str) -> String {
    let text = text.trim_end();
    let mut from = text.len().saturating_sub(DRILL_TEXT_BYTES_MAX);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    text[from..].to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_text_keeps_its_end_and_whole_characters() {
        assert_eq!(drill_text("short\n\n"), "short");
        let long = format!("{}end", "ä".repeat(DRILL_TEXT_BYTES_MAX));
        let kept = drill_text(&long);
        assert!(kept.len() <= DRILL_TEXT_BYTES_MAX && kept.len() > DRILL_TEXT_BYTES_MAX - 4);
        assert!(kept.ends_with("äend"));
    }

    #[test]
    fn a_record_that_says_little_is_read() {
        let json = r#"{"format":1,"id":"20261122T031500Z","started_at":"2026-11-22T03:15:00Z",
            "finished_at":"2026-11-22T03:16:00Z","host":"h","outcome":"unfinished","target":"x",
            "size_bytes":0,"wal_bytes":0,"phases":[],"checks":[],"tool":"highwater 0","later":1}"#;
        let drill: Drill = serde_json::from_str(json).unwrap();
        assert_eq!((drill.outcome, drill.backup), (DrillOutcome::Unfinished, None));
    }
}
