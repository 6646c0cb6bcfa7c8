//! Physical replication slots: their names, making, dropping and reading them.
//!
//! A slot makes its server keep WAL from `restart_lsn` on, whether or not
//! anybody is connected. A walsender that streams with the slot moves
//! `restart_lsn` to whatever flush position the client reports, unchecked.
//!
//! What the server says to START_REPLICATION with a slot whose WAL it gave up
//! (`wal_status` is `lost`), seen on 14.23, 15.19, 16.15, 17.11 and 18.6:
//!
//! ```text
//! 14-15   the stream begins; a reported flush makes the slot `reserved` again
//! 16-17   the stream begins; the slot stays lost and protects nothing, though
//!         its restart_lsn follows the reports (`wal_status` is `unreserved`
//!         as long as the stream lasts, then `lost` again)
//! 18      ERROR 55000, "can no longer access replication slot"
//! ```
//!
//! So only 18 tells; before, [`SlotState`] tells until the first report
//! (`restart_lsn` is gone), and the view `pg_replication_slots` always.
//!
//! Never here: which server should have a slot, or when to give one up.
//!
//! Source: manual, "Streaming Replication Protocol" and "Replication Slots";
//! `src/backend/replication/slot.c`, `repl_gram.y`, `walsender.c`.

use std::fmt;
use std::str::FromStr;

use crate::pg::{Lsn, Timeline};

use super::connection::Connection;
use super::error::PgError;
use super::quote::quote_identifier;
use super::replication::read_timeline;
use super::rows::Rows;

/// The longest slot name in bytes (`NAMEDATALEN` less its closing zero).
const NAME_BYTES_MAX: usize = 63;

/// The first version with READ_REPLICATION_SLOT.
const READ_SLOT_VERSION: u32 = 150_000;

/// The name of a replication slot: 1 to 63 of `a-z`, `0-9` and `_`.
///
/// Source: `ReplicationSlotValidateName` in `slot.c`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotName(String);

impl SlotName {
    /// Returns the usual name for the cluster of that name: `highwater_` and the name, in the
    /// letters that slots take, cut to what fits.
    pub fn of_cluster(cluster: &str) -> Self {
        let plain = cluster.bytes().map(|byte| match byte.to_ascii_lowercase() {
            byte @ (b'a'..=b'z' | b'0'..=b'9') => char::from(byte),
            _ => '_',
        });
        Self("highwater_".chars().chain(plain).take(NAME_BYTES_MAX).collect())
    }

