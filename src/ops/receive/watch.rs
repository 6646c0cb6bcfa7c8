//! A look at the server now and then, over an ordinary connection: does the slot still
//! protect our WAL, and does anybody wait for us unawares?
//!
//! Where no ordinary connection is allowed (only the replication line in pg_hba.conf),
//! streaming goes on without these warnings, and that is said once.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::Instrument;

use super::Request;
use super::source::{Facts, Source};
use crate::walsender::{ConnInfo, Connection, Mode, PgError, SlotName};

/// How often the server is looked at.
const INTERVAL: Duration = Duration::from_mins(1);

/// A slot with less room than this, in bytes, is worth a warning.
const SAFE_BYTES_MIN: i64 = 1 << 30;

/// Looks at the server until it is aborted.
#[derive(Debug)]
pub(super) struct Watch {
    task: JoinHandle<()>,
    /// Gives one message when the slot is lost.
    pub(super) lost: mpsc::Receiver<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) fn begin(request: &Request, source: &Source) -> Watch {
    let (sender, lost) = mpsc::channel(1);
    let facts: &Facts = &source.facts;
    let looking = Looking {
        server: facts.server.clone(),
        slot: request.slot.clone(),
        synchronous: request.synchronous,
        application_name: request.server.application_name().to_owned(),
        lost: sender,
        said: Said::default(),
    };
    Watch { task: tokio::spawn(looking.go().in_current_span()), lost }
}

struct Looking {
    server: ConnInfo,
    slot: Option<SlotName>,
    synchronous: bool,
    application_name: String,
    lost: mpsc::Sender<()>,
    said: Said,
}

/// What was said already: a warning a minute would hide everything else.
#[derive(Debug, Default)]
struct Said {
    no_connection: bool,
    slot: bool,
    synchronous: bool,
}

impl Looking {
    async fn go(mut self) {
        let mut interval = tokio::time::interval(INTERVAL);
        loop {
            interval.tick().await;
            if let Err(error) = self.look().await
                && !std::mem::replace(&mut self.said.no_connection, true)
            {
                tracing::info!(
                    "slot and synchronous state are not watched, since an ordinary connection was refused: {error}"
                );
            }
        }
    }

    async fn look(&mut self) -> Result<(), PgError> {
        let mut connection = Connection::connect(&self.server, Mode::Sql).await?;
        self.look_at_slot(&mut connection).await?;
        self.look_at_role(&mut connection).await?;
        connection.close().await;
        Ok(())
    }

    async fn look_at_slot(&mut self, connection: &mut Connection) -> Result<(), PgError> {
        let Some(slot) = &self.slot else { return Ok(()) };
        let query = format!(
            "SELECT wal_status, safe_wal_size FROM pg_catalog.pg_replication_slots WHERE slot_name = '{slot}'"
        );
        let rows = connection.query(&query).await?;
        let status = rows.get(0, "wal_status").unwrap_or_default();
        let safe = rows.get(0, "safe_wal_size").and_then(|text| text.parse::<i64>().ok());
        if status == "lost" {
            let _ = self.lost.try_send(());
        }
        let in_danger = status == "unreserved" || safe.is_some_and(|safe| safe < SAFE_BYTES_MIN);
        if in_danger && !self.said.slot {
            tracing::warn!(
                "replication slot `{slot}` is about to lose WAL that is not stored yet (wal_status {status}, {} bytes left): the store is too slow for this server, or max_slot_wal_keep_size too small",
                safe.unwrap_or_default()
            );
        }
        self.said.slot = in_danger;
        Ok(())
    }

    async fn look_at_role(&mut self, connection: &mut Connection) -> Result<(), PgError> {
        let query = format!(
            "SELECT sync_state FROM pg_catalog.pg_stat_replication WHERE application_name = '{}'",
            self.application_name.replace('\'', "''")
        );
        let rows = connection.query(&query).await?;
        // Without pg_monitor the column is null.
        let Some(state) = rows.get(0, "sync_state") else { return Ok(()) };
        let is_synchronous = matches!(state, "sync" | "quorum");
        let is_unawares = is_synchronous && !self.synchronous;
        if is_unawares && !self.said.synchronous {
            tracing::warn!(
                "synchronous_standby_names makes commits wait for this receiver, which stores only every so often (`rpo`): start it with `--synchronous`, or take it out of synchronous_standby_names"
            );
        }
        self.said.synchronous = is_unawares;
        Ok(())
    }
}
