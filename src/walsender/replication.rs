//! The walsender's questions: who are you, how are you set, how did the timelines go.
//!
//! Source: manual, "Streaming Replication Protocol"
//! (`doc/src/sgml/protocol.sgml`); `src/backend/replication/walsender.c`.

use bytes::Bytes;

use crate::pg::{Lsn, SystemId, Timeline};

use super::connection::Connection;
use super::error::PgError;
use super::quote::quote_identifier;
use super::rows::Rows;

/// The answer to IDENTIFY_SYSTEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster; its physical copies have the same.
    pub system_id: SystemId,
    /// The timeline the server is on.
    pub timeline: Timeline,
    /// The end (excluded) of the WAL that is flushed; on a standby, of what it
    /// has received and replayed.
    pub flush_lsn: Lsn,
    /// The database; `None` on a physical walsender.
    pub dbname: Option<String>,
}

/// A timeline history file as the server holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    /// `XXXXXXXX.history`, checked against the timeline that was asked for.
    pub file_name: String,
    /// The file, byte for byte.
    pub content: Bytes,
}

impl Connection {
    /// Asks which cluster this is and where its WAL ends. Needs
    /// [`Mode::Replication`](super::Mode::Replication). Errors: any [`PgError`].
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, PgError> {
        let answer = self.query("IDENTIFY_SYSTEM").await?;
        let identity = read_identity(&answer);
        self.checked(identity.ok_or("the answer to IDENTIFY_SYSTEM makes no sense"))
    }

    /// Asks for a setting, in either mode. The text has the unit that the
    /// server shows, such as `16MB` for `wal_segment_size`.
    ///
    /// Errors: `Server` with SQLSTATE 42704 for an unknown setting, and 42501
    /// for one that the role may not see.
    pub async fn show(&mut self, setting: &str) -> Result<String, PgError> {
        let answer = self.query(&format!("SHOW {}", quote_identifier(setting))).await?;
        let value = answer.first().map(ToOwned::to_owned);
        self.checked(value.ok_or("the answer to SHOW has no value"))
    }

    /// Fetches the history file of `timeline`. Needs
    /// [`Mode::Replication`](super::Mode::Replication).
    ///
    /// Errors: `Server` with SQLSTATE 58P01 where the server has none, which
    /// is always so for timeline 1.
    pub async fn timeline_history(
        &mut self,
        timeline: Timeline,
    ) -> Result<TimelineHistory, PgError> {
        let sets = self.query_raw(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let row = sets.into_iter().next().and_then(|mut set| set.rows.pop());
        let mut values = row.into_iter().flatten().flatten();
        let (name, content) = (values.next(), values.next());
        let file_name = timeline.history_file_name();
        match (name, content) {
            (Some(name), Some(content)) if name == file_name.as_bytes() => {
                Ok(TimelineHistory { file_name, content })
            }
            _ => Err(self.broken("the answer to TIMELINE_HISTORY is not the file asked for")),
        }
    }
}

fn read_identity(answer: &Rows) -> Option<SystemIdentity> {
    Some(SystemIdentity {
        system_id: answer.get(0, "systemid")?.parse().ok()?,
        timeline: read_timeline(answer.get(0, "timeline")?)?,
        flush_lsn: answer.get(0, "xlogpos")?.parse().ok()?,
        dbname: answer.get(0, "dbname").map(ToOwned::to_owned),
    })
}

/// Reads a timeline number, which is never 0.
pub(super) fn read_timeline(text: &str) -> Option<Timeline> {
    text.parse().ok().filter(|number| *number > 0).map(Timeline)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn answer(values: [Option<&str>; 4]) -> Rows {
        Rows {
            columns: ["systemid", "timeline", "xlogpos", "dbname"].map(str::to_owned).to_vec(),
            rows: vec![values.map(|value| value.map(str::to_owned)).to_vec()],
        }
    }

    #[test]
    fn a_system_identifier_above_the_signed_range_is_read() {
        let id = u64::MAX.to_string();
        let identity = read_identity(&answer([Some(&id), Some("1"), Some("0/028"), None])).unwrap();
        assert_eq!(identity.system_id, SystemId(u64::MAX));
        assert_eq!(identity.flush_lsn, Lsn(0x28));
    }

    #[test]
    fn an_answer_without_sense_is_no_identity() {
        for values in [
            [None, Some("1"), Some("0/0"), None],
            [Some("-1"), Some("1"), Some("0/0"), None],
            [Some("1"), Some("0"), Some("0/0"), None],
            [Some("1"), Some("1"), Some("0"), None],
        ] {
            assert_eq!(read_identity(&answer(values)), None);
        }
    }
}