    /// Returns the name of another slot, for a second stream of whoever uses this one: with `_second`, cut to what fits.
    #[must_use]
    pub fn of_second(&self) -> Self {
        // A name that has it already, at full length, would come out as it is.
        let suffix = if self.0.ends_with("_second") { "_2" } else { "_second" };
        let kept = self.0.len().min(NAME_BYTES_MAX - suffix.len());
        let kept: String = self.0.chars().take(kept).collect();
        Self(format!("{kept}{suffix}"))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text cannot name a replication slot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` cannot name a replication slot: a name has 1 to 63 of the letters `a` to `z`, \
     digits and underscores"
)]
pub struct ParseSlotNameError(pub String);

impl FromStr for SlotName {
    type Err = ParseSlotNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let legal = (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(plain);
        if legal { Ok(Self(text.to_owned())) } else { Err(ParseSlotNameError(text.to_owned())) }
    }
}

/// What the server says about a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// PostgreSQL 14 has no way to ask on a replication connection.
    Unknown,
    /// There is no slot of that name.
    Absent,
    /// A physical slot.
    Physical {
        /// Where the WAL begins that the slot keeps (included). `None`: it
        /// keeps nothing, because nothing was ever reserved, or because the
        /// server gave its WAL up and nothing was reported since. A value is
        /// no promise: see the head of this module for slots that are lost.
        restart_lsn: Option<Lsn>,
        /// The timeline in whose files the server would look for `restart_lsn`.
        restart_timeline: Option<Timeline>,
    },
}

impl Connection {
    /// Makes a permanent physical slot that keeps WAL from the redo position
    /// of the last checkpoint on (RESERVE_WAL). Needs
    /// [`Mode::Replication`](super::Mode::Replication).
    ///
    /// Errors: `Server`, among others where the slot
    /// [is there already](PgError::is_slot_there_already) (of whatever kind),
    /// or all `max_replication_slots` are taken (53400). The connection stays usable.
    pub async fn create_physical_slot(&mut self, name: &SlotName) -> Result<(), PgError> {
        let name = quote_identifier(name.as_str());
        let command = format!("CREATE_REPLICATION_SLOT {name} PHYSICAL RESERVE_WAL");
        self.query(&command).await.map(drop)
    }

    /// Drops a slot, of whatever kind, unless it is in use. What WAL it kept
    /// may be gone at once. Needs [`Mode::Replication`](super::Mode::Replication).
    ///
    /// Errors: `Server`, among others where the slot
    /// [is in use](PgError::is_slot_in_use) or [absent](PgError::is_slot_absent).
    /// The connection stays usable.
    pub async fn drop_slot(&mut self, name: &SlotName) -> Result<(), PgError> {
        let name = quote_identifier(name.as_str());
        self.query(&format!("DROP_REPLICATION_SLOT {name}")).await.map(drop)
    }

    /// Asks for a slot's state. Needs [`Mode::Replication`](super::Mode::Replication).
    ///
    /// PostgreSQL 14 is not asked: the answer is [`SlotState::Unknown`].
    /// Errors: `Server` for a logical slot; the connection stays usable.
    pub async fn read_slot(&mut self, name: &SlotName) -> Result<SlotState, PgError> {
        if self.server_version_num() < READ_SLOT_VERSION {
            return Ok(SlotState::Unknown);
        }
        let name = quote_identifier(name.as_str());
        let answer = self.query(&format!("READ_REPLICATION_SLOT {name}")).await?;
        let state = read_state(&answer);
        self.checked(state.ok_or("the answer to READ_REPLICATION_SLOT makes no sense"))
    }
}

/// Reads the one row `slot_type, restart_lsn, restart_tli`, all null for an unknown slot.
fn read_state(answer: &Rows) -> Option<SlotState> {
    let columns = ["slot_type", "restart_lsn", "restart_tli"];
    if answer.columns != columns || answer.rows.len() != 1 {
        return None;
    }
    let restart_lsn = answer.get(0, "restart_lsn").map(str::parse).transpose().ok()?;
    let restart_timeline = match answer.get(0, "restart_tli") {
        Some(text) => Some(read_timeline(text)?),
        None => None,
    };
    match answer.get(0, "slot_type") {
        None => Some(SlotState::Absent),
        Some("physical") => Some(SlotState::Physical { restart_lsn, restart_timeline }),
        Some(_) => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::walsender::Mode;
    use crate::walsender::fake_server::{FakeServer, ready, row_set};

    const COLUMNS: [&str; 3] = ["slot_type", "restart_lsn", "restart_tli"];

    fn name(text: &str) -> SlotName {
        text.parse().unwrap()
    }

    async fn read(version: &'static str, row: &[Option<&str>]) -> Result<SlotState, PgError> {
        let reply = [row_set(&COLUMNS[..row.len()], &[row]), ready()].concat();
        let server = FakeServer::answering(version, reply).await;
        let mut connection =
            Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
        connection.read_slot(&name("s")).await
    }

    #[test]
    fn only_what_the_server_takes_is_a_slot_name() {
        let longest = "x".repeat(63);
        for good in ["a", "0", "_", "highwater_7513", "physical", &longest] {
            assert_eq!(name(good).to_string(), good);
        }
        let too_long = "x".repeat(64);
        for bad in ["", "A", "a-b", "a b", "a\"b", "\u{e4}", "a\0", &too_long] {
            assert_eq!(bad.parse::<SlotName>(), Err(ParseSlotNameError(bad.to_owned())));
        }
    }

    #[test]
    fn every_cluster_name_gives_a_legal_slot_name() {
        for (cluster, slot) in [("main", "highwater_main"), ("Eu-1.db", "highwater_eu_1_db")] {
            assert_eq!(SlotName::of_cluster(cluster), name(slot));
        }
        let long = SlotName::of_cluster(&"x".repeat(63));
        assert_eq!(long, name(long.as_str()));
    }

    #[test]
    fn a_second_stream_never_has_the_slot_of_the_first() {
        assert_eq!(name("highwater_main").of_second(), name("highwater_main_second"));
        for slot in ["x".repeat(63), format!("{}_second", "x".repeat(56)), "a_second".to_owned()] {
            let second = name(&slot).of_second();
            assert_ne!(second, name(&slot));
            assert_eq!(second, name(second.as_str()), "a legal name");
        }
    }

    #[tokio::test]
    async fn a_slot_is_read_whether_it_keeps_wal_or_not() {
        let kept = read("15.0", &[Some("physical"), Some("1/2000028"), Some("3")]).await.unwrap();
        let (restart_lsn, restart_timeline) = (Some(Lsn(0x1_0200_0028)), Some(Timeline(3)));
        assert_eq!(kept, SlotState::Physical { restart_lsn, restart_timeline });
        let nothing = SlotState::Physical { restart_lsn: None, restart_timeline: None };
        assert_eq!(read("18.1", &[Some("physical"), None, None]).await.unwrap(), nothing);
        assert_eq!(read("18.1", &[None, None, None]).await.unwrap(), SlotState::Absent);
    }

    #[tokio::test]
    async fn version_14_is_not_asked_what_it_cannot_answer() {
        let server = FakeServer::start(|mut visit| async move {
            visit.log_in("14.23", "off").await;
            visit.hold().await;
        })
        .await;
        let mut connection =
            Connection::connect(&server.info(""), Mode::Replication).await.unwrap();
        assert_eq!(connection.read_slot(&name("s")).await.unwrap(), SlotState::Unknown);
    }

    #[tokio::test]
    async fn an_answer_without_sense_is_no_state() {
        for row in [
            &[Some("physical"), Some("1"), None][..],
            &[Some("physical"), Some("0/0"), Some("0")],
            &[Some("logical"), Some("0/0"), Some("1")],
            &[Some("physical"), Some("0/0")],
        ] {
            let error = read("18.1", row).await.unwrap_err();
            assert!(matches!(error, PgError::Protocol { .. }), "{row:?}: {error}");
        }
    }
}
